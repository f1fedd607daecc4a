//! How guests give memory back.

use std::ffi::c_char;
use std::time::{Duration, UNIX_EPOCH};

use super::arguments::{Out, Sized_, check_size, fill, optional, structure, text, timeout};
use super::call;
use super::config::{change, vmbed_config};
use super::error::vmbed_error;
use super::handle;
use super::vm::vmbed_vm;
use crate::config::BalloonConfig;
use crate::units::Bytes;

/// A virtio-balloon. All zeroes but the size are the defaults.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct vmbed_balloon {
    /// sizeof(struct vmbed_balloon)
    pub size: usize,
    /// Where on the PCI bus, `00:05.0`. NULL: the first free place.
    pub pci: *const c_char,
    /// Other than 0: the guest may not take memory out of the balloon before it kills a process for want of memory.
    pub keep_on_oom: u32,
    /// Other than 0: the guest does not give large pieces of free memory back as it goes along. One on the pool of huge pages
    /// never does: the pool might have none when the guest uses them again.
    pub no_reporting: u32,
    /// Other than 0: vmbed_vm_discard_free_pages() works. A Linux guest that runs out of memory at that moment may use a
    /// page while it is being given back, and lose what it has written there. 0 on the pool of huge pages.
    pub hinting: u32,
    /// Zero.
    pub reserved: u32,
}

// SAFETY: it is repr(C) with its size first, and all zeroes is a value.
unsafe impl Sized_ for vmbed_balloon {
    const FIRST: usize = size_of::<Self>();
    const NAME: &'static str = "vmbed_balloon";
}

/// Gives the VM a balloon, `balloon0`, through which its guest gives memory back. What `balloon` points to is copied. There
/// is none by default; the last call counts.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_config_set_balloon(
    config: *mut vmbed_config,
    balloon: *const vmbed_balloon,
    error: *mut *mut vmbed_error,
) -> i32 {
    change(config, error, |c| {
        let given = structure(balloon)?;
        super::config::reserved("vmbed_balloon", given.reserved)?;
        c.balloon = Some(BalloonConfig {
            deflate_on_oom: given.keep_on_oom == 0,
            reporting: given.no_reporting == 0,
            hinting: given.hinting != 0,
            pci: optional(given.pci, "vmbed_balloon.pci", text)?.map(str::parse).transpose()?,
        });
        Ok(())
    })
}

/// Asks the guest to give up `target` bytes of its memory in all, in whole pages of 4 KiB; less than before gives it some
/// back. Returns at once: the guest does it in its own time, as far as it can, and VMBED_EVENT_BALLOON tells when it has. A
/// guest without a driver does nothing. Neither entitlement nor guarantee changes.
///
/// VMBED_ERR_INVALID_ARGUMENT for more than the VM's memory; VMBED_ERR_UNSUPPORTED where the VM has no balloon.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_set_balloon(
    vm: *mut vmbed_vm,
    target: u64,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || handle::object(vm)?.vm().set_balloon(Bytes(target)))
}

/// What a balloon has moved since the VM was built, in bytes. "Claimed" is what the guest named, "measured" by how much
/// what backs its memory has shrunk for it, as the host counts it: less where the guest had never touched it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct vmbed_balloon_statistics {
    /// sizeof(struct vmbed_balloon_statistics)
    pub size: usize,
    /// How much memory the guest was asked to give up.
    pub target: u64,
    /// How much it says that it has given up. It may lie, and may touch that memory again.
    pub actual: u64,
    /// What it put into the balloon, in all.
    pub inflated_claimed: u64,
    /// The same, measured.
    pub inflated_measured: u64,
    /// What it took out again, in all, by its own account.
    pub deflated: u64,
    /// What its free page reporting gave back, in all.
    pub reported_claimed: u64,
    /// The same, measured.
    pub reported_measured: u64,
    /// What vmbed_vm_discard_free_pages() gave back, in all.
    pub hinted_claimed: u64,
    /// The same, measured.
    pub hinted_measured: u64,
    /// Pages and ranges that it named and that are not its memory, or not in whole pages. They were ignored.
    pub ignored: u64,
}

// SAFETY: it is repr(C) with its size first, and all zeroes is a value.
unsafe impl Sized_ for vmbed_balloon_statistics {
    const FIRST: usize = size_of::<Self>();
    const NAME: &'static str = "vmbed_balloon_statistics";
}

