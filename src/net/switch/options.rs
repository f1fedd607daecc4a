#![forbid(unsafe_code)]
//! What a switch and its ports are told to do: plain data, and the rules about it.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::time::Duration;

use crate::config::MacAddress;
use crate::config::RateLimit;
use crate::error::{Error, ErrorKind, FieldError, Result};
use crate::net::ether::{VLANS, is_station};

/// The most addresses that a table can be made for.
const MAX_ADDRESSES: u32 = 1 << 20;

/// What a whole [`Switch`](super::Switch) is told.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct SwitchOptions {
    /// How many addresses are remembered, 8192 unless told otherwise; at most 1,048,576. Each costs 48 bytes.
    pub addresses: u32,
    /// How long an address is remembered that is not heard of, 300 s unless told otherwise.
    pub ageing: Duration,
}

impl Default for SwitchOptions {
    fn default() -> Self {
        Self { addresses: 8192, ageing: Duration::from_secs(300) }
    }
}

impl SwitchOptions {
    pub(super) fn check(&self) -> Result<()> {
        let mut wrong = Vec::new();
        if !(1..=MAX_ADDRESSES).contains(&self.addresses) {
            let problem = format!("is {}", self.addresses);
            wrong.push(FieldError::new("addresses", problem, format!("1 to {MAX_ADDRESSES}")));
        }
        if self.ageing < Duration::from_secs(1) {
            let problem = format!("is {:?}", self.ageing);
            wrong.push(FieldError::new("ageing", problem, "at least a second"));
        }
        refuse("the switch's options", wrong)
    }
}

/// Which VLANs a port carries, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortVlan {
    /// One VLAN, 1 to 4094, of which the station knows nothing: its frames have no tag. Frames that come
    /// with one are dropped, but a priority tag (VLAN 0) is taken off.
    Access(u16),
    /// Several VLANs, told apart by 802.1Q tags.
    Trunk {
        /// Those carried, each 1 to 4094.
        vlans: Vec<u16>,
        /// The VLAN of frames without a tag, which go out without one too. `None` drops them.
        native: Option<u16>,
    },
}

/// What one port of a [`Switch`](super::Switch) is told. Everything may be changed while it works
/// ([`SwitchPort::set_options`](super::SwitchPort::set_options)).
///
/// ```
/// use vmbed::{Guard, PortOptions, RateLimit};
///
/// // A tenant's card: in VLAN 10, with this address and no other, with at most 1 Gbit/s each way.
/// let mut tenant = PortOptions::access(10);
/// tenant.guard = Guard::new("52:54:00:12:34:56".parse()?, ["192.0.2.7".parse()?]);
/// tenant.rate_in = RateLimit::NONE.bytes(125_000_000, 0);
/// tenant.rate_out = tenant.rate_in;
/// tenant.isolated = true;
/// // The way out: VLANs 10 and 20 with tags, and VLAN 1 without.
/// let mut uplink = PortOptions::trunk([10, 20]);
/// uplink.vlan = vmbed::PortVlan::Trunk { vlans: vec![10, 20], native: Some(1) };
/// # Ok::<(), vmbed::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct PortOptions {
    /// VLAN 1 without tags unless told otherwise.
    pub vlan: PortVlan,
    /// Isolated ports reach those that are not, and not each other.
    pub isolated: bool,
    /// Whether frames to addresses that nobody has been heard from go here too; true unless told otherwise.
    /// Broadcasts and multicasts always do.
    pub unknown_unicast: bool,
    /// How many addresses behind this port are remembered, 1024 unless told otherwise. Further ones still send
    /// and receive, the latter like unknown ones; they take no room from other ports.
    pub max_addresses: u32,
    /// How much the station may send. More is dropped.
    pub rate_in: RateLimit,
    /// How much goes to the station. More is dropped.
    pub rate_out: RateLimit,
    /// How much the station may send of what goes to many: broadcasts, multicasts and unknown addresses. 10,000
    /// frames a second in bursts of 2,000 unless told otherwise.
    pub storm: RateLimit,
    /// Who the station may claim to be. Anybody unless told otherwise.
    pub guard: Guard,
}

impl Default for PortOptions {
    fn default() -> Self {
        Self::access(1)
    }
}

