//! Structures as a C program has them in its memory: bytes of some size, with pointers to strings and arrays.

use std::ffi::{CString, c_void};
use std::path::PathBuf;

use arbitrary::{Result, Unstructured};
use vmbed::{MacAddress, PciAddress, RateLimit};

pub const INVALID: i32 = -1;
pub const UNSUPPORTED: i32 = -6;

/// What the header says of a structure: how long its first version was and this one is, and where it has pointers and
/// the lengths of what they point to.
pub struct Kind {
    pub first: usize,
    pub full: usize,
    pub pointers: &'static [usize],
}

/// A structure in a C program's memory: as many bytes as its size says, where that is a size.
pub struct Given {
    /// Behind them nothing is this program's; words, for alignment.
    pub words: Vec<u64>,
    pub size: usize,
    /// What its functions see of it: the rest is zero.
    pub seen: Vec<u8>,
    /// What a size or a tail alone is refused with.
    pub refusal: Option<i32>,
    /// Whether it is an older program's, or a newer one's that sets nothing new.
    pub older: bool,
    pub newer: bool,
}

impl Given {
    /// `fields` are offsets and bytes, pointers among them.
    pub fn new(u: &mut Unstructured<'_>, kind: &Kind, fields: &[(usize, Vec<u8>)]) -> Result<Self> {
        let mut seen = vec![0; kind.full];
        for (at, bytes) in fields {
            seen[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        let mut tail = 0;
        let size = match u.int_in_range(0..=11u8)? {
            0..5 => kind.full,
            5..8 => u.int_in_range(kind.first..=kind.full)?,
            8 => kind.full + u.int_in_range(0..=300)?,
            9 => {
                tail = u.int_in_range(1..=255u8)?;
                kind.full + u.int_in_range(1..=300)?
            }
            10 => u.int_in_range(0..=kind.first - 1)?,
            _ => *u.choose(&[(1 << 16) + 1, 1 << 17, usize::MAX, isize::MAX as usize, 1 << 63])?,
        };
        let wrong = size < kind.first || size > 1 << 16;
        // A function may look at the size, and where that is wrong at nothing else.
        let length = if wrong { 8 } else { size };
        let mut bytes = vec![0; length];
        let known = length.min(kind.full);
        // A program that knows half a pointer does not exist.
        if let Some(cut) = kind.pointers.iter().find(|at| (**at + 1..**at + 8).contains(&known)) {
            seen[*cut..cut + 8].fill(0);
        }
        seen[known..].fill(0);
        bytes[..known].copy_from_slice(&seen[..known]);
        bytes[..8].copy_from_slice(&size.to_le_bytes());
        if tail != 0 && !wrong {
            let at = u.int_in_range(kind.full..=size - 1)?;
            bytes[at] = tail;
        }
        let (older, newer) = (!wrong && size < kind.full, !wrong && size > kind.full && tail == 0);
        let refusal = match (wrong, tail) {
            (true, _) => Some(INVALID),
            (_, 0) => None,
            _ => Some(UNSUPPORTED),
        };
        let words = bytes.chunks(8).map(|part| {
            let mut word = [0; 8];
            word[..part.len()].copy_from_slice(part);
            u64::from_le_bytes(word)
        });
        Ok(Self { words: words.collect(), size, seen, refusal, older, newer })
    }

    pub fn pointer(&self) -> *const c_void {
        self.words.as_ptr().cast()
    }

    pub fn word(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.seen[at..at + 8].try_into().unwrap())
    }

    pub fn number(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.seen[at..at + 4].try_into().unwrap())
    }

    /// Whether the text at a pointer has crossed: `None` where the pointer is NULL.
    pub fn text<'a>(&self, at: usize, text: &'a Text) -> Option<&'a [u8]> {
        (self.word(at) != 0).then(|| text.0.as_ref().map_or(&[][..], |text| text.as_bytes()))
    }

    pub fn rate(&self, at: usize) -> RateLimit {
        let limit = RateLimit::NONE.bytes(self.word(at), self.word(at + 8));
        limit.ops(self.word(at + 16), self.word(at + 24))
    }
}

/// A string of the C program's, or NULL.
pub struct Text(pub Option<CString>);

impl Text {
    /// Mostly one of the good ones.
    pub fn new(u: &mut Unstructured<'_>, good: &[&str]) -> Result<Self> {
        if u.ratio(1u8, 3u8)? {
            return Ok(Self(None));
        }
        let mut bytes = u.choose(good)?.as_bytes().to_vec();
        if u.ratio(1u8, 5u8)? && !bytes.is_empty() {
            let at = u.choose_index(bytes.len())?;
            bytes[at] = u.int_in_range(1..=255)?;
        }
        Ok(Self(Some(CString::new(bytes).unwrap())))
    }

    pub fn field(&self, at: usize) -> (usize, Vec<u8>) {
        let pointer = self.0.as_ref().map_or(0, |text| text.as_ptr() as usize);
        (at, pointer.to_le_bytes().to_vec())
    }
}

/// Six pairs of digits.
pub fn mac(text: &[u8]) -> Option<MacAddress> {
    let digit = |b: u8| (b as char).to_digit(16).map(|d| d as u8);
    let parts: Vec<&[u8]> = text.split(|b| *b == b':').collect();
    let bytes = parts.iter().map(|part| match part {
        [a, b] => Some(digit(*a)? << 4 | digit(*b)?),
        _ => None,
    });
    Some(MacAddress(bytes.collect::<Option<Vec<u8>>>()?.try_into().ok()?))
}

pub fn utf8(bytes: &[u8]) -> Option<String> {
    String::from_utf8(bytes.to_vec()).ok()
}

pub fn file(bytes: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStrExt;
    std::ffi::OsStr::from_bytes(bytes).into()
}

/// `Some(None)` for nothing, `None` where it is wrong.
pub fn maybe<T>(text: Option<&[u8]>, read: impl FnOnce(&[u8]) -> Option<T>) -> Option<Option<T>> {
    match text {
        None => Some(None),
        Some(text) => read(text).map(Some),
    }
}

pub fn pci(text: &[u8]) -> Option<PciAddress> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Numbers that a field is given: mostly such as there are.
pub fn number(u: &mut Unstructured<'_>, most: u32) -> Result<u32> {
    if u.ratio(7u8, 8u8)? { u.int_in_range(0..=most) } else { u.arbitrary() }
}

pub fn words(at: usize, words: &[u64]) -> (usize, Vec<u8>) {
    (at, words.iter().flat_map(|word| word.to_le_bytes()).collect())
}

pub fn numbers(at: usize, numbers: &[u32]) -> (usize, Vec<u8>) {
    (at, numbers.iter().flat_map(|number| number.to_le_bytes()).collect())
}

pub fn rate(u: &mut Unstructured<'_>, at: usize) -> Result<(usize, Vec<u8>)> {
    let mut all = [0u64; 4];
    for word in &mut all {
        *word = if u.arbitrary()? { 0 } else { u.arbitrary()? };
    }
    Ok(words(at, &all))
}

/// How many elements an array is said to have: as many as there are, or more than any memory holds.
pub fn count(u: &mut Unstructured<'_>, there: usize) -> Result<u64> {
    let wild = u.ratio(1u8, 10u8)?;
    Ok(if wild { *u.choose(&[u64::MAX, i64::MAX as u64 + 1, 1 << 62])? } else { there as u64 })
}
