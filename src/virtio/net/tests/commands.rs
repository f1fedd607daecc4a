#![forbid(unsafe_code)]
//! The control queue, several pairs of queues, and another network for a card that is served.

use super::*;

/// A card with a control queue, whose driver has accepted all that can be said there.
struct Commanded {
    bench: Bench,
    control: Driver,
}

const COMMAND: u64 = 0x9_0000;

impl Commanded {
    fn new(pairs: usize) -> Self {
        let mut bench = bench(MRG);
        let memory = bench.rx.memory.clone();
        let control = Driver::new(&memory, 0x1_4000, 16);
        let (backends, mut far): (Vec<_>, Vec<_>) = (0..pairs).map(|_| Pair::new()).unzip();
        let config = NetConfig { queues: pairs as u16, ..NetConfig::attached() };
        let own = Arc::new(super::super::Control::new("net0", MAC, &config, Some(bench.signals.clone())));
        let lanes = backends.into_iter().map(|b| (Box::new(b) as Box<dyn NetBackend>, Place::Caller));
        bench.net = Net::new(own, lanes.collect());
        bench.far = far.swap_remove(0);
        bench.features = FEATURES;
        let mut all = Self { bench, control };
        all.activate();
        all
    }

    fn activate(&mut self) {
        let Bench { rx, tx, signals, net, features, .. } = &mut self.bench;
        rx.reset();
        tx.reset();
        self.control.reset();
        let activation = activation(*features, &[rx, tx, &self.control], signals);
        net.activate(activation).unwrap();
    }

    /// Whether the device does so.
    fn command(&mut self, class: u8, command: u8, data: &[u8]) -> bool {
        let memory = &self.bench.rx.memory;
        memory.write_slice(&[&[class, command], data, &[0xee]].concat(), GuestAddress(COMMAND)).unwrap();
        let length = data.len() as u64;
        // In pieces, as drivers send it.
        let head = self.control.send(&[
            (COMMAND, 2, 0),
            (COMMAND + 2, length as u32, 0),
            (COMMAND + 2 + length, 1, WRITE),
        ]);
        self.bench.net.process_queues();
        assert_eq!(self.control.take_used(), Some((head, 1)));
        match self.control.bytes::<1>(COMMAND + 2 + length) {
            [0] => true,
            [1] => false,
            other => panic!("{other:?}"),
        }
    }

    /// Whether a frame with that address and tag reaches the driver.
    fn hears(&mut self, to: [u8; 6], vlan: Option<u16>) -> bool {
        let before = self.bench.net.control.statistics();
        let tag = vlan.map_or(vec![8, 0], |v| [vec![0x81, 0], v.to_be_bytes().to_vec(), vec![8, 0]].concat());
        let frame = [&to[..], &[2, 0, 0, 0, 0, 9], &tag, &[7; 46]].concat();
        self.bench.far.put(&frame);
        self.bench.give(&[1600]);
        let now = self.bench.net.control.statistics();
        let (heard, filtered) = (now.rx_frames - before.rx_frames, now.rx_filtered - before.rx_filtered);
        assert_eq!((heard + filtered, now.rx_dropped), (1, before.rx_dropped));
        if heard == 1 {
            let (_, length) = self.bench.rx.take_used().unwrap();
            assert_eq!(length as usize, 12 + frame.len());
        }
        heard == 1
    }
}

#[test]
fn the_driver_says_which_frames_it_wants() {
    let (other, group) = ([2, 0, 0, 0, 0, 5], [1, 0, 0x5e, 0, 0, 1]);
    let mut all = Commanded::new(1);
    assert!(all.hears(other, None), "until it says otherwise");
    assert!(all.command(0, 0, &[0]));
    assert_eq!([MAC.0, other, group, [0xff; 6]].map(|to| all.hears(to, None)), [true, false, false, true]);
    assert!(all.command(0, 1, &[1]) && all.hears(group, None));
    assert!(all.command(0, 1, &[0]) && !all.hears(group, None));
    let tables = [&[1, 0, 0, 0][..], &other, &[1, 0, 0, 0], &group].concat();
    assert!(all.command(1, 0, &tables) && all.hears(other, None) && all.hears(group, None));
    let many = [&[0, 0, 0, 0][..], &100u32.to_le_bytes(), &[3; 600]].concat();
    assert!(all.command(1, 0, &many) && !all.hears(other, None) && all.hears(group, None));
    assert!(all.command(0, 5, &[1]) && !all.hears([0xff; 6], None));
    // VLANs: none of them yet, and what has no tag in any case.
    assert!(!all.hears(MAC.0, Some(10)) && all.hears(MAC.0, None));
    assert!(all.command(2, 0, &[10, 0]) && all.hears(MAC.0, Some(10)) && !all.hears(MAC.0, Some(11)));
    assert!(all.command(2, 1, &[10, 0]) && !all.hears(MAC.0, Some(10)));
    // Another address is the card's from now on, also in its configuration.
    assert!(all.command(1, 1, &other) && all.hears(other, None) && !all.hears(MAC.0, None));
    let mac = |all: &Commanded| {
        let mut mac = [0; 6];
        all.bench.net.read_config(0, &mut mac);
        mac
    };
    assert_eq!(mac(&all), other);
    // A pause changes nothing of it, a reset all.
    all.bench.net.deactivate();
    all.activate();
    assert!(all.hears(other, None) && !all.hears(MAC.0, None));
    all.bench.net.deactivate();
    all.bench.net.reset();
    all.activate();
    assert!(all.hears(MAC.0, None) && all.hears(other, None) && mac(&all) == MAC.0);
}

