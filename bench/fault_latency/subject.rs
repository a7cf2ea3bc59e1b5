//! Memory to touch, and who answers for it: the kernel, the floor, the engine. Each is made anew for each pass.

use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::{Context, Result, ensure};
use kiomap::{AttachOptions, Engine, Kiobuf, OpenWay, Region, Stats, page_size};
use nix::errno::Errno;

use crate::raw::{Mapping, Memory, Message, Uffd, Waiting, usage};
use crate::series::{Placement, Series, Subject};
use crate::touch::{Contents, mark};

/// Messages that the floor reads at once.
const MESSAGES: usize = 16;

/// What the passes share.
pub(crate) struct Surroundings {
    /// The pages that floor and engine copy from.
    pub(crate) source: Source,
    /// The engine's way to open a userfaultfd.
    pub(crate) way: OpenWay,
    /// The processor of everything that runs on one.
    pub(crate) cpu: usize,
}

/// Pages full of their marks. They begin at a page's start: a list of bytes that do not would be copied page by page
/// through a buffer.
#[derive(Clone)]
pub(crate) struct Source(Arc<Mapping>);

impl Source {
    pub(crate) fn new(pages: usize) -> Result<Source> {
        let memory = Mapping::new(Memory::Anon, pages, pages)?;
        let words = page_size() / size_of::<u64>();
        for n in 0..pages * words {
            // SAFETY: the word lies within the mapping, which nobody else knows yet.
            unsafe { memory.as_ptr().cast::<u64>().add(n).write(mark(n / words)) };
        }
        Ok(Source(Arc::new(memory)))
    }
}

impl AsRef<[u8]> for Source {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the mapping lives as long as this value; nobody writes to it any more.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr(), self.0.len()) }
    }
}

/// Memory, untouched, and who answers for it.
pub(crate) enum Ready {
    Native { memory: Mapping, faults_before: u64 },
    Floor { memory: Arc<Mapping>, pages: usize, handler: JoinHandle<u64> },
    Engine { region: Region, engine: Engine, before: Box<Stats>, child: bool },
}

impl Ready {
    pub(crate) fn new(series: &Series, pages: usize, around: &Surroundings) -> Result<Ready> {
        match series.subject {
            Subject::Native(memory) => {
                let backed = if series.is_sigbus() { 0 } else { pages };
                let memory = Mapping::new(memory, pages, backed)?;
                Ok(Ready::Native { memory, faults_before: usage()?.0 })
            }
            Subject::Floor(memory, waiting) => floor(series, memory, waiting, pages, around),
            Subject::Engine => engine(series, pages, around),
        }
    }

    /// The address of the first page.
    pub(crate) fn base(&self) -> usize {
        match self {
            Ready::Native { memory, .. } => memory.as_ptr().expose_provenance(),
            Ready::Floor { memory, .. } => memory.as_ptr().expose_provenance(),
            Ready::Engine { region, .. } => region.as_ptr().expose_provenance(),
        }
    }

