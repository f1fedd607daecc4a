//! What an exit costs on the bus: finding the device behind an address, and calling it.

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use vmbed::internals::{BenchBus, Board, ECAM, Part};

fn dispatch(c: &mut Criterion) {
    let mut group = c.benchmark_group("bus");
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(1));
    for devices in [1, 8, 64] {
        let bus = BenchBus::new(devices).unwrap();
        let last = (devices - 1) << 8;
        group.bench_function(format!("read, {devices} devices"), |b| {
            b.iter(|| bus.read(black_box(last + 4)).unwrap());
        });
    }
    let bus = BenchBus::new(8).unwrap();
    group.bench_function("read, nobody there", |b| b.iter(|| bus.read(black_box(0x80)).unwrap()));
    let board = Board::new(1 << 20, vec![Part::Rng]).unwrap();
    let mut data = [0; 4];
    group.bench_function("read, PCI configuration", |b| {
        b.iter(|| board.read_mmio(black_box(ECAM.start + 0x8000), &mut data).unwrap());
    });
    group.finish();
}

criterion_group!(benches, dispatch);
criterion_main!(benches);
