//! A vmap's life: first and last, the deref callback, what handles keep alive, expanding and revoking under touches, and
//! the owner's own reads and writes.

mod support;

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use kiomap::{AttachOptions, Engine, Error, Kiobuf, Region, Revoke, Sharing, Vmap, page_size};
use nix::errno::Errno;
use support::touch::Refused;
use support::truth::assert_count;
use support::{
    alone, engine_builder, eventually, holes, long, mark, pages, read_page, settled_stats, source, touch,
    vmap_mappings, within,
};

fn whole() -> AttachOptions {
    AttachOptions::new()
}

/// A vmap that counts its callbacks.
fn counting(engine: &Engine, list: &Kiobuf) -> (Vmap, Arc<AtomicUsize>) {
    let derefs = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&derefs);
    let on_deref = move |_: &Vmap| drop(counted.fetch_add(1, Ordering::SeqCst).to_string());
    (engine.vmap_builder(list).on_deref(on_deref).build().unwrap(), derefs)
}

/// Waits until no callback is due: an attach waits for those that are, and then owes one itself.
fn derefs_after_all(vmap: &Vmap, derefs: &AtomicUsize) -> usize {
    let before = vmap.attach(&whole()).unwrap();
    let count = derefs.load(Ordering::SeqCst);
    drop(before);
    eventually("the callback", || derefs.load(Ordering::SeqCst) == count + 1);
    count
}

/// Where a callback finds what is made after it.
type Later<T> = Arc<OnceLock<T>>;

/// T17, B15: the first attach says that it is, the others that they are not.
#[test]
fn only_the_first_attach_is_first() {
    alone("only_the_first_attach_is_first", || {
        let engine = engine_builder().build().unwrap();
        let (vmap, _) = counting(&engine, &pages(2));
        let regions = [0; 3].map(|_| vmap.attach(&whole()).unwrap());
        assert_eq!(regions.each_ref().map(Region::is_first), [true, false, false]);
        assert_count(&engine, &vmap, 3);
        drop(regions);
        assert!(vmap.attach(&whole()).unwrap().is_first());
    });
}

/// T18, B16: in whatever order areas are detached, the callback comes once, with the last.
#[test]
fn the_callback_comes_with_the_last_detach_in_any_order() {
    alone("the_callback_comes_with_the_last_detach_in_any_order", || {
        let engine = engine_builder().build().unwrap();
        for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
            let (vmap, derefs) = counting(&engine, &pages(2));
            let mut regions = [0; 3].map(|_| Some(vmap.attach(&whole()).unwrap()));
            for (n, index) in order.into_iter().enumerate() {
                engine.settle().unwrap();
                assert_eq!(derefs.load(Ordering::SeqCst), 0);
                assert_count(&engine, &vmap, 3 - n);
                regions[index] = None;
            }
            assert_eq!(derefs_after_all(&vmap, &derefs), 1);
        }
    });
}

/// T19, B16: a thousand cycles are a thousand firsts and a thousand callbacks, in turn.
#[test]
fn first_and_deref_alternate_over_many_cycles() {
    alone("first_and_deref_alternate_over_many_cycles", || {
        let engine = engine_builder().build().unwrap();
        let (vmap, derefs) = counting(&engine, &pages(1));
        for cycle in 0..1000 {
            let region = vmap.attach(&whole()).unwrap();
            assert!(region.is_first());
            assert_eq!(derefs.load(Ordering::SeqCst), cycle);
        }
        assert_eq!(derefs_after_all(&vmap, &derefs), 1000);
    });
}

