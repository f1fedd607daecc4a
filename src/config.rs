#![forbid(unsafe_code)]
//! What a VM is to be: plain data, checked as a whole by [`VmConfig::validate`].
//!
//! Nothing here is open or running. File descriptors, devices of your own and console outputs are
//! attached on [`VmBuilder`](crate::VmBuilder).

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::error::{Error, ErrorKind, Result};
use crate::units::Bytes;

pub use backing::{BackingConfig, BackingKind, HugePages};
pub use cgroup::CgroupConfig;
pub use disk::{CacheMode, DiskBacking, DiskConfig, DiskEngine, DiskFormat, Passphrase};
pub use net::{MacAddress, NetConfig, Vhost};
pub use rate::RateLimit;
pub use sandbox::SandboxConfig;

mod backing;
mod cgroup;
pub(crate) mod disk;
mod net;
mod rate;
mod sandbox;
pub(crate) mod topology;
pub(crate) mod validate;

/// Everything about a VM that is data.
///
/// ```
/// use vmbed::{Bytes, DiskConfig, LinuxBoot, VmConfig};
///
/// let mut config = VmConfig::linux(LinuxBoot::new("/boot/vmlinuz"));
/// config.cpus.count = 2;
/// config.memory = Bytes::mib(512);
/// config.disks.push(DiskConfig::new("debian.img"));
/// config.validate().unwrap();
/// ```
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct VmConfig {
    /// For messages and the guest's SMBIOS (its serial number); any text without NUL, at most 64 bytes.
    #[cfg_attr(feature = "serde", serde(default))]
    pub name: String,
    /// The VM's identity in SMBIOS (`dmidecode -s system-uuid`); made up when absent.
    #[cfg_attr(feature = "serde", serde(default))]
    pub uuid: Option<Uuid>,
    /// Virtual processors.
    #[cfg_attr(feature = "serde", serde(default))]
    pub cpus: CpuConfig,
    /// Guest memory: a multiple of 4 KiB, from 32 MiB (a bare guest: 64 KiB) to 32 TiB. Default 256 MiB,
    /// for [`VmConfig::bare`] 2 MiB.
    #[cfg_attr(feature = "serde", serde(default = "default_memory"))]
    pub memory: Bytes,
    /// What that memory is made of.
    #[cfg_attr(feature = "serde", serde(default))]
    pub backing: BackingConfig,
    /// A cgroup of its own for its threads. Default: none.
    #[cfg_attr(feature = "serde", serde(default))]
    pub cgroup: Option<CgroupConfig>,
    /// A sandbox for its threads. Default: none.
    #[cfg_attr(feature = "serde", serde(default))]
    pub sandbox: Option<SandboxConfig>,
    /// What the host's ledger promises it.
    #[cfg_attr(feature = "serde", serde(default))]
    pub promise: PromiseConfig,
    /// What runs first.
    pub boot: Boot,
    /// What is soldered on the board.
    pub platform: Platform,
    /// What `/dev/console` is wired to.
    #[cfg_attr(feature = "serde", serde(default))]
    pub console: ConsoleKind,
    /// virtio-blk disks, in the order of their ids `disk0`, `disk1`, …
    #[cfg_attr(feature = "serde", serde(default))]
    pub disks: Vec<DiskConfig>,
    /// virtio-net cards, in the order of their ids `net0`, `net1`, …
    #[cfg_attr(feature = "serde", serde(default))]
    pub nets: Vec<NetConfig>,
    /// A virtio-balloon, `balloon0`, through which the guest gives memory back. Default: none.
    #[cfg_attr(feature = "serde", serde(default))]
    pub balloon: Option<BalloonConfig>,
    /// A virtio-rng, `rng0`, fed from the host's `getrandom`. On by default for a PC.
    #[cfg_attr(feature = "serde", serde(default = "yes"))]
    pub rng: bool,
}

fn default_memory() -> Bytes {
    Bytes::mib(256)
}

#[cfg(feature = "serde")]
fn yes() -> bool {
    true
}

