//! Bringing a whole region at once, on the thread that asks or on one of the engine's.

use anyhow::{Result, ensure};
use kiomap::{Engine, PopulateOptions, page_size};
use std::time::Instant;

use crate::common::raw::{Mapping, Memory, usage};
use crate::common::touch::Contents;
use crate::memory::{Place, Served, begin, list, touch_all};
use crate::series::{Bench, Group, Sample, Series};

/// Times `work`, and checks that every page is there and right.
fn timed(base: usize, pages: usize, contents: Contents, work: impl FnOnce() -> Result<()>) -> Result<Sample> {
    let (cpu, begin) = (usage()?.1, Instant::now());
    work()?;
    let wall = begin.elapsed().as_secs_f64();
    let cpu = usage()?.1 - cpu;
    let order: Vec<usize> = (0..pages).collect();
    ensure!(touch_all(base, &order, contents) == 0, "touches found the wrong bytes");
    let per_page = 1e9 / pages as f64;
    Ok(Sample { wall_ns: Some(wall * per_page), cpu_ns: Some(cpu * per_page), ..Sample::default() })
}

pub(crate) fn group(bench: &Bench) -> Group {
    let pages = bench.extent(1 << 18, 1 << 15);
    let native = Series::new(
        "populate_native",
        "MADV_POPULATE_WRITE of a shared memfd: the kernel alone",
        pages,
        move |bench, _| {
            begin(bench, Place::Free)?;
            let memory = Mapping::new(Memory::Memfd, pages, pages)?;
            let base = memory.as_ptr();
            timed(base.expose_provenance(), pages, Contents::Zeros, || {
                // SAFETY: the range is the mapping's own; the advice brings pages and changes no byte.
                let answer = unsafe { libc::madvise(base.cast(), pages * page_size(), libc::MADV_POPULATE_WRITE) };
                nix::errno::Errno::result(answer)?;
                Ok(())
            })
        },
    );
    let foreground = Series::new(
        "populate_foreground",
        "`Region::populate` of all of a region, until it returns",
        pages,
        move |bench, _| {
            begin(bench, Place::Free)?;
            let served = Served::new(Engine::builder(), &list(&bench.source, pages)?)?;
            let sample =
                timed(served.base(), pages, Contents::Marks, || Ok(served.region.populate(0..pages * page_size())?))?;
            served.finish()?;
            Ok(sample)
        },
    );
    let background = Series::new(
        "populate_background",
        "`Region::populate_in_background` of all of a region, until it is done; nobody touches meanwhile",
        pages,
        move |bench, _| {
            begin(bench, Place::Free)?;
            let served = Served::new(Engine::builder(), &list(&bench.source, pages)?)?;
            let sample = timed(served.base(), pages, Contents::Marks, || {
                let all = 0..pages * page_size();
                let progress = served.region.populate_in_background(all, PopulateOptions::new())?.wait()?;
                ensure!(progress.pages_done == pages as u64, "{progress:?} of {pages} pages");
                Ok(())
            })?;
            served.finish()?;
            Ok(sample)
        },
    );
    let series = [native, foreground, background].map(|series| series.native("populate_native"));
    let repetitions = bench.extent(5, 2);
    Group {
        name: "populate",
        title: "Bringing a whole region at once",
        unit: "page",
        repetitions,
        series: series.into(),
    }
}
