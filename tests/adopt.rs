//! Processes that made their userfaultfd themselves and handed it over.

mod support;

use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use kiomap::{
    AdoptOptions, Adopted, AdoptedArea, AttachOptions, Engine, Error, Kiobuf, Outside, PageSize, Refusal, Release,
    Shutdown, Vmap, page_size,
};
use nix::sys::signal::{Signal, kill};
use support::peer::{MEMORY, Peer};
use support::pool::with_pool;
use support::{
    DEADLINE, alone, engine_builder, eventually, holes, mark, open_descriptors, pages, pidfd, reap, settled_stats,
    source,
};
use userfaultfd::FeatureFlags;

const SIGBUS: i32 = libc::SIGBUS;

fn remove() -> FeatureFlags {
    FeatureFlags::EVENT_REMOVE
}

fn all_events() -> FeatureFlags {
    remove() | FeatureFlags::EVENT_UNMAP | FeatureFlags::EVENT_REMAP | FeatureFlags::EVENT_FORK
}

/// A process, or the reason why there is none.
macro_rules! start {
    ($features:expr, $nr_pages:expr, $huge:expr) => {
        match Peer::start($features, $nr_pages, $huge) {
            Some(started) => started,
            None => skip!("a userfaultfd with {:?} is not to be had", $features),
        }
    };
}

/// Skips a test where a page can't be made a SIGBUS in another process.
macro_rules! needs_poison {
    ($engine:expr) => {
        if !$engine.features().contains(kiomap::Features::POISON) {
            skip!("without POISON nothing can be made a SIGBUS in another process");
        }
    };
}

fn area(pages: std::ops::Range<usize>, vmap: &Vmap, pgoff: u64) -> AdoptedArea {
    AdoptedArea::new(MEMORY + pages.start * page_size()..MEMORY + pages.end * page_size(), vmap, pgoff)
}

fn adopt(engine: &Engine, peer: &Peer, uffd: OwnedFd, areas: &[AdoptedArea]) -> Adopted {
    engine.adopt(uffd, areas, AdoptOptions::new().pidfd(pidfd(peer.pid))).unwrap()
}

/// A list of 20 marked pages, 20 of zeros, 20 holes.
fn mixed() -> Kiobuf {
    let mut list = pages(20);
    let mut zeros = Kiobuf::new();
    zeros.map_zero(20).unwrap();
    list.expand(&zeros).unwrap();
    list.expand(&holes(20)).unwrap();
    list
}

/// T35, T106: a touch gets the page of the list, zeros where it has zeros, SIGBUS in holes, past its end, and outside every area.
#[test]
fn a_process_gets_the_pages_of_its_areas_or_sigbus() {
    alone("a_process_gets_the_pages_of_its_areas_or_sigbus", || {
        for around in [1, 16, 512] {
            let (peer, uffd) = start!(remove(), 100, false);
            let engine = engine_builder().fault_around_pages(around).build().unwrap();
            needs_poison!(engine);
            let vmap = engine.vmap(&mixed()).unwrap();
            // Page 5 of the list at its page 0, and 10 pages past the end; the last 20 pages are in no area.
            let adopted = adopt(&engine, &peer, uffd, &[area(0..65, &vmap, 5), area(70..80, &vmap, 0)]);
            assert_eq!(vmap.refcount().unwrap(), 2);
            for page in [14, 0, 7, 14] {
                assert_eq!(peer.read(page), Ok(mark(page + 5)));
            }
            peer.read_all(0..15, |page| mark(page + 5));
            peer.read_all(15..35, |_| 0);
            peer.read_all(70..80, |page| mark(page - 70));
            for page in [35, 54, 55, 64, 65, 69, 80, 99] {
                assert_eq!(peer.read(page), Err(SIGBUS), "page {page}");
            }
            assert_eq!(peer.write(3, 200), Ok(()));
            assert_eq!(peer.read(3), Ok(200));
            // Its memory is its own.
            let mut byte = [0];
            vmap.read_at(8 * page_size() as u64 + 11, &mut byte).unwrap();
            assert_eq!(byte, [mark(8)]);
            let spaces = adopted.spaces();
            assert_eq!((spaces.len(), spaces[0].pid, spaces[0].areas), (1, peer.pid.as_raw(), 2));
            assert!(settled_stats(&engine).pages_poisoned >= 8);
            assert_eq!(engine.stats().panics, 0);
            peer.exit();
            assert!(adopted.wait_gone(DEADLINE));
            assert_eq!(vmap.refcount().unwrap(), 0);
            reap(peer.pid);
        }
    });
}

