//! What the engine is held to.

use serde::{Deserialize, Serialize};

use crate::report::{Entry, Repetition, ratio as ratio_of};

/// A number of a series.
#[derive(Debug, Clone, Copy)]
enum Of {
    P50,
    P99,
    Wall,
    Cpu,
    Bytes,
}

impl Of {
    fn value(self, entry: &Entry) -> Option<f64> {
        match self {
            Of::P50 => entry.record.p50_ns,
            Of::P99 => entry.record.p99_ns,
            Of::Wall => entry.record.wall_ns_per_page,
            Of::Cpu => entry.cpu_ns,
            Of::Bytes => entry.bytes,
        }
    }

    /// The same of one repetition.
    fn of(self, repetition: &Repetition) -> Option<f64> {
        match self {
            Of::P50 => repetition.p50_ns,
            Of::P99 => repetition.p99_ns,
            Of::Wall => repetition.wall_ns,
            Of::Cpu => repetition.cpu_ns,
            Of::Bytes => None,
        }
    }

    fn text(self) -> &'static str {
        match self {
            Of::P50 => "p50",
            Of::P99 => "p99",
            Of::Wall => "time per page",
            Of::Cpu => "processor time",
            Of::Bytes => "memory",
        }
    }
}

/// What is to hold.
#[derive(Debug, Clone, Copy)]
enum Bound {
    AtMost(f64),
    AtLeast(f64),
}

struct Rule {
    of: Of,
    series: &'static str,
    /// Divided by this one's, if it is given.
    to: Option<&'static str>,
    bound: Bound,
    /// What one is, of a value that is no ratio: it is divided by so much.
    unit: Option<(&'static str, f64)>,
}

const fn ratio(of: Of, series: &'static str, to: &'static str, at_most: f64) -> Rule {
    Rule { of, series, to: Some(to), bound: Bound::AtMost(at_most), unit: None }
}

/// How many times as fast `series` is as `than`.
const fn speed(series: &'static str, than: &'static str, at_least: f64) -> Rule {
    Rule { of: Of::Wall, series: than, to: Some(series), bound: Bound::AtLeast(at_least), unit: None }
}

const fn absolute(of: Of, series: &'static str, at_most: f64, unit: &'static str, one: f64) -> Rule {
    Rule { of, series, to: None, bound: Bound::AtMost(at_most), unit: Some((unit, one)) }
}

const RULES: &[Rule] = &[
    ratio(Of::P50, "engine_default_unpinned", "floor_memfd_1", 1.15),
    ratio(Of::P99, "engine_default_unpinned", "floor_memfd_1", 2.0),
    ratio(Of::P50, "engine_default_unpinned", "floor_memfd_1_unpinned", 0.2),
    ratio(Of::Cpu, "engine_default_unpinned", "floor_memfd_1", 1.05),
    ratio(Of::Cpu, "engine_pinned", "floor_memfd_1", 1.05),
    ratio(Of::P50, "engine_one_page_unpinned", "floor_memfd_1", 1.15),
    ratio(Of::Wall, "seq_engine_default", "seq_native_memfd", 0.8),
    ratio(Of::Wall, "seq_engine_populate", "seq_native_memfd", 0.7),
    ratio(Of::Wall, "populate_foreground", "populate_native", 0.7),
    ratio(Of::Wall, "seq_engine_zero_copy_minor", "seq_native_memfd", 0.35),
    ratio(Of::Wall, "seq_engine_zero_copy_populate", "seq_native_memfd", 0.35),
    ratio(Of::Wall, "seq_engine_zero_copy_read", "seq_native_memfd_read", 0.35),
    ratio(Of::Wall, "seq_engine_2m", "seq_native_memfd", 0.35),
    speed("scale_engine_threads_2", "scale_engine_threads_1", 1.7),
    speed("scale_engine_shared_2", "scale_engine_threads_1", 1.7),
    speed("scale_engine_stripes_2", "scale_engine_threads_1", 1.7),
    speed("scale_engine_engines_2", "scale_engine_threads_1", 1.7),
    speed("scale_engine_processes_2", "scale_engine_processes_1", 1.7),
    speed("scale_engine_in_thread_2", "scale_engine_in_thread_1", 1.7),
    ratio(Of::P50, "foreign_engine", "foreign_floor", 1.15),
    ratio(Of::P50, "sources_disturbed", "sources_undisturbed", 1.3),
    absolute(Of::P50, "attach_1t_attach", 1.0, "ms", 1e6),
    absolute(Of::Bytes, "attach_1t_memory", 1.0, "MiB", 1048576.0),
    ratio(Of::P50, "attach_1t_fault", "attach_1g_fault", 1.1),
    absolute(Of::Cpu, "idle_engine", 0.0, "ms per s", 1e6),
    absolute(Of::Cpu, "idle_child", 0.0, "ms per s", 1e6),
];

/// A goal, and whether it was met.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Goal {
    pub(crate) what: String,
    pub(crate) value: f64,
    pub(crate) goal: String,
    pub(crate) met: bool,
}

/// The goals whose series were measured.
pub(crate) fn judge(entries: &[Entry]) -> Vec<Goal> {
    let entry = |name: &str| entries.iter().find(|entry| entry.record.name == name);
    let judged = |rule: &Rule| {
        let one = entry(rule.series)?;
        let value = match rule.to.map(entry) {
            Some(to) => {
                let to = to?;
                let paired = ratio_of(one, to, |repetition| rule.of.of(repetition));
                paired.or_else(|| Some(rule.of.value(one)? / rule.of.value(to)?))?
            }
            None => rule.of.value(one)? / rule.unit.map_or(1.0, |unit| unit.1),
        };
        let (met, sign, bound) = match rule.bound {
            Bound::AtMost(bound) => (value <= bound, "≤", bound),
            Bound::AtLeast(bound) => (value >= bound, "≥", bound),
        };
        let unit = rule.unit.map_or(String::new(), |unit| format!(" {}", unit.0));
        let what = match (rule.to, rule.bound) {
            (Some(to), Bound::AtMost(_)) => format!("`{}` ÷ `{to}`, {}", rule.series, rule.of.text()),
            (Some(to), Bound::AtLeast(_)) => format!("`{to}` ÷ `{}`, pages a second", rule.series),
            (None, _) => format!("`{}`, {}", rule.series, rule.of.text()),
        };
        Some(Goal { what, value, goal: format!("{sign} {bound}{unit}"), met })
    };
    RULES.iter().filter_map(judged).collect()
}
