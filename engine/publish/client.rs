//! The client of a published vmap: a process that was not forked from the engine's, made as one that was.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, connect, getsockopt, setsockopt, socket, sockopt,
};
use nix::sys::stat::fstat;
use nix::sys::statfs::fstatfs;
use nix::sys::time::{TimeVal, TimeValLike};
use nix::unistd::{Whence, geteuid, lseek};

use super::descriptor::{Kind, kind_of};
use crate::fork::link::{Lifeline, Local};
use crate::fork::wire::{self, Failed, FrameFault, Knock, Offer, VERSION, Welcome};
use crate::fork::{self, Newcomer};
use crate::process::ledger::Private;
use crate::process::mask;
use crate::runtime::shared::EngineShared;
use crate::sys::{DEFAULT_WAYS, Features, OpenWay, Opener};
use crate::vmap::Vmap;
use crate::vmap::core::VmapCore;
use crate::vmap::object::Object;
use crate::vmap::page_size::PageSize;
use crate::vmap::residency::Residency;
use crate::{Error, Result};

/// The pause before another try where too many wait to be accepted.
const BACKLOG_PAUSE: Duration = Duration::from_millis(1);

/// Settings of a client ([`Client::attach`]).
#[derive(Debug, Clone)]
#[must_use]
pub struct ClientOptions {
    timeout: Duration,
    read_only: bool,
    ways: Vec<OpenWay>,
    server_uid: Option<u32>,
}

impl Default for ClientOptions {
    fn default() -> Self {
        ClientOptions {
            timeout: Duration::from_secs(5),
            read_only: false,
            ways: DEFAULT_WAYS.to_vec(),
            server_uid: None,
        }
    }
}

impl ClientOptions {
    /// Begins with the default: for reading and writing, within 5 seconds.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets how long it may take until this process is served; 5 seconds unless set.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Asks for reading only. Regions must then be attached
    /// [`read_only`](crate::AttachOptions::read_only). They are mapped without the engine, as all pages are there: forked
    /// children do not get them, and they must not be unmapped, moved or replaced by raw system calls, of which nobody would tell.
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// Sets which ways to open a userfaultfd are tried, in which order; device, system call, user-mode-only unless set.
    pub fn open_ways(mut self, ways: &[OpenWay]) -> Self {
        self.ways = ways.to_vec();
        self
    }

    /// Sets the user whose process may be the server, by its effective id when it began to listen, and no other; this
    /// process's own effective user and root unless set.
    pub fn server_uid(mut self, uid: u32) -> Self {
        self.server_uid = Some(uid);
        self
    }
}

/// Says why no published vmap could be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConnectFault {
    /// Nobody could be reached, with the errno of connect(2): `ENOENT` where nothing is, `ECONNREFUSED` where nobody listens
    /// any more, `EACCES` for want of write permission on the socket, `EPROTOTYPE` at a socket of another kind.
    Unreachable(Errno),
    /// The engine did not answer in time (`ETIMEDOUT`).
    TimedOut,
    /// The policy of the engine's process refuses this process, or reading only is not prepared there (`EACCES`).
    Denied,
    /// As many processes are served as may be, or the engine has no descriptor or memory for one more (`EAGAIN`).
    Full,
    /// It may be had for reading only ([`ClientOptions::read_only`]; `EROFS`).
    ReadOnly,
    /// The engine was shut down, or its process has ended (`ESHUTDOWN`).
    Closed,
    /// The other side has another version of the library (`EPROTONOSUPPORT`).
    Version {
        /// The version of its frames.
        theirs: u32,
        /// That of this library's.
        ours: u32,
    },
    /// What listens there does not speak this protocol, or says what can't be (`EPROTO`).
    Protocol,
    /// What was offered as the memory of a vmap is none (`EBADF`).
    Memory,
    /// Who listens there is of a user that is not trusted to serve ([`ClientOptions::server_uid`]; `EPERM`).
    Server {
        /// That user.
        uid: u32,
    },
}

impl ConnectFault {
    /// Returns the errno that stands for this fault.
    pub(crate) fn errno(self) -> Errno {
        match self {
            ConnectFault::Unreachable(errno) => errno,
            ConnectFault::TimedOut => Errno::ETIMEDOUT,
            ConnectFault::Denied => Errno::EACCES,
            ConnectFault::Full => Errno::EAGAIN,
            ConnectFault::ReadOnly => Errno::EROFS,
            ConnectFault::Closed => Errno::ESHUTDOWN,
            ConnectFault::Version { .. } => Errno::EPROTONOSUPPORT,
            ConnectFault::Protocol => Errno::EPROTO,
            ConnectFault::Memory => Errno::EBADF,
            ConnectFault::Server { .. } => Errno::EPERM,
        }
    }
}

