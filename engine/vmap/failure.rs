//! Pages that can't be read: how often a vmap's reads are tried, how long a touch waits, and what is told of it afterwards.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;

use super::core::VmapCore;
use crate::{Error, Result};

/// Reports that may wait for the callback thread, of one vmap; further ones are only counted.
const REPORTS_WAITING: u64 = 1024;
/// The longest pause between two tries.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// The longest deadline and back-off that may be asked for: a year.
const LONGEST: Duration = Duration::from_secs(365 * 86400);

/// Says what becomes of a page whose read fails ([`VmapBuilder::failure_policy`](crate::VmapBuilder::failure_policy)).
///
/// A source's or file's error, a panic and a file that has become too short are all the same: the read is tried again after a
/// pause, which doubles each time up to 10 seconds. When the tries are used up, or the deadline has passed, the touch is SIGBUS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct FailurePolicy {
    /// How often a read is tried again; 2 unless set. With 0, the first failure is final.
    pub retries: u32,
    /// The pause before the first further try; 10 ms unless set.
    pub backoff: Duration,
    /// How long a touch waits for its page at the most, all tries and every wait for a thread or a buffer together; 30 s unless
    /// set. A touch that finds its page being read already waits as long as the one for which it is read, and one whose page is
    /// read together with a neighbour that waits already has at least half of it. What a source brings later is there for
    /// other processes and regions; where the page was refused it stays SIGBUS, until [`Vmap::retry`](crate::Vmap::retry).
    pub deadline: Duration,
}

impl Default for FailurePolicy {
    fn default() -> Self {
        FailurePolicy { retries: 2, backoff: Duration::from_millis(10), deadline: Duration::from_secs(30) }
    }
}

impl FailurePolicy {
    /// Sets how often a read is tried again.
    #[must_use]
    pub fn retries(mut self, retries: u32) -> Self {
        self.retries = retries;
        self
    }

    /// Sets the pause before the first further try.
    #[must_use]
    pub fn backoff(mut self, backoff: Duration) -> Self {
        self.backoff = backoff;
        self
    }

    /// Sets how long a touch waits for its page at the most, from 1 ms to a year.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// The pause after `tries` tries, at least one.
    pub(crate) fn pause_after(&self, tries: u32) -> Duration {
        let doublings = tries.saturating_sub(1).min(31);
        self.backoff.saturating_mul(1 << doublings).min(LONGEST_PAUSE.max(self.backoff))
    }

    pub(super) fn validate(&self) -> Result<()> {
        let refused = |what, value: Duration, rule| {
            Err(Error::Invalid { what, value: u64::try_from(value.as_millis()).unwrap_or(u64::MAX), rule })
        };
        if !(Duration::from_millis(1)..=LONGEST).contains(&self.deadline) {
            return refused("the deadline of a read in milliseconds", self.deadline, "it must be from 1 ms to a year");
        }
        if self.backoff > LONGEST {
            return refused("the pause before a read is tried again in milliseconds", self.backoff, "at most a year");
        }
        Ok(())
    }
}

/// Says what kept pages from being read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FailureCause {
    /// The source or the file answered with an error, or its pages could not be installed. The errno is that of the error, `EIO`
    /// for one that has none.
    Error(Errno),
    /// The source panicked.
    Panicked,
    /// The deadline passed: the source did not answer in time, or its reads found no free thread.
    Deadline,
}

/// Describes pages that could not be read, of which those that were touched are SIGBUS
/// ([`VmapBuilder::on_read_failed`](crate::VmapBuilder::on_read_failed)).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReadFailed {
    /// The pages of the list that were asked for together.
    pub pages: Range<u64>,
    /// What kept them from being read the last time.
    pub cause: FailureCause,
    /// The same in words, cut off if it is long.
    pub message: String,
    /// How often they were asked for; 0 if the deadline passed before that.
    pub tries: u32,
    /// Failures before this one that were not reported, because too many reports waited.
    pub unreported: u64,
}

/// Why a read failed, in memory that nobody has to free: it passes through the fault-handling thread.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Why {
    pub(crate) cause: FailureCause,
    text: [u8; Why::MOST],
    len: u8,
}

impl Why {
    const MOST: usize = 160;

    pub(crate) fn new(cause: FailureCause, message: impl fmt::Display) -> Why {
        let mut why = Why { cause, text: [0; Why::MOST], len: 0 };
        // It is cut off, never refused.
        let _ = fmt::write(&mut why, format_args!("{message}"));
        why
    }

    pub(crate) fn deadline() -> Why {
        Why::new(FailureCause::Deadline, "not there in time")
    }

    pub(crate) fn message(&self) -> &str {
        let text = &self.text[..self.len.into()];
        // Cut off within a character, the rest of it is left out.
        match std::str::from_utf8(text) {
            Ok(text) => text,
            Err(error) => std::str::from_utf8(&text[..error.valid_up_to()]).unwrap_or_default(),
        }
    }
}

impl fmt::Write for Why {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        let len = usize::from(self.len);
        let taken = s.len().min(Why::MOST - len);
        self.text[len..len + taken].copy_from_slice(&s.as_bytes()[..taken]);
        self.len = (len + taken) as u8;
        Ok(())
    }
}

impl fmt::Debug for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.cause, self.message())
    }
}

pub(crate) type FailedFn = Box<dyn FnMut(&Arc<VmapCore>, ReadFailed) + Send>;

