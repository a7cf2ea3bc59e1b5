//! Peers that send the handler what they should not, or behave as no VM does. Each is a process. After each of them the handler
//! lives, has no descriptor more than before, and serves a VM rightly.
#![cfg(feature = "firecracker")]

mod firecracker_support;
mod support;

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Write, pipe};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use firecracker_support::guest::{Guest, Order, Version, right_or_sigbus, send, userfaultfd, verify};
use firecracker_support::memory::Random;
use firecracker_support::{Handler, Monitor, Plan, Stage, plan, say, wait_for_word};
use kiomap::page_size;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollCreateFlags};
use nix::sys::eventfd::EventFd;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, raise};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use nix::sys::wait::WaitStatus;
use serde_json::{Value, json};
use support::{fork_child, reap, touch};
use userfaultfd::FeatureFlags;

/// What plays the peers.
const ENTRY: &str = "peer";
const BYTES: usize = 1 << 20;

/// What the handler does with a peer.
enum Expect {
    /// It is refused, and the reason says this.
    Refused(&'static str),
    /// It is served until it ends.
    Served,
}
use Expect::{Refused, Served};

/// How a peer ends.
enum Ends {
    /// By itself, without an error.
    Well,
    /// It is killed when the handler has done what is expected.
    Killed,
}
use Ends::{Killed, Well};

struct Case {
    name: &'static str,
    play: fn(&Plan),
    expect: Expect,
    ends: Ends,
}

const fn case(name: &'static str, play: fn(&Plan), expect: Expect) -> Case {
    Case { name, play, expect, ends: Well }
}

const fn killed(name: &'static str, play: fn(&Plan), expect: Expect) -> Case {
    Case { name, play, expect, ends: Killed }
}

/// Messages that are wrong, with a userfaultfd that is right.
const MESSAGES: &[Case] = &[
    case("not JSON", |plan| text(plan, "regions, please"), Refused("no JSON array of regions")),
    case("not text", |plan| bytes(plan, &[0xff; 100]), Refused("no JSON array of regions")),
    case("zeros", |plan| bytes(plan, &[0; 100]), Refused("no JSON array of regions")),
    case("an object", |plan| text(plan, &good(plan)[1..]), Refused("no JSON array of regions")),
    case("an empty array", |plan| text(plan, "[]"), Refused("has no region")),
    case("an array of numbers", |plan| text(plan, "[1,2,3]"), Refused("an object that describes a region")),
    case("an array of arrays", |plan| text(plan, "[[4096,4096,0]]"), Refused("an object that describes a region")),
    case("a negative size", |plan| field(plan, "size", json!(-4096)), Refused("invalid value")),
    case("a fraction", |plan| field(plan, "size", json!(4096.5)), Refused("floating point")),
    case("a number of more than 64 bits", |plan| raw_field(plan, "18446744073709551616"), Refused("regions: ")),
    case("a number of a thousand digits", |plan| raw_field(plan, &"9".repeat(1000)), Refused("regions: ")),
    case("a number as a string", |plan| field(plan, "size", json!("4096")), Refused("invalid type: string")),
    case("a missing field", |plan| field(plan, "offset", Value::Null), Refused("invalid type: null")),
    case("no field at all", |plan| text(plan, "[{}]"), Refused("missing field")),
    case("a field twice", |plan| raw_field(plan, "4096,\"size\":8192"), Refused("duplicate field `size`")),
    case("ten thousand brackets", |plan| bytes(plan, &[b'['; 10_000]), Refused("an object that describes a region")),
    case(
        "ten thousand brackets inside",
        |plan| raw_field(plan, &("4096,\"x\":".to_owned() + &"[".repeat(10_000))),
        Refused(""),
    ),
    case("1 MiB of JSON", |plan| flood(plan, b"[{\"x\":\"", b'x'), Refused("more than 65536 bytes")),
    case("1 MiB of white space", |plan| flood(plan, b"", b' '), Refused("more than 65536 bytes")),
    case("1 MiB of white space in an array", |plan| flood(plan, b"[", b'\n'), Refused("more than 65536 bytes")),
    case("more regions than there are", |plan| many(plan, 257), Refused("257 regions: 256 at the most")),
    case("a region beyond the file", |plan| field(plan, "offset", json!(BYTES)), Refused("of a memory file of")),
    case(
        "a region larger than the file",
        |plan| field(plan, "size", json!(1u64 << 40)),
        Refused("of a memory file of"),
    ),
    case("regions that overlap", overlapping, Refused("share addresses")),
    case(
        "the same region twice",
        |plan| text(plan, &format!("[{r},{r}]", r = inner(plan))),
        Refused("share addresses"),
    ),
    case(
        "an address between pages",
        |plan| field(plan, "base_host_virt_addr", json!(4097)),
        Refused("no multiple of 4096"),
    ),
    case("an offset between pages", |plan| field(plan, "offset", json!(1)), Refused("no multiple of 4096")),
    case("a size of half a page", |plan| field(plan, "size", json!(2048)), Refused("no multiple of 4096")),
    case("an empty region", |plan| field(plan, "size", json!(0)), Refused("is empty")),
    case(
        "a region that wraps around",
        |plan| field(plan, "base_host_virt_addr", json!(!4095u64)),
        Refused("wraps around"),
    ),
    case("an offset that wraps around", |plan| field(plan, "offset", json!(!4095u64)), Refused("wraps around")),
    case(
        "a page size that nobody has",
        |plan| field(plan, "page_size", json!(8192)),
        Refused("has pages of 8192 bytes"),
    ),
    case("pages of no byte", |plan| field(plan, "page_size", json!(0)), Refused("has pages of 0 bytes")),
    case("two page sizes", |plan| field(plan, "page_size_kib", json!(4)), Refused("and of 4 by page_size_kib")),
    case("huge pages between huge pages", |plan| field(plan, "page_size", json!(2 << 20)), Refused("no multiple of")),
    case("something behind the array", |plan| text(plan, &(good(plan) + "x")), Refused("something follows the array")),
    case(
        "two messages at once",
        |plan| text(plan, &(good(plan) + &good(plan))),
        Refused("something follows the array"),
    ),
];

/// Conversations that are wrong.
const CONVERSATIONS: &[Case] = &[
    case("not a word", |plan| drop(connect(plan)), Refused("hung up in the message, after 0 bytes")),
    case("a hang-up in the message", cut_short, Refused("hung up in the message, after 20 bytes")),
    case("a half-closed socket in the message", half_closed_early, Refused("hung up in the message, after 20 bytes")),
    killed("silence", silent, Refused("not complete in time: 0 bytes")),
    killed("a message that never ends", unfinished, Refused("not complete in time: 20 bytes")),
    case("a byte now and then", slow_loris, Refused("not complete in time")),
    killed("a stop in the message", stopped_early, Refused("not complete in time")),
    case("no descriptor", |plan| drop(sent(plan, good(plan).as_bytes(), &[])), Refused("no descriptor came")),
    case("a descriptor with later bytes", late_descriptor, Refused("no descriptor came")),
];

/// Descriptors that are wrong.
const DESCRIPTORS: &[Case] = &[
    case("a file", |plan| alone(plan, File::open("/dev/null").unwrap()), Refused("userfaultfd")),
    case("a pipe", |plan| alone(plan, pipe().unwrap().0), Refused("userfaultfd")),
    case("a socket", |plan| alone(plan, UnixStream::pair().unwrap().0), Refused("userfaultfd")),
    case("an eventfd", |plan| alone(plan, EventFd::new().unwrap()), Refused("userfaultfd")),
    case("an epoll", |plan| alone(plan, Epoll::new(EpollCreateFlags::empty()).unwrap().0), Refused("userfaultfd")),
    case("a memfd", |plan| alone(plan, memfd_create(c"x", MFdFlags::empty()).unwrap()), Refused("userfaultfd")),
    case("a pidfd", |plan| alone(plan, support::pidfd(nix::unistd::Pid::this())), Refused("userfaultfd")),
    case("its own connection", own_connection, Refused("userfaultfd")),
    case("a userfaultfd without a handshake", |plan| alone(plan, no_handshake()), Refused("")),
    case("253 that are no userfaultfd", |plan| with_more(plan, 253, false), Refused("userfaultfd")),
    case("2 of them", |plan| with_more(plan, 2, true), Served),
    case("10 of them", |plan| with_more(plan, 10, true), Served),
    case("253 of them", |plan| with_more(plan, 253, true), Served),
    case("the userfaultfd of its child", of_a_child, Served),
    case("one userfaultfd twice", twice, Served),
    case("a userfaultfd of memory that is not registered", unregistered, Served),
];

/// What is wrong only after a good beginning.
const LATER: &[Case] = &[
    case("a second message later", |plan| talks_on(plan, good(plan).as_bytes()), Served),
    case("a flood of bytes later", |plan| talks_on(plan, &[7; 4096]), Served),
    case("descriptors later", more_descriptors_later, Served),
    case("a half-closed socket later", half_closed, Served),
    case("a hang-up while it lives", hung_up, Served),
    case("everything closed", all_closed, Served),
    case("O_NONBLOCK cleared", blocking, Served),
    case("its memory unmapped among faults", unmapping, Served),
    case("its memory unmapped and mapped anew", mapping_anew, Served),
    case("another program executed", executing, Served),
    case("children", forking, Served),
    case("an exit among faults", exiting, Served),
    killed("a kill among faults", touching_for_ever, Served),
    killed("a stop among faults", stopped, Served),
];

#[test]
#[ignore = "plays a peer for the other tests"]
fn peer() {
    let Some(plan) = plan() else { skip!("no test has asked for it") };
    touch::prepare();
    let all = [MESSAGES, CONVERSATIONS, DESCRIPTORS, LATER];
    if let Some(case) = all.into_iter().flatten().find(|case| case.name == plan.act) {
        (case.play)(&plan);
        return say("played");
    }
    match plan.act.as_str() {
        "good" => {
            let guest = Guest::new(plan.bytes);
            let _socket = guest.hand_over(&plan.socket, Version::Now);
            verify(&guest, &plan.memory, Order::Scattered, Some(plan.seed));
            say("verified");
        }
        "flood of connections" => {
            let _all: Vec<_> = (0..CONNECTIONS).map(|_| connect(&plan)).collect();
            say("connected");
            wait_for_word();
        }
        "flood of VMs" => {
            let guests: Vec<_> = (0..40).map(|_| Guest::new(plan.bytes)).collect();
            let _all: Vec<_> = guests.iter().map(|guest| guest.hand_over(&plan.socket, Version::Now)).collect();
            say("connected");
            wait_for_word();
            let file = File::open(&plan.memory).unwrap();
            let touched = |guest: &Guest| (0..guest.nr_pages()).filter(|&n| right_or_sigbus(guest, &file, n)).count();
            // The others, turned away, have had nothing.
            let seen: Vec<_> = guests.iter().map(touched).collect();
            assert_eq!(seen.iter().filter(|&&seen| seen > 0).count(), 10, "{seen:?}");
            say("touched");
        }
        "refused one by one" => {
            let all: Vec<_> = (0..PLACES + 1).map(|_| Guest::new(plan.bytes)).collect();
            for guest in &all {
                await_hang_up(&sent(&plan, b"[7]", &[guest.uffd.as_raw_fd()]));
                let addr = guest.regions[0].base;
                let outcome = touch::read(addr as *const u8);
                assert!(outcome.is_err_and(|refused| refused.is_sigbus_at(addr)), "{outcome:?}");
                say("refused");
                wait_for_word();
            }
        }
        "turned away" => {
            let guest = Guest::new(plan.bytes);
            await_hang_up(&guest.hand_over(&plan.socket, Version::Now));
            for n in 0..guest.nr_pages() {
                let (region, at) = guest.find(n);
                let addr = region.base + at * region.page;
                let outcome = touch::read(addr as *const u8);
                assert!(outcome.is_err_and(|refused| refused.is_sigbus_at(addr)), "{outcome:?}");
            }
        }
        act => panic!("no act is named {act}"),
    }
}

const CONNECTIONS: usize = 300;
/// VMs that a handler takes, where that matters.
const PLACES: usize = 2;

/// Plays each case, each time with a good VM behind it.
fn play_all(cases: &[Case], arguments: &[&str]) {
    let stage = Stage::new(BYTES);
    let mut handler = stage.handler(&[&["--handshake-ms", "300"], arguments].concat());
    // What is started when it is first needed is there from here on.
    (0..2).for_each(|_| good_vm(&stage, &mut handler, "nothing"));
    let descriptors = handler.descriptors();
    for (n, case) in cases.iter().enumerate() {
        let mut peer = Monitor::start(ENTRY, &Plan::new(case.name, &stage).seed(n as u64));
        let pid = peer.pid();
        match case.expect {
            Refused(says) => {
                let event = handler.event_of("refused", pid);
                let why = event["why"].as_str().unwrap();
                assert!(why.contains(says), "{}: {why}", case.name);
            }
            Served => drop(handler.event_of("begin", pid)),
        }
        match case.ends {
            Well => {
                peer.hear("played");
                peer.done();
            }
            Killed => {
                // Others are served while it hangs.
                good_vm(&stage, &mut handler, case.name);
                peer.signal(Signal::SIGKILL);
                peer.killed_by(Signal::SIGKILL);
            }
        }
        if matches!(case.expect, Served) {
            assert_eq!(handler.event_of("end", pid)["how"], "gone", "{}", case.name);
        }
        handler.leaks_nothing(descriptors);
        good_vm(&stage, &mut handler, case.name);
        handler.leaks_nothing(descriptors);
    }
    assert_eq!(handler.stop()["panics"], 0);
}

/// A VM like any other finds every page right.
fn good_vm(stage: &Stage, handler: &mut Handler, after: &str) {
    let mut vm = Monitor::start(ENTRY, &Plan::new("good", stage));
    let pid = vm.pid();
    let said = vm.hear("verified");
    assert_eq!(said, "", "after {after}");
    vm.done();
    let end = handler.event_of("end", pid);
    assert_eq!(end["pages_poisoned"], 0, "after {after}");
}

#[test]
fn wrong_messages_harm_nobody() {
    play_all(MESSAGES, &[]);
}

#[test]
fn wrong_conversations_harm_nobody() {
    play_all(CONVERSATIONS, &[]);
}

#[test]
fn wrong_descriptors_harm_nobody() {
    play_all(DESCRIPTORS, &[]);
}

#[test]
fn what_goes_wrong_later_harms_nobody() {
    play_all(LATER, &[]);
}

#[test]
fn what_goes_wrong_while_pages_are_brought_harms_nobody() {
    play_all(LATER, &["--prefill"]);
}

#[test]
fn what_goes_wrong_where_vms_are_killed_harms_nobody() {
    play_all(LATER, &["--on-error", "kill"]);
    play_all(DESCRIPTORS, &["--on-error", "kill"]);
}

/// Whoever connects and says nothing delays others by the time for a message, not for ever.
#[test]
fn a_flood_of_connections_is_sat_out() {
    let stage = Stage::new(BYTES);
    let mut handler = stage.handler(&["--handshake-ms", "200"]);
    good_vm(&stage, &mut handler, "nothing");
    let (descriptors, threads) = (handler.descriptors(), handler.threads());
    let mut flood = Monitor::start(ENTRY, &Plan::new("flood of connections", &stage));
    for n in 0..CONNECTIONS {
        handler.event_of("refused", flood.pid());
        // Some end while the next ones begin.
        assert!(handler.threads() <= threads + 2 * 64, "after {n}: {} threads", handler.threads());
    }
    flood.hear("connected");
    good_vm(&stage, &mut handler, "a flood");
    flood.tell();
    flood.done();
    handler.leaks_nothing(descriptors);
    assert_eq!(handler.stop()["refused"], CONNECTIONS);
}

/// One process that is many VMs gets what it may have, and gives it back.
#[test]
fn a_flood_of_vms_is_bounded() {
    let stage = Stage::new(BYTES);
    let mut handler = stage.handler(&["--max-vms", "10"]);
    good_vm(&stage, &mut handler, "nothing");
    let descriptors = handler.descriptors();
    let mut flood = Monitor::start(ENTRY, &Plan::new("flood of VMs", &stage));
    let pid = flood.pid();
    (0..10).for_each(|_| drop(handler.event_of("begin", pid)));
    (0..30).for_each(|_| drop(handler.event_of("refused", pid)));
    flood.hear("connected");
    flood.tell();
    flood.hear("touched");
    flood.done();
    (0..10).for_each(|_| drop(handler.event_of("end", pid)));
    handler.leaks_nothing(descriptors);
    good_vm(&stage, &mut handler, "a flood");
    handler.stop();
}

/// What is refused its pages has a VM's place as long as it lives. Where no place is left, it is killed; a VM whose message is
/// right is refused its pages without one.
#[test]
fn those_that_are_refused_have_places() {
    let stage = Stage::new(BYTES);
    let mut handler = stage.handler(&["--max-vms", &PLACES.to_string()]);
    good_vm(&stage, &mut handler, "nothing");
    let descriptors = handler.descriptors();
    let mut refused = Monitor::start(ENTRY, &Plan::new("refused one by one", &stage));
    for n in 1..=PLACES {
        handler.event_of("refused", refused.pid());
        refused.hear("refused");
        if n < PLACES {
            refused.tell();
        }
    }
    let away = Monitor::start(ENTRY, &Plan::new("turned away", &stage));
    let why = handler.event_of("refused", away.pid())["why"].to_string();
    assert!(why.contains("--max-vms"), "{why}");
    away.done();
    refused.tell();
    handler.event_of("refused", refused.pid());
    refused.killed_by(Signal::SIGKILL);
    handler.leaks_nothing(descriptors);
    good_vm(&stage, &mut handler, "those that are refused");
    handler.stop();
}

fn connect(plan: &Plan) -> UnixStream {
    UnixStream::connect(&plan.socket).unwrap()
}

/// Connects and sends something; what the handler does not read before it hangs up is its own affair.
fn sent(plan: &Plan, bytes: &[u8], descriptors: &[RawFd]) -> UnixStream {
    let stream = connect(plan);
    send(&stream, bytes, descriptors);
    stream
}

/// Waits until the other end has hung up.
fn await_hang_up(mut stream: &UnixStream) {
    // Data of ours that was not read makes the end a reset.
    assert!(matches!(stream.read(&mut [0]), Ok(0) | Err(_)), "there is an answer");
}

/// Sends bytes with a userfaultfd of registered memory, and is hung up on.
fn bytes(plan: &Plan, bytes: &[u8]) {
    let guest = Guest::new(plan.bytes);
    await_hang_up(&sent(plan, bytes, &[guest.uffd.as_raw_fd()]));
    // It was refused, and so is its touch: it does not wait for ever.
    let addr = guest.regions[0].base;
    let outcome = touch::read(addr as *const u8);
    assert!(outcome.is_err_and(|refused| refused.is_sigbus_at(addr)), "{outcome:?}");
}

fn text(plan: &Plan, text: &str) {
    bytes(plan, text.as_bytes());
}

/// A region that the memory file has.
fn inner(plan: &Plan) -> String {
    json!({ "base_host_virt_addr": 0x7000_0000_0000u64, "size": plan.bytes, "offset": 0, "page_size": page_size() })
        .to_string()
}

fn good(plan: &Plan) -> String {
    format!("[{}]", inner(plan))
}

/// A message in which one field has another value.
fn field(plan: &Plan, name: &str, value: Value) {
    let mut region: Value = serde_json::from_str(&inner(plan)).unwrap();
    region[name] = value;
    text(plan, &format!("[{region}]"));
}

/// A message with these words for a size.
fn raw_field(plan: &Plan, words: &str) {
    text(plan, &format!("[{{\"base_host_virt_addr\":4096,\"offset\":0,\"size\":{words}}}]"));
}

/// Sends a beginning, and then the same byte until the handler hangs up, 1 MiB of it at the most.
fn flood(plan: &Plan, beginning: &[u8], byte: u8) {
    let guest = Guest::new(plan.bytes);
    let mut stream = connect(plan);
    let first = [beginning, &[byte; 4000]].concat();
    send(&stream, &first, &[guest.uffd.as_raw_fd()]);
    let piece = [byte; 4096];
    for _ in 0..256 {
        if stream.write_all(&piece).is_err() {
            break;
        }
    }
    await_hang_up(&stream);
}

fn many(plan: &Plan, nr: usize) {
    let region = |n: usize| json!({ "base_host_virt_addr": (n + 1) * page_size(), "size": page_size(), "offset": 0 });
    text(plan, &Value::from((0..nr).map(region).collect::<Vec<_>>()).to_string());
}

fn overlapping(plan: &Plan) {
    let other = json!({ "base_host_virt_addr": 0x7000_0000_1000u64, "size": page_size(), "offset": 0 });
    text(plan, &format!("[{},{other}]", inner(plan)));
}

/// The first 20 bytes of a message, with a userfaultfd.
fn begun(plan: &Plan) -> (Guest, UnixStream) {
    let guest = Guest::new(plan.bytes);
    let stream = sent(plan, &guest.message(Version::Now).as_bytes()[..20], &[guest.uffd.as_raw_fd()]);
    (guest, stream)
}

fn cut_short(plan: &Plan) {
    drop(begun(plan));
}

fn half_closed_early(plan: &Plan) {
    let (_guest, stream) = begun(plan);
    stream.shutdown(Shutdown::Write).unwrap();
    await_hang_up(&stream);
}

fn for_ever() -> ! {
    loop {
        std::thread::park();
    }
}

fn silent(plan: &Plan) {
    let _stream = connect(plan);
    for_ever();
}

fn unfinished(plan: &Plan) {
    let _begun = begun(plan);
    for_ever();
}

fn slow_loris(plan: &Plan) {
    let guest = Guest::new(plan.bytes);
    let message = guest.message(Version::Now);
    let mut stream = sent(plan, &message.as_bytes()[..1], &[guest.uffd.as_raw_fd()]);
    for byte in &message.as_bytes()[1..] {
        std::thread::sleep(Duration::from_millis(20));
        if stream.write_all(&[*byte]).is_err() {
            return;
        }
    }
    panic!("the whole message was taken");
}

fn stopped_early(plan: &Plan) {
    let _begun = begun(plan);
    raise(Signal::SIGSTOP).unwrap();
}

fn late_descriptor(plan: &Plan) {
    let guest = Guest::new(plan.bytes);
    let message = guest.message(Version::Now);
    let (first, rest) = message.as_bytes().split_at(10);
    let stream = sent(plan, first, &[]);
    await_hang_up(&stream);
    let rights = [guest.uffd.as_raw_fd()];
    let (rights, parts) = ([ControlMessage::ScmRights(&rights)], [IoSlice::new(rest)]);
    assert!(sendmsg::<()>(stream.as_raw_fd(), &parts, &rights, MsgFlags::MSG_NOSIGNAL, None).is_err());
}

/// Sends a good message with a descriptor that is no good.
fn alone(plan: &Plan, descriptor: impl AsFd) {
    await_hang_up(&sent(plan, good(plan).as_bytes(), &[descriptor.as_fd().as_raw_fd()]));
}

/// A userfaultfd as the system call makes it.
fn no_handshake() -> OwnedFd {
    const USER_MODE_ONLY: i32 = 1;
    // SAFETY: a plain system call; the descriptor that it returns is new.
    unsafe { OwnedFd::from_raw_fd(libc::syscall(libc::SYS_userfaultfd, libc::O_NONBLOCK | USER_MODE_ONLY) as i32) }
}

fn own_connection(plan: &Plan) {
    let stream = connect(plan);
    send(&stream, good(plan).as_bytes(), &[stream.as_raw_fd()]);
    // The handler's copy of it is closed when it is refused; then this end is all that is left of it, and has no other end.
    await_hang_up(&stream);
}

/// Sends so many descriptors; the first may be a userfaultfd.
fn with_more(plan: &Plan, nr: usize, good_first: bool) {
    let guest = Guest::new(plan.bytes);
    let null = File::open("/dev/null").unwrap();
    let mut descriptors = vec![null.as_raw_fd(); nr];
    if good_first {
        descriptors[0] = guest.uffd.as_raw_fd();
    }
    let stream = sent(plan, guest.message(Version::Now).as_bytes(), &descriptors);
    if good_first {
        verify(&guest, &plan.memory, Order::Scattered, Some(plan.seed));
    } else {
        await_hang_up(&stream);
    }
}

/// Its child's memory is served, and the child has the right bytes; its own is nobody's.
fn of_a_child(plan: &Plan) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let child = fork_child(|| {
        let guest = Guest::new(plan.bytes);
        send(&theirs, guest.message(Version::Now).as_bytes(), &[guest.uffd.as_raw_fd()]);
        let mut word = [0];
        (&theirs).read_exact(&mut word).unwrap();
        verify(&guest, &plan.memory, Order::Scattered, Some(plan.seed));
    });
    let mut message = [0; 4096];
    let mut control = nix::cmsg_space!(RawFd);
    let mut parts = [IoSliceMut::new(&mut message)];
    let flags = MsgFlags::empty();
    let received = recvmsg::<()>(ours.as_raw_fd(), &mut parts, Some(&mut control), flags).unwrap();
    let len = received.bytes;
    let mut rights = received.cmsgs().unwrap();
    let Some(ControlMessageOwned::ScmRights(numbers)) = rights.next() else { panic!("no descriptor") };
    let _stream = sent(plan, &message[..len], &numbers);
    (&ours).write_all(&[1]).unwrap();
    let status = reap(child);
    assert!(matches!(status, WaitStatus::Exited(_, 0)), "{status:?}");
}

