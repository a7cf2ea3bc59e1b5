//! Compressed images: every page right, read by other tools, and damage of every kind told or refused.
#![allow(clippy::single_range_in_vec_init, reason = "lists of ranges, some of one")]
#![cfg(feature = "zstd")]

mod support;

use std::io::{Cursor, Error as IoError, ErrorKind, Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex, RwLock};

use kiomap::{
    Error, ExtentKind, FnSource, Kiobuf, MadeImage, PageSource, ReadSource, SourceFault, ZstdImage, ZstdOptions,
    page_size,
};
use nix::errno::Errno;
use sha2::{Digest, Sha256};
use support::contents::{assert_holds, contents, right_or_sigbus};
use support::{DEADLINE, alone, attached, engine_builder, eventually, within};
use twox_hash::XxHash64;

/// An image of contents with small frames.
fn image_of(bytes: &[u8], frame_bytes: usize) -> Vec<u8> {
    let mut image = Vec::new();
    ZstdImage::make(bytes, &mut image, &ZstdOptions::new().frame_bytes(frame_bytes), |_| {}).unwrap();
    image
}

fn open(image: Vec<u8>) -> kiomap::Result<ZstdImage> {
    ZstdImage::over(Arc::new(ReadSource::new(Cursor::new(image))?))
}

fn fault(error: &Error) -> SourceFault {
    match error {
        Error::Source { fault, .. } => *fault,
        other => panic!("{other}"),
    }
}

/// A large file that is no random data, or as much of it as a test takes.
fn real_file() -> (PathBuf, Vec<u8>) {
    const LEN: u64 = 24 << 20;
    let folders = ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib"];
    let files = folders.iter().filter_map(|folder| std::fs::read_dir(folder).ok()).flatten().filter_map(|entry| {
        let path = entry.ok()?.path();
        let meta = std::fs::symlink_metadata(&path).ok()?;
        meta.is_file().then_some((meta.len(), path))
    });
    // This program itself is always there.
    let (_, path) = files.max().unwrap_or_else(|| (0, std::env::current_exe().unwrap()));
    let mut bytes = Vec::new();
    std::fs::File::open(&path).unwrap().take(LEN).read_to_end(&mut bytes).unwrap();
    (path, bytes)
}

/// A real file, compressed, pages in with every page verified by its SHA-256; the image knows its own digest.
#[test]
fn an_image_of_a_real_file_pages_in_with_every_page_verified() {
    needs_sources!();
    alone("an_image_of_a_real_file_pages_in_with_every_page_verified", || {
        let (path, bytes) = real_file();
        let image_path = tempfile::NamedTempFile::new().unwrap();
        let file = image_path.reopen().unwrap();
        let mut told = 0;
        let made = ZstdImage::make(&bytes[..], file, &ZstdOptions::new().level(1), |done| told = done).unwrap();
        assert_eq!((made.len_bytes, told), (bytes.len() as u64, bytes.len() as u64), "{}", path.display());
        assert_eq!(made.image_bytes, image_path.path().metadata().unwrap().len());
        let image = Arc::new(ZstdImage::open(image_path.path()).unwrap());
        assert_eq!(image.granule_bytes(), 128 << 10);
        assert_eq!(image.contents_sha256(), Some(made.contents_sha256));
        assert!(image.identity().unwrap().ends_with(&made.contents_sha256));
        image.verify(|_| {}).unwrap();
        let engine = engine_builder().build().unwrap();
        let (_vmap, region) = attached(&engine, &image.list().unwrap());
        assert_holds(&region, &bytes);
    });
}

