#![forbid(unsafe_code)]
//! A device of no code: what the guest writes to it becomes an event.

use std::sync::{Arc, OnceLock};

use crate::bus::{Access, Device};
use crate::error::Result;
use crate::events::{EventKind, Reporter};

/// Ports or addresses whose writes are reported. Reads find all-ones.
pub(super) struct Doorbell {
    device: Arc<str>,
    /// The VM's, from its build on.
    reporter: OnceLock<Reporter>,
}

impl Doorbell {
    pub fn new(device: &str) -> Self {
        Self { device: device.into(), reporter: OnceLock::new() }
    }

    pub fn connect(&self, reporter: &Reporter) {
        let _ = self.reporter.set(reporter.clone());
    }
}

impl Device for Doorbell {
    fn read(&self, _: Access, _: &mut [u8]) -> Result<()> {
        Ok(())
    }

    fn write(&self, access: Access, data: &[u8]) -> Result<()> {
        let value = data.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
        if let Some(reporter) = self.reporter.get() {
            let device = self.device.clone();
            reporter.report(EventKind::Doorbell { device, offset: access.offset, value });
        }
        Ok(())
    }
}