/// Memory outside every area can be zeros instead.
#[test]
fn what_is_outside_can_be_zeros() {
    alone("what_is_outside_can_be_zeros", || {
        let (peer, uffd) = start!(remove(), 10, false);
        let engine = engine_builder().build().unwrap();
        needs_poison!(engine);
        let vmap = engine.vmap(&pages(3)).unwrap();
        let options = AdoptOptions::new().outside(Outside::Zeros);
        let adopted = engine.adopt(uffd, &[area(2..5, &vmap, 0)], options).unwrap();
        assert_eq!(
            (0..6).map(|page| peer.read(page)).collect::<Vec<_>>(),
            [Ok(0), Ok(0), Ok(mark(0)), Ok(mark(1)), Ok(mark(2)), Ok(0)]
        );
        // Its end is found without a pidfd too.
        peer.exit();
        reap(peer.pid);
        assert!(adopted.wait_gone(DEADLINE));
    });
}

/// Given up pages are zeros from then on, also where they had not come yet, and the windows around leave them alone.
#[test]
fn what_is_given_up_is_zeros() {
    alone("what_is_given_up_is_zeros", || {
        for around in [1, 16, 512] {
            let (peer, uffd) = start!(remove(), 64, false);
            let engine = engine_builder().fault_around_pages(around).build().unwrap();
            needs_poison!(engine);
            let vmap = engine.vmap(&pages(64)).unwrap();
            let _adopted = adopt(&engine, &peer, uffd, &[area(0..64, &vmap, 0)]);
            peer.read_all(0..4, mark);
            peer.write(2, 99).unwrap();
            for (page, nr_pages) in [(1, 2), (10, 5), (63, 1)] {
                peer.give_up(page, nr_pages);
            }
            let given_up = |page| (1..3).contains(&page) || (10..15).contains(&page) || page == 63;
            let expected = |page| if given_up(page) { 0 } else { mark(page) };
            peer.read_all(0..64, expected);
            peer.write(12, 7).unwrap();
            assert_eq!(peer.read(12), Ok(7));
            peer.give_up(0, 64);
            peer.read_all(0..64, |_| 0);
            peer.exit();
            reap(peer.pid);
        }
    });
}

/// T46–T49, T52: moves, unmaps and forks are followed; children have what was missing, also theirs.
#[test]
fn moves_unmaps_and_forks_are_followed() {
    alone("moves_unmaps_and_forks_are_followed", || {
        let (peer, uffd) = start!(all_events(), 40, false);
        let ended = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&ended);
        let engine = engine_builder().fault_around_pages(4).build().unwrap();
        needs_poison!(engine);
        let vmap = engine.vmap_builder(&pages(40)).on_deref(move |_| {
            counted.fetch_add(1, Ordering::SeqCst);
        });
        let vmap = vmap.build().unwrap();
        let adopted = adopt(&engine, &peer, uffd, &[area(0..40, &vmap, 0)]);
        peer.read_all(0..3, mark);
        peer.remap(20, 10, 1000);
        peer.read_all(1000..1005, |page| mark(page - 980));
        peer.unmap(30, 5);
        peer.give_up(10, 2);
        engine.settle().unwrap();
        // 0..20, 35..40, 1000..1010.
        assert_eq!(vmap.refcount().unwrap(), 3);
        assert_eq!(peer.read(25), Err(libc::SIGSEGV));
        let child = peer.fork();
        let grandchild = child.fork();
        eventually("three processes", || adopted.spaces().len() == 3);
        assert_eq!(vmap.refcount().unwrap(), 9);
        peer.write(5, 77).unwrap();
        for process in [&grandchild, &child] {
            process.read_all(0..20, |page| if (10..12).contains(&page) { 0 } else { mark(page) });
            process.read_all(1000..1010, |page| mark(page - 980));
            process.read_all(35..40, mark);
            assert_eq!(process.read(30), Err(libc::SIGSEGV));
        }
        assert_eq!(peer.read(5), Ok(77));
        child.remap(0, 5, 2000);
        child.read_all(2000..2005, |page| mark(page - 2000));
        peer.exit();
        child.exit();
        reap(peer.pid);
        eventually("one process", || adopted.spaces().len() == 1);
        assert_eq!((vmap.refcount().unwrap(), ended.load(Ordering::SeqCst)), (3, 0));
        grandchild.exit();
        assert!(adopted.wait_gone(DEADLINE));
        eventually("the callback", || ended.load(Ordering::SeqCst) == 1);
        assert_eq!(vmap.refcount().unwrap(), 0);
    });
}

