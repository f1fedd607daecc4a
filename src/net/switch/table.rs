#![forbid(unsafe_code)]
//! Which port an address was last heard from, for each VLAN on its own.
//!
//! The table is as large as it will ever be from the beginning: buckets of eight entries, each of them three
//! atomic words. Looking up and keeping an entry fresh take no lock. Whoever has to write a new one takes the
//! writers' lock if it is free, and leaves it to the next frame if not.
//!
//! No port can crowd out another: each has a share, beyond it its further addresses are not remembered; and
//! where a bucket is full, the port with the most entries loses one. Which bucket an address is in depends on
//! a secret, so that nobody can aim at one.

use std::sync::TryLockError;
use std::time::Duration;

use crate::config::MacAddress;
use crate::sys::random;
use crate::sys::sync::atomic::{AtomicU64, Ordering};
use crate::sys::sync::{Mutex, lock};

const WAYS: usize = 8;

/// Buckets that are tidied up whenever one is written to.
const SWEEP: usize = 4;

/// An entry is written anew when it is that old, in milliseconds, and not at each frame.
const FRESH: u64 = 250;

/// An address that its port has used within that time does not move to another, in milliseconds. So no port
/// takes an address from another that is in use.
const HOLD: u64 = 1000;

/// In a key: somebody is there.
const USED: u64 = 1 << 63;

pub(super) struct Table {
    buckets: Vec<Bucket>,
    secret: [u64; 2],
    /// Milliseconds.
    ageing: u64,
    writer: Mutex<Writer>,
}

type Bucket = [Slot; WAYS];

/// A key (VLAN and address) and where and when it was last heard. A reader that finds the same version before and after it has
/// read both, and no writer, has read the key's value. The key alone would not do: it may have gone and come back meanwhile.
#[derive(Default)]
struct Slot {
    key: AtomicU64,
    value: AtomicU64,
    /// Odd while it is written to.
    version: AtomicU64,
}

#[derive(Default)]
struct Writer {
    /// Entries of each port.
    counts: Vec<u32>,
    /// The next bucket to tidy up.
    swept: usize,
}

/// What came of an address that was heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Learned {
    /// It was known there already.
    Known,
    New,
    /// It was another port's.
    Moved,
    /// It is another port's, which has just used it.
    Held,
    /// It may not be there.
    Foreign,
    /// The port has its share, or the bucket is full of others that are no richer.
    Full,
    /// Somebody else is writing: next time.
    Later,
}

impl Slot {
    fn get(&self, key: u64) -> Option<Heard> {
        // Most are others'.
        if self.key.load(Ordering::Relaxed) != key {
            return None;
        }
        let version = self.version.load(Ordering::Acquire);
        let found = self.key.load(Ordering::Acquire);
        let value = self.value.load(Ordering::Acquire);
        let same = self.version.load(Ordering::Relaxed) == version;
        (found == key && same && version & 1 == 0).then_some(Heard(value))
    }

    /// By writers only.
    fn put(&self, key: u64, heard: Heard) {
        let version = self.version.load(Ordering::Relaxed);
        self.version.store(version | 1, Ordering::Relaxed);
        // Who sees one of these sees the odd version, too.
        self.key.store(key, Ordering::Release);
        self.value.store(heard.0, Ordering::Release);
        self.version.store((version | 1).wrapping_add(1), Ordering::Release);
    }
}

/// A port, and a time in milliseconds.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Heard(u64);

impl Heard {
    fn new(port: u16, now: u64) -> Self {
        Self(now << 16 | u64::from(port))
    }

    fn port(self) -> u16 {
        self.0 as u16
    }

    fn age(self, now: u64) -> u64 {
        now.saturating_sub(self.0 >> 16)
    }
}

