//! Pages of a file by `pread`, with hints to the kernel or past its page cache.

use std::fs::{File, OpenOptions};
use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, PosixFadviseAdvice, fcntl, posix_fadvise};

use super::{PageSource, check_granule, check_range};
use crate::error::{Error, Result, SourceFault};
use crate::kiobuf::file::{check_open_for_reading, readable_bytes};
use crate::page::page_size;

/// What `O_DIRECT` reads are aligned to where the kernel does not tell (before Linux 6.1, or on file systems that don't
/// say): no block device that Linux mounts a file system of has larger logical blocks.
const DIRECT_ALIGN_BYTES: usize = 4096;

/// Says how a [`FileSource`] reads.
#[derive(Debug, Clone, Default)]
pub struct FileOptions {
    direct: bool,
    advice: Option<Advice>,
    granule_bytes: Option<usize>,
    identity: Option<Vec<u8>>,
}

/// How the kernel is told that a file will be read.
#[derive(Debug, Clone, Copy)]
enum Advice {
    Random,
    Sequential,
}

impl FileOptions {
    /// Begins with a file that is read through the page cache, with no hint, a page at a time.
    pub fn new() -> Self {
        Self::default()
    }

    /// Reads past the page cache (`O_DIRECT`): what is paged in is then in memory once, not twice.
    ///
    /// A file or file system that can't is refused, never read otherwise in silence. Use it with a large
    /// [granule](FileOptions::granule_bytes), as every read goes to the disk.
    #[must_use]
    pub fn direct(mut self) -> Self {
        self.direct = true;
        self
    }

    /// Tells the kernel that the file is read here and there (`POSIX_FADV_RANDOM`): it then reads nothing ahead.
    #[must_use]
    pub fn random(mut self) -> Self {
        self.advice = Some(Advice::Random);
        self
    }

    /// Tells the kernel that the file is read from its start to its end (`POSIX_FADV_SEQUENTIAL`): it reads twice as far ahead.
    #[must_use]
    pub fn sequential(mut self) -> Self {
        self.advice = Some(Advice::Sequential);
        self
    }

    /// Sets how many bytes are read at once for a touch, a power of two from the page size to 4 MiB; a page unless set.
    #[must_use]
    pub fn granule_bytes(mut self, bytes: usize) -> Self {
        self.granule_bytes = Some(bytes);
        self
    }

    /// Sets what [`PageSource::identity`] answers, a digest for instance. Unless set it is made of the file's device, inode, size and
    /// time of change, which a copy of the file does not share.
    #[must_use]
    pub fn identity(mut self, identity: Vec<u8>) -> Self {
        self.identity = Some(identity);
        self
    }
}

/// Reads pages of a regular file or a block device by `pread`, on the engine's workers.
///
/// For most files [`Kiobuf::map_file`](crate::Kiobuf::map_file) is the better choice: what the page cache holds it brings
/// without a worker. This one is for `O_DIRECT`, for hints, for reads of more than a fault asks for (a network file
/// system), and where a saved working set is to know the file again.
///
/// What is truncated away later is an error, and so SIGBUS for the pages that it lies in.
#[derive(Debug)]
pub struct FileSource {
    file: File,
    len_bytes: u64,
    direct: Option<DirectAlign>,
    granule_bytes: usize,
    identity: Vec<u8>,
}

/// What reads past the page cache are to be aligned to, both powers of two.
#[derive(Debug, Clone, Copy)]
struct DirectAlign {
    /// The offset in the file, and the length.
    offset: usize,
    /// The address in memory.
    memory: usize,
}

