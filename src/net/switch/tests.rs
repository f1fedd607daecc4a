#![forbid(unsafe_code)]

use std::os::unix::net::UnixDatagram;
use std::sync::atomic::Ordering;

use super::*;
use crate::config::MacAddress;
use crate::config::RateLimit;
use crate::net::pair::Pair;
use crate::sys::io::Pieces;

mod landing;
mod many;
mod model;
mod outside;

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
