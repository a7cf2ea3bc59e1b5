//! The machine's page size, and the arithmetic of whole pages.

use std::sync::OnceLock;

/// Returns the size of a page in bytes, as `sysconf(_SC_PAGESIZE)` reports it.
///
/// # Panics
///
/// If the system reports no page size, which no Linux kernel does.
pub fn page_size() -> usize {
    static SIZE: OnceLock<usize> = OnceLock::new();
    *SIZE.get_or_init(|| {
        let reported = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE);
        let bytes = reported.ok().flatten().expect("sysconf(_SC_PAGESIZE) always has a value on Linux");
        usize::try_from(bytes).expect("a page size is positive")
    })
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
