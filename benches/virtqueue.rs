//! A chain's way through a virtqueue: offered, taken, completed, notified, collected.

use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use vmbed::internals::driver::{Rings, WRITE};
use vmbed::internals::{BenchQueue, Board};

fn chain_of_three(c: &mut Criterion) {
    let board = Board::new(1 << 20, Vec::new()).unwrap();
    let mut rings = Rings::new(&board, 0x8_0000, 256);
    let mut queue = BenchQueue::new(&board, &rings).unwrap();
    let chain = [(0x1000, 16, 0), (0x2000, 4096, WRITE), (0x3000, 1, WRITE)];
    let head = rings.chain(&board, &chain);
    let mut group = c.benchmark_group("virtqueue");
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(1));
    group.bench_function("3 descriptors, offer to interrupt", |b| {
        b.iter(|| {
            rings.offer(&board, head);
            assert!(queue.serve_one(4097).unwrap());
        });
    });
    assert!(queue.raised() > 0);
    group.finish();
}

criterion_group!(benches, chain_of_three);
criterion_main!(benches);
