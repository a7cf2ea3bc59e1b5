//! Images that are damaged, or contradict themselves: each is refused with the file, the record and the value, before CRIU is waited for.

use std::fs;
use std::path::Path;

use kiomap::page_size;
use prost::Message;

use crate::fake::{failure, program};
use crate::folder::{
    Memory, SERVED, TaskFiles, entry, folder_of, image, pages_path, write_pagemap, write_tree, write_vmas,
};
use crate::images::{self, IN_PARENT, LAZY, MM_MAGIC, PAGEMAP_MAGIC, PRESENT, PSTREE_MAGIC};
use crate::images::{PagemapEntry, PagemapHead, PstreeEntry};
use crate::list;
use crate::support::limited;
use crate::support::scene::Rng;

/// Damages a folder of task 3, whose memory is given; the first 64 pages of it are lazy.
type Case = (&'static str, fn(&Path, &Memory), &'static str);

fn cut(path: &Path, less: u64) {
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_len(file.metadata().unwrap().len() - less).unwrap();
}

fn set_word(path: &Path, at: usize, word: u32) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
    fs::write(path, bytes).unwrap();
}

/// Replaces the entries of the pagemap.
fn entries(folder: &Path, entries: &[PagemapEntry]) {
    write_pagemap(folder, 3, Some(3), entries);
}

fn tree(folder: &Path, records: &[PstreeEntry]) {
    let records: Vec<_> = records.iter().map(Message::encode_to_vec).collect();
    fs::write(folder.join("pstree.img"), image(PSTREE_MAGIC, &records)).unwrap();
}

fn link(folder: &Path, to: &str) {
    std::os::unix::fs::symlink(to, folder.join("parent")).unwrap();
}

