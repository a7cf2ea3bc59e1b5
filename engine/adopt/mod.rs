//! Serving the memory of other processes: they make a userfaultfd, register their memory, and hand it over.
//!
//! A VM monitor that resumes from a snapshot does that, and whoever restores a process lazily. What is registered there is
//! private memory, so pages are copied in and shared with nobody. The features of the userfaultfd are its maker's choice: what
//! it reports (forks, moves, unmaps, memory that is given up) is followed, and what it does not report is not known.

mod family;
mod steps;

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, RwLockReadGuard};
use std::time::Duration;

use nix::errno::Errno;

use crate::page::page_size;
use crate::process::ledger;
use crate::runtime::call::call;
use crate::runtime::callbacks;
use crate::runtime::command::NewForeign;
use crate::runtime::engine::Engine;
use crate::runtime::handles::Request;
use crate::runtime::huge;
use crate::runtime::readahead::Streams;
use crate::runtime::shared::EngineShared;
use crate::runtime::threads::{self, Role};
use crate::space::foreign::Foreign;
use crate::space::mmap_vec::MmapVec;
use crate::space::table::{Area, AreaTable, InsertError};
use crate::space::{Space, Target};
use crate::stats::{SpaceCounters, SpaceStats};
use crate::sys::{Features, Userfault};
use crate::vmap::Vmap;
use crate::vmap::core::{Contents, Opened, VmapCore};
use crate::vmap::page_size::PageSize;
use crate::{Error, Result};
pub(crate) use family::Family;
pub(crate) use steps::fill_all;

/// Forks that may be read before the keeper has attended to the first of them.
pub(crate) const FORKS_AHEAD: usize = 64;
/// The most areas of one process.
const AREAS_MAX: usize = 1 << 16;

/// Says which pages belong at a range of addresses of another process ([`Engine::adopt`]).
#[derive(Debug, Clone)]
pub struct AdoptedArea {
    addrs: Range<usize>,
    vmap: Vmap,
    pgoff: u64,
    page: PageSize,
}

impl AdoptedArea {
    /// Names the range and the page of the vmap that belongs at its start, in pages of the system. Pages past the end of the list
    /// are refused like its holes.
    pub fn new(addrs: Range<usize>, vmap: &Vmap, pgoff: u64) -> AdoptedArea {
        AdoptedArea { addrs, vmap: vmap.clone(), pgoff, page: PageSize::Base }
    }

    /// Sets the size of the pages of which the memory there consists; those of the system unless set.
    ///
    /// The range and the byte of the list at its start must be multiples of it. The vmap's own pages are those of the system. A huge page of
    /// which one byte can't be had is SIGBUS as a whole; what the last one has behind the end of the list is zeros, as in
    /// [vmaps of huge pages](crate::VmapBuilder::page_size). Where the memory consists of other pages than is said here, it is SIGBUS.
    #[must_use]
    pub fn page_size(mut self, page: PageSize) -> AdoptedArea {
        self.page = page;
        self
    }
}

/// Says what a touch of registered memory gets that lies in no area of an adopted process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Outside {
    /// SIGBUS: nobody has said which bytes belong there.
    #[default]
    Sigbus,
    /// Zeros, as in memory that nobody serves.
    Zeros,
}

/// Says what becomes of an adopted process that touches a page that can't be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Refusal {
    /// The touch is SIGBUS (UFFDIO_POISON, Linux 6.6). A system call that touches the page answers `EFAULT`, and the guest of a VM
    /// monitor is told of a hardware error, or the monitor ends.
    #[default]
    Sigbus,
    /// The process is killed (SIGKILL) by its pidfd. In processes that were forked from it the touch is SIGBUS: nothing is known
    /// by which to kill them.
    Kill,
}

/// Says what becomes of the pages that are missing when an adopted process is let go ([`Adopted::release`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Release {
    /// They are brought first; those that can't be had are SIGBUS.
    Fill,
    /// They are SIGBUS.
    Poison,
}

/// Settings of an adoption.
#[derive(Debug, Default)]
pub struct AdoptOptions {
    pidfd: Option<OwnedFd>,
    outside: Outside,
    refusal: Refusal,
}

impl AdoptOptions {
    /// Begins with the defaults.
    pub fn new() -> AdoptOptions {
        AdoptOptions::default()
    }

    /// Gives the process's pidfd, so that its exit is noticed at once; else, as exec always, within a tenth of a second.
    #[must_use]
    pub fn pidfd(mut self, pidfd: OwnedFd) -> AdoptOptions {
        self.pidfd = Some(pidfd);
        self
    }

