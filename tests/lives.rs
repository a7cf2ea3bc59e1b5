//! Lives by the thousand: what a process, or an engine, leaves behind must be nothing, however many come and go.
//!
//! `KIOMAP_LIVES=full` runs a hundred thousand children and ten thousand engines; a plain run some of each.

mod support;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiomap::{AttachOptions, Engine, Kiobuf, Region, Shutdown, Vmap, page_size};
use support::scene::at;
use support::{alone_for, engine_builder, eventually, mark, pages, reap_ok, tell, threads, touch};

/// Each child of a batch touches a page that nobody touched before: so many are there in a vmap.
const BATCH: u64 = 250;
/// Mappings that may come and go with the allocator and with the stacks that are kept for later threads.
const SPARE_MAPPINGS: usize = 32;
/// The same, of memory: a hundred bytes lost in each of a hundred thousand lives would be more.
const SPARE_BYTES: u64 = 8 << 20;

/// What a process holds that a leak would add to.
#[derive(Debug, PartialEq)]
struct Holdings {
    /// What each descriptor names, sorted; numbers of sockets and the like left out.
    descriptors: Vec<String>,
    threads: Vec<String>,
    /// Mappings of vmaps, hidden ones too.
    vmap_mappings: usize,
    /// What the kernel holds for the memfds that are open here.
    memfd_bytes: u64,
    mappings: usize,
    private_bytes: u64,
}

impl Holdings {
    fn now() -> Holdings {
        let (mut descriptors, mut memfd_bytes) = (Vec::new(), 0);
        for entry in fs::read_dir("/proc/self/fd").unwrap() {
            let path = entry.unwrap().path();
            // The directory itself is closed by the time when it is looked at.
            let Ok(name) = fs::read_link(&path) else { continue };
            let name = name.to_string_lossy().into_owned();
            if name.contains("memfd:") {
                memfd_bytes += fs::metadata(&path).unwrap().blocks() * 512;
            }
            descriptors.push(name.split(":[").next().unwrap_or_default().to_owned());
        }
        descriptors.sort_unstable();
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let anonymous = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        let mut threads = threads();
        threads.sort_unstable();
        Holdings {
            descriptors,
            threads,
            vmap_mappings: maps.lines().filter(|line| line.contains("/memfd:kiomap")).count(),
            memfd_bytes,
            mappings: maps.lines().count(),
            private_bytes: anonymous.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10,
        }
    }

    /// Fails unless this process holds what it did then.
    #[track_caller]
    fn assert_back(&self, lives: usize) {
        let exact = |a: &Holdings, b: &Holdings| {
            (&a.descriptors, &a.threads, a.vmap_mappings, a.memfd_bytes)
                == (&b.descriptors, &b.threads, b.vmap_mappings, b.memfd_bytes)
        };
        let mut now = Holdings::now();
        // A thread that was joined may be seen for a moment longer.
        let start = Instant::now();
        while !exact(&now, self) && start.elapsed() < Duration::from_secs(20) {
            now = Holdings::now();
        }
        assert!(exact(&now, self), "after {lives} lives: {now:#?}\nbefore: {self:#?}");
        assert!(
            now.mappings <= self.mappings + SPARE_MAPPINGS && now.private_bytes <= self.private_bytes + SPARE_BYTES,
            "after {lives} lives: {} mappings, {} private bytes; before: {}, {}",
            now.mappings,
            now.private_bytes,
            self.mappings,
            self.private_bytes
        );
    }
}

/// How many lives to run, and how long that may take.
fn extent(brief: usize, full: usize) -> (usize, Duration) {
    let all = std::env::var_os("KIOMAP_LIVES").is_some_and(|value| value == "full");
    if all { (full, Duration::from_secs(1800)) } else { (brief, support::DEADLINE) }
}

/// Forks; the child touches and ends, by the shortest way: what is measured is the library's work and the kernel's.
fn short_life(region: &Region, page: u64) {
    let child = support::fork_child(|| {
        nix::unistd::alarm::set(30);
        assert_eq!(touch::read(at(region, page)), Ok(mark(page)));
    });
    reap_ok(child);
}

