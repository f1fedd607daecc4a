//! Configurations: from JSON, and made field by field; validated, and written out again.

use std::time::Duration;

use arbitrary::{Result, Unstructured};
use vmbed::{
    BackingConfig, BackingKind, BalloonConfig, BareBoot, Boot, Bytes, CgroupConfig, ConsoleKind, CpuMode,
    DiskConfig, DiskFormat, HugePages, LinuxBoot, MacAddress, NetConfig, PciAddress, Platform, PromiseConfig,
    RateLimit, SandboxConfig, Vhost, VmConfig,
};

/// What a configuration that was valid has.
const PARTS: [&str; 10] = [
    "disks_taken",
    "nets_taken",
    "balloon_taken",
    "rates_taken",
    "promise_taken",
    "backing_taken",
    "console_taken",
    "sandbox_taken",
    "cgroup_taken",
    "affinity_taken",
];
/// Fields that were refused, without their indices.
const FIELDS: [&str; 41] = [
    "name",
    "cpus.count",
    "cpus.threads_per_core",
    "cpus.sockets",
    "cpus.affinity",
    "memory",
    "promise.guarantee",
    "backing.huge",
    "backing.mergeable",
    "backing.numa_nodes",
    "cgroup.weight",
    "cgroup.period",
    "cgroup.quota",
    "boot.kernel",
    "boot.initrd",
    "boot.cmdline",
    "boot.entry",
    "boot.images",
    "platform",
    "disks",
    "disks.path",
    "disks.serial",
    "disks.backing",
    "disks.data_file",
    "disks.passphrases",
    "disks.queues",
    "disks.pci",
    "nets",
    "nets.tap",
    "nets.mac",
    "nets.stream",
    "nets.queues",
    "nets.mtu",
    "nets.vhost",
    "nets.pci",
    "balloon",
    "balloon.hinting",
    "balloon.pci",
    "rng",
    "console",
    "disks, nets",
];

/// How deep an input went.
#[derive(Clone, Copy, Debug)]
pub struct Depth {
    /// JSON that became a configuration.
    pub parsed: bool,
    /// It was valid, and had these [`PARTS`].
    pub valid: bool,
    pub parts: [bool; PARTS.len()],
    /// How many of these [`FIELDS`] were refused.
    pub fields: [u32; FIELDS.len()],
    /// JSON that did not become one.
    pub refused: bool,
}

const NONE: Depth = Depth {
    parsed: false,
    valid: false,
    parts: [false; PARTS.len()],
    fields: [0; FIELDS.len()],
    refused: false,
};

impl Depth {
    /// What a campaign sums up.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut all = vec![
            ("parsed", self.parsed.into()),
            ("valid", self.valid.into()),
            ("refused", self.refused.into()),
        ];
        all.extend(PARTS.into_iter().zip(self.parts.map(u64::from)));
        all.extend(FIELDS.into_iter().zip(self.fields.map(u64::from)));
        all
    }
}

/// Runs one input. Panics where a configuration is not what it was written as.
pub fn run(data: &[u8]) -> Depth {
    let mut u = Unstructured::new(data);
    let json = match u.ratio(1u8, 8u8) {
        Ok(true) => u.take_rest().to_vec(),
        _ => match made(&mut u) {
            Ok(json) => json,
            Err(_) => return NONE,
        },
    };
    let Ok(config) = serde_json::from_slice::<VmConfig>(&json) else {
        return Depth { refused: true, ..NONE };
    };
    let again = serde_json::to_vec(&config).unwrap();
    assert_eq!(serde_json::from_slice::<VmConfig>(&again).unwrap(), config);
    match config.validate() {
        Ok(()) => Depth { parsed: true, valid: true, parts: parts(&config), ..NONE },
        Err(error) => {
            let mut fields = NONE.fields;
            assert!(!error.fields().is_empty(), "{error}");
            for bad in error.fields() {
                fields[index(&bad.field)] += 1;
            }
            Depth { parsed: true, fields, ..NONE }
        }
    }
}

/// Which of [`FIELDS`] that is.
fn index(field: &str) -> usize {
    let digits = |c: char| c.is_ascii_digit() || matches!(c, '[' | ']');
    let plain = field.replace(digits, "");
    let known = FIELDS.iter().position(|name| *name == plain);
    known.unwrap_or_else(|| panic!("a field that is not known here: {field}"))
}

