//! Every answer of the kernel that the engine acts on, met on the running kernel.

use std::fs::File;
use std::io::pipe;
use std::os::unix::fs::FileExt;

use memmap2::MmapOptions;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use super::*;
use crate::sys::testing::*;
use crate::sys::{FaultKind, Features, OpenStep, Opener, Stop, open};

fn full(pages: usize) -> Install {
    Install { bytes: pages * page_size(), stop: None }
}

fn stopped(stop: Stop) -> Install {
    Install { bytes: 0, stop: Some(stop) }
}

/// Copies pages of one value.
fn copy(userfault: &Userfault, dst: usize, pages: usize, value: u8) -> Install {
    let source = vec![value; pages * page_size()];
    // SAFETY: the tests reach registered memory through raw addresses only, and nobody else knows the source.
    unsafe { userfault.copy(dst, source.as_ptr(), source.len()) }
}

/// T69, T94: a fault says where, how and by which thread, and a copy answers it.
#[test]
fn a_fault_is_reported_and_a_copy_answers_it() {
    let memory = anonymous(4);
    let userfault = userfault(Features::THREAD_ID);
    let ioctls = userfault.register_missing(page(&memory, 0), memory.len()).expect("register");
    assert!(ioctls.contains(Ioctls::COPY | Ioctls::WAKE | Ioctls::ZEROPAGE), "{ioctls}");

    let addr = page(&memory, 2) + 77;
    let access = aside(move || {
        store(addr, 9);
        (nix::unistd::gettid().as_raw(), load(addr + 1))
    });
    let Message::Fault { addr: at, write, kind, tid } = next(&userfault) else { panic!("a fault") };
    assert_eq!((at, write, kind), (page(&memory, 2), true, FaultKind::Missing));
    assert_eq!(copy(&userfault, at, 1, 5), full(1));
    assert_eq!(finish(&access), (tid, 5));
    assert_eq!(userfault.read(&mut MsgBuffer::new(4), |_| ()), Ok(0));
}

/// T64: EEXIST proves that the page is there, not that its waiter woke; WAKE does that.
#[test]
fn a_waiter_of_a_present_page_sleeps_until_woken() {
    let (file, memory) = memfd(1);
    let userfault = userfault(Features::empty());
    userfault.register_missing(page(&memory, 0), memory.len()).expect("register");
    let addr = page(&memory, 0);
    let access = aside(move || load(addr));
    assert!(matches!(next(&userfault), Message::Fault { write: false, .. }));

    // The page arrives by another way, as from another process.
    file.write_all_at(&vec![3; page_size()], 0).expect("pwrite");
    assert_eq!(copy(&userfault, addr, 1, 5), stopped(Stop::Present));
    assert_eq!(waiters(&userfault), 1);
    userfault.wake(addr, page_size()).expect("wake");
    assert_eq!(finish(&access), 3);
    assert_eq!(waiters(&userfault), 0);
}

/// T69: a copy that runs into a present page says how far it came, and the retry says why.
#[test]
fn a_copy_over_a_present_page_stops_before_it() {
    for shared in [false, true] {
        let memory = if shared { memfd(4).1 } else { anonymous(4) };
        let userfault = userfault(Features::empty());
        userfault.register_missing(page(&memory, 0), memory.len()).expect("register");
        assert_eq!(copy(&userfault, page(&memory, 2), 1, 2), full(1));

        let partial = Install { bytes: 2 * page_size(), stop: Some(Stop::Changing) };
        assert_eq!(copy(&userfault, page(&memory, 0), 4, 1), partial);
        assert_eq!(copy(&userfault, page(&memory, 2), 2, 1), stopped(Stop::Present));
        assert_eq!(copy(&userfault, page(&memory, 3), 1, 1), full(1));
        assert_eq!([0, 1, 2, 3].map(|i| load(page(&memory, i))), [1, 1, 2, 1]);
    }
}

