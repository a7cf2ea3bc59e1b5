//! What the tests share: processes of their own, deadlines, touches that survive SIGBUS, and lists to touch.
#![allow(dead_code, reason = "each test binary uses a part of it")]

pub(crate) mod calls;
pub(crate) mod contents;
pub(crate) mod faulty;
pub(crate) mod peer;
pub(crate) mod pool;
pub(crate) mod populating;
pub(crate) mod raw;
pub(crate) mod scene;
pub(crate) mod slow;
pub(crate) mod touch;
pub(crate) mod truth;
#[cfg(feature = "object-store")]
pub(crate) mod web;

use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use kiomap::{AttachOptions, Engine, EngineBuilder, Features, Kiobuf, Region, Vmap, page_size};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

/// Longer than anything here takes on a busy two-core machine; shorter than anyone's patience.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

const ALONE: &str = "KIOMAP_TEST_ALONE";

/// Runs the body of the test `name` in a process of its own, which is killed at the deadline: forks then copy no other
/// test's threads, and a hang is a failure. The test binary is run again with only this test.
pub(crate) fn alone(name: &str, body: impl FnOnce()) {
    alone_for(DEADLINE, name, body);
}

/// As [`alone`], for a body that takes longer than other tests: it is killed after `deadline`.
pub(crate) fn alone_for(deadline: Duration, name: &str, body: impl FnOnce()) {
    if std::env::var_os(ALONE).is_some_and(|chosen| chosen == name) {
        // The kernel ends a process that hangs, whatever its threads do.
        nix::unistd::alarm::set(deadline.as_secs() as u32);
        return body();
    }
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture", "--include-ignored", "--test-threads=1"])
        .env(ALONE, name)
        .process_group(0)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut streams: [Box<dyn Read + Send>; 2] =
        [Box::new(child.stdout.take().unwrap()), Box::new(child.stderr.take().unwrap())];
    let readers = streams.each_mut().map(|stream| {
        let mut stream = std::mem::replace(stream, Box::new(std::io::empty()));
        std::thread::spawn(move || {
            let mut text = Vec::new();
            stream.read_to_end(&mut text).unwrap();
            String::from_utf8_lossy(&text).into_owned()
        })
    });
    let status = child.wait().unwrap();
    // What it forked and left behind would keep the streams open.
    let _ = nix::sys::signal::killpg(Pid::from_raw(child.id() as i32), nix::sys::signal::Signal::SIGKILL);
    let [out, err] = readers.map(|reader| reader.join().unwrap());
    assert!(status.success(), "{name} ended with {status}\n--- stdout\n{out}\n--- stderr\n{err}");
    assert!(out.contains("1 passed"), "no test is named {name}:\n{out}");
    // What was skipped is told by the process that skipped it.
    for line in err.lines().filter(|line| {
        line.contains("skipped, because")
            || line.contains("came and went")
            || line.contains(" us a page")
            || line.contains("pages right")
    }) {
        tell(line);
    }
}

/// Writes a line to standard error, past the test runner, which keeps what a passing test prints to itself.
pub(crate) fn tell(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Says that a test can't run here; shown and countable, never silent.
#[macro_export]
macro_rules! skip {
    ($($why:tt)*) => {{
        let name = std::thread::current().name().unwrap_or("a test").to_owned();
        $crate::support::tell(&format!("{name}: skipped, because {}", format_args!($($why)*)));
        return;
    }};
}

/// The calls that were counted; skips a test where the kernel lets nobody trace.
#[macro_export]
macro_rules! skip_untraceable {
    ($calls:expr) => {
        match $calls {
            Ok(calls) => calls,
            Err(errno) => $crate::skip!("a process may not trace its own child here: {errno}"),
        }
    };
}

/// Skips a test that has page sources where the level has none.
#[macro_export]
macro_rules! needs_sources {
    () => {
        if $crate::support::taken_away().contains(kiomap::Features::THREAD_ID) {
            $crate::skip!("without THREAD_ID there are no page sources");
        }
    };
}

/// Runs `body` on a thread of its own and fails at the deadline.
pub(crate) fn within<T: Send + 'static>(deadline: Duration, body: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, outcome) = mpsc::channel();
    let thread = std::thread::spawn(move || done.send(body()));
    match outcome.recv_timeout(deadline) {
        Ok(value) => value,
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("not done within {deadline:?}"),
        Err(mpsc::RecvTimeoutError::Disconnected) => match thread.join() {
            Err(panic) => std::panic::resume_unwind(panic),
            Ok(_) => unreachable!("the thread sends before it ends"),
        },
    }
}

/// Waits until `condition` holds; fails at the deadline.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
        std::thread::yield_now();
    }
}

