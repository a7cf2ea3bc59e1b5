//! Memory to touch, and who answers for it: the kernel, the floor, the engine. Each is made anew for each pass.

use anyhow::{Context, Result, ensure};
use kiomap::{AttachOptions, Engine, Kiobuf, OpenWay, Region, Stats};

use crate::common::floor::{Floor, With};
use crate::common::raw::{Mapping, usage};
use crate::common::source::Source;
use crate::common::touch::Contents;
use crate::series::{Placement, Series, Subject};

/// What the passes share.
pub(crate) struct Surroundings {
    /// The pages that floor and engine copy from.
    pub(crate) source: Source,
    /// The engine's way to open a userfaultfd.
    pub(crate) way: OpenWay,
    /// The processor of everything that runs on one.
    pub(crate) cpu: usize,
}

/// Memory, untouched, and who answers for it.
pub(crate) enum Ready {
    Native { memory: Mapping, faults_before: u64 },
    Floor(Floor),
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
            Subject::Floor(memory, waiting) => {
                let with = if series.is_sigbus() { With::Poison } else { With::Copy(series.around) };
                let source = around.source.clone();
                Ok(Ready::Floor(Floor::start(memory, waiting, with, pages, source, around.way, None)?))
            }
            Subject::Engine => engine(series, pages, around),
        }
    }

    /// The address of the first page.
    pub(crate) fn base(&self) -> usize {
        match self {
            Ready::Native { memory, .. } => memory.as_ptr().expose_provenance(),
            Ready::Floor(floor) => floor.base(),
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
            Ready::Floor(floor) => {
                let seen = floor.finish()?;
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
