//! Makes a script that fails shorter, as long as it goes on failing.

use crate::script::{Op, Storm};

/// Leaves operations out, first many at once and at last one by one, and makes those that stay simpler. `fails` runs a
/// candidate; `None` of it is the end of the time for it.
pub(crate) fn shrink(mut ops: Vec<Op>, mut fails: impl FnMut(&[Op]) -> Option<bool>) -> Vec<Op> {
    let mut chunk = ops.len().div_ceil(2);
    while chunk > 0 && !ops.is_empty() {
        let (mut start, mut shorter) = (0, false);
        // From the end: what comes late depends on what comes early.
        while start < ops.len() {
            let end = ops.len() - start;
            let from = end.saturating_sub(chunk);
            let candidate: Vec<Op> = [&ops[..from], &ops[end..]].concat();
            match fails(&candidate) {
                None => return ops,
                Some(true) => {
                    ops = candidate;
                    shorter = true;
                }
                Some(false) => start += chunk,
            }
        }
        if chunk > 1 || !shorter {
            chunk /= 2;
        }
    }
    for index in 0..ops.len() {
        for simpler in simpler(&ops[index]) {
            let mut candidate = ops.clone();
            candidate[index] = simpler(&ops[index]);
            if candidate == ops {
                continue;
            }
            match fails(&candidate) {
                None => return ops,
                Some(true) => ops = candidate,
                Some(false) => {}
            }
        }
    }
    ops
}

type Simplify = fn(&Op) -> Op;

/// Ways to make an operation simpler.
fn simpler(op: &Op) -> Vec<Simplify> {
    fn storm(op: &Op, change: impl FnOnce(&mut Storm)) -> Op {
        let mut op = op.clone();
        if let Op::Storm(storm) = &mut op {
            change(storm);
        }
        op
    }
    match op {
        Op::Storm(_) => vec![
            |op| storm(op, |storm| storm.timer = None),
            |op| storm(op, |storm| storm.kill = None),
            |op| storm(op, |storm| storm.forks = 0),
            |op| storm(op, |storm| storm.churns = 0),
            |op| storm(op, |storm| storm.cuts = 0),
            |op| storm(op, |storm| storm.evict = false),
            |op| storm(op, |storm| storm.advice.clear()),
            |op| storm(op, |storm| storm.writes = false),
            |op| storm(op, |storm| storm.touchers = 1),
            |op| storm(op, |storm| storm.touches = storm.touches.div_ceil(4)),
            |op| storm(op, |storm| storm.processes.truncate(1)),
        ],
        Op::Vmap { .. } => vec![
            |op| match op {
                Op::Vmap { vmap, parts, .. } => Op::Vmap { vmap: *vmap, parts: parts.clone(), expandable: false },
                other => other.clone(),
            },
            |op| match op {
                Op::Vmap { vmap, parts, expandable } => {
                    Op::Vmap { vmap: *vmap, parts: parts[..1.min(parts.len())].to_vec(), expandable: *expandable }
                }
                other => other.clone(),
            },
        ],
        _ => Vec::new(),
    }
}

/// What is needed for a failure stays, the rest goes, whatever stands between.
#[test]
fn a_failing_script_is_shrunk_to_what_it_needs() {
    let ops: Vec<Op> = (0..100).map(|at| Op::Read { process: 0, at, word: 0 }).collect();
    let has = |ops: &[Op], at| ops.iter().any(|op| matches!(op, Op::Read { at: a, .. } if *a == at));
    let mut runs = 0;
    let shrunk = shrink(ops, |ops| {
        runs += 1;
        Some(has(ops, 7) && has(ops, 50) && has(ops, 93))
    });
    let expected = [7, 50, 93].map(|at| Op::Read { process: 0, at, word: 0 });
    assert_eq!(shrunk, expected);
    assert!(runs < 200, "{runs} runs");
}

/// Without time the script stays as it is.
#[test]
fn a_script_is_kept_when_there_is_no_time_to_shrink_it() {
    let ops = vec![Op::Check; 5];
    assert_eq!(shrink(ops.clone(), |_| None), ops);
}
