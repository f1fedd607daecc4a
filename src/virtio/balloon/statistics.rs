#![forbid(unsafe_code)]
//! What a balloon has moved, and what its guest says of its memory.

use std::time::SystemTime;

use crate::units::{Bytes, Count};

/// Memory that a guest said it gave back, and what the host got of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct GivenBack {
    /// What the guest named, all of it guest memory.
    pub claimed: Bytes,
    /// By how much what backs the guest's memory has shrunk for it, as the host counts it: less than claimed where
    /// the guest had never touched it, or the host's page was larger than what was given back of it.
    pub measured: Bytes,
}

/// What a balloon has done since the VM was built.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BalloonStatistics {
    /// How much memory the guest was asked to give up.
    pub target: Bytes,
    /// How much it says that it has given up: what the ledger calls loaned. A guest may lie, and may touch that memory
    /// again: no promise depends on it.
    pub actual: Bytes,
    /// What it put into the balloon, in all.
    pub inflated: GivenBack,
    /// What it took out again, in all, by its own account.
    pub deflated: Bytes,
    /// What its free page reporting gave back, in all.
    pub reported: GivenBack,
    /// What [`Vm::discard_free_pages`](crate::Vm::discard_free_pages) gave back, in all.
    pub hinted: GivenBack,
    /// Pages and ranges that it named and that are not its memory, or not in whole pages. They were ignored.
    pub ignored: u64,
}

/// A guest's own account of its memory (virtio 1.2, section 5.5.6.3). Numbers that its driver did not give are `None`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct GuestMemory {
    /// When it came.
    pub time: SystemTime,
    /// What is swapped in, in all.
    pub swapped_in: Option<Bytes>,
    /// What is swapped out, in all.
    pub swapped_out: Option<Bytes>,
    /// Page faults that had to read a disk, in all.
    pub major_faults: Option<u64>,
    /// Other page faults, in all.
    pub minor_faults: Option<u64>,
    /// What is of no use for anything now.
    pub free: Option<Bytes>,
    /// What it has altogether; Linux leaves out what its balloon holds, unless it may deflate it.
    pub total: Option<Bytes>,
    /// What new programs could have without swapping.
    pub available: Option<Bytes>,
    /// What can be had back quickly: file caches.
    pub caches: Option<Bytes>,
    /// Huge pages that were allocated, in all.
    pub huge_allocations: Option<u64>,
    /// Huge pages that could not be, in all.
    pub huge_failures: Option<u64>,
    /// Processes that were killed for want of memory, in all.
    pub oom_kills: Option<u64>,
    /// How often somebody had to wait for memory, in all.
    pub stalls: Option<u64>,
}

impl GuestMemory {
    pub(super) fn new(time: SystemTime) -> Self {
        Self {
            time,
            swapped_in: None,
            swapped_out: None,
            major_faults: None,
            minor_faults: None,
            free: None,
            total: None,
            available: None,
            caches: None,
            huge_allocations: None,
            huge_failures: None,
            oom_kills: None,
            stalls: None,
        }
    }

    /// One number of the driver's, by its tag (`VIRTIO_BALLOON_S_*`). What a later specification added is left out.
    pub(super) fn set(&mut self, tag: u16, value: u64) {
        let bytes = Some(Bytes(value));
        match tag {
            0 => self.swapped_in = bytes,
            1 => self.swapped_out = bytes,
            2 => self.major_faults = Some(value),
            3 => self.minor_faults = Some(value),
            4 => self.free = bytes,
            5 => self.total = bytes,
            6 => self.available = bytes,
            7 => self.caches = bytes,
            8 => self.huge_allocations = Some(value),
            9 => self.huge_failures = Some(value),
            10 => self.oom_kills = Some(value),
            11 => self.stalls = Some(value),
            _ => {}
        }
    }
}

/// What was given back in one of the ways: counted by the balloon's thread alone, read by anyone.
#[derive(Debug, Default)]
pub(super) struct Given {
    pub claimed: Count,
    pub measured: Count,
}

impl Given {
    pub fn get(&self) -> GivenBack {
        GivenBack { claimed: Bytes(self.claimed.get()), measured: Bytes(self.measured.get()) }
    }
}

/// All that is counted so.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub inflated: Given,
    pub reported: Given,
    pub hinted: Given,
    pub deflated: Count,
    pub ignored: Count,
}
