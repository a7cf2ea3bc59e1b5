//! Threads that read pages from where reading may take long: files that are not cached, and page sources.
//!
//! A worker only reads into a buffer. Installing the pages stays with the fault-handling thread, so that one code
//! path deals with unmapped areas, present pages and changing address spaces.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use crossbeam_channel::{Receiver, Sender};
use nix::errno::Errno;

use super::bell::Bell;
use super::command::{ReadDone, ReadJob};
use super::handles::Request;
use super::huge;
use super::shared::EngineShared;
use super::threads::{self, contain};
use crate::page::page_size;
use crate::trace::tell;

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
        // A failure may own memory, which is to be freed here and not by the fault-handling thread.
        let read = contain(shared, || {
            if order.huge.is_some() {
                return huge::read(&list, order.pages.clone(), &mut order.buffer.0);
            }
            let bytes = (order.pages.end - order.pages.start) as usize * page_size();
            let read = list.read_pages(order.pages.start, &mut order.buffer.0[..bytes]);
            read.map_err(|failure| failure.errno())
        });
        // Perhaps the last reference: the code of what the list keeps alive is the application's too.
        if shared.recognises_workers() {
            contain(shared, || drop(list));
        } else {
            // It might touch a page that only a worker could read, and nobody would know it.
            shared.keeper.send(Request::Drop { _list: list });
        }
        if shared.is_child() {
            threads::end_child();
        }
        let outcome = read.unwrap_or(Err(Errno::EIO));
        if outcome.is_err() {
            tell!(
                WARN,
                "kiomap::source",
                "could not be read",
                engine = shared.id,
                vmap = order.vmap,
                page = order.pages.start,
                nr_pages = order.pages.end - order.pages.start,
                why = format!("{outcome:?}")
            );
        }
        if done.send(ReadDone { order, outcome }).is_err() {
            return;
        }
        bell.ring();
    }
}
