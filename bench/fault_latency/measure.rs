//! One pass of one series, and what is made of all of them.

use std::sync::Barrier;

use anyhow::{Context, Result, bail, ensure};
use kiomap::page_size;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

use crate::common::clock::Clock;
use crate::common::numbers::{quantile, shuffle};
use crate::common::raw::{Mapping, resident, run_on};
use crate::common::touch::{Contents, Pass, count_wrong, pass};
use crate::common::watch::PASS_SECONDS;
use crate::series::{Order, Placement, Series};
use crate::subject::{Ready, Surroundings};

/// What one pass of a series measured.
#[derive(Debug)]
pub(crate) struct Sample {
    /// The latencies of the touches that faulted, sorted, in nanoseconds.
    pub(crate) faults_ns: Vec<f64>,
    pub(crate) wall_ns_per_page: f64,
}

/// Measures a series once: `pages` pages, each touched once.
pub(crate) fn measure(
    series: &Series,
    pages: usize,
    repetition: usize,
    clock: &Clock,
    around: &Surroundings,
    cpus: &[usize],
) -> Result<Sample> {
    nix::unistd::alarm::set(PASS_SECONDS);
    match series.placement {
        Placement::SameCore => run_on(&[around.cpu])?,
        Placement::Unpinned | Placement::TwoThreads => run_on(cpus)?,
    }
    let orders = orders(series, pages, repetition);
    // All of what the pass itself writes is there before it begins.
    let mut ticks: Vec<Vec<u64>> = orders.iter().map(|order| vec![u64::MAX; order.len()]).collect();
    let ready = Ready::new(series, pages, around)?;
    let base = ready.base();
    let there = resident(std::ptr::with_exposed_provenance(base), pages);
    // Past the end of its file a mapping has no pages that could be counted.
    let there = if series.is_sigbus() { 0 } else { there? };
    ensure!(there == 0, "{there} pages are there before the first touch");

    let passes = match series.placement {
        Placement::TwoThreads => two_threads(base, &orders, series.contents, &mut ticks, cpus)?,
        _ if series.child => vec![in_child(base, &orders[0], series.contents, &mut ticks[0])?],
        _ => vec![pass(base, &orders[0], series.contents, &mut ticks[0])],
    };

    let wrong: u64 = passes.iter().map(|pass| pass.wrong).sum();
    ensure!(wrong == 0, "{wrong} touches did not find what they should have");
    if !series.is_sigbus() {
        let there = resident(std::ptr::with_exposed_provenance(base), pages)?;
        ensure!(there == pages, "{there} of {pages} pages are there after the last touch");
    }
    let faulting: Vec<Vec<bool>> = orders.iter().map(|order| faulting(order, series.around)).collect();
    let faults = faulting.iter().flatten().filter(|&&faults| faults).count();
    ensure!(faults == pages.div_ceil(series.around), "{faults} faults planned for {pages} pages");
    let touched = if series.is_sigbus() { 0 } else { count_wrong(base, pages, series.contents) };
    ensure!(touched == 0, "{touched} pages hold the wrong bytes");
    ready.finish(series, pages, faults)?;
    nix::unistd::alarm::cancel();

    let begin = passes.iter().map(|pass| pass.begin).min().context("no pass")?;
    let end = passes.iter().map(|pass| pass.end).max().context("no pass")?;
    let mut faults_ns: Vec<f64> = std::iter::zip(ticks.iter().flatten(), faulting.iter().flatten())
        .filter(|&(_, faults)| *faults)
        .map(|(&ticks, _)| ticks as f64 * clock.ns_per_tick)
        .collect();
    faults_ns.sort_unstable_by(f64::total_cmp);
    Ok(Sample { faults_ns, wall_ns_per_page: (end - begin) as f64 * clock.ns_per_tick / pages as f64 })
}

/// The pages in the order of touching, for each touching thread. Threads touch different blocks, so that each block
/// faults once.
fn orders(series: &Series, pages: usize, repetition: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..pages).collect();
    if series.order == Order::Random {
        shuffle(&mut order, repetition as u64 + 1);
    }
    if series.placement == Placement::TwoThreads {
        let (even, odd) = order.into_iter().partition(|n| (n / series.around).is_multiple_of(2));
        vec![even, odd]
    } else {
        vec![order]
    }
}

