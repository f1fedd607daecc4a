//! What stands for guest memory: buffers without bytes, which must not be written to once they have been taken back.

use std::collections::VecDeque;

use crate::memory::Memory;

#[derive(Default)]
pub(crate) struct Pieces;

pub(crate) struct IoReader<'a>(pub &'a [u8]);

pub(crate) struct Buffers<O> {
    sizes: VecDeque<usize>,
    owner: O,
}

pub(crate) struct OwnedList<O>(O);

impl Buffers<Memory> {
    pub fn of(owner: Memory, sizes: &[usize]) -> Self {
        Self { sizes: sizes.iter().copied().collect(), owner }
    }

    pub fn beside(&self) -> Self {
        Self::of(self.owner.clone(), &[])
    }

    pub fn append(&mut self, more: &mut Self) -> bool {
        self.sizes.append(&mut more.sizes);
        true
    }

    pub fn clear(&mut self) {
        self.sizes.clear();
    }

    pub fn lengths(&self) -> impl Iterator<Item = usize> {
        self.sizes.iter().copied()
    }

    pub fn take(&mut self, count: usize, _: Pieces) -> OwnedList<Memory> {
        self.sizes.drain(..count);
        OwnedList(self.owner.clone())
    }
}

impl OwnedList<Memory> {
    pub fn copy_from(&self, _: usize, bytes: &[u8]) -> usize {
        self.0.write();
        bytes.len()
    }

    pub fn fill_from(&self, at: usize, reader: &mut IoReader<'_>) {
        self.copy_from(at, reader.0);
    }

    pub fn into_parts(self) -> (Pieces, Memory) {
        (Pieces, self.0)
    }
}
