//! How to wait for an address space that is changing: nothing tells when it no longer is.

use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::{Error, Result};

/// Tries at once: the thread that changes the address space needs the processor to finish.
const EAGER_TRIES: u32 = 1000;
/// Between the tries after that.
const PAUSE: Duration = Duration::from_millis(1);
/// Threads that change an address space without a pause can keep it so for ever.
const LONGEST: Duration = Duration::from_secs(10);

/// Counts the tries of one operation.
pub(crate) struct Patience {
    tries: u32,
    since: Instant,
}

impl Patience {
    pub(crate) fn new() -> Patience {
        Patience { tries: 0, since: Instant::now() }
    }

    /// Waits before the next try; the caller holds no lock.
    ///
    /// # Errors
    ///
    /// [`Error::Sys`] with `EAGAIN` after ten seconds.
    pub(crate) fn wait(&mut self) -> Result<()> {
        self.tries = self.tries.saturating_add(1);
        if self.tries <= EAGER_TRIES {
            std::thread::yield_now();
        } else if self.since.elapsed() < LONGEST {
            std::thread::sleep(PAUSE);
        } else {
            return Err(Error::sys("the address space is changed without a pause: trying for ten seconds")(
                Errno::EAGAIN,
            ));
        }
        Ok(())
    }
}
