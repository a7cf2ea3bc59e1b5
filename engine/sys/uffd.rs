//! One userfaultfd: registering ranges, reading messages, installing pages.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use libc::c_void;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use userfaultfd::{RegisterMode, Uffd};

use super::uapi::{self, UffdioContinue, UffdioCopy, UffdioPoison, UffdioWriteprotect, UffdioZeropage};
use super::{Install, Ioctls, Message, MsgBuffer, Stop};
use crate::page::page_size;

/// An open userfaultfd, of this process or of another; it is closed when dropped.
///
/// Closing the last descriptor of a registered range gives zero pages to its waiting and later faults.
#[derive(Debug)]
pub(crate) struct Userfault {
    uffd: Uffd,
}

/// Says whether the address space behind a userfaultfd is still there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Liveness {
    /// It is there.
    Alive,
    /// Its process exited or called exec: no ioctl will ever succeed again.
    Gone,
    /// It is there, and an event of it is unread or just being finished.
    Changing,
}

/// The page that [`Userfault::liveness`] asks about: 1 MiB.
///
/// The kernel checks an address before it looks for the process, so it has to lie above `vm.mmap_min_addr` (64 KiB
/// unless set otherwise; above 1 MiB the answer would always be [`Liveness::Alive`]) and below every architecture's
/// limit. Programs that are not position-independent start at
/// 4 MiB and all else lies far higher, so nothing is mapped there. If something were, the answer would be the same, as
/// long as nobody has registered it for write protection.
const PROBE_ADDR: u64 = 0x10_0000;

/// The mode of COPY and ZEROPAGE in which nobody is woken (`UFFDIO_COPY_MODE_DONTWAKE`, and the same for the other).
const DONT_WAKE: u64 = 1;

/// The sizes of huge pages that vmaps consist of.
const HUGE_BYTES: [usize; 2] = [2 << 20, 1 << 30];

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}

impl AsRawFd for Userfault {
    fn as_raw_fd(&self) -> RawFd {
        self.uffd.as_raw_fd()
    }
}

impl From<Uffd> for Userfault {
    fn from(uffd: Uffd) -> Userfault {
        Userfault { uffd }
    }
}

/// Takes a descriptor that is known to be a userfaultfd; on any other, every method answers with an errno.
///
/// One that was received from elsewhere must be given to [`Userfault::set_nonblocking_cloexec`] before it is read.
impl From<OwnedFd> for Userfault {
    fn from(fd: OwnedFd) -> Userfault {
        // SAFETY: the descriptor is open and owned by `fd`, which gives it up here.
        Userfault { uffd: unsafe { Uffd::from_raw_fd(fd.into_raw_fd()) } }
    }
}

impl Userfault {
    /// Makes the descriptor non-blocking and closed on exec, and verifies both.
    ///
    /// poll(2) on a *blocking* userfaultfd answers POLLERR, and a read of one would stop its reader for good.
    pub(crate) fn set_nonblocking_cloexec(&self) -> Result<(), Errno> {
        let status = OFlag::from_bits_retain(fcntl(self, FcntlArg::F_GETFL)?);
        fcntl(self, FcntlArg::F_SETFL(status | OFlag::O_NONBLOCK))?;
        let flags = FdFlag::from_bits_retain(fcntl(self, FcntlArg::F_GETFD)?);
        fcntl(self, FcntlArg::F_SETFD(flags | FdFlag::FD_CLOEXEC))?;

        let status = OFlag::from_bits_retain(fcntl(self, FcntlArg::F_GETFL)?);
        let flags = FdFlag::from_bits_retain(fcntl(self, FcntlArg::F_GETFD)?);
        if status.contains(OFlag::O_NONBLOCK) && flags.contains(FdFlag::FD_CLOEXEC) {
            Ok(())
        } else {
            Err(Errno::ENOTSUP)
        }
    }

