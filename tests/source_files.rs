//! Pages of files, readers and closures: right bytes through an engine, and what is wrong with them told by name.

mod support;

use std::fs::{File, OpenOptions};
use std::io::{Cursor, Error as IoError, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};

use kiomap::{
    Error, ExtentKind, FileOptions, FileSource, FnSource, Kiobuf, PageSource, ReadSource, SourceFault, page_size,
};
use nix::errno::Errno;
use support::contents::{assert_holds, contents, right_or_sigbus};
use support::{alone, attached, engine_builder, settled_stats};

/// A list of all that a source holds.
fn list_of(source: impl PageSource) -> Kiobuf {
    let (mut list, len) = (Kiobuf::new(), source.len_bytes().unwrap());
    list.map_source(Arc::new(source), len).unwrap();
    list
}

fn file_of(folder: &Path, bytes: &[u8]) -> std::path::PathBuf {
    let path = folder.join("file");
    std::fs::write(&path, bytes).unwrap();
    path
}

/// A file pages in with every hint, past the page cache where its file system reads so, and with every granule.
#[test]
fn a_file_pages_in_however_it_is_read() {
    needs_sources!();
    alone("a_file_pages_in_however_it_is_read", || {
        let (folder, bytes) = (tempfile::tempdir().unwrap(), contents(100 * page_size() + 123, 1));
        let path = file_of(folder.path(), &bytes);
        let ways = [
            FileOptions::new(),
            FileOptions::new().random(),
            FileOptions::new().sequential().granule_bytes(1 << 16),
            FileOptions::new().direct().granule_bytes(1 << 16),
            FileOptions::new().direct(),
        ];
        for options in ways {
            let source = match FileSource::open(&path, &options) {
                Err(Error::Source { fault: SourceFault::Unsupported, why, .. }) => {
                    support::tell(&format!("a_file_pages_in_however_it_is_read: skipped, because {why}"));
                    continue;
                }
                opened => opened.unwrap(),
            };
            source.will_read(0..u64::MAX);
            let engine = engine_builder().build().unwrap();
            let (_vmap, region) = attached(&engine, &list_of(source));
            assert_holds(&region, &bytes);
        }
    });
}

/// What is truncated away under a source is SIGBUS, page by page, and never zeros; what is left is served.
#[test]
fn a_file_that_is_truncated_under_its_source_is_sigbus() {
    needs_sources!();
    alone("a_file_that_is_truncated_under_its_source_is_sigbus", || {
        for direct in [false, true] {
            let (folder, bytes) = (tempfile::tempdir().unwrap(), contents(40 * page_size(), 2));
            let path = file_of(folder.path(), &bytes);
            let options = if direct { FileOptions::new().direct() } else { FileOptions::new() };
            let Ok(source) = FileSource::open(&path, &options) else { continue };
            let engine = engine_builder().fault_around_pages(4).build().unwrap();
            let (_vmap, region) = attached(&engine, &list_of(source));
            OpenOptions::new().write(true).open(&path).unwrap().set_len(17 * page_size() as u64 + 100).unwrap();
            assert_eq!(right_or_sigbus(&region, &bytes), (17, 23));
            assert!(settled_stats(&engine).source_errors >= 23);
        }
    });
}

/// What is no readable file of bytes is refused when it is opened, by name, and a FIFO is not waited for.
#[test]
fn what_is_no_file_of_bytes_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = file_of(folder.path(), &[1; 100]);
    let (fifo, empty) = (folder.path().join("fifo"), folder.path().join("empty"));
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    File::create(&empty).unwrap();
    let options = FileOptions::new();
    for (path, errno) in [
        (folder.path(), Errno::EINVAL),
        (&fifo, Errno::EINVAL),
        (&folder.path().join("none"), Errno::ENOENT),
        (&empty, Errno::ENODATA),
        (Path::new("/dev/null"), Errno::EINVAL),
    ] {
        let refused = FileSource::open(path, &options).unwrap_err();
        assert_eq!(refused.errno(), errno, "{}: {refused}", path.display());
    }
    let write_only = OpenOptions::new().write(true).open(&path).unwrap();
    let no_more_than_a_path = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&path).unwrap();
    for file in [write_only, no_more_than_a_path] {
        let refused = FileSource::new(file, &options).unwrap_err();
        assert!(matches!(refused, Error::Invalid { what: "the file's open mode", .. }), "{refused}");
    }
    for granule in [0, 1, page_size() - 1, page_size() / 2, 3 * page_size(), 8 << 20] {
        let refused = FileSource::open(&path, &options.clone().granule_bytes(granule)).unwrap_err();
        assert!(matches!(refused, Error::Invalid { value, .. } if value == granule as u64), "{refused}");
    }
    // The kernel's own files are not read past a cache.
    let refused = FileSource::open("/proc/self/maps", &options.clone().direct()).unwrap_err();
    assert!([Errno::EOPNOTSUPP, Errno::ENODATA].contains(&refused.errno()), "{refused}");
}

