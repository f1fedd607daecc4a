#![forbid(unsafe_code)]
//! The driver's buffers that wait for frames: little of each, and close together, for a long frame fills many.

use std::collections::VecDeque;

use crate::virtio::queue::{Chain, Span};

#[derive(Clone, Copy)]
struct Buffer {
    head: u16,
    place: u16,
    spans: u32,
    /// The bytes in it.
    len: u64,
}

/// One that is held.
#[derive(Clone, Copy)]
pub(super) struct View<'h> {
    pub head: u16,
    pub spans: &'h [Span],
    pub len: u64,
}

/// In the order in which frames fill them.
pub(super) struct Held {
    buffers: VecDeque<Buffer>,
    /// Theirs, from `first` on.
    spans: Vec<Span>,
    first: usize,
    room: u64,
    /// So many from the first on, and their pieces, wait at a port for frames to land in.
    posted: usize,
    posted_spans: usize,
}

impl Held {
    /// As many as a queue of that size has.
    pub fn new(size: u16) -> Self {
        let (buffers, spans) =
            (VecDeque::with_capacity(size.into()), Vec::with_capacity(2 * usize::from(size)));
        Self { buffers, spans, first: 0, room: 0, posted: 0, posted_spans: 0 }
    }

    /// Bytes in all of them.
    pub fn room(&self) -> u64 {
        self.room
    }

    /// Pieces of all of them.
    pub fn pieces(&self) -> usize {
        self.spans.len() - self.first
    }

    pub fn is_empty(&self) -> bool {
        self.buffers.is_empty()
    }

    pub fn len(&self) -> usize {
        self.buffers.len()
    }

    pub fn front(&self) -> Option<View<'_>> {
        self.iter().next()
    }

    pub fn iter(&self) -> Views<'_> {
        Views { buffers: self.buffers.range(..), spans: &self.spans[self.first..] }
    }

    pub fn posted(&self) -> usize {
        self.posted
    }

    /// Those that are not posted.
    pub fn unposted(&self) -> Views<'_> {
        let spans = &self.spans[self.first + self.posted_spans..];
        Views { buffers: self.buffers.range(self.posted..), spans }
    }

    /// The next `count` are posted, too.
    pub fn post(&mut self, count: usize) {
        let more: usize = self.buffers.range(self.posted..).take(count).map(|b| b.spans as usize).sum();
        self.posted_spans += more;
        self.posted += count.min(self.buffers.len() - self.posted);
    }

    /// The first `count` have been filled.
    pub fn land(&mut self, count: usize) {
        let count = count.min(self.posted);
        self.posted -= count;
        self.posted_spans -= self.spans_of(count);
    }

    /// None is posted any more.
    pub fn withdraw(&mut self) {
        (self.posted, self.posted_spans) = (0, 0);
    }

    /// Takes the buffer that a chain is, of `len` bytes.
    pub fn push(&mut self, chain: &Chain, len: u64) {
        if self.spans.len() + chain.writable.len() > self.spans.capacity() {
            self.spans.drain(..self.first);
            self.first = 0;
        }
        self.room += len;
        // One, mostly: no call for a copy of so little.
        chain.writable.iter().for_each(|span| self.spans.push(*span));
        let spans = chain.writable.len() as u32;
        self.buffers.push_back(Buffer { head: chain.head, place: chain.place, spans, len });
    }

    /// Lets go of the first `count`, which are not posted any more.
    pub fn done(&mut self, count: usize) {
        for buffer in self.buffers.drain(..count.min(self.buffers.len())) {
            self.room -= buffer.len;
            self.first += buffer.spans as usize;
        }
    }

    /// Lets go of one; its head.
    pub fn remove(&mut self, index: usize) -> Option<u16> {
        let start = self.first + self.spans_of(index);
        let buffer = self.buffers.remove(index)?;
        self.spans.drain(start..start + buffer.spans as usize);
        self.room -= buffer.len;
        Some(buffer.head)
    }

    /// Lets go of the one that was taken last, with `next` as the place behind it; its head.
    pub fn remove_last(&mut self, next: u16) -> Option<u16> {
        let at = self.buffers.iter().rposition(|buffer| buffer.place == next)?;
        self.remove(at)
    }

    /// Puts the first `count` behind the others.
    pub fn pass_over(&mut self, count: usize) {
        let spans = self.spans_of(count);
        self.spans[self.first..].rotate_left(spans);
        self.buffers.rotate_left(count.min(self.buffers.len()));
    }

    fn spans_of(&self, count: usize) -> usize {
        self.buffers.iter().take(count).map(|buffer| buffer.spans as usize).sum()
    }
}

