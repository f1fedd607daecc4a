#![forbid(unsafe_code)]
//! Where the fixed devices are.

/// The first serial port and its interrupt.
pub(crate) const COM1: u16 = 0x3f8;
pub(crate) const COM1_LEN: u16 = 8;
pub(crate) const COM1_GSI: u32 = 4;

/// The clock: index and data.
pub(crate) const CMOS: u16 = 0x70;
pub(crate) const CMOS_LEN: u16 = 2;

/// The keyboard controller: data at the first port, command at the fifth.
pub(crate) const I8042: u16 = 0x60;
pub(crate) const I8042_LEN: u16 = 5;

/// Where a guest's kernel reports its panic (QEMU's pvpanic specification).
pub(crate) const PVPANIC: u16 = 0x505;

/// Power management (ACPI 6.5, 4.8.3.6, 4.8.3.7 and 5.6.9), all one byte wide. Reading GED_EVENT_SELECT
/// tells what happened since the last read; bit 0 is the power button.
pub(crate) const POWER: u16 = 0x600;
pub(crate) const POWER_LEN: u16 = 5;
pub(crate) const SLEEP_CONTROL: u16 = 0x600;
pub(crate) const SLEEP_STATUS: u16 = 0x601;
pub(crate) const RESET: u16 = 0x602;
pub(crate) const GED_EVENT_SELECT: u16 = 0x604;
pub(crate) const GED_GSI: u32 = 9;
/// What the guest writes to the reset register.
pub(crate) const RESET_VALUE: u8 = 1;
/// SLP_TYP of soft-off.
pub(crate) const S5_SLEEP_TYPE: u8 = 5;
