//! The rows about a host that fails. (31's SIGBUS is in `tests/api/memory.rs`, in Rust, C and Python.)

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};

use rustix::process::{Resource, Rlimit, Signal, getpid, getrlimit, kill_process, setrlimit};
use rustix::thread::gettid;
use vmbed::{
    BareBoot, Boot, Bytes, CpuMode, DiskConfig, ErrorKind, EventKind, Host, NetConfig, Platform, StopCause,
    VmConfig, VmState,
};

use crate::driven::beside;
use crate::files::Scratch;
use crate::guest::{run, wait_until};
use crate::rogue::{Rogue, SEND, USE};

/// Says to this program, started anew, that it is the trial's own.
pub const INSIDE: &str = "VMBED_HOSTILE_INSIDE";

/// Runs the trial `name` of this program in a process of its own, which this command starts.
pub fn inside(name: &str, around: &[&str]) {
    let mut command = Command::new("timeout");
    command.args(["--signal=KILL", "300"]).args(around).arg(std::env::current_exe().unwrap());
    let output = command.args(["--exact", name, "--test-threads=1"]).env(INSIDE, "1").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let failed = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{around:?}: {}\n{said}{failed}",
        output.status
    );
}

/// The same with these limits (prlimit(1)).
fn limited(name: &str, limits: &[&str]) {
    inside(name, &[&["prlimit"], limits].concat());
}

/// Halts at once.
fn config(memory: Bytes) -> VmConfig {
    let mut config = VmConfig::bare(BareBoot::new(CpuMode::Real, 0x1000, [0xf4]));
    config.memory = memory;
    config
}

/// The memory of a VM is refused: how. One that is small enough is built.
fn refused(memory: Bytes, kind: ErrorKind, why: &str) {
    beside(|host| {
        for _ in 0..20 {
            let error = host.build(config(memory)).unwrap_err();
            assert!(error.kind() == kind && error.to_string().contains(why), "{error:?}: {error}");
            assert_eq!(host.usage().vms, 1, "all of it was taken back");
            assert_eq!(run(&host.build(config(Bytes::mib(1))).unwrap()), StopCause::GuestHalt);
        }
    });
}

#[test]
fn row_31_addresses_that_the_host_has_not() {
    if std::env::var_os(INSIDE).is_none() {
        return limited("host::row_31_addresses_that_the_host_has_not", &["--as=1000000000"]);
    }
    refused(Bytes::mib(1000), ErrorKind::Exhausted, "finding addresses for 1048576000 bytes of guest memory");
}

#[test]
fn row_31_a_memfd_that_may_not_be_so_large() {
    if std::env::var_os(INSIDE).is_none() {
        return limited("host::row_31_a_memfd_that_may_not_be_so_large", &["--fsize=6000000"]);
    }
    refused(Bytes::mib(8), ErrorKind::Exhausted, "RLIMIT_FSIZE");
}

