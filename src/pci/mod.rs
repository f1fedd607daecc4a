#![forbid(unsafe_code)]
//! PCI: one segment, one bus, functions at fixed places (PCI Express Base 6.0, PCI Local Bus 3.0).

use std::ops::Range;

mod config;
mod msix;
mod root;

pub(crate) use config::{ConfigSpace, Identity};
pub(crate) use msix::Msix;
pub(crate) use root::{ConfigPorts, Ecam, Root, Window};

/// A function on the bus, with at most one memory BAR.
///
/// The root calls it on the thread of the vCPU that makes the access; vCPUs may call at the same time.
/// Any offset and length may come, whatever the specification asks of drivers: an access that makes no
/// sense reads all-ones and writes nothing. No method waits for the guest.
pub(crate) trait Function: Send + Sync {
    /// Reads the function's 256 bytes of configuration space from `offset`, within it.
    fn read_config(&self, offset: usize, data: &mut [u8]);

    /// Writes configuration space. Afterwards the root asks for [`Function::bar`] again.
    fn write_config(&self, offset: usize, data: &[u8]);

    /// Where the BAR answers now; `None` while memory decoding is off.
    fn bar(&self) -> Option<Range<u64>>;

    /// Reads the BAR; `data` holds all-ones on entry.
    fn read_bar(&self, offset: u64, data: &mut [u8]);

    /// Writes the BAR.
    fn write_bar(&self, offset: u64, data: &[u8]);
}