/// Forks; the child runs `body` and exits with 0 if it returned, 101 if it panicked.
pub(crate) fn fork_child(body: impl FnOnce()) -> Pid {
    // SAFETY: called in tests that run alone; the child uses what a fork leaves usable and then exits at once.
    match unsafe { fork() }.unwrap() {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body));
            // SAFETY: ends the child without running the parent's exit handlers.
            unsafe { libc::_exit(if outcome.is_ok() { 0 } else { 101 }) }
        }
    }
}

/// A pidfd of a process.
#[track_caller]
pub(crate) fn pidfd(pid: Pid) -> OwnedFd {
    // SAFETY: plain numbers; a new descriptor or a negative number.
    let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) } as i32;
    assert!(raw >= 0, "pidfd_open: {}", std::io::Error::last_os_error());
    // SAFETY: the descriptor just made.
    unsafe { OwnedFd::from_raw_fd(raw) }
}

/// Waits for a child and says how it ended.
pub(crate) fn reap(child: Pid) -> WaitStatus {
    waitpid(child, None).unwrap()
}

/// Waits for a child that must have succeeded.
#[track_caller]
pub(crate) fn reap_ok(child: Pid) {
    let status = reap(child);
    assert!(matches!(status, WaitStatus::Exited(_, 0)), "{status:?}");
}

/// The byte that [`pages`] puts everywhere into page `n`: never zero.
pub(crate) fn mark(n: u64) -> u8 {
    (n % 251) as u8 + 1
}

/// A list of `nr_pages` pages of memory; page `n` is full of [`mark`]`(n)`.
pub(crate) fn pages(nr_pages: u64) -> Kiobuf {
    let bytes = (0..nr_pages).flat_map(|n| std::iter::repeat_n(mark(n), page_size())).collect();
    let mut list = Kiobuf::new();
    list.map_bytes(bytes).unwrap();
    list
}

/// The open descriptors of this process.
pub(crate) fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// The threads of this process, by name.
pub(crate) fn threads() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    tasks
        .filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok())
        .map(|name| name.trim().to_owned())
        .collect()
}

/// The mappings of this process that show a vmap; not those that are hidden, through which the engine fills pages.
pub(crate) fn vmap_mappings() -> Vec<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains("/memfd:kiomap ") && !line.contains(" ---s ")).map(str::to_owned).collect()
}

/// Fills a buffer with the bytes of a [`mark`]ed list from page `first` on.
pub(crate) fn fill_marks(first: u64, buf: &mut [u8]) {
    for (n, page) in (first..).zip(buf.chunks_mut(page_size())) {
        page.fill(mark(n));
    }
}

/// A page source of [`mark`]ed pages; the closure is called before each read, with the first page and the number of
/// pages asked for, and may fail it.
struct MarkedSource<F>(F);

impl<F: Fn(u64, usize) -> std::io::Result<()> + Send + Sync + 'static> kiomap::PageSource for MarkedSource<F> {
    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> std::io::Result<()> {
        let first = offset_bytes / page_size() as u64;
        (self.0)(first, buf.len().div_ceil(page_size()))?;
        fill_marks(first, buf);
        Ok(())
    }
}

/// A list of `nr_pages` [`mark`]ed pages that a source makes, after asking `before` with the first page and their number.
pub(crate) fn source(
    nr_pages: u64,
    before: impl Fn(u64, usize) -> std::io::Result<()> + Send + Sync + 'static,
) -> Kiobuf {
    let mut list = Kiobuf::new();
    list.map_source(std::sync::Arc::new(MarkedSource(before)), nr_pages * page_size() as u64).unwrap();
    list
}

/// A list of `nr_pages` holes.
pub(crate) fn holes(nr_pages: u64) -> Kiobuf {
    let mut list = Kiobuf::new();
    list.map_hole(nr_pages).unwrap();
    list
}

/// The address of a byte in page `page` of a region, counted from the region's start.
pub(crate) fn in_page(region: &kiomap::Region, page: u64) -> *mut u8 {
    region.as_ptr().wrapping_add(page as usize * page_size() + 11)
}

/// What reading a page of a region comes to.
pub(crate) fn read_page(region: &kiomap::Region, page: u64) -> Result<u8, touch::Refused> {
    touch::read(in_page(region, page))
}

/// Fails unless reading a page of a region is SIGBUS there.
#[track_caller]
pub(crate) fn assert_sigbus(region: &kiomap::Region, page: u64) {
    let at = in_page(region, page);
    let outcome = touch::read(at);
    assert!(outcome.is_err_and(|refused| refused.is_sigbus_at(at as usize)), "page {page}: {outcome:?}");
}

/// The counters, after everything that happened so far is counted: a thread that is woken runs before it is counted.
pub(crate) fn settled_stats(engine: &kiomap::Engine) -> kiomap::Stats {
    engine.settle().unwrap();
    engine.stats()
}

