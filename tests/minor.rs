//! Minor faults: what a memfd holds is mapped by the engine, in windows (`VmapBuilder::minor_faults`), to the byte, in every
//! process, also when the engine is gone.

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use kiomap::{
    AttachOptions, Backing, Delivery, Engine, EngineBuilder, Error, Features, Kiobuf, Region, Revoke, Shutdown, Vmap,
    page_size,
};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{Resource, getrlimit};
use support::raw::{self, ELSEWHERE, FAR, assert_shows, page};
use support::scene::{Rng, Told, at, child, kill_and_reap, settled};
use support::truth::{assert_count, assert_nobody_waits, assert_truth};
use support::{alone, assert_sigbus, eventually, in_page, long, mark, pages, read_page, reap_ok, settled_stats, touch};

/// Whatever delivery the suite runs with.
fn engine_builder() -> EngineBuilder {
    support::engine_builder().delivery(Delivery::Handler)
}

fn without_poison() -> EngineBuilder {
    support::without_poison().delivery(Delivery::Handler)
}

/// Whether mremap may bring pages of a locked mapping.
fn may_lock(engine: &Engine) -> bool {
    let (soft, _) = getrlimit(Resource::RLIMIT_MEMLOCK).unwrap();
    soft >= bytes(64) && engine.open_way().serves_kernel_faults()
}

/// Whether what mremap adds without an event is served in the engine's process too.
fn finds_what_grew(engine: &Engine) -> bool {
    engine.features().contains(kiomap::Features::THREAD_ID)
}

fn bytes(nr_pages: u64) -> u64 {
    nr_pages * page_size() as u64
}

/// Writes a page of a memfd, as its owner.
fn put(memfd: &File, n: u64, byte: u8) {
    memfd.write_all_at(&vec![byte; page_size()], bytes(n)).unwrap();
}

fn byte_at(memfd: &File, n: u64) -> u8 {
    let mut byte = [0];
    memfd.read_exact_at(&mut byte, bytes(n) + 11).unwrap();
    byte[0]
}

fn punch(memfd: &File, first: u64, nr_pages: u64) {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(memfd, flags, bytes(first) as i64, bytes(nr_pages) as i64).unwrap();
}

/// A memfd that can't grow, of [`mark`]ed pages, and holes where `is_hole` says so.
fn memfd_with(nr_pages: u64, is_hole: impl Fn(u64) -> bool) -> File {
    let memfd = File::from(memfd_create(c"handed in", MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC).unwrap());
    memfd.set_len(bytes(nr_pages)).unwrap();
    (0..nr_pages).filter(|&n| !is_hole(n)).for_each(|n| put(&memfd, n, mark(n)));
    fcntl(&memfd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW)).unwrap();
    memfd
}

fn list_of(memfd: &File) -> Kiobuf {
    let mut list = Kiobuf::new();
    list.map_memfd(memfd, 0..memfd.metadata().unwrap().len()).unwrap();
    list
}

fn published(engine: &Engine, memfd: &File) -> Vmap {
    let vmap = engine.vmap_builder(&list_of(memfd)).minor_faults().build().unwrap();
    assert!(vmap.shares_pages());
    vmap
}

fn attached(engine: &Engine, memfd: &File) -> (Vmap, Region) {
    let vmap = published(engine, memfd);
    let region = vmap.attach(&AttachOptions::new()).unwrap();
    (vmap, region)
}

/// T16, T89: a walk that writes takes few faults, each of which maps a window; what it writes is the memfd's.
#[test]
fn a_walk_that_writes_takes_a_fault_for_each_window() {
    alone("a_walk_that_writes_takes_a_fault_for_each_window", || {
        const PAGES: u64 = 2048;
        for (around, most, least) in [(None, 30, 10), (Some(1), PAGES, PAGES), (Some(16), PAGES / 16, PAGES / 16)] {
            let mut builder = engine_builder();
            if let Some(pages) = around {
                builder = builder.fault_around_pages(pages);
            } else {
                builder = builder.fault_around(kiomap::FaultAround::default());
            }
            let engine = builder.build().unwrap();
            let memfd = memfd_with(PAGES, |_| false);
            let (vmap, region) = attached(&engine, &memfd);
            for n in 0..PAGES {
                assert_eq!(read_page(&region, n), Ok(mark(n)));
                touch::write(in_page(&region, n), !mark(n)).unwrap();
            }
            (0..PAGES).for_each(|n| assert_eq!(byte_at(&memfd, n), !mark(n), "page {n}"));
            let (stats, own) = (settled_stats(&engine), vmap.stats());
            assert!((least..=most).contains(&stats.faults_minor), "{stats:?}");
            assert_eq!((stats.faults, stats.pages_continued), (stats.faults_minor, PAGES), "{stats:?}");
            assert_eq!((stats.pages_zeroed, stats.pages_copied, stats.faults_zeroed), (0, 0, 0));
            assert_eq!((own.faults_minor, own.pages_continued, own.faults()), (stats.faults, PAGES, stats.faults));
            // Mapped for writing too: that took no fault more.
            assert_eq!(stats.write_faults, 0);
            assert_truth(&engine);
        }
    });
}

