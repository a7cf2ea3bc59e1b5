//! The memory that slow pages take: bounded, however much is paged and however large the granules are.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kiomap::{GRANULE_MAX_BYTES, page_size};
use support::scene::Rng;
use support::slow::{Says, SlowSource};
use support::{alone_for, attached, engine_builder, mark, read_page, settled_stats};

const BOUND_BYTES: u64 = 64 << 20;
const LIST_BYTES: u64 = 4 << 30;

/// A line of a file of `/proc` that says how many kB, in bytes.
fn kilobytes(path: &str, name: &str) -> u64 {
    let text = std::fs::read_to_string(path).unwrap();
    let line = text.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

/// 4 GiB come from a source that takes 5 ms a read, in the largest granules: the buffers never hold more than the default
/// bound, which is less than 64 MiB, and the process's own memory grows by no more either.
#[test]
fn paging_four_gigabytes_holds_few_in_buffers() {
    alone_for(Duration::from_secs(300), "paging_four_gigabytes_holds_few_in_buffers", || {
        needs_sources!();
        let available = kilobytes("/proc/meminfo", "MemAvailable:");
        if available < LIST_BYTES + (2 << 30) {
            skip!("only {available} bytes of memory are available, and 4 GiB are to be there at once");
        }
        let engine = engine_builder().build().unwrap();
        let granule_pages = (GRANULE_MAX_BYTES / page_size()) as u64;
        let source = SlowSource::pausing(Says { granule_pages, ..Says::default() }, Duration::from_millis(5));
        let nr_pages = LIST_BYTES / page_size() as u64;
        let (_, region) = attached(&engine, &source.list(nr_pages));
        // Of the process alone: what is shared is what was paged in.
        let own_memory = || kilobytes("/proc/self/status", "RssAnon:");
        let before = own_memory();
        let (next, most) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        std::thread::scope(|scope| {
            for seed in 0..8 {
                let (next, most, region) = (Arc::clone(&next), Arc::clone(&most), &region);
                scope.spawn(move || {
                    let mut rng = Rng::new(seed);
                    loop {
                        let first = next.fetch_add(1, Ordering::Relaxed) * granule_pages;
                        if first >= nr_pages {
                            return;
                        }
                        for page in [rng.below(granule_pages), 0, granule_pages - 1].map(|page| first + page) {
                            assert_eq!(read_page(region, page), Ok(mark(page)));
                        }
                        most.fetch_max(own_memory(), Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(source.asked().len() as u64, nr_pages / granule_pages);
        let stats = settled_stats(&engine);
        assert_eq!(stats.pages_read_by_workers, nr_pages);
        assert!(stats.read_buffer_bytes_peak <= 40 << 20, "{stats:?}");
        let grown = most.load(Ordering::Relaxed).saturating_sub(before);
        assert!(grown <= BOUND_BYTES, "{grown} bytes of memory of its own, {stats:?}");
        support::tell(&format!(
            "4 GiB were paged with {} bytes in buffers at the most, and {grown} bytes more of the process's own memory",
            stats.read_buffer_bytes_peak
        ));
    });
}
