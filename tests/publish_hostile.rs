//! Processes that connect to a published vmap and do what they should not: each is cut off or refused, and nobody else is harmed.

#[path = "publish/client.rs"]
mod client;
#[path = "publish/raw.rs"]
mod raw;
mod support;

use std::io::IoSlice;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant};

use client::{Place, Program};
use kiomap::{AttachOptions, CLIENT_AREAS_MAX, Engine, PublishOptions, Vmap, page_size};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessage, MsgFlags, recv, sendmsg};
use nix::unistd::Pid;
use raw::{Line, Offer, ask, fork, frame, greet, header, knock, lifelines, reply, userfaultfd};
use support::scene::{Rng, at};
use support::{
    DEADLINE, alone, alone_for, engine_builder, eventually, mark, open_descriptors, pages, pidfd, threads, touch,
    without_poison,
};

/// How soon others must be served whatever one does.
const PROMPT: Duration = Duration::from_secs(2);
/// Where somebody might have something mapped.
const SOMEWHERE: u64 = 0x7000_0000_0000;
/// An address of the kernel.
const KERNEL: u64 = 0xffff_8000_0000_0000;

/// Not a test of its own: what the others start as their clients.
#[test]
#[ignore = "the other tests run it as their client"]
fn a_client_does_what_it_is_told() {
    client::program(misbehave);
}

/// What becomes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// It is cut, and counted as such.
    Cut,
    /// It ends, as the other side wanted it.
    Left,
    /// What was asked is refused, and it goes on.
    Refused,
}

use End::{Cut, Left, Refused};

/// How far the process plays by the rules before.
enum Stage {
    /// It has connected.
    Connected(fn(&Line)),
    /// It was let in.
    Offered(fn(&Line, &Offer)),
    /// It is served.
    Served(fn(&Line, &Offer, OwnedFd)),
}

use Stage::{Connected, Offered, Served};

