//! Tests of the page list as its users and the engine see it.

mod layers;
mod locking;
mod mapping;
mod model;
mod reading;
mod transfer;

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::nopage::NoPageWhy;
use super::outcome::ReadFailure;
use super::*;
use crate::Error;
use crate::page::page_size;
use crate::source::PageSource;

/// Bytes of which no two pages are alike, and none is zero.
fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mix = |at: usize| (at as u64 ^ seed << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56;
    (0..len).map(|at| mix(at) as u8 | 1).collect()
}

/// Lends a part of an arena, so that a test chooses how the bytes lie on their pages.
struct Window {
    arena: Arc<Arena>,
    range: Range<usize>,
}

impl Window {
    fn over(bytes: &[u8], head: usize) -> Self {
        let len = head + bytes.len();
        let mut arena = Arena::new(len.div_ceil(page_size())).unwrap();
        // What surrounds the window is not zero: it must not be seen.
        arena.fill(0xee);
        arena[head..len].copy_from_slice(bytes);
        Self { arena: Arc::new(arena), range: head..len }
    }
}

impl AsRef<[u8]> for Window {
    fn as_ref(&self) -> &[u8] {
        &self.arena[self.range.clone()]
    }
}

/// Counts its drops.
struct Counted<T>(T, Arc<AtomicUsize>);

impl<T: AsRef<[u8]>> AsRef<[u8]> for Counted<T> {
    fn as_ref(&self) -> &[u8] {
        self.0.as_ref()
    }
}

impl<T> Drop for Counted<T> {
    fn drop(&mut self) {
        self.1.fetch_add(1, Ordering::SeqCst);
    }
}

/// A page source over bytes; checks what it is asked for.
struct Bytes(Vec<u8>);

impl PageSource for Bytes {
    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> std::io::Result<()> {
        let start = usize::try_from(offset_bytes).unwrap();
        let end = start + buf.len();
        assert!(start.is_multiple_of(page_size()));
        assert!(!buf.is_empty() && (buf.len().is_multiple_of(page_size()) || end == self.0.len()));
        buf.copy_from_slice(&self.0[start..end]);
        Ok(())
    }
}

fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn mapped(map: impl FnOnce(&mut Kiobuf) -> Result<()>) -> Kiobuf {
    let mut kiobuf = Kiobuf::new();
    map(&mut kiobuf).unwrap();
    kiobuf
}

fn window(bytes: &[u8], head: usize) -> Kiobuf {
    mapped(|kiobuf| kiobuf.map_slice(Window::over(bytes, head)))
}

/// A page as a touch would see it: by the lookup, then by whatever the lookup says. `None` is a SIGBUS.
fn page(kiobuf: &Kiobuf, pgoff: u64) -> Option<Vec<u8>> {
    let mut buf = vec![0xaa; page_size()];
    match kiobuf.nopage(pgoff) {
        Nopage::Direct { src, run } => {
            assert!(run.contains(&pgoff));
            // SAFETY: `Direct` promises that all pages of the run lie at `src`, and the list is borrowed.
            let src = unsafe { src.add((pgoff - run.start) as usize * page_size()) };
            // SAFETY: as above; a page there is `page_size` bytes.
            buf.copy_from_slice(unsafe { std::slice::from_raw_parts(src, page_size()) });
        }
        Nopage::Read { run, may_block } => {
            assert!(run.contains(&pgoff));
            match kiobuf.try_read_pages(pgoff, &mut buf) {
                TryRead::Done => {}
                TryRead::WouldBlock if may_block => kiobuf.read_pages(pgoff, &mut buf).unwrap(),
                answer => panic!("page {pgoff}: {answer:?}"),
            }
        }
        Nopage::Zero { run } => {
            assert!(run.contains(&pgoff));
            buf.fill(0);
        }
        Nopage::Sigbus(_) => return None,
    }
    Some(buf)
}

/// All pages of a list without holes, one after the other.
fn contents(kiobuf: &Kiobuf) -> Vec<u8> {
    (0..kiobuf.nr_pages()).flat_map(|pgoff| page(kiobuf, pgoff).unwrap()).collect()
}

/// `bytes` in whole pages, `head` bytes into the first, with zeros around them.
fn padded(bytes: &[u8], head: usize) -> Vec<u8> {
    let mut pages = vec![0; (head + bytes.len()).next_multiple_of(page_size())];
    pages[head..head + bytes.len()].copy_from_slice(bytes);
    pages
}
