//! Pages that have to be read: at once where that can't wait, else by a worker, for whoever waits by then.

use std::ops::Range;
use std::sync::Arc;

use crossbeam_channel::{Sender, TrySendError};
use nix::errno::Errno;

use super::around::FaultAround;
use super::buffers::{Buffers, Late, buffer_bytes};
use super::call::Ticket;
use super::command::{Lent, ReadDone, ReadJob};
use super::fault::Fault;
use super::foreign::At;
use super::reads::{Asked, Ended, How, Limits, Outcome, Reads, Subject, Waiter, Wanted};
use super::resolve::{Answer, RETRIES_BEFORE_ASIDE, Resolver, Source};
use super::workers::{Roll, THREADS_MAX};
use crate::kiobuf::{ReadUnit, TryRead};
use crate::page::page_size;
use crate::source::GRANULE_MAX_BYTES;
use crate::space::stripes::is_own;
use crate::space::table::Area;
use crate::space::{Space, Target};
use crate::stats::add;
use crate::stats::latency::Moment;
use crate::sys::{Stop, Userfault};
use crate::vmap::failure::{FailureCause, Why};
use crate::vmap::page_size::PageSize;

/// How long buffers are kept for the next reads.
const BUFFERS_KEPT: std::time::Duration = std::time::Duration::from_millis(200);
/// When a read is tried for which the kernel had no memory.
const STARVED_PAUSE: std::time::Duration = std::time::Duration::from_millis(10);

/// When a worker is asked for again that could not be started.
const CALL_PAUSE: std::time::Duration = std::time::Duration::from_secs(1);

/// What the resolver keeps for reads by workers.
pub(crate) struct Slow {
    pub(super) reads: Reads,
    buffers: Buffers,
    jobs: Sender<ReadJob>,
    pub(super) roll: Arc<Roll>,
    limits: Limits,
    /// Workers that were asked for.
    called: usize,
    /// When the last one was, and how many had been refused by then.
    last_call: (Moment, usize),
}

/// What became of the next read.
#[allow(clippy::large_enum_variant, reason = "a box would be allocated")]
pub(crate) enum Next {
    /// A worker is at it.
    Made,
    /// Nothing can be read now.
    Nothing,
    /// All workers are busy, and one more should be started.
    NoWorker,
    /// It is out of date.
    Over(Ended),
}

impl Slow {
    /// `started` workers run, or will.
    pub(crate) fn new(
        jobs: Sender<ReadJob>,
        roll: Arc<Roll>,
        limits: Limits,
        buffer_bytes: usize,
        started: usize,
    ) -> Slow {
        Slow {
            reads: Reads::new(),
            buffers: Buffers::new(buffer_bytes),
            jobs,
            roll,
            limits,
            called: started,
            last_call: (Moment::now(), 0),
        }
    }

    /// Asks for one more worker, unless there are all, one will come, or one was just refused; answers whether it did.
    fn call_worker(&mut self, now: Moment) -> bool {
        let (started, refused) = (self.roll.started(), self.roll.refused());
        if started >= THREADS_MAX {
            return false;
        }
        let (last, refused_then) = self.last_call;
        let was_refused = refused > refused_then;
        let calls = self.called <= started + refused && (!was_refused || last.after(CALL_PAUSE) <= now);
        if calls {
            self.called += 1;
            self.last_call = (now, refused);
            self.roll.call();
        }
        // Nobody tells that one was refused.
        self.reads.change();
        self.reads.wake_at(now.after(CALL_PAUSE));
        calls
    }

    fn take_back(&mut self, lent: Lent) {
        self.buffers.take_back(lent.buffer, lent.is_quick, self.late());
        if !self.reads.is_busy() && self.buffers.is_ample() {
            self.reads.wake_at(Moment::now().after(BUFFERS_KEPT));
        }
    }

    /// What is lent to reads that nobody waits for any more.
    fn late(&self) -> Late {
        let mut late = Late::default();
        for wanted in self.reads.late().filter(|wanted| wanted.huge.is_none()) {
            let bytes = buffer_bytes(wanted.len_bytes());
            *if wanted.is_quick { &mut late.quick_bytes } else { &mut late.slow_bytes } += bytes;
        }
        late
    }

