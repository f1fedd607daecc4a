#![forbid(unsafe_code)]
//! A learning VLAN switch inside of this process: cards of VMs and networks of the host on its ports, no
//! privilege needed.
//!
//! # How a frame travels
//!
//! 1. A card's worker sends it on its own thread. The first bytes are copied and parsed, once (`ether`, `packet`,
//!    `offload`); everything is decided by that copy (`forward`).
//! 2. Limits, tags and the port's guard (`guard`) let it pass or drop it, with a reason that is counted.
//! 3. Its source is remembered, its destination looked up (`table`).
//! 4. For each port that it goes to, it is copied into buffers that the card there has posted (`landing`), or, where it has none or
//!    another frame waits before, into one of the port's queue (`queue`): tagged or not, with what its vnet header left to do, or done
//!    where the receiver cannot.
//! 5. The receiver's worker hears of it by the queue's eventfd, and hands it to its driver, or copies it into its guest's memory first.
//!
//! # Who waits for whom
//!
//! Nobody holds a lock while a frame is copied, and a change of ports or options stops no forwarding: who
//! forwards has a snapshot of all ports, and takes a new one when the switch's generation has changed. The
//! table's readers take no lock. A queue's lock is held to put in a buffer or to take one out. A limit's lock
//! is held for one subtraction, and only where there is a limit. A receiver that does not receive has a full
//! queue, and frames for it are dropped there; its senders never wait. Nor does it wait for a sender that is stopped
//! amid a frame: others' come before it. A card that takes its buffers back waits for those who are copying into them,
//! for a while.

use std::fmt;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::offload::Offloads;
use super::{NetBackend, Stream, Tap};
use crate::error::{Error, ErrorKind, Result};
use crate::events::StopLine;
use crate::reactor::{Attached, EventLoop, Place};
use crate::sys::clock::coarse_milliseconds;
use crate::sys::log;
use crate::sys::{lock, thread};
pub(crate) use backend::Plug;
pub use capture::{Capture, CaptureSummary};
pub(crate) use landing::{Landed, Next};
pub use options::{Guard, IpPrefix, PortOptions, PortVlan, SwitchOptions};
use port::{Entry, Map, Port, Rules};
pub use queue::Queue as PortQueue;
pub use statistics::{DropReason, PortStatistics, Traffic};
use table::Table;
use uplink::Uplink;

mod backend;
mod capture;
mod forward;
mod guard;
mod landing;
mod options;
mod pcapng;
mod port;
mod queue;
mod statistics;
mod table;
mod uplink;

/// Ports of one switch.
const MAX_PORTS: usize = 1024;

/// A learning Ethernet switch with VLANs (802.1Q), inside of the process: it needs no privilege, and nothing of
/// the host's network but for its uplinks.
///
/// VMs are put on its ports with [`VmBuilder::net_port`](crate::VmBuilder::net_port). A clone is another handle.
/// VMs go on reaching each other when all handles are gone; uplinks and captures end with the last one of
/// the switch or of its ports.
///
/// ```no_run
/// use vmbed::{Guard, Host, LinuxBoot, NetConfig, PortOptions, Switch, SwitchOptions, VmConfig};
///
/// let switch = Switch::new(&SwitchOptions::default())?;
/// let web = switch.add_port("web", &PortOptions::access(10))?;
/// let guard = Guard::new("52:54:00:00:00:02".parse()?, ["192.0.2.2".parse()?]);
/// let db = switch.add_port("db", &PortOptions::access(10).guard(guard))?;
/// switch.add_tap("uplink", "tap0", &PortOptions::trunk([10, 20]))?;
///
/// let host = Host::open()?;
/// let mut config = VmConfig::linux(LinuxBoot::new("vmlinuz").initrd("initrd.img"));
/// config.nets.push(NetConfig::attached());
/// let first = host.builder(config.clone()).net_port(0, &web).build()?;
/// config.nets[0].mac = Some("52:54:00:00:00:02".parse()?);
/// let second = host.builder(config).net_port(0, &db).build()?;
/// first.start()?;
/// second.start()?;
/// for (reason, frames) in db.statistics().drops() {
///     println!("{reason}: {frames}");
/// }
/// # Ok::<(), vmbed::Error>(())
/// ```
#[derive(Clone)]
pub struct Switch {
    owner: Arc<Owner>,
}