/// More forks than are read ahead.
#[test]
fn hundreds_of_children_are_served() {
    alone("hundreds_of_children_are_served", || {
        let (peer, uffd) = start!(all_events(), 4, false);
        let engine = engine_builder().build().unwrap();
        needs_poison!(engine);
        let before = open_descriptors();
        let vmap = engine.vmap(&pages(4)).unwrap();
        let adopted = adopt(&engine, &peer, uffd, &[area(0..4, &vmap, 0)]);
        let children: Vec<Peer> = (0..200).map(|_| peer.fork()).collect();
        for child in &children {
            child.read_all(0..4, mark);
        }
        assert_eq!(vmap.refcount().unwrap(), 201);
        drop(children);
        peer.exit();
        assert!(adopted.wait_gone(DEADLINE));
        drop((adopted, vmap, peer));
        eventually("no descriptor is left", || open_descriptors() <= before + 1);
    });
}

/// What the vmap's own regions wrote is what an adopted process gets, if it comes before its touch.
#[test]
fn pages_that_the_vmap_shares_are_copied_as_they_are() {
    alone("pages_that_the_vmap_shares_are_copied_as_they_are", || {
        for memfd in [false, true] {
            let (peer, uffd) = start!(remove(), 16, false);
            let engine = engine_builder().fault_around_pages(8).build().unwrap();
            needs_poison!(engine);
            let list = if memfd {
                let mut arena = kiomap::Arena::shared(16).unwrap();
                for page in 0..16 {
                    arena[page * page_size()..(page + 1) * page_size()].fill(mark(page as u64));
                }
                let mut list = Kiobuf::new();
                list.map_kernel(arena).unwrap();
                list
            } else {
                pages(16)
            };
            let vmap = engine.vmap(&list).unwrap();
            let region = vmap.attach(&AttachOptions::new()).unwrap();
            region.write_at(3 * page_size(), &vec![100; page_size()]).unwrap();
            vmap.write_at(5 * page_size() as u64, &vec![101; page_size()]).unwrap();
            let _adopted = adopt(&engine, &peer, uffd, &[area(0..16, &vmap, 0)]);
            peer.read_all(0..16, |page| match page {
                3 => 100,
                5 => 101,
                page => mark(page),
            });
            peer.write(6, 1).unwrap();
            let mut byte = [0];
            region.read_at(6 * page_size() + 11, &mut byte).unwrap();
            assert_eq!(byte, [mark(6)]);
            peer.exit();
            reap(peer.pid);
        }
    });
}

/// T20: pages that workers read, once for all who wait, in several processes; a failure is SIGBUS there.
#[test]
fn slow_pages_are_read_once_for_all_processes() {
    alone("slow_pages_are_read_once_for_all_processes", || {
        needs_sources!();
        let peers: Vec<_> = (0..3).map(|_| Peer::start(remove(), 32, false)).collect();
        let Some(peers) = peers.into_iter().collect::<Option<Vec<_>>>() else { skip!("no userfaultfd is to be had") };
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        needs_poison!(engine);
        let reads = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&reads);
        let list = source(32, move |first, nr_pages| {
            counted.fetch_add(1, Ordering::SeqCst);
            let bad = (first..first + nr_pages as u64).contains(&9);
            if bad { Err(std::io::Error::other("a bad sector")) } else { Ok(()) }
        });
        let mut policy = kiomap::FailurePolicy::default();
        policy.retries = 0;
        let vmap = engine.vmap_builder(&list).failure_policy(policy).build().unwrap();
        let peers: Vec<Peer> = peers
            .into_iter()
            .map(|(peer, uffd)| {
                adopt(&engine, &peer, uffd, &[area(0..32, &vmap, 0)]);
                peer
            })
            .collect();
        for page in [4, 5, 31] {
            peers.iter().for_each(|peer| peer.begin_read(page));
            for peer in &peers {
                assert_eq!(peer.outcome(), Some(Ok(mark(page))));
            }
        }
        let so_far = reads.load(Ordering::SeqCst);
        for peer in &peers {
            assert_eq!(peer.read(9), Err(SIGBUS));
            peer.read_all(4..6, mark);
        }
        assert!(so_far <= 3, "{so_far} reads");
        assert_eq!(engine.stats().panics, 0);
    });
}

