//! Stock kernels on the ports of a switch inside of this process.

use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use libtest_mimic::Trial;
use vmbed::{
    BridgeOptions, DiskConfig, DropReason, Guard, NetConfig, Network, PortOptions, PortVlan, Switch,
    SwitchOptions, SwitchPort, TapOptions, Wiring,
};

use crate::assets::{self, KERNELS};
use crate::balloon::wait_until;
use crate::devices::{TempFile, noise, sha256};
use crate::guest::{Guest, config};
use crate::net::{SWAP, TOLD, Tap, ip, longest_of, ping, swap};
use crate::trial;

pub fn add(trials: &mut Vec<Trial>) {
    trials.push(trial("switch::guests_reach_those_of_their_vlan", vlans));
    trials.push(trial("switch::from_one_network_to_another_amid_streams", moved));
}

fn start(port: &SwitchPort, script: &str) -> Guest {
    let mut config = config(KERNELS[0], script);
    config.nets.push(NetConfig::attached());
    config.nets[0].mac = Some(format!("52:54:00:00:00:{}", port.name()).parse().unwrap());
    Guest::start_with(config, |builder| builder.net_port(0, port))
}

/// Builds what sends datagrams in segments.
pub fn prepare() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/assets/udp-segments.c");
    let mut cc = Command::new("cc");
    cc.args(["-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o"]).arg(segments()).arg(source);
    assert!(cc.status().expect("cc").success(), "tests/assets/udp-segments.c");
    // A disk has whole sectors.
    let made = File::options().write(true).open(segments()).unwrap();
    made.set_len(made.metadata().unwrap().len().next_multiple_of(512)).unwrap();
}

fn segments() -> PathBuf {
    assets::directory().join("udp-segments")
}

/// Two in VLAN 10, one in VLAN 20 that has an address of theirs, and one that is not who it says it is.
fn vlans() {
    let switch = Switch::new(&SwitchOptions::default()).unwrap();
    let access = |name: &str, vlan| switch.add_port(name, &PortOptions::access(vlan)).unwrap();
    let (server, client, outsider) = (access("01", 10), access("02", 10), access("03", 20));
    let guard = Guard::new("52:54:00:00:00:04".parse().unwrap(), ["10.9.0.4".parse().unwrap()]);
    let liar = switch.add_port("04", &PortOptions::access(10).guard(guard)).unwrap();
    let file = TempFile::new(&[]);
    let capture = switch.capture(std::slice::from_ref(&client), File::create(file.path()).unwrap()).unwrap();
    let content = noise(77, 2 << 20);
    let disk = TempFile::new(&content);
    let up = |address: &str| format!("ip addr add {address}/24 dev eth0; ip link set eth0 up\n");
    // HOST_USO and GUEST_USO4 and 6, which drivers since Linux 6.2 know; and a program, for those who have a disk more.
    let program = "echo uso=$(cut -c 55-57 /sys/class/net/eth0/device/features)
        cat /dev/DISK >/run/uso; chmod 755 /run/uso\n";
    let pair = |port: &SwitchPort, script: &str, disks: &[&Path]| {
        let mut config = config(KERNELS[1], script);
        config.disks.extend(disks.iter().map(|disk| DiskConfig::new(disk).readonly()));
        config.nets.push(NetConfig::attached());
        Guest::start_with(config, |builder| builder.net_port(0, port))
    };
    let serve = up("10.9.0.1")
        + "nc -l -p 5000 </dev/vda\n"
        + &program.replace("DISK", "vdb")
        + "
        read go; /run/uso 10.9.0.2 && echo given=yes";
    let serve = pair(&server, &serve, &[disk.path(), &segments()]);
    let get = "mkfifo /run/never
        until [ -s /run/got ]; do nc 10.9.0.1 5000 <>/run/never >/run/got || sleep 0.5; done
        echo got=$(sha256sum </run/got | cut -d' ' -f1)\n";
    let take = program.replace("DISK", "vda") + "/run/uso; sleep 600";
    let fetch = pair(&client, &(up("10.9.0.2") + get + &take), &[&segments()]);
    assert_eq!(fetch.value("got"), sha256(&content));
    let taken = client.statistics().sent;
    assert_eq!([serve.value("uso"), fetch.value("uso")], ["111", "111"]);
    serve.vm.console_input(b"go\n");
    assert_eq!((fetch.value("segments").as_str(), serve.value("given").as_str()), ("40", "yes"));
    // And those of UDP: 48,000 bytes in as many frames as there were tries, and a few more.
    let after = client.statistics().sent;
    assert!((after.bytes - taken.bytes) / (after.frames - taken.frames) > 6000, "{taken:?} {after:?}");
    serve.power_off();

    let ping = "ping -c 3 -W 1 10.9.0.2 >/dev/null && echo $1=yes || echo $1=no";
    let script = |addresses: [&str; 2]| {
        let [first, second] = addresses.map(up);
        format!(
            "reached() {{\n{ping}\n}}\n{first}reached first; ip addr flush dev eth0\n{second}reached second"
        )
    };
    let guests = [
        start(&outsider, &script(["10.9.0.3", "10.9.0.9"])),
        start(&liar, &script(["10.9.0.9", "10.9.0.4"])),
    ];
    let reached = guests.map(|guest| {
        guest.power_off();
        [guest.value("first"), guest.value("second")]
    });
    fetch.vm.stop().unwrap();
    assert_eq!(reached, [["no", "no"], ["no", "yes"]], "another VLAN; another's address, and its own");
    let drops = liar.statistics();
    assert!(drops.dropped(DropReason::SpoofedArp) > 0, "{:?}", drops.drops().collect::<Vec<_>>());

    let summary = capture.finish().unwrap();
    assert!(summary.missed == 0 && summary.written > 100, "{summary:?}");
    let written = std::fs::read(file.path()).unwrap();
    assert!(written.len() > 2 << 20 && written.starts_with(&[0x0a, 0x0d, 0x0d, 0x0a]));
}

