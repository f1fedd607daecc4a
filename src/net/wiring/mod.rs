#![forbid(unsafe_code)]
//! The host's side of guests' networks, through rtnetlink(7): bridges, what is on them, and their VLANs.

use std::fmt;
use std::sync::Mutex;

use self::links::{Kind, Link, Links, Setting, Vlan};
use self::refused::{Refused, of_ours};
use self::undo::{Step, undo};
use super::ether::VLANS;
use super::switch::PortVlan;
use crate::config::MacAddress;
use crate::config::validate::is_interface_name;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::lock;
use crate::sys::log;
use crate::sys::tap;

mod kept;
mod links;
mod options;
mod refused;
mod undo;

pub use options::{BridgeOptions, TapOptions};

/// What this process has made of the host's network, and changed in it: bridges, TAP interfaces and VLAN interfaces, what is on which
/// bridge, and in which VLANs. When it is released, or dropped, all of that is undone, in reverse: what it made is gone, and what was
/// there before is as it was. What others have changed meanwhile stays as they left it, and interfaces that were there before are never
/// deleted. A process that is killed undoes nothing.
///
/// It works in the network namespace of the thread that makes it; its methods are for threads of that namespace. They want the capability
/// `CAP_NET_ADMIN` there, may be called from any of its threads, and do not block for long. A call that fails has changed
/// nothing.
///
/// ```no_run
/// use vmbed::{BridgeOptions, NetConfig, PortVlan, TapOptions, Wiring};
///
/// // vnet0 and vnet1 in VLANs 10 and 20 of br0, which carries both to the host's card.
/// let wiring = Wiring::new()?;
/// wiring.add_bridge("br0", &BridgeOptions::default().filtering())?;
/// wiring.attach("eth0", "br0")?;
/// wiring.set_vlans("eth0", &PortVlan::Trunk { vlans: vec![10, 20], native: Some(1) })?;
/// wiring.add_tap("vnet0", &TapOptions::on("br0").access(10))?;
/// wiring.add_tap("vnet1", &TapOptions::on("br0").access(20))?;
/// let cards = [NetConfig::tap("vnet0"), NetConfig::tap("vnet1")];
/// // ... VMs with these cards ...
/// wiring.release()?;
/// # Ok::<(), vmbed::Error>(())
/// ```
pub struct Wiring(Mutex<State>);

struct State {
    links: Links,
    /// What has been done, the first first.
    done: Vec<Step>,
}

impl Wiring {
    /// Nothing yet.
    ///
    /// # Errors
    /// The kernel has no rtnetlink for us ([`Unsupported`](ErrorKind::Unsupported), or a security module).
    pub fn new() -> Result<Self> {
        let links = Links::open().map_err(|e| Error::os("the host's network: opening rtnetlink", e))?;
        Ok(Self(Mutex::new(State { links, done: Vec::new() })))
    }

    /// Makes a bridge, and sets it up.
    ///
    /// # Errors
    /// [`Busy`](ErrorKind::Busy): there is an interface of that name. [`Unsupported`](ErrorKind::Unsupported): the kernel has no bridges, or
    /// none that tell VLANs apart. [`PermissionDenied`](ErrorKind::PermissionDenied), [`InvalidArgument`](ErrorKind::InvalidArgument).
    pub fn add_bridge(&self, name: &str, options: &BridgeOptions) -> Result<()> {
        let who = format!("bridge '{name}'");
        self.whole(|state| {
            let link = state.make(&who, name, &Kind::Bridge { filters: options.vlan_filtering })?;
            // An older kernel makes it, and takes no notice of what it does not know.
            if options.vlan_filtering && link.filters != Some(true) {
                return Err(Refused::NoFiltering.at(&who, "making it tell VLANs apart"));
            }
            state.settings(&who, &link, options.mtu, options.mac, None)
        })
    }

    /// Makes a TAP interface, which a card of a VM's can be on ([`NetConfig::tap`](crate::NetConfig::tap)), puts it on a bridge if so told,
    /// and sets it up.
    ///
    /// # Errors
    /// As [`add_bridge`](Self::add_bridge), and as [`attach`](Self::attach).
    pub fn add_tap(&self, name: &str, options: &TapOptions) -> Result<()> {
        let who = format!("tap '{name}'");
        self.whole(|state| {
            state.is_free(&who, name)?;
            let made = tap::make(name, options.multi_queue, options.owner, options.group);
            made.map_err(|e| Refused::of_tap(&e).at(&who, "making it").with_source(e))?;
            // Where the call fails, it goes whatever its owner wants.
            let link = state.has_made(&who, name)?;
            let bridge = options.bridge.as_deref().map(|bridge| state.bridge(&who, bridge)).transpose()?;
            if let Some(bridge) = &bridge {
                state.change(&who, &link, Setting::Master(Some(bridge.index)))?;
            }
            if let Some(vlans) = &options.vlans {
                let link = state.link(&who, name)?;
                state.port_vlans(&who, &link, vlans)?;
            }
            state.settings(&who, &link, options.mtu, options.mac, bridge.as_ref())?;
            if options.persistent {
                state.done.iter_mut().for_each(|step| step.stays(link.index));
            }
            Ok(())
        })
    }

