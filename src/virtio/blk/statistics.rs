#![forbid(unsafe_code)]
//! What a disk has done.

use crate::units::Count;

/// What a disk has done since the VM was built. A request counts when it is answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DiskStatistics {
    /// Reads that succeeded.
    pub reads: u64,
    /// Their bytes.
    pub read_bytes: u64,
    /// Writes that succeeded.
    pub writes: u64,
    /// Their bytes.
    pub written_bytes: u64,
    /// Flushes that succeeded.
    pub flushes: u64,
    /// Requests that were answered with an error: the host failed, or what the driver asked for was nonsense.
    pub errors: u64,
}

/// The same, while it is being counted: by the disk's thread alone, read by anyone.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    reads: Count,
    read_bytes: Count,
    writes: Count,
    written_bytes: Count,
    flushes: Count,
    errors: Count,
}

/// What a request is counted as, with its bytes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Read(u32),
    Write(u32),
    Flush,
    /// Its errors only.
    Other,
}

impl Counters {
    pub(super) fn count(&self, kind: Kind, succeeded: bool) {
        if !succeeded {
            return self.errors.add(1);
        }
        match kind {
            Kind::Read(bytes) => {
                self.reads.add(1);
                self.read_bytes.add(bytes.into());
            }
            Kind::Write(bytes) => {
                self.writes.add(1);
                self.written_bytes.add(bytes.into());
            }
            Kind::Flush => self.flushes.add(1),
            Kind::Other => {}
        }
    }

    pub fn statistics(&self) -> DiskStatistics {
        DiskStatistics {
            reads: self.reads.get(),
            read_bytes: self.read_bytes.get(),
            writes: self.writes.get(),
            written_bytes: self.written_bytes.get(),
            flushes: self.flushes.get(),
            errors: self.errors.get(),
        }
    }
}
