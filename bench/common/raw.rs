//! The kernel's interface, by hand and apart from the engine's: the floor must not share its code.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use kiomap::{OpenWay, page_size};
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::Pid;

const UFFD_API: u64 = 0xAA;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
const USERFAULTFD_IOC_NEW: libc::Ioctl = 0xAA00;
const MODE_MISSING: u64 = 1;
const MODE_MINOR: u64 = 4;
const EVENT_PAGEFAULT: u8 = 0x12;
/// UFFD_FEATURE_EVENT_REMAP, _REMOVE and _UNMAP.
pub(crate) const FEATURES_OF_EVENTS: u64 = 1 << 2 | 1 << 3 | 1 << 6;
/// UFFD_FEATURE_THREAD_ID.
pub(crate) const FEATURE_THREAD_ID: u64 = 1 << 8;
/// UFFD_FEATURE_MINOR_SHMEM.
pub(crate) const FEATURE_MINOR: u64 = 1 << 10;

#[repr(C)]
pub(crate) struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
pub(crate) struct UffdioRegister {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
pub(crate) struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
pub(crate) struct UffdioPoison {
    start: u64,
    len: u64,
    mode: u64,
    updated: i64,
}

#[repr(C)]
pub(crate) struct UffdioContinue {
    start: u64,
    len: u64,
    mode: u64,
    mapped: i64,
}

/// A message; the fields are those of a page fault.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    feat: u64,
}

const _: () = assert!(size_of::<Message>() == 32);

impl Message {
    /// The address that was touched, if it is of a fault.
    #[inline]
    pub(crate) fn fault(&self) -> Option<usize> {
        (self.event == EVENT_PAGEFAULT).then_some(self.address as usize)
    }
}

nix::ioctl_readwrite!(uffdio_api, 0xAA, 0x3F, UffdioApi);
nix::ioctl_readwrite!(uffdio_register, 0xAA, 0x00, UffdioRegister);
nix::ioctl_readwrite!(uffdio_copy, 0xAA, 0x03, UffdioCopy);
nix::ioctl_readwrite!(uffdio_continue, 0xAA, 0x07, UffdioContinue);
nix::ioctl_readwrite!(uffdio_poison, 0xAA, 0x08, UffdioPoison);

/// How the handler of the floor waits for a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waiting {
    /// In read(2).
    Read,
    /// In poll(2), and then read(2).
    Poll,
}

/// A userfaultfd.
pub(crate) struct Uffd {
    fd: OwnedFd,
    waiting: Waiting,
}

impl Uffd {
    /// Opens one in the way in which the engine opened its own.
    pub(crate) fn open(way: OpenWay, waiting: Waiting) -> Result<Uffd> {
        Uffd::open_for(way, waiting, 0)
    }

