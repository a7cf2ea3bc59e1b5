//! What a task's lazy pages are: one page list, and where in the task's memory its pages belong.
//!
//! An image may hold only what has changed since another, which lies in its folder as `parent`, and so on. Each such layer says of
//! a page that it has it, or that the one below does. What the layers have together becomes one list of runs of their
//! pages files, in the order of the addresses.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use kiomap::{Kiobuf, page_size};

use super::images::{self, IN_PARENT, LAZY, PRESENT, Pagemap};

/// More incremental images than anybody makes in a row.
const LAYERS_MAX: usize = 1024;

/// The lazy pages of a task, as its image has them.
pub(crate) struct TaskImage {
    pub(crate) pid: i32,
    /// The lazy pages, in the order of their addresses.
    pub(crate) list: Kiobuf,
    /// Where they belong.
    pub(crate) places: Vec<Place>,
}

/// A range of a task's memory within one mapping, and the page of the list with which it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) pgoff: u64,
}

/// Pages of one layer's file.
#[derive(Clone, Copy)]
struct Found {
    addr: u64,
    layer: usize,
    first_page: u64,
    nr_pages: u64,
}

/// An image, in a row of those that build on one another.
struct Layer {
    folder: PathBuf,
    pagemap: Pagemap,
    /// All pages of its file; none if it has none.
    pages: Kiobuf,
}

/// Reads the image of a task; `None` if it has no memory, as a zombie.
pub(crate) fn load(folder: &Path, pid: i32) -> Result<Option<TaskImage>> {
    let path = images::pagemap_path(folder, pid);
    if !path.try_exists().with_context(|| format!("looking for {}", path.display()))? {
        return Ok(None);
    }
    let top = Layer::open(folder.to_owned(), pid)?;
    let lazy: Vec<_> =
        top.pagemap.runs.iter().filter(|run| run.flags & LAZY != 0).map(|run| (run.start, run.end)).collect();
    let places = place(&lazy, &images::read_vmas(folder, pid)?)
        .with_context(|| format!("placing the pages of {}", path.display()))?;

    let mut layers = vec![top];
    let mut seen = HashSet::from([identity(folder)?]);
    let (mut found, mut missing) = (Vec::new(), lazy);
    loop {
        let layer = &layers[layers.len() - 1];
        missing = layer.find(&missing, layers.len() - 1, &mut found, pid)?;
        if missing.is_empty() {
            break;
        }
        let parent = layer.folder.join("parent");
        ensure!(layers.len() < LAYERS_MAX, "{}: over {LAYERS_MAX} images build on one another", parent.display());
        let below = parent.canonicalize().with_context(|| format!("following {}", parent.display()))?;
        ensure!(seen.insert(identity(&below)?), "{} leads back to {}", parent.display(), below.display());
        layers.push(Layer::open(below, pid)?);
    }
    Ok(Some(TaskImage { pid, list: compose(&layers, found)?, places }))
}

/// What tells a folder from every other.
fn identity(folder: &Path) -> Result<(u64, u64)> {
    let meta = folder.metadata().with_context(|| format!("looking at {}", folder.display()))?;
    ensure!(meta.is_dir(), "{} is no folder", folder.display());
    Ok((meta.dev(), meta.ino()))
}

/// Says where the pages of some ranges belong, each within one mapping. Both lie one after another.
fn place(ranges: &[(u64, u64)], vmas: &[(u64, u64)]) -> Result<Vec<Place>> {
    let page = page_size() as u64;
    let mut places: Vec<Place> = Vec::new();
    let (mut pgoff, mut vma) = (0, 0);
    for &(start, end) in ranges {
        let mut at = start;
        while at < end {
            while vmas.get(vma).is_some_and(|(_, end)| *end <= at) {
                vma += 1;
            }
            let Some((_, vma_end)) = vmas.get(vma).filter(|(start, _)| *start <= at) else {
                bail!("{at:#x} lies in no mapping");
            };
            let piece_end = end.min(*vma_end);
            match places.last_mut() {
                Some(last) if last.end == at && vmas[vma].0 < at => last.end = piece_end,
                _ => places.push(Place { start: at, end: piece_end, pgoff }),
            }
            pgoff += (piece_end - at) / page;
            at = piece_end;
        }
    }
    Ok(places)
}

/// Strings the pages together that were found.
fn compose(layers: &[Layer], mut found: Vec<Found>) -> Result<Kiobuf> {
    found.sort_unstable_by_key(|found| found.addr);
    found.dedup_by(|next, run| {
        let follows = next.layer == run.layer && next.first_page == run.first_page + run.nr_pages;
        if follows {
            run.nr_pages += next.nr_pages;
        }
        follows
    });
    let mut list = Kiobuf::new();
    for run in found {
        let part = layers[run.layer].pages.slice(run.first_page..run.first_page + run.nr_pages)?;
        list.expand(&part)?;
    }
    Ok(list)
}

impl Layer {
    fn open(folder: PathBuf, pid: i32) -> Result<Layer> {
        let pagemap = images::read_pagemap(&folder, pid)?;
        let mut pages = Kiobuf::new();
        if pagemap.nr_pages > 0 {
            let path = folder.join(format!("pages-{}.img", pagemap.pages_id));
            let (file, len_bytes) = images::open_file(&path)?;
            let (nr_pages, map) = (pagemap.nr_pages, images::pagemap_path(&folder, pid));
            let needed = nr_pages.checked_mul(page_size() as u64).filter(|needed| *needed <= len_bytes);
            let Some(needed) = needed else {
                bail!("{} has {len_bytes} bytes, and {} lists {nr_pages} pages of it", path.display(), map.display());
            };
            pages.map_file(&file, 0..needed).with_context(|| format!("listing the pages of {}", path.display()))?;
        }
        Ok(Layer { folder, pagemap, pages })
    }

    /// Finds the pages of ranges that lie one after another; answers with what the image below must have.
    fn find(&self, ranges: &[(u64, u64)], layer: usize, found: &mut Vec<Found>, pid: i32) -> Result<Vec<(u64, u64)>> {
        let page = page_size() as u64;
        let path = || images::pagemap_path(&self.folder, pid).display().to_string();
        let (mut below, mut run) = (Vec::new(), 0);
        for &(start, end) in ranges {
            let mut at = start;
            while at < end {
                while self.pagemap.runs.get(run).is_some_and(|run| run.end <= at) {
                    run += 1;
                }
                let Some(run) = self.pagemap.runs.get(run).filter(|run| run.start <= at) else {
                    bail!("{}: no entry has the page at {at:#x}", path());
                };
                let piece_end = end.min(run.end);
                if run.flags & PRESENT != 0 {
                    let first_page = run.first_page + (at - run.start) / page;
                    found.push(Found { addr: at, layer, first_page, nr_pages: (piece_end - at) / page });
                } else if run.flags & IN_PARENT != 0 {
                    below.push((at, piece_end));
                } else {
                    bail!(
                        "{}: the pages at {at:#x} are neither here nor in the parent image: they were left with the \
                         process that was dumped, which this program can't ask",
                        path()
                    );
                }
                at = piece_end;
            }
        }
        Ok(below)
    }
}