/// A process ends for a page that can't be had, if that was asked for.
#[test]
fn a_process_is_killed_for_a_page_that_cant_be_had() {
    alone("a_process_is_killed_for_a_page_that_cant_be_had", || {
        let (peer, uffd) = start!(remove(), 4, false);
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let mut list = pages(2);
        list.expand(&holes(2)).unwrap();
        let vmap = engine.vmap(&list).unwrap();
        let options = AdoptOptions::new().refusal(Refusal::Kill).pidfd(pidfd(peer.pid));
        let adopted = engine.adopt(uffd, &[area(0..4, &vmap, 0)], options).unwrap();
        assert_eq!(peer.read(1), Ok(mark(1)));
        peer.begin_read(2);
        assert_eq!(peer.outcome(), None);
        assert!(matches!(reap(peer.pid), nix::sys::wait::WaitStatus::Signaled(_, Signal::SIGKILL, _)));
        assert!(adopted.wait_gone(DEADLINE));
    });
}

/// T50: the process is killed while it waits for pages, again and again.
#[test]
fn a_process_may_be_killed_at_any_moment() {
    alone("a_process_may_be_killed_at_any_moment", || {
        let rounds = 50;
        let peers: Vec<_> = (0..rounds).map(|_| Peer::start(remove(), 64, false)).collect();
        let Some(peers) = peers.into_iter().collect::<Option<Vec<_>>>() else { skip!("no userfaultfd is to be had") };
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        needs_poison!(engine);
        let vmap = engine.vmap(&pages(64)).unwrap();
        for (round, (peer, uffd)) in peers.into_iter().enumerate() {
            let adopted = adopt(&engine, &peer, uffd, &[area(0..64, &vmap, 0)]);
            peer.begin_read(round as u64);
            kill(peer.pid, Signal::SIGKILL).unwrap();
            reap(peer.pid);
            assert!(adopted.wait_gone(DEADLINE));
            assert_eq!(vmap.refcount().unwrap(), 0);
        }
        assert_eq!(engine.spaces().unwrap().len(), 1);
    });
}

/// All of it is brought, in children too; and after a release nobody needs the engine, nor finds zeros.
#[test]
fn a_filled_and_released_process_needs_no_engine() {
    alone("a_filled_and_released_process_needs_no_engine", || {
        for (how, closes) in
            [(Release::Fill, true), (Release::Poison, true), (Release::Fill, false), (Release::Poison, false)]
        {
            let (peer, uffd) = start!(all_events(), 600, false);
            let engine = engine_builder().fault_around_pages(1).build().unwrap();
            needs_poison!(engine);
            let mut list = pages(500);
            list.expand(&mixed()).unwrap();
            let vmap = engine.vmap(&list).unwrap();
            let adopted = adopt(&engine, &peer, uffd, &[area(0..600, &vmap, 0)]);
            let child = peer.fork();
            child.give_up(3, 2);
            peer.write(3, 55).unwrap();
            if how == Release::Fill {
                let mut last = None;
                let filled = adopted.fill(|progress| {
                    last = Some(progress);
                    ControlFlow::Continue(())
                });
                filled.unwrap();
                let last = last.unwrap();
                assert_eq!((last.pages_done, last.pages_total, last.pages_failed), (1200, 1200, 0));
                let faults = engine.stats().faults;
                peer.read_all(0..3, mark);
                assert_eq!(engine.stats().faults, faults);
            }
            adopted.release(how).unwrap();
            assert_eq!(vmap.refcount().unwrap(), 0);
            engine.shutdown(Shutdown::Poison).unwrap();
            drop((vmap, engine));
            // Whether it keeps its own descriptor, which its child has too, or not.
            if closes {
                peer.close();
            }
            assert_eq!(peer.read(3), Ok(55));
            assert_eq!(child.read(4), Ok(0));
            for process in [&peer, &child] {
                if how == Release::Fill {
                    process.read_all(5..500, mark);
                    process.read_all(520..540, |_| 0);
                } else {
                    assert_eq!(process.read(100), Err(SIGBUS));
                }
                assert_eq!(process.read(545), Err(SIGBUS));
                assert_eq!(process.read(570), Err(SIGBUS));
                // What is given up by now is zeros, whoever has the descriptor.
                process.give_up(10, 5);
                process.read_all(10..15, |_| 0);
                process.unmap(30, 2);
                assert_eq!(process.fork().read(12), Ok(0));
            }
            peer.exit();
            child.exit();
            reap(peer.pid);
        }
    });
}

