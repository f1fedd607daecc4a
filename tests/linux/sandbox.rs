//! A stock guest with everything, all of whose threads are in the sandbox: what it needs is on the lists.

use std::io::Write;
use std::net::{Shutdown, TcpListener};

use libtest_mimic::Trial;
use vmbed::{BalloonConfig, Bytes, ConsoleKind, DiskConfig, NetConfig, SandboxConfig};

use crate::assets::KERNELS;
use crate::devices::{TempFile, noise, sha256};
use crate::guest::{Guest, config};
use crate::net::{Tap, accept};
use crate::trial;

pub fn add(trials: &mut Vec<Trial>) {
    for console in [ConsoleKind::Serial, ConsoleKind::Virtio] {
        trials
            .push(trial(format!("sandbox::a_stock_guest_needs_no_more_{console:?}"), move || whole(console)));
    }
}

fn whole(console: ConsoleKind) {
    let (tap, content) = (Tap::with_queues(), noise(22, 4 << 20));
    let listener = TcpListener::bind((tap.host(), 0)).unwrap();
    let file = TempFile::new(&vec![0; content.len()]);
    // hvc0 exists once its module is in.
    let begin =
        if console == ConsoleKind::Virtio { "exec </dev/hvc0 >/dev/hvc0 2>&1; stty -echo" } else { ":" };
    let script = format!(
        "{begin}; {up}
        nc {host} {port} </dev/null >/run/got
        dd if=/run/got of=/dev/vda bs=64k conv=fsync 2>/dev/null
        echo got=$(sha256sum </run/got | cut -d' ' -f1)
        echo random=$(dd if=/dev/hwrng bs=512 count=1 2>/dev/null | wc -c)
        read word; echo typed=$word",
        up = tap.up(),
        host = tap.host(),
        port = listener.local_addr().unwrap().port(),
    );
    let mut config = config(KERNELS[0], &script);
    if let (ConsoleKind::Virtio, vmbed::Boot::Linux(boot)) = (console, &mut config.boot) {
        boot.cmdline = boot.cmdline.replace("ttyS0", "hvc0");
    }
    (config.console, config.cpus.count) = (console, 2);
    let mut card = NetConfig::tap(&tap.name);
    card.queues = 2;
    config.nets.push(card);
    let mut disk = DiskConfig::new(file.path());
    disk.queues = 2;
    config.disks.push(disk);
    config.balloon = Some(BalloonConfig::default());
    config.sandbox = Some(SandboxConfig::default());
    // Typed by somebody whom a thread in the sandbox reads: not by this one.
    let (input, mut keyboard) = std::io::pipe().unwrap();
    let guest = Guest::start_with(config, |builder| builder.console_input(&input).unwrap());
    let report = guest.vm.sandbox().unwrap();
    // Two vCPUs, the main loop, the card's second pair, two queues, the balloon.
    assert_eq!(report.threads.len(), 7, "{report:?}");
    let mut stream = accept(&listener, &guest);
    stream.write_all(&content).unwrap();
    stream.shutdown(Shutdown::Both).unwrap();
    assert_eq!(guest.value("got"), sha256(&content));
    assert_eq!(guest.value("random"), "512");
    guest.vm.set_balloon(Bytes::mib(16)).unwrap();
    for _ in 0..3 {
        guest.vm.pause().unwrap();
        guest.vm.resume().unwrap();
    }
    keyboard.write_all(b"word\n").unwrap();
    assert_eq!(guest.value("typed"), "word");
    guest.power_off();
}
