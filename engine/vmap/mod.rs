//! The noun `Vmap`: one page list published as shared memory, with its count of attached areas and its deref callback.

mod claim;
pub(crate) mod core;
pub(crate) mod failure;
pub(crate) mod fetch;
pub(crate) mod fill;
mod fill_huge;
pub(crate) mod fill_read;
pub(crate) mod object;
pub(crate) mod page_size;
pub(crate) mod readable;
pub(crate) mod registry;
pub(crate) mod residency;
mod retry;
pub(crate) mod window;

use std::any::Any;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLockReadGuard, RwLockWriteGuard};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::uio::{pread, pwrite};
use sha2::{Digest, Sha256};

use crate::fork::link::Local;
use crate::fork::wire::{Ask, Reply};
use crate::inthread::refuse_blocking;
use crate::kiobuf::{ExtentKind, Kiobuf};
use crate::page::page_size;
use crate::runtime::command::{Changing, Command};
use crate::runtime::patience::Patience;
use crate::runtime::shared::EngineShared;
use crate::runtime::threads::{self, Role};
use crate::stats::VmapStats;
use crate::sys::Features;
use crate::trace::tell;
use crate::working_set::recorder::Recorder;
use crate::working_set::{Identity, WorkingSet};
use crate::{Error, Result};
use claim::Claim;
use core::{Contents, DerefFn, Exchange, VmapCore};
use failure::{FailedFn, FailurePolicy, Failures, ReadFailed};
use fetch::{Fetcher, made_from, not_brought};
use object::{Backing, Object};
use page_size::PageSize;
use residency::Residency;
use window::{Window, is_resident};

/// Shares a page list with every process that attaches it (`struct kiobuf_vmap`).
///
/// The backing object is a memfd of exactly the list's pages: a page is taken from the list when it is first touched
/// anywhere, and from then on every process sees the same page. A list that is a memfd can be that object itself
/// ([`Backing`]). A clone is another handle to the same vmap; the vmap
/// lives as long as a handle or a region does.
#[derive(Clone)]
pub struct Vmap {
    pub(crate) core: Arc<VmapCore>,
    pub(crate) shared: Arc<EngineShared>,
}

/// How much [`Vmap::revoke`] takes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Revoke {
    /// Pages that are resident stay; every other page is SIGBUS from now on, as after `unmap_kiobuf`.
    Soft,
    /// Resident pages go too: every touch is SIGBUS from now on. What was written to them is lost.
    Hard,
}

/// Settings of a vmap that is to be published ([`Engine::vmap_builder`](crate::Engine::vmap_builder)).
pub struct VmapBuilder {
    shared: Arc<EngineShared>,
    list: Kiobuf,
    on_deref: Option<DerefFn>,
    user_data: Option<Box<dyn Any + Send + Sync>>,
    expandable: bool,
    residency: Residency,
    backing: Backing,
    minor_faults: bool,
    page: PageSize,
    records: bool,
    name: Option<Vec<u8>>,
    failure_policy: FailurePolicy,
    on_read_failed: Option<FailedFn>,
}

impl VmapBuilder {
    pub(crate) fn new(shared: Arc<EngineShared>, list: Kiobuf) -> VmapBuilder {
        VmapBuilder {
            shared,
            list,
            on_deref: None,
            user_data: None,
            expandable: false,
            residency: Residency::default(),
            backing: Backing::default(),
            minor_faults: false,
            page: PageSize::default(),
            records: false,
            name: None,
            failure_policy: FailurePolicy::default(),
            on_read_failed: None,
        }
    }

    /// Sets the deref callback: called each time the last attached area is gone, in any process, once.
    ///
    /// It runs on a thread of its own, outside every lock, after the area was unmapped; it may attach, detach, query
    /// or drop anything. Other threads' attaches to this vmap wait until it has returned. One that panics is caught
    /// and counted. It must not wait for a thread that attaches to the same vmap.
    #[must_use]
    pub fn on_deref(mut self, callback: impl FnMut(&Vmap) + Send + 'static) -> Self {
        self.on_deref = Some(with_handle(&self.shared, callback));
        self
    }

