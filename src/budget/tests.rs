#![forbid(unsafe_code)]
//! The ledger's own cases, and claims in any order against a ledger that is simple and slow.

use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;

fn provider(total: u64, reserved: u64, ratio: f64) -> Provider {
    let memory = Inventory { reserved, ratio, ..Inventory::new(total) };
    let vcpus = Some(Inventory { ratio: 4.0, ..Inventory::new(2) });
    Provider { memory, swap: 0, vcpus, dedicated: 0 }
}

fn ledger(total: u64, reserved: u64, ratio: f64) -> Arc<Ledger> {
    Ledger::new(provider(total, reserved, ratio), BTreeSet::new())
}

fn claim(memory: u64, vcpus: u64) -> Claim {
    Claim { memory: Bytes(memory), entitlement: Bytes(memory), vcpus, victim: Some(0), ..Claim::default() }
}

fn plenty() -> Headroom {
    Headroom::default()
}

fn refused(result: Result<Claimed>) -> Verdict {
    let error = result.err().expect("the ledger must refuse");
    assert_eq!(error.kind(), ErrorKind::Refused);
    let verdict = Verdict::of(&error).expect("a refusal carries its verdict").clone();
    let binding = verdict.binding.expect("a refusal names its constraint");
    assert!(error.to_string().contains(binding.name()), "{error}");
    let names: Vec<_> = error.fields().iter().map(|f| f.field.as_str()).collect();
    assert_eq!(names, Constraint::ALL.map(Constraint::name), "and the slack on each");
    verdict
}

#[test]
fn claims_fit_to_the_byte_and_are_given_back() {
    let ledger = ledger(1000, 100, 1.5);
    let first = ledger.claim(claim(1000, 1), plenty()).unwrap().commit();
    let verdict = refused(ledger.claim(claim(351, 1), plenty()));
    assert_eq!(verdict.binding, Some(Constraint::Nominal));
    assert_eq!(verdict.slack(Constraint::Nominal).left, -1);
    assert_eq!(verdict.slack(Constraint::Vcpus).left, 6);
    let second = ledger.claim(claim(350, 1), plenty()).unwrap();
    assert_eq!(second.verdict().slack(Constraint::Nominal).left, 0);
    assert_eq!(ledger.promised().memory, Bytes(1350));
    drop((first, second));
    let promised = ledger.promised();
    assert_eq!((promised.memory, promised.vcpus, promised.consumers), (Bytes(0), 0, 0));
}

#[test]
fn a_refused_claim_books_nothing() {
    let ledger = ledger(1000, 0, 1.0);
    assert_eq!(refused(ledger.claim(claim(1, 9), plenty())).binding, Some(Constraint::Vcpus));
    refused(ledger.claim(claim(u64::MAX, 1), plenty()));
    assert_eq!((ledger.promised().memory, ledger.promised().generation), (Bytes(0), 0));
    let _all = ledger.claim(claim(1000, 8), plenty()).unwrap();
    refused(ledger.claim(claim(u64::MAX, 0), plenty()));
}

#[test]
fn shares_that_make_no_sense_give_nothing() {
    for (total, reserved, ratio) in
        [(10, 20, 1.0), (10, 0, f64::NAN), (10, 0, -1.0), (10, 0, 0.0), (0, 0, f64::INFINITY)]
    {
        let verdict = refused(ledger(total, reserved, ratio).claim(claim(1, 1), plenty()));
        assert_eq!(verdict.binding, Some(Constraint::Nominal), "{total} {reserved} {ratio}");
    }
    let endless = ledger(u64::MAX, 0, f64::MAX);
    let verdict = endless.judge(&claim(u64::MAX, 1), plenty());
    assert_eq!((verdict.binding, verdict.slack(Constraint::Nominal).left), (None, i64::MAX));
}

#[test]
fn unit_rules_are_kept() {
    let memory = Inventory { min_unit: 100, max_unit: 1000, step_size: 50, ..Inventory::new(10_000) };
    let ledger = Ledger::new(Provider { memory, ..provider(0, 0, 1.0) }, BTreeSet::new());
    for (wanted, left) in [(50, -50), (1050, -50), (120, -20), (100, 0), (1000, 0)] {
        let verdict = ledger.judge(&claim(wanted, 1), plenty());
        assert_eq!(verdict.slack(Constraint::MemoryUnits).left, left, "{wanted}");
        assert_eq!(verdict.binding.is_some(), left < 0, "{wanted}");
    }
}

