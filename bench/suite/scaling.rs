//! More than one thread, more than one process.

use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use kiomap::{AttachOptions, Delivery, Engine, EngineBuilder, Kiobuf, STRIPES_MAX, Vmap, page_size};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

use crate::common::clock::now;
use crate::common::floor::{Floor, With};
use crate::common::numbers::shuffle;
use crate::common::raw::{Mapping, Memory, Waiting, run_on, usage};
use crate::common::touch::Contents;
use crate::memory::{PASS_SECONDS, Place, Served, begin, list, touch_all};
use crate::series::{Bench, Group, Sample, Series};

/// What each of several touches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Share {
    /// A part of its own.
    Own,
    /// Everything, each in an order of its own.
    All,
}

/// The pages that each of `of` touches.
fn orders(pages: usize, of: usize, share: Share, repetition: usize) -> Vec<Vec<usize>> {
    (0..of)
        .map(|which| {
            let own = pages * which / of..pages * (which + 1) / of;
            let mut order: Vec<usize> = if share == Share::Own { own.collect() } else { (0..pages).collect() };
            shuffle(&mut order, (repetition * of + which) as u64 + 1);
            order
        })
        .collect()
}

/// When the first began and the last ended, in ticks; the processor time of all.
struct Span {
    begin: u64,
    end: u64,
    cpu: f64,
}

impl Span {
    fn sample(&self, bench: &Bench, pages: usize) -> Sample {
        let wall = (self.end - self.begin) as f64 * bench.clock.ns_per_tick;
        let per_page = 1.0 / pages as f64;
        Sample { wall_ns: Some(wall * per_page), cpu_ns: Some(self.cpu * 1e9 * per_page), ..Sample::default() }
    }
}

