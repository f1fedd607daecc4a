#![forbid(unsafe_code)]
//! A disk whose bytes are those of a file or of a block device, one to one.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::engine::Engine;
use super::target::Target;
use super::{Backend, IoRequest, Resize, Submitted};
use crate::config::DiskConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::sys::fd;
use crate::sys::file::lock_image;
use crate::sys::log;
use crate::units::Sectors;

/// How long a lock is waited for: a child that was forked while an image was open holds it until it execs.
const LETTING_GO: Duration = Duration::from_millis(200);

/// A raw disk, opened.
pub(crate) struct RawDisk {
    disk: Arc<Shared>,
    pub(super) engine: Engine,
}

/// What all queues of a disk share.
struct Shared {
    name: String,
    target: Arc<Target>,
    config: DiskConfig,
    size: AtomicU64,
}

impl RawDisk {
    /// Opens `path` for the disk `id`, as the configuration says.
    ///
    /// # Errors
    /// It is missing, not ours to open, neither a regular file nor a block device, or not a whole
    /// number of sectors long. The text names disk, path and remedy.
    pub fn open(id: &str, path: &Path, config: &DiskConfig) -> Result<Self> {
        let readonly = config.readonly;
        let name = format!("{id}: {}", path.display());
        // O_NONBLOCK: a FIFO must not keep us waiting for its writer; files and disks ignore it.
        let opened = OpenOptions::new()
            .read(true)
            .write(!readonly)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(path);
        let file = opened.map_err(|e| refused(&name, readonly, e))?;
        if config.lock {
            lock_file(&name, &file, readonly)?;
        }
        Self::from_file(&name, file, config)
    }

    /// The disk `id` on a descriptor that somebody else has opened.
    ///
    /// # Errors
    /// As for [`open`](Self::open), and where it was opened for something else.
    pub fn adopt(id: &str, fd: OwnedFd, config: &DiskConfig) -> Result<Self> {
        let readonly = config.readonly;
        let name = format!("{id}: fd {}", fd.as_raw_fd());
        let invalid = |why| Err(Error::new(ErrorKind::InvalidArgument, format!("{name}: {why}")));
        let permits = |write| {
            fd::permits(fd.as_fd(), write)
                .map_err(|e| Error::os(format!("{name}: asking what it was opened for (fcntl)"), e))
        };
        if !permits(false)? {
            return invalid("is not open for reading");
        }
        if !readonly && !permits(true)? {
            return invalid("is not open for writing; open it with O_RDWR, or make the disk read-only");
        }
        if !readonly && fd::appends(fd.as_fd()) {
            return invalid("was opened with O_APPEND, so every write would go to its end");
        }
        Self::from_file(&name, fd.into(), config)
    }

    /// The same with one system call a request, and nothing special.
    #[cfg(any(test, feature = "internals"))]
    pub fn plain(name: &str, file: File, readonly: bool) -> Result<Self> {
        let engine = crate::config::DiskEngine::Sync;
        Self::from_file(name, file, &DiskConfig { readonly, engine, ..DiskConfig::default() })
    }

    /// A disk on a file that is open already; `name` is for the errors.
    pub fn from_file(name: &str, mut file: File, config: &DiskConfig) -> Result<Self> {
        let invalid = |why: String| Error::new(ErrorKind::InvalidArgument, format!("{name}: {why}"));
        let metadata = file.metadata().map_err(|e| Error::os(format!("{name}: reading its metadata"), e))?;
        let kind = metadata.file_type();
        if kind.is_dir() {
            return Err(invalid("is a directory; name a raw image or a block device".into()));
        }
        if !kind.is_file() && !kind.is_block_device() {
            return Err(invalid("is neither a regular file nor a block device".into()));
        }
        let size = if kind.is_file() { Ok(metadata.len()) } else { end_of(&mut file) };
        let size = size.map_err(|e| Error::os(format!("{name}: finding its size"), e))?;
        if size == 0 {
            return Err(invalid("is empty; make it as large as the disk: truncate -s 10G".into()));
        }
        if !size.is_multiple_of(Sectors::SIZE) {
            let fit = size.next_multiple_of(Sectors::SIZE);
            return Err(invalid(format!(
                "is {size} bytes long, which is no multiple of 512; is it a raw image? truncate -s {fit} \
                 would fill its last sector"
            )));
        }
        let target = Arc::new(Target::new(name, file, config.cache, config.readonly)?);
        let engine = Engine::choose(name, config.engine, &target)?;
        let (name, config, size) = (name.to_owned(), config.clone(), AtomicU64::new(size));
        Ok(Self { disk: Arc::new(Shared { name, target, config, size }), engine })
    }
}

pub(super) fn lock_file(name: &str, file: &File, readonly: bool) -> Result<()> {
    let end = Instant::now() + LETTING_GO;
    loop {
        match lock_image(file.as_fd(), !readonly) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                log::debug!("{name}: its file system has no locks: {error}");
                return Ok(());
            }
            Err(_) if Instant::now() < end => std::thread::sleep(LETTING_GO / 20),
            Err(_) => {
                let why = format!(
                    "{name}: is in use by somebody else: an image has one writer, or any number of readers"
                );
                return Err(Error::new(ErrorKind::InvalidState, why));
            }
        }
    }
}

