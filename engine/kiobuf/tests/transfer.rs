//! Transfers between lists and files.

use std::os::unix::fs::FileExt;

use nix::errno::Errno;

use super::*;

fn arena_list(nr_pages: usize) -> Kiobuf {
    mapped(|kiobuf| kiobuf.map_kernel(Arena::new(nr_pages).unwrap()))
}

#[test]
fn a_file_is_read_into_the_pages_of_arenas() {
    let page = page_size();
    let bytes = pattern(6 * page, 50);
    let file = file_of(&bytes);
    let mut kiobuf = Kiobuf::concat(&[arena_list(1), arena_list(3)]).unwrap();
    assert_eq!(kiobuf.read_from(&file, 100).unwrap(), 4 * page as u64);
    assert!(contents(&kiobuf) == bytes[100..100 + 4 * page]);
    assert_eq!(Kiobuf::new().read_from(&file, 0).unwrap(), 0);
}

/// More parts than one call takes.
#[test]
fn long_lists_are_transferred_in_several_calls() {
    let page = page_size();
    let bytes = pattern(1500 * page, 51);
    let parts: Vec<_> = (0..1500).map(|_| arena_list(1)).collect();
    let mut kiobuf = Kiobuf::concat(&parts).unwrap();
    drop(parts);
    assert_eq!(kiobuf.read_from(&file_of(&bytes), 0).unwrap(), bytes.len() as u64);
    let out = tempfile::tempfile().unwrap();
    assert_eq!(kiobuf.write_to(&out, 7).unwrap(), bytes.len() as u64);
    let mut written = vec![0; bytes.len()];
    out.read_exact_at(&mut written, 7).unwrap();
    assert!(written == bytes);
}

/// H5: partial progress is an answer, not an error.
#[test]
fn a_file_that_ends_early_answers_the_bytes_read() {
    let bytes = pattern(page_size() + 10, 52);
    let mut kiobuf = arena_list(3);
    assert_eq!(kiobuf.read_from(&file_of(&bytes), 0).unwrap(), bytes.len() as u64);
    assert_eq!(contents(&kiobuf)[..bytes.len()], bytes);
    assert_eq!(kiobuf.read_from(&file_of(&bytes), 1 << 40).unwrap(), 0);
}

#[test]
fn a_shared_list_is_not_read_into() {
    let file = file_of(&pattern(page_size(), 53));
    let mut kiobuf = arena_list(1);
    let snapshot = kiobuf.clone();
    assert!(matches!(kiobuf.read_from(&file, 0), Err(Error::Shared)));
    drop(snapshot);
    let lock = kiobuf.lock(LockWait::No).unwrap();
    assert!(matches!(kiobuf.read_from(&file, 0), Err(Error::Shared)));
    drop(lock);
    // The list is not shared, but the arena is.
    let other = Kiobuf::concat(&[kiobuf.clone()]).unwrap();
    assert!(matches!(kiobuf.read_from(&file, 0), Err(Error::Shared)));
    drop(other);
    let mut twice = kiobuf.clone();
    twice.expand(&kiobuf).unwrap();
    drop(kiobuf);
    assert!(matches!(twice.read_from(&file, 0), Err(Error::Shared)));
    assert!(contents(&twice).iter().all(|&byte| byte == 0));
}

