//! A thread has one filter that somebody hears of, and these have the test's. So what the kernel does for another one, of the sandbox's, the
//! supervisor does here: it gives a descriptor, and on it notices of calls that nobody has made.
#![expect(unsafe_code, reason = "it writes what the kernel would")]

use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

/// `AUDIT_ARCH_X86_64`
const ARCHITECTURE: u32 = 0xc000_003e;
const KVM_RUN: u64 = 0xae80;
/// What the C library looks into for the allocator, and need not find.
const LOOKS: &std::ffi::CStr = c"/proc/sys/vm/overcommit_memory";

/// The last one that was given.
static LISTENER: AtomicI32 = AtomicI32::new(-1);
/// Notices that have been given.
static GIVEN: AtomicU32 = AtomicU32::new(0);

/// What the call comes to, where it is about such a listener; allocates nothing. `works`: there are notices, from when a guest runs.
pub fn answer(call: &libc::seccomp_data, works: bool) -> Option<i64> {
    let listener = LISTENER.load(Ordering::SeqCst);
    match libc::c_long::from(call.nr) {
        libc::SYS_seccomp if call.args[0] == u64::from(libc::SECCOMP_SET_MODE_FILTER) => {
            // SAFETY: integers go in. It is the caller's, who closes it.
            let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
            LISTENER.store(fd, Ordering::SeqCst);
            let error = std::io::Error::last_os_error().raw_os_error();
            Some(if fd < 0 { -i64::from(error.unwrap_or(libc::EMFILE)) } else { fd.into() })
        }
        libc::SYS_ioctl if call.args[1] == KVM_RUN && works => {
            if GIVEN.load(Ordering::SeqCst) == 0 {
                // SAFETY: eight bytes are read, of whatever the descriptor is by now.
                unsafe { libc::write(listener, (&raw const ONE).cast(), 8) };
            }
            None
        }
        libc::SYS_ioctl if call.args[1] == libc::SECCOMP_IOCTL_NOTIF_RECV => {
            Some(give(listener, call.args[2]))
        }
        libc::SYS_ioctl if call.args[1] == libc::SECCOMP_IOCTL_NOTIF_SEND => Some(0),
        _ => None,
    }
}

static ONE: u64 = 1;

/// Two notices: of a call that may fail, and of one that may not be made.
fn give(listener: i32, to: u64) -> i64 {
    // SAFETY: all zeroes is one.
    let mut notice: libc::seccomp_notif = unsafe { std::mem::zeroed() };
    (notice.id, notice.data.arch) = (1, ARCHITECTURE);
    match GIVEN.fetch_add(1, Ordering::SeqCst) {
        0 => {
            notice.data.nr = libc::SYS_openat as i32;
            notice.data.args[..2].copy_from_slice(&[libc::AT_FDCWD as u32 as u64, LOOKS.as_ptr() as u64]);
            notice.data.args[2] = (libc::O_RDONLY | libc::O_CLOEXEC) as u64;
        }
        1 => {
            notice.data.nr = libc::SYS_socket as i32;
            let mut count = 0u64;
            // SAFETY: there is room for the eight bytes. There are no more notices.
            unsafe { libc::read(listener, (&raw mut count).cast(), 8) };
        }
        _ => return -i64::from(libc::ENOENT),
    }
    // SAFETY: the caller has room for one, aligned: it has come from this process's own ioctl.
    unsafe { (to as *mut libc::seccomp_notif).write(notice) };
    0
}
