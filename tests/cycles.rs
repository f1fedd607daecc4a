//! Nothing is left behind: descriptors, threads, maps and memory after hundreds of VMs and of reboots, after builds that fail
//! half-way, under signals, over a fork. A program of its own, since it counts what its process has.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Trial};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use vmbed::{BareBoot, CpuMode, DiskConfig, EventKind, Host, NetConfig, Platform, StopCause, Vm, VmConfig};

#[path = "guests/mod.rs"]
mod guests;
mod holdings;
#[path = "guests/rogue.rs"]
mod rogue;

use holdings::Holdings;
use rogue::{Rogue, USE};

const LONG: Duration = Duration::from_secs(60);

fn main() {
    // One at a time: each counts the whole process.
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    let trials = vec![
        trial("cycles_leave_nothing", cycles),
        trial("reboots_leave_nothing", reboots),
        trial("builds_cut_short_by_the_descriptor_limit_leave_nothing", few_descriptors),
        trial("signals_at_every_library_thread_change_nothing", signals),
        trial("a_fork_while_vms_run_changes_nothing", fork),
        trial("a_drop_at_any_moment_ends_everything", drops),
    ];
    libtest_mimic::run(&arguments, trials).exit();
}

fn trial(name: &str, run: fn()) -> Trial {
    Trial::test(name, move || {
        run();
        Ok(())
    })
}

/// How often: `make soak` wants 10,000 cycles and 1,000 reboots.
fn times(variable: &str, short: usize) -> usize {
    std::env::var(variable).map_or(short, |n| n.parse().unwrap_or_else(|_| panic!("{variable} is a number")))
}

/// A bare guest in a loop, or, on a PC board, with a disk, whose devices' threads and queues exist.
fn config(platform: Platform, disk: &Path) -> VmConfig {
    let mut config = VmConfig::bare(BareBoot::new(CpuMode::Real, 0x1000, [0xe6, 0x10, 0xeb, 0xfc]));
    config.platform = platform;
    if platform == Platform::Pc {
        config.cpus.count = 2;
        config.rng = true;
        config.disks.push(DiskConfig::new(disk));
    }
    config
}

struct Disk(std::path::PathBuf);

