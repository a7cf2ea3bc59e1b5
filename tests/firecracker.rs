//! The handler of Firecracker VMs, served as Firecracker asks for it: every page right, given back, recorded, let go, or refused.
//!
//! Sizes: `KIOMAP_VM_BYTES=4G cargo test --release --features firecracker --test firecracker -- every_page`.
#![cfg(feature = "firecracker")]

mod firecracker_support;
mod support;

use std::fs::{self, File};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use firecracker_support::guest::{Guest, Order, Seen, Version, right_or_sigbus, verify};
use firecracker_support::memory::Random;
use firecracker_support::{Monitor, Plan, Stage, limited_for, plan, program, say, wait_for_word};
use kiomap::{WorkingSet, page_size};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use support::{DEADLINE, eventually, limited, pool, tell};

/// What plays the monitors.
const ENTRY: &str = "monitor";

#[test]
#[ignore = "plays a VM monitor for the other tests"]
fn monitor() {
    let Some(plan) = plan() else { skip!("no test has asked for it") };
    let act = match plan.act.as_str() {
        "verify" => |plan: &Plan| whole(plan, Version::Now, None),
        "balloon" => |plan: &Plan| whole(plan, Version::Now, Some(plan.seed)),
        "older" => |plan: &Plan| whole(plan, Version::Older, None),
        "oldest" => |plan: &Plan| whole(plan, Version::Oldest, None),
        "huge" => huge,
        "steps" => steps,
        "storm" => storm,
        "subset" => subset,
        "patient" => patient,
        "refusable" => refusable,
        "beyond" => beyond,
        act => panic!("no act is named {act}"),
    };
    act(&plan);
}

/// Has every page checked, in some order.
fn whole(plan: &Plan, version: Version, balloon: Option<u64>) {
    let guest = Guest::new(plan.bytes);
    let _socket = guest.hand_over(&plan.socket, version);
    let order = [Order::Up, Order::Scattered, Order::Down, Order::Scattered][plan.seed as usize % 4];
    let Seen { pages, data, removed } = verify(&guest, &plan.memory, order, balloon);
    assert_eq!(pages, plan.bytes / page_size());
    say(&format!("verified {pages} {data} {removed}"));
}

fn numbers(line: &str) -> Vec<usize> {
    line.split_whitespace().map(|word| word.parse().unwrap()).collect()
}

/// Bytes of each VM's memory.
fn vm_bytes() -> usize {
    let Ok(text) = std::env::var("KIOMAP_VM_BYTES") else { return 64 << 20 };
    let digits = text.trim_end_matches(char::is_alphabetic);
    let unit = match &text[digits.len()..] {
        "G" => 1 << 30,
        "M" => 1 << 20,
        unit => panic!("KIOMAP_VM_BYTES is in {unit}: G or M"),
    };
    digits.parse::<usize>().unwrap() * unit
}

/// Four VMs at once have every page of theirs right.
fn four_vms(act: &str, fault_around: &str) {
    let stage = Stage::new(vm_bytes());
    // A minute for a gibibyte of each, and some to begin with.
    let deadline = DEADLINE + DEADLINE * (stage.bytes >> 30) as u32;
    let mut handler = stage.handler_for(deadline, &["--fault-around", fault_around]);
    let plan = Plan::new(act, &stage);
    let vms: Vec<_> = (0..4).map(|n| Monitor::start_for(deadline, ENTRY, &plan.clone().seed(n))).collect();
    let mut all = [0, 0, 0];
    for mut vm in vms {
        let pid = vm.pid();
        let seen = numbers(&vm.hear("verified"));
        all.iter_mut().zip(seen).for_each(|(all, seen)| *all += seen);
        vm.done();
        assert_eq!(handler.event_of("end", pid)["how"], "gone");
    }
    let [pages, data, removed] = all;
    assert_eq!(pages, 4 * stage.bytes / page_size());
    assert_eq!(removed > 0, act == "balloon");
    assert!(data > pages / 100, "{data} of {pages} pages had data");
    let total = handler.stop();
    assert_eq!((&total["vms"], &total["refused"], &total["pages_poisoned"]), (&4.into(), &0.into(), &0.into()));
    assert_eq!((&total["panics"], &total["source_errors"]), (&0.into(), &0.into()));
    let installed = total["pages_copied"].as_u64().unwrap() + total["pages_zeroed"].as_u64().unwrap();
    if act == "verify" {
        assert!(installed >= pages as u64, "{installed} of {pages}");
    }
    let faults = &total["faults"];
    tell(&format!("{act}, {fault_around} pages a fault: {pages} pages right, {removed} given back, {faults} faults"));
}

