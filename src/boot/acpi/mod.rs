#![forbid(unsafe_code)]
//! The ACPI tables of a hardware-reduced PC (ACPI 6.5): no SCI, no PM1 block, no 8259.
//!
//! Built from plain descriptors: this module knows no device.

use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use crate::error::{Error, ErrorKind, Result};
use crate::memory::{Memory, layout};

mod dsdt;

/// Where the root pointer is: the start of the tables' area.
pub(super) const RSDP: u64 = layout::ACPI_TABLES.start;

const OEM_ID: [u8; 6] = *b"VMBED ";
const OEM_TABLE_ID: [u8; 8] = *b"VMBED   ";
const OEM_REVISION: u32 = 1;
/// The RSDP's size rounded up to where the next table may begin.
const RSDP_SIZE: u64 = 48;
/// `ACPI_FADT_...`: there is no VGA to probe; there is a CMOS clock, as the DSDT says too.
const NO_VGA: u16 = 1 << 2;

/// What the tables describe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Machine {
    /// The local APIC ids of the vCPUs.
    pub apic_ids: Vec<u8>,
    pub ioapic: u64,
    pub lapic: u64,
    pub ecam: Range<u64>,
    pub pci_mmio32: Range<u64>,
    pub pci_mmio64: Range<u64>,
    /// A 16550: port and interrupt.
    pub serial: Option<(u16, u32)>,
    /// The clock's two ports.
    pub rtc: u16,
    /// The pvpanic port.
    pub pvpanic: u16,
    pub power: Power,
}

/// The registers of power management, all one byte wide in port space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Power {
    pub sleep_control: u16,
    pub sleep_status: u16,
    pub reset: u16,
    pub reset_value: u8,
    /// SLP_TYP of the soft-off state.
    pub s5: u8,
    /// Reading it tells and clears what happened: bit 0, the power button.
    pub event_select: u16,
    /// The interrupt of the generic event device.
    pub event_gsi: u32,
}

/// Writes the RSDP and everything that it leads to.
pub(super) fn write(memory: &Memory, machine: &Machine) -> Result<()> {
    let tables = tables(machine);
    let room = layout::ACPI_TABLES.end - layout::ACPI_TABLES.start;
    if tables.len() as u64 > room {
        let why = format!("the ACPI tables have {} bytes, {room} are reserved for them", tables.len());
        return Err(Error::new(ErrorKind::Unsupported, why));
    }
    super::write(memory, RSDP, &tables)
}

/// All tables as they lie in memory from [`RSDP`] on.
fn tables(machine: &Machine) -> Vec<u8> {
    let mut bytes = vec![0; RSDP_SIZE as usize];
    let mut place = |table: &dyn Aml| {
        bytes.resize(bytes.len().next_multiple_of(16), 0);
        let at = RSDP + bytes.len() as u64;
        table.to_aml_bytes(&mut bytes);
        at
    };
    let dsdt = place(&dsdt::table(machine));
    let pointed = [place(&fadt(machine, dsdt)), place(&madt(machine)), place(&mcfg(machine))];
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    pointed.iter().for_each(|at| xsdt.add_entry(*at));
    let xsdt = place(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    bytes[..rsdp.len()].copy_from_slice(&rsdp);
    bytes
}

fn port(address: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, address.into())
}

fn fadt(machine: &Machine, dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        .flag(Flags::Headless)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = NO_VGA.into();
    fadt.reset_reg = port(machine.power.reset);
    fadt.reset_value = machine.power.reset_value;
    fadt.sleep_control_reg = port(machine.power.sleep_control);
    fadt.sleep_status_reg = port(machine.power.sleep_status);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"KVMKVMKV").into();
    fadt.finalize()
}

fn madt(machine: &Machine) -> impl Aml {
    let lapic = LocalInterruptController::Address(machine.lapic as u32);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, lapic);
    for (uid, apic_id) in machine.apic_ids.iter().enumerate() {
        madt.add_structure(ProcessorLocalApic::new(uid as u8, *apic_id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, machine.ioapic as u32, 0));
    madt
}

fn mcfg(machine: &Machine) -> impl Aml {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    // 1 MiB of configuration space a bus.
    let buses = (machine.ecam.end - machine.ecam.start) >> 20;
    mcfg.add_ecam(machine.ecam.start, 0, 0, buses.saturating_sub(1) as u8);
    mcfg
}

