//! Populating in the background: a course of ranges, which one thread or several take step by step.

use std::collections::VecDeque;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{Piece, PopulateOptions, PopulateProgress, Task};
use crate::page::page_size;
use crate::runtime::background;
use crate::runtime::command::Command;
use crate::runtime::jobs::{Next, Step};
use crate::runtime::shared::EngineShared;
use crate::runtime::threads::{self, Role, contain};
use crate::vmap::fill::nothing_until;
use crate::vmap::refuse_nested;
use crate::{Error, Result};

/// How long the background waits when threads have faulted since it looked last.
const FAULTS_FIRST: Duration = Duration::from_millis(1);
/// How many steps ahead files and sources are told what will be read.
const STEPS_AHEAD: u64 = 4;
/// What no clock can tell is far enough away.
const FAR: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// Says how a populating in the background has ended ([`PopulateOptions::on_end`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum PopulateEnd {
    /// Every page was attended to.
    Complete,
    /// It was cancelled before.
    Cancelled,
    /// A shutdown of the engine ended it before, or an error that [`Populating::wait`] tells.
    Stopped,
}

/// How the background goes about it, unless said otherwise.
pub(super) struct Pace {
    pub(super) threads: usize,
    pub(super) step_pages: u64,
    /// Waits for threads that fault before a step is made all the same.
    pub(super) most_waits: u32,
}

/// Begins to bring the pages of some ranges of addresses, in this order, each of whole pages.
pub(super) fn begin(
    mut task: Task,
    ranges: Vec<Range<usize>>,
    options: PopulateOptions,
    pace: Pace,
) -> Result<Populating> {
    task.end = task.at;
    let shared = Arc::clone(&task.shared);
    let total = ranges.iter().map(|range| (range.len() / page_size()) as u64).sum();
    let state = Arc::new(State {
        total,
        done: AtomicU64::new(0),
        failed: AtomicU64::new(0),
        cancelled: AtomicBool::new(false),
        is_over: AtomicBool::new(false),
        pause: Mutex::default(),
        telling: Mutex::new(Some(options.listener.clone())),
        ended: Mutex::new(None),
        news: Condvar::new(),
        event: OnceLock::new(),
    });
    let ended = Arc::new(Ended { state: Arc::clone(&state), shared: Arc::clone(&shared), failed: Mutex::new(None) });
    let tells_ahead = task.core.contents().list.may_block();
    let course = Course {
        ahead: if tells_ahead { ranges.clone().into() } else { VecDeque::new() },
        told_ahead: 0,
        ranges: ranges.into(),
        task,
        taken: 0,
        since: Instant::now(),
    };
    let course = Arc::new(Mutex::new(course));
    let faults_seen = shared.counters.snapshot().faults;
    let step_pages = options.step_bytes.map_or(pace.step_pages, |bytes| (bytes / page_size()) as u64);
    let most_waits = pace.most_waits;
    let bytes_per_second = options.bytes_per_second;
    let job = |_| -> Step {
        let (ended, course) = (Arc::clone(&ended), Arc::clone(&course));
        let mut job = Job { ended, course, step_pages, bytes_per_second, faults_seen, waits: 0, most_waits };
        Box::new(move || job.step())
    };
    let steps = (0..options.threads.unwrap_or(pace.threads)).map(job).collect();
    drop(ended);
    if let Err((error, steps)) = background::submit(&shared, steps) {
        // Nothing began, and so nothing ends.
        *state.telling() = None;
        drop(steps);
        return Err(error);
    }
    Ok(Populating { state, shared, detached: false })
}

/// What is left to do, for all threads that do it.
struct Course {
    /// The range whose pages are taken next, and what of the region could not be had.
    task: Task,
    /// Those after it.
    ranges: VecDeque<Range<usize>>,
    /// Those that files and sources have not been told of.
    ahead: VecDeque<Range<usize>>,
    told_ahead: u64,
    /// Pages taken so far.
    taken: u64,
    since: Instant,
}

