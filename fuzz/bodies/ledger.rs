//! The ledger against one on paper: a list of who has what, added up anew for every question. Claims, commits, changes,
//! drops, hosts that change, generations, cores; with OpenStack Placement's arithmetic.

use std::collections::BTreeSet;

use arbitrary::{Result, Unstructured};
use vmbed::internals::{Accounts, FreeMemory, HostTerms, PlacementInventory, VmTerms};
use vmbed::{Constraint, Error, ErrorKind, Verdict};

const STEPS: usize = 120;

/// How deep an input went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Depth {
    /// Claims that were accepted, and VMs that were built, changed and taken away.
    pub claimed: u32,
    pub committed: u32,
    pub changed: u32,
    pub dropped: u32,
    /// Cores that were given to dedicated vCPUs.
    pub cores: u32,
    /// Hosts that were replaced, also by less than is promised.
    pub hosts: u32,
    /// Changes that pass since they worsen nothing, though more is promised than there is.
    pub relieved: u32,
    /// What was based on a generation that is no more.
    pub stale: u32,
    /// Refusals, by their constraint.
    pub refused: [u32; Constraint::ALL.len()],
}

impl Depth {
    /// What a campaign sums up.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut all = vec![
            ("claimed", self.claimed.into()),
            ("committed", self.committed.into()),
            ("changed", self.changed.into()),
            ("dropped", self.dropped.into()),
            ("cores", self.cores.into()),
            ("hosts", self.hosts.into()),
            ("relieved", self.relieved.into()),
            ("stale", self.stale.into()),
        ];
        all.extend(Constraint::ALL.iter().zip(self.refused).map(|(c, n)| (c.name(), u64::from(n))));
        all
    }
}

/// A consumer on paper.
#[derive(Clone, Debug)]
struct Vm {
    terms: VmTerms,
    cores: Vec<u32>,
    /// `None`: claimed, and not there yet.
    generation: Option<u64>,
}

struct Paper {
    host: HostTerms,
    vms: Vec<Vm>,
    generation: u64,
}

/// How a constraint over a sum stands: the most, what the others have, and what this one wants.
type Sum = (i128, i128, i128);

fn kept(vm: &VmTerms) -> i128 {
    promised(vm) + i128::from(vm.overhead)
}

fn promised(vm: &VmTerms) -> i128 {
    vm.guarantee.max(vm.pinned).into()
}

fn touchable(vm: &VmTerms) -> i128 {
    i128::from(vm.entitlement) + i128::from(vm.overhead)
}

/// What Placement calls the capacity: (total - reserved) * allocation_ratio, as far as it is whole.
fn capacity(inventory: &PlacementInventory) -> i128 {
    let product = inventory.total.saturating_sub(inventory.reserved) as f64 * inventory.allocation_ratio;
    // Nothing where it is no number; an end where there is none.
    if product > 0.0 { product.min(1e35).floor() as i128 } else { 0 }
}

/// Placement's rules for one consumer's amount.
fn is_odd(inventory: &PlacementInventory, amount: u64) -> bool {
    let step = inventory.step_size.max(1);
    amount < inventory.min_unit || amount > inventory.max_unit || !amount.is_multiple_of(step)
}

impl Paper {
    fn sum(&self, besides: Option<usize>, of: impl Fn(&VmTerms) -> i128) -> i128 {
        let others = self.vms.iter().enumerate().filter(|(i, _)| Some(*i) != besides);
        others.map(|(_, vm)| of(&vm.terms)).sum()
    }

