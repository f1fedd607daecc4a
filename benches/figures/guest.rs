//! What something costs in a stock guest with a disk or a card. In the lab under icount, where a nanosecond is an instruction of
//! anybody's: guest, host or VMM.
//!
//! `figure-guest vmbed ON TOOLS KERNEL INITRD CMDLINE` or `figure-guest qemu QEMU SHARE ON TOOLS KERNEL INITRD CMDLINE`, where ON is a block
//! device or `tap:NAME`, and the guest prints `mark=COUNT` when it has done so many of something, and `mark=end` at last. Prints for each mark
//! its nanoseconds since the one before, and the idle ones among them; and what the guest says besides.

use std::io::Read;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use vmbed::{CacheMode, DiskConfig, DiskEngine, Host, LinuxBoot, NetConfig, VmConfig};

const LONG: Duration = Duration::from_secs(900);

#[path = "idle.rs"]
mod idle;
use idle::{Done, idle};

/// Finds whole lines in what comes in pieces, and hands on those that are marks, with their time.
struct Marks {
    line: Vec<u8>,
    found: Sender<(String, Instant, u64)>,
}

impl Marks {
    fn hear(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if *byte != b'\n' {
                self.line.push(*byte);
                continue;
            }
            let line = String::from_utf8_lossy(&self.line).trim().to_owned();
            self.line.clear();
            if let Some(mark) = line.strip_prefix("mark=") {
                let _ = self.found.send((mark.to_owned(), Instant::now(), idle().expect("the lab has it")));
            } else if let Some(said) = line.strip_prefix("said=") {
                println!("said {said}");
            } else if !line.is_empty() {
                eprintln!("{line}");
            }
        }
    }
}

fn marks() -> (Marks, Receiver<(String, Instant, u64)>) {
    let (found, marks) = channel();
    (Marks { line: Vec::new(), found }, marks)
}

/// Prints what comes, until the guest says that it is done.
fn listen(marks: &Receiver<(String, Instant, u64)>) -> Done<()> {
    let mut before: Option<(Instant, u64)> = None;
    loop {
        let (mark, now, idled) = marks.recv_timeout(LONG).map_err(|_| "waited for the guest's next mark")?;
        if mark == "end" {
            return Ok(());
        }
        if let Some((then, idle)) = before {
            println!("mark {mark} took {} idle {}", now.duration_since(then).as_nanos(), idled - idle);
        }
        before = Some((now, idled));
    }
}

fn vmbed(device: &str, tools: &str, kernel: &str, initrd: &str, cmdline: &str) -> Done<()> {
    let mut config = VmConfig::linux(LinuxBoot::new(kernel).initrd(initrd).cmdline(cmdline));
    config.memory = vmbed::Bytes::mib(512);
    config.disks = vec![DiskConfig::new(tools).readonly()];
    if let Some(tap) = device.strip_prefix("tap:") {
        config.nets.push(NetConfig::tap(tap));
    } else {
        let mut disk = DiskConfig::new(device);
        (disk.engine, disk.cache) = (DiskEngine::IoUring, CacheMode::Direct);
        config.disks.push(disk);
    }
    let (mut hearing, marks) = marks();
    let vm = Host::open()?.builder(config).console_callback(move |bytes| hearing.hear(bytes)).build()?;
    vm.start()?;
    let heard = listen(&marks);
    vm.stop()?;
    heard
}

fn qemu(words: [&str; 7]) -> Done<()> {
    let [program, share, device, tools, kernel, initrd, cmdline] = words;
    let measured = match device.strip_prefix("tap:") {
        Some(tap) => [
            "-netdev".to_owned(),
            format!("tap,ifname={tap},script=no,downscript=no,vhost=off,id=net"),
            "-device".to_owned(),
            "virtio-net-pci,netdev=net,romfile=".to_owned(),
        ],
        None => [
            "-drive".to_owned(),
            format!("file={device},if=none,format=raw,cache=none,aio=io_uring,id=disk"),
            "-device".to_owned(),
            "virtio-blk-pci,drive=disk,iothread=io".to_owned(),
        ],
    };
    let mut child = Command::new(program)
        .args(["-L", share, "-L", "/usr/share/seabios", "-L", "/usr/share/qemu"])
        .args(["-accel", "kvm", "-machine", "q35", "-cpu", "host", "-m", "512", "-smp", "1"])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"])
        .args(["-object", "iothread,id=io,poll-max-ns=0"])
        .args(["-drive", &format!("file={tools},if=none,format=raw,readonly=on,id=tools")])
        .args(["-device", "virtio-blk-pci,drive=tools,iothread=io"])
        .args(measured)
        .args(["-kernel", kernel, "-initrd", initrd, "-append", cmdline])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut output = child.stdout.take().ok_or("piped")?;
    let (mut hearing, marks) = marks();
    let hears = std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = output.read(&mut buffer) {
            hearing.hear(&buffer[..count]);
        }
    });
    let heard = listen(&marks);
    child.kill()?;
    child.wait()?;
    hears.join().map_err(|_| "who heard QEMU panicked")?;
    heard
}

fn main() -> Done<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["vmbed", device, tools, kernel, initrd, cmdline] => vmbed(device, tools, kernel, initrd, cmdline),
        ["qemu", program, share, device, tools, kernel, initrd, cmdline] => {
            qemu([program, share, device, tools, kernel, initrd, cmdline])
        }
        _ => Err("usage: figure-guest vmbed ON TOOLS KERNEL INITRD CMDLINE | qemu QEMU SHARE ON TOOLS KERNEL INITRD CMDLINE"
            .into()),
    }
}
