//! The table's words in every order, and with every value that a reader without the lock may see: an address is found at its own port or not at
//! all, and the accounts of the ports are those of their entries.

use std::sync::Arc;
use std::time::Duration;

use loom::thread;

use super::table::{Learned, Table};
use crate::config::MacAddress;
use crate::sys::sync::check;

crate::models! {
    a_reader_never_finds_another_address_s_port,
    two_that_learn_at_once_leave_the_accounts_right,
    what_is_forgotten_while_others_learn_is_gone,
}

/// When everything was heard first.
const NOW: u64 = 10_000;
/// When it may move.
const LATER: u64 = NOW + 1000;

/// One bucket of eight, in which everything meets.
fn table() -> Arc<Table> {
    Arc::new(Table::new(1, Duration::from_secs(300)))
}

fn mac(n: u8) -> MacAddress {
    MacAddress([2, 0, 0, 0, 0, n])
}

fn learn(table: &Table, n: u8, port: u16, now: u64) -> Learned {
    table.learn((1, mac(n)), (port, 8), now, || true)
}

fn find(table: &Table, n: u8) -> Option<u16> {
    table.find(1, mac(n), LATER)
}

/// Whether each port's account is of what is found there, of the addresses below `all`.
fn is_accounted(table: &Table, all: u8) {
    for port in [1, 2] {
        let there = (0..all).filter(|n| find(table, *n) == Some(port)).count();
        assert_eq!(table.count(port) as usize, there, "port {port}");
    }
}

fn a_reader_never_finds_another_address_s_port() {
    check(1, || {
        let table = table();
        assert_eq!(learn(&table, 1, 1, NOW), Learned::New);
        let writer = table.clone();
        let writer = thread::spawn(move || {
            // Its place is another one's, and its own again.
            writer.forget(1);
            assert_eq!(learn(&writer, 2, 2, NOW), Learned::New);
            writer.forget(2);
            assert_eq!(learn(&writer, 1, 1, NOW), Learned::New);
        });
        let found = find(&table, 1);
        assert!(matches!(found, None | Some(1)), "{found:?}");
        writer.join().unwrap();
        assert_eq!((find(&table, 1), find(&table, 2)), (Some(1), None));
    });
}

fn two_that_learn_at_once_leave_the_accounts_right() {
    check(2, || {
        let table = table();
        learn(&table, 1, 1, NOW);
        let other = table.clone();
        let other = thread::spawn(move || {
            // It moves, since it has not been used for long. (Not while it is used, in this model: loom may take the word before the move for the
            // last one, though the use wrote by a compare-exchange.)
            let moved = learn(&other, 1, 2, LATER);
            assert!(matches!(moved, Learned::Moved | Learned::Later), "{moved:?}");
        });
        let new = learn(&table, 2, 1, LATER);
        assert!(matches!(new, Learned::New | Learned::Later), "{new:?}");
        other.join().unwrap();
        assert!(find(&table, 1).is_some());
        is_accounted(&table, 3);
    });
}

fn what_is_forgotten_while_others_learn_is_gone() {
    check(2, || {
        let table = table();
        learn(&table, 1, 1, NOW);
        let other = table.clone();
        let other = thread::spawn(move || learn(&other, 2, 2, NOW));
        table.forget(1);
        assert_eq!(find(&table, 1), None);
        let learned = other.join().unwrap();
        assert_eq!(find(&table, 2), (learned == Learned::New).then_some(2));
        is_accounted(&table, 3);
    });
}
