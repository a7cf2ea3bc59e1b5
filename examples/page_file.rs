//! Pages a file in through memory: attaches it, touches every page once, and checks what came.
//!
//! ```text
//! cargo run --release --example page_file -- FILE --order random --threads 4 --fault-around 16
//! ```
//!
//! Every page is touched exactly once over all threads. Then a SHA-256 of the region is compared with one of a plain
//! read of the file. A touch of a page that can't be had, because the file became shorter or its disk failed, is SIGBUS:
//! the program catches it to say so.

use std::fs::File;
use std::io::{ErrorKind, IsTerminal, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use kiomap::{AttachOptions, Engine, FAULT_AROUND_MAX_PAGES, Kiobuf, Region, page_size};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use sha2::{Digest, Sha256};

/// Pages that a thread takes at a time.
const BATCH_PAGES: u64 = 64;
/// Bytes that are hashed at a time.
const CHUNK_BYTES: usize = 1 << 20;

/// Pages a file in through memory, touching each page once, and checks its SHA-256.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// The file: a regular file or a block device
    file: PathBuf,
    /// The order in which pages are touched
    #[arg(long, value_enum, default_value_t = Order::Random)]
    order: Order,
    /// Threads that touch, 1 to 256
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=256))]
    threads: u64,
    /// Pages that one fault brings at the most, 1 to 512
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u64).range(1..=FAULT_AROUND_MAX_PAGES as u64))]
    fault_around: u64,
    /// Seed of the random order
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Order {
    Random,
    Sequential,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // With its causes, in one line.
            eprintln!("page_file: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let path = options.file.display();
    let (mut file, len_bytes) = open(&options.file)?;
    check_memory(len_bytes)?;

    let mut list = Kiobuf::new();
    list.map_file(&file, 0..len_bytes).with_context(|| format!("listing the pages of {path}"))?;
    let nr_pages = list.nr_pages();
    let engine = Engine::builder()
        .fault_around_pages(options.fault_around as usize)
        .build()
        .context("building the engine (`cargo run --example doctor` says what this machine lacks)")?;
    let vmap = engine.vmap(&list).with_context(|| format!("publishing the pages of {path}"))?;
    let region = vmap.attach(&AttachOptions::new().read_only().exact()).with_context(|| format!("attaching {path}"))?;
    catch_sigbus(&options.file, &file, len_bytes)?;

    // Only for a terminal, and beside the results.
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new(nr_pages) } else { ProgressBar::hidden() };
    bar.set_style(ProgressStyle::with_template("{bar:40} {human_pos} of {human_len} pages  {elapsed}")?);
    let touches = touch_all(&region, nr_pages, options, &bar)?;
    bar.finish_and_clear();

    // A thread that waited for a page may go on before the page is counted.
    engine.settle().context("waiting for the engine's counters")?;
    let stats = engine.stats();
    let installed = stats.pages_copied + stats.pages_zeroed;
    ensure!(installed == nr_pages, "{installed} pages were installed for the {nr_pages} pages of {path}");
    let blocks = nr_pages.div_ceil(options.fault_around);
    ensure!(stats.faults >= blocks, "{} faults can't have brought {blocks} blocks of pages", stats.faults);

    let through_memory = hash_region(&region, len_bytes)?;
    let (plain, read_bytes) = hash_file(&mut file).with_context(|| format!("reading {path}"))?;
    ensure!(read_bytes == len_bytes, "{path} had {len_bytes} bytes and now has {read_bytes}: leave it alone meanwhile");
    ensure!(
        through_memory == plain,
        "{path} differs: SHA-256 {through_memory} through memory, {plain} by reading it (was it written to meanwhile?)"
    );

    let seconds = touches.elapsed.as_secs_f64().max(1e-9);
    let megabytes_per_second = len_bytes as f64 / 1e6 / seconds;
    let [p50, p99] = [0.50, 0.99].map(|share| touches.latencies.quantile_us(share));
    let order = match options.order {
        Order::Random => "random",
        Order::Sequential => "sequential",
    };
    let text = if options.json {
        let value = serde_json::json!({
            "file": options.file.to_string_lossy(),
            "bytes": len_bytes,
            "pages": nr_pages,
            "page_size": page_size(),
            "order": order,
            "seed": options.seed,
            "threads": options.threads,
            "fault_around_pages": options.fault_around,
            "open_way": engine.open_way().to_string(),
            "faults": stats.faults,
            "pages_installed": installed,
            "worker_reads": stats.worker_reads,
            "seconds": seconds,
            "megabytes_per_second": megabytes_per_second,
            "touch_p50_us": p50,
            "touch_p99_us": p99,
            "sha256": plain,
            "verified": true,
        });
        serde_json::to_string_pretty(&value)? + "\n"
    } else {
        let Options { threads, fault_around, .. } = *options;
        let plural = if threads == 1 { "" } else { "s" };
        let faults = stats.faults;
        format!(
            "file     {path}\n\
             size     {len_bytes} bytes, {nr_pages} pages of {} bytes\n\
             order    {order}, {threads} thread{plural}, up to {fault_around} pages a fault, {}\n\
             faults   {faults}, {:.1} pages each ({} reads were left to worker threads)\n\
             speed    {megabytes_per_second:.0} MB/s, {seconds:.2} s\n\
             touch    p50 {p50:.2} µs, p99 {p99:.2} µs (first touch of each page)\n\
             sha256   {plain}\n\
             verified: {nr_pages} pages touched once each, SHA-256 through memory equals that of a plain read\n",
            page_size(),
            engine.open_way(),
            nr_pages as f64 / faults.max(1) as f64,
            stats.worker_reads,
        )
    };
    // Not print!, which panics when nobody listens.
    std::io::stdout().lock().write_all(text.as_bytes()).context("writing the report")
}

