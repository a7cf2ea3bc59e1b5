//! Reading pages: without waiting, with waiting, and when what was there is there no more.

use std::os::fd::AsRawFd;

use nix::errno::Errno;

use super::*;

/// What the kernel says of reading the first page without waiting.
fn nowait(file: &File) -> std::result::Result<usize, Errno> {
    let mut buf = vec![0u8; page_size()];
    let iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    // SAFETY: `iov` is the one element counted, and names the bytes of `buf`.
    let count = unsafe { libc::preadv2(file.as_raw_fd(), &raw const iov, 1, 0, libc::RWF_NOWAIT) };
    Errno::result(count).map(|count| count as usize)
}

/// What the page cache holds is read at once, where the file system can say so.
#[test]
fn cached_file_pages_are_read_without_waiting() {
    let bytes = pattern(3 * page_size() + 10, 30);
    let file = file_of(&bytes);
    let kiobuf = mapped(|kiobuf| kiobuf.map_file(&file, 0..bytes.len() as u64));
    let mut buf = vec![0xaa; 4 * page_size()];
    let answer = kiobuf.try_read_pages(0, &mut buf);
    match nowait(&file) {
        Ok(_) => {
            assert_eq!(answer, TryRead::Done);
            assert_eq!(buf, padded(&bytes, 0));
        }
        Err(errno) => assert_eq!(answer, TryRead::WouldBlock, "{errno}"),
    }
}

