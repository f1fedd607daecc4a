//! What a campaign has reached, for fuzz/run: the file that VMBED_FUZZ_DEPTH names has a line for each counter.

use std::fmt::Write;
use std::sync::Mutex;

static TOTALS: Mutex<(u64, Vec<(&str, u64)>)> = Mutex::new((0, Vec::new()));

/// Adds one run's counters.
pub fn add(counters: &[(&'static str, u64)]) {
    let mut totals = TOTALS.lock().unwrap();
    let (runs, sums) = &mut *totals;
    if sums.is_empty() {
        sums.extend(counters.iter().map(|(name, _)| (*name, 0)));
    }
    for (sum, (_, count)) in sums.iter_mut().zip(counters) {
        // Of a rate's bytes there are more than a number holds.
        sum.1 = sum.1.saturating_add(*count);
    }
    *runs += 1;
    // Often enough that little is missing at the end, which nobody announces.
    if *runs % 64 == 0 {
        write(sums);
    }
}

fn write(sums: &[(&str, u64)]) {
    let Some(path) = std::env::var_os("VMBED_FUZZ_DEPTH") else { return };
    let mut text = String::new();
    for (name, sum) in sums {
        let _ = writeln!(text, "{name} {sum}");
    }
    let _ = std::fs::write(path, text);
}
