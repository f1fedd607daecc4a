#![forbid(unsafe_code)]
//! Frames straight into buffers that a card has posted at its port: one copy, from guest to guest.
//!
//! Buffers are taken out under the queue's lock and filled without it; the frame has its place in the order meanwhile. Nothing lands
//! while a frame waits in a buffer of ours, which it would overtake.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::queue::{Entry, Inner, Queue};
use crate::memory::Memory;
use crate::net::HEADER_LEN;
use crate::sys::io::{Buffers, IoReader, OwnedList, Pieces};
use crate::sys::sync::atomic::Ordering;
use crate::sys::sync::{lock, wait_until};

/// How long a copy is waited for. It takes a moment, but whoever sends may be stopped amid it: by a debugger, by a cgroup that is frozen, by a
/// page of its guest's that comes from a slow swap.
const PATIENCE: Duration = Duration::from_secs(5);

/// The buffers that a card has posted, and who is filling some.
#[derive(Default)]
pub(super) struct Posted {
    buffers: Option<Buffers<Memory>>,
    /// The card's cable is plugged in; else nothing is to come into its guest's memory.
    up: Option<Arc<AtomicBool>>,
    /// A frame may be in several.
    mergeable: bool,
    /// Frames that are being copied.
    filling: usize,
    /// Somebody waits until there are none.
    awaited: bool,
    /// Used again.
    rooms: Vec<Pieces>,
}

/// A frame's place in the order.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Landed {
    /// How many of the posted buffers it takes, from the first on. It begins behind room for its header.
    pub buffers: usize,
    pub header: [u8; HEADER_LEN],
    /// Without the header. 0 for one that was not finished.
    pub len: usize,
    there: bool,
}

/// What lies ready for a card that has posted buffers.
pub(crate) enum Next {
    Landed(Landed),
    /// One is being copied: the bell rings when it is there.
    Filling,
    /// One waits in a buffer of ours, and nothing is posted any more.
    Waiting,
    /// The bell rings for the next.
    Nothing,
}

impl Queue {
    /// More buffers for frames to land in while the card is `up`: `more`, which is empty then. A frame may be in several of them if they
    /// are `mergeable`. Those of one card only, until it has withdrawn them: `false`, and nothing done, for another's.
    pub(crate) fn post(&self, more: &mut Buffers<Memory>, mergeable: bool, up: &Arc<AtomicBool>) -> bool {
        let mut inner = lock(&self.inner);
        if !inner.posted.buffers.get_or_insert_with(|| more.beside()).append(more) {
            return false;
        }
        inner.posted.mergeable = mergeable;
        inner.posted.up.get_or_insert_with(|| up.clone());
        self.open_to_land.store(true, Ordering::Relaxed);
        true
    }

    /// What lies ready, for whoever has posted buffers.
    pub(crate) fn next(&self) -> Next {
        let mut inner = lock(&self.inner);
        match inner.ready.front() {
            Some(Entry::Landed(landed)) if landed.there => {
                let landed = *landed;
                inner.ready.pop_front();
                inner.taken += 1;
                Next::Landed(landed)
            }
            Some(Entry::Landed(_)) => {
                inner.hush(&self.bell);
                Next::Filling
            }
            Some(Entry::Frame(_)) => {
                if let Some(buffers) = &mut inner.posted.buffers {
                    buffers.clear();
                }
                self.open_to_land.store(false, Ordering::Relaxed);
                Next::Waiting
            }
            None => {
                inner.hush(&self.bell);
                Next::Nothing
            }
        }
    }

    /// Takes back what was posted. Waits for those who are copying: nobody else's lock is held over it. Who is not done after five seconds
    /// is not waited for any longer, and what had landed is lost: its memory is there until it is done, and its own guest's alone.
    pub(crate) fn withdraw(&self) {
        let mut inner = lock(&self.inner);
        inner.posted.forget();
        self.open_to_land.store(false, Ordering::Relaxed);
        let end = Instant::now() + PATIENCE;
        while inner.posted.filling > 0 {
            inner.posted.awaited = true;
            let late;
            (inner, late) = wait_until(&self.filled, inner, end);
            if late {
                let Inner { ready, taken, .. } = &mut *inner;
                while matches!(ready.front(), Some(Entry::Landed(_))) {
                    ready.pop_front();
                    *taken += 1;
                }
                return;
            }
        }
    }

