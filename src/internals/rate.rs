#![forbid(unsafe_code)]
//! A token bucket alone, for a fuzz target that holds it against a model. Times are nanoseconds from any beginning.

use std::time::Duration;

use crate::config::RateLimit;
use crate::rate::TokenBucket;

/// The bucket.
#[derive(Clone, Debug)]
pub struct Bucket(TokenBucket);

impl Bucket {
    /// Full.
    pub fn new(limit: RateLimit, now: u64) -> Self {
        Self(TokenBucket::new(limit, Duration::from_nanos(now)))
    }

    /// Changes the limit.
    pub fn set(&mut self, limit: RateLimit, now: u64) {
        self.0.set(limit, Duration::from_nanos(now));
    }

    /// Takes one operation of so many bytes.
    ///
    /// # Errors
    /// How long until it may pass.
    pub fn take(&mut self, bytes: u64, now: u64) -> Result<(), Duration> {
        self.0.take(bytes, Duration::from_nanos(now))
    }

    /// The same, also where that leaves a debt.
    pub fn spend(&mut self, bytes: u64, now: u64) {
        self.0.spend(bytes, Duration::from_nanos(now));
    }
}
