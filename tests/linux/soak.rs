//! A soak: stock guests under disk and net load on one switch, while VMs are paused, limited, ballooned, given larger disks, ended and begun anew
//! at random, beside hostile guests. No write is lost, nobody is stuck, and nothing is left over.
//!
//! `VMBED_SOAK_SECONDS=900` makes it eight guests for a quarter of an hour, which `make soak` has four times; `VMBED_SEED` has the same things happen again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, TryLockError};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use vmbed::{Host, PortOptions, StopCause, Switch, SwitchOptions};

use crate::assets::{self, KERNELS};
use crate::guest::{Guest, config};
use crate::guests;
use crate::holdings::{Holdings, NOTHING};
use crate::rogue;
use crate::storage::Storage;
use crate::{trial, watchdog};

mod neighbours;
mod schedule;
mod slot;

use schedule::{Act, Schedule};
use slot::{Life, Slot, Sum};

const VLAN: u16 = 10;
/// How often everybody is looked at.
const LOOK: Duration = Duration::from_millis(250);
/// The least time for a guest that runs to finish a round, and to fetch something.
const PATIENCE: Duration = Duration::from_secs(180);
/// How many times that for something to be fetched: a neighbour that is begun anew leaves who fetches from it without a word, for a minute
/// each time.
const UNLUCKY: u32 = 3;
/// For the first round of each, when all boot at once, and for the last words.
const FIRST: Duration = Duration::from_secs(1200);

pub fn add(trials: &mut Vec<Trial>) {
    trials.push(trial("soak::guests_under_load_beside_hostile_ones", soak));
    trials.push(trial("soak::stock_guests_that_reboot_leave_nothing", reboots));
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|n| n.parse().unwrap_or_else(|_| panic!("{variable} is a number")))
}

fn hostile() -> std::path::PathBuf {
    assets::directory().join("hostile-guest")
}

/// Compiles the hostile guest, before the lab is entered.
pub fn prepare() {
    let made = guests::hostile(&assets::directory());
    std::fs::rename(made, hostile()).unwrap();
}

struct Soak {
    host: Host,
    switch: Switch,
    slots: Vec<Mutex<Slot>>,
    over: AtomicBool,
    begun: Instant,
    /// What is being done to whom, and since when.
    doing: Mutex<Option<(usize, Act, Instant)>>,
    /// All kinds of things have happened.
    dealt: AtomicBool,
}

/// Whoever leaves, by whatever way, has the others leave.
struct Leaves<'a>(&'a AtomicBool);

impl Drop for Leaves<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn soak() {
    let long = number("VMBED_SOAK_SECONDS");
    let (time, guests) = (Duration::from_secs(long.unwrap_or(30)), if long.is_some() { 8 } else { 2 });
    let clock = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
    let seed = number("VMBED_SEED").unwrap_or(clock);
    println!("soak: {guests} guests, at least {time:?}, VMBED_SEED={seed}");
    rogue::CODE.get_or_init(|| std::fs::read(hostile()).expect("made before the lab was entered"));
    let (storage, host) = (Storage::new(), Host::open().unwrap());
    // What is made once is made.
    rogue::Rogue::start(&host).ends();
    let before = Holdings::now();
    let switch = Switch::new(&SwitchOptions::default()).unwrap();
    let slots = (0..guests).map(|number| {
        let port = switch.add_port(format!("guest{number}"), &PortOptions::access(VLAN)).unwrap();
        Mutex::new(Slot::new(number, guests, &storage, port))
    });
    let slots = slots.collect();
    let over = AtomicBool::new(false);
    let (doing, dealt) = (Mutex::new(None), AtomicBool::new(false));
    let soak = Soak { host: host.clone(), switch, slots, over, begun: Instant::now(), doing, dealt };
    let done = soak.run(time, seed);
    let sum = Soak::sums(&soak.slots.iter().map(|slot| slot.lock().unwrap()).collect::<Vec<_>>());
    println!("soak: {sum:?}, {done:?}, {:.0?}", soak.begun.elapsed());
    assert!(sum.kept > 0 && sum.ballooned > 0 && done.rows > 0, "everything happened");
    let usage = soak.host.usage();
    assert_eq!((usage.vms, usage.memory.get()), (0, 0), "the ledger is as it was");
    drop(soak);
    let after = Holdings::now();
    println!("soak: {before:?}, and then {after:?}");
    // Threads that end leave their heaps to others, with holes in them.
    let more = Holdings { maps: 100, allocated: 64 << 10, anonymous: 32 << 20, ..NOTHING };
    after.assert_within(&before, more, "after all is dropped");
}

