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
        let put = |digest: &mut Sha256, words: &[u64]| words.iter().for_each(|word| digest.update(word.to_le_bytes()));
        // Extents of a layered list name the same file again and again.
        let mut last: Option<(Arc<PagedFile>, [u64; 3])> = None;
        for extent in &self.inner.extents {
            put(&mut digest, &[extent.nr_pages, extent.valid.start, extent.valid.end]);
            match &extent.base {
                Base::Memory(_) => put(&mut digest, &[1]),
                Base::Mmap { at, .. } => put(&mut digest, &[2, *at as u64]),
                Base::File { file, at } => {
                    let words = match &last {
                        Some((known, words)) if Arc::ptr_eq(known, file) => *words,
                        _ => {
                            let meta = file.metadata()?;
                            [meta.len(), meta.mtime().cast_unsigned(), meta.mtime_nsec().cast_unsigned()]
                        }
                    };
                    last = Some((Arc::clone(file), words));
                    put(&mut digest, &[3, *at]);
                    put(&mut digest, &words);
                }
                Base::Memfd(memfd) => put(&mut digest, &[4, memfd.at]),
                Base::Source(part) => {
                    let identity = part.source.identity();
                    let len = identity.as_ref().map_or(0, |identity| 1 + identity.len() as u64);
                    put(&mut digest, &[5, part.at, len]);
                    digest.update(identity.unwrap_or_default());
                }
                Base::Zero => put(&mut digest, &[6]),
                Base::Hole => put(&mut digest, &[7]),
            }
        }
        Ok(digest.finalize().into())
    }
}
