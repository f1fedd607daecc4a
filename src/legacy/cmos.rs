#![forbid(unsafe_code)]
//! The MC146818 real-time clock: the host's UTC time, and 128 bytes of memory.

use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use super::bytes;
use crate::bus::{Access, Device};
use crate::error::Result;
use crate::sys::lock;

/// Registers of the chip, and the century's where PCs have it.
mod register {
    pub(super) const A: u8 = 0x0a;
    pub(super) const B: u8 = 0x0b;
    pub(super) const C: u8 = 0x0c;
    pub(super) const D: u8 = 0x0d;
    pub(super) const CENTURY: u8 = 0x32;
}

/// Register B: binary instead of BCD, 24 hours instead of 12.
const BINARY: u8 = 1 << 2;
const HOURS_24: u8 = 1 << 1;
/// Register A: 32768 Hz base, no periodic rate; never "update in progress", since every read is whole.
const DIVIDER: u8 = 0x20;
/// Register D: the battery is good.
const VALID: u8 = 1 << 7;
const PM: u8 = 1 << 7;

/// The clock. What the guest sets it to is forgotten: it shows the host's time.
pub(crate) struct Cmos {
    state: Mutex<State>,
    now: fn() -> u64,
}

struct State {
    index: u8,
    memory: [u8; 128],
}

impl Default for Cmos {
    fn default() -> Self {
        Self::with_clock(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs()))
    }
}

impl Cmos {
    fn with_clock(now: fn() -> u64) -> Self {
        let mut memory = [0; 128];
        memory[usize::from(register::A)] = DIVIDER;
        memory[usize::from(register::B)] = HOURS_24;
        Self { state: Mutex::new(State { index: 0, memory }), now }
    }
}

impl State {
    fn read(&self, now: u64) -> u8 {
        let mode = self.memory[usize::from(register::B)];
        let time = Time::of(now);
        let shown = |value: u8| if mode & BINARY != 0 { value } else { value / 10 << 4 | value % 10 };
        match self.index {
            0x00 => shown(time.second),
            0x02 => shown(time.minute),
            0x04 if mode & HOURS_24 == 0 => {
                let hour = if time.hour % 12 == 0 { 12 } else { time.hour % 12 };
                shown(hour) | if time.hour >= 12 { PM } else { 0 }
            }
            0x04 => shown(time.hour),
            0x06 => shown(time.weekday),
            0x07 => shown(time.day),
            0x08 => shown(time.month),
            0x09 => shown((time.year % 100) as u8),
            register::CENTURY => shown((time.year / 100 % 100) as u8),
            register::C => 0,
            register::D => VALID,
            index => self.memory[usize::from(index)],
        }
    }
}

/// A UTC date and time.
struct Time {
    year: u64,
    month: u8,
    day: u8,
    /// 1 is Sunday.
    weekday: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

impl Time {
    /// From seconds since 1970 (Howard Hinnant, "chrono-compatible low-level date algorithms").
    fn of(seconds: u64) -> Self {
        let (days, rest) = (seconds / 86_400, seconds % 86_400);
        let since_0000_03 = days + 719_468;
        let (era, day_of_era) = (since_0000_03 / 146_097, since_0000_03 % 146_097);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted = (5 * day_of_year + 2) / 153;
        let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
        Self {
            year: era * 400 + year_of_era + u64::from(month <= 2),
            month: month as u8,
            day: (day_of_year - (153 * shifted + 2) / 5 + 1) as u8,
            weekday: ((days + 4) % 7) as u8 + 1,
            hour: (rest / 3600) as u8,
            minute: (rest / 60 % 60) as u8,
            second: (rest % 60) as u8,
        }
    }
}

impl Device for Cmos {
    fn read(&self, access: Access, data: &mut [u8]) -> Result<()> {
        let state = lock(&self.state);
        for (offset, byte) in (access.offset..).zip(data.iter_mut()) {
            if offset == 1 {
                *byte = state.read((self.now)());
            }
        }
        Ok(())
    }

    fn write(&self, access: Access, data: &[u8]) -> Result<()> {
        let mut state = lock(&self.state);
        for (offset, byte) in bytes(access, data) {
            match offset {
                // The top bit masks the NMI, and does not belong to the index.
                0 => state.index = byte & 0x7f,
                1 => {
                    let index = usize::from(state.index);
                    state.memory[index] = byte;
                }
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn register(cmos: &Cmos, index: u8) -> u8 {
        cmos.write(Access::at(0), &[index]).unwrap();
        let mut data = [0xff];
        cmos.read(Access::at(1), &mut data).unwrap();
        data[0]
    }

    fn shown(cmos: &Cmos) -> Vec<u8> {
        [0x32, 9, 8, 7, 6, 4, 2, 0].iter().map(|i| register(cmos, *i)).collect()
    }

    #[test]
    fn the_time_in_every_mode() {
        // 2024-02-29 23:58:07, a Thursday.
        let cmos = Cmos::with_clock(|| 1_709_251_087);
        assert_eq!(shown(&cmos), [0x20, 0x24, 2, 0x29, 5, 0x23, 0x58, 7]);
        cmos.write(Access::at(0), &[super::register::B]).unwrap();
        cmos.write(Access::at(1), &[BINARY]).unwrap();
        assert_eq!(shown(&cmos), [20, 24, 2, 29, 5, 11 | PM, 58, 7]);
    }

    #[test]
    fn dates_at_the_edges() {
        for (seconds, want) in [
            (0, (1970, 1, 1, 5)),
            (951_782_400, (2000, 2, 29, 3)),
            (946_684_799, (1999, 12, 31, 6)),
            (4_102_444_800, (2100, 1, 1, 6)),
        ] {
            let time = Time::of(seconds);
            assert_eq!((time.year, time.month, time.day, time.weekday), want, "{seconds}");
        }
    }

    #[test]
    fn memory_is_kept_and_no_update_is_ever_in_progress() {
        let cmos = Cmos::default();
        cmos.write(Access::at(0), &[0x80 | 0x40, 0x5a]).unwrap();
        assert_eq!(
            register(&cmos, 0x40),
            0x5a,
            "index and data in one wide write; the NMI bit is not the index's"
        );
        assert_eq!(register(&cmos, super::register::A) & 0x80, 0);
        assert_eq!(register(&cmos, super::register::D), VALID);
        for len in 1..=8 {
            cmos.read(Access::at(0), &mut vec![0xff; len]).unwrap();
            cmos.write(Access::at(1), &vec![0xff; len]).unwrap();
        }
    }
}