/// A file is told from another, and from what it was before it was written to; a name that is given is kept.
#[test]
fn a_file_is_known_again() {
    let (folder, options) = (tempfile::tempdir().unwrap(), FileOptions::new());
    let path = file_of(folder.path(), &[1; 10_000]);
    let identity = |path: &Path| FileSource::open(path, &options).unwrap().identity().unwrap();
    let first = identity(&path);
    assert_eq!(identity(&path), first);
    let copy = folder.path().join("copy");
    std::fs::copy(&path, &copy).unwrap();
    assert_ne!(identity(&copy), first);
    File::options().append(true).open(&path).unwrap().write_all(&[1]).unwrap();
    assert_ne!(identity(&path), first);
    let named = FileSource::open(&path, &options.clone().identity(b"mine".to_vec())).unwrap();
    assert_eq!(named.identity().unwrap(), b"mine");
}

/// Anything that reads and seeks pages in, one read at a time; a closure on several threads.
#[test]
fn readers_and_closures_page_in() {
    needs_sources!();
    alone("readers_and_closures_page_in", || {
        let bytes = contents(60 * page_size() + 1, 3);
        let reader = ReadSource::new(Cursor::new(bytes.clone())).unwrap().with_granule_bytes(1 << 15).unwrap();
        assert_eq!((reader.len_bytes(), reader.granule_bytes()), (Some(bytes.len() as u64), 1 << 15));
        let held = bytes.clone();
        let closure = FnSource::new(bytes.len() as u64, move |at, buf| {
            buf.copy_from_slice(&held[at as usize..at as usize + buf.len()]);
            Ok(())
        });
        for list in [list_of(reader), list_of(closure.with_identity(b"closure".to_vec()).never_blocks())] {
            let engine = engine_builder().build().unwrap();
            let (_vmap, region) = attached(&engine, &list);
            std::thread::scope(|scope| (0..3).for_each(|_| drop(scope.spawn(|| assert_holds(&region, &bytes)))));
        }
    });
}

/// A forked process shares the position of a file that a reader has: there it is an error, and the engine's pages are right.
#[test]
fn a_forked_process_does_not_move_the_position_of_a_reader() {
    needs_sources!();
    alone("a_forked_process_does_not_move_the_position_of_a_reader", || {
        let (folder, bytes) = (tempfile::tempdir().unwrap(), contents(30 * page_size(), 5));
        let file = File::open(file_of(folder.path(), &bytes)).unwrap();
        let source = Arc::new(ReadSource::new(file).unwrap());
        let mut list = Kiobuf::new();
        list.map_source(Arc::clone(&source) as _, bytes.len() as u64).unwrap();
        let engine = engine_builder().build().unwrap();
        let (_vmap, region) = attached(&engine, &list);
        let child = support::fork_child(|| {
            let refused = source.read_at(0, &mut vec![0; page_size()]).unwrap_err();
            assert!(refused.to_string().contains("forked"), "{refused}");
            assert_holds(&region, &bytes);
        });
        support::reap_ok(child);
        let mut page = vec![0; page_size()];
        source.read_at(3 * page_size() as u64, &mut page).unwrap();
        assert!(page == bytes[3 * page_size()..4 * page_size()]);
    });
}

/// A reader that ends early, that lies about where it is, or that panics now and then.
struct BadReader {
    inner: Cursor<Vec<u8>>,
    ends_at: u64,
    panics_at: u64,
    reads: Arc<AtomicU64>,
}

impl Read for BadReader {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let at = self.inner.position();
        assert!(at != self.panics_at, "asked for byte {at}");
        let len = buf.len().min(1000).min(self.ends_at.saturating_sub(at) as usize);
        self.inner.read(&mut buf[..len])
    }
}

impl Seek for BadReader {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        self.inner.seek(to)
    }
}

/// A reader that ends before its length is SIGBUS where it does, never what the buffer held before; one that panics has its other
/// pages served.
#[test]
fn a_reader_that_ends_early_or_panics_is_sigbus_there() {
    needs_sources!();
    alone("a_reader_that_ends_early_or_panics_is_sigbus_there", || {
        let (page, bytes) = (page_size() as u64, contents(20 * page_size(), 4));
        let reads = Arc::new(AtomicU64::new(0));
        let reader = BadReader {
            inner: Cursor::new(bytes.clone()),
            ends_at: 12 * page + 7,
            panics_at: 5 * page,
            reads: Arc::clone(&reads),
        };
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let (_vmap, region) = attached(&engine, &list_of(ReadSource::new(reader).unwrap()));
        // Page 5 panics; 12 to 19 end early.
        assert_eq!(right_or_sigbus(&region, &bytes), (11, 9));
        // It may be asked again.
        assert!(settled_stats(&engine).panics >= 1);
        assert!(reads.load(Ordering::Relaxed) > 20);
    });
}

