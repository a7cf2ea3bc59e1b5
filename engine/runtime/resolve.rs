//! From a fault to an answer: looks the page up, and installs it with its neighbours.

use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use memmap2::MmapMut;
use nix::errno::Errno;

use super::around::FaultAround;
use super::fault::Fault;
use super::foreign::At;
use super::huge::HugeSizes;
use super::plan::{Plan, plan};
use super::shared::EngineShared;
use super::slow::Slow;
use crate::fork::masks;
use crate::page::page_size;
use crate::process::mask::{Masked, give_up, mask, mask_while_changing};
use crate::space::stripes::is_own;
use crate::space::table::Area;
use crate::space::{Space, Target};
use crate::stats::{Answered, EngineCounters, VmapCounters, add};
use crate::sys::{Install, Stop, Userfault};
use crate::vmap::page_size::PageSize;

/// Tries at a page for which the kernel has no memory, before it is given up; with the handler's pauses, seconds.
pub(super) const OUT_OF_MEMORY_RETRIES: u32 = 256;
/// Tries at a page while its address space is changing, before it is filled in another way.
pub(super) const RETRIES_BEFORE_ASIDE: u32 = 3;
/// Tries at refusing a page while its address space is changing, before it is refused in another way; with the handler's
/// pauses, seconds.
const RETRIES_BEFORE_MASK: u32 = 256;
/// Tries at a page of which the kernel says that it is not mapped, although no event said so.
const UNMAPPED_RETRIES: u32 = 16;

/// What became of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// The thread is awake.
    Done,
    /// A worker reads its page, or will.
    Handed,
    /// To be tried again soon.
    Later,
    /// The same, because the kernel has no memory now.
    Starved,
    /// The process is gone.
    Gone,
    /// No event told of its address: to be looked up.
    Stray,
    /// The page was unmapped, and no event says so.
    Unmapped,
    /// The page can't be had, and its process shall end for it.
    Fatal,
}

/// Answers faults. Holds what that takes, made beforehand.
pub(crate) struct Resolver {
    pub(super) shared: Arc<EngineShared>,
    /// Where pages are composed that can be read at once.
    pub(super) bounce: MmapMut,
    pub(super) slow: Slow,
    pub(super) fault_around: FaultAround,
    pub(super) huge: HugeSizes,
}

impl Resolver {
    pub(crate) fn new(shared: Arc<EngineShared>, bounce: MmapMut, slow: Slow, fault_around: FaultAround) -> Resolver {
        Resolver { shared, bounce, slow, fault_around, huge: HugeSizes::default() }
    }

    /// Answers one fault.
    pub(crate) fn resolve(&mut self, space: &Space, fault: &Fault) -> Answer {
        let Some(uffd) = &space.uffd else { return Answer::Done };
        if let Some(foreign) = &space.foreign {
            return self.resolve_foreign(At { space, uffd, foreign }, fault);
        }
        let Some(area) = space.table.find(fault.addr) else {
            if fault.retries > 0 {
                // This is old news: a region that is being attached may have the address by now. If the page is still
                // asked for, there will be a new message.
                return self.wake(uffd, fault.addr);
            }
            let may_be_keeper = !self.shared.recognises_workers() || self.shared.keeper.is_thread(fault.tid);
            if is_own(fault.space) && may_be_keeper {
                // Code of the application, on the thread that would look the address up.
                return self.refuse_stray(space, fault);
            }
            return Answer::Stray;
        };
        if fault.failed.is_some_and(|(vmap, generation)| area.target.keeps(vmap, generation)) {
            return self.poison(space, uffd, fault);
        }
        if area.target.page.is_huge() {
            return self.resolve_huge(space, uffd, area, fault);
        }
        let around = if fault.alone { FaultAround::Fixed(1) } else { self.fault_around };
        let pgoff = area.pgoff_of(fault.addr);
        let plan = plan(around, area, pgoff);
        match fault.retries {
            0 if fault.minor => self.count_minor(area, fault),
            0 => plan.count(&self.shared.counters, area, pgoff, fault.write),
            _ => {}
        }
        match plan {
            Plan::Zero { pages } if fault.minor => self.install(space, uffd, area, fault, pages, Source::Held),
            Plan::Copy { pages, src } => self.install(space, uffd, area, fault, pages, Source::Memory(src)),
            Plan::Zero { pages } => self.install(space, uffd, area, fault, pages, Source::Zeros),
            Plan::Read { run } => self.read(space, uffd, area, fault, run, around),
            Plan::Sigbus => self.poison(space, uffd, fault),
        }
    }

