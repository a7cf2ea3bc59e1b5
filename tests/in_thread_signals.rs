//! In-thread delivery and the application's own SIGBUS: what is not the engine's reaches the action that was there before, as
//! if the engine were not there; once, with the signal's own data, under the mask that it asks for.

mod support;

use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use kiomap::{Delivery, Engine, Kiobuf, Region, in_thread, page_size};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, pthread_sigmask, raise};
use nix::sys::wait::WaitStatus;
use support::scene::{at, child};
use support::{alone, attached, engine_builder, eventually, holes, mark, pages, reap, reap_ok, touch};

const SIGBUS: i32 = libc::SIGBUS;

/// What [`spy`] and [`plain_spy`] saw.
static CALLS: AtomicUsize = AtomicUsize::new(0);
static ADDR: AtomicUsize = AtomicUsize::new(0);
static CODE: AtomicUsize = AtomicUsize::new(0);
/// The signals that were blocked then.
static BLOCKED: AtomicU64 = AtomicU64::new(0);
/// Where a [`spy`] that finds it set touches.
static TOUCH: AtomicUsize = AtomicUsize::new(0);
/// What it found there.
static FOUND: AtomicUsize = AtomicUsize::new(0);

fn blocked() -> u64 {
    let mut set = MaybeUninit::<u64>::zeroed();
    // SAFETY: the kernel writes the eight bytes of a set.
    unsafe {
        libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_BLOCK, std::ptr::null::<u64>(), set.as_mut_ptr(), 8);
        set.assume_init()
    }
}

fn bit(signal: i32) -> u64 {
    1 << (signal - 1)
}

/// Makes the page that was touched one that can be: the touch then goes on.
fn heal(addr: usize) {
    let start = addr / page_size() * page_size();
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: the tests touch pages to which nothing refers.
    unsafe { libc::mmap(start as *mut _, page_size(), prot, flags, -1, 0) };
}

extern "C" fn spy(signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    assert_eq!(signal, SIGBUS);
    CALLS.fetch_add(1, Ordering::Relaxed);
    BLOCKED.store(blocked(), Ordering::Relaxed);
    // SAFETY: the kernel's siginfo.
    let (addr, code) = unsafe { ((*info).si_addr() as usize, (*info).si_code) };
    CODE.store(code as usize, Ordering::Relaxed);
    let touched = TOUCH.load(Ordering::Relaxed);
    if touched != 0 {
        // SAFETY: a page of a region.
        FOUND.store(unsafe { (touched as *const u8).read_volatile() }.into(), Ordering::Relaxed);
    }
    if code > 0 {
        ADDR.store(addr, Ordering::Relaxed);
        heal(addr);
    }
}

/// A handler without a siginfo: it can only heal what it knows.
extern "C" fn plain_spy(_signal: i32) {
    CALLS.fetch_add(1, Ordering::Relaxed);
    BLOCKED.store(blocked(), Ordering::Relaxed);
    heal(TOUCH.load(Ordering::Relaxed));
}

fn set_action(handler: usize, flags: i32, mask: &[i32]) -> libc::sigaction {
    // SAFETY: all zeroes is a whole action; the handlers of the tests are async-signal-safe.
    unsafe {
        let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = handler;
        action.sa_flags = flags;
        mask.iter().for_each(|&signal| assert_eq!(libc::sigaddset(&raw mut action.sa_mask, signal), 0));
        let mut before = MaybeUninit::zeroed();
        assert_eq!(libc::sigaction(SIGBUS, &raw const action, before.as_mut_ptr()), 0);
        before.assume_init()
    }
}

fn spy_with(flags: i32, mask: &[i32]) {
    set_action(spy as *const () as usize, flags | libc::SA_SIGINFO, mask);
}

fn engine() -> Engine {
    engine_builder().fault_around_pages(1).delivery(Delivery::InThread).build().unwrap()
}

/// Pages 0 to 3, and then holes.
fn with_holes(engine: &Engine) -> Region {
    let mut list = pages(4);
    list.expand(&holes(12)).unwrap();
    attached(engine, &list).1
}

