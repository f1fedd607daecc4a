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
    /// Discards and zeroings that succeeded.
    pub discards: u64,
    /// Their bytes.
    pub discarded_bytes: u64,
    /// How long requests took, from their parsing to their answer: element 0 counts those below 1 µs, element `i` those of
    /// 2^(i-1) to below 2^i µs, the last one also all that took longer.
    pub latency: [u64; LATENCIES],
}

/// Elements of a histogram of latencies: the last one begins at 4.2 s.
pub(crate) const LATENCIES: usize = 24;

impl DiskStatistics {
    pub(super) fn plus(mut self, other: &Self) -> Self {
        let Self {
            reads,
            read_bytes,
            writes,
            written_bytes,
            flushes,
            errors,
            discards,
            discarded_bytes,
            latency,
        } = other;
        self.reads += reads;
        self.read_bytes += read_bytes;
        self.writes += writes;
        self.written_bytes += written_bytes;
        self.flushes += flushes;
        self.errors += errors;
        self.discards += discards;
        self.discarded_bytes += discarded_bytes;
        self.latency.iter_mut().zip(latency).for_each(|(sum, one)| *sum += one);
        self
    }
}

/// The same of one queue, while it is being counted: by its thread alone, read by anyone.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    reads: Count,
    read_bytes: Count,
    writes: Count,
    written_bytes: Count,
    flushes: Count,
    errors: Count,
    discards: Count,
    discarded_bytes: Count,
    latency: [Count; LATENCIES],
}

/// What a request is counted as, with its bytes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Read(u32),
    Write(u32),
    Flush,
    /// Zeroing is one, too.
    Discard(u64),
    /// Its errors only.
    Other,
}

impl Counters {
    /// One that took so many nanoseconds.
    pub(super) fn count(&self, kind: Kind, took: u64, succeeded: bool) {
        let microseconds = took / 1000;
        let element = (u64::BITS - microseconds.leading_zeros()) as usize;
        self.latency[element.min(LATENCIES - 1)].add(1);
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
            Kind::Discard(bytes) => {
                self.discards.add(1);
                self.discarded_bytes.add(bytes);
            }
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
            discards: self.discards.get(),
            discarded_bytes: self.discarded_bytes.get(),
            latency: self.latency.each_ref().map(Count::get),
        }
    }
}
