//! A process that made a userfaultfd, registered memory of its own, and handed the descriptor over: it does what it is told,
//! one thing at a time.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use kiomap::page_size;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
};
use nix::unistd::{ForkResult, Pid, fork};
use userfaultfd::{FeatureFlags, Uffd};

use super::raw::FAR;
use super::touch;

/// Where its memory begins.
pub(crate) const MEMORY: usize = FAR;

/// What a touch came to: the byte, or a signal.
pub(crate) type Touched = Result<u8, i32>;

/// What the process is told to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
enum Deed {
    Read,
    Write,
    GiveUp,
    Unmap,
    Remap,
    Fork,
    Close,
    Exit,
    ReadAll,
    Play,
}

const DEEDS: [Deed; 10] = [
    Deed::Read,
    Deed::Write,
    Deed::GiveUp,
    Deed::Unmap,
    Deed::Remap,
    Deed::Fork,
    Deed::Close,
    Deed::Exit,
    Deed::ReadAll,
    Deed::Play,
];

type Words = [u64; 4];

/// The test's end.
pub(crate) struct Peer {
    pub(crate) pid: Pid,
    socket: OwnedFd,
}

fn send(socket: &OwnedFd, words: &Words, fd: Option<&OwnedFd>) {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let numbers = fd.map(|fd| [fd.as_raw_fd()]);
    let rights = numbers.as_ref().map(|numbers| [ControlMessage::ScmRights(numbers)]);
    let control: &[ControlMessage<'_>] = rights.as_ref().map_or(&[], |rights| rights);
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&bytes)], control, MsgFlags::MSG_NOSIGNAL, None).unwrap();
}

/// `None` when the other side is gone.
fn receive(socket: &OwnedFd) -> Option<(Words, Option<OwnedFd>)> {
    let mut bytes = [0; 32];
    let mut control = nix::cmsg_space!([i32; 1]);
    let mut slices = [IoSliceMut::new(&mut bytes)];
    let message =
        recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut control), MsgFlags::MSG_CMSG_CLOEXEC).ok()?;
    let mut fd = None;
    for part in message.cmsgs().ok()? {
        if let ControlMessageOwned::ScmRights(numbers) = part {
            // SAFETY: the kernel has just put it into this process's table.
            fd = numbers.first().map(|&number| unsafe { OwnedFd::from_raw_fd(number) });
        }
    }
    if message.bytes != 32 {
        return None;
    }
    let mut words = [0; 4];
    for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_ne_bytes(chunk.try_into().unwrap());
    }
    Some((words, fd))
}

fn pair() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
}

impl Peer {
    /// Starts a process with `nr_pages` pages of private memory at [`MEMORY`], of 2 MiB each if `huge`; answers with its
    /// userfaultfd. `None` where the kernel does not let it have one with these features, or has no such memory.
    ///
    /// To be called before there are other threads.
    pub(crate) fn start(features: FeatureFlags, nr_pages: usize, huge: bool) -> Option<(Peer, OwnedFd)> {
        Peer::start_to(features, nr_pages, huge, || {})
    }

