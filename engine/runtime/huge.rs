//! Faults on huge pages: each brings the one page that it lies in, whole.
//!
//! A huge page is copied straight from the list when one extent of memory holds all of it, and is composed in a buffer
//! when it does not. The buffers are made by the thread that builds a vmap of such pages, and given to the fault-handling
//! thread by a command. Where reading would wait a worker composes, as it does for the system's own pages.
//!
//! What the kernel does differently here: it answers EEXIST, not ENOMEM, when the pool is empty, so that CONTINUE has to be
//! asked whether the page is there; it has no ZEROPAGE, so that zeros are copied; and it can't mask.

use std::ops::Range;

use memmap2::{Advice, Mmap, MmapMut};

use super::buffers::ReadBuffer;
use super::command::Command;
use super::fault::Fault;
use super::plan::Plan;
use super::reads::{Waiter, Wanted};
use super::resolve::{Answer, RETRIES_BEFORE_ASIDE, Resolver, Source};
use super::shared::EngineShared;
use crate::kiobuf::{Kiobuf, Nopage, ReadFailure, TryRead};
use crate::space::mmap_vec::MmapVec;
use crate::space::table::Area;
use crate::space::{Space, Target};
use crate::stats::add;
use crate::sys::{Stop, Userfault};
use crate::vmap::page_size::{PageSize, bytes_of, parts};
use crate::{Error, Result};

/// Huge pages of 2 MiB that workers may read at once for somebody who waits. Of larger ones it is one, in any case: its memory
/// stays with the engine.
const READ_BUFFERS: usize = 4;

/// What composing huge pages of one size takes.
pub(crate) struct HugeMemory {
    page: PageSize,
    /// Where pages are composed that can be read at once.
    bounce: MmapMut,
    /// Never written: the kernel shows its zero page.
    zeros: Mmap,
    /// Where workers compose pages.
    buffers: MmapVec<ReadBuffer>,
    nr_lent: usize,
}

impl HugeMemory {
    fn new(page: PageSize) -> Result<HugeMemory> {
        let no_memory = "mmap of a buffer for huge pages";
        let anonymous = || MmapMut::map_anon(page.bytes()).map_err(Error::io(no_memory));
        let mut buffers = MmapVec::new();
        for _ in 0..if page == PageSize::Huge2M { READ_BUFFERS } else { 1 } {
            buffers.try_push(ReadBuffer(anonymous()?)).map_err(|(_, errno)| Error::sys(no_memory)(errno))?;
        }
        let zeros = anonymous()?.make_read_only().map_err(Error::io(no_memory))?;
        // COPY reads what is mapped without a second try. It is one page of zeros, shown everywhere.
        let _ = zeros.advise(Advice::PopulateRead);
        Ok(HugeMemory { page, bounce: anonymous()?, zeros, buffers, nr_lent: 0 })
    }
}

impl HugeMemory {
    /// Lends a buffer, of which `nr_late` are lent to reads that nobody waits for any more.
    fn lend(&mut self, nr_late: usize) -> Option<ReadBuffer> {
        let buffer = match self.buffers.pop() {
            Some(buffer) => buffer,
            // Those may never come back, and are replaced.
            None if self.page == PageSize::Huge2M && self.nr_lent - nr_late < READ_BUFFERS => {
                ReadBuffer(MmapMut::map_anon(self.page.bytes()).ok()?)
            }
            None => return None,
        };
        self.nr_lent += 1;
        Some(buffer)
    }

    /// Takes one back, unless it was replaced.
    fn give_back(&mut self, buffer: ReadBuffer, nr_late: usize) {
        self.nr_lent -= 1;
        if self.page > PageSize::Huge2M || self.buffers.len() + self.nr_lent - nr_late < READ_BUFFERS {
            // Without room to note it, it is given up.
            let _ = self.buffers.try_push(buffer);
        }
    }
}

/// The memory of each size of which there is a vmap.
#[derive(Default)]
pub(crate) struct HugeSizes([Option<HugeMemory>; PageSize::HUGE.len()]);

