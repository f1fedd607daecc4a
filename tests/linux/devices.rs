//! Disks, consoles, random numbers, PCI places.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use libtest_mimic::Trial;
use vmbed::{ConsoleKind, DiskConfig};

use crate::assets::KERNELS;
use crate::guest::{Guest, config};
use crate::trial;

pub fn add(trials: &mut Vec<Trial>) {
    trials.push(trial("devices::disk_checksums_both_ways", disk));
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
