#![forbid(unsafe_code)]
//! A queue's way to the files of an image with io_uring.
//!
//! What lies in one piece in one file goes through the ring: most reads, and writes to where room was made before. All else
//! is done at once, one by one. A discard may give a place in the file to something else, so it waits until nothing is on its
//! way to or from any place, and is left out where that takes too long: it is advice.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use imago::Mapping;

use super::layers::Shared;
use crate::block::{BlockOp, IoRequest, Submitted, engine};
use crate::error::Result;
use crate::memory::Memory;
use crate::sys::io::Pieces;
use crate::sys::log;
use crate::sys::uring::{Ended, Refused, Ring, Work};

/// How long a discard waits for what is on its way. In the queue of a thread that waits itself nothing ends.
const PATIENCE: Duration = Duration::from_millis(50);

pub(super) struct Lane {
    ring: Ring<Memory>,
    held: Vec<Held>,
}

/// A discard that waits.
struct Held {
    op: BlockOp,
    offset: u64,
    length: u64,
    tag: u64,
    until: Instant,
}

impl Lane {
    /// A ring, where the configuration wants one and the host has it.
    pub fn choose(shared: &Shared) -> Result<Option<Self>> {
        let files: Vec<_> = shared.targets.iter().map(|target| target.main().as_fd()).collect();
        let ring = engine::ring(&shared.name, shared.config.engine, &files)?;
        Ok(ring.map(|ring| Self { ring, held: Vec::new() }))
    }

    /// What becomes of it here; `None`: it is to be done by the caller, now.
    pub fn begin(
        &mut self,
        shared: &Shared,
        pieces: &mut Pieces,
        request: &IoRequest<'_>,
    ) -> Option<Submitted> {
        let begun = match request.op {
            BlockOp::Read => self.transfer(shared, request, Work::Read),
            BlockOp::Write { durable: false } => {
                self.transfer(shared, request, Work::Write { durable: false })
            }
            // What describes the data must be there before it as well.
            BlockOp::Write { durable: true } => Ok(false),
            BlockOp::Flush => self.flush(shared, request),
            BlockOp::Discard | BlockOp::WriteZeroes { .. } => {
                return Some(self.clear(shared, pieces, request));
            }
        };
        match begun {
            Ok(true) => Some(Submitted::Pending),
            Ok(false) => None,
            Err(error) => Some(Submitted::Done(Err(error))),
        }
    }

    fn clear(&mut self, shared: &Shared, pieces: &mut Pieces, request: &IoRequest<'_>) -> Submitted {
        let IoRequest { op, offset, length, tag, .. } = *request;
        if self.held.is_empty()
            && let Some(done) = shared.clear(pieces, op, (offset, length), false)
        {
            return Submitted::Done(done);
        }
        shared.waiting.fetch_add(1, Ordering::SeqCst);
        self.held.push(Held { op, offset, length, tag, until: Instant::now() + PATIENCE });
        Submitted::Pending
    }

    fn transfer(&mut self, shared: &Shared, request: &IoRequest<'_>, work: Work) -> io::Result<bool> {
        let IoRequest { offset, length, .. } = *request;
        if shared.waiting.load(Ordering::SeqCst) > 0 {
            return Ok(false);
        }
        // Held until the transfer counts as on its way: then no discard takes the place from it.
        let access = shared.reading();
        let (mapping, there) = access.get_mapping(offset, length)?;
        let Mapping::Raw { storage, offset: place, writable, .. } = mapping else { return Ok(false) };
        let Some(target) = shared.targets.get(storage.layer) else { return Ok(false) };
        let fits = there >= length && target.is_main(place, &request.buffers);
        if !fits || (work != Work::Read && !writable) {
            return Ok(false);
        }
        self.push(shared, work, (storage.layer, place), request)
    }

    /// The tables, and then the file's own caches.
    fn flush(&mut self, shared: &Shared, request: &IoRequest<'_>) -> io::Result<bool> {
        let promises = shared.targets.first().is_some_and(|target| target.keeps_promises());
        if !promises || shared.config.data_file.is_some() {
            return Ok(false);
        }
        shared.reading().flush()?;
        self.push(shared, Work::Sync, (0, 0), request)
    }

    fn push(
        &mut self,
        shared: &Shared,
        work: Work,
        (layer, place): (usize, u64),
        request: &IoRequest<'_>,
    ) -> io::Result<bool> {
        shared.flying.fetch_add(places(work), Ordering::SeqCst);
        let pushed = self.ring.push((layer, work), place, &request.buffers, request.memory, request.tag);
        if pushed.is_err() {
            shared.flying.fetch_sub(places(work), Ordering::SeqCst);
        }
        match pushed {
            Ok(()) => Ok(true),
            Err(Refused::Full) => Ok(false),
            Err(Refused::Foreign) => Err(io::Error::from_raw_os_error(libc::EFAULT)),
        }
    }

    /// As [`Backend::kick`](crate::block::Backend::kick); who holds a discard wants to be woken as well.
    pub fn kick(&mut self) -> bool {
        let entered = self.ring.enter();
        entered.inspect_err(|error| log::debug!("io_uring_enter: {error}")).is_ok() && self.held.is_empty()
    }

    pub fn completions(
        &mut self,
        shared: &Shared,
        pieces: &mut Pieces,
        done: &mut dyn FnMut(u64, io::Result<()>),
    ) {
        let Self { ring, held } = self;
        ring.reap(|mut ended| {
            let outcome = finish(shared, &mut ended);
            shared.flying.fetch_sub(places(ended.work), Ordering::SeqCst);
            done(ended.tag, outcome);
        });
        held.retain(|wish| {
            let late = Instant::now() >= wish.until;
            let Some(outcome) = shared.clear(pieces, wish.op, (wish.offset, wish.length), late) else {
                return true;
            };
            shared.waiting.fetch_sub(1, Ordering::SeqCst);
            done(wish.tag, outcome);
            false
        });
    }

    pub fn completion_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }

    pub fn abandon(&mut self, shared: &Shared) {
        self.ring.abandon();
        shared.waiting.fetch_sub(self.held.len(), Ordering::SeqCst);
        self.held.clear();
    }
}

/// How many places in a file it is on its way to or from: a flush may take long, and no discard needs to wait for it.
fn places(work: Work) -> usize {
    usize::from(work != Work::Sync)
}

/// What a transfer came to, gone on with where it came short.
fn finish(shared: &Shared, ended: &mut Ended<'_>) -> io::Result<()> {
    let done = match &ended.result {
        Ok(done) if *done as u64 >= ended.wanted() => return Ok(()),
        Ok(done) => *done,
        Err(error) => engine::again(error)?,
    };
    let (layer, work, offset) = (ended.file, ended.work, ended.offset + done as u64);
    match work {
        Work::Read => shared.fill(layer, offset, ended.rest(done)),
        Work::Write { .. } => shared.put(layer, offset, ended.rest(done)),
        Work::Sync => shared.flush(),
    }
}