impl VmConfig {
    /// A PC that boots Linux: 1 vCPU, 256 MiB, a serial console, a random number generator.
    pub fn linux(boot: LinuxBoot) -> Self {
        Self::new(Boot::Linux(boot), Platform::Pc)
    }

    /// A bare guest: bytes in memory, vCPUs, and no device but those that you attach.
    pub fn bare(boot: BareBoot) -> Self {
        Self { memory: Bytes::mib(2), rng: false, ..Self::new(Boot::Bare(boot), Platform::Bare) }
    }

    fn new(boot: Boot, platform: Platform) -> Self {
        Self {
            name: String::new(),
            uuid: None,
            cpus: CpuConfig::default(),
            memory: default_memory(),
            backing: BackingConfig::default(),
            cgroup: None,
            sandbox: None,
            promise: PromiseConfig::default(),
            boot,
            platform,
            console: ConsoleKind::default(),
            disks: Vec::new(),
            nets: Vec::new(),
            balloon: None,
            rng: true,
        }
    }

    /// Checks everything that can be checked without opening anything. Never blocks.
    ///
    /// # Errors
    /// `InvalidArgument` with every bad field, its problem and its remedy in [`Error::fields`].
    pub fn validate(&self) -> Result<()> {
        let problems = validate::problems(self);
        if problems.is_empty() { Ok(()) } else { Err(Error::invalid_fields(problems)) }
    }
}

/// What the host's ledger promises a VM. `docs/overcommit.md` explains both.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct PromiseConfig {
    /// How much of its memory the VM will always have, at most all of it. Guarantees are never overcommitted.
    /// Default 0.
    #[cfg_attr(feature = "serde", serde(default))]
    pub guarantee: Bytes,
    /// The VM may be stopped when the host runs out of memory, the lowest class first; so it is admitted where
    /// the host's memory and swap could not hold all that its guests may touch. Default `None`: it may not.
    #[cfg_attr(feature = "serde", serde(default))]
    pub victim: Option<u8>,
}

/// A virtio-balloon: how a guest gives memory back. It has its own account of the guest's memory
/// ([`Vm::guest_memory`](crate::Vm::guest_memory)) in any case.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields, default)
)]
#[non_exhaustive]
pub struct BalloonConfig {
    /// The guest may take memory out of the balloon before it kills a process for want of memory. Default `true`.
    pub deflate_on_oom: bool,
    /// The guest gives large pieces of free memory back as it goes along, a few seconds after they became free, and
    /// has them again when it touches them. Default `true`. Not offered to a guest on the pool of huge pages
    /// ([`BackingKind::Huge2M`]), which might have none then.
    pub reporting: bool,
    /// [`Vm::discard_free_pages`](crate::Vm::discard_free_pages) works. Default `false`: a Linux guest that runs out of
    /// memory at that moment may use a page while it is being given back, and lose what it has written there. Refused on the pool of
    /// huge pages.
    pub hinting: bool,
    /// Where on the PCI bus; the first free place when absent.
    pub pci: Option<PciAddress>,
}

impl Default for BalloonConfig {
    fn default() -> Self {
        Self { deflate_on_oom: true, reporting: true, hinting: false, pci: None }
    }
}

/// What is soldered on the board.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum Platform {
    /// Local APICs, IOAPIC, PCI Express, hardware-reduced ACPI, serial port, clock, pvpanic.
    Pc,
    /// vCPUs and memory only. `HLT` ends a vCPU, since nothing could wake it.
    Bare,
}

/// What runs first.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum Boot {
    /// A Linux kernel.
    Linux(LinuxBoot),
    /// Your own bytes.
    Bare(BareBoot),
}

/// A Linux kernel and what it is given.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct LinuxBoot {
    /// A bzImage as distributions ship it, or an ELF image (`vmlinux`) with a PVH entry.
    pub kernel: PathBuf,
    /// An initial RAM disk.
    #[cfg_attr(feature = "serde", serde(default))]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line; at most 2047 bytes, no NUL. `console=ttyS0` (or `hvc0`) is yours to say.
    #[cfg_attr(feature = "serde", serde(default))]
    pub cmdline: String,
    /// Let the kernel's own decompressor run, which also randomizes the kernel's addresses.
    /// Off by default: vmbed unpacks LZ4 images itself, which boots faster but at fixed addresses.
    #[cfg_attr(feature = "serde", serde(default))]
    pub kaslr: bool,
}

