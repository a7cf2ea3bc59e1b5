//! System calls on memory that is missing: served where the kernel lets the engine serve them, refused with EFAULT where
//! it does not; never zeros, never a hang.

mod support;

use std::fs::{File, OpenOptions};
use std::io::{IoSlice, IoSliceMut, Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use kiomap::{AttachOptions, Engine, OpenWay, Region, Shutdown, page_size};
use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::getpid;
use support::scene::{GatedSource, at, child, sourced_pages};
use support::{alone, engine_builder, eventually, mark, pages, reap_ok, touch};

/// The bytes of some pages, for the kernel to read; the compiler is told nothing of them.
fn bytes(region: &Region, page: u64, nr_pages: usize) -> &[u8] {
    // SAFETY: mapped as long as the region is borrowed; only system calls read them.
    unsafe { std::slice::from_raw_parts(at(region, page), nr_pages * page_size()) }
}

/// The bytes of some pages, for the kernel to write.
#[expect(clippy::mut_from_ref, reason = "shared memory, of which each test uses a page once")]
fn bytes_mut(region: &Region, page: u64, nr_pages: usize) -> &mut [u8] {
    // SAFETY: mapped as long as the region is borrowed; no other reference to these pages is alive.
    unsafe { std::slice::from_raw_parts_mut(at(region, page), nr_pages * page_size()) }
}

fn marked(first: u64, nr_pages: u64) -> Vec<u8> {
    (first..first + nr_pages).flat_map(|page| std::iter::repeat_n(mark(page), page_size())).collect()
}

/// An engine that brings one page for one fault, and lists of memory and of a slow source.
fn engine() -> Engine {
    engine_builder().fault_around_pages(1).build().unwrap()
}

macro_rules! needs_kernel_faults {
    ($engine:expr) => {
        if !$engine.open_way().serves_kernel_faults() {
            skip!("{} serves no faults of the kernel", $engine.open_way());
        }
    };
}

/// T75: read(2) into, and write(2) from, missing pages: through a pipe and a file, across pages.
#[test]
fn read_and_write_reach_missing_pages() {
    alone("read_and_write_reach_missing_pages", || {
        let engine = engine();
        needs_kernel_faults!(engine);
        for list in [pages(32), sourced_pages(32)] {
            let region = engine.vmap(&list).unwrap().attach(&AttachOptions::new()).unwrap();
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(bytes(&region, 0, 8)).unwrap();
            file.rewind().unwrap();
            let mut back = Vec::new();
            file.read_to_end(&mut back).unwrap();
            assert!(back == marked(0, 8));
            // Into the middle of missing pages: the bytes around come from the list.
            file.rewind().unwrap();
            let target = &mut bytes_mut(&region, 8, 8)[100..100 + 5 * page_size()];
            file.read_exact(target).unwrap();
            let mut expected = marked(8, 8);
            expected[100..100 + 5 * page_size()].copy_from_slice(&marked(0, 8)[..5 * page_size()]);
            assert!(bytes(&region, 8, 8) == expected);
            let (read_end, write_end) = nix::unistd::pipe().unwrap();
            assert_eq!(nix::unistd::write(&write_end, bytes(&region, 20, 2)).unwrap(), 2 * page_size());
            let mut through = vec![0; 2 * page_size()];
            File::from(read_end).read_exact(&mut through).unwrap();
            assert!(through == marked(20, 2));
        }
    });
}

/// T75: readv, writev, sendmsg and recvmsg with missing pages among their buffers.
#[test]
fn messages_reach_missing_pages() {
    alone("messages_reach_missing_pages", || {
        use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair};
        let engine = engine();
        needs_kernel_faults!(engine);
        let region = engine.vmap(&sourced_pages(16)).unwrap().attach(&AttachOptions::new()).unwrap();
        let (a, b) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let parts = [IoSlice::new(&bytes(&region, 0, 1)[..77]), IoSlice::new(bytes(&region, 3, 2))];
        let sent = sendmsg::<()>(a.as_raw_fd(), &parts, &[], MsgFlags::empty(), None).unwrap();
        assert_eq!(sent, 77 + 2 * page_size());
        let mut parts =
            [IoSliceMut::new(&mut bytes_mut(&region, 8, 1)[..50]), IoSliceMut::new(bytes_mut(&region, 10, 1))];
        let received = recvmsg::<()>(b.as_raw_fd(), &mut parts, None, MsgFlags::empty()).unwrap().bytes;
        assert_eq!(received, 50 + page_size());
        assert!(bytes(&region, 8, 1)[..50].iter().all(|&byte| byte == mark(0)));
        assert!(bytes(&region, 8, 1)[50..].iter().all(|&byte| byte == mark(8)));
        let mut expected = vec![mark(0); 27];
        expected.extend(marked(3, 1));
        assert!(bytes(&region, 10, 1) == &expected[..page_size()]);
    });
}

