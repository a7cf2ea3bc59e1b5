//! The library's one error type: what was asked, why it can't be, and which knob turns it.

use std::io::ErrorKind;

use nix::errno::Errno;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use crate::publish::ConnectFault;
use crate::sys::{Features, OpenFailure};
use crate::working_set::fault::WorkingSetFault;

/// The result of a fallible operation of this library.
pub type Result<T> = std::result::Result<T, Error>;

/// Says why an operation was refused; nothing was changed by the call that returned it.
///
/// [`Error::errno`] gives the errno that the kernel design behind this library would have returned.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument breaks a rule (`EINVAL`).
    #[error("{what} is {value}: {rule}")]
    Invalid {
        /// The argument, in words.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The rule that it breaks, with the limit.
        rule: &'static str,
    },
    /// A sum of offsets or lengths does not fit (`EOVERFLOW`).
    #[error("{what} wraps around: {base:#x} + {len:#x}")]
    Overflow {
        /// The range, in words.
        what: &'static str,
        /// Its start.
        base: u64,
        /// Its length.
        len: u64,
    },
    /// The page list already holds pages (`EINVAL`); `unmap` it first.
    #[error("the page list already holds {nr_pages} pages: unmap it before mapping it again")]
    AlreadyMapped {
        /// The pages that it holds.
        nr_pages: u64,
    },
    /// Bytes that a page list would name are not there (`EFAULT`).
    #[error("{what} has no readable bytes at {at:#x}")]
    Fault {
        /// What was to be read.
        what: &'static str,
        /// The address or offset, in bytes, at which it ends or fails.
        at: u64,
    },
    /// A private mapping of shared memory was asked for (`EINVAL`).
    #[error("a private mapping of a vmap is refused: its pages are shared; attach it shared, or copy it")]
    PrivateRefused,
    /// An exact attach does not fit the page list (`ENXIO`).
    #[error("pages {pgoff}..{} are outside a list of {nr_pages} pages: shorten the attach or drop `exact`", pgoff.saturating_add(*len_pages))]
    OutsideList {
        /// The first page asked for.
        pgoff: u64,
        /// The pages asked for.
        len_pages: u64,
        /// The pages in the list.
        nr_pages: u64,
    },
    /// The address asked for is taken (`EEXIST`).
    #[error("{len:#x} bytes at {addr:#x} are not free: choose another address or let the kernel choose")]
    AddressTaken {
        /// The start of the range.
        addr: usize,
        /// Its length in bytes.
        len: usize,
    },
    /// Memory offered as a source lies in a region of an engine (`EINVAL`).
    #[error("the source at {addr:#x} lies in memory that an engine pages in: a fault there would wait for itself")]
    SourceInRegion {
        /// The address of the overlap.
        addr: usize,
    },
    /// The vmap still has areas attached (`EBUSY`).
    #[error("{refcount} areas are still attached")]
    Busy {
        /// The areas that are attached.
        refcount: usize,
    },
    /// Pages that were to be locked are locked by somebody else (`EAGAIN`), or twice in one list (`EINVAL`).
    #[error("page {addr:#x} is {}", if *duplicate { "in the list twice: a list with aliases can't be locked" } else { "locked by another: wait for it or try again" })]
    PageLocked {
        /// The address of the first page in conflict.
        addr: usize,
        /// The conflict is within the list itself.
        duplicate: bool,
    },
    /// The page list is shared, so that its pages may not be changed in place (`EBUSY`).
    #[error("the page list is shared by a clone or a vmap: its pages can't be changed in place")]
    Shared,
    /// A page of the list can't be had: a hole, past the end, revoked, or its source failed (`EFAULT`).
    #[error("page {pgoff} can't be had: {why}")]
    NoPage {
        /// The page.
        pgoff: u64,
        /// The cause.
        why: String,
    },
    /// The engine was shut down (`ESHUTDOWN`).
    #[error("the engine was shut down")]
    Shutdown,
    /// Only the process that created the engine can do this (`EPERM`).
    #[error("{what} is only possible in the process that created the engine")]
    NotOwner {
        /// The operation.
        what: &'static str,
    },
    /// The area did not survive into this process (`ENXIO`).
    #[error("this process did not inherit the engine's memory: {why}")]
    NotInherited {
        /// The cause.
        why: String,
    },
    /// A thread of the engine asked for something that only that thread could answer (`EDEADLK`).
    #[error("{what} from the engine's own {thread} thread would wait for itself")]
    WouldDeadlock {
        /// The operation.
        what: &'static str,
        /// The thread.
        thread: &'static str,
    },
    /// No way to open a userfaultfd succeeded; each attempt and its remedy is listed.
    #[error(transparent)]
    Open(#[from] OpenFailure),
    /// A system call failed.
    #[error("{call}: {errno}{}", knob(*errno))]
    Sys {
        /// The call and what it was for.
        call: &'static str,
        /// Its errno.
        errno: Errno,
    },
    /// Memory that is to be locked can't be (`ENOMEM`, `EPERM` or `EAGAIN`, as the kernel says).
    #[error("{len} bytes can't be locked in memory: {errno} ({})", lock_knob(*limit, *errno))]
    MemoryLock {
        /// The length in bytes of what was to be locked.
        len: usize,
        /// The RLIMIT_MEMLOCK of the process in bytes, for all that it locks; `u64::MAX` stands for no limit.
        limit: u64,
        /// The kernel's errno.
        errno: Errno,
    },
    /// The kernel lacks a feature of userfaultfd, or the engine was built to do without it (`EOPNOTSUPP`).
    #[error("{what} needs the userfaultfd feature {missing}{}: {why}", since(*missing))]
    Unsupported {
        /// What was asked for.
        what: &'static str,
        /// The features that are not there.
        missing: Features,
        /// What they would be needed for.
        why: &'static str,
    },
    /// Some pages that were to be populated can't be had (`ENOMEM`); all others are there.
    #[error("{missing} of {wanted} pages can't be had, the first is page {pgoff}: {why}")]
    NotPopulated {
        /// The first page of the list that can't be had.
        pgoff: u64,
        /// Why that one can't.
        why: String,
        /// The pages that can't be had.
        missing: u64,
        /// The pages that were asked for.
        wanted: u64,
    },
    /// An argument is not a multiple of what a vmap of huge pages needs (`EINVAL`).
    #[error("{what} is {value}: with the huge pages of this vmap it must be a multiple of {multiple}")]
    Misaligned {
        /// The argument, in words.
        what: &'static str,
        /// Its value.
        value: u64,
        /// What it must be a multiple of.
        multiple: u64,
    },
    /// Huge pages can't be had: the pool is too small (`ENOMEM`), or the kernel has none of that size (`ENODEV`, `ENOSYS`,
    /// `EINVAL`).
    #[error("huge pages of {bytes} bytes can't be had, {needed} of them: {errno} ({})", pool_knob(*bytes, *free, *errno))]
    HugePages {
        /// The size of one in bytes.
        bytes: usize,
        /// How many are needed.
        needed: u64,
        /// How many were free, and promised to nobody, a moment later.
        free: u64,
        /// The kernel's errno.
        errno: Errno,
    },
    /// A working set, or the file of one, can't be used: it is damaged or something else (`EBADMSG`), or of another image
    /// (`ESTALE`).
    #[error("the working set can't be used: {0}")]
    WorkingSet(#[from] WorkingSetFault),
    /// Pages of a region could not be put together to a huge page (`EBUSY`, `EAGAIN`, `ENOMEM` or `EINVAL`, as the kernel says).
    #[error("the pages from byte {offset} of the region on can't be one huge page: {errno} ({}); others were made: {made}", collapse_knob(*errno))]
    NotCollapsed {
        /// The byte of the region at which the first of them begins.
        offset: usize,
        /// The kernel's errno.
        errno: Errno,
        /// The huge pages that were made.
        made: usize,
    },
    /// No published vmap could be had at a socket.
    #[error("{path}: {fault}")]
    NotConnected {
        /// The path of the socket.
        path: String,
        /// What stands in the way.
        fault: ConnectFault,
    },
    /// What pages were to come from, or to be written to, is of no use.
    #[error("{name}: {fault}: {why}")]
    Source {
        /// The file, the object or the image, as the caller named it.
        name: String,
        /// What is the matter with it.
        fault: SourceFault,
        /// The details, and the knob if there is one.
        why: String,
    },
}

/// Says what is the matter with something that pages were to come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SourceFault {
    /// There is no such file or object (`ENOENT`).
    NotFound,
    /// It may not be read, or no credentials were found (`EACCES`).
    Denied,
    /// It holds no byte (`ENODATA`).
    Empty,
    /// It is not of the format that it was opened as (`EINVAL`).
    NotThatFormat,
    /// It is damaged: truncated, or a checksum or a length in it is wrong (`EBADMSG`).
    Corrupt,
    /// It asks for more memory than the library lends to one source (`EFBIG`).
    TooLarge,
    /// It can't do what was asked for (`EOPNOTSUPP`).
    Unsupported,
    /// It did not answer in time (`ETIMEDOUT`).
    TimedOut,
    /// Reading or writing failed with this errno.
    Io(Errno),
}

