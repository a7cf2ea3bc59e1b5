//! Serves `criu restore --lazy-pages` in the place of CRIU's own lazy-pages daemon.
//!
//! ```text
//! cargo run --release --example criu_lazy_pages -- --images-dir DIR &
//! criu restore --images-dir DIR --lazy-pages
//! ```
//!
//! It reads the images, listens on `lazy-pages.socket` in the same folder, and brings the pages of the restored tasks when they are
//! touched: faults, forks, and memory that moves or is given up are the engine's work. When the tree runs it fills in the
//! rest, and ends with 0: the tasks need it no more. Anything else ends it with 1 and a line that says why.
//!
//! `main.rs` is the program, `images.rs` the files, `list.rs` what a task's pages are, `conversation.rs` what CRIU says, `serve.rs`
//! a restore, `stop.rs` the signals that end it early.

mod conversation;
mod images;
mod list;
mod serve;
mod stop;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use kiomap::{Engine, FAULT_AROUND_MAX_PAGES, Features};

use conversation::Listener;
use serve::Task;
use stop::Stop;

/// Serves `criu restore --lazy-pages` in the place of `criu lazy-pages`.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// The folder with the images
    #[arg(short = 'D', long, default_value = ".")]
    images_dir: PathBuf,
    /// The folder for the socket, which `criu restore` is given too; the one with the images unless set
    #[arg(short = 'W', long)]
    work_dir: Option<PathBuf>,
    /// Pages that one fault brings, 1 to 512; as memory is touched unless set
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=FAULT_AROUND_MAX_PAGES as u64))]
    fault_around: Option<u64>,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
    /// Tell on the standard error what happens
    #[arg(short, long)]
    verbose: bool,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // With its causes, in one line.
            eprintln!("criu_lazy_pages: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let stop = Stop::install()?;
    let start = Instant::now();
    let tell = |what: &str| {
        if options.verbose {
            eprintln!("criu_lazy_pages: {:.3} s: {what}", start.elapsed().as_secs_f64());
        }
    };
    let whole = |path: &PathBuf| path.canonicalize().with_context(|| format!("looking for {}", path.display()));
    let folder = whole(&options.images_dir)?;
    let work_folder = options.work_dir.as_ref().map(whole).transpose()?.unwrap_or_else(|| folder.clone());

    let pids = images::read_pids(&folder)?;
    let mut builder = Engine::builder();
    if let Some(pages) = options.fault_around {
        builder = builder.fault_around_pages(pages as usize);
    }
    let engine =
        builder.build().context("building the engine (`cargo run --example doctor` says what this machine lacks)")?;
    ensure!(
        engine.features().contains(Features::POISON),
        "this kernel lacks UFFDIO_POISON (Linux 6.6): a page that can't be had could not be refused in a task"
    );
    let mut tasks = BTreeMap::new();
    for &pid in &pids {
        if let Some(image) = list::load(&folder, pid)? {
            tasks.insert(pid, Task::publish(&engine, image)?);
        }
    }

    let _lock = conversation::lock(&work_folder)?;
    let listener = Listener::new(&work_folder)?;
    tell(&format!("{} tasks are expected at {}", pids.len(), listener.path().display()));
    let conversation = listener.accept(&stop)?;
    serve::serve(&engine, &pids, &tasks, &conversation, &stop, &tell)?;

    engine.settle().context("waiting for the engine's counters")?;
    let stats = engine.stats();
    let pages: u64 = tasks.values().map(|task| task.nr_pages).sum();
    let seconds = start.elapsed().as_secs_f64();
    let text = if options.json {
        let of = |task: &Task| serde_json::json!({ "pid": task.pid, "pages": task.nr_pages });
        let value = serde_json::json!({
            "tasks": tasks.values().map(of).collect::<Vec<_>>(),
            "zombies": pids.iter().filter(|pid| !tasks.contains_key(pid)).collect::<Vec<_>>(),
            "pages": pages,
            "faults": stats.faults,
            "pages_copied": stats.pages_copied,
            "pages_zeroed": stats.pages_zeroed,
            "pages_poisoned": stats.pages_poisoned,
            "seconds": seconds,
        });
        serde_json::to_string_pretty(&value)? + "\n"
    } else {
        format!("restored: {pages} lazy pages of {} tasks, {} faults, {seconds:.3} s\n", tasks.len(), stats.faults)
    };
    std::io::stdout().write_all(text.as_bytes()).context("writing to the standard output")
}
