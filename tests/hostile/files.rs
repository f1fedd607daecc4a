//! The rows about files and configurations.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};

use vmbed::internals::Part;
use vmbed::{
    Access, BareBoot, BlockBackend, BlockOp, BlockRequest, Boot, Bytes, CpuMode, Device, DiskBacking,
    DiskConfig, DiskEngine, DiskFormat, ErrorKind, EventKind, Host, LinuxBoot, Platform, Result, StopCause,
    Vm, VmBuilder, VmConfig, create_disk,
};

use super::{DATA, Kind, Rig};
use crate::driven::beside;
use crate::guest::{Port, run};
use crate::guests::{self, Op, Outcome, outcome, script};
use crate::host::{INSIDE, inside};

/// A directory of the test's own, gone when it ends.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("vmbed-hostile-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        std::fs::write(self.path(name), bytes).unwrap();
        self.path(name)
    }

    pub fn sparse(&self, name: &str, size: u64) -> PathBuf {
        File::create(self.path(name)).unwrap().set_len(size).unwrap();
        self.path(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A device that does that with what the guest tells, before the guest goes on.
struct Told<F>(F);

impl<F: Fn(u8) + Send + Sync> Device for Told<F> {
    fn read(&self, _: Access, _: &mut [u8]) -> Result<()> {
        Ok(())
    }
    fn write(&self, _: Access, data: &[u8]) -> Result<()> {
        (self.0)(data[0]);
        Ok(())
    }
}

/// A PC with that disk and the guest of tests/guests that keeps to the rules.
fn with_disk(disk: DiskConfig) -> VmConfig {
    let guest = guests::virtio(Path::new(env!("CARGO_TARGET_TMPDIR")));
    let mut boot = BareBoot::new(CpuMode::Long, guests::ENTRY, std::fs::read(&guest).unwrap());
    std::fs::remove_file(guest).unwrap();
    boot.stack = guests::STACK;
    let mut config = VmConfig::bare(boot);
    (config.platform, config.memory, config.disks) = (Platform::Pc, Bytes(guests::MEMORY), vec![disk]);
    config
}

/// How the steps went, with `told` called for each [`Op::Tell`], and the VM.
fn perform(
    builder: VmBuilder,
    steps: &[(Op, u32, u32, u32)],
    told: impl Fn(u8) + Send + Sync + 'static,
) -> (Vec<Outcome>, Vm) {
    let vm = builder.pio_device("told", guests::SAY, 1, Arc::new(Told(told))).build().unwrap();
    vm.write_memory(guests::SCRIPT, &script(steps)).unwrap();
    assert_eq!(run(&vm), StopCause::GuestReset);
    let mut bytes = vec![0; 16 * steps.len()];
    vm.read_memory(guests::RESULTS, &mut bytes).unwrap();
    ((0..steps.len()).map(|i| outcome(&bytes, i)).collect(), vm)
}

/// The embedder is told of each errno, with the place where it came first.
fn backend_errors(vm: &Vm) -> Vec<(i32, u64)> {
    let events = std::iter::from_fn(|| vm.events().next_event());
    let errors = events.filter_map(|event| match event.kind {
        EventKind::BackendError { device, errno, offset } => {
            assert_eq!(device, "disk0");
            Some((errno, offset))
        }
        _ => None,
    });
    errors.collect()
}

fn is_refused(host: &Host, config: &VmConfig, words: &[&str]) -> ErrorKind {
    let error = host.build(config.clone()).expect_err(&format!("should be refused: {words:?}"));
    let text = error.to_string();
    assert!(words.iter().all(|word| text.contains(word)), "{words:?}: {text}");
    assert_eq!(host.usage().vms, 1, "all of it was taken back");
    error.kind()
}

/// Has the image say that its data are in another file (the specification's incompatible bit 2, and header extension "DATA").
fn keep_data_in(image: &Path, name: &[u8; 4]) {
    let file = File::options().read(true).write(true).open(image).unwrap();
    let mut header = [0; 4];
    file.read_exact_at(&mut header, 100).unwrap();
    let extension = [&0x4441_5441u32.to_be_bytes(), &4u32.to_be_bytes(), &name[..], &[0; 12]].concat();
    file.write_all_at(&extension, u32::from_be_bytes(header).into()).unwrap();
    file.write_all_at(&(1u64 << 2).to_be_bytes(), 72).unwrap();
}

#[test]
fn row_24_an_image_that_names_files_of_the_host() {
    beside(|host| {
        let scratch = Scratch::new();
        let secret = scratch.file("secret", &[7; 1 << 16]);
        let below = DiskBacking { path: secret.clone(), format: DiskFormat::Raw };
        create_disk(scratch.path("layer"), DiskFormat::Qcow2, Bytes(0), Some(&below)).unwrap();
        std::fs::write(scratch.path("data"), [6; 1 << 16]).unwrap();
        create_disk(scratch.path("outside"), DiskFormat::Qcow2, Bytes::mib(1), None).unwrap();
        keep_data_in(&scratch.path("outside"), b"data");
        let before: Vec<_> = ["layer", "data"].map(|name| std::fs::read(scratch.path(name)).unwrap()).into();
        let refused = |disk, words: &[&str]| is_refused(host, &with_disk(disk), words);
        let layer = || DiskConfig::qcow2(scratch.path("layer"));
        let kind = refused(layer(), &["disk0", "layer", "secret", "backing"]);
        assert_eq!(kind, ErrorKind::InvalidArgument);
        refused(DiskConfig::qcow2(scratch.path("outside")), &["disk0", "outside", "\"data\""]);
        // Any other file than the one that it names will not be opened in its place by itself either.
        refused(layer().based_on(scratch.path("absent"), DiskFormat::Raw), &["absent", "does not exist"]);
        let after: Vec<_> = ["layer", "data"].map(|name| std::fs::read(scratch.path(name)).unwrap()).into();
        assert!(before == after && std::fs::read(&secret).unwrap() == [7; 1 << 16]);
        // What the embedder allows works.
        let steps = [(Op::Read, 0, 2, 0), (Op::Write, 1, 1, 9), (Op::Read, 0, 2, 0)];
        let allowed = with_disk(layer().based_on(&secret, DiskFormat::Raw));
        let (results, vm) = perform(host.builder(allowed), &steps, |_| {});
        assert_eq!(results, [(0, 1025, 1024 * 7), (0, 1, 0), (0, 1025, 512 * (7 + 9))]);
        assert!(backend_errors(&vm).is_empty());
        assert!(std::fs::read(&secret).unwrap() == [7; 1 << 16]);
    });
}

/// A disk of a board's that ends each request where it begins it.
fn at_once(path: &Path) -> Part {
    let mut config = DiskConfig::new(path);
    config.engine = DiskEngine::Sync;
    Part::Configured(config)
}

/// A guest makes its raw disk look like an image whose backing file is the host's; the disk is opened again.
#[test]
fn row_24_a_header_that_a_guest_writes_into_a_raw_disk() {
    let scratch = Scratch::new();
    let secret = scratch.file("secret", &[7; 1 << 16]);
    let below = DiskBacking { path: secret, format: DiskFormat::Raw };
    create_disk(scratch.path("layer"), DiskFormat::Qcow2, Bytes(0), Some(&below)).unwrap();
    let mut header = std::fs::read(scratch.path("layer")).unwrap()[..4096].to_vec();
    assert!(header.starts_with(b"QFI\xfb"));
    header.resize(4096, 0);
    let disk = scratch.sparse("disk", 1 << 20);
    let open = || {
        let part = at_once(&disk);
        Rig::with(Kind::Disk, part, File::open(&disk).unwrap())
    };
    let mut rig = open();
    rig.fill(DATA, &header);
    assert_eq!(rig.request(1, 0, &[(DATA, 4096, 0)]), 0);
    drop(rig);
    assert_eq!(std::fs::read(&disk).unwrap()[..4096], header);
    for _ in 0..2 {
        let mut rig = open();
        assert_eq!(rig.request(0, 2047, &[(DATA, 512, 2)]), 0, "it is as large as it was");
        assert_eq!(rig.request(0, 0, &[(DATA, 4096, 2)]), 0);
        assert_eq!(vmbed::internals::driver::bytes::<4096>(&rig.board, DATA)[..], header, "raw stays raw");
        rig.good();
    }
    beside(|host| {
        let sum = header[..512].iter().map(|byte| u64::from(*byte)).sum();
        let config = with_disk(DiskConfig::new(&disk));
        let (results, vm) =
            perform(host.builder(config), &[(Op::Read, 0, 1, 0), (Op::Read, 2047, 1, 0)], |_| {});
        assert_eq!(results, [(0, 513, sum), (0, 513, 0)]);
        assert_eq!(vm.disk_statistics(0).unwrap().errors, 0);
    });
    assert_eq!(std::fs::metadata(&disk).unwrap().len(), 1 << 20);
}

/// One that resets the machine.
fn kernel() -> Vec<u8> {
    // mov al, 0xfe; out 0x64, al; jmp $-4
    crate::elf::kernel(&[0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfa])
}

/// That kernel in a bzImage, packed with LZ4 as Linux' build does.
fn bzimage(kernel: &[u8]) -> Vec<u8> {
    let block = lz4_flex::block::compress(kernel);
    let [packed, unpacked] = [block.len(), kernel.len()].map(|length| (length as u32).to_le_bytes());
    let payload = [&0x184c_2102u32.to_le_bytes()[..], &packed, &block, &unpacked].concat();
    let mut image = vec![0; BZ_PAYLOAD];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1fe, b"\x55\xaa\xeb\x66HdrS");
    put(0x206, &0x20fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x236, &[1]);
    put(0x238, &2047u32.to_le_bytes());
    put(0x248, &(BZ_PAYLOAD as u32 - 1024).to_le_bytes());
    put(0x24c, &(payload.len() as u32).to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x10_0000u32.to_le_bytes());
    image.extend(payload);
    image
}

/// Where it begins there: after 1 KiB of setup and 1 KiB of code.
const BZ_PAYLOAD: usize = 2048;

/// It boots that kernel in 64 MiB.
fn linux(kernel: &Path) -> VmConfig {
    let mut config = VmConfig::linux(LinuxBoot::new(kernel));
    config.memory = Bytes::mib(64);
    config
}

fn with_initrd(kernel: &Path, initrd: PathBuf) -> VmConfig {
    let mut config = linux(kernel);
    let Boot::Linux(boot) = &mut config.boot else { panic!("it boots Linux") };
    boot.initrd = Some(initrd);
    config
}

#[test]
fn row_25_bzimages_that_lie() {
    let scratch = Scratch::new();
    let good = bzimage(&kernel());
    let end = good.len();
    // Where it is changed, to what, and what the error says of it.
    let lies: [(usize, &[u8], &str); 12] = [
        (0x1f1, &[0xff], "setup_sects"),
        (0x206, &[0x0b, 2], "protocol 2.11"),
        (0x211, &[0], "loadflags"),
        (0x236, &[0], "xloadflags"),
        (0x248, &[0xff; 4], "its payload ends at"),
        (0x24c, &[0xff; 4], "its payload ends at"),
        (BZ_PAYLOAD + 4, &[0; 4], "has 0 of"),
        (BZ_PAYLOAD + 4, &[0xff; 4], "has 4294967295 of"),
        (BZ_PAYLOAD + 10, &[0xff; 40], "damaged LZ4 payload"),
        (end - 4, &[0xff; 4], "unpacks to at most"),
        (end - 4, &[0x41, 2, 0, 0], "says 577"),
        (end - 4, &[0; 4], "empty payload"),
    ];
    // Not packed with LZ4, it is where it says that it unpacks itself, in so much memory.
    let places: [(usize, &[u8]); 4] = [
        (0x258, &[0xff; 8]),
        (0x258, &[0; 8]),
        (0x258, &[0, 0xf0, 0xff, 0xff, 0, 0, 0, 0]),
        (0x260, &[0xff; 4]),
    ];
    let refuses = |host: &Host, bytes: &[u8], why: &str| {
        let kind = is_refused(host, &linux(&scratch.file("bent", bytes)), &["bent", why]);
        assert_eq!(kind, ErrorKind::BadImage, "{why}");
    };
    beside(|host| {
        let bent = |at: usize, bytes: &[u8]| {
            let mut bent = good.clone();
            bent[at..at + bytes.len()].copy_from_slice(bytes);
            bent
        };
        for (at, bytes, why) in lies {
            refuses(host, &bent(at, bytes), why);
        }
        for (at, bytes) in places {
            let mut image = bent(at, bytes);
            image[BZ_PAYLOAD..BZ_PAYLOAD + 4].copy_from_slice(b"none");
            refuses(host, &image, "to unpack itself, which is not all guest memory");
        }
        // What is packed may lie, too.
        let mut inner = kernel();
        inner[88..96].copy_from_slice(&0x3ff_f800u64.to_le_bytes());
        refuses(host, &bzimage(&inner), "program header 0: occupies 0x3fff800-0x4000800");
        for length in [0x1f2, 0x240, 1024, BZ_PAYLOAD, end - 1] {
            refuses(host, &good[..length], "");
        }
        let vm = host.build(linux(&scratch.file("good", &good))).unwrap();
        assert_eq!(run(&vm), StopCause::GuestReset, "what is good runs");
    });
}

#[test]
fn row_25_initrds_that_cannot_be() {
    let scratch = Scratch::new();
    let (elf, packed) = (scratch.file("elf", &kernel()), bzimage(&kernel()));
    let mut low = packed.clone();
    low[0x22c..0x230].copy_from_slice(&0x10f_ffffu32.to_le_bytes());
    let (packed, low) = (scratch.file("packed", &packed), scratch.file("low", &low));
    let small = scratch.file("small", &[7; 5000]);
    beside(|host| {
        for kernel in [&elf, &packed] {
            let is_bad = |initrd: PathBuf, words: &[&str]| {
                assert_eq!(is_refused(host, &with_initrd(kernel, initrd), words), ErrorKind::BadImage);
            };
            is_bad(scratch.file("empty", &[]), &["the initrd", "empty", "is empty"]);
            is_bad(scratch.0.clone(), &["the initrd", "is a directory"]);
            is_bad("/dev/null".into(), &["the initrd '/dev/null'", "not a regular file"]);
            is_bad(scratch.sparse("large", 60 << 20), &["large", "is too large: it has 62914560 bytes"]);
            is_bad(scratch.sparse("huge", 3 << 30), &["huge", "3221225472 bytes, more than"]);
            let absent = with_initrd(kernel, scratch.path("absent"));
            assert_eq!(is_refused(host, &absent, &["the initrd", "absent"]), ErrorKind::NotFound);
            let vm = host.build(with_initrd(kernel, small.clone())).unwrap();
            assert_eq!(run(&vm), StopCause::GuestReset, "what is good runs");
        }
        // A kernel that takes it only where there is no room (initrd_addr_max).
        let large = scratch.sparse("mib", 1 << 20);
        is_refused(host, &with_initrd(&low, large), &["mib", "only 1044480 are free", "0x1100000"]);
    });
}

/// What the tables for the guest's firmware (ACPI, SMBIOS) have no place for, and what lies where they say that something else does.
#[test]
fn row_25_a_machine_that_no_table_describes() {
    type Change = fn(&mut VmConfig);
    let changes: [(&str, Change); 6] = [
        ("cpus.count", |c| c.cpus.count = 255),
        ("cpus.sockets", |c| (c.cpus.count, c.cpus.sockets) = (250, 50)),
        ("cpus.threads_per_core", |c| c.cpus.threads_per_core = 3),
        ("name", |c| c.name = "x".repeat(65)),
        ("name", |c| c.name = "a\0b".into()),
        ("disks[0].pci", |c| c.disks[0].pci = Some("00:07.1".parse().unwrap())),
    ];
    let scratch = Scratch::new();
    let mut tight = bzimage(&kernel());
    tight[0x238..0x23c].copy_from_slice(&4u32.to_le_bytes());
    let tight = scratch.file("tight", &tight);
    let mut good = linux(&scratch.file("good", &kernel()));
    good.disks.push(DiskConfig::new(scratch.sparse("disk", 4096)));
    beside(|host| {
        for (field, change) in &changes {
            let mut bad = good.clone();
            change(&mut bad);
            assert_eq!(is_refused(host, &bad, &[field]), ErrorKind::InvalidArgument);
        }
        let mut bad = linux(&tight);
        bad.boot = Boot::Linux(LinuxBoot::new(&tight).cmdline("quiet"));
        is_refused(host, &bad, &["the command line has 5 bytes", "tight", "takes 4"]);
        let port = || Arc::new(Port::default());
        // Power management; PCI's configuration space and its devices, the interrupt controllers, the tables, KVM's own pages.
        for base in [0x600, 0x604] {
            let built = host.builder(good.clone()).pio_device("mine", base, 1, port()).build();
            let error = built.expect_err(&format!("{base:#x}"));
            assert!(error.to_string().contains("'mine'"), "{base:#x}: {error}");
        }
        for base in [0xe800_0000, 0xc000_0000, 0xfec0_0000, 0xe_0000, 0xfee0_0000, 0xfffb_f000] {
            let built = host.builder(good.clone()).mmio_device("mine", base, 4096, port()).build();
            let error = built.expect_err(&format!("{base:#x}"));
            assert!(error.to_string().contains("'mine'"), "{base:#x}: {error}");
        }
        assert_eq!(host.usage().vms, 1, "all of it was taken back");
        assert_eq!(run(&host.build(good.clone()).unwrap()), StopCause::GuestReset, "what is good runs");
    });
}

#[test]
fn row_25_kernels_and_initrds_that_lie() {
    let scratch = Scratch::new();
    let good = scratch.file("good", &kernel());
    // What is changed in a good kernel, and what the error says of it.
    let lies: [(usize, u64, &str); 7] = [
        (88, 0xffff_ffff_ffff_f800, "program header 0: address and size wrap"),
        (88, 0xc000_0000, "program header 0: occupies 0xc0000000-0xc0001000"),
        (88, 0x3ff_f800, "which is not all guest memory"),
        (104, 1 << 40, "which is not all guest memory"),
        (96, 0x41, "program header 0: its bytes end at 577, the image at 576"),
        (104, 0x3f, "program header 0: 64 bytes in the file, 63 in memory"),
        (128, u64::MAX, "program header 1: its bytes end"),
    ];
    beside(|host| {
        for (at, value, why) in lies {
            let mut bad = kernel();
            bad[at..at + 8].copy_from_slice(&value.to_le_bytes());
            let kind = is_refused(host, &linux(&scratch.file("bent", &bad)), &["bent", why]);
            assert_eq!(kind, ErrorKind::BadImage, "{why}");
        }
        for length in [0, 3, 63, 100, 0x110] {
            is_refused(host, &linux(&scratch.file("short", &kernel()[..length])), &["short"]);
        }
        is_refused(host, &linux(&scratch.sparse("huge", 1 << 40)), &["huge"]);
        let many = with_initrd(&good, scratch.sparse("initrd", 1 << 36));
        is_refused(host, &many, &["initrd", "68719476736"]);
        let vm = host.build(linux(&good)).unwrap();
        assert_eq!(run(&vm), StopCause::GuestReset, "what is good runs");
    });
}

#[test]
fn row_27_configurations_that_cannot_be() {
    type Change = fn(&mut VmConfig);
    let changes: [(&str, Change); 12] = [
        ("memory", |c| c.memory = Bytes::mib(u64::MAX)),
        ("memory", |c| c.memory = Bytes(u64::MAX - 4095)),
        ("memory", |c| c.memory = Bytes((1 << 44) + (2 << 20) + 1)),
        ("memory", |c| c.memory = Bytes(0)),
        ("cpus.count", |c| c.cpus.count = 0),
        ("cpus.count", |c| c.cpus.count = 255),
        ("cpus.count", |c| c.cpus.count = u16::MAX),
        ("cpus", |c| (c.cpus.count, c.cpus.sockets) = (3, 2)),
        ("disks[0].queues", |c| c.disks[0].queues = u16::MAX),
        ("disks[1].pci", |c| c.disks[1].pci = c.disks[0].pci),
        ("disks[0].serial", |c| c.disks[0].serial = "x".repeat(1 << 20)),
        ("promise.guarantee", |c| c.promise.guarantee = Bytes(u64::MAX)),
    ];
    let scratch = Scratch::new();
    let mut good = with_disk(DiskConfig::new(scratch.sparse("one", 4096)));
    good.disks[0].pci = Some("00:07.0".parse().unwrap());
    good.disks.push(DiskConfig::new(scratch.sparse("two", 4096)));
    beside(|host| {
        for (field, change) in &changes {
            let mut bad = good.clone();
            change(&mut bad);
            let fields: Vec<_> =
                bad.validate().unwrap_err().fields().iter().map(|f| f.field.clone()).collect();
            assert!(fields.iter().any(|name| name.starts_with(field)), "{field}: {fields:?}");
            assert_eq!(is_refused(host, &bad, &[field]), ErrorKind::InvalidArgument);
        }
        // All of them that go together, at once.
        let mut bad = good.clone();
        [0, 4, 8, 9, 10].into_iter().for_each(|i: usize| changes[i].1(&mut bad));
        let error = host.build(bad).unwrap_err();
        for field in ["memory", "cpus.count", "disks[0].queues", "disks[1].pci", "disks[0].serial"] {
            assert!(error.fields().iter().any(|f| f.field == field), "{field}: {error}");
        }
        // Devices of the embedder's over each other, and over vmbed's.
        let port = || Arc::new(Port::default());
        for (base, length) in [(0x12, 2), (0x3f8, 1), (0xcfc, 4), (0xffff, 2)] {
            let builder = host.builder(good.clone()).pio_device("first", 0x10, 4, port());
            let error = builder.pio_device("second", base, length, port()).build().unwrap_err();
            assert!(error.to_string().contains("'second'"), "{base:#x}: {error}");
        }
        // In memory, over the IOAPIC and over the first, of no bytes, past the last address.
        for (base, length) in
            [(0x1000, 0x1000), (0xfec0_0fff, 2), (0x7_0000_0ffc, 8), (0x7_0000_2000, 0), (u64::MAX - 3, 8)]
        {
            let builder = host.builder(good.clone()).mmio_device("first", 0x7_0000_1000, 0x1000, port());
            let error = builder.mmio_device("second", base, length, port()).build().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{base:#x}");
            assert!(error.to_string().contains("'second'"), "{base:#x}: {error}");
        }
        let steps = [(Op::Write, 0, 2, 7), (Op::Read, 0, 2, 0)];
        let (results, _) = perform(host.builder(good.clone()), &steps, |_| {});
        assert_eq!(results, [(0, 1, 0), (0, 1025, 512 * (7 + 8))], "and what is good works");
    });
}

#[test]
fn row_28_a_file_that_shrinks_and_grows() {
    let scratch = Scratch::new();
    let path = scratch.sparse("disk", 1 << 20);
    let steps = [
        (Op::Write, 3, 2, 7),
        (Op::Flush, 0, 0, 0),
        (Op::Tell, 0, 0, 1),
        (Op::Read, 200, 1, 0),
        (Op::Read, 3, 2, 0),
        (Op::Write, 10, 1, 9),
        (Op::Flush, 0, 0, 0),
        (Op::Tell, 0, 0, 2),
        (Op::Read, 200, 1, 0),
        (Op::Write, 200, 1, 5),
    ];
    beside(|host| {
        let file = File::options().write(true).open(&path).unwrap();
        let resize = move |told| file.set_len(if told == 1 { 50 << 10 } else { 1 << 20 }).unwrap();
        let (results, vm) = perform(host.builder(with_disk(DiskConfig::new(&path))), &steps, resize);
        assert_eq!((results[3].0, results[4], results[5].0), (1, (0, 1025, 512 * (7 + 8)), 0));
        assert_eq!((results[6].0, results[8], results[9].0), (0, (0, 513, 0), 0), "it works again");
        assert_eq!(backend_errors(&vm), [(libc::EIO, 200 * 512)]);
    });
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(
        [3, 4, 10, 200].map(|sector| bytes[512 * sector]),
        [7, 8, 9, 5],
        "what was acknowledged is there"
    );
}

/// A file system of its own, which goes before the directory that it is on.
struct Mounted<'a>(&'a Path);

impl<'a> Mounted<'a> {
    fn new(at: &'a Path, size: &str) -> Self {
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"]).arg(at);
        assert!(mount.status().expect("mount (package mount)").success());
        Self(at)
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0).status();
    }
}

