#![forbid(unsafe_code)]
//! The CMOS clock: a Motorola MC146818 that shows the host's time in UTC, and its battery-backed memory.
//!
//! It cannot be set, since it is the host's, and it offers no interrupts. An update is never in progress:
//! instead the time stands still between the reads that belong together. Reading register A (which a
//! driver does to look for an update) or the seconds takes the time anew; the other registers show the
//! same moment, for as long as a driver may need to read them.

use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use crate::bus::{Access, Device};
use crate::error::Result;
use crate::sys::lock;

/// Ports, from the base.
const INDEX: u64 = 0;
const DATA: u64 = 1;

/// Bit 7 of the index port masks the NMI.
const INDEX_MASK: u8 = 0x7f;

/// Registers.
const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const A: u8 = 0x0a;
const B: u8 = 0x0b;
const C: u8 = 0x0c;
const D: u8 = 0x0d;
const CENTURY: u8 = 0x32;

/// Register A: update in progress, and what a PC has in the rest (a 32768 Hz crystal, 1024 Hz rate).
const A_UIP: u8 = 1 << 7;
const A_DEFAULT: u8 = 0x26;
/// Register B: no updates (the time is being set), binary instead of BCD, 24 hours.
const B_SET: u8 = 1 << 7;
const B_BINARY: u8 = 1 << 2;
const B_24_HOURS: u8 = 1 << 1;
/// Register D: the battery is good.
const D_VALID: u8 = 1 << 7;
/// In the hours of a 12-hour clock.
const PM: u8 = 1 << 7;

/// How long a moment is shown to a guest that reads other registers only.
const STALE: Duration = Duration::from_millis(250);

/// The clock and its memory.
pub(crate) struct Cmos {
    clock: Box<dyn Fn() -> SystemTime + Send + Sync>,
    state: Mutex<State>,
}

struct State {
    index: u8,
    memory: [u8; 128],
    /// The moment that the time registers show.
    shown: SystemTime,
}

impl Default for Cmos {
    fn default() -> Self {
        Self::with_clock(SystemTime::now)
    }
}

impl Cmos {
    /// A clock that shows what `clock` says.
    fn with_clock(clock: impl Fn() -> SystemTime + Send + Sync + 'static) -> Self {
        let mut memory = [0; 128];
        memory[usize::from(A)] = A_DEFAULT;
        memory[usize::from(B)] = B_24_HOURS;
        memory[usize::from(D)] = D_VALID;
        let state = State { index: 0, memory, shown: SystemTime::UNIX_EPOCH };
        Self { clock: Box::new(clock), state: Mutex::new(state) }
    }

    fn read_data(&self) -> u8 {
        let mut state = lock(&self.state);
        let index = state.index;
        if is_time(index) || index == A {
            let now = (self.clock)();
            // Backwards counts as stale too: the host's clock was set.
            let stale = now.duration_since(state.shown).map_or(true, |age| age > STALE);
            let anew = stale || matches!(index, SECONDS | A);
            if anew && state.memory[usize::from(B)] & B_SET == 0 {
                state.shown = now;
            }
        }
        if is_time(index) {
            return show(index, DateTime::at(state.shown), state.memory[usize::from(B)]);
        }
        state.memory[usize::from(index)]
    }

    fn write_data(&self, value: u8) {
        let mut state = lock(&self.state);
        let index = state.index;
        state.memory[usize::from(index)] = match index {
            A => value & !A_UIP,
            C | D => return,
            // Also a time, where it is never seen again.
            _ => value,
        };
    }
}

fn is_time(index: u8) -> bool {
    matches!(index, SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY)
}

/// A time register as register `b` wants it.
fn show(index: u8, time: DateTime, b: u8) -> u8 {
    let digits = |value: u8| if b & B_BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) };
    match index {
        SECONDS => digits(time.second),
        MINUTES => digits(time.minute),
        HOURS if b & B_24_HOURS != 0 => digits(time.hour),
        HOURS => digits((time.hour + 11) % 12 + 1) | if time.hour >= 12 { PM } else { 0 },
        WEEKDAY => digits(time.weekday),
        DAY => digits(time.day),
        MONTH => digits(time.month),
        YEAR => digits((time.year % 100) as u8),
        _ => digits((time.year / 100 % 100) as u8),
    }
}

/// A moment in the Gregorian calendar, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct DateTime {
    year: u64,
    /// From 1.
    month: u8,
    /// From 1.
    day: u8,
    /// Sunday is 1.
    weekday: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

impl DateTime {
    fn at(time: SystemTime) -> Self {
        let seconds = time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let (days, second) = (seconds / 86_400, seconds % 86_400);
        // Years that begin in March have their leap day at the end, and eras of 400 years are all alike.
        let from_march_0 = days + 719_468;
        let (era, day_of_era) = (from_march_0 / 146_097, from_march_0 % 146_097);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month = (5 * day_of_year + 2) / 153;
        Self {
            year: era * 400 + year_of_era + u64::from(month >= 10),
            month: ((month + 2) % 12 + 1) as u8,
            day: (day_of_year - (153 * month + 2) / 5 + 1) as u8,
            // The first of January 1970 was a Thursday.
            weekday: ((days + 4) % 7 + 1) as u8,
            hour: (second / 3600) as u8,
            minute: (second / 60 % 60) as u8,
            second: (second % 60) as u8,
        }
    }
}

impl Device for Cmos {
    fn read(&self, access: Access, data: &mut [u8]) -> Result<()> {
        for (port, byte) in super::registers(access).zip(data) {
            // The index port is write-only.
            *byte = if port == DATA { self.read_data() } else { 0xff };
        }
        Ok(())
    }

