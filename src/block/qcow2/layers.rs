#![forbid(unsafe_code)]
//! An image's layers, and how data moves to and from them: where it lies is the library's business.

use std::collections::BTreeMap;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use imago::Mapping;
use imago::format::PreallocateMode;

use super::reader::Reader;
use super::{Access, Qcow2Disk};
use crate::block::engine::sync;
use crate::block::target::Target;
use crate::block::{Backend, BlockOp, IoRequest, Resize};
use crate::config::{DiskConfig, DiskFormat};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::image::Content;
use crate::sys::io::{IoList, Pieces};
use crate::sys::lock;
use crate::sys::log;

/// What all queues of a disk share.
pub(super) struct Shared {
    pub name: String,
    pub config: DiskConfig,
    pub size: AtomicU64,
    /// Who moves data holds it for reading, since a discard may give the place to something else.
    pub access: RwLock<Access>,
    /// Room is made for one write at a time.
    pub allocating: Mutex<()>,
    /// The files of the chain, by their layers; behind them, where the top one keeps its data if not in itself.
    pub targets: Vec<Target>,
    /// The images of the chain that the library cannot read, by the layers of their stores, which are none of files.
    pub readers: BTreeMap<usize, Arc<Reader>>,
    /// Transfers that a kernel works on: begun under `access`, which nobody holds until they end.
    pub flying: AtomicUsize,
    /// Discards that wait until there are none: nobody begins another one meanwhile.
    pub waiting: AtomicUsize,
}

/// Version 2 of the format has no clusters of zeroes.
fn is_missing(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Unsupported
}

impl Shared {
    /// How long the disk of the image below is; 0 where there is none.
    fn size_below(&self) -> io::Result<u64> {
        let (Some(below), Some(target)) = (self.config.backing.first(), self.targets.get(1)) else {
            return Ok(0);
        };
        // Not the one whose reads are to be aligned.
        let mut file = target.cached();
        if below.format == DiskFormat::Qcow2 {
            let mut size = [0; 8];
            file.read_exact_at(&mut size, 24)?;
            return Ok(u64::from_be_bytes(size));
        }
        // Of a block device, too. Nobody reads from where that leaves it.
        file.seek(SeekFrom::End(0))
    }

    pub fn reading(&self) -> RwLockReadGuard<'_, Access> {
        self.access.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn alone(&self) -> RwLockWriteGuard<'_, Access> {
        self.access.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn flush(&self) -> io::Result<()> {
        let access = self.reading();
        access.flush()?;
        if self.targets.first().is_some_and(Target::keeps_promises) { access.sync() } else { Ok(()) }
    }

