//! What comes out: a table to read, JSON for programs, a section for the documentation.

use std::fmt::Write as _;

use serde::Serialize;

use crate::common::clock::Clock;
use crate::common::machine::Machine;
use crate::common::numbers::rounded;
use crate::common::record::Record;
use crate::measure::{Sample, Summary};
use crate::series::Series;

/// What was measured, of one series.
pub(crate) struct Row {
    pub(crate) series: Series,
    pub(crate) samples: Vec<Sample>,
    pub(crate) summary: Summary,
}

/// Under which circumstances it was measured.
pub(crate) struct Circumstances {
    pub(crate) clock: Clock,
    pub(crate) pages: usize,
    pub(crate) repetitions: usize,
    pub(crate) cpu: usize,
    pub(crate) cpus: usize,
    pub(crate) open_way: &'static str,
    pub(crate) seconds: f64,
    /// Processors that others kept busy meanwhile, on average.
    pub(crate) foreign_cpus: Option<f64>,
}

/// All that was measured.
pub(crate) struct Report {
    pub(crate) rows: Vec<Row>,
    pub(crate) circumstances: Circumstances,
}

#[derive(Serialize)]
struct JsonReport {
    version: u32,
    series: Vec<Record>,
}

/// How two series compare.
#[derive(Clone, Copy)]
struct Ratios {
    p50: f64,
    wall: f64,
}

/// A ratio that the engine is held to.
struct Limit {
    series: &'static str,
    to: &'static str,
    wall: bool,
    at_most: f64,
}

const LIMITS: [Limit; 2] = [
    Limit { series: "engine_1", to: "floor_memfd_1", wall: false, at_most: 1.25 },
    Limit { series: "engine_16", to: "native_memfd", wall: true, at_most: 1.25 },
];

