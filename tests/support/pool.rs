//! Huge pages for tests: the system's pool, raised where that is allowed, and given back.

use std::fs::{self, File};

use kiomap::{Features, page_size};
use nix::fcntl::{Flock, FlockArg};

use super::{alone, taken_away};

/// The pool, and the size of its pages.
const POOL: &str = "/proc/sys/vm/nr_hugepages";
const SIZES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";
pub(crate) const HUGE: usize = 2 << 20;
/// What each test has of them.
pub(crate) const HUGE_PAGES: u64 = 24;

/// A number of the pool.
pub(crate) fn pool(number: &str) -> u64 {
    fs::read_to_string(format!("{SIZES}/{number}")).unwrap_or_default().trim().parse().unwrap_or(0)
}

pub(crate) fn free_pages() -> u64 {
    pool("free_hugepages") - pool("resv_hugepages")
}

/// Base pages in a huge one.
pub(crate) fn per_huge() -> u64 {
    (HUGE / page_size()) as u64
}

/// A raised pool: given back when dropped, and nobody else's meanwhile.
struct Raised {
    before: Option<u64>,
    _lock: Flock<File>,
}

impl Raised {
    /// Raises the pool where that is allowed; `None` when it has too few pages all the same.
    fn new() -> Option<Raised> {
        let lock = Flock::lock(File::open(POOL).ok()?, FlockArg::LockExclusive).ok()?;
        let before = pool("nr_hugepages");
        let raised = fs::write(POOL, (before + HUGE_PAGES).to_string()).is_ok();
        let pool = Raised { before: raised.then_some(before), _lock: lock };
        (free_pages() >= HUGE_PAGES).then_some(pool)
    }
}

impl Drop for Raised {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            let _ = fs::write(POOL, before.to_string());
        }
    }
}

/// Runs a test alone, with a pool of [`HUGE_PAGES`] pages at the least.
pub(crate) fn with_pool(name: &str, body: impl FnOnce()) {
    if taken_away().contains(Features::POISON) {
        crate::skip!("without POISON there are no vmaps of huge pages");
    }
    // In the process of its own, the pool is raised already.
    if std::env::var_os("KIOMAP_TEST_ALONE").is_some() {
        return alone(name, body);
    }
    let Some(_raised) = Raised::new() else {
        crate::skip!("the pool has fewer than {HUGE_PAGES} huge pages, and this user may not raise {POOL}");
    };
    alone(name, body);
}