impl Table {
    /// For `addresses` of them, so that a full table still has room in nearly every bucket.
    pub fn new(addresses: u32, ageing: Duration) -> Self {
        let buckets = (addresses as usize * 2).div_ceil(WAYS).next_power_of_two();
        let mut bytes = [0; 16];
        random(&mut bytes);
        let [a, b] =
            [&bytes[..8], &bytes[8..]].map(|half| half.iter().fold(0, |n, byte| n << 8 | u64::from(*byte)));
        Self {
            buckets: (0..buckets).map(|_| Bucket::default()).collect(),
            secret: [a, b | 1],
            ageing: u64::try_from(ageing.as_millis()).unwrap_or(u64::MAX),
            writer: Mutex::default(),
        }
    }

    /// The port behind which `address` is.
    #[inline]
    pub fn find(&self, vlan: u16, address: MacAddress, now: u64) -> Option<u16> {
        let key = key(vlan, address);
        let heard = self.bucket(key).iter().find_map(|slot| slot.get(key))?;
        (heard.age(now) <= self.ageing).then(|| heard.port())
    }

    /// `address` was heard from `port`, which may have `share` entries. `may` is asked whether it may be there.
    pub fn learn(
        &self,
        (vlan, address): (u16, MacAddress),
        (port, share): (u16, u32),
        now: u64,
        may: impl FnOnce() -> bool,
    ) -> Learned {
        let key = key(vlan, address);
        let bucket = self.bucket(key);
        let known = bucket.iter().find_map(|slot| slot.get(key).map(|heard| (slot, heard)));
        if let Some((slot, heard)) = known.filter(|(_, heard)| heard.age(now) <= self.ageing) {
            if heard.port() == port {
                if !may() {
                    // Somebody else's by now.
                    self.forget_address(bucket, key, port);
                    return Learned::Foreign;
                }
                if heard.age(now) >= FRESH {
                    // Not where somebody else has written to it meanwhile.
                    let new = Heard::new(port, now).0;
                    let _ = slot.value.compare_exchange(heard.0, new, Ordering::AcqRel, Ordering::Relaxed);
                }
                return Learned::Known;
            }
            if heard.age(now) < HOLD {
                return if may() { Learned::Held } else { Learned::Foreign };
            }
        }
        if !may() {
            return Learned::Foreign;
        }
        let mut writer = match self.writer.try_lock() {
            Ok(writer) => writer,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Learned::Later,
        };
        self.sweep(&mut writer, now);
        writer.write(bucket, key, Heard::new(port, now), share, self.ageing)
    }

    /// For how many milliseconds an address that was known need not be looked at again: it is written anew in time.
    pub fn fresh_for(&self) -> u64 {
        if self.ageing >= 4 * FRESH { FRESH } else { 0 }
    }

    /// Forgets what is behind a port.
    pub fn forget(&self, port: u16) {
        let mut writer = lock(&self.writer);
        for slot in self.buckets.iter().flatten() {
            if slot.key.load(Ordering::Relaxed) != 0
                && Heard(slot.value.load(Ordering::Relaxed)).port() == port
            {
                slot.key.store(0, Ordering::Release);
            }
        }
        *writer.count(port) = 0;
    }

    /// Forgets those of these addresses that are elsewhere than behind `port`.
    pub fn forget_elsewhere(&self, addresses: &[MacAddress], port: u16) {
        if addresses.is_empty() {
            return;
        }
        let mut writer = lock(&self.writer);
        for slot in self.buckets.iter().flatten() {
            let key = slot.key.load(Ordering::Relaxed);
            let behind = Heard(slot.value.load(Ordering::Relaxed)).port();
            if key != 0
                && behind != port
                && addresses.iter().any(|address| self::key(0, *address) == key & !VLAN)
            {
                slot.key.store(0, Ordering::Release);
                writer.lose(behind);
            }
        }
    }

    #[cold]
    fn forget_address(&self, bucket: &Bucket, key: u64, port: u16) {
        let mut writer = lock(&self.writer);
        for slot in bucket {
            let behind = Heard(slot.value.load(Ordering::Relaxed)).port();
            if slot.key.load(Ordering::Relaxed) == key && behind == port {
                slot.key.store(0, Ordering::Release);
                writer.lose(port);
            }
        }
    }

