//! A switch inside of the process.

use std::ffi::{CString, c_char};
use std::fs::File;
use std::io::BufWriter;
use std::sync::Mutex;
use std::time::Duration;

use super::arguments::{Out, Sized_, array, fd, handles, invalid, optional, put_optional, structure, text};
use super::config::{attach, vmbed_builder};
use super::disk::vmbed_rate;
use super::error::{c_text, vmbed_error};
use super::handle::{self, handle};
use super::{answer, call};
use crate::config::RateLimit;
use crate::error::{Error, ErrorKind, Result};
use crate::net::switch::{Capture, Guard, PortOptions, PortVlan, Switch, SwitchOptions, SwitchPort};
use crate::sys::lock;

/// A learning Ethernet switch with VLANs (802.1Q) inside of the process: it needs no privilege, and nothing of the host's
/// network but for its uplinks. Its functions may be called from any thread and do not block for long, save where they
/// say so.
pub struct vmbed_switch(());

handle!(vmbed_switch holds Switch);

/// A port of a switch: for the card of a VM (vmbed_builder_net_port()), or with a TAP interface of the host's on it.
pub struct vmbed_port(());

handle!(vmbed_port holds Port);

/// What passes through ports, while it is being written to a file.
pub struct vmbed_capture(());

handle!(vmbed_capture holds Mutex<Option<Capture>>);

/// What a handle of a port holds.
pub(super) struct Port {
    pub port: SwitchPort,
    name: CString,
}

fn port_of(port: SwitchPort) -> Port {
    let name = c_text(port.name());
    Port { port, name }
}

/// What a whole switch is told. All zeroes but the size are the defaults.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct vmbed_switch_options {
    /// sizeof(struct vmbed_switch_options)
    pub size: usize,
    /// How many addresses are remembered, at most 1,048,576; each costs 48 bytes. 0: 8192.
    pub addresses: u32,
    /// How many seconds an address is remembered that is not heard of. 0: 300.
    pub ageing: u32,
}

// SAFETY: it is repr(C) with its size first, and all zeroes is a value.
unsafe impl Sized_ for vmbed_switch_options {
    const FIRST: usize = size_of::<Self>();
    const NAME: &'static str = "vmbed_switch_options";
}

/// What one port is told. All zeroes but the size are the defaults: a port in VLAN 1, without tags. What it points to is
/// copied.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct vmbed_port_options {
    /// sizeof(struct vmbed_port_options)
    pub size: usize,
    /// Without `trunk`: the one VLAN of the port, 1 to 4094, of which the station knows nothing; 0: VLAN 1. With it: the VLAN
    /// of frames without a tag; 0 drops them.
    pub vlan: u32,
    /// How many VLANs `trunk` has.
    pub trunk_length: u32,
    /// The VLANs that have tags here, each 1 to 4094. NULL: an access port, on which no frame has a tag.
    pub trunk: *const u32,
    /// Other than 0: reaches ports that are not isolated, and not the others that are.
    pub isolated: u32,
    /// Other than 0: frames to addresses that nobody has been heard from do not go here. Broadcasts and multicasts do.
    pub no_unknown_unicast: u32,
    /// How many addresses behind this port are remembered. Further ones still send and receive. 0: 1024.
    pub max_addresses: u32,
    /// Other than 0: a guarded station may say that it is a router (advertisements and redirects of IPv6).
    pub guard_router: u32,
    /// Who the station may claim to be: its MAC addresses, with spaces between them. NULL: anybody. Nobody else on the
    /// switch may use them, but ports that list them too.
    pub guard_macs: *const c_char,
    /// Its IP addresses of both families, with spaces between them: `192.0.2.7 2001:db8::/64`. NULL: any. The link-local ones
    /// that follow from `guard_macs` belong to them. What a station says before it has an address passes.
    pub guard_addresses: *const c_char,
    /// How much the station may send. More is dropped.
    pub rate_in: vmbed_rate,
    /// How much goes to the station. More is dropped.
    pub rate_out: vmbed_rate,
    /// How much the station may send of what goes to many: broadcasts, multicasts and unknown addresses. All zeroes: 10,000
    /// frames a second in bursts of 2,000; for no limit, UINT64_MAX frames a second.
    pub storm: vmbed_rate,
}

// SAFETY: it is repr(C) with its size first, and all zeroes is a value.
unsafe impl Sized_ for vmbed_port_options {
    const FIRST: usize = size_of::<Self>();
    const NAME: &'static str = "vmbed_port_options";
}

