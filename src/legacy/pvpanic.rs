#![forbid(unsafe_code)]
//! pvpanic: the port on which a guest's kernel reports its panic (QEMU's docs/specs/pvpanic).

use std::sync::atomic::{AtomicBool, Ordering};

use crate::bus::{Access, Device};
use crate::error::Result;
use crate::events::{StopCause, StopLine};
use crate::sys::log;

/// The kernel has panicked.
const PANICKED: u8 = 1 << 0;
/// The kernel has panicked, and its crash kernel runs now.
const CRASHLOADED: u8 = 1 << 1;

/// The panic port.
pub(crate) struct PvPanic {
    stop: StopLine,
    crash_logged: AtomicBool,
}

impl PvPanic {
    pub fn new(stop: StopLine) -> Self {
        Self { stop, crash_logged: AtomicBool::new(false) }
    }
}

impl Device for PvPanic {
    fn read(&self, access: Access, data: &mut [u8]) -> Result<()> {
        if let (0, Some(byte)) = (access.offset, data.first_mut()) {
            *byte = PANICKED | CRASHLOADED;
        }
        Ok(())
    }

    fn write(&self, access: Access, data: &[u8]) -> Result<()> {
        let (0, Some(byte)) = (access.offset, data.first()) else { return Ok(()) };
        if byte & PANICKED != 0 {
            self.stop.pull(StopCause::GuestPanic);
        } else if byte & CRASHLOADED != 0 && !self.crash_logged.swap(true, Ordering::Relaxed) {
            // The guest goes on, to write its dump, and ends itself; once, for the log is not the guest's.
            log::warn!("pvpanic: the guest's kernel panicked and its crash kernel takes over");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_panic_ends_the_vm_and_a_crash_kernel_may_work() {
        let (causes, cause) = channel();
        let pvpanic = PvPanic::new(StopLine::new(move |c| causes.send(c).unwrap()));
        let mut byte = [0xff];
        pvpanic.read(Access::at(0), &mut byte).unwrap();
        assert_eq!(byte, [3]);
        for value in (0..=255).filter(|v| v & PANICKED == 0) {
            pvpanic.write(Access::at(0), &[value]).unwrap();
        }
        pvpanic.write(Access::at(1), &[PANICKED]).unwrap();
        pvpanic.write(Access::at(0), &[]).unwrap();
        assert!(cause.try_recv().is_err());
        pvpanic.write(Access::at(0), &[PANICKED, 0]).unwrap();
        assert_eq!(cause.try_recv(), Ok(StopCause::GuestPanic));
    }
}