impl FileSource {
    /// Opens a file by its path.
    ///
    /// # Errors
    ///
    /// As for [`new`](FileSource::new); and [`Error::Source`]: it is not there (`ENOENT`), may not be read (`EACCES`), or can't
    /// be opened with `O_DIRECT` (`EOPNOTSUPP`).
    pub fn open(path: impl AsRef<Path>, options: &FileOptions) -> Result<Self> {
        let path = path.as_ref();
        // A FIFO would else be waited for.
        let flags = OFlag::O_NONBLOCK | if options.direct { OFlag::O_DIRECT } else { OFlag::empty() };
        let file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path).map_err(|error| {
            if options.direct && error.raw_os_error() == Some(libc::EINVAL) {
                return no_direct(&path.display().to_string());
            }
            Error::source_io(&path.display().to_string(), &error)
        })?;
        Self::new_named(&path.display().to_string(), file, options)
    }

    /// Takes over an open file. Hints and `O_DIRECT` are set for whoever shares the open file, by `dup` or fork, too.
    ///
    /// # Errors
    ///
    /// * [`Error::Invalid`] (`EINVAL`): the file is neither a regular file nor a block device, or is not open for reading;
    ///   the granule is no power of two from the page size to 4 MiB.
    /// * [`Error::Source`]: the file is empty (`ENODATA`), or can't be read with `O_DIRECT` (`EOPNOTSUPP`).
    /// * [`Error::Sys`]: the file can't be examined.
    pub fn new(file: File, options: &FileOptions) -> Result<Self> {
        Self::new_named("the file", file, options)
    }

    fn new_named(name: &str, file: File, options: &FileOptions) -> Result<Self> {
        let flags = check_open_for_reading(&file)?;
        let len_bytes = readable_bytes(&file)?;
        if len_bytes == 0 {
            let why = "a page list maps at least one byte".into();
            return Err(Error::Source { name: name.into(), fault: SourceFault::Empty, why });
        }
        let granule_bytes = check_granule(options.granule_bytes.unwrap_or(page_size()))?;
        // Whoever opened the file with O_DIRECT meant it.
        let direct = match options.direct || flags.contains(OFlag::O_DIRECT) {
            true => Some(DirectAlign::of(name, &file, flags)?),
            false => None,
        };
        if let Some(advice) = options.advice {
            let advice = match advice {
                Advice::Random => PosixFadviseAdvice::POSIX_FADV_RANDOM,
                Advice::Sequential => PosixFadviseAdvice::POSIX_FADV_SEQUENTIAL,
            };
            posix_fadvise(&file, 0, 0, advice).map_err(Error::sys("posix_fadvise of a file to page"))?;
        }
        let identity = match &options.identity {
            Some(identity) => identity.clone(),
            None => identity_of(&file, len_bytes)?,
        };
        Ok(Self { file, len_bytes, direct, granule_bytes, identity })
    }

    /// Reads past the page cache. What the caller's buffer is not aligned for goes through one that is.
    fn read_direct(&self, align: DirectAlign, at: u64, buf: &mut [u8]) -> io::Result<()> {
        let mask = align.offset as u64 - 1;
        let aligned = (at | buf.len() as u64) & mask == 0 && buf.as_ptr().addr().is_multiple_of(align.memory);
        if aligned {
            return self.fill(at, buf, buf.len(), align.offset);
        }
        let start = at & !mask;
        let head = (at - start) as usize;
        let len = (head + buf.len()).next_multiple_of(align.offset);
        let mut bounce = vec![0; len + align.memory];
        let skip = bounce.as_ptr().addr().next_multiple_of(align.memory) - bounce.as_ptr().addr();
        let bounce = &mut bounce[skip..skip + len];
        self.fill(start, bounce, head + buf.len(), align.offset)?;
        buf.copy_from_slice(&bounce[head..head + buf.len()]);
        Ok(())
    }

    /// Reads until `buf` holds the first `wanted` bytes of it. Goes on only at multiples of `step`: the last read of a file
    /// past the page cache ends within one.
    fn fill(&self, at: u64, buf: &mut [u8], wanted: usize, step: usize) -> io::Result<()> {
        let mut done = 0;
        while done < wanted {
            match self.file.read_at(&mut buf[done..], at + done as u64) {
                Ok(count) if count == 0 || (done + count < wanted && !count.is_multiple_of(step)) => {
                    let why = format!("the file ends at byte {}: it was truncated", at + (done + count) as u64);
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, why));
                }
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl PageSource for FileSource {
    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(offset_bytes, buf.len(), self.len_bytes)?;
        match self.direct {
            Some(align) => self.read_direct(align, offset_bytes, buf),
            None => self.fill(offset_bytes, buf, buf.len(), 1),
        }
    }

    fn len_bytes(&self) -> Option<u64> {
        Some(self.len_bytes)
    }

    fn granule_bytes(&self) -> usize {
        self.granule_bytes
    }

    /// Has the kernel read the range into its page cache, unless the file is read past it.
    fn will_read(&self, range_bytes: Range<u64>) {
        let range = range_bytes.start.min(self.len_bytes)..range_bytes.end.min(self.len_bytes);
        if self.direct.is_none() && range.start < range.end {
            // Only a hint: the read itself tells what is wrong with the file.
            let _ = posix_fadvise(
                &self.file,
                range.start as i64,
                (range.end - range.start) as i64,
                PosixFadviseAdvice::POSIX_FADV_WILLNEED,
            );
        }
    }

    fn identity(&self) -> Option<Vec<u8>> {
        Some(self.identity.clone())
    }
}

