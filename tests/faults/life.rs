//! The life of a VM, from nothing to nothing.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmbed::{
    Access, BalloonConfig, BareBoot, Bytes, CpuMode, Device, DiskConfig, DiskEngine, DiskFormat, ErrorKind,
    EventKind, Host, NetConfig, Platform, StopCause, Vm, VmConfig,
};

use crate::guests::{self, Op, outcome, script};
use crate::supervisor::{ARMED, HIT, seen, watch};
use crate::{Fault, GUEST};

/// Whatever is under way has this long, on a machine that has other things to do.
const LONG: Duration = Duration::from_secs(60);
/// And this, where it is known why it may take for ever.
const EXCUSED: Duration = Duration::from_secs(10);
const SIZE: u64 = 512 << 10;

/// What the guest does: with its disk, its card, its balloon.
const STEPS: [(Op, u32, u32, u32); 9] = [
    (Op::Write, 3, 2, 7),
    (Op::Flush, 0, 0, 0),
    (Op::Read, 3, 2, 0),
    (Op::Zero, 8, 1, 0),
    (Op::Discard, 16, 8, 0),
    (Op::Send, 0, FRAME as u32, SENT as u32),
    (Op::Account, 0, 4, 2),
    (Op::Inflate, 768, 16, 9),
    (Op::Receive, 0, 0, 0),
];

/// A frame's length, and what its bytes are: of the guest's, and of the one for it.
const FRAME: usize = 60;
const SENT: u8 = 5;
const RECEIVED: u8 = 6;

/// A port on which nobody listens.
struct Deaf;

impl Device for Deaf {
    fn read(&self, _: Access, data: &mut [u8]) -> vmbed::Result<()> {
        data.fill(0);
        Ok(())
    }

    fn write(&self, _: Access, _: &[u8]) -> vmbed::Result<()> {
        Ok(())
    }
}

/// Ways to have a disk and a card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// By io_uring where the host has it, and a socket that keeps messages apart.
    Ring,
    /// By system calls, and a stream.
    Calls,
    /// An image with metadata.
    Qcow2,
}

impl Life {
    pub const ALL: [Self; 3] = [Self::Ring, Self::Calls, Self::Qcow2];

