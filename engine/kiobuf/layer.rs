//! Lists made of parts of other lists: a range of pages, and layers that lie on one another.
//!
//! What results is a list like any other: its extents name the same memory, files and sources, further on. Nothing is read,
//! and a lookup in it does not know of layers.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;
use std::sync::Arc;

use super::extent::{Base, Extent};
use super::{Inner, Kiobuf};
use crate::error::{Error, Result};

impl Kiobuf {
    /// Returns the list of some of the pages. What it borrows is kept by either list.
    ///
    /// Slack stays where it is: data that begins or ends within a page does so in the part too.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] (`EINVAL`): the range is turned around, or ends past the list.
    pub fn slice(&self, pages: Range<u64>) -> Result<Kiobuf> {
        if pages.start > pages.end || pages.end > self.nr_pages() {
            return Err(Error::Invalid {
                what: "the end of the range of pages",
                value: pages.end,
                rule: "it must not be before its start, nor past the list",
            });
        }
        let mut slice = Inner::default();
        let first = self.inner.extents.partition_point(|extent| extent.pages().end <= pages.start);
        for extent in &self.inner.extents[first..] {
            let (start, end) = (extent.first_page.max(pages.start), extent.pages().end.min(pages.end));
            if start >= end {
                break;
            }
            slice.push(extent.part(start..end));
        }
        Ok(Kiobuf { inner: Arc::new(slice) })
    }

    /// Lays lists on one another, the topmost first: a snapshot's differences before the snapshot, say.
    ///
    /// Each page is that of the topmost list which has one there. A hole, and all that lies past a list's end, shows what is
    /// below it; a page of zeros is a page. What is a hole in every list is one in the result, which is as long as the
    /// longest of them. Pages are taken whole: one that a list holds data for in a part only is that list's page, and its
    /// slack is zeros, whatever is below.
    ///
    /// It takes time for the extents, not for the pages, and looking a page up does not become slower with more layers. A
    /// list that is a memfd can be shown itself ([`map_memfd`](Kiobuf::map_memfd)) only where all that results is that memfd.
    pub fn layered(layers: &[Kiobuf]) -> Kiobuf {
        let nr_pages = layers.iter().map(Kiobuf::nr_pages).max().unwrap_or(0);
        // What is there, by its first page: each with its layer.
        let mut parts: Vec<(usize, &Extent)> = (layers.iter().enumerate())
            .flat_map(|(layer, list)| list.inner.extents.iter().map(move |extent| (layer, extent)))
            .filter(|(_, extent)| !matches!(extent.base, Base::Hole))
            .collect();
        parts.sort_unstable_by_key(|&(layer, extent)| (extent.first_page, layer));

        let mut list = Inner::default();
        // The parts that begin before `at` and may reach further, the topmost first; and what is shown up to `at`.
        let mut begun = BinaryHeap::new();
        let mut waiting = parts.iter().enumerate().peekable();
        let mut shown: Option<usize> = None;
        let (mut since, mut at) = (0, 0);
        while at < nr_pages {
            while let Some((index, &(layer, _))) = waiting.next_if(|(_, (_, extent))| extent.first_page <= at) {
                begun.push(Reverse((layer, index)));
            }
            while begun.peek().is_some_and(|&Reverse((_, index))| parts[index].1.pages().end <= at) {
                begun.pop();
            }
            let top = begun.peek().map(|&Reverse((_, index))| index);
            if top != shown {
                list.show(shown.map(|index| parts[index].1), since..at);
                (shown, since) = (top, at);
            }
            let next = waiting.peek().map_or(nr_pages, |(_, (_, extent))| extent.first_page);
            at = top.map_or(next, |index| next.min(parts[index].1.pages().end));
        }
        list.show(shown.map(|index| parts[index].1), since..nr_pages);
        Kiobuf { inner: Arc::new(list) }
    }
}

impl Inner {
    /// Appends an extent, of a list that is not shorter.
    fn push(&mut self, extent: Extent) {
        let first_page = self.nr_pages;
        self.nr_pages += extent.nr_pages;
        self.extents.push(Extent { first_page, ..extent });
    }

    /// Appends a range of pages: of an extent, or of nothing.
    fn show(&mut self, what: Option<&Extent>, pages: Range<u64>) {
        if pages.is_empty() {
            return;
        }
        self.push(match what {
            Some(extent) => extent.part(pages),
            None => Extent { first_page: 0, nr_pages: pages.end - pages.start, valid: 0..0, base: Base::Hole },
        });
    }
}
