//! Whole-list transfers between a list and a file (`brw_kiovec`).

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::uio::{preadv, pwritev};

use super::Kiobuf;
use super::extent::{Base, Extent};
use super::memory::Memory;
use super::read::read_data;
use crate::error::{Error, Result};
use crate::page::page_size;

/// The most buffers that one call takes (`UIO_MAXIOV`).
const MAX_BUFFERS: usize = 1024;

/// The zeros that a zero extent is written from, and the size of a bounce buffer: a whole number of pages of any size.
const CHUNK_BYTES: usize = 64 << 10;
static ZEROS: [u8; CHUNK_BYTES] = [0; CHUNK_BYTES];

impl Kiobuf {
    /// Reads from `offset` of `file` into the list's pages (`brw_kiovec(READ)`); returns the bytes read.
    ///
    /// Fills up to [`length`](Kiobuf::length) bytes; fewer if the file ends or fails before that. Only a list of arenas
    /// that no other snapshot shares can be read into.
    ///
    /// # Errors
    ///
    /// * [`Error::Shared`] (`EBUSY`): a clone, a vmap or a [`PageLock`](super::PageLock) has the list too, or the list has
    ///   an arena twice.
    /// * [`Error::Fault`] (`EFAULT`): the list has a hole (`at` is its byte in the list).
    /// * [`Error::Invalid`] (`EINVAL`): an extent is not an arena's; [`Arena::shared`](super::Arena::shared) is a memfd's.
    /// * [`Error::Overflow`] (`EOVERFLOW`): `offset` plus the length does not fit in 63 bits.
    /// * [`Error::Sys`]: nothing was read, because `preadv` failed.
    pub fn read_from(&mut self, file: &File, offset: u64) -> Result<u64> {
        check_transfer(self, offset)?;
        let inner = Arc::get_mut(&mut self.inner).ok_or(Error::Shared)?;
        let mut buffers = Vec::with_capacity(inner.extents.len());
        for extent in &mut inner.extents {
            let Base::Memory(Memory::Arena(arena)) = &mut extent.base else {
                return Err(Error::Invalid {
                    what: "the extent at page",
                    value: extent.first_page,
                    rule: "only the pages of an arena can be read into",
                });
            };
            buffers.push(IoSliceMut::new(Arc::get_mut(arena).ok_or(Error::Shared)?));
        }
        let mut rest = buffers.as_mut_slice();
        let mut done = 0;
        while !rest.is_empty() {
            let batch = rest.len().min(MAX_BUFFERS);
            // Within 63 bits: checked above.
            match preadv(file, &mut rest[..batch], (offset + done) as libc::off_t) {
                Ok(0) => break,
                Ok(count) => {
                    done += count as u64;
                    IoSliceMut::advance_slices(&mut rest, count);
                }
                Err(Errno::EINTR) => {}
                Err(errno) if done == 0 => return Err(Error::Sys { call: "preadv into the pages of a list", errno }),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    /// Writes the list's data to `file` from `offset` on (`brw_kiovec(WRITE)`); returns the bytes written.
    ///
    /// Writes [`length`](Kiobuf::length) bytes: zero pages as zeros, slack not at all. May wait for the files and page
    /// sources of the list. If something fails after bytes were written, the answer is their number. A file that is
    /// open with `O_APPEND` is appended to, whatever `offset` is: so does `pwritev`.
    ///
    /// # Errors
    ///
    /// * [`Error::Fault`] (`EFAULT`): the list has a hole (`at` is its byte in the list), or a file of the list was
    ///   truncated.
    /// * [`Error::Overflow`] (`EOVERFLOW`): `offset` plus the length does not fit in 63 bits.
    /// * [`Error::Sys`]: nothing was written, because `pwritev` or reading a file or page source of the list failed.
    ///
    /// # Panics
    ///
    /// If a page source of the list does, on this thread.
    pub fn write_to(&self, file: &File, offset: u64) -> Result<u64> {
        check_transfer(self, offset)?;
        let mut writer = Writer { file, at: offset, pending: Vec::new() };
        match self.inner.extents.iter().try_for_each(|extent| writer.push(extent)).and_then(|()| writer.flush()) {
            Err(error) if writer.at == offset => Err(error),
            _ => Ok(writer.at - offset),
        }
    }
}

/// Refuses what no transfer can do before one begins.
fn check_transfer(kiobuf: &Kiobuf, offset: u64) -> Result<()> {
    if let Some(hole) = kiobuf.inner.extents.iter().find(|extent| matches!(extent.base, Base::Hole)) {
        return Err(Error::Fault { what: "the page list", at: hole.first_page * page_size() as u64 });
    }
    let len = kiobuf.length();
    match offset.checked_add(len).map(i64::try_from) {
        Some(Ok(_)) => Ok(()),
        _ => Err(Error::Overflow { what: "the range of the file", base: offset, len }),
    }
}

/// Gathers buffers, so that a list of many small parts does not cost a call for each.
struct Writer<'a> {
    file: &'a File,
    /// The offset after all that was written.
    at: u64,
    /// What is yet to be written there.
    pending: Vec<IoSlice<'a>>,
}

impl<'a> Writer<'a> {
    fn push(&mut self, extent: &'a Extent) -> Result<()> {
        let len = extent.data_len();
        match &extent.base {
            Base::Memory(memory) => {
                // SAFETY: the extent's data is `len` bytes of memory, which its guard keeps readable and unwritten for
                // as long as `extent` is borrowed.
                self.gather(unsafe { std::slice::from_raw_parts(memory.as_ptr(), len as usize) })
            }
            Base::Zero => chunks(len).try_for_each(|(_, len)| self.gather(&ZEROS[..len])),
            Base::Mmap { .. } | Base::File { .. } | Base::Memfd(_) | Base::Source { .. } => self.bounce(extent),
            Base::Hole => Err(Error::Fault { what: "the page list", at: extent.first_page * page_size() as u64 }),
        }
    }

    fn gather(&mut self, bytes: &'a [u8]) -> Result<()> {
        self.pending.push(IoSlice::new(bytes));
        if self.pending.len() == MAX_BUFFERS { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        let mut pending = std::mem::take(&mut self.pending);
        self.write(&mut pending)
    }

    /// Writes data that must be read first, through a buffer.
    fn bounce(&mut self, extent: &Extent) -> Result<()> {
        self.flush()?;
        let mut buffer = vec![0; CHUNK_BYTES];
        chunks(extent.data_len()).try_for_each(|(position, len)| {
            read_data(extent, position, &mut buffer[..len])?;
            self.write(&mut [IoSlice::new(&buffer[..len])])
        })
    }

    fn write(&mut self, mut rest: &mut [IoSlice<'_>]) -> Result<()> {
        while !rest.is_empty() {
            // Within 63 bits: `check_transfer`.
            match pwritev(self.file, rest, self.at as libc::off_t) {
                // No file system answers so to a write of at least a byte; but to ask again might be for ever.
                Ok(0) => return Err(Error::Sys { call: "pwritev of the pages of a list", errno: Errno::EIO }),
                Ok(count) => {
                    self.at += count as u64;
                    IoSlice::advance_slices(&mut rest, count);
                }
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(Error::Sys { call: "pwritev of the pages of a list", errno }),
            }
        }
        Ok(())
    }
}

/// Cuts `len` bytes into chunks: the position and length of each.
fn chunks(len: u64) -> impl Iterator<Item = (u64, usize)> {
    (0..len).step_by(CHUNK_BYTES).map(move |position| (position, (len - position).min(CHUNK_BYTES as u64) as usize))
}
