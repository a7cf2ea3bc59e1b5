//! Building lists: sizes, refusals, snapshots, and who keeps what alive.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;

use super::*;

/// T103: sizes and offsets are exact, however the bytes lie on their pages.
#[test]
fn page_counts_are_exact_for_unaligned_starts_and_ends() {
    let page = page_size();
    for (head, len, nr_pages) in [
        (0, 1, 1),
        (0, page, 1),
        (0, page + 1, 2),
        (1, page - 1, 1),
        (1, page, 2),
        (page - 1, 1, 1),
        (page - 1, 2, 2),
        (100, 17 * page, 18),
    ] {
        let bytes = pattern(len, 1);
        let kiobuf = window(&bytes, head);
        assert_eq!((kiobuf.nr_pages(), kiobuf.offset(), kiobuf.length()), (nr_pages, head, len as u64));
        assert!(kiobuf.offset() as u64 + kiobuf.length() <= kiobuf.nr_pages() * page as u64);
        assert_eq!(contents(&kiobuf), padded(&bytes, head), "{head}+{len}");
    }
}

/// T103: no bytes, no pages.
#[test]
fn empty_parts_are_refused() {
    let mut kiobuf = Kiobuf::new();
    let file = file_of(b"x");
    let results = [
        kiobuf.map_slice(Vec::new()),
        kiobuf.map_bytes(Vec::new()),
        // SAFETY: nothing is read of no bytes.
        unsafe { kiobuf.map_user([1u8].as_ptr(), 0, Arc::new(())) },
        kiobuf.map_file(&file, 0..0),
        kiobuf.map_file(&file, 1..1),
        kiobuf.map_source(Arc::new(Bytes(Vec::new())), 0),
        kiobuf.map_zero(0),
        kiobuf.map_hole(0),
    ];
    for result in results {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
        assert_eq!(error.errno(), Errno::EINVAL);
    }
    assert!(!kiobuf.is_mapped());
}

/// T103: a mapped list refuses every way of mapping it, and keeps what it has; unmapped, it can be mapped again.
#[test]
fn a_mapped_list_is_refused_until_it_is_unmapped() {
    let bytes = pattern(5000, 2);
    let mut kiobuf = window(&bytes, 100);
    let file = file_of(b"x");
    // SAFETY: the mapping is of a file that nobody else has.
    let mmap = unsafe { memmap2::Mmap::map(&file) }.unwrap();
    let results = [
        kiobuf.map_slice(vec![1]),
        kiobuf.map_bytes(vec![1]),
        // SAFETY: a static byte is always readable.
        unsafe { kiobuf.map_user(b"x".as_ptr(), 1, Arc::new(())) },
        kiobuf.map_kernel(Arena::new(1).unwrap()),
        kiobuf.map_file(&file, 0..1),
        kiobuf.map_mmap(mmap),
        kiobuf.map_source(Arc::new(Bytes(vec![1])), 1),
        kiobuf.map_zero(1),
        kiobuf.map_hole(1),
    ];
    for result in results {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::AlreadyMapped { nr_pages: 2 }), "{error:?}");
        assert_eq!(error.errno(), Errno::EINVAL);
    }
    assert_eq!(contents(&kiobuf), padded(&bytes, 100));
    kiobuf.unmap();
    assert_eq!((kiobuf.nr_pages(), kiobuf.offset(), kiobuf.length()), (0, 0, 0));
    assert_eq!(kiobuf.nopage(0), Nopage::Sigbus(NoPageWhy::PastEnd));
    kiobuf.map_zero(1).unwrap();
}

/// T103: what wraps around or passes 63 bits is EOVERFLOW, not a short list.
#[test]
fn lengths_that_wrap_are_refused() {
    let mut kiobuf = Kiobuf::new();
    let address = std::ptr::without_provenance(usize::MAX - 10);
    let results = [
        // SAFETY: refused before anything is read.
        unsafe { kiobuf.map_user(address, 100, Arc::new(())) },
        kiobuf.map_source(Arc::new(Bytes(Vec::new())), u64::MAX),
        kiobuf.map_zero(u64::MAX),
        kiobuf.map_hole(u64::MAX / 2),
    ];
    for result in results {
        assert_eq!(result.unwrap_err().errno(), Errno::EOVERFLOW);
    }
    assert!(!kiobuf.is_mapped());

    let most = i64::MAX as u64 / page_size() as u64;
    kiobuf.map_zero(most).unwrap();
    let one = mapped(|one| one.map_zero(1));
    assert_eq!(kiobuf.expand(&one).unwrap_err().errno(), Errno::EOVERFLOW);
    assert_eq!(kiobuf.expand(&kiobuf.clone()).unwrap_err().errno(), Errno::EOVERFLOW);
    assert_eq!(Kiobuf::concat(&[one, kiobuf.clone()]).unwrap_err().errno(), Errno::EOVERFLOW);
    assert_eq!((kiobuf.nr_pages(), kiobuf.extents().count()), (most, 1));
}

