//! Where touching threads find what an engine knows: a place for each engine, kept for the life of the process.
//!
//! The fault-handling thread owns a [`Desk`]. Whenever it is about to read events or to change its own process's area
//! table it closes the desk's crossing, and opens it again with the table as it is then. So nobody is between looking a
//! page up and installing it when an event is read.
//!
//! The places lie in memory that a forked child finds zeroed (MADV_WIPEONFORK), also a child of a raw clone that runs
//! none of our handlers: no engine serves its touches this way.

use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use libc::c_void;
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous};

use super::answer::{Access, Board, Step, Tries};
use super::ask::{ASKS, Ask, Asked};
use super::doubt::Doubts;
use crate::page::{page_floor, page_size};
use crate::process::ledger::Private;
use crate::process::{gate, mapping};
use crate::runtime::around::FaultAround;
use crate::runtime::crossing::Crossing;
use crate::runtime::shared::EngineShared;
use crate::runtime::strays::LookupId;
use crate::space::Target;
use crate::space::table::AreaTable;
use crate::stats::SpaceCounters;
use crate::stats::latency::Moment;
use crate::sys::Userfault;
use crate::{Error, Result};

/// The most engines of one process that are served this way at once. Each touch looks at all of them.
const ENGINES: usize = 64;

/// How often a touch that no engine knows is looked at once more: each time, its memory may just have been exchanged.
const MOST_REFUSALS: u32 = 8;

/// A place. All of its bytes zero is a free one; apart from its neighbours in the processors' caches.
#[repr(align(128))]
struct Place {
    taken: AtomicBool,
    crossing: Crossing,
    /// Changed only while the crossing is closed.
    board: AtomicPtr<Board>,
    asks: [Ask; ASKS],
}

static PLACES: AtomicPtr<[Place; ENGINES]> = AtomicPtr::new(ptr::null_mut());

fn places() -> Option<&'static [Place; ENGINES]> {
    // SAFETY: set once to a mapping that is never unmapped, of this size; a fork child's is zeroes, which is a value.
    unsafe { PLACES.load(Ordering::Acquire).as_ref() }
}

/// As [`places`], and makes them when they are first asked for.
fn make_places() -> Result<&'static [Place; ENGINES]> {
    if let Some(places) = places() {
        return Ok(places);
    }
    let no_memory = Error::sys("mmap for in-thread delivery");
    let len = const { std::num::NonZeroUsize::new(size_of::<[Place; ENGINES]>()).unwrap() };
    let (prot, flags) = (ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE);
    // SAFETY: a new mapping, where the kernel likes.
    let new = unsafe { mmap_anonymous(None, len, prot, flags) }.map_err(&no_memory)?;
    let give_back = || {
        // SAFETY: nobody knows of it.
        let _ = unsafe { nix::sys::mman::munmap(new, len.get()) };
    };
    // SAFETY: the mapping just made.
    if let Err(errno) = unsafe { madvise(new, len.get(), MmapAdvise::MADV_WIPEONFORK) } {
        give_back();
        return Err(Error::sys("madvise(MADV_WIPEONFORK)")(errno));
    }
    let new_places = new.as_ptr().cast();
    if PLACES.compare_exchange(ptr::null_mut(), new_places, Ordering::AcqRel, Ordering::Acquire).is_err() {
        give_back();
    }
    places().ok_or_else(|| no_memory(Errno::ENOMEM))
}

/// The fault-handling thread's side of a place; closed when it is made.
pub(crate) struct Desk {
    place: &'static Place,
    board: NonNull<Board>,
    asked: Asked,
    closed: bool,
}

// SAFETY: the board is owned by this value; other threads read it through the place, as `Board: Sync` allows.
unsafe impl Send for Desk {}

impl Desk {
    /// Takes a place for an engine.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] when too many engines of this process are served this way; [`Error::Sys`].
    pub(crate) fn new(
        shared: &Arc<EngineShared>,
        uffd: &Arc<Private<Userfault>>,
        counters: &Arc<SpaceCounters>,
        fault_around: FaultAround,
    ) -> Result<Desk> {
        let board = Board::new(shared, uffd, counters, fault_around)?;
        let _gate = gate();
        let place = make_places()?.iter().find(|place| !place.taken.swap(true, Ordering::AcqRel));
        let place = place.ok_or(Error::Invalid {
            what: "the number of engines with in-thread delivery in this process",
            value: ENGINES as u64 + 1,
            rule: "there can be 64 at once: drop one, or build this one with Delivery::Handler",
        })?;
        place.crossing.close();
        let board = NonNull::from(Box::leak(Box::new(board)));
        Ok(Desk { place, board, asked: Asked::new(&place.asks), closed: true })
    }

    /// Waits until no thread looks at the table, and keeps all away from it.
    pub(crate) fn close(&mut self) {
        if !self.closed {
            self.place.crossing.close();
            self.closed = true;
        }
    }

    /// Lets threads look at the table as it is now; nothing of it changes before the next [`Desk::close`]. Not `serving`,
    /// no touch is answered any more.
    pub(crate) fn open(&mut self, table: &AreaTable<Target>, serving: bool) {
        if self.closed {
            // SAFETY: owned by this value, and never borrowed mutably.
            unsafe { self.board.as_ref() }.show(table, serving);
            self.place.board.store(self.board.as_ptr(), Ordering::Release);
            self.place.crossing.open();
            self.closed = false;
        }
    }

