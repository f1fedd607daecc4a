//! The life of a VM, from nothing to nothing, and what must be there before and after it.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use vmbed::{
    Access, BareBoot, Bytes, CpuMode, Device, ErrorKind, Event, EventKind, Platform, StopCause, Vm, VmConfig,
};

use crate::disks;
use crate::driven::{self, Far};
use crate::foreign;
use crate::held;
use crate::holdings::Holdings;
use crate::machine;
use crate::others::{self, Server};
use crate::supervisor::{ARMED, FULL, HIT, HIT_FROM, THEN_FROM, seen, watch};
use crate::{Fault, GUEST, guests};

/// Whatever is under way has this long, on a machine that has other things to do.
pub const LONG: Duration = Duration::from_secs(60);
/// And this, where it is known why it may take for ever.
pub const EXCUSED: Duration = Duration::from_secs(10);

/// What is no leak: a list that has room for more than is in it, and maps of the allocator's and of its cache of threads' stacks.
const ROOM: usize = 2048;
const MAPS: usize = 24;

/// Ways to live.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// A disk by io_uring where the host has it, and a socket that keeps messages apart.
    Ring,
    /// A disk by system calls, and a stream.
    Calls,
    /// An image with metadata.
    Qcow2,
    /// A kernel and an initrd from files, the serial port on two pipes, a processor of its own.
    Linux,
    /// The other console, random bytes, and a loop of the caller's.
    Console,
    /// Memory that is there from the beginning, the host's reclaim, SIGBUS; a disk past the page cache that grows and is saved.
    Memory,
    /// A TAP interface on a bridge, both made before, in a network namespace of its own.
    Wired,
    /// A port of a switch with two ways out, and its capture.
    Switched,
    /// A disk, a network and a console of the embedder's, with limits.
    Own,
    /// Images on images, one of them encrypted.
    Layered,
    /// A program's first VM.
    Cold,
    /// The sandbox, a disk that writes through, and a network in user space that goes away and comes back; then another one.
    Sandboxed,
    /// A thread in the sandbox makes calls that it may not make.
    Refused,
    /// By the functions for C, on a vCPU of the caller's.
    Foreign,
    /// Its requests are not answered before it ends, which takes seconds.
    Held,
    /// In the lab: a cgroup, a card that the kernel serves, a block device, huge pages of the pool.
    Machine,
}

impl Life {
    pub const ALL: [Self; 16] = [
        Self::Ring,
        Self::Calls,
        Self::Qcow2,
        Self::Linux,
        Self::Console,
        Self::Memory,
        Self::Wired,
        Self::Switched,
        Self::Own,
        Self::Layered,
        Self::Cold,
        Self::Sandboxed,
        Self::Refused,
        Self::Foreign,
        Self::Held,
        Self::Machine,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Ring => "ring",
            Self::Calls => "calls",
            Self::Qcow2 => "qcow2",
            Self::Linux => "linux",
            Self::Console => "console",
            Self::Memory => "memory",
            Self::Wired => "wired",
            Self::Switched => "switched",
            Self::Own => "own",
            Self::Layered => "layered",
            Self::Cold => "cold",
            Self::Sandboxed => "sandboxed",
            Self::Refused => "refused",
            Self::Foreign => "foreign",
            Self::Held => "held",
            Self::Machine => "machine",
        }
    }

    /// Whether what its guest reads and writes is known, and so what of a part is missing.
    pub fn has_parts(self) -> bool {
        matches!(self, Self::Ring | Self::Calls | Self::Qcow2)
    }

    /// Lives it, with or without work for the guest.
    fn live(self, stage: &Stage, works: bool) -> vmbed::Result<()> {
        match self {
            Self::Ring | Self::Calls | Self::Qcow2 => driven::live(stage, works),
            Self::Linux => others::linux(stage),
            Self::Console => others::console(stage),
            Self::Memory => others::memory(stage, works),
            Self::Wired => others::wired(stage),
            Self::Switched => others::switched(stage),
            Self::Own => disks::own(stage),
            Self::Layered => disks::layered(stage, works),
            Self::Cold => others::cold(),
            Self::Sandboxed => others::sandboxed(stage),
            Self::Refused => others::refused(works),
            Self::Foreign => foreign::live(stage, works),
            Self::Held => held::live(stage, works),
            Self::Machine => machine::live(stage, works),
        }
    }
}

