//! Handles: what a pointer to an opaque type of the C API points to.
//!
//! A handle's memory is never given back to the allocator, only used again for another of its type. So a
//! call that comes after `_free`, or at the same moment from another thread, finds an empty slot and
//! answers an error: it cannot touch freed memory. An object lives until the last call on it returns.

use std::sync::{Arc, Mutex};

use crate::error::{Error, ErrorKind, Result};
use crate::sys::lock;

/// What a handle points to, whatever C calls it.
pub(super) struct Slot<T: 'static>(Mutex<Option<Arc<T>>>);

/// Slots without an object, for the next handle of their type.
pub(super) struct Spare<T: 'static>(Mutex<Vec<&'static Slot<T>>>);

impl<T> Spare<T> {
    pub const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }
}

/// A type of the C API.
pub(super) trait Handle: Sized + 'static {
    type Object: Send + Sync + 'static;
    /// The parameter's name, for errors.
    const NAME: &'static str;
    fn spare() -> &'static Spare<Self::Object>;
}

/// A handle of `object`.
pub(super) fn make<H: Handle>(object: H::Object) -> *mut H {
    let spare = lock(&H::spare().0).pop();
    let slot = spare.unwrap_or_else(|| Box::leak(Box::new(Slot(Mutex::new(None)))));
    *lock(&slot.0) = Some(Arc::new(object));
    std::ptr::from_ref(slot).cast_mut().cast()
}

/// The object behind `handle`.
pub(super) fn object<H: Handle>(handle: *const H) -> Result<Arc<H::Object>> {
    let object = slot(handle).and_then(|slot| lock(&slot.0).clone());
    object.ok_or_else(|| {
        let why = if handle.is_null() { "is NULL" } else { "was freed" };
        Error::new(ErrorKind::InvalidArgument, format!("{} {why}", H::NAME))
    })
}

/// The object behind `handle`, which has none from now on. `None` for NULL, and after the first time.
pub(super) fn take<H: Handle>(handle: *mut H) -> Option<Arc<H::Object>> {
    let slot = slot(handle)?;
    let object = lock(&slot.0).take()?;
    lock(&H::spare().0).push(slot);
    Some(object)
}

fn slot<H: Handle>(handle: *const H) -> Option<&'static Slot<H::Object>> {
    // SAFETY: NULL, or a pointer that `make` gave out: to a slot, which is never freed and shared only
    // behind its lock.
    unsafe { handle.cast::<Slot<H::Object>>().as_ref() }
}

/// Says what the handles of an opaque type of the C API hold. (The type itself is written out, for cbindgen, and
/// stands for a pointer's target only.)
macro_rules! handle {
    ($name:ident holds $object:ty) => {
        impl $crate::capi::handle::Handle for $name {
            type Object = $object;
            const NAME: &'static str = stringify!($name);
            fn spare() -> &'static $crate::capi::handle::Spare<$object> {
                static SPARE: $crate::capi::handle::Spare<$object> = $crate::capi::handle::Spare::new();
                &SPARE
            }
        }
    };
}
pub(super) use handle;
