#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::Ordering;

use proptest::prelude::*;

use super::*;
use crate::config::MacAddress;
use crate::config::RateLimit;
use crate::net::pair::Pair;
use crate::sys::io::Pieces;

const ALL: [u8; 6] = [0xff; 6];
const VLAN: u16 = 0x8100;

fn mac(n: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, n]
}

/// An Ethernet frame with these tags: type and content.
fn tagged(to: [u8; 6], from: [u8; 6], tags: &[(u16, u16)], payload: &[u8]) -> Vec<u8> {
    let mut frame = [to, from].concat();
    for (kind, tag) in tags {
        frame.extend(kind.to_be_bytes());
        frame.extend(tag.to_be_bytes());
    }
    [&frame[..], &[0x88, 0xb5], payload].concat()
}

fn frame(to: [u8; 6], from: [u8; 6], payload: &[u8]) -> Vec<u8> {
    tagged(to, from, &[], payload)
}

/// A switch with something plugged into each port.
struct Net {
    switch: Switch,
    ports: Vec<SwitchPort>,
    plugs: Vec<Plug>,
    room: Vec<u8>,
}

impl Net {
    fn new(options: impl IntoIterator<Item = PortOptions>) -> Self {
        let switch = Switch::with_manual_clock(&SwitchOptions::default()).unwrap();
        let named = options.into_iter().enumerate();
        let ports: Vec<_> = named.map(|(i, o)| switch.add_port(format!("port{i}"), &o).unwrap()).collect();
        let plugs = ports.iter().map(|p| p.plug().unwrap()).collect();
        Self { switch, ports, plugs, room: vec![0; 80_000] }
    }

    fn send_with(&mut self, port: usize, header: [u8; 12], frame: &[u8]) {
        let mut pieces = Pieces::default();
        let mut list = pieces.list();
        list.push_bytes(&header);
        // In odd pieces, as a guest may have it.
        for piece in frame.chunks(97) {
            list.push_bytes(piece);
        }
        self.plugs[port].send(&list).unwrap();
    }

    fn send(&mut self, port: usize, frame: &[u8]) {
        self.send_with(port, [0; 12], frame);
    }

    fn next(&mut self, port: usize) -> Option<([u8; 12], Vec<u8>)> {
        let mut pieces = Pieces::default();
        let mut list = pieces.list();
        list.push_room(&mut self.room);
        let len = match self.plugs[port].receive(&list) {
            Ok(len) => len,
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
                return None;
            }
        };
        Some((self.room[..12].try_into().unwrap(), self.room[12..len].to_vec()))
    }

    /// Everything that waits there; nothing of it with something left to do.
    fn get(&mut self, port: usize) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        while let Some((header, frame)) = self.next(port) {
            assert_eq!(header, [0; 12]);
            all.push(frame);
        }
        all
    }

    /// The reasons met at a port until now.
    fn drops(&self, port: usize) -> Vec<(DropReason, u64)> {
        self.ports[port].statistics().drops().collect()
    }

    fn set(&self, port: usize, change: impl FnOnce(&mut PortOptions)) {
        let mut options = self.ports[port].options().unwrap();
        change(&mut options);
        self.ports[port].set_options(&options).unwrap();
    }
}

fn access(vlans: &[u16]) -> Vec<PortOptions> {
    vlans.iter().map(|vlan| PortOptions::access(*vlan)).collect()
}

#[test]
fn it_learns_who_is_where() {
    let mut net = Net::new(access(&[1, 1, 1]));
    let (ask, answer) = (frame(ALL, mac(1), b"who?"), frame(mac(1), mac(2), b"me"));
    net.send(0, &ask);
    assert_eq!([net.get(0), net.get(1), net.get(2)], [vec![], vec![ask.clone()], vec![ask.clone()]]);
    net.send(1, &answer);
    assert_eq!([net.get(0), net.get(2)], [vec![answer.clone()], vec![]], "to the one only");
    net.switch.advance(Duration::from_secs(301));
    net.send(1, &answer);
    assert_eq!([net.get(0).len(), net.get(2).len()], [1, 1], "it is forgotten when nobody hears of it");
    let statistics = net.ports[1].statistics();
    assert_eq!((statistics.received.frames, statistics.received.bytes), (2, 32));
    assert_eq!((statistics.sent.frames, statistics.sent.bytes, statistics.addresses), (1, 18, 1));
}