/// Touches from as many threads as there are orders, each at its own base; on a processor of its own if `pinned`.
fn by_threads(bench: &Bench, bases: &[usize], orders: &[Vec<usize>], contents: Contents, pinned: bool) -> Result<Span> {
    let start = &Barrier::new(orders.len());
    let before = usage()?.1;
    let spans = std::thread::scope(|scope| {
        let threads: Vec<_> = std::iter::zip(orders, bases)
            .zip(&bench.cpus)
            .map(|((order, &base), &cpu)| {
                scope.spawn(move || {
                    let placed = if pinned { run_on(&[cpu]) } else { Ok(()) };
                    start.wait();
                    let begin = now();
                    let wrong = touch_all(base, order, contents);
                    placed.map(|()| (begin, now(), wrong))
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().ok().context("a touching thread panicked")?)
            .collect::<Result<Vec<_>>>()
    })?;
    let cpu = usage()?.1 - before;
    let wrong: usize = spans.iter().map(|span| span.2).sum();
    ensure!(wrong == 0, "{wrong} touches found the wrong bytes");
    let begin = spans.iter().map(|span| span.0).min().context("no thread")?;
    let end = spans.iter().map(|span| span.1).max().context("no thread")?;
    Ok(Span { begin, end, cpu })
}

/// What forked children tell, in memory that they share.
#[repr(C)]
struct Told {
    ready: AtomicUsize,
    begin: AtomicU64,
    end: AtomicU64,
    wrong: AtomicUsize,
}

/// Touches from as many forked children as there are orders.
fn by_children(base: usize, orders: &[Vec<usize>]) -> Result<Span> {
    let shared = Mapping::shared(page_size())?;
    // SAFETY: the mapping is a page of zeros, aligned, and outlives its use; zeros are valid atomics.
    let told = unsafe { &*shared.as_ptr().cast::<Told>() };
    told.begin.store(u64::MAX, Ordering::Relaxed);
    let before = usage()?.1;
    let mut children = Vec::<Pid>::new();
    for order in orders {
        // SAFETY: the child touches memory and ends; it uses nothing that a fork leaves unusable.
        match unsafe { fork() }.context("fork")? {
            ForkResult::Parent { child } => children.push(child),
            ForkResult::Child => {
                nix::unistd::alarm::set(PASS_SECONDS);
                told.ready.fetch_add(1, Ordering::AcqRel);
                while told.ready.load(Ordering::Acquire) < orders.len() {
                    std::thread::yield_now();
                }
                told.begin.fetch_min(now(), Ordering::AcqRel);
                told.wrong.fetch_add(touch_all(base, order, Contents::Marks), Ordering::AcqRel);
                told.end.fetch_max(now(), Ordering::AcqRel);
                // SAFETY: ends this process at once.
                unsafe { libc::_exit(0) }
            }
        }
    }
    for child in children {
        let status = waitpid(child, None).context("waiting for a child that touches")?;
        ensure!(matches!(status, WaitStatus::Exited(_, 0)), "a child that touches ended with {status:?}");
    }
    let cpu = usage()?.1 - before;
    let wrong = told.wrong.load(Ordering::Acquire);
    ensure!(wrong == 0, "{wrong} touches of children found the wrong bytes");
    Ok(Span { begin: told.begin.load(Ordering::Acquire), end: told.end.load(Ordering::Acquire), cpu })
}

/// An address where the kernel puts nothing by itself.
const FREE: usize = 0x1000_0000_0000;

/// A list in one range of memory, of which each of `n` engines serves a part.
fn side_by_side(builder: EngineBuilder, list: &Kiobuf, n: usize) -> Result<Vec<Served>> {
    let pages = list.nr_pages() as usize;
    let publish = |_| {
        let engine = builder.clone().build().context("building an engine")?;
        let vmap = engine.vmap(list).context("publishing a list")?;
        Ok((engine, vmap))
    };
    let published = (0..n).map(publish).collect::<Result<Vec<_>>>()?;
    let serve = |(which, (engine, vmap)): (usize, (Engine, Vmap))| {
        let (first, end) = (pages * which / n, pages * (which + 1) / n);
        let part = AttachOptions::new().pgoff(first as u64).len_bytes((end - first) * page_size());
        let region = vmap.attach(&part.at(FREE + first * page_size())).context("attaching a part of a range")?;
        Ok(Served { region, engine })
    };
    published.into_iter().enumerate().map(serve).collect()
}

/// How many touch at once: one, two, four, and as many as there are processors.
fn counts(cpus: usize) -> Vec<usize> {
    let mut counts: Vec<usize> = (0..).map(|doublings| 1 << doublings).take_while(|&n| n < cpus).collect();
    counts.push(cpus);
    counts.dedup();
    counts
}

pub(crate) fn group(bench: &Bench) -> Group {
    let pages = bench.extent(1 << 15, 1 << 13);
    let mut series = Vec::new();
    let plural = |n: usize, one: &str| if n == 1 { format!("1 {one}") } else { format!("{n} {one}s") };
    for n in counts(bench.cpus.len()) {
        let native = format!("scale_native_{n}");
        let about = format!("the kernel's first touch of a shared memfd, {}", plural(n, "thread"));
        series.push(
            Series::new(&native, about, pages, move |bench, repetition| {
                begin(bench, Place::Free)?;
                let memory = Mapping::new(Memory::Memfd, pages, pages)?;
                let bases = vec![memory.as_ptr().expose_provenance(); n];
                let orders = orders(pages, n, Share::Own, repetition);
                Ok(by_threads(bench, &bases, &orders, Contents::Zeros, false)?.sample(bench, pages))
            })
            .native(&native),
        );
        let floor = format!("scale_floor_{n}");
        let about = format!(
            "{} and {}, each pair on a processor",
            plural(n, "thread"),
            plural(n, "bare loop of a userfaultfd")
        );
        series.push(
            Series::new(&floor, about.replace("userfaultfds", "userfaultfd"), pages, move |bench, repetition| {
                begin(bench, Place::Free)?;
                let floors: Vec<Floor> = (bench.cpus.iter().take(n))
                    .map(|&cpu| {
                        let (source, with) = (bench.source.clone(), With::Copy(1));
                        Floor::start(Memory::Memfd, Waiting::Read, with, pages / n, source, bench.way, Some(cpu))
                    })
                    .collect::<Result<_>>()?;
                let bases: Vec<usize> = floors.iter().map(Floor::base).collect();
                let orders: Vec<_> =
                    (0..n).map(|which| orders(pages / n, 1, Share::Own, repetition + which).remove(0)).collect();
                let span = by_threads(bench, &bases, &orders, Contents::Marks, true)?;
                floors.into_iter().try_for_each(|floor| floor.finish().map(drop))?;
                Ok(span.sample(bench, pages))
            })
            .floor(&floor)
            .native(&native),
        );
        if n > 1 {
            let about =
                format!("{} and as many bare loops of one userfaultfd, each pair on a processor", plural(n, "thread"));
            series.push(
                Series::new(format!("scale_floor_one_{n}"), about, pages, move |bench, repetition| {
                    begin(bench, Place::Free)?;
                    let cpus: Vec<_> = bench.cpus.iter().take(n).map(|&cpu| Some(cpu)).collect();
                    let (source, with) = (bench.source.clone(), With::Copy(1));
                    let floor = Floor::start_all(Memory::Memfd, Waiting::Read, with, pages, source, bench.way, &cpus)?;
                    let orders = orders(pages, n, Share::Own, repetition);
                    let span = by_threads(bench, &vec![floor.base(); n], &orders, Contents::Marks, true)?;
                    floor.finish()?;
                    Ok(span.sample(bench, pages))
                })
                .floor(&floor)
                .native(&native),
            );
        }
        if n > 1 {
            let about = format!(
                "{} and as many bare loops with a userfaultfd and a mapping each, of one memfd, each pair on a processor",
                plural(n, "thread")
            );
            series.push(
                Series::new(format!("scale_floor_object_{n}"), about, pages, move |bench, repetition| {
                    begin(bench, Place::Free)?;
                    let cpus: Vec<_> = bench.cpus.iter().copied().take(n).collect();
                    let floors = Floor::start_apart(pages, &bench.source, bench.way, &cpus)?;
                    let bases: Vec<usize> = floors.iter().map(Floor::base).collect();
                    let orders = orders(pages, n, Share::Own, repetition);
                    let span = by_threads(bench, &bases, &orders, Contents::Marks, true)?;
                    floors.into_iter().try_for_each(|floor| floor.finish().map(drop))?;
                    Ok(span.sample(bench, pages))
                })
                .floor(&floor)
                .native(&native),
            );
        }
        let engine = |name: String, about: String, build: fn() -> EngineBuilder, touch: Touch| {
            Series::new(name, about, pages, move |bench, repetition| {
                begin(bench, Place::Free)?;
                let served = Served::new(build(), &list(&bench.source, pages)?)?;
                let span = touch(bench, served.base(), pages, n, repetition)?;
                served.finish()?;
                Ok(span.sample(bench, pages))
            })
            .floor(&floor)
            .native(&native)
        };
        let one_page: fn() -> EngineBuilder = || Engine::builder().fault_around_pages(1);
        let threads = plural(n, "thread");
        series.push(engine(
            format!("scale_engine_threads_{n}"),
            format!("the engine, one page a fault, {threads} with a part of the region each"),
            one_page,
            |bench, base, pages, n, repetition| {
                let orders = orders(pages, n, Share::Own, repetition);
                by_threads(bench, &vec![base; n], &orders, Contents::Marks, false)
            },
        ));
        if n > 1 {
            series.push(engine(
                format!("scale_engine_shared_{n}"),
                format!("the engine, one page a fault, {threads} that all touch all of the region"),
                one_page,
                |bench, base, pages, n, repetition| {
                    let orders = orders(pages, n, Share::All, repetition);
                    by_threads(bench, &vec![base; n], &orders, Contents::Marks, false)
                },
            ));
        }
        // As many stripes with one thread, which goes over all of them: what stripes cost.
        let stripes = bench.cpus.len().clamp(2, STRIPES_MAX);
        let about =
            format!("the engine, one page a fault, {threads} with a part each of a region in {stripes} stripes");
        series.push(
            Series::new(format!("scale_engine_stripes_{n}"), about, pages, move |bench, repetition| {
                begin(bench, Place::Free)?;
                let served = Served::in_stripes(one_page(), &list(&bench.source, pages)?, stripes)?;
                let orders = orders(pages, n, Share::Own, repetition);
                let span = by_threads(bench, &vec![served.base(); n], &orders, Contents::Marks, false)?;
                served.finish()?;
                Ok(span.sample(bench, pages))
            })
            .floor(&floor)
            .native(&native),
        );
        if n > 1 {
            let about =
                format!("{n} engines side by side, each for a part of the range and its thread, one page a fault");
            series.push(
                Series::new(format!("scale_engine_engines_{n}"), about, pages, move |bench, repetition| {
                    begin(bench, Place::Free)?;
                    let served = side_by_side(one_page(), &list(&bench.source, pages)?, n)?;
                    let base = served.first().context("no engine")?.base();
                    let orders = orders(pages, n, Share::Own, repetition);
                    let span = by_threads(bench, &vec![base; n], &orders, Contents::Marks, false)?;
                    served.into_iter().try_for_each(Served::finish)?;
                    Ok(span.sample(bench, pages))
                })
                .floor(&floor)
                .native(&native),
            );
        }
        series.push(engine(
            format!("scale_engine_default_{n}"),
            format!("the engine as it is by default, {threads} with a part of the region each"),
            Engine::builder,
            |bench, base, pages, n, repetition| {
                let orders = orders(pages, n, Share::Own, repetition);
                by_threads(bench, &vec![base; n], &orders, Contents::Marks, false)
            },
        ));
        series.push(engine(
            format!("scale_engine_in_thread_{n}"),
            format!("the engine with in-thread delivery, one page a fault, {threads} with a part of the region each"),
            || Engine::builder().fault_around_pages(1).delivery(Delivery::InThread),
            |bench, base, pages, n, repetition| {
                let orders = orders(pages, n, Share::Own, repetition);
                by_threads(bench, &vec![base; n], &orders, Contents::Marks, false)
            },
        ));
        let processes = if n == 1 { "1 forked process".to_owned() } else { format!("{n} forked processes") };
        series.push(engine(
            format!("scale_engine_processes_{n}"),
            format!("the engine, one page a fault, {processes} with a part of the region each"),
            one_page,
            |_, base, pages, n, repetition| by_children(base, &orders(pages, n, Share::Own, repetition)),
        ));
    }
    let repetitions = bench.extent(19, 2);
    Group { name: "scaling", title: "More threads and processes", unit: "page", repetitions, series }
}

/// Touches `pages` pages from so many threads or processes; the rest is the bench, the base, the repetition.
type Touch = fn(&Bench, usize, usize, usize, usize) -> Result<Span>;
