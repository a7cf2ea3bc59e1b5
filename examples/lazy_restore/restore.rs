//! A restore, in a process of its own: everything first, lazily, or lazily with a working set that is replayed.

use std::borrow::Cow;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use kiomap::{Arena, AttachOptions, Engine, Kiobuf, PageSource, PopulateOptions, Shutdown, WorkingSet, page_size};
use serde::{Deserialize, Serialize};

use crate::heap::{self, Heap, Known, Work};
use crate::image::{Far, Storage};
use crate::walk;

/// What everything is read with at once.
pub(crate) const EAGER_THREADS: usize = 4;
const EAGER_BYTES: usize = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum How {
    /// Everything is read before the request is served.
    Eager,
    /// What the request touches is read when it does; its working set is recorded.
    Cold,
    /// The same, and the recorded set is replayed meanwhile.
    Replayed,
}

/// What a process is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Plan {
    pub(crate) how: How,
    pub(crate) storage: Storage,
    pub(crate) known: Known,
    pub(crate) slab_pages: u64,
    pub(crate) set: PathBuf,
    /// Bring the rest after the first result, end the engine, and check everything against this.
    pub(crate) fill: Option<String>,
    pub(crate) replay_threads: usize,
    pub(crate) shows_progress: bool,
}

/// What came of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Outcome {
    pub(crate) how: How,
    /// From the start of the process's work until the request was answered, rightly.
    pub(crate) first_result_ms: f64,
    pub(crate) faults: u64,
    /// Pages of the image that were in memory when the request was answered.
    pub(crate) pages: u64,
    /// Of the storage, by then.
    pub(crate) reads: u64,
    pub(crate) bytes_read: u64,
    /// Pages that the working set has: recorded, or replayed.
    pub(crate) set_pages: u64,
    /// The rest was brought, and all is as it was, without the engine.
    pub(crate) filled: bool,
}

pub(crate) fn run(plan: &Plan) -> Result<Outcome> {
    match plan.how {
        How::Eager => eager(plan),
        How::Cold | How::Replayed => lazy(plan),
    }
}

/// Serves the request, and checks its answer.
fn serve(plan: &Plan, bytes: &[u8]) -> Result<()> {
    let known = &plan.known;
    let answer = match known.work {
        Work::Lookups { first_key, number } => {
            let (answer, lookups) = Heap::open(bytes)?.request(first_key, heap::slab_records(plan.slab_pages))?;
            ensure!(lookups == number, "the request took {lookups} lookups, not {number}");
            answer
        }
        Work::Walk { seed, steps } => {
            let look = |range: Range<u64>| Ok(Cow::Borrowed(&bytes[range.start as usize..range.end as usize]));
            walk::walk(known.len_bytes, plan.slab_pages, steps, seed, look)?.answer
        }
    };
    ensure!(answer == known.answer, "the request answered {answer:#x}, and {:#x} is right", known.answer);
    Ok(())
}

/// Opens the image, which must be as long as the heap.
fn open(plan: &Plan) -> Result<(Kiobuf, Arc<dyn PageSource>, Arc<Far>)> {
    let (list, source, far) = plan.storage.open()?;
    let nr_pages = plan.known.len_bytes.div_ceil(page_size() as u64);
    ensure!(list.nr_pages() == nr_pages, "the image has {} pages, and the heap {nr_pages}", list.nr_pages());
    Ok((list, source, far))
}

fn eager(plan: &Plan) -> Result<Outcome> {
    let start = Instant::now();
    let (list, source, far) = open(plan)?;
    let mut memory = Arena::new(list.nr_pages() as usize)?;
    let next = AtomicU64::new(0);
    let parts: Vec<_> = memory.chunks_mut(EAGER_BYTES).map(|part| std::sync::Mutex::new(Some(part))).collect();
    let len_bytes = plan.known.len_bytes;
    let read = || -> Result<()> {
        loop {
            let part = next.fetch_add(1, Ordering::Relaxed);
            let Some(place) = parts.get(part as usize) else { return Ok(()) };
            let buf = place.lock().expect("nobody panics").take().expect("each part is taken once");
            let at = part * EAGER_BYTES as u64;
            let len = (len_bytes - at).min(buf.len() as u64) as usize;
            source.read_at(at, &mut buf[..len]).context("reading the image")?;
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..EAGER_THREADS).map(|_| scope.spawn(read)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("reading does not panic"))
    })?;
    drop(parts);
    serve(plan, &memory[..len_bytes as usize])?;
    let first_result_ms = start.elapsed().as_secs_f64() * 1e3;
    let (reads, bytes_read) = far.counts();
    let pages = list.nr_pages();
    Ok(Outcome { how: plan.how, first_result_ms, faults: 0, pages, reads, bytes_read, set_pages: 0, filled: false })
}

