//! Attaching: from options to a mapped, registered, counted region, or to nothing at all.

use std::cell::Cell;
use std::ops::Range;
use std::sync::Arc;

use nix::errno::Errno;

use super::Region;
use crate::fork::link::Local;
use crate::fork::wire::{Ask, Reply};
use crate::page::{is_aligned, page_size, pages_for};
use crate::process::mapping::{Mapping, Placement};
use crate::process::{depth, gate, mask};
use crate::runtime::callbacks;
use crate::runtime::handles::Request;
use crate::runtime::insert::{Inserted, NewArea, insert};
use crate::runtime::patience::Patience;
use crate::runtime::shared::EngineShared;
use crate::runtime::stripes::{STRIPES_MAX, Stripes};
use crate::space::{AreaRecord, OWN_SPACE, SpaceId};
use crate::stats::add;
use crate::sys::Userfault;
use crate::trace::tell;
use crate::vmap::Vmap;
use crate::vmap::core::VmapCore;
use crate::{Error, Result};

/// Whether writes reach the other processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Sharing {
    /// They do (MAP_SHARED): the only way in which a vmap can be attached.
    #[default]
    Shared,
    /// They would not (MAP_PRIVATE). Refused with `EINVAL`, as `mmap_kiobuf` refuses copy-on-write maps; named so that
    /// code written for `mmap` gets its answer rather than something else.
    Private,
}

/// Says what part of a vmap to attach, where, and how ([`Vmap::attach`](crate::Vmap::attach)).
///
/// The default is all of it, read-write, where the kernel likes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub struct AttachOptions {
    len_bytes: Option<usize>,
    pgoff: u64,
    addr: Option<usize>,
    writable: bool,
    sharing: Sharing,
    exact: bool,
    inherit: bool,
    stripes: usize,
}

impl Default for AttachOptions {
    fn default() -> Self {
        AttachOptions {
            len_bytes: None,
            pgoff: 0,
            addr: None,
            writable: true,
            sharing: Sharing::Shared,
            exact: false,
            inherit: true,
            stripes: 1,
        }
    }
}

impl AttachOptions {
    /// Begins with the default.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the length in bytes, rounded up to whole pages; to the end of the list unless set. It may reach past the
    /// end of the list: touches there are SIGBUS.
    pub fn len_bytes(mut self, len: usize) -> Self {
        self.len_bytes = Some(len);
        self
    }

    /// Sets the page of the list at which the region begins; 0 unless set.
    pub fn pgoff(mut self, pgoff: u64) -> Self {
        self.pgoff = pgoff;
        self
    }

    /// Sets the address, a multiple of the page size. What is mapped there is never replaced.
    pub fn at(mut self, addr: usize) -> Self {
        self.addr = Some(addr);
        self
    }

    /// Maps the region read-only: a write is SIGSEGV.
    pub fn read_only(mut self) -> Self {
        self.writable = false;
        self
    }

    /// Sets whether writes reach the other processes.
    pub fn sharing(mut self, sharing: Sharing) -> Self {
        self.sharing = sharing;
        self
    }

    /// Refuses a region that is longer than the list (`ENXIO`, as `vm_map_pages` does), rather than have its tail be
    /// SIGBUS.
    pub fn exact(mut self) -> Self {
        self.exact = true;
        self
    }

    /// Sets whether forked children get the region too; they do unless told otherwise. A child that does not has
    /// nothing mapped there.
    pub fn inherit(mut self, inherit: bool) -> Self {
        self.inherit = inherit;
        self
    }

    /// Sets in how many parts, equal and side by side, the region is served, from 1 to [`STRIPES_MAX`]; 1 unless set.
    ///
    /// Threads that fault on several processors at once meet in the kernel's locks of the one userfaultfd that a region has, and
    /// two of them bring little more than one. With stripes each part has a userfaultfd of its own, and threads that keep
    /// to a part each are served as if they were processes (see [`EngineBuilder::handlers`](crate::EngineBuilder::handlers)).
    /// Threads that all touch everything gain nothing.
    ///
    /// Every promise of a region holds, but for the kernel it is as many mappings as stripes, and it counts as many
    /// ([`Vmap::refcount`]), as one that was cut does. One `mremap` must stay within a stripe (`EFAULT` else, as for every two
    /// mappings), a stripe can't be grown into the next, and a transparent huge page can't lie over a border
    /// ([`Region::collapse`]). A stripe costs a descriptor, which is kept for later regions, and a mapping
    /// (`vm.max_map_count`). A forked child has the same areas with one userfaultfd. An attach in a child, and
    /// one with in-thread delivery, where nobody waits at a userfaultfd, can't be in stripes.
    pub fn stripes(mut self, stripes: usize) -> Self {
        self.stripes = stripes;
        self
    }
}