/// T89: the owner's system calls and every region of two processes have one memory.
#[test]
fn the_owner_and_every_region_have_the_same_pages() {
    alone("the_owner_and_every_region_have_the_same_pages", || {
        let engine = engine_builder().build().unwrap();
        let memfd = memfd_with(20, |_| false);
        let (vmap, region) = attached(&engine, &memfd);
        let part = vmap.attach(&long(6).pgoff(3)).unwrap();
        let shut = vmap.attach(&AttachOptions::new().read_only()).unwrap();
        put(&memfd, 4, 0x77);
        assert_eq!((read_page(&region, 4), read_page(&part, 1), read_page(&shut, 4)), (Ok(0x77), Ok(0x77), Ok(0x77)));
        assert!(touch::write(in_page(&shut, 9), 1).unwrap_err().is_sigsegv());
        assert!(touch::write(in_page(&shut, 4), 1).unwrap_err().is_sigsegv());
        touch::write(in_page(&part, 3), 0x79).unwrap();
        assert_eq!((byte_at(&memfd, 6), read_page(&region, 6)), (0x79, Ok(0x79)));
        let (done, go) = (Told::new(), Told::new());
        let pid = child(|| {
            (8..20).for_each(|n| assert_eq!(read_page(&region, n), Ok(mark(n))));
            touch::write(in_page(&region, 7), 0x7a).unwrap();
            done.tell(1);
            go.wait_for(1);
            assert_eq!((read_page(&part, 5), read_page(&region, 4)), (Ok(0x7b), Ok(0x77)));
            // And one that it forks in turn.
            reap_ok(child(|| (9..20).for_each(|n| assert_eq!(read_page(&region, n), Ok(mark(n))))));
        });
        done.wait_for(1);
        assert_eq!((byte_at(&memfd, 7), read_page(&part, 4)), (0x7a, Ok(0x7a)));
        touch::write(in_page(&region, 8), 0x7b).unwrap();
        go.tell(1);
        reap_ok(pid);
        settled(&engine, &vmap, 3);
        let stats = settled_stats(&engine);
        assert_eq!((stats.pages_copied, stats.pages_zeroed, stats.faults), (0, 0, stats.faults_minor));
        drop((region, part, shut));
        assert_count(&engine, &vmap, 0);
    });
}

/// T90: windows end at holes, which are zeros and get a page when they are touched; what lies past the end is SIGBUS, also
/// when the memfd was truncated.
#[test]
fn holes_are_zeros_and_the_end_is_sigbus() {
    alone("holes_are_zeros_and_the_end_is_sigbus", || {
        for builder in [engine_builder(), engine_builder().fault_around_pages(16), without_poison()] {
            let engine = builder.build().unwrap();
            let is_hole = |n: u64| n % 7 == 3 || (40..60).contains(&n);
            let memfd = memfd_with(200, is_hole);
            let vmap = published(&engine, &memfd);
            let region = vmap.attach(&long(210)).unwrap();
            let other = vmap.attach(&AttachOptions::new()).unwrap();
            let byte = |n| if is_hole(n) { 0 } else { mark(n) };
            (0..200).for_each(|n| assert_eq!(read_page(&region, n), Ok(byte(n)), "page {n}"));
            (0..200).rev().for_each(|n| assert_eq!(read_page(&other, n), Ok(byte(n)), "page {n}"));
            (200..210).for_each(|n| assert_sigbus(&region, n));
            touch::write(in_page(&region, 45), 9).unwrap();
            assert_eq!((byte_at(&memfd, 45), read_page(&other, 45)), (9, Ok(9)));
            memfd.set_len(bytes(100)).unwrap();
            (100..110).for_each(|n| assert_sigbus(&region, n));
            assert_eq!(read_page(&other, 99), Ok(byte(99)));
            assert_truth(&engine);
            assert_nobody_waits(&engine);
        }
    });
}

