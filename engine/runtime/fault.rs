//! A fault, from when it is read until it is answered.

use crate::space::SpaceId;
use crate::stats::latency::Moment;

/// A fault that was read and not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) space: SpaceId,
    /// The start of the page.
    pub(crate) addr: usize,
    /// The thread that touched; 0 when unknown.
    pub(crate) tid: i32,
    /// The access was a write.
    pub(crate) write: bool,
    /// The page is there, and not mapped.
    pub(crate) minor: bool,
    /// When it was read.
    pub(crate) since: Moment,
    /// How often it was put off.
    pub(crate) retries: u32,
    /// How often the kernel had no memory for it.
    pub(crate) starved: u32,
    /// Its page is to be installed without neighbours: with them it failed.
    pub(crate) alone: bool,
    /// Its page can't be read from the list of that vmap, of that generation.
    pub(crate) failed: Option<(u64, u64)>,
}

impl Fault {
    /// A fault on a missing page that has just been read.
    #[inline]
    pub(crate) fn new(space: SpaceId, addr: usize, tid: i32, write: bool, since: Moment) -> Fault {
        Fault { space, addr, tid, write, minor: false, since, retries: 0, starved: 0, alone: false, failed: None }
    }
}
