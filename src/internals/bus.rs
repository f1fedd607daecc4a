#![forbid(unsafe_code)]
//! A bus without a VM, and what a vCPU does with one, for a fuzz target that holds both against a model.

use std::sync::{Arc, OnceLock};

use crate::bus::{Bus, Device};
use crate::error::Result;
use crate::vcpu::Nearby;

/// A bus with devices of the caller's.
#[derive(Default)]
pub struct BareBus(Bus);

/// One exit of a vCPU: `data` are accesses of `width` bytes each, all to the same address.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct BusExit {
    pub address: u64,
    pub width: u8,
    pub write: bool,
    pub data: Vec<u8>,
}

impl BareBus {
    /// Puts a device there.
    ///
    /// # Errors
    /// The range is empty, wraps, or overlaps another.
    pub fn insert(&mut self, name: &str, base: u64, length: u64, device: Arc<dyn Device>) -> Result<()> {
        self.0.insert(name, base, length, device)
    }

    /// The name of the device that has all of these bytes.
    pub fn name_at(&self, address: u64, length: usize) -> Option<String> {
        self.0.name_at(address, length)
    }

    /// Exits of one vCPU, one after another; what became of each.
    pub fn exits(&self, vcpu: u32, exits: &mut [BusExit]) -> Vec<Result<()>> {
        let first = OnceLock::new();
        let mut nearby = Nearby::new(&self.0, &first);
        let one = |exit: &mut BusExit| {
            nearby.access_all(exit.address, exit.width, exit.write, &mut exit.data, vcpu)
        };
        exits.iter_mut().map(one).collect()
    }
}
