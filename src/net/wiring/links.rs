#![forbid(unsafe_code)]
//! Interfaces of the host, as rtnetlink has them.

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::link::{
    AfSpecBridge, BridgeFlag, BridgeVlanInfo, BridgeVlanInfoFlags, InfoBridge, InfoBridgePort, InfoData,
    InfoKind, InfoPortData, InfoVlan, LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::kept::is_setting;
use crate::config::MacAddress;
use crate::sys::netlink::{Refusal, Route};

/// What is to be known of an interface before it is changed, and again when that is undone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Link {
    pub index: u32,
    pub name: String,
    pub up: bool,
    pub mtu: u32,
    pub mac: Option<MacAddress>,
    /// The bridge that it is a port of, by its index.
    pub master: Option<u32>,
    /// What that bridge does with it as with no other.
    pub port: Vec<InfoBridgePort>,
    /// `Some` for a bridge: whether it tells VLANs apart.
    pub filters: Option<bool>,
}

/// A VLAN of a bridge's port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Vlan {
    pub id: u16,
    /// That of frames without a tag.
    pub native: bool,
    /// Its frames go out without a tag.
    pub untagged: bool,
}

/// What is made.
pub(super) enum Kind<'a> {
    Bridge { filters: bool },
    Vlan { id: u16, parent: &'a Link },
}

/// One thing about an interface that is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Setting {
    Up(bool),
    Mtu(u32),
    Mac(MacAddress),
    Master(Option<u32>),
}

/// Fewer than this are too few for IPv6 (RFC 8200, 5), and Linux takes it from the interface.
const MIN_IPV6_MTU: u32 = 1280;

impl Setting {
    /// Whether the interface loses addresses and routes by it.
    pub fn takes_paths(self) -> bool {
        match self {
            Self::Up(up) => !up,
            Self::Mtu(mtu) => mtu < MIN_IPV6_MTU,
            Self::Mac(_) | Self::Master(_) => false,
        }
    }

    /// The same thing as the interface has it now.
    pub fn now(self, link: &Link) -> Option<Self> {
        Some(match self {
            Self::Up(_) => Self::Up(link.up),
            Self::Mtu(_) => Self::Mtu(link.mtu),
            Self::Mac(_) => Self::Mac(link.mac?),
            Self::Master(_) => Self::Master(link.master),
        })
    }
}

pub(super) fn message(index: u32, attributes: Vec<LinkAttribute>) -> LinkMessage {
    let mut message = LinkMessage::default();
    (message.header.index, message.attributes) = (index, attributes);
    message
}

fn link_of(message: &LinkMessage) -> Link {
    let header = &message.header;
    let mut link = Link { index: header.index, up: header.flags.contains(LinkFlags::Up), ..Link::default() };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Address(bytes) => link.mac = bytes[..].try_into().ok().map(MacAddress),
            LinkAttribute::Controller(index) => link.master = Some(*index).filter(|index| *index != 0),
            LinkAttribute::LinkInfo(info) => (link.filters, link.port) = (filters(info), port(info)),
            _ => {}
        }
    }
    link
}

fn filters(info: &[LinkInfo]) -> Option<bool> {
    info.iter().any(|info| matches!(info, LinkInfo::Kind(InfoKind::Bridge))).then(|| {
        info.iter().any(|info| {
            let LinkInfo::Data(InfoData::Bridge(data)) = info else { return false };
            data.contains(&InfoBridge::VlanFiltering(true))
        })
    })
}

fn port(info: &[LinkInfo]) -> Vec<InfoBridgePort> {
    let data = info.iter().find_map(|info| match info {
        LinkInfo::PortData(InfoPortData::BridgePort(data)) => Some(data),
        _ => None,
    });
    data.into_iter().flatten().filter(|attribute| is_setting(attribute)).cloned().collect()
}

/// How interfaces are asked for, and changed.
pub(super) struct Links(pub(super) Route);

impl Links {
    pub fn open() -> std::io::Result<Self> {
        Route::open().map(Self)
    }

    /// ENODEV where there is none.
    pub fn named(&mut self, name: &str) -> Result<Link, Refusal> {
        self.one(message(0, vec![LinkAttribute::IfName(name.to_owned())]))
    }

    pub fn numbered(&mut self, index: u32) -> Result<Link, Refusal> {
        self.one(message(index, Vec::new()))
    }