/// T73, T74: an engine that was shut down goes on to refuse what is missing, as long as its process lives.
#[test]
fn after_a_shutdown_what_is_missing_is_sigbus() {
    alone("after_a_shutdown_what_is_missing_is_sigbus", || {
        let (peer, uffd) = start!(all_events(), 8, false);
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        needs_poison!(engine);
        let vmap = engine.vmap(&pages(8)).unwrap();
        let adopted = adopt(&engine, &peer, uffd, &[area(0..8, &vmap, 0)]);
        assert_eq!(peer.read(1), Ok(mark(1)));
        peer.give_up(6, 1);
        engine.shutdown(Shutdown::Poison).unwrap();
        drop(engine);
        let child = peer.fork();
        for process in [&peer, &child] {
            assert_eq!(process.read(1), Ok(mark(1)));
            assert_eq!(process.read(2), Err(SIGBUS));
            assert_eq!(process.read(6), Ok(0));
        }
        peer.exit();
        child.exit();
        assert!(adopted.wait_gone(DEADLINE));
        reap(peer.pid);
    });
}

/// Memory of huge pages, of a list in memory, in a file and from a source, with what was given up.
#[test]
fn huge_pages_of_another_process_are_brought_whole() {
    with_pool("huge_pages_of_another_process_are_brought_whole", || {
        let n = PageSize::Huge2M.bytes() as u64 / page_size() as u64;
        let (peer, uffd) = start!(remove(), 3 * n as usize, true);
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        needs_poison!(engine);
        let has_sources = engine.features().contains(kiomap::Features::THREAD_ID);
        let list = if has_sources {
            let mut list = pages(n / 2);
            list.expand(&source(n / 2 + n, |_, _| Ok(()))).unwrap();
            list
        } else {
            pages(n * 2)
        };
        let vmap = engine.vmap(&list).unwrap();
        let area = area(0..3 * n as usize, &vmap, 0).page_size(PageSize::Huge2M);
        let adopted = adopt(&engine, &peer, uffd, &[area]);
        let expected = |page| if page < n / 2 || !has_sources { mark(page) } else { mark(page - n / 2) };
        for page in [0, n / 2 - 1, n / 2, n - 1] {
            assert_eq!(peer.read(page), Ok(expected(page)), "page {page}");
        }
        peer.give_up(0, n);
        assert_eq!(peer.read(5), Ok(0));
        adopted.fill(|_| ControlFlow::Continue(())).unwrap();
        // Past the end of the list, and no zeros.
        assert_eq!(peer.read(2 * n + 1), Err(SIGBUS));
        let faults = settled_stats(&engine).faults;
        assert_eq!(peer.read(n + 7), Ok(expected(n + 7)));
        assert_eq!(settled_stats(&engine).faults, faults);
        peer.exit();
        reap(peer.pid);
        assert!(adopted.wait_gone(DEADLINE));
    });
}

