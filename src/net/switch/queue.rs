#![forbid(unsafe_code)]
//! Frames on their way to one station: a bounded queue with an fd to poll.
//!
//! Its lock is held to put a buffer in or to take one out, never while one is emptied, and not while one is filled but with a
//! few bytes of our own. Buffers are
//! made when they are first needed, and used again: the last one emptied first, since it is still in the
//! processor's cache.

use std::collections::VecDeque;
use std::io;
use std::time::SystemTime;

use super::landing::{Place, Posted};
use crate::net::{HEADER_LEN, MAX_FRAME};
use crate::sys::sync::atomic::{AtomicBool, Ordering};
use crate::sys::sync::{Bell, Condvar, Mutex, MutexGuard, lock};

/// Buffers of each size: room for most frames, and for any. 3 MiB at most, none before they are needed.
const SIZES: [(usize, usize); 2] = [(2048, 512), (HEADER_LEN + MAX_FRAME, 32)];

/// What waits, in order.
pub(super) enum Entry {
    Frame(Item),
    /// In buffers of the card's own, or on its way there.
    Landed(Place),
}

/// One frame in a buffer of ours.
pub(super) struct Item {
    bytes: Buffer,
    pub len: usize,
    pub note: Option<Note>,
}

/// What a capture wants to know of a frame.
#[derive(Clone, Copy)]
pub(super) struct Note {
    pub time: SystemTime,
    /// The number of the port.
    pub port: u16,
    /// It came from the port's station, and does not go there.
    pub inbound: bool,
    /// What the frame's length was before it was cut off.
    pub length: usize,
}

pub(super) type Buffer = Box<[u8]>;

pub struct Queue {
    pub(super) inner: Mutex<Inner>,
    pub(super) bell: Bell,
    /// Buffers may be posted: a hint.
    pub(super) open_to_land: AtomicBool,
    /// Nobody fills any.
    pub(super) filled: Condvar,
}

#[derive(Default)]
pub(super) struct Inner {
    pub ready: VecDeque<Entry>,
    pub posted: Posted,
    /// Buffers without a frame, of each size.
    spare: [Vec<Buffer>; 2],
    /// Buffers that there are, of each size.
    made: [usize; 2],
    /// Nobody takes anything, and nothing is put in.
    closed: bool,
    /// Writes to the bell that nobody has read, or that are about to happen.
    pub rung: u64,
}

impl Item {
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or(&[])
    }

    pub fn into_buffer(self) -> Buffer {
        self.bytes
    }
}

impl Queue {
    /// A closed one.
    pub(super) fn new() -> io::Result<Self> {
        let inner = Mutex::new(Inner { closed: true, ..Inner::default() });
        let (open_to_land, filled) = (AtomicBool::new(false), Condvar::new());
        Ok(Self { inner, bell: Bell::new()?, open_to_land, filled })
    }

    /// Readable while a frame waits, and always writable.
    pub(super) fn bell(&self) -> &Bell {
        &self.bell
    }

    pub(super) fn open(&self) {
        let mut inner = lock(&self.inner);
        inner.closed = false;
        inner.posted.begin();
    }

    /// Throws away what waits, and what comes from now on; memory too.
    pub(super) fn close(&self) {
        let mut inner = lock(&self.inner);
        // The bell's count is what it was: whoever is about to ring it does so. Who is copying finds that nobody waits for it.
        let old = std::mem::take(&mut *inner);
        (inner.closed, inner.rung) = (true, old.rung);
        inner.posted = old.posted;
        inner.posted.forget();
        self.open_to_land.store(false, Ordering::Relaxed);
        inner.hush(&self.bell);
    }

    /// A buffer for `len` bytes. `None` when as many frames wait as may. It comes back with `put`.
    pub(super) fn take(&self, len: usize) -> Option<Buffer> {
        let mut inner = lock(&self.inner);
        match inner.buffer(len)? {
            Found::Spare(buffer) => Some(buffer),
            Found::New(room) => {
                drop(inner);
                Some(vec![0; room].into())
            }
        }
    }

    /// A frame of `len` bytes in a buffer of ours.
    pub(super) fn put(&self, bytes: Buffer, len: usize, note: Option<Note>) {
        self.put_into(lock(&self.inner), Item { bytes, len, note });
    }

    /// The same at once, where it costs next to nothing to fill a buffer; `false` when as many frames wait as may.
    #[inline]
    pub(super) fn put_short(&self, len: usize, fill: impl FnOnce(&mut [u8])) -> bool {
        let mut inner = lock(&self.inner);
        let mut bytes = match inner.buffer(len) {
            None => return false,
            Some(Found::Spare(buffer)) => buffer,
            Some(Found::New(room)) => vec![0; room].into(),
        };
        fill(&mut bytes);
        self.put_into(inner, Item { bytes, len, note: None });
        true
    }

    #[inline]
    fn put_into(&self, mut inner: MutexGuard<'_, Inner>, item: Item) {
        if inner.closed {
            return;
        }
        inner.ready.push_back(Entry::Frame(item));
        if inner.rung == 0 {
            inner.rung = 1;
            drop(inner);
            self.bell.ring();
        }
    }

    /// The next frame, for a buffer that is not needed any more.
    pub(super) fn pop(&self, used: Option<Buffer>) -> Option<Item> {
        let mut inner = lock(&self.inner);
        if let Some(buffer) = used.filter(|_| !inner.closed) {
            let size = usize::from(buffer.len() > SIZES[0].0);
            // One from before it was closed, and opened again, may be one too many.
            if inner.spare[size].len() < inner.made[size] {
                inner.spare[size].push(buffer);
            }
        }
        if let Some(Entry::Frame(_)) = inner.ready.front() {
            return inner.ready.pop_front().and_then(Entry::into_item);
        }
        inner.pop_behind(&self.bell)
    }
}