/// T75: process_vm_readv and process_vm_writev, of this process and by another one.
#[test]
fn another_process_reads_and_writes_missing_pages() {
    alone("another_process_reads_and_writes_missing_pages", || {
        let engine = engine();
        needs_kernel_faults!(engine);
        let region = engine.vmap(&sourced_pages(16)).unwrap().attach(&AttachOptions::new()).unwrap();
        let owner = getpid();
        let peek = |page: u64| {
            let mut byte = [0];
            let remote = [RemoteIoVec { base: at(&region, page) as usize, len: 1 }];
            process_vm_readv(owner, &mut [IoSliceMut::new(&mut byte)], &remote).map(|_| byte[0])
        };
        assert_eq!(peek(1), Ok(mark(1)));
        let remote = [RemoteIoVec { base: at(&region, 2) as usize + 9, len: 2 }];
        assert_eq!(process_vm_writev(owner, &[IoSlice::new(&[1, 2])], &remote), Ok(2));
        assert_eq!(&bytes(&region, 2, 1)[8..12], &[mark(2), 1, 2, mark(2)]);
        // SAFETY: allows any process to look into this one; it takes no pointers.
        unsafe { libc::prctl(libc::PR_SET_PTRACER, libc::PR_SET_PTRACER_ANY) };
        reap_ok(child(|| assert_eq!(peek(4), Ok(mark(4)))));
    });
}

/// T75: a futex in a missing page: wait and wake between two processes.
#[test]
fn a_futex_in_a_missing_page_wakes_another_process() {
    alone("a_futex_in_a_missing_page_wakes_another_process", || {
        let engine = engine();
        needs_kernel_faults!(engine);
        let region = engine.vmap(&sourced_pages(4)).unwrap().attach(&AttachOptions::new()).unwrap();
        let word = at(&region, 2).cast::<u32>();
        let futex = |operation: i32, value: u32| {
            // SAFETY: the word is mapped; no timeout is given.
            let answer = unsafe {
                libc::syscall(libc::SYS_futex, word, operation, value, std::ptr::null::<libc::timespec>(), 0, 0)
            };
            Errno::result(answer)
        };
        let untouched = u32::from_ne_bytes([mark(2); 4]);
        // The kernel is the first to touch the page, and finds the list's bytes there.
        assert_eq!(futex(libc::FUTEX_WAIT, untouched ^ 1), Err(Errno::EAGAIN));
        let pid = child(|| match futex(libc::FUTEX_WAIT, untouched) {
            Ok(_) => {}
            // The word was changed before it waited.
            Err(errno) => assert_eq!(errno, Errno::EAGAIN),
        });
        region.atomic_u32(2 * page_size()).unwrap().store(7, std::sync::atomic::Ordering::Release);
        eventually("it is woken, or did not wait", || {
            futex(libc::FUTEX_WAKE, 1).unwrap();
            nix::sys::wait::waitpid(pid, Some(nix::sys::wait::WaitPidFlag::WNOHANG))
                .is_ok_and(|status| matches!(status, nix::sys::wait::WaitStatus::Exited(_, 0)))
        });
    });
}

