//! Disks of every format, cache and engine under what others wrote: fio, fsx, ext4, xfs, e2fsck, xfs_repair, qemu-img.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use libtest_mimic::Trial;
use vmbed::{Bytes, CacheMode, DiskConfig, DiskEngine, DiskFormat, VmConfig, create_disk};

use crate::assets;
use crate::guest::{Guest, LONG, config};
use crate::storage::{MIB, Storage, run};
use crate::trial;

pub fn add(trials: &mut Vec<Trial>) {
    trials.push(trial("disks::thirty_two_of_them_and_a_huge_one", many));
    trials.push(trial("disks::what_was_flushed_survives_a_power_cut", power_cuts));
    trials.push(trial("disks::others_programs_find_nothing_wrong", matrix));
    trials.push(trial("disks::an_image_of_a_disk_that_is_written_to", saved));
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Raw,
    Device,
    Qcow2,
    /// A qcow2 image on a raw one.
    Layer,
}

/// One disk of the matrix.
#[derive(Clone, Copy, Debug)]
struct Case(Kind, DiskEngine, CacheMode, u16, &'static str);

/// Each value of each with each of another; `VMBED_DISKS=all` makes it all of them.
fn cases() -> Vec<Case> {
    use CacheMode::{Direct, Unsafe, Writeback, Writethrough};
    use DiskEngine::{IoUring, Sync};
    use Kind::{Device, Layer, Qcow2, Raw};
    if std::env::var("VMBED_DISKS").is_ok_and(|wanted| wanted == "all") {
        let mut all = Vec::new();
        for kind in [Raw, Device, Qcow2, Layer] {
            for engine in [Sync, IoUring] {
                for cache in [Writeback, Direct, Writethrough, Unsafe] {
                    let system = if all.len() % 2 == 0 { "ext4" } else { "xfs" };
                    all.push(Case(kind, engine, cache, 1 + all.len() as u16 % 2, system));
                }
            }
        }
        return all;
    }
    vec![
        Case(Raw, IoUring, Writeback, 2, "ext4"),
        Case(Raw, IoUring, Direct, 1, "xfs"),
        Case(Raw, Sync, Direct, 2, "ext4"),
        Case(Device, IoUring, Writethrough, 1, "ext4"),
        Case(Device, Sync, Unsafe, 1, "ext4"),
        Case(Qcow2, IoUring, Writeback, 2, "ext4"),
        Case(Qcow2, Sync, Writethrough, 1, "ext4"),
        Case(Layer, IoUring, Direct, 1, "ext4"),
    ]
}

impl Case {
    fn size(self) -> Bytes {
        Bytes::mib(if self.4 == "xfs" { 64 } else { 40 })
    }

    /// Its disk, and the image that holds its bytes.
    fn made(self, name: &str, storage: &mut Storage) -> (DiskConfig, PathBuf) {
        let Self(kind, engine, cache, queues, _) = self;
        let path = storage.directory.join(name);
        let format =
            if matches!(kind, Kind::Raw | Kind::Device) { DiskFormat::Raw } else { DiskFormat::Qcow2 };
        let mut disk = DiskConfig::new(&path);
        if kind == Kind::Layer {
            let base = path.with_extension("base");
            // Its bytes show through where the guest has not written.
            fs::write(&base, crate::devices::noise(7, self.size().get() as usize)).unwrap();
            let (base, path) = (base.to_str().unwrap(), path.to_str().unwrap());
            run(&["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", path]);
            disk = disk.based_on(base, DiskFormat::Raw);
        } else {
            create_disk(&path, format, self.size(), None).unwrap();
        }
        if kind == Kind::Device {
            disk.path = Some(storage.device(&path).into());
        }
        (disk.format, disk.engine, disk.cache, disk.queues) = (format, engine, cache, queues);
        (disk, path)
    }
}

/// A guest with the programs as `/dev/vda`, and `disks` behind it.
fn exercised(disks: Vec<DiskConfig>, words: &str) -> VmConfig {
    let mut config =
        with_tools(&format!("set -e; mkdir -p /mnt; mount -t ext4 -o ro /dev/vda /mnt; {words}"));
    config.disks.extend(disks);
    config
}

/// A guest with programs as `/dev/vda`.
pub fn with_tools(script: &str) -> VmConfig {
    let tools = assets::directory().join("test-disks.img");
    let mut config = config(assets::KERNELS[0], script);
    config.boot = {
        let vmbed::Boot::Linux(boot) = config.boot else { unreachable!("a Linux guest") };
        vmbed::Boot::Linux(boot.initrd(tools.with_extension("cpio")))
    };
    config.memory = Bytes::mib(256);
    config.cpus.count = 2;
    config.disks.push(DiskConfig::new(tools).readonly());
    config
}

fn matrix() {
    let cases = cases();
    for group in cases.chunks(8) {
        let mut storage = Storage::new();
        let (mut disks, mut images, mut words) = (Vec::new(), Vec::new(), String::new());
        for (i, case) in group.iter().enumerate() {
            let name = format!("vd{}", (b'b' + i as u8) as char);
            words += &format!(" {name}:{}", case.4);
            let (disk, image) = case.made(&name, &mut storage);
            disks.push(disk);
            images.push((name, image));
        }
        let begun = Instant::now();
        let guest = Guest::start(exercised(disks, &format!("sh /mnt/exercise{words}")));
        images.iter().for_each(|(name, _)| guest.wait_for(&format!("{name}=")));
        guest.power_off();
        println!("{} disks in {:.0?}", group.len(), begun.elapsed());
        let mut sums = Vec::new();
        for ((name, _), case) in images.iter().zip(group) {
            assert!(guest.console().contains(&format!("{name}=")), "{case:?}: {}", guest.console());
            let done = guest.vm.disk_statistics(1 + (name.as_bytes()[2] - b'b') as usize).unwrap();
            // Who has no write cache has nothing to flush.
            let flushed = (done.flushes > 0) == (case.2 != CacheMode::Writethrough);
            assert!(done.errors == 0 && done.discards > 0 && flushed, "{case:?}: {done:?}");
            sums.push(guest.value(name));
        }
        // It has them locked.
        drop(guest);
        for (((_, image), case), known) in images.iter().zip(group).zip(sums) {
            let image = image.to_str().unwrap();
            let raw = format!("{image}.raw");
            if matches!(case.0, Kind::Qcow2 | Kind::Layer) {
                assert!(run(&["qemu-img", "check", image]).contains("No errors were found"), "{case:?}");
                run(&["qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, &raw]);
            } else {
                fs::rename(image, &raw).unwrap();
            }
            let sum = run(&["sha256sum", &raw]);
            assert_eq!(sum.split(' ').next().unwrap(), known, "{case:?}");
            fs::remove_file(raw).unwrap();
        }
    }
}

/// More than the bus has devices: they are functions of one another's. The last has 16 TiB, of which little is there.
fn many() {
    const HUGE: u64 = 16 << 40;
    let file = |size: u64| {
        let name = format!("/dev/shm/vmbed-many-{}", std::process::id());
        let file = fs::File::options().read(true).write(true).create_new(true).open(&name).unwrap();
        fs::remove_file(name).unwrap();
        file.set_len(size).unwrap();
        file
    };
    let files: Vec<_> = (1..=32).map(|i| file(if i == 32 { HUGE } else { i * MIB })).collect();
    let script = "
        cd /sys/block; echo disks=$(ls -d vd* | wc -l)
        wrong=0; for d in vd*; do
            n=$(( $(cat $d/size) / 2048 ))
            [ $n = 16777216 ] && { echo huge=$d; seek=16777215; } || seek=$((n-1))
            echo $n | dd of=/dev/$d bs=1M seek=$seek conv=fsync 2>/dev/null || wrong=$d
            [ $(dd if=/dev/$d bs=1M skip=$seek count=1 iflag=direct 2>/dev/null | head -n 1) = $n ] || wrong=$d
        done; echo wrong=$wrong";
    let mut config = config(assets::KERNELS[0], script);
    config.memory = Bytes::mib(256);
    config.disks = vec![DiskConfig::attached(); 32];
    let guest = Guest::start_with(config, |mut builder| {
        for (i, file) in files.iter().enumerate() {
            builder = builder.disk_fd(i, file).unwrap();
        }
        builder
    });
    guest.power_off();
    assert_eq!(
        (guest.value("disks"), guest.value("wrong")),
        ("32".into(), "0".into()),
        "{}",
        guest.console()
    );
    assert!(guest.value("huge").starts_with("vd"), "{}", guest.console());
    for (file, mib) in files.iter().zip(1u64..) {
        let mib = if mib == 32 { HUGE / MIB } else { mib };
        let mut said = [0; 9];
        std::os::unix::fs::FileExt::read_at(file, &mut said, (mib - 1) * MIB).unwrap();
        assert_eq!(said[..mib.to_string().len()], *mib.to_string().as_bytes(), "disk of {mib} MiB");
        let blocks = std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
        assert!(blocks <= 64, "{blocks} blocks of a disk that has been written to once");
    }
}

/// Writes files over and over, and says how often; the first file stays.
const WRITES: &str = "
    mkfs=/mnt/bin/mkfs.ext4
    ln -s /mnt/lib64 /lib64; export LD_LIBRARY_PATH=/mnt/lib
    $mkfs -q /dev/vdb; mkdir /m; mount -t ext4 /dev/vdb /m
    dd if=/dev/urandom of=/m/before bs=1M count=8 2>/dev/null; sync
    echo before=$(sha256sum </m/before | cut -d' ' -f1)
    n=0; while [ ! -e /m/enough ]; do
        n=$((n+1)); dd if=/dev/urandom of=/m/$((n % 7)) bs=64k count=20 conv=fsync 2>/dev/null
        echo $n >/m/count; sync; echo round=$n
        [ $n -lt 4000 ] || exit 1
    done";

fn saved() {
    let storage = Storage::new();
    for (from, to) in [(DiskFormat::Raw, DiskFormat::Qcow2), (DiskFormat::Qcow2, DiskFormat::Raw)] {
        let (disk, image) = (storage.directory.join("disk"), storage.directory.join("image"));
        create_disk(&disk, from, Bytes::mib(64), None).unwrap();
        let mut config = DiskConfig::new(&disk);
        config.format = from;
        let guest = Guest::start(exercised(vec![config], WRITES));
        guest.wait_for("round=3");
        let mut steps = 0;
        let rounds = |guest: &Guest| guest.console().matches("round=").count();
        let first = rounds(&guest);
        let complete = guest.vm.save_disk(1, &image, to, |behind, all| {
            assert!(behind <= all);
            steps += 1;
            // So that the guest writes all over it meanwhile.
            let (now, end) = (rounds(&guest), Instant::now() + LONG);
            while steps < 12 && rounds(&guest) == now {
                assert!(Instant::now() < end, "waited {LONG:?} for a guest to write while its disk is saved");
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            true
        });
        assert!(complete.unwrap());
        assert!(steps >= 12 && rounds(&guest) >= first + 10, "{steps} steps");
        guest.vm.stop().unwrap();
        if to == DiskFormat::Qcow2 {
            run(&["qemu-img", "check", "-q", image.to_str().unwrap()]);
        }
        let count = rounds_on(&image, &storage, &guest.value("before"));
        assert!(
            (first - 1..=first + 1).contains(&count),
            "of when it began: {count}, {first} rounds were behind"
        );
        for file in [&disk, &image] {
            fs::remove_file(file).unwrap();
        }
    }
}

/// How many rounds the guest's file system in that image has seen, of which one file is known.
fn rounds_on(image: &Path, storage: &Storage, before: &str) -> usize {
    let raw = storage.directory.join("plain");
    let (from, to) = (image.to_str().unwrap(), raw.to_str().unwrap());
    run(&["qemu-img", "convert", "-O", "raw", from, to]);
    // Its power was cut: the journal is played, then there is nothing wrong.
    run(&["sh", "-c", "e2fsck -fy \"$1\" >&2 || [ $? = 1 ]", "sh", to]);
    run(&["e2fsck", "-fn", to]);
    let at = storage.directory.join("mounted");
    fs::create_dir_all(&at).unwrap();
    run(&["mount", "-o", "loop,ro", to, at.to_str().unwrap()]);
    let sum = run(&["sh", "-c", "sha256sum <\"$1/before\"", "sh", at.to_str().unwrap()]);
    let count = run(&["cat", at.join("count").to_str().unwrap()]);
    run(&["umount", at.to_str().unwrap()]);
    fs::remove_file(raw).unwrap();
    assert_eq!(sum.split(' ').next().unwrap(), before);
    count.parse().unwrap()
}

fn power_cuts() {
    let cuts = std::env::var("VMBED_CUTS").map_or(1, |n| n.parse().expect("VMBED_CUTS is a number"));
    for (format, round) in
        [DiskFormat::Raw, DiskFormat::Qcow2].into_iter().flat_map(|f| (0..cuts).map(move |r| (f, r)))
    {
        let mut storage = Storage::made(true);
        let disk = storage.directory.join("disk");
        create_disk(&disk, format, Bytes::mib(64), None).unwrap();
        let mut config = DiskConfig::new(&disk);
        config.format = format;
        let guest = Guest::start(exercised(vec![config], WRITES));
        guest.wait_for(&format!("round={}", 5 + round % 17));
        // Somewhere in a round.
        std::thread::sleep(std::time::Duration::from_millis(37 * (round % 29)));
        let told = guest.console().matches("round=").count();
        storage.cut_the_power();
        // It does not know yet.
        std::thread::sleep(std::time::Duration::from_millis(300));
        guest.vm.stop().unwrap();
        let before = guest.value("before");
        drop(guest);
        storage.restart();
        if format == DiskFormat::Qcow2 {
            let check = Command::new("qemu-img").args(["check", "-q"]).arg(&disk).status().unwrap();
            assert!(matches!(check.code(), Some(0 | 3)), "leaks are allowed, corruption is not: {check}");
        }
        let found = rounds_on(&disk, &storage, &before);
        assert!(found >= told, "the guest was told of {told} rounds, and {found} are there");
    }
}
