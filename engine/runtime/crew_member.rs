//! A member of the [`Crew`]: reads a message, and answers it if that is simple.

use std::cell::Cell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use nix::sys::epoll::{EpollEvent, EpollTimeout};
use nix::unistd::gettid;

use super::crew::{ALONE, BELL_TOKEN, Crew, Member};
use super::crossing::Inside;
use super::fault::Fault;
use super::placement::move_to;
use super::resolve::Source;
use super::simple::Simple;
use crate::page::{page_floor, page_size};
use crate::process::ledger::Private;
use crate::space::Space;
use crate::stats::add;
use crate::stats::latency::Moment;
use crate::sys::{FaultKind, Install, Message, MsgBuffer, Stop, Userfault};
use crate::vmap::residency::Residency;
use crate::vmap::window::Window;

/// Faults of one space that are answered without a look at the others.
const TURNS_WITHOUT_A_LOOK: u32 = 16;

/// The body of a member's thread.
pub(crate) fn run(crew: &Crew, index: usize) {
    let member = &crew.members[index];
    member.thread.store(gettid().as_raw(), Ordering::Relaxed);
    let held = Cell::new(None);
    if catch_unwind(AssertUnwindSafe(|| serve(crew, member, &held))).is_ok() {
        return;
    }
    // A bug of ours, which must not let a thread sleep for ever: the owner answers all from here on.
    add(&crew.shared.counters.panics, 1);
    crew.breaks();
    if let Some(fault) = held.take() {
        // It is old news by now.
        while !crew.leave(Fault { retries: 1, ..fault }) {
            std::thread::yield_now();
        }
    }
    // What comes after this thread under its number is none of the owner's.
    member.thread.store(0, Ordering::Relaxed);
}

fn serve(crew: &Crew, member: &Member, held: &Cell<Option<Fault>>) {
    let mut message = MsgBuffer::new(1);
    let mut ready = [EpollEvent::empty(); 8];
    while let Some(cpu) = crew.sleep(member) {
        // If it is not allowed there, any will do.
        move_to(cpu as usize);
        while crew.is_on() && member.cpu.load(Ordering::Relaxed) == cpu {
            let woken = member.epoll.0.wait(&mut ready, EpollTimeout::NONE).unwrap_or(0);
            for token in ready[..woken].iter().map(EpollEvent::data).filter(|&token| token != BELL_TOKEN) {
                // A thread that faults without a pause has faulted again by the time it has been answered.
                let answered =
                    (0..TURNS_WITHOUT_A_LOOK).take_while(|_| serve_one(crew, member, token, &mut message, held));
                answered.for_each(drop);
            }
            member.goes_back(cpu);
        }
    }
}

/// Reads one message of a space, and answers it or leaves it to the owner; tells whether it answered one.
fn serve_one(crew: &Crew, member: &Member, token: u64, buffer: &mut MsgBuffer, held: &Cell<Option<Fault>>) -> bool {
    let Some(inside) = crew.enter() else { return false };
    let read = read_one(crew, member, token, buffer, held, &inside);
    // The thread that is woken may take the processor from this one for as long as it likes: nobody may wait for it then.
    drop(inside);
    let answered = match read {
        Read::Nothing => return false,
        Read::Aside => {
            // The owner has been rung: it needs a processor.
            std::thread::yield_now();
            return false;
        }
        Read::Left => false,
        Read::Woken => true,
        Read::Done { uffd, range } => {
            add(&crew.shared.counters.wakes, 1);
            // It can only fail for a range that no process could have.
            let _ = uffd.wake(range.start, range.end - range.start);
            true
        }
    };
    held.set(None);
    member.ends();
    answered
}

/// What came of a read.
enum Read {
    Nothing,
    /// A message lies aside for the owner.
    Aside,
    /// A fault whose page could not be filled is left to the owner.
    Left,
    /// Who waited was woken when the pages came.
    Woken,
    /// Who waits in a range is to be woken.
    Done {
        uffd: Arc<Private<Userfault>>,
        range: Range<usize>,
    },
}

