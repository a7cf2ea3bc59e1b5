//! The life of one VM: its message, its memory served, its end.

use std::fmt::Display;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use kiomap::firecracker::{Handshake, Limits, check_against};
use kiomap::{AdoptOptions, Adopted, AdoptedArea, Engine, FillProgress, Refusal, Release, SpaceStats, Vmap};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};

use crate::listen::{Ending, Place};
use crate::peer::{self, Peer};
use crate::report::{End, Report};
use crate::sets::Sets;

/// How often a VM's numbers are looked at, in milliseconds: they end with it.
const LOOK_MS: u16 = 1000;
/// How often it is looked at whether a VM without a pidfd has ended.
const LOOK_OFTEN_MS: u16 = 100;
/// The engine sees the end of a process at once, too; no longer than this later.
const END: Duration = Duration::from_secs(10);

/// What all VMs share.
pub(crate) struct Host {
    pub(crate) engine: Engine,
    pub(crate) vmap: Vmap,
    /// Without a page: what VMs that are turned away get.
    pub(crate) nothing: Vmap,
    pub(crate) memory_bytes: u64,
    pub(crate) sets: Sets,
    pub(crate) report: Report,
    pub(crate) refusal: Refusal,
    pub(crate) prefill: bool,
    pub(crate) max_vms: usize,
    pub(crate) handshake: Duration,
    pub(crate) once: bool,
    pub(crate) ending: Arc<Ending>,
    pub(crate) threads: Threads,
}

/// The threads of those that have connected.
#[derive(Default)]
pub(crate) struct Threads {
    running: Mutex<usize>,
    ended: Condvar,
    /// Those of them whose VM is served, or refused what it is missing for as long as it lives.
    served: AtomicUsize,
    /// VMs that could not be let go.
    stuck: AtomicUsize,
}

/// Has a thread of its own attend to one that has connected.
pub(crate) fn begin(host: &Arc<Host>, socket: UnixStream, number: u64, place: Place) {
    *host.threads.running() += 1;
    let running = Running(Arc::clone(host));
    let started = thread::Builder::new().name("vm".into()).spawn(move || attend(&running.0, socket, number, place));
    // What the thread was to have is dropped: the peer is hung up on.
    if let Err(error) = started {
        host.report.trouble(&format!("peer {number} is hung up on, as no thread can be started: {error}"));
    }
}

/// Counts a thread that attends to a VM.
struct Running(Arc<Host>);

impl Drop for Running {
    fn drop(&mut self) {
        *self.0.threads.running() -= 1;
        self.0.threads.ended.notify_all();
    }
}

impl Threads {
    fn running(&self) -> MutexGuard<'_, usize> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until all VMs have ended or were let go, once the handler ends; answers how many could not be.
    pub(crate) fn wait_for_all(&self) -> usize {
        let all = self.ended.wait_while(self.running(), |running| *running > 0);
        drop(all.unwrap_or_else(PoisonError::into_inner));
        self.stuck.load(Ordering::SeqCst)
    }

    /// Takes the place of a VM, of so many.
    fn place(&self, most: usize) -> Option<Served<'_>> {
        let more = |served: usize| (served < most).then_some(served + 1);
        self.served.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more).ok().map(|_| Served(self))
    }
}

/// The place of a VM.
struct Served<'a>(&'a Threads);

impl Drop for Served<'_> {
    fn drop(&mut self) {
        self.0.served.fetch_sub(1, Ordering::SeqCst);
    }
}

fn attend(host: &Host, socket: UnixStream, number: u64, place: Place) {
    let peer = Peer::of(&socket, number);
    let received = Handshake::receive(&socket, Instant::now() + host.handshake, &Limits::new());
    let served = host.threads.place(host.max_vms);
    let handshake = match received {
        Ok(handshake) => handshake,
        Err(refused) => return refuse(host, &peer, &refused.fault, refused.uffd, served, (socket, place)),
    };
    if let Err(fault) = check_against(&handshake.regions, host.memory_bytes) {
        return refuse(host, &peer, &fault, Some(handshake.uffd), served, (socket, place));
    }
    let Some(served) = served else {
        let why = format!("{} VMs are there already (--max-vms)", host.max_vms);
        host.report.refused(&peer, &why);
        return turn_away(host, &peer, handshake);
    };
    // For a VM whose areas are refused. Without it, its touches could only be left waiting.
    let spare = handshake.uffd.try_clone();
    let bytes = handshake.regions.iter().map(|region| region.size_bytes as u64).sum();
    let (areas, nr_regions) = (handshake.areas(&host.vmap), handshake.regions.len());
    match adopt(host, handshake.uffd, &areas, &peer, host.refusal) {
        Err(error) => refuse(host, &peer, &format!("{error:#}"), spare.ok(), Some(served), (socket, place)),
        Ok(adopted) => {
            drop((spare, place));
            host.report.begin(&peer, nr_regions, bytes);
            Vm { host, peer: &peer, socket: &socket, adopted, began: Instant::now() }.live();
        }
    }
}

