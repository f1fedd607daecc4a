//! Accesses to configuration space, BARs, MSI-X and ports, of a board with every device.

use arbitrary::{Result, Unstructured};
use vmbed::internals::driver::{Registers, Rings, VERSION_1, ecam, read, write};
use vmbed::internals::{Board, Part, memory_file};

const RINGS: u64 = 0x8_0000;
const STEPS: usize = 256;

/// How deep an input went, for the replay of the corpus.
#[derive(Clone, Copy, Debug, Default)]
pub struct Depth {
    /// Accesses made.
    pub accesses: u32,
    /// Accesses that found a device where its BAR was moved to.
    pub moved: u32,
    /// Drivers that got to DRIVER_OK.
    pub started: u32,
    /// Devices that served their queues.
    pub served: u32,
}

impl Depth {
    /// What a campaign sums up.
    #[allow(dead_code, reason = "a replay looks at the fields")]
    pub fn counters(&self) -> [(&'static str, u64); 4] {
        [
            ("accesses", self.accesses.into()),
            ("moved", self.moved.into()),
            ("started", self.started.into()),
            ("served", self.served.into()),
        ]
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
        0 => access(board, ecam(u.int_in_range(0..=5)?, u.int_in_range(0..=0x110)?), u)?,
        1 => access(board, ecam(place.device, 4), u)?,
        2 => {
            let bar = 0xc000_0000 + 0x8000 * u.int_in_range::<u64>(0..=0x3fff)?;
            write(board, ecam(place.device, 0x10), 4, bar);
            depth.moved += u32::from(read(board, bar + 0x12, 2) <= 2);
        }
        3 => {
            let window = ecam(place.device, place.window);
            write(board, window + 8, 4, u.int_in_range(0..=0x8003)?);
            write(board, window + 12, 4, u.int_in_range(0..=5)?);
            access(board, window + 16, u)?;
        }
        4 => access(board, ecam(place.device, place.msix + u.int_in_range(0..=11)?), u)?,
        5 => access(board, place.table + u.int_in_range(0..=0x1fff)?, u)?,
        6 | 7 => access(board, place.common + u.int_in_range(0..=0x40)?, u)?,
        8 => access(board, place.bar + u.int_in_range(0..=0x8003)?, u)?,
        9 => {
            let (port, value) = (u.arbitrary()?, u.arbitrary::<[u8; 4]>()?);
            let len = *u.choose(&[1usize, 2, 4])?;
            board.write_pio(port, &value[..len]).unwrap();
            board.read_pio(port, &mut [0; 4][..len]).unwrap();
        }
        10 => {
            depth.started += u32::from(start(board, place, VERSION_1 | u.arbitrary::<u64>()? & 1 << 29));
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
