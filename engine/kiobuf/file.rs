//! A file that a page list reads: what may be mapped of it, and reading it with or without waiting.

use std::fs::{File, Metadata};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::outcome::{ReadFailure, TryRead};
use crate::error::{Error, Result};

/// The ioctl that asks a block device for its bytes: `stat` says zero for one.
const BLKGETSIZE64: libc::Ioctl = nix::request_code_read!(0x12, 114, size_of::<usize>()) as libc::Ioctl;
#[cfg(all(target_arch = "x86_64", target_pointer_width = "64"))]
const _: () = assert!(BLKGETSIZE64 == 0x8008_1272);

/// A readable file of our own descriptor.
pub(super) struct PagedFile {
    file: File,
    /// The file system knows `RWF_NOWAIT`; cleared by the first `EOPNOTSUPP`, so that it costs one call only.
    nowait: AtomicBool,
}

impl PagedFile {
    /// Duplicates `file` after checking that the bytes of `range` can be read from it now.
    pub(super) fn open(file: &File, range: &Range<u64>) -> Result<Self> {
        let flags = check_open_for_reading(file)?;
        // Its reads need buffers and lengths aligned to the device's blocks, which a part of a page is not.
        if flags.contains(OFlag::O_DIRECT) {
            return Err(invalid_file("the file's open mode", flags.bits() as u64, "it must not be open with O_DIRECT"));
        }
        let size = readable_bytes(file)?;
        if range.start > range.end {
            return Err(Error::Invalid {
                what: "the start of the file range",
                value: range.start,
                rule: "it must not be after its end",
            });
        }
        if range.end > size {
            return Err(Error::Fault { what: "the file", at: size });
        }
        let file = file.try_clone().map_err(Error::io("dup of a file to map"))?;
        Ok(Self { file, nowait: AtomicBool::new(true) })
    }

    /// The descriptor.
    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// What the file system says of it now.
    pub(super) fn metadata(&self) -> Result<Metadata> {
        self.file.metadata().map_err(Error::io("fstat of a file of a list"))
    }

    /// Reads bytes that the page cache holds; never waits for a disk.
    pub(super) fn try_read(&self, at: u64, buf: &mut [u8]) -> TryRead {
        let Ok(at) = libc::off_t::try_from(at) else { return TryRead::Failed(Errno::EOVERFLOW) };
        if !self.nowait.load(Ordering::Relaxed) {
            return TryRead::WouldBlock;
        }
        let iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
        // SAFETY: `iov` names exactly the bytes of `buf`, which is borrowed mutably for the length of the call, and the
        // one element that `iovcnt` says is `iov` itself.
        let count = unsafe { libc::preadv2(self.file.as_raw_fd(), &raw const iov, 1, at, libc::RWF_NOWAIT) };
        match Errno::result(count) {
            Ok(count) if count as usize == buf.len() => TryRead::Done,
            // A short count may be the end of the page cache's knowledge or the end of the file: a read that waits tells.
            Ok(_) | Err(Errno::EAGAIN | Errno::EINTR) => TryRead::WouldBlock,
            // ENOSYS from sandboxes that filter the call.
            Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => {
                self.nowait.store(false, Ordering::Relaxed);
                TryRead::WouldBlock
            }
            Err(errno) => TryRead::Failed(errno),
        }
    }

    /// Reads bytes, waiting for them if need be; a file that ends before them is a failure.
    pub(super) fn read(&self, at: u64, buf: &mut [u8]) -> std::result::Result<(), ReadFailure> {
        let mut done = 0;
        while done < buf.len() {
            let from = at + done as u64;
            match self.file.read_at(&mut buf[done..], from) {
                Ok(0) => return Err(ReadFailure::Gone { at: from }),
                Ok(count) => done += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(ReadFailure::from_io("pread of a mapped file", error)),
            }
        }
        Ok(())
    }
}

/// Refuses a descriptor that can't be read from; returns its flags.
pub(crate) fn check_open_for_reading(file: &File) -> Result<OFlag> {
    let flags = fcntl(file, FcntlArg::F_GETFL).map_err(Error::sys("fcntl(F_GETFL) of a file to map"))?;
    let flags = OFlag::from_bits_retain(flags);
    if flags.contains(OFlag::O_PATH) || flags & OFlag::O_ACCMODE == OFlag::O_WRONLY {
        return Err(invalid_file("the file's open mode", flags.bits() as u64, "it must be open for reading"));
    }
    Ok(flags)
}

/// Returns the bytes that a regular file or a block device holds.
pub(crate) fn readable_bytes(file: &File) -> Result<u64> {
    let meta = file.metadata().map_err(Error::io("fstat of a file to map"))?;
    if meta.is_file() {
        return Ok(meta.len());
    }
    if !meta.file_type().is_block_device() {
        let format = u64::from(meta.mode() & libc::S_IFMT);
        return Err(invalid_file("the file's type (S_IFMT)", format, "it must be a regular file or a block device"));
    }
    let mut bytes = 0u64;
    // SAFETY: BLKGETSIZE64 (asserted above) writes one u64, the kernel's type for it on every architecture, to the
    // address given, which is that of `bytes`.
    let answer = unsafe { libc::ioctl(file.as_raw_fd(), BLKGETSIZE64, &raw mut bytes) };
    Errno::result(answer).map_err(Error::sys("ioctl(BLKGETSIZE64) of a block device to map"))?;
    Ok(bytes)
}

fn invalid_file(what: &'static str, value: u64, rule: &'static str) -> Error {
    Error::Invalid { what, value, rule }
}