/// One kind of misbehaviour: its name, what it does, and what becomes of it.
struct Kind(&'static str, Stage, End);

fn say(line: &Line, bytes: &[u8], descriptors: &[RawFd]) {
    // That it was cut off already is found out by hearing its end.
    let _ = line.say(bytes, descriptors);
}

fn pipe_end() -> OwnedFd {
    std::io::pipe().unwrap().0.into()
}

fn hello(line: &Line, descriptors: &[RawFd]) {
    say(line, &frame(&[ask::HELLO, 2, 0, 0]), descriptors);
}

fn attach(line: &Line, offer: &Offer, start: u64, len: u64, pgoff: u64, flags: u64) {
    say(line, &frame(&[ask::ATTACH, start, len, pgoff, 1, offer.vmap, flags]), &[]);
}

fn page() -> u64 {
    page_size() as u64
}

#[track_caller]
fn refused(line: &Line) {
    let heard = line.hear().expect("an answer");
    assert_eq!(heard.body[0], reply::REFUSED, "{:?}", heard.body);
}

#[track_caller]
fn answered(line: &Line, with: u8) {
    let heard = line.hear().expect("an answer");
    assert_eq!(heard.body[0], with, "{:?}", heard.body);
}

const KINDS: &[Kind] = &[
    // What is said first.
    Kind("rubbish", Connected(|line| say(line, b"GET / HTTP/1.1\r\n\r\n", &[])), Cut),
    Kind(
        "another_magic",
        Connected(|line| say(line, &[b"moik".as_slice(), &1_u32.to_le_bytes(), &[0, 0]].concat(), &[])),
        Cut,
    ),
    Kind("an_older_version", Connected(|line| say(line, &[&header(0)[..], &[0, 0]].concat(), &[])), Cut),
    Kind("a_newer_version", Connected(|line| say(line, &[&header(2)[..], &[0, 0]].concat(), &[])), Cut),
    Kind("half_a_header", Connected(|line| say(line, b"kiom", &[])), Cut),
    Kind("a_header_alone", Connected(|line| say(line, &header(1), &[])), Cut),
    Kind("a_truncated_frame", Connected(|line| say(line, &frame(&[0]), &[])), Cut),
    Kind("more_behind_a_frame", Connected(|line| say(line, &frame(&[0, 0, 0]), &[])), Cut),
    Kind("a_frame_of_no_kind", Connected(|line| say(line, &frame(&[77, 0]), &[])), Cut),
    Kind("a_number_without_end", Connected(|line| say(line, &[&header(1)[..], &[0xff; 40]].concat(), &[])), Cut),
    Kind("neither_true_nor_false", Connected(|line| say(line, &frame(&[0, 2]), &[])), Cut),
    Kind("an_oversized_frame", Connected(|line| say(line, &[&frame(&[0, 0])[..], &[0; 4096]].concat(), &[])), Cut),
    Kind("as_much_as_fits", Connected(|line| say(line, &[0; 100_000], &[])), Cut),
    Kind("an_empty_message", Connected(|line| say(line, &[], &[])), Left),
    Kind("a_descriptor_too_early", Connected(|line| say(line, &frame(&[0, 0]), &[pipe_end().as_raw_fd()])), Cut),
    Kind("253_descriptors", Connected(|line| say(line, &frame(&[0, 0]), &[pipe_end().as_raw_fd(); 253])), Cut),
    Kind("a_leave_before_a_word", Connected(|_| ()), Left),
    // Before the greeting.
    Kind("a_leave_before_the_greeting", Offered(|_, _| ()), Left),
    Kind("rubbish_for_a_greeting", Offered(|line, _| say(line, &[0x5a; 64], &[])), Cut),
    Kind("an_attach_before_the_greeting", Offered(|line, offer| attach(line, offer, SOMEWHERE, page(), 0, 1)), Cut),
    Kind("a_fork_before_the_greeting", Offered(|line, _| say(line, &frame(&[ask::FORK]), &[])), Cut),
    Kind(
        "a_count_before_the_greeting",
        Offered(|line, offer| say(line, &frame(&[ask::REFCOUNT, offer.vmap]), &[])),
        Cut,
    ),
    Kind("an_end_before_the_greeting", Offered(|line, _| say(line, &frame(&[ask::BYE]), &[])), Cut),
    Kind(
        "a_pidfd_of_another",
        Offered(|line, _| say(line, &frame(&[ask::WATCH]), &[pidfd(Pid::from_raw(1)).as_raw_fd()])),
        Cut,
    ),
    Kind(
        "a_pidfd_of_its_own",
        Offered(|line, _| say(line, &frame(&[ask::WATCH]), &[pidfd(Pid::this()).as_raw_fd()])),
        Cut,
    ),
    Kind("a_taken_range", Offered(|line, _| say(line, &frame(&[ask::TAKEN, SOMEWHERE, SOMEWHERE + page()]), &[])), Cut),
    Kind("masks_to_a_pipe", Offered(|line, _| say(line, &frame(&[ask::MASKS]), &[pipe_end().as_raw_fd()])), Cut),
    Kind("a_greeting_without_a_descriptor", Offered(|line, _| hello(line, &[])), Cut),
    Kind("a_greeting_with_a_pipe", Offered(|line, _| hello(line, &[pipe_end().as_raw_fd()])), Cut),
    Kind(
        "a_greeting_with_a_file",
        Offered(|line, _| hello(line, &[std::fs::File::open("/proc/self/exe").unwrap().as_raw_fd()])),
        Cut,
    ),
    Kind(
        "a_greeting_with_a_folder",
        Offered(|line, _| hello(line, &[std::fs::File::open("/").unwrap().as_raw_fd()])),
        Cut,
    ),
    Kind(
        "a_greeting_with_an_eventfd",
        Offered(|line, _| hello(line, &[nix::sys::eventfd::EventFd::new().unwrap().as_raw_fd()])),
        Cut,
    ),
    Kind("a_greeting_with_a_pidfd", Offered(|line, _| hello(line, &[pidfd(Pid::from_raw(1)).as_raw_fd()])), Cut),
    Kind("a_greeting_with_the_memfd", Offered(|line, offer| hello(line, &[offer.memfd.as_raw_fd()])), Cut),
    Kind("a_greeting_with_its_own_connection", Offered(|line, _| hello(line, &[line.fd().as_raw_fd()])), Cut),
    Kind("a_userfaultfd_without_a_handshake", Offered(|line, _| hello(line, &[userfaultfd(None).as_raw_fd()])), Cut),
    Kind(
        "a_userfaultfd_that_reports_nothing",
        Offered(|line, _| hello(line, &[userfaultfd(Some(0)).as_raw_fd()])),
        Cut,
    ),
    Kind(
        "two_userfaultfds",
        Offered(|line, offer| hello(line, &[userfaultfd(Some(offer.features)).as_raw_fd(); 2])),
        Cut,
    ),
    Kind("a_greeting_of_failure", Offered(|line, _| say(line, &frame(&[ask::HELLO, 2, 24, 0]), &[])), Left),
    // When it is served.
    Kind("a_second_greeting", Served(|line, _, uffd| hello(line, &[uffd.as_raw_fd()])), Cut),
    Kind(
        "an_unknown_vmap",
        Served(|line, _, _| say(line, &frame(&[ask::ATTACH, SOMEWHERE, page(), 0, 1, 999, 1]), &[])),
        Cut,
    ),
    Kind(
        "another_vmap",
        Served(|line, offer, _| say(line, &frame(&[ask::ATTACH, SOMEWHERE, page(), 0, 1, offer.vmap + 1, 1]), &[])),
        Cut,
    ),
    Kind(
        "the_count_of_another_vmap",
        Served(|line, offer, _| say(line, &frame(&[ask::REFCOUNT, offer.vmap + 1]), &[])),
        Cut,
    ),
    Kind("an_unaligned_start", Served(|line, offer, _| attach(line, offer, SOMEWHERE + 1, page(), 0, 1)), Cut),
    Kind("an_unaligned_length", Served(|line, offer, _| attach(line, offer, SOMEWHERE, page() + 1, 0, 1)), Cut),
    Kind("no_length", Served(|line, offer, _| attach(line, offer, SOMEWHERE, 0, 0, 1)), Cut),
    Kind("the_zeroth_page", Served(|line, offer, _| attach(line, offer, 0, page(), 0, 1)), Cut),
    Kind(
        "a_range_around_the_end",
        Served(|line, offer, _| attach(line, offer, u64::MAX - page() + 1, 2 * page(), 0, 1)),
        Cut,
    ),
    Kind(
        "all_addresses",
        Served(|line, offer, _| attach(line, offer, page(), 0u64.wrapping_sub(2 * page()), 0, 1)),
        Cut,
    ),
    Kind("a_range_of_the_kernel", Served(|line, offer, _| attach(line, offer, KERNEL, page(), 0, 1)), Cut),
    Kind(
        "a_page_that_no_file_has",
        Served(|line, offer, _| attach(line, offer, SOMEWHERE, page(), u64::MAX - 1, 1)),
        Cut,
    ),
    Kind("unknown_flags", Served(|line, offer, _| attach(line, offer, SOMEWHERE, page(), 0, 1 << 5)), Cut),
    Kind(
        "huge_pages_of_its_own",
        Served(|line, offer, _| attach(line, offer, SOMEWHERE, page(), 0, 1 | 4096 << 32)),
        Cut,
    ),
    Kind(
        "an_attach_with_a_descriptor",
        Served(|line, offer, uffd| {
            say(line, &frame(&[ask::ATTACH, SOMEWHERE, page(), 0, 1, offer.vmap, 1]), &[uffd.as_raw_fd()]);
        }),
        Cut,
    ),
    Kind(
        "an_overlap",
        Served(|line, offer, _| {
            attach(line, offer, SOMEWHERE, 4 * page(), 0, 1);
            answered(line, reply::ATTACHED);
            attach(line, offer, SOMEWHERE + page(), page(), 0, 1);
            refused(line);
        }),
        Refused,
    ),
    Kind(
        "a_range_that_is_not_mapped",
        Served(|line, offer, _| {
            attach(line, offer, SOMEWHERE, 1 << 40, 0, 1);
            answered(line, reply::ATTACHED);
            say(line, &frame(&[ask::LOOK_UP, SOMEWHERE]), &[]);
            answered(line, reply::DONE);
        }),
        Refused,
    ),
    Kind(
        "an_end_with_areas",
        Served(|line, offer, _| {
            attach(line, offer, SOMEWHERE, page(), 0, 1);
            answered(line, reply::ATTACHED);
            say(line, &frame(&[ask::BYE]), &[]);
            refused(line);
        }),
        Refused,
    ),
    Kind(
        "an_unknown_region",
        Served(|line, _, _| {
            say(line, &frame(&[ask::PIECES, 77]), &[]);
            answered(line, reply::PIECES);
        }),
        Refused,
    ),
    Kind(
        "100000_attaches",
        Served(|line, offer, _| {
            for n in 0..100_000 {
                if line
                    .say(&frame(&[ask::ATTACH, SOMEWHERE + 2 * n * page(), page(), 0, n, offer.vmap, 1]), &[])
                    .is_err()
                {
                    return;
                }
                if line.hear().is_none() {
                    return assert!(n <= CLIENT_AREAS_MAX as u64 + 1, "{n}");
                }
            }
            panic!("all were served");
        }),
        Cut,
    ),
    Kind("questions_without_listening", Served(|line, _, _| while line.say(&frame(&[ask::SYNC]), &[]).is_ok() {}), Cut),
    Kind("a_fork_with_a_pipe", Served(|line, _, _| say(line, &frame(&[ask::FORK]), &[pipe_end().as_raw_fd()])), Cut),
    Kind(
        "a_fork_with_a_lifeline",
        Served(|line, _, _| say(line, &frame(&[ask::FORK]), &[lifelines().0.as_raw_fd()])),
        Cut,
    ),
    Kind(
        "1000_forks",
        Served(|line, _, _| {
            let mut kept = Vec::new();
            let is_refused = (0..1000).any(|_| {
                let child = fork(line);
                let is_refused = child.is_none();
                kept.extend(child);
                is_refused
            });
            assert!(is_refused && kept.len() <= PROCESSES);
        }),
        Refused,
    ),
    Kind(
        "a_child_of_another_kind",
        Served(|line, _, _| {
            let ours = fork(line).unwrap();
            // What is said for the child is looked at, too.
            sendto(&ours, b"rubbish");
            let mut byte = [0; 64];
            assert_eq!(recv(ours.as_raw_fd(), &mut byte, MsgFlags::empty()).unwrap_or(0), 0);
            // The parent is cut off for something of its own.
            say(line, b"rubbish", &[]);
        }),
        Cut,
    ),
    Kind(
        "a_child_with_two_pidfds",
        Served(|line, _, _| {
            let child = fork(line).unwrap();
            let pidfd = pidfd(Pid::this());
            let bytes = frame(&[ask::WATCH]);
            for _ in 0..2 {
                let rights = [ControlMessage::ScmRights(&[pidfd.as_raw_fd()])];
                sendmsg::<()>(child.as_raw_fd(), &[IoSlice::new(&bytes)], &rights, MsgFlags::MSG_NOSIGNAL, None)
                    .unwrap();
            }
            assert_eq!(recv(child.as_raw_fd(), &mut [0; 64], MsgFlags::empty()).unwrap_or(0), 0);
            say(line, b"rubbish", &[]);
        }),
        Cut,
    ),
    Kind("a_region_that_reads_only", Served(|line, _, _| say(line, &frame(&[ask::DETACHED, 1]), &[])), Cut),
    Kind(
        "a_range_taken_late",
        Served(|line, _, _| say(line, &frame(&[ask::TAKEN, SOMEWHERE, SOMEWHERE + page()]), &[])),
        Cut,
    ),
    Kind("an_unmap_between_pages", Served(|line, _, _| say(line, &frame(&[ask::UNMAPPED, SOMEWHERE + 1]), &[])), Cut),
    Kind("a_look_at_the_kernel", Served(|line, _, _| say(line, &frame(&[ask::LOOK_UP, KERNEL]), &[])), Cut),
    Kind("half_a_request", Served(|line, _, _| say(line, &frame(&[ask::ATTACH, SOMEWHERE]), &[])), Cut),
    Kind("a_leave_in_the_middle", Served(|line, offer, _| attach(line, offer, SOMEWHERE, page(), 0, 1)), Left),
    Kind(
        "a_userfaultfd_that_blocks",
        Served(|line, offer, uffd| {
            attach(line, offer, SOMEWHERE, page(), 0, 1);
            answered(line, reply::ATTACHED);
            let deadline = Instant::now() + Duration::from_millis(100);
            while Instant::now() < deadline {
                fcntl(&uffd, FcntlArg::F_SETFL(OFlag::O_RDWR)).unwrap();
            }
        }),
        Refused,
    ),
];

/// The most processes that are served at once.
const PROCESSES: usize = 64;

fn sendto(socket: &OwnedFd, bytes: &[u8]) {
    nix::sys::socket::send(socket.as_raw_fd(), bytes, nix::sys::socket::MsgFlags::MSG_NOSIGNAL).unwrap();
}

/// In the program that misbehaves: does it, and says what becomes of it.
fn misbehave(socket: &Path, words: &[&str]) -> String {
    match *words {
        ["do", name] => {
            let Kind(_, stage, end) = KINDS.iter().find(|kind| kind.0 == name).expect("a kind of that name");
            let line = match stage {
                Connected(act) => {
                    let line = Line::connect(socket);
                    act(&line);
                    line
                }
                Offered(act) => {
                    let (line, offer) = knock(socket);
                    act(&line, &offer);
                    line
                }
                Served(act) => {
                    let (line, offer) = knock(socket);
                    let uffd = greet(&line, &offer);
                    act(&line, &offer, uffd);
                    line
                }
            };
            match end {
                Cut => line.hear_the_end(),
                Refused if name != "a_userfaultfd_that_blocks" => {
                    // It goes on to be answered.
                    say(&line, &frame(&[ask::SYNC]), &[]);
                    answered(&line, reply::DONE);
                }
                Refused | Left => {}
            }
            "done".into()
        }
        // Holds so many connections of which nothing is heard.
        ["hold", count] => {
            let count: usize = count.parse().unwrap();
            let lines: Vec<_> = (0..count).map(|_| Line::connect(socket)).collect();
            std::mem::forget(lines);
            "done".into()
        }
        ["hold-offered"] => {
            std::mem::forget(knock(socket));
            "done".into()
        }
        // Is served, and gives its connection to a process that outlives it, and knows nothing of it.
        ["bequeath"] => {
            let (line, offer) = knock(socket);
            let uffd = greet(&line, &offer);
            attach(&line, &offer, SOMEWHERE, page(), 0, 1);
            answered(&line, reply::ATTACHED);
            // SAFETY: a raw clone without a stack is a fork, of which this library's handlers hear nothing; the child sleeps.
            let child = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
            if child == 0 {
                loop {
                    // SAFETY: a plain system call.
                    unsafe { libc::pause() };
                }
            }
            std::mem::forget((line, uffd));
            child.to_string()
        }
        _ => panic!("told to {words:?}"),
    }
}

/// Fails unless another client is served at once.
#[track_caller]
fn others_are_served(other: &mut Program, page: u64, after: &str) {
    let start = Instant::now();
    other.ok("detach");
    other.ok("attach 0");
    assert_eq!(other.number(&format!("read {}", page % PAGES)), u64::from(mark(page % PAGES)), "after {after}");
    assert!(start.elapsed() < PROMPT, "{:?} after {after}", start.elapsed());
}

const PAGES: u64 = 4096;

struct Scene {
    engine: Engine,
    vmap: Vmap,
    _beside: Vmap,
    place: Place,
    published: kiomap::Published,
}

fn scene(engine: Engine, options: PublishOptions) -> Scene {
    let place = Place::new();
    let vmap = engine.vmap(&pages(PAGES)).unwrap();
    let beside = engine.vmap(&pages(4)).unwrap();
    assert_eq!(beside.id(), vmap.id() + 1);
    let published = vmap.publish(place.socket(), options.processes(PROCESSES)).unwrap();
    Scene { engine, vmap, _beside: beside, place, published }
}

/// Every kind of misbehaviour ends as it should, is counted if it is one, and harms nobody: another client is served right after,
/// and nothing is left of it.
#[test]
fn whoever_misbehaves_is_cut_off_and_nobody_else() {
    alone_for(3 * DEADLINE, "whoever_misbehaves_is_cut_off_and_nobody_else", || {
        assert!(KINDS.len() >= 50, "{}", KINDS.len());
        let Scene { engine, vmap, place, published, _beside } =
            scene(engine_builder().fault_around_pages(1).build().unwrap(), PublishOptions::new());
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let mut other = Program::attached(&place.socket());
        others_are_served(&mut other, 0, "nothing");
        let (descriptors, nr_threads) = (open_descriptors(), lasting());
        for (n, Kind(name, _, end)) in KINDS.iter().enumerate() {
            let before = engine.stats().clients_shed;
            let mut program = Program::start(&place.socket());
            assert_eq!(program.ask(&format!("do {name}")), "done", "{name}");
            others_are_served(&mut other, n as u64, name);
            if *end == Cut {
                eventually(name, || engine.stats().clients_shed > before);
            }
            program.end();
            eventually(name, || published.clients().unwrap().len() == 1);
            engine.settle().unwrap();
            let shed = engine.stats().clients_shed - before;
            // That of a child is one of its own.
            let expected = u64::from(*end == Cut) + u64::from(name.starts_with("a_child_"));
            assert_eq!(shed, expected, "{name}");
            eventually(name, || vmap.refcount().unwrap() == 2);
            eventually(name, || open_descriptors() == descriptors);
        }
        for page in 0..PAGES {
            assert_eq!(touch::read(at(&region, page)), Ok(mark(page)));
        }
        eventually("no thread is left", || lasting() == nr_threads);
        assert_eq!(engine.stats().panics, 0);
        other.end();
    });
}

/// The threads of this process, but for those that come when they are needed.
fn lasting() -> usize {
    threads().into_iter().filter(|name| name != "kiomap-worker").count()
}

/// The same where pages are masked for want of poison: a greeting without a socket for that is none.
#[test]
fn without_poison_a_greeting_needs_a_socket_for_masks() {
    alone("without_poison_a_greeting_needs_a_socket_for_masks", || {
        let Scene { engine, place, .. } = &scene(without_poison().build().unwrap(), PublishOptions::new());
        let mut other = Program::attached(&place.socket());
        for name in ["masks_to_a_pipe", "a_second_greeting", "an_overlap", "questions_without_listening"] {
            let mut program = Program::start(&place.socket());
            assert_eq!(program.ask(&format!("do {name}")), "done", "{name}");
            others_are_served(&mut other, 7, name);
            program.end();
        }
        assert_eq!(engine.stats().panics, 0);
    });
}

/// A megabyte of random bytes, in frames of all lengths, before a word, after the offer and when served: all cut off.
#[test]
fn random_bytes_are_cut_off() {
    alone_for(2 * DEADLINE, "random_bytes_are_cut_off", || {
        let Scene { engine, vmap, place, .. } = &scene(engine_builder().build().unwrap(), PublishOptions::new());
        let mut other = Program::attached(&place.socket());
        let mut rng = Rng::new(7);
        let (mut sent, mut rounds) = (0, 0);
        while sent < 1 << 20 {
            rounds += 1;
            let mut bytes: Vec<u8> = (0..1 + rng.below(2000)).map(|_| rng.next() as u8).collect();
            if rng.below(4) > 0 {
                // What comes behind the header is then looked at.
                let (header, kind) = (header(raw::VERSION), rng.below(16) as u8);
                bytes.truncate(1 + rng.below(60) as usize);
                bytes.splice(..1, header.into_iter().chain([kind]));
            }
            let line = match rounds % 3 {
                0 => Line::connect(&place.socket()),
                1 => knock(&place.socket()).0,
                _ => {
                    let (line, offer) = knock(&place.socket());
                    drop(greet(&line, &offer));
                    line
                }
            };
            // Until it is cut off: some of it may be a request.
            for _ in 0..200 {
                sent += bytes.len();
                if line.say(&bytes, &[]).is_err() {
                    break;
                }
            }
            if rounds % 16 == 0 {
                others_are_served(&mut other, rounds, "random bytes");
            }
        }
        other.ok("detach");
        eventually("nothing of them is counted", || {
            engine.settle().unwrap();
            vmap.refcount().unwrap() == 0
        });
        assert!(engine.stats().clients_shed > rounds / 2, "{} of {rounds}", engine.stats().clients_shed);
        assert_eq!(engine.stats().panics, 0);
    });
}

/// Whoever says nothing keeps nobody from being served, however many they are, and is cut off when its time is over.
#[test]
fn silent_connections_keep_nobody_away() {
    alone("silent_connections_keep_nobody_away", || {
        let options = PublishOptions::new().greeting_timeout(Duration::from_secs(2));
        let Scene { engine, place, published, .. } = &scene(engine_builder().build().unwrap(), options);
        let descriptors = open_descriptors();
        let mut holders: Vec<_> = (0..4).map(|_| Program::start(&place.socket())).collect();
        holders.iter_mut().for_each(|holder| assert_eq!(holder.ask("hold 200"), "done"));
        let mut offered = Program::start(&place.socket());
        assert_eq!(offered.ask("hold-offered"), "done");
        let start = Instant::now();
        let mut program = Program::attached(&place.socket());
        assert_eq!(program.number("read 9"), u64::from(mark(9)));
        assert!(start.elapsed() < PROMPT, "{:?}", start.elapsed());
        // Stopped, with a connection in each state.
        holders.iter().chain([&offered]).for_each(|holder| kill(holder.pid(), Signal::SIGSTOP).unwrap());
        others_are_served(&mut program, 10, "a stop");
        eventually("all are cut off", || engine.stats().clients_shed == 801);
        eventually("and nothing is left of them", || published.clients().unwrap().len() == 1);
        drop((program, holders, offered));
        eventually("descriptors are back", || open_descriptors() == descriptors);
    });
}

/// A client that is stopped while it is served, or in a fault, keeps nobody from being served; nor does it lose anything.
#[test]
fn a_stopped_client_holds_nobody_up() {
    alone("a_stopped_client_holds_nobody_up", || {
        let Scene { vmap, place, .. } =
            &scene(engine_builder().fault_around_pages(1).build().unwrap(), PublishOptions::new());
        let mut stopped = Program::attached(&place.socket());
        let mut other = Program::attached(&place.socket());
        for round in 0..5 {
            stopped.tell("sum 0 200");
            kill(stopped.pid(), Signal::SIGSTOP).unwrap();
            others_are_served(&mut other, 300 + round, "a stop");
            assert_eq!(vmap.refcount().unwrap(), 2);
            kill(stopped.pid(), Signal::SIGCONT).unwrap();
            assert_eq!(stopped.hear(), (0..200).map(|page| u64::from(mark(page))).sum::<u64>().to_string());
        }
    });
}

/// A client that closes every descriptor goes on to be served, as a forked child does, and is counted out at its end.
#[test]
fn a_client_that_closes_everything_is_served_and_counted() {
    alone("a_client_that_closes_everything_is_served_and_counted", || {
        let Scene { engine, vmap, place, published, .. } =
            &scene(engine_builder().fault_around_pages(1).build().unwrap(), PublishOptions::new());
        let mut other = Program::attached(&place.socket());
        let mut program = Program::attached(&place.socket());
        program.ok("close-everything");
        assert_eq!(program.number("read 77"), u64::from(mark(77)));
        others_are_served(&mut other, 78, "closing everything");
        assert_eq!(vmap.refcount().unwrap(), 2);
        program.kill();
        eventually("it is counted out", || vmap.refcount().unwrap() == 1 && published.clients().unwrap().len() == 1);
        assert_eq!(engine.stats().clients_shed, 0);
    });
}

/// A connection that outlives its client, in a process that knows nothing of it, keeps nothing counted.
#[test]
fn a_connection_that_outlives_its_client_counts_nothing() {
    alone("a_connection_that_outlives_its_client_counts_nothing", || {
        let Scene { vmap, place, published, .. } = &scene(engine_builder().build().unwrap(), PublishOptions::new());
        let mut program = Program::start(&place.socket());
        let heir = Pid::from_raw(program.number("bequeath") as i32);
        assert_eq!((vmap.refcount().unwrap(), published.clients().unwrap().len()), (1, 1));
        program.kill();
        eventually("it is counted out", || vmap.refcount().unwrap() == 0 && published.clients().unwrap().is_empty());
        assert_eq!(kill(heir, None), Ok(()), "the heir lives");
        Program::attached(&place.socket()).end();
        kill(heir, Signal::SIGKILL).unwrap();
    });
}
