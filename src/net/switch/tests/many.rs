#![forbid(unsafe_code)]
//! Many threads, each of which has a port and sends and receives as fast as it can.

use super::*;

/// The next frame that waits there, with its header; how long it is.
fn take(plug: &mut Plug, room: &mut [u8]) -> Option<usize> {
    let mut pieces = Pieces::default();
    let mut list = pieces.list();
    list.push_room(room);
    plug.receive(&list).ok()
}

fn send(plug: &mut Plug, frame: &[u8]) {
    let mut pieces = Pieces::default();
    let mut list = pieces.list();
    list.push_bytes(&[0; 12]);
    list.push_bytes(frame);
    plug.send(&list).unwrap();
}

/// Says that a thread has ended, also when it panics: the others wait for it.
struct Ended<'a>(&'a AtomicU64);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

#[test]
fn nothing_is_lost_uncounted_between_eight_threads() {
    let switch = Switch::new(&SwitchOptions::default()).unwrap();
    let mut options = PortOptions::access(1);
    options.storm = RateLimit::NONE;
    let ports: Vec<_> = (0..8).map(|i| switch.add_port(format!("{i}"), &options).unwrap()).collect();
    const COUNT: u64 = 5000;
    let done = &AtomicU64::new(0);
    let received: u64 = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8u8)
            .map(|i| {
                let port = &ports[usize::from(i)];
                scope.spawn(move || {
                    let ended = Ended(done);
                    let (mut plug, mut got, mut room) = (port.plug().unwrap(), 0, vec![0; 70_000]);
                    let mut drain = |plug: &mut Plug| {
                        while let Some(len) = take(plug, &mut room) {
                            got += 1;
                            assert!(room[12 + 14..len].iter().all(|b| *b == room[26]), "of one frame");
                        }
                    };
                    for n in 0..COUNT {
                        let to = if n % 50 == 0 { ALL } else { mac(i.wrapping_add(n as u8) % 8) };
                        send(&mut plug, &frame(to, mac(i), &[i; 46]));
                        drain(&mut plug);
                    }
                    drop(ended);
                    while done.load(Ordering::SeqCst) < 8 {
                        std::thread::yield_now();
                    }
                    drain(&mut plug);
                    got
                })
            })
            .collect();
        // Somebody changes ports and options all the while.
        while done.load(Ordering::SeqCst) < 8 {
            let extra = switch.add_port("extra", &options).unwrap();
            ports[3].set_options(&options).unwrap();
            extra.remove();
        }
        threads.into_iter().map(|t| t.join().unwrap()).sum()
    });
    let all: Vec<_> = ports.iter().map(SwitchPort::statistics).collect();
    assert_eq!(all.iter().map(|s| s.received.frames).sum::<u64>(), 8 * COUNT);
    assert_eq!(all.iter().map(|s| s.sent.frames).sum::<u64>(), received);
}

/// Each of four VLANs has fifteen ports of its own, and four trunks carry all of them.
const PORTS: u8 = 64;
const TRUNKS: u8 = 60;
const VLANS: u8 = 4;
const FRAMES: usize = 1000;
/// Ports that are given options all the while, and so are never known for long.
const CHANGED: [u8; 2] = [3, 63];

/// What one of the stations has seen.
#[derive(Default)]
struct Seen {
    frames: u64,
    /// Copies of its own frames that have to go out of other ports.
    copies: u64,
}

/// The ports that are in that VLAN.
fn members(vlan: u8) -> Vec<u8> {
    (0..PORTS).filter(|port| *port >= TRUNKS || port % VLANS == vlan).collect()
}

/// A frame of the station's in that VLAN, which says so in its payload.
fn from_station(port: u8, vlan: u8, to: [u8; 6]) -> Vec<u8> {
    let tag = [(VLAN, u16::from(10 + vlan))];
    let tags = if port < TRUNKS { &tag[..0] } else { &tag };
    tagged(to, mac(port), tags, &[vlan; 46])
}

/// Takes all that waits, and looks at the VLAN that it says it is of.
fn look(port: u8, plug: &mut Plug, room: &mut [u8]) -> u64 {
    let mut frames = 0;
    while let Some(length) = take(plug, room) {
        let (frame, trunk) = (&room[12..length], port >= TRUNKS);
        let vlan = frame[length - 12 - 1];
        assert_eq!(frame.len(), 14 + 46 + if trunk { 4 } else { 0 });
        assert!(frame[frame.len() - 46..].iter().all(|byte| *byte == vlan), "of one frame");
        if trunk {
            assert_eq!(frame[12..16], [0x81, 0, 0, 10 + vlan], "{port}");
        } else {
            assert_eq!(vlan, port % VLANS, "{port}: of another VLAN");
        }
        assert_ne!(frame[11], port, "its own");
        frames += 1;
    }
    frames
}

