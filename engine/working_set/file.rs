//! The file of a working set: small, versioned, with a checksum, and exchanged as a whole.
//!
//! ```text
//!  0   8  "kiomapWS"
//!  8   4  version
//! 12   4  bytes of a page
//! 16   8  pages of the list
//! 24  32  identity of the list's contents
//! 56   8  pages of the set
//! 64   …  each page as the difference to the one before, zigzag, in LEB128
//!  …  32  SHA-256 of everything before
//! ```
//!
//! Numbers are little-endian. A page takes two or three bytes. Whatever a file says, reading it takes no more memory than some
//! times its length, and that is looked at first.

use std::fs::{File, OpenOptions};
use std::hash::{BuildHasher, RandomState};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use sha2::{Digest, Sha256};

use super::{Identity, PAGES_MAX, WorkingSet, WorkingSetFault};
use crate::page::page_size;
use crate::{Error, Result};

const MAGIC: [u8; 8] = *b"kiomapWS";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 64;
const CHECKSUM_BYTES: usize = 32;
/// The longest that the difference of two pages gets.
const PAGE_BYTES_MAX: u64 = 10;
const FILE_BYTES_MAX: u64 = (HEADER_BYTES + CHECKSUM_BYTES) as u64 + PAGES_MAX * PAGE_BYTES_MAX;

impl WorkingSet {
    /// Saves it to a file, which is exchanged as a whole: whatever happens, there is the file as it was, or the new one. A process
    /// that is killed meanwhile leaves a hidden file beside it, `.kiomap-….new`.
    ///
    /// # Errors
    ///
    /// [`Error::Sys`] when the file can't be made in its folder, written (`ENOSPC`), or put in its place, or the folder not be
    /// opened for reading (`EACCES`). Nothing is left behind then, and what was at `path` stays. Only when the last step fails,
    /// the fsync of the folder, the new file is there, and may not be after the machine loses power.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        path.file_name().ok_or(Error::io("the name of a working set")(Errno::EISDIR.into()))?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let opened = File::open(folder).map_err(Error::io("opening the folder of a working set"))?;
        // A number that nobody else has, in whatever namespace of processes.
        let random = RandomState::new().hash_one(std::process::id());
        let name = folder.join(format!(".kiomap-{random:016x}.new"));
        let create = OpenOptions::new().write(true).create_new(true).open(&name);
        let mut file = create.map_err(Error::io("creating the file of a working set"))?;
        let unfinished = Unfinished(name);
        file.write_all(&self.encode()).map_err(Error::io("writing a working set"))?;
        file.sync_all().map_err(Error::io("fsync of a working set"))?;
        std::fs::rename(&unfinished.0, path).map_err(Error::io("rename of a working set to its place"))?;
        std::mem::forget(unfinished);
        opened.sync_all().map_err(Error::io("fsync of a working set's folder, in which the new file is already"))
    }

    /// Loads one from a file that [`WorkingSet::save`] made. Whether it belongs to an image is asked when it is
    /// [replayed](crate::Region::replay).
    ///
    /// # Errors
    ///
    /// [`Error::WorkingSet`] (`EBADMSG`) for a file that is something else, of another version, damaged or cut short, and
    /// (`ESTALE`) for one of pages of another size; [`Error::Sys`] when it can't be read (`ENOENT`).
    pub fn load(path: impl AsRef<Path>) -> Result<WorkingSet> {
        // A pipe would be waited for.
        let opened = OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path);
        let file = opened.map_err(Error::io("opening a working set"))?;
        let meta = file.metadata().map_err(Error::io("fstat of a working set"))?;
        if !meta.is_file() {
            return Err(WorkingSetFault::NotOne.into());
        }
        let mut bytes = Vec::new();
        // It may grow meanwhile.
        let read = file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes);
        read.map_err(Error::io("reading a working set"))?;
        Ok(decode(&bytes, meta.len())?)
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + 3 * self.pages.len() + CHECKSUM_BYTES);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend((page_size() as u32).to_le_bytes());
        bytes.extend(self.list_pages.to_le_bytes());
        bytes.extend(self.identity);
        bytes.extend((self.pages.len() as u64).to_le_bytes());
        let mut before = 0;
        for &page in &self.pages {
            put(&mut bytes, page.wrapping_sub(before).cast_signed());
            before = page;
        }
        let checksum = Sha256::digest(&bytes);
        bytes.extend(checksum);
        bytes
    }
}

