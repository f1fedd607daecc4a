#![forbid(unsafe_code)]
//! qcow2 images (QEMU's docs/interop/qcow2.txt), with what they are based on.
//!
//! imago knows the format: it finds where a piece of the disk lies, makes room for it, and unpacks what is compressed.
//! Data moves straight between guest memory and the file, as everywhere.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, Mapping};

use super::engine::sync;
use super::raw::{self, lock_file};
use super::target::Target;
use super::{Backend, BlockOp, IoRequest, Resize, Submitted};
use crate::config::{DiskBacking, DiskConfig, DiskFormat};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::image::Store;
use crate::sys::io::{IoList, Pieces};
use crate::sys::lock;
use crate::units::Sectors;

type Access = FormatAccess<Store>;
type Image = Qcow2<Store>;

/// A qcow2 disk, opened; one for each queue.
pub(crate) struct Qcow2Disk {
    shared: Arc<Shared>,
    /// Room for a part of a request's buffers.
    pieces: Pieces,
}

struct Shared {
    name: String,
    config: DiskConfig,
    size: AtomicU64,
    /// Who moves data holds it for reading, since a discard may give the place to something else.
    access: RwLock<Access>,
    /// Room is made for one write at a time.
    allocating: Mutex<()>,
    /// The files of the chain, by their layers.
    targets: Vec<Target>,
}

/// Makes an empty image in that file, which is empty.
pub(super) fn format_qcow2(path: &Path, file: &File, size: u64, backing: Option<&DiskBacking>) -> Result<()> {
    let name = path.display().to_string();
    let mut builder = Image::create_builder(store(&name, file, 0)?).size(size);
    if let Some(below) = backing {
        let format = if below.format == DiskFormat::Raw { "raw" } else { "qcow2" };
        builder = builder.backing(below.path.to_string_lossy().into_owned(), format.into());
    }
    builder.create().map_err(|e| bad(&name, e))
}

/// The size of the disk in the image at `path`.
pub(super) fn qcow2_size(path: &Path) -> Result<u64> {
    let name = path.display().to_string();
    let file = open(&name, path, true, false)?;
    let image = Image::open_image(store(&name, &file, 0)?, false).map_err(|e| bad(&name, e))?;
    Ok(FormatAccess::new(image).size())
}

impl Qcow2Disk {
    /// Opens the image at `path` for the disk `id`, and what the configuration says that it is based on.
    ///
    /// # Errors
    /// A file is missing, not ours to open, in use, or not what it is said to be; the image names a backing file, and the
    /// configuration does not; it has an external data file.
    pub fn open(id: &str, path: &Path, config: &DiskConfig) -> Result<Self> {
        let name = format!("{id}: {}", path.display());
        let mut targets = Vec::new();
        let mut backing = None;
        // From the bottom up.
        for (layer, below) in config.backing.iter().enumerate().rev() {
            let name = format!("{id}: backing[{layer}]: {}", below.path.display());
            let file = open(&name, &below.path, true, config.lock)?;
            let store = store(&name, &file, layer + 1)?;
            targets.push(Target::new(&name, file, config.cache, true)?);
            let image: Access = match below.format {
                DiskFormat::Raw => {
                    let raw = Raw::<Store>::builder(store).open(DenyImplicitOpenGate::default());
                    FormatAccess::new(raw.map_err(|e| bad(&name, e))?)
                }
                DiskFormat::Qcow2 => FormatAccess::new(layered(&name, store, false, backing.take())?),
            };
            if let Some(unused) = backing.replace(image) {
                drop::<Access>(unused);
                let why = format!("{name}: is raw, and based on nothing: backing[{}] is too much", layer + 1);
                return Err(Error::new(ErrorKind::InvalidArgument, why));
            }
        }
        let file = open(&name, path, config.readonly, config.lock)?;
        let image = layered(&name, store(&name, &file, 0)?, !config.readonly, backing)?;
        targets.push(Target::new(&name, file, config.cache, config.readonly)?);
        targets.reverse();
        let access = FormatAccess::new(image);
        let size = access.size() / Sectors::SIZE * Sectors::SIZE;
        let shared = Shared {
            name,
            config: config.clone(),
            size: AtomicU64::new(size),
            access: RwLock::new(access),
            allocating: Mutex::new(()),
            targets,
        };
        Ok(Self { shared: Arc::new(shared), pieces: Pieces::default() })
    }
}

fn open(name: &str, path: &Path, readonly: bool, locked: bool) -> Result<File> {
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let opened = OpenOptions::new().read(true).write(!readonly).custom_flags(flags).open(path);
    let file = opened.map_err(|e| raw::refused(name, readonly, e))?;
    if locked {
        lock_file(name, &file, readonly)?;
    }
    Ok(file)
}