/// Those of a port, on a switch of ours or a bridge of the host's: `trunk` with tags and `vlan` without one, 0 for none; without `trunk`
/// `vlan` alone. `of` is what errors have in front of these names.
pub(super) fn port_vlan(vlan: u32, trunk: *const u32, length: usize, of: &str) -> Result<PortVlan> {
    let (untagged, tagged) = (format!("{of}vlan"), format!("{of}trunk"));
    if trunk.is_null() && length == 0 {
        return Ok(PortVlan::Access(vlan_number(vlan, &untagged)?));
    }
    let vlans = array(trunk, length, &tagged)?
        .iter()
        .map(|vlan| vlan_number(*vlan, &tagged))
        .collect::<Result<_>>()?;
    Ok(PortVlan::Trunk { vlans, native: (vlan != 0).then(|| vlan_number(vlan, &untagged)).transpose()? })
}

pub(super) fn vlan_number(vlan: u32, name: &str) -> Result<u16> {
    u16::try_from(vlan).map_err(|_| invalid(format!("{name}: VLAN {vlan} is not 1 to 4094")))
}

/// The options of a port; the defaults for NULL.
fn port_options(options: *const vmbed_port_options) -> Result<PortOptions> {
    if options.is_null() {
        return Ok(PortOptions::default());
    }
    let given = structure(options)?;
    let mut made = PortOptions::default();
    let is_access = given.trunk.is_null() && given.trunk_length == 0;
    let vlan = if is_access && given.vlan == 0 { 1 } else { given.vlan };
    made.vlan = port_vlan(vlan, given.trunk, given.trunk_length as usize, "vmbed_port_options.")?;
    (made.isolated, made.unknown_unicast) = (given.isolated != 0, given.no_unknown_unicast == 0);
    if given.max_addresses != 0 {
        made.max_addresses = given.max_addresses;
    }
    (made.rate_in, made.rate_out) = (given.rate_in.limit(), given.rate_out.limit());
    let storm = given.storm.limit();
    if given.storm.ops_per_second == u64::MAX {
        made.storm = RateLimit { ops_per_second: 0, ops_burst: 0, ..storm };
    } else if !storm.is_none() {
        made.storm = storm;
    }
    made.guard = guard(&given)?;
    Ok(made)
}

fn guard(given: &vmbed_port_options) -> Result<Guard> {
    let mut guard = Guard::default();
    let macs = optional(given.guard_macs, "vmbed_port_options.guard_macs", text)?;
    guard.macs = macs.unwrap_or_default().split_whitespace().map(str::parse).collect::<Result<_>>()?;
    let addresses = optional(given.guard_addresses, "vmbed_port_options.guard_addresses", text)?;
    let parse = |list: &str| list.split_whitespace().map(str::parse).collect::<Result<_>>();
    guard.addresses = addresses.map(parse).transpose()?;
    guard.router = given.guard_router != 0;
    Ok(guard)
}

/// A switch without ports; `options` may be NULL. It is yours to free. It has no thread before it has an uplink or a capture.
/// VMBED_ERR_INVALID_ARGUMENT with every bad option.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_switch_new(
    options: *const vmbed_switch_options,
    new_switch: *mut *mut vmbed_switch,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let out = Out::new(new_switch, "new_switch")?;
        let mut made = SwitchOptions::default();
        if !options.is_null() {
            let given = structure(options)?;
            if given.addresses != 0 {
                made.addresses = given.addresses;
            }
            if given.ageing != 0 {
                made.ageing = Duration::from_secs(given.ageing.into());
            }
        }
        out.put(handle::make(Switch::new(&made)?));
        Ok(())
    })
}

/// Frees this end of a switch. VMs on it go on reaching each other; its uplinks and captures end with the last handle of
/// the switch, of its ports and of its captures. NULL is a no-op.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_switch_free(old_switch: *mut vmbed_switch) {
    answer((), || drop(handle::take(old_switch)));
}

/// Adds a port in some way.
fn add(
    on_switch: *mut vmbed_switch,
    port: *mut *mut vmbed_port,
    error: *mut *mut vmbed_error,
    how: impl FnOnce(&Switch) -> Result<SwitchPort>,
) -> i32 {
    call(error, || {
        let (out, of) = (Out::new(port, "port")?, handle::object(on_switch)?);
        out.put(handle::make(port_of(how(&of)?)));
        Ok(())
    })
}

