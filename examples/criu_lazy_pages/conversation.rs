//! What `criu restore --lazy-pages` says over its socket: its tasks with their userfaultfds, and that the restore has finished.
//!
//! It connects once, and is never answered. Whoever may connect hands over memory to be filled, so the socket is its owner's only.

use std::fs::{self, File, Permissions};
use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use super::stop::Stop;

/// The name of the socket in the folder in which CRIU works.
const SOCKET: &str = "lazy-pages.socket";
/// What is sent when the tree is restored.
pub(crate) const RESTORED: u32 = 0x5253_5446;

/// A socket that waits for CRIU. Its name goes with it.
pub(crate) struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

/// A restore that is going on.
pub(crate) struct Conversation<'a> {
    stream: UnixStream,
    stop: &'a Stop,
}

/// A task as it is announced.
pub(crate) struct Announced {
    pub(crate) pid: i32,
    /// None for a zombie.
    pub(crate) uffd: Option<OwnedFd>,
}

/// Keeps others of this program away from a folder, as long as what is returned lives.
pub(crate) fn lock(folder: &Path) -> Result<Flock<File>> {
    let opened = File::open(folder).with_context(|| format!("opening {}", folder.display()))?;
    match Flock::lock(opened, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((_, Errno::EWOULDBLOCK)) => bail!("another criu_lazy_pages serves {}", folder.display()),
        Err((_, errno)) => Err(errno).with_context(|| format!("locking {}", folder.display())),
    }
}

impl Listener {
    /// Listens in a folder, which becomes the current one. A socket that another one left behind is replaced.
    pub(crate) fn new(folder: &Path) -> Result<Listener> {
        let path = folder.join(SOCKET);
        // A socket's address is short: it is bound by its name alone. And whoever sees that name can connect.
        std::env::set_current_dir(folder).with_context(|| format!("going to {}", folder.display()))?;
        let unready = format!("{SOCKET}.{}", std::process::id());
        let listen = || {
            let socket = UnixListener::bind(&unready)?;
            fs::set_permissions(&unready, Permissions::from_mode(0o600))?;
            fs::rename(&unready, SOCKET)?;
            Ok::<_, std::io::Error>(socket)
        };
        let listened = listen().inspect_err(|_| {
            // What made it fail is told.
            let _ = fs::remove_file(&unready);
        });
        let socket = listened.with_context(|| format!("listening on {}", path.display()))?;
        Ok(Listener { socket, path })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for CRIU, which connects once: nobody else can from then on.
    pub(crate) fn accept(self, stop: &Stop) -> Result<Conversation<'_>> {
        stop.wait_readable(self.socket.as_fd())?;
        let (stream, _) = self.socket.accept().with_context(|| format!("accepting on {}", self.path.display()))?;
        Ok(Conversation { stream, stop })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // It may be somebody else's problem by now: a folder that is gone.
        let _ = fs::remove_file(&self.path);
    }
}

impl Conversation<'_> {
    /// Receives a task.
    pub(crate) fn next_task(&self) -> Result<Announced> {
        let mut bytes = [0; 4];
        self.read(&mut bytes, false).context("reading a pid")?;
        ensure!(u32::from_ne_bytes(bytes) != RESTORED, "CRIU says that the restore has finished before all tasks came");
        let said = i32::from_ne_bytes(bytes);
        let pid = said.checked_abs().filter(|pid| *pid != 0).with_context(|| format!("pid {said} is none"))?;
        if said < 0 {
            return Ok(Announced { pid, uffd: None });
        }
        let mut byte = [0];
        let mut fds = self.read(&mut byte, true).with_context(|| format!("reading the userfaultfd of task {pid}"))?;
        ensure!(byte == [0], "the message with the userfaultfd of task {pid} is {:#x}, not 0", byte[0]);
        ensure!(fds.len() == 1, "with task {pid} came {} descriptors, not one", fds.len());
        Ok(Announced { pid, uffd: fds.pop() })
    }

    /// Waits until the tree is restored and runs.
    pub(crate) fn wait_restored(&self) -> Result<()> {
        let mut bytes = [0; 4];
        self.read(&mut bytes, false).context("waiting for the restore to finish")?;
        let said = u32::from_ne_bytes(bytes);
        ensure!(said == RESTORED, "after all tasks CRIU says {said:#x}, not {RESTORED:#x}");
        Ok(())
    }

    /// Fills a buffer, to the last byte; answers with the descriptors that came, which are none unless they may.
    fn read(&self, buf: &mut [u8], with_fds: bool) -> Result<Vec<OwnedFd>> {
        let (mut done, mut fds) = (0, Vec::new());
        while done < buf.len() {
            self.stop.wait_readable(self.stream.as_fd())?;
            let count = match self.receive(&mut buf[done..], &mut fds) {
                Ok(count) => count,
                Err(Errno::EINTR) => continue,
                // Something that was sent to CRIU and not read there: it is gone all the same.
                Err(Errno::ECONNRESET) => 0,
                Err(Errno::ENOBUFS) => {
                    bail!("more descriptors came than one, or than RLIMIT_NOFILE lets this process have")
                }
                Err(errno) => return Err(errno).context("receiving"),
            };
            ensure!(count != 0, "CRIU hung up: the restore failed");
            ensure!(with_fds || fds.is_empty(), "a descriptor came that belongs to no task");
            done += count;
        }
        Ok(fds)
    }

    /// Receives some bytes, and the descriptors that come with them; ENOBUFS if not all of those could be had.
    fn receive(&self, buf: &mut [u8], fds: &mut Vec<OwnedFd>) -> nix::Result<usize> {
        let mut control = nix::cmsg_space!([i32; 4]);
        let mut slices = [IoSliceMut::new(buf)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(self.stream.as_raw_fd(), &mut slices, Some(&mut control), flags)?;
        for part in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(numbers) = part {
                // SAFETY: the kernel has just put these descriptors into this process for this message, and nobody else
                // knows their numbers.
                fds.extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
            }
        }
        Ok(message.bytes)
    }
}
