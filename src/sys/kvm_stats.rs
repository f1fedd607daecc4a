//! The statistics that KVM keeps of a VM (`KVM_GET_STATS_FD`, Linux 5.14).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use kvm_ioctls::VmFd;

/// `_IO(KVMIO, 0xce)`.
const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;
/// The most of the data that is read at once.
const SPAN: usize = 256;
/// Mapped pages by their size.
const PAGES: [(&str, u32); 3] = [("pages_4k", 12), ("pages_2m", 21), ("pages_1g", 30)];

/// How much guest memory KVM has mapped for the guest. Keeps the VM in the kernel for as long as it lives.
pub(crate) struct StageTwo {
    file: File,
    /// Where the counters are in the file: the first byte, and each from there.
    start: u64,
    offsets: [usize; 3],
}

impl StageTwo {
    /// # Errors
    /// The kernel has no such statistics, or the process no file descriptor left.
    pub fn open(vm: &VmFd) -> io::Result<Self> {
        // SAFETY: the call takes no argument and makes a descriptor, or answers -1.
        let fd = unsafe { libc::ioctl(vm.as_raw_fd(), KVM_GET_STATS_FD, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call above has just made this descriptor, and nobody else knows it.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        Self::find(file)
    }

    /// Reads the header and the descriptors (Documentation/virt/kvm/api.rst, 4.133).
    fn find(file: File) -> io::Result<Self> {
        let missing = || io::Error::from_raw_os_error(libc::ENOTSUP);
        let mut header = [0; 24];
        file.read_exact_at(&mut header, 0)?;
        let word = |bytes: &[u8], at: usize| {
            let word = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
            word.map(u32::from_ne_bytes).ok_or_else(missing)
        };
        let (name_size, count) = (word(&header, 4)? as usize, word(&header, 8)? as usize);
        let (descriptors, data) = (word(&header, 16)?, word(&header, 20)?);
        let size = 16 + name_size;
        if name_size > 4096 || count > 4096 {
            return Err(missing());
        }
        let mut bytes = vec![0; size * count];
        file.read_exact_at(&mut bytes, descriptors.into())?;
        let find = |name: &str| {
            let found = bytes.chunks_exact(size).find(|d| {
                let text = d.get(16..).unwrap_or_default();
                text.split(|b| *b == 0).next() == Some(name.as_bytes())
            });
            found.ok_or_else(missing).and_then(|d| word(d, 8))
        };
        let at = [find(PAGES[0].0)?, find(PAGES[1].0)?, find(PAGES[2].0)?];
        let first = at.into_iter().min().unwrap_or(0);
        let offsets = at.map(|offset| (offset - first) as usize);
        if offsets.iter().any(|offset| offset + 8 > SPAN) {
            return Err(missing());
        }
        Ok(Self { file, start: u64::from(data) + u64::from(first), offsets })
    }

    /// The bytes that are mapped; 0 where the statistics cannot be read.
    pub fn mapped(&self) -> u64 {
        let mut buffer = [0; SPAN];
        let length = self.offsets.iter().max().map_or(0, |last| last + 8).min(SPAN);
        if self.file.read_exact_at(&mut buffer[..length], self.start).is_err() {
            return 0;
        }
        let counted = self.offsets.iter().zip(PAGES).filter_map(|(offset, (_, shift))| {
            let pages = buffer.get(*offset..offset + 8)?.try_into().ok().map(u64::from_ne_bytes)?;
            pages.checked_shl(shift)
        });
        counted.fold(0, u64::saturating_add)
    }
}
