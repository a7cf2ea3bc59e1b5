//! A process of a round: does what it is told, and says what it saw.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};

use kiomap::{AttachOptions, Region, Vmap, page_size};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use serde::{Deserialize, Serialize};

use crate::script::{Access, Advice, Attach, PROCESSES};
use crate::sheet::Sheet;
use crate::storm::StormJob;
use crate::support::touch;

/// What a process is told to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Job {
    Attach {
        attach: Attach,
        /// Where the page of the arena lies, if one is named.
        addr: Option<usize>,
    },
    Drop {
        region: u32,
    },
    /// Compares a word with the sheet.
    Read {
        addr: usize,
        word: usize,
        expect: Expect,
    },
    Write {
        addr: usize,
        value: u64,
    },
    /// Compares whole pages.
    Look {
        addr: usize,
        pages: usize,
        expect: Expect,
    },
    RegionRead {
        region: u32,
        offset: usize,
        len: usize,
        vmap: usize,
        pgoff: u64,
    },
    RegionWrite {
        region: u32,
        offset: usize,
        len: usize,
        value: u8,
    },
    Atomic {
        region: u32,
        offset: usize,
        add: u64,
    },
    PipeOut {
        addr: usize,
    },
    PipeIn {
        addr: usize,
        value: u64,
    },
    Unmap {
        addr: usize,
        len: usize,
    },
    Foreign {
        addr: usize,
        len: usize,
        byte: u8,
    },
    Remap {
        from: usize,
        len: usize,
        new_len: usize,
        flags: i32,
        to: Option<usize>,
    },
    Protect {
        addr: usize,
        len: usize,
        access: Access,
    },
    Advise {
        addr: usize,
        len: usize,
        advice: Advice,
    },
    Fork {
        child: usize,
    },
    Reap {
        pid: i32,
    },
    Exit,
    Exec,
    Spawn,
    Storm(StormJob),
}

