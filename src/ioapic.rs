#![forbid(unsafe_code)]
//! The IOAPIC: an Intel 82093AA, for KVM's split interrupt controller.
//!
//! Every redirection entry is a message-signalled interrupt in another shape; a pin's message is sent
//! when the pin is raised. KVM knows the messages of level-triggered pins from the routing table, and
//! exits at the end of their interrupts.
//!
//! The version is 0x20, not the 82093AA's 0x11: with a split interrupt controller KVM's local APICs
//! offer to suppress the broadcast of EOIs, and a guest that accepts needs the EOI register, which
//! came with 0x20.
//!
//! An edge on a masked pin is lost, as in the 82093AA's data sheet ("not delivered or held pending"),
//! in QEMU and, as far as the guest can tell, in KVM's own IOAPIC. Linux relies on no more: it leaves
//! disabled edge interrupts unmasked and replays them itself.

use std::sync::{Arc, Mutex};

use crate::bus::{Access, Device};
use crate::error::Result;
use crate::irq::{IOAPIC_PINS, Msi, Routes};
use crate::sys::lock;
use crate::sys::log;

/// Offsets from the base address.
const IOREGSEL: u64 = 0x00;
const IOWIN: u64 = 0x10;
const EOI: u64 = 0x40;

/// Registers behind IOREGSEL and IOWIN.
const IOAPICID: u8 = 0x00;
const IOAPICVER: u8 = 0x01;
const IOAPICARB: u8 = 0x02;
const IOREDTBL: u8 = 0x10;

const VERSION: u32 = 0x20;
/// The ID that the guest may give it: four bits.
const ID_MASK: u32 = 0x0f00_0000;

/// A redirection entry (82093AA data sheet, 3.2.4).
const VECTOR: u64 = 0xff;
const DELIVERY_MODE: u64 = 0x7 << 8;
const LOGICAL: u64 = 1 << 11;
const DELIVERY_STATUS: u64 = 1 << 12;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const DESTINATION_SHIFT: u32 = 56;
const READ_ONLY: u64 = DELIVERY_STATUS | REMOTE_IRR;

/// Where message-signalled interrupts are written to (Intel SDM volume 3, 11.11.1).
const MSI_BASE: u64 = 0xfee0_0000;

/// Everything that an IOAPIC remembers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct State {
    pub id: u32,
    /// IOREGSEL.
    pub select: u8,
    pub entries: [u64; IOAPIC_PINS as usize],
    /// The pins that are high now: bit n for pin n.
    pub high: u32,
}

impl Default for State {
    fn default() -> Self {
        Self { id: 0, select: 0, entries: [MASKED; IOAPIC_PINS as usize], high: 0 }
    }
}

/// The interrupt controller between the fixed devices' lines and the local APICs.
pub(crate) struct Ioapic {
    routes: Arc<Routes>,
    state: Mutex<State>,
}

impl Ioapic {
    pub fn new(routes: Arc<Routes>) -> Arc<Self> {
        Arc::new(Self { routes, state: Mutex::default() })
    }

    /// The input line of `pin`. A pin that does not exist goes nowhere.
    pub fn line(self: &Arc<Self>, pin: u8) -> IrqLine {
        IrqLine { ioapic: self.clone(), pin }
    }

    /// A local APIC has finished `vector` (`KVM_EXIT_IOAPIC_EOI`): a level-triggered pin that sent it
    /// may send it again, and does so at once while it is still high.
    pub fn end_of_interrupt(&self, vector: u8) {
        let mut state = lock(&self.state);
        for pin in 0..state.entries.len() {
            let entry = &mut state.entries[pin];
            if *entry & (LEVEL | REMOTE_IRR | VECTOR) == LEVEL | REMOTE_IRR | u64::from(vector) {
                *entry &= !REMOTE_IRR;
                self.serve_level(&mut state, pin);
            }
        }
    }

    #[cfg(test)]
    pub fn state(&self) -> State {
        lock(&self.state).clone()
    }

    /// Takes over another's state. Nothing is sent: what was under way is in the local APICs' state.
    #[cfg(test)]
    pub fn restore(&self, saved: State) -> Result<()> {
        let mut state = lock(&self.state);
        *state = saved;
        (0..state.entries.len()).try_for_each(|pin| self.route(pin, state.entries[pin]))
    }