    /// The rules that `new` breaks in the place of consumer `old`, or as a newcomer; and how the sums stand.
    fn judge(&self, old: Option<usize>, new: &VmTerms, free: FreeMemory) -> (Vec<Constraint>, [Sum; 5]) {
        let had = old.map(|i| self.vms[i].terms).unwrap_or_default();
        let host = &self.host;
        let usable = i128::from(host.memory.total.saturating_sub(host.memory.reserved));
        let sum = |limit, of: &dyn Fn(&VmTerms) -> i128| (limit, self.sum(old, of), of(new));
        let vcpus = host.vcpus.as_ref().map_or(i128::MAX / 4, capacity);
        let sums = [
            sum(capacity(&host.memory), &|vm| vm.memory.into()),
            sum(usable, &kept),
            sum(usable + i128::from(host.swap), &touchable),
            sum(vcpus, &|vm| vm.vcpus.into()),
            sum(host.cores.len() as i128, &|vm| vm.dedicated.into()),
        ];
        // More than there is, and more than before.
        let over = |(limit, others, wanted): Sum, before: i128| others + wanted > limit && wanted > before;
        let extra = (promised(new) - promised(&had)).max(0);
        let waiting: i128 =
            self.vms.iter().filter(|vm| vm.generation.is_none()).map(|vm| promised(&vm.terms)).sum();
        let short = free.0.is_some_and(|now| i128::from(now) < waiting + i128::from(free.1) + extra);
        let broken = [
            new.memory != had.memory && is_odd(&host.memory, new.memory),
            host.vcpus.as_ref().is_some_and(|v| new.vcpus != had.vcpus && is_odd(v, new.vcpus)),
            over(sums[0], had.memory.into()),
            over(sums[1], kept(&had)),
            new.victim.is_none() && over(sums[2], touchable(&had)),
            short && (old.is_none() || extra > 0),
            over(sums[3], had.vcpus.into()),
            over(sums[4], had.dedicated.into()),
        ];
        let broken = Constraint::ALL.into_iter().zip(broken).filter_map(|(c, broken)| broken.then_some(c));
        (broken.collect(), sums)
    }
}

struct Books {
    real: Accounts,
    paper: Paper,
    depth: Depth,
}

/// Runs one input. Panics where the ledger and the paper differ.
pub fn run(data: &[u8]) -> Depth {
    let mut u = Unstructured::new(data);
    let Ok(host) = host(&mut u) else { return Depth::default() };
    let real = Accounts::new(&host);
    let mut books =
        Books { real, paper: Paper { host, vms: Vec::new(), generation: 0 }, depth: Depth::default() };
    for _ in 0..STEPS {
        if u.is_empty() || books.step(&mut u).is_err() {
            break;
        }
        books.compare();
    }
    while !books.paper.vms.is_empty() {
        books.drop_consumer(0);
    }
    books.compare();
    books.depth
}

/// Mostly a few, so that sums meet limits; sometimes as large as can be.
fn amount(u: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match u.arbitrary::<u8>()? {
        0..4 => u64::MAX - u64::from(u.arbitrary::<u8>()?),
        4..8 => u.arbitrary()?,
        8..40 => 0,
        n => (n % 100).into(),
    })
}

fn inventory(u: &mut Unstructured<'_>, total: u64) -> Result<PlacementInventory> {
    let mut made = PlacementInventory {
        total,
        reserved: if u.arbitrary()? { 0 } else { amount(u)? },
        min_unit: 1,
        max_unit: u64::MAX,
        step_size: 1,
        allocation_ratio: *u.choose(&[1.0, 1.0, 1.5, 16.0, 0.3])?,
    };
    if u.ratio(1u8, 4u8)? {
        (made.min_unit, made.max_unit, made.step_size) =
            (u.int_in_range(0..=9)?, u.int_in_range(0..=90)?, u.int_in_range(0..=5)?);
    }
    if u.ratio(1u8, 8u8)? {
        made.allocation_ratio = f64::from_bits(u.arbitrary()?);
    }
    Ok(made)
}

fn host(u: &mut Unstructured<'_>) -> Result<HostTerms> {
    let total = if u.ratio(7u8, 8u8)? { u.int_in_range(100..=1000)? } else { amount(u)? };
    let memory = inventory(u, total)?;
    let vcpus = if u.arbitrary()? { Some(u.int_in_range(0..=20)?) } else { None };
    let vcpus = vcpus.map(|total| inventory(u, total)).transpose()?;
    let cores: BTreeSet<u32> =
        (0..8).filter(|i| u.arbitrary::<u8>().is_ok_and(|bits| bits >> i & 1 == 1)).collect();
    Ok(HostTerms { memory, swap: if u.arbitrary()? { 0 } else { amount(u)? }, vcpus, cores })
}

