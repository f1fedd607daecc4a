//! A disk request from the doorbell to the interrupt, on a file in the page cache.

use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use vmbed::internals::driver::{Registers, Rings, VERSION_1, WRITE, bytes};
use vmbed::internals::{Board, Part, memory_file};

fn read_and_write(c: &mut Criterion) {
    let file = memory_file(16 << 20).unwrap();
    let board = Board::new(1 << 20, vec![Part::Disk { file, readonly: false }]).unwrap();
    let regs = Registers::find(&board, 1).unwrap();
    let mut rings = Rings::new(&board, 0x8_0000, 256);
    assert!(regs.start(&board, VERSION_1 | 1 << 9, &[&rings]));
    board.process();
    let mut group = c.benchmark_group("disk_request");
    group.warm_up_time(Duration::from_millis(500)).measurement_time(Duration::from_secs(1));
    for (name, kind, flags) in [("read 4 KiB", 0u8, WRITE), ("write 4 KiB", 1, 0)] {
        let header = [kind, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0];
        board.write_memory(0x1000, &header).unwrap();
        let head = rings.chain(&board, &[(0x1000, 16, 0), (0x2000, 4096, flags), (0x3000, 1, WRITE)]);
        group.bench_function(name, |b| {
            b.iter(|| {
                rings.offer(&board, head);
                regs.ring(&board, 0);
                assert_eq!(board.process(), 1);
                assert!(rings.take_used(&board).is_some());
            });
        });
        assert_eq!(bytes::<1>(&board, 0x3000), [0], "the last one succeeded");
    }
    group.finish();
}

criterion_group!(benches, read_and_write);
criterion_main!(benches);
