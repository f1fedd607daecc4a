//! A bus and a vCPU's way to it, against a list on paper: ranges of every length anywhere, of which some are empty, wrap or overlap; and
//! accesses of every width to, around and across them, by port and by address, single and in strings.

use std::sync::{Arc, Mutex};

use arbitrary::{Result, Unstructured};
use vmbed::internals::{BareBus, BusExit};
use vmbed::{Access, Device, Error, ErrorKind};

const STEPS: usize = 64;
/// How a range is refused.
const REFUSALS: [(&str, &str); 2] = [("impossible", "is empty or wraps"), ("overlaps", "overlaps")];
/// Where an access goes that no device gets.
const MISSES: [&str; 4] = ["nowhere", "across_start", "across_end", "wraps"];
/// Widths of accesses: of ports 1, 2 and 4.
const WIDTHS: [&str; 8] = ["w1", "w2", "w3", "w4", "w5", "w6", "w7", "w8"];

/// How deep an input went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Depth {
    /// Ranges that are there, and those that were refused, as [`REFUSALS`].
    pub ranges: u32,
    pub refused: [u32; REFUSALS.len()],
    /// Accesses that a device got.
    pub read: u32,
    pub written: u32,
    /// Of those: the last byte of a range, of all addresses, and such as the device failed.
    pub last: u32,
    pub top: u32,
    pub failed: u32,
    /// Exits with several accesses.
    pub strings: u32,
    /// Accesses that no device got, as [`MISSES`].
    pub missed: [u32; MISSES.len()],
    pub widths: [u32; WIDTHS.len()],
}

impl Depth {
    /// What a campaign sums up.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut all = vec![
            ("ranges", self.ranges),
            ("read", self.read),
            ("written", self.written),
            ("last", self.last),
            ("top", self.top),
            ("failed", self.failed),
            ("strings", self.strings),
        ];
        all.extend(REFUSALS.iter().zip(self.refused).map(|((name, _), count)| (*name, count)));
        all.extend(MISSES.into_iter().zip(self.missed));
        all.extend(WIDTHS.into_iter().zip(self.widths));
        all.into_iter().map(|(name, count)| (name, count.into())).collect()
    }
}

/// What devices were asked: which, where, by whom, and what was written.
type Asked = (usize, u64, u32, Option<Vec<u8>>);

/// Answers with what tells devices and places apart.
struct Log {
    index: usize,
    fails: bool,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl Log {
    fn note(&self, access: Access, written: Option<Vec<u8>>) -> vmbed::Result<()> {
        self.asked.lock().unwrap().push((self.index, access.offset, access.vcpu, written));
        if self.fails { Err(Error::new(ErrorKind::Internal, "this one fails")) } else { Ok(()) }
    }
}

impl Device for Log {
    fn read(&self, access: Access, data: &mut [u8]) -> vmbed::Result<()> {
        assert!(data.iter().all(|byte| *byte == 0xff), "all ones before the device answers");
        fill(self.index, access.offset, data);
        self.note(access, None)
    }

    fn write(&self, access: Access, data: &[u8]) -> vmbed::Result<()> {
        self.note(access, Some(data.to_vec()))
    }
}

fn fill(index: usize, offset: u64, data: &mut [u8]) {
    for (byte, at) in data.iter_mut().zip(offset..) {
        *byte = (at as u8).wrapping_mul(31).wrapping_add(index as u8) & 0x7f;
    }
}

/// A range on paper: its first and last address, and whether its device fails.
struct Range {
    first: u64,
    last: u64,
    fails: bool,
}

#[derive(Default)]
struct Paper {
    bus: BareBus,
    /// In the order in which they came.
    ranges: Vec<Range>,
    asked: Arc<Mutex<Vec<Asked>>>,
    depth: Depth,
}

/// Runs one input. Panics where the bus and the list differ.
pub fn run(data: &[u8]) -> Depth {
    let mut u = Unstructured::new(data);
    let mut paper = Paper::default();
    // Ports have 16 bits.
    let mask = if u.arbitrary().unwrap_or(false) { 0xffff } else { u64::MAX };
    for _ in 0..STEPS {
        if u.is_empty() || paper.step(&mut u, mask).is_err() {
            break;
        }
    }
    paper.depth
}

impl Paper {
    fn step(&mut self, u: &mut Unstructured<'_>, mask: u64) -> Result<()> {
        if u.ratio(1u8, 3u8)? {
            return self.insert(u, mask);
        }
        let vcpu = u.arbitrary::<u8>()?.into();
        let mut exits = Vec::new();
        for _ in 0..u.int_in_range(1..=6)? {
            exits.push(self.exit(u, mask)?);
        }
        let mut answered = exits.clone();
        let results = self.bus.exits(vcpu, &mut answered);
        let asked = std::mem::take(&mut *self.asked.lock().unwrap());
        let mut asked = asked.into_iter();
        for ((exit, after), result) in exits.into_iter().zip(answered).zip(results) {
            let (expected, sound) = self.expected(vcpu, exit, &mut asked);
            assert_eq!((after.data, result.is_ok()), (expected.data, sound), "{:#x}", after.address);
        }
        assert_eq!(asked.next(), None, "nothing else was asked");
        Ok(())
    }

