//! Disks: what they are to be, what may be changed while they are served, and what they have done.

use std::ffi::{c_char, c_void};
use std::mem::offset_of;
use std::path::Path;

use super::arguments::{Sized_, array, fill, invalid, optional, path, structure, text};
use super::call;
use super::config::{change, reserved, vmbed_config};
use super::error::vmbed_error;
use super::handle;
use super::vm::vmbed_vm;
use crate::block::create_disk;
use crate::config::{CacheMode, DiskBacking, DiskConfig, DiskEngine, DiskFormat, RateLimit};
use crate::error::Result;
use crate::units::Bytes;

/// How much may pass. Over any time t, at most the burst, the rate times t, and one more.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct vmbed_rate {
    /// Bytes a second; 0 for any number.
    pub bytes_per_second: u64,
    /// Bytes at once after a rest. 0: a tenth of a second's.
    pub bytes_burst: u64,
    /// Operations a second, which are requests of a disk, frames of a network; 0 for any number.
    pub ops_per_second: u64,
    /// Operations at once after a rest. 0: a tenth of a second's.
    pub ops_burst: u64,
}

impl vmbed_rate {
    pub(super) fn limit(&self) -> RateLimit {
        let limit = RateLimit::NONE.bytes(self.bytes_per_second, self.bytes_burst);
        limit.ops(self.ops_per_second, self.ops_burst)
    }

    /// What is there, or no limit.
    pub(super) fn or_none(rate: *const Self) -> RateLimit {
        // SAFETY: not NULL, so its bytes are there: the header says so.
        if rate.is_null() { RateLimit::NONE } else { unsafe { rate.read_unaligned() }.limit() }
    }
}

/// The bytes of the disk, one to one.
pub const VMBED_DISK_RAW: i32 = 0;
/// QEMU's format, version 2 or 3. Only where vmbed_has_feature("qcow2").
pub const VMBED_DISK_QCOW2: i32 = 1;

/// Through the host's page cache; on stable storage when the guest flushes.
pub const VMBED_CACHE_WRITEBACK: i32 = 0;
/// Through the host's page cache; each write is on stable storage before it is answered, unless the guest chooses otherwise.
pub const VMBED_CACHE_WRITETHROUGH: i32 = 1;
/// Past the host's page cache (O_DIRECT); on stable storage when the guest flushes. What is not aligned as the storage wants
/// it goes through the page cache all the same.
pub const VMBED_CACHE_DIRECT: i32 = 2;
/// Flushes are answered and not done: for data that nobody misses after a power cut.
pub const VMBED_CACHE_UNSAFE: i32 = 3;

/// io_uring where the host has it and allows it, else synchronous.
pub const VMBED_ENGINE_AUTO: i32 = 0;
/// One system call for each request, on the disk's thread, which waits for it.
pub const VMBED_ENGINE_SYNC: i32 = 1;
/// Many requests on their way at a time. VMBED_ERR_UNSUPPORTED by vmbed_builder_build() where the host does not allow it.
pub const VMBED_ENGINE_IO_URING: i32 = 2;

/// A file that a qcow2 image is based on.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct vmbed_backing_file {
    /// Where it is.
    pub path: *const c_char,
    /// What it holds, VMBED_DISK_*.
    pub format: i32,
    /// Zero.
    pub reserved: u32,
}

/// A virtio-blk disk.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct vmbed_disk {
    /// sizeof(struct vmbed_disk)
    pub size: usize,
    /// A regular file or a block device, a multiple of 512 bytes long. NULL where something is attached with
    /// vmbed_builder_disk_fd() or vmbed_builder_disk_backend().
    pub path: *const c_char,
    /// At most 20 bytes of ASCII, the guest's /sys/block/vda/serial. NULL for none.
    pub serial: *const c_char,
    /// Where on the PCI bus, `00:03.0`. NULL: the first free place.
    pub pci: *const c_char,
    /// Other than 0: the guest may not write.
    pub readonly: u32,
    /// Zero.
    pub reserved: u32,
    /// What the file holds, VMBED_DISK_*: said by you, never guessed.
    pub format: i32,
    /// When a write is on stable storage, VMBED_CACHE_*. Not for a disk of code of yours.
    pub cache: i32,
    /// How data is moved, VMBED_ENGINE_*. Not for a disk of code of yours.
    pub engine: i32,
    /// Queues that the guest may use at a time, each with a thread of its own: 1 to 16. 0 stands for 1, which is what code of
    /// yours has.
    pub queues: u32,
    /// Other than 0: the guest is told that the disk knows no discard. By default what it discards becomes free on the host.
    pub no_discard: u32,
    /// Other than 0: a file named by path is not locked. By default it is, as QEMU does it: a writer has it alone, readers
    /// share it.
    pub no_lock: u32,
    /// How much may be transferred, reads and writes together, over all queues.
    pub rate: vmbed_rate,
    /// What a qcow2 image is based on, the nearest first. Only these are opened, whatever the image itself says, and one that says
    /// that it is based on another is refused where that one does not stand here. NULL for none.
    pub backing: *const vmbed_backing_file,
    /// How many they are.
    pub backing_count: usize,
    /// Where the qcow2 image at path keeps its data, if not in itself. Only this file is opened, whatever the image says; an image
    /// that keeps its data elsewhere is refused where this is NULL.
    pub data_file: *const c_char,
    /// UTF-8 that opens the encrypted images among path and backing: each is tried with each, which takes the seconds that the image
    /// wants it to take. Such images can only be read, also by a writable one on top, which is not encrypted itself. NULL for none.
    pub passphrases: *const *const c_char,
    /// How many they are.
    pub passphrase_count: usize,
}