/// How the engines of this run bring pages: `InThread`, for tests whose system calls touch no missing page.
const DELIVERY: &str = "KIOMAP_TEST_DELIVERY";

/// Begins to build an engine: every test's engine comes from here. `KIOMAP_TEST_WITHOUT` takes features away from it
/// ([`taken_away`]); `KIOMAP_TEST_PLACEMENT` is `floating`, `spin`, or the number of a processor,
/// `KIOMAP_TEST_DELIVERY` has it bring pages on the touching threads; `KIOMAP_TEST_HANDLERS` says how many threads answer faults,
/// all the time if it is more than one, and `KIOMAP_TEST_FAULT_AROUND` how many pages a fault brings where the test doesn't say.
pub(crate) fn engine_builder() -> kiomap::EngineBuilder {
    let mut builder = kiomap::Engine::builder().without(taken_away());
    if std::env::var_os(DELIVERY).is_some_and(|delivery| delivery == "InThread") {
        touch::prepare();
        builder = builder.delivery(kiomap::Delivery::InThread);
    }
    if let Ok(placement) = std::env::var("KIOMAP_TEST_PLACEMENT") {
        builder = builder.placement(match placement.as_str() {
            "floating" => kiomap::Placement::Floating,
            "spin" => kiomap::Placement::Spin(Duration::from_micros(50)),
            cpu => kiomap::Placement::Pinned(vec![cpu.parse().unwrap()]),
        });
    }
    if let Ok(pages) = std::env::var("KIOMAP_TEST_FAULT_AROUND") {
        builder = builder.fault_around_pages(pages.parse().expect("KIOMAP_TEST_FAULT_AROUND is a number of pages"));
    }
    if let Ok(handlers) = std::env::var("KIOMAP_TEST_HANDLERS") {
        let handlers = handlers.parse().expect("KIOMAP_TEST_HANDLERS is a number of threads");
        builder = builder.handlers(handlers).handlers_standing_by(handlers > 1);
    }
    if serves_kernel_faults() { builder } else { builder.open_ways(&[kiomap::OpenWay::UserModeOnly]) }
}

/// A program of which nothing is asked at its input, and that is ended when it hangs.
pub(crate) fn limited(program: &std::path::Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null());
    // SAFETY: alarm(2) is async-signal-safe; it outlives the exec, and SIGALRM ends a program that hangs.
    unsafe {
        command.pre_exec(|| {
            nix::unistd::alarm::set(DEADLINE.as_secs() as u32);
            Ok(())
        });
    }
    command
}

/// The level of privilege that the whole suite runs at: names of features that the kernel is taken to lack, and
/// `KERNEL_FAULTS` for user mode only, between commas.
const WITHOUT: &str = "KIOMAP_TEST_WITHOUT";

fn taken_away_names() -> Vec<String> {
    let names = std::env::var(WITHOUT).unwrap_or_default();
    names.split(',').map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// The features that this run of the suite does without.
pub(crate) fn taken_away() -> kiomap::Features {
    let names = taken_away_names();
    names.iter().filter(|name| *name != "KERNEL_FAULTS").fold(kiomap::Features::empty(), |set, name| {
        let known = kiomap::Features::ALL.iter().find(|known| known.name == name);
        set | known.unwrap_or_else(|| panic!("{WITHOUT} names {name}, which is no feature")).flag
    })
}

/// Whether this run of the suite may have an engine that serves faults of the kernel itself.
pub(crate) fn serves_kernel_faults() -> bool {
    !taken_away_names().iter().any(|name| name == "KERNEL_FAULTS")
}

/// A whole region of `nr_pages` pages.
pub(crate) fn long(nr_pages: u64) -> AttachOptions {
    AttachOptions::new().len_bytes(nr_pages as usize * page_size())
}

/// An engine as on a kernel before Linux 6.6.
pub(crate) fn without_poison() -> EngineBuilder {
    engine_builder().without(taken_away() | Features::POISON)
}

/// A list of `nr_pages` in which every page whose number `is_hole` is one, and the others are [`mark`]ed.
pub(crate) fn list_with_holes(nr_pages: u64, is_hole: impl Fn(u64) -> bool) -> Kiobuf {
    let mut list = Kiobuf::new();
    for page in 0..nr_pages {
        if is_hole(page) {
            list.expand(&holes(1)).unwrap();
        } else {
            let mut one = Kiobuf::new();
            one.map_bytes(vec![mark(page); page_size()]).unwrap();
            list.expand(&one).unwrap();
        }
    }
    list
}

/// A vmap of a list, and a region of all of it.
pub(crate) fn attached(engine: &Engine, list: &Kiobuf) -> (Vmap, Region) {
    let vmap = engine.vmap(list).unwrap();
    let region = vmap.attach(&AttachOptions::new()).unwrap();
    (vmap, region)
}
