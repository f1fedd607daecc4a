#![forbid(unsafe_code)]
//! A copy of a disk as it was at one instant, made while it is written to.
//!
//! A chunk is copied before it changes for the first time, by whoever is about to change it; all others are copied one after the
//! other. So the copy costs the guest one chunk's time at most per write, and never more than the disk's size in all.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend};

use super::{Backend, BlockOp, IoRequest, Submitted, create_disk};
use crate::config::{BackingConfig, DiskConfig, DiskEngine, DiskFormat};
use crate::error::{Error, ErrorKind, Result};
use crate::memory::Memory;
use crate::sys::fd;
use crate::sys::io::Pieces;
use crate::sys::lock;
use crate::sys::log;
use crate::units::{Bytes, Sectors};

/// What is copied at once.
const CHUNK: u64 = 256 << 10;
/// How long a file of the host's is waited for.
const PATIENCE: Duration = Duration::from_secs(60);

/// A copy in the making. Who makes it calls [`finish`](Self::finish) or [`abandon`](Self::abandon): a thread of the disk's may be the
/// last to have it, and may remove no file.
pub(crate) struct Saving(Mutex<State>);

struct State {
    source: Box<dyn Backend>,
    target: Option<Box<dyn Backend>>,
    path: PathBuf,
    size: u64,
    /// All chunks before this one are there.
    next: u64,
    /// And these: what the guest changed before its turn came.
    ahead: BTreeSet<u64>,
    /// Where data is in between.
    memory: Memory,
    /// Where it is looked at.
    bytes: Vec<u8>,
    pieces: Pieces,
    failed: Option<Error>,
}

impl Saving {
    /// Of `size` bytes of `source`, into a new image at `path`.
    ///
    /// # Errors
    /// The image cannot be made.
    pub fn new(source: Box<dyn Backend>, size: u64, path: &Path, format: DiskFormat) -> Result<Self> {
        let mut state = State {
            source,
            target: None,
            path: PathBuf::new(),
            size,
            next: 0,
            ahead: BTreeSet::new(),
            memory: Memory::on(CHUNK, &BackingConfig::default())?,
            bytes: vec![0; CHUNK as usize],
            pieces: Pieces::default(),
            failed: None,
        };
        create_disk(path, format, Bytes(size), None)?;
        // From here on it is removed with the state.
        state.path = path.to_owned();
        let saving = Self(Mutex::new(state));
        let config = DiskConfig { format, engine: DiskEngine::Sync, ..DiskConfig::new(path) };
        let target = super::open("saved", path, &config)?;
        lock(&saving.0).target = Some(target);
        Ok(saving)
    }

    /// How many bytes there are to copy.
    pub fn size(&self) -> u64 {
        lock(&self.0).size
    }

    /// That range is about to change: what it was is copied first. A copy that fails is the saver's business, not the guest's.
    pub fn keep(&self, offset: u64, length: u64) {
        let mut state = lock(&self.0);
        let chunks = offset / CHUNK..offset.saturating_add(length).div_ceil(CHUNK);
        for chunk in chunks {
            if state.failed.is_none() {
                state.copy(chunk);
            }
        }
    }

    /// Copies the next chunk; how many bytes are behind us.
    ///
    /// # Errors
    /// What has failed, here or for a write of the guest's.
    pub fn step(&self) -> Result<u64> {
        let mut state = lock(&self.0);
        let next = state.next;
        state.copy(next);
        while state.ahead.first() == Some(&state.next) {
            state.ahead.pop_first();
            state.next += 1;
        }
        match state.failed.take() {
            Some(error) => Err(error),
            None => Ok(state.next.saturating_mul(CHUNK).min(state.size)),
        }
    }

    /// All of it is there: brings it to stable storage.
    ///
    /// # Errors
    /// The host could not.
    pub fn finish(&self) -> Result<()> {
        let mut state = lock(&self.0);
        if let Some(error) = state.failed.take() {
            return Err(error);
        }
        let Some(mut target) = state.target.take() else { return Ok(()) };
        let State { path, memory, pieces, .. } = &mut *state;
        perform(&mut *target, memory, pieces, BlockOp::Flush, 0, 0)
            .map_err(|e| failed(path, "flushing it", e))?;
        state.path = PathBuf::new();
        Ok(())
    }

    /// It will not be complete: its file is gone afterwards, and nothing is copied any more. Nothing, where it has been finished.
    pub fn abandon(&self) {
        let unfinished = lock(&self.0).give_up();
        // Nobody waits for the lock meanwhile.
        remove(unfinished);
    }
}

