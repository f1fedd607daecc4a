#![forbid(unsafe_code)]
//! Which frames the driver wants to see (virtio 1.2, 5.1.6.5.1 to 5.1.6.5.3): by address, and by VLAN.

use crate::config::MacAddress;

/// Addresses of each kind that are kept; with more, all of that kind pass, as in QEMU.
const MOST: usize = 64;
/// Bytes of a frame that it looks at: two addresses, and a tag.
pub(super) const LOOK: usize = 16;
/// The types of a tag (802.1Q, 802.1ad).
const TAGS: [[u8; 2]; 2] = [[0x81, 0x00], [0x88, 0xa8]];

/// What the driver has said of it.
#[derive(Clone, Debug)]
pub(super) struct Filter {
    pub mac: MacAddress,
    /// Until it says otherwise.
    promiscuous: bool,
    all_multicast: bool,
    all_unicast: bool,
    no_multicast: bool,
    no_unicast: bool,
    no_broadcast: bool,
    unicast: Option<Vec<[u8; 6]>>,
    multicast: Option<Vec<[u8; 6]>>,
    /// The VLANs that it wants; `None`: all.
    vlans: Option<Box<[u64; 64]>>,
}

/// A switch of the class VIRTIO_NET_CTRL_RX, in the order of its commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Promiscuous,
    AllMulticast,
    AllUnicast,
    NoMulticast,
    NoUnicast,
    NoBroadcast,
}

impl Filter {
    /// Of a card with that address: everything passes.
    pub fn new(mac: MacAddress) -> Self {
        Self {
            mac,
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: Some(Vec::new()),
            multicast: Some(Vec::new()),
            vlans: None,
        }
    }

    /// The driver can say which VLANs it wants, or not. What it has said stays.
    pub fn agree_on_vlans(&mut self, agreed: bool) {
        if self.vlans.is_some() != agreed {
            self.vlans = agreed.then(|| Box::new([0; 64]));
        }
    }

    pub fn set(&mut self, mode: Mode, on: bool) {
        *match mode {
            Mode::Promiscuous => &mut self.promiscuous,
            Mode::AllMulticast => &mut self.all_multicast,
            Mode::AllUnicast => &mut self.all_unicast,
            Mode::NoMulticast => &mut self.no_multicast,
            Mode::NoUnicast => &mut self.no_unicast,
            Mode::NoBroadcast => &mut self.no_broadcast,
        } = on;
    }

    /// The addresses beside its own; `None` where they are too many.
    pub fn set_tables(&mut self, unicast: Option<Vec<[u8; 6]>>, multicast: Option<Vec<[u8; 6]>>) {
        (self.unicast, self.multicast) = (unicast, multicast);
    }

    /// Whether so many addresses are to be kept.
    pub fn has_room(count: u32) -> bool {
        count as usize <= MOST
    }

    /// Lets a VLAN in or out; whether there is such a one.
    pub fn set_vlan(&mut self, vlan: u16, wanted: bool) -> bool {
        let Some(vlans) = &mut self.vlans else { return false };
        let Some(word) = vlans.get_mut(usize::from(vlan / 64)) else { return false };
        *word = if wanted { *word | 1 << (vlan % 64) } else { *word & !(1 << (vlan % 64)) };
        true
    }

    /// Whether it lets everything pass.
    pub fn is_open(&self) -> bool {
        self.promiscuous && self.vlans.is_none()
    }

