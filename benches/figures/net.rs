//! What a card costs beside the host's own work. In a network namespace with the interfaces `near` and `far` on a bridge
//! (benches/figures/run makes them), `figure-net taps TURNS` prints medians of ratios, each taken in turn within one run:
//!
//! - `frames-1514`, `frames-60`: time of a frame from TAP to TAP over a bridge where one of the two is read and written by a card
//!   (this process's driver, no other thread), both ways, to that of plain reads and writes of the same descriptors. Of the long ones
//!   what passes on a clock, of the short ones what this process has of the processors.
//!
//! `figure-net switch TURNS`: `segments`, time of a frame of 64 KiB from one card's memory to another's over a switch to that of one
//! copy. `figure-net hops COUNT`: carries so many frames of 60 bytes over a switch of 64 ports, and nothing else.
#![expect(unsafe_code, reason = "a driver's rings are accessed as a guest does, and taps by ioctl")]

use std::cell::RefCell;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use vmbed::internals::driver::{NEXT, Registers, Rings, VERSION_1, WRITE};
use vmbed::internals::{BenchSwitch, Board, Part};
use vmbed::{PortOptions, Switch, SwitchOptions};

#[path = "ratio.rs"]
mod ratio;
use ratio::{Done, ratio};

/// As many as the device offers, and drivers take.
const ENTRIES: u16 = 256;
/// Frames of a batch.
const BATCH: usize = 32;
/// CSUM, GUEST_CSUM, GUEST_TSO4, HOST_TSO4, MRG_RXBUF.
const FEATURES: u64 = 1 | 1 << 1 | 1 << 7 | 1 << 11 | 1 << 15;
const HEADER: usize = 12;

/// A queue of a driver that has its chains laid out beforehand: one for each place.
struct Way {
    rings: Rings,
    avail: *mut u16,
    used: *mut u8,
    offered: u16,
    taken: u16,
}

impl Way {
    fn new(board: &Board, base: u64) -> Self {
        let rings = Rings::new(board, base, ENTRIES);
        let at = |address: u64| board.host_address(address, 8).expect("it is memory");
        let way = Self { avail: at(rings.avail).cast(), used: at(rings.used), rings, offered: 0, taken: 0 };
        // VIRTQ_AVAIL_F_NO_INTERRUPT, as drivers say that poll.
        // SAFETY: as in `offer`.
        unsafe { way.avail.write_volatile(1) };
        way
    }

    fn offer(&mut self, place: u16) {
        // SAFETY: aligned places in a ring, which lies in guest memory for as long as the board lives; the device, which is on this
        // thread, reads them later.
        unsafe {
            self.avail.add(2 + usize::from(self.offered % ENTRIES)).write_volatile(place);
            self.offered = self.offered.wrapping_add(1);
            self.avail.add(1).write_volatile(self.offered);
        }
    }

    /// The next place that the device is done with, and the bytes in it.
    fn take(&mut self) -> Option<(u16, u32)> {
        // SAFETY: as above.
        unsafe {
            if self.used.cast::<u16>().add(1).read_volatile() == self.taken {
                return None;
            }
            let element = self.used.add(4 + 8 * usize::from(self.taken % ENTRIES)).cast::<u32>();
            self.taken = self.taken.wrapping_add(1);
            Some((element.read_volatile() as u16, element.add(1).read_volatile()))
        }
    }
}

/// A card with a driver.
struct Card {
    board: Board,
    registers: Registers,
    rx: Way,
    tx: Way,
    room: u64,
}

const FRAMES: u64 = 4 << 20;
const BUFFERS: u64 = 8 << 20;

impl Card {
    /// On that part, with receive buffers of `room` bytes; `frame` is what it sends, with its header.
    fn new(part: Part, room: u64, frame: &[u8]) -> Done<Self> {
        let board = Board::new(16 << 20, vec![part])?;
        let registers = Registers::find(&board, 1).ok_or("no card")?;
        let (rx, tx) = (Way::new(&board, 1 << 20), Way::new(&board, 2 << 20));
        if !registers.start(&board, VERSION_1 | FEATURES, &[&rx.rings, &tx.rings]) {
            return Err("the card did not start".into());
        }
        let mut card = Self { board, registers, rx, tx, room };
        for place in 0..ENTRIES {
            let at = BUFFERS + room * u64::from(place);
            card.rx.rings.descriptor(&card.board, card.rx.rings.desc, place, (at, room as u32, WRITE), 0);
            card.rx.offer(place);
        }
        card.board.write_memory(FRAMES, frame)?;
        // All places have the one frame: what is sent is only read.
        for place in 0..ENTRIES {
            card.tx.rings.descriptor(
                &card.board,
                card.tx.rings.desc,
                place,
                (FRAMES, frame.len() as u32, 0),
                0,
            );
        }
        assert_eq!((NEXT, WRITE), (1, 2));
        card.registers.ring(&card.board, 0);
        card.board.process_all();
        Ok(card)
    }

