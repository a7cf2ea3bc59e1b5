//! Jobs in the background: what is to be done step by step when nothing better is to be done.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

/// What a step of a job says about the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// There is none.
    Finished,
    /// Not before this, unless something about the job has changed.
    After(Instant),
}

/// A step of a job. Dropped when the job is finished or never will be.
pub(crate) type Step = Box<dyn FnMut() -> Next + Send>;

/// A job that waits for its next step.
pub(crate) struct Job {
    pub(crate) step: Step,
    pub(crate) due: Instant,
}

/// What waits, and who does it.
#[derive(Default)]
pub(crate) struct Queue {
    pub(crate) jobs: VecDeque<Job>,
    /// Threads that were started and have not found the queue empty since.
    pub(crate) running: usize,
    /// Those, and some that have ended.
    pub(crate) threads: Vec<JoinHandle<()>>,
    /// How often jobs were to be looked at: also the one that was not here, because a step of it ran.
    pub(crate) nudges: u64,
    /// After a shutdown nothing is taken any more.
    pub(crate) stopped: bool,
}

/// The jobs of an engine.
#[derive(Default)]
pub(crate) struct Jobs {
    queue: Mutex<Queue>,
    /// Signalled when a job came, changed, or is to end.
    pub(super) news: Condvar,
}

impl Jobs {
    /// Held for a moment only, and never while a step runs or a job is dropped.
    pub(crate) fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has every job looked at now: something about one has changed.
    pub(crate) fn nudge(&self) {
        let mut queue = self.queue();
        queue.nudges += 1;
        queue.jobs.iter_mut().for_each(|job| job.due = Instant::now());
        drop(queue);
        self.news.notify_all();
    }
}
