#![forbid(unsafe_code)]
//! What is inside of a frame, as far as spoof guards and offloads ask: IPv4, IPv6, ARP and neighbour discovery.
//! Pure, and bounded by the bytes that are there.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::ether;
use crate::config::MacAddress;

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ICMPV6: u8 = 58;

/// How many extension headers of IPv6 are walked over.
const MAX_EXTENSIONS: usize = 8;

/// An IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ip {
    pub source: Source,
    /// What the packet carries, behind all extension headers.
    pub protocol: u8,
    /// Where that begins, from the start of the IP header.
    pub transport: usize,
    pub fragment: Fragment,
    /// Bytes of the whole packet, as its header says. 0 for a jumbogram or an offloaded packet that says nothing.
    pub length: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    V4(Ipv4Addr),
    V6(Ipv6Addr),
}

/// Which part of a packet it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fragment {
    Whole,
    First,
    /// What it carries does not begin in it.
    Later,
}

impl Ip {
    /// `bytes` begin with the header of a packet of that Ethernet type; they need not be all of it. `None`
    /// where it is no such header, or goes on behind the bytes.
    pub fn parse(ethertype: u16, bytes: &[u8]) -> Option<Self> {
        match ethertype {
            ether::IPV4 => Self::v4(bytes),
            ether::IPV6 => Self::v6(bytes),
            _ => None,
        }
    }

    fn v4(bytes: &[u8]) -> Option<Self> {
        let header = bytes.first_chunk::<20>()?;
        let transport = usize::from(header[0] & 15) * 4;
        if header[0] >> 4 != 4 || !(20..=bytes.len()).contains(&transport) {
            return None;
        }
        let length = usize::from(u16::from_be_bytes([header[2], header[3]]));
        if length != 0 && length < transport {
            return None;
        }
        let offset = u16::from_be_bytes([header[6], header[7]]);
        let fragment = match (offset & 0x1fff, offset & 0x2000 != 0) {
            (0, false) => Fragment::Whole,
            (0, true) => Fragment::First,
            _ => Fragment::Later,
        };
        let source = Source::V4(Ipv4Addr::new(header[12], header[13], header[14], header[15]));
        Some(Self { source, protocol: header[9], transport, fragment, length })
    }

    fn v6(bytes: &[u8]) -> Option<Self> {
        let header = bytes.first_chunk::<40>()?;
        if header[0] >> 4 != 6 {
            return None;
        }
        let payload = usize::from(u16::from_be_bytes([header[4], header[5]]));
        let length = if payload == 0 { 0 } else { payload + 40 };
        let source = header[8..24].first_chunk::<16>().copied()?;
        let source = Source::V6(source.into());
        let (mut protocol, mut transport, mut fragment) = (header[6], 40, Fragment::Whole);
        for _ in 0..MAX_EXTENSIONS {
            // Hop-by-hop, routing, destination options; fragment.
            match protocol {
                0 | 43 | 60 => {
                    let next = bytes.get(transport..)?.first_chunk::<2>()?;
                    (protocol, transport) = (next[0], transport + 8 + 8 * usize::from(next[1]));
                }
                44 => {
                    let next = bytes.get(transport..)?.first_chunk::<8>()?;
                    let offset = u16::from_be_bytes([next[2], next[3]]);
                    (protocol, transport) = (next[0], transport + 8);
                    if offset >> 3 != 0 {
                        fragment = Fragment::Later;
                        break;
                    }
                    fragment = if offset & 1 == 0 { fragment } else { Fragment::First };
                }
                _ => break,
            }
        }
        let done = fragment == Fragment::Later || !matches!(protocol, 0 | 43 | 44 | 60);
        (done && transport <= bytes.len()).then_some(Self { source, protocol, transport, fragment, length })
    }
}

/// An ARP packet for IPv4 on Ethernet, as far as it speaks of its sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Arp {
    pub sender: MacAddress,
    pub sender_ip: Ipv4Addr,
}