const CASES: &[Case] = &[
    // The tree.
    ("no tree", |folder, _| fs::remove_file(folder.join("pstree.img")).unwrap(), "pstree.img: No such file"),
    ("an empty file", |folder, _| fs::write(folder.join("pstree.img"), "").unwrap(), "it ends 0 bytes into a number"),
    (
        "another file",
        |folder, _| set_word(&folder.join("pstree.img"), 0, 7),
        "the magic number of all images is 0x54564319, and here it is 0x7",
    ),
    (
        "another image",
        |folder, _| set_word(&folder.join("pstree.img"), 4, MM_MAGIC),
        "the magic number of its kind is 0x50273030, and here it is 0x57492820",
    ),
    ("a head only", |folder, _| tree(folder, &[]), "pstree.img has no tasks"),
    ("a cut record", |folder, _| cut(&folder.join("pstree.img"), 1), "pstree.img: record 0: its length is"),
    (
        "a cut length",
        |folder, _| cut(&folder.join("pstree.img"), 12),
        "pstree.img: record 0: it ends 2 bytes into a number",
    ),
    (
        "a length beyond the file",
        |folder, _| set_word(&folder.join("pstree.img"), 8, u32::MAX),
        "its length is 4294967295, and the file has 10 bytes left",
    ),
    (
        "no message",
        |folder, _| fs::write(folder.join("pstree.img"), image(PSTREE_MAGIC, &[vec![0xff; 9]])).unwrap(),
        "record 0: it is no message of its kind",
    ),
    ("no pid", |folder, _| tree(folder, &[PstreeEntry::default()]), "pstree.img: record 0: it has no pid"),
    ("pid 0", |folder, _| write_tree(folder, &[3, 0]), "pstree.img: record 1: pid 0 is none"),
    ("a negative pid", |folder, _| write_tree(folder, &[u32::MAX]), "pid 4294967295 is none"),
    ("a pid twice", |folder, _| write_tree(folder, &[3, 4, 3]), "pid 3 is there twice"),
    (
        "a fifo",
        |folder, _| {
            fs::remove_file(folder.join("pstree.img")).unwrap();
            nix::unistd::mkfifo(&folder.join("pstree.img"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        },
        "pstree.img is no regular file",
    ),
    // The pagemap.
    (
        "no head",
        |folder, _| fs::write(folder.join("pagemap-3.img"), image(PAGEMAP_MAGIC, &[])).unwrap(),
        "pagemap-3.img has no head",
    ),
    ("no pages_id", |folder, _| write_pagemap(folder, 3, None, &[]), "pagemap-3.img: record 0: it has no pages_id"),
    (
        "another kind",
        |folder, _| set_word(&folder.join("pagemap-3.img"), 4, 1),
        "pagemap-3.img: the magic number of its kind",
    ),
    ("cut", |folder, _| cut(&folder.join("pagemap-3.img"), 3), "pagemap-3.img: record 1: its length is"),
    (
        "a long record",
        |folder, _| {
            let path = folder.join("pagemap-3.img");
            set_word(&path, 14, 33 << 20);
            fs::File::options().write(true).open(path).unwrap().set_len(64 << 20).unwrap();
        },
        "record 1: its length is 34603008, over 33554432",
    ),
    (
        "no address",
        |folder, memory| entries(folder, &[PagemapEntry { vaddr: None, ..entry(&memory.at(0..1), SERVED) }]),
        "record 1: it has no vaddr",
    ),
    (
        "no count",
        |folder, memory| {
            entries(
                folder,
                &[PagemapEntry { nr_pages: None, compat_nr_pages: None, ..entry(&memory.at(0..1), SERVED) }],
            )
        },
        "record 1: it has no nr_pages",
    ),
    (
        "between pages",
        |folder, memory| {
            entries(
                folder,
                &[PagemapEntry { vaddr: Some(memory.at(0..1).start as u64 + 1), ..entry(&memory.at(0..1), SERVED) }],
            )
        },
        "it is not of whole pages",
    ),
    ("no pages", |folder, memory| entries(folder, &[entry(&memory.at(3..3), SERVED)]), "nr_pages 0: it is empty"),
    (
        "a count that goes around",
        |folder, memory| {
            entries(folder, &[PagemapEntry { nr_pages: Some(1 << 52), ..entry(&memory.at(0..1), SERVED) }])
        },
        "nr_pages 4503599627370496: it goes past the last address",
    ),
    (
        "a count that almost does",
        |folder, memory| {
            entries(folder, &[PagemapEntry { nr_pages: Some((1 << 52) - 1), ..entry(&memory.at(0..1), SERVED) }])
        },
        "it goes past the last address",
    ),
    (
        "a count beyond the file",
        |folder, memory| entries(folder, &[entry(&memory.at(0..65), SERVED)]),
        "lists 65 pages of it",
    ),
    (
        "counts beyond the file",
        |folder, memory| entries(folder, &[entry(&memory.at(0..60), PRESENT), entry(&memory.at(60..65), SERVED)]),
        "lists 65 pages of it",
    ),
    (
        "unsorted",
        |folder, memory| entries(folder, &[entry(&memory.at(5..6), SERVED), entry(&memory.at(4..5), SERVED)]),
        "record 2: vaddr",
    ),
    (
        "overlapping",
        |folder, memory| entries(folder, &[entry(&memory.at(4..6), SERVED), entry(&memory.at(5..7), SERVED)]),
        "where the entry before ends",
    ),
    (
        "unknown flags",
        |folder, memory| entries(folder, &[entry(&memory.at(0..1), SERVED | 8)]),
        "record 1: flags 0xe: some are not known",
    ),
    (
        "here and there",
        |folder, memory| entries(folder, &[entry(&memory.at(0..1), SERVED | IN_PARENT)]),
        "flags 0x7: pages can't be here and in the parent",
    ),
    (
        "nowhere",
        |folder, memory| entries(folder, &[entry(&memory.at(0..1), LAZY)]),
        "they were left with the process that was dumped",
    ),
    // The pages.
    ("no pages file", |folder, _| fs::remove_file(pages_path(folder, 3)).unwrap(), "pages-3.img: No such file"),
    ("half a page less", |folder, _| cut(&pages_path(folder, 3), page_size() as u64 / 2), "lists 64 pages of it"),
    (
        "another pages file",
        |folder, memory| write_pagemap(folder, 3, Some(4), &[entry(&memory.at(0..1), SERVED)]),
        "pages-4.img: No such file",
    ),
    (
        "pages that are a folder",
        |folder, _| {
            fs::remove_file(pages_path(folder, 3)).unwrap();
            fs::create_dir(pages_path(folder, 3)).unwrap();
        },
        "pages-3.img is no regular file",
    ),
    // The mappings.
    ("no mappings file", |folder, _| fs::remove_file(folder.join("mm-3.img")).unwrap(), "mm-3.img: No such file"),
    (
        "no record of mappings",
        |folder, _| fs::write(folder.join("mm-3.img"), image(MM_MAGIC, &[])).unwrap(),
        "mm-3.img has no record",
    ),
    (
        "a mapping between pages",
        |folder, memory| write_vmas(folder, 3, std::slice::from_ref(&(memory.at(0..1).start..memory.at(0..1).end - 1))),
        "mapping 0: ",
    ),
    (
        "mappings that overlap",
        |folder, memory| write_vmas(folder, 3, &[memory.at(0..40), memory.at(39..64)]),
        "record 0: mapping 1: start",
    ),
    ("an empty mapping", |folder, memory| write_vmas(folder, 3, &[memory.at(0..0)]), "it is empty"),
    (
        "pages outside of all mappings",
        |folder, memory| write_vmas(folder, 3, &[memory.at(0..30), memory.at(31..64)]),
        "lies in no mapping",
    ),
    ("pages past all mappings", |folder, memory| write_vmas(folder, 3, &[memory.at(0..63)]), "lies in no mapping"),
    // The parents.
    (
        "no parent",
        |folder, memory| entries(folder, &[entry(&memory.at(0..4), LAZY | IN_PARENT)]),
        "parent: No such file",
    ),
    (
        "a parent that is gone",
        |folder, memory| {
            entries(folder, &[entry(&memory.at(0..4), LAZY | IN_PARENT)]);
            link(folder, "gone");
        },
        "parent: No such file",
    ),
    (
        "its own parent",
        |folder, memory| {
            entries(folder, &[entry(&memory.at(0..4), LAZY | IN_PARENT)]);
            link(folder, ".");
        },
        "leads back to",
    ),
    (
        "a link to itself",
        |folder, memory| {
            entries(folder, &[entry(&memory.at(0..4), LAZY | IN_PARENT)]);
            link(folder, "parent");
        },
        "Too many levels of symbolic links",
    ),
    (
        "parents in a circle",
        |folder, memory| {
            entries(folder, &[entry(&memory.at(0..4), LAZY | IN_PARENT)]);
            fs::create_dir(folder.join("below")).unwrap();
            write_pagemap(&folder.join("below"), 3, Some(3), &[entry(&memory.at(0..4), IN_PARENT)]);
            link(folder, "below");
            link(&folder.join("below"), "..");
        },
        "leads back to",
    ),
    (
        "a parent that is a file",
        |folder, memory| {
            entries(folder, &[entry(&memory.at(0..4), LAZY | IN_PARENT)]);
            link(folder, "pstree.img");
        },
        "is no folder",
    ),
    (
        "a parent without the task",
        |folder, memory| {
            entries(folder, &[entry(&memory.at(0..4), LAZY | IN_PARENT)]);
            fs::create_dir(folder.join("parent")).unwrap();
        },
        "parent/pagemap-3.img: No such file",
    ),
    (
        "a parent without the page",
        |folder, memory| {
            entries(folder, &[entry(&memory.at(0..4), LAZY | IN_PARENT)]);
            fs::create_dir(folder.join("parent")).unwrap();
            write_pagemap(&folder.join("parent"), 3, Some(3), &[entry(&memory.at(0..3), IN_PARENT)]);
        },
        "no entry has the page at",
    ),
];

#[test]
fn broken_images_are_refused_with_what_is_wrong() {
    needs_poison!();
    for (what, damage, says) in CASES {
        eprintln!("{what}");
        let memory = Memory::reserve(64);
        let folder = folder_of(&[TaskFiles::lazy(3, 3, memory.at(0..64))]);
        damage(folder.path(), &memory);
        let output = limited(&program(), &["-D", folder.path().to_str().unwrap()]).output().unwrap();
        failure(&output, says);
    }
}

/// Folders that can't be used are named.
#[test]
fn folders_that_are_none_are_refused() {
    needs_poison!();
    let memory = Memory::reserve(8);
    let folder = folder_of(&[TaskFiles::lazy(3, 3, memory.at(0..8))]);
    let place = folder.path().to_str().unwrap();
    for (arguments, says) in [
        (&["-D", "/nowhere"][..], "looking for /nowhere"),
        (&["-D", place, "-W", "/nowhere"], "looking for /nowhere"),
        (&["-D", place, "-W", "/proc/self"], "listening on"),
    ] {
        failure(&limited(&program(), arguments).output().unwrap(), says);
    }
}

/// A head of the oldest images: counts of 32 bits, and a mark instead of flags.
#[test]
fn entries_of_older_images_are_understood() {
    let memory = Memory::reserve(64);
    let folder = folder_of(&[TaskFiles::lazy(3, 3, memory.at(0..64))]);
    let older = |pages, in_parent| PagemapEntry {
        vaddr: Some(memory.at(pages).start as u64),
        compat_nr_pages: Some(2),
        in_parent,
        flags: None,
        nr_pages: None,
    };
    entries(folder.path(), &[older(0..2, None), older(4..6, Some(true)), older(6..8, Some(false))]);
    let pagemap = images::read_pagemap(folder.path(), 3).unwrap();
    let found: Vec<_> = pagemap.runs.iter().map(|run| (run.flags, run.first_page, run.end - run.start)).collect();
    let bytes = 2 * page_size() as u64;
    assert_eq!(found, [(PRESENT, 0, bytes), (IN_PARENT, 2, bytes), (PRESENT, 2, bytes)]);
    assert_eq!((pagemap.nr_pages, pagemap.pages_id), (4, 3));
    // Nothing of it is lazy.
    let image = list::load(folder.path(), 3).unwrap().unwrap();
    assert_eq!((image.pid, image.list.nr_pages(), image.places.len()), (3, 0, 0));
}

/// Images with any bytes changed or cut off are either refused, or list only pages that their files have, each in one place.
#[test]
fn damage_anywhere_is_refused_or_harmless() {
    let memory = Memory::reserve(256);
    let runs = (0..64).map(|n| (memory.at(4 * n..4 * n + 3), [SERVED, PRESENT, LAZY | IN_PARENT][n % 3])).collect();
    let files = TaskFiles { pid: 3, seed: 3, vmas: vec![memory.at(0..100), memory.at(100..256)], runs };
    let folder = folder_of(&[files]);
    let place = folder.path();
    fs::create_dir(place.join("parent")).unwrap();
    TaskFiles::lazy(3, 4, memory.at(0..256)).write(&place.join("parent"));
    let names = ["pstree.img", "pagemap-3.img", "mm-3.img", "parent/pagemap-3.img"];
    let whole = names.map(|name| fs::read(place.join(name)).unwrap());
    assert_eq!(list::load(place, 3).unwrap().unwrap().list.nr_pages(), 129);

    let mut rng = Rng::new(17);
    let (mut refused, mut taken) = (0, 0);
    for _ in 0..1000 {
        let which = rng.below(names.len() as u64) as usize;
        let mut bytes = whole[which].clone();
        for _ in 0..=rng.below(2) {
            let at = rng.below(bytes.len() as u64) as usize;
            match rng.below(16) {
                0 => bytes.truncate(at.max(1)),
                1 => bytes.insert(at, rng.next() as u8),
                2 => bytes[at] = rng.next() as u8,
                _ => bytes[at] ^= 1 << rng.below(8),
            }
        }
        fs::write(place.join(names[which]), &bytes).unwrap();
        match images::read_pids(place).and_then(|_| list::load(place, 3)) {
            Err(_) => refused += 1,
            Ok(image) => {
                let image = image.unwrap();
                let (mut after, mut pgoff) = (0, 0);
                for place in &image.places {
                    assert!(place.start >= after && place.start < place.end && place.pgoff == pgoff, "{place:x?}");
                    after = place.end;
                    pgoff += (place.end - place.start) / page_size() as u64;
                }
                assert_eq!(pgoff, image.list.nr_pages());
                taken += 1;
            }
        }
        fs::write(place.join(names[which]), &whole[which]).unwrap();
    }
    assert!(refused > 300 && taken > 10, "{refused} refused, {taken} taken");
}

/// The heads of files are written as they are read.
#[test]
fn a_head_is_a_message_like_any_other() {
    let head = PagemapHead { pages_id: Some(1) };
    assert_eq!(head.encode_to_vec(), [0x08, 0x01]);
    let entry = PagemapEntry {
        vaddr: Some(0x1000),
        compat_nr_pages: Some(0),
        in_parent: None,
        flags: Some(6),
        nr_pages: Some(300),
    };
    assert_eq!(entry.encode_to_vec(), [0x08, 0x80, 0x20, 0x10, 0x00, 0x20, 0x06, 0x28, 0xac, 0x02]);
}
