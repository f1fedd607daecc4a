#![forbid(unsafe_code)]
//! Which VM the calling thread works for: calls that would wait for themselves are refused by it.

use std::cell::Cell;

use crate::events::VmId;

thread_local! {
    /// 0 on threads of the embedder, outside of callbacks.
    static CURRENT: Cell<VmId> = const { Cell::new(VmId(0)) };
}

/// Makes the calling thread one of the VM's own, as long as what is returned lives.
#[must_use]
pub(crate) fn enter(vm: VmId) -> Inside {
    Inside(CURRENT.replace(vm))
}

/// The same for a thread that works for no one VM, but that others wait for.
#[must_use]
pub(crate) fn enter_for_all() -> Inside {
    enter(VmId(u64::MAX))
}

/// Whether the calling thread works for that VM.
pub(crate) fn is_inside(vm: VmId) -> bool {
    CURRENT.get() == vm
}

/// Whether it works for any.
pub(crate) fn is_inside_any() -> bool {
    CURRENT.get() != VmId(0)
}

/// Makes the thread again what it was.
pub(crate) struct Inside(VmId);

impl Drop for Inside {
    fn drop(&mut self) {
        CURRENT.set(self.0);
    }
}