/// What ends with the last handle.
struct Owner {
    shared: Arc<Shared>,
    /// The loop of the uplinks, once there is one, and they by their ports' numbers.
    uplinks: Mutex<Uplinks>,
}

#[derive(Default)]
struct Uplinks {
    event_loop: Option<Arc<EventLoop>>,
    attached: Vec<(Arc<Port>, Attached<Uplink>)>,
}

/// What forwarding needs.
pub(super) struct Shared {
    map: Mutex<Arc<Map>>,
    /// Counts the maps.
    generation: AtomicU64,
    table: Table,
    clock: Clock,
    /// Where to look for the number of the next port.
    next: AtomicU64,
}

/// Time since the switch was made.
enum Clock {
    Real {
        start: Instant,
        /// The same moment, by the coarse clock.
        coarse: u64,
    },
    #[cfg(test)]
    Manual(AtomicU64),
}

impl Clock {
    fn now(&self) -> Duration {
        match self {
            Self::Real { start, .. } => start.elapsed(),
            #[cfg(test)]
            Self::Manual(milliseconds) => Duration::from_millis(milliseconds.load(Ordering::Relaxed)),
        }
    }

    /// The same, a tick late at most.
    fn milliseconds(&self) -> u64 {
        match self {
            Self::Real { coarse, .. } => coarse_milliseconds().saturating_sub(*coarse),
            #[cfg(test)]
            Self::Manual(milliseconds) => milliseconds.load(Ordering::Relaxed),
        }
    }
}

impl Shared {
    fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// All ports as they are now, and the generation of that.
    fn map(&self) -> (Arc<Map>, u64) {
        let map = lock(&self.map);
        (map.clone(), self.generation())
    }

    fn change<R>(&self, f: impl FnOnce(&mut Map) -> R) -> R {
        let mut map = lock(&self.map);
        let mut new = Map::clone(&map);
        let result = f(&mut new);
        new.settle();
        *map = Arc::new(new);
        self.generation.fetch_add(1, Ordering::Release);
        result
    }
}

impl Switch {
    /// A switch without ports. It has no thread before it has an uplink or a capture.
    ///
    /// # Errors
    /// `InvalidArgument` with every bad option.
    pub fn new(options: &SwitchOptions) -> Result<Self> {
        let clock = Clock::Real { start: Instant::now(), coarse: coarse_milliseconds() };
        Self::with_clock(options, clock)
    }

    /// One whose time stands still but for [`advance`](Self::advance).
    ///
    /// # Errors
    /// As for `new`.
    #[cfg(test)]
    pub(crate) fn with_manual_clock(options: &SwitchOptions) -> Result<Self> {
        Self::with_clock(options, Clock::Manual(AtomicU64::new(0)))
    }

    #[cfg(test)]
    pub(crate) fn advance(&self, time: Duration) {
        if let Clock::Manual(milliseconds) = &self.owner.shared.clock {
            milliseconds.fetch_add(time.as_millis() as u64, Ordering::Relaxed);
        }
    }

    fn with_clock(options: &SwitchOptions, clock: Clock) -> Result<Self> {
        options.check()?;
        let shared = Arc::new(Shared {
            map: Mutex::default(),
            generation: AtomicU64::new(0),
            table: Table::new(options.addresses, options.ageing),
            clock,
            next: AtomicU64::new(0),
        });
        Ok(Self { owner: Arc::new(Owner { shared, uplinks: Mutex::default() }) })
    }