    /// How many buffers for huge pages of a size are lent to such reads.
    fn nr_late(&self, page: PageSize) -> usize {
        self.reads.late().filter(|wanted| wanted.huge == Some(page)).count()
    }
}

impl Resolver {
    /// Reads some pages of `run` at once if that can't block, else lets a worker do it.
    pub(super) fn read(
        &mut self,
        space: &Space,
        uffd: &Userfault,
        area: &Area<Target>,
        fault: &Fault,
        run: Range<u64>,
        around: FaultAround,
    ) -> Answer {
        let pgoff = area.pgoff_of(fault.addr);
        if let Some(answer) = self.join_read(space, uffd, area, fault, pgoff) {
            return answer;
        }
        // Installed meanwhile, perhaps in another space: then only this mapping of it is missing.
        if fault.retries > 0 {
            match self.map_resident(uffd, fault.addr) {
                // Not to be told while the address space is changing: it is read again and, if it is there, found so.
                Some(Answer::Later) if fault.retries >= RETRIES_BEFORE_ASIDE => {}
                Some(answer) => return answer,
                None => {}
            }
        }
        let window = around.window(area, &run, pgoff, true);
        let bytes = (window.end - window.start) as usize * page_size();
        match area.target.list.try_read_pages(window.start, &mut self.bounce[..bytes]) {
            TryRead::Done => {
                let source = Source::Read(self.bounce.as_ptr());
                self.install(space, uffd, area, fault, window, source)
            }
            // A neighbour's failure is not this page's.
            TryRead::Failed(_) if window.end - window.start > 1 => {
                self.read(space, uffd, area, fault, run, FaultAround::Fixed(1))
            }
            TryRead::Failed(_) if self.is_worker(fault) => {
                self.count_failed(area);
                self.poison(space, uffd, fault)
            }
            TryRead::WouldBlock if self.is_worker(fault) => self.refuse_worker(space, uffd, fault),
            // A failure is tried again, and told of.
            TryRead::WouldBlock | TryRead::Failed(_) => match self.brought_for_another(uffd, fault) {
                Some(answer) => answer,
                None if !self.may_wait(fault, None) => self.refuse_worker(space, uffd, fault),
                None => self.hand_to_worker(area, fault, window),
            },
        }
    }

    /// Has a fault wait for the read that brings its page; `None` if there is none.
    pub(super) fn join_read(
        &mut self,
        space: &Space,
        uffd: &Userfault,
        area: &Area<Target>,
        fault: &Fault,
        pgoff: u64,
    ) -> Option<Answer> {
        let id = self.slow.reads.covering(area.target.vmap.id, pgoff)?;
        if !self.may_wait(fault, Some(id)) {
            return Some(self.refuse_worker(space, uffd, fault));
        }
        Some(match self.slow.reads.join(id, Waiter::Fault(*fault)) {
            Ok(()) => Answer::Handed,
            Err(_) => Answer::Later,
        })
    }

    /// Tells whether a thread may wait for a read, or for one that it asks for: a worker may not, and the keeper only if there is a
    /// worker for every read by now, because it would have to start another itself.
    pub(super) fn may_wait(&self, fault: &Fault, read: Option<u64>) -> bool {
        if self.is_worker(fault) {
            return false;
        }
        if !is_own(fault.space) || !self.shared.keeper.is_thread(fault.tid) {
            return true;
        }
        let Slow { reads, roll, .. } = &self.slow;
        match read {
            Some(id) => reads.is_made(id) || reads.nr_reads() <= roll.started(),
            None => reads.nr_reads() < roll.started(),
        }
    }

    /// Maps a page that was not there when its thread touched, and has been brought for another space before its fault was
    /// read; `None` if it has not. A fault that was put off was asked about already.
    fn brought_for_another(&self, uffd: &Userfault, fault: &Fault) -> Option<Answer> {
        if fault.retries > 0 { None } else { self.map_resident(uffd, fault.addr) }
    }

