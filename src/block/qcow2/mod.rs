#![forbid(unsafe_code)]
//! qcow2 images (QEMU's docs/interop/qcow2.txt), with what they are based on.
//!
//! imago knows the format: it finds where a piece of the disk lies, makes room for it, and unpacks what is compressed.
//! Data moves straight between guest memory and the file, as everywhere.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use imago::FormatAccess;
use imago::qcow2::Qcow2;

use self::lane::Lane;
use self::layers::Shared;
use super::{Backend, IoRequest, Resize, Submitted};
use crate::error::Result;
use crate::sys::image::Store;
use crate::sys::io::Pieces;
use crate::sys::log;

mod cipher;
mod lane;
mod layers;
mod luks;
mod open;
mod reader;
mod refcounts;

pub(super) use open::{format_qcow2, qcow2_size};

type Access = FormatAccess<Store>;
type Image = Qcow2<Store>;

/// A qcow2 disk, opened; one for each queue.
pub(crate) struct Qcow2Disk {
    /// Before what it is a lane of: what is on its way ends first.
    lane: Option<Lane>,
    shared: Arc<Shared>,
    /// Room for a part of a request's buffers.
    pieces: Pieces,
}

impl Qcow2Disk {
    fn new(shared: Arc<Shared>, lane: Option<Lane>) -> Self {
        Self { lane, shared, pieces: Pieces::default() }
    }
}

/// What the library says in words is an error of the image's to a guest.
fn in_numbers(shared: &Shared, done: io::Result<()>) -> io::Result<()> {
    done.map_err(|error| match error.raw_os_error() {
        Some(_) => error,
        None => {
            log::warn!("{}: {error}", shared.name);
            io::Error::from_raw_os_error(libc::EIO)
        }
    })
}

impl Backend for Qcow2Disk {
    fn size(&self) -> u64 {
        self.shared.size.load(Ordering::SeqCst)
    }

    fn readonly(&self) -> bool {
        self.shared.config.readonly
    }

    fn discards(&self) -> bool {
        self.shared.config.discard && !self.shared.config.readonly
    }

    fn another(&self) -> Result<Option<Box<dyn Backend>>> {
        let lane = Lane::choose(&self.shared)?;
        Ok(Some(Box::new(Self::new(self.shared.clone(), lane))))
    }

    fn resizer(&self) -> Option<Arc<dyn Resize>> {
        Some(self.shared.clone())
    }

    fn submit(&mut self, request: IoRequest<'_>) -> Submitted {
        let Self { shared, pieces, lane } = self;
        let begun = lane.as_mut().and_then(|lane| lane.begin(shared, pieces, &request));
        match begun.unwrap_or_else(|| Submitted::Done(shared.perform(pieces, request))) {
            Submitted::Done(done) => Submitted::Done(in_numbers(shared, done)),
            Submitted::Pending => Submitted::Pending,
        }
    }

    fn kick(&mut self) -> bool {
        self.lane.as_mut().is_none_or(Lane::kick)
    }

    fn completions(&mut self, done: &mut dyn FnMut(u64, io::Result<()>)) {
        let Self { shared, pieces, lane } = self;
        if let Some(lane) = lane {
            lane.completions(shared, pieces, &mut |tag, outcome| done(tag, in_numbers(shared, outcome)));
        }
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        self.lane.as_ref().map(Lane::completion_fd)
    }

    fn abandon(&mut self) {
        let Self { shared, lane, .. } = self;
        if let Some(lane) = lane {
            lane.abandon(shared);
        }
    }
}
