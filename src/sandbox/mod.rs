#![forbid(unsafe_code)]
//! The sandbox of a VM's threads, and of the one that reclaims memory: seccomp filters by what each thread does, and a Landlock rule
//! set by which it opens no files. `docs/sandbox.md` says against what, and what is not covered.
//!
//! Everything that needs more is done before a thread enters: the embedder's hook, affinity, `KVM_CREATE_VM`, opening disks. What
//! a filter refuses goes to a supervisor (`vm/supervisor.rs`), which knows nothing of the lists.

use crate::config::{SandboxConfig, Vhost, VmConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::log;
use crate::sys::seccomp::{self, Notice, Peek};
use crate::vm::{Confinement, Duty, Entered, Verdict};
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
    let vhost = config.nets.iter().any(|net| net.vhost != Vhost::Off);
    let compile = || Filters::compile(&calls::OF_VM, vhost);
    confine(wanted.best_effort, "sandbox.best_effort", compile)
}

/// The same for the thread that reclaims memory.
///
/// # Errors
/// As [`prepare`].
pub(crate) fn prepare_reclaim(best_effort: bool) -> Result<Confinement> {
    let compile = || Filters::compile(&[Duty::Reclaim], false);
    confine(best_effort, "ReclaimSandbox::IfPresent", compile)
}

/// `or` is what the embedder may ask for instead.
fn confine(
    best_effort: bool,
    or: &'static str,
    compile: impl FnOnce() -> Result<Filters>,
) -> Result<Confinement> {
    let missing = |what: &str, since: &str| {
        let why = format!("sandbox: this kernel has no {what}; {since}; {or} goes on without");
        if !best_effort {
            return Err(Error::new(ErrorKind::Unsupported, why));
        }
        log::warn!("{why}");
        Ok(())
    };
    let landlock = seccomp::landlock_version();
    if landlock.is_none() {
        missing(LANDLOCK, LANDLOCK_SINCE)?;
    }
    let filters = if seccomp::gives_notices() {
        Some(compile()?)
    } else {
        missing(NOTICES, NOTICES_SINCE)?;
        None
    };
    let enter = move |duty| {
        seccomp::no_new_privs()
            .map_err(|e| Error::os("giving up new privileges (PR_SET_NO_NEW_PRIVS)", e))?;
        if landlock.is_some() {
            files::restrict()?;
        }
        let notices = match filters.as_ref().map(|filters| seccomp::install(filters.of(duty))) {
            Some(Err(error)) if best_effort && error.raw_os_error() == Some(libc::EBUSY) => {
                log::warn!("sandbox: calls are not filtered: {error}");
                None
            }
            Some(Err(error)) => return Err(not_installed(error, or)),
            Some(Ok(notices)) => Some(notices),
            None => None,
        };
        Ok(Entered { notices, landlock })
    };
    Ok(Confinement { enter: Box::new(enter), judge, describe })
}

fn not_installed(error: std::io::Error, or: &str) -> Error {
    if error.raw_os_error() != Some(libc::EBUSY) {
        return Error::os("installing a seccomp filter (SECCOMP_SET_MODE_FILTER)", error);
    }
    let why = "installing a seccomp filter: the process has one already whose notices somebody hears (its container's?), and the \
               kernel knows no second";
    Error::os(format!("{why}; {or} goes on without"), error)
}

/// A call that a filter did not let through is a violation, but for the one of the C library's that every thread may come to.
fn judge(duty: Duty, notice: &Notice, peek: &Peek) -> Verdict {
    if calls::ARENA.covers(notice) && peek.finds(calls::OVERCOMMIT, notice.arguments[1]) {
        return Verdict::Fails;
    }
    #[cfg(feature = "internals")]
    if learn::is_on() {
        learn::note(duty, notice);
        return Verdict::Passes;
    }
    let _ = duty;
    Verdict::Violates
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