    /// As [`Peer::start`], with something to do when it is told to ([`Peer::play`]).
    pub(crate) fn start_to(
        features: FeatureFlags,
        nr_pages: usize,
        huge: bool,
        play: impl FnMut(),
    ) -> Option<(Peer, OwnedFd)> {
        let (ours, theirs) = pair();
        // SAFETY: there is one thread, and the child never returns.
        match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => {
                drop(theirs);
                let peer = Peer { pid: child, socket: ours };
                let ([panicked, ..], uffd) = receive(&peer.socket).expect("the process says whether it has begun");
                assert_eq!(panicked, 0, "the process could not begin");
                Some((peer, uffd?))
            }
            ForkResult::Child => {
                drop(ours);
                let started = std::panic::catch_unwind(|| start(features, nr_pages, huge));
                let Ok(Some(uffd)) = started else {
                    let panicked = u64::from(started.is_err());
                    send(&theirs, &[panicked, 0, 0, 0], None);
                    // SAFETY: ends the process at once.
                    unsafe { libc::_exit(1) }
                };
                send(&theirs, &[0; 4], Some(&uffd));
                obey(theirs, uffd, play)
            }
        }
    }

    fn ask(&self, deed: Deed, a: u64, b: u64, c: u64) -> (Words, Option<OwnedFd>) {
        send(&self.socket, &[deed as u64, a, b, c], None);
        receive(&self.socket).expect("the process is gone")
    }

    /// Reads a byte of a page.
    pub(crate) fn read(&self, page: u64) -> Touched {
        touched(self.ask(Deed::Read, page, 0, 0).0)
    }

    /// Tells the process to read a byte of a page; [`Peer::outcome`] is what it came to.
    pub(crate) fn begin_read(&self, page: u64) {
        send(&self.socket, &[Deed::Read as u64, page, 0, 0], None);
    }

    pub(crate) fn outcome(&self) -> Option<Touched> {
        receive(&self.socket).map(|(words, _)| touched(words))
    }

    /// Writes a byte to a page.
    pub(crate) fn write(&self, page: u64, byte: u8) -> Result<(), i32> {
        touched(self.ask(Deed::Write, page, byte.into(), 0).0).map(drop)
    }

    /// Reads all bytes of pages; answers with the first page that has two different ones or not this, which `expected` says.
    pub(crate) fn read_all(&self, pages: std::ops::Range<u64>, expected: impl Fn(u64) -> u8) {
        for page in pages {
            let (words, _) = self.ask(Deed::ReadAll, page, 0, 0);
            assert_eq!(words[0], 0, "signal {} at page {page}", words[0]);
            assert_eq!((words[1], words[2]), (expected(page).into(), 1), "page {page}");
        }
    }

    /// Has pages given up (`MADV_DONTNEED`).
    pub(crate) fn give_up(&self, page: u64, nr_pages: u64) {
        self.ask(Deed::GiveUp, page, nr_pages, 0);
    }

    pub(crate) fn unmap(&self, page: u64, nr_pages: u64) {
        self.ask(Deed::Unmap, page, nr_pages, 0);
    }

    /// Moves pages to where page `to` would be.
    pub(crate) fn remap(&self, page: u64, nr_pages: u64, to: u64) {
        self.ask(Deed::Remap, page, nr_pages, to);
    }

    /// Has the process fork; answers with the child.
    pub(crate) fn fork(&self) -> Peer {
        let (words, socket) = self.ask(Deed::Fork, 0, 0, 0);
        Peer { pid: Pid::from_raw(words[1] as i32), socket: socket.unwrap() }
    }

    /// Has it close its own descriptor of its userfaultfd.
    pub(crate) fn close(&self) {
        self.ask(Deed::Close, 0, 0, 0);
    }

    /// Has it begin what it was started for, from which it does not come back.
    pub(crate) fn begin_play(&self) {
        send(&self.socket, &[Deed::Play as u64, 0, 0, 0], None);
    }

    /// Has it do what it was started for.
    pub(crate) fn play(&self) {
        assert_eq!(self.ask(Deed::Play, 0, 0, 0).0[0], 0, "the process panicked");
    }

    pub(crate) fn exit(&self) {
        send(&self.socket, &[Deed::Exit as u64, 0, 0, 0], None);
    }
}

fn touched(words: Words) -> Touched {
    if words[0] == 0 { Ok(words[1] as u8) } else { Err(words[0] as i32) }
}

fn at(page: u64) -> *mut u8 {
    (MEMORY as u64 + page * page_size() as u64) as *mut u8
}

