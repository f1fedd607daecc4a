#![forbid(unsafe_code)]
//! The two ways of interrupts, MSI-X and the IOAPIC, without devices and a KVM: for fuzz targets that hold them
//! against a model. A message is its address and its data.

use std::sync::Arc;

use crate::bus::{Access, Device};
use crate::error::Result;
use crate::ioapic::Ioapic;
use crate::irq::{Msi, Routes};
use crate::pci::{ConfigSpace, Identity, Msix};

/// How many pins the IOAPIC has.
pub const IOAPIC_PINS: u8 = crate::irq::IOAPIC_PINS as u8;

fn pair(msi: Msi) -> (u64, u32) {
    (msi.address, msi.data)
}

/// A function's MSI-X.
pub struct BareMsix {
    /// Vectors know it by a weak reference.
    _routes: Arc<Routes>,
    config: ConfigSpace,
    msix: Msix,
}

impl BareMsix {
    /// With so many vectors.
    ///
    /// # Errors
    /// The host is out of file descriptors.
    pub fn new(count: u16) -> Result<Self> {
        let identity =
            Identity { vendor: 1, device: 1, revision: 0, class: [0; 3], subsystem_vendor: 0, subsystem: 0 };
        let mut config = ConfigSpace::new(identity);
        let routes = Routes::new(None);
        let msix = Msix::new(&routes, &mut config, count, 0, 0x1000)?;
        Ok(Self { _routes: routes, config, msix })
    }

    /// Where the capability is in configuration space.
    pub fn capability(&self) -> usize {
        let mut pointer = [0];
        self.config.read(0x34, &mut pointer);
        pointer[0].into()
    }

    /// Writes configuration space.
    pub fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.config.write(offset, data);
        self.msix.config_written(&self.config);
    }

    /// Reads it.
    pub fn read_config(&self, offset: usize, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    /// Writes the table.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        self.msix.write_table(offset, data);
    }

    /// Reads it.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        self.msix.read_table(offset, data);
    }

    /// Reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        self.msix.read_pending(offset, data);
    }

    /// The device is reset.
    pub fn forget_pending(&mut self) {
        self.msix.forget_pending();
    }

    /// The device raises a vector. Whether there is such a one.
    pub fn trigger(&self, vector: u16) -> bool {
        self.msix.vector(vector).inspect(|vector| vector.trigger()).is_some()
    }

    /// What the routing table has for a vector that is let through.
    pub fn route(&self, vector: u16) -> Option<(u64, u32)> {
        self.msix.vector(vector)?.route().map(pair)
    }

    /// How often a vector was raised since the last call: what an irqfd would have delivered.
    pub fn take_raised(&self, vector: u16) -> u64 {
        self.msix.vector(vector).map_or(0, |vector| vector.take_raised())
    }
}

/// An IOAPIC.
pub struct BareIoapic {
    routes: Arc<Routes>,
    ioapic: Arc<Ioapic>,
}

impl Default for BareIoapic {
    fn default() -> Self {
        let routes = Routes::new(None);
        Self { ioapic: Ioapic::new(routes.clone()), routes }
    }
}

impl BareIoapic {
    /// A vCPU writes a register.
    ///
    /// # Errors
    /// None here.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<()> {
        Device::write(&*self.ioapic, Access::at(offset), data)
    }

    /// A vCPU reads one.
    ///
    /// # Errors
    /// None here.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<()> {
        Device::read(&*self.ioapic, Access::at(offset), data)
    }

    /// A device drives a pin.
    pub fn set_level(&self, pin: u8, high: bool) {
        self.ioapic.line(pin).set_level(high);
    }

    /// A device raises and lowers it.
    pub fn pulse(&self, pin: u8) {
        self.ioapic.line(pin).pulse();
    }

    /// A local APIC has finished a vector.
    pub fn end_of_interrupt(&self, vector: u8) {
        self.ioapic.end_of_interrupt(vector);
    }

    /// The messages sent since the last call.
    pub fn take_sent(&self) -> Vec<(u64, u32)> {
        self.routes.take_signalled().into_iter().map(pair).collect()
    }

    /// What the routing table has for a pin.
    pub fn route(&self, pin: u8) -> Option<(u64, u32)> {
        self.routes.pin(pin.into()).map(pair)
    }
}
