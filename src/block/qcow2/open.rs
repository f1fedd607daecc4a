#![forbid(unsafe_code)]
//! Opening an image with what it is based on, and making one.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::sync::{Arc, Mutex, RwLock};

use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder};

use super::lane::Lane;
use super::layers::Shared;
use super::{Access, Image, Qcow2Disk};
use crate::block::raw::{self, lock_file};
use crate::block::target::Target;
use crate::config::{DiskBacking, DiskConfig, DiskFormat};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::image::Store;
use crate::units::Sectors;

/// Makes an empty image in that file, which is empty.
pub(in crate::block) fn format_qcow2(
    path: &Path,
    file: &File,
    size: u64,
    backing: Option<&DiskBacking>,
) -> Result<()> {
    let name = path.display().to_string();
    let mut builder = Image::create_builder(store(&name, file, 0)?).size(size);
    if let Some(below) = backing {
        let format = if below.format == DiskFormat::Raw { "raw" } else { "qcow2" };
        builder = builder.backing(below.path.to_string_lossy().into_owned(), format.into());
    }
    builder.create().map_err(|e| bad(&name, e))
}

/// The size of the disk in the image at `path`.
pub(in crate::block) fn qcow2_size(path: &Path) -> Result<u64> {
    let name = path.display().to_string();
    let file = open(&name, path, true, false)?;
    let image = Image::open_image(store(&name, &file, 0)?, false).map_err(|e| bad(&name, e))?;
    Ok(FormatAccess::new(image).size())
}

impl Qcow2Disk {
    /// Opens the image at `path` for the disk `id`, and what the configuration says that it is based on.
    ///
    /// # Errors
    /// A file is missing, not ours to open, in use, or not what it is said to be; the image names a backing file or keeps its data in
    /// another file, and the configuration does not say so.
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
                DiskFormat::Qcow2 => FormatAccess::new(layered(&name, (store, None), false, backing.take())?),
            };
            if let Some(unused) = backing.replace(image) {
                drop::<Access>(unused);
                let why = format!("{name}: is raw, and based on nothing: backing[{}] is too much", layer + 1);
                return Err(Error::new(ErrorKind::InvalidArgument, why));
            }
        }
        let file = open(&name, path, config.readonly, config.lock)?;
        let data = config.data_file.as_deref().map(|path| data_file(id, path, config)).transpose()?;
        let (data_store, data_target) = data.unzip();
        let stores = (store(&name, &file, 0)?, data_store);
        let image = layered(&name, stores, !config.readonly, backing)?;
        targets.push(Target::new(&name, file, config.cache, config.readonly)?);
        targets.reverse();
        targets.extend(data_target);
        let access = FormatAccess::new(image);
        let size = access.size() / Sectors::SIZE * Sectors::SIZE;
        let shared = Shared {
            name,
            config: config.clone(),
            size: AtomicU64::new(size),
            access: RwLock::new(access),
            allocating: Mutex::new(()),
            targets,
            flying: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
        };
        let shared = Arc::new(shared);
        let lane = Lane::choose(&shared)?;
        Ok(Self::new(shared, lane))
    }
}

/// Where the image keeps its data; among the targets it is the last.
fn data_file(id: &str, path: &Path, config: &DiskConfig) -> Result<(Store, Target)> {
    let name = format!("{id}: data_file: {}", path.display());
    let file = open(&name, path, config.readonly, config.lock)?;
    let store = store(&name, &file, config.backing.len() + 1)?;
    Ok((store, Target::new(&name, file, config.cache, config.readonly)?))
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
    // The library has no kind for it.
    let remedy = if error.to_string().contains("incompatible feature") {
        "; qemu-img convert -O qcow2 -o compression_type=zlib makes one of it"
    } else {
        ""
    };
    let why = format!("{name}: is no qcow2 image that can be used{remedy}");
    Error::new(ErrorKind::InvalidArgument, why).with_source(error)
}

/// A qcow2 image on `backing`, which must be there exactly if the image names one; as must be where its data is if not in itself.
fn layered(
    name: &str,
    (store, data): (Store, Option<Store>),
    write: bool,
    backing: Option<Access>,
) -> Result<Image> {
    let invalid = |why: String| Err(Error::new(ErrorKind::InvalidArgument, format!("{name}: {why}")));
    let mut image = Image::open_image(store, write).map_err(|e| bad(name, e))?;
    if image.requires_external_data_file() && data.is_none() {
        let where_ = image.implicit_external_data_file().map_or(String::new(), |file| format!(" {file:?}"));
        return invalid(format!(
            "keeps its data in another file{where_}, which is opened only if you say so, and only for the image on top: name it \
             in data_file"
        ));
    }
    if data.is_some() && !image.requires_external_data_file() {
        return invalid("keeps its data in itself: there is a data_file too many".into());
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
    image.set_data_file(data);
    Ok(image)
}
