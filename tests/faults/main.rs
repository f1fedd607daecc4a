//! Any system call fails, is interrupted, or comes short: those of ours, of the standard library and of dependencies. A child of this program
//! lives through the life of a VM (`life.rs` has which there are), and one call of it is answered with an error, or with a part of what it was
//! to move (seccomp's user notifications). Then it must end within its deadline, without a panic, with what it had before, and where its guest was
//! told that something is on the disk, it is. Of what was interrupted or came short nobody hears.
//!
//! A trial for each kind of call, in the first life that has it, and for those of its calls that can come short in each of the first three.
//! `VMBED_FAULTS=all` has every kind in every life, and goes on until no call of the kind is left (`ENDLESS` are those that are never at an
//! end).

use std::collections::{BTreeMap, BTreeSet};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Trial};

mod driven;
#[path = "../guests/elf.rs"]
mod elf;
#[path = "../guests/mod.rs"]
mod guests;
#[path = "../holdings/mod.rs"]
mod holdings;
mod life;
mod others;
mod part;
mod sites;
mod supervisor;
mod wire;
mod words;

use life::{Life, Stage};
use part::Part;

/// What a child is told: how it lives, which kind of call, which of them, what that answers.
const FAULT: &str = "VMBED_FAULT";
const GUEST: &str = "VMBED_FAULT_GUEST";

/// Interrupted, out of something, broken, not now, forbidden.
const ERRORS: [i32; 5] = [libc::EINTR, libc::ENOMEM, libc::EIO, libc::EAGAIN, libc::EPERM];

/// Calls that a signal may end before they have done anything. They are made again, and nobody hears of it.
const INTERRUPTIBLE: [libc::c_long; 23] = [
    libc::SYS_read,
    libc::SYS_pread64,
    libc::SYS_readv,
    libc::SYS_preadv,
    libc::SYS_write,
    libc::SYS_pwrite64,
    libc::SYS_writev,
    libc::SYS_pwritev2,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_connect,
    libc::SYS_openat,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_poll,
    libc::SYS_epoll_wait,
    libc::SYS_io_uring_enter,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_getrandom,
];

/// What others make first for something else: the kernel's file, the bell of SIGBUS, the clock where a disk is saved, rtnetlink's answers, a
/// network in user space.
const AGAIN: [(Life, Kind); 5] = [
    (Life::Linux, Kind::of(libc::SYS_pread64, 0)),
    (Life::Memory, Kind::of(libc::SYS_read, 0)),
    (Life::Memory, Kind::of(libc::SYS_ioctl, KVM_SET_CLOCK)),
    (Life::Wired, Kind::of(libc::SYS_recvfrom, 0)),
    (Life::Sandboxed, Kind::of(libc::SYS_connect, 0)),
];

/// Calls that are made again and again for as long as a VM lives, all of them for the same: at an exit of its guest, at a turn of a loop, with a
/// kick, for a look of the reclaim's at the memory, for an eventfd or a frame. More than a hundred of them are the more of these.
const ENDLESS: [libc::c_long; 11] = [
    libc::SYS_epoll_wait,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_rt_sigpending,
    libc::SYS_sysinfo,
    libc::SYS_pread64,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
];
const KVM_RUN: u32 = 0xae80;
const KVM_SET_CLOCK: u32 = 0x4030_ae7b;
const PAGEMAP_SCAN: u32 = 0xc060_6610;

/// A kind of system call: its number, and for an ioctl what it asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    number: u32,
    request: u32,
}

impl Kind {
    /// Stands where an ioctl says what it asks for: those of the calls that can come short.
    const PART: u32 = u32::MAX;

    const fn of(number: libc::c_long, request: u32) -> Self {
        Self { number: number as u32, request }
    }

    /// `ioctl_0xae80`, `part_0` or the number; strace and the kernel's tables have the names.
    fn name(self) -> String {
        match (self.request, self.number as libc::c_long) {
            (Self::PART, number) => format!("part_{number}"),
            (request, libc::SYS_ioctl) => format!("ioctl_{request:#x}"),
            (_, number) => format!("call_{number}"),
        }
    }
}

