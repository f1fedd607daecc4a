//! The rows by a bare guest, `tests/guests/hostile.c`, on a KVM: through the registers, rings and doorbells that a guest has, with
//! everything on threads of its own. `tests/c/hostile.c` has the same guest do the same through C.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use vmbed::{
    Access, BareBoot, BlockBackend, BlockOp, BlockRequest, ConsoleKind, CpuMode, Device, EventKind, Host,
    IoList, NetBackend, NetConfig, Offloads, Platform, StopCause, Vm, VmConfig,
};

use crate::guest::{LONG, ends, wait_until};
use crate::guests;
use crate::rogue::{DEVICES, LEAVE, RESTART, Rogue, SECTORS, SUBMIT, USE, WRITES, rows, types_without_end};

/// Another VM of this process, with the same devices, which it uses all the time.
pub struct Bystander {
    rogue: Arc<Rogue>,
    over: Arc<AtomicBool>,
    works: Option<JoinHandle<()>>,
    memory: Vec<u8>,
}

impl Bystander {
    fn start(host: &Host) -> Self {
        let rogue = Arc::new(Rogue::start(host));
        assert_eq!(rogue.does(USE), 0);
        let (memory, over) = (Self::memory(&rogue.vm), Arc::new(AtomicBool::new(false)));
        let works = std::thread::spawn({
            let (rogue, over) = (rogue.clone(), over.clone());
            move || {
                while !over.load(Ordering::SeqCst) {
                    assert_eq!(rogue.does(USE), 0);
                }
            }
        });
        Self { rogue, over, works: Some(works), memory }
    }

    /// What it does not write to itself.
    fn memory(vm: &Vm) -> Vec<u8> {
        let mut memory = vec![0; guests::MEMORY as usize];
        vm.read_memory(0, &mut memory).unwrap();
        WRITES.into_iter().for_each(|own| memory[own].fill(0));
        memory
    }

    /// This happens, and it uses its devices meanwhile, each of them. What is over too soon for that happens again, and more often; if it can go on
    /// only in between, it uses one device each time, which is not enough.
    pub fn works_while(&self, mut happens: impl FnMut()) {
        for times in (0..8).map(|round| 1 << round) {
            let before = self.rogue.uses();
            (0..times).for_each(|_| happens());
            let uses = self.rogue.uses() - before;
            // One of them had begun before.
            if uses > DEVICES + times {
                return;
            }
        }
        panic!("another VM does not get to work meanwhile");
    }

    fn undisturbed(mut self) {
        self.over.store(true, Ordering::SeqCst);
        self.works.take().unwrap().join().expect("another VM works all the time");
        assert!(Self::memory(&self.rogue.vm) == self.memory, "its memory has changed");
        assert_eq!(self.rogue.does(USE), 0);
        assert_eq!(self.rogue.events(), []);
        self.rogue.disk_is_unharmed();
        self.rogue.ends();
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
    }
}

/// The same, with what happens to be said by it.
fn beside_one_that(happens: impl FnOnce(&Host, &Bystander)) {
    let host = Host::open().unwrap();
    let bystander = Bystander::start(&host);
    happens(&host, &bystander);
    assert_eq!(host.usage().vms, 1, "what was built is gone");
    bystander.undisturbed();
}

/// Something happens, and another VM of this process must not notice, and works meanwhile. It happens again where it was over too soon for that, and
/// should not be over sooner than a disk, a card and so on have been used a few times.
pub fn beside(mut happens: impl FnMut(&Host)) {
    beside_one_that(|host, bystander| bystander.works_while(|| happens(host)));
}

/// One VM does a row, and the other one must not notice.
fn attack(row: u32) {
    beside_one_that(|host, bystander| {
        let rogue = Rogue::start(host);
        bystander.works_while(|| does(&rogue, row));
        rogue.ends();
    });
}

