#![forbid(unsafe_code)]
//! A card on a port of the switch: frames that land in its buffers, and those that do not.

use super::*;
use crate::net::switch::{Plug, PortOptions, Switch, SwitchOptions, SwitchPort};
use crate::sys::io::Pieces;

const TSO: u64 = MRG | 1 | 1 << 1 | 1 << 7 | 1 << 11;
const ROOM: u32 = 0x800;
const SIZE: u16 = 64;

/// A card with a driver on one port, and the end of another port.
struct Cable {
    card: Bench,
    plug: Plug,
    port: SwitchPort,
    /// Buffers that the driver can give: their places.
    idle: Vec<u64>,
    given: std::collections::HashMap<u16, (u64, u32)>,
}

impl Cable {
    fn new(features: u64) -> Self {
        let switch = Switch::new(&SwitchOptions::default()).unwrap();
        let [one, port] = ["one", "card"].map(|n| switch.add_port(n, &PortOptions::access(1)).unwrap());
        let plug = one.plug().unwrap();
        plug.set_takes(Offloads::all());
        let card = Self::card(&port, features);
        let mut cable = Self { card, plug, port, idle: Vec::new(), given: Default::default() };
        cable.begin();
        cable
    }

    /// A card on the port, of a guest with memory of its own.
    fn card(port: &SwitchPort, features: u64) -> Bench {
        let memory = Memory::new(1 << 20).unwrap();
        let (rx, tx) = (Driver::new(&memory, 0x4000, SIZE), Driver::new(&memory, 0xc000, 16));
        let (signals, events) = signals("net0");
        let net = Net::simple("net0", MAC, Box::new(port.plug().unwrap()), Place::Caller);
        let mut card = Bench { rx, tx, net, far: Pair::new().1, signals, events, features };
        card.activate();
        card
    }

    /// A driver begins, which has given no buffers yet; it is known where the card is.
    fn begin(&mut self) {
        self.idle = (0..u64::from(SIZE)).map(|i| BUFFERS + u64::from(ROOM) * i).collect();
        self.given.clear();
        let hello = self.frame(60, 0, [2, 0, 0, 0, 0, 9]);
        let memory = &self.card.rx.memory;
        memory.write_slice(&hello, GuestAddress(FRAME + 12)).unwrap();
        memory.write_slice(&MAC.0, GuestAddress(FRAME + 12 + 6)).unwrap();
        self.card.transmit(&[(FRAME, 72, 0)]);
    }

    /// The first bytes of the frame in the buffer that was given as `head`.
    fn peek(&self, head: u16) -> [u8; 32] {
        self.card.rx.memory.read_obj(GuestAddress(self.given[&head].0 + 12)).unwrap()
    }

    /// A frame whose bytes are told by its number, to that address.
    fn frame(&self, len: usize, number: u32, to: [u8; 6]) -> Vec<u8> {
        let mut frame: Vec<_> = (0..len as u32).map(|i| (i + i / 251 + number) as u8).collect();
        frame[..6].copy_from_slice(&to);
        frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
        frame[12..14].copy_from_slice(&[0x88, 0xb5]);
        frame
    }

    fn send(&mut self, frame: &[u8]) {
        let mut pieces = Pieces::default();
        let mut list = pieces.list();
        list.push_bytes(&[0; 12]);
        // In odd pieces, as a guest may have it.
        frame.chunks(1021).for_each(|piece| list.push_bytes(piece));
        self.plug.send(&list).unwrap();
    }

    fn give(&mut self, len: u32) {
        let Some(at) = self.idle.pop() else { return };
        let head = self.card.rx.send(&[(at, len, WRITE)]);
        assert_eq!(self.given.insert(head, (at, len)), None, "it was not given twice");
    }

    /// What the driver has got since: whole frames, without their headers.
    fn taken(&mut self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        while let Some((head, len)) = self.card.rx.take_used() {
            let (mut bytes, count) = self.buffer(head, len);
            for _ in 1..count {
                let (head, len) = self.card.rx.take_used().expect("all of a frame's buffers at once");
                bytes.extend(self.buffer(head, len).0);
            }
            if !bytes.is_empty() {
                frames.push(bytes.split_off(12));
            }
        }
        frames
    }