    pub fn name(self) -> &'static str {
        match self {
            Self::Ring => "ring",
            Self::Calls => "calls",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// Whose card has a frame sent again and again: it has no room for one before its guest gives it some.
static FAR: Mutex<Option<Far>> = Mutex::new(None);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The body of a thread whose calls nobody answers: it was there before.
fn feed() {
    loop {
        if let Some(far) = &mut *lock(&FAR) {
            // Its card may be gone, or full.
            let _ = far.send();
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A disk's file, which is gone in the end.
pub struct Disk {
    life: Life,
    path: PathBuf,
}

impl Disk {
    fn new(life: Life) -> Self {
        let path = Self::path(std::process::id());
        let format = if life == Life::Qcow2 { DiskFormat::Qcow2 } else { DiskFormat::Raw };
        vmbed::create_disk(&path, format, Bytes(SIZE), None).unwrap();
        Self { life, path }
    }

    /// Where the child of that number has its.
    pub fn path(child: u32) -> PathBuf {
        std::env::temp_dir().join(format!("vmbed-fault-disk-{child}"))
    }

    fn config(&self) -> DiskConfig {
        let engine = if self.life == Life::Calls { DiskEngine::Sync } else { DiskEngine::Auto };
        let mut disk = DiskConfig::new(&self.path);
        if self.life == Life::Qcow2 {
            disk = DiskConfig::qcow2(&self.path);
        }
        disk.engine = engine;
        disk
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The other end of the card's wire.
enum Far {
    Messages(UnixDatagram),
    Stream(UnixStream),
}

impl Far {
    /// The card's end, and this.
    fn pair(life: Life) -> std::io::Result<(OwnedFd, Self)> {
        if life == Life::Calls {
            let (near, far) = UnixStream::pair()?;
            far.set_nonblocking(true)?;
            return Ok((near.into(), Self::Stream(far)));
        }
        let (near, far) = UnixDatagram::pair()?;
        far.set_nonblocking(true)?;
        Ok((near.into(), Self::Messages(far)))
    }

    /// Sends one to the card, with what is in front of it.
    fn send(&mut self) -> std::io::Result<()> {
        match self {
            Self::Messages(far) => far.send(&[&[0; 12][..], &[RECEIVED; FRAME]].concat()).map(drop),
            Self::Stream(far) => far.write_all(&[&[0, 0, 0, FRAME as u8][..], &[RECEIVED; FRAME]].concat()),
        }
    }

    /// The one frame that came, without what is in front of it; nothing where none came whole.
    fn frame(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        match self {
            Self::Messages(far) => {
                bytes.resize(2000, 0);
                let length = far.recv(&mut bytes).unwrap_or(0);
                bytes.truncate(length);
            }
            Self::Stream(far) => {
                let _ = far.read_to_end(&mut bytes);
            }
        }
        let ahead = if matches!(self, Self::Stream(_)) { 4 } else { 12 };
        bytes.drain(..bytes.len().min(ahead));
        bytes
    }
}

/// Descriptors and threads of this process.
fn holdings() -> (usize, usize) {
    let count = |of: &str| std::fs::read_dir(of).unwrap().count();
    (count("/proc/self/fd"), count("/proc/self/task"))
}

/// Lives twice: once as it should be, and idle, then with one call that fails. Says what came of it.
pub fn lead(fault: Fault) {
    static PANICKED: AtomicBool = AtomicBool::new(false);
    std::panic::set_hook(Box::new(|what| {
        PANICKED.store(true, Ordering::SeqCst);
        eprintln!("PANIC: {what}");
    }));
    let code = std::fs::read(std::env::var_os(GUEST).unwrap()).unwrap();
    let disk = Disk::new(fault.life);
    std::thread::spawn(feed);
    watch(fault);
    live(&code, &disk, &[]).unwrap_or_else(|error| panic!("without a fault: {error}"));
    let before = holdings();
    ARMED.store(true, Ordering::SeqCst);
    // A message comes whole or not at all: there is nothing to see of its receipt.
    let steps = if fault.life == Life::Calls { &STEPS[..] } else { &STEPS[..STEPS.len() - 1] };
    let result = live(&code, &disk, steps);
    ARMED.store(false, Ordering::SeqCst);
    match result {
        Ok(()) => println!("it went well"),
        Err(error) => println!("error: {error}"),
    }
    let end = Instant::now() + LONG;
    while holdings() != before {
        if Instant::now() > end {
            println!("LEAK: {before:?} descriptors and threads before, {:?} now", holdings());
            for link in std::fs::read_dir("/proc/self/fd").unwrap().flatten() {
                println!("  {:?}", std::fs::read_link(link.path()));
            }
            break;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    if HIT.load(Ordering::SeqCst) > 0 {
        println!("hit");
    }
    for (kind, count) in seen() {
        println!("made {} {} {count}", kind.number, kind.request);
    }
    if !PANICKED.load(Ordering::SeqCst) {
        println!("done");
    }
}

fn live(code: &[u8], disk: &Disk, steps: &[(Op, u32, u32, u32)]) -> vmbed::Result<()> {
    let pair = Far::pair(disk.life);
    let (near, far) = pair.map_err(|e| vmbed::Error::os("the test's own sockets", e))?;
    let host = Host::open()?;
    let mut boot = BareBoot::new(CpuMode::Long, guests::ENTRY, code);
    boot.stack = guests::STACK;
    let mut config = VmConfig::bare(boot);
    (config.platform, config.memory) = (Platform::Pc, Bytes(guests::MEMORY));
    config.disks = vec![disk.config()];
    config.nets = vec![NetConfig::attached()];
    config.balloon = Some(BalloonConfig::default());
    let builder = host.builder(config).net_fd(0, near)?.pio_device("said", guests::SAY, 1, Arc::new(Deaf));
    let vm = builder.build()?;
    vm.write_memory(guests::SCRIPT, &script(steps))?;
    vm.start()?;
    *lock(&FAR) = Some(far);
    let ended = exercise(&vm);
    let results = results(&vm, &ended, steps);
    let stopped = vm.stop();
    drop(vm);
    drop(host);
    let far = lock(&FAR).take();
    if let (Some(results), Some(mut far)) = (results, far) {
        let armed = ARMED.swap(false, Ordering::SeqCst);
        check(code, disk, &mut far, &results);
        ARMED.store(armed, Ordering::SeqCst);
    }
    ended?;
    stopped.map(drop)
}

/// What an embedder does meanwhile; how the VM ends.
fn exercise(vm: &Vm) -> vmbed::Result<Option<StopCause>> {
    let paused = vm.pause();
    let _ = vm.disk_statistics(0)?;
    let _ = vm.vcpu_statistics(0)?;
    let _ = vm.memory();
    // It may have ended as it was paused.
    match paused.and_then(|()| vm.resume()) {
        Err(error) if error.kind() != ErrorKind::InvalidState => return Err(error),
        _ => {}
    }
    // A driver may wait for a device that is out of order: then the embedder was told.
    let is_excuse = |event: &vmbed::Event| {
        matches!(event.kind, EventKind::DeviceNeedsReset { .. } | EventKind::BackendError { .. })
    };
    let (begin, mut told) = (Instant::now(), Vec::new());
    let (cause, excused) = loop {
        let cause = vm.wait_timeout(Duration::from_secs(1))?;
        told.extend(std::iter::from_fn(|| vm.events().next_event()));
        let excused = told.iter().any(is_excuse);
        if cause.is_some() || begin.elapsed() > if excused { EXCUSED } else { LONG } {
            break (cause, excused);
        }
    };
    if cause.is_none() && !excused {
        println!("STUCK: the guest neither ends nor is ended; {:?}, {told:?}", vm.state());
        let mut results = vec![0; 16 * STEPS.len()];
        let read = vm.read_memory(guests::RESULTS, &mut results);
        let steps: Vec<_> = (0..STEPS.len()).map(|step| outcome(&results, step)).collect();
        println!("  {read:?}, its steps came to {steps:?}; {:?}", vm.net_statistics(0));
    }
    Ok(cause)
}

/// What the guest was told of its steps, if it has come to its own end.
fn results(
    vm: &Vm,
    ended: &vmbed::Result<Option<StopCause>>,
    steps: &[(Op, u32, u32, u32)],
) -> Option<Vec<u8>> {
    let mut results = vec![0; 16 * steps.len()];
    let itself = matches!(ended, Ok(Some(StopCause::GuestReset))) && !steps.is_empty();
    (itself && vm.read_memory(guests::RESULTS, &mut results).is_ok()).then_some(results)
}

/// What the guest was told is on the disk, is; what it sent has come whole, or not at all.
fn check(code: &[u8], disk: &Disk, far: &mut Far, results: &[u8]) {
    let good = |step: usize| outcome(results, step).0 == 0;
    if good(0) && good(1) && there(code, disk) != Some(512 * (7 + 8)) {
        println!("LOST: the guest was told that it is there: {:?}", there(code, disk));
    }
    if good(0) && good(2) && outcome(results, 2).2 != 512 * (7 + 8) {
        println!("LOST: the guest read something else: {:?}", outcome(results, 2));
    }
    let frame = far.frame();
    if !frame.is_empty() && frame != [SENT; FRAME] {
        println!("LOST: the frame came as {frame:?}");
    }
    let Some(received) = (results.len() == 16 * STEPS.len()).then(|| outcome(results, STEPS.len() - 1))
    else {
        return;
    };
    if received.1 as usize != 12 + FRAME || received.2 != FRAME as u64 * u64::from(RECEIVED) {
        println!("LOST: the guest received something else: {received:?}");
    }
}

/// The sum of what lies there, as another guest reads it.
fn there(code: &[u8], disk: &Disk) -> Option<u64> {
    if disk.life != Life::Qcow2 {
        let mut bytes = [0; 1024];
        File::open(&disk.path).unwrap().read_exact_at(&mut bytes, 3 * 512).unwrap();
        let good = bytes[..512] == [7; 512] && bytes[512..] == [8; 512];
        return good.then(|| bytes.iter().copied().map(u64::from).sum());
    }
    let host = Host::open().unwrap();
    let mut boot = BareBoot::new(CpuMode::Long, guests::ENTRY, code);
    boot.stack = guests::STACK;
    let mut config = VmConfig::bare(boot);
    (config.platform, config.memory) = (Platform::Pc, Bytes(guests::MEMORY));
    config.disks = vec![disk.config()];
    let vm = host.builder(config).pio_device("said", guests::SAY, 1, Arc::new(Deaf)).build().unwrap();
    vm.write_memory(guests::SCRIPT, &script(&[(Op::Read, 3, 2, 0)])).unwrap();
    vm.start().unwrap();
    vm.wait_timeout(LONG).unwrap()?;
    let mut results = [0; 16];
    vm.read_memory(guests::RESULTS, &mut results).unwrap();
    (outcome(&results, 0).0 == 0).then_some(outcome(&results, 0).2)
}
