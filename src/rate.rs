#![forbid(unsafe_code)]
//! Token buckets: how many bytes and operations may pass, over time. They have no clock of their own.

use std::time::Duration;

use crate::config::RateLimit;

const SECOND: u64 = 1_000_000_000;

/// What is left of a [`RateLimit`]. Time is what the caller says, from any beginning; it may stand still, and
/// does not go back.
///
/// Something passes as soon as anything is left, and may leave a debt: so an operation longer than the
/// burst passes too, and the next one waits for it. Over any time t, at most `burst + rate * t` and one
/// operation pass.
#[derive(Clone, Debug)]
pub(crate) struct TokenBucket {
    bytes: Tokens,
    ops: Tokens,
}

impl TokenBucket {
    /// Full.
    pub fn new(limit: RateLimit, now: Duration) -> Self {
        let now = nanoseconds(now);
        Self {
            bytes: Tokens::new(limit.bytes_per_second, limit.bytes_burst, now),
            ops: Tokens::new(limit.ops_per_second, limit.ops_burst, now),
        }
    }

    /// Changes the limit; what was used up stays so.
    pub fn set(&mut self, limit: RateLimit, now: Duration) {
        let now = nanoseconds(now);
        self.bytes.set(limit.bytes_per_second, limit.bytes_burst, now);
        self.ops.set(limit.ops_per_second, limit.ops_burst, now);
    }

    /// Takes one operation of so many bytes.
    ///
    /// # Errors
    /// How long until it may pass; nothing was taken.
    pub fn take(&mut self, bytes: u64, now: Duration) -> Result<(), Duration> {
        self.ready(now)?;
        self.spend(bytes, now);
        Ok(())
    }

    /// Whether an operation may pass.
    ///
    /// # Errors
    /// How long until it may.
    pub fn ready(&mut self, now: Duration) -> Result<(), Duration> {
        let now = nanoseconds(now);
        let wait = self.bytes.wait(now).max(self.ops.wait(now));
        if wait > 0 { Err(Duration::from_nanos(wait)) } else { Ok(()) }
    }

