//! The engine's handle: how it is built, watched and shut down.

use std::ops::ControlFlow;
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crossbeam_channel::Receiver;

use super::around::FaultAround;
use super::bell::Bell;
use super::buffers::READ_BUFFERS_MIN_BYTES;
use super::command::{Command, Post};
use super::crew::{Crew, HANDLERS_MAX};
use super::handler::{Handler, Parts};
use super::handles::{self, Request};
use super::keeper::Keeper;
use super::placement::{Placement, Placer};
use super::shared::{EngineShared, Setup};
use super::slow::Slow;
use super::threads::{self, Role, contain};
use super::watch::Watch;
use super::workers::{Pool, Roll, WORKERS_MAX};
use super::{background, callbacks, crew_member, level, workers};
use crate::adopt;
use crate::fork;
use crate::fork::link::Local;
use crate::inthread::{self, Delivery};
use crate::kiobuf::Kiobuf;
use crate::process::ledger::Private;
use crate::process::open_pidfd;
use crate::snapshot::{Snapshot, View};
use crate::space::OWN_SPACE;
use crate::space::foreign::is_foreign;
use crate::space::stripes::{is_own, is_stripe};
use crate::stats::latency::FaultLatency;
use crate::stats::{SpaceCounters, SpaceStats, Stats};
use crate::sys::{DEFAULT_WAYS, Features, OpenWay, Opener, Userfault};
use crate::trace::tell;
use crate::vmap::core::Notice;
use crate::vmap::fill::{FillProgress, fill_all};
use crate::vmap::{Vmap, VmapBuilder};
use crate::{Error, Result};

/// Commands that may wait at once.
const COMMANDS: usize = 256;
/// Workers that are started with the engine: with one, every read is made sooner or later, even if no more can be started.
const FIRST_WORKERS: usize = 1;
/// The most bytes that buffers take, unless more are asked for.
const READ_BUFFER_BYTES: usize = 40 << 20;

/// Pages memory in for this process and the processes forked from it.
///
/// Each engine has a thread that answers page faults, one that keeps track of forked processes, one that runs
/// callbacks, and workers that read from slow sources. Dropping it shuts it down with [`Shutdown::Poison`]; regions
/// that outlive it keep their resident pages.
///
/// In a forked child the handle reaches the engine of the parent: regions, [`Vmap::attach`] and counts work there;
/// what only the owner can do answers [`Error::NotOwner`].
pub struct Engine {
    shared: Arc<EngineShared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    workers: workers::Threads,
    /// Hears when all of them have ended.
    workers_ended: Receiver<()>,
    #[cfg(test)]
    crew: Arc<Crew>,
}

/// What becomes of pages that are not resident when an engine is shut down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Shutdown {
    /// Later touches of them are SIGBUS.
    Poison,
    /// They are filled first, of every vmap with areas, and in every adopted process; those that can't be had are SIGBUS.
    Fill,
}

/// Settings of an engine that is to be built ([`Engine::builder`]).
#[derive(Debug, Clone)]
pub struct EngineBuilder {
    fault_around: FaultAround,
    workers: usize,
    read_buffer_bytes: usize,
    placement: Placement,
    handlers: Option<usize>,
    crew_always: bool,
    ways: Vec<OpenWay>,
    without: Features,
    delivery: Delivery,
}

/// The most threads that answer faults, unless more are asked for.
const HANDLERS_BY_DEFAULT: usize = 4;

impl Default for EngineBuilder {
    fn default() -> Self {
        EngineBuilder {
            fault_around: FaultAround::default(),
            workers: 8,
            read_buffer_bytes: READ_BUFFER_BYTES,
            placement: Placement::default(),
            handlers: None,
            crew_always: false,
            ways: DEFAULT_WAYS.to_vec(),
            without: Features::empty(),
            delivery: Delivery::default(),
        }
    }
}

impl EngineBuilder {
    /// Sets how many pages one fault brings: few for touches here and there and many where a region is walked through,
    /// unless set ([`FaultAround::Adaptive`]).
    #[must_use]
    pub fn fault_around(mut self, around: FaultAround) -> Self {
        self.fault_around = around;
        self
    }

