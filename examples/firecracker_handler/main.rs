//! Pages in the memory of Firecracker VMs that resume from one snapshot.
//!
//! ```text
//! cargo run --release --features firecracker --example firecracker_handler -- --socket /run/vm/pages.sock --memory /run/vm/memory
//! ```
//!
//! Each VM whose snapshot is loaded with `"mem_backend": {"backend_type": "Uffd", "backend_path": "/run/vm/pages.sock"}` connects
//! and is served until it ends: what it touches is copied from the memory file, and what its balloon gives back is zeros from then
//! on. Any number of VMs share one handler. A VM that can't be served has its touches refused, as `--on-error` says; it never
//! gets other bytes than those of the file.
//!
//! SIGTERM and SIGINT end the handler: nobody is accepted any more, what the VMs that run are missing is brought, and they go on
//! without it. A second signal ends that too: what is missing is then refused.
//!
//! It reads top to bottom: `main.rs` is the story, `listen.rs` the socket and the signals, `peer.rs` who connects, `vm.rs` the life of
//! one VM, `sets.rs` the working sets, `report.rs` what is printed.

mod listen;
mod peer;
mod report;
mod sets;
mod vm;

use std::fs::File;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use kiomap::{Engine, FAULT_AROUND_MAX_PAGES, Kiobuf, Refusal, Shutdown};

use listen::{Ending, Listener};
use report::Report;
use sets::Sets;
use vm::{Host, Threads};

/// Pages in the memory of Firecracker VMs that resume from one snapshot.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// The Unix socket to make: the `backend_path` of the snapshot's `mem_backend`
    #[arg(long)]
    socket: PathBuf,
    /// Who may connect: the socket's permissions, in octal
    #[arg(long, default_value = "600", value_parser = |text: &str| u32::from_str_radix(text, 8))]
    socket_mode: u32,
    /// The snapshot's memory file. Its holes are zeros that nobody reads
    #[arg(long)]
    memory: PathBuf,
    /// Keep here which pages VMs fault on: a working set. One that is there is exchanged, or added to if it is also replayed
    #[arg(long)]
    record: Option<PathBuf>,
    /// Bring the pages of this working set as soon as a VM connects. It may be missing if it is also recorded
    #[arg(long)]
    replay: Option<PathBuf>,
    /// Pages that one fault brings, 1 to 512; unless set, one, and more where memory is walked through
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=FAULT_AROUND_MAX_PAGES as u64))]
    fault_around: Option<u64>,
    /// Bring all pages of each VM in the background
    #[arg(long)]
    prefill: bool,
    /// What becomes of a VM that touches a page that can't be had
    #[arg(long, value_enum, default_value_t = OnError::Sigbus)]
    on_error: OnError,
    /// VMs that are served at once, at the most
    #[arg(long, default_value_t = 1024)]
    max_vms: usize,
    /// Milliseconds in which a message must be complete
    #[arg(long, default_value_t = 5000)]
    handshake_ms: u64,
    /// End when the first VM has ended
    #[arg(long)]
    once: bool,
    /// Print a JSON object a line instead of text
    #[arg(long)]
    json: bool,
}

/// What becomes of a VM that touches a page that can't be had.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OnError {
    /// The touch is SIGBUS; a system call on the page answers EFAULT
    Sigbus,
    /// The VM's process is killed
    Kill,
}

impl From<OnError> for Refusal {
    fn from(what: OnError) -> Refusal {
        match what {
            OnError::Sigbus => Refusal::Sigbus,
            OnError::Kill => Refusal::Kill,
        }
    }
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("firecracker_handler: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    // Before there is another thread, which would get the signals.
    let ending = Arc::new(Ending::on_signals()?);

    let path = options.memory.display();
    let file = File::open(&options.memory).with_context(|| format!("opening {path}"))?;
    let mut list = Kiobuf::new();
    list.map_sparse_file(&file).with_context(|| format!("listing the pages of {path}"))?;
    let memory_bytes = list.length();
    let mut builder = Engine::builder();
    if let Some(pages) = options.fault_around {
        builder = builder.fault_around_pages(pages as usize);
    }
    let engine = builder.build().context("building the engine (`cargo run --example doctor` says what is lacking)")?;
    let mut vmap = engine.vmap_builder(&list);
    if options.record.is_some() || options.replay.is_some() {
        vmap = vmap.record_working_set();
    }
    let vmap = vmap.build().with_context(|| format!("publishing the pages of {path}"))?;
    let nothing = engine.vmap(&Kiobuf::new()).context("publishing nothing")?;
    let sets = Sets::open(options.record.clone(), options.replay.as_deref(), &vmap)?;

    let report = Report::new(options.json);
    let host = Arc::new(Host {
        engine,
        vmap,
        nothing,
        memory_bytes,
        sets,
        report,
        refusal: options.on_error.into(),
        prefill: options.prefill,
        max_vms: options.max_vms,
        handshake: Duration::from_millis(options.handshake_ms),
        once: options.once,
        ending: Arc::clone(&ending),
        threads: Threads::default(),
    });
    let listener = Listener::bind(&options.socket, options.socket_mode)?;
    host.report.listening(&options.socket, &options.memory, memory_bytes);
    let served = listener.serve(&host);
    // Those that run are let go before the engine ends, whatever has ended the listening.
    ending.begin();
    let stuck = host.threads.wait_for_all();
    let saved = host.sets.save(&host.vmap);
    host.engine.settle().context("waiting for the engine's counters")?;
    host.report.total(&host.engine, &host.vmap);
    served?;
    saved?;
    ensure!(
        stuck == 0,
        "{stuck} VMs could not be let go: they need this handler, and wait for ever for what is missing"
    );
    host.engine.shutdown(Shutdown::Poison).context("ending the engine")
}
