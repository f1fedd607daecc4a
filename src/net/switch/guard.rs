#![forbid(unsafe_code)]
//! Whether a station is who it says it is. Pure.

use std::net::{Ipv4Addr, Ipv6Addr};

use super::options::Guard;
use super::statistics::DropReason::{self, *};
use crate::config::MacAddress;
use crate::net::ether::{self, Ethernet};
use crate::net::packet::{Arp, Discovery, Fragment, ICMPV6, Ip, Source, UDP};

impl Guard {
    /// Looks at a frame whose first bytes are `head`, `whole` if they are all of it.
    ///
    /// # Errors
    /// It is to be dropped.
    pub(super) fn look(&self, frame: &Ethernet, head: &[u8], whole: bool) -> Result<(), DropReason> {
        if self.is_off() {
            return Ok(());
        }
        if !self.has_mac(frame.source) {
            return Err(SpoofedMac);
        }
        if frame.has_further_tag() {
            // Whatever is behind it would not be seen.
            return Err(NestedTag);
        }
        let payload = head.get(frame.len()..).unwrap_or(&[]);
        match frame.ethertype {
            ether::ARP => self.arp(payload),
            // Nobody who has an address asks for one in that way.
            ether::RARP => Err(SpoofedArp),
            ether::IPV4 => self.ipv4(payload),
            ether::IPV6 => self.ipv6(payload, whole),
            _ => Ok(()),
        }
    }

    fn has_mac(&self, address: MacAddress) -> bool {
        self.macs.is_empty() || self.macs.contains(&address)
    }

    fn has_v4(&self, address: Ipv4Addr) -> bool {
        self.addresses.as_ref().is_none_or(|all| all.iter().any(|own| own.has_v4(address)))
    }

    fn has_v6(&self, address: Ipv6Addr) -> bool {
        let Some(all) = &self.addresses else { return true };
        all.iter().any(|own| own.has_v6(address)) || self.macs.iter().any(|mac| link_local(*mac) == address)
    }

    fn arp(&self, payload: &[u8]) -> Result<(), DropReason> {
        let arp = Arp::parse(payload).ok_or(SpoofedArp)?;
        // A probe (RFC 5227) asks whether anybody has an address, from none.
        let named = arp.sender_ip.is_unspecified() || self.has_v4(arp.sender_ip);
        if named && self.has_mac(arp.sender) { Ok(()) } else { Err(SpoofedArp) }
    }

    fn ipv4(&self, payload: &[u8]) -> Result<(), DropReason> {
        if self.addresses.is_none() {
            return Ok(());
        }
        let ip = Ip::parse(ether::IPV4, payload).ok_or(SpoofedIpv4)?;
        let Source::V4(source) = ip.source else { return Err(SpoofedIpv4) };
        if self.has_v4(source) && !source.is_unspecified() {
            return Ok(());
        }
        // A DHCP client that has no address yet, to a server anywhere.
        let ports = payload.get(ip.transport..ip.transport + 4);
        let asks = ip.protocol == UDP && ip.fragment == Fragment::Whole && ports == Some(&[0, 68, 0, 67]);
        let everybody = payload.get(16..20) == Some(&[255; 4]);
        if source.is_unspecified() && asks && everybody { Ok(()) } else { Err(SpoofedIpv4) }
    }

    fn ipv6(&self, payload: &[u8], whole: bool) -> Result<(), DropReason> {
        let ip = Ip::parse(ether::IPV6, payload).ok_or(SpoofedIpv6)?;
        let Source::V6(source) = ip.source else { return Err(SpoofedIpv6) };
        let message = payload.get(ip.transport..).filter(|_| ip.protocol == ICMPV6);
        let message = message.filter(|_| ip.fragment != Fragment::Later);
        // What comes behind the packet is not part of the message.
        let message = message.map(|m| &m[..(ip.length.max(ip.transport) - ip.transport).min(m.len())]);
        let kind = message.and_then(|m| m.first().copied());
        let named = if source.is_unspecified() {
            // Duplicate address detection, a search for routers, multicast reports.
            matches!(kind, Some(135 | 133 | 131 | 132 | 143))
        } else {
            self.has_v6(source)
        };
        if !named {
            return Err(SpoofedIpv6);
        }
        // One that ends before it says of which kind it is: a first piece (RFC 7112), or a packet that says that it has no length.
        if ip.protocol == ICMPV6 && ip.fragment != Fragment::Later && kind.is_none() {
            return Err(SpoofedNeighbour);
        }
        let (Some(message), Some(133..=137)) = (message, kind) else { return Ok(()) };
        // In pieces (RFC 6980) or longer than what is seen, it is none of the kind that is let through.
        if ip.fragment != Fragment::Whole || !whole {
            return Err(SpoofedNeighbour);
        }
        let (named, link) = match Discovery::parse(message) {
            Ok(Some(Discovery::Asks { link })) => (true, link),
            Ok(Some(Discovery::Advertises { target, link })) => (self.has_v6(target), link),
            Ok(Some(Discovery::Router)) if self.router => return Ok(()),
            Ok(Some(Discovery::Router)) => return Err(SpoofedRouter),
            Ok(None) => return Ok(()),
            Err(()) => return Err(SpoofedNeighbour),
        };
        let here = link.is_none_or(|link| self.has_mac(link));
        if named && here { Ok(()) } else { Err(SpoofedNeighbour) }
    }
}

