//! Descriptors that a forked child must not keep.
//!
//! A child inherits every descriptor of its parent. A copy of a userfaultfd in a child keeps waiters asleep after the
//! parent closed it; a copy of a lifeline hides the death of its peer. So every such descriptor is entered here, and
//! the fork handler puts a harmless one in its place in the child: the numbers stay valid for the values that own
//! them, but name nothing of the parent any more.

use std::collections::BTreeSet;
use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::{Mutex, MutexGuard};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

static LEDGER: Mutex<Ledger> = Mutex::new(Ledger { descriptors: BTreeSet::new(), spare: None });

/// The set of private descriptors of this process.
pub(crate) struct Ledger {
    descriptors: BTreeSet<RawFd>,
    /// What takes the place of a private descriptor in a child; made before the first fork, when descriptors can
    /// still be had.
    spare: Option<OwnedFd>,
}

/// Locks the ledger; while it is locked no fork handler runs, so a descriptor can be made and entered in one step.
pub(crate) fn lock() -> MutexGuard<'static, Ledger> {
    LEDGER.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Ledger {
    /// Makes the spare descriptor, once per process.
    pub(crate) fn prepare_spare(&mut self) -> Result<(), Errno> {
        if self.spare.is_none() {
            let spare = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
            self.spare = Some(spare.into());
        }
        Ok(())
    }

    /// Enters a descriptor that was made while the ledger was locked.
    pub(crate) fn adopt<T: AsRawFd>(&mut self, value: T) -> Private<T> {
        self.descriptors.insert(value.as_raw_fd());
        Private(ManuallyDrop::new(value))
    }

    /// In a forked child: replaces every private descriptor of the parent by the spare one.
    pub(crate) fn neutralise(&self) {
        let Some(spare) = &self.spare else { return };
        for &descriptor in &self.descriptors {
            // SAFETY: dup3 onto a number that a value of ours owns; it stays open, so nobody's ownership is broken.
            unsafe { libc::dup3(spare.as_raw_fd(), descriptor, libc::O_CLOEXEC) };
        }
    }
}

/// Owns a descriptor that is replaced by a harmless one in a forked child.
#[derive(Debug)]
pub(crate) struct Private<T: AsRawFd>(ManuallyDrop<T>);

impl<T: AsRawFd> Private<T> {
    /// Makes a descriptor with no fork in between.
    pub(crate) fn open<E>(make: impl FnOnce() -> Result<T, E>) -> Result<Self, E> {
        let mut ledger = lock();
        let value = make()?;
        Ok(ledger.adopt(value))
    }
}

impl<T: AsRawFd> Private<T> {
    /// Turns the value into another that owns the same descriptor.
    pub(crate) fn map<U: AsRawFd>(self, convert: impl FnOnce(T) -> U) -> Private<U> {
        let mut this = ManuallyDrop::new(self);
        // SAFETY: taken once; `this` is never used or dropped again, and the ledger's entry passes to the new owner.
        let value = unsafe { ManuallyDrop::take(&mut this.0) };
        Private(ManuallyDrop::new(convert(value)))
    }
}

impl<T: AsRawFd> Deref for Private<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T: AsRawFd + AsFd> AsFd for Private<T> {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl<T: AsRawFd> Drop for Private<T> {
    fn drop(&mut self) {
        let mut ledger = lock();
        ledger.descriptors.remove(&self.0.as_raw_fd());
        // SAFETY: dropped once, here; under the ledger's lock, so that no child sees a number that is about to go.
        unsafe { ManuallyDrop::drop(&mut self.0) };
    }
}