impl LinuxBoot {
    /// `kernel` without an initrd, with an empty command line.
    pub fn new(kernel: impl Into<PathBuf>) -> Self {
        Self { kernel: kernel.into(), initrd: None, cmdline: String::new(), kaslr: false }
    }

    /// With an initial RAM disk.
    #[must_use]
    pub fn initrd(mut self, path: impl Into<PathBuf>) -> Self {
        self.initrd = Some(path.into());
        self
    }

    /// With this command line.
    #[must_use]
    pub fn cmdline(mut self, cmdline: impl Into<String>) -> Self {
        self.cmdline = cmdline.into();
        self
    }
}

/// The processor mode that a bare guest starts in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum CpuMode {
    /// 16-bit real mode, segment bases 0; the entry must be below 64 KiB.
    #[default]
    Real,
    /// 32-bit protected mode, flat segments, paging off; the entry must be below 4 GiB.
    Protected,
    /// 64-bit long mode, flat segments, the first 4 GiB identity-mapped with 2 MiB pages.
    /// The page tables occupy the last 24 KiB of memory below 3 GiB.
    Long,
}

/// Bytes at addresses and where to begin.
#[derive(Clone, Debug, Default, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct BareBoot {
    /// The processor mode at the entry.
    #[cfg_attr(feature = "serde", serde(default))]
    pub mode: CpuMode,
    /// What to put into memory: guest-physical address and bytes. They may not overlap.
    #[cfg_attr(feature = "serde", serde(default))]
    pub images: Vec<(u64, Vec<u8>)>,
    /// The address of the first instruction. Every vCPU starts here, with its index in `RDI`.
    #[cfg_attr(feature = "serde", serde(default))]
    pub entry: u64,
    /// The stack pointer at the entry; 0 for none. vCPU n starts `n * 4096` bytes below it.
    #[cfg_attr(feature = "serde", serde(default))]
    pub stack: u64,
}

impl BareBoot {
    /// `code` at `entry`, in `mode`.
    pub fn new(mode: CpuMode, entry: u64, code: impl Into<Vec<u8>>) -> Self {
        Self { mode, images: vec![(entry, code.into())], entry, stack: 0 }
    }
}

/// Virtual processors, and what the guest is told about them.
#[derive(Clone, Debug, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
#[non_exhaustive]
pub struct CpuConfig {
    /// How many, 1 to 254. Default 1.
    pub count: u16,
    /// Threads per core, 1 or 2; must divide the count. Default 1.
    #[cfg_attr(feature = "serde", serde(default = "one"))]
    pub threads_per_core: u16,
    /// Sockets; must divide the number of cores. Default 1.
    #[cfg_attr(feature = "serde", serde(default = "one"))]
    pub sockets: u16,
    /// Each vCPU has a core of the host's for itself, of those that
    /// [`HostConfig::dedicated_cpus`](crate::HostConfig::dedicated_cpus) sets aside, and runs nowhere else. Default
    /// `false`.
    #[cfg_attr(feature = "serde", serde(default))]
    pub dedicated: bool,
    /// The host's CPUs that each vCPU may run on, by their numbers: none, or a list for each vCPU. Default: wherever
    /// the process may, save for dedicated ones. For threads of the library only
    /// ([`VmBuilder::caller_vcpus`](crate::VmBuilder::caller_vcpus) refuses it).
    #[cfg_attr(feature = "serde", serde(default))]
    pub affinity: Vec<Vec<u32>>,
    /// CPUID bits to take away from or to force on the guest, over what KVM and vmbed offer.
    #[cfg_attr(feature = "serde", serde(default))]
    pub masks: Vec<CpuidMask>,
}

#[cfg(feature = "serde")]
fn one() -> u16 {
    1
}

impl Default for CpuConfig {
    fn default() -> Self {
        Self {
            count: 1,
            threads_per_core: 1,
            sockets: 1,
            dedicated: false,
            affinity: Vec::new(),
            masks: Vec::new(),
        }
    }
}

