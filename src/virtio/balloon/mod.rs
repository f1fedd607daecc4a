#![forbid(unsafe_code)]
//! virtio-balloon (5.5): the guest gives memory up, the host has it.
//!
//! Three ways lead here: the balloon proper, which the guest fills up to a target that the host sets; free page
//! reporting, by which the guest names large free ranges as it goes along; and free page hints, by which it names all
//! that is free when it is asked to. Each counts what the guest claimed and what the host got.

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use super::{Activation, Queue, VirtioDevice, read_config_space};
use crate::config::BalloonConfig;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::Memory;
use crate::reactor::{Attached, Place};
use crate::sys::log;
pub(crate) use control::Control;
pub use statistics::{BalloonStatistics, GivenBack, GuestMemory};
use worker::{Kept, Queues, Terms, Worker};

mod control;
mod discard;
mod parts;
mod statistics;
#[cfg(test)]
mod tests;
mod worker;

/// A page of a balloon, whatever the guest's own are (5.5.6).
const PAGE: u64 = 4096;
/// Entries of each queue.
const QUEUE_SIZE: u16 = 128;

// Feature bits (5.5.3).
const MUST_TELL_HOST: u64 = 1 << 0;
const STATS_VQ: u64 = 1 << 1;
const DEFLATE_ON_OOM: u64 = 1 << 2;
const FREE_PAGE_HINT: u64 = 1 << 3;
const PAGE_POISON: u64 = 1 << 4;
const PAGE_REPORTING: u64 = 1 << 5;

/// Where the driver writes `actual` and `poison_val` (5.5.4).
const ACTUAL: u64 = 4;
const POISON_VAL: u64 = 12;

/// The balloon of a guest.
pub(crate) struct Balloon {
    id: String,
    features: u64,
    /// One for each feature that has one.
    queue_sizes: Vec<u16>,
    control: Arc<Control>,
    place: Place,
    state: State,
    /// Of which drivers have given something back.
    memory: Option<Memory>,
}

enum State {
    /// What the last driver left, if it was only paused.
    Idle(Kept),
    /// Its features, as they say where each queue is.
    Active(Attached<Worker>, Numbers),
}

/// The number of each queue that the driver has, in the order of [`Queues::all`].
type Numbers = [Option<usize>; 5];

impl Balloon {
    pub fn new(id: &str, config: &BalloonConfig, control: Arc<Control>, place: Place) -> Self {
        let mut features = MUST_TELL_HOST | STATS_VQ | PAGE_POISON;
        let wanted = [
            (config.deflate_on_oom, DEFLATE_ON_OOM),
            (config.reporting, PAGE_REPORTING),
            (config.hinting, FREE_PAGE_HINT),
        ];
        features |= wanted.into_iter().filter(|(on, _)| *on).fold(0, |all, (_, bit)| all | bit);
        // By their numbers in the specification: there may be gaps that no driver uses.
        let count = if config.reporting { 5 } else { 3 + usize::from(config.hinting) };
        let (queue_sizes, state) = (vec![QUEUE_SIZE; count], State::Idle(Kept::default()));
        Self { id: id.into(), features, queue_sizes, control, place, state, memory: None }
    }

    /// Serves the queues on the caller's thread: for drivers in this process ([`Place::Caller`]).
    #[cfg(any(test, feature = "internals"))]
    pub fn process_queues(&self) {
        if let State::Active(worker, _) = &self.state {
            worker.with(Worker::process_queues);
        }
    }
}

/// Which queue is which. The specification gives each a number (5.5.2). Linux before 6.11 leaves no gaps where a feature
/// has not been accepted, and asks for the next number instead.
fn numbers(features: u64, queues: &[Option<Queue>]) -> Numbers {
    let wants = [u64::MAX, u64::MAX, STATS_VQ, FREE_PAGE_HINT, PAGE_REPORTING].map(|bit| features & bit != 0);
    let is_there = |number: usize| queues.get(number).is_some_and(Option::is_some);
    let specified: Numbers = std::array::from_fn(|i| wants[i].then_some(i));
    if specified.into_iter().flatten().all(is_there) {
        return specified;
    }
    let mut next = 0;
    wants.map(|wanted| {
        next += usize::from(wanted);
        wanted.then_some(next.wrapping_sub(1)).filter(|number| is_there(*number))
    })
}

impl VirtioDevice for Balloon {
    fn id(&self) -> &str {
        &self.id
    }

    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_space(&self.control.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else { return };
        match offset {
            ACTUAL => self.control.set_actual(value),
            POISON_VAL => self.control.set_poison(value),
            _ => {}
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<()> {
        let refused = |why: &str| Error::new(ErrorKind::InvalidState, format!("{}: {why}", self.id));
        let Activation { features, memory, mut queues, signals } = activation;
        let State::Idle(kept) = &mut self.state else { return Err(refused("is active already")) };
        self.memory = Some(memory.clone());
        let numbers = numbers(features, &queues);
        if numbers[0].is_none() || numbers[1].is_none() {
            return Err(refused("the driver has not enabled the queues to inflate and deflate"));
        }
        let mut mine = Queues::default();
        for (queue, number) in mine.all().into_iter().zip(numbers) {
            *queue = number.and_then(|number| queues.get_mut(number)?.take());
        }
        self.control.attach(mine.statistics.is_some(), mine.hints.is_some());
        let terms =
            Terms { tells_first: features & MUST_TELL_HOST != 0, poison: features & PAGE_POISON != 0 };
        let kept = std::mem::take(kept);
        let worker = Worker::new(mine, memory, signals, self.control.clone(), terms, kept);
        let worker = worker.map_err(|e| Error::os(format!("creating a timer for {}", self.id), e))?;
        self.state = State::Active(self.place.attach(worker, &self.id)?, numbers);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<Option<Queue>> {
        if let State::Idle(_) = self.state {
            return Vec::new();
        }
        let idle = State::Idle(Kept::default());
        let State::Active(worker, numbers) = std::mem::replace(&mut self.state, idle) else {
            return Vec::new();
        };
        let mut queues: Vec<Option<Queue>> = self.queue_sizes.iter().map(|_| None).collect();
        // What is held is given back on its own thread: whoever stops it, as a vCPU does, makes no call for it.
        let worker = worker.detach().inspect_err(|error| log::warn!("{}: {error}", self.id));
        let Ok(worker) = worker else { return queues };
        match self.place.run(move || worker.finish()) {
            Ok((mut mine, kept)) => {
                for (queue, number) in mine.all().into_iter().zip(numbers) {
                    if let Some(place) = number.and_then(|number| queues.get_mut(number)) {
                        *place = queue.take();
                    }
                }
                self.state = State::Idle(kept);
            }
            Err(error) => self.place.fault(&self.id, &error),
        }
        queues
    }

    fn reset(&mut self) {
        if let State::Idle(kept) = &mut self.state {
            *kept = Kept::default();
        }
        // The next driver knows nothing of what the last one gave back.
        if let Some(memory) = self.memory.take().filter(Memory::is_pooled) {
            let ending = self.place.ending();
            let restored = self.place.run(move || memory.restore(0, u64::MAX, || !ending()));
            let _ = restored.inspect_err(|error| self.place.fault(&self.id, error));
        }
        self.control.reset();
    }
}