impl Course {
    /// Goes to the next page that is the region's, passing over others; `None` if there is none. `seen` is the piece that was
    /// found last, in the same step.
    fn go_on(&mut self, seen: &mut Option<Piece>) -> Result<Option<Piece>> {
        loop {
            if self.task.at == self.task.end {
                let Some(range) = self.ranges.pop_front() else { return Ok(None) };
                (self.task.at, self.task.end) = (range.start, range.end);
            }
            let Task { at, end, .. } = self.task;
            if seen.as_ref().is_none_or(|piece| !piece.range.contains(&at)) {
                *seen = self.first_piece(at)?;
                if seen.is_none() && self.first_piece(self.task.base)?.is_none() {
                    // Nothing of the region is left: not to be found out range by range.
                    self.task.rest_is_unmapped();
                    while let Some(range) = self.ranges.pop_front() {
                        (self.task.at, self.task.end) = (range.start, range.end);
                        self.task.rest_is_unmapped();
                    }
                    return Ok(None);
                }
            }
            match &*seen {
                Some(piece) if piece.range.start < end => {
                    self.task.pass_unmapped(piece.range.start.max(at));
                    return Ok(Some(piece.clone()));
                }
                _ => self.task.rest_is_unmapped(),
            }
        }
    }

    /// Finds the first piece of the region from an address on.
    fn first_piece(&self, start: usize) -> Result<Option<Piece>> {
        let (region, end) = (self.task.region, self.task.base + self.task.len);
        let found = self.task.shared.handler.ask(|reply| Command::Piece { region, start, end, reply })?;
        Ok(found.map(|(range, pgoff)| Piece { range, pgoff }))
    }

    /// Takes so many pages, and the holes among them.
    fn take(&mut self, most: u64, seen: &mut Option<Piece>) -> Result<Vec<(Task, Piece)>> {
        let mut parts = Vec::new();
        let mut left = most;
        while left > 0 {
            let Some(piece) = self.go_on(seen)? else { break };
            let core = &self.task.core;
            let first = piece.pgoff_of(self.task.at);
            // A hole takes no time. No huge page, and nothing that is read as a whole, is brought by two.
            let list = core.contents().list;
            let hole = nothing_until(&list, core.page(), first);
            let pages =
                hole.map_or_else(|| list.whole_units(first..first.saturating_add(left)).end - first, |end| end - first);
            let end = core.page().whole(first.saturating_add(pages)).unwrap_or(u64::MAX);
            let bytes = usize::try_from(end - first).ok().and_then(|pages| pages.checked_mul(page_size()));
            let end = bytes.and_then(|bytes| self.task.at.checked_add(bytes)).unwrap_or(usize::MAX);
            let part = self.task.split_off(end.min(piece.range.end).min(self.task.end));
            self.taken += part.pages_left();
            if hole.is_none() {
                left = left.saturating_sub(part.pages_left());
            }
            parts.push((part, piece));
        }
        Ok(parts)
    }

    /// Takes the ranges of which files and sources are to be told next, so that they are so many pages ahead.
    fn look_ahead(&mut self, pages: u64) -> Vec<Range<usize>> {
        let mut ranges = Vec::new();
        while self.told_ahead < self.taken.saturating_add(pages) {
            let Some(range) = self.ahead.pop_front() else { break };
            let bytes = usize::try_from(pages).unwrap_or(usize::MAX).saturating_mul(page_size());
            let end = range.start.saturating_add(bytes).min(range.end);
            if end < range.end {
                self.ahead.push_front(end..range.end);
            }
            self.told_ahead += ((end - range.start) / page_size()) as u64;
            ranges.push(range.start..end);
        }
        ranges
    }

    /// When a limit allows the next step; `paused` is time that does not count.
    fn due(&self, bytes_per_second: u64, paused: Duration) -> Instant {
        let bytes = self.taken as u128 * page_size() as u128;
        let nanoseconds = u64::try_from(bytes * 1_000_000_000 / u128::from(bytes_per_second)).unwrap_or(u64::MAX);
        let due = self.since.checked_add(Duration::from_nanos(nanoseconds).saturating_add(paused));
        due.unwrap_or_else(|| self.since + FAR)
    }
}

/// What a populating and its handle share.
struct State {
    total: u64,
    done: AtomicU64,
    failed: AtomicU64,
    cancelled: AtomicBool,
    /// There is no step left to be taken.
    is_over: AtomicBool,
    pause: Mutex<Pause>,
    /// Whom to tell. Held while they are told, so that what one hears never goes back.
    telling: Mutex<Option<Listener>>,
    /// How it ended.
    ended: Mutex<Option<Result<()>>>,
    news: Condvar,
    /// Readable after the end. Made and written to while `ended` is locked.
    event: OnceLock<EventFd>,
}