/// A register of the `CPUID` instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[allow(missing_docs)]
pub enum CpuidRegister {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// Bits of one CPUID register: `value = (value & !clear) | set`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize), serde(deny_unknown_fields))]
pub struct CpuidMask {
    /// The leaf (EAX).
    pub leaf: u32,
    /// The subleaf (ECX).
    pub subleaf: u32,
    /// The register.
    pub register: CpuidRegister,
    /// Bits taken away.
    pub clear: u32,
    /// Bits forced on; setting what the processor lacks is your risk.
    pub set: u32,
}

/// What the guest's console is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum ConsoleKind {
    /// A 16550 at 0x3f8: `console=ttyS0`. Works from the first instruction on.
    #[default]
    Serial,
    /// virtio-console, `console0`: `console=hvc0`. Cheaper per byte, but needs the guest's driver.
    Virtio,
}

/// A place on PCI bus 0: device 1 to 31, function 0 to 7. A function other than 0 needs one that is function 0 of the same device.
///
/// Written as `lspci` does: `00:03.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(try_from = "String", into = "String")
)]
pub struct PciAddress {
    /// The device number, 1 to 31.
    pub device: u8,
    /// The function of that device, 0 to 7.
    pub function: u8,
}

impl PciAddress {
    /// How many there are.
    pub(crate) const PLACES: usize = 31 * 8;

    /// Function 0 of that device.
    pub const fn new(device: u8) -> Self {
        Self { device, function: 0 }
    }

    /// All of them, function 0 of every device first.
    pub(crate) fn all() -> impl Iterator<Item = Self> {
        (0..8).flat_map(|function| (1..32).map(move |device| Self { device, function }))
    }

    /// As bus 0 counts: the lower byte of a routing ID (PCI Express Base, 2.2.4.2).
    pub(crate) fn index(self) -> usize {
        usize::from(self.device) << 3 | usize::from(self.function & 7)
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00:{:02x}.{:x}", self.device, self.function)
    }
}

impl FromStr for PciAddress {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let place = text.strip_prefix("0000:").unwrap_or(text).strip_prefix("00:");
        // Digits alone: a number may have a sign.
        let number =
            |t: &str| t.bytes().all(|b| b.is_ascii_hexdigit()).then(|| u8::from_str_radix(t, 16).ok());
        let address = place.and_then(|t| t.split_once('.')).and_then(|(device, function)| {
            Some(Self { device: number(device)??, function: number(function)?? })
        });
        address.filter(|a| (1..32).contains(&a.device) && a.function < 8).ok_or_else(|| {
            let what = format!(
                "'{text}' is not a PCI address: write 00:DD.F with DD from 01 to 1f and F from 0 to 7"
            );
            Error::new(ErrorKind::InvalidArgument, what)
        })
    }
}

impl TryFrom<String> for PciAddress {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<PciAddress> for String {
    fn from(address: PciAddress) -> Self {
        address.to_string()
    }
}

/// A 128-bit identity in the order in which it is written (RFC 9562).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(try_from = "String", into = "String")
)]
pub struct Uuid(pub [u8; 16]);

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            let dash = if matches!(i, 4 | 6 | 8 | 10) { "-" } else { "" };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

impl FromStr for Uuid {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parse = || -> Option<[u8; 16]> {
            let dashes: Vec<_> = text.match_indices('-').map(|(i, _)| i).collect();
            let hex: String = text.chars().filter(|c| *c != '-').collect();
            if dashes != [8, 13, 18, 23] || hex.len() != 32 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
                return None;
            }
            u128::from_str_radix(&hex, 16).ok().map(u128::to_be_bytes)
        };
        parse().map(Self).ok_or_else(|| {
            let what = format!("'{text}' is not a UUID: write 8-4-4-4-12 hexadecimal digits");
            Error::new(ErrorKind::InvalidArgument, what)
        })
    }
}

impl TryFrom<String> for Uuid {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Uuid> for String {
    fn from(uuid: Uuid) -> Self {
        uuid.to_string()
    }
}
