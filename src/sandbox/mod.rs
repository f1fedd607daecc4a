#![forbid(unsafe_code)]
//! The sandbox of a VM's threads: seccomp filters by what each thread does, and a Landlock rule set of the files that it may
//! open. `docs/sandbox.md` says against what, and what is not covered.
//!
//! Everything that needs more is done before a thread enters: the embedder's hook, affinity, `KVM_CREATE_VM`, opening disks. What
//! a filter refuses goes to the VM's supervisor (`vm/supervisor.rs`), which knows nothing of the lists.

use std::sync::Once;

use crate::config::{SandboxConfig, VmConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::log;
use crate::sys::seccomp::{self, Notice};
use crate::sys::thread::spawn;
use crate::vm::{Confinement, Duty, Entered, Opens};
use filter::Filters;

mod calls;
mod files;
mod filter;
#[cfg(feature = "internals")]
pub(crate) mod learn;

const NOTICES: &str = "seccomp filters that give notices";
const LANDLOCK: &str = "Landlock";
const NOTICES_SINCE: &str = "they came with Linux 5.0: CONFIG_SECCOMP_FILTER";
const LANDLOCK_SINCE: &str =
    "it came with Linux 5.13: CONFIG_SECURITY_LANDLOCK, and landlock in CONFIG_LSM or lsm=";

/// What a sandbox is made of, whether this kernel has it, and how to get it.
pub(crate) fn parts() -> [(&'static str, bool, &'static str); 2] {
    [
        (NOTICES, seccomp::gives_notices(), NOTICES_SINCE),
        (LANDLOCK, seccomp::landlock_version().is_some(), LANDLOCK_SINCE),
    ]
}

/// Makes ready what the threads of a VM of this configuration enter.
///
/// # Errors
/// `Unsupported` where this kernel cannot, and that is not good enough.
pub(crate) fn prepare(config: &VmConfig, wanted: &SandboxConfig) -> Result<Confinement> {
    settle_allocator()?;
    let mut opens = Opens::of(config);
    let best_effort = wanted.best_effort;
    let missing = |what: &str, since: &str| {
        let why = format!("sandbox: this kernel has no {what}; {since}; sandbox.best_effort goes on without");
        if !best_effort {
            return Err(Error::new(ErrorKind::Unsupported, why));
        }
        log::warn!("{why}");
        Ok(())
    };
    let landlock = seccomp::landlock_version();
    if landlock.is_none() {
        missing(LANDLOCK, LANDLOCK_SINCE)?;
        // A filter sees no path: where nothing else does, no file is opened again.
        opens.taps = false;
    }
    let filters = if seccomp::gives_notices() {
        Some(Filters::compile(opens)?)
    } else {
        missing(NOTICES, NOTICES_SINCE)?;
        None
    };
    let enter = move |duty| {
        seccomp::no_new_privs()
            .map_err(|e| Error::os("giving up new privileges (PR_SET_NO_NEW_PRIVS)", e))?;
        if landlock.is_some() {
            files::restrict(duty, opens)?;
        }
        let notices = match filters.as_ref().map(|filters| seccomp::install(filters.of(duty))) {
            Some(Err(error)) if best_effort && error.raw_os_error() == Some(libc::EBUSY) => {
                log::warn!("sandbox: calls are not filtered: {error}");
                None
            }
            Some(Err(error)) => return Err(not_installed(error)),
            Some(Ok(notices)) => Some(notices),
            None => None,
        };
        Ok(Entered { notices, landlock })
    };
    Ok(Confinement { opens, enter: Box::new(enter), passes, describe })
}

/// The first time that the C library gives back what lies at the end of an arena, it opens a file in `/proc/sys` to see how. That is
/// now, once for the process, and not on a thread in the sandbox, which would hold the arena's lock meanwhile.
fn settle_allocator() -> Result<()> {
    static DONE: Once = Once::new();
    let mut begun = Ok(());
    DONE.call_once(|| {
        // A thread has an arena that can shrink. Blocks of this size come from there, and so many are more than it keeps.
        let grow_and_shrink = || drop(std::hint::black_box([(); 6].map(|()| vec![1u8; 60_000])));
        begun = spawn("vmbed-arena".to_owned(), grow_and_shrink)
            .map(|thread| drop(thread.join()))
            .map_err(|e| Error::os("sandbox: starting a thread", e));
    });
    begun
}

fn not_installed(error: std::io::Error) -> Error {
    let why = match error.raw_os_error() {
        Some(libc::EBUSY) => {
            "installing a seccomp filter: the process has one already whose notices somebody hears (its container's?), and the kernel \
             knows no second; sandbox.best_effort goes on without"
        }
        _ => "installing a seccomp filter (SECCOMP_SET_MODE_FILTER)",
    };
    Error::os(why, error)
}

/// Whether a call that a filter did not let through is made all the same: never, but while the project's tests learn which there are.
fn passes(duty: Duty, notice: &Notice) -> bool {
    #[cfg(feature = "internals")]
    if learn::is_on() {
        learn::note(duty, notice);
        return true;
    }
    let _ = (duty, notice);
    false
}

/// `openat (257) with 0xffffff9c, 0x7f…, …`.
fn describe(notice: &Notice) -> String {
    let Notice { number, arguments, .. } = notice;
    let arguments = arguments.map(|argument| format!("{argument:#x}")).join(", ");
    let name = calls::name(notice);
    format!("{name} ({number}) with {arguments}")
}

#[cfg(test)]
mod tests;