#[test]
fn every_page_of_four_vms_is_right_at_1_page_a_fault() {
    four_vms("verify", "1");
}

#[test]
fn every_page_of_four_vms_is_right_at_16_pages_a_fault() {
    four_vms("verify", "16");
}

#[test]
fn every_page_of_four_vms_is_right_at_512_pages_a_fault() {
    four_vms("verify", "512");
}

#[test]
fn every_page_of_four_vms_with_balloons_is_right_at_1_page_a_fault() {
    four_vms("balloon", "1");
}

#[test]
fn every_page_of_four_vms_with_balloons_is_right_at_16_pages_a_fault() {
    four_vms("balloon", "16");
}

#[test]
fn every_page_of_four_vms_with_balloons_is_right_at_512_pages_a_fault() {
    four_vms("balloon", "512");
}

const SMALL: usize = 8 << 20;

#[test]
fn older_versions_are_served_too() {
    let stage = Stage::new(SMALL);
    let mut handler = stage.handler(&[]);
    for act in ["older", "oldest"] {
        let mut vm = Monitor::start(ENTRY, &Plan::new(act, &stage));
        let begin = handler.event_of("begin", vm.pid());
        assert_eq!((&begin["regions"], &begin["bytes"]), (&3.into(), &SMALL.into()));
        vm.hear("verified");
        vm.done();
    }
    assert_eq!(handler.stop()["vms"], 2);
}

fn huge(plan: &Plan) {
    let guest = Guest::of_pages(plan.bytes, pool::HUGE);
    let _socket = guest.hand_over(&plan.socket, Version::Now);
    let first = verify(&guest, &plan.memory, Order::Scattered, None);
    assert_eq!(first.pages * pool::HUGE, plan.bytes);
    // Given back, also where nothing was touched since.
    let (region, n) = guest.find(3);
    region.remove(n, 1);
    assert_eq!(region.page(n), vec![0; pool::HUGE]);
    region.write(n, 7);
    assert_eq!(region.page(n)[..8], 7u64.to_ne_bytes());
    say(&format!("verified {}", first.data));
}

#[test]
fn huge_pages_are_right() {
    pool::with_pool("huge_pages_are_right", || {
        let stage = Stage::new(8 * pool::HUGE);
        let mut handler = stage.handler(&[]);
        let mut vm = Monitor::start(ENTRY, &Plan::new("huge", &stage));
        let pid = vm.pid();
        assert_eq!(numbers(&vm.hear("verified")), [8]);
        vm.done();
        let end = handler.event_of("end", pid);
        assert_eq!((&end["how"], &end["pages_poisoned"]), (&"gone".into(), &0.into()));
        assert_eq!(handler.stop()["pages_poisoned"], 0);
    });
}