/// Contents of any length, in frames of any size, come back by any range.
#[test]
fn any_range_of_any_image_is_right() {
    for (len, frame_bytes) in
        [(1, 4096), (4096, 4096), (4097, 8192), (500_000, 4096), (500_000, 1 << 16), (500_000, 1 << 22)]
    {
        let bytes = contents(len, len as u64);
        let image = open(image_of(&bytes, frame_bytes)).unwrap();
        // No larger than the one frame that there may be.
        let granule = frame_bytes.min(len.next_power_of_two().max(page_size()));
        assert_eq!((image.len_bytes(), image.granule_bytes()), (Some(len as u64), granule));
        assert_eq!(image.nr_frames(), len.div_ceil(frame_bytes) as u64);
        let points = [0, 1, 4095, 4096, 65_535, 65_536, 70_000, 262_144, 499_999, len];
        for start in points.into_iter().filter(|&start| start <= len) {
            for end in points.into_iter().filter(|&end| (start..=len).contains(&end)) {
                let mut buf = vec![0xee; end - start];
                image.read_at(start as u64, &mut buf).unwrap();
                assert!(buf == bytes[start..end], "{start}..{end} of {len} in frames of {frame_bytes}");
            }
        }
        assert_eq!(image.read_at(len as u64, &mut [0]).unwrap_err().kind(), ErrorKind::UnexpectedEof);
        assert_eq!(image.read_at(u64::MAX, &mut [0]).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }
}

/// Frames of zeros are zeros of the list, and nobody reads them; all else is read.
#[test]
fn frames_of_zeros_are_not_read() {
    needs_sources!();
    alone("frames_of_zeros_are_not_read", || {
        let (page, frame) = (page_size(), 4 * page_size());
        let mut bytes = vec![0; 20 * frame + 5 * page + 3];
        // Data in frames 3, 4, 9 (a byte of it) and in the last, which is short.
        let tail = bytes.len() - 1;
        bytes[3 * frame..5 * frame]
            .copy_from_slice(&contents(2 * frame, 7).iter().map(|byte| byte | 1).collect::<Vec<_>>());
        bytes[10 * frame - 1] = 1;
        bytes[tail] = 9;
        let (image, reads) = (image_of(&bytes, frame), Arc::new(Mutex::new(Vec::<Range<u64>>::new())));
        let (len, noted) = (image.len() as u64, Arc::clone(&reads));
        let storage = FnSource::new(len, move |at, buf: &mut [u8]| {
            noted.lock().unwrap().push(at..at + buf.len() as u64);
            buf.copy_from_slice(&image[at as usize..at as usize + buf.len()]);
            Ok(())
        });
        let image = Arc::new(ZstdImage::over(Arc::new(storage)).unwrap());
        let list = image.list().unwrap();
        let extents: Vec<_> = list.extents().map(|extent| (extent.kind, extent.first_page, extent.nr_pages)).collect();
        let (data, zero) = (ExtentKind::Source, ExtentKind::Zero);
        assert_eq!(
            extents,
            [(zero, 0, 12), (data, 12, 8), (zero, 20, 16), (data, 36, 4), (zero, 40, 44), (data, 84, 2)]
        );
        assert_eq!(image.zero_ranges().map(|run| run.end - run.start).sum::<u64>(), 18 * frame as u64);
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let (_vmap, region) = attached(&engine, &list);
        reads.lock().unwrap().clear();
        for n in (0..12).chain(20..36).chain(40..84) {
            assert_eq!(support::read_page(&region, n), Ok(0));
        }
        assert!(reads.lock().unwrap().is_empty());
        assert_holds(&region, &bytes);
        assert!(!reads.lock().unwrap().is_empty());
    });
}

/// What this library makes the tool `zstd` reads: the map and the table are passed over.
#[test]
fn the_tool_zstd_reads_an_image() {
    let bytes = contents(700_000, 11);
    let image = image_of(&bytes, 1 << 15);
    let tool = Command::new("zstd").args(["-d", "-c"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut tool = match tool {
        Ok(tool) => tool,
        Err(error) => skip!("the tool zstd can't be run: {error}"),
    };
    let mut stdin = tool.stdin.take().unwrap();
    let writer = std::thread::spawn(move || stdin.write_all(&image));
    let output = within(DEADLINE, move || tool.wait_with_output().unwrap());
    writer.join().unwrap().unwrap();
    assert!(output.status.success());
    assert!(output.stdout == bytes);
}

/// What this library makes another reader of the format reads by its table, and the other way round: frames without checksums,
/// of sizes that are no power of two.
#[test]
fn images_of_another_library_page_in() {
    needs_sources!();
    alone("images_of_another_library_page_in", || {
        let bytes = contents(300_000, 12);
        let mut decoder = zeekstd::Decoder::new(Cursor::new(image_of(&bytes, 1 << 14))).unwrap();
        let mut read = Vec::new();
        decoder.read_to_end(&mut read).unwrap();
        assert!(read == bytes);
        for (size, granule) in [(10_000, 16_384), (1 << 16, 1 << 16), (1000, page_size()), (1 << 20, 1 << 19)] {
            let mut other = Vec::new();
            let policy = zeekstd::FrameSizePolicy::Uncompressed(size);
            let mut encoder = zeekstd::EncodeOptions::new().frame_size_policy(policy).into_encoder(&mut other).unwrap();
            encoder.write_all(&bytes).unwrap();
            encoder.finish().unwrap();
            let image = Arc::new(open(other).unwrap());
            assert_eq!((image.granule_bytes(), image.contents_sha256()), (granule, None), "frames of {size}");
            image.verify(|_| {}).unwrap();
            let engine = engine_builder().build().unwrap();
            let (_vmap, region) = attached(&engine, &image.list().unwrap());
            assert_holds(&region, &bytes);
        }
    });
}

/// Frames larger than a granule can be are read too: several granules have one frame.
#[test]
fn frames_larger_than_a_granule_are_read() {
    let mut bytes = vec![0; 7 << 20];
    bytes[6 << 20] = 7;
    let mut other = Vec::new();
    let policy = zeekstd::FrameSizePolicy::Uncompressed(6 << 20);
    let mut encoder = zeekstd::EncodeOptions::new().frame_size_policy(policy).into_encoder(&mut other).unwrap();
    encoder.write_all(&bytes).unwrap();
    encoder.finish().unwrap();
    let image = open(other).unwrap();
    assert_eq!(image.granule_bytes(), kiomap::GRANULE_MAX_BYTES);
    let mut read = vec![1; 3 << 20];
    image.read_at(4 << 20, &mut read).unwrap();
    assert!(read == bytes[4 << 20..]);
}

/// A table, as its bytes are defined: entries of a compressed and a decompressed length, and perhaps of a checksum.
fn table(entries: &[(u32, u32, Option<u32>)], nr_frames: u32, descriptor: u8) -> Vec<u8> {
    let body: Vec<u8> = entries
        .iter()
        .flat_map(|&(packed, len, sum)| [Some(packed), Some(len), sum].into_iter().flatten().flat_map(u32::to_le_bytes))
        .collect();
    let mut table = 0x184D_2A5E_u32.to_le_bytes().to_vec();
    table.extend((body.len() as u32 + 9).to_le_bytes());
    table.extend(body);
    table.extend(nr_frames.to_le_bytes());
    table.push(descriptor);
    table.extend(0x8F92_EAB1_u32.to_le_bytes());
    table
}

/// Checksums that only the table has are verified.
#[test]
fn checksums_of_the_table_are_verified() {
    let bytes = contents(100_000, 13);
    let frames: Vec<_> = bytes.chunks(8192).collect();
    let packed: Vec<Vec<u8>> = frames
        .iter()
        .map(|frame| {
            let mut packed = Vec::with_capacity(zstd_safe::compress_bound(frame.len()));
            zstd_safe::compress(&mut packed, frame, 3).unwrap();
            packed
        })
        .collect();
    let image = |bent: Option<usize>| {
        let entries: Vec<_> = (0..frames.len())
            .map(|n| {
                let sum = XxHash64::oneshot(0, frames[n]) as u32 ^ u32::from(bent == Some(n));
                (packed[n].len() as u32, frames[n].len() as u32, Some(sum))
            })
            .collect();
        let mut image = packed.concat();
        image.extend(table(&entries, frames.len() as u32, 0x80));
        open(image).unwrap()
    };
    let mut read = vec![0; bytes.len()];
    image(None).read_at(0, &mut read).unwrap();
    assert!(read == bytes);
    let bent = image(Some(5));
    for n in 0..frames.len() {
        let outcome = bent.read_at(n as u64 * 8192, &mut read[..frames[n].len()]);
        assert_eq!(outcome.as_ref().err().map(IoError::kind), (n == 5).then_some(ErrorKind::InvalidData), "{n}");
    }
    assert_eq!(fault(&bent.verify(|_| {}).unwrap_err()), SourceFault::Corrupt);
}

/// Tables that are made to hurt are refused before anything is allocated for them.
#[test]
fn hostile_tables_are_refused() {
    use SourceFault::{Corrupt, Empty, NotThatFormat, TooLarge};
    let frame = |len: usize| {
        let mut packed = Vec::with_capacity(zstd_safe::compress_bound(len));
        zstd_safe::compress(&mut packed, &vec![7; len], 1).unwrap();
        packed
    };
    let small = frame(4096);
    let size = small.len() as u32;
    let cases: [(&str, Vec<u8>, SourceFault); 15] = [
        ("2^32 - 1 frames", table(&[], u32::MAX, 0), TooLarge),
        ("as many as the format allows", table(&[], 0x0800_0000, 0), TooLarge),
        ("more than there is room for", table(&[(size, 4096, None)], 1000, 0), Corrupt),
        ("fewer than listed", table(&[(size, 4096, None), (0, 0, None)], 1, 0), Corrupt),
        ("no frames", table(&[], 0, 0), Corrupt),
        ("a frame of nothing", table(&[(size, 0, None)], 1, 0), Empty),
        ("a frame of 4 GiB", table(&[(size, u32::MAX, None)], 1, 0), TooLarge),
        ("a frame of 16 MiB and a byte", table(&[(size, (1 << 24) + 1, None)], 1, 0), TooLarge),
        ("more bytes than there are", table(&[(size + 1, 4096, None)], 1, 0), Corrupt),
        ("fewer bytes than there are", table(&[(size - 1, 4096, None)], 1, 0), Corrupt),
        ("a frame of no bytes", table(&[(0, 4096, None), (size, 4096, None)], 2, 0), Corrupt),
        ("reserved bits", table(&[(size, 4096, None)], 1, 0x04), Corrupt),
        ("checksums that are not there", table(&[(size, 4096, None)], 1, 0x80), Corrupt),
        ("sums that would wrap in 32 bits", table(&[(u32::MAX, 4096, None), (size + 1, 4096, None)], 2, 0), Corrupt),
        ("no table", vec![1; 40], NotThatFormat),
    ];
    for (name, table, expected) in cases {
        let mut image = small.clone();
        image.extend(table);
        let refused = open(image).map(drop).unwrap_err();
        assert_eq!(fault(&refused), expected, "{name}: {refused}");
    }
    assert_eq!(fault(&open(vec![1; 3]).map(drop).unwrap_err()), NotThatFormat);
    // A table that is right in itself, of frames that are not what it says: an error of the read.
    for (packed, len) in [(frame(5000), 4096), (frame(3000), 4096), (vec![0; 30], 4096)] {
        let mut image = packed.clone();
        image.extend(table(&[(packed.len() as u32, len, None)], 1, 0));
        let failed = open(image).unwrap().read_at(0, &mut [0; 4096]).unwrap_err();
        assert_eq!(failed.kind(), ErrorKind::InvalidData, "{failed}");
    }
    // Far more bytes than a frame of that length can take are not read into memory.
    let mut image = vec![0; 1 << 20];
    image.extend(table(&[(1 << 20, 4096, None)], 1, 0));
    assert_eq!(fault(&open(image).map(drop).unwrap_err()), Corrupt);
    let unknown = ZstdImage::over(Arc::new(Unsized)).map(drop).unwrap_err();
    assert!(matches!(unknown, Error::Invalid { what: "the length of the source", .. }), "{unknown}");
}

/// An image of frames of the same length, whose map names runs of them as zeros: what a hostile program makes, with all its
/// checksums right.
fn with_map(frames: &[&[u8]], len: u32, runs: &[Range<u32>]) -> Vec<u8> {
    const NAME: &[u8] = b"kiomap\x00\x01";
    let map_bytes = 8 + 128 + 8 * runs.len();
    let entries: Vec<_> = frames.iter().map(|frame| (frame.len() as u32, len, None)).collect();
    let entries = [&entries[..], &[(map_bytes as u32, 0, None)]].concat();
    let table = table(&entries, entries.len() as u32, 0);
    let mut map = 0x184D_2A5B_u32.to_le_bytes().to_vec();
    map.extend((map_bytes as u32 - 8).to_le_bytes());
    map.extend(NAME);
    map.extend((frames.len() as u64 * u64::from(len)).to_le_bytes());
    map.extend(len.to_le_bytes());
    map.extend([7; 32]);
    map.extend(Sha256::digest(&table));
    map.extend((runs.len() as u32).to_le_bytes());
    map.extend(runs.iter().flat_map(|run| [run.start, run.end - run.start]).flat_map(u32::to_le_bytes));
    let digest = Sha256::digest(&map);
    map.extend(digest);
    map.extend(NAME);
    [frames.concat(), map, table].concat()
}

fn packed(contents: &[u8]) -> Vec<u8> {
    let mut packed = Vec::with_capacity(zstd_safe::compress_bound(contents.len()));
    zstd_safe::compress(&mut packed, contents, 1).unwrap();
    packed
}

/// However many runs of zeros an image names, its list has a limit: the longest runs are zeros, the others are read.
#[test]
fn the_list_of_an_image_with_many_runs_of_zeros_has_a_limit() {
    const RUNS: u32 = 66_000;
    let (page, long) = (page_size() as u64, (7 * RUNS / 10, 13));
    let (data, zeros) = (packed(&vec![7; page_size()]), packed(&vec![0; page_size()]));
    // A frame of data before each run; the runs are of one frame, but for a long one.
    let (mut frames, mut runs) = (Vec::new(), Vec::new());
    for n in 0..RUNS {
        frames.push(&data[..]);
        let (start, len) = (frames.len() as u32, if n == long.0 { long.1 } else { 1 });
        frames.extend((0..len).map(|_| &zeros[..]));
        runs.push(start..start + len);
    }
    let image = Arc::new(open(with_map(&frames, page as u32, &runs)).unwrap());
    assert_eq!(image.zero_ranges().count(), RUNS as usize);
    let list = image.list().unwrap();
    assert_eq!(list.nr_pages(), frames.len() as u64);
    let zero: Vec<_> = list.extents().filter(|extent| extent.kind == ExtentKind::Zero).collect();
    assert_eq!(zero.len(), 1 << 16);
    assert!(zero.iter().any(|run| run.nr_pages == u64::from(long.1) && run.first_page == u64::from(2 * long.0 + 1)));
    let all: Vec<_> = runs.iter().map(|run| (u64::from(run.start), u64::from(run.end - run.start))).collect();
    assert!(zero.iter().all(|run| all.binary_search(&(run.first_page, run.nr_pages)).is_ok()));
}

/// Runs of zeros that begin within a page are refused, with all else: the list would be of other pages than the image.
#[test]
fn a_map_of_frames_that_are_no_power_of_two_is_refused() {
    let len = page_size() + 1000;
    let (data, zeros) = (packed(&vec![7; len]), packed(&vec![0; len]));
    let image = with_map(&[&data, &zeros, &data], len as u32, std::slice::from_ref(&(1..2)));
    assert_eq!(fault(&open(image).map(drop).unwrap_err()), SourceFault::Corrupt);
    let (data, zeros) = (packed(&vec![7; 8192]), packed(&vec![0; 8192]));
    let image = Arc::new(open(with_map(&[&data, &zeros, &data], 8192, std::slice::from_ref(&(1..2)))).unwrap());
    assert!(image.zero_ranges().eq(std::iter::once(8192..16_384)));
}

/// A source that does not know its length.
struct Unsized;

impl PageSource for Unsized {
    fn read_at(&self, _: u64, _: &mut [u8]) -> std::io::Result<()> {
        Err(ErrorKind::Unsupported.into())
    }
}

/// Reads every page of an image that may be damaged: right bytes, or an error. Returns how many were right.
#[track_caller]
fn right_or_error(image: &ZstdImage, bytes: &[u8], what: &str) -> usize {
    let mut buf = vec![0; page_size()];
    (0..bytes.len())
        .step_by(page_size())
        .filter(|&at| {
            let expected = &bytes[at..(at + page_size()).min(bytes.len())];
            let buf = &mut buf[..expected.len()];
            let read = image.read_at(at as u64, buf).is_ok();
            assert!(!read || buf == expected, "{what}: byte {at} is read, and is another");
            read
        })
        .count()
}

/// Every bit of the map, the table and the footer, the head of every frame, and bits that a seed picks everywhere else: what is
/// turned is noticed, or changes nothing. Cut off anywhere, an image is refused when it is opened.
#[test]
fn damage_anywhere_gives_right_bytes_or_an_error() {
    let bytes = contents(16 * page_size() + 77, 14);
    let image = image_of(&bytes, 2 * page_size());
    let frames = open(image.clone()).unwrap().nr_frames() as usize;
    let magic = 0xfd2f_b528_u32.to_le_bytes();
    let heads: Vec<usize> = (0..image.len()).filter(|&at| image[at..].starts_with(&magic)).collect();
    assert!(heads.len() >= frames);
    // The map of no more than nine runs, and the table.
    let tail = image.len() - (8 + 8 + 17 + 12 * (frames + 1) + 200)..image.len();
    let mut state = 15_u64;
    let picked: Vec<usize> = (0..1500)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as usize % (8 * image.len())
        })
        .collect();
    let all = heads.iter().flat_map(|&at| 8 * at..8 * (at + 14)).chain(8 * tail.start..8 * tail.end).chain(picked);
    let (mut refused, mut noticed, mut harmless) = (0, 0, 0);
    for bit in all {
        let mut bent = image.clone();
        bent[bit / 8] ^= 1 << (bit % 8);
        match open(bent) {
            Err(error) => {
                assert!(matches!(error, Error::Source { .. }), "bit {bit}: {error}");
                refused += 1;
            }
            Ok(damaged) => match right_or_error(&damaged, &bytes, &format!("bit {bit}")) {
                17 => harmless += 1,
                _ => noticed += 1,
            },
        }
    }
    // Nearly all of the tail is checked when the image is opened; a bit within a frame is noticed when it is read. What is
    // harmless names what nobody reads: the name of the map, the bit of a frame's head that zstd leaves unused.
    assert!(
        refused > 2000 && noticed > 1000 && harmless < 400,
        "{refused} refused, {noticed} noticed, {harmless} harmless"
    );
    for len in (0..image.len()).step_by(97).chain(image.len() - 300..image.len()) {
        let cut = image[..len].to_vec();
        let refused = if len == 0 {
            ReadSource::new(Cursor::new(cut)).map(drop).unwrap_err()
        } else {
            open(cut).map(drop).unwrap_err()
        };
        assert!(matches!(refused, Error::Source { .. }), "cut to {len}: {refused}");
    }
}

/// Damage in several places at once, most of it at the end, where one can hide another: a table that shifts the frames, and a map
/// that would tell. Never the bytes of another place.
#[test]
fn damage_in_several_places_gives_right_bytes_or_an_error() {
    let bytes: Vec<u8> = contents(15 * page_size() - 9, 24);
    let image = image_of(&bytes, page_size());
    let mut state = 25_u64;
    let mut below = |limit: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % limit
    };
    let (mut opened, mut refused) = (0, 0);
    for case in 0..6000 {
        let mut bent = image.clone();
        for _ in 0..1 + below(4) {
            let at = if below(2) == 0 { bent.len() - 1 - below(bent.len().min(80)) } else { below(bent.len()) };
            match below(8) {
                0..4 => bent[at] ^= 1 << below(8),
                4..6 => bent[at] = below(256) as u8,
                6 => bent[at..].iter_mut().take(below(9)).for_each(|byte| *byte = 0xff),
                _ => bent.truncate(at + 1),
            }
        }
        match open(bent) {
            Err(error) => {
                assert!(matches!(error, Error::Source { .. }), "case {case}: {error}");
                refused += 1;
            }
            Ok(damaged) => {
                // What it holds may be said to be longer, or shorter.
                right_or_error(&damaged, &bytes, &format!("case {case}"));
                opened += 1;
            }
        }
    }
    assert!(opened > 500 && refused > 3000, "{opened} opened, {refused} refused");
}