impl Resize for Shared {
    /// A file grows; one that is larger stays as it is, and so does a block device.
    fn resize(&self, bytes: u64) -> Result<()> {
        let file = self.target.cached();
        let metadata = file.metadata().map_err(|e| Error::os(format!("{}: its metadata", self.name), e))?;
        if metadata.file_type().is_file() {
            if metadata.len() < bytes {
                file.set_len(bytes)
                    .map_err(|e| Error::os(format!("{}: growing to {bytes} bytes", self.name), e))?;
            }
        } else {
            let there = file.try_clone().and_then(|mut file| end_of(&mut file));
            let there = there.map_err(|e| Error::os(format!("{}: finding its size", self.name), e))?;
            if there < bytes {
                let why = format!("{}: has {there} bytes: grow the block device first", self.name);
                return Err(Error::new(ErrorKind::InvalidArgument, why));
            }
        }
        self.size.store(bytes, Ordering::SeqCst);
        Ok(())
    }

    fn reader(self: Arc<Self>) -> Box<dyn Backend> {
        let engine = Engine::Sync(self.target.clone());
        Box::new(RawDisk { disk: self, engine })
    }
}

/// The size of a block device. Its position, which may be somebody else's too, stays.
fn end_of(file: &mut File) -> io::Result<u64> {
    let position = file.stream_position()?;
    let end = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(position))?;
    Ok(end)
}