/// T104: memory with a page in the middle that can't be read is EFAULT, and the list stays empty.
#[test]
fn memory_that_is_not_all_readable_is_a_fault() {
    let page = page_size();
    let mut arena = Arena::new(3).unwrap();
    let bytes = pattern(3 * page, 3);
    arena.copy_from_slice(&bytes);
    let arena = Arc::new(arena);
    let middle = std::ptr::NonNull::new(arena.as_ptr().wrapping_add(page).cast_mut().cast()).unwrap();
    let protect = |access| {
        // SAFETY: the page is one of the arena's, of which no reference into its bytes is alive here.
        unsafe { nix::sys::mman::mprotect(middle, page, access) }.unwrap();
    };

    let mut kiobuf = Kiobuf::new();
    protect(nix::sys::mman::ProtFlags::PROT_NONE);
    // SAFETY: refused before anything is read.
    let error = unsafe { kiobuf.map_user(arena.as_ptr().wrapping_add(10), 2 * page, arena.clone()) }.unwrap_err();
    assert!(matches!(error, Error::Fault { at, .. } if at == middle.addr().get() as u64), "{error:?}");
    assert_eq!(error.errno(), Errno::EFAULT);
    assert!(!kiobuf.is_mapped());
    assert_eq!(Arc::strong_count(&arena), 1, "a refused guard is not kept");

    protect(nix::sys::mman::ProtFlags::PROT_READ);
    // SAFETY: the arena is the guard, and nobody writes to it.
    unsafe { kiobuf.map_user(arena.as_ptr().wrapping_add(10), 2 * page, arena.clone()) }.unwrap();
    assert_eq!((kiobuf.offset(), kiobuf.nr_pages()), (10, 3));
    assert_eq!(contents(&kiobuf), padded(&bytes[10..10 + 2 * page], 10));
}

/// T104: an address where nothing is mapped.
#[test]
fn memory_that_is_not_mapped_is_a_fault() {
    let mut kiobuf = Kiobuf::new();
    // SAFETY: refused before anything is read.
    let error = unsafe { kiobuf.map_user(std::ptr::null(), 1, Arc::new(())) }.unwrap_err();
    assert!(matches!(error, Error::Fault { at: 0, .. }), "{error:?}");
    assert!(!kiobuf.is_mapped());
}

/// T104: a file must hold the whole range, be readable, and be a file with bytes.
#[test]
fn files_that_can_not_serve_the_range_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    std::fs::write(&path, pattern(5000, 4)).unwrap();
    let file = File::open(&path).unwrap();
    let mut kiobuf = Kiobuf::new();

    assert!(matches!(kiobuf.map_file(&file, 0..5001), Err(Error::Fault { at: 5000, .. })));
    assert!(matches!(kiobuf.map_file(&file, 6000..7000), Err(Error::Fault { at: 5000, .. })));
    assert!(matches!(kiobuf.map_file(&file, 0..u64::MAX), Err(Error::Fault { at: 5000, .. })));
    let turned_around = Range { start: 10, end: 5 };
    assert!(matches!(kiobuf.map_file(&file, turned_around), Err(Error::Invalid { value: 10, .. })));

    let write_only = OpenOptions::new().write(true).open(&path).unwrap();
    let path_only = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&path).unwrap();
    let directory = File::open(dir.path()).unwrap();
    let device = File::open("/dev/zero").unwrap();
    for refused in [write_only, path_only, directory, device] {
        let error = kiobuf.map_file(&refused, 0..1).unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
    }
    // Not every file system opens a file this way; where it does, the list refuses it.
    if let Ok(direct) = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path) {
        assert!(matches!(kiobuf.map_file(&direct, 0..1), Err(Error::Invalid { .. })));
    }
    assert!(!kiobuf.is_mapped());
}

