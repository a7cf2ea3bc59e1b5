//! Readahead: how many pages a fault brings when its area is read as a stream, as the kernel decides it for files.
//!
//! A fault anywhere brings its own page. One that goes on where the last window of a *stream* ended brings 4, and the
//! next 8, 16, up to the most that is allowed; a jump begins small again. An area has a handful of streams, because two
//! threads that walk through two halves of one region are common. The decision is pure; its state is a few words of the
//! area, one for each stream, which several threads may change at once: a race costs a smaller window, nothing else.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Streams of one area.
const STREAMS: usize = 6;
/// The first window of a stream: 1 << 2 pages.
const FIRST_ORDER: u32 = 2;
/// No window is larger: 1 << 9 pages, what one page table maps.
const LAST_ORDER: u32 = 9;
/// A stream may go on this many pages further than it ended: what lies between came otherwise, perhaps.
const MOST_SKIPPED: u64 = 16;

/// One stream, as its last fault left it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stream {
    /// The page after the last window, or its first page where the stream goes backward.
    edge: u64,
    /// The last window had at most `1 << order` pages; 0 for a single page, which may go on either way.
    order: u32,
    backward: bool,
    /// When it was used, modulo `1 << STAMP_BITS`.
    stamp: u64,
}

// A stream in a word: the stamp lowest, then a bit that says that there is one, the direction, the order, the edge. An
// edge that does not fit is cut: its stream is then not recognised.
const STAMP_BITS: u32 = 14;
const PRESENT: u64 = 1 << STAMP_BITS;
const BACKWARD: u64 = 1 << (STAMP_BITS + 1);
const ORDER_SHIFT: u32 = STAMP_BITS + 2;
const EDGE_SHIFT: u32 = ORDER_SHIFT + 4;

impl Stream {
    fn to_word(self) -> u64 {
        let backward = if self.backward { BACKWARD } else { 0 };
        (self.stamp % PRESENT) | PRESENT | backward | u64::from(self.order) << ORDER_SHIFT | self.edge << EDGE_SHIFT
    }

    fn from_word(word: u64) -> Option<Stream> {
        (word & PRESENT != 0).then_some(Stream {
            edge: word >> EDGE_SHIFT,
            order: (word >> ORDER_SHIFT) as u32 & 0xf,
            backward: word & BACKWARD != 0,
            stamp: word % PRESENT,
        })
    }

    /// The pages that may be missing between the stream's end and a fault that goes on with it.
    fn slack(self) -> u64 {
        ((1 << self.order) / 4).clamp(1, MOST_SKIPPED)
    }

    /// Tells whether a fault goes on with the stream, and then whether backward.
    fn goes_on(self, pgoff: u64) -> Option<bool> {
        let after = |edge: u64| (edge..=edge.saturating_add(self.slack())).contains(&pgoff);
        let before = |edge: u64| pgoff < edge && edge - pgoff <= 1 + self.slack();
        match (self.order, self.backward) {
            (0, _) if after(self.edge) => Some(false),
            (0, _) if before(self.edge.saturating_sub(1)) => Some(true),
            (0, _) => None,
            (_, backward) => (if backward { before(self.edge) } else { after(self.edge) }).then_some(backward),
        }
    }

    /// Tells whether a fault is the one that the last window was for.
    fn repeats(self, pgoff: u64) -> bool {
        let pages = 1 << self.order;
        pgoff == if self.backward { self.edge + pages - 1 } else { self.edge.wrapping_sub(pages) }
    }

    /// Tells whether a fault may have to do with the stream of a word; by far most of those that don't are told apart so.
    fn may_concern(word: u64, pgoff: u64) -> bool {
        const NEAR: u64 = 1 << LAST_ORDER;
        pgoff.wrapping_sub(word >> EDGE_SHIFT).wrapping_add(NEAR) <= 2 * NEAR
    }
}

/// What is done about a fault: the pages to bring, and which stream it is then of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Step {
    slot: usize,
    stream: Stream,
    start: u64,
    end: u64,
}

/// Tells how long ago a word's stream was used, or for ever if there is none. What brings many pages at once faults seldom, and
/// counts as younger.
fn age(word: u64, now: u64) -> u64 {
    let order = (word >> ORDER_SHIFT) as u32 & 0xf;
    if word & PRESENT == 0 { u64::MAX } else { (now.wrapping_sub(word) % PRESENT) >> order.min(4) }
}

/// Chooses the place of none, or of that which was not used for longest.
fn oldest(words: &[u64; STREAMS], now: u64) -> usize {
    let (mut oldest, mut highest) = (0, age(words[0], now));
    for (slot, &word) in words.iter().enumerate().skip(1) {
        let age = age(word, now);
        if age > highest {
            (oldest, highest) = (slot, age);
        }
    }
    oldest
}

