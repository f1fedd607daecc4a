//! Token buckets against a model with numbers as long as they need: limits that change, operations of any size, any time.

use std::time::Duration;

use arbitrary::{Result, Unstructured};
use vmbed::RateLimit;
use vmbed::internals::Bucket;

const STEPS: usize = 400;
const SECOND: u128 = 1_000_000_000;

/// How deep an input went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Depth {
    /// Operations that passed, and their bytes; those that passed because nothing was limited.
    pub passed: u32,
    pub bytes: u128,
    pub unlimited: u32,
    /// Operations that had to wait for bytes, and those that had to wait for operations.
    pub no_bytes: u32,
    pub no_ops: u32,
    /// Waits that were waited for, to the nanosecond.
    pub waited: u32,
    /// Debts that were left, by operations longer than what was there.
    pub debts: u32,
    /// Rests that have filled it.
    pub filled: u32,
    /// Limits that were changed in the middle of a debt.
    pub changed: u32,
}

impl Depth {
    /// What a campaign sums up.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("passed", self.passed.into()),
            ("bytes", u64::try_from(self.bytes >> 20).unwrap_or(u64::MAX)),
            ("unlimited", self.unlimited.into()),
            ("no_bytes", self.no_bytes.into()),
            ("no_ops", self.no_ops.into()),
            ("waited", self.waited.into()),
            ("debts", self.debts.into()),
            ("filled", self.filled.into()),
            ("changed", self.changed.into()),
        ]
    }
}

/// What is left of one limit: whole tokens and billionths.
#[derive(Clone, Copy)]
struct Left {
    rate: u64,
    burst: i128,
    level: i128,
    fraction: u128,
    at: u64,
}

impl Left {
    fn new(rate: u64, burst: u64, at: u64) -> Self {
        // As many as a signed number holds.
        let burst = i128::from(burst.clamp(1, i64::MAX as u64));
        Self { rate, burst, level: burst, fraction: 0, at }
    }

    /// Whether it is full now.
    fn pass(&mut self, now: u64) -> bool {
        let gained = u128::from(now.saturating_sub(self.at)) * u128::from(self.rate) + self.fraction;
        self.at = self.at.max(now);
        self.level += (gained / SECOND) as i128;
        self.fraction = gained % SECOND;
        if self.level >= self.burst {
            (self.level, self.fraction) = (self.burst, 0);
        }
        self.level == self.burst
    }

    fn is_ready(&self) -> bool {
        self.rate == 0 || self.level > 0
    }

    /// What is longer than a signed number is as long as that.
    fn spend(&mut self, count: u64) {
        if self.rate > 0 {
            self.level = (self.level - i128::from(count)).max(i64::MIN.into());
        }
    }
}

struct Model {
    bucket: Bucket,
    bytes: Left,
    ops: Left,
    now: u64,
    depth: Depth,
}

/// Runs one input. Panics where the bucket and the model differ.
pub fn run(data: &[u8]) -> Depth {
    let mut u = Unstructured::new(data);
    let now = number(&mut u).unwrap_or(0);
    let first = limit(&mut u).unwrap_or(RateLimit::NONE);
    let mut model = Model {
        bucket: Bucket::new(first, now),
        bytes: Left::new(first.bytes_per_second, first.bytes_burst, now),
        ops: Left::new(first.ops_per_second, first.ops_burst, now),
        now,
        depth: Depth::default(),
    };
    for _ in 0..STEPS {
        if u.is_empty() || model.step(&mut u).is_err() {
            break;
        }
    }
    model.depth
}

/// Of any magnitude.
fn number(u: &mut Unstructured<'_>) -> Result<u64> {
    let bits = u.int_in_range(0..=70u32)?;
    Ok(match bits {
        0..64 => u.arbitrary::<u64>()? >> bits,
        64 => u64::MAX,
        _ => 0,
    })
}

