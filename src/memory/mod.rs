#![forbid(unsafe_code)]
//! Guest memory: what backs it and where the guest sees it.
//!
//! Everyone reaches it through volatile accesses only (`vm_memory::Bytes`): it is never a Rust
//! reference, since the guest writes to it at any moment.

use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::error::{Error, ErrorKind, Result};

mod backing;
pub(crate) mod layout;
pub(crate) mod slots;

/// The guest's memory. Cheap to clone; the mapping lives until the last clone is gone.
#[derive(Clone)]
pub(crate) struct Memory(Arc<GuestMemoryMmap>);

impl Memory {
    /// `size` bytes on sealed memfds, at the addresses that [`layout::ram`] gives.
    pub fn new(size: u64) -> Result<Self> {
        let regions = layout::ram(size)
            .into_iter()
            .map(|range| backing::memfd_region(GuestAddress(range.start), range.end - range.start))
            .collect::<Result<Vec<_>>>()?;
        let mmap = GuestMemoryMmap::from_regions(regions).map_err(|e| {
            Error::new(ErrorKind::InvalidArgument, format!("laying out {size} bytes of guest memory"))
                .with_source(e)
        })?;
        Ok(Self(Arc::new(mmap)))
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.0.iter().map(GuestMemoryRegion::len).sum()
    }

    /// What device code and loaders read and write through.
    pub fn guest(&self) -> &GuestMemoryMmap {
        &self.0
    }
}

impl std::ops::Deref for Memory {
    type Target = GuestMemoryMmap;

    fn deref(&self) -> &GuestMemoryMmap {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

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
    fn more_than_the_address_space_is_an_error() {
        assert!(Memory::new(1 << 50).is_err());
    }
}
