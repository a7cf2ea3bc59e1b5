//! What is done with any bytes that come over a socket: for the fuzzer in `tests/fuzz` and the tests of its corpus, which come
//! to nothing private. No part of the interface.

use std::fmt::Debug;
use std::fs::OpenOptions;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use nix::unistd::write;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::client::check;
use super::descriptor::Kind;
use super::outsider::{CLIENT_AREAS_MAX, Most, Outsider, Publication};
use crate::fork::wire::{self, Ask, FRAME_BYTES, Failed, FrameFault, Knock, Offer, Reply, VERSION, Welcome};
use crate::page::page_size;
use crate::process::open_pidfd;
use crate::space::{AreaRecord, PIECES_PER_ANSWER};
use crate::stats::SpaceCounters;
use crate::sys::{Features, OpenWay, Opener};

/// The vmap that is published.
const VMAP: u64 = 7;
/// Of the memory that is offered.
const MEMORY_BYTES: u64 = 1 << 20;

/// Tells whether a frame is accepted. The first byte says by whom, the second in what situation, and the rest is the frame:
///
/// | | who hears it | bits of the second byte |
/// |---|---|---|
/// | `K` | who listens at the socket | |
/// | `W` | a client that connects | 0–2: the descriptor that comes along: none, sealed memory, the same for reading only, memory that may grow, memory without seals, a pipe |
/// | `R` | a client that is served | |
/// | `A` | the engine, from a client | 0: it has greeted, 1: it may read only, 2: it was forked, 3: an attach of it waits, 4: it has as many areas as may be, 5–7: the descriptor: none, a userfaultfd, a pidfd, a lifeline, a pipe, a socket of another kind |
///
/// # Panics
///
/// Where something is not as it must be.
pub fn wire(bytes: &[u8]) -> bool {
    thread_local!(static SCENE: Scene = Scene::new());
    let [who, situation, frame @ ..] = bytes else { return false };
    match who {
        b'K' => hear::<Knock>(frame).is_some(),
        b'W' => hear(frame).is_some_and(|welcome| SCENE.with(|scene| scene.takes(welcome, *situation))),
        b'R' => hear(frame).is_some_and(understands),
        b'A' => hear(frame).is_some_and(|ask| SCENE.with(|scene| scene.obeys(ask, *situation))),
        _ => false,
    }
}

/// Sends a frame and receives it. What is accepted can be said again, in a frame that means the same.
fn hear<T: Serialize + DeserializeOwned + Debug>(frame: &[u8]) -> Option<T> {
    let (near, far) = lifelines();
    match send(far.as_raw_fd(), frame, MsgFlags::MSG_DONTWAIT) {
        // More than a socket takes.
        Err(Errno::EMSGSIZE) => return None,
        sent => assert_eq!(sent, Ok(frame.len())),
    }
    let message: T = match wire::receive(near.as_fd(), MsgFlags::MSG_DONTWAIT) {
        Ok(Some((message, None))) => message,
        Ok(None) if frame.is_empty() => return None,
        Err(Failed::Frame(fault)) => {
            assert_eq!(fault, fault_of(frame).unwrap_or(FrameFault::Body));
            assert!(fault.to_string().len() < 200, "{fault}");
            return None;
        }
        Ok(other) => panic!("{other:?}"),
        Err(failed) => panic!("{failed:?}"),
    };
    assert_eq!(fault_of(frame), None);
    wire::send(far.as_fd(), &message, None, MsgFlags::MSG_DONTWAIT).unwrap();
    let len = recv(near.as_raw_fd(), &mut [0; 2 * FRAME_BYTES], MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK).unwrap();
    assert!(len <= frame.len(), "{} bytes became {len}", frame.len());
    let (again, descriptor) = wire::receive::<T>(near.as_fd(), MsgFlags::MSG_DONTWAIT).unwrap().unwrap();
    assert!(descriptor.is_none());
    assert_eq!(format!("{again:?}"), format!("{message:?}"));
    Some(message)
}