fn load(region: &Region, page: u64) -> u8 {
    // SAFETY: a page of a region, or one that the handler heals.
    unsafe { at(region, page).wrapping_add(11).read_volatile() }
}

/// Each hole that is touched reaches the handler that was there before, once, at its exact address; pages that can be had
/// never do. errno stays as it was.
#[test]
fn what_can_not_be_had_reaches_the_handler_before() {
    alone("what_can_not_be_had_reaches_the_handler_before", || {
        spy_with(libc::SA_ONSTACK, &[]);
        let engine = engine();
        assert!(in_thread::is_installed() && !in_thread::reinstall());
        let region = with_holes(&engine);
        // SAFETY: this thread's errno.
        unsafe { *libc::__errno_location() = 77 };
        for n in 0..4 {
            assert_eq!(load(&region, n), mark(n));
        }
        // SAFETY: as above.
        assert_eq!(unsafe { *libc::__errno_location() }, 77);
        assert_eq!(CALLS.load(Ordering::Relaxed), 0);
        for n in 4..10 {
            assert_eq!(load(&region, n), 0);
            assert_eq!(CALLS.load(Ordering::Relaxed), n as usize - 3);
            assert_eq!(ADDR.load(Ordering::Relaxed), at(&region, n) as usize + 11);
            assert_eq!(CODE.load(Ordering::Relaxed), 2);
        }
        assert_eq!(engine.stats().faults, 10);
        assert_eq!(engine.stats().pages_poisoned, 6);
    });
}

/// A touch past the end of a mapped file, which is no engine's, and a SIGBUS that was sent: once each, as they were.
#[test]
fn what_is_no_engines_reaches_the_handler_before() {
    alone("what_is_no_engines_reaches_the_handler_before", || {
        spy_with(0, &[]);
        let engine = engine();
        let _region = with_holes(&engine);
        let file = tempfile::tempfile().unwrap();
        file.set_len(2 * page_size() as u64).unwrap();
        // SAFETY: nothing refers to the mapping but the touch below.
        let mapped = unsafe { memmap2::MmapOptions::new().len(2 * page_size()).map_copy_read_only(&file) }.unwrap();
        file.set_len(page_size() as u64).unwrap();
        let addr = mapped.as_ptr().wrapping_add(page_size() + 3);
        // SAFETY: mapped; the handler heals it.
        assert_eq!(unsafe { addr.read_volatile() }, 0);
        assert_eq!((CALLS.load(Ordering::Relaxed), ADDR.load(Ordering::Relaxed)), (1, addr as usize));
        raise(Signal::SIGBUS).unwrap();
        assert_eq!(CALLS.load(Ordering::Relaxed), 2);
        assert!((CODE.load(Ordering::Relaxed) as i32) <= 0);
        assert_eq!(engine.stats().faults, 0);
    });
}

/// The mask is what `sa_mask` and SA_NODEFER ask for, beside what was blocked where the touch was; after it, what it was.
#[test]
fn the_handler_before_has_its_own_mask() {
    alone("the_handler_before_has_its_own_mask", || {
        let mut set = SigSet::empty();
        set.add(Signal::SIGUSR2);
        pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&set), None).unwrap();
        let outside = blocked();
        assert_eq!(outside & bit(libc::SIGUSR2), bit(libc::SIGUSR2));
        for (round, flags) in [0, libc::SA_NODEFER].into_iter().enumerate() {
            let pid = child(|| {
                spy_with(flags, &[libc::SIGHUP, libc::SIGWINCH]);
                let engine = engine();
                let region = with_holes(&engine);
                let before = blocked();
                load(&region, 5);
                assert_eq!(CALLS.load(Ordering::Relaxed), 1);
                let own = if round == 0 { bit(SIGBUS) } else { 0 };
                let asked = before | bit(libc::SIGHUP) | bit(libc::SIGWINCH) | own;
                assert_eq!(BLOCKED.load(Ordering::Relaxed), asked);
                assert_eq!(blocked(), before);
            });
            reap_ok(pid);
        }
    });
}

