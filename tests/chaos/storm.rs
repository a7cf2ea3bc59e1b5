//! A storm in one process: threads touch at random, each touch is judged on the spot, while other threads unmap, advise,
//! attach, drop and fork, and signals come in between.

use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use kiomap::{AttachOptions, Vmap, page_size};
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use crate::local::{Answer, Local, advise};
use crate::script::{Access, Advice, stamp};
use crate::sheet::{Avail, Sheet};
use crate::support::scene::Rng;
use crate::support::touch;

/// The words of a page that storms write to: one for each thread of each process.
pub(crate) const LANES: usize = 64;
/// Lanes of one process.
pub(crate) const LANES_EACH: usize = 4;

/// What a process does in a storm.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct StormJob {
    /// Values that are written say in which storm.
    pub(crate) number: u64,
    pub(crate) seed: u64,
    pub(crate) lane: usize,
    pub(crate) touchers: usize,
    pub(crate) touches: u32,
    pub(crate) runs: Vec<Run>,
    /// Ranges that are unmapped, in this order, and whether their pages are dropped right before: threads then wait
    /// there.
    pub(crate) cuts: Vec<(usize, usize, bool)>,
    pub(crate) advice: Vec<(usize, usize, Advice)>,
    /// Some process drops pages: they may become the list's again.
    pub(crate) removes: bool,
    /// Some process writes.
    pub(crate) writes: bool,
    /// A vmap that is attached and dropped, at this place.
    pub(crate) churn: Option<(usize, usize, u64)>,
    pub(crate) churns: u32,
    pub(crate) forks: u32,
    pub(crate) timer: Option<u32>,
}

/// Addresses that show pages of one vmap in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Run {
    pub(crate) addr: usize,
    pub(crate) pages: usize,
    pub(crate) vmap: usize,
    pub(crate) pgoff: u64,
    pub(crate) access: Access,
    /// A forked child has it, with this access.
    pub(crate) inherited: Option<Access>,
    /// Storms may change its bytes.
    pub(crate) writable: bool,
}

pub(crate) fn storm_value(number: u64, lane: usize, vmap: usize, pgoff: u64) -> u64 {
    stamp(number << 8 | lane as u64, (vmap as u64) << 32 | pgoff) | 1 << 63
}

/// Tells whether a word of a page may have this value during a storm, or after it.
pub(crate) fn allowed(job: (u64, bool, bool), sheet: Sheet, vmap: usize, pgoff: u64, word: usize, value: u64) -> bool {
    let (number, writes, removes) = job;
    value == Sheet::word(sheet.now(vmap, pgoff), word)
        || removes && value == Sheet::word(sheet.list(vmap, pgoff), word)
        || writes && word < LANES && value == storm_value(number, word, vmap, pgoff)
}

struct Weather<'a> {
    job: &'a StormJob,
    regions: &'a std::collections::HashMap<u32, kiomap::Region>,
    sheet: Sheet,
    /// Touches so far, of all threads.
    touched: AtomicU64,
    /// The range that is unmapped next.
    next_cut: AtomicUsize,
    problem: Mutex<Option<String>>,
}

