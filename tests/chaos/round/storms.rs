//! Steps in which many threads do many things at once, and what may have become of memory afterwards.

use super::*;

impl Round {
    pub(super) fn storm(&mut self, storm: &Storm) -> Outcome {
        self.storms += 1;
        let processes: Vec<usize> =
            storm.processes.iter().copied().filter(|&process| self.process(process).is_some()).collect();
        let killed = storm.kill.filter(|killed| *killed != 0 && processes.contains(killed));
        let removes = storm.advice.contains(&Advice::Remove) || storm.evict && storm.cuts > 0;
        let mut rng = Rng::new(storm.seed);
        let mut jobs = Vec::new();
        for (index, &process) in processes.iter().enumerate() {
            let job = self.storm_job(storm, process, index * LANES_EACH, removes, &mut rng);
            jobs.push((process, job));
        }
        self.add_churn(storm, &mut jobs, killed, &mut rng);
        // Those of the others first, as this process is busy with its own.
        for (process, job) in jobs.iter().filter(|(process, _)| *process != 0) {
            self.local.tell(*process, &Job::Storm(job.clone()));
        }
        let killer = killed.map(|process| {
            let pid = self.process(process).map_or(0, |process| process.pid);
            let wait = Duration::from_micros(rng.below(4000));
            std::thread::spawn(move || {
                std::thread::sleep(wait);
                // SAFETY: a process of this round that nobody has reaped.
                unsafe { libc::kill(pid, libc::SIGKILL) };
            })
        });
        let mut answers = Vec::new();
        if let Some((_, job)) = jobs.iter().find(|(process, _)| *process == 0) {
            answers.push(self.local.perform(Job::Storm(job.clone())));
        }
        if let Some(killer) = killer {
            killer.join().map_err(|_| "the killer panicked")?;
        }
        for &(process, _) in jobs.iter().filter(|(process, _)| *process != 0 && Some(*process) != killed) {
            answers.push(self.hear(process)?);
        }
        if let Some(killed) = killed {
            self.gone(killed)?;
            // What it had forked is ended by itself, and counted then.
            self.late = true;
        }
        for answer in answers {
            match answer {
                Answer::Storm { touches, problem: None } => self.touches += touches,
                Answer::Storm { problem: Some(problem), .. } => return Err(problem),
                other => return Err(format!("{other:?}")),
            }
        }
        for (process, job) in &jobs {
            if self.process(*process).is_some() {
                for &(addr, len, _) in &job.cuts {
                    let (page, pages) = (addr / page_size(), len / page_size());
                    self.space(*process).unmap(page..page + pages);
                }
            }
        }
        self.reconcile(storm, &jobs, removes)
    }

    pub(super) fn storm_job(
        &mut self,
        storm: &Storm,
        process: usize,
        lane: usize,
        removes: bool,
        rng: &mut Rng,
    ) -> StormJob {
        let Some(state) = self.process(process) else { unreachable!("checked by the caller") };
        let mut runs = Vec::new();
        for (range, cell) in state.space.runs() {
            let Cell::Page { vmap, pgoff, access, writable, inherit, .. } = cell else { continue };
            let kept = self.has_handle(vmap)
                && self.vmaps[vmap].as_ref().is_some_and(|state| state.pages.iter().all(|page| !page.revoked));
            let natural = if writable { Access::Write } else { Access::Read };
            let inherited = inherit.then_some(natural);
            let (addr, pages) = (addr_of(range.start), range.len());
            runs.push(Run { addr, pages, vmap, pgoff, access, inherited, writable: kept });
        }
        runs.truncate(64);
        let mut part = |runs: &[Run]| -> Option<(usize, usize, bool)> {
            let run = runs.get(rng.below(runs.len().max(1) as u64) as usize)?;
            let first = rng.below(run.pages as u64) as usize;
            let pages = 1 + rng.below((run.pages - first).min(12) as u64) as usize;
            Some((run.addr + first * page_size(), pages * page_size(), run.writable))
        };
        // Elsewhere another thread may get the addresses at once.
        let in_arena = |addr: &usize| (page_of(0)..page_of(ARENA)).contains(&(addr / page_size()));
        let cuts = (0..storm.cuts)
            .filter_map(|_| part(&runs))
            .map(|(addr, len, writable)| (addr, len, storm.evict && writable));
        let cuts = cuts.filter(|(addr, ..)| in_arena(addr)).collect();
        let advice = storm.advice.iter().filter_map(|&advice| {
            let (addr, len, writable) = part(&runs)?;
            (advice != Advice::Remove || writable).then_some((addr, len, advice))
        });
        let advice = advice.collect();
        StormJob {
            number: self.storms,
            seed: crate::script::stamp(storm.seed, process as u64),
            lane,
            touchers: storm.touchers.clamp(1, LANES_EACH),
            touches: storm.touches,
            runs,
            cuts,
            advice,
            removes,
            writes: storm.writes,
            churn: None,
            churns: storm.churns,
            forks: storm.forks,
            timer: storm.timer,
        }
    }

