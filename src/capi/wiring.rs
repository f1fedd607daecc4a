//! The host's side of guests' networks.

use std::ffi::c_char;

use super::arguments::{Out, Sized_, optional, structure, text};
use super::error::vmbed_error;
use super::handle::{self, handle};
use super::switch::{port_vlan, vlan_number};
use super::{answer, call};
use crate::error::Result;
use crate::net::wiring::{BridgeOptions, TapOptions, Wiring};

/// What this process has made of the host's network, and changed in it: bridges, TAP interfaces and VLAN interfaces, what is on which
/// bridge, and in which VLANs. When it is released or freed, all of that is undone, in reverse: what it made is gone, and what was there
/// before is as it was. What others have changed meanwhile stays as they left it.
///
/// It works in the network namespace of the thread that makes it; its functions are for threads of that namespace. They want the
/// capability CAP_NET_ADMIN there (VMBED_ERR_PERMISSION_DENIED), may be called from any thread, and do not block for long. A
/// call that fails has changed nothing.
pub struct vmbed_wiring(());

handle!(vmbed_wiring holds Wiring);

/// A bridge that is to be made. All zeroes but the size: without VLANs, and whatever else the kernel does by default.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct vmbed_bridge_options {
    /// sizeof(struct vmbed_bridge_options)
    pub size: usize,
    /// Its own address, `02:00:00:00:00:01`. NULL: that of one of its ports, and another when that one goes.
    pub mac: *const c_char,
    /// Other than 0: it tells VLANs apart (802.1Q); each port is in VLAN 1 until it is told another.
    pub vlan_filtering: u32,
    /// Bytes of a packet without its Ethernet header. 0: 1500, or what its smallest port has.
    pub mtu: u32,
}

// SAFETY: it is repr(C) with its size first, and all zeroes is a value.
unsafe impl Sized_ for vmbed_bridge_options {
    const FIRST: usize = size_of::<Self>();
    const NAME: &'static str = "vmbed_bridge_options";
}

/// A TAP interface that is to be made. All zeroes but the size: on no bridge, with one queue, for who has CAP_NET_ADMIN.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct vmbed_tap_options {
    /// sizeof(struct vmbed_tap_options)
    pub size: usize,
    /// The bridge that it is put on. NULL: none.
    pub bridge: *const c_char,
    /// The host's address on it, of no concern to the guest. NULL: made up by the kernel.
    pub mac: *const c_char,
    /// The VLANs that have tags on it, each 1 to 4094. NULL: an access port.
    pub trunk: *const u32,
    /// How many VLANs `trunk` has.
    pub trunk_length: u32,
    /// Without `trunk`: the one VLAN that it is in, 1 to 4094; 0: what the bridge gives to every port, VLAN 1. With it: the VLAN of
    /// frames without a tag; 0 drops them.
    pub vlan: u32,
    /// Other than 0: it can have several queues, and is for cards that have (vmbed_net.queues).
    pub multi_queue: u32,
    /// Other than 0: it stays when the wiring is released. 0: it is deleted then, or by vmbed_wiring_free(). To the kernel all of them are
    /// persistent (TUNSETPERSIST), since a card attaches to it later: it stays when the process is killed, as a bridge does.
    pub persistent: u32,
    /// The user who may open it without any capability, by number. 0: nobody.
    pub owner: u32,
    /// A group whose members may, by number. 0: none.
    pub group: u32,
    /// Bytes of a packet without its Ethernet header. 0: its bridge's, or 1500.
    pub mtu: u32,
    /// Zero.
    pub reserved: u32,
}

// SAFETY: it is repr(C) with its size first, and all zeroes is a value.
unsafe impl Sized_ for vmbed_tap_options {
    const FIRST: usize = size_of::<Self>();
    const NAME: &'static str = "vmbed_tap_options";
}

/// Nothing done yet. It is yours to free. VMBED_ERR_UNSUPPORTED, or what else the kernel says, where it has no rtnetlink for us.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_wiring_new(
    wiring: *mut *mut vmbed_wiring,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let out = Out::new(wiring, "wiring")?;
        out.put(handle::make(Wiring::new()?));
        Ok(())
    })
}

/// Undoes everything; it can be used again. VMBED_ERR_* of the first thing that could not be undone; the others were.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_wiring_release(
    wiring: *mut vmbed_wiring,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || handle::object(wiring)?.undo_all())
}

/// The same, where nobody wants to know; and it is gone. NULL is a no-op.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_wiring_free(wiring: *mut vmbed_wiring) {
    answer((), || drop(handle::take(wiring)));
}

/// Makes a bridge, and sets it up; `options` may be NULL.
///
/// VMBED_ERR_BUSY where there is an interface of that name; VMBED_ERR_UNSUPPORTED where the kernel has no bridges, or none that tell VLANs
/// apart.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_wiring_add_bridge(
    wiring: *mut vmbed_wiring,
    name: *const c_char,
    options: *const vmbed_bridge_options,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let (wiring, name) = (handle::object(wiring)?, text(name, "name")?);
        let mut made = BridgeOptions::default();
        if !options.is_null() {
            let given = structure(options)?;
            made.vlan_filtering = given.vlan_filtering != 0;
            made.mtu = (given.mtu != 0).then_some(given.mtu);
            made.mac = optional(given.mac, "vmbed_bridge_options.mac", text)?.map(str::parse).transpose()?;
        }
        wiring.add_bridge(name, &made)
    })
}

