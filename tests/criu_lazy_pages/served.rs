//! Restores in which the tasks only touch their memory.

use kiomap::page_size;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::fake::{Restore, Vma, check, check_zeros};
use crate::folder::{Memory, SERVED, TaskFiles, folder_of, pages_path, write_tree};
use crate::images::{IN_PARENT, LAZY, PRESENT};
use crate::support::scene::{Told, kill_and_reap};
use crate::support::{alone, reap_ok, touch};

/// Every page is the image's: those that are touched before the tree runs, and those that are touched when the daemon has gone.
/// What no entry has is zeros; what CRIU restores itself is left to it; runs go over the borders of mappings.
#[test]
fn pages_are_the_images_before_and_after_the_daemon_has_gone() {
    needs_poison!();
    alone("served::pages_are_the_images_before_and_after_the_daemon_has_gone", || {
        for more in [&[][..], &["--fault-around", "1"], &["--fault-around", "512"]] {
            let memory = Memory::reserve(700);
            let at = |pages| memory.at(pages);
            let files = TaskFiles {
                pid: 7,
                seed: 1,
                // The second is read-only, so the kernel keeps it apart.
                vmas: vec![at(0..300), at(300..400), at(500..700)],
                runs: vec![
                    (at(10..20), SERVED),
                    (at(20..30), PRESENT),
                    (at(30..31), SERVED),
                    (at(250..400), SERVED),
                    (at(510..520), PRESENT),
                    (at(520..700), SERVED),
                ],
            };
            let folder = folder_of(&[files]);
            let restore = Restore::begin(folder.path(), more);
            let vmas = [
                Vma::lazy(at(0..300)),
                Vma { addrs: at(300..400), writable: false, registered: true },
                Vma::lazy(at(500..700)),
            ];
            let (begun, ended) = (Told::new(), Told::new());
            let task = restore.task(7, &vmas, || {
                check(1, at(15..18));
                check_zeros(at(5..6));
                check(1, at(290..310));
                check(1, at(699..700));
                begun.tell(1);
                ended.wait_for(2);
                check(1, at(10..20));
                check_zeros(at(20..30));
                check(1, at(30..31));
                check_zeros(at(31..250));
                check(1, at(250..400));
                check_zeros(at(500..520));
                check(1, at(520..700));
            });
            begun.wait_for(1);
            restore.restored();
            let said = restore.succeeded();
            assert!(said.starts_with("restored: 341 lazy pages of 1 tasks, "), "{said}");
            ended.tell(2);
            reap_ok(task);
        }
    });
}

/// Tasks have memory of their own, even at the same addresses; zombies have none; the order is CRIU's.
#[test]
fn tasks_and_zombies_of_one_tree_each_have_their_own() {
    needs_poison!();
    alone("served::tasks_and_zombies_of_one_tree_each_have_their_own", || {
        let memory = Memory::reserve(64);
        let files = [TaskFiles::lazy(5, 5, memory.at(0..64)), TaskFiles::lazy(900_000, 6, memory.at(32..64))];
        let folder = folder_of(&files);
        write_tree(folder.path(), &[5, 6, 900_000]);
        let restore = Restore::begin(folder.path(), &["--json"]);
        let ended = Told::new();
        let second = restore.task(900_000, &[Vma::lazy(memory.at(0..64))], || {
            check(6, memory.at(40..48));
            ended.wait_for(1);
            check(6, memory.at(32..64));
            check_zeros(memory.at(0..32));
        });
        restore.zombie(6);
        let first = restore.task(5, &[Vma::lazy(memory.at(0..64))], || {
            check(5, memory.at(0..8));
            ended.wait_for(1);
            check(5, memory.at(0..64));
        });
        restore.restored();
        let found: Value = serde_json::from_str(&restore.succeeded()).unwrap();
        let tasks = serde_json::json!([{ "pid": 5, "pages": 64 }, { "pid": 900_000, "pages": 32 }]);
        assert_eq!(
            (&found["tasks"], &found["zombies"], &found["pages"]),
            (&tasks, &serde_json::json!([6]), &96.into())
        );
        assert_eq!(found["pages_poisoned"], 0);
        ended.tell(1);
        ended.tell(1);
        reap_ok(first);
        reap_ok(second);
    });
}

