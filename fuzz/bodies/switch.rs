//! A switch of four ports whose options change, and frames of every kind from each of them: tagged, bent, with work left to do.

use arbitrary::{Result, Unstructured};
use vmbed::internals::BenchSwitch;
use vmbed::{DropReason, Guard, MacAddress, Offloads, PortOptions, PortVlan, RateLimit};

const PORTS: usize = 4;
const HEADER: usize = 12;
const ROOM: usize = 1 << 17;
const STEPS: usize = 200;
/// Reasons that need a mirror, an uplink or a station that takes nothing.
const ELSEWHERE: [DropReason; 4] =
    [DropReason::Monitor, DropReason::Removed, DropReason::QueueFull, DropReason::Uplink];

/// How deep an input went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Depth {
    /// Frames that were sent.
    pub sent: u32,
    /// Frames that came out.
    pub came: u32,
    /// Of them, those with a tag.
    pub tagged: u32,
    /// Frames that were cut into pieces or summed, since their receiver could not.
    pub finished: u32,
    /// Frames that were dropped where they came in.
    pub refused: u32,
    /// Frames that were dropped, by reason.
    pub drops: [u64; DropReason::ALL.len()],
}

impl Depth {
    /// What a campaign sums up.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut all = vec![
            ("sent", self.sent.into()),
            ("came", self.came.into()),
            ("tagged", self.tagged.into()),
            ("finished", self.finished.into()),
            ("refused", self.refused.into()),
        ];
        let here = DropReason::ALL.iter().filter(|reason| !ELSEWHERE.contains(reason));
        all.extend(here.map(|reason| (reason.name(), self.drops[*reason as usize])));
        all
    }
}

/// Runs one input. Panics where the switch misbehaves.
pub fn run(data: &[u8]) -> Depth {
    let mut u = Unstructured::new(data);
    let mut depth = Depth::default();
    let mut options = vec![
        PortOptions::access(1),
        PortOptions::access(1),
        PortOptions::access(10),
        PortOptions::trunk([1, 10, 20]),
    ];
    let mut switch = BenchSwitch::with(&options, ROOM).unwrap();
    for _ in 0..STEPS {
        if u.is_empty() || step(&mut u, &mut switch, &mut options, &mut depth).is_err() {
            break;
        }
    }
    for (reason, count) in (0..PORTS).flat_map(|port| switch.statistics(port).drops().collect::<Vec<_>>()) {
        depth.drops[reason as usize] += count;
    }
    // Whatever happened: two stations of one VLAN reach each other, and nobody else hears it.
    for port in 0..PORTS {
        let vlan = if port < 2 { 30 } else { 31 };
        let mut options = PortOptions::access(vlan);
        // What an earlier limit has used up stays so.
        options.storm = RateLimit::NONE;
        switch.set(port, &options).unwrap();
        while switch.take(port).is_some() {}
    }
    let frame = [&[0; HEADER][..], &station(1), &station(0), &[8, 0], &[7; 46]].concat();
    switch.send(0, &frame);
    assert_eq!(
        switch.take(1).map(|f| f[HEADER..].to_vec()),
        Some(frame[HEADER..].to_vec()),
        "it still forwards"
    );
    assert!((0..PORTS).all(|port| switch.take(port).is_none()));
    depth
}

fn station(port: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, port]
}

