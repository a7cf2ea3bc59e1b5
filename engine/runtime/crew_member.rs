//! A member of the [`Crew`]: reads a message, and answers it if that is simple.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;

use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::epoll::{EpollEvent, EpollTimeout};
use nix::unistd::Pid;

use super::crew::{BELL_TOKEN, Crew, HandedOn, Member};
use super::fault::Fault;
use super::plan::{Plan, plan};
use crate::page::{page_floor, page_size};
use crate::space::table::Area;
use crate::space::{Space, SpaceId, Target};
use crate::stats::add;
use crate::stats::latency::Moment;
use crate::sys::{FaultKind, Message, MsgBuffer, Stop, Userfault};
use crate::vmap::residency::Residency;
use crate::vmap::window::Window;

/// The body of a member's thread.
pub(crate) fn run(crew: &Crew, index: usize) {
    let held = Cell::new(None);
    if catch_unwind(AssertUnwindSafe(|| serve(crew, &crew.members[index], &held))).is_ok() {
        return;
    }
    // A bug of ours, which must not let a thread sleep for ever: the owner answers all from here on.
    add(&crew.shared.counters.panics, 1);
    crew.breaks();
    while let Some(fault) = held.take() {
        let mut reading = crew.reading();
        if crew.hand_on(&mut reading, HandedOn::Failed(fault)).is_err() {
            drop(reading);
            held.set(Some(fault));
            std::thread::yield_now();
        }
    }
}

fn serve(crew: &Crew, member: &Member, held: &Cell<Option<Fault>>) {
    let mut message = MsgBuffer::new(1);
    let mut ready = [EpollEvent::empty(); 8];
    let mut place = None;
    while let Some(cpu) = crew.sleep(member) {
        if place != Some(cpu) {
            go_to(cpu);
            place = Some(cpu);
        }
        while crew.is_on() && member.cpu.load(Ordering::Relaxed) == cpu {
            let woken = member.epoll.0.wait(&mut ready, EpollTimeout::NONE).unwrap_or(0);
            for event in ready[..woken].iter().filter(|event| event.data() != BELL_TOKEN) {
                serve_one(crew, member, event.data(), &mut message, held);
            }
        }
    }
}

/// Goes to a processor. If it is not allowed there, any will do.
fn go_to(cpu: i32) {
    let mut set = CpuSet::new();
    let _ = set.set(cpu as usize).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
}

/// Reads one message of a space, and answers it or hands it on.
fn serve_one(crew: &Crew, member: &Member, id: SpaceId, buffer: &mut MsgBuffer, held: &Cell<Option<Fault>>) {
    let Some(inside) = crew.enter() else { return };
    let Some((space, uffd)) = crew.space(id, &inside).and_then(|space| Some((space, space.uffd.as_ref()?))) else {
        return;
    };
    let mut reading = crew.reading();
    if reading.len() >= super::crew::HANDED_ON {
        // The owner has been rung: it needs a processor.
        drop((reading, inside));
        return std::thread::yield_now();
    }
    let mut read = None;
    let _ = uffd.read(buffer, |message| read = Some(message));
    let Some(message) = read else { return };
    add(&crew.shared.counters.reads, 1);
    let Message::Fault { addr, write, kind: FaultKind::Missing, tid } = message else {
        let _ = crew.hand_on(&mut reading, HandedOn::Message(id, message));
        return;
    };
    let fault = Fault {
        space: id,
        addr: page_floor(addr),
        tid,
        write,
        minor: false,
        since: Moment::now(),
        retries: 0,
        starved: 0,
        alone: false,
    };
    held.set(Some(fault));
    let fill = if reading.is_empty() { Fill::of(crew, space, uffd, &fault) } else { None };
    let Some(fill) = fill else {
        let _ = crew.hand_on(&mut reading, HandedOn::Message(id, message));
        held.set(None);
        return;
    };
    drop(reading);
    #[cfg(test)]
    crew.panic_if_asked();
    let counters = &crew.shared.counters;
    add(&counters.faults, 1);
    if write {
        add(&counters.write_faults, 1);
    }
    add(&space.counters.faults, 1);
    fill.plan.count(counters, fill.area, write);
    if fill.run() {
        crew.shared.latency.record(fault.since);
        member.answered.fetch_add(1, Ordering::Relaxed);
        member.thread.store(tid, Ordering::Relaxed);
    } else {
        // Events may have been read since: it is old news.
        let failed = HandedOn::Failed(Fault { retries: 1, ..fault });
        if crew.hand_on(&mut crew.reading(), failed).is_err() {
            // No place: the thread faults again, and its new message waits in the kernel.
            fill.wake();
        }
    }
    held.set(None);
}

