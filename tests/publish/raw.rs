//! The protocol of a published vmap, spoken by hand: to say what the library never would.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, accept, bind,
    connect, listen, recvmsg, sendmsg, socket,
};

use crate::support::DEADLINE;

/// The version that the library speaks.
pub(crate) const VERSION: u32 = 1;

/// What begins a frame.
pub(crate) fn header(version: u32) -> Vec<u8> {
    [b"kiom".as_slice(), &version.to_le_bytes()].concat()
}

/// A number as postcard writes it.
pub(crate) fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}

/// A frame of numbers, none of them negative: the kind first.
pub(crate) fn frame(numbers: &[u64]) -> Vec<u8> {
    let mut bytes = header(VERSION);
    numbers.iter().for_each(|&number| bytes.extend(varint(number)));
    bytes
}

/// The kinds of requests.
pub(crate) mod ask {
    pub(crate) const WATCH: u64 = 0;
    pub(crate) const MASKS: u64 = 1;
    pub(crate) const HELLO: u64 = 3;
    pub(crate) const ATTACH: u64 = 4;
    pub(crate) const PIECES: u64 = 5;
    pub(crate) const SYNC: u64 = 6;
    pub(crate) const REFCOUNT: u64 = 7;
    pub(crate) const LOOK_UP: u64 = 8;
    pub(crate) const UNMAPPED: u64 = 9;
    pub(crate) const FORK: u64 = 10;
    pub(crate) const TAKEN: u64 = 12;
    pub(crate) const DETACHED: u64 = 13;
    pub(crate) const BYE: u64 = 14;
}

/// The kinds of answers.
pub(crate) mod reply {
    pub(crate) const ATTACHED: u8 = 0;
    pub(crate) const PIECES: u8 = 3;
    pub(crate) const DONE: u8 = 4;
    pub(crate) const FORKED: u8 = 6;
    pub(crate) const REFUSED: u8 = 7;
    pub(crate) const LIFELINE: u8 = 8;
}

/// A message of the engine: what follows its header, and its descriptors.
pub(crate) struct Heard {
    pub(crate) body: Vec<u8>,
    pub(crate) descriptors: Vec<OwnedFd>,
}

/// A connection.
pub(crate) struct Line(OwnedFd);

impl Line {
    pub(crate) fn connect(path: &Path) -> Line {
        let line = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        connect(line.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
        Line(line)
    }

    pub(crate) fn fd(&self) -> &OwnedFd {
        &self.0
    }

    /// Says something, with descriptors. That nobody hears it any more is no failure.
    pub(crate) fn say(&self, bytes: &[u8], descriptors: &[RawFd]) -> nix::Result<()> {
        let rights = [ControlMessage::ScmRights(descriptors)];
        let control = if descriptors.is_empty() { &[][..] } else { &rights[..] };
        sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None).map(drop)
    }

    /// Waits for an answer; `None` when the engine has cut the connection.
    pub(crate) fn hear(&self) -> Option<Heard> {
        let mut ready = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut ready, PollTimeout::try_from(DEADLINE).unwrap()), Ok(1), "an answer or the end");
        let mut bytes = [0; 1024];
        let mut room = nix::cmsg_space!([RawFd; 4]);
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        let (len, descriptors) = match recvmsg::<()>(self.0.as_raw_fd(), &mut slices, Some(&mut room), flags) {
            Ok(message) => {
                let mut descriptors = Vec::new();
                for part in message.cmsgs().unwrap() {
                    if let ControlMessageOwned::ScmRights(numbers) = part {
                        // SAFETY: each has just been received.
                        descriptors.extend(numbers.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                    }
                }
                (message.bytes, descriptors)
            }
            Err(Errno::ECONNRESET) => return None,
            Err(errno) => panic!("{errno}"),
        };
        (len > 0).then(|| {
            assert_eq!(bytes[..8], header(VERSION));
            Heard { body: bytes[8..len].to_vec(), descriptors }
        })
    }

    /// Hears answers to the end.
    pub(crate) fn hear_the_end(&self) {
        while self.hear().is_some() {}
    }
}

/// What a process has that was let in.
pub(crate) struct Offer {
    pub(crate) vmap: u64,
    pub(crate) features: u64,
    pub(crate) memfd: OwnedFd,
}