/// The data of a file starts on a page boundary, wherever in the file that is, and the descriptor is the list's own.
#[test]
fn a_file_range_need_not_be_aligned_and_the_file_may_be_closed() {
    let bytes = pattern(20_000, 5);
    let file = file_of(&bytes);
    let kiobuf = mapped(|kiobuf| kiobuf.map_file(&file, 1234..17_001));
    drop(file);
    assert_eq!((kiobuf.offset(), kiobuf.length()), (0, 17_001 - 1234));
    assert_eq!(contents(&kiobuf), padded(&bytes[1234..17_001], 0));
}

/// T105: sources that span 2 and 4 MiB boundaries, unaligned at both ends, come out byte for byte.
#[test]
fn memory_across_large_page_boundaries_is_byte_equal() {
    let bytes = pattern(9 << 20, 6);
    for (head, len) in [(0, 9 << 20), (1, (9 << 20) - 2), (4095, (4 << 20) + 1), ((2 << 20) - 1, (4 << 20) + 3)] {
        let kiobuf = window(&bytes[..len], head);
        // A list has no whole pages before its data: only where in a page that starts is left of `head`.
        assert!(contents(&kiobuf) == padded(&bytes[..len], head % page_size()), "{head}+{len}");
        let mut expanded = window(&bytes[..len], head);
        expanded.expand(&kiobuf).unwrap();
        assert!(page(&expanded, expanded.nr_pages() - 1) == page(&kiobuf, kiobuf.nr_pages() - 1));
    }
}

/// Bytes of a vector start on a page boundary of the list, whatever their address is.
#[test]
fn owned_bytes_have_no_offset() {
    for len in [1, 100, page_size(), page_size() + 1, 3 * page_size()] {
        let bytes = pattern(len, 7);
        let kiobuf = mapped(|kiobuf| kiobuf.map_bytes(bytes.clone()));
        assert_eq!((kiobuf.offset(), kiobuf.length()), (0, len as u64));
        assert_eq!(contents(&kiobuf), padded(&bytes, 0));
    }
}

/// T15: bytes outside the data read as zero, whatever lies there.
#[test]
fn slack_reads_as_zero() {
    let bytes = pattern(5000, 8);
    let kiobuf = window(&bytes, 100);
    let seen = contents(&kiobuf);
    assert!(seen[..100].iter().chain(&seen[5100..]).all(|&byte| byte == 0));
    assert_eq!(seen[100..5100], bytes);
}

/// T109: an arena that was filled before it was mapped shows that filling and nothing older.
#[test]
fn an_arena_shows_what_it_was_filled_with() {
    let mut arena = Arena::new(100).unwrap();
    arena.fill(0xff);
    let kiobuf = mapped(|kiobuf| kiobuf.map_kernel(arena));
    assert_eq!(kiobuf.nr_pages(), 100);
    assert!(matches!(kiobuf.nopage(50), Nopage::Direct { run, .. } if run == (0..100)));
    assert!(contents(&kiobuf).iter().all(|&byte| byte == 0xff));
}

/// T106: a page in two slots is allowed; both slots show it.
#[test]
fn a_page_may_stand_in_two_slots() {
    let bytes = pattern(2 * page_size(), 9);
    let once = window(&bytes, 0);
    let twice = Kiobuf::concat(&[once.clone(), once]).unwrap();
    let (Nopage::Direct { src: first, .. }, Nopage::Direct { src: second, run }) = (twice.nopage(0), twice.nopage(2))
    else {
        panic!("plain memory is direct");
    };
    assert_eq!((first, run), (second, 2..4));
    assert_eq!(contents(&twice), [bytes.clone(), bytes].concat());
}

