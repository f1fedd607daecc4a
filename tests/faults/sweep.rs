//! One kind of call in one life, again and again, each time with another one that fails.

use std::collections::{BTreeMap, BTreeSet};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::callers::LOST;
use crate::life::{Life, Stage, lock};
use crate::part::Part;
use crate::places::Places;
use crate::{ANYWHERE, Answer, FAULT, Fault, Kind, Then, machine, words};

/// Interrupted, out of something, broken, not now, forbidden.
const ERRORS: [i32; 5] = [libc::EINTR, libc::ENOMEM, libc::EIO, libc::EAGAIN, libc::EPERM];

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
pub const PAGEMAP_SCAN: u32 = 0xc060_6610;

/// Calls that were answered.
pub static FAULTS: AtomicU64 = AtomicU64::new(0);
/// The places of which a call was answered.
pub static HITS: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());
/// Life, kind and place of which none of five tries was answered.
pub static MISSED: Mutex<Vec<String>> = Mutex::new(Vec::new());
/// The places that lives with a fault come by.
pub static AFTER: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());
/// The places that lives without a fault come by.
pub static LIVED: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());
/// Of the others, those that have failed after another failure.
static THEN: Mutex<BTreeSet<Then>> = Mutex::new(BTreeSet::new());
/// The kinds of calls that come from no place.
pub static NOBODYS: Mutex<BTreeSet<Kind>> = Mutex::new(BTreeSet::new());

/// How many calls come from which place.
pub type Counts = BTreeMap<u32, u64>;
/// What a child said of the calls that it made.
pub fn kinds(said: &str) -> BTreeMap<Kind, Counts> {
    let mut kinds = BTreeMap::<Kind, Counts>::new();
    for line in said.lines().filter_map(|line| line.strip_prefix("made ")) {
        let numbers: Vec<u64> = line.split(' ').map(|n| n.parse().unwrap()).collect();
        let kind = Kind { number: numbers[0] as u32, request: numbers[1] as u32 };
        kinds.entry(kind).or_default().insert(numbers[2] as u32, numbers[3]);
    }
    kinds
}

/// Whether that is what `VMBED_FAULTS` asks for.
pub fn wants(what: &str) -> bool {
    std::env::var("VMBED_FAULTS").is_ok_and(|which| which == what)
}

/// Another one for each kind, and for the next of the same.
fn error_of(kind: Kind, nth: u64) -> i32 {
    ERRORS[1 + (u64::from(kind.number) + nth) as usize % 4]
}

/// That of a second call, which is another one.
pub fn error_after(answer: Answer) -> i32 {
    if answer == Answer::Error(libc::EIO) { libc::EPERM } else { libc::EIO }
}

/// What the `nth` of a kind answers, one life each.
fn answers(life: Life, kind: Kind, nth: u64) -> Vec<Answer> {
    if kind.request == Kind::PART {
        let rings = i64::from(kind.number) == libc::SYS_io_uring_enter;
        // What was given up, of which nobody is told any more, is all that this life has.
        let broken = (rings && life != Life::Held).then_some(Answer::Part(Part::Broken));
        return Answer::PARTS.into_iter().chain(broken).collect();
    }
    let mut errors =
        if nth == 1 && wants("all") { ERRORS.to_vec() } else { vec![libc::EINTR, error_of(kind, nth)] };
    if i64::from(kind.number) == libc::SYS_fallocate {
        // File systems without holes.
        errors.push(libc::EOPNOTSUPP);
    }
    if i64::from(kind.number) == libc::SYS_openat {
        // As where there is no KVM.
        errors.push(libc::ENOENT);
    }
    if kind.request == PAGEMAP_SCAN {
        // Kernels before 6.7.
        errors.push(libc::ENOTTY);
    }
    errors.into_iter().map(Answer::Error).collect()
}

/// Which calls of a kind are answered, and from where: the first of each place; of `VMBED_FAULTS=all`, all.
fn which(kind: Kind, from: &Counts) -> Vec<(u32, u64)> {
    let first = |most: u64| {
        let of = move |(place, count): (&u32, &u64)| {
            (1..=most.min(*count)).map(move |nth| (*place, nth)).collect::<Vec<_>>()
        };
        from.iter().filter(|(place, _)| **place != ANYWHERE).flat_map(of).collect::<Vec<_>>()
    };
    if !wants("all") {
        return first(1);
    }
    // In the lab, and in the life that takes seconds, of a kind that is swept elsewhere, its own places alone.
    let Some(all) = from.get(&ANYWHERE).copied() else { return first(100) };
    if ENDLESS.contains(&kind.number.into()) || [KVM_RUN, PAGEMAP_SCAN].contains(&kind.request) {
        // Of many that are alike, the first ones.
        let more = first(if all > 100 { 10 } else { 0 });
        return (1..=all.min(100)).map(|nth| (ANYWHERE, nth)).chain(more).collect();
    }
    (1..=all).map(|nth| (ANYWHERE, nth)).collect()
}

