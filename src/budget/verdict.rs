#![forbid(unsafe_code)]
//! What the ledger answers a claim: the constraint that binds, and the slack on every one.

use std::fmt;

use super::provider::{Inventory, Provider};
use super::{Claim, Headroom, Totals};
use crate::error::{Error, ErrorKind, FieldError};
use crate::units::Bytes;

/// A rule of the ledger. In the order in which they are looked at: the first that is broken is the one that
/// a refusal names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Constraint {
    /// One VM's memory keeps to the least, the most and the step that one VM may have.
    MemoryUnits,
    /// One VM's shared vCPUs keep to the least, the most and the step that one VM may have.
    VcpuUnits,
    /// The VMs' memory sizes together stay within (total − reserved) × ratio.
    Nominal,
    /// Guarantees and overhead together stay within total − reserved. Never overcommitted.
    Guarantee,
    /// Everything that guests can touch without our consent, and overhead, stays within
    /// total − reserved + swap, unless the VM may be stopped as a victim.
    Solvency,
    /// Free memory after the newcomer's guarantee covers what guests touch during the reaction time.
    Headroom,
    /// The VMs' shared vCPUs together stay within cores × ratio.
    Vcpus,
    /// Each dedicated vCPU has a core of its own.
    DedicatedVcpus,
}

impl Constraint {
    /// Every one, in order.
    pub const ALL: [Self; 8] = [
        Self::MemoryUnits,
        Self::VcpuUnits,
        Self::Nominal,
        Self::Guarantee,
        Self::Solvency,
        Self::Headroom,
        Self::Vcpus,
        Self::DedicatedVcpus,
    ];

    /// A short name, stable, for logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::MemoryUnits => "memory_units",
            Self::VcpuUnits => "vcpu_units",
            Self::Nominal => "nominal",
            Self::Guarantee => "guarantee",
            Self::Solvency => "solvency",
            Self::Headroom => "headroom",
            Self::Vcpus => "vcpus",
            Self::DedicatedVcpus => "dedicated_vcpus",
        }
    }

    /// Whether it counts bytes; else it counts vCPUs.
    pub fn counts_bytes(self) -> bool {
        !matches!(self, Self::VcpuUnits | Self::Vcpus | Self::DedicatedVcpus)
    }
}

impl fmt::Display for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How one constraint stands to a claim, in bytes or vCPUs ([`Constraint::counts_bytes`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Slack {
    /// Which.
    pub constraint: Constraint,
    /// The most that may be promised. `u64::MAX`: not limited.
    pub limit: u64,
    /// What is promised without this claim.
    pub used: u64,
    /// What the claim asks for.
    pub wanted: u64,
    /// What would be left; negative is how much is missing.
    pub left: i64,
    /// Whether this alone forbids the claim. What is left may be negative all the same: a change that
    /// does not worsen an over-capacity passes, and so does a VM that may be stopped as a victim, on solvency.
    pub broken: bool,
}

impl Slack {
    fn amount(&self, n: u64) -> String {
        if self.constraint.counts_bytes() { Bytes(n).to_string() } else { format!("{n} vCPUs") }
    }
}

impl fmt::Display for Slack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if matches!(self.constraint, Constraint::MemoryUnits | Constraint::VcpuUnits) && self.limit < u64::MAX
        {
            return write!(f, "wants {}, at most {}", self.amount(self.wanted), self.amount(self.limit));
        }
        if self.limit == u64::MAX {
            return write!(f, "wants {}, not limited", self.amount(self.wanted));
        }
        write!(
            f,
            "wants {}, {} of {} are taken, ",
            self.amount(self.wanted),
            self.amount(self.used),
            self.amount(self.limit)
        )?;
        let left = self.amount(self.left.unsigned_abs());
        if self.left < 0 { write!(f, "{left} are missing") } else { write!(f, "{left} would be left") }
    }
}

/// The ledger's answer to a claim. The source of an error of kind [`Refused`](ErrorKind::Refused).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Verdict {
    /// The constraint that forbids the claim, the first in order; `None` when it fits.
    pub binding: Option<Constraint>,
    /// Every constraint, in order.
    pub slack: [Slack; Constraint::ALL.len()],
}

impl Verdict {
    /// The verdict behind a refusal; `None` for every other error.
    pub fn of(error: &Error) -> Option<&Self> {
        std::error::Error::source(error)?.downcast_ref()
    }

    /// How one constraint stands.
    pub fn slack(&self, constraint: Constraint) -> Slack {
        self.slack[constraint as usize]
    }

