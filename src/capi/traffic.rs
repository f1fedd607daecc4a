//! What a port of a switch has carried, and what it has not.

use std::ffi::{CStr, c_char};

use super::arguments::{Sized_, fill};
use super::error::vmbed_error;
use super::handle;
use super::switch::vmbed_port;
use super::{answer, call};
#[cfg(test)]
use crate::net::switch::DropReason;

/// How many reasons there are for a frame to be dropped.
pub const VMBED_DROP_REASONS: usize = 26;
/// The frame ends before its headers do.
pub const VMBED_DROP_RUNT: u32 = 0;
/// The frame is longer than an IP packet of 64 KiB with two tags.
pub const VMBED_DROP_TOO_LONG: u32 = 1;
/// What its vnet header asks for cannot be done on it.
pub const VMBED_DROP_BAD_OFFLOAD: u32 = 2;
/// Its source is no station: a multicast address, or zero.
pub const VMBED_DROP_BAD_SOURCE: u32 = 3;
/// The frame is for the other end of the cable only: spanning trees, pause frames, LLDP.
pub const VMBED_DROP_LINK_LOCAL: u32 = 4;
/// Its tag names VLAN 4095, or is no 802.1Q tag.
pub const VMBED_DROP_BAD_TAG: u32 = 5;
/// A second tag, where one would come to the front or hide what a guard has to see.
pub const VMBED_DROP_NESTED_TAG: u32 = 6;
/// Its VLAN is not carried by the port that it came from; on an access port, it has a tag at all.
pub const VMBED_DROP_FOREIGN_VLAN: u32 = 7;
/// Its source is not a MAC address of this port's guard.
pub const VMBED_DROP_SPOOFED_MAC: u32 = 8;
/// Its source is not an IPv4 address of this port's guard, or there is none to be seen.
pub const VMBED_DROP_SPOOFED_IPV4: u32 = 9;
/// Its source is not an IPv6 address of this port's guard, or there is none to be seen.
pub const VMBED_DROP_SPOOFED_IPV6: u32 = 10;
/// ARP or RARP in another's name, or malformed.
pub const VMBED_DROP_SPOOFED_ARP: u32 = 11;
/// Neighbour discovery in another's name, or malformed.
pub const VMBED_DROP_SPOOFED_NEIGHBOUR: u32 = 12;
/// The frame says that its sender is a router, and must not.
pub const VMBED_DROP_SPOOFED_ROUTER: u32 = 13;
/// Its source belongs to another port, by that port's guard.
pub const VMBED_DROP_FOREIGN_MAC: u32 = 14;
/// Beyond its `rate_in`.
pub const VMBED_DROP_RATE_IN: u32 = 15;
/// Beyond its `storm`.
pub const VMBED_DROP_STORM: u32 = 16;
/// Whom it is for is where it came from.
pub const VMBED_DROP_SAME_PORT: u32 = 17;
/// Both ports are isolated.
pub const VMBED_DROP_ISOLATED: u32 = 18;
/// There is no port that it could go to.
pub const VMBED_DROP_NOWHERE: u32 = 19;
/// The frame came from a port to which others are mirrored.
pub const VMBED_DROP_MONITOR: u32 = 20;
/// The frame came from a port that was removed.
pub const VMBED_DROP_REMOVED: u32 = 21;
/// To this port, beyond its `rate_out`.
pub const VMBED_DROP_RATE_OUT: u32 = 22;
/// To this port, whose station takes them too slowly.
pub const VMBED_DROP_QUEUE_FULL: u32 = 23;
/// To this port, where a second tag would have come to the front.
pub const VMBED_DROP_HIDDEN_TAG: u32 = 24;
/// To this port, whose interface of the host's did not take it, or is gone.
pub const VMBED_DROP_UPLINK: u32 = 25;

/// What a port has carried since it was added. Bytes are from the Ethernet header on; one of several segments that were not
/// cut counts once.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct vmbed_port_statistics {
    /// sizeof(struct vmbed_port_statistics)
    pub size: usize,
    /// Frames that its station has sent, also those that were dropped.
    pub received_frames: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Frames that were put into its queue for its station.
    pub sent_frames: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Frames that were copied to it because other ports are mirrored to it; not counted as sent.
    pub mirrored_frames: u64,
    /// Their bytes.
    pub mirrored_bytes: u64,
    /// Addresses that were not remembered, since the port has `max_addresses` already or the table is full there: once for
    /// each frame from one of them.
    pub unlearned: u64,
    /// Addresses that were another port's before.
    pub moved: u64,
    /// Addresses remembered now.
    pub addresses: u64,
    /// Frames that were dropped, by VMBED_DROP_*.
    pub dropped: [u64; 26],
}

