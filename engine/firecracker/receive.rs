//! A message from a socket: its pieces put together, its descriptor kept, all others left to the kernel.

use std::io::{self, BufReader, ErrorKind, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use libc::{SCM_RIGHTS, SOL_SOCKET, c_void};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::message::{self, Unreadable};
use super::{Handshake, HandshakeFault, Limits, Refused};
use crate::publish::discard;

/// Bytes that are asked for at once.
const PIECE_BYTES: usize = 4096;
/// Room for one descriptor, in bytes: without the padding, which would be room for a second. The kernel drops the others without
/// asking their file systems, which a close here would do.
// SAFETY: a pure computation.
const CONTROL_BYTES: usize = unsafe { libc::CMSG_LEN(size_of::<RawFd>() as u32) } as usize;
/// That room in words, as what describes a descriptor must be aligned.
const CONTROL_WORDS: usize = CONTROL_BYTES.div_ceil(size_of::<u64>());

pub(super) fn receive(socket: &UnixStream, deadline: Instant, limits: &Limits) -> Result<Handshake, Refused> {
    let limit = limits.message_bytes;
    let incoming = Incoming { socket, deadline, limit, received: 0, descriptor: None, fault: None };
    let mut pieces = BufReader::with_capacity(PIECE_BYTES, incoming);
    let parsed = message::parse_front(&mut pieces, limits);
    let trailing = !message::is_blank(pieces.buffer());
    let Incoming { received, descriptor, fault, .. } = pieces.into_inner();
    let parsed = match parsed {
        Ok(_) if trailing => Err(HandshakeFault::Trailing),
        Ok(regions) => Ok(regions),
        Err(Unreadable::Fault(fault)) => Err(fault),
        // What failed is the socket, not the parser.
        Err(Unreadable::Json(error)) => Err(match fault {
            Some(fault) => fault,
            None if error.is_eof() => HandshakeFault::HungUp { received },
            None => message::not_one(&error),
        }),
    };
    match (parsed, descriptor) {
        (Ok(regions), Some(uffd)) => Ok(Handshake { regions, uffd }),
        (Ok(_), None) => Err(Refused { fault: HandshakeFault::NoDescriptor, uffd: None }),
        (Err(fault), uffd) => Err(Refused { fault, uffd }),
    }
}

/// What comes from a socket until a deadline, and no more than so many bytes.
struct Incoming<'a> {
    socket: &'a UnixStream,
    deadline: Instant,
    limit: usize,
    received: usize,
    /// The first that came with the first bytes.
    descriptor: Option<OwnedFd>,
    /// Why nothing more comes, if that was said by an error.
    fault: Option<HandshakeFault>,
}

impl Read for Incoming<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.next(buf).map_err(|fault| {
            self.fault = Some(fault);
            // Of a kind that nobody tries again.
            ErrorKind::Other.into()
        })
    }
}

impl Incoming<'_> {
    /// Waits for the next bytes; 0 when there are none.
    fn next(&mut self, buf: &mut [u8]) -> Result<usize, HandshakeFault> {
        let room = self.limit - self.received;
        if room == 0 {
            return Err(HandshakeFault::TooLong { limit: self.limit });
        }
        let len = buf.len().min(room);
        let bytes = loop {
            self.wait()?;
            match receive_piece(self.socket, &mut buf[..len], self.received == 0) {
                // Somebody else has read it, or a signal came.
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(Errno::ECONNRESET | Errno::EPIPE) => {
                    return Err(HandshakeFault::HungUp { received: self.received });
                }
                Err(errno) => return Err(HandshakeFault::Sys { call: "recvmsg of a message", errno }),
                Ok(piece) => break self.take(piece)?,
            }
        };
        self.received += bytes;
        Ok(bytes)
    }

    /// Keeps the descriptor of the first piece, if it is a userfaultfd.
    fn take(&mut self, piece: Piece) -> Result<usize, HandshakeFault> {
        if self.received == 0 && piece.bytes > 0 {
            // Nothing that comes later can mend what is wrong with it.
            let missing = if piece.is_cut { HandshakeFault::NoRoom } else { HandshakeFault::NoDescriptor };
            let descriptor = piece.descriptor.ok_or(missing)?;
            let found = name_of(&descriptor);
            if found != "anon_inode:[userfaultfd]" {
                discard(descriptor);
                return Err(HandshakeFault::NoUserfaultfd { found });
            }
            self.descriptor = Some(descriptor);
        }
        Ok(piece.bytes)
    }

    /// Waits until there is something to read, or the end.
    fn wait(&self) -> Result<(), HandshakeFault> {
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(HandshakeFault::TimedOut { received: self.received });
            }
            // Rounded up: a wait that ends before its time is followed by another.
            let left = PollTimeout::try_from(left.as_millis().saturating_add(1)).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)], left) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(HandshakeFault::Sys { call: "poll of a socket", errno }),
            }
        }
    }
}

/// What `/proc` calls a descriptor, or why it doesn't. The file's own file system is not asked.
fn name_of(fd: &OwnedFd) -> String {
    let link = nix::fcntl::readlink(format!("/proc/thread-self/fd/{}", fd.as_raw_fd()).as_str());
    link.map_or_else(|errno| errno.to_string(), |name| name.to_string_lossy().into_owned())
}

/// What one call received.
struct Piece {
    bytes: usize,
    descriptor: Option<OwnedFd>,
    /// There was no room for all descriptors that came, or for none.
    is_cut: bool,
}

/// Receives what is there, without waiting, with the first of its descriptors if that is wanted.
fn receive_piece(socket: &UnixStream, buf: &mut [u8], wants_descriptor: bool) -> Result<Piece, Errno> {
    let mut control = [0u64; CONTROL_WORDS];
    let mut part = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    // SAFETY: all zeros are a valid msghdr: one without a name, a buffer or control data.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    if wants_descriptor {
        header.msg_control = control.as_mut_ptr().cast::<c_void>();
        header.msg_controllen = CONTROL_BYTES;
    }
    let flags = libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT;
    // SAFETY: the header names buffers that outlive the call, with their lengths.
    let bytes = Errno::result(unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags) })?;

    // SAFETY: the kernel has filled the control buffer and said how much of it is used; the macro stays within that.
    let first = unsafe { libc::CMSG_FIRSTHDR(&raw const header) };
    let mut descriptor = None;
    if !first.is_null() {
        // SAFETY: as above: a whole header of a control message lies there.
        let (level, kind, len) = unsafe { ((*first).cmsg_level, (*first).cmsg_type, (*first).cmsg_len) };
        if (level, kind) == (SOL_SOCKET, SCM_RIGHTS) && len >= CONTROL_BYTES {
            // SAFETY: the message's data are a descriptor, aligned as it likes, and there is room for no other; the kernel has just
            // put it into this process's table, and nobody else knows it.
            descriptor = Some(unsafe { OwnedFd::from_raw_fd(libc::CMSG_DATA(first).cast::<RawFd>().read_unaligned()) });
        }
    }
    Ok(Piece { bytes: bytes as usize, descriptor, is_cut: header.msg_flags & libc::MSG_CTRUNC != 0 })
}
