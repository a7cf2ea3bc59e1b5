//! Where the compressed bytes are: any other source.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::super::{PageSource, check_range};
use crate::error::{Error, Result, SourceFault};
use crate::page::page_size;

/// A source of compressed bytes.
pub(super) struct Storage {
    /// As the caller named it, for errors.
    pub(super) name: String,
    pub(super) source: Arc<dyn PageSource>,
    pub(super) len_bytes: u64,
}

impl Storage {
    /// Reads any bytes: what a source is asked for begins and ends with a page.
    pub(super) fn fetch(&self, bytes: Range<u64>) -> io::Result<Vec<u8>> {
        let page = page_size() as u64;
        check_range(bytes.start, (bytes.end - bytes.start) as usize, self.len_bytes)?;
        let start = bytes.start / page * page;
        let end = bytes.end.next_multiple_of(page).min(self.len_bytes);
        let mut buf = vec![0; (end - start) as usize];
        self.source.read_at(start, &mut buf)?;
        buf.truncate((bytes.end - start) as usize);
        buf.drain(..(bytes.start - start) as usize);
        Ok(buf)
    }

    /// Reads any bytes while the image is opened.
    pub(super) fn fetch_at_open(&self, bytes: Range<u64>) -> Result<Vec<u8>> {
        self.fetch(bytes).map_err(|error| Error::source_io(&self.name, &error))
    }

    pub(super) fn error(&self, fault: SourceFault, why: &str) -> Error {
        Error::Source { name: self.name.clone(), fault, why: why.into() }
    }
}
