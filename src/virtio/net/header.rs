#![forbid(unsafe_code)]
//! The header in front of each frame (5.1.6, `struct virtio_net_hdr` with `num_buffers`).

use virtio_bindings::bindings::virtio_net::{VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_NONE};

use crate::net::HEADER_LEN;

pub(super) type Header = [u8; HEADER_LEN];

/// Where `num_buffers` is.
const NUM_BUFFERS: usize = 10;

/// What goes to the backend in front of a frame of the driver's, whose header was this. `None` where
/// the driver asks for an offload that it has not negotiated: none is offered yet.
pub(super) fn to_backend(header: &Header) -> Option<Header> {
    let [flags, gso_type, ..] = *header;
    let needs_csum = flags & VIRTIO_NET_HDR_F_NEEDS_CSUM as u8 != 0;
    let segments = gso_type != VIRTIO_NET_HDR_GSO_NONE as u8;
    // The fields that those two would give a meaning are nobody's business then.
    (!needs_csum && !segments).then_some([0; HEADER_LEN])
}

/// What the driver sees in front of a frame that fills `buffers` chains.
pub(super) fn to_driver(buffers: u16) -> Header {
    let mut header = [0; HEADER_LEN];
    header[NUM_BUFFERS..].copy_from_slice(&buffers.to_le_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_negotiated_is_refused_and_nothing_else_is_passed_on() {
        assert_eq!(to_backend(&[0; 12]), Some([0; 12]));
        assert_eq!(to_backend(&[0, 0, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9]), Some([0; 12]));
        for bad in [[1, 0], [0, 1], [0, 4], [0, 0x80], [0xff, 0xff]] {
            let mut header = [0; 12];
            header[..2].copy_from_slice(&bad);
            assert_eq!(to_backend(&header), None, "{bad:?}");
        }
        assert_eq!(to_driver(0x102)[8..], [0, 0, 2, 1]);
    }
}
