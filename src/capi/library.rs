//! The library itself: its version, and what it can do.

use std::ffi::{CStr, c_char};

use super::arguments::bytes;
use super::error::vmbed_error;
use super::{answer, call};

/// The header's version: major, minor and patch. A library of the same major (while that is 0: minor) version
/// does all that it says.
pub const VMBED_VERSION_MAJOR: u32 = 0;
/// See VMBED_VERSION_MAJOR.
pub const VMBED_VERSION_MINOR: u32 = 1;
/// See VMBED_VERSION_MAJOR.
pub const VMBED_VERSION_PATCH: u32 = 0;

/// What this library can do. Names stay; a missing one means that the calls for it answer VMBED_ERR_UNSUPPORTED.
const FEATURES: &[&CStr] = &[
    c"linux",
    c"bare",
    c"doorbell",
    c"sigbus",
    c"blk-raw",
    c"blk-backend",
    c"net-tap",
    c"net-socket",
    #[cfg(feature = "qcow2")]
    c"qcow2",
    c"net-backend",
    c"rng",
    c"console-serial",
    c"console-virtio",
    c"sandbox",
];

/// The library's version, `major << 16 | minor << 8 | patch`.
#[unsafe(no_mangle)]
pub extern "C" fn vmbed_version() -> u32 {
    VMBED_VERSION_MAJOR << 16 | VMBED_VERSION_MINOR << 8 | VMBED_VERSION_PATCH
}

/// The `index`th thing that this library can do, from 0: `linux`, `bare`, `blk-raw`, `net-tap`, ... NULL past the
/// last. Static.
#[unsafe(no_mangle)]
pub extern "C" fn vmbed_feature(index: usize) -> *const c_char {
    FEATURES.get(index).map_or(std::ptr::null(), |name| name.as_ptr())
}

/// Whether vmbed_feature() lists `name`. Not for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_has_feature(name: *const c_char) -> bool {
    answer(false, || bytes(name, "name").is_ok_and(|name| FEATURES.iter().any(|f| f.to_bytes() == name)))
}

/// Has the process survive SIGBUS on guest memory: a page of failing hardware, one that swap cannot give back, a huge page
/// that is gone from the administrator's pool after the guest gave it to the host. Whoever touched it finds zeroes there, and
/// the VM that it belongs to stops with VMBED_CAUSE_DEVICE_FAULT of the device `memory`. Without it, the kernel ends the
/// process.
///
/// It installs a handler for the signal, since nothing does that unasked, and starts one thread that sleeps. Any other
/// SIGBUS goes to the handler that was there before, or ends the process as before. So install your own first; one that
/// comes later must pass on what is not its own, with all three arguments. Threads of yours that touch guest memory must
/// not block SIGBUS. To call it again does nothing; in a child of a fork, it begins anew.
///
/// VMBED_ERR_EXHAUSTED where the process is out of threads or file descriptors.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_handle_sigbus(error: *mut *mut vmbed_error) -> i32 {
    call(error, crate::memory::handle_sigbus)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_version_is_the_package_s() {
        let text = format!(
            "{}.{}.{}",
            super::VMBED_VERSION_MAJOR,
            super::VMBED_VERSION_MINOR,
            super::VMBED_VERSION_PATCH
        );
        assert_eq!(text, env!("CARGO_PKG_VERSION"));
    }
}
