#![forbid(unsafe_code)]
//! A descriptor chain as a device sees it: two lists of spans, and cursors that copy in and out of
//! them whatever way the driver has split its buffers.

use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend};

use crate::memory::Memory;

/// One buffer of the driver. Its end does not wrap; whether there is memory below is found at its use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub addr: GuestAddress,
    pub len: u32,
}

/// A buffer that is not in the guest's memory, or a chain that is too short.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadBuffer {
    #[error("a buffer is not in memory")]
    Outside,
    #[error("the buffers are too short")]
    Short,
}

/// What the driver made available as one request. Reused from request to request.
#[derive(Debug, Default)]
pub(crate) struct Chain {
    pub head: u16,
    /// Where it stood in the available ring: the index behind it.
    pub place: u16,
    /// What the device reads, without empty buffers.
    pub readable: Vec<Span>,
    /// What the device writes, without empty buffers.
    pub writable: Vec<Span>,
    /// Every readable buffer comes before every writable one, as the specification wants (2.7.4.2).
    /// Where it does not, the device refuses the request; the ring itself is sound.
    pub ordered: bool,
}

impl Chain {
    /// One that never allocates for chains of up to `size` descriptors.
    pub fn with_capacity(size: u16) -> Self {
        let spans = || Vec::with_capacity(size.into());
        Self { head: 0, place: 0, readable: spans(), writable: spans(), ordered: true }
    }

    pub fn readable_len(&self) -> u64 {
        length(&self.readable)
    }

    pub fn writable_len(&self) -> u64 {
        length(&self.writable)
    }

    pub fn reader<'a>(&'a self, memory: &'a Memory) -> Reader<'a> {
        Reader(Cursor::new(memory, &self.readable))
    }

    /// Reads what was written into writable buffers.
    pub fn buffer_reader<'a>(memory: &'a Memory, spans: &'a [Span]) -> Reader<'a> {
        Reader(Cursor::new(memory, spans))
    }

    /// Writes into writable buffers.
    pub fn buffer_writer<'a>(memory: &'a Memory, spans: &'a [Span]) -> Writer<'a> {
        Writer(Cursor::new(memory, spans))
    }

    pub fn writer<'a>(&'a self, memory: &'a Memory) -> Writer<'a> {
        Writer(Cursor::new(memory, &self.writable))
    }
}

/// The bytes in `spans`: as many spans as a queue has entries cannot wrap it.
pub(crate) fn length(spans: &[Span]) -> u64 {
    spans.iter().map(|s| u64::from(s.len)).sum()
}

/// A position in a list of spans.
#[derive(Clone)]
pub(crate) struct Cursor<'a> {
    memory: &'a Memory,
    spans: &'a [Span],
    /// Bytes of the first span that are behind us; less than its length.
    done: u32,
}

impl<'a> Cursor<'a> {
    pub fn new(memory: &'a Memory, spans: &'a [Span]) -> Self {
        Self { memory, spans, done: 0 }
    }

    pub fn remaining(&self) -> u64 {
        length(self.spans) - u64::from(self.done)
    }

    /// The next piece, of at most `max` bytes; `None` at the end.
    pub fn take(&mut self, max: u64) -> Option<Span> {
        let first = self.spans.first()?;
        let left = first.len - self.done;
        let len = u32::try_from(max).unwrap_or(u32::MAX).min(left);
        let piece = Span { addr: GuestAddress(first.addr.0 + u64::from(self.done)), len };
        if len == left {
            self.spans = &self.spans[1..];
            self.done = 0;
        } else {
            self.done += len;
        }
        Some(piece)
    }

    /// Where the next `len` bytes are, if they are in one buffer.
    fn peek(&self, len: u32) -> Option<GuestAddress> {
        let first = self.spans.first().filter(|first| first.len - self.done >= len)?;
        Some(GuestAddress(first.addr.0 + u64::from(self.done)))
    }

    /// Moves on by `count` bytes.
    pub fn skip(&mut self, mut count: u64) -> Result<(), BadBuffer> {
        while count > 0 {
            count -= u64::from(self.take(count).ok_or(BadBuffer::Short)?.len);
        }
        Ok(())
    }

    /// Calls `f` with every volatile slice of the next `count` bytes.
    pub fn slices(
        &mut self,
        mut count: u64,
        mut f: impl FnMut(vm_memory::VolatileSlice<'a>),
    ) -> Result<(), BadBuffer> {
        let memory: &'a Memory = self.memory;
        while count > 0 {
            let piece = self.take(count).ok_or(BadBuffer::Short)?;
            count -= u64::from(piece.len);
            if let Some(slice) = memory.slice(piece.addr, piece.len as usize) {
                f(slice);
                continue;
            }
            for slice in memory.get_slices(piece.addr, piece.len as usize) {
                f(slice.map_err(|_| BadBuffer::Outside)?);
            }
        }
        Ok(())
    }
}

/// Copies out of the driver's readable buffers, in order.
#[derive(Clone)]
pub(crate) struct Reader<'a>(Cursor<'a>);

