#![forbid(unsafe_code)]
//! The keys of encrypted images: LUKS (the LUKS1 On-Disk Format Specification, 1.2.3), as QEMU's docs/interop/qcow2.txt puts it into an
//! image, and what it did before that.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use pbkdf2::hmac::EagerHash;
use sha2::Digest;
use zeroize::Zeroizing;

use super::cipher::{Cipher, SECTOR};
use crate::config::Passphrase;

const MAGIC: &[u8] = b"LUKS\xba\xbe\0\x01";
const HEADER: usize = 592;
const SLOTS: usize = 8;
const SLOT_USED: u32 = 0x00ac_71f3;
/// Some minutes for a passphrase, whatever the slots say; what asks for more is none that somebody wants to use.
const MOST_ROUNDS: u32 = 200_000_000;
/// The specification's, and everybody's.
const MOST_STRIPES: usize = 4000;
const MOST_KEY: usize = 64;

pub(super) fn unknown(what: &str, name: &str) -> io::Error {
    io::Error::other(format!("is encrypted with {what} {name:?}, which is not known"))
}

pub(super) fn malformed(what: &str) -> io::Error {
    io::Error::other(format!("is encrypted, and its LUKS header is wrong: {what}"))
}

/// What decrypts an image with this method of encryption, whose LUKS header is there.
///
/// # Errors
/// None of the passphrases opens it; it is not known, or corrupt.
pub(super) fn unlock(
    file: &File,
    method: u32,
    header: Option<(u64, u64)>,
    passphrases: &[Passphrase],
) -> io::Result<Cipher> {
    let Some(first) = passphrases.first() else {
        return Err(io::Error::other("is encrypted, and there are no passphrases"));
    };
    match (method, header) {
        (1, _) => Cipher::of_old(first.expose()),
        (2, Some((at, length))) => {
            let header = Luks::read(file, at, length)?;
            let opened = passphrases.iter().find_map(|one| {
                let mut left = MOST_ROUNDS;
                header.unlock(file, one.expose(), &mut left).transpose()
            });
            opened.unwrap_or_else(|| Err(io::Error::other("is encrypted, and no passphrase opens it")))
        }
        (2, None) => Err(malformed("there is none")),
        _ => Err(unknown("method", &method.to_string())),
    }
}

/// A hash, and the derivation of keys that is made of it.
pub(super) struct Hash {
    pub digest: fn(&[u8]) -> Vec<u8>,
    derive: fn(&[u8], &[u8], u32, &mut [u8]),
}

impl Hash {
    fn of<D: Digest + EagerHash>() -> Self {
        Self { digest: |bytes| D::digest(bytes).to_vec(), derive: pbkdf2::pbkdf2_hmac::<D> }
    }

    pub fn named(name: &str) -> io::Result<Self> {
        Ok(match name {
            "md5" => Self::of::<md5::Md5>(),
            "sha1" => Self::of::<sha1::Sha1>(),
            "sha224" => Self::of::<sha2::Sha224>(),
            "sha256" => Self::of::<sha2::Sha256>(),
            "sha384" => Self::of::<sha2::Sha384>(),
            "sha512" => Self::of::<sha2::Sha512>(),
            "ripemd160" => Self::of::<ripemd::Ripemd160>(),
            _ => return Err(unknown("hash", name)),
        })
    }

    /// A key out of its stripes (section 2.4).
    fn merged(&self, stripes: &[u8], length: usize) -> Zeroizing<Vec<u8>> {
        let mut key = Zeroizing::new(vec![0; length]);
        let mut stripes = stripes.chunks_exact(length).peekable();
        while let Some(stripe) = stripes.next() {
            key.iter_mut().zip(stripe).for_each(|(byte, other)| *byte ^= other);
            if stripes.peek().is_none() {
                break;
            }
            let width = (self.digest)(&[]).len();
            for (i, piece) in key.chunks_mut(width).enumerate() {
                let hashed = (self.digest)(&[&(i as u32).to_be_bytes(), &*piece].concat());
                piece.copy_from_slice(&hashed[..piece.len()]);
            }
        }
        key
    }
}

