//! Making an image: one frame after the other, then the map, then the table.

use std::io::{ErrorKind, Read, Write};

use sha2::{Digest, Sha256};
use zstd_safe::{CCtx, CParameter};

use super::super::GRANULE_MAX_BYTES;
use super::map::{ImageMap, encoded_bytes};
use super::table::TableBuilder;
use super::{FRAMES_MAX, ZstdImage};
use crate::error::{Error, Result, SourceFault};
use crate::page::page_size;

/// The size of frames unless another is asked for: see "Compressed images" in `docs/design.md`.
const FRAME_BYTES: usize = 128 << 10;
/// The level of compression unless another is asked for: zstd's own.
const LEVEL: i32 = 3;

/// Says how an image is made.
#[derive(Debug, Clone)]
pub struct ZstdOptions {
    level: i32,
    frame_bytes: usize,
}

impl Default for ZstdOptions {
    fn default() -> Self {
        Self { level: LEVEL, frame_bytes: FRAME_BYTES }
    }
}

impl ZstdOptions {
    /// Begins with level 3 and frames of 128 KiB.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the level of compression, as `zstd` counts: negative ones are quicker, 22 is the highest.
    #[must_use]
    pub fn level(mut self, level: i32) -> Self {
        self.level = level;
        self
    }

    /// Sets the bytes of a frame, a power of two from the page size to 4 MiB: what one touch decompresses. Larger ones
    /// compress better.
    #[must_use]
    pub fn frame_bytes(mut self, bytes: usize) -> Self {
        self.frame_bytes = bytes;
        self
    }
}

/// Describes an image that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct MadeImage {
    /// The bytes of the contents.
    pub len_bytes: u64,
    /// The bytes that were written.
    pub image_bytes: u64,
    /// The bytes of the contents in frames of zeros, which cost no read.
    pub zero_bytes: u64,
    /// The SHA-256 of the contents.
    pub contents_sha256: [u8; 32],
}

impl ZstdImage {
    /// Makes an image of all that `read` has and writes it to `write`, from its start to its end, in memory of a few frames.
    /// `progress` is told the bytes of the contents that are done.
    ///
    /// What is written is an image only if this succeeds: write to a temporary name, `fsync`, and rename.
    ///
    /// # Errors
    ///
    /// * [`Error::Invalid`] (`EINVAL`): the frame size, or the level of compression, is out of range.
    /// * [`Error::Source`]: there is nothing to read (`ENODATA`), there are more than 4 Mi frames (`EFBIG`), or reading or writing
    ///   failed, with the errno (`ENOSPC`: the disk is full).
    pub fn make(
        mut read: impl Read,
        mut write: impl Write,
        options: &ZstdOptions,
        mut progress: impl FnMut(u64),
    ) -> Result<MadeImage> {
        let &ZstdOptions { level, frame_bytes } = options;
        if !frame_bytes.is_power_of_two() || !(page_size()..=GRANULE_MAX_BYTES).contains(&frame_bytes) {
            let rule = "it must be a power of two from the page size to 4 MiB";
            return Err(Error::Invalid { what: "the bytes of a frame", value: frame_bytes as u64, rule });
        }
        if !(zstd_safe::min_c_level()..=zstd_safe::max_c_level()).contains(&level) {
            let rule = "it must be one that zstd has, 22 at the most";
            return Err(Error::Invalid { what: "the level of compression", value: level as u64, rule });
        }
        let failed = |name: &str, fault, why: &str| Error::Source { name: name.into(), fault, why: why.into() };
        let reading = |error: std::io::Error| Error::source_io("what the image is made of", &error);
        let writing = |error: std::io::Error| Error::source_io("the image", &error);
        let mut context = CCtx::try_create().ok_or_else(|| {
            failed("the image", SourceFault::Io(nix::errno::Errno::ENOMEM), "no memory to compress in")
        })?;
        let refused = |code| failed("the image", SourceFault::Unsupported, zstd_safe::get_error_name(code));
        for parameter in [CParameter::CompressionLevel(level), CParameter::ChecksumFlag(true)] {
            context.set_parameter(parameter).map_err(refused)?;
        }

        let (mut table, mut digest) = (TableBuilder::default(), Sha256::new());
        let mut made = MadeImage { len_bytes: 0, image_bytes: 0, zero_bytes: 0, contents_sha256: [0; 32] };
        let mut zero_frames: Vec<std::ops::Range<u32>> = Vec::new();
        let mut frame = vec![0; frame_bytes];
        let mut packed = Vec::with_capacity(zstd_safe::compress_bound(frame_bytes));
        loop {
            let len = read_full(&mut read, &mut frame).map_err(reading)?;
            if len == 0 {
                break;
            }
            let contents = &frame[..len];
            let index = table.nr_frames();
            // One is left for the map.
            if index + 1 >= FRAMES_MAX {
                let why = "more than 4 Mi frames: make them larger";
                return Err(failed("what the image is made of", SourceFault::TooLarge, why));
            }
            packed.clear();
            context.compress2(&mut packed, contents).map_err(refused)?;
            write.write_all(&packed).map_err(writing)?;
            table.push(packed.len(), contents);
            digest.update(contents);
            if is_zero(contents) {
                made.zero_bytes += len as u64;
                match zero_frames.last_mut() {
                    Some(run) if run.end == index => run.end += 1,
                    _ => zero_frames.push(index..index + 1),
                }
            }
            made.len_bytes += len as u64;
            progress(made.len_bytes);
            if len < frame_bytes {
                break;
            }
        }
        if made.len_bytes == 0 {
            return Err(failed("what the image is made of", SourceFault::Empty, "a page list maps at least one byte"));
        }
        made.contents_sha256 = digest.finalize().into();

        // The table lists the map, as a frame that holds nothing; the map names the table's digest.
        table.push(encoded_bytes(zero_frames.len()), &[]);
        made.image_bytes = table.compressed_bytes;
        let table = table.encode();
        made.image_bytes += table.len() as u64;
        let map = ImageMap {
            len_bytes: made.len_bytes,
            frame_bytes: frame_bytes as u32,
            contents_digest: made.contents_sha256,
            zero_frames,
        };
        write.write_all(&map.encode(Sha256::digest(&table).into())).map_err(writing)?;
        write.write_all(&table).map_err(writing)?;
        write.flush().map_err(writing)?;
        Ok(made)
    }
}

/// Reads until the buffer is full or there is no more; returns how much there was.
fn read_full(read: &mut impl Read, buf: &mut [u8]) -> std::io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match read.read(&mut buf[done..]) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Tells whether all bytes are zero, many at a time.
pub(super) fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks.iter().all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0) && rest.iter().all(|&byte| byte == 0)
}
