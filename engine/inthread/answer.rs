//! The answer to a touch, on the thread that touched: looks the page up, and installs it with its neighbours.
//!
//! It decides as the fault-handling thread does (`runtime/resolve.rs`), except that nobody waits in the kernel: a page
//! that is there needs no wake-up, and one that can't be had needs no poison, as the signal is there already.

use std::ops::Range;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering};

use memmap2::MmapRaw;

use super::ask::{ASKS, Ask};
use crate::kiobuf::TryRead;
use crate::page::{page_floor, page_size};
use crate::process::ledger::Private;
use crate::runtime::around::FaultAround;
use crate::runtime::plan::{Plan, plan};
use crate::runtime::resolve::Source;
use crate::runtime::shared::EngineShared;
use crate::space::Target;
use crate::space::table::{Area, AreaTable, find_in};
use crate::stats::shards::Signalled;
use crate::stats::{EngineCounters, SpaceCounters, VmapCounters};
use crate::sys::{Install, Stop, Userfault};
use crate::{Error, Result};

/// Tries without a pause: whoever changes the address space needs the processor to finish.
const EAGER_TRIES: u32 = 8;
/// Tries while the address space is changing, before a page is filled in another way.
const TRIES_BEFORE_ASIDE: u32 = 3;
/// Tries at a page of which the kernel says that it is not mapped, although no event said so.
const UNMAPPED_TRIES: u32 = 24;
/// Tries for any other reason, with the pauses some seconds.
const MOST_TRIES: u32 = 256;
/// The longest pause.
const LONGEST_PAUSE_MS: u32 = 8;
/// Threads that compose pages at once; more wait for one of them.
const BOUNCES: usize = 8;

/// What a touch comes to.
pub(super) enum Step {
    /// The page is there, or the touch finds out by itself.
    Retry,
    /// It can't be had.
    Sigbus,
    /// To be tried again soon.
    Again(Why),
    /// The fault-handling thread was asked.
    Asked(&'static Ask),
    /// This engine does not know the address.
    Unknown,
}

/// Why it is not decided yet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Why {
    /// The address space is changing, or a resource is not free.
    Changing,
    /// The kernel has no memory for it.
    NoMemory,
    /// The kernel says that nothing is mapped there: its event is on the way.
    Unmapped,
}

/// What a touch was, as far as the signal's context says.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
    #[cfg_attr(target_arch = "x86_64", expect(dead_code, reason = "there the context says it"))]
    Unknown,
}

/// The tries at one touch, made without leaving the signal handler.
pub(super) struct Tries {
    addr: usize,
    access: Access,
    counted: bool,
    changing: u32,
    starved: u32,
    unmapped: u32,
    /// Where it is counted.
    here: Signalled,
}

impl Tries {
    pub(super) fn new(addr: usize, access: Access) -> Tries {
        let here = Signalled::here();
        Tries { addr: page_floor(addr), access, counted: false, changing: 0, starved: 0, unmapped: 0, here }
    }

    /// Waits before the next try; `false` when there were enough. The thread is inside no crossing.
    pub(super) fn wait(&mut self, why: Why) -> bool {
        let (tries, most) = match why {
            Why::Changing => (&mut self.changing, MOST_TRIES),
            Why::NoMemory => (&mut self.starved, MOST_TRIES),
            Why::Unmapped => (&mut self.unmapped, UNMAPPED_TRIES),
        };
        *tries += 1;
        if *tries > most {
            return false;
        }
        if *tries <= EAGER_TRIES {
            // SAFETY: gives the processor away.
            unsafe { libc::sched_yield() };
            return true;
        }
        let milliseconds = (1 << (*tries - EAGER_TRIES - 1).min(3)).min(LONGEST_PAUSE_MS);
        let pause = libc::timespec { tv_sec: 0, tv_nsec: i64::from(milliseconds) * 1_000_000 };
        // Not the C library's: that would be a place where a thread can be cancelled.
        // SAFETY: the kernel reads `pause` and writes nothing.
        unsafe { libc::syscall(libc::SYS_nanosleep, &raw const pause, ptr::null_mut::<libc::timespec>()) };
        true
    }
}

/// What touching threads see of an engine.
pub(super) struct Board {
    shared: Arc<EngineShared>,
    uffd: Arc<Private<Userfault>>,
    counters: Arc<SpaceCounters>,
    fault_around: FaultAround,
    bounces: Bounces,
    /// The table of the own process; changed only while nobody is inside.
    areas: AtomicPtr<Area<Target>>,
    len: AtomicUsize,
    serving: AtomicBool,
}

