#![forbid(unsafe_code)]
//! The keyboard controller, as far as a machine without keyboard needs it: the pulse that resets the CPU
//! (`reboot=k`). It always reads 0, so that a guest finds it ready.

use std::convert::Infallible;
use std::sync::Mutex;

use vm_superio::{I8042Device, Trigger};

use crate::bus::{Access, Device};
use crate::error::Result;
use crate::events::{StopCause, StopLine};
use crate::sys::lock;

/// Registers, from the data register's port.
const DATA: u64 = 0;
const COMMAND: u64 = 4;

/// The controller.
pub(crate) struct I8042(Mutex<I8042Device<Reset>>);

struct Reset(StopLine);

impl Trigger for Reset {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.pull(StopCause::GuestReset);
        Ok(())
    }
}

impl I8042 {
    pub fn new(stop: StopLine) -> Self {
        Self(Mutex::new(I8042Device::new(Reset(stop))))
    }
}

impl Device for I8042 {
    fn read(&self, access: Access, data: &mut [u8]) -> Result<()> {
        for (register, byte) in super::registers(access).zip(data) {
            // The ports between the two are a PC's speaker and NMI status: nobody there. In particular
            // bit 5 of port 0x61 must not read 0, which an early Linux takes for a timer that still runs.
            if let DATA | COMMAND = register {
                *byte = lock(&self.0).read(register as u8);
            }
        }
        Ok(())
    }

    fn write(&self, access: Access, data: &[u8]) -> Result<()> {
        for (register, byte) in super::registers(access).zip(data) {
            if let DATA | COMMAND = register {
                // The trigger cannot fail.
                let _ = lock(&self.0).write(register as u8, *byte);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn only_the_reset_pulse_resets() {
        let (causes, cause) = channel();
        let i8042 = I8042::new(StopLine::new(move |c| causes.send(c).unwrap()));
        for value in 0..=255 {
            i8042.write(Access::at(DATA), &[value, value, value, value]).unwrap();
            if value != 0xfe {
                i8042.write(Access::at(COMMAND), &[value]).unwrap();
            }
        }
        // 260 is 4 in a byte.
        i8042.write(Access::at(260), &[0xfe]).unwrap();
        i8042.write(Access::at(COMMAND), &[]).unwrap();
        assert!(cause.try_recv().is_err());
        i8042.write(Access::at(COMMAND), &[0xfe, 0, 0, 0]).unwrap();
        assert_eq!(cause.try_recv(), Ok(StopCause::GuestReset));
    }

    #[test]
    fn it_is_ready_and_alone() {
        let i8042 = I8042::new(StopLine::new(|_| {}));
        let mut all = [0xff; 8];
        i8042.read(Access::at(0), &mut all).unwrap();
        assert_eq!(all, [0, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0xff]);
        i8042.read(Access::at(u64::MAX), &mut all).unwrap();
    }
}