    /// Entries of a port, also those that have aged and are not tidied up yet.
    pub fn count(&self, port: u16) -> u32 {
        *lock(&self.writer).count(port)
    }

    fn bucket(&self, key: u64) -> &Bucket {
        let mixed = u128::from(key ^ self.secret[0]) * u128::from(self.secret[1]);
        let hash = (mixed >> 64) as u64 ^ mixed as u64;
        // A power of two of them, and never none.
        &self.buckets[hash as usize & (self.buckets.len() - 1)]
    }

    /// Empties what has aged in a few buckets, so that a share is not used up by those who have gone.
    fn sweep(&self, writer: &mut Writer, now: u64) {
        for _ in 0..SWEEP {
            writer.swept = (writer.swept + 1) % self.buckets.len();
            for slot in &self.buckets[writer.swept] {
                let heard = Heard(slot.value.load(Ordering::Relaxed));
                if slot.key.load(Ordering::Relaxed) != 0 && heard.age(now) > self.ageing {
                    slot.key.store(0, Ordering::Release);
                    writer.lose(heard.port());
                }
            }
        }
    }
}

impl Writer {
    fn count(&mut self, port: u16) -> &mut u32 {
        let at = usize::from(port);
        if at >= self.counts.len() {
            self.counts.resize(at + 1, 0);
        }
        &mut self.counts[at]
    }

    fn lose(&mut self, port: u16) {
        let count = self.count(port);
        *count = count.saturating_sub(1);
    }

    fn write(&mut self, bucket: &Bucket, key: u64, heard: Heard, share: u32, ageing: u64) -> Learned {
        let (port, now) = (heard.port(), heard.0 >> 16);
        let own = *self.count(port);
        let entries = || {
            bucket.iter().map(|slot| {
                (slot, slot.key.load(Ordering::Relaxed), Heard(slot.value.load(Ordering::Relaxed)))
            })
        };
        if let Some((slot, _, old)) = entries().find(|(_, k, _)| *k == key) {
            let aged = old.age(now) > ageing;
            if old.port() != port {
                if own >= share {
                    return Learned::Full;
                }
                self.lose(old.port());
                *self.count(port) += 1;
            }
            slot.put(key, heard);
            return if aged {
                Learned::New
            } else if old.port() == port {
                Learned::Known
            } else {
                Learned::Moved
            };
        }
        if own >= share {
            return Learned::Full;
        }
        let free = entries().find(|(_, k, old)| *k == 0 || old.age(now) > ageing);
        // The richest loses its oldest, if it is richer than who comes.
        let room = free.or_else(|| {
            let richest = entries().max_by_key(|(_, _, old)| (*self.count(old.port()), old.age(now)))?;
            (*self.count(richest.2.port()) > own + 1).then_some(richest)
        });
        let Some((slot, k, old)) = room else { return Learned::Full };
        if k != 0 {
            self.lose(old.port());
        }
        *self.count(port) += 1;
        slot.put(key, heard);
        Learned::New
    }
}

/// Where in a key the VLAN is.
const VLAN: u64 = 0x7fff << 48;

