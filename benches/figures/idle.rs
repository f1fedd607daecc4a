//! What a machine under icount did not do, to be taken from the time that passed.

use std::error::Error;

pub type Done<T> = Result<T, Box<dyn Error>>;

/// How long the machine's one CPU was idle.
pub fn idle() -> Done<u64> {
    // In nanoseconds; /proc/stat has hundredths of a second.
    let text = std::fs::read_to_string("/proc/timer_list")?;
    let line = text.lines().find_map(|line| line.trim().strip_prefix(".idle_sleeptime"));
    let number =
        line.and_then(|line| line.split_whitespace().nth(1)).ok_or("no idle time in /proc/timer_list")?;
    Ok(number.parse()?)
}