/// What should be seen at an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Expect {
    Page { vmap: usize, pgoff: u64 },
    Foreign(u8),
    Nothing,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Saw {
    Right,
    Wrong,
    Bus,
    Segv,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Answer {
    Done,
    Errno(i32),
    Value(u64),
    Attached {
        addr: usize,
        first: bool,
    },
    /// What each page was, and a word about the first that was wrong.
    Saw(Vec<Saw>, String),
    Hello {
        pid: i32,
    },
    Storm {
        touches: u64,
        problem: Option<String>,
    },
}

/// The part of a round that each process has a copy of.
pub(crate) struct Local {
    pub(crate) me: usize,
    pub(crate) sheet: Sheet,
    pub(crate) regions: HashMap<u32, Region>,
    pub(crate) vmaps: HashMap<usize, Vmap>,
    /// The engine's process holds the first of each pair, the process of that number the second.
    sockets: Vec<(OwnedFd, OwnedFd)>,
    buffer: Vec<u8>,
}

/// The largest message.
const MESSAGE: usize = 64 * 1024;

impl Local {
    pub(crate) fn new() -> Local {
        let pair = |_| socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        Local {
            me: 0,
            sheet: Sheet::new(),
            regions: HashMap::new(),
            vmaps: HashMap::new(),
            sockets: (0..PROCESSES).map(pair).collect(),
            buffer: vec![0; MESSAGE],
        }
    }

    /// Forgets what a process that was killed may have left in its sockets.
    pub(crate) fn drain(&mut self, process: usize) {
        let (ours, theirs) = &self.sockets[process];
        for end in [ours, theirs] {
            while recv(end.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_DONTWAIT).is_ok() {}
        }
    }

    pub(crate) fn tell(&self, process: usize, job: &Job) {
        send_all(&self.sockets[process].0, &serde_json::to_vec(job).unwrap());
    }

    /// Waits for an answer, or for the end of the process.
    pub(crate) fn hear(&mut self, process: usize, pidfd: Option<&OwnedFd>) -> Option<Answer> {
        use std::os::fd::AsFd;
        let socket = &self.sockets[process].0;
        loop {
            let mut fds = vec![PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
            fds.extend(pidfd.map(|pidfd| PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)));
            if poll(&mut fds, PollTimeout::NONE).is_err() {
                continue;
            }
            if fds[0].any() == Some(true) {
                return Some(receive(socket, &mut self.buffer));
            }
            if fds.get(1).and_then(PollFd::any) == Some(true) {
                return None;
            }
        }
    }

    /// Serves until the process ends: a forked child.
    pub(crate) fn serve(&mut self, me: usize) -> ! {
        self.me = me;
        nix::unistd::alarm::set(120);
        self.answer(&Answer::Hello { pid: nix::unistd::getpid().as_raw() });
        loop {
            let socket = &self.sockets[self.me].1;
            let job: Job = receive(socket, &mut self.buffer);
            match job {
                Job::Exit => {
                    self.answer(&Answer::Done);
                    // SAFETY: ends the process without exit handlers.
                    unsafe { libc::_exit(0) }
                }
                Job::Exec => {
                    let args = [c"sleep".as_ptr(), c"100".as_ptr(), std::ptr::null()];
                    // SAFETY: the path and the arguments are terminated.
                    unsafe { libc::execv(c"/bin/sleep".as_ptr(), args.as_ptr()) };
                    panic!("exec: {}", Errno::last());
                }
                job => {
                    let answer = self.perform(job);
                    self.answer(&answer);
                }
            }
        }
    }

    fn answer(&self, answer: &Answer) {
        send_all(&self.sockets[self.me].1, &serde_json::to_vec(answer).unwrap());
    }

    /// Does a job here.
    pub(crate) fn perform(&mut self, job: Job) -> Answer {
        let page = page_size();
        match job {
            Job::Attach { attach: Attach { region, vmap, pgoff, pages, writable, inherit, stripes, .. }, addr } => {
                let mut options = AttachOptions::new().pgoff(pgoff).len_bytes(pages * page).inherit(inherit);
                options = options.stripes(stripes);
                if let Some(addr) = addr {
                    options = options.at(addr);
                }
                if !writable {
                    options = options.read_only();
                }
                match self.vmaps[&vmap].attach(&options) {
                    Ok(attached) => {
                        let (addr, first) = (attached.as_ptr() as usize, attached.is_first());
                        self.regions.insert(region, attached);
                        Answer::Attached { addr, first }
                    }
                    Err(error) => Answer::Errno(error.errno() as i32),
                }
            }
            Job::Drop { region } => {
                drop(self.regions.remove(&region));
                Answer::Done
            }
            Job::Read { addr, word, expect } => {
                let outcome = touch::read_word((addr + word * 8) as *const u8);
                let (expected, what) = match expect {
                    Expect::Page { vmap, pgoff } => {
                        (expected(self.sheet, vmap, pgoff).map(|bytes| Sheet::word(bytes, word)), "page")
                    }
                    Expect::Foreign(byte) => (Some(u64::from_ne_bytes([byte; 8])), "foreign memory"),
                    Expect::Nothing => (None, "nothing"),
                };
                let (saw, why) = match outcome {
                    Ok(value) if Some(value) == expected => (Saw::Right, String::new()),
                    Ok(value) => {
                        (Saw::Wrong, format!("{what} at {addr:#x} word {word}: {value:#x}, not {expected:x?}"))
                    }
                    Err(refused) => refused_at(&refused, addr + word * 8),
                };
                Answer::Saw(vec![saw], why)
            }
            Job::Write { addr, value } => match touch::write_word(addr as *mut u8, value) {
                Ok(()) => Answer::Saw(vec![Saw::Right], String::new()),
                Err(refused) => {
                    let (saw, why) = refused_at(&refused, addr);
                    Answer::Saw(vec![saw], why)
                }
            },
            Job::Look { addr, pages, expect } => self.look(addr, pages, expect),
            Job::RegionRead { region, offset, len, vmap, pgoff } => {
                let mut bytes = vec![0; len];
                if let Err(error) = self.regions[&region].read_at(offset, &mut bytes) {
                    return Answer::Errno(error.errno() as i32);
                }
                for (n, &byte) in bytes.iter().enumerate() {
                    let at = offset + n;
                    let expected = self.sheet.now(vmap, pgoff + (at / page) as u64)[at % page];
                    if byte != expected {
                        return Answer::Saw(vec![Saw::Wrong], format!("byte {at}: {byte:#x}, not {expected:#x}"));
                    }
                }
                Answer::Done
            }
            Job::RegionWrite { region, offset, len, value } => {
                match self.regions[&region].write_at(offset, &vec![value; len]) {
                    Ok(()) => Answer::Done,
                    Err(error) => Answer::Errno(error.errno() as i32),
                }
            }
            Job::Atomic { region, offset, add } => match self.regions[&region].atomic_u64(offset) {
                Ok(atomic) => Answer::Value(atomic.fetch_add(add, std::sync::atomic::Ordering::Relaxed)),
                Err(error) => Answer::Errno(error.errno() as i32),
            },
            Job::PipeOut { addr } => {
                let (out, into) = nix::unistd::pipe().unwrap();
                // SAFETY: the kernel reads the bytes, and answers EFAULT where it can't.
                let written = unsafe { libc::write(into.as_raw_fd(), addr as *const libc::c_void, 8) };
                if written != 8 {
                    return Answer::Errno(Errno::last_raw());
                }
                let mut bytes = [0; 8];
                std::fs::File::from(out).read_exact(&mut bytes).unwrap();
                Answer::Value(u64::from_ne_bytes(bytes))
            }
            Job::PipeIn { addr, value } => {
                let (out, into) = nix::unistd::pipe().unwrap();
                std::fs::File::from(into).write_all(&value.to_ne_bytes()).unwrap();
                // SAFETY: the range is the round's own; the kernel answers EFAULT where it can't write.
                let read = unsafe { libc::read(out.as_raw_fd(), addr as *mut libc::c_void, 8) };
                if read == 8 { Answer::Done } else { Answer::Errno(Errno::last_raw()) }
            }
            // SAFETY: the arena is the round's own, and nothing refers to it.
            Job::Unmap { addr, len } => outcome(unsafe { libc::munmap(addr as *mut libc::c_void, len) }),
            Job::Foreign { addr, len, byte } => {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
                let prot = libc::PROT_READ | libc::PROT_WRITE;
                // SAFETY: the arena is the round's own, and nothing refers to it.
                let mapped = unsafe { libc::mmap(addr as *mut libc::c_void, len, prot, flags, -1, 0) };
                if mapped as usize != addr {
                    return Answer::Errno(Errno::last_raw());
                }
                // SAFETY: the mapping just made.
                unsafe { mapped.cast::<u8>().write_bytes(byte, len) };
                Answer::Done
            }
            Job::Remap { from, len, new_len, flags, to } => {
                let target = to.unwrap_or(0) as *mut libc::c_void;
                // SAFETY: the arena is the round's own, and nothing refers to it.
                let moved = unsafe { libc::mremap(from as *mut libc::c_void, len, new_len, flags, target) };
                if moved == libc::MAP_FAILED { Answer::Errno(Errno::last_raw()) } else { Answer::Value(moved as u64) }
            }
            Job::Protect { addr, len, access } => {
                let prot = match access {
                    Access::None => libc::PROT_NONE,
                    Access::Read => libc::PROT_READ,
                    Access::Write => libc::PROT_READ | libc::PROT_WRITE,
                };
                // SAFETY: the arena is the round's own, and nothing refers to it.
                outcome(unsafe { libc::mprotect(addr as *mut libc::c_void, len, prot) })
            }
            Job::Advise { addr, len, advice } => outcome(advise(addr, len, advice)),
            Job::Fork { child } => {
                // SAFETY: no other thread of this process holds a lock that the child needs.
                match unsafe { nix::unistd::fork() } {
                    Ok(nix::unistd::ForkResult::Parent { child }) => Answer::Value(child.as_raw() as u64),
                    Ok(nix::unistd::ForkResult::Child) => self.serve(child),
                    Err(errno) => Answer::Errno(errno as i32),
                }
            }
            Job::Reap { pid } => match nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None) {
                Ok(_) => Answer::Done,
                Err(errno) => Answer::Errno(errno as i32),
            },
            Job::Spawn => match std::process::Command::new("/bin/true").status() {
                Ok(status) if status.success() => Answer::Done,
                Ok(status) => Answer::Value(status.code().unwrap_or(-1) as u64),
                Err(error) => Answer::Errno(error.raw_os_error().unwrap_or(0)),
            },
            Job::Storm(job) => crate::storm::run(self, &job),
            Job::Exit | Job::Exec => unreachable!("handled by the process that serves"),
        }
    }

    fn look(&self, addr: usize, pages: usize, expect: Expect) -> Answer {
        let (page, mut seen, mut why) = (page_size(), Vec::new(), String::new());
        for n in 0..pages {
            let at = addr + n * page;
            let (saw, what) = match touch::read_word(at as *const u8) {
                Err(refused) => refused_at(&refused, at),
                Ok(_) => {
                    let wrong = |word: usize, value: u64, expected: Option<u64>| {
                        (Saw::Wrong, format!("{expect:?}+{n} at {at:#x} word {word}: {value:#x}, not {expected:x?}"))
                    };
                    let words = page / 8;
                    let mut result = (Saw::Right, String::new());
                    for word in 0..words {
                        let value = match touch::read_word((at + word * 8) as *const u8) {
                            Ok(value) => value,
                            Err(refused) => {
                                result = (Saw::Wrong, format!("{expect:?}+{n} at {at:#x}: word 0, then {refused:?}"));
                                break;
                            }
                        };
                        let expected = match expect {
                            Expect::Page { vmap, pgoff } => {
                                expected(self.sheet, vmap, pgoff + n as u64).map(|bytes| Sheet::word(bytes, word))
                            }
                            Expect::Foreign(byte) => Some(u64::from_ne_bytes([byte; 8])),
                            Expect::Nothing => None,
                        };
                        if Some(value) != expected {
                            result = wrong(word, value, expected);
                            break;
                        }
                    }
                    result
                }
            };
            if why.is_empty() {
                why = what;
            }
            seen.push(saw);
        }
        Answer::Saw(seen, why)
    }
}