    /// Sends its frame so many times.
    fn send(&mut self, count: usize) -> Done<()> {
        (0..count).for_each(|place| self.tx.offer(place as u16));
        let mut done = 0;
        while done < count {
            self.board.process_all();
            let before = done;
            while self.tx.take().is_some() {
                done += 1;
            }
            if done == before {
                return Err(format!("the card has sent {done} of {count} frames").into());
            }
        }
        Ok(())
    }

    /// Takes what has come, so many bytes with their headers.
    fn receive(&mut self, bytes: u64) -> Done<()> {
        let mut left = bytes;
        while left > 0 {
            self.board.process_all();
            let before = left;
            while let Some((place, length)) = self.rx.take() {
                left = left.checked_sub(length.into()).ok_or("more has come than was sent")?;
                self.rx.offer(place);
            }
            if left == before {
                return Err(
                    format!("{left} of {bytes} bytes have not come, into buffers of {}", self.room).into()
                );
            }
        }
        Ok(())
    }
}

/// A queue of that interface, with headers of 12 bytes, nonblocking.
fn tap(name: &str) -> Done<File> {
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: an ifreq is plain data, for which zeroes are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
    let size = HEADER as libc::c_int;
    // SAFETY: both ioctls take a pointer to what is there, and fcntl integers.
    let failed = unsafe {
        libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &request) < 0
            || libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &size) < 0
            || libc::fcntl(file.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) < 0
    };
    if failed { Err(format!("{name}: {}", std::io::Error::last_os_error()).into()) } else { Ok(file) }
}

/// A frame of `length` bytes behind its header, from one station to another.
fn frame(length: usize, from: u8, to: u8) -> Vec<u8> {
    let mut frame = vec![0; HEADER + length];
    frame[HEADER..HEADER + 12].copy_from_slice(&[2, 0, 0, 0, 0, to, 2, 0, 0, 0, 0, from]);
    frame[HEADER + 12..HEADER + 14].copy_from_slice(&[0x88, 0xb5]);
    frame
}

fn write_all(tap: &mut File, frame: &[u8]) -> Done<()> {
    (0..BATCH).try_for_each(|_| tap.write_all(frame)).map_err(Into::into)
}

/// Sends until something comes, and forgets it.
fn first(tap: &mut File, mut send: impl FnMut() -> Done<()>) -> Done<()> {
    let mut buffer = [0; 4096];
    for _ in 0..100 {
        send()?;
        std::thread::sleep(Duration::from_millis(100));
        let mut came = 0;
        while tap.read(&mut buffer).is_ok() {
            came += 1;
        }
        if came > 0 {
            return Ok(());
        }
    }
    Err("waited ten seconds for a bridge to forward".into())
}

fn read_all(tap: &mut File, length: usize) -> Done<()> {
    let mut buffer = [0; 4096];
    for i in 0..BATCH {
        let count = tap.read(&mut buffer).map_err(|e| format!("frame {i} of a batch: {e}"))?;
        if count != length {
            return Err(format!("a frame of {count} bytes, not {length}").into());
        }
    }
    Ok(())
}

/// Of that clock, in nanoseconds.
fn now(clock: libc::clockid_t) -> u128 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: it is there to be written to.
    let status = unsafe { libc::clock_gettime(clock, &mut time) };
    assert_eq!(status, 0, "every kernel has that clock");
    time.tv_sec as u128 * 1_000_000_000 + time.tv_nsec as u128
}