impl fmt::Display for ConnectFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ConnectFault::Unreachable(errno) => write!(f, "nobody can be reached there: {errno}"),
            ConnectFault::TimedOut => {
                f.write_str("no answer in time: is the engine's process stopped, or its policy slow?")
            }
            ConnectFault::Denied => f.write_str("the engine's policy refuses this process"),
            ConnectFault::Full => {
                f.write_str("the engine serves as many processes as it may (PublishOptions::processes)")
            }
            ConnectFault::ReadOnly => f.write_str("it may be had for reading only (ClientOptions::read_only)"),
            ConnectFault::Closed => f.write_str("the engine is gone"),
            ConnectFault::Version { theirs, ours } => {
                write!(
                    f,
                    "the engine speaks version {theirs}, and this library version {ours}: use the same release on both sides"
                )
            }
            ConnectFault::Protocol => f.write_str("what listens there does not speak the protocol of this library"),
            ConnectFault::Memory => f.write_str("what was offered is not the memory of a vmap"),
            ConnectFault::Server { uid } => {
                write!(f, "it is served by user {uid}, who is not trusted to (ClientOptions::server_uid)")
            }
        }
    }
}

/// A published vmap of an engine in another process, attached over its socket.
///
/// Everything is as in a forked child of that process: regions are attached and dropped, pages come when they are touched,
/// writes reach all, forks inherit, and each area is counted there. What only the engine's process can do is
/// [`Error::NotOwner`]. When that process ends or shuts the engine down, what is not there is SIGBUS from then on.
///
/// The server is trusted with the bytes, which are what it says, and with serving them: a touch waits for it. So it must be
/// of this process's effective user or root, unless [`ClientOptions::server_uid`] names another.
///
/// The connection ends when this value and all handles and regions are dropped.
#[derive(Debug)]
pub struct Client {
    vmap: Vmap,
}

impl Client {
    /// Connects to a vmap that is [published](Vmap::publish) at `path`. The process needs a userfaultfd with the features that
    /// the engine has, as a forked child does.
    ///
    /// # Errors
    ///
    /// [`Error::NotConnected`] with what stands in the way; [`Error::Open`] when no userfaultfd can be had;
    /// [`Error::NotInherited`] when the engine has no descriptor or memory to serve one more process;
    /// [`Error::Sys`] for want of descriptors, memory or threads. Nothing is left behind then.
    pub fn attach(path: impl AsRef<Path>, options: &ClientOptions) -> Result<Client> {
        let path = path.as_ref();
        let failed = |fault| Error::NotConnected { path: path.display().to_string(), fault };
        let deadline = Instant::now() + options.timeout;
        let socket = reach(path, deadline)?.map_err(failed)?;
        check_server(&socket, options.server_uid).map_err(failed)?;
        let Offered { offer, memfd, owner } = shake_hands(&socket, options.read_only, deadline).map_err(failed)?;
        let (object, residency) = check(&offer, memfd).map_err(failed)?;
        let opener = Opener::new(&options.ways);
        let features = Features::from_bits(offer.features);
        let mut way = OpenWay::UserModeOnly;
        let uffd = Private::open(|| {
            opener.open(features.difference(Features::SIGBUS)).map(|(uffd, opened)| {
                way = opened;
                uffd
            })
        })?;
        if !features.contains(Features::POISON) {
            mask::check(&opener)?;
        }
        let shared = Arc::new(EngineShared::of_client(opener, way, features, owner)?);
        let core = Arc::new(VmapCore::offered(&offer, object, residency, shared.notices.clone()));
        shared.vmaps.enter(&core);
        let (uffd, socket) = (Arc::new(uffd), Arc::new(socket));
        let mut lifeline = Lifeline::new(Arc::clone(&socket));
        block_until(&socket, deadline)?;
        let newcomer = Newcomer {
            shared: &shared,
            socket: &socket,
            lifeline: &lifeline,
            uffd: &uffd,
            pidfd: None,
            nr_unlocked: 0,
        };
        let guard = newcomer.introduce().map_err(|error| match error {
            Error::NotInherited { .. } if Instant::now() >= deadline => failed(ConnectFault::TimedOut),
            Error::NotInherited { .. } => failed(ConnectFault::Full),
            Error::Shutdown => failed(ConnectFault::Closed),
            other => other,
        })?;
        // What may be read only is whole, and mapped without the userfaultfd.
        lifeline.end_with(guard, (!core.read_only).then(|| core.object.id()));
        // From here on an answer takes as long as it takes.
        let unlimited = setsockopt(&**socket, sockopt::ReceiveTimeout, &TimeVal::zero());
        shared.connect(Local::Child { uffd, lifeline, unlocked: Vec::new() });
        unlimited.map_err(Error::sys("setting the patience of a lifeline"))?;
        fork::enter(&shared)?;
        Ok(Client { vmap: Vmap { core, shared } })
    }

