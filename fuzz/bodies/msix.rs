//! MSI-X against a model: the table, masks of both kinds, pending bits, and what the routing table is told.

use arbitrary::{Result, Unstructured};
use vmbed::internals::BareMsix;

const STEPS: usize = 400;
const ENABLE: u16 = 1 << 15;
const MASK_ALL: u16 = 1 << 14;

/// How deep an input went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Depth {
    /// Words of the table that were written.
    pub written: u32,
    /// Interrupts that went through at once, and those that waited for the end of a mask.
    pub delivered: u64,
    pub late: u64,
    /// Looks at pending bits of which one was set.
    pub pending: u32,
    /// Vectors that were held back by their own mask, by the function's, and since MSI-X was off.
    pub masked: u32,
    pub all_masked: u32,
    pub disabled: u32,
    /// Messages that changed while their vector was let through.
    pub rerouted: u32,
    /// Interrupts that a reset has forgotten.
    pub forgotten: u64,
    /// Accesses that mean nothing: of odd sizes, across entries, beyond the table or the pending bits.
    pub refused: u32,
}

impl Depth {
    /// What a campaign sums up.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("written", self.written.into()),
            ("delivered", self.delivered),
            ("late", self.late),
            ("pending", self.pending.into()),
            ("masked", self.masked.into()),
            ("all_masked", self.all_masked.into()),
            ("disabled", self.disabled.into()),
            ("rerouted", self.rerouted.into()),
            ("forgotten", self.forgotten),
            ("refused", self.refused.into()),
        ]
    }
}

/// An entry: its four words, and how often it was raised since somebody heard of it.
#[derive(Clone, Copy)]
struct Entry {
    words: [u32; 4],
    waiting: u64,
}

struct Model {
    msix: BareMsix,
    at: usize,
    control: u16,
    entries: Vec<Entry>,
    depth: Depth,
}

/// Runs one input. Panics where MSI-X and the model differ.
pub fn run(data: &[u8]) -> Depth {
    let mut u = Unstructured::new(data);
    let count = *[1u16, 2, 3, 65, 130].get(u.int_in_range(0..=4usize).unwrap_or(0)).unwrap_or(&1);
    let msix = BareMsix::new(count).unwrap();
    let entries = vec![Entry { words: [0, 0, 0, 1], waiting: 0 }; count.into()];
    let at = msix.capability();
    let mut model = Model { msix, at, control: 0, entries, depth: Depth::default() };
    for _ in 0..STEPS {
        if u.is_empty() || model.step(&mut u).is_err() {
            break;
        }
        model.compare();
    }
    model.depth
}

impl Model {
    fn is_open(&self, entry: &Entry) -> bool {
        self.control & (ENABLE | MASK_ALL) == ENABLE && entry.words[3] & 1 == 0
    }

    /// Who is let through, as what.
    fn routes(&self) -> Vec<Option<(u64, u32)>> {
        let message = |e: &Entry| (u64::from(e.words[1]) << 32 | u64::from(e.words[0]), e.words[2]);
        self.entries.iter().map(|e| self.is_open(e).then(|| message(e))).collect()
    }

    fn step(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let before = self.routes();
        match u.int_in_range(0..=9u8)? {
            0..3 => self.table(u)?,
            3 | 4 => self.control(u)?,
            5..8 => {
                let vector = u.int_in_range(0..=self.entries.len())?;
                let there = self.msix.trigger(vector as u16);
                assert_eq!(there, vector < self.entries.len());
                let Some(entry) = self.entries.get(vector).copied() else { return Ok(()) };
                self.entries[vector].waiting += 1;
                let (on, all) = (self.control & ENABLE != 0, self.control & MASK_ALL != 0);
                self.depth.disabled += u32::from(!on);
                self.depth.all_masked += u32::from(on && all);
                self.depth.masked += u32::from(on && !all && entry.words[3] & 1 != 0);
                self.depth.delivered += u64::from(self.is_open(&entry));
            }
            8 => self.pending(u)?,
            _ => {
                self.msix.forget_pending();
                for index in 0..self.entries.len() {
                    if !self.is_open(&self.entries[index]) {
                        self.depth.forgotten += std::mem::take(&mut self.entries[index].waiting);
                    }
                }
            }
        }
        for ((was, is), entry) in before.iter().zip(self.routes()).zip(&self.entries) {
            self.depth.rerouted += u32::from(was.is_some() && is.is_some() && *was != is);
            self.depth.late += if was.is_none() && is.is_some() { entry.waiting } else { 0 };
        }
        Ok(())
    }

