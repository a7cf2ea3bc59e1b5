//! Faults of foreign spaces: pages are copied into memory of another process, which no object of a vmap backs.
//!
//! A page that the vmap's object holds is copied from there where it may differ from the list's, or was read by a worker. No
//! page is mapped or filled aside, as nothing is shared with that process.

use std::ops::Range;

use nix::errno::Errno;

use super::around::FaultAround;
use super::fault::Fault;
use super::huge::plan_huge;
use super::plan::{Plan, plan};
use super::resolve::{Answer, OUT_OF_MEMORY_RETRIES, Resolver, Source};
use crate::adopt::{Outside, Refusal};
use crate::kiobuf::{Nopage, TryRead};
use crate::page::page_size;
use crate::space::foreign::Foreign;
use crate::space::table::Area;
use crate::space::{Space, Target};
use crate::stats::add;
use crate::sys::{Install, Stop, Userfault};
use crate::vmap::page_size::{PageSize, bytes_of, parts};
use crate::vmap::readable::Readable;

/// What came of composing a huge page.
pub(super) enum Composed {
    Done,
    /// That page has to be read first.
    Blocked(u64),
    Failed,
}

/// A foreign space, with what each answer needs of it.
#[derive(Clone, Copy)]
pub(super) struct At<'a> {
    pub(super) space: &'a Space,
    pub(super) uffd: &'a Userfault,
    pub(super) foreign: &'a Foreign,
}

impl Resolver {
    /// Answers a fault of a foreign space.
    pub(super) fn resolve_foreign(&mut self, at: At<'_>, fault: &Fault) -> Answer {
        let At { space, uffd, foreign } = at;
        let Some(area) = space.table.find(fault.addr) else {
            return match foreign.outside {
                Outside::Zeros => self.zero_alone(at, fault),
                Outside::Sigbus => self.refuse_stray(space, fault),
            };
        };
        if fault.minor || fault.failed.is_some_and(|(vmap, generation)| area.target.keeps(vmap, generation)) {
            return self.poison_foreign(at, fault);
        }
        if area.target.page.is_huge() {
            return self.resolve_foreign_huge(at, area, fault);
        }
        let pgoff = area.pgoff_of(fault.addr);
        if foreign.has_given_up(area, pgoff) {
            return self.zero_alone(at, fault);
        }
        let around = if fault.alone { FaultAround::Fixed(1) } else { self.fault_around };
        let plan = plan(around, area, pgoff);
        if fault.retries == 0 {
            plan.count(&self.shared.counters, area, pgoff, fault.write);
        }
        let window = match &plan {
            Plan::Copy { pages, .. } | Plan::Zero { pages } => foreign.kept(area, pages.clone(), pgoff),
            Plan::Read { run } => foreign.kept(area, around.window(area, run, pgoff, true), pgoff),
            Plan::Sigbus => return self.poison_foreign(at, fault),
        };
        let diverges = area.target.vmap.diverges();
        if (diverges || fault.retries > 0)
            && let Some(answer) = self.copy_held(at, area, fault, pgoff..window.end)
        {
            return answer;
        }
        // Of its neighbours, the object may hold other bytes.
        let window = if diverges { pgoff..pgoff + 1 } else { window };
        match plan {
            Plan::Copy { pages, src } => {
                let src = src.wrapping_add(bytes_of(pages.start, &(pages.start..window.start)).end);
                self.install(space, uffd, area, fault, window, Source::Memory(src))
            }
            Plan::Zero { .. } => self.install(space, uffd, area, fault, window, Source::Zeros),
            Plan::Read { .. } => self.read_foreign(at, area, fault, window),
            Plan::Sigbus => Answer::Later,
        }
    }

    /// Copies from a page of the object on as many as it holds, one after the other; `None` if it does not hold the first.
    fn copy_held(&mut self, at: At<'_>, area: &Area<Target>, fault: &Fault, pages: Range<u64>) -> Option<Answer> {
        let At { space, uffd, .. } = at;
        let (src, nr_pages) = area.target.window.as_ref()?.readable()?.part(pages)?;
        let bytes = nr_pages as usize * page_size();
        // SAFETY: the kernel reads `bytes` bytes of the mapping, or stops where there are none; the destination is memory of
        // another process.
        let mut install = unsafe { uffd.copy(fault.addr, src, bytes) };
        if install.bytes == 0 && bytes > page_size() && !matches!(install.stop, Some(Stop::BadSource | Stop::Gone)) {
            // It may reach over the border of a mapping: alone, the kernel names the reason.
            // SAFETY: as above.
            install = unsafe { uffd.copy(fault.addr, src, page_size()) };
        }
        self.count_installed(space, area, &Source::Memory(src), install);
        match install {
            Install { bytes, .. } if bytes > 0 => Some(Answer::Done),
            Install { stop: None | Some(Stop::BadSource), .. } => None,
            Install { stop: Some(Stop::Present), .. } => Some(self.wake(uffd, fault.addr)),
            Install { stop: Some(stop), .. } => Some(self.not_put(at, fault, stop)),
        }
    }