impl Weather<'_> {
    fn total(&self) -> u64 {
        u64::from(self.job.touches) * self.job.touchers as u64
    }

    /// Waits until action `n` of `of` is due.
    fn wait_for_turn(&self, n: usize, of: usize) {
        let due = self.total() * n as u64 / of as u64;
        while self.touched.load(Ordering::Relaxed) < due && !self.is_over() {
            std::thread::yield_now();
        }
    }

    fn is_over(&self) -> bool {
        self.problem.lock().unwrap().is_some()
    }

    fn report(&self, what: String) {
        self.problem.lock().unwrap().get_or_insert(what);
    }

    fn is_cut(&self, addr: usize) -> bool {
        self.job.cuts.iter().any(|&(start, len, _)| (start..start + len).contains(&addr))
    }

    /// Judges what a touch of a word has come to.
    fn judge(&self, run: &Run, page: usize, word: usize, saw: Result<u64, touch::Refused>, own: Option<u64>) {
        let addr = run.addr + page * page_size() + word * 8;
        let pgoff = run.pgoff + page as u64;
        let avail = self.sheet.avail(run.vmap, pgoff);
        let right = match saw {
            Err(refused) if refused.is_sigsegv() && refused.addr == addr => {
                run.access == Access::None || self.is_cut(addr)
            }
            Err(refused) => run.access != Access::None && refused.is_sigbus_at(addr) && avail != Avail::Bytes,
            Ok(_) if run.access == Access::None || avail == Avail::Bus => false,
            Ok(value) => match own {
                Some(own) => value == own,
                None => {
                    let job = (self.job.number, self.job.writes, self.job.removes);
                    allowed(job, self.sheet, run.vmap, pgoff, word, value)
                }
            },
        };
        if !right {
            let now = (avail != Avail::Bus).then(|| Sheet::word(self.sheet.now(run.vmap, pgoff), word));
            self.report(format!(
                "a touch of word {word} of page {pgoff} of vmap {} at {addr:#x} ({:?}, {avail:?}) was {saw:x?}; the page has {now:x?}, own {own:x?}",
                run.vmap, run.access
            ));
        }
    }

    /// Any page, or one that is about to be unmapped.
    fn choose(&self, rng: &mut Rng) -> (&Run, usize) {
        let job = self.job;
        if rng.below(2) == 0
            && let Some(&(start, len, _)) = job.cuts.get(self.next_cut.load(Ordering::Relaxed))
        {
            let at = start + rng.below((len / page_size()) as u64) as usize * page_size();
            let holds = |run: &&Run| (run.addr..run.addr + run.pages * page_size()).contains(&at);
            if let Some(run) = job.runs.iter().find(holds) {
                return (run, (at - run.addr) / page_size());
            }
        }
        let run = &job.runs[rng.below(job.runs.len() as u64) as usize];
        (run, rng.below(run.pages as u64) as usize)
    }

    fn toucher(&self, index: usize) {
        let job = self.job;
        let mut rng = Rng::new(stamp(job.seed, index as u64));
        let lane = job.lane + index;
        let mut written = HashSet::new();
        for _ in 0..job.touches {
            self.touched.fetch_add(1, Ordering::Relaxed);
            if self.is_over() {
                return;
            }
            let (run, page) = self.choose(&mut rng);
            let at = run.addr + page * page_size();
            let pgoff = run.pgoff + page as u64;
            let mine = storm_value(job.number, lane, run.vmap, pgoff);
            if job.writes && run.writable && run.access == Access::Write && rng.below(3) == 0 {
                match touch::write_word((at + lane * 8) as *mut u8, mine) {
                    Ok(()) if self.sheet.avail(run.vmap, pgoff) != Avail::Bytes => {
                        self.report(format!("a write to page {pgoff} of vmap {}, which is not there", run.vmap));
                    }
                    Ok(()) => {
                        written.insert((run.vmap, pgoff));
                    }
                    refused => self.judge(run, page, lane, refused.map(|()| 0), None),
                }
            }
            let word = if rng.below(2) == 0 { rng.below(LANES as u64) as usize } else { rng.below(512) as usize };
            let word = if rng.below(4) == 0 { lane } else { word };
            let own = (word == lane && !job.removes && written.contains(&(run.vmap, pgoff))).then_some(mine);
            self.judge(run, page, word, touch::read_word((at + word * 8) as *const u8), own);
        }
    }

    fn cutter(&self) {
        let mut rng = Rng::new(self.job.seed ^ 0x3c3c);
        for (n, &(addr, len, evicted)) in self.job.cuts.iter().enumerate() {
            self.next_cut.store(n, Ordering::Relaxed);
            self.wait_for_turn(n + 1, self.job.cuts.len() + 1);
            if evicted {
                advise(addr, len, Advice::Remove);
                rng.dawdle(20_000);
            }
            // SAFETY: the arena is the round's own, and nothing refers to it.
            if unsafe { libc::munmap(addr as *mut libc::c_void, len) } != 0 {
                self.report(format!("munmap: {}", Errno::last()));
            }
        }
    }

    fn adviser(&self) {
        for (n, &(addr, len, advice)) in self.job.advice.iter().enumerate() {
            self.wait_for_turn(n, self.job.advice.len());
            // What it answers depends on what else goes on.
            let _ = advise(addr, len, advice);
        }
    }

    fn churner(&self, vmap: &Vmap, number: usize, base: usize, nr_pages: u64) {
        let mut rng = Rng::new(self.job.seed ^ 0x5a5a);
        for n in 0..self.job.churns {
            self.wait_for_turn(n as usize, self.job.churns as usize);
            if self.is_over() {
                return;
            }
            let pgoff = rng.below(nr_pages);
            let pages = 1 + rng.below(nr_pages - pgoff) as usize;
            let options = AttachOptions::new().pgoff(pgoff).len_bytes(pages * page_size());
            let options = if rng.below(2) == 0 { options.at(base) } else { options };
            let striped = options.stripes(1 + rng.below(3.min(pages as u64)) as usize);
            let attached = match vmap.attach(&striped) {
                Err(kiomap::Error::NotOwner { .. }) => vmap.attach(&options),
                attached => attached,
            };
            let region = match attached {
                Ok(region) => region,
                Err(error) => return self.report(format!("attach in a storm: {error}")),
            };
            if region.is_first() {
                self.report("an attach in a storm says that it is the first".into());
            }
            let addr = region.as_ptr() as usize;
            let (access, inherited) = (Access::Write, None);
            let run = Run { addr, pages, vmap: number, pgoff, access, inherited, writable: false };
            for _ in 0..3 {
                let (page, word) = (rng.below(pages as u64) as usize, rng.below(512) as usize);
                let at = addr + page * page_size() + word * 8;
                self.judge(&run, page, word, touch::read_word(at as *const u8), None);
            }
            // Another thread's memory may get the address at once.
            if pages > 2 && rng.below(2) == 0 {
                let middle = addr + page_size() * (1 + rng.below(pages as u64 - 2) as usize);
                // SAFETY: a page of the region, to which nothing refers.
                unsafe { libc::munmap(middle as *mut libc::c_void, page_size()) };
            }
            drop(region);
        }
    }

    fn forker(&self) {
        let mut rng = Rng::new(self.job.seed ^ 0xa5a5);
        for n in 0..self.job.forks {
            self.wait_for_turn(n as usize, self.job.forks as usize);
            let seed = rng.next();
            // SAFETY: the child touches memory and exits.
            match unsafe { libc::fork() } {
                0 => {
                    nix::unistd::alarm::set(60);
                    self.forked(seed);
                    let problem = self.problem.try_lock();
                    let code = match problem.as_deref() {
                        Ok(Some(problem)) => {
                            crate::support::tell(&format!("forked in a storm: {problem}"));
                            1
                        }
                        _ => 0,
                    };
                    // SAFETY: ends the process without exit handlers.
                    unsafe { libc::_exit(code) }
                }
                -1 => return self.report(format!("fork: {}", Errno::last())),
                pid => {
                    let mut status = 0;
                    // SAFETY: the child just forked.
                    while unsafe { libc::waitpid(pid, &raw mut status, 0) } < 0 && Errno::last() == Errno::EINTR {}
                    if status != 0 {
                        self.report(format!("a process forked in a storm ended with status {status:#x}"));
                    }
                }
            }
        }
    }

    /// In a child forked in the middle: only its own thread is here, and locks may be held by others.
    fn forked(&self, seed: u64) {
        // A problem that was there before is the parent's.
        if self.problem.try_lock().map_or(true, |problem| problem.is_some()) {
            return;
        }
        if let Some(kiomap::Error::NotInherited { why }) = self.regions.values().find_map(|region| region.check().err())
            && !why.contains("inherit(false)")
        {
            return self.report(format!("nothing was inherited: {why}"));
        }
        let mut rng = Rng::new(seed);
        for _ in 0..8 {
            let run = &self.job.runs[rng.below(self.job.runs.len() as u64) as usize];
            let page = rng.below(run.pages as u64) as usize;
            let Some(access) = run.inherited else { continue };
            let run = Run { access, ..*run };
            let at = run.addr + page * page_size();
            if self.is_cut(at) {
                continue;
            }
            let word = rng.below(512) as usize;
            self.judge(&run, page, word, touch::read_word((at + word * 8) as *const u8), None);
        }
    }
}