fn parts(config: &VmConfig) -> [bool; PARTS.len()] {
    let is_limited = |limit: RateLimit| !limit.is_none();
    [
        !config.disks.is_empty(),
        !config.nets.is_empty(),
        config.balloon.is_some(),
        config.disks.iter().any(|d| is_limited(d.rate))
            || config.nets.iter().any(|n| is_limited(n.receive_rate) || is_limited(n.send_rate)),
        config.promise != PromiseConfig::default(),
        config.backing != BackingConfig::default(),
        config.console == ConsoleKind::Virtio,
        config.sandbox.is_some(),
        config.cgroup.is_some(),
        !config.cpus.affinity.is_empty(),
    ]
}

/// A good configuration in which some fields are not, as JSON with some bytes changed.
fn made(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let mut config = if u.arbitrary()? {
        let length = if rarely(u)? { 2040 + u.int_in_range(0..=20)? } else { 10 };
        let mut linux = LinuxBoot::new(if rarely(u)? { "" } else { "vmlinuz" }).cmdline("x".repeat(length));
        if u.arbitrary()? {
            linux = linux.initrd(if rarely(u)? { "" } else { "initrd" });
        }
        VmConfig::linux(linux)
    } else {
        let mode = *u.choose(&[CpuMode::Real, CpuMode::Protected, CpuMode::Long])?;
        let code = vec![0xf4; usize::from(u.arbitrary::<u8>()?)];
        let mut bare = BareBoot::new(mode, u.int_in_range(0..=0x1_0800)?, code);
        if rarely(u)? {
            bare.images.push((u.int_in_range(0..=0x30_0000)?, vec![1; 8]));
        }
        VmConfig::bare(bare)
    };
    whole(u, &mut config)?;
    memory(u, &mut config)?;
    for _ in 0..u.int_in_range(0..=3)? {
        let disk = disk(u)?;
        config.disks.push(disk);
    }
    for _ in 0..u.int_in_range(0..=2)? {
        let net = net(u)?;
        config.nets.push(net);
    }
    if u.ratio(1u8, 32u8)? {
        config.disks.extend(vec![DiskConfig::new("many"); 300]);
    }
    if u.ratio(1u8, 3u8)? {
        let mut balloon = BalloonConfig::default();
        (balloon.deflate_on_oom, balloon.reporting) = (u.arbitrary()?, u.arbitrary()?);
        (balloon.hinting, balloon.pci) = (u.arbitrary()?, place(u)?);
        config.balloon = Some(balloon);
    }
    let mut json = serde_json::to_vec(&config).unwrap();
    if rarely(u)? {
        let at = u.choose_index(json.len())?;
        json[at] = u.arbitrary()?;
    }
    Ok(json)
}

fn rarely(u: &mut Unstructured<'_>) -> Result<bool> {
    u.ratio(1u8, 12u8)
}

/// What is said of the VM as a whole.
fn whole(u: &mut Unstructured<'_>, config: &mut VmConfig) -> Result<()> {
    if rarely(u)? {
        config.name = if u.arbitrary()? { "n".repeat(65) } else { "n\0".into() };
    }
    if u.ratio(1u8, 4u8)? {
        config.cpus.count = if rarely(u)? { u.arbitrary()? } else { u.int_in_range(1..=8)? };
        config.cpus.threads_per_core = u.int_in_range(0..=3)?;
        config.cpus.sockets = u.int_in_range(0..=4)?;
    }
    if u.ratio(1u8, 4u8)? {
        let most = if rarely(u)? { 2000 } else { 1000 };
        let lists = config.cpus.count.min(8) + u16::from(rarely(u)?);
        config.cpus.affinity =
            (0..lists).map(|_| Ok(vec![u.int_in_range(0..=most)?])).collect::<Result<_>>()?;
        config.cpus.dedicated = rarely(u)?;
    }
    if rarely(u)? {
        config.platform = *u.choose(&[Platform::Pc, Platform::Bare])?;
    }
    if u.ratio(1u8, 3u8)? {
        config.console = *u.choose(&[ConsoleKind::Virtio, ConsoleKind::Serial])?;
        // A bare guest has no bus, unless that is said.
        if matches!(config.boot, Boot::Bare(_)) && !rarely(u)? {
            config.platform = Platform::Pc;
        }
    }
    config.rng ^= rarely(u)?;
    if u.ratio(1u8, 3u8)? {
        let mut sandbox = SandboxConfig::default();
        (sandbox.vcpus, sandbox.devices) = (u.arbitrary()?, u.arbitrary()?);
        (sandbox.disks, sandbox.best_effort) = (u.arbitrary()?, u.arbitrary()?);
        config.sandbox = Some(sandbox);
    }
    if u.ratio(1u8, 3u8)? {
        let mut cgroup = CgroupConfig::default();
        cgroup.weight = u.int_in_range(0..=10_500)?;
        cgroup.period = Duration::from_micros(u.int_in_range(900..=1_100_000)?);
        let quota = u.arbitrary::<Option<u32>>()?.map(|n| Duration::from_micros(u64::from(n) % 20_000));
        cgroup.quota = quota;
        config.cgroup = Some(cgroup);
    }
    Ok(())
}

