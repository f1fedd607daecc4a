#![forbid(unsafe_code)]
//! virtio-rng (5.4): random bytes from the host's generator.

use std::io;

use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::queue::{Chain, Next, QueueFault};
use super::server::{Serve, Server};
use super::{Activation, Queue, Signals, VirtioDevice};
use crate::error::{Error, ErrorKind, Result};
use crate::memory::Memory;
use crate::reactor::{Attached, Place};
use crate::sys::io::random;
use crate::sys::log;

const QUEUE_SIZE: u16 = 64;

/// Bytes for one request. A driver that asks for more gets this much now and asks again (5.4.6.2): a
/// request of 4 GiB does not keep the loop.
const PIECE: usize = 4096;

/// The source of random numbers of a guest.
pub(crate) struct Rng {
    id: String,
    place: Place,
    worker: Option<Attached<Server<Random>>>,
}

impl Rng {
    pub fn new(id: &str, place: Place) -> Self {
        Self { id: id.into(), place, worker: None }
    }

    /// Serves the queue on the caller's thread: for drivers in this process ([`Place::Caller`]).
    #[cfg(any(test, feature = "internals"))]
    pub fn process_queue(&self) {
        if let Some(worker) = &self.worker {
            worker.with(Server::process_queue);
        }
    }
}

impl VirtioDevice for Rng {
    fn id(&self) -> &str {
        &self.id
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, _: u64, _: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<()> {
        let refused = |why: &str| Error::new(ErrorKind::InvalidState, format!("{}: {why}", self.id));
        let Activation { features: _, memory, mut queues, signals } = activation;
        let Some(queue) = queues.first_mut().and_then(Option::take) else {
            return Err(refused("the driver has not enabled the queue"));
        };
        if self.worker.is_some() {
            return Err(refused("is active already"));
        }
        let server = Server::new(queue, memory, signals, Random);
        self.worker = Some(self.place.attach(server, &self.id)?);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<Option<Queue>> {
        let Some(worker) = self.worker.take() else { return Vec::new() };
        match worker.detach() {
            Ok(worker) => vec![Some(worker.queue)],
            Err(error) => {
                log::warn!("{}: {error}", self.id);
                vec![None]
            }
        }
    }
}

/// Serves what the kernel's generator gives.
struct Random;

impl Serve for Random {
    /// Answers one request; with nothing where it has no room for anything.
    fn serve(
        &mut self,
        queue: &mut Queue,
        memory: &Memory,
        chain: &Chain,
        signals: &Signals,
    ) -> Result<Next, QueueFault> {
        let mut bytes = [0; PIECE];
        let wanted = if chain.readable.is_empty() { chain.writable_len() } else { 0 };
        let bytes = &mut bytes[..wanted.min(PIECE as u64) as usize];
        let written = match random_exact(bytes) {
            Ok(()) => chain.writer(memory).write(bytes).map_or(0, |()| bytes.len() as u32),
            Err(error) => {
                signals.backend_error(error.raw_os_error().unwrap_or(libc::EIO), 0);
                0
            }
        };
        queue.complete(memory, chain.head, written).map(|()| Next::More)
    }
}

fn random_exact(mut bytes: &mut [u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match random(bytes) {
            Ok(count) => bytes = &mut bytes[count..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::queue_driver::{Dice, Driver, WRITE, activation, bend, signals};

    fn bench() -> (Driver, Rng, Signals) {
        let driver = Driver::new(&Memory::new(1 << 20).unwrap(), 0x4000, 16);
        let (signals, _) = signals("rng0");
        let mut rng = Rng::new("rng0", Place::Caller);
        rng.activate(activation(0, &[&driver], &signals)).unwrap();
        (driver, rng, signals)
    }

    #[test]
    fn bytes_come_and_differ() {
        let (mut driver, rng, _) = bench();
        driver.send(&[(0x1_0000, 16, WRITE), (0x2_0000, 16, WRITE)]);
        rng.process_queue();
        assert_eq!(driver.take_used(), Some((0, 32)));
        let (a, b) = (driver.bytes::<16>(0x1_0000), driver.bytes::<16>(0x2_0000));
        assert!(a != b && a != [0; 16] && b != [0; 16]);
        assert_eq!(driver.interrupt.take_raised(), 1);
    }

    #[test]
    fn a_huge_request_gets_a_piece_and_a_useless_one_nothing() {
        let (mut driver, rng, signals) = bench();
        driver.send(&[(0x1_0000, u32::MAX, WRITE), (0, u32::MAX, WRITE)]);
        driver.send(&[(0x1_0000, 16, 0)]);
        driver.send(&[(0x1_0000, 0, WRITE)]);
        driver.send(&[(0xc000_0000, 16, WRITE)]);
        rng.process_queue();
        let used: Vec<_> = std::iter::from_fn(|| driver.take_used()).map(|(_, len)| len).collect();
        assert_eq!(used, [PIECE as u32, 0, 0, 0]);
        assert_eq!(signals.status(), 0);
    }

    #[test]
    fn bent_rings_never_stop_the_process_and_a_reset_always_helps() {
        let (mut driver, mut rng, signals) = bench();
        let mut dice = Dice(3);
        for _ in 0..2000 {
            bend(&mut driver, &mut dice);
            rng.process_queue();
            if signals.status() != 0 {
                rng.deactivate();
                signals.set_status(0);
                driver.reset();
                rng.activate(activation(0, &[&driver], &signals)).unwrap();
                driver.send(&[(0x1_0000, 16, WRITE)]);
                rng.process_queue();
                assert_eq!(driver.take_used(), Some((0, 16)));
            }
        }
    }
}
