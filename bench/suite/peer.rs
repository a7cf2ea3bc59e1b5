//! The process whose memory is served for it: the suite itself, started again.
//!
//! It makes its userfaultfd and its memory, hands the descriptor over, touches when it is told to, and ends.

use std::io::{BufRead, BufReader, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use kiomap::OpenWay;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::{Deserialize, Serialize};

use crate::common::clock::{self, now};
use crate::common::machine::open_way_name;
use crate::common::raw::{Mapping, Memory, Uffd, Waiting, usage};
use crate::common::touch::{Contents, Pass, pass};
use crate::memory::{PASS_SECONDS, sample_of, touch_all};
use crate::series::{Bench, Sample};

const WAYS: [OpenWay; 3] = [OpenWay::Device, OpenWay::Syscall, OpenWay::UserModeOnly];

/// What the process is to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Task {
    /// Pages of its memory, which is anonymous and private.
    pub(crate) pages: usize,
    /// Those that it touches; each is to be full of its mark.
    pub(crate) order: Vec<usize>,
    /// Each touch is timed, not only the whole.
    pub(crate) each: bool,
    /// The features of its userfaultfd.
    pub(crate) features: u64,
    /// A bare loop reads its userfaultfd, in which it waits: in the end the page behind the last is touched, by which it is told.
    pub(crate) for_floor: bool,
}

impl Task {
    fn waiting(&self) -> Waiting {
        if self.for_floor { Waiting::Read } else { Waiting::Poll }
    }
}

/// What the process saw.
#[derive(Debug, Serialize, Deserialize)]
struct Seen {
    pass: Pass,
    ticks: Vec<u64>,
    /// Its processor time, in seconds.
    cpu: f64,
}

/// The suite's end. The process is ended with it.
pub(crate) struct Peer {
    child: Child,
    socket: UnixStream,
    task: Task,
    /// The address of its first page.
    pub(crate) base: usize,
}

impl Peer {
    /// Starts the process where the caller may run; also answers with its userfaultfd.
    pub(crate) fn start(bench: &Bench, task: Task) -> Result<(Peer, Uffd)> {
        let (mut socket, theirs) = UnixStream::pair().context("socketpair")?;
        let mut command = Command::new("/proc/self/exe");
        let child = command.arg("--peer").stdin(Stdio::from(OwnedFd::from(theirs))).spawn();
        let child = child.context("starting a process whose memory is served")?;
        let text = serde_json::to_string(&(open_way_name(bench.way), &task))?;
        writeln!(socket, "{text}").context("telling a process what to do")?;
        let (base, fd) = receive(&socket).context("the userfaultfd of a process")?;
        let uffd = Uffd::of(fd, task.waiting());
        Ok((Peer { child, socket, task, base }, uffd))
    }

    /// The process's pidfd.
    pub(crate) fn pidfd(&self) -> Result<OwnedFd> {
        // SAFETY: the system call takes numbers, and makes a descriptor.
        let raw = unsafe { libc::syscall(libc::SYS_pidfd_open, self.child.id(), 0) };
        let raw = Errno::result(raw).context("pidfd_open")?;
        // SAFETY: the descriptor is new, and nobody else has it.
        Ok(unsafe { OwnedFd::from_raw_fd(raw as i32) })
    }

    /// Has the process touch; it is gone afterwards.
    pub(crate) fn touch(mut self, bench: &Bench) -> Result<Sample> {
        let before = usage()?.1;
        self.socket.write_all(b"\n").context("having a process touch")?;
        let mut text = Vec::new();
        self.socket.read_to_end(&mut text).context("what a process saw")?;
        // Its own is no part of it until it is reaped.
        let cpu = usage()?.1 - before;
        let status = self.child.wait().context("waiting for a process")?;
        ensure!(status.success(), "the process whose memory is served ended with {status}");
        let seen: Seen = serde_json::from_slice(&text)?;
        sample_of(bench, seen.pass, seen.ticks, self.task.order.len(), cpu + seen.cpu)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It is gone already, unless something went wrong.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Is that process: standard input is the socket.
pub(crate) fn obey() -> Result<()> {
    nix::unistd::alarm::set(PASS_SECONDS);
    clock::choose();
    let socket = std::io::stdin().as_fd().try_clone_to_owned().context("the socket")?;
    let mut socket = BufReader::new(UnixStream::from(socket));
    let mut text = String::new();
    socket.read_line(&mut text).context("what to do")?;
    let (way, task): (String, Task) = serde_json::from_str(&text)?;
    let way = WAYS.into_iter().find(|&other| open_way_name(other) == way).context("an unknown way")?;

    // A page more, by which a bare loop is told that it is done.
    let memory = Mapping::new(Memory::Anon, task.pages + 1, task.pages + 1)?;
    let base = memory.as_ptr().expose_provenance();
    let uffd = Uffd::open_for(way, task.waiting(), task.features)?;
    uffd.register(&memory)?;
    send(socket.get_ref(), base, &uffd.into_fd())?;
    ensure!(socket.read_line(&mut text).context("when to begin")? == 1, "not told to begin");

    let mut ticks = vec![u64::MAX; if task.each { task.order.len() } else { 0 }];
    let before = usage()?.1;
    let pass = if task.each {
        pass(base, &task.order, Contents::Marks, &mut ticks)
    } else {
        let begin = now();
        let wrong = touch_all(base, &task.order, Contents::Marks) as u64;
        Pass { begin, end: now(), wrong }
    };
    let cpu = usage()?.1 - before;
    if task.for_floor {
        touch_all(base, &[task.pages], Contents::Marks);
    }
    serde_json::to_writer(socket.get_ref(), &Seen { pass, ticks, cpu })?;
    Ok(())
}

fn send(socket: &UnixStream, base: usize, fd: &OwnedFd) -> Result<()> {
    let numbers = [fd.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&numbers)];
    let bytes = base.to_ne_bytes();
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&bytes)], &rights, MsgFlags::MSG_NOSIGNAL, None)
        .context("sending a userfaultfd")?;
    Ok(())
}

fn receive(socket: &UnixStream) -> Result<(usize, OwnedFd)> {
    let mut bytes = [0; size_of::<usize>()];
    let mut control = nix::cmsg_space!([i32; 1]);
    let mut slices = [IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut control), flags).context("recvmsg")?;
    let rights = message.cmsgs()?.find_map(|part| match part {
        ControlMessageOwned::ScmRights(numbers) => numbers.first().copied(),
        _ => None,
    });
    let (Some(raw), size) = (rights, message.bytes) else { bail!("the process has sent none") };
    // SAFETY: the kernel has just put it into this process's table.
    let fd = unsafe { OwnedFd::from_raw_fd(raw) };
    ensure!(size == bytes.len(), "no address came with it");
    Ok((usize::from_ne_bytes(bytes), fd))
}
