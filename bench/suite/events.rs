//! Calls that change mappings: of a region, of memory under a bare userfaultfd with events, of plain memory.

use std::sync::Arc;

use anyhow::{Context, Result};
use kiomap::{Engine, page_size};
use nix::errno::Errno;

use crate::common::clock::now;
use crate::common::raw::{FEATURES_OF_EVENTS, Mapping, Memory, Message, Uffd, Waiting};
use crate::common::touch::Contents;
use crate::memory::{Place, Served, begin, list, touch_all};
use crate::series::{Bench, Group, Sample, Series};

/// Pages that one call is about; between two calls' pages lie as many that stay.
const PART: usize = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    Advise,
    Move,
    Unmap,
}

impl Call {
    const ALL: [(Call, &'static str, &'static str); 3] = [
        (Call::Advise, "dontneed", "madvise(MADV_DONTNEED) of 16 pages"),
        (Call::Move, "mremap", "mremap that moves 16 pages"),
        (Call::Unmap, "munmap", "munmap of 16 pages"),
    ];

    /// Calls it for each part, and times each.
    fn time(self, bench: &Bench, base: usize, calls: usize) -> Result<Sample> {
        let bytes = PART * page_size();
        let space = Mapping::of(None, calls * bytes)?;
        let at = |addr: usize| std::ptr::with_exposed_provenance_mut::<libc::c_void>(addr);
        let mut each_ns = Vec::with_capacity(calls);
        for n in 0..calls {
            let part = at(base + 2 * n * bytes);
            let place = at(space.as_ptr().expose_provenance() + n * bytes);
            let begin = now();
            // SAFETY: the part lies in memory of the pass, to which no reference exists, and which is not touched again;
            // the place lies in a mapping of ours that nobody uses.
            let answer = unsafe {
                match self {
                    Call::Advise => libc::madvise(part, bytes, libc::MADV_DONTNEED),
                    Call::Unmap => libc::munmap(part, bytes),
                    Call::Move => {
                        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                        let moved = libc::mremap(part, bytes, bytes, flags, place);
                        if moved == libc::MAP_FAILED { -1 } else { 0 }
                    }
                }
            };
            let ticks = now() - begin;
            Errno::result(answer).with_context(|| format!("call {n} of {self:?}"))?;
            each_ns.push(ticks as f64 * bench.clock.ns_per_tick);
        }
        each_ns.sort_unstable_by(f64::total_cmp);
        Ok(Sample { each_ns, ..Sample::default() })
    }
}

/// A thread that reads the events of a userfaultfd, until there is a fault.
fn events(bench: &Bench, memory: &Mapping) -> Result<std::thread::JoinHandle<Result<(), Errno>>> {
    let uffd = Uffd::open_for(bench.way, Waiting::Poll, FEATURES_OF_EVENTS)?;
    uffd.register(memory)?;
    let source = bench.source.clone();
    let reader = move || {
        let mut messages = [Message::default(); 16];
        let mut last = None;
        while last.is_none() {
            // An error ends in a hang of whoever makes calls, which the alarm ends.
            uffd.wait_for_any(&mut messages, |message| last = last.or(message.fault()))?;
        }
        let page = last.unwrap_or(0) & !(page_size() - 1);
        // SAFETY: the page was touched as a volatile byte, and is registered; the source has a page.
        unsafe { uffd.copy(page, source.as_ref().as_ptr(), page_size()) }
    };
    std::thread::Builder::new().name("events".into()).spawn(reader).context("starting a reader of events")
}

pub(crate) fn group(bench: &Bench) -> Group {
    let calls = bench.extent(300, 100);
    let pages = 2 * calls * PART;
    let order: Arc<[usize]> = (0..pages).collect();
    let mut series = Vec::new();
    for (call, name, about) in Call::ALL {
        let native = format!("event_{name}_native");
        let floor = format!("event_{name}_floor");
        let touched = Arc::clone(&order);
        series.push(
            Series::new(&native, format!("{about}, of a plain memfd mapping"), calls, move |bench, _| {
                begin(bench, Place::Free)?;
                let memory = Mapping::new(Memory::Memfd, pages, pages)?;
                let base = memory.as_ptr().expose_provenance();
                touch_all(base, &touched, Contents::Zeros);
                call.time(bench, base, calls)
            })
            .native(&native),
        );
        let touched = Arc::clone(&order);
        series.push(
            Series::new(
                &floor,
                format!("{about}, under a userfaultfd whose events a bare loop reads on the same processor"),
                calls,
                move |bench, _| {
                    begin(bench, Place::Pinned)?;
                    let memory = Mapping::new(Memory::Memfd, pages + PART, pages + PART)?;
                    let base = memory.as_ptr().expose_provenance();
                    touch_all(base, &touched, Contents::Zeros);
                    let thread = events(bench, &memory)?;
                    let sample = call.time(bench, base, calls)?;
                    // A fault ends the thread.
                    let last = std::ptr::with_exposed_provenance_mut::<u8>(base + pages * page_size());
                    // SAFETY: the page lies in the mapping, is touched here only, and the thread answers.
                    unsafe { last.write_volatile(1) };
                    thread.join().ok().context("the reader of events panicked")?.context("reading events")?;
                    Ok(sample)
                },
            )
            .floor(&floor)
            .native(&native),
        );
        let touched = Arc::clone(&order);
        series.push(
            Series::new(
                format!("event_{name}_engine"),
                format!("{about}, of a region of an engine as it is by default"),
                calls,
                move |bench, _| {
                    begin(bench, Place::Free)?;
                    let served = Served::new(Engine::builder(), &list(&bench.source, pages)?)?;
                    touch_all(served.base(), &touched, Contents::Marks);
                    let sample = call.time(bench, served.base(), calls)?;
                    served.finish()?;
                    Ok(sample)
                },
            )
            .floor(&floor)
            .native(&native),
        );
    }
    let repetitions = bench.extent(5, 2);
    Group { name: "events", title: "Calls that change mappings", unit: "call", repetitions, series }
}
