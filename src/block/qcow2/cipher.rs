#![forbid(unsafe_code)]
//! Sectors of encrypted images. Ciphers are libraries'; how they are chained is what an image chooses at run time, and so is here.

use std::io;

use aes::cipher::{BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use zeroize::Zeroizing;

use super::luks::{Hash, malformed, unknown};

pub(super) const SECTOR: usize = 512;
/// The largest block of a cipher.
const BLOCK: usize = 16;

/// A block cipher with its key.
trait Blocks: Send + Sync {
    fn size(&self) -> usize;
    fn encrypt(&self, block: &mut [u8]);
    fn decrypt(&self, block: &mut [u8]);
}

impl<C: BlockCipherEncrypt + BlockCipherDecrypt + Send + Sync> Blocks for C {
    fn size(&self) -> usize {
        C::block_size()
    }

    fn encrypt(&self, block: &mut [u8]) {
        if let Ok(block) = block.try_into() {
            self.encrypt_block(block);
        }
    }

    fn decrypt(&self, block: &mut [u8]) {
        if let Ok(block) = block.try_into() {
            self.decrypt_block(block);
        }
    }
}

fn keyed<C: Blocks + KeyInit + 'static>(key: &[u8]) -> io::Result<Box<dyn Blocks>> {
    let cipher = C::new_from_slice(key).map_err(|_| malformed("the cipher has no keys of that length"))?;
    Ok(Box::new(cipher))
}

fn cipher(name: &str, key: &[u8]) -> io::Result<Box<dyn Blocks>> {
    match (name, key.len()) {
        ("aes", 16) => keyed::<aes::Aes128>(key),
        ("aes", 24) => keyed::<aes::Aes192>(key),
        ("aes", _) => keyed::<aes::Aes256>(key),
        ("serpent", _) => keyed::<serpent::Serpent>(key),
        ("twofish", _) => keyed::<twofish::Twofish>(key),
        ("cast5", _) => keyed::<cast5::Cast5>(key),
        _ => Err(unknown("cipher", name)),
    }
}

/// How the blocks of a sector are chained.
enum Chain {
    Ecb,
    Cbc,
    Ctr,
    /// With the second key's cipher.
    Xts(Box<dyn Blocks>),
}

/// What a sector's first block is chained to.
enum Start {
    Plain,
    Plain64,
    /// Encrypted with a hash of the key.
    Essiv(Box<dyn Blocks>),
}

/// What decrypts sectors.
pub(super) struct Cipher {
    blocks: Box<dyn Blocks>,
    chain: Chain,
    start: Start,
    /// Sectors have the numbers that they have in the file, and not the disk's.
    pub by_place: bool,
}

impl Cipher {
    /// QEMU's before it took LUKS: the passphrase is the key, and nothing tells whether it is right.
    pub fn of_old(passphrase: &str) -> io::Result<Self> {
        let mut key = Zeroizing::new([0; 16]);
        key.iter_mut().zip(passphrase.bytes()).for_each(|(byte, given)| *byte = given);
        let blocks = cipher("aes", &key[..])?;
        Ok(Self { blocks, chain: Chain::Cbc, start: Start::Plain64, by_place: false })
    }

    /// `name` as in `aes`, `mode` as in `xts-plain64` or `cbc-essiv:sha256`.
    pub fn named(name: &str, mode: &str, key: &[u8]) -> io::Result<Self> {
        let (chain, start) = mode.split_once('-').unwrap_or((mode, "plain"));
        let half = if chain == "xts" { key.len() / 2 } else { key.len() };
        let blocks = cipher(name, &key[..half])?;
        let chain = match chain {
            "ecb" => Chain::Ecb,
            "cbc" => Chain::Cbc,
            "ctr" => Chain::Ctr,
            "xts" if blocks.size() == BLOCK => Chain::Xts(cipher(name, &key[half..])?),
            _ => return Err(unknown("mode", mode)),
        };
        let start = match start.split_once(':') {
            None if start == "plain" => Start::Plain,
            None if start == "plain64" => Start::Plain64,
            Some(("essiv", hash)) => {
                let hashed = Zeroizing::new((Hash::named(hash)?.digest)(key));
                Start::Essiv(cipher(name, &hashed)?)
            }
            _ => return Err(unknown("mode", mode)),
        };
        Ok(Self { blocks, chain, start, by_place: true })
    }

    fn start(&self, sector: u64) -> [u8; BLOCK] {
        let mut start = [0; BLOCK];
        let number = if matches!(self.start, Start::Plain) { sector & u64::from(u32::MAX) } else { sector };
        start[..8].copy_from_slice(&number.to_le_bytes());
        if let Start::Essiv(blocks) = &self.start {
            blocks.encrypt(&mut start[..blocks.size()]);
        }
        start
    }

    /// Decrypts whole sectors, the first of which has that number.
    pub fn decrypt(&self, bytes: &mut [u8], first: u64) {
        for (sector, number) in bytes.chunks_exact_mut(SECTOR).zip(first..) {
            self.sector(sector, self.start(number));
        }
    }

    fn sector(&self, sector: &mut [u8], start: [u8; BLOCK]) {
        let size = self.blocks.size();
        let mut chained = start;
        if let Chain::Xts(second) = &self.chain {
            second.encrypt(&mut chained);
        }
        for block in sector.chunks_exact_mut(size) {
            match &self.chain {
                Chain::Ecb => self.blocks.decrypt(block),
                Chain::Cbc => {
                    let mut last = [0; BLOCK];
                    last[..size].copy_from_slice(block);
                    self.blocks.decrypt(block);
                    mix(block, &chained);
                    chained = last;
                }
                Chain::Ctr => {
                    let mut stream = chained;
                    self.blocks.encrypt(&mut stream[..size]);
                    mix(block, &stream);
                    count(&mut chained[..size]);
                }
                Chain::Xts(_) => {
                    mix(block, &chained);
                    self.blocks.decrypt(block);
                    mix(block, &chained);
                    chained = doubled(chained);
                }
            }
        }
    }
}

fn mix(block: &mut [u8], with: &[u8]) {
    block.iter_mut().zip(with).for_each(|(byte, other)| *byte ^= other);
}

/// One more, the last byte being the least.
fn count(number: &mut [u8]) {
    for byte in number.iter_mut().rev() {
        *byte = byte.wrapping_add(1);
        if *byte != 0 {
            break;
        }
    }
}

/// Times x in GF(2^128), as IEEE 1619 writes it.
fn doubled(tweak: [u8; BLOCK]) -> [u8; BLOCK] {
    let number = u128::from_le_bytes(tweak);
    let carry = if number >> 127 == 0 { 0 } else { 0x87 };
    (number << 1 ^ carry).to_le_bytes()
}
