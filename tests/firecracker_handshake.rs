//! The message of a VM's monitor on its way: pieces, descriptors, deadlines, and room for none.
#![cfg(feature = "firecracker")]

mod support;

use std::fs::{self, File};
use std::io::{IoSlice, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use kiomap::firecracker::{Handshake, HandshakeFault, Limits, Refused, parse};
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use support::peer;
use support::{DEADLINE, alone, eventually, open_descriptors, within};
use userfaultfd::{FeatureFlags, Uffd};

const GOOD: &[u8] = br#"[{"base_host_virt_addr":8192,"size":4096,"offset":0,"page_size":4096}]"#;

fn userfaultfd() -> Uffd {
    peer::open(FeatureFlags::empty()).expect("no feature needs no privilege")
}

fn send(stream: &UnixStream, bytes: &[u8], descriptors: &[RawFd]) {
    let rights = [ControlMessage::ScmRights(descriptors)];
    let rights = if descriptors.is_empty() { &[][..] } else { &rights };
    let sent = sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(bytes)], rights, MsgFlags::MSG_NOSIGNAL, None);
    assert_eq!(sent, Ok(bytes.len()));
}

fn receive(socket: &UnixStream) -> Result<Handshake, Refused> {
    Handshake::receive(socket, Instant::now() + DEADLINE / 2, &Limits::new())
}

/// What comes of a message that is sent in pieces of so many bytes, the first with a descriptor, before a hang-up.
fn in_pieces(message: &[u8], piece: usize) -> Result<Handshake, Refused> {
    let (ours, theirs) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut theirs = theirs;
            let uffd = userfaultfd();
            let first = piece.min(message.len());
            if first > 0 {
                send(&theirs, &message[..first], &[uffd.as_raw_fd()]);
            }
            // What was refused is not read to its end.
            let _ = message[first..].chunks(piece).try_for_each(|piece| theirs.write_all(piece));
        });
        let received = receive(&ours);
        drop(ours);
        received
    })
}

/// Each message of the fuzzer's corpus comes to the same in whatever pieces.
#[test]
fn pieces_of_any_size_are_put_together() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus/handshake");
    let mut good = 0;
    for file in fs::read_dir(corpus).unwrap() {
        let path = file.unwrap().path();
        let message = fs::read(&path).unwrap();
        let whole = parse(&message, &Limits::new());
        for piece in [1, 2, 3, 7, 64, 1000, 4095, 4096, 4097, 70_000] {
            let received = in_pieces(&message, piece);
            let shown = path.display();
            match (&whole, received) {
                (Ok(regions), Ok(handshake)) => {
                    assert_eq!(handshake.regions, *regions, "{shown}");
                    good += 1;
                }
                // What comes after the last bracket may come too late to be seen.
                (Err(HandshakeFault::Trailing), _) => {}
                (Err(_), Err(refused)) => assert!(message.is_empty() || refused.uffd.is_some(), "{shown}: {refused}"),
                (whole, received) => panic!("{shown} in pieces of {piece}: {whole:?}, but {received:?}"),
            }
        }
    }
    assert!(good >= 50, "{good}");
}

#[test]
fn the_first_descriptor_is_kept_and_all_others_are_closed() {
    alone("the_first_descriptor_is_kept_and_all_others_are_closed", || {
        let (ours, theirs) = UnixStream::pair().unwrap();
        // The first is known by what it is.
        let (uffd, file) = (userfaultfd(), tempfile::tempfile().unwrap());
        let mut numbers = vec![file.as_raw_fd(); 253];
        numbers[0] = uffd.as_raw_fd();
        let before = open_descriptors();
        for nr in [1, 2, 3, 10, 252, 253] {
            send(&theirs, GOOD, &numbers[..nr]);
            let handshake = receive(&ours).unwrap();
            assert_eq!(open_descriptors(), before + 1, "{nr}");
            assert!(is_userfaultfd(&handshake.uffd), "{nr}");
        }
        // In each of several pieces.
        send(&theirs, &GOOD[..10], &numbers[..3]);
        let rest = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            send(&theirs, &GOOD[10..], &numbers[3..200]);
            theirs
        });
        let handshake = receive(&ours).unwrap();
        let theirs = rest.join().unwrap();
        assert_eq!(open_descriptors(), before + 1);
        assert!(is_userfaultfd(&handshake.uffd));
        drop(handshake);
        // And of a message that is refused.
        send(&theirs, b"[7]", &[uffd.as_raw_fd(), file.as_raw_fd()]);
        let Refused { fault, uffd, .. } = receive(&ours).unwrap_err();
        assert!(matches!(fault, HandshakeFault::NotOne { .. }), "{fault}");
        assert!(is_userfaultfd(&uffd.unwrap()));
        assert_eq!(open_descriptors(), before);
    });
}