impl HugeSizes {
    fn of(&mut self, page: PageSize) -> Option<&mut HugeMemory> {
        self.0.iter_mut().flatten().find(|memory| memory.page == page)
    }

    /// Where a page of a size is composed.
    pub(super) fn buffer(&mut self, page: PageSize) -> Option<&mut [u8]> {
        self.of(page).map(|memory| &mut *memory.bounce)
    }

    /// Where a page of a size lies that comes from a source.
    pub(super) fn src(&mut self, page: PageSize, source: Source) -> Option<*const u8> {
        match source {
            Source::Memory(src) | Source::Read(src) => Some(src),
            Source::Zeros | Source::Held => self.of(page).map(|memory| memory.zeros.as_ptr()),
        }
    }

    /// Lends a buffer for a page of a size, if one is free.
    pub(super) fn lend(&mut self, page: PageSize, nr_late: usize) -> Option<ReadBuffer> {
        self.of(page)?.lend(nr_late)
    }

    /// Takes it back.
    pub(super) fn give_back(&mut self, page: PageSize, buffer: ReadBuffer, nr_late: usize) {
        if let Some(memory) = self.of(page) {
            memory.give_back(buffer, nr_late);
        }
    }
}

/// Sees to it that the fault-handling thread has what pages of a size take.
///
/// # Errors
///
/// [`Error::Sys`] with `ENOMEM`; [`Error::Shutdown`].
pub(crate) fn provide(shared: &EngineShared, page: PageSize) -> Result<()> {
    if page.is_huge() {
        let memory = HugeMemory::new(page)?;
        drop(shared.handler.ask(|reply| Command::Huge { memory, reply })?);
    }
    Ok(())
}

/// Reads pages of any extents into a buffer that begins with the first of them, and zeroes the rest; may wait.
///
/// # Errors
///
/// That of the first extent that can't be read.
pub(crate) fn read(list: &Kiobuf, pages: Range<u64>, buf: &mut [u8]) -> std::result::Result<(), ReadFailure> {
    for part in parts(list, pages.clone()) {
        list.read_pages(part.start, &mut buf[bytes_of(pages.start, &part)])?;
    }
    buf[bytes_of(pages.start, &pages).end..].fill(0);
    Ok(())
}

/// As [`read`], unless that would wait.
fn try_read(list: &Kiobuf, pages: Range<u64>, buf: &mut [u8]) -> TryRead {
    for part in parts(list, pages.clone()) {
        match list.try_read_pages(part.start, &mut buf[bytes_of(pages.start, &part)]) {
            TryRead::Done => {}
            other => return other,
        }
    }
    buf[bytes_of(pages.start, &pages).end..].fill(0);
    TryRead::Done
}

/// Decides about the huge page that begins with page `first` of a list.
pub(super) fn plan_huge(list: &Kiobuf, page: PageSize, first: u64) -> Plan {
    let after = first + page.base_pages();
    let end = after.min(list.nr_pages());
    match list.nopage(first) {
        Nopage::Sigbus(_) => Plan::Sigbus,
        Nopage::Direct { src, run } if run.end >= after => {
            Plan::Copy { pages: first..end, src: src.wrapping_add(bytes_of(run.start, &(run.start..first)).end) }
        }
        Nopage::Zero { run } if run.end >= end => Plan::Zero { pages: first..end },
        _ => Plan::Read { run: first..end },
    }
}

impl Resolver {
    /// Keeps memory for huge pages, unless there is some of the size already: it goes back then, to be freed elsewhere.
    pub(super) fn take_huge(&mut self, memory: HugeMemory) -> Option<HugeMemory> {
        if self.huge.of(memory.page).is_some() {
            return Some(memory);
        }
        match self.huge.0.iter_mut().find(|place| place.is_none()) {
            Some(place) => place.replace(memory),
            None => Some(memory),
        }
    }

