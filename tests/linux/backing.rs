//! A stock kernel on memory of other kinds.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use vmbed::{
    BackingKind, BalloonConfig, BareBoot, Bytes, CpuMode, ErrorKind, Host, Platform, SandboxConfig, VmConfig,
    VmState,
};

use crate::assets::{self, KERNELS};
use crate::balloon::{filled, filled_by, wait_until};
use crate::cage::Setting;
use crate::guest::{Guest, LONG, config};
use crate::guests::{self, Op};
use crate::trial;

pub fn add(trials: &mut Vec<Trial>) {
    trials.push(trial("backing::huge_pages_of_the_pool", pool));
    trials.push(trial("backing::a_huge_page_that_is_gone_ends_its_guest_and_nothing_else", gone));
    trials.push(trial("backing::anonymous_memory_given_back_is_free", anonymous));
}

/// The guest of a script.
pub fn scripted() -> PathBuf {
    assets::directory().join("virtio-guest")
}

/// Compiles the guest of a script, before the lab is entered.
pub fn prepare() {
    fs::rename(guests::virtio(&assets::directory()), scripted()).unwrap();
}

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// A number of the pool's.
fn read(file: &str) -> u32 {
    fs::read_to_string(Path::new(POOL).join(file)).unwrap().trim().parse().unwrap()
}

fn pool() {
    let pool = Setting::of(Path::new(POOL).join("nr_hugepages"), "70");
    assert_eq!(read("nr_hugepages"), 70, "so many huge pages free at once");
    let mut config = config(KERNELS[0], "echo flags=$(grep -c . /proc/cpuinfo); read go");
    config.backing.kind = BackingKind::Huge2M;
    config.backing.numa_nodes = vec![0];
    let host = Host::open().unwrap();
    let guest = Guest::start_on(&host, config.clone());
    guest.wait_for("flags=");
    assert_eq!(host.usage().pinned, Bytes::mib(128));
    let memory = guest.vm.memory();
    assert_eq!((memory.pinned, memory.huge, memory.swapped), (Bytes::mib(128), memory.backing, Bytes(0)));
    let taken = read("nr_hugepages") - read("free_hugepages");
    assert_eq!(memory.backing, Bytes(u64::from(taken) << 21), "as the kernel counts them");
    // The pages that this guest has not touched are set aside for it all the same.
    let error = Host::open().unwrap().build(config).unwrap_err();
    assert!(
        error.kind() == ErrorKind::Exhausted && error.to_string().contains("of 70 pages are free"),
        "{error}"
    );
    guest.vm.console_input(b"go\n");
    guest.power_off();
    drop(guest);
    assert_eq!(read("free_hugepages"), 70, "all are back");
    by_halves(&host);
    assert_eq!(read("free_hugepages"), 70, "all are back");
    drop(pool);
}

/// A guest that is slow, as on a machine which has other things to do, gives a page of the pool to its balloon in two halves.
fn by_halves(host: &Host) {
    const FIRST: u32 = 4 * 512;
    let mut boot = BareBoot::new(CpuMode::Long, guests::ENTRY, fs::read(scripted()).unwrap());
    boot.stack = guests::STACK;
    let mut config = VmConfig::bare(boot);
    (config.platform, config.memory) = (Platform::Pc, Bytes::mib(16));
    (config.backing.kind, config.balloon) = (BackingKind::Huge2M, Some(BalloonConfig::default()));
    let vm = host.builder(config).pio_doorbell("said", guests::SAY, 1).build().unwrap();
    let half = |first| (Op::Inflate, first, 256, 9);
    let steps =
        [half(FIRST), (Op::Target, 512, 0, 0), half(FIRST + 256), (Op::Tell, 0, 0, 1), (Op::Target, 1, 0, 0)];
    vm.write_memory(guests::SCRIPT, &guests::script(&steps)).unwrap();
    vm.start().unwrap();
    let inflated = |bytes: u64, measured: Bytes| {
        let end = Instant::now() + LONG;
        let now = || vm.balloon_statistics().unwrap().inflated;
        while now().claimed < Bytes(bytes) || now().measured < measured {
            assert!(Instant::now() < end, "waited {LONG:?} for a balloon of {bytes}: {:?}", now());
            std::thread::sleep(Duration::from_millis(5));
        }
        now().measured
    };
    assert_eq!(inflated(1 << 20, Bytes(0)), Bytes(0), "a half is none of the pool's");
    // Far longer than what may soon have neighbours waits for them elsewhere.
    std::thread::sleep(Duration::from_millis(300));
    vm.set_balloon(Bytes::mib(2)).unwrap();
    assert_eq!(inflated(2 << 20, Bytes::mib(2)), Bytes::mib(2));
    vm.stop().unwrap();
}