    /// Sets how often a read that fails is tried again, and how long a touch waits for its page; three tries and 30 seconds unless
    /// set ([`FailurePolicy`]).
    ///
    /// It is for what is read when it is touched: files that are not cached, page sources.
    #[must_use]
    pub fn failure_policy(mut self, policy: FailurePolicy) -> Self {
        self.failure_policy = policy;
        self
    }

    /// Sets a callback that hears of pages that could not be read, after the tries are used up or the deadline has passed, when
    /// touches of them are SIGBUS. [`Vmap::retry`] asks for them again.
    ///
    /// It runs on the thread of the deref callbacks, outside every lock, once for each read that was given up, and may do what these
    /// may. If more than 1024 reports wait for it, further ones are only counted ([`ReadFailed::unreported`]).
    #[must_use]
    pub fn on_read_failed(mut self, mut callback: impl FnMut(&Vmap, ReadFailed) + Send + 'static) -> Self {
        let shared = Arc::clone(&self.shared);
        self.on_read_failed = Some(Box::new(move |core, report| {
            callback(&Vmap { core: Arc::clone(core), shared: Arc::clone(&shared) }, report);
        }));
        self
    }

    /// Attaches a value of the caller's to the vmap (`private_data`), to be had from [`Vmap::user_data`].
    #[must_use]
    pub fn user_data<T: Any + Send + Sync>(mut self, value: T) -> Self {
        self.user_data = Some(Box::new(value));
        self
    }

    /// Allows [`Vmap::expand`]. The backing object is then not sealed against growing.
    #[must_use]
    pub fn expandable(mut self) -> Self {
        self.expandable = true;
        self
    }

    /// Sets whether pages may be swapped out while a process has them mapped; they may unless set
    /// ([`Residency::Swappable`]).
    ///
    /// It holds for every mapping of the vmap in every process: each attach, and each forked child's areas, is locked anew.
    /// What the application locks or unlocks itself (`mlock`, `munlock`, `mlockall`) stays as it says in that process.
    #[must_use]
    pub fn residency(mut self, residency: Residency) -> Self {
        self.residency = residency;
        self
    }

    /// Sets whether the pages of the list are shown themselves: where that is possible unless set
    /// ([`Backing::SharedIfPossible`]). It is for a list that is one memfd to its end ([`Kiobuf::map_memfd`] has the
    /// conditions), of a vmap that is not [`expandable`](VmapBuilder::expandable), if no other vmap of this process shows
    /// that memfd itself.
    #[must_use]
    pub fn backing(mut self, backing: Backing) -> Self {
        self.backing = backing;
        self
    }

    /// Has the engine map the pages that a memfd holds, many at once, where a vmap shows it itself ([`Backing::Shared`], which
    /// this asks for too). Unless set, the kernel maps them without the engine.
    ///
    /// A region's touch of a page that is there and not mapped, a *minor fault*, is then answered as that of a missing one: with a
    /// window of pages, which grows where a region is walked through ([`FaultAround`](crate::FaultAround)). They are mapped for
    /// writing too. So a walk that *writes* takes a fault for each window instead of each page; the kernel maps several pages at
    /// once for reads only. Touches here and there cost more than the kernel's own fault, and system calls on pages that are not
    /// mapped answer `EFAULT` where faults of the kernel are not served
    /// ([`OpenWay::serves_kernel_faults`](crate::OpenWay::serves_kernel_faults)). What is shown stays the same. After the
    /// engine's end a forked child goes on to get the pages that the memfd holds.
    #[must_use]
    pub fn minor_faults(mut self) -> Self {
        self.minor_faults = true;
        self
    }