/// A LUKS header (section 3), with what it says checked.
struct Luks {
    bytes: [u8; HEADER],
    /// Where it begins in the file; what it says is from there on.
    at: u64,
    /// How much there is of it with its keys.
    length: u64,
    key: usize,
    hash: Hash,
}

/// A slot for a passphrase.
struct Slot {
    rounds: u32,
    salt: [u8; 32],
    at: u64,
    stripes: usize,
}

impl Luks {
    fn read(file: &File, at: u64, length: u64) -> io::Result<Self> {
        let mut bytes = [0; HEADER];
        file.read_exact_at(&mut bytes, at)?;
        if !bytes.starts_with(MAGIC) {
            return Err(malformed("it is none of LUKS1"));
        }
        let mut this = Self { bytes, at, length, key: 0, hash: Hash::of::<sha2::Sha256>() };
        this.hash = Hash::named(&this.text(72))?;
        this.key = this.number(108) as usize;
        if !(1..=MOST_KEY).contains(&this.key) {
            return Err(malformed("the length of its key"));
        }
        this.rounds(164)?;
        Ok(this)
    }

    fn number(&self, at: usize) -> u32 {
        u32::from_be_bytes([self.bytes[at], self.bytes[at + 1], self.bytes[at + 2], self.bytes[at + 3]])
    }

    fn salt(&self, at: usize) -> [u8; 32] {
        let mut salt = [0; 32];
        salt.copy_from_slice(&self.bytes[at..at + 32]);
        salt
    }

    fn text(&self, at: usize) -> String {
        let field = &self.bytes[at..at + 32];
        let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
        String::from_utf8_lossy(&field[..end]).into_owned()
    }

    fn rounds(&self, at: usize) -> io::Result<u32> {
        let rounds = self.number(at);
        let good = (1..=MOST_ROUNDS).contains(&rounds);
        if good { Ok(rounds) } else { Err(malformed(&format!("{rounds} rounds of key derivation"))) }
    }

    fn slot(&self, index: usize) -> io::Result<Option<Slot>> {
        let at = 208 + 48 * index;
        if self.number(at) != SLOT_USED {
            return Ok(None);
        }
        let slot = Slot {
            rounds: self.rounds(at + 4)?,
            salt: self.salt(at + 8),
            at: u64::from(self.number(at + 40)) * SECTOR as u64,
            stripes: self.number(at + 44) as usize,
        };
        let good = (1..=MOST_STRIPES).contains(&slot.stripes)
            && slot.at + (self.key * slot.stripes) as u64 <= self.length;
        if good { Ok(Some(slot)) } else { Err(malformed(&format!("where slot {index} is"))) }
    }

    /// `None`: it is another passphrase.
    fn unlock(&self, file: &File, passphrase: &str, left: &mut u32) -> io::Result<Option<Cipher>> {
        let (name, mode) = (self.text(8), self.text(40));
        for index in 0..SLOTS {
            let Some(slot) = self.slot(index)? else { continue };
            let rounds = slot.rounds.saturating_add(self.rounds(164)?);
            let less = left.checked_sub(rounds);
            *left =
                less.ok_or_else(|| malformed("more rounds of key derivation in all than any image needs"))?;
            let mut derived = Zeroizing::new(vec![0; self.key]);
            (self.hash.derive)(passphrase.as_bytes(), &slot.salt, slot.rounds, &mut derived);
            // In whole sectors, of which the last may reach into something else.
            let length = self.key * slot.stripes;
            let mut stripes = Zeroizing::new(vec![0; length.next_multiple_of(SECTOR)]);
            file.read_exact_at(&mut stripes[..length], self.at + slot.at)?;
            Cipher::named(&name, &mode, &derived)?.decrypt(&mut stripes, 0);
            let key = self.hash.merged(&stripes[..length], self.key);
            let mut digest = [0; 20];
            (self.hash.derive)(&key, &self.salt(132), self.rounds(164)?, &mut digest);
            if digest == self.bytes[112..132] {
                return Cipher::named(&name, &mode, &key).map(Some);
            }
        }
        Ok(None)
    }
}