fn start(features: FeatureFlags, nr_pages: usize, huge: bool) -> Option<OwnedFd> {
    let len = nr_pages * page_size();
    let flags = libc::MAP_PRIVATE
        | libc::MAP_ANONYMOUS
        | libc::MAP_FIXED_NOREPLACE
        | if huge { libc::MAP_HUGETLB | libc::MAP_HUGE_2MB } else { 0 };
    // SAFETY: a new mapping that replaces nothing.
    let memory = unsafe { libc::mmap(MEMORY as *mut _, len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    if huge && memory == libc::MAP_FAILED {
        return None;
    }
    assert_eq!(memory as usize, MEMORY, "{}", std::io::Error::last_os_error());
    let uffd = open(features)?;
    uffd.register(memory, len).unwrap();
    let number = uffd.as_raw_fd();
    std::mem::forget(uffd);
    // SAFETY: given up above.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}

/// A userfaultfd with just these features; `None` where they need a privilege.
pub(crate) fn open(features: FeatureFlags) -> Option<Uffd> {
    const USER_MODE_ONLY: i32 = 1;
    const UFFDIO_API: libc::Ioctl = 0xc018_aa3f_u32 as libc::Ioctl;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: userfaultfd(2) makes a new descriptor.
    let open = |flags: i32| Errno::result(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) } as i32);
    let number = open(flags).or_else(|_| open(flags | USER_MODE_ONLY)).unwrap();
    // SAFETY: it is new.
    let uffd = unsafe { Uffd::from_raw_fd(number) };
    let mut api = [0xaa_u64, features.bits(), 0];
    // SAFETY: three words, as `struct uffdio_api`.
    match Errno::result(unsafe { libc::ioctl(number, UFFDIO_API, api.as_mut_ptr()) }) {
        Ok(_) => Some(uffd),
        Err(Errno::EPERM) => None,
        Err(errno) => panic!("UFFDIO_API: {errno}"),
    }
}

fn obey(socket: OwnedFd, uffd: OwnedFd, mut play: impl FnMut()) -> ! {
    let mut uffd = Some(uffd);
    let mut socket = socket;
    loop {
        let Some(([deed, a, b, c], _)) = receive(&socket) else {
            // SAFETY: ends the process at once.
            unsafe { libc::_exit(0) }
        };
        let answer = |outcome: Result<u8, touch::Refused>| match outcome {
            Ok(byte) => [0, byte.into(), 0, 0],
            Err(refused) => [refused.signal as u64, 0, 0, 0],
        };
        let bytes = |pages: u64| pages as usize * page_size();
        let reply = match DEEDS[deed as usize] {
            Deed::Read => answer(touch::read(at(a).wrapping_add(11))),
            Deed::Write => answer(touch::write(at(a).wrapping_add(11), b as u8).map(|()| b as u8)),
            Deed::ReadAll => match touch::read(at(a)) {
                Err(refused) => [refused.signal as u64, 0, 0, 0],
                Ok(first) => {
                    // SAFETY: the page is there, and this is the only thread.
                    let page = unsafe { std::slice::from_raw_parts(at(a), page_size()) };
                    [0, first.into(), page.iter().all(|&byte| byte == first).into(), 0]
                }
            },
            Deed::GiveUp => {
                // SAFETY: nothing refers to the memory.
                let done = unsafe { libc::madvise(at(a).cast(), bytes(b), libc::MADV_DONTNEED) };
                [done as u64, 0, 0, 0]
            }
            Deed::Unmap => {
                // SAFETY: as above.
                let done = unsafe { libc::munmap(at(a).cast(), bytes(b)) };
                [done as u64, 0, 0, 0]
            }
            Deed::Remap => {
                let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                // SAFETY: as above.
                let to = unsafe { libc::mremap(at(a).cast(), bytes(b), bytes(b), flags, at(c)) };
                [u64::from(to.cast() != at(c)), 0, 0, 0]
            }
            Deed::Fork => {
                let (ours, theirs) = pair();
                // SAFETY: there is one thread.
                match unsafe { fork() }.unwrap() {
                    ForkResult::Parent { child } => {
                        send(&socket, &[0, child.as_raw() as u64, 0, 0], Some(&ours));
                        continue;
                    }
                    ForkResult::Child => {
                        // Its parent's is no business of it.
                        uffd = None;
                        socket = theirs;
                        continue;
                    }
                }
            }
            Deed::Close => {
                uffd = None;
                [0; 4]
            }
            Deed::Play => {
                let played = std::panic::catch_unwind(std::panic::AssertUnwindSafe(&mut play));
                [u64::from(played.is_err()), 0, 0, 0]
            }
            // SAFETY: ends the process at once.
            Deed::Exit => unsafe { libc::_exit(0) },
        };
        let _held = &uffd;
        send(&socket, &reply, None);
    }
}
