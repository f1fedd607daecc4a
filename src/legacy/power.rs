#![forbid(unsafe_code)]
//! Power management of a hardware-reduced ACPI machine: sleep and reset registers, and the generic event
//! device's view of the power button.

use std::sync::atomic::{AtomicU8, Ordering};

use super::{bytes, ports};
use crate::bus::{Access, Device};
use crate::error::Result;
use crate::events::{StopCause, StopLine};
use crate::ioapic::IrqLine;

/// The sleep control register (ACPI 6.5, table 4.25).
const SLP_EN: u8 = 1 << 5;
const SLP_TYP_SHIFT: u8 = 2;
const SLP_TYP_MASK: u8 = 7;
/// The event select register: bit 0, the power button.
const BUTTON: u8 = 1;

/// The block of power registers.
pub(crate) struct Power {
    stop: StopLine,
    line: IrqLine,
    /// What happened and was not yet read.
    events: AtomicU8,
}

impl Power {
    pub fn new(stop: StopLine, line: IrqLine) -> Self {
        Self { stop, line, events: AtomicU8::new(0) }
    }

    /// Presses the power button: the guest hears of it in its own time.
    pub fn press_button(&self) {
        self.events.fetch_or(BUTTON, Ordering::SeqCst);
        self.line.pulse();
    }
}

/// The register at an offset into the block.
fn register(offset: u64) -> u16 {
    ports::POWER.saturating_add(u16::try_from(offset).unwrap_or(u16::MAX))
}

impl Device for Power {
    fn read(&self, access: Access, data: &mut [u8]) -> Result<()> {
        for (offset, byte) in (access.offset..).zip(data.iter_mut()) {
            *byte = match register(offset) {
                // Reading clears: the guest has heard.
                ports::GED_EVENT_SELECT => self.events.swap(0, Ordering::SeqCst),
                _ => 0,
            };
        }
        Ok(())
    }

    fn write(&self, access: Access, data: &[u8]) -> Result<()> {
        for (offset, byte) in bytes(access, data) {
            match register(offset) {
                ports::SLEEP_CONTROL if byte & SLP_EN != 0 => {
                    if byte >> SLP_TYP_SHIFT & SLP_TYP_MASK == ports::S5_SLEEP_TYPE {
                        self.stop.pull(StopCause::GuestPoweroff);
                    }
                }
                ports::RESET if byte == ports::RESET_VALUE => self.stop.pull(StopCause::GuestReset),
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use super::*;
    use crate::ioapic::Ioapic;
    use crate::irq::Routes;

    fn power() -> (Power, Receiver<StopCause>) {
        let (causes, cause) = channel();
        let stop = StopLine::new(move |c| causes.send(c).unwrap());
        (Power::new(stop, Ioapic::new(Routes::new(None)).line(9)), cause)
    }

    #[test]
    fn only_soft_off_and_the_reset_value_end_the_machine() {
        let (power, cause) = power();
        for byte in 0..=255u8 {
            power.write(Access::at(0), &[byte]).unwrap();
            let off = byte & SLP_EN != 0 && byte >> 2 & 7 == 5;
            assert_eq!(cause.try_recv().ok(), off.then_some(StopCause::GuestPoweroff), "{byte:#x}");
            power.write(Access::at(2), &[byte]).unwrap();
            assert_eq!(cause.try_recv().ok(), (byte == 1).then_some(StopCause::GuestReset), "{byte:#x}");
        }
    }

    #[test]
    fn the_button_is_heard_once() {
        let (power, _) = power();
        let read = |offset| {
            let mut data = [0xff];
            power.read(Access::at(offset), &mut data).unwrap();
            data[0]
        };
        assert_eq!(read(4), 0);
        power.press_button();
        assert_eq!((read(4), read(4)), (BUTTON, 0));
        assert_eq!((read(0), read(1), read(3)), (0, 0, 0));
    }
}