    /// A new port, with nothing on it. `name` is for errors, captures and people.
    ///
    /// # Errors
    /// `InvalidArgument` with every bad option; `Exhausted` beyond 1024 ports, or where the process has no file
    /// descriptor left.
    pub fn add_port(&self, name: impl Into<String>, options: &PortOptions) -> Result<SwitchPort> {
        let name = name.into();
        options.check().map_err(|e| e.context(format!("port '{name}'")))?;
        let shared = &self.owner.shared;
        let port = shared.change(|map| {
            let full =
                || Error::new(ErrorKind::Exhausted, format!("port '{name}': a switch has {MAX_PORTS} ports"));
            // Numbers are used again as late as possible: a frame that is on its way may still speak of one.
            let first = shared.next.load(Ordering::Relaxed) as usize;
            let free = |n: &usize| map.ports.get(*n).is_none_or(Option::is_none);
            let number = (first..first + MAX_PORTS).map(|n| n % MAX_PORTS).find(free).ok_or_else(full)?;
            shared.next.store(number as u64 + 1, Ordering::Relaxed);
            let port = Port::new(number as u16, name.clone());
            let port =
                Arc::new(port.map_err(|e| Error::os(format!("port '{name}': creating an eventfd"), e))?);
            port.set_limits(options, shared.clock.now());
            if map.ports.len() <= number {
                map.ports.resize(number + 1, None);
            }
            let rules = Arc::new(Rules::new(options.clone()));
            let entry =
                Entry { port: port.clone(), rules, mirror: None, is_monitor: false, captures: Vec::new() };
            map.ports[number] = Some(entry);
            Ok::<_, Error>(port)
        })?;
        shared.table.forget_elsewhere(&options.guard.macs, port.number);
        Ok(SwitchPort { owner: self.owner.clone(), port })
    }

    /// A new port with a TAP interface of the host on it, which must exist, have a single queue and be in nobody
    /// else's use. Frames to it keep their segmentation and checksum offloads, as far as the host's kernel knows them, which does them
    /// then; frames from it come with theirs, which the switch does for whom does not. One thread, `vmbed-switch`, serves all uplinks
    /// of a switch. An interface that goes away is looked for once a second; meanwhile, and while it is down, frames to it are counted
    /// at the port ([`DropReason::Uplink`]). There is no event, since a switch is no VM's: only a line in the log when it goes away.
    ///
    /// # Errors
    /// As for [`add_port`](Self::add_port); `NotFound`, `Busy` or `PermissionDenied` for the interface.
    pub fn add_tap(&self, name: impl Into<String>, tap: &str, options: &PortOptions) -> Result<SwitchPort> {
        let name = name.into();
        let tap = Tap::open(&name, tap)?;
        let takes = tap.offloads();
        self.add_uplink(name, Box::new(tap), takes, options)
    }

    /// A new port with a network in user space on it, which listens on the Unix socket `path` and speaks the protocol of QEMU's `-netdev
    /// stream`, as passt does: a way out that needs no privilege. It is looked for once a second where it goes away. Frames to it are
    /// complete, with their checksums, and no longer than its stations' MTU: it knows no offloads.
    ///
    /// # Errors
    /// As for [`add_port`](Self::add_port); nobody listens there.
    pub fn add_stream(
        &self,
        name: impl Into<String>,
        path: impl Into<PathBuf>,
        options: &PortOptions,
    ) -> Result<SwitchPort> {
        let name = name.into();
        let stream = Stream::connect(&name, path.into())?;
        self.add_uplink(name, Box::new(stream), Offloads::empty(), options)
    }

    /// A new port with what is behind a descriptor on it: a connected Unix socket of the kind `SOCK_SEQPACKET` or `SOCK_DGRAM`, on which a
    /// message is a frame as [`NetBackend`] describes it; one of the kind `SOCK_STREAM`, as [`add_stream`](Self::add_stream) has it; or a
    /// queue of a TAP interface. Frames to a socket are complete, with their checksums.
    ///
    /// # Errors
    /// As for [`add_port`](Self::add_port); it is none of these.
    pub fn add_fd(
        &self,
        name: impl Into<String>,
        fd: impl Into<OwnedFd>,
        options: &PortOptions,
    ) -> Result<SwitchPort> {
        let name = name.into();
        let network = crate::net::adopt(&name, fd.into(), &Place::Caller)?;
        let takes = network.offloads();
        self.add_uplink(name, network, takes, options)
    }

