//! Transparent huge pages of regions: on request or by advice, the bytes stay, and nothing is brought that was not touched.

mod support;

use std::fs::{self, File};

use kiomap::{AttachOptions, Engine, Error, Features, Kiobuf, Region, Revoke, Vmap, page_size};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use support::raw::FAR;
use support::scene::child;
use support::truth::assert_count;
use support::{
    alone, assert_sigbus, engine_builder, eventually, holes, mark, pages, read_page, reap_ok, taken_away, touch,
    without_poison,
};

const SETTING: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
const HUGE: usize = 2 << 20;

/// Base pages in a huge one.
fn per_huge() -> u64 {
    (HUGE / page_size()) as u64
}

/// The system's setting, changed where that is allowed until this is dropped.
struct Setting {
    before: Option<String>,
    _lock: Option<Flock<File>>,
}

impl Setting {
    fn advise() -> Setting {
        let lock = File::open(SETTING).ok().and_then(|file| Flock::lock(file, FlockArg::LockExclusive).ok());
        let text = fs::read_to_string(SETTING).unwrap_or_default();
        let before = text.split(['[', ']']).nth(1).map(str::to_owned);
        Setting { before: before.filter(|_| fs::write(SETTING, "advise").is_ok()), _lock: lock }
    }
}

impl Drop for Setting {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = fs::write(SETTING, before);
        }
    }
}

fn resident(engine: &Engine, vmap: &Vmap) -> u64 {
    let snapshot = engine.snapshot().unwrap();
    let found = snapshot.vmaps.iter().find(|shown| shown.id == vmap.id()).unwrap();
    found.resident_bytes / page_size() as u64
}

/// Fails unless that many pages are there. While the kernel tries to make a huge page by itself, in the background, it counts
/// those that it would need.
#[track_caller]
fn assert_resident(engine: &Engine, vmap: &Vmap, nr_pages: u64) {
    eventually("the pages are as many as were touched", || resident(engine, vmap) == nr_pages);
}

fn advise(region: &Region, offset: usize, len: usize, advice: i32) -> Result<(), Errno> {
    // SAFETY: no reference to the region's bytes is held, and none of them changes.
    Errno::result(unsafe { libc::madvise(region.as_ptr().add(offset).cast(), len, advice) }).map(drop)
}

