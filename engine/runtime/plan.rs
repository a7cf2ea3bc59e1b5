//! What a fault needs: which pages, from where. Pure, but for what an area remembers of its last faults.

use std::ops::Range;
use std::sync::atomic::AtomicU64;

use super::around::FaultAround;
use crate::kiobuf::Nopage;
use crate::page::page_size;
use crate::space::Target;
use crate::space::table::Area;
use crate::stats::{EngineCounters, VmapCounters, add};

/// What brings a page, and which others with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Plan {
    /// Copies of what lies in memory from `src` on.
    Copy { pages: Range<u64>, src: *const u8 },
    /// Zeros.
    Zero { pages: Range<u64> },
    /// Some of these pages are to be read first.
    Read { run: Range<u64> },
    /// There is no page.
    Sigbus,
}

impl Plan {
    /// Counts a fault on a page by what that is, and notes it if the vmap's working set is recorded.
    pub(crate) fn count(&self, all: &EngineCounters, area: &Area<Target>, pgoff: u64, write: bool) {
        self.count_in(all, &area.target.vmap.counters, area, pgoff, write, add);
    }

    /// As [`Plan::count`], in counters of the engine and of the area's vmap.
    #[inline]
    pub(crate) fn count_in(
        &self,
        all: &EngineCounters,
        own: &VmapCounters,
        area: &Area<Target>,
        pgoff: u64,
        write: bool,
        add: impl Fn(&AtomicU64, u64),
    ) {
        self.counters(all, own).into_iter().for_each(|counter| add(counter, 1));
        if write {
            add(&own.write_faults, 1);
        }
        self.note(area, pgoff);
    }

    /// Notes a fault on a page if the vmap's working set is recorded. What can't be had is no part of it.
    #[inline]
    pub(crate) fn note(&self, area: &Area<Target>, pgoff: u64) {
        if let Some(recorder) = &area.target.vmap.recorder
            && *self != Plan::Sigbus
        {
            recorder.note(pgoff);
        }
    }

    /// Those that count faults on such pages, of an engine and of a vmap.
    #[inline]
    pub(crate) fn counters<'a>(&self, all: &'a EngineCounters, own: &'a VmapCounters) -> [&'a AtomicU64; 2] {
        match self {
            Plan::Copy { .. } => [&all.faults_copied, &own.faults_copied],
            Plan::Read { .. } => [&all.faults_read, &own.faults_read],
            Plan::Zero { .. } => [&all.faults_zeroed, &own.faults_zeroed],
            Plan::Sigbus => [&all.faults_refused, &own.faults_refused],
        }
    }
}

/// Decides about a fault on page `pgoff` of an area.
#[inline]
pub(crate) fn plan(around: FaultAround, area: &Area<Target>, pgoff: u64) -> Plan {
    match area.target.list.nopage(pgoff) {
        Nopage::Direct { src, run } => {
            let pages = around.window(area, &run, pgoff, false);
            let src = src.wrapping_add((pages.start - run.start) as usize * page_size());
            Plan::Copy { pages, src }
        }
        Nopage::Zero { run } => Plan::Zero { pages: around.window(area, &run, pgoff, false) },
        Nopage::Read { run, .. } => Plan::Read { run },
        Nopage::Sigbus(_) => Plan::Sigbus,
    }
}