fn step(
    u: &mut Unstructured<'_>,
    switch: &mut BenchSwitch,
    options: &mut [PortOptions],
    depth: &mut Depth,
) -> Result<()> {
    let port = u.int_in_range(0..=PORTS - 1)?;
    if u.ratio(1u8, 8u8)? {
        let mut other = options[port].clone();
        change(u, &mut other)?;
        // What is refused changes nothing.
        if switch.set(port, &other).is_ok() {
            options[port] = other;
        }
        switch.set_takes(port, Offloads::from_bits_truncate(u.arbitrary()?));
        return Ok(());
    }
    let frame = frame(u, port as u8)?;
    let before = switch.statistics(port);
    switch.send(port, &frame);
    let after = switch.statistics(port);
    assert_eq!(after.received.frames, before.received.frames + 1, "each is counted");
    depth.sent += 1;
    let mut came = 0;
    for (to, rules) in options.iter().enumerate() {
        while let Some(out) = switch.take(to) {
            assert!(out.len() >= HEADER + 14 && out.len() <= HEADER + 65_557 + 4, "{}", out.len());
            assert_ne!(to, port, "never back");
            let tagged = out[HEADER + 12..HEADER + 14] == [0x81, 0];
            if matches!(rules.vlan, PortVlan::Access(_)) {
                assert!(!tagged, "a station of one VLAN sees no tag");
            }
            depth.tagged += u32::from(tagged);
            depth.finished += u32::from(frame[0] & 1 == 1 && out[0] & 1 == 0);
            came += 1;
        }
    }
    depth.came += came;
    depth.refused += u32::from(came == 0);
    Ok(())
}

fn change(u: &mut Unstructured<'_>, options: &mut PortOptions) -> Result<()> {
    let vlans = [0, 1, 10, 20, 4094, 4095];
    options.vlan = if u.arbitrary()? {
        PortVlan::Access(*u.choose(&vlans)?)
    } else {
        let native = if u.arbitrary()? { Some(*u.choose(&vlans)?) } else { None };
        PortVlan::Trunk { vlans: vec![*u.choose(&vlans)?, *u.choose(&vlans)?], native }
    };
    (options.isolated, options.unknown_unicast) = (u.ratio(1u8, 3u8)?, u.ratio(5u8, 6u8)?);
    options.guard = Guard::default();
    if u.ratio(1u8, 3u8)? {
        options.guard.macs = vec![MacAddress(station(u.int_in_range(0..=3)?))];
        options.guard.router = u.arbitrary()?;
    }
    if u.ratio(1u8, 3u8)? {
        options.guard.addresses = Some(vec!["10.0.0.1".parse().unwrap(), "fd00::/8".parse().unwrap()]);
    }
    // One frame, and then none for long.
    let once = RateLimit::NONE.ops(1, 1);
    let [rate_in, rate_out, storm] =
        [0, 1, 2].map(|bit| u.arbitrary::<u8>().is_ok_and(|n| n >> bit & 15 == 0));
    (options.rate_in, options.rate_out) =
        (if rate_in { once } else { RateLimit::NONE }, if rate_out { once } else { RateLimit::NONE });
    options.storm = if storm { once } else { PortOptions::default().storm };
    options.max_addresses = u.int_in_range(0..=4)?;
    Ok(())
}