#[test]
fn commands_that_are_none_are_refused() {
    let mut all = Commanded::new(1);
    let bad: [(u8, u8, &[u8]); 12] = [
        (0, 6, &[1]),
        (0, 0, &[2]),
        (0, 0, &[]),
        (1, 0, &[1, 0, 0, 0, 2, 0]),
        (1, 0, &[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]),
        (1, 1, &[1, 0, 0, 0, 0, 0]),
        (1, 1, &[0; 6]),
        (2, 0, &4096u16.to_le_bytes()),
        (2, 2, &[1, 0]),
        (4, 0, &[1, 0]),
        (4, 0, &[0, 0]),
        (9, 9, &[9; 60]),
    ];
    for (class, command, data) in bad {
        assert!(!all.command(class, command, data), "{class} {command} {data:?}");
    }
    // Without room for an answer, or with nothing at all, nothing happens.
    for chain in [&[(COMMAND, 2, 0)][..], &[(COMMAND, 1, WRITE)], &[(COMMAND, 0, 0), (COMMAND, 0, WRITE)]] {
        let head = all.control.send(chain);
        all.bench.net.process_queues();
        assert_eq!(all.control.take_used().map(|u| u.0), Some(head));
    }
    assert!(all.hears([2, 9, 9, 9, 9, 9], None) && !all.bench.broken());
    // What was not agreed on is not done.
    all.bench.net.deactivate();
    all.bench.features = 1 << VIRTIO_NET_F_CTRL_VQ;
    all.activate();
    for (class, command, data) in
        [(0, 0, &[0][..]), (0, 2, &[0]), (1, 0, &[0; 8]), (1, 1, &[2; 6]), (2, 0, &[1, 0]), (3, 0, &[])]
    {
        assert!(!all.command(class, command, data), "{class} {command}");
    }
}

#[test]
fn the_driver_is_asked_to_announce_itself_until_it_has() {
    let mut all = Commanded::new(1);
    let status = |all: &Commanded| {
        let mut status = [0; 2];
        all.bench.net.read_config(6, &mut status);
        status[0]
    };
    let before = all.bench.signals.config_generation();
    all.bench.net.control.announce();
    assert_eq!((status(&all), all.bench.signals.config_generation() != before), (3, true));
    assert!(all.command(3, 0, &[]));
    assert_eq!(status(&all), 1);
}

