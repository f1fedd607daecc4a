//! What this process has: whoever ends VMs wants it as it was.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};

const KIB: usize = 1 << 10;

/// Bytes that Rust code has allocated and not freed. glibc's own count would have those in it, too, that its threads keep for
/// their next allocations: a quarter of a megabyte, which fills over hundreds of VMs.
static LIVE: AtomicUsize = AtomicUsize::new(0);

struct Counting;

#[expect(unsafe_code, reason = "an allocator that counts")]
// SAFETY: all is done by the system's allocator, as it was asked.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Open descriptors, threads, mappings and memory.
#[derive(Debug, Clone, Copy)]
pub struct Holdings {
    pub descriptors: usize,
    pub threads: usize,
    /// Mappings of guests' memory and of vCPUs.
    pub guest_maps: usize,
    /// All mappings. The allocator and the cache of threads' stacks come and go with some.
    pub maps: usize,
    /// Bytes that were allocated and not freed.
    pub allocated: usize,
    /// Bytes of memory that belongs to no file, allocated or not: guests' memory is not among it.
    pub anonymous: usize,
}

impl Holdings {
    pub fn now() -> Self {
        let count = |path: &str| fs::read_dir(path).unwrap().count();
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let of_guests = |line: &&str| line.contains("vmbed-guest") || line.contains("kvm-vcpu");
        Self {
            descriptors: count("/proc/self/fd"),
            threads: count("/proc/self/task"),
            guest_maps: maps.lines().filter(of_guests).count(),
            maps: maps.lines().count(),
            allocated: LIVE.load(Ordering::Relaxed),
            anonymous: anonymous(),
        }
    }

    /// What is exact at any moment: descriptors, threads, mappings of guests.
    pub fn counts(&self) -> (usize, usize, usize) {
        (self.descriptors, self.threads, self.guest_maps)
    }

    /// It is what it was. The allowances are for lists that have room for more than is in them, and for caches of allocators and of
    /// threads' stacks; of hundreds of VMs, none can have left anything.
    pub fn assert_as(&self, before: &Self, when: &str) {
        self.assert_within(before, Self { maps: 16, allocated: KIB, anonymous: 4096 * KIB, ..NOTHING }, when);
    }

    /// The same with other allowances.
    pub fn assert_within(&self, before: &Self, more: Self, when: &str) {
        assert_eq!(self.counts(), before.counts(), "descriptors, threads, guests' maps {when}");
        let fits = self.maps <= before.maps + more.maps
            && self.allocated <= before.allocated + more.allocated
            && self.anonymous <= before.anonymous + more.anonymous;
        assert!(fits, "maps and memory {when}: {self:?}, {before:?} before");
    }
}

/// To say what of it there is.
pub const NOTHING: Holdings =
    Holdings { descriptors: 0, threads: 0, guest_maps: 0, maps: 0, allocated: 0, anonymous: 0 };

fn anonymous() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse::<usize>().unwrap() * KIB
}
