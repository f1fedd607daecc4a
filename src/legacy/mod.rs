#![forbid(unsafe_code)]
//! The devices at fixed ports: serial line, clock, keyboard controller (for its reset line), pvpanic,
//! power management.

mod cmos;
mod i8042;
pub(crate) mod ports;
mod power;
mod pvpanic;
mod serial;

pub(crate) use cmos::Cmos;
pub(crate) use i8042::I8042;
pub(crate) use power::Power;
pub(crate) use pvpanic::PvPanic;
pub(crate) use serial::Serial;

use crate::bus::Access;

/// Splits an access into bytes at ascending ports, as a PC's bus does with a wide access to narrow
/// devices.
fn bytes<'a>(access: Access, data: &'a [u8]) -> impl Iterator<Item = (u64, u8)> + 'a {
    (access.offset..).zip(data.iter().copied())
}