    /// The same, with features.
    pub(crate) fn open_for(way: OpenWay, waiting: Waiting, features: u64) -> Result<Uffd> {
        let nonblock = if waiting == Waiting::Poll { libc::O_NONBLOCK } else { 0 };
        let flags = libc::O_CLOEXEC | nonblock;
        let raw = match way {
            OpenWay::Device => {
                let device = File::options().read(true).write(true).open("/dev/userfaultfd");
                let device = device.context("opening /dev/userfaultfd")?;
                // SAFETY: the request takes a number, and makes a descriptor.
                unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) }
            }
            way => {
                let limit = if way == OpenWay::UserModeOnly { UFFD_USER_MODE_ONLY } else { 0 };
                // SAFETY: the system call takes a number, and makes a descriptor.
                unsafe { libc::syscall(libc::SYS_userfaultfd, flags | limit) as libc::c_int }
            }
        };
        let raw = Errno::result(raw).context("opening a userfaultfd")?;
        // SAFETY: the descriptor is new, and nobody else has it.
        let uffd = Uffd { fd: unsafe { OwnedFd::from_raw_fd(raw) }, waiting };
        let mut api = UffdioApi { api: UFFD_API, features, ioctls: 0 };
        // SAFETY: the argument is a whole struct of ours.
        unsafe { uffdio_api(raw, &mut api) }.context("UFFDIO_API")?;
        Ok(uffd)
    }

    /// Takes one that another process has opened for the same waiting.
    pub(crate) fn of(fd: OwnedFd, waiting: Waiting) -> Uffd {
        Uffd { fd, waiting }
    }

    /// Gives the descriptor up.
    pub(crate) fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// Registers memory for pages that are missing.
    pub(crate) fn register(&self, memory: &Mapping) -> Result<()> {
        self.register_for(memory, MODE_MISSING)
    }

    /// Registers memory for pages that the memfd holds and that are not mapped.
    pub(crate) fn register_minor(&self, memory: &Mapping) -> Result<()> {
        self.register_for(memory, MODE_MINOR)
    }

    fn register_for(&self, memory: &Mapping, mode: u64) -> Result<()> {
        let mut request = UffdioRegister { start: memory.addr() as u64, len: memory.len as u64, mode, ioctls: 0 };
        // SAFETY: the argument is a whole struct of ours; the range is a mapping of ours.
        unsafe { uffdio_register(self.fd.as_raw_fd(), &mut request) }.context("UFFDIO_REGISTER")?;
        Ok(())
    }

    /// Waits for faults; passes their addresses on. Events end in `EPROTO`.
    #[inline]
    pub(crate) fn wait(&self, messages: &mut [Message], mut each: impl FnMut(usize)) -> Result<(), Errno> {
        let mut foreign = false;
        self.wait_for_any(messages, |message| match message.fault() {
            Some(addr) => each(addr),
            None => foreign = true,
        })?;
        if foreign { Err(Errno::EPROTO) } else { Ok(()) }
    }

    /// Waits for messages of any kind.
    #[inline]
    pub(crate) fn wait_for_any(&self, messages: &mut [Message], each: impl FnMut(&Message)) -> Result<(), Errno> {
        if self.waiting == Waiting::Poll {
            let mut poll = libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one entry, and it is ours.
            Errno::result(unsafe { libc::poll(&mut poll, 1, -1) })?;
        }
        // SAFETY: the kernel writes whole messages, no more than fit; any bytes are a valid `Message`.
        let read = unsafe {
            libc::read(self.fd.as_raw_fd(), messages.as_mut_ptr().cast(), size_of_val::<[Message]>(messages))
        };
        let read = match Errno::result(read) {
            Ok(read) => read as usize / size_of::<Message>(),
            Err(Errno::EAGAIN | Errno::EINTR) => 0,
            Err(errno) => return Err(errno),
        };
        messages[..read].iter().for_each(each);
        Ok(())
    }

    /// # Safety
    ///
    /// `dst` must be registered memory to which no reference is held.
    #[inline]
    pub(crate) unsafe fn copy(&self, dst: usize, src: *const u8, len: usize) -> Result<(), Errno> {
        let mut request =
            UffdioCopy { dst: dst as u64, src: src.expose_provenance() as u64, len: len as u64, mode: 0, copy: 0 };
        // SAFETY: the argument is a whole struct of ours; the rest is the caller's promise.
        unsafe { uffdio_copy(self.fd.as_raw_fd(), &mut request) }.map(drop)
    }

    /// Maps what the memfd holds.
    #[inline]
    pub(crate) fn map_held(&self, dst: usize, len: usize) -> Result<(), Errno> {
        let mut request = UffdioContinue { start: dst as u64, len: len as u64, mode: 0, mapped: 0 };
        // SAFETY: the argument is a whole struct of ours; no byte is changed.
        unsafe { uffdio_continue(self.fd.as_raw_fd(), &mut request) }.map(drop)
    }

    #[inline]
    pub(crate) fn poison(&self, dst: usize, len: usize) -> Result<(), Errno> {
        let mut request = UffdioPoison { start: dst as u64, len: len as u64, mode: 0, updated: 0 };
        // SAFETY: the argument is a whole struct of ours; only pages that are not there are marked.
        unsafe { uffdio_poison(self.fd.as_raw_fd(), &mut request) }.map(drop)
    }
}

/// What memory is behind a mapping of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Memory {
    /// Anonymous, private.
    Anon,
    /// A memfd of its own, shared.
    Memfd,
}

/// Makes a memfd of `pages` pages.
pub(crate) fn memfd(pages: usize) -> Result<OwnedFd> {
    let fd = memfd_create(c"benchmark", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING).context("memfd_create")?;
    nix::unistd::ftruncate(&fd, (pages * page_size()) as i64).context("sizing a memfd")?;
    Ok(fd)
}

/// Mapped memory, none of it there yet.
pub(crate) struct Mapping {
    start: *mut u8,
    len: usize,
}

