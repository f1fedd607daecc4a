//! What VMs are promised, what is really there, and what their vCPUs get, with bare guests.

use std::time::{Duration, Instant};

use vmbed::{BareBoot, Bytes, Constraint, CpuMode, ErrorKind, Host, HostConfig, Verdict, Vm, VmConfig};

/// cli; jmp $
const SPINS: [u8; 3] = [0xfa, 0xeb, 0xfe];

fn spinning() -> VmConfig {
    VmConfig::bare(BareBoot::new(CpuMode::Real, 0x1000, SPINS))
}

fn shares() -> HostConfig {
    let mut shares = HostConfig::default();
    shares.memory = Some(Bytes::mib(1024));
    shares
}

/// Asks again until it is so, for at most a minute.
fn until(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !so() {
        assert!(Instant::now() < deadline, "waited a minute for: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The CPUs that vCPU `index`'s thread may run on, as the kernel says them.
fn allowed(vm: &Vm, index: u32) -> String {
    let thread = || vm.vcpu_statistics(index).unwrap().thread;
    until("the vCPU's thread", || thread().is_some());
    let status = std::fs::read_to_string(format!("/proc/self/task/{}/status", thread().unwrap())).unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("Cpus_allowed_list:")).unwrap();
    line.trim().to_owned()
}

/// The CPUs that this process may use, from its own status.
fn usable() -> Vec<u32> {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("Cpus_allowed_list:")).unwrap();
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        first.trim().parse::<u32>().unwrap()..=last.trim().parse().unwrap()
    };
    line.split(',').flat_map(range).collect()
}

#[test]
fn what_a_guest_touches_is_backed_to_the_page() {
    // Long mode: store to 37 pages, each 5 pages from the last, then halt.
    let code = [
        0xbf, 0x00, 0x00, 0x20, 0x00, // mov edi, 0x200000
        0xb9, 0x25, 0x00, 0x00, 0x00, // mov ecx, 37
        0xc6, 0x07, 0x01, // 1: mov byte [rdi], 1
        0x48, 0x81, 0xc7, 0x00, 0x50, 0x00, 0x00, // add rdi, 0x5000
        0xff, 0xc9, // dec ecx
        0x75, 0xf2, // jnz 1b
        0xf4, // hlt
    ];
    let mut config = VmConfig::bare(BareBoot::new(CpuMode::Long, 0x10_0000, code));
    config.memory = Bytes::mib(16);
    let host = Host::open().unwrap();
    let vm = host.build(config).unwrap();
    let before = vm.memory();
    assert_eq!((before.max, before.entitlement), (Bytes::mib(16), Bytes::mib(16)));
    vm.start().unwrap();
    vm.wait_timeout(Duration::from_secs(60)).unwrap().expect("the guest halts within a minute");
    let after = vm.memory();
    assert_eq!(after.backing.get() - before.backing.get(), 37 * 4096);
    assert_eq!(after.resident.get() + after.swapped.get(), after.backing.get());
    assert_eq!(host.usage().backing, after.backing);
    let used = host.usage();
    let known = i128::from(used.backing.get()) + i128::from(used.process.get());
    assert_eq!(i128::from(used.unattributed), i128::from(used.charged.get()) - known);
    drop(vm);
    assert_eq!((host.usage().backing, host.usage().vms), (Bytes(0), 0));
}

