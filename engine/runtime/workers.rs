//! Threads that read pages from where reading may take long: files that are not cached, and page sources.
//!
//! A worker only reads into a buffer. Installing the pages stays with the fault-handling thread, so that one code
//! path deals with unmapped areas, present pages and changing address spaces.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use crossbeam_channel::{Receiver, Sender};
use nix::errno::Errno;

use super::bell::Bell;
use super::command::{ReadDone, ReadJob};
use super::shared::EngineShared;
use super::threads::contain;
use crate::page::page_size;
use crate::stats::add;

/// The thread ids of the workers, as a fault message names them.
pub(crate) type WorkerIds = Arc<[AtomicI32]>;

/// Reads jobs until their sender is gone.
pub(crate) fn run(
    shared: &EngineShared,
    index: usize,
    ids: &WorkerIds,
    jobs: &Receiver<ReadJob>,
    done: &Sender<ReadDone>,
    bell: &Bell,
) {
    ids[index].store(nix::unistd::gettid().as_raw(), Ordering::Release);
    while let Ok(ReadJob { list, mut order }) = jobs.recv() {
        let bytes = (order.pages.end - order.pages.start) as usize * page_size();
        let read = catch_unwind(AssertUnwindSafe(|| list.read_pages(order.pages.start, &mut order.buffer.0[..bytes])));
        if shared.is_child() {
            // The source forked and returned in the child: nothing of this loop belongs to it.
            return;
        }
        // The failure itself may own memory, which is to be freed here and not by the fault-handling thread.
        let outcome = match read {
            Ok(outcome) => outcome.map_err(|failure| failure.errno()),
            Err(_) => {
                add(&shared.counters.panics, 1);
                Err(Errno::EIO)
            }
        };
        if done.send(ReadDone { order, outcome }).is_err() {
            return;
        }
        bell.ring();
        // Perhaps the last reference; what it keeps alive is the application's.
        contain(shared, || drop(list));
    }
}
