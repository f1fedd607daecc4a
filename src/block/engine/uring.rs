#![forbid(unsafe_code)]
//! The engine on io_uring: requests of a batch begin with one system call, and end in any order.
//!
//! What the ring cannot do, or the kernel refuses for want of memory, is done by the synchronous engine.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::{again, sync};
use crate::block::target::Target;
use crate::block::{BlockOp, IoRequest, Submitted};
use crate::memory::Memory;
use crate::sys::log;
use crate::sys::uring::{Ended, Refused, Ring, Work};

pub(in crate::block) struct Uring {
    target: Arc<Target>,
    ring: Ring<Memory>,
    /// What the kernel answers next, for tests.
    #[cfg(test)]
    pub faults: Vec<i32>,
}

impl Uring {
    /// On a ring whose one file is that.
    pub fn new(target: Arc<Target>, ring: Ring<Memory>) -> Self {
        Self {
            target,
            ring,
            #[cfg(test)]
            faults: Vec::new(),
        }
    }

    pub fn submit(&mut self, request: IoRequest<'_>) -> Submitted {
        let promises = self.target.keeps_promises();
        let work = match request.op {
            BlockOp::Read => Work::Read,
            BlockOp::Write { durable } => Work::Write { durable: durable && promises },
            BlockOp::Flush if promises => Work::Sync,
            _ => return Submitted::Done(self.target.perform(request)),
        };
        if !self.target.is_main(request.offset, &request.buffers) {
            return Submitted::Done(self.target.perform(request));
        }
        match self.ring.push((0, work), request.offset, &request.buffers, request.memory, request.tag) {
            Ok(()) => Submitted::Pending,
            Err(Refused::Foreign) => Submitted::Done(Err(io::Error::from_raw_os_error(libc::EFAULT))),
            // Whoever called before has more on its way than a queue has entries.
            Err(Refused::Full) => Submitted::Done(self.target.perform(request)),
        }
    }

    pub fn kick(&mut self) -> bool {
        let entered = self.ring.enter();
        entered.inspect_err(|error| log::debug!("io_uring_enter: {error}")).is_ok()
    }

    pub fn completions(&mut self, done: &mut dyn FnMut(u64, io::Result<()>)) {
        let Self { target, ring, .. } = self;
        ring.reap(|mut ended| {
            #[cfg(test)]
            if let Some(errno) = self.faults.pop() {
                ended.result = Err(io::Error::from_raw_os_error(errno));
            }
            let outcome = finish(target, &mut ended);
            done(ended.tag, outcome);
        });
    }

    pub fn completion_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }

    pub fn abandon(&mut self) {
        self.ring.abandon();
    }
}

/// What a transfer came to. One that came short, or found no memory, is gone on with here and now: both are rare.
fn finish(target: &Target, ended: &mut Ended<'_>) -> io::Result<()> {
    let wanted = ended.wanted();
    let done = match &ended.result {
        Ok(done) if *done as u64 >= wanted => return Ok(()),
        // The file has become shorter than the disk.
        Ok(0) => return Err(io::Error::from_raw_os_error(libc::EIO)),
        Ok(done) => *done,
        Err(error) => again(error)?,
    };
    let (work, offset) = (ended.work, ended.offset + done as u64);
    let rest = ended.rest(done);
    let file = target.file_for(offset, &rest);
    match work {
        Work::Read => sync::read(file, offset, rest),
        Work::Write { durable } => sync::write(file, offset, rest, durable),
        Work::Sync => target.cached().sync_data(),
    }
}
