//! Forks of processes that are at a limit of theirs: descriptors, address space, processes. The child has its memory or
//! says why not; what it has not is nobody else's either; the count is the kernel's own.

mod support;

use std::num::NonZeroUsize;
use std::os::fd::AsRawFd;

use kiomap::{AttachOptions, Error, Region, page_size};
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::wait::WaitStatus;
use nix::unistd::{ForkResult, fork};
use support::scene::{Told, at, child, settled};
use support::truth::assert_count;
use support::{alone, engine_builder, eventually, mark, open_descriptors, pages, reap, reap_ok, touch};

/// Sets a soft limit until dropped.
struct Limited(Resource, u64, u64);

impl Limited {
    fn to(resource: Resource, limit: u64) -> Limited {
        let (soft, hard) = getrlimit(resource).unwrap();
        setrlimit(resource, limit.min(hard), hard).unwrap();
        Limited(resource, soft, hard)
    }
}

impl Drop for Limited {
    fn drop(&mut self) {
        setrlimit(self.0, self.1, self.2).unwrap();
    }
}

/// The lowest number that is not a descriptor's: a limit of that leaves none to be had.
fn next_descriptor() -> u64 {
    let next = nix::unistd::dup(std::io::stderr()).unwrap();
    next.as_raw_fd() as u64
}

/// Fails unless a region that was not inherited is refused here, and its addresses are nobody's: a pointer into them
/// must not meet foreign bytes.
#[track_caller]
fn lost_and_reserved(region: &Region) {
    let why = region.check().unwrap_err();
    assert!(matches!(why, Error::NotInherited { .. }), "{why}");
    assert!(touch::read(at(region, 1)).unwrap_err().is_sigsegv());
    for page in [0, region.len_bytes() / page_size() - 1] {
        let (addr, len) = (NonZeroUsize::new(at(region, page as u64) as usize), NonZeroUsize::new(page_size()));
        // SAFETY: replaces nothing.
        let taken = unsafe {
            mmap_anonymous(
                addr,
                len.unwrap(),
                ProtFlags::PROT_READ,
                MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED_NOREPLACE,
            )
        };
        assert_eq!(taken.map(drop), Err(Errno::EEXIST), "page {page}");
    }
}

/// T58: a child that can't be served, because its parent has no descriptor left, has nothing mapped at its areas'
/// addresses, and gets nothing else there. The same for a child of it, and a child of a child.
#[test]
fn the_addresses_of_what_is_not_inherited_stay_reserved() {
    alone("the_addresses_of_what_is_not_inherited_stay_reserved", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(8)).unwrap();
        // More than fit into one answer.
        let regions: Vec<_> = (0..5).map(|_| vmap.attach(&AttachOptions::new()).unwrap()).collect();
        let limited = Limited::to(Resource::RLIMIT_NOFILE, next_descriptor());
        reap_ok(child(|| {
            regions.iter().for_each(lost_and_reserved);
            reap_ok(child(|| regions.iter().for_each(lost_and_reserved)));
        }));
        drop(limited);
        settled(&engine, &vmap, 5);
        assert_count(&engine, &vmap, 5);
        reap_ok(child(|| {
            assert_eq!(touch::read(at(&regions[0], 2)), Ok(mark(2)));
            let limited = Limited::to(Resource::RLIMIT_NOFILE, next_descriptor());
            reap_ok(child(|| regions.iter().for_each(lost_and_reserved)));
            drop(limited);
            assert_eq!(vmap.refcount().unwrap(), 10);
            reap_ok(child(|| assert_eq!(touch::read(at(&regions[4], 3)), Ok(mark(3)))));
        }));
        settled(&engine, &vmap, 5);
        assert_count(&engine, &vmap, 5);
    });
}

