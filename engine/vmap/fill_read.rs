//! Filling pages with what a worker has read for them.
//!
//! It is done through the vmap's window, and so fills the object, not anybody's addresses: whatever became of these since the
//! read began, the pages are the list's. Only the list itself may have been taken back, and what was taken back must not come
//! after it is.

use std::sync::PoisonError;
use std::time::Duration;

use super::core::VmapCore;
use super::window::Window;
use crate::page::page_size;
use crate::sys::{Install, Stop};

/// Pages filled in one step: an exchange of the list waits for it.
const STEP_PAGES: usize = 64;
/// Tries at a page for which the kernel has no memory, and the pause between them: about two seconds.
const STARVED_TRIES: u32 = 200;
const STARVED_PAUSE: Duration = Duration::from_millis(10);
/// Tries while the kernel says that the address space is changing, which of a window it never says for long.
const CHANGING_TRIES: u32 = 1000;

/// Says how far the filling came.
pub(crate) struct Filled {
    /// Pages that were missing and are there now.
    pub(crate) pages: u64,
    /// Why the rest is not; `None` if all are there.
    pub(crate) stop: Option<Unfilled>,
}

/// Says why pages were not filled.
pub(crate) enum Unfilled {
    /// The list was taken back.
    TakenBack,
    Refused(Stop),
}

impl VmapCore {
    /// Fills the missing pages from `first` on with bytes that were read from the list of a generation. May wait for memory.
    pub(crate) fn fill_read(&self, window: &Window, generation: u64, first: u64, bytes: &[u8]) -> Filled {
        let page = page_size();
        let (mut at, mut pages) = (0, 0);
        let mut patience = Patience::default();
        while at < bytes.len() {
            let step = &bytes[at..bytes.len().min(at + STEP_PAGES * page)];
            let Some(install) = self.unless_taken_back(generation, || {
                // SAFETY: the bytes of `step`, which the kernel only reads.
                unsafe { window.copy(first + (at / page) as u64, step.as_ptr(), step.len()) }
            }) else {
                return Filled { pages, stop: Some(Unfilled::TakenBack) };
            };
            at += install.bytes;
            pages += (install.bytes / page) as u64;
            match install.stop {
                Some(Stop::Present) => at += page,
                Some(stop) if install.bytes == 0 && !patience.has(stop) => {
                    return Filled { pages, stop: Some(Unfilled::Refused(stop)) };
                }
                _ => {}
            }
        }
        Filled { pages, stop: None }
    }

    /// As [`VmapCore::fill_read`], for one huge page.
    pub(crate) fn fill_huge_read(&self, window: &Window, generation: u64, first: u64, bytes: &[u8]) -> Filled {
        let mut patience = Patience::default();
        loop {
            let filled = self.unless_taken_back(generation, || {
                // SAFETY: as above.
                let install = unsafe { window.copy(first, bytes.as_ptr(), bytes.len()) };
                // The kernel says that it is there also when the pool is empty.
                let is_absent = install.stop == Some(Stop::Present) && !window.holds(first);
                if is_absent { Install { bytes: 0, stop: Some(Stop::NoMemory) } } else { install }
            });
            let Some(Install { bytes, stop }) = filled else {
                return Filled { pages: 0, stop: Some(Unfilled::TakenBack) };
            };
            match stop {
                None | Some(Stop::Present) => return Filled { pages: (bytes / page_size()) as u64, stop: None },
                Some(stop) if !patience.has(stop) => {
                    return Filled { pages: 0, stop: Some(Unfilled::Refused(stop)) };
                }
                _ => {}
            }
        }
    }

    /// Does something that must not be done once the list of a generation is taken back.
    fn unless_taken_back<T>(&self, generation: u64, fill: impl FnOnce() -> T) -> Option<T> {
        let _kept = self.exchange.read().unwrap_or_else(PoisonError::into_inner);
        self.keeps(generation).then(fill)
    }
}

/// How often a step is tried again.
#[derive(Default)]
struct Patience {
    starved: u32,
    changing: u32,
}

impl Patience {
    /// Waits a moment; answers whether to try again.
    fn has(&mut self, stop: Stop) -> bool {
        match stop {
            Stop::Changing if self.changing < CHANGING_TRIES => {
                self.changing += 1;
                std::thread::yield_now();
                true
            }
            Stop::NoMemory if self.starved < STARVED_TRIES => {
                self.starved += 1;
                std::thread::sleep(STARVED_PAUSE);
                true
            }
            _ => false,
        }
    }
}
