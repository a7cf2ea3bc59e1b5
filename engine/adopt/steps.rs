//! Bringing the pages of adopted processes before they are touched, and letting them go.

use std::collections::HashMap;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use nix::errno::Errno;

use super::{Adopted, Release};
use crate::kiobuf::ExtentKind;
use crate::page::page_size;
use crate::region::populate::replay::windows;
use crate::runtime::call::call;
use crate::runtime::command::{Bring, Bringing, Brought, Command, Halt};
use crate::runtime::handles::Request;
use crate::runtime::patience::Patience;
use crate::runtime::shared::EngineShared;
use crate::runtime::threads::{self, Role};
use crate::snapshot::View;
use crate::space::foreign::is_foreign;
use crate::space::{AreaRecord, SpaceId};
use crate::stats::SpaceCounters;
use crate::vmap::Vmap;
use crate::vmap::core::VmapCore;
use crate::vmap::fill::FillProgress;
use crate::vmap::page_size::PageSize;
use crate::working_set::WorkingSet;
use crate::{Error, Result};

/// Pages that are read together when the fault-handling thread found the first of them not to be had at once.
const READ_PAGES: u64 = 64;
/// How often processes are gone through that fork while they are let go.
const RELEASE_ROUNDS: usize = 1000;

/// Brings every page that is missing in any adopted process of an engine.
pub(crate) fn fill_all(
    shared: &Arc<EngineShared>,
    progress: impl FnMut(FillProgress) -> ControlFlow<()>,
) -> Result<()> {
    // Those that are there: they may fork without end.
    let members: Vec<_> = shared.spaces().iter().filter(|space| is_foreign(space.id)).cloned().collect();
    Steps { shared }.pass(|| members.clone(), Bringing::Fill, progress).map(drop)
}

impl Adopted {
    fn steps(&self) -> Steps<'_> {
        Steps { shared: &self.shared }
    }

    /// Brings every page that is missing, in the process and in those that were forked from it, and those that are forked
    /// meanwhile; faults come first.
    ///
    /// `progress` is called on this thread at the start, after each step, and at the end; it may break it off. Pages that can't be
    /// had are counted, and left to their touch. A process that ends meanwhile is done.
    ///
    /// # Errors
    ///
    /// [`Error::WouldDeadlock`] on a thread of the engine that faults may wait for; [`Error::Shutdown`] after the end of the engine's
    /// threads.
    pub fn fill(&self, progress: impl FnMut(FillProgress) -> ControlFlow<()>) -> Result<()> {
        self.steps().pass(|| self.family.members(), Bringing::Fill, progress).map(drop)
    }

    /// Brings the pages of a working set, in the order in which they were faulted on, and with each what a fault on it brings
    /// along: wherever the vmap of that list is to be seen, in the process and those forked from it.
    ///
    /// # Errors
    ///
    /// [`Error::WorkingSet`] (`ESTALE`) for a set of none of the lists; otherwise as [`Adopted::fill`].
    pub fn replay(&self, set: &WorkingSet) -> Result<()> {
        let steps = self.steps();
        steps.refuse_engine_threads("replaying a working set")?;
        let mut refused = None;
        let mut fits = false;
        for member in self.family.members() {
            for area in steps.areas_of(member.id)? {
                let Some(core) = self.shared.vmaps.find(area.vmap) else { continue };
                if let Err(error) = set.check(core.nr_pages(), &core.identity()?) {
                    refused = Some(error);
                    continue;
                }
                fits = true;
                let pages = area.pgoff..area.pgoff + area.len / page_size() as u64;
                let page = PageSize::of_bytes(area.page_bytes());
                let windows = windows(set.pages(), &core.contents().list, pages, page, self.shared.fault_around);
                for window in windows {
                    let at = |pgoff: u64| (area.start + (pgoff - area.pgoff) * page_size() as u64) as usize;
                    let addrs = page.floor(at(window.start))..at(window.end);
                    let _ = steps.bring((member.id, page), addrs, Bringing::Fill, |_, _| ControlFlow::Continue(()))?;
                }
            }
        }
        match refused {
            Some(error) if !fits => Err(error),
            _ => Ok(()),
        }
    }

    /// Lets the process and those that were forked from it go: from here on they need no engine, and their areas are no longer
    /// counted. What is missing is brought first, or becomes SIGBUS.
    ///
    /// The registration of the areas ends. What they give up from here on (`MADV_DONTNEED`) is zeros, as in memory that nobody serves.
    /// Memory that is registered and lies in no area stays so: it is zeros if the process has no descriptor of its userfaultfd,
    /// else a touch of it waits for ever, as do what the userfaultfd reports of it and, if it reports forks, every fork. So adopt all
    /// that is registered, also what shall be zeros.
    ///
    /// # Errors
    ///
    /// As [`Adopted::fill`]; [`Error::Sys`] with `EAGAIN` when they fork or move memory without a pause; [`Error::NotPopulated`] when
    /// pages that are missing can't be made a SIGBUS: before Linux 6.6, or as their address space is changed without a pause for ten
    /// seconds. Those that are not let go by then are still served.
    pub fn release(&self, how: Release) -> Result<()> {
        for _ in 0..RELEASE_ROUNDS {
            if self.is_gone() {
                return Ok(());
            }
            if how == Release::Fill {
                self.fill(|_| ControlFlow::Continue(()))?;
            }
            // What could not be had must not be zeros.
            let mut last = FillProgress::default();
            let members = self.family.members();
            let note = |so_far| {
                last = so_far;
                ControlFlow::Continue(())
            };
            let refused = self.steps().pass(|| members.clone(), Bringing::Poison, note)?;
            if last.pages_failed > 0 {
                let why = "it can't be made a SIGBUS there".into();
                let (missing, wanted) = (last.pages_failed, last.pages_total);
                return Err(Error::NotPopulated { pgoff: 0, why, missing, wanted });
            }
            for (space, moves) in refused {
                // If it moved memory meanwhile, or forked, once more.
                call(|reply| self.shared.keeper.send(Request::Release { space, moves, reply }))
                    .ok_or(Error::Shutdown)?;
            }
        }
        Err(Error::sys("letting processes go that fork or move memory without a pause")(Errno::EAGAIN))
    }
}