    /// Checks that as many faults were answered as the pass must have caused, each in the right way.
    pub(crate) fn finish(self, series: &Series, pages: usize, faults: usize) -> Result<()> {
        let (pages, faults) = (pages as u64, faults as u64);
        match self {
            // The kernel doesn't count faults that end in a signal; the pass counted the signals.
            Ready::Native { .. } if series.is_sigbus() => {}
            Ready::Native { faults_before, .. } => {
                let seen = usage()?.0 - faults_before;
                // The process has a few other faults. Large pages would make it far fewer than one a page.
                let most = faults + faults / 8 + 256;
                ensure!((faults..=most).contains(&seen), "{seen} page faults for {pages} pages, not one each");
            }
            Ready::Floor { memory, pages, handler } => {
                // The page behind the last tells the handler that it is done.
                // SAFETY: the page lies within the mapping; no reference to it exists.
                unsafe { memory.as_ptr().add(pages * page_size()).write_volatile(1) };
                let seen = handler.join().ok().context("the floor's handler panicked")?;
                ensure!(seen == faults, "the floor answered {seen} faults, not {faults}");
            }
            Ready::Engine { region, engine, before, child } => {
                // The last page was counted after its thread woke, so perhaps not yet.
                engine.settle().context("settling the engine's counts")?;
                let after = engine.stats();
                let seen = |count: fn(&Stats) -> u64| count(&after) - count(&before);
                let (poisoned, copied) = if series.is_sigbus() { (pages, 0) } else { (0, pages) };
                ensure!(seen(|s| s.faults) == faults, "the engine read {} faults, not {faults}", seen(|s| s.faults));
                ensure!(seen(|s| s.pages_copied) == copied, "{} pages copied, not {copied}", seen(|s| s.pages_copied));
                ensure!(
                    seen(|s| s.pages_poisoned) == poisoned,
                    "{} SIGBUS, not {poisoned}",
                    seen(|s| s.pages_poisoned)
                );
                let extra = seen(|s| s.parked + s.strays + s.worker_reads + s.source_errors + s.pages_zeroed);
                ensure!(extra == 0, "faults went another way than straight: {after:?}");
                if child {
                    // The engine's own process has touched nothing.
                    let own = engine.spaces().context("listing the processes served")?[0].faults;
                    ensure!(own == 0, "{own} faults of the parent in a pass of its child");
                }
                drop(region);
            }
        }
        Ok(())
    }
}

fn floor(series: &Series, memory: Memory, waiting: Waiting, pages: usize, around: &Surroundings) -> Result<Ready> {
    let memory = Arc::new(Mapping::new(memory, pages + 1, pages + 1)?);
    let uffd = Uffd::open(around.way, waiting)?;
    uffd.register(&memory)?;
    let (range, source) = (Arc::clone(&memory), around.source.clone());
    let (block, poison) = (series.around * page_size(), series.is_sigbus());
    let base = memory.as_ptr().expose_provenance();
    let end = pages * page_size();
    let handler = std::thread::Builder::new().name("floor".into()).spawn(move || {
        // Keeps the mapping until the last page is answered.
        let _range = range;
        let source = source.as_ref().as_ptr();
        let mut messages = [Message::default(); MESSAGES];
        let (mut faults, mut done) = (0, false);
        while !done {
            let mut failed = Ok(());
            let waited = uffd.wait(&mut messages, |addr| {
                let offset = addr - base;
                let answer = if offset >= end {
                    done = true;
                    // SAFETY: the page is registered, and no reference to it exists; the source has a page.
                    unsafe { uffd.copy(base + end, source, page_size()) }
                } else if poison {
                    faults += 1;
                    uffd.poison(base + offset, page_size())
                } else {
                    faults += 1;
                    let start = offset / block * block;
                    let len = block.min(end - start);
                    // SAFETY: the block is registered, touched through atomics only; the source is as long as it.
                    unsafe { uffd.copy(base + start, source.add(start), len) }
                };
                failed = failed.and(answer);
            });
            if let Err(errno) = waited.and(failed) {
                unanswerable(errno);
            }
        }
        faults
    });
    let handler = handler.context("starting the floor's handler")?;
    Ok(Ready::Floor { memory, pages, handler })
}

/// Ends the process: a thread would wait for ever.
fn unanswerable(errno: Errno) -> ! {
    eprintln!("fault_latency: the floor can't answer a fault: {errno}");
    std::process::exit(1)
}

fn engine(series: &Series, pages: usize, around: &Surroundings) -> Result<Ready> {
    let mut builder = Engine::builder().fault_around_pages(series.around).workers(1);
    if series.placement == Placement::SameCore {
        builder = builder.handler_cpu(around.cpu);
    }
    let engine = builder.build().context("building an engine")?;
    let mut list = Kiobuf::new();
    if series.contents == Contents::Nothing {
        list.map_hole(pages as u64)?;
    } else {
        list.map_slice(around.source.clone())?;
    }
    let region = engine.vmap(&list)?.attach(&AttachOptions::new()).context("attaching a region")?;
    let before = Box::new(engine.stats());
    Ok(Ready::Engine { region, engine, before, child: series.child })
}
