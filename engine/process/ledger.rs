//! Descriptors that a forked child must not keep.
//!
//! A child inherits every descriptor of its parent. A copy of a userfaultfd in a child keeps waiters asleep after the
//! parent closed it; a copy of a lifeline hides the death of its peer. So every such descriptor is entered here, and
//! closed by the fork handler in the child.
//!
//! An application may close descriptors that are not its own (daemons close everything), and have others under their
//! numbers afterwards. Each entry therefore remembers what it named, and what is a stranger by now is left alone.

use std::collections::BTreeMap;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Mutex, MutexGuard};

use super::depth;

static LEDGER: Mutex<Ledger> = Mutex::new(Ledger { descriptors: BTreeMap::new() });

/// What a descriptor names: device and inode. Sockets, pidfds and userfaultfds each have an inode of their own.
type Identity = Option<(libc::dev_t, libc::ino_t)>;

fn identity(descriptor: RawFd) -> Identity {
    // SAFETY: fstat of a number that may name anything or nothing; borrowed for this call only.
    let stat = nix::sys::stat::fstat(unsafe { BorrowedFd::borrow_raw(descriptor) }).ok()?;
    Some((stat.st_dev, stat.st_ino))
}

/// The private descriptors of this process, and what each names.
pub(crate) struct Ledger {
    descriptors: BTreeMap<RawFd, Identity>,
}

/// Locks the ledger; while it is locked no fork handler runs, so a descriptor can be made and entered in one step.
pub(crate) fn lock() -> MutexGuard<'static, Ledger> {
    LEDGER.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Ledger {
    /// Enters a descriptor that was made while the ledger was locked.
    pub(crate) fn adopt<T: AsRawFd>(&mut self, value: T) -> Private<T> {
        let identity = identity(value.as_raw_fd());
        self.descriptors.insert(value.as_raw_fd(), identity);
        Private { value: ManuallyDrop::new(value), identity, depth: depth() }
    }

    /// In a forked child: closes every private descriptor of the parent. The values that own them are copies of the
    /// parent's, which are never dropped here ([`Private`] sees to it).
    pub(crate) fn close_all(&mut self) {
        for (descriptor, known) in std::mem::take(&mut self.descriptors) {
            if identity(descriptor) == known {
                // SAFETY: still what it was when it was entered, and no value of this process closes it again.
                unsafe { libc::close(descriptor) };
            }
        }
    }
}

/// Owns a descriptor that a forked child does not keep. In a child, the copy of this value owns nothing.
#[derive(Debug)]
pub(crate) struct Private<T: AsRawFd> {
    value: ManuallyDrop<T>,
    identity: Identity,
    /// The process that made it.
    depth: u32,
}

impl<T: AsRawFd> Private<T> {
    /// Makes a descriptor with no fork in between.
    pub(crate) fn open<E>(make: impl FnOnce() -> Result<T, E>) -> Result<Self, E> {
        let mut ledger = lock();
        let value = make()?;
        Ok(ledger.adopt(value))
    }

    /// Tells whether this process made it.
    pub(crate) fn is_here(&self) -> bool {
        self.depth == depth()
    }

    /// Tells whether the number still names what it did: false in a forked child, and after somebody else closed it.
    pub(crate) fn is_intact(&self) -> bool {
        self.is_here() && identity(self.value.as_raw_fd()) == self.identity
    }

    /// Tells whether another names the same.
    pub(crate) fn is_same_as(&self, other: &Private<T>) -> bool {
        self.identity.is_some() && self.identity == other.identity
    }

    /// Turns the value into another that owns the same descriptor.
    pub(crate) fn map<U: AsRawFd>(self, convert: impl FnOnce(T) -> U) -> Private<U> {
        let mut this = ManuallyDrop::new(self);
        // SAFETY: taken once; `this` is never used or dropped again, and the ledger's entry passes to the new owner.
        let value = unsafe { ManuallyDrop::take(&mut this.value) };
        Private { value: ManuallyDrop::new(convert(value)), identity: this.identity, depth: this.depth }
    }
}

impl<T: AsRawFd> Deref for Private<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.value
    }
}

impl<T: AsRawFd + AsFd> AsFd for Private<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.value.as_fd()
    }
}

impl<T: AsRawFd> Drop for Private<T> {
    fn drop(&mut self) {
        if !self.is_here() {
            return;
        }
        let mut ledger = lock();
        ledger.descriptors.remove(&self.value.as_raw_fd());
        if self.is_intact() {
            // SAFETY: dropped once, here; under the ledger's lock, so that no child sees a number that is about to go.
            unsafe { ManuallyDrop::drop(&mut self.value) };
        }
    }
}
