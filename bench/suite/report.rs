//! What comes out: JSON, and the tables made of it.

use std::fmt::Write as _;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use crate::common::machine::Machine;
use crate::common::numbers::{median, quantile, rounded};
use crate::common::record::Record;
use crate::goals::Goal;
use crate::series::{Sample, Series};

/// What one series measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Entry {
    #[serde(flatten)]
    pub(crate) record: Record,
    pub(crate) group: String,
    pub(crate) about: String,
    pub(crate) floor: Option<String>,
    pub(crate) native: Option<String>,
    pub(crate) min_ns: Option<f64>,
    /// Processor time of all threads, per page, call or second.
    pub(crate) cpu_ns: Option<f64>,
    pub(crate) bytes: Option<f64>,
    /// From the fastest to the slowest repetition, in parts of the median.
    pub(crate) spread: Option<f64>,
    pub(crate) repetitions: usize,
    /// What each repetition measured.
    #[serde(default)]
    pub(crate) each: Vec<Repetition>,
    /// Of what was timed one by one, all repetitions together: the 0th to the 100th percentile.
    pub(crate) percentiles_ns: Vec<f64>,
}

/// What one repetition measured.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Repetition {
    pub(crate) p50_ns: Option<f64>,
    pub(crate) p99_ns: Option<f64>,
    pub(crate) wall_ns: Option<f64>,
    pub(crate) cpu_ns: Option<f64>,
}

impl Repetition {
    fn of(sample: &Sample) -> Repetition {
        let at = |share| (!sample.each_ns.is_empty()).then(|| quantile(&sample.each_ns, share));
        let told = |value: Option<f64>| value.map(|ns| rounded(ns, 10.0));
        Repetition {
            p50_ns: told(at(0.5)),
            p99_ns: told(at(0.99)),
            wall_ns: told(sample.wall_ns),
            cpu_ns: told(sample.cpu_ns),
        }
    }

    /// What it is compared by.
    fn typical_ns(&self) -> Option<f64> {
        self.p50_ns.or(self.wall_ns)
    }
}

/// The median of how many times `other` each repetition was: what goes on beside the measurement for longer than one
/// repetition is in both. Of what was not measured in the same repetitions, nothing.
pub(crate) fn ratio(one: &Entry, other: &Entry, value: impl Fn(&Repetition) -> Option<f64>) -> Option<f64> {
    if one.each.len() != other.each.len() || one.group != other.group {
        return None;
    }
    let ratios = std::iter::zip(&one.each, &other.each).map(|(one, other)| Some(value(one)? / value(other)?));
    median(ratios.collect::<Option<_>>()?)
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Section {
    pub(crate) name: String,
    pub(crate) title: String,
    pub(crate) unit: String,
}

/// Under which circumstances it was measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Run {
    pub(crate) version: String,
    pub(crate) quick: bool,
    pub(crate) selected: Option<String>,
    pub(crate) open_way: String,
    pub(crate) cpu: usize,
    pub(crate) clock: String,
    pub(crate) clock_overhead_ns: f64,
    pub(crate) seconds: f64,
    /// Processors that others kept busy meanwhile, on average.
    pub(crate) foreign_cpus: Option<f64>,
    /// Repetitions of groups that began although the machine was not at rest.
    pub(crate) restless: usize,
}

/// All that was measured. The document for programs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) version: u32,
    pub(crate) machine: Machine,
    pub(crate) run: Run,
    pub(crate) groups: Vec<Section>,
    pub(crate) series: Vec<Entry>,
    pub(crate) goals: Vec<Goal>,
}

