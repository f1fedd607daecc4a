#![forbid(unsafe_code)]
//! Opening an image with what it is based on, and making one.

use std::collections::BTreeMap;
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
use super::reader::{Header, Reader};
use super::refcounts;
use super::{Access, Image, Qcow2Disk};
use crate::block::raw::{self, lock_file};
use crate::block::target::Target;
use crate::config::{DiskBacking, DiskConfig, DiskFormat, Passphrase};
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
    if let Some(header) = Header::of_special(&file).map_err(|e| bad(&name, e))? {
        return Ok(header.size);
    }
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
        let (mut targets, mut readers) = (Vec::new(), BTreeMap::new());
        let mut backing = None;
        // From the bottom up.
        for (layer, below) in config.backing.iter().enumerate().rev() {
            let name = format!("{id}: backing[{layer}]: {}", below.path.display());
            let file = open(&name, &below.path, true, config.lock)?;
            let image: Access = match below.format {
                DiskFormat::Raw => plain(&name, store(&name, &file, layer + 1)?)?,
                DiskFormat::Qcow2 => {
                    let files = (&file, None);
                    let keys = &config.passphrases[..];
                    qcow2(&name, files, (layer + 1, false), backing.take(), (&mut readers, keys))?
                }
            };
            targets.push(Target::new(&name, file, config.cache, true)?);
            if let Some(unused) = backing.replace(image) {
                drop::<Access>(unused);
                let why = format!("{name}: is raw, and based on nothing: backing[{}] is too much", layer + 1);
                return Err(Error::new(ErrorKind::InvalidArgument, why));
            }
        }
        let file = open(&name, path, config.readonly, config.lock)?;
        let data = config.data_file.as_deref().map(|path| data_file(id, path, config)).transpose()?;
        let files = (&file, data.as_ref().map(|target| (target.cached(), config.backing.len() + 1)));
        let access =
            qcow2(&name, files, (0, !config.readonly), backing, (&mut readers, &config.passphrases))?;
        targets.push(Target::new(&name, file, config.cache, config.readonly)?);
        targets.reverse();
        targets.extend(data);
        let size = access.size() / Sectors::SIZE * Sectors::SIZE;
        let shared = Shared {
            name,
            config: config.clone(),
            size: AtomicU64::new(size),
            access: RwLock::new(access),
            allocating: Mutex::new(()),
            targets,
            readers,
            flying: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
        };
        let shared = Arc::new(shared);
        let lane = Lane::choose(&shared)?;
        Ok(Self::new(shared, lane))
    }
}

/// Where the image keeps its data; among the targets it is the last.
fn data_file(id: &str, path: &Path, config: &DiskConfig) -> Result<Target> {
    let name = format!("{id}: data_file: {}", path.display());
    let file = open(&name, path, config.readonly, config.lock)?;
    Target::new(&name, file, config.cache, config.readonly)
}

/// The raw image, or what looks like one.
fn plain(name: &str, store: Store) -> Result<Access> {
    let raw = Raw::<Store>::builder(store).open(DenyImplicitOpenGate::default());
    Ok(FormatAccess::new(raw.map_err(|e| bad(name, e))?))
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
        return Error::os(format!("{name}: reading or writing its metadata"), error);
    }
    let why = format!("{name}: is no qcow2 image that can be used");
    Error::new(ErrorKind::InvalidArgument, why).with_source(error)
}

/// A qcow2 image at that place of the chain, to be written to or not, on `backing`, which must be there exactly if the image names one;
/// as must be where its data is if not in itself.
fn qcow2(
    name: &str,
    (file, data): (&File, Option<(&File, usize)>),
    (layer, write): (usize, bool),
    backing: Option<Access>,
    (readers, passphrases): (&mut BTreeMap<usize, Arc<Reader>>, &[Passphrase]),
) -> Result<Access> {
    if let Some(header) = Header::of_special(file).map_err(|e| bad(name, e))? {
        let named = (header.backing.clone(), header.needs_data_file().then(String::new));
        is_as_said(name, named, (backing.is_some(), data.is_some()))?;
        if write {
            let why = format!(
                "{name}: is encrypted, or has extended L2 entries or zstd clusters, and so can only be read: make an image that is \
                 based on it, or one without them (qemu-img convert -O qcow2 -o compression_type=zlib,extended_l2=off), or set \
                 readonly"
            );
            return Err(Error::new(ErrorKind::Unsupported, why));
        }
        let again = |file: &File| {
            file.try_clone().map_err(|e| Error::os(format!("{name}: duplicating its descriptor"), e))
        };
        let data = data.map(|(file, _)| again(file)).transpose()?;
        let reader =
            Reader::new(header, (again(file)?, data), backing, passphrases).map_err(|e| bad(name, e))?;
        let (reader, own) = (Arc::new(reader), usize::MAX - layer);
        readers.insert(own, reader.clone());
        return plain(name, Store::of(reader, own));
    }
    let mut image = Image::open_image(store(name, file, layer)?, write).map_err(|e| bad(name, e))?;
    if write {
        refcounts::check(file).map_err(|e| bad(name, e))?;
    }
    let elsewhere = image.requires_external_data_file();
    let data_name = elsewhere.then(|| image.implicit_external_data_file().cloned().unwrap_or_default());
    let named = (image.implicit_backing_file().cloned(), data_name);
    is_as_said(name, named, (backing.is_some(), data.is_some()))?;
    image.set_backing(backing);
    image.set_data_file(data.map(|(file, layer)| store(name, file, layer)).transpose()?);
    Ok(FormatAccess::new(image))
}

/// What the image names must be given, and nothing else: a backing file, and one for its data.
fn is_as_said(
    name: &str,
    (backing, data): (Option<String>, Option<String>),
    given: (bool, bool),
) -> Result<()> {
    let invalid = |why: String| Err(Error::new(ErrorKind::InvalidArgument, format!("{name}: {why}")));
    match (data, given.1) {
        (Some(file), false) => {
            let named = if file.is_empty() { file } else { format!(" {file:?}") };
            return invalid(format!(
                "keeps its data in another file{named}, which is opened only if you say so, and only for the image on top: name it \
                 in data_file"
            ));
        }
        (None, true) => return invalid("keeps its data in itself: there is a data_file too many".into()),
        _ => {}
    }
    match (backing, given.0) {
        (Some(file), false) => invalid(format!(
            "is based on {file:?}, which is opened only if you say so: name the file and its format in backing"
        )),
        (None, true) => invalid("is based on nothing: there is a file too many in backing".into()),
        _ => Ok(()),
    }
}