/// A handler that takes no siginfo gets its signal too; one for a single signal gets one, and the next has the default
/// action.
#[test]
fn a_plain_handler_and_one_for_a_single_signal_are_honoured() {
    alone("a_plain_handler_and_one_for_a_single_signal_are_honoured", || {
        let pid = child(|| {
            set_action(plain_spy as *const () as usize, libc::SA_RESETHAND, &[]);
            let engine = engine();
            let region = with_holes(&engine);
            TOUCH.store(at(&region, 6) as usize, Ordering::Relaxed);
            assert_eq!(load(&region, 6), 0);
            assert_eq!(CALLS.load(Ordering::Relaxed), 1);
            assert_eq!(load(&region, 1), mark(1));
            load(&region, 7);
        });
        let status = reap(pid);
        assert!(matches!(status, WaitStatus::Signaled(_, Signal::SIGBUS, _)), "{status:?}");
    });
}

/// The default action, and ignoring, which the kernel does not allow for a touch: the process ends with SIGBUS. What was
/// sent is ignored, or ends it. The standard library's own handler, which is for stack overflows, passes it on too.
#[test]
fn without_a_handler_a_hole_ends_the_process() {
    alone("without_a_handler_a_hole_ends_the_process", || {
        let ends = |what: &str, body: &dyn Fn(&Region)| {
            let pid = child(|| {
                let engine = engine();
                let region = with_holes(&engine);
                assert_eq!(load(&region, 2), mark(2));
                body(&region);
            });
            let status = reap(pid);
            assert!(matches!(status, WaitStatus::Signaled(_, Signal::SIGBUS, _)), "{what}: {status:?}");
        };
        ends("the standard library's", &|region| assert_eq!(load(region, 9), 0));
        set_action(libc::SIG_DFL, 0, &[]);
        ends("the default", &|region| assert_eq!(load(region, 9), 0));
        ends("the default, sent", &|_| raise(Signal::SIGBUS).unwrap());
        set_action(libc::SIG_IGN, 0, &[]);
        ends("ignored", &|region| {
            raise(Signal::SIGBUS).unwrap();
            assert_eq!(load(region, 3), mark(3));
            load(region, 9);
        });
    });
}

/// A handler that touches missing pages of a region, while it handles a touch of that region.
#[test]
fn the_handler_before_may_touch_a_region() {
    alone("the_handler_before_may_touch_a_region", || {
        // The outer signal is blocked in its handler unless it asks otherwise: the kernel would end the process.
        spy_with(libc::SA_NODEFER | libc::SA_ONSTACK, &[]);
        let engine = engine();
        let region = with_holes(&engine);
        TOUCH.store(at(&region, 3) as usize, Ordering::Relaxed);
        // The standard library's signal stacks hold one frame of the kernel's on some machines, not two.
        with_signal_stack(64 << 10, || assert_eq!(load(&region, 8), 0));
        assert_eq!(FOUND.load(Ordering::Relaxed), usize::from(mark(3)));
        assert_eq!(CALLS.load(Ordering::Relaxed), 1);
        assert_eq!(engine.stats().faults, 2);
    });
}

/// What a signal stack is full of before it is used.
const UNUSED: u8 = 0xa5;

/// Runs `body` on a thread with a signal stack of its own, and answers with that as it was left.
fn with_signal_stack(size: usize, body: impl Fn() + Sync) -> Vec<u8> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let mut stack = vec![UNUSED; size];
            let new = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: size };
            let mut old = MaybeUninit::zeroed();
            // SAFETY: the stack outlives its use, which ends when the old one is back.
            unsafe { assert_eq!(libc::sigaltstack(&raw const new, old.as_mut_ptr()), 0) };
            body();
            // SAFETY: what it was before.
            unsafe { assert_eq!(libc::sigaltstack(old.as_ptr(), std::ptr::null_mut()), 0) };
            stack
        });
        thread.join().unwrap()
    })
}

static BEFORE: std::sync::OnceLock<libc::sigaction> = std::sync::OnceLock::new();

/// A handler that was installed later, and passes everything on to what it took the place of, as it should.
extern "C" fn passing_on(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    FOUND.fetch_add(1, Ordering::Relaxed);
    let before = BEFORE.get().unwrap();
    // SAFETY: the action was one with a siginfo.
    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
        unsafe { std::mem::transmute(before.sa_sigaction) };
    handler(signal, info, context);
}

