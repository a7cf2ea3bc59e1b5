//! What tells a list from others: how it is put together, and what its files and sources say of their contents.

use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::Kiobuf;
use super::extent::Base;
use super::file::PagedFile;
use crate::error::Result;

impl Kiobuf {
    /// Returns a digest of what the list is made of, and of what is known of the contents: the size and the time of the last
    /// change of each file, and what each source [says](crate::PageSource::identity). Of memory nothing is known but its length,
    /// and of memfds, whose contents may change, no more.
    ///
    /// # Errors
    ///
    /// [`Error::Sys`](crate::Error::Sys): a file can't be examined.
    pub(crate) fn identity(&self) -> Result<[u8; 32]> {
        let mut digest = Sha256::new();
        let mut put = |word: u64| digest.update(word.to_le_bytes());
        let mut said = Vec::new();
        // Extents of a layered list name the same file again and again.
        let mut last: Option<(Arc<PagedFile>, [u64; 3])> = None;
        for extent in &self.inner.extents {
            [extent.nr_pages, extent.valid.start, extent.valid.end].into_iter().for_each(&mut put);
            match &extent.base {
                Base::Memory(_) => put(1),
                Base::Mmap { at, .. } => [2, *at as u64].into_iter().for_each(&mut put),
                Base::File { file, at } => {
                    let words = match &last {
                        Some((known, words)) if Arc::ptr_eq(known, file) => *words,
                        _ => {
                            let meta = file.metadata()?;
                            [meta.len(), meta.mtime().cast_unsigned(), meta.mtime_nsec().cast_unsigned()]
                        }
                    };
                    last = Some((Arc::clone(file), words));
                    [3, *at].into_iter().chain(words).for_each(&mut put);
                }
                Base::Memfd(memfd) => [4, memfd.at].into_iter().for_each(&mut put),
                Base::Source(part) => {
                    let identity = part.source.identity();
                    let len = identity.as_ref().map_or(0, |identity| 1 + identity.len() as u64);
                    [5, part.at, len].into_iter().for_each(&mut put);
                    said.extend(identity.into_iter().flatten());
                }
                Base::Zero => put(6),
                Base::Hole => put(7),
            }
        }
        digest.update(said);
        Ok(digest.finalize().into())
    }
}
