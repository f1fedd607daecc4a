//! The host's storage fails below a disk, and the file system that its image is on goes read-only: by the device mapper and ext4, in a lab.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use vmbed::{
    BalloonConfig, BareBoot, Bytes, CpuMode, DiskConfig, DiskEngine, EventKind, Host, Platform, StopCause,
    Vm, VmConfig,
};

use crate::backing::scripted;
use crate::guest::LONG;
use crate::guests::{self, Op, Outcome};
use crate::storage::{MIB, Storage, run};
use crate::trial;

pub fn add(trials: &mut Vec<Trial>) {
    trials.push(trial(
        "failing::a_device_that_fails_and_a_file_system_that_is_read_only",
        a_device_that_fails_and_a_file_system_that_is_read_only,
    ));
}

const IOERR: u32 = 1;
/// What is read of eight sectors of ones, twos and so on.
const SUM: u64 = 512 * (1 + 2 + 3 + 4 + 5 + 6 + 7 + 8);

/// Steps, each of which begins when the balloon is to be as many pages as its number.
const STEPS: [&[(Op, u32, u32, u32)]; 4] = [
    // All is well.
    &[(Op::Write, 0, 8, 1), (Op::Flush, 0, 0, 0), (Op::Read, 0, 8, 0)],
    // What is written does not arrive; the page cache may not know yet.
    &[(Op::Write, 64, 8, 2), (Op::Flush, 0, 0, 0)],
    // The file system has become read-only, and nothing of the file is in memory.
    &[(Op::Write, 128, 8, 3), (Op::Flush, 0, 0, 0), (Op::Read, 0, 8, 0)],
    // The device is there again.
    &[(Op::Read, 0, 8, 0)],
];

struct Guest {
    vm: Vm,
    image: PathBuf,
}

impl Guest {
    fn start(host: &Host, image: &Path, engine: DiskEngine) -> Self {
        fs::File::create_new(image).unwrap().set_len(MIB).unwrap();
        let mut boot = BareBoot::new(CpuMode::Long, guests::ENTRY, fs::read(scripted()).unwrap());
        boot.stack = guests::STACK;
        let mut config = VmConfig::bare(boot);
        (config.platform, config.memory) = (Platform::Pc, Bytes::mib(16));
        config.balloon = Some(BalloonConfig::default());
        let mut disk = DiskConfig::new(image);
        disk.engine = engine;
        config.disks.push(disk);
        let vm = host.builder(config).pio_doorbell("said", guests::SAY, 1).build().unwrap();
        let waits = (0u32..).zip(STEPS).flat_map(|(number, steps)| {
            let wait = (number > 0).then_some((Op::Target, number, 0, 0));
            let said = (Op::Tell, 0, 0, number + 1);
            wait.into_iter().chain(steps.iter().copied()).chain([said])
        });
        vm.write_memory(guests::SCRIPT, &guests::script(&waits.collect::<Vec<_>>())).unwrap();
        vm.start().unwrap();
        Self { vm, image: image.to_owned() }
    }

    /// Has the guest do its steps of that number; what came of each, and the errors that the embedder was told of.
    fn does(&self, number: usize) -> (Vec<Outcome>, Vec<i32>) {
        if number > 0 {
            self.vm.set_balloon(Bytes(4096 * number as u64)).unwrap();
        }
        let (end, mut errors) = (Instant::now() + LONG, Vec::new());
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let event = self.vm.events().wait_event(left);
            let event =
                event.unwrap_or_else(|| panic!("{:?}: waited {LONG:?} for part {number}", self.image));
            match event.kind {
                EventKind::BackendError { errno, device, .. } if device == "disk0" => errors.push(errno),
                EventKind::Doorbell { .. } => break,
                EventKind::Started | EventKind::Balloon { .. } => {}
                kind => panic!("{:?}, part {number}: {kind:?}", self.image),
            }
        }
        // One result for each step, those that wait and tell included.
        let first = STEPS[..number].iter().map(|steps| steps.len() + 2).sum::<usize>();
        let mut results = [0; 16 * 32];
        self.vm.read_memory(guests::RESULTS, &mut results).unwrap();
        (((first..).take(STEPS[number].len())).map(|at| guests::outcome(&results, at)).collect(), errors)
    }

    fn ends(&self) {
        assert_eq!(self.vm.wait_timeout(LONG).unwrap(), Some(StopCause::GuestReset), "{:?}", self.image);
    }
}

