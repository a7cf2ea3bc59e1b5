//! Fault injection over any page source: what it brings is right, or it fails in one of the ways in which sources fail.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use kiomap::{AttachOptions, Engine, Error, FailurePolicy, Features, Kiobuf, PageSource, Region, page_size};

use super::scene::Rng;
use super::{in_page, read_page};

/// How often each of the failures is met, in a thousand reads.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Odds {
    /// An error, with nothing written.
    pub(crate) errors: u64,
    /// A part of the bytes, and an error.
    pub(crate) short: u64,
    /// Wrong bytes, which a checksum gives away: an error.
    pub(crate) corrupt: u64,
    /// Wrong bytes, and a panic.
    pub(crate) panics: u64,
    /// Right bytes, after a while.
    pub(crate) slow: u64,
    /// No answer until [`Faulty::release`]; then any of the others.
    pub(crate) stalls: u64,
}

/// Wraps a page source. What a read does is chosen by the seed and the number of the read.
pub(crate) struct Faulty<S> {
    inner: S,
    seed: u64,
    odds: Odds,
    reads: AtomicU64,
    calm: AtomicBool,
    released: Mutex<bool>,
    changed: Condvar,
}

impl<S> Faulty<S> {
    pub(crate) fn new(inner: S, seed: u64, odds: Odds) -> Faulty<S> {
        let (reads, calm) = (AtomicU64::new(0), AtomicBool::new(false));
        Faulty { inner, seed, odds, reads, calm, released: Mutex::new(false), changed: Condvar::new() }
    }

    /// Lets go of the reads that are stalled, and stalls no further ones.
    pub(crate) fn release(&self) {
        *self.released.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    /// Has every read that begins from now on succeed, if that of the wrapped source does.
    pub(crate) fn calm(&self) {
        self.calm.store(true, Ordering::SeqCst);
        self.release();
    }

    fn stall(&self) {
        let released = self.released.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.changed.wait_while(released, |released| !*released).unwrap_or_else(PoisonError::into_inner));
    }
}

impl<S: PageSource> PageSource for Faulty<S> {
    fn read_at(&self, offset_bytes: u64, buf: &mut [u8]) -> io::Result<()> {
        let read = self.reads.fetch_add(1, Ordering::SeqCst);
        if self.calm.load(Ordering::SeqCst) {
            return self.inner.read_at(offset_bytes, buf);
        }
        let mut rng = Rng::new(self.seed ^ read.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let Odds { errors, short, corrupt, panics, slow, stalls } = self.odds;
        let mut dice = rng.below(1000);
        let mut is = |odds: u64| {
            let met = dice < odds;
            dice = dice.wrapping_sub(if met { 0 } else { odds });
            met
        };
        let mut dice_after_stall = 0;
        if is(stalls) {
            self.stall();
            dice_after_stall = 1 + rng.below(5);
        }
        let mut meets = |odds, number| if dice_after_stall == 0 { is(odds) } else { dice_after_stall == number };
        if meets(errors, 1) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        if meets(short, 2) {
            // Whole pages, as a source is asked for.
            let half = buf.len() / 2 / page_size() * page_size();
            self.inner.read_at(offset_bytes, &mut buf[..half])?;
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if meets(corrupt, 3) {
            self.inner.read_at(offset_bytes, buf)?;
            buf[rng.below(buf.len() as u64) as usize] ^= 0x40;
            return Err(io::Error::new(io::ErrorKind::InvalidData, "checksum"));
        }
        if meets(panics, 4) {
            buf.fill(0xdd);
            // Past the hook, which would print each of them.
            std::panic::resume_unwind(Box::new("injected"));
        }
        if meets(slow, 5) {
            std::thread::sleep(Duration::from_micros(rng.below(2000)));
        }
        self.inner.read_at(offset_bytes, buf)
    }

    fn len_bytes(&self) -> Option<u64> {
        self.inner.len_bytes()
    }

    fn granule_bytes(&self) -> usize {
        self.inner.granule_bytes()
    }

    fn may_block(&self) -> bool {
        self.inner.may_block()
    }

    fn will_read(&self, range_bytes: std::ops::Range<u64>) {
        self.inner.will_read(range_bytes);
    }

    fn identity(&self) -> Option<Vec<u8>> {
        self.inner.identity()
    }
}

/// Reads a whole page, if it can be had: what is there must be right in every byte.
fn check(region: &Region, page: u64, seed: u64, is_right: &impl Fn(u64, &[u8]) -> bool) -> bool {
    if let Err(refused) = read_page(region, page) {
        assert!(refused.is_sigbus_at(in_page(region, page) as usize), "seed {seed}, page {page}: {refused:?}");
        return false;
    }
    let mut bytes = vec![0; page_size()];
    region.read_at(page as usize * page_size(), &mut bytes).unwrap();
    assert!(is_right(page, &bytes), "seed {seed}, page {page} has wrong bytes");
    true
}

/// Publishes the first pages of a source with failures chosen by a seed, and touches them from three threads, which also ask
/// for pages again: whatever they see is right, or SIGBUS. In the end the source is itself again, and all of it must be had.
/// Answers how many touches were refused.
pub(crate) fn seeded_run(
    engine: &Engine,
    seed: u64,
    inner: impl PageSource,
    nr_pages: u64,
    is_right: impl Fn(u64, &[u8]) -> bool + Sync,
) -> u64 {
    let mut rng = Rng::new(!seed);
    let mut odds = |most| if rng.below(3) == 0 { 0 } else { rng.below(most) };
    let odds = Odds {
        errors: odds(200),
        short: odds(150),
        corrupt: odds(150),
        panics: odds(100),
        slow: odds(200),
        // Each takes as long as the deadline.
        stalls: odds(15),
    };
    let policy = FailurePolicy::default()
        .retries(rng.below(3) as u32)
        .backoff(Duration::from_micros(rng.below(800)))
        .deadline(Duration::from_millis(10 + rng.below(30)));
    let source = Arc::new(Faulty::new(inner, seed, odds));
    let mut list = Kiobuf::new();
    list.map_source(Arc::clone(&source) as Arc<dyn PageSource>, nr_pages * page_size() as u64).unwrap();
    let vmap = engine.vmap_builder(&list).failure_policy(policy).build().unwrap();
    let regions = [0; 2].map(|_| vmap.attach(&AttachOptions::new()).unwrap());
    let touches = 10 + rng.below(20);
    let refused = std::thread::scope(|scope| {
        let toucher = |toucher: u64| {
            let (region, vmap, is_right) = (&regions[toucher as usize % 2], &vmap, &is_right);
            scope.spawn(move || {
                let mut rng = Rng::new(seed.wrapping_mul(7) + toucher);
                let mut refused = 0;
                for _ in 0..touches {
                    refused += u64::from(!check(region, rng.below(nr_pages), seed, is_right));
                    if rng.below(20) == 0 {
                        let start = rng.below(nr_pages);
                        // It may fail again, as any touch.
                        let _ = vmap.retry(start..start + 4);
                    }
                }
                refused
            })
        };
        let touchers: Vec<_> = (0..3).map(toucher).collect();
        touchers.into_iter().map(|toucher| toucher.join().unwrap()).sum()
    });
    source.calm();
    if engine.features().contains(Features::POISON) {
        // What has stalled may be late for a while.
        while let Err(error) = vmap.retry(0..nr_pages) {
            assert!(matches!(error, Error::NoPage { .. }), "seed {seed}: {error}");
        }
        for region in &regions {
            let had = (0..nr_pages).all(|page| check(region, page, seed, &is_right));
            assert!(had, "seed {seed}: a page is refused still");
        }
    }
    refused
}