    /// Whether a frame that begins so is wanted.
    pub fn passes(&self, frame: &[u8; LOOK]) -> bool {
        let [d0, d1, d2, d3, d4, d5, .., t0, t1, v0, v1] = *frame;
        let vlan = u16::from_be_bytes([v0, v1]) & 0xfff;
        let tagged = TAGS.contains(&[t0, t1]);
        let wanted = |vlans: &[u64; 64]| vlans[usize::from(vlan / 64)] >> (vlan % 64) & 1 == 1;
        if tagged && !self.vlans.as_ref().is_none_or(|vlans| wanted(vlans)) {
            return false;
        }
        let to = [d0, d1, d2, d3, d4, d5];
        let listed = |list: &Option<Vec<[u8; 6]>>| list.as_ref().is_none_or(|list| list.contains(&to));
        match to {
            _ if self.promiscuous => true,
            [0xff, 0xff, 0xff, 0xff, 0xff, 0xff] => !self.no_broadcast,
            _ if d0 & 1 == 1 => !self.no_multicast && (self.all_multicast || listed(&self.multicast)),
            _ => !self.no_unicast && (self.all_unicast || to == self.mac.0 || listed(&self.unicast)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 2];
    const GROUP: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
    const ALL: [u8; 6] = [0xff; 6];

    fn frame(to: [u8; 6], tag: Option<u16>) -> [u8; LOOK] {
        let mut frame = [0; LOOK];
        frame[..6].copy_from_slice(&to);
        frame[12..14].copy_from_slice(&[8, 0]);
        if let Some(tag) = tag {
            frame[12..14].copy_from_slice(&TAGS[usize::from(tag & 1)]);
            frame[14..].copy_from_slice(&tag.to_be_bytes());
        }
        frame
    }

    /// Whether frames to itself, another, a group and all pass.
    fn passes(filter: &Filter) -> [bool; 4] {
        [OWN, OTHER, GROUP, ALL].map(|to| filter.passes(&frame(to, None)))
    }

    #[test]
    fn everything_passes_until_the_driver_says_otherwise() {
        let filter = Filter::new(MacAddress(OWN));
        assert!(filter.is_open());
        assert_eq!(passes(&filter), [true; 4]);
    }

    #[test]
    fn modes_and_tables() {
        let mut filter = Filter::new(MacAddress(OWN));
        filter.set(Mode::Promiscuous, false);
        assert!(!filter.is_open());
        assert_eq!(passes(&filter), [true, false, false, true]);
        for (mode, expected) in [
            (Mode::AllMulticast, [true, false, true, true]),
            (Mode::AllUnicast, [true, true, false, true]),
            (Mode::NoMulticast, [true, false, false, true]),
            (Mode::NoUnicast, [false, false, false, true]),
            (Mode::NoBroadcast, [true, false, false, false]),
        ] {
            filter.set(mode, true);
            assert_eq!(passes(&filter), expected, "{mode:?}");
            filter.set(mode, false);
        }
        filter.set_tables(Some(vec![OTHER]), Some(vec![GROUP]));
        assert_eq!(passes(&filter), [true; 4]);
        filter.set_tables(Some(vec![]), None);
        assert_eq!(passes(&filter), [true, false, true, true], "too many to keep");
        filter.mac = MacAddress(OTHER);
        filter.set_tables(Some(vec![]), Some(vec![]));
        assert_eq!(passes(&filter), [false, true, false, true]);
        assert!(Filter::has_room(64) && !Filter::has_room(65));
    }

    #[test]
    fn vlans_are_let_in_one_by_one() {
        let mut filter = Filter::new(MacAddress(OWN));
        filter.agree_on_vlans(true);
        assert!(!filter.is_open());
        assert!(filter.set_vlan(10, true) && filter.set_vlan(4095, true) && !filter.set_vlan(4096, true));
        // The priority does not matter, and what has no tag passes.
        for (tag, passes) in
            [(None, true), (Some(10), true), (Some(0xe00a), true), (Some(11), false), (Some(4095), true)]
        {
            assert_eq!(filter.passes(&frame(OWN, tag)), passes, "{tag:?}");
        }
        filter.agree_on_vlans(true);
        assert!(filter.passes(&frame(OWN, Some(10))), "what was said stays");
        assert!(filter.set_vlan(10, false));
        assert!(!filter.passes(&frame(OWN, Some(10))));
        assert!(!Filter::new(MacAddress(OWN)).set_vlan(1, true));
    }
}
