//! Its network driver: every length, and frames that scapy made.

use std::rc::Rc;

use virtio_drivers::device::net::VirtIONetRaw;
use vmbed::internals::{Board, Part};
use vmbed::{PortOptions, PortVlan, RateLimit, Switch, SwitchOptions};

use super::{GuestPages, OurPci, board, board_with, transport, transport_of};

type Driver = VirtIONetRaw<GuestPages, OurPci, 16>;

const HEADER: usize = 12;
/// What a frame has at least and at most.
const SHORTEST: usize = 14;
const LONGEST: usize = 65_557;
/// A header and the longest frame.
const ROOM: usize = HEADER + LONGEST;

/// Frames that scapy has made, with every tag, in fragments, of storms and of nonsense: python/tests/frames.py says how.
fn made_by_scapy() -> Vec<&'static [u8]> {
    let mut rest = include_bytes!("frames.pcap").split_at(24).1;
    let mut frames = Vec::new();
    while let Some((head, more)) = rest.split_at_checked(16) {
        let length = u32::from_le_bytes(head[8..12].try_into().unwrap()) as usize;
        let (frame, more) = more.split_at(length);
        frames.push(frame);
        rest = more;
    }
    assert!(rest.is_empty() && frames.len() > 600, "{}", frames.len());
    frames
}

/// A buffer that the driver has given to its card, until a frame is in it.
struct Waiting {
    buffer: Box<[u8]>,
    token: u16,
}

impl Waiting {
    fn new(driver: &mut Driver, size: usize) -> Self {
        let mut buffer = vec![0; size].into_boxed_slice();
        // SAFETY: the buffer stays where it is, untouched, until `receive_complete` with the same token.
        let token = unsafe { driver.receive_begin(&mut buffer) }.unwrap();
        Self { buffer, token }
    }

    /// The frame that is in it, if there is one; then it waits for the next.
    fn take<R>(&mut self, driver: &mut Driver, look: impl FnOnce(&[u8]) -> R) -> Option<R> {
        if driver.poll_receive() != Some(self.token) {
            return None;
        }
        // SAFETY: the token is this buffer's, which nobody has touched since.
        let (header, length) = unsafe { driver.receive_complete(self.token, &mut self.buffer) }.unwrap();
        assert_eq!((header, &self.buffer[..2]), (HEADER, &[0; 2][..]));
        let seen = look(&self.buffer[HEADER..HEADER + length]);
        // SAFETY: as above.
        self.token = unsafe { driver.receive_begin(&mut self.buffer) }.unwrap();
        Some(seen)
    }
}

/// Frames that the card has dropped: of the driver's, and of the network's.
fn dropped(board: &Board) -> (u64, u64) {
    let statistics = board.net_statistics()[0];
    (statistics.tx_dropped, statistics.rx_dropped)
}

#[test]
fn its_network_driver_sends_and_receives() {
    let board = board(Part::Net);
    let mut net = Driver::new(transport(&board)).unwrap();
    assert_eq!(net.mac_address(), [2, 0, 0, 0, 0, 1]);
    let far = board.network().unwrap();
    for round in 0..50u8 {
        let frame = [round; 60];
        net.send(&frame).unwrap();
        let mut got = [0xff; 100];
        assert_eq!(far.recv(&mut got).unwrap(), 72);
        assert_eq!(got[12..72], frame);
        let mut buffer = [0; 2048];
        // SAFETY: the buffer stays where it is, untouched, until `receive_complete` with the same token.
        let token = unsafe { net.receive_begin(&mut buffer) }.unwrap();
        far.send(&[&[0; 12][..], &frame].concat()).unwrap();
        board.process_all();
        assert_eq!(net.poll_receive(), Some(token));
        // SAFETY: as above; this is the buffer.
        let (header, length) = unsafe { net.receive_complete(token, &mut buffer) }.unwrap();
        assert_eq!((header, length), (12, 60));
        assert_eq!(buffer[12..72], frame);
    }
}

/// No length is sent as another, and none that cannot be is sent at all.
#[test]
fn its_network_driver_sends_every_length() {
    let board = board(Part::Net);
    let mut net = Driver::new(transport(&board)).unwrap();
    let far = board.network().unwrap();
    let frame: Vec<u8> = (0..LONGEST + 50).map(|i| (i % 251) as u8).collect();
    let mut got = vec![0; ROOM + 1];
    for length in 0..=frame.len() {
        let before = dropped(&board);
        net.send(&frame[..length]).unwrap();
        match far.recv(&mut got) {
            Ok(len) => {
                assert!((SHORTEST..=LONGEST).contains(&length) && dropped(&board) == before, "{length}");
                assert_eq!((len, &got[..HEADER]), (HEADER + length, &[0; HEADER][..]));
                assert!(got[HEADER..len] == frame[..length], "{length}");
            }
            Err(_) => {
                assert!(!(SHORTEST..=LONGEST).contains(&length), "{length} is lost");
                assert_eq!(dropped(&board), (before.0 + 1, before.1), "{length} is counted");
            }
        }
    }
}

/// The same the other way round: what it cannot be given costs no buffer.
#[test]
fn its_network_driver_receives_every_length() {
    let board = board(Part::Net);
    let mut net = Driver::new(transport(&board)).unwrap();
    let mut waiting = Waiting::new(&mut net, ROOM);
    let far = board.network().unwrap();
    let message: Vec<u8> =
        [0; HEADER].into_iter().chain((0..LONGEST + 50).map(|i| (i % 251) as u8)).collect();
    // Also what is shorter than its header.
    for end in 0..=message.len() {
        let before = dropped(&board);
        far.send(&message[..end]).unwrap();
        board.process_all();
        let came = waiting.take(&mut net, |frame| assert!(frame == &message[HEADER..end], "{end}"));
        let can_be = (HEADER + SHORTEST..=ROOM).contains(&end);
        assert_eq!(came.is_some(), can_be, "{end}");
        assert_eq!(dropped(&board), (before.0, before.1 + u64::from(!can_be)), "{end}");
    }
}

