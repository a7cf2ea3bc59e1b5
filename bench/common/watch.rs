//! An end for whatever hangs: what waits for a page that never comes can't be asked to stop.

use anyhow::{Context, Result};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Seconds after which a pass counts as hung.
pub(crate) const PASS_SECONDS: u32 = 120;

extern "C" fn on_alarm(_: libc::c_int) {
    let text = "a pass has hung: a fault was not answered\n";
    // SAFETY: both calls are async-signal-safe, and the text is as long as it says.
    unsafe {
        libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len());
        libc::_exit(1)
    }
}

/// Ends the process, with a message, if an alarm goes off.
pub(crate) fn watch_passes() -> Result<()> {
    let action = SigAction::new(SigHandler::Handler(on_alarm), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler makes two system calls that are allowed in one.
    unsafe { sigaction(Signal::SIGALRM, &action) }.context("sigaction for SIGALRM")?;
    Ok(())
}
