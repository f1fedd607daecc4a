//! The rows by a bare guest, `tests/guests/hostile.c`, on a KVM: through the registers, rings and doorbells that a guest has, with
//! everything on threads of its own. `tests/c/hostile.c` has the same guest do the same through C.

use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use vmbed::{BlockBackend, BlockOp, BlockRequest, EventKind, Host, NetConfig, Vm};

use crate::guests;
use crate::rogue::{RESTART, Rogue, SECTORS, SUBMIT, USE, rows, types_without_end};

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
        rogue.ends();
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
    rogue.ends();
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
    assert_eq!(rows(), ROWS);
}