/// Tells which touches fault: the first of each block.
fn faulting(order: &[usize], around: usize) -> Vec<bool> {
    let blocks = order.iter().map(|n| n / around).max().map_or(0, |last| last + 1);
    let mut seen = vec![false; blocks];
    order.iter().map(|n| !std::mem::replace(&mut seen[n / around], true)).collect()
}

fn two_threads(
    base: usize,
    orders: &[Vec<usize>],
    contents: Contents,
    ticks: &mut [Vec<u64>],
    cpus: &[usize],
) -> Result<Vec<Pass>> {
    let start = &Barrier::new(orders.len());
    std::thread::scope(|scope| {
        let threads: Vec<_> = std::iter::zip(orders, ticks)
            .zip(cpus)
            .map(|((order, ticks), &cpu)| {
                scope.spawn(move || {
                    let placed = run_on(&[cpu]);
                    start.wait();
                    placed.map(|()| pass(base, order, contents, ticks))
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().ok().context("a touching thread panicked")?).collect()
    })
}

/// Makes the pass in a forked child; what it measured comes back through shared memory.
fn in_child(base: usize, order: &[usize], contents: Contents, ticks: &mut [u64]) -> Result<Pass> {
    let result_offset = size_of_val(ticks);
    let shared = Mapping::shared((result_offset + size_of::<Pass>()).next_multiple_of(page_size()))?;
    let shared_ticks: *mut u64 = shared.as_ptr().cast();
    // SAFETY: the offset lies within the mapping, a multiple of eight from its aligned start.
    let shared_pass: *mut Pass = unsafe { shared.as_ptr().add(result_offset) }.cast();
    // SAFETY: the child touches memory and ends; it uses nothing that a fork leaves unusable.
    match unsafe { fork() }.context("fork")? {
        ForkResult::Child => {
            nix::unistd::alarm::set(PASS_SECONDS);
            // SAFETY: the mapping has room for the ticks and then the result; the parent waits and does not look.
            unsafe {
                let ticks = std::slice::from_raw_parts_mut(shared_ticks, order.len());
                // The child's page tables are empty: these touches fault now rather than during the pass.
                ticks.fill(0);
                shared_pass.write(Pass::default());
                shared_pass.write(pass(base, order, contents, ticks));
                libc::_exit(0)
            }
        }
        ForkResult::Parent { child } => {
            let status = waitpid(child, None).context("waiting for the child that touches")?;
            if !matches!(status, WaitStatus::Exited(_, 0)) {
                bail!("the child that touches ended with {status:?}");
            }
            // SAFETY: the child wrote both and has ended; nobody else knows the mapping.
            unsafe {
                ticks.copy_from_slice(std::slice::from_raw_parts(shared_ticks, ticks.len()));
                Ok(shared_pass.read())
            }
        }
    }
}

/// The medians over the repetitions of a series.
#[derive(Debug, Clone)]
pub(crate) struct Summary {
    pub(crate) p50_ns: f64,
    pub(crate) p99_ns: f64,
    pub(crate) p999_ns: f64,
    pub(crate) mean_ns: f64,
    pub(crate) min_ns: f64,
    pub(crate) wall_ns_per_page: f64,
}

impl Summary {
    pub(crate) fn of(samples: &[Sample]) -> Summary {
        let over = |value: &dyn Fn(&Sample) -> f64| {
            let mut values: Vec<f64> = samples.iter().map(value).collect();
            values.sort_unstable_by(f64::total_cmp);
            quantile(&values, 0.5)
        };
        Summary {
            p50_ns: over(&|sample| quantile(&sample.faults_ns, 0.5)),
            p99_ns: over(&|sample| quantile(&sample.faults_ns, 0.99)),
            p999_ns: over(&|sample| quantile(&sample.faults_ns, 0.999)),
            mean_ns: over(&|sample| sample.faults_ns.iter().sum::<f64>() / sample.faults_ns.len() as f64),
            min_ns: samples.iter().map(|sample| sample.faults_ns[0]).fold(f64::INFINITY, f64::min),
            wall_ns_per_page: over(&|sample| sample.wall_ns_per_page),
        }
    }
}