    /// Has each fault bring an aligned block of at most this many pages, from 1 to [`FAULT_AROUND_MAX_PAGES`]
    /// ([`FaultAround::Fixed`]).
    ///
    /// [`FAULT_AROUND_MAX_PAGES`]: crate::FAULT_AROUND_MAX_PAGES
    #[must_use]
    pub fn fault_around_pages(self, pages: usize) -> Self {
        self.fault_around(FaultAround::Fixed(pages))
    }

    /// Sets how many reads of one source, or of one file, may be made at once, from 1 to [`WORKERS_MAX`]; 8 unless set.
    ///
    /// Each is made by a thread of its own, which is started when it is first needed and stays. Of all files and sources
    /// together, at most [`WORKERS_MAX`] reads that may wait are made at once. So a source that does not come back occupies
    /// that many threads: further touches of its pages wait until one of them is free, or their
    /// [deadline](crate::FailurePolicy::deadline) has passed. Other sources have the rest; when sources that don't come back occupy
    /// [`WORKERS_MAX`] threads together (8 such sources, unless set), no other source or file that may wait is read. Sources that
    /// [wait for nothing](crate::PageSource::may_block) have 4 threads more among them.
    #[must_use]
    pub fn workers(mut self, workers: usize) -> Self {
        self.workers = workers;
        self
    }

    /// Sets how many bytes of memory reads may take together, until their pages are installed; 40 MiB unless set, and at least
    /// 8 MiB.
    ///
    /// Of these, 4 MiB are for sources that [wait for nothing](crate::PageSource::may_block). Reads that find no room wait for it, in
    /// order. A read of a source that hangs keeps its memory from others until its [deadline](crate::FailurePolicy::deadline)
    /// has passed; then it does not count any more, and takes up to 4 MiB beside until the source answers: with all threads hung,
    /// 272 MiB ([`Stats::read_buffer_bytes_late`](crate::Stats::read_buffer_bytes_late)).
    ///
    /// Huge pages have buffers of their own: four of 2 MiB, where one whose deadline has passed is replaced, and one for each larger
    /// size, which a source that hangs keeps. Whoever fills pages on a thread of his own ([`Vmap::read_at`],
    /// [`Region::populate`](crate::Region::populate), a shutdown that fills) has one of at most 256 KiB beside.
    #[must_use]
    pub fn read_buffer_bytes(mut self, bytes: usize) -> Self {
        self.read_buffer_bytes = bytes;
        self
    }

    /// Sets where the fault-handling thread runs; [`Placement::Follow`] unless set.
    ///
    /// A fault is answered soonest on the processor on which the touching thread runs: waking an idle processor can cost
    /// several times the whole fault.
    #[must_use]
    pub fn placement(mut self, placement: Placement) -> Self {
        self.placement = placement;
        self
    }

    /// Sets how many threads may answer faults at once, from 1 to [`HANDLERS_MAX`]. Unless set, it is as many as there are
    /// processors, at most 4, with [`Placement::Follow`], and 1 where a place was chosen.
    ///
    /// With 1 there is the fault-handling thread alone. With more there are as many others beside it, each for a
    /// processor, which sleep until several threads, of one process or of several, fault without a pause; then they answer
    /// what lies in memory. It needs the feature `THREAD_ID` and `/proc`: without them they sleep on. Where the process may,
    /// they work with the policy SCHED_IDLE, as with [`Placement::Follow`].
    #[must_use]
    pub fn handlers(mut self, handlers: usize) -> Self {
        self.handlers = Some(handlers);
        self
    }

    /// Sets that the threads of [`EngineBuilder::handlers`] answer faults all the time, on the first processors that are
    /// allowed.
    #[doc(hidden)]
    #[must_use]
    pub fn handlers_standing_by(mut self, standing_by: bool) -> Self {
        self.crew_always = standing_by;
        self
    }

    /// The threads beside the fault-handling thread.
    fn crew(&self) -> usize {
        // Faults that their own threads answer are none of theirs.
        let handlers = self.handlers.unwrap_or_else(|| match self.placement {
            Placement::Follow => default_handlers(),
            _ => 1,
        });
        if handlers > 1 && self.delivery == Delivery::Handler { handlers } else { 0 }
    }