    pub(super) fn hand_to_worker(&mut self, area: &Area<Target>, fault: &Fault, window: Range<u64>) -> Answer {
        let pgoff = area.pgoff_of(fault.addr);
        let Some(wanted) = self.wanted(&area.target, window, pgoff, fault) else { return Answer::Later };
        self.ask(&area.target, wanted, Waiter::Fault(*fault)).unwrap_or(Answer::Later)
    }

    /// Widens a window around a page to what is best read at once, and leaves out what others read.
    fn wanted(&self, target: &Target, window: Range<u64>, pgoff: u64, fault: &Fault) -> Option<Wanted> {
        let unit_of = |pgoff| target.list.read_unit(pgoff);
        let ReadUnit { pages: unit, run, medium, is_quick } = unit_of(pgoff)?;
        let widened = unit_of(window.start)?.pages.start..unit_of(window.end - 1)?.pages.end;
        let most = (GRANULE_MAX_BYTES / page_size()) as u64;
        let widened = cut_off(widened, &unit, most, |pgoff| Some(unit_of(pgoff)?.pages))?;
        // While a vmap grows its object does not hold all pages of the list yet.
        let held = target.vmap.nr_pages().max(pgoff + 1);
        let widened = widened.start..widened.end.min(held);
        let pages = self.slow.reads.gap(target.vmap.id, widened, pgoff);
        let is_unit = unit.start <= pages.start && pages.end <= unit.end;
        Some(Wanted {
            vmap: target.vmap.id,
            generation: target.generation,
            pages,
            run,
            huge: None,
            medium,
            is_quick,
            is_unit,
            alone: fault.alone,
            policy: target.vmap.failure_policy,
            since: fault.since,
        })
    }

    /// Asks for a read that nobody has asked for.
    pub(super) fn ask(&mut self, target: &Target, wanted: Wanted, waiter: Waiter) -> Option<Answer> {
        if self.slow.reads.ask(wanted, waiter).ok()? == Asked::Merged {
            add(&self.shared.counters.reads_merged, 1);
            add(&target.vmap.counters.reads_merged, 1);
        }
        Some(Answer::Handed)
    }

    /// Reads pages for a thread that asks for them.
    pub(crate) fn ask_for(&mut self, subject: Subject, generation: u64, pages: Range<u64>, reply: Ticket<How>) {
        let (vmap, asked) = (subject.vmap.id, pages.clone());
        let refused = |errno, message| {
            let why = Why::new(FailureCause::Error(errno), message);
            How::Failed { vmap, generation, pages: asked, why, tries: 0 }
        };
        let Some(ReadUnit { pages: unit, run, medium, is_quick }) = subject.list.read_unit(pages.start) else {
            return reply.answer(refused(Errno::EFAULT, "no page"));
        };
        let page = subject.vmap.page();
        let wanted = Wanted {
            vmap,
            generation,
            run,
            huge: page.is_huge().then_some(page),
            medium,
            // Of a huge page, others of its extents may wait.
            is_quick: is_quick && !page.is_huge(),
            is_unit: page.is_huge() || pages.end <= unit.end,
            // It may overlap others, so nothing is to be joined to it.
            alone: true,
            policy: subject.vmap.failure_policy,
            since: Moment::now(),
            pages,
        };
        if let Err(Waiter::Asker { subject, reply }) = self.slow.reads.ask(wanted, Waiter::Asker { subject, reply }) {
            drop(subject);
            reply.answer(refused(Errno::ENOMEM, "no memory to ask for it"));
        }
    }

