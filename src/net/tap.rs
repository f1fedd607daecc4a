#![forbid(unsafe_code)]
//! A TAP interface of the host.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::{HEADER_LEN, NetBackend, Offloads};
use crate::error::{Error, ErrorKind, Result};
use crate::reactor::Place;
use crate::sys::io::{IoList, read, write};
use crate::sys::log;
use crate::sys::tap;

const TUN: &str = "/dev/net/tun";
const FLAGS: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// One queue of a TAP interface that exists already.
pub(crate) struct Tap {
    file: File,
    /// The interface has several.
    several: bool,
    active: bool,
    /// Where it is attached to again when it has gone.
    opens: Place,
    /// `net0: tap 'tap0'`, for errors.
    who: String,
    name: String,
    /// What the kernel can leave to do.
    known: Offloads,
    /// What it may.
    taken: Offloads,
}

impl Tap {
    /// Attaches to the interface `name` for the card `id`, as many times as it has pairs of queues.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_all(id: &str, name: &str, count: u16) -> Result<Vec<Self>> {
        (0..count).map(|_| Self::queue(id, name, count > 1)).collect()
    }

    /// Attaches to the only queue of the interface `name` for the card `id`.
    ///
    /// # Errors
    /// No /dev/net/tun, no such interface (none is made), in use by someone else, or not ours.
    pub fn open(id: &str, name: &str) -> Result<Self> {
        Self::queue(id, name, false)
    }

    /// Attaches to its only queue, or to a new one of several.
    fn queue(id: &str, name: &str, several: bool) -> Result<Self> {
        let who = format!("{id}: tap '{name}'");
        let looked = tap::interface_exists(name);
        if !looked.map_err(|e| Error::os(format!("{who}: looking for it (SIOCGIFINDEX)"), e))? {
            return Err(missing(&who, name));
        }
        let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(TUN);
        let file = opened.map_err(|e| no_tun(&who, e))?;
        let flags = if several { FLAGS | libc::IFF_MULTI_QUEUE } else { FLAGS };
        tap::attach(file.as_fd(), name, flags).map_err(|e| not_attached(&who, name, several, e))?;
        // Where somebody has a queue of it already, be it for the moment in which it is made, what is attached later is as that is.
        let attached = tap::attached(file.as_fd());
        let attached = attached.map_err(|e| Error::os(format!("{who}: looking at it (TUNGETIFF)"), e))?;
        if attached.flags & FLAGS != FLAGS {
            let why = "is in use by another program, whose queue has no headers (IFF_VNET_HDR)";
            return Err(Error::new(ErrorKind::Busy, format!("{who}: {why}")));
        }
        Self::set_up(who, name.to_owned(), file, several)
    }

    /// Takes over a descriptor that someone with more rights has attached to an interface. It becomes nonblocking.
    ///
    /// # Errors
    /// It is not one of a TAP interface without packet information and with vnet headers.
    pub fn adopt(id: &str, fd: OwnedFd) -> Result<Self> {
        let invalid = |why| Error::new(ErrorKind::InvalidArgument, format!("{id}: the tap descriptor {why}"));
        let attached = tap::attached(fd.as_fd())
            .map_err(|e| invalid("is not attached to an interface (TUNSETIFF)").with_source(e))?;
        let mask = FLAGS | libc::IFF_TUN;
        if attached.flags & mask != FLAGS {
            return Err(invalid("needs the flags IFF_TAP, IFF_NO_PI and IFF_VNET_HDR"));
        }
        let who = format!("{id}: tap '{}'", attached.name);
        let file = File::from(fd);
        crate::sys::fd::set_nonblocking(file.as_fd())
            .map_err(|e| Error::os(format!("{who}: making it nonblocking"), e))?;
        Self::set_up(who, attached.name, file, attached.flags & libc::IFF_MULTI_QUEUE != 0)
    }

    fn set_up(who: String, name: String, file: File, several: bool) -> Result<Self> {
        tap::set_header_size(file.as_fd(), HEADER_LEN as i32)
            .map_err(|e| Error::os(format!("{who}: setting the header's size (TUNSETVNETHDRSZ)"), e))?;
        // UDP segments came with Linux 6.2.
        let most = [Offloads::all(), Offloads::all() - Offloads::USO];
        let known = most.into_iter().find(|set| tap::set_offload(file.as_fd(), flags(*set)).is_ok());
        // Until a driver has said that it takes anything else, every frame comes complete, with its checksums.
        let taken = Offloads::empty();
        tap::set_offload(file.as_fd(), flags(taken))
            .map_err(|e| Error::os(format!("{who}: turning offloads off (TUNSETOFFLOAD)"), e))?;
        let known = known.unwrap_or(taken);
        Ok(Self { file, several, active: true, opens: Place::Caller, who, name, known, taken })
    }
}

