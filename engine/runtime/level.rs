//! What the engine makes of the features that the kernel has: those that it can't do without, and those whose lack it
//! makes good in another way.

use crate::sys::{Features, Opener};
use crate::{Error, Result};

/// Features that nothing else stands for, and what they are needed for.
const REQUIRED: [(Features, &str); 4] = [
    (Features::MISSING_SHMEM, "a region is shared memory, whose missing pages must be reported"),
    (
        Features::EVENT_UNMAP,
        "without it nobody learns that addresses changed hands: foreign memory would be taken for a region's",
    ),
    (Features::EVENT_REMAP, "without it nobody learns that a region moved: it would show zeros at its new place"),
    (
        Features::MINOR_SHMEM,
        "it comes with UFFDIO_CONTINUE for shared memory, which tells whether a page is there before it is refused",
    ),
];

/// Features that are used where they are there.
const OPTIONAL: [Features; 3] = [Features::EVENT_REMOVE, Features::THREAD_ID, Features::POISON];

/// Chooses what an engine enables of what the kernel has and `without` does not take away.
///
/// # Errors
///
/// [`Error::Unsupported`] for what it can't do without; [`Error::Open`] when no userfaultfd can be had;
/// [`Error::Sys`] when neither POISON nor what stands for it works.
pub(super) fn choose(opener: &Opener, without: Features) -> Result<Features> {
    let available = opener.available()?.difference(without);
    for (missing, why) in REQUIRED {
        if !available.contains(missing) {
            return Err(Error::Unsupported { what: "an engine", missing, why });
        }
    }
    let required = REQUIRED.into_iter().map(|(feature, _)| feature);
    let optional = OPTIONAL.into_iter().filter(|&feature| available.contains(feature));
    let chosen = required.chain(optional).fold(Features::empty(), Features::union);
    if !chosen.contains(Features::POISON) {
        crate::process::mask::check(opener)?;
    }
    Ok(chosen)
}
