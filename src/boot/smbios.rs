#![forbid(unsafe_code)]
//! SMBIOS 3.0: who made the machine, which VM it is.

use super::write;
use crate::config::Uuid;
use crate::error::Result;
use crate::memory::{Memory, layout};

/// What the tables tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub uuid: Uuid,
    pub name: String,
}

/// Where the structures start, after the entry point.
const STRUCTURES: u64 = layout::SMBIOS_TABLES.start + 0x20;
/// One structure's strings and formatted part are far below this.
const VENDOR: &str = "vmbed";

/// Writes the entry point, where systems search for it, and the structures behind it.
pub(super) fn write_tables(memory: &Memory, identity: &Identity) -> Result<()> {
    let structures = structures(identity);
    write(memory, layout::SMBIOS_TABLES.start, &entry_point(structures.len() as u32))?;
    write(memory, STRUCTURES, &structures)
}

/// The 64-bit entry point (SMBIOS 3.0, 5.2.2).
fn entry_point(length: u32) -> Vec<u8> {
    let mut entry = b"_SM3_".to_vec();
    // Checksum, length, version 3.0, docrev, revision, reserved.
    entry.extend([0, 24, 3, 0, 0, 1, 0]);
    entry.extend(length.to_le_bytes());
    entry.extend(STRUCTURES.to_le_bytes());
    entry[5] = entry.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
    entry
}

fn structures(identity: &Identity) -> Vec<u8> {
    let mut out = Vec::new();
    let version = env!("CARGO_PKG_VERSION");
    let name = if identity.name.is_empty() { "vm" } else { identity.name.as_str() };
    // BIOS: vendor, version, segment, date, ROM size; "no characteristics", "is a virtual machine".
    let mut bios = vec![1, 2, 0, 0, 3, 0];
    bios.extend((1u64 << 3).to_le_bytes());
    bios.extend([0, 1 << 4, 0xff, 0xff, 0xff, 0xff]);
    add(&mut out, 0, &bios, &[VENDOR, version, "01/01/2026"]);
    // System: manufacturer, product, version, serial; UUID; wake-up: power switch; SKU, family.
    let mut system = vec![1, 2, 3, 4];
    system.extend(wire(identity.uuid));
    system.extend([6, 0, 0]);
    add(&mut out, 1, &system, &[VENDOR, "vmbed virtual machine", version, name]);
    // Enclosure: manufacturer, "other", no version, serial or asset tag; everything safe.
    add(&mut out, 3, &[1, 1, 0, 0, 0, 3, 3, 3, 2, 0, 0, 0, 0, 0, 0, 0, 0], &[VENDOR]);
    // Boot information: no errors detected.
    add(&mut out, 32, &[0; 7], &[]);
    add(&mut out, 127, &[], &[]);
    out
}

/// Appends a structure: header, formatted part, strings, an empty string.
fn add(out: &mut Vec<u8>, kind: u8, formatted: &[u8], strings: &[&str]) {
    let handle = u16::from(kind);
    out.extend([kind, 4 + formatted.len() as u8]);
    out.extend(handle.to_le_bytes());
    out.extend(formatted);
    for string in strings {
        out.extend(string.as_bytes());
        out.push(0);
    }
    if strings.is_empty() {
        out.push(0);
    }
    out.push(0);
}

/// The first three fields of a UUID are little-endian here (SMBIOS 3.0, 7.2.1).
fn wire(uuid: Uuid) -> [u8; 16] {
    let mut bytes = uuid.0;
    bytes[0..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    /// dmidecode, which others wrote, reads back what we were given.
    #[test]
    fn dmidecode_reads_the_identity() {
        let uuid: Uuid = "01234567-89ab-cdef-0123-456789abcdef".parse().unwrap();
        let structures = structures(&Identity { uuid, name: "web-7".into() });
        let mut entry = entry_point(structures.len() as u32);
        assert_eq!(entry.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0);
        // A dump has the entry point at 0 and the structures where it says: 32.
        entry[16..24].copy_from_slice(&32u64.to_le_bytes());
        entry[5] = 0;
        entry[5] = entry.iter().fold(0u8, |sum, b| sum.wrapping_sub(*b));
        entry.resize(32, 0);
        entry.extend(&structures);
        let path = std::env::temp_dir().join(format!("vmbed-dmi-{}", std::process::id()));
        std::fs::write(&path, &entry).unwrap();
        let output = std::process::Command::new("dmidecode").arg("--from-dump").arg(&path).output();
        let output = output.expect("dmidecode must be installed");
        std::fs::remove_file(&path).unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
        for line in [
            "UUID: 01234567-89ab-cdef-0123-456789abcdef",
            "Manufacturer: vmbed",
            "Serial Number: web-7",
            "System is a virtual machine",
        ] {
            assert!(text.contains(line), "{line} is missing in {text}");
        }
        assert!(
            !text.contains("OUT OF SPEC") && !text.contains("TRUNCATED") && !text.contains("Wrong"),
            "{text}"
        );
    }
}