    /// Reads pages at once if that can't block, else lets a worker do it.
    fn read_foreign(&mut self, at: At<'_>, area: &Area<Target>, fault: &Fault, window: Range<u64>) -> Answer {
        let At { space, uffd, .. } = at;
        let pgoff = area.pgoff_of(fault.addr);
        if let Some(answer) = self.join_read(space, uffd, area, fault, pgoff) {
            return answer;
        }
        let bytes = bytes_of(window.start, &window).end;
        match area.target.list.try_read_pages(window.start, &mut self.bounce[..bytes]) {
            TryRead::Done => {
                let source = Source::Read(self.bounce.as_ptr());
                self.install(space, uffd, area, fault, window, source)
            }
            // A neighbour's failure is not this page's.
            TryRead::Failed(_) if window.end - window.start > 1 => self.read_foreign(at, area, fault, pgoff..pgoff + 1),
            TryRead::WouldBlock | TryRead::Failed(_) => {
                // It may have been read for another process. A fault that was put off was asked about already.
                let held = match fault.retries {
                    0 => self.copy_held(at, area, fault, pgoff..window.end),
                    _ => None,
                };
                held.unwrap_or_else(|| self.hand_to_worker(area, fault, window))
            }
        }
    }

    /// Answers a fault by a page of zeros.
    fn zero_alone(&mut self, at: At<'_>, fault: &Fault) -> Answer {
        let At { space, uffd, .. } = at;
        let install = uffd.zeropage(fault.addr, page_size());
        match space.table.find(fault.addr) {
            Some(area) => self.count_installed(space, area, &Source::Zeros, install),
            None if install.stop.is_none() => {
                add(&self.shared.counters.pages_zeroed, 1);
                add(&space.counters.pages, 1);
            }
            None => {}
        }
        match install.stop {
            None => Answer::Done,
            Some(Stop::Present) => self.wake(uffd, fault.addr),
            Some(stop) => self.not_put(at, fault, stop),
        }
    }

    /// Decides about a page that the kernel did not install, and that no other way brings.
    fn not_put(&mut self, at: At<'_>, fault: &Fault, stop: Stop) -> Answer {
        let At { space, uffd, .. } = at;
        match stop {
            Stop::BadSource | Stop::Other(_) => self.refuse_foreign(at, fault),
            Stop::NoMemory if fault.starved >= OUT_OF_MEMORY_RETRIES => self.refuse_foreign(at, fault),
            stop => self.not_installed(space, uffd, fault, stop),
        }
    }

    /// Makes a page of a foreign space a SIGBUS, or has its process ended: unless it is zeros whatever the list says, or the
    /// vmap's object holds it.
    pub(super) fn poison_foreign(&mut self, at: At<'_>, fault: &Fault) -> Answer {
        let At { space, foreign, .. } = at;
        let Some(area) = space.table.find(fault.addr) else {
            return match foreign.outside {
                Outside::Zeros => self.zero_alone(at, fault),
                Outside::Sigbus => self.refuse_foreign(at, fault),
            };
        };
        let page = area.target.page;
        if page.is_huge() {
            let first = area.pgoff_of(page.floor(fault.addr).max(area.start));
            return match foreign.has_given_up_all(area, first..first + page.base_pages()) {
                Some(true) => self.put_huge(at, area, fault, Source::Zeros),
                _ => self.refuse_foreign(at, fault),
            };
        }
        let pgoff = area.pgoff_of(fault.addr);
        if foreign.has_given_up(area, pgoff) {
            return self.zero_alone(at, fault);
        }
        let held = if fault.minor { None } else { self.copy_held(at, area, fault, pgoff..pgoff + 1) };
        held.unwrap_or_else(|| self.refuse_foreign(at, fault))
    }

    /// Refuses a page of a foreign space, whatever it is, and of whatever size: its maker may have said something else.
    fn refuse_foreign(&mut self, at: At<'_>, fault: &Fault) -> Answer {
        let At { space, uffd, foreign } = at;
        if foreign.refusal == Refusal::Kill {
            return self.count_refused(space, fault, Answer::Fatal);
        }
        for page in [PageSize::Base].into_iter().chain(PageSize::HUGE) {
            match uffd.poison(page.floor(fault.addr), page.bytes()).stop {
                None => return self.count_refused(space, fault, Answer::Done),
                Some(Stop::Other(Errno::EINVAL)) => {}
                Some(Stop::Gone) => return Answer::Gone,
                Some(Stop::Present | Stop::Unmapped) => return self.wake_page(uffd, page, fault),
                Some(_) => return Answer::Later,
            }
        }
        Answer::Later
    }

