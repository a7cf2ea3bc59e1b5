//! A fake `criu restore --lazy-pages`: it says what CRIU says, in the same order, and its tasks are processes.

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};

use kiomap::page_size;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::unistd::Pid;
use userfaultfd::{FeatureFlags, Uffd};

use crate::folder::words;
use crate::support::scene::child;
use crate::support::{eventually, limited, peer, touch};

/// What CRIU sends when its tree runs.
pub(crate) const RESTORED: u32 = 0x5253_5446;
pub(crate) const SOCKET: &str = "lazy-pages.socket";

/// The example, which `cargo test` builds beside the tests.
pub(crate) fn program() -> PathBuf {
    let tests = std::env::current_exe().unwrap();
    let path = tests.parent().and_then(Path::parent).unwrap().join("examples/criu_lazy_pages");
    assert!(path.exists(), "{} is not built: run `cargo build --examples` first", path.display());
    path
}

/// A restore that is going on: the daemon, and the connection to it.
pub(crate) struct Restore {
    daemon: Child,
    stream: UnixStream,
}

impl Restore {
    /// Starts the daemon for a folder, and connects.
    pub(crate) fn begin(folder: &Path, more: &[&str]) -> Restore {
        Restore::begin_in(folder, folder, more)
    }

    /// As [`Restore::begin`], where the socket is in another folder.
    pub(crate) fn begin_in(folder: &Path, work_folder: &Path, more: &[&str]) -> Restore {
        let arguments = [&["-D", folder.to_str().unwrap()], more].concat();
        let mut command = limited(&program(), &arguments);
        let mut daemon = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let socket = work_folder.join(SOCKET);
        let mut stream = None;
        eventually("the daemon listens", || {
            assert!(daemon.try_wait().unwrap().is_none(), "the daemon has ended: {}", told(&mut daemon));
            stream = UnixStream::connect(&socket).ok();
            stream.is_some()
        });
        Restore { daemon, stream: stream.unwrap() }
    }

    /// Sends bytes as they are.
    pub(crate) fn say(&self, bytes: &[u8]) {
        (&self.stream).write_all(bytes).unwrap();
    }

    /// Sends a message with descriptors.
    pub(crate) fn say_with(&self, bytes: &[u8], fds: &[i32]) {
        let rights = [ControlMessage::ScmRights(fds)];
        sendmsg::<()>(self.stream.as_raw_fd(), &[IoSlice::new(bytes)], &rights, MsgFlags::MSG_NOSIGNAL, None).unwrap();
    }

    pub(crate) fn zombie(&self, pid: u32) {
        self.say(&(-(pid as i32)).to_ne_bytes());
    }

    /// Starts a task: a process that sends its userfaultfd, then has its memory, and then runs `body`. It is
    /// told when the memory is there.
    pub(crate) fn task(&self, pid: u32, memory: &[Vma], body: impl FnOnce()) -> Pid {
        let (ready, tell) = nix::unistd::pipe().unwrap();
        let task = child(move || {
            let uffd = open_uffd();
            self.say(&(pid as i32).to_ne_bytes());
            self.say_with(&[0], &[uffd.as_raw_fd()]);
            // SAFETY: closed once, here: this process ends without dropping the connection.
            unsafe { libc::close(self.stream.as_raw_fd()) };
            for vma in memory {
                vma.map(&uffd);
            }
            drop(uffd);
            File::from(tell).write_all(&[1]).unwrap();
            body();
        });
        // Nobody else has the other end, so that a task that has failed is not waited for.
        File::from(ready).read_exact(&mut [0]).expect("the task has failed");
        task
    }

    /// Says that the tree runs.
    pub(crate) fn restored(&self) {
        self.say(&RESTORED.to_ne_bytes());
    }

    /// Closes the connection, as a `criu restore` that ends.
    pub(crate) fn hang_up(&self) {
        self.stream.shutdown(std::net::Shutdown::Both).unwrap();
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.daemon.id() as i32), signal).unwrap();
    }

    /// Waits until the daemon has ended.
    pub(crate) fn end(self) -> Output {
        let Restore { daemon, stream } = self;
        let output = daemon.wait_with_output().unwrap();
        drop(stream);
        output
    }

    /// Waits for the daemon, which must have succeeded; answers with its standard output.
    #[track_caller]
    pub(crate) fn succeeded(self) -> String {
        let output = self.end();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{}: {said}", output.status);
        assert_eq!(said, "");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Waits for the daemon, which must have failed and said so.
    #[track_caller]
    pub(crate) fn failed(self, says: &str) {
        failure(&self.end(), says);
    }
}

