//! The devices at fixed ports and the IOAPIC: serial line, clock, keyboard controller, power, pvpanic.

use arbitrary::{Result, Unstructured};
use vmbed::internals::Board;

const STEPS: usize = 512;
const IOAPIC: u64 = 0xfec0_0000;
/// The first port of each, and how many there are.
const PORTS: [(u16, u16); 6] = [(0x3f8, 8), (0x70, 2), (0x60, 5), (0x505, 1), (0x600, 16), (0xcf8, 8)];

/// How deep an input went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Depth {
    /// Accesses made.
    pub accesses: u32,
    /// Bytes that came out of the serial line.
    pub said: u32,
    /// Bytes typed that the guest has read.
    pub read: u32,
    /// How often a device wanted the VM's end.
    pub stops: u32,
    /// Registers of the IOAPIC that kept what was written.
    pub routed: u32,
}

impl Depth {
    /// What a campaign sums up.
    #[allow(dead_code, reason = "a replay looks at the fields")]
    pub fn counters(&self) -> [(&'static str, u64); 5] {
        [
            ("accesses", self.accesses.into()),
            ("said", self.said.into()),
            ("read", self.read.into()),
            ("stops", self.stops.into()),
            ("routed", self.routed.into()),
        ]
    }
}

/// Runs one input. Panics where a device misbehaves.
pub fn run(data: &[u8]) -> Depth {
    let mut u = Unstructured::new(data);
    let board = Board::new(1 << 20, Vec::new()).unwrap();
    let mut depth = Depth::default();
    for _ in 0..STEPS {
        if u.is_empty() || step(&board, &mut u, &mut depth).is_err() {
            break;
        }
    }
    depth.said = board.output().len() as u32;
    depth.stops = board.stops().len() as u32;
    // The serial line writes whatever was done to it: the latch off, no loopback.
    for (port, value) in [(0x3fb, 3), (0x3fc, 0), (0x3f8, b'!')] {
        board.write_pio(port, &[value]).unwrap();
    }
    assert_eq!(board.output().last(), Some(&b'!'));
    depth
}

fn step(board: &Board, u: &mut Unstructured<'_>, depth: &mut Depth) -> Result<()> {
    depth.accesses += 1;
    match u.int_in_range(0..=9u8)? {
        // A line of output, as a driver writes it.
        0 => {
            for byte in u.bytes(usize::from(u.len() > 4))? {
                board.write_pio(0x3f8, &[*byte]).unwrap();
            }
        }
        // Input, as a driver reads it.
        1 => {
            let typed = vec![b't'; u.int_in_range(0..=100)?];
            board.input(&typed);
            let mut status = [0];
            for _ in 0..200 {
                board.read_pio(0x3fd, &mut status).unwrap();
                if status[0] & 1 == 0 {
                    break;
                }
                board.read_pio(0x3f8, &mut [0]).unwrap();
                depth.read += 1;
            }
        }
        // A redirection entry of the IOAPIC, or any register.
        2 | 3 => {
            let register = u.int_in_range(0..=0x3fu8)?;
            let value = u.arbitrary::<u32>()?;
            board.write_mmio(IOAPIC, &u32::from(register).to_le_bytes()).unwrap();
            board.write_mmio(IOAPIC + 0x10, &value.to_le_bytes()).unwrap();
            let mut now = [0; 4];
            board.read_mmio(IOAPIC + 0x10, &mut now).unwrap();
            depth.routed += u32::from(register >= 0x10 && u32::from_le_bytes(now) & 0xff == value & 0xff);
        }
        4 => {
            let (at, len) = (IOAPIC + u.int_in_range(0..=0xfffu64)?, *u.choose(&[1usize, 2, 4, 8])?);
            let value = u.arbitrary::<u64>()?.to_le_bytes();
            let _ = board.write_mmio(at, &value[..len]);
            let _ = board.read_mmio(at, &mut [0; 8][..len]);
        }
        _ => {
            let &(first, count) = u.choose(&PORTS)?;
            let (port, len) = (first + u.int_in_range(0..=count - 1)?, *u.choose(&[1usize, 1, 1, 2, 4])?);
            let value = u.arbitrary::<u32>()?.to_le_bytes();
            if u.arbitrary()? {
                board.write_pio(port, &value[..len]).unwrap();
            }
            let mut data = [0xff; 4];
            board.read_pio(port, &mut data[..len]).unwrap();
        }
    }
    Ok(())
}