/// A balloon takes pages step by step: touched ones, untouched ones, and those that were written to.
fn steps(plan: &Plan) {
    let guest = Guest::new(plan.bytes);
    let _socket = guest.hand_over(&plan.socket, Version::Now);
    let file = File::open(&plan.memory).unwrap();
    let data: Vec<_> =
        (0..guest.nr_pages()).filter(|&page| firecracker_support::memory::is_data(page as u64)).take(40).collect();
    let zeros = vec![0; page_size()];
    for (n, &page) in data.iter().enumerate() {
        let (region, at) = guest.find(page);
        if n % 2 == 0 {
            assert!(right_or_sigbus(&guest, &file, page));
        }
        region.remove(at, 1);
        assert_eq!(region.page(at), zeros, "page {page}");
        region.write(at, 9);
        assert_eq!(region.page(at)[..8], 9u64.to_ne_bytes());
        region.remove(at, 1);
        assert_eq!(region.page(at), zeros, "page {page}");
    }
    // Long after: what is brought around others' faults leaves them alone.
    for page in (0..guest.nr_pages()).filter(|page| !data.contains(page)) {
        assert!(right_or_sigbus(&guest, &file, page));
    }
    for page in data {
        let (region, at) = guest.find(page);
        assert_eq!(region.page(at), zeros, "page {page}");
    }
    say("done");
}

#[test]
fn what_a_balloon_took_is_zeros_until_it_is_written_to() {
    for arguments in [&["--fault-around", "512"][..], &["--fault-around", "1"], &["--prefill"]] {
        let stage = Stage::new(SMALL);
        let handler = stage.handler(arguments);
        let mut vm = Monitor::start(ENTRY, &Plan::new("steps", &stage));
        vm.hear("done");
        vm.done();
        let total = handler.stop();
        assert!(total["events"].as_u64().unwrap() >= 80, "{total}");
        assert_eq!(total["pages_poisoned"], 0);
    }
}

/// Touches pages in several threads, and gives some back, until it is killed.
fn storm(plan: &Plan) {
    let guest = Guest::new(plan.bytes);
    let _socket = guest.hand_over(&plan.socket, Version::Now);
    std::thread::scope(|scope| {
        for thread in 0..3 {
            let (guest, plan) = (&guest, &plan);
            scope.spawn(move || {
                let mut random = Random::new(plan.seed << 8 | thread);
                for n in 0.. {
                    let (region, at) = guest.find(random.below(guest.nr_pages()));
                    if random.below(4) == 0 {
                        region.remove(at, 1);
                    }
                    support::touch::read(region.page(at).as_ptr()).unwrap();
                    if n == 5 && thread == 0 {
                        say("touching");
                    }
                }
            });
        }
    });
}

/// VMs are killed among their faults, while others are served; nothing is left of them.
#[test]
fn vms_end_at_any_moment() {
    let stage = Stage::new(SMALL);
    let mut handler = stage.handler(&["--fault-around", "4"]);
    let mut first = Monitor::start(ENTRY, &Plan::new("verify", &stage));
    first.hear("verified");
    let pid = first.pid();
    first.done();
    handler.event_of("end", pid);
    let descriptors = handler.descriptors();
    for round in 0..8 {
        let mut other = Monitor::start(ENTRY, &Plan::new("balloon", &stage).seed(round));
        let dying: Vec<_> =
            (0..3).map(|n| Monitor::start(ENTRY, &Plan::new("storm", &stage).seed(3 * round + n))).collect();
        for (n, mut vm) in dying.into_iter().enumerate() {
            vm.hear("touching");
            std::thread::sleep(Duration::from_millis(5 * n as u64));
            let pid = vm.pid();
            vm.signal(Signal::SIGKILL);
            vm.killed_by(Signal::SIGKILL);
            assert_eq!(handler.event_of("end", pid)["how"], "gone");
        }
        other.hear("verified");
        other.done();
    }
    handler.leaks_nothing(descriptors);
    let total = handler.stop();
    assert_eq!((&total["panics"], &total["pages_poisoned"]), (&0.into(), &0.into()));
}

/// Touches the same few pages each time, when it is told to.
fn subset(plan: &Plan) {
    let guest = Guest::new(plan.bytes);
    let _socket = guest.hand_over(&plan.socket, Version::Now);
    wait_for_word();
    let file = File::open(&plan.memory).unwrap();
    let mut random = Random::new(77);
    for _ in 0..SUBSET {
        assert!(right_or_sigbus(&guest, &file, random.below(guest.nr_pages())));
    }
    say("touched");
    wait_for_word();
}

