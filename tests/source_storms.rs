//! Faults of every kind, from a seed, under every source that ships: a touch has the right bytes or is SIGBUS.
//!
//! A run is one small list over one source with a plan of faults of its own. `KIOMAP_FAULT_RUNS` says how many there are, and
//! `KIOMAP_FAULT_SEED` which: a run that fails names its seed, and is run again alone by a number of 1.

mod support;

use std::fs::File;
use std::io::{Cursor, Error as IoError, ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiomap::{
    AttachOptions, Engine, FailurePolicy, FileOptions, FileSource, FnSource, Kiobuf, PageSource, ReadSource, page_size,
};
use support::contents::{contents, right_or_sigbus};
use support::{alone_for, engine_builder, settled_stats};

const RUNS: u64 = 500;
const PAGES: usize = 12;

/// A generator of which a test has many: the bits of a counter, mixed.
struct Random(AtomicU64);

impl Random {
    fn below(&self, limit: u64) -> u64 {
        let mut bits = self.0.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (bits ^ (bits >> 31)) % limit
    }
}

/// What befalls reads, drawn anew for each.
struct Faults {
    random: Random,
    /// Of a hundred reads, how many fail.
    share: u64,
    /// There is a checksum above that notices a bit that is turned.
    checksummed: bool,
    /// None before the list is attached.
    on: AtomicBool,
}

impl Faults {
    /// Lets a read happen, perhaps late; or fails it, panics, or tells how many of its bytes there are and which bit is turned.
    fn befall(&self, len: usize) -> std::io::Result<(usize, Option<usize>)> {
        if !self.on.load(Ordering::Relaxed) || len == 0 || self.random.below(100) >= self.share {
            return Ok((len, None));
        }
        match self.random.below(if self.checksummed { 7 } else { 5 }) {
            0 => {
                Err(IoError::from_raw_os_error([libc::EIO, libc::ESTALE, libc::ENOMEM][self.random.below(3) as usize]))
            }
            1 => Err(ErrorKind::InvalidData.into()),
            2 => panic!("as planned"),
            3 => Ok((self.random.below(len as u64) as usize, None)),
            4 => {
                // Longer than others take; no test waits for it.
                std::thread::sleep(Duration::from_micros(self.random.below(3000)));
                Ok((len, None))
            }
            _ => Ok((len, Some(self.random.below(8 * len as u64) as usize))),
        }
    }
}

/// A reader of bytes under a plan. What is short is the end of the reader.
struct FaultyReader {
    bytes: Cursor<Arc<Vec<u8>>>,
    faults: Arc<Faults>,
    ended: bool,
}

impl Read for FaultyReader {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        if self.ended {
            return Ok(0);
        }
        let (len, turned) = self.faults.befall(buf.len())?;
        self.ended = len < buf.len();
        let at = self.bytes.position() as usize;
        let bytes = &self.bytes.get_ref()[at..];
        let len = len.min(bytes.len());
        buf[..len].copy_from_slice(&bytes[..len]);
        if let Some(bit) = turned.filter(|bit| bit / 8 < len) {
            buf[bit / 8] ^= 1 << (bit % 8);
        }
        self.bytes.set_position((at + len) as u64);
        Ok(len)
    }
}

impl Seek for FaultyReader {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        self.ended = false;
        let at = match to {
            SeekFrom::Start(at) => at,
            SeekFrom::End(0) => self.bytes.get_ref().len() as u64,
            other => unreachable!("{other:?}"),
        };
        self.bytes.set_position(at);
        Ok(at)
    }
}

/// A reader, a closure, and a file that somebody truncates: those that are there without a feature.
fn plain(kind: u64, bytes: &Arc<Vec<u8>>, faults: &Arc<Faults>) -> (Kiobuf, Option<File>) {
    let granule = page_size() << faults.random.below(3);
    let reader = || FaultyReader { bytes: Cursor::new(Arc::clone(bytes)), faults: Arc::clone(faults), ended: false };
    match kind {
        0 => (whole(ReadSource::new(reader()).unwrap().with_granule_bytes(granule).unwrap()), None),
        1 => {
            let (bytes, faults) = (Arc::clone(bytes), Arc::clone(faults));
            let source = FnSource::new(bytes.len() as u64, move |at, buf: &mut [u8]| {
                let (len, _) = faults.befall(buf.len())?;
                if len < buf.len() {
                    return Err(ErrorKind::UnexpectedEof.into());
                }
                buf.copy_from_slice(&bytes[at as usize..at as usize + buf.len()]);
                Ok(())
            });
            (whole(source.with_granule_bytes(granule).unwrap()), None)
        }
        _ => {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(bytes, 0).unwrap();
            let options = FileOptions::new().granule_bytes(granule);
            (whole(FileSource::new(file.try_clone().unwrap(), &options).unwrap()), Some(file))
        }
    }
}

fn whole(source: impl PageSource) -> Kiobuf {
    let (mut list, len) = (Kiobuf::new(), source.len_bytes().unwrap());
    list.map_source(Arc::new(source), len).unwrap();
    list
}

/// A compressed image of the bytes, over any of the plain sources; its zeros are zeros.
#[cfg(feature = "zstd")]
fn image(kind: u64, bytes: &[u8], faults: &Arc<Faults>) -> (Kiobuf, Option<File>) {
    use kiomap::{ZstdImage, ZstdOptions};

    let mut packed = Vec::new();
    let options = ZstdOptions::new().frame_bytes(page_size() << faults.random.below(3)).level(1);
    ZstdImage::make(bytes, &mut packed, &options, |_| {}).unwrap();
    let packed = Arc::new(packed);
    let (storage, file): (Arc<dyn PageSource>, _) = if kind == 0 {
        let reader = FaultyReader { bytes: Cursor::new(packed), faults: Arc::clone(faults), ended: false };
        (Arc::new(ReadSource::new(reader).unwrap()), None)
    } else {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&packed, 0).unwrap();
        (Arc::new(FileSource::new(file.try_clone().unwrap(), &FileOptions::new()).unwrap()), Some(file))
    };
    (Arc::new(ZstdImage::over(storage).unwrap()).list().unwrap(), file)
}

