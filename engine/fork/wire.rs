//! The messages between the engine and a process that it serves: one frame each over a SOCK_SEQPACKET socket.
//!
//! Each process talks over a socket of its own, its *lifeline*: closed by the kernel at exit and at exec, so that the
//! engine notices either. A frame is a magic number, the version, and a body in the format of `postcard`; it is no longer than
//! [`FRAME_BYTES`], and brings at most one descriptor. A forked child runs the same program image; an unrelated client perhaps
//! another version of this library, which the first frames tell ([`Knock`], [`Welcome`]).

use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::MsgFlags;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::publish::discard;
use crate::space::{AreaRecord, Pieces};

/// The areas that are told in one answer.
pub(crate) const AREAS_PER_ANSWER: usize = 2;
/// The version of the frames. Whoever changes what a frame may hold raises it.
pub(crate) const VERSION: u32 = 1;
/// The longest frame.
pub(crate) const FRAME_BYTES: usize = 512;

const MAGIC: [u8; 4] = *b"kiom";
/// The magic number and the version, which is little-endian.
const HEADER_BYTES: usize = 8;

/// What is wrong with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FrameFault {
    /// Another protocol, or rubbish.
    #[error("it does not begin as a frame of this library")]
    Magic,
    /// Of another version of the library.
    #[error("it is of version {0} of the frames, and this library has {VERSION}")]
    Version(u32),
    /// Longer than any frame.
    #[error("it is longer than {FRAME_BYTES} bytes")]
    TooLong,
    /// Not what is said in frames, or cut off, or with more behind it.
    #[error("its body can't be parsed")]
    Body,
    /// More descriptors than one came along, or one where none is due.
    #[error("too many descriptors came along")]
    Descriptors,
}

/// Why nothing was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failed {
    Sys(Errno),
    Frame(FrameFault),
}

/// What an unrelated process says first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Knock {
    /// "I want to attach what is published here", for reading only if so.
    Attach { read_only: bool },
}

/// What the engine answers to that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Welcome {
    /// "This is it", with its memfd. From here on the socket is a lifeline.
    Offer(Offer),
    /// With the owner's pidfd; follows the offer.
    Owner,
    /// "No": the policy refuses you.
    Denied,
    /// "No": there are as many processes as may be.
    Full,
    /// "No": you must ask for reading only.
    ReadOnly,
    /// "No": the engine was shut down, or has no room.
    Closed,
}

/// What is published, as a process must know it to map it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Offer {
    pub(crate) vmap: u64,
    pub(crate) nr_pages: u64,
    /// The size of its pages in bytes, huge or not.
    pub(crate) page_bytes: u64,
    /// The byte of the memfd at which page 0 lies.
    pub(crate) base: u64,
    /// The memfd is the list's itself: it has another owner too.
    pub(crate) shared: bool,
    pub(crate) expandable: bool,
    pub(crate) minor_faults: bool,
    /// The residency's number.
    pub(crate) residency: u8,
    /// Of the engine's userfaultfds.
    pub(crate) features: u64,
    /// It may be mapped for reading only.
    pub(crate) read_only: bool,
}

/// What a child says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Ask {
    /// "This is my pidfd."
    Watch,
    /// "To this socket go orders to mask pages of mine."
    Masks,
    /// "Through this userfaultfd, which reports no changes of mine, pages can be mapped here while the other does."
    Aside,
    /// "My areas are mapped and registered": with the userfaultfd. With `errno` ≠ 0: they are not. So many of them were to
    /// be locked if allowed, and are not.
    Hello { pid: i32, errno: i32, nr_unlocked: u64 },
    /// "Count and serve this area, which I have mapped and registered."
    Attach(AreaRecord),
    /// "Of which ranges does this region consist now?"
    Pieces { region: u64 },
    /// "Answer when every event up to now is counted."
    Sync,
    /// "How many areas of this vmap are attached?"
    Refcount { vmap: u64 },
    /// "Look whether this address has become mine without an event."
    LookUp { addr: u64 },
    /// "This page of mine was unmapped, and no event says so." Not answered.
    Unmapped { addr: u64 },
    /// "I am about to fork."
    Fork,
    /// "Which areas would a child of mine inherit?", after the first `skip`. Needs no descriptor.
    Inherited { skip: u64 },
    /// "I can't have this range of my areas: something else lies there." Before the greeting.
    Taken { start: u64, end: u64 },
    /// "This region, which can't be registered, is unmapped."
    Detached { region: u64 },
    /// "I am done with the engine, and nothing of it is mapped here."
    Bye,
}

