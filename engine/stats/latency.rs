//! How long faults take: a histogram of fixed size, into which the fault-handling threads write without a lock.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::time::Duration;

use nix::sys::time::TimeSpec;

use super::shards::{Sharded, add};
use crate::sys::clock;

/// Parts of each power of two: a bucket's end is at most an eighth above any duration in it.
const PARTS: usize = 8;
const PARTS_LOG2: u32 = PARTS.trailing_zeros();
/// The highest power of two that has buckets of its own, in nanoseconds: 18 minutes. What takes longer is in the last.
const TOP: u32 = 40;
const BUCKETS: usize = (TOP - PARTS_LOG2 + 2) as usize * PARTS;

/// A moment, in nanoseconds of the monotonic clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Moment(u64);

impl Moment {
    /// Says when that was, for what nobody measures.
    #[cfg(test)]
    pub(crate) const UNKNOWN: Moment = Moment(0);

    pub(crate) fn now() -> Moment {
        Moment(clock::now_ns() as u64)
    }

    /// The same in microseconds.
    pub(crate) fn as_us(self) -> u64 {
        self.0 / 1000
    }

    /// That much later.
    pub(crate) fn after(self, pause: Duration) -> Moment {
        Moment(self.0.saturating_add(u64::try_from(pause.as_nanos()).unwrap_or(u64::MAX)))
    }

    /// The same on the monotonic clock.
    pub(crate) fn as_timespec(self) -> TimeSpec {
        TimeSpec::new((self.0 / 1_000_000_000) as i64, (self.0 % 1_000_000_000) as i64)
    }

    /// Nanoseconds from `self` to `later`.
    fn until(self, later: Moment) -> u64 {
        later.0.saturating_sub(self.0)
    }
}

fn bucket_of(nanoseconds: u64) -> usize {
    if nanoseconds < PARTS as u64 {
        return nanoseconds as usize;
    }
    let power = nanoseconds.ilog2();
    if power > TOP {
        return BUCKETS - 1;
    }
    let part = (nanoseconds >> (power - PARTS_LOG2)) as usize % PARTS;
    (power - PARTS_LOG2 + 1) as usize * PARTS + part
}

/// The longest duration that is counted in a bucket.
fn bucket_end(bucket: usize) -> u64 {
    if bucket < PARTS {
        return bucket as u64;
    }
    let power = (bucket / PARTS) as u32 - 1 + PARTS_LOG2;
    let next = (PARTS + bucket % PARTS + 1) as u64;
    (next << (power - PARTS_LOG2)) - 1
}

/// The live counts of one shard.
#[derive(Debug)]
pub(crate) struct Counts {
    buckets: [AtomicU64; BUCKETS],
    max: AtomicU64,
}

impl Default for Counts {
    fn default() -> Self {
        Counts { buckets: [const { AtomicU64::new(0) }; BUCKETS], max: AtomicU64::new(0) }
    }
}

impl Counts {
    /// Counts a fault that was read at `since` and is answered.
    #[inline]
    pub(crate) fn record(&self, since: Moment) {
        self.count(since.until(Moment::now()));
    }

    #[inline]
    fn count(&self, nanoseconds: u64) {
        if nanoseconds > self.max.load(Ordering::Relaxed) {
            self.max.fetch_max(nanoseconds, Ordering::Relaxed);
        }
        // Whoever sees it counted sees a longest that is not shorter.
        fence(Ordering::Release);
        add(&self.buckets[bucket_of(nanoseconds)], 1);
    }
}

impl Sharded<Counts> {
    pub(crate) fn snapshot(&self) -> FaultLatency {
        let mut sum = FaultLatency { buckets: [0; BUCKETS], max: 0 };
        for shard in self.iter() {
            for (sum, bucket) in sum.buckets.iter_mut().zip(&shard.buckets) {
                *sum += bucket.load(Ordering::Relaxed);
            }
            fence(Ordering::Acquire);
            sum.max = sum.max.max(shard.max.load(Ordering::Relaxed));
        }
        sum
    }
}

/// Tells how long an engine took for its faults ([`Engine::fault_latency`](crate::Engine::fault_latency)): from the moment
/// when a fault-handling thread had read the fault to the moment when it had answered it, so that the thread that touched
/// could go on.
///
/// A fault that was put off, looked up or handed to a worker counts once, with all of that. What is *not* in it is what the
/// engine can't see: how long the fault waited in the kernel before it was read (behind other faults, or for the
/// fault-handling thread to get a processor), and how long the woken thread waits for one. Where both threads share a
/// processor, the woken one may run before the answer's end is noted; what it does until then is in it. So this is not the
/// latency of a touch, which the benchmark `fault_latency` measures; it is what the engine's own work adds.
///
/// Durations are counted in 312 buckets, eight to each power of two: a quantile is at most 12.5 % too long, never too short.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct FaultLatency {
    buckets: [u64; BUCKETS],
    max: u64,
}

impl FaultLatency {
    /// Returns the number of faults that were measured.
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// Returns the duration that a share `q` of the faults did not exceed, from 0 (the shortest) to 1 (the longest); `None`
    /// when none was measured. What lies outside of that is taken for the nearer of both; not a number, for 1.
    pub fn quantile(&self, q: f64) -> Option<Duration> {
        let count = self.count();
        // A NaN is converted to 0 elsewhere; the longest is the safer answer.
        let q = if q.is_nan() { 1.0 } else { q.clamp(0.0, 1.0) };
        let rank = ((q * count as f64).ceil() as u64).clamp(1, count.max(1));
        let mut seen = 0;
        let bucket = self.buckets.iter().position(|&n| {
            seen += n;
            seen >= rank
        })?;
        // The last bucket has no end of its own.
        let end = if bucket == BUCKETS - 1 { self.max } else { bucket_end(bucket).min(self.max) };
        Some(Duration::from_nanos(end))
    }

