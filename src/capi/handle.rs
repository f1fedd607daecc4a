//! Handles: what a pointer to an opaque type of the C API points to.
//!
//! A handle's memory is never given back to the allocator, only used again for another of its type. So a
//! call that comes after `_free`, or at the same moment from another thread, finds an empty slot and
//! answers an error: it cannot touch freed memory. An object lives until the last call on it returns.

use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, Ordering};

use crate::error::{Error, ErrorKind, Result};
use crate::sys::fork;
use crate::sys::sync::{Mutex, lock};

/// What a handle points to, whatever C calls it.
pub(super) struct Slot<T: 'static> {
    object: Mutex<Option<Arc<T>>>,
    /// Where it was made. In a child of that process the lock may be held for ever, and the object has neither
    /// threads nor a guest: nobody may touch it there.
    process: u64,
}

/// Slots without an object, for the next handle of their type.
pub(super) struct Spare<T: 'static>(AtomicPtr<List<T>>);

/// Those of one process. A child of a fork begins anew: the parent's list may be locked for ever.
struct List<T: 'static> {
    slots: Mutex<Vec<&'static Slot<T>>>,
    process: u64,
}

impl<T> Spare<T> {
    pub const fn new() -> Self {
        Self(AtomicPtr::new(null_mut()))
    }

    fn slots(&self) -> &'static Mutex<Vec<&'static Slot<T>>> {
        let process = fork::process();
        loop {
            let found = self.0.load(Ordering::Acquire);
            // SAFETY: NULL, or one that was leaked below.
            if let Some(list) = unsafe { found.as_ref() }.filter(|list| list.process == process) {
                return &list.slots;
            }
            let new = Box::into_raw(Box::new(List { slots: Mutex::new(Vec::new()), process }));
            if self.0.compare_exchange(found, new, Ordering::AcqRel, Ordering::Relaxed).is_err() {
                // SAFETY: made above, and nobody else has seen it.
                drop(unsafe { Box::from_raw(new) });
            }
        }
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
    let spare = lock(H::spare().slots()).pop();
    let slot = spare
        .unwrap_or_else(|| Box::leak(Box::new(Slot { object: Mutex::new(None), process: fork::process() })));
    *lock(&slot.object) = Some(Arc::new(object));
    std::ptr::from_ref(slot).cast_mut().cast()
}

/// The object behind `handle`.
pub(super) fn object<H: Handle>(handle: *const H) -> Result<Arc<H::Object>> {
    let slot = slot(handle);
    if slot.is_some_and(|slot| !slot.is_ours()) {
        let why = format!("this {} belongs to the process that this one was forked from", H::NAME);
        return Err(Error::new(ErrorKind::InvalidState, why));
    }
    slot.and_then(|slot| lock(&slot.object).clone()).ok_or_else(|| {
        let why = if handle.is_null() { "is NULL" } else { "was freed" };
        Error::new(ErrorKind::InvalidArgument, format!("{} {why}", H::NAME))
    })
}

/// The object behind `handle`, which has none from now on. `None` for NULL, after the first time, and in a child of
/// the process that made it.
pub(super) fn take<H: Handle>(handle: *mut H) -> Option<Arc<H::Object>> {
    let slot = slot(handle).filter(|slot| slot.is_ours())?;
    let object = lock(&slot.object).take()?;
    lock(H::spare().slots()).push(slot);
    Some(object)
}

impl<T> Slot<T> {
    /// Whether this process made it, not one that this was forked from.
    fn is_ours(&self) -> bool {
        self.process == fork::process()
    }
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
