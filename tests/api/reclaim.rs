//! What a host does when its memory gets short: here it always is, by thresholds that no machine meets.

use std::time::Duration;

use vmbed::{
    BalloonConfig, BareBoot, Bytes, CpuMode, ErrorKind, EventKind, Host, ReclaimConfig, ReclaimSandbox,
    ReclaimStage, StopCause, Vm, VmConfig, VmState,
};

use crate::backends::{Guest, config};
use crate::guest::{SPINS, ends, host, wait_until};
use crate::guests::Op;

/// More than any machine has free.
const ALWAYS: Bytes = Bytes(1 << 60);

/// Nothing, ten times as often as usual.
fn nothing() -> ReclaimConfig {
    let mut config = ReclaimConfig::default();
    (config.balloon_below, config.page_out_below, config.interval) =
        (Bytes(0), Bytes(0), Duration::from_millis(20));
    config
}

fn spins(host: &Host, victim: Option<u8>) -> Vm {
    let mut config = VmConfig::bare(BareBoot::new(CpuMode::Real, 0x1000, SPINS));
    config.promise.victim = victim;
    let vm = host.build(config).unwrap();
    vm.start().unwrap();
    vm
}

fn stages(vm: &Vm) -> Vec<ReclaimStage> {
    let stage = |kind| if let EventKind::MemoryPressure { stage, .. } = kind { Some(stage) } else { None };
    std::iter::from_fn(|| vm.events().next_event()).filter_map(|event| stage(event.kind)).collect()
}

pub fn what_is_done_when_memory_gets_short() {
    let host = host();
    let mut bad = ReclaimConfig::default();
    (bad.idle_tax, bad.interval) = (1.0, Duration::ZERO);
    let error = host.set_reclaim(Some(&bad)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert_eq!(error.fields().len(), 2, "{error}");

    // A guest of 4 MiB that says that 2 MiB of them are available: three quarters of that are asked for.
    let mut with = config(0, 0);
    with.balloon = Some(BalloonConfig::default());
    // One account only: another could be read before or after the balloon is full, and would count differently.
    let asks = [(Op::Account, 0, 4, 2), (Op::Asked, 0, 0, 0), (Op::Target, 384, 0, 0)];
    let guest = Guest::start(host.builder(with), &asks);
    let mut limits = nothing();
    limits.balloon_below = ALWAYS;
    host.set_reclaim(Some(&limits)).unwrap();
    guest.results(asks.len());
    assert_eq!(guest.vm.balloon_statistics().unwrap().target, Bytes(384 << 12));
    host.set_reclaim(None).unwrap();
    assert_eq!(guest.vm.balloon_statistics().unwrap().target, Bytes(0));
    assert_eq!(stages(&guest.vm), [ReclaimStage::Balloon]);
    drop(guest);

    // One that has more than its guarantee stands still until there is room again.
    let vm = spins(&host, None);
    limits = nothing();
    limits.pause_below = ALWAYS;
    limits.pause_deadline = Duration::from_secs(600);
    limits.sandbox = ReclaimSandbox::Required;
    host.set_reclaim(Some(&limits)).unwrap();
    wait_until("the VM to be paused", || vm.state() == VmState::Paused);
    let report = host.reclaim_sandbox().unwrap();
    assert!(report.threads.len() == 1 && report.seccomp && report.landlock.is_some(), "{report:?}");
    host.set_reclaim(Some(&nothing())).unwrap();
    assert_eq!(host.reclaim_sandbox(), None);
    wait_until("the VM to go on", || vm.state() == VmState::Running);
    // The embedder's own pause is its own.
    vm.pause().unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(vm.state(), VmState::Paused);
    vm.resume().unwrap();
    assert_eq!(stages(&vm), [ReclaimStage::Pause]);

    // Victims end, the lowest class first, and nobody else does; their memory is free at once.
    let (first, later) = (spins(&host, Some(1)), spins(&host, Some(2)));
    limits = nothing();
    limits.stop_below = ALWAYS;
    host.set_reclaim(Some(&limits)).unwrap();
    assert_eq!((ends(&first), ends(&later)), (StopCause::MemoryPressure, StopCause::MemoryPressure));
    wait_until("their memory to be free", || {
        [&first, &later].iter().all(|vm| vm.memory().backing == Bytes(0))
    });
    assert_eq!((stages(&first), vm.state()), (vec![ReclaimStage::Stop], VmState::Running));
    host.set_reclaim(None).unwrap();
    assert_eq!(vm.stop().unwrap(), StopCause::HostStop);
}