    fn drive(&self, state: &mut State, pin: u8, high: bool) {
        let pin = usize::from(pin);
        let Some(entry) = state.entries.get(pin).copied() else { return };
        let rises = high && state.high & (1 << pin) == 0;
        state.high = state.high & !(1 << pin) | u32::from(high) << pin;
        if entry & LEVEL != 0 {
            self.serve_level(state, pin);
        } else if rises && entry & MASKED == 0 {
            self.send(entry);
        }
    }

    /// Sends a level-triggered pin's message if it is high, unmasked, and the last one was finished.
    fn serve_level(&self, state: &mut State, pin: usize) {
        let entry = state.entries[pin];
        let ready = entry & (LEVEL | MASKED | REMOTE_IRR) == LEVEL;
        if ready && state.high & (1 << pin) != 0 && self.send(entry) {
            state.entries[pin] |= REMOTE_IRR;
        }
    }

    /// Whether some local APIC took it.
    fn send(&self, entry: u64) -> bool {
        match self.routes.signal(message(entry)) {
            Ok(()) => true,
            // KVM fails this when no vCPU has the entry's destination: the guest's mistake, and on the
            // bus of a PC nobody would answer either.
            Err(error) => {
                log::trace!("ioapic: entry {entry:#x}: {error}");
                false
            }
        }
    }

    /// Tells KVM whose ends of interrupt we need: those of level-triggered pins, masked or not, because
    /// Linux masks a pin before it finishes its interrupt. Edge-triggered pins stay out of the table,
    /// which is costly to change.
    fn route(&self, pin: usize, entry: u64) -> Result<()> {
        self.routes.set_pin(pin as u8, (entry & LEVEL != 0).then(|| message(entry)))
    }

    fn read_register(state: &State) -> u32 {
        match state.select {
            IOAPICID | IOAPICARB => state.id,
            IOAPICVER => VERSION | (IOAPIC_PINS - 1) << 16,
            select => match entry_index(select) {
                Some((pin, shift)) => (state.entries[pin] >> shift) as u32,
                None => u32::MAX,
            },
        }
    }

    fn write_register(&self, state: &mut State, value: u32) -> Result<()> {
        if state.select == IOAPICID {
            state.id = value & ID_MASK;
        }
        let Some((pin, shift)) = entry_index(state.select) else { return Ok(()) };
        let old = state.entries[pin];
        let writable = (0xffff_ffff << shift) & !READ_ONLY;
        let mut entry = old & !writable | (u64::from(value) << shift) & writable;
        if entry & LEVEL == 0 {
            // Not in the data sheet, but so does hardware, and Linux clears a stuck bit this way.
            entry &= !REMOTE_IRR;
        }
        state.entries[pin] = entry;
        self.route(pin, entry)?;
        self.serve_level(state, pin);
        Ok(())
    }
}

/// The pin and half of the redirection entry that IOREGSEL selects.
fn entry_index(select: u8) -> Option<(usize, u32)> {
    let index = usize::from(select.checked_sub(IOREDTBL)?);
    (index / 2 < IOAPIC_PINS as usize).then_some((index / 2, (index % 2) as u32 * 32))
}

/// What a redirection entry sends.
fn message(entry: u64) -> Msi {
    let destination = entry >> DESTINATION_SHIFT;
    let logical = u64::from(entry & LOGICAL != 0);
    // Vector, delivery mode and trigger mode are at the same bits in both shapes.
    let data = entry & (VECTOR | DELIVERY_MODE | LEVEL);
    Msi { address: MSI_BASE | destination << 12 | logical << 2, data: data as u32 }
}

impl Device for Ioapic {
    fn read(&self, access: Access, data: &mut [u8]) -> Result<()> {
        let state = lock(&self.state);
        let value = match access.offset {
            IOREGSEL => u32::from(state.select),
            IOWIN => Self::read_register(&state),
            _ => return Ok(()),
        };
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
        Ok(())
    }

    fn write(&self, access: Access, data: &[u8]) -> Result<()> {
        match (access.offset, data) {
            (IOREGSEL, [select, ..]) => lock(&self.state).select = *select,
            (EOI, [vector, ..]) => self.end_of_interrupt(*vector),
            // The data window is 32 bits wide and takes nothing less.
            (IOWIN, [a, b, c, d, ..]) => {
                let value = u32::from_le_bytes([*a, *b, *c, *d]);
                return self.write_register(&mut lock(&self.state), value);
            }
            _ => {}
        }
        Ok(())
    }
}

