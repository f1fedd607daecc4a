//! What VMs cost this process beyond the memory of their guests.

use std::fs::File;
use std::io::{BufRead, BufReader};

/// Bytes of `Private_Dirty` in all mappings but the guests' (smaps counts their memfds' pages as private).
pub fn private_dirty() -> std::io::Result<u64> {
    let (mut total, mut guest) = (0, false);
    for line in BufReader::new(File::open("/proc/self/smaps")?).lines() {
        let line = line?;
        let mut words = line.split_ascii_whitespace();
        match words.next() {
            Some("Private_Dirty:") if !guest => {
                total += words.next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
            }
            Some(word) if !word.ends_with(':') => guest = line.contains("memfd:vmbed-guest"),
            _ => {}
        }
    }
    Ok(total << 10)
}
