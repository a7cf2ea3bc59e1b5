//! What is mapped where, as the kernel tells it in `/proc/PID/maps`: it knows without touching a page.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::ledger::Private;

/// The kernel's table of a process, to be read once.
pub(crate) struct Maps(Private<File>);

/// Opens the table of this process. Not by way of `self`: that is the first thread, which may have ended before the
/// process.
pub(crate) fn open_own() -> io::Result<Maps> {
    Private::open(|| File::open("/proc/thread-self/maps")).map(Maps)
}

/// Opens the table of this process with details, for which the kernel looks at every page up to what is asked for.
pub(crate) fn open_own_details() -> io::Result<Maps> {
    Private::open(|| File::open("/proc/thread-self/smaps")).map(Maps)
}

/// Opens the table of another process.
///
/// # Errors
///
/// Those of opening, and `ESRCH` when no thread of it has one.
pub(crate) fn open(pid: libc::pid_t) -> io::Result<Maps> {
    open_table(pid, "maps")
}

/// As [`open`], with details.
///
/// # Errors
///
/// As [`open`].
pub(crate) fn open_details(pid: libc::pid_t) -> io::Result<Maps> {
    open_table(pid, "smaps")
}

fn open_table(pid: libc::pid_t, table: &str) -> io::Result<Maps> {
    let first = Private::open(|| File::open(format!("/proc/{pid}/{table}")))?;
    if !is_empty(&first) {
        return Ok(Maps(first));
    }
    // Its first thread has ended, and would be taken for a process in which nothing is mapped. Others may live.
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let maps = task?.path().join(table);
        if let Some(maps) = Private::open(|| File::open(maps)).ok().filter(|maps| !is_empty(maps)) {
            return Ok(Maps(maps));
        }
    }
    Err(io::Error::from_raw_os_error(libc::ESRCH))
}

fn is_empty(maps: &File) -> bool {
    // Without moving on, for who reads it afterwards.
    !maps.read_at(&mut [0], 0).is_ok_and(|read| read > 0)
}

impl Maps {
    /// Walks over the mappings, as [`vmas`].
    pub(crate) fn vmas(&self) -> impl Iterator<Item = io::Result<Vma>> {
        vmas(BufReader::new(&*self.0))
    }

    /// Finds the mapping of `addr`, with the neighbours that go on in the same file, as one.
    ///
    /// # Errors
    ///
    /// As [`vmas`].
    pub(crate) fn find(&self, addr: usize) -> io::Result<Option<Vma>> {
        find(self.vmas(), addr)
    }
}

impl Maps {
    /// Walks over the mappings of a table that was opened with details.
    ///
    /// # Errors
    ///
    /// As [`vmas`].
    pub(crate) fn detailed(&self) -> impl Iterator<Item = io::Result<(Vma, Details)>> {
        detailed(BufReader::new(&*self.0))
    }

    /// Finds the mapping of `addr` in a table that was opened with details, without its neighbours.
    ///
    /// # Errors
    ///
    /// As [`vmas`].
    pub(crate) fn find_details(&self, addr: usize) -> io::Result<Option<(Vma, Details)>> {
        let mut from = self.detailed().skip_while(|found| matches!(found, Ok((vma, _)) if vma.range.end <= addr));
        Ok(from.next().transpose()?.filter(|(vma, _)| vma.range.contains(&addr)))
    }
}

/// What the kernel says of a mapping besides (`VmFlags`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Details {
    /// Some userfaultfd is told of its missing pages.
    pub(crate) is_registered: bool,
    /// A forked child does not have it.
    pub(crate) is_not_inherited: bool,
}

/// A mapping: one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Vma {
    pub(crate) range: Range<usize>,
    pub(crate) readable: bool,
    /// No access of any kind (`PROT_NONE`).
    pub(crate) hidden: bool,
    /// The byte of the file at its start.
    pub(crate) offset: u64,
    /// Device and inode of the file; zeros for memory without one.
    pub(crate) file: (libc::dev_t, libc::ino_t),
}

impl Vma {
    /// Tells whether `next` goes on where this one ends, in memory and in the file. The kernel keeps such mappings apart
    /// when their access differs. Hidden ones stay apart: one may be an area's and the next the engine's own.
    fn is_continued_by(&self, next: &Vma) -> bool {
        let len = (self.range.end - self.range.start) as u64;
        self.range.end == next.range.start
            && self.file == next.file
            && self.file != (0, 0)
            && self.offset.checked_add(len) == Some(next.offset)
            && !self.hidden
            && !next.hidden
    }
}

/// Walks over the mappings, which come in ascending order.
///
/// # Errors
///
/// Those of reading, and `EPROTO` for a line that is none.
pub(crate) fn vmas(maps: impl BufRead) -> impl Iterator<Item = io::Result<Vma>> {
    maps.split(b'\n').map(|line| parse(&line?).ok_or_else(|| io::Error::from_raw_os_error(libc::EPROTO)))
}