/// T20, T32, B17: the callback finds the area gone from the address space, and may attach, touch, query and detach; its
/// attach is a first one, and is followed by a callback of its own.
#[test]
fn a_callback_may_attach_and_query() {
    alone("a_callback_may_attach_and_query", || {
        let engine = engine_builder().build().unwrap();
        let rounds = Arc::new(AtomicUsize::new(0));
        let (counted, seen) = (Arc::clone(&rounds), Arc::new(Mutex::new(Vec::new())));
        let noted = Arc::clone(&seen);
        let on_deref = move |vmap: &Vmap| {
            noted.lock().unwrap().push((vmap_mappings().len(), vmap.refcount().unwrap()));
            if counted.fetch_add(1, Ordering::SeqCst) < 3 {
                let region = vmap.attach(&whole()).unwrap();
                assert!(region.is_first());
                assert_eq!(read_page(&region, 1), Ok(mark(1)));
                assert_eq!(vmap.nr_pages(), 2);
            }
        };
        let vmap = engine.vmap_builder(&pages(2)).on_deref(on_deref).build().unwrap();
        let region = vmap.attach(&whole()).unwrap();
        assert_eq!(vmap_mappings().len(), 1);
        drop(region);
        eventually("four callbacks", || rounds.load(Ordering::SeqCst) == 4);
        // An attach waits for the last of them.
        drop(vmap.attach(&whole()).unwrap());
        assert_eq!(seen.lock().unwrap()[..4], [(0, 0); 4]);
        assert_eq!(engine.stats().panics, 0);
    });
}

/// T21, B18: a callback may drop the last handle of its vmap, and all the list with it.
#[test]
fn a_callback_may_drop_the_last_handle() {
    alone("a_callback_may_drop_the_last_handle", || {
        for _ in 0..50 {
            let engine = engine_builder().build().unwrap();
            let handle: Arc<Mutex<Option<Vmap>>> = Arc::default();
            let (dropped, (guard, alive)) = (Arc::clone(&handle), guarded(2));
            let mut list = Kiobuf::new();
            list.map_slice(guard).unwrap();
            let builder = engine.vmap_builder(&list).on_deref(move |_| drop(dropped.lock().unwrap().take()));
            drop(list);
            let vmap = builder.build().unwrap();
            let region = vmap.attach(&whole()).unwrap();
            *handle.lock().unwrap() = Some(vmap);
            assert!(read_page(&region, 1).is_ok());
            drop(region);
            eventually("the list's end", || !alive.load(Ordering::SeqCst));
            assert!(handle.lock().unwrap().is_none());
        }
    });
}

/// T22, B19, B32: eight threads attach and detach at random, some with a closure that runs together with the transition:
/// firsts and callbacks alternate strictly, and the count ends at 0.
#[test]
fn firsts_and_derefs_alternate_under_eight_threads() {
    alone("firsts_and_derefs_alternate_under_eight_threads", || {
        let engine = engine_builder().build().unwrap();
        let held = Arc::new(AtomicBool::new(false));
        let (released, derefs) = (Arc::clone(&held), Arc::new(AtomicUsize::new(0)));
        let counted = Arc::clone(&derefs);
        let on_deref = move |vmap: &Vmap| {
            assert!(released.swap(false, Ordering::SeqCst), "a deref without a first");
            assert_eq!(vmap.refcount().unwrap(), 0);
            counted.fetch_add(1, Ordering::SeqCst);
        };
        let vmap = engine.vmap_builder(&pages(2)).on_deref(on_deref).build().unwrap();
        let firsts = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for thread in 0..8_u64 {
                let (vmap, held, firsts) = (&vmap, &held, &firsts);
                scope.spawn(move || {
                    let mut random = thread * 0x9e37_79b9 + 1;
                    let mut regions = Vec::new();
                    for _ in 0..10_000 {
                        random ^= random << 13;
                        random ^= random >> 7;
                        random ^= random << 17;
                        if random.is_multiple_of(2) || regions.is_empty() {
                            let region = vmap
                                .attach_with(&whole(), |first| {
                                    if first {
                                        assert!(!held.swap(true, Ordering::SeqCst), "two firsts in a row");
                                        firsts.fetch_add(1, Ordering::SeqCst);
                                    } else {
                                        assert!(held.load(Ordering::SeqCst), "attached before the first");
                                    }
                                })
                                .unwrap();
                            assert!(vmap.refcount().unwrap() >= 1);
                            if random.is_multiple_of(4) {
                                regions.push(region);
                            }
                        } else {
                            regions.swap_remove(random as usize % regions.len());
                        }
                    }
                });
            }
        });
        assert_count(&engine, &vmap, 0);
        eventually("the last callback", || derefs.load(Ordering::SeqCst) == firsts.load(Ordering::SeqCst));
        assert!(!held.load(Ordering::SeqCst));
        assert_eq!(engine.stats().panics, 0);
    });
}

