#![forbid(unsafe_code)]
//! What is made, and how.

use crate::config::MacAddress;
use crate::net::switch::PortVlan;

/// A bridge that is to be made. By default without VLANs; whatever else the kernel does by default, and no spanning tree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BridgeOptions {
    /// It tells VLANs apart (802.1Q): each port is in VLAN 1 until it is told another.
    pub vlan_filtering: bool,
    /// Bytes of a packet without its Ethernet header. Otherwise 1500, or what its smallest port has.
    pub mtu: Option<u32>,
    /// Its own address. Otherwise the kernel takes that of one of its ports, and another when that one goes.
    pub mac: Option<MacAddress>,
}

impl BridgeOptions {
    /// One that tells VLANs apart.
    #[must_use]
    pub fn filtering(mut self) -> Self {
        self.vlan_filtering = true;
        self
    }
}

/// A TAP interface that is to be made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TapOptions {
    /// The bridge that it is put on.
    pub bridge: Option<String>,
    /// The VLANs that it is in on that bridge. Otherwise what the bridge gives to every port: VLAN 1.
    pub vlans: Option<PortVlan>,
    /// It can have several queues ([`NetConfig::queues`](crate::NetConfig::queues)), and is for cards that have.
    pub multi_queue: bool,
    /// The user who may open it without any capability, by number. Otherwise who has `CAP_NET_ADMIN`.
    pub owner: Option<u32>,
    /// A group whose members may.
    pub group: Option<u32>,
    /// Bytes of a packet without its Ethernet header. Otherwise its bridge's.
    pub mtu: Option<u32>,
    /// The host's address on it, of no concern to the guest. Otherwise made up by the kernel.
    pub mac: Option<MacAddress>,
    /// It stays when the [`Wiring`](super::Wiring) is released. Without this it is deleted then, and when the `Wiring` is dropped. To the kernel all
    /// of them are persistent (`TUNSETPERSIST`), since a card attaches to it later: it stays when the process is killed, as a bridge does.
    pub persistent: bool,
}

impl TapOptions {
    /// One on that bridge.
    pub fn on(bridge: impl Into<String>) -> Self {
        Self { bridge: Some(bridge.into()), ..Self::default() }
    }

    /// In one VLAN, of which the guest knows nothing.
    #[must_use]
    pub fn access(mut self, vlan: u16) -> Self {
        self.vlans = Some(PortVlan::Access(vlan));
        self
    }

    /// In several VLANs, which the guest tells apart by their tags.
    #[must_use]
    pub fn trunk(mut self, vlans: impl IntoIterator<Item = u16>) -> Self {
        self.vlans = Some(PortVlan::Trunk { vlans: vlans.into_iter().collect(), native: None });
        self
    }
}
