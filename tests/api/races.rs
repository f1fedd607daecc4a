//! Many threads, many guests, and a second process.

use std::any::Any;
use std::fmt::Debug;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vmbed::{
    Access, BareBoot, Bytes, CpuMode, Device, Error, ErrorKind, EventKind, EventStream, Host, Result,
    StopCause, Vm, VmConfig, VmState,
};

use crate::guest::{LONG, Port, TALKS, WRITES, ends, host, real, run, unread, wait_until};
use crate::rogue::{DEVICES, Rogue, USE};

/// xorshift64, from `VMBED_SEED` or the clock.
struct Random {
    state: u64,
    seed: u64,
}

impl Random {
    fn seeded() -> Self {
        let given = std::env::var("VMBED_SEED").ok().and_then(|text| text.parse().ok());
        Self::from(
            given.unwrap_or_else(|| std::time::UNIX_EPOCH.elapsed().map_or(1, |t| t.as_nanos() as u64)),
        )
    }

    fn from(seed: u64) -> Self {
        Self { state: seed | 1, seed }
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state % limit
    }
}

impl Drop for Random {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("to make the same choices again: VMBED_SEED={}", self.seed);
        }
    }
}

/// How often a case tries what may go wrong.
fn rounds(otherwise: u64) -> u64 {
    std::env::var("VMBED_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(otherwise)
}

fn writing(host: &Host, port: &Arc<Port>) -> Vm {
    host.builder(real(&WRITES)).pio_device("port", 0x10, 8, port.clone()).build().unwrap()
}

/// A call that may fail, but for a reason.
fn any<T: Debug>(result: Result<T>, allowed: &[ErrorKind]) {
    if let Err(error) = result {
        assert!(allowed.contains(&error.kind()), "{error:?}");
    }
}

const STATE: &[ErrorKind] = &[ErrorKind::InvalidState];

pub fn free_races_with_everything() {
    let host = host();
    for round in 0..30 {
        let port = Arc::new(Port::default());
        let vm = Arc::new(writing(&host, &port));
        vm.start().unwrap();
        let threads: Vec<_> = (0..4)
            .map(|i| {
                let vm = vm.clone();
                std::thread::spawn(move || {
                    if i % 2 == 1 {
                        assert_eq!(ends(&vm), StopCause::HostStop);
                        return;
                    }
                    for _ in 0..20 {
                        any(vm.pause(), STATE);
                        any(vm.resume(), STATE);
                    }
                })
            })
            .collect();
        std::thread::sleep(Duration::from_micros(round * 200));
        vm.request_stop();
        drop(vm);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(Arc::strong_count(&port), 1, "the last owner, whichever it was, has ended the VM");
    }
    assert_eq!(host.usage().memory.get(), 0);
}

/// What eight threads use, and take away from each other.
#[derive(Default)]
struct Shared {
    hosts: [Mutex<Option<Host>>; 4],
    vms: [Mutex<Option<Arc<Vm>>>; 4],
    streams: [Mutex<Option<EventStream>>; 4],
    port: Arc<Port>,
}

fn play(shared: &Shared, random: &mut Random) {
    let at = random.below(4) as usize;
    let of = |random: &mut Random| random.below(4) as usize;
    let stream = shared.streams[of(random)].lock().unwrap().clone();
    let Some(host) = shared.hosts[of(random)].lock().unwrap().clone() else {
        *shared.hosts[at].lock().unwrap() = Some(self::host());
        return;
    };
    let vm = shared.vms[at].lock().unwrap().clone();
    match (random.below(16), vm) {
        (0, _) => drop(shared.hosts[at].lock().unwrap().take()),
        (1, _) => drop(shared.vms[at].lock().unwrap().take()),
        (2, _) => *shared.streams[at].lock().unwrap() = Some(EventStream::new().unwrap()),
        (3, _) => assert!(host.usage().memory <= host.usage().memory_capacity),
        (4, _) => drop(stream.and_then(|s| s.wait_event(Duration::from_millis(1)))),
        (5 | 6, _) | (_, None) => {
            let mut builder = host.builder(real(&WRITES)).pio_device("port", 0x10, 8, shared.port.clone());
            if let Some(stream) = stream {
                builder = builder.events(&stream);
            }
            let old = shared.vms[at].lock().unwrap().replace(Arc::new(builder.build().unwrap()));
            drop(old);
        }
        (7, Some(vm)) => any(vm.start(), STATE),
        (8, Some(vm)) => any(vm.pause(), STATE),
        (9, Some(vm)) => any(vm.resume(), STATE),
        (10, Some(vm)) => assert_eq!(vm.stop().unwrap(), StopCause::HostStop),
        (11, Some(vm)) => any(vm.wait_timeout(Duration::from_millis(1)), &[]),
        (12, Some(vm)) => any(vm.registers(0).and_then(|r| vm.set_registers(0, &r)), STATE),
        (13, Some(vm)) => {
            any(vm.write_memory(0x8000 + random.below(3 << 20), &[0; 16]), &[ErrorKind::InvalidArgument])
        }
        (14, Some(vm)) => *shared.streams[at].lock().unwrap() = Some(vm.events().clone()),
        (_, Some(vm)) => vm.request_stop(),
    }
}

pub fn handles_from_eight_threads() {
    let (shared, mut random) = (Shared::default(), Random::seeded());
    std::thread::scope(|scope| {
        for _ in 0..8 {
            let mut random = Random::from(random.below(u64::MAX));
            let shared = &shared;
            scope.spawn(move || (0..rounds(2000)).for_each(|_| play(shared, &mut random)));
        }
    });
    let port = shared.port.clone();
    drop(shared);
    assert_eq!(Arc::strong_count(&port), 1, "every VM is gone");
}

/// Drops these in this order; a guest runs exactly as long as its VM is there.
fn drop_in_order(order: &[usize]) {
    let (host, port) = (host(), Arc::new(Port::default()));
    let config = real(&WRITES);
    let vm = host.builder(config.clone()).pio_device("port", 0x10, 8, port.clone()).build().unwrap();
    vm.start().unwrap();
    let (events, owners) = (vm.events().clone(), Arc::downgrade(&port));
    let event = events.wait_event(LONG).expect("it has started");
    let mut things: [Option<Box<dyn Any>>; 6] = [
        Some(Box::new(host)),
        Some(Box::new(config)),
        Some(Box::new(port)),
        Some(Box::new(vm)),
        Some(Box::new(events)),
        Some(Box::new(event)),
    ];
    for at in order {
        drop(things[*at].take());
        let expected = usize::from(things[2].is_some()) + usize::from(things[3].is_some());
        assert_eq!(owners.strong_count(), expected, "{order:?}");
        let vm = things[3].as_ref().and_then(|vm| vm.downcast_ref::<Vm>());
        assert!(vm.is_none_or(|vm| vm.state() == VmState::Running));
    }
}

pub fn freeing_in_every_order() {
    fn permute(order: &mut [usize; 6], at: usize) {
        if at == order.len() {
            drop_in_order(order);
        }
        for i in at..order.len() {
            order.swap(at, i);
            permute(order, at + 1);
            order.swap(at, i);
        }
    }
    permute(&mut [0, 1, 2, 3, 4, 5], 0);
}

pub fn stop_races_with_everything() {
    let (host, mut random) = (host(), Random::seeded());
    for _ in 0..rounds(100) {
        let port = Arc::new(Port::default());
        let vm = writing(&host, &port);
        if random.below(4) > 0 {
            vm.start().unwrap();
        }
        std::thread::scope(|scope| {
            for i in 0..6 {
                let (vm, pause) = (&vm, Duration::from_micros(random.below(300)));
                scope.spawn(move || match i % 3 {
                    0 => assert_eq!(vm.stop().unwrap(), StopCause::HostStop),
                    1 => assert_eq!(ends(vm), StopCause::HostStop),
                    _ => (0..10).for_each(|_| {
                        any(vm.pause(), STATE);
                        any(vm.resume(), STATE);
                    }),
                });
                std::thread::sleep(pause);
            }
        });
        drop(vm);
        assert_eq!(Arc::strong_count(&port), 1);
    }
}

/// Runs `child` in a child of a fork, which must end well.
fn fork(child: impl FnOnce()) {
    #[expect(unsafe_code, reason = "forking in a process with threads has no safe wrapper")]
    // SAFETY: the child calls the library, whose business it is to work there, and the C library's allocator, which
    // works in children too; it ends without running anything of the parent's.
    unsafe {
        let pid = libc::fork();
        if pid == 0 {
            libc::alarm(60);
            let good = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child)).is_ok();
            libc::_exit(i32::from(!good));
        }
        let mut status = -1;
        assert_eq!(libc::waitpid(pid, &mut status, 0), pid);
        assert_eq!(status, 0, "the child should end well");
    }
}

