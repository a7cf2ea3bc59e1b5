//! Compressed images in the seekable format of zstd: frames that are decompressed each by itself, and a table of them.

use std::cmp::Reverse;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};
use zstd_safe::DCtx;

use super::file::{FileOptions, FileSource};
use super::{GRANULE_MAX_BYTES, PageSource, check_range};
use crate::error::{Error, Result, SourceFault};
use crate::kiobuf::Kiobuf;
use crate::page::page_size;

mod frames;
mod make;
mod map;
mod storage;
mod table;

pub use make::{MadeImage, ZstdOptions};

use frames::{Frame, Frames};
use map::ImageMap;
use storage::Storage;

/// The frames of an image at the most; their table takes 20 bytes of memory for each. With frames of 128 KiB that is 512 GiB.
const FRAMES_MAX: u32 = 1 << 22;
/// The bytes of a frame at the most, decompressed: a read may take as much memory twice.
const FRAME_MAX_BYTES: usize = 1 << 24;
/// Decompressors that wait for the next read at the most, some 100 KiB each.
const IDLE_CONTEXTS_MAX: usize = 8;
/// The runs of zeros that a list names, at the most: each is looked up and kept in memory.
const RUNS_MAX: usize = 1 << 16;

/// Reads pages of a compressed image in the seekable format of zstd.
///
/// Any image of that format will do, as long as its frames are of 16 MiB at the most and not more than 4 Mi: `zstd -d` reads it
/// too. [`ZstdImage::make`] makes one whose frames all have checksums, and that knows its zeros and its identity. Reads of
/// different frames, or of the same, go on side by side.
///
/// A frame is checked before any byte of it is used: its length, and the checksums in the frame and the table. What fails is
/// an error, and so SIGBUS. The table stays in memory from the opening on: with its checksums, a right frame in a wrong place
/// and one of another image, written over this one, are errors too. In images of other tools the table has no checksum of its own
/// and often none of the frames, which may lack theirs: damage there may go unnoticed.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::sync::Arc;
/// use kiomap::{AttachOptions, Engine, ZstdImage, ZstdOptions};
///
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("image.zst");
/// let heap = vec![7_u8; 1_000_000];
/// ZstdImage::make(&heap[..], std::fs::File::create(&path)?, &ZstdOptions::new(), |_| {})?;
///
/// let image = Arc::new(ZstdImage::open(&path)?);
/// let engine = Engine::new()?;
/// let region = engine.vmap(&image.list()?)?.attach(&AttachOptions::new())?;
/// let mut bytes = [0; 3];
/// region.read_at(500_000, &mut bytes)?;
/// assert_eq!(bytes, [7; 3]);
/// # Ok(())
/// # }
/// ```
pub struct ZstdImage {
    storage: Storage,
    frames: Frames,
    map: Option<ImageMap>,
    granule_bytes: usize,
    /// Decompressors that nobody uses at the moment.
    contexts: Mutex<Vec<DCtx<'static>>>,
}