    fn one(&mut self, message: LinkMessage) -> Result<Link, Refusal> {
        let answers = self.0.ask(RouteNetlinkMessage::GetLink(message), NLM_F_ACK)?;
        let link = answers.iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewLink(message) => Some(link_of(message)),
            _ => None,
        });
        link.ok_or_else(|| std::io::Error::from_raw_os_error(libc::ENODEV).into())
    }

    pub fn add(&mut self, name: &str, kind: &Kind<'_>) -> Result<(), Refusal> {
        let (kind, data, parent) = match kind {
            // Asked for only where it is wanted: not every kernel knows it.
            Kind::Bridge { filters } => {
                let data = if *filters { vec![InfoBridge::VlanFiltering(true)] } else { Vec::new() };
                (InfoKind::Bridge, InfoData::Bridge(data), None)
            }
            Kind::Vlan { id, parent } => {
                (InfoKind::Vlan, InfoData::Vlan(vec![InfoVlan::Id(*id)]), Some(parent.index))
            }
        };
        let info = vec![LinkInfo::Kind(kind), LinkInfo::Data(data)];
        let mut attributes = vec![LinkAttribute::IfName(name.to_owned()), LinkAttribute::LinkInfo(info)];
        attributes.extend(parent.map(LinkAttribute::Link));
        let message = message(0, attributes);
        self.0.tell(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
    }

    pub fn delete(&mut self, index: u32) -> Result<(), Refusal> {
        self.0.tell(RouteNetlinkMessage::DelLink(message(index, Vec::new())), 0)
    }

    pub fn set(&mut self, index: u32, setting: Setting) -> Result<(), Refusal> {
        let mut message = message(index, Vec::new());
        match setting {
            Setting::Up(up) => {
                message.header.change_mask = LinkFlags::Up;
                message.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
            }
            Setting::Mtu(mtu) => message.attributes.push(LinkAttribute::Mtu(mtu)),
            Setting::Mac(mac) => message.attributes.push(LinkAttribute::Address(mac.0.to_vec())),
            Setting::Master(master) => {
                message.attributes.push(LinkAttribute::Controller(master.unwrap_or(0)));
            }
        }
        self.0.tell(RouteNetlinkMessage::SetLink(message), 0)
    }

    /// The VLANs of a port, or of a bridge itself, in order.
    pub fn vlans(&mut self, index: u32) -> Result<Vec<Vlan>, Refusal> {
        let mut ask = message(0, vec![LinkAttribute::ExtMask(vec![LinkExtentMask::Brvlan])]);
        ask.header.interface_family = AddressFamily::Bridge;
        let mut vlans = Vec::new();
        for answer in self.0.dump(&RouteNetlinkMessage::GetLink(ask))? {
            let RouteNetlinkMessage::NewLink(message) = answer else { continue };
            if message.header.index != index {
                continue;
            }
            for attribute in message.attributes {
                let LinkAttribute::AfSpecBridge(entries) = attribute else { continue };
                vlans.extend(entries.iter().filter_map(|entry| match entry {
                    AfSpecBridge::VlanInfo(info) => Some(Vlan {
                        id: info.vid,
                        native: info.flags.contains(BridgeVlanInfoFlags::Pvid),
                        untagged: info.flags.contains(BridgeVlanInfoFlags::Untagged),
                    }),
                    _ => None,
                }));
            }
        }
        vlans.sort_unstable();
        Ok(vlans)
    }

    /// Gives a port, or a bridge itself, these instead of those.
    pub fn set_vlans(&mut self, link: &Link, before: &[Vlan], after: &[Vlan]) -> Result<(), Refusal> {
        let message = |vlans: Vec<Vlan>| {
            let entry = |vlan: &Vlan| {
                let mut flags = BridgeVlanInfoFlags::empty();
                flags.set(BridgeVlanInfoFlags::Pvid, vlan.native);
                flags.set(BridgeVlanInfoFlags::Untagged, vlan.untagged);
                AfSpecBridge::VlanInfo(BridgeVlanInfo { flags, vid: vlan.id })
            };
            let mut entries: Vec<_> = vlans.iter().map(entry).collect();
            if link.filters.is_some() {
                entries.insert(0, AfSpecBridge::Flags(BridgeFlag::LowerDev));
            }
            let mut message = message(link.index, vec![LinkAttribute::AfSpecBridge(entries)]);
            message.header.interface_family = AddressFamily::Bridge;
            message
        };
        let gone: Vec<_> =
            before.iter().filter(|old| !after.iter().any(|new| new.id == old.id)).copied().collect();
        if !gone.is_empty() {
            self.0.tell(RouteNetlinkMessage::DelLink(message(gone)), 0)?;
        }
        let new: Vec<_> = after.iter().filter(|new| !before.contains(new)).copied().collect();
        if !new.is_empty() {
            self.0.tell(RouteNetlinkMessage::SetLink(message(new)), 0)?;
        }
        Ok(())
    }
}
