#![forbid(unsafe_code)]
//! Guest memory: what backs it and where the guest sees it.
//!
//! Everyone reaches it through volatile accesses only (`vm_memory::Bytes`): it is never a Rust
//! reference, since the guest writes to it at any moment.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Instant;

use vm_memory::mmap::{GuestRegionMmap, MmapRegion};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::config::{BackingConfig, HugePages};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::lock;
use crate::sys::memory::{Advice, advise, discard_anonymous, punch_hole};
use crate::sys::residency::{self as pages, Pages};
use crate::sys::{sigbus, thread};

pub(crate) use backing::HUGE;
pub use lost::handle_sigbus;
pub(crate) use lost::lost;
pub(crate) use residency::{Enrolled, Roll};

mod access;
mod backing;
pub(crate) mod layout;
mod lost;
mod residency;
pub(crate) mod slots;

/// No thread prefaults less.
const PREFAULT_LEAST: u64 = 64 << 20;

/// The guest's memory. Cheap to clone; the mapping lives until the last clone is gone.
#[derive(Clone)]
pub(crate) struct Memory(Arc<Mapped>);

/// What came of paging out, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PagedOut {
    /// Where to go on.
    pub next: u64,
    /// What was there of what was named to the kernel.
    pub named: u64,
    /// What is not there any more.
    pub gone: u64,
}

/// Field order is drop order: the regions lie within the address space.
struct Mapped {
    watched: Vec<sigbus::Watched>,
    /// Who is told that some of it is lost, once.
    tell: Mutex<Option<lost::Tell>>,
    guest: GuestMemoryMmap,
    _space: Vec<MmapRegion>,
    /// Where only page tables know what is there: of anonymous memory.
    pagemap: Option<File>,
    /// How large its pages are, of the administrator's pool of huge pages.
    pool_page: Option<u64>,
    /// Of these, the numbers of those that were given back.
    holes: Mutex<BTreeSet<u64>>,
    /// No huge pages are wanted, or all are huge.
    leave_pages: bool,
}

impl Memory {
    /// `size` bytes on sealed memfds, at the addresses that [`layout::ram`] gives.
    #[cfg(any(test, feature = "internals"))]
    pub fn new(size: u64) -> Result<Self> {
        let mut config = BackingConfig::default();
        if cfg!(miri) {
            // It has no memfds.
            config.kind = crate::config::BackingKind::Anonymous;
        }
        Self::on(size, &config)
    }

    /// The same that passes for memory of a pool of such pages, which a machine may not have.
    #[cfg(test)]
    pub fn as_pooled(size: u64, page: u64) -> Result<Self> {
        Self::made(size, &BackingConfig::default(), Some(page))
    }

    /// `size` bytes of what the configuration says. With `prefault`, all of it is there on return.
    pub fn on(size: u64, config: &BackingConfig) -> Result<Self> {
        Self::made(size, config, config.kind.pool_page())
    }

    fn made(size: u64, config: &BackingConfig, pool_page: Option<u64>) -> Result<Self> {
        let pagemap = backing::pagemap(config)?;
        let made: Vec<_> =
            layout::ram(size).iter().map(|range| backing::region(range, config)).collect::<Result<_>>()?;
        let (regions, space): (Vec<_>, Vec<_>) = made.into_iter().unzip();
        let guest = GuestMemoryMmap::from_regions(regions).map_err(|e| {
            Error::new(ErrorKind::InvalidArgument, format!("laying out {size} bytes of guest memory"))
                .with_source(e)
        })?;
        let leave_pages = pool_page.is_some() || config.huge == HugePages::Never;
        let watched = lost::watch(&guest, config);
        let (tell, holes) = (Mutex::default(), Mutex::default());
        let made = Mapped { watched, tell, guest, _space: space, pagemap, pool_page, holes, leave_pages };
        let memory = Self(Arc::new(made));
        memory.enter();
        if config.prefault {
            memory.prefault(config.huge == HugePages::Always)?;
        }
        Ok(memory)
    }

