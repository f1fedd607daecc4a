//! The IOAPIC against a model: redirection entries, edges and levels, ends of interrupts, what KVM is told of them.

use arbitrary::{Result, Unstructured};
use vmbed::internals::{BareIoapic, IOAPIC_PINS};

const STEPS: usize = 400;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const REMOTE_IRR: u64 = 1 << 14;
/// Delivery status and remote IRR.
const READ_ONLY: u64 = 1 << 12 | REMOTE_IRR;

/// How deep an input went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Depth {
    /// Halves of redirection entries that were written.
    pub written: u32,
    /// Messages of edges and of levels.
    pub edges: u32,
    pub levels: u32,
    /// Edges on masked pins, which are lost.
    pub lost: u32,
    /// Levels that came again after the end of their interrupt, and those that were sent when their pin was unmasked.
    pub again: u32,
    pub unmasked: u32,
    /// Ends of interrupts that no pin has sent.
    pub foreign: u32,
    /// Pins that were stuck, and are not.
    pub freed: u32,
    /// Registers that do not exist, narrow writes, and offsets where nothing is.
    pub ignored: u32,
}

impl Depth {
    /// What a campaign sums up.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        vec![
            ("written", self.written.into()),
            ("edges", self.edges.into()),
            ("levels", self.levels.into()),
            ("lost", self.lost.into()),
            ("again", self.again.into()),
            ("unmasked", self.unmasked.into()),
            ("foreign", self.foreign.into()),
            ("freed", self.freed.into()),
            ("ignored", self.ignored.into()),
        ]
    }
}

struct Model {
    ioapic: BareIoapic,
    select: u8,
    id: u32,
    entries: Vec<u64>,
    high: Vec<bool>,
    /// What is to have been sent since the last look.
    sent: Vec<(u64, u32)>,
    depth: Depth,
}

/// Runs one input. Panics where the IOAPIC and the model differ.
pub fn run(data: &[u8]) -> Depth {
    let mut u = Unstructured::new(data);
    let pins = usize::from(IOAPIC_PINS);
    let mut model = Model {
        ioapic: BareIoapic::default(),
        select: 0,
        id: 0,
        entries: vec![MASKED; pins],
        high: vec![false; pins],
        sent: Vec::new(),
        depth: Depth::default(),
    };
    for _ in 0..STEPS {
        if u.is_empty() || model.step(&mut u).is_err() {
            break;
        }
        assert_eq!(model.ioapic.take_sent(), std::mem::take(&mut model.sent));
        for (pin, entry) in (0..).zip(&model.entries) {
            // KVM has to tell of the ends of those, also while they are masked.
            assert_eq!(model.ioapic.route(pin), (entry & LEVEL != 0).then(|| message(*entry)), "pin {pin}");
        }
    }
    model.depth
}

fn message(entry: u64) -> (u64, u32) {
    let (destination, logical) = (entry >> 56, entry >> 11 & 1);
    (0xfee0_0000 + destination * 0x1000 + logical * 4, (entry & 0x87ff) as u32)
}

impl Model {
    fn step(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        match u.int_in_range(0..=11u8)? {
            0..4 => {
                // An entry, as drivers write it: the high half first, and mostly unmasked.
                let pin = u.int_in_range(0..=IOAPIC_PINS - 1)?;
                let mut entry = u.arbitrary::<u64>()?;
                entry &= if u.ratio(3u8, 4u8)? { !MASKED } else { u64::MAX };
                // One vector of few, so that ends of interrupts meet it.
                entry = entry & !0xff | (0x40 + u64::from(u.int_in_range(0..=3u8)?));
                self.register(0x11 + 2 * pin, (entry >> 32) as u32);
                self.register(0x10 + 2 * pin, entry as u32);
            }
            4 => self.register(u.int_in_range(0..=0x2f)?, u.arbitrary()?),
            5 => self.wild(u)?,
            6 | 7 => {
                let (pin, high) = (u.int_in_range(0..=IOAPIC_PINS)?, u.arbitrary()?);
                self.ioapic.set_level(pin, high);
                self.drive(pin, high);
            }
            8 => {
                let pin = u.int_in_range(0..=IOAPIC_PINS)?;
                self.ioapic.pulse(pin);
                self.drive(pin, true);
                self.drive(pin, false);
            }
            _ => {
                let vector = 0x40 + u.int_in_range(0..=4u8)?;
                if u.arbitrary()? {
                    self.ioapic.end_of_interrupt(vector);
                } else {
                    self.ioapic.write(0x40, &[vector, 0, 0, 0]).unwrap();
                }
                self.end(vector);
            }
        }
        Ok(())
    }