    /// Registers a range for faults on missing pages; returns the ioctls that it answers to.
    ///
    /// EBUSY: another userfaultfd has it. EPERM: shared memory without write permission on its file. EINVAL: not whole
    /// pages, not mapped, or memory of a kind that can't be registered. ENOMEM: also a process that is gone.
    pub(crate) fn register_missing(&self, start: usize, len: usize) -> Result<Ioctls, Errno> {
        let ioctls = self.uffd.register(start as *mut c_void, len).map_err(errno_of)?;
        Ok(Ioctls::from_bits(ioctls.bits()))
    }

    /// As [`register_missing`](Userfault::register_missing), and for *minor faults*: on pages that the file holds and that are
    /// not mapped (Linux 5.14). The kernel then maps none of them by itself, and no neighbours of one either.
    pub(crate) fn register_missing_and_minor(&self, start: usize, len: usize) -> Result<Ioctls, Errno> {
        let mode = RegisterMode::MISSING | RegisterMode::MINOR;
        let ioctls = self.uffd.register_with_mode(start as *mut c_void, len, mode).map_err(errno_of)?;
        Ok(Ioctls::from_bits(ioctls.bits()))
    }

    /// Ends the registration of a range, of which the kernel then reports nothing any more, not even its unmapping.
    ///
    /// The kernel wakes its waiters, which then read zero pages: hide the range first, or answer what is outstanding.
    pub(crate) fn unregister(&self, start: usize, len: usize) -> Result<(), Errno> {
        self.uffd.unregister(start as *mut c_void, len).map_err(errno_of)
    }

