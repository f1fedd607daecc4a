#![forbid(unsafe_code)]
//! KVM's memory slots: which part of guest memory the guest sees where.

use kvm_ioctls::VmFd;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::Memory;
use crate::error::{Error, Result};
use crate::sys::kvm;

/// Makes all of `memory` visible to the guest of `vm`.
///
/// To be called before the VM has an interrupt controller or an ioeventfd: afterwards every change of a
/// slot waits for a grace period of the kernel's (7.5 ms on Linux 6.18, against 0.02 ms).
pub(crate) fn plug(vm: &VmFd, memory: &Memory) -> Result<()> {
    for (slot, region) in memory.iter().enumerate() {
        let address = region.start_addr().raw_value();
        kvm::set_memory_slot(vm, slot as u32, address, region).map_err(|e| {
            let what = format!("showing {} bytes of memory at {address:#x} to the guest", region.len());
            Error::os(format!("{what} (KVM_SET_USER_MEMORY_REGION)"), e)
        })?;
    }
    Ok(())
}
