//! A large range brought by several threads: the one that asks, and some that are started for it and end with it.
//!
//! They take steps from one cursor, so that none waits for another that has more to do. Each step is what it is on one
//! thread; what could not be had is put together by address, so that the answer is the same too.

use std::panic::resume_unwind;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, available_parallelism};

use super::{Piece, STEP_PAGES, Task};
use crate::page::page_size;
use crate::process::depth;
use crate::runtime::threads::{self, Role};
use crate::vmap::fill::nothing_until;
use crate::{Error, Result};

/// Up to here a range is brought by the caller alone: starting threads would take a good part of the time.
const ALONE_BYTES: usize = 32 << 20;
/// Threads for one call, the caller with them.
const MOST_THREADS: usize = 4;

/// How many threads bring a range: no more than processors that the calling thread may use.
pub(super) fn threads_for(bytes: usize) -> usize {
    if bytes <= ALONE_BYTES {
        return 1;
    }
    available_parallelism().map_or(1, |processors| processors.get().min(MOST_THREADS))
}

/// Brings the pages of a task on the calling thread and on `threads - 1` others, or as many as can be started.
pub(super) fn bring(task: &mut Task, threads: usize) -> Result<()> {
    let engine = task.shared.id;
    let whole = Whole { task: task.split_off(task.end), piece: None, failed: None };
    let common = Arc::new(Common { whole: Mutex::new(whole), depth: depth() });
    let mut helpers = Helpers { threads: Vec::with_capacity(threads - 1), depth: common.depth };
    for _ in 1..threads {
        let common = Arc::clone(&common);
        let body = move || {
            common.work();
            if depth() != common.depth {
                // The end of a list, which may be the application's code, forked here, and returned in the child.
                threads::end_child();
            }
        };
        // The others do its work then.
        let Ok(thread) = threads::spawn(Role::Populate, engine, body) else { break };
        helpers.threads.push(thread);
    }
    common.work();
    if common.is_elsewhere() {
        return Err(Error::NotOwner { what: "going on with populating, in a child that was forked meanwhile" });
    }
    helpers.join();
    let mut whole = common.whole();
    task.absorb(&mut whole.task);
    whole.failed.take().map_or(Ok(()), Err)
}

/// What the threads share.
struct Common {
    whole: Mutex<Whole>,
    /// The process in which this began.
    depth: u32,
}

struct Whole {
    /// What is not taken yet, and what could not be had of the steps that have ended.
    task: Task,
    /// The piece that the next step is of.
    piece: Option<Piece>,
    /// Why no step is taken any more.
    failed: Option<Error>,
}

impl Common {
    /// Tells whether this is a child that was forked meanwhile: its copy of the lock may be another thread's.
    fn is_elsewhere(&self) -> bool {
        depth() != self.depth
    }

    fn whole(&self) -> MutexGuard<'_, Whole> {
        self.whole.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes steps until there is none left.
    fn work(&self) {
        while let Some((mut part, piece)) = self.take() {
            let outcome = part.bring_piece(&piece);
            if self.is_elsewhere() {
                return;
            }
            let mut whole = self.whole();
            whole.task.absorb(&mut part);
            if let Err(error) = outcome {
                whole.failed.get_or_insert(error);
            }
        }
    }

    fn take(&self) -> Option<(Task, Piece)> {
        let mut whole = self.whole();
        let whole = &mut *whole;
        if whole.failed.is_some() {
            return None;
        }
        whole.take().unwrap_or_else(|error| {
            whole.failed = Some(error);
            None
        })
    }
}

impl Whole {
    /// Takes the next step.
    fn take(&mut self) -> Result<Option<(Task, Piece)>> {
        let Whole { task, piece, .. } = self;
        if task.at == task.end {
            return Ok(None);
        }
        if piece.as_ref().is_none_or(|piece| piece.range.end <= task.at) {
            *piece = task.piece()?;
        }
        let Some(piece) = piece.clone() else {
            task.rest_is_unmapped();
            return Ok(None);
        };
        let first = piece.pgoff_of(task.at);
        let pages =
            nothing_until(&task.core.contents().list, task.core.page(), first).map_or(STEP_PAGES, |end| end - first);
        // A hole takes no time. No huge page is brought by two.
        let end = task.core.page().whole(first.saturating_add(pages)).unwrap_or(u64::MAX);
        let bytes = usize::try_from(end - first).ok().and_then(|pages| pages.checked_mul(page_size()));
        let end = bytes.and_then(|bytes| task.at.checked_add(bytes)).unwrap_or(usize::MAX);
        Ok(Some((task.split_off(end.min(piece.range.end)), piece)))
    }
}

/// The threads that were started for a call; none outlives it.
struct Helpers {
    threads: Vec<JoinHandle<()>>,
    depth: u32,
}

impl Helpers {
    /// Waits until they have ended. What one of them panicked of goes on here, as if it had been this thread.
    fn join(mut self) {
        let mut panicked = None;
        for thread in std::mem::take(&mut self.threads) {
            if let Err(panic) = thread.join() {
                panicked.get_or_insert(panic);
            }
        }
        if let Some(panic) = panicked {
            resume_unwind(panic);
        }
    }
}

impl Drop for Helpers {
    fn drop(&mut self) {
        for thread in self.threads.drain(..) {
            if depth() == self.depth {
                let _ = thread.join();
            } else {
                // It is not here, and nothing of it may be touched.
                std::mem::forget(thread);
            }
        }
    }
}
