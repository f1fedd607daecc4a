//! The C example and the Python one boot stock kernels as the Rust one does: the same flags, the same exit statuses.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use libtest_mimic::Trial;

use crate::assets::{self, KERNELS};
use crate::devices::{TempFile, noise, sha256};
use crate::guest::base64;
use crate::trial;

/// What begins the example's command in a language.
type Example = fn() -> Command;

pub fn add(trials: &mut Vec<Trial>) {
    for (name, script, status) in [
        ("poweroff", "poweroff -f", 0),
        ("reboot", "reboot -f", 2),
        ("panic", "echo c >/proc/sysrq-trigger; sleep 60", 3),
    ] {
        trials.push(trial(format!("c::{name}"), move || ends(c, script, status)));
        if status > 0 {
            trials.push(trial(format!("python::{name}"), move || ends(python, script, status)));
        }
    }
    trials.push(trial("c::disk_and_console", || disk_and_console(c)));
    trials.push(trial("python::disk_and_console", || disk_and_console(python)));
}

fn ends(example: Example, script: &str, status: i32) {
    let (ended, console) = boot(example, script, &[], b"");
    assert_eq!(ended, Some(status), "{console}");
}

fn c() -> Command {
    Command::new(program())
}

/// `examples/python/boot.py`, in an environment with the package.
fn python() -> Command {
    let mut python = Command::new(environment().join("bin/python"));
    python.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/python/boot.py"));
    python
}

fn environment() -> PathBuf {
    assets::directory().join("python")
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
    // Made anew each time: an old package would be tested otherwise.
    let _ = std::fs::remove_dir_all(environment());
    succeeds(Command::new("python3").args(["-m", "venv"]).arg(environment()));
    let mut pip = Command::new(environment().join("bin/pip"));
    pip.args(["--quiet", "--disable-pip-version-check", "install"]).arg(root.join("python"));
    pip.env("VMBED_LIBRARY", stage.join("usr/lib/libvmbed.so")).env_remove("MAKEFLAGS");
    succeeds(&mut pip);
}

fn succeeds(command: &mut Command) {
    let status = command.status().unwrap_or_else(|e| panic!("{command:?} cannot be started: {e}"));
    assert!(status.success(), "{command:?}: {status}");
}

/// Boots the first kernel with a script, and types `input` when that says `ready`; the exit status, and what
/// the console said.
fn boot(example: Example, script: &str, options: &[&str], input: &[u8]) -> (Option<i32>, String) {
    let example = example();
    let mut child = Command::new("timeout")
        .arg("240")
        .arg(example.get_program())
        .args(example.get_args())
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

fn disk_and_console(example: Example) {
    let bytes = noise(5, 1 << 20);
    let disk = TempFile::new(&bytes);
    let script = "echo sum=$(sha256sum </dev/vda | cut -d' ' -f1); echo ready; read line; echo heard=$line";
    let disk = format!("{},ro", disk.path().display());
    let (status, console) = boot(example, script, &["--disk", &disk], b"a line\n");
    assert_eq!(status, Some(0), "{console}");
    assert!(console.contains(&format!("sum={}\n", sha256(&bytes))), "{console}");
    assert!(console.contains("heard=a line\n"), "{console}");
}
