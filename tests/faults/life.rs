//! The life of a VM, from nothing to nothing.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vmbed::{
    Access, BalloonConfig, BareBoot, Bytes, CpuMode, Device, DiskConfig, ErrorKind, EventKind, Host,
    NetConfig, Platform, StopCause, Vm, VmConfig,
};

use crate::guests::{self, Op, outcome, script};
use crate::supervisor::{ARMED, HIT, seen, watch};
use crate::{Fault, GUEST};

/// Whatever is under way has this long.
const LONG: Duration = Duration::from_secs(10);
const SIZE: u64 = 512 << 10;

/// What the guest does: with its disk, its card, its balloon.
const STEPS: [(Op, u32, u32, u32); 8] = [
    (Op::Write, 3, 2, 7),
    (Op::Flush, 0, 0, 0),
    (Op::Read, 3, 2, 0),
    (Op::Zero, 8, 1, 0),
    (Op::Discard, 16, 8, 0),
    (Op::Send, 0, 60, 5),
    (Op::Account, 0, 4, 2),
    (Op::Inflate, 768, 16, 9),
];

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

/// A disk's file, which is gone in the end.
struct Disk(PathBuf);

impl Disk {
    fn new() -> Self {
        let path = std::env::temp_dir().join(format!("vmbed-fault-disk-{}", std::process::id()));
        File::create(&path).unwrap().set_len(SIZE).unwrap();
        Self(path)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
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
    let disk = Disk::new();
    watch(fault);
    live(&code, &disk.0, &[]).unwrap_or_else(|error| panic!("without a fault: {error}"));
    let before = holdings();
    ARMED.store(true, Ordering::SeqCst);
    let result = live(&code, &disk.0, &STEPS);
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

fn live(code: &[u8], disk: &Path, steps: &[(Op, u32, u32, u32)]) -> vmbed::Result<()> {
    let (near, _far) = UnixDatagram::pair().map_err(|e| vmbed::Error::os("the test's own sockets", e))?;
    let host = Host::open()?;
    let mut boot = BareBoot::new(CpuMode::Long, guests::ENTRY, code);
    boot.stack = guests::STACK;
    let mut config = VmConfig::bare(boot);
    (config.platform, config.memory) = (Platform::Pc, Bytes(guests::MEMORY));
    config.disks = vec![DiskConfig::new(disk)];
    config.nets = vec![NetConfig::attached()];
    config.balloon = Some(BalloonConfig::default());
    let builder = host.builder(config).net_fd(0, near)?.pio_device("said", guests::SAY, 1, Arc::new(Deaf));
    let vm = builder.build()?;
    vm.write_memory(guests::SCRIPT, &script(steps))?;
    vm.start()?;
    let ended = exercise(&vm);
    if !steps.is_empty() {
        check(&vm, disk, &ended);
    }
    let stopped = vm.stop();
    drop(vm);
    drop(host);
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
    let cause = vm.wait_timeout(LONG)?;
    // A driver may wait for a device that is out of order: then the embedder was told.
    let told: Vec<_> = std::iter::from_fn(|| vm.events().next_event()).collect();
    let is_excuse = |event: &vmbed::Event| {
        matches!(event.kind, EventKind::DeviceNeedsReset { .. } | EventKind::BackendError { .. })
    };
    if cause.is_none() && !told.iter().any(is_excuse) {
        println!("STUCK: the guest neither ends nor is ended; {:?}, {told:?}", vm.state());
    }
    Ok(cause)
}

/// What the guest was told is on the disk, is.
fn check(vm: &Vm, disk: &Path, ended: &vmbed::Result<Option<StopCause>>) {
    let mut results = vec![0; 16 * STEPS.len()];
    if !matches!(ended, Ok(Some(StopCause::GuestReset)))
        || vm.read_memory(guests::RESULTS, &mut results).is_err()
    {
        return;
    }
    let good = |step: usize| outcome(&results, step).0 == 0;
    let mut bytes = [0; 1024];
    let armed = ARMED.swap(false, Ordering::SeqCst);
    File::open(disk).unwrap().read_exact_at(&mut bytes, 3 * 512).unwrap();
    ARMED.store(armed, Ordering::SeqCst);
    if good(0) && good(1) && !(bytes[..512] == [7; 512] && bytes[512..] == [8; 512]) {
        println!("LOST: the guest was told that it is there");
    }
    if good(2) && outcome(&results, 2).2 != 512 * (7 + 8) {
        println!("LOST: the guest read something else: {:?}", outcome(&results, 2));
    }
}
