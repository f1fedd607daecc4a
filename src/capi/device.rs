//! Devices of the embedder's, and what all callbacks have in common.

use std::ffi::c_void;

use super::arguments::{Sized_, invalid, structure};
use super::error;
use crate::bus::{Access, Device};
use crate::error::{Error, Result};

/// Ends the life of a callback's data: called exactly once, when no callback with it runs or will ever run, also
/// where the call that it was given to fails.
pub type vmbed_destroy_fn = Option<unsafe extern "C" fn(user: *mut c_void)>;

/// An embedder's data, and how it ends.
pub(super) struct UserData {
    pointer: *mut c_void,
    destroy: vmbed_destroy_fn,
}

// SAFETY: a pointer that we only hand back. The header says that callbacks are called on any thread.
unsafe impl Send for UserData {}
// SAFETY: as above.
unsafe impl Sync for UserData {}

impl UserData {
    pub fn new(pointer: *mut c_void, destroy: vmbed_destroy_fn) -> Self {
        Self { pointer, destroy }
    }

    pub fn pointer(&self) -> *mut c_void {
        self.pointer
    }
}

impl Drop for UserData {
    fn drop(&mut self) {
        if let Some(destroy) = self.destroy {
            // SAFETY: the embedder's function with its own data, once: this is the only owner.
            unsafe { destroy(self.pointer) }
        }
    }
}

/// A port-I/O or MMIO device of your own. The VM calls it on the thread of the vCPU whose instruction touched the
/// device's range; that vCPU waits for the answer, the others go on and may call at the same time. `offset` counts bytes
/// from the start of the range. `length` is 1, 2 or 4 for ports and 1 to 8 for MMIO; the bytes are the guest's,
/// little-endian, and gone when the function returns.
///
/// A function returns VMBED_OK, or one of VMBED_ERR_* to stop this VM with VMBED_CAUSE_DEVICE_FAULT. It may call
/// vmbed_vm_request_stop() and whatever else never blocks; functions that wait for this VM answer
/// VMBED_ERR_INVALID_STATE.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct vmbed_device_ops {
    /// sizeof(struct vmbed_device_ops)
    pub size: usize,
    /// The guest reads; `data` holds all-ones on entry. Not NULL.
    pub read: Option<
        unsafe extern "C" fn(user: *mut c_void, vcpu: u32, offset: u64, data: *mut u8, length: usize) -> i32,
    >,
    /// The guest writes. Not NULL.
    pub write: Option<
        unsafe extern "C" fn(
            user: *mut c_void,
            vcpu: u32,
            offset: u64,
            data: *const u8,
            length: usize,
        ) -> i32,
    >,
    /// Ends the device's data, see vmbed_destroy_fn. May be NULL.
    pub destroy: vmbed_destroy_fn,
}

// SAFETY: it is repr(C) with its size first, and of functions NULL is a value.
unsafe impl Sized_ for vmbed_device_ops {
    const FIRST: usize = size_of::<Self>();
    const NAME: &'static str = "vmbed_device_ops";
}

/// A device behind the table.
pub(super) struct Foreign {
    read: unsafe extern "C" fn(*mut c_void, u32, u64, *mut u8, usize) -> i32,
    write: unsafe extern "C" fn(*mut c_void, u32, u64, *const u8, usize) -> i32,
    user: UserData,
}

impl Foreign {
    /// Takes `user` over also where it fails, as far as `destroy` can be read.
    pub fn new(ops: *const vmbed_device_ops, user: *mut c_void) -> Result<Self> {
        let ops = structure(ops)?;
        let user = UserData::new(user, ops.destroy);
        let missing = |name: &str| invalid(format!("vmbed_device_ops: {name} is NULL"));
        let read = ops.read.ok_or_else(|| missing("read"))?;
        let write = ops.write.ok_or_else(|| missing("write"))?;
        Ok(Self { read, write, user })
    }
}

#[cold]
fn failed(what: &str, status: i32) -> Error {
    Error::new(error::kind(status), format!("its {what} function returned {status}"))
}

impl Device for Foreign {
    #[inline]
    fn read(&self, access: Access, data: &mut [u8]) -> Result<()> {
        let (pointer, vcpu) = (self.user.pointer(), access.vcpu);
        // SAFETY: the embedder's function with its own data; the bytes are there through the call.
        let status = unsafe { (self.read)(pointer, vcpu, access.offset, data.as_mut_ptr(), data.len()) };
        if status == error::VMBED_OK { Ok(()) } else { Err(failed("read", status)) }
    }

    #[inline]
    fn write(&self, access: Access, data: &[u8]) -> Result<()> {
        let (pointer, vcpu) = (self.user.pointer(), access.vcpu);
        // SAFETY: as above.
        let status = unsafe { (self.write)(pointer, vcpu, access.offset, data.as_ptr(), data.len()) };
        if status == error::VMBED_OK { Ok(()) } else { Err(failed("write", status)) }
    }
}
