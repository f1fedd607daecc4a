#![forbid(unsafe_code)]
//! The virtio devices that a configuration asks for, and their places on the bus.

use std::ops::Range;
use std::sync::Arc;

use super::board::Plan;
use crate::block::RawDisk;
use crate::config::{ConsoleKind, DiskConfig, MacAddress, NetConfig, PciAddress, Uuid};
use crate::console::Console;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::layout;
use crate::net::switch::SwitchPort;
use crate::net::{NetBackend, Tap};
use crate::reactor::{EventLoop, Place};
use crate::virtio::blk::Blk;
use crate::virtio::console::ConsolePort;
use crate::virtio::net::Net;
use crate::virtio::rng::Rng;
use crate::virtio::transport::pci::BAR_SIZE;
use crate::virtio::{Signals, VirtioDevice};

/// A device with its place.
pub(super) struct Planned {
    pub address: PciAddress,
    pub device: Box<dyn VirtioDevice>,
    pub signals: Signals,
}

impl Planned {
    /// Where its BAR is: a function of its place alone, so that it stays when others come and go.
    pub fn bar(&self) -> Range<u64> {
        let start = layout::PCI_MMIO32.start + u64::from(self.address.device) * BAR_SIZE;
        start..start + BAR_SIZE
    }
}

/// The free places of the bus.
struct Places {
    taken: Vec<u8>,
}

impl Places {
    /// The one that the configuration names, else the first that nobody named.
    fn take(&mut self, wanted: Option<PciAddress>) -> PciAddress {
        wanted.unwrap_or_else(|| {
            // Validated: there are no more devices than places.
            let device = (1..32).find(|d| !self.taken.contains(d)).unwrap_or(31);
            self.taken.push(device);
            PciAddress { device }
        })
    }
}

/// Opens and makes every device: disks on a loop each, since their requests wait for the host; the others
/// share the first loop.
pub(super) fn make(
    plan: &Plan<'_>,
    console: &Console,
    loops: &mut Vec<Arc<EventLoop>>,
) -> Result<Vec<Planned>> {
    let config = plan.config;
    let named = config.disks.iter().map(|d| d.pci).chain(config.nets.iter().map(|n| n.pci));
    let mut places = Places { taken: named.flatten().map(|a| a.device).collect() };
    let mut planned = Vec::new();
    let mut add = |address: PciAddress, device: Box<dyn VirtioDevice>| {
        let signals = Signals::new(plan.reporter.device(device.id()));
        planned.push(Planned { address, device, signals });
    };
    let main_loop = loops[0].clone();
    for (i, disk) in config.disks.iter().enumerate() {
        let own = plan.threads.start_loop(loops.len() as u32)?;
        loops.push(own.clone());
        add(places.take(disk.pci), disk_device(i, disk, own, plan)?);
    }
    for (i, net) in config.nets.iter().enumerate() {
        let mac = net.mac.unwrap_or_else(|| stable_mac(config.uuid, i));
        add(places.take(net.pci), net_device(i, net, mac, main_loop.clone(), plan)?);
    }
    if config.rng {
        add(places.take(None), Box::new(Rng::new("rng0", Place::Loop(main_loop.clone(), plan.stop.clone()))));
    }
    if config.console == ConsoleKind::Virtio {
        let place = Place::Loop(main_loop, plan.stop.clone());
        add(places.take(None), Box::new(ConsolePort::new("console0", console.clone(), place)));
    }
    Ok(planned)
}

/// A locally administered address that follows from the VM's identity and the card's number
/// (FNV-1a, 64 bit: it need not be secret, only spread).
fn stable_mac(uuid: Option<Uuid>, index: usize) -> MacAddress {
    let bytes = uuid.unwrap_or(Uuid([0; 16])).0;
    let index = (index as u64).to_le_bytes();
    let hash = bytes
        .iter()
        .chain(&index)
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3));
    let [a, b, c, d, e, ..] = hash.to_le_bytes();
    MacAddress([0x02, a, b, c, d, e])
}

/// A raw image on its own loop.
fn disk_device(
    index: usize,
    disk: &DiskConfig,
    own: Arc<EventLoop>,
    plan: &Plan<'_>,
) -> Result<Box<dyn VirtioDevice>> {
    let id = format!("disk{index}");
    let backend = RawDisk::open(&id, &disk.path, disk.readonly)?;
    Ok(Box::new(Blk::new(&id, &disk.serial, Box::new(backend), Place::Loop(own, plan.stop.clone()))))
}

/// Whether each card has one network, before any is opened.
///
/// # Errors
/// `InvalidArgument` with the cards that have none or two, and ports without a card.
pub(super) fn check_networks(nets: &[NetConfig], ports: &[(usize, SwitchPort)]) -> Result<()> {
    let invalid = |why: String| Err(Error::new(ErrorKind::InvalidArgument, why));
    if let Some((index, port)) = ports.iter().find(|(index, _)| *index >= nets.len()) {
        let why = format!("port '{}' is for net{index}, but there are {} cards", port.name(), nets.len());
        return invalid(why);
    }
    for (i, net) in nets.iter().enumerate() {
        let own: Vec<_> = ports.iter().filter(|(index, _)| *index == i).collect();
        match (&net.tap, &own[..]) {
            (Some(_), []) | (None, [_]) => {}
            (None, []) => {
                return invalid(format!(
                    "net{i} has no network: name a TAP interface, or attach a port (net_port)"
                ));
            }
            (Some(tap), [(_, port), ..]) => {
                return invalid(format!("net{i} is on TAP interface '{tap}' and on port '{}'", port.name()));
            }
            (None, [(_, a), (_, b), ..]) => {
                return invalid(format!("net{i} is on ports '{}' and '{}'", a.name(), b.name()));
            }
        }
    }
    Ok(())
}

/// A card on a switch's port, or on a TAP interface that exists.
fn net_device(
    index: usize,
    net: &NetConfig,
    mac: MacAddress,
    shared: Arc<EventLoop>,
    plan: &Plan<'_>,
) -> Result<Box<dyn VirtioDevice>> {
    let id = format!("net{index}");
    let port = plan.ports.iter().find(|(number, _)| *number == index);
    let backend: Box<dyn NetBackend> = match (port, &net.tap) {
        (Some((_, port)), _) => Box::new(port.plug().map_err(|e| e.context(id.clone()))?),
        (None, Some(tap)) => Box::new(Tap::open(&id, tap)?),
        (None, None) => return Err(Error::new(ErrorKind::InvalidArgument, format!("{id} has no network"))),
    };
    Ok(Box::new(Net::new(&id, mac, backend, Place::Loop(shared, plan.stop.clone()))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_is_stable_local_and_its_own() {
        let uuid = |n| Some(Uuid([n; 16]));
        let mac = stable_mac(uuid(1), 0);
        assert_eq!(mac, stable_mac(uuid(1), 0));
        assert_ne!(mac, stable_mac(uuid(1), 1));
        assert_ne!(mac, stable_mac(uuid(2), 0));
        assert_eq!(mac.0[0] & 3, 2, "locally administered, unicast");
    }

    #[test]
    fn explicit_places_are_kept_and_the_others_fill_the_gaps() {
        let mut places = Places { taken: vec![1, 3] };
        assert_eq!(places.take(Some(PciAddress { device: 3 })).device, 3);
        assert_eq!((places.take(None).device, places.take(None).device), (2, 4));
    }
}
