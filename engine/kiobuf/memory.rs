//! Plain memory that a page list reads, and what keeps it there.

use std::any::Any;
use std::sync::Arc;

use super::Arena;

/// Memory of this process together with its owner.
#[derive(Clone)]
pub(super) enum Memory {
    /// Pages of our own; unshared, they can be read into.
    Arena(Arc<Arena>),
    /// Somebody else's pages, never written through the list.
    Borrowed(Borrowed),
}

/// Bytes that stay readable for as long as their guard lives.
#[derive(Clone)]
pub(super) struct Borrowed {
    data: *const u8,
    _guard: Arc<dyn Any + Send + Sync>,
}

// SAFETY: `data` is only ever read, the bytes behind it stay readable and unwritten while the guard lives (`from_guard`
// checks it, `new` demands it), and the guard itself is `Send + Sync`.
unsafe impl Send for Borrowed {}
// SAFETY: as for `Send`; shared reading of unwritten bytes is no race.
unsafe impl Sync for Borrowed {}

impl Borrowed {
    /// Takes the bytes that a guard lends, and their length.
    pub(super) fn from_guard<G: AsRef<[u8]> + Send + Sync + 'static>(guard: G) -> (Self, usize) {
        // The guard must be in its last place before it is asked: an array's bytes move with it. It is asked once, as
        // nothing obliges it to answer the same twice. The slice borrows the `Arc`'s content, which is neither moved
        // nor mutably borrowed until the last clone is dropped, as nobody but us has a clone: it is good until then.
        let guard = Arc::new(guard);
        let bytes: &[u8] = G::as_ref(&guard);
        let (data, len) = (bytes.as_ptr(), bytes.len());
        (Self { data, _guard: guard }, len)
    }

    /// Takes the bytes from `data` on, which `guard` keeps.
    ///
    /// # Safety
    ///
    /// What the list reads of `data` stays readable and is not written until the last clone of `guard` held by a list
    /// is dropped.
    pub(super) unsafe fn new(data: *const u8, guard: Arc<dyn Any + Send + Sync>) -> Self {
        Self { data, _guard: guard }
    }
}

impl Memory {
    /// Returns the same memory without its first `bytes`. Of an arena it is no more than borrowed: it can't be read into.
    pub(super) fn skip(&self, bytes: usize) -> Memory {
        if bytes == 0 {
            return self.clone();
        }
        let guard: Arc<dyn Any + Send + Sync> = match self {
            Memory::Arena(arena) => Arc::clone(arena) as _,
            Memory::Borrowed(borrowed) => Arc::clone(&borrowed._guard),
        };
        // Its bytes stay as they are while a clone of the guard lives: an arena is written to only by who has it alone.
        Memory::Borrowed(Borrowed { data: self.as_ptr().wrapping_add(bytes), _guard: guard })
    }

    /// Returns the address of the first byte of data.
    pub(super) fn as_ptr(&self) -> *const u8 {
        match self {
            Memory::Arena(arena) => arena.as_ptr(),
            Memory::Borrowed(borrowed) => borrowed.data,
        }
    }
}
