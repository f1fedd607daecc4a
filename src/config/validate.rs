#![forbid(unsafe_code)]
//! Every rule about a configuration that needs no file, no KVM and no network.

use std::time::Duration;

use super::disk::MAX_QUEUES;
use super::topology::Topology;
use super::{
    BackingConfig, BackingKind, BareBoot, Boot, CgroupConfig, CpuConfig, CpuMode, DiskFormat, HugePages,
    LinuxBoot, NetConfig, PciAddress, Platform, Vhost, VmConfig,
};
use crate::error::FieldError;
use crate::memory::layout;
use crate::units::Bytes;

/// x2APIC-less APIC ids end at 254; 255 is the broadcast.
pub(crate) const MAX_VCPUS: u16 = 254;
/// The kernel's limit is 2048 with the NUL (x86 COMMAND_LINE_SIZE).
pub(crate) const MAX_CMDLINE: usize = 2047;
const PAGE: u64 = 4096;
/// What `sched_setaffinity` is given room for (`CPU_SETSIZE`).
pub(crate) const MAX_HOST_CPUS: u32 = 1024;
/// The kernel's own bound (`MAX_NUMNODES`).
const MAX_NUMA_NODES: u32 = 1024;
/// Below this the tables and a real-mode guest do not fit.
const MIN_BARE_MEMORY: u64 = 64 << 10;
const MIN_LINUX_MEMORY: u64 = 32 << 20;
/// What a 46-bit physical address space holds beside the devices.
const MAX_MEMORY: u64 = 32 << 40;
/// `VIRTIO_BLK_ID_BYTES`.
const MAX_SERIAL: usize = 20;
/// `IFNAMSIZ` less the NUL.
const MAX_IFNAME: usize = 15;
pub(super) fn problems(config: &VmConfig) -> Vec<FieldError> {
    let mut found = Found(Vec::new());
    found.name(&config.name);
    found.cpus(&config.cpus);
    found.affinity(&config.cpus);
    found.memory(config);
    found.backing(&config.backing, config.memory);
    if config.backing.kind.pool_page().is_some() && config.balloon.as_ref().is_some_and(|b| b.hinting) {
        let problem = "is set, of memory from the pool, which may have no page when the guest uses it again";
        found.add("balloon.hinting", problem, "false, or another BackingKind");
    }
    config.cgroup.iter().for_each(|cgroup| found.cgroup(cgroup));
    match &config.boot {
        Boot::Linux(linux) => found.linux(linux, config.platform),
        Boot::Bare(bare) => found.bare(bare, config.memory.get()),
    }
    found.devices(config);
    found.places(config);
    found.0
}

struct Found(Vec<FieldError>);

impl Found {
    fn add(&mut self, field: impl Into<String>, problem: impl Into<String>, remedy: impl Into<String>) {
        self.0.push(FieldError::new(field, problem, remedy));
    }

    fn name(&mut self, name: &str) {
        if name.len() > 64 {
            self.add("name", format!("is {} bytes long", name.len()), "at most 64");
        }
        if name.contains('\0') {
            self.add("name", "holds a NUL", "");
        }
    }

    fn cpus(&mut self, cpus: &CpuConfig) {
        if !(1..=MAX_VCPUS).contains(&cpus.count) {
            self.add("cpus.count", format!("is {}", cpus.count), format!("1 to {MAX_VCPUS}"));
            return;
        }
        if !(1..=2).contains(&cpus.threads_per_core) || !cpus.count.is_multiple_of(cpus.threads_per_core) {
            let problem = format!("is {}", cpus.threads_per_core);
            self.add("cpus.threads_per_core", problem, format!("1 or 2, and a divisor of {}", cpus.count));
            return;
        }
        let cores = cpus.count / cpus.threads_per_core;
        if cpus.sockets == 0 || !cores.is_multiple_of(cpus.sockets) {
            self.add(
                "cpus.sockets",
                format!("is {}", cpus.sockets),
                format!("a divisor of the {cores} cores"),
            );
            return;
        }
        let last = Topology::new(cpus).last_apic_id(cpus.count);
        if last > u32::from(MAX_VCPUS) {
            let problem = format!("{} gives the last vCPU the APIC id {last}", cpus.sockets);
            self.add("cpus.sockets", problem, "at most 254: make the cores of a socket a power of two");
        }
    }

