//! Disks, consoles, random numbers, PCI places.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use libtest_mimic::Trial;
use vmbed::{Bytes, CacheMode, ConsoleKind, DiskConfig, DiskEngine, DiskFormat, RateLimit, create_disk};

use crate::assets::KERNELS;
use crate::guest::{Guest, config};
use crate::trial;

pub fn add(trials: &mut Vec<Trial>) {
    trials.push(trial("devices::disk_checksums_both_ways", disk));
    trials.push(trial("devices::disk_features_of_every_format", disk_features));
    trials.push(trial("devices::disks_readonly_serial_and_places", places));
    trials.push(trial("devices::random_numbers", rng));
    trials.push(trial("devices::virtio_console", virtio_console));
}

/// A file in the temporary directory that is gone when the test ends.
pub struct TempFile(pub PathBuf);

impl TempFile {
    pub fn new(bytes: &[u8]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("vmbed-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::write(&path, bytes).unwrap();
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Bytes that no compression or zero page fakes.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// As busybox' `sha256sum` prints it; by the host's own tool, which no one here wrote.
pub fn sha256(bytes: &[u8]) -> String {
    let file = TempFile::new(bytes);
    let output = std::process::Command::new("sha256sum").arg(file.path()).output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap().split_whitespace().next().unwrap().to_owned()
}

/// The guest reads what the host wrote, and the host what the guest wrote.
fn disk() {
    const MIB: usize = 1 << 20;
    let content = noise(1, 8 * MIB);
    let file = TempFile::new(&[&content[..], &vec![0; 8 * MIB]].concat());
    let script = "
        echo size=$(cat /sys/block/vda/size)
        echo sum=$(dd if=/dev/vda bs=1M count=8 2>/dev/null | sha256sum | cut -d' ' -f1)
        dd if=/dev/urandom of=/run/noise bs=1M count=8 2>/dev/null
        dd if=/run/noise of=/dev/vda bs=64k seek=128 conv=fsync 2>/dev/null
        echo written=$(sha256sum </run/noise | cut -d' ' -f1)
        echo 3 >/proc/sys/vm/drop_caches
        echo again=$(dd if=/dev/vda bs=1M skip=8 2>/dev/null | sha256sum | cut -d' ' -f1)";
    let mut config = config(KERNELS[0], script);
    config.disks.push(DiskConfig::new(file.path()));
    let guest = Guest::start(config);
    guest.power_off();
    assert_eq!(guest.value("size"), (16 * MIB / 512).to_string());
    assert_eq!(guest.value("sum"), sha256(&content));
    assert_eq!(guest.value("again"), guest.value("written"));
    let mut opened = File::open(file.path()).unwrap();
    let mut all = Vec::new();
    opened.read_to_end(&mut all).unwrap();
    assert_eq!(sha256(&all[8 * MIB..]), guest.value("written"), "the host's file holds what the guest wrote");
    assert_eq!(all[..8 * MIB], content, "and nothing else changed");
}

/// A stock driver with every feature, on each format: several queues, discards, its write cache, another size, a limit.
fn disk_features() {
    let directory = std::env::temp_dir().join(format!("vmbed-disks-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let run = |words: &[&str]| {
        let output =
            std::process::Command::new(words[0]).args(&words[1..]).current_dir(&directory).output().unwrap();
        let said =
            String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{words:?}: {said}");
        said
    };
    let raw = directory.join("raw");
    create_disk(&raw, DiskFormat::Raw, Bytes::mib(16), None).unwrap();
    let mut plain = DiskConfig::new(&raw);
    (plain.cache, plain.engine, plain.queues) = (CacheMode::Writethrough, DiskEngine::IoUring, 2);
    run(&["qemu-img", "create", "-q", "-f", "qcow2", "-b", "raw", "-F", "raw", "layer"]);
    let mut layer = DiskConfig::qcow2(directory.join("layer")).based_on(&raw, DiskFormat::Raw);
    layer.queues = 2;
    for (disk, cache) in [(plain, "write through"), (layer, "write back")] {
        let script = "
            cd /sys/block/vda
            echo queues=$(ls mq | wc -l)
            echo cache=$(cat queue/write_cache)
            echo most=$(cat queue/discard_max_bytes),$(cat queue/write_zeroes_max_bytes)
            echo block=$(cat queue/logical_block_size),$(cat queue/physical_block_size)
            dd if=/dev/urandom of=/run/noise bs=1M count=4 2>/dev/null
            dd if=/run/noise of=/dev/vda bs=64k conv=fsync 2>/dev/null
            blkdiscard -o 1048576 -l 1048576 /dev/vda && echo discarded=yes
            dd if=/dev/zero of=/run/noise bs=1M seek=1 count=1 conv=notrunc 2>/dev/null
            echo noise=$(sha256sum </run/noise | cut -d' ' -f1)
            echo 3 >/proc/sys/vm/drop_caches
            echo again=$(dd if=/dev/vda bs=1M count=4 2>/dev/null | sha256sum | cut -d' ' -f1)
            echo 'write back' >queue/write_cache; echo 'write through' >queue/write_cache; echo now=$(cat queue/write_cache)
            echo resize=please
            until [ $(cat size) = 65536 ]; do sleep 0.1; done
            dd if=/run/noise of=/dev/vda bs=1M seek=28 conv=fsync 2>/dev/null && echo grown=yes
            echo limit=please; read go
            begin=$(cut -d' ' -f1 /proc/uptime)
            dd if=/dev/vda of=/dev/null bs=4k count=40 iflag=direct 2>/dev/null
            echo began=$begin; echo ended=$(cut -d' ' -f1 /proc/uptime)";
        let mut config = config(KERNELS[0], script);
        config.cpus.count = 2;
        config.disks.push(disk.clone());
        let guest = Guest::start(config);
        guest.wait_for("resize=please");
        guest.vm.resize_disk(0, Bytes::mib(32)).unwrap();
        guest.wait_for("limit=please");
        guest.vm.set_disk_rate(0, RateLimit::NONE.ops(20, 1)).unwrap();
        guest.vm.console_input(b"go\n");
        guest.power_off();
        for (key, want) in [
            ("queues", "2"),
            ("cache", cache),
            ("most", "1073741824,67108864"),
            ("block", "512,4096"),
            ("discarded", "yes"),
            ("now", "write through"),
            ("grown", "yes"),
        ] {
            assert_eq!(guest.value(key), want, "{key} of {disk:?}\n{}", guest.console());
        }
        assert_eq!(guest.value("noise"), guest.value("again"), "what was discarded reads as zeroes");
        let time = |key: &str| guest.value(key).parse::<f64>().unwrap();
        assert!(time("ended") - time("began") >= 1.8, "40 requests at 20 a second: {}", guest.console());
        let done = guest.vm.disk_statistics(0).unwrap();
        assert!(done.discards >= 1 && done.discarded_bytes >= 1 << 20 && done.errors == 0, "{done:?}");
    }
    assert!(run(&["qemu-img", "check", "layer"]).contains("No errors were found"));
    std::fs::remove_dir_all(&directory).unwrap();
}

fn places() {
    let (first, second) = (TempFile::new(&noise(2, 1 << 20)), TempFile::new(&noise(3, 1 << 20)));
    let script = "
        for d in vda vdb; do
            echo $d.ro=$(cat /sys/block/$d/ro)
            echo $d.serial=$(cat /sys/block/$d/serial)
            echo $d.place=$(basename $(readlink -f /sys/block/$d/device/..))
        done
        dd if=/dev/zero of=/dev/vda bs=512 count=1 2>/dev/null && echo vda.write=ok || echo vda.write=refused";
    let mut config = config(KERNELS[1], script);
    let mut read_only = DiskConfig::new(first.path()).readonly();
    read_only.serial = "SN-0815".to_owned();
    read_only.pci = Some("00:05.0".parse().unwrap());
    let mut other = DiskConfig::new(second.path());
    other.pci = Some("00:1f.0".parse().unwrap());
    config.disks = vec![read_only, other];
    let guest = Guest::start(config);
    guest.power_off();
    for (key, want) in [
        ("vda.ro", "1"),
        ("vda.serial", "SN-0815"),
        ("vda.place", "0000:00:05.0"),
        ("vdb.ro", "0"),
        ("vdb.serial", ""),
        ("vdb.place", "0000:00:1f.0"),
        ("vda.write", "refused"),
    ] {
        assert_eq!(guest.value(key), want, "{key}");
    }
    let mut start = vec![0; 512];
    let mut file = File::open(first.path()).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_exact(&mut start).unwrap();
    assert_eq!(start, noise(2, 512));
}

fn rng() {
    let script = "
        echo from=$(cat /sys/class/misc/hw_random/rng_current)
        echo bytes=$(dd if=/dev/hwrng bs=256 count=16 2>/dev/null | wc -c)
        echo kinds=$(dd if=/dev/hwrng bs=256 count=16 2>/dev/null | od -An -v -tu1 -w1 | sort -u | wc -l)";
    let guest = Guest::start(config(KERNELS[0], script));
    guest.power_off();
    assert!(guest.value("from").starts_with("virtio_rng"), "{}", guest.console());
    assert_eq!(guest.value("bytes"), "4096");
    assert_eq!(guest.value("kinds"), "256", "4 KiB of noise show every byte");
}

fn virtio_console() {
    // hvc0 exists once its module is in: what the script says goes there itself.
    let script = "exec </dev/hvc0 >/dev/hvc0 2>&1; stty -echo; echo ready; read line; echo got=$line";
    let mut config = config(KERNELS[0], script);
    if let vmbed::Boot::Linux(linux) = &mut config.boot {
        linux.cmdline = linux.cmdline.replace("console=ttyS0", "console=hvc0");
    }
    config.console = ConsoleKind::Virtio;
    let guest = Guest::start(config);
    guest.wait_for("ready");
    assert_eq!(guest.vm.console_input(b"over virtio\n"), 12);
    guest.power_off();
    assert_eq!(guest.value("got"), "over virtio");
}
