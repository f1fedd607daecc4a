#![forbid(unsafe_code)]
//! COM1: a 16550 between the guest and its console.
//!
//! The registers are vm-superio's. Output goes to the [`Console`], which never blocks. Input stays
//! there, where it is bounded, and moves to the 64-byte FIFO when the guest has emptied that.

use std::convert::Infallible;
use std::io;
use std::sync::{Arc, Mutex, Weak};

use vm_superio::Trigger;
use vm_superio::serial::NoEvents;

use crate::bus::{Access, Device};
use crate::console::Console;
use crate::error::Result;
use crate::ioapic::IrqLine;
use crate::sys::lock;

/// The receive buffer, when read.
const RBR: u64 = 0;
/// Modem control.
const MCR: u64 = 4;
/// In MCR: what is sent comes back.
const MCR_LOOP: u8 = 1 << 4;
/// Registers of a 16550.
const REGISTERS: u64 = 8;
const FIFO: usize = 64;

/// The serial port.
pub(crate) struct Serial {
    uart: Mutex<Uart>,
    console: Console,
}

struct Uart {
    registers: vm_superio::Serial<Line, NoEvents, Out>,
    loopback: bool,
}

/// A 16550's interrupt is a level; the platform's COM1 is an edge, as ISA's is.
struct Line(IrqLine);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.pulse();
        Ok(())
    }
}

struct Out(Console);

impl io::Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Serial {
    /// A port that has been reset, wired to `console` and `line`.
    pub fn new(console: Console, line: IrqLine) -> Arc<Self> {
        let registers = vm_superio::Serial::new(Line(line), Out(console.clone()));
        let uart = Mutex::new(Uart { registers, loopback: false });
        let serial = Arc::new(Self { uart, console });
        let weak: Weak<Self> = Arc::downgrade(&serial);
        let wake = move || {
            if let Some(serial) = weak.upgrade() {
                serial.refill(&mut lock(&serial.uart));
            }
        };
        serial.console.on_input(Some(Arc::new(wake)));
        serial
    }

    /// Moves input to the FIFO when that is empty, which raises the interrupt if the guest wants it.
    fn refill(&self, uart: &mut Uart) {
        // In loopback the line is cut off: vm-superio takes nothing.
        if uart.loopback || uart.registers.fifo_capacity() < FIFO {
            return;
        }
        let mut input = [0; FIFO];
        let count = self.console.read(&mut input);
        // All of it fits, and the trigger cannot fail.
        let _ = uart.registers.enqueue_raw_bytes(&input[..count]);
    }
}

impl Device for Serial {
    fn read(&self, access: Access, data: &mut [u8]) -> Result<()> {
        let mut uart = lock(&self.uart);
        for (register, byte) in super::registers(access).zip(data).take_while(|(r, _)| *r < REGISTERS) {
            *byte = uart.registers.read(register as u8);
            if register == RBR {
                self.refill(&mut uart);
            }
        }
        Ok(())
    }

