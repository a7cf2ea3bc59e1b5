//! A vmap's list, exchanged: expanded and revoked, also under touches.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use kiomap::{AttachOptions, Error, Kiobuf, Revoke, page_size};
use nix::errno::Errno;
use support::{alone, assert_sigbus, engine_builder, eventually, in_page, long, mark, pages, read_page, source, touch};

fn whole() -> AttachOptions {
    AttachOptions::new()
}

/// T13: what was SIGBUS past the end is memory once the list is expanded, at the same address, in every region and also
/// where a touch had met SIGBUS before.
#[test]
fn expanding_heals_the_tail() {
    needs_sources!();
    alone("expanding_heals_the_tail", || {
        let engine = engine_builder().build().unwrap();
        for tail in [pages(30), source(30, |_, _| Ok(()))] {
            let vmap = engine.vmap_builder(&pages(3)).expandable().build().unwrap();
            let regions = [vmap.attach(&long(40)).unwrap(), vmap.attach(&long(40).read_only()).unwrap()];
            for region in &regions {
                [3, 4, 32, 33].into_iter().for_each(|page| assert_sigbus(region, page));
            }
            vmap.expand(&tail).unwrap();
            assert_eq!(vmap.nr_pages(), 33);
            for region in &regions {
                for page in (0..33).rev() {
                    assert_eq!(read_page(region, page), Ok(mark(if page < 3 { page } else { page - 3 })));
                }
                assert_sigbus(region, 33);
            }
            let mut byte = [0];
            vmap.read_at(32 * page_size() as u64, &mut byte).unwrap();
            assert_eq!(byte, [mark(29)]);
        }
    });
}

/// T13: a vmap that was not built for it is not expanded, nor is one by too many pages; nothing changes.
#[test]
fn an_expansion_that_is_refused_changes_nothing() {
    alone("an_expansion_that_is_refused_changes_nothing", || {
        let engine = engine_builder().build().unwrap();
        let fixed = engine.vmap(&pages(3)).unwrap();
        assert!(matches!(fixed.expand(&pages(1)), Err(Error::Invalid { .. })));
        let vmap = engine.vmap_builder(&pages(3)).expandable().build().unwrap();
        let region = vmap.attach(&long(5)).unwrap();
        let mut huge = Kiobuf::new();
        huge.map_zero(i64::MAX as u64 / page_size() as u64).unwrap();
        assert_eq!(vmap.expand(&huge).unwrap_err().errno(), Errno::EOVERFLOW);
        assert_eq!(vmap.nr_pages(), 3);
        assert_sigbus(&region, 3);
        assert_eq!(read_page(&region, 2), Ok(mark(2)));
        vmap.expand(&Kiobuf::new()).unwrap();
        assert_eq!(vmap.nr_pages(), 3);
    });
}

/// T14, B31: after a soft revoke resident pages stay, for reading and for writing, in regions of before and after; the
/// others are SIGBUS. After a hard one all are.
#[test]
fn a_revoke_takes_what_is_not_resident_or_everything() {
    needs_sources!();
    alone("a_revoke_takes_what_is_not_resident_or_everything", || {
        for list in [pages(64), source(64, |_, _| Ok(()))] {
            let engine = engine_builder().fault_around_pages(1).build().unwrap();
            let vmap = engine.vmap(&list).unwrap();
            let region = vmap.attach(&whole()).unwrap();
            (0..64).step_by(2).for_each(|page| assert_eq!(read_page(&region, page), Ok(mark(page))));
            vmap.revoke(Revoke::Soft).unwrap();
            let later = vmap.attach(&whole()).unwrap();
            for region in [&region, &later] {
                for page in 0..64 {
                    if page % 2 == 0 {
                        assert_eq!(read_page(region, page), Ok(mark(page)));
                        touch::write(in_page(region, page), mark(page)).unwrap();
                    } else {
                        assert_sigbus(region, page);
                    }
                }
            }
            let mut byte = [0];
            vmap.read_at(2 * page_size() as u64, &mut byte).unwrap();
            assert_eq!(byte, [mark(2)]);
            assert!(matches!(vmap.read_at(page_size() as u64, &mut byte), Err(Error::NoPage { pgoff: 1, .. })));
            vmap.revoke(Revoke::Hard).unwrap();
            for region in [&region, &later, &vmap.attach(&whole()).unwrap()] {
                (0..64).for_each(|page| assert_sigbus(region, page));
            }
            assert!(matches!(vmap.read_at(0, &mut byte), Err(Error::NoPage { pgoff: 0, .. })));
        }
    });
}

