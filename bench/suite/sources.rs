//! Faults on memory while other threads wait for a slow page source of the same engine.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kiomap::{AttachOptions, Engine, Kiobuf, PageSource, page_size};

use crate::common::numbers::shuffle;
use crate::common::touch::{Contents, mark};
use crate::memory::{Place, Served, begin, list, timed};
use crate::series::{Bench, Group, Sample, Series};

/// Of so many pages, one is touched.
const SPARSE: usize = 16;
/// Threads that touch pages of the slow source.
const WAITERS: usize = 8;
/// Pages of the slow source.
const SLOW_PAGES: usize = 1 << 20;
/// How long each of its reads takes.
const PAUSE: Duration = Duration::from_millis(5);

/// A source of marked pages that takes its time.
#[derive(Default)]
struct Slow {
    inside: AtomicUsize,
    most_inside: AtomicUsize,
}

impl PageSource for Slow {
    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> io::Result<()> {
        let inside = self.inside.fetch_add(1, Ordering::Relaxed) + 1;
        self.most_inside.fetch_max(inside, Ordering::Relaxed);
        std::thread::sleep(PAUSE);
        self.inside.fetch_sub(1, Ordering::Relaxed);
        let first = offset_bytes as usize / page_size();
        for (n, page) in buf.chunks_mut(page_size()).enumerate() {
            page[..8].copy_from_slice(&mark(first + n).to_ne_bytes());
        }
        Ok(())
    }
}

/// Touches pages of a list in memory, while `waiters` threads touch pages of a slow source here and there.
fn beside(bench: &Bench, pages: usize, waiters: usize, repetition: usize) -> Result<Sample> {
    begin(bench, Place::Free)?;
    let served = Served::new(Engine::builder(), &list(&bench.source, pages * SPARSE)?)?;
    let slow = Arc::new(Slow::default());
    let mut slow_list = Kiobuf::new();
    slow_list.map_source(Arc::clone(&slow) as Arc<dyn PageSource>, (SLOW_PAGES * page_size()) as u64)?;
    let vmap = served.engine.vmap(&slow_list).context("publishing a slow list")?;
    let region = vmap.attach(&AttachOptions::new()).context("attaching a slow region")?;
    let base = region.as_ptr().expose_provenance();
    let mut order: Vec<usize> = (0..pages).map(|n| n * SPARSE).collect();
    shuffle(&mut order, repetition as u64 + 1);
    let (stop, wrong) = (AtomicBool::new(false), AtomicUsize::new(0));
    let sample = std::thread::scope(|scope| {
        for seed in 0..waiters {
            let (stop, wrong) = (&stop, &wrong);
            scope.spawn(move || {
                let mut state = (repetition * waiters + seed) as u64 + 1;
                while !stop.load(Ordering::Relaxed) {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let page = (state >> 33) as usize % SLOW_PAGES;
                    let at = std::ptr::with_exposed_provenance_mut(base + page * page_size());
                    // SAFETY: the page lies in the region, which outlives the thread, aligned, and is touched by atomics only.
                    let word = unsafe { AtomicU64::from_ptr(at) }.load(Ordering::Relaxed);
                    wrong.fetch_add(usize::from(word != mark(page)), Ordering::Relaxed);
                }
            });
        }
        while slow.inside.load(Ordering::Relaxed) < waiters {
            std::thread::yield_now();
        }
        let sample = timed(bench, served.base(), &order, Contents::Marks);
        stop.store(true, Ordering::Relaxed);
        sample
    })?;
    ensure!(wrong.into_inner() == 0, "pages of the slow source had wrong bytes");
    ensure!(slow.most_inside.load(Ordering::Relaxed) == waiters, "not {waiters} reads were in flight at once");
    drop((region, vmap));
    served.finish()?;
    Ok(sample)
}

pub(crate) fn group(bench: &Bench) -> Group {
    let pages = bench.extent(16384, 2048);
    let series = |name: &str, about: &str, waiters| {
        Series::new(name, about, pages, move |bench, repetition| beside(bench, pages, waiters, repetition))
    };
    let series = vec![
        series("sources_undisturbed", "random pages of a list in memory, the engine as it is by default", 0),
        series(
            "sources_disturbed",
            "the same while 8 threads touch random pages of a source that takes 5 ms a read, in the same engine",
            WAITERS,
        ),
    ];
    let repetitions = bench.extent(9, 3);
    Group { name: "sources", title: "Faults on memory beside a slow source", unit: "fault", repetitions, series }
}
