#![forbid(unsafe_code)]
//! From the lists to programs for the kernel.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, sock_filter,
};

use super::calls::{self, Is, Rule};
use crate::error::{Error, ErrorKind, Result};
use crate::vm::Duty;

/// `BPF_RET | BPF_K`: a program's end with a constant.
const RETURN: u16 = 0x06;

/// A program for each duty that was asked for.
pub(super) struct Filters([BpfProgram; calls::DUTIES.len()]);

impl Filters {
    pub fn compile(duties: &[Duty], vhost: bool) -> Result<Self> {
        let mut all = Self(Default::default());
        for duty in duties {
            all.0[*duty as usize] = compile(&rules_of(*duty, vhost)).map_err(|e| {
                let why = format!("sandbox: the filter of {duty:?}");
                Error::new(ErrorKind::Internal, why).with_source(e)
            })?;
        }
        Ok(all)
    }

    pub fn of(&self, duty: Duty) -> &[sock_filter] {
        &self.0[duty as usize]
    }
}

/// What the duty may in a VM with a card that the kernel serves, or without.
fn rules_of(duty: Duty, vhost: bool) -> Vec<&'static Rule> {
    #[cfg(feature = "internals")]
    if super::learn::is_on() {
        return super::learn::rules().collect();
    }
    calls::of(duty).filter(|rule| rule.when.is_so(vhost)).collect()
}

fn compile(rules: &[&Rule]) -> std::result::Result<BpfProgram, BackendError> {
    let mut by_number: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for rule in rules {
        let alternatives = by_number.entry(rule.call.id().into()).or_default();
        let conditions = rule
            .only
            .iter()
            .map(|(index, is)| condition(*index, *is))
            .collect::<std::result::Result<Vec<_>, _>>()?;
        if !conditions.is_empty() {
            alternatives.push(SeccompRule::new(conditions)?);
        }
    }
    let arch = TargetArch::x86_64;
    let filter = SeccompFilter::new(by_number, SeccompAction::KillProcess, SeccompAction::Allow, arch)?;
    let mut program: BpfProgram = filter.try_into()?;
    // seccompiler knows no notices. Where it would have the process killed (a call that is in no list, or made as a 32-bit
    // program's), the supervisor is asked.
    let killed = |end: &&mut sock_filter| end.code == RETURN && end.k == libc::SECCOMP_RET_KILL_PROCESS;
    program.iter_mut().filter(killed).for_each(|end| end.k = libc::SECCOMP_RET_USER_NOTIF);
    Ok(program)
}

fn condition(index: u8, is: Is) -> std::result::Result<SeccompCondition, BackendError> {
    use {SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, SeccompCmpOp::MaskedEq};
    match is {
        Is::Number(number) => SeccompCondition::new(index, Dword, Eq, number.into()),
        Is::Masked(mask, number) => SeccompCondition::new(index, Dword, MaskedEq(mask.into()), number.into()),
        Is::Process => SeccompCondition::new(index, Dword, Eq, std::process::id().into()),
    }
}
