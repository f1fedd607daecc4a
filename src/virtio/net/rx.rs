#![forbid(unsafe_code)]
//! Frames from the backend to the driver, read straight into its buffers.
//!
//! A frame is read only when there is a buffer for it: while the driver gives none, frames wait in the
//! backend and are dropped there, visibly. What has been read is kept until it is delivered.

use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::time::Duration;

use super::control::Control;
use super::filter::Filter;
use super::header::{Header, to_driver};
use super::statistics::Counters;
use crate::memory::Memory;
use crate::net::{HEADER_LEN, MAX_FRAME, MIN_FRAME, NetBackend, Offloads};
use crate::sys::io::{Buffers, Pieces};
use crate::virtio::queue::{Chain, Queue, QueueFault, Rings};

use held::Held;
use landed::Landing;

mod held;
mod landed;

/// Frames in one wake-up; the backend's fd stays readable for the rest.
const SHARE: u32 = 256;

/// So many frames in a row that one buffer holds, and the next is expected to be such a one.
const RUN: u32 = 64;

/// Pieces of held buffers beyond which no more are taken: the kernel takes 1024 in one call, and one chain has 256 at most.
const PIECES: usize = 512;

/// The receive queue.
pub(super) struct Rx {
    pub queue: Queue,
    /// A frame may fill several buffers (VIRTIO_NET_F_MRG_RXBUF).
    mergeable: bool,
    /// What a frame may leave to the driver.
    takes: Offloads,
    /// Frames in a row that one buffer has held.
    short: u32,
    /// Buffers for the next frames.
    held: Held,
    /// The last one that was taken from the ring.
    chain: Chain,
    /// The driver has been asked not to ring the doorbell.
    quiet: bool,
    parts: Vec<(u16, u32)>,
    pieces: Pieces,
    /// Buffers on their way to the port.
    offered: Option<Buffers<Memory>>,
    /// The port gets none: a pause is near.
    pub draining: bool,
    pub overflow: Overflow,
    control: Arc<Control>,
    counters: Arc<Counters>,
    /// Which frames are wanted; a copy, and its number.
    filter: Option<Filter>,
    filters: u32,
}

/// Room for what does not fit into the driver's buffers, and for a frame that waits for more of them.
/// It outlives the queue: a frame kept at a pause is delivered after it.
pub(super) struct Overflow {
    room: Box<[u8]>,
    header: Header,
    /// The length of the frame, without header, that waits in `room`; 0 for none.
    kept: usize,
}

impl Default for Overflow {
    fn default() -> Self {
        // From the allocator's zero pages: untouched until a frame is long.
        Self { room: vec![0; MAX_FRAME].into(), header: [0; HEADER_LEN], kept: 0 }
    }
}

/// Why a run ended.
#[derive(Debug)]
pub(super) enum Received {
    /// The driver has given no (or not enough) buffers: again when its doorbell rings.
    NoBuffers,
    /// The backend has nothing, or one wake-up's share is done: again when its fd is readable.
    NoFrames,
    /// The limit is reached: again after that time.
    Limited(Duration),
    /// The backend is gone.
    Gone(io::Error),
}

enum Delivery {
    Done,
    NoBuffers,
}

impl Rx {
    pub fn new(
        queue: Queue,
        mergeable: bool,
        takes: Offloads,
        mut overflow: Overflow,
        (control, pair): (Arc<Control>, usize),
    ) -> Self {
        // A driver before this one could take it in pieces; this one would not know that they belong together.
        if !mergeable {
            overflow.kept = 0;
        }
        Self {
            mergeable,
            takes,
            short: 0,
            held: Held::new(queue.size()),
            chain: Chain::with_capacity(queue.max_size()),
            quiet: false,
            parts: Vec::with_capacity(queue.size().into()),
            pieces: Pieces::with_capacity(usize::from(queue.max_size()) + 2),
            offered: None,
            draining: false,
            overflow,
            counters: control.counters[pair].clone(),
            control,
            filter: None,
            // No filter's: it is looked at before the first frame.
            filters: u32::MAX,
            queue,
        }
    }

