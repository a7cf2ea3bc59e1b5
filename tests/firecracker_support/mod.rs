//! Both ends of the handshake as processes: VM monitors that behave as Firecracker does, and the handler.
//!
//! A monitor is this test binary once more, which plays what its plan says; see [`Plan`].
#![allow(dead_code, reason = "each test binary uses a part of it")]

pub(crate) mod guest;
pub(crate) mod memory;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::support::{DEADLINE, eventually, limited};

/// What a process that plays a VM monitor finds its plan in.
const PLAN: &str = "KIOMAP_FAKE_VM";
/// Before what it says: the test runner says other things.
const SAYS: &str = "monitor: ";

/// What a monitor does.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Plan {
    /// The name of an act of the test binary.
    pub(crate) act: String,
    pub(crate) socket: PathBuf,
    pub(crate) memory: PathBuf,
    /// Bytes of guest memory, from the start of the memory file.
    pub(crate) bytes: usize,
    pub(crate) seed: u64,
}

impl Plan {
    pub(crate) fn new(act: &str, stage: &Stage) -> Plan {
        Plan { act: act.into(), socket: stage.socket(), memory: stage.memory(), bytes: stage.bytes, seed: 1 }
    }

    pub(crate) fn seed(mut self, seed: u64) -> Plan {
        self.seed = seed;
        self
    }
}

/// The plan of this process, if it is to play a monitor.
pub(crate) fn plan() -> Option<Plan> {
    std::env::var(PLAN).ok().map(|text| serde_json::from_str(&text).unwrap())
}

/// In a monitor: says a word to the test.
pub(crate) fn say(what: &str) {
    println!("{SAYS}{what}");
}

/// In a monitor: waits for the test to say something.
pub(crate) fn wait_for_word() {
    let mut line = String::new();
    assert_ne!(std::io::stdin().read_line(&mut line).unwrap(), 0, "the test has gone");
}

/// A folder with a memory file, and room for a socket.
pub(crate) struct Stage {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) bytes: usize,
}

impl Stage {
    /// Makes a sparse memory file of so many bytes.
    pub(crate) fn new(bytes: usize) -> Stage {
        let folder = tempfile::tempdir().unwrap();
        let stage = Stage { folder, bytes };
        memory::make(&stage.memory(), bytes);
        stage
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.path().join("pages.sock")
    }

    pub(crate) fn memory(&self) -> PathBuf {
        self.folder.path().join("memory")
    }

    /// Starts the handler; it listens when this returns.
    pub(crate) fn handler(&self, arguments: &[&str]) -> Handler {
        self.handler_for(DEADLINE, arguments)
    }

    /// As [`Stage::handler`], for one that is ended after `deadline`.
    pub(crate) fn handler_for(&self, deadline: Duration, arguments: &[&str]) -> Handler {
        let (socket, memory) = (self.socket(), self.memory());
        let mut all = vec!["--json", "--socket", socket.to_str().unwrap(), "--memory", memory.to_str().unwrap()];
        all.extend(arguments);
        let mut handler = Handler::run(limited_for(deadline, &program(), &all), deadline);
        handler.event("listening", |_| true);
        handler
    }
}

/// The handler, which `cargo test` builds beside the tests, or `cargo build --example firecracker_handler`.
pub(crate) fn program() -> PathBuf {
    let tests = std::env::current_exe().unwrap();
    let path = tests.parent().and_then(Path::parent).unwrap().join("examples/firecracker_handler");
    let build = "cargo build --features firecracker --example firecracker_handler";
    assert!(path.exists(), "{} is not built: run `{build}` first", path.display());
    path
}

/// A program that is ended when it hangs, after a time of its own.
pub(crate) fn limited_for(deadline: Duration, program: &Path, arguments: &[&str]) -> Command {
    let mut command = limited(program, arguments);
    let seconds = deadline.as_secs() as u32;
    // SAFETY: alarm(2) is async-signal-safe; the later call counts.
    unsafe {
        command.pre_exec(move || {
            nix::unistd::alarm::set(seconds);
            Ok(())
        });
    }
    command
}

/// A process that says lines; it is killed with its owner.
struct Talking {
    child: Child,
    lines: Receiver<String>,
    deadline: Duration,
}

impl Talking {
    fn spawn(mut command: Command, deadline: Duration) -> Talking {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let (tell, lines) = channel();
        // Ends with the stream, or when nobody listens any more.
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                if tell.send(line).is_err() {
                    break;
                }
            }
        });
        Talking { child, lines, deadline }
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// The next line; `None` at the end.
    fn line(&self) -> Option<String> {
        match self.lines.recv_timeout(self.deadline) {
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => panic!("not a word within {:?}", self.deadline),
            other => other.ok(),
        }
    }

    fn wait(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < self.deadline, "has not ended within {:?}", self.deadline);
            std::thread::yield_now();
        }
    }
}

