#![forbid(unsafe_code)]

use std::os::unix::net::UnixDatagram;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use virtio_bindings::bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::config::{MacAddress, NetConfig, RateLimit};
use crate::events::{EventKind, EventStream, StopLine};
use crate::memory::Memory;
use crate::net::Offloads;
use crate::net::pair::{Control, Pair};
use crate::reactor::EventLoop;
use crate::sys::lock;
use crate::virtio::Signals;
use crate::virtio::queue_driver::{Dice, Driver, WRITE, activation, bend, signals};

mod commands;
mod host;
mod kept;
mod landed;

const BUFFERS: u64 = 0x2_0000;
const FRAME: u64 = 0x8_0000;
const MRG: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);

struct Bench {
    rx: Driver,
    tx: Driver,
    net: Net,
    far: Control,
    signals: Signals,
    events: EventStream,
    features: u64,
}

fn bench_on(place: Place, features: u64) -> Bench {
    let memory = Memory::new(1 << 20).unwrap();
    let (rx, tx) = (Driver::new(&memory, 0x4000, 16), Driver::new(&memory, 0xc000, 16));
    let (backend, far) = Pair::new();
    let (signals, events) = signals("net0");
    let net = Net::simple("net0", MAC, Box::new(backend), place);
    let mut bench = Bench { rx, tx, net, far, signals, events, features };
    bench.activate();
    bench
}

fn bench(features: u64) -> Bench {
    bench_on(Place::Caller, features)
}

impl Bench {
    fn activate(&mut self) {
        let activation = activation(self.features, &[&self.rx, &self.tx], &self.signals);
        self.net.activate(activation).unwrap();
    }

    fn reset(&mut self) {
        self.net.deactivate();
        self.signals.set_status(0);
        self.rx.reset();
        self.tx.reset();
        self.activate();
    }

    /// Gives the device receive buffers of these sizes, at `BUFFERS`, 0x1000 apart.
    fn give(&mut self, sizes: &[u32]) {
        for (i, &size) in sizes.iter().enumerate() {
            self.rx.send(&[(BUFFERS + 0x1000 * i as u64, size, WRITE)]);
        }
        self.net.process_queues();
    }

    /// Sends a frame behind a header of zeroes.
    fn transmit(&mut self, chain: &[(u64, u32, u16)]) {
        let head = self.tx.send(chain);
        self.net.process_queues();
        assert_eq!(self.tx.take_used(), Some((head, 0)), "every frame is completed");
    }

    fn broken(&self) -> bool {
        self.signals.status() & VIRTIO_CONFIG_S_NEEDS_RESET as u8 != 0
    }

    fn is_alive(&mut self) {
        self.transmit(&[(FRAME, 12 + 60, 0)]);
        assert_eq!(self.far.get().map(|f| f.len()), Some(72));
        assert!(!self.broken());
    }
}

fn frame(len: usize) -> Vec<u8> {
    (0..len).map(|i| i as u8 ^ 0x5a).collect()
}

#[test]
fn a_frame_goes_out_as_it_lies_in_memory_however_it_is_split() {
    let mut b = bench(0);
    b.rx.memory.write_slice(&frame(1514), GuestAddress(FRAME + 12)).unwrap();
    b.transmit(&[(FRAME, 12 + 1514, 0)]);
    assert_eq!(b.far.get().unwrap()[12..], frame(1514));
    let mut split: Vec<_> = (0..13).map(|i| (FRAME + i, 1, 0)).collect();
    split.push((FRAME + 13, 100, 0));
    b.transmit(&split);
    assert_eq!(b.far.get().unwrap(), [vec![0; 12], frame(101)].concat());
    assert!(b.tx.interrupt.take_raised() > 0);
}