impl Soak {
    fn run(&self, time: Duration, seed: u64) -> neighbours::Done {
        let patience = self.begin();
        std::thread::scope(|scope| {
            let _leaves = Leaves(&self.over);
            let trouble = scope.spawn(|| self.trouble(Schedule::new(seed, self.slots.len())));
            let hostile = scope.spawn(|| neighbours::keep_on(&self.host, &self.switch, !seed, &self.over));
            let working = || !trouble.is_finished() && !hostile.is_finished();
            let end = self.begun + time;
            let (mut said, mut running) = (Instant::now(), None);
            while working() && (Instant::now() < end || !self.dealt.load(Ordering::Relaxed)) {
                self.look(patience);
                if said.elapsed() > Duration::from_secs(60) && self.say(&mut running) {
                    said = Instant::now();
                }
            }
            self.over.store(true, Ordering::Relaxed);
            ended(trouble);
            let done = ended(hostile);
            self.end(patience);
            done
        })
    }

    /// Starts all, and waits for the first round of each. How patient one has to be with guests on this machine.
    fn begin(&self) -> Duration {
        self.slots.iter().for_each(|slot| slot.lock().unwrap().begin(&self.host));
        let done = |life: &Life| life.said().rounds() > 0 && life.said().fetched > 0;
        self.wait("the first round of each guest", FIRST, done);
        let patience = PATIENCE.max(self.begun.elapsed() * 2);
        println!("soak: first rounds after {:.0?}; patience: {patience:.0?}", self.begun.elapsed());
        patience
    }

    /// Until all are so far, and none has ended before.
    fn wait(&self, what: &str, time: Duration, done: impl Fn(&Life) -> bool) {
        let (end, mut said) = (Instant::now() + time, Instant::now());
        loop {
            self.look(time);
            let slots: Vec<_> = self.slots.iter().map(|slot| slot.lock().unwrap()).collect();
            let late: Vec<_> = slots.iter().filter(|slot| !done(slot.life.as_ref().expect("a VM"))).collect();
            let Some(first) = late.first() else { return };
            assert!(Instant::now() < end, "waited {time:?} for {what}: {}", stuck(first));
            if said.elapsed() > Duration::from_secs(60) {
                said = Instant::now();
                let late: Vec<_> = late.iter().map(|slot| (slot.number, slot.said())).collect();
                println!("{:7.1} s: waiting for {what}: {late:?}", self.begun.elapsed().as_secs_f32());
            }
        }
    }

    /// Does what the schedule says until it is over.
    fn trouble(&self, mut schedule: Schedule) {
        while !self.over.load(Ordering::Relaxed) {
            let (rest, guest, act) = schedule.next();
            std::thread::sleep(rest);
            let mut slot = self.slots[guest].lock().unwrap();
            println!("{:7.1} s: guest {guest}: {act:?}", self.begun.elapsed().as_secs_f32());
            *self.doing.lock().unwrap() = Some((guest, act, Instant::now()));
            slot.act(act, &self.host);
            *self.doing.lock().unwrap() = None;
            self.dealt.store(schedule.decks > 0, Ordering::Relaxed);
        }
    }

    /// Looks at everybody: none has ended, none says that anything is wrong, and whoever runs gets somewhere.
    fn look(&self, patience: Duration) {
        let since = Instant::now();
        std::thread::sleep(LOOK);
        for slot in &self.slots {
            match slot.try_lock() {
                Ok(mut slot) => examine(&mut slot, since.elapsed(), patience),
                Err(TryLockError::WouldBlock) => self.is_not_stuck(patience),
                Err(TryLockError::Poisoned(_)) => return,
            }
        }
    }

    /// What is being done to a VM comes to its end.
    fn is_not_stuck(&self, patience: Duration) {
        if let Some((guest, act, since)) = *self.doing.lock().unwrap() {
            let threads = || watchdog::threads();
            assert!(since.elapsed() < patience, "guest {guest}: {act:?} takes {patience:?}:\n{}", threads());
        }
    }

