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

mod clock;
mod measure;
mod plot;
mod raw;
mod report;
mod series;
mod subject;
mod touch;

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use kiomap::{Engine, OpenWay};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use crate::measure::{Sample, Summary};
use crate::report::{Circumstances, Report, Row};
use crate::subject::{Source, Surroundings};

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
    // Opened first: nobody wants to hear after the measurement that a file can't be written.
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
        output.write(&report::placed(&document, &report.markdown()))?;
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
    watch_passes()?;
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

/// The series whose turn it is: each repetition starts elsewhere, every other one goes backwards, so that none always
/// follows the same one.
fn turn(step: usize, repetition: usize, repetitions: usize, len: usize) -> usize {
    let start = repetition * len / repetitions;
    let forth = (start + step) % len;
    if repetition.is_multiple_of(2) { forth } else { len - 1 - forth }
}

fn open_way_name(way: OpenWay) -> &'static str {
    match way {
        OpenWay::Device => "/dev/userfaultfd",
        OpenWay::Syscall => "userfaultfd(2)",
        OpenWay::UserModeOnly => "userfaultfd(2), user mode only",
    }
}

/// What all processors have worked since the machine started, if the kernel says so.
fn busy_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/stat").ok()?;
    let ticks: Vec<f64> = stat.lines().next()?.split_whitespace().skip(1).filter_map(|n| n.parse().ok()).collect();
    let per_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok()??;
    // user, nice, system; then come idle and iowait; then irq and softirq.
    Some((ticks.get(..3)?.iter().sum::<f64>() + ticks.get(5..7)?.iter().sum::<f64>()) / per_second as f64)
}

extern "C" fn on_alarm(_: libc::c_int) {
    let text = "fault_latency: a pass has hung: a fault was not answered\n";
    // SAFETY: both calls are async-signal-safe, and the text is as long as it says.
    unsafe {
        libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len());
        libc::_exit(1)
    }
}

/// Ends the process if a pass hangs: what waits for a page that never comes can't be asked to stop.
fn watch_passes() -> Result<()> {
    let action = SigAction::new(SigHandler::Handler(on_alarm), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler makes two system calls that are allowed in one.
    unsafe { sigaction(Signal::SIGALRM, &action) }.context("sigaction for SIGALRM")?;
    Ok(())
}

/// A file that results go into.
struct Output {
    path: PathBuf,
    file: File,
}

impl Output {
    fn open(path: &Path) -> Result<Output> {
        let options = File::options().read(true).write(true).create(true).truncate(false).open(path);
        Ok(Output {
            file: options.with_context(|| format!("opening {} for writing", path.display()))?,
            path: path.into(),
        })
    }

    fn read(&mut self) -> Result<String> {
        let mut text = String::new();
        self.file.read_to_string(&mut text).with_context(|| format!("reading {}", self.path.display()))?;
        Ok(text)
    }

    fn write(&mut self, text: &str) -> Result<()> {
        let replaced =
            self.file.set_len(0).and_then(|()| self.file.rewind()).and_then(|()| self.file.write_all(text.as_bytes()));
        replaced.with_context(|| format!("writing {}", self.path.display()))
    }
}
