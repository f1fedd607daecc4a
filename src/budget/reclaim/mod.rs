#![forbid(unsafe_code)]
//! What to do when the host's memory gets short: pure, a plan from a sample.
//!
//! The stages are entered one after the other as less is free, and each goes on while it is:
//!
//! 1. balloon: guests are asked for what they do not use;
//! 2. page out: what is above guarantees goes to swap, where there is any;
//! 3. pause: a VM above its guarantee stands still, until there is room again or its deadline comes;
//! 4. stop: a VM that was declared a victim ends.
//!
//! Who gives is decided by min-funding revocation (Waldspurger, "Memory Resource Management in VMware ESX Server",
//! OSDI 2002, section 5): of what it was configured to have, each VM holds so much, and an idle page counts for as much as
//! 1 / (1 - tax) that are in use. The one that pays least for what it holds gives first. No VM is asked for more than the
//! tax's share of what it does not use, nor for anything below its guarantee.

use std::time::Duration;

pub(crate) use record::Look;

mod record;

/// When each stage begins, in bytes that are free, and how far it goes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Thresholds {
    pub balloon: u64,
    pub page_out: u64,
    pub pause: u64,
    pub stop: u64,
    /// Of what a guest does not use, how much may be taken: 0 to below 1.
    pub tax: f64,
    /// How long a VM may be paused.
    pub deadline: Duration,
}

/// How a VM stands to the policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    Running,
    /// The policy has paused it, and it stands still until then.
    Paused {
        until: Duration,
    },
    /// Somebody else's business: not started, or paused by the embedder.
    Other,
}

/// One VM, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct VmSample {
    pub id: u64,
    /// What it was configured to have: its share.
    pub max: u64,
    pub guarantee: u64,
    /// What exists of it, in memory.
    pub resident: u64,
    /// What its guest says that it could do without; 0 where it says nothing.
    pub idle: u64,
    /// What the policy has asked of its balloon, and what the balloon holds of that.
    pub asked: u64,
    pub ballooned: u64,
    /// Its guest has just taken memory back by itself: it is asked for nothing for a while.
    pub needs_all: bool,
    pub victim: Option<u8>,
    pub standing: Standing,
}

/// The host, at one moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sample {
    /// Since any beginning.
    pub now: Duration,
    pub free: u64,
    /// What is left of swap.
    pub swap: u64,
    pub vms: Vec<VmSample>,
}

/// Something to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Ask the guest for that much in all.
    Balloon {
        vm: u64,
        target: u64,
    },
    PageOut {
        vm: u64,
        bytes: u64,
    },
    Pause {
        vm: u64,
        until: Duration,
    },
    Resume {
        vm: u64,
    },
    Stop {
        vm: u64,
    },
}

/// What is taken from a VM at a time, at least: a huge page.
const STEP: u64 = 2 << 20;
/// Into how many parts what is needed is cut.
const PARTS: u64 = 256;

/// What to do now. Nothing is remembered: what was done before is in the sample.
pub(crate) fn plan(limits: &Thresholds, sample: &Sample) -> Vec<Step> {
    let mut steps = Vec::new();
    balloons(limits, sample, &mut steps);
    page_out(limits, sample, &mut steps);
    pauses(limits, sample, &mut steps);
    if sample.free < limits.stop {
        // One at a time: it may be enough.
        let victims = sample.vms.iter().filter(|vm| vm.victim.is_some());
        let victim = victims.min_by_key(|vm| (vm.victim, std::cmp::Reverse(vm.resident), vm.id));
        steps.extend(victim.map(|vm| Step::Stop { vm: vm.id }));
    }
    steps
}

/// A quarter above where a stage begins: there it has done enough.
fn goal(threshold: u64) -> u64 {
    threshold.saturating_add(threshold / 4)
}

