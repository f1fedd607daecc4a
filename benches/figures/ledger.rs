//! What the ledger costs. `figure-ledger claims N`: N claims and their ends beside 1,000 consumers, for callgrind.
//! `figure-ledger usage`: `Host::usage` of 200 VMs against as many bare system calls of its kinds.

use std::error::Error;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::Instant;

use vmbed::internals::{PlacementInventory, PlacementLedger};
use vmbed::{BareBoot, CpuMode, Host, VmConfig};

fn claims(count: u64) -> Result<(), Box<dyn Error>> {
    let inventory = |total| PlacementInventory {
        total,
        reserved: 512,
        min_unit: 1,
        max_unit: total,
        step_size: 1,
        allocation_ratio: 4.0,
    };
    let mut ledger = PlacementLedger::new(inventory(1 << 40), inventory(1 << 20));
    for consumer in 0..1000 {
        ledger.claim(consumer, 1 << 30, 2)?;
    }
    for _ in 0..count {
        ledger.claim(1000, 1 << 30, 2)?;
        ledger.drop_consumer(1000);
    }
    Ok(())
}

/// The median time of one call in nanoseconds.
fn median(mut f: impl FnMut()) -> u128 {
    let mut times: Vec<_> = (0..501)
        .map(|_| {
            let start = Instant::now();
            f();
            start.elapsed().as_nanos()
        })
        .collect();
    times.sort_unstable();
    times[times.len() / 2]
}

fn usage() -> Result<(), Box<dyn Error>> {
    const COUNT: usize = 200;
    let host = Host::open()?;
    let config = VmConfig::bare(BareBoot::new(CpuMode::Real, 0x1000, [0xf4]));
    let vms = (0..COUNT).map(|_| host.build(config.clone())).collect::<Result<Vec<_>, _>>()?;
    // Files of the same file system as memfds; a VM's counters are as many bytes.
    let path = format!("/dev/shm/vmbed-figure-{}", std::process::id());
    std::fs::write(&path, [0; 4096])?;
    let files = (0..COUNT).map(|_| File::open(&path)).collect::<Result<Vec<_>, _>>()?;
    std::fs::remove_file(&path)?;
    let floor = median(|| {
        let blocks: u64 = files.iter().filter_map(|f| f.metadata().ok()).map(|m| m.blocks()).sum();
        let mut counters = [0; 24];
        let read = files.iter().filter(|f| f.read_exact_at(&mut counters, 0).is_ok()).count();
        std::hint::black_box((blocks, read));
    });
    let ours = median(|| {
        std::hint::black_box(host.usage());
    });
    drop(vms);
    println!("usage-ns {ours} floor-ns {floor} ratio-percent {}", ours * 100 / floor.max(1));
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["claims", count] => claims(count.parse()?),
        ["usage"] => usage(),
        ["usage", count] => {
            let host = Host::open()?;
            (0..count.parse::<u64>()?).for_each(|_| _ = std::hint::black_box(host.usage()));
            Ok(())
        }
        _ => Err("figure-ledger claims N | usage".into()),
    }
}
