//! A page source of marked pages that a test holds back, has fail, and asks what it was asked for.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kiomap::{Kiobuf, PageSource, page_size};

use super::{DEADLINE, fill_marks};

/// What the source says of itself.
pub(crate) struct Says {
    pub(crate) granule_pages: u64,
    pub(crate) may_block: bool,
    pub(crate) nr_pages: Option<u64>,
}

impl Default for Says {
    fn default() -> Self {
        Says { granule_pages: 1, may_block: true, nr_pages: None }
    }
}

#[derive(Default)]
struct State {
    shut: bool,
    failing: bool,
    inside: usize,
    most_inside: usize,
    asked: Vec<Range<u64>>,
}

/// The source; open and in order until told otherwise.
pub(crate) struct SlowSource {
    says: Says,
    pause: Duration,
    state: Mutex<State>,
    changed: Condvar,
}

impl SlowSource {
    pub(crate) fn new(says: Says) -> Arc<SlowSource> {
        SlowSource::pausing(says, Duration::ZERO)
    }

    /// One whose reads take a while.
    pub(crate) fn pausing(says: Says, pause: Duration) -> Arc<SlowSource> {
        Arc::new(SlowSource { says, pause, state: Mutex::default(), changed: Condvar::new() })
    }

    /// One whose reads are held from the start.
    pub(crate) fn shut(says: Says) -> Arc<SlowSource> {
        let source = SlowSource::new(says);
        source.state().shut = true;
        source
    }

    pub(crate) fn list(self: &Arc<Self>, nr_pages: u64) -> Kiobuf {
        let mut list = Kiobuf::new();
        list.map_source(Arc::clone(self) as Arc<dyn PageSource>, nr_pages * page_size() as u64).unwrap();
        list
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets every read go on, now and later.
    pub(crate) fn open(&self) {
        self.state().shut = false;
        self.changed.notify_all();
    }

    /// Holds reads that begin from now on.
    pub(crate) fn shut_again(&self) {
        self.state().shut = true;
    }

    /// Has reads that end from now on fail, or not.
    pub(crate) fn fail(&self, failing: bool) {
        self.state().failing = failing;
    }

    /// The pages that it was asked for, read by read.
    pub(crate) fn asked(&self) -> Vec<Range<u64>> {
        self.state().asked.clone()
    }

    /// The reads that are under way, and the most that ever were.
    pub(crate) fn inside(&self) -> (usize, usize) {
        let state = self.state();
        (state.inside, state.most_inside)
    }

    /// Waits until so many reads are under way.
    #[track_caller]
    pub(crate) fn wait_for_inside(&self, n: usize) {
        let state = self.state();
        let (state, timeout) = self
            .changed
            .wait_timeout_while(state, DEADLINE, |state| state.inside < n)
            .unwrap_or_else(PoisonError::into_inner);
        assert!(!timeout.timed_out(), "{} reads are under way, not {n}", state.inside);
    }
}

impl PageSource for SlowSource {
    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> io::Result<()> {
        let first = offset_bytes / page_size() as u64;
        let mut state = self.state();
        state.asked.push(first..first + buf.len().div_ceil(page_size()) as u64);
        state.inside += 1;
        state.most_inside = state.most_inside.max(state.inside);
        self.changed.notify_all();
        state = self.changed.wait_while(state, |state| state.shut).unwrap_or_else(PoisonError::into_inner);
        drop(state);
        std::thread::sleep(self.pause);
        let mut state = self.state();
        state.inside -= 1;
        let failing = state.failing;
        drop(state);
        if failing {
            buf.fill(0xee);
            return Err(io::Error::other("told to fail"));
        }
        fill_marks(first, buf);
        Ok(())
    }

    fn len_bytes(&self) -> Option<u64> {
        self.says.nr_pages.map(|nr_pages| nr_pages * page_size() as u64)
    }

    fn granule_bytes(&self) -> usize {
        self.says.granule_pages as usize * page_size()
    }

    fn may_block(&self) -> bool {
        self.says.may_block
    }
}
