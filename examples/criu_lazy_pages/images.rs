//! The image files of a CRIU checkpoint that tell of memory: their messages, and how they are read and checked.
//!
//! A file is the magic number of all images, that of its kind, and records: a length and a protobuf message. Nothing in it is
//! believed: lengths are held against what the file has left, and every number that is used later is checked here.

use std::fs::{File, OpenOptions};
use std::io::{BufReader, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use kiomap::page_size;
use prost::Message;

/// What every image begins with.
pub(crate) const MAGIC: u32 = 0x5456_4319;
/// The kind of `pstree.img`.
pub(crate) const PSTREE_MAGIC: u32 = 0x5027_3030;
/// The kind of `pagemap-PID.img`.
pub(crate) const PAGEMAP_MAGIC: u32 = 0x5608_4025;
/// The kind of `mm-PID.img`.
pub(crate) const MM_MAGIC: u32 = 0x5749_2820;

/// A pagemap entry's pages are in the parent image.
pub(crate) const IN_PARENT: u32 = 1;
/// They are not restored by CRIU itself.
pub(crate) const LAZY: u32 = 2;
/// They are in the pages file.
pub(crate) const PRESENT: u32 = 4;

/// Of one record: far more than the mappings of any process take.
const RECORD_MAX_BYTES: u32 = 32 << 20;

/// A task of the process tree.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct PstreeEntry {
    #[prost(uint32, optional, tag = "1")]
    pub(crate) pid: Option<u32>,
    #[prost(uint32, optional, tag = "2")]
    pub(crate) ppid: Option<u32>,
    #[prost(uint32, optional, tag = "3")]
    pub(crate) pgid: Option<u32>,
    #[prost(uint32, optional, tag = "4")]
    pub(crate) sid: Option<u32>,
    #[prost(uint32, repeated, packed = "false", tag = "5")]
    pub(crate) threads: Vec<u32>,
}

/// What a pagemap begins with: the number in the name of its pages file.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct PagemapHead {
    #[prost(uint32, optional, tag = "1")]
    pub(crate) pages_id: Option<u32>,
}

/// A run of pages.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct PagemapEntry {
    #[prost(uint64, optional, tag = "1")]
    pub(crate) vaddr: Option<u64>,
    #[prost(uint32, optional, tag = "2")]
    pub(crate) compat_nr_pages: Option<u32>,
    #[prost(bool, optional, tag = "3")]
    pub(crate) in_parent: Option<bool>,
    #[prost(uint32, optional, tag = "4")]
    pub(crate) flags: Option<u32>,
    #[prost(uint64, optional, tag = "5")]
    pub(crate) nr_pages: Option<u64>,
}

/// An address space; of it, the mappings.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct MmEntry {
    #[prost(message, repeated, tag = "14")]
    pub(crate) vmas: Vec<VmaEntry>,
}

/// A mapping.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct VmaEntry {
    #[prost(uint64, optional, tag = "1")]
    pub(crate) start: Option<u64>,
    #[prost(uint64, optional, tag = "2")]
    pub(crate) end: Option<u64>,
}

/// A checked run of pages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Run {
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// [`IN_PARENT`], [`LAZY`], [`PRESENT`].
    pub(crate) flags: u32,
    /// The page of the pages file with which it begins, if it is [`PRESENT`].
    pub(crate) first_page: u64,
}

/// A checked pagemap: runs that lie one after another, and the pages that its file must have.
pub(crate) struct Pagemap {
    pub(crate) pages_id: u32,
    pub(crate) runs: Vec<Run>,
    pub(crate) nr_pages: u64,
}

/// An image that is read record by record.
struct Records {
    path: PathBuf,
    reader: BufReader<File>,
    left_bytes: u64,
    read: u64,
}

impl Records {
    fn open(path: PathBuf, magic: u32) -> Result<Records> {
        let (file, len_bytes) = open_file(&path)?;
        let mut records = Records { path, reader: BufReader::new(file), left_bytes: len_bytes, read: 0 };
        for (what, expected) in [("all images", MAGIC), ("its kind", magic)] {
            let found = records.word().with_context(|| format!("{}: reading its head", records.path.display()))?;
            ensure!(
                found == expected,
                "{}: the magic number of {what} is {expected:#x}, and here it is {found:#x}",
                records.path.display()
            );
        }
        Ok(records)
    }

    fn word(&mut self) -> Result<u32> {
        ensure!(self.left_bytes >= 4, "it ends {} bytes into a number", self.left_bytes);
        let mut bytes = [0; 4];
        self.reader.read_exact(&mut bytes)?;
        self.left_bytes -= 4;
        Ok(u32::from_le_bytes(bytes))
    }

    /// The next record; `None` at the end of the file.
    fn next<M: Message + Default>(&mut self) -> Result<Option<M>> {
        if self.left_bytes == 0 {
            return Ok(None);
        }
        let record = self.message().with_context(|| self.place())?;
        self.read += 1;
        Ok(Some(record))
    }

    fn message<M: Message + Default>(&mut self) -> Result<M> {
        let len_bytes = self.word()?;
        let left_bytes = self.left_bytes;
        ensure!(
            u64::from(len_bytes) <= left_bytes,
            "its length is {len_bytes}, and the file has {left_bytes} bytes left"
        );
        ensure!(len_bytes <= RECORD_MAX_BYTES, "its length is {len_bytes}, over {RECORD_MAX_BYTES}");
        let mut bytes = vec![0; len_bytes as usize];
        self.reader.read_exact(&mut bytes)?;
        self.left_bytes -= u64::from(len_bytes);
        M::decode(&bytes[..]).context("it is no message of its kind")
    }

