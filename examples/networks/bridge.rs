//! ```text
//!    a        b         c              d
//!    │        │         │              │
//!  vnet-a   vnet-b    vnet-c         vnet-d
//!  VLAN 10  VLAN 10   VLAN 20          │
//!  ┌─┴────────┴─────────┴───┐    ┌─────┴─────┐
//!  │         br0            ├────┤  virbr0   │  192.168.122.1, dnsmasq
//!  └──────────┬─────────────┘NAT └───────────┘
//!           eth0: VLANs 10 and 20 with tags, and the host's own traffic without
//!             │
//!  card of another machine: ten (VLAN 10), twenty (VLAN 20), world
//! ```

use vmbed::{BridgeOptions, Host, NetConfig, PortVlan, TapOptions, Wiring};

use crate::Done;
use crate::guests::{Address, Guest, table};
use crate::tools::{Directory, Namespace, Service, heard, recorded, run as tool};

/// Guests have the locally administered addresses 02:00:00:00:00:0a and so on.
pub fn mac(name: &str) -> String {
    format!("02:00:00:00:00:0{name}")
}

/// The other machine: the same network in two VLANs, and the world.
pub fn outside() -> Done<Namespace> {
    let space = Namespace::new()?;
    tool(&format!("ip link add eth0 type veth peer name card netns {}", space.pid()))?;
    tool("ip link set eth0 up")?;
    for line in [
        "ip link set lo up",
        "ip link set card up",
        "ip addr add 203.0.113.1/24 dev card",
        "ip link add link card name card.10 type vlan id 10",
        "ip link add link card name card.20 type vlan id 20",
        // An address is answered for where it is, and nowhere else.
        "sysctl -q -w net.ipv4.conf.all.arp_ignore=1",
        "ip link set card.10 up",
        "ip link set card.20 up",
        "ip addr add 10.0.0.110/24 dev card.10",
        // The same network twice: whom is to be found where.
        "ip addr add 10.0.0.120/24 dev card.20",
        "ip route add 10.0.0.3 dev card.20 src 10.0.0.120",
    ] {
        space.run(line)?;
    }
    Ok(space)
}

/// The host's network; undone when what is returned is dropped.
fn wire() -> Done<Wiring> {
    let wiring = Wiring::new()?;
    wiring.add_bridge("br0", &BridgeOptions::default().filtering())?;
    wiring.attach("eth0", "br0")?;
    wiring.set_vlans("eth0", &PortVlan::Trunk { vlans: vec![10, 20], native: Some(1) })?;
    wiring.add_tap("vnet-a", &TapOptions::on("br0").access(10))?;
    wiring.add_tap("vnet-b", &TapOptions::on("br0").access(10))?;
    wiring.add_tap("vnet-c", &TapOptions::on("br0").access(20))?;
    wiring.add_bridge("virbr0", &BridgeOptions::default())?;
    wiring.add_tap("vnet-d", &TapOptions::on("virbr0"))?;
    Ok(wiring)
}

/// Addresses, and those who give them: no business of vmbed's.
fn serve(directory: &Directory) -> Done<Service> {
    let rules = directory.file("rules");
    std::fs::write(
        &rules,
        "table ip vmbed {\n\tchain leaving {\n\t\ttype nat hook postrouting priority 100;\n\t\t\
         ip saddr 192.168.122.0/24 oifname \"br0\" masquerade\n\t}\n}\n",
    )?;
    for line in [
        "ip addr add 203.0.113.2/24 dev br0",
        "ip addr add 192.168.122.1/24 dev virbr0",
        "sysctl -q -w net.ipv4.ip_forward=1",
        &format!("nft -f {}", rules.display()),
    ] {
        tool(line)?;
    }
    Service::start(&format!(
        "dnsmasq --keep-in-foreground --conf-file=/dev/null --port=0 --interface=virbr0 --bind-interfaces --leasefile-ro \
         --dhcp-range=192.168.122.10,192.168.122.99,1h --pid-file= --user=root --log-facility={}",
        directory.file("dnsmasq.log").display()
    ))
}

fn expected(from: &str, to: &str) -> bool {
    let ten = ["a", "b", "ten"];
    let twenty = ["c", "twenty"];
    let together = |group: &[&str]| group.contains(&from) && group.contains(&to);
    together(&ten) || together(&twenty) || (from, to) == ("d", "world")
}

pub fn run(kernel: &str, initrd: &str) -> Done<bool> {
    println!("--- br0 with a trunk, VLAN 10 (a, b) and 20 (c); d behind NAT on virbr0");
    let directory = Directory::new()?;
    let outside = outside()?;
    let wiring = wire()?;
    let dnsmasq = serve(&directory)?;
    let (arps, echoes) = (directory.file("arps"), directory.file("echoes"));
    let captures = [
        Service::start(&format!("tcpdump -Z root -U -i vnet-c -w {} arp", arps.display()))?,
        outside.start(&format!("tcpdump -Z root -U -i card -w {} icmp", echoes.display()))?,
    ];
    print!("{}", tool("bridge vlan show")?);

    let host = Host::open()?;
    let mut guests = Vec::new();
    for (name, address) in [
        ("a", Address::Fixed("10.0.0.1")),
        ("b", Address::Fixed("10.0.0.2")),
        ("c", Address::Fixed("10.0.0.3")),
        ("d", Address::Dhcp),
    ] {
        let mut card = NetConfig::tap(format!("vnet-{name}"));
        card.mac = Some(mac(name).parse()?);
        guests.push(Guest::boot(&host, (kernel, initrd), (name, &address), card, |builder| builder)?);
    }
    guests.iter_mut().try_for_each(Guest::ready)?;
    let leased = guests[3].address.clone();
    println!("d has {leased} from dnsmasq");
    let others = [("ten", "10.0.0.110"), ("twenty", "10.0.0.120"), ("world", "203.0.113.1")];
    let mut good = table(&guests, &others, expected)? & leased.starts_with("192.168.122.");
    guests.into_iter().try_for_each(Guest::end)?;
    drop(captures);
    good &= heard("c", &recorded(&arps, "arp")?, &mac("c"), &[&mac("a"), &mac("b"), &mac("d")]);
    let asked = recorded(&echoes, "icmp[icmptype] == icmp-echo")?;
    let disguised = asked.iter().all(|line| line.contains(" 203.0.113.2 > 203.0.113.1:"));
    println!(
        "the world was asked {} times, {}",
        asked.len(),
        if disguised { "by the host alone" } else { "not only by the host" }
    );
    good &= disguised && !asked.is_empty();
    drop(dnsmasq);
    wiring.release()?;
    let left = tool("ip -o link show")?;
    let left: Vec<_> = left.lines().filter_map(|line| line.split_whitespace().nth(1)).collect();
    println!("left when all is undone: {}", left.join(" "));
    good &= left.iter().all(|name| name.starts_with("lo") || name.starts_with("eth0"));
    Ok(good)
}