/// Decides about a fault on page `pgoff`: at most `most` pages, within `bounds`, which hold `pgoff`. `at_start`: it is
/// the first page of its area, where a walk through all of it begins.
fn decide(words: &[u64; STREAMS], now: u64, pgoff: u64, bounds: &Range<u64>, at_start: bool, most: u64) -> Step {
    let streams = words.map(Stream::from_word);
    let known = || streams.iter().enumerate().filter_map(|(slot, stream)| Some((slot, (*stream)?)));
    let going_on = known().find_map(|(slot, stream)| Some((slot, stream.goes_on(pgoff)?, stream.order)));
    let repeated = || known().find(|(_, stream)| stream.repeats(pgoff));
    let (slot, backward, order) = if let Some((slot, backward, order)) = going_on {
        (slot, backward, if order == 0 { FIRST_ORDER } else { (order + 1).min(LAST_ORDER) })
    } else if let Some((slot, stream)) = repeated() {
        (slot, stream.backward, stream.order)
    } else {
        let fresh = streams.iter().all(Option::is_none);
        (oldest(words, now), false, if at_start && fresh { FIRST_ORDER } else { 0 })
    };
    let pages = (1 << order).min(most.max(1));
    let (start, end) = if backward {
        ((pgoff + 1).saturating_sub(pages).max(bounds.start), pgoff + 1)
    } else {
        (pgoff, pgoff.saturating_add(pages).min(bounds.end))
    };
    let edge = if backward { start } else { end };
    Step { slot, stream: Stream { edge, order, backward, stamp: now }, start, end }
}

/// The streams of an area. A clone is those of a piece of it.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    words: [AtomicU64; STREAMS],
    faults: AtomicU64,
}

impl Clone for Streams {
    fn clone(&self) -> Streams {
        let copy = |word: &AtomicU64| AtomicU64::new(word.load(Ordering::Relaxed));
        Streams { words: self.words.each_ref().map(copy), faults: copy(&self.faults) }
    }
}