impl Entry {
    pub(crate) fn of(group: &str, series: &Series, samples: &[Sample]) -> Entry {
        let over = |value: &dyn Fn(&Sample) -> Option<f64>| {
            median(samples.iter().filter_map(value).collect()).map(|ns| rounded(ns, 10.0))
        };
        let at = |share: f64| over(&|sample| (!sample.each_ns.is_empty()).then(|| quantile(&sample.each_ns, share)));
        let mut all: Vec<f64> = samples.iter().flat_map(|sample| &sample.each_ns).copied().collect();
        all.sort_unstable_by(f64::total_cmp);
        let percentiles_ns = if all.is_empty() {
            Vec::new()
        } else {
            (0..=100).map(|percent| rounded(quantile(&all, f64::from(percent) / 100.0), 10.0)).collect()
        };
        // What stands for a repetition: its median if touches were timed one by one.
        let typical = |sample: &Sample| {
            let p50 = (!sample.each_ns.is_empty()).then(|| quantile(&sample.each_ns, 0.5));
            p50.or(sample.wall_ns).or(sample.cpu_ns).or(sample.bytes)
        };
        let each: Vec<f64> = samples.iter().filter_map(typical).collect();
        let (least, most) = each.iter().fold((f64::INFINITY, 0f64), |(least, most), &ns| (least.min(ns), most.max(ns)));
        let spread = median(each).filter(|&middle| middle > 0.0).map(|middle| rounded((most - least) / middle, 1000.0));
        Entry {
            record: Record {
                name: series.name.clone(),
                p50_ns: at(0.5),
                p99_ns: at(0.99),
                p999_ns: at(0.999),
                mean_ns: over(&|s| {
                    (!s.each_ns.is_empty()).then(|| s.each_ns.iter().sum::<f64>() / s.each_ns.len() as f64)
                }),
                wall_ns_per_page: over(&|sample| sample.wall_ns),
                pages: series.pages,
                ratio_to_floor: None,
                ratio_to_native: None,
            },
            group: group.to_owned(),
            about: series.about.clone(),
            floor: series.floor.clone(),
            native: series.native.clone(),
            min_ns: all.first().map(|&ns| rounded(ns, 10.0)),
            cpu_ns: over(&|sample| sample.cpu_ns),
            bytes: over(&|sample| sample.bytes),
            spread,
            repetitions: samples.len(),
            each: samples.iter().map(Repetition::of).collect(),
            percentiles_ns,
        }
    }

    /// What it is compared by.
    pub(crate) fn typical_ns(&self) -> Option<f64> {
        self.record.p50_ns.or(self.record.wall_ns_per_page)
    }
}

impl Report {
    /// Takes in another part of the same, measured on the same machine.
    pub(crate) fn add(&mut self, part: Report) -> Result<()> {
        let kind = |report: &Report| (report.machine.line(), report.run.open_way.clone(), report.run.quick);
        let same = kind(self) == kind(&part);
        ensure!(same, "the parts were not measured under the same circumstances");
        // Later parts are newer. What theirs are compared with came with them.
        let again = |entry: &Entry| part.series.iter().any(|newer| newer.record.name == entry.record.name);
        self.series.retain(|entry| !again(entry));
        self.series.extend(part.series);
        for group in part.groups {
            if self.groups.iter().all(|other| other.name != group.name) {
                self.groups.push(group);
            }
        }
        self.machine = part.machine;
        let (own, added) = (&mut self.run, part.run);
        own.foreign_cpus = own.foreign_cpus.zip(added.foreign_cpus).map(|(own_cpus, added_cpus)| {
            (own_cpus * own.seconds + added_cpus * added.seconds) / (own.seconds + added.seconds)
        });
        own.seconds += added.seconds;
        own.restless += added.restless;
        own.selected = own.selected.take().zip(added.selected).map(|(own, added)| format!("{own}, {added}"));
        self.compare();
        Ok(())
    }

    /// Fills in the ratios, and judges.
    pub(crate) fn compare(&mut self) {
        let entries = self.series.clone();
        let of = |name: &Option<String>| entries.iter().find(|other| Some(&other.record.name) == name.as_ref());
        for entry in &mut self.series {
            let compared = |to: &Entry| {
                let paired = ratio(entry, to, Repetition::typical_ns);
                let value = paired.or_else(|| Some(entry.typical_ns()? / to.typical_ns()?));
                value.map(|value| rounded(value, 1000.0))
            };
            let ratios = (of(&entry.floor).and_then(compared), of(&entry.native).and_then(compared));
            (entry.record.ratio_to_floor, entry.record.ratio_to_native) = ratios;
        }
        self.goals = crate::goals::judge(&self.series);
    }

    pub(crate) fn json(&self) -> serde_json::Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    pub(crate) fn of_group<'a>(&'a self, group: &'a str) -> impl Iterator<Item = &'a Entry> {
        self.series.iter().filter(move |entry| entry.group == group)
    }

    /// The tables for a terminal; the goals last.
    pub(crate) fn text(&self) -> String {
        let mut out = String::new();
        for line in self.circumstances() {
            let _ = writeln!(out, "{line}");
        }
        for group in &self.groups {
            let columns = columns(self.of_group(&group.name));
            let _ = write!(out, "\n{}; times in µs per {}\n{:31}", group.title, group.unit, "series");
            let titles: String = columns.iter().map(|column| format!(" {:>9}", column.title)).collect();
            let _ = writeln!(out, "{titles}");
            for entry in self.of_group(&group.name) {
                let cells: String = columns.iter().map(|column| format!(" {:>9}", (column.cell)(entry))).collect();
                let _ = writeln!(out, "{:31}{cells}", entry.record.name);
            }
        }
        out += "\nGoals\n";
        for goal in &self.goals {
            let met = if goal.met { "met" } else { "NOT MET" };
            let _ =
                writeln!(out, "{:75} {:>9} {:>12}  {met}", goal.what.replace('`', ""), number(goal.value), goal.goal);
        }
        out
    }