fn does(rogue: &Rogue, row: u32) {
    let ignored = || rogue.vm.balloon_statistics().unwrap().ignored;
    let (typed, before) = (if row == 22 { types_without_end(&rogue.vm) } else { 0 }, ignored());
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
        16 => assert_eq!(ignored() - before, 3 + 5),
        22 => assert!((4096..=4096 + 64).contains(&typed), "{typed} bytes were taken"),
        _ => {}
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

/// What comes from outside of a card need not be a frame.
#[test]
fn row_20_frames_from_outside_of_impossible_lengths() {
    beside(|host| {
        let (near, far) = UnixDatagram::pair().unwrap();
        let outside = near.try_clone().unwrap();
        let rogue = Rogue::with(host, vec![NetConfig::attached(); 2], |builder, disk| {
            builder.disk_fd(0, disk).unwrap().net_fd(0, near).unwrap().net_fd(1, far).unwrap()
        });
        assert_eq!(rogue.does(USE), 0);
        let came = || {
            let statistics = rogue.vm.net_statistics(1).unwrap();
            (statistics.rx_frames, statistics.rx_dropped)
        };
        let lengths: Vec<_> = (0..12 + 14).chain([12 + 65_558]).collect();
        // A few at a time: a cable holds no more while its card has no buffers.
        for few in lengths.chunks(4) {
            let (frames, dropped) = came();
            for length in few {
                assert_eq!(outside.send(&vec![0xff; *length]).unwrap(), *length);
            }
            // The two frames that the guest waits for come after them.
            assert_eq!(rogue.does(USE), 0);
            assert_eq!(came(), (frames + 2, dropped + few.len() as u64), "{few:?}");
        }
        assert_eq!(rogue.events(), []);
        rogue.ends();
    });
}

/// An end of a cable whose other end does, and leaves, whatever is left to do.
struct Cable(UnixDatagram);

impl NetBackend for Cable {
    fn receive(&mut self, room: &IoList<'_>) -> std::io::Result<usize> {
        let mut bytes = vec![0; 1 << 16];
        let length = self.0.recv(&mut bytes)?;
        room.copy_from(0, &bytes[..length])
    }

    fn send(&mut self, frame: &IoList<'_>) -> std::io::Result<()> {
        let mut bytes = vec![0; frame.len()];
        frame.copy_to(0, &mut bytes);
        self.0.send(&bytes).map(drop)
    }

    fn offloads(&self) -> Offloads {
        Offloads::all()
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Headers that leave something to do where their frame is not, from a guest that may leave something, and from outside for one that takes it.
#[test]
fn row_20_offsets_behind_the_frame_with_offloads() {
    beside(|host| {
        let ends = UnixDatagram::pair().unwrap();
        [&ends.0, &ends.1].into_iter().for_each(|end| end.set_nonblocking(true).unwrap());
        let outside = ends.0.try_clone().unwrap();
        let rogue = Rogue::with(host, vec![NetConfig::attached(); 2], |builder, disk| {
            let builder = builder.net_backend(0, Cable(ends.0)).net_backend(1, Cable(ends.1));
            builder.disk_fd(0, disk).unwrap()
        });
        assert_eq!(rogue.does(LEAVE), 0);
        let came = || {
            let statistics = rogue.vm.net_statistics(1).unwrap();
            (statistics.rx_frames, statistics.rx_dropped)
        };
        for (header, is_sound) in [
            ([1, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0], false),
            ([1, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0], false),
            ([1, 0, 0, 0, 0, 0, 34, 0, 25, 0, 0, 0], false),
            ([1, 0, 0, 0, 0, 0, 34, 0, 24, 0, 0, 0], true),
            ([1, 1, 54, 0, 0xb4, 5, 59, 0, 0, 0, 0, 0], false),
            ([1, 1, 54, 0, 0, 0, 34, 0, 16, 0, 0, 0], false),
            ([0, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0], false),
            ([1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0], true),
            ([0xff; 12], false),
        ] {
            let (frames, dropped) = came();
            assert_eq!(outside.send(&[&header[..], &[0x77; 60]].concat()).unwrap(), 72);
            // The two frames that the guest waits for come after it.
            assert_eq!(rogue.does(USE), 0);
            let wanted = (frames + 2 + u64::from(is_sound), dropped + u64::from(!is_sound));
            assert_eq!(came(), wanted, "{header:?}");
        }
        assert_eq!(rogue.events(), []);
        rogue.ends();
    });
}

/// Where a guest waits until it may read its serial port, and says what it has read.
#[derive(Default)]
struct Reader {
    /// How much it is to have read, or `None` at its end; and what it has.
    state: Mutex<(Option<usize>, Vec<u8>)>,
    changed: Condvar,
}

impl Reader {
    /// The guest reads that much, from then on.
    fn reads(&self, count: Option<usize>) {
        let mut state = self.state.lock().unwrap();
        (state.0, state.1) = (count, Vec::new());
        self.changed.notify_all();
    }
}

impl Device for Reader {
    fn read(&self, _: Access, data: &mut [u8]) -> vmbed::Result<()> {
        let state = self.state.lock().unwrap();
        let waits =
            |state: &mut (Option<usize>, Vec<u8>)| state.0.is_some_and(|count| state.1.len() >= count);
        let (state, late) = self.changed.wait_timeout_while(state, LONG, waits).unwrap();
        data.fill((state.0.is_some() && !late.timed_out()).into());
        Ok(())
    }

    fn write(&self, _: Access, data: &[u8]) -> vmbed::Result<()> {
        self.state.lock().unwrap().1.extend(data);
        Ok(())
    }
}

/// The same as row 22's console for the serial port, whose guest polls it.
#[test]
fn row_22_a_serial_port_that_the_guest_does_not_read() {
    // again: in al, 0x10; test al, al; jz ends; more: mov dx, 0x3fd; in al, dx; test al, 1; jz again;
    // mov dx, 0x3f8; in al, dx; out 0x11, al; jmp more; ends: mov al, 0xfe; out 0x64, al; hlt
    const POLLS: [u8; 27] = [
        0xe4, 0x10, 0x84, 0xc0, 0x74, 0x10, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf2, 0xba, 0xf8, 0x03,
        0xec, 0xe6, 0x11, 0xeb, 0xf0, 0xb0, 0xfe, 0xe6, 0x64, 0xf4,
    ];
    beside(|host| {
        let mut config = VmConfig::bare(BareBoot::new(CpuMode::Real, 0x1000, POLLS));
        (config.platform, config.console) = (Platform::Pc, ConsoleKind::Serial);
        let reader = Arc::new(Reader::default());
        reader.reads(Some(0));
        let vm = host.builder(config).pio_device("reader", 0x10, 2, reader.clone()).build().unwrap();
        vm.start().unwrap();
        for _ in 0..3 {
            let typed = types_without_end(&vm);
            assert!((4096..=4096 + 64).contains(&typed), "{typed} bytes were taken");
            reader.reads(Some(typed));
            wait_until("the guest to read all of it", || reader.state.lock().unwrap().1.len() >= typed);
            let read = reader.state.lock().unwrap().1.clone();
            assert!(read.into_iter().eq((0..typed).map(|i| i as u8)), "what was taken comes, in its order");
        }
        reader.reads(None);
        assert_eq!(ends(&vm), StopCause::GuestReset);
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
    assert_eq!(rows(), ROWS);
}
