#![forbid(unsafe_code)]
//! What tests of networks share: packets, and real interfaces in a network namespace of a test's own.

use std::time::{Duration, Instant};

use super::wiring::{BridgeOptions, TapOptions, Wiring};
use super::{HEADER_LEN, NetBackend, Tap};
use crate::sys::io::Pieces;

/// Who sends to whom.
pub const NEAR: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const FAR: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// Better an error than a hang.
const LONG: Duration = Duration::from_secs(60);

/// Until `f` has something.
pub fn wait<T>(what: &str, mut f: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + LONG;
    loop {
        if let Some(found) = f() {
            return found;
        }
        assert!(Instant::now() < end, "waited for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The Internet's checksum the plain way: word by word. 0 where what is summed has a right one in it.
pub fn slowly(bytes: &[u8]) -> u16 {
    let mut total = 0u32;
    for pair in bytes.chunks(2) {
        total += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        total = (total & 0xffff) + (total >> 16);
    }
    !(total as u16)
}

/// A frame of segments of that size over IPv4 or IPv6, with a tag or not, whose checksum is only begun, and its header: UDP's datagrams, or
/// TCP.
pub fn packet(udp: bool, v4: bool, tagged: bool, payload: usize, size: u16) -> (Vec<u8>, [u8; 12]) {
    let mut frame = [FAR, NEAR].concat();
    if tagged {
        frame.extend([0x81, 0, 0, 10]);
    }
    let protocol = if udp { 17 } else { 6 };
    let segment = payload + if udp { 8 } else { 20 };
    if v4 {
        frame.extend([8, 0, 0x45, 0]);
        frame.extend(((20 + segment) as u16).to_be_bytes());
        frame.extend([0xff, 0xff, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        let network = frame.len() - 20;
        let sum = slowly(&frame[network..]).to_be_bytes();
        frame[network + 10..network + 12].copy_from_slice(&sum);
    } else {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend((segment as u16).to_be_bytes());
        frame.extend([protocol, 64]);
        frame.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        frame.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
    }
    let start = frame.len() as u16;
    if udp {
        frame.extend([0x10, 0, 0x20, 0]);
        frame.extend((segment as u16).to_be_bytes());
        frame.extend([0, 0]);
    } else {
        let head = [0x10, 0, 0x20, 0, 0xff, 0xff, 0xff, 0xf0, 0, 0, 0, 0, 0x50, 0x99, 1, 0, 0, 0, 0, 0];
        frame.extend(head);
    }
    frame.extend((0..payload).map(|i| (i * 7) as u8));
    let at = usize::from(start);
    let addresses = if v4 { &frame[at - 8..at] } else { &frame[at - 32..at] };
    let begun = !slowly(&[addresses, &[0, protocol], &(segment as u16).to_be_bytes()].concat());
    let field = at + if udp { 6 } else { 16 };
    frame[field..field + 2].copy_from_slice(&begun.to_be_bytes());
    let mut header = [0; 12];
    header[0] = 1;
    header[1] = match (udp, v4) {
        (true, _) => 5,
        (false, true) => 1,
        (false, false) => 4,
    };
    header[4..6].copy_from_slice(&size.to_le_bytes());
    header[6..8].copy_from_slice(&start.to_le_bytes());
    header[8] = if udp { 6 } else { 16 };
    (frame, header)
}

/// Runs `test` in a network namespace of its own, in which a bridge carries frames between the TAP interface [`TAP`], which may have several
/// queues, and the one whose only queue the test is given.
pub fn with_a_bridge(several: bool, test: impl FnOnce(Far) + Send + 'static) {
    let run = std::thread::spawn(move || {
        crate::sys::tap::leave_network().expect("a network namespace (CAP_SYS_ADMIN)");
        // Else the kernel has something to say, too: who it is, and which groups it is in. Where it has no IPv6, it has not.
        let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
        std::fs::write("/proc/sys/net/ipv4/igmp_link_local_mcast_reports", "0").unwrap();
        let wiring = Wiring::new().unwrap();
        wiring.add_bridge("br0", &BridgeOptions::default()).unwrap();
        let far = TapOptions::on("br0");
        wiring.add_tap(TAP, &TapOptions { multi_queue: several, ..far.clone() }).unwrap();
        wiring.add_tap(FAR_TAP, &far).unwrap();
        test(Far { tap: Tap::open("far", FAR_TAP).unwrap(), room: vec![0; 70_000] });
    });
    run.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

pub const TAP: &str = "vnet0";
const FAR_TAP: &str = "far0";

/// The other end of the bridge: complete frames, with nothing left to do.
pub struct Far {
    tap: Tap,
    room: Vec<u8>,
}

impl Far {
    /// The next frame.
    pub fn get(&mut self) -> Option<&[u8]> {
        let mut pieces = Pieces::default();
        let mut list = pieces.list();
        list.push_room(&mut self.room);
        let length = self.tap.receive(&list).ok()?;
        assert!(self.room[0] != 1 && self.room[1] == 0, "it takes nothing undone");
        Some(&self.room[HEADER_LEN..length])
    }

    pub fn put(&mut self, frame: &[u8]) {
        let mut pieces = Pieces::default();
        let mut list = pieces.list();
        list.push_bytes(&[0; HEADER_LEN]);
        list.push_bytes(frame);
        self.tap.send(&list).unwrap();
    }

    /// Sends with `send` until something comes: the bridge forwards from then on, and nothing is on its way.
    pub fn settle(&mut self, mut send: impl FnMut()) {
        wait("the bridge to forward", || {
            send();
            self.get().is_some().then_some(())
        });
        std::thread::sleep(Duration::from_millis(50));
        while self.get().is_some() {}
    }

    /// What the datagrams carry that come until there are `length` bytes of it: those of [`packet`], cut into `size` bytes each, and all
    /// of them whole packets.
    pub fn datagrams(&mut self, v4: bool, length: usize, size: usize) -> Vec<u8> {
        let mut carried = Vec::new();
        while carried.len() < length {
            let frame = wait("a datagram", || self.get().map(<[u8]>::to_vec));
            let (network, transport) = (14, if v4 { 34 } else { 54 });
            let payload = &frame[transport + 8..];
            assert_eq!(payload.len(), size.min(length - carried.len()));
            let covered = ((frame.len() - transport) as u16).to_be_bytes();
            let (addresses, says) = if v4 {
                assert_eq!(slowly(&frame[network..transport]), 0, "the sum of its IP header");
                (&frame[network + 12..transport], usize::from(frame[17]) | usize::from(frame[16]) << 8)
            } else {
                let says = usize::from(frame[19]) | usize::from(frame[18]) << 8;
                (&frame[network + 8..transport], says + 40)
            };
            assert_eq!(says, frame.len() - network);
            assert_eq!(frame[transport + 4..transport + 6], covered);
            assert_ne!(frame[transport + 6..transport + 8], [0, 0], "without a sum");
            assert_eq!(slowly(&[addresses, &[0, 17], &covered, &frame[transport..]].concat()), 0);
            carried.extend(payload);
        }
        carried
    }
}

/// Frames that were dropped at the two interfaces, in both directions.
pub fn lost() -> u64 {
    let all = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let of = |name: &str| -> u64 {
        let line = all.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix(':')).unwrap();
        let numbers: Vec<u64> = line.split_whitespace().map(|number| number.parse().unwrap()).collect();
        numbers[3] + numbers[11]
    };
    of(TAP) + of(FAR_TAP)
}

/// Whether the kernel knows UDP segments at TAP interfaces: since 6.2.
pub fn kernel_knows_uso() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split('.').map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap(), numbers.next().unwrap_or(0)) >= (6u32, 2)
}