    /// Sets what touches of registered memory outside every area get; SIGBUS unless set.
    #[must_use]
    pub fn outside(mut self, outside: Outside) -> AdoptOptions {
        self.outside = outside;
        self
    }

    /// Sets what becomes of a process that touches a page that can't be had; SIGBUS unless set.
    #[must_use]
    pub fn refusal(mut self, refusal: Refusal) -> AdoptOptions {
        self.refusal = refusal;
        self
    }
}

/// Watches an adopted process and those that were forked from it, brings their pages, and lets them go.
///
/// Dropping it changes nothing: they are served until they end, or the engine does.
pub struct Adopted {
    shared: Arc<EngineShared>,
    family: Arc<Family>,
    id: u64,
}

impl Engine {
    /// Serves the memory of another process, by the userfaultfd that it has made and handed over.
    ///
    /// The process has registered its memory for missing pages, or is about to; it is anonymous and private. A touch of a missing
    /// page gets a copy of what the vmap has for it by then: the page that the vmap's regions share, if there is one, else
    /// what the list says. [`EngineBuilder::fault_around`](crate::EngineBuilder::fault_around) holds there too.
    /// Each area counts in [`Vmap::refcount`], each inherited one again, and the deref callback comes after the last.
    ///
    /// What the userfaultfd reports is followed. After `UFFD_EVENT_REMOVE` (`MADV_DONTNEED`, `MADV_FREE`, `MADV_REMOVE`) a range is
    /// zeros; without that feature, pages that were given up get the list's bytes again. Forked children are served with
    /// `UFFD_FEATURE_EVENT_FORK` only, and else have zeros for what was missing: that is the maker's to know, as is a userfaultfd
    /// of which the process keeps no descriptor. Such a process sees zeros in place of missing pages if this one ends without
    /// [`Adopted::release`]; one that keeps its own waits for ever. After [`Engine::shutdown`] the engine's threads go on
    /// to refuse what is missing ([`Refusal`]), as long as this process lives.
    ///
    /// A userfaultfd is adopted once. Where threads of the process fork while others give memory up, the order in which it tells of both
    /// need not be that in which they happened (as of Linux 6.18): the child may have zeros for what was given up then.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for a descriptor that is no userfaultfd, or whose handshake was not made, for an empty range or one beyond the end
    /// of the address space, for more than 65,536 areas, for [`Refusal::Kill`] without a pidfd, for a vmap of another engine, one of huge
    /// pages, or one that is [`expandable`](crate::VmapBuilder::expandable), for a userfaultfd that is served already; [`Error::Misaligned`] for addresses and pages that are no multiples of the area's page size;
    /// [`Error::AddressTaken`] for ranges that overlap; [`Error::Unsupported`] with [`Refusal::Sigbus`] before Linux 6.6;
    /// [`Error::NotOwner`] in a forked child; [`Error::Shutdown`] after a shutdown; [`Error::WouldDeadlock`] when called while a thread of the
    /// engine drops what a page list kept alive; [`Error::Sys`] with `EMFILE` or `ENOMEM`, or with `EPERM` for a process that may not be
    /// killed from here. Nothing is changed then, but that the descriptor is
    /// closed.
    pub fn adopt(&self, uffd: OwnedFd, areas: &[AdoptedArea], options: AdoptOptions) -> Result<Adopted> {
        let shared = self.shared();
        if shared.is_child() {
            return Err(Error::NotOwner { what: "adopting a process" });
        }
        if threads::current_role(shared.id) == Some(Role::Keeper) {
            return Err(Error::WouldDeadlock { what: "adopting a process", thread: "keeper" });
        }
        let _attaching = shared.begin_attach().ok_or(Error::Shutdown)?;
        validate(shared, areas, &options)?;
        let number = uffd.as_raw_fd() as u64;
        let uffd = Userfault::foreign(uffd).map_err(|errno| not_taken(number, errno))?;
        let forks = uffd.features().map_err(Error::sys("the fdinfo of a userfaultfd"))?.contains(Features::EVENT_FORK);
        let uffd = Arc::new(ledger::lock().adopt(uffd));
        let counters = shared.new_foreign_counters();
        let mut foreign = Foreign::new(options.outside, options.refusal, forks);
        let counted = Counted::count(shared, areas)?;
        // No list is exchanged until the areas are served.
        let in_use = counted.in_use();
        let table = table_of(shared, areas, &mut foreign)?;
        counters.areas.store(table.len() as u64, std::sync::atomic::Ordering::Relaxed);
        let id = counters.id;
        let space = Space {
            id,
            parent: id,
            uffd: Some(uffd),
            masks: None,
            aside: None,
            foreign: Some(foreign),
            table,
            counters,
            unheard: Mutex::new(None),
        };
        let new = NewForeign { space, spares: spares(shared, if forks { FORKS_AHEAD } else { 0 })? };
        let family = Arc::new(Family::default());
        let taken = {
            let (family, pidfd) = (Arc::clone(&family), options.pidfd);
            call(|reply| shared.keeper.send(Request::Adopt { new, family, pidfd, reply }))
        };
        taken.unwrap_or(Err(Error::Shutdown))?;
        drop(in_use);
        counted.keep();
        Ok(Adopted { shared: Arc::clone(shared), family, id })
    }
}

