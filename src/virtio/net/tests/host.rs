#![forbid(unsafe_code)]
//! A card on a real TAP interface of this host's, served by threads of its own.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64};

use super::*;
use crate::net::Tap;
use crate::net::testing::{FAR, Far, NEAR, TAP, kernel_knows_uso, lost, packet, wait, with_a_bridge};

/// Where the rings of the pairs are, and what they send and receive.
const RINGS: u64 = 0x10_0000;
const DATA: u64 = 0x40_0000;
const ROOM: u64 = 0x4_0000;
const COMMAND: u64 = 0x1_0000;
/// VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6 and VIRTIO_NET_F_HOST_USO.
const USO: u64 = 7 << 54;

/// A pair of queues, as its driver has it.
struct Lane {
    rx: Driver,
    tx: Driver,
    /// Room for sixteen frames to send, and in its second half sixteen buffers.
    data: u64,
}

impl Lane {
    fn new(memory: &Memory, index: u64) -> Self {
        let queue = |at| Driver::new(memory, RINGS + at, 16);
        let [rx, tx] = [0x8000 * index, 0x8000 * index + 0x4000].map(queue);
        Self { rx, tx, data: DATA + ROOM * index }
    }

    fn give(&mut self, slot: u16) {
        let at = self.data + ROOM / 2 + 0x800 * u64::from(slot);
        self.rx.descriptor(self.rx.table(), slot, (at, 0x800, WRITE, 0));
        self.rx.offer(slot);
        self.rx.ring_doorbell();
    }

