//! The pages that floors and engines copy from.

use std::sync::Arc;

use anyhow::Result;
use kiomap::page_size;

use super::raw::{Mapping, Memory};
use super::touch::mark;

/// Pages full of their marks. They begin at a page's start: a list of bytes that do not would be copied page by page
/// through a buffer.
#[derive(Clone)]
pub(crate) struct Source {
    memory: Arc<Mapping>,
    bytes: usize,
}

impl Source {
    pub(crate) fn new(pages: usize) -> Result<Source> {
        let memory = Mapping::new(Memory::Anon, pages, pages)?;
        fill(&memory, pages);
        Ok(Source { bytes: memory.len(), memory: Arc::new(memory) })
    }

    /// The first pages of it.
    pub(crate) fn first(&self, pages: usize) -> Source {
        Source { bytes: self.bytes.min(pages * page_size()), ..self.clone() }
    }
}

/// Fills each page with its mark.
pub(crate) fn fill(memory: &Mapping, pages: usize) {
    let words = page_size() / size_of::<u64>();
    for n in 0..pages * words {
        // SAFETY: the callers pass a writable mapping of so many pages, which nobody else knows yet.
        unsafe { memory.as_ptr().cast::<u64>().add(n).write(mark(n / words)) };
    }
}

impl AsRef<[u8]> for Source {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: the mapping lives as long as this value, is at least so long, and nobody writes to it any more.
        unsafe { std::slice::from_raw_parts(self.memory.as_ptr(), self.bytes) }
    }
}
