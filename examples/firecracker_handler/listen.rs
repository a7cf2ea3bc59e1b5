//! The socket that VMs connect to, and the signals that end the handler.

use std::fs::{self, Permissions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::vm::{self, Host};

/// Connections whose message is not complete yet, at the most; the next ones wait in the kernel.
const HANDSHAKES_MAX: usize = 64;
/// How long nobody is accepted after that was not possible, in milliseconds: descriptors may be short.
const PAUSE_MS: u8 = 100;
/// How often it is told that nobody can be accepted, at the most.
const TELL: Duration = Duration::from_secs(1);

/// How the handler ends: a first signal says that it shall, a second that it shall at once.
pub(crate) struct Ending {
    signals: SignalFd,
    /// Readable from the first on, for ever.
    begun: EventFd,
    /// From then on, too.
    has_begun: AtomicBool,
    /// From the second on.
    hurried: AtomicBool,
}

impl Ending {
    /// Takes SIGTERM and SIGINT from the calling thread and those that it starts.
    pub(crate) fn on_signals() -> Result<Ending> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGTERM);
        set.add(Signal::SIGINT);
        set.thread_block().context("blocking SIGTERM and SIGINT")?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        Ok(Ending {
            signals: SignalFd::with_flags(&set, flags).context("making a signalfd")?,
            begun: new_event()?,
            has_begun: AtomicBool::new(false),
            hurried: AtomicBool::new(false),
        })
    }

    /// Has the handler end.
    pub(crate) fn begin(&self) {
        self.begin_anew();
    }

    /// Has it end; answers whether it was to end already. Of two threads that call it at once, one is told so.
    fn begin_anew(&self) -> bool {
        let had_begun = self.has_begun.swap(true, Ordering::SeqCst);
        // It fails only where the counter is full: then it is readable.
        let _ = self.begun.write(1);
        had_begun
    }

    /// Is readable when the handler ends.
    pub(crate) fn begun(&self) -> BorrowedFd<'_> {
        self.begun.as_fd()
    }

    pub(crate) fn has_begun(&self) -> bool {
        self.heed();
        self.has_begun.load(Ordering::SeqCst)
    }

    /// Whether it shall end at once.
    pub(crate) fn is_hurried(&self) -> bool {
        self.heed();
        self.hurried.load(Ordering::SeqCst)
    }

    /// Looks whether signals have come.
    fn heed(&self) {
        while let Ok(Some(_)) = self.signals.read_signal() {
            if self.begin_anew() {
                self.hurried.store(true, Ordering::SeqCst);
            }
        }
    }
}

pub(crate) fn new_event() -> Result<EventFd> {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).context("making an eventfd")
}

/// The places of those whose message is not complete yet.
pub(crate) struct Handshakes {
    taken: AtomicUsize,
    /// Readable after one was given back.
    given_back: EventFd,
}

/// One of the places.
pub(crate) struct Place(Arc<Handshakes>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Ordering::SeqCst);
        let _ = self.0.given_back.write(1);
    }
}

/// A listening socket; its file is removed when it is dropped.
pub(crate) struct Listener {
    socket: UnixListener,
    path: PathBuf,
    /// Which file it made: another handler may have put its own there since.
    inode: (u64, u64),
    handshakes: Arc<Handshakes>,
}

impl Listener {
    /// Makes the socket. One that nobody listens at any more is replaced; anything else at that path is left alone.
    pub(crate) fn bind(path: &Path, mode: u32) -> Result<Listener> {
        let shown = path.display();
        let bound = match UnixListener::bind(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                // A connection to whatever else is there is refused, too.
                let is_socket = fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
                ensure!(is_socket, "{shown} is there, and no socket");
                match UnixStream::connect(path) {
                    Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
                    Ok(_) => bail!("somebody listens at {shown} already"),
                    Err(error) => {
                        return Err(error).with_context(|| format!("asking whether anybody listens at {shown}"));
                    }
                }
                fs::remove_file(path).with_context(|| format!("removing the dead socket {shown}"))?;
                UnixListener::bind(path)
            }
            other => other,
        };
        let socket = bound.with_context(|| format!("listening at {shown}"))?;
        let meta = fs::symlink_metadata(path).with_context(|| format!("looking at {shown}"))?;
        let handshakes = Arc::new(Handshakes { taken: AtomicUsize::new(0), given_back: new_event()? });
        let listener = Listener { socket, path: path.into(), inode: (meta.dev(), meta.ino()), handshakes };
        fs::set_permissions(path, Permissions::from_mode(mode)).with_context(|| format!("chmod of {shown}"))?;
        listener.socket.set_nonblocking(true).context("making the socket non-blocking")?;
        Ok(listener)
    }

    /// Accepts VMs until the handler is to end. Nobody is waited for but here.
    pub(crate) fn serve(self, host: &Arc<Host>) -> Result<()> {
        let mut peers = 0;
        let mut told: Option<Instant> = None;
        while !host.ending.has_begun() {
            if self.handshakes.taken.load(Ordering::SeqCst) >= HANDSHAKES_MAX {
                self.wait_for(host, self.handshakes.given_back.as_fd(), PollTimeout::NONE)?;
                // Whether something was there is asked again above.
                let _ = self.handshakes.given_back.read();
                continue;
            }
            match self.socket.accept() {
                Ok((socket, _)) => {
                    peers += 1;
                    self.handshakes.taken.fetch_add(1, Ordering::SeqCst);
                    vm::begin(host, socket, peers, Place(Arc::clone(&self.handshakes)));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.wait_for(host, self.socket.as_fd(), PollTimeout::NONE)?;
                }
                Err(error) if is_passing(&error) => {
                    if told.is_none_or(|told| told.elapsed() >= TELL) {
                        told = Some(Instant::now());
                        host.report.trouble(&format!("nobody can be accepted at the moment: {error}"));
                    }
                    self.wait_for(host, self.handshakes.given_back.as_fd(), PAUSE_MS.into())?;
                    // Places that were given back end one pause, not all that follow.
                    let _ = self.handshakes.given_back.read();
                }
                Err(error) => return Err(error).context("accepting a VM"),
            }
        }
        Ok(())
    }

    /// Waits until a descriptor is readable, or there is a signal, or the handler ends.
    fn wait_for(&self, host: &Host, what: BorrowedFd<'_>, timeout: PollTimeout) -> Result<()> {
        let (signals, begun) = (host.ending.signals.as_fd(), host.ending.begun());
        let mut wanted = [what, signals, begun].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match poll(&mut wanted, timeout) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno).context("waiting for VMs"),
        }
    }
}

/// Whether accepting may be possible again later.
fn is_passing(error: &io::Error) -> bool {
    let known = [Errno::EMFILE, Errno::ENFILE, Errno::ENOBUFS, Errno::ENOMEM, Errno::ECONNABORTED, Errno::EINTR];
    error.raw_os_error().is_some_and(|raw| known.contains(&Errno::from_raw(raw)))
}

impl Drop for Listener {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.inode);
        if ours {
            let _ = fs::remove_file(&self.path);
        }
    }
}
