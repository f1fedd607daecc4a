//! The KVM calls that kvm-ioctls lacks, and `KVM_RUN` with nothing around it.

use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::{
    KVM_EXIT_HLT, KVM_EXIT_IO, KVM_EXIT_IO_OUT, KVM_EXIT_IOAPIC_EOI, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN,
    KVM_EXIT_SYSTEM_EVENT, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_device_attr, kvm_run,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vm_memory::mmap::MmapRegion;

use super::signal::SignalSet;

const KVM_RUN: libc::c_ulong = 0xae80;
/// `_IOW(KVMIO, 0x8b, struct kvm_signal_mask)`, whose fixed part is four bytes.
const KVM_SET_SIGNAL_MASK: libc::c_ulong = 0x4004_ae8b;

/// Why the guest stopped running, with the data that the kernel wants back at the next run.
pub(crate) enum Exit<'a> {
    /// Port I/O: `data` holds `data.len() / size` accesses of `size` bytes to one port.
    Pio { port: u16, size: u8, write: bool, data: &'a mut [u8] },
    /// A memory access outside of every slot.
    Mmio { address: u64, write: bool, data: &'a mut [u8] },
    /// End of interrupt for this vector of the userspace IOAPIC.
    IoapicEoi(u8),
    /// `HLT` without an interrupt controller in the kernel.
    Hlt,
    /// Triple fault, or a shutdown cycle.
    Shutdown,
    /// A signal, or `immediate_exit`.
    Interrupted,
    /// Anything else, by `KVM_EXIT_*` number.
    Other(u32),
}

/// Runs the guest until it needs us.
///
/// # Errors
/// What `KVM_RUN` failed with, save for EINTR and EAGAIN.
#[inline(always)]
pub(crate) fn run(vcpu: &mut VcpuFd) -> io::Result<Exit<'_>> {
    let result = enter_guest(vcpu);
    if result != 0 {
        return failed_run(result);
    }
    let run = vcpu.get_kvm_run();
    match run.exit_reason {
        KVM_EXIT_IO => Ok(pio(run)),
        KVM_EXIT_MMIO => Ok(mmio(run)),
        _ => Ok(rare_exit(run)),
    }
}

/// Out of line, so that the two frequent exits cost two comparisons.
#[cold]
#[inline(never)]
fn rare_exit(run: &mut kvm_run) -> Exit<'_> {
    match run.exit_reason {
        KVM_EXIT_HLT => Exit::Hlt,
        KVM_EXIT_SHUTDOWN => Exit::Shutdown,
        KVM_EXIT_IOAPIC_EOI => {
            // SAFETY: the kernel filled this member of the union for this exit reason.
            Exit::IoapicEoi(unsafe { run.__bindgen_anon_1.eoi.vector })
        }
        other => Exit::Other(other),
    }
}

/// `ioctl(vcpu, KVM_RUN, 0)`: 0, or a negative errno.
///
/// Not through libc, whose variadic `ioctl` and thread-local errno cost as much as all of our own work
/// between two exits.
#[inline(always)]
fn enter_guest(vcpu: &mut VcpuFd) -> i64 {
    let result: i64;
    // SAFETY: the ioctl takes no argument and touches no memory of ours but the kvm_run pages, which
    // `&mut` keeps everyone else from; the kernel clobbers RCX and R11 alone.
    unsafe {
        core::arch::asm!(
            "syscall",
            inlateout("rax") libc::SYS_ioctl => result,
            in("rdi") i64::from(vcpu.as_raw_fd()),
            in("rsi") KVM_RUN,
            in("rdx") 0u64,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    result
}

#[cold]
fn failed_run<'a>(result: i64) -> io::Result<Exit<'a>> {
    let errno = -result as i32;
    match errno {
        libc::EINTR | libc::EAGAIN => Ok(Exit::Interrupted),
        _ => Err(io::Error::from_raw_os_error(errno)),
    }
}

#[inline(always)]
fn pio(run: &mut kvm_run) -> Exit<'_> {
    // SAFETY: the kernel filled this member of the union for this exit reason.
    let io = unsafe { run.__bindgen_anon_1.io };
    let length = io.count as usize * usize::from(io.size);
    // SAFETY: the kernel keeps `data_offset + count * size` within the pages of kvm_run that are mapped
    // behind this structure; the guest cannot reach them, and the borrow of `run` keeps others away.
    let data = unsafe {
        std::slice::from_raw_parts_mut(
            std::ptr::from_mut(run).cast::<u8>().add(io.data_offset as usize),
            length,
        )
    };
    Exit::Pio { port: io.port, size: io.size, write: u32::from(io.direction) == KVM_EXIT_IO_OUT, data }
}

#[inline(always)]
fn mmio(run: &mut kvm_run) -> Exit<'_> {
    // SAFETY: the kernel filled this member of the union for this exit reason.
    let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
    let length = (mmio.len as usize).min(mmio.data.len());
    Exit::Mmio { address: mmio.phys_addr, write: mmio.is_write != 0, data: &mut mmio.data[..length] }
}

/// Where the last exit went: a port or a guest-physical address, and how many bytes.
pub(crate) enum LastAccess {
    Port(u16, u8),
    Mmio(u64, usize),
}