impl Arp {
    /// `None` for anything else than a whole packet of that kind.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let p = bytes.first_chunk::<28>()?;
        // Ethernet, IPv4, and the lengths of their addresses; a request or a reply.
        if p[..6] != [0, 1, 8, 0, 6, 4] || p[6] != 0 || !matches!(p[7], 1 | 2) {
            return None;
        }
        Some(Self {
            sender: MacAddress([p[8], p[9], p[10], p[11], p[12], p[13]]),
            sender_ip: Ipv4Addr::new(p[14], p[15], p[16], p[17]),
        })
    }
}

/// A message of neighbour discovery (RFC 4861), as far as it speaks of its sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Discovery {
    /// It asks for routers, or for a neighbour, and may say where it is itself.
    Asks { link: Option<MacAddress> },
    /// It says that `target` is here.
    Advertises { target: Ipv6Addr, link: Option<MacAddress> },
    /// What only routers say: advertisements and redirects.
    Router,
}

impl Discovery {
    /// `message` is all of an ICMPv6 message. `Ok(None)` when it is none of neighbour discovery.
    ///
    /// # Errors
    /// It is one, and malformed.
    pub fn parse(message: &[u8]) -> Result<Option<Self>, ()> {
        let Some(kind) = message.first() else { return Err(()) };
        // Where the options begin; solicitations may speak of a source (1), advertisements of a target (2).
        let (options, wanted) = match kind {
            133 => (8, 1),
            135 => (24, 1),
            136 => (24, 2),
            134 | 137 => return Ok(Some(Self::Router)),
            _ => return Ok(None),
        };
        let link = link_option(message.get(options..).ok_or(())?, wanted)?;
        if *kind != 136 {
            return Ok(Some(Self::Asks { link }));
        }
        let target = message.get(8..24).and_then(|t| t.first_chunk::<16>()).ok_or(())?;
        Ok(Some(Self::Advertises { target: (*target).into(), link }))
    }
}