/// A file that is being written: gone, unless it has come to its place.
struct Unfinished(PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Reads what a file of `file_bytes` bytes begins with.
fn decode(bytes: &[u8], file_bytes: u64) -> std::result::Result<WorkingSet, WorkingSetFault> {
    if !bytes.starts_with(&MAGIC) {
        return Err(WorkingSetFault::NotOne);
    }
    let bytes_read = (bytes.len() as u64).max(file_bytes);
    if bytes_read > FILE_BYTES_MAX {
        return Err(WorkingSetFault::TooLong { bytes: bytes_read, limit: FILE_BYTES_MAX });
    }
    let (_, rest) = bytes.split_at(MAGIC.len());
    let (version, _) = rest.split_first_chunk().ok_or(WorkingSetFault::Damaged)?;
    let found = u32::from_le_bytes(*version);
    if found != VERSION {
        return Err(WorkingSetFault::Version { found, known: VERSION });
    }
    let (sealed, checksum) = bytes.split_last_chunk::<CHECKSUM_BYTES>().ok_or(WorkingSetFault::Damaged)?;
    if Sha256::digest(sealed).as_slice() != checksum {
        return Err(WorkingSetFault::Damaged);
    }
    let (header, entries) = sealed.split_first_chunk::<HEADER_BYTES>().ok_or(WorkingSetFault::Damaged)?;
    let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| header[at + byte]));
    let found = word(8) >> 32;
    if found != page_size() as u64 {
        return Err(WorkingSetFault::PageSize { found, here: page_size() as u64 });
    }
    let identity: Identity = std::array::from_fn(|byte| header[24 + byte]);
    let pages = pages_of(entries, word(56), word(16)).ok_or(WorkingSetFault::Damaged)?;
    Ok(WorkingSet::new(pages, word(16), identity))
}

/// Reads so many pages of a list; `None` if they are not there, or are no distinct pages of it.
fn pages_of(mut entries: &[u8], nr_pages: u64, list_pages: u64) -> Option<Vec<u64>> {
    // Each takes a byte at least.
    if nr_pages > PAGES_MAX || nr_pages > entries.len() as u64 {
        return None;
    }
    let mut pages = Vec::with_capacity(nr_pages as usize);
    let mut page = 0u64;
    for _ in 0..nr_pages {
        page = page.wrapping_add_signed(take(&mut entries)?);
        pages.push(page);
    }
    let mut ascending = pages.clone();
    ascending.sort_unstable();
    let distinct = ascending.windows(2).all(|pair| pair[0] < pair[1]);
    (entries.is_empty() && distinct && ascending.last().is_none_or(|&last| last < list_pages)).then_some(pages)
}

