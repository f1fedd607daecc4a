#![forbid(unsafe_code)]
//! MSI-X: the capability, the table and the pending bits (PCI Local Bus 3.0, 6.8.2).

use std::sync::Arc;

use super::config::ConfigSpace;
use crate::error::Result;
use crate::irq::{Msi, Routes, Vector};
use crate::sys::log;

/// The capability's id, and its message control register.
const CAP_MSIX: u8 = 0x11;
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK_ALL: u16 = 1 << 14;
/// An entry's vector control.
const ENTRY_MASKED: u32 = 1;
const ENTRY_SIZE: u64 = 16;

/// The vectors of a function.
pub(crate) struct Msix {
    entries: Vec<Entry>,
    enabled: bool,
    all_masked: bool,
    /// Where the capability is in configuration space.
    at: usize,
}

struct Entry {
    message: Msi,
    control: u32,
    vector: Arc<Vector>,
    /// Whether the vector lets interrupts through, and as what.
    routed: Option<Msi>,
}

impl Msix {
    /// `count` vectors whose table and pending bits lie in BAR 0 at these offsets.
    pub fn new(
        routes: &Arc<Routes>,
        config: &mut ConfigSpace,
        count: u16,
        table: u32,
        pending: u32,
    ) -> Result<Self> {
        let entry = |vector| Entry { message: Msi::default(), control: ENTRY_MASKED, vector, routed: None };
        let entries = (0..count).map(|_| routes.vector().map(entry)).collect::<Result<Vec<_>>>()?;
        let mut body = (count - 1).to_le_bytes().to_vec();
        body.extend(table.to_le_bytes());
        body.extend(pending.to_le_bytes());
        let writable = (CONTROL_ENABLE | CONTROL_MASK_ALL).to_le_bytes();
        let at = config.add_capability(CAP_MSIX, &body, &writable)?;
        Ok(Self { entries, enabled: false, all_masked: false, at })
    }

    /// The vector of table entry `index`.
    pub fn vector(&self, index: u16) -> Option<Arc<Vector>> {
        self.entries.get(usize::from(index)).map(|e| e.vector.clone())
    }

    /// Configuration space was written: takes over the message control register.
    pub fn config_written(&mut self, config: &ConfigSpace) {
        let mut control = [0; 2];
        config.read(self.at + 2, &mut control);
        let control = u16::from_le_bytes(control);
        let (enabled, all_masked) = (control & CONTROL_ENABLE != 0, control & CONTROL_MASK_ALL != 0);
        if (enabled, all_masked) == (self.enabled, self.all_masked) {
            return;
        }
        (self.enabled, self.all_masked) = (enabled, all_masked);
        (0..self.entries.len()).for_each(|i| self.settle(i));
    }

