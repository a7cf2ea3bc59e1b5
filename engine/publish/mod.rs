//! Publishing a vmap at a Unix socket, for processes that were not forked from the engine's.
//!
//! Who connects is asked for its credentials, and the application's policy says what it gets: nothing, or the memfd, for
//! writing or for reading only. From then on the connection is its lifeline, and it is served, counted, forked, and dies as a
//! forked child. But unlike one it is not trusted: what it says is looked at before it is believed (`outsider.rs`).

mod client;
mod descriptor;
pub mod fuzzing;
mod listener;
pub(crate) mod outsider;

use std::fs::Permissions;
use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Whence, lseek};

pub use client::{Client, ClientOptions, ConnectFault};
pub(crate) use descriptor::{discard, discard_of};
pub(crate) use listener::tell_shed;
pub use outsider::{CLIENT_AREAS_MAX, PeerCredentials};

use crate::kiobuf::ExtentKind;
use crate::page::page_size;
use crate::process::ledger::{self, Private};
use crate::runtime::handles::Request;
use crate::runtime::threads::{self, Role};
use crate::stats::SpaceStats;
use crate::trace::tell;
use crate::vmap::fill::{FillProgress, fill_all};
use crate::vmap::{Vmap, owner_only, refuse_nested};
use crate::{Error, Result};
use listener::{Listener, Policy};
use outsider::{Most, Publication};

/// Says what a process gets that connects ([`PublishOptions::policy`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Access {
    /// Nothing.
    Refused,
    /// The vmap, for reading only; where [`PublishOptions::read_only_clients`] prepared that, else nothing.
    ReadOnly,
    /// The vmap, for reading and writing: it is trusted with the contents.
    ReadWrite,
}

/// Says how a vmap is published ([`Vmap::publish`]).
pub struct PublishOptions {
    mode: u32,
    policy: Policy,
    read_only_clients: bool,
    processes: usize,
    processes_per_client: usize,
    greeting: Duration,
}

impl Default for PublishOptions {
    fn default() -> Self {
        let own = nix::unistd::geteuid().as_raw();
        PublishOptions {
            mode: 0o600,
            policy: Box::new(move |peer| if peer.uid == own { Access::ReadWrite } else { Access::Refused }),
            read_only_clients: false,
            processes: 1024,
            processes_per_client: usize::MAX,
            greeting: Duration::from_secs(5),
        }
    }
}

impl PublishOptions {
    /// Begins with the default: for processes of the same user, read-write.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the mode of the socket, 0600 unless set: who may not write to it can't connect.
    #[must_use]
    pub fn mode(mut self, mode: u32) -> Self {
        self.mode = mode;
        self
    }

    /// Sets who gets what; processes of the same effective user everything, others nothing, unless set.
    ///
    /// It is asked once for each connection, on a thread of the engine, outside every lock. Other processes that connect wait
    /// until it has returned. If it panics, the answer is no.
    #[must_use]
    pub fn policy(mut self, policy: impl Fn(&PeerCredentials) -> Access + Send + 'static) -> Self {
        self.policy = Box::new(policy);
        self
    }

    /// Allows [`Access::ReadOnly`]. All pages are then brought first, and can't be taken away as long as the vmap lives
    /// ([`Revoke::Hard`](crate::Revoke::Hard) is refused): whoever has a descriptor of the memfd can map it past the engine, and
    /// a touch of what is missing would be a page of zeros for everybody.
    #[must_use]
    pub fn read_only_clients(mut self, allowed: bool) -> Self {
        self.read_only_clients = allowed;
        self
    }

    /// Sets how many processes are served at once over this socket, those that they fork included; 1024 unless set. Each takes
    /// five descriptors of this process at the most.
    #[must_use]
    pub fn processes(mut self, most: usize) -> Self {
        self.processes = most;
        self
    }

    /// Sets to how many of these processes one that connects may come, itself and those that it forks included; unless set, to all
    /// of them. A fork beyond that gets no regions, as one beyond [`PublishOptions::processes`].
    #[must_use]
    pub fn processes_per_client(mut self, most: usize) -> Self {
        self.processes_per_client = most;
        self
    }

    /// Sets how long a connection may say nothing before it is cut, before each of its two greetings; 5 seconds unless set.
    #[must_use]
    pub fn greeting_timeout(mut self, timeout: Duration) -> Self {
        self.greeting = timeout;
        self
    }
}

impl std::fmt::Debug for PublishOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PublishOptions")
            .field("mode", &format_args!("{:o}", self.mode))
            .field("read_only_clients", &self.read_only_clients)
            .field("processes", &self.processes)
            .field("processes_per_client", &self.processes_per_client)
            .finish_non_exhaustive()
    }
}

/// A vmap at a socket; dropping it ends the listening and removes the socket. Processes that are served by then stay.
#[derive(Debug)]
pub struct Published {
    path: PathBuf,
    vmap: Vmap,
    publication: Arc<Publication>,
    listener: Option<JoinHandle<()>>,
}

impl Published {
    /// Returns the path of the socket, absolute.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the vmap.
    pub fn vmap(&self) -> &Vmap {
        &self.vmap
    }

