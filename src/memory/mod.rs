#![forbid(unsafe_code)]
//! Guest memory: what backs it and where the guest sees it.
//!
//! Everyone reaches it through volatile accesses only (`vm_memory::Bytes`): it is never a Rust
//! reference, since the guest writes to it at any moment.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use vm_memory::mmap::MmapRegion;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::error::{Error, ErrorKind, Result};
use crate::sys::memory::punch_hole;
use crate::sys::residency as pages;

pub(crate) use backing::HUGE;
pub(crate) use residency::{Enrolled, Roll};

mod backing;
pub(crate) mod layout;
mod residency;
pub(crate) mod slots;

/// The guest's memory. Cheap to clone; the mapping lives until the last clone is gone.
#[derive(Clone)]
pub(crate) struct Memory(Arc<Mapped>);

/// Field order is drop order: the regions lie within the address space.
struct Mapped {
    guest: GuestMemoryMmap,
    _space: Vec<MmapRegion>,
}

impl Memory {
    /// `size` bytes on sealed memfds, at the addresses that [`layout::ram`] gives.
    pub fn new(size: u64) -> Result<Self> {
        let made: Vec<_> = layout::ram(size).iter().map(backing::memfd_region).collect::<Result<_>>()?;
        let (regions, space): (Vec<_>, Vec<_>) = made.into_iter().unzip();
        let guest = GuestMemoryMmap::from_regions(regions).map_err(|e| {
            Error::new(ErrorKind::InvalidArgument, format!("laying out {size} bytes of guest memory"))
                .with_source(e)
        })?;
        Ok(Self(Arc::new(Mapped { guest, _space: space })))
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.iter().map(GuestMemoryRegion::len).sum()
    }

    /// Makes huge pages of what lies in `range`, as far as the host will. Before the guest runs.
    pub fn collapse(&self, range: Range<u64>) {
        for region in self.iter() {
            let base = region.start_addr().raw_value();
            let (start, end) = (range.start.max(base), range.end.min(base + region.len()));
            if start < end {
                backing::collapse(region, start - base..end - base);
            }
        }
    }

    /// Whether all of that is memory, of one region.
    pub fn is_ram(&self, start: u64, len: u64) -> bool {
        let region = self.find_region(GuestAddress(start));
        region.is_some_and(|r| len <= r.len() - (start - r.start_addr().raw_value()))
    }

    /// Gives what backs `len` bytes at `start` back to the host, at any time: the guest reads zero there from now on.
    /// Answers how many bytes the host has got, as it counts them; roughly, while others touch memory.
    ///
    /// # Errors
    /// `InvalidInput` where it is not all memory of one region; what the host says.
    pub fn discard(&self, start: u64, len: u64) -> io::Result<u64> {
        let outside = || io::Error::from(io::ErrorKind::InvalidInput);
        let region = self.find_region(GuestAddress(start)).ok_or_else(outside)?;
        if !self.is_ram(start, len) {
            return Err(outside());
        }
        let offset = start - region.start_addr().raw_value();
        let file = region.file_offset().ok_or_else(outside)?;
        let before = pages::occupied(file.file())?;
        punch_hole(file.file(), file.start() + offset, len)?;
        Ok(before.saturating_sub(pages::occupied(file.file())?).min(len))
    }

    /// What device code and loaders read and write through.
    #[cfg(test)]
    pub fn guest(&self) -> &GuestMemoryMmap {
        &self.0.guest
    }
}

impl std::ops::Deref for Memory {
    type Target = GuestMemoryMmap;

    fn deref(&self) -> &GuestMemoryMmap {
        &self.0.guest
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    #[test]
    fn memory_is_there_where_the_layout_says() {
        let memory = Memory::new(64 << 20).unwrap();
        assert_eq!(memory.size(), 64 << 20);
        memory.write_obj(0x1234_5678u32, GuestAddress((64 << 20) - 4)).unwrap();
        assert!(memory.write_obj(0u32, GuestAddress((64 << 20) - 3)).is_err());
        assert_eq!(memory.read_obj::<u64>(GuestAddress(0)).unwrap(), 0);
    }

    #[test]
    fn memory_above_the_hole() {
        let memory = Memory::new(layout::LOW_RAM_END + (2 << 20)).unwrap();
        memory.write_obj(7u8, GuestAddress(layout::HIGH_RAM_START + (2 << 20) - 1)).unwrap();
        assert!(memory.write_obj(7u8, GuestAddress(layout::LOW_RAM_END)).is_err());
    }

    #[test]
    fn collapsing_keeps_the_content_and_makes_huge_pages_where_the_kernel_can() {
        let memory = Memory::new(16 << 20).unwrap();
        memory.write_obj(0xabcdu16, GuestAddress((4 << 20) + 5)).unwrap();
        memory.collapse((2 << 20) + 1..(9 << 20));
        assert_eq!(memory.read_obj::<u16>(GuestAddress((4 << 20) + 5)).unwrap(), 0xabcd);
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let start = format!("{:x}-", memory.iter().next().unwrap().as_ptr().addr());
        let mine = smaps.lines().skip_while(|l| !l.starts_with(&start));
        let huge = mine.into_iter().find(|l| l.starts_with("ShmemPmdMapped:")).unwrap();
        assert!(huge.contains("4096 kB") || huge.contains("   0 kB"), "only whole pieces: {huge}");
    }

    #[test]
    fn what_is_given_back_is_free_and_reads_zero() {
        let memory = Memory::new(16 << 20).unwrap();
        for page in 0..1024u64 {
            memory.write_obj(7u8, GuestAddress(page << 12)).unwrap();
        }
        assert_eq!(memory.discard(1 << 20, 2 << 20).unwrap(), 2 << 20);
        assert_eq!(memory.discard(1 << 20, 2 << 20).unwrap(), 0, "the second time there is nothing");
        let at = |a| memory.read_obj::<u8>(GuestAddress(a)).unwrap();
        assert_eq!([at((1 << 20) - 4096), at(1 << 20), at((3 << 20) - 4096), at(3 << 20)], [7, 0, 0, 7]);
        for (start, len) in [(0, (16 << 20) + 1), (16 << 20, 4096), (4096, u64::MAX)] {
            assert!(memory.discard(start, len).is_err(), "{start:#x} {len:#x}");
        }
    }

    #[test]
    fn more_than_the_address_space_is_an_error() {
        assert!(Memory::new(1 << 50).is_err());
    }
}
