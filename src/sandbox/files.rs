#![forbid(unsafe_code)]
//! The files that a thread may open: what the VM was given by a name that may have to be opened again, and nothing else. What is
//! open already (disks, sockets, KVM) is not Landlock's matter.

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetError, Scope,
};

use crate::error::{Error, ErrorKind, Result};
use crate::vm::{Duty, Opens};

/// What is asked of a kernel that has it; others do what they know.
const KNOWN: ABI = ABI::V6;

const TUN: &str = "/dev/net/tun";

/// Restricts the calling thread, which has `no_new_privs`, for good.
pub(super) fn restrict(duty: Duty, opens: Opens) -> Result<()> {
    let failed = |e: RulesetError| {
        Error::new(ErrorKind::Os, "restricting the files that it may open (Landlock)").with_source(e)
    };
    // A TAP interface that went away and came back is attached to anew.
    let tun = (duty == Duty::Device && opens.taps).then(|| PathFd::new(TUN)).transpose();
    let tun = tun.map_err(|e| Error::new(ErrorKind::Os, format!("opening {TUN}")).with_source(e))?;
    ruleset(tun).map_err(failed)
}

fn ruleset(tun: Option<PathFd>) -> std::result::Result<(), RulesetError> {
    let rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(KNOWN))?
        .handle_access(AccessNet::from_all(KNOWN))?
        // Not signals: a vCPU's thread wakes others of this process, which are in no domain or another one. seccomp has those.
        .scope(Scope::AbstractUnixSocket)?
        .create()?;
    let access: BitFlags<AccessFs> = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
    let rules = match tun {
        Some(tun) => rules.add_rule(PathBeneath::new(tun, access))?,
        None => rules,
    };
    rules.restrict_self().map(drop)
}
