//! Contents to page in, and pages held against them.

use kiomap::{Region, page_size};
use sha2::{Digest, Sha256};

use super::{in_page, read_page};

/// Bytes that a seed makes: stretches of noise, of repetition and of zeros, none of them whole pages.
pub(crate) fn contents(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed ^ 0x9e37_79b9_7f4a_7c15;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize
    };
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let stretch = (random() % 50_000).min(len - bytes.len());
        match random() % 3 {
            0 => bytes.extend((0..stretch).map(|_| random() as u8)),
            1 => bytes.extend((0..stretch).map(|at| (at / 64) as u8 | 1)),
            _ => bytes.extend(std::iter::repeat_n(0, stretch)),
        }
    }
    bytes
}

fn digest(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// Page `n` of contents, with the zeros that follow the last byte.
fn page_of(contents: &[u8], n: usize) -> Vec<u8> {
    let mut page = contents[n * page_size()..((n + 1) * page_size()).min(contents.len())].to_vec();
    page.resize(page_size(), 0);
    page
}

/// The pages of contents, in an order in which no two neighbours follow each other.
pub(crate) fn scattered(nr_pages: usize) -> impl Iterator<Item = usize> {
    // A step that has no factor in common with any number of pages a test has.
    (0..nr_pages).map(move |n| (n * 1_000_003 + 7) % nr_pages)
}

/// Touches every page of a region and compares its SHA-256 with that of the contents.
#[track_caller]
pub(crate) fn assert_holds(region: &Region, contents: &[u8]) {
    let nr_pages = contents.len().div_ceil(page_size());
    assert_eq!(region.len_bytes(), nr_pages * page_size());
    let mut page = vec![0; page_size()];
    let mut touched = 0;
    for n in scattered(nr_pages) {
        read_page(region, n as u64).unwrap_or_else(|refused| panic!("page {n}: {refused:?}"));
        region.read_at(n * page_size(), &mut page).unwrap();
        assert_eq!(digest(&page), digest(&page_of(contents, n)), "page {n}");
        touched += 1;
    }
    assert_eq!(touched, nr_pages);
}

/// Touches every page of a region: it has the right bytes, all of them, or is SIGBUS. Returns how many were and how many not.
#[track_caller]
pub(crate) fn right_or_sigbus(region: &Region, contents: &[u8]) -> (usize, usize) {
    let (mut right, mut refused) = (0, 0);
    let mut page = vec![0; page_size()];
    for n in scattered(contents.len().div_ceil(page_size())) {
        // One that another read brings meanwhile is there at the next touch.
        if let Err(how) = read_page(region, n as u64) {
            assert!(how.is_sigbus_at(in_page(region, n as u64) as usize), "page {n}: {how:?}");
            refused += 1;
            continue;
        }
        region.read_at(n * page_size(), &mut page).unwrap();
        assert!(page == page_of(contents, n), "page {n} has other bytes");
        right += 1;
    }
    (right, refused)
}
