//! Levels of privilege and of kernels: what an engine does without a feature, and what it refuses to do, in so many words.

mod support;

use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use kiomap::{AttachOptions, Error, Features, Kiobuf, OpenWay, Region, page_size};
use nix::errno::Errno;
use support::scene::{at, child, settled};
use support::truth::assert_count;
use support::{
    DEADLINE, alone, assert_sigbus, attached, engine_builder, eventually, list_with_holes, mark, open_descriptors,
    pages, read_page, reap_ok, source, taken_away, touch, within, without_poison,
};

/// Which calls of a kind a policy refuses.
#[derive(Clone, Copy)]
enum Which {
    All,
    /// Those with one of these bits in this argument.
    WithBits(u32, u32),
    /// Those with this number as this argument.
    With(u32, u32),
}

/// Has the kernel refuse calls of this process from now on, by a seccomp filter: their numbers, which of them, and the
/// errno.
fn forbid(calls: &[(libc::c_long, Which, Errno)]) {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const ANY_BIT: u16 = (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16;
    const ANSWER: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let step = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    // The low half of an argument, in a record of number, architecture, instruction and arguments.
    let load = |argument| step(LOAD, 0, 0, 16 + 8 * argument);
    let mut program = Vec::new();
    for &(number, which, errno) in calls {
        let refuse = step(ANSWER, 0, 0, libc::SECCOMP_RET_ERRNO | errno as u32);
        program.push(step(LOAD, 0, 0, 0));
        let is_it = |steps| step(EQUAL, 0, steps, number as u32);
        match which {
            Which::All => program.extend([is_it(1), refuse]),
            Which::WithBits(argument, bits) => {
                program.extend([is_it(3), load(argument), step(ANY_BIT, 0, 1, bits), refuse]);
            }
            Which::With(argument, value) => {
                program.extend([is_it(3), load(argument), step(EQUAL, 0, 1, value), refuse]);
            }
        }
    }
    program.push(step(ANSWER, 0, 0, libc::SECCOMP_RET_ALLOW));
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: both calls only restrict this process, which runs one test; the program outlives the call that copies it.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let installed = libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const filter);
        assert_eq!(installed, 0, "{}", Errno::last());
    }
}

/// The request number of UFFDIO_POISON.
const POISON: u32 = 0xc020_aa08;

/// T86: an engine uses of what the kernel has what it is not told to do without, and says so.
#[test]
fn features_tell_what_is_in_use() {
    let all = engine_builder().build().unwrap().features();
    assert!(all.contains(Features::MISSING_SHMEM | Features::EVENT_UNMAP), "{all}");
    for feature in [Features::POISON, Features::EVENT_REMOVE, Features::THREAD_ID] {
        let engine = engine_builder().without(taken_away() | feature).build().unwrap();
        assert_eq!(engine.features(), all.difference(feature));
    }
    // What it never uses is no loss.
    let never = Features::EVENT_FORK | Features::MOVE | Features::SIGBUS | Features::from_bits(1 << 63);
    assert_eq!(engine_builder().without(taken_away() | never).build().unwrap().features(), all);
}

/// T40, T86: without what nothing stands for there is no engine; the error names the feature, the Linux version and
/// the need, and nothing is left behind.
#[test]
fn what_nothing_stands_for_is_a_typed_error() {
    alone("what_nothing_stands_for_is_a_typed_error", || {
        let before = (open_descriptors(), support::threads().len());
        let table = [
            (Features::MISSING_SHMEM, "MISSING_SHMEM, of Linux 4.11"),
            (Features::EVENT_UNMAP, "EVENT_UNMAP, of Linux 4.11"),
            (Features::EVENT_REMAP, "EVENT_REMAP, of Linux 4.11"),
            (Features::MINOR_SHMEM, "MINOR_SHMEM, of Linux 5.14"),
        ];
        for (feature, named) in table {
            let error = engine_builder().without(taken_away() | feature).build().unwrap_err();
            assert!(matches!(error, Error::Unsupported { missing, .. } if missing == feature), "{error:?}");
            assert_eq!(error.errno(), Errno::EOPNOTSUPP);
            assert!(error.to_string().contains(named), "{error}");
        }
        assert_eq!((open_descriptors(), support::threads().len()), before);
    });
}

/// A kernel like that of Linux 6.1: no poison, no flag against executable memfds (6.3), and nobody asks for either.
#[test]
fn an_older_kernel_is_not_asked_for_what_it_lacks() {
    alone("an_older_kernel_is_not_asked_for_what_it_lacks", || {
        forbid(&[
            (libc::SYS_memfd_create, Which::WithBits(1, libc::MFD_NOEXEC_SEAL), Errno::EINVAL),
            (libc::SYS_ioctl, Which::With(1, POISON), Errno::EINVAL),
        ]);
        let engine = without_poison().build().unwrap();
        let (vmap, region) = attached(&engine, &list_with_holes(6, |page| page == 3));
        let check = |region: &Region| {
            assert_sigbus(region, 3);
            assert_eq!(read_page(region, 2), Ok(mark(2)));
        };
        reap_ok(child(|| check(&region)));
        check(&region);
        settled(&engine, &vmap, 1);
    });
}