/// A file system that can't read without waiting is asked once, and is read by a thread that may wait.
#[test]
fn a_file_that_can_not_be_tried_is_left_to_a_worker() {
    let bytes = pattern(2 * page_size(), 31);
    let memfd = nix::sys::memfd::memfd_create("test", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
    let mut file = File::from(memfd);
    file.write_all(&bytes).unwrap();
    let kiobuf = mapped(|kiobuf| kiobuf.map_file(&file, 0..bytes.len() as u64));
    let expected = if nowait(&file).is_ok() { TryRead::Done } else { TryRead::WouldBlock };
    let mut buf = vec![0; 2 * page_size()];
    for _ in 0..2 {
        assert_eq!(kiobuf.try_read_pages(0, &mut buf), expected);
    }
    kiobuf.read_pages(0, &mut buf).unwrap();
    assert_eq!(buf, bytes);
}

/// Pages that may have left the page cache: either the right bytes at once, or a worker's job.
#[test]
fn uncached_file_pages_are_right_or_left_to_a_worker() {
    let bytes = pattern(64 * page_size(), 32);
    let file = file_of(&bytes);
    file.sync_all().unwrap();
    let kiobuf = mapped(|kiobuf| kiobuf.map_file(&file, 0..bytes.len() as u64));
    nix::fcntl::posix_fadvise(&file, 0, 0, nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
    let mut buf = vec![0; bytes.len()];
    match kiobuf.try_read_pages(0, &mut buf) {
        TryRead::Done => assert!(buf == bytes),
        TryRead::WouldBlock => {}
        TryRead::Failed(errno) => panic!("{errno}"),
    }
    kiobuf.read_pages(0, &mut buf).unwrap();
    assert!(buf == bytes);
}

/// A file that was truncated after it was mapped fails where it ends; it never turns into zeros.
#[test]
fn a_truncated_file_fails_and_is_never_zeros() {
    let page_len = page_size() as u64;
    let bytes = pattern(4 * page_size(), 33);
    let file = file_of(&bytes);
    let kiobuf = mapped(|kiobuf| kiobuf.map_file(&file, 0..4 * page_len));
    file.set_len(2 * page_len + 5).unwrap();
    let mut buf = vec![0; page_size()];
    kiobuf.read_pages(1, &mut buf).unwrap();
    assert_eq!(buf, bytes[page_size()..2 * page_size()]);
    for (pgoff, end) in [(2, 2 * page_len + 5), (3, 3 * page_len)] {
        assert_ne!(kiobuf.try_read_pages(pgoff, &mut buf), TryRead::Done);
        let failure = kiobuf.read_pages(pgoff, &mut buf).unwrap_err();
        assert!(matches!(failure, ReadFailure::Gone { at } if at == end), "{failure}");
        assert_eq!(failure.errno(), Errno::EFAULT);
    }
    let mut all = vec![0; bytes.len()];
    assert_ne!(kiobuf.try_read_pages(0, &mut all), TryRead::Done);
    assert!(kiobuf.read_pages(0, &mut all).is_err());
}

/// A mapped file is read by a thread that may wait; what was truncated away is a failure, not a signal.
#[test]
fn a_truncated_mapped_file_fails_without_a_signal() {
    let bytes = pattern(3 * page_size(), 34);
    let file = file_of(&bytes);
    // SAFETY: nobody reads the mapping but the list, which goes through the kernel.
    let mmap = unsafe { memmap2::Mmap::map(&file) }.unwrap();
    let addr = mmap.as_ptr().addr();
    let kiobuf = mapped(|kiobuf| kiobuf.map_mmap(mmap));
    assert_eq!(kiobuf.nopage(1), Nopage::Read { run: 0..3, may_block: true });
    assert_eq!(kiobuf.memory_ranges().collect::<Vec<_>>(), vec![addr..addr + bytes.len()]);
    let mut buf = vec![0; page_size()];
    assert_eq!(kiobuf.try_read_pages(0, &mut buf), TryRead::WouldBlock);
    assert_eq!(contents(&kiobuf), bytes);

    file.set_len(page_size() as u64).unwrap();
    let failure = kiobuf.read_pages(1, &mut buf).unwrap_err();
    assert!(matches!(failure, ReadFailure::Gone { at } if at == (addr + page_size()) as u64), "{failure}");
    let mut all = vec![0; bytes.len()];
    assert!(kiobuf.read_pages(0, &mut all).is_err());
    kiobuf.read_pages(0, &mut buf).unwrap();
    assert_eq!(buf, bytes[..page_size()]);
}

/// A mapping of the middle of a file starts within a page, as other memory may.
#[test]
fn an_unaligned_mapped_file_has_an_offset() {
    let bytes = pattern(3 * page_size(), 35);
    let file = file_of(&bytes);
    // SAFETY: nobody writes to the file.
    let mmap = unsafe { memmap2::MmapOptions::new().offset(100).len(page_size() + 50).map(&file) }.unwrap();
    let kiobuf = mapped(|kiobuf| kiobuf.map_mmap(mmap));
    assert_eq!((kiobuf.offset(), kiobuf.nr_pages()), (100, 2));
    assert_eq!(contents(&kiobuf), padded(&bytes[100..150 + page_size()], 100));
}

/// The failure of a page source reaches the caller with its errno.
#[test]
fn a_failing_source_fails_the_read() {
    struct Broken;
    impl PageSource for Broken {
        fn read_at(&self, offset_bytes: u64, _: &mut [u8]) -> std::io::Result<()> {
            match offset_bytes {
                0 => Err(std::io::Error::from_raw_os_error(libc::ENOSPC)),
                _ => Err(std::io::Error::other("no reason")),
            }
        }
    }
    let kiobuf = mapped(|kiobuf| kiobuf.map_source(Arc::new(Broken), 2 * page_size() as u64));
    let mut buf = vec![0; page_size()];
    assert_eq!(kiobuf.try_read_pages(0, &mut buf), TryRead::WouldBlock);
    assert_eq!(kiobuf.read_pages(0, &mut buf).unwrap_err().errno(), Errno::ENOSPC);
    assert_eq!(kiobuf.read_pages(1, &mut buf).unwrap_err().errno(), Errno::EIO);
}

/// Requests that are not pages of one extent are refused, whatever they are.
#[test]
fn reads_across_extents_are_refused() {
    let zero = mapped(|kiobuf| kiobuf.map_zero(2));
    let kiobuf = Kiobuf::concat(&[zero.clone(), zero]).unwrap();
    for (first, len) in [(0, 3 * page_size()), (1, 2 * page_size()), (3, 2 * page_size()), (4, page_size()), (0, 100)] {
        let mut buf = vec![0; len];
        assert_eq!(kiobuf.try_read_pages(first, &mut buf), TryRead::Failed(Errno::EFAULT), "{first}+{len}");
        assert!(kiobuf.read_pages(first, &mut buf).is_err());
    }
}
