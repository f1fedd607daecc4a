#![forbid(unsafe_code)]
//! A port: what lies ready for its station, what it has carried, and its rules made ready for each frame.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::Clock;
use super::capture::Sink;
use super::options::{Guard, PortOptions, PortVlan};
use super::queue::Queue;
use super::statistics::{Counters, DropReason};
use crate::config::MacAddress;
use crate::config::RateLimit;
use crate::net::ether::Ethernet;
use crate::net::offload::Offloads;
use crate::rate::TokenBucket;
use crate::sys::lock;

/// What stays the same while its options change.
pub(super) struct Port {
    pub number: u16,
    pub name: String,
    pub queue: Queue,
    pub counters: Counters,
    pub rate_in: Limit,
    pub rate_out: Limit,
    pub storm: Limit,
    /// Somebody holds its other end.
    plugged: AtomicBool,
    /// What that one takes undone: [`Offloads`].
    takes: AtomicU32,
}

impl Port {
    pub fn new(number: u16, name: String) -> io::Result<Self> {
        Ok(Self {
            number,
            name,
            queue: Queue::new()?,
            counters: Counters::default(),
            rate_in: Limit::new(),
            rate_out: Limit::new(),
            storm: Limit::new(),
            plugged: AtomicBool::new(false),
            takes: AtomicU32::new(0),
        })
    }

    pub fn set_limits(&self, options: &PortOptions, now: Duration) {
        self.rate_in.set(options.rate_in, now);
        self.rate_out.set(options.rate_out, now);
        self.storm.set(options.storm, now);
    }

    /// Takes its other end; `false` where somebody has it.
    pub fn plug(&self) -> bool {
        let free = !self.plugged.swap(true, Ordering::AcqRel);
        if free {
            self.takes.store(0, Ordering::Relaxed);
            self.queue.open();
        }
        free
    }

    pub fn unplug(&self) {
        self.queue.close();
        self.plugged.store(false, Ordering::Release);
    }

    pub fn is_plugged(&self) -> bool {
        self.plugged.load(Ordering::Acquire)
    }

    pub fn takes(&self) -> Offloads {
        Offloads::from_bits_truncate(self.takes.load(Ordering::Relaxed))
    }

    pub fn set_takes(&self, offloads: Offloads) {
        self.takes.store(offloads.bits(), Ordering::Relaxed);
    }
}

/// A limit that usually is none.
pub(super) struct Limit {
    on: AtomicBool,
    bucket: Mutex<TokenBucket>,
}

impl Limit {
    fn new() -> Self {
        let bucket = TokenBucket::new(RateLimit::NONE, Duration::ZERO);
        Self { on: AtomicBool::new(false), bucket: Mutex::new(bucket) }
    }

    fn set(&self, limit: RateLimit, now: Duration) {
        let mut bucket = lock(&self.bucket);
        bucket.set(limit, now);
        self.on.store(!limit.is_none(), Ordering::Relaxed);
    }

    /// Whether a frame of that length may pass.
    #[inline]
    pub fn pass(&self, length: usize, clock: &Clock) -> bool {
        !self.on.load(Ordering::Relaxed) || self.take(length, clock)
    }

    #[cold]
    fn take(&self, length: usize, clock: &Clock) -> bool {
        lock(&self.bucket).take(length as u64, clock.now()).is_ok()
    }
}

/// A port as forwarding sees it.
#[derive(Clone)]
pub(super) struct Entry {
    pub port: Arc<Port>,
    pub rules: Arc<Rules>,
    /// To which everything here is copied.
    pub mirror: Option<Arc<Port>>,
    /// Others are mirrored to it.
    pub is_monitor: bool,
    pub captures: Vec<Arc<Sink>>,
}

/// [`PortOptions`], quick to ask.
pub(super) struct Rules {
    pub options: PortOptions,
    /// A bit for each VLAN that is carried.
    vlans: [u64; 64],
    /// The VLAN of frames without a tag.
    untagged: Option<u16>,
    access: bool,
}

