//! A shared heap: the sample driver of the kiobuf-mapping patch of March 2000, as a program.
//!
//! The driver allocated 100 pages, filled them with 0xff and let any number of processes map them; it counted the
//! mappings and was told when the last one went. This does the same from user space, with forked processes that check
//! each other, and verifies every number on the way:
//!
//! ```text
//! cargo run --release --example shared_heap -- --pages 100 --processes 4 --rounds 1000
//! ```
//!
//! It reads top to bottom: `main.rs` is the story, `heap.rs` says what lies where in the heap, `process.rs` forks and
//! keeps step, `report.rs` prints.

mod heap;
mod process;
mod report;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use kiomap::{Arena, AttachOptions, Engine, Kiobuf, Region, Vmap, page_size};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;

use heap::{FILL_BYTE, Heap, Layout};
use process::{Barrier, Process};
use report::{Count, Report, Row};

/// The most pages that one fault brings, if there are that many for each process.
const BLOCK_PAGES_MAX: u64 = 16;
/// Far longer than a callback takes; a program that hangs helps nobody.
const CALLBACK_DEADLINE: Duration = Duration::from_secs(30);

/// Shares a heap of pages between forked processes and verifies what they see.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// Pages in the heap, 2 to 1000000
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(2..=1_000_000))]
    pages: u64,
    /// Processes that share it, 1 to 64 (one more goes past the end of the list and dies)
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=64))]
    processes: u64,
    /// Times that each process bumps the shared counter
    #[arg(long, default_value_t = 1000)]
    rounds: u64,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // With its causes, in one line.
            eprintln!("shared_heap: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let bumps = options.processes.checked_mul(options.rounds);
    let bumps = bumps.context("--processes times --rounds must fit in 64 bits")?;
    check_memory(options)?;
    let layout = Layout {
        nr_pages: options.pages,
        processes: options.processes,
        // Small enough that each process has pages of its own to fault in.
        block_pages: previous_power_of_two((options.pages / options.processes).clamp(1, BLOCK_PAGES_MAX)),
    };

    // The heap: pages of our own, with defined contents before anybody can map them.
    let mut arena = Arena::new(options.pages as usize).context("allocating the heap")?;
    arena.fill(FILL_BYTE);
    let mut list = Kiobuf::new();
    list.map_kernel(arena).context("listing the pages of the heap")?;

    // Publishing it, with a callback for when nobody uses it any more.
    let engine = Engine::builder()
        .fault_around_pages(layout.block_pages as usize)
        .build()
        .context("building the engine (`cargo run --example doctor` says what this machine lacks)")?;
    let fired = Arc::new(AtomicU64::new(0));
    let (deref_seen, deref) = mpsc::channel();
    let vmap = engine
        .vmap_builder(&list)
        .on_deref({
            let fired = Arc::clone(&fired);
            move |vmap| {
                fired.fetch_add(1, Ordering::SeqCst);
                // The receiver is there until the program ends.
                let _ = deref_seen.send(vmap.refcount());
            }
        })
        .build()
        .context("publishing the heap")?;
    let mut story = Story { engine: &engine, vmap: &vmap, fired: &fired, counts: Vec::new() };
    story.count("published", 0)?;

    let region = vmap.attach(&AttachOptions::new()).context("attaching the heap")?;
    ensure!(region.is_first(), "the first attach was not told that it is the first");
    story.count("attached by the driver", 1)?;

    // A forked process has the region at the same address; no call of its own is needed.
    let mut workers = Vec::new();
    for index in 0..options.processes {
        let heap = Heap { region: &region, layout };
        let worker = Process::fork(|barrier| work(&heap, index, options.rounds, barrier));
        let mut worker = worker.with_context(|| format!("forking process {}", index + 1))?;
        worker.wait_until_ready()?;
        workers.push(worker);
        story.count(format!("process {} forked", index + 1), 2 + index as usize)?;
    }
    let all = 1 + workers.len();
    let mut trespasser = Process::fork(|barrier| trespass(&vmap, layout, barrier)).context("forking the trespasser")?;
    trespasser.wait_until_ready()?;
    story.count("trespasser forked, and attached a longer region too", all + 2)?;

    // Each step of `work`, all processes at once; nobody begins a step before all have ended the one before.
    for step in ["faulting its pages in", "finding the fill", "marking its pages", "counting", "reading all marks"] {
        workers.iter_mut().try_for_each(Process::go)?;
        for worker in &mut workers {
            worker.wait_until_ready().context(step)?;
        }
    }

    // Who faulted what, while they all live.
    let rows = rows(&engine, layout, &workers, &trespasser)?;

    trespasser.go()?;
    let death = trespasser.reap()?;
    ensure!(
        matches!(death, WaitStatus::Signaled(_, Signal::SIGBUS, _)),
        "the trespasser should have died of SIGBUS, not ended as {death:?}"
    );
    story.count("trespasser died of SIGBUS, as it should", all)?;

    // The heap does not need its creator's region: it lives as long as anybody has one.
    drop(region);
    story.count("detached by the driver", all - 1)?;

    for (left, worker) in (0..workers.len()).rev().zip(&mut workers) {
        worker.go()?;
        let end = worker.reap()?;
        ensure!(matches!(end, WaitStatus::Exited(_, 0)), "a process ended as {end:?}");
        story.count("a process exited", left)?;
    }
    let counts = story.counts;

    // After the last exit, and only then: the callback.
    let refcount = deref.recv_timeout(CALLBACK_DEADLINE).context("the deref callback did not fire")?;
    ensure!(matches!(refcount, Ok(0)), "the deref callback found a count of {refcount:?}");

    // The contents outlive the processes; the vmap's owner reads them without a region.
    let counter = layout.counter_of(&vmap)?;
    ensure!(counter == bumps, "the counter was bumped {counter} times, not {bumps} times");

    let way = engine.open_way().to_string();
    engine.shutdown(kiomap::Shutdown::Poison).context("shutting the engine down")?;
    let fired = fired.load(Ordering::SeqCst);
    ensure!(fired == 1, "the deref callback fired {fired} times, not once");

    Report { layout, rounds: options.rounds, way, rows, counts, counter, deref_callbacks: fired }.print(options.json)
}

