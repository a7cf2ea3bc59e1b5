//! The pictures, made of the report alone.

use anyhow::Result;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::common::axis::{Area, Drawn, FONT, Logarithmic, cumulative, drawn};
use crate::report::{Entry, Report, number};

const NATIVE: RGBColor = RGBColor(120, 120, 120);
const FLOOR: RGBColor = RGBColor(86, 180, 233);
const ENGINE: RGBColor = RGBColor(213, 94, 0);
/// Colours that colour-blind people tell apart.
const COLOURS: [RGBColor; 8] = [
    RGBColor(153, 153, 153),
    RGBColor(0, 0, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 73, 168),
    RGBColor(213, 94, 0),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
];

/// The pictures that the report has something for: the end of the file's name, what is seen, the SVG.
pub(crate) fn all(report: &Report) -> Result<Vec<(&'static str, &'static str, String)>> {
    let mut plots = Vec::new();
    let faults: Vec<&Entry> = report.of_group("faults").filter(|entry| entry.percentiles_ns.len() > 1).collect();
    if !faults.is_empty() {
        let svg = drawn((1280, 640), |root| distributions(root, &faults))?;
        plots.push(("faults", "Latency of single random page faults", svg));
    }
    for (name, group, alt) in [
        ("throughput", "throughput", "Time per page of a large region"),
        ("scaling", "scaling", "Time per page with more threads and processes"),
        ("events", "events", "Calls that change mappings"),
    ] {
        let entries: Vec<&Entry> = report.of_group(group).filter(|entry| entry.typical_ns().is_some()).collect();
        if !entries.is_empty() {
            let height = 110 + 20 * entries.len() as u32;
            let svg = drawn((1280, height), |root| bars(root, alt, &entries))?;
            plots.push((name, alt, svg));
        }
    }
    Ok(plots)
}

/// Latencies, all repetitions together, as cumulative distributions.
fn distributions(root: &Area<'_>, entries: &[&Entry]) -> Drawn {
    let (curves, names) = root.split_vertically(520);
    let at = |entry: &Entry, percent: usize| entry.percentiles_ns.get(percent).copied().unwrap_or(1.0) / 1e3;
    let lowest = entries.iter().map(|entry| at(entry, 0)).fold(f64::INFINITY, f64::min);
    let highest = entries.iter().map(|entry| at(entry, 99)).fold(1.0, f64::max);
    let x = Logarithmic((lowest * 0.9).max(0.01)..highest * 1.3);
    let mut chart = cumulative(&curves, "Latency of single random page faults", "touches", x)?;
    for (index, entry) in entries.iter().enumerate() {
        let style = COLOURS[index % COLOURS.len()].stroke_width(3);
        chart.draw_series(LineSeries::new((0..=99).map(|percent| (at(entry, percent), percent as f64)), style))?;
        let rows = entries.len().div_ceil(2);
        let (x, y) = (80 + (index / rows) as i32 * 590, 10 + (index % rows) as i32 * 22);
        names.draw(&PathElement::new([(x, y), (x + 28, y)], style))?;
        let label = format!("{}: median {} µs", entry.record.name, number(entry.record.p50_ns.unwrap_or(0.0) / 1e3));
        names.draw(&Text::new(label, (x + 38, y - 6), (FONT, 15)))?;
    }
    Ok(())
}

/// A bar for each series, in µs, on a logarithmic axis.
fn bars(root: &Area<'_>, title: &str, entries: &[&Entry]) -> Drawn {
    let (width, height) = root.dim_in_pixel();
    let (left, right, top, bottom) = (300, width as i32 - 90, 46, height as i32 - 44);
    let values: Vec<f64> = entries.iter().map(|entry| entry.typical_ns().unwrap_or(1.0) / 1e3).collect();
    let least = values.iter().copied().fold(f64::INFINITY, f64::min) / 2.0;
    let most = values.iter().copied().fold(0.0, f64::max) * 1.05;
    let axis = Logarithmic(least.max(0.001)..most);
    let at = |us: &f64| plotters::coord::ranged1d::Ranged::map(&axis, us, (left, right));
    let centred = |size: u32, h, v| (FONT, size).into_font().color(&BLACK).pos(Pos::new(h, v));
    root.draw(&Text::new(title.to_owned(), (width as i32 / 2, 12), centred(22, HPos::Center, VPos::Top)))?;
    let ticks =
        plotters::coord::ranged1d::Ranged::key_points(&axis, plotters::coord::ranged1d::LightPoints::new(20, 20));
    for tick in ticks {
        let x = at(&tick);
        root.draw(&PathElement::new([(x, top), (x, bottom)], RGBColor(220, 220, 220)))?;
        root.draw(&Text::new(tick.to_string(), (x, bottom + 4), centred(13, HPos::Center, VPos::Top)))?;
    }
    let caption = "µs, logarithmic: medians over the repetitions";
    root.draw(&Text::new(caption, ((left + right) / 2, bottom + 22), centred(14, HPos::Center, VPos::Top)))?;
    let step = (bottom - top) / entries.len().max(1) as i32;
    for (index, (entry, value)) in std::iter::zip(entries, &values).enumerate() {
        let y = top + index as i32 * step;
        let name = &entry.record.name;
        let colour = match name {
            name if name.contains("native") => NATIVE,
            name if name.contains("floor") => FLOOR,
            _ => ENGINE,
        };
        root.draw(&Rectangle::new([(left, y + 3), (at(value), y + step - 2)], colour.filled()))?;
        let middle = y + step / 2;
        root.draw(&Text::new(name.clone(), (left - 8, middle), centred(14, HPos::Right, VPos::Center)))?;
        root.draw(&Text::new(number(*value), (at(value) + 6, middle), centred(13, HPos::Left, VPos::Center)))?;
    }
    Ok(())
}
