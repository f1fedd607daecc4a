//! Any system call fails, is interrupted, or comes short: those of ours, of the standard library and of dependencies. A child of this program
//! lives through the life of a VM (`life.rs` has which there are), and one call of it, or two, is answered with an error, or with a part of what it was
//! to move (seccomp's user notifications). Then it must end within its deadline, without a panic, with what it had before, and where its guest was
//! told that something is on the disk, it is. Of what was interrupted or came short nobody hears.
//!
//! A trial for each kind of call in each life: of every line of src that makes it, the first one fails, in the first life that has
//! that line. A line that is come by only after such a failure fails, too, where that is seen first. What can come short does so in each
//! of the first three lives. `VMBED_FAULTS=all` has every kind in every life, and goes on until no call of the kind is left (`ENDLESS`
//! are those that are never at an end); in the lab, and in the life that takes seconds, those of lines that no other life comes by, and in
//! the lab what is asked of the pool. `VMBED_FAULTS=list` says which calls come from where.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use libtest_mimic::{Arguments, Trial};

mod callers;
mod code;
mod disks;
mod driven;
#[path = "../guests/elf.rs"]
mod elf;
mod foreign;
mod frames;
#[path = "../guests/mod.rs"]
mod guests;
mod held;
#[path = "../holdings/mod.rs"]
mod holdings;
mod life;
mod machine;
mod notices;
mod others;
mod part;
mod places;
mod sites;
mod supervisor;
mod sweep;
mod wire;
mod words;

use life::Life;
use part::Part;
use places::Places;
use sweep::{
    AFTER, Counts, FAULTS, HITS, LIVED, NOBODYS, PAGEMAP_SCAN, child, is_wrong, kinds, sweep, wants,
    went_well,
};

/// What a child is told: how it lives, which kind of call, which of them, what that answers, which fails then.
const FAULT: &str = "VMBED_FAULT";
const GUEST: &str = "VMBED_FAULT_GUEST";

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

/// A kind of system call: its number, and for an ioctl what it asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    number: u32,
    request: u32,
}

impl Kind {
    /// Stands where an ioctl says what it asks for: those of the calls that can come short.
    const PART: u32 = u32::MAX;

    /// Stands there for calls that give back, which are not answered.
    const KEPT: u32 = u32::MAX - 1;

    const fn of(number: libc::c_long, request: u32) -> Self {
        Self { number: number as u32, request }
    }