/// In the child: nothing of the parent's VM answers, nothing hangs, and a VM of its own runs.
fn in_the_child(vm: Vm) {
    for error in [vm.start().err(), vm.pause().err(), vm.resume().err(), vm.stop().err(), vm.wait().err()] {
        let error = error.expect("it should be refused");
        assert!(error.kind() == ErrorKind::InvalidState && error.to_string().contains("fork"), "{error}");
    }
    vm.request_stop();
    assert_eq!(vm.events().next_event(), None);
    assert_eq!(vm.events().wait_event(Duration::MAX), None);
    drop(vm);
    let port = Arc::new(Port::default());
    let own = host().builder(real(&TALKS)).pio_device("port", 0x10, 8, port.clone()).build().unwrap();
    assert_eq!(run(&own), StopCause::GuestHalt);
    drop(own);
    assert_eq!(Arc::strong_count(&port), 1);
}

/// Sets it back, whatever happens.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

pub fn a_fork_while_a_vm_runs() {
    let (host, port) = (host(), Arc::new(Port::default()));
    let vm = writing(&host, &port);
    vm.start().unwrap();
    let other = Rogue::start(&host);
    let busy = AtomicBool::new(true);
    std::thread::scope(|scope| {
        let _ends = Ends(&busy);
        scope.spawn(|| {
            // Another VM of this process, which uses its devices.
            while busy.load(Ordering::Relaxed) {
                assert_eq!(other.does(USE), 0);
                assert_eq!(vm.state(), VmState::Running);
            }
        });
        for i in 0..20 {
            fork(|| {
                if i % 2 == 1 {
                    // SAFETY: a second owner in the child, which ends without dropping the first.
                    #[expect(unsafe_code, reason = "the child's own copy")]
                    in_the_child(unsafe { std::ptr::read(&vm) });
                }
            });
            let before = (port.writes(), other.uses());
            wait_until("the guest writes again", || port.writes() > before.0);
            // Each of its devices, and one that was under way.
            wait_until("another one has used its devices", || other.uses() > before.1 + DEVICES);
        }
    });
    assert_eq!(other.events(), []);
    other.disk_is_unharmed();
    other.ends();
    vm.pause().unwrap();
    vm.resume().unwrap();
    assert_eq!(vm.stop().unwrap(), StopCause::HostStop);
    let kinds: Vec<_> = unread(vm.events()).into_iter().map(|e| e.kind).collect();
    let stopped = EventKind::Stopped(StopCause::HostStop);
    assert_eq!(kinds, [EventKind::Started, EventKind::Paused, EventKind::Resumed, stopped]);
}

