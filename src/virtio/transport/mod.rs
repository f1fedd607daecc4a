#![forbid(unsafe_code)]
//! How a driver reaches a device: the state machine that every transport shares, and PCI.

mod core;
mod doorbells;
pub(crate) mod pci;

pub(crate) use doorbells::Doorbells;
#[cfg(any(test, feature = "internals"))]
pub(crate) use doorbells::memory::Bells;
pub(crate) use pci::VirtioPci;
