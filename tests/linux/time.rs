//! A pause under load: clocks go on from where they stood, and nothing is lost.

use std::io::Read;
use std::net::TcpListener;
use std::time::{Duration, Instant};

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
    // Loads: the disk, a TCP stream, pings from outside, and a loop that looks whether time ever runs back.
    let script = format!(
        "{up}
        dd if=/dev/urandom of=/run/noise bs=1M count=4 2>/dev/null; echo sent=$(sha256sum </run/noise | cut -d' ' -f1)
        (nc {host} {port} </run/noise >/dev/null; echo stream=done) &
        (while [ ! -e /run/stop ]; do
            dd if=/run/noise of=/dev/vda bs=1M count=4 conv=fsync 2>/dev/null || echo disk=bad
         done; cmp -n 4194304 /run/noise /dev/vda && echo disk=done) & DISK=$!
        (last=0
         while [ ! -e /run/stop ]; do
            read up rest </proc/uptime; now=${{up%.*}}${{up#*.}}
            [ $now -lt $last ] && echo backwards=yes
            last=$now; turn=$((turn+1)); [ $((turn%50)) = 0 ] && sleep 0.01
         done) & CLOCK=$!
        echo ready; read line; read up rest </proc/uptime; echo up=${{up%.*}}${{up#*.}}
        touch /run/stop; wait $DISK $CLOCK
        echo clock=$(cat /sys/devices/system/clocksource/clocksource0/current_clocksource)
        echo stalls=$(dmesg | grep -ciE 'stall|soft lockup|clocksource.*unstable')",
        up = tap.up(),
        host = tap.host()
    );
    let mut config = config(KERNELS[0], &script);
    config.cpus.count = 2;
    config.disks.push(DiskConfig::new(disk.path()));
    config.nets.push(NetConfig::tap(&tap.name));
    let started = Instant::now();
    let guest = Guest::start(config);
    let stream = accept(&listener, &guest);
    guest.wait_for("ready");
    let stood = std::thread::scope(|scope| {
        // Eight seconds of pings, through all of the pause.
        let pings = scope.spawn(|| ping(&tap, &["-c", "80", "-i", "0.1"]));
        std::thread::sleep(Duration::from_secs(1));
        guest.vm.pause().unwrap();
        let paused = Instant::now();
        let standing = guest.console();
        std::thread::sleep(Duration::from_secs(5));
        assert_eq!(guest.console(), standing, "it says nothing while it stands");
        let stood = paused.elapsed();
        guest.vm.resume().unwrap();
        assert_eq!(pings.join().unwrap(), "0% packet loss", "{}", guest.console());
        stood
    });
    let received = read_all(stream);
    guest.vm.console_input(b"enough\n");
    guest.wait_for("up=");
    // However slow the host: the guest's time is never more than the host's without the pause.
    let most = (started.elapsed() - stood).as_millis() / 10;
    guest.power_off();
    assert_eq!(sha256(&received), guest.value("sent"));
    assert_eq!(guest.value("disk"), "done", "{}", guest.console());
    let up: u128 = guest.value("up").parse().unwrap();
    assert!(up <= most, "the guest has been up for {up} hundredths of a second, of {most} that it ran");
    assert!(!guest.console().contains("backwards=yes"));
    assert_eq!((guest.value("clock"), guest.value("stalls")), ("kvm-clock".to_owned(), "0".to_owned()));
}

/// The stream is read only now: the guest's window was full through the pause.
fn read_all(mut stream: std::net::TcpStream) -> Vec<u8> {
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    all
}
