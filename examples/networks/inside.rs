//! ```text
//!    a        b         c         d
//!    │        │         │         │
//!  VLAN 10  VLAN 10   VLAN 20   VLAN 20
//!  ┌─┴────────┴─────────┴─────────┴─┐
//!  │   a Switch in this process     │
//!  └────────────────────────────────┘
//! ```

use std::fs::File;
use std::io::BufWriter;

use vmbed::{Guard, Host, NetConfig, PortOptions, Switch, SwitchOptions};

use crate::Done;
use crate::bridge::mac;
use crate::guests::{Address, Guest, table};
use crate::tools::{Directory, heard, recorded, run as tool};

pub fn run(kernel: &str, initrd: &str) -> Done<bool> {
    println!("--- the same four on a switch inside of the process, VLAN 10 (a, b) and 20 (c, d)");
    let status = std::fs::read_to_string("/proc/self/status")?;
    let capabilities =
        status.lines().find(|line| line.starts_with("CapEff")).ok_or("it has a line CapEff")?;
    println!("as user {} with {}", tool("id -u")?.trim(), capabilities.replace('\t', " "));
    let directory = Directory::new()?;
    let switch = Switch::new(&SwitchOptions::default())?;
    let host = Host::open()?;
    let (mut guests, mut ports) = (Vec::new(), Vec::new());
    let all = [("a", "10.0.0.1", 10), ("b", "10.0.0.2", 10), ("c", "10.0.0.3", 20), ("d", "10.0.0.4", 20)];
    for (name, address, vlan) in all {
        // Each with its own addresses, and nobody else's.
        let guard = Guard::new(mac(name).parse()?, [address.parse()?]);
        ports.push(switch.add_port(name, &PortOptions::access(vlan).guard(guard))?);
    }
    let arps = directory.file("arps.pcapng");
    let capture = switch.capture(&ports[2..3], BufWriter::new(File::create(&arps)?))?;
    for ((name, address, _), port) in all.into_iter().zip(&ports) {
        let mut card = NetConfig::attached();
        card.mac = Some(mac(name).parse()?);
        let guest = Guest::boot(&host, (kernel, initrd), (name, &Address::Fixed(address)), card, |b| {
            b.net_port(0, port)
        })?;
        guests.push(guest);
    }
    guests.iter_mut().try_for_each(Guest::ready)?;
    let together = |from: &str, to: &str| from.max(to) <= "b" || from.min(to) >= "c";
    let mut good = table(&guests, &[], together)?;
    guests.into_iter().try_for_each(Guest::end)?;
    capture.finish()?;
    good &= heard("c", &recorded(&arps, "arp")?, &mac("c"), &[&mac("a"), &mac("b")]);
    Ok(good)
}
