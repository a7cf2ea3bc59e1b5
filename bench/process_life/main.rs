//! What processes cost and how soon their end is noticed.
//!
//! | series | from | to |
//! |---|---|---|
//! | `fork_plain` | before fork(2), in a process without an engine, whose child touches a page of a shared memfd and exits | after waitpid(2) |
//! | `fork_region` | before fork(2), in the engine's process, whose child touches a missing page of a region and exits | after waitpid(2) |
//! | `noticed_kill` | before kill(2) with SIGKILL, of the last process with an area | the deref callback runs |
//! | `noticed_exit` | the child's last instruction before `_exit` | the deref callback runs |
//! | `noticed_exec` | the child's last instruction before execve(2) | the deref callback runs |
//! | `engine` | before an engine is built, used for one fault, and shut down | after that |
//!
//! The series take turns, so that what the machine does meanwhile befalls all of them.

use std::fs::File;
use std::io::{Read, Write};
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use kiomap::{AttachOptions, Engine, Kiobuf, Region, Shutdown, Vmap, page_size};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{ForkResult, Pid, fork};
use serde::Serialize;

/// Measures forks, the noticing of deaths, and lives of engines.
#[derive(Parser)]
#[command(name = "process_life")]
struct Arguments {
    /// Few rounds: shows that everything works, in seconds
    #[arg(long)]
    quick: bool,
    /// Write the results as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Accepted because cargo passes it
    #[arg(long, hide = true)]
    bench: bool,
}

const FULL_ROUNDS: usize = 2000;
const QUICK_ROUNDS: usize = 100;
/// Pages of the region: each child touches one that nobody touched before, until a new vmap is made.
const PAGES: usize = 1000;
/// What the run may take, in seconds, before the kernel ends it.
const DEADLINE_SECONDS: u32 = 900;

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("process_life: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Nanoseconds of a clock that all processes share.
fn now() -> u64 {
    // The clock exists on every Linux.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |t| t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
}

/// Forks; the child runs `body` and ends.
fn child(body: impl FnOnce()) -> Result<Pid> {
    // SAFETY: the child makes system calls and touches, and ends.
    match unsafe { fork() }.context("fork")? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            body();
            // SAFETY: ends this process at once.
            unsafe { libc::_exit(0) }
        }
    }
}

fn reap(pid: Pid) -> Result<()> {
    let status = waitpid(pid, None).context("waitpid")?;
    let ended = matches!(status, WaitStatus::Exited(_, 0) | WaitStatus::Signaled(_, Signal::SIGKILL, _));
    ensure!(ended, "a child ended with {status:?}");
    Ok(())
}

/// Reads the first byte of a page.
fn touch(base: *const u8, page: usize) {
    // SAFETY: the callers pass a mapping of `PAGES` pages, whose bytes can be had.
    unsafe { base.add(page * page_size()).read_volatile() };
}

/// A process from before the first engine, which forks when it is told to and says how long that took.
struct Twin {
    pid: Pid,
    ask: File,
    answers: File,
}

impl Twin {
    fn start() -> Result<Twin> {
        let (orders, ask): (OwnedFd, OwnedFd) = nix::unistd::pipe().context("pipe")?;
        let (answers, answer): (OwnedFd, OwnedFd) = nix::unistd::pipe().context("pipe")?;
        let memfd = memfd_create(c"twin", MFdFlags::MFD_CLOEXEC).context("memfd_create")?;
        let bytes = NonZeroUsize::new(PAGES * page_size()).context("no pages")?;
        nix::unistd::ftruncate(&memfd, bytes.get() as i64).context("ftruncate")?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping, which replaces nothing.
        let base = unsafe { mmap(None, bytes, access, MapFlags::MAP_SHARED, &memfd, 0) }.context("mmap")?;
        let base = base.as_ptr().cast::<u8>();
        let (ask, mut orders, mut answer) = (File::from(ask), File::from(orders), File::from(answer));
        let pid = child(|| {
            let mut page = [0; 8];
            while orders.read_exact(&mut page).is_ok() {
                let start = now();
                let ended = child(|| touch(base, usize::from_ne_bytes(page))).and_then(reap);
                let took = ended.map_or(0, |()| now() - start);
                if answer.write_all(&took.to_ne_bytes()).is_err() {
                    break;
                }
            }
        })?;
        Ok(Twin { pid, ask, answers: answers.into() })
    }

    fn fork_and_touch(&mut self, page: usize) -> Result<u64> {
        self.ask.write_all(&page.to_ne_bytes()).context("asking the twin")?;
        let mut took = [0; 8];
        self.answers.read_exact(&mut took).context("the twin's answer")?;
        let took = u64::from_ne_bytes(took);
        ensure!(took > 0, "the twin could not fork");
        Ok(took)
    }
}

impl Drop for Twin {
    fn drop(&mut self) {
        let _ = kill(self.pid, Signal::SIGKILL);
        let _ = waitpid(self.pid, None);
    }
}

/// How a child ends.
#[derive(Clone, Copy)]
enum End {
    Kill,
    Exit,
    Exec,
}

/// A vmap whose last area is always a child's, and the moments of its callbacks.
struct Watched {
    vmap: Vmap,
    noticed: Receiver<u64>,
    /// When the child ended, in memory that is shared with it.
    ended: &'static AtomicU64,
}

