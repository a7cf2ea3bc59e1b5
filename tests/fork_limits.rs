//! Forks of a process that is short of descriptors: the child has the region or says why not, and nothing hangs or leaks.

mod support;

use kiomap::{AttachOptions, Error};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use support::{alone, engine_builder, fork_child, mark, open_descriptors, pages, reap_ok};

/// T58, T61: wherever in the fork the descriptors run out, parent and child go on, the count is right, and no descriptor
/// is left behind.
#[test]
fn a_fork_short_of_descriptors_leaves_region_or_cause_and_no_trace() {
    alone("a_fork_short_of_descriptors_leaves_region_or_cause_and_no_trace", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(4)).unwrap();
        let areas = [0, 1].map(|_| vmap.attach(&AttachOptions::new()).unwrap());
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let before = open_descriptors();
        // The limit is one on numbers: they are handed out from the lowest free one on.
        let mut inherited = 0;
        for limit in 3..before as u64 + 16 {
            let gone = engine.stats().processes_gone;
            setrlimit(Resource::RLIMIT_NOFILE, limit, hard).unwrap();
            let child = fork_child(|| {
                // It may end up waiting for nobody: then its end is the failure, not the test's.
                nix::unistd::alarm::set(10);
                for region in &areas {
                    match region.check() {
                        // The engine may have been unable to take the child in: then its guard answers by SIGBUS.
                        Ok(()) => assert_eq!(support::touch::read(region.as_ptr()).unwrap_or(mark(0)), mark(0)),
                        Err(error) => assert!(matches!(error, Error::NotInherited { .. }), "{error}"),
                    }
                }
            });
            reap_ok(child);
            setrlimit(Resource::RLIMIT_NOFILE, soft, hard).unwrap();
            engine.settle().unwrap();
            assert_eq!(vmap.refcount().unwrap(), 2, "with a limit of {limit}");
            assert_eq!(open_descriptors(), before, "with a limit of {limit}");
            inherited += u32::from(engine.stats().processes_gone > gone);
        }
        assert!(inherited > 0, "no limit was high enough for a child to be served");
    });
}
