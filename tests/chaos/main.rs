//! Random attaches, touches, writes, forks, unmaps, moves, advice, kills and signals over several processes, held step
//! by step against a model of contents and counts. A seed makes the same scripts again; a failure is shrunk to a short
//! script.
//!
//! | variable | means |
//! |---|---|
//! | `KIOMAP_CHAOS_SECONDS` | how long to go on; 5 unless set |
//! | `KIOMAP_CHAOS_SEED` | which scripts; 1 unless set |
//! | `KIOMAP_CHAOS_SCRIPT` | a file with the one script to run, as a failure leaves it behind |
//! | `KIOMAP_CHAOS_REPEATS` | how often a script is run before it is believed to pass, when one is replayed or shrunk; 5 unless set |
//! | `KIOMAP_CHAOS_SHRINK_SECONDS` | how long a failure may be shrunk; 120 unless set |

#[path = "../support/mod.rs"]
mod support;

mod lists;
mod local;
mod model;
mod round;
mod script;
mod sheet;
mod shrink;
mod storm;

use std::io::{Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use script::{Script, generate};
use support::tell;

/// The file of the script that this process shall run as a round.
const INSIDE: &str = "KIOMAP_CHAOS_INSIDE";
/// How many seconds a step of it may take.
const PATIENCE: &str = "KIOMAP_CHAOS_PATIENCE";
/// A step takes milliseconds, on a machine that is busy elsewhere perhaps a second.
const PATIENT: u64 = 25;
/// While a failure is shrunk, many candidates may hang.
const IMPATIENT: u64 = 2;
/// A round takes a few seconds at the most; it says itself where it hangs, a little before this.
const ROUND: Duration = Duration::from_secs(100);
/// What a round says when it has found something.
const FOUND: &str = "chaos: found: ";

/// How a round ended.
struct Ended {
    /// Steps, touches in storms, and processes at the most.
    passed: Option<(u64, u64, usize)>,
    said: String,
}

fn number(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(value) => value.parse().unwrap_or_else(|_| panic!("{name} is {value:?}, not a number")),
        Err(_) => default,
    }
}

/// Runs a script in a process of its own.
fn run(script: &Script, patience: u64) -> Ended {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(script.to_text().as_bytes()).unwrap();
    // Others may run rounds as other users.
    let mut said = tempfile::tempfile().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["chaos", "--exact", "--nocapture", "--test-threads=1"])
        .env(INSIDE, file.path())
        .env(PATIENCE, patience.to_string())
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(said.try_clone().unwrap())
        .spawn()
        .unwrap();
    let pid = child.id() as i32;
    let pidfd = support::pidfd(nix::unistd::Pid::from_raw(pid));
    let mut poll = libc::pollfd { fd: pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid entry.
    let in_time = unsafe { libc::poll(&raw mut poll, 1, ROUND.as_millis() as i32) } == 1;
    // What it forked may still be there; and it itself.
    // SAFETY: the group was made for it, and is not reused before it is waited for.
    unsafe { libc::kill(-pid, libc::SIGKILL) };
    let status = child.wait().unwrap();
    let mut text = Vec::new();
    said.rewind().unwrap();
    said.read_to_end(&mut text).unwrap();
    let mut said = String::from_utf8_lossy(&text).into_owned();
    let passed = said.lines().rev().find_map(|line| {
        let mut numbers = line.strip_prefix("chaos: passed ")?.split(' ').map(str::parse::<u64>);
        let mut next = || numbers.next()?.ok();
        Some((next()?, next()?, next()? as usize))
    });
    if !in_time {
        said.push_str(&format!("{FOUND}not done within {ROUND:?}\n"));
    } else if passed.is_none() || !status.success() {
        said.push_str(&format!("the round ended with {status}\n"));
    }
    Ended { passed: passed.filter(|_| in_time && status.success()), said }
}

/// The process of a round.
fn inside(path: &std::ffi::OsStr) -> ! {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        hook(panic);
        tell(&format!("{FOUND}a panic: {panic}"));
        // SAFETY: ends the process at once, whatever its threads do.
        unsafe { libc::_exit(101) }
    }));
    let script = Script::from_text(&std::fs::read_to_string(path).unwrap()).unwrap();
    let code = match round::run(&script, Duration::from_secs(number(PATIENCE, PATIENT))) {
        Ok((touches, processes)) => {
            tell(&format!("chaos: passed {} {touches} {processes}", script.ops.len()));
            0
        }
        Err(why) => {
            tell(&format!("{FOUND}{why}"));
            101
        }
    };
    // SAFETY: as above.
    unsafe { libc::_exit(code) }
}