/// A failure: a status of its own, nothing on the standard output, and one line that says this.
#[track_caller]
pub(crate) fn failure(output: &Output, says: &str) {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{}: {said}", output.status);
    assert!(output.stdout.is_empty(), "{output:?}");
    assert!(said.contains(says) && said.lines().count() == 1, "{says:?} is not said, but {said}");
}

fn told(daemon: &mut Child) -> String {
    let mut said = String::new();
    daemon.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    said
}

/// What CRIU asks of a userfaultfd, but for forks.
const EVENTS: FeatureFlags =
    FeatureFlags::EVENT_REMAP.union(FeatureFlags::EVENT_UNMAP).union(FeatureFlags::EVENT_REMOVE);

/// The userfaultfd of a task as CRIU opens it, if this user may have one that follows forks.
fn open_following() -> Option<Uffd> {
    peer::open(EVENTS | FeatureFlags::EVENT_FORK)
}

/// Whether a userfaultfd here may follow forks, which takes CAP_SYS_PTRACE.
pub(crate) fn follows_forks() -> bool {
    open_following().is_some()
}

/// The userfaultfd of a task; without privilege it doesn't follow forks.
pub(crate) fn open_uffd() -> Uffd {
    open_following().or_else(|| peer::open(EVENTS)).unwrap()
}

/// A mapping of a task.
#[derive(Clone)]
pub(crate) struct Vma {
    pub(crate) addrs: Range<usize>,
    pub(crate) writable: bool,
    /// Whether CRIU leaves what is missing there to the daemon.
    pub(crate) registered: bool,
}

impl Vma {
    pub(crate) fn lazy(addrs: Range<usize>) -> Vma {
        Vma { addrs, writable: true, registered: true }
    }

    fn map(&self, uffd: &Uffd) {
        map_zeros(&self.addrs, self.writable);
        if self.registered {
            uffd.register(self.addrs.start as *mut _, self.addrs.len()).unwrap();
        }
    }
}

/// Maps fresh memory over whatever is there.
pub(crate) fn map_zeros(addrs: &Range<usize>, writable: bool) {
    let access = if writable { ProtFlags::PROT_READ | ProtFlags::PROT_WRITE } else { ProtFlags::PROT_READ };
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED;
    let (start, len) = (std::num::NonZero::new(addrs.start), std::num::NonZero::new(addrs.len()).unwrap());
    // SAFETY: the addresses are of a reservation of the test's (`Memory`), which holds nothing that is used.
    let mapped = unsafe { mmap_anonymous(start, len, access, flags) }.unwrap();
    assert_eq!(mapped.addr().get(), addrs.start);
}

/// Fails unless the page at `addr` is the one that the image has at `original`.
#[track_caller]
pub(crate) fn check_page(seed: u64, addr: usize, original: usize) {
    for (n, word) in words(seed, original).enumerate() {
        assert_eq!(touch::read_word((addr + 8 * n) as *const u8), Ok(word), "word {n} of the page at {addr:#x}");
    }
}

/// Fails unless all pages of the ranges are as in the image.
#[track_caller]
pub(crate) fn check(seed: u64, addrs: Range<usize>) {
    for addr in addrs.step_by(page_size()) {
        check_page(seed, addr, addr);
    }
}

/// Fails unless all pages are zeros.
#[track_caller]
pub(crate) fn check_zeros(addrs: Range<usize>) {
    for addr in addrs.step_by(8) {
        assert_eq!(touch::read_word(addr as *const u8), Ok(0), "{addr:#x}");
    }
}

/// Gives pages up.
pub(crate) fn purge(addrs: &Range<usize>) {
    // SAFETY: the addresses are of a reservation of the test's; nothing there is borrowed.
    let done = unsafe { libc::madvise(addrs.start as *mut _, addrs.len(), libc::MADV_DONTNEED) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

/// A descriptor that is none of userfaultfd.
pub(crate) fn other_descriptor() -> OwnedFd {
    nix::unistd::pipe().unwrap().0
}