fn limit(u: &mut Unstructured<'_>) -> Result<RateLimit> {
    let mut limit = RateLimit::NONE;
    if u.ratio(2u8, 3u8)? {
        limit = limit.bytes(number(u)?, number(u)?);
    }
    if u.ratio(2u8, 3u8)? {
        let few = u.arbitrary::<bool>()?;
        let ops = |u: &mut Unstructured<'_>| if few { Ok(u.arbitrary::<u8>()?.into()) } else { number(u) };
        limit = limit.ops(ops(u)?, ops(u)?);
    }
    Ok(limit)
}

impl Model {
    fn step(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        // A little later, or much; mostly in nanoseconds to seconds.
        let later = if u.ratio(1u8, 10u8)? { number(u)? } else { number(u)? >> 32 };
        self.now = self.now.saturating_add(later);
        // Other threads' clocks may be a little behind.
        let now =
            if u.ratio(1u8, 16u8)? { self.now.saturating_sub(u.arbitrary::<u8>()?.into()) } else { self.now };
        match u.int_in_range(0..=9u8)? {
            0 => {
                let limit = limit(u)?;
                self.set(limit, now);
            }
            1 => {
                let bytes = number(u)?;
                self.bucket.spend(bytes, now);
                self.refill(now);
                self.spent(bytes);
            }
            _ => {
                let bytes = number(u)?;
                self.take(bytes, now);
            }
        }
        Ok(())
    }

    fn refill(&mut self, now: u64) {
        for left in [&mut self.bytes, &mut self.ops] {
            if left.rate > 0 {
                let was = left.level;
                self.depth.filled += u32::from(left.pass(now) && was < left.burst);
            }
        }
    }

    fn spent(&mut self, bytes: u64) {
        self.bytes.spend(bytes);
        self.ops.spend(1);
        self.depth.debts += u32::from(self.bytes.rate > 0 && self.bytes.level < 0);
    }

    fn set(&mut self, limit: RateLimit, now: u64) {
        self.bucket.set(limit, now);
        self.refill(now);
        let indebted = [&self.bytes, &self.ops].iter().any(|left| left.rate > 0 && left.level < 0);
        self.depth.changed += u32::from(indebted);
        let change = |old: &mut Left, rate, burst| {
            let new = Left::new(rate, burst, now);
            // What was not limited has used nothing up.
            let level = if old.rate > 0 { old.level.min(new.burst) } else { new.burst };
            *old = Left { level, ..new };
        };
        change(&mut self.bytes, limit.bytes_per_second, limit.bytes_burst);
        change(&mut self.ops, limit.ops_per_second, limit.ops_burst);
    }

    fn take(&mut self, bytes: u64, now: u64) {
        let answer = self.bucket.take(bytes, now);
        self.refill(now);
        let ready = self.bytes.is_ready() && self.ops.is_ready();
        assert_eq!(answer.is_ok(), ready, "{bytes} bytes at {now}");
        let Err(wait) = answer else {
            self.spent(bytes);
            self.depth.passed += 1;
            self.depth.bytes += u128::from(bytes);
            self.depth.unlimited += u32::from(self.bytes.rate == 0 && self.ops.rate == 0);
            return;
        };
        self.depth.no_bytes += u32::from(!self.bytes.is_ready());
        self.depth.no_ops += u32::from(!self.ops.is_ready());
        assert!(wait > Duration::ZERO);
        // Not a nanosecond too long, and none too short, where there is such a time; as long as no clock is behind.
        let is_latest = now == self.now;
        let then = u64::try_from(wait.as_nanos()).ok().filter(|wait| *wait < u64::MAX);
        if let Some(then) = then.and_then(|wait| now.checked_add(wait)).filter(|_| is_latest) {
            let mut copy = self.bucket.clone();
            assert!(copy.take(1, then - 1).is_err(), "it waits too long: {wait:?}");
            assert!(copy.take(1, then).is_ok(), "it waits too short: {wait:?}");
            self.depth.waited += 1;
        }
    }
}