    /// Sets the size of the pages that the vmap consists of; those of the system unless set ([`PageSize::Base`]).
    ///
    /// With huge pages, a touch brings a whole huge page of the list. Lists go on to count the system's pages; what the last
    /// huge page has behind the end of the list is zeros. A huge page of which one byte can't be had is SIGBUS as a whole.
    /// Holes of the list must be whole huge pages, and so must be lengths, offsets and addresses of regions. Huge pages are
    /// never swapped, whatever [`VmapBuilder::residency`] says, and count towards no RLIMIT_MEMLOCK. They are copies, whatever
    /// the list is ([`Backing::Copied`]).
    ///
    /// They come from the system's pool. The vmap reserves all that it can need when it is built, and keeps them until it
    /// and its regions are gone: no touch finds the pool empty, except after pages were given up by a
    /// [`Vmap::revoke`] or a raw `fallocate`, or under a limit of the hugetlb controller; it is SIGBUS then.
    #[must_use]
    pub fn page_size(mut self, size: PageSize) -> Self {
        self.page = size;
        self
    }

    /// Records from the start which pages are faulted on, in any process, for [`Vmap::working_set`].
    ///
    /// A fault takes an atomic operation more. It takes memory: a bit for each page of the list, and 8 bytes for each of the
    /// first 2^20 of them.
    #[must_use]
    pub fn record_working_set(mut self) -> Self {
        self.records = true;
        self
    }

    /// Names the contents of the list: a digest of the image, say, or its version. Working sets of vmaps with other names are
    /// refused by [`Region::replay`](crate::Region::replay).
    ///
    /// Unless set, lists are told apart by how they are put together, by the size and the time of the last change of their
    /// files, and by what their sources say ([`PageSource::identity`](crate::PageSource::identity)). Of memory nothing is known
    /// but its length.
    #[must_use]
    pub fn identity(mut self, name: impl Into<Vec<u8>>) -> Self {
        self.name = Some(name.into());
        self
    }

    /// Publishes the list.
    ///
    /// # Errors
    ///
    /// With [`VmapBuilder::record_working_set`]: [`Error::Invalid`] for a list of more than 2^30 pages, or a vmap that is
    /// [`expandable`](VmapBuilder::expandable); [`Error::Sys`] with `ENOMEM`, or when a file of the list can't be examined.
    ///
    /// With huge pages: [`Error::HugePages`] (`ENOMEM`) when the pool has too few, or (`ENODEV`) when the kernel has none of
    /// that size; [`Error::Misaligned`] for a hole that is not whole huge pages; [`Error::Unsupported`] without the feature
    /// POISON; [`Error::Invalid`] with [`Backing::Shared`].
    ///
    /// [`Error::Invalid`] for a deadline or a pause of the failure policy that is out of range, and when the pages must be shared ([`Backing::Shared`]) and can't be: it names what stands in the
    /// way; the same with [`VmapBuilder::minor_faults`], which [`Backing::Copied`] and
    /// [`Delivery::InThread`](crate::Delivery::InThread) stand in the way of too;
    /// [`Error::NotOwner`] in a forked child; [`Error::Shutdown`] after a shutdown; [`Error::SourceInRegion`] when
    /// memory of the list lies in a region of an engine; [`Error::Unsupported`] for a [`PageSource`](crate::PageSource)
    /// or minor faults without the feature THREAD_ID; [`Error::Invalid`] for a file or a page source with
    /// [`Delivery::InThread`](crate::Delivery::InThread), as for huge pages there; [`Error::Overflow`] when the list has more bytes than a file can; [`Error::Sys`] with `EMFILE` or `ENOMEM`.
    pub fn build(self) -> Result<Vmap> {
        let VmapBuilder {
            shared,
            list,
            on_deref,
            user_data,
            expandable,
            residency,
            backing,
            minor_faults,
            page,
            records,
            name,
            failure_policy,
            on_read_failed,
        } = self;
        owner_only(&shared, "publishing a vmap")?;
        failure_policy.validate()?;
        let backing = if minor_faults { backing_of_minor_faults(&shared, backing)? } else { backing };
        refuse_unrecognised(&shared, &list)?;
        refuse_own_memory(&list)?;
        page.check_list(&list, shared.features)?;
        let recorder = if records { Some(recorder_of(&list, expandable)?) } else { None };
        let (id, notices) = (shared.new_vmap_id(), shared.notices.clone());
        let shown = match backing {
            Backing::Copied => None,
            Backing::SharedIfPossible if page.is_huge() => None,
            Backing::Shared if page.is_huge() => {
                return Err(Error::Invalid {
                    what: "the size of the vmap's pages in bytes",
                    value: page.bytes() as u64,
                    rule: "huge pages are copies: a memfd that is shown itself keeps its own",
                });
            }
            Backing::Shared => Some(shown_itself(&list, expandable)?),
            Backing::SharedIfPossible => shown_itself(&list, expandable).ok(),
        };
        // What a memfd that is shown does not hold takes the place of its list.
        let identity = match name {
            Some(name) => Some(named(&name)),
            None if records || shown.is_some() => Some(list.identity()?),
            None => None,
        };
        let (published, claim) = match shown {
            Some((object, claim)) => {
                // What the memfd does not hold is a hole of it.
                let mut holes = Kiobuf::new();
                holes.map_zero(list.nr_pages())?;
                ((holes, object), Some(claim))
            }
            None => {
                let object = Object::new(list.nr_pages(), expandable, page)?;
                ((list, object), None)
            }
        };
        refuse_blocking(&shared, &published.0)?;
        if page.is_huge() && shared.delivers_in_thread() {
            return Err(Error::Invalid {
                what: "the size of the vmap's pages in bytes",
                value: page.bytes() as u64,
                rule: "a signal handler brings base pages: build the engine with Delivery::Handler for huge ones",
            });
        }
        let mut core = VmapCore::new(&shared.opener, id, published, expandable, on_deref, user_data, notices)?;
        (core.recorder, core.identity) = (recorder, identity);
        core.residency = residency;
        core.minor_faults = minor_faults;
        core.failure_policy = failure_policy;
        core.failures = Failures::new(on_read_failed);
        // After the pool was asked: of the largest pages, it is much memory.
        crate::runtime::huge::provide(&shared, page)?;
        let core = Arc::new(core);
        shared.vmaps.enter(&core);
        drop(claim);
        tell!(DEBUG, "kiomap::vmap", "published", engine = shared.id, vmap = core.id, nr_pages = core.nr_pages());
        Ok(Vmap { core, shared })
    }
}

