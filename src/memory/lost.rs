#![forbid(unsafe_code)]
//! Guest memory that is lost, or that the host has no page for: noticed by vCPUs, as EFAULT from `KVM_RUN`, and by whoever
//! else touches it, as SIGBUS.

use std::sync::{Mutex, Weak};

use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

use super::{Mapped, Memory};
use crate::config::BackingConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::memory::fill_hole;
use crate::sys::{lock, log, sigbus, thread};

/// Who is told, with the guest's address.
pub(super) type Tell = Box<dyn FnOnce(u64) + Send>;

/// All guest memory of the process.
static ALL: Mutex<Vec<Weak<Mapped>>> = Mutex::new(Vec::new());

/// Has the process survive SIGBUS on guest memory: a page of failing hardware, one that swap cannot give back, a huge page
/// that is gone from the administrator's pool after the guest gave it to the host. Whoever touched it (a device's thread,
/// [`Vm::read_memory`](crate::Vm::read_memory)) finds zeroes there, and the VM that it belongs to stops with
/// [`StopCause::DeviceFault`](crate::StopCause::DeviceFault) of `memory`. Without it, the kernel ends the process.
///
/// It installs a handler for the signal (signals are the whole process's, so nothing does that unasked) and starts one
/// thread, `vmbed-sigbus`, which sleeps. Any other SIGBUS goes to the handler that was there before, or ends the process as
/// before. So install your own first; one that comes later must pass on what is not its own, with all three arguments.
/// Threads of yours that touch guest memory must not block SIGBUS. To call it again does nothing; in a child of a fork, it
/// begins anew.
///
/// ```
/// vmbed::handle_sigbus()?;
/// # Ok::<(), vmbed::Error>(())
/// ```
///
/// # Errors
/// `Exhausted` where the process is out of threads or file descriptors.
pub fn handle_sigbus() -> Result<()> {
    let start = |bell: EventFd| {
        let body = move || {
            loop {
                match bell.read() {
                    Ok(_) => tell(),
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(_) => return,
                }
            }
        };
        thread::spawn("vmbed-sigbus".to_owned(), body).map(drop)
    };
    sigbus::install(start).map_err(|e| Error::os("handle_sigbus: starting its thread", e))
}

/// Tells everybody whose memory was lost, once.
fn tell() {
    let all: Vec<_> = lock(&ALL).iter().filter_map(Weak::upgrade).collect();
    for memory in all.into_iter().map(Memory) {
        let Some(at) = memory.lost() else { continue };
        let tell = lock(&memory.0.tell).take();
        if let Some(tell) = tell {
            tell(at);
        }
    }
}

/// Has every part of it watched.
pub(super) fn watch(guest: &super::GuestMemoryMmap, config: &BackingConfig) -> Vec<sigbus::Watched> {
    let page = config.kind.pool_page().unwrap_or(4096) as usize;
    guest.iter().map(|region| sigbus::watch(region, page)).collect()
}

impl Memory {
    /// From now on it is among those whose losses are told.
    pub(super) fn enter(&self) {
        let mut all = lock(&ALL);
        all.retain(|memory| memory.strong_count() > 0);
        all.push(std::sync::Arc::downgrade(&self.0));
    }

    /// The guest's address of what was lost first, of what anybody touched.
    pub fn lost(&self) -> Option<u64> {
        let mut regions = self.0.watched.iter().zip(self.iter());
        regions.find_map(|(watched, region)| Some(region.start_addr().raw_value() + watched.lost()? as u64))
    }

    /// An error if any of it is lost.
    pub fn intact(&self) -> Result<()> {
        let Some(at) = self.lost() else { return Ok(()) };
        Err(Error::new(ErrorKind::Exhausted, lost(at)))
    }

    /// Of the pool: has pages there again that were given back, before the guest uses them, as long as it may. Other memory comes with the
    /// first touch. How many it has fetched.
    ///
    /// Where the pool has none, its VM is told as of memory that is lost: nobody else would say so. A vCPU that touches what is not there
    /// does not leave `KVM_RUN`: KVM has the page fetched asynchronously, drops the error, and has the vCPU try again, for ever.
    pub fn restore(&self, start: u64, len: u64, may: impl Fn() -> bool) -> u32 {
        let (Some(page), Some(last)) = (self.0.pool_page, len.checked_sub(1)) else { return 0 };
        let (mut next, last) = (start / page, start.saturating_add(last) / page);
        let mut fetched = 0;
        while may() {
            let Some(number) = lock(&self.0.holes).range(next..=last).next().copied() else { break };
            let at = number * page;
            let region = self.find_region(GuestAddress(at));
            let place =
                region.and_then(|region| Some((region.start_addr().raw_value(), region.file_offset()?)));
            if let Some((base, file)) = place
                && let Err(error) = fill_hole(file.file(), file.start() + (at - base), page)
            {
                log::warn!("guest memory at {at:#x} has no huge page any more: {error}");
                let tell = lock(&self.0.tell).take();
                if let Some(tell) = tell {
                    tell(at);
                }
                break;
            }
            lock(&self.0.holes).remove(&number);
            (next, fetched) = (number + 1, fetched + 1);
            if number == last {
                break;
            }
        }
        fetched
    }

    /// Who is told when some of it is lost, on the thread for that.
    pub fn on_loss(&self, tell: impl FnOnce(u64) + Send + 'static) {
        *lock(&self.0.tell) = Some(Box::new(tell));
    }
}

/// What a person reads of it.
pub(crate) fn lost(at: u64) -> String {
    format!("guest memory at {at:#x} is lost, or the host has no page for it (SIGBUS)")
}