/// Walks over mappings with details: each is a line as in [`vmas`], and lines of what is said of it, `VmFlags` among them.
fn detailed(maps: impl BufRead) -> impl Iterator<Item = io::Result<(Vma, Details)>> {
    let mut last = None;
    maps.split(b'\n').filter_map(move |line| {
        let line = match line {
            Ok(line) => line,
            Err(error) => return Some(Err(error)),
        };
        match line.strip_prefix(b"VmFlags:") {
            Some(flags) => {
                let has = |flag: &[u8]| flags.split(|&byte| byte == b' ').any(|word| word == flag);
                let details = Details { is_registered: has(b"um"), is_not_inherited: has(b"dc") };
                last.take().map(|vma| Ok((vma, details)))
            }
            // What is said of a mapping begins with a capital letter, a mapping with a digit or a small one.
            None if line.first().is_some_and(u8::is_ascii_uppercase) => None,
            None => {
                last = parse(&line);
                last.is_none().then(|| Err(io::Error::from_raw_os_error(libc::EPROTO)))
            }
        }
    })
}

fn find(vmas: impl Iterator<Item = io::Result<Vma>>, addr: usize) -> io::Result<Option<Vma>> {
    let mut found: Option<Vma> = None;
    for vma in vmas {
        let vma = vma?;
        match &mut found {
            Some(found) if found.is_continued_by(&vma) => found.range.end = vma.range.end,
            _ if vma.range.start > addr => break,
            _ => found = Some(vma),
        }
    }
    Ok(found.filter(|found| found.range.contains(&addr)))
}

/// Parses `start-end rwxp offset major:minor inode …`.
fn parse(line: &[u8]) -> Option<Vma> {
    // The name is at the end, and may be anything.
    let mut words = line.splitn(6, |&byte| byte == b' ').map(|word| std::str::from_utf8(word).ok());
    let mut word = || words.next().flatten();
    let (start, end) = word()?.split_once('-')?;
    let access = word()?;
    let offset = u64::from_str_radix(word()?, 16).ok()?;
    let (major, minor) = word()?.split_once(':')?;
    let device = libc::makedev(u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
    Some(Vma {
        range: usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?,
        readable: access.starts_with('r'),
        hidden: access.starts_with("---"),
        offset,
        file: (device, word()?.parse().ok()?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &[u8] = b"1000-3000 r--p 00000000 08:01 1   /a \xff file\n\
        3000-4000 rw-p 00000000 00:00 0\n\
        5000-6000 rw-s 00002000 00:01 77    /memfd:x (deleted)\n\
        6000-8000 r--s 00003000 00:01 77    /memfd:x (deleted)\n\
        8000-9000 ---s 00005000 00:01 77    /memfd:x (deleted)\n\
        9000-a000 rw-s 00009000 00:01 77    /memfd:x (deleted)\n\
        a000-b000 rw-p 00000000 00:00 0\n\
        b000-c000 rw-p 00000000 00:00 0     [x]\n";

    fn found(addr: usize) -> Option<(Range<usize>, u64)> {
        find(vmas(MAPS), addr).unwrap().map(|vma| (vma.range, vma.offset))
    }

    #[test]
    fn every_field_of_a_line_is_read() {
        let first = vmas(MAPS).next().unwrap().unwrap();
        let file = (libc::makedev(8, 1), 1);
        assert_eq!(first, Vma { range: 0x1000..0x3000, readable: true, hidden: false, offset: 0, file });
        assert_eq!(vmas(MAPS).filter(|vma| vma.as_ref().unwrap().hidden).count(), 1);
        assert_eq!(vmas(MAPS).count(), 8);
    }

    /// The kernel splits a mapping where its access changes; it is one still, except where there is no access at all.
    #[test]
    fn mappings_that_go_on_in_the_same_file_are_found_as_one() {
        for addr in [0x5000, 0x5fff, 0x6000, 0x7fff] {
            assert_eq!(found(addr), Some((0x5000..0x8000, 0x2000)), "{addr:#x}");
        }
        assert_eq!(found(0x8000), Some((0x8000..0x9000, 0x5000)));
        assert_eq!(found(0x9000), Some((0x9000..0xa000, 0x9000)));
    }

    #[test]
    fn an_address_without_a_mapping_is_not_found() {
        for addr in [0, 0xfff, 0x4000, 0x4fff, 0xc000, usize::MAX] {
            assert_eq!(found(addr), None, "{addr:#x}");
        }
        assert_eq!(found(0xa000), Some((0xa000..0xb000, 0)));
    }

    #[test]
    fn what_is_registered_and_not_inherited_is_told_of_each_mapping() {
        let maps = b"1000-3000 rw-s 00000000 00:01 77    /memfd:x (deleted)\n\
            Size:                  8 kB\nVmFlags: rd wr sh mr mw me ms dc um \n\
            3000-4000 rw-s 00002000 00:01 77    /memfd:x (deleted)\n\
            Pss_Dirty:             0 kB\nVmFlags: rd wr sh mr mw me ms\n";
        let found: Vec<_> = detailed(&maps[..])
            .map(|found| found.map(|(vma, details)| (vma.range, details)))
            .collect::<io::Result<_>>()
            .unwrap();
        let ours = Details { is_registered: true, is_not_inherited: true };
        assert_eq!(found, [(0x1000..0x3000, ours), (0x3000..0x4000, Details::default())]);
        assert!(detailed(&b"what\n"[..]).next().unwrap().is_err());
        let own = open_own_details().unwrap();
        let (vma, _) = own.find_details(&raw const maps as usize).unwrap().unwrap();
        assert!(vma.readable);
    }

    #[test]
    fn a_line_that_is_no_mapping_is_an_error() {
        for line in [&b"what\n"[..], b"1000-2000\n", b"1000-2000 rw-p 0 00:00 x\n", b"z-2000 rw-p 0 00:00 0\n"] {
            assert!(find(vmas(line), 0x1000).is_err());
        }
    }
}
