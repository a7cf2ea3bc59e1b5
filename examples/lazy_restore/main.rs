//! Restores the heap of a process lazily, and compares that with reading everything first.
//!
//! ```text
//! cargo run --release --example lazy_restore -- --size-mib 1024
//! ```
//!
//! It makes an image of a heap (or takes one that it made before), and restores it three times, each time in a fresh
//! process: with everything read first; lazily, where the pages that the work touches are recorded; and lazily with
//! those pages replayed. The work is a request that needs 5 % of the heap: it follows records from one to the next, each
//! found through a B-tree that lies in the heap too. Its answer is known from when the heap was made.
//!
//! Where nothing else is said the storage is slowed down to what a store at the other end of a gigabit line gives: half a
//! millisecond a read, 117 MB/s. `--latency-ms 0 --bandwidth-mb 0` takes the disk as it is.
//!
//! It reads top to bottom: `main.rs` is the story, `heap.rs` the heap and the work, `walk.rs` the work on any file, `image.rs` where it lies, `restore.rs` what
//! each process does, `report.rs` what is printed.

mod heap;
mod image;
mod report;
mod restore;
mod walk;

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};
use kiomap::page_size;
use sha2::{Digest, Sha256};

use heap::{Known, Work};
use image::{Kind, Storage};
use report::Report;
use restore::{How, Outcome, Plan};

/// Restores a heap lazily from an image, with and without its recorded working set, and compares that with reading
/// everything first.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// Make the image of this file instead of a heap. The request then is a walk through its bytes, each step of which goes where
    /// the bytes of the step before say
    #[arg(long)]
    file: Option<PathBuf>,
    /// MiB of the heap, 4 to 65536
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(4..=65_536))]
    size_mib: u64,
    /// The share of the heap that the request needs, above 0 and below 0.5
    #[arg(long, default_value_t = 0.05)]
    working_set: f64,
    /// Pages that the heap's allocator hands out together, 1 to 512, a power of two: what is used together lies together
    #[arg(long, default_value_t = 64)]
    slab_pages: u64,
    /// Seed of the heap and of the request
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The image
    #[arg(long, value_enum, default_value_t = Kind::Plain)]
    kind: Kind,
    /// Where the image, its description and its working set are kept; a temporary folder unless set. An image that is there is
    /// taken, if it is of the same options
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Read the image from this URL, where `heap.image` of the folder was put (s3, gs, az, https, file)
    #[cfg_attr(feature = "object-store", arg(long, requires = "folder"))]
    #[cfg_attr(not(feature = "object-store"), arg(skip))]
    url: Option<String>,
    /// Read the image past the page cache
    #[arg(long)]
    direct: bool,
    /// What each read takes at the least, in milliseconds
    #[arg(long, default_value_t = 0.5)]
    latency_ms: f64,
    /// What all reads together get at the most, in MB/s; 0 for no limit
    #[arg(long, default_value_t = 117)]
    bandwidth_mb: u64,
    /// Threads that replay, 1 to 16
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=16))]
    replay_threads: u64,
    /// After the last first result bring the rest in the background, and check all of it without the engine
    #[arg(long)]
    fill: bool,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
    /// What a process of this program is to do: for itself
    #[arg(long, hide = true)]
    plan: Option<String>,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lazy_restore: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    if let Some(plan) = &options.plan {
        let outcome = restore::run(&serde_json::from_str(plan).context("reading the plan")?)?;
        return write_out(&(serde_json::to_string(&outcome)? + "\n"));
    }
    ensure!(
        options.working_set > 0.0 && options.working_set < 0.5,
        "--working-set is {}: it must be above 0 and below 0.5",
        options.working_set
    );
    ensure!(
        options.slab_pages.is_power_of_two() && options.slab_pages <= 512,
        "--slab-pages is {}: it must be a power of two, at most 512",
        options.slab_pages
    );
    ensure!(
        (0.0..=1000.0).contains(&options.latency_ms),
        "--latency-ms is {}: it must be from 0 to 1000",
        options.latency_ms
    );
    let temporary = match &options.folder {
        Some(_) => None,
        None => Some(tempfile::tempdir().context("making a temporary folder")?),
    };
    let folder = match (&options.folder, &temporary) {
        (Some(folder), _) => folder.as_path(),
        (None, Some(temporary)) => temporary.path(),
        (None, None) => bail!("no folder"),
    };
    std::fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    let (known, sha256) = image_in(folder, options)?;

    let storage = Storage {
        kind: options.kind,
        path: folder.join("heap.image"),
        url: options.url.clone(),
        direct: options.direct,
        latency_us: (options.latency_ms * 1e3) as u64,
        bytes_per_second: options.bandwidth_mb * 1_000_000,
    };
    let set = folder.join("heap.set");
    let mut outcomes = Vec::new();
    for how in [How::Eager, How::Cold, How::Replayed] {
        storage.drop_cached_pages()?;
        let plan = Plan {
            how,
            storage: storage.clone(),
            known: known.clone(),
            slab_pages: options.slab_pages,
            set: set.clone(),
            fill: (options.fill && how == How::Replayed).then(|| sha256.clone()),
            replay_threads: options.replay_threads as usize,
            shows_progress: io::stderr().is_terminal(),
        };
        outcomes.push(in_fresh_process(&plan)?);
    }
    let report = Report {
        options,
        known: &known,
        image_bytes: std::fs::metadata(&storage.path).context("looking at the image")?.len(),
        set_bytes: std::fs::metadata(&set).context("looking at the working set")?.len(),
        outcomes: &outcomes,
    };
    write_out(&if options.json { serde_json::to_string_pretty(&report.json())? + "\n" } else { report.text() })
}