    /// What was put into a buffer, and what it says in the place where a header has the number of buffers.
    fn buffer(&mut self, head: u16, len: u32) -> (Vec<u8>, u16) {
        let (at, room) = self.given.remove(&head).expect("it was given");
        assert!(len <= room);
        let mut bytes = vec![0; len as usize];
        self.card.rx.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        self.idle.push(at);
        let count = bytes.get(10..12).map_or(1, |n| u16::from_le_bytes([n[0], n[1]]));
        (bytes, count)
    }

    fn pause(&mut self) {
        self.pause_with(|_| ());
    }

    /// Takes the queues and gives them back where they were, with something in between.
    fn pause_with(&mut self, f: impl FnOnce(&mut Self)) {
        let queues = self.card.net.deactivate();
        f(self);
        let again = |queue: Queue| Queue::new(queue.into_setup(), &self.card.rx.memory).unwrap();
        let queues = queues.into_iter().map(|queue| queue.map(again)).collect();
        let (memory, signals) = (self.card.rx.memory.clone(), self.card.signals.clone());
        let features = self.card.features;
        self.card.net.activate(Activation { features, memory, queues, signals }).unwrap();
        self.card.net.process_queues();
    }

    fn dropped(&self) -> u64 {
        let port: u64 = self.port.statistics().drops().map(|(_, count)| count).sum();
        self.card.net.control.statistics().rx_dropped + port
    }
}

#[test]
fn a_frame_lands_in_buffers_that_were_posted_and_is_not_copied_again() {
    let mut cable = Cable::new(TSO);
    (0..4).for_each(|_| cable.give(ROOM));
    cable.card.net.process_queues();
    let (first, second) = (cable.frame(5000, 1, MAC.0), cable.frame(60, 2, MAC.0));
    cable.send(&first);
    // It is there before the card does anything.
    let mut bytes = vec![0; 1000];
    cable.card.rx.memory.read_slice(&mut bytes, GuestAddress(cable.given[&0].0 + 12)).unwrap();
    assert_eq!(bytes, first[..1000]);
    assert!(cable.taken().is_empty(), "the driver has not been told");
    cable.send(&second);
    cable.card.net.process_queues();
    assert_eq!(cable.taken(), [first.clone(), second]);
    // Nothing is posted but one buffer had remained, which is too small: it waits in one of the switch's.
    cable.send(&first);
    cable.card.net.process_queues();
    assert!(cable.taken().is_empty());
    (0..3).for_each(|_| cable.give(ROOM));
    cable.card.net.process_queues();
    assert_eq!((cable.taken(), cable.dropped()), (vec![first], 0));
}

#[test]
fn what_the_driver_does_not_want_leaves_its_buffers_to_the_next() {
    let mut cable = Cable::new(TSO);
    (0..6).for_each(|_| cable.give(ROOM));
    cable.card.net.control.set_link(true);
    cable.card.net.process_queues();
    let frame = cable.frame(3000, 1, MAC.0);
    cable.send(&frame);
    cable.card.net.control.set_link(false);
    cable.card.net.process_queues();
    assert_eq!((cable.taken().len(), cable.dropped()), (0, 1));
    cable.card.net.control.set_link(true);
    cable.send(&frame);
    cable.send(&frame);
    cable.card.net.process_queues();
    assert_eq!(cable.taken(), [frame.clone(), frame.clone()]);
    // Two of the six were passed over, and go on.
    cable.send(&frame);
    cable.pause();
    assert_eq!(cable.taken(), [frame]);
    assert_eq!(cable.idle.len(), usize::from(SIZE), "all have come back");
}

#[test]
fn buffers_outside_memory_or_too_short_come_back_and_frames_go_into_others() {
    let mut cable = Cable::new(TSO);
    let memory_end = 1 << 20;
    cable.give(4);
    for at in [memory_end - 8, 0xc000_0000] {
        let head = cable.card.rx.send(&[(at, 100, WRITE)]);
        cable.given.insert(head, (0, 100));
    }
    (0..3).for_each(|_| cable.give(ROOM));
    cable.card.net.process_queues();
    let frame = cable.frame(4000, 1, MAC.0);
    cable.send(&frame);
    cable.card.net.process_queues();
    assert_eq!(cable.taken(), [frame]);
    assert!(!cable.card.broken());
}

