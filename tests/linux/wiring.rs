//! The host's side of guests' networks: what `Wiring` makes, and that nothing of it is left. `ip` and `bridge` judge; then guests who ping each
//! other. In network namespaces of the tests' own.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::{Command, Stdio};

use libtest_mimic::Trial;
use serde_json::Value;
use vmbed::{BridgeOptions, ErrorKind, MacAddress, PortVlan, TapOptions, Wiring};

use crate::assets::{KERNELS, initrd, kernel};
use crate::trial;

pub fn add(trials: &mut Vec<Trial>) {
    trials.push(trial("wiring::a_trunk_and_two_vlans", || alone(trunk)));
    trials.push(trial("wiring::a_vlan_interface_below_a_bridge", || alone(vlan_interface)));
    trials.push(trial("wiring::what_others_changed_stays", || alone(others)));
    trials.push(trial("wiring::a_call_that_fails_changes_nothing", || alone(failures)));
    for network in ["bridge", "ovs", "vxlan", "switch"] {
        trials.push(trial(format!("wiring::who_reaches_whom_{network}"), move || demonstrated(network)));
    }
}

/// Builds examples/networks.
pub fn prepare() {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--quiet", "--features", "serde,internals", "--example", "networks"]);
    let status = cargo.current_dir(env!("CARGO_MANIFEST_DIR")).status().expect("cargo");
    assert!(status.success(), "building the example: {status}");
}

/// The matrix of `make demo-net`, in namespaces of its own, of whose programs none is left.
fn demonstrated(network: &str) {
    let program = std::env::current_exe().unwrap().ancestors().nth(2).unwrap().join("examples/networks");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/demo/net-inside");
    let mut command = Command::new(script);
    command.arg(program).arg(kernel(KERNELS[0])).arg(initrd(KERNELS[0])).arg(network);
    let output = command.stdin(Stdio::null()).output().expect("tests/demo/net-inside cannot be started");
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.contains("demo: ok"), "{}:\n{said}", output.status);
    assert!(said.matches("yes/yes").count() >= 4 && said.matches("no/no").count() >= 8, "{said}");
}

/// Runs it on a thread with a network namespace of its own, which ends with it.
fn alone(f: fn()) {
    let run = std::thread::spawn(move || {
        #[expect(unsafe_code, reason = "rustix's is unsafe, too")]
        // SAFETY: an integer goes in; what changes is this thread's.
        let done = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        f();
    });
    if let Err(panic) = run.join() {
        std::panic::resume_unwind(panic);
    }
}

