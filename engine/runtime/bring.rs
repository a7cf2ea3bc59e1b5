//! Bringing pages of foreign spaces before they are touched, or refusing what is missing.
//!
//! Only the fault-handling thread may do it: between another thread's look at the table and its ioctl, an event could be read
//! after which the page is to be another.

use std::ops::Range;
use std::sync::Arc;

use nix::errno::Errno;

use super::command::{Bringing, Halt};
use super::foreign::{At, Composed};
use super::resolve::{Resolver, Source};
use crate::kiobuf::{Nopage, TryRead};
use crate::page::page_size;
use crate::space::Target;
use crate::space::table::Area;
use crate::sys::{Install, Stop, Userfault};
use crate::vmap::page_size::{PageSize, bytes_of};

/// So many pages are attended to, and some of them could not be had.
pub(super) struct Step {
    pub(super) pages: u64,
    pub(super) failed: u64,
}

/// Where pages are brought.
struct Place<'a> {
    at: At<'a>,
    area: &'a Area<Target>,
    addr: usize,
}

impl Resolver {
    /// Brings some of these pages of an area, from the first on, or refuses those that are missing.
    pub(super) fn bring_some(
        &mut self,
        at: At<'_>,
        area: &Area<Target>,
        pages: Range<u64>,
        how: Bringing,
    ) -> Result<Step, Halt> {
        let At { uffd, foreign, .. } = at;
        let addr = area.start + bytes_of(area.pgoff, &(area.pgoff..pages.start)).end;
        let place = Place { at, area, addr };
        if area.target.page.is_huge() && how == Bringing::Fill {
            return self.fill_huge(&place, pages.start);
        }
        // Zeros, when they are touched.
        if foreign.has_given_up(area, pages.start) {
            return Ok(Step { pages: 1, failed: 0 });
        }
        let pages = foreign.kept(area, pages.clone(), pages.start);
        match how {
            Bringing::Fill => self.fill_some(&place, pages),
            Bringing::Poison => step(poison_some(uffd, addr, pages.end - pages.start)),
        }
    }

    fn fill_some(&mut self, place: &Place<'_>, pages: Range<u64>) -> Result<Step, Halt> {
        let Target { list, vmap, window, .. } = &place.area.target;
        let readable = window.as_ref().and_then(|window| window.readable());
        let held = readable.and_then(|readable| readable.part(pages.clone()));
        let mut most = pages.end - pages.start;
        if let Some((src, nr_held)) = held.filter(|_| vmap.diverges()) {
            match self.put(place, nr_held, Source::Memory(src)) {
                Err(Stop::BadSource) => most = 1,
                other => return step(other),
            }
        }
        let clip = |run: &Range<u64>| most.min(run.end - pages.start);
        let (nr_pages, source) = match list.nopage(pages.start) {
            Nopage::Direct { src, run } => {
                let src = src.wrapping_add(bytes_of(run.start, &(run.start..pages.start)).end);
                (clip(&run), Source::Memory(src))
            }
            Nopage::Zero { run } => (clip(&run), Source::Zeros),
            Nopage::Read { run, .. } => {
                let nr_pages = clip(&run).min(self.fault_around.read_pages() as u64);
                let buf = &mut self.bounce[..nr_pages as usize * page_size()];
                match (list.try_read_pages(pages.start, buf), held) {
                    (TryRead::Done, _) => (nr_pages, Source::Read(self.bounce.as_ptr())),
                    (_, Some((src, nr_held))) => match self.put(place, nr_pages.min(nr_held), Source::Memory(src)) {
                        Err(Stop::BadSource) => return Err(Halt::Blocked(Arc::clone(vmap), pages.start)),
                        other => return step(other),
                    },
                    (_, None) => return Err(Halt::Blocked(Arc::clone(vmap), pages.start)),
                }
            }
            // It may have been taken back, and be resident still.
            Nopage::Sigbus(_) => match held.map(|(src, _)| self.put(place, 1, Source::Memory(src))) {
                None | Some(Err(Stop::BadSource)) => return Ok(Step { pages: 1, failed: 0 }),
                Some(other) => return step(other),
            },
        };
        step(self.put(place, nr_pages, source))
    }