    /// Has everything there, made by as many threads as may be of use; in huge pages, if so wanted.
    fn prefault(&self, huge: bool) -> Result<()> {
        let cpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
        let share = (self.size() / cpus.min(16)).max(PREFAULT_LEAST).next_multiple_of(HUGE);
        let failed = |(what, e): (&str, io::Error)| {
            let why = format!("prefaulting {} bytes of guest memory{what}", self.size());
            Error::new(ErrorKind::Exhausted, why).with_source(e)
        };
        let parts = self.iter().enumerate().flat_map(|(index, region)| {
            let len = region.len();
            (0..len).step_by(share as usize).map(move |start| (index, start..len.min(start + share)))
        });
        let fill = |(number, (index, part))| {
            let memory = self.clone();
            let body = move || memory.iter().nth(index).map_or(Ok(()), |r| backing::prefault(r, part));
            let (sender, answer) = channel();
            let thread = thread::spawn(format!("vmbed-fill{number}"), move || drop(sender.send(body())))?;
            Ok((thread, answer))
        };
        let threads: Vec<io::Result<_>> = parts.enumerate().map(fill).collect();
        // All have ended before anything is said.
        let wait = |started: io::Result<(JoinHandle<()>, Receiver<io::Result<()>>)>| {
            let (thread, answer) = started.map_err(|e| (": starting a thread", e))?;
            let panicked = || ("", io::Error::other("a thread that fills memory panicked"));
            thread.join().map_err(|_| panicked())?;
            answer.recv().map_err(|_| panicked())?.map_err(|e| ("", e))
        };
        let ended: Vec<_> = threads.into_iter().map(wait).collect();
        ended.into_iter().collect::<std::result::Result<(), _>>().map_err(failed)?;
        if huge {
            self.iter().for_each(|region| backing::collapse(region, 0..region.len()));
        }
        Ok(())
    }

    /// The size in bytes.
    pub fn size(&self) -> u64 {
        self.iter().map(GuestMemoryRegion::len).sum()
    }

    /// Makes huge pages of what lies in `range`, as far as the host will. Before the guest runs.
    pub fn collapse(&self, range: Range<u64>) {
        if self.0.leave_pages {
            return;
        }
        for region in self.iter() {
            let base = region.start_addr().raw_value();
            let (start, end) = (range.start.max(base), range.end.min(base + region.len()));
            if start < end {
                backing::collapse(region, start - base..end - base);
            }
        }
    }

    /// Whether all of that is memory, of one region.
    pub fn is_ram(&self, start: u64, len: u64) -> bool {
        let region = self.find_region(GuestAddress(start));
        region.is_some_and(|r| len <= r.len() - (start - r.start_addr().raw_value()))
    }

    /// Gives what backs `len` bytes at `start` back to the host, at any time: the guest reads zero there from now on.
    /// Answers how many bytes the host has got, as it counts them; roughly, while others touch memory.
    ///
    /// # Errors
    /// `InvalidInput` where it is not all memory of one region; what the host says.
    pub fn discard(&self, start: u64, len: u64) -> io::Result<u64> {
        if let Some(page) = self.0.pool_page.filter(|_| self.is_ram(start, len)) {
            // Whole ones go, and before they do, so that whatever comes of it they are looked for.
            lock(&self.0.holes).extend(start.div_ceil(page)..(start + len) / page);
        }
        self.give_back(start, len)
    }

    fn give_back(&self, start: u64, len: u64) -> io::Result<u64> {
        let outside = || io::Error::from(io::ErrorKind::InvalidInput);
        let region = self.find_region(GuestAddress(start)).ok_or_else(outside)?;
        if !self.is_ram(start, len) {
            return Err(outside());
        }
        let offset = start - region.start_addr().raw_value();
        let Some(file) = region.file_offset() else {
            let there = || self.count(region, offset as usize, len as usize, Pages::Backed);
            let before = there();
            discard_anonymous(region, offset as usize, len as usize)?;
            return Ok(before.saturating_sub(there()));
        };
        let before = pages::occupied(file.file())?;
        punch_hole(file.file(), file.start() + offset, len)?;
        Ok(before.saturating_sub(pages::occupied(file.file())?).min(len))
    }

    /// What exists of it, in memory or in swap: exact, and one system call a region; of anonymous memory, a walk over
    /// page tables.
    pub fn backing(&self) -> u64 {
        let of = |region: &GuestRegionMmap| match region.file_offset() {
            Some(file) => pages::occupied(file.file()).unwrap_or(0),
            None => self.count(region, 0, region.len() as usize, Pages::Backed),
        };
        self.iter().map(of).fold(0, u64::saturating_add)
    }

