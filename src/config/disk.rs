#![forbid(unsafe_code)]
//! A virtio-blk disk.

use std::fmt;
use std::path::PathBuf;

use zeroize::Zeroize;

use super::{PciAddress, RateLimit};

/// The most queues that a disk can have.
pub(crate) const MAX_QUEUES: u16 = 16;

/// What a disk's file holds. Said by the embedder, never guessed from the file: what a guest writes to a raw disk stays a
/// raw disk's, whatever it looks like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum DiskFormat {
    /// The bytes of the disk, one to one. Default.
    #[default]
    Raw,
    /// QEMU's format, version 2 or 3 (with the cargo feature `qcow2`, which is there by default).
    Qcow2,
}

/// When a write is on stable storage, and whose memory it goes through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum CacheMode {
    /// Through the host's page cache; on stable storage when the guest flushes. Default.
    #[default]
    Writeback,
    /// Through the host's page cache; each write is on stable storage before it is answered, unless the guest itself
    /// chooses otherwise (`/sys/block/vda/queue/write_cache`).
    Writethrough,
    /// Past the host's page cache (`O_DIRECT`); on stable storage when the guest flushes. What is not aligned as the host's
    /// storage wants it goes through the page cache all the same. Only for files that `O_DIRECT` can open.
    Direct,
    /// Flushes are answered and not done: for data that nobody misses after a power cut.
    Unsafe,
}

/// How a disk asks the host to move data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum DiskEngine {
    /// io_uring where the host has it and allows it, else synchronous. Default.
    #[default]
    Auto,
    /// One system call for each request, on the disk's thread, which waits for it.
    Sync,
    /// Many requests on their way at a time, by io_uring. An error where the host does not allow it.
    IoUring,
}

/// What opens an encrypted image. It is shown nowhere, and gone from memory with the configuration that holds it; serde writes
/// it out as it is.
#[derive(Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(transparent))]
pub struct Passphrase(String);

impl Passphrase {
    /// This one.
    pub fn new(passphrase: impl Into<String>) -> Self {
        Self(passphrase.into())
    }

    #[cfg(feature = "qcow2")]
    pub(crate) fn expose(&self) -> &str {
        &self.0
    }
}

impl Drop for Passphrase {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Passphrase(..)")
    }
}

/// A file that a qcow2 image is based on.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub struct DiskBacking {
    /// Where it is.
    pub path: PathBuf,
    /// What it holds.
    pub format: DiskFormat,
}

/// A virtio-blk disk, on a file or on what is attached to it when the VM is built.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields, default)
)]
#[non_exhaustive]
pub struct DiskConfig {
    /// A regular file or a block device, a multiple of 512 bytes long. `None` where something is attached with
    /// [`VmBuilder::disk_fd`](crate::VmBuilder::disk_fd) or [`disk_backend`](crate::VmBuilder::disk_backend).
    pub path: Option<PathBuf>,
    /// What the file holds.
    pub format: DiskFormat,
    /// What a qcow2 image is based on, the nearest first. Only files that stand here are opened, whatever the image itself says,
    /// and one that says that it is based on another is refused where that one does not stand here. They are only read.
    pub backing: Vec<DiskBacking>,
    /// Where the qcow2 image at `path` keeps its data, if not in itself. Only this file is opened, whatever the image says; an image
    /// that keeps its data elsewhere is refused where it does not stand here.
    pub data_file: Option<PathBuf>,
    /// What opens the encrypted images among `path` and `backing`: each is tried with each, which takes the seconds that the image
    /// wants it to take. Images with QEMU's encryption from before LUKS (`encrypt.format=aes`) take the first. Encrypted images can
    /// only be read, also by a writable image on top, which is not encrypted itself.
    pub passphrases: Vec<Passphrase>,
    /// The guest may not write, and the file is opened for reading only.
    pub readonly: bool,
    /// At most 20 bytes of ASCII, shown as `/sys/block/vda/serial` and in `/dev/disk/by-id`.
    pub serial: String,
    /// Where on the PCI bus; the first free place when absent.
    pub pci: Option<PciAddress>,
    /// Queues that the guest may use at a time, each with a thread of its own: 1 to 16, and not more than vCPUs are of
    /// use. Default 1. A disk that is attached as code of the embedder's has one.
    pub queues: u16,
    /// When a write is on stable storage. Not for a disk that is attached as code of the embedder's.
    pub cache: CacheMode,
    /// How data is moved. Not for a disk that is attached as code of the embedder's.
    pub engine: DiskEngine,
    /// Whether what the guest discards becomes free on the host: holes in a file, a discard on a block device. Default.
    /// Otherwise the guest is told that the disk knows no such thing.
    pub discard: bool,
    /// How much may be transferred, reads and writes together, over all queues;
    /// [`Vm::set_disk_rate`](crate::Vm::set_disk_rate) changes it. Default: any amount.
    pub rate: RateLimit,
    /// Whether a file named by `path` is locked as QEMU does it, so that nobody else opens it meanwhile: a writer has it
    /// alone, readers share it. Default. For clusters of hosts on file systems without locks there is `false`.
    pub lock: bool,
}

impl Default for DiskConfig {
    fn default() -> Self {
        Self {
            path: None,
            format: DiskFormat::Raw,
            backing: Vec::new(),
            data_file: None,
            passphrases: Vec::new(),
            readonly: false,
            serial: String::new(),
            pci: None,
            queues: 1,
            cache: CacheMode::Writeback,
            engine: DiskEngine::Auto,
            discard: true,
            rate: RateLimit::NONE,
            lock: true,
        }
    }
}

impl DiskConfig {
    /// The raw image or block device at `path`, writable.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: Some(path.into()), ..Self::default() }
    }

    /// A disk on what is attached when the VM is built, writable.
    pub fn attached() -> Self {
        Self::default()
    }

    /// The qcow2 image at `path`, writable.
    pub fn qcow2(path: impl Into<PathBuf>) -> Self {
        Self { format: DiskFormat::Qcow2, ..Self::new(path) }
    }

    /// On that file, below what it is based on already.
    #[must_use]
    pub fn based_on(mut self, path: impl Into<PathBuf>, format: DiskFormat) -> Self {
        self.backing.push(DiskBacking { path: path.into(), format });
        self
    }

    /// With its data in that file: an image with QEMU's option `data_file`.
    #[must_use]
    pub fn with_data_in(mut self, path: impl Into<PathBuf>) -> Self {
        self.data_file = Some(path.into());
        self
    }

    /// With that among what opens its encrypted images.
    #[must_use]
    pub fn unlocked_by(mut self, passphrase: impl Into<String>) -> Self {
        self.passphrases.push(Passphrase::new(passphrase));
        self
    }

    /// The same, for reading only.
    #[must_use]
    pub fn readonly(mut self) -> Self {
        self.readonly = true;
        self
    }
}
