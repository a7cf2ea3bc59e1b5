//! A heap image and the work that is done on it: a B-tree of records in slabs, as an allocator leaves them.
//!
//! ```text
//! page 0       where everything is
//! index pages  a B-tree: leaves of (key, address), above them (first key, page)
//! slabs        records of 256 bytes in the order of their keys; or nothing but zeros, free
//! ```
//!
//! A request follows records from one to the next: each names the key of the one after it, which the B-tree finds. Which
//! slabs that are (the *hot* ones), and their order, is chosen by the seed. So every step needs the bytes of the step before,
//! as it is with real pointers, and nothing can be read ahead of time by whoever does not know the way.

use std::collections::BTreeSet;
use std::io::Write;

use anyhow::{Context, Result, ensure};
use kiomap::page_size;
use serde::{Deserialize, Serialize};

const MAGIC: u64 = u64::from_le_bytes(*b"lazyheap");
const RECORD_BYTES: usize = 256;
/// Key, the key of the record after it, and what is to be read of it.
const PAYLOAD_AT: usize = 16;
/// A key and an address.
const ENTRY_BYTES: usize = 16;
/// What a page of the index begins with: the number of its entries, and its level.
const NODE_BYTES: usize = 16;
/// Slabs of ten that hold records; the others are zeros.
const USED_OF_TEN: u64 = 6;
/// Each key is this much above the one before.
const KEY_STEP: u64 = 3;

/// What is known of an image: what to do with it, and what must come out.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Known {
    pub(crate) len_bytes: u64,
    pub(crate) work: Work,
    /// What the request answers.
    pub(crate) answer: u64,
    /// The pages that it touches.
    pub(crate) touched_pages: u64,
}

/// What a request does.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Work {
    /// Follows records of a heap, from this key on.
    Lookups { first_key: u64, number: u64 },
    /// Walks through any bytes.
    Walk { seed: u64, steps: u64 },
}

/// Numbers that look random and are the same in every run of one seed.
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// Where everything lies.
struct Layout {
    /// Pages of a slab.
    slab_pages: u64,
    nr_slabs: u64,
    /// The first page of the slabs.
    slabs_at: u64,
    /// The slabs with records, ascending.
    used: Vec<u64>,
    /// Pages of each level of the index, the leaves first.
    levels: Vec<u64>,
}

fn node_entries() -> u64 {
    ((page_size() - NODE_BYTES) / ENTRY_BYTES) as u64
}

impl Layout {
    fn new(nr_pages: u64, slab_pages: u64, random: &mut Random) -> Result<Layout> {
        let all_slabs = nr_pages / slab_pages;
        let mut used: Vec<u64> = (0..all_slabs).filter(|_| random.next() % 10 < USED_OF_TEN).collect();
        let records_per_slab = slab_pages * page_size() as u64 / RECORD_BYTES as u64;
        let mut levels = Vec::new();
        let mut entries = used.len() as u64 * records_per_slab;
        while entries > 1 {
            entries = entries.div_ceil(node_entries());
            levels.push(entries);
        }
        let slabs_at = (1 + levels.iter().sum::<u64>()).next_multiple_of(slab_pages);
        let nr_slabs = (nr_pages.saturating_sub(slabs_at)) / slab_pages;
        used.retain(|&slab| slab < nr_slabs);
        ensure!(
            used.len() >= 4,
            "{nr_pages} pages are too few for slabs of {slab_pages}: take a larger --size or smaller --slab-pages"
        );
        Ok(Layout { slab_pages, nr_slabs, slabs_at, used, levels })
    }

    fn records_per_slab(&self) -> u64 {
        self.slab_pages * page_size() as u64 / RECORD_BYTES as u64
    }

    /// The page of a node of the index.
    fn node_at(&self, level: usize, node: u64) -> u64 {
        1 + self.levels[..level].iter().sum::<u64>() + node
    }
}

