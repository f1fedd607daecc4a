#![forbid(unsafe_code)]
//! What a vnet header leaves to do on a frame: a checksum to complete, segments to cut. Who sends does not say
//! what is true: everything is checked against the frame itself.

use super::HEADER_LEN;
use super::ether::{self, Ethernet};
use super::packet::{self, Fragment, ICMPV6, Ip};

/// The checksum of the transport header is to be completed (5.1.6, VIRTIO_NET_HDR_F_NEEDS_CSUM).
const NEEDS_CSUM: u8 = 1;
/// VIRTIO_NET_HDR_GSO_*.
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// The least that a segment carries: Linux' TCP_MIN_SND_MSS. So a frame makes at most 1366 of them.
const MIN_SEGMENT: usize = 48;

bitflags::bitflags! {
    /// What may be left to do on a frame (virtio 1.2, 5.1.6): its header says where.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Offloads: u32 {
        /// Its TCP or UDP checksum. Without it, none of the others.
        const CSUM = 1;
        /// It is to be cut into segments: TCP over IPv4.
        const TSO4 = 2;
        /// TCP over IPv6.
        const TSO6 = 4;
        /// TSO of connections with explicit congestion notification.
        const ECN = 8;
        /// It is to be cut into UDP datagrams.
        const USO = 16;
    }
}

/// What is left to do on a frame, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    None,
    /// Sum from `start` on and put it at `field`, both from the frame's beginning.
    Checksum {
        start: usize,
        field: usize,
    },
    Segments(Segments),
}

/// A frame of several segments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segments {
    pub kind: Kind,
    /// Congestion was noticed: the flag CWR is for the first segment only.
    pub ecn: bool,
    /// What each carries, but the last.
    pub size: usize,
    /// Where the IP header begins.
    network: usize,
    /// Where the TCP or UDP header begins.
    transport: usize,
    /// How long all headers are.
    pub headers: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Tcp4,
    Tcp6,
    Udp4,
    Udp6,
}

impl Work {
    /// What `header` asks for on a frame of `length` bytes that begins with `head`.
    ///
    /// # Errors
    /// It is not what can be done on that frame. In particular nothing in front of the transport header is
    /// changed by a checksum: others have looked at that, and believe it.
    pub fn parse(
        header: &[u8; HEADER_LEN],
        ether: &Ethernet,
        head: &[u8],
        length: usize,
    ) -> Result<Self, ()> {
        let [flags, gso_type, _, _, s0, s1, c0, c1, o0, o1, ..] = *header;
        let [size, start, offset] =
            [[s0, s1], [c0, c1], [o0, o1]].map(|bytes| usize::from(u16::from_le_bytes(bytes)));
        if flags & NEEDS_CSUM == 0 {
            // The flag DATA_VALID is not believed, and not passed on.
            return if gso_type == 0 { Ok(Self::None) } else { Err(()) };
        }
        let network = ether.len();
        let ip = Ip::parse(ether.ethertype, head.get(network..).ok_or(())?).ok_or(())?;
        let transport = network + ip.transport;
        let field = start + offset;
        let fits = start >= transport && field + 2 <= length && ip.protocol != ICMPV6;
        if !fits || ip.fragment != Fragment::Whole {
            return Err(());
        }
        let checksum = Self::Checksum { start, field };
        if gso_type == 0 {
            return Ok(checksum);
        }
        let (kind, minimum, at) = match (gso_type & !GSO_ECN, ether.ethertype, ip.protocol) {
            (GSO_TCPV4, ether::IPV4, packet::TCP) => (Kind::Tcp4, 20, 16),
            (GSO_TCPV6, ether::IPV6, packet::TCP) => (Kind::Tcp6, 20, 16),
            (GSO_UDP_L4, ether::IPV4, packet::UDP) => (Kind::Udp4, 8, 6),
            (GSO_UDP_L4, ether::IPV6, packet::UDP) => (Kind::Udp6, 8, 6),
            _ => return Err(()),
        };
        let ecn = gso_type & GSO_ECN != 0;
        let tcp = matches!(kind, Kind::Tcp4 | Kind::Tcp6);
        let own = match (tcp, head.get(transport + 12)) {
            (true, Some(byte)) => usize::from(byte >> 4) * 4,
            _ => minimum,
        };
        let headers = transport + own;
        // Extension headers would be part of each segment, and may change what its checksum covers.
        let plain = ether.ethertype == ether::IPV4 || ip.transport == 40;
        let honest = start == transport && offset == at && ip.length == length - network;
        if own < minimum || headers > head.len() || !plain || !honest || size < MIN_SEGMENT || ecn && !tcp {
            return Err(());
        }
        if length <= headers + size {
            return Ok(checksum);
        }
        Ok(Self::Segments(Segments { kind, ecn, size, network, transport, headers }))
    }