// SAFETY: it is repr(C) with its size first, and all zeroes is a value.
unsafe impl Sized_ for vmbed_disk {
    const FIRST: usize = offset_of!(Self, format);
    const NAME: &'static str = "vmbed_disk";
}

/// Adds a disk; the guest's drivers see them in this order, events call them `disk0`, `disk1`, ... What it points to
/// is copied.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_config_add_disk(
    config: *mut vmbed_config,
    disk: *const vmbed_disk,
    error: *mut *mut vmbed_error,
) -> i32 {
    change(config, error, |c| {
        let given = structure(disk)?;
        let mut disk = DiskConfig::attached();
        disk.path = optional(given.path, "vmbed_disk.path", path)?.map(Path::to_owned);
        disk.serial = optional(given.serial, "vmbed_disk.serial", text)?.unwrap_or_default().to_owned();
        disk.pci = optional(given.pci, "vmbed_disk.pci", text)?.map(str::parse).transpose()?;
        disk.readonly = given.readonly != 0;
        reserved("vmbed_disk", given.reserved)?;
        disk.format = format_of("vmbed_disk.format", given.format)?;
        let modes = [CacheMode::Writeback, CacheMode::Writethrough, CacheMode::Direct, CacheMode::Unsafe];
        disk.cache = one_of("vmbed_disk.cache", given.cache, modes)?;
        disk.engine = one_of(
            "vmbed_disk.engine",
            given.engine,
            [DiskEngine::Auto, DiskEngine::Sync, DiskEngine::IoUring],
        )?;
        disk.queues = u16::try_from(given.queues.max(1)).unwrap_or(u16::MAX);
        disk.discard = given.no_discard == 0;
        disk.lock = given.no_lock == 0;
        disk.rate = given.rate.limit();
        for below in array(given.backing, given.backing_count, "vmbed_disk.backing")? {
            reserved("vmbed_backing_file", below.reserved)?;
            let format = format_of("vmbed_backing_file.format", below.format)?;
            disk = disk.based_on(path(below.path, "vmbed_backing_file.path")?, format);
        }
        disk.data_file = optional(given.data_file, "vmbed_disk.data_file", path)?.map(Path::to_owned);
        let passphrases = array(given.passphrases, given.passphrase_count, "vmbed_disk.passphrases")?;
        for passphrase in passphrases {
            disk = disk.unlocked_by(text(*passphrase, "vmbed_disk.passphrases[]")?);
        }
        c.disks.push(disk);
        Ok(())
    })
}

/// The value that a number stands for: all are consecutive, from 0 on.
fn one_of<T: Copy, const N: usize>(field: &str, number: i32, values: [T; N]) -> Result<T> {
    let value = usize::try_from(number).ok().and_then(|i| values.get(i)).copied();
    value.ok_or_else(|| invalid(format!("{field} is {number}; there are 0 to {}", N - 1)))
}

fn format_of(field: &str, number: i32) -> Result<DiskFormat> {
    one_of(field, number, [DiskFormat::Raw, DiskFormat::Qcow2])
}

/// Makes an image for a disk of `bytes` bytes, a multiple of 512: sparse, all zeroes, or, in qcow2, a layer on `backing`, of which it
/// keeps the path as it stands here (QEMU takes it as relative to the image). With a backing file, 0 bytes stand for that one's.
/// NULL for no backing file. The image must not be there yet. Blocks for as long as the file system does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_disk_create(
    path: *const c_char,
    format: i32,
    bytes: u64,
    backing: *const vmbed_backing_file,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let path = self::path(path, "path")?;
        let format = format_of("format", format)?;
        let below = match array(backing, usize::from(!backing.is_null()), "backing")? {
            [below] => Some(DiskBacking {
                path: self::path(below.path, "vmbed_backing_file.path")?.to_owned(),
                format: format_of("vmbed_backing_file.format", below.format)?,
            }),
            _ => None,
        };
        create_disk(path, format, Bytes(bytes), below.as_ref())
    })
}