    /// A new port with another network on it, which takes frames with those offloads.
    pub(crate) fn add_uplink(
        &self,
        name: String,
        network: Box<dyn NetBackend>,
        takes: Offloads,
        options: &PortOptions,
    ) -> Result<SwitchPort> {
        let port = self.add_port(name, options)?;
        let attach = || {
            let plug = port.plug()?;
            plug.set_takes(takes);
            let mut uplinks = lock(&self.owner.uplinks);
            let event_loop = match &uplinks.event_loop {
                Some(event_loop) => event_loop.clone(),
                None => uplinks.event_loop.insert(start_loop("vmbed-switch")?).clone(),
            };
            let uplink = event_loop.attach(Uplink::new(plug, network)?, &port.port.name, &quiet("uplink"))?;
            uplinks.attached.push((port.port.clone(), uplink));
            Ok(())
        };
        match attach() {
            Ok(()) => Ok(port),
            Err(error) => {
                port.remove();
                Err(error)
            }
        }
    }

    /// The ports, in no particular order.
    pub(crate) fn ports(&self) -> Vec<SwitchPort> {
        let (map, _) = self.owner.shared.map();
        let handle = |entry: &Entry| SwitchPort { owner: self.owner.clone(), port: entry.port.clone() };
        map.entries().map(handle).collect()
    }

    /// Writes what passes through `ports` (all that there are, where none is named) to `output`, as a pcapng file
    /// that Wireshark opens: each frame once for each of the ports that it comes in or goes out of, as it is seen
    /// there. Frames that left segmentation or a checksum to others are in it as they were.
    ///
    /// A thread, `vmbed-capture`, does the writing, in pieces: hand over a `BufWriter`. What comes faster is
    /// counted and left out; forwarding never waits.
    ///
    /// # Errors
    /// The beginning cannot be written; the process is out of threads or file descriptors.
    pub fn capture(&self, ports: &[SwitchPort], output: impl Write + Send + 'static) -> Result<Capture> {
        let all = if ports.is_empty() { self.ports() } else { Vec::new() };
        let ports = if ports.is_empty() { &all } else { ports };
        if let Some(other) = ports.iter().find(|p| !Arc::ptr_eq(&p.owner, &self.owner)) {
            return Err(other.elsewhere());
        }
        Capture::start(&self.owner, ports, Box::new(output))
    }
}

impl fmt::Debug for Switch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Switch").field("ports", &self.ports()).finish()
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let uplinks = std::mem::take(&mut *lock(&self.uplinks));
        if let Some(event_loop) = uplinks.event_loop {
            event_loop.stop();
        }
    }
}

/// A port of a [`Switch`]. A clone is another handle; the port stays when all are gone, until it is
/// [removed](Self::remove).
#[derive(Clone)]
pub struct SwitchPort {
    owner: Arc<Owner>,
    port: Arc<Port>,
}

impl SwitchPort {
    /// The name that it was given.
    pub fn name(&self) -> &str {
        &self.port.name
    }

    /// What it is told now; `None` once it was removed.
    #[cfg(any(test, feature = "internals"))]
    pub(crate) fn options(&self) -> Option<PortOptions> {
        let (map, _) = self.owner.shared.map();
        map.get(&self.port).map(|entry| entry.rules.options.clone())
    }

    /// Tells it something else, from the next frame on. The addresses behind it are forgotten; what its limits
    /// have used up stays so. Does not block.
    ///
    /// # Errors
    /// `InvalidArgument` with every bad option; `NotFound` where it was removed.
    pub fn set_options(&self, options: &PortOptions) -> Result<()> {
        options.check().map_err(|e| e.context(format!("port '{}'", self.port.name)))?;
        let shared = &self.owner.shared;
        let rules = Arc::new(Rules::new(options.clone()));
        let there = shared.change(|map| map.get_mut(&self.port).map(|entry| entry.rules = rules).is_some());
        if !there {
            return Err(self.removed());
        }
        self.port.set_limits(options, shared.clock.now());
        shared.table.forget(self.port.number);
        shared.table.forget_elsewhere(&options.guard.macs, self.port.number);
        Ok(())
    }