    /// The same for a frame that has become longer or shorter by a tag.
    pub fn moved(self, from: usize, to: usize) -> Self {
        let moved = |at: usize| at + to - from;
        match self {
            Self::None => Self::None,
            Self::Checksum { start, field } => Self::Checksum { start: moved(start), field: moved(field) },
            Self::Segments(s) => Self::Segments(Segments {
                network: moved(s.network),
                transport: moved(s.transport),
                headers: moved(s.headers),
                ..s
            }),
        }
    }

    /// What an end must be able to do to take the frame as it is.
    pub fn needs(&self) -> Offloads {
        let Self::Segments(segments) = self else {
            return if *self == Self::None { Offloads::empty() } else { Offloads::CSUM };
        };
        let kind = match segments.kind {
            Kind::Tcp4 => Offloads::TSO4,
            Kind::Tcp6 => Offloads::TSO6,
            Kind::Udp4 | Kind::Udp6 => Offloads::USO,
        };
        Offloads::CSUM | kind | if segments.ecn { Offloads::ECN } else { Offloads::empty() }
    }

    /// The header for who takes the frame as it is.
    pub fn header(&self) -> [u8; HEADER_LEN] {
        let mut header = [0; HEADER_LEN];
        let (start, field) = match *self {
            Self::None => return header,
            Self::Checksum { start, field } => (start, field),
            Self::Segments(s) => {
                header[1] = s.gso_type();
                header[2..4].copy_from_slice(&(s.headers as u16).to_le_bytes());
                header[4..6].copy_from_slice(&(s.size as u16).to_le_bytes());
                (s.transport, s.transport + s.checksum_at())
            }
        };
        header[0] = NEEDS_CSUM;
        header[6..8].copy_from_slice(&(start as u16).to_le_bytes());
        header[8..10].copy_from_slice(&((field - start) as u16).to_le_bytes());
        header
    }
}

impl Segments {
    fn gso_type(&self) -> u8 {
        let kind = match self.kind {
            Kind::Tcp4 => GSO_TCPV4,
            Kind::Tcp6 => GSO_TCPV6,
            Kind::Udp4 | Kind::Udp6 => GSO_UDP_L4,
        };
        kind | if self.ecn { GSO_ECN } else { 0 }
    }

    fn checksum_at(&self) -> usize {
        match self.kind {
            Kind::Tcp4 | Kind::Tcp6 => 16,
            Kind::Udp4 | Kind::Udp6 => 6,
        }
    }

    /// Makes segment `index` of what lies in `frame`: the headers of the whole, and behind them what this one
    /// carries.
    pub fn finish(&self, frame: &mut [u8], index: usize, last: bool) {
        let put = |frame: &mut [u8], at: usize, value: usize| {
            frame[at..at + 2].copy_from_slice(&(value as u16).to_be_bytes());
        };
        let (network, transport, length) = (self.network, self.transport, frame.len());
        let v4 = matches!(self.kind, Kind::Tcp4 | Kind::Udp4);
        if v4 {
            put(frame, network + 2, length - network);
            let id = u16::from_be_bytes([frame[network + 4], frame[network + 5]]);
            put(frame, network + 4, usize::from(id.wrapping_add(index as u16)));
            put(frame, network + 10, 0);
            let sum = checksum(&frame[network..transport], 0);
            frame[network + 10..network + 12].copy_from_slice(&sum);
        } else {
            put(frame, network + 4, length - network - 40);
        }
        let protocol = if matches!(self.kind, Kind::Tcp4 | Kind::Tcp6) {
            let at = transport + 4;
            let number = [frame[at], frame[at + 1], frame[at + 2], frame[at + 3]];
            let number = u32::from_be_bytes(number).wrapping_add((index * self.size) as u32);
            frame[at..at + 4].copy_from_slice(&number.to_be_bytes());
            // FIN and PSH say something about the end, CWR is said once.
            let only_last = if last { 0 } else { 0x09 };
            let only_first = if index == 0 { 0 } else { 0x80 };
            frame[transport + 13] &= !(only_last | only_first);
            packet::TCP
        } else {
            put(frame, transport + 4, length - transport);
            packet::UDP
        };
        let addresses = if v4 { network + 12..network + 20 } else { network + 8..network + 40 };
        let pseudo = sum(&frame[addresses]) + u64::from(protocol) + (length - transport) as u64;
        let field = transport + self.checksum_at();
        put(frame, field, 0);
        let done = checksum(&frame[transport..], pseudo);
        frame[field..field + 2].copy_from_slice(&not_zero(done));
    }
}

