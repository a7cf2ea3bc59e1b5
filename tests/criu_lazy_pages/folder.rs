//! Folders with images as CRIU writes them, right and wrong, and memory for the tasks that they are of.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use kiomap::page_size;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use prost::Message;

use crate::images::{IN_PARENT, LAZY, MAGIC, MM_MAGIC, PAGEMAP_MAGIC, PRESENT, PSTREE_MAGIC};
use crate::images::{MmEntry, PagemapEntry, PagemapHead, PstreeEntry, VmaEntry};

/// What CRIU leaves to the daemon.
pub(crate) const SERVED: u32 = LAZY | PRESENT;

/// Addresses of this process that nothing else takes, and whose tasks have memory there.
pub(crate) struct Memory {
    base: usize,
}

impl Memory {
    pub(crate) fn reserve(nr_pages: usize) -> Memory {
        let len = std::num::NonZero::new(nr_pages * page_size()).unwrap();
        // SAFETY: a new mapping, at addresses that the kernel chooses.
        let base = unsafe { mmap_anonymous(None, len, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE) }.unwrap();
        Memory { base: base.addr().get() }
    }

    /// The addresses of pages.
    pub(crate) fn at(&self, pages: Range<usize>) -> Range<usize> {
        self.base + pages.start * page_size()..self.base + pages.end * page_size()
    }
}

/// The words of a page of a task, none of them zero: each seed and address has its own.
pub(crate) fn words(seed: u64, addr: usize) -> impl Iterator<Item = u64> {
    (0..page_size() as u64 / 8).map(move |n| {
        let mixed = (addr as u64 + 8 * n) ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mixed.wrapping_mul(0xd6e8_feb8_6659_fd93) | 1
    })
}

/// A task to write an image of: where its mappings are, and its runs of pages with their flags.
#[derive(Clone)]
pub(crate) struct TaskFiles {
    pub(crate) pid: u32,
    pub(crate) seed: u64,
    pub(crate) vmas: Vec<Range<usize>>,
    pub(crate) runs: Vec<(Range<usize>, u32)>,
}

impl TaskFiles {
    /// A task with one mapping, all of which is lazy.
    pub(crate) fn lazy(pid: u32, seed: u64, addrs: Range<usize>) -> TaskFiles {
        TaskFiles { pid, seed, vmas: vec![addrs.clone()], runs: vec![(addrs, SERVED)] }
    }

    /// Writes its images; the pages file has the number of the pid.
    pub(crate) fn write(&self, folder: &Path) {
        let entries: Vec<_> = self.runs.iter().map(|(addrs, flags)| entry(addrs, *flags)).collect();
        write_pagemap(folder, self.pid, Some(self.pid), &entries);
        write_vmas(folder, self.pid, &self.vmas);
        let present = self.runs.iter().filter(|(_, flags)| flags & PRESENT != 0);
        let pages = present.flat_map(|(addrs, _)| addrs.clone().step_by(page_size()));
        let bytes: Vec<u8> = pages.flat_map(|addr| words(self.seed, addr)).flat_map(u64::to_ne_bytes).collect();
        fs::write(pages_path(folder, self.pid), bytes).unwrap();
    }
}

pub(crate) fn pages_path(folder: &Path, pid: u32) -> PathBuf {
    folder.join(format!("pages-{pid}.img"))
}

/// An entry as CRIU writes one today.
pub(crate) fn entry(addrs: &Range<usize>, flags: u32) -> PagemapEntry {
    let nr_pages = (addrs.len() / page_size()) as u64;
    PagemapEntry {
        vaddr: Some(addrs.start as u64),
        compat_nr_pages: Some(0),
        in_parent: (flags & IN_PARENT != 0).then_some(true),
        flags: Some(flags),
        nr_pages: Some(nr_pages),
    }
}

pub(crate) fn write_pagemap(folder: &Path, pid: u32, pages_id: Option<u32>, entries: &[PagemapEntry]) {
    let mut records = vec![PagemapHead { pages_id }.encode_to_vec()];
    records.extend(entries.iter().map(Message::encode_to_vec));
    fs::write(folder.join(format!("pagemap-{pid}.img")), image(PAGEMAP_MAGIC, &records)).unwrap();
}

pub(crate) fn write_vmas(folder: &Path, pid: u32, vmas: &[Range<usize>]) {
    let vma = |addrs: &Range<usize>| VmaEntry { start: Some(addrs.start as u64), end: Some(addrs.end as u64) };
    let mm = MmEntry { vmas: vmas.iter().map(vma).collect() };
    fs::write(folder.join(format!("mm-{pid}.img")), image(MM_MAGIC, &[mm.encode_to_vec()])).unwrap();
}

/// Writes the tree of some tasks.
pub(crate) fn write_tree(folder: &Path, pids: &[u32]) {
    let task = |pid: &u32| PstreeEntry {
        pid: Some(*pid),
        ppid: Some(1),
        pgid: Some(*pid),
        sid: Some(*pid),
        threads: vec![*pid],
    };
    let records: Vec<_> = pids.iter().map(|pid| task(pid).encode_to_vec()).collect();
    fs::write(folder.join("pstree.img"), image(PSTREE_MAGIC, &records)).unwrap();
}

/// The bytes of an image file.
pub(crate) fn image(magic: u32, records: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = [MAGIC, magic].map(u32::to_le_bytes).concat();
    for record in records {
        bytes.extend((record.len() as u32).to_le_bytes());
        bytes.extend(record);
    }
    bytes
}

/// A folder with the images of some tasks.
pub(crate) fn folder_of(tasks: &[TaskFiles]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_tree(folder.path(), &tasks.iter().map(|task| task.pid).collect::<Vec<_>>());
    for task in tasks {
        task.write(folder.path());
    }
    folder
}