impl Drop for Talking {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A VM monitor in a process of its own.
pub(crate) struct Monitor {
    act: String,
    talking: Talking,
    words: Option<ChildStdin>,
}

impl Monitor {
    /// Starts one; `entry` is the name of the test that plays them.
    pub(crate) fn start(entry: &str, plan: &Plan) -> Monitor {
        Monitor::start_for(DEADLINE, entry, plan)
    }

    /// As [`Monitor::start`], for one that is ended after `deadline`.
    pub(crate) fn start_for(deadline: Duration, entry: &str, plan: &Plan) -> Monitor {
        let arguments = [entry, "--exact", "--nocapture", "--ignored", "--test-threads=1"];
        let mut command = limited_for(deadline, &std::env::current_exe().unwrap(), &arguments);
        command.env(PLAN, serde_json::to_string(plan).unwrap()).stdin(Stdio::piped());
        let mut talking = Talking::spawn(command, deadline);
        let words = talking.child.stdin.take();
        Monitor { act: plan.act.clone(), talking, words }
    }

    pub(crate) fn pid(&self) -> Pid {
        self.talking.pid()
    }

    /// Waits for a word that begins like this, and answers with what follows.
    #[track_caller]
    pub(crate) fn hear(&mut self, word: &str) -> String {
        loop {
            let Some(line) = self.talking.line() else {
                panic!("the monitor of {} has ended with {}, and never said {word}", self.act, self.talking.wait());
            };
            if let Some(said) = line.split_once(SAYS).map(|(_, said)| said) {
                let rest = said.strip_prefix(word).unwrap_or_else(|| panic!("it said {said}, not {word}"));
                return rest.trim().to_owned();
            }
        }
    }

    /// Has it go on.
    pub(crate) fn tell(&mut self) {
        writeln!(self.words.as_mut().unwrap()).unwrap();
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    pub(crate) fn wait(mut self) -> ExitStatus {
        self.talking.wait()
    }

    /// Waits for its end, which must be a good one.
    #[track_caller]
    pub(crate) fn done(self) {
        let act = self.act.clone();
        let status = self.wait();
        assert!(status.success(), "the monitor of {act} ended with {status}");
    }

    /// Waits for its end by this signal.
    #[track_caller]
    pub(crate) fn killed_by(self, signal: Signal) {
        let status = self.wait();
        assert_eq!(status.signal(), Some(signal as i32), "{status}");
    }
}

/// The handler in a process of its own.
pub(crate) struct Handler {
    talking: Talking,
    /// What it said that nobody asked for yet.
    heard: Vec<Value>,
}

impl Handler {
    fn run(command: Command, deadline: Duration) -> Handler {
        Handler { talking: Talking::spawn(command, deadline), heard: Vec::new() }
    }

    pub(crate) fn pid(&self) -> Pid {
        self.talking.pid()
    }

    /// Waits for an event of this kind that is the one, and takes it.
    #[track_caller]
    pub(crate) fn event(&mut self, kind: &str, is_it: impl Fn(&Value) -> bool) -> Value {
        let wanted = |event: &Value| event["event"] == kind && is_it(event);
        if let Some(n) = self.heard.iter().position(wanted) {
            return self.heard.remove(n);
        }
        loop {
            let line = self.talking.line();
            let line = line.unwrap_or_else(|| panic!("the handler has ended, without {kind}: {:?}", self.heard));
            let event: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{line}: {error}"));
            if wanted(&event) {
                return event;
            }
            self.heard.push(event);
        }
    }

    /// Waits for an event of this kind about a process.
    #[track_caller]
    pub(crate) fn event_of(&mut self, kind: &str, pid: Pid) -> Value {
        self.event(kind, |event| event["pid"] == pid.as_raw())
    }

    /// The descriptors that it has open.
    pub(crate) fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    /// The threads that it has.
    pub(crate) fn threads(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap().count()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).unwrap();
    }

    /// Asks it to end, and waits for that; answers its totals.
    #[track_caller]
    pub(crate) fn stop(mut self) -> Value {
        self.signal(Signal::SIGTERM);
        let total = self.event("total", |_| true);
        self.ended();
        total
    }

    /// Waits for its good end.
    #[track_caller]
    pub(crate) fn ended(mut self) {
        let status = self.talking.wait();
        assert!(status.success(), "the handler ended with {status}: {:?}", self.heard);
    }

    /// Waits until it has no more descriptors than this.
    #[track_caller]
    pub(crate) fn leaks_nothing(&self, descriptors: usize) {
        eventually(&format!("back to {descriptors} descriptors"), || self.descriptors() <= descriptors);
    }
}