/// Some that are held, one after the other.
pub(super) struct Views<'h> {
    buffers: std::collections::vec_deque::Iter<'h, Buffer>,
    spans: &'h [Span],
}

impl<'h> Iterator for Views<'h> {
    type Item = View<'h>;

    fn next(&mut self) -> Option<View<'h>> {
        let buffer = self.buffers.next()?;
        let (spans, rest) = self.spans.split_at_checked(buffer.spans as usize)?;
        self.spans = rest;
        Some(View { head: buffer.head, spans, len: buffer.len })
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    /// The same as a plain list, whatever is done to it.
    #[test]
    fn buffers_keep_their_pieces() {
        let mut dice = crate::virtio::queue_driver::Dice(7);
        let (mut held, mut plain, mut place) = (Held::new(4), VecDeque::new(), 0u16);
        for number in 0..20_000u64 {
            let index = dice.below(plain.len() as u64 + 1) as usize;
            match dice.below(8) {
                0..4 if plain.len() < 40 => {
                    place = place.wrapping_add(1);
                    let span = |i| Span { addr: GuestAddress(number + i), len: 1 + i as u32 };
                    let writable: Vec<_> = (0..1 + dice.below(3)).map(span).collect();
                    let chain = Chain { head: number as u16, place, writable, ..Chain::default() };
                    held.push(&chain, chain.writable_len());
                    plain.push_back(chain);
                }
                4 => {
                    held.done(index);
                    plain.drain(..index);
                }
                5 => assert_eq!(held.remove(index), plain.remove(index).map(|chain| chain.head)),
                6 => {
                    held.pass_over(index);
                    plain.rotate_left(index);
                }
                _ => {
                    let next = place.wrapping_sub(dice.below(3) as u16);
                    let at = plain.iter().position(|chain| chain.place == next);
                    let head = at.and_then(|at| plain.remove(at)).map(|chain| chain.head);
                    assert_eq!(held.remove_last(next), head);
                }
            }
            let views: Vec<_> = held.iter().map(|view| (view.head, view.len, view.spans.to_vec())).collect();
            let chains = plain.iter().map(|chain| (chain.head, chain.writable_len(), chain.writable.clone()));
            assert_eq!(views, chains.collect::<Vec<_>>());
            // Some are posted, some of those filled, and then none is.
            held.post(index);
            let landed = dice.below(index as u64 + 2) as usize;
            let rest = |held: &Held| held.unposted().map(|view| view.head).collect::<Vec<_>>();
            let behind = |count| plain.iter().skip(count).map(|chain| chain.head).collect::<Vec<_>>();
            assert_eq!((held.posted(), rest(&held)), (index.min(plain.len()), behind(index)));
            held.land(landed);
            assert_eq!(held.posted(), index.min(plain.len()).saturating_sub(landed));
            held.withdraw();
            assert_eq!(rest(&held), behind(0));
            let pieces: usize = plain.iter().map(|chain| chain.writable.len()).sum();
            let room: u64 = plain.iter().map(Chain::writable_len).sum();
            assert_eq!((held.len(), held.room(), held.pieces()), (plain.len(), room, pieces));
            assert_eq!(held.is_empty(), held.front().is_none());
        }
    }
}