impl ZstdImage {
    /// Opens an image that is a file.
    ///
    /// # Errors
    ///
    /// As for [`over`](ZstdImage::over), and those of [`FileSource::open`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::over_named(path.display().to_string(), Arc::new(FileSource::open(path, &FileOptions::new())?))
    }

    /// Opens an image whose compressed bytes come from another source: an object, a reader, a file with options.
    ///
    /// # Errors
    ///
    /// * [`Error::Invalid`] (`EINVAL`): the source does not know its length.
    /// * [`Error::Source`]: it is no image of the seekable format, or its end was cut off (`EINVAL`); its table or its map is
    ///   damaged (`EBADMSG`); it has too many or too large frames (`EFBIG`); it holds nothing (`ENODATA`); reading it failed.
    pub fn over(source: Arc<dyn PageSource>) -> Result<Self> {
        Self::over_named("the image".into(), source)
    }

    fn over_named(name: String, source: Arc<dyn PageSource>) -> Result<Self> {
        let Some(len_bytes) = source.len_bytes() else {
            let rule = "a source that holds an image must know its length";
            return Err(Error::Invalid { what: "the length of the source", value: 0, rule });
        };
        let storage = Storage { name, source, len_bytes };
        let frames = Frames::read(&storage)?;
        let map = read_map(&storage, &frames)?;
        let largest = frames.largest_bytes() as usize;
        let even = frames.frame_bytes().map(|len| len as usize);
        let granule_bytes = match even {
            Some(len) if len.is_power_of_two() && (page_size()..=GRANULE_MAX_BYTES).contains(&len) => len,
            // Then frames and granules don't match, and some frames are decompressed for several granules.
            _ => largest.next_power_of_two().clamp(page_size(), GRANULE_MAX_BYTES),
        };
        Ok(Self { storage, frames, map, granule_bytes, contexts: Mutex::default() })
    }

    /// Lists the pages of the image: those of frames that hold nothing but zeros cost no read. Of more than 65,536 runs of
    /// such frames the longest are meant; the others are read.
    ///
    /// # Errors
    ///
    /// [`Error::Overflow`] (`EOVERFLOW`): never, unless pages are larger than frames may be.
    pub fn list(self: &Arc<Self>) -> Result<Kiobuf> {
        let page = page_size() as u64;
        let (mut whole, mut list) = (Kiobuf::new(), Kiobuf::new());
        whole.map_source(Arc::clone(self) as _, self.frames.len_bytes)?;
        let mut runs: Vec<Range<u64>> = self.zero_ranges().collect();
        if runs.len() > RUNS_MAX {
            runs.select_nth_unstable_by_key(RUNS_MAX, |run| Reverse(run.end - run.start));
            runs.truncate(RUNS_MAX);
            runs.sort_unstable_by_key(|run| run.start);
        }
        for run in runs {
            // A run begins with a page, and ends with one or with the image.
            let (start, end) = (run.start / page, run.end.div_ceil(page));
            list.expand(&whole.slice(list.nr_pages()..start)?)?;
            let mut zeros = Kiobuf::new();
            zeros.map_zero(end - start)?;
            list.expand(&zeros)?;
        }
        list.expand(&whole.slice(list.nr_pages()..whole.nr_pages())?)?;
        Ok(list)
    }

    /// Returns the bytes that are known to be zeros without a read, in order.
    pub fn zero_ranges(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        // Of an image with frames below a page none is left out: a list has whole pages.
        let map = self.map.as_ref().filter(|map| map.frame_bytes as usize >= page_size());
        map.into_iter().flat_map(move |map| {
            let frame_bytes = u64::from(map.frame_bytes);
            map.zero_frames.iter().map(move |run| {
                u64::from(run.start) * frame_bytes..(u64::from(run.end) * frame_bytes).min(self.frames.len_bytes)
            })
        })
    }

    /// Returns the number of frames that hold contents.
    pub fn nr_frames(&self) -> u64 {
        self.frames.iter().filter(|frame| !frame.contents.is_empty()).count() as u64
    }

    /// Returns the bytes of the image as it lies, compressed.
    pub fn image_bytes(&self) -> u64 {
        self.storage.len_bytes
    }

    /// Returns the SHA-256 of the contents, if the image has it.
    pub fn contents_sha256(&self) -> Option<[u8; 32]> {
        self.map.as_ref().map(|map| map.contents_digest)
    }

    /// Decompresses everything and checks it: every checksum, that what is said to be zeros is, and the digest of the contents.
    /// `progress` is told the bytes that are done.
    ///
    /// # Errors
    ///
    /// [`Error::Source`]: something is damaged (`EBADMSG`), or reading failed.
    pub fn verify(&self, mut progress: impl FnMut(u64)) -> Result<()> {
        let mut zeros = self.zero_ranges().peekable();
        let (mut digest, mut buf) = (Sha256::new(), Vec::new());
        for frame in self.frames.iter().filter(|frame| !frame.contents.is_empty()) {
            buf.resize((frame.contents.end - frame.contents.start) as usize, 0);
            self.decompress(&frame, &mut buf).map_err(|error| Error::source_io(&self.storage.name, &error))?;
            while zeros.next_if(|run| run.end <= frame.contents.start).is_some() {}
            let said_zero = zeros.peek().is_some_and(|run| run.start <= frame.contents.start);
            if said_zero && !make::is_zero(&buf) {
                let why = format!("byte {} lies in a run that is said to be zeros", frame.contents.start);
                return Err(self.storage.error(SourceFault::Corrupt, &why));
            }
            digest.update(&buf);
            progress(frame.contents.end);
        }
        match self.contents_sha256() {
            Some(wanted) if wanted != <[u8; 32]>::from(digest.finalize()) => Err(self
                .storage
                .error(SourceFault::Corrupt, "the SHA-256 of its contents is not the one that it names")),
            _ => Ok(()),
        }
    }

    /// Fills `buf`, which is as long as the frame's contents, or fails; what it holds then is nothing.
    fn decompress(&self, frame: &Frame, buf: &mut [u8]) -> io::Result<()> {
        let corrupt = |why: String| {
            let why = format!("the frame of bytes {:?} is damaged: {why}", frame.contents);
            io::Error::new(ErrorKind::InvalidData, why)
        };
        let packed = self.storage.fetch(frame.compressed.clone())?;
        let Some(mut context) = self.idle_context().or_else(DCtx::try_create) else {
            return Err(io::Error::new(ErrorKind::OutOfMemory, "no memory for a decompressor"));
        };
        let outcome = context.decompress(buf, &packed);
        self.keep_context(context);
        match outcome {
            Err(code) => return Err(corrupt(zstd_safe::get_error_name(code).into())),
            Ok(count) if count != buf.len() => return Err(corrupt(format!("it holds {count} bytes"))),
            Ok(_) => {}
        }
        match frame.checksum {
            Some(checksum) if checksum != table::checksum(buf) => {
                Err(corrupt("its checksum in the seek table is another".into()))
            }
            _ => Ok(()),
        }
    }

    /// Takes a decompressor that nobody uses, unless somebody else looks for one: in a forked process nobody may ever come back
    /// from there.
    fn idle_context(&self) -> Option<DCtx<'static>> {
        self.contexts.try_lock().ok()?.pop()
    }

    /// Keeps a decompressor for the next read, or drops it.
    fn keep_context(&self, context: DCtx<'static>) {
        if let Ok(mut idle) = self.contexts.try_lock()
            && idle.len() < IDLE_CONTEXTS_MAX
        {
            idle.push(context);
        }
    }
}