/// T108: three lists behind one another have continuous pages, and each keeps its slack.
#[test]
fn a_kiovec_is_continuous_and_its_parts_keep_their_slack() {
    let page_len = page_size();
    let (first, second, third) = (pattern(5000, 10), pattern(3, 11), pattern(2 * page_len, 12));
    let parts = [
        window(&first, 100),
        mapped(|kiobuf| kiobuf.map_bytes(second.clone())),
        mapped(|kiobuf| kiobuf.map_file(&file_of(&third), 0..third.len() as u64)),
    ];
    let kiovec = Kiobuf::concat(&parts).unwrap();
    let expected = [padded(&first, 100), padded(&second, 0), third].concat();
    assert_eq!(contents(&kiovec), expected);
    assert_eq!((kiovec.nr_pages(), kiovec.offset()), ((expected.len() / page_len) as u64, 100));
    assert_eq!(kiovec.length(), 5003 + 2 * page_len as u64);
    assert_eq!(page(&kiovec, kiovec.nr_pages()), None);
    let starts: Vec<_> = kiovec.extents().map(|extent| (extent.kind, extent.first_page, extent.nr_pages)).collect();
    let pages = parts[0].nr_pages();
    assert_eq!(
        starts,
        [(ExtentKind::Memory, 0, pages), (ExtentKind::Memory, pages, 1), (ExtentKind::File, pages + 1, 2)]
    );
    assert_eq!(Kiobuf::concat(&[]).unwrap().nr_pages(), 0);
}

/// Snapshots are unmoved by what happens to the handle that they were taken from.
#[test]
fn snapshots_outlive_expand_and_unmap() {
    let bytes = pattern(page_size(), 13);
    let mut kiobuf = window(&bytes, 0);
    let before = kiobuf.clone();
    kiobuf.expand(&mapped(|tail| tail.map_zero(3))).unwrap();
    let expanded = kiobuf.clone();
    kiobuf.expand(&kiobuf.clone()).unwrap();
    kiobuf.expand(&Kiobuf::new()).unwrap();
    assert_eq!((before.nr_pages(), expanded.nr_pages(), kiobuf.nr_pages()), (1, 4, 8));
    kiobuf.unmap();
    assert_eq!((before.nr_pages(), expanded.nr_pages(), kiobuf.nr_pages()), (1, 4, 0));
    assert_eq!(contents(&before), bytes);
    assert_eq!(before.nopage(1), Nopage::Sigbus(NoPageWhy::PastEnd));

    let mut grown = Kiobuf::new();
    grown.expand(&expanded).unwrap();
    assert_eq!(contents(&grown), contents(&expanded));
}

/// T30: what a list borrows is dropped with the last snapshot that names it, once.
#[test]
fn a_guard_is_dropped_with_the_last_snapshot() {
    let drops = Arc::new(AtomicUsize::new(0));
    let dropped = || drops.load(Ordering::SeqCst);
    let mut kiobuf = Kiobuf::new();
    kiobuf.map_slice(Counted(vec![1u8; 5000], drops.clone())).unwrap();
    let snapshot = kiobuf.clone();
    let joined = Kiobuf::concat(&[kiobuf.clone(), kiobuf.clone()]).unwrap();
    kiobuf.unmap();
    assert_eq!(dropped(), 0);
    drop(snapshot);
    assert_eq!(dropped(), 0);
    assert_eq!(page(&joined, 0).unwrap().len(), page_size());
    drop(joined);
    assert_eq!(dropped(), 1);

    let refused = Counted(vec![1u8], drops.clone());
    let mut mapped = mapped(|kiobuf| kiobuf.map_zero(1));
    mapped.map_slice(refused).unwrap_err();
    assert_eq!(dropped(), 2, "a refused guard is not leaked");
}

/// A guard whose bytes lie within itself is asked where they are after it was moved to its last place.
#[test]
fn a_guard_that_holds_its_bytes_in_itself_is_read_in_its_last_place() {
    let bytes: [u8; 600] = pattern(600, 14).try_into().unwrap();
    let kiobuf = mapped(|kiobuf| kiobuf.map_slice(bytes));
    let seen = contents(&kiobuf);
    assert_eq!(seen[kiobuf.offset()..kiobuf.offset() + 600], bytes);
}

/// T120: the list is the same from whichever thread it is built.
#[test]
fn any_thread_builds_the_same_list() {
    let window = Window::over(&pattern(3 * page_size(), 15), 77);
    let (addr, len) = (window.as_ref().as_ptr().expose_provenance(), window.as_ref().len());
    let guard = Arc::new(window);
    let build = move || {
        let mut kiobuf = Kiobuf::new();
        // SAFETY: the guard keeps the window's bytes, which nobody writes.
        unsafe { kiobuf.map_user(std::ptr::with_exposed_provenance(addr), len, guard.clone()) }.unwrap();
        kiobuf
    };
    let here = build();
    let there = std::thread::spawn(build).join().unwrap();
    assert_eq!(format!("{here:?}"), format!("{there:?}"));
    for pgoff in 0..=here.nr_pages() {
        assert_eq!(here.nopage(pgoff), there.nopage(pgoff));
    }
    assert_eq!(contents(&here), contents(&there));
}

