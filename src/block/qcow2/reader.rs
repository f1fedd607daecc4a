#![forbid(unsafe_code)]
//! Images of the kinds that the library does not know, to be read: with extended L2 entries (subclusters), compressed with zstd, or
//! encrypted (QEMU's docs/interop/qcow2.txt). They are templates that others are based on: nothing is ever written here.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use super::Access;
use super::cipher::{Cipher, SECTOR};
use super::luks;
use crate::config::Passphrase;
use crate::sys::image::{Content, read_or_zero};
use crate::sys::lock;

/// Feature bits that change how an image is read.
const DIRTY: u64 = 1 << 0;
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

const ZSTD: u8 = 1;
/// QEMU makes no larger L1 table (32 MiB).
const L1_MOST: u64 = 4 << 20;
/// Bits of an entry that say where something lies.
const PLACE: u64 = 0x00ff_ffff_ffff_fe00;
const PACKED: u64 = 1 << 62;
/// The cluster is the image's alone; with a data file, that it is there at all.
const COPIED: u64 = 1 << 63;
/// Extensions of the header.
const EXTENSIONS_END: u64 = 0;
const EXTENSION_LUKS: u64 = 0x0537_be77;
/// Subclusters of a cluster.
const SUBCLUSTERS: u64 = 32;

/// What the image's first page says.
#[derive(Debug)]
pub(super) struct Header {
    cluster_bits: u32,
    pub size: u64,
    l1_offset: u64,
    l1_entries: u64,
    features: u64,
    zstd: bool,
    /// How it is encrypted, and where its LUKS header is and how long, if it has one.
    encryption: Option<(u32, Option<(u64, u64)>)>,
    /// The name of the file that it is based on.
    pub backing: Option<String>,
}

impl Header {
    /// `None` where the library can do it.
    ///
    /// # Errors
    /// Nobody can: it has features or sizes that are not known.
    pub fn of_special(file: &File) -> io::Result<Option<Self>> {
        let mut head = [0; 112];
        let mut count = 0;
        while count < head.len() {
            match file.read_at(&mut head[count..], count as u64) {
                // A header may be all that there is.
                Ok(0) => break,
                Ok(more) => count += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let u32_at = |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) << 32 | u64::from(u32_at(at + 4));
        let (version, method) = (u32_at(4), u32_at(32));
        let ours = count >= 72 && &head[..4] == b"QFI\xfb" && (version == 2 || count >= 104 && version == 3);
        let (features, length) = if version == 2 { (0, 72) } else { (u64_at(72), u32_at(100)) };
        // The library would hand out what is encrypted as it is.
        if !ours || method == 0 && features & (COMPRESSION_TYPE | EXTENDED_L2) == 0 {
            return Ok(None);
        }
        let compression = if length > 104 && count > 104 { head[104] } else { 0 };
        let (cluster_bits, size, l1_entries) = (u32_at(20), u64_at(24), u64::from(u32_at(36)));
        let least = if features & EXTENDED_L2 == 0 { 9 } else { 14 };
        let known = DIRTY | DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2;
        let wrong = match () {
            () if features & !known != 0 => format!("has features that are not known ({features:#x})"),
            () if compression > ZSTD => format!("has compression type {compression}, which is not known"),
            () if !(least..=21).contains(&cluster_bits) => format!("has clusters of 2^{cluster_bits} bytes"),
            () if l1_entries > L1_MOST => format!("has an L1 table of {l1_entries} entries"),
            () if size > i64::MAX as u64 => format!("is a disk of {size} bytes"),
            () => String::new(),
        };
        if !wrong.is_empty() {
            return Err(io::Error::other(wrong));
        }
        let backing = (u64_at(8), u32_at(16).min(1023) as usize);
        let backing = if backing.0 == 0 {
            None
        } else {
            let mut name = vec![0; backing.1];
            file.read_exact_at(&mut name, backing.0)?;
            Some(String::from_utf8_lossy(&name).into_owned())
        };
        let encryption = match method {
            0 => None,
            _ => Some((method, luks_header(file, u64::from(length), 1 << cluster_bits)?)),
        };
        let (l1_offset, zstd) = (u64_at(40), compression == ZSTD);
        Ok(Some(Self { cluster_bits, size, l1_offset, l1_entries, features, zstd, encryption, backing }))
    }

    pub fn needs_data_file(&self) -> bool {
        self.features & DATA_FILE != 0
    }

    fn extended(&self) -> bool {
        self.features & EXTENDED_L2 != 0
    }
}

/// Where the header extension of LUKS, among those from `at` on in the image's first cluster, says that the header is.
fn luks_header(file: &File, mut at: u64, cluster: u64) -> io::Result<Option<(u64, u64)>> {
    while at + 24 <= cluster {
        let mut bytes = [0; 24];
        file.read_exact_at(&mut bytes, at)?;
        let number = |at: usize| bytes[at..at + 8].try_into().map_or(0, u64::from_be_bytes);
        let (kind, length) = (number(0) >> 32, number(0) & u64::from(u32::MAX));
        match kind {
            EXTENSIONS_END => break,
            EXTENSION_LUKS if length == 16 => return Ok(Some((number(8), number(16)))),
            _ => at += 8 + length.next_multiple_of(8),
        }
    }
    Ok(None)
}

/// An image, opened for reading.
pub(super) struct Reader {
    header: Header,
    file: File,
    /// Where its clusters are, if not in itself.
    data: Option<File>,
    below: Option<Access>,
    cipher: Option<Cipher>,
    l1: Vec<u64>,
    /// The cluster that was unpacked last, and its number: a guest reads it piece by piece.
    unpacked: Mutex<(u64, Arc<[u8]>)>,
}

/// Where a piece of the disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    At(u64),
    Zero,
    Below,
    Packed { at: u64, length: u64 },
}