/// One input of the IOAPIC. Clones drive the same pin.
#[derive(Clone)]
pub(crate) struct IrqLine {
    ioapic: Arc<Ioapic>,
    pin: u8,
}

impl IrqLine {
    /// Raises and lowers the line: one edge. Never blocks.
    pub fn pulse(&self) {
        // Under one lock: two pulses at the same time must not melt into one.
        let mut state = lock(&self.ioapic.state);
        self.ioapic.drive(&mut state, self.pin, true);
        self.ioapic.drive(&mut state, self.pin, false);
    }

    /// Drives the line high or low.
    #[cfg(any(test, feature = "internals"))]
    pub fn set_level(&self, high: bool) {
        self.ioapic.drive(&mut lock(&self.ioapic.state), self.pin, high);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Rig {
        routes: Arc<Routes>,
        ioapic: Arc<Ioapic>,
    }

    impl Rig {
        fn new() -> Self {
            let routes = Routes::new(None);
            Self { ioapic: Ioapic::new(routes.clone()), routes }
        }
        fn write(&self, register: u8, value: u32) {
            self.ioapic.write(Access::at(IOREGSEL), &u32::from(register).to_le_bytes()).unwrap();
            self.ioapic.write(Access::at(IOWIN), &value.to_le_bytes()).unwrap();
        }
        fn read(&self, register: u8) -> u32 {
            self.ioapic.write(Access::at(IOREGSEL), &[register]).unwrap();
            let mut data = [0xff; 4];
            self.ioapic.read(Access::at(IOWIN), &mut data).unwrap();
            u32::from_le_bytes(data)
        }
        /// As Linux does: the high half first.
        fn program(&self, pin: u8, entry: u64) {
            self.write(0x11 + 2 * pin, (entry >> 32) as u32);
            self.write(0x10 + 2 * pin, entry as u32);
        }
        fn sent(&self) -> Vec<Msi> {
            self.routes.take_signalled()
        }
    }

    #[test]
    fn registers_read_as_an_ioapic_with_an_eoi_register() {
        let rig = Rig::new();
        assert_eq!(rig.read(1), 0x0009_0020, "the version, and the last pin");
        rig.write(0, u32::MAX);
        assert_eq!((rig.read(0), rig.read(2)), (0x0f00_0000, 0x0f00_0000));
        rig.write(1, 0);
        assert_eq!(rig.read(1), 0x0009_0020, "the version cannot be written");
        assert_eq!((rig.read(0x10), rig.read(0x23)), (MASKED as u32, 0));
        rig.write(0x22, u32::MAX);
        assert_eq!(rig.read(0x22), !(READ_ONLY as u32), "delivery status and remote IRR are read-only");
    }

    #[test]
    fn an_edge_is_sent_as_the_message_of_its_entry() {
        let rig = Rig::new();
        rig.program(4, 3 << 56 | LOGICAL | 1 << 8 | 0x31);
        rig.ioapic.line(4).pulse();
        rig.ioapic.line(4).pulse();
        assert_eq!(rig.sent(), [Msi { address: 0xfee0_3004, data: 0x131 }; 2]);
        rig.ioapic.line(4).set_level(true);
        rig.ioapic.line(4).set_level(true);
        assert_eq!(rig.sent().len(), 1, "high stays high: one edge");
    }

    #[test]
    fn an_edge_on_a_masked_pin_is_lost() {
        let rig = Rig::new();
        rig.ioapic.line(4).pulse();
        rig.program(4, 0x31);
        assert_eq!(rig.sent(), []);
        rig.ioapic.line(4).pulse();
        assert_eq!(rig.sent().len(), 1);
    }

    #[test]
    fn a_level_waits_for_the_end_of_interrupt_and_comes_again_while_high() {
        let rig = Rig::new();
        let line = rig.ioapic.line(9);
        rig.program(9, LEVEL | 0x42);
        line.set_level(true);
        line.set_level(true);
        assert_eq!(rig.sent(), [Msi { address: 0xfee0_0000, data: 0x8042 }]);
        assert_eq!(rig.read(0x10 + 18), (LEVEL | REMOTE_IRR | 0x42) as u32);
        rig.ioapic.end_of_interrupt(0x41);
        assert_eq!(rig.sent(), [], "somebody else's vector");
        rig.ioapic.end_of_interrupt(0x42);
        assert_eq!(rig.sent().len(), 1, "still high");
        line.set_level(false);
        rig.ioapic.write(Access::at(EOI), &0x42u32.to_le_bytes()).unwrap();
        assert_eq!(rig.sent(), [], "low: the device was served");
        assert_eq!(rig.read(0x10 + 18), (LEVEL | 0x42) as u32);
    }

    #[test]
    fn a_level_that_is_high_when_the_pin_is_unmasked_is_sent() {
        let rig = Rig::new();
        rig.program(9, LEVEL | MASKED | 0x42);
        rig.ioapic.line(9).set_level(true);
        assert_eq!(rig.sent(), []);
        rig.program(9, LEVEL | 0x42);
        assert_eq!(rig.sent().len(), 1);
        // Linux frees a pin that is stuck: masked and edge, then level again.
        rig.program(9, MASKED | 0x42);
        rig.program(9, LEVEL | MASKED | 0x42);
        rig.program(9, LEVEL | 0x42);
        assert_eq!(rig.sent().len(), 1, "remote IRR was cleared");
    }

    #[test]
    fn kvm_learns_the_messages_of_level_pins_only() {
        let rig = Rig::new();
        let routed = Msi { address: 0xfee0_1000, data: 0x8042 };
        rig.program(4, 1 << 56 | 0x31);
        assert_eq!(rig.routes.pin(4), None);
        rig.program(9, 1 << 56 | LEVEL | 0x42);
        assert_eq!(rig.routes.pin(9), Some(routed));
        rig.program(9, 1 << 56 | LEVEL | MASKED | 0x42);
        assert_eq!(rig.routes.pin(9), Some(routed), "its end of interrupt may still come");
        rig.program(9, MASKED);
        assert_eq!(rig.routes.pin(9), None);
    }

    #[test]
    fn the_state_moves_to_another_ioapic_without_a_second_interrupt() {
        let rig = Rig::new();
        rig.program(9, LEVEL | 0x42);
        rig.ioapic.line(9).set_level(true);
        let other = Rig::new();
        other.ioapic.restore(rig.ioapic.state()).unwrap();
        assert_eq!(other.sent(), []);
        assert_eq!(other.routes.pin(9), rig.routes.pin(9));
        other.ioapic.end_of_interrupt(0x42);
        assert_eq!(other.sent().len(), 1);
        assert_eq!(other.ioapic.state(), rig.ioapic.state());
    }

    #[test]
    fn any_access_is_answered() {
        let rig = Rig::new();
        rig.program(3, 0x33);
        // Miri takes a thousand times as long.
        let (selects, far, near) = if cfg!(miri) { (51, 0x800, 8) } else { (1, 4, 1) };
        for select in (0..=255).step_by(selects) {
            rig.ioapic.write(Access::at(IOREGSEL), &[select]).unwrap();
            for offset in (0..0x1000).step_by(far).chain((0..0x50).step_by(near)) {
                for size in 0..=8 {
                    let mut data = vec![0xff; size];
                    rig.ioapic.read(Access::at(offset), &mut data).unwrap();
                    if offset != IOREGSEL {
                        rig.ioapic.write(Access::at(offset), &data).unwrap();
                    }
                }
            }
        }
        let mut wide = [0xff; 8];
        rig.ioapic.write(Access::at(IOREGSEL), &[1]).unwrap();
        rig.ioapic.read(Access::at(IOWIN), &mut wide).unwrap();
        assert_eq!(wide, [0x20, 0, 0x09, 0, 0xff, 0xff, 0xff, 0xff]);
        let line = rig.ioapic.line(200);
        line.pulse();
        assert_eq!(rig.read(0x10 + 2 * IOAPIC_PINS as u8), u32::MAX, "no such pin");
    }

    #[test]
    fn a_narrow_write_to_the_window_changes_nothing() {
        let rig = Rig::new();
        rig.program(4, 0x31);
        rig.ioapic.write(Access::at(IOREGSEL), &[0x18]).unwrap();
        rig.ioapic.write(Access::at(IOWIN), &[0xff, 0xff]).unwrap();
        assert_eq!(rig.read(0x18), 0x31);
    }
}
