//! The messages between a forked child and the engine: fixed frames over a SOCK_SEQPACKET pair.
//!
//! Each child talks over a socket of its own, its *lifeline*: closed by the kernel at exit and at exec, so that the
//! engine notices either. A frame is an array of words; both sides run the same program image, and a frame of
//! another version is refused.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

use crate::space::{AreaRecord, PIECES_PER_ANSWER, Pieces};

/// The areas that are told in one answer.
pub(crate) const AREAS_PER_ANSWER: usize = 2;

/// "kiomap" and the version of the frames.
const MAGIC: u64 = 0x6b69_6f6d_6170_0001;
/// The magic, the kind, and the longest body: the pieces of a region.
const WORDS: usize = 3 + 2 * PIECES_PER_ANSWER;
const BYTES: usize = WORDS * 8;

/// What a child says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// "I am about to fork": with the engine's end of the child's lifeline.
    Fork,
    /// "Which areas would a child of mine inherit?", after the first `skip`. Needs no descriptor.
    Inherited { skip: u64 },
    /// "I can't have this range of my areas: something else lies there." Before the greeting.
    Taken { start: u64, end: u64 },
}

/// What the engine answers.
#[derive(Clone, Copy, Debug)]
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
    Refused(Errno),
}

type Words = [u64; WORDS];

impl Ask {
    fn to_words(self) -> Words {
        match self {
            Ask::Hello { pid, errno, nr_unlocked } => words(1, &[pid as u64, errno as u64, nr_unlocked]),
            Ask::Attach(record) => words(2, &record.to_words()),
            Ask::Pieces { region } => words(3, &[region]),
            Ask::Sync => words(4, &[]),
            Ask::Refcount { vmap } => words(5, &[vmap]),
            Ask::Fork => words(6, &[]),
            Ask::Watch => words(7, &[]),
            Ask::LookUp { addr } => words(8, &[addr]),
            Ask::Inherited { skip } => words(9, &[skip]),
            Ask::Masks => words(10, &[]),
            Ask::Taken { start, end } => words(11, &[start, end]),
            Ask::Unmapped { addr } => words(12, &[addr]),
            Ask::Aside => words(13, &[]),
        }
    }

    fn from_words(w: &Words) -> Option<Ask> {
        Some(match w[1] {
            1 => Ask::Hello { pid: w[2] as i32, errno: w[3] as i32, nr_unlocked: w[4] },
            2 => Ask::Attach(AreaRecord::from_words([w[2], w[3], w[4], w[5], w[6], w[7]])),
            3 => Ask::Pieces { region: w[2] },
            4 => Ask::Sync,
            5 => Ask::Refcount { vmap: w[2] },
            6 => Ask::Fork,
            7 => Ask::Watch,
            8 => Ask::LookUp { addr: w[2] },
            9 => Ask::Inherited { skip: w[2] },
            10 => Ask::Masks,
            11 => Ask::Taken { start: w[2], end: w[3] },
            12 => Ask::Unmapped { addr: w[2] },
            13 => Ask::Aside,
            _ => return None,
        })
    }
}

impl Reply {
    fn to_words(self) -> Words {
        match self {
            Reply::Attached { first } => words(1, &[first.into()]),
            Reply::Pieces(pieces) => {
                let mut out = words(2, &[pieces.len as u64]);
                for (slot, &(start, end)) in out[3..].chunks_exact_mut(2).zip(pieces.as_slice()) {
                    slot.copy_from_slice(&[start as u64, end as u64]);
                }
                out
            }
            Reply::Done => words(3, &[]),
            Reply::Count(count) => words(4, &[count]),
            Reply::Forked => words(5, &[]),
            Reply::Refused(errno) => words(6, &[errno as u64]),
            Reply::Later => words(7, &[]),
            Reply::Areas(records) => {
                let mut out = words(8, &[records.iter().flatten().count() as u64]);
                for (slot, record) in out[3..].chunks_exact_mut(AreaRecord::WORDS).zip(records.iter().flatten()) {
                    slot.copy_from_slice(&record.to_words());
                }
                out
            }
        }
    }

    fn from_words(w: &Words) -> Option<Reply> {
        Some(match w[1] {
            1 => Reply::Attached { first: w[2] != 0 },
            2 => {
                let mut pieces = Pieces::default();
                let nr_pieces = usize::try_from(w[2]).ok().filter(|&n| n <= PIECES_PER_ANSWER)?;
                for piece in w[3..].chunks_exact(2).take(nr_pieces) {
                    pieces.push(piece[0] as usize, piece[1] as usize);
                }
                Reply::Pieces(pieces)
            }
            3 => Reply::Done,
            4 => Reply::Count(w[2]),
            5 => Reply::Forked,
            6 => Reply::Refused(Errno::from_raw(w[2] as i32)),
            7 => Reply::Later,
            8 => {
                let nr_areas = usize::try_from(w[2]).ok().filter(|&n| n <= AREAS_PER_ANSWER)?;
                let mut records = [None; AREAS_PER_ANSWER];
                let words = w[3..].chunks_exact(AreaRecord::WORDS).take(nr_areas);
                for (record, words) in records.iter_mut().zip(words) {
                    *record = Some(AreaRecord::from_words(words.try_into().ok()?));
                }
                Reply::Areas(records)
            }
            _ => return None,
        })
    }
}