/// As TUNSETOFFLOAD has them.
fn flags(offloads: Offloads) -> u32 {
    let all = [
        (Offloads::CSUM, libc::TUN_F_CSUM),
        (Offloads::TSO4, libc::TUN_F_TSO4),
        (Offloads::TSO6, libc::TUN_F_TSO6),
        (Offloads::ECN, libc::TUN_F_TSO_ECN),
        (Offloads::USO, libc::TUN_F_USO4 | libc::TUN_F_USO6),
    ];
    all.into_iter().filter(|(offload, _)| offloads.contains(*offload)).fold(0, |bits, (_, flag)| bits | flag)
}

fn missing(who: &str, name: &str) -> Error {
    let make = format!("ip tuntap add {name} mode tap user $USER && ip link set {name} up");
    let what = format!("{who}: there is no such interface; make it as root: {make}");
    Error::new(ErrorKind::NotFound, what)
}

fn no_tun(who: &str, error: io::Error) -> Error {
    let what = match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            "is missing; load the kernel's module as root: modprobe tun"
        }
        Some(libc::EACCES | libc::EPERM) => "is not ours to open; give this user read and write access",
        _ => "cannot be opened",
    };
    Error::os(format!("{who}: {TUN} {what}"), error)
}

fn not_attached(who: &str, name: &str, several: bool, error: io::Error) -> Error {
    let what = match error.raw_os_error() {
        Some(libc::EBUSY) => "is in use by another program or another VM".to_owned(),
        Some(libc::EPERM | libc::EACCES) => format!(
            "belongs to someone else; give it to this user (ip tuntap add {name} mode tap user $USER) or \
             run with CAP_NET_ADMIN"
        ),
        Some(libc::EINVAL) if several => format!(
            "is no TAP interface with several queues (ip tuntap add {name} mode tap multi_queue), as nets[].queues wants it"
        ),
        Some(libc::E2BIG) => "has no queue left for it: other programs have them".to_owned(),
        Some(libc::EINVAL) => {
            "is no TAP interface with a single queue (ip tuntap add … mode tap, without multi_queue)".into()
        }
        _ => "cannot be attached to (TUNSETIFF)".into(),
    };
    Error::os(format!("{who} {what}"), error)
}

impl Tap {
    /// The same, which is attached to again there when it has gone: whoever serves it may be allowed to open nothing.
    pub fn reopened_at(self, opens: Place) -> Self {
        Self { opens, ..self }
    }
}

impl NetBackend for Tap {
    fn receive(&mut self, room: &IoList<'_>) -> io::Result<usize> {
        read(self.file.as_fd(), room)
    }