/// Makes a TAP interface, which a card of a VM's can be on (vmbed_net.tap), puts it on a bridge if so told, and sets it up; `options` may
/// be NULL. As vmbed_wiring_add_bridge() and vmbed_wiring_set_vlans().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_wiring_add_tap(
    wiring: *mut vmbed_wiring,
    name: *const c_char,
    options: *const vmbed_tap_options,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let (wiring, name) = (handle::object(wiring)?, text(name, "name")?);
        let options = if options.is_null() { None } else { Some(structure(options)?) };
        wiring.add_tap(name, &options.map_or(Ok(TapOptions::default()), |given| tap_options(&given))?)
    })
}

fn tap_options(given: &vmbed_tap_options) -> Result<TapOptions> {
    super::config::reserved("vmbed_tap_options", given.reserved)?;
    let some = |number: u32| (number != 0).then_some(number);
    let vlans = given.vlan != 0 || given.trunk_length != 0 || !given.trunk.is_null();
    let list =
        || port_vlan(given.vlan, given.trunk, given.trunk_length as usize, "vmbed_tap_options.").map(Some);
    Ok(TapOptions {
        bridge: optional(given.bridge, "vmbed_tap_options.bridge", text)?.map(str::to_owned),
        vlans: if vlans { list()? } else { None },
        multi_queue: given.multi_queue != 0,
        owner: some(given.owner),
        group: some(given.group),
        mtu: some(given.mtu),
        mac: optional(given.mac, "vmbed_tap_options.mac", text)?.map(str::parse).transpose()?,
        persistent: given.persistent != 0,
    })
}

/// Makes an interface that carries VLAN `vlan`, 1 to 4094, of another one, and sets it up. As vmbed_wiring_add_bridge();
/// VMBED_ERR_NOT_FOUND for the other one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_wiring_add_vlan(
    wiring: *mut vmbed_wiring,
    name: *const c_char,
    of: *const c_char,
    vlan: u32,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let wiring = handle::object(wiring)?;
        wiring.add_vlan(text(name, "name")?, text(of, "of")?, vlan_number(vlan, "vlan")?)
    })
}

/// Deletes an interface that this made. VMBED_ERR_INVALID_ARGUMENT where it is none of them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_wiring_remove(
    wiring: *mut vmbed_wiring,
    name: *const c_char,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || handle::object(wiring)?.remove(text(name, "name")?))
}

/// Makes an interface a port of a bridge. VMBED_ERR_INVALID_STATE where it is one of another bridge: detach it first;
/// VMBED_ERR_NOT_FOUND; VMBED_ERR_INVALID_ARGUMENT where that is no bridge.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_wiring_attach(
    wiring: *mut vmbed_wiring,
    port: *const c_char,
    bridge: *const c_char,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || handle::object(wiring)?.attach(text(port, "port")?, text(bridge, "bridge")?))
}

/// Takes a port from its bridge; nothing where it is on none. When that is undone, it has its settings there again (cost, priority,
/// flooding, isolation and the like), its VLANs, and the addresses that somebody has put behind it for good (`bridge fdb`); not
/// static groups (`bridge mdb`), settings of single VLANs and tunnels (`bridge vlan set`), and what the bridge had learned.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_wiring_detach(
    wiring: *mut vmbed_wiring,
    port: *const c_char,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || handle::object(wiring)?.detach(text(port, "port")?))
}

/// Says which VLANs a port of a bridge is in, or the bridge itself: as the host's own interface on it. With `trunk` NULL, and
/// `trunk_length` 0: in `vlan` alone, 1 to 4094, without a tag. Otherwise in those with tags, and in `vlan` without one; 0: in none.
///
/// VMBED_ERR_INVALID_STATE where it is on no bridge, or on one that does not tell VLANs apart.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_wiring_set_vlans(
    wiring: *mut vmbed_wiring,
    port: *const c_char,
    vlan: u32,
    trunk: *const u32,
    trunk_length: usize,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let wiring = handle::object(wiring)?;
        wiring.set_vlans(text(port, "port")?, &port_vlan(vlan, trunk, trunk_length, "")?)
    })
}

/// Sets an interface up or down. One that is set down loses its routes and IPv6 addresses. When that is undone, it has again what
/// somebody gave it of them; what routers advertise they say again. What does not come back: next hop objects and the routes
/// through them, addresses with a lifetime, permanent neighbours, and the routes and IPv6 addresses of VLAN interfaces on it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_wiring_set_up(
    wiring: *mut vmbed_wiring,
    name: *const c_char,
    up: bool,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || handle::object(wiring)?.set_up(text(name, "name")?, up))
}

/// Sets the largest packet that an interface carries, in bytes without the Ethernet header. VMBED_ERR_INVALID_ARGUMENT where it
/// cannot. Below 1280 bytes there is no IPv6: its addresses and routes are lost, and come back as in vmbed_wiring_set_up(); its own
/// `net.ipv6.conf` do not.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_wiring_set_mtu(
    wiring: *mut vmbed_wiring,
    name: *const c_char,
    mtu: u32,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || handle::object(wiring)?.set_mtu(text(name, "name")?, mtu))
}

/// Sets an interface's own address, `02:00:00:00:00:01`. Some cards want to be down for it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_wiring_set_mac(
    wiring: *mut vmbed_wiring,
    name: *const c_char,
    mac: *const c_char,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || handle::object(wiring)?.set_mac(text(name, "name")?, text(mac, "mac")?.parse()?))
}