/// T13, T14: what is appended after a revoke comes behind what was revoked, which stays SIGBUS.
#[test]
fn expanding_after_a_revoke_appends() {
    alone("expanding_after_a_revoke_appends", || {
        for how in [Revoke::Soft, Revoke::Hard] {
            for appended in [1, 5] {
                let engine = engine_builder().fault_around_pages(1).build().unwrap();
                let vmap = engine.vmap_builder(&pages(3)).expandable().build().unwrap();
                let region = vmap.attach(&long(10)).unwrap();
                assert_eq!(read_page(&region, 0), Ok(mark(0)));
                vmap.revoke(how).unwrap();
                assert_sigbus(&region, 1);
                vmap.expand(&pages(appended)).unwrap();
                assert_eq!(vmap.nr_pages(), 3 + appended);
                (1..3).for_each(|page| assert_sigbus(&region, page));
                match how {
                    Revoke::Soft => assert_eq!(read_page(&region, 0), Ok(mark(0))),
                    _ => assert_sigbus(&region, 0),
                }
                (0..appended).for_each(|page| assert_eq!(read_page(&region, 3 + page), Ok(mark(page))));
                assert_sigbus(&region, 3 + appended);
            }
        }
    });
}

/// T107, B30: the list grows while four threads touch its tail: each touch is the page's bytes or SIGBUS, and never
/// SIGBUS once the growing has returned.
#[test]
fn a_list_that_grows_under_touches_is_never_torn() {
    needs_sources!();
    alone("a_list_that_grows_under_touches_is_never_torn", || {
        const STEPS: u64 = 120;
        let engine = engine_builder().build().unwrap();
        for from_source in [false, true] {
            let vmap = engine.vmap_builder(&pages(1)).expandable().build().unwrap();
            let region = vmap.attach(&long(STEPS * 3 + 8)).unwrap();
            let (grown, done) = (AtomicU64::new(1), AtomicBool::new(false));
            std::thread::scope(|scope| {
                for thread in 0..4 {
                    let (region, grown, done) = (&region, &grown, &done);
                    scope.spawn(move || {
                        while !done.load(Ordering::SeqCst) {
                            let there = grown.load(Ordering::SeqCst);
                            for page in there.saturating_sub(2)..there + 3 + thread {
                                match read_page(region, page) {
                                    Ok(byte) => assert_eq!(byte, mark(page)),
                                    Err(refused) => {
                                        assert!(refused.is_sigbus_at(in_page(region, page) as usize), "{refused:?}");
                                        assert!(page >= there, "page {page} of {there} was refused");
                                    }
                                }
                            }
                        }
                    });
                }
                for step in 0..STEPS {
                    let (first, len) = (grown.load(Ordering::SeqCst), step % 3 + 1);
                    let mut tail = Kiobuf::new();
                    if from_source {
                        tail.map_source(Arc::new(From(first)), len * page_size() as u64).unwrap();
                    } else {
                        let bytes = (first..first + len).flat_map(|n| std::iter::repeat_n(mark(n), page_size()));
                        tail.map_bytes(bytes.collect()).unwrap();
                    }
                    vmap.expand(&tail).unwrap();
                    grown.store(first + len, Ordering::SeqCst);
                }
                done.store(true, Ordering::SeqCst);
            });
            (0..vmap.nr_pages()).for_each(|page| assert_eq!(read_page(&region, page), Ok(mark(page))));
        }
    });
}

/// A source whose page 0 is marked as this page.
struct From(u64);

impl kiomap::PageSource for From {
    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> std::io::Result<()> {
        support::fill_marks(self.0 + offset_bytes / page_size() as u64, buf);
        Ok(())
    }
}

/// T107, T14, B30: the list is revoked while four threads touch: each touch is the page's bytes or SIGBUS, never zeros;
/// after a hard revoke has returned nothing is anything but SIGBUS.
#[test]
fn a_revoke_under_touches_shows_bytes_or_sigbus() {
    needs_sources!();
    alone("a_revoke_under_touches_shows_bytes_or_sigbus", || {
        for round in 0..60_u64 {
            let how = if round.is_multiple_of(2) { Revoke::Soft } else { Revoke::Hard };
            let engine =
                engine_builder().fault_around_pages(if round.is_multiple_of(3) { 1 } else { 16 }).build().unwrap();
            let list = if round % 4 < 2 { pages(256) } else { source(256, |_, _| Ok(())) };
            let vmap = engine.vmap(&list).unwrap();
            let regions = [0; 2].map(|_| vmap.attach(&whole()).unwrap());
            let (revoked, touched) = (AtomicBool::new(false), AtomicU64::new(0));
            std::thread::scope(|scope| {
                for thread in 0..4_u64 {
                    let (regions, revoked, touched) = (&regions, &revoked, &touched);
                    scope.spawn(move || {
                        let region = &regions[thread as usize % 2];
                        for page in 0..256 {
                            let page = (page * 7 + thread * 64) % 256;
                            let before = revoked.load(Ordering::SeqCst);
                            let outcome = read_page(region, page);
                            touched.fetch_add(1, Ordering::SeqCst);
                            match outcome {
                                Ok(byte) => {
                                    assert_eq!(byte, mark(page));
                                    assert!(how == Revoke::Soft || !before, "page {page} after a hard revoke");
                                }
                                Err(refused) => {
                                    assert!(refused.is_sigbus_at(in_page(region, page) as usize), "{refused:?}");
                                }
                            }
                        }
                    });
                }
                eventually("touches", || touched.load(Ordering::SeqCst) > 20);
                vmap.revoke(how).unwrap();
                revoked.store(true, Ordering::SeqCst);
            });
        }
    });
}