pub fn sweep(life: Life, kind: Kind, from: &Counts, places: &Places) {
    let mut tries = Tries { places, hit: 0, wrong: Vec::new(), missed: BTreeSet::new() };
    for (place, nth) in which(kind, from) {
        for answer in answers(life, kind, nth) {
            let fault = Fault { life, kind, place, nth, answer, then: None };
            let mut others = after(&tries.make(&fault));
            // What is come by only in one of these is tried in its turn.
            while let Some(then) = others.pop() {
                let made = tries.make(&Fault { then: Some(then), ..fault });
                others.extend(after(&made));
            }
        }
    }
    let name = |place: &String| format!("{} {} {place}", life.name(), kind.name());
    lock(&MISSED).extend(tries.missed.iter().map(name));
    assert!(tries.wrong.is_empty(), "{} of them:\n{}", tries.wrong.len(), tries.wrong.join("\n"));
    assert!(tries.hit > 0, "none of the calls was made");
}

/// What comes of one kind in one life.
struct Tries<'a> {
    places: &'a Places,
    hit: usize,
    wrong: Vec<String>,
    missed: BTreeSet<String>,
}

impl Tries<'_> {
    /// One life with that fault; which calls there were.
    fn make(&mut self, fault: &Fault) -> BTreeMap<Kind, Counts> {
        let mut said = child(fault);
        // What threads do together they do in another order now and then.
        for _ in 0..4 {
            if is_wrong(&said, fault).is_none() && hits(&said).len() <= fault.then.iter().len() {
                said = child(fault);
            }
        }
        let hits = hits(&said);
        if hits.is_empty() && !fault.answer.is_quiet() {
            self.missed.insert(self.places.name(fault.place));
        }
        if hits.len() == 2 {
            lock(&THEN).extend(fault.then);
        }
        // Nobody hears of an interruption, nor of what comes short: that does not count as a failure.
        lock(&HITS).extend(hits.iter().skip(fault.answer.is_quiet().into()));
        self.hit += hits.len();
        FAULTS.fetch_add(hits.len() as u64, Ordering::Relaxed);
        let made = kinds(&said);
        lock(&AFTER).extend(made.values().flat_map(|from| from.keys()));
        lock(&NOBODYS).extend(made.iter().filter(|(_, from)| from.contains_key(&0)).map(|(kind, _)| kind));
        if let Some(what) = is_wrong(&said, fault) {
            let place = self.places.name(fault.place);
            let then = fault.then.map(|(_, place)| format!(", then {}", self.places.name(place)));
            self.wrong.push(format!("{fault:?}, from {place}{}: {what}\n{said}", then.unwrap_or_default()));
        }
        made
    }
}

/// Where calls came from that failed.
fn hits(said: &str) -> Vec<u32> {
    said.lines().filter_map(|line| line.strip_prefix("hit ")?.parse().ok()).collect()
}

/// The calls from places that no life without a fault comes by, and that have not failed yet: a few times, if they are not made again.
fn after(made: &BTreeMap<Kind, Counts>) -> Vec<Then> {
    const MOST: u32 = 5;
    static ASKED: Mutex<BTreeMap<Then, u32>> = Mutex::new(BTreeMap::new());
    let (lived, then, mut asked) = (lock(&LIVED), lock(&THEN), lock(&ASKED));
    let kinds = made.iter().filter(|(kind, _)| ![Kind::PART, Kind::KEPT].contains(&kind.request));
    let calls = kinds.flat_map(|(kind, from)| from.keys().map(|place| (*kind, *place)));
    let is_place = |place: u32| ![0, LOST, ANYWHERE].contains(&place) && !lived.contains(&place);
    let new = calls.filter(|call| is_place(call.1) && !then.contains(call));
    new.filter(|call| {
        let asked = asked.entry(*call).or_default();
        *asked += 1;
        *asked <= MOST
    })
    .collect()
}

/// What is wrong with what a child said.
pub fn is_wrong(said: &str, fault: &Fault) -> Option<String> {
    let Fault { kind, answer, .. } = *fault;
    let bad = |line: &&str| ["LEAK", "PANIC", "STUCK", "LOST", "HANGS"].iter().any(|w| line.contains(w));
    let told = format!("told of {}\n", Part::ERROR);
    if let Some(line) = said.lines().find(bad) {
        Some(line.to_owned())
    } else if !said.lines().any(|line| line == "done") {
        Some("it ended before it was done".into())
    } else if let Some(error) = unnamed(said, fault) {
        Some(format!("it does not say what failed: {error}"))
    } else if answer == Answer::Part(Part::Broken) && !said.contains(&told) {
        Some("its embedder was not told".into())
    } else if answer.is_routine(kind) && hits(said).len() < 2 && (!went_well(said) || said.contains("MISSED"))
    {
        Some("that is none of its user's business".into())
    } else {
        None
    }
}

pub fn went_well(said: &str) -> bool {
    said.lines().any(|line| line == "it went well")
}

/// An error that does not say what was tried and what the kernel answered: of two, of one of them.
fn unnamed<'a>(said: &'a str, fault: &Fault) -> Option<&'a str> {
    let error = said.lines().find_map(|line| line.strip_prefix("error: "))?;
    let then = fault.then.map(|(kind, _)| words::say(error, kind, error_after(fault.answer)));
    let first = match fault.answer {
        Answer::Error(errno) => words::say(error, fault.kind, errno),
        Answer::Part(_) => then.is_none(),
    };
    (!first && then != Some(true)).then_some(error)
}

/// One life; what it said, on both of its streams.
pub fn child(fault: &Fault) -> String {
    let program = std::env::current_exe().expect("this program");
    let mut command = Command::new(&program);
    if fault.life == Life::Wired {
        command = Command::new("unshare");
        command.args(["--net", "--map-root-user"]).arg(program);
    } else if fault.life == Life::Machine {
        command = machine::caged(&program);
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
