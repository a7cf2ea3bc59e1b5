//! Why a message of a VM's monitor is refused.

use std::os::fd::OwnedFd;

use nix::errno::Errno;

/// Says what is wrong with a message. Regions are counted from 0, in the order of the message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HandshakeFault {
    /// It is no JSON array of regions.
    #[error("the message is no JSON array of regions: {why}")]
    NotOne {
        /// What the parser says.
        why: String,
    },
    /// It is too long.
    #[error("the message has more than {limit} bytes")]
    TooLong {
        /// The limit in bytes.
        limit: usize,
    },
    /// It was not complete in time.
    #[error("the message was not complete in time: {received} bytes had come")]
    TimedOut {
        /// The bytes that had come.
        received: usize,
    },
    /// The peer hung up before the message was complete.
    #[error("the peer hung up in the message, after {received} bytes")]
    HungUp {
        /// The bytes that had come.
        received: usize,
    },
    /// Something follows the array.
    #[error("something follows the array of regions")]
    Trailing,
    /// No descriptor came with its first bytes.
    #[error("no descriptor came with the first bytes of the message")]
    NoDescriptor,
    /// Its descriptor was lost: this process has no room for it.
    #[error("there is no room for the descriptor of the message (raise RLIMIT_NOFILE, `ulimit -n`)")]
    NoRoom,
    /// Its descriptor is something else.
    #[error("the descriptor of the message must be a userfaultfd, and is {found:?}")]
    NoUserfaultfd {
        /// What `/proc/thread-self/fd` calls it, or why that can't be read.
        found: String,
    },
    /// There is no region in it.
    #[error("the array has no region")]
    NoRegions,
    /// There are too many regions in it.
    #[error("the array has {found} regions: {limit} at the most")]
    TooManyRegions {
        /// The regions in it.
        found: usize,
        /// The limit.
        limit: usize,
    },
    /// A region names two page sizes. Both fields hold bytes, also the one whose name says otherwise.
    #[error("region {region} has pages of {page_size} bytes by page_size, and of {page_size_kib} by page_size_kib")]
    TwoPageSizes {
        /// The region.
        region: usize,
        /// The field `page_size`.
        page_size: u64,
        /// The field `page_size_kib`.
        page_size_kib: u64,
    },
    /// There are no pages of that size.
    #[error("region {region} has pages of {bytes} bytes: there are pages of 4096 bytes, 2 MiB and 1 GiB")]
    PageSize {
        /// The region.
        region: usize,
        /// Their size in bytes.
        bytes: u64,
    },
    /// A region has no byte.
    #[error("region {region} is empty")]
    Empty {
        /// The region.
        region: usize,
    },
    /// A region's place or length is no multiple of its pages' size.
    #[error("region {region}: {field} is {value}, no multiple of {multiple}")]
    Misaligned {
        /// The region.
        region: usize,
        /// The field of the message.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What it must be a multiple of.
        multiple: u64,
    },
    /// A region's end is no number.
    #[error("region {region}: {field} wraps around: {base:#x} + {size:#x}")]
    Overflow {
        /// The region.
        region: usize,
        /// The field of the message to which the size is added.
        field: &'static str,
        /// Its value.
        base: u64,
        /// The size in bytes.
        size: u64,
    },
    /// Two regions share addresses.
    #[error("regions {region} and {other} share addresses")]
    Overlap {
        /// The one at lower addresses.
        region: usize,
        /// The other.
        other: usize,
    },
    /// A region reaches beyond the memory file.
    #[error("region {region} ends at byte {end} of a memory file of {memory_bytes}")]
    BeyondFile {
        /// The region.
        region: usize,
        /// Where it ends in the file, in bytes.
        end: u64,
        /// The length of the file in bytes.
        memory_bytes: u64,
    },
    /// A system call failed.
    #[error("{call}: {errno}")]
    Sys {
        /// The call.
        call: &'static str,
        /// Its errno.
        errno: Errno,
    },
}

impl HandshakeFault {
    /// Returns the errno that stands for this fault.
    pub fn errno(&self) -> Errno {
        match self {
            HandshakeFault::TimedOut { .. } => Errno::ETIMEDOUT,
            HandshakeFault::HungUp { .. } => Errno::ECONNRESET,
            HandshakeFault::TooLong { .. } | HandshakeFault::TooManyRegions { .. } => Errno::E2BIG,
            HandshakeFault::NotOne { .. } | HandshakeFault::Trailing | HandshakeFault::NoDescriptor => Errno::EBADMSG,
            HandshakeFault::NoRoom => Errno::EMFILE,
            HandshakeFault::NoRegions
            | HandshakeFault::NoUserfaultfd { .. }
            | HandshakeFault::TwoPageSizes { .. }
            | HandshakeFault::PageSize { .. }
            | HandshakeFault::Empty { .. }
            | HandshakeFault::Misaligned { .. }
            | HandshakeFault::Overlap { .. } => Errno::EINVAL,
            HandshakeFault::Overflow { .. } => Errno::EOVERFLOW,
            HandshakeFault::BeyondFile { .. } => Errno::ENXIO,
            HandshakeFault::Sys { errno, .. } => *errno,
        }
    }
}

/// Says why a message was refused, and holds the descriptor that had come with it.
#[derive(Debug, thiserror::Error)]
#[error("{fault}")]
#[non_exhaustive]
pub struct Refused {
    /// What is wrong.
    pub fault: HandshakeFault,
    /// The userfaultfd that came with the message. Whoever sent it may keep a duplicate, and wait for answers for ever: to have its
    /// missing pages refused, adopt it without an area.
    pub uffd: Option<OwnedFd>,
}
