#![forbid(unsafe_code)]
//! A split virtqueue (2.7) as a device uses it: take a chain, complete it, notify.
//!
//! The registers, their checks and the doorbell's suppression are `virtio-queue`'s. Chains are walked
//! here, since its iterator ends without a word where a driver breaks the rules, and a device must tell
//! "the end" from "broken": every descriptor is read once, no more than the queue's size of them. Chains
//! are handed back here, since it can only do so one by one.

use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, VolatileMemory, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

use crate::irq::Vector;
use crate::memory::Memory;
use crate::sys::fd;

pub(crate) use super::chain::{BadBuffer, Chain, Cursor, Span};
pub(crate) use rings::Rings;

mod rings;

/// How a driver broke the rules of its ring. The queue is of no use until the driver resets the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum QueueFault {
    #[error("queue size {size} is not a power of two up to {max}")]
    Size { size: u16, max: u16 },
    #[error("a ring is not aligned or not in memory")]
    Rings,
    #[error("the available index is {ahead} ahead in a queue of {size}")]
    AvailAhead { ahead: u16, size: u16 },
    #[error("descriptor {0} is beyond the table")]
    Index(u16),
    #[error("descriptor {0} was made available while it is in use")]
    InUse(u16),
    #[error("descriptor {0} is completed but not in use")]
    NotInUse(u16),
    #[error("a chain of more than {0} descriptors, or a loop")]
    TooLong(u16),
    #[error("an indirect table in an indirect table")]
    NestedIndirect,
    #[error("an indirect descriptor with a next one")]
    IndirectNext,
    #[error("an indirect table of {0} bytes")]
    IndirectLength(u32),
    #[error("a descriptor table at {0:#x} that is not in memory")]
    Table(u64),
    #[error("a buffer at {0:#x} whose end wraps")]
    Wraps(u64),
    #[error("the queue has failed before")]
    Broken,
}

/// What the transport's registers hold for one queue: plain data and the two ways to signal.
pub(crate) struct QueueSetup {
    pub max_size: u16,
    pub size: u16,
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    pub event_idx: bool,
    pub next_avail: u16,
    pub next_used: u16,
    /// Nonblocking. Rung by the driver.
    pub doorbell: EventFd,
    /// Raised for the driver; `None` where it polls (VIRTIO_MSI_NO_VECTOR).
    pub interrupt: Option<Arc<Vector>>,
}

/// One virtqueue being served.
pub(crate) struct Queue {
    ring: virtio_queue::Queue,
    doorbell: EventFd,
    interrupt: Option<Arc<Vector>>,
    /// The available index as last read: up to there chains wait.
    avail_seen: u16,
    in_use: HeadSet,
    /// The used index up to which the driver has been told, or did not want to be.
    told: u16,
    broken: bool,
}

/// Whether one wake-up goes on after a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    More,
    Enough,
}

impl Queue {
    /// The queue at those addresses.
    ///
    /// # Errors
    /// `Size` and `Rings` where the driver has put something impossible into the registers.
    pub fn new(setup: QueueSetup, memory: &Memory) -> Result<Self, QueueFault> {
        let bad_size = QueueFault::Size { size: setup.size, max: setup.max_size };
        let mut ring = virtio_queue::Queue::new(setup.max_size).map_err(|_| bad_size)?;
        ring.try_set_size(setup.size).map_err(|_| bad_size)?;
        ring.try_set_desc_table_address(GuestAddress(setup.desc))
            .and_then(|()| ring.try_set_avail_ring_address(GuestAddress(setup.avail)))
            .and_then(|()| ring.try_set_used_ring_address(GuestAddress(setup.used)))
            .map_err(|_| QueueFault::Rings)?;
        ring.set_event_idx(setup.event_idx);
        ring.set_next_avail(setup.next_avail);
        ring.set_next_used(setup.next_used);
        ring.set_ready(true);
        // The check adds lengths to addresses: it wants room for the largest ring.
        let highest = setup.desc.max(setup.avail).max(setup.used);
        if highest > u64::MAX - (1 << 20) || !ring.is_valid(&**memory) {
            return Err(QueueFault::Rings);
        }
        Ok(Self {
            in_use: HeadSet::new(setup.size),
            avail_seen: setup.next_avail,
            ring,
            doorbell: setup.doorbell,
            interrupt: setup.interrupt,
            told: setup.next_used,
            broken: false,
        })
    }

