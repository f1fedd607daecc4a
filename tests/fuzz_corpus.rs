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

/// The committed inputs of a target, and as many made up on the way (the same at each run).
fn inputs(target: &str) -> (Vec<Vec<u8>>, Vec<Vec<u8>>) {
    let at = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut paths: Vec<_> = fs::read_dir(&at).unwrap().map(|e| e.unwrap().path()).collect();
    paths.sort();
    let kept: Vec<_> = paths.iter().map(|p| fs::read(p).unwrap()).collect();
    assert!(kept.len() >= 5, "the corpus of {target} is missing");
    (kept, (1..=300).map(made_up).collect())
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

/// What the counters of a target's committed inputs add up to, each of them above 0; those made up must only end.
fn reached(target: &str, run: impl Fn(&[u8]) -> Vec<(&'static str, u64)>) -> BTreeMap<&'static str, u64> {
    let (kept, more) = inputs(target);
    let mut sums = BTreeMap::new();
    for (name, count) in kept.iter().flat_map(|input| run(input)) {
        *sums.entry(name).or_default() += count;
    }
    assert!(sums.values().all(|sum| *sum > 0), "{target}: {sums:?}");
    for input in &more {
        run(input);
    }
    sums
}

/// Whether these counters have at least so much.
fn at_least(sums: &BTreeMap<&'static str, u64>, floors: &[(&str, u64)]) {
    for (name, least) in floors {
        assert!(sums[name] >= *least, "{name}: {sums:?}");
    }
}

#[test]
fn blk_completes_requests() {
    let (kept, more) = inputs("blk");
    for input in &kept {
        let depth = blk::run(input);
        assert!(depth.completed >= 10 && depth.succeeded >= 3, "{depth:?}");
        assert!(depth.failed >= 1 && depth.unsupported >= 1, "{depth:?}");
    }
    let all: Vec<_> = kept.iter().chain(&more).map(|i| blk::run(i)).collect();
    assert!(all.iter().map(|d| d.resets).sum::<u32>() > 100, "rings were broken");
    assert!(all.iter().map(|d| d.completed).sum::<u32>() > 2000);
    assert!(all.iter().map(|d| d.mute).sum::<u32>() > 20, "some have no place for a status");
}

#[test]
fn pci_starts_devices_and_moves_bars() {
    let (kept, more) = inputs("pci");
    for input in &kept {
        let depth = pci::run(input);
        assert!(depth.accesses >= 40 && depth.started >= 1 && depth.served >= 1, "{depth:?}");
        assert!(depth.moved >= 1, "{depth:?}");
    }
    for input in &more {
        pci::run(input);
    }
}

#[test]
fn kernel_loads_and_refuses() {
    // Each reason to refuse one is met.
    let sums = reached("kernel", |input| kernel::run(input).counters());
    at_least(&sums, &[("loaded", 5), ("pvh", 2), ("unpacked", 2), ("refused", 9)]);
}

#[test]
fn net_receives_and_sends() {
    let (kept, more) = inputs("net");
    for input in &kept {
        let depth = net::run(input);
        assert!(depth.received >= 10 && depth.sent >= 10 && depth.taken > depth.sent, "{depth:?}");
    }
    let all: Vec<_> = kept.iter().chain(&more).map(|i| net::run(i)).collect();
    assert!(all.iter().map(|d| d.resets).sum::<u32>() > 100, "rings were broken");
}

#[test]
fn balloon_gives_pages_back() {
    let (kept, more) = inputs("balloon");
    for input in &kept {
        let depth = balloon::run(input);
        assert!(depth.completed >= 20 && depth.inflated >= 20 && depth.reported >= 20, "{depth:?}");
        assert!(depth.hinted >= 20 && depth.ignored > 0, "{depth:?}");
    }
    let all: Vec<_> = kept.iter().chain(&more).map(|i| balloon::run(i)).collect();
    assert!(all.iter().map(|d| d.resets).sum::<u32>() > 100, "rings were broken");
    assert!(all.iter().map(|d| d.hinted).sum::<u64>() > 50, "hints were taken");
    assert!(all.iter().map(|d| d.ignored).sum::<u64>() > 50, "nonsense was met");
}

#[test]
fn ports_answer_read_and_write() {
    let (kept, more) = inputs("ports");
    for input in &kept {
        let depth = ports::run(input);
        assert!(depth.random >= 10 && depth.read >= 10 && depth.written >= 5, "{depth:?}");
        assert!(depth.no_random >= 1 && depth.said > 1000, "{depth:?}");
    }
    let all: Vec<_> = kept.iter().chain(&more).map(|i| ports::run(i)).collect();
    assert!(all.iter().map(|d| d.no_input).sum::<u32>() > 20, "buffers without room");
    assert!(all.iter().map(|d| d.resets).sum::<u32>() > 100, "rings were broken");
}

#[test]
fn legacy_devices_talk_route_and_stop() {
    let (kept, more) = inputs("legacy");
    for input in &kept {
        let depth = legacy::run(input);
        assert!(depth.said >= 4 && depth.read >= 100 && depth.stops >= 1 && depth.routed >= 1, "{depth:?}");
    }
    for input in &more {
        legacy::run(input);
    }
}

#[test]
fn configurations_are_taken_and_refused() {
    let (kept, more) = inputs("config");
    let all: Vec<_> = kept.iter().chain(&more).map(|i| config::run(i)).collect();
    assert!(all[..kept.len()].iter().filter(|d| d.valid).count() >= 4);
    assert!(
        all[..kept.len()].iter().any(|d| d.bad_fields >= 8) && all[..kept.len()].iter().any(|d| d.refused)
    );
    assert!(all.iter().filter(|d| d.parsed).count() > 50);
}

#[test]
fn frames_land_in_posted_buffers() {
    let sums = reached("landing", |input| landing::run(input).counters().to_vec());
    at_least(&sums, &[("given", 200), ("sent", 100), ("landed", 50), ("came", 40), ("copied", 20)]);
    at_least(&sums, &[("several", 20), ("handed", 5), ("unwanted", 3)]);
}

#[test]
fn switch_carries_tags_and_finishes() {
    let sums = reached("switch", |input| switch::run(input).counters());
    at_least(&sums, &[("came", 200), ("tagged", 30), ("finished", 30), ("refused", 100)]);
}

#[test]
fn qcow2_opens_reads_and_writes() {
    let (kept, more) = inputs("qcow2");
    let all: Vec<_> = kept.iter().chain(&more).map(|i| qcow2::run(i)).collect();
    let sum = |of: fn(&qcow2::Depth) -> u32| all.iter().map(of).sum::<u32>();
    let reached =
        [sum(|d| d.opened), sum(|d| d.refused), sum(|d| d.read), sum(|d| d.written), sum(|d| d.cleared)];
    assert!(reached.iter().zip([100, 30, 300, 150, 50]).all(|(sum, least)| *sum >= least), "{reached:?}");
    assert!(sum(|d| d.failed) >= 100);
}

#[test]
fn queues_do_what_they_do_on_paper() {
    let sums = reached("queue", |input| queue::run(input).counters());
    at_least(&sums, &[("taken", 60), ("completed", 40), ("moved", 4000), ("drained", 15), ("left", 3)]);
    at_least(&sums, &[("Size", 5), ("AvailAhead", 5), ("NotInUse", 20), ("Broken", 10), ("Short", 30)]);
}

#[test]
fn msix_holds_back_and_delivers() {
    let sums = reached("msix", |input| msix::run(input).counters());
    at_least(&sums, &[("written", 50), ("delivered", 10), ("late", 5), ("masked", 10), ("refused", 15)]);
}

#[test]
fn ioapic_sends_edges_and_levels() {
    let sums = reached("ioapic", |input| ioapic::run(input).counters());
    at_least(&sums, &[("written", 60), ("edges", 3), ("levels", 10), ("again", 3), ("lost", 10)]);
}

#[test]
fn rates_hold_to_the_nanosecond() {
    let sums = reached("rate", |input| rate::run(input).counters());
    at_least(&sums, &[("passed", 40), ("no_bytes", 20), ("no_ops", 5), ("waited", 20), ("filled", 10)]);
}

#[test]
fn ledgers_answer_as_on_paper() {
    let sums = reached("ledger", |input| ledger::run(input).counters());
    at_least(&sums, &[("claimed", 30), ("changed", 15), ("cores", 10), ("relieved", 5), ("stale", 5)]);
    // Each constraint has refused something.
    assert!(vmbed::Constraint::ALL.iter().all(|constraint| sums[constraint.name()] >= 3), "{sums:?}");
}

#[test]
fn kernels_find_what_they_are_told() {
    let sums = reached("boot", |input| boot::run(input).counters());
    at_least(&sums, &[("cmdline", 1000), ("initrd", 100_000)]);
}

#[test]
fn structures_of_c_cross_as_they_are() {
    let sums = reached("structures", |input| structures::run(input).counters());
    at_least(&sums, &[("disks", 3), ("nets", 3), ("ports", 3), ("hosts", 3), ("older", 5), ("newer", 5)]);
    at_least(&sums, &[("sizes", 5), ("unknown", 4), ("null", 5), ("freed", 3), ("values", 10)]);
}
