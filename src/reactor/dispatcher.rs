#![forbid(unsafe_code)]
//! An event loop without a thread: the embedder's own loop turns it.

use std::cell::Cell;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Mutex};

use event_manager::Events;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};

use super::{Manager, own, to_io};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::signal::Shield;
use crate::sys::{self, fork, lock};

/// Serves the devices of VMs on the embedder's event loop, instead of on a thread for each VM.
///
/// [`VmBuilder::dispatcher`](crate::VmBuilder::dispatcher) puts consoles, network cards and the random
/// number generator there; disks keep their threads, since their requests wait for the host. Poll the fd for
/// reading (it stays readable while there is work), then call [`dispatch`](Self::dispatch). Any number of
/// VMs may share one dispatcher. Clones are the same dispatcher.
///
/// ```no_run
/// # use vmbed::{Dispatcher, EventKind, Host, VmConfig};
/// # use std::os::fd::AsFd;
/// # fn poll_readable(_: &[std::os::fd::BorrowedFd]) {}
/// # let config = VmConfig::linux(vmbed::LinuxBoot::new("vmlinuz"));
/// let dispatcher = Dispatcher::new()?;
/// let vm = Host::open()?.builder(config).dispatcher(&dispatcher).console_output(std::io::stdout())?.build()?;
/// vm.start()?;
/// loop {
///     poll_readable(&[dispatcher.as_fd(), vm.events().as_fd()]); // your own loop, with your own fds besides
///     dispatcher.dispatch()?;
///     if let Some(EventKind::Stopped(cause)) = vm.events().next_event().map(|event| event.kind) {
///         break println!("{cause}");
///     }
/// }
/// # Ok::<(), vmbed::Error>(())
/// ```
#[derive(Clone)]
pub struct Dispatcher(pub(super) Arc<Turns>);

pub(super) struct Turns {
    manager: Mutex<Manager>,
    /// What the manager waits for, in a set whose fd can be shown.
    mirror: Arc<Epoll>,
    /// Whose it is: the child of a fork shares the sets with its parent, and must not touch them.
    process: u64,
}

thread_local! {
    /// The address of the [`Turns`] that this thread turns; 0 for none.
    static TURNING: Cell<usize> = const { Cell::new(0) };
}

impl Dispatcher {
    /// A dispatcher without VMs.
    ///
    /// # Errors
    /// `Exhausted` when the process has no file descriptor left.
    pub fn new() -> Result<Self> {
        let failed = |e| Error::os("creating a dispatcher (epoll_create1)", e);
        let manager = Mutex::new(Manager::new().map_err(|e| failed(to_io(e)))?);
        let mirror = Arc::new(Epoll::new().map_err(failed)?);
        Ok(Self(Arc::new(Turns { manager, mirror, process: fork::process() })))
    }

    /// Serves what is ready, and returns. Callbacks of the VMs on it run within.
    ///
    /// Does not wait for anything to become ready; for another thread only that dispatches, or while it stops
    /// a device. After a VM's `Stopped` event, one more call takes the guest's last words to its console.
    ///
    /// # Errors
    /// `InvalidState` when a callback calls, or the child of a fork.
    pub fn dispatch(&self) -> Result<()> {
        if self.0.process != fork::process() {
            let why = "dispatch: its VMs run in the process that this one was forked from";
            return Err(Error::new(ErrorKind::InvalidState, why));
        }
        if own::is_inside_any() || TURNING.get() != 0 {
            let why = "dispatch: called by a callback, which it would call again";
            return Err(Error::new(ErrorKind::InvalidState, why));
        }
        let mut manager = lock(&self.0.manager);
        let _shield = Shield::raise();
        TURNING.set(self.0.address());
        let turned = manager.run_with_timeout(0);
        TURNING.set(0);
        turned.map(drop).map_err(|e| Error::os("dispatching (epoll_wait)", to_io(e)))
    }
}

impl Turns {
    fn address(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    /// Does `f` between two turns.
    pub fn call<R>(&self, f: impl FnOnce(&mut Manager) -> R) -> R {
        f(&mut lock(&self.manager))
    }

    /// Whether the calling thread is turning it, and so would wait for itself.
    pub fn is_turned_here(&self) -> bool {
        TURNING.get() == self.address()
    }

    pub fn mirror(&self) -> Mirror {
        Mirror { set: self.mirror.clone(), fds: Vec::new(), process: self.process }
    }
}

impl AsFd for Dispatcher {
    fn as_fd(&self) -> BorrowedFd<'_> {
        sys::fd::borrow_epoll(&self.0.mirror)
    }
}

impl AsRawFd for Dispatcher {
    fn as_raw_fd(&self) -> RawFd {
        self.0.mirror.as_raw_fd()
    }
}

impl std::fmt::Debug for Dispatcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dispatcher").field("fd", &self.as_raw_fd()).finish_non_exhaustive()
    }
}

/// One worker's fds in the set that is shown. Dropping it takes them out.
pub(super) struct Mirror {
    set: Arc<Epoll>,
    fds: Vec<RawFd>,
    process: u64,
}

impl Mirror {
    pub fn add(&mut self, events: &Events) -> std::result::Result<(), event_manager::Error> {
        self.control(ControlOperation::Add, events)?;
        self.fds.push(events.fd());
        Ok(())
    }

    pub fn modify(&mut self, events: &Events) -> std::result::Result<(), event_manager::Error> {
        self.control(ControlOperation::Modify, events)
    }

    pub fn remove(&mut self, fd: RawFd) {
        self.fds.retain(|known| *known != fd);
        // It may have been closed, and so be gone already.
        let _ = self.set.ctl(ControlOperation::Delete, fd, EpollEvent::default());
    }

    fn control(
        &self,
        what: ControlOperation,
        events: &Events,
    ) -> std::result::Result<(), event_manager::Error> {
        let failed = |e: std::io::Error| event_manager::Error::Epoll(e.into());
        self.set.ctl(what, events.fd(), events.epoll_event()).map_err(failed)
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        if self.process == fork::process() {
            std::mem::take(&mut self.fds).into_iter().for_each(|fd| self.remove(fd));
        }
    }
}
