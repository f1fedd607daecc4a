#![forbid(unsafe_code)]
//! The virtio devices that a configuration asks for, and their places on the bus.

use std::ops::Range;
use std::sync::Arc;

use super::board::Plan;
use super::sources::Sources;
use super::threads::Duty;
use crate::block::Backend;
use crate::config::{BalloonConfig, ConsoleKind, DiskConfig, MacAddress, PciAddress, Uuid};
use crate::console::Console;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::layout;
use crate::reactor::{EventLoop, Place};
use crate::virtio::balloon::{self, Balloon};
use crate::virtio::blk::{Blk, Control};
use crate::virtio::console::ConsolePort;
use crate::virtio::net::{self, Net, Vhost};
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
    /// Where its BAR is: a matter of its place alone, so that it stays when others come and go.
    pub fn bar(&self) -> Range<u64> {
        let start = layout::PCI_MMIO32.start + self.address.index() as u64 * BAR_SIZE;
        start..start + BAR_SIZE
    }
}

/// The free places of the bus.
struct Places {
    taken: Vec<PciAddress>,
}

impl Places {
    /// The one that the configuration names, else the first that nobody named.
    fn take(&mut self, wanted: Option<PciAddress>) -> PciAddress {
        wanted.unwrap_or_else(|| {
            // Validated: there are no more devices than places.
            let address = PciAddress::all().find(|a| !self.taken.contains(a)).unwrap_or(PciAddress::new(31));
            self.taken.push(address);
            address
        })
    }
}

/// Every device, and what disks and cards count.
#[derive(Default)]
pub(super) struct Made {
    pub planned: Vec<Planned>,
    pub disks: Vec<Arc<Control>>,
    pub nets: Vec<Arc<net::Control>>,
    pub balloon: Option<Arc<balloon::Control>>,
}

/// Opens and makes every device: disks on a loop each, since their requests wait for the host; the others
/// share the first loop.
pub(super) fn make(
    plan: &Plan<'_>,
    mut sources: Sources,
    console: &Console,
    loops: &mut Vec<Arc<EventLoop>>,
) -> Result<Made> {
    let config = plan.config;
    let named = config.disks.iter().map(|d| d.pci).chain(config.nets.iter().map(|n| n.pci));
    let named = named.chain(config.balloon.iter().map(|b| b.pci));
    let mut places = Places { taken: named.flatten().collect() };
    let Made { mut planned, mut disks, mut nets, mut balloon } = Made::default();
    let signals = |id: &str| Signals::new(plan.reporter.device(id));
    let mut add = |address: PciAddress, device: Box<dyn VirtioDevice>, signals: Signals| {
        planned.push(Planned { address, device, signals });
    };
    let place = |on: &Arc<EventLoop>| Place::Loop(on.clone(), plan.stop.clone());
    let main_loop = loops[0].clone();
    for (i, disk) in config.disks.iter().enumerate() {
        let id = format!("disk{i}");
        let signals = signals(&id);
        let backends = queues(&id, disk, sources.disk(i, disk)?)?;
        let mut lanes = Vec::with_capacity(backends.len());
        let control = Control::new(&id, disk, &*backends[0], backends.len(), Some(signals.clone()));
        for backend in backends {
            let own = plan.threads.start_loop(loops.len() as u32, Duty::Disk)?;
            loops.push(own.clone());
            lanes.push((backend, place(&own)));
        }
        let control = Arc::new(control);
        disks.push(control.clone());
        add(places.take(disk.pci), Box::new(Blk::new(control, &disk.serial, lanes)), signals);
    }
    let opens = plan.threads.supervisor.as_ref().map_or(Place::Caller, |supervisor| supervisor.outside());
    for (i, card) in config.nets.iter().enumerate() {
        let mac = card.mac.unwrap_or_else(|| stable_mac(config.uuid, i));
        let id = format!("net{i}");
        let signals = signals(&id);
        let control = Arc::new(net::Control::new(&id, mac, card, Some(signals.clone())));
        let mut lanes = Vec::with_capacity(card.queues.into());
        for (pair, backend) in sources.net(i, card, &opens)?.into_iter().enumerate() {
            let on = if pair == 0 {
                main_loop.clone()
            } else {
                let own = plan.threads.start_loop(loops.len() as u32, Duty::Device)?;
                loops.push(own.clone());
                own
            };
            lanes.push((backend, place(&on)));
        }
        let halves = Vhost::open_all(&control, card.vhost, &lanes)?;
        let device = Net::new(control.clone(), lanes).with_kernel(halves);
        nets.push(control);
        add(places.take(card.pci), Box::new(device), signals);
    }
    if let Some(wanted) = &config.balloon {
        let id = "balloon0";
        // Its work is long and comes in bursts: frames and keys need not wait for it.
        let own = plan.threads.start_loop(loops.len() as u32, Duty::Balloon)?;
        loops.push(own.clone());
        let signals = signals(id);
        let control = Arc::new(balloon::Control::new(id, plan.memory.size(), signals.clone())?);
        // What a guest names so it uses again without a word, when the pool may have no page for it.
        let reporting = wanted.reporting && !plan.memory.is_pooled();
        let offered = BalloonConfig { reporting, ..wanted.clone() };
        let device = Balloon::new(id, &offered, control.clone(), place(&own));
        balloon = Some(control);
        add(places.take(wanted.pci), Box::new(device), signals);
    }
    if config.rng {
        add(places.take(None), Box::new(Rng::new("rng0", place(&main_loop))), signals("rng0"));
    }
    if config.console == ConsoleKind::Virtio {
        let device = ConsolePort::new("console0", console.clone(), place(&main_loop))?;
        add(places.take(None), Box::new(device), signals("console0"));
    }
    Ok(Made { planned, disks, nets, balloon })
}

/// A backend for each of the disk's queues.
fn queues(id: &str, config: &DiskConfig, first: Box<dyn Backend>) -> Result<Vec<Box<dyn Backend>>> {
    let mut all = vec![first];
    while all.len() < usize::from(config.queues) {
        let Some(next) = all[0].another()? else {
            let why = format!("{id}: queues is {}: code of yours serves one", config.queues);
            return Err(Error::new(ErrorKind::InvalidArgument, why));
        };
        all.push(next);
    }
    Ok(all)
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
        let mut places = Places { taken: vec![PciAddress::new(1), PciAddress::new(3)] };
        assert_eq!(places.take(Some(PciAddress::new(3))).device, 3);
        assert_eq!((places.take(None).device, places.take(None).device), (2, 4));
        let more: Vec<_> = (0..28).map(|_| places.take(None)).collect();
        assert_eq!(more[26..], [PciAddress::new(31), PciAddress { device: 1, function: 1 }]);
    }
}
