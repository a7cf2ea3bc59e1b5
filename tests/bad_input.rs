//! What an environment can do to an engine: files that vanish, descriptors, memory and threads that run out. Each is a typed
//! error that names its knob, or SIGBUS for a page; and nothing is left behind.

mod support;

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;

use kiomap::{AttachOptions, Engine, Error, Kiobuf, Region, page_size};
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use support::{
    alone, assert_sigbus, engine_builder, eventually, fork_child, mark, open_descriptors, pages, read_page, reap_ok,
    settled_stats, threads, vmap_mappings,
};

/// A file of [`mark`]ed pages.
fn file_of(nr_pages: u64) -> File {
    let mut bytes = vec![0; nr_pages as usize * page_size()];
    support::fill_marks(0, &mut bytes);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&bytes).unwrap();
    file
}

fn attach(engine: &Engine, list: &Kiobuf) -> Region {
    engine.vmap(list).unwrap().attach(&AttachOptions::new()).unwrap()
}

/// Lowers the soft limit of a resource while `body` runs.
fn limited<T>(resource: Resource, limit: u64, body: impl FnOnce() -> T) -> T {
    let (soft, hard) = getrlimit(resource).unwrap();
    setrlimit(resource, limit.min(hard), hard).unwrap();
    let outcome = body();
    setrlimit(resource, soft, hard).unwrap();
    outcome
}

/// T12: a file that is truncated while it is attached: what is gone is SIGBUS, page by page and counted, what is left and
/// what was resident is served, and so is everybody else.
#[test]
fn a_file_that_is_truncated_is_sigbus_where_it_is_gone() {
    alone("a_file_that_is_truncated_is_sigbus_where_it_is_gone", || {
        const PAGES: u64 = 40;
        for mapped in [false, true] {
            let engine = engine_builder().fault_around_pages(4).build().unwrap();
            let file = file_of(PAGES);
            let mut list = Kiobuf::new();
            if mapped {
                // SAFETY: the list reads a mapped file in a way that stands its being truncated.
                list.map_mmap(unsafe { memmap2::Mmap::map(&file) }.unwrap()).unwrap();
            } else {
                list.map_file(&file, 0..PAGES * page_size() as u64).unwrap();
            }
            let (region, other) = (attach(&engine, &list), attach(&engine, &pages(3)));
            // Brings its neighbours 36 to 39.
            assert_eq!(read_page(&region, 38), Ok(mark(38)));
            file.set_len(17 * page_size() as u64).unwrap();
            for page in (0..PAGES).rev() {
                if !(17..36).contains(&page) {
                    assert_eq!(read_page(&region, page), Ok(mark(page)));
                } else {
                    assert_sigbus(&region, page);
                    assert_eq!(read_page(&other, page % 3), Ok(mark(page % 3)));
                }
            }
            let stats = settled_stats(&engine);
            assert_eq!((stats.source_errors, stats.pages_poisoned), (36 - 17, 36 - 17), "{stats:?}");
            let failed = region.vmap().read_at(20 * page_size() as u64, &mut [0]).unwrap_err();
            assert!(matches!(failed, Error::NoPage { pgoff: 20, .. }), "{failed}");
        }
    });
}

/// T12: of a file that ends within a page, that page is SIGBUS: half of it is not had.
#[test]
fn a_page_of_which_half_is_gone_is_sigbus() {
    alone("a_page_of_which_half_is_gone_is_sigbus", || {
        let (engine, file) = (engine_builder().build().unwrap(), file_of(4));
        let mut list = Kiobuf::new();
        list.map_file(&file, 0..4 * page_size() as u64).unwrap();
        let region = attach(&engine, &list);
        file.set_len(2 * page_size() as u64 + 100).unwrap();
        [3, 2].into_iter().for_each(|page| assert_sigbus(&region, page));
        (0..2).for_each(|page| assert_eq!(read_page(&region, page), Ok(mark(page))));
    });
}

/// T84: what is no readable file of bytes is refused when it is to be listed, with its errno and the rule.
#[test]
fn files_that_cant_be_read_are_refused() {
    alone("files_that_cant_be_read_are_refused", || {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, vec![1; page_size()]).unwrap();
        let (pipe, _writer) = nix::unistd::pipe().unwrap();
        let refused = [
            OpenOptions::new().write(true).open(&path).unwrap(),
            OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&path).unwrap(),
            File::open(directory.path()).unwrap(),
            File::from(pipe),
            File::open("/dev/null").unwrap(),
        ];
        for file in refused {
            let mut list = Kiobuf::new();
            let refused = list.map_file(&file, 0..1).unwrap_err();
            assert!(matches!(refused, Error::Invalid { .. }), "{refused}");
            assert_eq!((refused.errno(), list.is_mapped()), (Errno::EINVAL, false));
        }
        let file = File::open(&path).unwrap();
        let mut list = Kiobuf::new();
        assert_eq!(list.map_file(&file, 1..1).unwrap_err().errno(), Errno::EINVAL);
        #[allow(clippy::reversed_empty_ranges, reason = "that is what is to be refused")]
        let turned = 2..1;
        assert_eq!(list.map_file(&file, turned).unwrap_err().errno(), Errno::EINVAL);
        assert_eq!(list.map_file(&file, 0..u64::MAX).unwrap_err().errno(), Errno::EFAULT);
    });
}

