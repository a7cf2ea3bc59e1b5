//! Bringing the pages of a region before they are touched.
//!
//! In the engine's process they are filled through the vmap's window, whose addresses nobody else can take, and then
//! mapped by MADV_POPULATE_READ, which shows what lies there and nothing else: whatever other threads unmap, move or map
//! meanwhile, no page of a list gets into memory that is not its own. A forked child has no window and may have an old list:
//! there the engine brings the pages, in answer to the faults of the same call. Large ranges are shared by several threads.

mod together;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::Region;
use crate::fork::link::Local;
use crate::page::{is_aligned, page_floor, page_size};
use crate::runtime::background;
use crate::runtime::command::Command;
use crate::runtime::jobs::Next;
use crate::runtime::shared::EngineShared;
use crate::runtime::threads::{self, Role};
use crate::sys::Stop;
use crate::vmap::core::VmapCore;
use crate::vmap::fill::{Refusal, fill_some};
use crate::vmap::refuse_nested;
use crate::{Error, Result};

/// Pages brought in one step: 2 MiB where pages are of 4 KiB.
const STEP_PAGES: u64 = 512;
/// How long the background waits when threads have faulted since it looked last.
const FAULTS_FIRST: Duration = Duration::from_millis(1);
/// Such waits before a step is made all the same.
const MOST_WAITS: u32 = 8;

/// Says how [`Region::populate_in_background`] goes about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub struct PopulateOptions {
    bytes_per_second: Option<u64>,
    step_bytes: usize,
}

impl Default for PopulateOptions {
    fn default() -> Self {
        PopulateOptions { bytes_per_second: None, step_bytes: 64 * page_size() }
    }
}

impl PopulateOptions {
    /// Begins with the default: as fast as faults allow, in steps of 64 pages.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets how many bytes come in a second at the most, on average from the start on; no limit unless set.
    pub fn bytes_per_second(mut self, bytes: u64) -> Self {
        self.bytes_per_second = Some(bytes);
        self
    }

    /// As [`PopulateOptions::bytes_per_second`], in pages.
    pub fn pages_per_second(self, pages: u64) -> Self {
        self.bytes_per_second(pages.saturating_mul(page_size() as u64))
    }

    /// Sets how many bytes come in one step, a multiple of the page size, at most 512 pages; 64 pages unless set. A limit is
    /// kept, faults are looked for and an end is noticed between steps.
    pub fn step_bytes(mut self, bytes: usize) -> Self {
        self.step_bytes = bytes;
        self
    }

    fn validate(&self) -> Result<()> {
        if self.bytes_per_second == Some(0) {
            return Err(Error::Invalid { what: "bytes_per_second", value: 0, rule: "it must not be zero" });
        }
        let most = STEP_PAGES as usize * page_size();
        if !is_aligned(self.step_bytes) || !(1..=most).contains(&self.step_bytes) {
            let (value, rule) = (self.step_bytes as u64, "it must be whole pages, from 1 to 512");
            return Err(Error::Invalid { what: "step_bytes", value, rule });
        }
        Ok(())
    }
}

/// Says how far a [`Region::populate_in_background`] has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PopulateProgress {
    /// Pages that are attended to: brought, there already, or found not to be had.
    pub pages_done: u64,
    /// Pages that were asked for.
    pub pages_total: u64,
    /// Pages that can't be had, of those done: holes, past the end of the list, failed sources, unmapped.
    pub pages_failed: u64,
}

impl Region {
    /// Brings every page of a byte range that can be had, and maps it here: touching it is no fault then.
    ///
    /// Pages count that have a byte in the range. Other processes find them without asking the list again. Faults are
    /// answered meanwhile. In a forked child the engine brings them.
    ///
    /// A range of more than 32 MiB is shared with threads that are started for the call and have ended when it returns: as many
    /// as processors that the calling thread may use, at most 4 with itself (none if it is bound to one processor). Page
    /// sources are called there too. Where a thread can't be started the others do its work.
    ///
    /// # Errors
    ///
    /// [`Error::NotPopulated`] (`ENOMEM`) when some can't be had: holes, past the end of the list, failed sources, or
    /// unmapped by other code; all others are there then. [`Error::Invalid`] for a range outside the region;
    /// [`Error::Shutdown`]; [`Error::NotInherited`]; [`Error::WouldDeadlock`] in a page source; [`Error::NotOwner`] in a
    /// forked child of an engine that does not serve faults of the kernel ([`OpenWay::serves_kernel_faults`]).
    ///
    /// [`OpenWay::serves_kernel_faults`]: crate::OpenWay::serves_kernel_faults
    pub fn populate(&self, range: Range<usize>) -> Result<()> {
        let mut task = self.task(range)?;
        if self.shared.is_child() {
            task.bring_by_touching()?;
        } else {
            match together::threads_for(task.end - task.at) {
                1 => task.bring()?,
                threads => together::bring(&mut task, threads)?,
            }
        }
        task.outcome()
    }

