#![forbid(unsafe_code)]
//! The header in front of each frame (5.1.6, `struct virtio_net_hdr` with `num_buffers`), and the features that say what may be
//! left to do in it.

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_HDR_F_DATA_VALID,
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP_L4,
};

use crate::net::{HEADER_LEN, Offloads};

pub(super) type Header = [u8; HEADER_LEN];

/// Where `num_buffers` is.
const NUM_BUFFERS: usize = 10;

const NEEDS_CSUM: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
const DATA_VALID: u8 = VIRTIO_NET_HDR_F_DATA_VALID as u8;
const ECN: u8 = VIRTIO_NET_HDR_GSO_ECN as u8;

/// What the driver may leave to do, and what it takes with something left to do, for each offload.
const FEATURES: [(Offloads, u64, u64); 5] = [
    (Offloads::CSUM, 1 << VIRTIO_NET_F_CSUM, 1 << VIRTIO_NET_F_GUEST_CSUM),
    (Offloads::TSO4, 1 << VIRTIO_NET_F_HOST_TSO4, 1 << VIRTIO_NET_F_GUEST_TSO4),
    (Offloads::TSO6, 1 << VIRTIO_NET_F_HOST_TSO6, 1 << VIRTIO_NET_F_GUEST_TSO6),
    (Offloads::ECN, 1 << VIRTIO_NET_F_HOST_ECN, 1 << VIRTIO_NET_F_GUEST_ECN),
    (Offloads::USO, 1 << VIRTIO_NET_F_HOST_USO, 1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6),
];

/// The features to offer in front of a network that knows these: none where it cannot do checksums, which the others want (5.1.3.1).
pub(super) fn offered(offloads: Offloads) -> u64 {
    let offloads = if offloads.contains(Offloads::CSUM) { offloads } else { Offloads::empty() };
    let known = FEATURES.iter().filter(|(offload, ..)| offloads.contains(*offload));
    known.fold(0, |bits, (_, host, guest)| bits | host | guest)
}

/// What the driver may leave to the network, and what it takes from it, having accepted `features`.
pub(super) fn accepted(features: u64) -> (Offloads, Offloads) {
    let side = |bits: fn(&(Offloads, u64, u64)) -> u64| {
        let all = FEATURES.iter().filter(|entry| features & bits(entry) == bits(entry));
        let set = all.fold(Offloads::empty(), |set, (offload, ..)| set | *offload);
        // Segments are cut with new checksums (5.1.3.1).
        if set.contains(Offloads::CSUM) { set } else { Offloads::empty() }
    };
    (side(|(_, host, _)| *host), side(|(.., guest)| *guest))
}

/// The offload that this kind of segmentation is; `None` for one that nobody knows.
fn segmentation(gso_type: u8) -> Option<Offloads> {
    let congestion = if gso_type & ECN != 0 { Offloads::ECN } else { Offloads::empty() };
    let kind = match u32::from(gso_type & !ECN) {
        VIRTIO_NET_HDR_GSO_NONE if congestion.is_empty() => Offloads::empty(),
        VIRTIO_NET_HDR_GSO_TCPV4 => Offloads::TSO4,
        VIRTIO_NET_HDR_GSO_TCPV6 => Offloads::TSO6,
        VIRTIO_NET_HDR_GSO_UDP_L4 if congestion.is_empty() => Offloads::USO,
        _ => return None,
    };
    Some(kind | congestion)
}

/// What a header leaves to do on a frame of `len` bytes; `None` where it makes no sense.
fn left_to_do(header: &Header, len: u64) -> Option<Offloads> {
    let [flags, gso_type, _, _, s0, s1, c0, c1, o0, o1, ..] = *header;
    let [size, start, offset] = [[s0, s1], [c0, c1], [o0, o1]].map(u16::from_le_bytes);
    let segments = segmentation(gso_type)?;
    if flags & NEEDS_CSUM == 0 {
        return segments.is_empty().then_some(segments);
    }
    let inside = u64::from(start) + u64::from(offset) + 2 <= len;
    (inside && (gso_type == 0 || size > 0)).then_some(segments | Offloads::CSUM)
}

/// What goes to the backend in front of a frame of the driver's of `len` bytes, whose header was this. `None` where the driver asks
/// for what it has not negotiated, or for nonsense.
pub(super) fn to_backend(header: &Header, len: u64, may: Offloads) -> Option<Header> {
    let asked = left_to_do(header, len)?;
    if !may.contains(asked) {
        return None;
    }
    if asked.is_empty() {
        // The fields that they would give a meaning are nobody's business.
        return Some([0; HEADER_LEN]);
    }
    let mut passed = *header;
    passed[0] = NEEDS_CSUM;
    // A hint, which the kernel believes.
    let headers = u16::from_le_bytes([header[2], header[3]]).min(u16::try_from(len).unwrap_or(u16::MAX));
    passed[2..4].copy_from_slice(&headers.to_le_bytes());
    passed[NUM_BUFFERS..].fill(0);
    Some(passed)
}