impl PortOptions {
    /// A port in one VLAN, without tags.
    pub fn access(vlan: u16) -> Self {
        Self {
            vlan: PortVlan::Access(vlan),
            isolated: false,
            unknown_unicast: true,
            max_addresses: 1024,
            rate_in: RateLimit::NONE,
            rate_out: RateLimit::NONE,
            storm: RateLimit::NONE.ops(10_000, 2_000),
            guard: Guard::default(),
        }
    }

    /// A port in several VLANs, all of them with tags.
    pub fn trunk(vlans: impl IntoIterator<Item = u16>) -> Self {
        let vlan = PortVlan::Trunk { vlans: vlans.into_iter().collect(), native: None };
        Self { vlan, ..Self::default() }
    }

    /// With that guard.
    #[must_use]
    pub fn guard(mut self, guard: Guard) -> Self {
        self.guard = guard;
        self
    }

    pub(super) fn check(&self) -> Result<()> {
        let mut wrong = Vec::new();
        let mut vlan = |field: &str, number: u16| {
            if !VLANS.contains(&number) {
                wrong.push(FieldError::new(field, format!("is VLAN {number}"), "1 to 4094"));
            }
        };
        match &self.vlan {
            PortVlan::Access(number) => vlan("vlan", *number),
            PortVlan::Trunk { vlans, native } => {
                vlans.iter().for_each(|number| vlan("vlan.vlans", *number));
                native.iter().for_each(|number| vlan("vlan.native", *number));
                if vlans.is_empty() && native.is_none() {
                    wrong.push(FieldError::new("vlan.vlans", "is empty", "a trunk carries something"));
                }
            }
        }
        for mac in self.guard.macs.iter().filter(|mac| !is_station(**mac)) {
            wrong.push(FieldError::new("guard.macs", format!("has {mac}"), "a station's own address"));
        }
        for prefix in self.guard.addresses.iter().flatten() {
            let most = if prefix.address.is_ipv4() { 32 } else { 128 };
            if prefix.length > most {
                wrong.push(FieldError::new(
                    "guard.addresses",
                    format!("has {prefix}"),
                    format!("/{most} at most"),
                ));
            }
        }
        let limits = [("rate_in", self.rate_in), ("rate_out", self.rate_out), ("storm", self.storm)];
        for (field, limit) in limits {
            let (bytes, ops) = (limit.bytes_per_second > 0, limit.ops_per_second > 0);
            if bytes && limit.bytes_burst == 0 || ops && limit.ops_burst == 0 {
                wrong.push(FieldError::new(field, "has a burst of 0", "what may pass at once"));
            }
        }
        refuse("the port's options", wrong)
    }
}

fn refuse(what: &str, wrong: Vec<FieldError>) -> Result<()> {
    if wrong.is_empty() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::InvalidArgument, format!("{what} are not valid")).with_fields(wrong))
}

/// Who a station may claim to be: what it sends under another name is dropped.
///
/// Looked at are the Ethernet source, the source of IPv4 and IPv6 packets, the sender in ARP, and who is where
/// in IPv6's neighbour discovery. What a station says before it has an address passes: DHCP requests from
/// 0.0.0.0, ARP probes, duplicate address detection and multicast reports from `::`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Guard {
    /// Its MAC addresses; empty for any. Nobody else on the switch may use them, but ports that list them too.
    pub macs: Vec<MacAddress>,
    /// Its IP addresses, of both families; `None` for any. The link-local addresses that follow from `macs`
    /// (RFC 4291) belong to them.
    pub addresses: Option<Vec<IpPrefix>>,
    /// Whether it may say that it is a router (advertisements and redirects of IPv6).
    pub router: bool,
}

impl Guard {
    /// One card with these IP addresses.
    pub fn new(mac: MacAddress, addresses: impl IntoIterator<Item = IpPrefix>) -> Self {
        Self { macs: vec![mac], addresses: Some(addresses.into_iter().collect()), router: false }
    }

    /// One card with any IP address.
    pub fn mac(mac: MacAddress) -> Self {
        Self { macs: vec![mac], addresses: None, router: false }
    }

    /// Whether it lets everything pass.
    pub(super) fn is_off(&self) -> bool {
        self.macs.is_empty() && self.addresses.is_none()
    }
}

/// An IP address, or all that begin with the same bits: `192.0.2.7`, `192.0.2.0/24`, `2001:db8::/64`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IpPrefix {
    /// The address, or any of them.
    pub address: IpAddr,
    /// How many of its bits count: at most 32 or 128.
    pub length: u8,
}