    /// Everything to build it again from. Call it when no chain is in use.
    #[cfg(test)]
    pub fn into_setup(self) -> QueueSetup {
        QueueSetup {
            max_size: self.ring.max_size(),
            size: self.ring.size(),
            desc: self.ring.desc_table(),
            avail: self.ring.avail_ring(),
            used: self.ring.used_ring(),
            event_idx: self.ring.event_idx_enabled(),
            next_avail: self.ring.next_avail(),
            next_used: self.ring.next_used(),
            doorbell: self.doorbell,
            interrupt: self.interrupt,
        }
    }

    /// Where its table, its available and its used ring are, and the next available index, for somebody else who serves it.
    pub fn place(&self) -> ([GuestAddress; 3], u16) {
        let ring = &self.ring;
        let at = [ring.desc_table(), ring.avail_ring(), ring.used_ring()];
        (at.map(GuestAddress), ring.next_avail())
    }

    /// Who raises its interrupt, if the driver wants one.
    pub fn interrupt(&self) -> Option<&Arc<Vector>> {
        self.interrupt.as_ref()
    }

    /// Somebody else has served it, who completes chains in the order of the available ring: it goes on from where the used ring says.
    /// What was taken and not completed is taken again.
    pub fn take_over(&mut self, memory: &Memory) {
        let Some(used) = self.load(memory, self.ring.used_ring() + 2) else { return };
        self.ring.set_next_avail(used);
        self.ring.set_next_used(used);
        (self.avail_seen, self.told) = (used, used);
    }

    /// Where it stands in the two rings: the next available and the next used index.
    #[cfg(test)]
    pub fn position(&self) -> (u16, u16) {
        (self.ring.next_avail(), self.ring.next_used())
    }

    pub fn doorbell(&self) -> &EventFd {
        &self.doorbell
    }

    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// The largest number of buffers in one chain.
    pub fn max_size(&self) -> u16 {
        self.ring.max_size()
    }

    /// Rings the doorbell ourselves: more waits than one wake-up may take.
    pub fn rearm(&self) {
        // Full only when it rings anyway.
        fd::ring(&self.doorbell);
    }

    /// Hears the doorbell.
    pub fn silence(&self) {
        // EAGAIN: it was not ringing.
        let _ = self.doorbell.read();
    }

