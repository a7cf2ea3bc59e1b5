//! Touches of memory that may be missing: the bytes, or how the kernel refused.

use std::arch::asm;
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// A touch that the kernel answered by a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Refused {
    /// SIGBUS or SIGSEGV.
    pub(crate) signal: i32,
    pub(crate) code: i32,
    pub(crate) addr: usize,
}

impl Refused {
    /// A SIGBUS for a page that can't be had. A kernel with memory-failure support reports poison as such.
    pub(crate) fn is_sigbus_at(&self, addr: usize) -> bool {
        const BUS_ADRERR: i32 = 2;
        const BUS_MCEERR_AR: i32 = 4;
        self.signal == libc::SIGBUS && self.addr == addr && [BUS_ADRERR, BUS_MCEERR_AR].contains(&self.code)
    }

    pub(crate) fn is_sigsegv(&self) -> bool {
        self.signal == libc::SIGSEGV
    }
}

thread_local! {
    /// Where the touching instruction ends, while one runs on this thread.
    static RESUME: Cell<usize> = const { Cell::new(0) };
    static REFUSED: Cell<Option<Refused>> = const { Cell::new(None) };
}

extern "C" fn on_signal(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let resume = RESUME.replace(0);
    if resume == 0 {
        // Not a touch of ours: let the fault happen again, with the default action.
        // SAFETY: signal(2) is async-signal-safe.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
        return;
    }
    // SAFETY: the kernel passes a valid siginfo and context to a SA_SIGINFO handler.
    unsafe {
        REFUSED.set(Some(Refused { signal, code: (*info).si_code, addr: (*info).si_addr() as usize }));
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

/// Installs the handler of refused touches; once, and before an engine that is to be asked first.
pub(crate) fn prepare() {
    // Not a lock: a child that is forked while another thread is here would wait for that thread. To do it twice does no harm.
    static INSTALLED: AtomicBool = AtomicBool::new(false);
    if INSTALLED.load(Ordering::Acquire) {
        return;
    }
    for signal in [Signal::SIGBUS, Signal::SIGSEGV] {
        let action = SigAction::new(SigHandler::SigAction(on_signal), SaFlags::SA_ONSTACK, SigSet::empty());
        // SAFETY: the handler does nothing but look at its arguments and thread-local cells without destructors.
        unsafe { sigaction(signal, &action) }.unwrap();
    }
    INSTALLED.store(true, Ordering::Release);
}

fn outcome<T>(value: T) -> Result<T, Refused> {
    RESUME.set(0);
    REFUSED.take().map_or(Ok(value), Err)
}

/// Reads the byte at `addr`.
pub(crate) fn read(addr: *const u8) -> Result<u8, Refused> {
    prepare();
    let mut byte: u8 = 0;
    let resume = RESUME.with(Cell::as_ptr);
    // SAFETY: a load that faults is resumed behind it by the handler, with `byte` unspecified but initialised.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        asm!("lea {t}, [rip + 3f]", "mov [{r}], {t}", "mov {b}, byte ptr [{a}]", "3:",
             t = out(reg) _, r = in(reg) resume, a = in(reg) addr, b = inout(reg_byte) byte);
        #[cfg(target_arch = "aarch64")]
        asm!("adr {t}, 3f", "str {t}, [{r}]", "ldrb {b:w}, [{a}]", "3:",
             t = out(reg) _, r = in(reg) resume, a = in(reg) addr, b = inout(reg) byte);
    }
    outcome(byte)
}

/// Writes the byte at `addr`.
pub(crate) fn write(addr: *mut u8, byte: u8) -> Result<(), Refused> {
    prepare();
    let resume = RESUME.with(Cell::as_ptr);
    // SAFETY: as for `read`.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        asm!("lea {t}, [rip + 3f]", "mov [{r}], {t}", "mov byte ptr [{a}], {b}", "3:",
             t = out(reg) _, r = in(reg) resume, a = in(reg) addr, b = in(reg_byte) byte);
        #[cfg(target_arch = "aarch64")]
        asm!("adr {t}, 3f", "str {t}, [{r}]", "strb {b:w}, [{a}]", "3:",
             t = out(reg) _, r = in(reg) resume, a = in(reg) addr, b = in(reg) byte);
    }
    outcome(())
}

/// Reads the eight bytes at `addr`, a multiple of 8, in one load.
pub(crate) fn read_word(addr: *const u8) -> Result<u64, Refused> {
    prepare();
    let mut word: u64 = 0;
    let resume = RESUME.with(Cell::as_ptr);
    // SAFETY: as for `read`.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        asm!("lea {t}, [rip + 3f]", "mov [{r}], {t}", "mov {w}, qword ptr [{a}]", "3:",
             t = out(reg) _, r = in(reg) resume, a = in(reg) addr, w = inout(reg) word);
        #[cfg(target_arch = "aarch64")]
        asm!("adr {t}, 3f", "str {t}, [{r}]", "ldr {w}, [{a}]", "3:",
             t = out(reg) _, r = in(reg) resume, a = in(reg) addr, w = inout(reg) word);
    }
    outcome(word)
}

/// Writes the eight bytes at `addr`, a multiple of 8, in one store.
pub(crate) fn write_word(addr: *mut u8, word: u64) -> Result<(), Refused> {
    prepare();
    let resume = RESUME.with(Cell::as_ptr);
    // SAFETY: as for `read`.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        asm!("lea {t}, [rip + 3f]", "mov [{r}], {t}", "mov qword ptr [{a}], {w}", "3:",
             t = out(reg) _, r = in(reg) resume, a = in(reg) addr, w = in(reg) word);
        #[cfg(target_arch = "aarch64")]
        asm!("adr {t}, 3f", "str {t}, [{r}]", "str {w}, [{a}]", "3:",
             t = out(reg) _, r = in(reg) resume, a = in(reg) addr, w = in(reg) word);
    }
    outcome(())
}
