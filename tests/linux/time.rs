//! A pause under load: clocks go on from where they stood, and nothing is lost.

use std::io::Read;
use std::net::{TcpListener, UdpSocket};
use std::time::Duration;

use libtest_mimic::Trial;
use vmbed::{DiskConfig, NetConfig};

use crate::assets::KERNELS;
use crate::devices::{TempFile, sha256};
use crate::guest::{Guest, config};
use crate::net::{Tap, accept};
use crate::trial;

pub fn add(trials: &mut Vec<Trial>) {
    trials.push(trial("time::pause_for_5_s_under_load", pause));
}

fn pause() {
    let tap = Tap::new();
    let disk = TempFile::new(&vec![0; 32 << 20]);
    let listener = TcpListener::bind((tap.host(), 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    // Three loads at once: the disk, a TCP stream, and a loop that looks for the largest gap in time.
    let script = format!(
        "{up}
        nc -u -l -p 9 >/run/udp & UDP=$!
        (dd if=/dev/urandom of=/run/noise bs=1M count=16; echo sent=$(sha256sum </run/noise | cut -d' ' -f1)) 2>/dev/null
        (nc {host} {port} </run/noise; echo stream=done) &
        (i=0; while [ $i -lt 30 ]; do dd if=/run/noise of=/dev/vda bs=1M count=16 conv=fsync 2>/dev/null || echo disk=bad; i=$((i+1)); done; echo disk=done) &
        (last=0; worst=0; echo loads=running
         while [ ! -e /run/stop ]; do
            read up rest </proc/uptime; now=${{up%.*}}${{up#*.}}
            gap=$((now - last)); [ $last -gt 0 ] && [ $gap -gt $worst ] && worst=$gap; [ $gap -lt 0 ] && echo backwards=yes
            last=$now
         done; echo worst=$worst; echo over=yes) &
        while ! ps | grep -q '[n]c -u'; do sleep 0.1; done
        echo ready
        wait_for=0; while [ $(wc -c </run/udp) -lt 6400 ] && [ $wait_for -lt 300 ]; do sleep 0.1; wait_for=$((wait_for+1)); done
        echo frames=$(($(wc -c </run/udp) / 64))
        touch /run/stop; kill $UDP
        while [ ! -e /run/over ]; do sleep 0.2; [ $(jobs | grep -c Running) -eq 0 ] && touch /run/over; done
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
    let mut stream = accept(&listener, &guest);
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).map(|_| all)
    });
    guest.wait_for("ready");
    guest.vm.pause().unwrap();
    // Frames that come while it stands wait for it.
    let socket = UdpSocket::bind((tap.host(), 0)).unwrap();
    for i in 0..100u8 {
        socket.send_to(&[i; 64], (tap.guest(), 9)).unwrap();
    }
    std::thread::sleep(Duration::from_secs(5));
    let standing = guest.console();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(guest.console(), standing, "it says nothing while it stands");
    guest.vm.resume().unwrap();
    guest.power_off();
    let received = reader.join().unwrap().unwrap();
    assert_eq!(sha256(&received), guest.value("sent"));
    assert_eq!(guest.value("frames"), "100", "no frame is lost\n{}", guest.console());
    assert_eq!(guest.value("disk"), "done");
    let worst: u32 = guest.value("worst").parse().unwrap();
    assert!(worst < 300, "the clock jumped by {worst} hundredths of a second over a pause of 5 s");
    assert!(!guest.console().contains("backwards=yes"));
    assert_eq!((guest.value("clock"), guest.value("stalls")), ("kvm-clock".to_owned(), "0".to_owned()));
}
