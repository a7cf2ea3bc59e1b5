//! What the fuzzer has found worth keeping, and what chance makes of it, without the fuzzer.

#[cfg(feature = "firecracker")]
#[path = "fuzz/entry.rs"]
mod entry;

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, RngAlgorithm, RngSeed, TestRunner};

/// The corpus of a target, by file name.
fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target);
    let mut files: Vec<_> = fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.unwrap())
        .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
        .collect();
    files.sort();
    files
}

/// Files whose names begin with `good` are accepted, and no others; none of them is too much for a target.
#[track_caller]
fn run(target: &str, entry: fn(&[u8]) -> bool) {
    let files = corpus(target);
    for (name, bytes) in &files {
        assert_eq!(entry(bytes), name.starts_with("good"), "{name}");
    }
    assert!(files.iter().any(|(name, _)| name.starts_with("good")), "{target}");
    assert!(files.len() > 20, "{target} has {} files", files.len());
}

/// Changes to bytes.
#[derive(Debug, Clone)]
enum Change {
    Set(Index, u8),
    Flip(Index, u8),
    Insert(Index, Vec<u8>),
    Remove(Index, usize),
    /// Bytes from here once more there.
    Copy(Index, Index, usize),
    Cut(Index),
}

/// A change. What means something in a message comes in more often than anything else.
fn change(words: &'static [&'static [u8]]) -> impl Strategy<Value = Change> {
    let word = prop::sample::select(words).prop_map(<[u8]>::to_vec);
    let bytes = prop_oneof![3 => word, 1 => prop::collection::vec(any::<u8>(), 1..9)];
    prop_oneof![
        (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Change::Set(at, byte)),
        (any::<Index>(), 0..8u8).prop_map(|(at, bit)| Change::Flip(at, bit)),
        (any::<Index>(), bytes).prop_map(|(at, bytes)| Change::Insert(at, bytes)),
        (any::<Index>(), 1..20usize).prop_map(|(at, len)| Change::Remove(at, len)),
        (any::<Index>(), any::<Index>(), 1..60usize).prop_map(|(from, to, len)| Change::Copy(from, to, len)),
        any::<Index>().prop_map(Change::Cut),
    ]
}

fn changed(mut bytes: Vec<u8>, changes: &[Change]) -> Vec<u8> {
    for change in changes {
        let len = bytes.len();
        // A place in the bytes, or behind them.
        let place = |at: &Index| at.index(len + 1);
        match change {
            Change::Set(at, byte) if len > 0 => bytes[at.index(len)] = *byte,
            Change::Flip(at, bit) if len > 0 => bytes[at.index(len)] ^= 1 << bit,
            Change::Set(..) | Change::Flip(..) => {}
            Change::Insert(at, new) => drop(bytes.splice(place(at)..place(at), new.iter().copied())),
            Change::Remove(at, nr) => drop(bytes.drain(place(at)..(place(at) + nr).min(len))),
            Change::Copy(from, to, nr) => {
                let copied = bytes[place(from)..(place(from) + nr).min(len)].to_vec();
                bytes.splice(place(to)..place(to), copied);
            }
            Change::Cut(at) => bytes.truncate(place(at)),
        }
    }
    bytes
}

/// Runs a target on what a few changes make of each file of its corpus, so often in all.
fn mutate(target: &str, rounds: u32, words: &'static [&'static [u8]], entry: fn(&[u8]) -> bool) {
    let files: Vec<_> = corpus(target).into_iter().map(|(_, bytes)| bytes).filter(|bytes| bytes.len() < 4096).collect();
    let config = Config {
        cases: rounds,
        failure_persistence: None,
        rng_algorithm: RngAlgorithm::ChaCha,
        rng_seed: RngSeed::Fixed(6),
        ..Config::default()
    };
    let changed = (prop::sample::select(files), prop::collection::vec(change(words), 1..6))
        .prop_map(|(bytes, changes)| changed(bytes, &changes));
    TestRunner::new(config)
        .run(&changed, |bytes| {
            entry(&bytes);
            Ok(())
        })
        .unwrap();
}

#[cfg(feature = "firecracker")]
#[test]
fn the_corpus_of_handshakes_is_borne() {
    run("handshake", entry::handshake);
}

#[cfg(feature = "firecracker")]
#[test]
fn what_chance_makes_of_handshakes_is_borne() {
    let words: &[&[u8]] = &[
        b"[",
        b"]",
        b"{",
        b"}",
        b",",
        b":",
        b"\"",
        b"-",
        b"e",
        b"0",
        b"null",
        b"18446744073709551615",
        b"4096",
        b"page_size",
    ];
    mutate("handshake", 100_000, words, entry::handshake);
}

#[test]
fn the_corpus_of_frames_is_borne() {
    run("wire", kiomap::fuzzing::wire);
}

#[test]
fn what_chance_makes_of_frames_is_borne() {
    // Who hears it, the header, and numbers: 1, 4096, 2^20, 2^44, 2^63 and 2^64 - 1.
    let words: &[&[u8]] = &[
        b"A\0",
        b"W\x01",
        b"kiom\x01\0\0\0",
        b"\x01",
        b"\x80\x20",
        b"\x80\x80\x40",
        b"\x80\x80\x80\x80\x80\x80\x04",
        b"\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01",
        b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    ];
    mutate("wire", 30_000, words, kiomap::fuzzing::wire);
}
