//! What is checked: counts after every step, every page at times, and what is left at the end.

use super::*;

impl Round {
    /// Compares the counts and the callbacks with the model's.
    pub(super) fn counts(&mut self) -> Outcome {
        let mut counts = [0; VMAPS];
        for process in self.processes.iter().flatten() {
            for (sum, n) in counts.iter_mut().zip(process.space.counts()) {
                *sum += n;
            }
        }
        for (state, count) in self.vmaps.iter_mut().zip(counts) {
            let Some(state) = state else { continue };
            if state.count > 0 && count == 0 {
                state.expected_derefs += 1;
            }
            state.count = count;
        }
        if self.down {
            // Other processes are not counted any more, and nothing says when what happened is.
            return Ok(());
        }
        let start = Instant::now();
        loop {
            self.engine().settle().map_err(|error| error.to_string())?;
            let wrong = self.vmaps.iter().enumerate().find_map(|(vmap, state)| {
                let (state, handle) = (state.as_ref()?, self.local.vmaps.get(&vmap)?);
                let count = handle.refcount().ok()?;
                (count != state.count).then(|| format!("vmap {vmap} has the count {count}, not {}", state.count))
            });
            match wrong {
                None => break,
                Some(wrong) => ensure!(self.late && start.elapsed() < LATE, "{wrong}"),
            }
            std::thread::yield_now();
        }
        self.late = false;
        self.wait_for_derefs(start, true)
    }

    /// Waits until each callback was called as often as it must have been, and not more often.
    fn wait_for_derefs(&self, start: Instant, may_be_late: bool) -> Outcome {
        for (vmap, state) in self.vmaps.iter().enumerate() {
            let Some(state) = state else { continue };
            loop {
                let derefs = state.derefs.load(Ordering::SeqCst);
                if derefs == state.expected_derefs {
                    break;
                }
                let in_time = may_be_late && derefs < state.expected_derefs && start.elapsed() < LATE;
                ensure!(in_time, "vmap {vmap}: {derefs} callbacks, not {}", state.expected_derefs);
                std::thread::yield_now();
            }
        }
        Ok(())
    }

    /// Looks at every page that any process has, and at what the kernel says of each.
    pub(super) fn check(&mut self) -> Outcome {
        self.counts()?;
        truth::assert_truth(self.engine());
        for process in 0..PROCESSES {
            let Some(state) = self.process(process) else { continue };
            for (range, _) in state.space.runs() {
                self.look(process, range)?;
            }
        }
        truth::assert_truth(self.engine());
        Ok(())
    }

    /// Touches every page of a run and compares it.
    pub(super) fn look(&mut self, process: usize, range: std::ops::Range<usize>) -> Outcome {
        let cell = self.process(process).and_then(|process| process.space.cells.get(&range.start)).copied();
        let job = Job::Look { addr: addr_of(range.start), pages: range.len(), expect: Self::expect(cell) };
        let Answer::Saw(saw, why) = self.ask(process, job)? else { return Err("no answer".into()) };
        for (page, saw) in range.clone().zip(saw) {
            let cell = self.process(process).and_then(|process| process.space.cells.get(&page)).copied();
            let why = format!("in process {process} at {:#x} {why}", addr_of(page));
            self.judge(cell, saw, false, &why)?;
        }
        Ok(())
    }

    /// Shuts the engine down under everybody's feet. Resident pages stay, in every process; what is missing is SIGBUS, as
    /// if every list had been taken back.
    pub(super) fn shut_down(&mut self, how: Shutdown) -> Outcome {
        self.engine().shutdown(how).map_err(|error| error.to_string())?;
        self.down = true;
        for vmap in 0..VMAPS {
            if let Some(state) = &mut self.vmaps[vmap] {
                let filled = how == Shutdown::Fill && state.count > 0;
                for page in &mut state.pages {
                    if filled && page.given && !page.revoked {
                        page.resident = Resident::Yes;
                    }
                    page.revoked = true;
                }
            }
            self.update(vmap);
        }
        for process in 0..PROCESSES {
            let runs = self.process(process).map_or_else(Vec::new, |state| state.space.runs());
            for (range, _) in runs {
                self.look(process, range)?;
            }
        }
        Ok(())
    }

    /// Ends everything: nothing is left of it.
    pub(super) fn end(&mut self, before: (usize, Vec<String>)) -> Outcome {
        match self.settings.end {
            End::Clean => {}
            End::Poison => self.shut_down(Shutdown::Poison)?,
            End::Fill => self.shut_down(Shutdown::Fill)?,
        }
        for process in 1..PROCESSES {
            if self.process(process).is_some() {
                self.kill(process);
                self.gone(process)?;
            }
        }
        self.counts()?;
        // What is left of the own process: regions first, then what was moved and belongs to none.
        let regions: Vec<u32> = self.local.regions.keys().copied().collect();
        for region in regions {
            self.step(&Op::Drop { process: 0, region })?;
            self.counts()?;
        }
        let left: Vec<usize> = self.space(0).cells.keys().copied().collect();
        for page in left {
            // SAFETY: pages of the arena, to which nothing refers.
            unsafe { libc::munmap(addr_of(page) as *mut libc::c_void, page_size()) };
        }
        self.space(0).cells.clear();
        self.counts()?;
        let start = Instant::now();
        for (vmap, handle) in &self.local.vmaps {
            while handle.refcount().map_err(|error| error.to_string())? != 0 {
                let count = handle.refcount();
                ensure!(self.down && start.elapsed() < LATE, "vmap {vmap} has the count {count:?} at the end");
                std::thread::yield_now();
            }
        }
        let stats = self.engine().stats();
        ensure!(stats.panics == 0, "{stats:?}");
        self.local.vmaps.clear();
        drop(self.engine.take());
        self.wait_for_derefs(start, self.down)?;
        let start = Instant::now();
        loop {
            let after = (open_descriptors(), threads());
            if after == before && vmap_mappings().is_empty() {
                return Ok(());
            }
            ensure!(start.elapsed() < LATE, "left behind: {before:?} before, {after:?} after; {:?}", vmap_mappings());
            std::thread::yield_now();
        }
    }
}