fn expected(sheet: Sheet, vmap: usize, pgoff: u64) -> Option<&'static [u8]> {
    (pgoff < crate::script::PAGES as u64).then(|| sheet.now(vmap, pgoff))
}

fn refused_at(refused: &touch::Refused, addr: usize) -> (Saw, String) {
    if refused.is_sigbus_at(addr) {
        (Saw::Bus, String::new())
    } else if refused.is_sigsegv() && refused.addr == addr {
        (Saw::Segv, String::new())
    } else {
        (Saw::Wrong, format!("{refused:?}"))
    }
}

pub(crate) fn advise(addr: usize, len: usize, advice: Advice) -> i32 {
    let advice = match advice {
        Advice::DontNeed => libc::MADV_DONTNEED,
        Advice::Cold => libc::MADV_COLD,
        Advice::PageOut => libc::MADV_PAGEOUT,
        Advice::Free => libc::MADV_FREE,
        Advice::Remove => libc::MADV_REMOVE,
        Advice::PopulateRead => libc::MADV_POPULATE_READ,
        Advice::PopulateWrite => libc::MADV_POPULATE_WRITE,
    };
    // SAFETY: the arena is the round's own; what becomes of its bytes is what is tested.
    unsafe { libc::madvise(addr as *mut libc::c_void, len, advice) }
}

fn outcome(result: i32) -> Answer {
    if result == 0 { Answer::Done } else { Answer::Errno(Errno::last_raw()) }
}

fn send_all(socket: &OwnedFd, bytes: &[u8]) {
    loop {
        match send(socket.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL) {
            Ok(sent) => return assert_eq!(sent, bytes.len()),
            Err(Errno::EINTR) => {}
            Err(errno) => panic!("send: {errno}"),
        }
    }
}

fn receive<T: serde::de::DeserializeOwned>(socket: &OwnedFd, buffer: &mut [u8]) -> T {
    loop {
        match recv(socket.as_raw_fd(), buffer, MsgFlags::empty()) {
            Ok(len) => return serde_json::from_slice(&buffer[..len]).unwrap(),
            Err(Errno::EINTR) => {}
            Err(errno) => panic!("recv: {errno}"),
        }
    }
}
