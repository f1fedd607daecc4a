//! Nothing is left behind: descriptors, threads and maps after hundreds of VMs, after builds that fail
//! half-way, under signals, over a fork. A program of its own, since it counts what its process has.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Trial};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, setrlimit};
use vmbed::{BareBoot, CpuMode, DiskConfig, Host, Platform, StopCause, Vm, VmConfig};

const LONG: Duration = Duration::from_secs(60);

fn main() {
    // One at a time: each counts the whole process.
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    let trials = vec![
        trial("cycles_leave_nothing", cycles),
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

/// What a process has: open descriptors, threads, mappings of guests.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
struct Holdings {
    descriptors: usize,
    threads: usize,
    guest_maps: usize,
}

fn holdings() -> Holdings {
    let count = |path: &str| fs::read_dir(path).unwrap().count();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    Holdings {
        descriptors: count("/proc/self/fd"),
        threads: count("/proc/self/task"),
        guest_maps: maps.lines().filter(|l| l.contains("vmbed-guest") || l.contains("kvm-vcpu")).count(),
    }
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
        fs::write(&path, vec![0; 1 << 20]).unwrap();
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

fn cycles() {
    let host = Host::open().unwrap();
    let disk = Disk::new();
    let once = |i: usize| {
        let platform = if i.is_multiple_of(5) { Platform::Pc } else { Platform::Bare };
        let vm = host.build(config(platform, &disk.0)).unwrap();
        match i % 4 {
            0 => drop(vm),
            1 => {
                vm.start().unwrap();
                ends(&vm);
            }
            2 => {
                vm.start().unwrap();
                vm.pause().unwrap();
                vm.resume().unwrap();
            }
            _ => {
                vm.start().unwrap();
                vm.pause().unwrap();
            }
        }
    };
    (0..8).for_each(once);
    let before = holdings();
    (0..500).for_each(once);
    assert_eq!(holdings(), before);
    assert_eq!(host.usage().memory.get(), 0);
}

/// Every build between "not even one descriptor" and "enough" either works or is an error, and takes back
/// what it had made.
fn few_descriptors() {
    let host = Host::open().unwrap();
    let disk = Disk::new();
    let old = getrlimit(Resource::Nofile);
    drop(host.build(config(Platform::Pc, &disk.0)).unwrap());
    let before = holdings();
    let (mut failed, mut built) = (0, 0);
    for more in 0..120 {
        let current = Some(before.descriptors as u64 + more);
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
        assert_eq!(holdings(), before, "with {more} descriptors more");
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
    let before = holdings();
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
    assert_eq!(holdings(), before);
}