/// A vmap whose pages are all missing, and its area. It keeps `alive` as long as it has descriptors.
fn fresh(engine: &Engine, list: &Kiobuf, alive: &Arc<()>) -> (Vmap, Region) {
    let vmap = engine.vmap_builder(list).user_data(Arc::clone(alive)).build().unwrap();
    let region = vmap.attach(&AttachOptions::new()).unwrap();
    (vmap, region)
}

/// T111, T49: children by the thousand, each with a fault of its own: afterwards the process holds what it did before,
/// and the count is what it was.
#[test]
fn children_by_the_thousand_leave_nothing_behind() {
    let (children, deadline) = extent(2_000, 100_000);
    alone_for(deadline, "children_by_the_thousand_leave_nothing_behind", || {
        let start = Instant::now();
        let engine = engine_builder().fault_around_pages(1).build().unwrap();
        let list = pages(BATCH);
        let batch = || {
            let alive = Arc::new(());
            let (vmap, region) = fresh(&engine, &list, &alive);
            (0..BATCH).for_each(|page| short_life(&region, page));
            support::scene::settled(&engine, &vmap, 1);
            drop(region);
            engine.settle().unwrap();
            assert_eq!(vmap.refcount().unwrap(), 0);
            drop(vmap);
            // The thread for callbacks may be the last to hold it.
            eventually("the vmap is gone", || Arc::strong_count(&alive) == 1);
        };
        batch();
        let before = Holdings::now();
        let batches = children / BATCH as usize;
        for done in 1..=batches {
            batch();
            before.assert_back(done * BATCH as usize);
        }
        let stats = support::settled_stats(&engine);
        let all = (batches as u64 + 1) * BATCH;
        assert_eq!((stats.faults, stats.pages_copied, stats.processes_gone), (all, all, all), "{stats:?}");
        let seconds = start.elapsed().as_secs_f64();
        let each = seconds * 1e6 / all as f64;
        tell(&format!("{all} children came and went in {seconds:.1} s, {each:.0} µs each"));
    });
}

/// T111: engines by the thousand, each with a vmap, an area and faults, shut down in every order of drops.
#[test]
fn engines_by_the_thousand_leave_nothing_behind() {
    let (engines, deadline) = extent(300, 10_000);
    alone_for(deadline, "engines_by_the_thousand_leave_nothing_behind", || {
        let start = Instant::now();
        let list = pages(16);
        let life = |n: usize| {
            let engine = engine_builder().build().unwrap();
            let (vmap, region) = fresh(&engine, &list, &Arc::new(()));
            let page = n as u64 % 16;
            assert_eq!(touch::read(at(&region, page)), Ok(mark(page)));
            assert_eq!(touch::write(at(&region, 15 - page).wrapping_add(page_size() / 2), 9), Ok(()));
            match n % 4 {
                0 => {
                    drop((region, vmap));
                    engine.shutdown(Shutdown::Poison).unwrap();
                }
                1 => {
                    engine.shutdown(Shutdown::Fill).unwrap();
                    drop((vmap, region, engine));
                }
                2 => {
                    drop(engine);
                    drop((vmap, region));
                }
                _ => drop((region, vmap, engine)),
            }
        };
        const CHECKED_EVERY: usize = 100;
        (0..CHECKED_EVERY).for_each(life);
        eventually("the last engine's threads are gone", || threads().iter().all(|name| !name.starts_with("kiomap-")));
        let before = Holdings::now();
        for done in 1..=engines {
            life(done);
            if done % CHECKED_EVERY == 0 {
                before.assert_back(done);
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        let each = seconds * 1e6 / (engines + CHECKED_EVERY) as f64;
        tell(&format!("{} engines came and went in {seconds:.1} s, {each:.0} µs each", engines + CHECKED_EVERY));
    });
}
