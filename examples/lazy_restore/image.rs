//! Where the image lies, and how it is read: the storage is counted, and may be made as slow as one that is far away.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::ValueEnum;
use kiomap::{FileOptions, FileSource, Kiobuf, PageSource};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde::{Deserialize, Serialize};

/// What one touch reads of a plain image.
const GRANULE_BYTES: usize = 64 << 10;

/// What an image is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// The bytes of the heap
    Plain,
    /// Compressed in the seekable format of zstd
    #[cfg(feature = "zstd")]
    Zstd,
}

/// How the storage is reached.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Storage {
    pub(crate) kind: Kind,
    pub(crate) path: PathBuf,
    /// The URL of an object with the same bytes, which is read instead.
    pub(crate) url: Option<String>,
    pub(crate) direct: bool,
    pub(crate) latency_us: u64,
    pub(crate) bytes_per_second: u64,
}

impl Storage {
    /// Has no page of the image be in the page cache.
    pub(crate) fn drop_cached_pages(&self) -> Result<()> {
        let file = File::open(&self.path).context("opening the image")?;
        // What is dirty is not dropped.
        file.sync_all().context("fsync of the image")?;
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).context("posix_fadvise of the image")
    }

    fn source(&self) -> Result<Arc<dyn PageSource>> {
        #[cfg(feature = "object-store")]
        if let Some(url) = &self.url {
            let options = kiomap::ObjectOptions::new();
            return Ok(Arc::new(kiomap::ObjectSource::open(url, &options).with_context(|| format!("opening {url}"))?));
        }
        // Only the engine reads ahead: what the kernel would is not counted.
        let mut options = FileOptions::new().random();
        if self.kind == Kind::Plain {
            options = options.granule_bytes(GRANULE_BYTES);
        }
        if self.direct {
            options = options.direct();
        }
        Ok(Arc::new(FileSource::open(&self.path, &options).context("opening the image")?))
    }

    /// Opens the image: its pages, and what counts the reads of them.
    pub(crate) fn open(&self) -> Result<(Kiobuf, Arc<dyn PageSource>, Arc<Far>)> {
        let far = Arc::new(Far {
            storage: self.source()?,
            latency: Duration::from_micros(self.latency_us),
            bytes_per_second: self.bytes_per_second,
            free_at: Mutex::new(Instant::now()),
            reads: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        });
        let source = Arc::clone(&far) as Arc<dyn PageSource>;
        #[cfg(feature = "zstd")]
        if self.kind == Kind::Zstd {
            let image = Arc::new(kiomap::ZstdImage::over(source).context("opening the zstd image")?);
            return Ok((image.list()?, image, far));
        }
        let len_bytes = source.len_bytes().context("the image does not know its length")?;
        let mut list = Kiobuf::new();
        list.map_source(Arc::clone(&source), len_bytes)?;
        Ok((list, source, far))
    }
}

/// Writes an image of what `make` writes, to a temporary name first.
pub(crate) fn write<T>(kind: Kind, path: &Path, make: impl FnOnce(&mut dyn Write) -> Result<T>) -> Result<T> {
    let unfinished = path.with_extension("unfinished");
    let mut file = BufWriter::with_capacity(1 << 20, File::create(&unfinished).context("creating the image")?);
    let made = match kind {
        Kind::Plain => make(&mut file)?,
        #[cfg(feature = "zstd")]
        Kind::Zstd => {
            let (mut reader, writer) = io::pipe().context("a pipe to the compressor")?;
            let file = &mut file;
            std::thread::scope(|scope| {
                let packing = scope
                    .spawn(move || kiomap::ZstdImage::make(&mut reader, file, &kiomap::ZstdOptions::new(), |_| {}));
                let mut writer = BufWriter::with_capacity(1 << 20, writer);
                let made = make(&mut writer);
                // The end of what is to be compressed.
                drop(writer);
                packing.join().expect("compressing does not panic").context("compressing the image")?;
                made
            })?
        }
    };
    let file = file.into_inner().map_err(io::IntoInnerError::into_error).context("writing the image")?;
    file.sync_all().context("fsync of the image")?;
    std::fs::rename(&unfinished, path).context("putting the image in its place")?;
    Ok(made)
}

/// A storage that counts its reads, each of which takes a latency, and all of which share a bandwidth.
pub(crate) struct Far {
    storage: Arc<dyn PageSource>,
    latency: Duration,
    /// 0 is no limit.
    bytes_per_second: u64,
    /// When the line has nothing more to carry.
    free_at: Mutex<Instant>,
    reads: AtomicU64,
    bytes: AtomicU64,
}

impl Far {
    /// Reads and bytes so far.
    pub(crate) fn counts(&self) -> (u64, u64) {
        (self.reads.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed))
    }
}

impl PageSource for Far {
    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> io::Result<()> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(buf.len() as u64, Ordering::Relaxed);
        let mut due = Instant::now() + self.latency;
        if self.bytes_per_second > 0 {
            let takes = Duration::from_secs_f64(buf.len() as f64 / self.bytes_per_second as f64);
            let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            *free_at = due.max(*free_at) + takes;
            due = *free_at;
        }
        self.storage.read_at(offset_bytes, buf)?;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        Ok(())
    }

    fn len_bytes(&self) -> Option<u64> {
        self.storage.len_bytes()
    }

    fn granule_bytes(&self) -> usize {
        self.storage.granule_bytes()
    }

    fn will_read(&self, range_bytes: Range<u64>) {
        self.storage.will_read(range_bytes);
    }

    fn identity(&self) -> Option<Vec<u8>> {
        self.storage.identity()
    }
}
