#![forbid(unsafe_code)]
//! The file format of captures (draft-ietf-opsawg-pcapng): four kinds of blocks, little-endian. Pure.

use std::io::{self, Write};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const SECTION: u32 = 0x0a0d_0d0a;
const INTERFACE: u32 = 1;
const STATISTICS: u32 = 5;
const PACKET: u32 = 6;

/// One packet.
pub(super) struct Packet<'a> {
    /// Which of the interfaces, in the order in which they were named.
    pub interface: u32,
    pub time: SystemTime,
    pub inbound: bool,
    /// Its length on the wire, of which `bytes` is the beginning.
    pub length: u32,
    pub bytes: &'a [u8],
}

/// What a file begins with: who wrote it, and the interfaces, whose packets are cut off at `snap_length` bytes.
pub(super) fn begin(out: &mut dyn Write, interfaces: &[String], snap_length: u32) -> io::Result<()> {
    let mut body = Vec::new();
    body.extend(0x1a2b_3c4d_u32.to_le_bytes());
    // Version 1.0, of unknown length.
    body.extend([1, 0, 0, 0]);
    body.extend(u64::MAX.to_le_bytes());
    option(&mut body, 4, concat!("vmbed ", env!("CARGO_PKG_VERSION")).as_bytes());
    end_of_options(&mut body);
    block(out, SECTION, &body)?;
    for name in interfaces {
        let mut body = Vec::new();
        // Ethernet.
        body.extend([1, 0, 0, 0]);
        body.extend(snap_length.to_le_bytes());
        option(&mut body, 2, name.as_bytes());
        // Times are in nanoseconds.
        option(&mut body, 9, &[9]);
        end_of_options(&mut body);
        block(out, INTERFACE, &body)?;
    }
    Ok(())
}

/// Appends a packet. `scratch` is kept from one to the next so that none allocates.
pub(super) fn packet(out: &mut dyn Write, scratch: &mut Vec<u8>, packet: &Packet<'_>) -> io::Result<()> {
    scratch.clear();
    scratch.extend(packet.interface.to_le_bytes());
    scratch.extend(timestamp(packet.time));
    scratch.extend((packet.bytes.len() as u32).to_le_bytes());
    scratch.extend(packet.length.to_le_bytes());
    scratch.extend(packet.bytes);
    pad(scratch);
    let direction: u32 = if packet.inbound { 1 } else { 2 };
    option(scratch, 2, &direction.to_le_bytes());
    end_of_options(scratch);
    block(out, PACKET, scratch)
}

/// What a file ends with: how many packets of an interface were missed.
pub(super) fn missed(out: &mut dyn Write, interface: u32, count: u64) -> io::Result<()> {
    let mut body = Vec::new();
    body.extend(interface.to_le_bytes());
    body.extend(timestamp(SystemTime::now()));
    option(&mut body, 5, &count.to_le_bytes());
    end_of_options(&mut body);
    block(out, STATISTICS, &body)
}

fn block(out: &mut dyn Write, kind: u32, body: &[u8]) -> io::Result<()> {
    let length = (body.len() as u32 + 12).to_le_bytes();
    out.write_all(&kind.to_le_bytes())?;
    out.write_all(&length)?;
    out.write_all(body)?;
    out.write_all(&length)
}

fn option(body: &mut Vec<u8>, code: u16, value: &[u8]) {
    let value = &value[..value.len().min(usize::from(u16::MAX))];
    body.extend(code.to_le_bytes());
    body.extend((value.len() as u16).to_le_bytes());
    body.extend(value);
    pad(body);
}

fn end_of_options(body: &mut Vec<u8>) {
    body.extend([0; 4]);
}

fn pad(body: &mut Vec<u8>) {
    body.resize(body.len().next_multiple_of(4), 0);
}

/// Nanoseconds since 1970, the upper half first.
fn timestamp(time: SystemTime) -> [u8; 8] {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let nanoseconds = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX);
    let ([a, b, c, d], [e, f, g, h]) =
        (((nanoseconds >> 32) as u32).to_le_bytes(), (nanoseconds as u32).to_le_bytes());
    [a, b, c, d, e, f, g, h]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_whole_and_say_their_length_twice() {
        let (mut file, mut scratch) = (Vec::new(), Vec::new());
        begin(&mut file, &["a".into(), "port b".into()], 96).unwrap();
        let time = UNIX_EPOCH + Duration::from_nanos(0x1_0000_0002);
        let one = Packet { interface: 1, time, inbound: true, length: 100, bytes: &[0xee; 13] };
        packet(&mut file, &mut scratch, &one).unwrap();
        missed(&mut file, 1, 7).unwrap();
        let (mut kinds, mut rest) = (Vec::new(), &file[..]);
        while !rest.is_empty() {
            let word = |at: usize| u32::from_le_bytes(rest[at..at + 4].try_into().unwrap());
            let length = word(4) as usize;
            assert_eq!((length % 4, word(length - 4) as usize), (0, length));
            kinds.push(word(0));
            if word(0) == PACKET {
                let words: Vec<_> = (8..28).step_by(4).map(word).collect();
                assert_eq!(words, [1, 1, 2, 13, 100]);
                assert_eq!(rest[28..44], [[0xee; 13].as_slice(), &[0; 3]].concat());
                assert_eq!(rest[44..56], [2, 0, 4, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
            }
            rest = &rest[length..];
        }
        assert_eq!(kinds, [SECTION, INTERFACE, INTERFACE, PACKET, STATISTICS]);
    }
}