impl Vmap {
    /// Maps the vmap, or a part of it, into this process (`mmap_kiobuf`).
    ///
    /// Waits while a deref callback of this vmap is due or running, unless called from it.
    ///
    /// # Errors
    ///
    /// [`Error::Misaligned`] for a length, an offset or an address that is not whole huge pages, where the vmap has those;
    /// [`Error::PrivateRefused`] for a private mapping; [`Error::Invalid`] for a length of zero, a misaligned address,
    /// an offset that does not fit, or stripes that are none, too many, more than pages, or not for this delivery;
    /// [`Error::NotOwner`] for stripes in a forked child; [`Error::OutsideList`] (`ENXIO`) for an exact attach that is too long;
    /// [`Error::AddressTaken`]; [`Error::MemoryLock`] when the vmap is to be locked in memory, or all memory of the process
    /// is (`mlockall`), and the kernel refuses that; [`Error::Open`] when there is no userfaultfd for
    /// a stripe; [`Error::Shutdown`]; [`Error::NotInherited`]; [`Error::Sys`] with
    /// `ENOMEM` for want of address space or mappings, or with `EAGAIN` when other threads unmap, move or advise on areas
    /// without a pause for ten seconds. Mappings, count and registrations are then as before.
    pub fn attach(&self, options: &AttachOptions) -> Result<Region> {
        attach(&self.core, &self.shared, options, None)
    }

    /// As [`Vmap::attach`], and calls `transition` with whether this is the first area, before any other attach of
    /// this vmap can be counted: what it changes is changed together with the count.
    ///
    /// In a forked child, where the count lives in another process, other processes' attaches are not held off.
    ///
    /// # Errors
    ///
    /// As [`Vmap::attach`]; [`Error::WouldDeadlock`] for an attach to the same vmap from within `transition`.
    pub fn attach_with(&self, options: &AttachOptions, transition: impl FnOnce(bool)) -> Result<Region> {
        attach(&self.core, &self.shared, options, Some(Box::new(transition)))
    }
}

/// What is to be mapped, validated.
struct Plan {
    len: usize,
    offset: u64,
    placement: Placement,
    stripes: usize,
    /// The smallest part, in bytes.
    unit: usize,
}

impl Plan {
    fn new(options: &AttachOptions, core: &VmapCore) -> Result<Plan> {
        let (page, size) = (page_size() as u64, core.page());
        // What follows the list's end in its last huge page belongs to it.
        let nr_pages = size.whole(core.nr_pages()).unwrap_or(core.nr_pages());
        if options.sharing == Sharing::Private {
            return Err(Error::PrivateRefused);
        }
        let wanted = match options.len_bytes {
            Some(len) => len as u64,
            None => nr_pages.saturating_sub(options.pgoff).saturating_mul(page),
        };
        let invalid = |what, value, rule| Error::Invalid { what, value, rule };
        if wanted == 0 {
            return Err(invalid("the length of a region in bytes", 0, "it must not be zero"));
        }
        let too_far = invalid("pgoff", options.pgoff, "pgoff plus length must be less than 2^63 bytes");
        let len_pages = pages_for(wanted);
        let end = len_pages.and_then(|pages| options.pgoff.checked_add(pages));
        let (Some(len_pages), Some(_)) = (len_pages, end.filter(|&end| core.object.offset_of(end).is_ok())) else {
            return Err(too_far);
        };
        if options.exact && options.pgoff + len_pages > nr_pages {
            return Err(Error::OutsideList { pgoff: options.pgoff, len_pages, nr_pages: core.nr_pages() });
        }
        let placement = match options.addr {
            None => Placement::Anywhere,
            Some(addr) if addr == 0 || !is_aligned(addr) => {
                return Err(invalid("the address of a region", addr as u64, "it must be a multiple of the page size"));
            }
            Some(addr) => Placement::At(addr),
        };
        if size.is_huge() {
            size.check_multiple("pgoff", options.pgoff, page_size())?;
            size.check_multiple("the length of a region in bytes", wanted, 1)?;
            size.check_multiple("the address of a region", options.addr.unwrap_or(0) as u64, 1)?;
        }
        let offset = core.object.offset_of(options.pgoff)?;
        let (len, unit, stripes) = ((len_pages * page) as usize, size.bytes(), options.stripes);
        let refused = |rule| Err(invalid("the stripes of a region", stripes as u64, rule));
        if !(1..=STRIPES_MAX).contains(&stripes) {
            return refused("there must be from 1 to 64");
        }
        if stripes > 1 && stripes > len / unit {
            return refused("there can't be more than the region has pages");
        }
        Ok(Plan { len, offset, placement, stripes, unit })
    }