    /// Begins with what touching threads ask: `look_up` has an address looked up, or answers `None` if its thread is to
    /// touch again.
    pub(crate) fn hear(&mut self, look_up: impl FnMut(usize) -> Option<LookupId>) {
        self.asked.hear(look_up);
    }

    /// Answers the thread that waits for a lookup, if one does: whether it is to touch `again`.
    pub(crate) fn found(&mut self, lookup: LookupId, again: bool) {
        self.asked.found(lookup, again);
    }

    /// Refuses whoever waits for a lookup. The desk is closed, and then opened as not serving, or dropped.
    pub(crate) fn refuse_all(&mut self) {
        self.asked.refuse_all();
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        self.close();
        self.refuse_all();
        self.place.board.store(ptr::null_mut(), Ordering::Release);
        self.place.crossing.open();
        // SAFETY: made by a box; nobody was inside since it was taken out of the place, so nobody knows it.
        drop(unsafe { Box::from_raw(self.board.as_ptr()) });
        self.place.taken.store(false, Ordering::Release);
    }
}

/// Answers a touch that the kernel answered by SIGBUS: true if it is to be tried again, false if it stays a SIGBUS.
///
/// Called in the signal handler: takes no lock, allocates nothing, and is inside one crossing at a time.
///
/// The kernel lets any engine's userfaultfd install on what another's has registered. So an engine that does not know an
/// address says nothing about it: the next one is asked.
pub(super) fn answer(addr: usize, access: Access) -> bool {
    let Some(places) = places() else { return false };
    let mut tries = Tries::new(addr, access);
    let mut refusals = 0;
    // The first place whose engine has not said yet that it does not know the address.
    let mut unasked = 0;
    loop {
        let step = at_any(places, 0, |board, _| board.answer(&mut tries));
        // Perhaps memory that no event told of.
        let step = step.or_else(|| at_any(places, unasked, |board, asks| board.answer_stray(addr, asks)));
        let go_on = match step {
            Some((_, Step::Retry)) => return true,
            Some((_, Step::Sigbus)) => return false,
            None if can_be_touched(addr, access) => return true,
            None if refusals == MOST_REFUSALS => {
                if let Some(last) = unasked.checked_sub(1) {
                    at_any(places, last, |board, _| {
                        board.count_stray();
                        Some(())
                    });
                }
                return false;
            }
            // Perhaps it became an area after it was looked up and before the kernel refused it, and is none by now.
            None => {
                refusals += 1;
                continue;
            }
            Some((_, Step::Again(why))) => tries.wait(why),
            // Asleep outside the crossing: its owner is to answer. What was found there may be gone, or not accessible any more,
            // which only the touch itself can tell.
            Some((_, Step::Asked(ask))) if ask.wait() => return true,
            Some((index, Step::Asked(_) | Step::Unknown)) => {
                unasked = index + 1;
                continue;
            }
        };
        if !go_on {
            return can_be_touched(addr, access);
        }
    }
}

/// Tells what the touch would find now, by having the kernel make it: the memory that was touched may have been unmapped
/// since, and other memory be there, which is not to be a SIGBUS.
fn can_be_touched(addr: usize, access: Access) -> bool {
    let advice: &[libc::c_int] = match access {
        Access::Read => &[libc::MADV_POPULATE_READ],
        Access::Write => &[libc::MADV_POPULATE_WRITE],
        Access::Unknown => &[libc::MADV_POPULATE_READ, libc::MADV_POPULATE_WRITE],
    };
    advice.iter().all(|&advice| {
        // SAFETY: brings the page that was touched; changes no byte.
        match Errno::result(unsafe { libc::madvise(page_floor(addr) as *mut c_void, page_size(), advice) }) {
            Ok(_) => true,
            // Nothing is there: the touch is a SIGSEGV.
            Err(Errno::ENOMEM) => !mapping::is_mapped(page_floor(addr)),
            // It may not be touched, as an attach's that is under way, which is a SIGSEGV; or it is a device's, of which the
            // kernel does not say what a touch finds.
            Err(Errno::EINVAL) => may_doubt(addr),
            Err(_) => false,
        }
    })
}

/// Tells whether a touch of this thread is to be tried again because nobody knows what it finds: not for long at a stretch.
fn may_doubt(addr: usize) -> bool {
    static DOUBTS: Doubts = Doubts::new();
    // SAFETY: asks for this thread's id.
    let tid = unsafe { libc::syscall(libc::SYS_gettid) } as u32;
    DOUBTS.may(tid, addr, Moment::now().as_us())
}

/// Asks one engine after the other, from a place on and inside its crossing, until one has an answer; tells at which place.
fn at_any<T>(
    places: &'static [Place; ENGINES],
    from: usize,
    mut answer: impl FnMut(&Board, &'static [Ask; ASKS]) -> Option<T>,
) -> Option<(usize, T)> {
    for (index, place) in places.iter().enumerate().skip(from) {
        if place.board.load(Ordering::Relaxed).is_null() {
            continue;
        }
        let _inside = place.crossing.enter();
        // SAFETY: what the place names is freed only after it was taken out with nobody inside.
        let board = unsafe { place.board.load(Ordering::Acquire).as_ref() };
        if let Some(board) = board
            && board.is_serving()
            && let Some(answer) = answer(board, &place.asks)
        {
            return Some((index, answer));
        }
    }
    None
}
