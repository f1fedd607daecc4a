#![forbid(unsafe_code)]
//! Ethernet frames and their 802.1Q tags, parsed once into an owned value. Payloads are not looked at.

use crate::config::MacAddress;

/// Destination, source and type: a frame without a tag.
pub(crate) const UNTAGGED: usize = 14;
/// What a tag adds, behind the two addresses.
pub(crate) const TAG: usize = 4;
/// Where the type, or the tag, is.
pub(crate) const TYPE_AT: usize = 12;

/// The type of a customer's VLAN tag (802.1Q, "C-VLAN").
pub(crate) const DOT1Q: u16 = 0x8100;
pub(crate) const IPV4: u16 = 0x0800;
pub(crate) const ARP: u16 = 0x0806;
pub(crate) const RARP: u16 = 0x8035;
pub(crate) const IPV6: u16 = 0x86dd;

/// The VLANs that there are; 0 says "none", 4095 is reserved.
pub(crate) const VLANS: std::ops::RangeInclusive<u16> = 1..=4094;

/// The front of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ethernet {
    pub destination: MacAddress,
    pub source: MacAddress,
    /// The first tag, if it is of the type that VLANs here have.
    pub tag: Option<Tag>,
    /// The type behind the tag, or a length up to 1500.
    pub ethertype: u16,
}

/// A tag's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tag {
    /// 0 to 7.
    pub priority: u8,
    pub drop_eligible: bool,
    /// 0 to 4095.
    pub vlan: u16,
}

impl Ethernet {
    /// What the first bytes of a frame say; `None` where they end too early.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let (destination, rest) = bytes.split_first_chunk()?;
        let (source, rest) = rest.split_first_chunk()?;
        let (first, rest) = rest.split_first_chunk()?;
        let (destination, source) = (MacAddress(*destination), MacAddress(*source));
        let first = u16::from_be_bytes(*first);
        let (tag, ethertype) = if first == DOT1Q {
            let [c0, c1, t0, t1] = *rest.first_chunk::<TAG>()?;
            (Some(Tag::from_bytes([c0, c1])), u16::from_be_bytes([t0, t1]))
        } else {
            (None, first)
        };
        Some(Self { destination, source, tag, ethertype })
    }

    /// Where the payload begins.
    pub fn len(&self) -> usize {
        UNTAGGED + if self.tag.is_some() { TAG } else { 0 }
    }

    /// Whether another tag follows, or one of a type that VLANs here do not have comes first.
    pub fn has_further_tag(&self) -> bool {
        // Tags of providers' VLANs (802.1ad), and what was used for them before.
        matches!(self.ethertype, DOT1Q | 0x88a8 | 0x9100 | 0x9200)
    }
}

impl Tag {
    pub fn from_bytes(bytes: [u8; 2]) -> Self {
        let value = u16::from_be_bytes(bytes);
        Self { priority: (value >> 13) as u8, drop_eligible: value & 0x1000 != 0, vlan: value & 0xfff }
    }

    pub fn to_bytes(self) -> [u8; 2] {
        let drop_eligible = u16::from(self.drop_eligible) << 12;
        (u16::from(self.priority & 7) << 13 | drop_eligible | self.vlan & 0xfff).to_be_bytes()
    }
}

/// Broadcast and multicast.
pub(crate) fn is_group(address: MacAddress) -> bool {
    address.0[0] & 1 != 0
}

/// What may be the source of a frame.
pub(crate) fn is_station(address: MacAddress) -> bool {
    !is_group(address) && address.0 != [0; 6]
}

/// 01:80:c2:00:00:00 to :0f, which no bridge forwards (802.1Q table 8-1): spanning trees, pause frames, LLDP.
pub(crate) fn is_link_local(address: MacAddress) -> bool {
    matches!(address.0, [1, 0x80, 0xc2, 0, 0, last] if last < 0x10)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(rest: &[u8]) -> Vec<u8> {
        [&[0xff; 6], &[2, 0, 0, 0, 0, 1], rest].concat()
    }

    #[test]
    fn a_frame_is_what_its_first_bytes_say() {
        let plain = Ethernet::parse(&frame(&[8, 0, 0x45])).unwrap();
        assert_eq!(plain.destination, MacAddress([0xff; 6]));
        assert_eq!(plain.source, MacAddress([2, 0, 0, 0, 0, 1]));
        assert_eq!((plain.tag, plain.ethertype, plain.len()), (None, IPV4, 14));
        let tagged = Ethernet::parse(&frame(&[0x81, 0, 0xb0, 10, 0x86, 0xdd])).unwrap();
        let tag = Tag { priority: 5, drop_eligible: true, vlan: 10 };
        assert_eq!((tagged.tag, tagged.ethertype, tagged.len()), (Some(tag), IPV6, 18));
        assert!(!tagged.has_further_tag());
        for inner in [[0x81, 0], [0x88, 0xa8], [0x91, 0], [0x92, 0]] {
            let double = frame(&[&[0x81, 0, 0, 10], &inner[..]].concat());
            assert!(Ethernet::parse(&double).unwrap().has_further_tag());
            let one = Ethernet::parse(&frame(&[&inner[..], &[0, 20, 8, 0]].concat())).unwrap();
            assert_eq!(
                one.has_further_tag(),
                inner != [0x81, 0],
                "the first of its own type is no further one"
            );
        }
    }

    #[test]
    fn what_ends_too_early_is_nothing() {
        let tagged = frame(&[0x81, 0, 0, 10, 8, 0]);
        for len in 0..tagged.len() {
            assert_eq!(Ethernet::parse(&tagged[..len]), None, "{len}");
        }
        assert_eq!(Ethernet::parse(&frame(&[8])), None);
        assert!(Ethernet::parse(&frame(&[8, 0])).is_some());
    }

    #[test]
    fn addresses_have_their_kinds() {
        let last = |n| MacAddress([1, 0x80, 0xc2, 0, 0, n]);
        assert!(is_link_local(last(0)) && is_link_local(last(15)) && !is_link_local(last(16)));
        assert!(is_group(MacAddress([0xff; 6])) && !is_group(MacAddress([2, 0, 0, 0, 0, 1])));
        assert!(is_station(MacAddress([2, 0, 0, 0, 0, 1])));
        assert!(!is_station(MacAddress([0; 6])) && !is_station(MacAddress([3, 0, 0, 0, 0, 1])));
    }

    proptest! {
        #[test]
        fn a_tag_survives_the_way_to_bytes_and_back(bytes in any::<[u8; 2]>()) {
            prop_assert_eq!(Tag::from_bytes(bytes).to_bytes(), bytes);
        }

        #[test]
        fn any_bytes_are_a_frame_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            if let Some(parsed) = Ethernet::parse(&bytes) {
                prop_assert!(parsed.len() <= bytes.len());
                prop_assert_eq!(&parsed.destination.0[..], &bytes[..6]);
                prop_assert_eq!(&bytes[parsed.len() - 2..parsed.len()], &parsed.ethertype.to_be_bytes());
            } else {
                prop_assert!(bytes.len() < 18);
            }
        }
    }
}
