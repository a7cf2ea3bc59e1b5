//! Props of tests with several processes and threads: children that can't outlive a hang, signals between them, sources
//! that wait to be told, and the kernel's own count of what is mapped.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kiomap::{Engine, Kiobuf, PageSource, Region, Vmap, page_size};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::WaitStatus;
use nix::unistd::Pid;

use super::{DEADLINE, eventually, fork_child, mark, reap};

/// As [`fork_child`], but the kernel ends the child at the deadline: alarms are not inherited.
pub(crate) fn child(body: impl FnOnce()) -> Pid {
    fork_child(|| {
        nix::unistd::alarm::set(DEADLINE.as_secs() as u32);
        body();
    })
}

/// Kills a child with SIGKILL and reaps it.
#[track_caller]
pub(crate) fn kill_and_reap(child: Pid) {
    kill(child, Signal::SIGKILL).unwrap();
    let status = reap(child);
    assert!(matches!(status, WaitStatus::Signaled(_, Signal::SIGKILL, _)), "{status:?}");
}

/// A pipe over which processes tell each other that something has happened.
pub(crate) struct Told {
    told: std::fs::File,
    tell: std::fs::File,
}

impl Told {
    pub(crate) fn new() -> Told {
        let (told, tell): (OwnedFd, OwnedFd) = nix::unistd::pipe().unwrap();
        Told { told: told.into(), tell: tell.into() }
    }

    /// Tells one waiter.
    pub(crate) fn tell(&self, what: u8) {
        (&self.tell).write_all(&[what]).unwrap();
    }

    /// Waits to be told.
    pub(crate) fn wait(&self) -> u8 {
        let mut byte = [0];
        (&self.told).read_exact(&mut byte).unwrap();
        byte[0]
    }

    /// Waits to be told that exactly this has happened.
    #[track_caller]
    pub(crate) fn wait_for(&self, what: u8) {
        assert_eq!(self.wait(), what);
    }
}

/// Numbers that look random and are the same in every run of one seed.
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u64 + 1) as usize);
        }
    }

    /// Works for a while that is different each time: a delay without a clock.
    pub(crate) fn dawdle(&mut self, most: u64) {
        for _ in 0..self.below(most + 1) {
            std::hint::black_box(self.next());
        }
    }
}

/// The areas that a process has mapped, as the kernel tells it: every mapping of a vmap that can be accessed.
pub(crate) fn areas_of(pid: Pid) -> usize {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    maps.lines().filter(|line| line.contains("/memfd:kiomap ") && !line.contains("---s")).count()
}

#[derive(Default)]
struct Gate {
    open: bool,
    inside: usize,
    calls: usize,
}

/// A source of [`mark`]ed pages that answers only after it was told to.
#[derive(Default)]
pub(crate) struct GatedSource {
    gate: Mutex<Gate>,
    changed: Condvar,
}

impl GatedSource {
    pub(crate) fn new() -> Arc<GatedSource> {
        Arc::default()
    }

    /// A list of `nr_pages` pages of this source.
    pub(crate) fn list(self: &Arc<Self>, nr_pages: u64) -> Kiobuf {
        let mut list = Kiobuf::new();
        list.map_source(Arc::clone(self) as Arc<dyn PageSource>, nr_pages * page_size() as u64).unwrap();
        list
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets every read go on, now and later.
    pub(crate) fn open(&self) {
        self.gate().open = true;
        self.changed.notify_all();
    }

    /// Holds every later read.
    pub(crate) fn shut(&self) {
        self.gate().open = false;
    }

    pub(crate) fn calls(&self) -> usize {
        self.gate().calls
    }

    /// Waits until `n` reads are held at once: their faults are blocked.
    pub(crate) fn wait_for_held(&self, n: usize) {
        let start = Instant::now();
        let mut gate = self.gate();
        while gate.inside < n {
            assert!(start.elapsed() < DEADLINE, "{} reads are held, not {n}", gate.inside);
            let waited = self.changed.wait_timeout(gate, Duration::from_millis(100));
            gate = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl PageSource for GatedSource {
    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> std::io::Result<()> {
        let mut gate = self.gate();
        gate.calls += 1;
        gate.inside += 1;
        self.changed.notify_all();
        while !gate.open {
            gate = self.changed.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        gate.inside -= 1;
        drop(gate);
        fill_marks(offset_bytes, buf);
        Ok(())
    }
}

/// Fills whole pages with their marks.
pub(crate) fn fill_marks(offset_bytes: u64, buf: &mut [u8]) {
    let first = offset_bytes / page_size() as u64;
    for (n, page) in buf.chunks_mut(page_size()).enumerate() {
        page.fill(mark(first + n as u64));
    }
}

/// A list of `nr_pages` marked pages from a source that answers at once, on a worker.
pub(crate) fn sourced_pages(nr_pages: u64) -> Kiobuf {
    let source = GatedSource::new();
    source.open();
    source.list(nr_pages)
}

/// The address of a page of a region.
pub(crate) fn at(region: &Region, page: u64) -> *mut u8 {
    region.as_ptr().wrapping_add(page as usize * page_size())
}

/// Waits until only the engine's own process is left and the count is what it says it is.
#[track_caller]
pub(crate) fn settled(engine: &Engine, vmap: &Vmap, refcount: usize) {
    eventually("the children are counted out", || {
        engine.settle().unwrap();
        engine.spaces().unwrap().len() == 1 && vmap.refcount().unwrap() == refcount
    });
    super::truth::assert_truth(engine);
}
