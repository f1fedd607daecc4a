//! What tests of bare guests share: guests of a few instructions, a device, waiting with a deadline.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vmbed::{
    Access, BareBoot, CpuMode, Device, Event, EventKind, EventStream, Host, Result, StopCause, Vm, VmConfig,
};

pub const LONG: Duration = Duration::from_secs(60);

/// in al, 0x10; out 0x11, al; hlt
pub const TALKS: [u8; 5] = [0xe4, 0x10, 0xe6, 0x11, 0xf4];
/// cli; jmp $
pub const SPINS: [u8; 3] = [0xfa, 0xeb, 0xfe];
/// out 0x10, al; jmp $-2
pub const WRITES: [u8; 4] = [0xe6, 0x10, 0xeb, 0xfc];

/// A port that keeps what is written to it and answers 0x5a.
#[derive(Default)]
pub struct Port(pub Mutex<Vec<u8>>, pub AtomicU64);

impl Port {
    /// How often it was written to.
    pub fn writes(&self) -> u64 {
        self.1.load(Ordering::Relaxed)
    }
}

impl Device for Port {
    fn read(&self, _: Access, data: &mut [u8]) -> Result<()> {
        data.fill(0x5a);
        Ok(())
    }
    fn write(&self, access: Access, data: &[u8]) -> Result<()> {
        self.1.fetch_add(1, Ordering::Relaxed);
        let mut kept = self.0.lock().unwrap();
        if kept.len() < 64 {
            kept.push(access.offset as u8);
            kept.extend_from_slice(data);
        }
        Ok(())
    }
}

/// A device that does what the closure says when the guest writes.
pub struct OnWrite<F>(pub F);

impl<F: Fn() -> Result<()> + Send + Sync> Device for OnWrite<F> {
    fn read(&self, _: Access, _: &mut [u8]) -> Result<()> {
        Ok(())
    }
    fn write(&self, _: Access, _: &[u8]) -> Result<()> {
        (self.0)()
    }
}

pub fn real(code: &[u8]) -> VmConfig {
    VmConfig::bare(BareBoot::new(CpuMode::Real, 0x1000, code))
}

pub fn run(vm: &Vm) -> StopCause {
    vm.start().unwrap();
    ends(vm)
}

pub fn ends(vm: &Vm) -> StopCause {
    vm.wait_timeout(LONG).unwrap().expect("the guest should end within a minute")
}

pub fn host() -> Host {
    Host::open().unwrap()
}

pub fn wait_until(what: &str, done: impl Fn() -> bool) {
    let end = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < end, "waited a minute for: {what}");
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// What waits in the stream.
pub fn unread(events: &EventStream) -> Vec<Event> {
    std::iter::from_fn(|| events.next_event()).collect()
}

/// The cause that the stream of one VM ends with.
pub fn next_cause(events: &EventStream) -> StopCause {
    let end = Instant::now() + LONG;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let event = events.wait_event(left).expect("the VM should report its end within a minute");
        if let EventKind::Stopped(cause) = event.kind {
            return cause;
        }
    }
}
