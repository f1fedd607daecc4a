//! `figure-overhead`: what VMs that touch all of their memory are charged for beside it, kernel memory included, against the model of
//! it; in a memory cgroup of its own, of version 1 or 2, which only root can make. Each line: `SHAPE modelled N measured N`, in bytes a
//! VM, and at the end `worst-percent N`.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vmbed::{BareBoot, Bytes, CpuMode, DiskConfig, DiskEngine, Host, HugePages, Platform, Vm, VmConfig};

const MIB: u32 = 1 << 20;
const VMS: u64 = 24;
const LONG: Duration = Duration::from_secs(60);

/// This process in a cgroup of its own; back where it was when dropped.
struct Cage {
    before: PathBuf,
    own: PathBuf,
    version: u8,
}

impl Cage {
    fn new() -> Result<Self, Box<dyn Error>> {
        let groups = fs::read_to_string("/proc/self/cgroup")?;
        let of = |wanted: &str| {
            let mut lines = groups.lines().map(|line| line.splitn(3, ':').collect::<Vec<_>>());
            lines.find(|parts| parts[1] == wanted).map(|parts| parts[2].trim_start_matches('/').to_owned())
        };
        let (version, before) = match (of("memory"), of("")) {
            (Some(path), _) => (1, Path::new("/sys/fs/cgroup/memory").join(path)),
            (None, Some(path)) => (2, Path::new("/sys/fs/cgroup").join(path)),
            _ => return Err("there is no memory cgroup here".into()),
        };
        if version == 2 {
            fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+memory")?;
        }
        // In version 2 no process may be beside: at the top, then.
        let parent = if version == 1 { before.clone() } else { "/sys/fs/cgroup".into() };
        let own = parent.join(format!("vmbed-overhead-{}", std::process::id()));
        fs::create_dir(&own).map_err(|e| format!("making {}: {e}", own.display()))?;
        let cage = Self { before, own, version };
        fs::write(cage.own.join("cgroup.procs"), "0")?;
        Ok(cage)
    }

    /// What is charged, but for the page cache, which is nobody's.
    fn charged(&self) -> Result<u64, Box<dyn Error>> {
        let (all, cache) =
            if self.version == 1 { ("memory.usage_in_bytes", "cache ") } else { ("memory.current", "file ") };
        let stat = fs::read_to_string(self.own.join("memory.stat"))?;
        let of = |name: &str| -> Result<u64, Box<dyn Error>> {
            let line = stat.lines().find_map(|line| line.strip_prefix(name));
            Ok(line.ok_or_else(|| format!("no {name}in {stat}"))?.parse()?)
        };
        let current: u64 = fs::read_to_string(self.own.join(all))?.trim().parse()?;
        Ok(current - (of(cache)? - of("shmem ")?))
    }
}

impl Drop for Cage {
    fn drop(&mut self) {
        let back = fs::write(self.before.join("cgroup.procs"), "0");
        if let Err(error) = back.and_then(|()| fs::remove_dir(&self.own)) {
            eprintln!("{} is left: {error}", self.own.display());
        }
    }
}

/// vCPU 0 writes to every page and waits for interrupts; the others wait to be started.
fn config(vcpus: u16, mib: u32, disks: u32, disk: &Path) -> VmConfig {
    let end = mib * MIB;
    let mut code = vec![0xb8, 0, 0, 0x20, 0]; // mov eax, 0x200000
    code.extend([0xc6, 0, 1, 5, 0, 0x10, 0, 0, 0x3d]); // 1: mov byte [eax], 1; add eax, 0x1000; cmp eax, end
    code.extend(end.to_le_bytes());
    code.extend([0x72, 0xf1, 0xf4]); // jb 1b; hlt
    let mut config = VmConfig::bare(BareBoot::new(CpuMode::Protected, 0x1000, code));
    (config.memory, config.backing.huge) = (Bytes(end.into()), HugePages::Never);
    (config.cpus.count, config.platform) = (vcpus, Platform::Pc);
    for i in 0..disks {
        let mut one = DiskConfig::new(disk);
        one.readonly = true;
        one.engine = if i % 2 == 0 { DiskEngine::Sync } else { DiskEngine::Auto };
        config.disks.push(one);
    }
    config
}

fn made(host: &Host, config: &VmConfig) -> Result<Vm, Box<dyn Error>> {
    let vm = host.build(config.clone())?;
    vm.start()?;
    let end = Instant::now() + LONG;
    while vm.memory().backing.get() + (2 << 20) < config.memory.get() {
        if Instant::now() > end {
            return Err(format!("waited {LONG:?} for a guest to touch its memory: {:?}", vm.memory()).into());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(vm)
}

fn main() -> Result<(), Box<dyn Error>> {
    let disk = std::env::temp_dir().join(format!("vmbed-overhead-{}", std::process::id()));
    fs::write(&disk, [0; 4096])?;
    let cage = Cage::new()?;
    let host = Host::open()?;
    let mut worst = 0.0_f64;
    for (vcpus, mib, disks) in [(1, 48, 0), (4, 32, 0), (1, 32, 3), (2, 128, 1)] {
        let config = config(vcpus, mib, disks, &disk);
        // What the first one brings for all.
        let _first = made(&host, &config)?;
        let settled = || -> Result<u64, Box<dyn Error>> {
            std::thread::sleep(Duration::from_millis(500));
            Ok(cage.charged()? - host.usage().backing.get())
        };
        let before = settled()?;
        let vms = (0..VMS).map(|_| made(&host, &config)).collect::<Result<Vec<_>, _>>()?;
        let measured = settled()?.saturating_sub(before) / VMS;
        let modelled = vms[0].memory().overhead.get();
        println!("{vcpus}-vcpus-{mib}-mib-{disks}-disks modelled {modelled} measured {measured}");
        worst = worst.max((modelled as f64 / measured as f64 - 1.0).abs() * 100.0);
    }
    println!("worst-percent {worst:.1}");
    fs::remove_file(disk)?;
    Ok(())
}
