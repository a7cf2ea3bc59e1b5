//! One userfaultfd: registering ranges, reading messages, installing pages.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use libc::c_void;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use userfaultfd::{RegisterMode, Uffd};

use super::message::RawMessage;
use super::uapi::{self, UffdioContinue, UffdioCopy, UffdioPoison, UffdioWriteprotect, UffdioZeropage};
use super::{Features, Install, Ioctls, Message, MsgBuffer, Stop};
use crate::page::page_size;

/// An open userfaultfd, of this process or of another; it is closed when dropped.
///
/// Closing the last descriptor of a registered range gives zero pages to its waiting and later faults.
#[derive(Debug)]
pub(crate) struct Userfault {
    uffd: Uffd,
    reading: Reading,
    /// The last read found nothing.
    found_nothing: AtomicBool,
}

/// How messages are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reading {
    /// By read(2): nobody changes the flags of the descriptor.
    Plain,
    /// Another process has the descriptor too and can make it blocking at any moment: each read says itself that it does not
    /// wait (RWF_NOWAIT, which userfaultfds know since Linux 6.10).
    NoWait,
    /// The same where the kernel does not know that: on an older one, and for one that a fork event has brought (as of Linux 6.18). The
    /// flag is looked at before each read.
    Watched,
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
const PROBE_ADDR: usize = 0x10_0000;

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

/// Takes a descriptor that is known to be a userfaultfd; on any other, every method answers with an errno.
///
/// One that came from a process that is not trusted is taken by [`Userfault::foreign`] instead; one from a forked child must be
/// given to [`Userfault::set_nonblocking_cloexec`] before it is read.
impl From<OwnedFd> for Userfault {
    fn from(fd: OwnedFd) -> Userfault {
        // SAFETY: the descriptor is open and owned by `fd`, which gives it up here.
        let uffd = unsafe { Uffd::from_raw_fd(fd.into_raw_fd()) };
        Userfault { uffd, reading: Reading::Plain, found_nothing: AtomicBool::new(true) }
    }
}

impl Userfault {
    /// Takes a descriptor that another process made and may keep, whoever that is ([`Userfault::distrust`]).
    ///
    /// # Errors
    ///
    /// As there.
    #[allow(dead_code, reason = "one that is private to a process is taken by its parts")]
    pub(crate) fn foreign(fd: OwnedFd) -> Result<Userfault, Errno> {
        let mut userfault = Userfault::from(fd);
        userfault.distrust().map(|()| userfault)
    }

    /// Makes sure that it is a userfaultfd that has done its handshake, and that no read of it ever waits, whatever its maker
    /// does to its flags.
    ///
    /// # Errors
    ///
    /// `EBADF`: it is something else. `EPROTO`: it has not done its handshake. `ENOTSUP`: it can't be made non-blocking.
    /// What `/proc` answers, where it can't be read.
    pub(crate) fn distrust(&mut self) -> Result<(), Errno> {
        let link = nix::fcntl::readlink(format!("/proc/thread-self/fd/{}", self.as_raw_fd()).as_str())?;
        if link != "anon_inode:[userfaultfd]" {
            return Err(Errno::EBADF);
        }
        self.set_nonblocking_cloexec()?;
        // Before its handshake it is nothing but an error to poll(2).
        let mut state = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        poll(&mut state, PollTimeout::ZERO)?;
        if state[0].revents().is_none_or(|events| events.intersects(PollFlags::POLLERR | PollFlags::POLLNVAL)) {
            return Err(Errno::EPROTO);
        }
        self.read_as_foreign();
        Ok(())
    }

    /// The userfaultfd that a fork event has brought. The kernel made it with the flags that its parent's was *made* with: if
    /// that is a foreign one, this must go through [`Userfault::set_nonblocking_cloexec`].
    pub(super) fn of_child(&self, fd: OwnedFd) -> Userfault {
        let mut child = Userfault::from(fd);
        if self.reading != Reading::Plain {
            child.read_as_foreign();
        }
        child
    }

    /// Sees to it that no read of it waits, whatever others do to its flags.
    fn read_as_foreign(&mut self) {
        self.reading = if self.knows_nowait() { Reading::NoWait } else { Reading::Watched };
    }