    /// Pins the fault-handling thread to a processor: [`Placement::Pinned`] with one.
    #[must_use]
    pub fn handler_cpu(self, cpu: usize) -> Self {
        self.placement(Placement::Pinned(vec![cpu]))
    }

    /// Sets which ways to open a userfaultfd are tried, in which order; device, system call, user-mode-only unless
    /// set.
    #[must_use]
    pub fn open_ways(mut self, ways: &[OpenWay]) -> Self {
        self.ways = ways.to_vec();
        self
    }

    /// Does as if the kernel lacked these features, to try what an engine does on an older one; nothing is taken away
    /// unless set. [`Engine::features`] tells what is left.
    #[must_use]
    pub fn without(mut self, features: Features) -> Self {
        self.without = features;
        self
    }

    /// Sets how this process gets missing pages; from the fault-handling thread unless set.
    ///
    /// [`Delivery::InThread`] is faster, and says what it costs: among other things it installs a SIGBUS handler.
    #[must_use]
    pub fn delivery(mut self, delivery: Delivery) -> Self {
        self.delivery = delivery;
        self
    }

    fn validate(&self) -> Result<()> {
        let invalid = |what, value: usize, rule| Err(Error::Invalid { what, value: value as u64, rule });
        match self {
            Self { workers, .. } if !(1..=WORKERS_MAX).contains(workers) => {
                invalid("workers", *workers, "there must be from 1 to 64")
            }
            Self { read_buffer_bytes, .. } if *read_buffer_bytes < READ_BUFFERS_MIN_BYTES => invalid(
                "read_buffer_bytes",
                *read_buffer_bytes,
                "it must be at least 8 MiB, two of the largest granule",
            ),
            Self { handlers: Some(handlers), .. } if !(1..=HANDLERS_MAX).contains(handlers) => {
                invalid("handlers", *handlers, "there must be from 1 to 16")
            }
            Self { placement, fault_around, .. } => placement.validate().and_then(|()| fault_around.validate()),
        }
    }