#[test]
fn a_sender_that_is_stopped_amid_a_frame_stops_nobody_else() {
    for mergeable in [true, false] {
        let mut cable = Cable::new(if mergeable { TSO } else { 0 });
        let port = cable.port.clone();
        (0..16).for_each(|_| cable.give(ROOM));
        cable.card.net.process_queues();
        let stuck = [3000, 40, 1000].map(|len| port.stuck(len));
        assert_eq!(stuck.each_ref().map(Option::is_some), [mergeable, true, true]);
        for number in 0..50 {
            let frame = cable.frame(60 + 7 * number as usize, number, MAC.0);
            cable.send(&frame);
            cable.card.net.process_queues();
            let mut taken = cable.taken();
            assert_eq!(taken.is_empty(), number > 13 - u32::from(mergeable) * 2, "{number}");
            if taken.is_empty() {
                // All that were posted are used up, and it waits in a buffer of the switch's.
                cable.give(ROOM);
                cable.card.net.process_queues();
                taken = cable.taken();
            }
            assert_eq!(taken, [frame], "{number}");
        }
        // One ends well, as far as is known: its bytes are nobody's.
        drop(stuck);
        cable.card.net.process_queues();
        let frame = cable.frame(1500, 7, MAC.0);
        cable.send(&frame);
        cable.card.net.process_queues();
        assert_eq!(cable.taken(), [frame]);
        assert!(!cable.card.broken());
    }
}

#[test]
fn a_frame_that_waits_for_buffers_comes_before_later_ones_also_while_somebody_copies() {
    for ends_first in [false, true] {
        let mut cable = Cable::new(TSO);
        let port = cable.port.clone();
        (0..4).for_each(|_| cable.give(ROOM));
        cable.card.net.process_queues();
        let mut stuck = port.stuck(2000);
        // Read into the three that are left, and too long for them.
        let [long, short] = [(7000, 1), (60, 2)].map(|(len, number)| cable.frame(len, number, MAC.0));
        cable.send(&long);
        cable.card.net.process_queues();
        if ends_first {
            drop(stuck.take());
        }
        cable.send(&short);
        cable.card.net.process_queues();
        (0..6).for_each(|_| cable.give(ROOM));
        cable.card.net.process_queues();
        assert_eq!(cable.taken(), [long, short], "{ends_first}");
        drop(stuck);
        for number in 0..20 {
            let frame = cable.frame(500, number, MAC.0);
            cable.send(&frame);
            cable.card.net.process_queues();
            assert_eq!(cable.taken(), [frame]);
            cable.give(ROOM);
            cable.card.net.process_queues();
        }
    }
}

#[test]
fn after_a_pause_that_did_not_come_frames_are_where_they_are_said_to_be() {
    let mut cable = Cable::new(TSO);
    let port = cable.port.clone();
    (0..8).for_each(|_| cable.give(ROOM));
    cable.card.net.process_queues();
    let landed = cable.frame(300, 9, MAC.0);
    let stuck = port.stuck(100).expect("room");
    cable.send(&landed);
    assert!(!cable.card.net.drain(Instant::now()));
    drop(stuck);
    cable.card.net.process_queues();
    assert_eq!(cable.taken(), [landed]);
    for number in 0..20 {
        cable.give(ROOM);
        cable.card.net.process_queues();
        let frame = cable.frame(500, number, MAC.0);
        cable.send(&frame);
        cable.card.net.process_queues();
        assert_eq!(cable.taken(), [frame]);
    }
}