/// Settings of an engine that are out of range are refused, each by name.
#[test]
fn settings_out_of_range_are_refused() {
    alone("settings_out_of_range_are_refused", || {
        for builder in [
            engine_builder().workers(0),
            engine_builder().workers(kiomap::WORKERS_MAX + 1),
            engine_builder().fault_around_pages(0),
            engine_builder().fault_around_pages(kiomap::FAULT_AROUND_MAX_PAGES + 1),
            engine_builder().handler_cpu(usize::MAX),
        ] {
            let refused = builder.build().unwrap_err();
            assert!(matches!(refused, Error::Invalid { .. }), "{refused}");
        }
        let refused = engine_builder().open_ways(&[]).build().unwrap_err();
        assert!(matches!(refused, Error::Open(_)), "{refused}");
        assert_eq!(refused.errno(), Errno::EINVAL);
        let engine = engine_builder().workers(kiomap::WORKERS_MAX).fault_around_pages(512).build().unwrap();
        assert_eq!(read_page(&attach(&engine, &pages(3)), 1), Ok(mark(1)));
    });
}

/// Everything that takes a descriptor, memory or a thread, from first to last; how far it came.
fn life(file: &File) -> Result<(), (usize, Error)> {
    let at = |stage| move |error| (stage, error);
    let engine = engine_builder().workers(2).build().map_err(at(0))?;
    let mut list = Kiobuf::new();
    list.map_file(file, 0..20 * page_size() as u64).map_err(at(1))?;
    let vmap = engine.vmap(&list).map_err(at(2))?;
    let region = vmap.attach(&AttachOptions::new()).map_err(at(3))?;
    let outcome = vmap.write_at(7, &[9]).map_err(at(4));
    // What is attached is served, whatever has run out.
    (0..20).for_each(|page| assert_eq!(read_page(&region, page), Ok(mark(page))));
    outcome
}

fn no_engine_is_left(fds: usize) {
    eventually("the threads' ends", || threads().iter().all(|name| !name.starts_with("kiomap")));
    eventually("the descriptors' ends", || open_descriptors() == fds);
    assert_eq!(vmap_mappings(), Vec::<String>::new());
}

/// T24, B13, B14: descriptors run out at every place where one is taken: an error that names RLIMIT_NOFILE, and nothing is
/// left behind.
#[test]
fn running_out_of_descriptors_is_an_error_at_every_step() {
    alone("running_out_of_descriptors_is_an_error_at_every_step", || {
        let file = file_of(20);
        life(&file).unwrap();
        let fds = open_descriptors();
        no_engine_is_left(fds);
        let mut stages = Vec::new();
        for limit in (0..fds as u64 + 40).rev() {
            match limited(Resource::RLIMIT_NOFILE, limit, || life(&file)) {
                Ok(()) => assert!(stages.is_empty(), "a lower limit is no better"),
                Err((stage, error)) => {
                    assert_eq!(error.errno(), Errno::EMFILE, "{error}");
                    assert!(error.to_string().contains("RLIMIT_NOFILE"), "{error}");
                    stages.push(stage);
                }
            }
            no_engine_is_left(fds);
        }
        stages.dedup();
        // The vmap, the dup of the file, and the engine take descriptors; what comes after them takes none. Without privileges
        // the engine gives one back when it is built, which is enough for the dup.
        assert!(stages == [2, 1, 0] || stages == [2, 0], "{stages:?}");
        life(&file).unwrap();
    });
}

/// The address space of this process in bytes.
fn address_space() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').next().unwrap().parse::<u64>().unwrap() * page_size() as u64
}