    /// The bytes of the region that a stripe is.
    fn stripe(&self, which: usize) -> Range<usize> {
        let border = |which| self.len / self.unit * which / self.stripes * self.unit;
        border(which)..border(which + 1)
    }
}

/// The caller's closure of an `attach_with`.
type Transition<'a> = Box<dyn FnOnce(bool) + 'a>;

/// Attaches, all or nothing. The count is the last step but the table's; each step undoes itself when a later fails.
fn attach(
    core: &Arc<VmapCore>,
    shared: &Arc<EngineShared>,
    options: &AttachOptions,
    transition: Option<Transition<'_>>,
) -> Result<Region> {
    // Until the end: what is counted here may have to be called back for.
    let _attaching = shared.begin_attach().ok_or(Error::Shutdown)?;
    let plan = Plan::new(options, core)?;
    if plan.stripes > 1 && shared.delivers_in_thread() {
        let rule = "with in-thread delivery threads bring their own pages: there must be 1";
        return Err(Error::Invalid { what: "the stripes of a region", value: plan.stripes as u64, rule });
    }
    if core.read_only && options.writable {
        return Err(Error::sys("attaching for writing what may be read only")(Errno::EACCES));
    }
    let local = shared.local();
    let uffd = match &*local {
        Local::Owner { uffd } | Local::Child { uffd, .. } => uffd,
        Local::Lost { why } => return Err(Error::NotInherited { why: why.clone() }),
    };
    let stripes = match (&*local, plan.stripes) {
        (_, 1) => None,
        (Local::Owner { .. }, nr) => Some(Stripes::take(shared, nr)?),
        _ => return Err(Error::NotOwner { what: "attaching in stripes" }),
    };
    let mapping = {
        // From mmap to MADV_DONTFORK, no fork: a child must not get the mapping.
        let _gate = gate();
        core.object.map(plan.len, plan.offset, plan.placement)?
    };
    // Registered, it would be taken for what the hidden area before it has grown by.
    mapping.set_apart()?;
    let part = |(which, (space, uffd))| {
        let Range { start, end } = plan.stripe(which);
        Part { space, uffd, start: mapping.addr() + start, end: mapping.addr() + end }
    };
    let stripes_or_own = match &stripes {
        None => vec![(OWN_SPACE, &***uffd)],
        Some(stripes) => stripes.as_slice().iter().map(|stripe| (stripe.space, &**stripe.uffd)).collect(),
    };
    let parts: Vec<_> = stripes_or_own.into_iter().enumerate().map(part).collect();
    let registration = Registration { parts: &parts, mapping: &mapping, served: Cell::new(0) };
    if !core.read_only {
        // The kernel registers no mapping of a file that can't be written to. Every page of it is there.
        for part in &parts {
            let registered = core.register(part.uffd, part.start, part.end - part.start);
            registered.map_err(Error::sys("UFFDIO_REGISTER of a region"))?;
        }
    }
    // Registered and still hidden: even a kernel that brought pages for it could not bring zeros.
    let locked = core.lock(&mapping)?;
    let downgraded = core.residency.is_downgraded(locked);
    let id = shared.new_region_id();
    let first = match &*local {
        Local::Child { lifeline, .. } => {
            let record = AreaRecord {
                start: mapping.addr() as u64,
                len: mapping.len() as u64,
                pgoff: options.pgoff,
                region: id,
                vmap: core.id,
                flags: AreaRecord::flags(options.writable, options.inherit)
                    | (AreaRecord::UNLOCKED * u64::from(downgraded)),
            };
            let mut patience = Patience::new();
            let first = loop {
                let answer = {
                    let _gate = gate();
                    mask::settle();
                    lifeline.ask(Ask::Attach(record), None)?
                };
                match answer {
                    (Reply::Attached { first }, _) => break first,
                    (Reply::Later, _) => patience.wait()?,
                    _ => return Err(Error::sys("the answer to an attach")(Errno::EPROTO)),
                }
            };
            registration.counted();
            registration.reveal(options.writable)?;
            if let Some(transition) = transition {
                transition(first);
            }
            first
        }
        _ => {
            let first = count_and_insert(core, shared, options, &registration, id, transition)?;
            add(&shared.counters.lock_downgrades, downgraded.into());
            first
        }
    };
    drop(registration);
    drop(parts);
    let region = Region {
        core: Arc::clone(core),
        shared: Arc::clone(shared),
        id,
        addr: mapping.addr(),
        len: mapping.len(),
        pgoff: options.pgoff,
        writable: options.writable,
        inherit: options.inherit && !core.read_only,
        first,
        locked,
        depth: depth(),
        _stripes: stripes,
    };
    mapping.release();
    tell!(
        DEBUG,
        "kiomap::region",
        "attached",
        engine = shared.id,
        vmap = core.id,
        region = id,
        addr = region.addr,
        len = region.len,
        pgoff = region.pgoff,
        first = first
    );
    if downgraded {
        tell!(WARN, "kiomap::region", "is not locked in memory", engine = shared.id, vmap = core.id, region = id);
    }
    Ok(region)
}