/// What a guest gave back has gone from the pool when it, or the program, uses it again.
fn gone() {
    vmbed::handle_sigbus().unwrap();
    let host = Host::open().unwrap();
    let other = Guest::start_on(&host, config(KERNELS[0], "echo other=runs; read go; echo other=went"));
    for by_guest in [false, true] {
        let pool = Setting::of(Path::new(POOL).join("nr_hugepages"), "130");
        // What was freed in huge pages lies side by side, and so do the pages that a balloon takes of it.
        let mut config = filled_by(BalloonConfig::default(), "size=250m,huge=always", "read go");
        config.backing.kind = BackingKind::Huge2M;
        // What of the pool was given back is fetched again by threads that may do little else.
        config.sandbox = Some(SandboxConfig::default());
        let guest = Guest::start_on(&host, config);
        guest.wait_for("now=freed");
        let measured = |g: &Guest| g.vm.balloon_statistics().unwrap().inflated.measured;
        guest.vm.set_balloon(Bytes::mib(150)).unwrap();
        wait_until(&guest, "the balloon to be full", |g| g.vm.memory().loaned == Bytes::mib(150));
        assert!(measured(&guest) > Bytes::mib(16), "some of it in whole pages: {:?}", measured(&guest));
        // It gives back what it is asked for, and nothing by reporting, which it could not take back.
        guest.vm.set_balloon(Bytes::mib(140)).unwrap();
        wait_until(&guest, "some of it to be the guest's again", |g| g.vm.memory().loaned == Bytes::mib(140));
        let statistics = guest.vm.balloon_statistics().unwrap();
        assert_eq!(statistics.reported.claimed, Bytes(0), "{statistics:?}");
        // Whoever looks after the machine takes those that are free for something else.
        let taken = read("nr_hugepages") - read("free_hugepages");
        fs::write(Path::new(POOL).join("nr_hugepages"), taken.to_string()).unwrap();
        assert_eq!(
            read("free_hugepages"),
            read("resv_hugepages"),
            "those that it has never touched are its own"
        );
        if by_guest {
            guest.vm.set_balloon(Bytes(0)).unwrap();
        } else {
            let mut bytes = vec![0; 1 << 20];
            let failed: Vec<_> =
                (0..256).filter_map(|mib| guest.vm.read_memory(mib << 20, &mut bytes).err()).collect();
            assert!(failed.len() > 4, "those of what was given back: {}", failed.len());
            for error in failed {
                let said = error.to_string();
                assert!(error.kind() == ErrorKind::Exhausted && said.contains("(SIGBUS)"), "{error}");
            }
        }
        let cause = guest.vm.wait_timeout(LONG).unwrap();
        let cause =
            cause.unwrap_or_else(|| panic!("waited {LONG:?} for an end ({by_guest})\n{}", guest.console()));
        let said = cause.to_string();
        assert!(said.contains("memory") && said.contains("the host has no page for it"), "{said}");
        drop(guest);
        assert_eq!(read("free_hugepages"), read("nr_hugepages"), "all are back");
        drop(pool);
    }
    assert_eq!(other.vm.state(), VmState::Running);
    other.vm.console_input(b"go\n");
    other.wait_for("other=went");
    other.power_off();
}

/// Without file or pool: only the machine's free memory tells, in MiB. What the kernel would let go of at once is free: what it has
/// read from files, parts of huge pages that it has not split yet since somebody looked at them, and what lies on a processor's own
/// lists, which an idle one keeps.
fn free() -> u64 {
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    let number = |line: &str, name: &str| {
        line.trim().strip_prefix(name)?.split_whitespace().next()?.parse::<u64>().ok()
    };
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap();
    let kib = meminfo.lines().find_map(|line| number(line, "MemFree:")).unwrap();
    let zones = fs::read_to_string("/proc/zoneinfo").unwrap();
    let kept: u64 = zones.lines().filter_map(|line| number(line, "count:")).sum();
    (kib + kept * 4) >> 10
}

fn anonymous() {
    let mut off = BalloonConfig::default();
    (off.reporting, off.deflate_on_oom) = (false, false);
    let mut config = filled(off, "read go");
    config.backing.kind = BackingKind::Anonymous;
    let guest = Guest::start(config);
    guest.wait_for("now=freed");
    let (vm, before, free_before) = (&guest.vm, guest.vm.memory(), free());
    assert!(before.backing > Bytes::mib(140) && before.resident == before.backing, "{before:?}");
    vm.set_balloon(Bytes::mib(130)).unwrap();
    wait_until(&guest, "the balloon to be full", |g| g.vm.memory().loaned == Bytes::mib(130));
    let (after, statistics) = (vm.memory(), vm.balloon_statistics().unwrap());
    let given = before.backing.get().saturating_sub(after.backing.get()) >> 20;
    assert!(given > 100 && statistics.inflated.measured > Bytes::mib(105), "{given} {statistics:?}");
    wait_until(&guest, "what was given to be free", |_| free().saturating_sub(free_before) + 10 > given);
    vm.console_input(b"go\n");
    guest.power_off();
}