    /// Where its rings lie: found once for as many chains as are taken in a row.
    pub fn rings<'m>(&self, memory: &'m Memory) -> Rings<'m> {
        Rings::new(memory, self.ring.desc_table(), self.ring.avail_ring(), self.ring.size())
    }

    /// Takes the next chain into `chain`; `false` when none waits.
    ///
    /// # Errors
    /// The driver broke the rules: this queue refuses everything from now on.
    pub fn pop(&mut self, memory: &Memory, chain: &mut Chain) -> Result<bool, QueueFault> {
        self.pop_from(&self.rings(memory), chain)
    }

    /// The same from its [`rings`](Self::rings).
    ///
    /// # Errors
    /// As `pop`.
    #[inline]
    pub fn pop_from(&mut self, rings: &Rings<'_>, chain: &mut Chain) -> Result<bool, QueueFault> {
        if self.broken {
            return Err(QueueFault::Broken);
        }
        let taken = match self.take_head(rings) {
            Ok(None) => return Ok(false),
            Ok(Some(head)) => rings.walk(head, self.ring.max_size(), chain),
            Err(fault) => Err(fault),
        };
        chain.place = self.ring.next_avail();
        self.fail_on(taken).map(|()| true)
    }

    /// Where the next chain stands in the available ring: the index behind the last one taken.
    pub fn next_avail(&self) -> u16 {
        self.ring.next_avail()
    }

    /// Undoes the last `pop`, whose chain was not used: it is the next one again. Several are given back
    /// in the reverse order.
    pub fn give_back(&mut self, head: u16) {
        if self.in_use.remove(head) {
            let next = Wrapping(self.ring.next_avail()) - Wrapping(1);
            self.ring.set_next_avail(next.0);
        }
    }

    /// Hands a chain back to the driver, `written` bytes of it filled from its beginning.
    ///
    /// # Errors
    /// The queue is broken, or `head` was not taken from it.
    pub fn complete(&mut self, memory: &Memory, head: u16, written: u32) -> Result<(), QueueFault> {
        self.complete_all(memory, &[(head, written)])
    }

    /// Hands chains back so that the driver sees all of them or none: a frame in several buffers.
    ///
    /// # Errors
    /// The queue is broken, or a head was not taken from it.
    pub fn complete_all(&mut self, memory: &Memory, chains: &[(u16, u32)]) -> Result<(), QueueFault> {
        let before = self.ring.next_used();
        let ring = self.used_ring(memory);
        let put = chains.iter().try_for_each(|&(head, written)| self.put(ring, memory, head, written));
        if put.is_err() {
            self.ring.set_next_used(before);
        }
        put.and_then(|()| self.publish(memory))
    }

    /// Puts a chain into the used ring. The driver sees it with the next [`publish`](Self::publish) or completion.
    ///
    /// # Errors
    /// The queue is broken, or the head was not taken from it.
    pub fn put_back(&mut self, memory: &Memory, head: u16, written: u32) -> Result<(), QueueFault> {
        self.put(None, memory, head, written)
    }

    /// All of the used ring, where that is one piece of memory.
    fn used_ring<'m>(&self, memory: &'m Memory) -> Option<VolatileSlice<'m>> {
        memory.slice(GuestAddress(self.ring.used_ring()), 4 + 8 * usize::from(self.ring.size()))
    }

    #[inline]
    fn put(
        &mut self,
        ring: Option<VolatileSlice<'_>>,
        memory: &Memory,
        head: u16,
        written: u32,
    ) -> Result<(), QueueFault> {
        if self.broken {
            return Err(QueueFault::Broken);
        }
        if !self.in_use.remove(head) {
            return Err(QueueFault::NotInUse(head));
        }
        let next = self.ring.next_used();
        let element = [u32::from(head).to_le(), written.to_le()];
        let offset = 4 + 8 * usize::from(next & (self.ring.size() - 1));
        let place = ring.as_ref().and_then(|ring| ring.get_ref(offset).ok());
        let put = match place {
            Some(place) => {
                place.store(element);
                true
            }
            // Within the ring, which was found to be in memory: the address cannot wrap.
            None => memory.put(element, GuestAddress(self.ring.used_ring() + offset as u64)),
        };
        self.fail_on(put.then_some(()).ok_or(QueueFault::Rings))?;
        self.ring.set_next_used(next.wrapping_add(1));
        Ok(())
    }

    /// Lets the driver see what was put back.
    ///
    /// # Errors
    /// The queue is broken.
    pub fn publish(&mut self, memory: &Memory) -> Result<(), QueueFault> {
        if self.broken {
            return Err(QueueFault::Broken);
        }
        let next = self.ring.next_used();
        // Release: what was written into the buffers and the ring is seen before the index moves.
        let index = GuestAddress(self.ring.used_ring() + 2);
        let moved = memory.put_atomic(next.to_le(), index, Ordering::Release);
        self.fail_on(moved.then_some(()).ok_or(QueueFault::Rings))
    }

    /// Raises the interrupt if something was completed since the last time and the driver wants to know.
    pub fn notify(&mut self, memory: &Memory) {
        let (used, told) = (self.ring.next_used(), self.told);
        if used == told {
            return;
        }
        self.told = used;
        // The index that was stored must be visible before the driver's wish is read (2.7.8): it writes
        // its wish and then looks at the index once more.
        fence(Ordering::SeqCst);
        let ring = self.ring.avail_ring();
        let wanted = if self.ring.event_idx_enabled() {
            let used_event = ring + 4 + 2 * u64::from(self.ring.size());
            self.load(memory, used_event).is_none_or(|event| {
                // Whether the index has passed it since the driver was last told.
                used.wrapping_sub(event).wrapping_sub(1) < used.wrapping_sub(told)
            })
        } else {
            let no_interrupt = VRING_AVAIL_F_NO_INTERRUPT as u16;
            self.load(memory, ring).is_none_or(|flags| flags & no_interrupt == 0)
        };
        if let (true, Some(interrupt)) = (wanted, &self.interrupt) {
            interrupt.trigger();
        }
    }

    /// Asks the driver to ring the doorbell. `true` when chains wait already, for which it will not.
    ///
    /// # Errors
    /// The queue is broken.
    pub fn enable_notification(&mut self, memory: &Memory) -> Result<bool, QueueFault> {
        if self.broken {
            return Err(QueueFault::Broken);
        }
        let more = self.ring.enable_notification(&**memory);
        self.fail_on(more.map_err(|_| QueueFault::Rings))
    }

    /// Asks the driver to spare itself the doorbell: the queue is being looked at anyway.
    ///
    /// # Errors
    /// The queue is broken.
    pub fn disable_notification(&mut self, memory: &Memory) -> Result<(), QueueFault> {
        let done = self.ring.disable_notification(&**memory);
        self.fail_on(done.map_err(|_| QueueFault::Rings))
    }

    /// One wake-up's work: hands at most queue-size chains to `serve`, which completes them now or
    /// later, and may say that it was enough. `true` when chains may be left, and the caller must come back by
    /// itself.
    ///
    /// # Errors
    /// The driver broke the rules.
    pub fn drain(
        &mut self,
        memory: &Memory,
        chain: &mut Chain,
        mut serve: impl FnMut(&mut Self, &Chain) -> Result<Next, QueueFault>,
    ) -> Result<bool, QueueFault> {
        let (mut budget, rings) = (self.size(), self.rings(memory));
        loop {
            self.disable_notification(memory)?;
            while budget > 0 && self.pop_from(&rings, chain)? {
                budget -= 1;
                if serve(self, chain)? == Next::Enough {
                    return Ok(true);
                }
            }
            if budget == 0 {
                return Ok(true);
            }
            if !self.enable_notification(memory)? {
                return Ok(false);
            }
        }
    }

    fn fail_on<T>(&mut self, result: Result<T, QueueFault>) -> Result<T, QueueFault> {
        self.broken |= result.is_err();
        result
    }

    fn load(&self, memory: &Memory, at: u64) -> Option<u16> {
        memory.get_atomic(GuestAddress(at), Ordering::Relaxed).map(u16::from_le)
    }

    /// The next head of the available ring, marked as in use.
    #[inline]
    fn take_head(&mut self, rings: &Rings<'_>) -> Result<Option<u16>, QueueFault> {
        let (next, size) = (self.ring.next_avail(), self.ring.size());
        if next == self.avail_seen {
            // Acquire: what the driver wrote before it moved the index is seen after it.
            let idx = rings.avail(2, Ordering::Acquire).ok_or(QueueFault::Rings)?;
            let ahead = idx.wrapping_sub(next);
            if ahead > size {
                return Err(QueueFault::AvailAhead { ahead, size });
            }
            if ahead == 0 {
                return Ok(None);
            }
            self.avail_seen = idx;
        }
        let entry = 4 + 2 * usize::from(next & (size - 1));
        let head = rings.avail(entry, Ordering::Relaxed).ok_or(QueueFault::Rings)?;
        if head >= size {
            return Err(QueueFault::Index(head));
        }
        if !self.in_use.insert(head) {
            return Err(QueueFault::InUse(head));
        }
        self.ring.set_next_avail(next.wrapping_add(1));
        Ok(Some(head))
    }
}

/// Which heads the device holds.
struct HeadSet(Box<[u64]>);

impl HeadSet {
    fn new(size: u16) -> Self {
        Self(vec![0; usize::from(size).div_ceil(64)].into())
    }

    /// Whether it was not there before.
    fn insert(&mut self, head: u16) -> bool {
        let Some(word) = self.0.get_mut(usize::from(head / 64)) else { return false };
        let bit = 1 << (head % 64);
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    /// Whether it was there.
    fn remove(&mut self, head: u16) -> bool {
        let Some(word) = self.0.get_mut(usize::from(head / 64)) else { return false };
        let bit = 1 << (head % 64);
        let there = *word & bit != 0;
        *word &= !bit;
        there
    }
}

#[cfg(test)]
mod tests;