/// A task without lazy pages is served all the same: what is registered is zeros.
#[test]
fn a_task_without_lazy_pages_has_zeros() {
    needs_poison!();
    alone("served::a_task_without_lazy_pages_has_zeros", || {
        let memory = Memory::reserve(8);
        let mut files = TaskFiles::lazy(3, 3, memory.at(0..8));
        files.runs.clear();
        let folder = folder_of(&[files]);
        std::fs::remove_file(pages_path(folder.path(), 3)).unwrap();
        let restore = Restore::begin(folder.path(), &[]);
        let task = restore.task(3, &[Vma::lazy(memory.at(0..8))], || check_zeros(memory.at(0..8)));
        reap_ok(task);
        restore.restored();
        assert!(restore.succeeded().starts_with("restored: 0 lazy pages"));
    });
}

/// An image that builds on others takes from each what it has, through links in a row; the same page may be in several.
#[test]
fn pages_of_parents_are_found_through_all_of_them() {
    needs_poison!();
    alone("served::pages_of_parents_are_found_through_all_of_them", || {
        let memory = Memory::reserve(100);
        let at = |pages| memory.at(pages);
        let parent = LAZY | IN_PARENT;
        let of = |seed, runs| TaskFiles { pid: 9, seed, vmas: vec![at(0..100)], runs };
        // Odd pages of the topmost are below; of those, a third is yet another below.
        let top = (0..100).map(|n| (at(n..n + 1), if n.is_multiple_of(2) { SERVED } else { parent })).collect();
        let middle = (0..100).map(|n| (at(n..n + 1), if n.is_multiple_of(3) { IN_PARENT } else { PRESENT })).collect();
        let (top, middle) = (of(1, top), of(2, middle));
        let bottom = of(3, vec![(at(0..100), PRESENT)]);
        let folder = folder_of(&[top]);
        let place = folder.path();
        std::fs::create_dir_all(place.join("older/first")).unwrap();
        std::os::unix::fs::symlink("older", place.join("parent")).unwrap();
        std::os::unix::fs::symlink("first", place.join("older/parent")).unwrap();
        middle.write(&place.join("older"));
        bottom.write(&place.join("older/first"));

        let restore = Restore::begin(place, &[]);
        let ended = Told::new();
        let seed_of = |n: usize| {
            if n.is_multiple_of(2) {
                1
            } else if n.is_multiple_of(3) {
                3
            } else {
                2
            }
        };
        let task = restore.task(9, &[Vma::lazy(at(0..100))], || {
            for n in [0, 1, 3, 50, 51, 53, 99] {
                check(seed_of(n), at(n..n + 1));
            }
            ended.wait_for(1);
            for n in 0..100 {
                check(seed_of(n), at(n..n + 1));
            }
        });
        restore.restored();
        restore.succeeded();
        ended.tell(1);
        reap_ok(task);
    });
}

/// The socket may be in another folder, whose path may be longer than a socket's address.
#[test]
fn the_socket_is_in_the_folder_of_work() {
    needs_poison!();
    alone("served::the_socket_is_in_the_folder_of_work", || {
        let memory = Memory::reserve(8);
        let folder = folder_of(&[TaskFiles::lazy(3, 3, memory.at(0..8))]);
        let work = tempfile::tempdir().unwrap();
        // Somebody was killed here before.
        drop(std::os::unix::net::UnixListener::bind(work.path().join(crate::fake::SOCKET)).unwrap());
        let restore = Restore::begin_in(folder.path(), work.path(), &["-W", work.path().to_str().unwrap()]);
        let task = restore.task(3, &[Vma::lazy(memory.at(0..8))], || check(3, memory.at(0..8)));
        restore.restored();
        restore.succeeded();
        reap_ok(task);
        assert_eq!(std::fs::read_dir(work.path()).unwrap().count(), 0, "something was left behind");
    });
}

