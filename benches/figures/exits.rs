//! Runs a bare guest through a given number of port-I/O exits to an embedder's device, so that user
//! instructions per exit can be read off as a slope over two numbers: `figure-exits N out|in`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vmbed::{Access, BareBoot, CpuMode, Device, Error, ErrorKind, Host, Result, VmConfig};

/// Counts and nothing else, as the C program that it is compared with: a read finds all-ones.
struct Countdown(AtomicU64);

impl Countdown {
    fn tick(&self) -> Result<()> {
        let left = self.0.load(Ordering::Relaxed);
        self.0.store(left.wrapping_sub(1), Ordering::Relaxed);
        if left == 0 { Err(Error::new(ErrorKind::Os, "done")) } else { Ok(()) }
    }
}

impl Device for Countdown {
    fn read(&self, _: Access, _: &mut [u8]) -> Result<()> {
        self.tick()
    }

    fn write(&self, _: Access, _: &[u8]) -> Result<()> {
        self.tick()
    }
}

fn main() -> Result<()> {
    let exits = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(100_000);
    // out 0x10, al (or in al, 0x10); jmp $-2
    let opcode = if std::env::args().nth(2).as_deref() == Some("in") { 0xe4 } else { 0xe6 };
    let config = VmConfig::bare(BareBoot::new(CpuMode::Real, 0x1000, [opcode, 0x10, 0xeb, 0xfc]));
    let device = Arc::new(Countdown(AtomicU64::new(exits)));
    let vm = Host::open()?.builder(config).pio_device("countdown", 0x10, 1, device).build()?;
    vm.start()?;
    vm.wait()?;
    Ok(())
}