    /// Makes an interface that carries VLAN `id`, 1 to 4094, of another one, which is there already, and sets it up.
    ///
    /// # Errors
    /// As [`add_bridge`](Self::add_bridge), and [`NotFound`](ErrorKind::NotFound) for the other one.
    pub fn add_vlan(&self, name: &str, parent: &str, id: u16) -> Result<()> {
        let who = format!("VLAN interface '{name}'");
        if !VLANS.contains(&id) {
            return Err(of_ours(ErrorKind::InvalidArgument, &who, &format!("VLAN {id}: 1 to 4094")));
        }
        self.whole(|state| {
            let parent = state.link(&who, parent)?;
            let link = state.make(&who, name, &Kind::Vlan { id, parent: &parent })?;
            state.settings(&who, &link, None, None, None)
        })
    }

    /// Deletes an interface that this made.
    ///
    /// # Errors
    /// [`InvalidArgument`](ErrorKind::InvalidArgument): it is none of them.
    pub fn remove(&self, name: &str) -> Result<()> {
        let who = format!("interface '{name}'");
        self.whole(|state| {
            let index = state.link(&who, name)?.index;
            if !state.is_ours(index) {
                return Err(of_ours(ErrorKind::InvalidArgument, &who, "was there before, and stays"));
            }
            state.links.delete(index).map_err(|e| Refused::of(&e.error).because(&who, "deleting it", e))?;
            state.done.retain(|step| step.index() != index);
            Ok(())
        })
    }

    /// Makes an interface a port of a bridge. (A bridge to which nobody has given an address has one of its ports': the kernel changes it when
    /// ports come and go.)
    ///
    /// # Errors
    /// [`InvalidState`](ErrorKind::InvalidState): it is one of another bridge: [`detach`](Self::detach) it first.
    /// [`NotFound`](ErrorKind::NotFound), [`InvalidArgument`](ErrorKind::InvalidArgument): there is no such interface, or it is no bridge.
    pub fn attach(&self, port: &str, bridge: &str) -> Result<()> {
        let who = format!("interface '{port}'");
        self.whole(|state| {
            let bridge = state.bridge(&who, bridge)?;
            let link = state.link(&who, port)?;
            match link.master {
                Some(master) if master == bridge.index => return Ok(()),
                Some(master) => {
                    let name =
                        state.links.numbered(master).map_or_else(|_| "another".into(), |link| link.name);
                    let what = format!("is a port of '{name}' already: detach it first");
                    return Err(of_ours(ErrorKind::InvalidState, &who, &what));
                }
                None => {}
            }
            state.change(&who, &link, Setting::Master(Some(bridge.index)))
        })
    }

