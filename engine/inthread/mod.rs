//! In-thread delivery: the thread that touches a missing page brings it itself, in a SIGBUS handler.
//!
//! With UFFD_FEATURE_SIGBUS the kernel sends no message about a missing page and puts no thread to sleep: it raises
//! SIGBUS in the thread that touched. The handler looks the page up, installs it and returns, and the touch is made
//! again: no other thread, no switch. Events (unmaps, moves) still go to the fault-handling thread, which remains the
//! only writer of the area table; a [`Crossing`](crate::runtime::crossing::Crossing) keeps it and the touching threads apart.

mod answer;
mod ask;
mod desk;
mod doubt;
mod signal;

use crate::kiobuf::{ExtentInfo, ExtentKind, Kiobuf};
use crate::runtime::shared::EngineShared;
use crate::sys::{Features, Opener};
use crate::{Error, Result};

pub(crate) use desk::Desk;

/// How the engine's own process gets missing pages ([`EngineBuilder::delivery`](crate::EngineBuilder::delivery)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Delivery {
    /// From the fault-handling thread: system calls reach missing pages too (where
    /// [`OpenWay::serves_kernel_faults`](crate::OpenWay::serves_kernel_faults)), sources may be slow, and no signal handler
    /// is installed.
    #[default]
    Handler,
    /// From the touching thread itself, in a SIGBUS handler that the engine installs. A fault takes less time, as no
    /// other thread has to run, and threads that touch at once don't queue.
    ///
    /// What it costs:
    ///
    /// - **System calls answer `EFAULT` on missing pages** (read, write, futex, O_DIRECT, io_uring …), whatever the way
    ///   the userfaultfd was opened: bring the range first, with [`Region::prefault`](crate::Region::prefault).
    ///   `mlock` and `MADV_POPULATE_READ` fail alike. The accessors of [`Region`](crate::Region) and
    ///   [`Vmap`](crate::Vmap) work.
    /// - **The engine owns SIGBUS.** What is not its own it passes on to the action that was there before, as if it were
    ///   not there ([`in_thread`]). It stays installed as long as the process lives.
    /// - **A thread that blocks SIGBUS must not touch a missing page**: the kernel ends the process then.
    /// - **Only pages that can be had at once**: memory, arenas, zeros and holes, and a memfd that is shown itself
    ///   ([`Backing`](crate::Backing)). A list with a file or a [`PageSource`](crate::PageSource) is refused when it is published.
    /// - **Stacks must not lie in a region**, other than alternate ones for other signals: the kernel puts the signal's
    ///   frame there. A touch takes up to three kilobytes of the alternate signal stack, if the thread has one, besides the
    ///   kernel's frame (`AT_MINSIGSTKSZ`); a SIGBUS handler of the application that itself touches missing pages takes
    ///   both twice.
    /// - **Debuggers stop at each fault**: `handle SIGBUS nostop noprint pass` in gdb. One that stops a single thread within a
    ///   fault, and lets others run, has their unmaps of regions wait until it goes on.
    ///
    /// - [`Engine::fault_latency`](crate::Engine::fault_latency) does not hold these faults, and
    ///   [`Stats::pages_poisoned`](crate::Stats::pages_poisoned) counts each touch of a page that can't be had.
    ///
    /// Forked children are served as with [`Delivery::Handler`].
    ///
    /// ```
    /// use kiomap::{AttachOptions, Delivery, Engine, Kiobuf, page_size};
    ///
    /// # fn main() -> kiomap::Result<()> {
    /// let engine = Engine::builder().delivery(Delivery::InThread).build()?;
    /// let mut list = Kiobuf::new();
    /// list.map_bytes(vec![7; 100 * page_size()])?;
    /// let region = engine.vmap(&list)?.attach(&AttachOptions::new())?;
    /// let mut byte = [0];
    /// region.read_at(42 * page_size(), &mut byte)?;
    /// assert_eq!(byte, [7]);
    /// // Before a system call that reads from the region, or writes to it:
    /// region.prefault(50 * page_size()..60 * page_size())?;
    /// # Ok(())
    /// # }
    /// ```
    InThread,
}

