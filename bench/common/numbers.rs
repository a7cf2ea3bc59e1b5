//! Quantiles, orders of touching, and the order of series.

/// The value of a sorted, non-empty list below which a share of its values lies (nearest rank).
pub(crate) fn quantile(sorted: &[f64], share: f64) -> f64 {
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

/// The median of a list, if it is not empty (nearest rank).
pub(crate) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_unstable_by(f64::total_cmp);
    (!values.is_empty()).then(|| quantile(&values, 0.5))
}

/// Rounds to a fraction: 10 means one digit behind the point.
pub(crate) fn rounded(value: f64, steps: f64) -> f64 {
    (value * steps).round() / steps
}

/// Numbers that are random enough; every run has the same.
pub(crate) struct Xorshift(u64);

impl Xorshift {
    pub(crate) fn new(seed: u64) -> Xorshift {
        Xorshift(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number from 0 up to 1.
    pub(crate) fn share(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// Shuffles by Fisher and Yates.
pub(crate) fn shuffle(order: &mut [usize], seed: u64) {
    let mut random = Xorshift::new(seed);
    for last in (1..order.len()).rev() {
        order.swap(last, (random.next() % (last as u64 + 1)) as usize);
    }
}

/// The series whose turn it is: each repetition starts elsewhere, every other one goes backwards, so that none always
/// follows the same one.
pub(crate) fn turn(step: usize, repetition: usize, repetitions: usize, len: usize) -> usize {
    let start = repetition * len / repetitions;
    let forth = (start + step) % len;
    if repetition.is_multiple_of(2) { forth } else { len - 1 - forth }
}