impl<'a> Reader<'a> {
    /// Fills all of `to`, however it is split.
    pub fn read(&mut self, mut to: &mut [u8]) -> Result<(), BadBuffer> {
        while !to.is_empty() {
            let piece = self.0.take(to.len() as u64).ok_or(BadBuffer::Short)?;
            let (now, later) = to.split_at_mut(piece.len as usize);
            match self.0.memory.slice(piece.addr, now.len()) {
                Some(from) => drop(from.copy_to(now)),
                None => self.0.memory.read_slice(now, piece.addr).map_err(|_| BadBuffer::Outside)?,
            }
            to = later;
        }
        Ok(())
    }

    /// Moves on by `count` bytes.
    pub fn skip(&mut self, count: u64) -> Result<(), BadBuffer> {
        self.0.skip(count)
    }

    /// The next `N` bytes.
    pub fn read_array<const N: usize>(&mut self) -> Result<[u8; N], BadBuffer>
    where
        [u8; N]: ByteValued,
    {
        // As drivers send it: in one buffer.
        if let Some(bytes) = self.0.peek(N as u32).and_then(|at| self.0.memory.get(at)) {
            self.0.skip(N as u64)?;
            return Ok(bytes);
        }
        let mut bytes = [0; N];
        self.read(&mut bytes)?;
        Ok(bytes)
    }

    pub fn remaining(&self) -> u64 {
        self.0.remaining()
    }

    /// What has not been read yet.
    pub fn rest(self) -> Cursor<'a> {
        self.0
    }
}

/// Copies into the driver's writable buffers, in order.
#[derive(Clone)]
pub(crate) struct Writer<'a>(Cursor<'a>);

impl<'a> Writer<'a> {
    /// Writes all of `from`, however the buffers are split.
    pub fn write(&mut self, mut from: &[u8]) -> Result<(), BadBuffer> {
        while !from.is_empty() {
            let piece = self.0.take(from.len() as u64).ok_or(BadBuffer::Short)?;
            let (now, later) = from.split_at(piece.len as usize);
            match self.0.memory.slice(piece.addr, now.len()) {
                Some(to) => to.copy_from(now),
                None => self.0.memory.write_slice(now, piece.addr).map_err(|_| BadBuffer::Outside)?,
            }
            from = later;
        }
        Ok(())
    }

    #[cfg(test)]
    pub fn remaining(&self) -> u64 {
        self.0.remaining()
    }

    pub fn skip(&mut self, count: u64) -> Result<(), BadBuffer> {
        self.0.skip(count)
    }

    /// What has not been written yet.
    pub fn rest(self) -> Cursor<'a> {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spans(of: &[(u64, u32)]) -> Vec<Span> {
        of.iter().map(|&(addr, len)| Span { addr: GuestAddress(addr), len }).collect()
    }

    #[test]
    fn a_header_split_into_single_bytes_reads_the_same() {
        let memory = Memory::new(1 << 20).unwrap();
        let readable: Vec<_> = (0..16u64).map(|i| (0x1000 * (16 - i), 1)).collect();
        for (i, &(at, _)) in readable.iter().enumerate() {
            memory.write_obj(i as u8, GuestAddress(at)).unwrap();
        }
        let chain = Chain { readable: spans(&readable), ..Chain::default() };
        let mut reader = chain.reader(&memory);
        assert_eq!(reader.read_array::<16>().unwrap(), std::array::from_fn(|i| i as u8));
        assert_eq!(reader.read_array::<1>(), Err(BadBuffer::Short));
    }

    #[test]
    fn writes_cross_the_splits_and_end_at_the_end() {
        let memory = Memory::new(1 << 20).unwrap();
        let chain = Chain { writable: spans(&[(0x100, 3), (0x200, 1), (0x300, 4)]), ..Chain::default() };
        let mut writer = chain.writer(&memory);
        writer.skip(2).unwrap();
        writer.write(&[1, 2, 3]).unwrap();
        assert_eq!(writer.remaining(), 3);
        assert_eq!(writer.write(&[0; 4]), Err(BadBuffer::Short));
        let at = |a| memory.read_obj::<u8>(GuestAddress(a)).unwrap();
        assert_eq!([at(0x101), at(0x102), at(0x200), at(0x300)], [0, 1, 2, 3]);
    }

    #[test]
    fn a_buffer_outside_memory_is_found_at_its_use() {
        let memory = Memory::new(1 << 20).unwrap();
        let last = (1 << 20) - 4;
        let chain = Chain {
            readable: spans(&[(last, 8)]),
            writable: spans(&[(0xc000_0000, 16)]),
            ..Chain::default()
        };
        assert_eq!(chain.reader(&memory).read_array::<8>(), Err(BadBuffer::Outside));
        assert_eq!(chain.writer(&memory).write(&[0; 8]), Err(BadBuffer::Outside));
        let mut whole = 0;
        let mut rest = chain.reader(&memory).rest();
        assert_eq!(rest.slices(8, |s| whole += s.len()), Err(BadBuffer::Outside));
    }
}