/// T25, B11: a private mapping is refused, writable or not; nothing is counted, mapped or called back.
#[test]
fn a_private_attach_is_refused() {
    alone("a_private_attach_is_refused", || {
        let engine = engine_builder().build().unwrap();
        let (vmap, derefs) = counting(&engine, &pages(2));
        for options in [whole().sharing(Sharing::Private), whole().sharing(Sharing::Private).read_only()] {
            let refused = vmap.attach(&options).unwrap_err();
            assert!(matches!(refused, Error::PrivateRefused), "{refused}");
            assert_eq!(refused.errno(), Errno::EINVAL);
        }
        assert_eq!((vmap.refcount().unwrap(), vmap_mappings().len()), (0, 0));
        assert_eq!(derefs_after_all(&vmap, &derefs), 0);
    });
}

/// T26: without a callback the end is silent; one that is set or exchanged while areas are attached is the one that runs,
/// also when it exchanges itself.
#[test]
fn a_callback_may_be_absent_set_late_and_exchanged() {
    alone("a_callback_may_be_absent_set_late_and_exchanged", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(1)).unwrap();
        drop(vmap.attach(&whole()).unwrap());
        let calls = Arc::new(Mutex::new(Vec::new()));
        let noting = |name: &'static str| {
            let calls = Arc::clone(&calls);
            move |_: &Vmap| calls.lock().unwrap().push(name)
        };
        let ended = |count: usize| eventually("a callback", || calls.lock().unwrap().len() == count);
        let region = vmap.attach(&whole()).unwrap();
        vmap.set_on_deref(noting("first"));
        vmap.set_on_deref(noting("second"));
        drop(region);
        ended(1);
        let then = noting("then");
        let mut next = Some(noting("next"));
        vmap.set_on_deref(move |vmap| {
            then(vmap);
            vmap.set_on_deref(next.take().unwrap());
        });
        (2..5).for_each(|count| {
            drop(vmap.attach(&whole()).unwrap());
            ended(count);
        });
        assert_eq!(*calls.lock().unwrap(), ["second", "then", "next", "next"]);
        let region = vmap.attach(&whole()).unwrap();
        vmap.clear_on_deref();
        drop(region);
        drop(vmap.attach(&whole()).unwrap());
        assert_eq!(calls.lock().unwrap().len(), 4);
    });
}

/// T27: a callback that panics is caught and counted; the next cycle calls it again.
#[test]
fn a_panic_of_a_callback_is_isolated() {
    alone("a_panic_of_a_callback_is_isolated", || {
        let engine = engine_builder().build().unwrap();
        let calls = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&calls);
        let on_deref = move |_: &Vmap| {
            counted.fetch_add(1, Ordering::SeqCst);
            panic!("in a callback");
        };
        let vmap = engine.vmap_builder(&pages(1)).on_deref(on_deref).build().unwrap();
        for _ in 0..3 {
            let region = vmap.attach(&whole()).unwrap();
            assert!(region.is_first());
            assert_eq!(read_page(&region, 0), Ok(mark(0)));
        }
        eventually("every panic", || engine.stats().panics == 3);
        assert_eq!(calls.load(Ordering::SeqCst), 3);
    });
}

/// T20: an attach to the same vmap from within `attach_with` is told that it would wait for itself; to another it is not.
#[test]
fn an_attach_within_an_attach_is_refused() {
    alone("an_attach_within_an_attach_is_refused", || {
        let engine = engine_builder().build().unwrap();
        let (vmap, other) = (engine.vmap(&pages(1)).unwrap(), engine.vmap(&pages(1)).unwrap());
        let region = vmap.attach_with(&whole(), |first| {
            assert!(first);
            assert_eq!(vmap.attach(&whole()).unwrap_err().errno(), Errno::EDEADLK);
            assert_count(&engine, &vmap, 1);
            drop(other.attach(&whole()).unwrap());
        });
        drop(region.unwrap());
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            drop(vmap.attach_with(&whole(), |_| panic!("in a transition")));
        }));
        assert!(panicked.is_err());
        assert!(within(Duration::from_secs(20), move || vmap.attach(&whole()).is_ok()));
    });
}

