#![forbid(unsafe_code)]
//! Frames from the backend to the driver, read straight into its buffers.
//!
//! A frame is read only when there is a buffer for it: while the driver gives none, frames wait in the
//! backend and are dropped there, visibly. What has been read is kept until it is delivered.

use std::io::{self, ErrorKind};
use std::sync::Arc;

use super::header::to_driver;
use super::statistics::Counters;
use crate::memory::Memory;
use crate::net::{HEADER_LEN, MAX_FRAME, MIN_FRAME, NetBackend};
use crate::sys::io::Pieces;
use crate::virtio::queue::{Chain, Queue, QueueFault};

/// Frames in one wake-up; the backend's fd stays readable for the rest.
const SHARE: u32 = 256;

/// The receive queue.
pub(super) struct Rx {
    pub queue: Queue,
    /// A frame may fill several buffers (VIRTIO_NET_F_MRG_RXBUF).
    mergeable: bool,
    /// The buffer for the next frame, when `held`.
    chain: Chain,
    held: bool,
    /// The further buffers of a long frame.
    tail: Chain,
    parts: Vec<(u16, u32)>,
    pieces: Pieces,
    pub overflow: Overflow,
    counters: Arc<Counters>,
}

/// Room for what does not fit into the driver's buffer, and for a frame that waits for more of them.
/// It outlives the queue: a frame kept at a pause is delivered after it.
pub(super) struct Overflow {
    room: Box<[u8]>,
    /// The length of the frame, without header, that waits in `room`; 0 for none.
    kept: usize,
}

impl Default for Overflow {
    fn default() -> Self {
        // From the allocator's zero pages: untouched until a frame is long.
        Self { room: vec![0; MAX_FRAME].into(), kept: 0 }
    }
}

/// Why a run ended.
#[derive(Debug)]
pub(super) enum Received {
    /// The driver has given no (or not enough) buffers: again when its doorbell rings.
    NoBuffers,
    /// The backend has nothing, or one wake-up's share is done: again when its fd is readable.
    NoFrames,
    /// The backend is gone.
    Gone(io::Error),
}

enum Delivery {
    Done,
    NoBuffers,
}

impl Rx {
    pub fn new(queue: Queue, mergeable: bool, mut overflow: Overflow, counters: Arc<Counters>) -> Self {
        // A driver before this one could take it in pieces; this one would not know that they belong together.
        if !mergeable {
            overflow.kept = 0;
        }
        let chain = || Chain::with_capacity(queue.max_size());
        Self {
            mergeable,
            chain: chain(),
            held: false,
            tail: chain(),
            parts: Vec::with_capacity(queue.size().into()),
            pieces: Pieces::with_capacity(usize::from(queue.max_size()) + 2),
            overflow,
            counters,
            queue,
        }
    }