/// Reads the map, which is the last frame of an image that has one.
fn read_map(storage: &Storage, frames: &Frames) -> Result<Option<ImageMap>> {
    let Some(frame) = frames.iter().next_back() else { return Ok(None) };
    let Range { start, end } = frame.compressed;
    let (len, ends) = (end - start, map::END_BYTES as u64);
    if len < ends {
        return Ok(None);
    }
    let [head, tail] = [storage.fetch_at_open(start..start + ends)?, storage.fetch_at_open(end - ends..end)?];
    if !map::is_map(&head, &tail) {
        return Ok(None);
    }
    let corrupt = |why: &str| storage.error(SourceFault::Corrupt, why);
    if len > map::MAX_BYTES as u64 {
        return Err(corrupt("its map is longer than one can be"));
    }
    let bytes = storage.fetch_at_open(start..end)?;
    let map = ImageMap::decode(&bytes, frames.table_digest).map_err(corrupt)?;
    let frame_bytes = u64::from(map.frame_bytes);
    let nr_frames = if frame_bytes == 0 { 0 } else { map.len_bytes.div_ceil(frame_bytes) };
    let fits = frame.contents.is_empty()
        && map.frame_bytes.is_power_of_two()
        && map.len_bytes == frames.len_bytes
        && frames.frame_bytes().is_some_and(|len| len == frame_bytes || (nr_frames == 1 && len == map.len_bytes))
        && map.zero_frames.last().is_none_or(|run| u64::from(run.end) <= nr_frames);
    if !fits {
        return Err(corrupt("its map is of other frames than its table"));
    }
    Ok(Some(map))
}

impl PageSource for ZstdImage {
    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(offset_bytes, buf.len(), self.frames.len_bytes)?;
        let wanted = offset_bytes..offset_bytes + buf.len() as u64;
        let (mut rest, mut at, mut scratch) = (buf, wanted.start, Vec::new());
        for frame in self.frames.holding(wanted.clone()) {
            let (start, end) = (frame.contents.start.max(wanted.start), frame.contents.end.min(wanted.end));
            // The frames follow each other without a gap.
            debug_assert_eq!(start, at);
            let (part, after) = rest.split_at_mut((end - start) as usize);
            if start == frame.contents.start && end == frame.contents.end {
                self.decompress(&frame, part)?;
            } else {
                scratch.resize((frame.contents.end - frame.contents.start) as usize, 0);
                self.decompress(&frame, &mut scratch)?;
                let from = (start - frame.contents.start) as usize;
                part.copy_from_slice(&scratch[from..from + part.len()]);
            }
            (rest, at) = (after, end);
        }
        debug_assert!(rest.is_empty());
        Ok(())
    }

    fn len_bytes(&self) -> Option<u64> {
        Some(self.frames.len_bytes)
    }

    /// The size of the frames, if it is one that a granule can have.
    fn granule_bytes(&self) -> usize {
        self.granule_bytes
    }

    fn will_read(&self, range_bytes: Range<u64>) {
        let range = range_bytes.start..range_bytes.end.min(self.frames.len_bytes);
        if range.start < range.end {
            let mut frames = self.frames.holding(range);
            let Some(first) = frames.next() else { return };
            let end = frames.last().map_or(first.compressed.end, |last| last.compressed.end);
            self.storage.source.will_read(first.compressed.start..end);
        }
    }

    /// The SHA-256 of the contents; of an image that does not name it, that of its table.
    fn identity(&self) -> Option<Vec<u8>> {
        let (kind, digest) = match &self.map {
            Some(map) => ("zstd contents ", map.contents_digest),
            None => ("zstd table ", self.frames.table_digest),
        };
        Some([kind.as_bytes(), &digest].concat())
    }
}

impl std::fmt::Debug for ZstdImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ZstdImage")
            .field("name", &self.storage.name)
            .field("len_bytes", &self.frames.len_bytes)
            .field("image_bytes", &self.storage.len_bytes)
            .field("frames", &self.frames.len())
            .field("granule_bytes", &self.granule_bytes)
            .finish_non_exhaustive()
    }
}
