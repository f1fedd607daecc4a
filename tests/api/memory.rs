//! Memory of every kind, below the same guest.

use vmbed::{BackingConfig, BackingKind, Bytes, ErrorKind, HugePages, VmConfig};

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
