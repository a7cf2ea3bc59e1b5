//! Asking the kernel what it has, on descriptors and memory that are thrown away at once.

use std::fs::File;

use memmap2::MmapOptions;
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::open::{DEFAULT_WAYS, Opener};
use super::{Features, Ioctls, OpenAttempt, OpenFailure, OpenWay};
use crate::error::Error;
use crate::page::page_size;

/// Says what this process can have of the running kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The way that opened a userfaultfd.
    pub way: OpenWay,
    /// All features of the kernel; enabling `EVENT_FORK` takes `CAP_SYS_PTRACE` as well.
    pub features: Features,
    /// The ioctls of the descriptor itself; see [`range_ioctls`] for those of memory.
    pub ioctls: Ioctls,
    /// The ways that were tried before and failed.
    pub failed: Vec<OpenAttempt>,
}

/// Asks the kernel by the first way that works: the device, the system call, user mode only.
///
/// # Errors
///
/// When no way works: each attempt with its errno and its remedy.
pub fn probe() -> Result<Probe, OpenFailure> {
    probe_ways(&DEFAULT_WAYS)
}

/// Asks the kernel by one way only.
///
/// # Errors
///
/// When the way does not work: its errno and its remedy.
pub fn probe_way(way: OpenWay) -> Result<Probe, OpenFailure> {
    probe_ways(&[way])
}

fn probe_ways(ways: &[OpenWay]) -> Result<Probe, OpenFailure> {
    let (opened, way, failed) = Opener::new(ways).first(Features::empty())?;
    Ok(Probe { way, features: opened.features, ioctls: opened.ioctls, failed })
}

/// Names a kind of memory that can be registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MemoryKind {
    /// Private anonymous memory.
    Anonymous,
    /// A shared mapping of a memfd.
    Memfd,
    /// A shared mapping of a memfd of 2 MiB pages; none of them needs to be in the pool.
    HugetlbMemfd2M,
}

/// Asks which ioctls memory of a kind answers to when it is registered for missing pages.
///
/// # Errors
///
/// - When no userfaultfd can be opened: each attempt with its errno and its remedy.
/// - The errno of memfd_create(2), ftruncate(2) or mmap(2), as on a kernel without 2 MiB pages.
/// - The errno of the registration; `EINVAL` when memory of this kind can't be registered.
pub fn range_ioctls(kind: MemoryKind) -> Result<Ioctls, Error> {
    let len = match kind {
        MemoryKind::Anonymous | MemoryKind::Memfd => page_size(),
        MemoryKind::HugetlbMemfd2M => 2 << 20,
    };
    // Without a reservation, a huge page is mapped even when the pool is empty; it is never touched.
    let mut options = MmapOptions::new();
    options.len(len).no_reserve_swap();
    let memory = match kind {
        MemoryKind::Anonymous => options.map_anon().map_err(Error::io("mmap of anonymous memory"))?.into(),
        MemoryKind::Memfd => options.map_raw(&memfd(MFdFlags::empty(), len)?).map_err(Error::io("mmap of a memfd"))?,
        MemoryKind::HugetlbMemfd2M => {
            let file = memfd(MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB, len)?;
            options.map_raw(&file).map_err(Error::io("mmap of a memfd of 2 MiB pages"))?
        }
    };
    let (userfault, _) = Opener::new(&DEFAULT_WAYS).open(Features::empty())?;
    userfault.register_missing(memory.as_mut_ptr() as usize, len).map_err(Error::sys("UFFDIO_REGISTER"))
}

/// Makes a memfd of `len` bytes.
fn memfd(kind: MFdFlags, len: usize) -> Result<File, Error> {
    let fd = memfd_create("kiomap-probe", kind | MFdFlags::MFD_CLOEXEC).map_err(Error::sys("memfd_create"))?;
    let file = File::from(fd);
    file.set_len(len as u64).map_err(Error::io("ftruncate of a memfd"))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// T86: the probe takes the first way that works and remembers the ones before it.
    #[test]
    fn the_probe_reports_the_first_way_that_works() {
        let found = probe().expect("some way of opening a userfaultfd works");
        assert_eq!(Some(found.way), DEFAULT_WAYS.into_iter().find(|way| probe_way(*way).is_ok()));
        assert_eq!(
            found.failed.iter().map(|attempt| attempt.way).collect::<Vec<_>>(),
            DEFAULT_WAYS.into_iter().take_while(|way| *way != found.way).collect::<Vec<_>>()
        );
        assert!(found.features.contains(Features::MISSING_SHMEM), "{}", found.features);
        assert!(found.ioctls.contains(Ioctls::API | Ioctls::REGISTER), "{}", found.ioctls);
    }

    /// T87, T91: each kind of memory answers to what it must; huge pages have no zero page.
    #[test]
    fn each_kind_of_memory_names_its_ioctls() {
        let poison = probe().expect("a way").features.contains(Features::POISON);
        for kind in [MemoryKind::Anonymous, MemoryKind::Memfd] {
            let ioctls = range_ioctls(kind).expect("registered");
            assert!(ioctls.contains(Ioctls::COPY | Ioctls::WAKE | Ioctls::ZEROPAGE), "{kind:?}: {ioctls}");
            assert_eq!(ioctls.contains(Ioctls::POISON), poison, "{kind:?}: {ioctls}");
        }
        match range_ioctls(MemoryKind::HugetlbMemfd2M) {
            Ok(ioctls) => {
                assert!(ioctls.contains(Ioctls::COPY | Ioctls::WAKE), "{ioctls}");
                assert!(!ioctls.contains(Ioctls::ZEROPAGE), "{ioctls}");
            }
            Err(error) => eprintln!("skipped in part, because there are no 2 MiB pages: {error}"),
        }
    }
}
