#![forbid(unsafe_code)]
//! The sandbox's own tests: what its lists are worth, and code of theirs on its threads.

use crate::host::Host;
pub use crate::sandbox::learn::{begin as learn, shown, unlisted, unneeded};
use crate::vm::{Vm, VmBuilder};

/// Lets code of the caller's run in the sandbox.
pub fn trust(mut builder: VmBuilder) -> VmBuilder {
    builder.trusted = true;
    builder
}

/// Runs `f` on the thread that serves the VM's `index`th loop; what it answers.
pub fn on_loop<R: Send + 'static>(
    vm: &Vm,
    index: usize,
    f: impl FnOnce() -> R + Send + 'static,
) -> Option<R> {
    vm.on_loop(index, f)
}

/// Runs `f` on the host's thread that reclaims memory; what it answers.
pub fn on_reclaim<R: Send + 'static>(host: &Host, f: impl FnOnce() -> R + Send + 'static) -> Option<R> {
    host.on_reclaim(f)
}
