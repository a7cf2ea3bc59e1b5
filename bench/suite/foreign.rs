//! Faults served for another process, by the userfaultfd that it has made and handed over.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kiomap::{AdoptOptions, AdoptedArea, Engine, EngineBuilder, Refusal, page_size};

use crate::common::floor::{With, serve};
use crate::common::numbers::shuffle;
use crate::common::raw::{FEATURE_THREAD_ID, Mapping, Memory};
use crate::common::touch::Contents;
use crate::memory::{Access, Place, all_was_had, begin, list, timed, whole};
use crate::peer::{Peer, Task};
use crate::series::{Bench, Group, Sample, Series};

/// Of so many pages, one is touched at random.
const SPARSE: usize = 32;
/// How long an engine may take to see that a process has ended.
const NOTICED: Duration = Duration::from_secs(5);

/// Pages to touch, of so many.
type Order = (usize, Vec<usize>);

/// Touches pages of a process for which a bare loop answers.
fn by_floor(bench: &Bench, task: Task, around: usize) -> Result<Sample> {
    let pages = task.pages;
    let (peer, uffd) = Peer::start(bench, Task { for_floor: true, ..task })?;
    let floor = serve(uffd, peer.base, pages, With::Copy(around), bench.source.clone())?;
    let sample = peer.touch(bench)?;
    floor.join().ok().context("the floor's handler panicked")?;
    Ok(sample)
}

/// Touches pages of a process that an engine has adopted.
fn by_engine(bench: &Bench, task: Task, builder: EngineBuilder) -> Result<Sample> {
    let pages = task.pages;
    let engine = builder.build().context("building an engine")?;
    let vmap = engine.vmap(&list(&bench.source, pages)?).context("publishing a list")?;
    let (peer, uffd) = Peer::start(bench, task)?;
    let area = AdoptedArea::new(peer.base..peer.base + pages * page_size(), &vmap, 0);
    // Nothing is refused; where a page can't be made a SIGBUS, only this is to be had.
    let options = AdoptOptions::new().pidfd(peer.pidfd()?).refusal(Refusal::Kill);
    let adopted = engine.adopt(uffd.into_fd(), &[area], options).context("adopting a process")?;
    let sample = peer.touch(bench)?;
    ensure!(adopted.wait_gone(NOTICED), "the engine has not seen that a process has ended");
    all_was_had(&engine)?;
    Ok(sample)
}

pub(crate) fn group(bench: &Bench) -> Group {
    let touches = bench.extent(8192, 1024);
    let sparse = move |repetition: usize| -> Order {
        let mut order: Vec<usize> = (0..touches).collect();
        shuffle(&mut order, repetition as u64 + 1);
        // Not the same page of each block: nothing is to be learned from where the last one was.
        order.iter_mut().for_each(|n| *n = *n * SPARSE + n.wrapping_mul(0x9E37_79B9) / 64 % SPARSE);
        (touches * SPARSE, order)
    };
    let random = move |repetition: usize, features: u64| {
        let (pages, order) = sparse(repetition);
        Task { pages, order, each: true, features, for_floor: false }
    };
    let floor = |name, about, place| {
        Series::new(name, about, touches, move |bench, repetition| {
            begin(bench, place)?;
            by_floor(bench, random(repetition, FEATURE_THREAD_ID), 1)
        })
        .floor("foreign_floor")
        .native("foreign_native")
    };
    let engine = |name, about, place, features, build: fn(&Bench) -> EngineBuilder| {
        Series::new(name, about, touches, move |bench, repetition| {
            begin(bench, place)?;
            by_engine(bench, random(repetition, features), build(bench))
        })
        .floor("foreign_floor")
        .native("foreign_native")
    };

    let all = bench.extent(1 << 17, 1 << 14);
    let in_order = move || Task {
        pages: all,
        order: (0..all).collect(),
        each: false,
        features: FEATURE_THREAD_ID,
        for_floor: false,
    };
    let series = vec![
        Series::new(
            "foreign_native",
            "the kernel's first touch of anonymous private memory",
            touches,
            move |bench, repetition| {
                begin(bench, Place::Pinned)?;
                let (pages, order) = sparse(repetition);
                let memory = Mapping::new(Memory::Anon, pages, pages)?;
                timed(bench, memory.as_ptr().expose_provenance(), &order, Contents::Zeros)
            },
        )
        .native("foreign_native"),
        floor(
            "foreign_floor",
            "bare loop of blocking read and UFFDIO_COPY, on the processor of the other process",
            Place::Pinned,
        ),
        floor("foreign_floor_unpinned", "the same loop, both where the scheduler likes", Place::Free),
        engine(
            "foreign_engine",
            "the engine, one page a fault, `handler_cpu` and the other process on one processor",
            Place::Pinned,
            FEATURE_THREAD_ID,
            |bench| Engine::builder().fault_around_pages(1).handler_cpu(bench.cpu),
        ),
        engine(
            "foreign_engine_default",
            "the engine as it is by default, both where the scheduler likes",
            Place::Free,
            FEATURE_THREAD_ID,
            |_| Engine::builder(),
        ),
        engine(
            "foreign_engine_unnamed",
            "the same by a userfaultfd that does not name threads: none is followed",
            Place::Free,
            0,
            |_| Engine::builder(),
        ),
        Series::new(
            "foreign_seq_native",
            "the kernel's first touch of anonymous private memory; ascending",
            all,
            move |bench, _| {
                begin(bench, Place::Free)?;
                let Task { pages, order, .. } = in_order();
                let memory = Mapping::new(Memory::Anon, pages, pages)?;
                let base = memory.as_ptr().expose_provenance();
                whole(base, &order, Contents::Zeros, Access::Write, || Ok(()))
            },
        )
        .native("foreign_seq_native"),
        Series::new(
            "foreign_seq_floor_64",
            "bare loop, 64 pages a fault, on the processor of the other process; ascending",
            all,
            move |bench, _| {
                begin(bench, Place::Pinned)?;
                by_floor(bench, in_order(), 64)
            },
        )
        .native("foreign_seq_native"),
        Series::new(
            "foreign_seq_engine",
            "the engine as it is by default, both where the scheduler likes; ascending",
            all,
            move |bench, _| {
                begin(bench, Place::Free)?;
                by_engine(bench, in_order(), Engine::builder())
            },
        )
        .floor("foreign_seq_floor_64")
        .native("foreign_seq_native"),
    ];
    let repetitions = bench.extent(7, 3);
    Group { name: "foreign", title: "Faults of another process", unit: "page", repetitions, series }
}
