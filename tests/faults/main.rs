//! Any system call fails: those of ours, of the standard library and of dependencies. A child of this program lives through the life of a VM
//! with a disk, a card and a balloon, and one call of it is answered with an error (seccomp's user notifications). Then it must end within
//! its deadline, without a panic, with what it had before, and where its guest was told that something is on the disk, it is.
//!
//! A trial for each kind of call. `VMBED_FAULTS=all` goes on until no call of the kind is left.

use std::collections::BTreeMap;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Trial};

#[path = "../guests/mod.rs"]
mod guests;
mod life;
mod supervisor;

/// What a child is told: which kind of call, which of them, what it answers.
const FAULT: &str = "VMBED_FAULT";
const GUEST: &str = "VMBED_FAULT_GUEST";

/// Interrupted, out of something, broken, not now, forbidden.
const ERRORS: [i32; 5] = [libc::EINTR, libc::ENOMEM, libc::EIO, libc::EAGAIN, libc::EPERM];

/// A kind of system call: its number, and for an ioctl what it asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    number: u32,
    request: u32,
}

/// One call that fails.
#[derive(Clone, Copy, Debug)]
struct Fault {
    kind: Kind,
    nth: u64,
    error: i32,
}

impl Fault {
    fn parse(text: &str) -> Self {
        let numbers: Vec<u64> = text.split(' ').map(|n| n.parse().expect("a number")).collect();
        let [number, request, nth, error] = numbers[..] else { panic!("{text:?} is no fault") };
        Self { kind: Kind { number: number as u32, request: request as u32 }, nth, error: error as i32 }
    }
}

fn main() -> ExitCode {
    if let Ok(fault) = std::env::var(FAULT) {
        life::lead(Fault::parse(&fault));
        return ExitCode::SUCCESS;
    }
    let arguments = Arguments::from_args();
    let guest = guests::virtio(std::path::Path::new(env!("CARGO_TARGET_TMPDIR")));
    // SAFETY: no other thread is there yet.
    #[expect(unsafe_code, reason = "set_var is unsafe beside other threads")]
    unsafe {
        std::env::set_var(GUEST, &guest);
    }
    // A life without a fault: which calls there are.
    let whole = child(&Fault { kind: Kind::default(), nth: 0, error: 0 });
    let kinds = kinds(&whole);
    let trials = kinds.iter().map(|(kind, count)| {
        let (kind, count) = (*kind, *count);
        Trial::test(name(kind), move || {
            sweep(kind, count);
            Ok(())
        })
    });
    let mut trials: Vec<_> = trials.collect();
    trials.push(Trial::test("calls_of_every_kind_are_made", move || {
        assert!(kinds.len() > 45, "{} kinds of calls: {kinds:?}", kinds.len());
        Ok(())
    }));
    let code = libtest_mimic::run(&arguments, trials).exit_code();
    let _ = std::fs::remove_file(guest);
    code
}

/// `ioctl(0xae80)` or the number; strace and the kernel's tables have the names.
fn name(kind: Kind) -> String {
    match kind.number as libc::c_long {
        libc::SYS_ioctl => format!("ioctl_{:#x}", kind.request),
        number => format!("call_{number}"),
    }
}

/// What a child said of the calls that it made.
fn kinds(said: &str) -> BTreeMap<Kind, u64> {
    let lines = said.lines().filter_map(|line| line.strip_prefix("made "));
    lines
        .map(|line| {
            let numbers: Vec<u64> = line.split(' ').map(|n| n.parse().unwrap()).collect();
            (Kind { number: numbers[0] as u32, request: numbers[1] as u32 }, numbers[2])
        })
        .collect()
}

fn sweep(kind: Kind, count: u64) {
    let all = std::env::var("VMBED_FAULTS").is_ok_and(|which| which == "all");
    // Of many that are alike (a vCPU that goes on, a loop that waits), the first ones.
    let most = if all { count.min(200) } else { count.min(2) };
    let (mut hit, mut wrong) = (0, Vec::new());
    for nth in 1..=most {
        let errors = match nth {
            1 if all => &ERRORS[..],
            1 => &ERRORS[..3],
            _ => &ERRORS[nth as usize % 5..][..1],
        };
        for error in errors {
            let fault = Fault { kind, nth, error: *error };
            let said = child(&fault);
            hit += u64::from(said.contains("hit"));
            let bad =
                |line: &&str| ["LEAK", "PANIC", "STUCK", "LOST", "HANGS"].iter().any(|w| line.contains(w));
            if let Some(line) = said.lines().find(bad) {
                wrong.push(format!("{fault:?}: {line}\n{said}"));
            } else if !said.contains("done") {
                wrong.push(format!("{fault:?}: it ended before it was done:\n{said}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of them:\n{}", wrong.len(), wrong.join("\n"));
    assert!(hit > 0, "none of the calls was made");
}

/// One life; what it said, on both of its streams.
fn child(fault: &Fault) -> String {
    let Fault { kind, nth, error } = fault;
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.env(FAULT, format!("{} {} {nth} {error}", kind.number, kind.request)).stdin(Stdio::null());
    let log = std::env::temp_dir().join(format!(
        "vmbed-fault-{}-{:?}",
        std::process::id(),
        std::thread::current().id()
    ));
    let file = std::fs::File::create(&log).expect("a file for what it says");
    command.stdout(file.try_clone().expect("again")).stderr(file);
    let mut child = command.spawn().expect("this program starts");
    let end = Instant::now() + Duration::from_secs(60);
    let ended = loop {
        if let Some(status) = child.try_wait().expect("waiting for it") {
            break Some(status);
        }
        if Instant::now() > end {
            let _ = child.kill();
            let _ = child.wait();
            break None;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let said = String::from_utf8_lossy(&std::fs::read(&log).unwrap_or_default()).into_owned();
    let _ = std::fs::remove_file(log);
    match ended {
        Some(status) if status.success() => said,
        Some(status) => format!("{said}\nit ended with {status}: PANIC or worse"),
        None => format!("{said}\nHANGS: not ended after a minute"),
    }
}
