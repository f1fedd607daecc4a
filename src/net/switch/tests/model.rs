#![forbid(unsafe_code)]
//! The switch against a bridge as one would write it down, and against whatever a guest may send.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

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