/// The bytes of a region that are mapped as huge pages here.
fn huge_bytes(region: &Region) -> usize {
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
    let start = format!("{:x}-", region.as_ptr() as usize);
    let lines = smaps.lines().skip_while(|line| !line.starts_with(&start));
    let line = lines.into_iter().find(|line| line.starts_with("ShmemPmdMapped:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

/// T97: by raw advice, in whatever order with touches, contents are right and nothing comes that was not touched.
#[test]
fn advice_to_use_huge_pages_brings_no_page() {
    let _setting = std::env::var_os("KIOMAP_TEST_ALONE").is_none().then(Setting::advise);
    alone("advice_to_use_huge_pages_brings_no_page", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let n = per_huge();
        // A hole in the second huge page, an end in the third.
        let list = Kiobuf::concat(&[pages(n + 20), holes(3), pages(n)]).unwrap();
        let vmap = engine.vmap(&list).unwrap();
        let region = vmap.attach(&AttachOptions::new().at(FAR).len_bytes(4 * HUGE)).unwrap();
        assert_eq!(read_page(&region, 7), Ok(mark(7)));
        // Page 7; then two more, that are touched below. They are not counted here: the kernel may be trying at that moment.
        for (advice, before) in [(libc::MADV_HUGEPAGE, 1), (libc::MADV_COLLAPSE, 3)] {
            let whole = advise(&region, 0, 4 * HUGE, advice);
            assert!(advice != libc::MADV_COLLAPSE || whole.is_err(), "pages are missing");
            for huge in 0..4 {
                let _ = advise(&region, huge * HUGE, HUGE, advice);
            }
            assert_resident(&engine, &vmap, before);
            assert_eq!(read_page(&region, n + 19), Ok(mark(n + 19)));
            touch::write(support::in_page(&region, n + 30), 0xee).unwrap();
            assert_sigbus(&region, n + 20);
            assert_sigbus(&region, 2 * n + 23);
        }
        // One page at a time, all of the first huge page; then what it takes for a huge page is there.
        for page in 0..n {
            assert_eq!(read_page(&region, page), Ok(mark(page)));
        }
        assert_resident(&engine, &vmap, n + 2);
        let _ = advise(&region, 0, HUGE, libc::MADV_COLLAPSE);
        assert_resident(&engine, &vmap, n + 2);
        for page in (0..n).rev() {
            assert_eq!(read_page(&region, page), Ok(mark(page)));
        }
        assert_eq!(touch::read(support::in_page(&region, n + 30)), Ok(0xee));
        assert_eq!(read_page(&region, n + 29), Ok(mark(6)));
        assert_sigbus(&region, n + 22);
        assert_sigbus(&region, 4 * n - 1);
        assert_count(&engine, &vmap, 1);
    });
}

/// Pages that are there become huge pages, in each process that asks; a block with a missing page is refused, and says so.
#[test]
fn pages_that_are_there_become_huge_pages() {
    if taken_away().contains(Features::POISON) {
        skip!("older kernels would fill missing pages with zeros, so it is refused");
    }
    alone("pages_that_are_there_become_huge_pages", || {
        let engine = engine_builder().fault_around_pages(512).build().unwrap();
        let n = per_huge();
        let vmap = engine.vmap(&pages(3 * n + 5)).unwrap();
        let region = vmap.attach(&AttachOptions::new().at(FAR).len_bytes(4 * HUGE)).unwrap();
        for page in 0..2 * n {
            assert_eq!(read_page(&region, page), Ok(mark(page)));
        }
        match region.collapse(0..HUGE) {
            Ok(made) => assert_eq!(made, 1),
            Err(Error::NotCollapsed { errno: Errno::EINVAL | Errno::ENOMEM, .. }) => {
                skip!("this kernel makes no transparent huge pages of shared memory, or has none free");
            }
            Err(other) => panic!("{other}"),
        }
        assert_eq!(huge_bytes(&region), HUGE);
        // Of the missing ones, the first is named; what can be made is made.
        let refused = region.collapse(0..region.len_bytes()).unwrap_err();
        assert!(matches!(refused, Error::NotCollapsed { offset, made: 2, .. } if offset == 2 * HUGE), "{refused}");
        assert_eq!((huge_bytes(&region), resident(&engine, &vmap)), (2 * HUGE, 2 * n));
        assert_eq!(read_page(&region, 2 * n + 9), Ok(mark(2 * n + 9)));
        let pid = child(|| {
            assert_eq!(region.collapse(0..2 * HUGE).unwrap(), 2);
            assert_eq!(huge_bytes(&region), 2 * HUGE);
            touch::write(support::in_page(&region, 5), 0x55).unwrap();
        });
        reap_ok(pid);
        assert_eq!(touch::read(support::in_page(&region, 5)), Ok(0x55));
        for page in (0..2 * n).filter(|&page| page != 5) {
            assert_eq!(read_page(&region, page), Ok(mark(page)));
        }
        // Broken up by an unmap of a page in the middle, and by a revoke.
        support::raw::munmap(support::scene::at(&region, n + 3), 1);
        assert_eq!(read_page(&region, n + 4), Ok(mark(n + 4)));
        assert_count(&engine, &vmap, 2);
        vmap.revoke(Revoke::Hard).unwrap();
        assert_sigbus(&region, 1);
        assert_eq!(resident(&engine, &vmap), 0);
    });
}

/// What lies otherwise in memory than in the list is refused, and so are ranges without a huge page.
#[test]
fn what_can_not_be_a_huge_page_is_refused() {
    if taken_away().contains(Features::POISON) {
        skip!("older kernels would fill missing pages with zeros, so it is refused");
    }
    alone("what_can_not_be_a_huge_page_is_refused", || {
        let engine = engine_builder().fault_around_pages(512).build().unwrap();
        let vmap = engine.vmap(&pages(2 * per_huge())).unwrap();
        let region = vmap.attach(&AttachOptions::new().at(FAR + page_size())).unwrap();
        for page in 0..2 * per_huge() {
            assert_eq!(read_page(&region, page), Ok(mark(page)));
        }
        let refused = region.collapse(0..region.len_bytes()).unwrap_err();
        assert!(matches!(refused, Error::NotCollapsed { errno: Errno::EINVAL, made: 0, .. }), "{refused}");
        for (start, end) in [(0, page_size()), (0, 3 * HUGE), (HUGE, 0), (0, 0)] {
            let refused = region.collapse(start..end).unwrap_err();
            assert!(matches!(refused, Error::Invalid { .. }), "{start}..{end}: {refused}");
        }
        assert_eq!(huge_bytes(&region), 0);
    });
}

/// Kernels before Linux 6.4 fill what is missing with zeros when they put pages together, and POISON tells a kernel of 6.6.
#[test]
fn older_kernels_are_not_asked_for_huge_pages() {
    let engine = without_poison().build().unwrap();
    let n = per_huge();
    let region = engine.vmap(&pages(n)).unwrap().attach(&AttachOptions::new()).unwrap();
    let refused = region.collapse(0..region.len_bytes()).unwrap_err();
    assert!(matches!(refused, Error::Unsupported { missing: Features::POISON, .. }), "{refused}");
}
