//! The same four where somebody else connects them: Open vSwitch with tags, and VXLAN between two hosts.

use vmbed::{BridgeOptions, Host, NetConfig, TapOptions, Wiring};

use crate::Done;
use crate::bridge::{mac, outside};
use crate::guests::{Address, Guest, table};
use crate::tools::{Directory, Namespace, Service, run as tool};

const GUESTS: [(&str, &str, u16); 4] =
    [("a", "10.0.0.1", 10), ("b", "10.0.0.2", 10), ("c", "10.0.0.3", 20), ("d", "10.0.0.4", 20)];

fn card(name: &str) -> Done<NetConfig> {
    let mut card = NetConfig::tap(format!("vnet-{name}"));
    card.mac = Some(mac(name).parse()?);
    Ok(card)
}

fn together(from: &str, to: &str) -> bool {
    let ten = |name| ["a", "b", "ten"].contains(&name);
    ten(from) == ten(to)
}

/// Open vSwitch, with everything that it keeps in a directory of ours.
fn open_vswitch(directory: &Directory) -> Done<(Service, Service)> {
    let of = |name: &str| directory.file(name).display().to_string();
    let (socket, data) = (of("db.sock"), of("conf.db"));
    tool("modprobe openvswitch")?;
    tool(&format!("ovsdb-tool create {data} /usr/share/openvswitch/vswitch.ovsschema"))?;
    let database = format!("ovsdb-server --remote=punix:{socket} --unixctl={} {data}", of("db.ctl"));
    let database = Service::start(&database)?;
    vsctl(directory, "--retry --no-wait init")?;
    let switch = Service::start(&format!(
        "env OVS_RUNDIR={} ovs-vswitchd unix:{socket} --unixctl={}",
        directory.path().display(),
        of("switch.ctl")
    ))?;
    Ok((database, switch))
}

fn vsctl(directory: &Directory, words: &str) -> Done<String> {
    tool(&format!("ovs-vsctl --timeout=60 --db=unix:{} {words}", directory.file("db.sock").display()))
}

pub fn tags(kernel: &str, initrd: &str) -> Done<bool> {
    println!("--- Open vSwitch: ports with tag 10 (a, b) and 20 (c, d), a trunk to the host's card");
    let directory = Directory::new()?;
    let outside = outside()?;
    outside.run("ip route add 10.0.0.4 dev card.20 src 10.0.0.120")?;
    let services = open_vswitch(&directory)?;
    let wiring = Wiring::new()?;
    vsctl(&directory, "add-br ovs0 -- add-port ovs0 eth0 trunks=10,20")?;
    let (host, mut guests) = (Host::open()?, Vec::new());
    for (name, address, vlan) in GUESTS {
        wiring.add_tap(&format!("vnet-{name}"), &TapOptions::default())?;
        vsctl(&directory, &format!("add-port ovs0 vnet-{name} tag={vlan}"))?;
        let named = (name, &Address::Fixed(address));
        guests.push(Guest::boot(&host, (kernel, initrd), named, card(name)?, |builder| builder)?);
    }
    print!("{}", vsctl(&directory, "--columns=name,tag,trunks --format=table list port")?);
    guests.iter_mut().try_for_each(Guest::ready)?;
    let good = table(&guests, &[("ten", "10.0.0.110"), ("twenty", "10.0.0.120")], together)?;
    guests.into_iter().try_for_each(Guest::end)?;
    vsctl(&directory, "del-br ovs0")?;
    drop(services);
    wiring.release()?;
    Ok(good)
}

/// One of two hosts: a bridge for each tenant, and a tunnel for each that leads to the other's.
fn tunnels(own: &str, other: &str, taps: &[(&str, u16)]) -> Done<Wiring> {
    tool(&format!("ip addr add {own}/24 dev under"))?;
    tool("ip link set under up")?;
    let wiring = Wiring::new()?;
    for (name, tenant) in taps {
        let bridge = format!("br{tenant}");
        // The tunnel's header takes 50 bytes.
        let mut options = BridgeOptions::default();
        options.mtu = Some(1450);
        wiring.add_bridge(&bridge, &options)?;
        let tunnel = format!("vxlan{tenant}");
        tool(&format!(
            "ip link add {tunnel} type vxlan id {tenant} dstport 4789 local {own} remote {other} dev under"
        ))?;
        wiring.attach(&tunnel, &bridge)?;
        wiring.set_up(&tunnel, true)?;
        wiring.add_tap(&format!("vnet-{name}"), &TapOptions::on(bridge))?;
    }
    Ok(wiring)
}

pub fn vxlan(kernel: &str, initrd: &str) -> Done<bool> {
    println!("--- VXLAN between two hosts: network 10 (a here, b there), network 20 (c here, d there)");
    let there = Namespace::new()?;
    tool(&format!("ip link add under type veth peer name under netns {}", there.pid()))?;
    let host = Host::open()?;
    let here = tunnels("198.51.100.1", "198.51.100.2", &[("a", 10), ("c", 20)])?;
    let boot = |all: [usize; 2]| -> Done<Vec<Guest>> {
        let of = |i: usize| {
            let (name, address, _) = GUESTS[i];
            let mut card = card(name)?;
            card.mtu = Some(1450);
            Guest::boot(&host, (kernel, initrd), (name, &Address::Fixed(address)), card, |builder| builder)
        };
        all.into_iter().map(of).collect()
    };
    let mut guests = boot([0, 2])?;
    // A thread that lives over there makes what is to be there: interfaces, and VMs with their cards on them.
    let far = std::thread::scope(|scope| {
        let thread = scope.spawn(|| -> std::result::Result<_, String> {
            let done = || -> Done<_> {
                there.enter()?;
                let wiring = tunnels("198.51.100.2", "198.51.100.1", &[("b", 10), ("d", 20)])?;
                Ok((wiring, boot([1, 3])?))
            };
            done().map_err(|e| e.to_string())
        });
        thread.join().map_err(|_| "the other host's thread panicked".to_owned())?
    });
    let (far, others) = far?;
    guests.extend(others);
    guests.sort_by_key(|guest| guest.name);
    guests.iter_mut().try_for_each(Guest::ready)?;
    let good = table(&guests, &[], together)?;
    guests.into_iter().try_for_each(Guest::end)?;
    here.release()?;
    far.release()?;
    Ok(good)
}