impl Board {
    pub(super) fn new(
        shared: &Arc<EngineShared>,
        uffd: &Arc<Private<Userfault>>,
        counters: &Arc<SpaceCounters>,
        fault_around: FaultAround,
    ) -> Result<Board> {
        Ok(Board {
            shared: Arc::clone(shared),
            uffd: Arc::clone(uffd),
            counters: Arc::clone(counters),
            fault_around,
            bounces: Bounces::new()?,
            areas: AtomicPtr::new(ptr::null_mut()),
            len: AtomicUsize::new(0),
            serving: AtomicBool::new(false),
        })
    }

    /// Shows the table as it is; nobody is inside.
    pub(super) fn show(&self, table: &AreaTable<Target>, serving: bool) {
        let areas = table.iter().as_slice();
        self.areas.store(areas.as_ptr().cast_mut(), Ordering::Relaxed);
        self.len.store(areas.len(), Ordering::Relaxed);
        self.serving.store(serving, Ordering::Relaxed);
    }

    fn areas(&self) -> &[Area<Target>] {
        let (areas, len) = (self.areas.load(Ordering::Relaxed), self.len.load(Ordering::Relaxed));
        if areas.is_null() {
            return &[];
        }
        // SAFETY: the table as it was shown. It neither changes nor moves before the crossing is closed, for which the
        // caller, who is inside, is waited for.
        unsafe { std::slice::from_raw_parts(areas, len) }
    }

    /// Tells whether touches are answered. The caller is inside the crossing, as for all that follows.
    pub(super) fn is_serving(&self) -> bool {
        self.serving.load(Ordering::Relaxed)
    }

    /// Answers a touch; `None` if it lies in no area of this engine.
    pub(super) fn answer(&self, tries: &mut Tries) -> Option<Step> {
        let area = find_in(self.areas(), tries.addr)?;
        let (all, own, answered) =
            (self.all(tries.here), of(area, tries.here), self.counters.answered.signalled(tries.here));
        let first = !std::mem::replace(&mut tries.counted, true);
        if first {
            let is_write = u64::from(tries.access == Access::Write);
            add(&all.faults, 1);
            add(&all.write_faults, is_write);
            add(&answered.faults, 1);
            add(&own.write_faults, is_write);
        }
        let step = self.resolve(area, tries, first);
        match step {
            Step::Sigbus => {
                add(&all.pages_poisoned, 1);
                add(&own.pages_poisoned, 1);
                add(&answered.poisoned, 1);
            }
            Step::Again(_) => add(&all.parked, 1),
            Step::Retry | Step::Asked(_) | Step::Unknown => {}
        }
        Some(step)
    }

    /// Answers a touch outside every area, if it is of memory that is registered, be it with another engine: perhaps an area
    /// has grown.
    pub(super) fn answer_stray(&self, addr: usize, asks: &'static [Ask; ASKS]) -> Option<Step> {
        let addr = page_floor(addr);
        match self.uffd.r#continue(addr, page_size()).stop {
            // The object holds it.
            None | Some(Stop::Present) => return Some(Step::Retry),
            Some(Stop::Changing) => return Some(Step::Again(Why::Changing)),
            Some(Stop::NoMemory) => return Some(Step::Again(Why::NoMemory)),
            // It is registered, and missing.
            Some(Stop::BadSource) => {}
            Some(Stop::Unmapped | Stop::Gone | Stop::Other(_)) => return None,
        }
        // SAFETY: asks for this thread's id.
        let tid = unsafe { libc::syscall(libc::SYS_gettid) } as i32;
        if self.shared.keeper.is_thread(tid) {
            // Code of the application, on the thread that would look the address up.
            return Some(Step::Unknown);
        }
        let Some(ask) = asks.iter().find(|ask| ask.put(addr)) else { return Some(Step::Again(Why::Changing)) };
        self.shared.handler.nudge();
        Some(Step::Asked(ask))
    }

    fn resolve(&self, area: &Area<Target>, tries: &Tries, first: bool) -> Step {
        let pgoff = area.pgoff_of(tries.addr);
        let touch = Touch {
            board: self,
            area,
            addr: tries.addr,
            pgoff,
            here: tries.here,
            aside: tries.changing >= TRIES_BEFORE_ASIDE,
        };
        let plan = plan(self.fault_around, area, pgoff);
        if first {
            for counter in plan.counters(self.all(tries.here), of(area, tries.here)) {
                add(counter, 1);
            }
            plan.note(area, pgoff);
        }
        match plan {
            Plan::Copy { pages, src } => touch.install(pages, Source::Memory(src)),
            Plan::Zero { pages } => touch.install(pages, Source::Zeros),
            Plan::Read { .. } => {
                // A page with slack: composed from memory.
                let Some(bounce) = self.bounces.take() else { return Step::Again(Why::Changing) };
                match area.target.list.try_read_pages(pgoff, bounce.bytes()) {
                    TryRead::Done => touch.install(pgoff..pgoff + 1, Source::Read(bounce.bytes().as_ptr())),
                    // A list that would have to be waited for is refused when it is published.
                    TryRead::WouldBlock | TryRead::Failed(_) => touch.failed(),
                }
            }
            Plan::Sigbus => touch.refuse(),
        }
    }

    /// Counts a touch that no engine knows.
    pub(super) fn count_stray(&self) {
        add(&self.all(Signalled::here()).strays, 1);
    }

    /// The counters that a signal handler may reach.
    fn all(&self, here: Signalled) -> &EngineCounters {
        self.shared.counters.signalled(here)
    }
}