    /// Takes a port from its bridge; nothing where it is on none. When that is undone, it has its settings there again (cost, priority,
    /// flooding, isolation and the like), its VLANs, and the addresses that somebody has put behind it for good (`bridge fdb`); not
    /// static groups (`bridge mdb`), settings of single VLANs and tunnels (`bridge vlan set`), and what the bridge had learned.
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound).
    pub fn detach(&self, port: &str) -> Result<()> {
        let who = format!("interface '{port}'");
        self.whole(|state| {
            let link = state.link(&who, port)?;
            let Link { index, master: Some(master), .. } = link else { return Ok(()) };
            if state.is_ours(index) {
                return state.set(&who, index, Setting::Master(None));
            }
            let port = state
                .links
                .port(&link)
                .map_err(|e| Refused::of(&e.error).because(&who, "reading what it is on its bridge", e))?;
            state.set(&who, index, Setting::Master(None))?;
            state.done.push(Step::Taken { index, master, port });
            Ok(())
        })
    }

    /// Says which VLANs a port of a bridge is in, or the bridge itself: as the host's own interface on it. The bridge tells VLANs apart
    /// ([`BridgeOptions::filtering`]).
    ///
    /// # Errors
    /// [`InvalidState`](ErrorKind::InvalidState): it is on no bridge, or on one that does not.
    pub fn set_vlans(&self, port: &str, vlans: &PortVlan) -> Result<()> {
        let who = format!("interface '{port}'");
        self.whole(|state| {
            let link = state.link(&who, port)?;
            state.port_vlans(&who, &link, vlans)
        })
    }

    /// Sets an interface up or down. One that is set down loses its routes and IPv6 addresses. When that is undone, it has again what
    /// somebody gave it of them; what routers advertise they say again. What does not come back: next hop objects and the routes
    /// through them, addresses with a lifetime, permanent neighbours, and the routes and IPv6 addresses of VLAN interfaces on it.
    ///
    /// # Errors
    /// [`NotFound`](ErrorKind::NotFound), [`PermissionDenied`](ErrorKind::PermissionDenied).
    pub fn set_up(&self, name: &str, up: bool) -> Result<()> {
        self.setting(name, Setting::Up(up))
    }

    /// Sets the largest packet that an interface carries, in bytes without the Ethernet header. A bridge's is that of its smallest
    /// port unless it is set. Below 1280 bytes there is no IPv6: its addresses and routes are lost, and come back as in
    /// [`set_up`](Self::set_up); its own `net.ipv6.conf` do not.
    ///
    /// # Errors
    /// [`InvalidArgument`](ErrorKind::InvalidArgument): more than the interface can, or fewer.
    pub fn set_mtu(&self, name: &str, mtu: u32) -> Result<()> {
        self.setting(name, Setting::Mtu(mtu))
    }

    /// Sets an interface's own address. Some cards want to be down for it.
    ///
    /// # Errors
    /// [`InvalidArgument`](ErrorKind::InvalidArgument): it is one of a group.
    pub fn set_mac(&self, name: &str, mac: MacAddress) -> Result<()> {
        self.setting(name, Setting::Mac(mac))
    }

    fn setting(&self, name: &str, setting: Setting) -> Result<()> {
        let who = format!("interface '{name}'");
        self.whole(|state| {
            let link = state.link(&who, name)?;
            state.change(&who, &link, setting)
        })
    }

    /// Undoes everything. Dropping it does the same, and logs what cannot be undone.
    ///
    /// # Errors
    /// The first thing that could not be undone; the others were.
    pub fn release(self) -> Result<()> {
        self.undo_all()
    }

    pub(crate) fn undo_all(&self) -> Result<()> {
        let mut state = lock(&self.0);
        let State { links, done } = &mut *state;
        undo(links, done, 0)
    }

    /// All of it, or nothing.
    fn whole(&self, f: impl FnOnce(&mut State) -> Result<()>) -> Result<()> {
        let mut state = lock(&self.0);
        let before = state.done.len();
        let result = f(&mut state);
        if result.is_err() {
            let State { links, done } = &mut *state;
            if let Err(error) = undo(links, done, before) {
                log::warn!("{error}");
            }
        }
        result
    }
}

impl Drop for Wiring {
    fn drop(&mut self) {
        if let Err(error) = self.undo_all() {
            log::warn!("{error}");
        }
    }
}

impl fmt::Debug for Wiring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wiring").field("done", &lock(&self.0).done).finish_non_exhaustive()
    }
}

impl State {
    fn link(&mut self, who: &str, name: &str) -> Result<Link> {
        if !is_interface_name(name) {
            let what =
                format!("'{name}': an interface's name has 1 to 15 characters, of which none is / or :");
            return Err(of_ours(ErrorKind::InvalidArgument, who, &what));
        }
        let found = self.links.named(name);
        found.map_err(|e| match e.error.raw_os_error() {
            Some(libc::ENODEV) => {
                of_ours(ErrorKind::NotFound, who, &format!("there is no interface '{name}' here"))
            }
            _ => Refused::of(&e.error).because(who, &format!("looking for '{name}'"), e),
        })
    }

    fn bridge(&mut self, who: &str, name: &str) -> Result<Link> {
        let link = self.link(who, name)?;
        if link.filters.is_none() {
            return Err(of_ours(ErrorKind::InvalidArgument, who, &format!("'{name}' is no bridge")));
        }
        Ok(link)
    }