/// The same memory by two connections: both are answered, and the bytes are the same.
fn twice(plan: &Plan) {
    let guest = Guest::new(plan.bytes);
    let _first = guest.hand_over(&plan.socket, Version::Now);
    let second = guest.hand_over(&plan.socket, Version::Now);
    verify(&guest, &plan.memory, Order::Scattered, None);
    drop(second);
}

fn unregistered(plan: &Plan) {
    let mut guest = Guest::new(plan.bytes);
    guest.uffd = userfaultfd(FeatureFlags::EVENT_REMOVE);
    let _socket = guest.hand_over(&plan.socket, Version::Now);
    // Some of it is registered after all; and then no more.
    let region = &guest.regions[1];
    touch::read(region.base as *const u8).unwrap();
    for _ in 0..50 {
        let _ = guest.uffd.register(region.base as *mut libc::c_void, region.size);
        let _ = guest.uffd.unregister(region.base as *mut libc::c_void, region.size);
    }
}

/// Checks its memory while it sends what nobody reads.
fn talks_on(plan: &Plan, bytes: &[u8]) {
    let guest = Guest::new(plan.bytes);
    let mut stream = guest.hand_over(&plan.socket, Version::Now);
    // What comes with the message belongs to it.
    touch::read(guest.regions[0].base as *const u8).unwrap();
    stream.set_nonblocking(true).unwrap();
    while stream.write(bytes).is_ok() {}
    verify(&guest, &plan.memory, Order::Scattered, Some(plan.seed));
}