/// A handler that the application installs later: one that passes on is all right, before and after the engine is put before
/// it, and nothing goes round in circles. One that does not, keeps its own once the engine is before it.
#[test]
fn a_handler_installed_later_is_followed_by_reinstall() {
    alone("a_handler_installed_later_is_followed_by_reinstall", || {
        spy_with(libc::SA_ONSTACK, &[]);
        let engine = engine();
        let region = with_holes(&engine);
        let later = libc::SA_SIGINFO | libc::SA_ONSTACK;
        let before = set_action(passing_on as *const () as usize, later, &[]);
        BEFORE.set(before).ok().unwrap();
        assert!(!in_thread::is_installed());
        assert_eq!(load(&region, 0), mark(0));
        load(&region, 5);
        assert_eq!((FOUND.load(Ordering::Relaxed), CALLS.load(Ordering::Relaxed)), (2, 1));
        assert!(in_thread::reinstall());
        assert!(in_thread::is_installed() && !in_thread::reinstall());
        assert_eq!(load(&region, 1), mark(1));
        assert_eq!(FOUND.load(Ordering::Relaxed), 2);
        // The engine, the later one, the engine again, the first.
        load(&region, 6);
        assert_eq!((FOUND.load(Ordering::Relaxed), CALLS.load(Ordering::Relaxed)), (3, 2));
        assert_eq!(ADDR.load(Ordering::Relaxed), at(&region, 6) as usize + 11);
        // One that passes nothing on.
        spy_with(libc::SA_ONSTACK, &[]);
        assert!(in_thread::reinstall());
        assert_eq!(load(&region, 2), mark(2));
        assert_eq!(CALLS.load(Ordering::Relaxed), 2);
        load(&region, 7);
        assert_eq!((FOUND.load(Ordering::Relaxed), CALLS.load(Ordering::Relaxed)), (3, 3));
    });
}

static TICKS: AtomicUsize = AtomicUsize::new(0);

extern "C" fn on_tick(_: i32) {
    let base = TOUCH.load(Ordering::Relaxed);
    let n = TICKS.fetch_add(1, Ordering::Relaxed) as u64 % 2000;
    // SAFETY: a page of a region.
    let found = unsafe { ((base + n as usize * page_size()) as *const u8).read_volatile() };
    if found != mark(n) {
        // SAFETY: ends the process; async-signal-safe.
        unsafe { libc::_exit(3) }
    }
}

/// T67: a storm of signals, whose handler touches missing pages itself, on threads that bring pages.
#[test]
fn other_signals_whose_handlers_touch_regions_do_no_harm() {
    alone("other_signals_whose_handlers_touch_regions_do_no_harm", || {
        let engine = engine();
        let (_vmap, ticked) = attached(&engine, &pages(2000));
        TOUCH.store(ticked.as_ptr() as usize, Ordering::Relaxed);
        // SAFETY: the handler only touches memory and atomics.
        unsafe { libc::signal(libc::SIGALRM, on_tick as *const () as usize) };
        let often = libc::itimerval {
            it_interval: libc::timeval { tv_sec: 0, tv_usec: 100 },
            it_value: libc::timeval { tv_sec: 0, tv_usec: 100 },
        };
        // SAFETY: both structs are whole.
        unsafe { libc::setitimer(libc::ITIMER_REAL, &raw const often, std::ptr::null_mut()) };
        let enough = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !enough.load(Ordering::Relaxed) {
                        let (_vmap, region) = attached(&engine, &pages(100));
                        (0..100).for_each(|n| assert_eq!(load(&region, n), mark(n)));
                    }
                });
            }
            eventually("two thousand ticks", || TICKS.load(Ordering::Relaxed) > 2000);
            enough.store(true, Ordering::Relaxed);
        });
        let none = libc::timeval { tv_sec: 0, tv_usec: 0 };
        let never = libc::itimerval { it_interval: none, it_value: none };
        // SAFETY: as above.
        unsafe {
            libc::setitimer(libc::ITIMER_REAL, &raw const never, std::ptr::null_mut());
            // A last one may be on its way still, from a thread that is ending, to which it was given, to this one: to ignore
            // it drops it, before the region that it would touch goes.
            libc::signal(libc::SIGALRM, libc::SIG_IGN);
        }
    });
}