/// Shrinks a script that failed, leaves it in a file, and says how to run it again.
fn report(script: &Script, ended: &Ended, seed: &str) -> String {
    tell(&format!("chaos: {seed} failed:\n{}chaos: now it is shrunk", ended.said));
    let end = Instant::now() + Duration::from_secs(number("KIOMAP_CHAOS_SHRINK_SECONDS", 120));
    let repeats = number("KIOMAP_CHAOS_REPEATS", 5);
    let mut last = None;
    let settings = script.settings;
    let mut fails = |ops: &[script::Op]| {
        let script = Script { settings, ops: ops.to_vec() };
        for _ in 0..repeats {
            if Instant::now() > end {
                return None;
            }
            let ended = run(&script, IMPATIENT);
            if ended.passed.is_none() {
                last = Some(ended.said);
                return Some(true);
            }
        }
        Some(false)
    };
    // What comes after the failure was not needed for it.
    let step = ended.said.split("step ").nth(1).and_then(|rest| rest.split(',').next()?.parse::<usize>().ok());
    let mut ops = script.ops.clone();
    if let Some(step) = step.filter(|&step| step + 1 < ops.len())
        && fails(&ops[..=step]) == Some(true)
    {
        ops.truncate(step + 1);
    }
    let short = Script { settings, ops: shrink::shrink(ops, &mut fails) };
    let said = last.unwrap_or_else(|| ended.said.clone());
    let (mut file, path) = tempfile::Builder::new()
        .prefix("kiomap-chaos-")
        .suffix(".script")
        .tempfile()
        .and_then(|file| Ok(file.keep()?))
        .unwrap();
    file.write_all(short.to_text().as_bytes()).unwrap();
    format!(
        "{seed} fails; shrunk to {} operations:\n{}what it said:\n{said}to run it again:\nKIOMAP_CHAOS_SCRIPT={} cargo test --test chaos\n",
        short.ops.len(),
        short.to_text(),
        path.display()
    )
}

fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().map(|group| std::str::from_utf8(group).unwrap()).collect();
    groups.join(",")
}

/// Everything at once, against a model.
#[test]
fn chaos() {
    if let Some(path) = std::env::var_os(INSIDE) {
        inside(&path);
    }
    if let Some(path) = std::env::var_os("KIOMAP_CHAOS_SCRIPT") {
        let script = Script::from_text(&std::fs::read_to_string(&path).unwrap()).unwrap();
        for _ in 0..number("KIOMAP_CHAOS_REPEATS", 5) {
            let ended = run(&script, PATIENT);
            assert!(ended.passed.is_some(), "{} fails:\n{}", path.display(), ended.said);
        }
        return tell(&format!("chaos: {} passes", path.display()));
    }
    let seed = number("KIOMAP_CHAOS_SEED", 1);
    let time = Duration::from_secs(number("KIOMAP_CHAOS_SECONDS", 5));
    let (start, mut rounds, mut ops, mut touches, mut processes) = (Instant::now(), 0, 0, 0, 0);
    while start.elapsed() < time {
        let script = generate(seed, rounds);
        let ended = run(&script, PATIENT);
        let Some((more_ops, more_touches, at_once)) = ended.passed else {
            panic!("chaos: {}", report(&script, &ended, &format!("seed {seed}, round {rounds}")));
        };
        rounds += 1;
        ops += more_ops;
        touches += more_touches;
        processes = processes.max(at_once);
    }
    tell(&format!(
        "chaos: seed {seed}, {} rounds, {} operations, {} touches in storms, {processes} processes at most, {:.1} s, no finding",
        grouped(rounds),
        grouped(ops),
        grouped(touches),
        start.elapsed().as_secs_f64()
    ));
}

/// What a failure leaves behind can be read again.
#[test]
fn a_script_is_the_same_after_it_was_written_and_read() {
    for round in 0..50 {
        let script = generate(3, round);
        assert_eq!(Script::from_text(&script.to_text()).unwrap(), script);
        assert_eq!(generate(3, round), script);
    }
}
