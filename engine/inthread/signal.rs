//! The SIGBUS handler of the process: one, however many engines; and the actions that it took the place of.
//!
//! Everything that runs in it is async-signal-safe: plain atomics, system calls, memory that was made before. It runs
//! with every signal blocked, so that nothing of the application runs on a thread that is inside a crossing. What is no
//! engine's is passed on to the action before it, holding nothing, under the signal mask which that action asked for.

use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};
use std::sync::{Mutex, PoisonError};

use libc::{c_int, c_void, siginfo_t, ucontext_t};

use super::answer::Access;
use super::desk;
use crate::process::gate;

/// "Nonexistent physical address": what the kernel says of a page that nobody brings.
const BUS_ADRERR: c_int = 2;
/// "Hardware memory error, action optional": nothing was touched.
const BUS_MCEERR_AO: c_int = 5;
/// The bytes of a signal set that the kernel knows.
const KERNEL_SIGSET_BYTES: usize = 8;
/// Says in a siginfo's unused bytes that the signal was passed on; below it, to how many actions.
const PASSED_ON: u64 = 0x6b69_6f6d_6170_0000;
const MOST_PASSED_ON: u64 = 0xffff;

/// An action that the handler took the place of. Never freed: a signal may be on its way through it.
struct Before {
    action: libc::sigaction,
    /// It was for one signal (SA_RESETHAND), and that has come.
    spent: AtomicBool,
    /// What was there before that. An action that itself passes on to the handler gets no signal twice: that goes there.
    below: *const Before,
}

static BEFORE: AtomicPtr<Before> = AtomicPtr::new(ptr::null_mut());
/// Held while the action is exchanged, with forks kept away: a child may do so too.
static EXCHANGE: Mutex<()> = Mutex::new(());

/// Tells whether SIGBUS reaches the handler first.
pub(super) fn is_on_top() -> bool {
    is_ours(&current())
}

/// Tells whether the handler was ever installed in this process, or one that it was forked from.
pub(super) fn was_installed() -> bool {
    !BEFORE.load(Ordering::Acquire).is_null()
}

/// Puts the handler before whatever action SIGBUS has now; tells whether it was not there already.
pub(super) fn install() -> bool {
    let _gate = gate();
    let _exchange = EXCHANGE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut seen = current();
    if is_ours(&seen) {
        return false;
    }
    loop {
        // Known before a signal can come that is to be passed on to it.
        remember(seen);
        let mut action = default_action();
        action.sa_sigaction = on_sigbus as *const () as usize;
        // Whether a system call that a SIGBUS from elsewhere interrupts goes on is as it was.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | (seen.sa_flags & libc::SA_RESTART);
        // Also those that the C library keeps to itself: a thread must not be cancelled while it is inside a crossing.
        // SAFETY: a signal set is plain bits.
        unsafe { ptr::write_bytes(&raw mut action.sa_mask, 0xff, 1) };
        let mut replaced = default_action();
        // SAFETY: the handler does nothing that a signal handler must not; both structs are whole.
        unsafe { libc::sigaction(libc::SIGBUS, &raw const action, &raw mut replaced) };
        if is_ours(&replaced) || is_same(&replaced, &seen) {
            return true;
        }
        // Another thread has set one in between.
        seen = replaced;
    }
}

fn remember(action: libc::sigaction) {
    let below = BEFORE.load(Ordering::Acquire);
    // SAFETY: what is in the list is never freed.
    match unsafe { below.as_ref() } {
        // The application sets the same again and again.
        Some(newest) if is_same(&newest.action, &action) => newest.spent.store(false, Ordering::Relaxed),
        _ => {
            let before = Box::new(Before { action, spent: AtomicBool::new(false), below });
            BEFORE.store(Box::into_raw(before), Ordering::Release);
        }
    }
}

fn default_action() -> libc::sigaction {
    // SAFETY: all bytes zero is SIG_DFL, with no flag and an empty set.
    unsafe { MaybeUninit::zeroed().assume_init() }
}

fn current() -> libc::sigaction {
    let mut action = default_action();
    // SAFETY: only asks.
    unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), &raw mut action) };
    action
}

fn is_ours(action: &libc::sigaction) -> bool {
    action.sa_sigaction == on_sigbus as *const () as usize
}

fn is_same(one: &libc::sigaction, other: &libc::sigaction) -> bool {
    one.sa_sigaction == other.sa_sigaction
        && one.sa_flags == other.sa_flags
        && kernel_bits(&one.sa_mask) == kernel_bits(&other.sa_mask)
}

fn kernel_bits(set: &libc::sigset_t) -> u64 {
    const { assert!(size_of::<libc::sigset_t>() >= KERNEL_SIGSET_BYTES) };
    // SAFETY: as many bytes as a set has at least, of plain bits.
    unsafe { ptr::from_ref(set).cast::<u64>().read_unaligned() }
}

extern "C" fn on_sigbus(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the address of this thread's errno, always.
    let errno = unsafe { &mut *libc::__errno_location() };
    let before = *errno;
    // SAFETY: the kernel, or whoever passes a signal on, gives a siginfo and a context.
    let served = unsafe {
        passed_on(info) == 0
            && (*info).si_code == BUS_ADRERR
            && desk::answer((*info).si_addr() as usize, access_of(context.cast()))
    };
    *errno = before;
    if !served {
        // SAFETY: as above; this thread is inside no crossing.
        unsafe { pass_on(signal, info, context) };
        // A handler leaves errno as it was; if it does not, that is its own matter.
    }
}

