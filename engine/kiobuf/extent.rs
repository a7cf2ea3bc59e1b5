//! An extent: a run of pages of one kind. Pure arithmetic on byte positions; nothing in here reads a page.

use std::ops::Range;
use std::sync::Arc;

use memmap2::Mmap;

use super::file::PagedFile;
use super::memfd::Memfd;
use super::memory::Memory;
use crate::error::{Error, Result};
use crate::page::{page_size, pages_for};
use crate::source::{GRANULE_MAX_BYTES, PageSource};

/// Says where the pages of an extent come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ExtentKind {
    /// Memory of the process that built the list.
    Memory,
    /// A file, or a file that is mapped into memory.
    File,
    /// A memfd or another file of tmpfs, whose pages a vmap may show themselves.
    Memfd,
    /// A [`PageSource`].
    Source,
    /// Pages of zeros.
    Zero,
    /// Nothing: a touch is a SIGBUS.
    Hole,
}

/// Describes one extent of a page list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExtentInfo {
    /// Where its pages come from.
    pub kind: ExtentKind,
    /// The page of the list that it begins with.
    pub first_page: u64,
    /// The pages that it holds, at least one.
    pub nr_pages: u64,
}

/// What holds the data of an extent. The byte named by the base is the first byte of `Extent::valid`.
#[derive(Clone)]
pub(super) enum Base {
    Memory(Memory),
    /// A file in memory: reading it may block, and fails where the file was truncated.
    Mmap {
        map: Arc<Mmap>,
        at: usize,
    },
    File {
        file: Arc<PagedFile>,
        at: u64,
    },
    Memfd(Memfd),
    Source(SourcePart),
    Zero,
    Hole,
}

/// A part of a page source, with what the source said of itself when the list was made.
#[derive(Clone)]
pub(super) struct SourcePart {
    pub(super) source: Arc<dyn PageSource>,
    /// The byte of the source at which the data begins, a multiple of the page size.
    pub(super) at: u64,
    /// A power of two, and a multiple of the page size.
    pub(super) granule_bytes: u64,
    pub(super) may_block: bool,
}

impl SourcePart {
    /// Takes `len_bytes` bytes of a source from its start on.
    pub(super) fn new(source: Arc<dyn PageSource>, len_bytes: u64) -> Result<SourcePart> {
        if let Some(at) = source.len_bytes().filter(|&held| held < len_bytes) {
            return Err(Error::Fault { what: "the page source", at });
        }
        let granule = source.granule_bytes();
        if !granule.is_power_of_two() || !(page_size()..=GRANULE_MAX_BYTES).contains(&granule) {
            return Err(Error::Invalid {
                what: "the page source's granule in bytes",
                value: granule as u64,
                rule: "it must be a power of two, at least the page size and at most 4 MiB",
            });
        }
        let may_block = source.may_block();
        Ok(SourcePart { source, at: 0, granule_bytes: granule as u64, may_block })
    }
}

/// A run of pages of one kind.
#[derive(Clone)]
pub(super) struct Extent {
    /// The page of the list that it begins with.
    pub(super) first_page: u64,
    /// Its pages: at least one, and `nr_pages * page_size` fits in an `i64`.
    pub(super) nr_pages: u64,
    /// The bytes that hold data, counted from the extent's first byte; what lies outside is slack and reads as zero.
    pub(super) valid: Range<u64>,
    /// Where the data is.
    pub(super) base: Base,
}

impl Base {
    /// Returns the same pages without the first `bytes` of their data.
    fn skip(&self, bytes: u64) -> Base {
        match self {
            // What is in memory is as long as an address can say.
            Base::Memory(memory) => Base::Memory(memory.skip(bytes as usize)),
            Base::Mmap { map, at } => Base::Mmap { map: Arc::clone(map), at: at + bytes as usize },
            Base::File { file, at } => Base::File { file: Arc::clone(file), at: at + bytes },
            Base::Memfd(memfd) => Base::Memfd(memfd.skip(bytes)),
            Base::Source(part) => Base::Source(SourcePart { at: part.at + bytes, ..part.clone() }),
            Base::Zero => Base::Zero,
            Base::Hole => Base::Hole,
        }
    }
}

