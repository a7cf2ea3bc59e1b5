//! The machine's page size, and the arithmetic of whole pages.

/// Returns the size of a page in bytes, as `sysconf(_SC_PAGESIZE)` reports it.
///
/// # Panics
///
/// If the system reports no page size, which no Linux kernel does.
#[inline(always)]
pub fn page_size() -> usize {
    // A shift tells the compiler that it is a power of two: what is divided by it is shifted.
    1 << page_shift()
}

/// The binary logarithm of the page size, of which these processors have no other.
#[cfg(any(target_arch = "x86", target_arch = "x86_64"))]
#[inline(always)]
const fn page_shift() -> u32 {
    12
}

/// The binary logarithm of the page size.
#[cfg(not(any(target_arch = "x86", target_arch = "x86_64")))]
#[inline(always)]
fn page_shift() -> u32 {
    use std::sync::atomic::{AtomicU32, Ordering};

    static SHIFT: AtomicU32 = AtomicU32::new(0);
    match SHIFT.load(Ordering::Relaxed) {
        0 => {
            let shift = reported_shift();
            SHIFT.store(shift, Ordering::Relaxed);
            shift
        }
        shift => shift,
    }
}

#[cfg(any(test, not(any(target_arch = "x86", target_arch = "x86_64"))))]
#[cold]
fn reported_shift() -> u32 {
    let reported = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE);
    let bytes = reported.ok().flatten().expect("sysconf(_SC_PAGESIZE) always has a value on Linux");
    let bytes = usize::try_from(bytes).expect("a page size is positive");
    assert!(bytes.is_power_of_two() && bytes > 1, "a page of {bytes} bytes");
    bytes.ilog2()
}

/// Rounds `bytes` up to whole pages; `None` when that overflows.
pub(crate) fn pages_for(bytes: u64) -> Option<u64> {
    let page = page_size() as u64;
    Some(bytes.checked_add(page - 1)? / page)
}

/// Rounds an address down to the start of its page.
pub(crate) fn page_floor(addr: usize) -> usize {
    addr & !(page_size() - 1)
}

/// Tells whether an address or a length is a multiple of the page size.
pub(crate) fn is_aligned(value: usize) -> bool {
    value & (page_size() - 1) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_size_is_what_the_system_reports() {
        assert_eq!(page_size(), 1 << reported_shift());
    }
}
