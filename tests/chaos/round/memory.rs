//! Steps that map, move and advise on memory.

use super::*;

impl Round {
    /// Where the pages of a region that a process can use as such are all there, with access to bytes.
    pub(super) fn whole(
        &self,
        process: usize,
        region: u32,
        offset: usize,
        len: usize,
        write: bool,
    ) -> Option<(usize, u64)> {
        let state = *self.process(process)?.regions.get(&region)?;
        let RegionState { vmap, page, pages, pgoff, writable, inherit, here } = state;
        if len == 0 || offset + len > pages * page_size() || write && !writable || !(inherit || here) {
            return None;
        }
        for n in offset / page_size()..(offset + len).div_ceil(page_size()) {
            match self.process(process)?.space.cells.get(&(page + n)) {
                Some(&Cell::Page { vmap: v, pgoff: p, access, .. })
                    if v == vmap && p == pgoff + n as u64 && self.avail(v, p) == Avail::Bytes =>
                {
                    if access == Access::None || write && access == Access::Read {
                        return None;
                    }
                }
                _ => return None,
            }
        }
        Some((vmap, pgoff))
    }

    pub(super) fn range(at: usize, pages: usize) -> Option<std::ops::Range<usize>> {
        let end = (at + pages).min(ARENA);
        (at < end).then(|| page_of(at)..page_of(end))
    }

    /// The whole area around a page of the arena, if it has one access, and is of the only region that shows its vmap: what
    /// `mremap` adds without an event is then known to be of that region.
    pub(super) fn lone_area(&self, process: usize, at: usize) -> Option<std::ops::Range<usize>> {
        let cells = &self.process(process)?.space.cells;
        let &Cell::Page { vmap, area, region, .. } = cells.get(&page_of(at))? else { return None };
        let of_area = |cell: &Cell| cell.area() == Some(area);
        let start = *cells.iter().find(|(_, cell)| of_area(cell))?.0;
        let end = *cells.iter().rfind(|(_, cell)| of_area(cell))?.0 + 1;
        // A neighbour that shows the pages before or after would be taken for the same area.
        let alone = cells.iter().all(|(&page, cell)| match *cell {
            Cell::Page { vmap: v, area: a, region: r, .. } if v == vmap => {
                r == region && (a == area || page + 1 != start && page != end)
            }
            _ => true,
        });
        let run = self.process(process)?.space.run_at(start..end);
        (alone && run == (start..end)).then_some(run)
    }

    /// Changes the access to pages of regions.
    pub(super) fn protect(&mut self, process: usize, run: std::ops::Range<usize>, wanted: Access) -> Outcome {
        let job = Job::Protect { addr: addr_of(run.start), len: addr_of(run.len()), access: wanted };
        let answer = self.ask(process, job)?;
        ensure!(answer == Answer::Done, "{answer:?}");
        for (_, cell) in self.space(process).cells.range_mut(run) {
            if let Cell::Page { access, .. } = cell {
                *access = wanted;
            }
        }
        Ok(())
    }

    /// Grows an area in place, and touches what it got.
    pub(super) fn grow(&mut self, process: usize, at: usize, by: usize) -> Outcome {
        let Some(area) = self.lone_area(process, at) else { return Ok(()) };
        let new_end = (area.end + by).min(page_of(ARENA));
        let free = |cells: &std::collections::BTreeMap<usize, Cell>| cells.range(area.end..new_end).next().is_none();
        if new_end <= area.end || !self.process(process).is_some_and(|process| free(&process.space.cells)) {
            return Ok(());
        }
        // The kernel tells of it by a fault only. A part in which no page is missing goes with its region, and no more
        // than that is promised of it.
        let first = self.cell(process, area.start - page_of(0));
        let Some(Cell::Page { vmap, pgoff, access, .. }) = first else { return Ok(()) };
        let missing = |pgoff: u64| {
            let state = self.vmaps[vmap].as_ref().and_then(|vmap| vmap.pages.get(pgoff as usize));
            state.is_some_and(|page| !page.given || page.resident == Resident::No)
        };
        if !(pgoff + area.len() as u64..pgoff + (new_end - area.start) as u64).any(missing) {
            return Ok(());
        }
        let (from, len, new_len) = (addr_of(area.start), addr_of(area.len()), addr_of(new_end - area.start));
        let answer = self.ask(process, Job::Remap { from, len, new_len, flags: 0, to: None })?;
        ensure!(answer == Answer::Value(from as u64), "{answer:?}");
        self.space(process).grow(area.end, new_end);
        if access == Access::None {
            // Nothing tells of it while nobody may touch it.
            self.protect(process, area.start..new_end, Access::Read)?;
            self.look(process, area.end..new_end)?;
            return self.protect(process, area.start..new_end, access);
        }
        self.look(process, area.end..new_end)
    }

    /// Moves an area and leaves its old range as it is, so that both show its pages.
    pub(super) fn double(&mut self, process: usize, at: usize, to: usize) -> Outcome {
        let Some(area) = self.lone_area(process, at) else { return Ok(()) };
        let Some(target) = Self::range(to, area.len()).filter(|target| target.len() == area.len()) else {
            return Ok(());
        };
        // Apart from everything else, so that neither range goes on where another ends.
        let around = target.start - 1..target.end + 1;
        let free = self.process(process).is_some_and(|process| process.space.cells.range(around).next().is_none());
        if !free {
            return Ok(());
        }
        let (from, len) = (addr_of(area.start), addr_of(area.len()));
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
        let answer =
            self.ask(process, Job::Remap { from, len, new_len: len, flags, to: Some(addr_of(target.start)) })?;
        ensure!(answer == Answer::Value(addr_of(target.start) as u64), "{answer:?}");
        self.space(process).double(area.clone(), target.start);
        self.look(process, area)?;
        self.look(process, target)
    }