/// A frame with its header: mostly from its own station to another, of some protocol, and of some it is left to sum or cut.
fn frame(u: &mut Unstructured<'_>, port: u8) -> Result<Vec<u8>> {
    let to = match u.int_in_range(0..=15u8)? {
        0..4 => [0xff; 6],
        4 => [1, 0x80, 0xc2, 0, 0, u.int_in_range(0..=20)?],
        _ => station(u.int_in_range(0..=4)?),
    };
    let from = if u.ratio(1u8, 8u8)? { u.arbitrary()? } else { station(port) };
    let mut bytes = [&[0; HEADER][..], &to, &from].concat();
    for _ in 0..*u.choose(&[0, 0, 0, 1, 1, 2])? {
        let tag = *u.choose(&[[0x81, 0], [0x81, 0], [0x81, 0], [0x88, 0xa8], [0x91, 0]])?;
        let vlan: u16 = *u.choose(&[0, 1, 10, 20, 4095])?;
        bytes.extend(tag);
        bytes.extend((vlan | u16::from(u.arbitrary::<u8>()? & 0xf0) << 8).to_be_bytes());
    }
    let network = bytes.len() - HEADER + 2;
    let length = *u.choose(&[0usize, 20, 60, 300, 1500, 9000, 65_000, 66_000])?;
    let kind = u.int_in_range(0..=7u8)?;
    match kind {
        // TCP or UDP over IPv4.
        0 | 1 => {
            let protocol = if kind == 0 { 6 } else { 17 };
            let total = ((20 + 20 + length).min(65_535) as u16).to_be_bytes();
            bytes.extend([
                8, 0, 0x45, 0, total[0], total[1], 0, 0, 0, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
            ]);
            bytes.extend([0, 80, 0, 90, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
        }
        // TCP over IPv6.
        2 => {
            bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            bytes.extend(((20 + length).min(65_535) as u16).to_be_bytes());
            bytes.extend([6, 64]);
            bytes.extend([0xfd; 32]);
            bytes.extend([0, 80, 0, 90, 0, 0, 0, 1, 0, 0, 0, 2, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
        }
        3 => bytes.extend(*u.choose(&[[8, 6], [8, 0], [0x86, 0xdd], [0, 40], [0x80, 0x35]])?),
        _ => named(u, &mut bytes, port, kind)?,
    }
    // What says who is where is whole as it is.
    if kind < 4 {
        bytes.resize(bytes.len() + length, 0x5a);
    }
    if u.ratio(if kind < 3 { 4u8 } else { 1 }, 12u8)? {
        let transport = network + if kind == 2 { 40 } else { 20 };
        let gso = *u.choose(&[0u8, 1, 1, 4, 5, 3, 0x81])?;
        let (headers, size, start) = (transport + 20, u.int_in_range(0..=3000u16)?, transport);
        let field: u16 = if kind == 1 { 6 } else { 16 };
        bytes[..2].copy_from_slice(&[1, gso]);
        for (at, number) in [(2, headers as u16), (4, size), (6, start as u16), (8, field)] {
            bytes[at..at + 2].copy_from_slice(&number.to_le_bytes());
        }
    }
    // Bent, or cut short.
    for _ in 0..if u.ratio(1u8, 3u8)? { u.int_in_range(0..=4)? } else { 0 } {
        let at = u.int_in_range(0..=bytes.len().min(100) - 1)?;
        bytes[at] = u.arbitrary()?;
    }
    if u.ratio(1u8, 10u8)? {
        bytes.truncate(u.int_in_range(0..=bytes.len())?);
    }
    Ok(bytes)
}

/// What says who is where: ARP, neighbour discovery, also behind other headers, and a search for an address.
fn named(u: &mut Unstructured<'_>, bytes: &mut Vec<u8>, port: u8, kind: u8) -> Result<()> {
    let link = station(if u.ratio(1u8, 4u8)? { 9 } else { port });
    match kind {
        4 => {
            bytes.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, u.int_in_range(1..=2)?]);
            bytes.extend(link);
            bytes.extend([10, 0, 0, u.int_in_range(0..=2)?]);
            bytes.extend([0; 6]);
            bytes.extend([10, 0, 0, 7]);
        }
        5 => {
            // From nobody's address to everybody's: DHCP.
            bytes.extend([8, 0, 0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255]);
            bytes.extend([0, 68, 0, 67, 0, 8, 0, 0]);
        }
        _ => {
            let mut message = vec![u.int_in_range(132..=138)?, 0, 0, 0, 0, 0, 0, 0];
            if !matches!(message[0], 133 | 138) {
                message.extend([u.int_in_range(0xfc..=0xfd)?; 16]);
            }
            message.extend([u.int_in_range(1..=2)?, u.int_in_range(0..=2)?]);
            message.extend(link);
            // Options for the next hop, or a fragment of its own.
            let (next, between): (u8, &[u8]) = match u.int_in_range(0..=3u8)? {
                0 => (0, &[58, 0, 5, 2, 0, 0, 1, 0]),
                1 => (44, &[58, 0, 0, 1, 0, 0, 0, 1]),
                _ => (58, &[]),
            };
            bytes.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, (between.len() + message.len()) as u8, next, 255]);
            bytes.extend(if u.ratio(1u8, 4u8)? { [0; 16] } else { [0xfd; 16] });
            bytes.extend([0xff; 16]);
            bytes.extend(between);
            bytes.extend(message);
        }
    }
    Ok(())
}
