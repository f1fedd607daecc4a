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

/// In the order in which frames fill them. Those that somebody is slow to fill, at a port, are none of them until he is done.
pub(super) struct Held {
    /// `slow` ones first.
    buffers: VecDeque<Buffer>,
    /// Theirs, from `first` on.
    spans: Vec<Span>,
    first: usize,
    room: u64,
    slow: usize,
    slow_spans: usize,
    /// So many behind the slow ones, and their pieces, wait at a port for frames to land in.
    posted: usize,
    posted_spans: usize,
}

impl Held {
    /// As many as a queue of that size has.
    pub fn new(size: u16) -> Self {
        let (buffers, spans) =
            (VecDeque::with_capacity(size.into()), Vec::with_capacity(2 * usize::from(size)));
        Self { buffers, spans, first: 0, room: 0, slow: 0, slow_spans: 0, posted: 0, posted_spans: 0 }
    }

    /// Bytes in all of them.
    pub fn room(&self) -> u64 {
        self.room
    }

    /// Pieces of all of them.
    pub fn pieces(&self) -> usize {
        self.spans.len() - self.first - self.slow_spans
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn len(&self) -> usize {
        self.buffers.len() - self.slow
    }

    pub fn front(&self) -> Option<View<'_>> {
        self.iter().next()
    }

