#![forbid(unsafe_code)]
//! Power management of hardware-reduced ACPI: the sleep and reset registers, and the events of the
//! generic event device (GED), of which there is one: the power button.

use std::sync::atomic::{AtomicU8, Ordering};

use crate::bus::{Access, Device};
use crate::error::Result;
use crate::events::{StopCause, StopLine};
use crate::ioapic::IrqLine;
use crate::legacy::ports;

/// Registers, from the block's base.
const SLEEP_CONTROL: u64 = 0;
const SLEEP_STATUS: u64 = (ports::SLEEP_STATUS - ports::POWER) as u64;
const RESET: u64 = (ports::RESET - ports::POWER) as u64;
const GED_EVENTS: u64 = (ports::GED_EVENT_SELECT - ports::POWER) as u64;

/// SLEEP_CONTROL_REG (ACPI 6.5, table 4.17).
const SLP_EN: u8 = 1 << 5;
const SLP_TYP_SHIFT: u8 = 2;
const SLP_TYP_MASK: u8 = 7;

/// In the GED's events: the power button was pressed.
const POWER_BUTTON: u8 = 1;

/// The block of registers at `ports::POWER`.
pub(crate) struct Power {
    stop: StopLine,
    /// The GED's interrupt.
    line: IrqLine,
    /// What happened since the guest last asked.
    events: AtomicU8,
}

impl Power {
    pub fn new(stop: StopLine, line: IrqLine) -> Self {
        Self { stop, line, events: AtomicU8::new(0) }
    }

    /// Presses the power button; what the guest does about it is its own affair. Every press interrupts,
    /// also when the last one was not seen: a guest that had no driver then may have one now.
    pub fn press_button(&self) {
        self.events.fetch_or(POWER_BUTTON, Ordering::AcqRel);
        self.line.pulse();
    }

    fn read_register(&self, register: u64) -> u8 {
        match register {
            // SLP_EN is write-only, and the guest never wakes up: WAK_STS stays clear.
            SLEEP_CONTROL | SLEEP_STATUS | RESET => 0,
            // Reading clears: the guest has heard.
            GED_EVENTS => self.events.swap(0, Ordering::AcqRel),
            _ => 0xff,
        }
    }

    fn write_register(&self, register: u64, value: u8) {
        let sleep_type = value >> SLP_TYP_SHIFT & SLP_TYP_MASK;
        if register == SLEEP_CONTROL && value & SLP_EN != 0 && sleep_type == ports::S5_SLEEP_TYPE {
            self.stop.pull(StopCause::GuestPoweroff);
        } else if register == RESET && value == ports::RESET_VALUE {
            self.stop.pull(StopCause::GuestReset);
        }
    }
}

impl Device for Power {
    fn read(&self, access: Access, data: &mut [u8]) -> Result<()> {
        for (register, byte) in super::registers(access).zip(data) {
            *byte = self.read_register(register);
        }
        Ok(())
    }

    fn write(&self, access: Access, data: &[u8]) -> Result<()> {
        for (register, byte) in super::registers(access).zip(data) {
            self.write_register(register, *byte);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::mpsc::{Receiver, channel};

    use super::*;
    use crate::ioapic::Ioapic;
    use crate::irq::Routes;

    fn power() -> (Power, Receiver<StopCause>, Arc<Routes>) {
        let routes = Routes::new(None);
        let ioapic = Ioapic::new(routes.clone());
        ioapic.write(Access::at(0), &[0x10 + 2 * ports::GED_GSI as u8]).unwrap();
        ioapic.write(Access::at(0x10), &0x29u32.to_le_bytes()).unwrap();
        let (causes, cause) = channel();
        let stop = StopLine::new(move |c| causes.send(c).unwrap());
        (Power::new(stop, ioapic.line(ports::GED_GSI as u8)), cause, routes)
    }

    #[test]
    fn only_s5_with_sleep_enable_powers_off() {
        let (power, cause, _) = power();
        for value in 0..=255u8 {
            power.write(Access::at(SLEEP_CONTROL), &[value]).unwrap();
            let s5 = value & 0x3c == 0x34;
            assert_eq!(cause.try_recv().ok(), s5.then_some(StopCause::GuestPoweroff), "{value:#x}");
        }
    }

    #[test]
    fn only_the_reset_value_resets() {
        let (power, cause, _) = power();
        for value in 0..=255u8 {
            power.write(Access::at(RESET), &[value]).unwrap();
            assert_eq!(cause.try_recv().ok(), (value == 1).then_some(StopCause::GuestReset), "{value:#x}");
        }
    }

    #[test]
    fn a_press_interrupts_and_is_read_once() {
        let (power, _, routes) = power();
        power.press_button();
        power.press_button();
        assert_eq!(routes.take_signalled().len(), 2);
        let mut events = [0xff];
        power.read(Access::at(GED_EVENTS), &mut events).unwrap();
        assert_eq!(events, [POWER_BUTTON]);
        power.read(Access::at(GED_EVENTS), &mut events).unwrap();
        assert_eq!(events, [0]);
    }

    #[test]
    fn any_access_is_answered() {
        let (power, cause, _) = power();
        for offset in (0..20).chain([u64::MAX - 8]) {
            for size in 0..=8 {
                let mut data = vec![0xff; size];
                power.read(Access::at(offset), &mut data).unwrap();
                power.write(Access::at(offset), &vec![0; size]).unwrap();
            }
        }
        let mut all = [0xaa; 8];
        power.read(Access::at(0), &mut all).unwrap();
        assert_eq!(all, [0, 0, 0, 0xff, 0, 0xff, 0xff, 0xff]);
        assert!(cause.try_recv().is_err());
    }
}
