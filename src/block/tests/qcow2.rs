#![forbid(unsafe_code)]
//! qcow2 images, made and judged by QEMU's own tools.

use std::process::Command;

use super::*;
use crate::config::DiskFormat;

mod encrypted;
mod special;

type Disk = Rig<Box<dyn Backend>>;

/// A directory of images, gone with the test.
struct Images(PathBuf);

impl Images {
    fn new(name: &str) -> Self {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target");
        let path = path.join(format!("vmbed-qcow2-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Runs one of QEMU's tools there; what it said.
    fn run(&self, words: &[&str]) -> String {
        let mut command = Command::new(words[0]);
        let output = command.args(&words[1..]).current_dir(&self.0).output();
        let output = output.expect("qemu-utils: tests/setup installs it");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let said = text(&output.stdout) + &text(&output.stderr);
        assert!(output.status.success(), "{words:?}: {said}");
        said
    }

    /// `qemu-img create` with these options.
    fn create(&self, words: &[&str]) {
        self.run(&[&["qemu-img", "create", "-q", "-f", "qcow2"], words].concat());
    }

    /// QEMU finds nothing wrong with it, and the same in it as in `other`.
    fn judge(&self, image: &str, other: &str) {
        let said = self.run(&["qemu-img", "check", "-f", "qcow2", image]);
        assert!(said.contains("No errors were found"), "{said}");
        self.run(&["qemu-img", "compare", "-f", "qcow2", "-F", "raw", image, other]);
    }

    fn open(&self, config: &DiskConfig) -> Disk {
        let disk = super::super::open("disk0", config.path.as_ref().unwrap(), config);
        Rig::on(disk.unwrap_or_else(|e| panic!("{e}")))
    }
}

impl Drop for Images {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Every byte of the disk.
fn all(rig: &mut Disk) -> Vec<u8> {
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < rig.disk.size() {
        let len = (rig.disk.size() - bytes.len() as u64).min(0x1_0000);
        let read =
            rig.one(BlockOp::Read, bytes.len() as u64, len, &[(0, 1000), (0x1_0000, len as usize - 1000)]);
        assert_eq!(read, None);
        let mut piece = vec![0; len as usize];
        rig.memory.read_slice(&mut piece[..1000], GuestAddress(0)).unwrap();
        rig.memory.read_slice(&mut piece[1000..], GuestAddress(0x1_0000)).unwrap();
        bytes.extend(piece);
    }
    bytes
}

/// Xorshift (Marsaglia, "Xorshift RNGs", 2003).
fn throw(dice: &mut u64) -> u64 {
    *dice ^= *dice << 13;
    *dice ^= *dice >> 7;
    *dice ^= *dice << 17;
    *dice
}

fn write(rig: &mut Disk, offset: u64, len: usize, byte: u8) {
    rig.memory.write_slice(&vec![byte; len], GuestAddress(0)).unwrap();
    assert_eq!(rig.one(WRITE, offset, len as u64, &[(0, 512), (512, len - 512)]), None);
}

#[test]
fn images_of_every_kind_are_read_and_written_as_qemu_does() {
    let images = Images::new("kinds");
    for (i, options) in [
        "compat=0.10",
        "compat=1.1",
        "compat=1.1,lazy_refcounts=on",
        "cluster_size=512",
        "cluster_size=2M",
        "refcount_bits=1",
        "refcount_bits=64",
        "preallocation=metadata",
        "preallocation=falloc",
        "preallocation=full",
        "compression_type=zlib",
        "cluster_size=16k,refcount_bits=8,compat=1.1,lazy_refcounts=on,preallocation=metadata",
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("{i}.qcow2");
        images.create(&["-o", options, &name, "4M"]);
        images.run(&["qemu-io", "-f", "qcow2", "-c", "write -P 7 64k 100k", &name]);
        let mut config = DiskConfig::qcow2(images.path(&name));
        for (engine, cache) in [
            (DiskEngine::Sync, CacheMode::Writeback),
            (DiskEngine::Sync, CacheMode::Direct),
            (DiskEngine::IoUring, CacheMode::Writeback),
            (DiskEngine::IoUring, CacheMode::Direct),
        ] {
            (config.engine, config.cache) = (engine, cache);
            let mut rig = images.open(&config);
            assert_eq!(rig.disk.size(), 4 << 20, "{options}");
            write(&mut rig, 0x2_3400, 0x3000, 9);
            write(&mut rig, 0x30_0000, 0x1_0000, 11);
            assert_eq!(rig.one(BlockOp::Flush, 0, 0, &[]), None);
            write(&mut rig, 0x30_0200, 0x400, 12);
            let zeroes = BlockOp::WriteZeroes { unmap: cache == CacheMode::Direct, durable: false };
            assert_eq!(rig.one(zeroes, 0x30_8000, 0x4000, &[]), None);
            assert_eq!(rig.one(BlockOp::Discard, 0x20_0000, 0x1_0000, &[]), None);
            let bytes = all(&mut rig);
            assert_eq!((bytes[0x1_0000], bytes[0x2_3400], bytes[0x30_0000]), (7, 9, 11), "{options}");
            assert_eq!((bytes[0x30_0200], bytes[0x30_8000], bytes[0x30_bfff]), (12, 0, 0), "{options}");
            drop(rig);
            std::fs::write(images.path("raw"), bytes).unwrap();
            images.judge(&name, "raw");
        }
    }
}

/// Who gives a place away waits for what is on its way to it, in any queue, and not for ever.
#[test]
fn a_discard_waits_for_what_is_on_its_way() {
    let images = Images::new("waits");
    images.create(&["image", "1M"]);
    let config = DiskConfig { engine: DiskEngine::IoUring, ..DiskConfig::qcow2(images.path("image")) };
    let mut rig = images.open(&config);
    let mut other = Rig::on(rig.disk.another().unwrap().unwrap());
    write(&mut rig, 0, 0x2_0000, 5);
    for (op, keeps) in [
        (BlockOp::Discard, false),
        (BlockOp::WriteZeroes { unmap: true, durable: true }, false),
        (BlockOp::Discard, true),
        (BlockOp::WriteZeroes { unmap: false, durable: false }, true),
    ] {
        write(&mut rig, 0, 0x1_0000, 6);
        rig.submit(1, BlockOp::Read, 0, 512, &[(0x8000, 512)]);
        other.submit(2, op, 0, 0x1_0000, &[]);
        rig.submit(3, BlockOp::Read, 0x1_0000, 512, &[(0x9000, 512)]);
        assert_eq!(rig.ended.remove(&3), Some(None), "not begun, but done: {op:?}");
        assert!(!other.disk.kick(), "it wants to be called again: {op:?}");
        other.disk.completions(&mut |tag, _| panic!("{tag} has ended: {op:?}"));
        if !keeps {
            assert_eq!(rig.wait(1)[&1], None);
        }
        assert_eq!(other.wait(1)[&2], None, "{op:?}");
        if keeps {
            assert_eq!(rig.wait(1)[&1], None);
        }
        let byte = |rig: &Disk, at: u64| rig.memory.read_obj::<u8>(GuestAddress(at)).unwrap();
        // The zeroes were there before the kernel was told of the read.
        let read = if keeps && op != BlockOp::Discard { 0 } else { 6 };
        assert_eq!((byte(&rig, 0x8000), byte(&rig, 0x9000)), (read, 5), "{op:?}");
        assert_eq!(other.one(BlockOp::Read, 0, 512, &[(0, 512)]), None);
        let left = if (op, keeps) == (BlockOp::Discard, true) { 6 } else { 0 };
        assert_eq!(byte(&other, 0), left, "{op:?}: a late discard is left out");
    }
    drop((rig, other));
    assert!(images.run(&["qemu-img", "check", "image"]).contains("No errors"));
}

/// Two queues on two threads, each with much on its way in its half of the disk, and discards among it.
#[test]
fn queues_write_and_discard_side_by_side() {
    let images = Images::new("sides");
    images.create(&["-o", "cluster_size=4k", "image", "2M"]);
    let config = DiskConfig { engine: DiskEngine::IoUring, ..DiskConfig::qcow2(images.path("image")) };
    let rig = images.open(&config);
    let mut second = Some(rig.disk.another().unwrap().unwrap());
    let mut first = Some(rig.disk);
    let halves: Vec<_> = [first.take(), second.take()]
        .into_iter()
        .flatten()
        .enumerate()
        .map(|(half, disk)| std::thread::spawn(move || one_half(half as u64, Rig::on(disk))))
        .collect();
    let bytes: Vec<u8> = halves.into_iter().flat_map(|half| half.join().unwrap()).collect();
    std::fs::write(images.path("raw"), bytes).unwrap();
    images.judge("image", "raw");
}

/// What that half of the disk then holds.
fn one_half(half: u64, mut rig: Disk) -> Vec<u8> {
    const HALF: usize = 1 << 20;
    const STEP: usize = 2048;
    let mut model = vec![0; HALF];
    let mut dice = 0x9e37_79b9_7f4a_7c15u64 + half;
    for round in 0..400usize {
        // Each of a round has a place of its own.
        let (mut sent, mut zeroed) = (0, Vec::new());
        for tag in 0..8usize {
            let at = (tag * HALF / 8) + (throw(&mut dice) >> 8) as usize % (HALF / 8 / STEP) * STEP;
            let (offset, place) = (half * HALF as u64 + at as u64, (tag * STEP) as u64);
            let byte = (round + tag) as u8;
            sent += 1;
            match dice % 8 {
                0 => {
                    let op = BlockOp::WriteZeroes { unmap: dice & 64 == 0, durable: false };
                    rig.submit(tag as u64, op, offset, STEP as u64, &[]);
                    model[at..at + STEP].fill(0);
                }
                1 => {
                    // Then it is anything, so zeroes are put there afterwards.
                    rig.submit(tag as u64, BlockOp::Discard, offset, STEP as u64, &[]);
                    zeroed.push((at, offset));
                }
                2 => rig.submit(tag as u64, BlockOp::Flush, 0, 0, &[]),
                _ => {
                    rig.memory.write_slice(&[byte; STEP], GuestAddress(place)).unwrap();
                    rig.submit(tag as u64, WRITE, offset, STEP as u64, &[(place, STEP)]);
                    model[at..at + STEP].fill(byte);
                }
            }
        }
        let ended = rig.wait(sent);
        assert!(ended.values().all(Option::is_none), "{ended:?}");
        for (at, offset) in zeroed {
            let op = BlockOp::WriteZeroes { unmap: true, durable: false };
            assert_eq!(rig.one(op, offset, STEP as u64, &[]), None);
            model[at..at + STEP].fill(0);
        }
    }
    for at in (0..HALF).step_by(0x1_0000) {
        assert_eq!(rig.one(BlockOp::Read, half * HALF as u64 + at as u64, 0x1_0000, &[(0, 0x1_0000)]), None);
        let mut there = vec![0; 0x1_0000];
        rig.memory.read_slice(&mut there, GuestAddress(0)).unwrap();
        assert!(there == model[at..at + 0x1_0000], "{half}: behind {at:#x}");
    }
    model
}

#[test]
fn compressed_clusters_and_chains_are_read_and_what_is_written_stays_on_top() {
    let images = Images::new("chain");
    let bytes: Vec<u8> = (0..SIZE as u32 / 4).flat_map(|i| (i / 1000).to_le_bytes()).collect();
    std::fs::write(images.path("base"), &bytes).unwrap();
    images.run(&["qemu-img", "convert", "-q", "-c", "-f", "raw", "-O", "qcow2", "base", "packed"]);
    images.create(&["-b", "packed", "-F", "qcow2", "middle"]);
    images.create(&["-b", "middle", "-F", "qcow2", "top", "2M"]);
    images.create(&["-b", "base", "-F", "raw", "other"]);
    let kind = DiskFormat::Qcow2;
    let top = DiskConfig::qcow2(images.path("top"))
        .based_on(images.path("middle"), kind)
        .based_on(images.path("packed"), kind);
    let mut rig = images.open(&top);
    let mut expected = [bytes.clone(), vec![0; 1 << 20]].concat();
    assert!(all(&mut rig) == expected);
    write(&mut rig, 0x1_8000, 0x2000, 5);
    expected[0x1_8000..0x1_a000].fill(5);
    assert!(all(&mut rig) == expected, "the rest of its cluster is kept");
    drop(rig);
    std::fs::write(images.path("raw"), &expected).unwrap();
    images.judge("top", "raw");
    images.judge("packed", "base");
    let other = DiskConfig::qcow2(images.path("other")).based_on(images.path("base"), DiskFormat::Raw);
    let mut rig = images.open(&other);
    assert!(all(&mut rig) == bytes);
    assert!(rig.disk.another().unwrap().is_some());
    // The base is read by two, and written by nobody.
    let writer = RawDisk::open("disk1", &images.path("base"), &DiskConfig::default());
    assert!(writer.err().unwrap().to_string().contains("in use"));
    rig.disk.resizer().unwrap().resize(2 << 20).unwrap();
    assert_eq!(rig.disk.size(), 2 << 20);
    drop(rig);
    assert!(images.run(&["qemu-img", "info", "other"]).contains("2 MiB"));
    // What grows shows nothing that its base has there, from the middle of a cluster on as well.
    images.create(&["-b", "base", "-F", "raw", "between", "1M"]);
    for (name, below, format, cache, size) in [
        ("small", "base", DiskFormat::Raw, CacheMode::Writeback, 512 << 10),
        ("odd", "base", DiskFormat::Raw, CacheMode::Writeback, (512 << 10) + 512),
        ("direct", "between", DiskFormat::Qcow2, CacheMode::Direct, 512 << 10),
    ] {
        let kind = if format == DiskFormat::Raw { "raw" } else { "qcow2" };
        images.create(&["-b", below, "-F", kind, name, &size.to_string()]);
        let small = DiskConfig { cache, ..DiskConfig::qcow2(images.path(name)) };
        let mut small = small.based_on(images.path(below), format);
        if format == DiskFormat::Qcow2 {
            small = small.based_on(images.path("base"), DiskFormat::Raw);
        }
        let mut rig = images.open(&small);
        rig.disk.resizer().unwrap().resize(2 << 20).unwrap();
        drop(rig);
        rig = images.open(&small);
        let mut expected = bytes[..size].to_vec();
        expected.resize(2 << 20, 0);
        assert!(all(&mut rig) == expected, "{name}");
        drop(rig);
        std::fs::write(images.path("raw"), &expected).unwrap();
        images.judge(name, "raw");
    }
    images.create(&["-o", "compat=0.10", "-b", "base", "-F", "raw", "old", "512k"]);
    let old = DiskConfig::qcow2(images.path("old")).based_on(images.path("base"), DiskFormat::Raw);
    let error = images.open(&old).disk.resizer().unwrap().resize(2 << 20).unwrap_err();
    assert!(error.to_string().contains("compat=1.1"), "{error}");
}

#[test]
fn an_image_keeps_its_data_in_the_file_that_was_named() {
    let images = Images::new("data");
    for (engine, cache, raw) in [
        (DiskEngine::Sync, CacheMode::Writeback, "off"),
        (DiskEngine::IoUring, CacheMode::Writeback, "on"),
        (DiskEngine::IoUring, CacheMode::Direct, "off"),
    ] {
        let name = format!("{engine:?}-{cache:?}");
        let data = format!("{name}.data");
        images.create(&["-o", &format!("data_file={data},data_file_raw={raw}"), &name, "2M"]);
        let config = DiskConfig { engine, cache, ..DiskConfig::qcow2(images.path(&name)) };
        let config = config.with_data_in(images.path(&data));
        for byte in [5, 6] {
            let mut rig = images.open(&config);
            write(&mut rig, 0x1_8000, 0x1_0000, byte);
            write(&mut rig, 0x2_0000, 0x1000, byte + 1);
            assert_eq!(rig.one(BlockOp::Flush, 0, 0, &[]), None);
            let bytes = all(&mut rig);
            assert_eq!(
                (bytes[0x1_8000], bytes[0x2_0000], bytes[0x2_1000], bytes[0]),
                (byte, byte + 1, byte, 0)
            );
            drop(rig);
            std::fs::write(images.path("raw"), bytes).unwrap();
            images.judge(&name, "raw");
        }
        if raw == "on" {
            images.run(&["qemu-img", "compare", "-f", "raw", "-F", "raw", &data, "raw"]);
        }
        assert!(std::fs::metadata(images.path(&name)).unwrap().len() < 1 << 20, "the data is elsewhere");
    }
}

/// Row 24: what an image says about other files is no reason to open them.
#[test]
fn no_file_is_opened_that_the_embedder_has_not_named() {
    let images = Images::new("gate");
    images.create(&["-b", "/etc/passwd", "-F", "raw", "-u", "evil", "1M"]);
    images.create(&["-o", "data_file=data", "outside", "1M"]);
    images.create(&["plain", "1M"]);
    std::fs::write(images.path("text"), vec![b'x'; 4096]).unwrap();
    let refused = |config: DiskConfig, why: &str| {
        let error = super::super::open("disk4", config.path.as_ref().unwrap(), &config).err().unwrap();
        assert!(error.to_string().contains("disk4") && error.to_string().contains(why), "{error}");
        error.kind()
    };
    let image = |name: &str| DiskConfig::qcow2(images.path(name));
    assert_eq!(refused(image("evil"), "/etc/passwd"), ErrorKind::InvalidArgument);
    refused(image("outside"), "\"data\"");
    refused(image("plain").with_data_in(images.path("data")), "in itself");
    refused(image("outside").with_data_in(images.path("absent")), "does not exist");
    refused(image("plain").based_on(images.path("text"), DiskFormat::Raw), "too many");
    refused(image("text"), "no qcow2 image");
    refused(image("missing"), "does not exist");
    let two = image("evil").based_on(images.path("text"), DiskFormat::Raw);
    refused(two.based_on(images.path("text"), DiskFormat::Raw), "too much");
    // A raw disk with a header of that format in it stays raw.
    File::options().write(true).open(images.path("evil")).unwrap().set_len(1 << 20).unwrap();
    let raw = RawDisk::open("disk4", &images.path("evil"), &DiskConfig::default()).unwrap();
    assert_eq!(raw.size(), 1 << 20);
}

/// The library would call itself until the stack is full, which ends the process, or write over the header.
#[test]
fn an_image_whose_refcounts_have_a_hole_is_only_read() {
    let images = Images::new("hole");
    images.create(&["-o", "cluster_size=512", "image", "8M"]);
    let words = ["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 1M", "image"];
    images.run(&words);
    let path = images.path("image");
    let good = std::fs::read(&path).unwrap();
    let table = u64::from_be_bytes(good[48..56].try_into().unwrap()) as usize;
    for hole in [0..1, 1..2, 2..4, 0..64] {
        let mut bad = good.clone();
        bad[table + 8 * hole.start..table + 8 * hole.end].fill(0);
        std::fs::write(&path, &bad).unwrap();
        let mut config = DiskConfig::qcow2(&path);
        let error = super::super::open("disk0", &path, &config).err().unwrap().to_string();
        assert!(
            error.contains("qemu-img convert") && error.contains(&format!("entry {}", hole.start)),
            "{error}"
        );
        config.readonly = true;
        assert_eq!(all(&mut images.open(&config))[..1 << 20], [7; 1 << 20]);
        assert!(std::fs::read(&path).unwrap() == bad);
    }
    std::fs::write(&path, good).unwrap();
    write(&mut images.open(&DiskConfig::qcow2(&path)), 4 << 20, 0x1_0000, 9);
    images.run(&["qemu-img", "check", "-f", "qcow2", "image"]);
}

#[test]
fn a_damaged_image_is_an_error_and_nothing_else() {
    let images = Images::new("damage");
    images.create(&["-o", "cluster_size=4k", "good", "1M"]);
    images.run(&["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 512k", "good"]);
    let good = std::fs::read(images.path("good")).unwrap();
    let mut dice = 0x9e37_79b9_7f4a_7c15u64;
    for _ in 0..300 {
        let mut bad = good.clone();
        for _ in 0..4 {
            let thrown = throw(&mut dice);
            // Header, tables and refcounts lie at the beginning.
            let at = (thrown % 0x6000) as usize % bad.len();
            bad[at] ^= (thrown >> 32) as u8;
        }
        std::fs::write(images.path("bad"), &bad).unwrap();
        let config = DiskConfig { lock: false, ..DiskConfig::qcow2(images.path("bad")) };
        let Ok(disk) = super::super::open("disk0", &images.path("bad"), &config) else { continue };
        let mut rig = Rig::on(disk);
        let size = rig.disk.size().min(2 << 20);
        for offset in (0..size.saturating_sub(4096)).step_by(0x2_0000) {
            let _ = rig.one(BlockOp::Read, offset, 4096, &[(0, 4096)]);
            let _ = rig.one(WRITE, offset, 4096, &[(0, 4096)]);
        }
        let _ = rig.one(BlockOp::Flush, 0, 0, &[]);
    }
}

#[test]
fn images_that_we_make_are_qemus_too() {
    use crate::block::create_disk;
    use crate::config::DiskBacking;
    use crate::units::Bytes;
    let images = Images::new("made");
    let (base, layer) = (images.path("base"), images.path("layer"));
    create_disk(&base, DiskFormat::Raw, Bytes(SIZE), None).unwrap();
    std::fs::write(&base, vec![3; SIZE as usize]).unwrap();
    let below = DiskBacking { path: base.clone(), format: DiskFormat::Raw };
    create_disk(&layer, DiskFormat::Qcow2, Bytes(0), Some(&below)).unwrap();
    images.judge("layer", "base");
    let above = DiskBacking { path: layer.clone(), format: DiskFormat::Qcow2 };
    create_disk(images.path("third"), DiskFormat::Qcow2, Bytes(0), Some(&above)).unwrap();
    images.judge("third", "base");
    let mut rig = images.open(&DiskConfig::qcow2(&layer).based_on(&base, DiskFormat::Raw));
    write(&mut rig, 0, 4096, 4);
    drop(rig);
    assert!(images.run(&["qemu-img", "check", "layer"]).contains("No errors"));
    let info = images.run(&["qemu-img", "info", "layer"]);
    assert!(info.contains("base") && info.contains("backing file format: raw"), "{info}");
    for (path, format, size, backing, why) in [
        (&layer, DiskFormat::Qcow2, SIZE, None, "making it"),
        (&images.path("a"), DiskFormat::Raw, SIZE, Some(&below), "based on nothing"),
        (&images.path("a"), DiskFormat::Qcow2, 0, None, "512"),
        (&images.path("a"), DiskFormat::Raw, 513, None, "512"),
        (&images.path("no/a"), DiskFormat::Raw, 512, None, "making it"),
    ] {
        let error = create_disk(path, format, Bytes(size), backing).unwrap_err();
        assert!(error.to_string().contains(why), "{error}");
    }
    assert!(!images.path("a").exists());
}
