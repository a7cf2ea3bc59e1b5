//! Page lists as a region shows them: offsets, slack, sources across page-table borders, aliases, strings of lists.

mod support;

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use kiomap::{Arena, AttachOptions, Engine, Error, Kiobuf, Region, page_size};
use nix::errno::Errno;
use support::{alone, assert_sigbus, engine_builder, holes, mark, pages, read_page, touch};

fn attach(engine: &Engine, list: &Kiobuf) -> Region {
    engine.vmap(list).unwrap().attach(&AttachOptions::new()).unwrap()
}

/// All bytes of a region.
fn bytes_of(region: &Region) -> Vec<u8> {
    let mut bytes = vec![0xdd; region.len_bytes()];
    region.read_at(0, &mut bytes).unwrap();
    bytes
}

/// A byte that differs from its neighbours' and from zero.
fn pattern(at: usize) -> u8 {
    (at % 253) as u8 + 1
}

/// Bytes from some offset within a page on: a mapping of the caller's, as a list may borrow it.
struct Shifted(Vec<u8>, usize, usize);

impl Shifted {
    /// `len` bytes of [`pattern`], the first of which lies `head` bytes into a page; all around them is 0xcc.
    fn new(head: usize, len: usize) -> Shifted {
        let mut bytes = vec![0xcc; len + 3 * page_size()];
        let start = (bytes.as_ptr() as usize).next_multiple_of(page_size()) - bytes.as_ptr() as usize + head;
        (0..len).for_each(|at| bytes[start + at] = pattern(at));
        Shifted(bytes, start, len)
    }
}

impl AsRef<[u8]> for Shifted {
    fn as_ref(&self) -> &[u8] {
        &self.0[self.1..][..self.2]
    }
}

/// T15, B26: a list that begins and ends within a page shows zeros before and after, and not what lies there.
#[test]
fn slack_reads_as_zero() {
    alone("slack_reads_as_zero", || {
        let engine = engine_builder().build().unwrap();
        let page = page_size();
        for (head, len) in [(100, 5000), (0, 1), (page - 1, 2), (1, page), (page - 1, 1), (7, 3 * page - 7), (0, page)]
        {
            let mut list = Kiobuf::new();
            list.map_slice(Shifted::new(head, len)).unwrap();
            assert_eq!((list.offset(), list.length()), (head, len as u64));
            let region = attach(&engine, &list);
            assert_eq!(region.len_bytes(), (head + len).next_multiple_of(page));
            for (at, byte) in bytes_of(&region).into_iter().enumerate() {
                let expected = if (head..head + len).contains(&at) { pattern(at - head) } else { 0 };
                assert_eq!(byte, expected, "byte {at} of {len} from {head} on");
            }
        }
    });
}

/// T105, B21: a source that begins and ends anywhere, over the borders of page tables, is shown byte for byte.
#[test]
fn a_source_over_page_table_borders_is_shown_byte_for_byte() {
    alone("a_source_over_page_table_borders_is_shown_byte_for_byte", || {
        let engine = engine_builder().build().unwrap();
        let len = (9 << 20) + 4321;
        for head in [0, 1, 2000] {
            let mut list = Kiobuf::new();
            list.map_slice(Shifted::new(head, len)).unwrap();
            let region = attach(&engine, &list);
            // From the middle to both ends, so that no order of faults is special.
            let bytes = bytes_of(&attach(&engine, &list));
            let last = region.len_bytes() / page_size() - 1;
            for page in (0..=last / 2).rev().flat_map(|page| [page, last - page]) {
                let from = page * page_size();
                let mut shown = vec![0; page_size()];
                region.read_at(from, &mut shown).unwrap();
                assert!(shown == bytes[from..from + page_size()], "page {page}");
            }
            assert!(
                bytes.iter().enumerate().all(|(at, &byte)| {
                    byte == if (head..head + len).contains(&at) { pattern(at - head) } else { 0 }
                })
            );
        }
    });
}

/// T106, B42: one page in two places of a list is copied to both: they read alike, and a write to one is not seen in the
/// other, nor in the source.
#[test]
fn a_page_in_two_places_is_two_pages() {
    alone("a_page_in_two_places_is_two_pages", || {
        let engine = engine_builder().build().unwrap();
        let one = pages(3);
        let list = Kiobuf::concat(&[one.clone(), one.clone(), one.clone()]).unwrap();
        let region = attach(&engine, &list);
        (0..9).for_each(|page| assert_eq!(read_page(&region, page), Ok(mark(page % 3))));
        touch::write(support::in_page(&region, 4), 0x5a).unwrap();
        for page in (0..9).filter(|&page| page != 4) {
            assert_eq!(read_page(&region, page), Ok(mark(page % 3)));
        }
        assert_eq!(read_page(&attach(&engine, &one), 1), Ok(mark(1)));
    });
}

