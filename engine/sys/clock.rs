//! The monotonic clock, in nanoseconds. The kernel's vDSO tells it without a system call where the machine has a clock that
//! allows that.

/// The time, exactly.
pub(crate) fn now_ns() -> i64 {
    read(libc::CLOCK_MONOTONIC)
}

/// The time as of the scheduler's last tick, which is cheaper.
pub(crate) fn coarse_ns() -> i64 {
    read(libc::CLOCK_MONOTONIC_COARSE)
}

/// There have been these clocks on every Linux for decades; without one, it is always 0.
fn read(clock: libc::clockid_t) -> i64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes to `now`, which is as large as it must be.
    unsafe { libc::clock_gettime(clock, &raw mut now) };
    now.tv_sec * 1_000_000_000 + now.tv_nsec
}
