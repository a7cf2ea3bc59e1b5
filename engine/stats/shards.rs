//! Counters that several threads write without taking the cache line from each other: a copy of them for each
//! fault-handling thread, which is its only writer and so needs no atomic addition, one for all other threads, and the sum
//! for whoever reads.

use std::cell::Cell;
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Copies of each set of counters.
pub(super) const SHARDS: usize = 8;
/// The copy of every thread that has none of its own.
const COMMON: usize = 0;
/// The copy of the thread that answers faults most of the time.
const FIRST: usize = 1;
/// Copies for the signal handlers of threads that run at once, on different processors.
const SIGNALLED: usize = 4;

thread_local! {
    /// Constant and without a destructor: to reach it allocates nothing, except for a library that was loaded late, once
    /// for each thread; [`own_shard`] has done it then.
    static SHARD: Cell<usize> = const { Cell::new(COMMON) };
}

/// Gives out the shards of one engine.
#[derive(Debug, Default)]
pub(crate) struct Owners(AtomicUsize);

impl Owners {
    /// Gives the current thread counters of its own in this engine, the only one in which it counts, if there are some left.
    /// Nobody gets them after it.
    pub(crate) fn take(&self) {
        let shard = FIRST + 1 + self.0.fetch_add(1, Ordering::Relaxed);
        SHARD.set(if shard < SHARDS { shard } else { COMMON });
    }

    /// As [`Owners::take`], for the one thread that is sure of it.
    pub(crate) fn take_first(&self) {
        SHARD.set(FIRST);
    }
}

/// Adds to a counter of the current thread's shard.
#[inline]
pub(crate) fn add(counter: &AtomicU64, n: u64) {
    if SHARD.get() == COMMON {
        counter.fetch_add(n, Ordering::Relaxed);
    } else {
        // Nobody else writes to it: a tenth of the price.
        add_own(counter, n);
    }
}

/// Adds to a counter of which the current thread is the only writer.
#[inline]
pub(crate) fn add_own(counter: &AtomicU64, n: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
}

/// Names counters that not many other threads add to at this moment; found without a thread-local variable, for signal handlers.
#[derive(Clone, Copy)]
pub(crate) struct Signalled(usize);

impl Signalled {
    /// Those of the current processor.
    pub(crate) fn here() -> Signalled {
        // SAFETY: looks a number up; -1, if the kernel does not tell it, is as good as any.
        let cpu = unsafe { libc::sched_getcpu() };
        Signalled(cpu as usize % SIGNALLED)
    }
}

/// Two cache lines: processors fetch them in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Padded<T>(T);

/// A set of counters, once for each shard. It stands for the current thread's: what is added there is in the sum.
#[derive(Debug, Default)]
pub(crate) struct Sharded<T>([Padded<T>; SHARDS + SIGNALLED]);

impl<T> Deref for Sharded<T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        &self.0[SHARD.get() % SHARDS].0
    }
}

impl<T> Sharded<T> {
    /// The counters of the thread that answers faults most of the time, for that thread: [`add_own`] adds to them.
    #[inline]
    pub(crate) fn first(&self) -> &T {
        debug_assert_eq!(SHARD.get(), FIRST);
        &self.0[FIRST].0
    }

    /// Counters that any thread may add to, if it does so by atomic additions.
    #[inline]
    pub(crate) fn signalled(&self, here: Signalled) -> &T {
        &self.0[SHARDS + here.0].0
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter().map(|shard| &shard.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_many_threads_add_is_in_the_sum() {
        let (counters, owners) = (Sharded::<AtomicU64>::default(), Owners::default());
        std::thread::scope(|scope| {
            for n in 0..3 * SHARDS {
                let (counters, owners) = (&counters, &owners);
                scope.spawn(move || {
                    match n % 3 {
                        _ if n == 1 => owners.take_first(),
                        0 => {}
                        _ => owners.take(),
                    }
                    (0..1000).for_each(|_| add(counters, 1));
                });
            }
        });
        assert_eq!(counters.iter().map(|shard| shard.load(Ordering::Relaxed)).sum::<u64>(), 3 * SHARDS as u64 * 1000);
        assert!(counters.iter().take(SHARDS).all(|shard| shard.load(Ordering::Relaxed) > 0));
    }

    #[test]
    fn no_two_shards_have_a_cache_line_in_common() {
        let counters = Sharded::<AtomicU64>::default();
        let mut lines: Vec<usize> = counters.iter().map(|shard| std::ptr::from_ref(shard).addr() / 128).collect();
        lines.dedup();
        assert_eq!(lines.len(), SHARDS + SIGNALLED);
    }
}
