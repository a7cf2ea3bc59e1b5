//! Where pages come from that are not memory: a trait, and what ships with the library.

use std::io;
use std::ops::Range;

use crate::error::{Error, Result};
use crate::page::page_size;

pub(crate) mod file;
#[cfg(feature = "object-store")]
pub(crate) mod object;
pub(crate) mod reader;
#[cfg(feature = "zstd")]
pub(crate) mod zstd;

/// The largest [granule](PageSource::granule_bytes) that a page source may have.
pub const GRANULE_MAX_BYTES: usize = 4 << 20;

/// Makes the bytes of a page list on demand, when they are first touched.
///
/// Only [`read_at`](PageSource::read_at) must be written. The other methods say what the engine may make use of; they are
/// asked once, when a list is [made of the source](crate::Kiobuf::map_source).
pub trait PageSource: Send + Sync + 'static {
    /// Fills all of `buf` with the source's bytes from `offset_bytes` on.
    ///
    /// The offset is a multiple of the page size, and so is the length of `buf`, except at the end of what a list was made of the
    /// source ([`map_source`](crate::Kiobuf::map_source)): wherever that then lies in a list, as part of another too. Called
    /// on a worker thread of the engine, from several at a time ([`EngineBuilder::workers`](crate::EngineBuilder::workers)), or on
    /// a thread that fills pages itself; it may block, but must not touch memory of the same engine that is still missing.
    ///
    /// # Errors
    ///
    /// Any error, and a panic likewise, is a failure: the read is tried again or given up as the vmap's
    /// [`FailurePolicy`](crate::FailurePolicy) says, and what was written to `buf` is thrown away. A source that finds that
    /// its bytes are wrong (a checksum, a length) must say so here: what it calls right is shown.
    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Returns how many bytes the source holds, if it knows: a list of more is refused.
    fn len_bytes(&self) -> Option<u64> {
        None
    }

    /// Returns how many bytes are best read at once, from a multiple of them on: a compressed frame, a part of an object.
    ///
    /// A power of two from the page size to [`GRANULE_MAX_BYTES`]; a page unless overridden. Reads for a touch are widened
    /// to it, as far as the list goes: all pages of a granule then come with one read.
    fn granule_bytes(&self) -> usize {
        page_size()
    }

    /// Tells whether a read may wait for something: a disk, a network, a lock that is held for long. Reads of sources that
    /// don't are not made to queue behind reads of those that do.
    fn may_block(&self) -> bool {
        true
    }

    /// Hears that a range of bytes will probably be read soon. Must return at once; does nothing unless overridden.
    fn will_read(&self, range_bytes: Range<u64>) {
        let _ = range_bytes;
    }

    /// Returns what tells this source's contents from any others', if anything does: a digest, an etag, a size with a time.
    ///
    /// A saved working set names it, so that one that belongs to another image is refused.
    fn identity(&self) -> Option<Vec<u8>> {
        None
    }
}

/// Checks what is to be a granule.
fn check_granule(bytes: usize) -> Result<usize> {
    if !bytes.is_power_of_two() || !(page_size()..=GRANULE_MAX_BYTES).contains(&bytes) {
        return Err(Error::Invalid {
            what: "the granule in bytes",
            value: bytes as u64,
            rule: "it must be a power of two from the page size to 4 MiB",
        });
    }
    Ok(bytes)
}

/// Checks that bytes which are asked for lie within a source of `len_bytes`.
fn check_range(offset_bytes: u64, len: usize, len_bytes: u64) -> io::Result<()> {
    if offset_bytes.checked_add(len as u64).is_none_or(|end| end > len_bytes) {
        let why = format!("bytes {offset_bytes}+{len} were asked for of a source of {len_bytes}");
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, why));
    }
    Ok(())
}
