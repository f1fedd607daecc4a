#![forbid(unsafe_code)]
//! The DSDT: which devices there are and what they occupy.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, Name, Notify, ONE,
    OpRegion, OpRegionSpace, Package, Path, ResourceTemplate, Scope, Store, ZERO,
};
use acpi_tables::sdt::Sdt;

use super::{Machine, sdt};

/// What the generic event device tells in its select register.
const POWER_BUTTON: u8 = 1;
/// Notify: the button was pressed (ACPI 6.5, table 5.187).
const BUTTON_PRESSED: u8 = 0x80;
/// The ports of PCI's configuration mechanism 1.
const PCI_CONFIG_PORT: u16 = 0xcf8;

pub(super) fn table(machine: &Machine) -> Sdt {
    let mut body = Vec::new();
    Name::new(name("\\_S5_"), &Package::new(vec![&machine.power.s5])).to_aml_bytes(&mut body);
    pci_root(&mut body, machine);
    ecam(&mut body, machine);
    if let Some((port, gsi)) = machine.serial {
        serial(&mut body, port, gsi);
    }
    ports(&mut body, "RTC_", &EISAName::new("PNP0B00"), machine.rtc, 2);
    ports(&mut body, "PEVT", &"QEMU0001", machine.pvpanic, 1);
    power_button(&mut body);
    events(&mut body, machine);
    sdt(*b"DSDT", 2, &body)
}

fn name(text: &str) -> Path {
    Path::new(text)
}

/// Puts a device into `\_SB`.
fn add(body: &mut Vec<u8>, device: &str, parts: Vec<&dyn Aml>) {
    Scope::new(name("\\_SB_"), vec![&Device::new(name(device), parts)]).to_aml_bytes(body);
}

fn pci_root(body: &mut Vec<u8>, machine: &Machine) {
    let cache = AddressSpaceCacheable::NotCacheable;
    let (low, high) = (&machine.pci_mmio32, &machine.pci_mmio64);
    let mmio32 = AddressSpace::new_memory(cache, true, low.start as u32, (low.end - 1) as u32, None);
    let mmio64 = AddressSpace::new_memory(cache, true, high.start, high.end - 1, None);
    let bus = AddressSpace::new_bus_number(0u16, 0u16);
    let config = IO::new(PCI_CONFIG_PORT, PCI_CONFIG_PORT, 1, 8);
    let resources = ResourceTemplate::new(vec![&bus, &config, &mmio32, &mmio64]);
    add(
        body,
        "PCI0",
        vec![
            &Name::new(name("_HID"), &EISAName::new("PNP0A08")),
            &Name::new(name("_CID"), &EISAName::new("PNP0A03")),
            &Name::new(name("_UID"), &ZERO),
            &Name::new(name("_SEG"), &ZERO),
            &Name::new(name("_BBN"), &ZERO),
            &Name::new(name("_CRS"), &resources),
        ],
    );
}

/// Reserves the configuration space: Linux uses MCFG's range only where a motherboard device claims it.
fn ecam(body: &mut Vec<u8>, machine: &Machine) {
    let size = (machine.ecam.end - machine.ecam.start) as u32;
    let memory = Memory32Fixed::new(true, machine.ecam.start as u32, size);
    add(
        body,
        "MBRD",
        vec![
            &Name::new(name("_HID"), &EISAName::new("PNP0C02")),
            &Name::new(name("_UID"), &ZERO),
            &Name::new(name("_CRS"), &ResourceTemplate::new(vec![&memory])),
        ],
    );
}

fn serial(body: &mut Vec<u8>, port: u16, gsi: u32) {
    let io = IO::new(port, port, 1, 8);
    let interrupt = Interrupt::new(true, true, false, false, gsi);
    add(
        body,
        "COM1",
        vec![
            &Name::new(name("_HID"), &EISAName::new("PNP0501")),
            &Name::new(name("_UID"), &ONE),
            &Name::new(name("_CRS"), &ResourceTemplate::new(vec![&interrupt, &io])),
        ],
    );
}

/// A device that is a few ports and nothing else.
fn ports(body: &mut Vec<u8>, device: &str, hid: &dyn Aml, port: u16, length: u8) {
    let io = IO::new(port, port, 1, length);
    add(
        body,
        device,
        vec![
            &Name::new(name("_HID"), hid),
            &Name::new(name("_UID"), &ZERO),
            &Name::new(name("_STA"), &0xfu8),
            &Name::new(name("_CRS"), &ResourceTemplate::new(vec![&io])),
        ],
    );
}

fn power_button(body: &mut Vec<u8>) {
    add(
        body,
        "PWRB",
        vec![&Name::new(name("_HID"), &EISAName::new("PNP0C0C")), &Name::new(name("_UID"), &ZERO)],
    );
}

/// The generic event device: its interrupt runs `_EVT`, which reads what happened and passes it on.
fn events(body: &mut Vec<u8>, machine: &Machine) {
    let (port, gsi) = (machine.power.event_select, machine.power.event_gsi);
    let interrupt = Interrupt::new(true, true, false, false, gsi);
    let field = Field::new(
        name("EREG"),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![FieldEntry::Named(*b"ESEL", 8)],
    );
    let pressed = And::new(&ZERO, &Local(0), &POWER_BUTTON);
    let button = name("\\_SB_.PWRB");
    let notify = Notify::new(&button, &BUTTON_PRESSED);
    let select = name("ESEL");
    add(
        body,
        "GED_",
        vec![
            &Name::new(name("_HID"), &"ACPI0013"),
            &Name::new(name("_UID"), &ZERO),
            &Name::new(name("_CRS"), &ResourceTemplate::new(vec![&interrupt])),
            &OpRegion::new(name("EREG"), OpRegionSpace::SystemIO, &port, &ONE),
            &field,
            &Method::new(
                name("_EVT"),
                1,
                true,
                vec![&Store::new(&Local(0), &select), &If::new(&pressed, vec![&notify])],
            ),
        ],
    );
}