fn adopt(host: &Host, uffd: OwnedFd, areas: &[AdoptedArea], peer: &Peer, refusal: Refusal) -> Result<Adopted> {
    let mut options = AdoptOptions::new().refusal(refusal);
    if let Some(pidfd) = &peer.pidfd {
        options = options.pidfd(pidfd.try_clone().context("duplicating a pidfd")?);
    }
    host.engine.adopt(uffd, areas, options).context("adopting it")
}

/// Does not serve a peer. If it has sent a userfaultfd, its missing pages are refused as the operator chose: it may keep a
/// duplicate of it, and would wait for them. For that it has a VM's place as long as it lives.
fn refuse(
    host: &Host,
    peer: &Peer,
    why: &dyn Display,
    uffd: Option<OwnedFd>,
    served: Option<Served<'_>>,
    connection: (UnixStream, Place),
) {
    host.report.refused(peer, why);
    let Some(uffd) = uffd else { return };
    let Some(_served) = served else { return end_it(host, peer, &"no place is left to refuse it its pages") };
    // Without its pidfd it can't be killed.
    let refusal = if peer.pidfd.is_some() { host.refusal } else { Refusal::Sigbus };
    match adopt(host, uffd, &[], peer, refusal) {
        Ok(adopted) => {
            drop(connection);
            wait_for_end(host, peer, &adopted);
        }
        // What it sent is no userfaultfd that anybody could wait for.
        Err(error) if error.downcast_ref::<kiomap::Error>().is_some_and(|error| error.errno() == Errno::EINVAL) => {}
        Err(error) => {
            let number = peer.number;
            host.report.trouble(&format!("peer {number} waits for ever if it touches a missing page: {error:#}"));
        }
    }
}

/// Lets a VM go for which there is no place: what it is missing is SIGBUS from then on, unless VMs are to be killed.
fn turn_away(host: &Host, peer: &Peer, handshake: Handshake) {
    let areas = handshake.areas(&host.nothing);
    if host.refusal == Refusal::Kill && peer.pidfd.is_some() {
        return end_it(host, peer, &"no place is left to serve it");
    }
    // Closed when that has gone well, or the VM is ended: not between.
    let _spare = handshake.uffd.try_clone();
    let adopted = adopt(host, handshake.uffd, &areas, peer, Refusal::Sigbus);
    let refused = adopted.and_then(|adopted| adopted.release(Release::Poison).context("refusing it its pages"));
    if let Err(error) = refused {
        end_it(host, peer, &format!("{error:#}"));
    }
}

/// Kills a VM that can neither be served nor refused its pages: it would see zeros in their place, or wait for ever.
fn end_it(host: &Host, peer: &Peer, why: &dyn Display) {
    let number = peer.number;
    match &peer.pidfd {
        Some(pidfd) if peer::has_ended(pidfd.as_fd()) => {}
        Some(pidfd) => {
            peer::kill(pidfd.as_fd());
            host.report.trouble(&format!("peer {number} is killed: {why}"));
        }
        None => host.report.trouble(&format!("peer {number} is left alone, and must be ended: {why}")),
    }
}

/// Waits until one that is refused its pages has ended, or the handler ends.
fn wait_for_end(host: &Host, peer: &Peer, adopted: &Adopted) {
    while !adopted.is_gone() && !host.ending.has_begun() {
        if peer.pidfd.as_ref().is_some_and(|pidfd| peer::has_ended(pidfd.as_fd())) {
            // The engine sees that, too.
            adopted.wait_gone(END);
            return;
        }
        let mut wanted = vec![PollFd::new(host.ending.begun(), PollFlags::POLLIN)];
        wanted.extend(peer.pidfd.as_ref().map(|pidfd| PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)));
        // A signal, say: everything is looked at again.
        let _ = poll(&mut wanted, if peer.pidfd.is_some() { LOOK_MS } else { LOOK_OFTEN_MS });
    }
}