/// A soft revoke takes what the memfd does not hold, and leaves what it holds.
#[test]
fn a_revoke_leaves_what_is_held() {
    let engine = engine_builder().build().unwrap();
    let memfd = memfd_with(60, |n| n >= 30);
    let (vmap, region) = attached(&engine, &memfd);
    vmap.revoke(Revoke::Soft).unwrap();
    (0..30).for_each(|n| assert_eq!(read_page(&region, n), Ok(mark(n))));
    (30..60).for_each(|n| assert_sigbus(&region, n));
    punch(&memfd, 3, 1);
    assert_sigbus(&region, 3);
}

/// T65: the owner writes, punches and shrinks while threads of two processes touch, and other threads change both address spaces:
/// each sees a page as it was at some time, or SIGBUS for what was truncated, and nobody sleeps on.
#[test]
fn touches_that_race_the_owner_see_a_page_of_some_time() {
    const PAGES: u64 = 64;
    alone("touches_that_race_the_owner_see_a_page_of_some_time", || {
        for builder in [engine_builder(), engine_builder().handlers(3).handlers_standing_by(true), without_poison()] {
            let engine = builder.build().unwrap();
            let memfd = memfd_with(PAGES, |_| false);
            let (vmap, region) = attached(&engine, &memfd);
            let other = |n| mark(n) ^ 0x80;
            let done = AtomicBool::new(false);
            let touch_all = |seed| {
                let mut rng = Rng::new(seed);
                for _ in 0..15_000 {
                    let n = rng.below(PAGES);
                    match read_page(&region, n) {
                        Ok(byte) => assert!([0, mark(n), other(n)].contains(&byte), "page {n}: {byte}"),
                        Err(refused) => {
                            let addr = in_page(&region, n) as usize;
                            assert!(n >= PAGES - 8 && refused.is_sigbus_at(addr), "{n}: {refused:?}");
                        }
                    }
                }
                done.store(true, Ordering::Relaxed);
            };
            // Each end is an event, and takes mappings away.
            let come_and_go = || {
                while !done.load(Ordering::Relaxed) {
                    let region = vmap.attach(&long(8)).unwrap();
                    assert!([0, mark(0), other(0)].contains(&read_page(&region, 0).unwrap()));
                }
            };
            let pid = child(|| {
                std::thread::scope(|scope| {
                    scope.spawn(come_and_go);
                    touch_all(1);
                });
            });
            std::thread::scope(|scope| {
                scope.spawn(|| touch_all(2));
                scope.spawn(come_and_go);
                let mut rng = Rng::new(3);
                for round in 0..1_000 {
                    let n = rng.below(PAGES - 8);
                    match rng.below(3) {
                        0 => put(&memfd, n, mark(n)),
                        1 => put(&memfd, n, other(n)),
                        _ => punch(&memfd, n, 1),
                    }
                    if round % 125 == 124 {
                        memfd.set_len(bytes(PAGES - round / 125 - 1)).unwrap();
                    }
                }
            });
            reap_ok(pid);
            (PAGES - 8..PAGES).for_each(|n| assert_sigbus(&region, n));
            settled(&engine, &vmap, 1);
            assert_nobody_waits(&engine);
        }
    });
}

/// T39, T41, T43: what is moved, grown and doubled goes on to show its pages, and is counted.
#[test]
fn what_is_moved_and_grown_shows_its_pages() {
    let list = || {
        let memfd = memfd_with(40, |_| false);
        list_of(&memfd)
    };
    alone("what_is_moved_and_grown_shows_its_pages", || {
        let engine = engine_builder().build().unwrap();
        if !finds_what_grew(&engine) {
            skip!("THREAD_ID");
        }
        let vmap = engine.vmap_builder(&list()).minor_faults().build().unwrap();
        let play = || {
            let region = vmap.attach(&long(10).pgoff(3).at(FAR)).unwrap();
            assert_shows(FAR, 3..8);
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            assert_eq!(raw::mremap(FAR, 10, 10, flags, ELSEWHERE), ELSEWHERE);
            assert_shows(ELSEWHERE, 3..13);
            assert_eq!(raw::mremap(ELSEWHERE, 10, 20, 0, 0), ELSEWHERE);
            assert_shows(ELSEWHERE, 3..23);
            let doubled = raw::mremap(ELSEWHERE, 0, 20, libc::MREMAP_MAYMOVE, 0);
            assert_shows(doubled, 3..23);
            drop(region);
        };
        play();
        settled(&engine, &vmap, 0);
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        reap_ok(child(play));
        drop(region);
        settled(&engine, &vmap, 0);
        assert_nobody_waits(&engine);
    });
}