fn terms(u: &mut Unstructured<'_>) -> Result<VmTerms> {
    let memory = amount(u)?;
    let part = |u: &mut Unstructured<'_>| Ok(if u.ratio(3u8, 4u8)? { memory / 4 } else { amount(u)? });
    Ok(VmTerms {
        memory,
        entitlement: part(u)?,
        guarantee: part(u)?,
        pinned: if u.ratio(3u8, 4u8)? { 0 } else { amount(u)? },
        overhead: u.int_in_range(0..=3)?,
        victim: u.arbitrary()?,
        vcpus: u.int_in_range(0..=4)?,
        dedicated: if u.ratio(2u8, 3u8)? { 0 } else { u.int_in_range(0..=3)? },
    })
}

fn free(u: &mut Unstructured<'_>) -> Result<FreeMemory> {
    if u.ratio(2u8, 3u8)? { Ok((None, 0)) } else { Ok((Some(amount(u)?), amount(u)?)) }
}

impl Books {
    fn step(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let count = self.paper.vms.len();
        match u.int_in_range(0..=11u8)? {
            0..4 => self.claim(terms(u)?, free(u)?),
            4..6 if count > 0 => {
                let at = u.choose_index(count)?;
                self.real.commit(at);
                let mut vm = self.paper.vms.remove(at);
                self.depth.committed += u32::from(vm.generation.is_none());
                vm.generation = vm.generation.or(Some(1));
                self.paper.vms.push(vm);
            }
            6..9 if count > 0 => {
                let at = u.choose_index(count)?;
                // All of it is something else, or one thing.
                let mut wanted = self.paper.vms[at].terms;
                match u.int_in_range(0..=3u8)? {
                    0 => wanted = terms(u)?,
                    1 => wanted.memory = amount(u)?,
                    2 => wanted.guarantee = amount(u)?,
                    _ => {
                        (wanted.memory, wanted.vcpus) =
                            (wanted.memory.saturating_sub(1), wanted.vcpus.saturating_sub(1))
                    }
                }
                let behind = if u.ratio(1u8, 2u8)? { None } else { Some(u.int_in_range(0..=4u64)? / 3) };
                self.change(at, wanted, behind, free(u)?);
            }
            9 if count > 0 => self.drop_consumer(u.choose_index(count)?),
            10 => {
                let host = host(u)?;
                let behind = if u.ratio(1u8, 2u8)? { None } else { Some(u.int_in_range(0..=4u64)? / 4) };
                self.set_host(host, behind);
            }
            _ => {}
        }
        Ok(())
    }

    /// The answer is the paper's: whether it fits, the first rule that is broken, and how each stands.
    fn look(&mut self, verdict: &Verdict, expected: &(Vec<Constraint>, [Sum; 5]), fits: bool) {
        let (broken, sums) = expected;
        assert_eq!(verdict.binding, broken.first().copied());
        assert_eq!(fits, broken.is_empty());
        for constraint in Constraint::ALL {
            let slack = verdict.slack(constraint);
            assert_eq!(slack.broken, broken.contains(&constraint), "{slack:?}");
        }
        let names = [
            Constraint::Nominal,
            Constraint::Guarantee,
            Constraint::Solvency,
            Constraint::Vcpus,
            Constraint::DedicatedVcpus,
        ];
        for (constraint, &(limit, others, wanted)) in names.into_iter().zip(sums) {
            let slack = verdict.slack(constraint);
            let short = |n: i128| u64::try_from(n).unwrap_or(u64::MAX);
            assert_eq!((slack.used, slack.wanted), (short(others), short(wanted)), "{constraint}");
            assert_eq!(slack.limit, short(limit), "{constraint}");
            let left = (limit - others - wanted).clamp(i64::MIN.into(), i64::MAX.into());
            assert_eq!(i128::from(slack.left), left, "{constraint}");
        }
        if let Some(binding) = verdict.binding {
            self.depth.refused[binding as usize] += 1;
        }
    }

