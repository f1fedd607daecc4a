#![forbid(unsafe_code)]
//! Doorbells in the kernel: a guest's write to an address rings an eventfd without leaving the kernel.

use std::sync::Arc;

use kvm_bindings::KVM_CAP_IOEVENTFD_ANY_LENGTH;
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use crate::error::{Error, Result};
use crate::sys::log;

/// Where doorbells are armed. Clones share everything.
///
/// An armed address is only a short cut: a write that takes the long way, as an ordinary access, must
/// ring the same eventfd.
#[derive(Clone)]
pub(crate) enum Doorbells {
    /// KVM's ioeventfds.
    Kvm { vm: Arc<VmFd>, any_length: bool },
    /// A list, for drivers without a KVM.
    Memory(Arc<memory::Bells>),
}

impl Doorbells {
    /// Those of `vm`, or a list in memory.
    pub fn new(vm: Option<Arc<VmFd>>) -> Self {
        match vm {
            Some(vm) => {
                let any_length = vm.check_extension_raw(KVM_CAP_IOEVENTFD_ANY_LENGTH.into()) > 0;
                Self::Kvm { vm, any_length }
            }
            None => Self::Memory(Arc::default()),
        }
    }

    /// Rings `bell` whenever the guest writes to `address`, the doorbell of queue `queue`.
    ///
    /// # Errors
    /// The guest has put another device's doorbell at the same place, or the host is out of something.
    pub fn arm(&self, bell: &EventFd, address: u64, queue: u16) -> Result<()> {
        let failed = |e| Error::os(format!("arming a doorbell at {address:#x} (KVM_IOEVENTFD)"), e);
        match self {
            Self::Kvm { vm, any_length } => {
                let at = IoEventAddress::Mmio(address);
                let armed = match any_length {
                    // Without a length to compare, Intel's processors take the short way through KVM.
                    true => vm.register_ioevent(bell, &at, NoDatamatch),
                    false => vm.register_ioevent(bell, &at, queue),
                };
                armed.map_err(|e| failed(e.into()))
            }
            Self::Memory(bells) => bells.arm(bell, address).map_err(failed),
        }
    }

    /// Undoes [`Doorbells::arm`]; of what was not armed: nothing.
    pub fn disarm(&self, bell: &EventFd, address: u64, queue: u16) {
        match self {
            Self::Kvm { vm, any_length } => {
                let at = IoEventAddress::Mmio(address);
                let disarmed = match any_length {
                    true => vm.unregister_ioevent(bell, &at, NoDatamatch),
                    false => vm.unregister_ioevent(bell, &at, queue),
                };
                if let Err(error) = disarmed {
                    log::debug!("disarming a doorbell at {address:#x}: {error}");
                }
            }
            Self::Memory(bells) => bells.disarm(bell, address),
        }
    }
}

/// The form without a KVM.
pub(crate) mod memory {
    use std::collections::BTreeMap;
    use std::io;
    use std::os::fd::{AsRawFd, RawFd};
    use std::sync::Mutex;

    use vmm_sys_util::eventfd::EventFd;

    use crate::sys::lock;

    /// Eventfds by address, each with the number by which its owner names it.
    #[derive(Default)]
    pub(crate) struct Bells(Mutex<BTreeMap<u64, (RawFd, EventFd)>>);

    impl Bells {
        pub(super) fn arm(&self, bell: &EventFd, address: u64) -> io::Result<()> {
            let copy = bell.try_clone()?;
            let mut bells = lock(&self.0);
            if bells.contains_key(&address) {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            bells.insert(address, (bell.as_raw_fd(), copy));
            Ok(())
        }

        pub(super) fn disarm(&self, bell: &EventFd, address: u64) {
            let mut bells = lock(&self.0);
            if bells.get(&address).is_some_and(|(owner, _)| *owner == bell.as_raw_fd()) {
                bells.remove(&address);
            }
        }

        /// What KVM does when the guest writes to `address`: whether that was all.
        #[cfg(any(test, feature = "internals"))]
        pub fn ring(&self, address: u64) -> bool {
            lock(&self.0).get(&address).is_some_and(|(_, bell)| bell.write(1).is_ok())
        }

        /// Every armed address.
        #[cfg(any(test, feature = "internals"))]
        pub fn armed(&self) -> Vec<u64> {
            lock(&self.0).keys().copied().collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use kvm_ioctls::Kvm;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    #[test]
    fn both_forms_keep_an_address_for_the_first_until_it_leaves() {
        let vm = Kvm::new().and_then(|kvm| kvm.create_vm()).expect("tests need /dev/kvm");
        let kvm = Doorbells::new(Some(Arc::new(vm)));
        // Any length or not: the same rules, as long as the queue is the same.
        let Doorbells::Kvm { vm, .. } = &kvm else { panic!("a VM was given") };
        let with_length = Doorbells::Kvm { vm: vm.clone(), any_length: false };
        for (doorbells, at) in [(kvm, 0xc000_3000), (with_length, 0xd000_3000), (Doorbells::new(None), 0)] {
            let bells = [(); 2].map(|()| EventFd::new(EFD_NONBLOCK).unwrap());
            for _ in 0..3 {
                doorbells.arm(&bells[0], at, 0).unwrap();
                doorbells.arm(&bells[1], at + 4, 1).unwrap();
                assert!(doorbells.arm(&bells[1], at, 0).is_err());
                // Not its own: nothing happens.
                doorbells.disarm(&bells[1], at, 0);
                assert!(doorbells.arm(&bells[1], at, 0).is_err());
                doorbells.disarm(&bells[0], at, 0);
                doorbells.disarm(&bells[1], at + 4, 1);
            }
        }
    }
}
