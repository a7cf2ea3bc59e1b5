//! The picture: how long single faults take, and what a page costs.

use anyhow::Result;
use plotters::prelude::*;

use crate::common::axis::{Area, Drawn, FONT, Logarithmic, cumulative, drawn};
use crate::common::numbers::quantile;
use crate::report::{Report, Row};

const SIZE: (u32, u32) = (1280, 680);
/// Pixels from the left, to the right part; from the top, to the legend of the left part.
const SPLIT: (u32, u32) = (840, 560);

/// The series of the left part, what the legend says, and their colours: a palette that colour-blind people tell
/// apart.
const MAIN: [(&str, &str, RGBColor); 7] = [
    ("native_anon", "kernel's first touch, anonymous", RGBColor(153, 153, 153)),
    ("native_memfd", "kernel's first touch, memfd", RGBColor(0, 0, 0)),
    ("floor_memfd_1", "bare read + UFFDIO_COPY loop, memfd", RGBColor(86, 180, 233)),
    ("engine_1", "engine", RGBColor(213, 94, 0)),
    ("engine_1_child", "engine, a forked child's faults", RGBColor(0, 158, 115)),
    ("engine_sigbus", "engine, SIGBUS for a hole", RGBColor(204, 121, 167)),
    ("engine_1_unpinned", "engine, threads not pinned", RGBColor(0, 73, 168)),
];

/// Draws the picture as SVG.
pub(crate) fn svg(report: &Report) -> Result<String> {
    drawn(SIZE, |root| draw(root, report))
}

fn draw(root: &Area<'_>, report: &Report) -> Drawn {
    let (left, right) = root.split_horizontally(SPLIT.0);
    let (curves, names) = left.split_vertically(SPLIT.1);
    distributions(&curves, &names, report)?;
    pages(&right, report)
}

/// Latencies of faults that bring one page, all passes together, as a cumulative distribution.
fn distributions(area: &Area<'_>, names: &Area<'_>, report: &Report) -> Drawn {
    let chosen: Vec<_> =
        MAIN.iter().filter_map(|(name, label, colour)| Some((report.row(name)?, *label, *colour))).collect();
    let lowest = chosen.iter().map(|(row, ..)| row.summary.min_ns).fold(f64::INFINITY, f64::min);
    let slowest = chosen.iter().map(|(row, ..)| row.summary.p999_ns).fold(0.0, f64::max);
    let x = Logarithmic((lowest / 1e3 * 0.9).min(1.0)..(slowest / 1e3).max(100.0));
    let mut chart = cumulative(area, "Latency of one page fault", "faults", x)?;
    for (at, (row, label, colour)) in chosen.into_iter().enumerate() {
        let mut all: Vec<f64> = row.samples.iter().flat_map(|sample| &sample.faults_ns).copied().collect();
        all.sort_unstable_by(f64::total_cmp);
        let points = (0..=1000).map(|mille| (quantile(&all, f64::from(mille) / 1e3) / 1e3, f64::from(mille) / 10.0));
        let style = colour.stroke_width(3);
        chart.draw_series(LineSeries::new(points, style))?;
        // In two columns below the axis: in the chart it would hide what it names.
        let (x, y) = (80 + (at / 4) as i32 * 390, 14 + (at % 4) as i32 * 25);
        names.draw(&PathElement::new([(x, y), (x + 28, y)], style))?;
        let label = format!("{label}: median {:.1} µs", row.summary.p50_ns / 1e3);
        names.draw(&Text::new(label, (x + 38, y - 6), (FONT, 15)))?;
    }
    Ok(())
}

/// Time per page when a fault brings 1, 16 or 64 pages, against the kernel's own first touch.
fn pages(area: &Area<'_>, report: &Report) -> Drawn {
    const AROUND: [usize; 3] = [1, 16, 64];
    let bars = [
        ("floor_memfd", "bare loop, memfd", RGBColor(86, 180, 233), BLACK),
        ("engine", "engine", RGBColor(213, 94, 0), WHITE),
    ];
    let wall = |row: &Row| row.summary.wall_ns_per_page / 1e3;
    let native = report.row("native_memfd").map(wall);
    let values: Vec<Vec<Option<f64>>> = bars
        .iter()
        .map(|(prefix, ..)| AROUND.iter().map(|n| report.row(&format!("{prefix}_{n}")).map(wall)).collect())
        .collect();
    let highest = values.iter().flatten().flatten().copied().chain(native).fold(1.0, f64::max) * 1.25;
    let mut chart = ChartBuilder::on(area)
        .caption("Time per page", (FONT, 22))
        .margin(14)
        .x_label_area_size(50)
        .y_label_area_size(54)
        .build_cartesian_2d(0.0..AROUND.len() as f64, 0.0..highest)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .max_light_lines(1)
        .x_desc("pages that one fault brings")
        .y_desc("µs per page, random order")
        .x_labels(2 * AROUND.len() + 1)
        .x_label_formatter(&|x| {
            AROUND
                .iter()
                .enumerate()
                .find(|(i, _)| (*i as f64 + 0.5 - x).abs() < 0.01)
                .map_or(String::new(), |(_, n)| n.to_string())
        })
        .y_label_formatter(&|us| format!("{us:.0}"))
        .label_style((FONT, 15))
        .axis_desc_style((FONT, 16))
        .bold_line_style(RGBColor(205, 205, 205))
        .light_line_style(RGBColor(238, 238, 238))
        .draw()?;
    for (which, ((_, label, colour, ink), values)) in bars.iter().zip(&values).enumerate() {
        let (colour, width) = (*colour, 0.36);
        let rectangles = values.iter().enumerate().filter_map(|(at, value)| {
            let from = at as f64 + 0.5 + (which as f64 - 1.0) * width;
            Some(Rectangle::new([(from, 0.0), (from + width, (*value)?)], colour.filled()))
        });
        chart
            .draw_series(rectangles)?
            .label(*label)
            .legend(move |(x, y)| Rectangle::new([(x + 6, y - 6), (x + 22, y + 6)], colour.filled()));
        let numbers = values.iter().enumerate().filter_map(|(at, value)| {
            let from = at as f64 + 0.5 + (which as f64 - 0.5) * width;
            let style = (FONT, 15).into_font().color(ink).pos(plotters::style::text_anchor::Pos::new(
                plotters::style::text_anchor::HPos::Center,
                plotters::style::text_anchor::VPos::Top,
            ));
            Some(Text::new(format!("{:.1}", (*value)?), (from, (*value)? - highest * 0.012), style))
        });
        chart.draw_series(numbers)?;
    }
    if let Some(native) = native {
        let style = BLACK.stroke_width(2);
        chart
            .draw_series(LineSeries::new([(0.0, native), (AROUND.len() as f64, native)], style))?
            .label(format!("kernel's first touch, memfd: {native:.1}"))
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 26, y)], style));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .legend_area_size(34)
        .margin(10)
        .label_font((FONT, 15))
        .background_style(WHITE.mix(0.9))
        .border_style(RGBColor(160, 160, 160))
        .draw()?;
    Ok(())
}