/// Asks to be let in.
pub(crate) fn knock(path: &Path) -> (Line, Offer) {
    let line = Line::connect(path);
    line.say(&frame(&[0, 0]), &[]).unwrap();
    let Heard { body, mut descriptors } = line.hear().expect("an offer");
    let mut rest = body.as_slice();
    let mut number = || {
        let (mut value, mut shift) = (0, 0);
        loop {
            let (&byte, behind) = rest.split_first().unwrap();
            rest = behind;
            value |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte < 0x80 {
                return value;
            }
        }
    };
    assert_eq!(number(), 0, "an offer");
    let vmap = number();
    // Pages, their size, the base, four small ones.
    for _ in 0..7 {
        number();
    }
    let features = number();
    let offer = Offer { vmap, features, memfd: descriptors.pop().unwrap() };
    let owner = line.hear().expect("the owner's pidfd");
    assert_eq!((owner.body, owner.descriptors.len()), (vec![1], 1));
    (line, offer)
}

/// Opens a userfaultfd, with a handshake for some features, or without one.
pub(crate) fn userfaultfd(features: Option<u64>) -> OwnedFd {
    #[repr(C)]
    struct Api {
        api: u64,
        features: u64,
        ioctls: u64,
    }
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | 1;
    // SAFETY: system calls that reach no memory but the argument; the descriptor is new.
    unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, flags) as RawFd;
        assert!(fd >= 0, "{}", Errno::last());
        let fd = OwnedFd::from_raw_fd(fd);
        if let Some(features) = features {
            let mut api = Api { api: 0xAA, features, ioctls: 0 };
            assert_eq!(libc::ioctl(fd.as_raw_fd(), 0xC018_AA3F as libc::Ioctl, &raw mut api), 0, "{}", Errno::last());
        }
        fd
    }
}

/// Greets, as a client that is served from then on; answers with its userfaultfd.
pub(crate) fn greet(line: &Line, offer: &Offer) -> OwnedFd {
    // Without SIGBUS, which is the owner's alone.
    let uffd = userfaultfd(Some(offer.features & !(1 << 7)));
    if offer.features & 1 << 14 == 0 {
        let (theirs, ours) = lifelines();
        line.say(&frame(&[ask::MASKS]), &[theirs.as_raw_fd()]).unwrap();
        std::mem::forget(ours);
    }
    line.say(&frame(&[ask::HELLO, 2, 0, 0]), &[uffd.as_raw_fd()]).unwrap();
    assert_eq!(line.hear().expect("a welcome").body, [reply::DONE]);
    uffd
}

/// Forks, without a process: answers with the child's end of its lifeline, or `None` if that is refused.
pub(crate) fn fork(line: &Line) -> Option<OwnedFd> {
    line.say(&frame(&[ask::FORK]), &[]).unwrap();
    let Heard { body, descriptors } = line.hear().expect("an answer");
    if body[0] == reply::REFUSED {
        return None;
    }
    assert_eq!((body[0], descriptors.len()), (reply::FORKED, 1));
    let Heard { body, mut descriptors } = line.hear().expect("a lifeline");
    assert_eq!((body[0], descriptors.len()), (reply::LIFELINE, 1));
    descriptors.pop()
}

/// A pair of sockets as lifelines are.
pub(crate) fn lifelines() -> (OwnedFd, OwnedFd) {
    nix::sys::socket::socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
}

/// A listener that is no engine: it says these things to each connection, with these descriptors, and closes it if so.
pub(crate) fn impostor(path: &Path, says: Vec<(Vec<u8>, Vec<OwnedFd>)>, then_closes: bool) {
    let listener = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(listener.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    listen(&listener, Backlog::new(8).unwrap()).unwrap();
    std::thread::spawn(move || {
        while let Ok(connection) = accept(listener.as_raw_fd()) {
            for (bytes, descriptors) in &says {
                let numbers: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
                let rights = [ControlMessage::ScmRights(&numbers)];
                let control = if numbers.is_empty() { &[][..] } else { &rights[..] };
                let slices = [IoSlice::new(bytes)];
                let _ = sendmsg::<()>(connection, &slices, control, MsgFlags::MSG_NOSIGNAL, None);
            }
            if then_closes {
                nix::unistd::close(connection).unwrap();
            }
        }
    });
}