    /// What it has carried since it was added, and what it has dropped. Does not block for long.
    pub fn statistics(&self) -> PortStatistics {
        let shared = &self.owner.shared;
        let there = shared.map().0.get(&self.port).is_some();
        self.port.counters.read(if there { shared.table.count(self.port.number) } else { 0 })
    }

    /// Copies what comes in and goes out here to `monitor` as well, as it is seen here; `None` ends that. A port
    /// to which others are mirrored gets nothing else, and what its station sends is dropped.
    ///
    /// # Errors
    /// `InvalidArgument` for itself or a port of another switch; `InvalidState` where `monitor` is mirrored to a
    /// third, or others are mirrored to this one; `NotFound` where one of them was removed.
    pub fn mirror_to(&self, monitor: Option<&SwitchPort>) -> Result<()> {
        let refused =
            |kind, why: &str| Err(Error::new(kind, format!("mirroring port '{}': {why}", self.port.name)));
        if let Some(other) = monitor.filter(|m| !Arc::ptr_eq(&m.owner, &self.owner)) {
            return Err(other.elsewhere());
        }
        if monitor.is_some_and(|m| Arc::ptr_eq(&m.port, &self.port)) {
            return refused(ErrorKind::InvalidArgument, "a port cannot be mirrored to itself");
        }
        self.owner.shared.change(|map| {
            if let Some(monitor) = monitor {
                let Some(entry) = map.get(&monitor.port) else { return Err(monitor.removed()) };
                if entry.mirror.is_some() {
                    return refused(ErrorKind::InvalidState, "the port to mirror to is mirrored itself");
                }
                if map.get(&self.port).is_some_and(|entry| entry.is_monitor) {
                    return refused(ErrorKind::InvalidState, "others are mirrored to it");
                }
            }
            let Some(entry) = map.get_mut(&self.port) else { return Err(self.removed()) };
            entry.mirror = monitor.map(|m| m.port.clone());
            Ok(())
        })
    }

    /// Takes the port away. A VM that is on it has a card without a cable from then on; an uplink is closed. The
    /// second time it does nothing.
    pub fn remove(&self) {
        let shared = &self.owner.shared;
        shared.change(|map| {
            if map.get(&self.port).is_some() {
                map.ports[usize::from(self.port.number)] = None;
                shared.table.forget(self.port.number);
            }
            for entry in map.ports.iter_mut().flatten() {
                entry.mirror.take_if(|mirror| Arc::ptr_eq(mirror, &self.port));
            }
        });
        let mut uplinks = lock(&self.owner.uplinks);
        let at = uplinks.attached.iter().position(|(port, _)| Arc::ptr_eq(port, &self.port));
        let uplink = at.map(|at| uplinks.attached.swap_remove(at));
        drop(uplinks);
        if let Some((_, uplink)) = uplink
            && let Err(error) = uplink.detach()
        {
            log::warn!("port '{}': {error}", self.port.name);
        }
    }

    /// Takes the end for a card.
    ///
    /// # Errors
    /// `Busy` where a card has it; `NotFound` where the port was removed.
    pub(crate) fn plug(&self) -> Result<Plug> {
        Plug::new(&self.owner.shared, &self.port)
    }

    fn removed(&self) -> Error {
        Error::new(ErrorKind::NotFound, format!("port '{}' was removed from its switch", self.port.name))
    }

    fn elsewhere(&self) -> Error {
        Error::new(ErrorKind::InvalidArgument, format!("port '{}' is another switch's", self.port.name))
    }
}

impl fmt::Debug for SwitchPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SwitchPort").field(&self.port.name).finish()
    }
}

fn start_loop(name: &str) -> Result<Arc<EventLoop>> {
    EventLoop::start(name, |body| {
        thread::spawn(name.to_owned(), body).map_err(|e| Error::os(format!("starting the thread {name}"), e))
    })
}

/// Who hears that a worker of a switch panicked: it belongs to no VM.
fn quiet(what: &'static str) -> StopLine {
    StopLine::new(move |cause| log::error!("a switch's {what} has ended: {cause}"))
}

#[cfg(test)]
mod tests;
