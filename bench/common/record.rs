//! The JSON that every benchmark of faults writes, for programs.

use serde::{Deserialize, Serialize};

/// What one series measured: medians over the repetitions. What a series does not measure is `null`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) name: String,
    pub(crate) p50_ns: Option<f64>,
    pub(crate) p99_ns: Option<f64>,
    pub(crate) p999_ns: Option<f64>,
    pub(crate) mean_ns: Option<f64>,
    pub(crate) wall_ns_per_page: Option<f64>,
    pub(crate) pages: usize,
    pub(crate) ratio_to_floor: Option<f64>,
    pub(crate) ratio_to_native: Option<f64>,
}
