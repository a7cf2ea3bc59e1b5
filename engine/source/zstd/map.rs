//! What an image says of itself, in a skippable frame that other tools pass over: which of its frames are zeros, and the
//! digest of its contents. It is bound to the image's table, and believed whole or not at all.

use std::ops::Range;

use sha2::{Digest, Sha256};

use super::FRAMES_MAX;
use super::frames::SKIPPABLE_HEADER_BYTES;

/// One of the sixteen magic numbers of skippable frames; the table has another.
const MAGIC: u32 = 0x184D_2A5B;
/// Names the format and its version.
const NAME: [u8; 8] = *b"kiomap\x00\x01";
/// Everything but the runs: name, length, frame size, digests of the contents and the table, number of runs; digest of it all,
/// and the name again.
const FIXED_BYTES: usize = 8 + 8 + 4 + 32 + 32 + 4 + 32 + 8;
const RUN_BYTES: usize = 8;

/// A map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ImageMap {
    /// The bytes of the contents.
    pub(super) len_bytes: u64,
    /// The bytes of every frame but the last.
    pub(super) frame_bytes: u32,
    /// The SHA-256 of the contents.
    pub(super) contents_digest: [u8; 32],
    /// The frames that hold nothing but zeros, as runs: none empty, none touching the next.
    pub(super) zero_frames: Vec<Range<u32>>,
}

/// Returns the bytes of the frame of a map with so many runs.
pub(super) fn encoded_bytes(nr_runs: usize) -> usize {
    SKIPPABLE_HEADER_BYTES + FIXED_BYTES + nr_runs * RUN_BYTES
}

/// Tells whether a frame that begins and ends so was a map. Either is enough: an image whose map is damaged must not pass for
/// one that has none, because nothing else vouches for its table.
pub(super) fn is_map(head: &[u8], tail: &[u8]) -> bool {
    head[SKIPPABLE_HEADER_BYTES..].starts_with(&NAME) || tail.ends_with(&NAME)
}

/// The bytes at either end of a frame that [`is_map`] looks at.
pub(super) const END_BYTES: usize = SKIPPABLE_HEADER_BYTES + NAME.len();
/// The longest map there is.
pub(super) const MAX_BYTES: usize = SKIPPABLE_HEADER_BYTES + FIXED_BYTES + (FRAMES_MAX as usize / 2 + 1) * RUN_BYTES;

impl ImageMap {
    /// Writes the frame.
    pub(super) fn encode(&self, table_digest: [u8; 32]) -> Vec<u8> {
        let total = encoded_bytes(self.zero_frames.len());
        let mut bytes = Vec::with_capacity(total);
        bytes.extend(MAGIC.to_le_bytes());
        bytes.extend(((total - SKIPPABLE_HEADER_BYTES) as u32).to_le_bytes());
        bytes.extend(NAME);
        bytes.extend(self.len_bytes.to_le_bytes());
        bytes.extend(self.frame_bytes.to_le_bytes());
        bytes.extend(self.contents_digest);
        bytes.extend(table_digest);
        bytes.extend((self.zero_frames.len() as u32).to_le_bytes());
        for run in &self.zero_frames {
            bytes.extend(run.start.to_le_bytes());
            bytes.extend((run.end - run.start).to_le_bytes());
        }
        let digest = Sha256::digest(&bytes);
        bytes.extend(digest);
        bytes.extend(NAME);
        bytes
    }

    /// Reads a frame of which [`is_map`] is true.
    pub(super) fn decode(bytes: &[u8], table_digest: [u8; 32]) -> Result<ImageMap, &'static str> {
        let Some((content, digest)) = bytes.strip_suffix(&NAME).and_then(|bytes| bytes.split_last_chunk::<32>()) else {
            return Err("its map is cut off");
        };
        if <[u8; 32]>::from(Sha256::digest(content)) != *digest {
            return Err("the checksum of its map is wrong");
        }
        // From here on it is what some version of this library wrote, unless somebody forged it: lengths are checked still.
        let mut rest = content.get(END_BYTES..).ok_or("its map is cut off")?;
        let len_bytes = u64::from_le_bytes(take(&mut rest)?);
        let frame_bytes = u32::from_le_bytes(take(&mut rest)?);
        let contents_digest = take(&mut rest)?;
        if take::<32>(&mut rest)? != table_digest {
            return Err("its map belongs to another seek table");
        }
        let nr_runs = u32::from_le_bytes(take(&mut rest)?) as usize;
        if rest.len() != nr_runs.saturating_mul(RUN_BYTES) {
            return Err("its map has another number of runs than it says");
        }
        let mut zero_frames: Vec<Range<u32>> = Vec::with_capacity(nr_runs);
        for _ in 0..nr_runs {
            let (start, len) = (u32::from_le_bytes(take(&mut rest)?), u32::from_le_bytes(take(&mut rest)?));
            let end = start.checked_add(len).ok_or("a run of its map wraps around")?;
            if len == 0 || zero_frames.last().is_some_and(|last| start <= last.end) {
                return Err("the runs of its map are not in order");
            }
            zero_frames.push(start..end);
        }
        Ok(ImageMap { len_bytes, frame_bytes, contents_digest, zero_frames })
    }
}

fn take<const N: usize>(bytes: &mut &[u8]) -> Result<[u8; N], &'static str> {
    let (taken, rest) = bytes.split_first_chunk().ok_or("its map is cut off")?;
    *bytes = rest;
    Ok(*taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every bit of a map is covered: no map with a bit turned, and none that is shorter or longer, is believed.
    #[test]
    fn a_map_is_believed_whole_or_not_at_all() {
        let map = ImageMap {
            len_bytes: 1_000_000,
            frame_bytes: 1 << 16,
            contents_digest: [7; 32],
            zero_frames: vec![0..1, 3..9, 12..16],
        };
        let bytes = map.encode([9; 32]);
        assert_eq!((bytes.len(), is_map(&bytes, &bytes)), (encoded_bytes(3), true));
        assert_eq!(ImageMap::decode(&bytes, [9; 32]).unwrap(), map);
        assert!(ImageMap::decode(&bytes, [8; 32]).is_err());
        for bit in 0..8 * bytes.len() {
            let mut bent = bytes.clone();
            bent[bit / 8] ^= 1 << (bit % 8);
            assert!(ImageMap::decode(&bent, [9; 32]).is_err(), "bit {bit}");
            assert!(is_map(&bent, &bent), "bit {bit}");
        }
        for len in 0..bytes.len() {
            assert!(ImageMap::decode(&bytes[..len], [9; 32]).is_err(), "{len}");
        }
        // Forged, with a right checksum.
        for runs in [vec![3..9, 0..1], vec![0..1, 1..2], vec![4..4, 5..6]] {
            let forged = ImageMap { zero_frames: runs, ..map.clone() };
            assert!(ImageMap::decode(&forged.encode([9; 32]), [9; 32]).is_err());
        }
    }
}