    /// Answers a fault in an area of huge pages.
    pub(super) fn resolve_huge(
        &mut self,
        space: &Space,
        uffd: &Userfault,
        area: &Area<Target>,
        fault: &Fault,
    ) -> Answer {
        let page = area.target.page;
        let fault = &Fault { addr: page.floor(fault.addr), ..*fault };
        let first = area.pgoff_of(fault.addr);
        let plan = plan_huge(&area.target.list, page, first);
        if fault.retries == 0 {
            plan.count(&self.shared.counters, area, first, fault.write);
        }
        match plan {
            Plan::Copy { src, .. } => self.install_huge(space, uffd, area, fault, Source::Memory(src)),
            Plan::Zero { .. } => self.install_huge(space, uffd, area, fault, Source::Zeros),
            Plan::Read { run } => self.read_huge(space, uffd, area, fault, run),
            Plan::Sigbus => self.poison_huge(space, uffd, page, fault),
        }
    }

    /// Composes a huge page at once if that can't block, else lets a worker do it.
    fn read_huge(
        &mut self,
        space: &Space,
        uffd: &Userfault,
        area: &Area<Target>,
        fault: &Fault,
        pages: Range<u64>,
    ) -> Answer {
        let Target { list, page, .. } = &area.target;
        let is_worker = self.is_worker(fault);
        if let Some(answer) = self.join_read(space, uffd, area, fault, pages.start) {
            return answer;
        }
        // It may have been brought for another space before this fault was read: composing it takes longer than asking.
        match map_resident(uffd, fault.addr, page.bytes()) {
            Resident::No => {}
            Resident::Later if fault.retries >= RETRIES_BEFORE_ASIDE => {}
            resident => return self.mapped_huge(uffd, *page, fault, resident),
        }
        // It was provided before the vmap was built.
        let Some(memory) = self.huge.of(*page) else { return self.poison_huge(space, uffd, *page, fault) };
        // Others would wait for as long as composing the largest pages takes.
        let is_long = *page > PageSize::Huge2M && !is_worker;
        let read = if is_long { TryRead::WouldBlock } else { try_read(list, pages.clone(), &mut memory.bounce) };
        match read {
            TryRead::Done => {
                let source = Source::Read(memory.bounce.as_ptr());
                self.install_huge(space, uffd, area, fault, source)
            }
            TryRead::Failed(_) if is_worker => {
                self.count_failed(area);
                self.poison_huge(space, uffd, *page, fault)
            }
            TryRead::WouldBlock if is_worker => self.refuse_worker(space, uffd, fault),
            TryRead::WouldBlock | TryRead::Failed(_) if !self.may_wait(fault, None) => {
                self.refuse_worker(space, uffd, fault)
            }
            // A failure is tried again, and told of.
            TryRead::WouldBlock | TryRead::Failed(_) => self.hand_huge_to_worker(area, fault, pages),
        }
    }

    fn hand_huge_to_worker(&mut self, area: &Area<Target>, fault: &Fault, pages: Range<u64>) -> Answer {
        let Target { vmap, list, page, generation, .. } = &area.target;
        let unit = list.read_unit(pages.start);
        let wanted = Wanted {
            vmap: vmap.id,
            generation: *generation,
            run: pages.clone(),
            pages,
            huge: Some(*page),
            medium: unit.map_or(0, |unit| unit.medium),
            is_quick: false,
            is_unit: true,
            alone: true,
            policy: vmap.failure_policy,
            since: fault.since,
        };
        self.ask(&area.target, wanted, Waiter::Fault(*fault)).unwrap_or(Answer::Later)
    }

