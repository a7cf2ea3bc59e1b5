//! Steps on vmaps and through their handles.

use super::*;

impl Round {
    pub(super) fn has_handle(&self, vmap: usize) -> bool {
        self.vmaps.get(vmap).is_some_and(|state| state.as_ref().is_some_and(|state| state.handle))
    }

    /// The parts, without sources where the kernel can't serve them.
    pub(super) fn possible(&self, parts: &[Part]) -> Vec<Part> {
        let sources = self.engine().features().contains(Features::THREAD_ID);
        let possible = |&part: &Part| match part {
            Part::Source { pages, .. } if !sources => Part::Zero { pages },
            part => part,
        };
        parts.iter().map(possible).collect()
    }

    pub(super) fn new_vmap(&mut self, vmap: usize, parts: &[Part], expandable: bool) -> Outcome {
        if vmap >= VMAPS || self.vmaps[vmap].is_some() {
            return Ok(());
        }
        let parts = self.possible(parts);
        let (list, given) = build(vmap, 0, &parts);
        let derefs = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&derefs);
        let mut builder = self.engine().vmap_builder(&list).on_deref(move |_| {
            counted.fetch_add(1, Ordering::SeqCst);
        });
        if expandable {
            builder = builder.expandable();
        }
        let built = builder.build().map_err(|error| error.to_string())?;
        ensure!(built.shares_pages() == (!expandable && matches!(parts[..], [Part::Zero { .. }])), "whose pages?");
        self.local.vmaps.insert(vmap, built);
        let (count, expected_derefs) = (0, 0);
        self.vmaps[vmap] =
            Some(VmapState { pages: Vec::new(), expandable, handle: true, derefs, expected_derefs, count, known: 1 });
        self.append(vmap, given);
        Ok(())
    }

    pub(super) fn append(&mut self, vmap: usize, given: Vec<crate::lists::Given>) {
        let Some(state) = &mut self.vmaps[vmap] else { return };
        for bytes in given {
            if let Some(bytes) = &bytes {
                self.sheet.set_list(vmap, state.pages.len() as u64, bytes);
            }
            let page = PageState { given: bytes.is_some(), revoked: false, resident: Resident::No };
            state.pages.push(page);
        }
        self.update(vmap);
    }

    pub(super) fn expand(&mut self, vmap: usize, parts: &[Part]) -> Outcome {
        if !self.has_handle(vmap) {
            return Ok(());
        }
        let Some(state) = &self.vmaps[vmap] else { return Ok(()) };
        let more: usize = parts.iter().map(|part| part.pages()).sum();
        if state.pages.len() + more > PAGES {
            return Ok(());
        }
        let (tail, given) = build(vmap, state.pages.len() as u64, &self.possible(parts));
        let outcome = self.local.vmaps[&vmap].expand(&tail);
        ensure!(outcome.is_ok() == state.expandable, "{outcome:?}");
        if outcome.is_ok() {
            self.append(vmap, given);
        }
        Ok(())
    }

    pub(super) fn vmap_access(&mut self, vmap: usize, offset: usize, len: usize, value: Option<u8>) -> Outcome {
        if !self.has_handle(vmap) {
            return Ok(());
        }
        let nr_pages = self.vmaps[vmap].as_ref().map_or(0, |state| state.pages.len());
        let beyond = offset + len > nr_pages * page_size();
        let pages = offset / page_size()..(offset + len).div_ceil(page_size());
        let avails: Vec<Avail> = pages.clone().map(|page| self.avail(vmap, page as u64)).collect();
        let handle = &self.local.vmaps[&vmap];
        let mut bytes = vec![value.unwrap_or(0); len];
        let outcome = match value {
            None => handle.read_at(offset as u64, &mut bytes),
            Some(_) => handle.write_at(offset as u64, &bytes),
        };
        match outcome {
            Ok(()) => {
                ensure!(!beyond, "an access past the end succeeds");
                ensure!(!avails.contains(&Avail::Bus), "an access to a page that is not there succeeds");
                for page in pages {
                    if let Some(state) = &mut self.vmaps[vmap] {
                        state.pages[page].resident = Resident::Yes;
                    }
                }
                if value.is_some() {
                    self.written(vmap, 0, offset, &bytes);
                } else {
                    for (n, &byte) in bytes.iter().enumerate() {
                        let at = offset + n;
                        let expected = self.sheet.now(vmap, (at / page_size()) as u64)[at % page_size()];
                        ensure!(byte == expected, "byte {at} is {byte:#x}, not {expected:#x}");
                    }
                }
            }
            Err(kiomap::Error::Invalid { .. }) if beyond => return Ok(()),
            Err(kiomap::Error::NoPage { pgoff, .. }) => {
                ensure!(self.avail(vmap, pgoff) != Avail::Bytes, "page {pgoff} is said not to be there");
                if let Some(page) = self.vmaps[vmap].as_mut().and_then(|state| state.pages.get_mut(pgoff as usize)) {
                    page.resident = Resident::No;
                }
                // Those before it were filled.
                for page in pages.start..pgoff as usize {
                    if let Some(state) = &mut self.vmaps[vmap] {
                        state.pages[page].resident = Resident::Yes;
                    }
                }
            }
            Err(error) => return Err(error.to_string()),
        }
        self.update(vmap);
        Ok(())
    }
}