/// Makes what records the working set of a list.
fn recorder_of(list: &Kiobuf, expandable: bool) -> Result<Recorder> {
    if expandable {
        return Err(Error::Invalid {
            what: "the capacity in pages of a vmap whose working set is recorded",
            value: list.nr_pages(),
            rule: "it can't be expandable: a working set belongs to a list of a certain length",
        });
    }
    Recorder::new(list.nr_pages())
}

/// The identity of contents that the application has named.
fn named(name: &[u8]) -> Identity {
    Sha256::new_with_prefix(b"named").chain_update(name).finalize().into()
}

/// The backing of a vmap whose minor faults are the engine's to answer: no other has any.
fn backing_of_minor_faults(shared: &EngineShared, backing: Backing) -> Result<Backing> {
    let refused = |rule| Err(Error::Invalid { what: "minor_faults", value: 1, rule });
    if shared.delivers_in_thread() {
        return refused("a signal handler brings missing pages only: build the engine with Delivery::Handler");
    }
    if !shared.features.contains(Features::THREAD_ID) {
        return Err(Error::Unsupported {
            what: "minor faults",
            missing: Features::THREAD_ID,
            why: "a fault of the thread that looks addresses up must be known as its own",
        });
    }
    match backing {
        Backing::Copied => refused("pages that are copied are mapped when they come: it takes Backing::Shared"),
        Backing::Shared | Backing::SharedIfPossible => Ok(Backing::Shared),
    }
}

/// Makes the memfd of a list the backing object, if it can be that.
fn shown_itself(list: &Kiobuf, expandable: bool) -> Result<(Object, Claim)> {
    if expandable {
        return Err(Error::Invalid {
            what: "the vmap's capacity in pages",
            value: list.nr_pages(),
            rule: "a vmap that shows a memfd itself can't be expandable, as nothing may lie behind its end",
        });
    }
    let object = Object::shared(list.memfd_run()?)?;
    let claim = Claim::new(object.id())?;
    Ok((object, claim))
}