#[test]
fn the_worked_example_of_the_issue() {
    let shares = provider(24_105 * MIB, 512 * MIB, 4.0);
    let ledger = Ledger::new(Provider { vcpus: None, ..shares }, BTreeSet::new());
    let victims = claim(1024 * MIB, 1);
    let held: Vec<_> = (0..92).map(|_| ledger.claim(victims, plenty()).unwrap().commit()).collect();
    assert_eq!(refused(ledger.claim(victims, plenty())).binding, Some(Constraint::Nominal));
    drop(held);
    let solvent = Claim { victim: None, ..victims };
    let held: Vec<_> = (0..).map_while(|_| ledger.claim(solvent, plenty()).ok()).collect();
    assert_eq!(held.len(), 23);
    assert_eq!(refused(ledger.claim(solvent, plenty())).binding, Some(Constraint::Solvency));
}

#[test]
fn guarantees_are_never_overcommitted() {
    let ledger = ledger(1000, 0, 8.0);
    let wanted = Claim { guarantee: Bytes(300), pinned: Bytes(350), overhead: Bytes(50), ..claim(1000, 1) };
    let _two = [(); 2].map(|()| ledger.claim(wanted, plenty()).unwrap());
    let verdict = refused(ledger.claim(wanted, plenty()));
    assert_eq!(verdict.binding, Some(Constraint::Guarantee));
    assert_eq!(verdict.slack(Constraint::Guarantee).left, -200);
}

#[test]
fn free_memory_covers_the_newcomers_of_one_moment() {
    let ledger = ledger(1000, 0, 8.0);
    let now = Headroom { free: Some(500), needed: 100 };
    let wanted = Claim { guarantee: Bytes(200), ..claim(200, 1) };
    let first = ledger.claim(wanted, now).unwrap();
    let second = ledger.claim(wanted, now).unwrap();
    assert_eq!(
        refused(ledger.claim(claim(10, 0), Headroom { free: Some(90), ..now })).binding,
        Some(Constraint::Headroom)
    );
    assert_eq!(refused(ledger.claim(wanted, now)).binding, Some(Constraint::Headroom));
    // Committed, they are in what is measured.
    let (_first, _second) = (first.commit(), second.commit());
    ledger.claim(wanted, now).unwrap();
    ledger.claim(Claim { guarantee: Bytes(u64::MAX), ..wanted }, now).err().unwrap();
}

#[test]
fn a_change_that_does_not_worsen_always_passes() {
    let books = ledger(1000, 0, 1.0);
    let wanted = Claim { guarantee: Bytes(600), ..claim(800, 4) };
    let vm = books.claim(wanted, plenty()).unwrap().commit();
    // Memory is taken out of the machine.
    assert_eq!(books.set_provider(None, provider(500, 100, 1.0), BTreeSet::new()).unwrap(), 2);
    let none_free = Headroom { free: Some(0), needed: 1 << 40 };
    assert_eq!(vm.change(Some(1), none_free, |c| c.guarantee = Bytes(500)).unwrap(), 2);
    assert_eq!(vm.change(Some(2), none_free, |_| ()).unwrap(), 3, "not even no change");
    let error = vm.change(Some(3), plenty(), |c| c.guarantee = Bytes(501)).unwrap_err();
    assert_eq!(Verdict::of(&error).unwrap().binding, Some(Constraint::Guarantee));
    assert_eq!(vm.terms().0.guarantee, Bytes(500));
}

#[test]
fn a_stale_generation_changes_nothing() {
    let ledger = ledger(1000, 0, 1.0);
    let vm = ledger.claim(claim(10, 1), plenty()).unwrap().commit();
    assert_eq!(vm.change(Some(1), plenty(), |c| c.guarantee = Bytes(5)).unwrap(), 2);
    let error = vm.change(Some(1), plenty(), |c| c.guarantee = Bytes(6)).unwrap_err();
    assert_eq!((error.kind(), vm.terms().1), (ErrorKind::InvalidState, 2));
    let before = ledger.promised().generation;
    assert!(ledger.set_provider(Some(before - 1), provider(1, 0, 1.0), BTreeSet::new()).is_err());
    assert_eq!(ledger.set_provider(Some(before), provider(1, 0, 1.0), BTreeSet::new()).unwrap(), before + 1);
}

