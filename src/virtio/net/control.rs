#![forbid(unsafe_code)]
//! What may be changed of a card, and what is known of it, on any thread while it is served.

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_SPEED_DUPLEX, VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP,
};
use vmm_sys_util::eventfd::EventFd;

use super::filter::Filter;
use super::statistics::{Counters, NetStatistics};
use crate::config::{MacAddress, NetConfig, RateLimit, Vhost};
use crate::error::{Error, ErrorKind, Result};
use crate::net::{NetBackend, Offloads};
use crate::rate::TokenBucket;
use crate::sys::{fd, lock};
use crate::virtio::Signals;

/// What a card cannot be put on, and why.
pub(crate) type Refused = (Error, Vec<Box<dyn NetBackend>>);

/// `struct virtio_net_config` up to `duplex` (5.1.4).
pub(super) const CONFIG_LEN: usize = 17;

/// `duplex`: full.
const FULL: u8 = 1;

/// A card, as all who know of it share it.
pub(crate) struct Control {
    id: String,
    mac: MacAddress,
    filter: Mutex<Filter>,
    /// Changes whenever the filter does: who looks at frames has a copy.
    filters: AtomicU32,
    /// Pairs of queues that the driver uses.
    used: AtomicUsize,
    /// The driver is to tell its networks where it is.
    announcing: AtomicBool,
    /// What networks the card can be put on know, at least.
    offered: AtomicU32,
    /// Another network, until the card takes it; then the one before.
    spare: Mutex<Vec<Box<dyn NetBackend>>>,
    mtu: Option<u16>,
    speed: Option<u32>,
    /// The cable is plugged in.
    up: Arc<AtomicBool>,
    /// Tells the driver of a changed link.
    signals: Option<Signals>,
    begun: Instant,
    pub(super) receive: Limit,
    pub(super) send: Limit,
    /// For each pair of queues.
    pub(super) counters: Vec<Arc<Counters>>,
    /// Whether the kernel is to serve it.
    vhost: Vhost,
    /// Pairs of queues that it serves now.
    by_kernel: AtomicU16,
    /// Rung where the kernel may serve it no more, or again.
    changes: Mutex<Vec<EventFd>>,
}

/// How much may pass one way.
pub(super) struct Limit {
    is_there: AtomicBool,
    bucket: Mutex<TokenBucket>,
}

impl Limit {
    fn new(limit: RateLimit) -> Self {
        let bucket = Mutex::new(TokenBucket::new(limit, Duration::ZERO));
        Self { is_there: AtomicBool::new(!limit.is_none()), bucket }
    }

    fn set(&self, limit: RateLimit, now: Duration) {
        lock(&self.bucket).set(limit, now);
        self.is_there.store(!limit.is_none(), Ordering::SeqCst);
    }
}

impl Control {
    /// Of the card `id` with that address. `signals` tell its driver of a changed link.
    pub fn new(id: &str, mac: MacAddress, config: &NetConfig, signals: Option<Signals>) -> Self {
        Self {
            id: id.to_owned(),
            mac,
            mtu: config.mtu,
            speed: config.speed,
            up: Arc::new(AtomicBool::new(config.link)),
            signals,
            begun: Instant::now(),
            receive: Limit::new(config.receive_rate),
            send: Limit::new(config.send_rate),
            counters: (0..config.queues.max(1)).map(|_| Arc::default()).collect(),
            filter: Mutex::new(Filter::new(mac)),
            used: AtomicUsize::new(1),
            filters: AtomicU32::new(0),
            announcing: AtomicBool::new(false),
            offered: AtomicU32::new(0),
            spare: Mutex::default(),
            vhost: config.vhost,
            by_kernel: AtomicU16::new(0),
            changes: Mutex::default(),
        }
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    /// How many pairs of queues it has.
    pub fn pairs(&self) -> usize {
        self.counters.len()
    }

    pub(super) fn offer(&self, offloads: Offloads) {
        self.offered.store(offloads.bits(), Ordering::SeqCst);
    }

    /// Puts another network ready for the card, for each pair of queues; when it has taken that, the one before is in its place.
    ///
    /// # Errors
    /// `InvalidArgument`, and it back: it is of another size, or does not know what the guest's driver was offered.
    pub fn put_ready(&self, other: Vec<Box<dyn NetBackend>>) -> std::result::Result<(), Refused> {
        match self.takes(&other) {
            Ok(()) => {
                let before = std::mem::replace(&mut *self.spare(), other);
                // With no lock held: it may be the embedder's.
                drop(before);
            }
            Err(error) => return Err((error, other)),
        }
        Ok(())
    }

    fn takes(&self, other: &[Box<dyn NetBackend>]) -> Result<()> {
        let invalid =
            |why: String| Err(Error::new(ErrorKind::InvalidArgument, format!("{}: {why}", self.id)));
        if other.len() != self.counters.len() {
            return invalid(format!(
                "has {} pairs of queues, and the network {}",
                self.counters.len(),
                other.len()
            ));
        }
        let offered = Offloads::from_bits_truncate(self.offered.load(Ordering::SeqCst));
        if let Some(less) = other.iter().map(|one| one.offloads()).find(|known| !known.contains(offered)) {
            let missing = offered - less;
            return invalid(format!(
                "the guest's driver was offered {missing:?} when the VM was built, which the other network does not know"
            ));
        }
        if self.vhost == Vhost::Required && other.iter().any(|one| one.tap().is_none()) {
            return invalid("vhost is required, and the other network is no TAP interface".into());
        }
        Ok(())
    }

    pub fn spare(&self) -> MutexGuard<'_, Vec<Box<dyn NetBackend>>> {
        lock(&self.spare)
    }

