#![forbid(unsafe_code)]
//! The PC's fixed devices: a serial port, a clock, and the registers through which a guest ends itself.
//!
//! There is no PIC, PIT or PM1 block: the platform is hardware-reduced ACPI, and its tables say where
//! these are. A wide access to byte registers touches each of them in order, as on an ISA bus.

use crate::bus::Access;

pub(crate) mod cmos;
pub(crate) mod i8042;
pub(crate) mod power;
pub(crate) mod pvpanic;
pub(crate) mod serial;

/// Where the fixed devices are, for the bus and for the ACPI tables.
pub(crate) mod ports {
    /// COM1, a 16550: 8 byte registers.
    pub const COM1: u16 = 0x3f8;
    pub const COM1_LEN: u16 = 8;
    pub const COM1_GSI: u8 = 4;

    /// The clock's index register; its data register follows.
    pub const CMOS: u16 = 0x70;
    pub const CMOS_LEN: u16 = 2;

    /// The keyboard controller's two registers, one byte each.
    pub const I8042_DATA: u16 = 0x60;
    pub const I8042_COMMAND: u16 = 0x64;

    /// One byte (QEMU's docs/specs/pvpanic).
    pub const PVPANIC: u16 = 0x505;

    /// The block of power management registers.
    pub const POWER: u16 = 0x600;
    pub const POWER_LEN: u16 = 8;
    /// FADT SLEEP_CONTROL_REG, SLEEP_STATUS_REG and RESET_REG, one byte each (ACPI 6.5, 4.8.3.7 and 4.8.3.6).
    pub const SLEEP_CONTROL: u16 = POWER;
    pub const SLEEP_STATUS: u16 = POWER + 1;
    pub const RESET: u16 = POWER + 2;
    /// FADT RESET_VALUE.
    pub const RESET_VALUE: u8 = 1;
    /// SLP_TYP of S5, for the DSDT's `_S5`.
    pub const SLEEP_TYPE_S5: u8 = 5;
    /// 32 bits, read by the generic event device's `_EVT`: what happened since the last read.
    pub const GED_EVENTS: u16 = POWER + 4;
    /// In [`GED_EVENTS`]: the power button was pressed.
    pub const GED_POWER_BUTTON: u32 = 1;
    /// Edge-triggered, active high.
    pub const GED_GSI: u8 = 9;
}

/// The byte registers that an access touches.
fn registers(access: Access) -> impl Iterator<Item = u64> {
    access.offset..=u64::MAX
}