    /// Installs the huge page of a fault.
    fn install_huge(
        &mut self,
        space: &Space,
        uffd: &Userfault,
        area: &Area<Target>,
        fault: &Fault,
        source: Source,
    ) -> Answer {
        let page = area.target.page;
        let Some(src) = self.huge.src(page, source) else {
            return self.poison_huge(space, uffd, page, fault);
        };
        // SAFETY: a whole huge page lies at `src`, in the list or in a buffer; the destination is a page of an area of this
        // engine, in which no thread holds a reference to what is missing.
        let mut install = unsafe { uffd.copy(fault.addr, src, page.bytes()) };
        if install.stop == Some(Stop::Changing)
            && fault.retries >= RETRIES_BEFORE_ASIDE
            && let Some(window) = &area.target.window
        {
            // SAFETY: as above; the window maps the same page.
            install = unsafe { window.copy(area.pgoff_of(fault.addr), src, page.bytes()) };
            if install.stop.is_none() {
                self.count_installed(space, area, &source, install);
                add(&self.shared.counters.pages_aside, page.base_pages());
                add(&area.target.vmap.counters.pages_aside, page.base_pages());
                return self.wake_page(uffd, page, fault);
            }
            if install.stop == Some(Stop::Present) && window.holds(area.pgoff_of(fault.addr)) {
                return self.wake_page(uffd, page, fault);
            }
        }
        self.count_installed(space, area, &source, install);
        match install.stop {
            None => Answer::Done,
            Some(Stop::Present) => match map_resident(uffd, fault.addr, page.bytes()) {
                // The kernel says so when the pool is empty.
                Resident::No => self.not_installed(space, uffd, fault, Stop::NoMemory),
                resident => {
                    add(&self.shared.counters.already_present, 1);
                    add(&area.target.vmap.counters.already_present, 1);
                    self.mapped_huge(uffd, page, fault, resident)
                }
            },
            Some(stop) => self.not_installed(space, uffd, fault, stop),
        }
    }

    /// Makes a huge page a SIGBUS, unless the object holds it.
    pub(super) fn poison_huge(&mut self, space: &Space, uffd: &Userfault, page: PageSize, fault: &Fault) -> Answer {
        let fault = &Fault { addr: page.floor(fault.addr), ..*fault };
        match map_resident(uffd, fault.addr, page.bytes()) {
            Resident::No => {}
            resident => return self.mapped_huge(uffd, page, fault, resident),
        }
        match uffd.poison(fault.addr, page.bytes()).stop {
            None => self.count_refused(space, fault, Answer::Done),
            Some(Stop::Changing | Stop::NoMemory) => Answer::Later,
            Some(Stop::Gone) => Answer::Gone,
            // Present, unmapped, or past the end of the object: the retried touch finds out by itself.
            Some(_) => self.wake_page(uffd, page, fault),
        }
    }

    /// Answers a fault by what became of mapping its page.
    fn mapped_huge(&self, uffd: &Userfault, page: PageSize, fault: &Fault, resident: Resident) -> Answer {
        match resident {
            Resident::Mapped => Answer::Done,
            Resident::No | Resident::Later => Answer::Later,
            Resident::Gone => Answer::Gone,
            Resident::Unclear => self.wake_page(uffd, page, fault),
        }
    }
}

/// What came of mapping a page that the object may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Resident {
    /// It is mapped, and its waiters awake.
    Mapped,
    /// The object does not hold it.
    No,
    Later,
    Gone,
    /// Mapped already, or not mapped any more: the retried touch finds out.
    Unclear,
}

fn map_resident(uffd: &Userfault, addr: usize, len: usize) -> Resident {
    match uffd.r#continue(addr, len).stop {
        None => Resident::Mapped,
        Some(Stop::BadSource) => Resident::No,
        Some(Stop::Changing | Stop::NoMemory) => Resident::Later,
        Some(Stop::Gone) => Resident::Gone,
        Some(_) => Resident::Unclear,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_that_are_late_are_replaced() {
        let mut memory = HugeMemory::new(PageSize::Huge2M).unwrap();
        let mut lent: Vec<_> = std::iter::from_fn(|| memory.lend(0)).collect();
        assert_eq!(lent.len(), READ_BUFFERS);
        lent.extend([memory.lend(2), memory.lend(2)].into_iter().flatten());
        assert_eq!(lent.len(), READ_BUFFERS + 2);
        assert!(memory.lend(2).is_none());
        lent.into_iter().for_each(|buffer| memory.give_back(buffer, 0));
        assert_eq!((memory.buffers.len(), memory.nr_lent), (READ_BUFFERS, 0));
    }
}