/// The address that follows from a card's (RFC 4291, appendix A).
fn link_local(MacAddress([a, b, c, d, e, f]): MacAddress) -> Ipv6Addr {
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 9];

    fn guard() -> Guard {
        let addresses = ["10.0.0.1", "2001:db8::1"].map(|text| text.parse().unwrap());
        Guard::new(MacAddress(MAC), addresses)
    }

    fn look(guard: &Guard, source: [u8; 6], kind: u16, payload: &[u8]) -> Result<(), DropReason> {
        let frame = [&[0xff; 6], &source[..], &kind.to_be_bytes(), payload].concat();
        guard.look(&Ethernet::parse(&frame).unwrap(), &frame[..frame.len().min(256)], frame.len() <= 256)
    }

    fn v4(source: [u8; 4], destination: [u8; 4], protocol: u8, rest: &[u8]) -> Vec<u8> {
        let length = (20 + rest.len()) as u8;
        let head = [0x45, 0, 0, length, 0, 0, 0, 0, 64, protocol, 0, 0];
        [&head[..], &source, &destination, rest].concat()
    }

    fn v6(source: &str, next: u8, rest: &[u8]) -> Vec<u8> {
        let source = source.parse::<Ipv6Addr>().unwrap().octets();
        let [h, l] = (rest.len() as u16).to_be_bytes();
        [&[0x60, 0, 0, 0, h, l, next, 255], &source[..], &[0xff; 16], rest].concat()
    }

    fn arp(sender: [u8; 6], ip: [u8; 4]) -> Vec<u8> {
        [&[0, 1, 8, 0, 6, 4, 0, 1], &sender[..], &ip, &[0; 6], &[10, 0, 0, 7]].concat()
    }

    fn advert(target: &str, link: [u8; 6]) -> Vec<u8> {
        let target = target.parse::<Ipv6Addr>().unwrap().octets();
        [&[136, 0, 0, 0, 0x20, 0, 0, 0], &target[..], &[2, 1], &link].concat()
    }

    #[test]
    fn a_station_speaks_in_its_own_name() {
        let guard = guard();
        let ok = |kind, payload: &[u8]| assert_eq!(look(&guard, MAC, kind, payload), Ok(()), "{payload:?}");
        ok(0x88b5, &[]);
        ok(ether::IPV4, &v4([10, 0, 0, 1], [8; 4], 1, &[]));
        ok(ether::ARP, &arp(MAC, [10, 0, 0, 1]));
        ok(ether::ARP, &arp(MAC, [0; 4]));
        ok(ether::IPV4, &v4([0; 4], [255; 4], UDP, &[0, 68, 0, 67, 0, 8, 0, 0]));
        ok(ether::IPV6, &v6("2001:db8::1", 6, &[]));
        ok(ether::IPV6, &v6("fe80::ff:fe00:1", 17, &[]));
        ok(ether::IPV6, &v6("2001:db8::1", 58, &advert("2001:db8::1", MAC)));
        ok(ether::IPV6, &v6("fe80::ff:fe00:1", 58, &[&[133, 0, 0, 0, 0, 0, 0, 0, 1, 1], &MAC[..]].concat()));
        let probe = [&[135, 0, 0, 0, 0, 0, 0, 0][..], &[9; 16]].concat();
        ok(ether::IPV6, &v6("::", 58, &probe));
        // Behind a hop-by-hop header with the router alert, as multicast reports are.
        ok(ether::IPV6, &v6("::", 0, &[58, 0, 5, 2, 0, 0, 1, 0, 143, 0, 0, 0]));
        ok(ether::IPV6, &v6("2001:db8::1", 58, &[128, 0, 0, 0]));
    }

    #[test]
    fn it_does_not_speak_in_anothers() {
        let guard = guard();
        let bad = |source, kind, payload: &[u8], why| {
            assert_eq!(look(&guard, source, kind, payload), Err(why), "{payload:?}");
        };
        bad(OTHER, 0x88b5, &[], SpoofedMac);
        bad(MAC, ether::IPV4, &v4([10, 0, 0, 2], [8; 4], 1, &[]), SpoofedIpv4);
        bad(MAC, ether::IPV4, &[0x45], SpoofedIpv4);
        bad(MAC, ether::IPV4, &v4([0; 4], [255; 4], UDP, &[0, 67, 0, 68, 0, 8, 0, 0]), SpoofedIpv4);
        bad(MAC, ether::IPV4, &v4([0; 4], [10, 0, 0, 9], UDP, &[0, 68, 0, 67]), SpoofedIpv4);
        bad(MAC, ether::IPV4, &v4([0; 4], [255; 4], 6, &[0, 68, 0, 67]), SpoofedIpv4);
        bad(MAC, ether::ARP, &arp(OTHER, [10, 0, 0, 1]), SpoofedArp);
        bad(MAC, ether::ARP, &arp(MAC, [10, 0, 0, 2]), SpoofedArp);
        bad(MAC, ether::ARP, &arp(MAC, [10, 0, 0, 1])[..27], SpoofedArp);
        bad(MAC, ether::RARP, &arp(MAC, [10, 0, 0, 1]), SpoofedArp);
        bad(MAC, ether::IPV6, &v6("2001:db8::2", 6, &[]), SpoofedIpv6);
        bad(MAC, ether::IPV6, &v6("fe80::1", 6, &[]), SpoofedIpv6);
        bad(MAC, ether::IPV6, &v6("::", 6, &[]), SpoofedIpv6);
        bad(MAC, ether::IPV6, &[0x60; 20], SpoofedIpv6);
        bad(MAC, ether::IPV6, &v6("2001:db8::1", 58, &advert("2001:db8::2", MAC)), SpoofedNeighbour);
        bad(MAC, ether::IPV6, &v6("2001:db8::1", 58, &advert("2001:db8::1", OTHER)), SpoofedNeighbour);
        bad(MAC, ether::IPV6, &v6("2001:db8::1", 58, &advert("2001:db8::1", MAC)[..30]), SpoofedNeighbour);
        bad(MAC, ether::IPV6, &v6("fe80::ff:fe00:1", 58, &[134; 16]), SpoofedRouter);
        bad(MAC, ether::IPV6, &v6("fe80::ff:fe00:1", 58, &[137; 40]), SpoofedRouter);
        let piece = [&[58, 0, 0, 1, 0, 0, 0, 1], &advert("2001:db8::1", MAC)[..]].concat();
        bad(MAC, ether::IPV6, &v6("2001:db8::1", 44, &piece), SpoofedNeighbour);
        let long = [&advert("2001:db8::1", MAC)[..], &[14, 30], &[0; 238]].concat();
        bad(MAC, ether::IPV6, &v6("2001:db8::1", 58, &long), SpoofedNeighbour);
        for inner in [[0x81, 0], [0x88, 0xa8]] {
            let kind = u16::from_be_bytes(inner);
            let tagged =
                [&[0, 10, inner[0], inner[1], 0, 20, 8, 0], &v4([10, 0, 0, 2], [8; 4], 1, &[])[..]].concat();
            bad(MAC, ether::DOT1Q, &tagged, NestedTag);
            if kind != ether::DOT1Q {
                bad(MAC, kind, &tagged[4..], NestedTag);
            }
        }
    }

    #[test]
    fn a_message_that_does_not_say_what_it_is_passes_for_nothing_else() {
        let guard = guard();
        let advert = advert("2001:db8::2", OTHER);
        // Hop-by-hop options are all that such a packet needs for the kernel to look at what is behind.
        let hop = [&[58, 0, 1, 4, 0, 0, 0, 0], &advert[..]].concat();
        let mut long = v6("2001:db8::1", 0, &hop);
        long[4..6].fill(0);
        // A first piece of 0 bytes, with padding that reads as an echo.
        let first = v6("2001:db8::1", 44, &[58, 0, 0, 1, 0, 0, 0, 9]);
        let padded = [&first[..], &[128; 16]].concat();
        for packet in [&long, &first, &padded] {
            assert_eq!(look(&guard, MAC, ether::IPV6, packet), Err(SpoofedNeighbour), "{packet:?}");
        }
        let echo = v6("2001:db8::1", 44, &[58, 0, 0, 1, 0, 0, 0, 9, 128, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(look(&guard, MAC, ether::IPV6, &echo), Ok(()));
    }

    #[test]
    fn a_guard_looks_at_what_it_knows_only() {
        let mac = Guard::mac(MacAddress(MAC));
        assert_eq!(look(&mac, MAC, ether::IPV4, &v4([9; 4], [8; 4], 1, &[])), Ok(()));
        assert_eq!(look(&mac, MAC, ether::ARP, &arp(MAC, [9; 4])), Ok(()));
        assert_eq!(look(&mac, MAC, ether::ARP, &arp(OTHER, [9; 4])), Err(SpoofedArp));
        assert_eq!(
            look(&mac, MAC, ether::IPV6, &v6("2001:db8::9", 58, &advert("::9", OTHER))),
            Err(SpoofedNeighbour)
        );
        let router = Guard { router: true, ..guard() };
        assert_eq!(look(&router, MAC, ether::IPV6, &v6("fe80::ff:fe00:1", 58, &[134; 16])), Ok(()));
        let none = Guard::default();
        assert_eq!(look(&none, OTHER, ether::IPV6, &v6("fe80::1", 58, &[134; 16])), Ok(()));
        let addresses = Guard { macs: Vec::new(), ..guard() };
        assert_eq!(look(&addresses, OTHER, ether::IPV4, &v4([10, 0, 0, 1], [8; 4], 1, &[])), Ok(()));
        assert_eq!(look(&addresses, OTHER, ether::IPV6, &v6("fe80::ff:fe00:1", 6, &[])), Err(SpoofedIpv6));
    }
}
