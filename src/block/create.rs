#![forbid(unsafe_code)]
//! Makes images for disks.

use std::fs::OpenOptions;
use std::path::Path;

use crate::config::{DiskBacking, DiskFormat};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::signal::Shield;
use crate::units::{Bytes, Sectors};

/// Makes an image for a disk of `size` bytes, a multiple of 512: sparse, all zeroes, or, in qcow2, a layer on `backing`, of which it
/// keeps the path as it stands here (QEMU takes it as relative to the image) and its format. With a backing file, a `size` of 0
/// stands for that one's. Blocks for as long as the file system does.
///
/// ```
/// use vmbed::{Bytes, DiskBacking, DiskConfig, DiskFormat, create_disk};
/// # let dir = std::env::temp_dir().join(format!("vmbed-doc-{}", std::process::id()));
/// # std::fs::create_dir_all(&dir)?;
/// let (base, layer) = (dir.join("debian.img"), dir.join("web-1.qcow2"));
/// create_disk(&base, DiskFormat::Raw, Bytes::mib(64), None)?;
/// let below = DiskBacking { path: base.clone(), format: DiskFormat::Raw };
/// create_disk(&layer, DiskFormat::Qcow2, Bytes(0), Some(&below))?;
/// let disk = DiskConfig::qcow2(layer).based_on(base, DiskFormat::Raw);
/// # std::fs::remove_dir_all(&dir)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// `InvalidArgument`: a size that is none, or a raw image with a backing file; what the host answers: the file is there already, or
/// cannot be made; `Unsupported` in a build without the cargo feature `qcow2`.
pub fn create_disk(
    path: impl AsRef<Path>,
    format: DiskFormat,
    size: Bytes,
    backing: Option<&DiskBacking>,
) -> Result<()> {
    let (path, _shield) = (path.as_ref(), Shield::raise());
    let invalid =
        |why: String| Err(Error::new(ErrorKind::InvalidArgument, format!("{}: {why}", path.display())));
    if backing.is_some() && format == DiskFormat::Raw {
        return invalid("a raw image is based on nothing".into());
    }
    let size = match backing {
        Some(below) if size.get() == 0 => super::size_of(below)?,
        _ => size.get(),
    };
    if size == 0 || !size.is_multiple_of(Sectors::SIZE) || i64::try_from(size).is_err() {
        return invalid(format!("a size of {size} bytes: a multiple of 512, not 0, below 2^63"));
    }
    let made = OpenOptions::new().read(true).write(true).create_new(true).open(path);
    let file = made.map_err(|e| Error::os(format!("{}: making it", path.display()), e))?;
    let done = match format {
        DiskFormat::Raw => {
            file.set_len(size).map_err(|e| Error::os(format!("{}: giving it its size", path.display()), e))
        }
        DiskFormat::Qcow2 => super::format_qcow2(path, &file, size, backing),
    };
    done.inspect_err(|_| drop(std::fs::remove_file(path)))
}
