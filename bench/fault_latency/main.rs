//! How long page faults take: the kernel's own, those of a bare userfaultfd loop, and the engine's, in one interleaved
//! run. `docs/benchmarks.md` says how to run it and how to read it.
//!
//! | series | faults answered by |
//! |---|---|
//! | `native_anon`, `native_memfd` | the kernel: first touch of anonymous private memory, of a shared memfd |
//! | `floor_anon_N`, `floor_memfd_N` | a bare loop of blocking read(2) and UFFDIO_COPY of an aligned block of N pages; N is 1, 16, 64 |
//! | `floor_memfd_1_poll` | the same with poll(2) before read(2): what the choice of the blocking loop is worth |
//! | `engine_N` | the engine, with a fault-around of N pages |
//! | `native_sigbus` | the kernel: touch past the end of a memfd, until the SIGBUS handler runs |
//! | `floor_sigbus` | a bare loop of read(2) and UFFDIO_POISON |
//! | `engine_sigbus` | the engine: touch of a hole |
//!
//! | suffix | means |
//! |---|---|
//! | none | random order; one thread touches; all threads on one processor |
//! | `_seq` | ascending order |
//! | `_unpinned` | all threads run where the scheduler likes |
//! | `_2threads` | two touching threads on two processors; the handler runs where the scheduler likes |
//! | `_child` | a forked child touches |

#[path = "../common/mod.rs"]
mod common;
mod measure;
mod plot;
mod report;
mod series;
mod subject;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use kiomap::Engine;

use crate::common::document::{Output, placed};
use crate::common::machine::{busy_seconds, open_way_name};
use crate::common::numbers::turn;
use crate::common::source::Source;
use crate::common::{clock, raw, touch, watch};
use crate::measure::{Sample, Summary};
use crate::report::{Circumstances, Report, Row};
use crate::subject::Surroundings;

/// Measures the latency of page faults: the kernel's own, a bare userfaultfd loop's, the engine's.
#[derive(Parser)]
#[command(name = "fault_latency")]
struct Arguments {
    /// Few pages and passes: shows that everything works, in some seconds
    #[arg(long)]
    quick: bool,
    /// Write the results as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw the latencies, as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Write the results into a Markdown document, between its markers or at its end
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Measure only the series whose names contain this; ratios to others are then missing
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Run one-core series on this processor; the last that is allowed unless given
    #[arg(long, value_name = "NUMBER")]
    cpu: Option<usize>,
    /// Accepted because cargo passes it
    #[arg(long, hide = true)]
    bench: bool,
}

/// How much is measured.
struct Extent {
    /// A multiple of the largest fault-around.
    pages: usize,
    repetitions: usize,
    warm_bytes: usize,
}

const FULL: Extent = Extent { pages: 16384, repetitions: 7, warm_bytes: 1 << 30 };
const QUICK: Extent = Extent { pages: 2048, repetitions: 3, warm_bytes: 1 << 27 };

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fault_latency: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let open = |path: &Option<PathBuf>| path.as_deref().map(Output::open).transpose();
    let (json, plot, markdown) = (open(&arguments.json)?, open(&arguments.plot)?, open(&arguments.markdown)?);

    let report = measure_all(arguments)?;
    print!("{}", report.text());
    if let Some(mut output) = json {
        output.write(&report.json()?)?;
    }
    if let Some(mut output) = plot {
        output.write(&plot::svg(&report)?)?;
    }
    if let Some(mut output) = markdown {
        let document = output.read()?;
        output.write(&placed(&document, &report.markdown()))?;
    }
    Ok(())
}

fn measure_all(arguments: &Arguments) -> Result<Report> {
    let extent = if arguments.quick { QUICK } else { FULL };
    let mut cpus = raw::allowed_cpus()?;
    let cpu = arguments.cpu.or(cpus.last().copied()).context("no processor is allowed")?;
    ensure!(cpus.contains(&cpu), "processor {cpu} is not one of those allowed: {cpus:?}");
    // Two touching threads run on the first two: the chosen one is one of them.
    cpus.sort_by_key(|&other| other != cpu);

    let chosen = |name: &str| arguments.only.as_ref().is_none_or(|text| name.contains(text.as_str()));
    let mut list = series::all(cpus.len() > 1);
    list.retain(|series| chosen(&series.name()));
    ensure!(!list.is_empty(), "no series has {:?} in its name", arguments.only.as_deref().unwrap_or_default());
    if cpus.len() == 1 {
        eprintln!("only one processor is allowed: the series that need two are left out");
    }

    let way = Engine::new().context("the engine can't be built here")?.open_way();
    touch::catch_sigbus()?;
    watch::watch_passes()?;
    let clock = clock::calibrate();
    raw::warm_up(extent.warm_bytes)?;
    let around = Surroundings { source: Source::new(extent.pages)?, way, cpu };

    let (begin, busy_before, own_before) = (Instant::now(), busy_seconds(), raw::usage()?.1);
    let mut samples: Vec<Vec<Sample>> = list.iter().map(|_| Vec::new()).collect();
    for repetition in 0..extent.repetitions {
        for step in 0..list.len() {
            let index = turn(step, repetition, extent.repetitions, list.len());
            let series = &list[index];
            let sample = measure::measure(series, extent.pages, repetition, &clock, &around, &cpus)
                .with_context(|| format!("{} (pass {})", series.name(), repetition + 1))?;
            samples[index].push(sample);
        }
    }
    let seconds = begin.elapsed().as_secs_f64();
    let own = raw::usage()?.1 - own_before;
    let foreign_cpus = busy_before.zip(busy_seconds()).map(|(before, after)| (after - before - own) / seconds);

    let rows = std::iter::zip(list, samples)
        .map(|(series, samples)| Row { series, summary: Summary::of(&samples), samples })
        .collect();
    let circumstances = Circumstances {
        clock,
        pages: extent.pages,
        repetitions: extent.repetitions,
        cpu,
        cpus: cpus.len(),
        open_way: open_way_name(way),
        seconds,
        foreign_cpus,
    };
    Ok(Report { rows, circumstances })
}