impl SourceFault {
    /// Returns the errno that stands for this fault.
    fn errno(self) -> Errno {
        match self {
            SourceFault::NotFound => Errno::ENOENT,
            SourceFault::Denied => Errno::EACCES,
            SourceFault::Empty => Errno::ENODATA,
            SourceFault::NotThatFormat => Errno::EINVAL,
            SourceFault::Corrupt => Errno::EBADMSG,
            SourceFault::TooLarge => Errno::EFBIG,
            SourceFault::Unsupported => Errno::EOPNOTSUPP,
            SourceFault::TimedOut => Errno::ETIMEDOUT,
            SourceFault::Io(errno) => errno,
        }
    }

    /// Classifies an error of reading or writing.
    pub(crate) fn of_io(error: &std::io::Error) -> SourceFault {
        match error.kind() {
            ErrorKind::NotFound => SourceFault::NotFound,
            ErrorKind::PermissionDenied => SourceFault::Denied,
            ErrorKind::TimedOut => SourceFault::TimedOut,
            ErrorKind::InvalidData | ErrorKind::UnexpectedEof => SourceFault::Corrupt,
            _ => SourceFault::Io(error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)),
        }
    }
}

impl std::fmt::Display for SourceFault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            SourceFault::NotFound => "not found",
            SourceFault::Denied => "access denied",
            SourceFault::Empty => "empty",
            SourceFault::NotThatFormat => "not of that format",
            SourceFault::Corrupt => "damaged",
            SourceFault::TooLarge => "too large",
            SourceFault::Unsupported => "not supported",
            SourceFault::TimedOut => "no answer in time",
            SourceFault::Io(errno) => errno.desc(),
        })
    }
}