    fn sums(slots: &[MutexGuard<'_, Slot>]) -> Sum {
        let mut all = Sum::default();
        slots.iter().for_each(|slot| all += slot.sum_so_far());
        all
    }

    /// Says what has been done, and what the process has while all guests run: never more and more. Not amid somebody's building.
    fn say(&self, first: &mut Option<Holdings>) -> bool {
        let slots: Vec<_> = self.slots.iter().filter_map(|slot| slot.try_lock().ok()).collect();
        if slots.len() < self.slots.len() {
            return false;
        }
        let now = Holdings::now();
        println!("{:7.1} s: {:?} {now:?}", self.begun.elapsed().as_secs_f32(), Self::sums(&slots));
        let first = first.get_or_insert(now);
        // A hostile neighbour may be in the making, or not.
        let few = now.descriptors < first.descriptors + 100 && now.threads < first.threads + 30;
        // A port of the switch keeps up to 3 MiB for the most that has waited there at once.
        let ports = slots.len() * (3 << 20);
        let small = now.allocated < first.allocated + ports + (8 << 20)
            && now.anonymous < first.anonymous + ports + (64 << 20);
        assert!(few && small, "{first:?} at first, now {now:?}");
        true
    }

    /// How it ends, if it does.
    fn cause(&self, slot: &Slot, time: Duration) -> Option<StopCause> {
        let (end, vm) = (Instant::now() + time, &slot.life.as_ref().expect("a VM").vm);
        loop {
            let cause = vm.wait_timeout(Duration::from_secs(60)).unwrap();
            if cause.is_some() || Instant::now() > end {
                return cause;
            }
            let (number, said) = (slot.number, slot.said());
            println!(
                "{:7.1} s: waiting for guest {number} to end: {said:?}",
                self.begun.elapsed().as_secs_f32()
            );
        }
    }

    /// Has all guests verify what they wrote last, and power off.
    fn end(&self, patience: Duration) {
        self.wait("each guest to be up", FIRST, |life| life.said().kept.is_some());
        for slot in &self.slots {
            let typed = slot.lock().unwrap().life.as_ref().expect("a VM").vm.console_input(b"end\n");
            assert_eq!(typed, 4);
        }
        for slot in &self.slots {
            let mut slot = slot.lock().unwrap();
            let cause = self.cause(&slot, patience.max(FIRST));
            assert_eq!(cause, Some(StopCause::GuestPoweroff), "{}", stuck(&slot));
            slot.is_complete();
            slot.fold();
        }
    }
}

/// What a thread came to; its panic, if it was one.
fn ended<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn stuck(slot: &Slot) -> String {
    let report = slot.life.as_ref().map(Life::report).unwrap_or_default();
    format!("guest {}: {report}\nthreads:\n{}", slot.number, watchdog::threads())
}

/// A guest that has run for so long since the last look.
fn examine(slot: &mut Slot, time: Duration, patience: Duration) {
    slot.hear_events();
    let (told, guest) = (slot.told, slot.number);
    let life = slot.life.as_mut().expect("a slot is only empty while it is locked");
    let cause = life.vm.wait_timeout(Duration::ZERO).unwrap();
    assert_eq!(cause, None, "guest {guest}: nobody asked for its end:\n{}", life.report());
    let said = life.said();
    assert_eq!(said.wrong, None, "guest {guest}:\n{}", life.report());
    // What its guest was told is written is there, and what was written is what is there: it has verified that.
    let kept = said.kept;
    assert!(kept.is_none_or(|kept| kept >= told), "guest {guest}: of {told} rounds there are {kept:?}");
    let rounds = said.rounds() + u64::from(kept.is_some());
    for (last, now) in [(&mut life.disk, rounds), (&mut life.net, said.fetched)] {
        *last = if last.0 == now { (now, last.1 + time) } else { (now, Duration::ZERO) };
    }
    let idle = (life.disk.1, life.net.1);
    assert!(
        idle.0 < patience && idle.1 < patience * UNLUCKY,
        "{idle:.0?} without a round, and without news: {}",
        stuck(slot)
    );
}

/// A guest that resets its machine, and is built and started again on the same disk, as an orchestrator does it.
fn reboots() {
    let times = number("VMBED_REBOOTS").unwrap_or(2);
    let script = "n=$(tr -dc 0-9 </dev/vda); echo $((n + 1)) | dd of=/dev/vda conv=notrunc,fsync 2>/dev/null
        ip link set eth0 up; reboot -f; sleep 1000";
    let (storage, host) = (Storage::new(), Host::open().unwrap());
    let switch = Switch::new(&SwitchOptions::default()).unwrap();
    let port = switch.add_port("guest", &PortOptions::access(VLAN)).unwrap();
    let disk = storage.directory.join("disk");
    std::fs::write(&disk, [b'\n'; 4096]).unwrap();
    let once = |nth: u64| {
        let mut config = config(KERNELS[0], script);
        config.disks.push(vmbed::DiskConfig::new(&disk));
        config.nets.push(vmbed::NetConfig::attached());
        let vm = host.builder(config).net_port(0, &port).build().unwrap();
        vm.start().unwrap();
        let guest = Guest { vm };
        assert_eq!(guest.end(), StopCause::GuestReset, "{}", guest.console());
        drop(guest);
        let said = std::fs::read_to_string(&disk).unwrap();
        assert_eq!(said.trim(), nth.to_string(), "it counts on its disk");
    };
    once(1);
    let (before, begun) = (Holdings::now(), Instant::now());
    (2..2 + times).for_each(once);
    let after = Holdings::now();
    println!("{times} reboots in {:.0?}: {before:?}, then {after:?}", begun.elapsed());
    // As above: what other trials of this process have freed is theirs again, in pieces.
    let more = Holdings { maps: 100, allocated: 64 << 10, anonymous: 32 << 20, ..NOTHING };
    after.assert_within(&before, more, &format!("after {times} reboots"));
}
