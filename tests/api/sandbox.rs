//! The sandbox of a VM's threads, as embedders ask for it; tests/sandbox has what it refuses.

use std::sync::Arc;

use vmbed::{ErrorKind, SandboxConfig, StopCause, VmState};

use crate::guest::{Port, SPINS, host, real};

pub fn a_sandbox_for_its_threads() {
    let host = host();
    let mut config = real(&SPINS);
    assert_eq!(host.build(config.clone()).unwrap().sandbox(), None);
    config.sandbox = Some(SandboxConfig::default());
    let vm = host.build(config.clone()).unwrap();
    let report = vm.sandbox().unwrap();
    assert_eq!((&report.threads[..], report.seccomp), (&["vmbed-vcpu0".to_owned()][..], true));
    assert!(report.landlock.is_some_and(|version| version > 0), "{report:?}");
    vm.start().unwrap();
    vm.pause().unwrap();
    vm.resume().unwrap();
    assert_eq!(vm.state(), VmState::Running);
    assert_eq!(vm.stop().unwrap(), StopCause::HostStop);
    // A device of ours would run there.
    let with_device =
        |config| host.builder(config).pio_device("port", 0x10, 1, Arc::new(Port::default())).build();
    let error = with_device(config.clone()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    assert!(error.fields()[0].field == "sandbox.vcpus" && error.to_string().contains("'port'"), "{error}");
    config.sandbox.as_mut().unwrap().vcpus = false;
    let report = with_device(config).unwrap().sandbox().unwrap();
    assert!(report.threads.is_empty() && !report.seccomp, "{report:?}");
}
