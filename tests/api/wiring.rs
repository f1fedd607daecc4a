//! Bridges and TAP interfaces of the host, in a network namespace of the test's own. tests/linux/wiring.rs has the rest, where there is a
//! kernel that knows VLANs.

use std::process::Command;

use serde_json::Value;
use vmbed::{BridgeOptions, ErrorKind, PortVlan, TapOptions, Wiring};

use crate::guest::wait_until;

pub fn the_hosts_side_of_a_network() {
    let run = std::thread::spawn(|| {
        #[expect(unsafe_code, reason = "libc's")]
        // SAFETY: an integer goes in; what changes is this thread's.
        let done = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        in_a_namespace();
        let before = links();
        a_port_that_was_there();
        paths_that_were_there();
        what_the_kernel_lacks();
        assert_eq!(links(), before);
    });
    run.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

/// Whether this thread's namespace has that interface.
fn there(name: &str) -> bool {
    let text = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    text.lines().any(|line| line.trim().split(':').next() == Some(name))
}

fn in_a_namespace() {
    let wiring = Wiring::new().unwrap();
    let mut bridge = BridgeOptions::default();
    (bridge.mac, bridge.mtu) = (Some("02:00:00:00:00:01".parse().unwrap()), Some(1400));
    wiring.add_bridge("br0", &bridge).unwrap();
    wiring.add_bridge("br1", &BridgeOptions::default()).unwrap();
    let mut on = TapOptions::on("br0");
    (on.multi_queue, on.owner, on.persistent) = (true, Some(65534), true);
    wiring.add_tap("vnet0", &on).unwrap();
    wiring.add_tap("vnet1", &TapOptions::default()).unwrap();
    wiring.attach("vnet1", "br1").unwrap();
    assert!(["br0", "br1", "vnet0", "vnet1"].into_iter().all(there));

    let refused = |done: vmbed::Result<()>, kind, word: &str| {
        let error = done.unwrap_err();
        assert!(error.kind() == kind && error.to_string().contains(word), "{error:?}");
    };
    refused(wiring.add_bridge("br0", &bridge), ErrorKind::Busy, "bridge 'br0'");
    let tap = TapOptions::on("br0");
    let mut stays = tap.clone().access(10);
    stays.persistent = true;
    refused(wiring.add_tap("vnet2", &stays), ErrorKind::InvalidState, "VLANs");
    assert!(!there("vnet2"), "what fails has changed nothing, whatever was to stay");
    refused(wiring.add_tap("vnet2", &tap.clone().access(10)), ErrorKind::InvalidState, "VLANs");
    refused(wiring.add_tap("vnet2", &tap.access(4095)), ErrorKind::InvalidArgument, "VLAN 4095");
    let vlans = PortVlan::Trunk { vlans: vec![10, 20], native: None };
    refused(wiring.set_vlans("vnet0", &vlans), ErrorKind::InvalidState, "VLANs");
    refused(wiring.add_vlan("eth7.10", "eth7", 10), ErrorKind::NotFound, "'eth7'");
    refused(wiring.attach("vnet1", "br0"), ErrorKind::InvalidState, "port of 'br1'");
    refused(wiring.remove("lo"), ErrorKind::InvalidArgument, "there before");
    assert!(!there("br2") && !there("vnet2"));

    wiring.detach("vnet1").unwrap();
    wiring.set_mtu("vnet1", 9000).unwrap();
    wiring.set_mac("vnet1", "02:00:00:00:00:02".parse().unwrap()).unwrap();
    wiring.set_mtu("lo", 2000).unwrap();
    wiring.set_up("lo", true).unwrap();
    wiring.remove("br1").unwrap();
    assert!(!there("br1"));
    wiring.release().unwrap();
    assert!(!there("br0") && there("vnet0") && !there("vnet1"));
    let wiring = Wiring::new().unwrap();
    wiring.add_bridge("br0", &BridgeOptions::default()).unwrap();
    drop(wiring);
    assert!(!there("br0"));
}

/// Runs it; whether that worked, and what it said.
fn tried(words: &str) -> Result<String, String> {
    let words: Vec<_> = words.split_whitespace().collect();
    let output = Command::new(words[0]).args(&words[1..]).output().expect("tests/setup installs iproute2");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

fn run(words: &str) -> String {
    tried(words).unwrap_or_else(|said| panic!("{words}: {said}"))
}

fn links() -> Vec<String> {
    run("ip -o link show").lines().map(|line| line.split(':').nth(1).unwrap().to_owned()).collect()
}

/// What its bridge does with a port, without timers and what the bridge finds out by itself; and where it knows addresses for good.
fn port(name: &str) -> (Value, Value, Vec<String>) {
    let link: Value = serde_json::from_str(&run(&format!("ip -d -j link show {name}"))).unwrap();
    let mut data = link[0]["linkinfo"]["info_slave_data"].clone();
    if let Value::Object(data) = &mut data {
        let own = ["id", "no", "state", "topology_change_ack", "config_pending", "root_id", "bridge_id"];
        data.retain(|key, _| {
            !own.contains(&key.as_str()) && !key.ends_with("_timer") && !key.starts_with("designated")
        });
    }
    let entries = run(&format!("bridge fdb show dev {name}"));
    let mut entries: Vec<_> =
        entries.lines().filter(|line| line.contains("master")).map(str::to_owned).collect();
    entries.sort();
    (link[0]["master"].clone(), data, entries)
}

/// A port of the host's with settings of its own is taken away, and moved, and has them again in the end.
fn a_port_that_was_there() {
    run("ip link add eth0 type veth peer name outside");
    for (bridge, address) in [("br0", "02:00:00:00:01:00"), ("br1", "02:00:00:00:01:01")] {
        run(&format!("ip link add {bridge} address {address} type bridge"));
        run(&format!("ip link set {bridge} up"));
    }
    run("ip link set eth0 up master br0");
    let plain = port("eth0");
    run(
        "ip link set eth0 type bridge_slave cost 7 priority 5 hairpin on guard on root_block on fastleave on learning off flood off \
         mcast_flood off bcast_flood off mcast_to_unicast on neigh_suppress on isolated on proxy_arp on group_fwd_mask 0x4000",
    );
    run("bridge fdb add 02:00:00:00:00:09 dev eth0 master static");
    run("bridge fdb add 02:00:00:00:00:0a dev eth0 master static sticky");
    let before = port("eth0");
    assert!(
        before.1["cost"] == 7 && before.1["isolated"] == true && before.2.len() == plain.2.len() + 2,
        "{before:?}"
    );
    let moved = || {
        let wiring = Wiring::new().unwrap();
        wiring.set_mac("eth0", "02:00:00:00:00:07".parse().unwrap()).unwrap();
        wiring.detach("eth0").unwrap();
        wiring.attach("eth0", "br1").unwrap();
        assert!(port("eth0").0 == "br1" && port("eth0").1 == plain.1);
        wiring
    };
    moved().release().unwrap();
    assert_eq!(port("eth0"), before);
    // Others put it back, as they want it there: so it stays.
    let wiring = moved();
    run("ip link set eth0 master br0");
    run("ip link set eth0 type bridge_slave cost 9");
    let theirs = port("eth0");
    wiring.release().unwrap();
    let after = port("eth0");
    assert_eq!((after.0, after.1, after.2.len()), (theirs.0, theirs.1, theirs.2.len()));
    ["eth0", "br0", "br1"].iter().for_each(|name| drop(run(&format!("ip link del {name}"))));
}

/// An interface's IPv6 addresses, and all routes through it, but what comes and goes with its addresses.
fn paths(name: &str) -> Vec<String> {
    let mut all = run(&format!("ip -o -6 addr show dev {name}"));
    for family in ["-4", "-6"] {
        all += &run(&format!("ip {family} route show table all dev {name}"));
    }
    // What passes.
    for state in [" tentative", " dead", " linkdown"] {
        all = all.replace(state, "");
    }
    let mut all: Vec<_> =
        all.lines().filter(|line| !line.contains("proto kernel ")).map(str::to_owned).collect();
    all.sort();
    all
}

/// The host's card is set down, or its packets are made too small for IPv6: its routes and addresses come back with it.
fn paths_that_were_there() {
    run("ip link add eth0 type veth peer name outside");
    run("ip link set outside up");
    run("ip link set eth0 up");
    run("ip addr add 10.7.0.1/24 dev eth0");
    run("ip addr add fd07::1/64 dev eth0");
    run("ip addr add fd07::2/128 dev eth0 preferred_lft 0");
    run("ip addr add fd07::3/64 dev eth0 nodad");
    run("ip addr change fd07::3/64 dev eth0");
    for route in [
        "10.8.0.0/16 via 10.7.0.2 metric 5 mtu 1300",
        // The kernel tells of the second of these first, whose gateway is behind the first.
        "10.6.0.0/24 dev eth0",
        "10.5.0.0/24 via 10.6.0.9",
        "10.9.0.0/16 via 10.7.0.3 src 10.7.0.1 table 100",
        "fd08::/64 via fd07::9",
        "fd09::/64 via fe80::1 dev eth0 metric 77 table 100",
        "fd0b::/64 via fd07::9 src fd07::3",
    ] {
        run(&format!("ip route add {route}"));
    }
    // Its own address is there when it has noticed its cable.
    let has = |what: &str| paths("eth0").iter().any(|line| line.contains(what));
    wait_until("a link-local address", || has("scope link"));
    let before = paths("eth0");
    assert!(before.len() >= 11, "{before:#?}");
    let down = |wiring: &Wiring| wiring.set_up("eth0", false);
    let small = |wiring: &Wiring| wiring.set_mtu("eth0", 1000);
    for change in [&down as &dyn Fn(&Wiring) -> vmbed::Result<()>, &small] {
        let wiring = Wiring::new().unwrap();
        change(&wiring).unwrap();
        assert!(!has("fd08::"));
        wiring.release().unwrap();
        assert!(has("fd08::") && has("fd07::2"));
        wait_until("its own address", || paths("eth0") == before);
    }
    // Down only to get another address; what others give it then stays.
    let wiring = Wiring::new().unwrap();
    wiring.set_up("eth0", false).unwrap();
    wiring.set_mac("eth0", "02:00:00:00:00:07".parse().unwrap()).unwrap();
    wiring.set_up("eth0", true).unwrap();
    wait_until("another link-local address", || has("fe80::ff:fe00:7/64"));
    run("ip addr add fd0a::1/64 dev eth0");
    run("ip route add 10.12.0.0/16 dev eth0");
    let theirs = |line: &String| line.contains("fd0a::1") || line.contains("10.12.0.0");
    wiring.release().unwrap();
    assert_eq!(paths("eth0").into_iter().filter(theirs).count(), 2);
    wait_until("its own address", || {
        let now = paths("eth0");
        now.iter().filter(|line| !theirs(line)).eq(&before)
    });
    // Others have set it up themselves, and give it what they want.
    let wiring = Wiring::new().unwrap();
    wiring.set_up("eth0", false).unwrap();
    run("ip link set eth0 up");
    wiring.release().unwrap();
    assert!(!has("fd07::2") && !has("10.8.0.0"), "{:?}", paths("eth0"));
    run("ip link del eth0");
}

/// What this kernel was built without, `ip` cannot have either: the error says what would help.
fn what_the_kernel_lacks() {
    run("ip link add eth0 type veth peer name outside");
    let known = |what: &str| tried(&format!("ip link add {what}")).map(|_| run("ip link del test0")).is_ok();
    let wiring = Wiring::new().unwrap();
    let as_known = |known: bool, done: vmbed::Result<()>, words: &str| match done {
        Ok(()) => assert!(known, "{words}"),
        Err(error) => {
            let said = error.to_string();
            assert!(!known && error.kind() == ErrorKind::Unsupported && said.contains(words), "{error:?}");
        }
    };
    as_known(
        known("link eth0 name test0 type vlan id 10"),
        wiring.add_vlan("eth0.10", "eth0", 10),
        "the kernel lacks it: modprobe 8021q, as root",
    );
    as_known(
        known("name test0 type bridge vlan_filtering 1"),
        wiring.add_bridge("br0", &BridgeOptions::default().filtering()),
        "built without CONFIG_BRIDGE_VLAN_FILTERING",
    );
    wiring.release().unwrap();
    run("ip link del eth0");
}
