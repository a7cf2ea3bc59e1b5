//! What a userfaultfd reports: the kernel's `struct uffd_msg`, turned at the place of reading into a type of our own.
//!
//! The crate `userfaultfd` decodes the same, but reads by read(2) only, which may wait where the descriptor is
//! somebody else's too.

use std::os::fd::{FromRawFd, OwnedFd};

use nix::errno::Errno;

use super::Userfault;

/// `struct uffd_msg`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RawMessage {
    event: u8,
    reserved: [u8; 7],
    args: [u64; 3],
}

impl RawMessage {
    pub(super) const BYTES: usize = size_of::<RawMessage>();
}

const _: () = assert!(RawMessage::BYTES == 32 && std::mem::offset_of!(RawMessage, args) == 8);

/// The kinds of messages, as `<linux/userfaultfd.h>` numbers them.
mod event {
    pub(super) const PAGEFAULT: u8 = 0x12;
    pub(super) const FORK: u8 = 0x13;
    pub(super) const REMAP: u8 = 0x14;
    pub(super) const REMOVE: u8 = 0x15;
    pub(super) const UNMAP: u8 = 0x16;
}

/// Flags of a fault: a write; of a page that is protected; of one that is not mapped.
const WRITE: u64 = 1 << 0;
const WRITE_PROTECTED: u64 = 1 << 1;
const MINOR: u64 = 1 << 2;

/// A buffer for messages, allocated once so that reading never allocates.
pub(crate) struct MsgBuffer(pub(super) Vec<RawMessage>);

impl MsgBuffer {
    /// Makes room for `messages` messages, at least one.
    pub(crate) fn new(messages: usize) -> MsgBuffer {
        MsgBuffer(vec![RawMessage::default(); messages.max(1)])
    }
}

/// One message.
#[derive(Debug)]
pub(crate) enum Message {
    /// A thread waits for a page.
    Fault {
        /// The start of the page, or the exact address under `EXACT_ADDRESS`.
        addr: usize,
        /// The access was a write.
        write: bool,
        /// Why the page could not be accessed.
        kind: FaultKind,
        /// The thread, as the process's own namespace numbers it; 0 without `THREAD_ID`.
        tid: i32,
    },
    /// The process forked; this serves the child. Dropping it makes the child read zero pages.
    Fork(Userfault),
    /// `len` bytes moved; what `from` held is at `to`.
    Remap {
        /// The old start.
        from: usize,
        /// The new start.
        to: usize,
        /// The length *before* the move, in bytes.
        len: usize,
    },
    /// Pages were given up by madvise; the range stays mapped.
    Remove {
        /// Its first byte.
        start: usize,
        /// The byte after its last.
        end: usize,
    },
    /// A range was unmapped. It is what the caller asked for, so it may span more than what is registered.
    Unmap {
        /// Its first byte.
        start: usize,
        /// The byte after its last.
        end: usize,
    },
}

/// Says why a page could not be accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FaultKind {
    /// It is not there.
    Missing,
    /// It is in the page cache, but not mapped.
    Minor,
    /// It is write-protected.
    WriteProtected,
}

impl Message {
    /// Decodes a message that was just read through `reader`; each once, as it may bring a descriptor.
    ///
    /// # Errors
    ///
    /// `EPROTO` for a kind that is unknown.
    #[inline]
    pub(super) fn decode(raw: &RawMessage, reader: &Userfault) -> Result<Message, Errno> {
        let [first, second, third] = raw.args;
        Ok(match raw.event {
            event::PAGEFAULT => Message::Fault {
                addr: second as usize,
                write: first & WRITE != 0,
                kind: match first {
                    flags if flags & MINOR != 0 => FaultKind::Minor,
                    flags if flags & WRITE_PROTECTED != 0 => FaultKind::WriteProtected,
                    _ => FaultKind::Missing,
                },
                tid: first_half(third) as i32,
            },
            event::FORK => {
                // SAFETY: the kernel put this descriptor into our table when the message was read, and nobody else knows
                // of it.
                let child = unsafe { OwnedFd::from_raw_fd(first_half(first) as i32) };
                Message::Fork(reader.of_child(child))
            }
            event::REMAP => Message::Remap { from: first as usize, to: second as usize, len: third as usize },
            event::REMOVE => Message::Remove { start: first as usize, end: second as usize },
            event::UNMAP => Message::Unmap { start: first as usize, end: second as usize },
            _ => return Err(Errno::EPROTO),
        })
    }
}

/// The number that lies in the first four bytes of a word.
fn first_half(word: u64) -> u32 {
    let [a, b, c, d, ..] = word.to_ne_bytes();
    u32::from_ne_bytes([a, b, c, d])
}