/// T91: zero pages are zero, and a second one finds the first.
#[test]
fn zeropage_twice_finds_the_page_present() {
    let memory = memfd(3).1;
    let userfault = userfault(Features::empty());
    userfault.register_missing(page(&memory, 0), memory.len()).expect("register");
    assert_eq!(userfault.zeropage(page(&memory, 1), page_size()), full(1));
    assert_eq!(userfault.zeropage(page(&memory, 1), page_size()), stopped(Stop::Present));
    let partial = Install { bytes: page_size(), stop: Some(Stop::Changing) };
    assert_eq!(userfault.zeropage(page(&memory, 0), memory.len()), partial);
    assert_eq!((load(page(&memory, 0)), load(page(&memory, 1))), (0, 0));
}

/// T92: poison needs no feature asked for, yields to what is present, is healed by a copy and not by a zero page.
#[test]
fn poison_spares_present_pages_and_a_copy_heals_it() {
    if !open_features().contains(Features::POISON) {
        eprintln!("skipped, because the kernel has no UFFDIO_POISON");
        return;
    }
    for shared in [false, true] {
        let memory = if shared { memfd(4).1 } else { anonymous(4) };
        let userfault = userfault(Features::empty());
        let ioctls = userfault.register_missing(page(&memory, 0), memory.len()).expect("register");
        assert!(ioctls.contains(Ioctls::POISON), "{ioctls}");

        assert_eq!(copy(&userfault, page(&memory, 0), 1, 7), full(1));
        assert_eq!(userfault.poison(page(&memory, 0), page_size()), stopped(Stop::Present));
        assert_eq!(load(page(&memory, 0)), 7);
        assert_eq!(userfault.poison(page(&memory, 1), 3 * page_size()), full(3));
        assert_eq!(userfault.poison(page(&memory, 1), page_size()), stopped(Stop::Present));
        if !shared {
            assert_eq!(userfault.zeropage(page(&memory, 1), page_size()), stopped(Stop::Present));
        }
        assert_eq!(copy(&userfault, page(&memory, 1), 1, 8), full(1));
        assert_eq!(load(page(&memory, 1)), 8);
    }
}

/// All features of the running kernel.
fn open_features() -> Features {
    crate::sys::probe().expect("some way of opening a userfaultfd works").features
}

