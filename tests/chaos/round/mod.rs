//! A round: does what a script says, step by step, and holds what comes of it against the model. The model never asks
//! the engine what is right.

macro_rules! ensure {
    ($condition:expr, $($what:tt)*) => {
        if !$condition {
            return Err(format!($($what)*));
        }
    };
}

mod checks;
mod judge;
mod memory;
mod processes;
mod storms;
mod vmaps;
mod watch;

use std::collections::HashMap;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kiomap::{Engine, Features, OpenWay, Revoke, Shutdown, page_size};
use nix::errno::Errno;

use crate::lists::build;
use crate::local::{Answer, Expect, Job, Local, Saw};
use crate::model::{AddressSpace, Cell};
use crate::script::{ARENA, Access, Advice, Attach, End, Op, PAGES, PROCESSES, Part, Script, Settings, Storm, VMAPS};
use crate::sheet::{Avail, Sheet};
use crate::storm::{LANES_EACH, Run, StormJob, allowed};
use crate::support::scene::Rng;
use crate::support::{engine_builder, open_descriptors, threads, touch, truth, vmap_mappings};

/// Far from where the kernel puts what asks for no address.
const ARENA_START: usize = 0x1000_0000_0000;
/// Where storms attach and drop, behind the arena.
const CHURN_START: usize = ARENA_START + 0x1000_0000;
/// How long what is counted late may take.
const LATE: Duration = Duration::from_secs(15);

/// What is known of a page of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Resident {
    No,
    /// A fault of a neighbour may have brought it.
    Maybe,
    Yes,
}

#[derive(Debug, Clone, Copy)]
struct PageState {
    given: bool,
    revoked: bool,
    resident: Resident,
}

struct VmapState {
    pages: Vec<PageState>,
    expandable: bool,
    /// The engine's process has a handle.
    handle: bool,
    derefs: Arc<AtomicU64>,
    expected_derefs: u64,
    count: usize,
    /// Processes that have a handle.
    known: u32,
}

struct Process {
    pid: i32,
    parent: usize,
    pidfd: Option<OwnedFd>,
    space: AddressSpace,
    /// Regions: vmap, first page of the arena or address, pages, pgoff; the process that attached it.
    regions: HashMap<u32, RegionState>,
}

#[derive(Debug, Clone, Copy)]
struct RegionState {
    vmap: usize,
    page: usize,
    pages: usize,
    pgoff: u64,
    writable: bool,
    inherit: bool,
    here: bool,
}

pub(crate) struct Round {
    engine: Option<Engine>,
    local: Local,
    sheet: Sheet,
    vmaps: [Option<VmapState>; VMAPS],
    processes: [Option<Process>; PROCESSES],
    settings: Settings,
    kernel_faults: bool,
    storms: u64,
    now: Arc<Mutex<(Instant, String)>>,
    /// Ends that are noticed late may still be uncounted.
    late: bool,
    /// The engine was shut down.
    down: bool,
    pub(crate) most_processes: usize,
    pub(crate) touches: u64,
}

type Outcome = Result<(), String>;

fn page_of(at: usize) -> usize {
    ARENA_START / page_size() + at
}

fn addr_of(page: usize) -> usize {
    page * page_size()
}

fn pidfd(pid: i32) -> OwnedFd {
    // SAFETY: pidfd_open takes plain numbers, and returns a new descriptor or a negative number.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid, 0);
        assert!(fd >= 0, "pidfd_open: {}", Errno::last());
        OwnedFd::from_raw_fd(fd as i32)
    }
}

fn ended(pidfd: &OwnedFd) {
    use std::os::fd::AsFd;
    let mut fds = [nix::poll::PollFd::new(pidfd.as_fd(), nix::poll::PollFlags::POLLIN)];
    while nix::poll::poll(&mut fds, nix::poll::PollTimeout::NONE).is_err() {}
}