    /// Builds the engine and starts its threads.
    ///
    /// # Errors
    ///
    /// [`Error::Open`] when no userfaultfd can be had, with each attempt and its remedy; [`Error::Unsupported`] when
    /// the kernel lacks a feature that the engine can't do without (Linux 5.14 has them all), or that the delivery needs;
    /// [`Error::Invalid`] for a
    /// setting out of range; [`Error::Sys`] with the errno of remap_file_pages(2) where that is needed (before Linux 6.6)
    /// and forbidden, or with `EMFILE`, `ENOMEM` or `EAGAIN` for want of descriptors, memory or threads. Nothing is
    /// left behind then.
    pub fn build(self) -> Result<Engine> {
        self.validate()?;
        let opener = Opener::new(&self.ways);
        let wanted = level::choose(&opener, self.without)?;
        let wanted = inthread::with_delivery(wanted, self.delivery, &opener, self.without)?;
        let (uffd, way) = opened(&opener, wanted)?;
        let uffd = Arc::new(uffd);
        let (commands, command_inbox) = crossbeam_channel::bounded(COMMANDS);
        let handler_bell = Arc::new(Bell::new().map_err(Error::sys("eventfd for the fault-handling thread"))?);
        let (keeper_handle, keeper_inbox) = handles::keeper_channel().map_err(Error::sys("eventfd for the keeper"))?;
        let keeper_handle = Arc::new(keeper_handle);
        let (notices, notice_inbox) = crossbeam_channel::unbounded();
        let own = Arc::new(SpaceCounters {
            id: OWN_SPACE,
            pid: AtomicI32::new(nix::unistd::getpid().as_raw()),
            ..SpaceCounters::default()
        });
        let shared = Arc::new(EngineShared::new(Setup {
            opener,
            way,
            features: wanted,
            fault_around: self.fault_around,
            owner_pidfd: open_pidfd(nix::unistd::getpid().as_raw())?,
            local: Local::Owner { uffd: Arc::clone(&uffd) },
            is_client: false,
            handler: handles::handler_handle(commands, command_inbox.clone(), Arc::clone(&handler_bell)),
            keeper: Arc::clone(&keeper_handle),
            notices: notices.clone(),
            spaces: vec![Arc::clone(&own)],
        }));
        let (jobs, job_inbox) = crossbeam_channel::bounded(workers::THREADS_MAX);
        let (done, done_inbox) = crossbeam_channel::bounded(workers::THREADS_MAX);
        let (alive, workers_ended) = crossbeam_channel::bounded(0);
        let roll = Arc::new(Roll::new());
        let pool = Pool {
            roll: Arc::clone(&roll),
            jobs: job_inbox,
            done,
            bell: Arc::clone(&handler_bell),
            alive,
            threads: workers::Threads::default(),
        };
        // Without members it is never called, and needs nothing.
        let crew = Crew::new(&shared, &handler_bell, self.fault_around, self.crew())?;
        let handler = Handler::new(Parts {
            shared: Arc::clone(&shared),
            commands: command_inbox,
            bell: Arc::clone(&handler_bell),
            keeper: Arc::clone(&keeper_handle),
            uffd,
            counters: own,
            slow: Slow::new(jobs, roll, workers::limits(self.workers), self.read_buffer_bytes, FIRST_WORKERS),
            done: done_inbox,
            fault_around: self.fault_around,
            crew: Arc::clone(&crew),
            crew_always: self.crew_always,
        })?;
        let workers = Arc::clone(&pool.threads);
        let keeper = Keeper::new(Arc::clone(&shared), keeper_inbox, notices.clone(), pool)?;
        let engine = Engine {
            shared: Arc::clone(&shared),
            threads: Mutex::default(),
            workers,
            workers_ended,
            #[cfg(test)]
            crew: Arc::clone(&crew),
        };
        let started = self.start_threads(&engine, handler, &crew, keeper, notice_inbox);
        if let Err(error) = started {
            // The fault-handling thread was to start last and did not: tell those that wait for it. The workers end
            // because the sender of their jobs went with it.
            shared.handler.close();
            let _ = keeper_handle.try_post(Post::HandlerEnded);
            let _ = notices.send(Notice::End);
            drop(engine);
            return Err(error);
        }
        fork::enter(&shared)?;
        #[cfg(feature = "tracing")]
        crate::trace::process_builds();
        tell!(
            INFO,
            "kiomap::engine",
            "built",
            engine = shared.id,
            way = format!("{:?}", shared.way),
            features = shared.features.to_string()
        );
        inthread::begin(&shared);
        Ok(engine)
    }
}

impl EngineBuilder {
    /// Starts the threads, the fault-handling thread last. What does not start is dropped.
    fn start_threads(
        &self,
        engine: &Engine,
        mut handler: Handler,
        crew: &Arc<Crew>,
        mut keeper: Keeper,
        notices: Receiver<Notice>,
    ) -> Result<()> {
        for _ in 0..FIRST_WORKERS {
            keeper.pool().start(&engine.shared)?;
        }
        let shared = Arc::clone(&engine.shared);
        engine.start(Role::Callback, move || callbacks::run(&shared, &notices))?;
        let shared = Arc::clone(&engine.shared);
        engine.start(Role::Keeper, move || {
            // What a page list kept alive may be dropped there: a panic of it must not end the counting.
            while contain(&shared, || keeper.run()).is_none() {}
        })?;
        for index in 0..crew.members.len() {
            let crew = Arc::clone(crew);
            engine.start(Role::Crew, move || crew_member::run(&crew, index))?;
        }
        let watch = match self.placement {
            Placement::Follow => engine.start_watch(&handler)?,
            _ => None,
        };
        let (shared, placer) = (Arc::clone(&engine.shared), Placer::new(self.placement.clone(), watch));
        engine.start(Role::Fault, move || {
            run_handler(&mut handler, placer);
            drop(handler);
            shared.handler.close();
        })
    }
}

/// As many threads as there are processors, and few.
///
/// This is the process's affinity and its cgroup's share, as far as the standard library knows them.
fn default_handlers() -> usize {
    std::thread::available_parallelism().map_or(1, |processors| processors.get().min(HANDLERS_BY_DEFAULT))
}

