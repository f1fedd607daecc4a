#![forbid(unsafe_code)]
//! The files that a thread may open: none. What is open already (disks, sockets, KVM) is not Landlock's matter.

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetError, Scope,
};

use crate::error::{Error, ErrorKind, Result};

/// What is asked of a kernel that has it; others do what they know.
const KNOWN: ABI = ABI::V6;

/// Restricts the calling thread, which has `no_new_privs`, for good.
pub(super) fn restrict() -> Result<()> {
    let failed = |e: RulesetError| {
        Error::new(ErrorKind::Os, "restricting the files that it may open (Landlock)").with_source(e)
    };
    ruleset().map_err(failed)
}

fn ruleset() -> std::result::Result<(), RulesetError> {
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(KNOWN))?
        .handle_access(AccessNet::from_all(KNOWN))?
        // Not signals: a vCPU's thread wakes others of this process, which are in no domain or another one. seccomp has those.
        .scope(Scope::AbstractUnixSocket)?
        .create()?
        .restrict_self()
        .map(drop)
}