/// Runs a script. What it finds is the error, with the step at which it was found. A step that takes longer than
/// `patience` hangs.
pub(crate) fn run(script: &Script, patience: Duration) -> Result<(u64, usize), String> {
    // SAFETY: plain numbers. Processes whose parents are killed become children of this one.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) };
    let now = Arc::new(Mutex::new((Instant::now(), "the start".to_owned())));
    watch::watch(&now, patience);
    // The first touch installs the handlers, and the first list file and pipe whatever they need.
    let _ = touch::read(std::ptr::null());
    let local = Local::new();
    let before = (open_descriptors(), threads());
    let builder = engine_builder().fault_around_pages(script.settings.around).workers(script.settings.workers);
    let engine = builder.build().map_err(|error| format!("the engine: {error}"))?;
    let kernel_faults = engine.open_way() != OpenWay::UserModeOnly && engine.open_way().serves_kernel_faults();
    let mut round = Round {
        engine: Some(engine),
        sheet: local.sheet,
        local,
        vmaps: Default::default(),
        processes: Default::default(),
        settings: script.settings,
        kernel_faults,
        storms: 0,
        now,
        late: false,
        down: false,
        most_processes: 1,
        touches: 0,
    };
    round.processes[0] = Some(Process {
        pid: nix::unistd::getpid().as_raw(),
        parent: 0,
        pidfd: None,
        space: AddressSpace::default(),
        regions: HashMap::new(),
    });
    for (number, op) in script.ops.iter().enumerate() {
        let at = |why| format!("step {number}, {}: {why}", serde_json::to_string(op).unwrap());
        round.begin(&format!("step {number}, {}", serde_json::to_string(op).unwrap()));
        round.step(op).map_err(at)?;
        round.counts().map_err(at)?;
    }
    round.begin("the end");
    // A shutdown has more to do where pages are missing.
    if script.settings.end == End::Clean {
        round.check().map_err(|why| format!("the last check: {why}"))?;
    }
    round.end(before).map_err(|why| format!("the end: {why}"))?;
    Ok((round.touches, round.most_processes))
}

impl Round {
    fn begin(&self, what: &str) {
        *self.now.lock().unwrap() = (Instant::now(), what.to_owned());
    }

    fn engine(&self) -> &Engine {
        self.engine.as_ref().expect("until the end")
    }

    fn process(&self, process: usize) -> Option<&Process> {
        self.processes.get(process)?.as_ref()
    }

    /// Has a process do a job.
    fn ask(&mut self, process: usize, job: Job) -> Result<Answer, String> {
        if process == 0 {
            return Ok(self.local.perform(job));
        }
        self.local.tell(process, &job);
        self.hear(process)
    }

    fn hear(&mut self, process: usize) -> Result<Answer, String> {
        let pidfd = self.processes[process].as_ref().and_then(|process| process.pidfd.as_ref());
        match self.local.hear(process, pidfd) {
            Some(answer) => Ok(answer),
            None => Err(format!("process {process} ended by itself")),
        }
    }

