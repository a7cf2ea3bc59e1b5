//! Pages of anything that reads and seeks, and of a closure.

use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::sync::{Mutex, PoisonError};

use super::{PageSource, check_granule, check_range};
use crate::error::{Error, Result, SourceFault};
use crate::page::page_size;

/// Reads pages of anything that reads and seeks: one read at a time, because it has one position.
///
/// A reader that ends before its length, as it was when this was made, is an error of the read and so SIGBUS. The position must
/// be this reader's own: who moves it meanwhile, through a descriptor that shares it for instance, makes it read bytes of another
/// place. So files are better off with a [`FileSource`](crate::FileSource), which has none; and a process that is forked, with
/// which a file would share it, can't read by itself (the engine's pages are there all the same).
#[derive(Debug)]
pub struct ReadSource<R> {
    reader: Mutex<R>,
    /// The process that may move the reader's position.
    pid: u32,
    len_bytes: u64,
    granule_bytes: usize,
    identity: Option<Vec<u8>>,
}

impl<R: Read + Seek + Send + 'static> ReadSource<R> {
    /// Takes over a reader; its length is where it ends now.
    ///
    /// # Errors
    ///
    /// [`Error::Source`]: the reader is empty (`ENODATA`), or can't seek.
    pub fn new(mut reader: R) -> Result<Self> {
        let name = "the reader";
        let len_bytes = reader.seek(SeekFrom::End(0)).map_err(|error| Error::source_io(name, &error))?;
        if len_bytes == 0 {
            let why = "a page list maps at least one byte".into();
            return Err(Error::Source { name: name.into(), fault: SourceFault::Empty, why });
        }
        let (reader, pid) = (Mutex::new(reader), std::process::id());
        Ok(Self { reader, pid, len_bytes, granule_bytes: page_size(), identity: None })
    }

    /// Sets how many bytes are read at once for a touch; a page unless set.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] (`EINVAL`): it is no power of two from the page size to 4 MiB.
    pub fn with_granule_bytes(mut self, bytes: usize) -> Result<Self> {
        self.granule_bytes = check_granule(bytes)?;
        Ok(self)
    }

    /// Sets what [`PageSource::identity`] answers; nothing unless set.
    #[must_use]
    pub fn with_identity(mut self, identity: Vec<u8>) -> Self {
        self.identity = Some(identity);
        self
    }
}

impl<R: Read + Seek + Send + 'static> PageSource for ReadSource<R> {
    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(offset_bytes, buf.len(), self.len_bytes)?;
        if self.pid != std::process::id() {
            return Err(io::Error::other("a forked process shares the reader's position: it can't read by itself"));
        }
        // A reader that panicked has some position; this gives it another.
        let mut reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        let at = reader.seek(SeekFrom::Start(offset_bytes))?;
        if at != offset_bytes {
            return Err(io::Error::other(format!("a seek to byte {offset_bytes} came to {at}")));
        }
        reader.read_exact(buf).map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => {
                let why = format!("the reader ends within bytes {offset_bytes}+{} of {}", buf.len(), self.len_bytes);
                io::Error::new(ErrorKind::UnexpectedEof, why)
            }
            _ => error,
        })
    }

    fn len_bytes(&self) -> Option<u64> {
        Some(self.len_bytes)
    }

    fn granule_bytes(&self) -> usize {
        self.granule_bytes
    }

    fn identity(&self) -> Option<Vec<u8>> {
        self.identity.clone()
    }
}

/// Makes pages by a closure: the shortest way to a source of one's own.
///
/// The closure is called as [`PageSource::read_at`] is: with an offset in bytes and a buffer that it fills to its end, on several
/// threads at a time.
pub struct FnSource<F> {
    read: F,
    len_bytes: u64,
    granule_bytes: usize,
    may_block: bool,
    identity: Option<Vec<u8>>,
}

impl<F: Fn(u64, &mut [u8]) -> io::Result<()> + Send + Sync + 'static> FnSource<F> {
    /// Makes a source of `len_bytes` bytes that `read` makes.
    pub fn new(len_bytes: u64, read: F) -> Self {
        Self { read, len_bytes, granule_bytes: page_size(), may_block: true, identity: None }
    }

    /// Sets how many bytes are made at once for a touch; a page unless set.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] (`EINVAL`): it is no power of two from the page size to 4 MiB.
    pub fn with_granule_bytes(mut self, bytes: usize) -> Result<Self> {
        self.granule_bytes = check_granule(bytes)?;
        Ok(self)
    }

    /// Says that the closure waits for nothing: see [`PageSource::may_block`].
    #[must_use]
    pub fn never_blocks(mut self) -> Self {
        self.may_block = false;
        self
    }

    /// Sets what [`PageSource::identity`] answers; nothing unless set.
    #[must_use]
    pub fn with_identity(mut self, identity: Vec<u8>) -> Self {
        self.identity = Some(identity);
        self
    }
}

impl<F: Fn(u64, &mut [u8]) -> io::Result<()> + Send + Sync + 'static> PageSource for FnSource<F> {
    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(offset_bytes, buf.len(), self.len_bytes)?;
        (self.read)(offset_bytes, buf)
    }

    fn len_bytes(&self) -> Option<u64> {
        Some(self.len_bytes)
    }

    fn granule_bytes(&self) -> usize {
        self.granule_bytes
    }

    fn may_block(&self) -> bool {
        self.may_block
    }

    fn identity(&self) -> Option<Vec<u8>> {
        self.identity.clone()
    }
}

impl<F> std::fmt::Debug for FnSource<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FnSource")
            .field("len_bytes", &self.len_bytes)
            .field("granule_bytes", &self.granule_bytes)
            .finish_non_exhaustive()
    }
}