/// A card looks at no frame: whatever it is, it passes as it is, or it is too short and counted.
#[test]
fn what_scapy_has_made_passes_its_network_driver_both_ways() {
    let board = board(Part::Net);
    let mut net = Driver::new(transport(&board)).unwrap();
    let mut waiting: Vec<_> = (0..8).map(|_| Waiting::new(&mut net, 2048)).collect();
    let far = board.network().unwrap();
    let (mut runts, mut got) = ((0, 0), vec![0; ROOM]);
    let frames = made_by_scapy();
    for &frame in &frames {
        net.send(frame).unwrap();
        match far.recv(&mut got) {
            Ok(len) => assert_eq!(got[HEADER..len], *frame),
            Err(_) => {
                assert!(frame.len() < SHORTEST, "{frame:x?} is lost");
                runts.0 += 1;
            }
        }
        assert!(dropped(&board).0 == runts.0);
    }
    // All at once, as many as there are buffers: a storm.
    for burst in frames.chunks(waiting.len()) {
        for frame in burst {
            far.send(&[&[0; HEADER], *frame].concat()).unwrap();
        }
        board.process_all();
        let mut whole = burst.iter().filter(|frame| frame.len() >= SHORTEST);
        while let Some(token) = net.poll_receive() {
            let first = waiting.iter_mut().find(|waiting| waiting.token == token).unwrap();
            first.take(&mut net, |frame| assert_eq!(frame, *whole.next().unwrap())).unwrap();
        }
        assert_eq!(whole.next(), None, "all of them came, in their order");
        runts.1 += burst.iter().filter(|frame| frame.len() < SHORTEST).count() as u64;
        assert_eq!(dropped(&board), runts);
    }
    assert!(runts.0 == runts.1 && runts.0 > 20, "{runts:?}");
}

/// Between two cards on a switch: each frame comes to the other, as 802.1Q has it, or is counted once, at one of the two ports.
fn through_a_switch(from: &PortOptions, to: &PortOptions) -> (u64, u64) {
    let switch = Switch::new(&SwitchOptions::default()).unwrap();
    let ports = [("from", from), ("to", to)].map(|(name, options)| switch.add_port(name, options).unwrap());
    let board: Rc<Board> = board_with(ports.iter().cloned().map(Part::Port).collect());
    let mut sender = Driver::new(transport_of(&board, 1)).unwrap();
    let mut receiver = Driver::new(transport_of(&board, 2)).unwrap();
    let mut waiting = Waiting::new(&mut receiver, 2048);
    let lost = || -> u64 {
        ports.iter().flat_map(|port| port.statistics().drops().collect::<Vec<_>>()).map(|(_, n)| n).sum()
    };
    let tag = |frame: &[u8]| {
        (frame[12..14] == [0x81, 0]).then(|| u16::from_be_bytes([frame[14], frame[15]]) & 0xfff)
    };
    let (mut came, mut runts) = (0, 0);
    for frame in made_by_scapy() {
        sender.send(frame).unwrap();
        board.process_all();
        runts += u64::from(frame.len() < SHORTEST);
        let seen = waiting.take(&mut receiver, |seen| {
            let (inner, sent) = (tag(frame).map_or(12, |_| 16), tag(seen).map_or(12, |_| 16));
            // Its addresses, and all that is behind the tag.
            assert_eq!((&seen[..12], &seen[sent..]), (&frame[..12], &frame[inner..]));
            let carried = |options: &PortOptions, vlan: Option<u16>| match (&options.vlan, vlan) {
                (PortVlan::Access(own), None | Some(0)) => Some(*own),
                (PortVlan::Trunk { native, .. }, None | Some(0)) => *native,
                (PortVlan::Trunk { vlans, native }, Some(vlan)) => {
                    (vlans.contains(&vlan) || *native == Some(vlan)).then_some(vlan)
                }
                _ => None,
            };
            let vlan = carried(from, tag(frame));
            assert!(vlan.is_some() && vlan == carried(to, tag(seen)), "{frame:x?} came as {seen:x?}");
        });
        came += u64::from(seen.is_some());
        let statistics = board.net_statistics();
        assert_eq!((statistics[0].tx_dropped, statistics[1].rx_dropped), (runts, 0));
        assert_eq!(statistics[0].tx_frames, came + lost(), "{frame:x?}");
    }
    (came, lost())
}

#[test]
fn what_scapy_has_made_passes_a_switch_between_its_drivers_or_is_counted() {
    let calm = |mut options: PortOptions| {
        options.storm = RateLimit::NONE;
        options
    };
    let (access, trunk) = (calm(PortOptions::access(10)), calm(PortOptions::trunk([10, 20])));
    let mut native = trunk.clone();
    native.vlan = PortVlan::Trunk { vlans: vec![20], native: Some(10) };
    let kinds = [access, trunk, native];
    let mut all = Vec::new();
    for from in &kinds {
        all.extend(kinds.iter().map(|to| through_a_switch(from, to)));
    }
    assert!(all.iter().all(|(came, lost)| *came > 5 && *lost > 50), "{all:?}");
}
