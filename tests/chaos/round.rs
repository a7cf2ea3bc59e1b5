//! A round: does what a script says, step by step, and holds what comes of it against the model. The model never asks
//! the engine what is right.

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
use crate::script::{ARENA, Access, Advice, End, Op, PAGES, PROCESSES, Part, Script, Settings, Storm, VMAPS};
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

macro_rules! ensure {
    ($condition:expr, $($what:tt)*) => {
        if !$condition {
            return Err(format!($($what)*));
        }
    };
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
    watch(&now, patience);
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

/// Says where a round hangs, and what every thread of it waits for.
fn watch(now: &Arc<Mutex<(Instant, String)>>, patience: Duration) {
    let now = Arc::clone(now);
    let (started, wait) = std::sync::mpsc::channel();
    let body = move || {
        // It has its name by now.
        let _ = started.send(());
        loop {
            std::thread::sleep(Duration::from_millis(100));
            let (since, what) = now.lock().unwrap().clone();
            if since.elapsed() > patience {
                crate::support::tell(&format!("chaos: found: {what}: hangs\n{}", who_waits()));
                // SAFETY: ends the process without exit handlers.
                unsafe { libc::_exit(102) };
            }
        }
    };
    std::thread::Builder::new().name("watch".into()).spawn(body).unwrap();
    wait.recv().unwrap();
}

/// The threads of this process group: what the kernel says of each.
fn who_waits() -> String {
    let group = nix::unistd::getpgrp().as_raw().to_string();
    let mut text = String::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let read = |path: std::path::PathBuf| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let stat = read(entry.path().join("stat"));
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        if fields.get(2) != Some(&group.as_str()) {
            continue;
        }
        for task in std::fs::read_dir(entry.path().join("task")).into_iter().flatten().flatten() {
            let path = task.path();
            let (comm, wchan) = (read(path.join("comm")), read(path.join("wchan")));
            let (syscall, stack) = (read(path.join("syscall")), read(path.join("stack")));
            text.push_str(&format!("{} {comm}: {wchan}; syscall {syscall}\n", path.display()));
            for line in stack.lines().take(8) {
                text.push_str(&format!("    {line}\n"));
            }
        }
    }
    text
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

    fn avail(&self, vmap: usize, pgoff: u64) -> Avail {
        let Some(state) = self.vmaps[vmap].as_ref().and_then(|vmap| vmap.pages.get(pgoff as usize)) else {
            return Avail::Bus;
        };
        match state {
            PageState { given: false, .. } => Avail::Bus,
            PageState { revoked: false, .. } | PageState { resident: Resident::Yes, .. } => Avail::Bytes,
            PageState { resident: Resident::No, .. } => Avail::Bus,
            PageState { resident: Resident::Maybe, .. } => Avail::Unknown,
        }
    }

    fn update(&self, vmap: usize) {
        let nr_pages = self.vmaps[vmap].as_ref().map_or(0, |vmap| vmap.pages.len());
        for pgoff in 0..nr_pages as u64 {
            self.sheet.set_avail(vmap, pgoff, self.avail(vmap, pgoff));
        }
    }

    /// Notes that a page was touched, with bytes or SIGBUS.
    fn touched(&mut self, vmap: usize, pgoff: u64, bytes: bool) {
        let around = self.settings.around as u64;
        let Some(state) = &mut self.vmaps[vmap] else { return };
        let block = pgoff - pgoff % around;
        for (n, page) in state.pages.iter_mut().enumerate().skip(block as usize).take(around as usize) {
            if n as u64 == pgoff {
                page.resident = if bytes { Resident::Yes } else { Resident::No };
            } else if page.resident == Resident::No && page.given && !page.revoked {
                page.resident = Resident::Maybe;
            }
        }
        self.update(vmap);
    }

    /// Judges what a touch of a page came to; `write`: it was a store.
    fn judge(&mut self, cell: Option<Cell>, saw: Saw, write: bool, why: &str) -> Outcome {
        let expected = match cell {
            None => saw == Saw::Segv,
            Some(Cell::Foreign(_)) => saw == Saw::Right,
            Some(Cell::Page { access: Access::None, .. }) => saw == Saw::Segv,
            Some(Cell::Page { access: Access::Read, .. }) if write => saw == Saw::Segv,
            Some(Cell::Page { vmap, pgoff, .. }) => {
                let right = match self.avail(vmap, pgoff) {
                    Avail::Bus => saw == Saw::Bus,
                    Avail::Bytes => saw == Saw::Right,
                    Avail::Unknown => matches!(saw, Saw::Right | Saw::Bus),
                };
                if right {
                    self.touched(vmap, pgoff, saw == Saw::Right);
                }
                right
            }
        };
        let avail = match cell {
            Some(Cell::Page { vmap, pgoff, .. }) => {
                format!("; {:?}", self.vmaps[vmap].as_ref().and_then(|vmap| vmap.pages.get(pgoff as usize)))
            }
            _ => String::new(),
        };
        ensure!(expected, "{} of {cell:?}{avail} was {saw:?} {why}", if write { "a write" } else { "a read" });
        Ok(())
    }

    fn cell(&self, process: usize, at: usize) -> Option<Cell> {
        self.process(process)?.space.cells.get(&page_of(at)).copied()
    }

    fn expect(cell: Option<Cell>) -> Expect {
        match cell {
            None => Expect::Nothing,
            Some(Cell::Foreign(byte)) => Expect::Foreign(byte),
            Some(Cell::Page { vmap, pgoff, .. }) => Expect::Page { vmap, pgoff },
        }
    }

    /// Where the pages of a region that a process can use as such are all there, with access to bytes.
    fn whole(&self, process: usize, region: u32, offset: usize, len: usize, write: bool) -> Option<(usize, u64)> {
        let state = *self.process(process)?.regions.get(&region)?;
        let RegionState { vmap, page, pages, pgoff, writable, inherit, here } = state;
        if len == 0 || offset + len > pages * page_size() || write && !writable || !(inherit || here) {
            return None;
        }
        for n in offset / page_size()..(offset + len).div_ceil(page_size()) {
            match self.process(process)?.space.cells.get(&(page + n)) {
                Some(&Cell::Page { vmap: v, pgoff: p, access, .. })
                    if v == vmap && p == pgoff + n as u64 && self.avail(v, p) == Avail::Bytes =>
                {
                    if access == Access::None || write && access == Access::Read {
                        return None;
                    }
                }
                _ => return None,
            }
        }
        Some((vmap, pgoff))
    }

    fn touched_range(&mut self, vmap: usize, pgoff: u64, offset: usize, len: usize) {
        for n in offset / page_size()..(offset + len).div_ceil(page_size()) {
            self.touched(vmap, pgoff + n as u64, true);
        }
    }

    /// Changes what the sheet says of bytes from `offset` on, counted from page `pgoff`.
    fn written(&mut self, vmap: usize, pgoff: u64, offset: usize, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done;
            let most = (page_size() - at % page_size()).min(bytes.len() - done);
            self.sheet.write(vmap, pgoff + (at / page_size()) as u64, at % page_size(), &bytes[done..done + most]);
            done += most;
        }
    }

    fn range(at: usize, pages: usize) -> Option<std::ops::Range<usize>> {
        let end = (at + pages).min(ARENA);
        (at < end).then(|| page_of(at)..page_of(end))
    }

    /// Pages of a vmap that are dropped from the object: the next touch asks the list again.
    fn removed(&mut self, vmap: usize, pgoff: u64) {
        if let Some(state) = &mut self.vmaps[vmap]
            && let Some(page) = state.pages.get_mut(pgoff as usize)
        {
            page.resident = Resident::No;
            if page.given {
                self.sheet.restore(vmap, pgoff);
            }
        }
        self.update(vmap);
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
            &Op::Attach { process, region, vmap, pgoff, pages, at, writable, inherit } => {
                self.attach(process, region, vmap, pgoff, pages, at, writable, inherit)
            }
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
                let job = Job::Protect { addr: addr_of(run.start), len: addr_of(run.len()), access: wanted };
                let answer = self.ask(process, job)?;
                ensure!(answer == Answer::Done, "{answer:?}");
                for (_, cell) in self.space(process).cells.range_mut(run) {
                    if let Cell::Page { access, .. } = cell {
                        *access = wanted;
                    }
                }
                Ok(())
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
                self.local.vmaps[&vmap].revoke(how).map_err(|error| error.to_string())?;
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

    /// The whole area around a page of the arena, if it can be touched, has one access, and is of the only region that shows its vmap:
    /// what `mremap` adds without an event is then known to be of that region.
    fn lone_area(&self, process: usize, at: usize) -> Option<std::ops::Range<usize>> {
        let cells = &self.process(process)?.space.cells;
        let &Cell::Page { vmap, area, region, access, .. } = cells.get(&page_of(at))? else { return None };
        // What can't be touched is not looked up: it is known only when it can be.
        if access == Access::None {
            return None;
        }
        let of_area = |cell: &Cell| cell.area() == Some(area);
        let start = *cells.iter().find(|(_, cell)| of_area(cell))?.0;
        let end = *cells.iter().rfind(|(_, cell)| of_area(cell))?.0 + 1;
        // A neighbour that shows the pages before or after would be taken for the same area.
        let alone = cells.iter().all(|(&page, cell)| match *cell {
            Cell::Page { vmap: v, area: a, region: r, .. } if v == vmap => {
                r == region && (a == area || page + 1 != start && page != end)
            }
            _ => true,
        });
        let run = self.process(process)?.space.run_at(start..end);
        (alone && run == (start..end)).then_some(run)
    }

    /// Grows an area in place, and touches what it got.
    fn grow(&mut self, process: usize, at: usize, by: usize) -> Outcome {
        let Some(area) = self.lone_area(process, at) else { return Ok(()) };
        let new_end = (area.end + by).min(page_of(ARENA));
        let free = |cells: &std::collections::BTreeMap<usize, Cell>| cells.range(area.end..new_end).next().is_none();
        if new_end <= area.end || !self.process(process).is_some_and(|process| free(&process.space.cells)) {
            return Ok(());
        }
        // The kernel tells of it by a fault only. A part in which no page is missing goes with its region, and no more
        // than that is promised of it.
        let Some(Cell::Page { vmap, pgoff, .. }) = self.cell(process, area.start - page_of(0)) else { return Ok(()) };
        let missing = |pgoff: u64| {
            let state = self.vmaps[vmap].as_ref().and_then(|vmap| vmap.pages.get(pgoff as usize));
            state.is_some_and(|page| !page.given || page.resident == Resident::No)
        };
        if !(pgoff + area.len() as u64..pgoff + (new_end - area.start) as u64).any(missing) {
            return Ok(());
        }
        let (from, len, new_len) = (addr_of(area.start), addr_of(area.len()), addr_of(new_end - area.start));
        let answer = self.ask(process, Job::Remap { from, len, new_len, flags: 0, to: None })?;
        ensure!(answer == Answer::Value(from as u64), "{answer:?}");
        self.space(process).grow(area.end, new_end);
        self.look(process, area.end..new_end)
    }

    /// Moves an area and leaves its old range as it is, so that both show its pages.
    fn double(&mut self, process: usize, at: usize, to: usize) -> Outcome {
        let Some(area) = self.lone_area(process, at) else { return Ok(()) };
        let Some(target) = Self::range(to, area.len()).filter(|target| target.len() == area.len()) else {
            return Ok(());
        };
        // Apart from everything else, so that neither range goes on where another ends.
        let around = target.start - 1..target.end + 1;
        let free = self.process(process).is_some_and(|process| process.space.cells.range(around).next().is_none());
        if !free {
            return Ok(());
        }
        let (from, len) = (addr_of(area.start), addr_of(area.len()));
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
        let answer =
            self.ask(process, Job::Remap { from, len, new_len: len, flags, to: Some(addr_of(target.start)) })?;
        ensure!(answer == Answer::Value(addr_of(target.start) as u64), "{answer:?}");
        self.space(process).double(area.clone(), target.start);
        self.look(process, area)?;
        self.look(process, target)
    }

    fn space(&mut self, process: usize) -> &mut AddressSpace {
        &mut self.processes[process].as_mut().expect("checked by the caller").space
    }

    fn has_handle(&self, vmap: usize) -> bool {
        self.vmaps.get(vmap).is_some_and(|state| state.as_ref().is_some_and(|state| state.handle))
    }

    /// The parts, without sources where the kernel can't serve them.
    fn possible(&self, parts: &[Part]) -> Vec<Part> {
        let sources = self.engine().features().contains(Features::THREAD_ID);
        let possible = |&part: &Part| match part {
            Part::Source { pages, .. } if !sources => Part::Zero { pages },
            part => part,
        };
        parts.iter().map(possible).collect()
    }

    fn new_vmap(&mut self, vmap: usize, parts: &[Part], expandable: bool) -> Outcome {
        if vmap >= VMAPS || self.vmaps[vmap].is_some() {
            return Ok(());
        }
        let (list, given) = build(vmap, 0, &self.possible(parts));
        let derefs = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&derefs);
        let mut builder = self.engine().vmap_builder(&list).on_deref(move |_| {
            counted.fetch_add(1, Ordering::SeqCst);
        });
        if expandable {
            builder = builder.expandable();
        }
        let built = builder.build().map_err(|error| error.to_string())?;
        self.local.vmaps.insert(vmap, built);
        let (count, expected_derefs) = (0, 0);
        self.vmaps[vmap] =
            Some(VmapState { pages: Vec::new(), expandable, handle: true, derefs, expected_derefs, count, known: 1 });
        self.append(vmap, given);
        Ok(())
    }

    fn append(&mut self, vmap: usize, given: Vec<crate::lists::Given>) {
        let Some(state) = &mut self.vmaps[vmap] else { return };
        for bytes in given {
            if let Some(bytes) = &bytes {
                self.sheet.set_list(vmap, state.pages.len() as u64, bytes);
            }
            let page = PageState { given: bytes.is_some(), revoked: false, resident: Resident::No };
            state.pages.push(page);
        }
        self.update(vmap);
    }

    fn expand(&mut self, vmap: usize, parts: &[Part]) -> Outcome {
        if !self.has_handle(vmap) {
            return Ok(());
        }
        let Some(state) = &self.vmaps[vmap] else { return Ok(()) };
        let more: usize = parts.iter().map(|part| part.pages()).sum();
        if state.pages.len() + more > PAGES {
            return Ok(());
        }
        let (tail, given) = build(vmap, state.pages.len() as u64, &self.possible(parts));
        let outcome = self.local.vmaps[&vmap].expand(&tail);
        ensure!(outcome.is_ok() == state.expandable, "{outcome:?}");
        if outcome.is_ok() {
            self.append(vmap, given);
        }
        Ok(())
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of one operation")]
    fn attach(
        &mut self,
        process: usize,
        region: u32,
        vmap: usize,
        pgoff: u64,
        pages: usize,
        at: Option<usize>,
        writable: bool,
        inherit: bool,
    ) -> Outcome {
        let known = self.vmaps.get(vmap).and_then(Option::as_ref).is_some_and(|v| v.known & (1 << process) != 0);
        if self.process(process).is_none() || !known || at.is_some_and(|at| at + pages > ARENA) {
            return Ok(());
        }
        let place = at.map(page_of);
        let job = Job::Attach { region, vmap, pgoff, pages, at: place.map(addr_of), writable, inherit };
        let first = self.vmaps[vmap].as_ref().is_some_and(|state| state.count == 0);
        let answer = self.ask(process, job)?;
        let space = self.space(process);
        let taken = place.is_some_and(|page| space.cells.range(page..page + pages).next().is_some());
        match answer {
            Answer::Errno(libc::EEXIST) if taken => Ok(()),
            Answer::Attached { addr, first: said } if !taken => {
                ensure!(place.is_none_or(|page| addr == addr_of(page)), "attached at {addr:#x}");
                ensure!(said == first, "attach says first: {said}");
                let page = addr / page_size();
                let area = space.new_area();
                let access = if writable { Access::Write } else { Access::Read };
                space.cells.extend((0..pages).map(|n| {
                    (page + n, Cell::Page { vmap, pgoff: pgoff + n as u64, area, region, access, writable, inherit })
                }));
                let state = RegionState { vmap, page, pages, pgoff, writable, inherit, here: true };
                if let Some(process) = &mut self.processes[process] {
                    process.regions.insert(region, state);
                }
                Ok(())
            }
            other => Err(format!("taken: {taken}; {other:?}")),
        }
    }

    fn vmap_access(&mut self, vmap: usize, offset: usize, len: usize, value: Option<u8>) -> Outcome {
        if !self.has_handle(vmap) {
            return Ok(());
        }
        let nr_pages = self.vmaps[vmap].as_ref().map_or(0, |state| state.pages.len());
        let beyond = offset + len > nr_pages * page_size();
        let pages = offset / page_size()..(offset + len).div_ceil(page_size());
        let avails: Vec<Avail> = pages.clone().map(|page| self.avail(vmap, page as u64)).collect();
        let handle = &self.local.vmaps[&vmap];
        let mut bytes = vec![value.unwrap_or(0); len];
        let outcome = match value {
            None => handle.read_at(offset as u64, &mut bytes),
            Some(_) => handle.write_at(offset as u64, &bytes),
        };
        match outcome {
            Ok(()) => {
                ensure!(!beyond, "an access past the end succeeds");
                ensure!(!avails.contains(&Avail::Bus), "an access to a page that is not there succeeds");
                for page in pages {
                    if let Some(state) = &mut self.vmaps[vmap] {
                        state.pages[page].resident = Resident::Yes;
                    }
                }
                if value.is_some() {
                    self.written(vmap, 0, offset, &bytes);
                } else {
                    for (n, &byte) in bytes.iter().enumerate() {
                        let at = offset + n;
                        let expected = self.sheet.now(vmap, (at / page_size()) as u64)[at % page_size()];
                        ensure!(byte == expected, "byte {at} is {byte:#x}, not {expected:#x}");
                    }
                }
            }
            Err(kiomap::Error::Invalid { .. }) if beyond => return Ok(()),
            Err(kiomap::Error::NoPage { pgoff, .. }) => {
                ensure!(self.avail(vmap, pgoff) != Avail::Bytes, "page {pgoff} is said not to be there");
                if let Some(page) = self.vmaps[vmap].as_mut().and_then(|state| state.pages.get_mut(pgoff as usize)) {
                    page.resident = Resident::No;
                }
                // Those before it were filled.
                for page in pages.start..pgoff as usize {
                    if let Some(state) = &mut self.vmaps[vmap] {
                        state.pages[page].resident = Resident::Yes;
                    }
                }
            }
            Err(error) => return Err(error.to_string()),
        }
        self.update(vmap);
        Ok(())
    }

    fn pipe(&mut self, process: usize, at: usize, word: usize, value: Option<u64>) -> Outcome {
        if self.process(process).is_none() || at >= ARENA {
            return Ok(());
        }
        let cell = self.cell(process, at);
        if matches!(cell, Some(Cell::Foreign(_))) {
            return Ok(());
        }
        let addr = addr_of(page_of(at)) + word * 8;
        let job = match value {
            None => Job::PipeOut { addr },
            Some(value) => Job::PipeIn { addr, value },
        };
        let answer = self.ask(process, job)?;
        let saw = match answer {
            Answer::Errno(libc::EFAULT) => match cell {
                Some(Cell::Page { access: Access::None, .. }) | None => Saw::Segv,
                Some(Cell::Page { access: Access::Read, .. }) if value.is_some() => Saw::Segv,
                // The kernel may not wait for the page.
                Some(_) if !self.kernel_faults => return Ok(()),
                Some(_) => Saw::Bus,
            },
            Answer::Done => Saw::Right,
            Answer::Value(got) => match cell {
                Some(Cell::Page { vmap, pgoff, .. })
                    if pgoff < PAGES as u64 && got == Sheet::word(self.sheet.now(vmap, pgoff), word) =>
                {
                    Saw::Right
                }
                _ => Saw::Wrong,
            },
            other => return Err(format!("{other:?}")),
        };
        self.judge(cell, saw, value.is_some(), "by a system call")?;
        if let (Saw::Right, Some(value), Some(Cell::Page { vmap, pgoff, .. })) = (saw, value, cell) {
            self.sheet.write(vmap, pgoff, word * 8, &value.to_ne_bytes());
        }
        Ok(())
    }

    fn advise(&mut self, process: usize, at: usize, pages: usize, advice: Advice) -> Outcome {
        let (Some(state), Some(range)) = (self.process(process), Self::range(at, pages)) else { return Ok(()) };
        let run = state.space.run_at(range);
        let Some(&Cell::Page { vmap, pgoff, access, .. }) = state.space.cells.get(&run.start) else { return Ok(()) };
        let pgoffs = pgoff..pgoff + run.len() as u64;
        let job = Job::Advise { addr: addr_of(run.start), len: addr_of(run.len()), advice };
        let answer = self.ask(process, job)?;
        let denied = access == Access::None || advice == Advice::PopulateWrite && access != Access::Write;
        match advice {
            Advice::DontNeed | Advice::Cold | Advice::PageOut => ensure!(answer == Answer::Done, "{answer:?}"),
            Advice::Free => ensure!(answer == Answer::Errno(libc::EINVAL), "{answer:?}"),
            Advice::Remove => {
                ensure!(answer == Answer::Done, "{answer:?}");
                for pgoff in pgoffs {
                    self.removed(vmap, pgoff);
                }
            }
            Advice::PopulateRead | Advice::PopulateWrite => {
                let avails: Vec<Avail> = pgoffs.clone().map(|pgoff| self.avail(vmap, pgoff)).collect();
                let good = !denied && avails.iter().all(|&avail| avail == Avail::Bytes);
                let bad = denied || avails.contains(&Avail::Bus);
                ensure!(!(bad && answer == Answer::Done), "pages that are not there are populated");
                ensure!(!good || !self.kernel_faults || answer == Answer::Done, "{answer:?}");
                for pgoff in pgoffs {
                    match answer {
                        Answer::Done => self.touched(vmap, pgoff, true),
                        // Some were.
                        _ => self.perhaps(vmap, pgoff),
                    }
                }
            }
        }
        Ok(())
    }

    /// Notes that a page and its neighbours may have been touched.
    fn perhaps(&mut self, vmap: usize, pgoff: u64) {
        let around = self.settings.around as u64;
        let block = pgoff - pgoff % around;
        if let Some(state) = &mut self.vmaps[vmap] {
            for page in state.pages.iter_mut().skip(block as usize).take(around as usize) {
                if page.resident == Resident::No && page.given && !page.revoked {
                    page.resident = Resident::Maybe;
                }
            }
        }
        self.update(vmap);
    }

    fn fork(&mut self, process: usize, child: usize) -> Outcome {
        if child == 0 || child >= PROCESSES || self.process(process).is_none() || self.process(child).is_some() {
            return Ok(());
        }
        self.local.drain(child);
        let pid = match self.ask(process, Job::Fork { child })? {
            Answer::Value(pid) => pid as i32,
            other => return Err(format!("fork: {other:?}")),
        };
        let pidfd = pidfd(pid);
        let Some(parent) = self.process(process) else { return Ok(()) };
        let space = parent.space.forked();
        let mut regions = parent.regions.clone();
        regions.values_mut().for_each(|region| region.here = false);
        self.processes[child] = Some(Process { pid, parent: process, pidfd: Some(pidfd), space, regions });
        let answer = self.hear(child)?;
        ensure!(answer == Answer::Hello { pid }, "{answer:?}");
        for vmap in self.vmaps.iter_mut().flatten() {
            vmap.known &= !(1 << child);
            vmap.known |= (vmap.known >> process & 1) << child;
        }
        self.most_processes = self.most_processes.max(self.processes.iter().flatten().count());
        Ok(())
    }

    fn kill(&self, process: usize) {
        if let Some(process) = self.process(process) {
            // SAFETY: a process of this round that nobody has reaped.
            unsafe { libc::kill(process.pid, libc::SIGKILL) };
        }
    }

    /// A process runs another program: it has no area any more, before it ends.
    fn executed(&mut self, process: usize) -> Outcome {
        let Some(pid) = self.process(process).map(|process| process.pid) else { return Ok(()) };
        let start = Instant::now();
        while std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() != "sleep") {
            ensure!(start.elapsed() < LATE, "the process does not execute");
            std::thread::yield_now();
        }
        self.space(process).cells.clear();
        self.late = true;
        self.counts()?;
        self.kill(process);
        Ok(())
    }

    /// Waits for the end of a process, and has its parent reap it.
    fn gone(&mut self, process: usize) -> Outcome {
        let Some(Process { pid, parent, pidfd, .. }) = self.processes[process].take() else { return Ok(()) };
        if let Some(pidfd) = &pidfd {
            ended(pidfd);
        }
        for other in self.processes.iter_mut().flatten().filter(|other| other.parent == process) {
            other.parent = 0;
        }
        for vmap in self.vmaps.iter_mut().flatten() {
            vmap.known &= !(1 << process);
        }
        let answer = self.ask(parent, Job::Reap { pid })?;
        ensure!(answer == Answer::Done, "reaping: {answer:?}");
        Ok(())
    }

    /// Compares the counts and the callbacks with the model's.
    fn counts(&mut self) -> Outcome {
        let mut counts = [0; VMAPS];
        for process in self.processes.iter().flatten() {
            for (sum, n) in counts.iter_mut().zip(process.space.counts()) {
                *sum += n;
            }
        }
        for (state, count) in self.vmaps.iter_mut().zip(counts) {
            let Some(state) = state else { continue };
            if state.count > 0 && count == 0 {
                state.expected_derefs += 1;
            }
            state.count = count;
        }
        if self.down {
            // Other processes are not counted any more, and nothing says when what happened is.
            return Ok(());
        }
        let start = Instant::now();
        loop {
            self.engine().settle().map_err(|error| error.to_string())?;
            let wrong = self.vmaps.iter().enumerate().find_map(|(vmap, state)| {
                let (state, handle) = (state.as_ref()?, self.local.vmaps.get(&vmap)?);
                let count = handle.refcount().ok()?;
                (count != state.count).then(|| format!("vmap {vmap} has the count {count}, not {}", state.count))
            });
            match wrong {
                None => break,
                Some(wrong) => ensure!(self.late && start.elapsed() < LATE, "{wrong}"),
            }
            std::thread::yield_now();
        }
        self.late = false;
        for (vmap, state) in self.vmaps.iter().enumerate() {
            let Some(state) = state else { continue };
            loop {
                let derefs = state.derefs.load(Ordering::SeqCst);
                if derefs == state.expected_derefs {
                    break;
                }
                ensure!(
                    derefs < state.expected_derefs,
                    "vmap {vmap}: {derefs} callbacks, not {}",
                    state.expected_derefs
                );
                ensure!(start.elapsed() < LATE, "vmap {vmap}: {derefs} callbacks, not {}", state.expected_derefs);
                std::thread::yield_now();
            }
        }
        Ok(())
    }

    /// Looks at every page that any process has, and at what the kernel says of each.
    fn check(&mut self) -> Outcome {
        self.counts()?;
        truth::assert_truth(self.engine());
        for process in 0..PROCESSES {
            let Some(state) = self.process(process) else { continue };
            for (range, _) in state.space.runs() {
                self.look(process, range)?;
            }
        }
        truth::assert_truth(self.engine());
        Ok(())
    }

    /// Touches every page of a run and compares it.
    fn look(&mut self, process: usize, range: std::ops::Range<usize>) -> Outcome {
        let cell = self.process(process).and_then(|process| process.space.cells.get(&range.start)).copied();
        let job = Job::Look { addr: addr_of(range.start), pages: range.len(), expect: Self::expect(cell) };
        let Answer::Saw(saw, why) = self.ask(process, job)? else { return Err("no answer".into()) };
        for (page, saw) in range.clone().zip(saw) {
            let cell = self.process(process).and_then(|process| process.space.cells.get(&page)).copied();
            let why = format!("in process {process} at {:#x} {why}", addr_of(page));
            self.judge(cell, saw, false, &why)?;
        }
        Ok(())
    }

    fn storm(&mut self, storm: &Storm) -> Outcome {
        self.storms += 1;
        let processes: Vec<usize> =
            storm.processes.iter().copied().filter(|&process| self.process(process).is_some()).collect();
        let killed = storm.kill.filter(|killed| *killed != 0 && processes.contains(killed));
        let removes = storm.advice.contains(&Advice::Remove) || storm.evict && storm.cuts > 0;
        let mut rng = Rng::new(storm.seed);
        let mut jobs = Vec::new();
        for (index, &process) in processes.iter().enumerate() {
            let job = self.storm_job(storm, process, index * LANES_EACH, removes, &mut rng);
            jobs.push((process, job));
        }
        self.add_churn(storm, &mut jobs, killed, &mut rng);
        // Those of the others first, as this process is busy with its own.
        for (process, job) in jobs.iter().filter(|(process, _)| *process != 0) {
            self.local.tell(*process, &Job::Storm(job.clone()));
        }
        let killer = killed.map(|process| {
            let pid = self.process(process).map_or(0, |process| process.pid);
            let wait = Duration::from_micros(rng.below(4000));
            std::thread::spawn(move || {
                std::thread::sleep(wait);
                // SAFETY: a process of this round that nobody has reaped.
                unsafe { libc::kill(pid, libc::SIGKILL) };
            })
        });
        let mut answers = Vec::new();
        if let Some((_, job)) = jobs.iter().find(|(process, _)| *process == 0) {
            answers.push(self.local.perform(Job::Storm(job.clone())));
        }
        if let Some(killer) = killer {
            killer.join().map_err(|_| "the killer panicked")?;
        }
        for &(process, _) in jobs.iter().filter(|(process, _)| *process != 0 && Some(*process) != killed) {
            answers.push(self.hear(process)?);
        }
        if let Some(killed) = killed {
            self.gone(killed)?;
            // What it had forked is ended by itself, and counted then.
            self.late = true;
        }
        for answer in answers {
            match answer {
                Answer::Storm { touches, problem: None } => self.touches += touches,
                Answer::Storm { problem: Some(problem), .. } => return Err(problem),
                other => return Err(format!("{other:?}")),
            }
        }
        for (process, job) in &jobs {
            if self.process(*process).is_some() {
                for &(addr, len, _) in &job.cuts {
                    let (page, pages) = (addr / page_size(), len / page_size());
                    self.space(*process).unmap(page..page + pages);
                }
            }
        }
        self.reconcile(storm, &jobs, removes)
    }

    fn storm_job(&mut self, storm: &Storm, process: usize, lane: usize, removes: bool, rng: &mut Rng) -> StormJob {
        let Some(state) = self.process(process) else { unreachable!("checked by the caller") };
        let mut runs = Vec::new();
        for (range, cell) in state.space.runs() {
            let Cell::Page { vmap, pgoff, access, writable, inherit, .. } = cell else { continue };
            let kept = self.has_handle(vmap)
                && self.vmaps[vmap].as_ref().is_some_and(|state| state.pages.iter().all(|page| !page.revoked));
            let natural = if writable { Access::Write } else { Access::Read };
            let inherited = inherit.then_some(natural);
            let (addr, pages) = (addr_of(range.start), range.len());
            runs.push(Run { addr, pages, vmap, pgoff, access, inherited, writable: kept });
        }
        runs.truncate(64);
        let mut part = |runs: &[Run]| -> Option<(usize, usize, bool)> {
            let run = runs.get(rng.below(runs.len().max(1) as u64) as usize)?;
            let first = rng.below(run.pages as u64) as usize;
            let pages = 1 + rng.below((run.pages - first).min(12) as u64) as usize;
            Some((run.addr + first * page_size(), pages * page_size(), run.writable))
        };
        // Elsewhere another thread may get the addresses at once.
        let in_arena = |addr: &usize| (page_of(0)..page_of(ARENA)).contains(&(addr / page_size()));
        let cuts = (0..storm.cuts)
            .filter_map(|_| part(&runs))
            .map(|(addr, len, writable)| (addr, len, storm.evict && writable));
        let cuts = cuts.filter(|(addr, ..)| in_arena(addr)).collect();
        let advice = storm.advice.iter().filter_map(|&advice| {
            let (addr, len, writable) = part(&runs)?;
            (advice != Advice::Remove || writable).then_some((addr, len, advice))
        });
        let advice = advice.collect();
        StormJob {
            number: self.storms,
            seed: crate::script::stamp(storm.seed, process as u64),
            lane,
            touchers: storm.touchers.clamp(1, LANES_EACH),
            touches: storm.touches,
            runs,
            cuts,
            advice,
            removes,
            writes: storm.writes,
            churn: None,
            churns: storm.churns,
            forks: storm.forks,
            timer: storm.timer,
        }
    }

    /// Chooses vmaps that have an area during all of the storm: each attach in it is then not the first.
    fn add_churn(&self, storm: &Storm, jobs: &mut [(usize, StormJob)], killed: Option<usize>, rng: &mut Rng) {
        if storm.churns == 0 {
            return;
        }
        let mut counts = [0; VMAPS];
        for (number, state) in self.processes.iter().enumerate() {
            let Some(state) = state.as_ref().filter(|_| Some(number) != killed) else { continue };
            let mut space = state.space.clone();
            for (_, job) in jobs.iter().filter(|(process, _)| *process == number) {
                for &(addr, len, _) in &job.cuts {
                    space.unmap(addr / page_size()..(addr + len) / page_size());
                }
            }
            for (sum, n) in counts.iter_mut().zip(space.counts()) {
                *sum += n;
            }
        }
        for (process, job) in jobs {
            let known = |vmap: &usize| {
                let state = self.vmaps[*vmap].as_ref();
                counts[*vmap] > 0 && state.is_some_and(|state| state.known & (1 << *process) != 0)
            };
            let usable: Vec<usize> = (0..VMAPS).filter(known).collect();
            if !usable.is_empty() {
                let vmap = usable[rng.below(usable.len() as u64) as usize];
                let nr_pages = self.vmaps[vmap].as_ref().map_or(0, |state| state.pages.len());
                job.churn = Some((vmap, CHURN_START, nr_pages as u64));
            }
        }
    }

    /// After a storm: what may have been touched, and what may have been written or dropped.
    fn reconcile(&mut self, storm: &Storm, jobs: &[(usize, StormJob)], removes: bool) -> Outcome {
        let runs: Vec<Run> = jobs.iter().flat_map(|(_, job)| job.runs.iter().copied()).collect();
        let churned = jobs.iter().filter_map(|(_, job)| job.churn).map(|(vmap, ..)| vmap);
        let vmaps: std::collections::BTreeSet<usize> = runs.iter().map(|run| run.vmap).chain(churned).collect();
        for &vmap in &vmaps {
            let Some(state) = &mut self.vmaps[vmap] else { continue };
            for page in state.pages.iter_mut().filter(|page| page.given && !page.revoked) {
                if page.resident == Resident::No || removes {
                    page.resident = Resident::Maybe;
                }
            }
            self.update(vmap);
        }
        if !storm.writes && !removes {
            return Ok(());
        }
        for vmap in vmaps {
            if !self.has_handle(vmap) {
                continue;
            }
            let nr_pages = self.vmaps[vmap].as_ref().map_or(0, |state| state.pages.len() as u64);
            for pgoff in 0..nr_pages {
                let changed = |run: &Run| {
                    run.vmap == vmap && run.writable && (run.pgoff..run.pgoff + run.pages as u64).contains(&pgoff)
                };
                if self.avail(vmap, pgoff) != Avail::Bytes || !runs.iter().any(changed) {
                    continue;
                }
                let mut bytes = vec![0; page_size()];
                let read = self.local.vmaps[&vmap].read_at(pgoff * page_size() as u64, &mut bytes);
                read.map_err(|error| format!("page {pgoff} of vmap {vmap} after a storm: {error}"))?;
                for word in 0..page_size() / 8 {
                    let value = Sheet::word(&bytes, word);
                    let job = (self.storms, storm.writes, removes);
                    ensure!(
                        allowed(job, self.sheet, vmap, pgoff, word, value),
                        "word {word} of page {pgoff} of vmap {vmap} is {value:#x} after a storm"
                    );
                }
                self.sheet.write(vmap, pgoff, 0, &bytes);
                if let Some(state) = &mut self.vmaps[vmap] {
                    state.pages[pgoff as usize].resident = Resident::Yes;
                }
            }
            self.update(vmap);
        }
        Ok(())
    }

    /// Shuts the engine down under everybody's feet. Resident pages stay, in every process; what is missing is SIGBUS, as
    /// if every list had been taken back.
    fn shut_down(&mut self, how: Shutdown) -> Outcome {
        self.engine().shutdown(how).map_err(|error| error.to_string())?;
        self.down = true;
        for vmap in 0..VMAPS {
            if let Some(state) = &mut self.vmaps[vmap] {
                let filled = how == Shutdown::Fill && state.count > 0;
                for page in &mut state.pages {
                    if filled && page.given && !page.revoked {
                        page.resident = Resident::Yes;
                    }
                    page.revoked = true;
                }
            }
            self.update(vmap);
        }
        for process in 0..PROCESSES {
            let runs = self.process(process).map_or_else(Vec::new, |state| state.space.runs());
            for (range, _) in runs {
                self.look(process, range)?;
            }
        }
        Ok(())
    }

    /// Ends everything: nothing is left of it.
    fn end(&mut self, before: (usize, Vec<String>)) -> Outcome {
        match self.settings.end {
            End::Clean => {}
            End::Poison => self.shut_down(Shutdown::Poison)?,
            End::Fill => self.shut_down(Shutdown::Fill)?,
        }
        for process in 1..PROCESSES {
            if self.process(process).is_some() {
                self.kill(process);
                self.gone(process)?;
            }
        }
        self.counts()?;
        // What is left of the own process: regions first, then what was moved and belongs to none.
        let regions: Vec<u32> = self.local.regions.keys().copied().collect();
        for region in regions {
            self.step(&Op::Drop { process: 0, region })?;
            self.counts()?;
        }
        let left: Vec<usize> = self.space(0).cells.keys().copied().collect();
        for page in left {
            // SAFETY: pages of the arena, to which nothing refers.
            unsafe { libc::munmap(addr_of(page) as *mut libc::c_void, page_size()) };
        }
        self.space(0).cells.clear();
        self.counts()?;
        let start = Instant::now();
        for (vmap, handle) in &self.local.vmaps {
            while handle.refcount().map_err(|error| error.to_string())? != 0 {
                let count = handle.refcount();
                ensure!(self.down && start.elapsed() < LATE, "vmap {vmap} has the count {count:?} at the end");
                std::thread::yield_now();
            }
        }
        let stats = self.engine().stats();
        ensure!(stats.panics == 0, "{stats:?}");
        self.local.vmaps.clear();
        drop(self.engine.take());
        for (vmap, state) in self.vmaps.iter().enumerate() {
            let Some(state) = state else { continue };
            loop {
                let derefs = state.derefs.load(Ordering::SeqCst);
                if derefs == state.expected_derefs {
                    break;
                }
                let late = self.down && derefs < state.expected_derefs && start.elapsed() < LATE;
                ensure!(late, "vmap {vmap}: {derefs} callbacks at the end, not {}", state.expected_derefs);
                std::thread::yield_now();
            }
        }
        let start = Instant::now();
        loop {
            let after = (open_descriptors(), threads());
            if after == before && vmap_mappings().is_empty() {
                return Ok(());
            }
            ensure!(start.elapsed() < LATE, "left behind: {before:?} before, {after:?} after; {:?}", vmap_mappings());
            std::thread::yield_now();
        }
    }
}
