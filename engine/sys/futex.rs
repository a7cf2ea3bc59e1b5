//! Sleeping on a word until another thread of this process has changed it (futex(2)). Neither call allocates, takes a lock or
//! is kept from a signal handler.

use std::ptr;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use nix::sys::time::TimeSpec;

/// Sleeps while a word is `value`, until it is woken. It may return for no reason: the caller looks at the word again.
pub(crate) fn wait(word: &AtomicU32, value: u32) {
    wait_until(word, value, None);
}

/// As [`wait`], for so long at the most.
pub(crate) fn wait_for(word: &AtomicU32, value: u32, most: Duration) {
    wait_until(word, value, Some(TimeSpec::from(most)));
}

fn wait_until(word: &AtomicU32, value: u32, most: Option<TimeSpec>) {
    let operation = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
    let most = most.as_ref().map_or(ptr::null(), |most| ptr::from_ref::<libc::timespec>(most.as_ref()));
    // SAFETY: the kernel reads the word and the time, which outlive the call.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, value, most) };
}

/// Wakes up to `most` threads that sleep on a word, which need not be there any more: its address is only their name.
pub(crate) fn wake(word: *const u32, most: i32) {
    // SAFETY: the kernel takes the address as a key, and reads and writes nothing there.
    unsafe { libc::syscall(libc::SYS_futex, word, libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, most) };
}
