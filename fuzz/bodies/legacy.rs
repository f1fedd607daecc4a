//! The devices at fixed ports and the IOAPIC: serial line, clock, keyboard controller, power, pvpanic.

use arbitrary::{Result, Unstructured};
use vmbed::internals::Board;

const STEPS: usize = 512;
const IOAPIC: u64 = 0xfec0_0000;
/// The first port of each, how many there are, and what makes it do something.
const PORTS: [(u16, u16, &[u8]); 6] = [
    (SERIAL, 8, &[0, 0x10, 3]),
    (CMOS, 2, &[0, 4, 0x0b]),
    (I8042, 5, &[0xfe]),
    (PVPANIC, 1, &[1, 2, 3]),
    (POWER, 5, &[0x34, 0x20, 1]),
    (0xcf8, 8, &[0x80]),
];
const SERIAL: u16 = 0x3f8;
const CMOS: u16 = 0x70;
const I8042: u16 = 0x60;
const PVPANIC: u16 = 0x505;
const POWER: u16 = 0x600;

/// What each device has done.
const COUNTERS: [&str; 22] = [
    // The serial line: bytes that came out, that were typed and read, that came back, and single registers.
    "said", "read", "looped", "serial",
    // The clock: a time, memory that keeps what is written, registers that do not.
    "time", "kept", "locked",
    // The keyboard controller: ready, the ports in it that are nobody's, the pulse that resets.
    "ready", "nobody", "pulse",
    // Power management: off, reset, a sleep that is none, status, and no news.
    "poweroff", "reset", "awake", "status", "no_news",
    // pvpanic: looked for, a panic, and what is none yet.
    "probed", "panic", "crash",
    // The IOAPIC's registers that kept what was written, and accesses of any width to it.
    "routed", "ioapic",
    // PCI's configuration ports, and accesses that are in two devices or half in one.
    "config", "across",
];

/// How deep an input went.
#[derive(Clone, Copy, Debug, Default)]
pub struct Depth([u32; COUNTERS.len()]);

impl Depth {
    /// What a campaign sums up.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        COUNTERS.into_iter().zip(self.0.map(u64::from)).collect()
    }

    fn met(&mut self, name: &str, often: u32) {
        self.0[COUNTERS.iter().position(|known| *known == name).unwrap()] += often;
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
    depth.met("said", board.output().len() as u32);
    // The serial line writes whatever was done to it: the latch off, no loopback.
    for (port, value) in [(0x3fb, 3), (0x3fc, 0), (SERIAL, b'!')] {
        board.write_pio(port, &[value]).unwrap();
    }
    assert_eq!(board.output().last(), Some(&b'!'));
    depth
}

fn port(board: &Board, port: u16) -> u8 {
    let mut data = [0xff];
    board.read_pio(port, &mut data).unwrap();
    data[0]
}

fn step(board: &Board, u: &mut Unstructured<'_>, depth: &mut Depth) -> Result<()> {
    match u.int_in_range(0..=11u8)? {
        // Output, as a driver writes it.
        0 => {
            for byte in u.bytes(usize::from(u.len() > 4))? {
                board.write_pio(SERIAL, &[*byte]).unwrap();
            }
        }
        // Input, as a driver reads it.
        1 => {
            let typed = vec![b't'; u.int_in_range(0..=100)?];
            board.input(&typed);
            for _ in 0..200 {
                if port(board, 0x3fd) & 1 == 0 {
                    break;
                }
                port(board, SERIAL);
                depth.met("read", 1);
            }
        }
        2 => looped(board, u.arbitrary()?, depth),
        3 => clock(board, u, depth)?,
        // A redirection entry of the IOAPIC, or any register.
        4 | 5 => {
            let register = u.int_in_range(0..=0x3fu8)?;
            let value = u.arbitrary::<u32>()?;
            board.write_mmio(IOAPIC, &u32::from(register).to_le_bytes()).unwrap();
            board.write_mmio(IOAPIC + 0x10, &value.to_le_bytes()).unwrap();
            let mut now = [0; 4];
            board.read_mmio(IOAPIC + 0x10, &mut now).unwrap();
            let kept = register >= 0x10 && u32::from_le_bytes(now) & 0xff == value & 0xff;
            depth.met("routed", kept.into());
        }
        6 => {
            let (at, len) = (IOAPIC + u.int_in_range(0..=0xfffu64)?, *u.choose(&[1usize, 2, 4, 8])?);
            let value = u.arbitrary::<u64>()?.to_le_bytes();
            let _ = board.write_mmio(at, &value[..len]);
            let _ = board.read_mmio(at, &mut [0; 8][..len]);
            depth.met("ioapic", 1);
        }
        _ => access(board, u, depth)?,
    }
    Ok(())
}

