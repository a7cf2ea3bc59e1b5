//! The system calls that threads of another process make, counted by the kernel's own tracing (ptrace): exact, without
//! privilege, and without a tool that a fresh machine lacks.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use nix::errno::Errno;
use nix::unistd::Pid;

use super::scene::{Told, child};

/// How often each system call was entered, by its number; those of the vDSO are none.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Calls(BTreeMap<i64, u64>);

impl Calls {
    pub(crate) fn of(&self, number: i64) -> u64 {
        self.0.get(&number).copied().unwrap_or(0)
    }

    /// All of them, but for looks at the clock, which are system calls only where the machine has no clock for the vDSO.
    pub(crate) fn all(&self) -> u64 {
        self.0.iter().filter(|(number, _)| **number != libc::SYS_clock_gettime).map(|(_, count)| count).sum()
    }
}

fn ptrace(request: libc::c_uint, thread: Pid, addr: usize, data: usize) -> nix::Result<libc::c_long> {
    // SAFETY: each request here takes plain numbers, or the address of a value of ours that outlives the call.
    Errno::result(unsafe { libc::ptrace(request, thread.as_raw(), addr, data) })
}

/// The threads of a process whose names begin so.
fn threads_of(process: Pid, name: &str) -> Vec<Pid> {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).unwrap().map(Result::unwrap);
    let named =
        tasks.filter(|task| std::fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.starts_with(name)));
    named.map(|task| Pid::from_raw(task.file_name().to_str().unwrap().parse().unwrap())).collect()
}

/// Runs a scene in a forked process: `prepare` makes ready, and what it returns is run while the system calls of the
/// threads are counted whose names begin with `name`. The process then ends at once, without making anything undone.
///
/// # Errors
///
/// Why the kernel lets nobody trace here.
pub(crate) fn calls_of<P: FnOnce()>(name: &str, prepare: impl FnOnce() -> P) -> nix::Result<Calls> {
    let (ready, go_on) = (Told::new(), Told::new());
    let process = child(|| {
        let prepared = catch_unwind(AssertUnwindSafe(prepare));
        ready.tell(prepared.is_ok().into());
        let scene = prepared.unwrap();
        go_on.wait();
        scene();
        // SAFETY: ends the process; what the threads would do at an orderly end is not what is counted.
        unsafe { libc::_exit(0) }
    });
    ready.wait_for(1);
    let threads = threads_of(process, name);
    assert!(!threads.is_empty(), "no thread is named {name}");
    let attached = threads.iter().try_for_each(|&thread| {
        // EXITKILL: a test that fails leaves no stopped process behind.
        let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_EXITKILL;
        ptrace(libc::PTRACE_SEIZE, thread, 0, options as usize)?;
        ptrace(libc::PTRACE_INTERRUPT, thread, 0, 0)?;
        // Its stop.
        wait(thread);
        ptrace(libc::PTRACE_SYSCALL, thread, 0, 0).map(drop)
    });
    if let Err(errno) = attached {
        super::scene::kill_and_reap(process);
        return Err(errno);
    }
    go_on.tell(1);
    let calls = count_until_the_end(process);
    Ok(calls)
}

fn wait(thread: Pid) -> (Pid, libc::c_int) {
    let mut status = 0;
    // SAFETY: the status is ours.
    let changed = Errno::result(unsafe { libc::waitpid(thread.as_raw(), &mut status, libc::__WALL) });
    (Pid::from_raw(changed.unwrap()), status)
}

fn count_until_the_end(process: Pid) -> Calls {
    const EVERYONE: Pid = Pid::from_raw(-1);
    let mut calls = Calls::default();
    loop {
        let (changed, status) = wait(EVERYONE);
        if !libc::WIFSTOPPED(status) {
            if changed == process {
                assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0, "the scene ended with {status:#x}");
                return calls;
            }
            // A thread of it.
            continue;
        }
        let signal = libc::WSTOPSIG(status);
        let is_call = signal == libc::SIGTRAP | 0x80;
        if is_call && let Some(number) = entered(changed) {
            *calls.0.entry(number).or_default() += 1;
        }
        // A signal is passed on; what stopped it for tracing is not one.
        let pass_on = if is_call || status >> 16 != 0 { 0 } else { signal as usize };
        // One that was killed meanwhile is reported next.
        let _ = ptrace(libc::PTRACE_SYSCALL, changed, 0, pass_on);
    }
}

/// The number of the system call that a stopped thread is about to enter; none if it is about to leave one.
fn entered(thread: Pid) -> Option<i64> {
    // SAFETY: plain numbers, for which zeros are valid.
    let mut info: libc::ptrace_syscall_info = unsafe { std::mem::zeroed() };
    let size = size_of_val(&info);
    ptrace(libc::PTRACE_GET_SYSCALL_INFO, thread, size, (&raw mut info).expose_provenance()).ok()?;
    // SAFETY: the kernel says which of the variants it has filled.
    (info.op == libc::PTRACE_SYSCALL_INFO_ENTRY).then_some(unsafe { info.u.entry.nr as i64 })
}
