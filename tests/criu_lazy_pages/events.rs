//! Restored programs that give memory up, move it, unmap it and fork, before and after their tree runs.

use std::ops::Range;

use kiomap::page_size;
use nix::unistd::Pid;

use crate::fake::{Restore, Vma, check, check_page, check_zeros, follows_forks, map_zeros, purge};
use crate::folder::{Memory, TaskFiles, folder_of};
use crate::skip;
use crate::support::scene::{Rng, Told, child};
use crate::support::{alone, reap_ok, touch};

const SEED: u64 = 11;

/// Restores one task with lazy memory; `body` runs it, before the tree runs up to when it tells, and on when it does.
fn restore_one(nr_pages: usize, more: &[&str], body: impl FnOnce(&Memory, &Told)) {
    let memory = Memory::reserve(nr_pages);
    let folder = folder_of(&[TaskFiles::lazy(4, SEED, memory.at(0..nr_pages))]);
    let restore = Restore::begin(folder.path(), more);
    let told = Told::new();
    let task = restore.task(4, &[Vma::lazy(memory.at(0..nr_pages))], || body(&memory, &told));
    told.wait_for(1);
    restore.restored();
    restore.succeeded();
    reap_ok(task);
}

fn remap(from: &Range<usize>, to: &Range<usize>, flags: i32) {
    // SAFETY: both ranges are of a reservation of the test's, which holds nothing that is used.
    let moved = unsafe { libc::mremap(from.start as *mut _, from.len(), to.len(), flags, to.start) };
    assert_eq!(moved.addr(), to.start, "{}", std::io::Error::last_os_error());
}

/// Memory that is given up is zeros from then on, whether it was there or not; its neighbours are the image's.
#[test]
fn memory_that_is_given_up_is_zeros() {
    needs_poison!();
    alone("events::memory_that_is_given_up_is_zeros", || {
        restore_one(100, &[], |memory, told| {
            check(SEED, memory.at(10..20));
            purge(&memory.at(15..40));
            check_zeros(memory.at(15..30));
            check(SEED, memory.at(40..45));
            // A page that is written after it was given up keeps what was written.
            let written = memory.at(35..36).start;
            touch::write_word(written as *mut u8, 5).unwrap();
            told.tell(1);
            purge(&memory.at(60..70));
            check_zeros(memory.at(60..70));
            check(SEED, memory.at(0..15));
            check_zeros(memory.at(15..35));
            assert_eq!(touch::read_word(written as *const u8), Ok(5));
            check_zeros(memory.at(36..40));
            check(SEED, memory.at(40..60));
            check(SEED, memory.at(70..100));
        });
    });
}

/// Memory that moves takes its pages along: a whole mapping, a part of one, one that is longer afterwards, and twice.
#[test]
fn memory_that_moves_takes_its_pages_along() {
    needs_poison!();
    alone("events::memory_that_moves_takes_its_pages_along", || {
        restore_one(100, &[], |memory, told| {
            let (elsewhere, page) = (Memory::reserve(200), page_size());
            let moved = |to: Range<usize>, from: Range<usize>| {
                for (to, from) in to.step_by(page).zip(from.step_by(page)) {
                    check_page(SEED, to, from);
                }
            };
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            check(SEED, memory.at(25..26));
            remap(&memory.at(20..40), &elsewhere.at(0..20), flags);
            moved(elsewhere.at(3..8), memory.at(23..28));
            // What is there now is somebody's new memory.
            map_zeros(&memory.at(20..40), true);
            check_zeros(memory.at(20..40));
            remap(&elsewhere.at(0..20), &elsewhere.at(100..120), flags);
            moved(elsewhere.at(100..120), memory.at(20..40));
            told.tell(1);
            // Longer: the rest is zeros.
            remap(&memory.at(90..100), &elsewhere.at(40..60), flags);
            check_zeros(elsewhere.at(50..60));
            moved(elsewhere.at(40..50), memory.at(90..100));
            check(SEED, memory.at(0..20));
            check(SEED, memory.at(40..90));
            moved(elsewhere.at(100..120), memory.at(20..40));
        });
    });
}

/// Memory that is unmapped is nobody's: what is mapped there later is zeros, and what is around it the image's.
#[test]
fn addresses_that_were_unmapped_are_not_served_any_more() {
    needs_poison!();
    alone("events::addresses_that_were_unmapped_are_not_served_any_more", || {
        restore_one(100, &[], |memory, told| {
            let unmap = |addrs: Range<usize>| {
                // SAFETY: the addresses are of a reservation of the test's; nothing there is borrowed.
                assert_eq!(unsafe { libc::munmap(addrs.start as *mut _, addrs.len()) }, 0);
            };
            check(SEED, memory.at(12..13));
            unmap(memory.at(10..30));
            check(SEED, memory.at(30..31));
            assert!(touch::read(memory.at(12..13).start as *const u8).unwrap_err().is_sigsegv());
            map_zeros(&memory.at(10..20), true);
            check_zeros(memory.at(10..20));
            told.tell(1);
            unmap(memory.at(60..70));
            map_zeros(&memory.at(10..70), true);
            check_zeros(memory.at(10..70));
            check(SEED, memory.at(0..10));
            check(SEED, memory.at(70..100));
        });
    });
}

