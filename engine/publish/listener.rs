//! The thread that accepts connections to a published vmap, and answers what is said first.
//!
//! It waits for no connection: who says nothing is looked at again when it does, or cut when its time is over.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, getsockopt, sockopt};

use super::descriptor::has_hung_up;
use super::outsider::{Misdeed, Outsider, PeerCredentials, Publication};
use super::{Access, SocketPath, accept};
use crate::fork::wire::{self, Failed, FrameFault, Knock, Offer, Welcome};
use crate::process::ledger::Private;
use crate::process::open_pidfd;
use crate::runtime::children::new_space;
use crate::runtime::shared::EngineShared;
use crate::runtime::threads;
use crate::stats::add;
use crate::trace::tell;
use crate::vmap::core::VmapCore;

/// What the application says of who connects.
pub(super) type Policy = Box<dyn Fn(&PeerCredentials) -> Access + Send>;

/// Connections that may be silent at once. When more come, the one that has been silent for longest is cut.
const SILENT_MAX: usize = 64;
/// Connections that are accepted before the others are looked at again.
const ACCEPTED_AT_ONCE: usize = 16;
/// The pause before another try when there is no descriptor for a connection.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(50);

/// The listener's state.
pub(super) struct Listener {
    pub(super) socket: Private<OwnedFd>,
    pub(super) path: SocketPath,
    pub(super) shared: Arc<EngineShared>,
    pub(super) core: Weak<VmapCore>,
    pub(super) publication: Arc<Publication>,
    pub(super) policy: Policy,
    /// A descriptor for those that may read only.
    pub(super) for_reading: Option<OwnedFd>,
}

/// A connection that has said nothing yet.
struct Visitor {
    socket: Private<OwnedFd>,
    due: Instant,
}