fn more_descriptors_later(plan: &Plan) {
    let guest = Guest::new(plan.bytes);
    let stream = guest.hand_over(&plan.socket, Version::Now);
    touch::read(guest.regions[0].base as *const u8).unwrap();
    let null = File::open("/dev/null").unwrap();
    (0..20).for_each(|_| send(&stream, b"x", &[null.as_raw_fd(); 200]));
    verify(&guest, &plan.memory, Order::Scattered, Some(plan.seed));
}

fn half_closed(plan: &Plan) {
    let guest = Guest::new(plan.bytes);
    let stream = guest.hand_over(&plan.socket, Version::Now);
    stream.shutdown(Shutdown::Write).unwrap();
    verify(&guest, &plan.memory, Order::Scattered, Some(plan.seed));
}

fn hung_up(plan: &Plan) {
    let guest = Guest::new(plan.bytes);
    drop(guest.hand_over(&plan.socket, Version::Now));
    verify(&guest, &plan.memory, Order::Scattered, Some(plan.seed));
}

/// Without a descriptor of its own userfaultfd, too, it is served.
fn all_closed(plan: &Plan) {
    let guest = Guest::new(plan.bytes);
    drop(guest.hand_over(&plan.socket, Version::Now));
    let Guest { uffd, regions } = guest;
    touch::read(regions[0].base as *const u8).unwrap();
    drop(uffd);
    let guest = Guest { uffd: userfaultfd(FeatureFlags::empty()), regions };
    verify(&guest, &plan.memory, Order::Scattered, Some(plan.seed));
}