/// A bridge of the host's in one VLAN, two TAP interfaces on it, and a trunk to a switch.
struct Bridge {
    wiring: Wiring,
    name: String,
    tap: Tap,
    other: String,
    uplink: String,
}

impl Bridge {
    fn new() -> Self {
        let tap = Tap::new();
        ip(&["addr", "flush", "dev", &tap.name]);
        let wiring = Wiring::new().unwrap();
        let [name, other, uplink] = ["b", "o", "u"].map(|end| format!("{}{end}", tap.name));
        wiring.add_bridge(&name, &BridgeOptions::default().filtering()).unwrap();
        wiring.attach(&tap.name, &name).unwrap();
        for port in [&name, &tap.name] {
            wiring.set_vlans(port, &PortVlan::Access(10)).unwrap();
        }
        wiring.add_tap(&other, &TapOptions::on(&name).access(10)).unwrap();
        ip(&["addr", "add", &format!("{}/24", tap.host()), "dev", &name]);
        let bridge = Self { wiring, name, tap, other, uplink };
        bridge.plug();
        bridge
    }

    fn plug(&self) {
        self.wiring.add_tap(&self.uplink, &TapOptions::on(&self.name).trunk([10])).unwrap();
    }
}

/// Bytes both ways through an interface of the host's.
fn through(name: &str) -> u64 {
    let read =
        |way| std::fs::read_to_string(format!("/sys/class/net/{name}/statistics/{way}_bytes")).unwrap();
    ["rx", "tx"].iter().map(|way| read(way).trim().parse::<u64>().unwrap()).sum()
}

/// A guest that is moved amid its streams: to another TAP interface, to a port of the switch, whose uplink goes and comes back meanwhile, and to
/// where it was.
fn moved() {
    let bridge = Bridge::new();
    let switch = Switch::new(&SwitchOptions::default()).unwrap();
    let port = switch.add_port("guest", &PortOptions::access(10)).unwrap();
    let uplink = switch.add_tap("up", &bridge.uplink, &PortOptions::trunk([10])).unwrap();
    let mut config = config(KERNELS[0], &[&*bridge.tap.up(), SWAP, TOLD].concat());
    config.nets.push(NetConfig::tap(&bridge.tap.name));
    let guest = Guest::start(config);
    assert_eq!(guest.value("ready"), "yes");
    let host = bridge.tap.host();
    let listener = TcpListener::bind((host.as_str(), 0)).unwrap();
    let content = noise(78, 2 << 20);
    let change = |network: Network| {
        guest.vm.change_net(0, network).unwrap();
        guest.vm.announce_net(0).unwrap();
    };
    let mut carried = 0;
    swap(&guest, &listener, &host, ("first", &content), |way| match way {
        0 => change(Network::Tap(bridge.other.clone())),
        _ => {
            carried = through(&bridge.other);
            change(Network::Port(port.clone()));
        }
    });
    assert!(carried > content.len() as u64 / 2, "{carried} bytes through {}", bridge.other);

    // What the host sends comes as it is, in segments.
    let longest = longest_of(&bridge.uplink, || {
        swap(&guest, &listener, &host, ("uncut", &content), |_| {});
    });
    assert!(longest > 1518, "the host cut it before the switch");

    let gone = || uplink.statistics().dropped(DropReason::Uplink);
    swap(&guest, &listener, &host, ("again", &content), |way| match way {
        0 => {
            bridge.wiring.remove(&bridge.uplink).unwrap();
            wait_until(&guest, "the switch to miss its uplink", |guest| {
                guest.vm.announce_net(0).unwrap();
                gone() > 0
            });
            bridge.plug();
        }
        _ => change(Network::Tap(bridge.tap.name.clone())),
    });
    let before = through(&bridge.tap.name);
    assert_eq!(ping(&bridge.tap, &["-c", "3", "-i", "0.2", "-s", "1000"]), "0% packet loss");
    assert!(through(&bridge.tap.name) > before + 6000, "it is where it was");
    guest.vm.stop().unwrap();
}
