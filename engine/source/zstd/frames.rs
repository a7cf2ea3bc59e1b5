//! The frames of an image: where each lies, compressed and not. Read from the table at the image's end, which is believed
//! only as far as it can be checked.

use std::ops::Range;

use sha2::{Digest, Sha256};
use zeekstd::{BytesWrapper, SEEK_TABLE_INTEGRITY_SIZE, SEEKABLE_MAGIC_NUMBER, SeekTable};

use super::storage::Storage;
use super::table::HAS_CHECKSUMS;
use super::{FRAME_MAX_BYTES, FRAMES_MAX};
use crate::error::{Result, SourceFault};

/// The header of a skippable frame: its magic number and its length, four bytes each.
pub(super) const SKIPPABLE_HEADER_BYTES: usize = 8;

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Frame {
    /// Where it lies in the image.
    pub(super) compressed: Range<u64>,
    /// The bytes of the contents that it holds; none if it is skippable.
    pub(super) contents: Range<u64>,
    /// The low half of the XXH64 of those bytes, if the table has checksums.
    pub(super) checksum: Option<u32>,
}

/// All frames.
#[derive(Debug)]
pub(super) struct Frames {
    table: SeekTable,
    checksums: Option<Vec<u32>>,
    /// The SHA-256 of the table as it lies in the image.
    pub(super) table_digest: [u8; 32],
    /// The bytes of the contents: more than none.
    pub(super) len_bytes: u64,
}

impl Frames {
    /// Reads and checks the table.
    pub(super) fn read(storage: &Storage) -> Result<Frames> {
        let not_seekable = |why: &str| storage.error(SourceFault::NotThatFormat, why);
        let corrupt = |why: String| storage.error(SourceFault::Corrupt, &why);
        let footer_bytes = SEEK_TABLE_INTEGRITY_SIZE as u64;
        if storage.len_bytes < footer_bytes {
            return Err(not_seekable("it is too short for a zstd image with a seek table"));
        }
        let footer = storage.fetch_at_open(storage.len_bytes - footer_bytes..storage.len_bytes)?;
        let word = |at: usize| u32::from_le_bytes([footer[at], footer[at + 1], footer[at + 2], footer[at + 3]]);
        if word(5) != SEEKABLE_MAGIC_NUMBER {
            return Err(not_seekable(
                "no seek table of zstd's seekable format is at its end: truncated, or made otherwise",
            ));
        }
        // Before anything is allocated for them.
        let (nr_frames, has_checksums) = (word(0), footer[4] & HAS_CHECKSUMS != 0);
        if nr_frames > FRAMES_MAX {
            let why =
                format!("its table has {nr_frames} frames, and the limit is {FRAMES_MAX}: make it with larger frames");
            return Err(storage.error(SourceFault::TooLarge, &why));
        }
        let entry_bytes = if has_checksums { 12 } else { 8 };
        let table_bytes = (SKIPPABLE_HEADER_BYTES + nr_frames as usize * entry_bytes) as u64 + footer_bytes;
        let Some(table_start) = storage.len_bytes.checked_sub(table_bytes) else {
            return Err(corrupt(format!("its table of {nr_frames} frames is longer than the image")));
        };
        let bytes = storage.fetch_at_open(table_start..storage.len_bytes)?;
        let table = SeekTable::from_seekable(&mut BytesWrapper::new(&bytes))
            .map_err(|error| corrupt(format!("its seek table: {error}")))?;
        let checksums = has_checksums.then(|| {
            let entries = bytes[SKIPPABLE_HEADER_BYTES..].chunks_exact(12).take(nr_frames as usize);
            entries.map(|entry| u32::from_le_bytes([entry[8], entry[9], entry[10], entry[11]])).collect()
        });
        let frames =
            Frames { len_bytes: table.size_decomp(), table, checksums, table_digest: Sha256::digest(&bytes).into() };
        if frames.table.size_comp() != table_start {
            let listed = frames.table.size_comp();
            return Err(corrupt(format!("its table lists frames of {listed} bytes, and {table_start} are there")));
        }
        if frames.len_bytes == 0 {
            return Err(storage.error(SourceFault::Empty, "a page list maps at least one byte"));
        }
        for frame in frames.iter() {
            let [packed, len] = [&frame.compressed, &frame.contents].map(|range| range.end - range.start);
            if len > FRAME_MAX_BYTES as u64 {
                let why =
                    format!("a frame of {len} bytes, and the limit is {FRAME_MAX_BYTES}: make it with smaller frames");
                return Err(storage.error(SourceFault::TooLarge, &why));
            }
            // No byte, or far more than zstd makes of what can't be compressed.
            if len > 0 && (packed == 0 || packed > 2 * len + (1 << 16)) {
                return Err(corrupt(format!("a frame of {len} bytes can't take {packed} compressed")));
            }
        }
        Ok(frames)
    }

    pub(super) fn len(&self) -> u32 {
        self.table.num_frames()
    }

    /// Describes frame `index`, which must be one.
    pub(super) fn at(&self, index: u32) -> Frame {
        let place = || {
            let table = &self.table;
            let compressed = table.frame_start_comp(index)?..table.frame_end_comp(index)?;
            Ok::<_, zeekstd::Error>((compressed, table.frame_start_decomp(index)?..table.frame_end_decomp(index)?))
        };
        let (compressed, contents) = place().expect("the index is below the number of frames");
        Frame { compressed, contents, checksum: self.checksums.as_ref().map(|all| all[index as usize]) }
    }

    pub(super) fn iter(&self) -> impl DoubleEndedIterator<Item = Frame> + '_ {
        (0..self.len()).map(|index| self.at(index))
    }

    /// Describes the frames that hold a range of the contents, which lies within them, in order.
    pub(super) fn holding(&self, bytes: Range<u64>) -> impl Iterator<Item = Frame> + '_ {
        let first = self.table.frame_index_decomp(bytes.start);
        (first..self.len())
            .map(|index| self.at(index))
            .take_while(move |frame| frame.contents.start < bytes.end)
            .filter(move |frame| !frame.contents.is_empty() && frame.contents.end > bytes.start)
    }

    /// Returns the size that all frames but the last have, if they have one.
    pub(super) fn frame_bytes(&self) -> Option<u64> {
        let mut sizes = self.iter().map(|frame| frame.contents.end - frame.contents.start).filter(|&len| len > 0);
        let first = sizes.next()?;
        let mut ended = false;
        sizes
            .all(|len| {
                let fits = !ended && len <= first;
                ended = len != first;
                fits
            })
            .then_some(first)
    }

    /// Returns the size of the largest frame.
    pub(super) fn largest_bytes(&self) -> u64 {
        self.table.max_frame_size_decomp()
    }
}