/// The open file is shared: a read of the handler's that waited would stop it for everybody.
fn blocking(plan: &Plan) {
    let guest = Guest::new(plan.bytes);
    let _socket = guest.hand_over(&plan.socket, Version::Now);
    let file = File::open(&plan.memory).unwrap();
    for page in 0..guest.nr_pages() {
        // SAFETY: open for as long as the guest is there.
        let uffd = unsafe { std::os::fd::BorrowedFd::borrow_raw(guest.uffd.as_raw_fd()) };
        let status = OFlag::from_bits_retain(fcntl(uffd, FcntlArg::F_GETFL).unwrap());
        fcntl(uffd, FcntlArg::F_SETFL(status - OFlag::O_NONBLOCK)).unwrap();
        if page % 3 == 0 {
            // Right or refused: whoever makes it blocking can't be read from on every kernel.
            right_or_sigbus(&guest, &file, page);
        }
    }
}

fn munmap(addr: usize, len: usize) {
    // SAFETY: nothing but touches that may be refused goes there.
    assert_eq!(unsafe { libc::munmap(addr as *mut libc::c_void, len) }, 0);
}

/// Touches memory in two threads, which is unmapped page by page meanwhile. Nobody tells the handler of that.
fn unmapping(plan: &Plan) {
    let guest = Guest::new(plan.bytes);
    let _socket = guest.hand_over(&plan.socket, Version::Now);
    // What the start of a thread maps must not lie where memory is unmapped.
    let (started, over) = (Barrier::new(3), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for seed in 0..2 {
            let (guest, started, over) = (&guest, &started, &over);
            scope.spawn(move || {
                let mut random = Random::new(seed);
                started.wait();
                while !over.load(Ordering::SeqCst) {
                    let (region, n) = guest.find(random.below(guest.nr_pages()));
                    let _ = touch::read((region.base + n * region.page) as *const u8);
                }
            });
        }
        started.wait();
        // Each page once: who knows what is there later.
        for n in (0..guest.nr_pages()).map(|n| n * 77 % guest.nr_pages()) {
            let (region, n) = guest.find(n);
            munmap(region.base + n * region.page, region.page);
        }
        over.store(true, Ordering::SeqCst);
    });
}

