//! Guests with everything, and what they live with.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use vmbed::{
    BalloonConfig, BareBoot, Bytes, CpuMode, DiskConfig, EventKind, Host, Platform, SandboxConfig, StopCause,
    Vm, VmBuilder, VmConfig,
};

use crate::guests::{self, Op, script};

pub const LONG: Duration = Duration::from_secs(60);
pub const SIZE: u64 = 1 << 20;

/// cli; jmp $
pub const SPINS: [u8; 3] = [0xfa, 0xeb, 0xfe];

/// A file of the test's own, gone when it ends.
pub struct Scratch(pub PathBuf);

impl Scratch {
    pub fn new(kind: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("vmbed-sandbox-{kind}-{}-{number}", std::process::id());
        Self(Path::new(env!("CARGO_TARGET_TMPDIR")).join(name))
    }

    /// A disk of [`SIZE`] zeroes.
    pub fn disk() -> Self {
        let own = Self::new("disk");
        File::create(&own.0).unwrap().set_len(SIZE).unwrap();
        own
    }

    pub fn config(&self) -> DiskConfig {
        DiskConfig::new(&self.0)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// In the sandbox.
pub fn bare(code: &[u8]) -> VmConfig {
    let mut config = VmConfig::bare(BareBoot::new(CpuMode::Real, 0x1000, code));
    config.sandbox = Some(SandboxConfig::default());
    config
}

/// A PC with the guest of tests/guests and a balloon, in the sandbox.
pub fn pc() -> VmConfig {
    static CODE: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let guest = guests::virtio(Path::new(env!("CARGO_TARGET_TMPDIR")));
        let code = std::fs::read(&guest).unwrap();
        std::fs::remove_file(guest).unwrap();
        code
    });
    let mut boot = BareBoot::new(CpuMode::Long, guests::ENTRY, CODE.as_slice());
    boot.stack = guests::STACK;
    let mut config = VmConfig::bare(boot);
    (config.platform, config.memory) = (Platform::Pc, Bytes(guests::MEMORY));
    config.balloon = Some(BalloonConfig::default());
    config.sandbox = Some(SandboxConfig::default());
    config
}

pub fn host() -> Host {
    Host::open().unwrap()
}

/// Starts the guest of tests/guests on these steps; what it tells rings a doorbell.
pub fn start(builder: VmBuilder, steps: &[(Op, u32, u32, u32)]) -> Vm {
    let vm = builder.pio_doorbell("said", guests::SAY, 1).build().unwrap();
    vm.write_memory(guests::SCRIPT, &script(steps)).unwrap();
    vm.start().unwrap();
    vm
}

/// Waits until the guest has told this.
pub fn hear(vm: &Vm, what: u64) {
    let end = Instant::now() + LONG;
    while let Some(event) = vm.events().wait_event(end.saturating_duration_since(Instant::now())) {
        match event.kind {
            EventKind::Doorbell { value, .. } if value == what => return,
            EventKind::Stopped(cause) => panic!("waited for the guest to tell {what}, and it ended: {cause}"),
            _ => {}
        }
    }
    panic!("waited a minute for the guest to tell {what}: {vm:?}");
}

pub fn ends(vm: &Vm) -> StopCause {
    vm.wait_timeout(LONG).unwrap().unwrap_or_else(|| panic!("waited a minute for its end: {vm:?}"))
}

pub fn wait_until(what: &str, done: impl Fn() -> bool) {
    let end = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < end, "waited a minute for: {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}