    /// Returns the vmap, to attach regions of it.
    pub fn vmap(&self) -> &Vmap {
        &self.vmap
    }

    /// Tells whether it may be read only.
    pub fn is_read_only(&self) -> bool {
        self.vmap.core.read_only
    }

    /// Returns the features of the engine's userfaultfds, which are those of this process's too.
    pub fn features(&self) -> Features {
        self.vmap.shared.features
    }
}

/// Connects; the outer error is of this process, the inner one of the other.
fn reach(path: &Path, deadline: Instant) -> Result<std::result::Result<Private<OwnedFd>, ConnectFault>> {
    let address = match UnixAddr::new(path) {
        Ok(address) => address,
        Err(errno) => return Ok(Err(ConnectFault::Unreachable(errno))),
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = Private::open(|| socket(AddressFamily::Unix, SockType::SeqPacket, flags, None))
        .map_err(Error::sys("making a socket for a client"))?;
    Ok(loop {
        match connect(socket.as_raw_fd(), &address) {
            Ok(()) => break Ok(socket),
            Err(Errno::EINTR) => {}
            // As many as may be wait to be accepted, and nothing tells when fewer do.
            Err(Errno::EAGAIN) if Instant::now() < deadline => std::thread::sleep(BACKLOG_PAUSE),
            Err(Errno::EAGAIN) => break Err(ConnectFault::TimedOut),
            Err(errno) => break Err(ConnectFault::Unreachable(errno)),
        }
    })
}

/// Checks that the process that listens is of a user who may serve.
fn check_server(socket: &Private<OwnedFd>, wanted: Option<u32>) -> std::result::Result<(), ConnectFault> {
    let uid = getsockopt(&**socket, sockopt::PeerCredentials).map_err(|_| ConnectFault::Protocol)?.uid();
    let may_serve = wanted.map_or_else(|| uid == 0 || uid == geteuid().as_raw(), |wanted| uid == wanted);
    if may_serve { Ok(()) } else { Err(ConnectFault::Server { uid }) }
}

/// What the engine offers.
struct Offered {
    offer: Offer,
    memfd: OwnedFd,
    /// A pidfd of its process.
    owner: OwnedFd,
}

fn shake_hands(
    socket: &Private<OwnedFd>,
    read_only: bool,
    deadline: Instant,
) -> std::result::Result<Offered, ConnectFault> {
    let knock = Knock::Attach { read_only };
    match wire::send(socket.as_fd(), &knock, None, MsgFlags::MSG_DONTWAIT) {
        // If it refuses without listening, it says why.
        Ok(()) | Err(Errno::EPIPE | Errno::ECONNRESET) => {}
        Err(_) => return Err(ConnectFault::Protocol),
    }
    let (offer, memfd) = match hear(socket, deadline)? {
        (Welcome::Offer(offer), Some(memfd)) => (offer, memfd),
        (Welcome::Denied, _) => return Err(ConnectFault::Denied),
        (Welcome::Full, _) => return Err(ConnectFault::Full),
        (Welcome::ReadOnly, _) => return Err(ConnectFault::ReadOnly),
        (Welcome::Closed, _) => return Err(ConnectFault::Closed),
        _ => return Err(ConnectFault::Protocol),
    };
    match hear(socket, deadline)? {
        (Welcome::Owner, Some(owner)) if kind_of(&owner) == Some(Kind::Pidfd) => Ok(Offered { offer, memfd, owner }),
        _ => Err(ConnectFault::Protocol),
    }
}

/// Waits for an answer.
fn hear(socket: &Private<OwnedFd>, deadline: Instant) -> std::result::Result<(Welcome, Option<OwnedFd>), ConnectFault> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ConnectFault::TimedOut);
        }
        let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        let _ = poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLIN)], timeout);
        match wire::receive(socket.as_fd(), MsgFlags::MSG_DONTWAIT) {
            Ok(Some(answer)) => return Ok(answer),
            Ok(None) | Err(Failed::Sys(Errno::ECONNRESET)) => return Err(ConnectFault::Closed),
            Err(Failed::Frame(FrameFault::Version(theirs))) => {
                return Err(ConnectFault::Version { theirs, ours: VERSION });
            }
            Err(Failed::Frame(_)) => return Err(ConnectFault::Protocol),
            Err(Failed::Sys(Errno::EAGAIN)) => {}
            Err(Failed::Sys(_)) => return Err(ConnectFault::Closed),
        }
    }
}