/// What the engine answers.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) enum Reply {
    Attached {
        first: bool,
    },
    /// "Your address space is changing: ask again."
    Later,
    /// None when there are no more.
    Areas([Option<AreaRecord>; AREAS_PER_ANSWER]),
    Pieces(Pieces),
    Done,
    Count(u64),
    /// With a memfd that holds the areas for the child, as [`AreaRecord`]s.
    Forked,
    /// With an errno.
    Refused(i32),
    /// With the child's end of its lifeline; follows [`Reply::Forked`]. The engine makes both ends: nobody else may have its own,
    /// as to receive from it would be to wait for whoever receives from it too.
    Lifeline,
}

/// Sends a request or a greeting. A peer that is gone is an error, not a SIGPIPE.
pub(crate) fn send_ask(socket: BorrowedFd<'_>, ask: Ask, descriptor: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
    send(socket, &ask, descriptor, MsgFlags::empty())
}

/// Sends an answer without waiting: a peer that does not read its answers is not waited for.
pub(crate) fn send_reply(
    socket: BorrowedFd<'_>,
    reply: Reply,
    descriptor: Option<BorrowedFd<'_>>,
) -> Result<(), Errno> {
    send(socket, &reply, descriptor, MsgFlags::MSG_DONTWAIT)
}

