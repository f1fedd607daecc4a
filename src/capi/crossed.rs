//! What structures of C's have become, for the fuzz target that holds it against what it has written.

use std::ffi::c_void;

use super::arguments::{Sized_, fill, structure};
use super::config::vmbed_config;
use super::host::host_config;
use super::switch::vmbed_port;
use super::{balloon, block, device, disk, handle, host as hosts, ledger, net, reclaim, sandbox, vm, wiring};
use crate::config::VmConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::host::HostConfig;
use crate::net::switch::PortOptions;
use crate::sys::lock;

/// The configuration behind a `vmbed_config *`.
///
/// # Errors
/// It was freed, or is NULL.
pub fn config(handle: *const c_void) -> Result<VmConfig> {
    Ok(lock(&*handle::object(handle.cast::<vmbed_config>())?).clone())
}

/// What the port behind a `vmbed_port *` was told.
///
/// # Errors
/// It was freed or removed, or is NULL.
pub fn port_options(handle: *const c_void) -> Result<PortOptions> {
    let told = handle::object(handle.cast::<vmbed_port>())?.port.options();
    told.ok_or_else(|| Error::new(ErrorKind::NotFound, "the port was removed"))
}

/// What a `vmbed_host_options *` says.
///
/// # Errors
/// As those of `vmbed_host_open`.
pub fn host(options: *const c_void) -> Result<HostConfig> {
    host_config(options.cast())
}

/// A structure that only something which runs is given, or fills.
pub struct Form {
    /// What C calls it.
    pub name: &'static str,
    /// How long it is here.
    pub full: usize,
    cross: fn(*const c_void, *mut c_void) -> Result<()>,
}

const fn form<T: Sized_>() -> Form {
    Form {
        name: T::NAME,
        full: size_of::<T>(),
        cross: |from, to| fill(to.cast::<T>(), &structure(from.cast::<T>())?),
    }
}

/// All of them.
pub const FORMS: [Form; 17] = [
    form::<balloon::vmbed_balloon_statistics>(),
    form::<balloon::vmbed_guest_memory>(),
    form::<block::vmbed_block_ops>(),
    form::<device::vmbed_device_ops>(),
    form::<disk::vmbed_disk_statistics>(),
    form::<hosts::vmbed_usage>(),
    form::<ledger::vmbed_memory>(),
    form::<ledger::vmbed_vcpu_statistics>(),
    form::<ledger::vmbed_verdict>(),
    form::<net::vmbed_net_ops>(),
    form::<net::vmbed_net_statistics>(),
    form::<reclaim::vmbed_pressure>(),
    form::<reclaim::vmbed_reclaim_options>(),
    form::<sandbox::vmbed_sandbox>(),
    form::<vm::vmbed_registers>(),
    form::<wiring::vmbed_bridge_options>(),
    form::<wiring::vmbed_tap_options>(),
];

impl Form {
    /// Takes one from a caller, and hands it to another.
    ///
    /// # Errors
    /// As those of any function that takes one, or fills one.
    pub fn cross(&self, from: *const c_void, to: *mut c_void) -> Result<()> {
        (self.cross)(from, to)
    }
}