/// An object of a server whose next answers are bad ones.
#[cfg(feature = "object-store")]
fn object(bytes: &[u8], faults: &Arc<Faults>) -> Kiobuf {
    use kiomap::{Error, ObjectOptions, ObjectSource, SourceFault};
    use support::web::{Manners, Web};

    const BAD: [Manners; 10] = [
        Manners::Status(404),
        Manners::Status(412),
        Manners::OtherRange,
        Manners::Short,
        Manners::Long,
        Manners::Whole,
        Manners::Other,
        Manners::Nameless,
        Manners::OtherSize,
        Manners::CloseWithin,
    ];
    let web = Web::serve(bytes.to_vec());
    let options = ObjectOptions::new().deadline(Duration::from_millis(150));
    // A busy machine may be slower than that; the whole test has a deadline.
    let source = loop {
        match ObjectSource::open(&web.url(), &options) {
            Err(Error::Source { fault: SourceFault::TimedOut, .. }) => {}
            opened => break opened.unwrap(),
        }
    };
    let manners: Vec<_> = (0..PAGES)
        .map(|_| match faults.random.below(100) < faults.share {
            true => BAD[faults.random.below(BAD.len() as u64) as usize],
            false => Manners::Honest,
        })
        .chain([Manners::Honest])
        .collect();
    web.behave(&manners);
    whole(source)
}

/// The sources there are with these features.
const KINDS: u64 = 3 + if cfg!(feature = "zstd") { 2 } else { 0 };

/// One run; how many pages were right and how many refused.
fn run(engine: &Engine, seed: u64) -> (usize, usize) {
    let random = Random(AtomicU64::new(seed.wrapping_mul(0x2545_f491_4f6c_dd1d)));
    let kind = random.below(KINDS);
    // Requests of a server take longer than anything else here.
    let over_http = cfg!(feature = "object-store") && random.below(50) == 0;
    let bytes = Arc::new(contents(PAGES * page_size() - random.below(page_size() as u64) as usize, seed));
    let share = [0, 5, 30, 80][random.below(4) as usize];
    let (checksummed, on) = (kind >= 3 && !over_http, AtomicBool::new(false));
    let faults = Arc::new(Faults { random, share, checksummed, on });
    let (list, file) = match kind {
        #[cfg(feature = "object-store")]
        _ if over_http => (object(&bytes, &faults), None),
        #[cfg(feature = "zstd")]
        3.. => image(kind - 3, &bytes, &faults),
        _ => plain(kind, &bytes, &faults),
    };
    // Tried again at once, if at all.
    let policy = FailurePolicy::default().retries(faults.random.below(3) as u32).backoff(Duration::ZERO);
    let vmap = engine.vmap_builder(&list).failure_policy(policy).build().unwrap();
    let region = vmap.attach(&AttachOptions::new()).unwrap();
    faults.on.store(true, Ordering::Relaxed);
    let sums = Mutex::new((0, 0));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let (right, refused) = right_or_sigbus(&region, &bytes);
                let mut sums = sums.lock().unwrap();
                *sums = (sums.0 + right, sums.1 + refused);
            });
        }
        if let Some(file) = file.filter(|_| share > 0) {
            // While it is read; bits are turned only where they are noticed.
            let len = file.metadata().unwrap().len();
            if checksummed && faults.random.below(2) == 0 {
                let (at, mut byte) = (faults.random.below(len), [0]);
                file.read_exact_at(&mut byte, at).unwrap();
                file.write_all_at(&[byte[0] ^ (1 << faults.random.below(8))], at).unwrap();
            } else {
                file.set_len(faults.random.below(len)).unwrap();
            }
        }
    });
    sums.into_inner().unwrap()
}

/// Errors, panics, short reads, stalls, damage, truncation, and a server that lies, in runs from a seed, under every source: only
/// right bytes or SIGBUS.
#[test]
fn faults_under_every_source_give_right_bytes_or_sigbus() {
    needs_sources!();
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let (runs, first) = (number("KIOMAP_FAULT_RUNS").unwrap_or(RUNS), number("KIOMAP_FAULT_SEED").unwrap_or(1));
    let deadline = Duration::from_secs(60 + runs / 10);
    alone_for(deadline, "faults_under_every_source_give_right_bytes_or_sigbus", || {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if panic.payload_as_str() != Some("as planned") {
                hook(panic);
            }
        }));
        let engine = engine_builder().build().unwrap();
        let (mut right, mut refused) = (0, 0);
        for seed in first..first + runs {
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(&engine, seed)));
            let (one, other) = outcome.unwrap_or_else(|_| panic!("KIOMAP_FAULT_SEED={seed} KIOMAP_FAULT_RUNS=1"));
            assert_eq!(one + other, 2 * PAGES, "seed {seed}");
            (right, refused) = (right + one, refused + other);
        }
        let stats = settled_stats(&engine);
        support::tell(&format!("{right} pages right, {refused} refused, {} panics caught", stats.panics));
        if runs >= 100 {
            assert!(right as u64 > 6 * runs && refused as u64 > runs && stats.panics > runs / 20, "{stats:?}");
        }
    });
}