    /// Brings the pages of a byte range as [`Region::populate`] does, on a thread of the engine, step by step.
    ///
    /// Faults come first: while threads fault, steps are put off, for some milliseconds each. One thread does this for all
    /// regions of an engine, in turns; it is started when there is something to do, and ends afterwards.
    /// It stops where the region is dropped, and at a shutdown.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a range outside the region, or options out of range; [`Error::NotOwner`] in a forked child;
    /// [`Error::Shutdown`]; [`Error::WouldDeadlock`] in a page source; [`Error::Sys`] when the thread can't be started.
    pub fn populate_in_background(&self, range: Range<usize>, options: PopulateOptions) -> Result<Populating> {
        options.validate()?;
        if self.shared.is_child() {
            return Err(Error::NotOwner { what: "populating in the background" });
        }
        let task = self.task(range)?;
        let shared = Arc::clone(&self.shared);
        let state = Arc::new(State {
            total: task.pages_left(),
            done: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            cancelled: AtomicBool::new(false),
            ended: Mutex::new(None),
            news: Condvar::new(),
        });
        let faults_seen = shared.counters.snapshot().faults;
        let mut job =
            Job { state: Ended(Arc::clone(&state)), task, options, since: Instant::now(), faults_seen, waits: 0 };
        background::submit(&self.shared, Box::new(move || job.step()))?;
        Ok(Populating { state, shared, detached: false })
    }

    /// What is to be brought, checked.
    fn task(&self, range: Range<usize>) -> Result<Task> {
        self.check()?;
        if range.start > range.end || range.end > self.len {
            return Err(Error::Invalid {
                what: "the range's end in a region in bytes",
                value: range.end as u64,
                rule: "it must not be before its start, nor past the region",
            });
        }
        if threads::current_role(self.shared.id) == Some(Role::Worker) {
            return Err(Error::WouldDeadlock { what: "populating a region", thread: "worker" });
        }
        refuse_nested("populating a region")?;
        if !self.shared.is_child() && self.shared.retired.load(Ordering::Acquire) {
            return Err(Error::Shutdown);
        }
        let end = if range.is_empty() { range.start } else { range.end.next_multiple_of(page_size()) };
        let (at, end) = (self.addr + page_floor(range.start), self.addr + end);
        let mut task = Task {
            core: Arc::clone(&self.core),
            shared: Arc::clone(&self.shared),
            region: self.id,
            base: self.addr,
            pgoff: self.pgoff,
            at,
            end: end.max(at),
            wanted: 0,
            missing: 0,
            first: None,
        };
        if range.is_empty() {
            task.end = task.at;
        }
        task.wanted = task.pages_left();
        Ok(task)
    }
}

/// A range that is being brought.
struct Task {
    core: Arc<VmapCore>,
    shared: Arc<EngineShared>,
    region: u64,
    /// Where the region was attached, and which page it begins with.
    base: usize,
    pgoff: u64,
    /// What is left, whole pages.
    at: usize,
    end: usize,
    wanted: u64,
    missing: u64,
    first: Option<Missing>,
}

/// The first page that can't be had.
struct Missing {
    addr: usize,
    pgoff: u64,
    why: String,
}

/// A range of addresses that is the region's, and the page at its start.
#[derive(Clone)]
struct Piece {
    range: Range<usize>,
    pgoff: u64,
}

impl Piece {
    fn pgoff_of(&self, addr: usize) -> u64 {
        self.pgoff + ((addr - self.range.start) / page_size()) as u64
    }
}

const UNMAPPED: &str = "it is not mapped any more";

impl Task {
    fn pages_left(&self) -> u64 {
        ((self.end - self.at) / page_size()) as u64
    }