    /// Chooses vmaps that have an area during all of the storm: each attach in it is then not the first.
    pub(super) fn add_churn(
        &self,
        storm: &Storm,
        jobs: &mut [(usize, StormJob)],
        killed: Option<usize>,
        rng: &mut Rng,
    ) {
        if storm.churns == 0 {
            return;
        }
        let mut counts = [0; VMAPS];
        for (number, state) in self.processes.iter().enumerate() {
            let Some(state) = state.as_ref().filter(|_| Some(number) != killed) else { continue };
            let mut space = state.space.clone();
            for (_, job) in jobs.iter().filter(|(process, _)| *process == number) {
                for &(addr, len, _) in &job.cuts {
                    space.unmap(addr / page_size()..(addr + len) / page_size());
                }
            }
            for (sum, n) in counts.iter_mut().zip(space.counts()) {
                *sum += n;
            }
        }
        for (process, job) in jobs {
            let known = |vmap: &usize| {
                let state = self.vmaps[*vmap].as_ref();
                counts[*vmap] > 0 && state.is_some_and(|state| state.known & (1 << *process) != 0)
            };
            let usable: Vec<usize> = (0..VMAPS).filter(known).collect();
            if !usable.is_empty() {
                let vmap = usable[rng.below(usable.len() as u64) as usize];
                let nr_pages = self.vmaps[vmap].as_ref().map_or(0, |state| state.pages.len());
                job.churn = Some((vmap, CHURN_START, nr_pages as u64));
            }
        }
    }

    /// After a storm: what may have been touched, and what may have been written or dropped.
    pub(super) fn reconcile(&mut self, storm: &Storm, jobs: &[(usize, StormJob)], removes: bool) -> Outcome {
        let runs: Vec<Run> = jobs.iter().flat_map(|(_, job)| job.runs.iter().copied()).collect();
        let churned = jobs.iter().filter_map(|(_, job)| job.churn).map(|(vmap, ..)| vmap);
        let vmaps: std::collections::BTreeSet<usize> = runs.iter().map(|run| run.vmap).chain(churned).collect();
        for &vmap in &vmaps {
            let Some(state) = &mut self.vmaps[vmap] else { continue };
            for page in state.pages.iter_mut().filter(|page| page.given && !page.revoked) {
                if page.resident == Resident::No || removes {
                    page.resident = Resident::Maybe;
                }
            }
            self.update(vmap);
        }
        if !storm.writes && !removes {
            return Ok(());
        }
        for vmap in vmaps {
            if !self.has_handle(vmap) {
                continue;
            }
            let nr_pages = self.vmaps[vmap].as_ref().map_or(0, |state| state.pages.len() as u64);
            for pgoff in 0..nr_pages {
                let changed = |run: &Run| {
                    run.vmap == vmap && run.writable && (run.pgoff..run.pgoff + run.pages as u64).contains(&pgoff)
                };
                if self.avail(vmap, pgoff) != Avail::Bytes || !runs.iter().any(changed) {
                    continue;
                }
                let mut bytes = vec![0; page_size()];
                let read = self.local.vmaps[&vmap].read_at(pgoff * page_size() as u64, &mut bytes);
                read.map_err(|error| format!("page {pgoff} of vmap {vmap} after a storm: {error}"))?;
                for word in 0..page_size() / 8 {
                    let value = Sheet::word(&bytes, word);
                    let job = (self.storms, storm.writes, removes);
                    ensure!(
                        allowed(job, self.sheet, vmap, pgoff, word, value),
                        "word {word} of page {pgoff} of vmap {vmap} is {value:#x} after a storm"
                    );
                }
                self.sheet.write(vmap, pgoff, 0, &bytes);
                if let Some(state) = &mut self.vmaps[vmap] {
                    state.pages[pgoff as usize].resident = Resident::Yes;
                }
            }
            self.update(vmap);
        }
        Ok(())
    }
}