    /// The next frame that has come; its buffer is the device's again.
    fn take(&mut self) -> Option<Vec<u8>> {
        let (slot, length) = self.rx.take_used()?;
        let mut frame = vec![0; length as usize];
        let at = self.data + ROOM / 2 + 0x800 * u64::from(slot);
        self.rx.memory.read_slice(&mut frame, GuestAddress(at)).unwrap();
        assert_eq!(frame[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        self.give(slot);
        Some(frame.split_off(12))
    }

    /// Offers a frame, the `slot`th of those that the device has not taken yet.
    fn offer(&mut self, slot: u16, header: [u8; 12], frame: &[u8]) -> u16 {
        let (at, bytes) = (self.data + 0x1000 * u64::from(slot), [&header[..], frame].concat());
        self.tx.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
        let head = self.tx.send(&[(at, bytes.len() as u32, 0)]);
        self.tx.ring_doorbell();
        head
    }

    /// Sends a frame and waits until the device has it.
    fn send(&mut self, header: [u8; 12], frame: &[u8]) {
        let head = self.offer(0, header, frame);
        assert_eq!(self.tx.wait_used(), (head, 0));
    }
}

/// The card on [`TAP`], whose driver takes what of these features it is offered.
struct Card {
    net: Net,
    lanes: Vec<Lane>,
    control: Driver,
    signals: Signals,
}

impl Card {
    fn new(queues: u16, features: u64) -> Self {
        let memory = Memory::new(16 << 20).unwrap();
        let lanes: Vec<_> = (0..u64::from(queues)).map(|index| Lane::new(&memory, index)).collect();
        let control = Driver::new(&memory, 0x4000, 16);
        let (signals, _) = signals("net0");
        let config = NetConfig { queues, ..NetConfig::attached() };
        let own = super::super::Control::new("net0", MAC, &config, Some(signals.clone()));
        let taps = Tap::open_all("net0", TAP, queues).unwrap();
        let place = || {
            let event_loop = EventLoop::start("test", |f| Ok(std::thread::spawn(f))).unwrap();
            Place::Loop(event_loop, StopLine::new(|cause| panic!("{cause}")))
        };
        let taps = taps.into_iter().map(|tap| (Box::new(tap) as Box<dyn NetBackend>, place()));
        let mut net = Net::new(Arc::new(own), taps.collect());
        let mut queues: Vec<_> = lanes.iter().flat_map(|lane| [&lane.rx, &lane.tx]).collect();
        queues.push(&control);
        net.activate(activation(net.features() & features, &queues, &signals)).unwrap();
        Self { net, lanes, control, signals }
    }

    /// Has the device serve so many pairs.
    fn uses(&mut self, pairs: u16) {
        let [low, high] = pairs.to_le_bytes();
        self.control.memory.write_slice(&[4, 0, low, high, 0xee], GuestAddress(COMMAND)).unwrap();
        let head = self.control.send(&[(COMMAND, 4, 0), (COMMAND + 4, 1, WRITE)]);
        self.control.ring_doorbell();
        assert_eq!((self.control.wait_used(), self.control.bytes(COMMAND + 4)), ((head, 1), [0]));
    }

    fn settle(&mut self, far: &mut Far) {
        let lane = &mut self.lanes[0];
        far.settle(|| lane.send([0; 12], &[&FAR[..], &NEAR, &[0x88, 0xb5], &[0; 46]].concat()));
    }

    /// Every queue comes back.
    fn ends(mut self) {
        assert_eq!(self.net.deactivate().iter().flatten().count(), 2 * self.lanes.len() + 1);
        assert_eq!(self.signals.status() & VIRTIO_CONFIG_S_NEEDS_RESET as u8, 0);
    }
}

#[test]
fn datagrams_that_a_guest_sends_as_one_are_cut_by_the_hosts_kernel() {
    with_a_bridge(false, |mut far| {
        let all = 1 << VIRTIO_NET_F_CTRL_VQ | MRG | header::offered(Offloads::all());
        let (mut card, knows) = (Card::new(1, all), kernel_knows_uso());
        assert_eq!(card.net.features() & USO, if knows { USO } else { 0 });
        card.settle(&mut far);
        for v4 in [true, false] {
            let (frame, header) = packet(true, v4, false, 10_000, 1400);
            let before = card.net.control.statistics();
            card.lanes[0].send(header, &frame);
            let after = card.net.control.statistics();
            let (sent, dropped) = (after.tx_frames - before.tx_frames, after.tx_dropped - before.tx_dropped);
            assert_eq!((sent, dropped), if knows { (1, 0) } else { (0, 1) });
            if knows {
                assert!(far.datagrams(v4, 10_000, 1400) == frame[frame.len() - 10_000..]);
            }
        }
        card.ends();
        // Whose driver has not asked for it, must not.
        let mut card = Card::new(1, all & !USO);
        card.settle(&mut far);
        let (frame, header) = packet(true, true, false, 10_000, 1400);
        card.lanes[0].send(header, &frame);
        assert_eq!(card.net.control.statistics().tx_dropped, 1);
        card.ends();
    });
}

fn numbered(to: [u8; 6], from: [u8; 6], number: u64) -> Vec<u8> {
    [&to[..], &from, &[0x88, 0xb5], &number.to_be_bytes(), &[7; 40]].concat()
}

/// Row 19.
#[test]
fn a_flood_that_a_guest_has_no_buffers_for_is_counted_at_the_interface() {
    with_a_bridge(false, |mut far| {
        let mut card = Card::new(1, 1 << VIRTIO_NET_F_CTRL_VQ | MRG);
        card.settle(&mut far);
        let (before, mut sent) = (lost(), 0);
        wait("the interface to drop frames, visibly", || {
            for _ in 0..50 {
                far.put(&numbered(NEAR, FAR, sent));
                sent += 1;
            }
            (lost() >= before + 100).then_some(())
        });
        let statistics = card.net.control.statistics();
        assert_eq!((statistics.rx_frames, statistics.rx_dropped), (0, 0), "nothing was read");
        (0..16).for_each(|slot| card.lanes[0].give(slot));
        let mut came = BTreeSet::new();
        wait("what was not dropped", || {
            while let Some(frame) = card.lanes[0].take() {
                let number = u64::from_be_bytes(frame[14..22].try_into().unwrap());
                assert!(frame == numbered(NEAR, FAR, number) && came.insert(number));
            }
            (came.len() as u64 + lost() == sent + before).then_some(())
        });
        assert!(came.len() >= 100, "an interface holds some: {}", came.len());
        let after = lost();
        for number in 0..200 {
            far.put(&numbered(NEAR, FAR, number));
            let frame = wait("a frame after the flood", || card.lanes[0].take());
            assert_eq!(frame, numbered(NEAR, FAR, number));
        }
        assert_eq!(lost(), after, "it has recovered");
        card.ends();
    });
}

/// Of each pair's driver.
const EACH: u32 = 2000;
/// As many of these as it likes at once; the others while few are under way, so that none of them is lost.
const FLOOD: u32 = 1500;
const FEW: u64 = 200;
const PAIRS: u16 = 8;

/// What the drivers of all pairs know of each other.
#[derive(Default)]
struct Traffic {
    /// Questions that were asked, answers that came, and questions of which it is known what became.
    asked: AtomicU64,
    came: AtomicU64,
    settled: AtomicU64,
    over: AtomicBool,
}

impl Traffic {
    fn is_light(&self) -> bool {
        self.asked.load(Ordering::SeqCst) < self.settled.load(Ordering::SeqCst) + FEW
    }
}

/// A datagram of one of a pair's thirty-two connections.
fn question(pair: u16, number: u32) -> Vec<u8> {
    let mut frame = packet(true, true, false, 40, 0).0;
    frame[34..36].copy_from_slice(&(1000 + 100 * pair + number as u16 % 32).to_be_bytes());
    // Without a checksum.
    frame[40..42].fill(0);
    let [a, b] = pair.to_be_bytes();
    frame[42..48].copy_from_slice(&[&[a, b], &number.to_be_bytes()[..]].concat());
    frame
}

/// The same back to who asked.
fn answer(question: &[u8]) -> Vec<u8> {
    let mut frame = question.to_vec();
    for (here, there, length) in [(0, 6, 6), (26, 30, 4), (34, 36, 2)] {
        frame[here..here + length].copy_from_slice(&question[there..there + length]);
        frame[there..there + length].copy_from_slice(&question[here..here + length]);
    }
    frame
}

/// Asks, and takes what comes, until it is over; how many answers came, each to a question that was asked.
fn asks(lane: &mut Lane, pair: u16, traffic: &Traffic) -> u64 {
    let (mut asked, mut taken, mut own) = (0, 0, 0);
    (0..16).for_each(|slot| lane.give(slot));
    while !traffic.over.load(Ordering::SeqCst) {
        while asked < EACH && asked - taken < 16 && (asked < FLOOD || traffic.is_light()) {
            lane.offer(asked as u16 % 16, [0; 12], &question(pair, asked));
            asked += 1;
            traffic.asked.fetch_add(1, Ordering::SeqCst);
        }
        while lane.tx.take_used().is_some() {
            taken += 1;
        }
        std::thread::yield_now();
        while let Some(frame) = lane.take() {
            let asker = u16::from_be_bytes(frame[42..44].try_into().unwrap());
            let number = u32::from_be_bytes(frame[44..48].try_into().unwrap());
            assert!(asker < PAIRS && number < EACH && frame == answer(&question(asker, number)));
            own += 1;
            traffic.came.fetch_add(1, Ordering::SeqCst);
        }
    }
    own
}

/// Whatever becomes of the test, the drivers end.
struct Over<'a>(&'a Traffic);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::SeqCst);
    }
}