    /// Buffers for a frame of `len` bytes; `None` where it has to wait in one of ours.
    #[inline]
    pub(super) fn land(&self, len: usize) -> Option<Landing<'_>> {
        // Who posts does so before it says that it waits: what is missed here goes another way.
        if self.open_to_land.load(Ordering::Relaxed) { self.take_posted(HEADER_LEN + len) } else { None }
    }

    fn take_posted(&self, len: usize) -> Option<Landing<'_>> {
        let mut inner = lock(&self.inner);
        let Inner { ready, posted, taken, .. } = &mut *inner;
        if matches!(ready.back(), Some(Entry::Frame(_))) {
            return None;
        }
        if !posted.up.as_ref().is_some_and(|up| up.load(Ordering::Relaxed)) {
            return None;
        }
        let buffers = posted.buffers.as_mut()?;
        let count = enough(buffers.lengths(), len, posted.mergeable)?;
        let list = buffers.take(count, posted.rooms.pop().unwrap_or_default());
        posted.filling += 1;
        let number = *taken + ready.len() as u64;
        let landed = Landed { buffers: count, header: [0; HEADER_LEN], len: 0, there: false };
        ready.push_back(Entry::Landed(landed));
        Some(Landing { queue: self, list: Some(list), at: HEADER_LEN, landed, number })
    }
}

impl Posted {
    /// Nothing is posted, by nobody. Who fills some goes on.
    pub fn forget(&mut self) {
        (self.buffers, self.up) = (None, None);
    }
}

/// How many buffers of these lengths a frame of `len` bytes takes, if there are enough. The first one has to have room for the header.
fn enough(lengths: impl Iterator<Item = usize>, len: usize, mergeable: bool) -> Option<usize> {
    let most = if mergeable { usize::MAX } else { 1 };
    let mut room = 0;
    for (index, length) in lengths.take(most).enumerate() {
        if index == 0 && length < HEADER_LEN {
            return None;
        }
        room += length;
        if room >= len {
            return Some(index + 1);
        }
    }
    None
}

/// Buffers that a frame is being copied to. Without [`done`](Self::done) what is in them is no frame.
pub(super) struct Landing<'q> {
    queue: &'q Queue,
    list: Option<OwnedList<Memory>>,
    at: usize,
    landed: Landed,
    number: u64,
}

impl Landing<'_> {
    pub fn write(&mut self, bytes: &[u8]) {
        if let Some(list) = &self.list {
            self.at += list.copy_from(self.at, bytes);
        }
    }

    /// The same from another guest's memory, to the end of it.
    pub fn write_from(&mut self, mut reader: IoReader<'_>) {
        if let Some(list) = &self.list {
            list.fill_from(self.at, &mut reader);
        }
    }

    /// It is all there: a frame of `len` bytes, with that header.
    pub fn done(mut self, header: [u8; HEADER_LEN], len: usize) {
        (self.landed.header, self.landed.len) = (header, len);
    }
}

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        let room = self.list.take().map(|list| list.into_parts().0);
        let mut inner = lock(&self.queue.inner);
        let Inner { ready, posted, taken, rung, .. } = &mut *inner;
        posted.rooms.extend(room);
        posted.filling -= 1;
        let place = self.number.checked_sub(*taken).and_then(|at| ready.get_mut(at as usize));
        let mut rings = false;
        if let Some(Entry::Landed(landed)) = place {
            *landed = Landed { there: true, ..self.landed };
            rings = *rung == 0;
            *rung += u64::from(rings);
        }
        // Nobody is woken for nothing: that is a system call.
        let last = posted.filling == 0 && std::mem::take(&mut posted.awaited);
        drop(inner);
        if last {
            self.queue.filled.notify_all();
        }
        if rings {
            self.queue.bell.ring();
        }
    }
}