const SUBSET: usize = 200;

/// The working set of one VM is there before the next one asks for it; its faults then are none.
#[test]
fn a_working_set_is_recorded_and_replayed() {
    let stage = Stage::new(SMALL);
    let set = stage.folder.path().join("set");
    let set = set.to_str().unwrap();
    let run = |arguments: &[&str], replayed: Option<u64>| {
        let mut handler = stage.handler(&[&["--fault-around", "1"], arguments].concat());
        let mut vm = Monitor::start(ENTRY, &Plan::new("subset", &stage));
        let pid = vm.pid();
        if let Some(pages) = replayed {
            assert_eq!(handler.event("replayed", |_| true)["pages"], pages);
        }
        vm.tell();
        vm.hear("touched");
        vm.tell();
        vm.done();
        handler.event_of("end", pid);
        handler.stop()["faults"].as_u64().unwrap()
    };
    let faults = run(&["--record", set], None);
    let recorded = WorkingSet::load(set).unwrap().pages().len() as u64;
    assert!(recorded > SUBSET as u64 / 2 && recorded <= SUBSET as u64 && faults >= recorded, "{recorded} of {faults}");
    assert_eq!(run(&["--replay", set, "--record", set], Some(recorded)), 0);
    // What was replayed is still in it.
    assert_eq!(WorkingSet::load(set).unwrap().pages().len() as u64, recorded);
    // The first time there is none yet.
    let other = stage.folder.path().join("other");
    let other = other.to_str().unwrap();
    assert!(run(&["--replay", other, "--record", other], None) > 0);
}

/// Waits to be told before it touches a page, and then checks all of them.
fn patient(plan: &Plan) {
    let guest = Guest::new(plan.bytes);
    let file = File::open(&plan.memory).unwrap();
    let _socket = guest.hand_over(&plan.socket, Version::Now);
    (0..20).for_each(|page| assert!(right_or_sigbus(&guest, &file, page * 3)));
    say("waiting");
    wait_for_word();
    let seen = verify(&guest, &plan.memory, Order::Scattered, None);
    say(&format!("verified {}", seen.pages));
}

#[test]
fn what_is_filled_needs_no_fault() {
    let stage = Stage::new(SMALL);
    let mut handler = stage.handler(&["--prefill"]);
    let mut vm = Monitor::start(ENTRY, &Plan::new("patient", &stage));
    let filled = handler.event("filled", |_| true);
    assert_eq!((&filled["pages"], &filled["pages_failed"]), (&(SMALL / page_size()).into(), &0.into()));
    vm.hear("waiting");
    vm.tell();
    vm.hear("verified");
    vm.done();
    let total = handler.stop();
    assert!(total["faults"].as_u64().unwrap() <= 20, "{total}");
}

/// A handler that is told to end brings what is missing; its VMs go on without it.
#[test]
fn vms_outlive_a_handler_that_is_told_to_end() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let stage = Stage::new(SMALL);
        let mut handler = stage.handler(&[]);
        let mut vms: Vec<_> = (0..3).map(|_| Monitor::start(ENTRY, &Plan::new("patient", &stage))).collect();
        vms.iter_mut().for_each(|vm| drop(vm.hear("waiting")));
        handler.signal(signal);
        for vm in &vms {
            assert_eq!(handler.event_of("end", vm.pid())["how"], "released");
        }
        handler.event("total", |_| true);
        handler.ended();
        assert!(!stage.socket().exists());
        for vm in &mut vms {
            vm.tell();
            assert_eq!(numbers(&vm.hear("verified")), [SMALL / page_size()]);
        }
        vms.into_iter().for_each(Monitor::done);
    }
}