#[test]
fn eight_queues_on_threads_of_their_own_carry_all_at_once_or_count_it() {
    with_a_bridge(true, |mut far| {
        let mut card = Card::new(PAIRS, FEATURES | 1 << VIRTIO_NET_F_MQ);
        card.uses(PAIRS);
        card.settle(&mut far);
        let (settled, before) = (card.net.control.statistics(), lost());
        let traffic = &Traffic::default();
        let (mut asked, mut answered) = (0, 0);
        let own: Vec<u64> = std::thread::scope(|scope| {
            let ended = Over(traffic);
            let lanes = card.lanes.iter_mut().zip(0..);
            let drivers: Vec<_> =
                lanes.map(|(lane, pair)| scope.spawn(move || asks(lane, pair, traffic))).collect();
            // What is dropped is so on the way there or on the way back.
            wait("every question to be answered, or lost", || {
                while let Some(frame) = far.get() {
                    let frame = answer(frame);
                    far.put(&frame);
                    answered += 1;
                }
                asked = card.net.control.statistics().tx_frames - settled.tx_frames;
                let settled = traffic.came.load(Ordering::SeqCst) + lost() - before;
                traffic.settled.store(settled, Ordering::SeqCst);
                let all = asked == u64::from(EACH) * u64::from(PAIRS);
                (all && settled == asked).then_some(())
            });
            drop(ended);
            drivers.into_iter().map(|driver| driver.join().unwrap()).collect()
        });
        let statistics = card.net.control.statistics();
        assert_eq!((statistics.tx_dropped, statistics.rx_dropped), (0, 0));
        assert_eq!(statistics.rx_frames - settled.rx_frames, own.iter().sum::<u64>());
        assert!(own.iter().all(|own| *own > 0), "every queue had its part: {own:?}");
        assert!(answered >= 500, "an interface holds as many: {answered} of {asked} came to the other side");
        card.ends();
    });
}
