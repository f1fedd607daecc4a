//! Guest memory: mapping it (the build and the end of a VM with so much of it) and the guest's first touch of
//! its pages.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use vmbed::{Access, BareBoot, Bytes, CpuMode, Device, Host, Result, VmConfig};

/// Notes when the guest first wrote to its two ports.
#[derive(Default)]
struct Marks([OnceLock<Instant>; 2]);

impl Device for Marks {
    fn read(&self, _: Access, _: &mut [u8]) -> Result<()> {
        Ok(())
    }

    fn write(&self, access: Access, _: &[u8]) -> Result<()> {
        self.0[access.offset as usize].get_or_init(Instant::now);
        Ok(())
    }
}

fn bare(memory: Bytes, code: &[u8]) -> VmConfig {
    let mut config = VmConfig::bare(BareBoot::new(CpuMode::Protected, 0x1000, code));
    config.memory = memory;
    config
}

fn map(c: &mut Criterion) {
    let host = Host::open().unwrap();
    let mut group = c.benchmark_group("map");
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2)).sample_size(20);
    for mib in [2, 256, 4096] {
        group.bench_with_input(BenchmarkId::new("build and drop, MiB", mib), &mib, |b, &mib| {
            b.iter(|| host.build(bare(Bytes::mib(mib), &[0xf4])).unwrap());
        });
    }
    group.finish();
}

/// Time for the guest to write to each of `pages` pages that nobody has touched.
fn touch(host: &Host, pages: u32) -> Duration {
    const FIRST: u32 = 2 << 20;
    let end = FIRST + pages * 4096;
    let mut code = vec![0xe6, 0x10, 0xbe]; // out 0x10, al; mov esi, FIRST
    code.extend(FIRST.to_le_bytes());
    code.extend([0xc6, 0x06, 0x01]); // mov byte [esi], 1
    code.extend([0x81, 0xc6, 0x00, 0x10, 0, 0]); // add esi, 4096
    code.extend([0x81, 0xfe]); // cmp esi, end
    code.extend(end.to_le_bytes());
    code.extend([0x72, 0xef, 0xe6, 0x11, 0xf4]); // jb to the mov; out 0x11, al; hlt
    let marks = Arc::new(Marks::default());
    let memory = Bytes::mib(u64::from(end).div_ceil(1 << 20));
    let vm = host.builder(bare(memory, &code)).pio_device("marks", 0x10, 2, marks.clone()).build().unwrap();
    vm.start().unwrap();
    vm.wait_timeout(Duration::from_secs(60)).unwrap().expect("the guest should halt");
    *marks.0[1].get().unwrap() - *marks.0[0].get().unwrap()
}

fn fault(c: &mut Criterion) {
    let host = Host::open().unwrap();
    let mut group = c.benchmark_group("fault");
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(2)).sample_size(20);
    for pages in [256u32, 4096] {
        group.throughput(Throughput::Elements(pages.into()));
        group.bench_with_input(BenchmarkId::new("first write, pages", pages), &pages, |b, &pages| {
            b.iter_custom(|count| (0..count).map(|_| touch(&host, pages)).sum());
        });
    }
    group.finish();
}

criterion_group!(benches, map, fault);
criterion_main!(benches);