fn lazy(plan: &Plan) -> Result<Outcome> {
    let start = Instant::now();
    let (list, _, far) = open(plan)?;
    let engine = Engine::new().context("building the engine (`cargo run --example doctor` says what is lacking)")?;
    let vmap = engine.vmap_builder(&list).record_working_set().build()?;
    let region = vmap.attach(&AttachOptions::new().read_only())?;
    let mut set_pages = 0;
    let replay = match plan.how {
        How::Replayed => {
            let set = WorkingSet::load(&plan.set).context("loading the working set")?;
            set_pages = set.pages().len() as u64;
            Some(region.replay(&set, PopulateOptions::new().threads(plan.replay_threads))?)
        }
        _ => None,
    };
    // SAFETY: nobody writes to the region, and it is read-only.
    let bytes = unsafe { region.as_slice() };
    let bytes = &bytes[..plan.known.len_bytes as usize];
    serve(plan, bytes)?;
    let first_result_ms = start.elapsed().as_secs_f64() * 1e3;
    let (reads, bytes_read) = far.counts();

    engine.settle()?;
    let faults = engine.stats().faults;
    let resident = resident_pages(bytes)?;
    if plan.how == How::Cold {
        let set = vmap.working_set()?;
        set_pages = set.pages().len() as u64;
        set.save(&plan.set).context("saving the working set")?;
    }
    if let Some(replay) = replay {
        let replayed = replay.wait().context("waiting for the replay")?;
        ensure!(replayed.pages_failed == 0, "{} pages of the working set can't be had", replayed.pages_failed);
    }
    let filled = match &plan.fill {
        None => false,
        Some(sha256) => {
            let bar = if plan.shows_progress { ProgressBar::new(list.nr_pages()) } else { ProgressBar::hidden() };
            bar.set_style(ProgressStyle::with_template("filling   {bar:40} {human_pos} of {human_len} pages")?);
            let its = bar.clone();
            let options = PopulateOptions::new()
                .threads(plan.replay_threads)
                .step_bytes(256 * page_size())
                .on_progress(move |now| its.set_position(now.pages_done));
            let filled = region.populate_in_background(0..region.len_bytes(), options)?.wait()?;
            bar.finish_and_clear();
            ensure!(
                filled.pages_done == filled.pages_total && filled.pages_failed == 0,
                "{} of {} pages came, {} can't be had",
                filled.pages_done,
                filled.pages_total,
                filled.pages_failed
            );
            // Nothing is missing any more: what is read now is there without an engine.
            engine.shutdown(Shutdown::Poison)?;
            let found = crate::sha256_of(bytes);
            ensure!(found == *sha256, "the restored heap has SHA-256 {found}, and the image {sha256}");
            true
        }
    };
    Ok(Outcome { how: plan.how, first_result_ms, faults, pages: resident, reads, bytes_read, set_pages, filled })
}

/// Counts the pages of the memory that are in memory.
fn resident_pages(bytes: &[u8]) -> Result<u64> {
    let mut there = vec![0u8; bytes.len().div_ceil(page_size())];
    // SAFETY: mincore(2) writes a byte for each page of `bytes`, which begins on a page's border.
    let answer = unsafe { libc::mincore(bytes.as_ptr().cast_mut().cast(), bytes.len(), there.as_mut_ptr()) };
    nix::errno::Errno::result(answer).context("mincore of the region")?;
    Ok(there.iter().filter(|&&page| page & 1 == 1).count() as u64)
}
