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

/// The byte registers that an access touches: a PC's bus splits a wide access to narrow devices.
fn registers(access: Access) -> impl Iterator<Item = u64> {
    access.offset..=u64::MAX
}