/// On a file system of 64 KiB, half of which something else fills.
#[test]
fn row_28_a_disk_that_is_full() {
    if std::env::var_os(INSIDE).is_none() {
        return inside("files::row_28_a_disk_that_is_full", &["unshare", "--mount", "--map-root-user"]);
    }
    let scratch = Scratch::new();
    let _mounted = Mounted::new(&scratch.0, "64k");
    let path = scratch.path("disk");
    let write = |i: u32| (Op::Write, 8 * i, 8, i);
    let mut steps: Vec<_> = (0..12).map(write).collect();
    steps.extend([(Op::Flush, 0, 0, 0), (Op::Tell, 0, 0, 1)]);
    steps.extend((8..14).map(write));
    beside(|host| {
        scratch.sparse("disk", 1 << 20);
        let filler = scratch.file("filler", &[1; 32 << 10]);
        let room = move |_| std::fs::remove_file(&filler).unwrap();
        let (results, vm) = perform(host.builder(with_disk(DiskConfig::new(&path))), &steps, room);
        let statuses: Vec<_> = results.iter().map(|(status, ..)| *status).collect();
        assert_eq!(statuses[..12], [[0; 8].as_slice(), &[1; 4]].concat(), "eight of them fit");
        assert_eq!(statuses[12..], [0; 8], "it works again when there is room");
        assert_eq!(backend_errors(&vm)[0], (libc::ENOSPC, 8 * 8 * 512));
    });
    let bytes = std::fs::read(&path).unwrap();
    for i in 0..14 {
        let sectors = bytes[4096 * i..][..4096].chunks(512).map(|sector| usize::from(sector[0]));
        assert!(sectors.eq(i..i + 8), "write {i}, which was acknowledged, is there");
    }
}