/// One station's frames: every fiftieth to all of its VLAN, as many to somebody who is unknown, the others to one after the other.
fn talk(port: u8, plug: &mut Plug, room: &mut [u8]) -> Seen {
    let mut seen = Seen::default();
    for n in 0..FRAMES {
        let vlan = if port < TRUNKS { port % VLANS } else { n as u8 % VLANS };
        let others: Vec<u8> = members(vlan).into_iter().filter(|other| *other != port).collect();
        let known: Vec<u8> = others.iter().copied().filter(|other| !CHANGED.contains(other)).collect();
        let (to, copies) = match n % 50 {
            0 => (ALL, others.len()),
            1 => ([2, 0, 0, 0, 1, port], others.len()),
            _ => (mac(known[n % known.len()]), 1),
        };
        send(plug, &from_station(port, vlan, to));
        seen.copies += copies as u64;
        seen.frames += look(port, plug, room);
    }
    seen
}

#[test]
fn sixty_four_ports_in_four_vlans_get_what_is_theirs_or_count_it() {
    let switch = Switch::new(&SwitchOptions::default()).unwrap();
    let options = |port: u8| {
        let vlan = PortOptions::access(u16::from(10 + port % VLANS));
        let options = if port < TRUNKS { vlan } else { PortOptions::trunk([10, 11, 12, 13]) };
        PortOptions { storm: RateLimit::NONE, ..options }
    };
    let ports: Vec<_> = (0..PORTS).map(|i| switch.add_port(format!("{i}"), &options(i)).unwrap()).collect();
    let mut plugs: Vec<_> = ports.iter().map(|port| port.plug().unwrap()).collect();
    let mut room = vec![0; 2000];
    let (mut wanted, mut received) = (0, 0);
    // Everybody is known from now on.
    for port in 0..PORTS {
        for vlan in (0..VLANS).filter(|vlan| members(*vlan).contains(&port)) {
            send(&mut plugs[usize::from(port)], &from_station(port, vlan, ALL));
            wanted += members(vlan).len() as u64 - 1;
        }
        plugs.iter_mut().zip(0..).for_each(|(plug, port)| received += look(port, plug, &mut room));
    }
    assert_eq!(received, wanted);
    let done = &AtomicU64::new(0);
    std::thread::scope(|scope| {
        let threads: Vec<_> = plugs
            .into_iter()
            .zip(0..)
            .map(|(mut plug, port)| {
                scope.spawn(move || {
                    let (ended, mut room) = (Ended(done), vec![0; 2000]);
                    let mut seen = talk(port, &mut plug, &mut room);
                    drop(ended);
                    while done.load(Ordering::SeqCst) < u64::from(PORTS) {
                        seen.frames += look(port, &mut plug, &mut room);
                        std::thread::yield_now();
                    }
                    seen.frames += look(port, &mut plug, &mut room);
                    // The port goes on counting until all have looked.
                    (seen, plug)
                })
            })
            .collect();
        // Somebody changes ports and options all the while.
        while done.load(Ordering::SeqCst) < u64::from(PORTS) {
            let extra = switch.add_port("extra", &PortOptions::access(10)).unwrap();
            CHANGED.iter().for_each(|port| ports[usize::from(*port)].set_options(&options(*port)).unwrap());
            extra.remove();
        }
        for (seen, _) in threads.into_iter().map(|thread| thread.join().unwrap()) {
            wanted += seen.copies;
            received += seen.frames;
        }
    });
    let all: Vec<_> = ports.iter().map(SwitchPort::statistics).collect();
    let sum = |count: fn(&PortStatistics) -> u64| all.iter().map(count).sum::<u64>();
    assert_eq!(sum(|s| s.received.frames), u64::from(PORTS) * FRAMES as u64 + 60 + 4 * u64::from(VLANS));
    assert_eq!(sum(|s| s.sent.frames), received);
    let lost = sum(|s| s.dropped(DropReason::QueueFull));
    assert_eq!(received + lost, wanted, "every copy came, or found a full queue; {lost} did");
    assert_eq!(sum(|s| s.drops().map(|(_, frames)| frames).sum()), lost, "and nothing else was dropped");
    assert!(received > wanted / 5, "a queue full each at least: {received} of {wanted}");
}
