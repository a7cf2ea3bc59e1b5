//! What the engine says, held against what the kernel says: areas and counts against `/proc/PID/maps`.

use std::fs;

use kiomap::{Engine, Error, Snapshot, Vmap, page_size};

/// Comparisons that may fail before it is called a difference: a process that ends or a mapping that is made meanwhile
/// is in one of the two and not in the other.
const TRIES: usize = 50;

/// From here on, offsets in an object show that a page is masked.
const FAR_BYTES: u64 = 1 << 62;

/// A range of a process, and which pages of which memfd it shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Shown {
    start: usize,
    end: usize,
    inode: u64,
    page: u64,
}

impl Shown {
    /// The part of it that lies in `start..end`.
    fn within(self, start: usize, end: usize) -> Option<Shown> {
        let (from, to) = (self.start.max(start), self.end.min(end));
        let page = self.page + (from.saturating_sub(self.start) / page_size()) as u64;
        (from < to).then_some(Shown { start: from, end: to, page, ..self })
    }
}

/// Joins neighbours that go on where the one before ends, as the kernel does and does not, as it likes.
fn joined(mut ranges: Vec<Shown>) -> Vec<Shown> {
    ranges.sort_unstable();
    let mut joined: Vec<Shown> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last)
                if last.end == range.start
                    && last.inode == range.inode
                    && last.page + ((last.end - last.start) / page_size()) as u64 == range.page =>
            {
                last.end = range.end;
            }
            _ => joined.push(range),
        }
    }
    joined
}

/// The mappings of an engine's memfds in a process, and whether each is hidden (PROT_NONE); `None` if it can't be read.
fn mapped(pid: &str, snapshot: &Snapshot) -> Option<Vec<(Shown, bool)>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).ok()?;
    let mut found = Vec::new();
    for line in maps.lines().filter(|line| line.contains("/memfd:")) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (start, end) = words[0].split_once('-').unwrap();
        let (major, minor) = words[3].split_once(':').unwrap();
        let hex = |text| u64::from_str_radix(text, 16).unwrap();
        let inode: u64 = words[4].parse().unwrap();
        if snapshot.vmaps.iter().any(|vmap| vmap.inode == inode && vmap.device == (hex(major), hex(minor))) {
            let shown = Shown {
                start: hex(start) as usize,
                end: hex(end) as usize,
                inode,
                page: hex(words[2]) / page_size() as u64,
            };
            found.push((shown, words[1].starts_with("---")));
        }
    }
    Some(found)
}

/// The differences between what the engine says and what the kernel says.
fn differences(snapshot: &Snapshot) -> Vec<String> {
    let mut differences = Vec::new();
    let vmap_of = |id| snapshot.vmaps.iter().find(|vmap| vmap.id == id);
    for vmap in &snapshot.vmaps {
        let areas = snapshot.spaces.iter().flat_map(|space| &space.areas).filter(|area| area.vmap == vmap.id).count();
        if areas != vmap.refcount {
            differences.push(format!("vmap {} counts {} and has {areas} areas", vmap.id, vmap.refcount));
        }
    }
    let own = std::process::id() as i32;
    for space in &snapshot.spaces {
        let mut said = Vec::new();
        for area in &space.areas {
            match vmap_of(area.vmap) {
                Some(vmap) => {
                    let page = area.pgoff + vmap.offset / page_size() as u64;
                    said.push(Shown { start: area.start, end: area.end, inode: vmap.inode, page });
                }
                None => differences.push(format!("an area of a vmap that is not listed: {area:?}")),
            }
        }
        let Some(mapped) = mapped(&space.pid.to_string(), snapshot) else {
            differences.push(format!("process {} is served and can't be looked at", space.pid));
            continue;
        };
        let mut seen = Vec::new();
        for (shown, hidden) in mapped {
            let before = seen.len();
            seen.extend(said.iter().filter_map(|area| {
                let part = shown.within(area.start, area.end)?;
                // A mask: in place of a page that can't be had, where the kernel has no poison.
                let masked = shown.page >= FAR_BYTES / page_size() as u64;
                let page = area.page + ((part.start - area.start) / page_size()) as u64;
                Some(if masked { Shown { page, ..part } } else { part })
            }));
            let covered: usize = seen[before..].iter().map(|part: &Shown| part.end - part.start).sum();
            // Outside every area: only the engine's own, hidden windows.
            if covered < shown.end - shown.start && !(hidden && space.pid == own) {
                differences.push(format!("process {} maps {shown:x?}, not all of it is known", space.pid));
            }
        }
        let (said, seen) = (joined(said), joined(seen));
        if said != seen {
            differences.push(format!("process {}: areas {said:x?}, kernel {seen:x?}", space.pid));
        }
    }
    // A process that nobody counts.
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap_or_default();
        let Ok(pid) = name.parse::<i32>() else { continue };
        if snapshot.spaces.iter().any(|space| space.pid == pid) {
            continue;
        }
        if mapped(&name, snapshot).is_some_and(|mapped| !mapped.is_empty()) {
            differences.push(format!("process {pid} maps a vmap and is not served"));
        }
    }
    differences
}

/// Fails unless the engine's areas and counts are the kernel's. Nobody may attach, unmap, fork or exit meanwhile.
#[track_caller]
pub(crate) fn assert_truth(engine: &Engine) {
    let mut last = (Vec::new(), None);
    for _ in 0..TRIES {
        engine.settle().unwrap();
        let snapshot = engine.snapshot().unwrap();
        let differences = differences(&snapshot);
        if differences.is_empty() {
            return;
        }
        last = (differences, Some(snapshot));
        std::thread::yield_now();
    }
    let (differences, snapshot) = last;
    panic!("{}\n{}", differences.join("\n"), snapshot.unwrap());
}

/// Fails unless a vmap has `refcount` areas, by its own count, by the engine's list of areas, and by the kernel's
/// list of mappings. In a forked child only the count can be asked for.
#[track_caller]
pub(crate) fn assert_count(engine: &Engine, vmap: &Vmap, refcount: usize) {
    match engine.settle() {
        Err(Error::NotOwner { .. }) => assert_eq!(vmap.refcount().unwrap(), refcount),
        settled => {
            settled.unwrap();
            assert_eq!(vmap.refcount().unwrap(), refcount, "{}", engine.snapshot().unwrap());
            assert_truth(engine);
        }
    }
}

/// Fails unless no thread waits for a page anywhere, as the kernel counts them.
#[track_caller]
pub(crate) fn assert_nobody_waits(engine: &Engine) {
    let snapshot = engine.snapshot().unwrap();
    assert!(snapshot.spaces.iter().all(|space| space.pending == 0 && space.total == 0), "{snapshot}");
}