fn is_userfaultfd(fd: &OwnedFd) -> bool {
    fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap().as_os_str() == "anon_inode:[userfaultfd]"
}

/// What is no userfaultfd is refused by its name, before the message is complete, whatever comes behind it; and closed.
#[test]
fn only_a_userfaultfd_is_taken() {
    alone("only_a_userfaultfd_is_taken", || {
        let uffd = userfaultfd();
        let file = tempfile::tempfile().unwrap();
        let before = open_descriptors();
        for nr in [1, 2, 253] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let mut numbers = vec![uffd.as_raw_fd(); nr];
            numbers[0] = file.as_raw_fd();
            send(&theirs, &GOOD[..1], &numbers);
            let Refused { fault, uffd, .. } = receive(&ours).unwrap_err();
            assert!(matches!(&fault, HandshakeFault::NoUserfaultfd { found } if found.contains("deleted")), "{fault}");
            assert_eq!((fault.errno(), uffd.is_none()), (Errno::EINVAL, true));
        }
        eventually("all are closed", || open_descriptors() == before);
    });
}

/// Where descriptors are short, what fits is received; where there is room for none, that is said; and nothing leaks.
#[test]
fn a_process_without_room_for_descriptors_leaks_none() {
    alone("a_process_without_room_for_descriptors_leaks_none", || {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (null, uffd) = (File::open("/dev/null").unwrap(), userfaultfd());
        let many = [uffd.as_raw_fd(); 20];
        // The free numbers below the limit are these.
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let mut held: Vec<OwnedFd> = (0..50).map(|_| null.try_clone().unwrap().into()).collect();
        let limit = held.iter().map(AsRawFd::as_raw_fd).max().unwrap() as u64 + 1;
        let before = open_descriptors();
        send(&theirs, GOOD, &many);
        setrlimit(Resource::RLIMIT_NOFILE, limit, hard).unwrap();
        let Refused { fault, uffd, .. } = receive(&ours).unwrap_err();
        assert_eq!((fault, uffd.is_none()), (HandshakeFault::NoRoom, true));
        // Room for five, of which one looks at the folder.
        held.truncate(45);
        send(&theirs, GOOD, &many);
        let handshake = receive(&ours).unwrap();
        assert_eq!(open_descriptors(), before - 5 + 1);
        drop(handshake);
        assert_eq!(open_descriptors(), before - 5);
    });
}

#[test]
fn a_message_has_until_its_deadline() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let uffd = userfaultfd();
    let soon = |ours: &UnixStream| {
        let ours = ours.try_clone().unwrap();
        within(DEADLINE, move || {
            let began = Instant::now();
            let refused = Handshake::receive(&ours, began + Duration::from_millis(50), &Limits::new()).unwrap_err();
            assert!(began.elapsed() >= Duration::from_millis(50));
            (refused.fault, refused.uffd.is_some())
        })
    };
    assert_eq!(soon(&ours), (HandshakeFault::TimedOut { received: 0 }, false));
    send(&theirs, &GOOD[..30], &[uffd.as_raw_fd()]);
    assert_eq!(soon(&ours), (HandshakeFault::TimedOut { received: 30 }, true));
    // Nor does somebody gain time who goes on talking.
    send(&theirs, b" ", &[uffd.as_raw_fd()]);
    let talks = std::thread::spawn(move || {
        while theirs.write_all(b" ").is_ok() {
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    let (fault, had_descriptor) = soon(&ours);
    assert!(matches!(fault, HandshakeFault::TimedOut { received: 1.. }) && had_descriptor, "{fault}");
    assert_eq!(fault.errno(), Errno::ETIMEDOUT);
    drop(ours);
    talks.join().unwrap();
}

#[test]
fn limits_are_those_that_were_set() {
    let limited = |limits: &Limits, message: &[u8]| {
        let (ours, theirs) = UnixStream::pair().unwrap();
        send(&theirs, message, &[userfaultfd().as_raw_fd()]);
        Handshake::receive(&ours, Instant::now() + DEADLINE, limits).map_err(|refused| refused.fault)
    };
    let limits = Limits::new().message_bytes(GOOD.len());
    assert_eq!(limited(&limits, GOOD).unwrap().regions.len(), 1);
    let short = Limits::new().message_bytes(GOOD.len() - 1);
    assert_eq!(limited(&short, GOOD).unwrap_err(), HandshakeFault::TooLong { limit: GOOD.len() - 1 });
    assert_eq!(parse(GOOD, &short), Err(HandshakeFault::TooLong { limit: GOOD.len() - 1 }));
    let few = limited(&Limits::new().regions(0), GOOD).unwrap_err();
    assert_eq!(few, HandshakeFault::TooManyRegions { found: 1, limit: 0 });
}