    fn affinity(&mut self, cpus: &CpuConfig) {
        let lists = cpus.affinity.len();
        if lists != 0 && cpus.dedicated {
            self.add("cpus.affinity", "is set, but dedicated vCPUs run where the host puts them", "none");
        } else if lists != 0 && lists != usize::from(cpus.count) {
            let problem = format!("has {lists} lists for {} vCPUs", cpus.count);
            self.add("cpus.affinity", problem, "none, or one for each vCPU");
        }
        for (i, list) in cpus.affinity.iter().enumerate() {
            if list.is_empty() {
                self.add(format!("cpus.affinity[{i}]"), "is empty", "at least one CPU");
            }
            if let Some(cpu) = list.iter().find(|cpu| **cpu >= MAX_HOST_CPUS) {
                let problem = format!("names CPU {cpu}");
                self.add(format!("cpus.affinity[{i}]"), problem, format!("below {MAX_HOST_CPUS}"));
            }
        }
    }

    fn memory(&mut self, config: &VmConfig) {
        let size = config.memory.get();
        let least = if matches!(config.boot, Boot::Linux(_)) { MIN_LINUX_MEMORY } else { MIN_BARE_MEMORY };
        if size < least || size > MAX_MEMORY {
            let range = format!("{} to {}", Bytes(least), Bytes(MAX_MEMORY));
            self.add("memory", format!("is {}", config.memory), range);
        } else if !size.is_multiple_of(PAGE) {
            self.add("memory", format!("is {}", config.memory), "a multiple of 4 KiB");
        }
        if config.promise.guarantee > config.memory {
            let problem = format!("is {}", config.promise.guarantee);
            self.add("promise.guarantee", problem, format!("at most memory, {}", config.memory));
        }
    }

    fn backing(&mut self, backing: &BackingConfig, memory: Bytes) {
        if let Some(page) = backing.kind.pool_page() {
            if !memory.get().is_multiple_of(page) {
                let problem = format!("is {memory}, of huge pages");
                self.add("memory", problem, format!("a multiple of {}", Bytes(page)));
            }
            if backing.huge != HugePages::Auto {
                let problem = "asks for transparent huge pages, where all pages are huge already";
                self.add("backing.huge", problem, "HugePages::Auto");
            }
        }
        if backing.mergeable && backing.kind != BackingKind::Anonymous {
            let problem = "is set, but the kernel merges anonymous pages only";
            self.add("backing.mergeable", problem, "false, or BackingKind::Anonymous");
        }
        if let Some(node) = backing.numa_nodes.iter().find(|node| **node >= MAX_NUMA_NODES) {
            let problem = format!("names node {node}");
            self.add("backing.numa_nodes", problem, format!("below {MAX_NUMA_NODES}"));
        }
    }

    fn cgroup(&mut self, cgroup: &CgroupConfig) {
        let (millisecond, second) = (Duration::from_millis(1), Duration::from_secs(1));
        if !(1..=10_000).contains(&cgroup.weight) {
            self.add("cgroup.weight", format!("is {}", cgroup.weight), "1 to 10000");
        }
        if !(millisecond..=second).contains(&cgroup.period) {
            self.add("cgroup.period", format!("is {:?}", cgroup.period), "1 ms to 1 s");
        }
        if let Some(quota) = cgroup.quota.filter(|quota| *quota < millisecond) {
            self.add("cgroup.quota", format!("is {quota:?}"), "at least 1 ms, or None for no limit");
        }
    }

    fn linux(&mut self, linux: &LinuxBoot, platform: Platform) {
        if linux.kernel.as_os_str().is_empty() {
            self.add("boot.kernel", "is empty", "the path of a bzImage or an ELF kernel");
        }
        if linux.initrd.as_ref().is_some_and(|p| p.as_os_str().is_empty()) {
            self.add("boot.initrd", "is empty", "a path, or None");
        }
        if linux.cmdline.len() > MAX_CMDLINE {
            let problem = format!("is {} bytes long", linux.cmdline.len());
            self.add("boot.cmdline", problem, format!("at most {MAX_CMDLINE}"));
        }
        if let Some(at) = linux.cmdline.find('\0') {
            self.add("boot.cmdline", format!("holds a NUL at byte {at}"), "");
        }
        if platform != Platform::Pc {
            self.add("platform", "is Bare, but a Linux kernel needs a PC", "Platform::Pc");
        }
    }

