//! Clients of a published vmap that are real other programs: the test binary once more, started by exec, which does what it is
//! told over its standard input and says what came of it.
#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::io::{BufRead, BufReader, Lines, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Duration;

use kiomap::{AttachOptions, Client, ClientOptions, Region, page_size};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::scene::{at, child};
use crate::support::{DEADLINE, engine_builder, reap, touch};

/// Where the program finds the socket; without it, it is no client.
const SOCKET: &str = "KIOMAP_TEST_SOCKET";
/// What begins an answer: the test runner writes to standard output, too.
const ANSWER: &str = "@";

/// A folder for a socket, which goes with it.
pub(crate) struct Place(tempfile::TempDir);

impl Place {
    pub(crate) fn new() -> Place {
        Place(tempfile::tempdir().unwrap())
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.0.path().join("socket")
    }

    /// Another path beside the socket.
    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        self.socket().with_file_name(name)
    }
}

/// A client in a process of its own; killed when dropped.
pub(crate) struct Program {
    process: Child,
    input: Option<ChildStdin>,
    output: Lines<BufReader<ChildStdout>>,
}

impl Program {
    /// Starts a program that is told a socket and has not connected.
    pub(crate) fn start(socket: &Path) -> Program {
        Program::start_as(socket, |_| ())
    }