/// T75: O_DIRECT between a disk and missing pages, in both directions.
#[test]
fn direct_io_reaches_missing_pages() {
    alone("direct_io_reaches_missing_pages", || {
        let engine = engine();
        needs_kernel_faults!(engine);
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).or_else(|_| tempfile::tempdir()).unwrap();
        let path = directory.path().join("direct");
        let opened =
            OpenOptions::new().read(true).write(true).create_new(true).custom_flags(libc::O_DIRECT).open(&path);
        let mut file = match opened {
            Ok(file) => file,
            Err(error) => skip!("the file system has no O_DIRECT: {error}"),
        };
        let region = engine.vmap(&sourced_pages(64)).unwrap().attach(&AttachOptions::new()).unwrap();
        file.write_all(bytes(&region, 0, 16)).unwrap();
        file.rewind().unwrap();
        file.read_exact(bytes_mut(&region, 32, 16)).unwrap();
        assert!(bytes(&region, 32, 16) == marked(0, 16));
        assert!(std::fs::read(&path).unwrap() == marked(0, 16));
    });
}

/// T8, T75: a system call on a page that can't be had answers EFAULT or stops before it; the process lives on.
#[test]
fn a_page_that_can_not_be_had_is_efault_in_a_system_call() {
    alone("a_page_that_can_not_be_had_is_efault_in_a_system_call", || {
        let engine = engine();
        let vmap = engine.vmap(&pages(2)).unwrap();
        let region = vmap.attach(&AttachOptions::new().len_bytes(4 * page_size())).unwrap();
        let (read_end, write_end) = nix::unistd::pipe().unwrap();
        assert_eq!(touch::read(at(&region, 1)), Ok(mark(1)));
        for page in [2, 3] {
            assert_eq!(nix::unistd::write(&write_end, bytes(&region, page, 1)), Err(Errno::EFAULT));
        }
        // The good page goes through, the one past the end does not.
        assert_eq!(nix::unistd::write(&write_end, bytes(&region, 1, 2)), Ok(page_size()));
        assert_eq!(nix::unistd::read(&read_end, bytes_mut(&region, 3, 1)), Err(Errno::EFAULT));
        let mut through = vec![0; page_size()];
        assert_eq!(nix::unistd::read(&read_end, &mut through), Ok(page_size()));
        assert!(through == marked(1, 1));
        // After a shutdown it is the same for pages that are merely missing.
        engine.shutdown(Shutdown::Poison).unwrap();
        assert_eq!(nix::unistd::write(&write_end, bytes(&region, 0, 1)), Err(Errno::EFAULT));
        assert_eq!(nix::unistd::write(&write_end, bytes(&region, 1, 1)), Ok(page_size()));
    });
}

/// T73, T75: a shutdown ends a system call that waits for a page.
#[test]
fn a_shutdown_ends_a_system_call_that_waits_for_a_page() {
    alone("a_shutdown_ends_a_system_call_that_waits_for_a_page", || {
        let engine = engine();
        needs_kernel_faults!(engine);
        let gated = GatedSource::new();
        let region = engine.vmap(&gated.list(4)).unwrap().attach(&AttachOptions::new()).unwrap();
        let (_read_end, write_end) = nix::unistd::pipe().unwrap();
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| nix::unistd::write(&write_end, bytes(&region, 2, 1)));
            gated.wait_for_held(1);
            engine.shutdown(Shutdown::Poison).unwrap();
            assert_eq!(writer.join().unwrap(), Err(Errno::EFAULT));
            gated.open();
        });
    });
}

