//! The rows about a host that fails. (31's SIGBUS is in `tests/api/memory.rs`, in Rust, C and Python.)

use std::process::Command;

use vmbed::{BareBoot, Bytes, CpuMode, ErrorKind, Host, StopCause, VmConfig, VmState};

/// Says to this program, started anew, which of the trials below is its own.
const INSIDE: &str = "VMBED_HOSTILE_INSIDE";

/// Runs the trial `name` of this program in a process of its own, with these limits (prlimit(1)).
fn limited(name: &str, limits: &[&str]) {
    let mut command = Command::new("timeout");
    command.args(["--signal=KILL", "120", "prlimit"]).args(limits).arg(std::env::current_exe().unwrap());
    let output = command.args(["--exact", name, "--test-threads=1"]).env(INSIDE, "1").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{limits:?}: {output:?}");
}

/// Halts at once.
fn config(memory: Bytes) -> VmConfig {
    let mut config = VmConfig::bare(BareBoot::new(CpuMode::Real, 0x1000, [0xf4]));
    config.memory = memory;
    config
}

/// The memory of a VM is refused: how. One that is there already has not noticed, and one that is small enough is built.
fn refused(memory: Bytes, kind: ErrorKind, why: &str) {
    let host = Host::open().unwrap();
    let bystander = host.build(config(Bytes::mib(1))).unwrap();
    for _ in 0..20 {
        let error = host.build(config(memory)).unwrap_err();
        assert!(error.kind() == kind && error.to_string().contains(why), "{error:?}: {error}");
        assert_eq!(host.usage().vms, 1, "all of it was taken back");
    }
    for vm in [bystander, host.build(config(Bytes::mib(1))).unwrap()] {
        vm.start().unwrap();
        assert_eq!(vm.wait().unwrap(), StopCause::GuestHalt);
        assert_eq!(vm.state(), VmState::Stopped(StopCause::GuestHalt));
    }
}

#[test]
fn row_31_addresses_that_the_host_has_not() {
    if std::env::var_os(INSIDE).is_none() {
        return limited("host::row_31_addresses_that_the_host_has_not", &["--as=1000000000"]);
    }
    refused(Bytes::mib(1000), ErrorKind::Exhausted, "finding addresses for 1048576000 bytes of guest memory");
}

#[test]
fn row_31_a_memfd_that_may_not_be_so_large() {
    if std::env::var_os(INSIDE).is_none() {
        return limited("host::row_31_a_memfd_that_may_not_be_so_large", &["--fsize=2000000"]);
    }
    refused(Bytes::mib(4), ErrorKind::Exhausted, "RLIMIT_FSIZE");
}
