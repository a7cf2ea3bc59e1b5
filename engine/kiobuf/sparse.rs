//! A file with holes as a list with holes: what a snapshot of differences is.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::extent::{Base, Extent};
use super::file::PagedFile;
use super::{Inner, Kiobuf};
use crate::error::{Error, Result};
use crate::page::page_size;

impl Kiobuf {
    /// Maps a range of a file as [`map_file`](Kiobuf::map_file) does, but for the holes of the file, which are holes of the
    /// list: [`layered`](Kiobuf::layered) shows what lies below there.
    ///
    /// A page is data if the file has data in any part of it. It takes two system calls for each run of data. The position of
    /// `file` is moved meanwhile, and then set to what it was. Holes are asked for now: what is written into one later is
    /// not seen.
    ///
    /// # Errors
    ///
    /// As [`map_file`](Kiobuf::map_file).
    pub fn map_sparse(&mut self, file: &File, range: Range<u64>) -> Result<()> {
        if self.is_mapped() {
            return Err(Error::AlreadyMapped { nr_pages: self.nr_pages() });
        }
        // Also checks that the range is one.
        let whole = Extent::of_bytes(
            Base::File { file: Arc::new(PagedFile::open(file, &range)?), at: range.start },
            0,
            range.end - range.start,
        )?;
        let before = lseek(file, 0, Whence::SeekCur).map_err(Error::sys("lseek of a sparse file"))?;
        let list = data_of(file, &range, &whole);
        lseek(file, before, Whence::SeekSet).map_err(Error::sys("lseek of a sparse file"))?;
        self.inner = Arc::new(list?);
        Ok(())
    }
}

/// The pages of an extent that the file has data for, with holes between.
fn data_of(file: &File, range: &Range<u64>, whole: &Extent) -> Result<Inner> {
    let page = page_size() as u64;
    let mut list = Inner::default();
    while list.nr_pages < whole.nr_pages {
        let from = range.start + list.nr_pages * page;
        let data = match seek(file, from, Whence::SeekData)? {
            Some(data) if data < range.end => data,
            _ => {
                list.show(None, list.nr_pages..whole.nr_pages);
                break;
            }
        };
        // It is behind what is data, so at least in the next page; without one the file has become shorter.
        let hole = seek(file, data, Whence::SeekHole)?.unwrap_or(data + 1).min(range.end);
        let first = (data - range.start) / page;
        list.show(None, list.nr_pages..first);
        list.show(Some(whole), first..(hole - range.start).div_ceil(page));
    }
    Ok(list)
}

/// Finds data or a hole from an offset on; `None` if the file ends before.
fn seek(file: &File, from: u64, what: Whence) -> Result<Option<u64>> {
    // Within 63 bits, as the file's size is.
    match lseek(file, from as i64, what) {
        Ok(found) => Ok(Some(found as u64)),
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(Error::sys("lseek(SEEK_DATA) of a sparse file")(errno)),
    }
}