extern "C" fn on_timer(_: i32) {}

/// Sends a signal to the process again and again, until dropped.
struct Timer(libc::timer_t);

impl Timer {
    fn start(micros: u32) -> Timer {
        let action = nix::sys::signal::SigAction::new(
            nix::sys::signal::SigHandler::Handler(on_timer),
            nix::sys::signal::SaFlags::SA_RESTART,
            nix::sys::signal::SigSet::empty(),
        );
        // SAFETY: the handler does nothing.
        unsafe { nix::sys::signal::sigaction(nix::sys::signal::Signal::SIGUSR1, &action) }.unwrap();
        // SAFETY: plain data, for which zeros are valid.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_SIGNAL;
        event.sigev_signo = libc::SIGUSR1;
        let mut timer = std::ptr::null_mut();
        let each = libc::timespec { tv_sec: 0, tv_nsec: i64::from(micros) * 1000 };
        let spec = libc::itimerspec { it_interval: each, it_value: each };
        // SAFETY: the arguments are valid for the length of the calls.
        unsafe {
            assert_eq!(libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer), 0);
            assert_eq!(libc::timer_settime(timer, 0, &raw const spec, std::ptr::null_mut()), 0);
        }
        Timer(timer)
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: the timer made above.
        unsafe { libc::timer_delete(self.0) };
    }
}