    /// `ioctl_0xae80`, `part_0` or the number; strace and the kernel's tables have the names.
    fn name(self) -> String {
        match (self.request, self.number as libc::c_long) {
            (Self::PART, number) => format!("part_{number}"),
            (Self::KEPT, number) => format!("kept_{number}"),
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

    /// Whether nothing has failed then.
    fn is_quiet(self) -> bool {
        matches!(self, Self::Error(libc::EINTR) | Self::Part(Part::Half | Part::Byte))
    }

    /// Whether that is nothing that anybody should hear of.
    fn is_routine(self, kind: Kind) -> bool {
        let interrupts = self == Self::Error(libc::EINTR);
        interrupts && INTERRUPTIBLE.contains(&kind.number.into())
            || matches!(self, Self::Part(part) if part != Part::Broken)
    }
}

/// What a pool of huge pages is asked for in the lab, by lines of which calls are made for other memory elsewhere.
const OF_THE_POOL: [libc::c_long; 3] = [libc::SYS_memfd_create, libc::SYS_mmap, libc::SYS_fallocate];

/// Stands where it does not matter which place of src a call comes from.
const ANYWHERE: u32 = u32::MAX;

/// One call that does not do what it should: the nth of its kind, from a place or from anywhere. After it, another one may fail.
#[derive(Clone, Copy, Debug)]
struct Fault {
    life: Life,
    kind: Kind,
    place: u32,
    nth: u64,
    answer: Answer,
    then: Option<Then>,
}

/// The first call of a kind from a place, after another one has failed.
type Then = (Kind, u32);

impl Fault {
    const NONE: Self = Self {
        life: Life::Ring,
        kind: Kind::of(0, 0),
        place: ANYWHERE,
        nth: 0,
        answer: Answer::Error(0),
        then: None,
    };

    fn parse(text: &str) -> Self {
        let numbers: Vec<i64> = text.split(' ').map(|n| n.parse().expect("a number")).collect();
        let [life, number, request, place, nth, answer, ref then @ ..] = numbers[..] else {
            panic!("{text:?} is no fault")
        };
        let kind = |number: i64, request: i64| Kind { number: number as u32, request: request as u32 };
        let then = match *then {
            [number, request, place] => Some((kind(number, request), place as u32)),
            [] => None,
            _ => panic!("{text:?} is no fault"),
        };
        let (life, kind) = (Life::ALL[life as usize], kind(number, request));
        Self { life, kind, place: place as u32, nth: nth as u64, answer: Answer::of(answer), then }
    }

    fn text(&self) -> String {
        let Self { life, kind, place, nth, answer, then } = self;
        let then = then.map(|(kind, place)| format!(" {} {} {place}", kind.number, kind.request));
        let answer = answer.number();
        format!(
            "{} {} {} {place} {nth} {answer}{}",
            *life as usize,
            kind.number,
            kind.request,
            then.unwrap_or_default()
        )
    }
}

fn main() -> ExitCode {
    if let Ok(fault) = std::env::var(FAULT) {
        life::lead(Fault::parse(&fault));
        return ExitCode::SUCCESS;
    }
    let mut arguments = Arguments::from_args();
    // The lab's has a processor for itself, and many others wait for most of their time.
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    arguments.test_threads.get_or_insert(processors + 1);
    let places = Places::of(&callers::parts()[0]);
    let files = Files::make(&places);
    let mut plan = Plan::new(places);
    let known = machine::known();
    let is_here = |life: &Life| (*life == Life::Machine) == known.is_some();
    plan.sweep(Life::ALL.into_iter().filter(is_here), known.as_ref());
    if known.is_none() {
        if wants("list") {
            plan.list_others();
        }
        plan.everything();
    }
    let code = libtest_mimic::run(&arguments, std::mem::take(&mut plan.trials)).exit_code();
    drop(files);
    plan.report(known.is_some());
    let whole = arguments.filter.is_none() && !arguments.list;
    let mut wrong = if whole { sites::nobodys() } else { Vec::new() };
    if whole && !wants("all") {
        wrong.extend(life::lock(&sweep::MISSED).iter().map(|call| format!("{call}: did not fail")));
    }
    // What is not reached in the lab is reached outside.
    if whole && known.is_none() {
        wrong.extend(plan.unreached());
    }
    wrong.iter().for_each(|line| println!("{line}"));
    if wrong.is_empty() { code } else { ExitCode::FAILURE }
}

/// What the children need, gone in the end.
struct Files {
    own: Vec<PathBuf>,
}

impl Files {
    fn make(all: &Places) -> Self {
        // In the lab the outer program has made them.
        if std::env::var_os(GUEST).is_some() {
            return Self { own: Vec::new() };
        }
        let guest = guests::virtio(Path::new(env!("CARGO_TARGET_TMPDIR")));
        let (places, images) = (guest.with_extension("places"), guest.with_extension("images"));
        callers::make(&places, &all.text());
        disks::make_images(&images);
        // SAFETY: no other thread is there yet.
        #[expect(unsafe_code, reason = "set_var is unsafe beside other threads")]
        unsafe {
            std::env::set_var(GUEST, &guest);
            std::env::set_var(callers::PLACES, &places);
            std::env::set_var(disks::BELOW, &images);
        }
        Self { own: vec![guest, places, images] }
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        for path in &self.own {
            let _ = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
        }
    }
}

/// From where calls of each kind are to fail.
type Swept = BTreeMap<Kind, BTreeSet<u32>>;

/// What is to be tried.
struct Plan {
    places: Arc<Places>,
    swept: Swept,
    calls: u64,
    lives: usize,
    trials: Vec<Trial>,
}

impl Plan {
    fn new(places: Places) -> Self {
        Self { places: Arc::new(places), swept: BTreeMap::new(), calls: 0, lives: 0, trials: Vec::new() }
    }

    /// Each kind of call in each of the lives, from the places that no other life, and nobody elsewhere, has tried.
    fn sweep(&mut self, lives: impl Iterator<Item = Life>, elsewhere: Option<&Swept>) {
        life::lock(&LIVED).extend(elsewhere.into_iter().flat_map(|known| known.values()).flatten());
        for life in lives {
            // One without a fault: which calls there are.
            let none = Fault { life, ..Fault::NONE };
            let said = child(&none);
            let well = is_wrong(&said, &none).is_none() && went_well(&said) && !said.contains("MISSED");
            assert!(well, "{life:?} without a fault:\n{said}");
            self.lives += 1;
            if wants("list") {
                self.list(life, &said);
            }
            for (kind, from) in kinds(&said) {
                self.calls += if kind.request == Kind::PART { 0 } else { from[&ANYWHERE] };
                if from.contains_key(&0) {
                    life::lock(&NOBODYS).insert(kind);
                }
                life::lock(&LIVED).extend(from.keys());
                let known = self.swept.entry(kind).or_default();
                // What another life has, too, is swept there.
                let punches = kind == Kind::of(libc::SYS_fallocate, 0) && life == Life::Qcow2;
                // Whose memory has pages that no file knows of.
                let scans = kind.request == PAGEMAP_SCAN && life == Life::Memory;
                let parts = kind.request == Kind::PART && life.has_parts();
                let pool = elsewhere.is_some() && OF_THE_POOL.contains(&kind.number.into());
                let whole = wants("all") && elsewhere.is_none() && life != Life::Held;
                let again = parts || punches || scans || pool || whole;
                let elsewhere = elsewhere.and_then(|known| known.get(&kind));
                let is_new = |place: &u32| elsewhere.is_none_or(|known| !known.contains(place));
                let here =
                    from.into_iter().filter(|(place, _)| known.insert(*place) && is_new(place) || again);
                let (here, places): (Counts, _) = (here.collect(), self.places.clone());
                if !here.is_empty() && kind.request != Kind::KEPT {
                    self.trials.push(Trial::test(format!("{}_{}", life.name(), kind.name()), move || {
                        sweep(life, kind, &here, &places);
                        Ok(())
                    }));
                }
            }
        }
    }

    /// Which calls a life makes from where.
    fn list(&self, life: Life, said: &str) {
        for (kind, from) in kinds(said) {
            for (place, count) in from.iter().filter(|(place, _)| **place != ANYWHERE) {
                println!("{} {} {count} from {}", life.name(), kind.name(), self.places.name(*place));
            }
        }
    }

    /// The lines that none of them comes by, as long as nothing fails: some the lab's life does.
    fn list_others(&self) {
        let none = BTreeSet::new();
        let is_new = |number: &u32| !self.swept.values().any(|from| from.contains(number));
        for (place, _) in self.places.known(&none).filter(|(_, number)| is_new(number)) {
            println!("no life here comes by {place}");
        }
    }

    /// Trials of the whole.
    fn everything(&mut self) {
        let swept: Vec<Kind> = self.swept.keys().copied().collect();
        self.trials.push(Trial::test("calls_of_every_kind_are_made", move || {
            let parts = swept.iter().filter(|kind| kind.request == Kind::PART).count();
            assert!(swept.len() - parts > 45, "{} kinds of calls: {swept:?}", swept.len());
            assert!(parts > 7, "{parts} of them can come short: {swept:?}");
            Ok(())
        }));
        let swept = self.swept.clone();
        // First, since it takes longest.
        self.trials.insert(
            0,
            Trial::test("what_takes_a_machine_of_its_own", move || {
                machine::in_a_lab(&swept);
                Ok(())
            }),
        );
    }

    /// What is wrong with the list of places of which no call was answered.
    fn unreached(&self) -> Vec<String> {
        let mut wrong = sites::wrong(&self.places);
        // What other programs have of the library, if this one's lives did not call it.
        let program = &callers::parts()[0];
        let library = Places::of(&program.with_file_name("libvmbed.so"));
        assert!(library.shown * 10 > self.places.shown * 9, "libvmbed.so shows {} lines", library.shown);
        let after = life::lock(&AFTER);
        let known: BTreeSet<_> = self.places.known(&after).map(|(place, _)| place).collect();
        let elsewhere = library.all[..library.shown].iter().filter(|place| !known.contains(place));
        wrong.extend(elsewhere.map(|place| format!("{place}: not in this program: no life calls it")));
        wrong
    }

    fn report(&self, in_the_lab: bool) {
        if in_the_lab {
            machine::report();
        }
        let is_kind = |kind: &&Kind| ![Kind::PART, Kind::KEPT].contains(&kind.request);
        let kinds: Vec<_> = self.swept.keys().filter(is_kind).map(|kind| kind.name()).collect();
        let faults = FAULTS.load(Ordering::Relaxed);
        if faults > 0 {
            let missed = life::lock(&sweep::MISSED);
            println!("{} calls were not made again when they were to fail: {missed:?}", missed.len());
            let (hits, after) = (life::lock(&HITS), life::lock(&AFTER));
            let known = self.places.known(&after).count();
            let reached = self.places.known(&after).filter(|(_, number)| hits.contains(number)).count();
            println!(
                "{} lives, {} calls of {} kinds from {reached} of {known} lines, {faults} of them answered: {kinds:?}",
                self.lives,
                self.calls,
                kinds.len(),
            );
        }
    }
}