    fn send(&mut self, frame: &IoList<'_>) -> io::Result<()> {
        // A tap takes a frame whole or not at all.
        write(self.file.as_fd(), frame).map(drop)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn tap(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }

    fn offloads(&self) -> Offloads {
        self.known
    }

    fn set_offloads(&mut self, taken: Offloads) {
        let Self { file, who, known, .. } = self;
        if let Err(error) = tap::set_offload(file.as_fd(), flags(taken & *known)) {
            // Then it leaves nothing to do, or what it leaves is dropped.
            log::warn!("{who}: telling it what the driver takes (TUNSETOFFLOAD): {error}");
        }
        self.taken = taken;
    }

    /// A queue that is not used is detached, so that the kernel gives its flows to the others. To attach it, the interface must be
    /// there; else it is found to be gone, and looked for.
    fn set_active(&mut self, active: bool) {
        self.active = active;
        if self.several
            && let Err(error) = tap::set_queue(self.file.as_fd(), active)
        {
            // As it is already, commonly.
            log::debug!("{}: using one of its queues: {active} (TUNSETQUEUE): {error}", self.who);
        }
    }

    fn is_gone(&self) -> bool {
        tap::attached(self.file.as_fd()).is_err()
    }

    fn reopen(&mut self) -> Result<()> {
        if !self.is_gone() {
            return Ok(());
        }
        let id = self.who.split(':').next().unwrap_or_default().to_owned();
        let Self { name, several, taken, active, .. } = self;
        let (name, several, taken, active) = (name.clone(), *several, *taken, *active);
        let opened = self.opens.run(move || {
            let mut fresh = Self::queue(&id, &name, several)?;
            fresh.set_offloads(taken);
            fresh.set_active(active);
            Ok(fresh)
        });
        *self = opened??.reopened_at(self.opens.clone());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interface_that_is_not_there_is_not_made() {
        let error = Tap::open_all("net0", "vmbednone0", 1).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        let text = error.to_string();
        assert!(
            text.contains("net0: tap 'vmbednone0'") && text.contains("ip tuntap add vmbednone0"),
            "{text}"
        );
        assert!(!tap::interface_exists("vmbednone0").unwrap());
        for name in ["", "a name with spaces", "sixteen-bytes-00", "nul\0"] {
            assert!(Tap::open_all("net0", name, 2).is_err(), "{name:?}");
        }
    }

    #[test]
    fn errors_name_the_remedy() {
        let errno = io::Error::from_raw_os_error;
        let tun = no_tun("net0: tap 'tap0'", errno(libc::ENOENT));
        assert!(tun.to_string().contains("modprobe tun"));
        let busy = not_attached("net0: tap 'tap0'", "tap0", false, errno(libc::EBUSY));
        assert_eq!((busy.kind(), busy.to_string().contains("in use")), (ErrorKind::Busy, true));
        let denied = not_attached("net0: tap 'tap0'", "tap0", false, errno(libc::EPERM));
        assert_eq!(denied.kind(), ErrorKind::PermissionDenied);
        assert!(denied.to_string().contains("ip tuntap add tap0"));
    }

    #[test]
    fn a_descriptor_of_something_else_is_not_adopted() {
        let file = File::open("/dev/null").unwrap();
        assert_eq!(Tap::adopt("net0", file.into()).err().unwrap().kind(), ErrorKind::InvalidArgument);
    }

    /// As `ip tuntap add` has one for a moment: what is attached meanwhile would have no headers, and nobody would say so.
    #[test]
    fn a_queue_beside_one_without_headers_is_none() {
        let there = std::thread::spawn(|| {
            tap::leave_network().unwrap();
            tap::make("vmbedtap0", true, None, None).unwrap();
            let other = OpenOptions::new().read(true).write(true).open(TUN).unwrap();
            let plain = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_MULTI_QUEUE;
            tap::attach(other.as_fd(), "vmbedtap0", plain).unwrap();
            let error = Tap::open_all("net0", "vmbedtap0", 2).err().unwrap();
            assert!(error.kind() == ErrorKind::Busy && error.to_string().contains("IFF_VNET_HDR"), "{error}");
            drop(other);
            assert_eq!(Tap::open_all("net0", "vmbedtap0", 2).unwrap().len(), 2);
        });
        there.join().unwrap();
    }
}