/// T75: signals to a thread whose system call waits for a page repeat its messages, and end neither the call nor the
/// engine.
#[test]
fn signals_do_not_end_a_system_call_that_waits_for_a_page() {
    alone("signals_do_not_end_a_system_call_that_waits_for_a_page", || {
        use std::os::unix::thread::JoinHandleExt;
        extern "C" fn nothing(_: libc::c_int) {}
        let engine = engine();
        needs_kernel_faults!(engine);
        let action = nix::sys::signal::SigAction::new(
            nix::sys::signal::SigHandler::Handler(nothing),
            nix::sys::signal::SaFlags::empty(),
            nix::sys::signal::SigSet::empty(),
        );
        // SAFETY: the handler does nothing.
        unsafe { nix::sys::signal::sigaction(nix::sys::signal::Signal::SIGUSR1, &action) }.unwrap();
        let gated = GatedSource::new();
        let region = engine.vmap(&gated.list(4)).unwrap().attach(&AttachOptions::new()).unwrap();
        let (read_end, write_end) = nix::unistd::pipe().unwrap();
        let page = at(&region, 2) as usize;
        let writer = std::thread::spawn(move || {
            // SAFETY: mapped until the thread is joined; only the kernel reads it.
            let bytes = unsafe { std::slice::from_raw_parts(page as *const u8, page_size()) };
            nix::unistd::write(&write_end, bytes)
        });
        gated.wait_for_held(1);
        let before = engine.stats().faults;
        // SAFETY: the thread has not been joined.
        unsafe { libc::pthread_kill(writer.as_pthread_t(), libc::SIGUSR1) };
        eventually("the kernel repeats the fault", || engine.stats().faults > before + 20);
        // Others are served meanwhile.
        let quick = engine.vmap(&pages(8)).unwrap().attach(&AttachOptions::new()).unwrap();
        (0..8).for_each(|page| assert_eq!(touch::read(at(&quick, page)), Ok(mark(page))));
        gated.open();
        assert_eq!(writer.join().unwrap(), Ok(page_size()));
        let mut through = vec![0; page_size()];
        File::from(read_end).read_exact(&mut through).unwrap();
        assert!(through == marked(2, 1));
        assert_eq!(gated.calls(), 1);
    });
}

/// T76: an engine that only serves faults of user mode, also as root: touches get their bytes, in forked children too;
/// system calls on missing pages answer EFAULT, mlock ENOMEM, and none of them makes a zero page.
#[test]
fn in_user_mode_only_touches_work_and_system_calls_answer_efault() {
    alone("in_user_mode_only_touches_work_and_system_calls_answer_efault", || {
        let engine = engine_builder().fault_around_pages(1).open_ways(&[OpenWay::UserModeOnly]).build().unwrap();
        assert_eq!(engine.open_way(), OpenWay::UserModeOnly);
        assert!(!engine.open_way().serves_kernel_faults());
        for list in [pages(32), sourced_pages(32)] {
            let vmap = engine.vmap(&list).unwrap();
            let region = vmap.attach(&AttachOptions::new()).unwrap();
            let (read_end, write_end) = nix::unistd::pipe().unwrap();
            let look = || {
                for page in 8..12 {
                    assert_eq!(nix::unistd::write(&write_end, bytes(&region, page, 1)), Err(Errno::EFAULT));
                    let mut byte = [0];
                    let remote = [RemoteIoVec { base: at(&region, page) as usize, len: 1 }];
                    let peeked = process_vm_readv(getpid(), &mut [IoSliceMut::new(&mut byte)], &remote);
                    assert_eq!(peeked, Err(Errno::EFAULT));
                }
                // SAFETY: locks pages, or does not.
                let locked = unsafe { libc::mlock(at(&region, 8).cast(), page_size()) };
                assert_eq!(Errno::result(locked), Err(Errno::ENOMEM));
                nix::unistd::write(&write_end, &[1]).unwrap();
                assert_eq!(nix::unistd::read(&read_end, &mut bytes_mut(&region, 9, 1)[..1]), Err(Errno::EFAULT));
                nix::unistd::read(&read_end, &mut [0]).unwrap();
            };
            look();
            reap_ok(child(|| {
                look();
                (16..24).for_each(|page| assert_eq!(touch::read(at(&region, page)), Ok(mark(page))));
            }));
            // What was refused to the kernel is there for a touch, whole; and then for the kernel too.
            (0..32).for_each(|page| assert_eq!(touch::read(at(&region, page)), Ok(mark(page))));
            assert_eq!(nix::unistd::write(&write_end, bytes(&region, 8, 1)), Ok(page_size()));
            let mut whole = vec![0; page_size()];
            nix::unistd::read(&read_end, &mut whole).unwrap();
            assert!(whole == marked(8, 1));
            // The library's own way to read and write needs no faults at all.
            let mut buf = vec![0; 3 * page_size()];
            vmap.read_at(4 * page_size() as u64, &mut buf).unwrap();
            assert!(buf == marked(4, 3));
        }
    });
}

