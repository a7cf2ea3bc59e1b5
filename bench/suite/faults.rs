//! Single random page faults: each touch is of a page whose neighbours nobody touches.

use kiomap::{Delivery, Engine, EngineBuilder, OpenWay};

use crate::common::floor::{Floor, With};
use crate::common::numbers::shuffle;
use crate::common::raw::{Mapping, Memory, Waiting};
use crate::common::touch::Contents;
use crate::memory::{Place, Served, begin, list, timed};
use crate::series::{Bench, Group, Series};

/// Of so many pages, one is touched.
const SPARSE: usize = 32;

pub(crate) fn group(bench: &Bench) -> Group {
    let pages = bench.extent(2048, 1024);
    let order = move |repetition: usize| {
        let mut order: Vec<usize> = (0..pages).collect();
        shuffle(&mut order, repetition as u64 + 1);
        // Not the same page of each block: nothing is to be learned from where the last one was.
        order.iter_mut().for_each(|n| *n = *n * SPARSE + n.wrapping_mul(0x9E37_79B9) / 64 % SPARSE);
        order
    };
    let native = |name, about, memory| {
        Series::new(name, about, pages, move |bench, repetition| {
            begin(bench, Place::Pinned)?;
            let memory = Mapping::new(memory, pages * SPARSE, pages * SPARSE)?;
            timed(bench, memory.as_ptr().expose_provenance(), &order(repetition), Contents::Zeros)
        })
        .native("native_memfd")
    };
    let floor = |name, about, place| {
        Series::new(name, about, pages, move |bench, repetition| {
            begin(bench, place)?;
            let (source, with) = (bench.source.clone(), With::Copy(1));
            let floor = Floor::start(Memory::Memfd, Waiting::Read, with, pages * SPARSE, source, bench.way, None)?;
            let sample = timed(bench, floor.base(), &order(repetition), Contents::Marks)?;
            floor.finish()?;
            Ok(sample)
        })
        .floor("floor_memfd_1")
        .native("native_memfd")
    };
    let engine = |name, about, place, build: fn(&Bench) -> EngineBuilder| {
        Series::new(name, about, pages, move |bench, repetition| {
            begin(bench, place)?;
            let served = Served::new(build(bench), &list(&bench.source, pages * SPARSE)?)?;
            let sample = timed(bench, served.base(), &order(repetition), Contents::Marks)?;
            served.finish()?;
            Ok(sample)
        })
        .floor("floor_memfd_1")
        .native("native_memfd")
    };
    let series = vec![
        native("native_anon", "the kernel's first touch of anonymous private memory", Memory::Anon),
        native("native_memfd", "the kernel's first touch of a shared memfd", Memory::Memfd),
        floor(
            "floor_memfd_1",
            "bare loop of blocking read and UFFDIO_COPY, on the processor that touches",
            Place::Pinned,
        ),
        floor("floor_memfd_1_unpinned", "the same loop, threads where the scheduler likes", Place::Free),
        engine(
            "engine_default_unpinned",
            "the engine as it is by default, threads where the scheduler likes",
            Place::Free,
            |_| Engine::builder(),
        ),
        engine("engine_one_page_unpinned", "the same, one page a fault", Place::Free, |_| {
            Engine::builder().fault_around_pages(1)
        }),
        engine(
            "engine_pinned",
            "the engine, one page a fault, `handler_cpu` and the thread that touches on one processor",
            Place::Pinned,
            |bench| Engine::builder().fault_around_pages(1).handler_cpu(bench.cpu),
        ),
        engine("engine_user_mode_only", "the engine as by default, opened for user mode only", Place::Free, |_| {
            Engine::builder().open_ways(&[OpenWay::UserModeOnly])
        }),
        engine("engine_in_thread", "the engine with in-thread delivery, one page a fault", Place::Free, |_| {
            Engine::builder().fault_around_pages(1).delivery(Delivery::InThread)
        }),
    ];
    let repetitions = bench.extent(85, 3);
    Group { name: "faults", title: "Single random page faults", unit: "fault", repetitions, series }
}