/// T108: three lists on a string, of every kind, have continuous offsets; the pages at their borders are right, slack too.
#[test]
fn strung_lists_are_continuous() {
    needs_sources!();
    alone("strung_lists_are_continuous", || {
        let engine = engine_builder().build().unwrap();
        let (mut bytes, mut zeros, mut filed) = (Kiobuf::new(), Kiobuf::new(), Kiobuf::new());
        bytes.map_bytes(vec![7; 17 * page_size() + 1]).unwrap();
        zeros.map_zero(3).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![9; 20 * page_size()]).unwrap();
        filed.map_file(&file, 10..(19 * page_size() + 5) as u64).unwrap();
        let parts = [bytes, filed, holes(2), zeros, support::source(5, |_, _| Ok(()))];
        let list = Kiobuf::concat(&parts).unwrap();
        assert_eq!(list.nr_pages(), 18 + 19 + 2 + 3 + 5);
        for backwards in [false, true] {
            let region = attach(&engine, &list);
            let byte = |at: usize| touch::read(region.as_ptr().wrapping_add(at));
            let check = |page: usize| {
                let (first, last) = (page * page_size(), (page + 1) * page_size() - 1);
                match page {
                    0..17 | 18..36 => {
                        let part = if page < 17 { 7 } else { 9 };
                        assert_eq!((byte(first), byte(last)), (Ok(part), Ok(part)), "page {page}");
                    }
                    17 => assert_eq!([byte(first), byte(first + 1), byte(last)], [Ok(7), Ok(0), Ok(0)]),
                    36 => assert_eq!([byte(first), byte(last - 5), byte(last - 4)], [Ok(9), Ok(9), Ok(0)]),
                    37 | 38 => assert_sigbus(&region, page as u64),
                    39..42 => assert_eq!((byte(first), byte(last)), (Ok(0), Ok(0))),
                    _ => {
                        assert_eq!((byte(first), byte(last)), (Ok(mark(page as u64 - 42)), Ok(mark(page as u64 - 42))))
                    }
                }
            };
            if backwards {
                (0..47).rev().for_each(check);
            } else {
                (0..47).for_each(check);
            }
        }
    });
}

/// T109, B27: contents are what they were filled with before the first attach, everywhere; never what memory held before.
#[test]
fn contents_are_what_was_filled_in() {
    alone("contents_are_what_was_filled_in", || {
        let engine = engine_builder().build().unwrap();
        let mut arena = Arena::new(100).unwrap();
        arena.fill(0xff);
        let mut list = Kiobuf::new();
        list.map_kernel(arena).unwrap();
        let vmap = engine.vmap(&list).unwrap();
        for _ in 0..2 {
            let region = vmap.attach(&AttachOptions::new()).unwrap();
            assert!(bytes_of(&region).iter().all(|&byte| byte == 0xff));
        }
        let mut zeros = Kiobuf::new();
        zeros.map_zero(100).unwrap();
        assert!(bytes_of(&attach(&engine, &zeros)).iter().all(|&byte| byte == 0));
        list = Kiobuf::new();
        list.map_kernel(Arena::new(100).unwrap()).unwrap();
        assert!(bytes_of(&attach(&engine, &list)).iter().all(|&byte| byte == 0));
    });
}

/// T103, B24, B25: a list that refuses what it is given is as before, and what it held is still shown.
#[test]
fn a_refused_mapping_leaves_the_list_usable() {
    alone("a_refused_mapping_leaves_the_list_usable", || {
        let engine = engine_builder().build().unwrap();
        let mut list = Kiobuf::new();
        assert_eq!(list.map_bytes(Vec::new()).unwrap_err().errno(), Errno::EINVAL);
        assert_eq!(list.map_zero(0).unwrap_err().errno(), Errno::EINVAL);
        assert_eq!(list.map_zero(u64::MAX).unwrap_err().errno(), Errno::EOVERFLOW);
        assert!(!list.is_mapped());
        list.map_bytes(vec![3; 10]).unwrap();
        assert_eq!(list.map_bytes(vec![4; 10]).unwrap_err().errno(), Errno::EINVAL);
        assert_eq!(list.map_hole(1).unwrap_err().errno(), Errno::EINVAL);
        assert_eq!(read_page(&attach(&engine, &list), 0), Ok(0));
        assert_eq!(touch::read(attach(&engine, &list).as_ptr()), Ok(3));
    });
}

