#![forbid(unsafe_code)]
//! Buffers posted at a port of a switch, and frames that lie in them already: no copy of theirs is ours.

use super::{MAX_FRAME, MIN_FRAME, PIECES, Received, Rx};
use crate::memory::Memory;
use crate::net::NetBackend;
use crate::net::switch::{Landed, Next};
use crate::sys::io::Buffers;
use crate::virtio::queue::QueueFault;

/// What came of a look.
pub(super) enum Landing {
    /// A frame was there.
    Settled,
    /// One is to be read from the port, as from any network.
    Waits,
    /// Nothing was there, and the run ends.
    Ends(Received),
}

impl Rx {
    /// Waits for frames: where the network takes buffers before them, with all posted that the driver has given.
    pub(super) fn post(
        &mut self,
        memory: &Memory,
        backend: &mut dyn NetBackend,
    ) -> Result<Received, QueueFault> {
        // What waits here is first.
        let idle = self.draining || self.overflow.kept > 0;
        let Some(port) = backend.port().filter(|_| !idle) else { return Ok(Received::NoFrames) };
        if self.held.posted() == 0 {
            self.look_at_first(memory)?;
        }
        // What is of no use is handed back, at most a queue's size of it. With room for the longest frame it is the next frame that wakes
        // us, and no buffer.
        let (mut budget, wanted, rings) = (self.queue.size(), self.wanted(), self.queue.rings(memory));
        while self.held.pieces() <= PIECES
            && budget > 0
            && self.pop(memory, &rings, self.held.room() < wanted)?
        {
            budget -= 1;
        }
        if self.held.is_empty() {
            if budget == 0 {
                self.queue.rearm();
            }
            return Ok(Received::NoBuffers);
        }
        let offered = self.offered.get_or_insert_with(|| Buffers::new(memory.clone()));
        for buffer in self.held.unposted() {
            let spans = buffer.spans.iter();
            // Where one is not in memory, the next frame is copied, and finds out.
            if !offered.push(spans.map(|span| (span.addr, span.len as usize))) {
                break;
            }
        }
        let count = offered.len();
        if count > 0 && port.post(offered, self.mergeable, self.control.cable()) {
            self.held.post(count);
        }
        // Else frames are copied.
        offered.clear();
        Ok(Received::NoFrames)
    }

    /// Looks for a frame in the buffers that are posted.
    pub(super) fn land(
        &mut self,
        memory: &Memory,
        backend: &mut dyn NetBackend,
    ) -> Result<Landing, QueueFault> {
        let next = backend.port().map_or(Next::Waiting { filling: 0 }, |port| port.next());
        match next {
            Next::Landed(landed) => {
                self.settle(memory, &landed)?;
                if self.held.posted() < usize::from(self.queue.size() / 2) {
                    self.post(memory, backend)?;
                }
                Ok(Landing::Settled)
            }
            Next::Waiting { filling } => {
                self.held.withdraw(filling);
                Ok(Landing::Waits)
            }
            Next::Filling => Ok(Landing::Ends(Received::NoFrames)),
            Next::Nothing => self.post(memory, backend).map(Landing::Ends),
        }
    }

    /// Hands a frame to the driver that is in its buffers, or keeps those for another.
    fn settle(&mut self, memory: &Memory, landed: &Landed) -> Result<(), QueueFault> {
        let Landed { after, buffers, header, len } = *landed;
        self.held.land(after, buffers);
        self.short = if buffers > 1 { 0 } else { self.short.saturating_add(1) };
        if !self.control.is_up() || !(MIN_FRAME..=MAX_FRAME).contains(&len) {
            self.counters.rx.dropped();
        } else if !self.is_wanted(memory) {
            self.counters.filtered.add(1);
        } else {
            self.share_out(len);
            if self.deliver(memory, &header, len, true)? {
                return Ok(());
            }
        }
        self.held.pass_over(buffers);
        Ok(())
    }

    /// Posts no more, and takes back what is posted, as far as nobody fills it: whether that is all.
    pub fn drain(&mut self, backend: &dyn NetBackend) -> bool {
        let Some(port) = backend.port() else { return true };
        if !self.draining {
            self.draining = true;
            self.held.withdraw(port.retract());
        }
        !port.is_filled()
    }

    /// Gives the buffers that wait for a frame back to the ring; frames that are in some are the driver's first.
    pub fn let_go(&mut self, memory: &Memory, backend: &dyn NetBackend) {
        if let Some(port) = backend.port() {
            port.withdraw();
            // All of them, also where the queue has failed and they are lost: the next driver has other buffers.
            while let Next::Landed(landed) = port.next() {
                let _ = self.settle(memory, &landed);
            }
        }
        self.held.withdraw(0);
        // Somebody else may say whether the doorbell is wanted meanwhile.
        self.quiet = false;
        // The last one taken first. One that was passed over, because its frame was dropped, cannot go back once later ones are done.
        while let Some(head) = self.held.remove_last(self.queue.next_avail()) {
            self.queue.give_back(head);
        }
        while let Some(head) = self.held.remove(0) {
            // A queue that has failed waits for its reset.
            let _ = self.queue.complete(memory, head, 0);
        }
        self.queue.notify(memory);
    }
}
