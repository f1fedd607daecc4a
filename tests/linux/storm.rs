//! Guests that together touch twice the memory that their process may have, all at once: only those that were declared to
//! may be lost, and the kernel's OOM killer is never asked.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use vmbed::{
    BareBoot, Bytes, CpuMode, EventKind, Host, HostConfig, ReclaimConfig, ReclaimSandbox, ReclaimStage,
    StopCause, Vm, VmConfig, VmState,
};

use crate::cage::{Cage, charged};
use crate::guest::LONG;
use crate::trial;

const GUESTS: u64 = 6;
/// The first ones may be stopped, in this order.
const VICTIMS: u64 = 4;
const SIZE: Bytes = Bytes::mib(48);
const MIB: u64 = 1 << 20;

pub fn add(trials: &mut Vec<Trial>) {
    for (name, swap) in
        [("storm::twice_the_memory_with_swap", "swap"), ("storm::twice_the_memory_without", "none")]
    {
        trials.push(trial(name, move || in_time((0..storms()).flat_map(|_| outside(swap)).collect())));
    }
}

/// Fifty with `make soak`.
fn storms() -> u32 {
    std::env::var("VMBED_STORMS").map_or(3, |n| n.parse().expect("VMBED_STORMS is a number"))
}

/// The storm in a cage with half of what its guests have. How late each step was.
fn outside(swap: &str) -> Vec<u32> {
    let all = GUESTS * SIZE.get();
    let cage = Cage::new(all / 2, all / 2 + 24 * MIB, swap == "swap");
    let said = cage.run(&format!("storm {swap}"));
    assert_eq!((cage.event("oom"), cage.event("oom_kill")), (0, 0), "{said}");
    if let Some(path) = std::env::var_os("VMBED_RECORD") {
        let looks: Vec<_> = said.lines().filter_map(|line| line.strip_prefix("look: ")).collect();
        std::fs::write(path, looks.join("\n") + "\n").unwrap();
    }
    let late = said.lines().find_map(|line| line.strip_prefix("late:")).unwrap_or_else(|| panic!("{said}"));
    late.split_whitespace().map(|number| number.parse().unwrap()).collect()
}

/// Writes to every page from 2 MiB on, over and over, each time another number.
fn toucher() -> VmConfig {
    let end = (SIZE.get() - MIB) as u32;
    let mut code = vec![0x48, 0xc7, 0xc7, 0, 0, 0x20, 0]; // mov rdi, 0x200000
    code.extend([0x88, 0x07]); // 1: mov [rdi], al
    code.extend([0x48, 0x81, 0xc7, 0, 0x10, 0, 0]); // add rdi, 0x1000
    code.extend([0x48, 0x81, 0xff]); // cmp rdi, end
    code.extend(end.to_le_bytes());
    code.extend([0x72, 0xee]); // jb 1b
    code.extend([0xfe, 0xc0, 0xeb, 0xe3]); // inc al; jmp to the beginning
    let mut config = VmConfig::bare(BareBoot::new(CpuMode::Long, 0x1000, code));
    config.memory = SIZE;
    config
}

/// How often the guest has written to its first page, in a byte.
fn round(vm: &Vm) -> u8 {
    let mut byte = [0];
    vm.read_memory(0x20_0000, &mut byte).unwrap();
    byte[0]
}

/// How late each step of the reclaim thread's was, in milliseconds: it says so in the log.
struct Late(Mutex<Vec<u32>>);

static LATE: Late = Late(Mutex::new(Vec::new()));

impl log::Log for Late {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.target() == "vmbed::host::reclaim"
    }

    fn log(&self, record: &log::Record<'_>) {
        let line = record.args().to_string();
        if let Some(look) = line.strip_prefix("look: ") {
            println!("look: {look}");
        }
        let number = line.split_once("at most ").and_then(|(_, rest)| rest.split(' ').next()?.parse().ok());
        if let Some(late) = number.filter(|_| self.enabled(record.metadata())) {
            self.0.lock().unwrap().push(late);
        }
    }

    fn flush(&self) {}
}

/// With VMBED_RECORD set, every look at the host goes to a file of that name: a scenario for `tests/recorded`.
fn level() -> log::LevelFilter {
    if std::env::var_os("VMBED_RECORD").is_some() { log::LevelFilter::Trace } else { log::LevelFilter::Debug }
}

/// Of a hundred steps, 99 began within half a second of what they were for: said always, and wanted of `make soak`, which has the
/// machine for itself.
fn in_time(mut late: Vec<u32>) {
    late.sort_unstable();
    let (count, worst) = (late.len(), late[late.len() - 1]);
    let (median, most) = (late[count / 2], late[(count * 99).div_ceil(100) - 1]);
    println!("{count} steps: median {median} ms after their cause, p99 {most}, slowest {worst}");
    assert!(count > 0 && (most <= 500 || std::env::var_os("VMBED_STORMS").is_none()), "{late:?}");
}

