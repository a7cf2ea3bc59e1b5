//! The memory file of a snapshot: sparse, with data in a few pages in a hundred.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use kiomap::page_size;

fn mix(n: u64) -> u64 {
    let mut x = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Numbers that a seed makes.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(mix(seed))
    }

    pub(crate) fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(1);
        mix(self.0)
    }

    /// A number below another.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.word() % end as u64) as usize
    }
}

/// Whether a page has data: in runs, and here and there.
pub(crate) fn is_data(page: u64) -> bool {
    mix(page >> 3).is_multiple_of(40) || mix(page ^ 0x5555_0000_0000).is_multiple_of(100)
}

/// Writes the bytes of a page of data.
fn fill(page: u64, bytes: &mut [u8]) {
    let mut random = Random::new(page);
    for word in bytes.chunks_exact_mut(8) {
        word.copy_from_slice(&random.word().to_le_bytes());
    }
}

/// Makes a memory file.
pub(crate) fn make(path: &Path, len_bytes: usize) {
    let file = File::create(path).unwrap();
    file.set_len(len_bytes as u64).unwrap();
    let mut bytes = vec![0; page_size()];
    for page in (0..(len_bytes / page_size()) as u64).filter(|&page| is_data(page)) {
        fill(page, &mut bytes);
        file.write_all_at(&bytes, page * page_size() as u64).unwrap();
    }
}
