//! Memory that workers read into: made when it is needed, used again, and never more than was set.

use memmap2::MmapMut;

use crate::source::GRANULE_MAX_BYTES;
use crate::space::mmap_vec::MmapVec;

/// The smallest buffer. Larger ones are powers of two, so that one fits many reads.
const SMALLEST_BYTES: usize = 64 << 10;
/// Kept for reads that wait for nothing: those that do can't take it from them.
const QUICK_BYTES: usize = GRANULE_MAX_BYTES;
/// The least that may be set: room for one read of the largest granule, of either kind.
pub(crate) const READ_BUFFERS_MIN_BYTES: usize = GRANULE_MAX_BYTES + QUICK_BYTES;
/// What is kept while nothing is read.
const KEPT_BYTES: usize = 2 << 20;

/// Page-aligned memory that travels between the fault-handling thread and the workers.
pub(crate) struct ReadBuffer(pub(crate) MmapMut);

/// The buffers of an engine. Those that are lent count as long as somebody waits for what is read into them; so do those
/// that wait to be used again.
pub(crate) struct Buffers {
    most_bytes: usize,
    lent_bytes: usize,
    /// Of those, to reads that may wait.
    lent_to_slow_bytes: usize,
    idle_bytes: usize,
    idle: MmapVec<ReadBuffer>,
}

/// Bytes lent to reads that nobody waits for any more: they may never come back, and keep none from other reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Late {
    pub(crate) slow_bytes: usize,
    pub(crate) quick_bytes: usize,
}

/// The bytes of the buffer for a read of `len` bytes.
pub(crate) fn buffer_bytes(len: usize) -> usize {
    len.next_power_of_two().max(SMALLEST_BYTES)
}

impl Buffers {
    pub(crate) fn new(most_bytes: usize) -> Buffers {
        Buffers { most_bytes, lent_bytes: 0, lent_to_slow_bytes: 0, idle_bytes: 0, idle: MmapVec::new() }
    }

    /// All bytes that are held and count.
    pub(crate) fn held_bytes(&self, late: Late) -> usize {
        self.counted_bytes(late) + self.idle_bytes
    }

    /// The lent bytes that count.
    fn counted_bytes(&self, late: Late) -> usize {
        self.lent_bytes - late.slow_bytes - late.quick_bytes
    }

    /// Lends a buffer of at least `len` bytes; `None` as long as others hold too much, or the kernel has no memory.
    pub(crate) fn lend(&mut self, len: usize, is_quick: bool, late: Late) -> Option<ReadBuffer> {
        let bytes = buffer_bytes(len);
        let counted = self.counted_bytes(late);
        let lent = if is_quick { counted } else { self.lent_to_slow_bytes - late.slow_bytes + QUICK_BYTES };
        if lent + bytes > self.most_bytes || counted + bytes > self.most_bytes {
            return None;
        }
        let buffer = match self.idle.iter().position(|buffer| buffer.0.len() == bytes) {
            Some(index) => {
                self.idle_bytes -= bytes;
                self.idle.swap_remove(index)
            }
            None => {
                self.keep_at_most(self.most_bytes - counted - bytes);
                ReadBuffer(MmapMut::map_anon(bytes).ok()?)
            }
        };
        self.lent_bytes += bytes;
        self.lent_to_slow_bytes += if is_quick { 0 } else { bytes };
        Some(buffer)
    }

    /// Takes a buffer back, which is not of those that are late now.
    pub(crate) fn take_back(&mut self, buffer: ReadBuffer, is_quick: bool, late: Late) {
        let bytes = buffer.0.len();
        self.lent_bytes -= bytes;
        self.lent_to_slow_bytes -= if is_quick { 0 } else { bytes };
        // Without room to note it, it is given up.
        if self.idle.try_push(buffer).is_ok() {
            self.idle_bytes += bytes;
        }
        // It may have been late itself, and others have been lent for it.
        self.keep_at_most(self.most_bytes - self.counted_bytes(late));
    }

    /// Tells whether more is kept than while nothing is read.
    pub(crate) fn is_ample(&self) -> bool {
        self.idle_bytes > KEPT_BYTES
    }

    /// Gives up what needn't be kept.
    pub(crate) fn trim(&mut self) {
        self.keep_at_most(KEPT_BYTES);
    }

    fn keep_at_most(&mut self, bytes: usize) {
        while self.idle_bytes > bytes
            && let Some(buffer) = self.idle.pop()
        {
            self.idle_bytes -= buffer.0.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;
    const NONE: Late = Late { slow_bytes: 0, quick_bytes: 0 };

    #[test]
    fn no_more_is_held_than_was_set() {
        let mut buffers = Buffers::new(12 * MIB);
        let lent: Vec<_> = std::iter::from_fn(|| buffers.lend(3 * MIB, false, NONE)).collect();
        assert_eq!((lent.len(), buffers.held_bytes(NONE)), (2, 8 * MIB));
        // What waits for nothing still finds room, up to the bound.
        let quick: Vec<_> = std::iter::from_fn(|| buffers.lend(MIB, true, NONE)).collect();
        assert_eq!((quick.len(), buffers.held_bytes(NONE)), (4, 12 * MIB));
        lent.into_iter().for_each(|buffer| buffers.take_back(buffer, false, NONE));
        quick.into_iter().for_each(|buffer| buffers.take_back(buffer, true, NONE));
        assert_eq!(buffers.held_bytes(NONE), 12 * MIB);
        // Others are given up for one of another size.
        let other = buffers.lend(1, false, NONE).unwrap();
        assert_eq!(other.0.len(), SMALLEST_BYTES);
        assert!(buffers.held_bytes(NONE) <= 12 * MIB);
        buffers.take_back(other, false, NONE);
        assert!(buffers.is_ample());
        buffers.trim();
        assert!(!buffers.is_ample() && buffers.held_bytes(NONE) <= KEPT_BYTES);
    }

    #[test]
    fn a_buffer_is_used_again() {
        let mut buffers = Buffers::new(READ_BUFFERS_MIN_BYTES);
        let first = buffers.lend(100_000, false, NONE).unwrap();
        let at = first.0.as_ptr();
        buffers.take_back(first, false, NONE);
        assert_eq!(buffers.lend(70_000, true, NONE).unwrap().0.as_ptr(), at);
    }

    #[test]
    fn what_is_late_keeps_nothing_from_others() {
        let mut buffers = Buffers::new(READ_BUFFERS_MIN_BYTES);
        let mut hung = vec![buffers.lend(4 * MIB, false, NONE).unwrap()];
        assert!(buffers.lend(1, false, NONE).is_none());
        let late = |n: usize| Late { slow_bytes: n * 4 * MIB, quick_bytes: 0 };
        hung.push(buffers.lend(4 * MIB, false, late(1)).unwrap());
        assert!(buffers.lend(1, false, late(1)).is_none());
        assert_eq!(buffers.held_bytes(late(2)), 0);
        let quick: Vec<_> = std::iter::from_fn(|| buffers.lend(4 * MIB, true, late(2))).collect();
        assert_eq!((quick.len(), buffers.held_bytes(late(2))), (2, 8 * MIB));
        // There is no room for those that come back after all.
        buffers.take_back(hung.pop().unwrap(), false, late(1));
        buffers.take_back(hung.pop().unwrap(), false, NONE);
        assert_eq!(buffers.held_bytes(NONE), 8 * MIB);
        quick.into_iter().for_each(|buffer| buffers.take_back(buffer, true, NONE));
        assert_eq!(buffers.held_bytes(NONE), 8 * MIB);
    }
}