/// The link-layer address of option `wanted`.
fn link_option(mut options: &[u8], wanted: u8) -> Result<Option<MacAddress>, ()> {
    let mut found = None;
    while let [kind, units, rest @ ..] = options {
        let length = usize::from(*units) * 8;
        if length == 0 || length > options.len() {
            return Err(());
        }
        if *kind == wanted {
            let address = rest.first_chunk::<6>().ok_or(())?;
            // Twice, so that guard and guest may see different ones: nobody does that in earnest.
            if length != 8 || found.replace(MacAddress(*address)).is_some() {
                return Err(());
            }
        }
        options = &options[length..];
    }
    if options.is_empty() { Ok(found) } else { Err(()) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn v6(next: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0, 0, payload.len() as u8, next, 64];
        packet.extend([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        packet.extend([0xff; 16]);
        [packet, payload.to_vec()].concat()
    }

    fn v4() -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 40, 0, 1, 0, 0, 64, TCP, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        packet.resize(40, 0);
        packet
    }

    #[test]
    fn an_ipv4_header_is_as_long_as_it_says() {
        let ip = Ip::parse(ether::IPV4, &v4()).unwrap();
        assert_eq!(ip.source, Source::V4([10, 0, 0, 1].into()));
        assert_eq!((ip.protocol, ip.transport, ip.length, ip.fragment), (TCP, 20, 40, Fragment::Whole));
        for (at, value) in [(0, 0x44), (0, 0x65), (0, 0x4f), (3, 19)] {
            let mut bad = v4();
            bad[at] = value;
            assert_eq!(Ip::parse(ether::IPV4, &bad), None, "{at} {value:#x}");
        }
        assert!((0..20).all(|len| Ip::parse(ether::IPV4, &v4()[..len]).is_none()));
        let mut part = v4();
        part[6] = 0x20;
        assert_eq!(Ip::parse(ether::IPV4, &part).unwrap().fragment, Fragment::First);
        part[7] = 1;
        assert_eq!(Ip::parse(ether::IPV4, &part).unwrap().fragment, Fragment::Later);
    }

    #[test]
    fn ipv6_extension_headers_are_walked_over_and_no_further_than_the_bytes() {
        let options = [60, 0, 1, 4, 0, 0, 0, 0];
        let packet = v6(0, &[&options[..], &[ICMPV6, 0, 1, 4, 0, 0, 0, 0], &[135; 24]].concat());
        let ip = Ip::parse(ether::IPV6, &packet).unwrap();
        assert_eq!((ip.protocol, ip.transport, ip.length), (ICMPV6, 56, 80));
        assert!((0..56).all(|len| Ip::parse(ether::IPV6, &packet[..len]).is_none()));
        assert!(Ip::parse(ether::IPV6, &packet[..56]).is_some());
        let endless = v6(0, &[0; 200]);
        assert_eq!(Ip::parse(ether::IPV6, &endless), None, "nobody sends that many");
        let first = v6(44, &[UDP, 0, 0, 1, 0, 0, 0, 1]);
        assert_eq!(Ip::parse(ether::IPV6, &first).unwrap().fragment, Fragment::First);
        let later = v6(44, &[60, 0, 0, 9, 0, 0, 0, 1]);
        assert_eq!(Ip::parse(ether::IPV6, &later).unwrap().fragment, Fragment::Later);
        let whole = v6(44, &[UDP, 0, 0, 0, 0, 0, 0, 1]);
        assert_eq!(Ip::parse(ether::IPV6, &whole).unwrap().fragment, Fragment::Whole);
    }

    #[test]
    fn arp_is_for_ipv4_on_ethernet() {
        let mut packet = vec![0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 1, 10, 0, 0, 1];
        packet.resize(28, 0);
        let arp = Arp::parse(&packet).unwrap();
        assert_eq!((arp.sender, arp.sender_ip), (MacAddress([2, 0, 0, 0, 0, 1]), [10, 0, 0, 1].into()));
        assert_eq!(Arp::parse(&packet[..27]), None);
        for (at, value) in [(1, 6), (2, 0x86), (4, 8), (5, 16), (7, 3), (7, 0), (6, 1)] {
            let mut bad = packet.clone();
            bad[at] = value;
            assert_eq!(Arp::parse(&bad), None, "{at}");
        }
    }

    #[test]
    fn neighbour_discovery_says_who_is_where() {
        let link = [2, 0, 0, 0, 0, 1];
        let target = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7];
        let advert = [&[136, 0, 0, 0, 0, 0, 0, 0], &target[..], &[2, 1], &link].concat();
        let found = Discovery::parse(&advert).unwrap().unwrap();
        assert_eq!(found, Discovery::Advertises { target: target.into(), link: Some(MacAddress(link)) });
        for len in 1..advert.len() {
            // At 24 bytes it has no options, and is whole.
            assert_eq!(Discovery::parse(&advert[..len]).is_ok(), len == 24, "{len}");
        }
        let twice = [&advert[..], &[2, 1], &link].concat();
        assert_eq!(Discovery::parse(&twice), Err(()));
        let empty = [&advert[..], &[7, 0]].concat();
        assert_eq!(Discovery::parse(&empty), Err(()), "an option of no length");
        let ask = [&[133, 0, 0, 0, 0, 0, 0, 0, 1, 1], &link[..]].concat();
        assert_eq!(Discovery::parse(&ask), Ok(Some(Discovery::Asks { link: Some(MacAddress(link)) })));
        assert_eq!(Discovery::parse(&[134]), Ok(Some(Discovery::Router)));
        assert_eq!(Discovery::parse(&[137]), Ok(Some(Discovery::Router)));
        assert_eq!(Discovery::parse(&[128, 0]), Ok(None));
        assert_eq!(Discovery::parse(&[]), Err(()));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_packet_or_none(bytes in proptest::collection::vec(any::<u8>(), 0..120), v4 in any::<bool>()) {
            let mut bytes = bytes;
            if let Some(first) = bytes.first_mut() {
                *first = *first & 15 | if v4 { 0x40 } else { 0x60 };
            }
            if let Some(ip) = Ip::parse(if v4 { ether::IPV4 } else { ether::IPV6 }, &bytes) {
                prop_assert!(ip.transport <= bytes.len());
                let _ = Discovery::parse(&bytes[ip.transport..]);
            }
            let _ = (Arp::parse(&bytes), Discovery::parse(&bytes));
        }
    }
}