/// Through an engine: what is damaged is SIGBUS, and all else is served; a frame takes its own pages with it and no others.
#[test]
fn a_damaged_frame_is_sigbus_for_its_pages_only() {
    needs_sources!();
    alone("a_damaged_frame_is_sigbus_for_its_pages_only", || {
        let bytes: Vec<u8> = contents(64 * page_size(), 16).iter().map(|byte| byte | 1).collect();
        let image = image_of(&bytes, 4 * page_size());
        let mut state = 17_u64;
        let mut sigbus = 0;
        for _ in 0..40 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let mut bent = image.clone();
            // Within the frames.
            let at = (state >> 33) as usize % (image.len() - 600);
            bent[at] ^= (state >> 20) as u8 | 1;
            let engine = engine_builder().build().unwrap();
            let image = Arc::new(open(bent).unwrap());
            let (_vmap, region) = attached(&engine, &image.list().unwrap());
            let (right, refused) = right_or_sigbus(&region, &bytes);
            assert_eq!(right + refused, 64);
            assert!([0, 4].contains(&refused), "{refused} pages are SIGBUS for a byte at {at}");
            sigbus += refused;
        }
        assert!(sigbus >= 4 * 35, "{sigbus}");
    });
}

/// An image that another takes the place of, under a source that is open: never bytes of the other one.
#[test]
fn an_image_that_is_replaced_gives_no_byte_of_the_other() {
    let (one, two) = (contents(80 * page_size(), 18), contents(80 * page_size(), 19));
    let [one_image, two_image] = [&one, &two].map(|bytes| image_of(bytes, 4 * page_size()));
    let held = Arc::new(Mutex::new(one_image.clone()));
    let shown = Arc::clone(&held);
    let storage = FnSource::new(one_image.len() as u64, move |at, buf: &mut [u8]| {
        let held = shown.lock().unwrap();
        let bytes = held.get(at as usize..at as usize + buf.len()).ok_or(ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(bytes);
        Ok(())
    });
    let image = ZstdImage::over(Arc::new(storage)).unwrap();
    assert_eq!(right_or_error(&image, &one, "before"), 80);
    *held.lock().unwrap() = two_image;
    let right = right_or_error(&image, &one, "after");
    assert!(right < 40, "{right} pages of an image that is gone");
    assert_ne!(image.identity(), open(held.lock().unwrap().clone()).unwrap().identity());
}

/// Bytes that can't be compressed: all frames of their images are of one size, and lie in the same places.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as u8
    })
    .take(len)
    .collect()
}