/// T58: a child forks while the *engine's* process has no descriptor left: the grandchild is refused, the child goes on.
#[test]
fn a_child_that_forks_while_the_engine_has_no_descriptors_is_served_on() {
    alone("a_child_that_forks_while_the_engine_has_no_descriptors_is_served_on", || {
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let vmap = engine.vmap(&pages(16)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let (started, go) = (Told::new(), Told::new());
        let pid = child(|| {
            started.tell(1);
            go.wait_for(2);
            reap_ok(child(|| lost_and_reserved(&region)));
            assert_eq!(touch::read(at(&region, 5)), Ok(mark(5)));
            let own = vmap.attach(&AttachOptions::new()).unwrap();
            assert_eq!(touch::read(at(&own, 6)), Ok(mark(6)));
            assert_eq!(vmap.refcount().unwrap(), 3);
            started.tell(3);
            go.wait_for(4);
            reap_ok(child(|| assert_eq!(touch::read(at(&own, 7)), Ok(mark(7)))));
        });
        started.wait_for(1);
        let limited = Limited::to(Resource::RLIMIT_NOFILE, next_descriptor());
        go.tell(2);
        started.wait_for(3);
        drop(limited);
        go.tell(4);
        reap_ok(pid);
        settled(&engine, &vmap, 1);
        assert_count(&engine, &vmap, 1);
    });
}

/// What a forked child found of a region: its bytes, or a cause and nothing. Allocates nothing.
fn found(region: &Region) -> bool {
    match region.check() {
        Ok(()) => {
            assert_eq!(touch::read(at(region, 2)), Ok(mark(2)));
            true
        }
        Err(_) => {
            assert!(touch::read(at(region, 2)).unwrap_err().is_sigsegv());
            false
        }
    }
}

/// Forks as often as there are limits, and has each child say what it found; answers how many had the region, had it
/// not, and could not be forked.
fn under_limits(resource: Resource, limits: impl Iterator<Item = u64>, region: &Region) -> [u32; 3] {
    let mut outcomes = [0; 3];
    for limit in limits {
        let limited = Limited::to(resource, limit);
        // SAFETY: called in tests that run alone; the child makes system calls and touches, and ends.
        let forked = unsafe { fork() };
        if let Ok(ForkResult::Child) = forked {
            // It may end up waiting for nobody: then its end is the failure, not the test's.
            nix::unistd::alarm::set(20);
            let served = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| found(region)));
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(served.map_or(101, |served| if served { 0 } else { 1 })) };
        }
        drop(limited);
        match forked.map(|forked| if let ForkResult::Parent { child } = forked { Some(reap(child)) } else { None }) {
            Ok(Some(WaitStatus::Exited(_, code @ (0 | 1)))) => outcomes[code as usize] += 1,
            Ok(status) => panic!("with a limit of {limit}: {status:?}"),
            Err(errno) => {
                assert!([Errno::EAGAIN, Errno::ENOMEM].contains(&errno), "{errno}");
                outcomes[2] += 1;
            }
        }
    }
    outcomes
}

/// This process's address space, in bytes, as RLIMIT_AS counts it.
fn address_space() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').next().unwrap().parse::<u64>().unwrap() * page_size() as u64
}

/// T61: wherever in the fork the address space runs out, in the engine, in the parent or in the child.
#[test]
fn a_fork_short_of_address_space_leaves_region_or_cause_and_no_trace() {
    alone("a_fork_short_of_address_space_leaves_region_or_cause_and_no_trace", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(64)).unwrap();
        let regions: Vec<_> = (0..40).map(|_| vmap.attach(&AttachOptions::new()).unwrap()).collect();
        assert!(found(&regions[0]));
        let (fds, page) = (open_descriptors(), page_size() as u64);
        let outcomes: Vec<_> = [1, 16]
            .map(|step| {
                let now = address_space();
                under_limits(Resource::RLIMIT_AS, (0..60).map(|n| now + n * step * page), &regions[39])
            })
            .into_iter()
            .collect();
        let [served, refused] = [0, 1].map(|which| outcomes.iter().map(|outcome| outcome[which]).sum::<u32>());
        assert!(served > 0 && refused > 0, "{outcomes:?}");
        eventually("the children are counted out", || vmap.refcount().unwrap() == 40);
        assert_count(&engine, &vmap, 40);
        eventually("descriptors are back", || open_descriptors() == fds);
        assert!(found(&regions[39]));
    });
}

/// T61: the fork succeeds, or not, and the child's guard can't be started: it is then not served rather than unguarded.
#[test]
fn a_fork_short_of_processes_leaves_region_or_cause_and_no_trace() {
    alone("a_fork_short_of_processes_leaves_region_or_cause_and_no_trace", || {
        let own_user = nix::unistd::geteuid().is_root();
        if own_user {
            // The limit does not bind root: become somebody whom it does, and who has no other processes.
            nix::unistd::setgid(65531.into()).unwrap();
            nix::unistd::setuid(65531.into()).unwrap();
            nix::sys::prctl::set_dumpable(true).unwrap();
        }
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(8)).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        assert!(found(&region));
        let fds = open_descriptors();
        let [served, refused, failed] = under_limits(Resource::RLIMIT_NPROC, (1..40).chain([4096]), &region);
        // Other tests of the same user count too, unless there are none.
        assert!(failed > 0 && (refused > 0 || !own_user), "{served} {refused} {failed}");
        eventually("the children are counted out", || vmap.refcount().unwrap() == 1);
        assert_count(&engine, &vmap, 1);
        eventually("descriptors are back", || open_descriptors() == fds);
        reap_ok(child(|| assert!(found(&region))));
    });
}
