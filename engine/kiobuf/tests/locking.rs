//! The page lock.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;

use super::*;

const DEADLINE: Duration = Duration::from_secs(10);

fn conflict(result: Result<PageLock>) -> (usize, bool) {
    match result {
        Err(Error::PageLocked { addr, duplicate }) => (addr, duplicate),
        other => panic!("{other:?}"),
    }
}

/// Asks the kernel whether the memory area of an address is locked.
fn is_mlocked(addr: usize) -> bool {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut inside = false;
    for line in smaps.lines() {
        let first = line.split(' ').next().unwrap();
        let ends = first.split_once('-').map(|(a, b)| (usize::from_str_radix(a, 16), usize::from_str_radix(b, 16)));
        if let Some((Ok(start), Ok(end))) = ends {
            inside = (start..end).contains(&addr);
        } else if inside && let Some(flags) = line.strip_prefix("VmFlags:") {
            return flags.split_whitespace().any(|flag| flag == "lo");
        }
    }
    panic!("{addr:#x} is not mapped");
}

#[test]
fn locked_pages_are_mlocked_until_the_lock_is_dropped() {
    let kiobuf = window(&pattern(3 * page_size(), 40), 10);
    let addr = kiobuf.memory_ranges().next().unwrap().start;
    assert!(!is_mlocked(addr));
    let lock = kiobuf.lock(LockWait::No).unwrap();
    assert!(is_mlocked(addr) && is_mlocked(addr + 3 * page_size() - 1));
    drop(lock);
    assert!(!is_mlocked(addr));
}

/// A page that another lock holds, through whatever list, is EAGAIN; once it is free it can be had.
#[test]
fn a_locked_page_is_refused_without_waiting() {
    let page = page_size();
    let arena = Arc::new(Arena::new(4).unwrap());
    let part = |range| mapped(|kiobuf| kiobuf.map_slice(Window { arena: arena.clone(), range }));
    let addr = arena.as_ptr().addr();
    let held = part(page..3 * page);
    let lock = held.lock(LockWait::No).unwrap();
    for (range, at) in [(0..page + 1, page), (3 * page - 1..4 * page, 2 * page), (0..4 * page, page)] {
        assert_eq!(conflict(part(range).lock(LockWait::No)), (addr + at, false));
    }
    let error = held.clone().lock(LockWait::No).unwrap_err();
    assert_eq!(error.errno(), Errno::EAGAIN);
    // Pages beside it are free.
    drop(part(0..page).lock(LockWait::No).unwrap());
    drop(part(3 * page..4 * page).lock(LockWait::No).unwrap());
    drop(lock);
    drop(part(0..4 * page).lock(LockWait::No).unwrap());
}

/// T106: a list that has a page twice can't be locked, and nothing of it stays locked.
#[test]
fn a_page_twice_in_a_list_is_refused() {
    let once = window(&pattern(page_size(), 41), 0);
    let twice = Kiobuf::concat(&[once.clone(), mapped(|kiobuf| kiobuf.map_zero(1)), once.clone()]).unwrap();
    let addr = once.memory_ranges().next().unwrap().start;
    for wait in [LockWait::No, LockWait::Yes] {
        assert_eq!(conflict(twice.lock(wait)), (addr, true));
    }
    assert_eq!(twice.lock(LockWait::No).unwrap_err().errno(), Errno::EINVAL);
    drop(once.lock(LockWait::No).unwrap());
}