/// Bytes that tell when they are dropped.
struct Guarded(Vec<u8>, Arc<AtomicBool>);

impl AsRef<[u8]> for Guarded {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.1.store(false, Ordering::SeqCst);
    }
}

fn guarded(nr_pages: u64) -> (Guarded, Arc<AtomicBool>) {
    let alive = Arc::new(AtomicBool::new(true));
    let bytes = (0..nr_pages).flat_map(|n| std::iter::repeat_n(mark(n), page_size())).collect();
    (Guarded(bytes, Arc::clone(&alive)), alive)
}

/// T30, B7, B33: a region needs neither the list's handle nor the vmap's; what the list keeps is given back with the
/// last region, and not before.
#[test]
fn a_region_outlives_its_handles() {
    alone("a_region_outlives_its_handles", || {
        let engine = engine_builder().build().unwrap();
        let (guard, alive) = guarded(30);
        let mut list = Kiobuf::new();
        list.map_slice(guard).unwrap();
        let nr_pages = list.nr_pages();
        let vmap = engine.vmap(&list).unwrap();
        drop(list);
        let regions = [0; 2].map(|_| vmap.attach(&whole()).unwrap());
        drop(vmap);
        // The bytes need not begin on a page; the last one always lies on the list's last page but one or two.
        let mut byte = [0];
        regions[0].read_at((nr_pages as usize - 2) * page_size(), &mut byte).unwrap();
        assert!(byte[0] >= mark(28) && byte[0] <= mark(29));
        let [first, second] = regions;
        drop(first);
        engine.settle().unwrap();
        assert!(alive.load(Ordering::SeqCst));
        assert!(read_page(&second, 3).is_ok());
        assert_eq!(second.vmap().refcount().unwrap(), 1);
        drop(second);
        eventually("the list's end", || !alive.load(Ordering::SeqCst));
    });
}

/// T31, B29: a vmap with areas is not destroyed; one without is, and then refuses attaches.
#[test]
fn destroy_is_refused_while_areas_are_attached() {
    alone("destroy_is_refused_while_areas_are_attached", || {
        let engine = engine_builder().build().unwrap();
        let (vmap, derefs) = counting(&engine, &pages(1));
        let regions = [0; 2].map(|_| vmap.attach(&whole()).unwrap());
        for (attached, region) in [2, 1].into_iter().zip(regions) {
            let refused = vmap.destroy().unwrap_err();
            assert!(matches!(refused, Error::Busy { refcount } if refcount == attached), "{refused}");
            assert_eq!(refused.errno(), Errno::EBUSY);
            assert_eq!(read_page(&region, 0), Ok(mark(0)));
        }
        eventually("the callback", || derefs.load(Ordering::SeqCst) == 1);
        eventually("that it is settled", || vmap.destroy().is_ok());
        assert_eq!(vmap.attach(&whole()).unwrap_err().errno(), Errno::ESHUTDOWN);
        assert_eq!((vmap.refcount().unwrap(), vmap_mappings().len()), (0, 0));
    });
}

/// T31: a destroy is refused while the callback runs, and allowed from within it.
#[test]
fn a_running_callback_keeps_a_vmap_from_being_destroyed() {
    alone("a_running_callback_keeps_a_vmap_from_being_destroyed", || {
        let engine = engine_builder().build().unwrap();
        let (enter, entered) = std::sync::mpsc::channel();
        let (leave, left) = std::sync::mpsc::channel();
        let on_deref = move |_: &Vmap| {
            enter.send(()).unwrap();
            left.recv().unwrap();
        };
        let vmap = engine.vmap_builder(&pages(1)).on_deref(on_deref).build().unwrap();
        drop(vmap.attach(&whole()).unwrap());
        entered.recv().unwrap();
        assert!(matches!(vmap.destroy(), Err(Error::Busy { refcount: 0 })));
        leave.send(()).unwrap();
        eventually("the callback's end", || vmap.destroy().is_ok());
    });
}