    /// Installs pages from a source; tells how many are there, from the first on.
    fn put(&self, place: &Place<'_>, nr_pages: u64, source: Source) -> Result<u64, Stop> {
        alone_if_need_be(nr_pages, |bytes| self.install_at(place, bytes, source))
    }

    fn install_at(&self, place: &Place<'_>, bytes: usize, source: Source) -> Install {
        let install = source.install(place.at.uffd, place.addr, 0, bytes);
        self.count_installed(place.at.space, place.area, &source, install);
        install
    }

    fn fill_huge(&mut self, place: &Place<'_>, first: u64) -> Result<Step, Halt> {
        let Place { at: At { foreign, .. }, area, .. } = *place;
        let Target { list, vmap, page, .. } = &area.target;
        let nr_pages = page.base_pages();
        let left = Ok(Step { pages: nr_pages, failed: 0 });
        // What is refused, or zeros, is known when it is touched.
        let is_missing = matches!(list.nopage(first), Nopage::Sigbus(_));
        if is_missing || foreign.has_given_up_all(area, first..first + nr_pages) != Some(false) {
            return left;
        }
        let composed = match self.compose(area, first..(first + nr_pages).min(list.nr_pages())) {
            Composed::Done => self.huge.buffer(*page),
            Composed::Failed => return left,
            Composed::Blocked(pgoff) => return Err(Halt::Blocked(Arc::clone(vmap), pgoff)),
        };
        let Some(source) = composed.map(|composed| Source::Read(composed.as_ptr())) else { return left };
        let outcome = match self.install_at(place, page.bytes(), source).stop {
            None | Some(Stop::Present) => Ok(nr_pages),
            Some(stop) => Err(stop),
        };
        step(outcome).map(|Step { failed, .. }| Step { pages: nr_pages, failed: failed * nr_pages })
    }
}

/// Refuses those of some pages that are missing, whatever the size of the pages there; tells how many are attended to.
fn poison_some(uffd: &Userfault, addr: usize, nr_pages: u64) -> Result<u64, Stop> {
    let outcome = alone_if_need_be(nr_pages, |bytes| uffd.poison(addr, bytes));
    let Err(Stop::Other(Errno::EINVAL)) = outcome else { return outcome };
    for page in PageSize::HUGE {
        let start = page.floor(addr);
        match uffd.poison(start, page.bytes()).stop {
            None | Some(Stop::Present) => return Ok(((start + page.bytes() - addr) / page_size()) as u64),
            Some(Stop::Other(Errno::EINVAL)) => {}
            Some(stop) => return Err(stop),
        }
    }
    outcome
}

/// Makes an ioctl over some pages; what stops it at the first is asked for alone, where the kernel names the reason. Tells how
/// many pages are attended to; one that is there already is.
fn alone_if_need_be(nr_pages: u64, ioctl: impl Fn(usize) -> Install) -> Result<u64, Stop> {
    let page = page_size();
    let settled = |Install { bytes, stop }| match stop {
        Some(Stop::Present) => Ok((bytes / page) as u64 + 1),
        Some(stop) if bytes == 0 => Err(stop),
        _ => Ok((bytes / page) as u64),
    };
    match settled(ioctl(nr_pages as usize * page)) {
        Err(Stop::Unmapped | Stop::BadSource | Stop::Other(_)) if nr_pages > 1 => settled(ioctl(page)),
        outcome => outcome,
    }
}

fn step(outcome: Result<u64, Stop>) -> Result<Step, Halt> {
    match outcome {
        Ok(pages) => Ok(Step { pages, failed: 0 }),
        // It is no memory of that process any more, or not registered.
        Err(Stop::Unmapped) => Ok(Step { pages: 1, failed: 0 }),
        Err(Stop::Changing | Stop::NoMemory) => Err(Halt::Changing),
        Err(Stop::Gone) => Err(Halt::Gone),
        Err(_) => Ok(Step { pages: 1, failed: 1 }),
    }
}