    fn write(&self, access: Access, data: &[u8]) -> Result<()> {
        let mut uart = lock(&self.uart);
        for (register, byte) in super::registers(access).zip(data).take_while(|(r, _)| *r < REGISTERS) {
            // Neither the trigger nor the console can fail.
            let _ = uart.registers.write(register as u8, *byte);
            if register == MCR {
                uart.loopback = byte & MCR_LOOP != 0;
                self.refill(&mut uart);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ioapic::Ioapic;
    use crate::irq::Routes;
    use crate::legacy::ports;

    const COM1_GSI: u8 = ports::COM1_GSI as u8;
    const IER: u64 = 1;
    const IIR: u64 = 2;
    const LSR: u64 = 5;

    struct Rig {
        console: Console,
        serial: Arc<Serial>,
        routes: Arc<Routes>,
    }

    impl Rig {
        fn new() -> Self {
            let routes = Routes::new(None);
            let ioapic = Ioapic::new(routes.clone());
            ioapic.write(Access::at(0), &[0x10 + 2 * COM1_GSI]).unwrap();
            ioapic.write(Access::at(0x10), &0x31u32.to_le_bytes()).unwrap();
            let console = Console::new();
            Self { serial: Serial::new(console.clone(), ioapic.line(COM1_GSI)), console, routes }
        }
        fn read(&self, register: u64) -> u8 {
            let mut data = [0xff];
            self.serial.read(Access::at(register), &mut data).unwrap();
            data[0]
        }
        fn write(&self, register: u64, value: u8) {
            self.serial.write(Access::at(register), &[value]).unwrap();
        }
        /// As a driver does: while the line status says that there is data.
        fn drain(&self) -> Vec<u8> {
            std::iter::from_fn(|| (self.read(LSR) & 1 != 0).then(|| self.read(RBR))).collect()
        }
        fn interrupts(&self) -> usize {
            self.routes.take_signalled().len()
        }
    }

    #[test]
    fn output_goes_to_the_console_and_the_transmitter_interrupt_comes() {
        let rig = Rig::new();
        b"Linux version".iter().for_each(|byte| rig.write(0, *byte));
        assert_eq!(rig.console.tail(), b"Linux version");
        assert_eq!(rig.interrupts(), 0);
        rig.write(IER, 2);
        assert_eq!(rig.interrupts(), 1);
        assert_eq!(rig.read(IIR) & 0xf, 2);
        rig.write(0, b'x');
        assert_eq!(rig.interrupts(), 1);
    }

    #[test]
    fn input_arrives_whole_in_order_and_interrupts() {
        let rig = Rig::new();
        rig.write(IER, 1);
        let bytes: Vec<u8> = (0..1000u32).map(|i| i as u8).collect();
        assert_eq!(rig.console.push_input(&bytes), 1000);
        assert_eq!(rig.interrupts(), 1);
        assert_eq!(rig.read(IIR) & 0xf, 4);
        assert_eq!(rig.drain(), bytes);
        rig.interrupts();
        rig.read(IIR);
        rig.console.push_input(b"y");
        assert_eq!(rig.interrupts(), 1, "and again after all was read");
    }

    #[test]
    #[cfg_attr(miri, ignore = "fills a queue of 4 KiB byte by byte, which takes minutes")]
    fn input_that_the_guest_does_not_read_is_bounded_and_not_lost() {
        let rig = Rig::new();
        let bytes: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
        let mut taken = 0;
        for piece in bytes.chunks(100) {
            let count = rig.console.push_input(piece);
            taken += count;
            if count < piece.len() {
                break;
            }
        }
        assert_eq!(taken, 4096 + FIFO, "the console's queue and the FIFO");
        assert_eq!(rig.drain(), bytes[..taken]);
    }

    #[test]
    fn loopback_keeps_input_back_and_the_console_clean() {
        let rig = Rig::new();
        rig.write(MCR, MCR_LOOP);
        rig.console.push_input(b"later");
        b"probe".iter().for_each(|byte| rig.write(0, *byte));
        assert_eq!(rig.drain(), b"probe");
        rig.write(MCR, 0);
        assert_eq!(rig.drain(), b"later");
        assert_eq!(rig.console.tail(), b"");
    }

    #[test]
    fn any_access_is_answered_register_by_register() {
        let rig = Rig::new();
        for offset in 0..20 {
            for size in 0..=8 {
                let mut data = vec![0xff; size];
                rig.serial.write(Access::at(offset), &data).unwrap();
                rig.serial.read(Access::at(offset), &mut data).unwrap();
            }
        }
        rig.write(3, 0);
        rig.serial.write(Access::at(6), &[1, 0x5a, 3, 4]).unwrap();
        let mut data = [0xff; 4];
        rig.serial.read(Access::at(6), &mut data).unwrap();
        assert_eq!(data[1..], [0x5a, 0xff, 0xff], "scratch, then nothing");
    }
}
