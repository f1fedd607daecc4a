//! The rows by a bare guest, `tests/guests/hostile.c`, on a KVM: through the registers, rings and doorbells that a guest has, with
//! everything on threads of its own. `tests/c/hostile.c` has the same guest do the same through C.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use vmbed::internals::memory_file;
use vmbed::{
    Access, BalloonConfig, BareBoot, BlockBackend, BlockOp, BlockRequest, Bytes, ConsoleKind, CpuMode,
    Device, DiskConfig, EventKind, Host, NetConfig, Platform, Result, StopCause, Vm, VmBuilder, VmConfig,
};

use crate::guests;

/// What the guest is told at its end.
const END: u32 = 255;
/// No row: every device is used as it should be.
pub const USE: u32 = 0;
/// No row: flushes that nobody answers, again and again.
const SUBMIT: u32 = 253;
/// No row: every device from its reset on.
const RESTART: u32 = 252;
/// No row: ten frames, of which all may get lost.
pub const SEND: u32 = 254;
const SECTORS: u64 = 1024;
const LONG: Duration = Duration::from_secs(120);
const MOMENT: Duration = Duration::from_millis(100);

/// Where the guest asks for rows and says that it has done them.
#[derive(Default)]
struct Ask {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    given: Option<u32>,
    said: Option<u32>,
    ended: bool,
}

impl Ask {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|broken| broken.into_inner())
    }

    /// Gives the guest a row, and waits until it has said something. `look` is called meanwhile: it panics where there is nothing to wait
    /// for any more.
    fn give(&self, row: u32, look: impl Fn()) -> Option<u32> {
        let end = Instant::now() + LONG;
        self.lock().given = Some(row);
        self.changed.notify_all();
        while Instant::now() < end {
            look();
            let mut state = self.lock();
            if state.said.is_none() {
                state = self.changed.wait_timeout(state, MOMENT).unwrap().0;
            }
            if let Some(said) = state.said.take() {
                return Some(said);
            }
        }
        None
    }

    fn end(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }
}

impl Device for Ask {
    fn read(&self, _: Access, data: &mut [u8]) -> Result<()> {
        let mut state = self.lock();
        while state.given.is_none() && !state.ended {
            state = self.changed.wait(state).unwrap();
        }
        let row = state.given.take().unwrap_or(END).to_le_bytes();
        data.copy_from_slice(&row[..data.len()]);
        Ok(())
    }

    fn write(&self, _: Access, data: &[u8]) -> Result<()> {
        let mut word = [0; 4];
        word[..data.len()].copy_from_slice(data);
        self.lock().said = Some(u32::from_le_bytes(word));
        self.changed.notify_all();
        Ok(())
    }
}

/// A VM with every device, and the guest.
pub struct Rogue {
    pub vm: Vm,
    ask: Arc<Ask>,
    disk: File,
}

impl Rogue {
    pub fn start(host: &Host) -> Self {
        let (near, far) = UnixDatagram::pair().unwrap();
        let attached = vec![NetConfig::attached(); 2];
        Self::with(host, attached, |b, disk| {
            b.disk_fd(0, disk).unwrap().net_fd(0, near).unwrap().net_fd(1, far).unwrap()
        })
    }

    /// With these cards instead of two ends of a cable, and what is attached to them and as its disk: that file, or another thing.
    pub fn with(
        host: &Host,
        nets: Vec<NetConfig>,
        attach: impl FnOnce(VmBuilder, &File) -> VmBuilder,
    ) -> Self {
        static CODE: LazyLock<Vec<u8>> = LazyLock::new(|| {
            let guest = guests::hostile(Path::new(env!("CARGO_TARGET_TMPDIR")));
            let code = std::fs::read(&guest).unwrap();
            std::fs::remove_file(guest).unwrap();
            code
        });
        let mut boot = BareBoot::new(CpuMode::Long, guests::ENTRY, CODE.clone());
        boot.stack = guests::STACK;
        let mut config = VmConfig::bare(boot);
        (config.platform, config.memory, config.rng) = (Platform::Pc, Bytes(guests::MEMORY), true);
        (config.disks, config.nets) = (vec![DiskConfig::attached()], nets);
        config.console = ConsoleKind::Virtio;
        let balloon = config.balloon.insert(BalloonConfig::default());
        balloon.hinting = true;
        let (ask, disk) = (Arc::new(Ask::default()), memory_file(512 * SECTORS).unwrap());
        let builder = host.builder(config).pio_device("ask", guests::SAY, 8, ask.clone());
        let builder = attach(builder, &disk);
        let rogue = Self { vm: builder.build().unwrap(), ask, disk };
        rogue.vm.start().unwrap();
        rogue
    }

