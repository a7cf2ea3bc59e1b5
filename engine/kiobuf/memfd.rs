//! A memfd, or another file of tmpfs, as a part of a list: what may be one, and whether a whole list is one run of it.

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::statfs::{HUGETLBFS_MAGIC, TMPFS_MAGIC, fstatfs};

use super::Kiobuf;
use super::extent::Base;
use super::file::PagedFile;
use crate::error::{Error, Result};
use crate::page::page_size;
use crate::process::mask::FAR_BYTES;

/// Pages of a memfd, which can be read like any file's.
#[derive(Clone)]
pub(super) struct Memfd {
    pub(super) file: Arc<PagedFile>,
    /// Its device and inode.
    id: (u64, u64),
    /// The byte of the file at which the pages begin, on a page boundary.
    pub(super) at: u64,
}

/// One run of a memfd that a whole list is.
pub(crate) struct MemfdRun {
    pub(crate) memfd: OwnedFd,
    /// The byte of the memfd at which page 0 of the list lies.
    pub(crate) offset: u64,
}

impl Memfd {
    /// Takes the bytes of `range` of a memfd, after checking that they can be mapped shared.
    pub(super) fn open(file: &File, range: &Range<u64>) -> Result<Self> {
        let invalid = |what, value, rule| Err(Error::Invalid { what, value, rule });
        let flags = fcntl(file, FcntlArg::F_GETFL).map_err(Error::sys("fcntl(F_GETFL) of a memfd to map"))?;
        let flags = OFlag::from_bits_retain(flags);
        let is_writable = flags & OFlag::O_ACCMODE == OFlag::O_RDWR && !flags.contains(OFlag::O_PATH);
        if !is_writable || flags.contains(OFlag::O_APPEND) {
            return invalid(
                "the memfd's open mode",
                flags.bits() as u64,
                "it must be open for reading and writing, without O_APPEND: its pages are mapped shared; map_file takes others",
            );
        }
        let paged = PagedFile::open(file, range)?;
        let meta = file.metadata().map_err(Error::io("fstat of a memfd to map"))?;
        let kind = fstatfs(file).map_err(Error::sys("fstatfs of a memfd to map"))?.filesystem_type();
        let magic = kind.0 as u64;
        if kind == HUGETLBFS_MAGIC {
            return invalid(
                "the memfd's file system",
                magic,
                "it must be tmpfs: huge pages have no part that is a page",
            );
        }
        if kind != TMPFS_MAGIC || !meta.is_file() {
            return invalid(
                "the memfd's file system",
                magic,
                "it must be tmpfs, as a memfd's is; map_file takes others",
            );
        }
        refuse_unwritable(seals_of(file)?)?;
        let page = page_size() as u64;
        if !range.start.is_multiple_of(page) {
            return invalid(
                "the start of the range of the memfd",
                range.start,
                "it must be a multiple of the page size",
            );
        }
        if !range.end.is_multiple_of(page) && range.end != meta.len() {
            return invalid(
                "the end of the range of the memfd",
                range.end,
                "it must be a multiple of the page size, or the end of the memfd",
            );
        }
        Ok(Self { file: Arc::new(paged), id: (meta.dev(), meta.ino()), at: range.start })
    }
}

impl Memfd {
    /// Returns the same pages without the first `bytes`.
    pub(super) fn skip(&self, bytes: u64) -> Memfd {
        Memfd { at: self.at + bytes, ..self.clone() }
    }
}

/// The seals of a file; one that has none can't have any.
fn seals_of(file: impl AsFd) -> Result<SealFlag> {
    match fcntl(file, FcntlArg::F_GET_SEALS) {
        Ok(seals) => Ok(SealFlag::from_bits_retain(seals)),
        Err(Errno::EINVAL) => Ok(SealFlag::F_SEAL_SEAL),
        Err(errno) => Err(Error::sys("fcntl(F_GET_SEALS) of a memfd")(errno)),
    }
}

/// Refuses a memfd that is sealed against writing: it can't be mapped shared so that a userfaultfd may fill it.
fn refuse_unwritable(seals: SealFlag) -> Result<()> {
    if !seals.intersects(SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_FUTURE_WRITE) {
        return Ok(());
    }
    Err(Error::Invalid {
        what: "the memfd's seals (F_GET_SEALS)",
        value: seals.bits() as u64,
        rule: "it must not be sealed against writing: its pages are mapped shared; map_file takes others",
    })
}

impl Kiobuf {
    /// Returns the run of a memfd that the list is, if its pages can be shown by mapping that memfd, with SIGBUS past
    /// the end of the list whatever becomes of the mapping and of the memfd.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] names what stands in the way.
    pub(crate) fn memfd_run(&self) -> Result<MemfdRun> {
        let invalid = |what, value, rule| Err(Error::Invalid { what, value, rule });
        let mut run: Option<(&Memfd, u64)> = None;
        for extent in &self.inner.extents {
            let Base::Memfd(memfd) = &extent.base else {
                return invalid(
                    "the extent at page",
                    extent.first_page,
                    "it is not a memfd's: only a memfd is shown itself",
                );
            };
            let end = memfd.at + extent.data_len();
            match &mut run {
                None => run = Some((memfd, end)),
                Some((first, so_far)) if first.id == memfd.id && *so_far == memfd.at => *so_far = end,
                Some(_) => {
                    return invalid(
                        "the extent at page",
                        extent.first_page,
                        "it does not go on where the one before ends in the same memfd: a mapping shows a file in order",
                    );
                }
            }
        }
        let Some((memfd, end)) = run else {
            return invalid("the number of pages of the list", 0, "a list that is shown itself has at least one");
        };
        let file = memfd.file.as_fd();
        // The seals first: a memfd that is sealed has the size that is looked at then.
        let seals = seals_of(file)?;
        // Perhaps since it was mapped.
        refuse_unwritable(seals)?;
        let size = nix::sys::stat::fstat(file).map_err(Error::sys("fstat of a memfd"))?.st_size as u64;
        if end != size {
            return invalid(
                "the end of the list in its memfd in bytes",
                end,
                "it must be the memfd's end: a region that is longer than the list, or that mremap grows, would show more",
            );
        }
        if !size.is_multiple_of(page_size() as u64) || size > FAR_BYTES as u64 {
            return invalid(
                "the memfd's size in bytes",
                size,
                "it must be a multiple of the page size, and at most 2^62, to be shown itself",
            );
        }
        if !seals.contains(SealFlag::F_SEAL_GROW) {
            return invalid(
                "the memfd's seals (F_GET_SEALS)",
                seals.bits() as u64,
                "F_SEAL_GROW must be one: what the memfd grows by would be shown past the end of the list",
            );
        }
        let memfd_fd = file.try_clone_to_owned().map_err(Error::io("dup of a memfd"))?;
        Ok(MemfdRun { memfd: memfd_fd, offset: memfd.at })
    }
}
