//! Two times in turn within one run: what a noisy machine does to one it does to the other.

use std::error::Error;

pub type Done<T> = Result<T, Box<dyn Error>>;

/// The median of `turns` ratios of two times, taken in turn; the first pair finds everything cold.
pub fn ratio(
    turns: usize,
    mut a: impl FnMut() -> Done<u128>,
    mut b: impl FnMut() -> Done<u128>,
) -> Done<f64> {
    let mut ratios = Vec::new();
    for turn in 0..=turns {
        let (one, other) = (a()?, b()?);
        if turn > 0 {
            ratios.push(one as f64 / other as f64);
        }
    }
    ratios.sort_by(f64::total_cmp);
    Ok(ratios[ratios.len() / 2])
}