/// T89: CONTINUE maps what the file holds, and says when it holds nothing or is mapped already.
#[test]
fn continue_maps_cached_pages_only() {
    let (file, memory) = memfd(3);
    let userfault = userfault(Features::empty());
    userfault.register_missing(page(&memory, 0), memory.len()).expect("register");
    file.write_all_at(&vec![6; 2 * page_size()], 0).expect("pwrite");

    assert_eq!(userfault.r#continue(page(&memory, 2), page_size()), stopped(Stop::BadSource));
    let partial = Install { bytes: 2 * page_size(), stop: Some(Stop::Changing) };
    assert_eq!(userfault.r#continue(page(&memory, 0), memory.len()), partial);
    assert_eq!(userfault.r#continue(page(&memory, 0), page_size()), stopped(Stop::Present));
    assert_eq!(load(page(&memory, 1)), 6);
}

/// T70: each way of not being able to install has its own name.
#[test]
fn impossible_installs_say_why() {
    let (file, memory) = memfd(2);
    let userfault = userfault(Features::empty());
    userfault.register_missing(page(&memory, 0), memory.len()).expect("register");

    let unregistered = anonymous(1);
    assert_eq!(copy(&userfault, page(&unregistered, 0), 1, 1), stopped(Stop::Unmapped));
    // Unlike an address that was unmapped just now, no other test can get this one.
    let nowhere = PROBE_ADDR;
    for install in [
        copy(&userfault, nowhere, 1, 1),
        userfault.zeropage(nowhere, page_size()),
        userfault.poison(nowhere, page_size()),
        userfault.r#continue(nowhere, page_size()),
    ] {
        assert_eq!(install, stopped(Stop::Unmapped));
    }

    // SAFETY: no reference covers the destination; the kernel refuses the source.
    let unreadable = unsafe { userfault.copy(page(&memory, 0), std::ptr::without_provenance(nowhere), page_size()) };
    assert_eq!(unreadable, stopped(Stop::BadSource));
    file.set_len(page_size() as u64).expect("ftruncate");
    assert_eq!(copy(&userfault, page(&memory, 1), 1, 1), stopped(Stop::BadSource), "past the end of the file");

    let invalid = stopped(Stop::Other(Errno::EINVAL));
    assert_eq!(userfault.zeropage(page(&memory, 0) + 1, page_size()), invalid);
    assert_eq!(userfault.poison(page(&memory, 0), 0), invalid);
    assert_eq!(userfault.r#continue(page(&memory, 0), page_size() / 2), invalid);
    assert_eq!(userfault.wake(page(&memory, 0), 0), Err(Errno::EINVAL));
}

/// T83: a range has one userfaultfd; the second is refused and the first is not disturbed.
#[test]
fn a_range_belongs_to_one_userfaultfd() {
    let memory = anonymous(2);
    let (first, second) = (userfault(Features::empty()), userfault(Features::empty()));
    first.register_missing(page(&memory, 0), memory.len()).expect("register");
    assert_eq!(second.register_missing(page(&memory, 1), page_size()), Err(Errno::EBUSY));
    assert_eq!(copy(&second, page(&memory, 0), 1, 1), full(1), "the kernel checks the range, not the descriptor");
    assert_eq!(first.unregister(page(&memory, 0), memory.len()), Ok(()));
    assert!(second.register_missing(page(&memory, 1), page_size()).is_ok());
}

/// T84: what can't be registered, and why.
#[test]
fn unsuitable_ranges_are_refused() {
    let userfault = userfault(Features::empty());
    let memory = anonymous(3);
    let addr = page(&memory, 0);
    assert_eq!(userfault.register_missing(addr + 1, page_size()), Err(Errno::EINVAL));
    assert_eq!(userfault.register_missing(addr, page_size() + 1), Err(Errno::EINVAL));
    assert_eq!(userfault.register_missing(addr, 0), Err(Errno::EINVAL));
    assert_eq!(userfault.register_missing(PROBE_ADDR, page_size()), Err(Errno::EINVAL));
    assert_eq!(userfault.unregister(addr, 0), Err(Errno::EINVAL));

    let (file, _) = memfd(1);
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let read_only = File::open(path).expect("reopen");
    let memory = MmapOptions::new().map_raw_read_only(&read_only).expect("mmap");
    assert_eq!(userfault.register_missing(memory.as_ptr() as usize, page_size()), Err(Errno::EPERM));

    let program = File::open("/proc/self/exe").expect("the program's file");
    let memory = MmapOptions::new().len(page_size()).map_raw_read_only(&program).expect("mmap");
    assert_eq!(userfault.register_missing(memory.as_ptr() as usize, page_size()), Err(Errno::EINVAL));
}

/// T85: a batch brings every message; the descriptor says it is empty by a count of zero.
#[test]
fn a_batch_brings_every_message() {
    let memory = anonymous(8);
    let userfault = userfault(Features::empty());
    userfault.register_missing(page(&memory, 0), memory.len()).expect("register");
    let accesses: Vec<_> = (0..8)
        .map(|i| {
            let addr = page(&memory, i);
            aside(move || load(addr))
        })
        .collect();
    until("eight waiters", || waiters(&userfault) == 8);
    let (mut seen, mut buf) = (Vec::new(), MsgBuffer::new(64));
    let count = userfault.read(&mut buf, |message| match message {
        Message::Fault { addr, .. } => seen.push(addr),
        other => panic!("unexpected: {other:?}"),
    });
    assert_eq!(count, Ok(8));
    seen.sort_unstable();
    assert_eq!(seen, (0..8).map(|i| page(&memory, i)).collect::<Vec<_>>());
    assert_eq!(userfault.read(&mut buf, |_| ()), Ok(0));
    assert_eq!(copy(&userfault, page(&memory, 0), 8, 4), full(8));
    assert!(accesses.iter().all(|access| finish(access) == 4));
}

/// T85: a blocking descriptor can't be polled; it is made non-blocking before anybody reads it.
#[test]
fn a_blocking_descriptor_is_made_non_blocking() {
    let userfault = Userfault::from(open::userfaultfd(1).expect("userfaultfd"));
    assert_eq!(userfault.read(&mut MsgBuffer::new(1), |_| ()), Err(Errno::EINVAL), "before the handshake");
    open::handshake(&userfault, Features::empty()).expect("handshake");
    let events = |userfault: &Userfault| {
        let mut fds = [PollFd::new(userfault.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).expect("poll");
        fds[0].revents().expect("known events")
    };
    assert_eq!(events(&userfault), PollFlags::POLLERR);
    userfault.set_nonblocking_cloexec().expect("fcntl");
    assert_eq!(events(&userfault), PollFlags::empty());
    assert_eq!(userfault.read(&mut MsgBuffer::new(1), |_| ()), Ok(0));
    let flags = fcntl(&userfault, FcntlArg::F_GETFD).expect("fcntl");
    assert!(FdFlag::from_bits_retain(flags).contains(FdFlag::FD_CLOEXEC));
}

/// Makes a copy of a descriptor, for a holder who is not trusted: both share the flags of the file.
fn hand_over(userfault: &Userfault) -> Userfault {
    Userfault::foreign(userfault.as_fd().try_clone_to_owned().expect("dup")).expect("a userfaultfd after its handshake")
}

/// A read of a foreign userfaultfd returns whatever its maker does to its flags, brings what there is, and makes it fit to
/// be polled again.
#[test]
fn a_foreign_userfaultfd_never_makes_its_reader_wait() {
    let memory = anonymous(1);
    let userfault = userfault(Features::THREAD_ID);
    userfault.register_missing(page(&memory, 0), memory.len()).expect("register");
    let foreign = hand_over(&userfault);
    let nowait = foreign.reading == Reading::NoWait;
    eprintln!("userfaultfds know RWF_NOWAIT here: {nowait}");

    let block = || fcntl(&userfault, FcntlArg::F_SETFL(OFlag::O_RDWR)).expect("F_SETFL");
    let is_blocking =
        || !OFlag::from_bits_retain(fcntl(&userfault, FcntlArg::F_GETFL).unwrap()).contains(OFlag::O_NONBLOCK);
    block();
    assert!(is_blocking());
    let empty = aside(move || (foreign.read(&mut MsgBuffer::new(4), |_| panic!("nobody has touched it")), foreign));
    let (empty, foreign) = finish(&empty);
    assert_eq!(empty, Ok(0));
    assert!(!is_blocking());

    let addr = page(&memory, 0);
    let access = aside(move || (nix::unistd::gettid().as_raw(), load(addr)));
    wait_readable(&userfault);
    block();
    let mut message = None;
    assert_eq!(foreign.read(&mut MsgBuffer::new(4), |read| message = Some(read)), Ok(1));
    let Some(Message::Fault { addr: at, write: false, kind: FaultKind::Missing, tid }) = message else {
        panic!("{message:?}")
    };
    assert_eq!((at, copy(&userfault, at, 1, 5)), (addr, full(1)));
    assert_eq!(finish(&access), (tid, 5));
    assert_eq!(is_blocking(), nowait, "it is looked at before each read, or after two in a row that find nothing");
    let twice = aside(move || [(); 2].map(|()| foreign.read(&mut MsgBuffer::new(4), |_| panic!("nobody touches"))));
    assert_eq!(finish(&twice), [Ok(0); 2]);
    assert!(!is_blocking());
}

/// Where a read can't say that it does not wait, the flag is set again before each.
#[test]
fn without_nowait_the_flag_is_watched() {
    let userfault = userfault(Features::empty());
    let mut foreign = hand_over(&userfault);
    foreign.reading = Reading::Watched;
    fcntl(&userfault, FcntlArg::F_SETFL(OFlag::O_RDWR)).expect("F_SETFL");
    let empty = aside(move || foreign.read(&mut MsgBuffer::new(1), |_| ()));
    assert_eq!(finish(&empty), Ok(0));
}

/// What is no userfaultfd, or none that can be used yet, is not taken for one.
#[test]
fn what_is_no_userfaultfd_is_refused() {
    let (reader, writer) = pipe().expect("pipe");
    let (file, _memory) = memfd(1);
    let event = nix::sys::eventfd::EventFd::new().expect("eventfd");
    let pidfd = crate::process::open_pidfd(nix::unistd::getpid().as_raw()).expect("pidfd");
    for other in [OwnedFd::from(reader), writer.into(), file.into(), event.into(), pidfd] {
        assert_eq!(Userfault::foreign(other).expect_err("no userfaultfd"), Errno::EBADF);
    }
    let fresh = open::userfaultfd(libc::O_CLOEXEC | 1).expect("userfaultfd");
    assert_eq!(Userfault::foreign(fresh).expect_err("no handshake"), Errno::EPROTO);
}

/// The features of a handshake can be read back, no more and no fewer.
#[test]
fn the_features_of_a_handshake_can_be_read_back() {
    for features in [Features::empty(), Features::THREAD_ID | Features::EVENT_UNMAP] {
        assert_eq!(hand_over(&userfault(features)).features(), Ok(features));
    }
}

/// Messages are decoded as the crate decodes them.
#[test]
fn messages_are_decoded_as_by_the_crate() {
    let features = Features::THREAD_ID | Features::EVENT_REMAP | Features::EVENT_REMOVE | Features::EVENT_UNMAP;
    let read_by_crate = |userfault: &Userfault| {
        wait_readable(userfault);
        // SAFETY: another descriptor of the same userfaultfd, which the crate closes.
        let uffd = unsafe { Uffd::from_raw_fd(userfault.as_fd().try_clone_to_owned().expect("dup").into_raw_fd()) };
        uffd.read_event().expect("read").expect("an event")
    };
    // The same happens twice: once the crate hears of it, once we.
    for is_ours in [false, true] {
        let memory = anonymous(4);
        let userfault = userfault(features);
        userfault.register_missing(page(&memory, 0), memory.len()).expect("register");
        let (addr, removed) = (page(&memory, 1), page(&memory, 2));
        let access = aside(move || {
            store(addr + 8, 1);
            nix::unistd::gettid().as_raw()
        });
        let tid = if is_ours {
            let Message::Fault { addr: got, write: true, kind: FaultKind::Missing, tid } = next(&userfault) else {
                panic!()
            };
            assert_eq!(got, addr);
            tid
        } else {
            let event = read_by_crate(&userfault);
            let userfaultfd::Event::Pagefault { kind, rw, addr: got, thread_id } = event else { panic!("{event:?}") };
            assert_eq!((got as usize, rw), (addr, userfaultfd::ReadWrite::Write));
            assert_eq!(kind, userfaultfd::FaultKind::Missing);
            thread_id.as_raw()
        };
        assert_eq!(copy(&userfault, addr, 1, 5), full(1));
        assert_eq!(finish(&access), tid);

        // SAFETY: the page is this test's own, and nothing refers to it.
        let advised = aside(move || unsafe {
            let removed = std::ptr::with_exposed_provenance_mut(removed);
            libc::madvise(removed, page_size(), libc::MADV_DONTNEED)
        });
        let range = if is_ours {
            let Message::Remove { start, end } = next(&userfault) else { panic!() };
            start..end
        } else {
            let event = read_by_crate(&userfault);
            let userfaultfd::Event::Remove { start, end } = event else { panic!("{event:?}") };
            start as usize..end as usize
        };
        assert_eq!(range, removed..removed + page_size());
        assert_eq!(finish(&advised), 0);
    }
}

/// T68: while an event is unread, installing answers EAGAIN without progress, and the address space counts as changing.
#[test]
fn an_unread_event_defers_everything_but_waking() {
    let memory = anonymous(4);
    let userfault = userfault(Features::EVENT_REMOVE | Features::EVENT_UNMAP | Features::EVENT_REMAP);
    userfault.register_missing(page(&memory, 0), memory.len()).expect("register");
    let (start, len) = (page(&memory, 1), 2 * page_size());

    let advise = aside(move || {
        // SAFETY: the pages belong to the mapping that this test keeps, and nobody refers to their bytes.
        unsafe { libc::madvise(start as *mut c_void, len, libc::MADV_DONTNEED) }
    });
    wait_readable(&userfault);
    assert_eq!(userfault.liveness(), Liveness::Changing);
    let changing = stopped(Stop::Changing);
    assert_eq!(copy(&userfault, page(&memory, 0), 1, 1), changing);
    assert_eq!(userfault.zeropage(page(&memory, 0), page_size()), changing);
    assert_eq!(userfault.r#continue(page(&memory, 0), page_size()), changing);
    assert_eq!(userfault.wake(page(&memory, 0), page_size()), Ok(()));

    let message = next(&userfault);
    assert!(matches!(message, Message::Remove { start: s, end } if s == start && end == start + len), "{message:?}");
    assert_eq!(finish(&advise), 0);
    assert_eq!(userfault.liveness(), Liveness::Alive);
    assert_eq!(copy(&userfault, page(&memory, 0), 1, 1), full(1));
    // Dropping the memory while it is registered would wait for its event to be read.
    userfault.unregister(page(&memory, 0), memory.len()).expect("unregister");
}

/// T36, T39: a move is reported as a remap and then the unmapping of its old place; an unmapping by its range.
#[test]
fn moves_and_unmappings_are_reported() {
    let size = page_size();
    let memory = anonymous(4);
    let userfault = userfault(Features::EVENT_UNMAP | Features::EVENT_REMAP);
    userfault.register_missing(page(&memory, 0), memory.len()).expect("register");
    // Not the last page: that one could grow in place, which is not reported.
    let inner = page(&memory, 2);

    let moved = aside(move || {
        // SAFETY: one page of the mapping is moved away; nothing refers to it, and the mapping is not dropped.
        let to = unsafe { libc::mremap(inner as *mut c_void, size, 2 * size, libc::MREMAP_MAYMOVE) };
        to as usize
    });
    let Message::Remap { from, to, len } = next(&userfault) else { panic!("a remap") };
    assert_eq!((from, len), (inner, size));
    let message = next(&userfault);
    assert!(matches!(message, Message::Unmap { start, end } if start == inner && end == inner + size), "{message:?}");
    assert_eq!(finish(&moved), to);
    assert_eq!(copy(&userfault, to + size, 1, 1), full(1), "the grown tail is registered too");

    let unmap = aside(move || {
        // SAFETY: the moved pages belong to this test alone.
        unsafe { libc::munmap(to as *mut c_void, 2 * size) }
    });
    let message = next(&userfault);
    assert!(matches!(message, Message::Unmap { start, end } if start == to && end == to + 2 * size), "{message:?}");
    assert_eq!(finish(&unmap), 0);
    // Another test may have mapped something in the gap by now: unmapping the whole would take it along.
    std::mem::forget(memory);
}

/// A forked child that waits for its end, and is killed and reaped when dropped.
struct Child(Pid);

impl Child {
    /// Forks; the child runs `work`, which may only make async-signal-safe calls, and then sleeps.
    fn fork(work: impl FnOnce()) -> Child {
        // SAFETY: the child makes async-signal-safe calls only, until it is killed.
        match unsafe { libc::fork() } {
            0 => {
                work();
                loop {
                    // SAFETY: pause takes nothing and is async-signal-safe.
                    unsafe { libc::pause() };
                }
            }
            pid => Child(Pid::from_raw(Errno::result(pid).expect("fork"))),
        }
    }

    /// Kills the child. It is a zombie then, not reaped.
    fn kill_unreaped(&self) {
        kill(self.0, Signal::SIGKILL).expect("kill");
        let flags = nix::sys::wait::WaitPidFlag::WEXITED | nix::sys::wait::WaitPidFlag::WNOWAIT;
        nix::sys::wait::waitid(nix::sys::wait::Id::Pid(self.0), flags).expect("waitid");
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGKILL);
        let _ = waitpid(self.0, None);
    }
}

/// T71: the userfaultfd of a killed child says that it is gone, as a zombie already.
#[test]
fn the_userfaultfd_of_a_dead_child_is_gone() {
    if !alone(module_path!(), "the_userfaultfd_of_a_dead_child_is_gone") {
        return;
    }
    assert_eq!(userfault(Features::empty()).liveness(), Liveness::Alive);

    let memory = anonymous(1);
    let addr = page(&memory, 0);
    let (reader, writer) = pipe().expect("pipe");
    let child = Child::fork(|| {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | 1;
        // SAFETY: system calls without memory of ours, but for the write of four bytes that are there.
        unsafe {
            let fd = libc::syscall(libc::SYS_userfaultfd, flags) as libc::c_int;
            libc::write(writer.as_raw_fd(), (&raw const fd).cast(), 4);
        }
    });
    let number = i32::from_ne_bytes(receive(reader));
    assert!(number >= 0, "the child opened a userfaultfd");
    let userfault = Userfault::from(fetch(child.0, number));
    open::handshake(&userfault, Features::empty()).expect("handshake");
    userfault.register_missing(addr, page_size()).expect("register in the child");

    assert_eq!(userfault.liveness(), Liveness::Alive);
    child.kill_unreaped();
    assert_eq!(userfault.liveness(), Liveness::Gone);
    let gone = stopped(Stop::Gone);
    assert_eq!(copy(&userfault, addr, 1, 1), gone);
    assert_eq!(userfault.zeropage(addr, page_size()), gone);
    assert_eq!(userfault.r#continue(addr, page_size()), gone);
    if open_features().contains(Features::POISON) {
        assert_eq!(userfault.poison(addr, page_size()), gone);
    }
    assert_eq!(userfault.wake(addr, page_size()), Ok(()));
    assert_eq!(userfault.register_missing(addr, page_size()), Err(Errno::ENOMEM));
    assert_eq!(userfault.unregister(addr, page_size()), Err(Errno::ENOMEM));
    drop(child);
    assert_eq!(userfault.liveness(), Liveness::Gone);
}

/// Copies a descriptor of a child into this process.
fn fetch(pid: Pid, number: RawFd) -> OwnedFd {
    // SAFETY: the calls take numbers; each returns a descriptor that is new, or an errno.
    unsafe {
        let pidfd = Errno::result(libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0)).expect("pidfd_open");
        let pidfd = OwnedFd::from_raw_fd(pidfd as RawFd);
        let fd = libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), number, 0);
        OwnedFd::from_raw_fd(Errno::result(fd).expect("pidfd_getfd") as RawFd)
    }
}

/// T49: a fork is reported with a userfaultfd for the child, which serves the child and not the parent.
#[test]
fn a_fork_brings_a_userfaultfd_for_the_child() {
    if !alone(module_path!(), "a_fork_brings_a_userfaultfd_for_the_child") {
        return;
    }
    let memory = anonymous(1);
    let addr = page(&memory, 0);
    let userfault = match Opener::new(&super::super::DEFAULT_WAYS).open(Features::EVENT_FORK) {
        Ok((userfault, _)) => userfault,
        Err(failure) => {
            let refused = |a: &crate::sys::OpenAttempt| (a.step, a.errno) == (OpenStep::Handshake, Errno::EPERM);
            assert!(failure.attempts.iter().any(refused), "{failure}");
            eprintln!("skipped, because EVENT_FORK needs CAP_SYS_PTRACE");
            return;
        }
    };
    userfault.register_missing(addr, page_size()).expect("register");
    let (reader, writer) = pipe().expect("pipe");

    // This thread must not allocate until the fork is over: fork holds the allocator's locks while it waits for us.
    let mut buf = MsgBuffer::new(4);
    let mut forked = None;
    let fork = aside(move || {
        Child::fork(|| {
            let byte = load(addr);
            // SAFETY: the byte is there.
            unsafe { libc::write(writer.as_raw_fd(), (&raw const byte).cast(), 1) };
        })
    });
    while forked.is_none() {
        wait_readable(&userfault);
        userfault
            .read(&mut buf, |message| {
                if let Message::Fork(child) = message {
                    forked = Some(child);
                }
            })
            .expect("read");
    }
    let child = finish(&fork);
    let forked = forked.expect("a descriptor for the child");
    forked.set_nonblocking_cloexec().expect("fcntl");
    assert_eq!(forked.liveness(), Liveness::Alive);

    assert!(matches!(next(&forked), Message::Fault { addr: at, .. } if at == addr));
    assert_eq!(copy(&forked, addr, 1, 0x5a), full(1));
    assert_eq!(receive(reader), [0x5a]);
    assert_eq!(copy(&userfault, addr, 1, 0x11), full(1), "the parent's page is its own");

    child.kill_unreaped();
    assert_eq!(forked.liveness(), Liveness::Gone);
    assert_eq!(userfault.liveness(), Liveness::Alive);
}