/// What a call comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Error(i32),
    /// It does a part, and says how much.
    Part(Part),
}

impl Answer {
    const PARTS: [Self; 2] = [Self::Part(Part::Half), Self::Part(Part::Byte)];

    fn number(self) -> i64 {
        match self {
            Self::Error(error) => error.into(),
            Self::Part(Part::Half) => 0,
            Self::Part(Part::Byte) => -1,
            Self::Part(Part::Broken) => -2,
        }
    }

    fn of(number: i64) -> Self {
        match number {
            0 => Self::PARTS[0],
            -1 => Self::PARTS[1],
            -2 => Self::Part(Part::Broken),
            error => Self::Error(error as i32),
        }
    }

    /// Whether that is nothing that anybody should hear of.
    fn is_routine(self, kind: Kind) -> bool {
        let interrupts = self == Self::Error(libc::EINTR);
        interrupts && INTERRUPTIBLE.contains(&kind.number.into())
            || matches!(self, Self::Part(part) if part != Part::Broken)
    }
}

/// One call that does not do what it should.
#[derive(Clone, Copy, Debug)]
struct Fault {
    life: Life,
    kind: Kind,
    nth: u64,
    answer: Answer,
}

impl Fault {
    fn parse(text: &str) -> Self {
        let numbers: Vec<i64> = text.split(' ').map(|n| n.parse().expect("a number")).collect();
        let [life, number, request, nth, answer] = numbers[..] else { panic!("{text:?} is no fault") };
        let kind = Kind { number: number as u32, request: request as u32 };
        Self { life: Life::ALL[life as usize], kind, nth: nth as u64, answer: Answer::of(answer) }
    }

    fn text(&self) -> String {
        let Self { life, kind, nth, answer } = self;
        format!("{} {} {} {nth} {}", *life as usize, kind.number, kind.request, answer.number())
    }
}

/// Calls that were answered.
static FAULTS: AtomicU64 = AtomicU64::new(0);

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
    let mut trials = Vec::new();
    let (mut everywhere, mut calls) = (BTreeSet::<Kind>::new(), 0);
    for life in Life::ALL {
        // One without a fault: which calls there are.
        let said = child(&Fault { life, kind: Kind::default(), nth: 0, answer: Answer::Error(0) });
        assert!(
            said.contains("it went well") && !said.contains("MISSED"),
            "{life:?} without a fault:\n{said}"
        );
        let kinds = kinds(&said);
        let whole = kinds.iter().filter(|(kind, _)| kind.request != Kind::PART);
        calls += whole.map(|(_, count)| count).sum::<u64>();
        for (&kind, &count) in &kinds {
            // What another life has, too, is swept there.
            let several = kind.request == Kind::PART && life.has_parts() || AGAIN.contains(&(life, kind));
            if everywhere.insert(kind) || several || wants_all() {
                let name = format!("{}_{}", life.name(), kind.name());
                trials.push(Trial::test(name, move || {
                    sweep(life, kind, count);
                    Ok(())
                }));
            }
        }
    }
    let made = everywhere.clone();
    let kinds = everywhere.iter().filter(|kind| kind.request != Kind::PART).map(|kind| kind.name());
    let kinds: Vec<_> = kinds.collect();
    trials.push(Trial::test("calls_of_every_kind_are_made", move || {
        let parts = everywhere.iter().filter(|kind| kind.request == Kind::PART).count();
        assert!(everywhere.len() - parts > 45, "{} kinds of calls: {everywhere:?}", everywhere.len());
        assert!(parts > 7, "{parts} of them can come short: {everywhere:?}");
        Ok(())
    }));
    trials.push(Trial::test("every_place_that_calls_the_kernel_is_reached", move || {
        let wrong = sites::wrong(&made);
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        Ok(())
    }));
    let code = libtest_mimic::run(&arguments, trials).exit_code();
    let (lives, faults) = (Life::ALL.len(), FAULTS.load(Ordering::Relaxed));
    if faults > 0 {
        println!(
            "{lives} lives, {calls} calls of {} kinds, {faults} of them answered: {kinds:?}",
            kinds.len()
        );
    }
    let _ = std::fs::remove_file(guest);
    code
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