fn corrupt(what: &str, entry: u64) -> io::Error {
    io::Error::other(format!("the image is corrupt: {what} ({entry:#x})"))
}

impl Reader {
    pub fn new(
        header: Header,
        (file, data): (File, Option<File>),
        below: Option<Access>,
        passphrases: &[Passphrase],
    ) -> io::Result<Self> {
        let unlock = |(method, luks)| luks::unlock(&file, method, luks, passphrases);
        let cipher = header.encryption.map(unlock).transpose()?;
        let mut table = vec![0; header.l1_entries as usize * 8];
        file.read_exact_at(&mut table, header.l1_offset)?;
        let l1 = table.chunks_exact(8).map(|entry| entry.try_into().map_or(0, u64::from_be_bytes)).collect();
        Ok(Self { header, file, data, below, cipher, l1, unpacked: Mutex::new((u64::MAX, Arc::default())) })
    }

    /// Where the byte at `offset` is, and how many there are in one piece from there on.
    fn find(&self, offset: u64) -> io::Result<(Found, u64)> {
        let Header { cluster_bits, .. } = self.header;
        let (size, width) = (1 << cluster_bits, if self.header.extended() { 16 } else { 8 });
        let (cluster, within) = (offset >> cluster_bits, offset & (size - 1));
        let entries = size / width;
        let Some(entry) = self.l1.get((cluster / entries) as usize) else {
            return Err(corrupt("the L1 table is too short", cluster));
        };
        let table = entry & PLACE;
        if table == 0 {
            return Ok((Found::Below, size - within));
        }
        let mut bytes = [0; 16];
        let place = (table & !(size - 1)) + cluster % entries * width;
        self.file.read_exact_at(&mut bytes[..width as usize], place)?;
        let [entry, bitmap] = [0, 8].map(|at| bytes[at..at + 8].try_into().map_or(0, u64::from_be_bytes));
        if entry & PACKED != 0 {
            return Ok((self.packed(entry), size - within));
        }
        let host = entry & PLACE;
        if host & (size - 1) != 0 {
            return Err(corrupt("a cluster is not aligned", entry));
        }
        // A data file has a place 0, too.
        let there = host != 0 || (self.data.is_some() && entry & COPIED != 0);
        let found = |zero: bool, allocated: bool| match (zero, allocated && there) {
            (true, _) => Found::Zero,
            (false, true) => Found::At(host + within),
            (false, false) => Found::Below,
        };
        if !self.header.extended() {
            return Ok((found(entry & 1 != 0, true), size - within));
        }
        if bitmap as u32 & (bitmap >> 32) as u32 != 0 {
            return Err(corrupt("a subcluster is there and zero", bitmap));
        }
        let step = size / SUBCLUSTERS;
        let state = |sub: u64| (bitmap >> (32 + sub) & 1 != 0, bitmap >> sub & 1 != 0);
        let first = within / step;
        let alike = (first..SUBCLUSTERS).take_while(|sub| state(*sub) == state(first)).count() as u64;
        let (zero, allocated) = state(first);
        Ok((found(zero, allocated), (first + alike) * step - within))
    }

