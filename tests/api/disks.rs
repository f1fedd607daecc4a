//! Cases of disks on files: how they are served, and what may be changed of them meanwhile.

use std::path::PathBuf;

use vmbed::{
    BareBoot, BlockBackend, BlockRequest, Boot, Bytes, CacheMode, CpuMode, DiskBacking, DiskConfig,
    DiskEngine, DiskFormat, ErrorKind, RateLimit, VmConfig, VmState, create_disk,
};

use crate::backends::{Guest, config};
use crate::guest::host;
use crate::guests::{self, Op};

const SIZE: u64 = 1 << 20;

/// A file of the test's own, gone when it ends.
struct Image(PathBuf);

impl Image {
    fn new() -> Self {
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("disk-{}", std::process::id()));
        std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
        Self(path)
    }

    fn config(&self) -> VmConfig {
        let mut config = config(1, 0);
        config.disks[0] = DiskConfig::new(&self.0);
        config
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

struct Nothing;

impl BlockBackend for Nothing {
    fn size(&self) -> u64 {
        SIZE
    }

    fn submit(&mut self, request: BlockRequest) {
        request.complete(Ok(()));
    }
}

/// A guest that runs until it is stopped.
const JUMP_TO_SELF: [u8; 2] = [0xeb, 0xfe];

/// 7 and 8 in two sectors.
const SUM: u64 = 512 * (7 + 8);

pub fn disks_and_what_is_changed_of_them() {
    let (image, host) = (Image::new(), host());
    let mut bad = image.config();
    bad.disks[0].queues = 17;
    let error = host.build(bad).unwrap_err();
    assert_eq!(error.fields()[0].field, "disks[0].queues");
    let mut own = config(1, 0);
    own.disks[0].queues = 2;
    let error = host.builder(own).disk_backend(0, Nothing).build().unwrap_err();
    assert!(error.to_string().contains("disk0: queues is 2"), "{error}");

    let steps = [
        (Op::Write, 3, 2, 7),
        (Op::Flush, 0, 0, 0),
        (Op::Read, 3, 2, 0),
        (Op::Zero, 3, 1, 0),
        (Op::Discard, 0, 1, 0),
        (Op::Read, 2047, 2, 0),
    ];
    for (cache, engine, queues) in [
        (CacheMode::Writeback, DiskEngine::Auto, 1),
        (CacheMode::Writethrough, DiskEngine::Sync, 3),
        (CacheMode::Direct, DiskEngine::IoUring, 2),
        (CacheMode::Unsafe, DiskEngine::Sync, 1),
    ] {
        let mut config = image.config();
        let disk = &mut config.disks[0];
        (disk.cache, disk.engine, disk.queues) = (cache, engine, queues);
        let guest = Guest::start(host.builder(config), &steps);
        let results = guest.results(steps.len());
        let good = [(0, 1, 0), (0, 1, 0), (0, 1025, SUM), (0, 1, 0), (0, 1, 0), (1, 1, 0)];
        assert_eq!(results, good, "{cache:?} {engine:?}");
        let bytes = std::fs::read(&image.0).unwrap();
        assert_eq!((bytes[512 * 3], bytes[512 * 4]), (0, 8));
        let done = guest.vm.disk_statistics(0).unwrap();
        assert_eq!((done.discards, done.errors), (2, 1));
    }

    let vm = host.build(image.config()).unwrap();
    let error = host.build(image.config()).unwrap_err();
    assert!(error.kind() == ErrorKind::InvalidState && error.to_string().contains("in use"), "{error}");
    let mut unlocked = image.config();
    unlocked.disks[0].lock = false;
    drop(host.build(unlocked).unwrap());
    vm.resize_disk(0, Bytes(2 * SIZE)).unwrap();
    assert_eq!(std::fs::metadata(&image.0).unwrap().len(), 2 * SIZE);
    let error = vm.resize_disk(0, Bytes(513)).unwrap_err();
    assert!(error.kind() == ErrorKind::InvalidArgument && error.to_string().contains("512"), "{error}");
    assert!(vm.resize_disk(1, Bytes(SIZE)).unwrap_err().to_string().contains("disk1"));
    vm.set_disk_rate(0, RateLimit::NONE.bytes(1 << 20, 0).ops(100, 0)).unwrap();
    vm.set_disk_rate(0, RateLimit::NONE).unwrap();
    assert!(vm.set_disk_rate(1, RateLimit::NONE).unwrap_err().to_string().contains("disk1"));
    drop(vm);
    drop(host.build(image.config()).unwrap());

    let saved = Layer(image.0.with_extension("saved"));
    let mut busy = image.config();
    busy.boot = Boot::Bare(BareBoot::new(CpuMode::Long, guests::ENTRY, JUMP_TO_SELF.to_vec()));
    let vm = host.build(busy).unwrap();
    vm.start().unwrap();
    for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
        let mut last = Bytes(0);
        let progress = |behind, all| {
            assert!(behind > last && all == Bytes(2 * SIZE));
            last = behind;
            true
        };
        assert!(vm.save_disk(0, &saved.0, format, progress).unwrap());
        assert_eq!(last, Bytes(2 * SIZE));
        assert!(vm.save_disk(0, &saved.0, format, |_, _| true).is_err(), "the file is there");
        if format == DiskFormat::Raw {
            assert!(std::fs::read(&saved.0).unwrap() == std::fs::read(&image.0).unwrap());
        }
        std::fs::remove_file(&saved.0).unwrap();
    }
    assert!(!vm.save_disk(0, &saved.0, DiskFormat::Raw, |_, _| false).unwrap());
    assert!(!saved.0.exists(), "nothing is left of it");
    assert_eq!(vm.state(), VmState::Running);
    vm.stop().unwrap();
    assert!(vm.save_disk(0, &saved.0, DiskFormat::Raw, |_, _| true).unwrap(), "of a VM that has ended");
    std::fs::remove_file(&saved.0).unwrap();
    drop(vm);
    let own = host.builder(config(1, 0)).disk_backend(0, Nothing).build().unwrap();
    let error = own.save_disk(0, &saved.0, DiskFormat::Raw, |_, _| true).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    drop(own);

    let layer = Layer(image.0.with_extension("qcow2"));
    let below = DiskBacking { path: image.0.clone(), format: DiskFormat::Raw };
    create_disk(&layer.0, DiskFormat::Qcow2, Bytes(0), Some(&below)).unwrap();
    let error = create_disk(&layer.0, DiskFormat::Qcow2, Bytes(0), Some(&below)).unwrap_err();
    assert!(error.to_string().contains("qcow2"), "{error}");
    let mut config = image.config();
    config.disks[0] = DiskConfig::qcow2(&layer.0);
    let error = host.build(config.clone()).unwrap_err();
    assert!(error.to_string().contains("backing"), "{error}");
    config.disks[0] = DiskConfig::qcow2(&layer.0).based_on(&image.0, DiskFormat::Raw);
    let steps = [(Op::Read, 4, 1, 0), (Op::Write, 4, 1, 9), (Op::Flush, 0, 0, 0), (Op::Read, 4, 1, 0)];
    let guest = Guest::start(host.builder(config), &steps);
    assert_eq!(guest.results(4), [(0, 513, 512 * 8), (0, 1, 0), (0, 1, 0), (0, 513, 512 * 9)]);
    drop(guest);
    assert_eq!(std::fs::read(&image.0).unwrap()[512 * 4], 8, "the base is as it was");
}

struct Layer(PathBuf);

impl Drop for Layer {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