/// What is refused changes nothing.
#[test]
fn what_cant_be_adopted_is_refused() {
    alone("what_cant_be_adopted_is_refused", || {
        let (peer, uffd) = start!(remove(), 8, false);
        let engine = engine_builder().build().unwrap();
        let other = engine_builder().build().unwrap();
        needs_poison!(engine);
        let (vmap, foreign) = (engine.vmap(&pages(8)).unwrap(), other.vmap(&pages(8)).unwrap());
        let growing = engine.vmap_builder(&pages(8)).expandable().build().unwrap();
        let good = || area(0..8, &vmap, 0);
        let try_with = |fd: &OwnedFd, areas: &[AdoptedArea], options| {
            engine.adopt(fd.try_clone().unwrap(), areas, options).unwrap_err()
        };
        // The vmap has what it needs for that from here on.
        assert!(engine.adopt(uffd.try_clone().unwrap(), &[good(), good()], AdoptOptions::new()).is_err());
        let descriptors = open_descriptors();
        let (pipe, _end) = nix::unistd::pipe().unwrap();
        let raw = userfaultfd_without_handshake();
        assert!(matches!(try_with(&pipe, &[good()], AdoptOptions::new()), Error::Invalid { .. }));
        if let Some(raw) = &raw {
            assert!(matches!(try_with(raw, &[good()], AdoptOptions::new()), Error::Invalid { .. }));
        }
        let refused = |areas: &[AdoptedArea]| try_with(&uffd, areas, AdoptOptions::new());
        let page = page_size();
        assert!(matches!(refused(&[good(), area(7..9, &vmap, 0)]), Error::AddressTaken { .. }));
        assert!(matches!(refused(&[area(3..3, &vmap, 0)]), Error::Invalid { .. }));
        assert!(matches!(refused(&[AdoptedArea::new(1..page, &vmap, 0)]), Error::Misaligned { .. }));
        assert!(matches!(refused(&[AdoptedArea::new(page..usize::MAX - page + 1, &vmap, 0)]), Error::Invalid { .. }));
        assert!(matches!(refused(&[area(0..8, &vmap, u64::MAX - 3)]), Error::Overflow { .. }));
        assert!(matches!(refused(&[area(0..8, &vmap, 0).page_size(PageSize::Huge2M)]), Error::Misaligned { .. }));
        assert!(matches!(refused(&[area(0..8, &foreign, 0)]), Error::Invalid { .. }));
        assert!(matches!(refused(&[area(0..8, &growing, 0)]), Error::Invalid { .. }));
        let kill = AdoptOptions::new().refusal(Refusal::Kill);
        assert!(matches!(try_with(&uffd, &[good()], kill), Error::Invalid { .. }));
        let not_a_pidfd = AdoptOptions::new().pidfd(pipe.try_clone().unwrap());
        assert!(matches!(try_with(&uffd, &[good()], not_a_pidfd), Error::Invalid { .. }));
        assert_eq!(vmap.refcount().unwrap(), 0);
        drop((pipe, raw, _end));
        assert_eq!(open_descriptors(), descriptors);
        // After all that it is served.
        let _adopted = adopt(&engine, &peer, uffd, &[good()]);
        peer.read_all(0..8, mark);
        engine.shutdown(Shutdown::Poison).unwrap();
        let (pipe, _end) = nix::unistd::pipe().unwrap();
        assert_eq!(
            engine.adopt(pipe, &[good()], AdoptOptions::new()).unwrap_err().errno(),
            nix::errno::Errno::ESHUTDOWN
        );
        peer.exit();
        reap(peer.pid);
    });
}