impl Streams {
    /// Chooses the pages to bring for a fault on page `pgoff`, and remembers it: at most `most`, within `bounds`, which
    /// hold `pgoff`. `at_start`: it is the first page of its area.
    pub(crate) fn window(&self, pgoff: u64, bounds: &Range<u64>, at_start: bool, most: u64) -> Range<u64> {
        // Not exact among several threads, and needn't be.
        let now = self.faults.load(Ordering::Relaxed).wrapping_add(1);
        self.faults.store(now, Ordering::Relaxed);
        let words = self.words.each_ref().map(|word| word.load(Ordering::Relaxed));
        if !at_start && !words.iter().any(|&word| Stream::may_concern(word, pgoff)) {
            // A jump, as most faults are where they cost most: a page each.
            let stream = Stream { edge: pgoff + 1, order: 0, backward: false, stamp: now };
            self.words[oldest(&words, now)].store(stream.to_word(), Ordering::Relaxed);
            return pgoff..pgoff + 1;
        }
        let step = decide(&words, now, pgoff, bounds, at_start, most);
        self.words[step.slot].store(step.stream.to_word(), Ordering::Relaxed);
        step.start..step.end
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: Range<u64> = 0..1 << 40;

    /// Faults on every page that did not come yet, in the order given; tells the windows.
    fn walk(streams: &Streams, pages: impl IntoIterator<Item = u64>, most: u64) -> Vec<Range<u64>> {
        let mut windows: Vec<Range<u64>> = Vec::new();
        for page in pages {
            if !windows.iter().any(|window| window.contains(&page)) {
                windows.push(streams.window(page, &ALL, false, most));
            }
        }
        windows
    }

    fn lengths(windows: &[Range<u64>]) -> Vec<u64> {
        windows.iter().map(|window| window.end - window.start).collect()
    }

    #[test]
    fn a_stream_doubles_its_windows_up_to_the_most() {
        let streams = Streams::default();
        assert_eq!(lengths(&walk(&streams, 1000..1200, 32)), [1, 4, 8, 16, 32, 32, 32, 32, 32, 32]);
        let streams = Streams::default();
        assert_eq!(lengths(&walk(&streams, 7..1500, 512)), [1, 4, 8, 16, 32, 64, 128, 256, 512, 512]);
    }

    #[test]
    fn a_stream_backward_grows_too() {
        let streams = Streams::default();
        let windows = walk(&streams, (0..100).rev(), 16);
        assert_eq!(lengths(&windows), [1, 4, 8, 16, 16, 16, 16, 16, 7]);
        assert_eq!((windows[1].clone(), windows[2].clone()), (95..99, 87..95));
    }

    #[test]
    fn the_first_page_of_an_area_begins_a_stream_once() {
        let streams = Streams::default();
        assert_eq!(streams.window(50, &ALL, true, 512), 50..54);
        assert_eq!(streams.window(54, &ALL, false, 512), 54..62);
        assert_eq!(streams.window(20, &ALL, true, 512), 20..21);
    }

    #[test]
    fn jumps_bring_single_pages() {
        let streams = Streams::default();
        let pages = (0..200).map(|n| 1000 * ((n * 7919) % 200));
        assert!(lengths(&walk(&streams, pages, 512)).iter().all(|&pages| pages == 1));
        // Also after a long stream: only what goes on with it is large.
        walk(&streams, 500_000..510_000, 512);
        assert_eq!(streams.window(700_000, &ALL, false, 512), 700_000..700_001);
    }

    #[test]
    fn streams_that_take_turns_are_kept_apart() {
        let streams = Streams::default();
        let turns = (0..2000).flat_map(|n| (0..STREAMS as u64).map(move |stream| 1_000_000 * stream + n));
        let windows = walk(&streams, turns, 64);
        assert!(windows.len() <= STREAMS * (2000 / 64 + 6), "{} windows", windows.len());
    }

    #[test]
    fn a_stream_lives_on_among_jumps_and_dead_ones_give_way() {
        let streams = Streams::default();
        for dead in 1..=STREAMS as u64 {
            walk(&streams, 1_000_000 * dead..1_000_000 * dead + 3000, 512);
        }
        let mut windows = Vec::new();
        for n in 0..5000 {
            if !windows.iter().any(|window: &Range<u64>| window.contains(&n)) {
                windows.push(streams.window(n, &ALL, false, 64));
                for jump in 0..2 {
                    streams.window(10_000_000 + 1000 * (2 * n + jump), &ALL, false, 64);
                }
            }
        }
        assert!(windows.len() < 5000 / 64 + 20, "{:?}", lengths(&windows));
    }

    #[test]
    fn a_window_ends_where_its_bounds_do_and_the_stream_goes_on_behind() {
        let streams = Streams::default();
        for (page, end) in [(0, 4), (4, 12), (12, 28)] {
            assert_eq!(streams.window(page, &(0..30), page == 0, 512), page..end);
        }
        assert_eq!(streams.window(28, &(0..30), false, 512), 28..30);
        assert_eq!(streams.window(30, &(30..1000), false, 512), 30..94);
    }

    #[test]
    fn what_was_put_off_gets_the_same_window_again() {
        let streams = Streams::default();
        walk(&streams, 0..5, 512);
        let window = streams.window(5, &ALL, false, 512);
        assert_eq!(window, 5..13);
        assert_eq!(streams.window(5, &ALL, false, 512), window);
        assert_eq!(streams.window(13, &ALL, false, 512), 13..29);
        for _ in 0..2 * STREAMS {
            assert_eq!(streams.window(1000, &ALL, false, 512), 1000..1001);
        }
        assert_eq!(streams.window(29, &ALL, false, 512), 29..61);
    }

    #[test]
    fn a_piece_goes_on_with_the_streams_of_the_whole() {
        let streams = Streams::default();
        walk(&streams, 0..100, 64);
        let piece = streams.clone();
        let on = streams.window(125, &ALL, false, 64);
        assert_eq!(on, 125..189);
        assert_eq!(piece.window(125, &ALL, false, 64), on);
    }

    proptest! {
        /// T95: whatever came before, the window holds the page that faulted, and nothing outside or too much.
        #[test]
        fn a_window_holds_its_fault_and_nothing_outside(
            faults in prop::collection::vec((0u64..300, 0u64..40, 0u64..40, any::<bool>(), 0u64..600), 1..60),
            far in prop::sample::select(vec![0u64, 1 << 43, (1 << 44) - 100, 1 << 50]),
        ) {
            let streams = Streams::default();
            for (page, before, after, at_start, most) in faults {
                let pgoff = far + page;
                let bounds = pgoff.saturating_sub(before)..pgoff + 1 + after;
                let window = streams.window(pgoff, &bounds, at_start, most);
                prop_assert!(window.contains(&pgoff));
                prop_assert!(bounds.start <= window.start && window.end <= bounds.end);
                prop_assert!(window.end - window.start <= most.max(1));
            }
        }

        /// Whatever a word holds, also one that no thread wrote as a whole, the window is sound.
        #[test]
        fn any_state_makes_a_sound_window(words in any::<[u64; STREAMS]>(), pgoff in 0u64..1 << 51, most in 0u64..600) {
            let streams = Streams { words: words.map(AtomicU64::new), faults: AtomicU64::new(words[0]) };
            let window = streams.window(pgoff, &(pgoff..pgoff + 100), false, most);
            prop_assert!(window.contains(&pgoff) && window.end <= pgoff + 100);
            prop_assert!(window.end - window.start <= most.max(1));
        }

        /// What is taken for a jump without a closer look is one.
        #[test]
        fn no_stream_goes_on_far_from_where_it_ended(
            edge in 0u64..1 << 44, order in 0u32..=LAST_ORDER, backward: bool, far in 0u64..2000, before: bool,
        ) {
            let stream = Stream { edge, order, backward, stamp: 0 };
            let pgoff = if before { edge.saturating_sub(far) } else { edge + far };
            if stream.goes_on(pgoff).is_some() || stream.repeats(pgoff) {
                prop_assert!(Stream::may_concern(stream.to_word(), pgoff));
            }
        }

        #[test]
        fn a_stream_is_what_its_word_says(
            edge in 0u64..1 << 44, order in 0u32..=LAST_ORDER, backward: bool, stamp in 0..PRESENT,
        ) {
            let stream = Stream { edge, order, backward, stamp };
            prop_assert_eq!(Stream::from_word(stream.to_word()), Some(stream));
        }
    }
}