/// Where there is neither poison nor, by a policy, remap_file_pages(2), there is no engine, and the error says why.
#[test]
fn without_poison_and_its_substitute_there_is_no_engine() {
    alone("without_poison_and_its_substitute_there_is_no_engine", || {
        let before = open_descriptors();
        forbid(&[(libc::SYS_remap_file_pages, Which::All, Errno::EPERM)]);
        let error = without_poison().build().unwrap_err();
        assert_eq!(error.errno(), Errno::EPERM);
        let text = error.to_string();
        assert!(text.contains("remap_file_pages") && text.contains("Linux 6.6"), "{text}");
        assert_eq!(open_descriptors(), before);
    });
}

/// T79: without THREAD_ID a source that touches what it makes could not be told, and would wait for ever: sources are
/// refused, and all else is served.
#[test]
fn without_thread_id_page_sources_are_refused() {
    alone("without_thread_id_page_sources_are_refused", || {
        let engine = engine_builder().without(taken_away() | Features::THREAD_ID).build().unwrap();
        let refused = |error: Error| {
            assert!(matches!(error, Error::Unsupported { missing: Features::THREAD_ID, .. }), "{error:?}");
            assert!(error.to_string().contains("Linux 4.14"), "{error}");
        };
        let list = source(4, |_, _| Ok(()));
        refused(engine.vmap(&list).unwrap_err());
        let vmap = engine.vmap_builder(&list_with_holes(4, |page| page == 1)).expandable().build().unwrap();
        refused(vmap.expand(&list).unwrap_err());
        assert_eq!(vmap.nr_pages(), 4);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![0x5a; 2 * page_size()]).unwrap();
        let mut tail = Kiobuf::new();
        tail.map_file(&file, 0..2 * page_size() as u64).unwrap();
        vmap.expand(&tail).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        assert_eq!(read_page(&region, 0), Ok(mark(0)));
        assert_sigbus(&region, 1);
        assert_eq!(read_page(&region, 5), Ok(0x5a));
    });
}

/// T46, T47: without EVENT_REMOVE nothing is lost: the event only says that pages were given up, and the next touch asks
/// for them, whether anybody was told or not.
#[test]
fn without_remove_events_advice_is_followed_all_the_same() {
    within(DEADLINE, || {
        let engine = engine_builder().without(taken_away() | Features::EVENT_REMOVE).build().unwrap();
        let (vmap, region) = attached(&engine, &pages(64));
        let stop = AtomicBool::new(false);
        let advices = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for advice in [libc::MADV_DONTNEED, libc::MADV_REMOVE] {
                let (region, stop, advices) = (&region, &stop, &advices);
                scope.spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        // SAFETY: nobody refers to the pages, and they come back as they were, from the list.
                        let advised = unsafe { libc::madvise(at(region, 8).cast(), 32 * page_size(), advice) };
                        assert_eq!(advised, 0);
                        advices.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            eventually("advice is given", || advices.load(Ordering::Relaxed) > 0);
            for page in (0..64).cycle().take(20_000) {
                assert_eq!(read_page(&region, page), Ok(mark(page)));
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert_count(&engine, &vmap, 1);
    });
}

/// T76: user mode only: touches are served, in children too; a system call on a missing page is EFAULT, and on one that is
/// there is served. The engine says beforehand which it is.
#[test]
fn in_user_mode_only_system_calls_on_missing_pages_are_efault() {
    alone("in_user_mode_only_system_calls_on_missing_pages_are_efault", || {
        let engine = engine_builder().fault_around_pages(1).open_ways(&[OpenWay::UserModeOnly]).build().unwrap();
        assert!(!engine.open_way().serves_kernel_faults());
        let (_vmap, region) = attached(&engine, &pages(4));
        let check = |page: u64| {
            let (told, tell) = nix::unistd::pipe().unwrap();
            let here = support::in_page(&region, page);
            let write = || {
                // SAFETY: the kernel reads the byte if it is there.
                Errno::result(unsafe { libc::write(tell.as_raw_fd(), here.cast(), 1) })
            };
            assert_eq!(write(), Err(Errno::EFAULT));
            assert_eq!(touch::read(here), Ok(mark(page)));
            assert_eq!(write(), Ok(1));
            drop(told);
        };
        check(1);
        reap_ok(child(|| check(2)));
    });
}