#[test]
fn vlans_are_apart_and_trunks_carry_them_with_tags() {
    let mut trunk = PortOptions::trunk([10, 20]);
    let mut net = Net::new([access(&[10, 20, 10]), vec![trunk.clone()]].concat());
    let from_10 = frame(ALL, mac(1), b"ten");
    net.send(0, &from_10);
    assert_eq!([net.get(1), net.get(2)], [vec![], vec![from_10.clone()]]);
    assert_eq!(net.get(3), [tagged(ALL, mac(1), &[(VLAN, 10)], b"ten")]);
    net.send(3, &tagged(ALL, mac(9), &[(VLAN, 5 << 13 | 0x1000 | 20)], b"twenty"));
    assert_eq!([net.get(0), net.get(1), net.get(2)], [vec![], vec![frame(ALL, mac(9), b"twenty")], vec![]]);
    net.send(1, &frame(mac(9), mac(2), b"back"));
    assert_eq!(net.get(3), [tagged(mac(9), mac(2), &[(VLAN, 20)], b"back")]);
    net.send(3, &frame(ALL, mac(9), b"none"));
    net.send(3, &tagged(ALL, mac(9), &[(VLAN, 30)], b"not carried"));
    assert_eq!(net.drops(3), [(DropReason::ForeignVlan, 2)]);
    trunk.vlan = PortVlan::Trunk { vlans: vec![20], native: Some(10) };
    net.ports[3].set_options(&trunk).unwrap();
    net.send(0, &from_10);
    assert_eq!(net.get(3), [from_10], "its own VLAN has no tag");
    net.send(3, &frame(ALL, mac(9), b"native"));
    net.send(3, &tagged(ALL, mac(9), &[(VLAN, 3 << 13)], b"priority"));
    assert_eq!(net.get(0).len() + net.get(2).len(), 5);
}

