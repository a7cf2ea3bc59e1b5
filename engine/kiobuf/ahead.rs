//! Telling files and sources what will be read soon.

use std::ops::Range;

use memmap2::Advice;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use super::Kiobuf;
use super::extent::Base;

impl Kiobuf {
    /// Tells where pages come from that they will be read soon: files begin to read ahead, sources are
    /// [told](crate::PageSource::will_read). Pages outside the list are passed over.
    ///
    /// Waits for no page, but for the disk's queue, if that is full. A page source is called on this thread: a panic of it
    /// unwinds through here.
    pub(crate) fn will_read(&self, pages: Range<u64>) {
        let first = self.inner.extents.partition_point(|extent| extent.pages().end <= pages.start);
        for extent in &self.inner.extents[first..] {
            let (start, end) = (extent.first_page.max(pages.start), extent.pages().end.min(pages.end));
            if start >= end {
                break;
            }
            let part = extent.part(start..end);
            let len = part.data_len();
            // All of it is advice: what can't be advised is read when it is wanted.
            match &part.base {
                Base::File { file, at } => {
                    let _ =
                        posix_fadvise(file.as_fd(), *at as i64, len as i64, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
                }
                Base::Mmap { map, at } => {
                    let _ = map.advise_range(Advice::WillNeed, *at, len as usize);
                }
                Base::Source(part) => part.source.will_read(part.at..part.at + len),
                Base::Memory(_) | Base::Memfd(_) | Base::Zero | Base::Hole => {}
            }
        }
    }

    /// Tells whether any of its pages may have to be waited for.
    pub(crate) fn may_block(&self) -> bool {
        self.inner.extents.iter().any(|extent| match &extent.base {
            Base::Mmap { .. } | Base::File { .. } | Base::Memfd(_) => true,
            Base::Source(part) => part.may_block,
            Base::Memory(_) | Base::Zero | Base::Hole => false,
        })
    }
}
