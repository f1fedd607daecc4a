#![forbid(unsafe_code)]
//! The ledger: what this process has promised of the host. Pure arithmetic: no KVM, no clock, no I/O.
//!
//! So far it holds the nominal invariant, with OpenStack Placement's arithmetic: the sum of what the VMs
//! may have stays within (total − reserved) × ratio, for memory and for vCPUs.

use std::sync::{Arc, Mutex};

use crate::error::{Error, ErrorKind, Result};
use crate::sys::lock;
use crate::units::Bytes;

/// One resource of a provider, as Placement's inventories have it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Inventory {
    pub total: u64,
    pub reserved: u64,
    /// Positive and finite.
    pub ratio: f64,
}

impl Inventory {
    /// (total − reserved) × ratio, rounded down as Placement does.
    fn capacity(&self) -> u64 {
        // Saturates at both ends; a ratio that is not a number gives 0.
        (self.total.saturating_sub(self.reserved) as f64 * self.ratio) as u64
    }
}

/// What a VM wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Claim {
    pub memory: Bytes,
    pub vcpus: u64,
}

/// The accounts of one host.
pub(crate) struct Ledger {
    memory: Inventory,
    /// `None`: vCPUs are not limited.
    vcpus: Option<Inventory>,
    used: Mutex<Used>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Used {
    memory: u64,
    vcpus: u64,
}

/// What the VMs of a host hold, and what there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Usage {
    /// The sum of the VMs' memory sizes.
    pub memory: Bytes,
    /// (total − reserved) × ratio.
    pub memory_capacity: Bytes,
    /// The sum of the VMs' vCPUs.
    pub vcpus: u64,
    /// cores × ratio; `None` when vCPUs are not limited.
    pub vcpu_capacity: Option<u64>,
}

impl Ledger {
    pub fn new(memory: Inventory, vcpus: Option<Inventory>) -> Arc<Self> {
        Arc::new(Self { memory, vcpus, used: Mutex::default() })
    }

    /// Books `claim`, or says which constraint forbids it and by how much.
    pub fn claim(self: &Arc<Self>, claim: Claim) -> Result<Reservation> {
        let mut used = lock(&self.used);
        let memory = fit("memory", &self.memory, used.memory, claim.memory.get(), |n| Bytes(n).to_string())?;
        let vcpus = match &self.vcpus {
            Some(inventory) => fit("vCPUs", inventory, used.vcpus, claim.vcpus, |n| n.to_string())?,
            None => used.vcpus.saturating_add(claim.vcpus),
        };
        *used = Used { memory, vcpus };
        Ok(Reservation { ledger: self.clone(), claim })
    }

    pub fn usage(&self) -> Usage {
        let used = *lock(&self.used);
        Usage {
            memory: Bytes(used.memory),
            memory_capacity: Bytes(self.memory.capacity()),
            vcpus: used.vcpus,
            vcpu_capacity: self.vcpus.as_ref().map(Inventory::capacity),
        }
    }
}

/// The new use, or the refusal in the inventory's own terms.
fn fit(
    what: &str,
    inventory: &Inventory,
    used: u64,
    wanted: u64,
    show: impl Fn(u64) -> String,
) -> Result<u64> {
    let capacity = inventory.capacity();
    match used.checked_add(wanted) {
        Some(sum) if sum <= capacity => Ok(sum),
        _ => {
            let why = format!(
                "the ledger refuses {} of {what}: {} of {} are promised, {} are free \
                 (total {}, reserved {}, ratio {})",
                show(wanted),
                show(used),
                show(capacity),
                show(capacity.saturating_sub(used)),
                show(inventory.total),
                show(inventory.reserved),
                inventory.ratio
            );
            Err(Error::new(ErrorKind::Refused, why))
        }
    }
}

/// A booked claim. Dropping it gives it back.
pub(crate) struct Reservation {
    ledger: Arc<Ledger>,
    claim: Claim,
}

impl Reservation {
    /// The memory that may be mapped for it.
    pub fn memory(&self) -> Bytes {
        self.claim.memory
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut used = lock(&self.ledger.used);
        used.memory -= self.claim.memory.get();
        used.vcpus -= self.claim.vcpus;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger(total: u64, reserved: u64, ratio: f64) -> Arc<Ledger> {
        let vcpus = Inventory { total: 2, reserved: 0, ratio: 4.0 };
        Ledger::new(Inventory { total, reserved, ratio }, Some(vcpus))
    }

    fn claim(memory: u64, vcpus: u64) -> Claim {
        Claim { memory: Bytes(memory), vcpus }
    }

    #[test]
    fn claims_fit_to_the_byte_and_are_given_back() {
        let ledger = ledger(1000, 100, 1.5);
        let first = ledger.claim(claim(1000, 1)).unwrap();
        let refused = ledger.claim(claim(351, 1)).err().unwrap();
        assert_eq!(refused.kind(), ErrorKind::Refused);
        assert!(refused.to_string().contains("350 bytes are free"), "{refused}");
        let second = ledger.claim(claim(350, 1)).unwrap();
        assert_eq!(ledger.usage().memory, Bytes(1350));
        drop((first, second));
        assert_eq!((ledger.usage().memory, ledger.usage().vcpus), (Bytes(0), 0));
    }

    #[test]
    fn a_refused_claim_books_nothing() {
        let ledger = ledger(1000, 0, 1.0);
        assert!(ledger.claim(claim(1, 9)).is_err());
        assert!(ledger.claim(claim(u64::MAX, 1)).is_err());
        assert_eq!(ledger.usage().memory, Bytes(0));
        let _all = ledger.claim(claim(1000, 8)).unwrap();
        assert!(ledger.claim(claim(u64::MAX, 0)).is_err(), "does not wrap");
    }

    #[test]
    fn more_reserved_than_there_is_leaves_nothing() {
        assert!(ledger(10, 20, 1.0).claim(claim(1, 1)).is_err());
    }
}