    /// Returns the processes that are served over this socket, those that they forked included.
    ///
    /// # Errors
    ///
    /// [`Error::NotOwner`] in a forked child.
    pub fn clients(&self) -> Result<Vec<SpaceStats>> {
        if self.vmap.shared.is_child() {
            return Err(Error::NotOwner { what: "listing clients" });
        }
        Ok(self.publication.served().iter().map(|counters| counters.snapshot()).collect())
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        let Some(listener) = self.listener.take() else { return };
        if self.vmap.shared.is_child() {
            // The thread, the socket and its path are the parent's.
            std::mem::forget(listener);
            return;
        }
        self.publication.stop();
        // From the policy, it would wait for itself.
        if threads::current_role(self.vmap.shared.id) != Some(Role::Publish) {
            let _ = listener.join();
        }
    }
}

impl Vmap {
    /// Publishes the vmap at a Unix socket: any process that the policy lets in attaches it with [`Client::attach`]. It can be
    /// published at several.
    ///
    /// # Errors
    ///
    /// [`Error::Sys`] with `EADDRINUSE` for a path that exists, unless it is a socket that nobody listens to any more; with
    /// `ENAMETOOLONG` for one of more than 107 bytes; with another errno of making the socket or its thread.
    /// [`Error::NotOwner`], [`Error::Shutdown`].
    ///
    /// With [`PublishOptions::read_only_clients`], [`Error::Invalid`] for a vmap that has holes, is
    /// [`expandable`](crate::VmapBuilder::expandable), or shows a memfd itself; [`Error::NotPopulated`] when a page can't be had.
    pub fn publish(&self, path: impl AsRef<Path>, options: PublishOptions) -> Result<Published> {
        self.publish_with(path, options, |_| ControlFlow::Continue(()))
    }

    /// As [`Vmap::publish`], and tells how far the pages have been brought that read-only clients need, until it breaks:
    /// [`Error::NotPopulated`] then.
    ///
    /// # Errors
    ///
    /// As [`Vmap::publish`].
    pub fn publish_with(
        &self,
        path: impl AsRef<Path>,
        options: PublishOptions,
        progress: impl FnMut(FillProgress) -> ControlFlow<()>,
    ) -> Result<Published> {
        owner_only(&self.shared, "publishing a vmap at a socket")?;
        refuse_nested("publishing a vmap at a socket")?;
        let path = std::path::absolute(path).map_err(Error::io("making the path of a socket absolute"))?;
        let PublishOptions { mode, policy, read_only_clients, processes, processes_per_client, greeting } = options;
        let most = Most { processes, of_a_client: processes_per_client };
        let for_reading = if read_only_clients { Some(self.make_whole(progress)?) } else { None };
        let listened = listening(&path, mode).and_then(|(socket, identity)| {
            let publication = Arc::new(Publication::new(self.core.id, most, greeting)?);
            let listener = Listener {
                socket,
                path: SocketPath { path: path.clone(), identity },
                shared: Arc::clone(&self.shared),
                core: Arc::downgrade(&self.core),
                publication: Arc::clone(&publication),
                policy,
                for_reading,
            };
            let thread = threads::spawn(Role::Publish, self.shared.id, move || listener.run())?;
            Ok((publication, thread))
        });
        let (publication, thread) = listened.inspect_err(|_| {
            if read_only_clients {
                self.core.stays_whole.fetch_sub(1, Ordering::Relaxed);
            }
        })?;
        // It ends with the engine.
        self.shared.keeper.send(Request::Published { publication: Arc::downgrade(&publication) });
        if self.shared.retired.load(Ordering::SeqCst) {
            // Perhaps nobody hears that any more.
            publication.stop();
        }
        tell!(
            INFO,
            "kiomap::publish",
            "listens",
            engine = self.shared.id,
            vmap = self.core.id,
            path = path.display().to_string()
        );
        Ok(Published { path, vmap: self.clone(), publication, listener: Some(thread) })
    }

    /// Brings all pages, to stay, and makes a descriptor of the memfd by which they can't be changed.
    fn make_whole(&self, mut progress: impl FnMut(FillProgress) -> ControlFlow<()>) -> Result<OwnedFd> {
        let refused = |rule| {
            Err(Error::Invalid {
                what: "the id of the vmap to be published for reading only",
                value: self.core.id,
                rule,
            })
        };
        if self.shares_pages() {
            return refused("it must not show a memfd itself: others can take its pages away");
        }
        if self.core.expandable {
            return refused("it must not be expandable: what is appended would be missing");
        }
        {
            // From here on nobody takes a page away.
            let _in_use = self.exclude_owner_io();
            let list = self.core.contents().list;
            let is_whole =
                list.nr_pages() >= self.nr_pages() && list.extents().all(|extent| extent.kind != ExtentKind::Hole);
            if !is_whole && self.first_missing()?.is_some() {
                return refused(
                    "it must have no holes, and not have been revoked: what is missing can be made zeros by a reader",
                );
            }
            self.core.stays_whole.fetch_add(1, Ordering::Relaxed);
        }
        let opened = self.fill_whole(&mut progress).and_then(|()| self.open_for_reading());
        if opened.is_err() {
            self.core.stays_whole.fetch_sub(1, Ordering::Relaxed);
        }
        opened
    }

