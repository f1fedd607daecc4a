//! Accesses to configuration space, BARs, MSI-X and ports, of a board with every device.

use arbitrary::{Result, Unstructured};
use vmbed::internals::driver::{Registers, Rings, VERSION_1, ecam, read, write};
use vmbed::internals::{BAR, Board, Part, memory_file};

const RINGS: u64 = 0x8_0000;
const STEPS: usize = 256;

/// What was refused or not there: a device, a BAR where it was put, an access to the MSI-X table, one through the window, a port,
/// and a driver's features or queues.
const REFUSALS: [&str; 6] = ["absent", "nowhere", "msix", "window", "port", "not_started"];

/// How deep an input went, for the replay of the corpus.
#[derive(Clone, Copy, Debug, Default)]
pub struct Depth {
    /// Accesses made.
    pub accesses: u32,
    /// Accesses that found a device where its BAR was moved to.
    pub moved: u32,
    /// Through the window in configuration space, what the BAR itself shows.
    pub seen: u32,
    /// Drivers that got to DRIVER_OK.
    pub started: u32,
    /// Devices that served their queues.
    pub served: u32,
    /// As [`REFUSALS`].
    pub refused: [u32; REFUSALS.len()],
}

impl Depth {
    /// What a campaign sums up.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let mut all = vec![
            ("accesses", self.accesses.into()),
            ("moved", self.moved.into()),
            ("seen", self.seen.into()),
            ("started", self.started.into()),
            ("served", self.served.into()),
        ];
        all.extend(REFUSALS.into_iter().zip(self.refused.map(u64::from)));
        all
    }

    fn refused(&mut self, name: &str) {
        self.refused[REFUSALS.iter().position(|known| *known == name).unwrap()] += 1;
    }
}

/// Runs one input. Panics where the devices misbehave.
pub fn run(data: &[u8]) -> Depth {
    let mut u = Unstructured::new(data);
    let disk = memory_file(32 << 10).unwrap();
    let parts = vec![Part::Disk { file: disk, readonly: false }, Part::Net, Part::Rng, Part::Console];
    let board = Board::new(1 << 20, parts).unwrap();
    let places: Vec<_> = (1..=4).map(|device| Registers::find(&board, device).unwrap()).collect();
    let mut depth = Depth::default();
    for _ in 0..STEPS {
        if u.is_empty() || step(&board, &places, &mut u, &mut depth).is_err() {
            break;
        }
    }
    for place in &places {
        recover(&board, place);
    }
    depth
}