/// A switch on which every reason can be met: 0 and 1 access to VLAN 1, 0 with a guard; 2 a trunk of 1 and 2.
fn guarded() -> Net {
    let addresses = ["10.0.0.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
    let guard = Guard::new(MacAddress(mac(1)), addresses);
    let mut net =
        Net::new([PortOptions::access(1).guard(guard), PortOptions::access(1), PortOptions::trunk([1, 2])]);
    net.send(1, &frame(ALL, mac(2), b""));
    for port in 0..3 {
        net.get(port);
    }
    net
}

fn ether(from: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
    [&ALL, &from[..], &kind.to_be_bytes(), payload].concat()
}

fn ipv6(from: &str, message: &[u8]) -> Vec<u8> {
    let from = from.parse::<std::net::Ipv6Addr>().unwrap().octets();
    let head = [0x60, 0, 0, 0, 0, message.len() as u8, 58, 255];
    ether(mac(1), 0x86dd, &[&head, &from[..], &[0xff; 16], message].concat())
}

/// Sends what is dropped for that reason; which port counts it, how often.
fn provoke(net: &mut Net, reason: DropReason) -> (usize, u64) {
    use DropReason::*;
    let plain = frame(ALL, mac(1), b"plain");
    let zero = RateLimit::NONE.ops(1, 1);
    let from_0 = match reason {
        Runt => plain[..13].to_vec(),
        TooLong => frame(ALL, mac(1), &[0; 66_000]),
        BadOffload => {
            net.send_with(0, [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &plain);
            return (0, 1);
        }
        BadSource => frame(ALL, [3, 0, 0, 0, 0, 0], b""),
        LinkLocal => frame([1, 0x80, 0xc2, 0, 0, 0x0e], mac(1), b""),
        BadTag => {
            net.send(2, &tagged(ALL, mac(7), &[(VLAN, 4095)], b""));
            net.send(2, &tagged(ALL, mac(7), &[(0x88a8, 1)], b""));
            return (2, 2);
        }
        NestedTag => tagged(ALL, mac(1), &[(VLAN, 0), (VLAN, 2)], b""),
        ForeignVlan => tagged(ALL, mac(1), &[(VLAN, 1)], b""),
        SpoofedMac => frame(ALL, mac(3), b""),
        SpoofedIpv4 => ether(mac(1), 0x0800, &[0x45; 40]),
        SpoofedIpv6 => ipv6("2001:db8::2", &[128, 0]),
        SpoofedArp => ether(mac(1), 0x0806, &[0; 28]),
        SpoofedNeighbour => ipv6("2001:db8::1", &[135, 0]),
        SpoofedRouter => ipv6("2001:db8::1", &[134, 0]),
        ForeignMac => {
            net.send(1, &plain);
            return (1, 1);
        }
        RateIn => {
            net.set(0, |options| options.rate_in = zero);
            net.send(0, &plain);
            plain
        }
        Storm => {
            net.set(0, |options| options.storm = zero);
            net.send(0, &plain);
            plain
        }
        SamePort => frame(mac(1), mac(1), b""),
        Isolated => {
            net.set(0, |options| options.isolated = true);
            net.set(1, |options| options.isolated = true);
            net.send(1, &frame(mac(9), mac(2), b""));
            frame(mac(2), mac(1), b"")
        }
        Nowhere => {
            net.send(2, &tagged(ALL, mac(7), &[(VLAN, 2)], b""));
            return (2, 1);
        }
        Monitor => {
            net.ports[1].mirror_to(Some(&net.ports[0])).unwrap();
            plain
        }
        Removed => {
            net.ports[0].remove();
            plain
        }
        RateOut => {
            net.set(1, |options| options.rate_out = zero);
            net.send(0, &plain);
            net.send(0, &plain);
            return (1, 1);
        }
        QueueFull => {
            net.set(0, |options| options.storm = RateLimit::NONE);
            for _ in 0..520 {
                net.send(0, &plain);
            }
            return (1, 8);
        }
        HiddenTag => {
            net.send(2, &tagged(ALL, mac(7), &[(VLAN, 1), (VLAN, 2)], b""));
            return (1, 1);
        }
        Uplink => {
            net.plugs[0].lost();
            return (0, 1);
        }
    };
    net.send(0, &from_0);
    (0, 1)
}

#[test]
fn every_reason_is_met_and_counted() {
    for reason in DropReason::ALL {
        let mut net = guarded();
        assert!(net.drops(0).is_empty() && net.drops(1).is_empty() && net.drops(2).is_empty());
        let (port, count) = provoke(&mut net, *reason);
        assert_eq!(net.drops(port), [(*reason, count)], "{reason}");
    }
}

/// Rows of VLAN hopping: what an access port or a trunk's native VLAN could be talked into.
#[test]
fn nobody_hops_into_another_vlan() {
    let mut native = PortOptions::trunk([1, 20]);
    native.vlan = PortVlan::Trunk { vlans: vec![20], native: Some(1) };
    let mut net = Net::new([access(&[1, 20]), vec![native.clone(), native]].concat());
    for outer in [0, 1, 20, 4095] {
        for inner in [1, 20] {
            for (a, b) in [(VLAN, VLAN), (0x88a8, VLAN), (VLAN, 0x88a8), (0x9100, VLAN)] {
                net.send(0, &tagged(ALL, mac(1), &[(a, outer), (b, inner)], b"hop"));
            }
        }
        net.send(0, &tagged(ALL, mac(1), &[(VLAN, 20)], b"hop"));
    }
    for port in 1..4 {
        assert_eq!(net.get(port), Vec::<Vec<u8>>::new());
    }
    // From a trunk: the outer tag is its native VLAN's, and would be gone on the other one.
    net.send(2, &tagged(ALL, mac(1), &[(VLAN, 1), (VLAN, 20)], b"hop"));
    assert_eq!([net.get(0).len(), net.get(1).len(), net.get(3).len()], [0; 3]);
    assert_eq!(net.drops(3), [(DropReason::HiddenTag, 1)]);
    // What stays behind a tag is nobody's business.
    let inside = tagged(ALL, mac(1), &[(VLAN, 20), (VLAN, 30)], b"customer's");
    net.send(2, &inside);
    assert_eq!((net.get(3), net.get(1)), (vec![inside], vec![]));
}

#[test]
fn an_address_is_not_taken_from_who_uses_it() {
    let mut net = Net::new(access(&[1, 1, 1]));
    let to_1 = frame(mac(1), mac(3), b"for one");
    for _ in 0..20 {
        net.send(0, &frame(ALL, mac(1), b""));
        net.send(1, &frame(ALL, mac(1), b"no, me"));
        net.switch.advance(Duration::from_millis(300));
    }
    (0..3).for_each(|port| drop(net.get(port)));
    net.send(2, &to_1);
    assert_eq!((net.get(0), net.get(1)), (vec![to_1.clone()], vec![]));
    assert_eq!((net.ports[1].statistics().moved, net.ports[1].statistics().unlearned), (0, 20));
    net.switch.advance(Duration::from_secs(2));
    net.send(1, &frame(ALL, mac(1), b"moved over"));
    (0..3).for_each(|port| drop(net.get(port)));
    net.send(2, &to_1);
    assert_eq!((net.get(0), net.get(1)), (vec![], vec![to_1]));
    assert_eq!(net.ports[1].statistics().moved, 1);
}

#[test]
fn a_flood_of_addresses_does_not_make_the_others_unknown() {
    let mut net = Net::new(access(&[1, 1, 1, 1]));
    net.set(0, |options| options.storm = RateLimit::NONE);
    net.send(1, &frame(ALL, mac(2), b""));
    for n in 0..20_000u32 {
        let [a, b, c, d] = n.to_be_bytes();
        net.send(0, &frame(mac(2), [6, a, b, c, d, 0], b""));
    }
    let flooder = net.ports[0].statistics();
    assert!(flooder.addresses <= 1024 && flooder.unlearned >= 20_000 - 1024, "{flooder:?}");
    (0..4).for_each(|port| drop(net.get(port)));
    net.send(2, &frame(mac(2), mac(3), b"still known"));
    assert_eq!([net.get(1).len(), net.get(3).len()], [1, 0]);
}

#[test]
fn unknown_addresses_go_where_they_are_wanted_and_isolated_ports_stay_apart() {
    let mut net = Net::new(access(&[1, 1, 1]));
    net.set(1, |options| options.unknown_unicast = false);
    net.send(0, &frame(mac(9), mac(1), b""));
    assert_eq!([net.get(1).len(), net.get(2).len()], [0, 1]);
    net.send(0, &frame(ALL, mac(1), b""));
    assert_eq!([net.get(1).len(), net.get(2).len()], [1, 1]);
    net.set(0, |options| options.isolated = true);
    net.set(1, |options| options.isolated = true);
    net.send(0, &frame(ALL, mac(1), b""));
    net.send(2, &frame(ALL, mac(3), b""));
    assert_eq!([net.get(0).len(), net.get(1).len(), net.get(2).len()], [1, 1, 1]);
}

#[test]
fn limits_hold_and_are_changed_while_they_work() {
    let mut net = Net::new(access(&[1, 1]));
    let big = frame(ALL, mac(1), &[0; 986]);
    net.set(0, |options| options.storm = RateLimit::NONE);
    net.set(0, |options| options.rate_in = RateLimit::NONE.bytes(100_000, 10_000));
    (0..50).for_each(|_| net.send(0, &big));
    assert_eq!(net.get(1).len(), 10);
    net.switch.advance(Duration::from_millis(50));
    (0..50).for_each(|_| net.send(0, &big));
    assert_eq!(net.get(1).len(), 5);
    net.set(0, |options| options.rate_in = RateLimit::NONE);
    net.set(1, |options| options.rate_out = RateLimit::NONE.ops(1000, 7));
    (0..50).for_each(|_| net.send(0, &big));
    assert_eq!(net.get(1).len(), 7);
    let known = frame(mac(2), mac(1), b"");
    net.set(1, |options| options.rate_out = RateLimit::NONE);
    net.set(0, |options| options.storm = RateLimit::NONE.ops(10, 1));
    net.send(1, &frame(mac(1), mac(2), b""));
    net.get(0);
    (0..50).for_each(|_| net.send(0, &known));
    assert_eq!(net.get(1).len(), 50, "a storm is what goes to many");
    (0..50).for_each(|_| net.send(0, &big));
    assert_eq!(net.get(1).len(), 1);
}

#[test]
fn a_monitor_sees_what_is_seen_at_a_port_and_says_nothing() {
    let mut net =
        Net::new([access(&[10, 10]), vec![PortOptions::trunk([10]), PortOptions::access(99)]].concat());
    net.ports[2].mirror_to(Some(&net.ports[3])).unwrap();
    net.send(0, &frame(ALL, mac(1), b"out"));
    net.send(2, &tagged(mac(1), mac(9), &[(VLAN, 10)], b"in"));
    let seen = [tagged(ALL, mac(1), &[(VLAN, 10)], b"out"), tagged(mac(1), mac(9), &[(VLAN, 10)], b"in")];
    assert_eq!(net.get(3), seen);
    assert_eq!(net.ports[3].statistics().mirrored.frames, 2);
    assert_eq!(net.ports[3].statistics().sent.frames, 0);
    fn error(a: &SwitchPort, b: &SwitchPort) -> ErrorKind {
        a.mirror_to(Some(b)).unwrap_err().kind()
    }
    assert_eq!(error(&net.ports[3], &net.ports[0]), ErrorKind::InvalidState);
    assert_eq!(error(&net.ports[0], &net.ports[2]), ErrorKind::InvalidState);
    assert_eq!(error(&net.ports[0], &net.ports[0]), ErrorKind::InvalidArgument);
    let other = Net::new(access(&[1]));
    assert_eq!(error(&net.ports[0], &other.ports[0]), ErrorKind::InvalidArgument);
    net.ports[2].mirror_to(None).unwrap();
    net.send(0, &frame(ALL, mac(1), b"out"));
    assert_eq!(net.get(3), Vec::<Vec<u8>>::new());
    net.ports[3].set_options(&PortOptions::access(10)).unwrap();
    net.send(0, &frame(ALL, mac(1), b"out"));
    assert_eq!(net.get(3).len(), 1, "a port like any other again");
    net.ports[2].mirror_to(Some(&net.ports[3])).unwrap();
    net.ports[3].remove();
    net.send(0, &frame(ALL, mac(1), b"out"));
    assert_eq!(error(&net.ports[0], &net.ports[3]), ErrorKind::NotFound);
}

#[test]
fn a_port_has_one_card_at_a_time_and_outlives_it() {
    let mut net = Net::new(access(&[1, 1]));
    assert_eq!(net.ports[0].plug().err().unwrap().kind(), ErrorKind::Busy);
    net.send(0, &frame(ALL, mac(1), b""));
    net.get(1);
    drop(net.plugs.remove(0));
    assert_eq!(net.ports[0].statistics().addresses, 0);
    net.send(0, &frame(mac(1), mac(2), b"nobody is there"));
    assert_eq!(net.drops(1), [(DropReason::Nowhere, 1)]);
    let again = net.ports[0].plug().unwrap();
    net.plugs.insert(0, again);
    assert_eq!(net.get(0), Vec::<Vec<u8>>::new(), "nothing is left from before");
    net.ports[0].remove();
    net.ports[0].remove();
    assert_eq!(net.ports[0].plug().err().unwrap().kind(), ErrorKind::NotFound);
    assert!(net.ports[0].options().is_none());
    assert_eq!(net.ports[0].set_options(&PortOptions::default()).unwrap_err().kind(), ErrorKind::NotFound);
    let more: Vec<_> =
        (0..2000).map_while(|i| net.switch.add_port(format!("{i}"), &PortOptions::default()).ok()).collect();
    assert_eq!(more.len(), MAX_PORTS - 1);
    more[5].remove();
    let new = net.switch.add_port("again", &PortOptions::default()).unwrap();
    assert_eq!(net.switch.ports().len(), MAX_PORTS);
    assert_eq!((new.port.number, more[5].options().is_some()), (more[5].port.number, false));
}

/// A TCP packet of several segments, and the header that says so.
fn segments(to: [u8; 6], from: [u8; 6], payload: usize, size: u16) -> ([u8; 12], Vec<u8>) {
    let length = (40 + payload) as u16;
    let mut packet = vec![0x45, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([0, 7, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    packet.extend([4, 0, 8, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x18, 1, 0, 0, 0, 0, 0]);
    packet.extend((0..payload).map(|i| (i / 3) as u8));
    let mut frame = [to, from].concat();
    frame.extend([8, 0]);
    frame.extend(packet);
    let [s0, s1] = size.to_le_bytes();
    ([1, 1, 0, 0, s0, s1, 34, 0, 16, 0, 0, 0], frame)
}

#[test]
fn segments_pass_uncut_between_those_who_know_them_and_are_cut_for_others() {
    let mut net = Net::new([access(&[1, 1, 1]), vec![PortOptions::trunk([1])]].concat());
    let tso = Offloads::CSUM | Offloads::TSO4;
    net.plugs[1].set_takes(tso);
    net.plugs[3].set_takes(tso);
    let (header, whole) = segments(ALL, mac(1), 60_000, 1400);
    net.send_with(0, header, &whole);
    let (mut passed, frame) = net.next(1).unwrap();
    assert_eq!(std::mem::take(&mut passed[2]), 54, "what its headers take");
    assert!((passed, &frame) == (header, &whole) && net.next(1).is_none());
    let (mut shifted, frame) = net.next(3).unwrap();
    assert_eq!((std::mem::take(&mut shifted[2]), shifted[6], frame.len()), (58, 38, whole.len() + 4));
    assert_eq!(frame[12..16], [0x81, 0, 0, 1]);
    let cut = net.get(2);
    assert_eq!(cut.len(), 43);
    assert!(cut[..42].iter().all(|f| f.len() == 1454));
    let carried: Vec<u8> = cut.iter().flat_map(|f| f[54..].to_vec()).collect();
    assert!(carried == whole[54..]);
    assert_eq!(net.ports[2].statistics().sent.frames, 43);
    // A checksum that is left to do is done, and not for who does it himself.
    let (mut header, whole) = segments(ALL, mac(1), 100, 0);
    header[1] = 0;
    net.send_with(0, header, &whole);
    assert_eq!(net.next(1).unwrap(), (header, whole.clone()));
    let done = net.get(2).remove(0);
    assert_ne!(done[50..52], whole[50..52]);
    assert_eq!((&done[..50], &done[52..]), (&whole[..50], &whole[52..]));
    // More than a queue holds is dropped, and said once.
    let (header, whole) = segments(ALL, mac(1), 65_000, 48);
    net.send_with(0, header, &whole);
    assert_eq!((net.get(2).len(), net.drops(2)), (512, vec![(DropReason::QueueFull, 1)]));
}

#[test]
fn an_uplink_carries_both_ways_and_is_looked_for_when_it_is_gone() {
    let mut net = Net::new(access(&[1]));
    net.set(0, |options| options.storm = RateLimit::NONE);
    let (far, control) = Pair::new();
    let options = PortOptions::trunk([1]);
    let uplink = net.switch.add_uplink("up".into(), Box::new(far), Offloads::empty(), &options).unwrap();
    let wait = |what: &str, mut f: Box<dyn FnMut() -> bool + '_>| {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !f() {
            assert!(Instant::now() < deadline, "waited for {what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    };
    for n in 0..200u32 {
        net.send(0, &frame(ALL, mac(1), &n.to_be_bytes()));
        let mut got = None;
        wait(
            "a frame at the far end",
            Box::new(|| {
                got = control.get();
                got.is_some()
            }),
        );
        assert_eq!(got.unwrap()[12..], tagged(ALL, mac(1), &[(VLAN, 1)], &n.to_be_bytes()));
        control.put(&tagged(mac(1), mac(9), &[(VLAN, 1)], &n.to_be_bytes()));
        let mut got = None;
        wait(
            "a frame from the far end",
            Box::new(|| {
                got = net.next(0);
                got.is_some()
            }),
        );
        assert_eq!(got.unwrap().1, frame(mac(1), mac(9), &n.to_be_bytes()));
    }
    // A far end that takes nothing: the queue fills, and nobody waits for it.
    for _ in 0..20_000 {
        net.send(0, &frame(ALL, mac(1), &[0; 500]));
    }
    assert!(uplink.statistics().dropped(DropReason::QueueFull) > 0);
    while control.get().is_some() {
        std::thread::sleep(Duration::from_micros(200));
    }
    let kept = uplink.statistics();
    // Gone, and there again.
    control.errno.store(libc::EBADFD, Ordering::SeqCst);
    control.far.send(&[0; 60]).unwrap();
    wait(
        "the loss",
        Box::new(|| {
            net.send(0, &frame(ALL, mac(1), b""));
            uplink.statistics().dropped(DropReason::Uplink) > 0
        }),
    );
    assert_eq!(uplink.statistics().dropped(DropReason::QueueFull), kept.dropped(DropReason::QueueFull));
    let (near, far) = UnixDatagram::pair().unwrap();
    far.set_nonblocking(true).unwrap();
    *lock(&control.next) = Some(near);
    wait(
        "the new far end",
        Box::new(|| {
            net.send(0, &frame(ALL, mac(1), b""));
            far.recv(&mut [0; 100]).is_ok()
        }),
    );
    uplink.remove();
    assert!(lock(&net.switch.owner.uplinks).attached.is_empty());
}

#[test]
fn a_capture_has_every_frame_as_it_was_seen_and_ends_with_its_handle() {
    #[derive(Clone, Default)]
    struct File(Arc<Mutex<Vec<u8>>>);
    impl Write for File {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            lock(&self.0).extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut net = Net::new([access(&[10, 10]), vec![PortOptions::trunk([10])]].concat());
    let file = File::default();
    let capture = net.switch.capture(&[net.ports[0].clone(), net.ports[2].clone()], file.clone()).unwrap();
    for n in 0..100u8 {
        net.send(0, &frame(ALL, mac(1), &[n; 20]));
    }
    let summary = capture.finish().unwrap();
    assert_eq!((summary.written, summary.missed), (200, 0));
    let length = lock(&file.0).len();
    net.send(0, &frame(ALL, mac(1), &[0; 20]));
    assert_eq!(lock(&file.0).len(), length, "it has ended");
    let bytes = lock(&file.0).clone();
    let tagged = tagged(ALL, mac(1), &[(VLAN, 10)], &[7; 20]);
    assert!(bytes.windows(tagged.len()).any(|w| w == tagged));

    struct Full(usize);
    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0 =
                self.0.checked_sub(bytes.len()).ok_or(std::io::Error::from_raw_os_error(libc::ENOSPC))?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let capture = net.switch.capture(&[], Full(2000)).unwrap();
    for n in 0..100u8 {
        net.send(0, &frame(ALL, mac(1), &[n; 20]));
    }
    let error = capture.finish().unwrap_err();
    assert_eq!(error.errno(), Some(libc::ENOSPC), "{error}");
    assert!(net.switch.capture(&[], Full(10)).is_err());
}

/// Says that a thread has ended, also when it panics: the others wait for it.
struct Ended<'a>(&'a AtomicU64);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn nothing_is_lost_uncounted_between_eight_threads() {
    let switch = Switch::new(&SwitchOptions::default()).unwrap();
    let mut options = PortOptions::access(1);
    options.storm = RateLimit::NONE;
    let ports: Vec<_> = (0..8).map(|i| switch.add_port(format!("{i}"), &options).unwrap()).collect();
    const COUNT: u64 = 5000;
    let done = &AtomicU64::new(0);
    let received: u64 = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8u8)
            .map(|i| {
                let port = &ports[usize::from(i)];
                scope.spawn(move || {
                    let ended = Ended(done);
                    let (mut plug, mut got, mut room) = (port.plug().unwrap(), 0, vec![0; 70_000]);
                    let mut drain = |plug: &mut Plug| {
                        let mut pieces = Pieces::default();
                        loop {
                            let mut list = pieces.list();
                            list.push_room(&mut room);
                            let Ok(len) = plug.receive(&list) else { return };
                            got += 1;
                            assert!(room[12 + 14..len].iter().all(|b| *b == room[26]), "of one frame");
                        }
                    };
                    for n in 0..COUNT {
                        let to = if n % 50 == 0 { ALL } else { mac(i.wrapping_add(n as u8) % 8) };
                        let bytes = [&[0; 12], &frame(to, mac(i), &[i; 46])[..]].concat();
                        let mut pieces = Pieces::default();
                        let mut list = pieces.list();
                        list.push_bytes(&bytes);
                        plug.send(&list).unwrap();
                        drain(&mut plug);
                    }
                    drop(ended);
                    while done.load(Ordering::SeqCst) < 8 {
                        std::thread::yield_now();
                    }
                    drain(&mut plug);
                    got
                })
            })
            .collect();
        // Somebody changes ports and options all the while.
        while done.load(Ordering::SeqCst) < 8 {
            let extra = switch.add_port("extra", &options).unwrap();
            ports[3].set_options(&options).unwrap();
            extra.remove();
        }
        threads.into_iter().map(|t| t.join().unwrap()).sum()
    });
    let all: Vec<_> = ports.iter().map(SwitchPort::statistics).collect();
    assert_eq!(all.iter().map(|s| s.received.frames).sum::<u64>(), 8 * COUNT);
    assert_eq!(all.iter().map(|s| s.sent.frames).sum::<u64>(), received);
}

/// An 802.1Q bridge as one would write it down.
struct Model {
    ports: Vec<PortOptions>,
    /// Who was heard where, and when, in seconds.
    heard: HashMap<(u16, [u8; 6]), (usize, u64)>,
    now: u64,
}

#[derive(Debug, Default, PartialEq)]
struct Fate {
    /// What comes out of each port.
    out: Vec<Vec<Vec<u8>>>,
    drops: Vec<Vec<(DropReason, u64)>>,
}

impl Model {
    fn carries(&self, port: usize, vlan: u16) -> bool {
        match &self.ports[port].vlan {
            PortVlan::Access(own) => *own == vlan,
            PortVlan::Trunk { vlans, native } => vlans.contains(&vlan) || *native == Some(vlan),
        }
    }

    fn untagged(&self, port: usize) -> Option<u16> {
        match &self.ports[port].vlan {
            PortVlan::Access(own) => Some(*own),
            PortVlan::Trunk { native, .. } => *native,
        }
    }

    /// The VLAN of a frame, its tag's upper bits, and what it is without that tag.
    fn strip(&self, from: usize, frame: &[u8]) -> Result<(u16, u16, Vec<u8>), DropReason> {
        use DropReason::*;
        if frame.len() < 14 || frame[12..14] == [0x81, 0] && frame.len() < 18 {
            return Err(Runt);
        }
        if frame[..5] == [1, 0x80, 0xc2, 0, 0] && frame[5] < 16 {
            return Err(LinkLocal);
        }
        if frame[6] & 1 == 1 || frame[6..12] == [0; 6] {
            return Err(BadSource);
        }
        let other = |at: usize| [[0x88, 0xa8], [0x91, 0], [0x92, 0]].iter().any(|t| frame[at..at + 2] == *t);
        if other(12) {
            return Err(BadTag);
        }
        if frame[12..14] != [0x81, 0] {
            return Ok((self.untagged(from).ok_or(ForeignVlan)?, 0, frame.to_vec()));
        }
        let tag = u16::from(frame[14]) << 8 | u16::from(frame[15]);
        let rest = [&frame[..12], &frame[16..]].concat();
        let nested = other(16) || frame[16..18] == [0x81, 0];
        match tag & 0xfff {
            4095 => Err(BadTag),
            0 if nested => Err(NestedTag),
            0 => Ok((self.untagged(from).ok_or(ForeignVlan)?, tag & 0xf000, rest)),
            _ if matches!(self.ports[from].vlan, PortVlan::Access(_)) => Err(ForeignVlan),
            vlan if self.carries(from, vlan) => Ok((vlan, tag & 0xf000, rest)),
            _ => Err(ForeignVlan),
        }
    }

    fn send(&mut self, from: usize, frame: &[u8]) -> Fate {
        let count = self.ports.len();
        let mut fate = Fate { out: vec![Vec::new(); count], drops: vec![Vec::new(); count] };
        if let Err(reason) = self.try_send(from, frame, &mut fate) {
            fate.drops[from].push((reason, 1));
        }
        fate
    }

    fn try_send(&mut self, from: usize, frame: &[u8], fate: &mut Fate) -> Result<(), DropReason> {
        let (vlan, priority, plain) = self.strip(from, frame)?;
        let address = |at: usize| -> [u8; 6] { plain[at..at + 6].try_into().unwrap() };
        let place = self.heard.entry((vlan, address(6))).or_insert((from, self.now));
        // One that was heard elsewhere in this second stays there.
        if place.0 == from || place.1 < self.now {
            *place = (from, self.now);
        }
        let group = plain[0] & 1 == 1;
        let known = self.heard.get(&(vlan, address(0))).filter(|_| !group);
        let known = known.filter(|(_, when)| self.now - when <= 300).map(|(port, _)| *port);
        let isolated = |port: usize| self.ports[from].isolated && self.ports[port].isolated;
        let to: Vec<usize> = match known.filter(|port| self.carries(*port, vlan)) {
            Some(port) if port == from => return Err(DropReason::SamePort),
            Some(port) if isolated(port) => return Err(DropReason::Isolated),
            Some(port) => vec![port],
            None => {
                let wants = |port: &usize| group || self.ports[*port].unknown_unicast;
                let all = (0..self.ports.len()).filter(|port| *port != from && self.carries(*port, vlan));
                all.filter(wants).filter(|port| !isolated(*port)).collect()
            }
        };
        if to.is_empty() {
            return Err(DropReason::Nowhere);
        }
        for port in to {
            if self.untagged(port) != Some(vlan) {
                let tag = (priority | vlan).to_be_bytes();
                fate.out[port].push([&plain[..12], &[0x81, 0], &tag, &plain[12..]].concat());
            } else if [[0x81, 0], [0x88, 0xa8], [0x91, 0], [0x92, 0]].iter().any(|t| plain[12..14] == *t) {
                fate.drops[port].push((DropReason::HiddenTag, 1));
            } else {
                fate.out[port].push(plain.clone());
            }
        }
        Ok(())
    }
}

fn vlan_number() -> impl Strategy<Value = u16> {
    prop_oneof![8 => 1u16..4, 1 => Just(0u16), 1 => Just(4095u16), 1 => Just(4094u16)]
}

fn an_address() -> impl Strategy<Value = [u8; 6]> {
    prop_oneof![
        12 => (0u8..5).prop_map(mac),
        3 => Just(ALL),
        1 => Just([1, 0, 0x5e, 0, 0, 1]),
        1 => (0u8..17).prop_map(|n| [1, 0x80, 0xc2, 0, 0, n]),
        1 => Just([0; 6]),
    ]
}

prop_compose! {
    fn frames()(
        to in an_address(), from in prop_oneof![9 => (0u8..5).prop_map(mac), 1 => an_address()],
        tags in proptest::collection::vec((
            prop_oneof![8 => Just(VLAN), 1 => Just(0x88a8u16), 1 => Just(0x9100u16)],
            (0u16..16, vlan_number()).prop_map(|(high, vlan)| high << 12 | vlan)
        ), 0..3),
        payload in 0usize..400, cut in prop_oneof![20 => Just(usize::MAX), 1 => 0usize..24]
    ) -> Vec<u8> {
        let mut frame = tagged(to, from, &tags, &(0..payload).map(|i| i as u8).collect::<Vec<_>>());
        frame.truncate(cut);
        frame
    }
}

fn port_options() -> impl Strategy<Value = PortOptions> {
    let vlan = 1u16..4;
    let mode = prop_oneof![
        vlan.clone().prop_map(PortVlan::Access),
        (proptest::collection::vec(vlan.clone(), 1..4), proptest::option::of(vlan))
            .prop_map(|(vlans, native)| PortVlan::Trunk { vlans, native }),
    ];
    (mode, any::<bool>(), any::<bool>()).prop_map(|(vlan, isolated, unknown_unicast)| {
        let storm = RateLimit::NONE;
        PortOptions { vlan, isolated, unknown_unicast, storm, ..PortOptions::default() }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn it_does_what_the_model_does(
        ports in proptest::collection::vec(port_options(), 2..6),
        steps in proptest::collection::vec((any::<prop::sample::Index>(), frames(), prop_oneof![5 => Just(0u64), 3 => Just(2), 1 => Just(150)]), 1..60)
    ) {
        let mut net = Net::new(ports.clone());
        let mut model = Model { ports, heard: HashMap::new(), now: 0 };
        let count = model.ports.len();
        let mut before: Vec<_> = net.ports.iter().map(SwitchPort::statistics).collect();
        for (port, frame, later) in steps {
            let from = port.index(count);
            net.switch.advance(Duration::from_secs(later));
            model.now += later;
            let expected = model.send(from, &frame);
            net.send(from, &frame);
            let mut fate = Fate::default();
            for (port, old) in before.iter_mut().enumerate() {
                fate.out.push(net.get(port));
                let new = net.ports[port].statistics();
                let new_drops = DropReason::ALL.iter().map(|r| (*r, new.dropped(*r) - old.dropped(*r)));
                fate.drops.push(new_drops.filter(|(_, n)| *n > 0).collect());
                *old = new;
            }
            prop_assert_eq!(fate, expected, "frame {:02x?} from port {}", &frame[..frame.len().min(24)], from);
        }
    }

    /// Nothing that a guest can send, with any vnet header, does more than be forwarded or counted.
    #[test]
    fn any_frame_is_forwarded_or_counted(
        sent in proptest::collection::vec((0usize..4, any::<[u8; 12]>(), 0u8..6, frames(), proptest::collection::vec(any::<u8>(), 0..300), any::<bool>()), 1..40)
    ) {
        let mut net = guarded();
        let plug = net.switch.add_port("more", &PortOptions::trunk([1, 2, 3])).and_then(|p| { net.ports.push(p.clone()); p.plug() });
        net.plugs.push(plug.unwrap());
        net.plugs[3].set_takes(Offloads::all());
        let before: Vec<_> = net.ports.iter().map(|port| port.statistics().sent).collect();
        for (port, mut header, kind, frame, more, tame) in sent {
            if tame {
                // Nearly good: a TCP packet, its offloads bent a little.
                let (good, mut whole) = segments(ALL, mac(1), 3000, 1000);
                let at = usize::from(header[0]) % 12;
                let mut bent = good;
                bent[at] = header[1];
                let spot = usize::from(header[2]) % 80;
                whole[spot] ^= header[3] & header[4] & header[5];
                net.send_with(port, if kind == 0 { good } else { bent }, &whole);
            } else {
                header[1] = [0, 1, 4, 5, 0x81, header[1]][usize::from(kind)];
                net.send_with(port, header, &[frame, more].concat());
            }
        }
        for (port, before) in before.iter().enumerate() {
            let sent = net.ports[port].statistics().sent;
            let (mut frames, mut bytes) = (before.frames, before.bytes);
            while let Some((header, frame)) = net.next(port) {
                prop_assert!(port == 3 || header == [0; 12], "what it has not asked for");
                frames += 1;
                bytes += frame.len() as u64;
            }
            prop_assert_eq!((sent.frames, sent.bytes), (frames, bytes));
        }
    }
}
