//! vhost-net: the ioctls of /dev/vhost-net (linux/vhost.h), by which the kernel itself serves a pair of queues.
//!
//! The crate `vhost` has them, too. It takes a ring for bad that ends where memory does, and brings a generator of UUIDs along.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, VolatileSlice};

pub(crate) const PATH: &str = "/dev/vhost-net";

const GET_FEATURES: libc::c_ulong = 0x8008_af00;
const SET_FEATURES: libc::c_ulong = 0x4008_af00;
const SET_OWNER: libc::c_ulong = 0xaf01;
const RESET_OWNER: libc::c_ulong = 0xaf02;
/// Its argument is counted without the regions.
const SET_MEM_TABLE: libc::c_ulong = 0x4008_af03;
const SET_VRING_NUM: libc::c_ulong = 0x4008_af10;
const SET_VRING_ADDR: libc::c_ulong = 0x4028_af11;
const SET_VRING_BASE: libc::c_ulong = 0x4008_af12;
const SET_VRING_KICK: libc::c_ulong = 0x4008_af20;
const SET_VRING_CALL: libc::c_ulong = 0x4008_af21;
const SET_VRING_ERR: libc::c_ulong = 0x4008_af22;
const NET_SET_BACKEND: libc::c_ulong = 0x4008_af30;

/// One opened vhost-net. Dropping it ends its thread, and with it every access to the memory that it was told of, also where a
/// child of a fork still has the descriptor.
pub(crate) struct Device(File);

/// Where a queue's parts are, and how far it has been served.
pub(crate) struct Ring<'a> {
    pub size: u16,
    pub next_avail: u16,
    pub desc: VolatileSlice<'a>,
    pub avail: VolatileSlice<'a>,
    pub used: VolatileSlice<'a>,
}

/// An eventfd of a queue's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Chains are there.
    Kick,
    /// Chains have been used.
    Call,
    /// It cannot go on.
    Error,
}

/// `struct vhost_vring_state`.
#[repr(C)]
struct State {
    index: u32,
    number: u32,
}

/// `struct vhost_vring_file`.
#[repr(C)]
struct Handed {
    index: u32,
    fd: i32,
}

/// `struct vhost_vring_addr`.
#[repr(C)]
struct Addresses {
    index: u32,
    flags: u32,
    desc: u64,
    used: u64,
    avail: u64,
    log: u64,
}

impl Device {
    pub fn open() -> io::Result<Self> {
        OpenOptions::new().read(true).write(true).open(PATH).map(Self)
    }

    /// One that refuses everything.
    #[cfg(test)]
    pub fn dead() -> Self {
        Self(File::open("/dev/null").unwrap())
    }

    /// What it can do.
    pub fn features(&self) -> io::Result<u64> {
        let mut features = 0u64;
        // SAFETY: VHOST_GET_FEATURES writes one u64, which lives until the call returns.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), GET_FEATURES, &raw mut features) })?;
        Ok(features)
    }

    /// Begins its thread, which belongs to this process, and to the calling thread's cgroup.
    pub fn set_owner(&self) -> io::Result<()> {
        // SAFETY: VHOST_SET_OWNER takes no argument.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), SET_OWNER, 0) })
    }

    pub fn set_features(&self, features: u64) -> io::Result<()> {
        // SAFETY: VHOST_SET_FEATURES reads one u64, which lives until the call returns.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), SET_FEATURES, &raw const features) })
    }

    /// Tells it where the guest's memory is. It writes there from when it serves a queue until it is dropped: `memory` outlives it.
    pub fn set_memory(&self, memory: &GuestMemoryMmap) -> io::Result<()> {
        // `struct vhost_memory`: the number of regions with 32 bits of padding behind it, and four numbers for each.
        let mut table = vec![memory.num_regions() as u64];
        for region in memory.iter() {
            table.extend([region.start_addr().raw_value(), region.len(), region.as_ptr() as u64, 0]);
        }
        // SAFETY: VHOST_SET_MEM_TABLE reads as many regions as the table's first number says, which are there. What it may access from
        // now on are mappings that are live, and whoever serves queues by it keeps them (`virtio::net::vhost::Vhost`, whose fields are
        // dropped in that order).
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), SET_MEM_TABLE, table.as_ptr()) })
    }

    /// Tells it what it needs to know of a queue before it serves it.
    pub fn set_ring(&self, index: u32, ring: &Ring<'_>) -> io::Result<()> {
        self.set_number(SET_VRING_NUM, index, ring.size)?;
        self.set_number(SET_VRING_BASE, index, ring.next_avail)?;
        let at = |part: &VolatileSlice<'_>| part.ptr_guard().as_ptr() as u64;
        let (desc, used, avail) = (at(&ring.desc), at(&ring.used), at(&ring.avail));
        let addresses = Addresses { index, flags: 0, desc, used, avail, log: 0 };
        // SAFETY: VHOST_SET_VRING_ADDR reads one structure, which lives until the call returns. What it points to is guest memory, which
        // outlives the device, as `set_memory` says.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), SET_VRING_ADDR, &raw const addresses) })
    }

    /// Takes an eventfd, or gives the one that it has up.
    pub fn set_event(&self, event: Event, index: u32, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let request = match event {
            Event::Kick => SET_VRING_KICK,
            Event::Call => SET_VRING_CALL,
            Event::Error => SET_VRING_ERR,
        };
        self.hand(request, index, fd)
    }

    /// Serves the queue from and to the TAP interface, from now on; without one, serves it no more: when this returns, what was
    /// begun is finished.
    pub fn set_backend(&self, index: u32, tap: Option<BorrowedFd<'_>>) -> io::Result<()> {
        self.hand(NET_SET_BACKEND, index, tap)
    }

    fn set_number(&self, request: libc::c_ulong, index: u32, number: u16) -> io::Result<()> {
        let state = State { index, number: number.into() };
        // SAFETY: both requests read one structure, which lives until the call returns.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), request, &raw const state) })
    }

    fn hand(&self, request: libc::c_ulong, index: u32, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let handed = Handed { index, fd: fd.map_or(-1, |fd| fd.as_raw_fd()) };
        // SAFETY: these requests read one structure, which lives until the call returns, and take a reference of their own to what the
        // descriptor stands for.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), request, &raw const handed) })
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: VHOST_RESET_OWNER takes no argument. It fails where there is no owner, or this process is not it.
        let _ = unsafe { libc::ioctl(self.0.as_raw_fd(), RESET_OWNER, 0) };
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