/// What is wrong with a frame, whatever its body.
fn fault_of(frame: &[u8]) -> Option<FrameFault> {
    if frame.len() > FRAME_BYTES {
        return Some(FrameFault::TooLong);
    }
    match frame {
        [b'k', b'i', b'o', b'm', a, b, c, d, ..] => match u32::from_le_bytes([*a, *b, *c, *d]) {
            VERSION => None,
            other => Some(FrameFault::Version(other)),
        },
        _ => Some(FrameFault::Magic),
    }
}

/// What a client makes of an answer.
fn understands(reply: Reply) -> bool {
    match reply {
        Reply::Pieces(pieces) => assert!(pieces.as_slice().len() <= PIECES_PER_ANSWER),
        Reply::Refused(errno) => {
            let error = crate::Error::sys("the engine refused")(Errno::from_raw(errno));
            assert!(error.to_string().len() < 200, "{error}");
        }
        Reply::Attached { .. }
        | Reply::Later
        | Reply::Areas(_)
        | Reply::Done
        | Reply::Count(_)
        | Reply::Forked
        | Reply::Lifeline => {}
    }
    true
}

/// What frames are about, of which nothing changes.
struct Scene {
    publication: Arc<Publication>,
    space: Arc<SpaceCounters>,
    /// What may come along with a request.
    descriptors: Vec<(OwnedFd, Option<Kind>)>,
    /// What may come along with an offer.
    memory: Vec<(OwnedFd, Memory)>,
}

#[derive(Clone, Copy)]
struct Memory {
    is_memory: bool,
    writable: bool,
    /// It can't be cut off, and does not grow.
    seals: [bool; 2],
}

impl Scene {
    fn new() -> Scene {
        let (userfaultfd, _) = Opener::new(&[OpenWay::UserModeOnly]).open(Features::empty()).expect("a userfaultfd");
        let userfaultfd = userfaultfd.as_fd().try_clone_to_owned().unwrap();
        let pidfd = open_pidfd(std::process::id().cast_signed()).unwrap();
        let pipe = || OwnedFd::from(std::io::pipe().unwrap().0);
        let stream = UnixStream::pair().unwrap().0.into();
        let (shrink, grow) = (SealFlag::F_SEAL_SHRINK, SealFlag::F_SEAL_GROW);
        let sealed = memory(shrink | grow);
        let path = format!("/proc/self/fd/{}", sealed.as_raw_fd());
        let for_reading = OpenOptions::new().read(true).open(path).unwrap().into();
        let whole = Memory { is_memory: true, writable: true, seals: [true, true] };
        Scene {
            publication: Arc::new(
                Publication::new(VMAP, Most { processes: 1, of_a_client: 1 }, Duration::from_secs(5)).unwrap(),
            ),
            space: Arc::default(),
            descriptors: vec![
                (userfaultfd, Some(Kind::Userfaultfd)),
                (pidfd, Some(Kind::Pidfd)),
                (lifelines().0, Some(Kind::Lifeline)),
                (pipe(), None),
                (stream, None),
            ],
            memory: vec![
                (sealed, whole),
                (for_reading, Memory { writable: false, ..whole }),
                (memory(shrink), Memory { seals: [true, false], ..whole }),
                (memory(SealFlag::empty()), Memory { seals: [false, false], ..whole }),
                (pipe(), Memory { is_memory: false, writable: false, seals: [false, false] }),
            ],
        }
    }

    /// What a client makes of the first answer: it goes on with it exactly if the memory is there, as it is told.
    fn takes(&self, welcome: Welcome, situation: u8) -> bool {
        let Welcome::Offer(offer) = welcome else { return true };
        let Some((memfd, memory)) = usize::from(situation & 7).checked_sub(1).and_then(|n| self.memory.get(n)) else {
            return false;
        };
        let checked = check(&offer, memfd.try_clone().unwrap());
        assert_eq!(checked.is_ok(), is_there(&offer, *memory), "{offer:?}");
        match checked {
            Ok((object, residency)) => {
                assert_eq!((object.base(), residency.number()), (offer.base, offer.residency));
                assert_eq!(object.offset_of(offer.nr_pages).unwrap(), offer.base + offer.nr_pages * page_size() as u64);
                true
            }
            Err(fault) => {
                assert!(fault.to_string().len() < 200, "{fault}");
                false
            }
        }
    }

