#![forbid(unsafe_code)]
//! Frames that were read before there was room for them.

use super::*;

#[test]
fn a_pause_loses_no_frame_and_no_buffer() {
    let mut b = bench(MRG);
    b.give(&[100, 100]);
    b.far.put(&frame(300));
    b.net.process_queues();
    assert_eq!(b.rx.take_used(), None, "read, but too long for what is there");
    let queues = b.net.deactivate();
    b.far.put(&frame(60));
    let positions: Vec<_> = queues.iter().flatten().map(Queue::position).collect();
    assert_eq!(positions, [(0, 0), (0, 0)]);
    b.rx.send(&[(BUFFERS + 0x2000, 1526, WRITE)]);
    b.rx.send(&[(BUFFERS + 0x3000, 1526, WRITE)]);
    let memory = b.rx.memory.clone();
    b.net.activate(Activation { features: MRG, memory, queues, signals: b.signals.clone() }).unwrap();
    b.net.process_queues();
    let used: Vec<_> = std::iter::from_fn(|| b.rx.take_used()).map(|(_, len)| len).collect();
    assert_eq!(used, [100, 100, 112, 72]);
}

#[test]
fn a_frame_kept_for_one_driver_is_not_cut_up_for_the_next() {
    let mut b = bench(MRG);
    b.give(&[100, 100]);
    b.far.put(&frame(300));
    b.net.process_queues();
    assert_eq!(b.rx.take_used(), None, "read, but too long for what is there");
    b.net.deactivate();
    b.signals.set_status(0);
    b.rx.reset();
    b.tx.reset();
    b.net.activate(activation(0, &[&b.rx, &b.tx], &b.signals)).unwrap();
    b.give(&[100, 1526]);
    b.far.put(&frame(60));
    b.net.process_queues();
    assert_eq!(b.rx.take_used().map(|(_, len)| len), Some(72), "the new driver's first frame is whole");
    assert_eq!(b.rx.take_used(), None);
}

/// One comes after many short ones, for which only one buffer was offered.
#[test]
fn a_long_frame_that_was_not_expected_is_whole() {
    let mut b = bench(MRG | 1 << 1 | 1 << 7);
    for round in 0..2 {
        for number in 0..100 {
            b.rx.send(&[(BUFFERS + 0x1000 * (number % 8), 1526, WRITE)]);
            b.far.put(&frame(60));
            b.net.process_queues();
            assert_eq!(b.rx.take_used().map(|(_, len)| len), Some(72), "{round}: {number}");
        }
        for at in 0..4 {
            b.rx.send(&[(BUFFERS + 0x1000 * at, 1526, WRITE)]);
        }
        b.far.put(&frame(4000));
        b.net.process_queues();
        let used: Vec<_> = std::iter::from_fn(|| b.rx.take_used()).map(|(_, len)| len).collect();
        assert_eq!(used, [1526, 1526, 4012 - 2 * 1526]);
        let mut got = b.rx.bytes::<1514>(BUFFERS + 12).to_vec();
        got.extend(b.rx.bytes::<1526>(BUFFERS + 0x1000));
        got.extend(b.rx.bytes::<960>(BUFFERS + 0x2000));
        assert_eq!(got, frame(4000));
        // The fourth is left, and goes to the next.
        b.far.put(&frame(60));
        b.net.process_queues();
        assert_eq!(b.rx.take_used().map(|(_, len)| len), Some(72));
    }
}
