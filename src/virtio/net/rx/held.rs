#![forbid(unsafe_code)]
//! The driver's buffers that wait for frames, with what is asked of them for every frame added up once.

use std::collections::{VecDeque, vec_deque};

use crate::virtio::queue::Chain;

pub(super) struct Buffer {
    pub chain: Chain,
    /// The bytes in it.
    pub len: u64,
}

/// In the order in which frames fill them.
#[derive(Default)]
pub(super) struct Held {
    buffers: VecDeque<Buffer>,
    room: u64,
    pieces: usize,
    /// Chains without a buffer.
    spare: Vec<Chain>,
}

impl Held {
    /// As many as a queue of that size has, each of any length that is usual.
    pub fn new(size: u16) -> Self {
        Self { buffers: VecDeque::with_capacity(size.into()), ..Self::default() }
    }

    /// Bytes in all of them.
    pub fn room(&self) -> u64 {
        self.room
    }

    /// Pieces of all of them.
    pub fn pieces(&self) -> usize {
        self.pieces
    }

    pub fn is_empty(&self) -> bool {
        self.buffers.is_empty()
    }

    pub fn len(&self) -> usize {
        self.buffers.len()
    }

    pub fn first(&self) -> Option<&Buffer> {
        self.buffers.front()
    }

    pub fn iter(&self) -> vec_deque::Iter<'_, Buffer> {
        self.buffers.iter()
    }

    /// Those behind the first `count`.
    pub fn behind(&self, count: usize) -> impl Iterator<Item = &Buffer> {
        self.buffers.range(count.min(self.buffers.len())..)
    }

    /// Something to take a chain with.
    pub fn spare(&mut self) -> Chain {
        self.spare.pop().unwrap_or_default()
    }

    pub fn put_spare(&mut self, chain: Chain) {
        self.spare.push(chain);
    }

    pub fn push(&mut self, chain: Chain, len: u64) {
        self.room += len;
        self.pieces += chain.writable.len();
        self.buffers.push_back(Buffer { chain, len });
    }

    /// Lets go of the first `count`.
    pub fn done(&mut self, count: usize) {
        for Buffer { chain, len } in self.buffers.drain(..count.min(self.buffers.len())) {
            self.room -= len;
            self.pieces -= chain.writable.len();
            self.spare.push(chain);
        }
    }

    /// Lets go of one; its head.
    pub fn remove(&mut self, index: usize) -> Option<u16> {
        let Buffer { chain, len } = self.buffers.remove(index)?;
        self.room -= len;
        self.pieces -= chain.writable.len();
        let head = chain.head;
        self.spare.push(chain);
        Some(head)
    }

    /// Lets go of the one that was taken last, with `next` as the place behind it; its head.
    pub fn remove_last(&mut self, next: u16) -> Option<u16> {
        let at = self.buffers.iter().rposition(|buffer| buffer.chain.place == next)?;
        self.remove(at)
    }

    /// Puts the first `count` behind the others.
    pub fn pass_over(&mut self, count: usize) {
        self.buffers.rotate_left(count.min(self.buffers.len()));
    }
}