/// mremap brings the pages of what it moves and grows, if that is locked, before it reports anything: nothing can be installed
/// meanwhile in the usual way.
#[test]
fn a_locked_region_that_moves_and_grows_comes_through() {
    alone("a_locked_region_that_moves_and_grows_comes_through", || {
        let engine = engine_builder().build().unwrap();
        if !may_lock(&engine) || !finds_what_grew(&engine) {
            skip!("RLIMIT_MEMLOCK, faults of the kernel, or THREAD_ID");
        }
        let memfd = memfd_with(64, |n| n % 5 == 4);
        let vmap = published(&engine, &memfd);
        let play = || {
            let region = vmap.attach(&long(8).at(FAR)).unwrap();
            raw::mlock(at(&region, 0), 8).unwrap();
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            assert_eq!(raw::mremap(FAR, 8, 24, flags, ELSEWHERE), ELSEWHERE);
            for n in 0..24 {
                let byte = if n % 5 == 4 { 0 } else { mark(n) };
                assert_eq!(touch::read(page(ELSEWHERE, n) as *const u8), Ok(byte), "page {n}");
            }
            drop(region);
        };
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        play();
        reap_ok(child(play));
        settled(&engine, &vmap, 1);
        drop(region);
        assert_nobody_waits(&engine);
    });
}

/// T16: what was populated is touched without a fault, here and in a child.
#[test]
fn populated_pages_are_touched_without_a_fault() {
    alone("populated_pages_are_touched_without_a_fault", || {
        let engine = engine_builder().build().unwrap();
        let memfd = memfd_with(1500, |n| n % 100 == 99);
        let (vmap, region) = attached(&engine, &memfd);
        let walk = |region: &Region| {
            for n in 0..1500 {
                assert_eq!(read_page(region, n), Ok(if n % 100 == 99 { 0 } else { mark(n) }));
            }
        };
        // Partly mapped before.
        assert_eq!(read_page(&region, 700), Ok(mark(700)));
        let before = settled_stats(&engine).faults;
        region.populate(0..region.len_bytes()).unwrap();
        walk(&region);
        assert_eq!(settled_stats(&engine).faults, before);
        let serves = engine.open_way().serves_kernel_faults();
        reap_ok(child(|| {
            if serves {
                region.populate(0..region.len_bytes()).unwrap();
                assert_eq!(mapped(&region), 1500);
            }
            walk(&region);
        }));
        settled(&engine, &vmap, 1);
    });
}

/// The pages of a region that are mapped in this process, as the kernel counts them.
fn mapped(region: &Region) -> u64 {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let start = format!("{:x}-", region.as_ptr() as usize);
    let rss = smaps.lines().skip_while(|line| !line.starts_with(&start)).find_map(|line| line.strip_prefix("Rss:"));
    rss.unwrap().trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024 / page_size() as u64
}

/// T73: after an orderly end held pages come all the same, in children too, and holes are SIGBUS.
#[test]
fn after_a_shutdown_held_pages_come_and_holes_are_sigbus() {
    alone("after_a_shutdown_held_pages_come_and_holes_are_sigbus", || {
        for builder in [engine_builder(), without_poison()] {
            let engine = builder.build().unwrap();
            let memfd = memfd_with(12, |n| n >= 8);
            let vmap = published(&engine, &memfd);
            let region = vmap.attach(&long(13)).unwrap();
            let (ready, go) = (Told::new(), Told::new());
            let look = || {
                for _ in 0..2 {
                    (0..8).for_each(|n| assert_eq!(read_page(&region, n), Ok(mark(n))));
                    (8..13).for_each(|n| assert_sigbus(&region, n));
                }
            };
            let pid = child(|| {
                assert_eq!(read_page(&region, 0), Ok(mark(0)));
                ready.tell(1);
                go.wait_for(1);
                look();
                // What the guard maps is writable too.
                touch::write(in_page(&region, 5), mark(5)).unwrap();
            });
            ready.wait_for(1);
            engine.shutdown(Shutdown::Poison).unwrap();
            look();
            go.tell(1);
            reap_ok(pid);
        }
    });
}