/// Makes a callback that is called with a handle.
fn with_handle(shared: &Arc<EngineShared>, mut callback: impl FnMut(&Vmap) + Send + 'static) -> DerefFn {
    let shared = Arc::clone(shared);
    Box::new(move |core| callback(&Vmap { core: Arc::clone(core), shared: Arc::clone(&shared) }))
}

pub(crate) fn owner_only(shared: &EngineShared, what: &'static str) -> Result<()> {
    if shared.is_child() {
        return Err(Error::NotOwner { what });
    }
    if shared.retired.load(Ordering::Acquire) { Err(Error::Shutdown) } else { Ok(()) }
}

/// Refuses a page source where a worker that runs it can't be told from a thread of the application.
fn refuse_unrecognised(shared: &EngineShared, list: &Kiobuf) -> Result<()> {
    if shared.recognises_workers() || list.extents().all(|extent| extent.kind != ExtentKind::Source) {
        return Ok(());
    }
    Err(Error::Unsupported {
        what: "a page source",
        missing: Features::THREAD_ID,
        why: "a source that touches pages that a source makes would wait for itself, and nobody could tell",
    })
}

/// Refuses a list whose memory an engine of this process pages in: copying from it could wait for the very thread
/// that copies.
fn refuse_own_memory(list: &Kiobuf) -> Result<()> {
    let mut ranges = list.memory_ranges().peekable();
    if ranges.peek().is_none() {
        return Ok(());
    }
    let engines = crate::fork::engines();
    for range in ranges {
        for engine in engines.iter().filter(|engine| !engine.is_child()) {
            let mut patience = Patience::new();
            loop {
                match engine.handler.ask(|reply| Command::Overlap { start: range.start, end: range.end, reply }) {
                    Ok(Ok(Some(addr))) => return Err(Error::SourceInRegion { addr }),
                    // An engine that has ended has no areas.
                    Ok(Ok(None)) | Err(_) => break,
                    Ok(Err(Changing)) => patience.wait()?,
                }
            }
        }
    }
    Ok(())
}

impl Vmap {
    /// Returns the number by which the engine knows the vmap, never used again ([`Engine::snapshot`](crate::Engine::snapshot)).
    pub fn id(&self) -> u64 {
        self.core.id
    }

    /// Returns the number of pages of the list.
    pub fn nr_pages(&self) -> u64 {
        self.core.nr_pages()
    }

    /// Returns the number of areas attached in all living processes.
    ///
    /// # Errors
    ///
    /// In the process that created the engine, none. In a forked child: [`Error::Shutdown`] when the engine is gone,
    /// [`Error::NotInherited`] when the child could not be connected.
    pub fn refcount(&self) -> Result<usize> {
        match &*self.shared.local() {
            Local::Owner { .. } => Ok(self.core.refcount()),
            Local::Child { lifeline, .. } => match lifeline.ask(Ask::Refcount { vmap: self.core.id }, None)? {
                (Reply::Count(count), _) => Ok(count as usize),
                _ => Err(Error::sys("the answer to a count")(Errno::EPROTO)),
            },
            Local::Lost { why } => Err(Error::NotInherited { why: why.clone() }),
        }
    }

    /// Returns the counters of this vmap as they are now; [`Engine::settle`](crate::Engine::settle) first makes them exact.
    /// In a forked child they are those of the moment of the fork.
    pub fn stats(&self) -> VmapStats {
        self.core.counters.snapshot()
    }