/// What it maps where its memory was is its own, and stays so.
fn mapping_anew(plan: &Plan) {
    let guest = Guest::new(plan.bytes);
    let _socket = guest.hand_over(&plan.socket, Version::Now);
    let region = &guest.regions[1];
    for n in 0..region.nr_pages() {
        let addr = region.base + n * region.page;
        if n % 2 == 0 {
            touch::read(addr as *const u8).unwrap();
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: nothing refers to the page.
        let mapped = unsafe { libc::mmap(addr as *mut libc::c_void, region.page, access, flags, -1, 0) };
        assert_eq!(mapped as usize, addr);
        assert_eq!(touch::read(addr as *const u8), Ok(0), "page {n}");
        touch::write(addr as *mut u8, 5).unwrap();
        assert_eq!(touch::read(addr as *const u8), Ok(5));
    }
}

/// Its address space is gone, its process lives; it ends a moment later.
fn executing(plan: &Plan) {
    let guest = Guest::new(plan.bytes);
    let _socket = guest.hand_over(&plan.socket, Version::Now);
    touch::read(guest.regions[0].base as *const u8).unwrap();
    say("played");
    panic!("{}", Command::new("sleep").arg("0.2").exec());
}

/// Children of a VM are its own affair: the kernel doesn't tell of them here. They end, and it is served on.
fn forking(plan: &Plan) {
    let guest = Guest::new(plan.bytes);
    let _socket = guest.hand_over(&plan.socket, Version::Now);
    for n in 0..10 {
        let child = fork_child(|| {
            let (region, at) = guest.find(n);
            let _ = touch::read(region.page(at).as_ptr());
        });
        reap(child);
    }
    verify(&guest, &plan.memory, Order::Scattered, Some(plan.seed));
}

fn touch_at_random(guest: &Guest, seed: u64, mut goes_on: impl FnMut() -> bool) {
    let mut random = Random::new(seed);
    while goes_on() {
        let (region, n) = guest.find(random.below(guest.nr_pages()));
        region.remove(n, 1);
        let _ = touch::read((region.base + n * region.page) as *const u8);
    }
}

fn exiting(plan: &Plan) {
    let guest: &'static Guest = Box::leak(Box::new(Guest::new(plan.bytes)));
    let _socket = guest.hand_over(&plan.socket, Version::Now);
    for seed in 0..3 {
        std::thread::spawn(move || touch_at_random(guest, seed, || true));
    }
    let mut left = 500;
    touch_at_random(guest, 7, || {
        left -= 1;
        left > 0
    });
    say("played");
    std::process::exit(0);
}

fn touching_for_ever(plan: &Plan) {
    let guest = Guest::new(plan.bytes);
    let _socket = guest.hand_over(&plan.socket, Version::Now);
    touch_at_random(&guest, plan.seed, || true);
}

fn stopped(plan: &Plan) {
    let guest: &'static Guest = Box::leak(Box::new(Guest::new(plan.bytes)));
    let _socket = guest.hand_over(&plan.socket, Version::Now);
    for seed in 0..3 {
        std::thread::spawn(move || touch_at_random(guest, seed, || true));
    }
    let mut left = 200;
    touch_at_random(guest, 7, || {
        left -= 1;
        left > 0
    });
    raise(Signal::SIGSTOP).unwrap();
    for_ever();
}