fn words(kind: u64, body: &[u64]) -> Words {
    let mut out = [0; WORDS];
    out[0] = MAGIC;
    out[1] = kind;
    out[2..2 + body.len()].copy_from_slice(body);
    out
}

/// Sends a request or a greeting. A peer that is gone is an error, not a SIGPIPE.
pub(crate) fn send_ask(socket: BorrowedFd<'_>, ask: Ask, descriptor: Option<BorrowedFd<'_>>) -> Result<(), Errno> {
    send(socket, &ask.to_words(), descriptor, MsgFlags::empty())
}

/// Sends an answer without waiting: a peer that does not read its answers is not waited for.
pub(crate) fn send_reply(
    socket: BorrowedFd<'_>,
    reply: Reply,
    descriptor: Option<BorrowedFd<'_>>,
) -> Result<(), Errno> {
    send(socket, &reply.to_words(), descriptor, MsgFlags::MSG_DONTWAIT)
}

fn send(
    socket: BorrowedFd<'_>,
    words: &Words,
    descriptor: Option<BorrowedFd<'_>>,
    flags: MsgFlags,
) -> Result<(), Errno> {
    let mut bytes = [0u8; BYTES];
    for (slot, word) in bytes.chunks_exact_mut(8).zip(words) {
        slot.copy_from_slice(&word.to_ne_bytes());
    }
    let numbers = descriptor.map(|fd| [fd.as_raw_fd()]);
    let rights = numbers.as_ref().map(|numbers| [ControlMessage::ScmRights(numbers)]);
    let control: &[ControlMessage<'_>] = rights.as_ref().map_or(&[], |rights| rights);
    loop {
        let sent =
            sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&bytes)], control, flags | MsgFlags::MSG_NOSIGNAL, None);
        match sent {
            Err(Errno::EINTR) => {}
            other => return other.map(drop),
        }
    }
}

/// Receives a request or a greeting if one is there; `Ok(None)` at the end of the stream.
pub(crate) fn receive_ask(socket: BorrowedFd<'_>) -> Result<Option<(Ask, Option<OwnedFd>)>, Errno> {
    receive(socket, MsgFlags::MSG_DONTWAIT, Ask::from_words)
}

/// Waits for an answer; `Ok(None)` when the engine is gone.
pub(crate) fn receive_reply(socket: BorrowedFd<'_>) -> Result<Option<(Reply, Option<OwnedFd>)>, Errno> {
    receive(socket, MsgFlags::empty(), Reply::from_words)
}

fn receive<T>(
    socket: BorrowedFd<'_>,
    flags: MsgFlags,
    parse: impl Fn(&Words) -> Option<T>,
) -> Result<Option<(T, Option<OwnedFd>)>, Errno> {
    let mut bytes = [0u8; BYTES];
    let mut control = nix::cmsg_space!([RawFd; 1]);
    let (received, descriptor) = loop {
        let mut slices = [IoSliceMut::new(&mut bytes)];
        let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
        let message = match recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut control), flags) {
            Err(Errno::EINTR) => continue,
            other => other?,
        };
        let mut descriptor = None;
        // At most one comes with a message: where there is no room for it (EMFILE), the kernel cuts it off whole and
        // says so, which is an error here. The message is then one without a descriptor. Of several, those that fitted
        // would be lost to us, and stay open.
        for part in message.cmsgs().into_iter().flatten() {
            if let ControlMessageOwned::ScmRights(numbers) = part {
                // SAFETY: the kernel has just put this descriptor into our table; nobody else knows it.
                descriptor = numbers.first().map(|&fd| unsafe { OwnedFd::from_raw_fd(fd) });
            }
        }
        break (message.bytes, descriptor);
    };
    if received == 0 {
        return Ok(None);
    }
    let mut words = [0u64; WORDS];
    for (word, slot) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_ne_bytes(slot.try_into().map_err(|_| Errno::EPROTO)?);
    }
    if received != BYTES || words[0] != MAGIC {
        return Err(Errno::EPROTO);
    }
    parse(&words).map(|parsed| Some((parsed, descriptor))).ok_or(Errno::EPROTO)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;

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

    #[test]
    fn a_hang_up_is_the_end_and_garbage_is_refused() {
        let (a, b) = pair();
        nix::unistd::write(&a, b"garbage").unwrap();
        assert_eq!(receive_ask(b.as_fd()).unwrap_err(), Errno::EPROTO);
        nix::unistd::write(&a, &[0u8; BYTES]).unwrap();
        assert_eq!(receive_ask(b.as_fd()).unwrap_err(), Errno::EPROTO);
        assert_eq!(receive_ask(b.as_fd()).unwrap_err(), Errno::EAGAIN);
        drop(a);
        assert!(receive_ask(b.as_fd()).unwrap().is_none());
        assert_eq!(send_reply(b.as_fd(), Reply::Done, None).unwrap_err(), Errno::EPIPE);
    }
}