/// An image of the same shape that is written over an open one, in place: no byte of it is shown.
#[test]
fn an_image_of_the_same_shape_that_is_written_over_gives_no_byte_of_it() {
    needs_sources!();
    alone("an_image_of_the_same_shape_that_is_written_over_gives_no_byte_of_it", || {
        let (one, two) = (noise(80 * page_size(), 61), noise(80 * page_size(), 62));
        let [one_image, two_image] = [&one, &two].map(|bytes| image_of(bytes, 4 * page_size()));
        assert_eq!(one_image.len(), two_image.len());
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&one_image).unwrap();
        let image = Arc::new(ZstdImage::open(file.path()).unwrap());
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let (_vmap, region) = attached(&engine, &image.list().unwrap());
        assert!(support::read_page(&region, 0).is_ok());
        file.as_file().write_all_at(&two_image, 0).unwrap();
        // The frame of the first touch.
        assert_eq!(right_or_sigbus(&region, &one), (4, 76));
    });
}

/// Frames that are right in themselves, in each other's places: errors of the reads, and of a check.
#[test]
fn frames_in_each_others_places_are_errors() {
    let (frame, bytes) = (4 * page_size(), noise(40 * page_size(), 63));
    let mut image = image_of(&bytes, frame);
    let magic = 0xfd2f_b528_u32.to_le_bytes();
    let packed = (1..).find(|&at| image[at..].starts_with(&magic)).unwrap();
    assert!(image[2 * packed..].starts_with(&magic));
    let (first, second) = image.split_at_mut(packed);
    first.swap_with_slice(&mut second[..packed]);
    let image = open(image).unwrap();
    assert_eq!(right_or_error(&image, &bytes, "swapped"), 32);
    assert_eq!(image.read_at(0, &mut [0; 10]).unwrap_err().kind(), ErrorKind::InvalidData);
    assert_eq!(fault(&image.verify(|_| {}).unwrap_err()), SourceFault::Corrupt);
}