/// A VM that is served.
struct Vm<'a> {
    host: &'a Host,
    peer: &'a Peer,
    socket: &'a UnixStream,
    adopted: Adopted,
    began: Instant,
}

impl Vm<'_> {
    fn live(self) {
        let host = self.host;
        if let Err(error) = self.bring() {
            // What is missing comes when it is touched.
            host.report.trouble(&format!("vm {}: {error:#}", self.peer.number));
        }
        let (number, peer, began) = (self.peer.number, self.peer, self.began);
        let (numbers, ended) = self.watch();
        let how = match ended {
            Ok(how) => how,
            Err(error) => {
                host.threads.stuck.fetch_add(1, Ordering::SeqCst);
                host.report.trouble(&format!("vm {number} can't be let go: {error:#}"));
                End::Stuck
            }
        };
        host.report.end(peer, how, began.elapsed(), numbers);
        if let Err(error) = host.sets.save(&host.vmap) {
            host.report.trouble(&format!("{error:#}"));
        }
        if host.once {
            host.ending.begin();
        }
    }

    /// Brings what was recorded, and all the rest, as far as that was asked for.
    fn bring(&self) -> Result<()> {
        if let Some(set) = self.host.sets.replayed() {
            self.adopted.replay(set).context("replaying the working set")?;
            self.host.report.brought(self.peer, "replayed", set.pages().len() as u64, 0);
        }
        if self.host.prefill {
            let mut last = None;
            let fill = self.adopted.fill(|now| {
                last = Some(now);
                if self.host.ending.has_begun() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
            fill.context("bringing all pages")?;
            if let Some(FillProgress { pages_done, pages_failed, .. }) = last {
                self.host.report.brought(self.peer, "filled", pages_done - pages_failed, pages_failed);
            }
        }
        Ok(())
    }

    /// Waits for its end, or the handler's; answers its numbers, and how it ended.
    fn watch(self) -> (Option<SpaceStats>, Result<End>) {
        let mut numbers = None;
        let (mut is_connected, mut was_told) = (true, false);
        loop {
            numbers = self.adopted.spaces().first().copied().or(numbers);
            if self.adopted.is_gone() {
                return (numbers, Ok(End::Gone));
            }
            if self.peer.pidfd.as_ref().is_some_and(|pidfd| peer::has_ended(pidfd.as_fd())) {
                // The engine sees that, too.
                let is_served = || anyhow!("its process has ended, and is served");
                let ended = self.adopted.wait_gone(END).then_some(End::Gone).ok_or_else(is_served);
                return (numbers, ended);
            }
            if self.host.ending.has_begun() {
                return (numbers, self.let_go());
            }
            let mut wanted = vec![PollFd::new(self.host.ending.begun(), PollFlags::POLLIN)];
            wanted.extend(self.peer.pidfd.as_ref().map(|pidfd| PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)));
            // The hang-up comes unasked. Bytes are not asked for: nothing that comes later is read.
            let hang_up = PollFd::new(self.socket.as_fd(), PollFlags::empty());
            wanted.extend(is_connected.then_some(hang_up));
            let look = if self.peer.pidfd.is_some() { LOOK_MS } else { LOOK_OFTEN_MS };
            // A signal, say: everything is looked at again.
            let ready = poll(&mut wanted, look);
            if is_connected && wanted.last().and_then(PollFd::any) == Some(true) {
                // It exits, as a rule; or else it goes on to need its memory.
                is_connected = false;
            } else if !is_connected && !was_told && ready == Ok(0) {
                was_told = true;
                self.host.report.hung_up(self.peer);
            }
        }
    }

    /// Lets it go on without the handler.
    fn let_go(self) -> Result<End> {
        let mut hurried = false;
        let fill = self.adopted.fill(|_| {
            hurried = self.host.ending.is_hurried();
            if hurried { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        fill.context("bringing what is missing")?;
        match (hurried, self.host.refusal, &self.peer.pidfd) {
            (false, ..) => {
                self.adopted.release(Release::Fill)?;
                Ok(End::Released)
            }
            (true, Refusal::Kill, Some(pidfd)) => {
                peer::kill(pidfd.as_fd());
                ensure!(self.adopted.wait_gone(END), "it was killed, and is served");
                Ok(End::Killed)
            }
            (true, ..) => {
                self.adopted.release(Release::Poison)?;
                Ok(End::Poisoned)
            }
        }
    }
}
