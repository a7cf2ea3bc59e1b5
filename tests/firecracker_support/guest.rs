//! A VM monitor as Firecracker is one: guest memory in regions, registered with a userfaultfd that reports REMOVE only, and one
//! message that hands it over.

use std::fs::File;
use std::io::IoSlice;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use kiomap::page_size;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use userfaultfd::{FeatureFlags, Uffd};

use super::memory::Random;
use crate::support::{peer, touch};

/// Guest memory.
pub(crate) struct Region {
    pub(crate) base: usize,
    pub(crate) size: usize,
    /// Where it begins in the memory file.
    pub(crate) offset: usize,
    /// The size of its pages.
    pub(crate) page: usize,
}

impl Region {
    /// Maps anonymous memory.
    pub(crate) fn map(size: usize, offset: usize, page: usize) -> Region {
        let huge = if page == page_size() { 0 } else { libc::MAP_HUGETLB | libc::MAP_HUGE_2MB };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | huge;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping that replaces nothing.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), size, access, flags, -1, 0) };
        assert_ne!(base, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        Region { base: base as usize, size, offset, page }
    }

    /// The bytes of a page.
    pub(crate) fn page(&self, n: usize) -> &[u8] {
        assert!((n + 1) * self.page <= self.size);
        // SAFETY: the region is mapped for as long as the process lives. Whoever writes a page is the thread that reads it.
        unsafe { std::slice::from_raw_parts((self.base + n * self.page) as *const u8, self.page) }
    }

    /// Writes a word at the start of a page.
    pub(crate) fn write(&self, n: usize, word: u64) {
        assert!((n + 1) * self.page <= self.size);
        // SAFETY: as for `page`; it is aligned.
        unsafe { ((self.base + n * self.page) as *mut u64).write_volatile(word) };
    }

    /// What the balloon does: gives pages back.
    pub(crate) fn remove(&self, first: usize, nr_pages: usize) {
        assert!((first + nr_pages) * self.page <= self.size);
        let addr = (self.base + first * self.page) as *mut libc::c_void;
        // SAFETY: nothing refers to these pages now.
        let answer = unsafe { libc::madvise(addr, nr_pages * self.page, libc::MADV_DONTNEED) };
        assert_eq!(answer, 0, "{}", std::io::Error::last_os_error());
    }

    pub(crate) fn nr_pages(&self) -> usize {
        self.size / self.page
    }

    /// The object of a message that describes it, as versions of Firecracker write it.
    pub(crate) fn record(&self, version: Version) -> Value {
        let Region { base, size, offset, page } = self;
        let mut record = json!({ "base_host_virt_addr": base, "size": size, "offset": offset });
        if version == Version::Now {
            record["page_size"] = json!(page);
        }
        if version != Version::Oldest {
            // In bytes, whatever its name says.
            record["page_size_kib"] = json!(page);
        }
        record
    }
}

/// Versions of Firecracker, by the fields that they send.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    Now,
    Older,
    Oldest,
}

/// Opens a userfaultfd as Firecracker does; for an unprivileged user one that reports faults of user mode only.
pub(crate) fn userfaultfd(features: FeatureFlags) -> Uffd {
    peer::open(features).expect("these features need no privilege")
}

/// The monitor's memory, and what it hands over.
pub(crate) struct Guest {
    pub(crate) uffd: Uffd,
    pub(crate) regions: Vec<Region>,
}

impl Guest {
    /// Maps and registers `bytes` of memory, from the start of the memory file, in three regions.
    pub(crate) fn new(bytes: usize) -> Guest {
        Guest::of_pages(bytes, page_size())
    }

    /// As [`Guest::new`], of pages of this size.
    pub(crate) fn of_pages(bytes: usize, page: usize) -> Guest {
        let unit = |share: usize| (bytes / 8 * share) / page * page;
        let sizes = [unit(1), unit(5), bytes - unit(1) - unit(5)];
        let uffd = userfaultfd(FeatureFlags::EVENT_REMOVE);
        let mut offset = 0;
        let regions = sizes.map(|size| {
            let region = Region::map(size, offset, page);
            offset += size;
            uffd.register(region.base as *mut libc::c_void, size).unwrap();
            region
        });
        Guest { uffd, regions: regions.into() }
    }

    pub(crate) fn message(&self, version: Version) -> String {
        let records: Vec<_> = self.regions.iter().map(|region| region.record(version)).collect();
        Value::from(records).to_string()
    }

    /// Connects and hands the memory over; the socket is to be kept open.
    pub(crate) fn hand_over(&self, socket: &Path, version: Version) -> UnixStream {
        let stream = UnixStream::connect(socket).unwrap();
        send(&stream, self.message(version).as_bytes(), &[self.uffd.as_raw_fd()]);
        stream
    }

    /// The region of a page of the whole memory, and which page of it that is.
    pub(crate) fn find(&self, mut page: usize) -> (&Region, usize) {
        for region in &self.regions {
            if page < region.nr_pages() {
                return (region, page);
            }
            page -= region.nr_pages();
        }
        panic!("there are {page} pages fewer");
    }

    pub(crate) fn nr_pages(&self) -> usize {
        self.regions.iter().map(Region::nr_pages).sum()
    }
}

