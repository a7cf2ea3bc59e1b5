//! The floor: a bare loop of a blocking read and an ioctl, which is what any handler has to do at the least.

use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use kiomap::{OpenWay, page_size};
use nix::errno::Errno;

use super::raw::{FEATURE_MINOR, Mapping, Memory, Message, Uffd, Waiting, memfd, run_on};
use super::source::{Source, fill};

/// Messages that the floor reads at once.
const MESSAGES: usize = 16;

/// What the floor answers with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum With {
    /// UFFDIO_COPY of the aligned block of so many pages around the one that was touched.
    Copy(usize),
    /// UFFDIO_CONTINUE of such a block: the memfd holds every page.
    Continue(usize),
    /// UFFDIO_POISON.
    Poison,
}

/// Memory, untouched, and threads that answer for it.
pub(crate) struct Floor {
    memory: Arc<Mapping>,
    /// The first of the pages by which loops are told that they are done.
    done: usize,
    handlers: Vec<JoinHandle<u64>>,
}

impl Floor {
    /// Starts the loop, on a processor if one is given, else where the caller may run.
    pub(crate) fn start(
        memory: Memory,
        waiting: Waiting,
        with: With,
        pages: usize,
        source: Source,
        way: OpenWay,
        cpu: Option<usize>,
    ) -> Result<Floor> {
        Floor::start_all(memory, waiting, with, pages, source, way, &[cpu])
    }

    /// Starts as many loops as there are places, all of which read the same userfaultfd.
    pub(crate) fn start_all(
        memory: Memory,
        waiting: Waiting,
        with: With,
        pages: usize,
        source: Source,
        way: OpenWay,
        cpus: &[Option<usize>],
    ) -> Result<Floor> {
        // A page more for each loop, by which it is told that it is done.
        let all = pages + cpus.len();
        let (memory, uffd) = if let With::Continue(_) = with {
            let fd = memfd(all)?;
            let filled = Mapping::of(Some(&fd), all * page_size())?;
            fill(&filled, all);
            let memory = Mapping::of(Some(&fd), all * page_size())?;
            let uffd = Uffd::open_for(way, waiting, FEATURE_MINOR)?;
            uffd.register_minor(&memory)?;
            (memory, uffd)
        } else {
            let memory = Mapping::new(memory, all, all)?;
            let uffd = Uffd::open(way, waiting)?;
            uffd.register(&memory)?;
            (memory, uffd)
        };
        Floor::start_on(memory, uffd, with, pages, pages, source, cpus)
    }

    /// Starts a loop on each of some processors, with a userfaultfd and a mapping of its own: all of one memfd.
    pub(crate) fn start_apart(pages: usize, source: &Source, way: OpenWay, cpus: &[usize]) -> Result<Vec<Floor>> {
        let all = pages + cpus.len();
        let fd = memfd(all)?;
        let start = |(which, &cpu): (usize, &usize)| {
            let memory = Mapping::of(Some(&fd), all * page_size())?;
            let uffd = Uffd::open(way, Waiting::Read)?;
            uffd.register(&memory)?;
            Floor::start_on(memory, uffd, With::Copy(1), pages, pages + which, source.clone(), &[Some(cpu)])
        };
        cpus.iter().enumerate().map(start).collect()
    }

    fn start_on(
        memory: Mapping,
        uffd: Uffd,
        with: With,
        pages: usize,
        done: usize,
        source: Source,
        cpus: &[Option<usize>],
    ) -> Result<Floor> {
        let (memory, uffd) = (Arc::new(memory), Arc::new(uffd));
        let start = |&cpu: &Option<usize>| {
            let (uffd, range, source) = (Arc::clone(&uffd), Arc::clone(&memory), source.clone());
            let handler = std::thread::Builder::new().name("floor".into()).spawn(move || {
                if let Some(cpu) = cpu
                    && let Err(error) = run_on(&[cpu])
                {
                    eprintln!("the floor runs anywhere: {error:#}");
                }
                answer(&uffd, range.as_ptr().expose_provenance(), pages, with, &source)
            });
            handler.context("starting the floor's handler")
        };
        let handlers = cpus.iter().map(start).collect::<Result<_>>()?;
        Ok(Floor { memory, done, handlers })
    }

    /// The address of the first page.
    pub(crate) fn base(&self) -> usize {
        self.memory.as_ptr().expose_provenance()
    }

    /// Ends the loops; how many faults they answered.
    pub(crate) fn finish(self) -> Result<u64> {
        for page in self.done..self.done + self.handlers.len() {
            // Whichever loop reads of this page is done.
            // SAFETY: the page lies within the mapping; no reference to it exists.
            unsafe { self.memory.as_ptr().add(page * page_size()).write_volatile(1) };
        }
        let ended = self.handlers.into_iter().map(JoinHandle::join);
        ended.map(|faults| faults.ok().context("the floor's handler panicked")).sum()
    }
}

/// Starts the loop for memory of another process, where the caller may run; it ends when the page behind the last is touched.
pub(crate) fn serve(uffd: Uffd, base: usize, pages: usize, with: With, source: Source) -> Result<JoinHandle<u64>> {
    let handler = std::thread::Builder::new().name("floor".into());
    handler.spawn(move || answer(&uffd, base, pages, with, &source)).context("starting the floor's handler")
}

fn answer(uffd: &Uffd, base: usize, pages: usize, with: With, source: &Source) -> u64 {
    let end = pages * page_size();
    let source = source.as_ref().as_ptr();
    let mut messages = [Message::default(); MESSAGES];
    let (mut faults, mut done) = (0, false);
    while !done {
        let mut failed = Ok(());
        let waited = uffd.wait(&mut messages, |addr| {
            let offset = addr - base;
            let answer = if offset >= end {
                done = true;
                match with {
                    With::Continue(_) => uffd.map_held(addr, page_size()),
                    // SAFETY: the page is registered, and no reference to it exists; the source has a page.
                    _ => unsafe { uffd.copy(addr, source, page_size()) },
                }
            } else {
                faults += 1;
                let block = |around: usize| {
                    let block = around * page_size();
                    let start = offset / block * block;
                    (start, block.min(end - start))
                };
                match with {
                    With::Poison => uffd.poison(base + offset, page_size()),
                    With::Continue(around) => {
                        let (start, len) = block(around);
                        uffd.map_held(base + start, len)
                    }
                    With::Copy(around) => {
                        let (start, len) = block(around);
                        // SAFETY: the block is registered, touched through atomics only; the source is as long as it.
                        unsafe { uffd.copy(base + start, source.add(start), len) }
                    }
                }
            };
            failed = failed.and(answer);
        });
        if let Err(errno) = waited.and(failed) {
            unanswerable(errno);
        }
    }
    faults
}

/// Ends the process: a thread would wait for ever.
fn unanswerable(errno: Errno) -> ! {
    eprintln!("the floor can't answer a fault: {errno}");
    std::process::exit(1)
}