    /// Takes what is before an address out, as a task of its own.
    fn split_off(&mut self, end: usize) -> Task {
        let at = std::mem::replace(&mut self.at, end);
        let (core, shared) = (Arc::clone(&self.core), Arc::clone(&self.shared));
        Task { core, shared, at, end, missing: 0, first: None, ..*self }
    }

    /// Counts what a part of this could not have.
    fn absorb(&mut self, part: &mut Task) {
        self.missing += std::mem::take(&mut part.missing);
        if let Some(first) = part.first.take().filter(|its| self.first.as_ref().is_none_or(|own| its.addr < own.addr)) {
            self.first = Some(first);
        }
    }

    fn miss(&mut self, addr: usize, pgoff: u64, pages: u64, why: impl Into<String>) {
        if pages > 0 {
            self.missing += pages;
            self.first.get_or_insert_with(|| Missing { addr, pgoff, why: why.into() });
        }
    }

    /// Brings all that is left.
    fn bring(&mut self) -> Result<()> {
        while self.at < self.end {
            let Some(piece) = self.piece()? else { break };
            self.bring_piece(&piece)?;
        }
        self.rest_is_unmapped();
        Ok(())
    }

    /// Brings what is left of a piece.
    fn bring_piece(&mut self, piece: &Piece) -> Result<()> {
        while self.at < self.end.min(piece.range.end) {
            self.step(piece, STEP_PAGES)?;
        }
        Ok(())
    }

    /// Passes over addresses that are not the region's any more.
    fn pass_unmapped(&mut self, until: usize) {
        let page = page_size();
        let pgoff = self.pgoff + ((self.at - self.base) / page) as u64;
        self.miss(self.at, pgoff, ((until - self.at) / page) as u64, UNMAPPED);
        self.at = until;
    }

    fn rest_is_unmapped(&mut self) {
        self.pass_unmapped(self.end);
    }

    /// Finds the next piece, and passes over what lies before it.
    fn piece(&mut self) -> Result<Option<Piece>> {
        let (region, start, end) = (self.region, self.at, self.end);
        let found = self.shared.handler.ask(|reply| Command::Piece { region, start, end, reply })?;
        Ok(found.map(|(range, pgoff)| {
            self.pass_unmapped(range.start);
            Piece { range, pgoff }
        }))
    }

    /// Brings some pages of a piece from `at` on: about `most`, and the holes behind them.
    fn step(&mut self, piece: &Piece, most: u64) -> Result<()> {
        let page = page_size();
        let core = Arc::clone(&self.core);
        let (first, end) = (piece.pgoff_of(self.at), piece.pgoff_of(piece.range.end.min(self.end)));
        let addr_of = |pgoff: u64| piece.range.start + (pgoff - piece.pgoff) as usize * page;
        // A list that is being taken back must not be filled from: taken back is then either before this step or after it.
        let _in_use = core.in_use.read().unwrap_or_else(PoisonError::into_inner);
        if self.shared.retired.load(Ordering::Acquire) {
            return Err(Error::Shutdown);
        }
        let mut had = first;
        let contents = core.contents();
        let next = fill_some(&core, &contents, first, most, end, |refused, refusal| {
            self.map(addr_of(had), had, refused.start - had);
            had = refused.end;
            let why = match refusal {
                Refusal::Hole => "the list has a hole there",
                Refusal::PastEnd => "the list ends before it",
                Refusal::Failed(why) => {
                    return self.miss(addr_of(refused.start), refused.start, refused.end - refused.start, why);
                }
            };
            // A revoke may have left pages there that are not in the list.
            let mut missing_from = refused.start;
            let window = contents.window.as_ref();
            for there in window.into_iter().flat_map(|window| window.resident(&core.object, refused.clone())) {
                self.miss(addr_of(missing_from), missing_from, there.start - missing_from, why);
                self.map(addr_of(there.start), there.start, there.end - there.start);
                missing_from = there.end;
            }
            self.miss(addr_of(missing_from), missing_from, refused.end - missing_from, why);
        });
        self.map(addr_of(had), had, next - had);
        self.at = addr_of(next);
        Ok(())
    }