/// What stands in the way of a transparent huge page.
fn collapse_knob(errno: Errno) -> &'static str {
    match errno {
        Errno::EBUSY => "some of them are missing: bring them first; or the memory cgroup is full",
        Errno::EAGAIN => "some of them are in use: try again",
        Errno::ENOMEM => "no huge page is free: memory is short or in pieces, see /proc/sys/vm/compact_memory",
        _ => {
            "all are missing, or they lie otherwise in memory than in the list: attach at a multiple of the huge page's size"
        }
    }
}

/// The knob of the pool of huge pages.
fn pool_knob(bytes: usize, free: u64, errno: Errno) -> String {
    let pool = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", bytes / 1024);
    if errno == Errno::ENOMEM {
        format!(
            "{free} are free: raise {pool}/nr_hugepages, for the default size also the sysctl vm.nr_hugepages, or \
             nr_overcommit_hugepages beside it; a limit of the hugetlb controller refuses alike"
        )
    } else {
        format!("{pool} is there where the kernel has them")
    }
}

/// The knob of the errnos of mlock2.
fn lock_knob(limit: u64, errno: Errno) -> String {
    if errno == Errno::ENOSYS {
        return "mlock2 comes with Linux 4.4".into();
    }
    let limit = if limit == RLIM_INFINITY { "without limit".into() } else { format!("{limit} bytes in all") };
    format!(
        "RLIMIT_MEMLOCK is {limit}: raise it, `ulimit -l`, grant CAP_IPC_LOCK, or let the vmap be swapped, `Residency`"
    )
}