fn put(bytes: &mut Vec<u8>, difference: i64) {
    let mut rest = (difference << 1 ^ difference >> 63).cast_unsigned();
    while rest >= 0x80 {
        bytes.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    bytes.push(rest as u8);
}

fn take(bytes: &mut &[u8]) -> Option<i64> {
    let mut number = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        // The last has one bit left.
        let part = u64::from(byte & 0x7f);
        if part << shift >> shift != part {
            return None;
        }
        number |= part << shift;
        if byte & 0x80 == 0 {
            return Some((number >> 1).cast_signed() ^ -((number & 1).cast_signed()));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn set(pages: Vec<u64>) -> WorkingSet {
        WorkingSet::new(pages, 1 << 40, [7; 32])
    }

    /// Bytes with a checksum that matches, whatever they are.
    fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
        let checksum = Sha256::digest(&bytes);
        bytes.extend(checksum);
        bytes
    }

    fn decoded(bytes: &[u8]) -> std::result::Result<WorkingSet, WorkingSetFault> {
        decode(bytes, bytes.len() as u64)
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(pages in proptest::collection::hash_set(0u64..1 << 40, 0..300)) {
            let set = set(pages.into_iter().collect());
            prop_assert_eq!(decoded(&set.encode()), Ok(set));
        }

        /// No change of a bit, and no cut, goes unnoticed.
        #[test]
        fn damage_is_noticed(at in any::<prop::sample::Index>(), bit in 0u32..8, cut in any::<prop::sample::Index>()) {
            let bytes = set((0..100).map(|n| n * 7919 % 1000).collect()).encode();
            let mut damaged = bytes.clone();
            damaged[at.index(bytes.len())] ^= 1u8 << bit;
            prop_assert!(decoded(&damaged).is_err());
            prop_assert!(decoded(&bytes[..cut.index(bytes.len())]).is_err());
        }

        /// Hostile bytes with a right checksum are refused or are a set that keeps its promises.
        #[test]
        fn hostile_files_are_refused(
            entries in proptest::collection::vec(any::<u8>(), 0..60), nr_pages in 0u64..40, list_pages in 0u64..200,
        ) {
            let mut bytes = set(Vec::new()).encode();
            bytes.truncate(HEADER_BYTES);
            bytes[16..24].copy_from_slice(&list_pages.to_le_bytes());
            bytes[56..64].copy_from_slice(&nr_pages.to_le_bytes());
            bytes.extend(entries);
            if let Ok(set) = decoded(&sealed(bytes)) {
                prop_assert_eq!(set.pages.len() as u64, nr_pages);
                prop_assert!(set.pages.iter().all(|&page| page < list_pages));
            }
        }
    }

    #[test]
    fn numbers_at_the_borders_are_read_as_they_were_written() {
        for number in [0, 1, -1, 63, 64, -64, -65, i64::MAX, i64::MIN, i64::MAX - 1] {
            let mut bytes = Vec::new();
            put(&mut bytes, number);
            assert!(bytes.len() as u64 <= PAGE_BYTES_MAX);
            let mut rest = bytes.as_slice();
            assert_eq!((take(&mut rest), rest.len()), (Some(number), 0));
            assert_eq!(take(&mut &bytes[..bytes.len() - 1]), None);
        }
        assert_eq!(take(&mut [0xff; 11].as_slice()), None);
        assert_eq!(take(&mut [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2].as_slice()), None);
    }

    /// A number of pages that would take all memory is refused before any is taken.
    #[test]
    fn what_a_file_can_not_hold_is_refused_first() {
        let with = |at: usize, word: u64| {
            let mut bytes = set(vec![1, 2, 3]).encode();
            bytes.truncate(bytes.len() - CHECKSUM_BYTES);
            bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
            decoded(&sealed(bytes))
        };
        for nr_pages in [0, 2, 4, u64::MAX, PAGES_MAX + 1] {
            assert_eq!(with(56, nr_pages), Err(WorkingSetFault::Damaged), "{nr_pages}");
        }
        assert_eq!(with(16, 3), Err(WorkingSetFault::Damaged), "page 3 of 3");
        assert!(with(16, 4).is_ok());
        let other = WorkingSetFault::PageSize { found: 16 << 10, here: page_size() as u64 };
        assert_eq!(with(8, u64::from(VERSION) | (16 << 10) << 32), Err(other));
        let version = WorkingSetFault::Version { found: 2, known: VERSION };
        assert_eq!(with(8, 2 | (page_size() as u64) << 32), Err(version));
        assert_eq!(decoded(&sealed([set(vec![5, 5]).encode()].concat())), Err(WorkingSetFault::Damaged));
        let bytes = set(vec![1]).encode();
        let long = WorkingSetFault::TooLong { bytes: u64::MAX, limit: FILE_BYTES_MAX };
        assert_eq!(decode(&bytes, u64::MAX), Err(long));
        for something in [&b""[..], b"kiomap", b"PK\x03\x04 and more"] {
            assert_eq!(decoded(something), Err(WorkingSetFault::NotOne));
        }
    }

    /// A page takes two or three bytes.
    #[test]
    fn a_set_is_small() {
        let pages: Vec<u64> = (0..13_107).map(|n| n * 7919 % (1 << 18)).collect();
        assert!(set(pages.clone()).encode().len() < 3 * pages.len() + 200);
    }
}