    /// Reads what has come, passes each message on, and returns their number: 0 when there was none.
    ///
    /// Does not allocate, and does not wait. EMFILE: a fork event is next and there is no descriptor left for the
    /// child; the event stays, and its fork keeps waiting. EPROTO: a message of an unknown kind; all others of the
    /// same batch were passed on.
    pub(crate) fn read(&self, buf: &mut MsgBuffer, mut each: impl FnMut(Message)) -> Result<usize, Errno> {
        loop {
            let events = match self.uffd.read_events(&mut buf.0).map_err(errno_of) {
                Ok(events) => events,
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno),
            };
            // A fork's descriptor exists since the read and is owned by the event once decoded: decode them all.
            let mut count = 0;
            let mut unknown = Ok(());
            for event in events {
                match event {
                    Ok(event) => {
                        count += 1;
                        each(Message::from(event));
                    }
                    Err(error) => unknown = Err(errno_of(error)),
                }
            }
            return unknown.map(|()| count);
        }
    }

    /// Installs copies of `len` bytes at `src`, and wakes whoever waits there.
    ///
    /// # Safety
    ///
    /// No reference of this process may cover `dst..dst + len` while its bytes come into being, and nobody may write to
    /// the source meanwhile if the copy is to be whole. An unreadable source is not unsafe: it is
    /// [`Stop::BadSource`].
    pub(crate) unsafe fn copy(&self, dst: usize, src: *const u8, len: usize) -> Install {
        // SAFETY: the caller's promise.
        unsafe { self.copy_as(dst, src, len, 0) }
    }

    /// As [`copy`](Userfault::copy), but wakes nobody.
    ///
    /// # Safety
    ///
    /// As for [`copy`](Userfault::copy).
    pub(crate) unsafe fn copy_unheard(&self, dst: usize, src: *const u8, len: usize) -> Install {
        // SAFETY: the caller's promise.
        unsafe { self.copy_as(dst, src, len, DONT_WAKE) }
    }

    unsafe fn copy_as(&self, dst: usize, src: *const u8, len: usize, mode: u64) -> Install {
        let mut request =
            UffdioCopy { dst: dst as u64, src: src.expose_provenance() as u64, len: len as u64, mode, copy: 0 };
        // SAFETY: the kernel checks that `src` is readable and fills only pages of `dst` that are not there; that no
        // reference covers them is the caller's promise.
        let answer = unsafe { uapi::ioctl(self.as_fd(), &mut request) };
        Install::from_kernel(answer, request.copy, len)
    }

    /// Installs zero pages, and wakes whoever waits there.
    pub(crate) fn zeropage(&self, dst: usize, len: usize) -> Install {
        self.zeropage_as(dst, len, 0)
    }

    /// As [`zeropage`](Userfault::zeropage), but wakes nobody.
    pub(crate) fn zeropage_unheard(&self, dst: usize, len: usize) -> Install {
        self.zeropage_as(dst, len, DONT_WAKE)
    }

    fn zeropage_as(&self, dst: usize, len: usize, mode: u64) -> Install {
        let mut request = UffdioZeropage { start: dst as u64, len: len as u64, mode, zeropage: 0 };
        // SAFETY: the kernel fills only pages that are not there, with the zeros that unregistered memory would show.
        let answer = unsafe { uapi::ioctl(self.as_fd(), &mut request) };
        Install::from_kernel(answer, request.zeropage, len)
    }

    /// Makes pages that are not there raise SIGBUS, and wakes whoever waits there (Linux 6.6).
    ///
    /// It holds in this address space only, and until [`copy`](Userfault::copy) or
    /// [`continue`](Userfault::continue) heals the page.
    pub(crate) fn poison(&self, dst: usize, len: usize) -> Install {
        let mut request = UffdioPoison { start: dst as u64, len: len as u64, mode: 0, updated: 0 };
        // SAFETY: the kernel marks only pages that are not there; an access of one is a signal, never other bytes.
        let answer = unsafe { uapi::ioctl(self.as_fd(), &mut request) };
        Install::from_kernel(answer, request.updated, len)
    }

    /// As [`poison`](Userfault::poison), for the one page at `dst`, of whatever size: a huge page begins there, as the
    /// kernel reports the address of its fault, and is refused unless it is named as a whole.
    pub(crate) fn poison_page(&self, dst: usize) -> Install {
        let mut install = self.poison(dst, page_size());
        for len in HUGE_BYTES {
            if install.stop != Some(Stop::Other(Errno::EINVAL)) {
                break;
            }
            install = self.poison(dst, len);
        }
        install
    }

    /// Maps pages that are in the page cache, and wakes whoever waits there (Linux 5.13).
    pub(crate) fn r#continue(&self, dst: usize, len: usize) -> Install {
        let mut request = UffdioContinue { start: dst as u64, len: len as u64, mode: 0, mapped: 0 };
        // SAFETY: the kernel maps only the file's own pages, at the offset at which the file is mapped already.
        let answer = unsafe { uapi::ioctl(self.as_fd(), &mut request) };
        Install::from_kernel(answer, request.mapped, len)
    }

    /// Wakes every thread that waits in a range; they access their page again.
    pub(crate) fn wake(&self, start: usize, len: usize) -> Result<(), Errno> {
        self.uffd.wake(start as *mut c_void, len).map_err(errno_of)
    }

    /// Asks whether the address space is still there; cheap, and changes nothing.
    ///
    /// Lifting the write protection of a page that nobody registered fails with ENOENT in an address space that exists,
    /// with ESRCH in one that does not, and with EAGAIN while it is being changed. Only ESRCH proves death: any other
    /// answer counts as life.
    pub(crate) fn liveness(&self) -> Liveness {
        let mut request = UffdioWriteprotect { start: PROBE_ADDR, len: page_size() as u64, mode: 0 };
        // SAFETY: the request changes no bytes; at most it lifts a write protection and so causes a fault less.
        match unsafe { uapi::ioctl(self.as_fd(), &mut request) } {
            Err(Errno::ESRCH) => Liveness::Gone,
            Err(Errno::EAGAIN) => Liveness::Changing,
            _ => Liveness::Alive,
        }
    }
}

/// Takes the errno out of an error of the crate, whose `Errno` is that of an older nix.
fn errno_of(error: userfaultfd::Error) -> Errno {
    match error {
        userfaultfd::Error::SystemError(errno) => Errno::from_raw(errno as i32),
        userfaultfd::Error::UnrecognizedEvent(_) => Errno::EPROTO,
        // Part of a message, or an end of file: neither comes from a userfaultfd.
        _ => Errno::EIO,
    }
}

#[cfg(test)]
mod tests;
