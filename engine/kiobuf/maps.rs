//! Is memory there and readable? Asked of the kernel's table, which knows without touching a page.

use std::io;
use std::ops::Range;

use crate::error::{Error, Result};
use crate::page::{page_floor, page_size};
use crate::process::maps::{Vma, open_own};

/// Checks that every page of `len` bytes at `addr` is mapped and readable at this moment.
pub(super) fn check_readable(addr: usize, len: usize) -> Result<()> {
    let overflow = Error::Overflow { what: "a range of memory", base: addr as u64, len: len as u64 };
    let Some(end) = addr.checked_add(len).and_then(|end| end.checked_next_multiple_of(page_size())) else {
        return Err(overflow);
    };
    let maps = open_own().map_err(Error::io("open of /proc/thread-self/maps"))?;
    let missing = first_unreadable(maps.vmas(), page_floor(addr)..end);
    match missing.map_err(Error::io("read of /proc/thread-self/maps"))? {
        None => Ok(()),
        Some(page) => Err(Error::Fault { what: "the memory", at: page.max(addr) as u64 }),
    }
}

/// Returns the first address of `range` that none of the mappings holds readable.
fn first_unreadable(vmas: impl Iterator<Item = io::Result<Vma>>, range: Range<usize>) -> io::Result<Option<usize>> {
    let mut wanted = range.start;
    for vma in vmas {
        if wanted >= range.end {
            break;
        }
        let vma = vma?;
        if vma.range.end <= wanted {
            continue;
        }
        if vma.range.start > wanted || !vma.readable {
            break;
        }
        wanted = vma.range.end;
    }
    Ok((wanted < range.end).then_some(wanted))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::maps::vmas;

    const MAPS: &[u8] = b"1000-3000 r--p 00000000 08:01 1   /a \xff file\n\
        3000-4000 rw-p 00000000 00:00 0\n\
        5000-6000 ---p 00000000 00:00 0\n\
        6000-8000 r-xp 00000000 00:00 0   [x]\n";

    /// T104: the first address that can't be read is named, whether unmapped or without access.
    #[test]
    fn gaps_and_unreadable_areas_are_found() {
        for (range, missing) in [
            (0x1000..0x4000, None),
            (0x2000..0x3000, None),
            (0x6000..0x8000, None),
            (0x0..0x2000, Some(0x0)),
            (0x2000..0x5000, Some(0x4000)),
            (0x4000..0x7000, Some(0x4000)),
            (0x5000..0x7000, Some(0x5000)),
            (0x7000..0x9000, Some(0x8000)),
            (0x9000..0xa000, Some(0x9000)),
        ] {
            assert_eq!(first_unreadable(vmas(MAPS), range.clone()).unwrap(), missing, "{range:x?}");
        }
    }

    #[test]
    fn a_line_that_is_no_area_is_an_error_not_a_pass() {
        assert!(first_unreadable(vmas(&b"what\n"[..]), 0..0x1000).is_err());
    }

    #[test]
    fn ranges_that_wrap_are_refused() {
        for (addr, len) in [(usize::MAX, 2), (1, usize::MAX), (usize::MAX - 10, 5)] {
            assert!(matches!(check_readable(addr, len), Err(Error::Overflow { .. })), "{addr:#x}+{len:#x}");
        }
    }
}
