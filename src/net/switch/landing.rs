#![forbid(unsafe_code)]
//! Frames straight into buffers that a card has posted at its port: one copy, from guest to guest.
//!
//! Buffers are taken out under the queue's lock and filled without it. A frame comes when it is all there: whoever sends may be stopped
//! amid a copy, and those of others pass it meanwhile. Its own cannot, since it sends one after the other. Nothing lands while a frame
//! waits in a buffer of ours, which it would overtake.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::time::{Duration, Instant};

use super::queue::{Entry, Inner, Queue};
use crate::memory::Memory;
use crate::net::HEADER_LEN;
use crate::sys::io::{Buffers, IoReader, OwnedList, Pieces};
use crate::sys::sync::atomic::Ordering;
use crate::sys::sync::{lock, wait_until};

/// How long a copy is waited for. It takes a moment, but whoever sends may be stopped amid it: by a debugger, by a cgroup that is frozen or
/// has used up its share, by a page of its guest's that comes from a slow swap.
const PATIENCE: Duration = Duration::from_secs(5);

/// The buffers that a card has posted, and who is filling some.
#[derive(Default)]
pub(super) struct Posted {
    buffers: Option<Buffers<Memory>>,
    /// The card's cable is plugged in; else nothing is to come into its guest's memory.
    up: Option<Arc<AtomicBool>>,
    /// A frame may be in several.
    mergeable: bool,
    /// Frames that are being copied for the card that is here now.
    filling: Arc<AtomicUsize>,
    /// Frames that ever were: the number of the next.
    begun: u64,
    /// Somebody waits until there are none.
    awaited: bool,
    /// Used again.
    rooms: Vec<Pieces>,
}

/// One that has its buffers. Those of lower numbers have the posted ones before.
pub(super) struct Place {
    number: u64,
    /// It is all there, or will not come.
    there: bool,
    landed: Landed,
}

impl Place {
    pub fn is_there(&self) -> bool {
        self.there
    }
}

/// A frame in buffers that were posted.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Landed {
    /// How many buffers before its own are still being filled.
    pub after: usize,
    /// How many it takes. It begins behind room for its header.
    pub buffers: usize,
    pub header: [u8; HEADER_LEN],
    /// Without the header. 0 for one that was not finished.
    pub len: usize,
}

