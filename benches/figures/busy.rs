//! Debian's kernel on 4 vCPUs, all of them spinning, with writes to a disk and a stream of pings to the host:
//! prints the process's `Private_Dirty` outside of the guest's memory, and how long `stop` took.
//! `figure-busy KERNEL INITRD DISK TAP HOST-ADDRESS GUEST-ADDRESS`

use std::error::Error;
use std::time::{Duration, Instant, SystemTime};

use vmbed::{Bytes, DiskConfig, Host, LinuxBoot, NetConfig, StopCause, Vm, VmConfig};

mod smaps;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kernel, initrd, disk, tap, host, guest] = &arguments[..] else {
        return Err("usage: figure-busy KERNEL INITRD DISK TAP HOST-ADDRESS GUEST-ADDRESS".into());
    };
    let script = format!(
        "ip addr add {guest}/24 dev eth0; ip link set eth0 up
        while :; do dd if=/dev/zero of=/dev/vda bs=1M count=8 conv=fsync; done >/dev/null 2>&1 &
        while :; do ping -A -q -s 1400 {host}; sleep 1; done >/dev/null 2>&1 &
        for i in 1 2 3 4; do while :; do :; done & done
        echo figure: busy
        wait"
    );
    let cmdline =
        format!("console=ttyS0 reboot=k panic=-1 quiet loglevel=4 vmbed.run={}", base64(script.as_bytes()));
    let mut config = VmConfig::linux(LinuxBoot::new(kernel).initrd(initrd).cmdline(cmdline));
    config.cpus.count = 4;
    config.memory = Bytes::mib(256);
    config.disks.push(DiskConfig::new(disk));
    config.nets.push(NetConfig::tap(tap));
    let vm = Host::open()?.build(config)?;
    vm.start()?;
    wait_for(&vm, "the guest's script to begin", || {
        String::from_utf8_lossy(&vm.console_tail()).contains("figure: busy")
    })?;
    // Both under load: three times something new.
    for _ in 0..3 {
        let (frames, written) = (frames(tap)?, written(disk)?);
        wait_for(&vm, "frames from the guest", || self::frames(tap).is_ok_and(|f| f > frames + 10))?;
        wait_for(&vm, "writes to the disk", || self::written(disk).is_ok_and(|w| w > written))?;
    }
    let dirty = smaps::private_dirty()?;
    let begin = Instant::now();
    let cause = vm.stop()?;
    let took = begin.elapsed();
    if cause != StopCause::HostStop {
        return Err(format!("the guest ended by itself: {cause}").into());
    }
    println!("private-dirty {dirty} stop-us {}", took.as_micros());
    Ok(())
}

fn wait_for(vm: &Vm, what: &str, done: impl Fn() -> bool) -> Result<(), Box<dyn Error>> {
    let end = Instant::now() + Duration::from_secs(120);
    while !done() {
        let ended = vm.wait_timeout(Duration::from_millis(50))?;
        if ended.is_some() || Instant::now() > end {
            let console = String::from_utf8_lossy(&vm.console_tail()).into_owned();
            return Err(format!("waited for {what} (the guest's end: {ended:?}):\n{console}").into());
        }
    }
    Ok(())
}

/// How many frames the interface has got from the guest.
fn frames(tap: &str) -> Result<u64, Box<dyn Error>> {
    let table = std::fs::read_to_string("/proc/self/net/dev")?;
    let line = table.lines().find_map(|l| l.trim_start().strip_prefix(tap)?.strip_prefix(':'));
    let count = line.and_then(|l| l.split_ascii_whitespace().nth(1)).ok_or("no such interface")?;
    Ok(count.parse()?)
}

/// When the disk's file was last written to.
fn written(disk: &str) -> std::io::Result<SystemTime> {
    std::fs::metadata(disk)?.modified()
}

/// RFC 4648, for the kernel's command line.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let word = chunk.iter().fold(0u32, |w, b| w << 8 | u32::from(*b)) << (8 * (3 - chunk.len()));
        for i in 0..4 {
            let digit = DIGITS[(word >> (18 - 6 * i) & 63) as usize] as char;
            out.push(if i <= chunk.len() { digit } else { '=' });
        }
    }
    out
}
