//! A restore from its first task to its last page.
//!
//! Until CRIU says that the tree runs, pages are brought when they are touched. Then all that is missing is brought, and the tasks
//! need nobody any more. Whatever goes wrong in between, what a task lacks is SIGBUS from then on: memory that is
//! merely let go of would show zeros.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use anyhow::{Context, Result, bail, ensure};
use kiomap::{AdoptOptions, Adopted, AdoptedArea, Engine, Outside, Release, Vmap};

use super::conversation::{Announced, Conversation};
use super::list::{Place, TaskImage};
use super::stop::Stop;

/// Ranges of memory with lazy pages that a task may have: what an engine takes.
const RANGES_MAX: usize = 1 << 16;

/// A task whose pages can be served: its image, published.
pub(crate) struct Task {
    pub(crate) pid: i32,
    pub(crate) nr_pages: u64,
    places: Vec<Place>,
    /// None if it has no lazy pages.
    vmap: Option<Vmap>,
}

/// A task that is served.
struct Served {
    pid: i32,
    adopted: Adopted,
}

impl Task {
    /// Publishes the image of a task.
    pub(crate) fn publish(engine: &Engine, image: TaskImage) -> Result<Task> {
        let (nr_ranges, nr_pages) = (image.places.len(), image.list.nr_pages());
        ensure!(nr_ranges <= RANGES_MAX, "task {} has {nr_ranges} ranges of lazy pages, over {RANGES_MAX}", image.pid);
        let vmap = (nr_pages > 0).then(|| engine.vmap(&image.list)).transpose();
        let vmap = vmap.with_context(|| format!("publishing the {nr_pages} pages of task {}", image.pid))?;
        Ok(Task { pid: image.pid, nr_pages, places: image.places, vmap })
    }

    fn areas(&self) -> Vec<AdoptedArea> {
        let of = |vmap| {
            let area =
                move |place: &Place| AdoptedArea::new(place.start as usize..place.end as usize, vmap, place.pgoff);
            self.places.iter().map(area)
        };
        self.vmap.iter().flat_map(of).collect()
    }
}

/// Serves the restore of a tree: `pids` are those of its tasks, of which `tasks` have memory. `tell` is told what happens.
pub(crate) fn serve(
    engine: &Engine,
    pids: &[i32],
    tasks: &BTreeMap<i32, Task>,
    conversation: &Conversation<'_>,
    stop: &Stop,
    tell: &dyn Fn(&str),
) -> Result<()> {
    let mut served = Vec::new();
    let filled =
        take_over(engine, pids, tasks, conversation, &mut served, tell).and_then(|()| fill(&served, stop, tell));
    let how = if filled.is_ok() { Release::Fill } else { Release::Poison };
    let mut outcome = filled.and_then(|lost| {
        let lost: Vec<_> = lost.iter().map(|(pid, nr_pages)| format!("{nr_pages} pages of task {pid}")).collect();
        ensure!(lost.is_empty(), "{} can't be read: they are SIGBUS there", lost.join(", "));
        Ok(())
    });
    // Each of them, whatever became of the one before.
    for Served { pid, adopted } in served {
        if let Err(error) = adopted.release(how).with_context(|| format!("letting go of task {pid}")) {
            match outcome {
                Ok(()) => outcome = Err(error),
                // The first thing that went wrong is what the program fails with.
                Err(_) => tell(&format!("{error:#}")),
            }
        }
    }
    outcome
}

/// Takes the tasks over as they come, until the tree runs.
fn take_over(
    engine: &Engine,
    pids: &[i32],
    tasks: &BTreeMap<i32, Task>,
    conversation: &Conversation<'_>,
    served: &mut Vec<Served>,
    tell: &dyn Fn(&str),
) -> Result<()> {
    let mut expected = pids.to_vec();
    while !expected.is_empty() {
        let came = pids.len() - expected.len();
        let Announced { pid, uffd } =
            conversation.next_task().with_context(|| format!("after {came} of {} tasks", pids.len()))?;
        let Some(at) = expected.iter().position(|expected| *expected == pid) else {
            let why = if pids.contains(&pid) { "came before" } else { "is not in pstree.img" };
            bail!("task {pid} {why}");
        };
        expected.swap_remove(at);
        let Some(uffd) = uffd else {
            // It would be restored without them.
            let nr_pages = tasks.get(&pid).map_or(0, |task| task.nr_pages);
            ensure!(nr_pages == 0, "task {pid} came as a zombie, and has {nr_pages} lazy pages in the images");
            tell(&format!("task {pid} is a zombie"));
            continue;
        };
        let task = tasks.get(&pid).with_context(|| format!("task {pid} has no pagemap in the images"))?;
        // Its pid is the one of the images, which may be another's here: nothing is opened by it.
        let options = AdoptOptions::new().outside(Outside::Zeros);
        let adopted = engine.adopt(uffd, &task.areas(), options).with_context(|| format!("taking over task {pid}"))?;
        tell(&format!("task {pid}: {} pages in {} ranges", task.nr_pages, task.places.len()));
        served.push(Served { pid, adopted });
    }
    conversation.wait_restored().with_context(|| format!("after {} of {} tasks", pids.len(), pids.len()))?;
    tell("the tree is restored");
    Ok(())
}

/// Brings every page that is missing, task by task; answers with the tasks that have pages which can't be had.
fn fill(served: &[Served], stop: &Stop, tell: &dyn Fn(&str)) -> Result<Vec<(i32, u64)>> {
    let mut lost = Vec::new();
    for Served { pid, adopted } in served {
        let mut failed = 0;
        let filled = adopted.fill(|progress| {
            failed = progress.pages_failed;
            // A signal that can't be looked for asks for nothing.
            if stop.is_asked().unwrap_or(false) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        stop.check()?;
        filled.with_context(|| format!("filling task {pid}"))?;
        if failed > 0 {
            lost.push((*pid, failed));
        } else {
            tell(&format!("task {pid} is filled"));
        }
    }
    Ok(lost)
}