    /// Where an error is: the file, and the record that is read, or was read last.
    fn place(&self) -> String {
        format!("{}: record {}", self.path.display(), self.read)
    }

    /// Where an error is that was found in the record read last.
    fn last(&self) -> String {
        format!("{}: record {}", self.path.display(), self.read.saturating_sub(1))
    }
}

/// Opens a regular file; answers with its length. What is none is not waited for.
pub(crate) fn open_file(path: &Path) -> Result<(File, u64)> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = file.with_context(|| format!("opening {}", path.display()))?;
    let meta = file.metadata().with_context(|| format!("looking at {}", path.display()))?;
    ensure!(meta.is_file(), "{} is no regular file", path.display());
    Ok((file, meta.len()))
}

/// Reads the pids of a folder's process tree, as the tasks themselves know them.
pub(crate) fn read_pids(folder: &Path) -> Result<Vec<i32>> {
    let mut records = Records::open(folder.join("pstree.img"), PSTREE_MAGIC)?;
    let mut pids = Vec::new();
    while let Some(entry) = records.next::<PstreeEntry>()? {
        let pid = entry.pid.ok_or_else(|| anyhow!("{}: it has no pid", records.last()))?;
        let checked = i32::try_from(pid).ok().filter(|pid| *pid > 0);
        pids.push(checked.ok_or_else(|| anyhow!("{}: pid {pid} is none", records.last()))?);
    }
    ensure!(!pids.is_empty(), "{} has no tasks", records.path.display());
    let mut sorted = pids.clone();
    sorted.sort_unstable();
    if let Some(twice) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        bail!("{}: pid {} is there twice", records.path.display(), twice[0]);
    }
    Ok(pids)
}

/// The path of a task's pagemap.
pub(crate) fn pagemap_path(folder: &Path, pid: i32) -> PathBuf {
    folder.join(format!("pagemap-{pid}.img"))
}

/// Reads the pagemap of a task.
pub(crate) fn read_pagemap(folder: &Path, pid: i32) -> Result<Pagemap> {
    let mut records = Records::open(pagemap_path(folder, pid), PAGEMAP_MAGIC)?;
    let head = records.next::<PagemapHead>()?.ok_or_else(|| anyhow!("{} has no head", records.path.display()))?;
    let pages_id = head.pages_id.ok_or_else(|| anyhow!("{}: it has no pages_id", records.last()))?;
    let mut pagemap = Pagemap { pages_id, runs: Vec::new(), nr_pages: 0 };
    while let Some(entry) = records.next::<PagemapEntry>()? {
        pagemap.push(&entry).with_context(|| records.last())?;
    }
    Ok(pagemap)
}

impl Pagemap {
    /// Checks an entry, and appends it.
    fn push(&mut self, entry: &PagemapEntry) -> Result<()> {
        let start = entry.vaddr.context("it has no vaddr")?;
        let nr_pages = entry.nr_pages.or(entry.compat_nr_pages.map(u64::from)).context("it has no nr_pages")?;
        let end =
            check_range(start, nr_pages.checked_mul(page_size() as u64).and_then(|bytes| start.checked_add(bytes)))
                .with_context(|| format!("vaddr {start:#x}, nr_pages {nr_pages}"))?;
        let after = self.runs.last().map_or(0, |run| run.end);
        ensure!(start >= after, "vaddr {start:#x} is before {after:#x}, where the entry before ends");

        let in_parent = if entry.in_parent.unwrap_or(false) { IN_PARENT } else { 0 };
        // Before there were flags, what was not in the parent was present.
        let flags = entry.flags.unwrap_or(if in_parent == 0 { PRESENT } else { 0 }) | in_parent;
        // They may change what a page of the file is.
        ensure!(flags & !(IN_PARENT | LAZY | PRESENT) == 0, "flags {flags:#x}: some are not known");
        ensure!(
            flags & IN_PARENT == 0 || flags & PRESENT == 0,
            "flags {flags:#x}: pages can't be here and in the parent"
        );
        let first_page = self.nr_pages;
        if flags & PRESENT != 0 {
            // Addresses fit in 64 bits and lie one after another, so their pages are not too many to count.
            self.nr_pages += nr_pages;
        }
        self.runs.push(Run { start, end, flags, first_page });
        Ok(())
    }
}

/// Checks that a range is of whole pages, not empty, and of addresses; answers with its end.
fn check_range(start: u64, end: Option<u64>) -> Result<u64> {
    let page = page_size() as u64;
    let end = end.filter(|end| usize::try_from(*end).is_ok()).context("it goes past the last address")?;
    ensure!(start.is_multiple_of(page) && end.is_multiple_of(page), "it is not of whole pages of {page} bytes");
    ensure!(start < end, "it is empty, or ends before it starts");
    Ok(end)
}

/// Reads the mappings of a task: ranges that lie one after another.
pub(crate) fn read_vmas(folder: &Path, pid: i32) -> Result<Vec<(u64, u64)>> {
    let mut records = Records::open(folder.join(format!("mm-{pid}.img")), MM_MAGIC)?;
    let mm = records.next::<MmEntry>()?.ok_or_else(|| anyhow!("{} has no record", records.path.display()))?;
    let mut vmas = Vec::with_capacity(mm.vmas.len());
    let mut after = 0;
    for (number, vma) in mm.vmas.iter().enumerate() {
        let place = || format!("{}: mapping {number}", records.last());
        let start = vma.start.with_context(|| format!("{} has no start", place()))?;
        let end = check_range(start, vma.end).with_context(|| format!("{}: {start:#x} to {:x?}", place(), vma.end))?;
        ensure!(start >= after, "{}: start {start:#x} is before {after:#x}, where the one before ends", place());
        vmas.push((start, end));
        after = end;
    }
    Ok(vmas)
}