fn step(board: &Board, places: &[Registers], u: &mut Unstructured<'_>, depth: &mut Depth) -> Result<()> {
    let place = u.choose(places)?;
    depth.accesses += 1;
    match u.int_in_range(0..=11)? {
        0 => {
            let device = u.int_in_range(0..=5)?;
            access(board, ecam(device, u.int_in_range(0..=0x110)?), u)?;
            if device == 5 {
                assert_eq!(read(board, ecam(device, 0), 4), 0xffff_ffff, "nobody is there");
                depth.refused("absent");
            }
        }
        1 => access(board, ecam(place.device, 4), u)?,
        2 => {
            let bar = 0xc000_0000 + 0x8000 * u.int_in_range::<u64>(0..=0x3fff)?;
            write(board, ecam(place.device, 0x10), 4, bar);
            match read(board, bar + 0x12, 2) {
                0xffff => depth.refused("nowhere"),
                queues => {
                    // One or two, and a card has one for commands.
                    assert!((1..=3).contains(&queues), "{queues}");
                    depth.moved += 1;
                }
            }
        }
        3 => {
            let window = ecam(place.device, place.window);
            let (at, length) = (u.int_in_range(0..=0x8003)?, u.int_in_range(0..=5)?);
            write(board, window + 8, 4, at);
            write(board, window + 12, 4, length);
            // It is made where the driver reads or writes so much.
            let good = matches!(length, 1 | 2 | 4) && at % length == 0 && at < BAR;
            let width = if matches!(length, 1 | 2 | 4) { length as usize } else { 4 };
            let shown = read(board, window + 16, width);
            if !good {
                depth.refused("window");
            } else if at == 0x12 && length == 2 {
                assert!((1..=3).contains(&shown), "{shown}");
                depth.seen += 1;
            }
            access(board, window + 16, u)?;
        }
        4 => access(board, ecam(place.device, place.msix + u.int_in_range(0..=11)?), u)?,
        5 => {
            let (at, width) = (u.int_in_range(0..=0x1fffu64)?, u.int_in_range(1..=8usize)?);
            let there = read(board, ecam(place.device, 4), 2) & 2 != 0;
            let whole = matches!(width, 4 | 8) && at % (width as u64) == 0;
            if there && at < 0x10 && !whole && read(board, ecam(place.device, 0x10), 4) & !0xf == place.bar {
                let all = u64::MAX >> (64 - 8 * width);
                assert_eq!(read(board, place.table + at, width), all, "{width} bytes at {at:#x}");
                depth.refused("msix");
            }
            access(board, place.table + at, u)?;
        }
        6 | 7 => access(board, place.common + u.int_in_range(0..=0x40)?, u)?,
        8 => access(board, place.bar + u.int_in_range(0..=0x8003)?, u)?,
        9 => {
            let (port, value) = (u.arbitrary()?, u.arbitrary::<[u8; 4]>()?);
            let len = *u.choose(&[1usize, 2, 4])?;
            board.write_pio(port, &value[..len]).unwrap();
            let mut data = [0; 4];
            board.read_pio(port, &mut data[..len]).unwrap();
            // Where nothing of a PC is.
            if port >= 0x1000 {
                assert_eq!(data[..len], [0xff; 4][..len]);
                depth.refused("port");
            }
        }
        10 => {
            let features = VERSION_1 | u.arbitrary::<u64>()? & 1 << 29 | u64::from(u.ratio(1u8, 8u8)?) << 63;
            match start(board, place, features) {
                true => depth.started += 1,
                false => depth.refused("not_started"),
            }
        }
        _ => {
            place.ring(board, u.int_in_range(0..=3)?);
            if u.arbitrary()? {
                board.pause();
                board.resume();
            }
        }
    }
    depth.served += board.process() as u32;
    Ok(())
}

fn access(board: &Board, address: u64, u: &mut Unstructured<'_>) -> Result<()> {
    let len = u.int_in_range(1..=8)?;
    let value = match u.arbitrary::<u8>()? {
        0..64 => u64::from(u.arbitrary::<u8>()?),
        64..128 => u64::MAX,
        _ => u.arbitrary()?,
    };
    let _ = read(board, address, len);
    if u.ratio(3u8, 4u8)? {
        write(board, address, len, value);
    }
    Ok(())
}

fn start(board: &Board, place: &Registers, features: u64) -> bool {
    let queues = match place.device {
        2 | 4 => 2,
        _ => 1,
    };
    let base = RINGS + 0x8000 * u64::from(place.device);
    let rings: Vec<_> = (0..queues).map(|i| Rings::new(board, base + 0x4000 * i, 16)).collect();
    place.start(board, features, &rings.iter().collect::<Vec<_>>())
}

/// Whatever happened, a new driver can take the device over.
fn recover(board: &Board, place: &Registers) {
    for (register, len, value) in
        [(0x10, 4, place.bar), (0x14, 4, place.bar >> 32), (4, 2, 6), (place.msix + 2, 2, 0)]
    {
        write(board, ecam(place.device, register), len, value);
    }
    let found = Registers::find(board, place.device).unwrap();
    assert_eq!((found.common, found.table), (place.common, place.table));
    // Another device may lie over this one still; the first in the bus's order answers there.
    for other in (1..=4).filter(|d| *d != place.device) {
        write(board, ecam(other, 4), 2, 0);
    }
    assert!(start(board, place, VERSION_1), "{place:?}");
    assert!(board.process() > 0);
}
