//! The monotonic clock, in nanoseconds. The kernel's vDSO tells it without a system call where the machine has a clock that
//! allows that.

use nix::time::{ClockId, clock_gettime};

/// The time, exactly.
pub(crate) fn now_ns() -> i64 {
    read(ClockId::CLOCK_MONOTONIC)
}

/// The time as of the scheduler's last tick, which is cheaper.
pub(crate) fn coarse_ns() -> i64 {
    read(ClockId::CLOCK_MONOTONIC_COARSE)
}

/// There have been these clocks on every Linux for decades; without one, it is always 0.
fn read(clock: ClockId) -> i64 {
    clock_gettime(clock).map_or(0, |now| now.tv_sec() * 1_000_000_000 + now.tv_nsec())
}
