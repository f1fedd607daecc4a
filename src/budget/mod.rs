#![forbid(unsafe_code)]
//! The ledger: what this process has promised of the host. Pure arithmetic: no KVM, no clock, no I/O.
//!
//! A claim is judged against every [`Constraint`] under one lock, and booked if none is broken:
//!
//! ```text
//! claim ──▶ refused, with the verdict
//!   └─────▶ Claimed ── commit ──▶ Reservation ── change ──▶ …
//!              └── drop             └── drop: given back
//! ```
//! `docs/overcommit.md` has the quantities and the invariants, with an example. Memory and vCPUs are counted as
//! OpenStack Placement counts them, generations included; `tests/placement` compares the two.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::sys::sync::{Mutex, lock};
use crate::units::Bytes;

mod overhead;
mod provider;
pub(crate) mod reclaim;
#[cfg(test)]
mod tests;
mod verdict;

pub(crate) use overhead::{Shape, overhead};
pub(crate) use provider::{Inventory, Provider};
pub use verdict::{Constraint, Slack, Verdict};

/// What a VM wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Claim {
    /// The most that the VM may ever have (M).
    pub memory: Bytes,
    /// What its guest can touch without our consent (E).
    pub entitlement: Bytes,
    /// What it will always have (G).
    pub guarantee: Bytes,
    /// What cannot be taken back because it is pinned (P).
    pub pinned: Bytes,
    /// What the VM costs beside its memory (O).
    pub overhead: Bytes,
    /// The VM may be stopped for want of memory, the lowest class first; so it may be insolvent.
    pub victim: Option<u8>,
    /// vCPUs that share cores.
    pub vcpus: u64,
    /// vCPUs with a core each.
    pub dedicated: u64,
}

impl Claim {
    /// max(G, P).
    pub fn guaranteed(&self) -> u64 {
        self.guarantee.max(self.pinned).get()
    }

    /// max(G, P) + O.
    fn kept(&self) -> u128 {
        u128::from(self.guaranteed()) + u128::from(self.overhead.get())
    }

    /// E + O.
    fn touchable(&self) -> u128 {
        u128::from(self.entitlement.get()) + u128::from(self.overhead.get())
    }
}

/// A sample of the host's memory, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Headroom {
    /// What is free; `None` where nobody can say.
    pub free: Option<u64>,
    /// What must stay so: measured fault rate × reaction time.
    pub needed: u64,
}

/// Sums over the consumers. Wide enough that 2⁶⁴ claims of 2⁶⁴ bytes do not wrap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Totals {
    consumers: u64,
    memory: u128,
    entitlement: u128,
    guaranteed: u128,
    pinned: u128,
    overhead: u128,
    kept: u128,
    touchable: u128,
    vcpus: u128,
    dedicated: u128,
    /// Guarantees that were claimed and not yet committed.
    pending: u128,
}

impl Totals {
    fn apply(&mut self, claim: &Claim, sum: impl Fn(u128, u128) -> u128) {
        let parts = [
            (&mut self.memory, claim.memory.get().into()),
            (&mut self.entitlement, claim.entitlement.get().into()),
            (&mut self.guaranteed, claim.guaranteed().into()),
            (&mut self.pinned, claim.pinned.get().into()),
            (&mut self.overhead, claim.overhead.get().into()),
            (&mut self.kept, claim.kept()),
            (&mut self.touchable, claim.touchable()),
            (&mut self.vcpus, claim.vcpus.into()),
            (&mut self.dedicated, claim.dedicated.into()),
        ];
        for (total, part) in parts {
            *total = sum(*total, part);
        }
    }

    fn add(&mut self, claim: &Claim) {
        self.apply(claim, u128::saturating_add);
    }

    fn remove(&mut self, claim: &Claim) {
        self.apply(claim, u128::saturating_sub);
    }
}

/// What the consumers of a ledger hold, and what there is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Promised {
    pub provider: Provider,
    /// Counts every change of the books.
    pub generation: u64,
    pub consumers: u64,
    pub memory: Bytes,
    pub entitlement: Bytes,
    pub guarantee: Bytes,
    pub pinned: Bytes,
    pub overhead: Bytes,
    pub vcpus: u64,
    pub dedicated: u64,
}

/// The accounts of one host.
pub(crate) struct Ledger(Mutex<Books>);

struct Books {
    provider: Provider,
    /// The cores for dedicated vCPUs, by the host's numbers.
    cores: BTreeSet<u32>,
    taken: BTreeSet<u32>,
    totals: Totals,
    generation: u64,
}

impl Ledger {
    /// `cores` are those for dedicated vCPUs: they are what the provider's `dedicated` becomes.
    pub fn new(provider: Provider, cores: BTreeSet<u32>) -> Arc<Self> {
        let provider = Provider { dedicated: cores.len() as u64, ..provider };
        let (taken, totals) = (BTreeSet::new(), Totals::default());
        Arc::new(Self(Mutex::new(Books { provider, cores, taken, totals, generation: 0 })))
    }

    /// What the ledger would answer, with nothing booked.
    pub fn judge(&self, claim: &Claim, headroom: Headroom) -> Verdict {
        let books = lock(&self.0);
        verdict::judge(&books.provider, &books.totals, None, claim, headroom)
    }

    /// Books `claim`, or says which constraint forbids it and how every one stands.
    pub fn claim(self: &Arc<Self>, claim: Claim, headroom: Headroom) -> Result<Claimed> {
        let mut books = lock(&self.0);
        let verdict = verdict::judge(&books.provider, &books.totals, None, &claim, headroom);
        if let Some(refusal) = verdict.refusal(&books.provider) {
            return Err(refusal);
        }
        let count = usize::try_from(claim.dedicated).unwrap_or(usize::MAX);
        let cores: Vec<u32> = books.cores.difference(&books.taken).copied().take(count).collect();
        books.taken.extend(&cores);
        books.totals.add(&claim);
        books.totals.consumers += 1;
        books.totals.pending += u128::from(claim.guaranteed());
        books.generation += 1;
        Ok(Claimed { booking: Booking { ledger: self.clone(), claim, cores, pending: true }, verdict })
    }