    /// Delivers frames until buffers or frames run out.
    pub fn run(&mut self, memory: &Memory, backend: &mut dyn NetBackend) -> Result<Received, QueueFault> {
        loop {
            match self.receive_all(memory, backend)? {
                // Some buffers are somebody's who is slow to fill them: they may come before any of the driver's.
                Received::NoBuffers if self.held.is_at_port() => {
                    if backend.port().is_none_or(|port| port.wait_for_buffers()) {
                        return Ok(Received::NoFrames);
                    }
                }
                end => return Ok(end),
            }
        }
    }

    fn receive_all(&mut self, memory: &Memory, backend: &mut dyn NetBackend) -> Result<Received, QueueFault> {
        if let Some(filter) = self.control.newer_filter(&mut self.filters) {
            self.filter = (!filter.is_open()).then_some(filter);
        }
        for _ in 0..SHARE {
            let is_up = self.control.is_up();
            if let Some(wait) = self.control.wait(&self.control.receive).filter(|_| is_up) {
                return Ok(Received::Limited(wait));
            }
            if self.held.is_at_port() {
                match self.land(memory, backend)? {
                    Landing::Settled => continue,
                    Landing::Waits => {}
                    // Else a frame that is kept is delivered.
                    Landing::Ends(end) if self.overflow.kept == 0 => return Ok(end),
                    Landing::Ends(_) => {}
                }
            }
            if !is_up {
                match self.discard(backend) {
                    Ok(()) => continue,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Received::NoFrames),
                    Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                    Err(error) => return Ok(Received::Gone(error)),
                }
            }
            if self.overflow.kept > 0 {
                if let Delivery::NoBuffers = self.deliver_kept(memory)? {
                    return Ok(Received::NoBuffers);
                }
                continue;
            }
            if !self.hold(memory, self.wanted())? {
                return Ok(Received::NoBuffers);
            }
            match self.receive(memory, backend)? {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return self.post(memory, backend),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Ok(Received::Gone(error)),
            }
        }
        Ok(Received::NoFrames)
    }

    /// A frame for a card whose cable is not plugged in.
    fn discard(&mut self, backend: &mut dyn NetBackend) -> io::Result<()> {
        let mut header = [0; HEADER_LEN];
        let mut list = self.pieces.list();
        list.push_room(&mut header);
        self.overflow.kept = 0;
        list.push_room(&mut self.overflow.room);
        backend.receive(&list)?;
        self.counters.rx.dropped();
        Ok(())
    }

    /// Whether no frame waits here, and the next may pass without being looked at.
    pub fn may_pass(&self) -> bool {
        self.overflow.kept == 0 && self.control.is_open()
    }

    /// Whether a frame may be of many segments.
    fn takes_long(&self) -> bool {
        self.mergeable && self.takes.intersects(Offloads::TSO4 | Offloads::TSO6 | Offloads::USO)
    }

    /// Whether none has been for a while: to have room for one is work, and the next that comes all the same is copied.
    fn expects_short(&self) -> bool {
        self.short >= RUN
    }

    /// How much to have ready: the longest frame where one may be of many segments, so that none is copied twice, but for one that comes
    /// behind many short ones; else a buffer, which holds any but a jumbo frame.
    fn wanted(&self) -> u64 {
        if self.takes_long() && !self.expects_short() { (HEADER_LEN + MAX_FRAME) as u64 } else { 1 }
    }

    /// Takes buffers for the next frame, of so many bytes if there are; `false` when there is none, and the doorbell will ring.
    fn hold(&mut self, memory: &Memory, wanted: u64) -> Result<bool, QueueFault> {
        self.look_at_first(memory)?;
        if self.held.room() >= wanted {
            return Ok(true);
        }
        // What is of no use is handed back, at most a queue's size of it.
        let (mut budget, rings) = (self.queue.size(), self.queue.rings(memory));
        while self.held.room() < wanted && self.held.pieces() <= PIECES && budget > 0 {
            budget -= 1;
            if !self.pop(memory, &rings, self.held.is_empty())? {
                return Ok(!self.held.is_empty());
            }
        }
        if self.held.is_empty() {
            self.queue.rearm();
        }
        Ok(!self.held.is_empty())
    }

    /// Holds the next chain, too, if it is a buffer; else it goes back. `false` when there is none, and the doorbell is asked to ring if so
    /// wanted.
    #[inline]
    fn pop(&mut self, memory: &Memory, rings: &Rings<'_>, ring: bool) -> Result<bool, QueueFault> {
        while !self.queue.pop_from(rings, &mut self.chain)? {
            self.quiet &= !ring;
            if !ring || !self.queue.enable_notification(memory)? {
                return Ok(false);
            }
        }
        if !self.quiet {
            self.queue.disable_notification(memory)?;
            self.quiet = true;
        }
        let len = self.chain.writable_len();
        let enough = if self.held.is_empty() { HEADER_LEN as u64 } else { 1 };
        if is_buffer(&self.chain) && len >= enough {
            self.held.push(&self.chain, len);
        } else {
            self.queue.complete(memory, self.chain.head, 0)?;
        }
        Ok(true)
    }

    /// Reads one frame into the held buffers, and what does not fit into the overflow.
    fn receive(
        &mut self,
        memory: &Memory,
        backend: &mut dyn NetBackend,
    ) -> Result<io::Result<()>, QueueFault> {
        // It is looked at before the driver sees it, since it may say things that the driver has not asked for.
        let mut header = [0; HEADER_LEN];
        let first = self.held.front().map_or(0, |first| first.len);
        let longest = (HEADER_LEN + MAX_FRAME) as u64;
        let most = if self.takes_long() && self.expects_short() { first.min(longest) } else { longest };
        let mut list = self.pieces.list();
        list.push_room(&mut header);
        let mut left = most;
        for (i, buffer) in self.held.iter().enumerate() {
            if left == 0 {
                break;
            }
            let mut writer = Chain::buffer_writer(memory, buffer.spans);
            let skipped = if i == 0 { HEADER_LEN as u64 } else { 0 };
            let part = buffer.len.min(left) - skipped;
            left -= part + skipped;
            let found = writer.skip(skipped);
            if found.and_then(|()| writer.rest().slices(part, |slice| list.push(slice))).is_err() {
                // Not in memory: it goes back empty, and the frame goes into the next.
                return self.refuse(memory, i).map(Ok);
            }
        }
        let room = self.held.room().min(most) as usize - HEADER_LEN;
        list.push_room(&mut self.overflow.room);
        let len = match backend.receive(&list) {
            Ok(len) => len.saturating_sub(HEADER_LEN),
            Err(error) => return Ok(Err(error)),
        };
        if backend.offloads().is_empty() {
            // It has nothing to say in it.
            header = [0; HEADER_LEN];
        }
        if !(MIN_FRAME..=MAX_FRAME).contains(&len) {
            self.counters.rx.dropped();
            return Ok(Ok(()));
        }
        if !self.is_wanted(memory) {
            self.counters.filtered.add(1);
            return Ok(Ok(()));
        }
        self.short = if (HEADER_LEN + len) as u64 > first { 0 } else { self.short.saturating_add(1) };
        if len > room {
            self.keep(memory, &header, room, len);
            return Ok(Ok(()));
        }
        self.share_out(len);
        self.deliver(memory, &header, len, true).map(|_| Ok(()))
    }

    /// Whether the driver wants the frame that was read. It lies in the driver's own buffers, and only the driver is hurt by what it
    /// does to it meanwhile. Of a first buffer that is tiny, it is not known.
    fn is_wanted(&self, memory: &Memory) -> bool {
        let Some(filter) = &self.filter else { return true };
        let Some(first) = self.held.front() else { return true };
        let mut frame = Chain::buffer_reader(memory, first.spans);
        let found = frame.skip(HEADER_LEN as u64).and_then(|()| frame.read_array());
        found.map_or(true, |frame| filter.passes(&frame))
    }

    /// Hands a buffer back that is none.
    fn refuse(&mut self, memory: &Memory, index: usize) -> Result<(), QueueFault> {
        let Some(head) = self.held.remove(index) else { return Ok(()) };
        self.queue.complete(memory, head, 0)
    }

    /// Which of the held buffers a frame of `len` bytes fills, and how far.
    fn share_out(&mut self, len: usize) {
        let mut left = (HEADER_LEN + len) as u64;
        self.parts.clear();
        for buffer in self.held.iter() {
            let part = buffer.len.min(left);
            self.parts.push((buffer.head, part as u32));
            left -= part;
            if left == 0 {
                break;
            }
        }
    }

    /// Puts the header in front of a frame that is in its buffers, and hands them to the driver; `false` where they are still ours.
    fn deliver(
        &mut self,
        memory: &Memory,
        header: &Header,
        len: usize,
        sound: bool,
    ) -> Result<bool, QueueFault> {
        let used = self.parts.len();
        let Some(header) = to_driver(header, len as u64, self.takes, used as u16) else {
            // Nor does anybody else do what is left to do: it is lost, and the buffers wait for the next.
            self.counters.rx.dropped();
            return Ok(false);
        };
        // The header's bytes may be outside memory even if the rest is not.
        let sound = sound
            && self
                .held
                .front()
                .is_some_and(|first| Chain::buffer_writer(memory, first.spans).write(&header).is_ok());
        self.counters.rx.carried_if(sound, len as u64);
        self.control.spend(&self.control.receive, len as u64);
        if !sound {
            // The driver's own doing: the frame is lost, the buffers go back empty.
            self.parts.iter_mut().for_each(|(_, written)| *written = 0);
        }
        self.held.done(used);
        self.queue.complete_all(memory, &self.parts)?;
        Ok(true)
    }

    /// The first of those that are held has to have room for a header: what has none goes back. None of them is posted.
    fn look_at_first(&mut self, memory: &Memory) -> Result<(), QueueFault> {
        while self.held.front().is_some_and(|first| first.len < HEADER_LEN as u64) {
            self.refuse(memory, 0)?;
        }
        Ok(())
    }

    /// Keeps a frame of `len` bytes whose first `room` bytes are in the held buffers, to deliver it into more of them.
    /// Dropped where the driver cannot take it in several.
    fn keep(&mut self, memory: &Memory, header: &Header, room: usize, len: usize) {
        if !self.mergeable {
            return self.counters.rx.dropped();
        }
        let overflow = &mut self.overflow;
        overflow.room.copy_within(..len - room, room);
        // What the driver does to its buffers meanwhile, it does to its own frame.
        let mut at = 0;
        for (i, buffer) in self.held.iter().enumerate() {
            let mut written = Chain::buffer_reader(memory, buffer.spans);
            let skipped = if i == 0 { HEADER_LEN } else { 0 };
            let step = (buffer.len as usize - skipped).min(room - at);
            let mut unused = [0; HEADER_LEN];
            let copied = written.read(&mut unused[..skipped]);
            if copied.and_then(|()| written.read(&mut overflow.room[at..at + step])).is_err() {
                return self.counters.rx.dropped();
            }
            at += step;
        }
        (overflow.header, overflow.kept) = (*header, len);
    }

    /// Delivers the kept frame into as many buffers as it takes, the held ones first.
    fn deliver_kept(&mut self, memory: &Memory) -> Result<Delivery, QueueFault> {
        let (len, header) = (self.overflow.kept, self.overflow.header);
        let rings = self.queue.rings(memory);
        while self.held.room() < (HEADER_LEN + len) as u64 && self.held.len() < usize::from(self.queue.size())
        {
            if !self.pop(memory, &rings, true)? {
                return Ok(Delivery::NoBuffers);
            }
        }
        self.overflow.kept = 0;
        self.share_out(len);
        let (mut done, mut sound) = (0, true);
        for (i, buffer) in self.held.iter().take(self.parts.len()).enumerate() {
            let skipped = if i == 0 { HEADER_LEN } else { 0 };
            let step = self.parts[i].1 as usize - skipped;
            let mut writer = Chain::buffer_writer(memory, buffer.spans);
            let put = writer.skip(skipped as u64);
            let rest = &self.overflow.room[done..done + step];
            sound &= put.and_then(|()| writer.write(rest)).is_ok();
            done += step;
        }
        // Else it is all that a driver can give, and still too short.
        self.deliver(memory, &header, len, sound && done == len)?;
        Ok(Delivery::Done)
    }
}

/// Whether a chain is one that the device only writes to.
fn is_buffer(chain: &Chain) -> bool {
    chain.readable.is_empty() && !chain.writable.is_empty()
}