fn taps(turns: usize) -> Done<()> {
    const ROUNDS: usize = 60;
    for (length, clock) in [(1514, libc::CLOCK_MONOTONIC), (60, libc::CLOCK_PROCESS_CPUTIME_ID)] {
        let (there, back) = (frame(length, 1, 2), frame(length, 2, 1));
        let (mut near, mut far) = (tap("near")?, tap("far")?);
        // The card has the same queue: it looks at it when it is asked to, and not while plain reads and writes have their turn.
        let mut card = Card::new(Part::Tap(near.try_clone()?.into()), 1600, &there)?;
        // The bridge takes a moment to see that its ports have carriers, and learns who is where: the first frames go everywhere.
        first(&mut far, || card.send(1))?;
        far.write_all(&back)?;
        card.receive(back.len() as u64)?;
        let far = RefCell::new(far);
        let through = || {
            let (begin, mut far) = (now(clock), far.borrow_mut());
            for _ in 0..ROUNDS {
                card.send(BATCH)?;
                read_all(&mut far, there.len())?;
                write_all(&mut far, &back)?;
                card.receive((BATCH * back.len()) as u64)?;
            }
            Ok(now(clock) - begin)
        };
        let bare = || {
            let (begin, mut far) = (now(clock), far.borrow_mut());
            for _ in 0..ROUNDS {
                write_all(&mut near, &there)?;
                read_all(&mut far, there.len())?;
                write_all(&mut far, &back)?;
                read_all(&mut near, back.len())?;
            }
            Ok(now(clock) - begin)
        };
        println!("frames-{length} {:.3}", ratio(turns, through, bare)?);
    }
    Ok(())
}

/// TCP over IPv4, to be cut into segments: 64 KiB as far as an IP packet can have them.
fn segments() -> Vec<u8> {
    const LENGTH: usize = 14 + 65_535;
    let mut bytes = frame(LENGTH, 1, 2);
    bytes[..10].copy_from_slice(&[1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0]);
    let packet = &mut bytes[HEADER + 12..];
    packet[..2].copy_from_slice(&[8, 0]);
    packet[2..6].copy_from_slice(&[0x45, 0, 0xff, 0xff]);
    packet[10..12].copy_from_slice(&[64, 6]);
    packet[14..22].copy_from_slice(&[192, 0, 2, 1, 192, 0, 2, 2]);
    packet[34] = 5 << 4;
    bytes
}

fn switch(turns: usize) -> Done<()> {
    const COUNT: usize = 500;
    /// Frames on their way at a time, as TCP sends them.
    const BURST: usize = 4;
    let switch = Switch::new(&SwitchOptions::default())?;
    let [a, b] = ["a", "b"].map(|name| switch.add_port(name, &PortOptions::access(1)));
    let (bytes, small) = (segments(), frame(60, 2, 1));
    let mut one = Card::new(Part::Port(a?), 4096, &bytes)?;
    let mut two = Card::new(Part::Port(b?), 4096, &small)?;
    two.send(1)?;
    one.receive(small.len() as u64)?;
    let carried = || {
        let begin = Instant::now();
        for _ in 0..COUNT {
            one.send(BURST)?;
            two.receive((BURST * bytes.len()) as u64)?;
        }
        Ok(begin.elapsed().as_nanos())
    };
    // As much memory as the receiver's driver has given, in turn: neither finds it all in the fastest cache.
    let places = usize::from(ENTRIES) * 4096 / bytes.len();
    let mut rooms = vec![vec![0u8; bytes.len()]; places];
    let copied = || {
        let begin = Instant::now();
        for frame in 0..COUNT * BURST {
            let room = &mut rooms[frame % places];
            room.copy_from_slice(std::hint::black_box(&bytes));
            std::hint::black_box(room);
        }
        Ok(begin.elapsed().as_nanos())
    };
    println!("segments {:.3}", ratio(turns, carried, copied)?);
    Ok(())
}

fn hops(count: usize) -> Done<()> {
    const PORTS: usize = 64;
    let mut switch = BenchSwitch::new(PORTS)?;
    let frames: Vec<_> = (0..PORTS).map(|i| frame(60, i as u8, ((i + 1) % PORTS) as u8)).collect();
    for (from, frame) in frames.iter().enumerate() {
        // What the first ones send goes everywhere.
        switch.send(from, frame);
        let came = (0..PORTS).filter(|port| switch.receive(*port)).count();
        assert!(came > 0, "frame {from} came nowhere");
    }
    for i in 0..count {
        let (from, to) = (i % PORTS, (i + 1) % PORTS);
        switch.send(from, &frames[from]);
        assert!(switch.receive(to), "frame {i}");
    }
    assert!((0..PORTS).all(|port| !switch.receive(port)), "each came once");
    Ok(())
}

fn main() -> Done<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["taps", turns] => taps(turns.parse()?),
        ["switch", turns] => switch(turns.parse()?),
        ["hops", count] => hops(count.parse()?),
        _ => Err("usage: figure-net taps TURNS | switch TURNS | hops COUNT".into()),
    }
}