    /// Maps pages that the object holds; those that don't come are missing.
    fn map(&mut self, addr: usize, pgoff: u64, pages: u64) {
        if pages == 0 {
            return;
        }
        let page = page_size();
        if self.core.minor_faults {
            self.map_held(addr, pages as usize * page);
        }
        match populate_read(addr, pages as usize * page) {
            Ok(()) => {}
            Err(_) if pages > 1 => {
                // The kernel does not say which.
                let half = pages / 2;
                self.map(addr, pgoff, half);
                self.map(addr + half as usize * page, pgoff + half, pages - half);
            }
            Err(errno) => {
                let why = match errno {
                    Errno::ENOMEM => UNMAPPED.into(),
                    // It was refused before, and is there by now.
                    _ if self.heal(addr) => return,
                    Errno::EFAULT | Errno::EHWPOISON => "its touch is SIGBUS".into(),
                    errno => errno.to_string(),
                };
                self.miss(addr, pgoff, 1, why);
            }
        }
    }

    /// Maps pages that the object holds and whose minor faults the engine would answer. Nothing can go wrong: this maps only
    /// what lies at an address anyway, and leaves what it can't map to the faults.
    fn map_held(&self, addr: usize, len: usize) {
        let local = self.shared.local();
        let (Local::Owner { uffd } | Local::Child { uffd, .. }) = &*local else { return };
        let mut done = 0;
        while done < len {
            let mapped = uffd.r#continue(addr + done, len - done);
            done += mapped.bytes;
            match mapped.stop {
                Some(Stop::Present) => done += page_size(),
                Some(Stop::Changing) if mapped.bytes > 0 => {}
                _ => return,
            }
        }
    }

    /// Maps a page in the place of its poison, if the object holds it.
    fn heal(&self, addr: usize) -> bool {
        match &*self.shared.local() {
            Local::Owner { uffd } | Local::Child { uffd, .. } => {
                let huge = self.core.page();
                let healed = uffd.r#continue(huge.floor(addr), huge.bytes());
                matches!(healed.stop, None | Some(Stop::Present)) && populate_read(addr, page_size()).is_ok()
            }
            Local::Lost { .. } => false,
        }
    }

    /// In a forked child: has the kernel touch all pages, which the engine then brings.
    fn bring_by_touching(&mut self) -> Result<()> {
        if !self.shared.way.serves_kernel_faults() {
            return Err(Error::NotOwner { what: "populating where faults of the kernel are not served" });
        }
        let page = page_size();
        while self.at < self.end {
            let pages = self.pages_left().min(STEP_PAGES);
            let pgoff = self.pgoff + ((self.at - self.base) / page) as u64;
            self.map(self.at, pgoff, pages);
            self.at += pages as usize * page;
        }
        Ok(())
    }

    fn outcome(self) -> Result<()> {
        match self.first {
            None => Ok(()),
            Some(Missing { pgoff, why, .. }) => {
                Err(Error::NotPopulated { pgoff, why, missing: self.missing, wanted: self.wanted })
            }
        }
    }
}

/// Maps what lies at a range of addresses, bringing it if need be.
fn populate_read(addr: usize, len: usize) -> std::result::Result<(), Errno> {
    loop {
        // SAFETY: as a read of each page would, it changes no byte; what can't be read is an error.
        let answer = unsafe { libc::madvise(addr as *mut libc::c_void, len, libc::MADV_POPULATE_READ) };
        match Errno::result(answer) {
            Err(Errno::EINTR | Errno::EAGAIN) => {}
            answer => return answer.map(drop),
        }
    }
}

/// What a background populating and its handle share.
struct State {
    total: u64,
    done: AtomicU64,
    failed: AtomicU64,
    cancelled: AtomicBool,
    /// How it ended.
    ended: Mutex<Option<Result<()>>>,
    news: Condvar,
}

impl State {
    fn progress(&self) -> PopulateProgress {
        // Failed first: it is never more than done.
        let pages_failed = self.failed.load(Ordering::Acquire);
        PopulateProgress { pages_done: self.done.load(Ordering::Acquire), pages_total: self.total, pages_failed }
    }

    fn end(&self, how: Result<()>) {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(how);
        self.news.notify_all();
    }
}

/// The background's hold on the state: whatever becomes of it, nobody waits for it any longer.
struct Ended(Arc<State>);

impl Drop for Ended {
    fn drop(&mut self) {
        // Dropped before its end: by a shutdown.
        self.0.end(Err(Error::Shutdown));
    }
}

/// A populating in the background.
struct Job {
    state: Ended,
    task: Task,
    options: PopulateOptions,
    since: Instant,
    faults_seen: u64,
    waits: u32,
}