fn key(vlan: u16, MacAddress([a, b, c, d, e, f]): MacAddress) -> u64 {
    let [v0, v1] = vlan.to_be_bytes();
    USED | u64::from_be_bytes([v0, v1, a, b, c, d, e, f])
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(n: u64) -> u64 {
        n
    }

    fn mac(n: u32) -> MacAddress {
        let [a, b, c, d] = n.to_be_bytes();
        MacAddress([2, 0, a, b, c, d])
    }

    fn learn(table: &Table, whom: (u16, MacAddress), port: u16, share: u32, now: u64) -> Learned {
        table.learn(whom, (port, share), now, || true)
    }

    /// One whose secret is known: which buckets are full is chance otherwise, and what a full one gives away.
    fn table(addresses: u32) -> Table {
        let secret = [0x0123_4567_89ab_cdef, 0x9e37_79b9_7f4a_7c15];
        Table { secret, ..Table::new(addresses, Duration::from_secs(300)) }
    }

    #[test]
    fn who_was_there_before_an_address_became_somebody_else_s_is_forgotten() {
        let table = table(16);
        let (squatted, own) = ((1, mac(1)), (2, mac(2)));
        for whom in [squatted, (7, mac(1)), own] {
            assert_eq!(learn(&table, whom, 3, 8, ms(0)), Learned::New);
        }
        table.forget_elsewhere(&[mac(1)], 4);
        assert_eq!(
            (table.find(1, mac(1), 0), table.find(7, mac(1), 0), table.find(2, mac(2), 0)),
            (None, None, Some(3))
        );
        assert_eq!(table.count(3), 1);
        // One that was learned meanwhile, by rules of before.
        assert_eq!(learn(&table, squatted, 3, 8, ms(0)), Learned::New);
        assert_eq!(table.learn(squatted, (3, 8), ms(10), || false), Learned::Foreign);
        assert_eq!((table.find(1, mac(1), 10), table.count(3)), (None, 1));
        // Its own stay with it.
        assert_eq!(learn(&table, squatted, 4, 8, ms(20)), Learned::New);
        table.forget_elsewhere(&[mac(1)], 4);
        assert_eq!(table.find(1, mac(1), 20), Some(4));
    }

    #[test]
    fn an_address_is_where_it_was_last_heard_for_each_vlan_until_it_has_aged() {
        let table = table(16);
        assert_eq!(learn(&table, (1, mac(1)), 3, 8, ms(0)), Learned::New);
        assert_eq!(learn(&table, (2, mac(1)), 4, 8, ms(0)), Learned::New);
        assert_eq!(learn(&table, (1, mac(1)), 3, 8, ms(200)), Learned::Known);
        assert_eq!((table.find(1, mac(1), ms(0)), table.find(2, mac(1), ms(0))), (Some(3), Some(4)));
        assert_eq!(table.find(3, mac(1), ms(0)), None);
        assert_eq!(table.find(1, mac(2), ms(0)), None);
        assert_eq!(learn(&table, (1, mac(1)), 3, 8, ms(1000)), Learned::Known);
        assert_eq!(table.find(2, mac(1), ms(300_001)), None);
        assert_eq!(table.find(1, mac(1), ms(300_001)), Some(3), "it was heard of meanwhile");
        table.forget(3);
        assert_eq!((table.find(1, mac(1), ms(1000)), table.count(3)), (None, 0));
        assert_eq!(table.find(2, mac(1), ms(1000)), Some(4));
    }

    #[test]
    fn an_address_in_use_does_not_move() {
        let table = table(16);
        learn(&table, (1, mac(1)), 0, 8, ms(0));
        assert_eq!(learn(&table, (1, mac(1)), 1, 8, ms(999)), Learned::Held);
        learn(&table, (1, mac(1)), 0, 8, ms(500));
        assert_eq!(learn(&table, (1, mac(1)), 1, 8, ms(1499)), Learned::Held);
        assert_eq!(learn(&table, (1, mac(1)), 1, 8, ms(1500)), Learned::Moved);
        assert_eq!(table.find(1, mac(1), ms(1500)), Some(1));
        assert_eq!((table.count(0), table.count(1)), (0, 1));
        assert_eq!(learn(&table, (1, mac(1)), 0, 8, ms(400_000)), Learned::New, "it had aged");
        assert_eq!((table.count(0), table.count(1)), (1, 0));
        learn(&table, (1, mac(9)), 1, 1, ms(400_000));
        assert_eq!(learn(&table, (1, mac(1)), 1, 1, ms(402_000)), Learned::Full, "no move beyond a share");
        assert_eq!(table.find(1, mac(1), ms(402_000)), Some(0));
    }

    #[test]
    fn who_may_not_be_there_is_not_remembered_there() {
        let table = table(16);
        let foreign = |now| table.learn((1, mac(1)), (1, 8), now, || false);
        assert_eq!(foreign(ms(0)), Learned::Foreign);
        assert_eq!(table.find(1, mac(1), ms(0)), None);
        learn(&table, (1, mac(1)), 0, 8, ms(0));
        assert_eq!((foreign(ms(1)), foreign(ms(5000))), (Learned::Foreign, Learned::Foreign));
        assert_eq!(table.find(1, mac(1), ms(5000)), Some(0));
    }

    #[test]
    #[cfg_attr(miri, ignore = "no flood is short")]
    fn a_flood_of_addresses_takes_a_share_and_nothing_of_the_others() {
        let table = table(1024);
        for port in 1..8 {
            for n in 0..64 {
                assert_eq!(learn(&table, (1, mac(1000 * port + n)), port as u16, 256, ms(0)), Learned::New);
            }
        }
        let learned: Vec<_> =
            (0..100_000).map(|n| learn(&table, (1, mac(1 << 24 | n)), 0, 256, ms(1))).collect();
        let new = learned.iter().filter(|l| **l == Learned::New).count();
        assert!((200..=256).contains(&new), "{new}");
        assert!(table.count(0) <= 256);
        for port in 1..8 {
            let there =
                (0..64).filter(|n| table.find(1, mac(1000 * port + n), ms(1)) == Some(port as u16)).count();
            assert_eq!(there, 64, "port {port}");
        }
        // When it has stopped, others have its room.
        let late = ms(300_002);
        for n in 0..4000 {
            learn(&table, (1, mac(n)), 9, 512, late);
        }
        assert_eq!(table.count(0), 0, "what has aged is tidied up");
    }

    #[test]
    fn a_full_bucket_takes_from_the_richest_and_never_from_the_poor() {
        let table = table(1);
        assert_eq!(table.buckets.len(), 1);
        for n in 0..6 {
            learn(&table, (1, mac(n)), 0, 100, ms(u64::from(n)));
        }
        learn(&table, (1, mac(6)), 1, 100, ms(10));
        learn(&table, (1, mac(7)), 1, 100, ms(10));
        assert_eq!(learn(&table, (1, mac(8)), 2, 100, ms(10)), Learned::New);
        assert_eq!(table.find(1, mac(0), ms(10)), None, "the oldest of the richest");
        assert_eq!([0, 1, 2].map(|port| table.count(port)), [5, 2, 1]);
        assert_eq!(
            learn(&table, (1, mac(9)), 0, 100, ms(10)),
            Learned::Full,
            "not from the others, nor from itself"
        );
        while learn(&table, (1, mac(10 + table.count(2))), 2, 100, ms(10)) == Learned::New {}
        assert_eq!([0, 1, 2].map(|port| table.count(port)), [3, 2, 3]);
    }

    #[test]
    fn eight_threads_learn_and_find_at_once() {
        // Miri takes a thousand times as long.
        let (size, rounds) = if cfg!(miri) { (64, 8) } else { (4096, 2000u32) };
        let table = table(size);
        std::thread::scope(|scope| {
            for port in 0..8u16 {
                let table = &table;
                scope.spawn(move || {
                    for round in 0..rounds {
                        let own = mac((u32::from(port) << 16) | (round % 200));
                        learn(table, (1, own), port, 300, ms(u64::from(round)));
                        if let Some(found) = table.find(1, own, ms(u64::from(round))) {
                            assert_eq!(found, port, "nobody else uses it");
                        }
                        learn(
                            table,
                            (1, mac(0xffff_0000 | (round % 50))),
                            port,
                            300,
                            ms(2000 * u64::from(round)),
                        );
                    }
                });
            }
        });
        let real = |port| {
            let slots = table.buckets.iter().flatten();
            slots
                .filter(|s| {
                    s.key.load(Ordering::Relaxed) != 0
                        && Heard(s.value.load(Ordering::Relaxed)).port() == port
                })
                .count()
        };
        for port in 0..8 {
            assert_eq!(table.count(port) as usize, real(port));
        }
    }
}