#[test]
fn dedicated_vcpus_have_a_core_each() {
    let ledger = Ledger::new(provider(1000, 0, 1.0), BTreeSet::from([3, 5, 6]));
    let wanted = |dedicated| Claim { dedicated, ..claim(1, 0) };
    let two = ledger.claim(wanted(2), plenty()).unwrap();
    assert_eq!(two.cores(), [3, 5]);
    let verdict = refused(ledger.claim(wanted(2), plenty()));
    assert_eq!(verdict.binding, Some(Constraint::DedicatedVcpus));
    let one = ledger.claim(wanted(1), plenty()).unwrap();
    assert_eq!(one.cores(), [6]);
    let _one = one.commit();
    drop(two.commit());
    assert_eq!(ledger.claim(wanted(1), plenty()).unwrap().cores(), [3]);
}

#[test]
fn overhead_grows_with_what_a_vm_has() {
    let shape = Shape { memory: Bytes::gib(1), vcpus: 1, threads: 2, rings: 1, nested_paging: true };
    let small = overhead(shape);
    assert!(
        (Bytes::mib(6)..Bytes::mib(8)).contains(&small),
        "{small}: tables are 4 MiB of it, the index 2 MiB"
    );
    let shadow = overhead(Shape { nested_paging: false, ..shape });
    assert!(shadow > small, "{shadow}: KVM keeps tables of its own");
    assert!(overhead(Shape { vcpus: 2, ..shape }) > small);
    assert!(overhead(Shape { rings: 2, ..shape }) > small);
    let all = u64::MAX;
    let huge = Shape { memory: Bytes(all), vcpus: all, threads: all, rings: all, nested_paging: false };
    assert!(overhead(huge) > Bytes::gib(1 << 20), "saturates");
}

/// The page is in the repository and in the package.
fn page() -> String {
    std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/overcommit.md")).unwrap()
}

#[test]
#[cfg_attr(miri, ignore = "hundreds of claims, of which the issue's example has enough")]
fn the_pages_example_has_the_right_numbers() {
    let page = page();
    let shape = Shape { memory: Bytes::gib(1), vcpus: 1, threads: 2, rings: 1, nested_paging: true };
    let overhead = overhead(shape);
    assert!(page.contains(&format!("another {} KiB at most", overhead.get() >> 10)), "{overhead}");
    let shares =
        |ratio, swap| Provider { swap: swap * MIB, vcpus: None, ..provider(24_105 * MIB, 512 * MIB, ratio) };
    let usable = shares(1.0, 0).memory.usable() / MIB;
    let capacity = shares(4.0, 0).memory.capacity() / u128::from(MIB);
    let touched = 23 * (1024 * MIB + overhead.get()) / MIB;
    for number in [usable.to_string(), capacity.to_string(), touched.to_string()] {
        assert!(page.contains(&format!("{number} MiB")), "{number}");
    }
    let rows: Vec<Vec<&str>> = page
        .lines()
        .skip_while(|l| !l.starts_with("| ratio |"))
        .skip(2)
        .take_while(|l| l.starts_with('|'))
        .map(|l| l.trim_matches('|').split('|').map(str::trim).collect())
        .collect();
    assert_eq!(rows.len(), 5);
    for row in rows {
        let number = |i: usize| row[i].parse::<u64>().unwrap();
        let ledger = Ledger::new(shares(row[0].parse().unwrap(), number(1)), BTreeSet::new());
        let wanted = Claim {
            guarantee: Bytes(number(2) * MIB),
            overhead,
            victim: (row[3] == "yes").then_some(0),
            ..claim(1024 * MIB, 1)
        };
        let held: Vec<_> = (0..).map_while(|_| ledger.claim(wanted, plenty()).ok()).collect();
        let binding = refused(ledger.claim(wanted, plenty())).binding.unwrap();
        assert_eq!((held.len() as u64, binding.name()), (number(4), row[5]), "{row:?}");
    }
    let shared = Inventory { ratio: 4.0, ..Inventory::new(16 - 2) };
    assert!(page.contains(&format!("there are {} shared vCPUs and 2 dedicated", shared.capacity())));
}

/// What a step of a random history does.
#[derive(Clone, Debug)]
enum Step {
    Claim(Claim, Headroom),
    Commit(usize),
    Drop(usize),
    Change(usize, Claim, Headroom),
    Provider(Provider, BTreeSet<u32>),
}

/// Amounts that often just fit, and some that no machine has.
fn amount() -> impl Strategy<Value = u64> {
    prop_oneof![8 => 0u64..60, 2 => 60u64..400, 1 => Just(u64::MAX), 1 => Just(u64::MAX - 7)]
}

