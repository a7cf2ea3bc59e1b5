//! Everything that is to be known of the engine's speed, measured beside the kernel's own and a bare loop's, in one run.
//! `docs/benchmarks.md` is made of what it writes, and says how to read it; `--list` prints the series.

mod attach;
#[path = "../common/mod.rs"]
mod common;
mod counting;
mod events;
mod faults;
mod foreign;
mod goals;
mod idle;
mod life;
mod memory;
mod peer;
mod plot;
mod pool;
mod populate;
mod render;
mod report;
mod scaling;
mod series;
mod sources;
mod throughput;

use std::cell::OnceCell;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use kiomap::Engine;

use crate::common::document::Output;
use crate::common::life::Lives;
use crate::common::machine::{Machine, busy_seconds, open_way_name, wait_for_rest};
use crate::common::numbers::turn;
use crate::common::source::Source;
use crate::common::{clock, raw};
use crate::report::{Entry, Report, Run, Section};
use crate::series::{Bench, Group, Sample};

/// Measures page faults, throughput, scaling, other processes, attaches, events, lives and idleness: the kernel's, a bare loop's, the engine's.
#[derive(Parser)]
#[command(name = "suite")]
struct Arguments {
    /// Little of everything: shows that it works, in less than a minute
    #[arg(long)]
    quick: bool,
    /// Measure only the groups and series whose names begin with one of these, and what those are compared with
    #[arg(long, value_name = "PREFIX", value_delimiter = ',')]
    only: Vec<String>,
    /// Print the groups and series, and measure nothing
    #[arg(long)]
    list: bool,
    /// Write the results as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write the report as Markdown, and its plots beside it
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Take the results from JSON files of before instead of measuring; several are of parts, on one machine
    #[arg(long, value_name = "FILE", value_delimiter = ',', conflicts_with_all = ["quick", "only", "list"])]
    render: Vec<PathBuf>,
    /// Run pinned series on this processor; the last that is allowed unless given
    #[arg(long, value_name = "NUMBER")]
    cpu: Option<usize>,
    /// Be the process whose memory is served: one of the suite's own starts this
    #[arg(long, hide = true)]
    peer: bool,
    /// Accepted because cargo passes it
    #[arg(long, hide = true)]
    bench: bool,
}

