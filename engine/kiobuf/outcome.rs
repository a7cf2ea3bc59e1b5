//! What became of reading pages.

use nix::errno::Errno;

use crate::error::Error;

/// What an attempt to read without waiting came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TryRead {
    /// The buffer holds the pages.
    Done,
    /// Only a thread that may wait can tell.
    WouldBlock,
    /// The pages can't be had.
    Failed(Errno),
}

/// Says why pages could not be read. What the buffer holds then is not a page.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadFailure {
    /// The bytes were there when the list was built.
    #[error("no bytes at {at:#x} any more: the file was truncated")]
    Gone {
        /// The offset in the file, or the address in a mapped file.
        at: u64,
    },
    /// A system call failed.
    #[error("{call}: {errno}")]
    Sys {
        /// The call and what it was for.
        call: &'static str,
        /// Its errno.
        errno: Errno,
    },
    /// The page source answered with an error.
    #[error("the page source failed at byte {offset_bytes}: {error}")]
    Source {
        /// The offset that it was asked for.
        offset_bytes: u64,
        /// Its answer.
        error: std::io::Error,
    },
    /// The pages asked for are a hole, past the end, or not of one extent.
    #[error("{len_bytes} bytes from page {first} on are not readable pages of one extent")]
    NotPages {
        /// The first page.
        first: u64,
        /// The length of the buffer.
        len_bytes: usize,
    },
}

impl ReadFailure {
    /// Returns the errno that stands for this failure.
    pub(crate) fn errno(&self) -> Errno {
        match self {
            ReadFailure::Gone { .. } | ReadFailure::NotPages { .. } => Errno::EFAULT,
            ReadFailure::Sys { errno, .. } => *errno,
            ReadFailure::Source { error, .. } => error.raw_os_error().map_or(Errno::EIO, Errno::from_raw),
        }
    }

    /// Builds the failure of a system call that the standard library made.
    pub(super) fn from_io(call: &'static str, error: std::io::Error) -> Self {
        ReadFailure::Sys { call, errno: error.raw_os_error().map_or(Errno::EIO, Errno::from_raw) }
    }
}

impl From<ReadFailure> for Error {
    fn from(failure: ReadFailure) -> Self {
        match failure {
            ReadFailure::Gone { at } => Error::Fault { what: "a file of the page list", at },
            ReadFailure::Sys { call, errno } => Error::Sys { call, errno },
            ReadFailure::Source { .. } => Error::Sys { call: "PageSource::read_at", errno: failure.errno() },
            ReadFailure::NotPages { first, .. } => Error::NoPage { pgoff: first, why: failure.to_string() },
        }
    }
}