/// B34: the owner's reads and writes and the regions' are of the same bytes, whoever comes first to a page; across page
/// borders too.
#[test]
fn the_owner_and_the_regions_see_the_same_bytes() {
    needs_sources!();
    alone("the_owner_and_the_regions_see_the_same_bytes", || {
        let (page, engine) = (page_size(), engine_builder().build().unwrap());
        for list in [pages(100), source(100, |_, _| Ok(()))] {
            let vmap = engine.vmap(&list).unwrap();
            let region = vmap.attach(&whole()).unwrap();
            // Before the first touch, over a border.
            vmap.write_at(5 * page as u64 - 2, &[1, 2, 3, 4]).unwrap();
            let mut seen = [0; 6];
            region.read_at(5 * page - 3, &mut seen).unwrap();
            assert_eq!(seen, [mark(4), 1, 2, 3, 4, mark(5)]);
            // After it.
            vmap.write_at(5 * page as u64, &[7]).unwrap();
            assert_eq!(touch::read(region.as_ptr().wrapping_add(5 * page)), Ok(7));
            // The region first, far from what is resident.
            region.write_at(90 * page - 1, &[8, 9]).unwrap();
            let mut seen = [0; 4];
            vmap.read_at(90 * page as u64 - 2, &mut seen).unwrap();
            assert_eq!(seen, [mark(89), 8, 9, mark(90)]);
            // All of it, some resident and some not; and nothing of it lost.
            let mut all = vec![0; 100 * page];
            vmap.read_at(0, &mut all).unwrap();
            let mut shown = vec![0; 100 * page];
            region.read_at(0, &mut shown).unwrap();
            assert!(all == shown);
            assert_eq!(all[60 * page], mark(60));
        }
    });
}

/// Ranges past the end, and holes within, are typed errors; nothing is written then past the hole.
#[test]
fn an_owners_range_past_the_end_or_over_a_hole_is_refused() {
    alone("an_owners_range_past_the_end_or_over_a_hole_is_refused", || {
        let (page, engine) = (page_size() as u64, engine_builder().build().unwrap());
        let vmap = engine.vmap(&Kiobuf::concat(&[pages(2), holes(1), pages(1)]).unwrap()).unwrap();
        for (offset, len) in
            [(4 * page, 1), (4 * page - 1, 2), (u64::MAX, 1), (u64::MAX - 1, 2), (0, 5 * page), (i64::MAX as u64, 1)]
        {
            let mut bytes = vec![0; len as usize];
            assert_eq!(vmap.read_at(offset, &mut bytes).unwrap_err().errno(), Errno::EINVAL);
            assert_eq!(vmap.write_at(offset, &bytes).unwrap_err().errno(), Errno::EINVAL);
        }
        for (offset, len) in [(2 * page, 1), (2 * page - 1, 2), (0, 4 * page), (3 * page - 1, 2)] {
            let mut bytes = vec![0; len as usize];
            for refused in [vmap.read_at(offset, &mut bytes), vmap.write_at(offset, &bytes)] {
                let refused = refused.unwrap_err();
                assert!(matches!(refused, Error::NoPage { pgoff: 2, .. }), "{refused}");
                assert_eq!(refused.errno(), Errno::EFAULT);
            }
        }
        for offset in [0, page, 4 * page] {
            vmap.read_at(offset, &mut []).unwrap();
            vmap.write_at(offset, &[]).unwrap();
        }
        let mut bytes = vec![0; 2 * page as usize];
        vmap.read_at(0, &mut bytes).unwrap();
        assert!((0..).zip(bytes.chunks(page_size())).all(|(n, page)| page.iter().all(|&byte| byte == mark(n))));
    });
}