impl Report {
    pub(crate) fn row(&self, name: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.series.name() == name)
    }

    fn ratios(&self, row: &Row, to: Option<&str>) -> Option<Ratios> {
        let (of, to) = (&row.summary, &self.row(to?)?.summary);
        Some(Ratios { p50: of.p50_ns / to.p50_ns, wall: of.wall_ns_per_page / to.wall_ns_per_page })
    }

    fn to_floor(&self, row: &Row) -> Option<Ratios> {
        self.ratios(row, row.series.floor_name().as_deref())
    }

    fn to_native(&self, row: &Row) -> Option<Ratios> {
        self.ratios(row, Some(&row.series.native_name()))
    }

    /// The JSON document.
    pub(crate) fn json(&self) -> serde_json::Result<String> {
        let one = |row: &Row| {
            let chosen =
                |ratios: Ratios| rounded(if row.series.around == 1 { ratios.p50 } else { ratios.wall }, 1000.0);
            let summary = &row.summary;
            Record {
                name: row.series.name(),
                p50_ns: Some(rounded(summary.p50_ns, 10.0)),
                p99_ns: Some(rounded(summary.p99_ns, 10.0)),
                p999_ns: Some(rounded(summary.p999_ns, 10.0)),
                mean_ns: Some(rounded(summary.mean_ns, 10.0)),
                wall_ns_per_page: Some(rounded(summary.wall_ns_per_page, 10.0)),
                pages: self.circumstances.pages,
                ratio_to_floor: self.to_floor(row).map(chosen),
                ratio_to_native: self.to_native(row).map(chosen),
            }
        };
        let report = JsonReport { version: 1, series: self.rows.iter().map(one).collect() };
        Ok(serde_json::to_string_pretty(&report)? + "\n")
    }

    /// The table for a terminal.
    pub(crate) fn text(&self) -> String {
        let mut out = String::new();
        for line in self.preamble() {
            let _ = writeln!(out, "{line}");
        }
        let _ = writeln!(
            out,
            "\n{:25} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8}   {:>13}   {:>13}\n{:25} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8}   {:>6} {:>6}   {:>6} {:>6}",
            "",
            "µs per",
            "fault",
            "",
            "",
            "",
            "µs per",
            "to the floor",
            "to native",
            "series",
            "p50",
            "p99",
            "p99.9",
            "mean",
            "min",
            "page",
            "p50",
            "page",
            "p50",
            "page",
        );
        for row in &self.rows {
            let s = &row.summary;
            let _ = write!(out, "{:25}", row.series.name());
            for ns in [s.p50_ns, s.p99_ns, s.p999_ns, s.mean_ns, s.min_ns, s.wall_ns_per_page] {
                let _ = write!(out, " {:>8.2}", ns / 1e3);
            }
            for ratios in [self.to_floor(row), self.to_native(row)] {
                let [p50, wall] = cells(ratios);
                let _ = write!(out, "   {p50:>6} {wall:>6}");
            }
            out.push('\n');
        }
        out.push('\n');
        for line in self.verdicts() {
            let _ = writeln!(out, "{line}");
        }
        out
    }

    /// The section for the documentation.
    pub(crate) fn markdown(&self) -> String {
        let mut out = String::new();
        for line in self.preamble() {
            let _ = writeln!(out, "- {line}");
        }
        out += "\n| series | p50 | p99 | p99.9 | mean | min | µs per page | ÷ floor, p50 | ÷ floor, page | ÷ native, p50 | ÷ native, page | answered by |\n";
        out += "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|\n";
        for row in &self.rows {
            let s = &row.summary;
            let _ = write!(out, "| `{}` |", row.series.name());
            for ns in [s.p50_ns, s.p99_ns, s.p999_ns, s.mean_ns, s.min_ns, s.wall_ns_per_page] {
                let _ = write!(out, " {:.2} |", ns / 1e3);
            }
            for ratios in [self.to_floor(row), self.to_native(row)] {
                let [p50, wall] = cells(ratios);
                let _ = write!(out, " {p50} | {wall} |");
            }
            let _ = writeln!(out, " {} |", row.series.about());
        }
        out.push('\n');
        for line in self.verdicts() {
            let _ = writeln!(out, "- {line}");
        }
        out
    }

    /// Machine, kernel and circumstances.
    fn preamble(&self) -> Vec<String> {
        let c = &self.circumstances;
        let foreign =
            c.foreign_cpus.map_or("an unknown number".to_owned(), |cpus| format!("about {:.1}", cpus.max(0.0)));
        vec![
            Machine::look().line(),
            format!(
                "{} pages of {} KiB a pass, {} passes of each series, interleaved; medians over the passes; {:.0} s in all",
                c.pages,
                kiomap::page_size() / 1024,
                c.repetitions,
                c.seconds,
            ),
            format!("userfaultfd opened by {}; one-core series on processor {}", c.open_way, c.cpu),
            format!(
                "clock: {}; two readings take {:.0} ns, which every latency contains",
                c.clock.name, c.clock.overhead_ns
            ),
            format!("others kept {foreign} of {} processors busy meanwhile", c.cpus),
        ]
    }

    /// The ratios that the engine is held to, as far as they were measured.
    fn verdicts(&self) -> Vec<String> {
        let verdict = |limit: &Limit| {
            let ratios = self.ratios(self.row(limit.series)?, Some(limit.to))?;
            let (what, ratio) = if limit.wall { ("time per page", ratios.wall) } else { ("p50", ratios.p50) };
            let word = if ratio <= limit.at_most { "within" } else { "OVER" };
            let Limit { series, to, at_most, .. } = limit;
            Some(format!("{series} / {to}, {what}: {ratio:.2}, {word} {at_most}"))
        };
        LIMITS.iter().filter_map(verdict).collect()
    }
}

fn cells(ratios: Option<Ratios>) -> [String; 2] {
    ratios.map_or(["–".into(), "–".into()], |r| [format!("{:.2}", r.p50), format!("{:.2}", r.wall)])
}