/// Completes the checksum of a whole frame.
pub(crate) fn complete(frame: &mut [u8], start: usize, field: usize) {
    let done = checksum(&frame[start..], 0);
    frame[field..field + 2].copy_from_slice(&not_zero(done));
}

/// Zero says "no checksum" in UDP, and its other form is the same number.
fn not_zero(sum: [u8; 2]) -> [u8; 2] {
    if sum == [0; 2] { [0xff; 2] } else { sum }
}

/// The sum of 16-bit words, not folded; at most 2^46 for any frame.
fn sum(bytes: &[u8]) -> u64 {
    let (words, tail) = bytes.as_chunks::<4>();
    // 2^16 is 1 in this arithmetic, so words of 32 bits add up to the same.
    let whole: u64 = words.iter().map(|word| u64::from(u32::from_be_bytes(*word))).sum();
    let mut last = [0; 4];
    last[..tail.len()].copy_from_slice(tail);
    whole + u64::from(u32::from_be_bytes(last))
}

/// The Internet's checksum (RFC 1071) of `bytes` and what was summed up before.
fn checksum(bytes: &[u8], before: u64) -> [u8; 2] {
    let mut total = before + sum(bytes);
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    (!(total as u16)).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::testing::{packet, slowly};

    fn tcp(v4: bool, tagged: bool, payload: usize, size: u16) -> (Vec<u8>, [u8; 12]) {
        packet(false, v4, tagged, payload, size)
    }

    fn parse(header: &[u8; 12], frame: &[u8]) -> Result<Work, ()> {
        let head = &frame[..frame.len().min(256)];
        Work::parse(header, &Ethernet::parse(frame).unwrap(), head, frame.len())
    }

    #[test]
    fn sums_are_those_of_the_plain_way() {
        let bytes: Vec<u8> = (0..1000u32).map(|i| ((i * i) >> 3) as u8).collect();
        for len in [0, 1, 2, 3, 4, 5, 7, 64, 999, 1000] {
            assert_eq!(u16::from_be_bytes(checksum(&bytes[..len], 0)), slowly(&bytes[..len]), "{len}");
        }
    }

    #[test]
    fn segments_are_whole_packets() {
        for bits in 0..8 {
            let [udp, v4, tagged] = [1, 2, 4].map(|bit| bits & bit != 0);
            let (frame, header) = packet(udp, v4, tagged, 1000, 400);
            let Ok(Work::Segments(segments)) = parse(&header, &frame) else { panic!("{udp} {v4} {tagged}") };
            let parts: Vec<_> = frame[segments.headers..].chunks(400).collect();
            assert_eq!(parts.len(), 3);
            for (i, part) in parts.iter().enumerate() {
                let mut out = [&frame[..segments.headers], part].concat();
                segments.finish(&mut out, i, i == 2);
                let (network, transport) = (segments.network, segments.transport);
                let own = if udp { 8 } else { 20 };
                assert_eq!(segments.headers, transport + own);
                if udp {
                    assert_eq!(out[transport..transport + 4], [0x10, 0, 0x20, 0], "from port to port");
                    let length = ((8 + part.len()) as u16).to_be_bytes();
                    assert_eq!(out[transport + 4..transport + 6], length, "a datagram of its own");
                    assert_ne!(
                        out[transport + 6..transport + 8],
                        [0, 0],
                        "which would say that there is no sum"
                    );
                } else {
                    let flags = [0x90, 0x10, 0x19][i];
                    assert_eq!(out[transport + 13], flags, "CWR first, FIN and PSH last");
                    let number = 0xffff_fff0u32.wrapping_add(400 * i as u32).to_be_bytes();
                    assert_eq!(out[transport + 4..transport + 8], number);
                }
                let (addresses, length) = if v4 {
                    assert_eq!(slowly(&out[network..transport]), 0);
                    assert_eq!(out[network + 4..network + 6], 0xffffu16.wrapping_add(i as u16).to_be_bytes());
                    (&out[network + 12..network + 20], [out[network + 2], out[network + 3]])
                } else {
                    (&out[network + 8..network + 40], [out[network + 4], out[network + 5]])
                };
                let covered = u16::from_be_bytes(length) as usize - if v4 { 20 } else { 0 };
                assert_eq!(covered, own + part.len());
                let protocol = [0, if udp { 17 } else { 6 }];
                let pseudo =
                    [addresses, &protocol, &(covered as u16).to_be_bytes(), &out[transport..]].concat();
                assert_eq!(slowly(&pseudo), 0);
                assert_eq!(&out[segments.headers..], *part);
            }
        }
    }

    #[test]
    fn a_checksum_is_completed_over_what_was_seeded() {
        let (mut frame, mut header) = tcp(true, false, 33, 0);
        header[1] = 0;
        assert_eq!(parse(&header, &frame), Ok(Work::Checksum { start: 34, field: 50 }));
        let pseudo = [&frame[26..34], &[0, 6, 0, 53]].concat();
        let seed = !slowly(&pseudo);
        frame[50..52].copy_from_slice(&seed.to_be_bytes());
        complete(&mut frame, 34, 50);
        assert_eq!(slowly(&[&pseudo, &frame[34..]].concat()), 0);
        assert_eq!(not_zero([0, 0]), [0xff, 0xff]);
    }

    #[test]
    fn what_is_passed_on_says_the_same_and_no_more() {
        let (frame, header) = tcp(true, false, 1000, 400);
        let work = parse(&header, &frame).unwrap();
        let mut expected = header;
        expected[2] = 54;
        assert_eq!(work.header(), expected, "with the true length of the headers");
        let tagged = work.moved(14, 18).header();
        assert_eq!((tagged[2], tagged[6], tagged[8]), (58, 38, 16));
        assert_eq!(work.needs(), Offloads::CSUM | Offloads::TSO4);
        let mut valid = [0; 12];
        valid[0] = 2;
        assert_eq!(parse(&valid, &frame).unwrap().header(), [0; 12], "nobody vouches for a guest's checksum");
        let mut ecn = header;
        ecn[1] |= GSO_ECN;
        assert!(parse(&ecn, &frame).unwrap().needs().contains(Offloads::ECN));
        let (short, header) = tcp(true, false, 400, 400);
        assert_eq!(parse(&header, &short), Ok(Work::Checksum { start: 34, field: 50 }), "one segment");
    }

    #[test]
    fn lies_are_refused() {
        let (frame, header) = tcp(true, false, 1000, 400);
        let bad = |at: usize, value: u8| {
            let mut bad = header;
            bad[at] = value;
            assert_eq!(parse(&bad, &frame), Err(()), "{at} {value:#x}");
        };
        // No checksum wanted; kinds that are others', obsolete or none; sizes and places.
        bad(0, 0);
        for kind in [GSO_TCPV6, GSO_UDP_L4, 3, 2, 0x7f, 0x80, 0x85] {
            bad(1, kind);
        }
        let mut small = header;
        small[4..6].copy_from_slice(&47u16.to_le_bytes());
        assert_eq!(parse(&small, &frame), Err(()));
        bad(6, 33);
        bad(6, 35);
        bad(7, 0xff);
        bad(8, 6);
        bad(9, 0xff);
        let lie = |at: usize, value: u8| {
            let mut bad = frame.clone();
            bad[at] = value;
            assert_eq!(parse(&header, &bad), Err(()), "{at} {value:#x}");
        };
        // The packet's length, a fragment, another protocol, a TCP header that is short or longer than we see.
        lie(17, 0);
        lie(20, 0x60);
        lie(23, 17);
        lie(46, 0x40);
        lie(14, 0x46);
    }

    #[test]
    fn a_checksum_does_not_change_what_was_looked_at() {
        let (frame, mut header) = tcp(true, false, 100, 0);
        header[1] = 0;
        for (start, offset) in [(14u8, 12u8), (26, 0), (33, 16), (0, 6), (34, 120)] {
            (header[6], header[8]) = (start, offset);
            assert_eq!(parse(&header, &frame), Err(()), "{start} {offset}");
        }
        let mut arp = frame.clone();
        arp[13] = 6;
        (header[6], header[8]) = (34, 16);
        assert_eq!(parse(&header, &arp), Err(()), "what is no IP has none");
        let (mut discovery, mut header) = tcp(false, false, 100, 0);
        (discovery[20], header[1]) = (58, 0);
        assert_eq!(parse(&header, &discovery), Err(()));
    }
}
