//! For tests: guest memory as the drivers of the crate `virtio-drivers` want it, by pointers.

use std::cell::RefCell;
use std::ptr::NonNull;

use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Pages of the thread's machine that belong to the driver.
struct Pages {
    memory: GuestMemoryMmap,
    next: u64,
    end: u64,
    /// First page and count.
    free: Vec<(u64, usize)>,
}

thread_local! {
    static PAGES: RefCell<Option<Pages>> = const { RefCell::new(None) };
}

/// What the drivers allocate from: guest memory, in which their buffers are bounced.
pub(crate) struct GuestPages;

impl GuestPages {
    /// From now on this thread's drivers use `memory` from `start` up. Devices see nothing else of theirs.
    pub fn provide(memory: &GuestMemoryMmap, start: u64) {
        let end = memory.last_addr().0 + 1;
        PAGES.set(Some(Pages { memory: memory.clone(), next: start, end, free: Vec::new() }));
    }

    fn take(count: usize) -> (PhysAddr, NonNull<u8>) {
        PAGES.with_borrow_mut(|pages| {
            let pages = pages.as_mut().expect("GuestPages::provide comes first");
            let again = pages.free.iter().position(|(_, n)| *n == count);
            let at = match again {
                Some(index) => pages.free.swap_remove(index).0,
                None => {
                    let at = pages.next;
                    pages.next += (count * PAGE_SIZE) as u64;
                    assert!(pages.next <= pages.end, "guest memory is used up");
                    at
                }
            };
            let host = pages.memory.get_host_address(GuestAddress(at)).unwrap();
            // SAFETY: the pages are guest memory, mapped in one piece for as long as `memory` lives, and
            // nobody else's until they are given back.
            unsafe { host.write_bytes(0, count * PAGE_SIZE) };
            (at, NonNull::new(host).unwrap())
        })
    }

    fn give_back(at: PhysAddr, count: usize) {
        PAGES.with_borrow_mut(|pages| pages.as_mut().unwrap().free.push((at, count)));
    }

    fn host(at: PhysAddr) -> *mut u8 {
        PAGES.with_borrow(|pages| pages.as_ref().unwrap().memory.get_host_address(GuestAddress(at)).unwrap())
    }
}

// SAFETY: every method hands out pages of guest memory that no one else has, page-aligned (the mapping is,
// and guest addresses are) and zeroed, until they are given back. Tests keep the memory alive.
unsafe impl Hal for GuestPages {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        Self::take(pages)
    }

    unsafe fn dma_dealloc(at: PhysAddr, _: NonNull<u8>, pages: usize) -> i32 {
        Self::give_back(at, pages);
        0
    }

    unsafe fn mmio_phys_to_virt(_: PhysAddr, _: usize) -> NonNull<u8> {
        unreachable!("registers are accessed through the buses")
    }

    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        let (at, host) = Self::take(buffer.len().div_ceil(PAGE_SIZE));
        if direction != BufferDirection::DeviceToDriver {
            // SAFETY: the caller's buffer is valid for its length, and the pages hold at least as much.
            unsafe { host.copy_from_nonoverlapping(buffer.cast(), buffer.len()) };
        }
        at
    }

    unsafe fn unshare(at: PhysAddr, buffer: NonNull<[u8]>, direction: BufferDirection) {
        if direction != BufferDirection::DriverToDevice {
            // SAFETY: as in `share`, the other way round.
            unsafe { buffer.cast::<u8>().as_ptr().copy_from_nonoverlapping(Self::host(at), buffer.len()) };
        }
        Self::give_back(at, buffer.len().div_ceil(PAGE_SIZE));
    }
}