fn opened(opener: &Opener, features: Features) -> Result<(Private<Userfault>, OpenWay)> {
    let mut way = OpenWay::UserModeOnly;
    let uffd = Private::open(|| {
        opener.open(features).map(|(uffd, opened)| {
            way = opened;
            uffd
        })
    })?;
    Ok((uffd, way))
}

/// The body of the fault-handling thread. A panic of it would be a bug of ours; it must not become zero pages or
/// threads that sleep for ever, so the thread goes on and answers every fault by SIGBUS.
fn run_handler(handler: &mut Handler, placer: Placer) {
    handler.settle(placer);
    while catch_unwind(AssertUnwindSafe(|| handler.run())).is_err() {
        handler.retire();
    }
}

impl Engine {
    /// Builds an engine with the default settings.
    ///
    /// # Errors
    ///
    /// As [`EngineBuilder::build`].
    pub fn new() -> Result<Engine> {
        Engine::builder().build()
    }

    /// Begins to build an engine.
    pub fn builder() -> EngineBuilder {
        EngineBuilder::default()
    }

    /// Publishes a page list as shared memory; see [`Engine::vmap_builder`] for callbacks and user data.
    ///
    /// # Errors
    ///
    /// As [`VmapBuilder::build`].
    pub fn vmap(&self, kiobuf: &Kiobuf) -> Result<Vmap> {
        self.vmap_builder(kiobuf).build()
    }

    /// Begins to publish a page list. The vmap takes a snapshot: later changes of `kiobuf` don't reach it.
    pub fn vmap_builder(&self, kiobuf: &Kiobuf) -> VmapBuilder {
        VmapBuilder::new(Arc::clone(&self.shared), kiobuf.clone())
    }

    /// Returns the way in which userfaultfds were opened: what faults can be served depends on it
    /// ([`OpenWay::serves_kernel_faults`]).
    pub fn open_way(&self) -> OpenWay {
        self.shared.way
    }

    /// Returns the userfaultfd features that are in use, of those that the engine knows to use. What the lack of one
    /// means is told where it matters, and together in `docs/operations.md`.
    pub fn features(&self) -> Features {
        self.shared.features
    }

    /// Returns the counters as they are now. In a forked child they are those of the moment of the fork.
    ///
    /// A page is counted just after the thread that waits for it wakes: [`Engine::settle`] first makes them exact.
    /// [`Vmap::stats`] tells a part of it for each vmap, [`Engine::spaces`] for each process.
    pub fn stats(&self) -> Stats {
        self.shared.counters.snapshot()
    }

    /// Returns how long faults took, from when they were read to when they were answered, as it is now. In a forked child it
    /// is as it was at the moment of the fork.
    pub fn fault_latency(&self) -> FaultLatency {
        self.shared.latency.snapshot()
    }

    /// Returns the processes that are served, the engine's own first.
    ///
    /// # Errors
    ///
    /// [`Error::NotOwner`] in a forked child.
    pub fn spaces(&self) -> Result<Vec<SpaceStats>> {
        self.owner_only("listing spaces")?;
        let spaces = self.shared.spaces();
        let (stripes, processes): (Vec<_>, Vec<_>) = spaces.iter().partition(|counters| is_stripe(counters.id));
        let mut stats: Vec<_> = processes.iter().map(|counters| counters.snapshot()).collect();
        if let Some(own) = stats.first_mut() {
            stripes.iter().for_each(|counters| own.add(&counters.snapshot()));
        }
        Ok(stats)
    }

    /// Lists every vmap, process and area as they are at this moment, for a debugger, or to be compared with what the
    /// kernel says.
    ///
    /// Areas are listed as the fault-handling thread knows them, all at one moment; the counts are read a moment
    /// later. They agree when nothing attaches, unmaps, forks or exits meanwhile, and [`Engine::settle`] came before.
    ///
    /// # Errors
    ///
    /// [`Error::NotOwner`] in a forked child; [`Error::Sys`] with `ENOMEM`, or when `/proc` can't be read.
    pub fn snapshot(&self) -> Result<Snapshot> {
        self.owner_only("a snapshot")?;
        let asked = self.shared.handler.ask(|reply| Command::View { view: View::new(), reply });
        let view = match asked {
            Ok((view, outcome)) => outcome.map(|()| view).map_err(Error::sys("mmap for a snapshot"))?,
            // The thread has ended because no area is left.
            Err(_) => View::new(),
        };
        Snapshot::of(&self.shared.vmaps.all(), &view)
    }

