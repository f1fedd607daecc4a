#![forbid(unsafe_code)]
//! What every request of every device does many times: a few bytes at one place. Guest memory is a piece or two, so looking
//! at each beats the search and the bookkeeping for buffers that may span several.

use std::sync::atomic::Ordering;

use vm_memory::{
    AtomicAccess, ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, VolatileMemory,
    VolatileSlice,
};

use super::Memory;

impl Memory {
    /// The bytes there; `None` where they do not lie in one piece of guest memory. What crosses from one into the next is for
    /// `get_slices`.
    #[inline]
    pub fn slice(&self, at: GuestAddress, len: usize) -> Option<VolatileSlice<'_>> {
        self.0.guest.iter().find_map(|region| {
            let offset = usize::try_from(at.0.checked_sub(region.start_addr().0)?).ok()?;
            region.as_volatile_slice().ok()?.subslice(offset, len).ok()
        })
    }

    /// Reads a value, once.
    #[inline]
    pub fn get<T: ByteValued>(&self, at: GuestAddress) -> Option<T> {
        Some(self.slice(at, size_of::<T>())?.get_ref(0).ok()?.load())
    }

    /// Writes a value; whether it is guest memory.
    #[inline]
    pub fn put<T: ByteValued>(&self, value: T, at: GuestAddress) -> bool {
        let place = self.slice(at, size_of::<T>());
        let place = place.as_ref().and_then(|piece| piece.get_ref(0).ok());
        place.map(|place| place.store(value)).is_some()
    }

    /// Reads a value that the driver may change at the same time, whole.
    #[inline]
    pub fn get_atomic<T: AtomicAccess>(&self, at: GuestAddress, order: Ordering) -> Option<T> {
        self.slice(at, size_of::<T>())?.load(0, order).ok()
    }

    /// Writes a value whole; whether it is guest memory, and aligned.
    #[inline]
    pub fn put_atomic<T: AtomicAccess>(&self, value: T, at: GuestAddress, order: Ordering) -> bool {
        self.slice(at, size_of::<T>()).is_some_and(|piece| piece.store(value, 0, order).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::layout;

    #[test]
    fn the_same_as_the_long_way_at_every_edge() {
        let memory = Memory::new(layout::LOW_RAM_END + (64 << 10)).unwrap();
        let last = memory.iter().map(|r| r.start_addr().0 + r.len()).max().unwrap();
        let edges = memory.iter().flat_map(|r| [r.start_addr().0, r.start_addr().0 + r.len()]);
        let places = edges.flat_map(|edge| (0..20).map(move |i| edge.wrapping_add(i).wrapping_sub(10)));
        for (i, at) in places.chain([u64::MAX, last + (1 << 40)]).enumerate() {
            let (at, value) = (GuestAddress(at), 0x0102_0304_0506_0708 + i as u64);
            let mut long = [0; 8];
            let there = memory.read_slice(&mut long, at).is_ok();
            assert_eq!(memory.put(value, at), there, "{at:?}");
            assert_eq!(memory.get(at), there.then_some(value), "{at:?}");
            if there {
                assert_eq!(memory.read_obj::<u64>(at).unwrap(), value);
            }
            let aligned = there && at.0 % 8 == 0;
            assert_eq!(memory.put_atomic(value + 1, at, Ordering::Release), aligned, "{at:?}");
            assert_eq!(memory.get_atomic(at, Ordering::Acquire), aligned.then_some(value + 1), "{at:?}");
        }
    }
}