fn run(words: &str) -> String {
    let words: Vec<_> = words.split(' ').collect();
    let output =
        Command::new(words[0]).args(&words[1..]).output().expect("iproute2 is installed by tests/setup");
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn json(words: &str) -> Value {
    serde_json::from_str(&run(words)).unwrap_or_else(|e| panic!("{words}: {e}"))
}

/// Each interface as `ip` shows it, but for what changes by itself.
fn links() -> BTreeMap<String, Value> {
    let mut links = BTreeMap::new();
    for link in json("ip -d -j link show").as_array().unwrap() {
        let mut kept = serde_json::Map::new();
        for name in ["ifindex", "mtu", "address", "master", "link", "linkinfo"] {
            kept.insert(name.into(), link[name].clone());
        }
        let up = link["flags"].as_array().unwrap().contains(&"UP".into());
        kept.insert("up".into(), up.into());
        if let Some(Value::Object(info)) = kept.get_mut("linkinfo") {
            info.retain(|name, _| name == "info_kind" || name.starts_with("info_slave_"));
            if let Some(Value::Object(port)) = info.get_mut("info_slave_data") {
                let own =
                    ["id", "no", "state", "topology_change_ack", "config_pending", "root_id", "bridge_id"];
                port.retain(|name, _| {
                    !own.contains(&name.as_str())
                        && !name.ends_with("_timer")
                        && !name.starts_with("designated")
                });
            }
        }
        links.insert(link["ifname"].as_str().unwrap().to_owned(), kept.into());
    }
    links
}

/// The VLANs of a port: `10`, `1 pvid`, `1 pvid untagged`.
fn vlans(port: &str) -> Vec<String> {
    let all = json("bridge -j vlan show");
    let port = all.as_array().unwrap().iter().find(|entry| entry["ifname"] == port);
    let mut found = Vec::new();
    for vlan in port.map_or(&[][..], |port| port["vlans"].as_array().unwrap()) {
        let first = vlan["vlan"].as_u64().unwrap();
        for id in first..=vlan["vlanEnd"].as_u64().unwrap_or(first) {
            let mut text = id.to_string();
            for flag in vlan["flags"].as_array().map_or(&[][..], Vec::as_slice) {
                text += &format!(" {}", flag.as_str().unwrap().to_lowercase());
            }
            found.push(text.replace(" egress untagged", " untagged"));
        }
    }
    found
}

/// What is there before: the host's card.
fn card() {
    run("ip link add eth0 type veth peer name outside");
    run("ip link set eth0 up");
    run("ip link set outside up");
}

fn trunk_of(vlans: &[u16], native: Option<u16>) -> PortVlan {
    PortVlan::Trunk { vlans: vlans.to_vec(), native }
}

fn trunk() {
    card();
    run("ip link set eth0 mtu 1600");
    let before = links();
    let wiring = Wiring::new().unwrap();
    let mac: MacAddress = "02:00:00:00:00:01".parse().unwrap();
    let mut options = BridgeOptions::default().filtering();
    (options.mtu, options.mac) = (Some(9000), Some(mac));
    wiring.add_bridge("br0", &options).unwrap();
    wiring.set_mtu("eth0", 9000).unwrap();
    wiring.attach("eth0", "br0").unwrap();
    wiring.attach("eth0", "br0").unwrap();
    let mut all: Vec<u16> = (100..=1100).collect();
    all.extend([10, 20]);
    wiring.set_vlans("eth0", &trunk_of(&all, Some(1))).unwrap();
    wiring.add_tap("vnet0", &TapOptions::on("br0").access(10)).unwrap();
    let mut shared = TapOptions::on("br0").trunk([20, 30]);
    (shared.multi_queue, shared.owner, shared.group) = (true, Some(65534), Some(7));
    wiring.add_tap("vnet1", &shared).unwrap();
    wiring.set_vlans("br0", &PortVlan::Access(20)).unwrap();

    let made = links();
    assert_eq!((&made["br0"]["mtu"], &made["br0"]["address"]), (&9000.into(), &"02:00:00:00:00:01".into()));
    for port in ["eth0", "vnet0", "vnet1"] {
        assert_eq!((&made[port]["master"], &made[port]["mtu"]), (&"br0".into(), &9000.into()), "{port}");
        assert_eq!(made[port]["up"], true, "{port}");
    }
    let mut wanted = vec!["1 pvid untagged".to_owned(), "10".to_owned(), "20".to_owned()];
    wanted.extend((100..=1100).map(|id| id.to_string()));
    assert_eq!(vlans("eth0"), wanted);
    assert_eq!(
        (vlans("vnet0"), vlans("vnet1")),
        (vec!["10 pvid untagged".into()], vec!["20".into(), "30".into()])
    );
    assert_eq!(vlans("br0"), ["20 pvid untagged"]);
    let tap = json("ip -d -j link show vnet1")[0]["linkinfo"]["info_data"].clone();
    assert_eq!((&tap["multi_queue"], &tap["persist"]), (&true.into(), &true.into()), "{tap}");
    assert!(tap["user"] == "nobody" || tap["user"] == 65534, "{tap}");

    // From one VLAN to another, and none at all.
    wiring.set_vlans("vnet0", &trunk_of(&[10], Some(20))).unwrap();
    assert_eq!(vlans("vnet0"), ["10", "20 pvid untagged"]);
    wiring.remove("vnet1").unwrap();
    wiring.set_up("br0", false).unwrap();
    wiring.detach("eth0").unwrap();
    wiring.attach("eth0", "br0").unwrap();
    wiring.release().unwrap();
    assert_eq!(links(), before);
}

fn vlan_interface() {
    card();
    let before = links();
    let wiring = Wiring::new().unwrap();
    wiring.add_vlan("eth0.10", "eth0", 10).unwrap();
    wiring.add_bridge("brvlan10", &BridgeOptions::default()).unwrap();
    wiring.attach("eth0.10", "brvlan10").unwrap();
    let mut kept = TapOptions::on("brvlan10");
    kept.persistent = true;
    wiring.add_tap("vnet0", &kept).unwrap();
    let made = links();
    assert_eq!((&made["eth0.10"]["link"], &made["eth0.10"]["master"]), (&"eth0".into(), &"brvlan10".into()));
    let vlan = json("ip -d -j link show eth0.10")[0]["linkinfo"]["info_data"]["id"].clone();
    assert_eq!(vlan, 10);
    drop(wiring);
    let mut after = links();
    assert!(after.remove("vnet0").is_some_and(|tap| tap["master"].is_null()));
    assert_eq!(after, before);
}

/// A bridge of the host's, with our changes to it, and other people's since.
fn others() {
    card();
    run("ip link add br0 address 02:00:00:00:01:00 type bridge vlan_filtering 1");
    run("ip link add br1 address 02:00:00:00:01:01 type bridge");
    run("ip link set eth0 master br0");
    run("bridge vlan add dev eth0 vid 7");
    run("ip link set eth0 type bridge_slave cost 7 isolated on flood off");
    run("bridge fdb add 02:00:00:00:00:09 dev eth0 master static vlan 7");
    let table = || {
        run("bridge fdb show dev eth0")
            .lines()
            .filter(|line| line.contains("master"))
            .map(str::to_owned)
            .collect::<BTreeSet<_>>()
    };
    let before = (links(), vlans("eth0"), table());
    let changed = || {
        let wiring = Wiring::new().unwrap();
        wiring.set_mtu("eth0", 1400).unwrap();
        wiring.set_mac("eth0", "02:00:00:00:00:07".parse().unwrap()).unwrap();
        wiring.set_vlans("eth0", &PortVlan::Access(10)).unwrap();
        wiring.set_up("br0", true).unwrap();
        wiring.detach("eth0").unwrap();
        wiring.attach("eth0", "br1").unwrap();
        wiring.add_tap("vnet0", &TapOptions::on("br0").access(10)).unwrap();
        wiring
    };
    changed().release().unwrap();
    assert_eq!((links(), vlans("eth0"), table()), before);
    // They move it, and give it another size: so it stays.
    let wiring = changed();
    run("ip link set eth0 master br0");
    run("ip link set eth0 mtu 1300");
    wiring.release().unwrap();
    let after = links();
    assert_eq!((&after["eth0"]["master"], &after["eth0"]["mtu"]), (&"br0".into(), &1300.into()));
    assert_eq!(after["eth0"]["address"], before.0["eth0"]["address"]);
    // They delete all of it, and make an interface of the same name.
    let wiring = changed();
    for name in ["vnet0", "eth0", "br0"] {
        run(&format!("ip link del {name}"));
    }
    run("ip link add vnet0 type veth peer name vnet1");
    let before = links();
    wiring.release().unwrap();
    assert_eq!(links()["vnet0"], before["vnet0"]);
    assert_eq!(links().len(), before.len());
}

fn failures() {
    card();
    run("ip link add br0 address 02:00:00:00:01:00 type bridge");
    run("ip link add br1 address 02:00:00:00:01:01 type bridge");
    run("ip link set eth0 master br1");
    let before = links();
    let wiring = Wiring::new().unwrap();
    let refused = |result: vmbed::Result<()>, kind, words: &[&str]| {
        let error = result.unwrap_err();
        let said = error.to_string();
        assert!(
            error.kind() == kind && words.iter().all(|word| said.contains(word)),
            "{kind:?}, {words:?}: {error:?}"
        );
        assert_eq!(links(), before, "{said}");
    };
    let plain = BridgeOptions::default();
    refused(wiring.add_bridge("br0", &plain), ErrorKind::Busy, &["bridge 'br0'", "already"]);
    refused(wiring.add_bridge("a name that is long", &plain), ErrorKind::InvalidArgument, &["1 to 15"]);
    let mut strange = plain.clone();
    strange.mac = Some("03:00:00:00:00:01".parse().unwrap());
    refused(wiring.add_bridge("br2", &strange), ErrorKind::InvalidArgument, &["the address 03:00"]);
    strange = plain.filtering();
    strange.mtu = Some(70_000);
    refused(wiring.add_bridge("br2", &strange), ErrorKind::InvalidArgument, &["an MTU of 70000"]);
    refused(wiring.add_tap("vnet0", &TapOptions::on("br7")), ErrorKind::NotFound, &["tap 'vnet0'", "'br7'"]);
    refused(
        wiring.add_tap("vnet0", &TapOptions::on("eth0")),
        ErrorKind::InvalidArgument,
        &["'eth0' is no bridge"],
    );
    let access = TapOptions::on("br0").access(10);
    refused(wiring.add_tap("vnet0", &access), ErrorKind::InvalidState, &["filtering"]);
    refused(
        wiring.add_tap("vnet0", &access.access(4095)),
        ErrorKind::InvalidArgument,
        &["VLAN 4095", "4094"],
    );
    refused(wiring.add_tap("eth0", &TapOptions::default()), ErrorKind::Busy, &["already"]);
    refused(wiring.add_vlan("eth0.0", "eth0", 0), ErrorKind::InvalidArgument, &["1 to 4094"]);
    refused(wiring.add_vlan("eth7.1", "eth7", 1), ErrorKind::NotFound, &["'eth7'"]);
    refused(wiring.attach("eth0", "br0"), ErrorKind::InvalidState, &["port of 'br1'", "detach"]);
    refused(wiring.attach("br0", "br0"), ErrorKind::InvalidArgument, &["interface 'br0'", "on the bridge"]);
    refused(wiring.attach("nothing", "br0"), ErrorKind::NotFound, &["'nothing'"]);
    refused(wiring.set_vlans("outside", &PortVlan::Access(7)), ErrorKind::InvalidState, &["on no bridge"]);
    refused(wiring.remove("br0"), ErrorKind::InvalidArgument, &["there before"]);
    refused(wiring.set_mtu("eth0", 1), ErrorKind::InvalidArgument, &["an MTU of 1"]);
    // Somebody without rights: this thread, from here on.
    let nobody: libc::c_long = 65534;
    #[expect(unsafe_code, reason = "libc's functions change the whole process")]
    // SAFETY: integers go in; what changes is this thread's.
    let done = unsafe { libc::syscall(libc::SYS_setresuid, nobody, nobody, nobody) };
    assert_eq!(done, 0);
    refused(
        wiring.add_bridge("br2", &BridgeOptions::default()),
        ErrorKind::PermissionDenied,
        &["CAP_NET_ADMIN"],
    );
    refused(wiring.add_tap("vnet0", &TapOptions::default()), ErrorKind::PermissionDenied, &["CAP_NET_ADMIN"]);
    refused(wiring.set_up("eth0", false), ErrorKind::PermissionDenied, &["CAP_NET_ADMIN"]);
    wiring.release().unwrap();
}
