//! What a series is, and what a pass of it yields.

use std::cell::OnceCell;
use std::fs::File;

use anyhow::{Context, Result, ensure};
use kiomap::{OpenWay, page_size};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};

use crate::common::clock::Clock;
use crate::common::raw::{Mapping, memfd};
use crate::common::source::{Source, fill};

/// What all series share.
pub(crate) struct Bench {
    /// The pages that floors and engines copy from; a single one until the first group that needs more.
    pub(crate) source: Source,
    /// A memfd of such pages; made when it is first needed.
    pub(crate) held: OnceCell<(usize, File)>,
    pub(crate) clock: Clock,
    /// The engine's way to open a userfaultfd.
    pub(crate) way: OpenWay,
    /// The processor of everything that runs on one.
    pub(crate) cpu: usize,
    /// Those that are allowed, the chosen one first.
    pub(crate) cpus: Vec<usize>,
    pub(crate) quick: bool,
}

impl Bench {
    /// Chooses between what is measured in full, and quickly.
    pub(crate) fn extent(&self, full: usize, quick: usize) -> usize {
        if self.quick { quick } else { full }
    }

    /// A memfd whose pages are full of their marks, and which does not grow. Nobody writes other bytes into it. All who
    /// ask for one ask for as many pages.
    pub(crate) fn held(&self, pages: usize) -> Result<&File> {
        if self.held.get().is_none() {
            let fd = memfd(pages)?;
            let memory = Mapping::of(Some(&fd), pages * page_size())?;
            fill(&memory, pages);
            fcntl(&fd, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW)).context("sealing a memfd")?;
            let _ = self.held.set((pages, fd.into()));
        }
        let (held, file) = self.held.get().context("the memfd was just made")?;
        ensure!(*held == pages, "the memfd has {held} pages, not {pages}");
        Ok(file)
    }
}

/// What one pass measured.
#[derive(Debug, Default)]
pub(crate) struct Sample {
    /// The latencies of what was timed one by one, sorted; nothing if only the whole was timed.
    pub(crate) each_ns: Vec<f64>,
    /// The time of the whole, per page or per call.
    pub(crate) wall_ns: Option<f64>,
    /// The processor time of all threads, per page or per call.
    pub(crate) cpu_ns: Option<f64>,
    /// Memory that was needed.
    pub(crate) bytes: Option<f64>,
}

/// How a series measures one pass, given the number of the repetition.
pub(crate) type Measure = Box<dyn Fn(&Bench, usize) -> Result<Sample>>;

/// One series.
pub(crate) struct Series {
    /// The stable name.
    pub(crate) name: String,
    /// What it measures, in a sentence.
    pub(crate) about: String,
    /// The series that it is compared with.
    pub(crate) floor: Option<String>,
    pub(crate) native: Option<String>,
    /// Pages, or calls, of a pass.
    pub(crate) pages: usize,
    pub(crate) measure: Measure,
}

impl Series {
    pub(crate) fn new(
        name: impl Into<String>,
        about: impl Into<String>,
        pages: usize,
        measure: impl Fn(&Bench, usize) -> Result<Sample> + 'static,
    ) -> Series {
        let (name, about, measure) = (name.into(), about.into(), Box::new(measure));
        Series { name, about, floor: None, native: None, pages, measure }
    }

    pub(crate) fn floor(self, name: impl Into<String>) -> Series {
        Series { floor: Some(name.into()), ..self }
    }

    pub(crate) fn native(self, name: impl Into<String>) -> Series {
        Series { native: Some(name.into()), ..self }
    }
}

/// Series that are measured in turns.
pub(crate) struct Group {
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    /// What a page is in its tables.
    pub(crate) unit: &'static str,
    pub(crate) repetitions: usize,
    pub(crate) series: Vec<Series>,
}