/// Sends a frame of any kind.
pub(crate) fn send<T: Serialize>(
    socket: BorrowedFd<'_>,
    message: &T,
    descriptor: Option<BorrowedFd<'_>>,
    flags: MsgFlags,
) -> Result<(), Errno> {
    use std::io::IoSlice;

    use nix::sys::socket::{ControlMessage, sendmsg};

    let mut frame = [0; FRAME_BYTES];
    frame[..4].copy_from_slice(&MAGIC);
    frame[4..HEADER_BYTES].copy_from_slice(&VERSION.to_le_bytes());
    let body = postcard::to_slice(message, &mut frame[HEADER_BYTES..]).map_err(|_| Errno::EMSGSIZE)?.len();
    let numbers = descriptor.map(|fd| [fd.as_raw_fd()]);
    let rights = numbers.as_ref().map(|numbers| [ControlMessage::ScmRights(numbers)]);
    let control: &[ControlMessage<'_>] = rights.as_ref().map_or(&[], |rights| rights);
    let bytes = [IoSlice::new(&frame[..HEADER_BYTES + body])];
    loop {
        match sendmsg::<()>(socket.as_raw_fd(), &bytes, control, flags | MsgFlags::MSG_NOSIGNAL, None) {
            Err(Errno::EINTR) => {}
            other => return other.map(drop),
        }
    }
}

impl Ask {
    /// Tells whether a descriptor comes along.
    fn brings_descriptor(&self) -> bool {
        match self {
            Ask::Watch | Ask::Masks | Ask::Aside => true,
            Ask::Hello { errno, .. } => *errno == 0,
            _ => false,
        }
    }
}

/// Receives a request or a greeting if one is there; `Ok(None)` at the end of the stream. Nobody else may receive from the
/// socket. A descriptor comes to be in this process only with what is a request that brings one: the kernel drops all others,
/// and asks no file system.
pub(crate) fn receive_ask(socket: BorrowedFd<'_>) -> Result<Option<(Ask, Option<OwnedFd>)>, Failed> {
    let seen = receive_bare::<Ask>(socket, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK);
    match seen {
        Ok(Some(seen)) if seen.frame.brings_descriptor() => receive(socket, MsgFlags::MSG_DONTWAIT),
        Err(Failed::Sys(errno)) => Err(Failed::Sys(errno)),
        Ok(_) | Err(Failed::Frame(_)) => match receive_bare(socket, MsgFlags::MSG_DONTWAIT)? {
            Some(Bare { had_descriptors: true, .. }) => Err(Failed::Frame(FrameFault::Descriptors)),
            bare => Ok(bare.map(|bare| (bare.frame, None))),
        },
    }
}

/// Receives what an unrelated process says first, if it has said it; `Ok(None)` at the end of the stream. The kernel drops
/// descriptors that come along.
pub(crate) fn receive_knock(socket: BorrowedFd<'_>) -> Result<Option<Knock>, Failed> {
    match receive_bare(socket, MsgFlags::MSG_DONTWAIT)? {
        Some(Bare { had_descriptors: true, .. }) => Err(Failed::Frame(FrameFault::Descriptors)),
        bare => Ok(bare.map(|bare| bare.frame)),
    }
}

/// Waits for an answer; `Ok(None)` when the engine is gone.
pub(crate) fn receive_reply(socket: BorrowedFd<'_>) -> Result<Option<(Reply, Option<OwnedFd>)>, Failed> {
    receive(socket, MsgFlags::empty())
}

/// Receives a frame; `Ok(None)` at the end of the stream. Whatever descriptors come with what is no frame are closed.
pub(crate) fn receive<T: DeserializeOwned>(
    socket: BorrowedFd<'_>,
    flags: MsgFlags,
) -> Result<Option<(T, Option<OwnedFd>)>, Failed> {
    let mut frame = [0; FRAME_BYTES];
    let received = receive_bytes(socket, &mut frame, true, flags).map_err(Failed::Sys)?;
    let Received { len, is_cut, descriptor, lacks_descriptors } = received;
    let parsed = match descriptor {
        _ if is_cut => Err(FrameFault::TooLong),
        Some(_) if lacks_descriptors => Err(FrameFault::Descriptors),
        // One that is lacking was lost for want of numbers.
        _ => parse(&frame[..len]),
    };
    match parsed {
        // An empty message looks the same; nobody who speaks this protocol sends one.
        _ if len == 0 && !is_cut && descriptor.is_none() => Ok(None),
        Ok(message) => Ok(Some((message, descriptor))),
        Err(fault) => {
            if let Some(descriptor) = descriptor {
                discard(descriptor);
            }
            Err(Failed::Frame(fault))
        }
    }
}

/// A frame that was received without what came along.
struct Bare<T> {
    frame: T,
    had_descriptors: bool,
}

fn receive_bare<T: DeserializeOwned>(socket: BorrowedFd<'_>, flags: MsgFlags) -> Result<Option<Bare<T>>, Failed> {
    let mut frame = [0; FRAME_BYTES];
    let received = receive_bytes(socket, &mut frame, false, flags).map_err(Failed::Sys)?;
    let Received { len, is_cut, lacks_descriptors: had_descriptors, .. } = received;
    match () {
        () if is_cut => Err(Failed::Frame(FrameFault::TooLong)),
        () if len == 0 && !had_descriptors => Ok(None),
        () => parse(&frame[..len]).map(|frame| Some(Bare { frame, had_descriptors })).map_err(Failed::Frame),
    }
}

fn parse<T: DeserializeOwned>(frame: &[u8]) -> Result<T, FrameFault> {
    let ([a, b, c, d, version @ ..], body) = frame.split_first_chunk::<HEADER_BYTES>().ok_or(FrameFault::Magic)?;
    if [*a, *b, *c, *d] != MAGIC {
        return Err(FrameFault::Magic);
    }
    match u32::from_le_bytes(*version) {
        VERSION => {}
        other => return Err(FrameFault::Version(other)),
    }
    match postcard::take_from_bytes(body) {
        Ok((message, [])) => Ok(message),
        _ => Err(FrameFault::Body),
    }
}

struct Received {
    len: usize,
    /// The message was longer.
    is_cut: bool,
    descriptor: Option<OwnedFd>,
    /// More came along than there was room for, or were numbers for.
    lacks_descriptors: bool,
}

/// Room for the control message that brings a descriptor, aligned as its header must be.
#[repr(C)]
union Control {
    _header: libc::cmsghdr,
    _bytes: [MaybeUninit<u8>; 24],
}

/// Receives a message, and a descriptor of it if there is `room`. All others are dropped by the kernel, which asks no file system
/// then, as closing them would.
fn receive_bytes(socket: BorrowedFd<'_>, bytes: &mut [u8], room: bool, flags: MsgFlags) -> Result<Received, Errno> {
    let mut control = MaybeUninit::<Control>::uninit();
    let mut slice = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let flags = (flags | MsgFlags::MSG_CMSG_CLOEXEC).bits();
    // SAFETY: a header of zeros names nothing; what is filled in is ours and outlives the call.
    let (header, len) = unsafe {
        let mut header: libc::msghdr = std::mem::zeroed();
        (header.msg_iov, header.msg_iovlen) = (&raw mut slice, 1);
        let len = loop {
            if room {
                // With what is behind the first number for alignment, there would be room for two.
                let len = libc::CMSG_LEN(size_of::<RawFd>() as _);
                (header.msg_control, header.msg_controllen) = (control.as_mut_ptr().cast(), len as _);
            }
            match Errno::result(libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags)) {
                Err(Errno::EINTR) => {}
                other => break other?,
            }
        };
        (header, len as usize)
    };
    let mut descriptor = None;
    // SAFETY: the kernel filled the header and the control messages, which the macros walk within their length; each number
    // has just been put into our table, and nobody else knows it.
    unsafe {
        let mut part = libc::CMSG_FIRSTHDR(&raw const header);
        while let Some(message) = part.as_ref() {
            if message.cmsg_level == libc::SOL_SOCKET && message.cmsg_type == libc::SCM_RIGHTS {
                let numbers = libc::CMSG_DATA(part).cast::<RawFd>();
                #[allow(clippy::unnecessary_cast, reason = "not every C library has a usize there")]
                let count = (message.cmsg_len as usize - libc::CMSG_LEN(0) as usize) / size_of::<RawFd>();
                for n in 0..count {
                    if let Some(more) = descriptor.replace(OwnedFd::from_raw_fd(numbers.add(n).read_unaligned())) {
                        discard(more);
                    }
                }
            }
            part = libc::CMSG_NXTHDR(&raw const header, part);
        }
    }
    let was_set = |flag| header.msg_flags & flag != 0;
    Ok(Received { len, is_cut: was_set(libc::MSG_TRUNC), descriptor, lacks_descriptors: was_set(libc::MSG_CTRUNC) })
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;
    use crate::space::PIECES_PER_ANSWER;

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    #[test]
    fn every_request_survives_the_wire() {
        let (a, b) = pair();
        let record = AreaRecord { start: 1 << 40, len: 8192, pgoff: 3, region: 4, vmap: 5, flags: 1 };
        let asks = [
            Ask::Hello { pid: 77, errno: 24, nr_unlocked: 3 },
            Ask::Attach(record),
            Ask::Pieces { region: 9 },
            Ask::Sync,
            Ask::Refcount { vmap: 2 },
            Ask::Fork,
            Ask::Watch,
            Ask::LookUp { addr: 1 << 40 },
            Ask::Inherited { skip: 4 },
            Ask::Masks,
            Ask::Aside,
            Ask::Taken { start: 1 << 40, end: 1 << 41 },
            Ask::Unmapped { addr: 1 << 40 },
            Ask::Detached { region: 7 },
            Ask::Bye,
        ];
        for ask in asks {
            send_ask(a.as_fd(), ask, None).unwrap();
            assert_eq!(receive_ask(b.as_fd()).unwrap().unwrap().0, ask);
        }
    }

    #[test]
    fn pieces_and_descriptors_survive_the_wire() {
        let (a, b) = pair();
        let mut pieces = Pieces::default();
        for n in 0..PIECES_PER_ANSWER {
            pieces.push(n * 0x1000, n * 0x1000 + 0x800);
        }
        send_reply(a.as_fd(), Reply::Pieces(pieces), Some(a.as_fd())).unwrap();
        let (reply, descriptor) = receive_reply(b.as_fd()).unwrap().unwrap();
        let Reply::Pieces(got) = reply else { panic!("{reply:?}") };
        assert_eq!(got.as_slice(), pieces.as_slice());
        assert!(descriptor.is_some());
    }

    #[test]
    fn areas_survive_the_wire() {
        let (a, b) = pair();
        let record = AreaRecord { start: 1 << 40, len: 8192, pgoff: 3, region: 4, vmap: 5, flags: 1 };
        for records in [[None; 2], [Some(record), None], [Some(record), Some(AreaRecord { region: 9, ..record })]] {
            send_reply(a.as_fd(), Reply::Areas(records), None).unwrap();
            let Some((Reply::Areas(got), None)) = receive_reply(b.as_fd()).unwrap() else { panic!() };
            assert_eq!(got, records);
        }
    }

    fn refused(socket: &OwnedFd) -> FrameFault {
        match receive_ask(socket.as_fd()) {
            Err(Failed::Frame(fault)) => fault,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_hang_up_is_the_end_and_garbage_is_refused() {
        let (a, b) = pair();
        let frame = |version: u32, body: &[u8]| [&MAGIC[..], &version.to_le_bytes(), body].concat();
        let body = {
            let mut bytes = [0; 16];
            postcard::to_slice(&Ask::Refcount { vmap: 300 }, &mut bytes).unwrap().to_vec()
        };
        for (bytes, fault) in [
            (b"garbage".to_vec(), FrameFault::Magic),
            (b"kiom\x01\0".to_vec(), FrameFault::Magic),
            (vec![0; FRAME_BYTES], FrameFault::Magic),
            (frame(VERSION + 1, &body), FrameFault::Version(VERSION + 1)),
            (frame(VERSION, &body[..body.len() - 1]), FrameFault::Body),
            (frame(VERSION, &[&body[..], &[0]].concat()), FrameFault::Body),
            (frame(VERSION, &[99]), FrameFault::Body),
            (frame(VERSION, &[]), FrameFault::Body),
            (frame(VERSION, &[0; FRAME_BYTES]), FrameFault::TooLong),
        ] {
            nix::unistd::write(&a, &bytes).unwrap();
            assert_eq!(refused(&b), fault, "{bytes:?}");
        }
        assert_eq!(receive_ask(b.as_fd()).unwrap_err(), Failed::Sys(Errno::EAGAIN));
        drop(a);
        assert!(receive_ask(b.as_fd()).unwrap().is_none());
        assert_eq!(send_reply(b.as_fd(), Reply::Done, None).unwrap_err(), Errno::EPIPE);
    }

    /// However many descriptors come along, at most one is taken and none is left open.
    #[test]
    fn more_descriptors_than_one_are_refused_and_closed() {
        use nix::sys::socket::{ControlMessage, sendmsg};
        let (a, b) = pair();
        let (reader, writer) = std::io::pipe().unwrap();
        let frame = |ask: Ask| {
            send_ask(a.as_fd(), ask, None).unwrap();
            let mut frame = [0; FRAME_BYTES];
            let len = nix::unistd::read(&b, &mut frame).unwrap();
            frame[..len].to_vec()
        };
        // 253 is the most that the kernel lets come with one message.
        for (ask, count) in [(Ask::Watch, 2), (Ask::Watch, 253), (Ask::Sync, 1), (Ask::Sync, 253)] {
            let numbers = vec![writer.as_raw_fd(); count];
            let bytes = frame(ask);
            let bytes = [std::io::IoSlice::new(&bytes)];
            sendmsg::<()>(a.as_raw_fd(), &bytes, &[ControlMessage::ScmRights(&numbers)], MsgFlags::empty(), None)
                .unwrap();
            assert_eq!(refused(&b), FrameFault::Descriptors, "{ask:?}");
        }
        send_ask(a.as_fd(), Ask::Watch, Some(writer.as_fd())).unwrap();
        assert!(matches!(receive_ask(b.as_fd()), Ok(Some((Ask::Watch, Some(_))))));
        drop(writer);
        let mut ready = [nix::poll::PollFd::new(reader.as_fd(), nix::poll::PollFlags::empty())];
        assert_eq!(nix::poll::poll(&mut ready, 0_u8), Ok(1), "the pipe has no writer any more");
    }
}
