//! Makes an image of an instance's disk while it runs, as a compute node does for its image service.
//!
//! ```text
//! image --kernel F [--initrd F] [--cmdline S] --disk F[,qcow2] --save F[,qcow2] [--when TEXT]
//! ```
//! Boots the kernel with the disk, waits until the console shows TEXT (`login:`), and saves the disk as it is then to a new image; the
//! guest goes on meanwhile. Ctrl-C gives the image up and ends the guest. Exit status: 0 the image is complete, 1 anything else.

use std::io::{Write, stderr, stdout};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vmbed::{DiskConfig, DiskFormat, Error, Host, LinuxBoot, Vm, VmConfig};

const USAGE: &str = "usage: image --kernel FILE [--initrd FILE] [--cmdline TEXT] --disk FILE[,qcow2] \
                     --save FILE[,qcow2] [--when TEXT]";

/// What the command line says.
struct Wanted {
    config: VmConfig,
    path: String,
    format: DiskFormat,
    when: String,
}

fn main() -> ExitCode {
    let wanted = match arguments() {
        Ok(Some(wanted)) => wanted,
        Ok(None) => {
            println!(
                "{USAGE}\n\nSaves the disk of a guest that runs, once its console shows TEXT (login:).\n\
                 Ctrl-C gives the image up. Exit status: 0 the image is complete, 1 anything else."
            );
            return ExitCode::SUCCESS;
        }
        Err(why) => {
            eprintln!("image: {why}\n{USAGE}");
            return ExitCode::FAILURE;
        }
    };
    match run(wanted) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("image: given up, and nothing is left of it");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("image: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(wanted: Wanted) -> Result<bool, Error> {
    let given_up = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, given_up.clone()).map_err(|e| Error::os("signals", e))?;
    }
    let vm = Host::open()?.builder(wanted.config).console_output(stdout())?.build()?;
    vm.start()?;
    if !shows(&vm, &wanted.when, &given_up)? {
        return Ok(false);
    }
    let (begun, mut shown) = (Instant::now(), u64::MAX);
    let complete = vm.save_disk(0, &wanted.path, wanted.format, |behind, all| {
        let percent = behind.get() * 100 / all.get().max(1);
        if std::mem::replace(&mut shown, percent) != percent {
            let _ = write!(stderr(), "\rsaving: {percent} %");
        }
        !given_up.load(Ordering::Relaxed)
    })?;
    eprintln!("\rsaving: {} in {:.1?}", if complete { "done" } else { "given up" }, begun.elapsed());
    while complete && !given_up.load(Ordering::Relaxed) {
        if vm.wait_timeout(Duration::from_millis(100))?.is_some() {
            break;
        }
    }
    Ok(complete)
}

/// Waits until the console shows the text; `false` where that was given up.
fn shows(vm: &Vm, text: &str, given_up: &AtomicBool) -> Result<bool, Error> {
    loop {
        if String::from_utf8_lossy(&vm.console_tail()).contains(text) {
            return Ok(true);
        }
        if given_up.load(Ordering::Relaxed) || vm.wait_timeout(Duration::from_millis(50))?.is_some() {
            return Ok(false);
        }
    }
}

/// `FILE` or `FILE,qcow2`
fn image(text: &str) -> (&str, DiskFormat) {
    text.strip_suffix(",qcow2").map_or((text, DiskFormat::Raw), |path| (path, DiskFormat::Qcow2))
}

/// The command line; `None` for `--help`.
fn arguments() -> Result<Option<Wanted>, String> {
    let mut boot = LinuxBoot::new("").cmdline("console=ttyS0 reboot=k panic=-1 root=/dev/vda rw");
    let (mut disk, mut save, mut when) = (None, None, "login:".to_owned());
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        if matches!(name.as_str(), "-h" | "--help") {
            return Ok(None);
        }
        let value = arguments.next().ok_or_else(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--kernel" => boot.kernel = value.into(),
            "--initrd" => boot.initrd = Some(value.into()),
            "--cmdline" => boot.cmdline = value,
            "--disk" => disk = Some(value),
            "--save" => save = Some(value),
            "--when" => when = value,
            _ => return Err(format!("unknown option {name}")),
        }
    }
    let (disk, save) = (disk.ok_or("--disk is missing")?, save.ok_or("--save is missing")?);
    if boot.kernel.as_os_str().is_empty() {
        return Err("--kernel is missing".to_owned());
    }
    let mut config = VmConfig::linux(boot);
    config.disks.push(match image(&disk) {
        (path, DiskFormat::Qcow2) => DiskConfig::qcow2(path),
        (path, _) => DiskConfig::new(path),
    });
    let (path, format) = image(&save);
    Ok(Some(Wanted { config, path: path.to_owned(), format, when }))
}