    /// Returns the features that were asked for in its handshake.
    ///
    /// # Errors
    ///
    /// What `/proc` answers, where it can't be read; `EPROTO` where it does not say them.
    pub(crate) fn features(&self) -> Result<Features, Errno> {
        /// The kernel's own mark of a handshake that was done.
        const INITIALIZED: Features = Features::from_bits(1 << 31);
        let path = format!("/proc/thread-self/fdinfo/{}", self.as_raw_fd());
        let text =
            std::fs::read_to_string(path).map_err(|error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw))?;
        // "API:", the version, the features, the ioctls.
        let features = text.lines().find_map(|line| line.strip_prefix("API:")?.trim().split(':').nth(1));
        let bits = features.and_then(|bits| u64::from_str_radix(bits, 16).ok()).ok_or(Errno::EPROTO)?;
        Ok(Features::from_bits(bits).difference(INITIALIZED))
    }

    /// Tells whether it can be read by RWF_NOWAIT. A read with no room for a message is refused for its size if so, before
    /// anything is taken out.
    fn knows_nowait(&self) -> bool {
        let mut no_room = [0_u8; 1];
        self.read_nowait(no_room.as_mut_ptr().cast(), no_room.len()) == Err(Errno::EINVAL)
    }

    /// Reads into `len` bytes without waiting.
    fn read_nowait(&self, bytes: *mut c_void, len: usize) -> Result<usize, Errno> {
        let slice = libc::iovec { iov_base: bytes, iov_len: len };
        // SAFETY: the callers own the `len` bytes, into which the kernel writes; of messages, any bytes are valid.
        let read = unsafe { libc::preadv2(self.as_raw_fd(), &raw const slice, 1, -1, libc::RWF_NOWAIT) };
        Errno::result(read).map(|read| read as usize)
    }

    /// Reads messages, as it is read.
    fn read_raw(&self, messages: &mut [RawMessage]) -> Result<usize, Errno> {
        let (bytes, len) = (messages.as_mut_ptr().cast::<c_void>(), size_of_val(messages));
        let read = match self.reading {
            Reading::Plain => {
                // SAFETY: the `len` bytes are messages of ours, of which any bytes are valid.
                Errno::result(unsafe { libc::read(self.as_raw_fd(), bytes, len) }).map(|read| read as usize)
            }
            Reading::NoWait => self.read_nowait(bytes, len),
            Reading::Watched => self.unblock().and_then(|()| {
                // SAFETY: as above.
                Errno::result(unsafe { libc::read(self.as_raw_fd(), bytes, len) }).map(|read| read as usize)
            }),
        };
        match read {
            Ok(read) if read % RawMessage::BYTES == 0 => {
                if self.reading == Reading::NoWait {
                    self.found_nothing.store(false, Ordering::Relaxed);
                }
                Ok(read / RawMessage::BYTES)
            }
            // Part of a message does not come from a userfaultfd.
            Ok(_) => Err(Errno::EIO),
            Err(Errno::EAGAIN) => {
                // A blocking one would go on to be reported as broken, with nothing to read. Who has just read something looks
                // again before that: only a second look in vain may follow such a report.
                if self.reading == Reading::NoWait && self.found_nothing.swap(true, Ordering::Relaxed) {
                    self.unblock()?;
                }
                Ok(0)
            }
            Err(errno) => Err(errno),
        }
    }

    /// Makes it non-blocking if its other holder has made it blocking.
    fn unblock(&self) -> Result<(), Errno> {
        let status = OFlag::from_bits_retain(fcntl(self, FcntlArg::F_GETFL)?);
        if status.contains(OFlag::O_NONBLOCK) {
            return Ok(());
        }
        fcntl(self, FcntlArg::F_SETFL(status | OFlag::O_NONBLOCK)).map(drop)
    }

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
        let count = loop {
            match self.read_raw(&mut buf.0) {
                Err(Errno::EINTR) => {}
                read => break read?,
            }
        };
        // A fork's descriptor exists since the read and is owned by the message once decoded: decode them all.
        let (mut known, mut unknown) = (0, Ok(()));
        for raw in &buf.0[..count] {
            match Message::decode(raw, self) {
                Ok(message) => {
                    known += 1;
                    each(message);
                }
                Err(errno) => unknown = Err(errno),
            }
        }
        unknown.map(|()| known)
    }

    /// As [`read`](Userfault::read), one message.
    #[inline]
    pub(crate) fn read_one(&self, buf: &mut MsgBuffer) -> Result<Option<Message>, Errno> {
        let buf = &mut buf.0[..1];
        loop {
            match self.read_raw(buf) {
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
                Ok(0) => return Ok(None),
                Ok(_) => return Message::decode(&buf[0], self).map(Some),
            }
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
        let mut request =
            UffdioCopy { dst: dst as u64, src: src.expose_provenance() as u64, len: len as u64, mode: 0, copy: 0 };
        // SAFETY: the kernel checks that `src` is readable and fills only pages of `dst` that are not there; that no
        // reference covers them is the caller's promise.
        let answer = unsafe { uapi::ioctl(self.as_fd(), &mut request) };
        Install::from_kernel(answer, request.copy, len)
    }

    /// Installs zero pages, and wakes whoever waits there.
    pub(crate) fn zeropage(&self, dst: usize, len: usize) -> Install {
        let mut request = UffdioZeropage { start: dst as u64, len: len as u64, mode: 0, zeropage: 0 };
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

    /// Lets pages be written to that were protected through it, and wakes whoever waits to.
    pub(crate) fn unprotect(&self, start: usize, len: usize) -> Result<(), Errno> {
        let mut request = UffdioWriteprotect { start: start as u64, len: len as u64, mode: 0 };
        // SAFETY: the request changes no bytes; it lifts a protection that only causes faults.
        unsafe { uapi::ioctl(self.as_fd(), &mut request) }
    }

    /// Asks whether the address space is still there; cheap, and changes nothing.
    ///
    /// Lifting the write protection of a page that nobody registered fails with ENOENT in an address space that exists,
    /// with ESRCH in one that does not, and with EAGAIN while it is being changed. Only ESRCH proves death: any other
    /// answer counts as life.
    pub(crate) fn liveness(&self) -> Liveness {
        match self.unprotect(PROBE_ADDR, page_size()) {
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
        // Those are errors of reading, which is not done by the crate.
        _ => Errno::EIO,
    }
}

#[cfg(test)]
mod tests;