impl Extent {
    /// Builds the extent of `len` bytes of data that begin `head` bytes into its first page.
    pub(super) fn of_bytes(base: Base, head: u64, len: u64) -> Result<Self> {
        if len == 0 {
            return Err(Error::Invalid {
                what: "the length in bytes",
                value: 0,
                rule: "a page list maps at least one byte",
            });
        }
        let overflow = Error::Overflow { what: "a part of a page list", base: head, len };
        let Some((end, nr_pages)) = head.checked_add(len).and_then(|end| Some((end, pages_for(end)?))) else {
            return Err(overflow);
        };
        add_pages(0, nr_pages).map_err(|_| overflow)?;
        Ok(Self { first_page: 0, nr_pages, valid: head..end, base })
    }

    /// Builds an extent of whole pages of zeros.
    pub(super) fn zeros(nr_pages: u64) -> Result<Self> {
        let end = check_pages(nr_pages)?;
        Ok(Self { first_page: 0, nr_pages, valid: 0..end, base: Base::Zero })
    }

    /// Builds an extent of pages that are not there.
    pub(super) fn hole(nr_pages: u64) -> Result<Self> {
        check_pages(nr_pages)?;
        Ok(Self { first_page: 0, nr_pages, valid: 0..0, base: Base::Hole })
    }

    /// Returns the extent that holds some of its pages, named as pages of the list, and nothing of the others.
    ///
    /// Every page of an extent holds data, unless it is a hole: so does every part.
    pub(super) fn part(&self, pages: Range<u64>) -> Extent {
        debug_assert!(pages.start < pages.end && self.first_page <= pages.start && pages.end <= self.pages().end);
        let page = page_size() as u64;
        let (start, end) = ((pages.start - self.first_page) * page, (pages.end - self.first_page) * page);
        let (data_start, data_end) = (self.valid.start.clamp(start, end), self.valid.end.clamp(start, end));
        Extent {
            first_page: pages.start,
            nr_pages: pages.end - pages.start,
            valid: data_start - start..data_end - start,
            base: self.base.skip(data_start.saturating_sub(self.valid.start)),
        }
    }

    /// Returns the description that users see.
    pub(super) fn info(&self) -> ExtentInfo {
        let kind = match self.base {
            Base::Memory(_) => ExtentKind::Memory,
            Base::Mmap { .. } | Base::File { .. } => ExtentKind::File,
            Base::Memfd(_) => ExtentKind::Memfd,
            Base::Source { .. } => ExtentKind::Source,
            Base::Zero => ExtentKind::Zero,
            Base::Hole => ExtentKind::Hole,
        };
        ExtentInfo { kind, first_page: self.first_page, nr_pages: self.nr_pages }
    }

    /// Returns the pages of the list that it holds.
    #[inline]
    pub(super) fn pages(&self) -> Range<u64> {
        self.first_page..self.first_page + self.nr_pages
    }

    /// Returns the bytes of data that it holds.
    pub(super) fn data_len(&self) -> u64 {
        self.valid.end - self.valid.start
    }

    /// Returns the pages of the list that hold data from their first byte to their last.
    #[inline]
    pub(super) fn whole_pages(&self) -> Range<u64> {
        let page = page_size() as u64;
        let (start, end) = (self.valid.start.div_ceil(page), self.valid.end / page);
        self.first_page + start..self.first_page + end.max(start)
    }

    /// Returns the position within the data at which a whole page begins.
    #[inline]
    pub(super) fn data_position(&self, whole_page: u64) -> u64 {
        debug_assert!(self.whole_pages().contains(&whole_page));
        (whole_page - self.first_page) * page_size() as u64 - self.valid.start
    }

    /// Returns the pages that are best read together with a page of it, that page among them.
    pub(super) fn unit_of(&self, pgoff: u64) -> Range<u64> {
        let Base::Source(part) = &self.base else { return pgoff..pgoff + 1 };
        let page = page_size() as u64;
        // A source's data begins with the extent's first page.
        let (granule, first) = (part.granule_bytes / page, part.at / page);
        let start = (first + (pgoff - self.first_page)) / granule * granule;
        let pages = self.pages();
        let (start, end) = (start.saturating_sub(first), start + granule - first);
        self.first_page + start..(self.first_page + end).min(pages.end)
    }