    /// Delivers frames until buffers or frames run out.
    pub fn run(&mut self, memory: &Memory, backend: &mut dyn NetBackend) -> Result<Received, QueueFault> {
        for _ in 0..SHARE {
            if !self.hold(memory)? {
                return Ok(Received::NoBuffers);
            }
            if self.overflow.kept == 0 {
                match self.receive(memory, backend)? {
                    Ok(()) => {}
                    Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Received::NoFrames),
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) => return Ok(Received::Gone(error)),
                }
            } else if let Delivery::NoBuffers = self.deliver_kept(memory)? {
                return Ok(Received::NoBuffers);
            }
        }
        Ok(Received::NoFrames)
    }

    /// Gives the buffer that waits for a frame back to the ring.
    pub fn let_go(&mut self) {
        if std::mem::take(&mut self.held) {
            self.queue.give_back(self.chain.head);
        }
    }

    /// Takes a buffer for the next frame; `false` when there is none, and the doorbell will ring.
    fn hold(&mut self, memory: &Memory) -> Result<bool, QueueFault> {
        if self.held {
            return Ok(true);
        }
        // What is of no use is handed back, at most a queue's size of it.
        for _ in 0..self.queue.size() {
            if !self.pop(memory, false)? {
                return Ok(false);
            }
            if is_buffer(&self.chain) && self.chain.writable_len() >= HEADER_LEN as u64 {
                self.held = true;
                return Ok(true);
            }
            self.queue.complete(memory, self.chain.head, 0)?;
        }
        self.queue.rearm();
        Ok(false)
    }

    /// The next chain into `chain` or `tail`; when there is none, the doorbell is asked to ring.
    fn pop(&mut self, memory: &Memory, tail: bool) -> Result<bool, QueueFault> {
        let chain = if tail { &mut self.tail } else { &mut self.chain };
        loop {
            if self.queue.pop(memory, chain)? {
                self.queue.disable_notification(memory)?;
                return Ok(true);
            }
            if !self.queue.enable_notification(memory)? {
                return Ok(false);
            }
        }
    }

    /// Reads one frame into the held buffer, and what does not fit into the overflow.
    fn receive(
        &mut self,
        memory: &Memory,
        backend: &mut dyn NetBackend,
    ) -> Result<io::Result<()>, QueueFault> {
        // It is replaced by our own, since it may say things that the driver has not asked for.
        let mut header = [0; HEADER_LEN];
        let room = self.chain.writable_len().min((HEADER_LEN + MAX_FRAME) as u64) - HEADER_LEN as u64;
        let mut list = self.pieces.list();
        list.push_room(&mut header);
        let mut writer = self.chain.writer(memory);
        let found = writer.skip(HEADER_LEN as u64);
        if found.and_then(|()| writer.rest().slices(room, |slice| list.push(slice))).is_err() {
            // Not in memory: it goes back empty, and the frame goes into the next.
            self.held = false;
            return self.queue.complete(memory, self.chain.head, 0).map(Ok);
        }
        list.push_room(&mut self.overflow.room);
        let len = match backend.receive(&list) {
            Ok(len) => len.saturating_sub(HEADER_LEN),
            Err(error) => return Ok(Err(error)),
        };
        let room = room as usize;
        if !(MIN_FRAME..=MAX_FRAME).contains(&len) {
            self.counters.rx.dropped();
            return Ok(Ok(()));
        }
        if len > room {
            self.keep(memory, room, len);
            return Ok(Ok(()));
        }
        let written = HEADER_LEN + len;
        // The header's bytes may be outside memory even if the rest is not.
        let put = self.chain.writer(memory).write(&to_driver(1));
        self.counters.rx.carried_if(put.is_ok(), len as u64);
        self.held = false;
        self.queue.complete(memory, self.chain.head, if put.is_ok() { written as u32 } else { 0 }).map(Ok)
    }

    /// Keeps a frame of `len` bytes whose first `room` bytes are in the held buffer, to deliver it into
    /// several. Dropped where the driver cannot take it in several.
    fn keep(&mut self, memory: &Memory, room: usize, len: usize) {
        if !self.mergeable {
            return self.counters.rx.dropped();
        }
        let overflow = &mut self.overflow;
        overflow.room.copy_within(..len - room, room);
        // What the driver does to its buffer meanwhile, it does to its own frame.
        let mut written = Chain::buffer_reader(memory, &self.chain.writable);
        let mut header = [0; HEADER_LEN];
        let copied = written.read(&mut header).and_then(|()| written.read(&mut overflow.room[..room]));
        match copied {
            Ok(()) => overflow.kept = len,
            Err(_) => self.counters.rx.dropped(),
        }
    }

    /// Delivers the kept frame into as many buffers as it takes, the held one first.
    fn deliver_kept(&mut self, memory: &Memory) -> Result<Delivery, QueueFault> {
        let len = self.overflow.kept;
        let frame = &self.overflow.room[..len];
        let first = (self.chain.writable_len() - HEADER_LEN as u64).min(len as u64) as usize;
        let mut writer = self.chain.writer(memory);
        let mut sound = writer.skip(HEADER_LEN as u64).and_then(|()| writer.write(&frame[..first])).is_ok();
        let mut done = first;
        self.parts.clear();
        self.parts.push((self.chain.head, (HEADER_LEN + first) as u32));
        while done < len && sound {
            if self.parts.len() >= usize::from(self.queue.size()) {
                // All that a driver can give, and still too short.
                sound = false;
                break;
            }
            if !self.pop(memory, true)? {
                for &(head, _) in self.parts.iter().rev() {
                    self.queue.give_back(head);
                }
                self.held = false;
                return Ok(Delivery::NoBuffers);
            }
            let step = self.tail.writable_len().min((len - done) as u64) as usize;
            let rest = &self.overflow.room[done..done + step];
            sound = is_buffer(&self.tail) && self.tail.writer(memory).write(rest).is_ok();
            done += step;
            self.parts.push((self.tail.head, step as u32));
        }
        let header = to_driver(self.parts.len() as u16);
        let sound = sound && self.chain.writer(memory).write(&header).is_ok();
        self.counters.rx.carried_if(sound, len as u64);
        if !sound {
            // The driver's own doing: the frame is lost, the buffers go back empty.
            self.parts.iter_mut().for_each(|(_, written)| *written = 0);
        }
        self.overflow.kept = 0;
        self.held = false;
        self.queue.complete_all(memory, &self.parts)?;
        Ok(Delivery::Done)
    }
}

/// Whether a chain is one that the device only writes to.
fn is_buffer(chain: &Chain) -> bool {
    chain.readable.is_empty() && !chain.writable.is_empty()
}
