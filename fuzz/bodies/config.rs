//! Configurations: from JSON, and made field by field; validated, and written out again.

use arbitrary::{Result, Unstructured};
use vmbed::{BareBoot, Bytes, CpuMode, DiskConfig, LinuxBoot, NetConfig, VmConfig};

/// How deep an input went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Depth {
    /// JSON that became a configuration.
    pub parsed: bool,
    /// It was valid.
    pub valid: bool,
    /// It had bad fields; how many.
    pub bad_fields: u32,
    /// JSON that did not become one.
    pub refused: bool,
}

impl Depth {
    /// What a campaign sums up.
    #[allow(dead_code, reason = "a replay looks at the fields")]
    pub fn counters(&self) -> [(&'static str, u64); 4] {
        [
            ("parsed", self.parsed.into()),
            ("valid", self.valid.into()),
            ("bad_fields", self.bad_fields.into()),
            ("refused", self.refused.into()),
        ]
    }
}

/// Runs one input. Panics where a configuration is not what it was written as.
pub fn run(data: &[u8]) -> Depth {
    let mut u = Unstructured::new(data);
    let json = match u.ratio(1u8, 4u8) {
        Ok(true) => u.take_rest().to_vec(),
        _ => match made(&mut u) {
            Ok(json) => json,
            Err(_) => return Depth::default(),
        },
    };
    let Ok(config) = serde_json::from_slice::<VmConfig>(&json) else {
        return Depth { refused: true, ..Depth::default() };
    };
    let again = serde_json::to_vec(&config).unwrap();
    assert_eq!(serde_json::from_slice::<VmConfig>(&again).unwrap(), config);
    match config.validate() {
        Ok(()) => Depth { parsed: true, valid: true, ..Depth::default() },
        Err(error) => {
            let bad_fields = error.fields().len() as u32;
            assert!(bad_fields > 0, "{error}");
            Depth { parsed: true, bad_fields, ..Depth::default() }
        }
    }
}

/// A good configuration in which some fields are not, as JSON with some bytes changed.
fn made(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let mut config = if u.arbitrary()? {
        let cmdline = "x".repeat(usize::from(u.arbitrary::<u16>()? % 4200));
        VmConfig::linux(LinuxBoot::new("vmlinuz").cmdline(cmdline))
    } else {
        let mode = *u.choose(&[CpuMode::Real, CpuMode::Protected, CpuMode::Long])?;
        let code = vec![0xf4; usize::from(u.arbitrary::<u8>()?)];
        VmConfig::bare(BareBoot::new(mode, u.int_in_range(0..=0x30_0000)?, code))
    };
    if u.ratio(1u8, 3u8)? {
        config.memory = Bytes(u.arbitrary()?);
    }
    if u.ratio(1u8, 3u8)? {
        config.cpus.count = u.arbitrary()?;
        config.cpus.threads_per_core = u.int_in_range(0..=3)?;
        config.cpus.sockets = u.int_in_range(0..=300)?;
    }
    for _ in 0..u.int_in_range(0..=3)? {
        let mut disk = DiskConfig::new(if u.ratio(1u8, 8u8)? { "" } else { "disk.img" });
        disk.pci = match u.arbitrary::<Option<u8>>()? {
            Some(device) => format!("00:{device:02x}.0").parse().ok(),
            None => None,
        };
        disk.serial = "s".repeat(usize::from(u.arbitrary::<u8>()? % 24));
        config.disks.push(disk);
    }
    if u.arbitrary()? {
        config.nets.push(NetConfig::tap("t".repeat(usize::from(u.arbitrary::<u8>()? % 20))));
    }
    let mut json = serde_json::to_vec(&config).unwrap();
    for _ in 0..u.int_in_range(0..=2u8)? {
        let at = u.choose_index(json.len())?;
        json[at] = u.arbitrary()?;
    }
    Ok(json)
}