/// What goes through the pages of processes, step by step.
struct Steps<'a> {
    shared: &'a Arc<EngineShared>,
}

impl Steps<'_> {
    /// Attends to all pages of all members, also those that come meanwhile; answers with them, and how often each had moved
    /// memory before.
    fn pass(
        &self,
        members: impl Fn() -> Vec<Arc<SpaceCounters>>,
        how: Bringing,
        mut progress: impl FnMut(FillProgress) -> ControlFlow<()>,
    ) -> Result<HashMap<SpaceId, u64>> {
        self.refuse_engine_threads("bringing pages of a process")?;
        let mut so_far = FillProgress { pages_done: 0, pages_total: 0, pages_failed: 0 };
        let mut passed = HashMap::new();
        while let Some(member) = members().into_iter().find(|member| !passed.contains_key(&member.id)) {
            passed.insert(member.id, self.moves_of(member.id)?);
            let areas = self.areas_of(member.id)?;
            so_far.pages_total += areas.iter().map(AreaRecord::nr_pages).sum::<u64>();
            if progress(so_far).is_break() {
                return Ok(passed);
            }
            for area in areas {
                let before = so_far.pages_done;
                let addrs = area.start as usize..(area.start + area.len) as usize;
                let page = PageSize::of_bytes(area.page_bytes());
                let mut step = |at: usize, failed: u64| {
                    so_far.pages_done = before + ((at - area.start as usize) / page_size()) as u64;
                    so_far.pages_failed += failed;
                    progress(so_far)
                };
                if self.bring((member.id, page), addrs, how, &mut step)?.is_break() {
                    return Ok(passed);
                }
            }
        }
        Ok(passed)
    }

    /// Attends to the pages of a range, whose process may change it meanwhile, and tells `step` how far it has come.
    fn bring(
        &self,
        (space, page): (SpaceId, PageSize),
        addrs: Range<usize>,
        how: Bringing,
        mut step: impl FnMut(usize, u64) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>> {
        let mut at = addrs.start;
        let mut warmed = None;
        let mut patience = Patience::new();
        while at < addrs.end {
            let bring = Bring { space, addrs: at..addrs.end, how };
            let Brought { at: reached, mut failed, halt, .. } =
                self.shared.handler.ask(|reply| Command::Bring { bring, reply })?;
            if reached > at {
                patience = Patience::new();
            }
            at = match halt {
                Halt::More => reached,
                Halt::End | Halt::Gone => addrs.end,
                Halt::Changing if patience.wait().is_ok() => reached,
                // Changed without a pause for ten seconds, or without memory, or not listened to: so it goes on.
                Halt::Changing => {
                    failed += ((addrs.end - reached) / page_size()) as u64;
                    addrs.end
                }
                Halt::Blocked(core, pgoff) => {
                    let again = warmed.replace((core.id, pgoff)) == Some((core.id, pgoff));
                    if self.read_for(core, pgoff, again).is_ok() {
                        reached
                    } else {
                        failed += page.base_pages();
                        page.floor(reached) + page.bytes()
                    }
                }
            };
            if step(at.min(addrs.end), failed).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// How often a process has moved memory.
    fn moves_of(&self, space: SpaceId) -> Result<u64> {
        let bring = Bring { space, addrs: 0..0, how: Bringing::Poison };
        Ok(self.shared.handler.ask(|reply| Command::Bring { bring, reply })?.moves)
    }

    /// Reads pages that could not be had at once: files into the page cache, whatever else, and what was not there `again`, into
    /// the vmap.
    fn read_for(&self, core: Arc<VmapCore>, pgoff: u64, again: bool) -> Result<()> {
        let list = core.contents().list;
        let extent = list.extent_at(pgoff);
        let end = extent.map_or(pgoff + 1, |extent| (extent.first_page + extent.nr_pages).min(pgoff + READ_PAGES));
        if !again && extent.is_some_and(|extent| extent.kind == ExtentKind::File) {
            let mut buf = vec![0; (end - pgoff) as usize * page_size()];
            if list.read_pages(pgoff, &mut buf).is_ok() {
                return Ok(());
            }
        }
        let vmap = Vmap { core, shared: Arc::clone(self.shared) };
        vmap.bring_resident(pgoff..end).or_else(|_| vmap.bring_resident(pgoff..pgoff + 1))
    }

    fn areas_of(&self, space: SpaceId) -> Result<Vec<AreaRecord>> {
        let (view, outcome) = self.shared.handler.ask(|reply| Command::View { view: View::of(space), reply })?;
        outcome.map_err(Error::sys("mmap for a snapshot"))?;
        Ok(view.areas.to_vec())
    }

    fn refuse_engine_threads(&self, what: &'static str) -> Result<()> {
        match threads::current_role(self.shared.id) {
            Some(Role::Keeper) => Err(Error::WouldDeadlock { what, thread: "keeper" }),
            Some(Role::Worker) => Err(Error::WouldDeadlock { what, thread: "worker" }),
            _ => Ok(()),
        }
    }
}