/// An image is one source, whatever zeros lie between its data: no more of its reads are under way than
/// `EngineBuilder::workers` allows for one, and while they hang, another source is served.
#[test]
fn an_image_with_zeros_in_between_is_one_source() {
    const STRETCHES: usize = 80;
    needs_sources!();
    alone("an_image_with_zeros_in_between_is_one_source", || {
        let page = page_size();
        let mut bytes = noise(2 * STRETCHES * page, 64);
        bytes.chunks_mut(page).skip(1).step_by(2).for_each(|zeros| zeros.fill(0));
        let image = image_of(&bytes, page);
        // How many reads there are now, and were at the most; and whether they hang.
        let reads = Arc::new((AtomicU64::new(0), AtomicU64::new(0), RwLock::new(())));
        let (noted, len) = (Arc::clone(&reads), image.len() as u64);
        let storage = FnSource::new(len, move |at, buf: &mut [u8]| {
            let (now, most, gate) = &*noted;
            most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            drop(gate.read().unwrap());
            now.fetch_sub(1, Ordering::SeqCst);
            buf.copy_from_slice(&image[at as usize..at as usize + buf.len()]);
            Ok(())
        });
        let image = Arc::new(ZstdImage::over(Arc::new(storage)).unwrap());
        let list = image.list().unwrap();
        assert_eq!(list.extents().count(), 2 * STRETCHES);
        let engine = engine_builder().workers(2).fault_around_pages(1).build().unwrap();
        let (_vmap, region) = attached(&engine, &list);
        let mut other = Kiobuf::new();
        let sevens = FnSource::new(page as u64, |_, buf: &mut [u8]| {
            buf.fill(7);
            Ok(())
        });
        other.map_source(Arc::new(sevens), page as u64).unwrap();
        let (_other_vmap, other) = attached(&engine, &other);
        let (now, most, gate) = &*reads;
        std::thread::scope(|scope| {
            let hanging = gate.write().unwrap();
            for n in 0..STRETCHES {
                let region = &region;
                scope.spawn(move || support::read_page(region, 2 * n as u64).unwrap());
            }
            eventually("all of them wait", || {
                let space = &engine.snapshot().unwrap().spaces[0];
                (space.pending, space.total) == (0, STRETCHES as u64)
            });
            eventually("as many reads as may be", || now.load(Ordering::SeqCst) == 2);
            assert_eq!(support::read_page(&other, 0), Ok(7));
            drop(hanging);
        });
        assert_eq!(most.load(Ordering::SeqCst), 2);
        assert_holds(&region, &bytes);
    });
}