prop_compose! {
    fn claims()(
        sizes in (amount(), amount(), amount()), small in (0u64..5, 0u64..4, 0u64..3),
        kind in any::<(bool, bool)>()
    ) -> Claim {
        let ((memory, guarantee, entitlement), (overhead, vcpus, dedicated)) = (sizes, small);
        Claim {
            memory: Bytes(memory),
            guarantee: Bytes(guarantee),
            entitlement: Bytes(entitlement),
            overhead: Bytes(overhead),
            pinned: Bytes(if kind.0 { guarantee / 2 + 3 } else { 0 }),
            victim: kind.1.then_some(1),
            vcpus,
            dedicated,
        }
    }
}

prop_compose! {
    fn providers()(
        total in amount(), reserved in 0u64..80, ratio in prop_oneof![
            Just(1.0), Just(0.0), Just(f64::NAN), Just(-3.5), Just(1e300), 0.01f64..9.0
        ],
        units in (0u64..4, 40u64..500, 0u64..4), swap in 0u64..50, vcpus in proptest::option::of((0u64..9, 0.1f64..5.0)),
        cores in proptest::collection::btree_set(0u32..6, 0..5)
    ) -> (Provider, BTreeSet<u32>) {
        let (min_unit, max_unit, step_size) = units;
        let memory = Inventory { total, reserved, ratio, min_unit, max_unit, step_size };
        let vcpus = vcpus.map(|(total, ratio)| Inventory { ratio, max_unit: 3, ..Inventory::new(total) });
        (Provider { memory, swap, vcpus, dedicated: 99 }, cores)
    }
}

fn headrooms() -> impl Strategy<Value = Headroom> {
    (proptest::option::of(amount()), 0u64..50).prop_map(|(free, needed)| Headroom { free, needed })
}

fn steps() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (claims(), headrooms()).prop_map(|(c, h)| Step::Claim(c, h)),
        2 => any::<usize>().prop_map(Step::Commit),
        2 => any::<usize>().prop_map(Step::Drop),
        3 => (any::<usize>(), claims(), headrooms()).prop_map(|(i, c, h)| Step::Change(i, c, h)),
        1 => providers().prop_map(|(p, c)| Step::Provider(p, c)),
    ]
}

/// A ledger as one would write it on paper: a list of who has what, added up anew for every question.
struct Naive {
    provider: Provider,
    cores: usize,
    /// And whether it is committed.
    list: Vec<(Claim, bool)>,
}

impl Naive {
    fn sum(&self, of: impl Fn(&Claim) -> i128) -> i128 {
        self.list.iter().map(|(claim, _)| of(claim)).sum()
    }

    /// The first rule that `list` breaks once `index` (one past the end: a newcomer) is `new`.
    fn judge(&self, index: usize, new: &Claim, headroom: Headroom) -> Option<Constraint> {
        let old = self.list.get(index).map(|(claim, _)| *claim);
        let mut after = Self { list: self.list.clone(), ..*self };
        match after.list.get_mut(index) {
            Some(entry) => entry.0 = *new,
            None => after.list.push((*new, false)),
        }
        let b = |bytes: Bytes| i128::from(bytes.get());
        let grows = |of: &dyn Fn(&Claim) -> i128, limit: i128| {
            let sum = after.sum(of);
            sum > limit && sum > self.sum(of)
        };
        let scaled = |i: &Inventory| {
            let product = i.total.saturating_sub(i.reserved) as f64 * i.ratio;
            if product.is_nan() || product < 0.0 { 0 } else { product.min(1e30).floor() as i128 }
        };
        let rules = |i: &Inventory, n: u64, had: u64| {
            n != had && (n < i.min_unit || n > i.max_unit || !n.is_multiple_of(i.step_size.max(1)))
        };
        let p = &self.provider;
        let had = old.unwrap_or_default();
        let usable = i128::from(p.memory.total.saturating_sub(p.memory.reserved));
        let kept = |c: &Claim| b(c.guarantee).max(b(c.pinned)) + b(c.overhead);
        let promised = |c: &Claim| b(c.guarantee).max(b(c.pinned));
        let waiting: i128 = self.list.iter().filter(|(_, done)| !done).map(|(c, _)| promised(c)).sum();
        let extra = (promised(new) - promised(&had)).max(0);
        let short = headroom
            .free
            .is_some_and(|free| i128::from(free) < waiting + i128::from(headroom.needed) + extra);
        let broken = [
            rules(&p.memory, new.memory.get(), had.memory.get()),
            p.vcpus.is_some_and(|v| rules(&v, new.vcpus, had.vcpus)),
            grows(&|c| b(c.memory), scaled(&p.memory)),
            grows(&kept, usable),
            new.victim.is_none() && grows(&|c| b(c.entitlement) + b(c.overhead), usable + i128::from(p.swap)),
            short && (old.is_none() || extra > 0),
            p.vcpus.is_some_and(|v| grows(&|c| c.vcpus.into(), scaled(&v))),
            grows(&|c| c.dedicated.into(), self.cores as i128),
        ];
        broken.iter().position(|b| *b).map(|i| Constraint::ALL[i])
    }
}