/// Asks for what is missing, or gives back what is no longer needed.
fn balloons(limits: &Thresholds, sample: &Sample, steps: &mut Vec<Step>) {
    let goal = goal(limits.balloon);
    let mut targets: Vec<u64> = sample.vms.iter().map(|vm| vm.asked).collect();
    for (target, vm) in targets.iter_mut().zip(&sample.vms).filter(|(_, vm)| vm.needs_all) {
        *target = (*target).min(vm.ballooned);
    }
    let coming: u64 =
        sample.vms.iter().zip(&targets).map(|(vm, asked)| asked.saturating_sub(vm.ballooned)).sum();
    if sample.free < limits.balloon {
        let need = goal.saturating_sub(sample.free).saturating_sub(coming);
        let most = |vm: &VmSample| {
            if vm.needs_all || vm.standing != Standing::Running {
                return 0;
            }
            let unused = vm.idle.saturating_add(vm.ballooned);
            let taxed = (unused as f64 * limits.tax) as u64;
            let above = vm.max.saturating_sub(vm.guarantee);
            taxed.min(above).saturating_sub(vm.asked)
        };
        for (i, bytes) in revoke(limits.tax, &sample.vms, need, most) {
            targets[i] += bytes;
        }
    } else if sample.free > goal.saturating_add(limits.balloon / 4) {
        // Half of it now: what is given back is in use a moment later only.
        let total: u64 = targets.iter().sum();
        let spare = ((sample.free - goal) / 2).min(total);
        for target in targets.iter_mut().filter(|target| **target > 0) {
            let part = (u128::from(spare) * u128::from(*target) / u128::from(total)) as u64;
            *target -= part.next_multiple_of(4096).min(*target);
        }
    }
    for (vm, target) in sample.vms.iter().zip(targets) {
        if target != vm.asked {
            steps.push(Step::Balloon { vm: vm.id, target });
        }
    }
}

fn page_out(limits: &Thresholds, sample: &Sample, steps: &mut Vec<Step>) {
    if sample.free >= limits.page_out {
        return;
    }
    let need = (goal(limits.page_out) - sample.free).min(sample.swap);
    let most = |vm: &VmSample| vm.resident.saturating_sub(vm.guarantee);
    for (i, bytes) in revoke(limits.tax, &sample.vms, need, most) {
        steps.push(Step::PageOut { vm: sample.vms[i].id, bytes });
    }
}

fn pauses(limits: &Thresholds, sample: &Sample, steps: &mut Vec<Step>) {
    let relieved = sample.free >= goal(limits.pause);
    for vm in &sample.vms {
        let Standing::Paused { until } = vm.standing else { continue };
        if relieved {
            steps.push(Step::Resume { vm: vm.id });
        } else if sample.now >= until {
            // It was said beforehand what comes then.
            steps.push(if vm.victim.is_some() {
                Step::Stop { vm: vm.id }
            } else {
                Step::Resume { vm: vm.id }
            });
        }
    }
    if sample.free < limits.pause {
        let above = |vm: &&VmSample| vm.standing == Standing::Running && vm.resident > vm.guarantee;
        // Victims first, the lowest class before; then who pays least.
        let order = |vm: &&VmSample| (vm.victim.is_none(), vm.victim, price(limits.tax, vm, 0), vm.id);
        if let Some(vm) = sample.vms.iter().filter(above).min_by_key(order) {
            steps.push(Step::Pause { vm: vm.id, until: sample.now.saturating_add(limits.deadline) });
        }
    }
}

/// What a VM pays for each page that it holds when `taken` of it is gone, in parts of 2^20: the least gives first.
fn price(tax: f64, vm: &VmSample, taken: u64) -> u64 {
    let held = vm.resident.saturating_sub(taken);
    let idle = vm.idle.saturating_sub(taken).min(held);
    let active = (held - idle) as f64;
    let cost = active + idle as f64 / (1.0 - tax.clamp(0.0, 0.99));
    (vm.max as f64 * (1u64 << 20) as f64 / cost.max(1.0)) as u64
}