/// Row 20.
#[test]
fn frames_of_wrong_lengths_and_headers_are_completed_and_dropped() {
    let mut b = bench(0);
    for len in 0..12 + 14 {
        b.transmit(&[(FRAME, len, 0)]);
    }
    b.transmit(&[(FRAME, 12 + 66_000, 0)]);
    b.transmit(&[(FRAME, u32::MAX, 0), (FRAME, u32::MAX, 0)]);
    b.transmit(&[(FRAME, 60, WRITE)]);
    b.transmit(&[(FRAME, 72, 0), (FRAME, 60, WRITE)]);
    b.transmit(&[(FRAME, 60, WRITE), (FRAME, 72, 0)]);
    b.transmit(&[(FRAME, 12, 0), (0xc000_0000, 60, 0)]);
    b.transmit(&[(0xc000_0000, 72, 0)]);
    b.transmit(&[((1 << 20) - 40, 72, 0)]);
    for bad in [[1u8, 0], [0, 1], [0, 3], [0xff, 0xff]] {
        b.rx.memory.write_slice(&bad, GuestAddress(FRAME)).unwrap();
        b.transmit(&[(FRAME, 12 + 60, 0)]);
    }
    assert_eq!(b.far.get(), None, "not one of them went out");
    b.rx.memory.write_slice(&[0; 12], GuestAddress(FRAME)).unwrap();
    b.is_alive();
    assert_eq!(b.events.next_event(), None);
}

