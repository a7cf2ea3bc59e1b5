//! Bringing the pages of a region before they are touched.
//!
//! In the engine's process they are filled through the vmap's window, whose addresses nobody else can take, and then
//! mapped by MADV_POPULATE_READ, which shows what lies there and nothing else: whatever other threads unmap, move or map
//! meanwhile, no page of a list gets into memory that is not its own. A forked child has no window and may have an old list:
//! there the engine brings the pages, in answer to the faults of the same call. Large ranges are shared by several threads; in the
//! background one or several go step by step.

mod background;
pub(crate) mod replay;
mod together;

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use nix::errno::Errno;

use super::Region;
use crate::fork::link::Local;
use crate::page::{is_aligned, page_floor, page_size};
use crate::runtime::command::Command;
use crate::runtime::shared::EngineShared;
use crate::runtime::threads::{self, Role, contain};
use crate::sys::Stop;
use crate::vmap::core::VmapCore;
use crate::vmap::fetch::{Fetcher, made_from};
use crate::vmap::fill::{Refusal, fill_some};
use crate::vmap::refuse_nested;
use crate::{Error, Result};
use background::{Listener, Pace};
pub use background::{PopulateEnd, Populating};

/// Pages brought in one step: 2 MiB where pages are of 4 KiB.
const STEP_PAGES: u64 = 512;
/// The most threads of one populating in the background.
const THREADS_MAX: usize = 16;
/// How a range is populated, unless said otherwise.
const POPULATE: Pace = Pace { threads: 1, step_pages: 64, most_waits: 8 };

/// Says how [`Region::populate_in_background`] and [`Region::replay`] go about it, and who hears of it.
#[derive(Clone, Default)]
#[must_use]
pub struct PopulateOptions {
    bytes_per_second: Option<u64>,
    step_bytes: Option<usize>,
    threads: Option<usize>,
    listener: Listener,
}

impl std::fmt::Debug for PopulateOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PopulateOptions")
            .field("bytes_per_second", &self.bytes_per_second)
            .field("step_bytes", &self.step_bytes)
            .field("threads", &self.threads)
            .finish_non_exhaustive()
    }
}

impl PopulateOptions {
    /// Begins with the default: as fast as faults allow, telling nobody.
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

    /// Sets how many bytes come in one step, a multiple of the page size, at most 512 pages; 64 pages unless set, or 16 where
    /// several threads replay. A limit is kept, faults are looked for and an end is noticed between steps.
    pub fn step_bytes(mut self, bytes: usize) -> Self {
        self.step_bytes = Some(bytes);
        self
    }

    /// Sets how many threads bring pages at once, from 1 to 16: several are for pages that have to be waited for, each of which
    /// takes one. Unless set, it is one, and more for a [`Region::replay`] of such pages. Where they can't be started,
    /// fewer do.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Has a function called after each step, with how far it has come, on the thread that made the step, outside every lock of
    /// the engine. What it hears never goes back. Steps wait for it. A panic of it is caught and counted.
    pub fn on_progress(mut self, listener: impl Fn(PopulateProgress) + Send + Sync + 'static) -> Self {
        self.listener.on_progress = Some(Arc::new(listener));
        self
    }

    /// Has a function called once, when it has ended, before whoever [waits](Populating::wait) for it goes on: on the thread that
    /// made the last step, or that shuts the engine down, outside every lock of the engine. A panic of it is caught and
    /// counted.
    pub fn on_end(mut self, listener: impl Fn(PopulateProgress, PopulateEnd) + Send + Sync + 'static) -> Self {
        self.listener.on_end = Some(Arc::new(listener));
        self
    }