    fn claim(&mut self, wanted: VmTerms, free: FreeMemory) {
        let expected = self.paper.judge(None, &wanted, free);
        let verdict = self.real.judge(wanted, free);
        let answer = self.real.claim(wanted, free);
        self.look(&verdict, &expected, answer.is_ok());
        match answer {
            Err(error) => assert_eq!(Verdict::of(&error), Some(&verdict)),
            Ok(cores) => {
                assert_eq!(cores.len() as u64, wanted.dedicated);
                for core in &cores {
                    assert!(self.paper.host.cores.contains(core));
                    assert!(
                        !self.paper.vms.iter().any(|vm| vm.cores.contains(core)),
                        "core {core} is another's"
                    );
                }
                self.depth.cores += cores.len() as u32;
                self.paper.vms.push(Vm { terms: wanted, cores, generation: None });
                self.paper.generation += 1;
                self.depth.claimed += 1;
            }
        }
    }

    fn change(&mut self, at: usize, wanted: VmTerms, behind: Option<u64>, free: FreeMemory) {
        let vm = &self.paper.vms[at];
        // Dedicated vCPUs have their cores for good.
        let wanted = VmTerms { dedicated: vm.terms.dedicated, ..wanted };
        let expected = self.paper.judge(Some(at), &wanted, free);
        let based_on = behind.map(|behind| vm.generation.unwrap_or(1).saturating_sub(behind));
        let is_stale = based_on.is_some() && based_on != vm.generation;
        let answer = self.real.change(at, based_on, wanted, free);
        if vm.generation.is_none() {
            return assert!(matches!(answer, Ok(None)), "it is not there yet");
        }
        match answer {
            Err(error) if error.kind() == ErrorKind::InvalidState => {
                assert!(is_stale, "{error}");
                self.depth.stale += 1;
            }
            Err(error) => {
                assert!(!is_stale);
                self.look(refusal(&error), &expected, false);
            }
            Ok(generation) => {
                assert!(!is_stale && expected.0.is_empty());
                let (_, sums) = expected;
                let over = sums.iter().any(|(limit, others, wanted)| others + wanted > *limit);
                self.depth.relieved += u32::from(over);
                let vm = &mut self.paper.vms[at];
                vm.terms = wanted;
                vm.generation = vm.generation.map(|old| old + 1);
                assert_eq!(generation, vm.generation);
                self.paper.generation += 1;
                self.depth.changed += 1;
            }
        }
    }

    fn set_host(&mut self, host: HostTerms, behind: Option<u64>) {
        let based_on = behind.map(|behind| self.paper.generation.saturating_sub(behind));
        let is_stale = based_on.is_some_and(|based_on| based_on != self.paper.generation);
        match self.real.set_host(based_on, &host) {
            Ok(generation) => {
                assert!(!is_stale);
                self.paper.generation += 1;
                assert_eq!(generation, self.paper.generation);
                self.paper.host = host;
                self.depth.hosts += 1;
            }
            Err(error) => {
                assert!(is_stale && error.kind() == ErrorKind::InvalidState, "{error}");
                self.depth.stale += 1;
            }
        }
    }

    fn drop_consumer(&mut self, at: usize) {
        self.real.drop_consumer(at);
        self.paper.vms.remove(at);
        self.paper.generation += 1;
        self.depth.dropped += 1;
    }

    fn compare(&self) {
        let now = self.real.promises();
        let paper = &self.paper;
        let exact = |of: fn(&VmTerms) -> i128| u64::try_from(paper.sum(None, of)).unwrap_or(u64::MAX);
        assert_eq!((now.generation, now.consumers), (paper.generation, paper.vms.len() as u64));
        assert_eq!(now.memory, exact(|vm| vm.memory.into()));
        assert_eq!(now.entitlement, exact(|vm| vm.entitlement.into()));
        assert_eq!(now.guarantee, exact(promised));
        assert_eq!(now.pinned, exact(|vm| vm.pinned.into()));
        assert_eq!(now.overhead, exact(|vm| vm.overhead.into()));
        assert_eq!(
            (now.vcpus, now.dedicated),
            (exact(|vm| vm.vcpus.into()), exact(|vm| vm.dedicated.into()))
        );
        let pending = paper.vms.iter().any(|vm| vm.generation.is_none() && promised(&vm.terms) > 0);
        assert_eq!(now.pending, pending);
    }
}

fn refusal(error: &Error) -> &Verdict {
    assert_eq!(error.kind(), ErrorKind::Refused, "{error}");
    Verdict::of(error).expect("a refusal carries its verdict")
}