/// Adds what a delivery needs to the features of the engine's own userfaultfd.
///
/// # Errors
///
/// [`Error::Unsupported`] when the kernel lacks it or `without` takes it away.
pub(crate) fn with_delivery(
    chosen: Features,
    delivery: Delivery,
    opener: &Opener,
    without: Features,
) -> Result<Features> {
    if delivery == Delivery::Handler {
        return Ok(chosen);
    }
    if !opener.available()?.difference(without).contains(Features::SIGBUS) {
        return Err(Error::Unsupported {
            what: "in-thread delivery",
            missing: Features::SIGBUS,
            why: "without it a missing page is told to another thread only; build with Delivery::Handler",
        });
    }
    Ok(chosen | Features::SIGBUS)
}

/// Puts the SIGBUS handler before the application's, for an engine that needs it.
pub(crate) fn begin(shared: &EngineShared) {
    if shared.delivers_in_thread() {
        signal::install();
    }
}

/// Refuses a list whose pages would have to be waited for, where a signal handler is to bring them.
pub(crate) fn refuse_blocking(shared: &EngineShared, list: &Kiobuf) -> Result<()> {
    if !shared.delivers_in_thread() {
        return Ok(());
    }
    let refused = |ExtentInfo { kind, first_page, .. }: ExtentInfo| {
        let (what, rule) = match kind {
            ExtentKind::Memory | ExtentKind::Zero | ExtentKind::Hole => return None,
            ExtentKind::File => (
                "the first page of a file in the list",
                "a signal handler can't wait for a disk: read it into an Arena, or build the engine with Delivery::Handler",
            ),
            ExtentKind::Memfd => (
                "the first page of a memfd in the list",
                "a signal handler can't read it: publish it alone, so that it is shown itself, or build the engine with Delivery::Handler",
            ),
            ExtentKind::Source => (
                "the first page of a page source in the list",
                "a signal handler can't call it: fill an Arena from it, or build the engine with Delivery::Handler",
            ),
        };
        Some(Error::Invalid { what, value: first_page, rule })
    };
    list.extents().find_map(refused).map_or(Ok(()), Err)
}

/// The SIGBUS handler of in-thread delivery ([`Delivery::InThread`]), for applications that have one of their own.
///
/// The first engine that is built with in-thread delivery installs it, with SA_SIGINFO and SA_ONSTACK, once for all
/// engines of the process; it is never removed. A signal that is no engine's, which is one for a page that can't be had,
/// past the end of any mapped file, for broken memory or sent by `kill`, goes to the action that was there before:
///
/// - a function gets the signal's own siginfo and context, under the signal mask that its `sa_mask` and SA_NODEFER ask for,
///   and once only if SA_RESETHAND says so. It runs on the thread's alternate stack if there is one, whether it asked
///   for that or not. It may return, change the context, or jump out.
/// - the default action ends the process with SIGBUS, by the touch itself, so that a core shows where. To ignore SIGBUS
///   has the kernel do the same, except for one that was sent.
///
/// An application that installs a handler *later* takes the place of the engine's. Either it passes on what is not its
/// own to the action that `sigaction` returned to it, as every such handler should, or the engine has to be put before it
/// again, by [`reinstall`](in_thread::reinstall). Until then touches of missing pages go to that handler.
pub mod in_thread {
    use super::signal;

    /// Tells whether SIGBUS reaches the engine's handler first. If not, all is well still if the handler that does passes on
    /// what is not its own.
    pub fn is_installed() -> bool {
        signal::is_on_top()
    }

    /// Puts the engine's handler before an action that the application has installed since, which is from then on what signals
    /// are passed on to; tells whether there was one. It does nothing in a process without engines with in-thread
    /// delivery.
    ///
    /// It is safe too if that action passes on to the engine's handler: no signal goes round in circles.
    pub fn reinstall() -> bool {
        signal::was_installed() && signal::install()
    }
}