#[test]
fn a_frame_comes_in_with_a_header_that_promises_nothing() {
    for features in [0, MRG] {
        let mut b = bench(features);
        b.rx.memory.write_slice(&[0xff; 0x1000], GuestAddress(BUFFERS)).unwrap();
        b.give(&[1526]);
        let nonsense = [[0xee; 12].as_slice(), &frame(1514)].concat();
        b.far.far.send(&nonsense).unwrap();
        b.net.process_queues();
        assert_eq!(b.rx.take_used(), None, "dropped: who knows what it says");
        b.far.known.store(0, Ordering::SeqCst);
        b.far.far.send(&nonsense).unwrap();
        b.net.process_queues();
        assert_eq!(b.rx.take_used(), Some((0, 1526)));
        assert_eq!(b.rx.bytes::<12>(BUFFERS), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!(b.rx.bytes::<1514>(BUFFERS + 12)[..], frame(1514));
        assert_eq!(b.rx.interrupt.take_raised(), 1);
    }
}

/// Row 17: each byte of the header in a buffer of its own.
#[test]
fn a_receive_buffer_may_be_split_anywhere() {
    let mut b = bench(MRG);
    let mut chain: Vec<_> = (0..13).map(|i| (BUFFERS + 0x100 * i, 1, WRITE)).collect();
    chain.push((BUFFERS + 0x2000, 200, WRITE));
    b.rx.send(&chain);
    b.far.put(&frame(64));
    b.net.process_queues();
    assert_eq!(b.rx.take_used(), Some((0, 76)));
    assert_eq!(b.rx.bytes::<1>(BUFFERS + 0xa00), [1]);
    assert_eq!(b.rx.bytes::<1>(BUFFERS + 0xc00)[0], frame(64)[0]);
    assert_eq!(b.rx.bytes::<63>(BUFFERS + 0x2000)[..], frame(64)[1..]);
}

#[test]
fn a_long_frame_fills_several_buffers_at_once_where_the_driver_can_take_it() {
    let mut b = bench(MRG);
    b.give(&[1024, 1024]);
    b.far.put(&frame(4000));
    b.net.process_queues();
    assert_eq!(b.rx.take_used(), None, "two buffers are too few: it is kept");
    b.rx.send(&[(BUFFERS + 0x2000, 1024, WRITE)]);
    b.rx.send(&[(BUFFERS + 0x3000, 2048, WRITE)]);
    b.net.process_queues();
    let used: Vec<_> = std::iter::from_fn(|| b.rx.take_used()).collect();
    assert_eq!(used, [(0, 1024), (1, 1024), (2, 1024), (3, 12 + 4000 - 3 * 1024)]);
    assert_eq!(b.rx.bytes::<12>(BUFFERS)[10..], [4, 0]);
    let mut got = b.rx.bytes::<1012>(BUFFERS + 12).to_vec();
    for (i, (_, len)) in used.iter().enumerate().skip(1) {
        let mut part = vec![0; *len as usize];
        b.rx.memory.read_slice(&mut part, GuestAddress(BUFFERS + 0x1000 * i as u64)).unwrap();
        got.extend(part);
    }
    assert_eq!(got, frame(4000));

    let mut b = bench(0);
    b.give(&[1024]);
    b.far.put(&frame(4000));
    b.far.put(&frame(60));
    b.net.process_queues();
    assert_eq!(b.rx.take_used(), Some((0, 72)), "the long one is dropped, the buffer is not lost");
}

#[test]
fn a_frame_that_no_number_of_buffers_can_hold_is_dropped() {
    let mut b = bench(MRG);
    b.far.put(&frame(1514));
    b.give(&[13; 16]);
    let used: Vec<_> = std::iter::from_fn(|| b.rx.take_used()).collect();
    assert_eq!(used, (0..16).map(|head| (head, 0)).collect::<Vec<_>>());
    b.far.put(&frame(60));
    b.give(&[100]);
    assert_eq!(b.rx.take_used(), Some((0, 72)));
}

/// Row 18, and rows 13 and 15 for receive buffers.
#[test]
fn a_receive_buffer_that_is_none_goes_back_empty_and_the_frame_into_the_next() {
    let mut b = bench(MRG);
    let bad: [&[(u64, u32, u16)]; 7] = [
        &[(0xc000_0000, 1526, WRITE)],
        &[((1 << 20) - 100, 1526, WRITE)],
        &[(BUFFERS, 1526, 0)],
        &[(BUFFERS, 0, WRITE)],
        &[(BUFFERS, 11, WRITE)],
        &[(BUFFERS, 100, 0), (BUFFERS, 1526, WRITE)],
        &[(BUFFERS, 1526, WRITE), (BUFFERS, 100, 0)],
    ];
    let heads: Vec<_> = bad.iter().map(|chain| b.rx.send(chain)).collect();
    let good = b.rx.send(&[(BUFFERS, 1526, WRITE)]);
    b.far.put(&frame(60));
    b.net.process_queues();
    for head in heads {
        assert_eq!(b.rx.take_used(), Some((head, 0)));
    }
    assert_eq!(b.rx.take_used(), Some((good, 72)));
    // A header outside memory in front of a body inside: the frame is lost, nothing else.
    let head = b.rx.send(&[(0xc000_0000, 12, WRITE), (BUFFERS, 1526, WRITE)]);
    b.far.put(&frame(60));
    b.net.process_queues();
    assert_eq!(b.rx.take_used(), Some((head, 0)));
    // The further buffer of a long frame.
    b.rx.send(&[(BUFFERS, 100, WRITE)]);
    b.rx.send(&[(0xc000_0000, 1526, WRITE)]);
    b.far.put(&frame(500));
    b.net.process_queues();
    assert_eq!([b.rx.take_used().unwrap().1, b.rx.take_used().unwrap().1], [0, 0]);
    b.is_alive();
}

/// Row 19: without buffers nothing is read, and nothing that was read is lost.
#[test]
fn a_flood_without_buffers_waits_and_is_delivered_when_they_come() {
    let mut b = bench(MRG);
    b.net.process_queues();
    let mut sent = 0u32;
    while b.far.far.send(&[vec![0; 12], sent.to_le_bytes().repeat(20)].concat()).is_ok() {
        sent += 1;
        b.net.process_queues();
    }
    assert!(sent > 1);
    for i in 0..sent {
        b.rx.send(&[(BUFFERS, 1526, WRITE)]);
        b.net.process_queues();
        assert_eq!(b.rx.take_used().map(|(_, len)| len), Some(92));
        assert_eq!(b.rx.bytes::<4>(BUFFERS + 12), i.to_le_bytes());
    }
    b.far.put(&frame(60));
    b.give(&[1526]);
    assert_eq!(b.rx.take_used().map(|(_, len)| len), Some(72), "it recovers");
}

#[test]
fn a_frame_that_the_backend_cannot_take_now_is_sent_later() {
    let mut b = bench(0);
    let mut heads = Vec::new();
    for i in 0..16u8 {
        b.rx.memory.write_obj(i, GuestAddress(FRAME + 0x1000 + 12)).unwrap();
        b.far.errno.store(if i < 8 { 0 } else { libc::EAGAIN }, Ordering::SeqCst);
        heads.push(b.tx.send(&[(FRAME + 0x1000, 72, 0)]));
        b.net.process_queues();
    }
    let done = std::iter::from_fn(|| b.tx.take_used()).count();
    assert_eq!(done, 8);
    b.far.errno.store(0, Ordering::SeqCst);
    b.net.process_queues();
    let rest: Vec<_> = std::iter::from_fn(|| b.tx.take_used()).map(|(head, _)| head).collect();
    assert_eq!(rest, heads[8..]);
    assert_eq!(std::iter::from_fn(|| b.far.get()).count(), 16);
}

/// Row 29.
#[test]
fn a_backend_that_goes_away_is_reported_once_and_found_again() {
    let event_loop = EventLoop::start("test", |f| Ok(std::thread::spawn(f))).unwrap();
    let place = Place::Loop(event_loop, StopLine::new(|cause| panic!("{cause}")));
    let mut b = bench_on(place, MRG);
    b.rx.send(&[(BUFFERS, 1526, WRITE)]);
    b.rx.ring_doorbell();
    b.far.put(&frame(60));
    assert_eq!(b.rx.wait_used().1, 72);

    b.far.errno.store(libc::EBADFD, Ordering::SeqCst);
    b.rx.send(&[(BUFFERS, 1526, WRITE)]);
    b.rx.ring_doorbell();
    // The fd stays readable: a loop that went on polling it would spin.
    b.far.put(&frame(61));
    let event = b.events.wait_event(Duration::from_secs(10)).unwrap().kind;
    assert_eq!(event, EventKind::BackendError { device: "net0".into(), errno: libc::EBADFD, offset: 0 });
    for _ in 0..20 {
        b.tx.send(&[(FRAME, 72, 0)]);
        b.tx.ring_doorbell();
        b.tx.wait_used();
    }
    let (near, far) = UnixDatagram::pair().unwrap();
    *lock(&b.far.next) = Some(near);
    far.send(&[vec![0; 12], frame(62)].concat()).unwrap();
    assert_eq!(b.rx.wait_used().1, 74);
    b.tx.send(&[(FRAME, 72, 0)]);
    b.tx.ring_doorbell();
    b.tx.wait_used();
    assert_eq!(far.recv(&mut [0; 100]).unwrap(), 72);
    assert_eq!(b.net.deactivate().iter().flatten().count(), 2);
}

#[test]
fn a_lost_frame_is_an_event_and_the_next_one_passes() {
    let mut b = bench(0);
    b.far.errno.store(libc::EIO, Ordering::SeqCst);
    b.transmit(&[(FRAME, 72, 0)]);
    assert!(matches!(b.events.next_event().unwrap().kind, EventKind::BackendError { errno: libc::EIO, .. }));
    b.far.errno.store(0, Ordering::SeqCst);
    b.is_alive();
}

/// A bench whose card is `config`'s.
fn configured(config: &NetConfig, place: Place) -> Bench {
    let mut b = bench(MRG);
    let control = Arc::new(super::Control::new("net0", MAC, config, Some(b.signals.clone())));
    b.net.deactivate();
    let (backend, far) = Pair::new();
    (b.net, b.far) = (Net::new(control, vec![(Box::new(backend), place)]), far);
    b.rx.reset();
    b.tx.reset();
    b.activate();
    b
}

#[test]
fn the_cable_and_what_is_known_of_it() {
    let mut config = NetConfig::attached();
    (config.mtu, config.speed, config.link) = (Some(9000), Some(10_000), false);
    let mut b = configured(&config, Place::Caller);
    assert_eq!(b.net.features() & (1 << 3 | 1 << 63), 1 << 3 | 1 << 63);
    let seen = |b: &Bench| {
        let mut bytes = [0; 20];
        b.net.read_config(6, &mut bytes);
        bytes
    };
    let mut expected = [0; 20];
    expected[4..11].copy_from_slice(&[0x28, 0x23, 0x10, 0x27, 0, 0, 1]);
    assert_eq!(seen(&b), expected);
    b.give(&[1526]);
    b.far.put(&frame(60));
    b.transmit(&[(FRAME, 72, 0)]);
    assert_eq!((b.far.get(), b.rx.take_used()), (None, None), "nothing passes");
    let counted = b.net.control.statistics();
    assert_eq!((counted.rx_dropped, counted.tx_dropped, counted.rx_frames), (1, 1, 0));
    b.net.control.set_link(true);
    expected[0] = 1;
    assert_eq!((seen(&b), b.signals.take_isr()), (expected, 2));
    b.net.control.set_link(true);
    assert_eq!(b.signals.take_isr(), 0, "no news");
    b.far.put(&frame(61));
    b.is_alive();
    assert_eq!(b.rx.take_used().map(|(_, len)| len), Some(73), "not what came before");
}

/// Within 3 % over four seconds, each way by itself.
#[test]
fn a_limit_holds_frames_back_each_way() {
    let event_loop = EventLoop::start("test", |f| Ok(std::thread::spawn(f))).unwrap();
    let place = Place::Loop(event_loop, StopLine::new(|cause| panic!("{cause}")));
    let mut config = NetConfig::attached();
    // What a busy machine misses is made up for.
    config.receive_rate = RateLimit::NONE.ops(2000, 1000);
    config.send_rate = RateLimit::NONE.bytes(300_000, 150_000);
    let mut b = configured(&config, place);
    let (mut counts, mut begun) = ([0u32; 2], Instant::now());
    let mut warm = false;
    for slot in 0..8 {
        b.rx.send(&[(BUFFERS + 0x1000 * slot, 1526, WRITE)]);
        b.tx.send(&[(FRAME, 12 + 100, 0)]);
    }
    b.rx.ring_doorbell();
    b.tx.ring_doorbell();
    let mut windows = 0;
    // On a busy machine there are seconds in which the driver was late.
    while windows < 10 {
        while b.far.far.send(&[0; 72]).is_ok() {}
        while let Some((head, len)) = b.rx.take_used() {
            assert_eq!(len, 72);
            counts[0] += 1;
            b.rx.send(&[(BUFFERS + 0x1000 * u64::from(head % 8), 1526, WRITE)]);
            b.rx.ring_doorbell();
        }
        while b.tx.take_used().is_some() {
            counts[1] += 1;
            b.tx.send(&[(FRAME, 12 + 100, 0)]);
            b.tx.ring_doorbell();
        }
        while b.far.get().is_some() {}
        std::thread::sleep(Duration::from_micros(300));
        let time = begun.elapsed();
        if time < Duration::from_secs(if warm { 4 } else { 1 }) {
            continue;
        }
        let [received, sent] = counts.map(|count| f64::from(count) / time.as_secs_f64());
        if warm {
            assert!(received < 2060.0, "{received} frames a second");
            assert!(sent < 3090.0, "{sent} frames of 100 bytes a second");
            windows += 1;
        }
        if warm && received >= 1940.0 && sent >= 2910.0 {
            break;
        }
        assert!(windows < 10, "{received} and {sent} frames a second, ten times");
        // The bursts are over, or begin again.
        (warm, counts, begun) = (!warm, [0; 2], Instant::now());
    }
    b.net.control.set_rates(RateLimit::NONE, RateLimit::NONE.ops(1, 1));
    let before = b.net.control.statistics();
    std::thread::sleep(Duration::from_millis(500));
    let after = b.net.control.statistics();
    assert!(after.tx_frames - before.tx_frames <= 10, "{before:?} {after:?}");
    b.net.deactivate();
}

/// The header of a frame of TCP segments.
const SEGMENTS: [u8; 12] = [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0];

#[test]
fn what_both_sides_know_is_left_to_do_both_ways() {
    let all = header::offered(Offloads::all());
    for (features, passes) in [(all | MRG, true), (all & !(1 << 11 | 1 << 7) | MRG, false)] {
        let mut b = bench(features);
        assert_eq!(b.net.features() & all, all);
        let taken = Offloads::from_bits_truncate(b.far.taken.load(Ordering::SeqCst));
        assert_eq!((taken.contains(Offloads::CSUM), taken.contains(Offloads::TSO4)), (true, passes));
        b.rx.memory.write_slice(&SEGMENTS, GuestAddress(FRAME)).unwrap();
        b.rx.memory.write_slice(&frame(60_000), GuestAddress(FRAME + 12)).unwrap();
        b.transmit(&[(FRAME, 12 + 60_000, 0)]);
        assert_eq!(b.far.get(), passes.then(|| [SEGMENTS.as_slice(), &frame(60_000)].concat()));

        b.give(&[0x1000; 16]);
        b.far.far.send(&[SEGMENTS.as_slice(), &frame(60_000)].concat()).unwrap();
        b.far.far.send(&[[0; 12].as_slice(), &frame(100)].concat()).unwrap();
        b.net.process_queues();
        let used: Vec<_> = std::iter::from_fn(|| b.rx.take_used()).collect();
        if passes {
            let mut expected: Vec<_> = (0..14).map(|head| (head, 0x1000)).collect();
            expected.extend([(14, 60_012 - 14 * 0x1000), (15, 112)]);
            assert_eq!(used, expected, "straight into its buffers, and the next into the next");
            let header = b.rx.bytes::<12>(BUFFERS);
            assert_eq!((&header[..10], header[10]), (&SEGMENTS[..10], 15));
            let mut got = Vec::new();
            for (i, &(_, len)) in used[..15].iter().enumerate() {
                let mut part = vec![0; len as usize];
                b.rx.memory.read_slice(&mut part, GuestAddress(BUFFERS + 0x1000 * i as u64)).unwrap();
                got.extend(part);
            }
            assert!(got[12..] == frame(60_000));
        } else {
            assert_eq!(used, [(0, 112)], "what it does not take is dropped");
            assert_eq!(b.net.control.statistics().rx_dropped, 1);
        }
    }
}

/// Buffers of every shape, frames of every length: each arrives whole, or is counted as dropped.
#[test]
fn every_frame_finds_its_way_into_whatever_buffers_there_are() {
    for features in [MRG, MRG | header::offered(Offloads::all())] {
        let mut b = bench(features);
        let mut dice = Dice(77);
        let (mut sent, mut arrived, mut dropped) = (Vec::new(), 0, 0);
        let mut buffers = vec![(0u64, 0u32); 16];
        let (mut free, mut pieces): (Vec<u16>, Vec<(u16, u32)>) = ((0..16).collect(), Vec::new());
        for round in 0..4000u32 {
            if dice.below(3) > 0 && sent.len() < 8 {
                let len = [14, 60, 1514, 3000, 9014][dice.below(5) as usize] + dice.below(200) as usize;
                let frame: Vec<u8> = (0..len).map(|i| (i as u32 * 7 + round) as u8).collect();
                b.far.put(&frame);
                sent.push(frame);
            }
            while dice.below(4) > 0
                && let Some(slot) = free.pop()
            {
                let size = [12, 60, 1526, 4096][dice.below(4) as usize] + dice.below(9) as u32;
                let at = BUFFERS + 0x2000 * u64::from(slot);
                b.rx.descriptor(b.rx.table(), slot, (at, size, WRITE, 0));
                b.rx.offer(slot);
                buffers[usize::from(slot)] = (at, size);
            }
            b.net.process_queues();
            while let Some(used) = b.rx.take_used() {
                pieces.push(used);
                free.push(used.0);
            }
            if dice.below(50) == 0 {
                let queues = b.net.deactivate();
                let memory = b.rx.memory.clone();
                b.net.activate(Activation { features, memory, queues, signals: b.signals.clone() }).unwrap();
            }
            // What has come is looked at before its buffers are used again.
            while let Some(&(first, len)) = pieces.first() {
                if len == 0 {
                    // It was too long for all of them together.
                    assert!(pieces.drain(..16).all(|(_, len)| len == 0));
                    sent.remove(0);
                    dropped += 1;
                    continue;
                }
                let count = b.rx.bytes::<12>(buffers[usize::from(first)].0)[10];
                let mut got = Vec::new();
                for (slot, len) in pieces.drain(..usize::from(count)) {
                    let mut part = vec![0; len as usize];
                    b.rx.memory.read_slice(&mut part, GuestAddress(buffers[usize::from(slot)].0)).unwrap();
                    got.extend(part);
                }
                assert!(got[12..] == sent.remove(0), "round {round}");
                arrived += 1;
            }
        }
        assert_eq!(b.net.control.statistics().rx_dropped, dropped);
        assert!(arrived > 1000 && dropped < arrived / 10, "{arrived} {dropped}");
        assert!(!b.broken());
    }
}

#[test]
fn the_configuration_has_the_address_and_the_link() {
    let b = bench(0);
    let mut config = [0; 12];
    b.net.read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0]);
}

#[test]
fn bent_rings_never_stop_the_process_and_a_reset_always_helps() {
    let mut b = bench(MRG);
    let mut dice = Dice(11);
    let (mut resets, mut received) = (0, 0);
    for round in 0..3000 {
        let flags = [(dice.below(20) == 0) as u8, (dice.below(20) == 0) as u8];
        b.rx.memory.write_slice(&flags, GuestAddress(0x8000)).unwrap();
        bend(&mut b.rx, &mut dice);
        bend(&mut b.tx, &mut dice);
        let _ = b.far.far.send(&vec![0; dice.below(9000) as usize]);
        b.net.process_queues();
        while b.far.get().is_some() {}
        while b.rx.take_used().is_some() {
            received += 1;
        }
        if b.broken() || round % 100 == 0 {
            resets += 1;
            b.reset();
            b.rx.memory.write_slice(&[0; 12], GuestAddress(FRAME)).unwrap();
            b.is_alive();
        }
    }
    assert!(resets > 100 && received > 100, "{resets} {received}");
}
