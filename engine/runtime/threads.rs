//! How the engine's own threads are started and recognised.

use std::cell::Cell;
use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;

use memmap2::MmapMut;
use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask};

use super::call::{Ticket, call};
use super::shared::EngineShared;
use crate::stats::add;
use crate::{Error, Result};

/// What a thread of the engine is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Reads userfaultfds and answers faults.
    Fault,
    /// Keeps the processes: lifelines, requests, counts.
    Keeper,
    /// Runs deref callbacks.
    Callback,
    /// Reads pages from sources that may block.
    Worker,
    /// Answers simple faults on its processor, when the crew was called.
    Crew,
    /// Takes the fault-handling thread out of SCHED_IDLE when it makes no progress there.
    Watch,
    /// Brings pages before they are touched.
    Populate,
    /// In a forked child: answers faults when the engine is gone.
    Guard,
    /// Accepts connections to a published vmap.
    Publish,
    /// Runs the code of whoever subscribed to what the engine tells.
    #[cfg(feature = "tracing")]
    Trace,
}

impl Role {
    /// The thread's name, as `/proc/PID/task/TID/comm` shows it.
    pub(crate) fn name(self) -> &'static CStr {
        match self {
            Role::Fault => c"kiomap-fault",
            Role::Keeper => c"kiomap-keeper",
            Role::Callback => c"kiomap-callback",
            Role::Worker => c"kiomap-worker",
            Role::Crew => c"kiomap-crew",
            Role::Watch => c"kiomap-watch",
            Role::Populate => c"kiomap-populate",
            Role::Guard => c"kiomap-guard",
            Role::Publish => c"kiomap-publish",
            #[cfg(feature = "tracing")]
            Role::Trace => c"kiomap-trace",
        }
    }
}

/// The stack of a thread of the engine.
const STACK_BYTES: usize = 512 << 10;
/// More than the stack for signal handlers takes, with its guard and the thread's.
const SIGNAL_STACK_BYTES: usize = 128 << 10;

/// The signals that an instruction of a thread raises for that thread.
const SYNCHRONOUS: [Signal; 6] =
    [Signal::SIGBUS, Signal::SIGSEGV, Signal::SIGFPE, Signal::SIGILL, Signal::SIGTRAP, Signal::SIGSYS];

thread_local! {
    static ROLE: Cell<Option<(Role, u64)>> = const { Cell::new(None) };
}

/// Tells what the current thread is for, if it is a thread of engine `engine`.
pub(crate) fn current_role(engine: u64) -> Option<Role> {
    ROLE.get().filter(|(_, id)| *id == engine).map(|(role, _)| role)
}

/// Runs code of the application: a panic of it is counted, and goes no further.
pub(crate) fn contain<T>(shared: &EngineShared, code: impl FnOnce() -> T) -> Option<T> {
    let panic = match catch_unwind(AssertUnwindSafe(code)) {
        Ok(value) => return Some(value),
        Err(panic) => panic,
    };
    add(&shared.counters.panics, 1);
    // What it carries is the application's too. What panics as it is dropped may carry the like.
    if let Err(another) = catch_unwind(AssertUnwindSafe(|| drop(panic))) {
        std::mem::forget(another);
    }
    None
}

/// Ends a forked child whose only application thread was a thread of the engine: its code forked there and returned,
/// and there is nothing to return to.
pub(crate) fn end_child() -> ! {
    // SAFETY: ends the process without the parent's exit handlers.
    unsafe { libc::_exit(0) }
}

