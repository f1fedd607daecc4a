#![forbid(unsafe_code)]
//! Interrupts into the guest: message-signalled vectors over irqfds, and the one owner of the VM's
//! interrupt routing table.
//!
//! KVM replaces the whole table at each change, so all of it lives here, the IOAPIC's pins first
//! (KVM looks for end-of-interrupt exits among the first pins only).
//! Without a KVM (tests, fuzzing, in-process drivers) the same types work in memory: a vector's eventfd
//! then simply counts what was raised.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, Weak};

use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KVM_MSI_VALID_DEVID, KvmIrqRouting, kvm_irq_routing_entry};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::error::{Error, ErrorKind, Result};
use crate::sys::fd;
use crate::sys::lock;
use crate::units::Gsi;

/// Pins of the IOAPIC, and so the first GSI of a message-signalled vector: up to the highest that something is
/// on (`legacy/ports.rs`). All else is MSI-X, and a kernel touches every pin some twenty times while it boots.
pub(crate) const IOAPIC_PINS: u32 = 10;

/// KVM's limit of routes (`KVM_MAX_IRQ_ROUTES`).
const MAX_ROUTES: usize = 4096;

/// A message-signalled interrupt: what a device writes where (Intel SDM volume 3, 11.11).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Msi {
    pub address: u64,
    pub data: u32,
}

/// The VM's interrupt routing table.
pub(crate) struct Routes {
    vm: Option<Arc<VmFd>>,
    table: Mutex<Table>,
    /// What was signalled without a KVM, for tests of what raises it.
    #[cfg(any(test, feature = "internals"))]
    signalled: Mutex<Vec<Msi>>,
}

struct Table {
    pins: [Option<Msi>; IOAPIC_PINS as usize],
    /// Index + `IOAPIC_PINS` is the GSI.
    vectors: Vec<Slot>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Slot {
    Free,
    Unrouted,
    Routed(Msi),
}

impl Routes {
    /// The table of `vm`, or one in memory.
    pub fn new(vm: Option<Arc<VmFd>>) -> Arc<Self> {
        let table = Table { pins: [None; IOAPIC_PINS as usize], vectors: Vec::new() };
        Arc::new(Self {
            vm,
            table: Mutex::new(table),
            #[cfg(any(test, feature = "internals"))]
            signalled: Mutex::default(),
        })
    }

    /// A new vector, masked and without a message.
    pub fn vector(self: &Arc<Self>) -> Result<Arc<Vector>> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
            .map_err(|e| Error::os("creating an interrupt's eventfd", e))?;
        let mut table = lock(&self.table);
        let free = table.vectors.iter().position(|s| *s == Slot::Free);
        let index = match free {
            Some(index) => index,
            None if table.vectors.len() < MAX_ROUTES - IOAPIC_PINS as usize => {
                table.vectors.push(Slot::Free);
                table.vectors.len() - 1
            }
            None => return Err(Error::new(ErrorKind::Exhausted, "KVM's 4096 interrupt routes are in use")),
        };
        table.vectors[index] = Slot::Unrouted;
        let gsi = Gsi(IOAPIC_PINS + index as u32);
        let routes = Arc::downgrade(self);
        Ok(Arc::new(Vector { gsi, event, vm: self.vm.clone(), routes, attached: Mutex::new(false) }))
    }

    /// What a pin of the IOAPIC sends, so that KVM knows which vectors want an end-of-interrupt exit.
    pub fn set_pin(&self, pin: u8, msi: Option<Msi>) -> Result<()> {
        let mut table = lock(&self.table);
        let pin = usize::from(pin);
        let Some(before) = table.pins.get(pin).copied().filter(|old| *old != msi) else { return Ok(()) };
        table.pins[pin] = msi;
        // One message that KVM does not take must not keep all later ones out.
        self.commit(&table).inspect_err(|_| table.pins[pin] = before)
    }

