//! Buffers that wait to be filled.

use std::collections::VecDeque;
use std::ops::Deref;

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::{OwnedList, Piece, Pieces};

/// Buffers in a guest's memory that are to be filled one after the other, which keep that memory.
pub(crate) struct Buffers<O> {
    pieces: VecDeque<Piece>,
    /// Of each buffer, how many pieces and bytes it has.
    sizes: VecDeque<(usize, usize)>,
    owner: O,
}

impl<O: Deref<Target = GuestMemoryMmap> + Clone> Buffers<O> {
    /// None yet, in that memory.
    pub fn new(owner: O) -> Self {
        Self { pieces: VecDeque::new(), sizes: VecDeque::new(), owner }
    }

    /// None yet, in the same memory.
    pub fn beside(&self) -> Self {
        Self::new(self.owner.clone())
    }

    /// Appends a buffer that is at these places, each of so many bytes; `false`, and nothing, where one is not in one piece of the memory.
    pub fn push(&mut self, places: impl Iterator<Item = (GuestAddress, usize)>) -> bool {
        let (before, mut all) = (self.pieces.len(), 0);
        for (at, len) in places {
            let found = self.owner.iter().find_map(|region| {
                let offset = at.0.checked_sub(region.start_addr().0)?;
                let end = offset.checked_add(len as u64)?;
                (end <= region.len()).then(|| region.as_ptr().wrapping_add(offset as usize))
            });
            let Some(base) = found else {
                self.pieces.truncate(before);
                return false;
            };
            self.pieces.push_back(Piece(libc::iovec { iov_base: base.cast(), iov_len: len }));
            all += len;
        }
        self.sizes.push_back((self.pieces.len() - before, all));
        true
    }

    /// Moves those of `more` behind them, which are in the same memory; else `false`, and none.
    pub fn append(&mut self, more: &mut Self) -> bool {
        let same = std::ptr::eq::<GuestMemoryMmap>(&*self.owner, &*more.owner);
        if same {
            self.pieces.append(&mut more.pieces);
            self.sizes.append(&mut more.sizes);
        }
        same
    }

    pub fn len(&self) -> usize {
        self.sizes.len()
    }

    pub fn clear(&mut self) {
        self.pieces.clear();
        self.sizes.clear();
    }

    /// The bytes of each.
    pub fn lengths(&self) -> impl Iterator<Item = usize> {
        self.sizes.iter().map(|(_, len)| *len)
    }

    /// Takes the first `count` out, as a list in that room.
    pub fn take(&mut self, count: usize, mut room: Pieces) -> OwnedList<O> {
        let taken: usize = self.sizes.drain(..count.min(self.sizes.len())).map(|(pieces, _)| pieces).sum();
        room.0.clear();
        for piece in self.pieces.drain(..taken) {
            if !room.0.last_mut().is_some_and(|last| last.join(&piece)) {
                room.0.push(piece);
            }
        }
        OwnedList { pieces: room, owner: self.owner.clone() }
    }
}