/// What lies ready for a card that has posted buffers.
pub(crate) enum Next {
    Landed(Landed),
    /// Some are being copied: the bell rings when one is there.
    Filling,
    /// One waits in a buffer of ours, and nothing is posted any more. So many of the first buffers are still being filled.
    Waiting {
        filling: usize,
    },
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
        let Inner { ready, posted, .. } = &mut *inner;
        let mut after = 0;
        for index in 0..ready.len() {
            match &ready[index] {
                Entry::Landed(place) if place.there => {
                    let landed = Landed { after, ..place.landed };
                    ready.remove(index);
                    return Next::Landed(landed);
                }
                Entry::Landed(place) => after += place.landed.buffers,
                Entry::Frame(_) => {
                    if let Some(buffers) = &mut posted.buffers {
                        buffers.clear();
                    }
                    self.open_to_land.store(false, Ordering::Relaxed);
                    return Next::Waiting { filling: after };
                }
            }
        }
        inner.hush(&self.bell);
        if after > 0 { Next::Filling } else { Next::Nothing }
    }

    /// Nothing more lands in what was posted; what does already goes on, or has landed, in so many of the first buffers.
    pub(crate) fn retract(&self) -> usize {
        let mut inner = lock(&self.inner);
        inner.posted.forget();
        self.open_to_land.store(false, Ordering::Relaxed);
        let taken = |entry: &Entry| match entry {
            Entry::Landed(place) => place.landed.buffers,
            Entry::Frame(_) => 0,
        };
        inner.ready.iter().map(taken).sum()
    }

    /// The bell rings for what lands, and for what comes, and not for what waits already: there is no buffer for that. `false` where something has
    /// landed.
    pub(crate) fn wait_for_buffers(&self) -> bool {
        let mut inner = lock(&self.inner);
        let landed = inner.ready.iter().any(|entry| matches!(entry, Entry::Landed(place) if place.there));
        if !landed {
            inner.hush(&self.bell);
        }
        !landed
    }

    /// Whether somebody is copying into what this card has posted, be it withdrawn or not.
    pub(crate) fn is_filled(&self) -> bool {
        lock(&self.inner).posted.is_filled()
    }

    /// Takes back what was posted. Waits for those who are copying: nobody else's lock is held over it. Who is not done after five seconds
    /// is not waited for any longer, and what had landed is lost: its memory is there until it is done, and its own guest's alone. That
    /// guest may not use it for something else before ([`is_filled`](Self::is_filled)).
    pub(crate) fn withdraw(&self) {
        self.retract();
        let mut inner = lock(&self.inner);
        let end = Instant::now() + PATIENCE;
        while inner.posted.is_filled() {
            inner.posted.awaited = true;
            let late;
            (inner, late) = wait_until(&self.filled, inner, end);
            if late {
                while matches!(inner.ready.front(), Some(Entry::Landed(_))) {
                    inner.ready.pop_front();
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
        let Inner { ready, posted, .. } = &mut *inner;
        if matches!(ready.back(), Some(Entry::Frame(_))) {
            return None;
        }
        if !posted.up.as_ref().is_some_and(|up| up.load(Ordering::Relaxed)) {
            return None;
        }
        let buffers = posted.buffers.as_mut()?;
        let count = enough(buffers.lengths(), len, posted.mergeable)?;
        let list = buffers.take(count, posted.rooms.pop().unwrap_or_default());
        posted.filling.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let filling = posted.filling.clone();
        let number = posted.begun;
        posted.begun += 1;
        let landed = Landed { after: 0, buffers: count, header: [0; HEADER_LEN], len: 0 };
        ready.push_back(Entry::Landed(Place { number, there: false, landed }));
        Some(Landing { queue: self, list: Some(list), at: HEADER_LEN, landed, number, filling })
    }
}

/// The place with that number, if it was not thrown away. They are in the order of their numbers, before any other frame.
fn place_of(number: u64, ready: &mut VecDeque<Entry>) -> Option<&mut Place> {
    let Some(Entry::Landed(first)) = ready.front() else { return None };
    // Exactly there, unless later ones have gone before it.
    let at = usize::try_from(number.checked_sub(first.number)?).ok()?.min(ready.len() - 1);
    let is_it = |entry: &Entry| matches!(entry, Entry::Landed(place) if place.number == number);
    let at = (0..=at).rev().find(|&at| is_it(&ready[at]))?;
    let Some(Entry::Landed(place)) = ready.get_mut(at) else { return None };
    Some(place)
}

impl Posted {
    /// Nothing is posted, by nobody. Who fills some goes on.
    pub fn forget(&mut self) {
        (self.buffers, self.up) = (None, None);
    }

    /// Another card comes, whose memory nobody writes to yet.
    pub fn begin(&mut self) {
        self.filling = Arc::default();
    }

    /// It changes under the queue's lock alone.
    fn is_filled(&self) -> bool {
        self.filling.load(std::sync::atomic::Ordering::Relaxed) > 0
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
    filling: Arc<AtomicUsize>,
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
        let Inner { ready, posted, rung, .. } = &mut *inner;
        posted.rooms.extend(room);
        self.filling.fetch_sub(1, std::sync::atomic::Ordering::Relaxed);
        let mut rings = false;
        if let Some(place) = place_of(self.number, ready) {
            (place.there, place.landed) = (true, self.landed);
            rings = *rung == 0;
            *rung += u64::from(rings);
        }
        // Nobody is woken for nothing: that is a system call.
        let last = !posted.is_filled() && std::mem::take(&mut posted.awaited);
        drop(inner);
        if last {
            self.queue.filled.notify_all();
        }
        if rings {
            self.queue.bell.ring();
        }
    }
}

#[cfg(test)]
impl super::SwitchPort {
    /// A frame of `len` bytes for the card here, whose sender is stopped amid it until this is dropped.
    pub(crate) fn stuck(&self, len: usize) -> Option<impl Sized + '_> {
        self.port.queue.land(len)
    }
}