/// T104, B20, B23: a source with a gap, or a file that is too short, is refused as a whole; the list stays empty.
#[test]
fn a_source_with_a_gap_is_refused_whole() {
    alone("a_source_with_a_gap_is_refused_whole", || {
        let (page, engine) = (page_size(), engine_builder().build().unwrap());
        // SAFETY: a new mapping where the kernel likes; its middle page is then made inaccessible.
        let start = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let start = libc::mmap(std::ptr::null_mut(), 3 * page, libc::PROT_READ, flags, -1, 0);
            assert_ne!(start, libc::MAP_FAILED);
            assert_eq!(libc::mprotect(start.byte_add(page), page, libc::PROT_NONE), 0);
            start.cast::<u8>()
        };
        let mut list = Kiobuf::new();
        for (skipped, len, at) in [(0, 3 * page, page), (page - 1, 2, page), (page, 1, page), (100, 2 * page, page)] {
            // SAFETY: the mapping is never unmapped or written to.
            let refused = unsafe { list.map_user(start.wrapping_add(skipped), len, Arc::new(())) }.unwrap_err();
            assert!(matches!(refused, Error::Fault { at: found, .. } if found == (start as usize + at) as u64));
            assert_eq!((refused.errno(), list.nr_pages(), list.length()), (Errno::EFAULT, 0, 0));
        }
        // SAFETY: as above.
        unsafe { list.map_user(start.wrapping_add(2 * page), page, Arc::new(())) }.unwrap();
        assert_eq!(read_page(&attach(&engine, &list), 0), Ok(0));
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[1; 5000]).unwrap();
        let mut list = Kiobuf::new();
        for range in [0..5001, 4999..5001, 5001..5002, 6000..6001] {
            assert_eq!(list.map_file(&file, range).unwrap_err().errno(), Errno::EFAULT);
            assert!(!list.is_mapped());
        }
        list.map_file(&file, 4999..5000).unwrap();
        let region = attach(&engine, &list);
        assert_eq!((bytes_of(&region)[0], bytes_of(&region)[1]), (1, 0));
    });
}

/// T120, B22: a list is the same from whichever thread it is built, and needs neither that thread nor the file's handle.
#[test]
fn a_list_built_on_another_thread_is_the_same() {
    alone("a_list_built_on_another_thread_is_the_same", || {
        let engine = engine_builder().build().unwrap();
        let build = || {
            let mut file: File = tempfile::tempfile().unwrap();
            file.write_all(&(0..30_000).map(pattern).collect::<Vec<_>>()).unwrap();
            let mut list = Kiobuf::new();
            list.map_file(&file, 1..30_000).unwrap();
            list
        };
        let (here, there) = (build(), std::thread::spawn(build).join().unwrap());
        assert_eq!(here.extents().collect::<Vec<_>>(), there.extents().collect::<Vec<_>>());
        let (here, there) = (bytes_of(&attach(&engine, &here)), bytes_of(&attach(&engine, &there)));
        assert!(here == there && (0..29_999).all(|at| here[at] == pattern(at + 1)));
    });
}

/// Snapshots of differences on a base, as a region shows them: each page is that of the topmost layer that has it, a hole in all
/// of them is SIGBUS, and the file of differences need not stay open.
#[test]
fn layers_show_the_topmost_page() {
    alone("layers_show_the_topmost_page", || {
        let engine = engine_builder().build().unwrap();
        let page = page_size();
        // The base: 40 pages, the last 5 of which are a hole. Differences: pages 3 and 4, then half of 4, 36 and 50.
        let base = Kiobuf::concat(&[pages(35), holes(5)]).unwrap();
        let sparse = |written: &[(usize, usize, u8)], nr_pages: usize| {
            let file = tempfile::tempfile().unwrap();
            file.set_len((nr_pages * page) as u64).unwrap();
            for &(at, len, byte) in written {
                file.write_all_at(&vec![byte; len], at as u64).unwrap();
            }
            let mut list = Kiobuf::new();
            list.map_diff_file(&file).unwrap();
            list
        };
        let first = sparse(&[(3 * page, 2 * page, 0xa1)], 40);
        let second = sparse(&[(4 * page, page / 2, 0xb2), (36 * page, page, 0xb2), (50 * page, page, 0xb2)], 60);
        let layered = Kiobuf::layered(&[second, first, base]);
        assert_eq!(layered.nr_pages(), 60);
        let region = attach(&engine, &layered);
        drop(layered);
        for pgoff in 0..60 {
            let expected = match pgoff {
                3 => Some(0xa1),
                4 | 36 | 50 => Some(0xb2),
                0..=34 => Some(mark(pgoff)),
                _ => None,
            };
            match expected {
                Some(byte) => assert_eq!(read_page(&region, pgoff), Ok(byte), "page {pgoff}"),
                None => assert_sigbus(&region, pgoff),
            }
        }
        let mut halves = vec![0xdd; page];
        region.read_at(4 * page, &mut halves).unwrap();
        // A hole of the file within its page is zeros of that page; nothing of what is below is seen.
        assert!(
            halves[..page / 2].iter().all(|&byte| byte == 0xb2) && halves[page / 2..].iter().all(|&byte| byte == 0)
        );
    });
}
