//! What the model makes of a touch: what a page may show, and what it shows from then on.

use super::*;

impl Round {
    pub(super) fn avail(&self, vmap: usize, pgoff: u64) -> Avail {
        let Some(state) = self.vmaps[vmap].as_ref().and_then(|vmap| vmap.pages.get(pgoff as usize)) else {
            return Avail::Bus;
        };
        match state {
            PageState { given: false, .. } => Avail::Bus,
            PageState { revoked: false, .. } | PageState { resident: Resident::Yes, .. } => Avail::Bytes,
            PageState { resident: Resident::No, .. } => Avail::Bus,
            PageState { resident: Resident::Maybe, .. } => Avail::Unknown,
        }
    }

    pub(super) fn update(&self, vmap: usize) {
        let nr_pages = self.vmaps[vmap].as_ref().map_or(0, |vmap| vmap.pages.len());
        for pgoff in 0..nr_pages as u64 {
            self.sheet.set_avail(vmap, pgoff, self.avail(vmap, pgoff));
        }
    }

    /// Notes that a page was touched, with bytes or SIGBUS.
    pub(super) fn touched(&mut self, vmap: usize, pgoff: u64, bytes: bool) {
        let around = self.settings.around as u64;
        let Some(state) = &mut self.vmaps[vmap] else { return };
        let block = pgoff - pgoff % around;
        for (n, page) in state.pages.iter_mut().enumerate().skip(block as usize).take(around as usize) {
            if n as u64 == pgoff {
                page.resident = if bytes { Resident::Yes } else { Resident::No };
            } else if page.resident == Resident::No && page.given && !page.revoked {
                page.resident = Resident::Maybe;
            }
        }
        self.update(vmap);
    }

    /// Judges what a touch of a page came to; `write`: it was a store.
    pub(super) fn judge(&mut self, cell: Option<Cell>, saw: Saw, write: bool, why: &str) -> Outcome {
        let expected = match cell {
            None => saw == Saw::Segv,
            Some(Cell::Foreign(_)) => saw == Saw::Right,
            Some(Cell::Page { access: Access::None, .. }) => saw == Saw::Segv,
            Some(Cell::Page { access: Access::Read, .. }) if write => saw == Saw::Segv,
            Some(Cell::Page { vmap, pgoff, .. }) => {
                let right = match self.avail(vmap, pgoff) {
                    Avail::Bus => saw == Saw::Bus,
                    Avail::Bytes => saw == Saw::Right,
                    Avail::Unknown => matches!(saw, Saw::Right | Saw::Bus),
                };
                if right {
                    self.touched(vmap, pgoff, saw == Saw::Right);
                }
                right
            }
        };
        let avail = match cell {
            Some(Cell::Page { vmap, pgoff, .. }) => {
                format!("; {:?}", self.vmaps[vmap].as_ref().and_then(|vmap| vmap.pages.get(pgoff as usize)))
            }
            _ => String::new(),
        };
        ensure!(expected, "{} of {cell:?}{avail} was {saw:?} {why}", if write { "a write" } else { "a read" });
        Ok(())
    }

    pub(super) fn cell(&self, process: usize, at: usize) -> Option<Cell> {
        self.process(process)?.space.cells.get(&page_of(at)).copied()
    }

    pub(super) fn expect(cell: Option<Cell>) -> Expect {
        match cell {
            None => Expect::Nothing,
            Some(Cell::Foreign(byte)) => Expect::Foreign(byte),
            Some(Cell::Page { vmap, pgoff, .. }) => Expect::Page { vmap, pgoff },
        }
    }

    pub(super) fn touched_range(&mut self, vmap: usize, pgoff: u64, offset: usize, len: usize) {
        for n in offset / page_size()..(offset + len).div_ceil(page_size()) {
            self.touched(vmap, pgoff + n as u64, true);
        }
    }

    /// Changes what the sheet says of bytes from `offset` on, counted from page `pgoff`.
    pub(super) fn written(&mut self, vmap: usize, pgoff: u64, offset: usize, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done;
            let most = (page_size() - at % page_size()).min(bytes.len() - done);
            self.sheet.write(vmap, pgoff + (at / page_size()) as u64, at % page_size(), &bytes[done..done + most]);
            done += most;
        }
    }

    /// Pages of a vmap that are dropped from the object: the next touch asks the list again.
    pub(super) fn removed(&mut self, vmap: usize, pgoff: u64) {
        if let Some(state) = &mut self.vmaps[vmap]
            && let Some(page) = state.pages.get_mut(pgoff as usize)
        {
            page.resident = Resident::No;
            if page.given {
                self.sheet.restore(vmap, pgoff);
            }
        }
        self.update(vmap);
    }

    /// Notes that a page and its neighbours may have been touched.
    pub(super) fn perhaps(&mut self, vmap: usize, pgoff: u64) {
        let around = self.settings.around as u64;
        let block = pgoff - pgoff % around;
        if let Some(state) = &mut self.vmaps[vmap] {
            for page in state.pages.iter_mut().skip(block as usize).take(around as usize) {
                if page.resident == Resident::No && page.given && !page.revoked {
                    page.resident = Resident::Maybe;
                }
            }
        }
        self.update(vmap);
    }
}
