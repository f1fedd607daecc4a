//! The sandbox of a VM's threads and of the one that reclaims memory: what is refused, what comes of it, and that nothing else is; the example that jails a process.

use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Trial};

mod bounds;
#[path = "../guests/mod.rs"]
mod guests;
mod jailed;
mod learn;
mod life;
mod rare;
mod reclaim;
mod refuse;

/// Says which part of this program a copy of it is.
const PART: &str = "VMBED_SANDBOX_TESTS_PART";

fn main() -> ExitCode {
    match std::env::var(PART).as_deref() {
        Ok("learn") => {
            learn::inside();
            return ExitCode::SUCCESS;
        }
        Ok("one arena") => {
            learn::one_arena();
            return ExitCode::SUCCESS;
        }
        Ok("files") => {
            refuse::files();
            return ExitCode::SUCCESS;
        }
        Ok("again") => {
            learn::again();
            return ExitCode::SUCCESS;
        }
        Ok("arena") => {
            bounds::arena();
            return ExitCode::SUCCESS;
        }
        Ok("blocked") => {
            bounds::blocked();
            return ExitCode::SUCCESS;
        }
        Ok("reclaim") => {
            reclaim::inside();
            return ExitCode::SUCCESS;
        }
        Ok(part) => panic!("no part is called {part}"),
        Err(_) => {}
    }
    let arguments = Arguments::from_args();
    let mut trials = Vec::new();
    learn::add(&mut trials);
    refuse::add(&mut trials);
    reclaim::add(&mut trials);
    bounds::add(&mut trials);
    jailed::add(&mut trials);
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn trial(name: &str, run: fn()) -> Trial {
    Trial::test(name, move || {
        run();
        Ok(())
    })
}

/// What a part of this program said, in a network namespace of its own, as root of it.
fn part(name: &str) -> String {
    let mut command = Command::new("unshare");
    command.args(["--net", "--map-root-user"]).arg(std::env::current_exe().expect("this program"));
    command.env(PART, name).stdin(Stdio::null());
    if name == "one arena" {
        command.env("MALLOC_ARENA_MAX", "1");
    }
    said(command, Duration::from_secs(300))
}

/// What a program said on both of its streams; it must end well, and within that time.
fn said(mut command: Command, time: Duration) -> String {
    let log = std::env::temp_dir().join(format!(
        "vmbed-sandbox-{}-{:?}",
        std::process::id(),
        std::thread::current().id()
    ));
    let file = std::fs::File::create(&log).expect("a file for what it says");
    command.stdout(file.try_clone().expect("again")).stderr(file);
    let mut child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    let end = Instant::now() + time;
    let status = loop {
        match child.try_wait().expect("waiting for it") {
            None if Instant::now() < end => std::thread::sleep(Duration::from_millis(5)),
            None => {
                let _ = child.kill();
                let _ = child.wait();
                break None;
            }
            ended => break ended,
        }
    };
    let text = String::from_utf8_lossy(&std::fs::read(&log).unwrap_or_default()).into_owned();
    let _ = std::fs::remove_file(log);
    match status {
        Some(status) if status.success() => text,
        Some(status) => panic!("{command:?}: {status}:\n{text}"),
        None => panic!("{command:?}: not ended after {time:?}:\n{text}"),
    }
}