/// Writes a heap of `nr_pages` pages of which a request touches about a share; tells `progress` the bytes that are done.
pub(crate) fn make(
    mut write: impl Write,
    nr_pages: u64,
    slab_pages: u64,
    share: f64,
    seed: u64,
    mut progress: impl FnMut(u64),
) -> Result<Known> {
    let page = page_size();
    let mut random = Random::new(seed);
    let layout = Layout::new(nr_pages, slab_pages, &mut random)?;
    let per_slab = layout.records_per_slab();
    let nr_records = layout.used.len() as u64 * per_slab;
    let key_of = |record: u64| 1 + record * KEY_STEP;

    // The hot slabs, by their place among the used ones, in the order of the request: all of each.
    let leaves_per_slab = per_slab.div_ceil(node_entries()) + 1;
    let wanted = ((nr_pages as f64 * share) as u64 / (slab_pages + leaves_per_slab)).max(1);
    let mut hot: Vec<u64> = (0..layout.used.len() as u64).collect();
    for last in (1..hot.len()).rev() {
        hot.swap(last, (random.next() % (last as u64 + 1)) as usize);
    }
    hot.truncate(wanted as usize);
    let mut after: Vec<Option<u64>> = vec![None; layout.used.len()];
    for pair in hot.windows(2) {
        after[pair[0] as usize] = Some(pair[1] * per_slab);
    }
    let is_hot: BTreeSet<u64> = hot.iter().copied().collect();

    // Page by page, as everything is known where it stands.
    let mut out = vec![0u8; page];
    let mut done = 0u64;
    let mut put = |out: &mut [u8]| -> Result<()> {
        write.write_all(out).context("writing the image")?;
        done += out.len() as u64;
        progress(done);
        out.fill(0);
        Ok(())
    };
    let root = layout.levels.len() - 1;
    for (at, word) in [MAGIC, nr_records, layout.node_at(root, 0), root as u64].into_iter().enumerate() {
        out[8 * at..8 * at + 8].copy_from_slice(&word.to_le_bytes());
    }
    put(&mut out)?;
    let mut pages_written = 1;
    let address_of = |record: u64| {
        let slab = layout.used[(record / per_slab) as usize];
        (layout.slabs_at + slab * slab_pages) * page as u64 + record % per_slab * RECORD_BYTES as u64
    };
    // Of a node of a level, the first record below it.
    let first_of = |level: usize, node: u64| node * node_entries().pow(level as u32 + 1);
    for (level, &nodes) in layout.levels.iter().enumerate() {
        let below = if level == 0 { nr_records } else { layout.levels[level - 1] };
        for node in 0..nodes {
            let entries = (node * node_entries()..below.min((node + 1) * node_entries())).map(|entry| match level {
                0 => (key_of(entry), address_of(entry)),
                _ => (key_of(first_of(level - 1, entry)), layout.node_at(level - 1, entry)),
            });
            let mut count = 0u64;
            for (slot, (key, value)) in out[NODE_BYTES..].chunks_exact_mut(ENTRY_BYTES).zip(entries) {
                slot[..8].copy_from_slice(&key.to_le_bytes());
                slot[8..].copy_from_slice(&value.to_le_bytes());
                count += 1;
            }
            out[..8].copy_from_slice(&count.to_le_bytes());
            out[8..16].copy_from_slice(&(level as u64).to_le_bytes());
            put(&mut out)?;
            pages_written += 1;
        }
    }
    while pages_written < layout.slabs_at {
        put(&mut out)?;
        pages_written += 1;
    }

    // What the request will find is noted on the way, by no lookup: slab by slab, put together in its order at the end.
    let mut found: Vec<u64> = vec![0; layout.used.len()];
    let mut record = 0u64;
    let mut used = layout.used.iter().copied().peekable();
    for slab in 0..layout.nr_slabs {
        let place = record / per_slab;
        let holds = used.next_if_eq(&slab).is_some();
        for _ in 0..slab_pages {
            if holds {
                for slot in out.chunks_exact_mut(RECORD_BYTES) {
                    let next = match (record + 1) % per_slab {
                        0 => after[place as usize].map_or(0, key_of),
                        _ => key_of(record + 1),
                    };
                    slot[..8].copy_from_slice(&key_of(record).to_le_bytes());
                    slot[8..16].copy_from_slice(&next.to_le_bytes());
                    fill(&mut slot[PAYLOAD_AT..], &mut random);
                    if is_hot.contains(&place) {
                        found[place as usize] = fold(found[place as usize], &slot[PAYLOAD_AT..]);
                    }
                    record += 1;
                }
            }
            put(&mut out)?;
            pages_written += 1;
        }
    }
    while pages_written < nr_pages {
        put(&mut out)?;
        pages_written += 1;
    }
    write.flush().context("writing the image")?;

    // The pages of the way down the tree, and those of the slabs.
    let mut touched: BTreeSet<u64> = BTreeSet::from([0]);
    for &place in &hot {
        let slab = layout.slabs_at + layout.used[place as usize] * slab_pages;
        touched.extend(slab..slab + slab_pages);
        let (mut first, mut last) = (place * per_slab, place * per_slab + per_slab - 1);
        for level in 0..layout.levels.len() {
            (first, last) = (first / node_entries(), last / node_entries());
            touched.extend((first..=last).map(|node| layout.node_at(level, node)));
        }
    }
    Ok(Known {
        len_bytes: nr_pages * page as u64,
        work: Work::Lookups { first_key: key_of(hot[0] * per_slab), number: hot.len() as u64 * per_slab },
        answer: hot.iter().fold(0, |answer, &place| combine(answer, found[place as usize])),
        touched_pages: touched.len() as u64,
    })
}