/// A byte in loopback comes back, and does not come out.
fn looped(board: &Board, byte: u8, depth: &mut Depth) {
    // No interrupts, the latch off, empty FIFOs, loopback.
    for (register, value) in [(0x3f9, 0), (0x3fb, 3), (0x3fc, 0x10)] {
        board.write_pio(register, &[value]).unwrap();
    }
    while port(board, 0x3fd) & 1 == 1 {
        port(board, SERIAL);
    }
    let before = board.output();
    board.write_pio(SERIAL, &[byte]).unwrap();
    assert_eq!((port(board, SERIAL), board.output() == before), (byte, true));
    board.write_pio(0x3fc, &[0]).unwrap();
    depth.met("looped", 1);
}

/// A register of the clock: what is written, and what is read then.
fn clock(board: &Board, u: &mut Unstructured<'_>, depth: &mut Depth) -> Result<()> {
    let (index, value) = (u.int_in_range(0..=0x7fu8)?, u.arbitrary::<u8>()?);
    board.write_pio(CMOS, &[index | value & 0x80]).unwrap();
    let before = port(board, CMOS + 1);
    board.write_pio(CMOS + 1, &[value]).unwrap();
    let after = port(board, CMOS + 1);
    match index {
        0 | 2 | 4 | 6..=9 | 0x32 => {
            // Hours have a bit for the afternoon.
            let most = if index == 4 { 0x92 } else { 0x99 };
            assert!(after <= most, "register {index:#x} shows {after:#x}");
            depth.met("time", 1);
        }
        0x0c | 0x0d => {
            assert_eq!(after, before);
            depth.met("locked", 1);
        }
        _ => {
            assert_eq!(after, if index == 0x0a { value & 0x7f } else { value });
            depth.met("kept", 1);
        }
    }
    Ok(())
}

/// Any port of a device, or beside it, in any width.
fn access(board: &Board, u: &mut Unstructured<'_>, depth: &mut Depth) -> Result<()> {
    let &(first, count, special) = u.choose(&PORTS)?;
    let (offset, width) = (u.int_in_range(0..=count - 1)?, *u.choose(&[1usize, 1, 1, 2, 4])?);
    let at = first + offset;
    let mut value = u.arbitrary::<u32>()?.to_le_bytes();
    if u.arbitrary()? {
        value[0] = *u.choose(special)?;
    }
    let inside = usize::from(offset) + width <= count.into();
    depth.met("across", (!inside).into());
    if u.arbitrary()? {
        let before = board.stops().len();
        board.write_pio(at, &value[..width]).unwrap();
        let registers = (offset..).zip(&value[..width]).filter(|_| inside);
        let causes: Vec<_> = registers.filter_map(|(register, byte)| stop(first, register, *byte)).collect();
        causes.iter().for_each(|(counter, _)| depth.met(counter, 1));
        let expected: Vec<_> = causes.iter().filter_map(|(_, cause)| *cause).collect();
        assert_eq!(board.stops()[before..], expected, "{at:#x}: {value:x?}");
    }
    let mut data = [0xff; 4];
    board.read_pio(at, &mut data[..width]).unwrap();
    if !inside {
        assert_eq!(data, [0xff; 4], "half of it is nobody's");
        return Ok(());
    }
    for (register, byte) in (offset..).zip(&data[..width]) {
        let (counter, expected) = match (first, register) {
            (SERIAL, _) => ("serial", None),
            (I8042, 0 | 4) => ("ready", Some(0)),
            (I8042, _) => ("nobody", Some(0xff)),
            (PVPANIC, _) => ("probed", Some(3)),
            (POWER, 3) => ("nobody", Some(0xff)),
            // Nobody has pressed the button.
            (POWER, 4) => ("no_news", Some(0)),
            (POWER, _) => ("status", Some(0)),
            (CMOS, 0) => ("nobody", Some(0xff)),
            (CMOS, _) => continue,
            _ => ("config", None),
        };
        assert!(expected.is_none_or(|expected| *byte == expected), "{first:#x}+{register} reads {byte:#x}");
        depth.met(counter, 1);
    }
    Ok(())
}

/// What a byte does that makes a device want the VM's end, or nearly; and the cause.
fn stop(device: u16, register: u16, byte: u8) -> Option<(&'static str, Option<&'static str>)> {
    match (device, register) {
        (I8042, 4) if byte == 0xfe => Some(("pulse", Some("GuestReset"))),
        (PVPANIC, 0) if byte & 1 == 1 => Some(("panic", Some("GuestPanic"))),
        (PVPANIC, 0) if byte & 2 == 2 => Some(("crash", None)),
        // SLP_EN, and SLP_TYP of S5.
        (POWER, 0) if byte & 0x3c == 0x34 => Some(("poweroff", Some("GuestPoweroff"))),
        (POWER, 0) if byte & 0x20 != 0 => Some(("awake", None)),
        (POWER, 2) if byte == 1 => Some(("reset", Some("GuestReset"))),
        _ => None,
    }
}