#[derive(Default)]
struct Pause {
    since: Option<Instant>,
    before: Duration,
}

/// Who wants to hear of a populating.
#[derive(Clone, Default)]
pub(super) struct Listener {
    pub(super) on_progress: Option<Arc<dyn Fn(PopulateProgress) + Send + Sync>>,
    pub(super) on_end: Option<Arc<dyn Fn(PopulateProgress, PopulateEnd) + Send + Sync>>,
}

impl State {
    fn progress(&self) -> PopulateProgress {
        // Failed first: it is never more than done.
        let pages_failed = self.failed.load(Ordering::Acquire);
        PopulateProgress { pages_done: self.done.load(Ordering::Acquire), pages_total: self.total, pages_failed }
    }

    fn telling(&self) -> MutexGuard<'_, Option<Listener>> {
        self.telling.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ended(&self) -> MutexGuard<'_, Option<Result<()>>> {
        self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pause(&self) -> MutexGuard<'_, Pause> {
        self.pause.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts pages that were attended to, and those of them that can't be had.
    fn add(&self, done: u64, failed: u64) {
        // Done first: it is never less than failed.
        self.done.fetch_add(done, Ordering::AcqRel);
        self.failed.fetch_add(failed, Ordering::AcqRel);
    }

    fn tell(&self, shared: &EngineShared) {
        if let Some(Listener { on_progress: Some(listener), .. }) = &*self.telling() {
            let _ = contain(shared, || listener(self.progress()));
        }
    }

    fn end(&self, shared: &EngineShared, how: Result<()>) {
        let progress = self.progress();
        let end = match &how {
            Err(_) => PopulateEnd::Stopped,
            Ok(()) if progress.pages_done < progress.pages_total => PopulateEnd::Cancelled,
            Ok(()) => PopulateEnd::Complete,
        };
        // Whoever waits goes on after whoever listens has heard.
        if let Some(Listener { on_end: Some(listener), .. }) = self.telling().take() {
            let _ = contain(shared, || listener(progress, end));
        }
        let mut ended = self.ended();
        *ended = Some(how);
        // Full it is readable too.
        let _ = self.event.get().map(|event| event.write(1));
        drop(ended);
        self.news.notify_all();
    }
}

/// The hold of all threads on the state: whatever becomes of them, nobody waits any longer when the last has let go.
struct Ended {
    state: Arc<State>,
    shared: Arc<EngineShared>,
    /// Why one of them could not go on.
    failed: Mutex<Option<Error>>,
}

impl Drop for Ended {
    fn drop(&mut self) {
        let failed = self.failed.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let is_over = self.state.is_over.load(Ordering::Acquire) || self.state.cancelled.load(Ordering::Acquire);
        // Dropped before its end: by a shutdown.
        let how = failed.map_or_else(|| if is_over { Ok(()) } else { Err(Error::Shutdown) }, Err);
        self.state.end(&self.shared, how);
    }
}

/// A thread's part in a populating.
struct Job {
    ended: Arc<Ended>,
    course: Arc<Mutex<Course>>,
    step_pages: u64,
    bytes_per_second: Option<u64>,
    faults_seen: u64,
    waits: u32,
    most_waits: u32,
}

impl Job {
    fn step(&mut self) -> Next {
        match self.advance() {
            Ok(Some(due)) => Next::After(due),
            Ok(None) => Next::Finished,
            Err(error) => {
                self.ended.failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
                // The others needn't find out by themselves.
                self.ended.state.cancelled.store(true, Ordering::Release);
                Next::Finished
            }
        }
    }

