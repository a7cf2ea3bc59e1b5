//! What the tests of this module share: memory, deadlines, a throw-away userfaultfd.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use memmap2::{MmapOptions, MmapRaw};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{DEFAULT_WAYS, Features, Message, MsgBuffer, Opener, Userfault};
use crate::page::page_size;

/// How long anything may take before it counts as hung.
pub(super) const DEADLINE: Duration = Duration::from_secs(20);

/// Opens a userfaultfd by whatever way this process has.
pub(super) fn userfault(features: Features) -> Userfault {
    Opener::new(&DEFAULT_WAYS).open(features).expect("some way of opening a userfaultfd works").0
}

/// Maps private anonymous memory.
pub(super) fn anonymous(pages: usize) -> MmapRaw {
    MmapOptions::new().len(pages * page_size()).map_anon().expect("memory").into()
}

/// Makes a memfd and maps it shared.
pub(super) fn memfd(pages: usize) -> (File, MmapRaw) {
    let file = File::from(memfd_create("test", MFdFlags::MFD_CLOEXEC).expect("memfd"));
    file.set_len((pages * page_size()) as u64).expect("ftruncate");
    let memory = MmapOptions::new().map_raw(&file).expect("mmap");
    (file, memory)
}

/// The address of a page of a mapping.
pub(super) fn page(memory: &MmapRaw, index: usize) -> usize {
    memory.as_mut_ptr() as usize + index * page_size()
}

/// Reads a byte; the access faults if its page is not there.
pub(super) fn load(addr: usize) -> u8 {
    // SAFETY: the tests pass addresses inside mappings that they keep alive, readable once their fault is answered.
    unsafe { std::ptr::with_exposed_provenance::<u8>(addr).read_volatile() }
}

/// Writes a byte; the access faults if its page is not there.
pub(super) fn store(addr: usize, value: u8) {
    // SAFETY: the tests pass addresses inside writable mappings that they keep alive.
    unsafe { std::ptr::with_exposed_provenance_mut::<u8>(addr).write_volatile(value) }
}

/// Runs something that may block in a thread of its own.
pub(super) fn aside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> mpsc::Receiver<T> {
    let (done, result) = mpsc::channel();
    thread::spawn(move || {
        // The test may have failed and gone.
        let _ = done.send(work());
    });
    result
}

/// Waits for what [`aside`] runs.
pub(super) fn finish<T>(result: &mpsc::Receiver<T>) -> T {
    result.recv_timeout(DEADLINE).expect("finished within the deadline")
}

/// Waits until there is something to read.
pub(super) fn wait_readable(userfault: &Userfault) {
    let mut fds = [PollFd::new(userfault.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(DEADLINE).expect("a deadline that poll takes");
    assert_eq!(poll(&mut fds, timeout), Ok(1), "a message within the deadline");
    assert_eq!(fds[0].revents(), Some(PollFlags::POLLIN));
}

/// Waits for messages and reads exactly one.
pub(super) fn next(userfault: &Userfault) -> Message {
    let mut buf = MsgBuffer::new(1);
    let mut message = None;
    until("a message", || {
        wait_readable(userfault);
        userfault.read(&mut buf, |read| message = Some(read)).expect("read") == 1
    });
    message.expect("one message")
}

/// Repeats a question, yielding between, until the answer is yes or the deadline is over.
pub(super) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < DEADLINE, "{what} within the deadline");
        thread::yield_now();
    }
}

/// The threads that wait for an answer, read or not, as the kernel counts them.
pub(super) fn waiters(userfault: &Userfault) -> u64 {
    let path = format!("/proc/self/fdinfo/{}", userfault.as_raw_fd());
    let text = std::fs::read_to_string(path).expect("fdinfo");
    let total = text.lines().find_map(|line| line.strip_prefix("total:")).expect("a count of waiters");
    total.trim().parse().expect("a number")
}

/// Reads from a pipe, within the deadline.
pub(super) fn receive<const N: usize>(mut reader: impl Read + Send + 'static) -> [u8; N] {
    finish(&aside(move || {
        let mut bytes = [0; N];
        reader.read_exact(&mut bytes).expect("bytes from the other side");
        bytes
    }))
}

/// Sees to it that a test runs in a process of its own, for one that changes or forks the whole process.
///
/// In the process of its own it returns true, and the test goes on; a watchdog ends it if it hangs. Elsewhere it runs
/// that process, demands its success, and returns false.
pub(super) fn alone(module: &str, test: &str) -> bool {
    const MARK: &str = "KIOMAP_TEST_ALONE";
    if std::env::var_os(MARK).is_some() {
        let seconds = u32::try_from(2 * DEADLINE.as_secs()).expect("a short deadline");
        nix::unistd::alarm::set(seconds);
        return true;
    }
    let (_crate, path) = module.split_once("::").expect("a module inside the crate");
    let output = Command::new(std::env::current_exe().expect("the program"))
        .args(["--exact", &format!("{path}::{test}"), "--nocapture"])
        .env(MARK, "1")
        .output()
        .expect("a process");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{}: {text}{errors}", output.status);
    // What it skipped shows here too.
    eprint!("{errors}");
    false
}
