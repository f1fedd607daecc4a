//! What std does not know of files: holes, alignment, locks.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

/// A change of a range of a file that moves no data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Range {
    /// Becomes a hole, which reads as zeroes.
    Punch,
    /// Reads as zeroes, and stays allocated.
    Zero,
}

/// Does that to a range of a file or a block device; the file's size stays.
pub(crate) fn change(fd: BorrowedFd<'_>, what: Range, offset: u64, length: u64) -> io::Result<()> {
    let mode = match what {
        Range::Punch => libc::FALLOC_FL_PUNCH_HOLE,
        Range::Zero => libc::FALLOC_FL_ZERO_RANGE,
    } | libc::FALLOC_FL_KEEP_SIZE;
    let number =
        |n: u64| libc::off64_t::try_from(n).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW));
    let (offset, length) = (number(offset)?, number(length)?);
    loop {
        // SAFETY: an open descriptor and numbers.
        if unsafe { libc::fallocate64(fd.as_raw_fd(), mode, offset, length) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// What the kernel has of an open file. The C library asks with a path, which may be empty and need not be: no filter could tell.
pub(crate) fn status(fd: BorrowedFd<'_>) -> io::Result<libc::stat> {
    let mut stat = MaybeUninit::<libc::stat>::uninit();
    // SAFETY: an open descriptor, and room for one structure, which on this machine is the kernel's.
    if unsafe { libc::syscall(libc::SYS_fstat, fd.as_raw_fd(), stat.as_mut_ptr()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above has filled it.
    Ok(unsafe { stat.assume_init() })
}

/// What `O_DIRECT` wants of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Alignment {
    /// Of addresses and lengths in memory, a power of two.
    pub memory: usize,
    /// Of offsets and lengths in the file, a power of two.
    pub offset: u64,
}

/// As the kernel says (`STATX_DIOALIGN`, Linux 6.1), else a page, which suits every disk; `None` where there is no `O_DIRECT`.
pub(crate) fn alignment(fd: BorrowedFd<'_>) -> Option<Alignment> {
    const PAGE: Alignment = Alignment { memory: 4096, offset: 4096 };
    // SAFETY: all zeroes is a value.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    let mask = libc::STATX_DIOALIGN;
    // SAFETY: an empty path, with AT_EMPTY_PATH: the descriptor itself; `stat` is what it writes to.
    let done = unsafe { libc::statx(fd.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, mask, &mut stat) };
    if done < 0 || stat.stx_mask & mask == 0 {
        return Some(PAGE);
    }
    let (memory, offset) = (stat.stx_dio_mem_align, stat.stx_dio_offset_align);
    if memory == 0 || offset == 0 {
        return None;
    }
    let sound = memory.is_power_of_two() && offset.is_power_of_two();
    Some(if sound { Alignment { memory: memory as usize, offset: offset.into() } } else { PAGE })
}

/// Bytes of an image that QEMU locks (block/file-posix.c): what its users do with it, and what they do not want others to do.
/// All are locks for reading, so that any number may hold them; conflicts are looked for.
const DOES: libc::off64_t = 100;
const MINDS: libc::off64_t = 200;
const READ: libc::off64_t = 0;
const WRITE: libc::off64_t = 1;
const RESIZE: libc::off64_t = 3;

/// Locks an image as QEMU does, for as long as this description of it is open: against writers, and as a writer against
/// everybody who minds.
///
/// # Errors
/// `WouldBlock`: somebody else has it. Others where the file system has no such locks.
pub(crate) fn lock_image(fd: BorrowedFd<'_>, write: bool) -> io::Result<()> {
    let mine: &[_] = if write {
        &[DOES + READ, DOES + WRITE, DOES + RESIZE, MINDS + WRITE, MINDS + RESIZE]
    } else {
        &[DOES + READ, MINDS + WRITE, MINDS + RESIZE]
    };
    let theirs: &[_] = if write {
        &[DOES + WRITE, DOES + RESIZE, MINDS + WRITE, MINDS + RESIZE]
    } else {
        &[DOES + WRITE, DOES + RESIZE]
    };
    for byte in mine {
        control(fd, libc::F_OFD_SETLK, libc::F_RDLCK, *byte)?;
    }
    for byte in theirs {
        if control(fd, libc::F_OFD_GETLK, libc::F_WRLCK, *byte)? != libc::F_UNLCK {
            return Err(io::ErrorKind::WouldBlock.into());
        }
    }
    Ok(())
}

/// One byte's lock; what kind is there.
fn control(
    fd: BorrowedFd<'_>,
    command: libc::c_int,
    kind: libc::c_int,
    byte: libc::off64_t,
) -> io::Result<libc::c_int> {
    // SAFETY: all zeroes is a value.
    let mut lock: libc::flock64 = unsafe { std::mem::zeroed() };
    (lock.l_type, lock.l_whence, lock.l_start, lock.l_len) = (kind as _, libc::SEEK_SET as _, byte, 1);
    // SAFETY: the commands for open-file-description locks take a `flock64`, and write to it.
    if unsafe { libc::fcntl(fd.as_raw_fd(), command, &mut lock) } < 0 {
        let error = io::Error::last_os_error();
        // EACCES and EAGAIN are the same here (fcntl(2)).
        let held = matches!(error.raw_os_error(), Some(libc::EACCES | libc::EAGAIN));
        return Err(if held { io::ErrorKind::WouldBlock.into() } else { error });
    }
    Ok(lock.l_type.into())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsFd;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn scratch() -> (std::path::PathBuf, File) {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("vmbed-file-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        (path, file)
    }

    #[test]
    fn holes_and_zeroes() {
        let (path, mut file) = scratch();
        file.write_all(&[1; 0x10000]).unwrap();
        file.sync_all().unwrap();
        let before = file.metadata().unwrap().blocks();
        change(file.as_fd(), Range::Punch, 0x4000, 0x8000).unwrap();
        assert!(file.metadata().unwrap().blocks() < before);
        // Not every file system can.
        match change(file.as_fd(), Range::Zero, 0, 0x1000) {
            Ok(()) => {}
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP)),
        }
        let mut bytes = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        assert!(bytes[0x4000..0xc000].iter().all(|b| *b == 0) && bytes[0xc000..].iter().all(|b| *b == 1));
        assert_eq!(
            change(file.as_fd(), Range::Punch, u64::MAX, 1).unwrap_err().raw_os_error(),
            Some(libc::EOVERFLOW)
        );
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn one_writer_or_any_number_of_readers() {
        let (path, first) = scratch();
        let open = || File::open(&path).unwrap();
        lock_image(first.as_fd(), true).unwrap();
        assert_eq!(lock_image(open().as_fd(), false).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let other = File::options().read(true).write(true).open(&path).unwrap();
        assert_eq!(lock_image(other.as_fd(), true).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        // What failed holds locks until it is closed.
        drop((first, other));
        let readers = [open(), open()];
        readers.iter().for_each(|file| lock_image(file.as_fd(), false).unwrap());
        let writer = File::options().read(true).write(true).open(&path).unwrap();
        assert_eq!(lock_image(writer.as_fd(), true).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        std::fs::remove_file(path).unwrap();
    }
}