/// The Linux versions that brought features, as a suffix of their names.
fn since(features: Features) -> String {
    features.named().map(|known| format!(", of Linux {}", known.since)).collect()
}

/// The knob that usually mends an errno, as a suffix of a message.
fn knob(errno: Errno) -> &'static str {
    match errno {
        Errno::EMFILE => " (raise RLIMIT_NOFILE, `ulimit -n`)",
        Errno::ENFILE => " (raise the sysctl fs.file-max)",
        Errno::EFBIG => " (raise RLIMIT_FSIZE, `ulimit -f`)",
        Errno::ENOMEM => {
            " (memory, RLIMIT_AS, RLIMIT_MEMLOCK `ulimit -l`, or the sysctl vm.max_map_count are the usual limits)"
        }
        _ => "",
    }
}

impl Error {
    /// Returns the errno that stands for this error.
    pub fn errno(&self) -> Errno {
        match self {
            Error::Invalid { .. }
            | Error::AlreadyMapped { .. }
            | Error::PrivateRefused
            | Error::SourceInRegion { .. }
            | Error::Misaligned { .. }
            | Error::PageLocked { duplicate: true, .. } => Errno::EINVAL,
            Error::Overflow { .. } => Errno::EOVERFLOW,
            Error::Fault { .. } | Error::NoPage { .. } => Errno::EFAULT,
            Error::OutsideList { .. } | Error::NotInherited { .. } => Errno::ENXIO,
            Error::AddressTaken { .. } => Errno::EEXIST,
            Error::Busy { .. } | Error::Shared => Errno::EBUSY,
            Error::PageLocked { .. } => Errno::EAGAIN,
            Error::Shutdown => Errno::ESHUTDOWN,
            Error::NotOwner { .. } => Errno::EPERM,
            Error::WouldDeadlock { .. } => Errno::EDEADLK,
            Error::Open(failure) => failure.errno(),
            Error::Sys { errno, .. }
            | Error::MemoryLock { errno, .. }
            | Error::HugePages { errno, .. }
            | Error::NotCollapsed { errno, .. } => *errno,
            Error::Unsupported { .. } => Errno::EOPNOTSUPP,
            Error::NotPopulated { .. } => Errno::ENOMEM,
            Error::WorkingSet(fault) => match fault {
                WorkingSetFault::PageSize { .. }
                | WorkingSetFault::OtherLength { .. }
                | WorkingSetFault::OtherImage => Errno::ESTALE,
                _ => Errno::EBADMSG,
            },
            Error::NotConnected { fault, .. } => fault.errno(),
            Error::Source { fault, .. } => fault.errno(),
        }
    }

    /// Builds the error of `len` bytes that can't be locked.
    pub(crate) fn memory_lock(len: usize, errno: Errno) -> Error {
        let limit = getrlimit(Resource::RLIMIT_MEMLOCK).map_or(RLIM_INFINITY, |(soft, _)| soft);
        Error::MemoryLock { len, limit, errno }
    }

    /// Builds the error of a failed system call.
    pub(crate) fn sys(call: &'static str) -> impl Fn(Errno) -> Error {
        move |errno| Error::Sys { call, errno }
    }

    /// Builds the error of something that pages were to come from, when reading or writing it failed.
    pub(crate) fn source_io(name: &str, error: &std::io::Error) -> Error {
        Error::Source { name: name.into(), fault: SourceFault::of_io(error), why: error.to_string() }
    }

    /// Builds the error of a failed system call that the standard library made.
    pub(crate) fn io(call: &'static str) -> impl Fn(std::io::Error) -> Error {
        move |error| Error::Sys { call, errno: error.raw_os_error().map_or(Errno::EIO, Errno::from_raw) }
    }
}