/// Checks that what was offered is memory as it must be: of the size and pages that are told, and of which nothing can be cut
/// off at its end.
pub(super) fn check(offer: &Offer, memfd: OwnedFd) -> std::result::Result<(Object, Residency), ConnectFault> {
    let memory = ConnectFault::Memory;
    let residency = Residency::of_number(offer.residency).ok_or(ConnectFault::Protocol)?;
    let sizes = [PageSize::Base, PageSize::Huge2M, PageSize::Huge1G];
    let page = sizes.into_iter().find(|size| size.bytes() as u64 == offer.page_bytes).ok_or(memory)?;
    let bytes = page.whole(offer.nr_pages).and_then(|pages| pages.checked_mul(PageSize::Base.bytes() as u64));
    let end = bytes.and_then(|bytes| bytes.checked_add(offer.base)).filter(|&end| i64::try_from(end).is_ok());
    let end = end.ok_or(memory)?;
    let stat = fstat(&memfd).map_err(|_| memory)?;
    let is_file = stat.st_mode & libc::S_IFMT == libc::S_IFREG;
    let access = OFlag::from_bits_retain(fcntl(&memfd, FcntlArg::F_GETFL).map_err(|_| memory)?) & OFlag::O_ACCMODE;
    let wanted = if offer.read_only { OFlag::O_RDONLY } else { OFlag::O_RDWR };
    if !is_file || access != wanted || !offer.base.is_multiple_of(offer.page_bytes) {
        return Err(memory);
    }
    // Somebody else's memfd may be cut off by him; what lies behind its end is SIGBUS.
    if !offer.shared {
        let seals = fcntl(&memfd, FcntlArg::F_GET_SEALS).map_err(|_| memory)?;
        let seals = SealFlag::from_bits_retain(seals);
        let wanted =
            if offer.expandable { SealFlag::F_SEAL_SHRINK } else { SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW };
        if !seals.contains(wanted) || (stat.st_size as u64) < end {
            return Err(memory);
        }
    }
    if page.is_huge() && fstatfs(&memfd).map_err(|_| memory)?.block_size() as u64 != offer.page_bytes {
        return Err(memory);
    }
    // What may be read only is mapped without the engine: it must be whole, and stay so. Of huge pages the kernel tells no holes.
    if offer.read_only && (offer.shared || offer.expandable) {
        return Err(memory);
    }
    if offer.read_only && !page.is_huge() && end > offer.base {
        let hole = lseek(&memfd, offer.base as i64, Whence::SeekHole).map_err(|_| memory)?;
        if (hole as u64) < end {
            return Err(memory);
        }
    }
    let object = Object::offered(memfd, offer.base, offer.shared, page).map_err(|_| memory)?;
    Ok((object, residency))
}

/// From here on the socket waits for answers, until the deadline.
fn block_until(socket: &Private<OwnedFd>, deadline: Instant) -> Result<()> {
    let failed = Error::sys("setting the patience of a lifeline");
    let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    let timeout = TimeVal::microseconds(i64::try_from(left.as_micros()).unwrap_or(i64::MAX));
    setsockopt(&**socket, sockopt::ReceiveTimeout, &timeout).map_err(&failed)?;
    let status = OFlag::from_bits_retain(fcntl(&**socket, FcntlArg::F_GETFL).map_err(&failed)?);
    fcntl(&**socket, FcntlArg::F_SETFL(status - OFlag::O_NONBLOCK)).map(drop).map_err(&failed)
}