    /// Returns the median; `None` when no fault was measured.
    pub fn p50(&self) -> Option<Duration> {
        self.quantile(0.5)
    }

    /// Returns what 99 of 100 faults did not exceed; `None` when no fault was measured.
    pub fn p99(&self) -> Option<Duration> {
        self.quantile(0.99)
    }

    /// Returns the longest, exactly; `None` when no fault was measured.
    pub fn max(&self) -> Option<Duration> {
        (self.count() > 0).then(|| Duration::from_nanos(self.max))
    }

    /// Returns what was measured after `earlier`, a histogram of the same engine. Its longest is that of all time if it may
    /// have been after, else the end of the last bucket in which something was counted.
    #[must_use]
    pub fn since(&self, earlier: &FaultLatency) -> FaultLatency {
        let mut buckets = self.buckets;
        for (bucket, before) in buckets.iter_mut().zip(&earlier.buckets) {
            *bucket = bucket.saturating_sub(*before);
        }
        let last = buckets.iter().rposition(|&n| n > 0);
        let max = last.map_or(0, |last| if last == bucket_of(self.max) { self.max } else { bucket_end(last) });
        FaultLatency { buckets, max }
    }

    /// Walks over the buckets in which something was counted, from the shortest on: the longest duration that each holds,
    /// and how many faults.
    pub fn buckets(&self) -> impl Iterator<Item = (Duration, u64)> + '_ {
        let counted = self.buckets.iter().enumerate().filter(|(_, n)| **n > 0);
        counted.map(|(bucket, &n)| (Duration::from_nanos(bucket_end(bucket)), n))
    }
}

impl fmt::Display for FaultLatency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.p50(), self.p99(), self.max()) {
            (Some(p50), Some(p99), Some(max)) => {
                write!(f, "{} faults, p50 {p50:.1?}, p99 {p99:.1?}, max {max:.1?}", self.count())
            }
            _ => f.write_str("no faults"),
        }
    }
}

impl fmt::Debug for FaultLatency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FaultLatency({self})")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(durations: &[u64]) -> FaultLatency {
        let counts = Sharded::<Counts>::default();
        durations.iter().for_each(|&nanoseconds| counts.count(nanoseconds));
        counts.snapshot()
    }

    #[test]
    fn every_bucket_ends_where_the_next_begins() {
        for bucket in 0..BUCKETS - 1 {
            assert_eq!(bucket_of(bucket_end(bucket)), bucket);
            assert_eq!(bucket_of(bucket_end(bucket) + 1), bucket + 1);
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn nothing_was_measured() {
        let none = of(&[]);
        assert_eq!((none.count(), none.p50(), none.p99(), none.max()), (0, None, None, None));
        assert_eq!(none.to_string(), "no faults");
    }

    #[test]
    fn quantiles_of_known_durations() {
        let durations: Vec<u64> = (1..=1000).map(|n| n * 1000).collect();
        let latency = of(&durations);
        assert_eq!(latency.count(), 1000);
        for (q, exact) in
            [(0.0, 1000), (0.5, 500_000), (0.99, 990_000), (1.0, 1_000_000), (7.0, 1_000_000), (-1.0, 1000)]
        {
            let told = latency.quantile(q).unwrap().as_nanos() as u64;
            assert!(exact <= told && told <= exact + exact / 8, "{q}: {told} for {exact}");
        }
        assert_eq!(latency.quantile(f64::NAN), latency.max());
        assert_eq!(latency.max(), Some(Duration::from_millis(1)));
        assert_eq!(latency.buckets().map(|(_, n)| n).sum::<u64>(), 1000);
        assert_eq!(of(&[1500]).to_string(), "1 faults, p50 1.5µs, p99 1.5µs, max 1.5µs");
    }

    #[test]
    fn a_difference_has_what_came_after() {
        let counts = Sharded::<Counts>::default();
        counts.count(1_000_000);
        let before = counts.snapshot();
        (0..10).for_each(|_| counts.count(2000));
        let after = counts.snapshot().since(&before);
        assert_eq!((after.count(), after.max()), (10, Some(Duration::from_nanos(2047))));
        counts.count(3_000_000);
        let after = counts.snapshot().since(&before);
        assert_eq!((after.count(), after.max()), (11, Some(Duration::from_millis(3))));
    }

    #[test]
    fn a_quantile_is_not_too_short_while_faults_are_counted() {
        let counts = Sharded::<Counts>::default();
        let most = if cfg!(miri) { 100 } else { 20_000 };
        std::thread::scope(|scope| {
            let counting = scope.spawn(|| (0..most).for_each(|n| counts.count(n * n)));
            while !counting.is_finished() {
                let seen = counts.snapshot();
                let longest = seen.buckets.iter().rposition(|&n| n > 0).unwrap_or(0);
                assert!(longest <= bucket_of(seen.max), "{} for bucket {longest}", seen.max);
            }
        });
    }

    proptest! {
        #[test]
        fn a_bucket_is_never_more_than_an_eighth_off(nanoseconds in 0u64..1 << (TOP + 1)) {
            let end = bucket_end(bucket_of(nanoseconds));
            prop_assert!(nanoseconds <= end && end - nanoseconds <= nanoseconds / 8);
        }
    }
}