    fn read(&self, pieces: &mut Pieces, offset: u64, length: u64, buffers: &IoList<'_>) -> io::Result<()> {
        let access = self.reading();
        let mut done = 0;
        while done < length {
            let (mapping, there) = access.get_mapping(offset + done, length - done)?;
            let step = there.min(length - done);
            if step == 0 {
                // It has become shorter than the disk.
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
            let part = buffers.part(pieces, done as usize, step as usize);
            match mapping {
                Mapping::Raw { storage, offset, .. } => self.fill(storage.layer, offset, part)?,
                Mapping::Zero { .. } => part.fill_zeroes()?,
                Mapping::Special { layer, offset, .. } => {
                    let mut unpacked = vec![0; step as usize];
                    layer.read(&mut unpacked[..], offset)?;
                    part.copy_from(0, &unpacked)?;
                }
                _ => return Err(io::Error::from_raw_os_error(libc::EIO)),
            }
            done += step;
        }
        Ok(())
    }

    /// From a file of the chain; behind its end lie zeroes, since its last cluster may be cut off there.
    pub fn fill(&self, layer: usize, offset: u64, mut part: IoList<'_>) -> io::Result<()> {
        if let Some(reader) = self.readers.get(&layer) {
            let mut bytes = vec![0; part.len()];
            reader.read(&mut bytes, offset)?;
            part.copy_from(0, &bytes)?;
            return Ok(());
        }
        let target = self.targets.get(layer).ok_or_else(|| io::Error::from_raw_os_error(libc::EIO))?;
        let mut done = 0;
        let wanted = part.len();
        while done < wanted {
            let at = offset + done as u64;
            match sync::read_some(target.file_for(at, &part), at, &part)? {
                0 => return part.fill_zeroes(),
                count => {
                    part.advance(count);
                    done += count;
                }
            }
        }
        Ok(())
    }

    fn write(&self, pieces: &mut Pieces, offset: u64, length: u64, buffers: &IoList<'_>) -> io::Result<()> {
        let access = self.reading();
        let mut done = 0;
        while done < length {
            let at = offset + done;
            let (mapping, there) = access.get_mapping(at, length - done)?;
            if let Mapping::Raw { storage, offset: place, writable: true, .. } = mapping
                && there > 0
            {
                let step = there.min(length - done);
                self.put(storage.layer, place, buffers.part(pieces, done as usize, step as usize))?;
                done += step;
                continue;
            }
            // Data is there before anything says that it is.
            let _one = lock(&self.allocating);
            let room = access.prepare_data_mapping(at, length - done, true)?;
            let step = room.length().min(length - done);
            self.put(
                room.storage().layer,
                room.offset(),
                buffers.part(pieces, done as usize, step as usize),
            )?;
            access.commit_data_mapping(room)?;
            done += step;
        }
        Ok(())
    }

    /// For formats that do not know them.
    fn write_zeroes(&self, pieces: &mut Pieces, offset: u64, length: u64) -> io::Result<()> {
        let (mut room, mut done) = (Pieces::default(), 0);
        while done < length {
            let step = (length - done).min(sync::ZEROES.len() as u64);
            let mut list = room.list();
            list.push_bytes(&sync::ZEROES[..step as usize]);
            self.write(pieces, offset + done, step, &list)?;
            done += step;
        }
        Ok(())
    }

    pub fn put(&self, layer: usize, offset: u64, part: IoList<'_>) -> io::Result<()> {
        let target = self.targets.get(layer).ok_or_else(|| io::Error::from_raw_os_error(libc::EIO))?;
        sync::write(target.file_for(offset, &part), offset, part, false)
    }

    /// A discard, or a zeroing. It gives places away: it waits for whoever reads or writes one, and they for it. `None`: a
    /// kernel is at work on one. Where it is too late to wait for that, a discard is left out, and zeroes are written.
    pub fn clear(
        &self,
        pieces: &mut Pieces,
        op: BlockOp,
        (offset, length): (u64, u64),
        late: bool,
    ) -> Option<io::Result<()>> {
        let mut access = self.alone();
        let (unmap, durable) = match op {
            BlockOp::WriteZeroes { unmap, durable } => (unmap, durable),
            _ => (true, false),
        };
        let done = match op {
            _ if self.flying.load(Ordering::SeqCst) > 0 => {
                if !late {
                    return None;
                }
                Err(io::ErrorKind::Unsupported.into())
            }
            BlockOp::Discard => access.discard_to_any(offset, length),
            _ if unmap => access.discard_to_zero(offset, length),
            _ => access.write_zeroes(offset, length),
        };
        drop(access);
        let done = match (done, op) {
            (Err(error), BlockOp::Discard) if is_missing(&error) => Ok(()),
            (Err(error), _) if is_missing(&error) => self.write_zeroes(pieces, offset, length),
            (done, _) => done,
        };
        Some(done.and_then(|()| if durable { self.flush() } else { Ok(()) }))
    }

    pub fn perform(&self, pieces: &mut Pieces, request: IoRequest<'_>) -> io::Result<()> {
        let IoRequest { op, offset, length, buffers, .. } = request;
        let durable = match op {
            BlockOp::Read => return self.read(pieces, offset, length, &buffers),
            BlockOp::Flush => return self.flush(),
            BlockOp::Discard | BlockOp::WriteZeroes { .. } => {
                return self.clear(pieces, op, (offset, length), true).unwrap_or(Ok(()));
            }
            BlockOp::Write { durable } => {
                self.write(pieces, offset, length, &buffers)?;
                durable
            }
        };
        if durable { self.flush() } else { Ok(()) }
    }
}

impl Resize for Shared {
    fn resize(&self, bytes: u64) -> Result<()> {
        let access = self.reading();
        // Nobody else makes the file longer meanwhile.
        let _one = lock(&self.allocating);
        let failed = |e| Error::os(format!("{}: growing to {bytes} bytes", self.name), e);
        // What a backing file has there must not show.
        let shows = self.size_below().map_err(failed)?.min(bytes);
        if access.size() < shows {
            access.resize_grow(shows, PreallocateMode::Zero).map_err(|e| match e.kind() {
                io::ErrorKind::Unsupported => {
                    let why = "its backing file is longer, and version 2 of the format cannot hide that (qemu-img amend -o compat=1.1)";
                    Error::new(ErrorKind::Unsupported, format!("{}: growing to {bytes} bytes: {why}", self.name))
                }
                _ => failed(e),
            })?;
            // Not later than the size, which is there already.
            access.flush().map_err(failed)?;
            if self.targets.first().is_some_and(Target::keeps_promises) {
                access.sync().map_err(failed)?;
            }
        }
        if access.size() < bytes {
            access.resize_grow(bytes, PreallocateMode::None).map_err(failed)?;
        }
        self.size.store(bytes, Ordering::SeqCst);
        Ok(())
    }

    fn reader(self: Arc<Self>) -> Box<dyn Backend> {
        Box::new(Qcow2Disk::new(self, None))
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if !self.config.readonly
            && let Err(error) = self.flush()
        {
            log::error!("{}: its metadata could not be written: {error}", self.name);
        }
    }
}
