#![forbid(unsafe_code)]
//! What a disk's queues share, and what an embedder may see and change of it while it is served.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::statistics::{Counters, DiskStatistics};
use crate::block::{Backend, Resize, Saving, cannot};
use crate::config::{CacheMode, DiskConfig, DiskFormat, RateLimit};
use crate::error::{Error, ErrorKind, Result};
use crate::rate::TokenBucket;
use crate::sys::lock;
use crate::units::{Bytes, Sectors};
use crate::virtio::Signals;

/// A disk, beside what is in its device and on its threads.
pub(crate) struct Control {
    id: String,
    /// In bytes.
    size: AtomicU64,
    readonly: bool,
    discards: bool,
    /// The driver flushes what it wants on stable storage (`writeback`, 5.2.5): else each write is, when it is answered.
    writeback: AtomicBool,
    /// The same, for each new driver.
    first_writeback: bool,
    resizer: Option<Arc<dyn Resize>>,
    signals: Option<Signals>,
    /// One change of the size at a time.
    changing: Mutex<()>,
    limited: AtomicBool,
    bucket: Mutex<TokenBucket>,
    begun: Instant,
    counters: Vec<Arc<Counters>>,
    /// A copy of it is being made.
    is_saving: AtomicBool,
    saving: Mutex<Option<Arc<Saving>>>,
}

impl Control {
    /// Of the disk `id` on `backend`, with so many queues. `signals` tell its driver of a new size.
    pub fn new(
        id: &str,
        config: &DiskConfig,
        backend: &dyn Backend,
        queues: usize,
        signals: Option<Signals>,
    ) -> Self {
        let first_writeback = config.cache != CacheMode::Writethrough;
        Self {
            id: id.to_owned(),
            size: AtomicU64::new(backend.size()),
            readonly: backend.readonly(),
            discards: backend.discards(),
            writeback: AtomicBool::new(first_writeback),
            first_writeback,
            resizer: backend.resizer(),
            signals,
            changing: Mutex::default(),
            limited: AtomicBool::new(!config.rate.is_none()),
            bucket: Mutex::new(TokenBucket::new(config.rate, Duration::ZERO)),
            begun: Instant::now(),
            counters: (0..queues).map(|_| Arc::default()).collect(),
            is_saving: AtomicBool::new(false),
            saving: Mutex::default(),
        }
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    pub fn size(&self) -> u64 {
        self.size.load(Ordering::SeqCst)
    }

    pub fn readonly(&self) -> bool {
        self.readonly
    }

    pub fn discards(&self) -> bool {
        self.discards
    }

    pub fn writeback(&self) -> bool {
        self.writeback.load(Ordering::Relaxed)
    }

    pub(super) fn set_writeback(&self, on: bool) {
        self.writeback.store(on, Ordering::Relaxed);
    }

    /// Another driver begins.
    pub(super) fn reset(&self) {
        self.set_writeback(self.first_writeback);
    }

    pub(super) fn counters(&self, queue: usize) -> Arc<Counters> {
        self.counters.get(queue).cloned().unwrap_or_default()
    }

    /// What all queues have done.
    pub fn statistics(&self) -> DiskStatistics {
        self.counters.iter().fold(DiskStatistics::default(), |sum, queue| sum.plus(&queue.statistics()))
    }

    /// Gives the disk another size, and tells its driver.
    ///
    /// # Errors
    /// `InvalidArgument`: none of a disk's sizes, or more than its block device has. What the host answers to a file
    /// that is to grow.
    pub fn resize(&self, size: Bytes) -> Result<()> {
        let bytes = size.get();
        if bytes == 0 || !bytes.is_multiple_of(Sectors::SIZE) || i64::try_from(bytes).is_err() {
            let why = format!("{}: a size of {bytes} bytes: a multiple of 512, not 0, below 2^63", self.id);
            return Err(Error::new(ErrorKind::InvalidArgument, why));
        }
        let changing = lock(&self.changing);
        if let Some(resizer) = &self.resizer {
            resizer.resize(bytes)?;
        }
        self.size.store(bytes, Ordering::SeqCst);
        drop(changing);
        if let Some(signals) = &self.signals {
            signals.config_changed();
        }
        Ok(())
    }

    /// Limits it from now on. Who waits already hears of it within a tenth of a second.
    pub fn set_rate(&self, limit: RateLimit) {
        let mut bucket = lock(&self.bucket);
        bucket.set(limit, self.begun.elapsed());
        self.limited.store(!limit.is_none(), Ordering::SeqCst);
    }

    /// A copy of it in the making, at `path`: nothing is in it yet.
    ///
    /// # Errors
    /// `Unsupported` of code of the embedder's; what the host answers where it cannot make the image.
    pub fn copy_to(&self, path: &Path, format: DiskFormat) -> Result<Arc<Saving>> {
        let source = self.resizer.clone().ok_or_else(|| cannot(&self.id))?.reader();
        Ok(Arc::new(Saving::new(source, self.size(), path, format)?))
    }

    /// From now on what changes is copied first. Called while nothing is in flight.
    ///
    /// # Errors
    /// `Busy`: another copy is being made.
    pub fn begin_saving(self: &Arc<Self>, copy: &Arc<Saving>) -> Result<SavingGuard> {
        let mut saving = lock(&self.saving);
        if saving.is_some() {
            let why = format!("{}: is being saved already", self.id);
            return Err(Error::new(ErrorKind::Busy, why));
        }
        *saving = Some(copy.clone());
        self.is_saving.store(true, Ordering::SeqCst);
        Ok(SavingGuard(self.clone()))
    }

    /// That range is about to change.
    pub(super) fn keep(&self, offset: u64, length: u64) {
        if self.is_saving.load(Ordering::Relaxed) {
            let saving = lock(&self.saving).clone();
            if let Some(saving) = saving {
                saving.keep(offset, length);
            }
        }
    }

    /// How long until another request may begin; `None` where it may at once.
    pub(super) fn wait(&self) -> Option<Duration> {
        if !self.limited.load(Ordering::Relaxed) {
            return None;
        }
        lock(&self.bucket).ready(self.begun.elapsed()).err()
    }

    /// A request of so many bytes has begun.
    pub(super) fn spend(&self, bytes: u64) {
        if self.limited.load(Ordering::Relaxed) {
            lock(&self.bucket).spend(bytes, self.begun.elapsed());
        }
    }
}

/// A copy is being made until this is dropped.
pub(crate) struct SavingGuard(Arc<Control>);

impl Drop for SavingGuard {
    fn drop(&mut self) {
        self.0.is_saving.store(false, Ordering::SeqCst);
        *lock(&self.0.saving) = None;
    }
}