    /// An access to the table: mostly a word or two of an entry, as drivers make it.
    fn table(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let size = 16 * self.entries.len() as u64;
        let wild = u.ratio(1u8, 6u8)?;
        let (offset, len) = if wild {
            let near = u.int_in_range(0..=size + 40)?;
            (*u.choose(&[near, size, u64::MAX, u64::MAX - 3])?, u.int_in_range(0..=16usize)?)
        } else {
            let len = *u.choose(&[4usize, 4, 8])?;
            (u.int_in_range(0..=size / len as u64 - 1)? * len as u64, len)
        };
        let mut data = [0; 16];
        u.fill_buffer(&mut data)?;
        // Mostly what is let through.
        if offset % 16 == 12 && u.ratio(3u8, 4u8)? {
            data[0] &= !1;
        }
        let sound = matches!(len, 4 | 8) && offset % len as u64 == 0 && offset < size;
        self.msix.write_table(offset, &data[..len]);
        if sound {
            for (word, bytes) in (offset / 4..).zip(data[..len].chunks(4)) {
                let value = u32::from_le_bytes(bytes.try_into().unwrap());
                // Addresses are of words; of the control only the mask is there.
                let writable = [!3, u32::MAX, u32::MAX, 1][word as usize % 4];
                self.entries[word as usize / 4].words[word as usize % 4] = value & writable;
                self.depth.written += 1;
            }
        }
        let mut back = [0x5a; 16];
        self.msix.read_table(offset, &mut back[..len]);
        if sound {
            let words = self.entries.iter().flat_map(|e| e.words).skip(offset as usize / 4);
            let expected: Vec<u8> = words.take(len / 4).flat_map(u32::to_le_bytes).collect();
            assert_eq!(back[..len], expected[..]);
        } else {
            assert!(back[..len].iter().all(|b| *b == 0xff), "{len} at {offset:#x}");
            self.depth.refused += 1;
        }
        Ok(())
    }

    /// A write to the capability, or about it.
    fn control(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let (mut at, mut data) = (self.at + 2, vec![0, *u.choose(&[0x80u8, 0x80, 0xc0, 0, 0x40])?]);
        if u.ratio(1u8, 4u8)? {
            at = *u.choose(&[self.at, self.at + 1, self.at + 3, self.at + 4, 4, 255, 256, usize::MAX])?;
            let length = u.int_in_range(0..=8)?.min(u.len());
            data = u.bytes(length)?.to_vec();
        }
        self.msix.write_config(at, &data);
        let high = (self.at + 3).checked_sub(at).and_then(|i| data.get(i));
        if let Some(byte) = high {
            self.control = u16::from(byte & 0xc0) << 8;
        }
        let mut now = [0; 2];
        self.msix.read_config(self.at + 2, &mut now);
        assert_eq!(u16::from_le_bytes(now), self.control | (self.entries.len() as u16 - 1));
        Ok(())
    }

    fn pending(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let size = self.entries.len().div_ceil(64) * 8;
        let (offset, len) = (u.int_in_range(0..=size + 8)?, *u.choose(&[4usize, 4, 8, 8, 1, 2, 3, 16])?);
        let mut bits = [0x5a; 16];
        self.msix.read_pending(offset as u64, &mut bits[..len]);
        if !matches!(len, 4 | 8) || offset % len != 0 || offset >= size {
            assert!(bits[..len].iter().all(|b| *b == 0xff), "{len} at {offset}");
            self.depth.refused += 1;
            return Ok(());
        }
        for bit in 0..8 * len {
            let waits = self.entries.get(8 * offset + bit).is_some_and(|e| e.waiting > 0 && !self.is_open(e));
            assert_eq!(bits[bit / 8] >> (bit % 8) & 1 == 1, waits, "bit {bit} at {offset}");
            self.depth.pending += u32::from(waits);
        }
        Ok(())
    }

    /// What is let through is delivered, once for each time that it was raised, and the kernel knows as what.
    fn compare(&mut self) {
        for (vector, route) in (0..).zip(self.routes()) {
            assert_eq!(self.msix.route(vector), route, "vector {vector}");
            let waiting = self.entries[usize::from(vector)].waiting;
            if route.is_some() && waiting > 0 {
                assert_eq!(self.msix.take_raised(vector), waiting, "vector {vector}");
                self.entries[usize::from(vector)].waiting = 0;
            }
        }
    }
}
