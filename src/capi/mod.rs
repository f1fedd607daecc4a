#![expect(unsafe_code, reason = "the C ABI: pointers come from outside of Rust")]
// The names are C's, and every precondition is the one that the page's introduction in the header states:
// a pointer is NULL or valid.
#![allow(non_camel_case_types, clippy::missing_safety_doc)]
//! The C ABI. It has no ideas of its own: arguments are checked, one Rust call is made, its result is
//! converted.
//!
//! `include/vmbed.h` is made from this folder (`make header`), so its comments are written for C.

use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::error::{Error, ErrorKind, Result};
use crate::reactor::panic_text;

mod arguments;
mod balloon;
mod block;
#[cfg(test)]
mod calls;
mod config;
#[cfg(feature = "internals")]
pub(crate) mod crossed;
mod device;
mod disk;
mod drive;
mod error;
mod events;
mod handle;
mod host;
mod ledger;
mod library;
mod log;
mod memory;
mod net;
mod reclaim;
mod sandbox;
mod switch;
mod traffic;
mod vm;
mod wiring;

use error::vmbed_error;

/// Makes one call: a panic becomes an error, and an error fills `out`, where there is one. Returns the
/// status.
fn call(out: *mut *mut vmbed_error, f: impl FnOnce() -> Result<()>) -> i32 {
    if !out.is_null() {
        // SAFETY: not NULL, so it is valid for a write: the header says so.
        unsafe { out.write(std::ptr::null_mut()) };
    }
    let result = catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| {
        let why = format!("vmbed panicked: {}", panic_text(&*panic));
        // What a panic carries may panic again when it is dropped.
        std::mem::forget(panic);
        Err(Error::new(ErrorKind::Internal, why))
    });
    match result {
        Ok(()) => error::VMBED_OK,
        Err(failure) => {
            let status = error::status(failure.kind());
            if !out.is_null() {
                let made = catch_unwind(AssertUnwindSafe(|| error::make(failure)));
                // SAFETY: as above.
                unsafe { out.write(made.unwrap_or(std::ptr::null_mut())) };
            }
            status
        }
    }
}

/// The same for calls that cannot fail: a panic answers `otherwise`.
fn answer<T>(otherwise: T, f: impl FnOnce() -> T) -> T {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| {
        std::mem::forget(panic);
        otherwise
    })
}
