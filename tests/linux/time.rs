//! A pause under load: clocks go on from where they stood, and nothing is lost.

use std::io::Read;
use std::net::TcpListener;
use std::time::Duration;

use libtest_mimic::Trial;
use vmbed::{DiskConfig, NetConfig};

use crate::assets::KERNELS;
use crate::devices::{TempFile, sha256};
use crate::guest::{Guest, config};
use crate::net::{Tap, accept, ping};
use crate::trial;

pub fn add(trials: &mut Vec<Trial>) {
    trials.push(trial("time::pause_for_5_s_under_load", pause));
}

fn pause() {
    let tap = Tap::new();
    let disk = TempFile::new(&vec![0; 32 << 20]);
    let listener = TcpListener::bind((tap.host(), 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    // Loads: the disk, a TCP stream, pings from outside, and a loop that looks for the largest gap in time.
    let script = format!(
        "{up}
        dd if=/dev/urandom of=/run/noise bs=1M count=16 2>/dev/null; echo sent=$(sha256sum </run/noise | cut -d' ' -f1)
        (nc {host} {port} </run/noise >/dev/null; echo stream=done) &
        (while [ ! -e /run/stop ]; do
            dd if=/run/noise of=/dev/vda bs=1M count=16 conv=fsync 2>/dev/null || echo disk=bad
         done; cmp -n 16777216 /run/noise /dev/vda && echo disk=done) & DISK=$!
        (last=0; worst=0
         while [ ! -e /run/stop ]; do
            read up rest </proc/uptime; now=${{up%.*}}${{up#*.}}
            gap=$((now - last)); [ $last -gt 0 ] && [ $gap -gt $worst ] && worst=$gap
            [ $gap -lt 0 ] && echo backwards=yes
            last=$now
         done; echo worst=$worst) & CLOCK=$!
        echo ready; read line; touch /run/stop; wait $DISK $CLOCK
        echo clock=$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)
        echo stalls=$(dmesg | grep -ciE 'stall|soft lockup|clocksource.*unstable')",
        up = tap.up(),
        host = tap.host()
    );
    let mut config = config(KERNELS[0], &script);
    config.cpus.count = 2;
    config.disks.push(DiskConfig::new(disk.path()));
    config.nets.push(NetConfig::tap(&tap.name));
    let guest = Guest::start(config);
    let stream = accept(&listener, &guest);
    guest.wait_for("ready");
    std::thread::scope(|scope| {
        // Eight seconds of pings, through all of the pause.
        let pings = scope.spawn(|| ping(&tap, &["-c", "80", "-i", "0.1"]));
        std::thread::sleep(Duration::from_secs(1));
        guest.vm.pause().unwrap();
        let standing = guest.console();
        std::thread::sleep(Duration::from_secs(5));
        assert_eq!(guest.console(), standing, "it says nothing while it stands");
        guest.vm.resume().unwrap();
        assert_eq!(pings.join().unwrap(), "0% packet loss", "{}", guest.console());
    });
    let received = read_all(stream);
    guest.vm.console_input(b"enough\n");
    guest.power_off();
    assert_eq!(sha256(&received), guest.value("sent"));
    assert_eq!(guest.value("disk"), "done", "{}", guest.console());
    let worst: u32 = guest.value("worst").parse().unwrap();
    assert!(worst < 400, "the clock jumped by {worst} hundredths of a second over a pause of 5 s");
    assert!(!guest.console().contains("backwards=yes"));
    assert_eq!((guest.value("clock"), guest.value("stalls")), ("kvm-clock".to_owned(), "0".to_owned()));
}

/// The stream is read only now: the guest's window was full through the pause.
fn read_all(mut stream: std::net::TcpStream) -> Vec<u8> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    all
}