/// Fills a payload with words of which a compressor finds many again, and some that are new.
fn fill(payload: &mut [u8], random: &mut Random) {
    const WORDS: [&[u8; 8]; 8] =
        [b"user_id=", b"session=", b"GET /api", b"status: ", b"200 OK; ", b"cookie: ", b"content-", b"0000:00:"];
    for (n, word) in payload.chunks_exact_mut(8).enumerate() {
        let number = random.next();
        if n % 4 == 0 {
            word.copy_from_slice(&number.to_le_bytes());
        } else {
            word.copy_from_slice(WORDS[(number % 8) as usize]);
        }
    }
}

/// Takes a payload into what was found before.
fn fold(before: u64, payload: &[u8]) -> u64 {
    payload
        .as_chunks()
        .0
        .iter()
        .fold(before, |sum, word| (sum ^ u64::from_le_bytes(*word)).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23))
}

/// Takes what was found in a slab into the answer.
fn combine(answer: u64, found: u64) -> u64 {
    answer.rotate_left(7).wrapping_add(found)
}

/// A heap in memory.
pub(crate) struct Heap<'a> {
    bytes: &'a [u8],
}

impl<'a> Heap<'a> {
    pub(crate) fn open(bytes: &'a [u8]) -> Result<Heap<'a>> {
        let heap = Heap { bytes };
        ensure!(bytes.len() >= page_size() && heap.word(0)? == MAGIC, "the memory holds no heap image");
        Ok(heap)
    }

    fn word(&self, at: u64) -> Result<u64> {
        let word = usize::try_from(at).ok().and_then(|at| self.bytes.get(at..at + 8)).context("outside the heap")?;
        Ok(u64::from_le_bytes(word.try_into()?))
    }

    /// Finds a record by its key, from the root of the tree down.
    fn find(&self, key: u64) -> Result<u64> {
        let (mut page, mut level) = (self.word(16)?, self.word(24)?);
        loop {
            let node = page * page_size() as u64;
            ensure!(self.word(node + 8)? == level, "page {page} is no node of level {level}");
            // The last entry whose key is not larger.
            let (mut low, mut high) = (0, self.word(node)?);
            while low + 1 < high {
                let middle = (low + high) / 2;
                let its = self.word(node + NODE_BYTES as u64 + middle * ENTRY_BYTES as u64)?;
                (low, high) = if its <= key { (middle, high) } else { (low, middle) };
            }
            let value = self.word(node + NODE_BYTES as u64 + low * ENTRY_BYTES as u64 + 8)?;
            if level == 0 {
                return Ok(value);
            }
            (page, level) = (value, level - 1);
        }
    }

    /// Serves the request: follows the records from the first one on, and answers with what they hold; and how many there were.
    pub(crate) fn request(&self, first_key: u64, slab_records: u64) -> Result<(u64, u64)> {
        let (mut key, mut answer, mut found, mut lookups) = (first_key, 0, 0, 0);
        while key != 0 {
            let at = self.find(key)?;
            ensure!(self.word(at)? == key, "the record at {at:#x} has another key than {key}");
            let record = &self.bytes[at as usize..at as usize + RECORD_BYTES];
            found = fold(found, &record[PAYLOAD_AT..]);
            lookups += 1;
            if lookups % slab_records == 0 {
                answer = combine(answer, std::mem::take(&mut found));
            }
            key = self.word(at + 8)?;
        }
        Ok((answer, lookups))
    }
}

/// The records of a slab.
pub(crate) fn slab_records(slab_pages: u64) -> u64 {
    slab_pages * page_size() as u64 / RECORD_BYTES as u64
}
