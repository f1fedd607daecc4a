//! A stock kernel with a busybox initrd and a script to run, and what its console says.

use std::time::{Duration, Instant};

use vmbed::{Bytes, EventKind, Host, LinuxBoot, StopCause, Vm, VmBuilder, VmConfig};

use crate::assets;
pub use crate::base64::base64;

/// No guest of these tests takes longer, even in the lab with its neighbours.
pub const LONG: Duration = Duration::from_secs(240);

/// A PC with one vCPU and 128 MiB that boots `kernel` and runs `script`.
pub fn config(kernel: &str, script: &str) -> VmConfig {
    let cmdline =
        format!("console=ttyS0 reboot=k panic=-1 quiet loglevel=4 vmbed.run={}", base64(script.as_bytes()));
    let boot = LinuxBoot::new(assets::kernel(kernel)).initrd(assets::initrd(kernel)).cmdline(cmdline);
    let mut config = VmConfig::linux(boot);
    config.memory = Bytes::mib(128);
    config
}

/// A guest that runs.
pub struct Guest {
    pub vm: Vm,
}

impl Guest {
    pub fn start(config: VmConfig) -> Self {
        Self::start_with(config, |builder| builder)
    }

    pub fn start_on(host: &Host, config: VmConfig) -> Self {
        let vm = host.build(config).unwrap();
        vm.start().unwrap();
        Self { vm }
    }

    pub fn start_with(config: VmConfig, attach: impl FnOnce(VmBuilder) -> VmBuilder) -> Self {
        let vm = attach(Host::open().unwrap().builder(config)).build().unwrap();
        vm.start().unwrap();
        Self { vm }
    }

    /// All of the console, as text.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&self.vm.console_tail()).replace('\r', "")
    }

    /// Waits until the console shows `text`.
    pub fn wait_for(&self, text: &str) {
        let end = Instant::now() + LONG;
        while !self.console().contains(text) {
            let ended = self.vm.wait_timeout(Duration::from_millis(20)).unwrap();
            if let (Some(cause), false) = (&ended, self.console().contains(text)) {
                panic!("the guest ended ({cause}) before it said {text:?}:\n{}", self.console());
            }
            assert!(Instant::now() < end, "waited {LONG:?} for {text:?} on the console:\n{}", self.console());
        }
    }

    /// Waits for the end, and requires its event.
    pub fn end(&self) -> StopCause {
        let cause = self.vm.wait_timeout(LONG).unwrap();
        let cause =
            cause.unwrap_or_else(|| panic!("the guest has not ended in {LONG:?}:\n{}", self.console()));
        let events: Vec<_> = std::iter::from_fn(|| self.vm.events().next_event()).map(|e| e.kind).collect();
        assert_eq!(events.first(), Some(&EventKind::Started));
        assert_eq!(events.last(), Some(&EventKind::Stopped(cause.clone())), "{events:?}");
        cause
    }

    /// Waits for a power-off, and returns what the script printed.
    pub fn power_off(&self) -> String {
        let cause = self.end();
        assert_eq!(cause, StopCause::GuestPoweroff, "{}", self.console());
        self.console()
    }

    /// Has a script that does [as it is told](crate::net::TOLD) run these steps; what `$said` is then. Each key is new.
    pub fn told(&self, steps: &str, key: &str) -> String {
        self.vm.console_input(format!("{steps}; echo {key}=$said\n").as_bytes());
        self.value(key)
    }

    /// What follows `key=` on a line of the console.
    pub fn value(&self, key: &str) -> String {
        let prefix = format!("\n{key}=");
        // To the line's end: the guest may still be writing it.
        let whole = |console: &str| {
            let (_, rest) = console.split_once(&prefix)?;
            rest.split_once('\n').map(|(value, _)| value.trim().to_owned())
        };
        let end = Instant::now() + LONG;
        loop {
            let ended = self.vm.wait_timeout(Duration::from_millis(20)).unwrap().is_some();
            let console = format!("\n{}", self.console());
            if let Some(value) = whole(&console) {
                return value;
            }
            assert!(!console.contains("\nwrong="), "waited for a line {key}= on the console:\n{console}");
            assert!(!ended && Instant::now() < end, "waited for a line {key}= on the console:\n{console}");
        }
    }
}