    /// Returns the pages that were faulted on so far, in any process, in the order of their first faults, to be
    /// [saved](WorkingSet::save) and [replayed](crate::Region::replay) at the next start.
    ///
    /// Pages that came along with others, or by populating, are not in it; nor are holes. Recording goes on: take it when
    /// what shall be quick at the next start is done. It has at most 2^24 pages.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] when it is not [recorded](VmapBuilder::record_working_set); [`Error::NotOwner`] in a forked child.
    pub fn working_set(&self) -> Result<WorkingSet> {
        if self.shared.is_child() {
            return Err(Error::NotOwner { what: "taking a working set" });
        }
        let recorder = self.core.recorder.as_ref().ok_or(Error::Invalid {
            what: "the id of the vmap whose working set was asked for",
            value: self.core.id,
            rule: "it must have been built with record_working_set",
        })?;
        Ok(WorkingSet::new(recorder.pages(), self.nr_pages(), self.core.identity()?))
    }

    /// Tells whether pages may be swapped out, as the vmap was built.
    pub fn residency(&self) -> Residency {
        self.core.residency
    }

    /// Tells whether regions show the pages of the list's memfd themselves ([`Backing`]): its owner and they see the same
    /// bytes. If not, pages are copies, as of every other list.
    pub fn shares_pages(&self) -> bool {
        self.core.object.is_shared()
    }

    /// Returns the size of the pages that the vmap consists of.
    pub fn page_size(&self) -> PageSize {
        self.core.page()
    }

    /// Returns the value that the vmap was built with, if it is a `T`.
    pub fn user_data<T: Any>(&self) -> Option<&T> {
        self.core.user_data.as_ref()?.downcast_ref()
    }

    /// Exchanges the deref callback, also while areas are attached; one that is running finishes.
    pub fn set_on_deref(&self, callback: impl FnMut(&Vmap) + Send + 'static) {
        self.exchange_on_deref(Some(with_handle(&self.shared, callback)));
    }

    /// Removes the deref callback.
    pub fn clear_on_deref(&self) {
        self.exchange_on_deref(None);
    }

    fn exchange_on_deref(&self, callback: Option<DerefFn>) {
        let mut slot = self.core.on_deref.lock().unwrap_or_else(PoisonError::into_inner);
        slot.version += 1;
        let before = std::mem::replace(&mut slot.callback, callback);
        // Outside the lock: its captures may be anything.
        drop(slot);
        drop(before);
    }

