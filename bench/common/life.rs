//! Lives of processes and engines: rounds of forks, of deaths that are to be noticed, and of whole engines.

use std::fs::File;
use std::io::{Read, Write};
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};

use anyhow::{Context, Result, ensure};
use kiomap::{AttachOptions, Engine, Kiobuf, Region, Shutdown, Vmap, page_size};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{ForkResult, Pid, fork};

/// Pages of the region: each child touches one that nobody touched before, until a new vmap is made.
const PAGES: usize = 1000;

/// What is measured in each round, in nanoseconds, in this order.
pub(crate) const NAMES: [&str; 6] =
    ["fork_plain", "fork_region", "noticed_kill", "noticed_exit", "noticed_exec", "engine"];

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
pub(crate) struct Twin {
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

/// Everything that rounds need.
pub(crate) struct Lives {
    twin: Twin,
    list: Kiobuf,
    engine: Engine,
    watched: Watched,
    region: Region,
    round: usize,
}

impl Lives {
    /// Makes the process that forks without an engine. The caller has none yet, and little memory.
    pub(crate) fn twin() -> Result<Twin> {
        Twin::start()
    }

    pub(crate) fn new(twin: Twin) -> Result<Lives> {
        let mut list = Kiobuf::new();
        list.map_bytes(vec![7; PAGES * page_size()])?;
        let engine = Engine::new().context("the engine can't be built here")?;
        let watched = Watched::new(&engine, &list)?;
        let region = engine.vmap(&list)?.attach(&AttachOptions::new())?;
        Ok(Lives { twin, list, engine, watched, region, round: 0 })
    }

    /// Measures each of [`NAMES`] once.
    pub(crate) fn round(&mut self) -> Result<[u64; NAMES.len()]> {
        let page = self.round % PAGES;
        if page == 0 && self.round > 0 {
            self.region = self.engine.vmap(&self.list)?.attach(&AttachOptions::new())?;
        }
        self.round += 1;
        Ok([
            self.twin.fork_and_touch(page)?,
            fork_and_touch(&self.region, page)?,
            self.watched.notice(End::Kill)?,
            self.watched.notice(End::Exit)?,
            self.watched.notice(End::Exec)?,
            engine_life(&self.list)?,
        ])
    }
}
