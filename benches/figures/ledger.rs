//! What the ledger costs. `figure-ledger claims N`: N claims and their ends beside 1,000 consumers, for callgrind.
//! `figure-ledger usage`: `Host::usage` of 200 VMs against as many bare system calls of its kinds.
//! `figure-ledger overhead`: what 40 bare VMs that touch all of their 32 MiB cost beside it, modelled and measured.

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

/// Kernel memory that comes with VMs, and this process's own, in bytes.
fn kernel_and_process() -> Result<u64, Box<dyn Error>> {
    let meminfo = std::fs::read_to_string("/proc/meminfo")?;
    let kib = |text: &str, name: &str| -> u64 {
        let line = text.lines().find_map(|l| l.strip_prefix(name)).unwrap_or_default();
        line.trim().trim_end_matches("kB").trim().parse().unwrap_or(0)
    };
    let names = ["SUnreclaim:", "KernelStack:", "PageTables:", "SecPageTables:", "VmallocUsed:", "Percpu:"];
    let kernel: u64 = names.iter().map(|name| kib(&meminfo, name)).sum();
    Ok((kernel + kib(&std::fs::read_to_string("/proc/self/status")?, "RssAnon:")) << 10)
}

fn overhead() -> Result<(), Box<dyn Error>> {
    const COUNT: u64 = 40;
    // mov edi, 0x200000; mov ecx, 7600; 1: mov byte [rdi], 1; add rdi, 0x1000; dec ecx; jnz 1b; hlt
    let code = [
        0xbf, 0, 0, 0x20, 0, 0xb9, 0xb0, 0x1d, 0, 0, 0xc6, 7, 1, 0x48, 0x81, 0xc7, 0, 0x10, 0, 0, 0xff, 0xc9,
        0x75, 0xf2, 0xf4,
    ];
    let mut config = VmConfig::bare(BareBoot::new(CpuMode::Long, 0x10_0000, code));
    config.memory = vmbed::Bytes::mib(32);
    let host = Host::open()?;
    let run = || -> Result<_, Box<dyn Error>> {
        let vm = host.build(config.clone())?;
        vm.start()?;
        vm.wait_timeout(std::time::Duration::from_secs(60))?
            .ok_or("a guest has not halted within a minute")?;
        Ok(vm)
    };
    let first = run()?;
    let before = kernel_and_process()?;
    let vms = (0..COUNT).map(|_| run()).collect::<Result<Vec<_>, _>>()?;
    let measured = kernel_and_process()?.saturating_sub(before) / COUNT;
    println!("modelled {} measured {measured}", first.memory().overhead.get());
    drop(vms);
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
        ["overhead"] => overhead(),
        _ => Err("figure-ledger claims N | usage | overhead".into()),
    }
}