/// Whether a thread of a process waits in a fault; `None` where nobody may know.
fn waits_in_a_fault(pid: Pid) -> Option<bool> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let waits: Vec<_> = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("wchan")).ok()).collect();
    // Names are hidden from those without privileges.
    let hidden = waits.iter().all(|name| name == "0");
    (!hidden).then(|| waits.iter().any(|name| name.contains("userfault")))
}

/// A handler that is killed leaves no page wrong: who touches a missing one waits, as the VM has a descriptor of its own.
#[test]
fn a_handler_that_is_killed_leaves_no_page_wrong() {
    let stage = Stage::new(SMALL);
    let handler = stage.handler(&[]);
    let mut vm = Monitor::start(ENTRY, &Plan::new("patient", &stage));
    vm.hear("waiting");
    handler.signal(Signal::SIGKILL);
    drop(handler);
    vm.tell();
    if waits_in_a_fault(vm.pid()).is_none() {
        skip!("this user can't see where a process waits");
    }
    // It checks every page, and has come to no wrong one when it waits.
    eventually("it waits in a fault", || waits_in_a_fault(vm.pid()) == Some(true));
    vm.signal(Signal::SIGKILL);
    vm.killed_by(Signal::SIGKILL);
    // The socket that it left behind is in nobody's way.
    let handler = stage.handler(&[]);
    let mut vm = Monitor::start(ENTRY, &Plan::new("verify", &stage));
    vm.hear("verified");
    vm.done();
    handler.stop();
}

/// Waits to be told, and then touches all pages, some of which may be refused; says how many were right.
fn refusable(plan: &Plan) {
    support::touch::prepare();
    let guest = Guest::new(plan.bytes);
    let file = File::open(&plan.memory).unwrap();
    let _socket = guest.hand_over(&plan.socket, Version::Now);
    assert!(right_or_sigbus(&guest, &file, 0));
    say("waiting");
    wait_for_word();
    let right = (0..guest.nr_pages()).filter(|&page| right_or_sigbus(&guest, &file, page)).count();
    say(&format!("touched {right}"));
}

/// Tells a handler to end, and to do so at once: both signals are there when it looks.
fn signal_twice(handler: &firecracker_support::Handler) {
    for signal in [Signal::SIGSTOP, Signal::SIGTERM, Signal::SIGINT, Signal::SIGCONT] {
        handler.signal(signal);
    }
}

/// A second signal ends the filling: what is missing is refused, and no page is wrong.
#[test]
fn a_second_signal_refuses_what_is_missing() {
    let stage = Stage::new(64 << 20);
    let mut handler = stage.handler(&[]);
    let mut vm = Monitor::start(ENTRY, &Plan::new("refusable", &stage));
    vm.hear("waiting");
    signal_twice(&handler);
    assert_eq!(handler.event_of("end", vm.pid())["how"], "poisoned");
    handler.event("total", |_| true);
    handler.ended();
    vm.tell();
    let right = numbers(&vm.hear("touched"))[0];
    assert!((1..stage.bytes / page_size()).contains(&right), "{right}");
    vm.done();

    let mut handler = stage.handler(&["--on-error", "kill"]);
    let mut vm = Monitor::start(ENTRY, &Plan::new("refusable", &stage));
    vm.hear("waiting");
    signal_twice(&handler);
    assert_eq!(handler.event_of("end", vm.pid())["how"], "killed");
    handler.event("total", |_| true);
    handler.ended();
    vm.killed_by(Signal::SIGKILL);
}

