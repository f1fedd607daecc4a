#![forbid(unsafe_code)]
//! Which VMs the calling thread works for: calls that would wait for themselves are refused by it.

use std::cell::RefCell;

use crate::events::VmId;

thread_local! {
    /// The innermost last: a callback of one VM's may have another VM paused. Empty on threads of the embedder, outside of callbacks.
    static CURRENT: RefCell<Vec<VmId>> = const { RefCell::new(Vec::new()) };
}

/// Makes the calling thread one of the VM's own, as long as what is returned lives.
#[must_use]
pub(crate) fn enter(vm: VmId) -> Inside {
    let _ = CURRENT.try_with(|current| current.borrow_mut().push(vm));
    Inside(())
}

/// The same for a thread that works for no one VM, but that others wait for.
#[must_use]
pub(crate) fn enter_for_all() -> Inside {
    enter(VmId(u64::MAX))
}

/// Whether the calling thread works for that VM.
pub(crate) fn is_inside(vm: VmId) -> bool {
    CURRENT.try_with(|current| current.borrow().contains(&vm)).unwrap_or(false)
}

/// Whether it works for any.
pub(crate) fn is_inside_any() -> bool {
    CURRENT.try_with(|current| !current.borrow().is_empty()).unwrap_or(false)
}

/// Makes the thread again what it was.
pub(crate) struct Inside(());

impl Drop for Inside {
    fn drop(&mut self) {
        let _ = CURRENT.try_with(|current| current.borrow_mut().pop());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_works_for_two_works_for_both() {
        assert!(!is_inside_any());
        let outer = enter(VmId(1));
        let inner = enter(VmId(2));
        assert_eq!([1, 2, 3].map(|vm| is_inside(VmId(vm))), [true, true, false]);
        drop(inner);
        assert_eq!([1, 2].map(|vm| is_inside(VmId(vm))), [true, false]);
        drop(outer);
        assert!(!is_inside_any() && !is_inside(VmId(1)));
    }
}