impl IpPrefix {
    pub(super) fn has_v4(&self, address: Ipv4Addr) -> bool {
        let IpAddr::V4(own) = self.address else { return false };
        let mask = u32::MAX.checked_shl(32 - u32::from(self.length.min(32))).unwrap_or(0);
        (own.to_bits() ^ address.to_bits()) & mask == 0
    }

    pub(super) fn has_v6(&self, address: Ipv6Addr) -> bool {
        let IpAddr::V6(own) = self.address else { return false };
        let mask = u128::MAX.checked_shl(128 - u32::from(self.length.min(128))).unwrap_or(0);
        (own.to_bits() ^ address.to_bits()) & mask == 0
    }
}

impl From<IpAddr> for IpPrefix {
    fn from(address: IpAddr) -> Self {
        Self { address, length: if address.is_ipv4() { 32 } else { 128 } }
    }
}

impl fmt::Display for IpPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

impl FromStr for IpPrefix {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parse = || -> Option<Self> {
            let (address, length) = match text.split_once('/') {
                Some((address, length)) => (address, Some(length)),
                None => (text, None),
            };
            let whole = Self::from(address.parse::<IpAddr>().ok()?);
            let length = length.map_or(Some(whole.length), |l| l.parse().ok())?;
            (length <= whole.length).then_some(Self { length, ..whole })
        };
        parse().ok_or_else(|| {
            let what =
                format!("'{text}' is not an IP address: write 192.0.2.7, 192.0.2.0/24 or 2001:db8::/64");
            Error::new(ErrorKind::InvalidArgument, what)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bad(options: &PortOptions) -> Vec<String> {
        options.check().err().map_or(Vec::new(), |e| e.fields().iter().map(|f| f.field.clone()).collect())
    }

    #[test]
    fn every_bad_option_is_named_at_once() {
        assert!(PortOptions::default().check().is_ok());
        assert!(PortOptions::trunk(1..=4094).check().is_ok());
        let mut options = PortOptions::trunk([0, 7, 4095]);
        options.guard = Guard::new(MacAddress([1, 0, 0, 0, 0, 0]), []);
        options.guard.macs.push(MacAddress([0; 6]));
        options.guard.addresses = Some(vec![IpPrefix { address: [10, 0, 0, 1].into(), length: 33 }]);
        options.storm.ops_burst = 0;
        let macs = ["guard.macs", "guard.macs", "guard.addresses", "storm"];
        assert_eq!(bad(&options), [["vlan.vlans"; 2].as_slice(), &macs].concat());
        assert_eq!(bad(&PortOptions::access(0)), ["vlan"]);
        assert_eq!(bad(&PortOptions::trunk([])), ["vlan.vlans"]);
        options.vlan = PortVlan::Trunk { vlans: Vec::new(), native: Some(4095) };
        assert!(bad(&options).contains(&"vlan.native".to_owned()));
        let switch = SwitchOptions { addresses: 0, ageing: Duration::ZERO };
        assert_eq!(switch.check().unwrap_err().fields().len(), 2);
    }

    #[test]
    fn a_prefix_is_the_addresses_that_begin_with_it() {
        let prefix: IpPrefix = "192.0.2.128/25".parse().unwrap();
        assert!(prefix.has_v4([192, 0, 2, 255].into()) && !prefix.has_v4([192, 0, 2, 127].into()));
        let one: IpPrefix = "192.0.2.7".parse().unwrap();
        assert!(one.has_v4([192, 0, 2, 7].into()) && !one.has_v4([192, 0, 2, 6].into()));
        assert!(!one.has_v6("::192.0.2.7".parse().unwrap()), "another family");
        let all: IpPrefix = "::/0".parse().unwrap();
        assert!(all.has_v6("fe80::1".parse().unwrap()) && !all.has_v4([1, 2, 3, 4].into()));
        let net: IpPrefix = "2001:db8::/64".parse().unwrap();
        assert!(net.has_v6("2001:db8::7".parse().unwrap()) && !net.has_v6("2001:db9::".parse().unwrap()));
        assert_eq!(net.to_string(), "2001:db8::/64");
        for text in ["", "192.0.2", "192.0.2.0/33", "::/129", "192.0.2.0/", "192.0.2.0/-1", "/24", "a/b/c"] {
            assert!(text.parse::<IpPrefix>().is_err(), "{text}");
        }
    }
}
