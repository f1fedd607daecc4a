//! The ledger's numbers against those of a kernel that has nested paging.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use vmbed::{BareBoot, Bytes, CgroupConfig, CpuMode, DiskConfig, Host, HugePages, Platform, Vm, VmConfig};

use crate::cage::{Cage, Setting, charged};
use crate::devices::TempFile;
use crate::guest::LONG;
use crate::trial;

pub fn add(trials: &mut Vec<Trial>) {
    trials.push(trial("accounts::stage_two_is_what_a_guest_touched", stage_two));
    trials.push(trial("accounts::overhead_is_as_modelled", overhead));
    trials.push(trial("accounts::cgroups_divide_the_processor", || {
        let none = u64::MAX >> 12 << 12;
        println!("{}", Cage::new(none, none, false).run("share 1"));
    }));
}

const MIB: u32 = 1 << 20;

/// Without paging: writes to a byte in every `step` from 2 MiB on to `end`, and halts.
fn strides(step: u32, end: u32) -> VmConfig {
    let mut code = vec![0xb8]; // mov eax, 0x200000
    code.extend((2 * MIB).to_le_bytes());
    code.extend([0xc6, 0x00, 0x01, 0x05]); // 1: mov byte [eax], 1; add eax, step
    code.extend(step.to_le_bytes());
    code.push(0x3d); // cmp eax, end
    code.extend(end.to_le_bytes());
    code.extend([0x72, 0xf1, 0xf4]); // jb 1b; hlt
    let mut config = VmConfig::bare(BareBoot::new(CpuMode::Protected, 0x1000, code));
    config.memory = Bytes(u64::from(end));
    config.backing.huge = HugePages::Never;
    config
}

fn halted(vm: &Vm) {
    assert!(vm.wait_timeout(LONG).unwrap().is_some(), "waited {LONG:?} for a guest to touch its memory");
}

fn stage_two() {
    for step in [4096, 3 * 4096, 127 * 4096] {
        let vm = Host::open().unwrap().build(strides(step, 64 * MIB)).unwrap();
        assert_eq!(vm.memory().stage2, Bytes(0));
        vm.start().unwrap();
        halted(&vm);
        // And the page of its code.
        let pages = u64::from((62 * MIB).div_ceil(step)) + 1;
        assert_eq!(
            (vm.memory().stage2, vm.memory().backing),
            (Bytes(pages << 12), Bytes(pages << 12)),
            "{step}"
        );
    }
}

/// vCPUs, MiB, disks; on a PC, whose vCPUs wait for an interrupt: those of a bare guest end, and their threads with them.
const SHAPES: [&str; 3] = ["1 48 0 pc", "4 32 0 pc", "1 32 3 pc"];

fn overhead() {
    // A huge page more or less in the heap is of the size of what is measured.
    let huge = Setting::of("/sys/kernel/mm/transparent_hugepage/enabled", "never");
    let none = u64::MAX >> 12 << 12;
    for shape in SHAPES {
        let said = Cage::new(none, none, false).run(&format!("overhead {shape}"));
        let numbers: Vec<u64> = said.split_whitespace().map(|n| n.parse().expect(&said)).collect();
        let [measured, modelled] = numbers[..] else { panic!("{said}") };
        println!("{shape}: {measured} bytes measured, {modelled} modelled");
        assert!(
            modelled.abs_diff(measured) * 10 <= measured,
            "{shape}: {measured} measured, {modelled} modelled"
        );
    }
    drop(huge);
}

/// Says what a process is charged for a VM beside its memory, and what the model has for it.
pub fn inside(shape: &str) {
    // The kernel charges a cgroup in batches of 256 KiB: among many VMs they count for little.
    const VMS: u64 = 16;
    let words: Vec<_> = shape.split(' ').collect();
    let number = |i: usize| words[i].parse::<u32>().expect("a number");
    let disk = TempFile::new(&[0; 4096]);
    let mut config = strides(4096, number(1) * MIB);
    config.cpus.count = number(0) as u16;
    for _ in 0..number(2) {
        let mut shared = DiskConfig::new(disk.path());
        shared.readonly = true;
        config.disks.push(shared);
    }
    config.platform = if words[3] == "pc" { Platform::Pc } else { Platform::Bare };
    let touched = Bytes(u64::from((number(1) - 2) * MIB) + 4096);
    let host = Host::open().unwrap();
    let made = || {
        let vm = host.build(config.clone()).unwrap();
        vm.start().unwrap();
        let end = Instant::now() + LONG;
        while vm.memory().backing < touched {
            assert!(Instant::now() < end, "waited {LONG:?} for a guest to touch its memory");
            std::thread::sleep(Duration::from_millis(100));
        }
        vm
    };
    // What the first one brings for all.
    let _first = made();
    let charged_now = || {
        // The page cache is nobody's.
        let cache = charged("memory.stat", "file ") - charged("memory.stat", "shmem ");
        charged("memory.current", "") - cache - host.usage().backing.get()
    };
    // Threads that have just begun still touch their stacks, and a busy lab takes its time over it.
    let settled = || {
        let (mut last, end) = (charged_now(), Instant::now() + LONG);
        loop {
            std::thread::sleep(Duration::from_millis(300));
            let now = charged_now();
            if now.abs_diff(last) <= 16 << 10 || Instant::now() > end {
                return now;
            }
            last = now;
        }
    };
    let before = settled();
    let vms: Vec<Vm> = (0..VMS).map(|_| made()).collect();
    println!("{} {}", (settled() - before) / VMS, vms[0].memory().overhead.get());
}

/// Three guests that want all of one CPU: two by their weights, one with a limit.
pub fn share() {
    let host = Host::open().unwrap();
    let own = fs::read_to_string("/proc/self/cgroup").unwrap();
    let parent = Path::new("/sys/fs/cgroup").join(own.trim().strip_prefix("0::/").unwrap());
    let made = |weight: u32, quota: Option<Duration>| {
        // jmp to itself
        let mut config = VmConfig::bare(BareBoot::new(CpuMode::Real, 0x1000, [0xeb, 0xfe]));
        let mut share = CgroupConfig::default();
        (share.weight, share.quota) = (weight, quota);
        config.cgroup = Some(share);
        // Two CPUs would have enough for all.
        config.cpus.affinity = vec![vec![0]];
        host.build(config).unwrap()
    };
    let vms = [made(300, None), made(100, None), made(1000, Some(Duration::from_millis(10)))];
    vms.iter().for_each(|vm| vm.start().unwrap());
    let times = || vms.each_ref().map(|vm| vm.vcpu_statistics(0).unwrap().run_time.as_secs_f64());
    let (before, began) = (times(), Instant::now());
    std::thread::sleep(Duration::from_secs(6));
    let (after, elapsed) = (times(), began.elapsed().as_secs_f64());
    let [much, little, limited] = std::array::from_fn(|i| (after[i] - before[i]) / elapsed);
    println!("{much:.2} {little:.2} {limited:.2}");
    assert!((2.0..4.5).contains(&(much / little)), "{much} to {little}: by weight 3 to 1");
    assert!((0.03..0.15).contains(&limited), "{limited}: at most a tenth");
    let below = || fs::read_dir(&parent).unwrap().flatten().filter(|e| e.path().is_dir()).count();
    assert_eq!(below(), 3);
    drop(vms);
    assert_eq!(below(), 0, "gone with the VMs");
}