    /// Makes a step if it is time; answers when the next is, if there is one.
    fn advance(&mut self) -> Result<Option<Instant>> {
        let Ended { state, shared, .. } = &*self.ended;
        if state.cancelled.load(Ordering::Acquire) {
            return Ok(None);
        }
        let mut course = self.course.lock().unwrap_or_else(PoisonError::into_inner);
        let mut seen = None;
        // Asked first: a region that was dropped is not held until it is resumed, or a limit allows a step.
        let left = course.go_on(&mut seen)?;
        let unmapped = std::mem::take(&mut course.task.missing);
        state.add(unmapped, unmapped);
        if left.is_none() {
            state.is_over.store(true, Ordering::Release);
            drop(course);
            state.tell(shared);
            return Ok(None);
        }
        let now = Instant::now();
        let Pause { since: paused, before } = *state.pause();
        if paused.is_some() {
            return Ok(Some(now + FAR));
        }
        if let Some(due) = self.bytes_per_second.map(|limit| course.due(limit, before)).filter(|&due| due > now) {
            return Ok(Some(due));
        }
        let faults = shared.counters.snapshot().faults;
        if faults != std::mem::replace(&mut self.faults_seen, faults) && self.waits < self.most_waits {
            self.waits += 1;
            return Ok(Some(now + FAULTS_FIRST));
        }
        self.waits = 0;
        let ahead = course.look_ahead(STEPS_AHEAD * self.step_pages);
        let parts = course.take(self.step_pages, &mut seen)?;
        let unmapped = std::mem::take(&mut course.task.missing);
        state.add(unmapped, unmapped);
        drop(course);
        for range in ahead {
            if let Some((part, _)) = parts.first() {
                part.will_read(&range);
            }
        }
        for (mut part, piece) in parts {
            if state.cancelled.load(Ordering::Acquire) {
                return Ok(None);
            }
            let pages = part.pages_left();
            part.bring_piece(&piece)?;
            state.add(pages, part.missing);
        }
        state.tell(shared);
        Ok(Some(now))
    }
}

/// A handle to a populating in the background ([`Region::populate_in_background`](crate::Region::populate_in_background),
/// [`Region::replay`](crate::Region::replay)). Dropping it cancels what is not done yet, unless it was
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
        self.shared.is_child() || self.state.ended().is_some()
    }

    /// Ends it after the step that is being made, which is not waited for. What came stays.
    pub fn cancel(&self) {
        if !self.shared.is_child() {
            self.state.cancelled.store(true, Ordering::Release);
            self.shared.jobs.nudge();
        }
    }

    /// Makes no further step until it is [resumed](Populating::resume), after the one that is being made. Of a limit, the time
    /// does not count. The end of the region, and of the engine, end it all the same.
    pub fn pause(&self) {
        if !self.shared.is_child() {
            self.state.pause().since.get_or_insert_with(Instant::now);
        }
    }

    /// Goes on after a [pause](Populating::pause).
    pub fn resume(&self) {
        if self.shared.is_child() {
            return;
        }
        let mut pause = self.state.pause();
        if let Some(since) = pause.since.take() {
            pause.before = pause.before.saturating_add(since.elapsed());
            drop(pause);
            self.shared.jobs.nudge();
        }
    }

    /// Tells whether it is paused.
    pub fn is_paused(&self) -> bool {
        !self.shared.is_child() && self.state.pause().since.is_some()
    }

    /// Returns an eventfd that is readable as soon as it has ended, for event loops. It is made by the first call.
    ///
    /// # Errors
    ///
    /// [`Error::Sys`] with `EMFILE` when it can't be made; [`Error::NotOwner`] in a forked child.
    pub fn event(&self) -> Result<BorrowedFd<'_>> {
        if self.shared.is_child() {
            return Err(Error::NotOwner { what: "waiting for a populating" });
        }
        let ended = self.state.ended();
        if self.state.event.get().is_none() {
            let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
            let made = EventFd::from_value_and_flags(u32::from(ended.is_some()), flags);
            let _ = self.state.event.set(made.map_err(Error::sys("eventfd of a populating"))?);
        }
        match self.state.event.get() {
            Some(event) => Ok(event.as_fd()),
            None => unreachable!("it was made under the lock"),
        }
    }

    /// Waits until it has ended, and tells how far it came: pages that can't be had are counted there, and a cancelled one
    /// has not done all.
    ///
    /// # Errors
    ///
    /// [`Error::Shutdown`] when a shutdown ended it; [`Error::NotOwner`] in a forked child; [`Error::WouldDeadlock`] in a
    /// page source, or where it would be told of.
    pub fn wait(self) -> Result<PopulateProgress> {
        if self.shared.is_child() {
            return Err(Error::NotOwner { what: "waiting for a populating" });
        }
        if threads::current_role(self.shared.id) == Some(Role::Populate) {
            return Err(Error::WouldDeadlock { what: "waiting for a populating", thread: "populate" });
        }
        refuse_nested("waiting for a populating")?;
        let mut ended = self.state.ended();
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

    /// Lets it go on without a handle, also if it is paused: then until the region's end.
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