/// A forked process reads an image that other threads were reading at that moment: their locks are nobody's there.
#[test]
fn a_forked_process_reads_an_image_that_others_were_reading() {
    alone("a_forked_process_reads_an_image_that_others_were_reading", || {
        let bytes = vec![7; 1024 * page_size()];
        let image_bytes = image_of(&bytes, page_size());
        let len = image_bytes.len() as u64;
        let storage = FnSource::new(len, move |at, buf: &mut [u8]| {
            buf.copy_from_slice(&image_bytes[at as usize..at as usize + buf.len()]);
            Ok(())
        });
        let (image, over) = (ZstdImage::over(Arc::new(storage)).unwrap(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            for first in 0..3 {
                let (image, over) = (&image, &over);
                scope.spawn(move || {
                    let mut n = first;
                    while !over.load(Ordering::Relaxed) {
                        image.read_at((n % 1024) * page_size() as u64, &mut vec![0; page_size()]).unwrap();
                        n += 7;
                    }
                });
            }
            // At any moment of theirs: a child that hangs ends all of this at the deadline.
            for _ in 0..1500 {
                let child = support::fork_child(|| {
                    // The allocator's locks are put right in a child, those of the image are as they were.
                    let mut page = vec![0; page_size()];
                    image.read_at(0, &mut page).unwrap();
                    assert!(page == [7].repeat(page_size()));
                });
                support::reap_ok(child);
            }
            over.store(true, Ordering::Relaxed);
        });
    });
}

