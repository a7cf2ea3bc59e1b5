//! Orders to mask pages of a forked child, where the kernel has no UFFDIO_POISON: nobody can map anything in another
//! process, so the engine tells the child's guard, over a socket beside the lifeline.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};

use crate::process::ledger::{self, Private};
use crate::{Error, Result};

/// Makes the socket: the engine's end, which the child sends away, and the guard's.
pub(crate) fn pair() -> Result<(OwnedFd, Private<OwnedFd>)> {
    let mut ledger = ledger::lock();
    let (engine_end, guard_end) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
        .map_err(Error::sys("socketpair for orders to mask pages"))?;
    Ok((engine_end, ledger.adopt(guard_end)))
}

/// Orders the page at `addr` to be masked. Neither waits nor allocates.
///
/// # Errors
///
/// `EAGAIN` when too many orders wait; anything else when the child is gone.
pub(crate) fn order(socket: BorrowedFd<'_>, addr: usize) -> std::result::Result<(), Errno> {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    match send(socket.as_raw_fd(), &addr.to_ne_bytes(), flags) {
        // Want of buffers passes too.
        Err(Errno::ENOBUFS | Errno::ENOMEM | Errno::EINTR) => Err(Errno::EAGAIN),
        other => other.map(drop),
    }
}

/// Takes the next order, if there is one.
pub(crate) fn next(socket: BorrowedFd<'_>) -> Option<usize> {
    let mut bytes = [0; size_of::<usize>()];
    match recv(socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT) {
        Ok(n) if n == bytes.len() => Some(usize::from_ne_bytes(bytes)),
        _ => None,
    }
}
