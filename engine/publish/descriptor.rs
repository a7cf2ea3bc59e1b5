//! Descriptors that came from processes that are not trusted.
//!
//! A descriptor may be of a file system that runs in the sender's own process (FUSE), which answers when it likes: to look at
//! such a file, or only to close it, is to wait for the sender. So a descriptor is first recognised by what `/proc` calls it,
//! which asks nobody, and what is none that was due is closed on a thread for that.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{SockType, getsockopt, sockopt};

use super::outsider::Place;

/// What a descriptor can be due as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Userfaultfd,
    Pidfd,
    /// A local socket that keeps messages apart, as a lifeline is.
    Lifeline,
}

/// Tells what a descriptor is.
pub(super) fn kind_of(fd: &OwnedFd) -> Option<Kind> {
    let name = name_of(fd)?;
    match name.as_str() {
        "anon_inode:[userfaultfd]" => Some(Kind::Userfaultfd),
        name if name == "anon_inode:[pidfd]" || name.starts_with("pidfd:[") => Some(Kind::Pidfd),
        name if name.starts_with("socket:[") => {
            let mut domain: libc::c_int = 0;
            let mut len = size_of_val(&domain) as libc::socklen_t;
            // SAFETY: the kernel writes at most `len` bytes to `domain`.
            let answer = unsafe {
                let value = (&raw mut domain).cast();
                libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_DOMAIN, value, &raw mut len)
            };
            let is_local = answer == 0 && domain == libc::AF_UNIX;
            (is_local && getsockopt(&fd.as_fd(), sockopt::SockType) == Ok(SockType::SeqPacket))
                .then_some(Kind::Lifeline)
        }
        _ => None,
    }
}

/// Tells whether the other end of a socket has hung up.
pub(super) fn has_hung_up(socket: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::new(socket, PollFlags::empty())];
    poll(&mut polled, PollTimeout::ZERO).is_err() || polled[0].any() == Some(true)
}

/// What `/proc` calls it. It does not ask the file system of a file.
fn name_of(fd: &OwnedFd) -> Option<String> {
    let link = nix::fcntl::readlink(format!("/proc/thread-self/fd/{}", fd.as_raw_fd()).as_str()).ok()?;
    link.into_string().ok()
}

/// Threads that close at once. What else is to be closed meanwhile waits until one of them is done.
const CLOSERS_MAX: usize = 16;

/// What is to be closed, and the place that is kept until it is.
type Doomed = (OwnedFd, Option<Arc<Place>>);

/// What waits to be closed, and how many threads close.
struct Closing {
    doomed: Vec<Doomed>,
    nr_closers: usize,
}

static CLOSING: Mutex<Closing> = Mutex::new(Closing { doomed: Vec::new(), nr_closers: 0 });

/// Closes a descriptor of unknown origin, without waiting for whoever made it.
pub(crate) fn discard(fd: OwnedFd) {
    discard_of(fd, None);
}

/// As [`discard`]; who sent it keeps his place among those that may be served until it is closed. So what waits to be closed is
/// bounded by the places.
pub(crate) fn discard_of(fd: OwnedFd, place: Option<Arc<Place>>) {
    if name_of(&fd).is_some_and(|name| name.starts_with("anon_inode:") || name.starts_with("pipe:")) {
        return drop(fd);
    }
    let mut closing = closing();
    closing.doomed.push((fd, place));
    if closing.nr_closers < CLOSERS_MAX {
        closing.nr_closers += 1;
        drop(closing);
        let closer = std::thread::Builder::new().name("kiomap-close".into()).stack_size(64 << 10);
        // Without a thread it waits for the next.
        if closer.spawn(close_all).is_err() {
            self::closing().nr_closers -= 1;
        }
    }
}

fn close_all() {
    loop {
        let mut closing = closing();
        let Some(doomed) = closing.doomed.pop() else {
            closing.nr_closers -= 1;
            return;
        };
        drop(closing);
        drop(doomed);
    }
}

fn closing() -> MutexGuard<'static, Closing> {
    CLOSING.lock().unwrap_or_else(PoisonError::into_inner)
}
