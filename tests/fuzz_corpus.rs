//! The fuzz targets over their committed inputs, without a fuzzer: nothing panics, and the inputs go as
//! deep as they are kept for. `make fuzz` goes on from them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

#[path = "../fuzz/bodies/balloon.rs"]
mod balloon;
#[path = "../fuzz/bodies/bent.rs"]
mod bent;
#[path = "../fuzz/bodies/blk.rs"]
mod blk;
#[path = "../fuzz/bodies/boot.rs"]
mod boot;
#[path = "../fuzz/bodies/bus.rs"]
mod bus;
#[path = "../fuzz/bodies/config.rs"]
mod config;
#[path = "../fuzz/bodies/given.rs"]
mod given;
#[path = "../fuzz/bodies/ioapic.rs"]
mod ioapic;
#[path = "../fuzz/bodies/kernel.rs"]
mod kernel;
#[path = "../fuzz/bodies/landing.rs"]
mod landing;
#[path = "../fuzz/bodies/ledger.rs"]
mod ledger;
#[path = "../fuzz/bodies/legacy.rs"]
mod legacy;
#[path = "../fuzz/bodies/msix.rs"]
mod msix;
#[path = "../fuzz/bodies/net.rs"]
mod net;
#[path = "../fuzz/bodies/pci.rs"]
mod pci;
#[path = "../fuzz/bodies/ports.rs"]
mod ports;
#[path = "../fuzz/bodies/qcow2.rs"]
mod qcow2;
#[path = "../fuzz/bodies/queue.rs"]
mod queue;
#[path = "../fuzz/bodies/rate.rs"]
mod rate;
#[path = "../fuzz/bodies/structures.rs"]
mod structures;
#[path = "../fuzz/bodies/switch.rs"]
mod switch;

type Counters = Vec<(&'static str, u64)>;

/// The files of a folder of `fuzz/`, in order.
fn files(folder: &str) -> Vec<Vec<u8>> {
    let at = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(folder);
    let Ok(entries) = fs::read_dir(&at) else { return Vec::new() };
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// Pseudo-random bytes (xorshift).
fn made_up(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut byte = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    };
    (0..1 + seed * 7 % 1500).map(|_| byte()).collect()
}

/// What the counters of a target's committed inputs add up to: each is above 0, and each of `floors` at least that. Inputs of which something
/// was found once, and those made up on the way (the same at each run), must only end.
fn reached(
    target: &str,
    run: impl Fn(&[u8]) -> Counters,
    floors: &[(&str, u64)],
) -> BTreeMap<&'static str, u64> {
    let kept = files(&format!("corpus/{target}"));
    assert!(kept.len() >= 5, "the corpus of {target} is missing");
    let mut sums = BTreeMap::new();
    for (name, count) in kept.iter().flat_map(|input| run(input)) {
        *sums.entry(name).or_default() += count;
    }
    let unmet: Vec<_> = sums.iter().filter(|(_, sum)| **sum == 0).map(|(name, _)| name).collect();
    assert!(unmet.is_empty(), "{target}: {unmet:?} in {sums:?}");
    for (name, least) in floors {
        assert!(sums[name] >= *least, "{target}: {name} in {sums:?}");
    }
    let found = files(&format!("regressions/{target}"));
    found.iter().for_each(|input| drop(run(input)));
    (1..=300).for_each(|seed| drop(run(&made_up(seed))));
    sums
}

/// Nothing is kept for a target that there is not.
#[test]
fn what_is_kept_is_replayed() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    let package = fs::read_to_string(fuzz.join("Cargo.toml")).unwrap();
    for folder in ["corpus", "regressions"] {
        for entry in fs::read_dir(fuzz.join(folder)).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(package.contains(&format!("\nname = \"{name}\"\npath = ")), "{folder}/{name}");
            let replayed = include_str!("fuzz_corpus.rs").contains(&format!("reached(\"{name}\", "));
            assert!(replayed, "{name} has no test here");
        }
    }
}

#[test]
fn blk_completes_requests() {
    let floors = [("completed", 50), ("read", 5), ("written", 5), ("bytes", 10_000)];
    reached("blk", |input| blk::run(input).counters().to_vec(), &floors);
}

#[test]
fn pci_starts_devices_and_moves_bars() {
    let floors = [("accesses", 200), ("started", 5), ("served", 5), ("moved", 5)];
    reached("pci", |input| pci::run(input).counters().to_vec(), &floors);
}

#[test]
fn kernel_loads_and_refuses() {
    let floors = [("loaded", 5), ("pvh", 2), ("unpacked", 2), ("refused", 9)];
    reached("kernel", |input| kernel::run(input).counters().to_vec(), &floors);
}