/// An SDT that holds `body`, with length and checksum right.
fn sdt(signature: [u8; 4], revision: u8, body: &[u8]) -> Sdt {
    let mut sdt = Sdt::new(signature, 36, revision, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    sdt.append_slice(body);
    sdt
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::boot) fn machine(vcpus: u8) -> Machine {
        Machine {
            apic_ids: (0..vcpus).collect(),
            ioapic: layout::IOAPIC.start,
            lapic: layout::LAPIC,
            ecam: layout::ECAM,
            pci_mmio32: layout::PCI_MMIO32,
            pci_mmio64: layout::pci_mmio64(1 << 30),
            serial: Some((0x3f8, 4)),
            rtc: 0x70,
            pvpanic: 0x505,
            power: Power {
                sleep_control: 0x600,
                sleep_status: 0x601,
                reset: 0x602,
                reset_value: 1,
                s5: 5,
                event_select: 0x604,
                event_gsi: 9,
            },
        }
    }

    fn at(tables: &[u8], address: u64) -> &[u8] {
        let start = (address - RSDP) as usize;
        let length = u32::from_le_bytes(tables[start + 4..start + 8].try_into().unwrap()) as usize;
        &tables[start..start + length]
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, b| sum.wrapping_add(*b))
    }

    fn word(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn every_table_is_reached_from_the_root_and_sums_to_zero() {
        for vcpus in [1, 2, 254] {
            let tables = tables(&machine(vcpus));
            assert!(tables.len() < 0x1_0000, "{} bytes", tables.len());
            assert_eq!(&tables[..8], b"RSD PTR ");
            assert_eq!((sum(&tables[..20]), sum(&tables[..36])), (0, 0));
            let xsdt = at(&tables, word(&tables, 24));
            assert_eq!((&xsdt[..4], sum(xsdt)), (&b"XSDT"[..], 0));
            let mut found = Vec::new();
            for entry in xsdt[36..].chunks_exact(8) {
                let table = at(&tables, word(entry, 0));
                assert_eq!(sum(table), 0);
                found.push(table[..4].to_vec());
                if table.starts_with(b"FACP") {
                    let dsdt = at(&tables, word(table, 140));
                    assert_eq!((&dsdt[..4], sum(dsdt)), (&b"DSDT"[..], 0));
                    let flags = u32::from_le_bytes(table[112..116].try_into().unwrap());
                    assert_ne!(flags & 1 << 20, 0, "hardware-reduced");
                    assert_eq!((table[116], word(table, 120)), (1, 0x602), "reset register in port space");
                    assert_eq!((word(table, 248), word(table, 260)), (0x600, 0x601), "sleep registers");
                }
                if table.starts_with(b"APIC") {
                    assert_eq!(table.len(), 44 + 8 * usize::from(vcpus) + 12);
                    assert_eq!(table[40] & 1, 0, "no 8259");
                }
            }
            assert_eq!(found, [b"FACP", b"APIC", b"MCFG"]);
        }
    }

    /// The ACPI project's own compiler reads every table back and finds nothing to complain about.
    #[test]
    fn iasl_understands_the_tables() {
        let tables = tables(&machine(2));
        let directory = std::env::temp_dir().join(format!("vmbed-acpi-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let xsdt = at(&tables, word(&tables, 24));
        let mut all: Vec<&[u8]> = xsdt[36..].chunks_exact(8).map(|e| at(&tables, word(e, 0))).collect();
        all.push(at(&tables, word(all[0], 140)));
        for table in all {
            let name = String::from_utf8(table[..4].to_vec()).unwrap();
            std::fs::write(directory.join(format!("{name}.aml")), table).unwrap();
            let iasl = |argument: &[&str]| {
                let output =
                    std::process::Command::new("iasl").args(argument).current_dir(&directory).output();
                let output = output.expect("iasl (package acpica-tools) must be installed");
                let text = String::from_utf8_lossy(&output.stdout).into_owned()
                    + &String::from_utf8_lossy(&output.stderr);
                assert!(output.status.success(), "{name}: {text}");
                text
            };
            let text = iasl(&["-d", &format!("{name}.aml")]);
            assert!(!text.contains("Error") && !text.contains("Invalid"), "{name}: {text}");
            if name == "DSDT" {
                let text = iasl(&["-tc", "DSDT.dsl"]);
                assert!(text.contains("0 Errors, 0 Warnings"), "{text}");
            }
        }
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
