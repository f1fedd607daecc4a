#![forbid(unsafe_code)]
//! Numbers that know their unit.

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, ErrorKind};

/// A quantity of memory or storage, in bytes.
///
/// ```
/// use vmbed::Bytes;
/// assert_eq!("512M".parse::<Bytes>().unwrap(), Bytes::mib(512));
/// assert_eq!(Bytes::gib(2).to_string(), "2 GiB");
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(transparent))]
pub struct Bytes(pub u64);

impl Bytes {
    /// `n` KiB; saturates at the largest value.
    pub const fn kib(n: u64) -> Self {
        Self(n.saturating_mul(1 << 10))
    }

    /// `n` MiB; saturates at the largest value.
    pub const fn mib(n: u64) -> Self {
        Self(n.saturating_mul(1 << 20))
    }

    /// `n` GiB; saturates at the largest value.
    pub const fn gib(n: u64) -> Self {
        Self(n.saturating_mul(1 << 30))
    }

    /// The number of bytes.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
            if self.0 >= 1 << shift && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{} {unit}", self.0 >> shift);
            }
        }
        write!(f, "{} bytes", self.0)
    }
}

impl FromStr for Bytes {
    type Err = Error;

    /// A whole number with an optional binary unit: `4096`, `64K`, `512M`, `2G`, `1T`
    /// (also `512MiB` and `512MB`, which mean the same here).
    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = || {
            Error::new(
                ErrorKind::InvalidArgument,
                format!("'{text}' is not a size: write a whole number and K, M, G or T, as in 512M"),
            )
        };
        let text = text.trim();
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let number: u64 = text[..digits].parse().map_err(|_| bad())?;
        let shift = match text[digits..].trim().to_ascii_uppercase().as_str() {
            "" | "B" => 0,
            "K" | "KB" | "KIB" => 10,
            "M" | "MB" | "MIB" => 20,
            "G" | "GB" | "GIB" => 30,
            "T" | "TB" | "TIB" => 40,
            _ => return Err(bad()),
        };
        number.checked_mul(1 << shift).map(Self).ok_or_else(bad)
    }
}

/// A KVM global system interrupt: an index into the VM's interrupt routing table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Gsi(pub u32);

/// A position on a disk in units of 512 bytes, whatever the disk's block size
/// (virtio 1.2, section 5.2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Sectors(pub u64);

impl Sectors {
    /// The size of a virtio sector in bytes.
    pub const SIZE: u64 = 512;

    /// The byte offset; `None` where it does not fit.
    pub fn bytes(self) -> Option<u64> {
        self.0.checked_mul(Self::SIZE)
    }
}

/// Counts what one thread at a time does, for others to read: no locked instruction, so as many as one likes.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    /// Only ever on the thread that does what is counted.
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_and_print() {
        for (text, bytes) in [("0", 0), ("4096", 4096), ("64K", 65536), ("1 GiB", 1 << 30), ("2t", 2 << 40)] {
            assert_eq!(text.parse::<Bytes>().unwrap().get(), bytes, "{text}");
        }
        for text in ["", "M", "-1", "1.5G", "12Q", "99999999999T", "18446744073709551616"] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
        assert_eq!(Bytes(1536).to_string(), "1536 bytes");
        assert_eq!(Bytes::mib(u64::MAX), Bytes(u64::MAX));
    }

    #[test]
    fn sectors_do_not_wrap() {
        assert_eq!(Sectors(2).bytes(), Some(1024));
        assert_eq!(Sectors(u64::MAX / 256).bytes(), None);
    }
}