impl Job {
    fn step(&mut self) -> Next {
        let state = Arc::clone(&self.state.0);
        match self.advance(&state) {
            Ok(Some(due)) => Next::After(due),
            Ok(None) => {
                state.end(Ok(()));
                Next::Finished
            }
            Err(error) => {
                state.end(Err(error));
                Next::Finished
            }
        }
    }

    /// Makes a step if it is time; answers when the next is, if there is one.
    fn advance(&mut self, state: &State) -> Result<Option<Instant>> {
        if state.cancelled.load(Ordering::Acquire) {
            return Ok(None);
        }
        // Asked first: a region that was dropped is not held until the limit allows a step.
        let Some(piece) = self.task.piece()? else {
            self.task.rest_is_unmapped();
            self.publish(state);
            return Ok(None);
        };
        let now = Instant::now();
        if let Some(due) = self.due().filter(|&due| due > now) {
            return Ok(Some(due));
        }
        let faults = self.task.shared.counters.snapshot().faults;
        if faults != std::mem::replace(&mut self.faults_seen, faults) && self.waits < MOST_WAITS {
            self.waits += 1;
            return Ok(Some(now + FAULTS_FIRST));
        }
        self.waits = 0;
        self.task.step(&piece, (self.options.step_bytes / page_size()) as u64)?;
        self.publish(state);
        Ok((self.task.at < self.task.end).then(|| self.due().unwrap_or(now)))
    }

    fn publish(&self, state: &State) {
        state.done.store(state.total - self.task.pages_left(), Ordering::Release);
        state.failed.store(self.task.missing, Ordering::Release);
    }

    /// When the limit allows the next step.
    fn due(&self) -> Option<Instant> {
        let rate = self.options.bytes_per_second?;
        let bytes = self.state.0.done.load(Ordering::Relaxed) as u128 * page_size() as u128;
        let nanoseconds = u64::try_from(bytes * 1_000_000_000 / u128::from(rate)).unwrap_or(u64::MAX);
        // What no clock can tell is far enough away.
        let far = || self.since + Duration::from_secs(365 * 24 * 60 * 60);
        Some(self.since.checked_add(Duration::from_nanos(nanoseconds)).unwrap_or_else(far))
    }
}

/// A handle to a [`Region::populate_in_background`]. Dropping it cancels what is not done yet, unless it was
/// [detached](Populating::detach).
#[must_use = "dropping it cancels the populating"]
pub struct Populating {
    state: Arc<State>,
    shared: Arc<EngineShared>,
    detached: bool,
}

impl Populating {
    /// Tells how far it has come.
    pub fn progress(&self) -> PopulateProgress {
        self.state.progress()
    }

    /// Tells whether it has ended: all done, cancelled, or stopped by a shutdown. In a forked child it has.
    pub fn is_finished(&self) -> bool {
        self.shared.is_child() || self.state.ended.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Ends it after the step that is being made, which is not waited for. What came stays.
    pub fn cancel(&self) {
        if !self.shared.is_child() {
            self.state.cancelled.store(true, Ordering::Release);
            self.shared.jobs.nudge();
        }
    }

    /// Waits until it has ended, and tells how far it came: pages that can't be had are counted there, and a cancelled one
    /// has not done all.
    ///
    /// # Errors
    ///
    /// [`Error::Shutdown`] when a shutdown ended it; [`Error::NotOwner`] in a forked child; [`Error::WouldDeadlock`] in a
    /// page source.
    pub fn wait(self) -> Result<PopulateProgress> {
        if self.shared.is_child() {
            return Err(Error::NotOwner { what: "waiting for a populating" });
        }
        if threads::current_role(self.shared.id) == Some(Role::Populate) {
            return Err(Error::WouldDeadlock { what: "waiting for a populating", thread: "populate" });
        }
        refuse_nested("waiting for a populating")?;
        let mut ended = self.state.ended.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match ended.take() {
                Some(Ok(())) => {
                    *ended = Some(Ok(()));
                    return Ok(self.state.progress());
                }
                Some(Err(error)) => {
                    *ended = Some(Err(Error::Shutdown));
                    return Err(error);
                }
                None => ended = self.state.news.wait(ended).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Lets it go on without a handle.
    pub fn detach(mut self) {
        self.detached = true;
    }
}

impl Drop for Populating {
    fn drop(&mut self) {
        if !self.detached {
            self.cancel();
        }
    }
}

impl std::fmt::Debug for Populating {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Populating").field("progress", &self.progress()).finish_non_exhaustive()
    }
}
