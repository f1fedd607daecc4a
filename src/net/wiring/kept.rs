#![forbid(unsafe_code)]
//! What an interface loses when it is taken from its bridge, or set down, so that it can be given back.

use std::net::IpAddr;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressProtocol,
};
use netlink_packet_route::link::{InfoBridgePort, InfoPortData, InfoPortKind, LinkAttribute, LinkInfo};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteNextHopFlags, RouteProtocol,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::links::{Link, Links, Vlan, message};
use crate::sys::netlink::Refusal;

/// A port of a bridge.
#[derive(Debug)]
pub(super) struct Port {
    settings: Vec<InfoBridgePort>,
    vlans: Vec<Vlan>,
    pub entries: Vec<Entry>,
}

/// That an address is behind a port, as somebody said.
pub(super) type Entry = NeighbourMessage;

/// How packets get to an interface and from it.
#[derive(Debug)]
pub(super) struct Paths {
    addresses: Vec<AddressMessage>,
    routes: Vec<RouteMessage>,
}

/// What somebody has set, and what the kernel takes back; neither what it finds out by itself, nor its timers.
pub(super) fn is_setting(attribute: &InfoBridgePort) -> bool {
    use InfoBridgePort as P;
    matches!(
        attribute,
        P::Priority(_)
            | P::Cost(_)
            | P::HairpinMode(_)
            | P::Guard(_)
            | P::Protect(_)
            | P::FastLeave(_)
            | P::Learning(_)
            | P::UnicastFlood(_)
            | P::ProxyARP(_)
            | P::ProxyARPWifi(_)
            | P::MulticastRouter(_)
            | P::MulticastFlood(_)
            | P::MulticastToUnicast(_)
            | P::VlanTunnel(_)
            | P::BroadcastFlood(_)
            | P::GroupFwdMask(_)
            | P::NeighSupress(_)
            | P::Isolated(_)
            | P::BackupPort(_)
            | P::MulticastEhtHostsLimit(_)
            | P::Locked(_)
            | P::Mab(_)
            | P::MulticastMaxGroups(_)
            | P::NeighVlanSuppress(_)
            | P::BackupNextHopId(_)
            | P::NeighForwardGrat(_)
    )
}

impl Links {
    pub fn port(&mut self, link: &Link) -> Result<Port, Refusal> {
        let (vlans, entries) = (self.vlans(link.index)?, self.entries(link)?);
        Ok(Port { settings: link.port.clone(), vlans, entries })
    }

    /// Gives it back to a port that is on its bridge again, as the kernel makes one; but not yet its entries.
    pub fn restore_port(&mut self, index: u32, port: &Port) -> Result<(), Refusal> {
        let link = self.numbered(index)?;
        // What is as it was is not said: older kernels do not know all of it.
        let settings: Vec<_> = port.settings.iter().filter(|s| !link.port.contains(s)).cloned().collect();
        if !settings.is_empty() {
            let data = InfoPortData::BridgePort(settings);
            let info = vec![LinkInfo::PortKind(InfoPortKind::Bridge), LinkInfo::PortData(data)];
            let message = message(index, vec![LinkAttribute::LinkInfo(info)]);
            self.0.tell(RouteNetlinkMessage::NewLink(message), 0)?;
        }
        let now = self.vlans(index)?;
        self.set_vlans(&link, &now, &port.vlans)
    }

    /// Gives a port its entries back, but those of VLANs that it is in no more.
    pub fn restore_entries(&mut self, index: u32, entries: &[Entry]) -> Result<(), Refusal> {
        let vlans = self.vlans(index)?;
        let fits = |attribute: &NeighbourAttribute| match attribute {
            NeighbourAttribute::Vlan(id) => vlans.iter().any(|vlan| vlan.id == *id),
            _ => true,
        };
        entries.iter().filter(|entry| entry.attributes.iter().all(fits)).try_for_each(|entry| {
            let entry = RouteNetlinkMessage::NewNeighbour(entry.clone());
            unless_there(self.0.tell(entry, NLM_F_CREATE | NLM_F_EXCL))
        })
    }

