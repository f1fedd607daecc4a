//! What `make demo` runs: a stock Debian with a disk and a network card, its console as it comes, and a
//! timeline at the end. `tests/demo/run` prepares the rest.

use std::collections::HashMap;
use std::io::Write;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

#[path = "common/base64.rs"]
mod base64;

use base64::base64;
use vmbed::{Bytes, DiskConfig, Host, LinuxBoot, NetConfig, StopCause, VmConfig};

/// What the guest does once systemd is up. Its lines `key=value` are read here.
const SCRIPT: &str = r#"
echo guest=ready
echo kernel=$(uname -sr)
echo disk=$(lsblk -dno NAME,SIZE,SERIAL /dev/vda)
systemd-detect-virt
n=0; until ip -4 -o addr show scope global | grep -q inet || [ $n -gt 300 ]; do n=$((n+1)); sleep 0.1; done
echo address=$(ip -4 -o addr show scope global | tr -s ' ' | cut -d' ' -f4)
ping -c 3 -q HOST && echo ping=ok
busybox wget -q -O /fetched http://HOST/file && sync && echo 3 >/proc/sys/vm/drop_caches
echo size=$(stat -c %s /fetched)
echo sum=$(sha256sum </fetched | cut -d' ' -f1)
"#;

/// When each line of the console that we wait for came.
struct Watch {
    text: String,
    marks: Vec<(&'static str, &'static str, Option<Instant>)>,
}

impl Watch {
    /// Takes console output, shows it, and looks for what is awaited.
    fn take(&mut self, bytes: &[u8]) {
        let mut out = std::io::stdout().lock();
        let _ = out.write_all(bytes).and_then(|()| out.flush());
        self.text.push_str(&String::from_utf8_lossy(bytes).replace('\r', ""));
        for (_, text, at) in &mut self.marks {
            if at.is_none() && self.text.contains(*text) {
                *at = Some(Instant::now());
            }
        }
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kernel, initrd, disk, tap, host, sum] = &arguments[..] else {
        eprintln!("usage: demo KERNEL INITRD DISK TAP HOST-ADDRESS SHA256 (run it through make demo)");
        return ExitCode::FAILURE;
    };
    match run(kernel, initrd, disk, tap, host, sum) {
        Ok(true) => {
            println!("demo: ok");
            ExitCode::SUCCESS
        }
        Ok(false) => {
            println!("demo: FAILED");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("demo: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(kernel: &str, initrd: &str, disk: &str, tap: &str, host: &str, sum: &str) -> vmbed::Result<bool> {
    let script = SCRIPT.replace("HOST", host);
    let cmdline =
        format!("console=ttyS0 root=/dev/vda rw reboot=k panic=-1 vmbed.run={}", base64(script.as_bytes()));
    let mut config = VmConfig::linux(LinuxBoot::new(kernel).initrd(initrd).cmdline(cmdline));
    config.name = "demo".to_owned();
    config.cpus.count = 2;
    config.memory = Bytes::mib(512);
    config.disks.push(DiskConfig::new(disk));
    config.disks[0].serial = "vmbed-demo".to_owned();
    config.nets.push(NetConfig::tap(tap));

    let marks = vec![
        ("kernel's first line", "Linux version", None),
        ("init", "init: up", None),
        ("guest ready", "guest=ready", None),
    ];
    let watch = Arc::new(Mutex::new(Watch { text: String::new(), marks }));
    let seen = watch.clone();
    let begin = Instant::now();
    let take = move |bytes: &[u8]| seen.lock().unwrap_or_else(|e| e.into_inner()).take(bytes);
    let vm = Host::open()?.builder(config).console_callback(take).build()?;
    let built = Instant::now();
    vm.start()?;
    let Some(cause) = vm.wait_timeout(Duration::from_secs(400))? else {
        println!("\ndemo: the guest has not ended after 400 s");
        return Ok(false);
    };
    let off = Instant::now();

    let watch = watch.lock().unwrap_or_else(|e| e.into_inner());
    println!("\n--- timeline (seconds since the program began to build the VM) ---");
    let show = |name: &str, at: Option<Instant>| match at {
        Some(at) => println!("{:8.3}  {name}", (at - begin).as_secs_f64()),
        None => println!("       -  {name}: never seen"),
    };
    show("built", Some(built));
    show("first exit", vm.first_exit());
    watch.marks.iter().for_each(|(name, _, at)| show(name, *at));
    show("off", Some(off));

    let values: HashMap<&str, &str> =
        watch.text.lines().filter_map(|line| line.trim().split_once('=')).collect();
    let value = |key: &str| values.get(key).copied().unwrap_or("?");
    println!("cause     {cause}");
    for key in ["kernel", "disk", "address", "ping", "size"] {
        println!("{key:<9} {}", value(key));
    }
    println!("checksum  host  {sum}\n          guest {}", value("sum"));
    let complete = watch.marks.iter().all(|(_, _, at)| at.is_some()) && vm.first_exit().is_some();
    Ok(complete && cause == StopCause::GuestPoweroff && value("ping") == "ok" && value("sum") == sum)
}