/// T70: when the engine's process is killed, its children go on to get what the memfd holds, and SIGBUS for the rest.
#[test]
fn without_the_engine_children_get_what_is_held() {
    alone("without_the_engine_children_get_what_is_held", || {
        for poisons in [true, false] {
            let memfd = memfd_with(300, |n| n % 10 == 9);
            let (ready, go, done) = (Told::new(), Told::new(), Told::new());
            let owner = child(|| {
                let engine = if poisons { engine_builder() } else { without_poison() }.build().unwrap();
                let (_vmap, region) = attached(&engine, &memfd);
                child(|| {
                    assert_eq!(read_page(&region, 0), Ok(mark(0)));
                    ready.tell(1);
                    go.wait_for(1);
                    for n in (0..300).rev() {
                        if n % 10 == 9 {
                            assert_sigbus(&region, n);
                        } else {
                            assert_eq!(read_page(&region, n), Ok(mark(n)), "page {n}");
                        }
                    }
                    if may_lock(&engine) {
                        move_and_grow_locked(&region);
                    }
                    done.tell(7);
                });
                loop {
                    std::thread::park();
                }
            });
            ready.wait_for(1);
            kill_and_reap(owner);
            go.tell(1);
            done.wait_for(7);
        }
    });
}

/// Has mremap bring pages that are held while it changes the address space.
fn move_and_grow_locked(region: &Region) {
    raw::munmap(at(region, 4), 296);
    // Pages 4 to 8 of the memfd, which were touched before, are not mapped at the new place.
    raw::mlock(at(region, 0), 4).unwrap();
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    assert_eq!(raw::mremap(at(region, 0) as usize, 4, 9, flags, ELSEWHERE), ELSEWHERE);
    assert_shows(ELSEWHERE, 0..9);
}

/// Several threads that answer faults, several that fault.
#[test]
fn a_crew_hands_minor_faults_on() {
    alone("a_crew_hands_minor_faults_on", || {
        const PAGES: u64 = 1000;
        let engine = engine_builder().handlers(3).handlers_standing_by(true).build().unwrap();
        let memfd = memfd_with(PAGES, |n| n % 3 == 2);
        let (vmap, region) = attached(&engine, &memfd);
        std::thread::scope(|scope| {
            for seed in 0..4 {
                let region = &region;
                scope.spawn(move || {
                    let mut order: Vec<u64> = (0..PAGES).collect();
                    Rng::new(seed).shuffle(&mut order);
                    for n in order {
                        assert_eq!(read_page(region, n), Ok(if n % 3 == 2 { 0 } else { mark(n) }));
                    }
                });
            }
        });
        eventually("faults are counted", || settled_stats(&engine).faults_minor > 0);
        settled(&engine, &vmap, 1);
        assert_nobody_waits(&engine);
    });
}

/// What has no minor faults is refused by name.
#[test]
fn what_has_no_minor_faults_is_refused() {
    let engine = engine_builder().build().unwrap();
    let memfd = memfd_with(4, |_| false);
    let list = list_of(&memfd);
    let named = |refused: kiomap::Result<Vmap>| match refused {
        Err(error @ Error::Invalid { what, .. }) => {
            assert_eq!(error.errno(), Errno::EINVAL);
            what
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(named(engine.vmap_builder(&list).backing(Backing::Copied).minor_faults().build()), "minor_faults");
    assert_eq!(named(engine.vmap_builder(&pages(4)).minor_faults().build()), "the extent at page");
    assert_eq!(named(engine.vmap_builder(&list).expandable().minor_faults().build()), "the vmap's capacity in pages");
    let huge = engine.vmap_builder(&list).page_size(kiomap::PageSize::Huge2M).minor_faults().build();
    assert!(huge.is_err());
    let in_thread = engine_builder().delivery(Delivery::InThread).build().unwrap();
    assert_eq!(named(in_thread.vmap_builder(&list).minor_faults().build()), "minor_faults");
    assert!(engine.vmap_builder(&list).backing(Backing::Shared).minor_faults().build().is_ok());
    // Whose fault it is must be known: the engine looks up by itself what a locked region gains by mremap.
    let nameless = engine_builder().without(Features::THREAD_ID).build().unwrap();
    let refused = nameless.vmap_builder(&list).minor_faults().build().unwrap_err();
    assert!(matches!(refused, Error::Unsupported { missing: Features::THREAD_ID, .. }), "{refused}");
}