fn ip(words: &str) -> String {
    let output = Command::new("ip").args(words.split(' ')).output().expect("ip (package iproute2)");
    assert!(output.status.success(), "ip {words}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

const TAPS: [&str; 2] = ["vmbhost0", "vmbhost1"];

fn make_tap(name: &str) {
    ip(&format!("tuntap add {name} mode tap"));
    ip(&format!("link set {name} master vmbbr up"));
}

fn make_bridge() {
    ip("link add vmbbr type bridge");
    ip("link set vmbbr up");
}

/// Its card is on it, and the bridge passes frames on.
fn wait_for_tap(name: &str) {
    wait_until("a card is on its TAP interface again", || {
        let shown = ip(&format!("-d link show {name}"));
        shown.contains("LOWER_UP") && shown.contains("state forwarding")
    });
}

/// The embedder is told that the network of that card has failed, and of nothing else: with which errors.
fn told_of(rogue: &Rogue, card: &str) -> Vec<i32> {
    let told = std::cell::RefCell::new(Vec::new());
    wait_until("the embedder is told that a card's network has failed", || {
        told.borrow_mut().extend(rogue.events());
        !told.borrow().is_empty()
    });
    let errno = |kind| match kind {
        EventKind::BackendError { device, errno, .. } if *device == *card => errno,
        other => panic!("{other:?}"),
    };
    told.into_inner().into_iter().map(errno).collect()
}

/// The cards `net0` and `net1` of one VM are on one bridge: what the first sends comes to the second.
fn without_a_network(host: &Host) {
    let rogue =
        Rogue::with(host, TAPS.map(NetConfig::tap).into(), |builder, disk| builder.disk_fd(0, disk).unwrap());
    let works = || {
        TAPS.iter().for_each(|tap| wait_for_tap(tap));
        assert_eq!(rogue.does(USE), 0);
    };
    works();
    for round in 0..2 {
        ip("link del vmbbr");
        rogue.does(SEND);
        make_bridge();
        TAPS.iter().for_each(|tap| drop(ip(&format!("link set {tap} master vmbbr"))));
        works();
        assert_eq!(rogue.events(), [], "round {round}: a bridge is not the card's");
        for (card, tap) in ["net0", "net1"].iter().zip(TAPS) {
            ip(&format!("link set {tap} down"));
            rogue.does(SEND);
            if *card == "net0" {
                assert!(told_of(&rogue, card).iter().all(|errno| *errno == libc::EIO));
            }
            ip(&format!("link set {tap} up"));
            works();
            assert_eq!(rogue.events(), [], "{card}, round {round}: it sends nothing, or is told already");
            ip(&format!("link del {tap}"));
            rogue.does(SEND);
            told_of(&rogue, card);
            assert_eq!(rogue.vm.state(), VmState::Running);
            make_tap(tap);
            works();
            rogue.events();
        }
    }
}

/// In a network namespace of its own, with whose last process all of it is gone. Where this machine has no TAP interfaces, in the lab.
#[test]
fn row_29_a_tap_and_a_bridge_that_go_away() {
    if std::env::var_os(INSIDE).is_none() {
        let unshare = ["unshare", "--net", "--map-root-user"];
        let lab = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/lab/run");
        let around = if Path::new("/dev/net/tun").exists() { &[][..] } else { &[lab, "--"] };
        return inside("host::row_29_a_tap_and_a_bridge_that_go_away", &[around, &unshare].concat());
    }
    make_bridge();
    TAPS.iter().for_each(|tap| make_tap(tap));
    beside(without_a_network);
}

/// A PC with two disks, which resets at once.
fn hungry(scratch: &Scratch) -> VmConfig {
    let mut config = config(Bytes::mib(1));
    config.platform = Platform::Pc;
    config.boot = Boot::Bare(BareBoot::new(CpuMode::Real, 0x1000, [0xb0, 0xfe, 0xe6, 0x64, 0xf4]));
    config.disks = ["one", "two"].map(|name| DiskConfig::new(scratch.sparse(name, 1 << 20))).into();
    config
}

fn descriptors() -> u64 {
    std::fs::read_dir("/proc/self/fd").unwrap().count() as u64
}

#[test]
fn row_32_too_few_descriptors_for_a_build() {
    if std::env::var_os(INSIDE).is_none() {
        return inside("host::row_32_too_few_descriptors_for_a_build", &[]);
    }
    let scratch = Scratch::new();
    beside(|host| {
        let config = hungry(&scratch);
        drop(host.build(config.clone()).unwrap());
        // What is counted of a VM is opened when somebody asks.
        assert_eq!(host.usage().vms, 1);
        let (all, before) = (getrlimit(Resource::Nofile), descriptors());
        let (mut failed, mut built) = (0, 0);
        for more in 0..100 {
            let fewer = Rlimit { current: Some(before + more), maximum: all.maximum };
            setrlimit(Resource::Nofile, fewer).unwrap();
            let result = host.build(config.clone());
            setrlimit(Resource::Nofile, all).unwrap();
            match result {
                Ok(vm) => {
                    assert_eq!(run(&vm), StopCause::GuestReset);
                    built += 1;
                }
                Err(error) => {
                    assert!(error.to_string().contains("os error 24"), "{error}");
                    failed += 1;
                }
            }
            assert_eq!((descriptors(), host.usage().vms), (before, 1), "with {more} more");
        }
        assert!(
            failed > 10 && built > 10,
            "{failed} failed, {built} were built: the sweep has lost its ends"
        );
    });
}

/// The thread that builds, and how often a handler has interrupted it.
static BUILDER: AtomicI32 = AtomicI32::new(0);
static HEARD: AtomicU64 = AtomicU64::new(0);

extern "C" fn hear(_: libc::c_int) {
    if gettid().as_raw_pid() == BUILDER.load(Ordering::Relaxed) {
        HEARD.fetch_add(1, Ordering::Relaxed);
    }
}

/// Calls that the handler interrupts fail with EINTR: they are not begun again by themselves.
fn interrupt_by(signal: Signal) {
    #[expect(unsafe_code, reason = "whose handlers have calls begun again is all that there is without")]
    // SAFETY: all zeroes is no flags and nothing blocked; the handler makes one call and counts.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = hear as *const () as usize;
        assert_eq!(libc::sigaction(signal.as_raw(), &action, std::ptr::null_mut()), 0);
    }
}

fn interrupt(thread: i32, signal: Signal) {
    #[expect(unsafe_code, reason = "tgkill has no safe wrapper that takes a number")]
    // SAFETY: plain integers; the thread is one of this process.
    unsafe {
        libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, signal.as_raw());
    }
}

/// Signals of the process and of the thread that builds, with handlers that interrupt calls, come all the time; VMs are built, work, and end.
#[test]
fn row_32_a_storm_of_signals() {
    const SIGNALS: [Signal; 3] = [Signal::USR1, Signal::ALARM, Signal::URG];
    if std::env::var_os(INSIDE).is_none() {
        return inside("host::row_32_a_storm_of_signals", &[]);
    }
    let builder = gettid().as_raw_pid();
    BUILDER.store(builder, Ordering::Relaxed);
    SIGNALS.into_iter().for_each(interrupt_by);
    let over = Arc::new(AtomicBool::new(false));
    let storm = std::thread::spawn({
        let over = over.clone();
        move || {
            while !over.load(Ordering::Relaxed) {
                for signal in SIGNALS {
                    kill_process(getpid(), signal).unwrap();
                    interrupt(builder, signal);
                }
                std::thread::sleep(std::time::Duration::from_micros(200));
            }
        }
    });
    beside(|host| {
        for _ in 0..3 {
            let rogue = Rogue::start(host);
            for row in [USE, 13, 17, USE] {
                assert_eq!(rogue.does(row), 0);
            }
            assert_eq!(rogue.events(), []);
        }
        let scratch = Scratch::new();
        for _ in 0..20 {
            assert_eq!(run(&host.build(hungry(&scratch)).unwrap()), StopCause::GuestReset);
        }
    });
    over.store(true, Ordering::Relaxed);
    storm.join().unwrap();
    let heard = HEARD.load(Ordering::Relaxed);
    assert!(heard > 100, "the thread that builds was interrupted {heard} times");
}
