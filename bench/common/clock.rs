//! The clock around each touch: the processor's time stamp counter where it can be trusted, else the kernel's clock.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// How long the counter is compared with the kernel's clock.
const CALIBRATION: Duration = Duration::from_millis(50);
/// Pairs of readings from which the overhead is taken.
const PAIRS: usize = 10_000;

/// What ticks are, measured once by [`calibrate`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    pub(crate) name: &'static str,
    /// Nanoseconds of a tick.
    pub(crate) ns_per_tick: f64,
    /// The median of two readings with nothing in between. It is part of every latency; nothing is subtracted.
    pub(crate) overhead_ns: f64,
}

static COUNTER: OnceLock<bool> = OnceLock::new();

/// Chooses the clock; tells whether it is the counter. Until then, [`now`] reads the kernel's. All processes choose the same.
pub(crate) fn choose() -> bool {
    *COUNTER.get_or_init(counter_is_steady)
}

/// Chooses and measures the clock.
pub(crate) fn calibrate() -> Clock {
    let counter = choose();
    let (begin, ticks) = (Instant::now(), now());
    while begin.elapsed() < CALIBRATION {}
    let ns_per_tick = begin.elapsed().as_nanos() as f64 / (now() - ticks) as f64;
    let mut pairs: Vec<u64> = (0..PAIRS)
        .map(|_| {
            let before = now();
            now() - before
        })
        .collect();
    pairs.sort_unstable();
    let name = if counter { "rdtscp" } else { "clock_gettime(CLOCK_MONOTONIC)" };
    Clock { name, ns_per_tick, overhead_ns: pairs[PAIRS / 2] as f64 * ns_per_tick }
}

/// Reads the clock, in ticks. Safe in a signal handler.
#[inline(always)]
pub(crate) fn now() -> u64 {
    #[cfg(target_arch = "x86_64")]
    if COUNTER.get() == Some(&true) {
        let mut cpu = 0;
        // SAFETY: `counter_is_steady` saw that the processor has both instructions.
        return unsafe {
            // Waits for what comes before; the fence keeps what follows behind it.
            let ticks = std::arch::x86_64::__rdtscp(&mut cpu);
            std::arch::x86_64::_mm_lfence();
            ticks
        };
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a timespec of ours, and the clock exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Tells whether the processor has a counter that runs at one rate, whatever the core does.
fn counter_is_steady() -> bool {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    cfg!(target_arch = "x86_64")
        && ["rdtscp", "constant_tsc", "nonstop_tsc"].iter().all(|flag| flags.split_whitespace().any(|f| f == *flag))
}