/// Mappings that are cut to pieces later are served all the same, however many pages a fault brings.
#[test]
fn mappings_that_become_pieces_are_served() {
    needs_poison!();
    alone("events::mappings_that_become_pieces_are_served", || {
        for more in [&[][..], &["--fault-around", "64"]] {
            restore_one(256, more, |memory, told| {
                for page in (0..256).step_by(3) {
                    let addrs = memory.at(page..page + 1);
                    // SAFETY: the addresses are of a reservation of the test's; nothing there is borrowed.
                    assert_eq!(unsafe { libc::mprotect(addrs.start as *mut _, addrs.len(), libc::PROT_READ) }, 0);
                }
                check(SEED, memory.at(100..150));
                told.tell(1);
                check(SEED, memory.at(0..256));
            });
        }
    });
}

/// A forked child has every page, and its own child too: those that were touched before, those that are touched then, those that are
/// filled in, and, when the daemon has gone, all of them.
#[test]
fn forked_children_have_every_page() {
    needs_poison!();
    if !follows_forks() {
        skip!("a userfaultfd that follows forks takes CAP_SYS_PTRACE");
    }
    alone("events::forked_children_have_every_page", || {
        let memory = Memory::reserve(300);
        let folder = folder_of(&[TaskFiles::lazy(4, SEED, memory.at(0..300))]);
        let restore = Restore::begin(folder.path(), &["--fault-around", "1"]);
        let (begun, ended) = (Told::new(), Told::new());
        let wait_and_check = || {
            begun.tell(1);
            ended.wait_for(2);
            check(SEED, memory.at(0..100));
            check(SEED, memory.at(110..300));
        };
        let task = restore.task(4, &[Vma::lazy(memory.at(0..300))], || {
            check(SEED, memory.at(0..50));
            let first = child(|| {
                check(SEED, memory.at(40..60));
                // Its parent's are not given up.
                purge(&memory.at(100..110));
                let second = child(|| {
                    check(SEED, memory.at(55..70));
                    check_zeros(memory.at(100..110));
                    wait_and_check();
                });
                check(SEED, memory.at(60..80));
                wait_and_check();
                reap_ok(second);
            });
            check(SEED, memory.at(90..120));
            wait_and_check();
            check(SEED, memory.at(100..110));
            reap_ok(first);
        });
        for _ in 0..3 {
            begun.wait_for(1);
        }
        restore.restored();
        restore.succeeded();
        for _ in 0..3 {
            ended.tell(2);
        }
        reap_ok(task);
    });
}

/// Forks at any moment of the filling, while the memory is touched, in both: nobody misses a page.
#[test]
fn forks_while_pages_are_filled_in_lose_none() {
    needs_poison!();
    if !follows_forks() {
        skip!("a userfaultfd that follows forks takes CAP_SYS_PTRACE");
    }
    alone("events::forks_while_pages_are_filled_in_lose_none", || {
        for round in 0..10 {
            restore_one(1024, &[], |memory, told| {
                told.tell(1);
                let mut rng = Rng::new(100 + round);
                let children: Vec<Pid> = (0..5)
                    .map(|_| {
                        rng.dawdle(300_000);
                        child(|| check(SEED, memory.at(0..1024)))
                    })
                    .collect();
                check(SEED, memory.at(0..1024));
                children.into_iter().for_each(reap_ok);
            });
        }
    });
}

/// Allocators whose threads purge memory from the first moment on, while others fault: REMOVE events and faults race, and none
/// is lost.
#[test]
fn memory_that_is_purged_by_some_threads_while_others_fault_is_right() {
    needs_poison!();
    alone("events::memory_that_is_purged_by_some_threads_while_others_fault_is_right", || {
        const PAGES: usize = 1024;
        const THREADS: usize = 4;
        for round in 0..12 {
            let around = ["1", "16", "128"][round % 3];
            restore_one(PAGES, &["--fault-around", around], |memory, told| {
                std::thread::scope(|scope| {
                    for thread in 0..THREADS {
                        scope.spawn(move || churn(memory, thread, THREADS, PAGES, round as u64));
                    }
                    told.tell(1);
                });
            });
        }
    });
}

/// Goes through every page of a thread's own, which lie between the others', in an order of its own: each is checked or purged or
/// both, and what is purged is zeros, and written again.
fn churn(memory: &Memory, thread: usize, threads: usize, nr_pages: usize, round: u64) {
    let mut rng = Rng::new(round * 64 + thread as u64);
    let mut pages: Vec<usize> = (0..nr_pages).filter(|page| page / 2 % threads == thread).collect();
    rng.shuffle(&mut pages);
    for page in pages {
        let addrs = memory.at(page..page + 1);
        if rng.below(3) != 0 {
            check(SEED, addrs.clone());
        }
        if rng.below(2) == 0 {
            purge(&addrs);
            check_zeros(addrs.clone());
            touch::write_word(addrs.start as *mut u8, page as u64).unwrap();
            assert_eq!(touch::read_word(addrs.start as *const u8), Ok(page as u64));
            purge(&addrs);
            check_zeros(addrs);
        } else {
            check(SEED, addrs);
        }
    }
}