impl Listener {
    /// Listens until the publication ends.
    pub(super) fn run(self) {
        let mut visitors: Vec<Visitor> = Vec::new();
        let mut shortage: Option<Instant> = None;
        while !self.publication.is_stopped() {
            let now = Instant::now();
            shortage = shortage.filter(|&until| until > now);
            visitors.retain(|visitor| {
                let is_early = visitor.due > now;
                if !is_early {
                    self.shed(Misdeed::Silent);
                }
                is_early
            });
            let accepting = if shortage.is_some() { PollFlags::empty() } else { PollFlags::POLLIN };
            let ready: Vec<bool> = {
                let mut watched = vec![
                    PollFd::new(self.publication.bell.as_fd(), PollFlags::POLLIN),
                    PollFd::new(self.socket.as_fd(), accepting),
                ];
                watched.extend(visitors.iter().map(|visitor| PollFd::new(visitor.socket.as_fd(), PollFlags::POLLIN)));
                let next = visitors.iter().map(|visitor| visitor.due).chain(shortage).min();
                let pause = next.map_or(PollTimeout::NONE, |next| {
                    // Rounded up: it must not be woken before.
                    let wait = next.saturating_duration_since(now) + Duration::from_millis(1);
                    PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX)
                });
                match poll(&mut watched, pause) {
                    Ok(_) => watched.iter().map(|fd| fd.any() == Some(true)).collect(),
                    Err(Errno::EINTR | Errno::EAGAIN) => continue,
                    Err(_) => break,
                }
            };
            if ready[0] {
                self.publication.bell.hear();
            }
            for index in (0..visitors.len()).rev().filter(|index| ready[index + 2]) {
                let visitor = visitors.remove(index);
                visitors.extend(self.hear(visitor));
            }
            if ready[1] && shortage.is_none() {
                shortage = self.accept_some(&mut visitors).err().map(|_| Instant::now() + SHORTAGE_PAUSE);
            }
            if self.shared.is_child() {
                // The policy forked here and returned in the child.
                threads::end_child();
            }
        }
        tell!(INFO, "kiomap::publish", "listens no more", engine = self.shared.id, vmap = self.publication.vmap);
        let Listener { shared, policy, path, .. } = self;
        drop(path);
        // What it captured is the application's.
        threads::contain(&shared, || drop(policy));
    }

    fn accept_some(&self, visitors: &mut Vec<Visitor>) -> nix::Result<()> {
        for _ in 0..ACCEPTED_AT_ONCE {
            match accept(&self.socket) {
                Ok(socket) => {
                    let visitor = Visitor { socket, due: Instant::now() + self.publication.greeting };
                    if visitors.len() >= SILENT_MAX {
                        visitors.remove(0);
                        self.shed(Misdeed::Silent);
                    }
                    visitors.extend(self.hear(visitor));
                }
                Err(Errno::EAGAIN) => return Ok(()),
                Err(Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM) => return Err(Errno::EMFILE),
                // It is gone already.
                Err(_) => {}
            }
        }
        Ok(())
    }

    /// Hears what a connection says first, and answers; gives it back if it says nothing yet.
    fn hear(&self, visitor: Visitor) -> Option<Visitor> {
        match wire::receive_knock(visitor.socket.as_fd()) {
            Ok(Some(knock)) => self.receive(visitor.socket, knock),
            Err(Failed::Sys(Errno::EAGAIN)) => return Some(visitor),
            Err(Failed::Frame(fault)) => {
                if let FrameFault::Version(_) = fault {
                    // Any frame tells our own.
                    answer(&visitor.socket, Welcome::Closed);
                }
                self.shed(fault.into());
            }
            // It left.
            Ok(None) | Err(Failed::Sys(_)) => {}
        }
        None
    }

    /// Lets a process in, or tells it why not.
    fn receive(&self, socket: Private<OwnedFd>, Knock::Attach { read_only }: Knock) {
        let refusal = match self.admit(&socket, read_only) {
            Ok((outsider, pidfd)) => return self.hand_over(socket, outsider, pidfd),
            Err(refusal) => refusal,
        };
        tell!(
            INFO,
            "kiomap::publish",
            "refuses",
            engine = self.shared.id,
            vmap = self.publication.vmap,
            answer = format!("{refusal:?}")
        );
        answer(&socket, refusal);
    }

    /// Asks the policy, and makes the space of a process.
    fn admit(&self, socket: &Private<OwnedFd>, read_only: bool) -> Result<(Newcomer, Private<OwnedFd>), Welcome> {
        let credentials = getsockopt(&**socket, sockopt::PeerCredentials).map_err(|_| Welcome::Closed)?;
        let peer = PeerCredentials { pid: credentials.pid(), uid: credentials.uid(), gid: credentials.gid() };
        let access = threads::contain(&self.shared, || (self.policy)(&peer)).unwrap_or(Access::Refused);
        if self.shared.is_child() {
            threads::end_child();
        }
        let for_reading = match (access, read_only) {
            (Access::Refused, _) => return Err(Welcome::Denied),
            (Access::ReadOnly, false) => return Err(Welcome::ReadOnly),
            (Access::ReadWrite, false) => false,
            (Access::ReadOnly | Access::ReadWrite, true) => true,
        };
        if for_reading && self.for_reading.is_none() {
            return Err(Welcome::Denied);
        }
        let pidfd = Private::open(|| peer_pidfd(socket, peer.pid)).map_err(|_| Welcome::Closed)?;
        let counters = self.shared.new_space_counters();
        let place = self.publication.admit(&counters).ok_or(Welcome::Full)?;
        Ok((Newcomer { outsider: Outsider::new(place, for_reading), counters }, pidfd))
    }

    /// Sends a process what it needs, and gives it to the keeper.
    fn hand_over(&self, socket: Private<OwnedFd>, newcomer: Newcomer, pidfd: Private<OwnedFd>) {
        let Some(core) = self.core.upgrade() else { return answer(&socket, Welcome::Closed) };
        let Newcomer { outsider, counters } = newcomer;
        let offer = Offer {
            vmap: core.id,
            nr_pages: core.nr_pages(),
            page_bytes: core.page().bytes() as u64,
            base: core.object.base(),
            shared: core.object.is_shared(),
            expandable: core.expandable,
            minor_faults: core.minor_faults,
            residency: core.residency.number(),
            features: self.shared.features.bits(),
            read_only: outsider.read_only,
        };
        let memfd = self.for_reading.as_ref().filter(|_| outsider.read_only).map_or(core.memfd(), AsFd::as_fd);
        if !outsider.read_only {
            // Whoever has that descriptor can write by it.
            core.set_diverging();
        }
        let flags = MsgFlags::MSG_DONTWAIT;
        let sent = wire::send(socket.as_fd(), &Welcome::Offer(offer), Some(memfd), flags)
            .and_then(|()| wire::send(socket.as_fd(), &Welcome::Owner, Some(self.shared.owner_pidfd.as_fd()), flags));
        // Otherwise it left, and nothing was made for it.
        if sent.is_ok() {
            // If there is no room for it, its connection ends here, and it is told by that.
            let _ = new_space(&self.shared, counters, socket, outsider, pidfd);
        }
        // Perhaps the last reference, to a list and to what it keeps alive.
        threads::contain(&self.shared, || drop(core));
    }

    /// Counts a connection that was cut, and tells why.
    fn shed(&self, misdeed: Misdeed) {
        tell_shed(&self.shared, self.publication.vmap, 0, misdeed);
    }
}

/// Counts a process that was cut off, and tells why.
pub(crate) fn tell_shed(shared: &EngineShared, _vmap: u64, _pid: i32, _misdeed: Misdeed) {
    add(&shared.counters.clients_shed, 1);
    tell!(
        WARN,
        "kiomap::publish",
        "cuts a connection",
        engine = shared.id,
        vmap = _vmap,
        pid = _pid,
        why = _misdeed.to_string()
    );
}

/// A process that is let in.
struct Newcomer {
    outsider: Outsider,
    counters: Arc<crate::stats::SpaceCounters>,
}

fn answer(socket: &Private<OwnedFd>, welcome: Welcome) {
    // Who does not take it has left, or does not read.
    let _ = wire::send(socket.as_fd(), &welcome, None, MsgFlags::MSG_DONTWAIT);
}

/// Opens a pidfd of the process that connected: by its socket, or by its number, on older kernels.
fn peer_pidfd(socket: &Private<OwnedFd>, pid: libc::pid_t) -> crate::Result<OwnedFd> {
    let ended = crate::Error::sys("a pidfd of who connects");
    match getsockopt(&**socket, sockopt::PeerPidfd) {
        Ok(pidfd) => Ok(pidfd),
        Err(Errno::ENOPROTOOPT) => {
            let pidfd = open_pidfd(pid)?;
            // The number may by now be another's, if the one that connected has ended: then it has hung up.
            if has_hung_up(socket.as_fd()) { Err(ended(Errno::ESRCH)) } else { Ok(pidfd) }
        }
        // It has ended: its number may be another's.
        Err(errno) => Err(ended(errno)),
    }
}