#[test]
fn net_receives_and_sends() {
    let floors =
        [("received", 80), ("sent", 80), ("left", 5), ("nonsense", 5), ("left_to_me", 2), ("no_sense", 5)];
    reached("net", |input| net::run(input).counters().to_vec(), &floors);
}

#[test]
fn balloon_gives_pages_back() {
    let floors = [("completed", 120), ("inflated", 120), ("reported", 120), ("hinted", 120)];
    reached("balloon", |input| balloon::run(input).counters().to_vec(), &floors);
}

#[test]
fn ports_answer_read_and_write() {
    let floors = [("all_random", 80), ("all_read", 80), ("all_written", 40), ("said", 8000)];
    reached("ports", |input| ports::run(input).counters().to_vec(), &floors);
}

#[test]
fn legacy_devices_talk_route_and_stop() {
    let floors = [("said", 30), ("read", 800), ("routed", 8)];
    reached("legacy", |input| legacy::run(input).counters().to_vec(), &floors);
}

#[test]
fn buses_find_whom_an_access_is_for() {
    let floors = [("ranges", 5), ("read", 5), ("written", 5)];
    reached("bus", |input| bus::run(input).counters().to_vec(), &floors);
}

#[test]
fn configurations_are_taken_and_refused() {
    let floors = [("valid", 4)];
    reached("config", |input| config::run(input).counters().to_vec(), &floors);
}

#[test]
fn frames_land_in_posted_buffers() {
    let floors = [
        ("given", 200),
        ("sent", 100),
        ("landed", 50),
        ("came", 40),
        ("copied", 20),
        ("several", 20),
        ("handed", 5),
        ("unwanted", 3),
    ];
    reached("landing", |input| landing::run(input).counters().to_vec(), &floors);
}

#[test]
fn switch_carries_tags_and_finishes() {
    let floors = [("came", 200), ("tagged", 30), ("finished", 30), ("refused", 100)];
    reached("switch", |input| switch::run(input).counters().to_vec(), &floors);
}

#[test]
fn qcow2_opens_reads_and_writes() {
    let floors = [("opened", 8)];
    reached("qcow2", |input| qcow2::run(input).counters().to_vec(), &floors);
}

#[test]
fn queues_do_what_they_do_on_paper() {
    let floors = [
        ("taken", 60),
        ("completed", 40),
        ("moved", 4000),
        ("drained", 15),
        ("left", 3),
        ("Size", 5),
        ("AvailAhead", 5),
        ("NotInUse", 20),
        ("Broken", 10),
        ("Short", 30),
    ];
    reached("queue", |input| queue::run(input).counters().to_vec(), &floors);
}

#[test]
fn msix_holds_back_and_delivers() {
    let floors = [("written", 50), ("delivered", 10), ("late", 5), ("masked", 10), ("refused", 15)];
    reached("msix", |input| msix::run(input).counters().to_vec(), &floors);
}

#[test]
fn ioapic_sends_edges_and_levels() {
    let floors = [("written", 60), ("edges", 3), ("levels", 10), ("again", 3), ("lost", 10)];
    reached("ioapic", |input| ioapic::run(input).counters().to_vec(), &floors);
}

#[test]
fn rates_hold_to_the_nanosecond() {
    let floors = [("passed", 40), ("no_bytes", 20), ("no_ops", 5), ("waited", 20), ("filled", 10)];
    reached("rate", |input| rate::run(input).counters().to_vec(), &floors);
}

#[test]
fn ledgers_answer_as_on_paper() {
    let floors = [("claimed", 30), ("changed", 15), ("cores", 10), ("relieved", 5), ("stale", 5)];
    let sums = reached("ledger", |input| ledger::run(input).counters().to_vec(), &floors);
    // Each constraint has refused something.
    assert!(vmbed::Constraint::ALL.iter().all(|constraint| sums[constraint.name()] >= 3), "{sums:?}");
}

#[test]
fn kernels_find_what_they_are_told() {
    let floors = [("cmdline", 1000), ("initrd", 100_000)];
    reached("boot", |input| boot::run(input).counters().to_vec(), &floors);
}

#[test]
fn structures_of_c_cross_as_they_are() {
    let floors = [
        ("disks", 3),
        ("nets", 3),
        ("ports", 3),
        ("hosts", 3),
        ("older", 5),
        ("newer", 5),
        ("sizes", 5),
        ("unknown", 4),
        ("null", 5),
        ("freed", 3),
        ("values", 10),
    ];
    reached("structures", |input| structures::run(input).counters().to_vec(), &floors);
}
