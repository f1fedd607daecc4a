//! Stock kernels on the ports of a switch inside of this process.

use libtest_mimic::Trial;
use vmbed::{DropReason, Guard, NetConfig, PortOptions, Switch, SwitchOptions, SwitchPort};

use crate::assets::KERNELS;
use crate::devices::{TempFile, noise, sha256};
use crate::guest::{Guest, config};
use crate::trial;

pub fn add(trials: &mut Vec<Trial>) {
    trials.push(trial("switch::guests_reach_those_of_their_vlan", vlans));
}

fn start(port: &SwitchPort, script: &str) -> Guest {
    let mut config = config(KERNELS[0], script);
    config.nets.push(NetConfig::attached());
    config.nets[0].mac = Some(format!("52:54:00:00:00:{}", port.name()).parse().unwrap());
    Guest::start_with(config, |builder| builder.net_port(0, port))
}

/// Two in VLAN 10, one in VLAN 20 that has an address of theirs, and one that is not who it says it is.
fn vlans() {
    let switch = Switch::new(&SwitchOptions::default()).unwrap();
    let access = |name: &str, vlan| switch.add_port(name, &PortOptions::access(vlan)).unwrap();
    let (server, client, outsider) = (access("01", 10), access("02", 10), access("03", 20));
    let guard = Guard::new("52:54:00:00:00:04".parse().unwrap(), ["10.9.0.4".parse().unwrap()]);
    let liar = switch.add_port("04", &PortOptions::access(10).guard(guard)).unwrap();
    let file = TempFile::new(&[]);
    let capture =
        switch.capture(std::slice::from_ref(&client), std::fs::File::create(file.path()).unwrap()).unwrap();
    let content = noise(77, 2 << 20);
    let disk = TempFile::new(&content);
    let up = |address: &str| format!("ip addr add {address}/24 dev eth0; ip link set eth0 up\n");
    let serve = {
        let script = up("10.9.0.1") + "nc -l -p 5000 </dev/vda";
        let mut config = config(KERNELS[0], &script);
        config.disks.push(vmbed::DiskConfig::new(disk.path()).readonly());
        config.nets.push(NetConfig::attached());
        Guest::start_with(config, |builder| builder.net_port(0, &server))
    };
    let get = "mkfifo /run/never
        until [ -s /run/got ]; do nc 10.9.0.1 5000 <>/run/never >/run/got || sleep 0.5; done
        echo got=$(sha256sum </run/got | cut -d' ' -f1)";
    let ping = "ping -c 3 -W 1 10.9.0.2 >/dev/null && echo reached=yes || echo reached=no";
    let fetch = start(&client, &(up("10.9.0.2") + get));
    fetch.power_off();
    serve.power_off();
    assert_eq!(fetch.value("got"), sha256(&content));
    // A port has one card at a time.
    drop(fetch);

    let target = start(&client, &(up("10.9.0.2") + "echo up=yes; sleep 600"));
    target.wait_for("up=yes");
    let reaches = |port: &SwitchPort, address: &str| {
        let guest = start(port, &(up(address) + ping));
        guest.power_off();
        guest.value("reached")
    };
    let reached = [reaches(&outsider, "10.9.0.3"), reaches(&liar, "10.9.0.9"), reaches(&liar, "10.9.0.4")];
    target.vm.stop().unwrap();
    assert_eq!(reached, ["no", "no", "yes"], "another VLAN; another's address; its own");
    let drops = liar.statistics();
    assert!(drops.dropped(DropReason::SpoofedArp) > 0, "{:?}", drops.drops().collect::<Vec<_>>());

    let summary = capture.finish().unwrap();
    assert!(summary.missed == 0 && summary.written > 1000, "{summary:?}");
    let written = std::fs::read(file.path()).unwrap();
    assert!(written.len() > 2 << 20 && written.starts_with(&[0x0a, 0x0d, 0x0d, 0x0a]));
}