    /// As [`Program::start`], with something to be changed before.
    pub(crate) fn start_as(socket: &Path, prepare: impl FnOnce(&mut Command)) -> Program {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["a_client_does_what_it_is_told", "--exact", "--nocapture", "--include-ignored", "--test-threads=1"])
            .env(SOCKET, socket)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        // SAFETY: prctl(2) may be called between fork and exec: a test that fails leaves no client behind.
        unsafe {
            command.pre_exec(|| {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        prepare(&mut command);
        let mut process = command.spawn().unwrap();
        let (input, output) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
        Program { process, input: Some(input), output: BufReader::new(output).lines() }
    }

    /// Starts a program, and has it connect.
    pub(crate) fn connected(socket: &Path) -> Program {
        let mut program = Program::start(socket);
        program.ok("connect");
        program
    }

    /// Starts a program, and has it connect and attach a whole region.
    pub(crate) fn attached(socket: &Path) -> Program {
        let mut program = Program::connected(socket);
        program.ok("attach 0");
        program
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(self.process.id() as i32)
    }

    /// Tells it what to do.
    pub(crate) fn tell(&mut self, what: &str) {
        writeln!(self.input.as_mut().unwrap(), "{what}").unwrap();
    }

    /// What it answers next.
    pub(crate) fn hear(&mut self) -> String {
        loop {
            let line = self.output.next().expect("an answer before the end").unwrap();
            if let Some((_, answer)) = line.split_once(ANSWER) {
                return answer.to_owned();
            }
        }
    }

    pub(crate) fn ask(&mut self, what: &str) -> String {
        self.tell(what);
        self.hear()
    }

    /// Has it do something that must succeed.
    #[track_caller]
    pub(crate) fn ok(&mut self, what: &str) {
        assert_eq!(self.ask(what), "ok", "{what}");
    }

    #[track_caller]
    pub(crate) fn number(&mut self, what: &str) -> u64 {
        let answer = self.ask(what);
        answer.parse().unwrap_or_else(|_| panic!("{what}: {answer}"))
    }

    /// Kills it, and takes its end.
    pub(crate) fn kill(&mut self) {
        kill(self.pid(), Signal::SIGKILL).unwrap();
        self.process.wait().unwrap();
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        self.input = None;
        self.process.wait().unwrap()
    }

    /// Has it end of itself.
    #[track_caller]
    pub(crate) fn end(mut self) {
        self.tell("end");
        let status = self.wait();
        assert!(status.success(), "{status} (signal {:?})", status.signal());
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What a client has.
#[derive(Default)]
struct State {
    client: Option<Client>,
    regions: Vec<Region>,
}

/// The body of the program; nothing where the test binary was not started as one. What it does not know itself, `otherwise` does.
pub(crate) fn program(otherwise: impl Fn(&Path, &[&str]) -> String) {
    let Some(socket) = std::env::var_os(SOCKET).map(PathBuf::from) else { return };
    nix::unistd::alarm::set(2 * DEADLINE.as_secs() as u32);
    touch::prepare();
    let mut state = State::default();
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let words: Vec<&str> = line.split_whitespace().collect();
        if words == ["end"] {
            return;
        }
        let answer = obey(&mut state, &socket, &words).unwrap_or_else(|| otherwise(&socket, &words));
        println!("{ANSWER}{answer}");
    }
}

fn options() -> ClientOptions {
    ClientOptions::new().timeout(Duration::from_secs(20))
}

fn outcome(result: kiomap::Result<()>) -> String {
    result.map_or_else(|error| format!("{:?}: {error}", error.errno()), |()| "ok".into())
}

fn touched(result: Result<u8, touch::Refused>, addr: *mut u8) -> String {
    match result {
        Ok(byte) => byte.to_string(),
        Err(refused) if refused.is_sigbus_at(addr as usize) => "sigbus".into(),
        Err(refused) if refused.is_sigsegv() => "sigsegv".into(),
        Err(refused) => format!("{refused:?}"),
    }
}

fn obey(state: &mut State, socket: &Path, words: &[&str]) -> Option<String> {
    let number = |index: usize| words[index].parse::<u64>().unwrap();
    let last = |state: &State, page: u64| at(state.regions.last().unwrap(), page);
    let connect = |state: &mut State, options: ClientOptions| {
        outcome(Client::attach(socket, &options).map(|client| state.client = Some(client)))
    };
    Some(match words[0] {
        "connect" => connect(state, options()),
        "connect-reading" => connect(state, options().read_only()),
        "connect-within-ms" => connect(state, ClientOptions::new().timeout(Duration::from_millis(number(1)))),
        "attach" | "attach-reading" => {
            let vmap = state.client.as_ref().unwrap().vmap();
            let options = AttachOptions::new().pgoff(number(1));
            let options = if words[0] == "attach" { options } else { options.read_only() };
            outcome(vmap.attach(&options).map(|region| state.regions.push(region)))
        }
        "detach" => {
            state.regions.pop().unwrap();
            "ok".into()
        }
        "disconnect" => {
            state.client = None;
            "ok".into()
        }
        "count" => {
            state.client.as_ref().unwrap().vmap().refcount().map_or_else(|error| error.to_string(), |n| n.to_string())
        }
        "read" => touched(touch::read(last(state, number(1))), last(state, number(1))),
        "write" => {
            let addr = last(state, number(1));
            match touch::write(addr, number(2) as u8) {
                Ok(()) => "ok".into(),
                Err(refused) => touched(Err(refused), addr),
            }
        }
        // The sum of the first bytes of pages, to touch many.
        "sum" => {
            let bytes = (number(1)..number(2)).map(|page| touch::read(last(state, page)));
            bytes.map(|byte| byte.map_or(1 << 32, u64::from)).sum::<u64>().to_string()
        }
        // The number of pages that read as zero, and of those that are refused.
        "zeros" => {
            let (mut zeros, mut refused) = (0, 0);
            for page in number(1)..number(2) {
                match touch::read(last(state, page)) {
                    Ok(0) => zeros += 1,
                    Ok(_) => {}
                    Err(_) => refused += 1,
                }
            }
            format!("{zeros} zeros, {refused} refused")
        }
        // Unmaps a page by itself.
        "unmap" => {
            // SAFETY: nothing refers to the page.
            let outcome = unsafe { libc::munmap(last(state, number(1)).cast(), page_size()) };
            if outcome == 0 { "ok".into() } else { "refused".into() }
        }
        // So many generations: each reads a page, writes another, and forks the next.
        "fork" => generations(state, number(1), number(2)),
        // A child that touches pages for ever, to be ended with this process or by itself.
        "fork-touching" => {
            let pages = number(1);
            let parent = nix::unistd::getpid();
            let child = child(|| {
                // Not left behind.
                nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).unwrap();
                let mut page = 0;
                while nix::unistd::getppid() == parent {
                    assert!(touch::read(last(state, page % pages)).is_ok());
                    page += 1;
                }
            });
            child.to_string()
        }
        "descriptors" => crate::support::open_descriptors().to_string(),
        "threads" => crate::support::threads().len().to_string(),
        // Comes and goes within one process.
        "come-and-go" => {
            for _ in 0..number(1) {
                let client = match Client::attach(socket, &options()) {
                    Ok(client) => client,
                    Err(error) => return Some(error.to_string()),
                };
                let region = client.vmap().attach(&AttachOptions::new()).unwrap();
                assert!(touch::read(at(&region, 1)).is_ok());
            }
            "ok".into()
        }
        // Closes every descriptor but its input and output, as daemons do.
        "close-everything" => {
            // SAFETY: what is closed is not used any more, or found out by who uses it.
            let outcome = unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0) };
            if outcome == 0 { "ok".into() } else { "refused".into() }
        }
        "exec" => {
            let error = Command::new("sleep").arg("100").exec();
            error.to_string()
        }
        "expand" => {
            let kiobuf = crate::support::pages(1);
            outcome(state.client.as_ref().unwrap().vmap().expand(&kiobuf))
        }
        // An engine of its own goes beside.
        "own-engine" => {
            let engine = engine_builder().build().unwrap();
            let vmap = engine.vmap(&crate::support::pages(4)).unwrap();
            let region = vmap.attach(&AttachOptions::new()).unwrap();
            touch::read(at(&region, 3)).unwrap().to_string()
        }
        _ => return None,
    })
}

fn generations(state: &State, depth: u64, page: u64) -> String {
    let region = state.regions.last().unwrap();
    let pid = child(|| {
        region.check().unwrap();
        assert_eq!(touch::read(at(region, page)), Ok(crate::support::mark(page)));
        assert_eq!(touch::write(at(region, page), 100 + depth as u8), Ok(()));
        let own = state.client.as_ref().unwrap().vmap().attach(&AttachOptions::new()).unwrap();
        assert_eq!(touch::read(at(&own, page)), Ok(100 + depth as u8));
        if depth > 1 {
            assert_eq!(generations(state, depth - 1, page + 1), "ok");
        }
    });
    match reap(pid) {
        nix::sys::wait::WaitStatus::Exited(_, 0) => "ok".into(),
        status => format!("{status:?}"),
    }
}
