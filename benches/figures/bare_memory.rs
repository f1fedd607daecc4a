//! Prints the `Private_Dirty` bytes that one more bare VM costs this process, as the slope over 64 of them
//! that have all run and now stand paused.

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmbed::{Access, BareBoot, CpuMode, Device, Host, Vm, VmConfig};

mod smaps;

struct Port;

impl Device for Port {
    fn read(&self, _: Access, _: &mut [u8]) -> vmbed::Result<()> {
        Ok(())
    }

    fn write(&self, _: Access, _: &[u8]) -> vmbed::Result<()> {
        Ok(())
    }
}

/// A VM that has come to its first exit and stands paused.
fn paused(host: &Host) -> Result<Vm, Box<dyn Error>> {
    // out 0x10, al; jmp $-2
    let config = VmConfig::bare(BareBoot::new(CpuMode::Real, 0x1000, [0xe6, 0x10, 0xeb, 0xfc]));
    let vm = host.builder(config).pio_device("port", 0x10, 1, Arc::new(Port)).build()?;
    vm.start()?;
    let end = Instant::now() + Duration::from_secs(10);
    while vm.first_exit().is_none() {
        if Instant::now() > end {
            return Err("a bare guest has not come to an exit in 10 s".into());
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    vm.pause()?;
    Ok(vm)
}

fn main() -> Result<(), Box<dyn Error>> {
    const FIRST: usize = 8;
    const COUNT: usize = 64;
    let host = Host::open()?;
    let mut vms = Vec::with_capacity(FIRST + COUNT);
    for _ in 0..FIRST {
        vms.push(paused(&host)?);
    }
    let before = smaps::private_dirty()?;
    for _ in 0..COUNT {
        vms.push(paused(&host)?);
    }
    let after = smaps::private_dirty()?;
    println!("bytes-per-vm {}", after.saturating_sub(before) / COUNT as u64);
    Ok(())
}