    /// Takes one operation of so many bytes, also where that leaves a debt.
    pub fn spend(&mut self, bytes: u64, now: Duration) {
        let now = nanoseconds(now);
        for (tokens, count) in [(&mut self.bytes, bytes), (&mut self.ops, 1)] {
            tokens.wait(now);
            tokens.take(count);
        }
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// One of the two.
#[derive(Clone, Debug)]
struct Tokens {
    /// A second; 0: not limited.
    rate: u64,
    burst: i64,
    /// Negative is debt.
    level: i64,
    /// Billionths of a token on top.
    fraction: u64,
    at: u64,
}

impl Tokens {
    fn new(rate: u64, burst: u64, at: u64) -> Self {
        let burst = i64::try_from(burst.max(1)).unwrap_or(i64::MAX);
        Self { rate, burst, level: burst, fraction: 0, at }
    }

    fn set(&mut self, rate: u64, burst: u64, now: u64) {
        let old = (self.rate > 0).then(|| {
            self.refill(now);
            self.level
        });
        *self = Self::new(rate, burst, now);
        self.level = old.unwrap_or(self.burst).min(self.burst);
    }

    fn refill(&mut self, now: u64) {
        // At most 2^64 * 2^64 and a billion: it fits.
        let elapsed = now.saturating_sub(self.at);
        let gained = u128::from(elapsed) * u128::from(self.rate) + u128::from(self.fraction);
        self.at = self.at.max(now);
        // One that has paid the largest debt back is more than an i64 holds.
        let level = i128::from(self.level) + (gained / u128::from(SECOND)) as i128;
        self.level = i64::try_from(level).unwrap_or(i64::MAX);
        self.fraction = (gained % u128::from(SECOND)) as u64;
        if self.level >= self.burst {
            (self.level, self.fraction) = (self.burst, 0);
        }
    }

    /// Nanoseconds until something is left.
    fn wait(&mut self, now: u64) -> u64 {
        if self.rate == 0 {
            return 0;
        }
        self.refill(now);
        if self.level > 0 {
            return 0;
        }
        let missing = u128::from(self.level.unsigned_abs()) + 1;
        let missing = missing * u128::from(SECOND) - u128::from(self.fraction);
        u64::try_from(missing.div_ceil(u128::from(self.rate))).unwrap_or(u64::MAX)
    }

    fn take(&mut self, count: u64) {
        if self.rate > 0 {
            self.level = self.level.saturating_sub_unsigned(count);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn a_burst_passes_and_then_the_rate() {
        let mut bucket = TokenBucket::new(RateLimit::NONE.ops(1000, 5), ms(0));
        assert!((0..5).all(|_| bucket.take(9000, ms(0)).is_ok()));
        assert_eq!(bucket.take(1, ms(0)), Err(ms(1)));
        assert_eq!(bucket.take(1, Duration::from_micros(999)), Err(Duration::from_micros(1)));
        assert_eq!(bucket.take(1, ms(1)), Ok(()));
        assert_eq!(bucket.take(1, ms(1)), Err(ms(1)));
        assert_eq!(
            (0..100).filter(|_| bucket.take(1, ms(60_000)).is_ok()).count(),
            5,
            "a rest fills it once"
        );
    }

    #[test]
    fn what_is_longer_than_the_burst_passes_and_is_paid_for_afterwards() {
        let mut bucket = TokenBucket::new(RateLimit::NONE.bytes(1000, 10), ms(0));
        assert_eq!(bucket.take(2010, ms(0)), Ok(()));
        assert_eq!(bucket.take(1, ms(0)), Err(ms(2001)));
        assert_eq!(bucket.take(1, ms(2001)), Ok(()));
    }

    #[test]
    fn both_limits_hold_and_what_is_refused_takes_nothing() {
        let mut bucket = TokenBucket::new(RateLimit::NONE.bytes(100, 100).ops(10, 2), ms(0));
        assert_eq!(bucket.take(100, ms(0)), Ok(()));
        assert!((0..50).all(|_| bucket.take(1, ms(0)).is_err()), "no bytes are left");
        assert_eq!(bucket.take(1, ms(10)), Ok(()), "and an operation was");
        assert_eq!(bucket.take(1, ms(11)), Err(ms(89)));
    }

    #[test]
    fn a_limit_is_changed_while_it_works() {
        let mut bucket = TokenBucket::new(RateLimit::NONE, ms(0));
        assert!((0..1000).all(|_| bucket.take(u64::MAX, ms(0)).is_ok()));
        bucket.set(RateLimit::NONE.bytes(1000, 1000), ms(1));
        assert_eq!(bucket.take(2000, ms(1)), Ok(()));
        bucket.set(RateLimit::NONE.bytes(1_000_000, 5000), ms(1));
        assert_eq!(
            bucket.take(1, ms(1)),
            Err(Duration::from_micros(1001)),
            "the debt stays, the rate is new"
        );
        bucket.set(RateLimit::NONE, ms(1));
        assert_eq!(bucket.take(1, ms(1)), Ok(()));
    }

    #[test]
    fn the_largest_numbers_are_numbers() {
        let most = RateLimit::NONE.bytes(u64::MAX, u64::MAX).ops(u64::MAX, u64::MAX);
        let mut bucket = TokenBucket::new(most, Duration::MAX);
        assert_eq!(bucket.take(u64::MAX, Duration::MAX), Ok(()));
        assert_eq!(bucket.take(1, ms(0)), Err(Duration::from_nanos(500_000_001)), "half of it is debt");
        let mut slow = TokenBucket::new(RateLimit::NONE.bytes(1, 0), ms(0));
        assert_eq!(slow.take(u64::MAX, ms(0)), Ok(()));
        assert!(slow.take(1, ms(0)).is_err_and(|wait| wait > Duration::from_secs(1 << 33)));
        let mut fast = TokenBucket::new(RateLimit::NONE.bytes(1 << 53, 0), ms(0));
        assert_eq!(fast.take(u64::MAX, ms(0)), Ok(()));
        let paid = fast.take(1, ms(0)).unwrap_err();
        assert_eq!(fast.take(1, paid), Ok(()), "the largest debt is paid back in one piece");
        assert_eq!(RateLimit::NONE.ops(5, 0).ops_burst, 1);
    }

    proptest! {
        /// Whatever is asked when: not more than the limit, and not less where there is always something to pass.
        #[test]
        fn the_limit_holds_over_any_time(
            rate in 1u64..100_000, burst in 1u64..10_000,
            steps in proptest::collection::vec((0u64..3_000_000, 1u64..3_000), 1..300)
        ) {
            let mut bucket = TokenBucket::new(RateLimit::NONE.bytes(rate, burst), ms(0));
            let (mut now, mut passed) = (0u64, 0u64);
            for (step, bytes) in steps {
                now += step;
                // What may have passed before this operation.
                let due = burst + (u128::from(now) * u128::from(rate) / u128::from(SECOND)) as u64;
                match bucket.take(bytes, Duration::from_nanos(now)) {
                    Ok(()) => {
                        prop_assert!(passed < due, "{passed} of {due}");
                        passed += bytes;
                    }
                    Err(wait) => {
                        prop_assert!(wait > Duration::ZERO);
                        let mut later = bucket.clone();
                        let then = Duration::from_nanos(now) + wait;
                        prop_assert!(later.clone().take(1, then - Duration::from_nanos(1)).is_err());
                        prop_assert!(later.take(1, then).is_ok());
                    }
                }
            }
        }
    }
}