/// Opens what can be paged in, and says why anything else can't.
fn open(path: &Path) -> Result<(File, u64)> {
    let shown = path.display();
    // Looked at before it is opened: opening a FIFO would wait for its writer.
    let kind = std::fs::metadata(path).with_context(|| format!("{shown} can't be examined"))?.file_type();
    ensure!(!kind.is_dir(), "{shown} is a directory, not a file");
    ensure!(kind.is_file() || kind.is_block_device(), "{shown} is neither a regular file nor a block device");
    let mut file = File::open(path).with_context(|| format!("{shown} can't be opened"))?;
    // A block device has its length here, and none in its metadata.
    let len_bytes = file.seek(SeekFrom::End(0)).with_context(|| format!("the length of {shown}"))?;
    ensure!(len_bytes > 0, "{shown} is empty: it has no page to touch");
    Ok((file, len_bytes))
}

/// Refuses a file that does not fit in memory: the region keeps every page that was touched.
fn check_memory(len_bytes: u64) -> Result<()> {
    let text = std::fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let available = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    let available = available.context("/proc/meminfo has no MemAvailable")? * 1024;
    ensure!(
        len_bytes <= available,
        "its {} MiB would stay in memory, and {} MiB are available",
        len_bytes >> 20,
        available >> 20
    );
    Ok(())
}

/// What the touching threads measured.
struct Touches {
    elapsed: Duration,
    latencies: Latencies,
}

/// Touches every page once, and proves that it was once.
fn touch_all(region: &Region, nr_pages: u64, options: &Options, bar: &ProgressBar) -> Result<Touches> {
    let permutation = Permutation::new(nr_pages, options.seed);
    let next = AtomicU64::new(0);
    let touched: Vec<AtomicU64> = (0..nr_pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
    let touch = || -> Result<Latencies> {
        let mut latencies = Latencies::default();
        loop {
            let first = next.fetch_add(BATCH_PAGES, Ordering::Relaxed);
            if first >= nr_pages {
                return Ok(latencies);
            }
            let batch = first..(first + BATCH_PAGES).min(nr_pages);
            bar.inc(batch.end - batch.start);
            for index in batch {
                let page = match options.order {
                    Order::Random => permutation.at(index),
                    Order::Sequential => index,
                };
                let start = Instant::now();
                region.read_at(page as usize * page_size(), &mut [0])?;
                latencies.add(start.elapsed());
                let bit = 1 << (page % 64);
                let before = touched[(page / 64) as usize].fetch_or(bit, Ordering::Relaxed);
                ensure!(before & bit == 0, "page {page} was touched twice");
            }
        }
    };
    let start = Instant::now();
    let latencies = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..options.threads).map(|_| scope.spawn(touch)).collect();
        threads.into_iter().try_fold(Latencies::default(), |mut all, thread| match thread.join() {
            Ok(part) => {
                all.merge(&part?);
                Ok(all)
            }
            Err(_) => bail!("a thread panicked"),
        })
    })?;
    let elapsed = start.elapsed();
    let pages = touched.iter().map(|word| u64::from(word.load(Ordering::Relaxed).count_ones())).sum::<u64>();
    ensure!(pages == nr_pages, "{pages} of {nr_pages} pages were touched");
    Ok(Touches { elapsed, latencies })
}

/// A pseudo-random order of `0..len` without a table: a Feistel network permutes the smallest power of four that is
/// not below `len`, and a number that falls outside is permuted again until it falls inside, which keeps it a
/// permutation.
struct Permutation {
    len: u64,
    half_bits: u32,
    keys: [u64; 4],
}

impl Permutation {
    fn new(len: u64, seed: u64) -> Permutation {
        let bits = u64::BITS - len.saturating_sub(1).leading_zeros();
        let keys =
            [1, 2, 3, 4].map(|round: u64| scramble(seed.wrapping_add(round.wrapping_mul(0x9e37_79b9_7f4a_7c15))));
        Permutation { len, half_bits: bits.div_ceil(2).max(1), keys }
    }

    fn at(&self, index: u64) -> u64 {
        let mask = (1 << self.half_bits) - 1;
        let mut value = index;
        loop {
            let (mut left, mut right) = (value >> self.half_bits, value & mask);
            for key in self.keys {
                (left, right) = (right, left ^ (scramble(right ^ key) & mask));
            }
            value = left << self.half_bits | right;
            if value < self.len {
                return value;
            }
        }
    }
}