    /// Of whole sectors, the first and last of which hold other clusters' data as well.
    fn packed(&self, entry: u64) -> Found {
        let bits = 62 - (self.header.cluster_bits - 8);
        let (at, sectors) = (entry & ((1 << bits) - 1), (entry & (PACKED - 1)) >> bits);
        Found::Packed { at, length: (sectors + 1) * 512 - at % 512 }
    }

    fn unpack(&self, cluster: u64, at: u64, length: u64) -> io::Result<Arc<[u8]>> {
        let mut last = lock(&self.unpacked);
        if last.0 == cluster {
            return Ok(last.1.clone());
        }
        // The image may end within the last sector.
        let (mut packed, mut plain) = (vec![0; length as usize], vec![0; 1 << self.header.cluster_bits]);
        read_or_zero(&self.file, &mut packed, at)?;
        if self.header.zstd {
            let bad = |e| io::Error::other(format!("a cluster at {at:#x} is no zstd: {e}"));
            let mut decoder = ruzstd::decoding::StreamingDecoder::new(&packed[..]).map_err(bad)?;
            decoder.read_exact(&mut plain)?;
        } else {
            let written = miniz_oxide::inflate::decompress_slice_iter_to_slice(
                &mut plain,
                std::iter::once(&packed[..]),
                false,
                true,
            );
            // Whatever follows in its last sector is not this cluster's.
            if !matches!(written, Ok(count) if count == plain.len()) {
                return Err(io::Error::other(format!("a cluster at {at:#x} does not unpack: {written:?}")));
            }
        }
        *last = (cluster, plain.into());
        Ok(last.1.clone())
    }

    /// What lies at `place` in the file, and at `offset` on the disk.
    fn at(&self, part: &mut [u8], place: u64, offset: u64) -> io::Result<()> {
        let file = self.data.as_ref().unwrap_or(&self.file);
        let Some(cipher) = &self.cipher else { return read_or_zero(file, part, place) };
        let sector = SECTOR as u64;
        let within = (offset % sector) as usize;
        // Some whole sectors at a time, of which the first and the last may have more than is wanted.
        let mut sectors = vec![0; (within + part.len()).next_multiple_of(SECTOR)];
        read_or_zero(file, &mut sectors, place - within as u64)?;
        cipher.decrypt(&mut sectors, if cipher.by_place { place } else { offset } / sector);
        part.copy_from_slice(&sectors[within..within + part.len()]);
        Ok(())
    }

    fn below(&self, part: &mut [u8], offset: u64) -> io::Result<()> {
        let Some(below) = &self.below else {
            part.fill(0);
            return Ok(());
        };
        // It may be shorter.
        let there = below.size().saturating_sub(offset).min(part.len() as u64) as usize;
        let (read, zero) = part.split_at_mut(there);
        zero.fill(0);
        if read.is_empty() { Ok(()) } else { below.read(read, offset) }
    }
}

impl Content for Reader {
    fn size(&self) -> u64 {
        self.header.size
    }

    fn read(&self, mut rest: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !rest.is_empty() {
            if offset >= self.header.size {
                rest.fill(0);
                return Ok(());
            }
            let (found, length) = self.find(offset)?;
            let length = length.min(self.header.size - offset).min(rest.len() as u64);
            let (part, behind) = rest.split_at_mut(length as usize);
            match found {
                Found::At(place) => self.at(part, place, offset)?,
                Found::Zero => part.fill(0),
                Found::Below => self.below(part, offset)?,
                Found::Packed { at, length } => {
                    let bits = self.header.cluster_bits;
                    let plain = self.unpack(offset >> bits, at, length)?;
                    let from = (offset & ((1 << bits) - 1)) as usize;
                    part.copy_from_slice(&plain[from..from + part.len()]);
                }
            }
            offset += length;
            rest = behind;
        }
        Ok(())
    }
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader").field("header", &self.header).finish_non_exhaustive()
    }
}