/// Frames are read and decompressed side by side: as many reads are under way as there are callers.
#[test]
fn frames_are_decompressed_side_by_side() {
    const CALLERS: usize = 4;
    let bytes = contents(32 * page_size(), 20);
    let image = image_of(&bytes, page_size());
    // Passed only when all have come to it.
    let (gate, opened) = (Arc::new(Barrier::new(CALLERS)), Arc::new(AtomicU64::new(0)));
    let (passed, counted, len) = (Arc::clone(&gate), Arc::clone(&opened), image.len() as u64);
    let storage = FnSource::new(len, move |at, buf: &mut [u8]| {
        if counted.load(Ordering::SeqCst) == 1 {
            passed.wait();
        }
        buf.copy_from_slice(&image[at as usize..at as usize + buf.len()]);
        Ok(())
    });
    let image = Arc::new(ZstdImage::over(Arc::new(storage)).unwrap());
    opened.store(1, Ordering::SeqCst);
    within(DEADLINE, move || {
        std::thread::scope(|scope| {
            for caller in 0..CALLERS {
                let (image, bytes) = (&image, &bytes);
                scope.spawn(move || {
                    let mut buf = vec![0; page_size()];
                    for n in (0..32).filter(|n| n % CALLERS == caller) {
                        image.read_at((n * page_size()) as u64, &mut buf).unwrap();
                        assert!(buf == bytes[n * page_size()..(n + 1) * page_size()]);
                    }
                });
            }
        });
    });
}

