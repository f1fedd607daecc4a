#![forbid(unsafe_code)]
//! The ledger's arithmetic alone: as OpenStack Placement's service knows it, and all of it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::budget::{Claim, Claimed, Headroom, Inventory, Ledger, Provider, Reservation, Verdict};
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

/// What one VM claims.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct VmTerms {
    pub memory: u64,
    pub entitlement: u64,
    pub guarantee: u64,
    pub pinned: u64,
    pub overhead: u64,
    pub victim: Option<u8>,
    pub vcpus: u64,
    pub dedicated: u64,
}

impl VmTerms {
    fn claim(self) -> Claim {
        Claim {
            memory: Bytes(self.memory),
            entitlement: Bytes(self.entitlement),
            guarantee: Bytes(self.guarantee),
            pinned: Bytes(self.pinned),
            overhead: Bytes(self.overhead),
            victim: self.victim,
            vcpus: self.vcpus,
            dedicated: self.dedicated,
        }
    }
}

/// What there is to give.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct HostTerms {
    pub memory: PlacementInventory,
    pub swap: u64,
    pub vcpus: Option<PlacementInventory>,
    pub cores: BTreeSet<u32>,
}

/// What a ledger's books add up to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Promises {
    pub generation: u64,
    pub consumers: u64,
    pub memory: u64,
    pub entitlement: u64,
    pub guarantee: u64,
    pub pinned: u64,
    pub overhead: u64,
    pub vcpus: u64,
    pub dedicated: u64,
    pub pending: bool,
}

/// The free memory of a host, and what of it must stay so.
pub type FreeMemory = (Option<u64>, u64);

enum Consumer {
    Claimed(Box<Claimed>),
    Reserved(Reservation),
}

/// A ledger and its consumers, by number from 0 on.
pub struct Accounts {
    ledger: Arc<Ledger>,
    consumers: Vec<Consumer>,
}

impl Accounts {
    /// A host's, with nothing promised.
    pub fn new(host: &HostTerms) -> Self {
        Self { ledger: Ledger::new(host.provider(), host.cores.clone()), consumers: Vec::new() }
    }

    /// Replaces what there is; the ledger's new generation.
    ///
    /// # Errors
    /// `InvalidState` where that generation is not the ledger's.
    pub fn set_host(&self, generation: Option<u64>, host: &HostTerms) -> Result<u64> {
        self.ledger.set_provider(generation, host.provider(), host.cores.clone())
    }

    /// What a claim would be answered.
    pub fn judge(&self, vm: VmTerms, free: FreeMemory) -> Verdict {
        self.ledger.judge(&vm.claim(), headroom(free))
    }

    /// A newcomer, the last by number; its cores.
    ///
    /// # Errors
    /// `Refused`.
    pub fn claim(&mut self, vm: VmTerms, free: FreeMemory) -> Result<Vec<u32>> {
        let claimed = self.ledger.claim(vm.claim(), headroom(free))?;
        let cores = claimed.cores().to_vec();
        self.consumers.push(Consumer::Claimed(Box::new(claimed)));
        Ok(cores)
    }

    /// A consumer's VM is there: it becomes the last by number.
    pub fn commit(&mut self, consumer: usize) {
        let reserved = match self.consumers.remove(consumer) {
            Consumer::Claimed(claimed) => Consumer::Reserved((*claimed).commit()),
            reserved => reserved,
        };
        self.consumers.push(reserved);
    }

    /// Changes what a consumer holds; its new generation. `None` where it was not committed.
    ///
    /// # Errors
    /// `Refused`, `InvalidState`.
    pub fn change(
        &self,
        consumer: usize,
        generation: Option<u64>,
        vm: VmTerms,
        free: FreeMemory,
    ) -> Result<Option<u64>> {
        let Consumer::Reserved(reservation) = &self.consumers[consumer] else { return Ok(None) };
        reservation.change(generation, headroom(free), |claim| *claim = vm.claim()).map(Some)
    }

    /// Takes a consumer away; those behind it move up.
    pub fn drop_consumer(&mut self, consumer: usize) {
        self.consumers.remove(consumer);
    }

    /// What the books add up to.
    pub fn promises(&self) -> Promises {
        let now = self.ledger.promised();
        Promises {
            generation: now.generation,
            consumers: now.consumers,
            memory: now.memory.get(),
            entitlement: now.entitlement.get(),
            guarantee: now.guarantee.get(),
            pinned: now.pinned.get(),
            overhead: now.overhead.get(),
            vcpus: now.vcpus,
            dedicated: now.dedicated,
            pending: self.ledger.is_pending(),
        }
    }
}

impl HostTerms {
    fn provider(&self) -> Provider {
        let vcpus = self.vcpus.map(inventory);
        Provider { memory: inventory(self.memory), swap: self.swap, vcpus, dedicated: 0 }
    }
}

fn headroom((free, needed): FreeMemory) -> Headroom {
    Headroom { free, needed }
}

fn provider(memory: PlacementInventory, vcpus: PlacementInventory) -> Provider {
    Provider { memory: inventory(memory), swap: u64::MAX, vcpus: Some(inventory(vcpus)), dedicated: 0 }
}

fn inventory(i: PlacementInventory) -> Inventory {
    Inventory {
        total: i.total,
        reserved: i.reserved,
        ratio: i.allocation_ratio,
        min_unit: i.min_unit,
        max_unit: i.max_unit,
        step_size: i.step_size,
    }
}