    /// Has a worker make the next read, if there is one that may be made and a worker for it.
    pub(crate) fn make_next(&mut self, spaces: &[Space]) -> Next {
        let mut index = 0;
        // Those that wait for nothing have room of their own, so they are one kind, and those that may wait another.
        let (mut slow_waits, mut quick_waits) = (false, false);
        while let Some(found) = self.slow.reads.next_queued(index, self.slow.limits) {
            let made = self.slow.reads.nr_made();
            if made >= self.slow.roll.started() {
                return Next::NoWorker;
            }
            let read = self.slow.reads.at(found);
            let Some(subject) =
                self.slow.reads.first_waiter(read.id).and_then(|waiter| subject(waiter, spaces, &read.wanted))
            else {
                return Next::Over(self.slow.reads.stale(found));
            };
            let (id, wanted) = (read.id, read.wanted.clone());
            let waits = if wanted.is_quick { &mut quick_waits } else { &mut slow_waits };
            if wanted.huge.is_none() && *waits {
                index = found + 1;
                continue;
            }
            let Some(lent) = self.lend(&wanted) else {
                // Smaller ones must not take the room for which it waits, again and again.
                *waits |= wanted.huge.is_none();
                if !self.slow.reads.is_busy() {
                    // Nothing that comes back would have it tried again.
                    self.slow.reads.change();
                    self.slow.reads.wake_at(Moment::now().after(STARVED_PAUSE));
                }
                index = found + 1;
                continue;
            };
            let counters = [&self.shared.counters.worker_reads, &subject.vmap.counters.worker_reads];
            counters.into_iter().for_each(|counter| add(counter, 1));
            let Wanted { generation, pages, .. } = wanted;
            match self.slow.jobs.try_send(ReadJob { id, subject, generation, pages, lent }) {
                Ok(()) => {
                    self.slow.reads.made(found);
                    self.tell_held();
                    return Next::Made;
                }
                // There is room for as many as there are workers, and the keeper keeps the other end: it can't be.
                Err(TrySendError::Full(job) | TrySendError::Disconnected(job)) => {
                    // The area, or the asker, holds the subject too.
                    self.give_back(job.lent);
                    return Next::Over(self.slow.reads.stale(found));
                }
            }
        }
        self.tell_held();
        Next::Nothing
    }

    fn lend(&mut self, wanted: &Wanted) -> Option<Lent> {
        let (huge, is_quick) = (wanted.huge, wanted.is_quick);
        let buffer = match huge {
            Some(page) => self.huge.lend(page, self.slow.nr_late(page))?,
            None => self.slow.buffers.lend(wanted.len_bytes(), is_quick, self.slow.late())?,
        };
        Some(Lent { buffer, huge, is_quick })
    }

    fn give_back(&mut self, lent: Lent) {
        match lent.huge {
            Some(page) => self.huge.give_back(page, lent.buffer, self.slow.nr_late(page)),
            None => self.slow.take_back(lent),
        }
        self.tell_held();
    }

    /// Publishes how much memory buffers take. No other thread does.
    fn tell_held(&self) {
        use std::sync::atomic::Ordering::Relaxed;
        let late = self.slow.late();
        let held = self.slow.buffers.held_bytes(late) as u64;
        self.shared.counters.read_buffer_bytes.store(held, Relaxed);
        self.shared.counters.read_buffer_bytes_late.store((late.slow_bytes + late.quick_bytes) as u64, Relaxed);
        let peak = &self.shared.counters.read_buffer_bytes_peak;
        if held > peak.load(Relaxed) {
            peak.store(held, Relaxed);
        }
    }

    /// Asks for one more worker, if it is time; answers whether the keeper is to be nudged.
    pub(crate) fn call_worker(&mut self) -> bool {
        self.slow.call_worker(Moment::now())
    }

    /// Takes what a worker has done; answers with what that means for those who wait.
    pub(crate) fn finish_read(&mut self, done: ReadDone) -> Option<Ended> {
        let ReadDone { id, lent, outcome } = done;
        let failed = matches!(outcome, Outcome::Failed(_));
        let ended = self.slow.reads.finished(id, outcome, Moment::now());
        self.give_back(lent);
        if failed && !matches!(ended, Some(Ended { how: How::Failed { .. }, .. })) {
            add(&self.shared.counters.reads_failed, 1);
        }
        ended
    }

    /// Finds a read whose deadline has passed; at the end, `None`.
    pub(crate) fn expired_read(&mut self) -> Option<Ended> {
        let ended = self.slow.reads.expired(Moment::now());
        match ended {
            Some(_) => add(&self.shared.counters.reads_expired, 1),
            None if !self.slow.reads.is_busy() => {
                self.slow.buffers.trim();
                self.tell_held();
            }
            None => {}
        }
        ended
    }