/// A page of a file that has become shorter can't be had: its touch is SIGBUS, or ends the VM, as the operator chose.
#[test]
fn pages_that_can_not_be_had_are_refused_as_the_operator_chose() {
    for on_error in ["sigbus", "kill"] {
        let stage = Stage::new(SMALL);
        let mut handler = stage.handler(&["--on-error", on_error, "--fault-around", "1"]);
        let mut plan = Plan::new("refusable", &stage);
        plan.memory = stage.folder.path().join("as it was");
        firecracker_support::memory::make(&plan.memory, SMALL);
        let [mut vm, mut other] = [(); 2].map(|()| Monitor::start(ENTRY, &plan));
        vm.hear("waiting");
        other.hear("waiting");
        File::options().write(true).open(stage.memory()).unwrap().set_len(SMALL as u64 / 2).unwrap();
        // Its holes are zeros that are not read.
        let some_are_right = |vm: &mut Monitor| {
            let right = numbers(&vm.hear("touched"))[0];
            assert!((SMALL / page_size() / 2..SMALL / page_size()).contains(&right), "{right}");
        };
        vm.tell();
        let pid = vm.pid();
        if on_error == "kill" {
            vm.killed_by(Signal::SIGKILL);
        } else {
            some_are_right(&mut vm);
            vm.done();
        }
        assert_eq!(handler.event_of("end", pid)["how"], "gone");
        // The other has not touched such a page. When the handler ends, nobody is left who would kill it.
        handler.signal(Signal::SIGTERM);
        assert_eq!(handler.event_of("end", other.pid())["how"], "released");
        handler.event("total", |_| true);
        handler.ended();
        other.tell();
        some_are_right(&mut other);
        other.done();
    }
}

/// Says that it has more memory than the file, and touches what it has.
fn beyond(plan: &Plan) {
    support::touch::prepare();
    let guest = Guest::new(2 * plan.bytes);
    let _socket = guest.hand_over(&plan.socket, Version::Now);
    wait_for_word();
    let (region, n) = guest.find(0);
    let addr = region.base + n * region.page;
    let outcome = support::touch::read(addr as *const u8);
    assert!(outcome.is_err_and(|refused| refused.is_sigbus_at(addr)), "{outcome:?}");
    say("refused");
}

/// A VM that can't be served does not wait for ever: it is SIGBUS, or ended, as soon as it touches what is missing.
#[test]
fn a_vm_that_is_refused_does_not_wait() {
    for on_error in ["sigbus", "kill"] {
        let stage = Stage::new(SMALL);
        let mut handler = stage.handler(&["--on-error", on_error]);
        let mut vm = Monitor::start(ENTRY, &Plan::new("beyond", &stage));
        let why = handler.event_of("refused", vm.pid())["why"].as_str().unwrap().to_owned();
        assert!(why.contains("of a memory file of"), "{why}");
        vm.tell();
        if on_error == "kill" {
            vm.killed_by(Signal::SIGKILL);
        } else {
            vm.hear("refused");
            vm.done();
        }
        let total = handler.stop();
        assert_eq!((&total["vms"], &total["refused"]), (&0.into(), &1.into()));
    }
}

#[test]
fn no_more_vms_than_allowed_are_served() {
    let stage = Stage::new(SMALL);
    let mut handler = stage.handler(&["--max-vms", "1"]);
    let mut first = Monitor::start(ENTRY, &Plan::new("patient", &stage));
    first.hear("waiting");
    let second = Monitor::start(ENTRY, &Plan::new("patient", &stage));
    let why = handler.event_of("refused", second.pid())["why"].as_str().unwrap().to_owned();
    assert!(why.contains("--max-vms"), "{why}");
    // Its first touch is refused.
    assert!(!second.wait().success());
    first.tell();
    first.hear("verified");
    let pid = first.pid();
    first.done();
    handler.event_of("end", pid);
    let mut third = Monitor::start(ENTRY, &Plan::new("verify", &stage));
    third.hear("verified");
    third.done();
    assert_eq!(handler.stop()["vms"], 2);
}

#[test]
fn a_handler_for_one_vm_ends_with_it() {
    let stage = Stage::new(SMALL);
    let mut handler = stage.handler(&["--once"]);
    let mut vm = Monitor::start(ENTRY, &Plan::new("verify", &stage));
    vm.hear("verified");
    vm.done();
    assert_eq!(handler.event("total", |_| true)["vms"], 1);
    handler.ended();
}

