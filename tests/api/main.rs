//! The cases of `tests/api-cases` through the Rust API; tests/c.rs runs them through C.
//!
//! One after the other: some count what the process has, and one sets its logger.

use libtest_mimic::{Arguments, Trial};

mod backends;
mod balloon;
mod callbacks;
mod disks;
mod drive;
mod guest;
#[path = "../guests/mod.rs"]
mod guests;
mod life;
mod list;
mod memory;
mod races;
mod reclaim;
#[path = "../guests/rogue.rs"]
mod rogue;
mod sandbox;
mod switch;
mod wiring;

macro_rules! cases {
    ($($module:ident: $($name:ident)*;)*) => {
        const CASES: &[(&str, fn())] = &[$($((stringify!($name), $module::$name)),*),*];
    };
}

cases! {
    life: doorbells_ring guest_and_device events_in_order registers_and_memory every_bad_field_at_once what_is_promised_and_what_is_there data_are_destroyed_once
        log_lines_go_where_they_are_wanted a_probe_says_what_is_missing;
    callbacks: a_device_that_fails_is_the_cause a_callback_that_panics a_callback_stops_its_vm a_callback_frees_its_vm
        a_callback_reenters a_callback_that_blocks other_callbacks_reenter_and_free;
    races: free_races_with_everything handles_from_eight_threads freeing_in_every_order stop_races_with_everything
        a_fork_while_a_vm_runs many_at_once;
    backends: a_card_moves_to_another_network a_disk_of_ones_own a_disk_that_does_not_answer a_network_of_ones_own disks_and_cards_by_descriptor;
    balloon: memory_given_back;
    disks: disks_and_what_is_changed_of_them;
    memory: a_share_of_the_processors memory_of_every_kind memory_that_is_lost;
    sandbox: a_sandbox_for_its_threads;
    reclaim: what_is_done_when_memory_gets_short;
    switch: cards_on_a_switch a_switch_drops_and_says_why;
    wiring: the_hosts_side_of_a_network;
    drive: vcpus_on_the_callers_threads devices_on_the_callers_loop;
}

fn main() {
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    let names: Vec<_> = CASES.iter().map(|(name, _)| *name).collect();
    let mut trials = vec![trial("listed_here_and_there", move || list::compare("rust", &names))];
    trials.extend(CASES.iter().map(|(name, run)| trial(name, run)));
    libtest_mimic::run(&arguments, trials).exit();
}

fn trial(name: &str, run: impl FnOnce() + Send + 'static) -> Trial {
    Trial::test(name, move || {
        run();
        Ok(())
    })
}