    /// What the engine makes of a request: it acts on it exactly if that is in order.
    fn obeys(&self, ask: Ask, situation: u8) -> bool {
        let [greeted, read_only, is_forked, is_waiting, is_full] = [0, 1, 2, 3, 4].map(|bit| situation & 1 << bit != 0);
        let brought = usize::from(situation >> 5).checked_sub(1).and_then(|n| self.descriptors.get(n));
        let descriptor = brought.map(|(descriptor, _)| descriptor);
        let place = self.publication.admit(&self.space).unwrap();
        let outsider = Outsider { is_forked, is_waiting, ..Outsider::new(place, read_only) };
        let areas = if is_full { CLIENT_AREAS_MAX as u64 } else { 3 };
        let checked = outsider.check(&ask, descriptor, greeted, areas);
        let none = brought.is_none();
        let is = |kind| brought.is_some_and(|(_, brought)| *brought == Some(kind));
        let in_order = match ask {
            Ask::Watch => !greeted && is_forked && is(Kind::Pidfd),
            Ask::Taken { start, end } => !greeted && is_forked && none && is_range(start, end.into()),
            Ask::Masks => !greeted && is(Kind::Lifeline),
            Ask::Aside | Ask::Hello { errno: 0, .. } => !greeted && is(Kind::Userfaultfd),
            Ask::Hello { .. } => !greeted && none,
            Ask::Fork => greeted && none,
            Ask::Attach(AreaRecord { start, len, pgoff, region: _, vmap, flags }) => {
                let end_in_file = u128::from(pgoff) * page_size() as u128 + u128::from(len);
                let known = if read_only { !AreaRecord::WRITABLE & 7 } else { 7 };
                let may = flags & !known == 0 && !is_waiting && !is_full;
                let fits = is_range(start, u128::from(start) + u128::from(len)) && end_in_file < 1 << 63;
                greeted && none && vmap == VMAP && may && fits
            }
            Ask::LookUp { addr } | Ask::Unmapped { addr } => {
                greeted && none && is_range(addr, u128::from(addr) + page_size() as u128)
            }
            Ask::Refcount { vmap } => greeted && none && vmap == VMAP,
            Ask::Detached { .. } => greeted && none && read_only,
            Ask::Pieces { .. } | Ask::Sync | Ask::Inherited { .. } | Ask::Bye => greeted && none,
        };
        assert_eq!(checked.is_ok(), in_order, "{ask:?}: {checked:?}");
        if let Err(misdeed) = checked {
            assert!(misdeed.to_string().len() < 1000, "{misdeed}");
        }
        in_order
    }
}

/// Tells whether addresses are whole pages where an application can have some.
fn is_range(start: u64, end: u128) -> bool {
    let page = page_size() as u128;
    let start = u128::from(start);
    0 < start && start < end && end <= 1 << 56 && start.is_multiple_of(page) && end.is_multiple_of(page)
}

/// Tells whether memory has all that an offer says.
fn is_there(offer: &Offer, memory: Memory) -> bool {
    let page = page_size() as u64;
    let end = u128::from(offer.base) + u128::from(offer.nr_pages) * u128::from(page);
    let stays = memory.seals[0] && (offer.expandable || memory.seals[1]) && end <= MEMORY_BYTES.into();
    memory.is_memory
        && memory.writable != offer.read_only
        && offer.page_bytes == page
        && offer.base.is_multiple_of(page)
        && offer.residency < 3
        && end < 1 << 63
        && (offer.shared || stays)
        // What is only read is not registered: it must be whole, and stay so.
        && !(offer.read_only && (offer.shared || offer.expandable))
}

fn lifelines() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
}

fn memory(seals: SealFlag) -> OwnedFd {
    let memfd = memfd_create("fuzzing", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).unwrap();
    // Without a hole.
    assert_eq!(write(&memfd, &vec![7; MEMORY_BYTES as usize]), Ok(MEMORY_BYTES as usize));
    fcntl(&memfd, FcntlArg::F_ADD_SEALS(seals)).unwrap();
    memfd
}