/// Gives disk `index` another size, in bytes, a multiple of 512; its guest is told at once, also while requests are under way.
/// A file grows with it; one that is larger keeps its length, and what lies beyond. A block device must have grown before. A
/// disk of code of yours must have that size from now on. In every state; never blocks for long.
/// VMBED_ERR_INVALID_ARGUMENT where there is no such disk, or the size is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_resize_disk(
    vm: *const vmbed_vm,
    index: u32,
    bytes: u64,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || handle::object(vm)?.vm().resize_disk(index as usize, Bytes(bytes)))
}

/// Limits disk `index` from now on; NULL for no limit. In every state; never blocks.
/// VMBED_ERR_INVALID_ARGUMENT where there is no such disk.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_set_disk_rate(
    vm: *const vmbed_vm,
    index: u32,
    rate: *const vmbed_rate,
    error: *mut *mut vmbed_error,
) -> i32 {
    let limit = vmbed_rate::or_none(rate);
    call(error, || handle::object(vm)?.vm().set_disk_rate(index as usize, limit))
}

/// Hears how many bytes are behind, and how many there are in all; false ends it.
pub type vmbed_progress_fn = Option<unsafe extern "C" fn(user: *mut c_void, behind: u64, all: u64) -> bool>;

/// Saves disk `index`, as it is at one instant, to a new image at `path`: standalone and sparse. A guest that runs is paused for that
/// instant, with no request on its way, as if its power were cut; from then on it runs while the image is made.
/// `progress`, which may be NULL, is called on this thread with `user`. `complete`, which may be NULL, is false where it was
/// ended; then, and where this fails, the image is gone. Blocks for as long as the disk's size takes.
///
/// VMBED_ERR_UNSUPPORTED of a disk of code of yours, VMBED_ERR_BUSY while it is being saved already, VMBED_ERR_INVALID_STATE
/// where the VM is freed meanwhile. Where the VM cannot be resumed, it stays paused, and the error's text says so.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_save_disk(
    vm: *const vmbed_vm,
    index: u32,
    path: *const c_char,
    format: i32,
    progress: vmbed_progress_fn,
    user: *mut c_void,
    complete: *mut bool,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let vm = handle::object(vm)?;
        let path = self::path(path, "path")?;
        let format = format_of("format", format)?;
        let hear = |behind: Bytes, all: Bytes| {
            // SAFETY: the embedder's function with its own data, on its own thread, during its call.
            progress.is_none_or(|progress| unsafe { progress(user, behind.get(), all.get()) })
        };
        let done = vm.vm().save_disk(index as usize, path, format, hear)?;
        if !complete.is_null() {
            // SAFETY: not NULL, so it is valid for a write: the header says so.
            unsafe { complete.write(done) };
        }
        Ok(())
    })
}

/// Elements of a histogram of latencies.
pub const VMBED_DISK_LATENCIES: usize = 24;

/// What a disk has done since the VM was built. A request counts when it is answered.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct vmbed_disk_statistics {
    /// sizeof(struct vmbed_disk_statistics)
    pub size: usize,
    /// Reads that succeeded.
    pub reads: u64,
    /// Their bytes.
    pub read_bytes: u64,
    /// Writes that succeeded.
    pub writes: u64,
    /// Their bytes.
    pub written_bytes: u64,
    /// Flushes that succeeded.
    pub flushes: u64,
    /// Requests that were answered with an error: the host failed, or what the driver asked for was nonsense.
    pub errors: u64,
    /// Discards and zeroings that succeeded.
    pub discards: u64,
    /// Their bytes.
    pub discarded_bytes: u64,
    /// How long requests took, from their parsing to their answer: element 0 counts those below 1 us, element i those of
    /// 2^(i-1) to below 2^i us, the last one also all that took longer.
    pub latency: [u64; VMBED_DISK_LATENCIES],
}

// SAFETY: it is repr(C) with its size first, and all zeroes is a value.
unsafe impl Sized_ for vmbed_disk_statistics {
    const FIRST: usize = offset_of!(Self, discards);
    const NAME: &'static str = "vmbed_disk_statistics";
}

/// Fills `statistics`, whose size is set, with what disk `index` has done. In every state; reads counters only.
/// VMBED_ERR_INVALID_ARGUMENT where there is no such disk.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_get_disk_statistics(
    vm: *const vmbed_vm,
    index: u32,
    statistics: *mut vmbed_disk_statistics,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let now = handle::object(vm)?.vm().disk_statistics(index as usize)?;
        let value = vmbed_disk_statistics {
            size: 0,
            reads: now.reads,
            read_bytes: now.read_bytes,
            writes: now.writes,
            written_bytes: now.written_bytes,
            flushes: now.flushes,
            errors: now.errors,
            discards: now.discards,
            discarded_bytes: now.discarded_bytes,
            latency: now.latency,
        };
        fill(statistics, &value)
    })
}