pub(super) fn refused(name: &str, readonly: bool, error: io::Error) -> Error {
    let what = match error.kind() {
        io::ErrorKind::NotFound => "does not exist",
        io::ErrorKind::IsADirectory => {
            let what = format!("{name}: is a directory; name a raw image or a block device");
            return Error::new(ErrorKind::InvalidArgument, what).with_source(error);
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem if !readonly => {
            "cannot be opened for writing; make it writable for this user, or make the disk read-only"
        }
        io::ErrorKind::PermissionDenied => "cannot be opened; make it readable for this user",
        _ => "cannot be opened",
    };
    let readonly_fs = error.kind() == io::ErrorKind::ReadOnlyFilesystem;
    let what = format!("{name}: {what}");
    if readonly_fs {
        return Error::new(ErrorKind::PermissionDenied, what).with_source(error);
    }
    Error::os(what, error)
}

impl Backend for RawDisk {
    fn size(&self) -> u64 {
        self.disk.size.load(Ordering::SeqCst)
    }

    fn readonly(&self) -> bool {
        self.disk.config.readonly
    }

    fn discards(&self) -> bool {
        self.disk.config.discard && !self.disk.config.readonly
    }

    fn another(&self) -> Result<Option<Box<dyn Backend>>> {
        let engine = Engine::choose(&self.disk.name, self.disk.config.engine, &self.disk.target)?;
        Ok(Some(Box::new(Self { disk: self.disk.clone(), engine })))
    }

    fn resizer(&self) -> Option<Arc<dyn Resize>> {
        Some(self.disk.clone())
    }

    fn submit(&mut self, request: IoRequest<'_>) -> Submitted {
        self.engine.submit(request)
    }

    fn kick(&mut self) -> bool {
        self.engine.kick()
    }

    fn completions(&mut self, done: &mut dyn FnMut(u64, io::Result<()>)) {
        self.engine.completions(done);
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        self.engine.completion_fd()
    }

    fn abandon(&mut self) {
        self.engine.abandon();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    use super::*;
    use crate::block::BlockOp;
    use crate::config::DiskEngine;
    use crate::memory::Memory;
    use crate::sys::io::Pieces;

    fn config(readonly: bool) -> DiskConfig {
        DiskConfig { readonly, engine: DiskEngine::Sync, ..DiskConfig::default() }
    }

    struct Scratch(std::path::PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("vmbed-raw-{}-{name}", std::process::id()));
            std::fs::create_dir_all(&dir).unwrap();
            Self(dir)
        }

        fn file(&self, size: u64) -> std::path::PathBuf {
            let path = self.0.join("disk");
            File::create(&path).unwrap().set_len(size).unwrap();
            path
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn error(path: &Path, readonly: bool) -> Error {
        let error = RawDisk::open("disk7", path, &config(readonly)).err().unwrap();
        let text = error.to_string();
        assert!(text.contains("disk7") && text.contains(path.to_str().unwrap()), "{text}");
        error
    }

    #[test]
    fn what_is_no_disk_is_refused_by_name_with_a_remedy() {
        let scratch = Scratch::new("refused");
        assert_eq!(error(&scratch.0.join("missing"), false).kind(), ErrorKind::NotFound);
        for readonly in [false, true] {
            let directory = error(&scratch.0, readonly);
            assert_eq!(directory.kind(), ErrorKind::InvalidArgument);
            assert!(directory.to_string().contains("directory"), "{directory}");
        }
        let odd = error(&scratch.file(1000), false);
        assert!(odd.to_string().contains("multiple of 512"), "{odd}");
        assert!(error(&scratch.file(0), false).to_string().contains("truncate"));
        assert!(error(Path::new("/dev/null"), true).to_string().contains("neither"));
        let text = refused("disk7: x", false, io::Error::from_raw_os_error(libc::EACCES)).to_string();
        assert!(text.contains("read-only"), "{text}");
    }

    fn transfer(
        disk: &mut RawDisk,
        memory: &Memory,
        op: BlockOp,
        offset: u64,
        at: u64,
        len: usize,
    ) -> Submitted {
        let mut pieces = Pieces::default();
        let mut buffers = pieces.list();
        if len > 0 {
            buffers.push(memory.get_slice(GuestAddress(at), len).unwrap());
        }
        disk.submit(IoRequest { op, offset, length: len as u64, buffers, memory, tag: 0 })
    }

    #[test]
    fn bytes_go_in_and_come_out() {
        let scratch = Scratch::new("bytes");
        let path = scratch.file(4096);
        let memory = Memory::new(1 << 20).unwrap();
        let mut disk = RawDisk::open("disk0", &path, &config(false)).unwrap();
        assert_eq!((disk.size(), disk.readonly()), (4096, false));
        memory.write_slice(&[9; 512], GuestAddress(0x1000)).unwrap();
        for durable in [false, true] {
            let op = BlockOp::Write { durable };
            let done = transfer(&mut disk, &memory, op, 512, 0x1000, 512);
            assert!(matches!(done, Submitted::Done(Ok(()))));
        }
        assert!(matches!(transfer(&mut disk, &memory, BlockOp::Flush, 0, 0, 0), Submitted::Done(Ok(()))));
        assert_eq!(std::fs::read(&path).unwrap()[500..520], [[0; 12].as_slice(), &[9; 8]].concat());
        transfer(&mut disk, &memory, BlockOp::Read, 1000, 0x2000, 48);
        assert_eq!(memory.read_obj::<[u8; 16]>(GuestAddress(0x2008)).unwrap(), [9; 16]);
    }

    /// Row 28: a file that shrinks gives errors, not zeroes.
    #[test]
    fn a_read_beyond_the_end_of_a_shrunk_file_fails() {
        let scratch = Scratch::new("shrunk");
        let path = scratch.file(8192);
        let memory = Memory::new(1 << 20).unwrap();
        let mut disk = RawDisk::open("disk0", &path, &config(false)).unwrap();
        File::options().write(true).open(&path).unwrap().set_len(4096 + 100).unwrap();
        for (offset, fails) in [(0, false), (4096, true), (4608, true)] {
            let Submitted::Done(done) = transfer(&mut disk, &memory, BlockOp::Read, offset, 0x1000, 512)
            else {
                panic!("a raw disk ends in submit")
            };
            assert_eq!(done.err().and_then(|e| e.raw_os_error()), fails.then_some(libc::EIO));
        }
    }

    #[test]
    fn a_descriptor_must_have_been_opened_for_what_the_disk_does() {
        let scratch = Scratch::new("adopted");
        let path = scratch.file(1024);
        let open = |options: &OpenOptions| OwnedFd::from(options.open(&path).unwrap());
        let (read, both) =
            (OpenOptions::new().read(true).clone(), OpenOptions::new().read(true).write(true).clone());
        let adopt =
            |options: &OpenOptions, readonly| RawDisk::adopt("disk1", open(options), &config(readonly));
        assert!(adopt(&read, true).is_ok() && adopt(&both, true).is_ok() && adopt(&both, false).is_ok());
        for (options, readonly, why) in [
            (read, false, "O_RDWR"),
            (OpenOptions::new().write(true).clone(), true, "for reading"),
            (OpenOptions::new().read(true).append(true).clone(), false, "O_APPEND"),
            (OpenOptions::new().read(true).custom_flags(libc::O_PATH).clone(), true, "for reading"),
        ] {
            let error = adopt(&options, readonly).err().unwrap();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument);
            let text = error.to_string();
            assert!(text.contains("disk1: fd ") && text.contains(why), "{text}");
        }
        let mut shared = File::open(&path).unwrap();
        shared.seek(SeekFrom::Start(7)).unwrap();
        RawDisk::adopt("disk1", shared.try_clone().unwrap().into(), &config(true)).unwrap();
        assert_eq!(shared.stream_position().unwrap(), 7, "its position is its owner's");
    }

    #[test]
    fn a_readonly_disk_is_not_opened_for_writing() {
        let scratch = Scratch::new("readonly");
        let path = scratch.file(512);
        let disk = RawDisk::open("disk0", &path, &config(true)).unwrap();
        assert!(disk.disk.target.cached().write(&[1]).is_err());
        assert!(disk.readonly());
    }
}