impl Adopted {
    /// Returns the number by which the engine knows the process.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Describes the process and those that were forked from it, of which the engine was told, as long as they live.
    pub fn spaces(&self) -> Vec<SpaceStats> {
        self.family.members().iter().map(|member| member.snapshot()).collect()
    }

    /// Tells whether none of them lives any more, or all were let go.
    pub fn is_gone(&self) -> bool {
        self.family.members().is_empty()
    }

    /// Waits until none of them lives any more, `timeout` at the most; answers whether that is so.
    pub fn wait_gone(&self, timeout: Duration) -> bool {
        self.family.wait_gone(timeout)
    }
}

impl std::fmt::Debug for Adopted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Adopted").field("id", &self.id).field("spaces", &self.spaces()).finish_non_exhaustive()
    }
}

/// Counters for children that may be forked.
pub(crate) fn spares(shared: &EngineShared, nr: usize) -> Result<MmapVec<Arc<SpaceCounters>>> {
    let mut spares = MmapVec::new();
    for _ in 0..nr {
        let pushed = spares.try_push(shared.new_foreign_counters());
        pushed.map_err(|(_, errno)| Error::sys("mmap for the children of a process")(errno))?;
    }
    Ok(spares)
}

/// Says why a descriptor was not taken.
fn not_taken(number: u64, errno: Errno) -> Error {
    let what = "the descriptor of the userfaultfd";
    match errno {
        Errno::EBADF => Error::Invalid { what, value: number, rule: "it must be a userfaultfd" },
        Errno::EPROTO => {
            Error::Invalid { what, value: number, rule: "its maker must have made the handshake (UFFDIO_API)" }
        }
        errno => Error::sys("taking a userfaultfd over")(errno),
    }
}

fn validate(shared: &EngineShared, areas: &[AdoptedArea], options: &AdoptOptions) -> Result<()> {
    let invalid = |what, value, rule| Err(Error::Invalid { what, value, rule });
    if areas.len() > AREAS_MAX {
        return invalid("the number of areas", areas.len() as u64, "there may be at most 65536");
    }
    match options {
        AdoptOptions { refusal: Refusal::Kill, pidfd: None, .. } => {
            return invalid(
                "the number of pidfds",
                0,
                "a process is killed by its pidfd: AdoptOptions::pidfd gives it",
            );
        }
        AdoptOptions { refusal: Refusal::Sigbus, .. } if !shared.poisons() => {
            return Err(Error::Unsupported {
                what: "adopting a process with Refusal::Sigbus",
                missing: Features::POISON,
                why: "a page that can't be had could not be made a SIGBUS there: Refusal::Kill ends the process instead",
            });
        }
        _ => {}
    }
    for AdoptedArea { addrs, vmap, pgoff, page } in areas {
        if vmap.shared.id != shared.id {
            return invalid("the id of an area's vmap", vmap.core.id, "it must be one of this engine");
        }
        if vmap.core.page().is_huge() {
            let bytes = vmap.core.page().bytes() as u64;
            return invalid(
                "the size of the vmap's pages in bytes",
                bytes,
                "what is copied elsewhere is a vmap of base pages",
            );
        }
        if vmap.core.expandable {
            return invalid("the vmap's capacity in pages", vmap.core.nr_pages(), "it can't be expandable");
        }
        if addrs.start >= addrs.end || i64::try_from(addrs.end).is_err() {
            return invalid(
                "the start of an area",
                addrs.start as u64,
                "it must lie below its end, and that in the address space",
            );
        }
        page.check_multiple("the address of an area", addrs.start as u64, 1)?;
        page.check_multiple("the end of an area", addrs.end as u64, 1)?;
        page.check_multiple("pgoff", *pgoff, page_size())?;
        if pgoff.checked_add((addrs.len() / page_size()) as u64).is_none() {
            return Err(Error::Overflow { what: "the pages of an area", base: *pgoff, len: addrs.len() as u64 });
        }
    }
    Ok(())
}

