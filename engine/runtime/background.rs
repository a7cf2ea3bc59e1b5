//! The thread that does jobs in the background. It is started by the first and ends with the last: idle, it costs nothing.

use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use super::jobs::{Job, Next, Step};
use super::shared::EngineShared;
use super::threads::{self, Role, contain};
use crate::{Error, Result};

/// Has a job done.
///
/// # Errors
///
/// [`Error::Shutdown`]; [`Error::Sys`] when the thread can't be started. The job is dropped then.
pub(crate) fn submit(shared: &Arc<EngineShared>, step: Step) -> Result<()> {
    let mut queue = shared.jobs.queue();
    if queue.stopped {
        return Err(Error::Shutdown);
    }
    if !queue.running {
        let its = Arc::clone(shared);
        // The one before has ended, or will without looking again.
        queue.thread = Some(threads::spawn(Role::Populate, shared.id, move || run(&its))?);
        queue.running = true;
    }
    queue.jobs.push_back(Job { step, due: Instant::now() });
    shared.jobs.news.notify_all();
    Ok(())
}

/// Drops all jobs and refuses others; answers with the thread, if it may be running still, to be joined.
pub(crate) fn stop(shared: &EngineShared) -> Option<JoinHandle<()>> {
    let mut queue = shared.jobs.queue();
    queue.stopped = true;
    let (jobs, thread) = (std::mem::take(&mut queue.jobs), queue.thread.take());
    shared.jobs.news.notify_all();
    drop(queue);
    drop(jobs);
    thread
}

/// Takes turns with the steps of all jobs until there is none.
fn run(shared: &Arc<EngineShared>) {
    while let Some((mut job, nudges)) = next_job(shared) {
        let next = contain(shared, || (job.step)()).unwrap_or(Next::Finished);
        if shared.is_child() {
            threads::end_child();
        }
        if let Next::After(due) = next {
            let mut queue = shared.jobs.queue();
            if !queue.stopped {
                let due = if queue.nudges == nudges { due } else { Instant::now() };
                queue.jobs.push_back(Job { due, ..job });
                continue;
            }
        }
        // What it held may be the last that keeps a list alive.
        contain(shared, || drop(job));
    }
}

/// Waits for the next job that is due, and tells how often jobs were nudged by then; `None` when there is none left, and the thread is to end.
fn next_job(shared: &EngineShared) -> Option<(Job, u64)> {
    let mut queue = shared.jobs.queue();
    loop {
        let now = Instant::now();
        if let Some(index) = queue.jobs.iter().position(|job| job.due <= now) {
            let nudges = queue.nudges;
            return queue.jobs.remove(index).map(|job| (job, nudges));
        }
        let Some(due) = queue.jobs.iter().map(|job| job.due).min() else {
            queue.running = false;
            return None;
        };
        let waited = shared.jobs.news.wait_timeout(queue, due.saturating_duration_since(now));
        queue = waited.unwrap_or_else(PoisonError::into_inner).0;
    }
}
