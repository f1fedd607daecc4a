//! Memory that a stock kernel gives back: through its balloon, by reporting, by hints.

use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use vmbed::{BalloonConfig, Bytes, EventKind, Host, ReclaimConfig, ReclaimSandbox, ReclaimStage, VmConfig};

use crate::assets::KERNELS;
use crate::guest::{Guest, LONG, config};
use crate::trial;

pub fn add(trials: &mut Vec<Trial>) {
    trials.push(trial("balloon::inflated_memory_is_free_and_comes_back", inflate));
    trials.push(trial("balloon::free_pages_are_reported_and_hinted", free_pages));
    trials.push(trial("balloon::a_host_short_of_memory_takes_three_quarters", short));
    trials.push(trial("balloon::a_guest_out_of_memory_takes_it_back", out_of_memory));
}

/// A guest of 256 MiB that has filled 120 MiB and freed them again when it says so.
pub fn filled(balloon: BalloonConfig, then: &str) -> VmConfig {
    filled_by(balloon, "size=250m", then)
}

/// The same, of a tmpfs with those options.
pub fn filled_by(balloon: BalloonConfig, options: &str, then: &str) -> VmConfig {
    let script = format!(
        "mkdir -p /mnt; mount -t tmpfs -o {options} none /mnt
        dd if=/dev/urandom of=/mnt/fill bs=1M count=120 2>/dev/null
        rm /mnt/fill; echo 3 >/proc/sys/vm/drop_caches
        echo now=freed
        {then}"
    );
    let mut config = config(KERNELS[0], &script);
    config.memory = Bytes::mib(256);
    config.balloon = Some(balloon);
    config
}