impl Watched {
    fn new(engine: &Engine, list: &Kiobuf) -> Result<Watched> {
        let (notice, noticed) = channel();
        let vmap = engine
            .vmap_builder(list)
            .on_deref(move |_| {
                let _ = notice.send(now());
            })
            .build()?;
        let len = NonZeroUsize::new(page_size()).context("no page")?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping, which replaces nothing.
        let shared = unsafe { mmap_anonymous(None, len, access, MapFlags::MAP_SHARED) }.context("mmap")?;
        // SAFETY: aligned, and never unmapped.
        let ended = unsafe { &*shared.as_ptr().cast::<AtomicU64>() };
        Ok(Watched { vmap, noticed, ended })
    }

    /// From the end of the last process with an area to the callback.
    fn notice(&self, end: End) -> Result<u64> {
        let region = self.vmap.attach(&AttachOptions::new())?;
        let (ready, started) = nix::unistd::pipe().context("pipe")?;
        let (go, begin) = nix::unistd::pipe().context("pipe")?;
        let pid = child(|| {
            touch(region.as_ptr(), 0);
            let _ = nix::unistd::write(&started, &[1]);
            let _ = nix::unistd::read(&go, &mut [0]);
            self.ended.store(now(), Ordering::Release);
            if let End::Exec = end {
                let arguments = [c"true".as_ptr(), std::ptr::null()];
                // SAFETY: a null-terminated string and a null-terminated array of such.
                unsafe { libc::execv(c"/bin/true".as_ptr(), arguments.as_ptr()) };
            }
        })?;
        nix::unistd::read(&ready, &mut [0]).context("a child that starts")?;
        drop(region);
        match end {
            End::Kill => {
                self.ended.store(now(), Ordering::Release);
                kill(pid, Signal::SIGKILL).context("kill")?;
            }
            End::Exit | End::Exec => drop(nix::unistd::write(&begin, &[1]).context("letting a child go")?),
        }
        let noticed = self.noticed.recv().context("the callback")?;
        reap(pid)?;
        Ok(noticed.saturating_sub(self.ended.load(Ordering::Acquire)))
    }
}

/// The latencies of one series, in nanoseconds.
struct Series {
    name: &'static str,
    ns: Vec<u64>,
}

#[derive(Serialize)]
struct Row {
    name: &'static str,
    p50_us: f64,
    p99_us: f64,
    longest_us: f64,
    n: usize,
}

#[derive(Serialize)]
struct Report {
    version: u32,
    fork_region_to_fork_plain: f64,
    series: Vec<Row>,
}

impl Series {
    fn row(mut self) -> Row {
        self.ns.sort_unstable();
        // Nearest rank.
        let at = |share: f64| {
            let rank = (self.ns.len() as f64 * share).ceil() as usize;
            self.ns[rank.clamp(1, self.ns.len()) - 1] as f64 / 1000.0
        };
        Row { name: self.name, p50_us: at(0.5), p99_us: at(0.99), longest_us: at(1.0), n: self.ns.len() }
    }
}

fn engine_life(list: &Kiobuf) -> Result<u64> {
    let start = now();
    let engine = Engine::new()?;
    let region = engine.vmap(list)?.attach(&AttachOptions::new())?;
    touch(region.as_ptr(), 0);
    drop(region);
    engine.shutdown(Shutdown::Poison)?;
    Ok(now() - start)
}

fn fork_and_touch(region: &Region, page: usize) -> Result<u64> {
    let start = now();
    reap(child(|| touch(region.as_ptr(), page))?)?;
    Ok(now() - start)
}

fn run(arguments: &Arguments) -> Result<()> {
    let json = arguments.json.as_ref().map(|path| File::create(path).with_context(|| path.display().to_string()));
    let json = json.transpose()?;
    nix::unistd::alarm::set(DEADLINE_SECONDS);
    let rounds = if arguments.quick { QUICK_ROUNDS } else { FULL_ROUNDS };
    let mut twin = Twin::start()?;
    let mut list = Kiobuf::new();
    list.map_bytes(vec![7; PAGES * page_size()])?;
    let engine = Engine::new().context("the engine can't be built here")?;
    let watched = Watched::new(&engine, &list)?;

    let names = ["fork_plain", "fork_region", "noticed_kill", "noticed_exit", "noticed_exec", "engine"];
    let mut series = names.map(|name| Series { name, ns: Vec::with_capacity(rounds) });
    let mut region = engine.vmap(&list)?.attach(&AttachOptions::new())?;
    for round in 0..rounds {
        let page = round % PAGES;
        if page == 0 {
            region = engine.vmap(&list)?.attach(&AttachOptions::new())?;
        }
        let ns = [
            twin.fork_and_touch(page)?,
            fork_and_touch(&region, page)?,
            watched.notice(End::Kill)?,
            watched.notice(End::Exit)?,
            watched.notice(End::Exec)?,
            engine_life(&list)?,
        ];
        series.iter_mut().zip(ns).for_each(|(series, ns)| series.ns.push(ns));
    }
    let rows = series.map(Series::row);
    let ratio = rows[1].p50_us / rows[0].p50_us;
    println!("{:14} {:>10} {:>10} {:>10}   µs, of {rounds}", "series", "p50", "p99", "longest");
    for Row { name, p50_us, p99_us, longest_us, .. } in &rows {
        println!("{name:14} {p50_us:10.1} {p99_us:10.1} {longest_us:10.1}");
    }
    println!("a fork with a region takes {ratio:.1} times a plain one (p50)");
    if let Some(mut file) = json {
        let report = Report { version: 1, fork_region_to_fork_plain: ratio, series: rows.into() };
        file.write_all(serde_json::to_string_pretty(&report)?.as_bytes()).context("writing the results")?;
    }
    Ok(())
}
