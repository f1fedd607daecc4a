//! Stock Debian kernels, unmodified, as guests.
//!
//! These need a KVM that can run them. Where this machine's cannot, the whole program moves into two labs
//! (`tests/lab/README.md`), says so, and answers with what came of it there; it never passes by skipping.
//! `cargo test --test linux -- FILTER` works as ever.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};

use libtest_mimic::{Arguments, Trial};

mod accounts;
mod assets;
mod backends;
mod backing;
mod balloon;
#[path = "../../examples/common/base64.rs"]
mod base64;
mod boot;
mod c;
mod cage;
mod devices;
mod disks;
mod drive;
mod ends;
mod guest;
#[path = "../guests/mod.rs"]
mod guests;
#[path = "../holdings/mod.rs"]
mod holdings;
mod many;
mod net;
#[path = "../guests/rogue.rs"]
mod rogue;
mod sandbox;
mod soak;
mod storage;
mod storm;
mod switch;
mod time;
mod vhost;
mod watchdog;
mod wiring;

/// Says which half of the trials, of two, a process runs: `0` or `1`. Absent where all are wanted.
const HALF: &str = "VMBED_LINUX_TESTS_HALF";
const HERE: &str = "VMBED_LINUX_TESTS_HERE";

fn main() -> ExitCode {
    if let Ok(part) = std::env::var(cage::PART) {
        match part.split_once(' ') {
            Some(("storm", swap)) => storm::inside(swap),
            Some(("share", _)) => accounts::share(),
            Some(("overhead", shape)) => accounts::inside(shape),
            _ => panic!("no part is called {part}"),
        }
        return ExitCode::SUCCESS;
    }
    let arguments = Arguments::from_args();
    if !arguments.list && std::env::var_os(HERE).is_none() {
        assets::prepare();
        c::prepare();
        soak::prepare();
        wiring::prepare();
        return elsewhere(&arguments);
    }
    let mut trials = Vec::new();
    accounts::add(&mut trials);
    backends::add(&mut trials);
    backing::add(&mut trials);
    balloon::add(&mut trials);
    boot::add(&mut trials);
    devices::add(&mut trials);
    disks::add(&mut trials);
    drive::add(&mut trials);
    ends::add(&mut trials);
    net::add(&mut trials);
    sandbox::add(&mut trials);
    soak::add(&mut trials);
    storm::add(&mut trials);
    switch::add(&mut trials);
    c::add(&mut trials);
    time::add(&mut trials);
    vhost::add(&mut trials);
    many::add(&mut trials);
    wiring::add(&mut trials);
    if let Some(half) = std::env::var(HALF).ok().and_then(|h| h.parse::<usize>().ok()) {
        let mut index = half;
        trials.retain(|_| {
            index += 1;
            index % 2 == 1
        });
    }
    let arguments = Arguments { test_threads: arguments.test_threads.or(Some(1)), ..arguments };
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Runs this program again where stock kernels boot: all at once on this machine, or half of the trials in
/// each of two labs, which have one CPU each.
fn elsewhere(arguments: &Arguments) -> ExitCode {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let place =
        Command::new(root.join("tests/lab/place")).output().expect("tests/lab/place cannot be started");
    eprint!("{}", String::from_utf8_lossy(&place.stderr));
    let halves: &[&str] = match &place.stdout[..] {
        b"lab\n" if arguments.filter.is_none() => &["0", "1"],
        _ => &[""],
    };
    let started: Vec<_> = halves.iter().map(|half| start(root, half)).collect();
    let ended: Vec<_> = started.into_iter().map(|child| std::thread::spawn(|| succeeds(child))).collect();
    // All of them, also after one has failed.
    let failed = ended.into_iter().map(|e| e.join().unwrap()).filter(|ok| !ok).count();
    if failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Passes on what a half says, in whole lines, and waits for its end.
fn succeeds(mut half: Child) -> bool {
    let lines = BufReader::new(half.stdout.take().expect("it is piped")).lines();
    lines.map_while(Result::ok).for_each(|line| println!("{line}"));
    half.wait().expect("waiting for what was started").success()
}

fn start(root: &Path, half: &str) -> Child {
    let program = std::env::current_exe().expect("this program's own path");
    Command::new(root.join("tests/lab/here-or-lab"))
        .env(
            "LAB_OPTIONS",
            format!("--memory 9G --timeout {} --attempts 3", watchdog::limit().as_secs() + 2100),
        )
        .args(["env", &format!("{HERE}=1"), &format!("{HALF}={half}")])
        .arg(program)
        .args(std::env::args_os().skip(1))
        .stdout(Stdio::piped())
        .spawn()
        .expect("tests/lab/here-or-lab cannot be started")
}

/// A trial by the name of its function's module and what it shows.
fn trial(name: impl Into<String>, run: impl FnOnce() + Send + 'static) -> Trial {
    let name = name.into();
    Trial::test(name.clone(), move || {
        watchdog::guarded(&name, run);
        Ok(())
    })
}
