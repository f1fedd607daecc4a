//! What structures of C's have become, for the fuzz target that holds it against what it has written.

use std::ffi::c_void;

use super::config::vmbed_config;
use super::handle;
use super::host::host_config;
use super::switch::vmbed_port;
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
