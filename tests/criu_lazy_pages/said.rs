//! Conversations that go wrong: whatever comes, the daemon ends with a line that says what it was.

use std::os::fd::AsRawFd;

use crate::fake::{RESTORED, Restore, failure, open_uffd, other_descriptor, program};
use crate::folder::{Memory, TaskFiles, folder_of, write_tree};
use crate::support::limited;

/// What is sent, and what is said of it.
type Case = (&'static str, fn(&Restore), &'static str);

fn send_task(restore: &Restore, pid: i32) {
    let uffd = open_uffd();
    restore.say(&pid.to_ne_bytes());
    restore.say_with(&[0], &[uffd.as_raw_fd()]);
}

#[test]
fn what_criu_never_says_ends_the_daemon_with_a_reason() {
    needs_poison!();
    let cases: [Case; 16] = [
        ("nothing", |_| {}, "after 0 of 2 tasks: reading a pid: CRIU hung up"),
        ("half a pid", |restore| restore.say(&[3, 0]), "reading a pid: CRIU hung up"),
        ("a pid only", |restore| restore.say(&3i32.to_ne_bytes()), "the userfaultfd of task 3: CRIU hung up"),
        ("one task of two", |restore| send_task(restore, 3), "after 1 of 2 tasks: reading a pid: CRIU hung up"),
        ("pid 0", |restore| restore.say(&[0; 4]), "pid 0 is none"),
        ("the least pid", |restore| restore.say(&i32::MIN.to_ne_bytes()), "pid -2147483648 is none"),
        ("a pid of nobody", |restore| send_task(restore, 5), "task 5 is not in pstree.img"),
        ("a zombie that is nobody", |restore| restore.zombie(5), "task 5 is not in pstree.img"),
        ("a zombie with lazy pages", |restore| restore.zombie(3), "task 3 came as a zombie, and has"),
        (
            "a task twice",
            |restore| {
                send_task(restore, 3);
                send_task(restore, 3);
            },
            "task 3 came before",
        ),
        ("a living task without images", |restore| send_task(restore, 4), "task 4 has no pagemap"),
        ("restored too early", |restore| restore.say(&RESTORED.to_ne_bytes()), "finished before all tasks came"),
        ("no descriptor", |restore| restore.say(&[3, 0, 0, 0, 0]), "with task 3 came 0 descriptors"),
        (
            "two descriptors",
            |restore| {
                let uffd = open_uffd();
                restore.say(&3i32.to_ne_bytes());
                restore.say_with(&[0], &[uffd.as_raw_fd(), uffd.as_raw_fd()]);
            },
            "with task 3 came 2 descriptors",
        ),
        (
            "fifty descriptors",
            |restore| {
                let uffd = open_uffd();
                restore.say(&3i32.to_ne_bytes());
                restore.say_with(&[0], &[uffd.as_raw_fd(); 50]);
            },
            "more descriptors came",
        ),
        (
            "another byte",
            |restore| {
                let uffd = open_uffd();
                restore.say(&3i32.to_ne_bytes());
                restore.say_with(&[9], &[uffd.as_raw_fd()]);
            },
            "is 0x9, not 0",
        ),
    ];
    let memory = Memory::reserve(8);
    let folder = folder_of(&[TaskFiles::lazy(3, 3, memory.at(0..8))]);
    write_tree(folder.path(), &[3, 4]);
    for (what, say, says) in cases {
        eprintln!("{what}");
        let restore = Restore::begin(folder.path(), &[]);
        say(&restore);
        restore.hang_up();
        restore.failed(says);
    }
}

/// What is no userfaultfd is refused before anything depends on it; one that comes with the pid belongs to nobody.
#[test]
fn descriptors_of_other_things_are_refused() {
    needs_poison!();
    let memory = Memory::reserve(8);
    let folder = folder_of(&[TaskFiles::lazy(3, 3, memory.at(0..8))]);
    let other = other_descriptor();
    let restore = Restore::begin(folder.path(), &[]);
    restore.say(&3i32.to_ne_bytes());
    restore.say_with(&[0], &[other.as_raw_fd()]);
    restore.failed("taking over task 3");
    let restore = Restore::begin(folder.path(), &[]);
    restore.say_with(&3i32.to_ne_bytes(), &[other.as_raw_fd()]);
    restore.failed("a descriptor came that belongs to no task");
}

/// Two daemons for one folder would take each other's tasks.
#[test]
fn a_folder_is_served_once() {
    needs_poison!();
    let memory = Memory::reserve(8);
    let folder = folder_of(&[TaskFiles::lazy(3, 3, memory.at(0..8))]);
    let restore = Restore::begin(folder.path(), &[]);
    let second = limited(&program(), &["-D", folder.path().to_str().unwrap()]).output().unwrap();
    failure(&second, "another criu_lazy_pages serves");
    restore.hang_up();
    restore.failed("hung up");
}