    fn write(&self, access: Access, data: &[u8]) -> Result<()> {
        for (port, byte) in super::registers(access).zip(data) {
            match port {
                INDEX => lock(&self.state).index = byte & INDEX_MASK,
                DATA => self.write_data(*byte),
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    /// A clock that the test sets.
    fn cmos(seconds: u64) -> (Cmos, Arc<Mutex<SystemTime>>) {
        let time = Arc::new(Mutex::new(at(seconds)));
        let clock = time.clone();
        (Cmos::with_clock(move || *lock(&clock)), time)
    }

    fn read(cmos: &Cmos, index: u8) -> u8 {
        cmos.write(Access::at(INDEX), &[index]).unwrap();
        let mut data = [0xff];
        cmos.read(Access::at(DATA), &mut data).unwrap();
        data[0]
    }

    fn write(cmos: &Cmos, index: u8, value: u8) {
        cmos.write(Access::at(INDEX), &[index, value]).unwrap();
    }

    const TIME: [u8; 8] = [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY];
    /// Monday, 31 December 2029, 23:59:59.
    const LAST_SECOND: u64 = 1_893_455_999;

    #[test]
    fn the_calendar_is_right() {
        for (seconds, year, month, day, weekday) in [
            (0, 1970, 1, 1, 5),
            (951_782_400, 2000, 2, 29, 3),
            (951_868_800, 2000, 3, 1, 4),
            (LAST_SECOND, 2029, 12, 31, 2),
            (LAST_SECOND + 1, 2030, 1, 1, 3),
            (4_107_542_400, 2100, 3, 1, 2),
            (253_402_300_799, 9999, 12, 31, 6),
        ] {
            let time = DateTime::at(at(seconds));
            assert_eq!((time.year, time.month, time.day, time.weekday), (year, month, day, weekday));
        }
        assert_eq!(DateTime::at(SystemTime::UNIX_EPOCH - Duration::from_secs(1)).year, 1970);
    }

    #[test]
    fn time_is_shown_in_bcd_binary_and_12_hours() {
        let (cmos, time) = cmos(LAST_SECOND);
        let all = |cmos| TIME.map(|index| read(cmos, index));
        assert_eq!(all(&cmos), [0x59, 0x59, 0x23, 2, 0x31, 0x12, 0x29, 0x20]);
        write(&cmos, B, B_BINARY | B_24_HOURS);
        assert_eq!(all(&cmos), [59, 59, 23, 2, 31, 12, 29, 20]);
        write(&cmos, B, 0);
        for (hour, shown) in [(0, 0x12), (1, 1), (12, 0x92), (23, 0x91)] {
            *lock(&time) = at(hour * 3600);
            read(&cmos, SECONDS);
            assert_eq!(read(&cmos, HOURS), shown, "{hour}");
        }
    }

    #[test]
    fn registers_read_together_show_one_moment() {
        for first in [A, SECONDS] {
            let (cmos, time) = cmos(LAST_SECOND);
            *lock(&time) += Duration::from_millis(900);
            read(&cmos, first);
            // The year ends between two reads of one driver.
            *lock(&time) += Duration::from_millis(200);
            let date = [HOURS, DAY, MONTH, YEAR, CENTURY].map(|index| read(&cmos, index));
            assert_eq!(date, [0x23, 0x31, 0x12, 0x29, 0x20]);
            *lock(&time) += Duration::from_millis(200);
            assert_eq!(read(&cmos, YEAR), 0x30, "not for ever");
        }
    }

    #[test]
    fn seconds_go_on_and_no_update_is_ever_in_progress() {
        let (cmos, time) = cmos(0);
        for second in 0..60 {
            *lock(&time) = at(second) + Duration::from_micros(999_999);
            assert_eq!(read(&cmos, A), A_DEFAULT);
            write(&cmos, A, A_DEFAULT | A_UIP);
            assert_eq!(u64::from(read(&cmos, SECONDS)), second / 10 * 16 + second % 10);
        }
    }

    #[test]
    fn setting_it_changes_nothing_and_the_memory_remembers() {
        let (cmos, _) = cmos(LAST_SECOND);
        write(&cmos, B, B_SET | B_24_HOURS);
        TIME.into_iter().chain([C, D]).for_each(|index| write(&cmos, index, 0x11));
        write(&cmos, B, B_24_HOURS);
        assert_eq!((read(&cmos, YEAR), read(&cmos, C), read(&cmos, D)), (0x29, 0, D_VALID));
        write(&cmos, 0x5b | 0x80, 0xaa);
        assert_eq!(read(&cmos, 0x5b), 0xaa, "the NMI bit is not part of the index");
        assert_eq!(read(&cmos, 0x5c), 0);
    }

    #[test]
    fn any_access_is_answered() {
        let cmos = Cmos::default();
        // Miri takes a thousand times as long.
        for index in (0..=255).step_by(if cfg!(miri) { 51 } else { 1 }) {
            for offset in (0..5).chain([u64::MAX - 8]) {
                for size in 0..=8 {
                    let mut data = vec![index; size];
                    cmos.write(Access::at(offset), &data).unwrap();
                    cmos.read(Access::at(offset), &mut data).unwrap();
                }
            }
        }
        let mut data = [0; 4];
        cmos.write(Access::at(INDEX), &[D]).unwrap();
        cmos.read(Access::at(INDEX), &mut data).unwrap();
        assert_eq!(data, [0xff, D_VALID, 0xff, 0xff]);
    }
}