fn read_one(
    crew: &Crew,
    member: &Member,
    token: u64,
    buffer: &mut MsgBuffer,
    held: &Cell<Option<Fault>>,
    inside: &Inside<'_>,
) -> Read {
    let (id, is_alone) = (token & !ALONE, token & ALONE != 0);
    let Some((space, uffd)) = crew.space(id, inside).and_then(|space| Some((space, space.uffd.as_ref()?))) else {
        return Read::Nothing;
    };
    let mut unheard = space.unheard.lock().unwrap_or_else(PoisonError::into_inner);
    if unheard.is_some() {
        return Read::Aside;
    }
    let Ok(Some(message)) = uffd.read_one(buffer) else { return Read::Nothing };
    let counters = &crew.shared.counters;
    add(&counters.reads, 1);
    let fault = match message {
        Message::Fault { addr, write, kind: FaultKind::Missing, tid } => {
            Some(Fault::new(id, page_floor(addr), tid, write, Moment::now()))
        }
        _ => None,
    };
    held.set(fault);
    let simple = fault.and_then(|fault| Some((fault, Fill::of(crew, space, uffd, &fault, is_alone)?)));
    let Some((fault, fill)) = simple else {
        *unheard = Some(message);
        held.set(None);
        crew.ring_for_the_owner();
        return Read::Aside;
    };
    member.begins();
    // Where others may read as soon as this thread lets them, nothing is installed at an address.
    let _nobody_reads = is_alone.then_some(unheard);
    #[cfg(test)]
    crew.panic_if_asked();
    add(&counters.faults, 1);
    add(&space.counters.faults, 1);
    if fault.write {
        add(&counters.write_faults, 1);
    }
    fill.simple.count(counters, &fill.simple.area.target.vmap.counters, fault.write, add);
    let filled = fill.run(member);
    if filled != Filled::Failed {
        crew.shared.latency.record(fault.since);
        member.answers();
        member.saw(id, fault.tid, inside);
    } else if crew.leave(Fault { retries: 1, ..fault }) {
        // Events may have been read since: it is old news.
        return Read::Left;
    }
    if filled == Filled::Woken {
        return Read::Woken;
    }
    // What was not filled and finds no place is woken too: its thread faults again, and its new message waits in the kernel.
    let start = fill.simple.start();
    Read::Done { uffd: Arc::clone(uffd), range: start..start + fill.simple.bytes() }
}

/// What came of filling.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Filled {
    /// The wanted page could not be filled.
    Failed,
    /// The pages are there. Perhaps somebody still waits for them.
    Unheard,
    /// The pages are there, and the system call that brought them all has woken whoever waited.
    Woken,
}

/// What answers a simple fault beside the owner.
struct Fill<'a> {
    crew: &'a Crew,
    space: &'a Space,
    simple: Simple<'a>,
    way: Way<'a>,
}