    /// Zeroes the slack in `buf`, which is to hold the pages from `first` on; returns what is left to fill and the
    /// position within the data at which that begins.
    pub(super) fn zero_slack<'b>(&self, first: u64, buf: &'b mut [u8]) -> (u64, &'b mut [u8]) {
        let start = (first - self.first_page) * page_size() as u64;
        let end = start + buf.len() as u64;
        let data_start = self.valid.start.clamp(start, end);
        let data_end = self.valid.end.clamp(data_start, end);
        let (buf, tail) = buf.split_at_mut((data_end - start) as usize);
        let (head, data) = buf.split_at_mut((data_start - start) as usize);
        head.fill(0);
        tail.fill(0);
        (data_start.saturating_sub(self.valid.start), data)
    }
}

/// Refuses extents of no pages or of too many; returns their length in bytes.
fn check_pages(nr_pages: u64) -> Result<u64> {
    if nr_pages == 0 {
        return Err(Error::Invalid {
            what: "the number of pages",
            value: 0,
            rule: "a page list maps at least one page",
        });
    }
    Ok(add_pages(0, nr_pages)? * page_size() as u64)
}

/// Adds numbers of pages. The sum in bytes fits in an `i64`, as the size of the file behind a list must.
pub(super) fn add_pages(base: u64, len: u64) -> Result<u64> {
    let limit = i64::MAX as u64 / page_size() as u64;
    base.checked_add(len).filter(|&sum| sum <= limit).ok_or(Error::Overflow {
        what: "the page list (in pages; its bytes must fit in 63 bits)",
        base,
        len,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(head: u64, len: u64) -> Extent {
        Extent::of_bytes(Base::Zero, head, len).unwrap()
    }

    #[test]
    fn pages_are_rounded_out_and_whole_pages_rounded_in() {
        let page = page_size() as u64;
        for (head, len, nr_pages, whole) in [
            (0, 1, 1, 0..0),
            (0, page, 1, 0..1),
            (0, page + 1, 2, 0..1),
            (1, page, 2, 1..1),
            (1, 2 * page, 3, 1..2),
            (page - 1, 2, 2, 1..1),
            (page - 1, page + 1, 2, 1..2),
            (page - 1, page + 2, 3, 1..2),
        ] {
            let extent = extent(head, len);
            assert_eq!((extent.nr_pages, extent.whole_pages()), (nr_pages, whole), "{head}+{len}");
            assert_eq!(extent.data_len(), len);
            assert!(extent.valid.end <= extent.nr_pages * page);
        }
    }

    /// T103: the list's bytes must fit in 63 bits, whatever the parts.
    #[test]
    fn sums_that_wrap_are_refused() {
        let page = page_size() as u64;
        let limit = i64::MAX as u64 / page;
        assert!(Extent::zeros(limit).is_ok());
        for refused in [limit + 1, u64::MAX / page, u64::MAX] {
            assert!(matches!(Extent::zeros(refused), Err(Error::Overflow { .. })), "{refused}");
            assert!(matches!(Extent::hole(refused), Err(Error::Overflow { .. })), "{refused}");
        }
        for (head, len) in [(1, u64::MAX), (0, u64::MAX), (0, i64::MAX as u64 + 1), (page, limit * page)] {
            assert!(matches!(Extent::of_bytes(Base::Zero, head, len), Err(Error::Overflow { .. })), "{head}+{len}");
        }
        assert!(matches!(add_pages(limit, 1), Err(Error::Overflow { .. })));
        assert!(matches!(add_pages(u64::MAX, u64::MAX), Err(Error::Overflow { .. })));
    }

    #[test]
    fn slack_is_zeroed_and_the_rest_left_to_fill() {
        let page = page_size();
        let extent = Extent { first_page: 7, ..extent(100, page as u64) };
        for (first, pages, position, start, len) in
            [(7, 1, 0, 100, page - 100), (8, 1, page as u64 - 100, 0, 100), (7, 2, 0, 100, page)]
        {
            let mut buf = vec![0xaa; pages * page];
            let (at, data) = extent.zero_slack(first, &mut buf);
            assert_eq!((at, data.len()), (position, len));
            data.fill(1);
            let expected: Vec<u8> = (0..pages * page).map(|at| u8::from((start..start + len).contains(&at))).collect();
            assert_eq!(buf, expected, "pages {first}+{pages}");
        }
    }
}