/// Fills `statistics`, whose size is set. In every state; reads counters only. VMBED_ERR_UNSUPPORTED where the VM has no
/// balloon.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_get_balloon_statistics(
    vm: *const vmbed_vm,
    statistics: *mut vmbed_balloon_statistics,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let now = handle::object(vm)?.vm().balloon_statistics()?;
        let value = vmbed_balloon_statistics {
            size: 0,
            target: now.target.get(),
            actual: now.actual.get(),
            inflated_claimed: now.inflated.claimed.get(),
            inflated_measured: now.inflated.measured.get(),
            deflated: now.deflated.get(),
            reported_claimed: now.reported.claimed.get(),
            reported_measured: now.reported.measured.get(),
            hinted_claimed: now.hinted.claimed.get(),
            hinted_measured: now.hinted.measured.get(),
            ignored: now.ignored,
        };
        fill(statistics, &value)
    })
}

/// A guest's own account of its memory (virtio 1.2, section 5.5.6.3), in bytes or in how often something happened.
/// UINT64_MAX where its driver does not say.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct vmbed_guest_memory {
    /// sizeof(struct vmbed_guest_memory)
    pub size: usize,
    /// When it came, in nanoseconds since 1970-01-01 UTC.
    pub time: u64,
    /// What is swapped in, in all.
    pub swapped_in: u64,
    /// What is swapped out, in all.
    pub swapped_out: u64,
    /// Page faults that had to read a disk, in all.
    pub major_faults: u64,
    /// Other page faults, in all.
    pub minor_faults: u64,
    /// What is of no use for anything now.
    pub free: u64,
    /// What it has altogether; Linux leaves out what its balloon holds, unless it may deflate it.
    pub total: u64,
    /// What new programs could have without swapping.
    pub available: u64,
    /// What can be had back quickly: file caches.
    pub caches: u64,
    /// Huge pages that were allocated, in all.
    pub huge_allocations: u64,
    /// Huge pages that could not be, in all.
    pub huge_failures: u64,
    /// Processes that were killed for want of memory, in all.
    pub oom_kills: u64,
    /// How often somebody had to wait for memory, in all.
    pub stalls: u64,
}

// SAFETY: it is repr(C) with its size first, and all zeroes is a value.
unsafe impl Sized_ for vmbed_guest_memory {
    const FIRST: usize = size_of::<Self>();
    const NAME: &'static str = "vmbed_guest_memory";
}

/// Asks the guest for an account of its memory, waits at most `timeout` milliseconds for it (negative: for ever), and fills
/// `memory`, whose size is set. With a timeout of 0 it does not wait, and answers the last one that came; the next one is
/// on its way then.
///
/// VMBED_ERR_TIMED_OUT where the guest has not answered by then, or never yet. VMBED_ERR_UNSUPPORTED where the VM has no
/// balloon or the guest no driver for it. VMBED_ERR_INVALID_STATE when called from the VM's own callback, and where the VM has
/// ended, also while this waits.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_get_guest_memory(
    vm: *const vmbed_vm,
    timeout: i64,
    memory: *mut vmbed_guest_memory,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        // What cannot be filled need not be waited for.
        check_size(memory)?;
        let now = handle::object(vm)?.vm().guest_memory(patience(timeout))?;
        let bytes = |n: Option<Bytes>| n.map_or(u64::MAX, Bytes::get);
        let count = |n: Option<u64>| n.unwrap_or(u64::MAX);
        let since = now.time.duration_since(UNIX_EPOCH).unwrap_or_default();
        let value = vmbed_guest_memory {
            size: 0,
            time: u64::try_from(since.as_nanos()).unwrap_or(u64::MAX),
            swapped_in: bytes(now.swapped_in),
            swapped_out: bytes(now.swapped_out),
            major_faults: count(now.major_faults),
            minor_faults: count(now.minor_faults),
            free: bytes(now.free),
            total: bytes(now.total),
            available: bytes(now.available),
            caches: bytes(now.caches),
            huge_allocations: count(now.huge_allocations),
            huge_failures: count(now.huge_failures),
            oom_kills: count(now.oom_kills),
            stalls: count(now.stalls),
        };
        fill(memory, &value)
    })
}

/// Asks the guest for all pages that are free now and gives them back to the host; the guest has them again when it touches
/// them. Waits until that is done, at most `timeout` milliseconds (negative: for ever), and sets `discarded` to how many
/// bytes the host has got. See `hinting` of vmbed_balloon for what it may cost.
///
/// VMBED_ERR_TIMED_OUT: what was given back by then stays so. VMBED_ERR_BUSY while another thread asks.
/// VMBED_ERR_UNSUPPORTED where the configuration does not allow it or the guest has no driver for it.
/// VMBED_ERR_INVALID_STATE when called from the VM's own callback.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_vm_discard_free_pages(
    vm: *mut vmbed_vm,
    timeout: i64,
    discarded: *mut u64,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let out = Out::new(discarded, "discarded")?;
        out.put(handle::object(vm)?.vm().discard_free_pages(patience(timeout))?.get());
        Ok(())
    })
}

fn patience(milliseconds: i64) -> Duration {
    timeout(milliseconds).unwrap_or(Duration::MAX)
}
