//! The kernels and initrds that the guests boot, made before the lab is entered.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Where `tests/assets` keeps what it makes.
pub fn directory() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    target.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("target")).join("lab")
}

pub const KERNELS: [&str; 3] = ["6.1-cloud", "6.12-cloud", "6.1-generic"];

pub fn kernel(name: &str) -> PathBuf {
    directory().join(format!("assets/kernel-{name}/vmlinuz"))
}

/// A busybox initrd with that kernel's virtio modules; it runs the script on its command line.
pub fn initrd(name: &str) -> PathBuf {
    directory().join(format!("test-{name}.cpio"))
}

/// Fetches kernels and makes initrds, as far as they are missing.
pub fn prepare() {
    run("fetch", &[]);
    for name in KERNELS {
        let kernel = directory().join(format!("assets/kernel-{name}"));
        let out = initrd(name);
        if !out.exists() {
            run("busybox-initrd", &[kernel.to_str().unwrap(), out.to_str().unwrap()]);
        }
    }
    let (kernel, out) = (directory().join("assets/kernel-6.1-cloud"), directory().join("test-disks.img"));
    run("disk-tools", &[kernel.to_str().unwrap(), out.to_str().unwrap()]);
}

fn run(script: &str, arguments: &[&str]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/assets").join(script);
    let status = Command::new(&path).args(arguments).status().expect("tests/assets cannot be started");
    assert!(status.success(), "tests/assets/{script} {arguments:?}: {status}");
}