/// A consumer of the real ledger.
enum Consumer {
    Claimed(Box<Claimed>),
    Reserved(Reservation),
}

fn binding<T>(result: &Result<T>) -> Option<Constraint> {
    result.as_ref().err().map(|e| Verdict::of(e).expect("a refusal").binding.expect("by a constraint"))
}

fn step(real: &Arc<Ledger>, consumers: &mut Vec<Consumer>, naive: &mut Naive, step: Step) {
    let place = |index: usize, len: usize| (len > 0).then(|| index % len);
    match step {
        Step::Claim(claim, headroom) => {
            let expected = naive.judge(naive.list.len(), &claim, headroom);
            let answer = real.claim(claim, headroom);
            assert_eq!(binding(&answer), expected);
            if let Ok(claimed) = answer {
                consumers.push(Consumer::Claimed(Box::new(claimed)));
                naive.list.push((claim, false));
            }
        }
        Step::Commit(index) => {
            let Some(at) = place(index, consumers.len()) else { return };
            let reserved = match consumers.swap_remove(at) {
                Consumer::Claimed(claimed) => Consumer::Reserved((*claimed).commit()),
                reserved => reserved,
            };
            consumers.push(reserved);
            let (claim, _) = naive.list.swap_remove(at);
            naive.list.push((claim, true));
        }
        Step::Drop(index) => {
            let Some(at) = place(index, consumers.len()) else { return };
            consumers.swap_remove(at);
            naive.list.swap_remove(at);
        }
        Step::Change(index, wanted, headroom) => {
            let Some(at) = place(index, consumers.len()) else { return };
            let Consumer::Reserved(reservation) = &consumers[at] else { return };
            let wanted = Claim { dedicated: naive.list[at].0.dedicated, ..wanted };
            let expected = naive.judge(at, &wanted, headroom);
            let answer = reservation.change(None, headroom, |claim| *claim = wanted);
            assert_eq!(binding(&answer), expected);
            if answer.is_ok() {
                naive.list[at].0 = wanted;
            }
        }
        Step::Provider(provider, cores) => {
            (naive.provider, naive.cores) = (provider, cores.len());
            real.set_provider(None, provider, cores).unwrap();
        }
    }
}

proptest! {
    // Miri takes a thousand times as long.
    #![proptest_config(ProptestConfig {
        cases: if cfg!(miri) { 4 } else { 2000 }, failure_persistence: None, ..ProptestConfig::default()
    })]

    #[test]
    fn any_history_is_judged_as_on_paper(
        (first, cores) in providers(), history in proptest::collection::vec(steps(), 1..40)
    ) {
        let mut naive = Naive { provider: first, cores: cores.len(), list: Vec::new() };
        let real = Ledger::new(first, cores);
        let mut consumers = Vec::new();
        for one in history {
            step(&real, &mut consumers, &mut naive, one);
            let promised = real.promised();
            let exact = |of: fn(&Claim) -> u64| {
                u64::try_from(naive.sum(|c| of(c).into())).unwrap_or(u64::MAX)
            };
            assert_eq!(promised.consumers, naive.list.len() as u64);
            assert_eq!(promised.memory.get(), exact(|c| c.memory.get()));
            assert_eq!(promised.guarantee.get(), exact(|c| c.guarantee.max(c.pinned).get()));
            assert_eq!(promised.pinned.get(), exact(|c| c.pinned.get()));
            assert_eq!(promised.overhead.get(), exact(|c| c.overhead.get()));
            assert_eq!((promised.vcpus, promised.dedicated), (exact(|c| c.vcpus), exact(|c| c.dedicated)));
        }
        drop(consumers);
        let Promised { consumers, memory, guarantee, vcpus, dedicated, .. } = real.promised();
        prop_assert_eq!((consumers, memory, guarantee, vcpus, dedicated), (0, Bytes(0), Bytes(0), 0, 0));
    }
}