    pub(super) fn space(&mut self, process: usize) -> &mut AddressSpace {
        &mut self.processes[process].as_mut().expect("checked by the caller").space
    }

    pub(super) fn attach(&mut self, process: usize, attach: Attach) -> Outcome {
        let Attach { region, vmap, pgoff, pages, at, writable, inherit, stripes } = attach;
        let stripes = if process == 0 { stripes.clamp(1, pages) } else { 1 };
        let attach = Attach { stripes, ..attach };
        let known = self.vmaps.get(vmap).and_then(Option::as_ref).is_some_and(|v| v.known & (1 << process) != 0);
        if self.process(process).is_none() || !known || at.is_some_and(|at| at + pages > ARENA) {
            return Ok(());
        }
        let place = at.map(page_of);
        let job = Job::Attach { attach, addr: place.map(addr_of) };
        let first = self.vmaps[vmap].as_ref().is_some_and(|state| state.count == 0);
        let answer = self.ask(process, job)?;
        let space = self.space(process);
        let taken = place.is_some_and(|page| space.cells.range(page..page + pages).next().is_some());
        match answer {
            Answer::Errno(libc::EEXIST) if taken => Ok(()),
            Answer::Attached { addr, first: said } if !taken => {
                ensure!(place.is_none_or(|page| addr == addr_of(page)), "attached at {addr:#x}");
                ensure!(said == first, "attach says first: {said}");
                let page = addr / page_size();
                let area = space.new_area();
                let access = if writable { Access::Write } else { Access::Read };
                space.cells.extend((0..pages).map(|n| {
                    (page + n, Cell::Page { vmap, pgoff: pgoff + n as u64, area, region, access, writable, inherit })
                }));
                (1..stripes).for_each(|stripe| space.split(page + pages * stripe / stripes));
                let state = RegionState { vmap, page, pages, pgoff, writable, inherit, here: true };
                if let Some(process) = &mut self.processes[process] {
                    process.regions.insert(region, state);
                }
                Ok(())
            }
            other => Err(format!("taken: {taken}; {other:?}")),
        }
    }

    pub(super) fn pipe(&mut self, process: usize, at: usize, word: usize, value: Option<u64>) -> Outcome {
        if self.process(process).is_none() || at >= ARENA {
            return Ok(());
        }
        let cell = self.cell(process, at);
        if matches!(cell, Some(Cell::Foreign(_))) {
            return Ok(());
        }
        let addr = addr_of(page_of(at)) + word * 8;
        let job = match value {
            None => Job::PipeOut { addr },
            Some(value) => Job::PipeIn { addr, value },
        };
        let answer = self.ask(process, job)?;
        let saw = match answer {
            Answer::Errno(libc::EFAULT) => match cell {
                Some(Cell::Page { access: Access::None, .. }) | None => Saw::Segv,
                Some(Cell::Page { access: Access::Read, .. }) if value.is_some() => Saw::Segv,
                // The kernel may not wait for the page.
                Some(_) if !self.kernel_faults => return Ok(()),
                Some(_) => Saw::Bus,
            },
            Answer::Done => Saw::Right,
            Answer::Value(got) => match cell {
                Some(Cell::Page { vmap, pgoff, .. })
                    if pgoff < PAGES as u64 && got == Sheet::word(self.sheet.now(vmap, pgoff), word) =>
                {
                    Saw::Right
                }
                _ => Saw::Wrong,
            },
            other => return Err(format!("{other:?}")),
        };
        self.judge(cell, saw, value.is_some(), "by a system call")?;
        if let (Saw::Right, Some(value), Some(Cell::Page { vmap, pgoff, .. })) = (saw, value, cell) {
            self.sheet.write(vmap, pgoff, word * 8, &value.to_ne_bytes());
        }
        Ok(())
    }

    pub(super) fn advise(&mut self, process: usize, at: usize, pages: usize, advice: Advice) -> Outcome {
        let (Some(state), Some(range)) = (self.process(process), Self::range(at, pages)) else { return Ok(()) };
        let run = state.space.run_at(range);
        let Some(&Cell::Page { vmap, pgoff, access, .. }) = state.space.cells.get(&run.start) else { return Ok(()) };
        let pgoffs = pgoff..pgoff + run.len() as u64;
        let job = Job::Advise { addr: addr_of(run.start), len: addr_of(run.len()), advice };
        let answer = self.ask(process, job)?;
        let denied = access == Access::None || advice == Advice::PopulateWrite && access != Access::Write;
        match advice {
            Advice::DontNeed | Advice::Cold | Advice::PageOut => ensure!(answer == Answer::Done, "{answer:?}"),
            Advice::Free => ensure!(answer == Answer::Errno(libc::EINVAL), "{answer:?}"),
            Advice::Remove => {
                ensure!(answer == Answer::Done, "{answer:?}");
                for pgoff in pgoffs {
                    self.removed(vmap, pgoff);
                }
            }
            Advice::PopulateRead | Advice::PopulateWrite => {
                let avails: Vec<Avail> = pgoffs.clone().map(|pgoff| self.avail(vmap, pgoff)).collect();
                let good = !denied && avails.iter().all(|&avail| avail == Avail::Bytes);
                let bad = denied || avails.contains(&Avail::Bus);
                ensure!(!(bad && answer == Answer::Done), "pages that are not there are populated");
                ensure!(!good || !self.kernel_faults || answer == Answer::Done, "{answer:?}");
                for pgoff in pgoffs {
                    match answer {
                        Answer::Done => self.touched(vmap, pgoff, true),
                        // Some were.
                        _ => self.perhaps(vmap, pgoff),
                    }
                }
            }
        }
        Ok(())
    }
}