/// The owner reads and writes while four threads touch: each page is read right by everybody, and each write is kept.
#[test]
fn the_owner_reads_and_writes_under_touches() {
    needs_sources!();
    alone("the_owner_reads_and_writes_under_touches", || {
        const PAGES: u64 = 512;
        for list in [pages(PAGES), source(PAGES, |_, _| Ok(()))] {
            let engine = engine_builder().build().unwrap();
            let vmap = engine.vmap(&list).unwrap();
            let regions = [0; 2].map(|_| vmap.attach(&whole()).unwrap());
            std::thread::scope(|scope| {
                for thread in 0..4_u64 {
                    let region = &regions[thread as usize % 2];
                    scope.spawn(move || {
                        for page in 0..PAGES {
                            let page = (page * 5 + thread * 128) % PAGES;
                            assert_eq!(read_page(region, page), Ok(mark(page)));
                            let own = region.as_ptr().wrapping_add(page as usize * page_size() + 100 + thread as usize);
                            touch::write(own, thread as u8 + 1).unwrap();
                        }
                    });
                }
                for page in (0..PAGES).rev() {
                    let mut byte = [0];
                    vmap.read_at(page * page_size() as u64 + 11, &mut byte).unwrap();
                    assert_eq!(byte, [mark(page)]);
                    vmap.write_at(page * page_size() as u64 + 200, &[0xee]).unwrap();
                }
            });
            let mut bytes = vec![0; page_size()];
            for page in 0..PAGES {
                vmap.read_at(page * page_size() as u64, &mut bytes).unwrap();
                assert_eq!((&bytes[100..104], bytes[200]), (&[1, 2, 3, 4][..], 0xee));
                bytes[100..104].fill(mark(page));
                bytes[200] = mark(page);
                assert!(bytes.iter().all(|&byte| byte == mark(page)));
            }
            assert_eq!(settled_stats(&engine).pages_poisoned, 0);
        }
    });
}

/// User data belongs to the vmap, and the callback finds it.
#[test]
fn user_data_is_found_by_its_type() {
    alone("user_data_is_found_by_its_type", || {
        let engine = engine_builder().build().unwrap();
        let found: Later<String> = Later::default();
        let noted = Arc::clone(&found);
        let builder = engine.vmap_builder(&pages(1)).user_data(String::from("mine"));
        let vmap = builder.on_deref(move |vmap| drop(noted.set(vmap.user_data::<String>().unwrap().clone()))).build();
        let vmap = vmap.unwrap();
        assert!(vmap.user_data::<u32>().is_none());
        drop(vmap.attach(&whole()).unwrap());
        eventually("the callback", || found.get().is_some_and(|found| found == "mine"));
    });
}

/// A touch that meets a revoke, a growth and a detach at once is still bytes, SIGBUS or SIGSEGV; nothing hangs.
#[test]
fn everything_at_once_is_bytes_or_a_signal() {
    needs_sources!();
    alone("everything_at_once_is_bytes_or_a_signal", || {
        for round in 0..40_u64 {
            let engine = engine_builder().workers(2).fault_around_pages(8).build().unwrap();
            let list = if round.is_multiple_of(2) { pages(64) } else { source(64, |_, _| Ok(())) };
            let vmap = engine.vmap_builder(&list).expandable().build().unwrap();
            let region = vmap.attach(&long(128)).unwrap();
            let (start, touched) = (region.as_ptr() as usize, AtomicU64::new(0));
            // From then on the addresses may be anybody's: a thread that starts maps its stacks.
            let dropping = AtomicBool::new(false);
            std::thread::scope(|scope| {
                for thread in 0..4 {
                    let (touched, dropping) = (&touched, &dropping);
                    scope.spawn(move || {
                        for page in 0..128 {
                            let page = (page * 3 + thread * 32) % 128;
                            let at = (start + page * page_size() + 11) as *const u8;
                            match touch::read(at) {
                                Ok(byte) => {
                                    let right = byte == mark(page as u64 % 64);
                                    assert!(right || dropping.load(Ordering::SeqCst), "page {page}: {byte}");
                                }
                                Err(Refused { signal, .. }) => assert!([libc::SIGBUS, libc::SIGSEGV].contains(&signal)),
                            }
                            touched.fetch_add(1, Ordering::SeqCst);
                        }
                    });
                }
                eventually("touches", || touched.load(Ordering::SeqCst) > round);
                vmap.expand(&pages(64)).unwrap();
                eventually("touches", || touched.load(Ordering::SeqCst) > 2 * round);
                vmap.revoke(if round % 4 < 2 { Revoke::Soft } else { Revoke::Hard }).unwrap();
                dropping.store(true, Ordering::SeqCst);
                drop(region);
            });
            assert_count(&engine, &vmap, 0);
        }
    });
}