#[test]
fn a_pause_does_not_come_and_a_reset_is_not_over_while_somebody_copies() {
    let mut cable = Cable::new(TSO);
    let port = cable.port.clone();
    (0..8).for_each(|_| cable.give(ROOM));
    cable.card.net.process_queues();
    let stuck = port.stuck(100).expect("room");
    assert!(!cable.card.net.drain(Instant::now()), "one is being copied");
    let frame = cable.frame(500, 1, MAC.0);
    for _ in 0..2 {
        cable.send(&frame);
        cable.card.net.process_queues();
        assert_eq!(cable.taken().pop().as_ref(), Some(&frame), "it goes on");
    }
    drop(cable.card.net.deactivate());
    assert!(!cable.card.net.is_at_rest());
    drop(stuck);
    assert!(cable.card.net.is_at_rest());
    cable.card.reset();
    cable.begin();
    (0..8).for_each(|_| cable.give(ROOM));
    cable.card.net.process_queues();
    assert!(cable.card.net.drain(Instant::now()));
    cable.send(&frame);
    cable.card.net.process_queues();
    assert_eq!(cable.taken(), std::slice::from_ref(&frame), "from a buffer of the switch's");
    cable.pause();
    cable.send(&frame);
    assert_eq!(cable.peek(1), frame[..32], "it is posted again");
    cable.card.net.process_queues();
    assert_eq!(cable.taken(), [frame]);
}

#[test]
fn the_next_guest_on_a_port_has_frames_land_in_its_own_memory() {
    let mut cable = Cable::new(TSO);
    cable.give(ROOM);
    cable.card.net.process_queues();
    let frame = cable.frame(60, 1, MAC.0);
    cable.send(&frame);
    cable.card.net.process_queues();
    assert_eq!(cable.taken().len(), 1, "nothing is left that was posted");
    // It ends, and another one comes.
    drop(cable.card.net.deactivate());
    cable.card.net = Net::simple("none", MAC, Box::new(Pair::new().0), Place::Caller);
    cable.card = Cable::card(&cable.port, TSO);
    cable.begin();
    (0..4).for_each(|_| cable.give(ROOM));
    cable.card.net.process_queues();
    cable.send(&frame);
    assert_eq!(cable.peek(0), frame[..32], "before the card does anything");
    cable.card.net.process_queues();
    assert_eq!(cable.taken(), [frame]);
}

#[test]
fn nothing_of_a_driver_that_broke_its_ring_comes_to_the_next() {
    let mut cable = Cable::new(TSO);
    (0..4).for_each(|_| cable.give(ROOM));
    cable.card.net.process_queues();
    cable.card.rx.set_avail(10_000);
    let [first, second] = [1, 2].map(|number| cable.frame(3000, number, MAC.0));
    // One lands before that is found, others are sent after it.
    cable.send(&first);
    cable.card.net.process_queues();
    assert!(cable.card.broken());
    (0..3).for_each(|_| cable.send(&first));
    cable.card.reset();
    cable.begin();
    while !cable.taken().is_empty() {}
    (0..8).for_each(|_| cable.give(ROOM));
    cable.card.net.process_queues();
    // What waited in the switch's buffers is there, and nothing else.
    assert!(cable.taken().iter().all(|frame| *frame == first));
    for _ in 0..10 {
        (0..2).for_each(|_| cable.give(ROOM));
        cable.card.net.process_queues();
        cable.send(&second);
        cable.card.net.process_queues();
        assert_eq!(cable.taken(), std::slice::from_ref(&second));
    }
}

#[test]
fn a_buffer_without_room_for_a_header_comes_back_wherever_it_stands() {
    let mut cable = Cable::new(TSO);
    let frame = cable.frame(60, 1, MAC.0);
    for short in [1, 8, 11] {
        cable.give(ROOM);
        cable.give(short);
        cable.card.net.process_queues();
        cable.send(&frame);
        cable.card.net.process_queues();
        cable.send(&frame);
        cable.give(ROOM);
        cable.card.net.process_queues();
        assert_eq!(cable.taken(), [frame.clone(), frame.clone()]);
    }
}

#[test]
fn nothing_comes_into_the_memory_of_a_guest_whose_cable_is_not_plugged_in() {
    let mut cable = Cable::new(TSO);
    (0..4).for_each(|_| cable.give(ROOM));
    cable.card.net.process_queues();
    cable.card.net.control.set_link(false);
    let frame = cable.frame(60, 1, MAC.0);
    // At once, and when the card has seen it.
    for _ in 0..3 {
        cable.send(&frame);
        assert!((0..4).all(|head| cable.peek(head) == [0; 32]));
        cable.card.net.process_queues();
    }
    assert_eq!((cable.taken().len(), cable.dropped()), (0, 3));
    cable.card.net.control.set_link(true);
    cable.send(&frame);
    cable.card.net.process_queues();
    cable.send(&frame);
    cable.card.net.process_queues();
    assert_eq!(cable.taken(), [frame.clone(), frame]);
}