/// What each process does. `barrier.pass()` returns when every process has come as far.
fn work(heap: &Heap<'_>, index: u64, rounds: u64, barrier: &mut Barrier) -> Result<()> {
    // For want of descriptors, say, a fork may succeed and the region not be there; this says why.
    heap.region.check()?;
    barrier.pass()?;
    // Every page is first touched by one process, so that it is known beforehand who faults what.
    heap.fault_in(index)?;
    barrier.pass()?;
    // Nobody has marked anything yet: whatever is not the fill is wrong.
    heap.check_fill()?;
    barrier.pass()?;
    heap.mark(index)?;
    barrier.pass()?;
    heap.bump_counter(rounds)?;
    barrier.pass()?;
    // All have marked and counted: every mark and the count must be there, and the rest still be the fill.
    heap.check_marks(rounds)?;
    barrier.pass()
}

/// What the trespasser does: a region may be longer than its list, but what lies past the end is SIGBUS.
fn trespass(vmap: &Vmap, layout: Layout, barrier: &mut Barrier) -> Result<()> {
    // Dying is intended here; a core file is not.
    setrlimit(Resource::RLIMIT_CORE, 0, 0).context("turning core files off")?;
    let end = layout.nr_pages as usize * page_size();
    let longer: Region = vmap.attach(&AttachOptions::new().len_bytes(end + page_size()))?;
    barrier.pass()?;
    Heap { region: &longer, layout }.check_mark(layout.nr_pages - 1).context("the last page of the list")?;
    longer.read_at(end, &mut [0])?;
    bail!("a touch past the end of the list was not a SIGBUS")
}

/// Follows the count, which must be known at every step; the callback must not fire before it is 0 again.
struct Story<'a> {
    engine: &'a Engine,
    vmap: &'a Vmap,
    fired: &'a AtomicU64,
    counts: Vec<Count>,
}

impl Story<'_> {
    fn count(&mut self, stage: impl Into<String>, expected: usize) -> Result<()> {
        let stage = stage.into();
        // The end of a process is counted when the kernel reports it; this waits for what it has reported.
        self.engine.settle()?;
        let refcount = self.vmap.refcount()?;
        ensure!(refcount == expected, "{stage}: {refcount} areas are attached, not {expected}");
        let fired = self.fired.load(Ordering::SeqCst);
        // At 0 again, the callback may fire at any moment.
        ensure!(fired == 0 || expected == 0, "{stage}: the deref callback fired with {refcount} areas attached");
        self.counts.push(Count { stage, refcount });
        Ok(())
    }
}

/// Asks the engine who faulted what, and compares it with what each process must have faulted.
fn rows(engine: &Engine, layout: Layout, workers: &[Process], trespasser: &Process) -> Result<Vec<Row>> {
    // A process that waited for a page may go on before the page is counted.
    engine.settle().context("waiting for the engine's counters")?;
    let spaces = engine.spaces().context("listing the processes")?;
    let mut processes = vec![("driver".to_owned(), std::process::id() as i32, 1, None)];
    for (index, worker) in (0..).zip(workers) {
        processes.push((format!("process {}", index + 1), worker.pid(), 1, Some(index)));
    }
    processes.push(("trespasser".to_owned(), trespasser.pid(), 2, None));
    ensure!(spaces.len() == processes.len(), "the engine serves {} processes, not {}", spaces.len(), processes.len());
    let mut rows = Vec::new();
    for (name, pid, areas, worker) in processes {
        let space = spaces.iter().find(|space| space.pid == pid);
        let space = space.with_context(|| format!("the engine does not know {name}, pid {pid}"))?;
        let row = Row {
            name,
            pid,
            areas: space.areas,
            faults: space.faults,
            pages_installed: space.pages_installed,
            pages_poisoned: space.pages_poisoned,
        };
        let (pages, faults) = worker.map_or((0, 0), |index| (layout.pages_of(index).count(), layout.blocks_of(index)));
        row.verify(areas, pages as u64, faults)?;
        rows.push(row);
    }
    let sum = Row::sum(&rows);
    let stats = engine.stats();
    ensure!(sum.pages_installed == layout.nr_pages, "{} pages were installed, each once", sum.pages_installed);
    ensure!(stats.pages_copied == layout.nr_pages, "the engine counts {} installed pages", stats.pages_copied);
    ensure!(stats.faults == sum.faults, "the engine counts {} faults, its processes {}", stats.faults, sum.faults);
    Ok(rows)
}

/// Refuses a heap for which there is no memory: being killed for want of it would be a poor error message.
fn check_memory(options: &Options) -> Result<()> {
    // The list's page, the shared page, and an entry in each process's page tables.
    let needed = options.pages * (2 * page_size() as u64 + 8 * (options.processes + 2));
    let text = std::fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let available = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    let available = available.context("/proc/meminfo has no MemAvailable")? * 1024;
    ensure!(
        needed <= available,
        "a heap of {} pages takes {} MiB of memory, and {} MiB are available: lower --pages",
        options.pages,
        needed >> 20,
        available >> 20
    );
    Ok(())
}

fn previous_power_of_two(n: u64) -> u64 {
    1 << n.ilog2()
}