impl Rules {
    pub fn new(options: PortOptions) -> Self {
        let (tagged, untagged, access): (&[u16], _, _) = match &options.vlan {
            PortVlan::Access(vlan) => (&[], Some(*vlan), true),
            PortVlan::Trunk { vlans, native } => (vlans, *native, false),
        };
        let mut vlans = [0; 64];
        for vlan in tagged.iter().chain(&untagged) {
            vlans[usize::from(vlan / 64 % 64)] |= 1 << (vlan % 64);
        }
        Self { vlans, untagged, access, options }
    }

    pub fn guard(&self) -> &Guard {
        &self.options.guard
    }

    pub fn carries(&self, vlan: u16) -> bool {
        self.vlans[usize::from(vlan / 64 % 64)] & 1 << (vlan % 64) != 0
    }

    /// Whether frames of that VLAN go out with a tag.
    pub fn tags(&self, vlan: u16) -> bool {
        self.untagged != Some(vlan)
    }

    /// The VLAN of a frame that comes in.
    ///
    /// # Errors
    /// It is to be dropped.
    pub fn vlan(&self, frame: &Ethernet) -> Result<u16, DropReason> {
        let further = frame.has_further_tag();
        match frame.tag.map(|tag| tag.vlan) {
            None if further => Err(DropReason::BadTag),
            Some(4095) => Err(DropReason::BadTag),
            // With its priority tag gone, the next one would be the first.
            Some(0) if further => Err(DropReason::NestedTag),
            None | Some(0) => self.untagged.ok_or(DropReason::ForeignVlan),
            Some(vlan) if !self.access && self.carries(vlan) => Ok(vlan),
            Some(_) => Err(DropReason::ForeignVlan),
        }
    }
}

/// All ports at one moment. Who forwards holds one of these, and looks for a newer one before each frame: no
/// lock is taken for it, and a change waits for nobody.
#[derive(Clone, Default)]
pub(super) struct Map {
    /// By number.
    pub ports: Vec<Option<Entry>>,
    /// MAC addresses that guards name, with their ports, sorted.
    owned: Vec<(MacAddress, u16)>,
}

impl Map {
    pub fn get(&self, port: &Port) -> Option<&Entry> {
        // A number is used again; the port is not.
        let entry = self.ports.get(usize::from(port.number))?.as_ref()?;
        std::ptr::eq(&*entry.port, port).then_some(entry)
    }

    pub fn get_mut(&mut self, port: &Port) -> Option<&mut Entry> {
        let entry = self.ports.get_mut(usize::from(port.number))?.as_mut()?;
        std::ptr::eq(&*entry.port, port).then_some(entry)
    }

    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.ports.iter().flatten()
    }

    /// What follows from the entries, after they have changed.
    pub fn settle(&mut self) {
        let monitors: Vec<u16> = self.entries().filter_map(|e| e.mirror.as_ref()).map(|p| p.number).collect();
        let owns = |entry: &Entry| -> Vec<_> {
            entry.rules.guard().macs.iter().map(|mac| (*mac, entry.port.number)).collect()
        };
        self.owned = self.entries().flat_map(owns).collect();
        self.owned.sort_unstable_by_key(|(mac, port)| (mac.0, *port));
        for entry in self.ports.iter_mut().flatten() {
            entry.is_monitor = monitors.contains(&entry.port.number);
        }
    }

    /// Whether `address` may be behind `port`: nobody's guard names it, or that one's does.
    pub fn may_be_at(&self, address: MacAddress, port: u16) -> bool {
        let first = self.owned.partition_point(|(mac, _)| mac.0 < address.0);
        let mut owners = self.owned[first..].iter().take_while(|(mac, _)| *mac == address).peekable();
        owners.peek().is_none() || owners.any(|(_, owner)| *owner == port)
    }
}
