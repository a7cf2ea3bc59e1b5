//! How the engine's own threads are started and recognised.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;

use nix::sys::signal::{SigSet, SigmaskHow, pthread_sigmask};

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
    /// In a forked child: answers faults when the engine is gone.
    Guard,
}

impl Role {
    /// The thread's name, as `/proc/PID/task/TID/comm` shows it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Role::Fault => "kiomap-fault",
            Role::Keeper => "kiomap-keeper",
            Role::Callback => "kiomap-callback",
            Role::Worker => "kiomap-worker",
            Role::Guard => "kiomap-guard",
        }
    }
}

thread_local! {
    static ROLE: Cell<Option<(Role, u64)>> = const { Cell::new(None) };
}

/// Tells what the current thread is for, if it is a thread of engine `engine`.
pub(crate) fn current_role(engine: u64) -> Option<Role> {
    ROLE.get().filter(|(_, id)| *id == engine).map(|(role, _)| role)
}

/// Starts a thread of engine `engine`. It blocks every signal, so that no handler of the application runs on it and
/// no system call of it is interrupted; the caller's mask is left as it was.
pub(crate) fn spawn(role: Role, engine: u64, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    let mut before = SigSet::empty();
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), Some(&mut before))
        .map_err(Error::sys("blocking signals for a thread of the engine"))?;
    let spawned = std::thread::Builder::new().name(role.name().to_owned()).stack_size(512 << 10).spawn(move || {
        ROLE.set(Some((role, engine)));
        body();
    });
    pthread_sigmask(SigmaskHow::SIG_SETMASK, Some(&before), None).map_err(Error::sys("restoring the signal mask"))?;
    spawned.map_err(Error::io("starting a thread of the engine (RLIMIT_NPROC, `ulimit -u`, or the cgroup's pids.max)"))
}

/// Runs code of the application on a thread of the engine: a panic is counted and goes no further.
pub(crate) fn contain(shared: &EngineShared, body: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(body)).is_err() {
        add(&shared.counters.panics, 1);
    }
}
