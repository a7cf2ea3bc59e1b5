//! The document: a text with places for what was measured. Nothing of that is typed by hand.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::plot;
use crate::report::Report;

const TEMPLATE: &str = include_str!("benchmarks.md.in");

/// The document, and beside `path` its plots.
pub(crate) fn document(report: &Report, path: &Path) -> Result<String> {
    let stem = path.file_stem().context("the report has no name")?.to_string_lossy().into_owned();
    let mut document = TEMPLATE.to_owned();
    let mut place = |name: &str, text: &str| document = document.replace(&format!("{{{{{name}}}}}"), text.trim_end());
    let circumstances: String = report.circumstances().iter().map(|line| format!("- {line}\n")).collect();
    place("circumstances", &circumstances);
    place("goals", &report.goals_table());
    place("series", &report.list_table());
    let mut plots = plot::all(report)?;
    let mut sections = String::new();
    for group in &report.groups {
        sections += &format!("### {}\n\nTimes in µs per {}.\n\n", group.title, group.unit);
        if let Some(index) = plots.iter().position(|(name, ..)| *name == group.name) {
            let (name, alt, svg) = plots.remove(index);
            let file = format!("{stem}_{name}.svg");
            std::fs::write(path.with_file_name(&file), svg).with_context(|| format!("writing {file}"))?;
            sections += &format!("![{alt}]({file})\n\n");
        }
        sections += &report.group_table(&group.name);
        sections.push('\n');
    }
    place("results", &sections);
    ensure!(!document.contains("{{"), "a place of the template was not filled");
    Ok(document)
}