fn wants_all() -> bool {
    std::env::var("VMBED_FAULTS").is_ok_and(|which| which == "all")
}

/// What the `nth` of a kind answers, one life each.
fn answers(kind: Kind, nth: u64) -> Vec<Answer> {
    if kind.request == Kind::PART {
        let rings = i64::from(kind.number) == libc::SYS_io_uring_enter;
        let broken = rings.then_some(Answer::Part(Part::Broken));
        return Answer::PARTS.into_iter().chain(broken).collect();
    }
    // Another one for each kind, and for the next of the same.
    let other = ERRORS[1 + (u64::from(kind.number) + nth) as usize % 4];
    let errors = match nth {
        1 if wants_all() => ERRORS.to_vec(),
        2 if !wants_all() => vec![other],
        _ => vec![libc::EINTR, other],
    };
    errors.into_iter().map(Answer::Error).collect()
}

fn sweep(life: Life, kind: Kind, count: u64) {
    // Of many that are alike, the first ones.
    let most = if !wants_all() {
        count.min(2)
    } else if ENDLESS.contains(&kind.number.into()) || [KVM_RUN, PAGEMAP_SCAN].contains(&kind.request) {
        count.min(100)
    } else {
        count
    };
    let (mut hit, mut wrong) = (0, Vec::new());
    let told = format!("told of {}\n", Part::ERROR);
    for nth in 1..=most {
        for answer in answers(kind, nth) {
            let fault = Fault { life, kind, nth, answer };
            let said = child(&fault);
            let answered = u64::from(said.lines().any(|line| line == "hit"));
            hit += answered;
            FAULTS.fetch_add(answered, Ordering::Relaxed);
            let bad =
                |line: &&str| ["LEAK", "PANIC", "STUCK", "LOST", "HANGS"].iter().any(|w| line.contains(w));
            if let Some(line) = said.lines().find(bad) {
                wrong.push(format!("{fault:?}: {line}\n{said}"));
            } else if !said.contains("done") {
                wrong.push(format!("{fault:?}: it ended before it was done:\n{said}"));
            } else if let Some(error) = unnamed(&said, kind, answer) {
                wrong.push(format!("{fault:?}: it does not say what failed: {error}\n{said}"));
            } else if answer == Answer::Part(Part::Broken) && !said.contains(&told) {
                wrong.push(format!("{fault:?}: its embedder was not told:\n{said}"));
            } else if answer.is_routine(kind) && (!said.contains("it went well") || said.contains("MISSED")) {
                wrong.push(format!("{fault:?}: that is none of its user's business:\n{said}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{} of them:\n{}", wrong.len(), wrong.join("\n"));
    assert!(hit > 0, "none of the calls was made");
}

/// An error that does not say what was tried and what the kernel answered.
fn unnamed(said: &str, kind: Kind, answer: Answer) -> Option<&str> {
    let Answer::Error(errno) = answer else { return None };
    let error = said.lines().find_map(|line| line.strip_prefix("error: "))?;
    (!words::say(error, kind, errno)).then_some(error)
}

/// One life; what it said, on both of its streams.
fn child(fault: &Fault) -> String {
    let program = std::env::current_exe().expect("this program");
    let mut command = Command::new(&program);
    if fault.life == Life::Wired {
        command = Command::new("unshare");
        command.args(["--net", "--map-root-user"]).arg(program);
    }
    command.env(FAULT, fault.text()).stdin(Stdio::null());
    let log = std::env::temp_dir().join(format!(
        "vmbed-fault-{}-{:?}",
        std::process::id(),
        std::thread::current().id()
    ));
    let file = std::fs::File::create(&log).expect("a file for what it says");
    command.stdout(file.try_clone().expect("again")).stderr(file);
    let mut child = command.spawn().expect("this program starts");
    let end = Instant::now() + Duration::from_secs(180);
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
    // Where it could not.
    let _ = std::fs::remove_dir_all(Stage::path(child.id()));
    match ended {
        Some(status) if status.success() => said,
        Some(status) => format!("{said}\nit ended with {status}: PANIC or worse"),
        None => format!("{said}\nHANGS: not ended after three minutes"),
    }
}