impl DirectAlign {
    /// Asks the kernel, and has the file read past the page cache from now on.
    fn of(name: &str, file: &File, flags: OFlag) -> Result<Self> {
        if !flags.contains(OFlag::O_DIRECT) {
            match fcntl(file, FcntlArg::F_SETFL(flags | OFlag::O_DIRECT)) {
                Ok(_) => {}
                Err(Errno::EINVAL) => return Err(no_direct(name)),
                Err(errno) => return Err(Error::Sys { call: "fcntl(F_SETFL) with O_DIRECT", errno }),
            }
        }
        let mut told = MaybeUninit::<libc::statx>::zeroed();
        // SAFETY: the path is an empty C string, with which AT_EMPTY_PATH asks about the descriptor, and `told` has room for
        // the one `statx` that the call writes.
        let answer = unsafe {
            libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, told.as_mut_ptr())
        };
        Errno::result(answer).map_err(Error::sys("statx of a file to page"))?;
        // SAFETY: all bytes were zeroed, which is a value of every field, and the call writes only such.
        let told = unsafe { told.assume_init() };
        if told.stx_mask & libc::STATX_DIOALIGN == 0 {
            return Ok(Self { offset: DIRECT_ALIGN_BYTES, memory: DIRECT_ALIGN_BYTES });
        }
        // The kernel answers zero for a file that can't (encrypted or verified ones of some file systems).
        let (offset, memory) = (told.stx_dio_offset_align as usize, told.stx_dio_mem_align as usize);
        if !offset.is_power_of_two() || !memory.is_power_of_two() {
            return Err(no_direct(name));
        }
        Ok(Self { offset, memory })
    }
}

fn no_direct(name: &str) -> Error {
    let why = "its file system does not read it with O_DIRECT: leave `direct` away".into();
    Error::Source { name: name.into(), fault: SourceFault::Unsupported, why }
}

fn identity_of(file: &File, len_bytes: u64) -> Result<Vec<u8>> {
    let meta = file.metadata().map_err(Error::io("fstat of a file to page"))?;
    let (device, inode, seconds, nanoseconds) = (meta.dev(), meta.ino(), meta.mtime(), meta.mtime_nsec());
    Ok(format!("file {device} {inode} {len_bytes} {seconds}.{nanoseconds:09}").into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Files of two file systems may have the same inode, size and time of change.
    #[test]
    fn a_file_is_told_from_one_of_another_device() {
        let file = tempfile::tempfile().unwrap();
        let device = file.metadata().unwrap().dev().to_string();
        let identity = String::from_utf8(identity_of(&file, 7).unwrap()).unwrap();
        assert!(identity.split(' ').any(|word| word == device), "{identity}");
    }

    /// Reads past the page cache give the bytes that were written, whatever the range and wherever the buffer lies.
    #[test]
    fn direct_reads_of_any_range_are_right() {
        let len = 5 * page_size() + 777;
        let bytes: Vec<u8> = (0..len).map(|at| (at / 7 * 31 + at) as u8).collect();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &bytes).unwrap();
        let source = match FileSource::open(file.path(), &FileOptions::new().direct()) {
            Ok(source) => source,
            Err(error) => {
                assert_eq!(error.errno(), Errno::EOPNOTSUPP, "{error}");
                eprintln!("direct_reads_of_any_range_are_right: skipped, because of {error}");
                return;
            }
        };
        let mut room = vec![0; len + 64];
        for (start, end) in
            [(0, len), (0, 1), (1, 2), (511, 4097), (4096, 8192), (5 * page_size(), len), (len - 1, len)]
        {
            for shift in [0, 1, 16] {
                let buf = &mut room[shift..shift + end - start];
                buf.fill(0xee);
                source.read_at(start as u64, buf).unwrap();
                assert!(buf == &bytes[start..end], "{start}..{end} at {shift}");
            }
        }
        let mut one = [0];
        assert_eq!(source.read_at(len as u64, &mut one).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        // What is gone is an error, also where the read would begin before it.
        OpenOptions::new().write(true).open(file.path()).unwrap().set_len(page_size() as u64 + 10).unwrap();
        let mut two_pages = vec![0; 2 * page_size()];
        assert_eq!(source.read_at(0, &mut two_pages).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        source.read_at(page_size() as u64, &mut two_pages[..10]).unwrap();
        assert_eq!(two_pages[..10], bytes[page_size()..page_size() + 10]);
    }
}