impl Disk {
    fn new() -> Self {
        let path = std::env::temp_dir().join(format!("vmbed-cycles-{}", std::process::id()));
        fs::write(&path, vec![0; 512 * rogue::SECTORS as usize]).unwrap();
        Self(path)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn ends(vm: &Vm) {
    assert_eq!(vm.stop().unwrap(), StopCause::HostStop);
}

/// Builds, starts, stops and drops VMs of both kinds, over and over: nothing becomes more. Half of them go through a pause; after three in four,
/// another one is dropped that has not started, that runs, or that is paused.
fn cycles() {
    let host = Host::open().unwrap();
    let disk = Disk::new();
    let once = |i: usize| {
        let platform = if i.is_multiple_of(5) { Platform::Pc } else { Platform::Bare };
        let built = || host.build(config(platform, &disk.0)).unwrap();
        let vm = built();
        vm.start().unwrap();
        if i.is_multiple_of(2) {
            vm.pause().unwrap();
            vm.resume().unwrap();
        }
        ends(&vm);
        drop(vm);
        if i.is_multiple_of(4) {
            return;
        }
        let vm = built();
        if i % 4 > 1 {
            vm.start().unwrap();
        }
        if i % 4 > 2 {
            vm.pause().unwrap();
        }
    };
    stays_flat("cycles", times("VMBED_CYCLES", 400), once);
    assert_eq!(host.usage().memory.get(), 0);
}

/// A guest uses each of its devices and resets its machine, and is built and started again, as an orchestrator does it: on the same
/// disk, with its cards on the same cable.
fn reboots() {
    let host = Host::open().unwrap();
    let disk = Disk::new();
    let file = fs::File::options().read(true).write(true).open(&disk.0).unwrap();
    let (near, far) = std::os::unix::net::UnixDatagram::pair().unwrap();
    let once = |_| {
        let rogue = Rogue::with(&host, vec![NetConfig::attached(); 2], |builder, _| {
            let builder = builder.net_fd(0, &near).unwrap().net_fd(1, &far).unwrap();
            builder.disk_fd(0, &file).unwrap()
        });
        assert_eq!(rogue.does(USE), 0);
        rogue.ends();
        assert_eq!(rogue.events(), [EventKind::Stopped(StopCause::GuestReset)]);
    };
    stays_flat("reboots", times("VMBED_REBOOTS", 20), once);
    assert_eq!(host.usage().memory.get(), 0);
}

/// Does `once` so many times, after a few that fill what is filled once.
fn stays_flat(what: &str, times: usize, once: impl Fn(usize)) {
    (0..20).for_each(&once);
    let (before, begun) = (Holdings::now(), Instant::now());
    for i in 1..=times {
        once(i);
        // Ten looks, so that one sees whether it still grows.
        if i % times.div_ceil(10) == 0 || i == times {
            let now = Holdings::now();
            println!("{i} {what} in {:.0?}: {now:?}", begun.elapsed());
            now.assert_as(&before, &format!("after {i} {what}"));
        }
    }
}

/// Every build between "not even one descriptor" and "enough" either works or is an error, and takes back
/// what it had made.
fn few_descriptors() {
    let host = Host::open().unwrap();
    let disk = Disk::new();
    let old = getrlimit(Resource::Nofile);
    drop(host.build(config(Platform::Pc, &disk.0)).unwrap());
    let before = Holdings::now().counts();
    let (mut failed, mut built) = (0, 0);
    for more in 0..120 {
        let current = Some(before.0 as u64 + more);
        setrlimit(Resource::Nofile, Rlimit { current, maximum: old.maximum }).unwrap();
        let result = host.build(config(Platform::Pc, &disk.0));
        setrlimit(Resource::Nofile, old).unwrap();
        match result {
            Ok(vm) => {
                vm.start().unwrap();
                ends(&vm);
                built += 1;
            }
            Err(error) => {
                assert!(!error.to_string().is_empty());
                failed += 1;
            }
        }
        assert_eq!(Holdings::now().counts(), before, "with {more} descriptors more");
        assert_eq!(host.usage().memory.get(), 0);
    }
    assert!(failed > 10 && built > 10, "{failed} failed, {built} were built: the sweep has lost its ends");
}

/// A library's threads block every signal: none is delivered there, the kick's own least of all.
fn signals() {
    let host = Host::open().unwrap();
    let disk = Disk::new();
    let vm = host.build(config(Platform::Pc, &disk.0)).unwrap();
    vm.start().unwrap();
    // A thread names itself: wait until two vCPUs and two device loops have.
    let end = Instant::now() + LONG;
    let mine = loop {
        let mine: Vec<i32> = tasks().into_iter().filter(|t| name(*t).starts_with("vmbed-")).collect();
        if mine.len() == 4 {
            break mine;
        }
        assert!(Instant::now() < end, "waited {LONG:?} for four threads of the library: {mine:?}");
        std::thread::yield_now();
    };
    for _ in 0..200 {
        for thread in &mine {
            for signal in [
                Signal::USR1,
                Signal::USR2,
                Signal::TERM,
                Signal::INT,
                Signal::HUP,
                Signal::ALARM,
                Signal::URG,
                Signal::PIPE,
            ] {
                send(*thread, signal);
            }
        }
    }
    vm.pause().unwrap();
    vm.resume().unwrap();
    ends(&vm);
}

fn tasks() -> Vec<i32> {
    fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|t| t.unwrap().file_name().to_str().unwrap().parse().ok())
        .collect()
}

fn name(task: i32) -> String {
    fs::read_to_string(format!("/proc/self/task/{task}/comm")).unwrap_or_default()
}

fn send(thread: i32, signal: Signal) {
    #[expect(unsafe_code, reason = "tgkill has no safe wrapper that takes a number")]
    // SAFETY: plain integers; the thread is one of this process.
    unsafe {
        libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal.as_raw());
    }
}

fn fork() {
    let host = Host::open().unwrap();
    let disk = Disk::new();
    let vm = host.build(config(Platform::Pc, &disk.0)).unwrap();
    vm.start().unwrap();
    for _ in 0..20 {
        // std forks and execs; the child has none of our descriptors, and guest memory is not copied.
        let output = std::process::Command::new("ls").args(["-l", "/proc/self/fd"]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            !text.contains("kvm") && !text.contains("vmbed-guest") && !text.contains("eventfd"),
            "{text}"
        );
    }
    assert!(vm.wait_timeout(Duration::from_millis(1)).unwrap().is_none(), "it still runs");
    ends(&vm);
}

fn drops() {
    let host = Host::open().unwrap();
    let disk = Disk::new();
    drop(host.build(config(Platform::Pc, &disk.0)).unwrap());
    let before = Holdings::now().counts();
    for i in 0..60u64 {
        let vm = host.build(config(Platform::Pc, &disk.0)).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| vm.start());
            scope.spawn(|| vm.pause());
            scope.spawn(|| vm.request_stop());
            scope.spawn(|| vm.resume());
            std::thread::sleep(Duration::from_micros(i * 37 % 500));
        });
        let begin = Instant::now();
        drop(vm);
        assert!(begin.elapsed() < LONG, "drop is bounded");
    }
    assert_eq!(Holdings::now().counts(), before);
}
