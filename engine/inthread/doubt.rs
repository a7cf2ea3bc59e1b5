//! Touches of which nobody knows what they find: each may be made again some times, but not for ever.

use std::sync::atomic::{AtomicU64, Ordering};

/// Places for touches that are in doubt at once. A touch that finds none is made again.
const TOUCHES: usize = 64;
/// Doubts in a row.
const MOST: u64 = 8;
const COUNT_BITS: u32 = 4;
const TICK_BITS: u32 = 28;
const TICKS: u64 = (1 << TICK_BITS) - 1;
const US_PER_TICK: u64 = 64;
/// The most between one doubt and the next in a row: a millisecond, and what the rounding of both takes.
const IN_A_ROW: u64 = 1000 / US_PER_TICK + 1;

const _: () = assert!(MOST < 1 << COUNT_BITS && COUNT_BITS + TICK_BITS == 32);

/// The touches that are in doubt.
///
/// Each place is one word, so that threads which take it from each other never mix their counts: a name of the touch, when
/// the last doubt was, and how many there were in a row.
pub(super) struct Doubts([AtomicU64; TOUCHES]);

impl Doubts {
    pub(super) const fn new() -> Doubts {
        Doubts([const { AtomicU64::new(0) }; TOUCHES])
    }

    /// Counts a doubt of thread `tid` about its touch of the page at `addr`; tells whether it may be made again.
    pub(super) fn may(&self, tid: u32, addr: usize, now_us: u64) -> bool {
        let name = name_of(tid, addr);
        let now = (now_us / US_PER_TICK) & TICKS;
        // Its own place may lie behind one that became free since.
        let own = |word: u64| name_in(word) == name;
        let free = |word: u64| !is_fresh(word, now);
        self.count(name, now, own).or_else(|| self.count(name, now, free)).is_none_or(|doubts| doubts <= MOST)
    }

    /// Counts in the first place that `is_it`; `None` if there is none.
    fn count(&self, name: u64, now: u64, is_it: impl Fn(u64) -> bool) -> Option<u64> {
        let begin = name as usize % TOUCHES;
        self.0[begin..].iter().chain(&self.0[..begin]).find_map(|place| {
            let next = |word| {
                let goes_on = name_in(word) == name && is_fresh(word, now);
                let doubts = if goes_on { count_in(word) + 1 } else { 1 };
                is_it(word).then_some(name << 32 | now << COUNT_BITS | doubts.min(MOST + 1))
            };
            let before = place.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).ok()?;
            next(before).map(count_in)
        })
    }
}

/// 32 bits that mix a thread's id and the number of a page.
fn name_of(tid: u32, addr: usize) -> u64 {
    let touch = (u64::from(tid) << 40) ^ (addr as u64 >> 12);
    touch.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32
}

fn name_in(word: u64) -> u64 {
    word >> 32
}

fn count_in(word: u64) -> u64 {
    word & ((1 << COUNT_BITS) - 1)
}

/// Tells whether the doubt of a place was just now.
fn is_fresh(word: u64, now: u64) -> bool {
    let then = (word >> COUNT_BITS) & TICKS;
    count_in(word) > 0 && now.wrapping_sub(then) & TICKS <= IN_A_ROW
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 0x1000_0000_0000;

    #[test]
    fn a_touch_is_made_again_some_times_and_anew_after_a_while() {
        let doubts = Doubts::new();
        for began in [0, 5000] {
            for n in 0..MOST {
                assert!(doubts.may(7, PAGE, began + n * 10));
            }
            assert!(!doubts.may(7, PAGE, began + 100));
            assert!(!doubts.may(7, PAGE, began + 110));
            // Another page is another touch.
            assert!(doubts.may(7, PAGE + 0x1000, began + 120));
        }
    }

    #[test]
    fn threads_that_take_turns_are_counted_apart() {
        let doubts = Doubts::new();
        for n in 0..MOST {
            for tid in (0..32).map(|thread| 100 + thread * TOUCHES as u32) {
                assert!(doubts.may(tid, PAGE, n), "{tid}, doubt {n}");
            }
        }
        for tid in (0..32).map(|thread| 100 + thread * TOUCHES as u32) {
            assert!(!doubts.may(tid, PAGE, MOST), "{tid}");
        }
    }

    #[test]
    fn more_touches_than_places_are_never_refused_too_early() {
        let doubts = Doubts::new();
        for n in 0..MOST {
            for tid in 0..3 * TOUCHES as u32 {
                assert!(doubts.may(tid, PAGE, n));
            }
        }
        // Those that have a place are done by now, and others get it.
        let refused = (0..3 * TOUCHES as u32).filter(|&tid| !doubts.may(tid, PAGE, MOST)).count();
        assert_eq!(refused, TOUCHES);
    }
}