#[test]
fn buffers_without_room_for_a_header_may_be_behind_others_but_not_first() {
    let mut cable = Cable::new(TSO);
    let frame = cable.frame(100, 1, MAC.0);
    for round in 0..3 {
        for len in [ROOM, 1, 11, 5, ROOM] {
            cable.give(len);
        }
        cable.card.net.process_queues();
        // The first is full, and what comes behind it cannot be.
        for _ in 0..2 {
            cable.send(&frame);
        }
        cable.card.net.process_queues();
        assert_eq!(cable.taken(), [frame.clone(), frame.clone()], "round {round}");
        assert_eq!(cable.idle.len(), usize::from(SIZE), "the others came back");
    }
    assert_eq!((cable.card.broken(), cable.dropped()), (false, 0));
}

/// What had landed for a driver whose queue has failed is lost with it. The next one is handed only what lands in its own buffers.
#[test]
fn what_landed_before_a_queue_failed_is_not_the_next_drivers() {
    let mut cable = Cable::new(TSO);
    for _ in 0..8 {
        cable.give(ROOM);
    }
    cable.card.net.process_queues();
    for number in 0..5 {
        let frame = cable.frame(100, number, MAC.0);
        cable.send(&frame);
    }
    cable.card.rx.offer(SIZE);
    cable.card.net.process_queues();
    assert!(cable.card.broken(), "there is no such descriptor");
    cable.card.reset();
    cable.given.clear();
    cable.idle = (0..u64::from(SIZE)).map(|i| BUFFERS + u64::from(ROOM) * i).collect();
    for number in 10..14 {
        cable.give(ROOM);
        cable.give(ROOM);
        cable.card.net.process_queues();
        let frame = cable.frame(3000, number, MAC.0);
        cable.send(&frame);
        cable.card.net.process_queues();
        assert_eq!(cable.taken(), [frame]);
    }
}

/// Frames of every length through buffers of every length, amid pauses and resets of posting: each comes once, whole and in order.
#[test]
fn frames_come_in_order_whichever_way_they_take() {
    for (seed, features) in [(1, TSO), (2, MRG), (3, TSO), (4, 0), (5, TSO)] {
        let mut dice = Dice(0x9e37_79b9_7f4a_7c15 ^ seed);
        let mut cable = Cable::new(features);
        let (mut sent, mut total, mut got) = (std::collections::VecDeque::new(), 0, 0);
        for number in 0..7000 {
            // In the end all that waits comes out.
            match if number < 6000 { dice.below(16) } else { u64::from(number % 2) * 12 } {
                0..6 => (0..dice.below(12)).for_each(|_| {
                    let short = dice.below(3) == 0;
                    cable.give(if short { 1 + dice.below(200) as u32 } else { ROOM });
                }),
                6..12 => {
                    let most = [100, 2000, 9000, 60_000][dice.below(4) as usize];
                    let frame = cable.frame(60 + dice.below(most) as usize, number, MAC.0);
                    cable.send(&frame);
                    sent.push_back(frame);
                    total += 1;
                }
                12..15 => cable.card.net.process_queues(),
                _ if dice.below(4) == 0 => cable.pause_with(|cable| {
                    let frame = cable.frame(700, number, MAC.0);
                    cable.send(&frame);
                    sent.push_back(frame);
                    total += 1;
                }),
                _ => cable.pause(),
            }
            for frame in cable.taken() {
                // What was dropped for want of room has been left out, and nothing else.
                let at = sent.iter().position(|expected| *expected == frame);
                let at = at.unwrap_or_else(|| panic!("{} bytes that were not sent, or not now", frame.len()));
                sent.drain(..=at);
                got += 1;
            }
        }
        assert!(got > 500 && !cable.card.broken(), "{got} of {total} frames, {:?}", cable.port.statistics());
        let statistics = cable.card.net.control.statistics();
        assert_eq!((statistics.rx_frames, got + cable.dropped()), (got, total), "{statistics:?}");
    }
}
