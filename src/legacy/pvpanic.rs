#![forbid(unsafe_code)]
//! pvpanic: a guest's kernel says that it has panicked (QEMU's specification `pvpanic.rst`).

use crate::bus::{Access, Device};
use crate::error::Result;
use crate::events::{StopCause, StopLine};

const PANICKED: u8 = 1;

/// One port: reading tells which events are understood, writing reports them.
pub(crate) struct PvPanic(StopLine);

impl PvPanic {
    pub fn new(stop: StopLine) -> Self {
        Self(stop)
    }
}

impl Device for PvPanic {
    fn read(&self, _: Access, data: &mut [u8]) -> Result<()> {
        data.fill(PANICKED);
        Ok(())
    }

    fn write(&self, _: Access, data: &[u8]) -> Result<()> {
        if data.first().is_some_and(|events| events & PANICKED != 0) {
            self.0.pull(StopCause::GuestPanic);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_panic_is_reported_and_other_events_are_not() {
        let (causes, cause) = channel();
        let device = PvPanic::new(StopLine::new(move |c| causes.send(c).unwrap()));
        let mut data = [0xff];
        device.read(Access::at(0), &mut data).unwrap();
        assert_eq!(data, [PANICKED]);
        device.write(Access::at(0), &[2]).unwrap();
        assert!(cause.try_recv().is_err());
        device.write(Access::at(0), &[PANICKED]).unwrap();
        assert_eq!(cause.try_recv(), Ok(StopCause::GuestPanic));
    }
}