    fn bare(&mut self, bare: &BareBoot, memory: u64) {
        let limit = match bare.mode {
            CpuMode::Real => 1 << 16,
            CpuMode::Protected | CpuMode::Long => 1 << 32,
        };
        if bare.entry >= limit {
            let problem = format!("is {:#x}", bare.entry);
            self.add("boot.entry", problem, format!("below {limit:#x} in {:?} mode", bare.mode));
        }
        let ram = layout::ram(memory.min(MAX_MEMORY));
        let mut placed: Vec<(u64, u64, usize)> = Vec::new();
        for (i, (address, bytes)) in bare.images.iter().enumerate() {
            let end = address.checked_add(bytes.len() as u64);
            if !end.is_some_and(|end| ram.iter().any(|r| *address >= r.start && end <= r.end)) {
                let problem = format!("{} bytes at {address:#x} are outside the guest's memory", bytes.len());
                self.add(format!("boot.images[{i}]"), problem, format!("memory is {}", Bytes(memory)));
            } else if let Some(end) = end {
                placed.push((*address, end, i));
            }
        }
        placed.sort_unstable();
        for pair in placed.windows(2) {
            if pair[0].1 > pair[1].0 {
                let problem = format!("overlaps boot.images[{}] at {:#x}", pair[0].2, pair[1].0);
                self.add(format!("boot.images[{}]", pair[1].2), problem, "");
            }
        }
    }

    fn devices(&mut self, config: &VmConfig) {
        for (i, disk) in config.disks.iter().enumerate() {
            if disk.path.as_ref().is_some_and(|path| path.as_os_str().is_empty()) {
                self.add(format!("disks[{i}].path"), "is empty", "the path of a raw image or block device");
            }
            if disk.serial.len() > MAX_SERIAL || !disk.serial.bytes().all(|b| b.is_ascii_graphic()) {
                let problem = format!("is {:?}", disk.serial);
                self.add(format!("disks[{i}].serial"), problem, "at most 20 printable ASCII characters");
            }
            if !disk.backing.is_empty() && disk.format != DiskFormat::Qcow2 {
                self.add(
                    format!("disks[{i}].backing"),
                    "is not empty",
                    "only a qcow2 image is based on another",
                );
            }
            if disk.data_file.is_some() && disk.format != DiskFormat::Qcow2 {
                let field = format!("disks[{i}].data_file");
                self.add(field, "is there", "only a qcow2 image keeps its data in another file");
            }
            if !disk.passphrases.is_empty() && disk.format != DiskFormat::Qcow2 {
                let field = format!("disks[{i}].passphrases");
                self.add(field, "is not empty", "only qcow2 images are decrypted");
            }
            if disk.format != DiskFormat::Raw && disk.path.is_none() {
                self.add(format!("disks[{i}].path"), "is absent", "what is attached is raw: name the image");
            }
            if !(1..=MAX_QUEUES).contains(&disk.queues) {
                self.add(format!("disks[{i}].queues"), format!("is {}", disk.queues), "1 to 16");
            }
        }
        for (i, net) in config.nets.iter().enumerate() {
            if let Some(tap) = net.tap.as_ref().filter(|tap| !is_interface_name(tap)) {
                let problem = format!("is {tap:?}");
                self.add(format!("nets[{i}].tap"), problem, "an interface name of 1 to 15 characters");
            }
            if net.mac.is_some_and(|mac| mac.0[0] & 1 == 1) {
                self.add(format!("nets[{i}].mac"), "is a multicast address", "the first byte must be even");
            }
            if net.tap.is_some() && net.stream.is_some() {
                self.add(format!("nets[{i}].stream"), "is set, and so is tap", "one of both");
            }
            if !(1..=16).contains(&net.queues) {
                self.add(format!("nets[{i}].queues"), format!("is {}", net.queues), "1 to 16");
            }
            if net.mtu.is_some_and(|mtu| mtu < 68) {
                let problem = format!("is {}", net.mtu.unwrap_or_default());
                self.add(format!("nets[{i}].mtu"), problem, "68 to 65535 (RFC 791)");
            }
            if net.mac.is_some_and(|mac| mac.0 == [0; 6]) {
                self.add(format!("nets[{i}].mac"), "is all zero", "None lets vmbed choose one");
            }
            self.vhost(i, net);
        }
        for pair in 0..config.nets.len() {
            let Some(tap) = &config.nets[pair].tap else { continue };
            if let Some(other) = config.nets[..pair].iter().position(|n| n.tap.as_ref() == Some(tap)) {
                self.add(
                    format!("nets[{pair}].tap"),
                    format!("is the same as nets[{other}].tap"),
                    "one card a TAP",
                );
            }
        }
    }

