//! What an ioctl that installs pages did: one conversion of errno and count, for all of them.

use nix::errno::Errno;

/// Says how far a resolving ioctl came: `bytes` were installed from its start on, then it stopped for `stop`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Install {
    /// Bytes installed, from the start of the range on.
    pub(crate) bytes: usize,
    /// Why the rest was not done; `None` when all of it was.
    pub(crate) stop: Option<Stop>,
}

/// Says why a resolving ioctl stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// The first page is there already (`EEXIST`). Its waiters may still sleep: wake them.
    Present,
    /// Try the rest again (`EAGAIN`).
    ///
    /// Without progress, the address space is being changed (an unmap, remap, remove or fork event is unread, or its
    /// thread has not run on yet): read and apply events first. *With* progress it is any reason whatever, because the
    /// kernel reports EAGAIN for every partial success; the next page being present is the usual one. The retry of the
    /// rest tells.
    Changing,
    /// Nothing registered is mapped there any more (`ENOENT`).
    Unmapped,
    /// The address space is gone: its process exited or called exec (`ESRCH`).
    Gone,
    /// The bytes can't be had (`EFAULT`): COPY's source is unreadable, the destination lies past the end of its file,
    /// or CONTINUE met a hole.
    BadSource,
    /// No memory (`ENOMEM`).
    NoMemory,
    /// Anything else: a page that is pinned or in use elsewhere (`EBUSY`), a full hugetlb pool (`ENOSPC`), a bad
    /// argument (`EINVAL`: alignment, length, or an ioctl that the memory does not support).
    Other(Errno),
}

impl std::fmt::Display for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Stop::Present => "it is present",
            Stop::Changing => "the address space is changing",
            Stop::Unmapped => "it is not mapped",
            Stop::Gone => "the process is gone",
            Stop::BadSource => "its bytes can't be read (EFAULT)",
            Stop::NoMemory => "the kernel has no memory for it (ENOMEM)",
            Stop::Other(errno) => return errno.fmt(f),
        })
    }
}

impl Stop {
    /// Gives an errno its meaning.
    fn from_errno(errno: Errno) -> Stop {
        match errno {
            Errno::EEXIST => Stop::Present,
            Errno::EAGAIN => Stop::Changing,
            Errno::ENOENT => Stop::Unmapped,
            Errno::ESRCH => Stop::Gone,
            Errno::EFAULT => Stop::BadSource,
            Errno::ENOMEM => Stop::NoMemory,
            other => Stop::Other(other),
        }
    }
}

impl Install {
    /// Converts what the kernel answered to a request for `len` bytes.
    ///
    /// `count` is the signed field that the kernel writes (`copy`, `zeropage`, `mapped`, `updated`). It is progress
    /// only when it lies in `1..=len` *and* the ioctl succeeded or said EAGAIN, which is how the kernel reports a
    /// partial success. Otherwise it repeats the errno as a negative number, or is untouched, and is ignored.
    #[inline]
    pub(super) fn from_kernel(answer: Result<(), Errno>, count: i64, len: usize) -> Install {
        if answer == Ok(()) && usize::try_from(count) == Ok(len) && len > 0 {
            return Install { bytes: len, stop: None };
        }
        Install::in_part(answer, count, len)
    }

    /// As [`Install::from_kernel`], where not all was done.
    #[cold]
    fn in_part(answer: Result<(), Errno>, count: i64, len: usize) -> Install {
        let progress = usize::try_from(count).ok().filter(|bytes| (1..=len).contains(bytes));
        match (answer, progress) {
            (Ok(()) | Err(Errno::EAGAIN), Some(bytes)) if bytes == len => Install { bytes, stop: None },
            (Ok(()) | Err(Errno::EAGAIN), Some(bytes)) => Install { bytes, stop: Some(Stop::Changing) },
            (Err(errno), _) => Install { bytes: 0, stop: Some(Stop::from_errno(errno)) },
            // Success without progress: no kernel does that. A negative number can only be an errno; anything else
            // breaks the protocol, and counting it as done would leave a page missing.
            (Ok(()), None) => {
                let errno = i32::try_from(-i128::from(count)).ok().filter(|errno| *errno > 0);
                Install {
                    bytes: 0,
                    stop: Some(errno.map_or(Stop::Other(Errno::EPROTO), |e| Stop::from_errno(Errno::from_raw(e)))),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 4096;

    /// T69: each errno with each kind of count; −EAGAIN is never taken for progress.
    #[test]
    fn every_errno_and_count_has_one_meaning() {
        let errnos = [
            (Errno::EEXIST, Stop::Present),
            (Errno::EAGAIN, Stop::Changing),
            (Errno::ENOENT, Stop::Unmapped),
            (Errno::ESRCH, Stop::Gone),
            (Errno::EFAULT, Stop::BadSource),
            (Errno::ENOMEM, Stop::NoMemory),
            (Errno::EINVAL, Stop::Other(Errno::EINVAL)),
            (Errno::EBUSY, Stop::Other(Errno::EBUSY)),
            (Errno::ENOSPC, Stop::Other(Errno::ENOSPC)),
            (Errno::EPERM, Stop::Other(Errno::EPERM)),
            (Errno::EINTR, Stop::Other(Errno::EINTR)),
            (Errno::EIO, Stop::Other(Errno::EIO)),
        ];
        let len = 4 * PAGE;
        let over = len as i64 + 1;
        for (errno, stop) in errnos {
            let nothing = Install { bytes: 0, stop: Some(stop) };
            // Negative (its own errno, another's, the extremes), untouched, and more than was asked for.
            for count in [-(errno as i64), -11, -17, i64::MIN, -1, 0, over, i64::MAX] {
                assert_eq!(Install::from_kernel(Err(errno), count, len), nothing, "{errno} with {count}");
            }
            // Partial and full counts are progress with EAGAIN only.
            for count in [PAGE, len - PAGE] {
                let bytes = if errno == Errno::EAGAIN { count } else { 0 };
                let expected = Install { bytes, stop: Some(stop) };
                assert_eq!(Install::from_kernel(Err(errno), count as i64, len), expected, "{errno} with {count}");
            }
            let full = if errno == Errno::EAGAIN { Install { bytes: len, stop: None } } else { nothing };
            assert_eq!(Install::from_kernel(Err(errno), len as i64, len), full, "{errno} with all");
        }
    }

    /// T69: success is believed only with a count that bears it out.
    #[test]
    fn success_needs_a_full_count() {
        let len = 4 * PAGE;
        let table = [
            (len as i64, Install { bytes: len, stop: None }),
            (PAGE as i64, Install { bytes: PAGE, stop: Some(Stop::Changing) }),
            (0, Install { bytes: 0, stop: Some(Stop::Other(Errno::EPROTO)) }),
            (len as i64 + 1, Install { bytes: 0, stop: Some(Stop::Other(Errno::EPROTO)) }),
            (i64::MAX, Install { bytes: 0, stop: Some(Stop::Other(Errno::EPROTO)) }),
            (i64::MIN, Install { bytes: 0, stop: Some(Stop::Other(Errno::EPROTO)) }),
            (-11, Install { bytes: 0, stop: Some(Stop::Changing) }),
            (-17, Install { bytes: 0, stop: Some(Stop::Present) }),
            (-3, Install { bytes: 0, stop: Some(Stop::Gone) }),
        ];
        for (count, expected) in table {
            assert_eq!(Install::from_kernel(Ok(()), count, len), expected, "success with {count}");
        }
    }
}