/// Starts a thread of engine `engine`. It blocks signals, so that no handler of the application runs on it and no
/// system call of it is interrupted; the caller's mask is left as it was.
///
/// Where code of the application runs, what that code itself raises stays open: the kernel ends a process that raises
/// SIGBUS or SIGSEGV while it is blocked, whatever handler the application has for it.
pub(crate) fn spawn(role: Role, engine: u64, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    // The standard library ends the process if a thread that has started can't map the stack for its signal handlers;
    // so see first whether there is room for both stacks, and let each thread have mapped them before the next looks.
    drop(MmapMut::map_anon(STACK_BYTES + SIGNAL_STACK_BYTES).map_err(Error::io("mmap for the stack of a thread"))?);
    let mut blocked = SigSet::all();
    if !matches!(role, Role::Fault | Role::Crew | Role::Watch) {
        SYNCHRONOUS.into_iter().for_each(|signal| blocked.remove(signal));
    }
    let mut before = SigSet::empty();
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&blocked), Some(&mut before))
        .map_err(Error::sys("blocking signals for a thread of the engine"))?;
    let mut spawned = Err(std::io::ErrorKind::Other.into());
    call(|started: Ticket<()>| {
        let builder =
            std::thread::Builder::new().name(role.name().to_string_lossy().into_owned()).stack_size(STACK_BYTES);
        // If it can't be spawned, the ticket is dropped, and nobody waits for it.
        spawned = builder.spawn(move || {
            ROLE.set(Some((role, engine)));
            started.answer(());
            body();
        });
    });
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None).map_err(Error::sys("restoring the signal mask"))?;
    spawned.map_err(Error::io("starting a thread of the engine (RLIMIT_NPROC, `ulimit -u`, or the cgroup's pids.max)"))
}

/// Starts a thread of engine `engine` in a forked child, with every signal blocked.
///
/// Not by the standard library: it keeps a record of its threads behind a lock, which another thread of the parent may
/// have held at the fork, and which nobody then releases in the child.
pub(crate) fn spawn_in_child(role: Role, engine: u64, body: impl FnOnce() + Send + 'static) -> Result<()> {
    let failed = |errno| {
        Error::sys("pthread_create in a forked child (RLIMIT_NPROC, or the cgroup's pids.max)")(Errno::from_raw(errno))
    };
    let mut before = SigSet::empty();
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), Some(&mut before))
        .map_err(Error::sys("blocking signals for a thread of the engine"))?;
    let start: Box<Start> = Box::new(Box::new(move || {
        ROLE.set(Some((role, engine)));
        // The name is for those who look; without it the thread does as well.
        let _ = nix::sys::prctl::set_name(role.name());
        body();
    }));
    let argument = Box::into_raw(start);
    let mut attributes = MaybeUninit::uninit();
    let mut thread = MaybeUninit::uninit();
    // SAFETY: the attributes are initialised before use and destroyed after; `argument` becomes the new thread's, which
    // is given to `run_start` alone.
    let outcome = unsafe {
        match libc::pthread_attr_init(attributes.as_mut_ptr()) {
            0 => {
                libc::pthread_attr_setstacksize(attributes.as_mut_ptr(), STACK_BYTES);
                libc::pthread_attr_setdetachstate(attributes.as_mut_ptr(), libc::PTHREAD_CREATE_DETACHED);
                let outcome =
                    libc::pthread_create(thread.as_mut_ptr(), attributes.as_ptr(), run_start, argument.cast());
                libc::pthread_attr_destroy(attributes.as_mut_ptr());
                outcome
            }
            errno => errno,
        }
    };
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None).map_err(Error::sys("restoring the signal mask"))?;
    if outcome != 0 {
        // SAFETY: no thread was started, so it is still ours.
        drop(unsafe { Box::from_raw(argument) });
        return Err(failed(outcome));
    }
    Ok(())
}

type Start = Box<dyn FnOnce() + Send>;

extern "C" fn run_start(argument: *mut libc::c_void) -> *mut libc::c_void {
    // SAFETY: `spawn_in_child` passes a box of this type, once.
    let start = unsafe { Box::from_raw(argument.cast::<Start>()) };
    // A panic must not unwind into the C library; what the guard held is then nobody's, as after its end.
    let _ = catch_unwind(AssertUnwindSafe(start));
    std::ptr::null_mut()
}