/// Tasks that end at any moment, also before their tree runs, leave the others served and the daemon at its end.
#[test]
fn tasks_that_are_killed_at_any_moment_harm_nobody() {
    needs_poison!();
    alone("served::tasks_that_are_killed_at_any_moment_harm_nobody", || {
        let memory = Memory::reserve(512);
        let files = [TaskFiles::lazy(5, 5, memory.at(0..512)), TaskFiles::lazy(6, 6, memory.at(0..512))];
        let folder = folder_of(&files);
        let mut rng = crate::support::scene::Rng::new(7);
        for round in 0..30 {
            let restore = Restore::begin(folder.path(), &["--fault-around", "2"]);
            let ended = Told::new();
            let seed = rng.next();
            let doomed = restore.task(5, &[Vma::lazy(memory.at(0..512))], || {
                std::thread::scope(|scope| {
                    for thread in 0..2 {
                        let memory = &memory;
                        scope.spawn(move || {
                            let mut rng = crate::support::scene::Rng::new(seed + thread);
                            loop {
                                let page = rng.below(512) as usize;
                                check(5, memory.at(page..page + 1));
                            }
                        });
                    }
                });
            });
            let other = restore.task(6, &[Vma::lazy(memory.at(0..512))], || {
                check(6, memory.at(0..512));
                ended.wait_for(1);
            });
            let early = round % 2 == 0;
            if !early {
                restore.restored();
            }
            rng.dawdle(2_000_000);
            kill_and_reap(doomed);
            if early {
                restore.restored();
            }
            restore.succeeded();
            ended.tell(1);
            reap_ok(other);
        }
    });
}

/// Whoever stops the daemon, or the restore, leaves no zeros behind: what a task lacks is SIGBUS.
#[test]
fn what_is_missing_after_a_restore_that_failed_is_sigbus() {
    needs_poison!();
    alone("served::what_is_missing_after_a_restore_that_failed_is_sigbus", || {
        let memory = Memory::reserve(64);
        let folder = folder_of(&[TaskFiles::lazy(3, 3, memory.at(0..64))]);
        type End = fn(&Restore);
        let ends: [(End, &str); 3] = [
            (|restore| restore.hang_up(), "CRIU hung up: the restore failed"),
            (|restore| restore.signal(Signal::SIGTERM), "asked to stop"),
            (|restore| restore.say(&7u32.to_ne_bytes()), "says 0x7"),
        ];
        for (end, says) in ends {
            let restore = Restore::begin(folder.path(), &["--fault-around", "1"]);
            let (touched, ended) = (Told::new(), Told::new());
            let task = restore.task(3, &[Vma::lazy(memory.at(0..64))], || {
                check(3, memory.at(7..9));
                touched.tell(1);
                ended.wait_for(2);
                check(3, memory.at(7..9));
                for addr in [memory.at(0..7), memory.at(9..64)].into_iter().flatten().step_by(page_size()) {
                    let refused = touch::read(addr as *const u8).unwrap_err();
                    assert!(refused.is_sigbus_at(addr), "{refused:?}");
                }
            });
            touched.wait_for(1);
            end(&restore);
            restore.failed(says);
            ended.tell(2);
            reap_ok(task);
        }
    });
}

/// A pages file that became shorter is told, and its pages are SIGBUS; the others are right, and those of other tasks too.
#[test]
fn pages_that_are_gone_from_the_file_are_sigbus_and_told() {
    needs_poison!();
    alone("served::pages_that_are_gone_from_the_file_are_sigbus_and_told", || {
        let memory = Memory::reserve(64);
        let files = [TaskFiles::lazy(3, 3, memory.at(0..64)), TaskFiles::lazy(4, 4, memory.at(0..64))];
        let folder = folder_of(&files);
        let restore = Restore::begin(folder.path(), &["--fault-around", "1"]);
        let file = std::fs::File::options().write(true).open(pages_path(folder.path(), 3)).unwrap();
        file.set_len(40 * page_size() as u64).unwrap();
        let ended = Told::new();
        let task = restore.task(3, &[Vma::lazy(memory.at(0..64))], || {
            check(3, memory.at(39..40));
            let gone = memory.at(50..51).start;
            assert!(touch::read(gone as *const u8).unwrap_err().is_sigbus_at(gone));
            ended.wait_for(1);
            check(3, memory.at(0..40));
            for addr in memory.at(40..64).step_by(page_size()) {
                assert!(touch::read(addr as *const u8).unwrap_err().is_sigbus_at(addr));
            }
        });
        let other = restore.task(4, &[Vma::lazy(memory.at(0..64))], || {
            ended.wait_for(1);
            check(4, memory.at(0..64));
        });
        restore.restored();
        restore.failed(" pages of task 3 can't be read: they are SIGBUS there");
        ended.tell(1);
        ended.tell(1);
        reap_ok(task);
        reap_ok(other);
    });
}