    /// Replaces what there is to give. Less than is promised is accepted: then nothing passes but what does not
    /// worsen it. Answers the new generation.
    ///
    /// # Errors
    /// `InvalidState` where `generation` is given and is not the ledger's: somebody else was here.
    pub fn set_provider(
        &self,
        generation: Option<u64>,
        provider: Provider,
        cores: BTreeSet<u32>,
    ) -> Result<u64> {
        let mut books = lock(&self.0);
        same_generation("the ledger", books.generation, generation)?;
        books.provider = Provider { dedicated: cores.len() as u64, ..provider };
        books.cores = cores;
        books.generation += 1;
        Ok(books.generation)
    }

    pub fn promised(&self) -> Promised {
        let Books { provider, totals, generation, .. } = &*lock(&self.0);
        let short = |n: u128| u64::try_from(n).unwrap_or(u64::MAX);
        Promised {
            provider: *provider,
            generation: *generation,
            consumers: totals.consumers,
            memory: Bytes(short(totals.memory)),
            entitlement: Bytes(short(totals.entitlement)),
            guarantee: Bytes(short(totals.guaranteed)),
            pinned: Bytes(short(totals.pinned)),
            overhead: Bytes(short(totals.overhead)),
            vcpus: short(totals.vcpus),
            dedicated: short(totals.dedicated),
        }
    }

    /// Whether guarantees are claimed for VMs that are still being made.
    pub fn is_pending(&self) -> bool {
        lock(&self.0).totals.pending > 0
    }

    /// The cores that are set aside for dedicated vCPUs.
    pub fn cores(&self) -> BTreeSet<u32> {
        lock(&self.0).cores.clone()
    }
}

fn same_generation(whose: &str, is: u64, expected: Option<u64>) -> Result<()> {
    match expected {
        Some(expected) if expected != is => {
            let why = format!(
                "the generation of {whose} is {is}, not {expected}: it has changed since; look at it again"
            );
            Err(Error::new(ErrorKind::InvalidState, why))
        }
        _ => Ok(()),
    }
}

/// What is on the books for one consumer. Dropping it takes it off.
struct Booking {
    ledger: Arc<Ledger>,
    claim: Claim,
    cores: Vec<u32>,
    pending: bool,
}

impl Booking {
    fn settle(&mut self, books: &mut Books) {
        if std::mem::take(&mut self.pending) {
            let guaranteed = self.claim.guaranteed().into();
            books.totals.pending = books.totals.pending.saturating_sub(guaranteed);
        }
    }
}

impl Drop for Booking {
    fn drop(&mut self) {
        let ledger = self.ledger.clone();
        let mut books = lock(&ledger.0);
        self.settle(&mut books);
        books.totals.remove(&self.claim);
        books.totals.consumers -= 1;
        books.taken.retain(|core| !self.cores.contains(core));
        books.generation += 1;
    }
}

/// A claim that was accepted, of a VM that is being made. Dropping it gives it back.
pub(crate) struct Claimed {
    booking: Booking,
    verdict: Verdict,
}

impl Claimed {
    /// How every constraint stood.
    pub fn verdict(&self) -> &Verdict {
        &self.verdict
    }

    /// The cores of its dedicated vCPUs, one each.
    pub fn cores(&self) -> &[u32] {
        &self.booking.cores
    }

    /// The memory that may be mapped for it.
    pub fn memory(&self) -> Bytes {
        self.booking.claim.memory
    }

    /// The VM is there: its guarantee is no longer looked for in what is free.
    pub fn commit(mut self) -> Reservation {
        let ledger = self.booking.ledger.clone();
        let mut books = lock(&ledger.0);
        self.booking.settle(&mut books);
        drop(books);
        Reservation(Mutex::new(Held { booking: self.booking, generation: 1 }))
    }
}

/// What a VM holds. Dropping it gives it back.
pub(crate) struct Reservation(Mutex<Held>);

struct Held {
    booking: Booking,
    generation: u64,
}

impl Reservation {
    /// The claim as it stands, and how often it was changed, from 1 on.
    pub fn terms(&self) -> (Claim, u64) {
        let held = lock(&self.0);
        (held.booking.claim, held.generation)
    }

    /// Replaces the claim by what `change` makes of it, all but its dedicated vCPUs. A change that does not worsen an
    /// over-capacity passes. Answers the consumer's new generation.
    ///
    /// # Errors
    /// `Refused` with the verdict; `InvalidState` where `generation` is given and is not the consumer's.
    pub fn change(
        &self,
        generation: Option<u64>,
        headroom: Headroom,
        change: impl FnOnce(&mut Claim),
    ) -> Result<u64> {
        let mut held = lock(&self.0);
        same_generation("the VM's claim", held.generation, generation)?;
        let old = held.booking.claim;
        let mut new = old;
        change(&mut new);
        new.dedicated = old.dedicated;
        let ledger = held.booking.ledger.clone();
        let mut books = lock(&ledger.0);
        let verdict = verdict::judge(&books.provider, &books.totals, Some(&old), &new, headroom);
        if let Some(refusal) = verdict.refusal(&books.provider) {
            return Err(refusal);
        }
        books.totals.remove(&old);
        books.totals.add(&new);
        books.generation += 1;
        held.booking.claim = new;
        held.generation += 1;
        Ok(held.generation)
    }
}