    /// Answers a fault whose page the object holds now: it is mapped, or, where that can't be done, touched again.
    pub(crate) fn bring(&mut self, space: &Space, fault: &Fault) -> Answer {
        let Some(uffd) = &space.uffd else { return Answer::Done };
        if let Some(foreign) = &space.foreign {
            let fault = Fault { retries: fault.retries.max(1), ..*fault };
            return self.resolve_foreign(At { space, uffd, foreign }, &fault);
        }
        let page = space.table.find(fault.addr).map_or(PageSize::Base, |area| area.target.page);
        match uffd.r#continue(page.floor(fault.addr), page.bytes()).stop {
            None => Answer::Done,
            Some(Stop::Gone) => Answer::Gone,
            Some(_) => self.wake_page(uffd, page, fault),
        }
    }

    /// Forgets faults that nobody waits for any more.
    pub(crate) fn forget_faults(&mut self, gone: impl Fn(&Fault) -> bool) {
        let cancelled = self.slow.reads.forget(gone);
        add(&self.shared.counters.reads_cancelled, cancelled);
    }
}

/// Cuts a window of whole units off that is wider than `most` pages, which a unit never is: it is then as many units as fit from
/// the given one on.
fn cut_off(
    window: Range<u64>,
    unit: &Range<u64>,
    most: u64,
    unit_of: impl Fn(u64) -> Option<Range<u64>>,
) -> Option<Range<u64>> {
    if window.end - window.start <= most {
        return Some(window);
    }
    let end = unit.start + most;
    if window.end <= end {
        return Some(unit.start..window.end);
    }
    let last = unit_of(end - 1)?;
    Some(unit.start..if last.end <= end { last.end } else { last.start })
}