/// Adds a port with nothing on it. `name` is for errors, captures and people; `options` may be NULL. The handle is yours to
/// free, which leaves the port there.
///
/// VMBED_ERR_INVALID_ARGUMENT with every bad option; VMBED_ERR_EXHAUSTED beyond 1024 ports, or where the process has no file
/// descriptor left.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_switch_add_port(
    on_switch: *mut vmbed_switch,
    name: *const c_char,
    options: *const vmbed_port_options,
    port: *mut *mut vmbed_port,
    error: *mut *mut vmbed_error,
) -> i32 {
    add(on_switch, port, error, |of| of.add_port(text(name, "name")?, &port_options(options)?))
}

/// Adds a port with a TAP interface of the host's on it, which must exist, have a single queue and be in nobody else's use.
/// Frames to it keep their segmentation and checksum offloads, as far as the host's kernel knows them, which does them then; frames
/// from it come with theirs, which the switch does for whom does not. One thread, `vmbed-switch`, serves all uplinks of a switch. An
/// interface that goes away is looked for once a second; meanwhile, and while it is down, frames to it are counted at the port
/// (VMBED_DROP_UPLINK). There is no event, since a switch is no VM's: only a line in the log when it goes away.
///
/// As for vmbed_switch_add_port(); VMBED_ERR_NOT_FOUND, VMBED_ERR_BUSY or VMBED_ERR_PERMISSION_DENIED for the interface.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_switch_add_tap(
    on_switch: *mut vmbed_switch,
    name: *const c_char,
    tap: *const c_char,
    options: *const vmbed_port_options,
    port: *mut *mut vmbed_port,
    error: *mut *mut vmbed_error,
) -> i32 {
    add(on_switch, port, error, |of| {
        of.add_tap(text(name, "name")?, text(tap, "tap")?, &port_options(options)?)
    })
}

/// Adds a port with a network in user space on it, which listens on the Unix socket `path` and speaks the protocol of QEMU's `-netdev
/// stream`, as passt does: a way out that needs no privilege. It is looked for once a second where it goes away. Frames to it are complete,
/// with their checksums, and no longer than its stations' MTU.
///
/// As for vmbed_switch_add_port(); VMBED_ERR_NOT_FOUND or what else the host says where nobody listens there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_switch_add_stream(
    on_switch: *mut vmbed_switch,
    name: *const c_char,
    path: *const c_char,
    options: *const vmbed_port_options,
    port: *mut *mut vmbed_port,
    error: *mut *mut vmbed_error,
) -> i32 {
    add(on_switch, port, error, |of| {
        let path = super::arguments::path(path, "path")?;
        of.add_stream(text(name, "name")?, path, &port_options(options)?)
    })
}

/// Adds a port with what is behind a descriptor on it, which is duplicated: a connected Unix socket of the kind SOCK_SEQPACKET or SOCK_DGRAM,
/// on which each message is a frame as vmbed_net_ops describes it; one of the kind SOCK_STREAM, as vmbed_switch_add_stream() has it; or
/// a queue of a TAP interface that somebody attached. Frames to a socket are complete, with their checksums.
///
/// As for vmbed_switch_add_port(); VMBED_ERR_INVALID_ARGUMENT where it is none of these.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_switch_add_fd(
    on_switch: *mut vmbed_switch,
    name: *const c_char,
    fd: i32,
    options: *const vmbed_port_options,
    port: *mut *mut vmbed_port,
    error: *mut *mut vmbed_error,
) -> i32 {
    add(on_switch, port, error, |of| {
        let fd = self::fd(fd, "fd")?.try_clone_to_owned();
        let fd = fd.map_err(|e| Error::os("duplicating the fd of a port", e))?;
        of.add_fd(text(name, "name")?, fd, &port_options(options)?)
    })
}

/// Puts card `index`, added without a TAP interface, on a port of a switch. The port is free again when the VM is freed.
/// vmbed_builder_build() says whether there is such a card, and answers VMBED_ERR_BUSY where the port is in use,
/// VMBED_ERR_NOT_FOUND where it was removed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_builder_net_port(
    builder: *mut vmbed_builder,
    index: u32,
    port: *const vmbed_port,
    error: *mut *mut vmbed_error,
) -> i32 {
    attach(builder, error, |builder| {
        builder.set_net_port(index as usize, &handle::object(port)?.port);
        Ok(())
    })
}

