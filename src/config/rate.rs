#![forbid(unsafe_code)]
//! Limits over time.

/// How many bytes and operations (frames, requests) may pass a second, and how many at once after a rest.
///
/// ```
/// use vmbed::RateLimit;
/// // 100 MB/s with bursts of 4 MB, and 20,000 frames/s with bursts of a tenth of that.
/// let limit = RateLimit::NONE.bytes(100_000_000, 4_000_000).ops(20_000, 0);
/// assert_eq!(limit.ops_burst, 2_000);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields, default)
)]
#[non_exhaustive]
pub struct RateLimit {
    /// Bytes a second; 0 for any number.
    pub bytes_per_second: u64,
    /// Bytes at once after a rest; at least 1 where bytes are limited.
    pub bytes_burst: u64,
    /// Operations a second; 0 for any number.
    pub ops_per_second: u64,
    /// Operations at once after a rest; at least 1 where operations are limited.
    pub ops_burst: u64,
}

impl RateLimit {
    /// Everything passes.
    pub const NONE: Self = Self { bytes_per_second: 0, bytes_burst: 0, ops_per_second: 0, ops_burst: 0 };

    /// With that many bytes a second. A burst of 0 stands for a tenth of a second's.
    #[must_use]
    pub const fn bytes(mut self, per_second: u64, burst: u64) -> Self {
        self.bytes_per_second = per_second;
        self.bytes_burst = burst_of(per_second, burst);
        self
    }

    /// With that many operations a second. A burst of 0 stands for a tenth of a second's.
    #[must_use]
    pub const fn ops(mut self, per_second: u64, burst: u64) -> Self {
        self.ops_per_second = per_second;
        self.ops_burst = burst_of(per_second, burst);
        self
    }

    /// Whether everything passes.
    pub const fn is_none(self) -> bool {
        self.bytes_per_second == 0 && self.ops_per_second == 0
    }
}

const fn burst_of(per_second: u64, burst: u64) -> u64 {
    match burst {
        0 if per_second > 0 && per_second < 10 => 1,
        0 => per_second / 10,
        _ => burst,
    }
}