fn store(name: &str, file: &File, layer: usize) -> Result<Store> {
    let again = file.try_clone().map_err(|e| Error::os(format!("{name}: duplicating its descriptor"), e))?;
    Ok(Store::new(again, layer))
}

fn bad(name: &str, error: io::Error) -> Error {
    if error.raw_os_error().is_some() {
        return Error::os(format!("{name}: reading it"), error);
    }
    let why = format!("{name}: is no qcow2 image that can be used: {error}");
    Error::new(ErrorKind::InvalidArgument, why).with_source(error)
}

/// A qcow2 image on `backing`, which must be there exactly if the image names one.
fn layered(name: &str, store: Store, write: bool, backing: Option<Access>) -> Result<Image> {
    let invalid = |why: String| Err(Error::new(ErrorKind::InvalidArgument, format!("{name}: {why}")));
    let mut image = Image::open_image(store, write).map_err(|e| bad(name, e))?;
    if image.requires_external_data_file() {
        return invalid("has an external data file, which is not supported".into());
    }
    match (image.implicit_backing_file(), &backing) {
        (Some(file), None) => {
            return invalid(format!(
                "is based on {file:?}, which is opened only if you say so: name the file and its format in backing"
            ));
        }
        (None, Some(_)) => return invalid("is based on nothing: there is a file too many in backing".into()),
        _ => {}
    }
    image.set_backing(backing);
    image.set_data_file(None);
    Ok(image)
}

/// Version 2 of the format has no clusters of zeroes.
fn is_missing(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Unsupported
}

impl Shared {
    fn reading(&self) -> RwLockReadGuard<'_, Access> {
        self.access.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn alone(&self) -> RwLockWriteGuard<'_, Access> {
        self.access.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn flush(&self) -> io::Result<()> {
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
    fn fill(&self, layer: usize, offset: u64, mut part: IoList<'_>) -> io::Result<()> {
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

    fn put(&self, layer: usize, offset: u64, part: IoList<'_>) -> io::Result<()> {
        let target = self.targets.get(layer).ok_or_else(|| io::Error::from_raw_os_error(libc::EIO))?;
        sync::write(target.file_for(offset, &part), offset, part, false)
    }

    fn perform(&self, pieces: &mut Pieces, request: IoRequest<'_>) -> io::Result<()> {
        let IoRequest { op, offset, length, buffers, .. } = request;
        let durable = match op {
            BlockOp::Read => return self.read(pieces, offset, length, &buffers),
            BlockOp::Flush => return self.flush(),
            // Whoever reads or writes holds a place that a discard gives away: it waits for them, and they for it.
            BlockOp::Discard => {
                return self
                    .alone()
                    .discard_to_any(offset, length)
                    .or_else(|e| if is_missing(&e) { Ok(()) } else { Err(e) });
            }
            BlockOp::WriteZeroes { unmap, durable } => {
                let mut access = self.alone();
                let zeroed = if unmap {
                    access.discard_to_zero(offset, length)
                } else {
                    access.write_zeroes(offset, length)
                };
                drop(access);
                match zeroed {
                    Err(error) if is_missing(&error) => self.write_zeroes(pieces, offset, length)?,
                    done => done?,
                }
                durable
            }
            BlockOp::Write { durable } => {
                self.write(pieces, offset, length, &buffers)?;
                durable
            }
        };
        if durable { self.flush() } else { Ok(()) }
    }
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
        Ok(Some(Box::new(Self { shared: self.shared.clone(), pieces: Pieces::default() })))
    }

    fn resizer(&self) -> Option<Arc<dyn Resize>> {
        Some(self.shared.clone())
    }

    fn submit(&mut self, request: IoRequest<'_>) -> Submitted {
        let Self { shared, pieces } = self;
        let done = shared.perform(pieces, request);
        // What the library says in words is an error of the image's to a guest.
        Submitted::Done(done.map_err(|error| match error.raw_os_error() {
            Some(_) => error,
            None => {
                log::warn!("{}: {error}", shared.name);
                io::Error::from_raw_os_error(libc::EIO)
            }
        }))
    }
}

impl Resize for Shared {
    fn resize(&self, bytes: u64) -> Result<()> {
        let access = self.reading();
        if access.size() < bytes {
            let grown = access.resize_grow(bytes, imago::format::PreallocateMode::None);
            grown.map_err(|e| Error::os(format!("{}: growing to {bytes} bytes", self.name), e))?;
        }
        self.size.store(bytes, Ordering::SeqCst);
        Ok(())
    }

    fn reader(self: Arc<Self>) -> Box<dyn Backend> {
        Box::new(Qcow2Disk { shared: self, pieces: Pieces::default() })
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
