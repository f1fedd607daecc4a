#![forbid(unsafe_code)]
//! What a network card is to be.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::{PciAddress, RateLimit};
use crate::error::{Error, ErrorKind, Result};

/// A virtio-net card, on a TAP interface or on what is attached to it when the VM is built.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct NetConfig {
    /// The name of an existing TAP interface, 1 to 15 bytes; with a single queue, or with several ([`queues`](Self::queues)). One that belongs to the
    /// user (`ip tuntap add tap0 mode tap user $USER`) needs no capability. `None` where something is attached
    /// with [`VmBuilder::net_fd`](crate::VmBuilder::net_fd),
    /// [`net_port`](crate::VmBuilder::net_port) or [`net_backend`](crate::VmBuilder::net_backend).
    #[cfg_attr(feature = "serde", serde(default))]
    pub tap: Option<String>,
    /// The path of the Unix socket of a network in user space that speaks the protocol of QEMU's `-netdev stream`, as
    /// [passt](https://passt.top) does (`passt --socket PATH`): it needs no privilege, and no interface of the host's. It is looked for
    /// again when it goes away. Instead of `tap`.
    #[cfg_attr(feature = "serde", serde(default))]
    pub stream: Option<PathBuf>,
    /// The guest's MAC address; a stable locally administered one is made from the VM's UUID when absent.
    #[cfg_attr(feature = "serde", serde(default))]
    pub mac: Option<MacAddress>,
    /// Where on the PCI bus; the first free place when absent.
    #[cfg_attr(feature = "serde", serde(default))]
    pub pci: Option<PciAddress>,
    /// The largest packet that the guest's driver is to send, 68 to 65,535 bytes, without the Ethernet header; its
    /// network's. `None`: it takes 1,500.
    #[cfg_attr(feature = "serde", serde(default))]
    pub mtu: Option<u16>,
    /// What the guest shows as the card's speed, in Mbit/s, full duplex. It limits nothing.
    #[cfg_attr(feature = "serde", serde(default))]
    pub speed: Option<u32>,
    /// Pairs of queues, each with a thread of its own, 1 to 16: more than one for a TAP interface that was made so
    /// (`ip tuntap add … multi_queue`), or for as many descriptors of one ([`VmBuilder::net_fd`](crate::VmBuilder::net_fd), once for
    /// each). How many its guest uses is up to it. Default 1.
    #[cfg_attr(feature = "serde", serde(default = "one"))]
    pub queues: u16,
    /// Whether the cable is plugged in; [`Vm::set_link`](crate::Vm::set_link) changes it. Default.
    #[cfg_attr(feature = "serde", serde(default = "plugged_in"))]
    pub link: bool,
    /// How much the guest may receive; operations are frames. [`Vm::set_net_rates`](crate::Vm::set_net_rates) changes it. What is beyond it
    /// waits in the network, and is dropped there when that is full. Default: any amount.
    #[cfg_attr(feature = "serde", serde(default))]
    pub receive_rate: RateLimit,
    /// How much it may send; what is beyond it waits in the guest's queue. Default: any amount.
    #[cfg_attr(feature = "serde", serde(default))]
    pub send_rate: RateLimit,
    /// Whether the host's kernel is to carry the frames itself, between the guest's queues and a TAP interface, named or by descriptor:
    /// vhost-net. Default: no.
    #[cfg_attr(feature = "serde", serde(default))]
    pub vhost: Vhost,
}

/// Whether the host's kernel serves a card on a TAP interface (vhost-net), in a thread of its own for each pair of queues. It counts nothing
/// and knows no addresses: [`NetStatistics`](crate::NetStatistics) has only what it did not carry, and the guest gets whatever comes
/// through the interface. While there is something that it cannot do (a limit, a cable that is not plugged in), and after it has found a
/// queue malformed, vmbed serves the card as it serves others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Vhost {
    /// It does not.
    #[default]
    Off,
    /// It does where it can: where `/dev/vhost-net` is there and may be opened, and the card is on a TAP interface.
    /// [`NetStatistics::vhost`](crate::NetStatistics::vhost) says whether.
    IfPresent,
    /// The VM is not built where it cannot.
    Required,
}

#[cfg(feature = "serde")]
fn one() -> u16 {
    1
}

#[cfg(feature = "serde")]
fn plugged_in() -> bool {
    true
}

impl NetConfig {
    /// A card on the TAP interface `tap`.
    pub fn tap(tap: impl Into<String>) -> Self {
        Self { tap: Some(tap.into()), ..Self::attached() }
    }

    /// A card on the network behind the Unix socket `path`.
    pub fn stream(path: impl Into<PathBuf>) -> Self {
        Self { stream: Some(path.into()), ..Self::attached() }
    }

    /// A card on what is attached when the VM is built.
    pub fn attached() -> Self {
        Self {
            tap: None,
            stream: None,
            mac: None,
            pci: None,
            mtu: None,
            speed: None,
            queues: 1,
            link: true,
            receive_rate: RateLimit::NONE,
            send_rate: RateLimit::NONE,
            vhost: Vhost::Off,
        }
    }
}

/// An Ethernet address, written `52:54:00:12:34:56`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(try_from = "String", into = "String")
)]
pub struct MacAddress(pub [u8; 6]);

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddress {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parse = || -> Option<[u8; 6]> {
            let bytes: Option<Vec<u8>> = text
                .split(':')
                // Digits alone: a number may have a sign.
                .map(|p| (p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit())).then_some(p))
                .map(|p| u8::from_str_radix(p?, 16).ok())
                .collect();
            bytes?.try_into().ok()
        };
        parse().map(Self).ok_or_else(|| {
            let what =
                format!("'{text}' is not a MAC address: write six hexadecimal bytes, 52:54:00:12:34:56");
            Error::new(ErrorKind::InvalidArgument, what)
        })
    }
}

impl TryFrom<String> for MacAddress {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}