/// What it prints for people says the same.
#[test]
fn people_are_told_in_words() {
    let stage = Stage::new(SMALL);
    let (socket, memory) = (stage.socket(), stage.memory());
    let arguments = ["--once", "--socket", socket.to_str().unwrap(), "--memory", memory.to_str().unwrap()];
    let mut command = limited_for(DEADLINE, &program(), &arguments);
    let handler = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
    eventually("it listens", || socket.exists());
    let mut vm = Monitor::start(ENTRY, &Plan::new("verify", &stage));
    vm.hear("verified");
    let pid = vm.pid();
    vm.done();
    let output = handler.wait_with_output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    for says in [
        "listening at ",
        &format!("process {pid} of uid "),
        "8 MiB in 3 regions",
        "vm 1: gone after ",
        "1 VMs were served",
    ] {
        assert!(text.contains(says), "{says} in {text}");
    }
}

/// The socket is the handler's own: nobody's file is taken, a dead one is replaced, its permissions are as asked.
#[test]
fn the_socket_is_made_and_removed_with_care() {
    let stage = Stage::new(SMALL);
    let (socket, memory) = (stage.socket(), stage.memory());
    let refused = |says: &str| {
        let arguments = ["--socket", socket.to_str().unwrap(), "--memory", memory.to_str().unwrap()];
        let output = limited(&program(), &arguments).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(error.contains(says), "{error}");
    };
    fs::write(&socket, "a file").unwrap();
    refused("no socket");
    assert_eq!(fs::read(&socket).unwrap(), b"a file");
    fs::remove_file(&socket).unwrap();

    drop(UnixListener::bind(&socket).unwrap());
    let handler = stage.handler(&[]);
    let mode = |path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&socket), 0o600);
    refused("somebody listens");
    handler.stop();
    assert!(!socket.exists());

    let handler = stage.handler(&["--socket-mode", "660"]);
    assert_eq!(mode(&socket), 0o660);
    // Somebody has put another one there.
    fs::remove_file(&socket).unwrap();
    let _other = UnixListener::bind(&socket).unwrap();
    handler.stop();
    assert!(fs::metadata(&socket).unwrap().file_type().is_socket());
}

#[test]
fn what_can_not_be_started_is_told() {
    let stage = Stage::new(SMALL);
    let (socket, memory) = (stage.socket(), stage.memory());
    let [socket, memory] = [&socket, &memory].map(|path| path.to_str().unwrap());
    let empty = stage.folder.path().join("empty");
    File::create(&empty).unwrap();
    let other = Stage::new(2 * SMALL);
    let set = stage.folder.path().join("set");
    let recording = other.handler(&["--record", set.to_str().unwrap()]);
    recording.stop();
    let same_length = Stage::new(SMALL);
    let of_another = stage.folder.path().join("of another");
    same_length.handler(&["--record", of_another.to_str().unwrap()]).stop();
    for (arguments, says) in [
        (&["--socket", socket, "--memory", memory, "--replay", of_another.to_str().unwrap()][..], "another image"),
        (&["--socket", socket, "--memory", "/none/memory"], "/none/memory"),
        (&["--socket", socket, "--memory", empty.to_str().unwrap()], "empty"),
        (&["--socket", "/none/pages.sock", "--memory", memory], "/none/pages.sock"),
        (&["--socket", socket, "--memory", memory, "--replay", "/none/set"], "/none/set"),
        (&["--socket", socket, "--memory", memory, "--replay", memory], "no working set"),
        (&["--socket", socket, "--memory", memory, "--replay", set.to_str().unwrap()], "2048"),
        (&["--socket", socket, "--memory", memory, "--fault-around", "0"], "--fault-around"),
        (&["--socket", socket, "--memory", memory, "--socket-mode", "9"], "--socket-mode"),
    ] {
        let output = limited(&program(), arguments).output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code().is_some_and(|code| code != 0), "{arguments:?}");
        assert!(error.contains(says), "{arguments:?}: {error}");
    }
}