/// A thread that blocks SIGBUS and touches a missing page: the kernel ends the process, as the documentation says; it does
/// not hang, and nothing is zeros.
#[test]
fn a_touch_with_sigbus_blocked_ends_the_process() {
    alone("a_touch_with_sigbus_blocked_ends_the_process", || {
        let pid = child(|| {
            let engine = engine();
            let region = with_holes(&engine);
            let mut set = SigSet::empty();
            set.add(Signal::SIGBUS);
            pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&set), None).unwrap();
            load(&region, 0);
        });
        let status = reap(pid);
        assert!(matches!(status, WaitStatus::Signaled(_, Signal::SIGBUS, _)), "{status:?}");
    });
}

/// What a fault takes of the alternate signal stack: little enough for the smallest ones in use.
#[test]
fn a_fault_takes_little_of_the_signal_stack() {
    alone("a_fault_takes_little_of_the_signal_stack", || {
        const STACK: usize = 64 << 10;
        let engine = engine();
        let (_vmap, region) = attached(&engine, &{
            let mut list = Kiobuf::new();
            // The last page has slack: the longest way.
            list.map_bytes(vec![7; 2 * page_size() + 5]).unwrap();
            list
        });
        let touch_all = || (0..3).for_each(|n| assert_eq!(load(&region, n), if n < 2 { 7 } else { 0 }));
        let stack = with_signal_stack(STACK, touch_all);
        let deepest = stack.iter().position(|&byte| byte != UNUSED).map_or(0, |first| STACK - first);
        // SAFETY: looks a value up.
        let frame = unsafe { libc::getauxval(libc::AT_MINSIGSTKSZ) } as usize;
        assert!(deepest > 0, "the signal stack was not used");
        assert!(deepest <= frame + (3 << 10), "{deepest} bytes, of which the kernel's frame takes {frame}");
    });
}

/// A child of a raw clone, which runs no fork handler, has no region; a SIGBUS of it that is another's goes to the handler
/// before, though its parent's threads were inside the engine at that moment.
#[test]
fn a_child_of_a_raw_clone_passes_everything_on() {
    alone("a_child_of_a_raw_clone_passes_everything_on", || {
        spy_with(0, &[]);
        let engine = engine();
        let (_vmap, region) = attached(&engine, &pages(4000));
        let file = tempfile::tempfile().unwrap();
        file.set_len(page_size() as u64).unwrap();
        // SAFETY: nothing refers to the mapping but the touch below.
        let mapped = unsafe { memmap2::MmapOptions::new().len(page_size()).map_copy_read_only(&file) }.unwrap();
        file.set_len(0).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| (0..4000).for_each(|n| assert_eq!(load(&region, n), mark(n))));
            for _ in 0..20 {
                // SAFETY: a fork of this thread alone; the child does what is async-signal-safe, and exits.
                let pid = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
                if pid == 0 {
                    // SAFETY: as above.
                    unsafe {
                        libc::alarm(30);
                        let found = mapped.as_ptr().read_volatile();
                        libc::_exit(i32::from(found != 0 || CALLS.load(Ordering::Relaxed) != 1));
                    }
                }
                reap_ok(nix::unistd::Pid::from_raw(pid as i32));
            }
        });
    });
}

/// The engine's own threads, and threads that are made while it lives, have SIGBUS open: what they run may touch regions.
#[test]
fn callbacks_may_touch_regions() {
    alone("callbacks_may_touch_regions", || {
        touch::prepare();
        let engine = engine();
        let (_vmap, region) = attached(&engine, &pages(4));
        let (done, outcome) = std::sync::mpsc::channel();
        let addr = at(&region, 2) as usize;
        let vmap = engine
            .vmap_builder(&pages(1))
            .on_deref(move |_| done.send(touch::read(addr as *const u8)).unwrap())
            .build()
            .unwrap();
        drop(vmap.attach(&kiomap::AttachOptions::new()).unwrap());
        assert_eq!(outcome.recv_timeout(Duration::from_secs(30)).unwrap(), Ok(mark(2)));
    });
}