/// Who waits gets the lock when it is dropped, and not before.
#[test]
fn a_waiting_lock_is_granted_when_the_page_is_free() {
    let kiobuf = window(&pattern(page_size(), 42), 0);
    let lock = kiobuf.lock(LockWait::No).unwrap();
    let (started, has_started) = mpsc::channel();
    let (granted, was_granted) = mpsc::channel();
    let waiter = thread::spawn({
        let kiobuf = kiobuf.clone();
        move || {
            started.send(()).unwrap();
            granted.send(kiobuf.lock(LockWait::Yes)).unwrap();
        }
    });
    has_started.recv_timeout(DEADLINE).unwrap();
    assert_eq!(was_granted.try_recv().unwrap_err(), mpsc::TryRecvError::Empty);
    drop(lock);
    let theirs = was_granted.recv_timeout(DEADLINE).unwrap().unwrap();
    waiter.join().unwrap();
    conflict(kiobuf.lock(LockWait::No));
    drop(theirs);
    drop(kiobuf.lock(LockWait::No).unwrap());
}

/// Many threads lock overlapping lists in opposite orders: each gets its turn, and never two at once.
#[test]
fn overlapping_locks_exclude_each_other_and_never_deadlock() {
    let (first, second) = (window(&pattern(page_size(), 43), 0), window(&pattern(page_size(), 44), 0));
    let forth = Kiobuf::concat(&[first.clone(), second.clone()]).unwrap();
    let back = Kiobuf::concat(&[second, first]).unwrap();
    let inside = Arc::new(AtomicUsize::new(0));
    let (done, is_done) = mpsc::channel();
    for kiobuf in [&forth, &back, &forth, &back] {
        let (kiobuf, inside, done) = (kiobuf.clone(), inside.clone(), done.clone());
        thread::spawn(move || {
            let alone = (0..200).all(|_| {
                let _lock = kiobuf.lock(LockWait::Yes).unwrap();
                let alone = inside.fetch_add(1, Ordering::SeqCst) == 0;
                thread::yield_now();
                inside.fetch_sub(1, Ordering::SeqCst);
                alone
            });
            done.send(alone).unwrap();
        });
    }
    for _ in 0..4 {
        assert!(is_done.recv_timeout(DEADLINE).unwrap());
    }
}

/// T24: when a page can't be read in, mlock fails; everything that was locked before it is released.
#[test]
fn a_failing_mlock_releases_what_was_locked() {
    let file = file_of(&pattern(2 * page_size(), 45));
    // SAFETY: nobody reads the mapping but the list, which goes through the kernel.
    let mmap = unsafe { memmap2::Mmap::map(&file) }.unwrap();
    let addr = mmap.as_ptr().addr();
    let memory = window(&pattern(page_size(), 46), 0);
    let kiobuf = Kiobuf::concat(&[memory.clone(), mapped(|kiobuf| kiobuf.map_mmap(mmap))]).unwrap();
    file.set_len(0).unwrap();
    let error = kiobuf.lock(LockWait::No).unwrap_err();
    assert!(matches!(error, Error::Sys { .. }) && error.errno() == Errno::ENOMEM, "{error:?}");
    assert!(!is_mlocked(addr));
    assert!(!is_mlocked(memory.memory_ranges().next().unwrap().start));
    file.set_len(2 * page_size() as u64).unwrap();
    drop(kiobuf.lock(LockWait::No).unwrap());
}

/// A lock keeps the pages alive; without pages in memory there is nothing to lock.
#[test]
fn a_lock_counts_as_a_snapshot() {
    let drops = Arc::new(AtomicUsize::new(0));
    let kiobuf = mapped(|kiobuf| kiobuf.map_slice(Counted(Window::over(&[1], 0), drops.clone())));
    let lock = kiobuf.lock(LockWait::Yes).unwrap();
    drop(kiobuf);
    assert_eq!(drops.load(Ordering::SeqCst), 0);
    drop(lock);
    assert_eq!(drops.load(Ordering::SeqCst), 1);

    let nothing = Kiobuf::concat(&[mapped(|kiobuf| kiobuf.map_zero(1)), mapped(|kiobuf| kiobuf.map_hole(1))]).unwrap();
    let locks = [nothing.lock(LockWait::No).unwrap(), nothing.lock(LockWait::No).unwrap()];
    drop((locks, Kiobuf::new().lock(LockWait::No).unwrap()));
}