    fn step(&mut self, op: &Op) -> Outcome {
        match op {
            // Without UFFDIO_POISON a page that can't be had is a mapping of its own, and mremap moves one mapping.
            Op::Move { .. } | Op::Double { .. } | Op::Grow { .. } | Op::Shrink { .. }
                if !self.engine().features().contains(Features::POISON) =>
            {
                Ok(())
            }
            Op::Vmap { vmap, parts, expandable } => self.new_vmap(*vmap, parts, *expandable),
            &Op::Attach { process, attach } => self.attach(process, attach),
            &Op::Drop { process, region } => {
                let Some(state) = self.process(process).and_then(|p| p.regions.get(&region)).copied() else {
                    return Ok(());
                };
                let answer = self.ask(process, Job::Drop { region })?;
                ensure!(answer == Answer::Done, "{answer:?}");
                let Some(process) = &mut self.processes[process] else { return Ok(()) };
                process.regions.remove(&region);
                if state.inherit || state.here {
                    process.space.cells.retain(|_, cell| !matches!(cell, Cell::Page { region: r, .. } if *r == region));
                }
                Ok(())
            }
            // Without thread ids nothing is looked up: what mremap adds without an event stays SIGBUS.
            Op::Double { .. } | Op::Grow { .. } if !self.engine().features().contains(Features::THREAD_ID) => Ok(()),
            &Op::Read { process, at, word } => {
                if self.process(process).is_none() || at >= ARENA {
                    return Ok(());
                }
                let cell = self.cell(process, at);
                let job = Job::Read { addr: addr_of(page_of(at)), word, expect: Self::expect(cell) };
                let Answer::Saw(saw, why) = self.ask(process, job)? else { return Err("no answer".into()) };
                self.judge(cell, saw[0], false, &why)
            }
            &Op::Write { process, at, word, value } => {
                if self.process(process).is_none() || at >= ARENA {
                    return Ok(());
                }
                let cell = self.cell(process, at);
                if matches!(cell, Some(Cell::Foreign(_))) {
                    return Ok(());
                }
                let job = Job::Write { addr: addr_of(page_of(at)) + word * 8, value };
                let Answer::Saw(saw, why) = self.ask(process, job)? else { return Err("no answer".into()) };
                self.judge(cell, saw[0], true, &why)?;
                if let (Saw::Right, Some(Cell::Page { vmap, pgoff, .. })) = (saw[0], cell) {
                    self.sheet.write(vmap, pgoff, word * 8, &value.to_ne_bytes());
                }
                Ok(())
            }
            &Op::RegionRead { process, region, offset, len } => {
                let Some((vmap, pgoff)) = self.whole(process, region, offset, len, false) else { return Ok(()) };
                let answer = self.ask(process, Job::RegionRead { region, offset, len, vmap, pgoff })?;
                ensure!(answer == Answer::Done, "{answer:?}");
                self.touched_range(vmap, pgoff, offset, len);
                Ok(())
            }
            &Op::RegionWrite { process, region, offset, len, value } => {
                let Some((vmap, pgoff)) = self.whole(process, region, offset, len, true) else { return Ok(()) };
                let answer = self.ask(process, Job::RegionWrite { region, offset, len, value })?;
                ensure!(answer == Answer::Done, "{answer:?}");
                self.touched_range(vmap, pgoff, offset, len);
                self.written(vmap, pgoff, offset, &vec![value; len]);
                Ok(())
            }
            &Op::Atomic { process, region, word, add } => {
                let offset = word * 8;
                let Some((vmap, pgoff)) = self.whole(process, region, offset, 8, true) else { return Ok(()) };
                let page = pgoff + (offset / page_size()) as u64;
                let before = Sheet::word(self.sheet.now(vmap, page), word % (page_size() / 8));
                let answer = self.ask(process, Job::Atomic { region, offset, add })?;
                ensure!(answer == Answer::Value(before), "{answer:x?}, not {before:#x}");
                self.touched_range(vmap, pgoff, offset, 8);
                self.written(vmap, pgoff, offset, &before.wrapping_add(add).to_ne_bytes());
                Ok(())
            }
            &Op::VmapRead { vmap, offset, len } => self.vmap_access(vmap, offset, len, None),
            &Op::VmapWrite { vmap, offset, len, value } => self.vmap_access(vmap, offset, len, Some(value)),
            &Op::PipeOut { process, at, word } => self.pipe(process, at, word, None),
            &Op::PipeIn { process, at, word, value } => self.pipe(process, at, word, Some(value)),
            &Op::Unmap { process, at, pages } => {
                let (Some(_), Some(range)) = (self.process(process), Self::range(at, pages)) else { return Ok(()) };
                let (addr, len) = (addr_of(range.start), addr_of(range.len()));
                let answer = self.ask(process, Job::Unmap { addr, len })?;
                ensure!(answer == Answer::Done, "{answer:?}");
                self.space(process).unmap(range);
                Ok(())
            }
            &Op::Foreign { process, at, pages, byte } => {
                let (Some(_), Some(range)) = (self.process(process), Self::range(at, pages)) else { return Ok(()) };
                let (addr, len) = (addr_of(range.start), addr_of(range.len()));
                let answer = self.ask(process, Job::Foreign { addr, len, byte })?;
                ensure!(answer == Answer::Done, "{answer:?}");
                let space = self.space(process);
                space.unmap(range.clone());
                space.cells.extend(range.map(|page| (page, Cell::Foreign(byte))));
                Ok(())
            }
            &Op::Move { process, at, pages, to } => {
                let (Some(state), Some(range)) = (self.process(process), Self::range(at, pages)) else { return Ok(()) };
                let from = state.space.run_at(range);
                let Some(target) = Self::range(to, from.len()).filter(|target| target.len() == from.len()) else {
                    return Ok(());
                };
                if from.is_empty() || from.start < target.end && target.start < from.end {
                    return Ok(());
                }
                let (len, flags) = (addr_of(from.len()), libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED);
                let job =
                    Job::Remap { from: addr_of(from.start), len, new_len: len, flags, to: Some(addr_of(target.start)) };
                match self.ask(process, job)? {
                    Answer::Value(addr) if addr as usize == addr_of(target.start) => {
                        self.space(process).remap(from, target.start);
                        Ok(())
                    }
                    other => Err(format!("{other:?}")),
                }
            }
            &Op::Shrink { process, at, pages, by } => {
                let (Some(state), Some(range)) = (self.process(process), Self::range(at, pages)) else { return Ok(()) };
                let run = state.space.run_at(range);
                if run.len() <= by || by == 0 {
                    return Ok(());
                }
                let (from, len, kept) = (addr_of(run.start), addr_of(run.len()), run.len() - by);
                match self.ask(process, Job::Remap { from, len, new_len: addr_of(kept), flags: 0, to: None })? {
                    Answer::Value(addr) if addr as usize == from => {
                        self.space(process).unmap(run.start + kept..run.end);
                        Ok(())
                    }
                    other => Err(format!("{other:?}")),
                }
            }
            &Op::Grow { process, at, by } => self.grow(process, at, by),
            &Op::Double { process, at, to } => self.double(process, at, to),
            &Op::Protect { process, at, pages, access: wanted } => {
                let (Some(state), Some(range)) = (self.process(process), Self::range(at, pages)) else { return Ok(()) };
                let run = state.space.run_at(range);
                if run.is_empty() {
                    return Ok(());
                }
                self.protect(process, run, wanted)
            }
            &Op::Advise { process, at, pages, advice } => self.advise(process, at, pages, advice),
            &Op::Fork { process, child } => self.fork(process, child),
            &Op::Exit { process } | &Op::Kill { process } | &Op::Exec { process } => {
                if process == 0 || self.process(process).is_none() {
                    return Ok(());
                }
                match op {
                    Op::Exit { .. } => {
                        self.ask(process, Job::Exit)?;
                    }
                    Op::Exec { .. } => {
                        self.local.tell(process, &Job::Exec);
                        self.executed(process)?;
                    }
                    _ => self.kill(process),
                }
                self.gone(process)
            }
            &Op::Spawn { process } => {
                if self.process(process).is_some() {
                    let answer = self.ask(process, Job::Spawn)?;
                    ensure!(answer == Answer::Done, "{answer:?}");
                }
                Ok(())
            }
            Op::Expand { vmap, parts } => self.expand(*vmap, parts),
            &Op::Revoke { vmap, hard } => {
                if !self.has_handle(vmap) {
                    return Ok(());
                }
                let how = if hard { Revoke::Hard } else { Revoke::Soft };
                let handle = &self.local.vmaps[&vmap];
                let revoked = handle.revoke(how);
                if hard && handle.shares_pages() {
                    ensure!(matches!(revoked, Err(kiomap::Error::Invalid { .. })), "{revoked:?}");
                    return Ok(());
                }
                revoked.map_err(|error| error.to_string())?;
                let Some(state) = &mut self.vmaps[vmap] else { return Ok(()) };
                for page in &mut state.pages {
                    page.revoked = true;
                    if hard {
                        page.resident = Resident::No;
                    }
                }
                self.update(vmap);
                Ok(())
            }
            &Op::Forget { vmap } => {
                if self.has_handle(vmap) {
                    self.local.vmaps.remove(&vmap);
                    if let Some(state) = &mut self.vmaps[vmap] {
                        state.handle = false;
                        state.known = 0;
                    }
                }
                Ok(())
            }
            Op::Check => self.check(),
            Op::Storm(storm) => self.storm(storm),
        }
    }
}
