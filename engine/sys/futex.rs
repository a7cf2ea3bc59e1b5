//! Sleeping on a word until another thread of this process has changed it (futex(2)). Neither call allocates, takes a lock or
//! is kept from a signal handler.

use std::ptr;
use std::sync::atomic::AtomicU32;

/// Sleeps while a word is `value`, until it is woken. It may return for no reason: the caller looks at the word again.
pub(crate) fn wait(word: &AtomicU32, value: u32) {
    let operation = libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG;
    // SAFETY: the kernel reads the word, which outlives the call; there is no timeout.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, value, ptr::null::<libc::timespec>()) };
}

/// Wakes up to `most` threads that sleep on a word, which need not be there any more: its address is only their name.
pub(crate) fn wake(word: *const u32, most: i32) {
    // SAFETY: the kernel takes the address as a key, and reads and writes nothing there.
    unsafe { libc::syscall(libc::SYS_futex, word, libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG, most) };
}