    fn count_minor(&self, area: &Area<Target>, fault: &Fault) {
        let (all, own) = (&*self.shared.counters, &*area.target.vmap.counters);
        add(&all.faults_minor, 1);
        add(&own.faults_minor, 1);
        if fault.write {
            add(&own.write_faults, 1);
        }
        if let Some(recorder) = &area.target.vmap.recorder {
            recorder.note(area.pgoff_of(fault.addr));
        }
    }

    /// Tells whether the thread that faulted is one of the workers. Another process's thread ids may be of another
    /// namespace.
    pub(crate) fn is_worker(&self, fault: &Fault) -> bool {
        is_own(fault.space) && self.slow.roll.has(fault.tid)
    }

    /// Answers a worker's touch of a page that a worker would have to read: waiting for that may be for ever.
    pub(super) fn refuse_worker(&mut self, space: &Space, uffd: &Userfault, fault: &Fault) -> Answer {
        add(&self.shared.counters.self_faults, 1);
        self.poison(space, uffd, fault)
    }

    /// Installs the pages of `window`, which the fault's page is one of; present neighbours are passed over.
    pub(super) fn install(
        &mut self,
        space: &Space,
        uffd: &Userfault,
        area: &Area<Target>,
        fault: &Fault,
        window: Range<u64>,
        source: Source,
    ) -> Answer {
        let page = page_size();
        let pgoff = area.pgoff_of(fault.addr);
        let wanted = (pgoff - window.start) as usize * page;
        let start = fault.addr - wanted;
        let total = (window.end - window.start) as usize * page;
        let mut settled = 0;
        while settled < total {
            let install = source.install(uffd, start + settled, settled, total - settled);
            self.count_installed(space, area, &source, install);
            settled += install.bytes;
            match install.stop {
                None => return Answer::Done,
                Some(Stop::Present) => {
                    // EEXIST says that the page is there, not that the thread that waits for it woke.
                    add(&self.shared.counters.already_present, 1);
                    add(&area.target.vmap.counters.already_present, 1);
                    if settled == wanted {
                        // Somebody brought it meanwhile, and what comes with it perhaps too: nobody waits for that.
                        return self.wake(uffd, fault.addr);
                    }
                    settled += page;
                }
                // The page that stopped it is asked for alone; the kernel then names the reason.
                Some(Stop::Changing) if install.bytes > 0 => {}
                Some(_) if settled > wanted => return Answer::Done,
                Some(Stop::Changing) if total == page && fault.retries >= RETRIES_BEFORE_ASIDE => {
                    return self.install_aside(space, uffd, area, fault, source);
                }
                // Given up since it faulted: it is missing now.
                Some(Stop::BadSource) if total == page && matches!(source, Source::Held) => {
                    return self.install(space, uffd, area, fault, window, Source::Zeros);
                }
                Some(stop) if total == page => return self.not_installed(space, uffd, fault, stop),
                Some(stop) => {
                    // The window may reach over the border of a mapping, or a neighbour's source may be bad.
                    let advanced = source.advanced(wanted);
                    let answer = self.install(space, uffd, area, fault, pgoff..pgoff + 1, advanced);
                    if stop == Stop::Unmapped && !self.shared.poisons() {
                        // A mask among them parts them for the kernel. What was read once is not read again for that.
                        for offset in (0..total).step_by(page).filter(|&offset| offset != wanted) {
                            let install = source.install(uffd, start + offset, offset, page);
                            self.count_installed(space, area, &source, install);
                        }
                    }
                    return answer;
                }
            }
        }
        Answer::Done
    }