/// What the driver sees in front of a frame of `len` bytes that fills `buffers` chains, and that came with this header. `None` where
/// that leaves something to do that the driver does not take.
pub(super) fn to_driver(header: &Header, len: u64, takes: Offloads, buffers: u16) -> Option<Header> {
    let mut passed = [0; HEADER_LEN];
    let asked = left_to_do(header, len)?;
    if !takes.contains(asked) {
        return None;
    }
    if !asked.is_empty() {
        passed = *header;
        passed[0] = NEEDS_CSUM;
    } else if takes.contains(Offloads::CSUM) {
        // Somebody has looked at its checksum already.
        passed[0] = header[0] & DATA_VALID;
    }
    passed[NUM_BUFFERS..].copy_from_slice(&buffers.to_le_bytes());
    Some(passed)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TSO: Header = [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 9, 9];

    #[test]
    fn what_was_not_negotiated_is_refused_and_nothing_else_is_passed_on() {
        let none = Offloads::empty();
        assert_eq!(to_backend(&[0; 12], 60, none), Some([0; 12]));
        assert_eq!(to_backend(&[0, 0, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9], 60, none), Some([0; 12]));
        for bad in [[1, 0], [0, 1], [0, 4], [0, 0x80], [0xff, 0xff]] {
            let mut header = [0; 12];
            header[..2].copy_from_slice(&bad);
            assert_eq!(to_backend(&header, 60, none), None, "{bad:?}");
            assert_eq!(to_driver(&header, 60, none, 1), None, "{bad:?}");
        }
        assert_eq!(
            to_driver(&[2, 0, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9], 60, none, 0x102).unwrap()[8..],
            [0, 0, 2, 1]
        );
    }

    #[test]
    fn what_was_negotiated_is_passed_on_where_it_makes_sense() {
        let most = Offloads::CSUM | Offloads::TSO4;
        assert_eq!(to_backend(&TSO, 4000, most), Some([1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0]));
        assert_eq!(to_driver(&TSO, 4000, most, 3), Some([1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 3, 0]));
        for less in [Offloads::CSUM, Offloads::CSUM | Offloads::TSO6, Offloads::TSO4] {
            assert_eq!(
                (to_backend(&TSO, 4000, less), to_driver(&TSO, 4000, less, 1)),
                (None, None),
                "{less:?}"
            );
        }
        let bent = |at: usize, byte: u8| {
            let mut header = TSO;
            header[at] = byte;
            header
        };
        assert_eq!(
            to_backend(&bent(2, 255), 60, most).unwrap()[2..4],
            [60, 0],
            "headers as long as the frame at most"
        );
        assert_eq!(to_backend(&bent(7, 1), 100, most), None, "a checksum behind the end");
        assert_eq!(to_backend(&bent(9, 0xff), 100, Offloads::all()), None, "far behind it");
        let mut nothing = TSO;
        nothing[4..6].fill(0);
        assert_eq!(to_backend(&nothing, 4000, Offloads::all()), None, "segments of nothing");
        assert_eq!(to_backend(&bent(1, 0x81), 4000, most), None, "ECN");
        assert!(to_backend(&bent(1, 0x81), 4000, most | Offloads::ECN).is_some());
        assert_eq!(to_backend(&bent(1, 3), 4000, Offloads::all()), None, "fragments of UDP");
        // What the driver says of a checksum is not believed, what the network says is passed on.
        assert_eq!(to_backend(&[2; 12].map(|b| if b == 2 { 0 } else { b }), 60, most), Some([0; 12]));
        let valid = [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        assert_eq!(to_backend(&valid, 60, most), Some([0; 12]));
        assert_eq!(to_driver(&valid, 60, most, 1).unwrap()[0], 2);
    }

    #[test]
    fn features_and_offloads_are_the_same_thing() {
        for bits in 0..=Offloads::all().bits() {
            let some = Offloads::from_bits_truncate(bits) | Offloads::CSUM;
            assert_eq!(accepted(offered(some)), (some, some));
        }
        assert_eq!([offered(Offloads::empty()), offered(Offloads::all() - Offloads::CSUM)], [0, 0]);
        // Who cannot do checksums can do nothing else; each way is chosen by itself.
        assert_eq!(accepted(1 << VIRTIO_NET_F_HOST_TSO4), (Offloads::empty(), Offloads::empty()));
        assert_eq!(accepted(1 << VIRTIO_NET_F_GUEST_CSUM), (Offloads::empty(), Offloads::CSUM));
    }
}
