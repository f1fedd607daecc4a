#![forbid(unsafe_code)]
//! The keyboard controller, as far as a machine without keyboard needs it: the pulse that resets the CPU
//! (`reboot=k`). It always reads 0, so that a guest finds it ready.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use vm_superio::{I8042Device, Trigger};

use crate::bus::{Access, Device};
use crate::error::Result;
use crate::events::{StopCause, StopLine};
use crate::legacy::ports;
use crate::sys::lock;

/// One of its two registers.
pub(crate) struct I8042 {
    controller: Arc<Mutex<I8042Device<Reset>>>,
    /// Its distance from the data register's port.
    register: u8,
}

struct Reset(StopLine);

impl Trigger for Reset {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.pull(StopCause::GuestReset);
        Ok(())
    }
}

impl I8042 {
    /// The registers at `ports::I8042_DATA` and `ports::I8042_COMMAND`.
    pub fn new(stop: StopLine) -> (Self, Self) {
        let controller = Arc::new(Mutex::new(I8042Device::new(Reset(stop))));
        let command = (ports::I8042_COMMAND - ports::I8042_DATA) as u8;
        (Self { controller: controller.clone(), register: 0 }, Self { controller, register: command })
    }
}

impl Device for I8042 {
    fn read(&self, access: Access, data: &mut [u8]) -> Result<()> {
        if let (0, Some(byte)) = (access.offset, data.first_mut()) {
            *byte = lock(&self.controller).read(self.register);
        }
        Ok(())
    }

    fn write(&self, access: Access, data: &[u8]) -> Result<()> {
        if let (0, Some(byte)) = (access.offset, data.first()) {
            // The trigger cannot fail.
            let _ = lock(&self.controller).write(self.register, *byte);
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
        let (data, command) = I8042::new(StopLine::new(move |c| causes.send(c).unwrap()));
        for value in 0..=255 {
            data.write(Access::at(0), &[value]).unwrap();
            if value != 0xfe {
                command.write(Access::at(0), &[value]).unwrap();
            }
        }
        command.write(Access::at(1), &[0xfe]).unwrap();
        command.write(Access::at(0), &[]).unwrap();
        assert!(cause.try_recv().is_err());
        command.write(Access::at(0), &[0xfe, 0, 0, 0]).unwrap();
        assert_eq!(cause.try_recv(), Ok(StopCause::GuestReset));
    }

    #[test]
    fn the_status_is_ready() {
        let (data, command) = I8042::new(StopLine::new(|_| {}));
        for register in [data, command] {
            let mut byte = [0xff];
            register.read(Access::at(0), &mut byte).unwrap();
            assert_eq!(byte, [0]);
            register.read(Access::at(9), &mut []).unwrap();
        }
    }
}
