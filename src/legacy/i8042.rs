#![forbid(unsafe_code)]
//! The keyboard controller, for the one thing that kernels still use it for: the reset line.

use std::sync::Mutex;

use vm_superio::{I8042Device, Trigger};

use super::bytes;
use crate::bus::{Access, Device};
use crate::error::Result;
use crate::events::{StopCause, StopLine};
use crate::sys::lock;

/// A keyboard controller without a keyboard.
pub(crate) struct I8042(Mutex<I8042Device<ResetLine>>);

struct ResetLine(StopLine);

impl Trigger for ResetLine {
    type E = std::convert::Infallible;

    fn trigger(&self) -> std::result::Result<(), Self::E> {
        self.0.pull(StopCause::GuestReset);
        Ok(())
    }
}

impl I8042 {
    pub fn new(stop: StopLine) -> Self {
        Self(Mutex::new(I8042Device::new(ResetLine(stop))))
    }
}

impl Device for I8042 {
    fn read(&self, access: Access, data: &mut [u8]) -> Result<()> {
        let mut device = lock(&self.0);
        for (offset, byte) in (access.offset..).zip(data.iter_mut()) {
            *byte = device.read(offset as u8);
        }
        Ok(())
    }

    fn write(&self, access: Access, data: &[u8]) -> Result<()> {
        let mut device = lock(&self.0);
        for (offset, byte) in bytes(access, data) {
            let _ = device.write(offset as u8, byte);
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
        for byte in 0..=0xfd {
            i8042.write(Access::at(4), &[byte]).unwrap();
        }
        i8042.write(Access::at(0), &[0xfe]).unwrap();
        assert!(cause.try_recv().is_err());
        i8042.write(Access::at(4), &[0xfe]).unwrap();
        assert_eq!(cause.try_recv(), Ok(StopCause::GuestReset));
        i8042.read(Access::at(0), &mut [0; 8]).unwrap();
    }
}
