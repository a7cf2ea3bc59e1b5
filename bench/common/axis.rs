//! What the plots share: their font, and an axis.

use std::ops::Range;

use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};

pub(crate) const FONT: &str = "DejaVu Sans, Arial, sans-serif";

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
