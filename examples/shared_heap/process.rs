//! Forked processes that keep step: each waits at a barrier until the driver lets it go on. A socket is the barrier,
//! so that nobody polls, and a process that dies shows as its end of file.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

/// What a process says when it has come to the barrier. Anything else is the text of an error.
const READY: u8 = b'.';
/// What the driver says to let it go on.
const GO: u8 = b'!';

/// A forked process, from the driver's side. Dropping it kills it, so that no error leaves one behind.
pub(crate) struct Process {
    pid: Pid,
    socket: UnixStream,
    reaped: bool,
}

/// The barrier, from the process's side.
pub(crate) struct Barrier(UnixStream);

impl Process {
    /// Forks a process that runs `body` and exits.
    pub(crate) fn fork(body: impl FnOnce(&mut Barrier) -> Result<()>) -> Result<Process> {
        let (socket, theirs) = UnixStream::pair().context("a socket pair")?;
        // SAFETY: the driver prints nothing and holds no lock here, and the C library makes its allocator usable after a
        // fork; the engine's threads are prepared for it by its fork handlers.
        match unsafe { fork() }.context("fork")? {
            // `theirs` is closed here: the process has the only other one, and its end is an end of file.
            ForkResult::Parent { child } => Ok(Process { pid: child, socket, reaped: false }),
            ForkResult::Child => {
                let mut barrier = Barrier(theirs);
                let outcome = catch_unwind(AssertUnwindSafe(|| {
                    // Nobody waits at a barrier whose driver is gone.
                    set_pdeathsig(Signal::SIGKILL).context("prctl(PR_SET_PDEATHSIG)")?;
                    body(&mut barrier)
                }));
                let outcome = outcome.unwrap_or_else(|_| Err(anyhow!("it panicked")));
                if let Err(error) = &outcome {
                    // If the driver is not there to hear it, nobody is.
                    let _ = write!(barrier.0, "{error:#}");
                }
                // SAFETY: ends the process at once, without running the driver's exit handlers.
                unsafe { libc::_exit(i32::from(outcome.is_err())) }
            }
        }
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    /// Waits until the process is at the barrier; its error, or its death, is the error.
    pub(crate) fn wait_until_ready(&mut self) -> Result<()> {
        let mut said = [0];
        if matches!(self.socket.read(&mut said), Ok(1)) && said == [READY] {
            return Ok(());
        }
        let mut text = String::from_utf8_lossy(&said).trim_matches('\0').to_owned();
        // What it could say before it ended.
        let _ = self.socket.read_to_string(&mut text);
        let end = self.reap()?;
        if text.is_empty() {
            bail!("process {} ended early: {end:?}", self.pid)
        }
        bail!("process {}: {text}", self.pid)
    }

    /// Lets the process go on.
    pub(crate) fn go(&mut self) -> Result<()> {
        self.socket.write_all(&[GO]).with_context(|| format!("process {} is gone", self.pid))
    }

    /// Waits until the process has ended.
    pub(crate) fn reap(&mut self) -> Result<WaitStatus> {
        let status = waitpid(self.pid, None).with_context(|| format!("waiting for process {}", self.pid))?;
        self.reaped = true;
        Ok(status)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.reaped {
            let _ = kill(self.pid, Signal::SIGKILL);
            let _ = waitpid(self.pid, None);
        }
    }
}

impl Barrier {
    /// Says that this process has come here, and waits until it may go on.
    pub(crate) fn pass(&mut self) -> Result<()> {
        self.0.write_all(&[READY]).context("the driver is gone")?;
        self.0.read_exact(&mut [0]).context("the driver is gone")
    }
}