    fn validate(&self) -> Result<()> {
        if let Some(threads) = self.threads.filter(|threads| !(1..=THREADS_MAX).contains(threads)) {
            let (value, rule) = (threads as u64, "there must be from 1 to 16");
            return Err(Error::Invalid { what: "threads of a populating", value, rule });
        }
        if self.bytes_per_second == Some(0) {
            return Err(Error::Invalid { what: "bytes_per_second", value: 0, rule: "it must not be zero" });
        }
        let most = STEP_PAGES as usize * page_size();
        if let Some(bytes) = self.step_bytes.filter(|&bytes| !is_aligned(bytes) || !(1..=most).contains(&bytes)) {
            let (value, rule) = (bytes as u64, "it must be whole pages, from 1 to 512");
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
    /// as processors that the calling thread may use, at most 4 with itself (none if it is bound to one processor). Where a
    /// thread can't be started the others do its work. Page sources are read by workers, as for a touch, with the vmap's
    /// [`FailurePolicy`](crate::FailurePolicy); files by the threads themselves.
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
    /// regions of an engine, in turns, unless [more are asked for](PopulateOptions::threads); it is started when there is
    /// something to do, and ends afterwards. It stops where the region is dropped, and at a shutdown.
    ///
    /// When all pages of a vmap have come (all of [`PopulateProgress::pages_total`] are done and none has failed), nothing of it
    /// is missing any more: no touch asks the engine, in any process and through any region, until somebody takes pages away
    /// ([`Vmap::revoke`](crate::Vmap::revoke), a hole that is punched). So it stays after a
    /// [`Shutdown::Poison`](crate::Shutdown::Poison) too, and in forked children after the death of this process.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a range outside the region, or options out of range; [`Error::NotOwner`] in a forked child;
    /// [`Error::Shutdown`]; [`Error::WouldDeadlock`] in a page source; [`Error::Sys`] when the thread can't be started.
    pub fn populate_in_background(&self, range: Range<usize>, options: PopulateOptions) -> Result<Populating> {
        options.validate()?;
        let task = self.background_task(range)?;
        let whole = task.at..task.end;
        let ranges = if whole.is_empty() { Vec::new() } else { vec![whole] };
        background::begin(task, ranges, options, POPULATE)
    }

    /// As [`Region::task`], for a thread of the engine.
    fn background_task(&self, range: Range<usize>) -> Result<Task> {
        if self.shared.is_child() {
            return Err(Error::NotOwner { what: "populating in the background" });
        }
        self.task(range)
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
            len: self.len,
            pgoff: self.pgoff,
            at,
            end: end.max(at),
            wanted: 0,
            missing: 0,
            first: None,
            fetcher: Fetcher::default(),
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
    /// Where the region was attached, how long it was, and which page it begins with.
    base: usize,
    len: usize,
    pgoff: u64,
    /// What is left, whole pages.
    at: usize,
    end: usize,
    wanted: u64,
    missing: u64,
    first: Option<Missing>,
    fetcher: Fetcher,
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

    fn addr_of(&self, pgoff: u64) -> usize {
        self.range.start + (pgoff - self.pgoff) as usize * page_size()
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
        let (core, shared, fetcher) = (Arc::clone(&self.core), Arc::clone(&self.shared), self.fetcher.clone());
        Task { core, shared, at, end, missing: 0, first: None, fetcher, ..*self }
    }

    /// Counts what a part of this could not have.
    fn absorb(&mut self, part: &mut Task) {
        self.missing += std::mem::take(&mut part.missing);
        self.fetcher.absorb(&part.fetcher);
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
        let core = Arc::clone(&self.core);
        let (first, end) = (piece.pgoff_of(self.at), piece.pgoff_of(piece.range.end.min(self.end)));
        let addr_of = |pgoff: u64| piece.addr_of(pgoff);
        if self.fetch(piece, first..end.min(first.saturating_add(most)))? {
            return Ok(());
        }
        let end = made_from(&core, first, end);
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

    /// Brings pages from the first of a range on that page sources make; tells whether there were any.
    fn fetch(&mut self, piece: &Piece, pages: Range<u64>) -> Result<bool> {
        let (shared, core) = (Arc::clone(&self.shared), Arc::clone(&self.core));
        let mut had = pages.start;
        let mut fetcher = std::mem::take(&mut self.fetcher);
        let next = fetcher.fetch(&shared, &core, pages.clone(), |refused, why| {
            self.map(piece.addr_of(had), had, refused.start - had);
            let nr_pages = refused.end - refused.start;
            self.miss(piece.addr_of(refused.start), refused.start, nr_pages, why.message());
            had = refused.end;
        });
        self.fetcher = fetcher;
        let next = next?;
        self.map(piece.addr_of(had), had, next - had);
        self.at = piece.addr_of(next);
        Ok(next > pages.start)
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

    /// Tells where the pages of some addresses come from that they will be read soon, if the region lies as it was attached; a
    /// panic of a source is its own.
    fn will_read(&self, addresses: &Range<usize>) {
        let page_of = |addr: usize| self.pgoff + ((addr - self.base) / page_size()) as u64;
        let list = self.core.contents().list;
        let _ = contain(&self.shared, || list.will_read(page_of(addresses.start)..page_of(addresses.end)));
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