    /// What the kernel cannot serve, whatever the host.
    fn vhost(&mut self, index: usize, net: &NetConfig) {
        let field = format!("nets[{index}].vhost");
        if net.vhost != Vhost::Off && net.stream.is_some() {
            self.add(&field, "is set, and the network is a stream", "Vhost::Off, or a TAP interface");
        }
        let limited = !(net.receive_rate.is_none() && net.send_rate.is_none());
        if net.vhost == Vhost::Required && limited {
            self.add(&field, "is required, and the card is limited", "no limit, or Vhost::IfPresent");
        }
    }

    fn places(&mut self, config: &VmConfig) {
        let disks = config.disks.iter().enumerate().map(|(i, d)| (format!("disks[{i}]"), d.pci));
        let nets = config.nets.iter().enumerate().map(|(i, n)| (format!("nets[{i}]"), n.pci));
        let balloon = config.balloon.as_ref().map(|b| ("balloon".to_owned(), b.pci));
        let devices: Vec<_> = disks.chain(nets).chain(balloon).collect();
        let more = usize::from(config.rng) + usize::from(config.console == super::ConsoleKind::Virtio);
        let count = devices.len() + more;
        if config.platform == Platform::Bare {
            for (field, _) in &devices {
                self.add(field, "needs a PCI bus", "Platform::Pc");
            }
            if config.rng {
                self.add("rng", "needs a PCI bus", "false, or Platform::Pc");
            }
            if config.console == super::ConsoleKind::Virtio {
                self.add("console", "is Virtio, which needs a PCI bus", "Serial, or Platform::Pc");
            }
        }
        let places = PciAddress::PLACES;
        if count > places {
            self.add("disks, nets", format!("{count} PCI devices"), format!("at most {places}"));
        }
        for (i, (field, address)) in devices.iter().enumerate() {
            let Some(address) = address else { continue };
            if !(1..32).contains(&address.device) || address.function > 7 {
                let problem = format!("is device {}, function {}", address.device, address.function);
                let right = "device 1 to 31, function 0 to 7; device 0 is the host bridge";
                self.add(format!("{field}.pci"), problem, right);
            }
            let first = PciAddress::new(address.device);
            if *address != first && !devices.iter().any(|(_, a)| *a == Some(first)) {
                let problem = format!("is {address}, but nothing is at {first}");
                self.add(format!("{field}.pci"), problem, "guests look for functions where function 0 is");
            }
            if let Some((other, _)) = devices[..i].iter().find(|(_, a)| a == &Some(*address)) {
                self.add(format!("{field}.pci"), format!("{address} is taken by {other}"), "");
            }
        }
    }
}

pub(crate) fn is_interface_name(name: &str) -> bool {
    let bad = |b: u8| !b.is_ascii_graphic() || matches!(b, b'/' | b':' | b'%');
    (1..=MAX_IFNAME).contains(&name.len()) && !matches!(name, "." | "..") && !name.bytes().any(bad)
}

#[cfg(test)]
mod tests {
    use super::super::*;

    fn bad(config: &VmConfig) -> Vec<String> {
        let error = config.validate().expect_err("should be refused");
        error.fields().iter().map(|f| f.field.clone()).collect()
    }

    fn linux() -> VmConfig {
        VmConfig::linux(LinuxBoot::new("/boot/vmlinuz"))
    }

    #[test]
    fn every_bad_field_is_named_at_once() {
        let mut config = linux();
        config.name = "x".repeat(65);
        config.cpus.count = 0;
        config.memory = Bytes(u64::MAX);
        config.boot = Boot::Linux(LinuxBoot::new("").initrd("").cmdline("a\0b".repeat(700)));
        config.disks = vec![DiskConfig::new(""), DiskConfig::new("ok")];
        config.disks[1].serial = "ä".into();
        config.disks[1].pci = Some(PciAddress::new(32));
        config.nets =
            vec![NetConfig::tap("much-too-long-a-name"), NetConfig::tap("t0"), NetConfig::tap("t0")];
        config.nets[1].mac = Some(MacAddress([1, 0, 0, 0, 0, 0]));
        (config.nets[1].stream, config.nets[1].queues) = (Some("here".into()), 17);
        config.nets[1].vhost = Vhost::IfPresent;
        (config.nets[2].vhost, config.nets[2].send_rate) = (Vhost::Required, RateLimit::NONE.ops(1, 1));
        let fields = [
            "name",
            "cpus.count",
            "memory",
            "boot.kernel",
            "boot.initrd",
            "boot.cmdline",
            "boot.cmdline",
            "disks[0].path",
            "disks[1].serial",
            "nets[0].tap",
            "nets[1].mac",
            "nets[1].stream",
            "nets[1].queues",
            "nets[1].vhost",
            "nets[2].vhost",
            "nets[2].tap",
            "disks[1].pci",
        ];
        assert_eq!(bad(&config), fields);
    }

