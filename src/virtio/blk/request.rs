#![forbid(unsafe_code)]
//! A disk request (5.2.6), parsed once from its chain into an owned value.

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::GuestAddress;

use crate::memory::Memory;
use crate::units::Sectors;
use crate::virtio::queue::{BadBuffer, Chain};

/// The header: type, reserved, sector.
pub(super) const HEADER: u64 = 16;
/// The bytes of a GET_ID answer (`VIRTIO_BLK_ID_BYTES`).
pub(super) const ID_LEN: usize = 20;

/// The largest request: what a driver may send that keeps to SEG_MAX segments of SIZE_MAX bytes.
/// It bounds how long a device keeps its loop, and a stop, waiting.
pub(super) const MAX_LEN: u64 = SEG_MAX as u64 * SIZE_MAX as u64;
pub(super) const SEG_MAX: u32 = super::QUEUE_SIZE as u32 - 2;
pub(super) const SIZE_MAX: u32 = 256 << 10;

/// What to do, within the disk's bounds. Where the data lies is in the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Into the writable bytes but the last.
    Read {
        offset: u64,
        len: u32,
    },
    /// From the readable bytes behind the header.
    Write {
        offset: u64,
        len: u32,
    },
    Flush,
    Discard {
        offset: u64,
        length: u64,
    },
    WriteZeroes {
        offset: u64,
        length: u64,
        unmap: bool,
    },
    /// Into the writable bytes but the last.
    GetId {
        len: u32,
    },
}

/// Why a request gets an error status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    IoError,
    Unsupported,
}

impl Refusal {
    pub fn status(self) -> u8 {
        match self {
            Self::IoError => VIRTIO_BLK_S_IOERR as u8,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP as u8,
        }
    }
}

impl From<BadBuffer> for Refusal {
    fn from(_: BadBuffer) -> Self {
        Self::IoError
    }
}

/// What a request may touch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// In bytes.
    pub size: u64,
    pub readonly: bool,
    /// The driver knows DISCARD and WRITE_ZEROES.
    pub discards: bool,
}

/// The most sectors of a discard: what a file system does at once, in no long time.
pub(super) const MAX_DISCARD: u32 = (1 << 30) / 512;
/// And of zeroes, which may have to be written.
pub(super) const MAX_ZEROES: u32 = (64 << 20) / 512;
/// `VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP`
const UNMAP: u32 = 1;

/// Where the status byte goes: the last writable one. A chain without any cannot be answered but by
/// its completion.
pub(super) fn status_address(chain: &Chain) -> Option<GuestAddress> {
    // Neither wraps: spans are not empty, and their ends do not wrap.
    chain.writable.last().map(|last| GuestAddress(last.addr.0 + u64::from(last.len) - 1))
}

/// Reads the header, once, and checks everything about the request.
pub(super) fn parse(memory: &Memory, chain: &Chain, limits: Limits) -> Result<Action, Refusal> {
    let mut reader = chain.reader(memory);
    let header: [u8; HEADER as usize] = reader.read_array()?;
    let [a, b, c, d, _, _, _, _, sector @ ..] = header;
    let (kind, sector) = (u32::from_le_bytes([a, b, c, d]), Sectors(u64::from_le_bytes(sector)));
    if !chain.ordered {
        return Err(Refusal::IoError);
    }
    let to_read = reader.remaining();
    let to_write = chain.writable_len().checked_sub(1).ok_or(Refusal::IoError)?;
    match kind {
        VIRTIO_BLK_T_IN => {
            let (offset, len) = extent(sector, to_write, limits)?;
            if to_read > 0 { Err(Refusal::IoError) } else { Ok(Action::Read { offset, len }) }
        }
        VIRTIO_BLK_T_OUT => {
            let (offset, len) = extent(sector, to_read, limits)?;
            let wrong = to_write > 0 || limits.readonly;
            if wrong { Err(Refusal::IoError) } else { Ok(Action::Write { offset, len }) }
        }
        VIRTIO_BLK_T_FLUSH => Ok(Action::Flush),
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if limits.discards => {
            if limits.readonly || to_write > 0 || to_read != SEGMENT {
                return Err(Refusal::IoError);
            }
            range(reader.read_array()?, kind == VIRTIO_BLK_T_DISCARD, limits)
        }
        VIRTIO_BLK_T_GET_ID => Ok(Action::GetId { len: to_write.min(ID_LEN as u64) as u32 }),
        _ => Err(Refusal::Unsupported),
    }
}

/// The bytes of a `struct virtio_blk_discard_write_zeroes`, of which a request has one (`max_discard_seg`).
const SEGMENT: u64 = 16;