    /// Delivers a message now.
    pub fn signal(&self, msi: Msi) -> Result<()> {
        let Some(vm) = &self.vm else {
            #[cfg(any(test, feature = "internals"))]
            lock(&self.signalled).push(msi);
            return Ok(());
        };
        let message = kvm_bindings::kvm_msi {
            address_lo: msi.address as u32,
            address_hi: (msi.address >> 32) as u32,
            data: msi.data,
            ..Default::default()
        };
        match vm.signal_msi(message) {
            Ok(_) => Ok(()),
            Err(e) => Err(Error::errno_of("delivering an interrupt (KVM_SIGNAL_MSI)", e)),
        }
    }

    /// The messages delivered since the last call.
    #[cfg(any(test, feature = "internals"))]
    pub fn take_signalled(&self) -> Vec<Msi> {
        std::mem::take(&mut lock(&self.signalled))
    }

    /// What the table has for a pin.
    #[cfg(any(test, feature = "internals"))]
    pub fn pin(&self, pin: usize) -> Option<Msi> {
        lock(&self.table).pins[pin]
    }

    /// What the table has for a vector.
    #[cfg(feature = "internals")]
    fn slot(&self, gsi: Gsi) -> Option<Msi> {
        match lock(&self.table).vectors.get((gsi.0 - IOAPIC_PINS) as usize) {
            Some(Slot::Routed(msi)) => Some(*msi),
            _ => None,
        }
    }

    fn set_slot(&self, gsi: Gsi, slot: Slot) -> Result<()> {
        let mut table = lock(&self.table);
        let index = (gsi.0 - IOAPIC_PINS) as usize;
        let Some(before) = table.vectors.get(index).copied().filter(|old| *old != slot) else {
            return Ok(());
        };
        table.vectors[index] = slot;
        // A route that nobody uses may stay in KVM's table until the next change: half the calls.
        if !matches!(slot, Slot::Routed(_)) {
            return Ok(());
        }
        // One message that KVM does not take must not keep all later ones out.
        self.commit(&table).inspect_err(|_| table.vectors[index] = before)
    }

    fn commit(&self, table: &Table) -> Result<()> {
        let Some(vm) = &self.vm else { return Ok(()) };
        let pins = table.pins.iter().enumerate().map(|(pin, msi)| entry(pin as u32, msi.unwrap_or_default()));
        let vectors = table.vectors.iter().enumerate().filter_map(|(i, slot)| match slot {
            Slot::Routed(msi) => Some(entry(IOAPIC_PINS + i as u32, *msi)),
            _ => None,
        });
        let entries: Vec<_> = pins.chain(vectors).collect();
        let routing = KvmIrqRouting::from_entries(&entries)
            .map_err(|e| Error::new(ErrorKind::Internal, format!("interrupt routing table: {e:?}")))?;
        vm.set_gsi_routing(&routing)
            .map_err(|e| Error::errno_of("setting interrupt routes (KVM_SET_GSI_ROUTING)", e))
    }
}

fn entry(gsi: u32, msi: Msi) -> kvm_irq_routing_entry {
    const { assert!(KVM_MSI_VALID_DEVID == 1) };
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi.address_lo = msi.address as u32;
    entry.u.msi.address_hi = (msi.address >> 32) as u32;
    entry.u.msi.data = msi.data;
    entry
}

/// One interrupt that a device may raise.
///
/// While it is masked, its irqfd is detached and the eventfd collects what is raised; attaching it
/// again delivers that. Dropping it frees its GSI.
pub(crate) struct Vector {
    gsi: Gsi,
    event: EventFd,
    vm: Option<Arc<VmFd>>,
    routes: Weak<Routes>,
    attached: Mutex<bool>,
}

impl Vector {
    /// Raises the interrupt. Never blocks.
    pub fn trigger(&self) {
        // The counter is full only when 2^64 - 2 interrupts wait: one more says nothing new.
        fd::ring(&self.event);
    }

