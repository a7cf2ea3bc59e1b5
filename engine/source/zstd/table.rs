//! Writing the table of an image: for each frame its compressed length, its length, and a checksum of its contents.

use twox_hash::XxHash64;
use zeekstd::SEEKABLE_MAGIC_NUMBER;

/// The magic number of the skippable frame that is the table.
const MAGIC: u32 = 0x184D_2A5E;
/// Says that entries have checksums.
pub(super) const HAS_CHECKSUMS: u8 = 0x80;

/// The entries of a table.
#[derive(Debug, Default)]
pub(super) struct TableBuilder {
    entries: Vec<u8>,
    nr_frames: u32,
    /// The bytes that the frames take.
    pub(super) compressed_bytes: u64,
}

impl TableBuilder {
    pub(super) fn nr_frames(&self) -> u32 {
        self.nr_frames
    }

    /// Notes the next frame, of which there are never too many or too large ones here.
    pub(super) fn push(&mut self, compressed_bytes: usize, contents: &[u8]) {
        for word in [compressed_bytes as u32, contents.len() as u32, checksum(contents)] {
            self.entries.extend(word.to_le_bytes());
        }
        self.nr_frames += 1;
        self.compressed_bytes += compressed_bytes as u64;
    }

    /// Returns the frame that is the table.
    pub(super) fn encode(self) -> Vec<u8> {
        let mut footer = self.nr_frames.to_le_bytes().to_vec();
        footer.push(HAS_CHECKSUMS);
        footer.extend(SEEKABLE_MAGIC_NUMBER.to_le_bytes());
        let len = (self.entries.len() + footer.len()) as u32;
        [&MAGIC.to_le_bytes()[..], &len.to_le_bytes(), &self.entries, &footer].concat()
    }
}

/// The checksum of a frame's contents: the low half of their XXH64.
pub(super) fn checksum(contents: &[u8]) -> u32 {
    XxHash64::oneshot(0, contents) as u32
}
