#![forbid(unsafe_code)]
//! The ledger's arithmetic alone, as OpenStack Placement's service knows it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::budget::{Claim, Headroom, Inventory, Ledger, Provider, Reservation};
use crate::error::{Error, ErrorKind, Result};
use crate::units::Bytes;

/// An inventory in Placement's words.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs)]
pub struct PlacementInventory {
    pub total: u64,
    pub reserved: u64,
    pub min_unit: u64,
    pub max_unit: u64,
    pub step_size: u64,
    pub allocation_ratio: f64,
}

/// A provider with memory and vCPUs, and its consumers by number. Nothing is guaranteed, and everybody may be stopped, so
/// that what binds are the rules that Placement has.
pub struct PlacementLedger {
    ledger: Arc<Ledger>,
    consumers: BTreeMap<u64, Reservation>,
}

impl PlacementLedger {
    /// A provider with these inventories.
    pub fn new(memory: PlacementInventory, vcpus: PlacementInventory) -> Self {
        let ledger = Ledger::new(provider(memory, vcpus), BTreeSet::new());
        Self { ledger, consumers: BTreeMap::new() }
    }

    /// Replaces the inventories.
    ///
    /// # Errors
    /// None is known.
    pub fn set_inventories(&self, memory: PlacementInventory, vcpus: PlacementInventory) -> Result<u64> {
        self.ledger.set_provider(None, provider(memory, vcpus), BTreeSet::new())
    }

    /// A new consumer's claim.
    ///
    /// # Errors
    /// `Refused`.
    pub fn claim(&mut self, consumer: u64, memory: u64, vcpus: u64) -> Result<()> {
        let claim = Claim { memory: Bytes(memory), vcpus, victim: Some(0), ..Claim::default() };
        let reservation = self.ledger.claim(claim, Headroom::default())?.commit();
        self.consumers.insert(consumer, reservation);
        Ok(())
    }

    /// A consumer's changed claim, based on its generation `behind` changes ago.
    ///
    /// # Errors
    /// `Refused`, `InvalidState`.
    pub fn change(&self, consumer: u64, memory: u64, vcpus: u64, behind: u64) -> Result<u64> {
        let reservation = self
            .consumers
            .get(&consumer)
            .ok_or_else(|| Error::new(ErrorKind::NotFound, "no such consumer"))?;
        let generation = reservation.terms().1.saturating_sub(behind);
        reservation.change(Some(generation), Headroom::default(), |claim| {
            (claim.memory, claim.vcpus) = (Bytes(memory), vcpus);
        })
    }

    /// Takes a consumer away.
    pub fn drop_consumer(&mut self, consumer: u64) {
        self.consumers.remove(&consumer);
    }
}

fn provider(memory: PlacementInventory, vcpus: PlacementInventory) -> Provider {
    let inventory = |i: PlacementInventory| Inventory {
        total: i.total,
        reserved: i.reserved,
        ratio: i.allocation_ratio,
        min_unit: i.min_unit,
        max_unit: i.max_unit,
        step_size: i.step_size,
    };
    Provider { memory: inventory(memory), swap: u64::MAX, vcpus: Some(inventory(vcpus)), dedicated: 0 }
}