/// T24: address space runs out at every place of an attach: `ENOMEM` that names the limits, and count, mappings and
/// descriptors are as before.
#[test]
fn running_out_of_address_space_is_an_error_of_the_attach() {
    alone("running_out_of_address_space_is_an_error_of_the_attach", || {
        let engine = engine_builder().build().unwrap();
        let vmap = engine.vmap(&pages(64)).unwrap();
        drop(vmap.attach(&AttachOptions::new()).unwrap());
        // What the allocator needs meanwhile it has.
        let spare: Vec<_> = (0..4000).map(|_| vec![0_u8; 1000]).collect();
        let _pinned = vec![0_u8; 1000];
        drop(spare);
        let (fds, mut refused, mut attached) = (open_descriptors(), 0, 0);
        for extra in 0..100 {
            let limit = address_space() + extra * page_size() as u64;
            match limited(Resource::RLIMIT_AS, limit, || vmap.attach(&AttachOptions::new())) {
                Ok(region) => {
                    assert_eq!(read_page(&region, extra % 64), Ok(mark(extra % 64)));
                    attached += 1;
                }
                Err(error) => {
                    assert_eq!(error.errno(), Errno::ENOMEM, "{error}");
                    assert!(error.to_string().contains("RLIMIT_AS"), "{error}");
                    refused += 1;
                }
            }
            assert_eq!((vmap.refcount().unwrap(), vmap_mappings().len(), open_descriptors()), (0, 0, fds));
        }
        assert!(refused >= 60 && attached >= 30, "{refused} refused, {attached} attached");
    });
}

/// T24: address space runs out while an engine is built: an error, and nothing of the engine is left.
#[test]
fn running_out_of_address_space_is_an_error_of_the_build() {
    alone("running_out_of_address_space_is_an_error_of_the_build", || {
        drop(engine_builder().build().unwrap());
        let fds = open_descriptors();
        let mut outcomes = [0; 2];
        // What the allocator needs meanwhile it has.
        let spare: Vec<_> = (0..4000).map(|_| vec![0_u8; 1000]).collect();
        let _pinned = vec![0_u8; 1000];
        drop(spare);
        for extra in (0..400).step_by(4) {
            let limit = address_space() + extra * page_size() as u64;
            let built = limited(Resource::RLIMIT_AS, limit, || engine_builder().workers(1).build());
            outcomes[usize::from(built.is_ok())] += 1;
            if let Err(error) = built.map(drop) {
                // A thread for which there is no memory is EAGAIN.
                assert!([Errno::ENOMEM, Errno::EAGAIN].contains(&error.errno()), "{error}");
            }
            no_engine_is_left(fds);
        }
        assert!(outcomes[0] > 0, "{outcomes:?}");
    });
}

/// T24: threads run out at every one that an engine starts: `EAGAIN` that names RLIMIT_NPROC, and nothing is left behind.
#[test]
fn running_out_of_threads_is_an_error_at_every_step() {
    alone("running_out_of_threads_is_an_error_at_every_step", || {
        const NOBODY: u32 = 65534;
        drop(engine_builder().build().unwrap());
        if nix::unistd::geteuid().is_root() {
            // Root has no such limit.
            nix::unistd::setresgid(NOBODY.into(), NOBODY.into(), NOBODY.into()).unwrap();
            nix::unistd::setresuid(NOBODY.into(), NOBODY.into(), NOBODY.into()).unwrap();
            // Else /proc/self is root's from now on.
            // SAFETY: changes an attribute of the process, no memory.
            assert_eq!(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0) }, 0);
        }
        let fds = open_descriptors();
        let (mut refused, mut built) = (0, 0);
        for limit in 0..5000 {
            match limited(Resource::RLIMIT_NPROC, limit, || engine_builder().workers(2).build()) {
                Ok(engine) => {
                    assert_eq!(read_page(&attach(&engine, &pages(3)), 2), Ok(mark(2)));
                    built += 1;
                }
                Err(error) => {
                    assert_eq!(error.errno(), Errno::EAGAIN, "{error}");
                    assert!(error.to_string().contains("RLIMIT_NPROC"), "{error}");
                    refused += 1;
                }
            }
            no_engine_is_left(fds);
            if built == 3 {
                break;
            }
        }
        assert!(refused >= 5 && built == 3, "{refused} refused, {built} built");
    });
}

/// A list that is larger than RLIMIT_FSIZE allows a file to be is an error that names the limit, not the end of the process.
#[test]
fn a_list_beyond_the_file_size_limit_is_an_error() {
    alone("a_list_beyond_the_file_size_limit_is_an_error", || {
        reap_ok(fork_child(|| {
            let engine = engine_builder().build().unwrap();
            let small = engine.vmap_builder(&pages(1)).expandable().build().unwrap();
            limited(Resource::RLIMIT_FSIZE, 2 * page_size() as u64, || {
                for refused in [engine.vmap(&pages(3)).map(drop), small.expand(&pages(2))] {
                    let refused = refused.unwrap_err();
                    assert_eq!(refused.errno(), Errno::EFBIG);
                    assert!(refused.to_string().contains("RLIMIT_FSIZE"), "{refused}");
                }
                small.expand(&pages(1)).unwrap();
                assert_eq!(read_page(&attach(&engine, &pages(2)), 1), Ok(mark(1)));
            });
        }));
    });
}
