//! Bad input: each is an error that names what and where and what would be right, and leaves nothing.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use libtest_mimic::{Arguments, Trial};
use vmbed::{
    BareBoot, Boot, Bytes, CpuMode, DiskConfig, ErrorKind, Host, HostConfig, LinuxBoot, NetConfig, Vhost,
    VmConfig,
};

/// Set in the copy of this program that has a network namespace of its own.
const INSIDE: &str = "VMBED_ERRORS_INSIDE";
/// Set in the copy that has lost its privileges: it only probes.
const PROBE: &str = "VMBED_ERRORS_PROBE";

fn main() -> ExitCode {
    if let Some(path) = std::env::var_os(PROBE) {
        let mut config = HostConfig::default();
        config.kvm = path.into();
        let error = Host::open_with(config).expect_err("it may not be opened");
        println!("{:?} {error}", error.kind());
        return ExitCode::SUCCESS;
    }
    let arguments = Arguments::from_args();
    if !arguments.list && std::env::var_os(INSIDE).is_none() {
        // The interfaces that are made here are gone with their namespace.
        let own = std::env::current_exe().expect("this program's own path");
        let mut command = Command::new("unshare");
        command
            .args(["--net", "--map-root-user"])
            .arg(own)
            .args(std::env::args_os().skip(1))
            .env(INSIDE, "1");
        let error = command.exec();
        panic!("unshare (package util-linux) cannot be started: {error}");
    }
    let arguments = Arguments { test_threads: Some(1), ..arguments };
    let trials = vec![
        trial("no_kvm_here", no_kvm),
        trial("no_permission_for_kvm", no_permission),
        trial("more_memory_than_the_host_shares", too_much_memory),
        trial("kernels_and_initrds_that_cannot_be", kernels),
        trial("disks_that_cannot_be", disks),
        trial("taps_that_cannot_be", taps),
        trial("every_bad_field_at_once", fields),
    ];
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn trial(name: &str, run: fn()) -> Trial {
    Trial::test(name, move || {
        run();
        Ok(())
    })
}

struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        let path = std::env::temp_dir().join(format!("vmbed-errors-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str, size: u64) -> PathBuf {
        let path = self.0.join(name);
        fs::File::create(&path).unwrap().set_len(size).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

/// Requires an error of that kind with these words, from a build that leaves nothing behind.
fn refused(config: VmConfig, kind: ErrorKind, words: &[&str]) {
    let host = Host::open().unwrap();
    let before = descriptors();
    let error = host.build(config).expect_err(&format!("should be refused for {words:?}"));
    assert_eq!(descriptors(), before, "{error}");
    assert_eq!(host.usage().memory.get(), 0);
    let text = error.to_string();
    assert_eq!(error.kind(), kind, "{text}");
    for word in words {
        assert!(text.contains(word), "'{word}' is not in: {text}");
    }
}

fn bare() -> VmConfig {
    let mut config = VmConfig::bare(BareBoot::new(CpuMode::Real, 0x1000, [0xf4]));
    config.platform = vmbed::Platform::Pc;
    config
}

fn with_disk(path: &Path) -> VmConfig {
    let mut config = bare();
    config.disks.push(DiskConfig::new(path));
    config
}

fn with_tap(name: &str) -> VmConfig {
    let mut config = bare();
    config.nets.push(NetConfig::tap(name));
    config
}

fn no_kvm() {
    for (path, kind) in [("/no/such/kvm", ErrorKind::NotFound), ("/dev/null", ErrorKind::Unsupported)] {
        let mut config = HostConfig::default();
        config.kvm = path.into();
        let error = Host::open_with(config).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        let probe = Host::probe_at(path);
        assert!(!probe.is_usable());
        let bad = probe.findings.iter().find(|f| f.problem.is_some()).unwrap();
        assert!(!bad.remedy.is_empty(), "{probe}");
    }
    assert!(Host::probe().is_usable(), "{}", Host::probe());
}

/// A device that this user may not open, seen by a copy of this program that may not overrule that.
fn no_permission() {
    use std::os::unix::fs::PermissionsExt;
    let scratch = Scratch::new();
    let device = scratch.file("kvm", 0);
    fs::set_permissions(&device, fs::Permissions::from_mode(0o000)).unwrap();
    let output = Command::new("setpriv")
        .args(["--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"])
        .arg(std::env::current_exe().unwrap())
        .env(PROBE, &device)
        .output()
        .expect("setpriv (package util-linux) must be installed");
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.starts_with("PermissionDenied"), "{text}");
    assert!(text.contains(device.to_str().unwrap()) && text.contains("usermod -aG kvm"), "{text}");
}

fn too_much_memory() {
    let mut config = bare();
    config.memory = Bytes::gib(1 << 14);
    refused(config, ErrorKind::Refused, &["memory_units", "wants 16 TiB", "nominal", "are missing", "ratio"]);
}

fn kernels() {
    let scratch = Scratch::new();
    let linux = |boot: LinuxBoot| VmConfig::linux(boot);
    let empty = scratch.file("empty", 0);
    let zeroes = scratch.file("zeroes", 4096);
    refused(linux(LinuxBoot::new("/no/kernel")), ErrorKind::NotFound, &["/no/kernel"]);
    refused(linux(LinuxBoot::new("/tmp")), ErrorKind::BadImage, &["/tmp", "directory"]);
    refused(linux(LinuxBoot::new(&empty)), ErrorKind::BadImage, &["empty"]);
    refused(linux(LinuxBoot::new(&zeroes)), ErrorKind::BadImage, &["zeroes", "bzImage or an ELF"]);
    let long = LinuxBoot::new(&zeroes).cmdline("x".repeat(2048));
    refused(linux(long), ErrorKind::InvalidArgument, &["boot.cmdline", "2048", "2047"]);
    let nul = LinuxBoot::new(&zeroes).cmdline("a\0b");
    refused(linux(nul), ErrorKind::InvalidArgument, &["boot.cmdline", "NUL at byte 1"]);
}

fn disks() {
    let scratch = Scratch::new();
    refused(with_disk(Path::new("/no/disk")), ErrorKind::NotFound, &["disk0", "/no/disk", "does not exist"]);
    refused(with_disk(&scratch.0), ErrorKind::InvalidArgument, &["disk0", "directory"]);
    refused(with_disk(Path::new("/dev/null")), ErrorKind::InvalidArgument, &["disk0", "/dev/null"]);
    refused(with_disk(&scratch.file("odd", 1000)), ErrorKind::InvalidArgument, &["odd", "1000", "1024"]);
    refused(with_disk(&scratch.file("none", 0)), ErrorKind::InvalidArgument, &["none", "empty"]);
    // The second disk is at fault, and the first one is closed again.
    let mut two = with_disk(&scratch.file("good", 1 << 20));
    two.disks.push(DiskConfig::new("/no/disk"));
    refused(two, ErrorKind::NotFound, &["disk1", "/no/disk"]);
    // Root may write anywhere but to a file that nobody may.
    let locked = scratch.file("locked", 1 << 20);
    let chattr = |flag: &str| Command::new("chattr").arg(flag).arg(&locked).output();
    if chattr("+i").is_ok_and(|o| o.status.success()) {
        refused(with_disk(&locked), ErrorKind::PermissionDenied, &["disk0", "locked", "read-only"]);
        let mut readonly = with_disk(&locked);
        readonly.disks[0] = readonly.disks[0].clone().readonly();
        drop(Host::open().unwrap().build(readonly).unwrap());
        chattr("-i").unwrap();
    } else {
        // A file system without the attribute: a program that runs is as unwritable.
        let busy = Path::new("/proc/self/exe");
        refused(with_disk(busy), ErrorKind::Busy, &["disk0", "/proc/self/exe"]);
    }
}

fn taps() {
    refused(with_tap("vmbnone0"), ErrorKind::NotFound, &["net0", "vmbnone0", "ip tuntap add vmbnone0"]);
    ip(&["tuntap", "add", "vmberr0", "mode", "tap"]);
    let host = Host::open().unwrap();
    let first = host.build(with_tap("vmberr0")).unwrap();
    refused(with_tap("vmberr0"), ErrorKind::Busy, &["net0", "vmberr0", "in use"]);
    drop(first);
    drop(host.build(with_tap("vmberr0")).unwrap());
    vhost(&host);
    ip(&["link", "add", "vmberr1", "type", "bridge"]);
    refused(with_tap("vmberr1"), ErrorKind::InvalidArgument, &["net0", "vmberr1", "no TAP interface"]);
}

/// With /dev/vhost-net and without it.
fn vhost(host: &Host) {
    let by_kernel = |wanted| {
        let mut config = with_tap("vmberr0");
        config.nets[0].vhost = wanted;
        config
    };
    let vm = host.build(by_kernel(Vhost::IfPresent)).unwrap();
    assert_eq!(vm.net_statistics(0).unwrap().vhost, 0, "its guest has no driver");
    drop(vm);
    let path = "/dev/vhost-net";
    match fs::File::options().read(true).write(true).open(path).map_err(|e| e.kind()) {
        Ok(_) => drop(host.build(by_kernel(Vhost::Required)).unwrap()),
        Err(std::io::ErrorKind::PermissionDenied) => {
            let words = ["net0", path, "read and write access"];
            refused(by_kernel(Vhost::Required), ErrorKind::PermissionDenied, &words);
        }
        Err(_) => {
            let words = ["net0", path, "modprobe vhost_net"];
            refused(by_kernel(Vhost::Required), ErrorKind::NotFound, &words);
        }
    }
}

fn ip(arguments: &[&str]) {
    let output =
        Command::new("ip").args(arguments).output().expect("ip (package iproute2) must be installed");
    assert!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn fields() {
    let mut config = VmConfig::linux(LinuxBoot::new(""));
    config.cpus.count = 0;
    config.memory = Bytes(0);
    config.disks.push(DiskConfig::new(""));
    config.nets.push(NetConfig::tap("a/b"));
    if let Boot::Linux(linux) = &mut config.boot {
        linux.cmdline = "\0".to_owned();
    }
    let error = Host::open().unwrap().build(config).unwrap_err();
    let named: Vec<_> = error.fields().iter().map(|f| f.field.as_str()).collect();
    assert_eq!(
        named,
        ["cpus.count", "memory", "boot.kernel", "boot.cmdline", "disks[0].path", "nets[0].tap"]
    );
}
