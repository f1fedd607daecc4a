#![forbid(unsafe_code)]
//! Doorbells in the kernel: a guest's write to an address rings an eventfd without leaving the kernel.

use std::sync::Arc;

use kvm_bindings::KVM_CAP_IOEVENTFD_ANY_LENGTH;
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::error::{Error, Result};

/// Where doorbells are registered: a VM, or nowhere (then the write comes as an ordinary access, and
/// whoever handles it rings the same eventfd).
#[derive(Clone)]
pub(crate) struct Doorbells {
    vm: Option<Arc<VmFd>>,
    any_length: bool,
}

impl Doorbells {
    pub fn new(vm: Option<Arc<VmFd>>) -> Self {
        let check = |vm: &Arc<VmFd>| vm.check_extension_raw(KVM_CAP_IOEVENTFD_ANY_LENGTH.into()) > 0;
        let any_length = vm.as_ref().is_some_and(check);
        Self { vm, any_length }
    }

    /// Rings `bell` whenever the guest writes to `address`.
    pub fn arm(&self, bell: &EventFd, address: u64) -> Result<()> {
        let Some(vm) = &self.vm else { return Ok(()) };
        let at = IoEventAddress::Mmio(address);
        // Without a length to compare, Intel's processors take the short way through the kernel.
        let armed = match self.any_length {
            true => vm.register_ioevent(bell, &at, NoDatamatch),
            false => vm.register_ioevent(bell, &at, 0u16),
        };
        armed.map_err(|e| Error::errno_of(format!("arming a doorbell at {address:#x} (KVM_IOEVENTFD)"), e))
    }

    /// Undoes [`Doorbells::arm`].
    pub fn disarm(&self, bell: &EventFd, address: u64) {
        let Some(vm) = &self.vm else { return };
        let at = IoEventAddress::Mmio(address);
        let disarmed = match self.any_length {
            true => vm.unregister_ioevent(bell, &at, NoDatamatch),
            false => vm.unregister_ioevent(bell, &at, 0u16),
        };
        if let Err(error) = disarmed {
            log::debug!("disarming a doorbell at {address:#x}: {error}");
        }
    }
}
