//! The threads that do jobs in the background. They are started for the jobs and end with the last: idle, they cost nothing.

use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use super::jobs::{Job, Next, Step};
use super::shared::EngineShared;
use super::threads::{self, Role, contain};
use crate::Error;

/// Has jobs done, by as many threads as they are, if these can be started; by one at the least. Threads that are there already
/// are of them.
///
/// # Errors
///
/// [`Error::Shutdown`]; [`Error::Sys`] when no thread can be started. The jobs are given back.
pub(crate) fn submit(shared: &Arc<EngineShared>, steps: Vec<Step>) -> Result<(), (Error, Vec<Step>)> {
    let mut queue = shared.jobs.queue();
    if queue.stopped {
        return Err((Error::Shutdown, steps));
    }
    queue.threads.retain(|thread| !thread.is_finished());
    while queue.running < steps.len() {
        let its = Arc::clone(shared);
        // One that is not counted as running has ended, or will without looking again.
        match threads::spawn(Role::Populate, shared.id, move || run(&its)) {
            Ok(thread) => queue.threads.push(thread),
            // Those that are there do all.
            Err(_) if queue.running > 0 => break,
            Err(error) => return Err((error, steps)),
        }
        queue.running += 1;
    }
    let due = Instant::now();
    queue.jobs.extend(steps.into_iter().map(|step| Job { step, due }));
    shared.jobs.news.notify_all();
    Ok(())
}

/// Drops all jobs and refuses others; answers with the threads that may be running still, to be joined.
pub(crate) fn stop(shared: &EngineShared) -> Vec<JoinHandle<()>> {
    let mut queue = shared.jobs.queue();
    queue.stopped = true;
    let (jobs, threads) = (std::mem::take(&mut queue.jobs), std::mem::take(&mut queue.threads));
    shared.jobs.news.notify_all();
    drop(queue);
    drop(jobs);
    threads
}

/// Takes turns with the steps of all jobs until there is none that another thread is not at.
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
            queue.running -= 1;
            return None;
        };
        let waited = shared.jobs.news.wait_timeout(queue, due.saturating_duration_since(now));
        queue = waited.unwrap_or_else(PoisonError::into_inner).0;
    }
}
