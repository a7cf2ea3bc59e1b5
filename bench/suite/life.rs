//! Lives of processes and engines, as the benchmark `process_life` measures them.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use anyhow::Context;

use crate::common::life::{Lives, NAMES, Twin};
use crate::memory::{Place, begin};
use crate::series::{Bench, Group, Sample, Series};

const ABOUT: [&str; NAMES.len()] = [
    "fork, a touch and the end of a child, in a process without an engine",
    "the same in the engine's process, with a region whose missing page the child touches",
    "from SIGKILL of the last process with an area to the deref callback",
    "the same from `_exit`",
    "the same from `execve`",
    "a whole life of an engine, with one fault",
];

/// The rounds of a repetition, and which it is.
type Made = (Option<usize>, Vec<[u64; NAMES.len()]>);

/// The twin was started before there was an engine. Each round measures all of the series: the first asks for it.
pub(crate) fn group(bench: &Bench, twin: Twin) -> Group {
    let rounds = bench.extent(200, 50);
    let twin = Rc::new(Cell::new(Some(twin)));
    let lives: Rc<RefCell<Option<Lives>>> = Rc::default();
    let made: Rc<RefCell<Made>> = Rc::default();
    let series = std::iter::zip(NAMES, ABOUT).enumerate().map(|(which, (name, about))| {
        let (twin, lives, made) = (Rc::clone(&twin), Rc::clone(&lives), Rc::clone(&made));
        let series = Series::new(format!("life_{name}"), about, rounds, move |bench, repetition| {
            begin(bench, Place::Free)?;
            let mut made = made.borrow_mut();
            if made.0 != Some(repetition) {
                let mut lives = lives.borrow_mut();
                if lives.is_none() {
                    *lives = Some(Lives::new(twin.take().context("the twin is taken")?)?);
                }
                let lives = lives.as_mut().context("just made")?;
                *made = (Some(repetition), (0..rounds).map(|_| lives.round()).collect::<anyhow::Result<_>>()?);
            }
            let mut each_ns: Vec<f64> = made.1.iter().map(|round| round[which] as f64).collect();
            each_ns.sort_unstable_by(f64::total_cmp);
            Ok(Sample { each_ns, ..Sample::default() })
        });
        if which == 1 { series.native("life_fork_plain") } else { series }
    });
    let series = series.collect();
    Group { name: "life", title: "Lives of processes", unit: "event", repetitions: bench.extent(3, 1), series }
}