/// What is there before a life, and after it.
pub struct Stage {
    pub life: Life,
    /// What will fail in it.
    pub fault: Fault,
    /// Gone in the end.
    pub directory: PathBuf,
    /// The guest of tests/guests.
    pub code: Vec<u8>,
}

impl Stage {
    fn new(fault: Fault) -> Self {
        let directory = Self::path(std::process::id());
        // Of a child of the same number that was ended.
        let _ = std::fs::remove_dir_all(&directory);
        std::fs::create_dir(&directory).unwrap();
        let code = std::fs::read(std::env::var_os(GUEST).unwrap()).unwrap();
        let stage = Self { life: fault.life, fault, directory, code };
        driven::prepare(&stage);
        others::prepare(&stage);
        stage
    }

    /// Where the child of that number has its files.
    pub fn path(child: u32) -> PathBuf {
        std::env::temp_dir().join(format!("vmbed-fault-life-{child}"))
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    pub fn disk(&self) -> PathBuf {
        self.file("disk")
    }

    /// A PC with the guest of tests/guests.
    pub fn pc(&self) -> VmConfig {
        let mut boot = BareBoot::new(CpuMode::Long, guests::ENTRY, &self.code[..]);
        boot.stack = guests::STACK;
        let mut config = VmConfig::bare(boot);
        (config.platform, config.memory) = (Platform::Pc, Bytes(guests::MEMORY));
        config
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// A port on which nobody listens.
pub struct Deaf;

impl Device for Deaf {
    fn read(&self, _: Access, data: &mut [u8]) -> vmbed::Result<()> {
        data.fill(0);
        Ok(())
    }

    fn write(&self, _: Access, _: &[u8]) -> vmbed::Result<()> {
        Ok(())
    }
}

pub fn deaf() -> Arc<Deaf> {
    Arc::new(Deaf)
}

/// Whose card has a frame sent again and again: it has no room for one before its guest gives it some.
pub static FAR: Mutex<Option<Far>> = Mutex::new(None);
/// The network in user space.
pub static SERVER: Mutex<Option<Server>> = Mutex::new(None);

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The body of a thread whose calls nobody answers: it was there before.
fn feed() {
    loop {
        if let Some(far) = &mut *lock(&FAR) {
            // Its card may be gone, or full.
            let _ = far.send();
        }
        if let Some(server) = &mut *lock(&SERVER) {
            server.turn();
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

type Errand = Box<dyn FnOnce() + Send>;
static ERRANDS: OnceLock<Sender<Errand>> = OnceLock::new();

/// Has what is the test's own done on another such thread, some time.
pub fn later(what: impl FnOnce() + Send + 'static) {
    ERRANDS.get().unwrap().send(Box::new(what)).unwrap();
}

/// Does what is the test's own there.
pub fn aside<T: Send + 'static>(what: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = channel();
    later(move || drop(done.send(what())));
    result.recv().expect("what is the test's own goes well")
}

/// What this process had.
static BEFORE: Mutex<Option<Holdings>> = Mutex::new(None);

/// What it has now is not to be given back.
pub fn keep() {
    *lock(&BEFORE) = Some(Holdings::now());
}

/// Lives twice: once as it should be, then with a call that fails, or two. Says what came of it.
pub fn lead(fault: Fault) {
    static PANICKED: AtomicBool = AtomicBool::new(false);
    std::panic::set_hook(Box::new(|what| {
        PANICKED.store(true, Ordering::SeqCst);
        eprintln!("PANIC: {what}");
    }));
    let stage = Stage::new(fault);
    let (errands, waiting) = channel::<Errand>();
    ERRANDS.set(errands).unwrap();
    std::thread::spawn(move || waiting.into_iter().for_each(|errand| errand()));
    std::thread::spawn(feed);
    watch(fault);
    if fault.life != Life::Cold {
        stage.life.live(&stage, false).unwrap_or_else(|error| panic!("without a fault: {error}"));
    }
    aside(keep);
    ARMED.store(true, Ordering::SeqCst);
    let result = stage.life.live(&stage, true);
    ARMED.store(false, Ordering::SeqCst);
    match result {
        Ok(()) => println!("it went well"),
        Err(error) => println!("error: {error}"),
    }
    gives_back(stage.life);
    if HIT.load(Ordering::SeqCst) > 0 {
        println!("hit {}", HIT_FROM.load(Ordering::SeqCst));
    }
    if THEN_FROM.load(Ordering::SeqCst) > 0 {
        println!("hit {}", THEN_FROM.load(Ordering::SeqCst));
    }
    assert!(!FULL.load(Ordering::SeqCst), "more kinds and places of calls than there is room for");
    for (kind, place, count) in seen() {
        println!("made {} {} {place} {count}", kind.number, kind.request);
    }
    if !PANICKED.load(Ordering::SeqCst) {
        println!("done");
    }
}

/// Threads take their time to go.
fn gives_back(life: Life) {
    let before = lock(&BEFORE).unwrap();
    let end = Instant::now() + LONG;
    loop {
        let now = Holdings::now();
        // What a program has but once.
        let once = if life == Life::Cold { 4 * ROOM } else { ROOM };
        let fits = now.maps <= before.maps + MAPS && now.allocated <= before.allocated + once;
        // A handler of SIGBUS whose bell does not work has lost its thread.
        let handles = life == Life::Memory && now.descriptors < before.descriptors;
        if fits && (now.counts() == before.counts() || handles) {
            break;
        }
        if Instant::now() > end {
            println!("LEAK: {before:?}, and now {now:?}");
            for link in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
                println!("  {:?}", std::fs::read_link(link.path()));
            }
            break;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What an embedder does meanwhile; how the VM ends.
pub fn exercise(vm: &Vm) -> vmbed::Result<Option<StopCause>> {
    let paused = vm.pause();
    let _ = vm.vcpu_statistics(0)?;
    let _ = vm.memory();
    // It may have ended as it was paused.
    match paused.and_then(|()| vm.resume()) {
        Err(error) if error.kind() != ErrorKind::InvalidState => return Err(error),
        _ => {}
    }
    end_of(vm)
}

/// How the VM ends.
pub fn end_of(vm: &Vm) -> vmbed::Result<Option<StopCause>> {
    // A driver may wait for a device that is out of order: then the embedder was told.
    let mut told = Told::default();
    let begin = Instant::now();
    let cause = loop {
        let cause = vm.wait_timeout(Duration::from_secs(1))?;
        told.hear(vm);
        if cause.is_some() || begin.elapsed() > told.patience() {
            break cause;
        }
    };
    if cause.is_none() {
        told.excuse(vm);
    }
    Ok(cause)
}

/// What the embedder was told.
#[derive(Default)]
pub struct Told(Vec<Event>);

impl Told {
    pub fn hear(&mut self, vm: &Vm) {
        for event in std::iter::from_fn(|| vm.events().next_event()) {
            if let EventKind::BackendError { errno, .. } = event.kind {
                println!("told of {errno}");
            }
            self.0.push(event);
        }
    }

    pub fn is_excused(&self) -> bool {
        let is_excuse = |event: &Event| {
            matches!(event.kind, EventKind::DeviceNeedsReset { .. } | EventKind::BackendError { .. })
        };
        self.0.iter().any(is_excuse)
    }

    /// Of that error of what is behind a device.
    pub fn of(&self, number: i32) -> bool {
        let is_it =
            |event: &Event| matches!(event.kind, EventKind::BackendError { errno, .. } if errno == number);
        self.0.iter().any(is_it)
    }

    pub fn patience(&self) -> Duration {
        if self.is_excused() { EXCUSED } else { LONG }
    }

    /// It has not ended.
    pub fn excuse(&self, vm: &Vm) {
        if self.is_excused() {
            return;
        }
        println!("STUCK: the guest neither ends nor is ended; {:?}, {:?}", vm.state(), self.0);
        let mut results = vec![0; 16 * 16];
        let read = vm.read_memory(guests::RESULTS, &mut results);
        let steps: Vec<_> = (0..16).map(|step| guests::outcome(&results, step)).collect();
        println!("  {read:?}, its steps came to {steps:?}; {:?}", vm.net_statistics(0));
    }

    pub fn has_ended(&self) -> bool {
        self.0.iter().any(|event| matches!(event.kind, EventKind::Stopped(_)))
    }
}

/// Of what is routine, nothing is missed.
pub fn expect(there: bool, what: &str) {
    if !there {
        println!("MISSED: {what}");
    }
}

/// Removes what a life makes, if it was made.
pub fn remove(path: &Path) {
    let path = path.to_owned();
    aside(move || drop(std::fs::remove_file(path)));
}