/// The counters of an area's vmap, of those that a signal handler may reach.
fn of(area: &Area<Target>, here: Signalled) -> &VmapCounters {
    area.target.vmap.counters.signalled(here)
}

/// Adds to a counter that any thread may add to.
fn add(counter: &AtomicU64, n: u64) {
    if n > 0 {
        counter.fetch_add(n, Ordering::Relaxed);
    }
}

/// A touch in an area.
struct Touch<'a> {
    board: &'a Board,
    area: &'a Area<Target>,
    addr: usize,
    pgoff: u64,
    here: Signalled,
    /// The address space goes on changing: to be filled through the vmap's window.
    aside: bool,
}

impl Touch<'_> {
    /// The counters of the engine.
    fn all(&self) -> &EngineCounters {
        self.board.all(self.here)
    }

    /// Those of the area's vmap.
    fn own(&self) -> &VmapCounters {
        of(self.area, self.here)
    }

    /// Counts what an ioctl installed, or why it did not.
    fn count_installed(&self, source: &Source, install: Install) {
        source.count(install, self.all(), self.own(), self.board.counters.answered.signalled(self.here), add);
    }

    /// Installs the pages of `window`, one of which was touched; those that are there are passed over.
    fn install(&self, window: Range<u64>, source: Source) -> Step {
        let page = page_size();
        let wanted = (self.pgoff - window.start) as usize * page;
        if self.aside {
            return self.install_aside(source.advanced(wanted));
        }
        let start = self.addr - wanted;
        let total = (window.end - window.start) as usize * page;
        let mut step = Step::Retry;
        let mut settled = 0;
        while settled < total {
            let install = source.install(&self.board.uffd, start + settled, settled, total - settled);
            self.count_installed(&source, install);
            settled += install.bytes;
            match install.stop {
                None => break,
                Some(Stop::Present) => {
                    add(&self.all().already_present, 1);
                    add(&self.own().already_present, 1);
                    if settled == wanted {
                        step = self.map_present();
                    }
                    settled += page;
                }
                // The page that stopped it is asked for alone; the kernel then names the reason.
                Some(Stop::Changing) if install.bytes > 0 => {}
                Some(_) if settled > wanted => break,
                Some(stop) if total == page => return self.not_installed(stop),
                // The window may reach over the border of a mapping, or a neighbour's source may be bad.
                Some(_) => return self.install(self.pgoff..self.pgoff + 1, source.advanced(wanted)),
            }
        }
        step
    }

    /// The object has the page. If it can't be mapped all the same, because it can't be read back from where it was
    /// swapped out to, or its memory is broken, the touch is refused for good: tried again, it would be so for ever.
    fn map_present(&self) -> Step {
        match self.board.uffd.r#continue(self.addr, page_size()).stop {
            // Mapped by now; or no more mapped: the touch finds out.
            None | Some(Stop::Present | Stop::Unmapped | Stop::Gone) => Step::Retry,
            // Dropped meanwhile; or not to be told while the address space is changing.
            Some(Stop::BadSource | Stop::Changing) => Step::Again(Why::Changing),
            Some(Stop::NoMemory) => Step::Again(Why::NoMemory),
            Some(Stop::Other(_)) => self.failed(),
        }
    }

    /// Fills a page of the object through the vmap's window, where the kernel installs also while this address space is
    /// changing; the touch then maps it by itself.
    fn install_aside(&self, source: Source) -> Step {
        let Some(window) = &self.area.target.window else { return Step::Again(Why::Changing) };
        let install = match source {
            // SAFETY: as in `Source::install`: the list or the buffer holds the page at `src`.
            Source::Memory(src) | Source::Read(src) => unsafe { window.copy(self.pgoff, src, page_size()) },
            Source::Zeros | Source::Held => window.zeropage(self.pgoff, page_size()),
        };
        self.count_installed(&source, install);
        if install.bytes > 0 {
            add(&self.all().pages_aside, 1);
            add(&self.own().pages_aside, 1);
        }
        match install.stop {
            None => Step::Retry,
            Some(Stop::Present) if window.holds(self.pgoff) => Step::Retry,
            // Dropped meanwhile, or not to be read back: the number of tries decides.
            Some(Stop::Present) => Step::Again(Why::Changing),
            Some(stop) => self.not_installed(stop),
        }
    }

    /// Refuses a page that the list has not, if the area is still there: what was unmapped with an event that is not read yet
    /// may be another engine's by now. The kernel knows: until the event is read, it says that the address space is changing.
    fn refuse(&self) -> Step {
        match self.board.uffd.r#continue(self.addr, page_size()).stop {
            // The object came to hold it meanwhile, or before its list was taken back.
            None | Some(Stop::Present) => Step::Retry,
            Some(Stop::Changing) if self.aside && self.is_held() => Step::Retry,
            Some(Stop::Changing) => Step::Again(Why::Changing),
            Some(Stop::NoMemory) => Step::Again(Why::NoMemory),
            Some(Stop::Unmapped) => Step::Again(Why::Unmapped),
            Some(Stop::BadSource | Stop::Gone | Stop::Other(_)) => Step::Sigbus,
        }
    }

    /// Decides about a single page that the kernel did not install.
    fn not_installed(&self, stop: Stop) -> Step {
        match stop {
            Stop::Present | Stop::Changing => Step::Again(Why::Changing),
            Stop::NoMemory => Step::Again(Why::NoMemory),
            Stop::Unmapped => Step::Again(Why::Unmapped),
            Stop::BadSource | Stop::Gone | Stop::Other(_) => self.failed(),
        }
    }

    fn failed(&self) -> Step {
        add(&self.all().source_errors, 1);
        add(&self.own().source_errors, 1);
        Step::Sigbus
    }

    /// Tells whether the object holds the page. Asked through the window, which an event of this address space does not
    /// keep from answering.
    fn is_held(&self) -> bool {
        self.area.target.window.as_ref().is_some_and(|window| window.holds(self.pgoff))
    }
}