    /// Reads shared contents, without a region: what a process would read at byte `offset` of the vmap.
    ///
    /// Pages that are not resident are taken from the list first.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] when the range ends past the list; [`Error::NoPage`] for a page that can't be had;
    /// [`Error::WouldDeadlock`] in a page source; [`Error::NotOwner`], [`Error::Shutdown`], [`Error::Sys`]. `buf` then holds unspecified bytes.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let _contents = self.make_resident(offset, buf.len())?;
        let at = self.core.object.base() + offset;
        let mut done = 0;
        while done < buf.len() {
            match pread(self.core.memfd(), &mut buf[done..], (at + done as u64) as i64) {
                // A memfd that was handed in may have been truncated.
                Ok(0) => return Err(Error::sys("pread of a vmap")(Errno::EIO)),
                Ok(n) => done += n,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(Error::sys("pread of a vmap")(errno)),
            }
        }
        Ok(())
    }

    /// Changes shared contents, without a region: every process sees the bytes at byte `offset` of the vmap.
    ///
    /// Pages that are not resident are taken from the list first. The write is not atomic as a whole.
    ///
    /// # Errors
    ///
    /// As [`Vmap::read_at`]; some of the bytes may have been written then. [`Error::Shutdown`] where pages are huge.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        // The mapping for it is no area's, and its end no event: a shutdown must not look for one meanwhile.
        let _writing = match self.core.page().is_huge() {
            true => Some(self.shared.begin_attach().ok_or(Error::Shutdown)?),
            false => None,
        };
        let _contents = self.make_resident(offset, bytes.len())?;
        self.core.set_diverging();
        if self.core.page().is_huge() {
            return self.core.write_mapped(offset, bytes);
        }
        let at = self.core.object.base() + offset;
        let mut done = 0;
        while done < bytes.len() {
            match pwrite(self.core.memfd(), &bytes[done..], (at + done as u64) as i64) {
                Ok(n) => done += n,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(Error::sys("pwrite to a vmap")(errno)),
            }
        }
        Ok(())
    }

    /// Has those pages of a range read that page sources make.
    fn fetch(&self, pages: Range<u64>) -> Result<()> {
        let (mut at, mut fetcher) = (pages.start, Fetcher::default());
        while at < pages.end {
            let mut failed = None;
            let next = fetcher.fetch(&self.shared, &self.core, at..pages.end, |pages, why| {
                failed.get_or_insert_with(|| not_brought(&pages, why));
            })?;
            failed.map_or(Ok(()), Err)?;
            at = if next > at { next } else { made_from(&self.core, at, pages.end) };
        }
        Ok(())
    }

    /// Makes pages resident.
    pub(crate) fn bring_resident(&self, pages: Range<u64>) -> Result<()> {
        let page = page_size() as u64;
        self.make_resident(pages.start * page, (pages.end - pages.start) as usize * page_size()).map(drop)
    }

    /// Makes the pages of a byte range resident, and keeps the list from being exchanged.
    fn make_resident(&self, offset: u64, len: usize) -> Result<RwLockReadGuard<'_, ()>> {
        owner_only(&self.shared, "reading or writing a vmap without a region")?;
        if threads::current_role(self.shared.id) == Some(Role::Worker) {
            return Err(Error::WouldDeadlock { what: "reading or writing a vmap", thread: "worker" });
        }
        refuse_nested("reading or writing a vmap")?;
        let page = page_size() as u64;
        self.fetch(offset / page..offset.saturating_add(len as u64).div_ceil(page))?;
        let in_use = self.core.in_use.read().unwrap_or_else(PoisonError::into_inner);
        let Contents { list, window, .. } = self.core.contents();
        let nr_pages = self.nr_pages();
        let end = offset.checked_add(len as u64).filter(|&end| end <= nr_pages * page).ok_or(Error::Invalid {
            what: "the range's offset in bytes",
            value: offset,
            rule: "offset plus length must lie within the list",
        })?;
        let (mut pgoff, end) = (offset / page, end.div_ceil(page));
        // Without a window there are no pages, and the range is empty.
        let Some(window) = window else { return Ok(in_use) };
        while pgoff < end {
            match window.fill(&list, &self.core.object, pgoff, end) {
                Ok(()) => break,
                // Not in the list any more, but still here: a soft revoke leaves resident pages.
                Err(Error::NoPage { pgoff: at, .. }) if is_resident(&self.core.object, &window, at) => pgoff = at + 1,
                Err(error) => return Err(error),
            }
        }
        Ok(in_use)
    }

    /// Appends pages to the list, while areas are attached: what was SIGBUS past the end is memory from now on
    /// (`expand_kiobuf`).
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] when the vmap was not built [`expandable`](VmapBuilder::expandable); [`Error::Misaligned`] when its
    /// last huge page is not full: what lies there already is zeros; as
    /// [`VmapBuilder::build`] otherwise. The list is then as before.
    pub fn expand(&self, tail: &Kiobuf) -> Result<()> {
        owner_only(&self.shared, "expanding a vmap")?;
        refuse_nested("expanding a vmap")?;
        if !self.core.expandable {
            return Err(Error::Invalid {
                what: "the vmap's capacity in pages",
                value: self.nr_pages(),
                rule: "only a vmap that was built expandable can grow",
            });
        }
        refuse_unrecognised(&self.shared, tail)?;
        refuse_blocking(&self.shared, tail)?;
        refuse_own_memory(tail)?;
        let _in_use = self.exclude_owner_io();
        let mut list = self.core.contents().list;
        self.core.page().check_multiple("the vmap's length in pages", list.nr_pages(), page_size())?;
        list.expand(tail)?;
        self.core.page().check_list(&list, self.shared.features)?;
        let nr_pages = list.nr_pages();
        let window = self.core.open_window(&self.shared.opener, nr_pages)?;
        // The list first: a touch of a new page, as soon as the object has it, must find it there.
        let before = self.exchange_list(list, window, Exchange::Adds)?;
        if let Err(error) = self.core.grow(nr_pages) {
            self.exchange_list(before.list, before.window, Exchange::TakesBack)?;
            return Err(error);
        }
        Ok(())
    }

    /// Takes the page list back, while areas are attached (`unmap_kiobuf`).
    ///
    /// Of a memfd that is shown itself ([`Vmap::shares_pages`]) only what it does not hold can be taken back; what its
    /// owner writes there later may be seen. Truncating the memfd takes all.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] for [`Revoke::Hard`] of a memfd that is shown itself, or of a vmap that is published for reading only
    /// ([`PublishOptions::read_only_clients`](crate::PublishOptions::read_only_clients)); [`Error::NotOwner`], [`Error::Shutdown`], or [`Error::Sys`] when resident pages could not be dropped.
    pub fn revoke(&self, how: Revoke) -> Result<()> {
        owner_only(&self.shared, "revoking a vmap")?;
        refuse_nested("revoking a vmap")?;
        if how == Revoke::Hard && self.shares_pages() {
            return Err(Error::Invalid {
                what: "the id of the vmap to be revoked",
                value: self.core.id,
                rule: "pages of a memfd that is shown itself are its owner's: revoke it softly, or truncate the memfd",
            });
        }
        let in_use = self.exclude_owner_io();
        if how == Revoke::Hard && self.core.stays_whole.load(Ordering::Relaxed) > 0 {
            return Err(Error::Invalid {
                what: "the id of the vmap to be revoked",
                value: self.core.id,
                rule: "its pages can't be taken away, as it is published for reading only: revoke it softly",
            });
        }
        // Holes, so that what is appended later does not take the place of what was taken back.
        let mut revoked = Kiobuf::new();
        if self.nr_pages() > 0 {
            revoked.map_hole(self.nr_pages())?;
        }
        let before = self.exchange_list(revoked, self.core.contents().window, Exchange::TakesBack)?;
        // Of a huge page, a part would be zeroed and stay.
        let bytes = self.core.object_bytes();
        if how == Revoke::Hard && bytes > 0 {
            // Punching drops the pages from every mapping; the next touch faults, and finds nothing in the list.
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(self.core.memfd(), flags, 0, bytes as i64).map_err(Error::sys("fallocate to drop pages"))?;
        }
        drop(in_use);
        drop(before);
        Ok(())
    }

    /// Refuses every later attach; only when no area is attached.
    ///
    /// # Errors
    ///
    /// [`Error::Busy`] (`EBUSY`) while areas are attached or a deref callback is due; nothing is changed then.
    /// [`Error::NotOwner`] in a forked child.
    pub fn destroy(&self) -> Result<()> {
        if self.shared.is_child() {
            return Err(Error::NotOwner { what: "destroying a vmap" });
        }
        self.core.destroy()
    }

    /// Waits for the owner's reads and writes, and holds further ones off.
    pub(crate) fn exclude_owner_io(&self) -> RwLockWriteGuard<'_, ()> {
        self.core.in_use.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Exchanges the list everywhere; when it returns, no fault is answered from the old one, which it returns.
    fn exchange_list(&self, list: Kiobuf, window: Option<Arc<Window>>, exchange: Exchange) -> Result<Contents> {
        let before = self.core.set_list(list, window, exchange);
        // Kept over the question, so that the fault-handling thread drops neither as the last.
        let now = self.core.contents();
        let (vmap, contents) = (self.core.id, now.clone());
        self.shared.handler.ask(|reply| Command::SetList { vmap, contents, reply })?;
        Ok(before)
    }
}

impl std::fmt::Debug for Vmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.core.fmt(f)
    }
}

/// Refuses what a page source must not ask for while the thread that it is called on fills pages of a vmap, because it
/// may wait for that filling.
pub(crate) fn refuse_nested(what: &'static str) -> Result<()> {
    if window::is_reading() { Err(Error::WouldDeadlock { what, thread: "filling" }) } else { Ok(()) }
}
