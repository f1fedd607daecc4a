//! Stock Debian kernels, unmodified, as guests.
//!
//! These need a KVM that can run them. Where this machine's cannot, the whole program moves into two labs
//! (`tests/lab/README.md`), says so, and answers with what came of it there; it never passes by skipping.
//! `cargo test --test linux -- FILTER` works as ever.

use std::io::{BufRead, BufReader};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Instant;

use libtest_mimic::{Arguments, Completion, Trial};

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
mod failing;
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
mod share;
mod soak;
mod storage;
mod storm;
mod switch;
mod time;
mod vhost;
mod watchdog;
mod wiring;

const HERE: &str = "VMBED_LINUX_TESTS_HERE";
/// What takes minutes in a lab.
const LONG: [&str; 4] = ["disks::others_programs", "soak::guests", "storm::", "vhost::"];

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
        backing::prepare();
        soak::prepare();
        switch::prepare();
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
    failing::add(&mut trials);
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
    // Those that take minutes begin first, so that no lab is alone with one in the end.
    trials.sort_by_key(|trial| !LONG.iter().any(|long| trial.name().starts_with(long)));
    let arguments = Arguments { test_threads: arguments.test_threads.or(Some(1)), ..arguments };
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Runs this program again where stock kernels boot: all at once on this machine, or in two labs, which have one CPU each.
fn elsewhere(arguments: &Arguments) -> ExitCode {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let place =
        Command::new(root.join("tests/lab/place")).output().expect("tests/lab/place cannot be started");
    eprint!("{}", String::from_utf8_lossy(&place.stderr));
    if place.stdout != b"lab\n" || arguments.filter.is_some() {
        return if succeeds(start(root, None)) { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let directory = assets::directory().join(format!("out/trials-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("a directory that the labs share");
    let started = ["0", "1"].map(|lab| start(root, Some((&directory, lab))));
    let ended = started.map(|child| std::thread::spawn(|| succeeds(child)));
    // Both of them, also after one has failed.
    let good = ended.map(|e| e.join().unwrap()) == [true; 2];
    let (passed, not) = share::outcome(&directory);
    println!("{} trials passed in two labs; seconds of each part: {:?}", passed.len(), share::parts(&passed));
    println!("the slowest: {:?}", &passed[..passed.len().min(12)]);
    not.iter().for_each(|trial| println!("{trial} did not pass"));
    let _ = std::fs::remove_dir_all(&directory);
    if good && not.is_empty() && !passed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Passes on what a lab says, in whole lines, and waits for its end.
fn succeeds(mut lab: Child) -> bool {
    let lines = BufReader::new(lab.stdout.take().expect("it is piped")).lines();
    lines.map_while(Result::ok).for_each(|line| println!("{line}"));
    lab.wait().expect("waiting for what was started").success()
}

fn start(root: &Path, shared: Option<(&Path, &str)>) -> Child {
    let program = std::env::current_exe().expect("this program's own path");
    let mut command = Command::new(root.join("tests/lab/here-or-lab"));
    if let Some((directory, lab)) = shared {
        command.env(share::DIRECTORY, directory).env(share::LAB, lab);
    }
    command
        .env(
            "LAB_OPTIONS",
            format!("--memory 9G --timeout {} --attempts 3", watchdog::limit().as_secs() + 2100),
        )
        .args(["env", &format!("{HERE}=1")])
        .arg(program)
        .args(std::env::args_os().skip(1))
        .stdout(Stdio::piped())
        .spawn()
        .expect("tests/lab/here-or-lab cannot be started")
}

/// A trial by the name of its function's module and what it shows.
fn trial(name: impl Into<String>, run: impl FnOnce() + Send + 'static) -> Trial {
    let name = name.into();
    Trial::ignorable_test(name.clone(), move || {
        let Some(share) = share::Share::given() else {
            watchdog::guarded(&name, run);
            return Ok(Completion::Completed);
        };
        match share.turn(&name) {
            share::Turn::Done(why) => return Ok(Completion::ignored_with(why)),
            share::Turn::Failed => return Err("it failed before this lab's new start".into()),
            share::Turn::Mine => {}
        }
        let began = Instant::now();
        let ended = catch_unwind(AssertUnwindSafe(|| watchdog::guarded(&name, run)));
        share.say(&name, ended.is_ok(), began.elapsed());
        ended.map_or_else(|panic| resume_unwind(panic), |()| Ok(Completion::Completed))
    })
}