fn range(segment: [u8; SEGMENT as usize], discard: bool, limits: Limits) -> Result<Action, Refusal> {
    let [sector @ .., a, b, c, d, e, f, g, h] = segment;
    let (count, flags) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
    // Flags that are reserved, and unmap where it says nothing (5.2.6.2).
    if flags & !UNMAP != 0 || discard && flags != 0 {
        return Err(Refusal::Unsupported);
    }
    let most = if discard { MAX_DISCARD } else { MAX_ZEROES };
    let (offset, length) = (Sectors(u64::from_le_bytes(sector)).bytes(), u64::from(count) * Sectors::SIZE);
    let offset = offset.ok_or(Refusal::IoError)?;
    let end = offset.checked_add(length).ok_or(Refusal::IoError)?;
    if end > limits.size || count > most {
        return Err(Refusal::IoError);
    }
    Ok(if discard {
        Action::Discard { offset, length }
    } else {
        Action::WriteZeroes { offset, length, unmap: flags & UNMAP != 0 }
    })
}

/// The bytes on the disk, checked as a whole.
fn extent(sector: Sectors, len: u64, limits: Limits) -> Result<(u64, u32), Refusal> {
    let offset = sector.bytes().ok_or(Refusal::IoError)?;
    let end = offset.checked_add(len).ok_or(Refusal::IoError)?;
    if end > limits.size || len > MAX_LEN || !len.is_multiple_of(Sectors::SIZE) {
        return Err(Refusal::IoError);
    }
    Ok((offset, u32::try_from(len).map_err(|_| Refusal::IoError)?))
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;
    use crate::virtio::queue::Span;

    const LIMITS: Limits = Limits { size: 1 << 20, readonly: false, discards: true };

    fn spans(of: &[(u64, u32)]) -> Vec<Span> {
        of.iter().map(|&(addr, len)| Span { addr: GuestAddress(addr), len }).collect()
    }

    /// A request with its header at 0x1000.
    fn request(kind: u32, sector: u64, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> (Memory, Chain) {
        let memory = Memory::new(1 << 20).unwrap();
        memory.write_obj(kind, GuestAddress(0x1000)).unwrap();
        memory.write_obj(sector, GuestAddress(0x1008)).unwrap();
        let chain =
            Chain { head: 0, place: 0, readable: spans(readable), writable: spans(writable), ordered: true };
        (memory, chain)
    }

    fn outcome(
        kind: u32,
        sector: u64,
        readable: &[(u64, u32)],
        writable: &[(u64, u32)],
    ) -> Result<Action, Refusal> {
        let (memory, chain) = request(kind, sector, readable, writable);
        parse(&memory, &chain, LIMITS)
    }

    const HEAD: (u64, u32) = (0x1000, 16);
    const STATUS: (u64, u32) = (0x9000, 1);

    #[test]
    fn requests_as_drivers_send_them() {
        let read = outcome(VIRTIO_BLK_T_IN, 2, &[HEAD], &[(0x2000, 4096), STATUS]);
        assert_eq!(read, Ok(Action::Read { offset: 1024, len: 4096 }));
        let write = outcome(VIRTIO_BLK_T_OUT, 2047, &[HEAD, (0x2000, 512)], &[STATUS]);
        assert_eq!(write, Ok(Action::Write { offset: (1 << 20) - 512, len: 512 }));
        assert_eq!(outcome(VIRTIO_BLK_T_FLUSH, 0, &[HEAD], &[STATUS]), Ok(Action::Flush));
        let id = outcome(VIRTIO_BLK_T_GET_ID, 0, &[HEAD], &[(0x2000, 20), STATUS]);
        assert_eq!(id, Ok(Action::GetId { len: 20 }));
        assert_eq!(outcome(99, 0, &[HEAD], &[STATUS]), Err(Refusal::Unsupported));
    }

    /// Row 17: the header may be split in any way, and the status may share the data's buffer.
    #[test]
    fn a_header_of_single_bytes_and_a_status_in_the_data_buffer() {
        let bytes: Vec<_> = (0..16).map(|i| (0x1000 + i, 1)).collect();
        let (memory, chain) = request(VIRTIO_BLK_T_IN, 1, &bytes, &[(0x2000, 513)]);
        assert_eq!(parse(&memory, &chain, LIMITS), Ok(Action::Read { offset: 512, len: 512 }));
        assert_eq!(status_address(&chain), Some(GuestAddress(0x2200)));
        let joined = outcome(VIRTIO_BLK_T_OUT, 0, &[(0x1000, 16 + 512)], &[STATUS]);
        assert_eq!(joined, Ok(Action::Write { offset: 0, len: 512 }));
        assert_eq!(outcome(VIRTIO_BLK_T_IN, 0, &[(0x1000, 15)], &[STATUS]), Err(Refusal::IoError));
    }

    /// Rows 9 and 14.
    #[test]
    fn what_lies_beyond_the_disk_or_wraps_is_an_error() {
        let last = (1 << 20) / 512;
        let three_gib = (0, 3 << 30);
        let cases: [(u64, &[(u64, u32)]); 8] = [
            (last, &[(0x2000, 512), STATUS]),
            (last - 1, &[(0x2000, 512), (0x3000, 512), STATUS]),
            (u64::MAX / 512, &[(0x2000, 512), STATUS]),
            (u64::MAX / 512 + 1, &[(0x2000, 512), STATUS]),
            (u64::MAX, &[(0x2000, 512), STATUS]),
            (0, &[three_gib, three_gib, STATUS]),
            (0, &[(0x2000, 511), STATUS]),
            (0, &[(0x2000, 512), (0x3000, 1), STATUS]),
        ];
        for (sector, writable) in cases {
            assert_eq!(
                outcome(VIRTIO_BLK_T_IN, sector, &[HEAD], writable),
                Err(Refusal::IoError),
                "{sector}"
            );
        }
        let huge = Limits { size: u64::MAX, ..LIMITS };
        for (len, sound) in [(MAX_LEN as u32, true), (MAX_LEN as u32 + 512, false)] {
            let (memory, chain) = request(VIRTIO_BLK_T_IN, 0, &[HEAD], &[(0, len), STATUS]);
            assert_eq!(parse(&memory, &chain, huge).is_ok(), sound, "{len}");
        }
        let (memory, chain) = request(VIRTIO_BLK_T_IN, 0, &[HEAD], &[three_gib, three_gib, STATUS]);
        assert_eq!(parse(&memory, &chain, huge), Err(Refusal::IoError));
    }

    /// Rows 13 and 15.
    #[test]
    fn flipped_directions_and_missing_parts_are_errors() {
        let io_error = Err(Refusal::IoError);
        assert_eq!(outcome(VIRTIO_BLK_T_OUT, 0, &[HEAD], &[(0x2000, 512), STATUS]), io_error);
        assert_eq!(outcome(VIRTIO_BLK_T_IN, 0, &[HEAD, (0x2000, 512)], &[STATUS]), io_error);
        assert_eq!(outcome(VIRTIO_BLK_T_IN, 0, &[HEAD], &[]), io_error);
        assert_eq!(outcome(VIRTIO_BLK_T_IN, 0, &[], &[STATUS]), io_error);
        let (memory, mut chain) = request(VIRTIO_BLK_T_IN, 0, &[HEAD], &[(0x2000, 512), STATUS]);
        chain.ordered = false;
        assert_eq!(parse(&memory, &chain, LIMITS), io_error);
        let (memory, chain) = request(VIRTIO_BLK_T_OUT, 0, &[HEAD, (0x2000, 512)], &[STATUS]);
        let readonly = Limits { readonly: true, ..LIMITS };
        assert_eq!(parse(&memory, &chain, readonly), io_error);
        assert_eq!(outcome(VIRTIO_BLK_T_IN, 0, &[(0xc000_0000, 16)], &[STATUS]), io_error);
    }

    #[test]
    fn ranges_are_checked_like_extents_and_flags_are_known_or_refused() {
        let ask = |kind: u32, segment: (u64, u32, u32), limits: Limits| {
            let (memory, chain) = request(kind, 0, &[HEAD, (0x3000, 16)], &[STATUS]);
            memory.write_obj(segment.0, GuestAddress(0x3000)).unwrap();
            memory.write_obj(segment.1, GuestAddress(0x3008)).unwrap();
            memory.write_obj(segment.2, GuestAddress(0x300c)).unwrap();
            parse(&memory, &chain, limits)
        };
        let (discard, zeroes) = (VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES);
        assert_eq!(ask(discard, (8, 16, 0), LIMITS), Ok(Action::Discard { offset: 4096, length: 8192 }));
        for unmap in [false, true] {
            let want = Ok(Action::WriteZeroes { offset: 0, length: 1 << 20, unmap });
            assert_eq!(ask(zeroes, (0, 2048, unmap.into()), LIMITS), want);
        }
        for (kind, segment, why) in [
            (discard, (8, 16, 1), Refusal::Unsupported),
            (discard, (8, 16, 2), Refusal::Unsupported),
            (zeroes, (8, 16, 2), Refusal::Unsupported),
            (zeroes, (2047, 2, 0), Refusal::IoError),
            (discard, (u64::MAX, 1, 0), Refusal::IoError),
            (discard, (u64::MAX / 512, 2, 0), Refusal::IoError),
        ] {
            assert_eq!(ask(kind, segment, LIMITS), Err(why), "{kind} {segment:?}");
        }
        let huge = Limits { size: u64::MAX, ..LIMITS };
        assert_eq!(ask(discard, (0, MAX_DISCARD + 1, 0), huge), Err(Refusal::IoError));
        assert_eq!(ask(zeroes, (0, MAX_ZEROES + 1, 0), huge), Err(Refusal::IoError));
        assert_eq!(ask(discard, (0, 1, 0), Limits { discards: false, ..LIMITS }), Err(Refusal::Unsupported));
        assert_eq!(ask(zeroes, (0, 1, 0), Limits { readonly: true, ..LIMITS }), Err(Refusal::IoError));
        let short = outcome(discard, 0, &[HEAD, (0x3000, 15)], &[STATUS]);
        assert_eq!(short, Err(Refusal::IoError));
        let two = outcome(discard, 0, &[HEAD, (0x3000, 32)], &[STATUS]);
        assert_eq!(two, Err(Refusal::IoError), "max_discard_seg is 1");
    }
}