    /// Brings all pages.
    fn fill_whole(&self, mut progress: impl FnMut(FillProgress) -> ControlFlow<()>) -> Result<()> {
        let (mut done, mut failed) = (0, 0);
        fill_all(&self.shared, &[Arc::clone(&self.core)], |so_far| {
            (done, failed) = (so_far.pages_done, so_far.pages_failed);
            progress(so_far)
        });
        // The list may have been taken back meanwhile: what counts is what is there.
        let Some(pgoff) = self.first_missing()? else { return Ok(()) };
        let wanted = self.nr_pages();
        let why = if failed > 0 { "its source failed" } else { "bringing the pages was broken off" };
        // At least that one, if the others were taken back.
        let missing = (wanted.saturating_sub(done) + failed).max(1);
        Err(Error::NotPopulated { pgoff, why: why.into(), missing, wanted })
    }

    /// The first page that the backing object does not hold.
    fn first_missing(&self) -> Result<Option<u64>> {
        let nr_pages = self.nr_pages();
        if self.core.page().is_huge() {
            // There the kernel tells no holes.
            let window = self.core.contents().window;
            let mut pages = (0..nr_pages).step_by(self.core.page().base_pages() as usize);
            return Ok(pages.find(|&pgoff| !window.as_ref().is_some_and(|window| window.holds(pgoff))));
        }
        if nr_pages == 0 {
            return Ok(None);
        }
        // Pages that are swapped out are none. The offset is nobody's.
        let hole = lseek(self.core.memfd(), 0, Whence::SeekHole).map_err(Error::sys("lseek for what is missing"))?;
        let pgoff = hole as u64 / page_size() as u64;
        Ok((pgoff < nr_pages).then_some(pgoff))
    }

    /// Makes a descriptor of the memfd by which its pages can't be changed.
    fn open_for_reading(&self) -> Result<OwnedFd> {
        // Through /proc, others would open it again for writing.
        fchmod(self.core.memfd(), Mode::S_IRUSR).map_err(Error::sys("fchmod of the memfd of a vmap"))?;
        let path = format!("/proc/thread-self/fd/{}", self.core.memfd().as_raw_fd());
        nix::fcntl::open(path.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
            .map_err(Error::sys("opening the memfd of a vmap for reading only"))
    }
}

/// A path's device and inode.
type PathId = (u64, u64);

/// Makes the socket, and says what its path names.
fn listening(path: &Path, mode: u32) -> Result<(Private<OwnedFd>, PathId)> {
    let address = UnixAddr::new(path).map_err(Error::sys("the path of a socket"))?;
    let new_socket =
        || socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None);
    let failed = Error::sys("making a socket to publish a vmap at");
    let socket = Private::open(new_socket).map_err(&failed)?;
    if let Err(errno) = bind(socket.as_raw_fd(), &address) {
        let is_socket = std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
        if errno != Errno::EADDRINUSE || !is_socket {
            return Err(failed(errno));
        }
        let probe = Private::open(new_socket).map_err(&failed)?;
        if connect(probe.as_raw_fd(), &address) != Err(Errno::ECONNREFUSED) {
            return Err(failed(Errno::EADDRINUSE));
        }
        // Who listened there is gone.
        nix::unistd::unlink(path).map_err(&failed)?;
        bind(socket.as_raw_fd(), &address).map_err(&failed)?;
    }
    let made = std::fs::set_permissions(path, Permissions::from_mode(mode))
        .and_then(|()| std::fs::symlink_metadata(path))
        .map_err(Error::io("setting the mode of a socket"))
        // Nobody can connect before this, whatever the mode was.
        .and_then(|found| listen(&*socket, Backlog::MAXCONN).map(|()| found).map_err(&failed));
    match made {
        Ok(found) => Ok((socket, (found.dev(), found.ino()))),
        Err(error) => {
            let _ = nix::unistd::unlink(path);
            Err(error)
        }
    }
}

/// The path of a socket, which is removed with this value if it still names the socket.
struct SocketPath {
    path: PathBuf,
    identity: PathId,
}

impl Drop for SocketPath {
    fn drop(&mut self) {
        let named = std::fs::symlink_metadata(&self.path);
        if named.is_ok_and(|found| (found.dev(), found.ino()) == self.identity) {
            let _ = nix::unistd::unlink(&self.path);
        }
    }
}

/// Accepts a connection, of which no forked child gets a copy.
fn accept(listener: &Private<OwnedFd>) -> nix::Result<Private<OwnedFd>> {
    let mut ledger = ledger::lock();
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = nix::sys::socket::accept4(listener.as_raw_fd(), flags)?;
    // SAFETY: the kernel has just made it for us.
    Ok(ledger.adopt(unsafe { std::os::fd::FromRawFd::from_raw_fd(fd) }))
}