    pub fn iter(&self) -> Views<'_> {
        self.views(0, 0)
    }

    fn views(&self, buffers: usize, spans: usize) -> Views<'_> {
        let spans = &self.spans[self.first + self.slow_spans + spans..];
        Views { buffers: self.buffers.range(self.slow + buffers..), spans }
    }

    pub fn posted(&self) -> usize {
        self.posted
    }

    /// Whether some are at a port, posted or slowly filled.
    pub fn is_at_port(&self) -> bool {
        self.slow + self.posted > 0
    }

    /// Those that are not posted.
    pub fn unposted(&self) -> Views<'_> {
        self.views(self.posted, self.posted_spans)
    }

    /// The next `count` are posted, too.
    pub fn post(&mut self, count: usize) {
        let more: usize = self.unposted().take(count).map(|view| view.spans.len()).sum();
        self.posted_spans += more;
        self.posted += count.min(self.len() - self.posted);
    }

    /// The `count` behind the first `after` that are at the port have been filled: they are the first now.
    pub fn land(&mut self, after: usize, count: usize) {
        self.pass_slow(after);
        let count = count.min(self.slow + self.posted - after.min(self.slow));
        if after < self.slow {
            self.bring_back(after, count);
        } else {
            self.posted_spans -= self.spans_of(count);
            self.posted -= count;
        }
    }

    /// The first `count` that are at the port are slow.
    fn pass_slow(&mut self, count: usize) {
        let more = count.saturating_sub(self.slow).min(self.posted);
        if more > 0 {
            let passed = |view: View<'_>| (view.spans.len(), view.len);
            let (spans, room) =
                self.iter().take(more).map(passed).fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
            self.slow += more;
            self.slow_spans += spans;
            self.room -= room;
            self.posted -= more;
            self.posted_spans -= spans;
        }
    }

    /// Of the slow ones, the `count` behind the first `after` are filled.
    fn bring_back(&mut self, after: usize, count: usize) {
        let count = count.min(self.slow - after);
        let spans = |from: usize, to: usize| -> usize {
            self.buffers.range(from..to).map(|b| b.spans as usize).sum()
        };
        let (start, middle) = (self.first + spans(0, after), spans(after, after + count));
        let room: u64 = self.buffers.range(after..after + count).map(|b| b.len).sum();
        let end = self.first + self.slow_spans;
        self.spans[start..end].rotate_left(middle);
        self.buffers.make_contiguous()[after..self.slow].rotate_left(count);
        self.slow -= count;
        self.slow_spans -= middle;
        self.room += room;
    }

    /// None is posted any more; the first `slow` that were at the port are still being filled.
    pub fn withdraw(&mut self, slow: usize) {
        self.pass_slow(slow);
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
        if self.slow > 0 {
            for _ in 0..count {
                self.remove(0);
            }
            return;
        }
        for buffer in self.buffers.drain(..count.min(self.buffers.len())) {
            self.room -= buffer.len;
            self.first += buffer.spans as usize;
        }
    }

    /// Lets go of one; its head.
    pub fn remove(&mut self, index: usize) -> Option<u16> {
        let start = self.first + self.slow_spans + self.spans_of(index);
        let buffer = self.buffers.remove(self.slow + index)?;
        self.spans.drain(start..start + buffer.spans as usize);
        self.room -= buffer.len;
        Some(buffer.head)
    }

    /// Lets go of the one that was taken last, with `next` as the place behind it; its head.
    pub fn remove_last(&mut self, next: u16) -> Option<u16> {
        let at = self.buffers.range(self.slow..).rposition(|buffer| buffer.place == next)?;
        self.remove(at)
    }

    /// Puts the first `count` behind the others.
    pub fn pass_over(&mut self, count: usize) {
        let count = count.min(self.len());
        let spans = self.spans_of(count);
        self.spans[self.first + self.slow_spans..].rotate_left(spans);
        if self.slow == 0 {
            self.buffers.rotate_left(count);
        } else {
            self.buffers.make_contiguous()[self.slow..].rotate_left(count);
        }
    }

    /// The pieces of the first `count`.
    fn spans_of(&self, count: usize) -> usize {
        self.iter().take(count).map(|view| view.spans.len()).sum()
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
        let (mut held, mut slow, mut plain, mut place) = (Held::new(4), Vec::new(), VecDeque::new(), 0u16);
        for number in 0..20_000u64 {
            let index = dice.below(plain.len() as u64 + 1) as usize;
            match dice.below(8) {
                0..4 if slow.len() + plain.len() < 40 => {
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
            same(&held, &plain);
            // Some are posted, some of those filled, not always the first, and handed over or passed over. Then none is posted.
            held.post(index);
            let posted = index.min(plain.len());
            assert_eq!((held.posted(), held.is_at_port()), (posted, slow.len() + posted > 0));
            assert!(
                held.unposted().map(|view| view.head).eq(plain.iter().skip(posted).map(|chain| chain.head))
            );
            // In slow ones, or in posted ones.
            let at_port = slow.len() + posted;
            let after = dice.below(at_port as u64 + 1) as usize;
            let most = if after < slow.len() { slow.len() } else { at_port };
            let count = dice.below((most - after) as u64 + 1) as usize;
            held.land(after, count);
            let left = if after < slow.len() { slow.len() - count } else { after };
            let mut at_port: VecDeque<Chain> = slow.drain(..).chain(plain.drain(..posted)).collect();
            let landed: Vec<_> = at_port.drain(after..after + count).collect();
            slow.extend(at_port.drain(..left));
            assert_eq!(held.posted(), at_port.len());
            at_port.append(&mut plain);
            plain = at_port;
            if dice.below(2) == 0 {
                held.done(count);
            } else {
                held.pass_over(count);
                plain.extend(landed);
            }
            same(&held, &plain);
            let more = dice.below(held.posted() as u64 + 1) as usize;
            held.withdraw(slow.len() + more);
            slow.extend(plain.drain(..more));
            same(&held, &plain);
            assert_eq!((held.posted(), held.is_at_port()), (0, !slow.is_empty()));
        }
    }

    fn same(held: &Held, plain: &VecDeque<Chain>) {
        let views: Vec<_> = held.iter().map(|view| (view.head, view.len, view.spans.to_vec())).collect();
        let chains = plain.iter().map(|chain| (chain.head, chain.writable_len(), chain.writable.clone()));
        assert_eq!(views, chains.collect::<Vec<_>>());
        let pieces: usize = plain.iter().map(|chain| chain.writable.len()).sum();
        let room: u64 = plain.iter().map(Chain::writable_len).sum();
        assert_eq!((held.len(), held.room(), held.pieces()), (plain.len(), room, pieces));
        assert_eq!(held.is_empty(), held.front().is_none());
    }
}