pub fn wait_until(guest: &Guest, what: &str, done: impl Fn(&Guest) -> bool) {
    let end = Instant::now() + LONG;
    while !done(guest) {
        let statistics = guest.vm.balloon_statistics();
        assert!(Instant::now() < end, "waited {LONG:?} for {what}: {statistics:?}\n{}", guest.console());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn mib(bytes: Bytes) -> u64 {
    bytes.get() >> 20
}

fn inflate() {
    let mut off = BalloonConfig::default();
    (off.reporting, off.deflate_on_oom) = (false, false);
    let guest = Guest::start(filled(
        off,
        "read go
        echo total=$(awk '/MemTotal/ {print $2}' /proc/meminfo)
        read go
        dd if=/dev/urandom of=/mnt/again bs=1M count=120 2>/dev/null && echo again=$(wc -c </mnt/again)",
    ));
    guest.wait_for("now=freed");
    let (vm, before) = (&guest.vm, guest.vm.memory());
    assert!(mib(before.backing) > 140, "{before:?}");
    let account = vm.guest_memory(LONG).unwrap();
    let total = account.total.unwrap();
    assert!((200..256).contains(&mib(total)) && account.free.unwrap() < total, "{account:?}");
    vm.set_balloon(Bytes::mib(130)).unwrap();
    wait_until(&guest, "the balloon to be full", |g| g.vm.memory().loaned == Bytes::mib(130));
    let (after, statistics) = (vm.memory(), vm.balloon_statistics().unwrap());
    assert_eq!(statistics.inflated.claimed, Bytes::mib(130));
    // The 120 MiB that were touched are among the 130; the guest needs some for itself meanwhile.
    let given = before.backing.get() - after.backing.get();
    assert!(given >> 20 > 100 && mib(statistics.inflated.measured) > 105, "{given} {statistics:?}");
    let less = vm.guest_memory(LONG).unwrap();
    assert_eq!(mib(total) - mib(less.total.unwrap()), 130, "the guest says the same: {less:?}");
    vm.console_input(b"go\n");
    guest.wait_for("total=");
    assert!(guest.value("total").parse::<u64>().unwrap() >> 10 < 130);
    vm.set_balloon(Bytes(0)).unwrap();
    wait_until(&guest, "the balloon to be empty", |g| g.vm.memory().loaned == Bytes(0));
    assert_eq!(vm.balloon_statistics().unwrap().deflated, Bytes::mib(130));
    let events: Vec<_> = std::iter::from_fn(|| vm.events().next_event()).map(|e| e.kind).collect();
    assert!(events.contains(&EventKind::Balloon { target: Bytes(0), actual: Bytes(0) }), "{events:?}");
    vm.console_input(b"go\n");
    guest.wait_for("again=");
    assert_eq!(guest.value("again"), "125829120");
    assert_eq!(vm.wait_timeout(LONG).unwrap(), Some(vmbed::StopCause::GuestPoweroff));
}

fn free_pages() {
    let mut all = BalloonConfig::default();
    all.hinting = true;
    let guest = Guest::start(filled(
        all,
        "read go; dd if=/dev/urandom of=/mnt/fill bs=1M count=60 2>/dev/null; rm /mnt/fill; echo more=freed; read go",
    ));
    guest.wait_for("now=freed");
    wait_until(&guest, "100 MiB to be reported", |g| {
        mib(g.vm.balloon_statistics().unwrap().reported.measured) > 100
    });
    let vm = &guest.vm;
    assert!(mib(vm.memory().backing) < 120, "{:?}", vm.memory());
    vm.console_input(b"go\n");
    guest.wait_for("more=freed");
    let backing = vm.memory().backing;
    let got = vm.discard_free_pages(LONG).unwrap();
    let statistics = vm.balloon_statistics().unwrap();
    // Reporting may have been first with some of it.
    assert!(
        mib(statistics.hinted.claimed) > 60 && mib(statistics.reported.measured) + mib(got) > 150,
        "{backing} {statistics:?}"
    );
    assert_eq!(statistics.ignored, 0);
    vm.console_input(b"go\n");
    assert_eq!(vm.wait_timeout(LONG).unwrap(), Some(vmbed::StopCause::GuestPoweroff));
}

fn out_of_memory() {
    let guest = Guest::start(filled(
        BalloonConfig::default(),
        "read go
        dd if=/dev/zero of=/mnt/much bs=1M count=150 2>/dev/null && echo much=$(wc -c </mnt/much)
        echo killed=$(awk '/oom_kill / {print $2}' /proc/vmstat)",
    ));
    guest.wait_for("now=freed");
    let vm = &guest.vm;
    vm.set_balloon(Bytes::mib(150)).unwrap();
    wait_until(&guest, "the balloon to be full", |g| g.vm.memory().loaned == Bytes::mib(150));
    vm.console_input(b"go\n");
    guest.wait_for("killed=");
    assert_eq!((guest.value("much"), guest.value("killed")), ("157286400".to_owned(), "0".to_owned()));
    assert!(vm.memory().loaned < Bytes::mib(150), "{:?}", vm.balloon_statistics());
    let took = |kind: &EventKind| matches!(kind, EventKind::Balloon { target, actual } if actual < target);
    let events: Vec<_> = std::iter::from_fn(|| vm.events().next_event()).map(|e| e.kind).collect();
    assert!(events.iter().any(took), "{events:?}");
    assert_eq!(vm.wait_timeout(LONG).unwrap(), Some(vmbed::StopCause::GuestPoweroff));
}

/// The host is short of memory by a threshold that it cannot meet: the guest gives three quarters of what it does not use,
/// and has it back when there is room again.
fn short() {
    let mut config = filled(BalloonConfig::default(), "read go");
    if let Some(balloon) = &mut config.balloon {
        (balloon.reporting, balloon.deflate_on_oom) = (false, false);
    }
    let host = Host::open().unwrap();
    let guest = Guest { vm: host.build(config).unwrap() };
    let vm = &guest.vm;
    vm.start().unwrap();
    guest.wait_for("now=freed");
    let (before, idle) = (vm.memory().backing, vm.guest_memory(LONG).unwrap().available.unwrap());
    let mut reclaim = ReclaimConfig::default();
    (reclaim.balloon_below, reclaim.page_out_below) = (Bytes(1 << 60), Bytes(0));
    reclaim.interval = Duration::from_millis(100);
    reclaim.sandbox = ReclaimSandbox::Required;
    host.set_reclaim(Some(&reclaim)).unwrap();
    wait_until(&guest, "most of what is idle to be gone", |g| {
        g.vm.memory().loaned.get() >= idle.get() * 7 / 10
    });
    // Nothing more comes: what is left is the guest's.
    std::thread::sleep(Duration::from_secs(3));
    let (kept, after) = (vm.guest_memory(LONG).unwrap().available.unwrap(), vm.memory());
    let part = kept.get() as f64 / idle.get() as f64;
    assert!((0.2..=0.3).contains(&part), "{part}: {kept} of {idle}, {after:?}");
    assert!(before.get() - after.backing.get() > 60 << 20, "{before} {after:?}");
    assert!(host.reclaim_sandbox().is_some_and(|report| report.seccomp), "nothing was refused");
    host.set_reclaim(None).unwrap();
    wait_until(&guest, "the balloon to be empty", |g| g.vm.memory().loaned == Bytes(0));
    let told =
        |kind: &EventKind| matches!(kind, EventKind::MemoryPressure { stage: ReclaimStage::Balloon, .. });
    let events: Vec<_> = std::iter::from_fn(|| vm.events().next_event()).map(|e| e.kind).collect();
    assert!(events.iter().any(told), "{events:?}");
    vm.console_input(b"go\n");
    assert_eq!(vm.wait_timeout(LONG).unwrap(), Some(vmbed::StopCause::GuestPoweroff));
}
