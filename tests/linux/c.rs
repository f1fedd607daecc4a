//! The C example boots stock kernels as the Rust one does: the same flags, the same exit statuses.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use libtest_mimic::Trial;

use crate::assets::{self, KERNELS};
use crate::devices::{TempFile, noise, sha256};
use crate::guest::base64;
use crate::trial;

pub fn add(trials: &mut Vec<Trial>) {
    for (name, script, status) in [
        ("poweroff", "poweroff -f", 0),
        ("reboot", "reboot -f", 2),
        ("panic", "echo c >/proc/sysrq-trigger; sleep 60", 3),
    ] {
        trials.push(trial(format!("c::{name}"), move || {
            let (ended, console) = boot(script, &[], b"");
            assert_eq!(ended, Some(status), "{console}");
        }));
    }
    trials.push(trial("c::disk_and_console", disk_and_console));
}

/// `examples/c/boot.c`, linked with the static library.
fn program() -> PathBuf {
    assets::directory().join("c/boot")
}

/// Builds it, before the lab is entered.
pub fn prepare() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let stage = assets::directory().join("c");
    std::fs::create_dir_all(&stage).unwrap();
    let mut make = Command::new("make");
    make.current_dir(root).args(["--silent", "install", "PREFIX=/usr", "PROFILE=debug"]);
    make.arg(format!("DESTDIR={}", stage.display())).env_remove("MAKEFLAGS").env_remove("MAKELEVEL");
    succeeds(&mut make);
    let mut cc = Command::new("cc");
    cc.current_dir(root).args(["-O1", "-g", "-I"]).arg(stage.join("usr/include")).arg("examples/c/boot.c");
    cc.arg(stage.join("usr/lib/libvmbed.a")).args(["-o"]).arg(program());
    succeeds(cc.args(["-lgcc_s", "-lutil", "-lrt", "-lpthread", "-lm", "-ldl"]));
}

fn succeeds(command: &mut Command) {
    let status = command.status().unwrap_or_else(|e| panic!("{command:?} cannot be started: {e}"));
    assert!(status.success(), "{command:?}: {status}");
}

/// Boots the first kernel with a script, and types `input` when that says `ready`; the exit status, and what
/// the console said.
fn boot(script: &str, options: &[&str], input: &[u8]) -> (Option<i32>, String) {
    let mut child = Command::new("timeout")
        .arg("240")
        .arg(program())
        .arg("--kernel")
        .arg(assets::kernel(KERNELS[0]))
        .arg("--initrd")
        .arg(assets::initrd(KERNELS[0]))
        .args(["--memory", "128M", "--cmdline"])
        .arg(format!("console=ttyS0 reboot=k panic=-1 quiet vmbed.run={}", base64(script.as_bytes())))
        .args(options)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take();
    let mut console = String::new();
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let line = line.unwrap().replace('\r', "");
        if line == "ready" {
            // Closed behind it: the guest goes on without.
            stdin.take().unwrap().write_all(input).unwrap();
        }
        console += &(line + "\n");
    }
    (child.wait().unwrap().code(), console)
}

fn disk_and_console() {
    let bytes = noise(5, 1 << 20);
    let disk = TempFile::new(&bytes);
    let script = "echo sum=$(sha256sum </dev/vda | cut -d' ' -f1); echo ready; read line; echo heard=$line";
    let disk = format!("{},ro", disk.path().display());
    let (status, console) = boot(script, &["--disk", &disk], b"a line\n");
    assert_eq!(status, Some(0), "{console}");
    assert!(console.contains(&format!("sum={}\n", sha256(&bytes))), "{console}");
    assert!(console.contains("heard=a line\n"), "{console}");
}