/// The table of the areas; makes what serving them takes.
fn table_of(shared: &EngineShared, areas: &[AdoptedArea], foreign: &mut Foreign) -> Result<AreaTable<Target>> {
    let no_memory = Error::sys("mmap for the areas of a process");
    let mut table = AreaTable::new();
    let mut entered = Vec::with_capacity(areas.len());
    for AdoptedArea { addrs, vmap, pgoff, page } in areas {
        let core = &vmap.core;
        let Contents { list, window, generation, kept_since } = core.contents();
        if let Some(window) = &window {
            window.make_readable(&shared.opener, &core.object)?;
        }
        huge::provide(shared, *page)?;
        let region = shared.new_region_id();
        let target = Target {
            vmap: Arc::clone(core),
            list,
            window,
            generation,
            kept_since,
            page: *page,
            inherit: true,
            streams: Streams::default(),
        };
        entered.push((region, *pgoff..*pgoff + (addrs.len() / page_size()) as u64));
        let (start, end) = (addrs.start, addrs.end);
        let area = Area { start, end, pgoff: *pgoff, region, writable: true, leaving: false, target };
        table.insert(area).map_err(|error| match error {
            InsertError::Overlap(_) => Error::AddressTaken { addr: start, len: end - start },
            InsertError::NoMemory(_, errno) => no_memory(errno),
        })?;
    }
    foreign.enter(entered.into_iter()).map_err(&no_memory)?;
    // For the splits of the first events.
    table.try_reserve(areas.len()).map_err(&no_memory)?;
    Ok(table)
}

/// Areas that are counted, of vmaps in the order of their ids: taken back when dropped, unless they are kept.
struct Counted<'a> {
    shared: &'a EngineShared,
    vmaps: Vec<(Arc<VmapCore>, CountedOf)>,
}

struct CountedOf {
    areas: usize,
    /// One of them is the first of its vmap.
    first: bool,
}

impl<'a> Counted<'a> {
    fn count(shared: &'a EngineShared, areas: &[AdoptedArea]) -> Result<Counted<'a>> {
        let mut by_vmap: BTreeMap<u64, (&Arc<VmapCore>, usize)> = BTreeMap::new();
        for AdoptedArea { vmap, .. } in areas {
            by_vmap.entry(vmap.core.id).or_insert((&vmap.core, 0)).1 += 1;
        }
        loop {
            let mut counted = Counted { shared, vmaps: Vec::with_capacity(by_vmap.len()) };
            let waited_for = by_vmap.values().find_map(|&(core, areas)| counted.add(core, areas).transpose());
            match waited_for.transpose()? {
                None => return Ok(counted),
                Some(core) => {
                    // Whoever it waits for may attach to one of the others: they are taken back before.
                    drop(counted);
                    core.wait_to_open(callbacks::caller(shared, core))?;
                }
            }
        }
    }

    /// Counts areas of a vmap; answers with it if its callback has to be waited for.
    fn add<'c>(&mut self, core: &'c Arc<VmapCore>, areas: usize) -> Result<Option<&'c Arc<VmapCore>>> {
        match core.try_open(callbacks::caller(self.shared, core), false)? {
            Opened::Later => Ok(Some(core)),
            Opened::Counted { first } => {
                (1..areas).for_each(|_| core.open_again());
                self.vmaps.push((Arc::clone(core), CountedOf { areas, first }));
                Ok(None)
            }
        }
    }

    fn in_use(&self) -> Vec<RwLockReadGuard<'_, ()>> {
        self.vmaps.iter().map(|(core, _)| core.in_use.read().unwrap_or_else(PoisonError::into_inner)).collect()
    }

    fn keep(mut self) {
        self.settle(|_, _| {});
    }

    fn settle(&mut self, each: impl Fn(&Arc<VmapCore>, &CountedOf)) {
        for (core, counted) in std::mem::take(&mut self.vmaps) {
            each(&core, &counted);
            if counted.first && core.transition_done() {
                self.shared.keeper.send(Request::RetryDeferred);
            }
        }
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.settle(|core, counted| {
            (1..counted.areas).for_each(|_| core.take_back(false));
            core.take_back(counted.first);
        });
    }
}
