//! What somebody who has never seen vmbed's sources writes: a guest, a device, its events.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vmbed::{Access, BareBoot, CpuMode, Device, EventKind, Host, StopCause, VmConfig};

#[derive(Default)]
struct Sum(AtomicU64);

impl Device for Sum {
    fn read(&self, _: Access, data: &mut [u8]) -> vmbed::Result<()> {
        data[0] = 2;
        Ok(())
    }

    fn write(&self, _: Access, data: &[u8]) -> vmbed::Result<()> {
        self.0.fetch_add(data[0].into(), Ordering::Relaxed);
        Ok(())
    }
}

fn main() -> vmbed::Result<()> {
    // in al, 0x10; out 0x10, al; add al, 40; out 0x10, al; hlt
    let code = [0xe4, 0x10, 0xe6, 0x10, 0x04, 40, 0xe6, 0x10, 0xf4];
    let config = VmConfig::bare(BareBoot::new(CpuMode::Real, 0x1000, code));
    let sum = Arc::new(Sum::default());
    let vm = Host::open()?.builder(config).pio_device("sum", 0x10, 1, sum.clone()).build()?;
    vm.start()?;
    assert_eq!(vm.wait()?, StopCause::GuestHalt);
    assert_eq!(sum.0.load(Ordering::Relaxed), 44);
    let events: Vec<_> = std::iter::from_fn(|| vm.events().next_event()).map(|e| e.kind).collect();
    assert_eq!(events, [EventKind::Started, EventKind::Stopped(StopCause::GuestHalt)]);
    println!("stranger: ok");
    Ok(())
}
