//! Memory of every kind, below the same guest; its share of the processors.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use vmbed::{
    BackingConfig, BackingKind, BlockBackend, BlockRequest, Bytes, CgroupConfig, ErrorKind, HugePages,
    StopCause, Vm, VmBuilder, VmConfig,
};

use crate::backends;
use crate::guest::{SPINS, ends, host, real, run};
use crate::guests::{self, Op, script};
use crate::rogue::{Rogue, USE};

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

/// Where guest memory is mapped in this process.
fn mapped() -> BTreeSet<usize> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let guests = maps.lines().filter(|line| line.contains("vmbed-guest"));
    guests.map(|line| usize::from_str_radix(line.split('-').next().unwrap(), 16).unwrap()).collect()
}

/// A VM, and where its memory is mapped.
fn built(builder: VmBuilder) -> (Vm, usize) {
    let before = mapped();
    let vm = builder.build().unwrap();
    let own: Vec<_> = mapped().difference(&before).copied().collect();
    assert_eq!(own.len(), 1, "{own:?}");
    (vm, own[0])
}

/// Takes 64 KiB of a guest's memory away: nothing stands behind them any more, whoever touches them.
fn take_away(at: usize) {
    let path = format!("{}/nothing-{at:x}", env!("CARGO_TARGET_TMPDIR"));
    let nothing = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_FIXED);
    let place = std::ptr::without_provenance_mut::<libc::c_void>(at);
    #[expect(unsafe_code, reason = "takes memory away as failing hardware does")]
    // SAFETY: the guest's own memory, which is accessed as volatile bytes only.
    let made = unsafe { libc::mmap(place, 0x1_0000, prot, flags, nothing.as_raw_fd(), 0) };
    assert_eq!(made, place);
}

/// A disk that reads into memory which has just been lost, and never answers.
struct Silent(Arc<AtomicUsize>, Vec<BlockRequest>);

impl BlockBackend for Silent {
    fn size(&self) -> u64 {
        1 << 20
    }

    fn submit(&mut self, mut request: BlockRequest) {
        take_away(self.0.load(Ordering::SeqCst));
        request.copy_from(0, &[7; 512]);
        self.1.push(request);
    }
}

pub fn memory_that_is_lost() {
    (0..2).for_each(|_| vmbed::handle_sigbus().unwrap());
    let host = host();
    let spins = || config(Bytes::mib(4), BackingKind::Memfd, |_| {});
    // Another VM, which uses its devices all the time.
    let other = Rogue::start(&host);
    let works = || {
        assert_eq!(other.does(USE), 0);
        assert_eq!(other.events(), []);
    };
    works();
    let lost = |at: &str| StopCause::DeviceFault {
        device: "memory".to_owned(),
        why: format!("guest memory at {at} is lost, or the host has no page for it (SIGBUS)"),
    };

    // By the embedder.
    let (vm, at) = built(host.builder(spins()));
    take_away(at + 0x20_0000);
    vm.start().unwrap();
    vm.read_memory(0x1f_f000, &mut [0; 4096]).unwrap();
    for _ in 0..2 {
        let error = vm.read_memory(0x1f_fff0, &mut [0; 32]).unwrap_err();
        assert!(error.kind() == ErrorKind::Exhausted && error.to_string().contains("at 0x200000"), "{error}");
    }
    assert_eq!(ends(&vm), lost("0x200000"));
    works();

    // By a device's thread: what the guest wants to read from its disk has no place to go.
    let reads = || {
        let place = Arc::default();
        let silent = Silent(Arc::clone(&place), Vec::new());
        let (vm, at) = built(host.builder(backends::config(1, 0)).disk_backend(0, silent));
        place.store(at + 0x10_0000, Ordering::SeqCst);
        vm.write_memory(guests::SCRIPT, &script(&[(Op::Read, 3, 1, 0)])).unwrap();
        (vm, at + 0x10_0000)
    };
    assert_eq!(run(&reads().0), lost("0x100000"));
    works();

    // By a vCPU, which fills the buffer before.
    let (vm, buffer) = reads();
    take_away(buffer);
    match run(&vm) {
        // What KVM says depends on how it runs the guest.
        StopCause::VcpuFault { vcpu: 0, why } => assert!(why.contains("EFAULT"), "{why}"),
        cause => assert_eq!(cause, lost("0x100000")),
    }

    works();
    other.disk_is_unharmed();
    other.ends();
}
