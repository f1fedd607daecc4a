//! A VM whose guest is hostile.c, and does the rows of hostile-rows.h that it is told to.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use vmbed::{
    Access, BalloonConfig, BareBoot, Bytes, ConsoleKind, CpuMode, Device, DiskConfig, EventKind, Host,
    NetConfig, Platform, Result, StopCause, Vm, VmBuilder, VmConfig, VmState,
};

use crate::guests;

/// What the guest is told at its end.
const END: u32 = 255;
/// No row: every device is used as it should be.
pub const USE: u32 = 0;
/// No row: flushes that nobody answers, again and again.
pub const SUBMIT: u32 = 253;
/// No row: frames with something left to do, sound or nonsense, for cards whose network can; and from then on.
pub const LEAVE: u32 = 251;
/// No row: every device from its reset on.
pub const RESTART: u32 = 252;
/// No row: ten frames, of which all may get lost.
pub const SEND: u32 = 254;
pub const SECTORS: u64 = 1024;
/// How many it has: a disk, two cards, a source of random numbers, a console, a balloon.
pub const DEVICES: u64 = 6;
/// What of its memory it writes to itself, by hostile.c: its data and stack, what goes through its devices, rings.
pub const WRITES: [Range<usize>; 5] =
    [0..0x2_0000, 0x4_0000..0x4_2000, 0x10_0000..0x13_0000, 0x20_0000..0x20_1000, 0x30_0000..0x36_0000];
/// For a row, and for an end. The guest may be one of ten on one emulated CPU.
pub const LONG: Duration = Duration::from_secs(240);

const MOMENT: Duration = Duration::from_millis(100);

/// The guest, where somebody has made it already: a lab has a slow compiler.
pub static CODE: OnceLock<Vec<u8>> = OnceLock::new();

fn made() -> Vec<u8> {
    let guest = guests::hostile(Path::new(env!("CARGO_TARGET_TMPDIR")));
    let code = std::fs::read(&guest).unwrap();
    std::fs::remove_file(guest).unwrap();
    code
}

/// The rows that there are, by hostile-rows.h.
pub fn rows() -> Vec<u32> {
    let list = include_str!("hostile-rows.h").lines();
    list.filter_map(|line| line.strip_prefix("ROW(")?.split(',').next()).map(|n| n.parse().unwrap()).collect()
}

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
        let code = CODE.get_or_init(made).clone();
        let mut boot = BareBoot::new(CpuMode::Long, guests::ENTRY, code);
        boot.stack = guests::STACK;
        let mut config = VmConfig::bare(boot);
        (config.platform, config.memory, config.rng) = (Platform::Pc, Bytes(guests::MEMORY), true);
        (config.disks, config.nets) = (vec![DiskConfig::attached()], nets);
        config.console = ConsoleKind::Virtio;
        let balloon = config.balloon.insert(BalloonConfig::default());
        balloon.hinting = true;
        let (ask, disk) = (Arc::new(Ask::default()), memory_file());
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

    /// The same while there is something to wait for: else `look`, which is called meanwhile, panics.
    pub fn does_as_long_as(&self, row: u32, look: impl Fn()) -> u32 {
        let said = self.ask.give(row, || {
            look();
            let state = self.vm.state();
            assert!(!matches!(state, VmState::Stopped(_)), "row {row}: the VM has ended: {state:?}");
        });
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

    /// How often it has used one of its devices as it should.
    pub fn uses(&self) -> u64 {
        let mut uses = [0; 8];
        self.vm.read_memory(guests::RESULTS + 32, &mut uses).unwrap();
        u64::from_le_bytes(uses)
    }

    /// What the embedder has been told since the last time, but for balloons.
    pub fn events(&self) -> Vec<EventKind> {
        let events = std::iter::from_fn(|| self.vm.events().next_event()).map(|event| event.kind);
        events.filter(|kind| !matches!(kind, EventKind::Balloon { .. } | EventKind::Started)).collect()
    }

    /// All that the guest can have left on its disk is the sector that it uses.
    pub fn disk_is_unharmed(&self) {
        let mut bytes = vec![0; (512 * SECTORS) as usize];
        self.disk.read_exact_at(&mut bytes, 0).unwrap();
        bytes[8 * 512..9 * 512].fill(0);
        assert!(bytes.iter().all(|byte| *byte == 0), "other sectors were written to");
    }

    /// The guest resets its machine, which is its VM's end.
    pub fn ends(&self) {
        self.ask.end();
        assert_eq!(self.vm.wait_timeout(LONG).unwrap(), Some(StopCause::GuestReset));
    }
}

fn memory_file() -> File {
    let file = File::from(memfd_create("rogue", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(512 * SECTORS).unwrap();
    file
}

impl Drop for Rogue {
    fn drop(&mut self) {
        self.ask.end();
    }
}

/// Types until no more is taken, with nobody reading: how much was.
pub fn types_without_end(vm: &Vm) -> usize {
    let all: Vec<u8> = (0..1 << 20).map(|i| i as u8).collect();
    let mut taken = 0;
    loop {
        match vm.console_input(&all[taken..]) {
            0 => return taken,
            more => taken += more,
        }
    }
}
