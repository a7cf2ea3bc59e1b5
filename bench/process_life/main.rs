//! What processes cost and how soon their end is noticed.
//!
//! | series | from | to |
//! |---|---|---|
//! | `fork_plain` | before fork(2), in a process without an engine, whose child touches a page of a shared memfd and exits | after waitpid(2) |
//! | `fork_region` | before fork(2), in the engine's process, whose child touches a missing page of a region and exits | after waitpid(2) |
//! | `noticed_kill` | before kill(2) with SIGKILL, of the last process with an area | the deref callback runs |
//! | `noticed_exit` | the child's last instruction before `_exit` | the deref callback runs |
//! | `noticed_exec` | the child's last instruction before execve(2) | the deref callback runs |
//! | `engine` | before an engine is built, used for one fault, and shut down | after that |
//!
//! The series take turns, so that what the machine does meanwhile befalls all of them.

#[path = "../common/mod.rs"]
mod common;

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use serde::Serialize;

use crate::common::life::{Lives, NAMES};
use crate::common::numbers::quantile;

/// Measures forks, the noticing of deaths, and lives of engines.
#[derive(Parser)]
#[command(name = "process_life")]
struct Arguments {
    /// Few rounds: shows that everything works, in seconds
    #[arg(long)]
    quick: bool,
    /// Write the results as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Accepted because cargo passes it
    #[arg(long, hide = true)]
    bench: bool,
}

const FULL_ROUNDS: usize = 2000;
const QUICK_ROUNDS: usize = 100;
/// What the run may take, in seconds, before the kernel ends it.
const DEADLINE_SECONDS: u32 = 900;

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("process_life: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The latencies of one series, in nanoseconds.
struct Series {
    name: &'static str,
    ns: Vec<f64>,
}

#[derive(Serialize)]
struct Row {
    name: &'static str,
    p50_us: f64,
    p99_us: f64,
    longest_us: f64,
    n: usize,
}

#[derive(Serialize)]
struct Report {
    version: u32,
    fork_region_to_fork_plain: f64,
    series: Vec<Row>,
}

impl Series {
    fn row(mut self) -> Row {
        self.ns.sort_unstable_by(f64::total_cmp);
        let at = |share: f64| quantile(&self.ns, share) / 1000.0;
        Row { name: self.name, p50_us: at(0.5), p99_us: at(0.99), longest_us: at(1.0), n: self.ns.len() }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    let json = arguments.json.as_ref().map(|path| File::create(path).with_context(|| path.display().to_string()));
    let json = json.transpose()?;
    nix::unistd::alarm::set(DEADLINE_SECONDS);
    let rounds = if arguments.quick { QUICK_ROUNDS } else { FULL_ROUNDS };
    let mut lives = Lives::new(Lives::twin()?)?;
    let mut series = NAMES.map(|name| Series { name, ns: Vec::with_capacity(rounds) });
    for _ in 0..rounds {
        let ns = lives.round()?;
        series.iter_mut().zip(ns).for_each(|(series, ns)| series.ns.push(ns as f64));
    }
    let rows = series.map(Series::row);
    let ratio = rows[1].p50_us / rows[0].p50_us;
    println!("{:14} {:>10} {:>10} {:>10}   µs, of {rounds}", "series", "p50", "p99", "longest");
    for Row { name, p50_us, p99_us, longest_us, .. } in &rows {
        println!("{name:14} {p50_us:10.1} {p99_us:10.1} {longest_us:10.1}");
    }
    println!("a fork with a region takes {ratio:.1} times a plain one (p50)");
    if let Some(mut file) = json {
        let report = Report { version: 1, fork_region_to_fork_plain: ratio, series: rows.into() };
        file.write_all(serde_json::to_string_pretty(&report)?.as_bytes()).context("writing the results")?;
    }
    Ok(())
}