    fn is_free(&mut self, who: &str, name: &str) -> Result<()> {
        match self.link(who, name) {
            Ok(_) => Err(of_ours(ErrorKind::Busy, who, "there is an interface of that name already")),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn is_ours(&self, index: u32) -> bool {
        self.done.iter().any(|step| matches!(step, Step::Made { index: made, .. } if *made == index))
    }

    fn make(&mut self, who: &str, name: &str, kind: &Kind<'_>) -> Result<Link> {
        self.is_free(who, name)?;
        let missing = match kind {
            Kind::Bridge { filters: false } => Refused::NoModule("bridge"),
            Kind::Bridge { filters: true } => Refused::NoFiltering,
            Kind::Vlan { .. } => Refused::NoModule("8021q"),
        };
        let made = self.links.add(name, kind);
        made.map_err(|e| Refused::of_kind(&e.error, missing).because(who, "making it", e))?;
        self.has_made(who, name)
    }

    /// Looks at what it has just made: from here on it is undone.
    fn has_made(&mut self, who: &str, name: &str) -> Result<Link> {
        let link = self.link(who, name).or_else(|first| self.link(who, name).map_err(|_| first))?;
        self.done.push(Step::made(&link));
        Ok(link)
    }

    /// What is common to everything that is made.
    fn settings(
        &mut self,
        who: &str,
        link: &Link,
        mtu: Option<u32>,
        mac: Option<MacAddress>,
        bridge: Option<&Link>,
    ) -> Result<()> {
        // A port with a smaller one would change its bridge's.
        let mtu = mtu.or(bridge.map(|bridge| bridge.mtu));
        let all = [mtu.map(Setting::Mtu), mac.map(Setting::Mac), Some(Setting::Up(true))];
        all.into_iter().flatten().try_for_each(|setting| self.change(who, link, setting))
    }

    fn change(&mut self, who: &str, link: &Link, setting: Setting) -> Result<()> {
        let before = setting.now(link);
        if before == Some(setting) {
            return Ok(());
        }
        let Link { index, .. } = *link;
        // What is deleted in the end need not be put right before.
        if self.is_ours(index) {
            return self.set(who, index, setting);
        }
        let paths = setting
            .takes_paths()
            .then(|| self.links.paths(index))
            .transpose()
            .map_err(|e| Refused::of(&e.error).because(who, "reading its addresses and routes", e))?;
        self.set(who, index, setting)?;
        self.done.extend(paths.map(|paths| Step::Paths { index, paths }));
        self.done.extend(before.map(|before| Step::Set { index, before, after: setting }));
        Ok(())
    }

    fn set(&mut self, who: &str, index: u32, setting: Setting) -> Result<()> {
        self.links.set(index, setting).map_err(|e| Refused::of(&e.error).because(who, &said(setting), e))
    }

    fn vlans(&mut self, who: &str, link: &Link) -> Result<Vec<Vlan>> {
        self.links.vlans(link.index).map_err(|e| Refused::of(&e.error).because(who, "reading its VLANs", e))
    }

    fn port_vlans(&mut self, who: &str, link: &Link, vlans: &PortVlan) -> Result<()> {
        let wanted = listed(who, vlans)?;
        let filters = match (link.filters, link.master) {
            (Some(filters), _) => filters,
            (None, None) => return Err(of_ours(ErrorKind::InvalidState, who, "is on no bridge")),
            (None, Some(master)) => {
                let bridge = self.links.numbered(master);
                bridge.map_err(|e| Refused::of(&e.error).because(who, "looking at its bridge", e))?.filters
                    == Some(true)
            }
        };
        if !filters {
            let what = "its bridge does not tell VLANs apart: BridgeOptions::filtering (ip link set … type bridge vlan_filtering 1)";
            return Err(of_ours(ErrorKind::InvalidState, who, what));
        }
        let before = self.vlans(who, link)?;
        if let Err(e) = self.links.set_vlans(link, &before, &wanted) {
            // Some of them, perhaps.
            if let Ok(now) = self.vlans(who, link) {
                let _ = self.links.set_vlans(link, &now, &before);
            }
            return Err(Refused::of(&e.error).because(who, "setting its VLANs", e));
        }
        if !self.is_ours(link.index) {
            self.done.push(Step::Vlans { index: link.index, before, after: wanted });
        }
        Ok(())
    }
}

fn said(setting: Setting) -> String {
    match setting {
        Setting::Up(true) => "setting it up".to_owned(),
        Setting::Up(false) => "setting it down".to_owned(),
        Setting::Mtu(mtu) => format!("an MTU of {mtu}"),
        Setting::Mac(mac) => format!("the address {mac}"),
        Setting::Master(Some(_)) => "putting it on the bridge".to_owned(),
        Setting::Master(None) => "taking it from its bridge".to_owned(),
    }
}

fn listed(who: &str, vlans: &PortVlan) -> Result<Vec<Vlan>> {
    let mut all = match vlans {
        PortVlan::Access(id) => vec![Vlan { id: *id, native: true, untagged: true }],
        PortVlan::Trunk { vlans, native } => {
            let tagged = vlans.iter().filter(|id| Some(**id) != *native);
            let tagged = tagged.map(|id| Vlan { id: *id, native: false, untagged: false });
            let native = native.map(|id| Vlan { id, native: true, untagged: true });
            tagged.chain(native).collect()
        }
    };
    if let Some(vlan) = all.iter().find(|vlan| !VLANS.contains(&vlan.id)) {
        return Err(of_ours(ErrorKind::InvalidArgument, who, &format!("VLAN {}: 1 to 4094", vlan.id)));
    }
    all.sort_unstable();
    all.dedup();
    Ok(all)
}
