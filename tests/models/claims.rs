//! Claims, commitments and returns in every order: the books never hold more than there is, and in the end nothing.

use std::sync::Arc;

use loom::thread;

use crate::budget::{Claim, Headroom, Inventory, Ledger, Provider};
use crate::sys::sync::check;
use crate::units::Bytes;

crate::models! {
    claims_that_race_never_get_more_than_there_is_and_all_is_given_back,
    no_two_have_the_same_core,
    of_two_changes_with_one_generation_one_is_refused,
}

fn ledger(memory: u64, cores: u32) -> Arc<Ledger> {
    let provider = Provider { memory: Inventory::new(memory), swap: 0, vcpus: None, dedicated: 0 };
    Ledger::new(provider, (0..cores).collect())
}

fn claim(memory: u64, dedicated: u64) -> Claim {
    let memory = Bytes(memory);
    Claim { memory, entitlement: memory, guarantee: memory, dedicated, ..Claim::default() }
}

fn is_sound(ledger: &Ledger) {
    let promised = ledger.promised();
    assert!(promised.memory.get() <= 1000 && promised.dedicated <= 2, "{promised:?}");
}

/// Claims, looks, and commits or gives back; whether it was granted.
fn build(ledger: &Arc<Ledger>, wanted: Claim, fails: bool) -> Option<Vec<u32>> {
    let claimed = ledger.claim(wanted, Headroom::default()).ok()?;
    assert!(ledger.is_pending());
    is_sound(ledger);
    let cores = claimed.cores().to_vec();
    if !fails {
        let reservation = claimed.commit();
        let _ = reservation.change(None, Headroom::default(), |claim| claim.memory = Bytes(500));
        is_sound(ledger);
    }
    Some(cores)
}

fn claims_that_race_never_get_more_than_there_is_and_all_is_given_back() {
    check(2, || {
        let ledger = ledger(1000, 2);
        let other = ledger.clone();
        let other = thread::spawn(move || build(&other, claim(600, 1), true));
        let granted = build(&ledger, claim(600, 2), false).is_some();
        assert!(other.join().unwrap().is_some() || granted, "one of them fits");
        let promised = ledger.promised();
        assert_eq!((promised.memory, promised.consumers, promised.dedicated), (Bytes(0), 0, 0));
        assert!(!ledger.is_pending());
        let all = ledger.claim(claim(1000, 2), Headroom::default()).unwrap();
        assert_eq!(all.cores(), [0, 1]);
    });
}

fn no_two_have_the_same_core() {
    check(3, || {
        let ledger = ledger(1000, 2);
        let claims = [1, 2].map(|_| {
            let ledger = ledger.clone();
            thread::spawn(move || ledger.claim(claim(100, 1), Headroom::default()).unwrap())
        });
        let claims = claims.map(|thread| thread.join().unwrap());
        assert_ne!(claims[0].cores(), claims[1].cores());
        assert!(ledger.claim(claim(100, 1), Headroom::default()).is_err(), "there is no third");
    });
}

fn of_two_changes_with_one_generation_one_is_refused() {
    check(3, || {
        let ledger = ledger(1000, 0);
        let held = Arc::new(ledger.claim(claim(100, 0), Headroom::default()).unwrap().commit());
        let changes = [200, 300].map(|memory| {
            let held = held.clone();
            thread::spawn(move || {
                let set = |claim: &mut Claim| claim.memory = Bytes(memory);
                held.change(Some(1), Headroom::default(), set).is_ok().then_some(memory)
            })
        });
        let done: Vec<u64> = changes.into_iter().filter_map(|change| change.join().unwrap()).collect();
        assert_eq!(done.len(), 1);
        assert_eq!((ledger.promised().memory, held.terms().1), (Bytes(done[0]), 2));
    });
}