/// What a vmap keeps of its failed reads.
#[derive(Default)]
pub(crate) struct Failures {
    /// What is called; taken out while it runs.
    pub(crate) callback: Mutex<Option<FailedFn>>,
    pub(super) has_callback: bool,
    /// Pages that may be SIGBUS somewhere because they could not be read: starts and ends of ranges that don't touch.
    failed: Mutex<BTreeMap<u64, u64>>,
    /// Reports that wait.
    waiting: AtomicU64,
    unreported: AtomicU64,
}

impl Failures {
    pub(super) fn new(callback: Option<FailedFn>) -> Failures {
        Failures { has_callback: callback.is_some(), callback: Mutex::new(callback), ..Failures::default() }
    }

    /// Notes that pages could not be read.
    pub(crate) fn note(&self, pages: Range<u64>) {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        insert(&mut failed, pages);
    }

    /// Tells those of a range that could not be read, in order.
    pub(super) fn within(&self, pages: Range<u64>) -> Vec<Range<u64>> {
        within(&self.failed.lock().unwrap_or_else(PoisonError::into_inner), pages)
    }

    /// Forgets pages that are nowhere SIGBUS any more.
    pub(super) fn forget(&self, pages: Range<u64>) {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        remove(&mut failed, pages);
    }

    /// Makes a report, if somebody wants it and not too many wait.
    pub(crate) fn report(&self, pages: Range<u64>, why: &Why, tries: u32) -> Option<ReadFailed> {
        if !self.has_callback {
            return None;
        }
        if self.waiting.load(Ordering::Relaxed) >= REPORTS_WAITING {
            self.unreported.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let unreported = self.unreported.swap(0, Ordering::Relaxed);
        Some(ReadFailed { pages, cause: why.cause, message: why.message().to_owned(), tries, unreported })
    }

    /// A report does not wait any more.
    pub(crate) fn reported(&self) {
        self.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Adds a range to ranges that don't touch.
fn insert(ranges: &mut BTreeMap<u64, u64>, Range { mut start, mut end }: Range<u64>) {
    if start >= end {
        return;
    }
    // Those that touch it begin at or before its end; the last of them first.
    while let Some((&from, &to)) = ranges.range(..=end).next_back().filter(|&(_, &to)| to >= start) {
        ranges.remove(&from);
        (start, end) = (start.min(from), end.max(to));
    }
    ranges.insert(start, end);
}

/// Finds what of the ranges lies in `pages`, in order.
fn within(ranges: &BTreeMap<u64, u64>, pages: Range<u64>) -> Vec<Range<u64>> {
    if pages.is_empty() {
        return Vec::new();
    }
    let reach = |&(_, &to): &(&u64, &u64)| to > pages.start;
    let from_the_last = ranges.range(..pages.end).rev().take_while(reach);
    let mut found: Vec<_> = from_the_last.map(|(&from, &to)| from.max(pages.start)..to.min(pages.end)).collect();
    found.reverse();
    found
}

/// Takes out of the ranges what lies in `pages`.
fn remove(ranges: &mut BTreeMap<u64, u64>, pages: Range<u64>) {
    if pages.is_empty() {
        return;
    }
    while let Some((&from, &to)) = ranges.range(..pages.end).next_back().filter(|&(_, &to)| to > pages.start) {
        ranges.remove(&from);
        if from < pages.start {
            ranges.insert(from, pages.start);
        }
        if to > pages.end {
            ranges.insert(pages.end, to);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn failed_pages_are_a_set(steps in prop::collection::vec((any::<bool>(), 0u64..60, 0u64..20), 0..40)) {
            let (mut ranges, mut model) = (BTreeMap::new(), BTreeSet::new());
            for (adds, start, len) in steps {
                let pages = start..start + len;
                if adds {
                    insert(&mut ranges, pages.clone());
                    model.extend(pages);
                } else {
                    let found: Vec<u64> = within(&ranges, pages.clone()).into_iter().flatten().collect();
                    let expected: Vec<u64> = model.iter().copied().filter(|page| pages.contains(page)).collect();
                    prop_assert_eq!(found, expected);
                    remove(&mut ranges, pages.clone());
                    model.retain(|page| !pages.contains(page));
                }
                let now: Vec<u64> = ranges.iter().flat_map(|(&start, &end)| start..end).collect();
                prop_assert_eq!(now, model.iter().copied().collect::<Vec<_>>());
                prop_assert!(ranges.iter().zip(ranges.iter().skip(1)).all(|((_, end), (start, _))| end < start));
            }
        }
    }

    #[test]
    fn pauses_grow_and_end_at_ten_seconds() {
        let policy = FailurePolicy::default();
        let pauses = [1, 2, 3, 4, 11, 12, u32::MAX].map(|tries| policy.pause_after(tries).as_millis());
        assert_eq!(pauses, [10, 20, 40, 80, 10_000, 10_000, 10_000]);
        let long = policy.backoff(Duration::from_secs(60));
        assert_eq!(long.pause_after(3), Duration::from_secs(60));
    }

    #[test]
    fn a_long_message_is_cut_off_between_characters() {
        let why = Why::new(FailureCause::Panicked, "ä".repeat(500));
        assert_eq!(why.message(), "ä".repeat(Why::MOST / 2));
        let why = Why::new(FailureCause::Panicked, format_args!("x{}", "ä".repeat(500)));
        assert_eq!(why.message(), format!("x{}", "ä".repeat((Why::MOST - 1) / 2)));
    }
}
