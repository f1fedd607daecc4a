//! A plain virtual machine monitor, to copy from: boots a Linux kernel with disks and network cards, its
//! console on this terminal.
//!
//! ```text
//! boot --kernel F [--initrd F] [--cmdline S] [--disk F[,ro]]… [--tap NAME]… [--vcpus N] [--memory 512M]
//! ```
//! Ctrl-A x ends the guest. SIGTERM, SIGINT and SIGHUP press its power button, the second time they end
//! it. Exit status: 0 the guest powered off, 2 it asked for a reboot, 3 it crashed, 1 anything else.

use std::io::{IsTerminal, Read, stdin, stdout};
use std::os::fd::AsFd;
use std::process::ExitCode;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use vmbed::{DiskConfig, Error, EventKind, Host, LinuxBoot, NetConfig, StopCause, Vm, VmConfig};

const USAGE: &str = "usage: boot --kernel FILE [--initrd FILE] [--cmdline TEXT] [--disk FILE[,ro]]... \
                     [--tap NAME]... [--vcpus N] [--memory 512M]";

fn main() -> ExitCode {
    let config = match arguments() {
        Ok(Some(config)) => config,
        Ok(None) => {
            println!(
                "{USAGE}\n\nCtrl-A x ends the guest. Exit status: 0 power-off, 2 reboot, 3 crash, 1 error."
            );
            return ExitCode::SUCCESS;
        }
        Err(why) => {
            eprintln!("boot: {why}\n{USAGE}");
            return ExitCode::FAILURE;
        }
    };
    match run(config) {
        Ok(StopCause::GuestPoweroff) => ExitCode::SUCCESS,
        Ok(StopCause::GuestReset) => ExitCode::from(2),
        Ok(cause @ (StopCause::TripleFault | StopCause::GuestPanic)) => {
            eprintln!("boot: {cause}");
            ExitCode::from(3)
        }
        Ok(cause) => {
            eprintln!("boot: {cause}");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("boot: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(config: VmConfig) -> Result<StopCause, Error> {
    let vm = Host::open()?.builder(config).console_output(stdout())?.build()?;
    // From here on the terminal is the guest's; dropping this gives it back, also in a panic.
    let _terminal = RawTerminal::enter();
    vm.start()?;
    watch(&vm)?;
    vm.wait()
}

/// Waits for whatever comes first, until the guest has ended.
fn watch(vm: &Vm) -> Result<(), Error> {
    let io = |e| Error::os("watching the terminal", e);
    let (signals, raised) = std::os::unix::net::UnixStream::pair().map_err(io)?;
    for signal in [SIGTERM, SIGINT, SIGHUP] {
        signal_hook::low_level::pipe::register(signal, raised.try_clone().map_err(io)?).map_err(io)?;
    }
    let (mut escape, mut input_open, mut asked) = (false, true, false);
    loop {
        let mut fds = vec![
            PollFd::from_borrowed_fd(vm.events().as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN),
        ];
        let stdin = stdin();
        if input_open {
            fds.push(PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN));
        }
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other.map_err(|e| io(e.into()))?,
        };
        let ready = |i: usize| fds.get(i).is_some_and(|fd| !fd.revents().is_empty());
        let (signalled, typed) = (ready(1), ready(2));
        while let Some(event) = vm.events().next_event() {
            match event.kind {
                EventKind::Stopped(_) => return Ok(()),
                EventKind::DeviceNeedsReset { .. } | EventKind::BackendError { .. } => {
                    eprint!("boot: {:?}\r\n", event.kind);
                }
                _ => {}
            }
        }
        if signalled {
            let _ = (&signals).read(&mut [0; 16]);
            // The first asks the guest, the second does not ask.
            if std::mem::replace(&mut asked, true) || vm.shutdown().is_err() {
                vm.request_stop();
            }
        }
        if typed {
            let mut bytes = [0; 1024];
            let count = rustix::io::read(stdin.as_fd(), &mut bytes).unwrap_or(0);
            input_open = count > 0;
            type_in(vm, &bytes[..count], &mut escape);
        }
    }
}

/// Hands typed bytes to the guest, but for the escape: Ctrl-A x ends it, Ctrl-A Ctrl-A is one Ctrl-A.
fn type_in(vm: &Vm, bytes: &[u8], escape: &mut bool) {
    for &byte in bytes {
        match (std::mem::take(escape), byte) {
            (false, 0x01) => *escape = true,
            (true, b'x') => vm.request_stop(),
            // What does not fit is dropped, as on a real serial line without flow control.
            _ => drop(vm.console_input(&[byte])),
        }
    }
}

/// A terminal in raw mode, given back as it was.
struct RawTerminal(Option<Termios>);

impl RawTerminal {
    fn enter() -> Self {
        let old = stdin().is_terminal().then(|| tcgetattr(stdin()).ok()).flatten();
        if let Some(mut raw) = old.clone() {
            raw.make_raw();
            let _ = tcsetattr(stdin(), OptionalActions::Flush, &raw);
        }
        Self(old)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        if let Some(old) = &self.0 {
            let _ = tcsetattr(stdin(), OptionalActions::Flush, old);
        }
    }
}

/// The command line as a configuration; `None` for `--help`.
fn arguments() -> Result<Option<VmConfig>, String> {
    let mut boot = LinuxBoot::new("");
    boot.cmdline = "console=ttyS0 reboot=k panic=-1".to_owned();
    let mut config = VmConfig::linux(boot.clone());
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        if matches!(name.as_str(), "-h" | "--help") {
            return Ok(None);
        }
        let value = arguments.next().ok_or_else(|| format!("{name} needs a value"))?;
        let bad = |e: &dyn std::fmt::Display| format!("{name} {value}: {e}");
        match name.as_str() {
            "--kernel" => boot.kernel = value.into(),
            "--initrd" => boot.initrd = Some(value.into()),
            "--cmdline" => boot.cmdline = value,
            "--disk" => config.disks.push(match value.strip_suffix(",ro") {
                Some(path) => DiskConfig::new(path).readonly(),
                None => DiskConfig::new(value),
            }),
            "--tap" => config.nets.push(NetConfig::tap(value)),
            "--vcpus" => config.cpus.count = value.parse().map_err(|e| bad(&e))?,
            "--memory" => config.memory = value.parse().map_err(|e| bad(&e))?,
            _ => return Err(format!("unknown option {name}")),
        }
    }
    if boot.kernel.as_os_str().is_empty() {
        return Err("--kernel is missing".to_owned());
    }
    config.boot = vmbed::Boot::Linux(boot);
    Ok(Some(config))
}
