//! The guard of a forked child: answers its faults by SIGBUS when the engine is gone.
//!
//! The child keeps a duplicate of its userfaultfd, so that the end of the engine does not turn its missing pages into
//! zero pages. But then nobody would answer: threads that touch them would sleep for ever. The guard sleeps until
//! the engine hangs up (an orderly shutdown closes the lifeline, a crash does too) and then answers in its place.
//!
//! That of an unrelated client ends with the client ([`Stopper`]): nothing of the engine is mapped in its process then.
//!
//! Where the kernel has no UFFDIO_POISON, it masks pages of this process as the engine orders it to meanwhile.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use crossbeam_channel::{Receiver, Sender};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{Shutdown, shutdown};

use crate::fork::masks;
use crate::fork::wire::{self, Ask};
use crate::page::{page_floor, page_size};
use crate::process::ledger::Private;
use crate::process::mask::{self, Masked, give_up, mask};
use crate::process::try_gate;
use crate::sys::{FaultKind, Message, MsgBuffer, Stop, Userfault};

/// What the guard watches.
pub(crate) struct Guard {
    pub(crate) lifeline: Arc<Private<OwnedFd>>,
    pub(crate) owner: Arc<Private<OwnedFd>>,
    pub(crate) uffd: Arc<Private<Userfault>>,
    /// Another, which reports no changes: there are vmaps with minor faults.
    pub(crate) aside: Option<Arc<Private<Userfault>>>,
    pub(crate) messages: MsgBuffer,
    /// Orders to mask pages come here; `None` where the kernel has poison.
    pub(crate) orders: Option<Arc<Private<OwnedFd>>>,
    /// Masks in a row for which there was no room.
    pub(crate) starved: u32,
    /// What a hang-up means.
    pub(crate) need: Arc<Need>,
    /// Dropped when it has ended.
    pub(crate) ended: Option<Sender<()>>,
}

/// Whether anything is left to guard when the engine hangs up.
#[derive(Default)]
pub(crate) struct Need {
    state: Mutex<Needed>,
    decided: Condvar,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Needed {
    #[default]
    Yes,
    /// This process begins or ends its connection at this moment: it is about to be known.
    Undecided,
    No,
}

impl Need {
    fn set(&self, needed: Needed) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = needed;
        self.decided.notify_all();
    }

    /// Waits until it is known.
    fn is_there(&self) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let undecided = |state: &mut Needed| *state == Needed::Undecided;
        *self.decided.wait_while(state, undecided).unwrap_or_else(PoisonError::into_inner) == Needed::Yes
    }
}

/// Ends a guard. It has what the guard watches, too, so that the descriptors are closed where they were made: the guard has
/// numbers of its own.
pub(crate) struct Stopper {
    need: Arc<Need>,
    ended: Receiver<()>,
    lifeline: Arc<Private<OwnedFd>>,
    _owner: Arc<Private<OwnedFd>>,
    _uffd: Arc<Private<Userfault>>,
    _aside: Option<Arc<Private<Userfault>>>,
    _orders: Option<Arc<Private<OwnedFd>>>,
}

impl Stopper {
    /// Makes what ends a guard that has not begun.
    pub(crate) fn of(guard: &mut Guard) -> Stopper {
        let (sender, ended) = crossbeam_channel::bounded(0);
        guard.ended = Some(sender);
        Stopper {
            need: Arc::clone(&guard.need),
            ended,
            lifeline: Arc::clone(&guard.lifeline),
            _owner: Arc::clone(&guard.owner),
            _uffd: Arc::clone(&guard.uffd),
            _aside: guard.aside.clone(),
            _orders: guard.orders.clone(),
        }
    }

    /// Tells whether the guard is of this process.
    pub(crate) fn is_here(&self) -> bool {
        self.lifeline.is_here()
    }

    /// From here on a hang-up is looked at when it is known whether the guard is needed.
    pub(crate) fn hesitate(&self) {
        self.need.set(Needed::Undecided);
    }