// SAFETY: it is repr(C) with its size first, and all zeroes is a value.
unsafe impl Sized_ for vmbed_port_statistics {
    const FIRST: usize = size_of::<Self>();
    const NAME: &'static str = "vmbed_port_statistics";
}

/// Fills `statistics`, whose size is set. Also of a port that was removed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_port_get_statistics(
    port: *const vmbed_port,
    statistics: *mut vmbed_port_statistics,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let now = handle::object(port)?.port.statistics();
        let mut dropped = [0; VMBED_DROP_REASONS];
        for (reason, frames) in now.drops() {
            dropped[reason as usize] = frames;
        }
        let value = vmbed_port_statistics {
            size: 0,
            received_frames: now.received.frames,
            received_bytes: now.received.bytes,
            sent_frames: now.sent.frames,
            sent_bytes: now.sent.bytes,
            mirrored_frames: now.mirrored.frames,
            mirrored_bytes: now.mirrored.bytes,
            unlearned: now.unlearned,
            moved: now.moved,
            addresses: now.addresses.into(),
            dropped,
        };
        fill(statistics, &value)
    })
}

/// A short, stable name of a reason, one of VMBED_DROP_*, for metrics: `spoofed-mac`. NULL for another number. Static.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_drop_name(reason: u32) -> *const c_char {
    answer(std::ptr::null(), || NAMES.get(reason as usize).map_or(std::ptr::null(), |name| name.as_ptr()))
}

/// [`DropReason::name`] as C has strings.
const NAMES: [&CStr; VMBED_DROP_REASONS] = [
    c"runt",
    c"too-long",
    c"bad-offload",
    c"bad-source",
    c"link-local",
    c"bad-tag",
    c"nested-tag",
    c"foreign-vlan",
    c"spoofed-mac",
    c"spoofed-ipv4",
    c"spoofed-ipv6",
    c"spoofed-arp",
    c"spoofed-neighbour",
    c"spoofed-router",
    c"foreign-mac",
    c"rate-in",
    c"storm",
    c"same-port",
    c"isolated",
    c"nowhere",
    c"monitor",
    c"removed",
    c"rate-out",
    c"queue-full",
    c"hidden-tag",
    c"uplink",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_have_the_same_numbers_and_names_in_c() {
        let numbers = [
            (VMBED_DROP_RUNT, DropReason::Runt),
            (VMBED_DROP_TOO_LONG, DropReason::TooLong),
            (VMBED_DROP_BAD_OFFLOAD, DropReason::BadOffload),
            (VMBED_DROP_BAD_SOURCE, DropReason::BadSource),
            (VMBED_DROP_LINK_LOCAL, DropReason::LinkLocal),
            (VMBED_DROP_BAD_TAG, DropReason::BadTag),
            (VMBED_DROP_NESTED_TAG, DropReason::NestedTag),
            (VMBED_DROP_FOREIGN_VLAN, DropReason::ForeignVlan),
            (VMBED_DROP_SPOOFED_MAC, DropReason::SpoofedMac),
            (VMBED_DROP_SPOOFED_IPV4, DropReason::SpoofedIpv4),
            (VMBED_DROP_SPOOFED_IPV6, DropReason::SpoofedIpv6),
            (VMBED_DROP_SPOOFED_ARP, DropReason::SpoofedArp),
            (VMBED_DROP_SPOOFED_NEIGHBOUR, DropReason::SpoofedNeighbour),
            (VMBED_DROP_SPOOFED_ROUTER, DropReason::SpoofedRouter),
            (VMBED_DROP_FOREIGN_MAC, DropReason::ForeignMac),
            (VMBED_DROP_RATE_IN, DropReason::RateIn),
            (VMBED_DROP_STORM, DropReason::Storm),
            (VMBED_DROP_SAME_PORT, DropReason::SamePort),
            (VMBED_DROP_ISOLATED, DropReason::Isolated),
            (VMBED_DROP_NOWHERE, DropReason::Nowhere),
            (VMBED_DROP_MONITOR, DropReason::Monitor),
            (VMBED_DROP_REMOVED, DropReason::Removed),
            (VMBED_DROP_RATE_OUT, DropReason::RateOut),
            (VMBED_DROP_QUEUE_FULL, DropReason::QueueFull),
            (VMBED_DROP_HIDDEN_TAG, DropReason::HiddenTag),
            (VMBED_DROP_UPLINK, DropReason::Uplink),
        ];
        assert_eq!((numbers.len(), DropReason::ALL.len()), (NAMES.len(), NAMES.len()));
        for (number, reason) in numbers {
            assert_eq!((number, NAMES[number as usize].to_str()), (reason as u32, Ok(reason.name())));
        }
    }
}
