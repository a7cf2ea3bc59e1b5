//! What the library must know about the process that it runs in: how forks are kept away, which descriptors a child
//! must not keep, what is mapped.

pub(crate) mod ledger;
pub(crate) mod mapping;
pub(crate) mod maps;
pub(crate) mod mask;

use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError};

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::signal::Signal;

use crate::{Error, Result};

/// Held for reading by whoever holds, for a moment, a lock that a child needs, or changes what a child inherits;
/// for writing over a fork.
static GATE: RwLock<()> = RwLock::new(());
/// How many forks lie between this process and the first that used this library.
static DEPTH: AtomicU32 = AtomicU32::new(0);

/// Tells processes apart: a child's depth is its parent's plus one.
pub(crate) fn depth() -> u32 {
    DEPTH.load(Ordering::Relaxed)
}

/// In a forked child: it is one deeper.
pub(crate) fn descend() {
    DEPTH.fetch_add(1, Ordering::Relaxed);
}

/// Keeps forks away. Held while waiting for the fault-handling thread at the most, which never takes it; not while code
/// of the application runs, and not twice by one thread.
pub(crate) fn gate() -> RwLockReadGuard<'static, ()> {
    GATE.read().unwrap_or_else(PoisonError::into_inner)
}

/// As [`gate`], but never waits: `None` while a fork is under way or about to be.
pub(crate) fn try_gate() -> Option<RwLockReadGuard<'static, ()>> {
    match GATE.try_read() {
        Ok(gate) => Some(gate),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

/// Waits until no thread keeps forks away, and lets none until dropped: taken before a child's areas are listed, so that
/// an attach or a detach is either in the list or after the fork.
pub(crate) fn close_gate() -> RwLockWriteGuard<'static, ()> {
    GATE.write().unwrap_or_else(PoisonError::into_inner)
}

/// Makes a memfd that can be sealed. It is not executable, as a system may demand (the sysctl `vm.memfd_noexec`).
pub(crate) fn new_memfd(name: &CStr) -> Result<OwnedFd> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    // The crate does not name the last flag.
    match memfd_create(name, flags | MFdFlags::from_bits_retain(libc::MFD_NOEXEC_SEAL)) {
        // Before Linux 6.3 there is neither the flag nor the demand.
        Err(Errno::EINVAL) => memfd_create(name, flags),
        other => other,
    }
    .map_err(Error::sys("memfd_create"))
}

/// As [`new_memfd`], of so many bytes.
pub(crate) fn sized_memfd(name: &CStr, bytes: usize) -> Result<OwnedFd> {
    let memfd = new_memfd(name)?;
    size_memfd(memfd.as_fd(), bytes as u64)?;
    Ok(memfd)
}

/// Sets the size of a memfd.
///
/// # Errors
///
/// [`Error::Sys`], with `EFBIG` for more than a file can have, or than RLIMIT_FSIZE allows.
pub(crate) fn size_memfd(memfd: BorrowedFd<'_>, bytes: u64) -> Result<()> {
    let failed = Error::sys("sizing a memfd");
    // The kernel answers a size beyond the limit by SIGXFSZ, whose default is the end of the process.
    let (limit, _) = getrlimit(Resource::RLIMIT_FSIZE).map_err(Error::sys("getrlimit(RLIMIT_FSIZE)"))?;
    match i64::try_from(bytes) {
        Ok(size) if bytes <= limit => nix::unistd::ftruncate(memfd, size).map_err(failed),
        _ => Err(failed(Errno::EFBIG)),
    }
}

/// Tells the id of a pidfd's process as `/proc` has it here; the process itself may know another, in a namespace of its
/// own.
pub(crate) fn pid_of(pidfd: BorrowedFd<'_>) -> Option<libc::pid_t> {
    let fdinfo = std::fs::read_to_string(format!("/proc/thread-self/fdinfo/{}", pidfd.as_raw_fd())).ok()?;
    let pid: libc::pid_t = fdinfo.lines().find_map(|line| line.strip_prefix("Pid:"))?.trim().parse().ok()?;
    // 0: of a namespace that is not seen from here; -1: gone.
    (pid > 0).then_some(pid)
}

/// Opens a pidfd: readable when the process has exited.
pub(crate) fn open_pidfd(pid: libc::pid_t) -> Result<OwnedFd> {
    // SAFETY: a plain system call; the descriptor that it returns is new and close-on-exec.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    match Errno::result(fd) {
        // SAFETY: as above: nobody else owns it.
        Ok(fd) => Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) }),
        Err(errno) => Err(Error::sys("pidfd_open (Linux 5.3)")(errno)),
    }
}

/// Sends a signal to a process by its pidfd; `None` only asks whether that is allowed.
///
/// EPERM: it is not. ESRCH: it has ended.
pub(crate) fn signal_by(pidfd: BorrowedFd<'_>, signal: Option<Signal>) -> std::result::Result<(), Errno> {
    let number = signal.map_or(0, |signal| signal as libc::c_int);
    // SAFETY: pidfd_send_signal(2) reads no memory without a siginfo.
    let sent = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), number, std::ptr::null::<libc::siginfo_t>(), 0)
    };
    Errno::result(sent).map(drop)
}
