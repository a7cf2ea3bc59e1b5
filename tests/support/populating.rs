//! What tests of populating have in common: ranges and marks, and a populating among everything that may come between.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use kiomap::{AttachOptions, Engine, Error, Kiobuf, Region, Revoke, Vmap, page_size};

use super::raw::FAR;
use super::scene::{Rng, at, sourced_pages};
use super::{mark, pages, taken_away, touch};

/// A range of pages of a region in bytes.
pub(crate) fn bytes(pages: Range<u64>) -> Range<usize> {
    pages.start as usize * page_size()..pages.end as usize * page_size()
}

#[track_caller]
pub(crate) fn assert_marks(region: &Region, wanted: Range<u64>) {
    wanted.into_iter().for_each(|page| assert_eq!(touch::read(at(region, page)), Ok(mark(page)), "page {page}"));
}

/// Pages of a source, where there are any.
pub(crate) fn slow(nr_pages: u64) -> Kiobuf {
    let without = taken_away().contains(kiomap::Features::THREAD_ID);
    if without { pages(nr_pages) } else { sourced_pages(nr_pages) }
}

/// Has two threads populate a region of `nr_pages` while a third touches all of it in a random order, and a fourth unmaps
/// `cut_pages` and exchanges the list or takes it back; what is touched is right, or refused for one of these reasons.
pub(crate) fn populate_amid_trouble(engine: &Engine, nr_pages: u64, cut_pages: u64, seed: u64) -> (Vmap, Region) {
    let list = if seed.is_multiple_of(2) { pages(nr_pages) } else { slow(nr_pages) };
    let vmap = engine.vmap_builder(&list).expandable().build().unwrap();
    let region = vmap.attach(&AttachOptions::new().at(FAR)).unwrap();
    let cut = 2 * cut_pages * (1 + seed % 5);
    std::thread::scope(|scope| {
        let (region, vmap) = (&region, &vmap);
        for populating in 0..2 {
            scope.spawn(move || match region.populate(bytes(200 * populating..nr_pages)) {
                Ok(()) | Err(Error::NotPopulated { .. }) => {}
                Err(other) => panic!("{other}"),
            });
        }
        scope.spawn(move || {
            let mut order: Vec<u64> = (0..nr_pages).collect();
            Rng::new(seed).shuffle(&mut order);
            for page in order {
                match touch::read(at(region, page)) {
                    Ok(byte) => assert_eq!(byte, mark(page), "page {page}"),
                    Err(refused) => assert!(
                        (!seed.is_multiple_of(3) && refused.is_sigbus_at(at(region, page) as usize))
                            || ((cut..cut + cut_pages).contains(&page) && refused.is_sigsegv()),
                        "page {page}: {refused:?}"
                    ),
                }
            }
        });
        scope.spawn(move || {
            Rng::new(seed).dawdle(6_000 * cut_pages);
            // SAFETY: nothing refers to the pages.
            assert_eq!(unsafe { libc::munmap(at(region, cut).cast(), cut_pages as usize * page_size()) }, 0);
            match seed % 3 {
                0 => vmap.expand(&pages(10)).unwrap(),
                1 => vmap.revoke(Revoke::Soft).unwrap(),
                _ => vmap.revoke(Revoke::Hard).unwrap(),
            }
        });
    });
    (vmap, region)
}

/// The pages of a region that are mapped in this process, as the kernel's page table has them.
pub(crate) fn mapped(region: &Region) -> u64 {
    mapped_of(region, 0..(region.len_bytes() / page_size()) as u64)
}

/// As [`mapped`], of these pages of the region.
pub(crate) fn mapped_of(region: &Region, pages: Range<u64>) -> u64 {
    const PRESENT: u64 = 1 << 63;
    let first = (region.as_ptr() as usize / page_size()) as u64 + pages.start;
    let mut entries = vec![0; (pages.end - pages.start) as usize * size_of::<u64>()];
    File::open("/proc/self/pagemap").unwrap().read_exact_at(&mut entries, first * size_of::<u64>() as u64).unwrap();
    let entries = entries.as_chunks().0.iter().copied().map(u64::from_ne_bytes);
    entries.filter(|entry| entry & PRESENT != 0).count() as u64
}