pub(crate) fn run(local: &Local, job: &StormJob) -> Answer {
    let weather = Weather {
        job,
        regions: &local.regions,
        sheet: local.sheet,
        touched: AtomicU64::new(0),
        next_cut: AtomicUsize::new(0),
        problem: Mutex::new(None),
    };
    let timer = job.timer.map(Timer::start);
    if !job.runs.is_empty() {
        std::thread::scope(|scope| {
            let weather = &weather;
            let mut threads: Vec<_> =
                (0..job.touchers).map(|index| scope.spawn(move || weather.toucher(index))).collect();
            if !job.cuts.is_empty() {
                threads.push(scope.spawn(|| weather.cutter()));
            }
            if !job.advice.is_empty() {
                threads.push(scope.spawn(|| weather.adviser()));
            }
            if let Some((number, base, nr_pages)) = job.churn.filter(|churn| job.churns > 0 && churn.2 > 0) {
                let vmap = &local.vmaps[&number];
                threads.push(scope.spawn(move || weather.churner(vmap, number, base, nr_pages)));
            }
            if job.forks > 0 {
                threads.push(scope.spawn(|| weather.forker()));
            }
            // Until they have ended, and not only their bodies, as the scope waits for: a thread that ends holds a lock of
            // the standard library, without which a child that is forked then can start no thread.
            threads.into_iter().for_each(|thread| thread.join().unwrap());
        });
    }
    drop(timer);
    let touches = weather.touched.load(Ordering::Relaxed);
    Answer::Storm { touches, problem: weather.problem.into_inner().unwrap() }
}