/// What answers a simple fault.
struct Fill<'a> {
    crew: &'a Crew,
    space: &'a Space,
    uffd: &'a Userfault,
    window: &'a Window,
    area: &'a Area<Target>,
    plan: Plan,
    /// The page that is waited for.
    wanted: u64,
    pages: std::ops::Range<u64>,
    /// Where the bytes of the first page are; `None` for zeros.
    src: Option<*const u8>,
}

impl<'a> Fill<'a> {
    /// Looks a fault up; `None` if it is not simple.
    fn of(crew: &'a Crew, space: &'a Space, uffd: &'a Userfault, fault: &Fault) -> Option<Fill<'a>> {
        let area = space.table.find(fault.addr)?;
        if area.target.page.is_huge() || area.target.vmap.residency != Residency::Swappable {
            // Huge pages are not simple. What is filled aside is locked when it is touched; what is installed is at once.
            return None;
        }
        let window = area.target.window.as_deref()?;
        let wanted = area.pgoff_of(fault.addr);
        let plan = plan(crew.fault_around, area, wanted);
        let (pages, src) = match &plan {
            Plan::Copy { pages, src } => (pages.clone(), Some(*src)),
            Plan::Zero { pages } => (pages.clone(), None),
            Plan::Read { .. } | Plan::Sigbus => return None,
        };
        Some(Fill { crew, space, uffd, window, area, wanted, plan, pages, src })
    }

    /// Fills the pages and wakes who waits for them; answers `false` if the wanted page could not be filled.
    fn run(&self) -> bool {
        let page = page_size();
        let mut pgoff = self.pages.start;
        let mut alone = false;
        while pgoff < self.pages.end {
            let end = if alone { pgoff + 1 } else { self.pages.end };
            let len = (end - pgoff) as usize * page;
            let install = match self.src {
                Some(src) => {
                    let src = src.wrapping_add((pgoff - self.pages.start) as usize * page);
                    // SAFETY: the list holds these pages from `src` on. It is that of an area, which the owner does not
                    // take out while this thread is inside.
                    unsafe { self.window.copy(pgoff, src, len) }
                }
                None => self.window.zeropage(pgoff, len),
            };
            let filled = (install.bytes / page) as u64;
            self.count(filled);
            pgoff += filled;
            match install.stop {
                None => alone = false,
                Some(Stop::Present) => {
                    add(&self.crew.shared.counters.already_present, 1);
                    add(&self.area.target.vmap.counters.already_present, 1);
                    if pgoff == self.wanted {
                        // Somebody brought it meanwhile, and what comes with it perhaps too.
                        break;
                    }
                    pgoff += 1;
                }
                // The page that stopped it is asked for alone; the kernel then names the reason.
                Some(_) if filled > 0 => {}
                Some(_) if pgoff > self.wanted => break,
                // A neighbour before it: not worth more.
                Some(_) if pgoff < self.wanted => pgoff = self.wanted,
                Some(_) if !alone => alone = true,
                Some(_) => return false,
            }
        }
        self.wake();
        true
    }

    fn count(&self, pages: u64) {
        if pages == 0 {
            return;
        }
        let (all, own) = (&*self.crew.shared.counters, &*self.area.target.vmap.counters);
        let counters = match self.src {
            Some(_) => [&all.pages_copied, &own.pages_copied],
            None => [&all.pages_zeroed, &own.pages_zeroed],
        };
        counters.into_iter().for_each(|counter| add(counter, pages));
        add(&self.space.counters.pages, pages);
    }

    /// Wakes whoever waits for one of the pages; they touch again.
    fn wake(&self) {
        let page = page_size();
        let start = self.area.start + (self.pages.start - self.area.pgoff) as usize * page;
        add(&self.crew.shared.counters.wakes, 1);
        // It can only fail for a range that no process could have.
        let _ = self.uffd.wake(start, (self.pages.end - self.pages.start) as usize * page);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use crate::{AttachOptions, Engine, Kiobuf};

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