    /// How often it made a device ask for a reset in that row. Every device serves at its end.
    pub fn does(&self, row: u32) -> u32 {
        self.does_as_long_as(row, || ())
    }

    fn does_as_long_as(&self, row: u32, look: impl Fn()) -> u32 {
        let said = self.ask.give(row, look);
        let mut report = [0; 32];
        self.vm.read_memory(guests::RESULTS, &mut report).unwrap();
        let word = |i: usize| u32::from_le_bytes(report[4 * i..][..4].try_into().unwrap());
        let wide = |i: usize| u64::from_le_bytes(report[8 * i..][..8].try_into().unwrap());
        let state = self.vm.state();
        assert!(said.is_some(), "row {row}, {state:?}: it waits in line {}, device {:#x}", word(1), word(3));
        let wrong = format!("{:#x} where {:#x} should be, device {:#x}", wide(2), wide(3), word(3));
        assert_eq!((said, word(0)), (Some(0), 0), "row {row}, hostile.c:{}: {wrong}", word(0));
        word(2)
    }

    /// What the embedder has been told since the last time, but for balloons.
    pub fn events(&self) -> Vec<EventKind> {
        let events = std::iter::from_fn(|| self.vm.events().next_event()).map(|event| event.kind);
        events.filter(|kind| !matches!(kind, EventKind::Balloon { .. } | EventKind::Started)).collect()
    }

    /// All that the guest can have left on its disk is the sector that it uses.
    fn disk_is_unharmed(&self) {
        let mut bytes = vec![0; (512 * SECTORS) as usize];
        self.disk.read_exact_at(&mut bytes, 0).unwrap();
        bytes[8 * 512..9 * 512].fill(0);
        assert!(bytes.iter().all(|byte| *byte == 0), "other sectors were written to");
    }
}

impl Drop for Rogue {
    fn drop(&mut self) {
        self.ask.end();
    }
}

/// Another VM of this process, with the same devices.
struct Bystander(Rogue, Vec<u8>);

impl Bystander {
    fn start(host: &Host) -> Self {
        let rogue = Rogue::start(host);
        assert_eq!(rogue.does(USE), 0);
        let memory = Self::memory(&rogue.vm);
        Self(rogue, memory)
    }

    fn memory(vm: &Vm) -> Vec<u8> {
        let mut memory = vec![0; guests::MEMORY as usize];
        vm.read_memory(0, &mut memory).unwrap();
        memory
    }

    fn undisturbed(self) {
        let Self(rogue, memory) = self;
        assert!(Self::memory(&rogue.vm) == memory, "its memory has changed");
        assert_eq!(rogue.does(USE), 0);
        assert_eq!(rogue.events(), []);
        rogue.disk_is_unharmed();
        rogue.ask.end();
        assert_eq!(rogue.vm.wait_timeout(LONG).unwrap(), Some(StopCause::GuestReset));
    }
}

/// Something happens, and another VM of this process must not notice.
pub fn beside(happens: impl FnOnce(&Host)) {
    let host = Host::open().unwrap();
    let bystander = Bystander::start(&host);
    happens(&host);
    assert_eq!(host.usage().vms, 1, "what was built is gone");
    bystander.undisturbed();
}

/// One VM does a row, and the other one must not notice.
fn attack(row: u32) {
    beside(|host| does(host, row));
}

fn does(host: &Host, row: u32) {
    let rogue = Rogue::start(host);
    let typed = if row == 22 { types_without_end(&rogue.vm) } else { 0 };
    let broken = rogue.does(row);
    let told = rogue.events();
    let resets = told.iter().filter(|kind| matches!(kind, EventKind::DeviceNeedsReset { .. })).count();
    assert!(
        resets == told.len() && (resets > 0) == (broken > 0) && resets <= broken as usize,
        "{broken}: {told:?}"
    );
    rogue.disk_is_unharmed();
    match row {
        // 5, 7, 8: the number of what is done, so that none of it is left out.
        5 => assert_eq!(broken, 5 * 7),
        7 => assert_eq!(broken, 5 * 4),
        8 => assert_eq!(broken, 5 * 18),
        16 => assert_eq!(rogue.vm.balloon_statistics().unwrap().ignored, 3 + 5),
        22 => assert!((4096..=4096 + 64).contains(&typed), "{typed} bytes were taken"),
        _ => {}
    }
    rogue.ask.end();
    assert_eq!(rogue.vm.wait_timeout(LONG).unwrap(), Some(StopCause::GuestReset));
}