/// T112: what this level of privilege can't do is said by the engine, and everything else works.
#[test]
fn the_way_of_opening_says_what_is_served() {
    alone("the_way_of_opening_says_what_is_served", || {
        let engine = engine();
        let region = engine.vmap(&pages(4)).unwrap().attach(&AttachOptions::new()).unwrap();
        let (_read_end, write_end) = nix::unistd::pipe().unwrap();
        let written = nix::unistd::write(&write_end, bytes(&region, 0, 1));
        let expected = if engine.open_way().serves_kernel_faults() { Ok(page_size()) } else { Err(Errno::EFAULT) };
        assert_eq!(written, expected);
        assert_eq!(touch::read(at(&region, 0)), Ok(mark(0)));
    });
}

/// T75: io_uring reads into, and writes from, missing pages.
#[test]
fn io_uring_reaches_missing_pages() {
    alone("io_uring_reaches_missing_pages", || {
        use io_uring::{IoUring, opcode, types};
        let engine = engine();
        needs_kernel_faults!(engine);
        let mut ring = match IoUring::new(4) {
            Ok(ring) => ring,
            Err(error) => skip!("io_uring is not to be had: {error}"),
        };
        let mut carry_out = |entry: io_uring::squeue::Entry| {
            // SAFETY: the buffers are pages of a region that outlives the ring's work, which is waited for.
            unsafe { ring.submission().push(&entry) }.unwrap();
            ring.submit_and_wait(1).unwrap();
            ring.completion().next().unwrap().result()
        };
        let region = engine.vmap(&sourced_pages(32)).unwrap().attach(&AttachOptions::new()).unwrap();
        let len = 4 * page_size() as u32;
        let mut file = tempfile::tempfile().unwrap();
        let fd = types::Fd(file.as_raw_fd());
        assert_eq!(carry_out(opcode::Write::new(fd, at(&region, 3), len).build()), len as i32);
        let mut written = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut written).unwrap();
        assert!(written == marked(3, 4));
        assert_eq!(carry_out(opcode::Read::new(fd, at(&region, 16), len).build()), len as i32);
        assert!(bytes(&region, 16, 4) == marked(3, 4));
        assert!(bytes(&region, 20, 1) == marked(20, 1));
    });
}

/// T75: a process-shared mutex in a missing page, which each of two processes locks a thousand times.
#[test]
fn a_mutex_in_a_missing_page_excludes_between_processes() {
    const ROUNDS: u64 = 1000;
    alone("a_mutex_in_a_missing_page_excludes_between_processes", || {
        let engine = engine();
        needs_kernel_faults!(engine);
        let mut list = kiomap::Kiobuf::new();
        list.map_zero(2).unwrap();
        let vmap = engine.vmap(&list).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let mutex = at(&region, 0).cast::<libc::pthread_mutex_t>();
        // SAFETY: the page is mapped, aligned, and used as this mutex only; its first touch is pthread's own.
        unsafe {
            let mut shared = std::mem::zeroed();
            assert_eq!(libc::pthread_mutexattr_init(&mut shared), 0);
            assert_eq!(libc::pthread_mutexattr_setpshared(&mut shared, libc::PTHREAD_PROCESS_SHARED), 0);
            assert_eq!(libc::pthread_mutex_init(mutex, &shared), 0);
        }
        let sum = at(&region, 1).cast::<u64>();
        let add = || {
            for _ in 0..ROUNDS {
                // SAFETY: both are mapped; the sum is only used under the mutex.
                unsafe {
                    assert_eq!(libc::pthread_mutex_lock(mutex), 0);
                    sum.write_volatile(sum.read_volatile() + 1);
                    assert_eq!(libc::pthread_mutex_unlock(mutex), 0);
                }
            }
        };
        let other = child(add);
        add();
        reap_ok(other);
        assert_eq!(region.atomic_u64(page_size()).unwrap().load(std::sync::atomic::Ordering::Relaxed), 2 * ROUNDS);
    });
}
