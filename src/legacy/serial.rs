#![forbid(unsafe_code)]
//! A 16550 on the console.

use std::io;
use std::sync::{Arc, Mutex, Weak};

use vm_superio::Trigger;

use super::bytes;
use crate::bus::{Access, Device};
use crate::console::Console;
use crate::error::Result;
use crate::ioapic::IrqLine;
use crate::sys::lock;

/// The data register, when the divisor latch is closed.
const DATA: u64 = 0;

/// The first serial port. Output goes to the console at once and never waits; input waits in the console
/// until the guest has read what the port's own 64 bytes hold.
pub(crate) struct Serial {
    port: Mutex<vm_superio::Serial<Line, vm_superio::serial::NoEvents, Out>>,
    console: Console,
}

/// The port's interrupt: an edge.
struct Line(IrqLine);

impl Trigger for Line {
    type E = std::convert::Infallible;

    fn trigger(&self) -> std::result::Result<(), Self::E> {
        self.0.pulse();
        Ok(())
    }
}

/// The console as the port's output.
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
    pub fn new(console: Console, line: IrqLine) -> Arc<Self> {
        let port = vm_superio::Serial::new(Line(line), Out(console.clone()));
        let serial = Arc::new(Self { port: Mutex::new(port), console });
        let weak: Weak<Self> = Arc::downgrade(&serial);
        let wake = move || {
            if let Some(serial) = weak.upgrade() {
                serial.fetch_input();
            }
        };
        serial.console.on_input(Some(Arc::new(wake)));
        serial
    }

    /// Moves input from the console to the port, as much as fits.
    fn fetch_input(&self) {
        let mut port = lock(&self.port);
        let mut input = [0; 64];
        let room = port.fifo_capacity().min(input.len());
        let count = self.console.read(&mut input[..room]);
        if count > 0 {
            // Fails in loopback mode, where a real line's input would be lost too.
            let _ = port.enqueue_raw_bytes(&input[..count]);
        }
    }
}

impl Device for Serial {
    fn read(&self, access: Access, data: &mut [u8]) -> Result<()> {
        for (offset, byte) in (access.offset..).zip(data.iter_mut()) {
            *byte = lock(&self.port).read(offset as u8);
            if offset == DATA && self.console.has_input() {
                self.fetch_input();
            }
        }
        Ok(())
    }

    fn write(&self, access: Access, data: &[u8]) -> Result<()> {
        let mut port = lock(&self.port);
        for (offset, byte) in bytes(access, data) {
            // Neither the line nor the console fails.
            let _ = port.write(offset as u8, byte);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ioapic::Ioapic;
    use crate::irq::Routes;

    fn serial() -> (Arc<Serial>, Console) {
        let console = Console::new();
        let line = Ioapic::new(Routes::new(None)).line(4);
        (Serial::new(console.clone(), line), console)
    }

    fn read(serial: &Serial, offset: u64) -> u8 {
        let mut data = [0xff];
        serial.read(Access::at(offset), &mut data).unwrap();
        data[0]
    }

    #[test]
    fn output_reaches_the_console_in_any_width() {
        let (serial, console) = serial();
        for byte in b"ab" {
            serial.write(Access::at(0), &[*byte]).unwrap();
        }
        assert_eq!(console.tail(), b"ab");
        serial.write(Access::at(0), &[b'c', 0, 0, 3]).unwrap();
        assert_eq!(console.tail(), b"abc");
    }

    /// Row 22 of the hostile inputs: input far beyond the FIFO while the guest does not read.
    #[test]
    fn input_waits_in_order_and_is_bounded() {
        let (serial, console) = serial();
        let mut taken = 0;
        for i in 0..100_000u32 {
            taken += console.push_input(&[i as u8]);
        }
        assert!(taken < 10_000, "{taken} bytes were taken though nobody reads");
        for i in 0..taken {
            assert_eq!(read(&serial, 5) & 1, 1, "data is ready at {i}");
            assert_eq!(read(&serial, 0), i as u8);
        }
        assert_eq!(read(&serial, 5) & 1, 0);
    }

    #[test]
    fn any_access_is_answered() {
        let (serial, _) = serial();
        for offset in 0..8 {
            for len in 1..=8 {
                serial.write(Access::at(offset), &vec![0xa5; len]).unwrap();
                serial.read(Access::at(offset), &mut vec![0xff; len]).unwrap();
            }
        }
    }
}