fn remove((target, path): (Option<Box<dyn Backend>>, PathBuf)) {
    drop(target);
    if !path.as_os_str().is_empty()
        && let Err(error) = std::fs::remove_file(&path)
    {
        log::warn!("removing {}, which is not complete: {error}", path.display());
    }
}

impl State {
    fn give_up(&mut self) -> (Option<Box<dyn Backend>>, PathBuf) {
        (self.target.take(), std::mem::take(&mut self.path))
    }

    fn copy(&mut self, chunk: u64) {
        let is_there = chunk < self.next || chunk >= self.size.div_ceil(CHUNK) || self.target.is_none();
        if is_there || !self.ahead.insert(chunk) {
            return;
        }
        if let Err((what, error)) = self.try_copy(chunk * CHUNK) {
            self.failed = Some(failed(&self.path, what, error));
        }
    }

    fn try_copy(&mut self, offset: u64) -> std::result::Result<(), (&'static str, io::Error)> {
        let reading = |error| ("reading the disk", error);
        let Some(target) = &mut self.target else { return Ok(()) };
        let length = CHUNK.min(self.size - offset) / Sectors::SIZE * Sectors::SIZE;
        perform(&mut *self.source, &self.memory, &mut self.pieces, BlockOp::Read, offset, length)
            .map_err(reading)?;
        let bytes = &mut self.bytes[..length as usize];
        self.memory.read_slice(bytes, GuestAddress(0)).map_err(|e| reading(io::Error::other(e)))?;
        // The image is made of zeroes.
        if bytes.iter().all(|byte| *byte == 0) {
            return Ok(());
        }
        let write = BlockOp::Write { durable: false };
        let written = perform(&mut **target, &self.memory, &mut self.pieces, write, offset, length);
        written.map_err(|error| ("writing the image", error))
    }
}

impl Drop for State {
    fn drop(&mut self) {
        remove(self.give_up());
    }
}

fn failed(path: &Path, what: &str, error: io::Error) -> Error {
    Error::os(format!("saving a disk to {}: {what}", path.display()), error)
}

/// Does one request, and waits for it.
fn perform(
    disk: &mut dyn Backend,
    memory: &Memory,
    pieces: &mut Pieces,
    op: BlockOp,
    offset: u64,
    length: u64,
) -> io::Result<()> {
    let mut buffers = pieces.list();
    if length > 0 {
        let slice = memory.get_slice(GuestAddress(0), length as usize).map_err(io::Error::other)?;
        buffers.push(slice);
    }
    match disk.submit(IoRequest { op, offset, length, buffers, memory, tag: 0 }) {
        Submitted::Done(outcome) => outcome,
        Submitted::Pending => {
            let (end, mut answer) = (Instant::now() + PATIENCE, None);
            while answer.is_none() {
                if Instant::now() >= end {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                disk.kick();
                if let Some(fd) = disk.completion_fd() {
                    fd::wait_readable(fd, Duration::from_millis(100));
                }
                disk.completions(&mut |_, outcome| answer = Some(outcome));
            }
            answer.unwrap_or(Ok(()))
        }
    }
}

/// The disk that `Saving` refuses: nobody else can read what holds its bytes.
pub(crate) fn cannot(id: &str) -> Error {
    let why = format!("{id}: its bytes are behind code of yours: save them there");
    Error::new(ErrorKind::Unsupported, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_that_is_given_up_is_gone_though_somebody_has_it_in_hand() {
        let directory = std::env::temp_dir();
        let [from, to] =
            ["from", "to"].map(|name| directory.join(format!("vmbed-save-{name}-{}", std::process::id())));
        std::fs::write(&from, vec![7; 2 * CHUNK as usize]).unwrap();
        let source = crate::block::open("disk0", &from, &DiskConfig::new(&from)).unwrap();
        let copy = std::sync::Arc::new(Saving::new(source, 2 * CHUNK, &to, DiskFormat::Raw).unwrap());
        let in_hand = copy.clone();
        assert_eq!(copy.step().unwrap(), CHUNK);
        copy.abandon();
        assert!(!to.exists());
        // Another file of that name is not its own any more.
        std::fs::write(&to, b"other").unwrap();
        in_hand.keep(0, 2 * CHUNK);
        copy.abandon();
        drop((copy, in_hand));
        assert_eq!(std::fs::read(&to).unwrap(), b"other");
        [from, to].iter().for_each(|file| std::fs::remove_file(file).unwrap());
    }
}