/// The name that a port was given. It belongs to the handle. NULL for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_port_name(port: *const vmbed_port) -> *const c_char {
    answer(std::ptr::null(), || handle::object(port).map_or(std::ptr::null(), |p| p.name.as_ptr()))
}

/// Tells a port something else, from the next frame on; NULL for the defaults. The addresses behind it are forgotten; what
/// its limits have used up stays so.
///
/// VMBED_ERR_INVALID_ARGUMENT with every bad option; VMBED_ERR_NOT_FOUND where it was removed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_port_set_options(
    port: *mut vmbed_port,
    options: *const vmbed_port_options,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || handle::object(port)?.port.set_options(&port_options(options)?))
}

/// Copies what comes in and goes out at `port` to `monitor` as well, as it is seen here; NULL ends that. A port to which
/// others are mirrored gets nothing else, and what its station sends is dropped.
///
/// VMBED_ERR_INVALID_ARGUMENT for itself or a port of another switch; VMBED_ERR_INVALID_STATE where `monitor` is mirrored to a
/// third, or others are mirrored to this one; VMBED_ERR_NOT_FOUND where one of them was removed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_port_mirror_to(
    port: *mut vmbed_port,
    monitor: *const vmbed_port,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let port = handle::object(port)?;
        let monitor = if monitor.is_null() { None } else { Some(handle::object(monitor)?) };
        port.port.mirror_to(monitor.as_deref().map(|m| &m.port))
    })
}

/// Takes a port away from its switch. A VM that is on it has a card without a cable from then on; an uplink is closed, for
/// which this waits. The second time it does nothing. The handle is still yours to free.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_port_remove(port: *mut vmbed_port, error: *mut *mut vmbed_error) -> i32 {
    call(error, || {
        handle::object(port)?.port.remove();
        Ok(())
    })
}

/// Frees this end of a port; the port stays. NULL is a no-op.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_port_free(port: *mut vmbed_port) {
    answer((), || drop(handle::take(port)));
}

/// Writes what passes through the `count` ports (through all that there are, where it is 0) to `fd`, which is duplicated, as a
/// pcapng file that Wireshark opens: each frame once for each of the ports that it comes in or goes out of, as it is seen
/// there. Frames that left segmentation or a checksum to others are in it as they were. A thread, `vmbed-capture`, does
/// the writing; what comes faster is counted and left out, forwarding never waits. The handle is yours to free.
///
/// VMBED_ERR_INVALID_ARGUMENT for a port of another switch; what the host says where the beginning cannot be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_switch_capture(
    on_switch: *mut vmbed_switch,
    ports: *const *const vmbed_port,
    count: usize,
    fd: i32,
    capture: *mut *mut vmbed_capture,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let (out, of) = (Out::new(capture, "capture")?, handle::object(on_switch)?);
        let port = |port: &*const vmbed_port| Ok(handle::object(*port)?.port.clone());
        let ports = handles(ports, count, "ports")?.iter().map(port).collect::<Result<Vec<_>>>()?;
        let fd = self::fd(fd, "fd")?.try_clone_to_owned();
        let file = File::from(fd.map_err(|e| Error::os("duplicating the fd of a capture", e))?);
        let begun = of.capture(&ports, BufWriter::new(file))?;
        out.put(handle::make(Mutex::new(Some(begun))));
        Ok(())
    })
}

/// Ends a capture: what has passed until now is in the file when this returns. Blocks as long as writing does. `written` and
/// `missed`, each of which may be NULL, are set to how many frames were written, and how many came faster than that. The
/// handle is still yours to free.
///
/// What the first failed write said, after which nothing was written; VMBED_ERR_INVALID_STATE the second time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_capture_finish(
    capture: *mut vmbed_capture,
    written: *mut u64,
    missed: *mut u64,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let held = handle::object(capture)?;
        let ended = lock(&held).take();
        let ended =
            ended.ok_or_else(|| Error::new(ErrorKind::InvalidState, "this vmbed_capture has ended"))?;
        let summary = ended.finish()?;
        put_optional(written, summary.written);
        put_optional(missed, summary.missed);
        Ok(())
    })
}

/// Frees a capture, which ends it as vmbed_capture_finish() does. NULL is a no-op.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_capture_free(capture: *mut vmbed_capture) {
    answer((), || drop(handle::take(capture)));
}