    /// Reads the table. Only aligned accesses of four or eight bytes mean anything.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let Some((entry, words)) = self.place(offset, data.len()) else { return data.fill(0xff) };
        let Some(entry) = self.entries.get(entry) else { return data.fill(0xff) };
        for (word, bytes) in words.zip(data.chunks_exact_mut(4)) {
            let value = match word {
                0 => entry.message.address as u32,
                1 => (entry.message.address >> 32) as u32,
                2 => entry.message.data,
                _ => entry.control,
            };
            bytes.copy_from_slice(&value.to_le_bytes());
        }
    }

    /// Writes the table.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        let Some((index, words)) = self.place(offset, data.len()) else { return };
        let Some(entry) = self.entries.get_mut(index) else { return };
        for (word, bytes) in words.zip(data.chunks_exact(4)) {
            let value = bytes.iter().rev().fold(0u32, |v, b| v << 8 | u32::from(*b));
            match word {
                0 => entry.message.address = entry.message.address & !0xffff_ffff | u64::from(value & !3),
                1 => entry.message.address = entry.message.address & 0xffff_ffff | u64::from(value) << 32,
                2 => entry.message.data = value,
                _ => entry.control = value & ENTRY_MASKED,
            }
        }
        self.settle(index);
    }

    /// Reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let size = self.entries.len().div_ceil(64) as u64 * 8;
        let length = data.len() as u64;
        if !matches!(length, 4 | 8) || !offset.is_multiple_of(length) || offset >= size {
            return data.fill(0xff);
        }
        for (byte, at) in data.iter_mut().zip(offset as usize..) {
            let entries = self.entries.iter().skip(at * 8).take(8).enumerate();
            *byte = entries.fold(0, |bits, (i, e)| bits | u8::from(e.vector.is_pending()) << i);
        }
    }

    /// Forgets what is pending: the function behind was reset. The table is not the function's, and stays.
    pub fn forget_pending(&mut self) {
        self.entries.iter().for_each(|e| e.vector.clear());
    }

    /// The entry and the words in it that an access covers.
    fn place(&self, offset: u64, len: usize) -> Option<(usize, std::ops::Range<u64>)> {
        let len = len as u64;
        if !matches!(len, 4 | 8) || !offset.is_multiple_of(len) {
            return None;
        }
        let word = offset % ENTRY_SIZE / 4;
        Some((usize::try_from(offset / ENTRY_SIZE).ok()?, word..word + len / 4))
    }

    /// Brings the vector of entry `index` to what the registers say.
    fn settle(&mut self, index: usize) {
        let open = self.enabled && !self.all_masked;
        let Some(entry) = self.entries.get_mut(index) else { return };
        let wanted = (open && entry.control & ENTRY_MASKED == 0).then_some(entry.message);
        if entry.routed == wanted {
            return;
        }
        entry.routed = wanted;
        let Some(message) = wanted else { return entry.vector.mask() };
        if let Err(error) = entry.vector.unmask(message) {
            // KVM did not take it: the interrupt stays pending, and the next write here tries again.
            log::debug!("MSI-X vector {index}: {error}");
            entry.vector.mask();
            entry.routed = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Identity;
    use super::*;

    fn msix(count: u16) -> (Msix, ConfigSpace) {
        let identity =
            Identity { vendor: 1, device: 1, revision: 0, class: [0; 3], subsystem_vendor: 0, subsystem: 0 };
        let mut config = ConfigSpace::new(identity);
        let msix = Msix::new(&Routes::new(None), &mut config, count, 0x4000, 0x5000).unwrap();
        (msix, config)
    }

    fn enable(msix: &mut Msix, config: &mut ConfigSpace, control: u16) {
        config.write(msix.at + 2, &control.to_le_bytes());
        msix.config_written(config);
    }

    fn table(msix: &Msix, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        msix.read_table(offset, &mut data);
        data
    }

    #[test]
    fn an_interrupt_raised_while_masked_is_pending_and_comes_at_the_unmask() {
        let (mut msix, mut config) = msix(3);
        enable(&mut msix, &mut config, CONTROL_ENABLE);
        msix.write_table(16, &0xfee0_1000u64.to_le_bytes());
        msix.write_table(24, &0x41u32.to_le_bytes());
        let vector = msix.vector(1).unwrap();
        vector.trigger();
        let pending = |msix: &Msix| {
            let mut bits = [0; 8];
            msix.read_pending(0, &mut bits);
            u64::from_le_bytes(bits)
        };
        assert_eq!(pending(&msix), 0b10);
        msix.write_table(28, &[0; 4]);
        assert_eq!((pending(&msix), msix.entries[1].routed.unwrap().data), (0, 0x41));
        enable(&mut msix, &mut config, CONTROL_ENABLE | CONTROL_MASK_ALL);
        vector.trigger();
        assert_eq!(pending(&msix), 0b10, "the function mask holds it back too");
        enable(&mut msix, &mut config, CONTROL_ENABLE);
        assert_eq!((pending(&msix), vector.take_raised()), (0, 2));
        enable(&mut msix, &mut config, 0);
        vector.trigger();
        assert_eq!(pending(&msix), 0b10, "and so does MSI-X being off");
        msix.forget_pending();
        assert_eq!(pending(&msix), 0);
        assert_eq!(table(&msix, 24, 8), [0x41, 0, 0, 0, 0, 0, 0, 0]);
    }

    /// Row 4 of the hostile inputs: out of bounds, odd sizes, across entries.
    #[test]
    fn mad_accesses_read_all_ones_and_write_nothing() {
        let (mut msix, _) = msix(2);
        let before = table(&msix, 0, 8);
        for (offset, len) in
            [(32, 4), (32, 8), (u64::MAX - 3, 4), (1, 4), (4, 8), (12, 8), (0, 1), (0, 2), (2, 2), (0, 16)]
        {
            assert!(table(&msix, offset, len).iter().all(|b| *b == 0xff), "read {len} at {offset}");
            msix.write_table(offset, &vec![0xaa; len]);
            let mut bits = vec![0; len];
            msix.read_pending(offset | 1, &mut bits);
            assert!(bits.iter().all(|b| *b == 0xff));
        }
        let mut bits = [0; 4];
        msix.read_pending(8, &mut bits);
        assert_eq!(bits, [0xff; 4], "past the pending bits");
        assert_eq!(table(&msix, 0, 8), before);
        assert_eq!(table(&msix, 16, 8), [0; 8]);
        assert!(msix.vector(2).is_none());
    }
}
