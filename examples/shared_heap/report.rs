//! What was found, as text or as one JSON object. It is printed only when all of it was verified.

use std::io::Write;

use anyhow::{Context, Result, ensure};
use kiomap::page_size;
use serde::Serialize;

use crate::heap::Layout;

/// The count at one stage.
#[derive(Serialize)]
pub(crate) struct Count {
    pub(crate) stage: String,
    pub(crate) refcount: usize,
}

/// What one process did to the heap.
#[derive(Serialize)]
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) pid: i32,
    pub(crate) areas: u64,
    pub(crate) faults: u64,
    pub(crate) pages_installed: u64,
    pub(crate) pages_poisoned: u64,
}

impl Row {
    pub(crate) fn verify(&self, areas: u64, pages: u64, faults: u64) -> Result<()> {
        let Row { name, .. } = self;
        ensure!(self.areas == areas, "{name} has {} areas, not {areas}", self.areas);
        ensure!(self.pages_installed == pages, "{name} faulted {} pages in, not {pages}", self.pages_installed);
        // A signal that interrupts a fault (a Ctrl-Z, a debugger) makes the kernel report it again.
        ensure!(self.faults >= faults, "{name} had {} faults, fewer than its {faults} blocks of pages", self.faults);
        ensure!(faults > 0 || self.faults == 0, "{name} had {} faults and needed none", self.faults);
        // Past the end of the list the kernel raises SIGBUS by itself; holes are the engine's, and there are none.
        ensure!(self.pages_poisoned == 0, "{name} met {} pages that are SIGBUS", self.pages_poisoned);
        Ok(())
    }

    pub(crate) fn sum(rows: &[Row]) -> Row {
        let sum = |of: fn(&Row) -> u64| rows.iter().map(of).sum();
        Row {
            name: "together".to_owned(),
            pid: 0,
            areas: sum(|row| row.areas),
            faults: sum(|row| row.faults),
            pages_installed: sum(|row| row.pages_installed),
            pages_poisoned: sum(|row| row.pages_poisoned),
        }
    }
}

/// The whole run.
pub(crate) struct Report {
    pub(crate) layout: Layout,
    pub(crate) rounds: u64,
    pub(crate) way: String,
    pub(crate) rows: Vec<Row>,
    pub(crate) counts: Vec<Count>,
    pub(crate) counter: u64,
    pub(crate) deref_callbacks: u64,
}

impl Report {
    pub(crate) fn print(&self, json: bool) -> Result<()> {
        let text = if json { self.json()? } else { self.text() };
        // Not println!, which panics when nobody listens.
        std::io::stdout().lock().write_all(text.as_bytes()).context("writing the report")
    }

    fn json(&self) -> Result<String> {
        let Layout { nr_pages, processes, block_pages } = self.layout;
        let value = serde_json::json!({
            "pages": nr_pages,
            "page_size": page_size(),
            "processes": processes,
            "rounds": self.rounds,
            "fault_around_pages": block_pages,
            "open_way": self.way,
            "spaces": self.rows,
            "refcounts": self.counts,
            "counter": self.counter,
            "trespasser_signal": "SIGBUS",
            "deref_callbacks": self.deref_callbacks,
            "verified": true,
        });
        Ok(serde_json::to_string_pretty(&value)? + "\n")
    }

    fn text(&self) -> String {
        let Layout { nr_pages, processes, block_pages } = self.layout;
        let mut lines = vec![
            format!("heap      {nr_pages} pages of {} bytes, filled with 0xff", page_size()),
            format!("engine    {}, up to {block_pages} pages a fault", self.way),
            String::new(),
            format!("{:<11}{:>9}{:>7}{:>9}{:>10}{:>8}", "who", "pid", "areas", "faults", "pages in", "SIGBUS"),
        ];
        let line = |row: &Row, pid: String| {
            let Row { name, areas, faults, pages_installed, pages_poisoned, .. } = row;
            format!("{name:<11}{pid:>9}{areas:>7}{faults:>9}{pages_installed:>10}{pages_poisoned:>8}")
        };
        lines.extend(self.rows.iter().map(|row| line(row, row.pid.to_string())));
        lines.push(line(&Row::sum(&self.rows), String::new()));
        lines.push("(taken while all lived; past the end of the list the kernel itself raises SIGBUS)".to_owned());
        lines.push(String::new());
        lines.push("count  after".to_owned());
        // One line for all forks and one for all exits, however many there are.
        let workers = processes as usize;
        let (before, rest) = self.counts.split_at(2);
        let (forks, rest) = rest.split_at(workers);
        let (after, exits) = rest.split_at(rest.len() - workers);
        let single = |count: &Count| format!("{:>5}  {}", count.refcount, count.stage);
        lines.extend(before.iter().map(single));
        lines.extend(series(forks, &format!("{workers} processes forked, one after the other")));
        lines.extend(after.iter().map(single));
        lines.extend(series(exits, &format!("{workers} processes exited, one after the other")));
        lines.push("       then the deref callback fired, once".to_owned());
        lines.push(String::new());
        lines.push(format!(
            "verified: {nr_pages} pages shared by {processes} processes, {} bumps of one counter, every count, one SIGBUS, \
             one callback",
            self.counter
        ));
        lines.join("\n") + "\n"
    }
}

/// The counts of several stages of one kind: all of them, or the first and the last.
fn series(counts: &[Count], what: &str) -> Option<String> {
    let last = counts.last()?.refcount;
    let numbers = match counts {
        [only] => return Some(format!("{last:>5}  {}", only.stage)),
        [first, .., before, _] if counts.len() > 8 => format!("{} … {}, {last}", first.refcount, before.refcount),
        _ => counts.iter().map(|count| count.refcount.to_string()).collect::<Vec<_>>().join(", "),
    };
    Some(format!("{last:>5}  {what}: {numbers}"))
}