/// Pages to compose bytes in.
struct Bounces {
    // A raw mapping: each page is borrowed by another thread.
    pages: MmapRaw,
    /// A bit for each page in use.
    taken: AtomicU32,
}

impl Bounces {
    fn new() -> Result<Bounces> {
        let pages = memmap2::MmapMut::map_anon(BOUNCES * page_size()).map_err(Error::io("mmap of bounce buffers"))?;
        Ok(Bounces { pages: pages.into(), taken: AtomicU32::new(0) })
    }

    fn take(&self) -> Option<Bounce<'_>> {
        let free = |index: &usize| self.taken.fetch_or(1 << index, Ordering::Acquire) & (1 << index) == 0;
        (0..BOUNCES).find(free).map(|index| Bounce { bounces: self, index })
    }
}

/// A page that is this thread's until it is dropped.
struct Bounce<'a> {
    bounces: &'a Bounces,
    index: usize,
}

impl Bounce<'_> {
    #[expect(
        clippy::mut_from_ref,
        reason = "the page is this value's alone, and its callers keep one borrow at a time"
    )]
    fn bytes(&self) -> &mut [u8] {
        // SAFETY: the page lies in the mapping, and its bit makes it this thread's.
        unsafe {
            let page = self.bounces.pages.as_mut_ptr().add(self.index * page_size());
            std::slice::from_raw_parts_mut(page, page_size())
        }
    }
}

impl Drop for Bounce<'_> {
    fn drop(&mut self) {
        self.bounces.taken.fetch_and(!(1 << self.index), Ordering::Release);
    }
}