    /// Selects a register, writes it and reads it back.
    fn register(&mut self, select: u8, value: u32) {
        self.ioapic.write(0, &[select, 0, 0, 0]).unwrap();
        self.ioapic.write(0x10, &value.to_le_bytes()).unwrap();
        self.select = select;
        self.write(value);
        self.read_back();
    }

    fn read_back(&mut self) {
        let mut data = [0x5a; 4];
        self.ioapic.read(0x10, &mut data).unwrap();
        let expected = match self.select {
            0 | 2 => self.id,
            1 => 0x20 | u32::from(IOAPIC_PINS - 1) << 16,
            select => match select
                .checked_sub(0x10)
                .and_then(|i| Some((self.entries.get(usize::from(i / 2))?, i % 2)))
            {
                Some((entry, half)) => (entry >> (32 * half)) as u32,
                None => u32::MAX,
            },
        };
        assert_eq!(u32::from_le_bytes(data), expected, "register {:#x}", self.select);
    }

    fn write(&mut self, value: u32) {
        let index = self.select.wrapping_sub(0x10);
        let pin = usize::from(index / 2);
        if self.select == 0 {
            self.id = value & 0x0f00_0000;
        }
        if self.select < 0x10 || pin >= self.entries.len() {
            self.depth.ignored += u32::from(self.select != 0);
            return;
        }
        let old = self.entries[pin];
        let (kept, shift) =
            if index.is_multiple_of(2) { (old >> 32 << 32, 0) } else { (old & 0xffff_ffff, 32) };
        let mut new = (kept | u64::from(value) << shift) & !READ_ONLY | old & READ_ONLY;
        if new & LEVEL == 0 && new & REMOTE_IRR != 0 {
            new &= !REMOTE_IRR;
            self.depth.freed += 1;
        }
        self.entries[pin] = new;
        self.depth.written += 1;
        self.depth.unmasked += u32::from(self.serve(pin));
    }

    /// A level goes out when it is high, let through, and not on its way already.
    fn serve(&mut self, pin: usize) -> bool {
        let entry = self.entries[pin];
        let goes = self.high[pin] && entry & LEVEL != 0 && entry & (MASKED | REMOTE_IRR) == 0;
        if goes {
            self.sent.push(message(entry));
            self.entries[pin] |= REMOTE_IRR;
            self.depth.levels += 1;
        }
        goes
    }

    fn drive(&mut self, pin: u8, high: bool) {
        let pin = usize::from(pin);
        let Some(before) = self.high.get_mut(pin).map(|now| std::mem::replace(now, high)) else {
            self.depth.ignored += 1;
            return;
        };
        let entry = self.entries[pin];
        if entry & LEVEL != 0 {
            self.serve(pin);
        } else if high && !before {
            match entry & MASKED {
                0 => {
                    self.sent.push(message(entry));
                    self.depth.edges += 1;
                }
                _ => self.depth.lost += 1,
            }
        }
    }

    fn end(&mut self, vector: u8) {
        let mut ours = false;
        for pin in 0..self.entries.len() {
            let entry = self.entries[pin];
            if entry & 0xff == u64::from(vector) && entry & LEVEL != 0 && entry & REMOTE_IRR != 0 {
                ours = true;
                self.entries[pin] &= !REMOTE_IRR;
                self.depth.again += u32::from(self.serve(pin));
            }
        }
        self.depth.foreign += u32::from(!ours);
    }

    /// Any access to any offset.
    fn wild(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let offset = *u.choose(&[0, 0x10, 0x40, 0x20, 1, 0x11, 0x44, 0xfff, u64::MAX])?;
        let mut data = [0; 8];
        u.fill_buffer(&mut data)?;
        let data = &data[..u.int_in_range(0..=8)?];
        self.ioapic.write(offset, data).unwrap();
        match (offset, data) {
            (0, [select, ..]) => self.select = *select,
            (0x40, [vector, ..]) => self.end(*vector),
            (0x10, [a, b, c, d, ..]) => self.write(u32::from_le_bytes([*a, *b, *c, *d])),
            _ => self.depth.ignored += 1,
        }
        let mut back = [0x5a; 8];
        self.ioapic.read(offset, &mut back[..data.len()]).unwrap();
        if !matches!(offset, 0 | 0x10) {
            assert!(back.iter().all(|b| *b == 0x5a), "nothing is there");
        }
        self.read_back();
        Ok(())
    }
}
