//! Who has connected: its process, as the kernel names it.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::{PeerCredentials, PeerPidfd};

/// The process that has connected.
#[derive(Debug)]
pub(crate) struct Peer {
    /// Counts those that connect.
    pub(crate) number: u64,
    /// 0 where it is of a namespace that this process does not see.
    pub(crate) pid: i32,
    pub(crate) uid: u32,
    /// Readable from its end on.
    pub(crate) pidfd: Option<OwnedFd>,
}

impl Peer {
    /// Asks the kernel who is at the other end of a socket.
    pub(crate) fn of(socket: &UnixStream, number: u64) -> Peer {
        let credentials = getsockopt(socket, PeerCredentials).ok();
        let pid = credentials.map_or(0, |peer| peer.pid());
        // Linux 6.5 knows the process itself. The number alone may by now be another's: one that connected and exited has
        // hung up, and such a socket is not asked about.
        let pidfd = getsockopt(socket, PeerPidfd).ok().or_else(|| {
            let pidfd = (pid > 0).then(|| open_pidfd(pid).ok()).flatten()?;
            (!has_hung_up(socket.as_fd())).then_some(pidfd)
        });
        Peer { number, pid, uid: credentials.map_or(u32::MAX, |peer| peer.uid()), pidfd }
    }
}

fn open_pidfd(pid: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: a plain system call; the descriptor that it returns is new and close-on-exec.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: as above: nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Whether a pidfd says that its process has ended.
pub(crate) fn has_ended(pidfd: BorrowedFd<'_>) -> bool {
    poll(&mut [PollFd::new(pidfd, PollFlags::POLLIN)], PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

fn has_hung_up(socket: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::new(socket, PollFlags::empty())];
    poll(&mut polled, PollTimeout::ZERO).is_ok_and(|_| polled[0].revents().is_some_and(|found| !found.is_empty()))
}

/// Kills the process of a pidfd; one that has ended is dead enough.
pub(crate) fn kill(pidfd: BorrowedFd<'_>) {
    let nobody = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a plain system call on a descriptor that is open.
    unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), libc::SIGKILL, nobody, 0) };
}
