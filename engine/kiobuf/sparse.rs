//! A sparse file as a page list: its data is read, its holes are zeros that nobody reads, or holes that show what is below.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::extent::{Base, Extent};
use super::file::{PagedFile, readable_bytes};
use super::{Inner, Kiobuf};
use crate::error::{Error, Result};
use crate::page::page_size;

/// The runs of data of a file that lists name, at the most: each extent is looked up and kept in memory. Beyond it, what is
/// left of the file is one run.
const RUNS_MAX: usize = 1 << 16;

impl Kiobuf {
    /// Maps a whole regular file whose holes, as the file system tells them (`SEEK_HOLE`), become pages of zeros.
    ///
    /// A touch of a hole costs no read. All data is read through one duplicate of the descriptor, as from
    /// [`map_file`](Kiobuf::map_file). The holes are those of now: who fills one later must map the file again.
    /// On a file system that knows no holes, all of the file is data. The position of `file` is moved meanwhile and put back.
    ///
    /// # Errors
    ///
    /// * [`Error::AlreadyMapped`] (`EINVAL`): the list has pages.
    /// * [`Error::Invalid`] (`EINVAL`): the file is empty, is neither a regular file nor a block device, is not open for
    ///   reading, or is open with `O_DIRECT`.
    /// * [`Error::Fault`] (`EFAULT`): the file became shorter meanwhile.
    /// * [`Error::Sys`]: the file can't be examined, or its descriptor not be duplicated (`EMFILE`).
    pub fn map_sparse_file(&mut self, file: &File) -> Result<()> {
        self.fill_sparse(file, RUNS_MAX, Extent::zeros)
    }

    /// Maps a whole regular file as a difference to what lies below: its holes, as the file system tells them (`SEEK_HOLE`),
    /// are holes of the list, which [`layered`](Kiobuf::layered) shows the lower lists through.
    ///
    /// A page is data if the file has data in any part of it, zeros for instance. Each run of data is an extent, however many
    /// there are. The holes are those of now: what is written into one later is not seen. On a file system that knows no
    /// holes, all of the file is data. The position of `file` is moved meanwhile and put back.
    ///
    /// # Errors
    ///
    /// As [`map_sparse_file`](Kiobuf::map_sparse_file).
    pub fn map_diff_file(&mut self, file: &File) -> Result<()> {
        self.fill_sparse(file, usize::MAX, Extent::hole)
    }

    /// Makes the list of a file's runs of data, at most so many, with something between.
    fn fill_sparse(&mut self, file: &File, runs_max: usize, between: fn(u64) -> Result<Extent>) -> Result<()> {
        if self.is_mapped() {
            return Err(Error::AlreadyMapped { nr_pages: self.nr_pages() });
        }
        let len = readable_bytes(file)?;
        let paged = Arc::new(PagedFile::open(file, &(0..len))?);
        let data = |bytes: Range<u64>| {
            Extent::of_bytes(Base::File { file: Arc::clone(&paged), at: bytes.start }, 0, bytes.end - bytes.start)
        };
        let (page, mut extents, mut done) = (page_size() as u64, Vec::new(), 0);
        let runs = data_runs(file, len, runs_max)?;
        // What is truncated away meanwhile looks like a hole.
        let now = readable_bytes(file)?;
        if now < len {
            return Err(Error::Fault { what: "the file", at: now });
        }
        for run in runs {
            if run.start > done {
                extents.push(between((run.start - done) / page)?);
            }
            done = run.end;
            extents.push(data(run)?);
        }
        if done < len {
            extents.push(between((len - done).div_ceil(page))?);
        }
        if extents.is_empty() {
            // The error of an empty file.
            extents.push(data(0..0)?);
        }
        let mut inner = Inner::default();
        inner.append(&extents)?;
        self.inner = Arc::new(inner);
        Ok(())
    }
}

/// Returns the runs of data of a file of `len` bytes, at most so many, in order, whole pages but for the last, none touching the next.
fn data_runs(file: &File, len: u64, runs_max: usize) -> Result<Vec<Range<u64>>> {
    let page = page_size() as u64;
    let seek = |from: u64, whence| match lseek(file, from as i64, whence) {
        // Somebody may write meanwhile: what is told is never beyond what is asked for.
        Ok(at) => Ok(Some((at as u64).clamp(from, len))),
        // No more data; the end is a hole by nature.
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(Error::Sys { call: "lseek(SEEK_DATA, SEEK_HOLE) of a file to map", errno }),
    };
    let (mut runs, mut at): (Vec<Range<u64>>, u64) = (Vec::new(), 0);
    // The position of the descriptor is the caller's, and shared.
    let position = lseek(file, 0, Whence::SeekCur).map_err(Error::sys("lseek of a file to map"))?;
    let found = loop {
        let start = match seek(at, Whence::SeekData) {
            Ok(Some(start)) if start < len => start,
            Ok(_) => break Ok(()),
            // A block device, or a file system without holes: data to the end.
            Err(Error::Sys { errno: Errno::EINVAL | Errno::EOPNOTSUPP, .. }) => at,
            Err(error) => break Err(error),
        };
        let end = match seek(start, Whence::SeekHole) {
            _ if runs.len() == runs_max => len,
            // No hole begins where data does, unless somebody makes one at this moment: then all that is left is read.
            Ok(Some(end)) if end > start => end.next_multiple_of(page).min(len),
            Ok(_) | Err(Error::Sys { errno: Errno::EINVAL | Errno::EOPNOTSUPP, .. }) => len,
            Err(error) => break Err(error),
        };
        let start = start / page * page;
        match runs.last_mut() {
            Some(last) if last.end >= start => last.end = end,
            _ => runs.push(start..end),
        }
        if end == len {
            break Ok(());
        }
        at = end;
    };
    lseek(file, position, Whence::SeekSet).map_err(Error::sys("lseek of a file to map"))?;
    found.map(|()| runs)
}
