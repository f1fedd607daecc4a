#![forbid(unsafe_code)]
//! What a port has carried, and what it has not, with the reason.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// Names each reason once: its variant, its number in C, its name, and what it means.
macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $text:literal;)*) => {
        /// Why a frame was dropped. Each is counted at the port that it came from, but those that say "to this
        /// port", which are counted there.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        #[repr(u8)]
        pub enum DropReason {
            $($(#[$doc])* $name = $number,)*
        }

        impl DropReason {
            /// Every reason, by its number.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// A short name, stable, for metrics.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

reasons! {
    /// It ends before its headers do.
    Runt = 0, "runt";
    /// It is longer than an IP packet of 64 KiB with two tags.
    TooLong = 1, "too-long";
    /// What its vnet header asks for cannot be done on it.
    BadOffload = 2, "bad-offload";
    /// Its source is no station: a multicast address, or zero.
    BadSource = 3, "bad-source";
    /// It is for the other end of the cable only: spanning trees, pause frames, LLDP.
    LinkLocal = 4, "link-local";
    /// Its tag names VLAN 4095, or is no 802.1Q tag.
    BadTag = 5, "bad-tag";
    /// A second tag, where one would come to the front or hide what a guard has to see.
    NestedTag = 6, "nested-tag";
    /// Its VLAN is not carried by the port that it came from; on an access port, it has a tag at all.
    ForeignVlan = 7, "foreign-vlan";
    /// Its source is not a MAC address of this port's guard.
    SpoofedMac = 8, "spoofed-mac";
    /// Its source is not an IPv4 address of this port's guard, or there is none to be seen.
    SpoofedIpv4 = 9, "spoofed-ipv4";
    /// Its source is not an IPv6 address of this port's guard, or there is none to be seen.
    SpoofedIpv6 = 10, "spoofed-ipv6";
    /// ARP or RARP in another's name, or malformed.
    SpoofedArp = 11, "spoofed-arp";
    /// Neighbour discovery in another's name, or malformed.
    SpoofedNeighbour = 12, "spoofed-neighbour";
    /// It says that it is a router, and must not.
    SpoofedRouter = 13, "spoofed-router";
    /// Its source belongs to another port, by that port's guard.
    ForeignMac = 14, "foreign-mac";
    /// Beyond `rate_in`.
    RateIn = 15, "rate-in";
    /// Beyond `storm`.
    Storm = 16, "storm";
    /// Whom it is for is where it came from.
    SamePort = 17, "same-port";
    /// Both ports are isolated.
    Isolated = 18, "isolated";
    /// There is no port that it could go to.
    Nowhere = 19, "nowhere";
    /// It came from a port to which others are mirrored.
    Monitor = 20, "monitor";
    /// It came from a port that was removed.
    Removed = 21, "removed";
    /// To this port, beyond `rate_out`.
    RateOut = 22, "rate-out";
    /// To this port, whose station takes them too slowly.
    QueueFull = 23, "queue-full";
    /// To this port, where a second tag would have come to the front.
    HiddenTag = 24, "hidden-tag";
    /// To this port, whose interface of the host's did not take it, or is gone.
    Uplink = 25, "uplink";
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

pub(super) const REASONS: usize = DropReason::ALL.len();

/// Frames, and their bytes from the Ethernet header on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Traffic {
    /// One of several segments that were not cut counts once.
    pub frames: u64,
    /// Without vnet headers, checksum and what else is on a wire.
    pub bytes: u64,
}

/// What a port has carried since it was added.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PortStatistics {
    /// What its station has sent, also what was dropped.
    pub received: Traffic,
    /// What was put into its queue for its station.
    pub sent: Traffic,
    /// What was copied to it because other ports are mirrored to it; not counted in `sent`.
    pub mirrored: Traffic,
    /// Addresses that were not remembered, since the port has `max_addresses` already or the table is full
    /// there: once for each frame from one of them.
    pub unlearned: u64,
    /// Addresses that were another port's before.
    pub moved: u64,
    /// Addresses remembered now.
    pub addresses: u32,
    drops: [u64; REASONS],
}

impl PortStatistics {
    /// Frames dropped for that reason.
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.drops[reason as usize]
    }

    /// Every reason that was met, with how often.
    pub fn drops(&self) -> impl Iterator<Item = (DropReason, u64)> + '_ {
        DropReason::ALL.iter().map(|reason| (*reason, self.dropped(*reason))).filter(|(_, count)| *count > 0)
    }
}

/// The counters behind it.
#[derive(Default)]
pub(super) struct Counters {
    pub received: Pair,
    pub sent: Pair,
    pub mirrored: Pair,
    pub unlearned: AtomicU64,
    pub moved: AtomicU64,
    drops: [AtomicU64; REASONS],
}

#[derive(Default)]
pub(super) struct Pair(AtomicU64, AtomicU64);

impl Pair {
    pub fn add(&self, bytes: usize) {
        self.0.fetch_add(1, Ordering::Relaxed);
        self.1.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn get(&self) -> Traffic {
        Traffic { frames: self.0.load(Ordering::Relaxed), bytes: self.1.load(Ordering::Relaxed) }
    }
}

impl Counters {
    pub fn drop(&self, reason: DropReason) {
        self.drops[reason as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub fn read(&self, addresses: u32) -> PortStatistics {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        PortStatistics {
            received: self.received.get(),
            sent: self.sent.get(),
            mirrored: self.mirrored.get(),
            unlearned: get(&self.unlearned),
            moved: get(&self.moved),
            addresses,
            drops: std::array::from_fn(|i| get(&self.drops[i])),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_numbered_and_named_once() {
        for (i, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, i);
            assert!(!DropReason::ALL[..i].iter().any(|other| other.name() == reason.name()));
        }
    }
}