/// The access that the last exit was for, if it was for one.
pub(crate) fn last_access(vcpu: &mut VcpuFd) -> Option<LastAccess> {
    let run = vcpu.get_kvm_run();
    match run.exit_reason {
        KVM_EXIT_IO => {
            // SAFETY: the kernel filled this member of the union for this exit reason.
            let io = unsafe { run.__bindgen_anon_1.io };
            Some(LastAccess::Port(io.port, io.size))
        }
        KVM_EXIT_MMIO => {
            // SAFETY: the kernel filled this member of the union for this exit reason.
            let mmio = unsafe { run.__bindgen_anon_1.mmio };
            Some(LastAccess::Mmio(mmio.phys_addr, mmio.len as usize))
        }
        _ => None,
    }
}

/// What KVM says beyond the number of an exit that we cannot handle.
pub(crate) fn describe(vcpu: &mut VcpuFd, reason: u32) -> String {
    let run = vcpu.get_kvm_run();
    match reason {
        kvm_bindings::KVM_EXIT_FAIL_ENTRY => {
            // SAFETY: the kernel filled this member of the union for this exit reason.
            let entry = unsafe { run.__bindgen_anon_1.fail_entry };
            let code = entry.hardware_entry_failure_reason;
            format!("the processor refused to enter the guest (hardware reason {code:#x})")
        }
        kvm_bindings::KVM_EXIT_INTERNAL_ERROR => {
            // SAFETY: the kernel filled this member of the union for this exit reason.
            let internal = unsafe { run.__bindgen_anon_1.internal };
            let what = match internal.suberror {
                1 => "an instruction that KVM cannot emulate",
                2 => "two exceptions at once",
                3 => "an event that could not be delivered",
                4 => "an exit that KVM does not expect",
                _ => "an unknown cause",
            };
            format!("KVM internal error {}: {what}", internal.suberror)
        }
        KVM_EXIT_SYSTEM_EVENT => "a system event that no x86 guest makes".to_owned(),
        other => format!("an exit that vmbed does not know (KVM_EXIT number {other})"),
    }
}

/// The signals blocked while the guest runs, instead of the thread's own: a signal that is blocked on
/// the thread and open here ends `KVM_RUN` without being delivered, so that no handler is needed.
pub(crate) fn set_signal_mask(vcpu: &VcpuFd, blocked: &SignalSet) -> io::Result<()> {
    /// `struct kvm_signal_mask` with the kernel's 64 signals.
    #[repr(C, packed)]
    struct KvmSignalMask {
        len: u32,
        set: u64,
    }
    let mask = KvmSignalMask { len: 8, set: blocked.kernel_bits() };
    // SAFETY: the kernel reads `len` and then `len` bytes, all of which `mask` holds.
    let result = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_SIGNAL_MASK, &mask) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Moves a vCPU's time stamp counter back by `ticks` of the host's. A KVM without the attribute (before
/// Linux 5.16) keeps its guest's counter running through a pause.
pub(crate) fn move_tsc_back(vcpu: &VcpuFd, ticks: u64) -> io::Result<()> {
    /// `_IOW(KVMIO, nr, struct kvm_device_attr)` for set, get and has.
    const SET: libc::c_ulong = 0x4018_aee1;
    const GET: libc::c_ulong = 0x4018_aee2;
    const HAS: libc::c_ulong = 0x4018_aee3;
    let mut offset = 0u64;
    let attribute = kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: std::ptr::from_mut(&mut offset).expose_provenance() as u64,
        flags: 0,
    };
    let call = |request| {
        // SAFETY: the kernel reads the attribute structure, and reads or writes the u64 that it points to,
        // which outlives the call and is borrowed by nobody.
        let result = unsafe { libc::ioctl(vcpu.as_raw_fd(), request, &attribute) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    if call(HAS).is_err() {
        return Ok(());
    }
    call(GET)?;
    // SAFETY: the attribute's own u64, alive and aligned; read and written where the kernel does.
    unsafe {
        let offset = std::ptr::with_exposed_provenance_mut::<u64>(attribute.addr as usize);
        offset.write(offset.read().wrapping_sub(ticks));
    }
    call(SET)
}

/// Shows `region` to the guest at `address` as memory slot `slot`.
pub(crate) fn set_memory_slot(vm: &VmFd, slot: u32, address: u64, region: &MmapRegion) -> io::Result<()> {
    let region = kvm_userspace_memory_region {
        slot,
        guest_phys_addr: address,
        memory_size: region.size() as u64,
        userspace_addr: region.as_ptr() as u64,
        flags: 0,
    };
    // SAFETY: the mapping is live, and the VM that the guest runs in is dropped before the memory is:
    // the order of the fields of `vm::machine::Machine` says so.
    unsafe { vm.set_user_memory_region(region) }.map_err(|e| io::Error::from_raw_os_error(e.errno()))
}

/// Tells KVM which guest-physical pages it may use for itself: Intel processors without unrestricted
/// guests run real mode with them. Elsewhere nothing comes of it.
pub(crate) fn set_intel_pages(vm: &VmFd, tss: u64, identity_map: u64) -> io::Result<()> {
    let os = |e: vmm_sys_util::errno::Error| io::Error::from_raw_os_error(e.errno());
    vm.set_identity_map_address(identity_map).map_err(os)?;
    vm.set_tss_address(tss as usize).map_err(os)
}
