//! Composing pages that can't be copied as they lie: from files, sources, mapped files, and pages with slack.

use std::io::IoSliceMut;

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

use super::Kiobuf;
use super::extent::{Base, Extent};
use super::memfd::Memfd;
use super::nopage::extent_at;
use super::outcome::{ReadFailure, TryRead};
use crate::page::page_size;

impl Kiobuf {
    /// Fills `buf` with the pages from `first` on, all of one extent, unless that would wait.
    ///
    /// Makes at most one system call, which does not wait; takes no lock and allocates nothing.
    pub(crate) fn try_read_pages(&self, first: u64, buf: &mut [u8]) -> TryRead {
        let Some(extent) = self.extent_of(first, buf.len()) else {
            return TryRead::Failed(Errno::EFAULT);
        };
        let (position, data) = extent.zero_slack(first, buf);
        match &extent.base {
            Base::File { file, at } | Base::Memfd(Memfd { file, at, .. }) => file.try_read(at + position, data),
            Base::Mmap { .. } | Base::Source { .. } => TryRead::WouldBlock,
            Base::Memory(_) | Base::Zero | Base::Hole => match read_data(extent, position, data) {
                Ok(()) => TryRead::Done,
                Err(failure) => TryRead::Failed(failure.errno()),
            },
        }
    }

    /// Fills `buf` with the pages from `first` on, all of one extent; may wait for a disk or a page source.
    ///
    /// A page source is called on this thread: a panic of it unwinds through here.
    pub(crate) fn read_pages(&self, first: u64, buf: &mut [u8]) -> Result<(), ReadFailure> {
        let Some(extent) = self.extent_of(first, buf.len()) else {
            return Err(ReadFailure::NotPages { first, len_bytes: buf.len() });
        };
        let (position, data) = extent.zero_slack(first, buf);
        read_data(extent, position, data)
    }

    /// Finds the one extent that holds all the pages which a buffer of `len_bytes` is for.
    fn extent_of(&self, first: u64, len_bytes: usize) -> Option<&Extent> {
        let extent = extent_at(&self.inner.extents, first)?;
        let pages = (len_bytes / page_size()) as u64;
        let fits = len_bytes.is_multiple_of(page_size()) && pages <= extent.pages().end - first;
        (fits && !matches!(extent.base, Base::Hole)).then_some(extent)
    }
}

/// Reads an extent's data from `position` on, which holds at least as much as `buf`.
pub(super) fn read_data(extent: &Extent, position: u64, buf: &mut [u8]) -> Result<(), ReadFailure> {
    if buf.is_empty() {
        return Ok(());
    }
    debug_assert!(position + buf.len() as u64 <= extent.data_len());
    match &extent.base {
        Base::Memory(memory) => {
            // SAFETY: the data is `data_len` bytes of readable memory which the extent's guard keeps and nobody writes,
            // `position..position + buf.len()` is within them (`zero_slack` clamps to it, `write_to` counts to it),
            // and `buf` is borrowed mutably, so that it is none of them.
            unsafe {
                std::ptr::copy_nonoverlapping(memory.as_ptr().add(position as usize), buf.as_mut_ptr(), buf.len());
            }
            Ok(())
        }
        Base::Mmap { map, at } => read_mapped_file(map.as_ptr().addr() + at + position as usize, buf),
        Base::File { file, at } | Base::Memfd(Memfd { file, at, .. }) => file.read(at + position, buf),
        Base::Source(part) => {
            // What a source leaves out must not be what another list's page left in the buffer.
            buf.fill(0);
            let offset_bytes = part.at + position;
            part.source.read_at(offset_bytes, buf).map_err(|error| ReadFailure::Source { offset_bytes, error })
        }
        Base::Zero => {
            buf.fill(0);
            Ok(())
        }
        Base::Hole => Err(ReadFailure::NotPages { first: extent.first_page, len_bytes: buf.len() }),
    }
}

/// Reads a mapped file through the kernel: a page that was truncated away is an EFAULT there, and a SIGBUS here.
fn read_mapped_file(addr: usize, buf: &mut [u8]) -> Result<(), ReadFailure> {
    let mut done = 0;
    while done < buf.len() {
        let from = addr + done;
        let remote = [RemoteIoVec { base: from, len: buf.len() - done }];
        match process_vm_readv(Pid::this(), &mut [IoSliceMut::new(&mut buf[done..])], &remote) {
            Ok(0) | Err(Errno::EFAULT) => return Err(ReadFailure::Gone { at: from as u64 }),
            Ok(count) => done += count,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(ReadFailure::Sys { call: "process_vm_readv of a mapped file", errno }),
        }
    }
    Ok(())
}