/// Tells what a touch was, where the context says so.
///
/// # Safety
///
/// The context is one that the kernel made.
unsafe fn access_of(context: *const ucontext_t) -> Access {
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: the caller's promise. Bit 1 of the page fault's error code: the access was a write.
        let error = unsafe { (*context).uc_mcontext.gregs[libc::REG_ERR as usize] };
        if error & 2 != 0 { Access::Write } else { Access::Read }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = context;
        Access::Unknown
    }
}

/// Where a siginfo notes how often it was passed on: its last bytes, which no signal uses and the kernel zeroes.
///
/// # Safety
///
/// `info` is a whole siginfo.
unsafe fn note(info: *mut siginfo_t) -> *mut u64 {
    const { assert!(size_of::<siginfo_t>() == 128) };
    // SAFETY: within the struct.
    unsafe { info.cast::<u8>().add(size_of::<siginfo_t>() - size_of::<u64>()).cast() }
}

/// Tells to how many actions a signal was passed on already: one of them has passed it on to the handler.
///
/// # Safety
///
/// As for [`note`].
unsafe fn passed_on(info: *mut siginfo_t) -> u64 {
    // SAFETY: the caller's promise.
    let noted = unsafe { note(info).read_unaligned() };
    if noted & !MOST_PASSED_ON == PASSED_ON { noted & MOST_PASSED_ON } else { 0 }
}

/// Gives a signal to the action that it would have had without the handler.
///
/// # Safety
///
/// `info` and `context` are what the kernel gave with a SIGBUS; nothing is held that the action could wait for.
unsafe fn pass_on(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the caller's promise.
    let times = unsafe { passed_on(info) };
    let mut before = BEFORE.load(Ordering::Acquire).cast_const();
    for _ in 0..times {
        // SAFETY: what is in the list is never freed.
        before = unsafe { before.as_ref() }.map_or(ptr::null(), |before| before.below);
    }
    // SAFETY: as above.
    let Some(before) = (unsafe { before.as_ref() }) else { return act_by_default(info) };
    let action = &before.action;
    match action.sa_sigaction {
        libc::SIG_DFL => return act_by_default(info),
        libc::SIG_IGN => return ignore(info),
        _ => {}
    }
    if action.sa_flags & libc::SA_RESETHAND != 0 && before.spent.swap(true, Ordering::Relaxed) {
        return act_by_default(info);
    }
    // SAFETY: the note is in bytes that nobody uses; it says that this one had its turn.
    unsafe { note(info).write_unaligned(PASSED_ON | (times + 1).min(MOST_PASSED_ON)) };
    // SAFETY: the context is the kernel's, whose set of signals has this many bytes.
    unsafe { set_mask(action, (&raw const (*context.cast::<ucontext_t>()).uc_sigmask).cast()) };
    if action.sa_flags & libc::SA_SIGINFO != 0 {
        // SAFETY: the application set it as a function of this type.
        let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) =
            unsafe { std::mem::transmute(action.sa_sigaction) };
        handler(signal, info, context);
    } else {
        // SAFETY: as above.
        let handler: extern "C" fn(c_int) = unsafe { std::mem::transmute(action.sa_sigaction) };
        handler(signal);
    }
}

/// Blocks what the kernel would have blocked for an action: what was blocked where the signal came, what the action asks
/// for, and the signal itself unless it does not want that.
///
/// # Safety
///
/// `interrupted` points to a set of signals as the kernel keeps it.
unsafe fn set_mask(action: &libc::sigaction, interrupted: *const u64) {
    let mut mask = action.sa_mask;
    // SAFETY: a set of signals is plain bits, at least this many; the other is the caller's promise.
    unsafe {
        let bits = (&raw mut mask).cast::<u64>();
        bits.write_unaligned(bits.read_unaligned() | interrupted.read_unaligned());
        if action.sa_flags & libc::SA_NODEFER == 0 {
            libc::sigaddset(&raw mut mask, libc::SIGBUS);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const mask, ptr::null_mut());
    }
}

/// What was touched raises its signal again when the handler returns, and has the default action then: the process ends
/// as it would have without the handler, with the same core. What was sent is sent once more.
fn act_by_default(info: *const siginfo_t) {
    let action = default_action();
    // SAFETY: the default action.
    unsafe { libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut()) };
    if !was_touched(info) {
        // Blocked until the handler returns.
        // SAFETY: sends this thread a signal.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::syscall(libc::SYS_gettid), libc::SIGBUS) };
    }
}

/// The kernel lets nobody ignore what a touch raises: it has the default action then.
fn ignore(info: *const siginfo_t) {
    if was_touched(info) {
        act_by_default(info);
    }
}

/// Tells whether a touch of this thread raised the signal: it would do so again.
fn was_touched(info: *const siginfo_t) -> bool {
    // SAFETY: the callers have it from the kernel.
    let code = unsafe { (*info).si_code };
    code > 0 && code != BUS_MCEERR_AO
}