    /// The guard is needed.
    pub(crate) fn stay(&self) {
        self.need.set(Needed::Yes);
    }

    /// Ends the guard, which hesitates, and waits for that: only when nothing is mapped that is missing, as that would be zeros.
    pub(crate) fn stop(self) {
        self.need.set(Needed::No);
        // It is the socket that is shut down: also where the guard has it under a number of its own.
        let _ = shutdown(self.lifeline.as_raw_fd(), Shutdown::Both);
        let _ = self.ended.recv();
    }
}

/// What became of a page that was to be SIGBUS.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Refused {
    Done,
    /// To be tried again soon.
    Later,
    /// It is no page any more, and no event says so.
    Unmapped,
}

/// Tries at a mask for which there is no room, a pause after each, before its whole mapping is given up.
const STARVED_TRIES: u32 = 256;
/// The pause before an order is tried again.
const ORDER_PAUSE_MS: u16 = 1;

impl Guard {
    /// Waits for the engine's end, then answers every fault of this process by SIGBUS, as long as the process lives.
    /// Says `ready` when it has descriptors that nobody else can close.
    pub(crate) fn run(mut self, ready: impl FnOnce()) {
        self.take_own_descriptors();
        ready();
        if self.wait_for_hang_up() {
            if !self.need.is_there() {
                // Not the last to hold any of it; its own numbers end with this thread.
                return;
            }
            // What the engine had read and not answered is nobody's now: whoever sleeps touches again.
            let lowest = lowest_address();
            let _ = self.uffd.wake(lowest, highest_address() - lowest);
            while self.answer() {}
        }
        // The numbers may be somebody else's descriptors by now, which are not to be closed.
        std::mem::forget(self);
    }

    /// Gets a descriptor table of its own, with nothing in it but what it watches: the application may close what it
    /// likes, and the guard keeps nothing of the application's open. Where the system forbids that (a seccomp policy),
    /// the table stays shared.
    fn take_own_descriptors(&self) {
        // SAFETY: unshare(2) changes what numbers mean to this thread only.
        if unsafe { libc::unshare(libc::CLONE_FILES) } != 0 {
            return;
        }
        let orders = self.orders.as_ref().unwrap_or(&self.lifeline).as_raw_fd();
        let aside = self.aside.as_ref().unwrap_or(&self.uffd).as_raw_fd();
        let kept = [self.lifeline.as_raw_fd(), self.owner.as_raw_fd(), self.uffd.as_raw_fd(), orders, aside];
        let mut kept = kept.map(|fd| fd as u32);
        kept.sort_unstable();
        let mut from = 0;
        for fd in kept {
            if fd > from {
                close_range(from, fd - 1);
            }
            from = from.max(fd + 1);
        }
        close_range(from, u32::MAX);
    }