    /// Answers a fault in an area of huge pages of a foreign space.
    fn resolve_foreign_huge(&mut self, at: At<'_>, area: &Area<Target>, fault: &Fault) -> Answer {
        let At { space, uffd, foreign } = at;
        let Target { page, list, vmap, .. } = &area.target;
        // Where it was split, the memory is not of such pages.
        let Some(first) = area.contains(page.floor(fault.addr)).then(|| area.pgoff_of(page.floor(fault.addr))) else {
            return self.refuse_foreign(at, fault);
        };
        let pages = first..first + page.base_pages();
        let given_up = foreign.has_given_up_all(area, pages.clone());
        let whole = match given_up {
            Some(true) => Plan::Zero { pages: pages.clone() },
            Some(false) => plan_huge(list, *page, first),
            // The same.
            None => Plan::Sigbus,
        };
        if fault.retries == 0 {
            whole.count(&self.shared.counters, area, first, fault.write);
        }
        match whole {
            Plan::Sigbus => return self.refuse_foreign(at, fault),
            Plan::Zero { .. } if given_up == Some(true) || !vmap.diverges() => {
                return self.put_huge(at, area, fault, Source::Zeros);
            }
            Plan::Copy { src, .. } if !vmap.diverges() => {
                return self.put_huge(at, area, fault, Source::Memory(src));
            }
            _ => {}
        }
        let pages = first..pages.end.min(list.nr_pages());
        match self.compose(area, pages.clone()) {
            Composed::Done => match self.huge.buffer(*page).map(|composed| composed.as_ptr()) {
                Some(src) => self.put_huge(at, area, fault, Source::Read(src)),
                None => self.refuse_foreign(at, fault),
            },
            Composed::Failed => self.refuse_foreign(at, fault),
            Composed::Blocked(pgoff) => {
                // The pages are the vmap's: as many as can be are read for them, and composed when they are there.
                let missing = Fault { addr: page.floor(fault.addr) + bytes_of(first, &(first..pgoff)).end, ..*fault };
                let run = list.extent_at(pgoff).map_or(pgoff + 1, |extent| extent.first_page + extent.nr_pages);
                self.join_read(space, uffd, area, &missing, pgoff)
                    .unwrap_or_else(|| self.hand_to_worker(area, &missing, pgoff..run.min(pages.end)))
            }
        }
    }

    /// Installs the huge page of a fault.
    fn put_huge(&mut self, at: At<'_>, area: &Area<Target>, fault: &Fault, source: Source) -> Answer {
        let At { space, uffd, .. } = at;
        let page = area.target.page;
        let Some(src) = self.huge.src(page, source) else { return self.refuse_foreign(at, fault) };
        // SAFETY: a whole huge page lies at `src`, in the list or in a buffer; the destination is memory of another process.
        let install = unsafe { uffd.copy(page.floor(fault.addr), src, page.bytes()) };
        self.count_installed(space, area, &source, install);
        match install.stop {
            None => Answer::Done,
            // The memory is of base pages, and this one is missing. Of a huge page it can't be asked for.
            Some(Stop::Present)
                if fault.addr != page.floor(fault.addr) && uffd.poison(fault.addr, page_size()).stop.is_none() =>
            {
                self.count_refused(space, fault, Answer::Done)
            }
            Some(Stop::Present) => self.wake_page(uffd, page, fault),
            Some(stop) => self.not_put(at, fault, stop),
        }
    }

    /// Puts a huge page together in its buffer, from what the vmap's object holds and what can be read at once.
    pub(super) fn compose(&mut self, area: &Area<Target>, pages: Range<u64>) -> Composed {
        let Target { page, list, vmap, window, .. } = &area.target;
        let readable = window.as_ref().and_then(|window| window.readable());
        let Some(memory) = self.huge.buffer(*page) else { return Composed::Failed };
        let first = pages.start;
        for part in parts(list, pages.clone()) {
            let mut at = part.start;
            while at < part.end {
                let nr_held =
                    if vmap.diverges() { held(readable, at, &mut memory[bytes_of(first, &(at..part.end))]) } else { 0 };
                if nr_held > 0 {
                    at += nr_held;
                    continue;
                }
                // Behind a page that is not held others may be.
                let end = if vmap.diverges() { at + 1 } else { part.end };
                match list.try_read_pages(at, &mut memory[bytes_of(first, &(at..end))]) {
                    TryRead::Done => at = end,
                    _ if matches!(list.nopage(at), Nopage::Sigbus(_)) => return Composed::Failed,
                    // What a worker has read is held.
                    TryRead::WouldBlock | TryRead::Failed(_) => {
                        match held(readable, at, &mut memory[bytes_of(first, &(at..end))]) {
                            0 => return Composed::Blocked(at),
                            nr_held => at += nr_held,
                        }
                    }
                }
            }
        }
        memory[bytes_of(first, &pages).end..].fill(0);
        Composed::Done
    }
}

/// Reads pages that an object holds from `at` on; tells how many before the first that it does not.
fn held(readable: Option<&Readable>, at: u64, buf: &mut [u8]) -> u64 {
    readable.map_or(0, |readable| readable.read(at, buf))
}