/// Memory, what it is made of, and what is promised.
fn memory(u: &mut Unstructured<'_>, config: &mut VmConfig) -> Result<()> {
    if u.ratio(1u8, 4u8)? {
        config.memory = Bytes(if u.arbitrary()? { u.arbitrary()? } else { u.int_in_range(1..=64)? << 30 });
    }
    if u.ratio(1u8, 3u8)? {
        let kinds = [BackingKind::Memfd, BackingKind::Anonymous, BackingKind::Huge2M, BackingKind::Huge1G];
        let mut backing = BackingConfig::default();
        backing.kind = *u.choose(&kinds)?;
        backing.huge = *u.choose(&[HugePages::Auto, HugePages::Auto, HugePages::Always, HugePages::Never])?;
        (backing.prefault, backing.mergeable) = (u.arbitrary()?, u.ratio(1u8, 4u8)?);
        if u.arbitrary()? {
            backing.numa_nodes = vec![if rarely(u)? { u.arbitrary()? } else { 0 }];
        }
        config.backing = backing;
    }
    if u.ratio(1u8, 3u8)? {
        let guarantee = u.int_in_range(0..=config.memory.get().saturating_add(config.memory.get() / 8))?;
        config.promise.guarantee = Bytes(guarantee);
        config.promise.victim = u.arbitrary()?;
    }
    Ok(())
}

fn place(u: &mut Unstructured<'_>) -> Result<Option<PciAddress>> {
    if u.ratio(2u8, 3u8)? {
        return Ok(None);
    }
    let device: u8 = if rarely(u)? { u.arbitrary()? } else { u.int_in_range(1..=31)? };
    let mut place = PciAddress::new(device);
    if rarely(u)? {
        place.function = u.int_in_range(0..=9)?;
    }
    Ok(Some(place))
}

fn rate(u: &mut Unstructured<'_>) -> Result<RateLimit> {
    if u.ratio(2u8, 3u8)? {
        return Ok(RateLimit::NONE);
    }
    Ok(RateLimit::NONE.bytes(u.arbitrary()?, u.arbitrary()?).ops(u.arbitrary()?, u.arbitrary()?))
}

fn disk(u: &mut Unstructured<'_>) -> Result<DiskConfig> {
    let mut disk = DiskConfig::new(if rarely(u)? { "" } else { "disk.img" });
    if u.ratio(1u8, 3u8)? {
        disk.format = DiskFormat::Qcow2;
    }
    let wrong = rarely(u)?;
    if wrong || disk.format == DiskFormat::Qcow2 && u.arbitrary()? {
        disk = match u.int_in_range(0..=2u8)? {
            0 => disk.based_on("below", DiskFormat::Raw),
            1 => disk.with_data_in("beside"),
            _ => disk.unlocked_by("open"),
        };
    }
    if rarely(u)? {
        disk.path = None;
    }
    (disk.pci, disk.rate) = (place(u)?, rate(u)?);
    disk.serial = "s".repeat(if rarely(u)? { 21 } else { 3 });
    disk.queues = if rarely(u)? { u.arbitrary()? } else { u.int_in_range(1..=16)? };
    Ok(disk)
}

fn net(u: &mut Unstructured<'_>) -> Result<NetConfig> {
    let mut net = match u.int_in_range(0..=5u8)? {
        0 => NetConfig::stream("socket"),
        1 => NetConfig::attached(),
        2 => NetConfig::tap("t".repeat(u.int_in_range(0..=20)?)),
        _ => NetConfig::tap(format!("tap{}", u.int_in_range(0..=9u8)?)),
    };
    if rarely(u)? {
        net.stream = Some("socket".into());
    }
    if u.arbitrary()? {
        let first = if rarely(u)? { u.int_in_range(0..=1)? } else { 2 };
        net.mac = Some(MacAddress([first, 0, 0, 0, 0, 0]));
    }
    (net.pci, net.receive_rate, net.send_rate) = (place(u)?, rate(u)?, rate(u)?);
    net.queues = if rarely(u)? { u.arbitrary()? } else { u.int_in_range(1..=16)? };
    net.mtu = u.arbitrary::<Option<bool>>()?.map(|small| if small { 60 } else { 1500 });
    net.vhost = *u.choose(&[Vhost::Off, Vhost::Off, Vhost::IfPresent, Vhost::Required])?;
    Ok(net)
}