    /// Fills a page of the backing object through the vmap's window, and wakes the thread, which then maps it by itself.
    ///
    /// While an address space is changing the kernel installs nothing in it, and threads that change it without a pause
    /// can keep it so for seconds. The window is not theirs to change, and waking is always possible.
    fn install_aside(
        &mut self,
        space: &Space,
        uffd: &Userfault,
        area: &Area<Target>,
        fault: &Fault,
        source: Source,
    ) -> Answer {
        // What a window fills is no page of a foreign space.
        let Some(window) = area.target.window.as_ref().filter(|_| space.foreign.is_none()) else {
            return Answer::Later;
        };
        let pgoff = area.pgoff_of(fault.addr);
        if matches!(source, Source::Held) {
            return self.map_aside(space, uffd, fault).unwrap_or_else(|| self.poison(space, uffd, fault));
        }
        let install = match source {
            // SAFETY: as in `Source::install`: the list or the buffer holds the page at `src`.
            Source::Memory(src) | Source::Read(src) => unsafe { window.copy(pgoff, src, page_size()) },
            Source::Zeros | Source::Held => window.zeropage(pgoff, page_size()),
        };
        self.count_installed(space, area, &source, install);
        if install.bytes > 0 {
            add(&self.shared.counters.pages_aside, 1);
            add(&area.target.vmap.counters.pages_aside, 1);
        }
        match install.stop {
            None | Some(Stop::Present) => self.wake(uffd, fault.addr),
            Some(Stop::Changing) => Answer::Later,
            Some(stop) => self.not_installed(space, uffd, fault, stop),
        }
    }

    /// Maps a page that the object holds while its address space is changing, a change that may wait for this very page:
    /// through a userfaultfd that reports no changes, and is not held up by them; `None` if there is none, or the page can't
    /// be had. If the page is given up meanwhile, the thread faults on a missing one.
    fn map_aside(&self, space: &Space, uffd: &Userfault, fault: &Fault) -> Option<Answer> {
        let install = if is_own(space.id) {
            let area = space.table.find(fault.addr)?;
            area.target.window.as_ref()?.map_at(fault.addr)
        } else {
            space.aside.as_ref()?.r#continue(fault.addr, page_size())
        };
        match install.stop {
            Some(Stop::NoMemory | Stop::Other(_)) => None,
            _ => Some(self.wake(uffd, fault.addr)),
        }
    }

    /// Decides about a single page that the kernel did not install.
    pub(super) fn not_installed(&mut self, space: &Space, uffd: &Userfault, fault: &Fault, stop: Stop) -> Answer {
        match stop {
            Stop::Present | Stop::Changing => Answer::Later,
            Stop::Gone => Answer::Gone,
            Stop::NoMemory if fault.starved < OUT_OF_MEMORY_RETRIES => Answer::Starved,
            // Unmapped between the fault and now: its event is on the way.
            Stop::Unmapped if fault.retries < UNMAPPED_RETRIES => Answer::Later,
            Stop::Unmapped => self.wake(uffd, fault.addr),
            Stop::BadSource | Stop::NoMemory | Stop::Other(_) => {
                if let Some(area) = space.table.find(fault.addr) {
                    self.count_failed(area);
                }
                self.poison(space, uffd, fault)
            }
        }
    }

    /// Counts what an ioctl installed, or why it did not.
    pub(super) fn count_installed(&self, space: &Space, area: &Area<Target>, source: &Source, install: Install) {
        source.count(install, &self.shared.counters, &area.target.vmap.counters, &space.counters, add);
    }

    /// Counts a fault on a page that could not be had.
    pub(super) fn count_failed(&self, area: &Area<Target>) {
        add(&self.shared.counters.source_errors, 1);
        add(&area.target.vmap.counters.source_errors, 1);
    }

