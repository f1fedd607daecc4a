#![forbid(unsafe_code)]
//! Power management of hardware-reduced ACPI: the sleep and reset registers, and the events of the
//! generic event device (GED), of which there is one: the power button.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::bus::{Access, Device};
use crate::error::Result;
use crate::events::{StopCause, StopLine};
use crate::ioapic::IrqLine;
use crate::legacy::ports;

/// Registers, from the block's base.
const SLEEP_CONTROL: u64 = 0;
const SLEEP_STATUS: u64 = (ports::SLEEP_STATUS - ports::POWER) as u64;
const RESET: u64 = (ports::RESET - ports::POWER) as u64;
const GED_EVENTS: u64 = (ports::GED_EVENTS - ports::POWER) as u64;
const GED_LAST: u64 = GED_EVENTS + 3;

/// SLEEP_CONTROL_REG (ACPI 6.5, table 4.17).
const SLP_EN: u8 = 1 << 5;
const SLP_TYP_SHIFT: u8 = 2;
const SLP_TYP_MASK: u8 = 7;

/// The block of registers at `ports::POWER`.
pub(crate) struct Power {
    stop: StopLine,
    ged: Arc<Ged>,
}

struct Ged {
    /// What happened since the guest last asked.
    events: AtomicU32,
    line: IrqLine,
}

impl Power {
    /// `line` is the GED's interrupt.
    pub fn new(stop: StopLine, line: IrqLine) -> Self {
        Self { stop, ged: Arc::new(Ged { events: AtomicU32::new(0), line }) }
    }

    pub fn button(&self) -> PowerButton {
        PowerButton(self.ged.clone())
    }

    fn read_register(&self, register: u64) -> u8 {
        match register {
            // SLP_EN is write-only, and the guest never wakes up: WAK_STS stays clear.
            SLEEP_CONTROL | SLEEP_STATUS | RESET => 0,
            GED_EVENTS..=GED_LAST => {
                // Reading clears, byte by byte as it is read.
                let shift = (register - GED_EVENTS) * 8;
                let events = self.ged.events.fetch_and(!(0xff << shift), Ordering::AcqRel);
                (events >> shift) as u8
            }
            _ => 0xff,
        }
    }

    fn write_register(&self, register: u64, value: u8) {
        let sleep_type = value >> SLP_TYP_SHIFT & SLP_TYP_MASK;
        if register == SLEEP_CONTROL && value & SLP_EN != 0 && sleep_type == ports::SLEEP_TYPE_S5 {
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

/// The machine's power button. What the guest does about it is its own affair.
#[derive(Clone)]
pub(crate) struct PowerButton(Arc<Ged>);

impl PowerButton {
    /// Presses it. Every press interrupts, also when the last one was not seen: a guest that had no
    /// driver then may have one now.
    pub fn press(&self) {
        self.0.events.fetch_or(ports::GED_POWER_BUTTON, Ordering::AcqRel);
        self.0.line.pulse();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use super::*;
    use crate::ioapic::Ioapic;
    use crate::irq::Routes;

    fn power() -> (Power, Receiver<StopCause>, Arc<Routes>) {
        let routes = Routes::new(None);
        let ioapic = Ioapic::new(routes.clone());
        ioapic.write(Access::at(0), &[0x10 + 2 * ports::GED_GSI]).unwrap();
        ioapic.write(Access::at(0x10), &0x29u32.to_le_bytes()).unwrap();
        let (causes, cause) = channel();
        let stop = StopLine::new(move |c| causes.send(c).unwrap());
        (Power::new(stop, ioapic.line(ports::GED_GSI)), cause, routes)
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
        let button = power.button();
        button.press();
        button.press();
        assert_eq!(routes.take_signalled().len(), 2);
        let mut events = [0xff; 4];
        power.read(Access::at(GED_EVENTS), &mut events).unwrap();
        assert_eq!(u32::from_le_bytes(events), ports::GED_POWER_BUTTON);
        power.read(Access::at(GED_EVENTS), &mut events).unwrap();
        assert_eq!(events, [0; 4]);
        button.press();
        power.read(Access::at(GED_EVENTS + 1), &mut events[..1]).unwrap();
        power.read(Access::at(GED_EVENTS), &mut events[..1]).unwrap();
        assert_eq!(events[0], 1, "a byte's read clears that byte alone");
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
        assert_eq!(all, [0, 0, 0, 0xff, 0, 0, 0, 0]);
        assert!(cause.try_recv().is_err());
    }
}