    /// Waits until every event that has happened by now is counted: unmaps by `munmap` itself, and the ends of
    /// processes that the kernel has reported.
    ///
    /// # Errors
    ///
    /// [`Error::NotOwner`] in a forked child; [`Error::Shutdown`] after a shutdown; [`Error::WouldDeadlock`] when
    /// called while a thread of the engine drops what a page list kept alive.
    pub fn settle(&self) -> Result<()> {
        self.owner_only("settling counts")?;
        if threads::current_role(self.shared.id) == Some(Role::Keeper) {
            return Err(Error::WouldDeadlock { what: "settling counts", thread: "keeper" });
        }
        self.shared.settle()
    }

    /// Shuts the engine down: every attach from now on is refused, every fault that waits is answered.
    ///
    /// Resident pages stay readable and writable in every process, and regions stay attached until they are dropped;
    /// what is not resident becomes what `how` says. Adopted processes are served to the same end as long as this process lives.
    /// Forked processes are let go: their areas are no longer counted. Those
    /// that are forked from now on have none of the engine's memory.
    /// Deref callbacks that became due run before this returns, unless it is called from one.
    ///
    /// # Errors
    ///
    /// [`Error::NotOwner`] in a forked child; [`Error::Shutdown`] when it was shut down before;
    /// [`Error::WouldDeadlock`] when a page source asks to fill on a thread that fills pages already.
    pub fn shutdown(&self, how: Shutdown) -> Result<()> {
        match how {
            Shutdown::Fill => self.shutdown_filling(|_| {}),
            Shutdown::Poison => {
                self.begin_shutdown()?;
                self.finish_shutdown();
                Ok(())
            }
        }
    }

