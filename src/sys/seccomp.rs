//! seccomp(2): filters of single threads, and what tells of the calls that they refuse (linux/seccomp.h).

use std::ffi::CStr;
use std::io::{self, PipeReader, PipeWriter, Read};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use seccompiler::sock_filter;

/// A call that a filter did not let through: its thread waits for the answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Notice {
    id: u64,
    /// `AUDIT_ARCH_*`: by which table of calls the number is meant.
    pub arch: u32,
    pub number: i64,
    pub arguments: [u64; 6],
}

#[cfg(test)]
impl Notice {
    pub fn of(arch: u32, number: i64, arguments: [u64; 6]) -> Self {
        Self { id: 0, arch, number, arguments }
    }
}

/// Keeps the calling thread, and what it starts, from ever gaining rights by a program that has them.
pub(crate) fn no_new_privs() -> io::Result<()> {
    // SAFETY: integers go in.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into()).map(drop)
}

/// Has the calling thread, which has `no_new_privs`, make its calls through `program` for good. Its notices come through the
/// descriptor.
///
/// # Errors
/// EBUSY where a filter that the thread has inherited gives such notices already: the kernel knows one to hear them.
pub(crate) fn install(program: &[sock_filter]) -> io::Result<OwnedFd> {
    let len = u16::try_from(program.len()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
    // The kernel's structure has room for writing, and reads.
    let filter = program.as_ptr().cast_mut().cast::<libc::sock_filter>();
    let program = libc::sock_fprog { len, filter };
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
    // SAFETY: both crates' sock_filter is the kernel's; the program lives until the call returns, which copies it.
    let fd =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    let fd = check(fd)? as i32;
    // SAFETY: the call has just made it, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes the next notice. Waits for it: ask when the descriptor is readable.
pub(crate) fn receive(listener: BorrowedFd<'_>) -> io::Result<Notice> {
    // SAFETY: all zeroes is one, and what the kernel wants.
    let mut call: libc::seccomp_notif = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills one of these, which lives until the call returns.
    let got =
        unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV as _, &raw mut call) };
    check(got.into())?;
    let data = call.data;
    Ok(Notice { id: call.id, arch: data.arch, number: data.nr.into(), arguments: data.args })
}

/// Has the call fail with `errno`.
pub(crate) fn refuse(listener: BorrowedFd<'_>, notice: &Notice, errno: i32) -> io::Result<()> {
    answer(listener, notice, -errno, 0)
}

/// Has the call be made after all.
pub(crate) fn let_pass(listener: BorrowedFd<'_>, notice: &Notice) -> io::Result<()> {
    answer(listener, notice, 0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32)
}

fn answer(listener: BorrowedFd<'_>, notice: &Notice, error: i32, flags: u32) -> io::Result<()> {
    let mut answer = libc::seccomp_notif_resp { id: notice.id, val: 0, error, flags };
    // SAFETY: the kernel reads one of these, which lives until the call returns.
    let sent =
        unsafe { libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND as _, &raw mut answer) };
    check(sent.into()).map(drop)
}

/// Reads what calls point to in this process's memory, or nowhere at all. Allocates nothing.
pub(crate) struct Peek {
    from: PipeReader,
    to: PipeWriter,
}

impl Peek {
    /// The longest text that is compared.
    const MOST: usize = 64;

    pub fn new() -> io::Result<Self> {
        let (from, to) = io::pipe()?;
        Ok(Self { from, to })
    }

    /// Whether that text is at that address. By a pipe: writing to it fails where there is no memory, and no sandbox of the embedder's
    /// own forbids it (process_vm_readv(2)).
    pub fn finds(&self, text: &CStr, address: u64) -> bool {
        let bytes = text.to_bytes_with_nul();
        let mut found = [0; Self::MOST];
        let Some(found) = found.get_mut(..bytes.len()) else { return false };
        let mut there = 0;
        while there < bytes.len() {
            let (from, rest) = (address.wrapping_add(there as u64), bytes.len() - there);
            // SAFETY: the kernel reads from there, of whatever it can; a pipe that is empty has room for it.
            match unsafe { libc::write(self.to.as_raw_fd(), from as *const _, rest) } {
                count @ 1.. => there += count as usize,
                -1 if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
                _ => break,
            }
        }
        let Some(found) = found.get_mut(..there) else { return false };
        (&self.from).read_exact(found).is_ok() && *found == *bytes
    }
}

/// Whether this kernel has filters that give notices (Linux 5.0).
pub(crate) fn gives_notices() -> bool {
    let action: u32 = libc::SECCOMP_RET_USER_NOTIF;
    // SAFETY: the kernel reads the number, which lives until the call returns.
    let there =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_GET_ACTION_AVAIL, 0, &raw const action) };
    there == 0
}

/// The version of Landlock's interface, where this kernel has it and it is on (landlock_create_ruleset(2)).
pub(crate) fn landlock_version() -> Option<u32> {
    /// `LANDLOCK_CREATE_RULESET_VERSION`
    const VERSION: libc::c_ulong = 1;
    // SAFETY: with this flag the kernel wants neither attributes nor their size.
    let version =
        unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0, VERSION) };
    u32::try_from(version).ok()
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_call_points_to_is_read_wherever_that_is() {
        let peek = Peek::new().unwrap();
        let text = c"/proc/sys/vm/overcommit_memory";
        let finds = |bytes: &CStr| peek.finds(text, bytes.as_ptr() as u64);
        for _ in 0..2 {
            assert!(finds(c"/proc/sys/vm/overcommit_memory"));
            assert!(!finds(c"/proc/sys/vm/overcommit_memory2") && !finds(c"/proc/sys/vm/overcommit_memorx"));
            assert!(!peek.finds(text, 0) && !peek.finds(text, 8) && !peek.finds(text, u64::MAX));
        }
        // Longer than any that is asked for.
        assert!(!peek.finds(CStr::from_bytes_with_nul(&[vec![b'x'; 80], vec![0]].concat()).unwrap(), 0));
    }
}