/// An image that goes with it.
struct Elsewhere(PathBuf);

impl Drop for Elsewhere {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn statuses(outcomes: &[Outcome]) -> Vec<u32> {
    outcomes.iter().map(|outcome| outcome.0).collect()
}

fn is_read_only(directory: &Path) -> bool {
    fs::write(directory.join("anything"), "x").is_err_and(|error| error.raw_os_error() == Some(libc::EROFS))
}

fn a_device_that_fails_and_a_file_system_that_is_read_only() {
    let host = Host::open().unwrap();
    let mut storage = Storage::made(true);
    let engines = [("uring", DiskEngine::IoUring), ("sync", DiskEngine::Sync)];
    let guests = engines.map(|(name, engine)| Guest::start(&host, &storage.directory.join(name), engine));
    // A VM beside them, whose image is elsewhere, is to notice nothing.
    let elsewhere = Elsewhere(std::env::temp_dir().join(format!("vmbed-failing-{}", std::process::id())));
    let other = Guest::start(&host, &elsewhere.0, DiskEngine::Sync);
    let goes_on = |number: usize| {
        let (outcomes, errors) = other.does(number);
        assert_eq!((statuses(&outcomes), errors), (vec![0; STEPS[number].len()], vec![]), "part {number}");
    };
    // Their images are on the device before it fails, also what the file system knows of them.
    for guest in &guests {
        let (outcomes, errors) = guest.does(0);
        assert_eq!((statuses(&outcomes), errors), (vec![0; 3], vec![]), "{:?}", guest.image);
        assert_eq!(outcomes[2].2, SUM, "{:?}: {outcomes:?}", guest.image);
    }
    run(&["sync"]);
    goes_on(0);

    storage.fail();
    let mut told = Vec::new();
    for guest in &guests {
        let (outcomes, errors) = guest.does(1);
        assert_eq!(outcomes[1].0, IOERR, "{:?}: a flush that has flushed nothing", guest.image);
        assert!(
            !errors.is_empty() && errors.iter().all(|e| [libc::EIO, libc::EROFS].contains(e)),
            "{errors:?}"
        );
        told.push(errors);
    }
    goes_on(1);
    let end = Instant::now() + LONG;
    while !is_read_only(&storage.directory) {
        assert!(Instant::now() < end, "waited {LONG:?} for the file system to become read-only");
        std::thread::sleep(Duration::from_millis(100));
    }
    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    for (guest, mut told) in guests.iter().zip(told) {
        let (outcomes, errors) = guest.does(2);
        // The same error again within a second is told once.
        told.extend(errors);
        assert_eq!(statuses(&outcomes)[1..], [IOERR, IOERR], "{:?}", guest.image);
        assert!(told.contains(&libc::EROFS), "{:?}: {told:?}", guest.image);
    }
    goes_on(2);

    storage.recover();
    for guest in &guests {
        let (outcomes, _) = guest.does(3);
        assert_eq!((outcomes[0].0, outcomes[0].2), (0, SUM), "{:?}: it can be read again", guest.image);
        guest.ends();
    }
    goes_on(3);
    other.ends();

    // What the guests were told is on the disk is there when the machine has started again.
    let images = guests.map(|guest| guest.image);
    storage.restart();
    for image in images {
        let (file, mut bytes) = (fs::File::open(&image).unwrap(), [0; 4096]);
        file.read_exact_at(&mut bytes, 0).unwrap();
        let is_there = |at: usize| usize::from(bytes[at]) == 1 + at / 512;
        assert!((0..4096).all(is_there), "{image:?}: what was flushed is lost");
    }
}