/// A part of a mapping that is served by a userfaultfd: all of it, or a stripe.
struct Part<'a> {
    space: SpaceId,
    uffd: &'a Userfault,
    start: usize,
    end: usize,
}

/// A mapping that is registered, and perhaps not served.
///
/// Unmapping it would wait for the fault-handling thread to read of it, which may have ended by the time when an attach
/// finds that out. So it is taken out first, and hidden before that: what is not registered would be zeros.
struct Registration<'a> {
    parts: &'a [Part<'a>],
    mapping: &'a Mapping,
    /// Parts that are areas in a table: their ends are to be reported.
    served: Cell<usize>,
}

impl Registration<'_> {
    /// The engine serves one part more.
    fn counted(&self) {
        self.served.set(self.served.get() + 1);
    }

    /// The engine serves all of it: only now may it be touched. A thread that touched it before, by a pointer into what was
    /// there earlier, would be taken for one that touches what nobody knows.
    fn reveal(&self, writable: bool) -> Result<()> {
        self.mapping.join()?;
        self.mapping.reveal(writable)
    }
}

impl Drop for Registration<'_> {
    fn drop(&mut self) {
        // In a child forked meanwhile there is no mapping, and the descriptor is nobody's.
        let unserved = self.parts.get(self.served.get()..).unwrap_or_default();
        if !unserved.is_empty() && self.mapping.hide().is_ok() {
            for part in unserved {
                let _ = part.uffd.unregister(part.start, part.end - part.start);
            }
        }
    }
}

/// Ends a transition even if its closure panics.
struct TransitionGuard<'a>(&'a VmapCore, &'a EngineShared);

impl Drop for TransitionGuard<'_> {
    fn drop(&mut self) {
        if self.0.transition_done() {
            self.1.keeper.send(Request::RetryDeferred);
        }
    }
}

/// In the engine's process: counts the area, has it served, and runs the closure.
fn count_and_insert(
    core: &Arc<VmapCore>,
    shared: &Arc<EngineShared>,
    options: &AttachOptions,
    registration: &Registration<'_>,
    region: u64,
    transition: Option<Transition<'_>>,
) -> Result<bool> {
    let first = core.open(callbacks::caller(shared, core), transition.is_some())?;
    let _transition = (first || transition.is_some()).then(|| TransitionGuard(core, shared));
    for (which, part) in registration.parts.iter().enumerate() {
        if which > 0 {
            core.open_again();
        }
        let area = NewArea {
            start: part.start,
            end: part.end,
            pgoff: options.pgoff + ((part.start - registration.mapping.addr()) / page_size()) as u64,
            region,
            writable: options.writable,
            inherit: options.inherit,
        };
        if let Err(error) = insert_patiently(shared, part.space, core, area) {
            core.take_back(first && which == 0);
            return Err(error);
        }
        registration.counted();
    }
    registration.reveal(options.writable)?;
    if let Some(transition) = transition {
        transition(first);
    }
    Ok(first)
}

/// Has a counted area of the engine's process served, as soon as its address space does not change.
fn insert_patiently(shared: &EngineShared, space: SpaceId, core: &Arc<VmapCore>, area: NewArea) -> Result<()> {
    let mut patience = Patience::new();
    loop {
        match insert(shared, space, core, area)? {
            Inserted::Served => return Ok(()),
            Inserted::Later => patience.wait()?,
        }
    }
}
