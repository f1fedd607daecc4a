#![forbid(unsafe_code)]
//! A queue's rings where they lie in memory. They are looked up once for as many chains as are taken in a row: a chain is a few loads then.

use std::sync::atomic::Ordering;

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, VolatileMemory, VolatileSlice};

use super::{Chain, QueueFault, Span};
use crate::memory::Memory;

/// The descriptor table and the available ring.
pub(crate) struct Rings<'m> {
    table: Table<'m>,
    avail: Part<'m>,
}

impl<'m> Rings<'m> {
    pub(super) fn new(memory: &'m Memory, desc: u64, avail: u64, size: u16) -> Self {
        let avail = Part::new(memory, avail, 4 + 2 * usize::from(size));
        Self { table: Table::new(memory, desc, size.into()), avail }
    }

    /// A field of the available ring; `None` where that is not in memory.
    #[inline]
    pub(super) fn avail(&self, offset: usize, order: Ordering) -> Option<u16> {
        let value = match &self.avail.bytes {
            Some(bytes) => bytes.load(offset, order).ok(),
            None => self.avail.memory.get_atomic(self.avail.at(offset)?, order),
        };
        value.map(u16::from_le)
    }

    /// Reads the descriptors from `head` on, each of them once. A chain has at most `limit`: a driver may choose a smaller queue than
    /// ours, and still send what we offered.
    #[inline]
    pub(super) fn walk(&self, head: u16, limit: u16, chain: &mut Chain) -> Result<(), QueueFault> {
        chain.head = head;
        chain.readable.clear();
        chain.writable.clear();
        chain.ordered = true;
        let first = self.table.get(head)?;
        // One buffer, as most are that wait for frames.
        if !first.refers_to_indirect_table() && !first.has_next() {
            return push(chain, &first);
        }
        self.walk_on(first, limit, chain)
    }

    fn walk_on(&self, first: Descriptor, limit: u16, chain: &mut Chain) -> Result<(), QueueFault> {
        let (mut table, mut descriptor, mut indirect) = (self.table, first, false);
        // The descriptor that names an indirect table does not count.
        let mut left = limit;
        loop {
            let index = if descriptor.refers_to_indirect_table() {
                if indirect {
                    return Err(QueueFault::NestedIndirect);
                }
                table = Table::indirect(self.table.part.memory, &descriptor)?;
                indirect = true;
                0
            } else {
                push(chain, &descriptor)?;
                if !descriptor.has_next() {
                    return Ok(());
                }
                descriptor.next()
            };
            left = left.checked_sub(1).ok_or(QueueFault::TooLong(limit))?;
            descriptor = table.get(index)?;
        }
    }
}

#[inline]
fn push(chain: &mut Chain, descriptor: &Descriptor) -> Result<(), QueueFault> {
    let span = Span { addr: descriptor.addr(), len: descriptor.len() };
    if span.addr.0.checked_add(u64::from(span.len)).is_none() {
        return Err(QueueFault::Wraps(span.addr.0));
    }
    if descriptor.is_write_only() {
        if span.len > 0 {
            chain.writable.push(span);
        }
    } else if span.len > 0 {
        chain.ordered &= chain.writable.is_empty();
        chain.readable.push(span);
    }
    Ok(())
}

/// Some of a driver's structures.
#[derive(Clone, Copy)]
struct Part<'m> {
    memory: &'m Memory,
    at: u64,
    /// All of it, where that is one piece of guest memory.
    bytes: Option<VolatileSlice<'m>>,
}

impl<'m> Part<'m> {
    fn new(memory: &'m Memory, at: u64, len: usize) -> Self {
        Self { memory, at, bytes: memory.slice(GuestAddress(at), len) }
    }

    fn at(&self, offset: usize) -> Option<GuestAddress> {
        self.at.checked_add(offset as u64).map(GuestAddress)
    }
}

/// The queue's descriptor table or an indirect one.
#[derive(Clone, Copy)]
struct Table<'m> {
    part: Part<'m>,
    /// In descriptors.
    len: u32,
}

const DESCRIPTOR_SIZE: usize = size_of::<Descriptor>();

impl<'m> Table<'m> {
    fn new(memory: &'m Memory, at: u64, len: u32) -> Self {
        Self { part: Part::new(memory, at, len as usize * DESCRIPTOR_SIZE), len }
    }

    fn indirect(memory: &'m Memory, descriptor: &Descriptor) -> Result<Self, QueueFault> {
        if descriptor.has_next() {
            return Err(QueueFault::IndirectNext);
        }
        let bytes = descriptor.len();
        if bytes == 0 || !bytes.is_multiple_of(DESCRIPTOR_SIZE as u32) {
            return Err(QueueFault::IndirectLength(bytes));
        }
        Ok(Self::new(memory, descriptor.addr().0, bytes / DESCRIPTOR_SIZE as u32))
    }

    #[inline]
    fn get(&self, index: u16) -> Result<Descriptor, QueueFault> {
        if u32::from(index) >= self.len {
            return Err(QueueFault::Index(index));
        }
        let offset = usize::from(index) * DESCRIPTOR_SIZE;
        if let Some(place) = self.part.bytes.as_ref().and_then(|bytes| bytes.get_ref(offset).ok()) {
            return Ok(place.load());
        }
        // The end of the table may lie where there is no memory, if nothing names it.
        let at = self.part.at(offset);
        at.and_then(|at| self.part.memory.get(at)).ok_or(QueueFault::Table(self.part.at))
    }
}