    /// The entries of the bridge's table that stay until somebody takes them away.
    fn entries(&mut self, link: &Link) -> Result<Vec<Entry>, Refusal> {
        // The bridge has that in its table by itself.
        let own = link.mac.map(|mac| NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
        let (index, mut ask) = (link.index, NeighbourMessage::default());
        (ask.header.family, ask.header.ifindex) = (AddressFamily::Bridge, index);
        let mut entries = Vec::new();
        for answer in self.0.dump(&RouteNetlinkMessage::GetNeighbour(ask))? {
            let RouteNetlinkMessage::NewNeighbour(mut entry) = answer else { continue };
            let NeighbourMessage { header, attributes, .. } = &mut entry;
            let stays = matches!(header.state, NeighbourState::Permanent | NeighbourState::Noarp);
            // The interface keeps what is in a table of its own.
            let kept = header.flags.contains(NeighbourFlags::Own)
                || own.as_ref().is_some_and(|own| attributes.contains(own));
            if header.ifindex != index || !stays || kept {
                continue;
            }
            header.flags &= NeighbourFlags::Sticky | NeighbourFlags::ExtLearned;
            header.flags |= NeighbourFlags::Controller;
            attributes.retain(|attribute| {
                matches!(attribute, NeighbourAttribute::LinkLayerAddress(_) | NeighbourAttribute::Vlan(_))
            });
            entries.push(entry);
        }
        Ok(entries)
    }

    pub fn paths(&mut self, index: u32) -> Result<Paths, Refusal> {
        Ok(Paths { addresses: self.addresses(index)?, routes: self.routes(index)? })
    }

    /// Gives them back to an interface that is up again, as far as nobody else has.
    pub fn restore_paths(&mut self, paths: &Paths) -> Result<(), Refusal> {
        for address in &paths.addresses {
            self.restore_address(address, paths.routes.iter().any(|route| begins_at(route, address)))?;
        }
        // One may lead to where another one's gateway is.
        let mut missing: Vec<_> = paths.routes.iter().collect();
        loop {
            let (before, mut refused) = (missing.len(), Ok(()));
            missing.retain(|route| {
                let route = RouteNetlinkMessage::NewRoute((*route).clone());
                let result = unless_there(self.0.tell(route, NLM_F_CREATE | NLM_F_EXCL));
                let stays = result.is_err();
                if stays {
                    refused = result;
                }
                stays
            });
            if missing.is_empty() || missing.len() == before {
                return refused;
            }
        }
    }

    /// The kernel takes no route from an address that it still checks for duplicates: one of those is had without a check.
    fn restore_address(&mut self, address: &AddressMessage, is_source: bool) -> Result<(), Refusal> {
        let mut first = address.clone();
        if is_source {
            first.header.flags |= AddressHeaderFlags::Nodad;
            for attribute in &mut first.attributes {
                if let AddressAttribute::Flags(flags) = attribute {
                    *flags |= AddressFlags::Nodad;
                }
            }
        }
        let first_is_all = first == *address;
        match self.0.tell(RouteNetlinkMessage::NewAddress(first), NLM_F_CREATE | NLM_F_EXCL) {
            Ok(()) if !first_is_all => {
                self.0.tell(RouteNetlinkMessage::NewAddress(address.clone()), NLM_F_REPLACE)
            }
            result => unless_there(result),
        }
    }

    /// IPv6 addresses that somebody gave it; IPv4's stay by themselves, and link-local ones come by themselves.
    fn addresses(&mut self, index: u32) -> Result<Vec<AddressMessage>, Refusal> {
        let mut ask = AddressMessage::default();
        ask.header.family = AddressFamily::Inet6;
        let mut addresses = Vec::new();
        for answer in self.0.dump(&RouteNetlinkMessage::GetAddress(ask))? {
            let RouteNetlinkMessage::NewAddress(mut address) = answer else { continue };
            let AddressMessage { header, attributes, .. } = &mut address;
            let by_itself = AddressAttribute::Protocol(AddressProtocol::LinkLocal);
            let given =
                header.flags.contains(AddressHeaderFlags::Permanent) && !attributes.contains(&by_itself);
            if header.index != index || !given {
                continue;
            }
            attributes.retain(|attribute| !matches!(attribute, AddressAttribute::Other(_)));
            addresses.push(address);
        }
        Ok(addresses)
    }

    /// The routes through it, but those that come with its addresses, and from routers.
    fn routes(&mut self, index: u32) -> Result<Vec<RouteMessage>, Refusal> {
        let mut routes = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut ask = RouteMessage::default();
            ask.header.address_family = family;
            for answer in self.0.dump(&RouteNetlinkMessage::GetRoute(ask))? {
                if let RouteNetlinkMessage::NewRoute(route) = answer
                    && is_lost(&route, index)
                {
                    routes.push(as_said(route));
                }
            }
        }
        Ok(routes)
    }
}

fn is_lost(route: &RouteMessage, index: u32) -> bool {
    let by_itself = matches!(
        route.header.protocol,
        RouteProtocol::Kernel | RouteProtocol::Ra | RouteProtocol::IcmpRedirect
    );
    // What goes through a next hop object has lost that.
    let through = |attribute: &RouteAttribute| match attribute {
        RouteAttribute::Oif(through) => *through == index,
        RouteAttribute::MultiPath(hops) => hops.iter().any(|hop| hop.interface_index == index),
        _ => false,
    };
    let object = |attribute: &RouteAttribute| matches!(attribute, RouteAttribute::NhId(_));
    !by_itself && route.attributes.iter().any(through) && !route.attributes.iter().any(object)
}

/// Whether what goes that way has that address as its source.
fn begins_at(route: &RouteMessage, address: &AddressMessage) -> bool {
    let mut sources = route.attributes.iter().filter_map(|attribute| match attribute {
        RouteAttribute::PrefSource(RouteAddress::Inet6(source)) => Some(IpAddr::V6(*source)),
        _ => None,
    });
    sources.any(|source| {
        let of = |a: &AddressAttribute| {
            matches!(a, AddressAttribute::Address(ip) | AddressAttribute::Local(ip) if *ip == source)
        };
        address.attributes.iter().any(of)
    })
}

/// Without what the kernel only tells.
fn as_said(mut route: RouteMessage) -> RouteMessage {
    route.header.flags &= RouteFlags::Onlink;
    route.attributes.retain(|attribute| {
        use RouteAttribute as A;
        !matches!(attribute, A::CacheInfo(_) | A::Expires(_) | A::MfcStats(_))
    });
    for attribute in &mut route.attributes {
        let RouteAttribute::MultiPath(hops) = attribute else { continue };
        hops.iter_mut().for_each(|hop| hop.flags &= RouteNextHopFlags::Onlink);
    }
    route
}

fn unless_there(result: Result<(), Refusal>) -> Result<(), Refusal> {
    match result {
        Err(refusal) if refusal.error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        result => result,
    }
}