fn userfaultfd_without_handshake() -> Option<OwnedFd> {
    // SAFETY: userfaultfd(2) makes a new descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK | 1) };
    // SAFETY: it is new.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// A process that makes its userfaultfd a blocking one, after it was handed over, stops nobody.
#[test]
fn a_userfaultfd_that_is_made_blocking_stops_nobody() {
    alone("a_userfaultfd_that_is_made_blocking_stops_nobody", || {
        let (peer, uffd) = start!(remove(), 8, false);
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        needs_poison!(engine);
        let vmap = engine.vmap(&pages(8)).unwrap();
        let theirs = uffd.try_clone().unwrap();
        let _adopted = adopt(&engine, &peer, uffd, &[area(0..8, &vmap, 0)]);
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        for page in 0..8 {
            // SAFETY: changes a flag of a descriptor that is open.
            assert_eq!(unsafe { libc::fcntl(theirs.as_raw_fd(), libc::F_SETFL, 0) }, 0);
            peer.read_all(page..page + 1, mark);
            assert_eq!(support::read_page(&region, page), Ok(mark(page)));
        }
        std::thread::sleep(Duration::ZERO);
        peer.exit();
        reap(peer.pid);
    });
}

/// A shutdown that fills brings the pages of adopted processes too.
#[test]
fn a_shutdown_that_fills_fills_adopted_processes() {
    alone("a_shutdown_that_fills_fills_adopted_processes", || {
        let (peer, uffd) = start!(remove(), 40, false);
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        needs_poison!(engine);
        let (vmap, shown) = (engine.vmap(&pages(40)).unwrap(), engine.vmap(&pages(10)).unwrap());
        let region = shown.attach(&AttachOptions::new()).unwrap();
        let adopted = adopt(&engine, &peer, uffd, &[area(0..40, &vmap, 0)]);
        peer.give_up(7, 1);
        let mut last = None;
        engine.shutdown_filling(|progress| last = Some(progress)).unwrap();
        let last = last.unwrap();
        assert_eq!((last.pages_done, last.pages_total, last.pages_failed), (50, 50, 0));
        peer.read_all(0..40, |page| if page == 7 { 0 } else { mark(page) });
        assert_eq!(support::read_page(&region, 9), Ok(mark(9)));
        peer.exit();
        assert!(adopted.wait_gone(DEADLINE));
        reap(peer.pid);
    });
}

/// What its maker says of the size of its pages may be wrong: that is SIGBUS, for the pages that can't be brought, and no loop.
#[test]
fn pages_of_another_size_than_was_said_are_right_or_sigbus() {
    with_pool("pages_of_another_size_than_was_said_are_right_or_sigbus", || {
        let n = PageSize::Huge2M.bytes() as u64 / page_size() as u64;
        for huge in [true, false] {
            let (peer, uffd) = start!(remove(), 2 * n as usize, huge);
            let engine = engine_builder().fault_around_pages(1).build().unwrap();
            needs_poison!(engine);
            let vmap = engine.vmap(&pages(2 * n)).unwrap();
            let said = if huge { PageSize::Base } else { PageSize::Huge2M };
            let area = area(0..n as usize, &vmap, 0).page_size(said);
            let adopted = engine.adopt(uffd, &[area], AdoptOptions::new()).unwrap();
            if huge {
                assert_eq!(peer.read(3), Err(SIGBUS));
                // In no area.
                assert_eq!(peer.read(n + 3), Err(SIGBUS));
            } else {
                assert_eq!(peer.read(3), Ok(mark(3)));
                peer.give_up(7, 1);
                assert_eq!(peer.read(7), Err(SIGBUS));
            }
            adopted.release(Release::Fill).unwrap();
            peer.exit();
            reap(peer.pid);
        }
    });
}

/// A process that unmaps what its threads wait for, and a userfaultfd that does not report that.
#[test]
fn what_was_unmapped_without_a_word_wakes_who_waits() {
    alone("what_was_unmapped_without_a_word_wakes_who_waits", || {
        needs_sources!();
        let (peer, uffd) = start!(FeatureFlags::empty(), 8, false);
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        needs_poison!(engine);
        let vmap = engine.vmap(&pages(8)).unwrap();
        let adopted = adopt(&engine, &peer, uffd, &[area(0..8, &vmap, 0)]);
        peer.unmap(3, 2);
        assert_eq!(peer.read(3), Err(libc::SIGSEGV));
        assert_eq!(peer.read(2), Ok(mark(2)));
        adopted.release(Release::Fill).unwrap();
        peer.read_all(5..8, mark);
        peer.exit();
        reap(peer.pid);
    });
}

/// T50: exec ends an address space, and its process goes on.
#[test]
fn a_process_that_calls_exec_is_counted_out() {
    alone("a_process_that_calls_exec_is_counted_out", || {
        let exec = || {
            let program = std::ffi::CString::new("/bin/sleep").unwrap();
            let seconds = std::ffi::CString::new("20").unwrap();
            nix::unistd::execv(&program, &[program.clone(), seconds]).unwrap();
        };
        let Some((peer, uffd)) = Peer::start_to(remove(), 8, false, exec) else {
            skip!("no userfaultfd is to be had");
        };
        let engine = engine_builder().build().unwrap();
        needs_poison!(engine);
        let vmap = engine.vmap(&pages(8)).unwrap();
        let adopted = adopt(&engine, &peer, uffd, &[area(0..8, &vmap, 0)]);
        assert_eq!(peer.read(1), Ok(mark(1)));
        peer.begin_play();
        assert!(adopted.wait_gone(DEADLINE));
        assert_eq!(vmap.refcount().unwrap(), 0);
        kill(peer.pid, Signal::SIGKILL).unwrap();
        reap(peer.pid);
    });
}

/// The same userfaultfd is not served twice: each would get a part of what it says.
#[test]
fn a_userfaultfd_is_adopted_once() {
    alone("a_userfaultfd_is_adopted_once", || {
        let (peer, uffd) = start!(remove(), 8, false);
        let engine = engine_builder().build().unwrap();
        needs_poison!(engine);
        let vmap = engine.vmap(&pages(8)).unwrap();
        let again = uffd.try_clone().unwrap();
        let adopted = adopt(&engine, &peer, uffd, &[area(0..4, &vmap, 0)]);
        let refused = engine.adopt(again, &[area(4..8, &vmap, 0)], AdoptOptions::new()).unwrap_err();
        assert!(matches!(refused, Error::Invalid { .. }), "{refused}");
        assert_eq!(vmap.refcount().unwrap(), 1);
        peer.read_all(0..4, mark);
        peer.exit();
        reap(peer.pid);
        assert!(adopted.wait_gone(DEADLINE));
    });
}

/// Areas of two vmaps, while the callback of the one attaches the other.
#[test]
fn an_adoption_waits_for_callbacks_and_holds_none_up() {
    alone("an_adoption_waits_for_callbacks_and_holds_none_up", || {
        let (peer, uffd) = start!(remove(), 8, false);
        let engine = engine_builder().build().unwrap();
        needs_poison!(engine);
        let first = engine.vmap(&pages(4)).unwrap();
        let (begun, begins) = crossbeam_channel::bounded::<()>(1);
        let (go, goes) = crossbeam_channel::bounded::<()>(1);
        let other = first.clone();
        let callback = move |_: &Vmap| {
            let _ = begun.try_send(());
            let _ = goes.recv();
            drop(other.attach(&AttachOptions::new()).unwrap());
        };
        let second = engine.vmap_builder(&pages(4)).on_deref(callback).build().unwrap();
        drop(second.attach(&AttachOptions::new()).unwrap());
        begins.recv().unwrap();
        let areas = [area(0..4, &first, 0), area(4..8, &second, 0)];
        std::thread::scope(|scope| {
            let adopts = scope.spawn(|| adopt(&engine, &peer, uffd, &areas));
            // It counts the first before it waits for the second, or has not begun: either way this must not wait for it.
            std::thread::yield_now();
            drop(go);
            let adopted = adopts.join().unwrap();
            peer.read_all(0..4, mark);
            peer.exit();
            assert!(adopted.wait_gone(DEADLINE));
        });
        reap(peer.pid);
    });
}

/// A process that was to be killed for a page, and can't be: the pidfd names one that has ended. The touch is SIGBUS, in an area and
/// outside.
#[test]
fn a_process_that_cant_be_killed_gets_sigbus() {
    alone("a_process_that_cant_be_killed_gets_sigbus", || {
        let (other, _) = start!(remove(), 1, false);
        let (peer, uffd) = start!(remove(), 8, false);
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        needs_poison!(engine);
        let vmap = engine.vmap(&holes(4)).unwrap();
        let options = AdoptOptions::new().refusal(Refusal::Kill).pidfd(pidfd(other.pid));
        let adopted = engine.adopt(uffd, &[area(0..4, &vmap, 0)], options).unwrap();
        kill(other.pid, Signal::SIGKILL).unwrap();
        reap(other.pid);
        assert_eq!(peer.read(6), Err(SIGBUS));
        assert_eq!(peer.read(2), Err(SIGBUS));
        assert_eq!(peer.read(7), Err(SIGBUS));
        peer.exit();
        reap(peer.pid);
        assert!(adopted.wait_gone(DEADLINE));
    });
}

/// T73: what is SIGBUS after a release is that in children that are forked afterwards, too, also where no page ever came.
#[test]
fn children_of_a_released_process_get_sigbus_too() {
    alone("children_of_a_released_process_get_sigbus_too", || {
        for how in [Release::Poison, Release::Fill] {
            let (peer, uffd) = start!(remove(), 8, false);
            let engine = engine_builder().build().unwrap();
            needs_poison!(engine);
            let vmap = engine.vmap(&holes(8)).unwrap();
            let adopted = adopt(&engine, &peer, uffd, &[area(0..8, &vmap, 0)]);
            adopted.release(how).unwrap();
            let child = peer.fork();
            for page in [0, 7] {
                assert_eq!(child.read(page), Err(SIGBUS));
                assert_eq!(peer.read(page), Err(SIGBUS));
            }
            child.exit();
            peer.exit();
            reap(peer.pid);
        }
    });
}
