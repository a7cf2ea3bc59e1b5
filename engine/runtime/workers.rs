//! Threads that read pages from where reading may take long: files that are not cached, and page sources.
//!
//! A worker reads into a buffer and fills the vmap's pages through its window, which is right at any time: what is filled
//! belongs to the list, whoever still wants it. Whose addresses show the pages is the fault-handling thread's business: it
//! maps them, and wakes who waits.
//!
//! They are started when they are needed, by the keeper. One that does not come back from a source is never waited for.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use nix::errno::Errno;

use super::bell::Bell;
use super::command::{ReadDone, ReadJob};
use super::handles::Request;
use super::huge;
use super::reads::{Limits, Outcome};
use super::shared::EngineShared;
use super::threads::{self, Role, contain};
use crate::Result;
use crate::kiobuf::ReadFailure;
use crate::page::page_size;
use crate::sys::Stop;
use crate::trace::tell;
use crate::vmap::failure::{FailureCause, Why};
use crate::vmap::fill_read::Unfilled;

/// The most reads that may be made at once, of all files and of all sources that may wait.
pub const WORKERS_MAX: usize = 64;
/// The most that are made beside them, of sources that wait for nothing.
const QUICK_MAX: usize = 4;
/// The most worker threads.
pub(crate) const THREADS_MAX: usize = WORKERS_MAX + QUICK_MAX;
/// How long a shutdown waits for reads that are being made.
const GRACE: Duration = Duration::from_secs(2);

/// How many reads may be made at once, where `workers` was set.
pub(crate) fn limits(workers: usize) -> Limits {
    Limits { of_medium: workers, slow: WORKERS_MAX, quick: QUICK_MAX }
}

/// The workers, as the fault-handling thread knows them.
pub(crate) struct Roll {
    /// Their thread ids, as a fault message names them.
    ids: [AtomicI32; THREADS_MAX],
    /// Those that run.
    started: AtomicUsize,
    /// Those that were asked for and could not be started.
    refused: AtomicUsize,
    /// One more is asked for.
    called: AtomicBool,
    /// What they read is not installed any more.
    closed: AtomicBool,
}

impl Roll {
    pub(crate) fn new() -> Roll {
        Roll {
            ids: [const { AtomicI32::new(-1) }; THREADS_MAX],
            started: AtomicUsize::new(0),
            refused: AtomicUsize::new(0),
            called: AtomicBool::new(false),
            closed: AtomicBool::new(false),
        }
    }

    /// The workers that run.
    pub(crate) fn started(&self) -> usize {
        self.started.load(Ordering::Acquire)
    }

    /// The workers that were asked for and will not come.
    pub(crate) fn refused(&self) -> usize {
        self.refused.load(Ordering::Acquire)
    }

    /// Notes that one could not be started.
    pub(super) fn refuse(&self) {
        self.refused.fetch_add(1, Ordering::Release);
    }

    /// Enters a thread that does what they do. The keeper starts one after the other, and each is known before the next.
    pub(super) fn enter(&self, tid: i32) {
        let index = self.started();
        self.ids[index].store(tid, Ordering::Release);
        self.started.store(index + 1, Ordering::Release);
    }

    /// Asks for one more; the keeper is to be nudged.
    pub(super) fn call(&self) {
        self.called.store(true, Ordering::Release);
    }

    /// Tells the keeper whether one more is asked for, once.
    pub(crate) fn take_call(&self) -> bool {
        self.called.swap(false, Ordering::AcqRel)
    }

    /// Has nothing be installed any more: what is not there at a shutdown does not come after it.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// Tells whether a thread of the engine's process is one of them.
    pub(crate) fn has(&self, tid: i32) -> bool {
        self.ids[..self.started().min(THREADS_MAX)].iter().any(|id| id.load(Ordering::Relaxed) == tid)
    }
}

/// What starts workers. It belongs to the keeper.
pub(crate) struct Pool {
    pub(crate) roll: Arc<Roll>,
    pub(crate) jobs: Receiver<ReadJob>,
    pub(crate) done: Sender<ReadDone>,
    pub(crate) bell: Arc<Bell>,
    /// Held by each as long as it lives.
    pub(crate) alive: Sender<()>,
    pub(crate) threads: Threads,
}

/// The handles of the workers' threads.
pub(crate) type Threads = Arc<Mutex<Vec<JoinHandle<()>>>>;

impl Pool {
    /// Starts one more worker.
    ///
    /// # Errors
    ///
    /// [`Error::Sys`](crate::Error::Sys) with `EAGAIN` or `ENOMEM`.
    pub(crate) fn start(&self, shared: &Arc<EngineShared>) -> Result<()> {
        let Pool { roll, jobs, done, bell, alive, .. } = self;
        let (jobs, done, bell, alive) = (jobs.clone(), done.clone(), Arc::clone(bell), alive.clone());
        let (roll, engine) = (Arc::clone(roll), Arc::clone(shared));
        let started = threads::spawn(Role::Worker, shared.id, move || {
            contain(&engine, || run(&engine, &roll, &jobs, &done, &bell));
            drop(alive);
        });
        match started {
            Ok(thread) => self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread),
            Err(error) => {
                self.roll.refuse();
                return Err(error);
            }
        }
        Ok(())
    }
}