/// Empty readers and ranges past the end are refused, by name.
#[test]
fn bad_readers_are_refused() {
    #[derive(Debug)]
    struct Unseekable;
    impl Read for Unseekable {
        fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
            Ok(0)
        }
    }
    impl Seek for Unseekable {
        fn seek(&mut self, _: SeekFrom) -> std::io::Result<u64> {
            Err(IoError::from_raw_os_error(libc::ESPIPE))
        }
    }
    assert_eq!(ReadSource::new(Unseekable).unwrap_err().errno(), Errno::ESPIPE);
    assert_eq!(ReadSource::new(Cursor::new(Vec::new())).unwrap_err().errno(), Errno::ENODATA);
    let reader = ReadSource::new(Cursor::new(vec![1; 100])).unwrap();
    for (at, len) in [(0, 101), (100, 1), (u64::MAX, 1), (u64::MAX - 10, 20)] {
        let mut buf = vec![0; len];
        assert_eq!(reader.read_at(at, &mut buf).unwrap_err().kind(), ErrorKind::UnexpectedEof, "{at}+{len}");
    }
    assert_eq!(reader.with_granule_bytes(100).unwrap_err().errno(), Errno::EINVAL);
}

/// The holes of a sparse file are zeros that nobody reads; its data is right, and all of it shares one descriptor.
#[test]
fn the_holes_of_a_sparse_file_are_zeros() {
    alone("the_holes_of_a_sparse_file_are_zeros", || {
        let page = page_size();
        let mut bytes = vec![0; 300 * page + 50];
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes.len() as u64).unwrap();
        for (first, nr_pages) in [(3, 2), (16, 1), (100, 30), (299, 1)] {
            let data = contents(nr_pages * page, first as u64).iter().map(|byte| byte | 1).collect::<Vec<_>>();
            bytes[first * page..(first + nr_pages) * page].copy_from_slice(&data);
            file.write_all_at(&data, (first * page) as u64).unwrap();
        }
        let before = support::open_descriptors();
        let mut list = Kiobuf::new();
        list.map_sparse_file(&file).unwrap();
        assert_eq!(support::open_descriptors(), before + 1);
        let kinds: Vec<_> = list.extents().map(|extent| (extent.kind, extent.first_page, extent.nr_pages)).collect();
        assert_eq!(list.nr_pages(), 301);
        if kinds.len() == 1 {
            skip!("the file system of the temporary folder knows no holes");
        }
        let data = |first, nr_pages| (ExtentKind::File, first, nr_pages);
        let zero = |first, nr_pages| (ExtentKind::Zero, first, nr_pages);
        let expected = [
            zero(0, 3),
            data(3, 2),
            zero(5, 11),
            data(16, 1),
            zero(17, 83),
            data(100, 30),
            zero(130, 169),
            data(299, 1),
            zero(300, 1),
        ];
        assert_eq!(kinds, expected);
        let engine = engine_builder().build().unwrap();
        let (_vmap, region) = attached(&engine, &list);
        assert_holds(&region, &bytes);

        // Nothing but a hole, nothing but data, nothing.
        let hole = tempfile::tempfile().unwrap();
        hole.set_len(10 * page as u64 + 1).unwrap();
        let mut list = Kiobuf::new();
        list.map_sparse_file(&hole).unwrap();
        assert_eq!(
            list.extents().map(|extent| (extent.kind, extent.nr_pages)).collect::<Vec<_>>(),
            [(ExtentKind::Zero, 11)]
        );
        assert_eq!(list.map_sparse_file(&hole).unwrap_err().errno(), Errno::EINVAL);
        let refused = Kiobuf::new().map_sparse_file(&tempfile::tempfile().unwrap()).unwrap_err();
        assert!(matches!(refused, Error::Invalid { what: "the length in bytes", value: 0, .. }), "{refused}");
    });
}

/// A file that is truncated while its holes are looked for: what is gone is never listed as zeros.
#[test]
fn what_is_truncated_away_meanwhile_is_no_hole() {
    const RUNS: usize = 1500;
    const ROUNDS: u32 = 60;
    let (page, file) = (page_size(), tempfile::tempfile().unwrap());
    let (mut listed, mut refused) = (0, 0);
    for round in 0..ROUNDS {
        (0..RUNS).for_each(|n| file.write_all_at(&vec![7; page], (2 * n * page) as u64).unwrap());
        let mut whole = Kiobuf::new();
        whole.map_sparse_file(&file).unwrap();
        if whole.extents().count() == 1 {
            skip!("the file system of the temporary folder knows no holes");
        }
        let (begin, mut list) = (Barrier::new(2), Kiobuf::new());
        let outcome = std::thread::scope(|scope| {
            scope.spawn(|| {
                begin.wait();
                // At another moment of the search each time.
                (0..round * 1000).for_each(|_| std::hint::spin_loop());
                file.set_len(0).unwrap();
            });
            begin.wait();
            list.map_sparse_file(&file)
        });
        match outcome {
            Ok(()) => {
                assert!(list.extents().eq(whole.extents()), "{} of {RUNS} runs of data", list.extents().count() / 2);
                listed += 1;
            }
            // Shorter by the time of the second look, or empty by the time of the first.
            Err(Error::Fault { what: "the file", .. } | Error::Invalid { what: "the length in bytes", .. }) => {
                refused += 1
            }
            Err(other) => panic!("{other}"),
        }
    }
    assert_eq!(listed + refused, ROUNDS);
}