/// T2, T10: for every size around the patch's 17 static slots, the last page is there and the next is not.
#[test]
fn the_first_page_past_the_end_is_a_sigbus() {
    assert_eq!(Kiobuf::new().nopage(0), Nopage::Sigbus(NoPageWhy::PastEnd));
    for nr_pages in [1usize, 2, 17, 18, 100] {
        let bytes = pattern(nr_pages * page_size(), 16);
        let last = &bytes[(nr_pages - 1) * page_size()..];
        for kiobuf in [
            window(&bytes, 0),
            mapped(|kiobuf| kiobuf.map_file(&file_of(&bytes), 0..bytes.len() as u64)),
            mapped(|kiobuf| kiobuf.map_source(Arc::new(Bytes(bytes.clone())), bytes.len() as u64)),
        ] {
            let end = nr_pages as u64;
            assert_eq!(page(&kiobuf, end - 1).as_deref(), Some(last));
            for past in [end, end + 1, end + 1_000_000, u64::MAX] {
                assert_eq!(kiobuf.nopage(past), Nopage::Sigbus(NoPageWhy::PastEnd));
            }
        }
    }
}

/// T5: holes have no page; their neighbours do.
#[test]
fn holes_have_no_page() {
    let bytes = pattern(page_size(), 17);
    let (part, hole) = (window(&bytes, 0), mapped(|kiobuf| kiobuf.map_hole(1)));
    let kiobuf = Kiobuf::concat(&[part.clone(), hole.clone(), part, hole]).unwrap();
    assert_eq!(kiobuf.length(), 2 * page_size() as u64);
    for pgoff in [0, 2] {
        assert_eq!(page(&kiobuf, pgoff).unwrap(), bytes);
    }
    let mut buf = vec![0; page_size()];
    for pgoff in [1, 3] {
        assert_eq!(kiobuf.nopage(pgoff), Nopage::Sigbus(NoPageWhy::Hole));
        assert_eq!(kiobuf.try_read_pages(pgoff, &mut buf), TryRead::Failed(Errno::EFAULT));
        assert!(matches!(kiobuf.read_pages(pgoff, &mut buf), Err(ReadFailure::NotPages { .. })));
    }
}

/// T101: 2^28 pages of one file are one extent, like one page of it.
#[test]
fn a_terabyte_costs_what_a_page_costs() {
    let nr_pages = 1u64 << 28;
    let file = tempfile::tempfile().unwrap();
    file.set_len(nr_pages * page_size() as u64).unwrap();
    let mut kiobuf = mapped(|kiobuf| kiobuf.map_file(&file, 0..nr_pages * page_size() as u64));
    kiobuf.expand(&mapped(|tail| tail.map_zero(nr_pages))).unwrap();
    assert_eq!((kiobuf.nr_pages(), kiobuf.extents().count()), (2 * nr_pages, 2));
    assert_eq!(kiobuf.nopage(nr_pages - 1), Nopage::Read { run: 0..nr_pages, may_block: true });
    assert_eq!(kiobuf.nopage(nr_pages), Nopage::Zero { run: nr_pages..2 * nr_pages });
    assert_eq!(page(&kiobuf, nr_pages - 1).unwrap(), vec![0; page_size()]);
    assert_eq!(page(&kiobuf, 2 * nr_pages), None);
}

/// A list of very many pages of memory: no address is computed that is not in it.
#[test]
fn addresses_of_long_lists_do_not_overflow() {
    let bytes = pattern(2 * page_size(), 18);
    let far = mapped(|kiobuf| kiobuf.map_hole(1 << 50));
    let kiobuf = Kiobuf::concat(&[far, window(&bytes, 0)]).unwrap();
    assert_eq!(page(&kiobuf, (1 << 50) + 1).unwrap(), bytes[page_size()..]);
    assert_eq!(page(&kiobuf, (1 << 50) + 2), None);
}

#[test]
fn a_list_is_send_and_sync_and_prints_its_measures() {
    fn check<T: Send + Sync>() {}
    check::<Kiobuf>();
    check::<PageLock>();
    check::<Arena>();
    let text = format!("{:?}", window(&pattern(5000, 19), 100));
    assert!(text.contains("nr_pages: 2, offset: 100, length: 5000") && text.contains("Memory"), "{text}");
}
