#![forbid(unsafe_code)]
//! The drivers of the crate `virtio-drivers`, written by others for other machines, on our registers.
//!
//! Its own PCI transport dereferences BARs; this one makes the accesses one by one.

use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{PhysAddr, Result};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{NO_VECTOR, Registers};
pub(crate) use crate::sys::guest_pages::GuestPages;

/// The transport for a device that [`Registers`] has found.
pub(crate) struct OurPci {
    registers: Registers,
    /// Called after each doorbell: for devices that their caller drives.
    after_notify: Box<dyn FnMut(u16)>,
}

impl OurPci {
    pub fn new(registers: Registers, after_notify: impl FnMut(u16) + 'static) -> Self {
        Self { registers, after_notify: Box::new(after_notify) }
    }

    fn select(&self, queue: u16) {
        self.registers.set(0x16, 2, queue.into());
    }
}

impl Transport for OurPci {
    fn device_type(&self) -> DeviceType {
        let id = self.registers.machine.config(self.registers.device, 2, 2) as u16;
        DeviceType::try_from(id - 0x1040).unwrap()
    }

    fn read_device_features(&mut self) -> u64 {
        self.registers.offered()
    }

    fn write_driver_features(&mut self, features: u64) {
        self.registers.accept(features);
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.select(queue);
        self.registers.get(0x18, 2) as u32
    }

    fn notify(&mut self, queue: u16) {
        self.registers.ring(queue);
        (self.after_notify)(queue);
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_retain(self.registers.status().into())
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.registers.set_status(status.bits() as u8);
    }

    fn set_guest_page_size(&mut self, _: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(&mut self, queue: u16, size: u32, desc: PhysAddr, avail: PhysAddr, used: PhysAddr) {
        self.select(queue);
        self.registers.set(0x18, 2, size.into());
        self.registers.set(0x1a, 2, NO_VECTOR.into());
        // In one piece each, where the other driver in these tests writes halves.
        self.registers.set(0x20, 8, desc);
        self.registers.set(0x28, 8, avail);
        self.registers.set(0x30, 8, used);
        self.registers.set(0x1c, 2, 1);
    }

    fn queue_unset(&mut self, _: u16) {
        // Over PCI there is no way back but a reset of the device.
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.select(queue);
        self.registers.get(0x1c, 2) == 1
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        InterruptStatus::from_bits_retain(self.registers.machine.read(self.registers.isr, 1) as u32)
    }

    fn read_config_generation(&self) -> u32 {
        self.registers.get(0x15, 1) as u32
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T> {
        let mut value = T::new_zeroed();
        let step = width(size_of::<T>());
        for (piece, at) in value.as_mut_bytes().chunks_mut(step).zip((offset as u64..).step_by(step)) {
            let read = self.registers.machine.read(self.registers.config + at, step);
            piece.copy_from_slice(&read.to_le_bytes()[..step]);
        }
        Ok(value)
    }

    fn write_config_space<T: IntoBytes + Immutable>(&mut self, offset: usize, value: T) -> Result<()> {
        let step = width(size_of::<T>());
        for (piece, at) in value.as_bytes().chunks(step).zip((offset as u64..).step_by(step)) {
            let value = piece.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b));
            self.registers.machine.write(self.registers.config + at, step, value);
        }
        Ok(())
    }
}

impl Drop for OurPci {
    fn drop(&mut self) {
        // The drivers free their rings after this: nobody may serve them any more.
        self.registers.set_status(0);
    }
}

/// The width in which a field is accessed (4.1.3.1): its own up to four bytes, arrays byte by byte.
fn width(size: usize) -> usize {
    match size {
        2 => 2,
        n if n.is_multiple_of(4) => 4,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use virtio_drivers::device::blk::VirtIOBlk;
    use virtio_drivers::queue::VirtQueue;

    use super::super::echo::Echo;
    use super::super::{Machine, VERSION_1};
    use super::*;
    use crate::block::RawDisk;
    use crate::events::StopLine;
    use crate::memory::Memory;
    use crate::reactor::{EventLoop, Place};
    use crate::virtio::VirtioDevice;
    use crate::virtio::blk::Blk;

    fn machine(device: Box<dyn VirtioDevice>) -> Arc<Machine> {
        let memory = Memory::new(4 << 20).unwrap();
        GuestPages::provide(memory.guest(), 0x10_0000);
        Machine::new(&memory, vec![device])
    }

    #[test]
    fn its_queues_and_ours_understand_each_other() {
        bitflags::bitflags! {
            #[derive(Debug)]
            struct Features: u64 {
                const VERSION_1 = VERSION_1;
                const EVENT_IDX = 1 << 29;
                const INDIRECT = 1 << 28;
            }
        }
        for wanted in [Features::VERSION_1, Features::all()] {
            let echo = Echo::default();
            let machine = machine(echo.boxed());
            let processed = echo.clone();
            let serve = move |_| assert!(processed.process() > 0, "it rang for nothing");
            let mut transport = OurPci::new(Registers::find(&machine, 1), serve);
            let agreed = transport.begin_init(wanted);
            let (indirect, event_idx) =
                (agreed.contains(Features::INDIRECT), agreed.contains(Features::EVENT_IDX));
            let new = |transport: &mut OurPci, index| {
                VirtQueue::<GuestPages, 8>::new(transport, index, indirect, event_idx).unwrap()
            };
            let mut queues = [new(&mut transport, 0), new(&mut transport, 1)];
            transport.finish_init();
            assert_eq!(echo.features(), Some(agreed.bits()));
            for round in 0..50u8 {
                for queue in &mut queues {
                    let (mut first, mut rest) = ([0; 5], [0; 3]);
                    let request = [&[round; 3][..], &[round + 1; 5]];
                    let done = queue
                        .add_notify_wait_pop(&request, &mut [&mut first, &mut rest], &mut transport)
                        .unwrap();
                    assert_eq!(done, 8);
                    assert_eq!([&first[..], &rest].concat(), request.concat());
                }
            }
            drop(transport);
            assert_eq!(echo.features(), None, "its reset");
        }
    }

    #[test]
    fn its_disk_driver_works_our_disk() {
        let file = crate::sys::memory::sealed_memfd(c"disk", 1 << 20).unwrap();
        let disk = RawDisk::plain("disk0: test", file, false).unwrap();
        let event_loop = EventLoop::start("test", |body| Ok(std::thread::spawn(body))).unwrap();
        let place = Place::Loop(event_loop.clone(), StopLine::new(|cause| panic!("{cause}")));
        let machine = machine(Box::new(Blk::simple("disk0", "serial-1", Box::new(disk), place)));
        for round in 1..4u8 {
            let transport = OurPci::new(Registers::find(&machine, 1), |_| {});
            let mut blk = VirtIOBlk::<GuestPages, _>::new(transport).unwrap();
            assert_eq!((blk.capacity(), blk.readonly()), (2048, false));
            let mut back = [0; 4096];
            blk.read_blocks(2040, &mut back).unwrap();
            assert_eq!(back, [round - 1; 4096], "what the last round left");
            blk.write_blocks(2040, &[round; 4096]).unwrap();
            blk.flush().unwrap();
            blk.read_blocks(2040, &mut back).unwrap();
            assert_eq!(back, [round; 4096]);
            assert!(blk.read_blocks(2041, &mut back).is_err(), "past the end");
            let mut id = [0; 20];
            let len = blk.device_id(&mut id).unwrap();
            assert_eq!(&id[..len], b"serial-1");
        }
        machine.functions[0].end();
        event_loop.stop();
    }
}