/// The storm itself. Says what happened on stdout.
pub fn inside(swap: &str) {
    let swap = swap == "swap";
    log::set_logger(&LATE).map(|()| log::set_max_level(level())).unwrap();
    let mut shares = HostConfig::default();
    (shares.memory_ratio, shares.memory_reserved) = (4.0, Bytes::mib(16));
    shares.swap = Bytes::mib(if swap { 512 } else { 0 });
    let host = Host::open_with(shares).unwrap();
    let mut reclaim = ReclaimConfig::default();
    (reclaim.balloon_below, reclaim.interval) = (Bytes(0), Duration::from_millis(50));
    reclaim.page_out_below = Bytes::mib(if swap { 40 } else { 0 });
    (reclaim.pause_below, reclaim.stop_below) = (Bytes::mib(32), Bytes::mib(24));
    reclaim.pause_deadline = Duration::from_secs(2);
    reclaim.sandbox = ReclaimSandbox::Required;
    host.set_reclaim(Some(&reclaim)).unwrap();
    let made = |class: u64| {
        let mut config = toucher();
        config.promise.victim = (class < VICTIMS).then_some(class as u8);
        host.build(config).unwrap()
    };
    // Who may not be stopped is admitted while the host can hold all: first.
    let mut vms: Vec<Vm> = (0..GUESTS).rev().map(made).collect();
    vms.reverse();
    vms.iter().for_each(|vm| vm.start().unwrap());
    // Ten seconds, and until everybody who is left has touched all of its memory: on a slow machine it takes longer.
    let (least, end) = (Instant::now() + Duration::from_secs(10), Instant::now() + LONG);
    let over = |vm: &Vm| matches!(vm.state(), VmState::Stopped(_)) || round(vm) > 0;
    while Instant::now() < least || !vms.iter().all(over) {
        assert!(Instant::now() < end, "waited {LONG:?} for every guest to touch all: {}", states(&vms));
        std::thread::sleep(Duration::from_millis(500));
        let usage = host.usage();
        println!("backing {} charged {} {}", usage.backing, usage.charged, states(&vms));
    }
    assert!(host.reclaim_sandbox().is_some_and(|report| report.seccomp), "nothing was refused");
    host.set_reclaim(None).unwrap();
    let stopped: Vec<bool> = vms.iter().map(|vm| matches!(vm.state(), VmState::Stopped(_))).collect();
    let lost = stopped.iter().take_while(|s| **s).count();
    assert!(stopped[lost..].iter().all(|s| !s), "in the order of their classes: {stopped:?}");
    assert!(lost <= VICTIMS as usize && (lost > 0 || swap), "{stopped:?}");
    for (index, vm) in vms.iter().enumerate() {
        ended(index, vm);
    }
    // What is left goes on: nobody was forgotten in a pause.
    let waits: Vec<_> = vms[lost..].iter().map(|vm| (vm, round(vm), Instant::now() + LONG)).collect();
    for (vm, before, end) in waits {
        while round(vm) == before {
            assert!(Instant::now() < end, "waited for {:?} to go on: {:?}", vm.id(), vm.state());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    let late: Vec<_> = LATE.0.lock().unwrap().iter().map(u32::to_string).collect();
    println!("late: {}", late.join(" "));
    if !swap {
        exact(&host, &vms[lost..]);
    }
}

fn states(vms: &[Vm]) -> String {
    let letter = |vm: &Vm| match vm.state() {
        VmState::Running => 'R',
        VmState::Paused => 'P',
        _ => 'S',
    };
    vms.iter().map(letter).collect()
}

/// A victim has its cause and no memory any more; whoever lives, none of it.
fn ended(index: usize, vm: &Vm) {
    let events: Vec<_> = std::iter::from_fn(|| vm.events().next_event()).map(|e| e.kind).collect();
    let stage = |e: &EventKind| match e {
        EventKind::MemoryPressure { stage, .. } => Some(*stage),
        _ => None,
    };
    let stages: Vec<_> = events.iter().filter_map(stage).collect();
    println!("guest {index}: {:?}, {} of memory, {stages:?}", vm.state(), vm.memory().backing);
    match vm.state() {
        VmState::Stopped(cause) => {
            assert_eq!(cause, StopCause::MemoryPressure);
            assert!(stages.contains(&ReclaimStage::Stop), "{events:?}");
            assert_eq!(vm.memory().backing, Bytes(0));
        }
        _ => assert!(!stages.contains(&ReclaimStage::Stop), "{events:?}"),
    }
}

/// What the ledger says exists is what the kernel charges as shared memory, to one in a thousand.
fn exact(host: &Host, vms: &[Vm]) {
    vms.iter().for_each(|vm| vm.pause().unwrap());
    let charged = charged("memory.stat", "shmem ");
    let backing = host.usage().backing.get();
    println!("backing {backing}, charged as shared memory {charged}");
    assert!(backing.abs_diff(charged) <= charged / 1000 && charged > 0, "{backing} {charged}");
}