    /// What it has carried.
    pub fn statistics(&self) -> NetStatistics {
        let carried = self.counters.iter().fold(NetStatistics::default(), |sum, pair| sum.plus(pair));
        NetStatistics { vhost: self.by_kernel.load(Ordering::SeqCst), ..carried }
    }

    /// Has `bell` rung where the kernel may serve it no more, or again.
    pub(super) fn listen(&self, bell: EventFd) {
        lock(&self.changes).push(bell);
    }

    fn tell(&self) {
        lock(&self.changes).iter().for_each(fd::ring);
    }

    /// The kernel begins to serve a pair of queues, or ends.
    pub(super) fn kernel_serves(&self, begins: bool) {
        if begins {
            self.by_kernel.fetch_add(1, Ordering::SeqCst);
        } else {
            self.by_kernel.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Whether every frame may pass, and nobody has to look at it.
    pub(super) fn is_open(&self) -> bool {
        let limited = |limit: &Limit| limit.is_there.load(Ordering::SeqCst);
        self.is_up() && !limited(&self.receive) && !limited(&self.send)
    }

    /// Plugs the cable in or out, and tells the driver.
    pub fn set_link(&self, up: bool) {
        if self.up.swap(up, Ordering::SeqCst) != up
            && let Some(signals) = &self.signals
        {
            signals.config_changed();
        }
        self.tell();
    }

    /// Has the driver tell the networks that it is on where it can be reached, once it is served. Whether it knows how, nobody is told.
    pub fn announce(&self) {
        self.announcing.store(true, Ordering::SeqCst);
        if let Some(signals) = &self.signals {
            signals.config_changed();
        }
    }

    pub(super) fn announced(&self) {
        self.announcing.store(false, Ordering::SeqCst);
    }

    /// A driver begins, or goes on after a pause, that can say which VLANs it wants, or not.
    pub(super) fn agree(&self, vlans: bool) {
        self.filter(|filter| filter.agree_on_vlans(vlans));
    }

    /// Another driver begins: what the one before has said is forgotten.
    pub(super) fn forget(&self) {
        self.filter(|filter| *filter = Filter::new(self.mac));
        self.announced();
        self.set_used(1);
    }

    /// Whether the driver uses that pair of queues: the first, until it says more.
    pub(super) fn uses(&self, pair: usize) -> bool {
        pair < self.used.load(Ordering::SeqCst)
    }

    pub(super) fn set_used(&self, pairs: usize) {
        self.used.store(pairs, Ordering::SeqCst);
    }

    /// Changes the filter.
    pub(super) fn filter<R>(&self, change: impl FnOnce(&mut Filter) -> R) -> R {
        let mut filter = lock(&self.filter);
        let changed = change(&mut filter);
        self.filters.fetch_add(1, Ordering::Release);
        changed
    }

    /// The filter, where it is another one than that of this number.
    pub(super) fn newer_filter(&self, than: &mut u32) -> Option<Filter> {
        let now = self.filters.load(Ordering::Acquire);
        if std::mem::replace(than, now) == now {
            return None;
        }
        Some(lock(&self.filter).clone())
    }

    /// Whether it is up, for whoever has its buffers.
    pub(super) fn cable(&self) -> &Arc<AtomicBool> {
        &self.up
    }

    pub(super) fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed)
    }

    /// Limits it from now on. Who waits already hears of it within a tenth of a second.
    pub fn set_rates(&self, receive: RateLimit, send: RateLimit) {
        let now = self.begun.elapsed();
        self.receive.set(receive, now);
        self.send.set(send, now);
        self.tell();
    }

    /// How long until another frame may pass; `None` where it may at once.
    pub(super) fn wait(&self, limit: &Limit) -> Option<Duration> {
        if !limit.is_there.load(Ordering::Relaxed) {
            return None;
        }
        lock(&limit.bucket).ready(self.begun.elapsed()).err()
    }

    /// A frame of so many bytes has passed.
    pub(super) fn spend(&self, limit: &Limit, bytes: u64) {
        if limit.is_there.load(Ordering::Relaxed) {
            lock(&limit.bucket).spend(bytes, self.begun.elapsed());
        }
    }

    /// The features that say what is in the configuration.
    pub(super) fn features(&self) -> u64 {
        u64::from(self.mtu.is_some()) << VIRTIO_NET_F_MTU
            | u64::from(self.speed.is_some()) << VIRTIO_NET_F_SPEED_DUPLEX
    }

    pub(super) fn config(&self) -> [u8; CONFIG_LEN] {
        let mut config = [0; CONFIG_LEN];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &lock(&self.filter).mac.0);
        let mut status = if self.is_up() { VIRTIO_NET_S_LINK_UP } else { 0 };
        if self.announcing.load(Ordering::SeqCst) {
            status |= VIRTIO_NET_S_ANNOUNCE;
        }
        put(6, &(status as u16).to_le_bytes());
        if self.counters.len() > 1 {
            put(8, &(self.counters.len() as u16).to_le_bytes());
        }
        put(10, &self.mtu.unwrap_or(0).to_le_bytes());
        if let Some(speed) = self.speed {
            put(12, &speed.to_le_bytes());
            put(16, &[FULL]);
        }
        config
    }
}