/// Pages of the source: what the largest series copies.
const SOURCE_PAGES: [usize; 2] = [1 << 18, 1 << 15];
/// Touched once before anything is measured.
const WARM_BYTES: [usize; 2] = [4 << 30, 1 << 29];
/// How long a repetition waits for a machine at rest.
const REST: Duration = Duration::from_secs(3);

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match if arguments.peer { peer::obey() } else { run(&arguments) } {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("suite: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let json = arguments.json.as_deref().map(Output::open).transpose()?;
    let document = arguments.report.as_deref().map(Output::open).transpose()?;
    let report = if arguments.render.is_empty() { measure_all(arguments)? } else { Some(read(&arguments.render)?) };
    let Some(report) = report else { return Ok(()) };
    print!("{}", report.text());
    if let Some(mut output) = json {
        output.write(&report.json()?)?;
    }
    if let (Some(mut output), Some(path)) = (document, &arguments.report) {
        output.write(&render::document(&report, path)?)?;
    }
    Ok(())
}

/// Reads the results of one run, or of several that each measured a part.
fn read(paths: &[PathBuf]) -> Result<Report> {
    let mut reports = paths.iter().map(|path| -> Result<Report> {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is no report of this program", path.display()))
    });
    let mut whole = reports.next().context("no file")??;
    reports.try_for_each(|part| whole.add(part?))?;
    Ok(whole)
}

/// Measures, or prints the list.
fn measure_all(arguments: &Arguments) -> Result<Option<Report>> {
    // Before there is an engine, and while there is little memory that a fork would copy the tables of.
    let twin = Lives::twin()?;
    let mut cpus = raw::allowed_cpus()?;
    let cpu = arguments.cpu.or(cpus.last().copied()).context("no processor is allowed")?;
    ensure!(cpus.contains(&cpu), "processor {cpu} is not one of those allowed: {cpus:?}");
    cpus.sort_by_key(|&other| other != cpu);
    let clock = clock::calibrate();
    let way = Engine::new().context("the engine can't be built here")?.open_way();
    let mut bench =
        Bench { source: Source::new(1)?, held: OnceCell::new(), clock, way, cpu, cpus, quick: arguments.quick };

    let mut groups = vec![
        life::group(&bench, twin),
        faults::group(&bench),
        throughput::group(&bench),
        populate::group(&bench),
        scaling::group(&bench),
        foreign::group(&bench),
        sources::group(&bench),
        attach::group(&bench)?,
        events::group(&bench),
        idle::group(&bench),
    ];
    select(&mut groups, &arguments.only)?;
    if arguments.list {
        for group in &groups {
            println!("{}: {}", group.name, group.title);
            group.series.iter().for_each(|series| println!("  {:31} {}", series.name, series.about));
        }
        return Ok(None);
    }

    let which = usize::from(arguments.quick);
    let (begin, busy_before, own_before) = (Instant::now(), busy_seconds(), raw::usage()?.1);
    let (mut entries, mut restless) = (Vec::new(), 0);
    for group in &groups {
        // Of the lives of processes, small ones are measured.
        if group.name != "life" && bench.source.as_ref().len() <= kiomap::page_size() {
            raw::warm_up(WARM_BYTES[which])?;
            bench.source = Source::new(SOURCE_PAGES[which])?;
        }
        // Said before: a pass that hangs is ended by SIGALRM, whose default action also ends what waits in the kernel.
        eprintln!("{} …", group.name);
        let (samples, began_restless) = measure_group(&bench, group)?;
        restless += began_restless;
        entries.extend(std::iter::zip(&group.series, samples).map(|(s, samples)| Entry::of(group.name, s, &samples)));
    }
    nix::unistd::alarm::cancel();
    let seconds = begin.elapsed().as_secs_f64();
    let own = raw::usage()?.1 - own_before;
    let foreign_cpus = busy_before.zip(busy_seconds()).map(|(before, after)| (after - before - own) / seconds);
    let mut report = Report {
        version: 1,
        machine: Machine::look(),
        run: Run {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            quick: arguments.quick,
            selected: (!arguments.only.is_empty()).then(|| arguments.only.join(", ")),
            open_way: open_way_name(way).to_owned(),
            cpu,
            clock: clock.name.to_owned(),
            clock_overhead_ns: clock.overhead_ns,
            seconds,
            foreign_cpus,
            restless,
        },
        groups: groups
            .iter()
            .map(|group| Section { name: group.name.into(), title: group.title.into(), unit: group.unit.into() })
            .collect(),
        goals: Vec::new(),
        series: entries,
    };
    report.compare();
    Ok(Some(report))
}

/// Every series once in each repetition; each repetition waits for a machine at rest. Also tells how many did in vain.
fn measure_group(bench: &Bench, group: &Group) -> Result<(Vec<Vec<Sample>>, usize)> {
    let mut samples: Vec<Vec<Sample>> = group.series.iter().map(|_| Vec::new()).collect();
    let mut restless = 0;
    for repetition in 0..group.repetitions {
        restless += usize::from(!wait_for_rest(REST));
        for step in 0..group.series.len() {
            let index = turn(step, repetition, group.repetitions, group.series.len());
            let series = &group.series[index];
            let sample = (series.measure)(bench, repetition);
            samples[index].push(sample.with_context(|| format!("{} (pass {})", series.name, repetition + 1))?);
            nix::unistd::alarm::cancel();
        }
    }
    Ok((samples, restless))
}

/// Leaves what was asked for, and what that is compared with.
fn select(groups: &mut Vec<Group>, only: &[String]) -> Result<()> {
    if only.is_empty() {
        return Ok(());
    }
    let asked = |name: &str| only.iter().any(|prefix| name.starts_with(prefix.as_str()));
    for group in groups.iter_mut() {
        let chosen: Vec<&series::Series> =
            group.series.iter().filter(|series| asked(group.name) || asked(&series.name)).collect();
        let wanted: Vec<String> = chosen
            .iter()
            .flat_map(|series| [Some(&series.name), series.floor.as_ref(), series.native.as_ref()])
            .flatten()
            .cloned()
            .collect();
        group.series.retain(|series| wanted.contains(&series.name));
    }
    groups.retain(|group| !group.series.is_empty());
    ensure!(!groups.is_empty(), "no group or series begins with {}", only.join(" or "));
    Ok(())
}