/// Memory that is only borrowed is never written; a hole is EFAULT before anything is transferred.
#[test]
fn lists_that_can_not_be_read_into_are_refused() {
    let file = file_of(&pattern(page_size(), 54));
    let (zero, hole) = (mapped(|kiobuf| kiobuf.map_zero(1)), mapped(|kiobuf| kiobuf.map_hole(1)));
    for part in [window(&[1; 10], 0), zero, mapped(|kiobuf| kiobuf.map_file(&file, 0..10))] {
        let mut kiobuf = Kiobuf::concat(&[arena_list(1), part]).unwrap();
        assert!(matches!(kiobuf.read_from(&file, 0), Err(Error::Invalid { value: 1, .. })));
        assert!(contents(&kiobuf)[..page_size()].iter().all(|&byte| byte == 0));
    }
    let mut kiobuf = Kiobuf::concat(&[arena_list(2), hole]).unwrap();
    let at = 2 * page_size() as u64;
    assert!(matches!(kiobuf.read_from(&file, 0), Err(Error::Fault { at: found, .. }) if found == at));
    let out = tempfile::tempfile().unwrap();
    assert!(matches!(kiobuf.write_to(&out, 0), Err(Error::Fault { at: found, .. }) if found == at));
    assert_eq!(out.metadata().unwrap().len(), 0);
}

/// The data of every kind of extent is written, without slack; more of it than a bounce buffer holds.
#[test]
fn all_kinds_of_pages_are_written() {
    let bytes: Vec<_> = (0..5).map(|seed| pattern(100_000 + seed, 55 + seed as u64)).collect();
    let mapped_file = file_of(&bytes[3]);
    // SAFETY: nobody writes to the file.
    let mmap = unsafe { memmap2::Mmap::map(&mapped_file) }.unwrap();
    let kiobuf = Kiobuf::concat(&[
        window(&bytes[0], 100),
        mapped(|kiobuf| kiobuf.map_zero(40)),
        mapped(|kiobuf| kiobuf.map_bytes(bytes[1].clone())),
        mapped(|kiobuf| kiobuf.map_file(&file_of(&bytes[2]), 5..bytes[2].len() as u64)),
        mapped(|kiobuf| kiobuf.map_mmap(mmap)),
        mapped(|kiobuf| kiobuf.map_source(Arc::new(Bytes(bytes[4].clone())), bytes[4].len() as u64)),
    ])
    .unwrap();
    let zeros = vec![0; 40 * page_size()];
    let expected = [&bytes[0], &zeros, &bytes[1], &bytes[2][5..], &bytes[3], &bytes[4]].concat();
    assert_eq!(kiobuf.length(), expected.len() as u64);
    let out = tempfile::tempfile().unwrap();
    assert_eq!(kiobuf.write_to(&out, 3).unwrap(), expected.len() as u64);
    let mut written = vec![0; expected.len()];
    out.read_exact_at(&mut written, 3).unwrap();
    assert!(written == expected);
    assert_eq!(out.metadata().unwrap().len(), 3 + expected.len() as u64);
}

/// A part that fails ends the transfer: an error if it is the first, the bytes before it if not.
#[test]
fn a_truncated_part_ends_the_write() {
    let file = file_of(&pattern(10, 60));
    let gone = mapped(|kiobuf| kiobuf.map_file(&file, 0..10));
    file.set_len(5).unwrap();
    let out = tempfile::tempfile().unwrap();
    let error = gone.write_to(&out, 0).unwrap_err();
    assert!(matches!(error, Error::Fault { at: 5, .. }), "{error:?}");
    let kiobuf = Kiobuf::concat(&[window(&[7; 20], 0), gone]).unwrap();
    assert_eq!(kiobuf.write_to(&out, 0).unwrap(), 20);
}

#[test]
fn transfers_that_can_not_be_are_typed_errors() {
    let mut kiobuf = arena_list(1);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    let write_only = File::create(&path).unwrap();
    let read_only = File::open(&path).unwrap();
    assert_eq!(kiobuf.read_from(&write_only, 0).unwrap_err().errno(), Errno::EBADF);
    assert_eq!(kiobuf.write_to(&read_only, 0).unwrap_err().errno(), Errno::EBADF);
    for offset in [i64::MAX as u64, u64::MAX] {
        assert_eq!(kiobuf.read_from(&read_only, offset).unwrap_err().errno(), Errno::EOVERFLOW);
        assert_eq!(kiobuf.write_to(&write_only, offset).unwrap_err().errno(), Errno::EOVERFLOW);
    }
}