/// Sends bytes, and descriptors with the first of them.
pub(crate) fn send(stream: &UnixStream, bytes: &[u8], descriptors: &[RawFd]) {
    let rights = [ControlMessage::ScmRights(descriptors)];
    let rights = if descriptors.is_empty() { &[][..] } else { &rights };
    let sent = sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(bytes)], rights, MsgFlags::MSG_NOSIGNAL, None).unwrap();
    assert_eq!(sent, bytes.len());
}

fn digest(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// The order in which pages are touched.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Order {
    Up,
    Down,
    Scattered,
}

/// What a page must show.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shows {
    File,
    /// It was given back.
    Zeros,
    /// It was given back, and written to.
    Written,
}

/// What was seen.
#[derive(Default)]
pub(crate) struct Seen {
    pub(crate) pages: usize,
    pub(crate) data: usize,
    pub(crate) removed: usize,
}

/// Touches every page of the memory, and compares its SHA-256 with that of the memory file: in two threads, to whom every other
/// stretch of the memory belongs. With a balloon each gives back pages of its stretches now and then, touched or not, which are
/// zeros or what is written to them from then on. In the end all is looked at once more.
pub(crate) fn verify(guest: &Guest, memory: &Path, order: Order, balloon: Option<u64>) -> Seen {
    let file = File::open(memory).unwrap();
    let sum =
        |a: Seen, b: Seen| Seen { pages: a.pages + b.pages, data: a.data + b.data, removed: a.removed + b.removed };
    std::thread::scope(|scope| {
        let threads = [0, 1].map(|mine| {
            let file = &file;
            scope.spawn(move || verify_stretches(guest, file, mine, order, balloon))
        });
        threads.into_iter().map(|thread| thread.join().unwrap()).fold(Seen::default(), sum)
    })
}

/// Pages that belong to one thread in a row.
const STRETCH: usize = 300;

fn verify_stretches(guest: &Guest, file: &File, mine: usize, order: Order, balloon: Option<u64>) -> Seen {
    let nr_pages = guest.nr_pages();
    let mut eyes = Eyes::new(guest, file);
    let mut shows = vec![Shows::File; nr_pages];
    let mut seen = Seen::default();
    let mut random = Random::new(balloon.unwrap_or(0) ^ ((mine as u64) << 32));
    let is_mine = |page: usize| page / STRETCH % 2 == mine;
    // A step that has no factor in common with any number of pages a test has.
    let place = |n: usize| match order {
        Order::Up => n,
        Order::Down => nr_pages - 1 - n,
        Order::Scattered => (n * 1_000_003 + 7) % nr_pages,
    };
    for page in (0..nr_pages).map(place).filter(|&page| is_mine(page)) {
        seen.data += usize::from(eyes.check(page, shows[page]));
        seen.pages += 1;
        let first = random.below(nr_pages);
        if balloon.is_none() || random.below(64) != 0 || !is_mine(first) {
            continue;
        }
        // What is given back lies in one stretch and in one region.
        let most = (first + 1 + random.below(STRETCH / 4)).min(nr_pages);
        let end = (first + 1..most).find(|&page| !is_mine(page) || guest.find(page).1 == 0).unwrap_or(most);
        let (region, n) = guest.find(first);
        region.remove(n, end - first);
        shows[first..end].fill(Shows::Zeros);
        seen.removed += end - first;
        if random.below(2) == 0 {
            region.write(n, first as u64 + 1);
            shows[first] = Shows::Written;
        }
        eyes.check(end - 1, shows[end - 1]);
    }
    for page in (0..nr_pages).filter(|&page| is_mine(page)) {
        eyes.check(page, shows[page]);
    }
    seen
}

/// Looks at pages.
struct Eyes<'a> {
    guest: &'a Guest,
    file: &'a File,
    wanted: Vec<u8>,
    zeros: Vec<u8>,
}

impl<'a> Eyes<'a> {
    fn new(guest: &'a Guest, file: &'a File) -> Eyes<'a> {
        let page = guest.regions[0].page;
        Eyes { guest, file, wanted: vec![0; page], zeros: vec![0; page] }
    }

    /// Fails unless a page shows what it must; answers whether that is data of the file.
    fn check(&mut self, page: usize, shows: Shows) -> bool {
        let (region, n) = self.guest.find(page);
        match shows {
            Shows::File => {
                self.file.read_exact_at(&mut self.wanted, (region.offset + n * region.page) as u64).unwrap();
            }
            Shows::Zeros | Shows::Written => self.wanted.copy_from_slice(&self.zeros),
        }
        if shows == Shows::Written {
            self.wanted[..8].copy_from_slice(&(page as u64 + 1).to_ne_bytes());
        }
        let (found, wanted) = (region.page(n), &self.wanted);
        // The hash of zeros says no more than that they are zeros.
        let is_zeros = *wanted == self.zeros;
        let is_right = if is_zeros { found == wanted } else { digest(found) == digest(wanted) };
        assert!(is_right, "page {page} shows {:x?}, not {:x?}", &found[..16], &wanted[..16]);
        !is_zeros
    }
}

/// What a touch of a page comes to, for those that may be refused: right bytes, or SIGBUS at its address.
pub(crate) fn right_or_sigbus(guest: &Guest, file: &File, page: usize) -> bool {
    let (region, n) = guest.find(page);
    let addr = region.base + n * region.page;
    match touch::read(addr as *const u8) {
        Ok(_) => {
            Eyes::new(guest, file).check(page, Shows::File);
            true
        }
        Err(refused) => {
            assert!(refused.is_sigbus_at(addr), "page {page}: {refused:?}");
            false
        }
    }
}