    /// Lets it through, as `msi`. What was raised while masked is delivered now.
    pub fn unmask(&self, msi: Msi) -> Result<()> {
        if let Some(routes) = self.routes.upgrade() {
            routes.set_slot(self.gsi, Slot::Routed(msi))?;
        }
        let mut attached = lock(&self.attached);
        if let (false, Some(vm)) = (*attached, &self.vm) {
            vm.register_irqfd(&self.event, self.gsi.0)
                .map_err(|e| Error::errno_of("attaching an interrupt (KVM_IRQFD)", e))?;
        }
        *attached = true;
        Ok(())
    }

    /// Holds it back.
    pub fn mask(&self) {
        let mut attached = lock(&self.attached);
        if let (true, Some(vm)) = (*attached, &self.vm) {
            // Fails only when it was not attached, and then there is nothing to hold back.
            let _ = vm.unregister_irqfd(&self.event, self.gsi.0);
        }
        *attached = false;
    }

    /// Whether it was raised while it was masked: the pending bit.
    pub fn is_pending(&self) -> bool {
        !*lock(&self.attached) && crate::sys::fd::is_readable(crate::sys::fd::borrow(&self.event))
    }

    /// Forgets what was raised while masked (a reset of the device).
    pub fn clear(&self) {
        if !*lock(&self.attached) {
            let _ = self.event.read();
        }
    }

    /// Its eventfd, for who raises it in the kernel.
    pub fn bell(&self) -> BorrowedFd<'_> {
        fd::borrow(&self.event)
    }

    /// Its eventfd: readable when it is raised; for drivers without a KVM.
    #[doc(hidden)]
    #[cfg(any(test, feature = "internals"))]
    pub fn event(&self) -> Result<EventFd> {
        self.event.try_clone().map_err(|e| Error::os("duplicating an interrupt's eventfd", e))
    }

    /// The message that it is let through as, as the routing table has it.
    #[cfg(feature = "internals")]
    pub fn route(&self) -> Option<Msi> {
        let routes = self.routes.upgrade().filter(|_| *lock(&self.attached))?;
        routes.slot(self.gsi)
    }

    /// How often it was raised since the last call; for drivers without a KVM.
    #[doc(hidden)]
    #[cfg(any(test, feature = "internals"))]
    pub fn take_raised(&self) -> u64 {
        self.event.read().unwrap_or(0)
    }
}

impl Drop for Vector {
    fn drop(&mut self) {
        self.mask();
        if let Some(routes) = self.routes.upgrade() {
            // Free never commits, so it cannot fail.
            let _ = routes.set_slot(self.gsi, Slot::Free);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_masked_vector_collects_and_shows_it_as_pending() {
        let vector = Routes::new(None).vector().unwrap();
        assert!(!vector.is_pending());
        vector.trigger();
        assert!(vector.is_pending());
        vector.unmask(Msi { address: 0xfee0_0000, data: 0x41 }).unwrap();
        assert!(!vector.is_pending(), "delivered, not pending");
        assert_eq!(vector.take_raised(), 1);
        vector.mask();
        vector.trigger();
        vector.clear();
        assert!(!vector.is_pending());
    }

    #[test]
    fn gsis_start_after_the_ioapic_and_are_used_again() {
        let routes = Routes::new(None);
        let a = routes.vector().unwrap();
        let b = routes.vector().unwrap();
        assert_eq!((a.gsi, b.gsi), (Gsi(IOAPIC_PINS), Gsi(IOAPIC_PINS + 1)));
        drop(a);
        assert_eq!(routes.vector().unwrap().gsi, Gsi(IOAPIC_PINS));
    }

    #[test]
    fn routes_run_out_with_an_error() {
        let routes = Routes::new(None);
        lock(&routes.table).vectors = vec![Slot::Unrouted; MAX_ROUTES - IOAPIC_PINS as usize];
        assert_eq!(routes.vector().err().unwrap().kind(), ErrorKind::Exhausted);
    }
}