/// Where pages are put.
#[derive(Clone, Copy)]
enum Way<'a> {
    /// Where they are missing: nobody else reads from the space meanwhile.
    There(&'a Userfault),
    /// In the vmap, which the thread that touches then maps by itself.
    Aside(&'a Window),
}

impl<'a> Fill<'a> {
    /// Looks a fault up; `None` if it is not simple.
    fn of(crew: &'a Crew, space: &'a Space, uffd: &'a Userfault, fault: &Fault, is_alone: bool) -> Option<Fill<'a>> {
        let simple = Simple::of(crew.fault_around, space, fault.addr)?;
        let target = &simple.area.target;
        if target.vmap.residency != Residency::Swappable {
            // What is filled aside is locked when it is touched; what is installed is at once.
            return None;
        }
        let way = if is_alone { Way::There(uffd) } else { Way::Aside(target.window.as_deref()?) };
        Some(Fill { crew, space, simple, way })
    }

    /// Installs pages up to `end`; wakes whoever waits where they are missing, and nobody elsewhere.
    fn install(&self, pgoff: u64, end: u64) -> Install {
        let page = page_size();
        let (skipped, len) = ((pgoff - self.simple.pages.start) as usize * page, (end - pgoff) as usize * page);
        let start = self.simple.start() + skipped;
        let bytes = match self.simple.source.advanced(skipped) {
            Source::Memory(src) | Source::Read(src) => Some(src),
            Source::Zeros | Source::Held => None,
        };
        match (self.way, bytes) {
            // SAFETY: the list holds these pages from there on. It is that of an area, which the owner does not take out
            // while this thread is inside; no thread holds a reference to a page that is missing.
            (Way::There(uffd), Some(src)) => unsafe { uffd.copy(start, src, len) },
            (Way::There(uffd), None) => uffd.zeropage(start, len),
            // SAFETY: as above; the window is the vmap's alone.
            (Way::Aside(window), Some(src)) => unsafe { window.copy(pgoff, src, len) },
            (Way::Aside(window), None) => window.zeropage(pgoff, len),
        }
    }

    /// Fills the pages.
    fn run(&self, member: &Member) -> Filled {
        let Simple { area, wanted, ref pages, source, .. } = self.simple;
        let mut pgoff = pages.start;
        let mut alone = false;
        let mut outcome = match self.way {
            Way::There(_) => Filled::Woken,
            Way::Aside(_) => Filled::Unheard,
        };
        // The thread that is woken may take the processor before this one knows that it was.
        member.wakes(outcome == Filled::Woken);
        while pgoff < pages.end {
            let install = self.install(pgoff, if alone { pgoff + 1 } else { pages.end });
            let filled = (install.bytes / page_size()) as u64;
            let own = &*area.target.vmap.counters;
            source.count(install, &self.crew.shared.counters, own, &self.space.counters, add);
            pgoff += filled;
            if install.stop.is_some() {
                // What was there already, or did not come, may be waited for.
                outcome = Filled::Unheard;
            }
            match install.stop {
                None => alone = false,
                Some(Stop::Present) => {
                    add(&self.crew.shared.counters.already_present, 1);
                    add(&area.target.vmap.counters.already_present, 1);
                    if pgoff == wanted {
                        // Somebody brought it meanwhile, and what comes with it perhaps too.
                        break;
                    }
                    pgoff += 1;
                }
                // The page that stopped it is asked for alone; the kernel then names the reason.
                Some(_) if filled > 0 => {}
                Some(_) if pgoff > wanted => break,
                // A neighbour before it: not worth more.
                Some(_) if pgoff < wanted => pgoff = wanted,
                Some(_) if !alone => alone = true,
                Some(_) => return Filled::Failed,
            }
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
    use nix::unistd::Pid;

    use crate::{AttachOptions, Engine, Kiobuf};

    /// The only reader of a space makes no more calls for a fault than a bare loop: none that only wakes.
    #[test]
    fn a_member_that_is_alone_wakes_by_the_call_that_brings_the_page() {
        let me = Pid::from_raw(0);
        let allowed = sched_getaffinity(me).unwrap();
        let first = (0..CpuSet::count()).find(|&cpu| allowed.is_set(cpu).unwrap()).unwrap();
        let mut one = CpuSet::new();
        one.set(first).unwrap();
        // Its threads inherit it: there is a place for one member.
        sched_setaffinity(me, &one).unwrap();
        let engine = Engine::builder().fault_around_pages(1).handlers(2).handlers_standing_by(true).build().unwrap();
        sched_setaffinity(me, &allowed).unwrap();
        let mut list = Kiobuf::new();
        list.map_bytes(vec![7; 256 * crate::page_size()]).unwrap();
        let region = engine.vmap(&list).unwrap().attach(&AttachOptions::new()).unwrap();
        let mut byte = [0];
        for page in 0..256 {
            region.read_at(page * crate::page_size(), &mut byte).unwrap();
            assert_eq!(byte, [7]);
        }
        engine.settle().unwrap();
        let members = &engine.crew_for_tests().members;
        let answered: u64 = members.iter().map(|member| member.answered.load(Ordering::Relaxed)).sum();
        assert!(answered > 128, "{answered}");
        let stats = engine.stats();
        assert_eq!((stats.pages_copied, stats.wakes), (256, 0));
    }

    /// A panic of a member loses no fault: the page comes, and the engine goes on without a crew.
    #[test]
    fn a_member_that_panics_leaves_no_thread_asleep() {
        let engine = Engine::builder().fault_around_pages(1).handlers(2).handlers_standing_by(true).build().unwrap();
        let mut list = Kiobuf::new();
        list.map_bytes(vec![7; 64 * crate::page_size()]).unwrap();
        let vmap = engine.vmap(&list).unwrap();
        let region = vmap.attach(&AttachOptions::new()).unwrap();
        let mut byte = [0];
        region.read_at(0, &mut byte).unwrap();
        engine.crew_for_tests().panic.store(true, Ordering::SeqCst);
        for page in 1..64 {
            region.read_at(page * crate::page_size(), &mut byte).unwrap();
            assert_eq!(byte, [7]);
        }
        engine.settle().unwrap();
        assert_eq!(engine.stats().panics, 1);
        assert!(engine.crew_for_tests().is_broken() && !engine.crew_for_tests().is_on());
    }
}