    /// Waits for messages and answers them; `false` when that is not possible any more.
    fn answer(&mut self) -> bool {
        let uffd = Arc::clone(&self.uffd);
        let mut ready = [PollFd::new(uffd.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, PollTimeout::NONE) {
            Err(Errno::EINTR) => return true,
            Err(_) => return false,
            Ok(_) if ready[0].revents().is_some_and(|events| events.contains(PollFlags::POLLNVAL)) => return false,
            Ok(_) => {}
        }
        let mut put_off = false;
        let (poisons, aside, starved) = (self.orders.is_none(), self.aside.as_deref(), &mut self.starved);
        let read = uffd.read(&mut self.messages, |message| match message {
            Message::Fault { addr, kind, .. } => {
                let addr = page_floor(addr);
                let refused = match (kind, aside) {
                    (FaultKind::Minor, Some(aside)) if map(&uffd, aside, addr) => Refused::Done,
                    _ if poisons => poison(&uffd, addr),
                    _ => mask_page(&uffd, addr, starved),
                };
                if refused == Refused::Later {
                    // Woken, it touches again, and there is a new message.
                    put_off = true;
                    let _ = uffd.wake(addr, page_size());
                }
            }
            Message::Unmap { start, end } => drop(uffd.wake(start, end - start)),
            Message::Remap { from, len, .. } => drop(uffd.wake(from, len)),
            Message::Remove { .. } | Message::Fork(_) => {}
        });
        if put_off {
            // An address space in the middle of a change: let the thread that changes it run.
            std::thread::yield_now();
        }
        read.is_ok()
    }

    /// Carries out orders until the engine hangs up. Answers `false` when there is nothing to watch any more.
    fn wait_for_hang_up(&mut self) -> bool {
        let mut order = None;
        loop {
            let orders = self.orders.as_deref().unwrap_or(&self.lifeline).as_fd();
            // One order at a time; the next ones wait in the socket.
            let wanted = if self.orders.is_none() || order.is_some() { PollFlags::empty() } else { PollFlags::POLLIN };
            let mut watched = [
                PollFd::new(self.lifeline.as_fd(), PollFlags::empty()),
                PollFd::new(self.owner.as_fd(), PollFlags::POLLIN),
                PollFd::new(orders, wanted),
            ];
            let pause = if order.is_some() { PollTimeout::from(ORDER_PAUSE_MS) } else { PollTimeout::NONE };
            match poll(&mut watched, pause) {
                Ok(_) => {}
                Err(Errno::EINTR) => continue,
                Err(_) => return false,
            }
            let happened = |fd: &PollFd<'_>| fd.revents().unwrap_or(PollFlags::empty());
            if watched.iter().any(|fd| happened(fd).contains(PollFlags::POLLNVAL)) {
                // The application closed descriptors that are not its own; their numbers may be anything now.
                return false;
            }
            // The engine closes its end of the orders only when it lets go or dies.
            let hung_up = happened(&watched[2]).intersects(PollFlags::POLLHUP | PollFlags::POLLERR);
            if hung_up || !happened(&watched[0]).is_empty() || !happened(&watched[1]).is_empty() {
                return true;
            }
            order = order.or_else(|| self.orders.as_deref().and_then(|orders| masks::next(orders.as_fd())));
            order = order.filter(|&addr| !self.carry_out(addr));
        }
    }

    /// Carries an order out; answers `false` when it is to be tried again soon.
    fn carry_out(&mut self, addr: usize) -> bool {
        let Some(_gate) = try_gate() else { return false };
        let _masking = mask::begin();
        match mask_page(&self.uffd, addr, &mut self.starved) {
            Refused::Later => return false,
            Refused::Done => {}
            // The engine must not take what is there from now on for the page. If it is gone, nobody does.
            Refused::Unmapped if self.lifeline.is_intact() => {
                let _ = wire::send_ask(self.lifeline.as_fd(), Ask::Unmapped { addr: addr as u64 }, None);
            }
            Refused::Unmapped => {}
        }
        true
    }
}

/// Makes a page a SIGBUS.
fn poison(uffd: &Userfault, addr: usize) -> Refused {
    match uffd.poison_page(addr).stop {
        None => Refused::Done,
        Some(Stop::Changing) => Refused::Later,
        Some(_) => {
            let _ = uffd.wake(addr, page_size());
            Refused::Done
        }
    }
}

/// Maps a page that the object holds, through `aside`, as the address space may be changing; answers `false` if the page can't
/// be had: it was given up meanwhile, or can't be read back.
fn map(uffd: &Userfault, aside: &Userfault, addr: usize) -> bool {
    let refused = matches!(aside.r#continue(addr, page_size()).stop, Some(Stop::BadSource | Stop::Other(Errno::EIO)));
    if !refused {
        // Mapped by now, or not ours any more, or past the end: the touch finds out.
        let _ = uffd.wake(addr, page_size());
    }
    !refused
}

/// Masks a page if it is missing still, and wakes who waits there.
fn mask_page(uffd: &Userfault, addr: usize, starved: &mut u32) -> Refused {
    match uffd.r#continue(addr, page_size()).stop {
        // A hole of one of our objects, or a page that can't be read back.
        Some(Stop::BadSource | Stop::Other(Errno::EIO)) => {}
        Some(Stop::Changing | Stop::NoMemory) => return Refused::Later,
        // It is there by now, or masked already, or not ours any more.
        _ => {
            let _ = uffd.wake(addr, page_size());
            return Refused::Done;
        }
    }
    let masked = match mask(uffd, addr, page_size()) {
        Masked::NoRoom if *starved < STARVED_TRIES => {
            *starved += 1;
            return Refused::Later;
        }
        Masked::NoRoom => mapping_at(addr).map_or(Masked::NoRoom, |range| give_up(uffd, range.start, range.len())),
        masked => masked,
    };
    if matches!(masked, Masked::Later | Masked::NoRoom) {
        return Refused::Later;
    }
    *starved = 0;
    let _ = uffd.wake(addr, page_size());
    if masked == Masked::GoneUnseen { Refused::Unmapped } else { Refused::Done }
}

/// The mapping of this process that holds an address. It is asked for when no memory may be left, and allocates none.
fn mapping_at(addr: usize) -> Option<Range<usize>> {
    let mut maps = File::open("/proc/thread-self/maps").ok()?;
    let mut chunk = [0; 4096];
    // As much of a line as holds its range.
    let (mut line, mut len) = ([0; 40], 0);
    loop {
        let read = maps.read(&mut chunk).ok().filter(|&read| read > 0)?;
        for &byte in &chunk[..read] {
            if byte == b'\n' {
                let range = range_of(&line[..len]);
                if range.as_ref().is_some_and(|range| range.contains(&addr)) {
                    return range;
                }
                len = 0;
            } else if len < line.len() {
                line[len] = byte;
                len += 1;
            }
        }
    }
}

/// Parses `start-end …`, in hexadecimal.
fn range_of(line: &[u8]) -> Option<Range<usize>> {
    let (range, _) = std::str::from_utf8(line).ok()?.split_once(' ')?;
    let (start, end) = range.split_once('-')?;
    Some(usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?)
}

/// Closes the descriptors `from..=to` of this thread's table.
fn close_range(from: u32, to: u32) {
    if from <= to {
        // SAFETY: the table is this thread's own, and no value of this thread owns any of them.
        unsafe { libc::syscall(libc::SYS_close_range, from, to, 0) };
    }
}

/// The lowest address that an application can map, and a range may begin at: as the system says, else the usual.
fn lowest_address() -> usize {
    let set = std::fs::read_to_string("/proc/sys/vm/mmap_min_addr");
    let set: usize = set.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    set.max(1 << 16).next_multiple_of(page_size())
}

/// The end of the part of the address space that applications map, one page short of it: the kernel refuses a range that
/// ends beyond.
fn highest_address() -> usize {
    // The first stack lies at its end, whatever the architecture and its paging levels. The kernel left random bytes
    // on it and tells where.
    // SAFETY: getauxval(3) only looks up a value.
    let on_the_stack = unsafe { libc::getauxval(libc::AT_RANDOM) } as usize;
    let bits = if on_the_stack == 0 { 47 } else { usize::BITS - on_the_stack.leading_zeros() };
    (1usize << bits) - page_size()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::is_aligned;

    /// The mapping of an address is found among many lines, longer ones than what is looked at of each.
    #[test]
    fn the_mapping_of_an_address_is_found() {
        let local = 0_u8;
        for addr in [&raw const local as usize, mapping_at as fn(usize) -> Option<Range<usize>> as usize] {
            let range = mapping_at(addr).unwrap();
            assert!(range.contains(&addr) && is_aligned(range.start) && is_aligned(range.end), "{range:x?}");
        }
        assert_eq!(mapping_at(0), None);
    }
}
