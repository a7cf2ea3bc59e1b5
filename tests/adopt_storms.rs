//! An adopted process whose threads touch, write, give up, move and fork at once: each page is what it must be, each time.

mod support;

use std::sync::Mutex;
use std::time::Duration;

use kiomap::{AdoptOptions, AdoptedArea, Engine, Kiobuf, page_size};
use support::peer::{MEMORY, Peer};
use support::raw::mremap;
use support::{alone_for, engine_builder, mark, pages, reap, reap_ok, source};
use userfaultfd::FeatureFlags;

const BLOCKS: usize = 64;
const BLOCK_PAGES: usize = 8;
const PAGES: usize = BLOCKS * BLOCK_PAGES;
const THREADS: usize = 6;
/// Where a block is moved for a while.
const ASIDE: usize = MEMORY + (1 << 32);
const DEADLINE: Duration = Duration::from_secs(120);

/// What a page holds: the list's byte, or that.
type Model = Vec<Mutex<[Option<u8>; BLOCK_PAGES]>>;

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }
}

fn at(page: usize) -> *mut u8 {
    (MEMORY + page * page_size()) as *mut u8
}

/// Fails unless a page is full of the byte that it must have.
fn check(page: usize, model: Option<u8>) {
    let expected = model.unwrap_or(mark(page as u64));
    for offset in [0, 8, 2048, page_size() - 8] {
        // SAFETY: the page is the caller's, who holds its block.
        let word = unsafe { at(page).add(offset).cast::<u64>().read_volatile() };
        assert_eq!(word, u64::from_ne_bytes([expected; 8]), "page {page}, byte {offset}");
    }
}

fn check_block(block: usize, state: &[Option<u8>; BLOCK_PAGES]) {
    state.iter().enumerate().for_each(|(n, &model)| check(block * BLOCK_PAGES + n, model));
}

/// One thread of the process.
fn storm(model: &Model, seed: u64, steps: usize, moves: bool, forks: bool) {
    let mut random = Random(seed);
    for _ in 0..steps {
        let block = random.below(BLOCKS);
        let mut state = model[block].lock().unwrap();
        let first = random.below(BLOCK_PAGES);
        let nr = 1 + random.below(BLOCK_PAGES - first);
        let page = block * BLOCK_PAGES + first;
        match random.below(if forks { 80 } else { 79 }) {
            0..40 => check(page, state[first]),
            40..55 => {
                let byte = 1 + random.below(250) as u8;
                // SAFETY: the block is held.
                unsafe { at(page).write_bytes(byte, page_size()) };
                state[first] = Some(byte);
            }
            55..75 => {
                // SAFETY: the block is held.
                let done = unsafe { libc::madvise(at(page).cast(), nr * page_size(), libc::MADV_DONTNEED) };
                assert_eq!(done, 0);
                state[first..first + nr].fill(Some(0));
            }
            75..79 if moves => {
                // Whole blocks: what has moved is a mapping by itself, and more than one can't be moved at once.
                let page = block * BLOCK_PAGES;
                let (from, aside) = (at(page) as usize, ASIDE + page * page_size());
                let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                mremap(from, BLOCK_PAGES, BLOCK_PAGES, flags, aside);
                // SAFETY: it is there.
                let byte = unsafe { (aside as *const u8).read_volatile() };
                assert_eq!(byte, state[0].unwrap_or(mark(page as u64)), "page {page}, elsewhere");
                mremap(aside, BLOCK_PAGES, BLOCK_PAGES, flags, from);
                check_block(block, &state);
            }
            75..79 => check_block(block, &state),
            _ => {
                let child = support::fork_child(|| {
                    check_block(block, &state);
                    // Those that nobody is changing.
                    for (other, state) in model.iter().enumerate() {
                        if let Ok(state) = state.try_lock() {
                            check_block(other, &state);
                        }
                    }
                });
                drop(state);
                reap_ok(child);
            }
        }
    }
}

/// The process: touches everything in a storm, then looks at all of it once more.
fn process(seed: u64, steps: usize, moves: bool, forks: bool) {
    let model: Model = (0..BLOCKS).map(|_| Mutex::new([None; BLOCK_PAGES])).collect();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let model = &model;
            scope.spawn(move || storm(model, seed * 100 + thread as u64, steps, moves, forks));
        }
    });
    for (block, state) in model.iter().enumerate() {
        check_block(block, &state.lock().unwrap());
    }
}

fn in_a_storm(name: &str, features: FeatureFlags, list: fn() -> Kiobuf, rounds: u64, steps: usize) {
    alone_for(DEADLINE, name, || {
        let moves = features.contains(FeatureFlags::EVENT_REMAP);
        let forks = features.contains(FeatureFlags::EVENT_FORK);
        let mut peers = Vec::new();
        for seed in 0..rounds {
            match Peer::start_to(features, PAGES, false, move || process(seed + 1, steps, moves, forks)) {
                Some((peer, uffd)) => peers.push((seed, peer, uffd)),
                None => skip!("a userfaultfd with {features:?} is not to be had"),
            }
        }
        for (seed, peer, uffd) in peers {
            let around = [1, 16, 512][seed as usize % 3];
            let engine: Engine = engine_builder().fault_around_pages(around).build().unwrap();
            if !engine.features().contains(kiomap::Features::POISON) {
                skip!("without POISON nothing can be made a SIGBUS in another process");
            }
            let vmap = engine.vmap(&list()).unwrap();
            let area = AdoptedArea::new(MEMORY..MEMORY + PAGES * page_size(), &vmap, 0);
            let adopted = engine.adopt(uffd, &[area], AdoptOptions::new()).unwrap();
            peer.play();
            assert_eq!(engine.stats().panics, 0);
            assert_eq!(engine.stats().pages_poisoned, 0);
            peer.exit();
            reap(peer.pid);
            assert!(adopted.wait_gone(support::DEADLINE));
            assert_eq!(vmap.refcount().unwrap(), 0);
        }
    });
}

fn remove() -> FeatureFlags {
    FeatureFlags::EVENT_REMOVE
}

/// How many rounds; `KIOMAP_STORM_ROUNDS` says otherwise.
fn rounds() -> u64 {
    std::env::var("KIOMAP_STORM_ROUNDS").map_or(3, |rounds| rounds.parse().expect("a number of rounds"))
}

/// As of a VM monitor with a balloon.
#[test]
fn memory_that_is_given_up_at_any_moment_is_right() {
    let list = || pages(PAGES as u64);
    in_a_storm("memory_that_is_given_up_at_any_moment_is_right", remove(), list, rounds(), 3000);
}

/// As of a process that was restored and whose allocator purges memory at once; it moves memory and forks.
#[test]
fn memory_that_is_given_up_moved_and_forked_is_right() {
    let features = remove() | FeatureFlags::EVENT_REMAP | FeatureFlags::EVENT_UNMAP | FeatureFlags::EVENT_FORK;
    let list = || pages(PAGES as u64);
    in_a_storm("memory_that_is_given_up_moved_and_forked_is_right", features, list, rounds(), 1500);
}

/// The same of pages that workers read.
#[test]
fn memory_that_is_read_while_it_is_given_up_is_right() {
    needs_sources!();
    let list = || source(PAGES as u64, |_, _| Ok(()));
    in_a_storm("memory_that_is_read_while_it_is_given_up_is_right", remove(), list, rounds(), 3000);
}
