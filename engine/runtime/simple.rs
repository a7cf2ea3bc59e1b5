//! Simple faults: on plain pages that lie in memory or are zeros, which one system call brings.

use std::ops::Range;
use std::sync::atomic::AtomicU64;

use super::around::FaultAround;
use super::plan::{Plan, plan};
use super::resolve::Source;
use crate::page::page_size;
use crate::space::table::Area;
use crate::space::{Space, Target};
use crate::stats::{EngineCounters, VmapCounters};
use crate::sys::{Install, Userfault};

/// What answers a simple fault.
pub(super) struct Simple<'a> {
    pub(super) area: &'a Area<Target>,
    plan: Plan,
    /// The page that is waited for.
    pub(super) wanted: u64,
    pub(super) pages: Range<u64>,
    /// Where they come from.
    pub(super) source: Source,
}

impl<'a> Simple<'a> {
    /// Looks a fault up; `None` if it is not simple.
    #[inline]
    pub(super) fn of(around: FaultAround, space: &'a Space, addr: usize) -> Option<Simple<'a>> {
        let area = space.table.find(addr)?;
        if area.target.page.is_huge() {
            return None;
        }
        let wanted = area.pgoff_of(addr);
        let plan = plan(around, area, wanted);
        let (pages, source) = match &plan {
            Plan::Copy { pages, src } => (pages.clone(), Source::Memory(*src)),
            Plan::Zero { pages } => (pages.clone(), Source::Zeros),
            Plan::Read { .. } | Plan::Sigbus => return None,
        };
        Some(Simple { area, plan, wanted, pages, source })
    }

    /// Where the first page is missing.
    #[inline]
    pub(super) fn start(&self) -> usize {
        self.area.start + (self.pages.start - self.area.pgoff) as usize * page_size()
    }

    #[inline]
    pub(super) fn bytes(&self) -> usize {
        (self.pages.end - self.pages.start) as usize * page_size()
    }

    /// Counts the fault, in counters of the engine and of the area's vmap.
    #[inline]
    pub(super) fn count(&self, all: &EngineCounters, own: &VmapCounters, write: bool, add: impl Fn(&AtomicU64, u64)) {
        self.plan.count_in(all, own, self.area, self.wanted, write, add);
    }

    /// Installs all pages where they are missing.
    #[inline]
    pub(super) fn install(&self, uffd: &Userfault) -> Install {
        self.source.install(uffd, self.start(), 0, self.bytes())
    }
}
