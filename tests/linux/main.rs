//! Stock Debian kernels, unmodified, as guests.
//!
//! These need a KVM that can run them. Where this machine's cannot, the whole program moves into the lab
//! (`tests/lab/README.md`), says so, and answers with what came of it there; it never passes by skipping.
//! `cargo test --test linux -- FILTER` works as ever.

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use libtest_mimic::{Arguments, Trial};

mod assets;
mod boot;
mod devices;
mod ends;
mod guest;
mod many;
mod net;
mod time;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    if !arguments.list && std::env::var_os("VMBED_LINUX_TESTS_HERE").is_none() {
        assets::prepare();
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let program = std::env::current_exe().expect("this program's own path");
        let error = Command::new(root.join("tests/lab/here-or-lab"))
            .env("LAB_OPTIONS", "--memory 9G --timeout 1500")
            .env("VMBED_LINUX_TESTS_HERE", "1")
            .arg("env")
            .arg("VMBED_LINUX_TESTS_HERE=1")
            .arg(program)
            .args(std::env::args_os().skip(1))
            .exec();
        panic!("tests/lab/here-or-lab cannot be started: {error}");
    }
    let mut trials = Vec::new();
    boot::add(&mut trials);
    devices::add(&mut trials);
    ends::add(&mut trials);
    net::add(&mut trials);
    time::add(&mut trials);
    many::add(&mut trials);
    let arguments = Arguments { test_threads: arguments.test_threads.or(Some(2)), ..arguments };
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// A trial by the name of its function's module and what it shows.
fn trial(name: impl Into<String>, run: impl FnOnce() + Send + 'static) -> Trial {
    Trial::test(name, move || {
        run();
        Ok(())
    })
}