/// Takes `need` bytes from those that pay least: how much from each, at most what `most` allows.
fn revoke(tax: f64, vms: &[VmSample], need: u64, most: impl Fn(&VmSample) -> u64) -> Vec<(usize, u64)> {
    let mut room: Vec<u64> = vms.iter().map(|vm| most(vm) / 4096 * 4096).collect();
    let mut taken = vec![0u64; vms.len()];
    let step = (need / PARTS).next_multiple_of(STEP).max(STEP);
    let mut left = need.next_multiple_of(4096);
    while left > 0 {
        let payer = (0..vms.len())
            .filter(|i| room[*i] > 0)
            .min_by_key(|i| (price(tax, &vms[*i], taken[*i]), vms[*i].id));
        let Some(i) = payer else { break };
        let part = step.min(left).min(room[i]);
        (taken[i], room[i], left) = (taken[i] + part, room[i] - part, left - part);
    }
    taken.into_iter().enumerate().filter(|(_, bytes)| *bytes > 0).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;
    const LIMITS: Thresholds = Thresholds {
        balloon: 4 * GIB,
        page_out: 2 * GIB,
        pause: GIB,
        stop: GIB / 2,
        tax: 0.75,
        deadline: Duration::from_secs(10),
    };

    fn vm(id: u64, resident: u64, idle: u64) -> VmSample {
        VmSample {
            id,
            max: 8 * GIB,
            guarantee: 0,
            resident,
            idle,
            asked: 0,
            ballooned: 0,
            needs_all: false,
            victim: None,
            standing: Standing::Running,
        }
    }

    fn sample(free: u64, vms: Vec<VmSample>) -> Sample {
        Sample { now: Duration::from_secs(100), free, swap: 0, vms }
    }

    /// Balloons do at once what they are asked, and the kernel pages out what it is told to.
    fn obey(sample: &mut Sample, steps: &[Step]) {
        for step in steps {
            let (Step::Balloon { vm, .. }
            | Step::PageOut { vm, .. }
            | Step::Pause { vm, .. }
            | Step::Resume { vm }
            | Step::Stop { vm }) = *step;
            let at = sample.vms.iter().position(|one| one.id == vm).unwrap();
            match *step {
                Step::Balloon { target, .. } => {
                    let vm = &mut sample.vms[at];
                    let (more, less) =
                        (target.saturating_sub(vm.ballooned), vm.ballooned.saturating_sub(target));
                    (vm.idle, vm.resident) = (vm.idle - more + less, vm.resident - more);
                    (vm.asked, vm.ballooned) = (target, target);
                    sample.free += more;
                }
                Step::PageOut { bytes, .. } => {
                    sample.vms[at].resident -= bytes;
                    (sample.free, sample.swap) = (sample.free + bytes, sample.swap - bytes);
                }
                Step::Pause { until, .. } => sample.vms[at].standing = Standing::Paused { until },
                Step::Resume { .. } => sample.vms[at].standing = Standing::Running,
                Step::Stop { .. } => {
                    let gone = sample.vms.remove(at);
                    sample.free += gone.resident;
                }
            }
        }
    }

    #[test]
    fn nothing_is_done_while_enough_is_free() {
        assert_eq!(plan(&LIMITS, &sample(4 * GIB, vec![vm(1, 6 * GIB, 6 * GIB)])), []);
    }

    #[test]
    fn an_idle_vm_beside_a_busy_one_keeps_a_quarter_of_what_it_does_not_use() {
        let mut sample = sample(GIB + GIB / 2, vec![vm(1, 8 * GIB, 8 * GIB), vm(2, 8 * GIB, 0)]);
        for _ in 0..20 {
            let steps = plan(&LIMITS, &sample);
            obey(&mut sample, &steps);
            // The busy one touches whatever there is.
            let more = sample.free.saturating_sub(GIB + GIB / 2);
            (sample.free, sample.vms[1].resident) = (sample.free - more, sample.vms[1].resident + more);
        }
        let kept = sample.vms[0].resident as f64 / (8 * GIB) as f64;
        assert!((0.2..=0.3).contains(&kept), "{kept}");
        assert_eq!(sample.vms[1].ballooned, 0);
    }

    #[test]
    fn who_pays_least_gives_first_and_nobody_below_its_guarantee() {
        let mut vms = vec![vm(1, 2 * GIB, GIB), vm(2, 6 * GIB, 3 * GIB), vm(3, 6 * GIB, 3 * GIB)];
        vms[1].guarantee = 7 * GIB + GIB / 2;
        let mut all = sample(3 * GIB, vms);
        let steps = plan(&LIMITS, &all);
        let asked = |id| {
            let target = |s: &Step| {
                if let Step::Balloon { vm, target } = s { (*vm == id).then_some(*target) } else { None }
            };
            steps.iter().find_map(target).unwrap_or(0)
        };
        assert_eq!(asked(1), 0, "it holds least");
        assert!(asked(2) <= GIB / 2 && asked(3) >= GIB + GIB / 2, "{steps:?}");
        assert_eq!(asked(2) + asked(3), 2 * GIB, "what is missing to a quarter more");
        obey(&mut all, &steps);
        assert_eq!(plan(&LIMITS, &all), [], "enough");
    }

    #[test]
    fn what_has_been_asked_and_has_not_come_is_not_asked_for_again() {
        let mut all = sample(3 * GIB, vec![vm(1, 6 * GIB, 6 * GIB)]);
        all.vms[0].asked = 2 * GIB;
        assert_eq!(plan(&LIMITS, &all), []);
        all.vms[0].needs_all = true;
        all.vms[0].ballooned = GIB;
        assert_eq!(plan(&LIMITS, &all), [Step::Balloon { vm: 1, target: GIB }], "it needs its memory");
    }

    #[test]
    fn memory_comes_back_when_there_is_room_again() {
        let mut all = sample(20 * GIB, vec![vm(1, 2 * GIB, GIB), vm(2, 2 * GIB, GIB)]);
        for (vm, held) in all.vms.iter_mut().zip([2 * GIB, GIB]) {
            (vm.asked, vm.ballooned) = (held, held);
        }
        let steps = plan(&LIMITS, &all);
        assert_eq!(steps, [Step::Balloon { vm: 1, target: 0 }, Step::Balloon { vm: 2, target: 0 }]);
        all.free = 7 * GIB;
        let steps = plan(&LIMITS, &all);
        assert!(matches!(
            steps[..],
            [Step::Balloon { vm: 1, target: 1.. }, Step::Balloon { vm: 2, target: 1.. }]
        ));
    }

    #[test]
    fn stages_follow_each_other_and_only_victims_are_stopped() {
        let mut all = sample(GIB / 4, vec![vm(1, 8 * GIB, 0), vm(2, 8 * GIB, 0), vm(3, 4 * GIB, 0)]);
        (all.vms[1].victim, all.vms[2].victim) = (Some(5), Some(5));
        let until = all.now + LIMITS.deadline;
        assert_eq!(plan(&LIMITS, &all), [Step::Pause { vm: 2, until }, Step::Stop { vm: 2 }]);
        all.swap = 100 * GIB;
        let bytes: u64 = plan(&LIMITS, &all)
            .iter()
            .map(|step| if let Step::PageOut { bytes, .. } = step { *bytes } else { 0 })
            .sum();
        assert_eq!(bytes, 2 * GIB + GIB / 4, "with swap, that first");
        (all.vms[1].victim, all.vms[2].victim, all.swap) = (None, None, 0);
        assert_eq!(plan(&LIMITS, &all), [Step::Pause { vm: 1, until }], "nobody may be stopped");
    }

    #[test]
    fn a_pause_ends_with_the_shortage_or_at_its_deadline() {
        let mut all = sample(GIB - 1, vec![vm(1, 8 * GIB, 0)]);
        let steps = plan(&LIMITS, &all);
        obey(&mut all, &steps);
        assert_eq!(plan(&LIMITS, &all), []);
        let mut room = all.clone();
        room.free = 2 * GIB;
        assert_eq!(plan(&LIMITS, &room), [Step::Resume { vm: 1 }]);
        all.now += LIMITS.deadline;
        assert_eq!(plan(&LIMITS, &all), [Step::Resume { vm: 1 }]);
        all.vms[0].victim = Some(0);
        assert_eq!(plan(&LIMITS, &all), [Step::Stop { vm: 1 }]);
        let (for_ever, all) = (Duration::MAX, sample(GIB - 1, vec![vm(1, 8 * GIB, 0)]));
        let limits = Thresholds { deadline: for_ever, ..LIMITS };
        assert_eq!(plan(&limits, &all), [Step::Pause { vm: 1, until: for_ever }]);
    }

    #[test]
    fn random_herds_never_give_more_than_they_may() {
        let mut dice = crate::virtio::queue_driver::Dice(99);
        // Miri takes a thousand times as long.
        let rounds = if cfg!(miri) { 5 } else { 300 };
        for _ in 0..rounds {
            let vms = (0..dice.below(20)).map(|id| {
                let resident = dice.below(8 * GIB) / 4096 * 4096;
                let mut one = vm(id, resident, dice.below(resident + 1) / 4096 * 4096);
                one.guarantee = dice.below(8 * GIB);
                one.victim = (dice.below(3) == 0).then_some(dice.below(4) as u8);
                one
            });
            let mut all = sample(0, vms.collect());
            (all.free, all.swap) = (dice.below(6 * GIB), dice.below(GIB));
            let steps = plan(&LIMITS, &all);
            let out: u64 =
                steps.iter().map(|s| if let Step::PageOut { bytes, .. } = s { *bytes } else { 0 }).sum();
            assert!(out <= all.swap.next_multiple_of(4096));
            for step in &steps {
                let of = |vm: u64| all.vms.iter().find(|one| one.id == vm).unwrap();
                match *step {
                    Step::Balloon { vm, target } => {
                        assert!(target <= of(vm).max.saturating_sub(of(vm).guarantee));
                        assert!(target as f64 <= of(vm).idle as f64 * 0.75);
                    }
                    Step::PageOut { vm, bytes } => {
                        assert!(bytes <= of(vm).resident.saturating_sub(of(vm).guarantee))
                    }
                    Step::Pause { vm, .. } => assert!(of(vm).resident > of(vm).guarantee),
                    Step::Stop { vm } => assert!(of(vm).victim.is_some()),
                    Step::Resume { .. } => panic!("nobody is paused"),
                }
            }
        }
    }
}