/// What becomes of a disk whose host fails with an errno for a while.
#[derive(Clone, Default)]
struct Failing(Arc<(std::sync::Mutex<Vec<u8>>, AtomicI32)>);

impl BlockBackend for Failing {
    fn size(&self) -> u64 {
        1 << 20
    }

    fn submit(&mut self, mut request: BlockRequest) {
        let (bytes, errno) = &*self.0;
        let (errno, mut bytes) = (errno.load(Ordering::SeqCst), bytes.lock().unwrap());
        let changes = !matches!(request.op(), BlockOp::Read);
        if errno == libc::EIO || (errno != 0 && changes) {
            request.complete(Err(io::Error::from_raw_os_error(errno)));
            return;
        }
        let place = request.offset() as usize..(request.offset() + request.len()) as usize;
        match request.op() {
            BlockOp::Read => drop(request.copy_from(0, &bytes[place])),
            BlockOp::Write { .. } => drop(request.copy_to(0, &mut bytes[place])),
            _ => {}
        }
        request.complete(Ok(()));
    }
}

#[test]
fn row_28_a_host_that_fails_and_a_file_system_that_is_only_read() {
    let steps = [
        (Op::Write, 3, 2, 7),
        (Op::Flush, 0, 0, 0),
        (Op::Tell, 0, 0, libc::EIO as u32),
        (Op::Read, 3, 2, 0),
        (Op::Write, 3, 2, 1),
        (Op::Flush, 0, 0, 0),
        (Op::Tell, 0, 0, libc::EROFS as u32),
        (Op::Read, 3, 2, 0),
        (Op::Write, 3, 2, 1),
        (Op::Flush, 0, 0, 0),
        (Op::Tell, 0, 0, 0),
        (Op::Read, 3, 2, 0),
        (Op::Write, 5, 2, 9),
        (Op::Flush, 0, 0, 0),
    ];
    beside(|host| {
        let disk = Failing::default();
        disk.0.0.lock().unwrap().resize(1 << 20, 0);
        let (errno, config) = (disk.clone(), with_disk(DiskConfig::attached()));
        let builder = host.builder(config).disk_backend(0, disk.clone());
        let fail = move |told: u8| errno.0.1.store(told.into(), Ordering::SeqCst);
        let (results, vm) = perform(builder, &steps, fail);
        let statuses: Vec<_> = results.iter().map(|(status, ..)| *status).collect();
        assert_eq!(statuses, [0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0]);
        assert_eq!((results[7].2, results[11].2), (512 * (7 + 8), 512 * (7 + 8)), "it is as it was");
        let errors = backend_errors(&vm);
        assert_eq!(errors[..2], [(libc::EIO, 3 * 512), (libc::EROFS, 3 * 512)]);
        let bytes = disk.0.0.lock().unwrap();
        assert_eq!([3, 4, 5, 6].map(|sector| bytes[512 * sector]), [7, 8, 9, 10], "acknowledged, and there");
    });
}

/// The same through registers: a file that the rig's disk is on is cut off.
#[test]
fn row_28_a_file_that_shrinks_below_a_driver() {
    let scratch = Scratch::new();
    let path = scratch.sparse("disk", 128 * 512);
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let mut rig = Rig::with(Kind::Disk, at_once(&path), file);
    rig.good();
    rig.disk.set_len(64 * 512).unwrap();
    assert_eq!(rig.request(0, 64, &[(DATA, 512, 2)]), super::IOERR);
    assert_eq!(rig.request(0, 63, &[(DATA, 1024, 2)]), super::IOERR, "half of it is there");
    rig.disk.set_len(128 * 512).unwrap();
    rig.good();
    let event = rig.board.events().next_event().unwrap().kind;
    assert!(matches!(event, EventKind::BackendError { errno: libc::EIO, .. }), "{event:?}");
}
