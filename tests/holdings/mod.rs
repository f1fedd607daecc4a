//! What this process has: whoever ends VMs wants it as it was.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::fs;

const KIB: usize = 1 << 10;

/// Open descriptors, threads, mappings and memory.
#[derive(Debug, Clone, Copy)]
pub struct Holdings {
    pub descriptors: usize,
    pub threads: usize,
    /// Mappings of guests' memory and of vCPUs.
    pub guest_maps: usize,
    /// All mappings. The allocator and the cache of threads' stacks come and go with some.
    pub maps: usize,
    /// Bytes that were allocated and not freed, by the allocator's own count. What its threads' caches keep counts, too.
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
            allocated: allocated(),
            anonymous: anonymous(),
        }
    }

    /// What is exact at any moment: descriptors, threads, mappings of guests.
    pub fn counts(&self) -> (usize, usize, usize) {
        (self.descriptors, self.threads, self.guest_maps)
    }

    /// It is what it was. The allowances are for allocators and caches that are still filling, and too small for what is left behind by each
    /// of hundreds of VMs.
    pub fn assert_as(&self, before: &Self, when: &str) {
        assert_eq!(self.counts(), before.counts(), "descriptors, threads, guests' maps {when}");
        assert!(self.maps <= before.maps + 16, "maps {when}: {self:?}, {before:?} before");
        let (heap, all) = (before.allocated + 96 * KIB, before.anonymous + 4096 * KIB);
        assert!(
            self.allocated <= heap && self.anonymous <= all,
            "memory {when}: {self:?}, {before:?} before"
        );
    }
}

/// By glibc, over all its arenas.
fn allocated() -> usize {
    #[expect(unsafe_code, reason = "the allocator's own count has no safe wrapper")]
    // SAFETY: it takes nothing and answers plain numbers.
    let info = unsafe { libc::mallinfo2() };
    info.uordblks + info.hblkhd
}

fn anonymous() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse::<usize>().unwrap() * KIB
}