/// Waits for the workers to end, after the last sender of their jobs is gone; not for those that are still in a source when
/// the time is over.
pub(crate) fn join(threads: &Threads, ended: &Receiver<()>) {
    let in_time = ended.recv_timeout(GRACE) != Err(RecvTimeoutError::Timeout);
    let threads = std::mem::take(&mut *threads.lock().unwrap_or_else(PoisonError::into_inner));
    for thread in threads.into_iter().filter(|thread| in_time || thread.is_finished()) {
        // A panic was caught and counted inside.
        let _ = thread.join();
    }
}

/// Does jobs until their sender is gone.
fn run(shared: &EngineShared, roll: &Roll, jobs: &Receiver<ReadJob>, done: &Sender<ReadDone>, bell: &Bell) {
    roll.enter(nix::unistd::gettid().as_raw());
    bell.ring();
    while let Ok(mut job) = jobs.recv() {
        let outcome = read(shared, roll, &mut job);
        let ReadJob { id, subject, lent, .. } = job;
        // Perhaps the last reference: the code of what the list keeps alive is the application's too.
        if shared.recognises_workers() {
            contain(shared, || drop(subject));
        } else {
            // It might touch a page that only a worker could read, and nobody would know it.
            shared.keeper.send(Request::Drop { _subject: subject });
        }
        if shared.is_child() {
            threads::end_child();
        }
        if done.send(ReadDone { id, lent, outcome }).is_err() {
            return;
        }
        bell.ring();
    }
}

/// Reads the pages of a job and installs them.
fn read(shared: &EngineShared, roll: &Roll, job: &mut ReadJob) -> Outcome {
    let ReadJob { subject, pages, lent, .. } = job;
    let read = contain(shared, || match lent.huge {
        Some(_) => huge::read(&subject.list, pages.clone(), &mut lent.buffer.0),
        None => {
            let bytes = (pages.end - pages.start) as usize * page_size();
            subject.list.read_pages(pages.start, &mut lent.buffer.0[..bytes])
        }
    });
    if shared.is_child() {
        // The source forked and returned in the child: what the engine had is not here.
        threads::end_child();
    }
    let outcome = match read {
        Some(Ok(())) if roll.closed.load(Ordering::Acquire) => Outcome::TakenBack,
        Some(Ok(())) => install(shared, job),
        Some(Err(failure)) => Outcome::Failed(why(shared, failure)),
        None => Outcome::Failed(panicked()),
    };
    if let Outcome::Failed(_why) = &outcome {
        tell!(
            WARN,
            "kiomap::source",
            "could not be read",
            engine = shared.id,
            vmap = job.subject.vmap.id,
            page = job.pages.start,
            nr_pages = job.pages.end - job.pages.start,
            why = format!("{_why:?}")
        );
    }
    outcome
}

/// Puts a failure in words, and frees it, so that the fault-handling thread needn't. Both may be code of the application.
fn why(shared: &EngineShared, failure: ReadFailure) -> Why {
    let why = contain(shared, || Why::new(FailureCause::Error(failure.errno()), &failure));
    contain(shared, || drop(failure));
    why.unwrap_or_else(panicked)
}

fn panicked() -> Why {
    Why::new(FailureCause::Panicked, "its source panicked")
}

fn install(shared: &EngineShared, job: &ReadJob) -> Outcome {
    let ReadJob { subject, generation, pages, lent, .. } = job;
    let vmap = &subject.vmap;
    // A list without a window has no pages.
    let Some(window) = &subject.window else { return Outcome::TakenBack };
    let filled = match lent.huge {
        Some(page) => vmap.fill_huge_read(window, *generation, pages.start, &lent.buffer.0[..page.bytes()]),
        None => {
            let bytes = (pages.end - pages.start) as usize * page_size();
            vmap.fill_read(window, *generation, pages.start, &lent.buffer.0[..bytes])
        }
    };
    for counters in [&shared.counters.pages_copied, &shared.counters.pages_read_by_workers]
        .into_iter()
        .chain([&vmap.counters.pages_copied, &vmap.counters.pages_read_by_workers])
    {
        crate::stats::add(counters, filled.pages);
    }
    match filled.stop {
        None => Outcome::Installed { pages: filled.pages },
        Some(Unfilled::TakenBack) => Outcome::TakenBack,
        Some(Unfilled::Refused(stop)) => {
            let errno = if stop == Stop::NoMemory { Errno::ENOMEM } else { Errno::EIO };
            Outcome::Failed(Why::new(FailureCause::Error(errno), stop))
        }
    }
}
