//! Work on the bytes of any file: a walk through it, each step of which goes where the bytes of the step before say.

use std::collections::BTreeSet;
use std::ops::Range;

use anyhow::{Context, Result};
use kiomap::page_size;

/// What came of a walk.
pub(crate) struct Walked {
    pub(crate) answer: u64,
    /// The stretches that were read, in order.
    pub(crate) steps: Vec<u64>,
}

/// Walks through bytes in so many steps, each of which reads a stretch of pages whole. `look` shows bytes.
pub(crate) fn walk<'a>(
    len_bytes: u64,
    stretch_pages: u64,
    nr_steps: u64,
    seed: u64,
    mut look: impl FnMut(Range<u64>) -> Result<std::borrow::Cow<'a, [u8]>>,
) -> Result<Walked> {
    let stretch_bytes = stretch_pages * page_size() as u64;
    let stretches = len_bytes.div_ceil(stretch_bytes);
    let (mut answer, mut steps) = (seed, Vec::new());
    for step in 0..nr_steps {
        // Where the bytes are all alike it would go round in circles.
        let stretch = (answer ^ step.wrapping_mul(0x9e37_79b9_7f4a_7c15)) % stretches;
        let start = stretch * stretch_bytes;
        let bytes = look(start..len_bytes.min(start + stretch_bytes)).context("looking at a stretch")?;
        for word in bytes.chunks(8) {
            let word = word.iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
            answer = (answer ^ word).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23);
        }
        steps.push(stretch);
    }
    Ok(Walked { answer, steps })
}

/// The pages that the steps of a walk touch.
pub(crate) fn pages_of(walked: &Walked, len_bytes: u64, stretch_pages: u64) -> u64 {
    let nr_pages = len_bytes.div_ceil(page_size() as u64);
    let stretches: BTreeSet<u64> = walked.steps.iter().copied().collect();
    stretches.into_iter().map(|stretch| stretch_pages.min(nr_pages - stretch * stretch_pages)).sum()
}
