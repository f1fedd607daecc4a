//! Memory of every kind, below the same guest; its share of the processors.

use std::time::Duration;

use vmbed::{BackingConfig, BackingKind, Bytes, CgroupConfig, ErrorKind, HugePages, VmConfig};

use crate::guest::{SPINS, host, real};

fn config(memory: Bytes, kind: BackingKind, change: impl FnOnce(&mut BackingConfig)) -> VmConfig {
    let mut config = real(&SPINS);
    (config.memory, config.backing.kind) = (memory, kind);
    change(&mut config.backing);
    config
}

pub fn memory_of_every_kind() {
    let (host, size) = (host(), Bytes::mib(4));
    for kind in [BackingKind::Memfd, BackingKind::Anonymous] {
        let vm = host.build(config(size, kind, |b| b.huge = HugePages::Never)).unwrap();
        let before = vm.memory();
        vm.write_memory(0x20_0000, &[1; 8192]).unwrap();
        let after = vm.memory();
        assert_eq!(after.backing.0, before.backing.0 + 8192, "{kind:?}");
        assert_eq!((after.resident, after.huge, after.pinned), (after.backing, Bytes(0), Bytes(0)));
        assert_eq!(host.usage().backing, after.backing);
        vm.start().unwrap();
        vm.stop().unwrap();
        drop(vm);
        let vm = host.build(config(size, kind, |b| b.prefault = true)).unwrap();
        assert_eq!(vm.memory().backing, size, "{kind:?}");
    }
    let bad =
        config(Bytes(5 << 20), BackingKind::Huge2M, |b| (b.mergeable, b.huge) = (true, HugePages::Always));
    let error = bad.validate().unwrap_err();
    let fields: Vec<_> = error.fields().iter().map(|f| f.field.as_str()).collect();
    assert_eq!(fields, ["memory", "backing.huge", "backing.mergeable"]);
    match host.build(config(size, BackingKind::Huge2M, |_| {})) {
        Ok(vm) => {
            let memory = vm.memory();
            assert_eq!((memory.pinned, memory.huge), (size, memory.backing));
            assert_eq!(memory.backing.0 % (2 << 20), 0);
        }
        Err(error) => {
            assert!(
                error.kind() == ErrorKind::Exhausted && error.to_string().contains("nr_hugepages"),
                "{error}"
            );
        }
    }
    let error = host.build(config(size, BackingKind::Memfd, |b| b.numa_nodes = vec![1000])).unwrap_err();
    assert!(error.to_string().contains("numa_nodes is [1000]"), "{error}");
    assert_eq!(host.usage().vms, 0);
}

pub fn a_share_of_the_processors() {
    let host = host();
    let mut config = real(&SPINS);
    let mut share = CgroupConfig::default();
    (share.weight, share.quota) = (0, Some(Duration::ZERO));
    config.cgroup = Some(share.clone());
    let error = config.validate().unwrap_err();
    let fields: Vec<_> = error.fields().iter().map(|f| f.field.as_str()).collect();
    assert_eq!(fields, ["cgroup.weight", "cgroup.quota"]);
    share.parent = Some("/nowhere".into());
    (share.weight, share.quota) = (300, Some(Duration::from_millis(20)));
    config.cgroup = Some(share.clone());
    let error = host.build(config.clone()).unwrap_err();
    assert!(
        error.kind() == ErrorKind::NotFound && error.to_string().contains("cgroup: /nowhere/vmbed-"),
        "{error}"
    );
    share.parent = None;
    config.cgroup = Some(share);
    match host.build(config) {
        Ok(vm) => {
            let thread = vm.vcpu_statistics(0).unwrap().thread.unwrap();
            let own = std::fs::read_to_string(format!("/proc/self/task/{thread}/cgroup")).unwrap();
            assert!(own.contains(&format!("/vmbed-{}-", std::process::id())), "{own}");
        }
        // Only where the host delegates one; tests/linux/accounts.rs has one.
        Err(error) => assert!(error.to_string().contains("cgroup"), "{error}"),
    }
    assert_eq!(host.usage().vms, 0);
}
