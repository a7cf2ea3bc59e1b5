//! A stretch of another source.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::PageSource;

/// Shows the bytes of a source from a multiple of its granule on, so that both have the same granules.
pub(super) struct Part {
    pub(super) source: Arc<dyn PageSource>,
    pub(super) bytes: Range<u64>,
}

impl PageSource for Part {
    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> io::Result<()> {
        self.source.read_at(self.bytes.start + offset_bytes, buf)
    }

    fn len_bytes(&self) -> Option<u64> {
        Some(self.bytes.end - self.bytes.start)
    }

    fn granule_bytes(&self) -> usize {
        self.source.granule_bytes()
    }

    fn may_block(&self) -> bool {
        self.source.may_block()
    }

    fn will_read(&self, range_bytes: Range<u64>) {
        self.source.will_read(self.bytes.start + range_bytes.start..self.bytes.start + range_bytes.end);
    }

    fn identity(&self) -> Option<Vec<u8>> {
        self.source.identity()
    }
}