impl Entry {
    fn into_item(self) -> Option<Item> {
        match self {
            Self::Frame(item) => Some(item),
            Self::Landed(_) => None,
        }
    }
}

/// A buffer, or how large the one is that may be made.
enum Found {
    Spare(Buffer),
    New(usize),
}

impl Inner {
    /// One for `len` bytes, if there may be one.
    #[inline]
    fn buffer(&mut self, len: usize) -> Option<Found> {
        let size = usize::from(len > SIZES[0].0);
        let (room, most) = SIZES[size];
        if self.closed || len > room {
            return None;
        }
        if let Some(buffer) = self.spare[size].pop() {
            return Some(Found::Spare(buffer));
        }
        if self.made[size] == most {
            return None;
        }
        self.made[size] += 1;
        Some(Found::New(room))
    }

    /// The next frame, behind those that are still being copied, which are others'.
    #[inline(never)]
    fn pop_behind(&mut self, bell: &Bell) -> Option<Item> {
        let being_copied = |entry: &Entry| matches!(entry, Entry::Landed(place) if !place.is_there());
        let at = self.ready.iter().take_while(|entry| being_copied(entry)).count();
        match self.ready.get(at) {
            Some(Entry::Frame(_)) => self.ready.remove(at).and_then(Entry::into_item),
            // What has landed is for who has posted, and rings on.
            Some(Entry::Landed(_)) => None,
            None => {
                self.hush(bell);
                None
            }
        }
    }

    /// The bell rings for nothing any more. It is read under the lock, so that no ring for something is lost.
    pub fn hush(&mut self, bell: &Bell) {
        if self.rung > 0 {
            self.rung = self.rung.saturating_sub(bell.silence());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn queue() -> Queue {
        let queue = Queue::new().unwrap();
        assert!(queue.take(100).is_none(), "it is closed");
        queue.open();
        queue
    }

    fn put(queue: &Queue, byte: u8, len: usize) -> bool {
        let Some(mut buffer) = queue.take(len) else { return false };
        buffer[..len].fill(byte);
        queue.put(buffer, len, None);
        true
    }

    fn rings(queue: &Queue) -> bool {
        crate::sys::fd::is_readable(queue.bell.as_fd())
    }

    #[test]
    fn frames_come_out_in_order_and_the_bell_rings_while_there_are_any() {
        let queue = queue();
        assert!(!rings(&queue));
        assert!(put(&queue, 1, 60) && put(&queue, 2, 70_00) && put(&queue, 3, 14));
        let mut used = None;
        for (byte, len) in [(1, 60), (2, 7000), (3, 14)] {
            assert!(rings(&queue));
            let item = queue.pop(used.take()).unwrap();
            assert_eq!(item.bytes(), vec![byte; len]);
            used = Some(item.into_buffer());
        }
        assert!(queue.pop(used).is_none() && !rings(&queue));
        put(&queue, 4, 60);
        assert!(rings(&queue));
    }

    #[test]
    fn it_is_bounded_and_makes_no_more_buffers_than_it_needs() {
        let queue = queue();
        for _ in 0..10_000 {
            put(&queue, 0, 60);
            let item = queue.pop(None).unwrap();
            assert!(queue.pop(Some(item.into_buffer())).is_none());
        }
        assert_eq!(lock(&queue.inner).made, [1, 0]);
        assert_eq!((0..1000).filter(|_| put(&queue, 0, 2048)).count(), 512);
        assert_eq!((0..1000).filter(|_| put(&queue, 0, 2049)).count(), 32);
        assert!(!put(&queue, 0, 100_000));
        let item = queue.pop(None).unwrap();
        assert!(!put(&queue, 0, 60), "the buffer is out");
        queue.pop(Some(item.into_buffer()));
        assert!(put(&queue, 0, 60));
    }

    #[test]
    fn what_is_closed_keeps_nothing_and_can_be_opened_again() {
        let queue = queue();
        put(&queue, 1, 60);
        let late = queue.take(60).unwrap();
        let old = queue.pop(None).unwrap();
        put(&queue, 2, 60);
        queue.close();
        assert!(!rings(&queue) && queue.pop(None).is_none());
        queue.put(late, 60, None);
        assert!(queue.pop(None).is_none());
        queue.open();
        assert!(queue.pop(Some(old.into_buffer())).is_none());
        assert_eq!((0..1000).filter(|_| put(&queue, 0, 60)).count(), 512);
        assert!(rings(&queue));
    }

    #[test]
    fn no_ring_is_lost_between_threads() {
        let queue = queue();
        const COUNT: usize = 20_000;
        std::thread::scope(|scope| {
            for byte in 0..2 {
                let queue = &queue;
                scope.spawn(move || {
                    for _ in 0..COUNT {
                        while !put(queue, byte, 60) {
                            std::thread::yield_now();
                        }
                    }
                });
            }
            let (mut got, mut used) = (0, None);
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
            while got < 2 * COUNT {
                if let Some(item) = queue.pop(used.take()) {
                    got += 1;
                    used = Some(item.into_buffer());
                    continue;
                }
                while !rings(&queue) {
                    assert!(std::time::Instant::now() < deadline, "waited for frame {got}");
                    std::thread::yield_now();
                }
            }
        });
    }
}