/// How much of it was taken, with nobody reading.
fn types_without_end(vm: &Vm) -> usize {
    let all: Vec<u8> = (0..1 << 20).map(|i| i as u8).collect();
    let mut taken = 0;
    loop {
        match vm.console_input(&all[taken..]) {
            0 => return taken,
            more => taken += more,
        }
    }
}

/// A disk of one sector, wherever that is, that keeps its requests, or answers them.
#[derive(Clone, Default)]
struct Keeps(Arc<Kept>);

#[derive(Default)]
struct Kept {
    requests: Mutex<Vec<BlockRequest>>,
    answers: AtomicBool,
    sector: Mutex<Vec<u8>>,
}

impl BlockBackend for Keeps {
    fn size(&self) -> u64 {
        512 * SECTORS
    }

    fn submit(&mut self, mut request: BlockRequest) {
        if !self.0.answers.load(Ordering::SeqCst) {
            return self.0.requests.lock().unwrap().push(request);
        }
        let mut sector = self.0.sector.lock().unwrap();
        sector.resize(512, 0);
        match request.op() {
            BlockOp::Read => drop(request.copy_from(0, &sector)),
            BlockOp::Write { .. } => drop(request.copy_to(0, &mut sector)),
            _ => {}
        }
        request.complete(Ok(()));
    }
}

/// Whatever the guest offers, what waits for its host is no more than its queue holds.
#[test]
fn row_12_a_disk_that_does_not_answer_keeps_no_more_than_the_queue_holds() {
    beside(|host| {
        let disk = Keeps::default();
        let (near, far) = UnixDatagram::pair().unwrap();
        let rogue = Rogue::with(host, vec![NetConfig::attached(); 2], |builder, _| {
            let builder = builder.net_fd(0, near).unwrap().net_fd(1, far).unwrap();
            builder.disk_backend(0, disk.clone())
        });
        for round in 0..3 {
            disk.0.answers.store(false, Ordering::SeqCst);
            let few = || {
                let kept = disk.0.requests.lock().unwrap().len();
                assert!(kept <= 16, "{kept} requests wait: a head that is in flight was taken again");
            };
            assert_eq!(rogue.does_as_long_as(SUBMIT, few), 1);
            let told = rogue.events();
            let in_use = |why: &str| why.contains("while it is in use");
            assert!(
                matches!(&told[..], [EventKind::DeviceNeedsReset { why, .. }] if in_use(why)),
                "{told:?}"
            );
            // Those before the first that was offered twice.
            let kept = std::mem::take(&mut *disk.0.requests.lock().unwrap());
            assert_eq!(kept.len(), 16, "round {round}");
            disk.0.answers.store(true, Ordering::SeqCst);
            kept.into_iter().for_each(|request| assert!(request.complete(Ok(()))));
            assert_eq!(rogue.does(RESTART), 0);
        }
    });
}

macro_rules! rows {
    ($($name:ident = $row:literal),* $(,)?) => {
        $(#[test]
        fn $name() {
            attack($row);
        })*

        /// The rows that there are tests for.
        const ROWS: &[u32] = &[$($row),*];
    };
}

rows! {
    row_02_by_a_guest = 2,
    row_03_by_a_guest = 3,
    row_04_by_a_guest = 4,
    row_05_by_a_guest = 5,
    row_06_by_a_guest = 6,
    row_07_by_a_guest = 7,
    row_08_by_a_guest = 8,
    row_09_by_a_guest = 9,
    row_10_by_a_guest = 10,
    row_11_by_a_guest = 11,
    row_12_by_a_guest = 12,
    row_13_by_a_guest = 13,
    row_14_by_a_guest = 14,
    row_15_by_a_guest = 15,
    row_16_by_a_guest = 16,
    row_17_by_a_guest = 17,
    row_18_by_a_guest = 18,
    row_19_by_a_guest = 19,
    row_20_by_a_guest = 20,
    row_22_by_a_guest = 22,
    row_23_by_a_guest = 23,
}

/// hostile-rows.h is the list: the guest, these tests and those in C have the same rows.
#[test]
fn every_row_of_the_guest_has_its_test() {
    let list = include_str!("../guests/hostile-rows.h").lines();
    let rows: Vec<u32> = list
        .filter_map(|line| line.strip_prefix("ROW(")?.split(',').next())
        .map(|number| number.parse().unwrap())
        .collect();
    assert_eq!(rows, ROWS);
}