#[test]
fn of_several_pairs_those_are_served_that_the_driver_uses() {
    let mut all = Commanded::new(3);
    let mut pairs = [0; 2];
    all.bench.net.read_config(8, &mut pairs);
    assert_eq!((pairs, all.bench.net.queue_sizes().len()), ([3, 0], 7));
    assert!(!all.command(4, 0, &[2, 0]), "not agreed on: this control queue is the third");
    all.bench.net.deactivate();
    let memory = all.bench.rx.memory.clone();
    let mut others: Vec<_> = (0..4).map(|i| Driver::new(&memory, 0x3_0000 + 0x4000 * i, 16)).collect();
    all.bench.features = FEATURES | 1 << VIRTIO_NET_F_MQ;
    let Commanded { bench, control } = &mut all;
    bench.rx.reset();
    bench.tx.reset();
    control.reset();
    let queues = [&bench.rx, &bench.tx, &others[0], &others[1], &others[2], &others[3], control];
    let activation = activation(bench.features, &queues, &bench.signals);
    bench.net.activate(activation).unwrap();
    let sends = |all: &mut Commanded, others: &mut [Driver]| {
        let before = all.bench.net.control.statistics();
        all.bench.transmit(&[(FRAME, 72, 0)]);
        for pair in 0..2 {
            others[2 * pair + 1].send(&[(FRAME, 72, 0)]);
            all.bench.net.process_queues();
            assert!(others[2 * pair + 1].take_used().is_some(), "completed in any case");
        }
        let now = all.bench.net.control.statistics();
        (now.tx_frames - before.tx_frames, now.tx_dropped - before.tx_dropped)
    };
    assert_eq!(sends(&mut all, &mut others), (1, 2));
    for (count, wanted) in [(3, (3, 0)), (2, (2, 1)), (1, (1, 2)), (3, (3, 0))] {
        assert!(all.command(4, 0, &[count, 0]));
        assert_eq!(sends(&mut all, &mut others), wanted, "{count}");
    }
    assert!(!all.command(4, 0, &[0, 0]) && !all.command(4, 0, &[4, 0]));
    // Each queue comes back in its place.
    let queues = all.bench.net.deactivate();
    assert_eq!(queues.iter().filter(|q| q.is_some()).count(), 7);
}

#[test]
fn another_network_takes_the_place_of_one_while_the_card_is_served() {
    let mut b = bench(MRG);
    b.give(&[1600]);
    let change = |b: &mut Bench| {
        let (other, far) = Pair::new();
        assert!(b.net.control.put_ready(vec![Box::new(other)]).is_ok());
        // As the transport does it.
        let queues = b.net.deactivate();
        b.net.refit();
        let memory = b.rx.memory.clone();
        b.net.activate(Activation { features: MRG, memory, queues, signals: b.signals.clone() }).unwrap();
        assert_eq!(b.net.control.spare().len(), 1, "the one before is left");
        b.net.control.spare().clear();
        std::mem::replace(&mut b.far, far)
    };
    for _ in 0..3 {
        let before = change(&mut b);
        assert!(before.far.send(&[0; 72]).is_err(), "nobody is there any more");
        b.is_alive();
        b.far.put(&frame(60));
        b.net.process_queues();
        assert_eq!(b.rx.take_used().map(|(_, len)| len), Some(72));
        b.give(&[1600]);
    }
    let two = || -> Vec<Box<dyn NetBackend>> { (0..2).map(|_| Box::new(Pair::new().0) as _).collect() };
    let (error, _) = b.net.control.put_ready(two()).unwrap_err();
    assert!(error.to_string().contains("has 1 pairs of queues, and the network 2"), "{error}");
    b.net.control.offer(Offloads::CSUM);
    // A socket knows none.
    let socket = crate::net::adopt("net0", UnixDatagram::pair().unwrap().0.into(), &Place::Caller).unwrap();
    let (error, _) = b.net.control.put_ready(vec![socket]).unwrap_err();
    assert!(error.to_string().contains("net0: the guest's driver was offered"), "{error}");
    assert!(b.net.control.spare().is_empty());
}

#[test]
fn a_card_begins_with_all_of_its_queues_or_none() {
    let mut all = Commanded::new(2);
    all.bench.net.deactivate();
    all.bench.features = FEATURES | 1 << VIRTIO_NET_F_MQ;
    let memory = all.bench.rx.memory.clone();
    let other = Driver::new(&memory, 0x3_0000, 16);
    let Bench { rx, tx, signals, net, features, .. } = &mut all.bench;
    rx.reset();
    tx.reset();
    // The second pair has no transmit queue.
    let mut half = activation(*features, &[rx, tx, &other], signals);
    half.queues.extend([None, None]);
    assert!(net.activate(half).is_err());
    all.bench.features = FEATURES;
    all.activate();
    all.bench.is_alive();
}

#[test]
fn commands_of_any_bytes_do_no_harm() {
    let mut dice = Dice(77);
    let mut all = Commanded::new(2);
    for round in 0..3000 {
        let length = dice.below(40) as usize;
        let data: Vec<u8> = (0..length).map(|_| dice.below(256) as u8).collect();
        let (class, command) = (dice.below(6) as u8, dice.below(4) as u8);
        let _ = all.command(class, command, &data);
        if round % 100 == 0 {
            all.bench.is_alive();
        }
    }
    for _ in 0..200 {
        bend(&mut all.control, &mut dice);
        all.bench.net.process_queues();
        all.bench.net.deactivate();
        all.bench.signals.set_status(0);
        all.bench.net.reset();
        all.activate();
        assert!(all.command(0, 0, &[1]), "served again");
    }
}