// SAFETY: it is an address and a length; what threads do there, they do through atomics and the kernel.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `pages` pages; the memfd has only `backed` of them.
    pub(crate) fn new(memory: Memory, pages: usize, backed: usize) -> Result<Mapping> {
        let len = pages * page_size();
        match memory {
            Memory::Anon => Mapping::of(None, len),
            Memory::Memfd => Mapping::of(Some(&memfd(backed)?), len),
        }
    }

    /// Maps `len` bytes of a memfd, shared, or of nothing, private.
    pub(crate) fn of(fd: Option<&OwnedFd>, len: usize) -> Result<Mapping> {
        let flags = if fd.is_some() { libc::MAP_SHARED } else { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS };
        let raw = fd.map_or(-1, AsRawFd::as_raw_fd);
        let start = map(len, flags, raw).context("mmap of memory to touch")?;
        // Pages of 4 KiB are what is compared; not every kernel can be asked.
        // SAFETY: the range was just mapped, and the advice changes no byte.
        unsafe { libc::madvise(start.cast(), len, libc::MADV_NOHUGEPAGE) };
        Ok(Mapping { start, len })
    }

    /// Maps memory that forked children share, all of it there.
    pub(crate) fn shared(bytes: usize) -> Result<Mapping> {
        let start = map(bytes, libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_POPULATE, -1)
            .context("mmap of memory shared with a child")?;
        Ok(Mapping { start, len: bytes })
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.start
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn addr(&self) -> usize {
        self.start.addr()
    }
}

fn map(len: usize, flags: libc::c_int, fd: libc::c_int) -> Result<*mut u8, Errno> {
    // SAFETY: no address is asked for, so nothing that exists is replaced.
    let start = unsafe {
        libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags | libc::MAP_NORESERVE, fd, 0)
    };
    if start == libc::MAP_FAILED { Err(Errno::last()) } else { Ok(start.cast()) }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is this value's own, and ends with it.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

/// Counts the pages of a range that are there: mapped, or in the page cache behind it.
pub(crate) fn resident(start: *const u8, pages: usize) -> Result<usize> {
    let mut there = vec![0u8; pages];
    // SAFETY: one byte a page is written into `there`.
    let answer = unsafe { libc::mincore(start.cast_mut().cast(), pages * page_size(), there.as_mut_ptr().cast()) };
    Errno::result(answer).context("mincore")?;
    Ok(there.iter().filter(|&&byte| byte & 1 == 1).count())
}

/// The page faults of this process that needed no disk, and its processor time (with reaped children), in seconds.
pub(crate) fn usage() -> Result<(u64, f64)> {
    use nix::sys::resource::{UsageWho, getrusage};
    let seconds = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    let own = getrusage(UsageWho::RUSAGE_SELF).context("getrusage")?;
    let children = getrusage(UsageWho::RUSAGE_CHILDREN).context("getrusage")?;
    let cpu = [own, children].map(|usage| seconds(usage.user_time()) + seconds(usage.system_time()));
    Ok((own.minor_page_faults() as u64, cpu[0] + cpu[1]))
}

/// The processors on which this process may run.
pub(crate) fn allowed_cpus() -> Result<Vec<usize>> {
    let set = sched_getaffinity(Pid::from_raw(0)).context("sched_getaffinity")?;
    Ok((0..CpuSet::count()).filter(|&cpu| set.is_set(cpu).unwrap_or(false)).collect())
}

/// Lets the calling thread, and those that it will start, run on these processors only.
pub(crate) fn run_on(cpus: &[usize]) -> Result<()> {
    let mut set = CpuSet::new();
    for &cpu in cpus {
        set.set(cpu).context("naming a processor")?;
    }
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("sched_setaffinity to processors {cpus:?}"))
}

/// Touches memory once, so that a virtual machine's host has allocated it. At most half of what is free is touched.
pub(crate) fn warm_up(bytes: usize) -> Result<usize> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
    let available = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: usize = available.and_then(|text| text.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0);
    ensure!(kib > 0, "/proc/meminfo does not say how much memory is available");
    let pages = bytes.min(kib * 1024 / 2) / page_size();
    let memory = Mapping::new(Memory::Anon, pages, pages)?;
    for page in 0..pages {
        // SAFETY: the page lies within the mapping, which nobody else knows.
        unsafe { memory.as_ptr().add(page * page_size()).write_volatile(1) };
    }
    Ok(pages * page_size())
}
