//! Memory to touch and its touching: native, of a floor, of an engine.

use anyhow::{Context, Result, ensure};
use kiomap::{AttachOptions, Engine, EngineBuilder, Kiobuf, Region, VmapBuilder, page_size};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::common::raw::{run_on, usage};
use crate::common::source::Source;
use crate::common::touch::{Contents, Pass, mark, pass};
use crate::series::{Bench, Sample};

/// Seconds after which a pass counts as hung.
pub(crate) const PASS_SECONDS: u32 = 40;

/// Where the threads of a pass run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// All on one processor.
    Pinned,
    /// Wherever the scheduler likes.
    Free,
}

/// Puts the calling thread, and those that it starts, in its place, and has the kernel end a pass that hangs.
pub(crate) fn begin(bench: &Bench, place: Place) -> Result<()> {
    nix::unistd::alarm::set(PASS_SECONDS);
    run_on(if place == Place::Pinned { std::slice::from_ref(&bench.cpu) } else { &bench.cpus })
}

/// A region, and the engine that serves it. The region ends first.
pub(crate) struct Served {
    pub(crate) region: Region,
    pub(crate) engine: Engine,
}

impl Served {
    pub(crate) fn new(builder: EngineBuilder, list: &Kiobuf) -> Result<Served> {
        Served::published(builder, list, |vmap| vmap)
    }

    /// The same, with settings of the vmap.
    pub(crate) fn published(
        builder: EngineBuilder,
        list: &Kiobuf,
        set: impl FnOnce(VmapBuilder) -> VmapBuilder,
    ) -> Result<Served> {
        let engine = builder.build().context("building an engine")?;
        let vmap = set(engine.vmap_builder(list)).build().context("publishing a list")?;
        let region = vmap.attach(&AttachOptions::new()).context("attaching a region")?;
        Ok(Served { region, engine })
    }

    /// The same, in so many stripes.
    pub(crate) fn in_stripes(builder: EngineBuilder, list: &Kiobuf, stripes: usize) -> Result<Served> {
        let engine = builder.build().context("building an engine")?;
        let vmap = engine.vmap(list).context("publishing a list")?;
        let region = vmap.attach(&AttachOptions::new().stripes(stripes)).context("attaching a region in stripes")?;
        Ok(Served { region, engine })
    }

    pub(crate) fn base(&self) -> usize {
        self.region.as_ptr().expose_provenance()
    }

    /// Checks that nothing went wrong that a touch doesn't show.
    pub(crate) fn finish(self) -> Result<()> {
        all_was_had(&self.engine)
    }
}

/// Checks that an engine refused no page.
pub(crate) fn all_was_had(engine: &Engine) -> Result<()> {
    engine.settle().context("settling the engine's counts")?;
    let stats = engine.stats();
    ensure!(stats.source_errors + stats.pages_poisoned == 0, "pages could not be had: {stats:?}");
    Ok(())
}

/// A list of the source's first pages.
pub(crate) fn list(source: &Source, pages: usize) -> Result<Kiobuf> {
    let mut list = Kiobuf::new();
    list.map_slice(source.first(pages))?;
    Ok(list)
}

/// Touches pages in order, and times each.
pub(crate) fn timed(bench: &Bench, base: usize, order: &[usize], contents: Contents) -> Result<Sample> {
    let mut ticks = vec![u64::MAX; order.len()];
    let before = usage()?.1;
    let seen = pass(base, order, contents, &mut ticks);
    let cpu = usage()?.1 - before;
    sample_of(bench, seen, ticks, order.len(), cpu)
}

/// What a pass over so many pages comes to; of the processor time, all threads' in seconds is given.
pub(crate) fn sample_of(bench: &Bench, seen: Pass, ticks: Vec<u64>, pages: usize, cpu: f64) -> Result<Sample> {
    ensure!(seen.wrong == 0, "{} touches found the wrong bytes", seen.wrong);
    let mut each_ns: Vec<f64> = ticks.into_iter().map(|ticks| ticks as f64 * bench.clock.ns_per_tick).collect();
    each_ns.sort_unstable_by(f64::total_cmp);
    let per_page = 1.0 / pages as f64;
    let wall = (seen.end - seen.begin) as f64 * bench.clock.ns_per_tick;
    Ok(Sample { each_ns, wall_ns: Some(wall * per_page), cpu_ns: Some(cpu * 1e9 * per_page), bytes: None })
}

/// How pages are touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Write,
    Read,
}

/// Touches pages in order; the time is of the whole, with what `before` does.
pub(crate) fn whole(
    base: usize,
    order: &[usize],
    contents: Contents,
    access: Access,
    before: impl FnOnce() -> Result<()>,
) -> Result<Sample> {
    let (cpu, begin) = (usage()?.1, Instant::now());
    before()?;
    let wrong = match access {
        Access::Write => touch_all(base, order, contents),
        Access::Read => read_all(base, order, contents),
    };
    let wall = begin.elapsed();
    let cpu = usage()?.1 - cpu;
    ensure!(wrong == 0, "{wrong} touches found the wrong bytes");
    let per_page = 1e9 / order.len() as f64;
    Ok(Sample { wall_ns: Some(wall.as_secs_f64() * per_page), cpu_ns: Some(cpu * per_page), ..Sample::default() })
}

/// Touches pages in order, by a write that leaves every byte as it is; how many held the wrong word.
pub(crate) fn touch_all(base: usize, order: &[usize], contents: Contents) -> usize {
    let page = page_size();
    // Not known to the compiler, which would make a load of the addition.
    let nothing = std::hint::black_box(0);
    let mut wrong = 0;
    for &n in order {
        // SAFETY: the page lies in a mapping that outlives the pass, aligned, and is touched only by atomics.
        let word = unsafe { AtomicU64::from_ptr(std::ptr::with_exposed_provenance_mut(base + n * page)) };
        wrong += usize::from(word.fetch_add(nothing, Ordering::Relaxed) != right(contents, n));
    }
    wrong
}

/// The same by a read.
fn read_all(base: usize, order: &[usize], contents: Contents) -> usize {
    let page = page_size();
    let wrong = order.iter().filter(|&&n| {
        // SAFETY: as above.
        let word = unsafe { AtomicU64::from_ptr(std::ptr::with_exposed_provenance_mut(base + n * page)) };
        word.load(Ordering::Relaxed) != right(contents, n)
    });
    wrong.count()
}

fn right(contents: Contents, n: usize) -> u64 {
    if contents == Contents::Marks { mark(n) } else { 0 }
}