/// Carries a plan out in a process that has nothing of the image yet.
fn in_fresh_process(plan: &Plan) -> Result<Outcome> {
    let program = std::env::current_exe().context("finding this program")?;
    let output = Command::new(program)
        .args(["--plan", &serde_json::to_string(plan)?])
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("starting a process that restores")?;
    ensure!(output.status.success(), "the process that restores ended with {}", output.status);
    serde_json::from_slice(&output.stdout).context("reading what the process that restores has said")
}

/// Makes the image and its description in a folder, unless they are there; answers with what is known, and its SHA-256.
fn image_in(folder: &Path, options: &Options) -> Result<(Known, String)> {
    let Options { size_mib, working_set, slab_pages, seed, kind, .. } = options;
    let made_with = format!("{size_mib} {working_set} {slab_pages} {seed} {kind:?} {}", page_size());
    // A file may have changed.
    let may_be_there = options.file.is_none();
    let (path, description) = (folder.join("heap.image"), folder.join("heap.json"));
    if may_be_there
        && path.exists()
        && let Ok(text) = std::fs::read_to_string(&description)
        && let Ok((made, known, sha256)) = serde_json::from_str::<(String, Known, String)>(&text)
        && made == made_with
    {
        return Ok((known, sha256));
    }
    let nr_pages = (size_mib << 20) / page_size() as u64;
    let given = options.file.as_deref().map(|path| given(path, options)).transpose()?;
    let len_bytes = given.as_ref().map_or(size_mib << 20, |(_, known)| known.len_bytes);
    let bar = if io::stderr().is_terminal() { ProgressBar::new(len_bytes) } else { ProgressBar::hidden() };
    bar.set_style(ProgressStyle::with_template("making    {bar:40} {bytes} of {total_bytes}")?);
    // One that is there describes another image.
    let _ = std::fs::remove_file(&description);
    let (known, sha256) = image::write(*kind, &path, |write| {
        let mut hashed = Hashed { write, digest: Sha256::new() };
        let known = match given {
            Some((file, known)) => {
                let copied = io::copy(&mut bar.wrap_read(file), &mut hashed).context("copying the file")?;
                ensure!(copied == known.len_bytes, "the file had {} bytes, and has {copied}", known.len_bytes);
                known
            }
            None => heap::make(&mut hashed, nr_pages, *slab_pages, *working_set, *seed, |done| bar.set_position(done))?,
        };
        Ok((known, hex(&hashed.digest.finalize())))
    })?;
    bar.finish_and_clear();
    let text = serde_json::to_string(&(made_with, &known, &sha256))?;
    std::fs::write(&description, text).context("writing the image's description")?;
    Ok((known, sha256))
}

/// Opens a file that an image is to be made of, and finds out what a walk through it comes to.
fn given(path: &Path, options: &Options) -> Result<(File, Known)> {
    let file = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    let meta = file.metadata().with_context(|| format!("looking at {}", path.display()))?;
    ensure!(meta.is_file() && meta.len() > 0, "{} is no file with bytes in it", path.display());
    let len_bytes = meta.len();
    let wanted = (len_bytes.div_ceil(page_size() as u64) as f64 * options.working_set) as u64;
    let (steps, seed) = ((wanted / options.slab_pages).max(1), options.seed);
    let walked = walk::walk(len_bytes, options.slab_pages, steps, seed, |range| {
        let mut bytes = vec![0; (range.end - range.start) as usize];
        file.read_exact_at(&mut bytes, range.start)?;
        Ok(Cow::Owned(bytes))
    })?;
    let touched_pages = walk::pages_of(&walked, len_bytes, options.slab_pages);
    Ok((file, Known { len_bytes, work: Work::Walk { seed, steps }, answer: walked.answer, touched_pages }))
}

/// Hashes what is written.
struct Hashed<'a> {
    write: &'a mut dyn Write,
    digest: Sha256,
}

impl Write for Hashed<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.write.write(bytes)?;
        self.digest.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.write.flush()
    }
}

fn sha256_of(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn write_out(text: &str) -> Result<()> {
    io::stdout().write_all(text.as_bytes()).context("writing to the standard output")
}