    /// The refusal, if it is one.
    pub(super) fn refusal(&self, provider: &Provider) -> Option<Error> {
        let binding = self.binding?;
        let memory = &provider.memory;
        let why = format!(
            "the ledger refuses, for {binding} (memory: total {}, reserved {}, ratio {}, one VM {} to {} in steps of {}, swap {})",
            Bytes(memory.total),
            Bytes(memory.reserved),
            memory.ratio,
            Bytes(memory.min_unit),
            Bytes(memory.max_unit),
            Bytes(memory.step_size),
            Bytes(provider.swap),
        );
        let fields = self.slack.iter().map(|s| {
            let remedy = if s.broken { "broken" } else { "" };
            FieldError::new(s.constraint.name(), s.to_string(), remedy)
        });
        Some(Error::new(ErrorKind::Refused, why).with_fields(fields.collect()).with_source(self.clone()))
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.binding {
            None => f.write_str("it fits"),
            Some(binding) => write!(f, "{binding}: {}", self.slack(binding)),
        }
    }
}

impl std::error::Error for Verdict {}

/// Judges `new`, which replaces `held` (`None`: a newcomer), where `totals` are promised, `held` among them.
pub(super) fn judge(
    provider: &Provider,
    totals: &Totals,
    held: Option<&Claim>,
    new: &Claim,
    headroom: Headroom,
) -> Verdict {
    let mut others = *totals;
    if let Some(held) = held {
        others.remove(held);
    }
    let newcomer = held.is_none();
    let held = held.copied().unwrap_or_default();
    let usable = u128::from(provider.memory.usable());
    // A constraint over a sum: `others` and `wanted` stay within `limit`, or at least do not grow.
    let over = |constraint, limit: u128, others: u128, wanted: u128, before: u128| {
        let left = limit as i128 - (others + wanted) as i128;
        slack(constraint, limit, others, wanted, left, left < 0 && wanted > before)
    };
    let of = |claim: &Claim| [claim.kept(), claim.touchable()];
    let ([kept, touchable], [kept_before, touchable_before]) = (of(new), of(&held));
    let solvency = over(
        Constraint::Solvency,
        usable + u128::from(provider.swap),
        others.touchable,
        touchable,
        touchable_before,
    );
    let vcpus = provider.vcpus.map_or(i128::MAX as u128 / 2, |v| v.capacity());
    let (memory, memory_before) = (u128::from(new.memory.get()), u128::from(held.memory.get()));
    let slack = [
        units(Constraint::MemoryUnits, Some(&provider.memory), new.memory.get(), held.memory.get()),
        units(Constraint::VcpuUnits, provider.vcpus.as_ref(), new.vcpus, held.vcpus),
        over(Constraint::Nominal, provider.memory.capacity(), others.memory, memory, memory_before),
        over(Constraint::Guarantee, usable, others.kept, kept, kept_before),
        Slack { broken: solvency.broken && new.victim.is_none(), ..solvency },
        headroom_slack(headroom, totals.pending, new, (!newcomer).then_some(&held)),
        over(Constraint::Vcpus, vcpus, others.vcpus, new.vcpus.into(), held.vcpus.into()),
        over(
            Constraint::DedicatedVcpus,
            provider.dedicated.into(),
            others.dedicated,
            new.dedicated.into(),
            held.dedicated.into(),
        ),
    ];
    Verdict { binding: slack.iter().find(|s| s.broken).map(|s| s.constraint), slack }
}

/// The unit rules. What is held already may stay, whatever the rules have become, and so may nothing.
fn units(constraint: Constraint, inventory: Option<&Inventory>, wanted: u64, held: u64) -> Slack {
    let (most, left) = inventory.map_or((u64::MAX, i128::MAX), |i| (i.max_unit, i.unit_slack(wanted)));
    slack(constraint, most.into(), 0, wanted.into(), left, left < 0 && wanted != held)
}

/// What is free, less what must stay so and what was promised to VMs that are being built, against what `new`
/// wants guaranteed. A newcomer always counts: it adds to what guests touch.
fn headroom_slack(headroom: Headroom, pending: u128, new: &Claim, held: Option<&Claim>) -> Slack {
    let (wanted, before) = (new.guaranteed(), held.map_or(0, Claim::guaranteed));
    let Some(free) = headroom.free else {
        return slack(Constraint::Headroom, u64::MAX.into(), 0, wanted.into(), i128::MAX, false);
    };
    let used = pending + u128::from(headroom.needed);
    let grows = wanted.saturating_sub(before);
    let left = i128::from(free) - used as i128 - i128::from(grows);
    let broken = left < 0 && (grows > 0 || held.is_none());
    slack(Constraint::Headroom, free.into(), used, grows.into(), left, broken)
}

fn slack(constraint: Constraint, limit: u128, used: u128, wanted: u128, left: i128, broken: bool) -> Slack {
    let short = |n: u128| u64::try_from(n).unwrap_or(u64::MAX);
    let left = i64::try_from(left).unwrap_or(if left < 0 { i64::MIN } else { i64::MAX });
    Slack { constraint, limit: short(limit), used: short(used), wanted: short(wanted), left, broken }
}