    /// Maps a page that the backing object holds already; `None` if it does not hold it.
    ///
    /// Asked by trying: lseek(SEEK_DATA) would take the object's lock, which a write(2) to it holds while it waits for
    /// this very thread to bring the bytes to be written.
    pub(super) fn map_resident(&self, uffd: &Userfault, addr: usize) -> Option<Answer> {
        match uffd.r#continue(addr, page_size()).stop {
            None => Some(Answer::Done),
            // The latter: it can't be read back, or the memory is broken.
            Some(Stop::BadSource | Stop::Other(Errno::EIO)) => None,
            Some(Stop::Changing | Stop::NoMemory) => Some(Answer::Later),
            Some(Stop::Gone) => Some(Answer::Gone),
            // Mapped meanwhile, or not mapped any more: the retried touch finds out.
            Some(_) => Some(self.wake(uffd, addr)),
        }
    }

    /// Makes a page a SIGBUS, for the thread that waits and every later touch in this space; unless it came to be
    /// resident meanwhile, by the owner's own writing or before its list was taken back.
    pub(super) fn poison(&mut self, space: &Space, uffd: &Userfault, fault: &Fault) -> Answer {
        if let Some(foreign) = &space.foreign {
            return self.poison_foreign(At { space, uffd, foreign }, fault);
        }
        if let Some(area) = space.table.find(fault.addr).filter(|area| area.target.page.is_huge()) {
            return self.poison_huge(space, uffd, area.target.page, fault);
        }
        let resident = self.map_resident(uffd, fault.addr);
        if resident == Some(Answer::Later)
            && fault.minor
            && fault.retries >= RETRIES_BEFORE_ASIDE
            && let Some(answer) = self.map_aside(space, uffd, fault)
        {
            return answer;
        }
        match resident {
            Some(Answer::Later) if is_own(space.id) && fault.retries >= RETRIES_BEFORE_MASK => {
                return self.mask_while_changing(space, uffd, fault);
            }
            Some(answer) => return answer,
            None => {}
        }
        if !self.shared.poisons() {
            return self.mask(space, uffd, fault);
        }
        let Install { stop, .. } = uffd.poison(fault.addr, page_size());
        match stop {
            None => self.count_refused(space, fault, Answer::Done),
            Some(Stop::Changing | Stop::NoMemory) => Answer::Later,
            Some(Stop::Gone) => Answer::Gone,
            // Present, unmapped, or past the end of the object: the retried touch finds out by itself.
            Some(_) => self.wake(uffd, fault.addr),
        }
    }

    /// Makes a page a SIGBUS while the kernel neither maps nor poisons anything, unless the object holds it: the thread
    /// then maps it by itself.
    fn mask_while_changing(&self, space: &Space, uffd: &Userfault, fault: &Fault) -> Answer {
        let window = space.table.find(fault.addr).and_then(|area| Some((area, area.target.window.as_ref()?)));
        if window.is_some_and(|(area, window)| window.holds(area.pgoff_of(fault.addr))) {
            return self.wake(uffd, fault.addr);
        }
        self.masked(space, uffd, fault, mask_while_changing(uffd, fault.addr, page_size()))
    }

    /// Makes a page a SIGBUS where the kernel has no poison. A process masks its own pages: a forked child's guard does.
    fn mask(&mut self, space: &Space, uffd: &Userfault, fault: &Fault) -> Answer {
        if let Some(masks) = &space.masks {
            return match masks::order(masks.as_fd(), fault.addr) {
                Ok(()) => self.count_masked(space, fault, Answer::Done),
                Err(Errno::EAGAIN) => Answer::Later,
                Err(_) => Answer::Gone,
            };
        }
        let masked = match mask(uffd, fault.addr, page_size()) {
            Masked::NoRoom if fault.starved < OUT_OF_MEMORY_RETRIES => return Answer::Starved,
            // Rather all of its area than a thread that waits for ever.
            Masked::NoRoom => match space.table.find(fault.addr) {
                Some(area) => give_up(uffd, area.start, area.len_bytes()),
                None => return Answer::Later,
            },
            masked => masked,
        };
        self.masked(space, uffd, fault, masked)
    }

    /// Answers a fault by what became of the mask of its page.
    fn masked(&self, space: &Space, uffd: &Userfault, fault: &Fault, masked: Masked) -> Answer {
        match masked {
            Masked::Done => {
                let woken = self.wake(uffd, fault.addr);
                self.count_masked(space, fault, woken)
            }
            Masked::Later | Masked::NoRoom => Answer::Later,
            Masked::Gone => self.wake(uffd, fault.addr),
            Masked::GoneUnseen => Answer::Unmapped,
        }
    }

    /// Counts a page that is SIGBUS from now on.
    pub(super) fn count_refused(&self, space: &Space, fault: &Fault, answer: Answer) -> Answer {
        add(&self.shared.counters.pages_poisoned, 1);
        add(&space.counters.poisoned, 1);
        if let Some(area) = space.table.find(fault.addr) {
            add(&area.target.vmap.counters.pages_poisoned, 1);
        }
        answer
    }

    /// Counts a page that is masked, and so SIGBUS, from now on.
    fn count_masked(&self, space: &Space, fault: &Fault, answer: Answer) -> Answer {
        add(&self.shared.counters.pages_masked, 1);
        self.count_refused(space, fault, answer)
    }

    /// Answers a touch of memory whose bytes nobody knows. If it was unmapped meanwhile, the thread gets SIGSEGV.
    pub(crate) fn refuse_stray(&mut self, space: &Space, fault: &Fault) -> Answer {
        add(&self.shared.counters.strays, 1);
        self.poison_in(space, fault)
    }

    /// As [`Resolver::poison`], whatever the list says: for when the engine no longer serves. A page that became resident
    /// after its fault, as by a shutdown that fills, is there for the thread that touches again.
    pub(crate) fn poison_in(&mut self, space: &Space, fault: &Fault) -> Answer {
        match &space.uffd {
            Some(uffd) => self.poison(space, uffd, fault),
            None => Answer::Done,
        }
    }

    /// Wakes the thread that waits for a page; it touches again.
    pub(crate) fn wake(&self, uffd: &Userfault, addr: usize) -> Answer {
        self.wake_range(uffd, addr, page_size())
    }

    /// The same for a page of any size.
    pub(super) fn wake_page(&self, uffd: &Userfault, page: PageSize, fault: &Fault) -> Answer {
        self.wake_range(uffd, page.floor(fault.addr), page.bytes())
    }

    fn wake_range(&self, uffd: &Userfault, addr: usize, len: usize) -> Answer {
        add(&self.shared.counters.wakes, 1);
        match uffd.wake(addr, len) {
            Err(Errno::EAGAIN) => Answer::Later,
            _ => Answer::Done,
        }
    }
}