    /// Machine, kernel and circumstances, a line each.
    pub(crate) fn circumstances(&self) -> Vec<String> {
        let run = &self.run;
        let busy =
            run.foreign_cpus.map_or("an unknown number".to_owned(), |cpus| format!("about {:.1}", cpus.max(0.0)));
        let mut lines = vec![
            format!("{}; {} MiB of memory", self.machine.line(), self.machine.memory_mib),
            self.machine.settings.iter().map(|(name, value)| format!("{name}: {value}")).collect::<Vec<_>>().join("; "),
            format!(
                "kiomap {}; userfaultfd opened by {}; pinned series on processor {}",
                run.version, run.open_way, run.cpu
            ),
            format!(
                "clock: {}; two readings take {:.0} ns, which every latency contains",
                run.clock, run.clock_overhead_ns
            ),
            format!(
                "{:.0} s in all; others kept {busy} of {} processors busy meanwhile; {} repetitions began on a machine that was not at rest",
                run.seconds, self.machine.cpus, run.restless
            ),
        ];
        if run.quick {
            lines.push("A quick run, to see that everything works: don't quote its numbers.".to_owned());
        }
        if let Some(selected) = &run.selected {
            lines.push(format!("Measured in parts: {selected}."));
        }
        lines
    }

    pub(crate) fn goals_table(&self) -> String {
        let mut out = "| goal | value | to be | met |\n|---|--:|--:|---|\n".to_owned();
        for goal in &self.goals {
            let met = if goal.met { "yes" } else { "**no**" };
            let _ = writeln!(out, "| {} | {} | {} | {met} |", goal.what, number(goal.value), goal.goal);
        }
        out
    }

    pub(crate) fn group_table(&self, group: &str) -> String {
        let columns = columns(self.of_group(group));
        let titles: String = columns.iter().map(|column| format!(" {} |", column.title)).collect();
        let mut out = format!("| series |{titles} repetitions |\n|---|{} --:|\n", " --: |".repeat(columns.len()));
        for entry in self.of_group(group) {
            let cells: String = columns.iter().map(|column| format!(" {} |", (column.cell)(entry))).collect();
            let _ = writeln!(out, "| `{}` |{cells} {} |", entry.record.name, entry.repetitions);
        }
        out
    }

    pub(crate) fn list_table(&self) -> String {
        let mut out = "| series | measures | `floor` | `native` |\n|---|---|---|---|\n".to_owned();
        let named = |name: &Option<String>| name.as_ref().map_or("–".to_owned(), |name| format!("`{name}`"));
        for entry in &self.series {
            let Entry { record, about, floor, native, .. } = entry;
            let _ = writeln!(out, "| `{}` | {about} | {} | {} |", record.name, named(floor), named(native));
        }
        out
    }
}

struct Column {
    title: &'static str,
    cell: fn(&Entry) -> String,
}

/// The columns of which any series of a table has something.
fn columns<'a>(entries: impl Iterator<Item = &'a Entry>) -> Vec<Column> {
    let all = [
        Column { title: "p50", cell: |entry| micros(entry.record.p50_ns) },
        Column { title: "p99", cell: |entry| micros(entry.record.p99_ns) },
        Column { title: "min", cell: |entry| micros(entry.min_ns) },
        Column { title: "wall", cell: |entry| micros(entry.record.wall_ns_per_page) },
        Column { title: "processor", cell: |entry| micros(entry.cpu_ns) },
        Column { title: "KiB", cell: |entry| entry.bytes.map_or("–".to_owned(), |bytes| number(bytes / 1024.0)) },
        Column {
            title: "B/page",
            cell: |entry| entry.bytes.map_or("–".to_owned(), |bytes| number(bytes / entry.record.pages as f64)),
        },
        Column { title: "÷ floor", cell: |entry| entry.record.ratio_to_floor.map_or("–".to_owned(), number) },
        Column { title: "÷ native", cell: |entry| entry.record.ratio_to_native.map_or("–".to_owned(), number) },
        Column {
            title: "spread",
            cell: |entry| entry.spread.map_or("–".to_owned(), |s| format!("{:.0} %", s * 100.0)),
        },
    ];
    let entries: Vec<&Entry> = entries.collect();
    all.into_iter().filter(|column| entries.iter().any(|&entry| (column.cell)(entry) != "–")).collect()
}

fn micros(ns: Option<f64>) -> String {
    ns.map_or("–".to_owned(), |ns| number(ns / 1e3))
}

/// Three digits that say something.
pub(crate) fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 0.095 => format!("{value:.2}"),
        v if v >= 0.001 => format!("{value:.4}"),
        _ => format!("{value:.1e}"),
    }
}
