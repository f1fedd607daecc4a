//! Exit dispatch: from the guest's instruction to an embedder's device and back, KVM's part included.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use vmbed::{Access, BareBoot, CpuMode, Device, Error, ErrorKind, Host, Result, VmConfig};

/// Notes when the first of its accesses came and when the last, and ends the VM then.
struct Countdown {
    left: AtomicU64,
    first: OnceLock<Instant>,
    last: OnceLock<Instant>,
}

impl Countdown {
    fn tick(&self) -> Result<()> {
        let left = self.left.load(Ordering::Relaxed);
        self.left.store(left.wrapping_sub(1), Ordering::Relaxed);
        self.first.get_or_init(Instant::now);
        if left > 0 {
            return Ok(());
        }
        self.last.get_or_init(Instant::now);
        Err(Error::new(ErrorKind::Os, "done"))
    }
}

impl Device for Countdown {
    fn read(&self, _: Access, data: &mut [u8]) -> Result<()> {
        data.fill(0x5a);
        self.tick()
    }

    fn write(&self, _: Access, _: &[u8]) -> Result<()> {
        self.tick()
    }
}

/// How long `accesses` take after the first of them.
fn run(host: &Host, mode: CpuMode, code: &[u8], accesses: u64, others: u16) -> Duration {
    let device =
        Arc::new(Countdown { left: AtomicU64::new(accesses), first: OnceLock::new(), last: OnceLock::new() });
    let mut builder = host.builder(VmConfig::bare(BareBoot::new(mode, 0x1000, code)));
    for other in 0..others {
        builder = builder.pio_device("other", 0x1000 + other * 8, 8, device.clone());
    }
    let vm = builder
        .pio_device("countdown", 0x10, 1, device.clone())
        .mmio_device("countdown", 0xd000_0000, 4, device.clone())
        .build()
        .unwrap();
    vm.start().unwrap();
    vm.wait_timeout(Duration::from_secs(120)).unwrap().expect("the guest should end");
    *device.last.get().unwrap() - *device.first.get().unwrap()
}

fn dispatch(c: &mut Criterion) {
    let host = Host::open().unwrap();
    let mut group = c.benchmark_group("exit");
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2)).sample_size(20);
    group.throughput(Throughput::Elements(1));
    // The instruction for the device, and a jump back to it.
    let (out, input): (&[u8], &[u8]) = (&[0xe6, 0x10, 0xeb, 0xfc], &[0xe4, 0x10, 0xeb, 0xfc]);
    // mov [0xd0000000], eax; jmp $-5
    let mmio: &[u8] = &[0xa3, 0, 0, 0, 0xd0, 0xeb, 0xf9];
    for (name, mode, code, others) in [
        ("port write", CpuMode::Real, out, 0),
        ("port read", CpuMode::Real, input, 0),
        ("port write, 64 other devices", CpuMode::Real, out, 64),
        ("MMIO write", CpuMode::Protected, mmio, 0),
    ] {
        group.bench_function(name, |b| b.iter_custom(|count| run(&host, mode, code, count, others)));
    }
    group.finish();
}

criterion_group!(benches, dispatch);
criterion_main!(benches);