    /// An address near where a range begins or ends, or any.
    fn address(&self, u: &mut Unstructured<'_>, mask: u64) -> Result<u64> {
        let near = match (self.ranges.len(), u.int_in_range(0..=7u8)?) {
            (0, _) | (_, 0) => return Ok(u.arbitrary::<u64>()? & mask),
            (_, 1) => mask,
            (count, kind) => {
                let range = &self.ranges[u.choose_index(count)?];
                if kind < 5 { range.first } else { range.last }
            }
        };
        Ok(near.wrapping_add(u.int_in_range(0..=20u64)?).wrapping_sub(10) & mask)
    }

    fn insert(&mut self, u: &mut Unstructured<'_>, mask: u64) -> Result<()> {
        let first = self.address(u, mask)?;
        let length = match u.int_in_range(0..=9u8)? {
            0 => u.arbitrary()?,
            1 => 0,
            // To the very top.
            2 => (u64::MAX - first).saturating_add(1),
            3 => u.int_in_range(1..=0x1000)?,
            _ => u.int_in_range(1..=24)?,
        };
        let (index, fails) = (self.ranges.len(), u.ratio(1u8, 8u8)?);
        let name = format!("device{index}");
        let device = Arc::new(Log { index, fails, asked: self.asked.clone() });
        let result = self.bus.insert(&name, first, length, device);
        let last = u128::from(first) + u128::from(length);
        let refusal = match u64::try_from(last.saturating_sub(1)) {
            Ok(last) if length > 0 => {
                let mut others = self.ranges.iter();
                others.any(|other| first <= other.last && other.first <= last).then_some(1)
            }
            _ => Some(0),
        };
        let Some(refusal) = refusal else {
            result.unwrap_or_else(|error| panic!("{first:#x}+{length:#x}: {error}"));
            self.ranges.push(Range { first, last: first + (length - 1), fails });
            self.depth.ranges += 1;
            return Ok(());
        };
        let error = result.expect_err("a range that cannot be").to_string();
        assert!(error.contains(&name) && error.contains(REFUSALS[refusal].1), "{error}");
        self.depth.refused[refusal] += 1;
        Ok(())
    }

    fn exit(&self, u: &mut Unstructured<'_>, mask: u64) -> Result<BusExit> {
        let ports = mask == 0xffff;
        let width = if ports { *u.choose(&[1u8, 2, 4])? } else { u.int_in_range(1..=8)? };
        let count = if ports && u.ratio(1u8, 4u8)? { u.int_in_range(2..=5)? } else { 1 };
        let mut data = vec![0x11; usize::from(width) * count];
        let write = u.arbitrary()?;
        if write {
            u.fill_buffer(&mut data)?;
        }
        Ok(BusExit { address: self.address(u, mask)?, width, write, data })
    }

    /// What becomes of an exit, and whether it is well: the first access that fails is the last one.
    fn expected(
        &mut self,
        vcpu: u32,
        mut exit: BusExit,
        asked: &mut impl Iterator<Item = Asked>,
    ) -> (BusExit, bool) {
        let (at, width) = (exit.address, usize::from(exit.width));
        let last = at.checked_add(u64::from(exit.width) - 1);
        self.depth.widths[width - 1] += 1;
        self.depth.strings += u32::from(exit.data.len() > width);
        let holder =
            self.ranges.iter().position(|r| at >= r.first && last.is_some_and(|last| last <= r.last));
        assert_eq!(self.bus.name_at(at, width), holder.map(|index| format!("device{index}")));
        let Some(index) = holder else {
            let holds = |address: u64| self.ranges.iter().any(|r| (r.first..=r.last).contains(&address));
            let miss = match last {
                None => 3,
                Some(_) if holds(at) => 2,
                Some(last) if holds(last) => 1,
                Some(_) => 0,
            };
            self.depth.missed[miss] += 1;
            if !exit.write {
                exit.data.fill(0xff);
            }
            return (exit, true);
        };
        let range = &self.ranges[index];
        let offset = at - range.first;
        for one in exit.data.chunks_mut(width) {
            let written = exit.write.then(|| one.to_vec());
            assert_eq!(asked.next(), Some((index, offset, vcpu, written)));
            if !exit.write {
                fill(index, offset, one);
            }
            self.depth.last += u32::from(last == Some(range.last));
            self.depth.top += u32::from(last == Some(u64::MAX));
            *(if exit.write { &mut self.depth.written } else { &mut self.depth.read }) += 1;
            if range.fails {
                self.depth.failed += 1;
                return (exit, false);
            }
        }
        (exit, true)
    }
}
