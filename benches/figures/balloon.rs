//! What it costs to get 768 MiB back from a stock guest of 1 GiB that has filled and freed them. In the lab under icount, where a
//! nanosecond is an instruction of anybody's: guest, host or VMM. Free-page reporting is off, so that the balloon does it all.
//!
//! `figure-balloon vmbed KERNEL INITRD CMDLINE` or `figure-balloon qemu QEMU SHARE KERNEL INITRD CMDLINE`, where the guest prints
//! `now=freed`. Prints the nanoseconds from asking to the guest's answer that it is done, the idle ones among them, and how much
//! less memory the VM (vmbed) or the process (QEMU) then has.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use vmbed::{BalloonConfig, Bytes, EventKind, Host, LinuxBoot, VmConfig};

const LONG: Duration = Duration::from_secs(900);
const GIVEN: u64 = 768 << 20;
const ALL: u64 = 1 << 30;
const READY: &str = "now=freed";

#[path = "idle.rs"]
mod idle;
use idle::{Done, idle};

/// Does `f`, and says what it took.
fn measured(before: u64, f: impl FnOnce() -> Done<()>, after: impl FnOnce() -> Done<u64>) -> Done<()> {
    // Let whatever the guest's start has left behind come to rest.
    std::thread::sleep(Duration::from_secs(3));
    let (begin, idled) = (Instant::now(), idle()?);
    f()?;
    let (time, idled) = (begin.elapsed().as_nanos(), idle()? - idled);
    println!("took {time} idle {idled} given {}", before.saturating_sub(after()?));
    Ok(())
}

fn vmbed(kernel: &str, initrd: &str, cmdline: &str) -> Done<()> {
    let mut config = VmConfig::linux(LinuxBoot::new(kernel).initrd(initrd).cmdline(cmdline));
    config.memory = Bytes(ALL);
    let mut balloon = BalloonConfig::default();
    balloon.reporting = false;
    config.balloon = Some(balloon);
    let (said, ready) = std::sync::mpsc::channel();
    let mut output = Vec::new();
    let host = Host::open()?;
    let vm = host.builder(config).console_callback(move |bytes| {
        output.extend_from_slice(bytes);
        if output.windows(READY.len()).any(|w| w == READY.as_bytes()) {
            let _ = said.send(());
            output.clear();
        }
    });
    let vm = vm.build()?;
    vm.start()?;
    ready.recv_timeout(LONG).map_err(|_| "waited for the guest to be ready")?;
    let arrived = || {
        vm.set_balloon(Bytes(GIVEN))?;
        loop {
            let event = vm.events().wait_event(LONG).ok_or("waited for the guest's balloon")?;
            if matches!(event.kind, EventKind::Balloon { actual, .. } if actual.get() >= GIVEN) {
                return Ok(());
            }
        }
    };
    measured(vm.memory().backing.get(), arrived, || Ok(vm.memory().backing.get()))
}

fn resident(pid: u32) -> Done<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/statm"))?;
    Ok(text.split(' ').nth(1).ok_or("statm has two words")?.parse::<u64>()? * 4096)
}

fn qemu(program: &str, share: &str, kernel: &str, initrd: &str, cmdline: &str) -> Done<()> {
    let serial = format!("/tmp/figure-balloon-{}", std::process::id());
    if !Command::new("mkfifo").arg(&serial).status()?.success() {
        return Err("mkfifo".into());
    }
    let mut child = Command::new(program)
        .args(["-L", share, "-L", "/usr/share/seabios", "-L", "/usr/share/qemu"])
        .args(["-accel", "kvm", "-machine", "q35", "-cpu", "host", "-m", "1024", "-smp", "1"])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-nic", "none"])
        .args([
            "-serial",
            &format!("file:{serial}"),
            "-qmp",
            "stdio",
            "-device",
            "virtio-balloon-pci,id=balloon",
        ])
        .args(["-kernel", kernel, "-initrd", initrd, "-append", cmdline])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut say = child.stdin.take().ok_or("piped")?;
    let mut answers = BufReader::new(child.stdout.take().ok_or("piped")?).lines();
    let mut until = |what: &str| -> Done<()> {
        loop {
            let line = answers.next().ok_or_else(|| format!("QEMU ended; waited for {what}"))??;
            if line.contains("\"error\"") {
                return Err(line.into());
            }
            if line.contains(what) {
                return Ok(());
            }
        }
    };
    let mut file = std::fs::File::open(&serial)?;
    std::fs::remove_file(&serial)?;
    let (mut output, mut buffer) = (Vec::new(), [0; 4096]);
    while !output.windows(READY.len()).any(|w| w == READY.as_bytes()) {
        let count = file.read(&mut buffer)?;
        output.extend_from_slice(&buffer[..count]);
        if count == 0 {
            return Err(format!("the guest ended: {}", String::from_utf8_lossy(&output)).into());
        }
    }
    say.write_all(b"{\"execute\":\"qmp_capabilities\"}\n")?;
    until("\"return\"")?;
    let left = ALL - GIVEN;
    let arrived = || {
        let ask = format!("{{\"execute\":\"balloon\",\"arguments\":{{\"value\":{left}}}}}\n");
        say.write_all(ask.as_bytes())?;
        until(&format!("\"actual\": {left}"))
    };
    let pid = child.id();
    let done = measured(resident(pid)?, arrived, || resident(pid));
    child.kill()?;
    child.wait()?;
    done
}

fn main() -> Done<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["vmbed", kernel, initrd, cmdline] => vmbed(kernel, initrd, cmdline),
        ["qemu", program, share, kernel, initrd, cmdline] => qemu(program, share, kernel, initrd, cmdline),
        _ => Err("usage: figure-balloon vmbed KERNEL INITRD CMDLINE | qemu QEMU SHARE KERNEL INITRD CMDLINE"
            .into()),
    }
}
