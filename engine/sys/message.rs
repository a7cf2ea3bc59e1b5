//! What a userfaultfd reports: the crate's events, turned at the place of reading into a type of our own that is `Send`.

use super::Userfault;

/// A buffer for messages, allocated once so that reading never allocates.
pub(crate) struct MsgBuffer(pub(super) userfaultfd::EventBuffer);

impl MsgBuffer {
    /// Makes room for `messages` messages, at least one.
    pub(crate) fn new(messages: usize) -> MsgBuffer {
        MsgBuffer(userfaultfd::EventBuffer::new(messages.max(1)))
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
    Fork(
        #[cfg_attr(not(test), expect(dead_code, reason = "held to be closed: no space of ours asks for fork events"))]
        Userfault,
    ),
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
    #[cfg_attr(not(test), expect(dead_code, reason = "the next touch asks the list again, wherever it is"))]
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

impl From<userfaultfd::Event> for Message {
    fn from(event: userfaultfd::Event) -> Message {
        match event {
            userfaultfd::Event::Pagefault { kind, rw, addr, thread_id } => Message::Fault {
                addr: addr as usize,
                write: rw == userfaultfd::ReadWrite::Write,
                kind: match kind {
                    userfaultfd::FaultKind::Missing => FaultKind::Missing,
                    userfaultfd::FaultKind::Minor => FaultKind::Minor,
                    userfaultfd::FaultKind::WriteProtected => FaultKind::WriteProtected,
                },
                tid: thread_id.as_raw(),
            },
            userfaultfd::Event::Fork { uffd } => Message::Fork(Userfault::from(uffd)),
            userfaultfd::Event::Remap { from, to, len } => Message::Remap { from: from as usize, to: to as usize, len },
            userfaultfd::Event::Remove { start, end } => Message::Remove { start: start as usize, end: end as usize },
            userfaultfd::Event::Unmap { start, end } => Message::Unmap { start: start as usize, end: end as usize },
        }
    }
}
