//! Puts to the ledger what `service.py` has put to OpenStack Placement, and compares the answers. See `run`.

use std::io::BufRead;
use std::process::ExitCode;

use vmbed::internals::{PlacementInventory, PlacementLedger};

fn inventories(words: &[&str]) -> (PlacementInventory, PlacementInventory) {
    let one = |at: usize, ratio: usize| {
        let number = |i: usize| words[at + i].parse().expect("a number");
        PlacementInventory {
            total: number(0),
            reserved: number(1),
            min_unit: number(2),
            max_unit: number(3),
            step_size: number(4),
            allocation_ratio: words[ratio].parse().expect("a ratio"),
        }
    };
    (one(0, 10), one(5, 11))
}

fn main() -> ExitCode {
    let (mut ledger, mut counts, mut relieved): (Option<PlacementLedger>, [u32; 2], u32) = (None, [0; 2], 0);
    for line in std::io::stdin().lock().lines() {
        let line = line.expect("a line");
        let words: Vec<_> = line.split(' ').collect();
        let accepted = matches!(words[words.len() - 1], "204" | "200");
        let number = |i: usize| words[i].parse::<u64>().expect("a number");
        match words[0] {
            "provider" => ledger = None,
            // Placement refuses what makes no sense before it counts; so does Host::open.
            "inventories" if !accepted => {}
            "inventories" => {
                let (memory, vcpus) = inventories(&words[1..]);
                match &ledger {
                    Some(ledger) => drop(ledger.set_inventories(memory, vcpus).expect("always")),
                    None => ledger = Some(PlacementLedger::new(memory, vcpus)),
                }
            }
            "drop" => ledger.as_mut().expect("a provider").drop_consumer(number(1)),
            word => {
                let ledger = ledger.as_mut().expect("a provider");
                let answer = match word {
                    "claim" => ledger.claim(number(1), number(2), number(3)),
                    "change" => ledger.change(number(1), number(2), number(3), 0).map(drop),
                    "stale" => ledger.change(number(1), number(2), number(3), 1).map(drop),
                    other => panic!("what is '{other}'?"),
                };
                if answer.is_ok() != accepted {
                    eprintln!("Placement's answer to '{line}' is another: {answer:?}");
                    return ExitCode::FAILURE;
                }
                counts[usize::from(accepted)] += 1;
                relieved += u32::from(accepted && word == "change");
            }
        }
    }
    let [refused, accepted] = counts;
    println!(
        "placement: {} claims, {accepted} accepted ({relieved} changes), {refused} refused, as Placement does",
        accepted + refused
    );
    // A service that has died has said nothing.
    if refused > 0 && accepted > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