/// What a read is of, as somebody knows who waits for it; `None` if it is not that any more.
fn subject(waiter: &Waiter, spaces: &[Space], wanted: &Wanted) -> Option<Subject> {
    match waiter {
        Waiter::Fault(fault) => {
            let index = spaces.binary_search_by_key(&fault.space, |space| space.id).ok()?;
            let target = &spaces[index].table.find(fault.addr)?.target;
            let Target { vmap, list, window, .. } = target;
            target.keeps(wanted.vmap, wanted.generation).then(|| Subject {
                vmap: Arc::clone(vmap),
                list: list.clone(),
                window: window.clone(),
            })
        }
        Waiter::Asker { subject: Subject { vmap, list, window }, .. } => {
            Some(Subject { vmap: Arc::clone(vmap), list: list.clone(), window: window.clone() })
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;
    use crate::runtime::handles::Request;
    use crate::runtime::workers;
    use crate::{AttachOptions, Engine, FailurePolicy, PageSource, Region};

    #[test]
    fn a_wide_window_is_cut_off_between_units() {
        // Units of 4 pages from page 1 on.
        let unit_of = |pgoff: u64| {
            let start = (pgoff - 1) / 4 * 4 + 1;
            Some(start..start + 4)
        };
        let cut = |window, pgoff, most| cut_off(window, &unit_of(pgoff).unwrap(), most, unit_of).unwrap();
        assert_eq!(cut(1..17, 6, 16), 1..17);
        assert_eq!(cut(1..29, 6, 16), 5..21);
        assert_eq!(cut(1..29, 6, 4), 5..9);
        assert_eq!(cut(1..29, 6, 6), 5..9);
        assert_eq!(cut(1..29, 20, 16), 17..29);
        // The first unit is cut by the begin of its extent: what fits after it.
        let short = |pgoff: u64| unit_of(pgoff).map(|unit| unit.start.max(3)..unit.end);
        assert_eq!(cut_off(3..29, &(3..5), 16, short), Some(3..17));
    }

    #[test]
    fn one_worker_is_called_at_a_time_and_after_a_refusal_not_at_once() {
        let roll = Arc::new(Roll::new());
        let (jobs, _inbox) = crossbeam_channel::bounded(1);
        let mut slow = Slow::new(jobs, Arc::clone(&roll), workers::limits(8), 8 << 20, 0);
        let start = Moment::now();
        let at = |ms| start.after(Duration::from_millis(ms));
        assert!(slow.call_worker(at(0)) && !slow.call_worker(at(1)));
        // However long the keeper takes, it is asked once.
        assert!(!slow.call_worker(at(5000)));
        assert!(roll.take_call() && !roll.take_call());
        roll.refuse();
        assert!(slow.reads.take_changed() && slow.reads.soonest().is_some(), "it is asked again");
        assert!(slow.call_worker(at(5000)) && !slow.call_worker(at(5001)));
        assert!(roll.take_call());
        roll.refuse();
        assert!(!slow.call_worker(at(5001)) && !slow.call_worker(at(5999)) && !roll.take_call());
        assert!(slow.call_worker(at(6000)) && roll.take_call());
        // It has come.
        roll.enter(1);
        assert!(slow.call_worker(at(6001)) && roll.take_call());
    }

    /// Answers when it is let, with zeros; touches a page when it is dropped.
    struct Gate {
        asked: mpsc::Sender<()>,
        open: std::sync::Mutex<mpsc::Receiver<()>>,
    }

    impl PageSource for Gate {
        fn read_at(&self, _: u64, _: &mut [u8]) -> std::io::Result<()> {
            self.asked.send(()).unwrap();
            self.open.lock().unwrap().recv().map_err(std::io::Error::other)
        }
    }

    struct Last {
        page: usize,
        touched: mpsc::Sender<Result<(), Errno>>,
    }

    impl PageSource for Last {
        fn read_at(&self, _: u64, _: &mut [u8]) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Drop for Last {
        fn drop(&mut self) {
            self.touched.send(populate(self.page)).unwrap();
        }
    }

    /// Has the kernel touch a page, which is an error where a touch would be SIGBUS.
    fn populate(page: usize) -> Result<(), Errno> {
        // SAFETY: brings a page, or not.
        Errno::result(unsafe { libc::madvise(page as *mut _, 1, libc::MADV_POPULATE_READ) }).map(drop)
    }

    /// Code that the keeper runs, where it drops a list, waits for a slow page if there is a worker for it, and is refused it if
    /// not: nobody else would start one.
    #[test]
    fn the_thread_that_starts_workers_does_not_wait_for_one() {
        let engine = Engine::builder().fault_around_pages(1).build().unwrap();
        let (asked, is_asked) = mpsc::channel();
        let attach = |open| {
            let mut list = crate::Kiobuf::new();
            let source = Gate { asked: asked.clone(), open: std::sync::Mutex::new(open) };
            list.map_source(Arc::new(source), 10 * page_size() as u64).unwrap();
            let policy = FailurePolicy::default().retries(0).deadline(Duration::from_secs(3600));
            let vmap = engine.vmap_builder(&list).failure_policy(policy).build().unwrap();
            let region = vmap.attach(&AttachOptions::new()).unwrap();
            (vmap, region)
        };
        let page = |region: &Region, n| region.as_ptr().addr() + n * page_size();
        let (open, opened) = mpsc::channel();
        let (vmap, region) = attach(opened);
        open.send(()).unwrap();
        if populate(page(&region, 0)) == Err(Errno::EFAULT) {
            return eprintln!("skipped, because the kernel's own touches are not reported to this user");
        }
        is_asked.recv().unwrap();
        let touched_by_keeper = |page| {
            let (touched, outcome) = mpsc::channel();
            let mut list = crate::Kiobuf::new();
            list.map_source(Arc::new(Last { page, touched }), 1).unwrap();
            let _subject = Subject { vmap: Arc::clone(&vmap.core), list, window: None };
            vmap.shared.keeper.send(Request::Drop { _subject });
            outcome.recv_timeout(Duration::from_secs(20)).unwrap()
        };
        open.send(()).unwrap();
        assert_eq!(touched_by_keeper(page(&region, 1)), Ok(()));
        is_asked.recv().unwrap();
        let (open_hung, opened) = mpsc::channel();
        let (_vmap, hung) = attach(opened);
        std::thread::scope(|scope| {
            let toucher = scope.spawn(|| populate(page(&hung, 0)));
            is_asked.recv().unwrap();
            let refused = touched_by_keeper(page(&region, 2));
            open_hung.send(()).unwrap();
            assert_eq!((refused.is_err(), engine.stats().self_faults), (true, 1));
            assert_eq!(toucher.join().unwrap(), Ok(()));
        });
        assert!(is_asked.try_recv().is_err(), "it was not asked for what was refused");
    }
}
