//! What the plots share: their font, an axis, and a chart of how long touches took.

use std::ops::Range;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

pub(crate) type Drawn<T = ()> = Result<T, Box<dyn std::error::Error>>;
pub(crate) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

pub(crate) const FONT: &str = "DejaVu Sans, Arial, sans-serif";

/// Draws a picture as SVG.
pub(crate) fn drawn(size: (u32, u32), draw: impl FnOnce(&Area<'_>) -> Drawn) -> Result<String> {
    let mut out = String::new();
    {
        let root = SVGBackend::with_string(&mut out, size).into_drawing_area();
        let drawn = root.fill(&WHITE).map_err(Into::into).and_then(|()| draw(&root));
        drawn.map_err(|error| anyhow!("drawing a plot: {error}"))?;
        root.present().map_err(|error| anyhow!("drawing a plot: {error}"))?;
    }
    Ok(out)
}

/// A chart for cumulative distributions of latencies: µs to the right, and upwards how many of `what` took no longer.
pub(crate) fn cumulative<'a>(
    area: &Area<'a>,
    caption: &str,
    what: &str,
    us: Logarithmic,
) -> Drawn<ChartContext<'a, SVGBackend<'a>, Cartesian2d<Logarithmic, RangedCoordf64>>> {
    let mut chart = ChartBuilder::on(area)
        .caption(caption, (FONT, 22))
        .margin(14)
        .x_label_area_size(50)
        .y_label_area_size(64)
        .build_cartesian_2d(us, 0.0..100.0f64)?;
    chart
        .configure_mesh()
        .x_desc("from the touch until it is done, µs, logarithmic")
        .y_desc(format!("{what} that took no longer, %"))
        .x_label_formatter(&|us| us.to_string())
        .y_label_formatter(&|percent| format!("{percent:.0}"))
        .x_labels(20)
        .y_labels(11)
        .max_light_lines(1)
        .label_style((FONT, 15))
        .axis_desc_style((FONT, 16))
        .bold_line_style(RGBColor(205, 205, 205))
        .light_line_style(RGBColor(238, 238, 238))
        .draw()?;
    Ok(chart)
}

/// A logarithmic axis with lines at 1, 2 and 5 of each decade; the library's own has powers of ten only.
pub(crate) struct Logarithmic(pub(crate) Range<f64>);

impl Ranged for Logarithmic {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (from, to): (i32, i32)) -> i32 {
        let share = (value / self.0.start).ln() / (self.0.end / self.0.start).ln();
        from + (share * f64::from(to - from)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        let ticks = (-3..7).flat_map(|decade| [1.0, 2.0, 5.0].map(|n| n * 10f64.powi(decade)));
        ticks.filter(|tick| self.0.contains(tick)).collect()
    }

    fn range(&self) -> Range<f64> {
        self.0.clone()
    }
}