    /// Shuts the engine down with [`Shutdown::Fill`], and tells how far it has filled.
    ///
    /// `progress` is called on this thread, outside every lock: at the start, after each step of at most 512 pages and
    /// the holes that follow them, the last time with all pages done. It may do what it likes; faults are still answered.
    /// Vmaps are filled one after the other, the oldest first, then the areas of adopted processes ([`Engine::adopt`]); a page source that does not return is waited for.
    /// If it panics, what is filled by then stays, the engine is shut down with [`Shutdown::Poison`], and the panic goes
    /// on.
    ///
    /// # Errors
    ///
    /// As [`Engine::shutdown`]; [`Error::NotOwner`] also in a process that `progress` forked and let return.
    pub fn shutdown_filling(&self, mut progress: impl FnMut(FillProgress)) -> Result<()> {
        self.owner_only("a shutdown")?;
        crate::vmap::refuse_nested("a shutdown that fills")?;
        self.begin_shutdown()?;
        let mut attached = self.shared.vmaps.all();
        // What only adopted processes show is brought there.
        attached.retain(|vmap| vmap.refcount() > 0 && vmap.diverges());
        attached.sort_unstable_by_key(|vmap| vmap.id);
        let filled = catch_unwind(AssertUnwindSafe(|| {
            let mut here = FillProgress::default();
            let mut tell = |so_far| {
                progress(so_far);
                if self.shared.is_child() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            fill_all(&self.shared, &attached, |so_far| {
                here = so_far;
                tell(so_far)
            });
            if !self.shared.is_child() {
                // Without an adopted process there is nothing to do. If the threads have ended, none is served.
                let _ = adopt::fill_all(&self.shared, |there| tell(here.and(there)));
            }
        }));
        let finished = self.owner_only("a shutdown").map(|()| self.finish_shutdown());
        if let Err(panic) = filled {
            resume_unwind(panic);
        }
        finished
    }

    /// Refuses every later attach and fill.
    fn begin_shutdown(&self) -> Result<()> {
        self.owner_only("a shutdown")?;
        if self.shared.retired.swap(true, Ordering::SeqCst) { Err(Error::Shutdown) } else { Ok(()) }
    }

    fn finish_shutdown(&self) {
        let background = background::stop(&self.shared);
        // From here on the fault-handling thread only guards, as long as a region is left; then it ends.
        let _ = self.shared.handler.ask(|reply| Command::Retire { reply });
        let role = threads::current_role(self.shared.id);
        if role == Some(Role::Keeper) {
            // What a page list kept alive is dropped there, and may own this engine: the keeper can't wait for itself.
            self.shared.keeper.send(Request::DropPeers { reply: None });
        } else {
            super::call::call(|reply| self.shared.keeper.send(Request::DropPeers { reply: Some(reply) }));
        }
        // The thread looks whether it is done after each command.
        let _ = self.shared.handler.ask(|reply| Command::Barrier { reply });
        let own_areas: u64 = {
            let spaces = self.shared.spaces();
            let own = spaces.iter().filter(|space| is_own(space.id));
            own.map(|space| space.areas.load(Ordering::Relaxed)).sum()
        };
        let has_adopted = self.shared.spaces().iter().any(|space| is_foreign(space.id));
        let mut threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        threads.extend(background);
        if role.is_none() {
            // Callbacks that are due by now: the answer is the end of the channel.
            let (due, done) = crossbeam_channel::bounded::<()>(0);
            let _ = self.shared.notices.send(Notice::Settle(due));
            let _ = done.recv();
        }
        tell!(INFO, "kiomap::engine", "shut down", engine = self.shared.id, areas_left = own_areas);
        if own_areas == 0 && !has_adopted && role.is_none() && !self.shared.vmaps.is_any_mapped() {
            for thread in threads {
                // A panic of a thread was caught and counted inside.
                let _ = thread.join();
            }
            workers::join(&self.workers, &self.workers_ended);
        }
    }

    pub(crate) fn shared(&self) -> &Arc<EngineShared> {
        &self.shared
    }

    #[cfg(test)]
    pub(crate) fn shared_for_tests(&self) -> &Arc<EngineShared> {
        &self.shared
    }

    #[cfg(test)]
    pub(crate) fn crew_for_tests(&self) -> &Crew {
        &self.crew
    }

    fn owner_only(&self, what: &'static str) -> Result<()> {
        if self.shared.is_child() { Err(Error::NotOwner { what }) } else { Ok(()) }
    }

    /// Starts the thread that lets the handler follow; `None` where the kernel does not allow it to.
    fn start_watch(&self, handler: &Handler) -> Result<Option<Arc<Watch>>> {
        let watch = Watch::new(Arc::clone(handler.waits_in())).map_err(Error::sys("timerfd_create for the watch"))?;
        let watch = Arc::new(watch);
        let mut started = Ok(());
        let able = super::call::call(|able| {
            let watch = Arc::clone(&watch);
            // If it can't be started, the ticket is dropped, and nobody waits for it.
            started = self.start(Role::Watch, move || {
                let may = watch.try_policies();
                able.answer(may);
                if may {
                    watch.run();
                }
            });
        });
        started?;
        if able != Some(true) {
            // It ends by itself; nothing of it is left when the engine is there.
            let thread = self.threads.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let _ = thread.map(JoinHandle::join);
            return Ok(None);
        }
        Ok(Some(watch))
    }

    fn start(&self, role: Role, body: impl FnOnce() + Send + 'static) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let thread = threads::spawn(role, self.shared.id, move || {
            match role {
                Role::Fault => shared.shard_owners.take_first(),
                Role::Crew => shared.shard_owners.take(),
                _ => {}
            }
            let _ = contain(&shared, body);
        })?;
        self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        Ok(())
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if self.shared.is_child() {
            // The threads are not here; what their handles name in this process may be other threads.
            let threads = self.threads.get_mut().unwrap_or_else(PoisonError::into_inner);
            std::mem::forget(std::mem::take(threads));
            return;
        }
        // After a shutdown there is nothing to do.
        let _ = self.shutdown(Shutdown::Poison);
    }
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("open_way", &self.shared.way)
            .field("owner_pidfd", &self.shared.owner_pidfd.as_raw_fd())
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}