const GUESTS: usize = 256;
const FAULTS: usize = 17;
const REFUSED: usize = 42;
const FREED: usize = 200;

/// Tells its guest when to die, and fails when it is told to.
#[derive(Default)]
struct Commands {
    writes: AtomicU64,
    dies: AtomicBool,
    refuses: AtomicBool,
}

impl Device for Commands {
    fn read(&self, _: Access, data: &mut [u8]) -> Result<()> {
        data.fill(self.dies.load(Ordering::Relaxed).into());
        Ok(())
    }
    fn write(&self, _: Access, _: &[u8]) -> Result<()> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        // All run at once, and leave room for others.
        std::thread::sleep(Duration::from_millis(10));
        match self.refuses.load(Ordering::Relaxed) {
            true => Err(Error::new(ErrorKind::Unsupported, "told to")),
            false => Ok(()),
        }
    }
}

struct One {
    vm: Option<Vm>,
    commands: Arc<Commands>,
    kinds: Vec<EventKind>,
}

/// Reads what has come, each event for the guest that it names.
fn take_events(events: &EventStream, guests: &mut [One], first: vmbed::VmId) {
    for event in unread(events) {
        guests[(event.vm.0 - first.0) as usize].kinds.push(event.kind);
    }
}

/// Waits until each guest that is there has written again.
fn all_go_on(guests: &[One]) {
    let there = |(i, one): (usize, &'_ One)| one.vm.is_some() && i != FAULTS && i != REFUSED;
    let before: Vec<_> = guests.iter().map(|one| one.commands.writes.load(Ordering::Relaxed)).collect();
    for (i, one) in guests.iter().enumerate().filter(|(i, one)| there((*i, one))) {
        wait_until("each guest writes again", || {
            one.commands.writes.load(Ordering::Relaxed) >= before[i] + 3
        });
        assert_eq!(one.vm.as_ref().unwrap().state(), VmState::Running, "guest {i}");
    }
}

pub fn many_at_once() {
    // in al, 0x10; out 0x10, al; test al, al; jz $-6; lidt [0x1100], where there are zeroes; ud2
    let code =
        [0xe4, 0x10, 0xe6, 0x10, 0x84, 0xc0, 0x74, 0xf8, 0x0f, 0x01, 0x1d, 0x00, 0x11, 0, 0, 0x0f, 0x0b];
    let (host, events) = (host(), EventStream::new().unwrap());
    let mut config = VmConfig::bare(BareBoot::new(CpuMode::Protected, 0x1000, code));
    config.memory = Bytes(64 << 10);
    let make = |_| {
        let commands = Arc::new(Commands::default());
        let builder = host.builder(config.clone()).events(&events);
        let vm = builder.pio_device("commands", 0x10, 1, commands.clone()).build().unwrap();
        One { vm: Some(vm), commands, kinds: Vec::new() }
    };
    let mut guests: Vec<One> = (0..GUESTS).map(make).collect();
    let first = guests[0].vm.as_ref().unwrap().id();
    for i in 0..GUESTS {
        guests[i].vm.as_ref().unwrap().start().unwrap();
        take_events(&events, &mut guests, first);
    }
    all_go_on(&guests);
    guests[FAULTS].commands.dies.store(true, Ordering::Relaxed);
    guests[REFUSED].commands.refuses.store(true, Ordering::Relaxed);
    let freed = guests[FREED].vm.take();
    std::thread::spawn(move || drop(freed)).join().unwrap();
    let fault = StopCause::DeviceFault { device: "commands".to_owned(), why: "told to".to_owned() };
    for (i, cause) in [(FAULTS, StopCause::TripleFault), (REFUSED, fault.clone())] {
        assert_eq!(ends(guests[i].vm.as_ref().unwrap()), cause);
    }
    all_go_on(&guests);
    take_events(&events, &mut guests, first);
    let stopped = guests.iter().filter(|one| one.kinds.len() == 2).count();
    assert_eq!(stopped, 3, "three have ended, and nobody else");
    guests.iter_mut().for_each(|one| drop(one.vm.take()));
    take_events(&events, &mut guests, first);
    for (i, one) in guests.iter().enumerate() {
        let cause = match i {
            FAULTS => StopCause::TripleFault,
            REFUSED => fault.clone(),
            _ => StopCause::HostStop,
        };
        assert_eq!(one.kinds, [EventKind::Started, EventKind::Stopped(cause)], "guest {i}");
    }
}