/// Where installed bytes come from.
#[derive(Clone, Copy)]
pub(crate) enum Source {
    /// From this address on; the page list keeps it alive.
    Memory(*const u8),
    /// From the bounce buffer.
    Read(*const u8),
    Zeros,
    /// The backing object holds them.
    Held,
}

impl Source {
    /// The same source, `bytes` further on.
    #[inline]
    pub(crate) fn advanced(self, bytes: usize) -> Source {
        match self {
            Source::Memory(src) => Source::Memory(src.wrapping_add(bytes)),
            Source::Read(src) => Source::Read(src.wrapping_add(bytes)),
            Source::Zeros | Source::Held => self,
        }
    }

    /// Counts what an ioctl installed from there, or why it did not, in counters of the engine, the vmap and the space.
    #[inline]
    pub(crate) fn count(
        &self,
        install: Install,
        all: &EngineCounters,
        own: &VmapCounters,
        space: &Answered,
        add: impl Fn(&AtomicU64, u64),
    ) {
        let pages = (install.bytes / page_size()) as u64;
        match install.stop {
            Some(Stop::Changing) if pages == 0 => add(&all.changing, 1),
            Some(Stop::Unmapped) => add(&all.unmapped, 1),
            _ => {}
        }
        if pages == 0 {
            return;
        }
        add(&space.pages, pages);
        let copied = [&all.pages_copied, &own.pages_copied];
        let (kind, read): (_, &[_]) = match self {
            Source::Zeros => ([&all.pages_zeroed, &own.pages_zeroed], &[]),
            Source::Held => ([&all.pages_continued, &own.pages_continued], &[]),
            Source::Memory(_) => (copied, &[]),
            Source::Read(_) => (copied, &[&all.pages_read, &own.pages_read]),
        };
        // Plain loops: a signal handler has little stack.
        for counter in kind {
            add(counter, pages);
        }
        for counter in read {
            add(counter, pages);
        }
    }

    /// Installs `len` bytes at `dst`, which is `offset` bytes into the window.
    #[inline]
    pub(crate) fn install(self, uffd: &Userfault, dst: usize, offset: usize, len: usize) -> Install {
        match self.advanced(offset) {
            // SAFETY: the window was clipped to pages that the list or the buffer holds from `src` on, and `dst` to
            // an area of this engine, in which no thread holds a reference to a page that is missing. If the source
            // has vanished nevertheless, the kernel answers EFAULT.
            Source::Memory(src) | Source::Read(src) => unsafe { uffd.copy(dst, src, len) },
            Source::Zeros => uffd.zeropage(dst, len),
            Source::Held => uffd.r#continue(dst, len),
        }
    }
}
