//! Timed touches: of pages that come, and of pages that never will.

use std::arch::asm;
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use kiomap::page_size;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use serde::{Deserialize, Serialize};

use super::clock::now;

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!("touching a page that raises SIGBUS, and going on behind it, is written for x86-64 and aarch64");

/// What the first word of each page is before it is touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Contents {
    Zeros,
    /// Each page full of its [`mark`].
    Marks,
    /// No page: SIGBUS.
    Nothing,
}

/// The word of which page `n` is full, never zero.
pub(crate) fn mark(n: usize) -> u64 {
    (n as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

impl Contents {
    fn word(self, n: usize) -> u64 {
        if self == Contents::Marks { mark(n) } else { 0 }
    }
}

/// What a pass saw.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
#[repr(C)]
pub(crate) struct Pass {
    /// Ticks at the first touch and after the last.
    pub(crate) begin: u64,
    pub(crate) end: u64,
    /// Touches that found the wrong bytes, or ended in the wrong way.
    pub(crate) wrong: u64,
}

/// Touches pages in order, and puts the ticks that each touch took into `ticks`.
///
/// A touch is an atomic addition to the page's first word: one write fault, whatever the memory, and it returns what
/// was there.
pub(crate) fn pass(base: usize, order: &[usize], contents: Contents, ticks: &mut [u64]) -> Pass {
    let page = page_size();
    let begin = now();
    let mut wrong = 0;
    for (&n, ticks) in order.iter().zip(ticks) {
        let addr = base + n * page;
        let right = if contents == Contents::Nothing {
            let before = now();
            let refused = write_refused(addr);
            *ticks = REFUSED_AT.get().wrapping_sub(before);
            refused == Some(addr)
        } else {
            // SAFETY: the page lies in a mapping that outlives the pass, aligned, and is touched only by atomics.
            let word = unsafe { AtomicU64::from_ptr(std::ptr::with_exposed_provenance_mut(addr)) };
            let before = now();
            let found = word.fetch_add(1, Ordering::Relaxed);
            *ticks = now() - before;
            found == contents.word(n)
        };
        wrong += u64::from(!right);
    }
    Pass { begin, end: now(), wrong }
}

/// Counts the pages that, after a pass, are not what they were to be, all of their words compared.
pub(crate) fn count_wrong(base: usize, pages: usize, contents: Contents) -> usize {
    let words = page_size() / size_of::<u64>();
    (0..pages)
        .filter(|&n| {
            let page = std::ptr::with_exposed_provenance::<u64>(base + n * page_size());
            // SAFETY: the page is mapped and there, and its passes are over: nobody writes to it now.
            let page = unsafe { std::slice::from_raw_parts(page, words) };
            let word = contents.word(n);
            page[0] != word.wrapping_add(1) || page[1..].iter().any(|&found| found != word)
        })
        .count()
}

thread_local! {
    /// Where the touching instruction ends, while one runs on this thread.
    static RESUME: Cell<usize> = const { Cell::new(0) };
    static REFUSED: Cell<usize> = const { Cell::new(0) };
    /// When the signal handler began to run.
    static REFUSED_AT: Cell<u64> = const { Cell::new(0) };
}

extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let at = now();
    let resume = RESUME.replace(0);
    if resume == 0 {
        // Not a touch of `write_refused`: let it happen again, with the default action.
        // SAFETY: signal(2) is async-signal-safe.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
        return;
    }
    REFUSED_AT.set(at);
    // SAFETY: the kernel passes a valid siginfo and context to a SA_SIGINFO handler.
    unsafe {
        REFUSED.set((*info).si_addr().addr());
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext;
        #[cfg(target_arch = "x86_64")]
        {
            registers.gregs[libc::REG_RIP as usize] = resume as i64;
        }
        #[cfg(target_arch = "aarch64")]
        {
            registers.pc = resume as u64;
        }
    }
}

/// Makes SIGBUS resume behind the touch.
pub(crate) fn catch_sigbus() -> Result<()> {
    let action = SigAction::new(SigHandler::SigAction(on_sigbus), SaFlags::SA_ONSTACK, SigSet::empty());
    // SAFETY: the handler looks at its arguments, the clock and thread-local cells without destructors.
    unsafe { sigaction(Signal::SIGBUS, &action) }.context("sigaction for SIGBUS")?;
    Ok(())
}

/// Writes at `addr`; the address of the SIGBUS that this was.
fn write_refused(addr: usize) -> Option<usize> {
    REFUSED.set(0);
    let resume = RESUME.with(Cell::as_ptr);
    // SAFETY: `addr` is mapped memory of a pass; a store that raises SIGBUS is resumed behind it by the handler.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        asm!("lea {t}, [rip + 3f]", "mov [{r}], {t}", "mov byte ptr [{a}], 1", "3:",
             t = out(reg) _, r = in(reg) resume, a = in(reg) addr);
        #[cfg(target_arch = "aarch64")]
        asm!("adr {t}, 3f", "str {t}, [{r}]", "strb wzr, [{a}]", "3:",
             t = out(reg) _, r = in(reg) resume, a = in(reg) addr);
    }
    RESUME.set(0);
    Some(REFUSED.get()).filter(|&refused| refused != 0)
}