    #[test]
    fn sizes_at_the_edges() {
        let mut config = linux();
        for (memory, ok) in [
            (0, false),
            (4095, false),
            (32 << 20, true),
            ((32 << 20) + 1, false),
            (1 << 45, true),
            ((1 << 45) + 4096, false),
        ] {
            config.memory = Bytes(memory);
            assert_eq!(config.validate().is_ok(), ok, "{memory}");
        }
        let mut config = linux();
        for (count, ok) in [(0, false), (1, true), (254, true), (255, false), (u16::MAX, false)] {
            config.cpus.count = count;
            assert_eq!(config.validate().is_ok(), ok, "{count}");
        }
    }

    #[test]
    fn topology_must_divide() {
        let mut config = linux();
        for (count, threads, sockets, ok) in [
            (4, 2, 2, true),
            (3, 2, 1, false),
            (4, 0, 1, false),
            (4, 1, 3, false),
            (4, 4, 1, false),
            (4, 2, 0, false),
            (252, 1, 84, false),
            (252, 1, 63, true),
        ] {
            config.cpus = CpuConfig { count, threads_per_core: threads, sockets, ..CpuConfig::default() };
            assert_eq!(config.validate().is_ok(), ok, "{count}/{threads}/{sockets}");
        }
    }

    #[test]
    fn bare_images_must_fit_and_not_overlap() {
        let mut bare = BareBoot::new(CpuMode::Real, 0x1000, [0xf4]);
        bare.images.push((0x1000, vec![0]));
        bare.images.push((u64::MAX, vec![0; 2]));
        bare.entry = 0x1_0000;
        assert_eq!(bad(&VmConfig::bare(bare)), ["boot.entry", "boot.images[2]", "boot.images[1]"]);
    }

    #[test]
    fn two_devices_in_one_place_and_too_many() {
        let mut config = linux();
        config.disks = vec![DiskConfig::new("a"), DiskConfig::new("b")];
        for disk in &mut config.disks {
            disk.pci = Some("00:05.0".parse().unwrap());
        }
        assert_eq!(bad(&config), ["disks[1].pci"]);
        config.disks[1].pci = Some("00:06.1".parse().unwrap());
        assert_eq!(bad(&config), ["disks[1].pci"]);
        config.disks[1].pci = Some("00:05.1".parse().unwrap());
        config.validate().unwrap();
        config.disks = vec![DiskConfig::new("a"); PciAddress::PLACES];
        assert_eq!(bad(&config), ["disks, nets"]);
    }

    #[test]
    fn a_bare_platform_has_no_bus() {
        let mut config = VmConfig::bare(BareBoot::default());
        config.disks.push(DiskConfig::new("a"));
        config.rng = true;
        config.console = ConsoleKind::Virtio;
        assert_eq!(bad(&config), ["disks[0]", "rng", "console"]);
    }

    #[test]
    fn names_parse_and_print() {
        for text in ["00:01.0", "00:1f.7"] {
            assert_eq!(text.parse::<PciAddress>().unwrap().to_string(), text);
        }
        for text in ["00:00.0", "00:20.0", "01:01.0", "00:01.8", "00:+1.0", "00:01", ""] {
            assert!(text.parse::<PciAddress>().is_err(), "{text}");
        }
        let mac = "52:54:00:12:34:56";
        assert_eq!(mac.parse::<MacAddress>().unwrap().to_string(), mac);
        for text in ["52:54:00:12:34", "52:54:00:12:34:5", "52:54:00:12:34:56:78", "+2:54:00:12:34:56"] {
            assert!(text.parse::<MacAddress>().is_err(), "{text}");
        }
        let uuid = "01234567-89ab-cdef-0123-456789abcdef";
        assert_eq!(uuid.parse::<Uuid>().unwrap().to_string(), uuid);
        for text in ["", "0123456789abcdef0123456789abcdef", "01234567-89ab-cdef-0123-456789abcdeg"] {
            assert!(text.parse::<Uuid>().is_err(), "{text}");
        }
    }
}
