#![forbid(unsafe_code)]
//! Guest memory: what backs it and where the guest sees it.
//!
//! Everyone reaches it through volatile accesses only (`vm_memory::Bytes`): it is never a Rust
//! reference, since the guest writes to it at any moment.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use vm_memory::mmap::{GuestRegionMmap, MmapRegion};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::error::{Error, ErrorKind, Result};
use crate::sys::memory::{Advice, advise, punch_hole};
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

/// What came of paging out, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PagedOut {
    /// Where to go on.
    pub next: u64,
    /// What was there of what was named to the kernel.
    pub named: u64,
    /// What is not there any more.
    pub gone: u64,
}

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

    /// Gives everything back to the host, of a guest that will not run any more: it reads zero from now on.
    pub fn discard_all(&self) {
        for region in self.iter() {
            if let Err(error) = self.discard(region.start_addr().raw_value(), region.len()) {
                log::warn!("giving a guest's memory back: {error}");
            }
        }
    }

    /// Pages out about `bytes` of what is there, from `cursor` on (an offset into all regions together), piece by piece,
    /// at most once around and until the deadline. What the guest touches meanwhile comes back.
    pub fn page_out(&self, cursor: u64, bytes: u64, deadline: Instant) -> PagedOut {
        let size = self.size();
        let (mut done, mut seen) = (PagedOut { next: cursor % size, named: 0, gone: 0 }, 0);
        while done.gone < bytes && seen < size && (seen == 0 || Instant::now() < deadline) {
            let Some((region, start, offset, len)) = self.piece(done.next) else { break };
            let there = || pages::resident_in(region, offset as usize, len as usize).unwrap_or(0);
            let before = there();
            if before > 0 {
                done.named += before;
                // Where there is no swap, or it is full, the pages stay.
                let _ = advise(region, offset as usize, len as usize, Advice::PageOut);
                done.gone += before.saturating_sub(there());
            }
            seen += len;
            done.next = (start + len) % size;
        }
        done
    }

    /// The huge page that `cursor` is in: its region, where it starts, also in that region, and how much of it there is.
    fn piece(&self, cursor: u64) -> Option<(&GuestRegionMmap, u64, u64, u64)> {
        let mut base = 0;
        for region in self.iter() {
            let offset = cursor.checked_sub(base)? / HUGE * HUGE;
            if offset < region.len() {
                return Some((region, base + offset, offset, HUGE.min(region.len() - offset)));
            }
            base += region.len();
        }
        None
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
    fn paging_out_goes_around_once_and_keeps_the_content() {
        let memory = Memory::new(5 << 20).unwrap();
        for page in [0u64, 600, 1279] {
            memory.write_obj(page as u8 | 1, GuestAddress(page << 12)).unwrap();
        }
        let later = Instant::now() + std::time::Duration::from_secs(60);
        let done = memory.page_out(3 << 20, u64::MAX, later);
        assert_eq!((done.named, done.next), (3 << 12, 2 << 20), "from the piece at 2 MiB around to it");
        assert!(done.gone <= done.named, "nothing goes where there is no swap");
        for page in [0u64, 600, 1279] {
            assert_eq!(memory.read_obj::<u8>(GuestAddress(page << 12)).unwrap(), page as u8 | 1);
        }
        assert_eq!(memory.page_out(0, u64::MAX, Instant::now()).next, 2 << 20, "one piece at least");
        memory.discard_all();
        assert_eq!(memory.page_out(0, 1, later).named, 0);
    }

    #[test]
    fn more_than_the_address_space_is_an_error() {
        assert!(Memory::new(1 << 50).is_err());
    }
}