#[test]
fn a_refusal_carries_its_verdict() {
    let host = Host::open_with(shares()).unwrap();
    let mut config = spinning();
    config.memory = Bytes::mib(400);
    config.promise.guarantee = Bytes::mib(300);
    assert_eq!(host.verdict(&config).binding, None);
    let first = host.build(config.clone()).unwrap();
    // 512 MiB are usable: the second would fit by guarantee, and its size does not.
    let error = host.build(config.clone()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    let verdict = Verdict::of(&error).expect("a refusal carries its verdict");
    assert_eq!(verdict.binding, Some(Constraint::Nominal));
    assert_eq!(verdict.slack(Constraint::Nominal).left, -(288 << 20));
    // All but what the machine had free at the moment.
    let asked = host.verdict(&config);
    for constraint in Constraint::ALL.into_iter().filter(|c| *c != Constraint::Headroom) {
        assert_eq!(verdict.slack(constraint), asked.slack(constraint), "asking and trying agree");
    }
    // Twice as much may be promised, but not kept: guarantees, and then what guests can touch.
    let mut shares = shares();
    shares.memory_ratio = 2.0;
    let generation = host.usage().generation;
    host.set_shares(&shares, Some(generation)).unwrap();
    assert_eq!(host.set_shares(&shares, Some(generation)).unwrap_err().kind(), ErrorKind::InvalidState);
    assert_eq!(host.verdict(&config).binding, Some(Constraint::Guarantee));
    config.promise.guarantee = Bytes(0);
    assert_eq!(host.verdict(&config).binding, Some(Constraint::Solvency));
    config.promise.victim = Some(0);
    let second = host.build(config).unwrap();
    // Memory is taken away: less always passes, more does not.
    shares.memory = Some(Bytes::mib(600));
    host.set_shares(&shares, None).unwrap();
    let now = first.set_guarantee(Bytes::mib(200), Some(1)).unwrap();
    assert_eq!(first.set_guarantee(Bytes::mib(200), Some(1)).unwrap_err().kind(), ErrorKind::InvalidState);
    let error = first.set_guarantee(Bytes::mib(201), Some(now)).unwrap_err();
    assert_eq!(Verdict::of(&error).and_then(|v| v.binding), Some(Constraint::Guarantee));
    assert_eq!(first.memory().guarantee, Bytes::mib(200));
    drop((first, second));
    assert_eq!((host.usage().guarantee, host.usage().overhead), (Bytes(0), Bytes(0)));
}

#[test]
fn vcpus_run_where_the_configuration_says() {
    let cpus = usable();
    let (one, host) = (cpus[cpus.len() - 1], Host::open().unwrap());
    let mut config = spinning();
    config.cpus.count = 2;
    config.cpus.affinity = vec![vec![one], cpus.clone()];
    let vm = host.build(config.clone()).unwrap();
    assert_eq!(allowed(&vm, 0), one.to_string());
    assert_eq!(vm.vcpu_statistics(0).unwrap().cpus, [one]);
    assert!(vm.vcpu_statistics(2).is_err());
    // No machine has it: the build says so, and leaves nothing.
    config.cpus.affinity[1] = vec![1023];
    let error = host.build(config.clone()).unwrap_err();
    assert!(error.to_string().contains("vCPU 1 to the CPUs [1023]"), "{error}");
    assert_eq!(host.usage().vms, 1);
    let error = host.builder(config).caller_vcpus().build().unwrap_err();
    assert!(error.to_string().contains("affinity"), "{error}");
}

#[test]
fn dedicated_vcpus_are_never_shared() {
    let cpus = usable();
    let mut shares = HostConfig::default();
    shares.dedicated_cpus = vec![cpus[0]];
    let host = Host::open_with(shares).unwrap();
    let mut config = spinning();
    let shared = host.build(config.clone());
    match &shared {
        Ok(vm) => assert!(!vm.vcpu_statistics(0).unwrap().cpus.contains(&cpus[0]), "keeps off"),
        Err(error) => assert_eq!(cpus.len(), 1, "{error}"),
    }
    config.cpus.dedicated = true;
    let vm = host.build(config.clone()).unwrap();
    assert_eq!(allowed(&vm, 0), cpus[0].to_string());
    let error = host.build(config.clone()).unwrap_err();
    assert_eq!(Verdict::of(&error).and_then(|v| v.binding), Some(Constraint::DedicatedVcpus));
    assert_eq!((host.usage().dedicated_vcpus, host.usage().dedicated_cpus), (1, 1));
    drop(vm);
    host.build(config).unwrap();
}

#[test]
fn a_vcpu_that_waits_for_its_cpu_says_so() {
    let (one, host) = (usable()[0], Host::open().unwrap());
    let mut config = spinning();
    config.cpus.affinity = vec![vec![one]];
    let vms = [(); 2].map(|()| host.build(config.clone()).unwrap());
    vms.iter().for_each(|vm| vm.start().unwrap());
    for vm in &vms {
        until("both vCPUs to have run and waited", || {
            let now = vm.vcpu_statistics(0).unwrap();
            now.run_time > Duration::from_millis(20) && now.run_delay > Duration::from_millis(20)
        });
        vm.stop().unwrap();
    }
    let last = vms[0].vcpu_statistics(0).unwrap();
    assert_eq!(last.thread, None);
    assert_eq!(last, vms[0].vcpu_statistics(0).unwrap(), "the times stand still after the end");
}