    /// What of it is in memory; of a `backing` that was read just before.
    pub fn resident(&self, backing: u64) -> u64 {
        // The pool's pages stay, whatever happens.
        if self.is_pooled() || !pages::swap_is_used() {
            return backing;
        }
        let of = |region: &GuestRegionMmap| match region.file_offset() {
            Some(_) => pages::resident(region).unwrap_or(0),
            None => self.count(region, 0, region.len() as usize, Pages::Present),
        };
        // A guest may have touched more meanwhile.
        self.iter().map(of).fold(0, u64::saturating_add).min(backing)
    }

    /// What of it this process maps with huge pages; of a `backing` that was read just before.
    pub fn huge(&self, backing: u64) -> u64 {
        if self.is_pooled() { backing } else { residency::huge(self) }
    }

    /// What the page tables say of anonymous memory.
    fn count(&self, region: &GuestRegionMmap, offset: usize, len: usize, what: Pages) -> u64 {
        let Some(pagemap) = &self.0.pagemap else { return 0 };
        let counted = pages::count(pagemap, region, offset, len, what);
        counted.or_else(|_| pages::count_entries(pagemap, region, offset, len, what)).unwrap_or(0)
    }

    /// Whether it is of the administrator's pool of huge pages, of which another page may not be had.
    pub fn is_pooled(&self) -> bool {
        self.pool_page().is_some()
    }

    /// The size of the pool's pages, if it is of the pool.
    pub fn pool_page(&self) -> Option<u64> {
        self.0.pool_page
    }

    /// Gives everything back to the host, of a guest that will not run any more: it reads zero from now on.
    ///
    /// # Errors
    /// What the host says of one region; the others are given back.
    pub fn discard_all(&self) -> io::Result<()> {
        let mut given = Ok(());
        for region in self.iter() {
            given = given.and(self.give_back(region.start_addr().raw_value(), region.len()).map(drop));
        }
        given
    }

    /// Pages out about `bytes` of what is there, from `cursor` on (an offset into all regions together), piece by piece,
    /// at most once around and until the deadline. What the guest touches meanwhile comes back.
    pub fn page_out(&self, cursor: u64, bytes: u64, deadline: Instant) -> PagedOut {
        let size = self.size();
        if self.is_pooled() {
            return PagedOut { next: cursor % size, named: 0, gone: 0 };
        }
        let (mut done, mut seen) = (PagedOut { next: cursor % size, named: 0, gone: 0 }, 0);
        while done.gone < bytes && seen < size && (seen == 0 || Instant::now() < deadline) {
            let Some((region, start, offset, len)) = self.piece(done.next) else { break };
            let there = || match self.0.pagemap {
                Some(_) => self.count(region, offset as usize, len as usize, Pages::Present),
                None => pages::resident_in(region, offset as usize, len as usize).unwrap_or(0),
            };
            let before = there();
            if before > 0 {
                done.named += before;
                // Where there is no swap, or it is full, the pages stay.
                let _ = advise(region, offset as usize, len as usize, Advice::PageOut);
                done.gone += before.saturating_sub(there());
            }
            seen += len;
            done.next = (start + len) % size;
        }
        done
    }

    /// The huge page that `cursor` is in: its region, where it starts, also in that region, and how much of it there is.
    fn piece(&self, cursor: u64) -> Option<(&GuestRegionMmap, u64, u64, u64)> {
        let mut base = 0;
        for region in self.iter() {
            let offset = cursor.checked_sub(base)? / HUGE * HUGE;
            if offset < region.len() {
                return Some((region, base + offset, offset, HUGE.min(region.len() - offset)));
            }
            base += region.len();
        }
        None
    }

    /// What device code and loaders read and write through.
    #[cfg(test)]
    pub fn guest(&self) -> &GuestMemoryMmap {
        &self.0.guest
    }
}

impl std::ops::Deref for Memory {
    type Target = GuestMemoryMmap;

    fn deref(&self) -> &GuestMemoryMmap {
        &self.0.guest
    }
}

#[cfg(test)]
mod tests;