/// Mixes the bits of a number; every bit of the answer depends on every bit of it.
fn scramble(mut x: u64) -> u64 {
    x = (x ^ x >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
    x = (x ^ x >> 32).wrapping_mul(0xd6e8_feb8_6659_fd93);
    x ^ x >> 32
}

/// A histogram of durations: 16 buckets for each power of two of nanoseconds, so that any number of touches takes no
/// more room than one, and a quantile is off by at most 1/16.
struct Latencies {
    buckets: Vec<u64>,
}

const BUCKETS_PER_DOUBLING: u64 = 16;

impl Default for Latencies {
    fn default() -> Self {
        Latencies { buckets: vec![0; (u64::BITS as u64 * BUCKETS_PER_DOUBLING) as usize] }
    }
}

impl Latencies {
    fn add(&mut self, duration: Duration) {
        // 16 ns at least: below that the clock says nothing.
        let ns = (duration.as_nanos() as u64).max(BUCKETS_PER_DOUBLING);
        let doubling = u64::from(ns.ilog2());
        let part = (ns >> (doubling - 4)) - BUCKETS_PER_DOUBLING;
        self.buckets[(doubling * BUCKETS_PER_DOUBLING + part) as usize] += 1;
    }

    fn merge(&mut self, other: &Latencies) {
        self.buckets.iter_mut().zip(&other.buckets).for_each(|(mine, theirs)| *mine += theirs);
    }

    /// The upper end, in microseconds, of the bucket below which this share of the durations lies.
    fn quantile_us(&self, share: f64) -> f64 {
        let wanted = (self.buckets.iter().sum::<u64>() as f64 * share).ceil() as u64;
        let mut seen = 0;
        let bucket = self.buckets.iter().position(|count| {
            seen += count;
            seen >= wanted.max(1)
        });
        let bucket = bucket.unwrap_or(0) as u64;
        let (doubling, part) = (bucket / BUCKETS_PER_DOUBLING, bucket % BUCKETS_PER_DOUBLING);
        let ns = (BUCKETS_PER_DOUBLING + part + 1) as f64 * 2f64.powi(doubling as i32 - 4);
        ns / 1000.0
    }
}

fn hash_region(region: &Region, len_bytes: u64) -> Result<String> {
    let mut hash = Sha256::new();
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut at = 0;
    // The region is whole pages; the file may end within the last.
    while at < len_bytes as usize {
        let part = &mut chunk[..CHUNK_BYTES.min(len_bytes as usize - at)];
        region.read_at(at, part)?;
        hash.update(&*part);
        at += part.len();
    }
    let mut slack = vec![0; region.len_bytes() - at];
    region.read_at(at, &mut slack)?;
    ensure!(slack.iter().all(|&byte| byte == 0), "the rest of the last page is not zero");
    Ok(hex(&hash.finalize()))
}

fn hash_file(file: &mut File) -> Result<(String, u64)> {
    let mut hash = Sha256::new();
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut len_bytes = 0;
    file.rewind()?;
    loop {
        match file.read(&mut chunk) {
            Ok(0) => return Ok((hex(&hash.finalize()), len_bytes)),
            Ok(count) => {
                hash.update(&chunk[..count]);
                len_bytes += count as u64;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What the SIGBUS handler says: made beforehand, because it may neither allocate nor format.
struct LastWords {
    file: i32,
    len_bytes: u64,
    shrank: String,
    unreadable: String,
}

static LAST_WORDS: OnceLock<LastWords> = OnceLock::new();

/// Has SIGBUS end the program with an error message rather than silently.
fn catch_sigbus(path: &Path, file: &File, len_bytes: u64) -> Result<()> {
    let shown = path.display();
    // Begins by ending the line that a progress bar may be on.
    let start = if std::io::stderr().is_terminal() { "\n" } else { "" };
    LAST_WORDS.get_or_init(|| LastWords {
        file: file.as_raw_fd(),
        len_bytes,
        shrank: format!("{start}page_file: {shown} became shorter than its {len_bytes} bytes while it was paged in\n"),
        unreadable: format!("{start}page_file: a page of {shown} could not be read: see the kernel's log (dmesg)\n"),
    });
    let action = SigAction::new(SigHandler::Handler(on_sigbus), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler makes only async-signal-safe calls.
    unsafe { sigaction(Signal::SIGBUS, &action) }.context("sigaction for SIGBUS")?;
    Ok(())
}

extern "C" fn on_sigbus(_: libc::c_int) {
    // SAFETY: fstat, write and _exit are async-signal-safe; `stat` is plain numbers, and the text is never changed.
    unsafe {
        if let Some(words) = LAST_WORDS.get() {
            let mut stat: libc::stat = std::mem::zeroed();
            let known = libc::fstat(words.file, &raw mut stat) == 0;
            let text =
                if known && (stat.st_size as u64) < words.len_bytes && stat.st_mode & libc::S_IFMT == libc::S_IFREG {
                    &words.shrank
                } else {
                    &words.unreadable
                };
            libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len());
        }
        libc::_exit(1)
    }
}