/// A storage that fails, is short, or panics fails the page; whether opening or reading, with the cause.
#[test]
fn a_storage_that_fails_is_an_error_of_its_page() {
    let bytes = contents(40 * page_size(), 21);
    let image = image_of(&bytes, page_size());
    let failing = Arc::new(AtomicU64::new(0));
    let (shown, len) = (Arc::clone(&failing), image.len() as u64);
    let storage = Arc::new(FnSource::new(len, move |at, buf: &mut [u8]| {
        if shown.load(Ordering::SeqCst) == 1 {
            return Err(IoError::from_raw_os_error(libc::EREMOTEIO));
        }
        buf.copy_from_slice(&image[at as usize..at as usize + buf.len()]);
        Ok(())
    }));
    let image = ZstdImage::over(Arc::clone(&storage) as _).unwrap();
    let mut page = vec![0; page_size()];
    image.read_at(0, &mut page).unwrap();
    failing.store(1, Ordering::SeqCst);
    assert_eq!(image.read_at(0, &mut page).unwrap_err().raw_os_error(), Some(libc::EREMOTEIO));
    let refused = ZstdImage::over(storage).map(drop).unwrap_err();
    assert_eq!((fault(&refused), refused.errno()), (SourceFault::Io(Errno::EREMOTEIO), Errno::EREMOTEIO));
}

/// Making an image: a full disk, a file that can't be read, nothing to read, and settings out of range are told by name.
#[test]
fn what_keeps_an_image_from_being_made_is_told() {
    struct Failing(u64);
    impl Read for Failing {
        fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
            self.0 += buf.len() as u64;
            if self.0 > 1 << 20 { Err(IoError::from_raw_os_error(libc::EIO)) } else { Ok(buf.len()) }
        }
    }
    let make = |read: &mut dyn Read, write: &mut dyn Write, options: &ZstdOptions| -> kiomap::Result<MadeImage> {
        ZstdImage::make(read, write, options, |_| {})
    };
    let (options, mut full) = (ZstdOptions::new(), std::fs::File::options().write(true).open("/dev/full").unwrap());
    let refused = make(&mut &contents(1 << 20, 22)[..], &mut full, &options).unwrap_err();
    assert_eq!(refused.errno(), Errno::ENOSPC, "{refused}");
    let refused = make(&mut Failing(0), &mut Vec::new(), &options).unwrap_err();
    assert_eq!(refused.errno(), Errno::EIO, "{refused}");
    let refused = make(&mut &[][..], &mut Vec::new(), &options).unwrap_err();
    assert_eq!(refused.errno(), Errno::ENODATA, "{refused}");
    for frame_bytes in [0, 1, 2048, 5000, 1 << 23, usize::MAX] {
        let refused = make(&mut &[1][..], &mut Vec::new(), &options.clone().frame_bytes(frame_bytes)).unwrap_err();
        assert!(matches!(refused, Error::Invalid { value, .. } if value == frame_bytes as u64), "{refused}");
    }
    let refused = make(&mut &[1][..], &mut Vec::new(), &options.clone().level(23)).unwrap_err();
    assert!(matches!(refused, Error::Invalid { value: 23, .. }), "{refused}");
    for level in [-5, 1, 22] {
        let mut image = Vec::new();
        make(&mut &[7; 9000][..], &mut image, &options.clone().level(level)).unwrap();
        open(image).unwrap().verify(|_| {}).unwrap();
    }
}

/// A list made of an image keeps it; a plain list of it reads the zeros too, and right.
#[test]
fn an_image_is_a_source_like_any_other() {
    needs_sources!();
    alone("an_image_is_a_source_like_any_other", || {
        let bytes = contents(50 * page_size() + 9, 23);
        let image = open(image_of(&bytes, 1 << 14)).unwrap();
        let mut list = Kiobuf::new();
        list.map_source(Arc::new(image), bytes.len() as u64).unwrap();
        let engine = engine_builder().build().unwrap();
        let (_vmap, region) = attached(&engine, &list);
        std::thread::scope(|scope| (0..3).for_each(|_| drop(scope.spawn(|| assert_holds(&region, &bytes)))));
    });
}
