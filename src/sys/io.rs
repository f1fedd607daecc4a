//! Reading and writing files straight from and to guest memory.

use std::io;
use std::marker::PhantomData;
use std::ops::Deref;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, VolatileSlice};

pub(crate) use buffers::Buffers;

mod buffers;

/// What the kernel takes in one call (`UIO_MAXIOV`).
const MAX_PIECES: usize = 1024;

/// Room for the pieces of a transfer, kept from one to the next so that none allocates.
#[derive(Default)]
pub(crate) struct Pieces(Vec<Piece>);

#[derive(Clone, Copy)]
#[repr(transparent)]
struct Piece(libc::iovec);

// SAFETY: the pointers are followed through an `IoList` only, which borrows what they point to and starts from an empty list, or through
// an `OwnedList`, made of `Buffers` or not, which has the owner of what they point to beside them, wherever they go. Elsewhere they
// are numbers left over from the last transfer.
unsafe impl Send for Piece {}

impl Piece {
    fn lies_in(&self, memory: &GuestMemoryMmap) -> bool {
        memory.iter().any(|region| {
            // Below the region's bytes it wraps, and is beyond their end.
            let offset = self.0.iov_base.addr().wrapping_sub(region.as_ptr().addr()) as u64;
            offset.checked_add(self.0.iov_len as u64).is_some_and(|end| end <= region.len())
        })
    }

    /// Takes the next one in, if that begins where this one ends: long copies cost less than short ones.
    fn join(&mut self, next: &Piece) -> bool {
        let adjoins = self.0.iov_base.cast::<u8>().wrapping_add(self.0.iov_len) == next.0.iov_base.cast();
        self.0.iov_len += if adjoins { next.0.iov_len } else { 0 };
        adjoins
    }
}

impl Pieces {
    pub fn with_capacity(count: usize) -> Self {
        Self(Vec::with_capacity(count))
    }

    /// An empty list in that room.
    pub fn list(&mut self) -> IoList<'_> {
        self.0.clear();
        IoList { pieces: &mut self.0, done: 0, readonly: false, memory: PhantomData }
    }

    /// Takes over what is left of a list. Nothing keeps its memory: that is for the caller to do.
    pub(super) fn copy(&mut self, list: &IoList<'_>) {
        self.0.clear();
        self.0.extend_from_slice(&list.pieces[list.done..]);
    }

    /// The list again that was copied, which lay in that memory.
    pub(super) fn again<'a>(&'a mut self, _: &'a GuestMemoryMmap) -> IoList<'a> {
        IoList { pieces: &mut self.0, done: 0, readonly: false, memory: PhantomData }
    }

    /// The pieces as the kernel's interfaces describe them.
    pub(super) fn raw(&self) -> &[libc::iovec] {
        raw(&self.0)
    }

    /// The bytes in it.
    pub(super) fn len(&self) -> u64 {
        self.0.iter().map(|p| p.0.iov_len as u64).sum()
    }
}

/// Memory to transfer, in pieces and in order: a guest's, and vmbed's own in front of or behind it.
///
/// The guest may change its part at any moment, so there is no slice of it to be had: bytes are copied in and out.
/// What was read once must not be read again and taken for the same.
pub struct IoList<'a> {
    pieces: &'a mut Vec<Piece>,
    /// Pieces that are behind us.
    done: usize,
    /// Holds memory that is not to be written to.
    readonly: bool,
    memory: PhantomData<VolatileSlice<'a>>,
}

impl<'a> IoList<'a> {
    /// Appends a piece of guest memory.
    pub(crate) fn push(&mut self, slice: VolatileSlice<'a>) {
        self.append(slice.ptr_guard_mut().as_ptr(), slice.len());
    }

    /// Appends memory of ours to be written to a file.
    pub(crate) fn push_bytes(&mut self, bytes: &'a [u8]) {
        self.readonly = true;
        self.append(bytes.as_ptr().cast_mut(), bytes.len());
    }

    /// Puts memory of ours in front, to be written to a file.
    pub(crate) fn push_front_bytes(&mut self, bytes: &'a [u8]) {
        self.readonly = true;
        let piece = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        self.pieces.insert(self.done, Piece(piece));
    }

    /// Appends memory of ours to be filled from a file.
    pub(crate) fn push_room(&mut self, bytes: &'a mut [u8]) {
        self.append(bytes.as_mut_ptr(), bytes.len());
    }

    fn append(&mut self, base: *mut u8, len: usize) {
        self.pieces.push(Piece(libc::iovec { iov_base: base.cast(), iov_len: len }));
    }

    /// The bytes that are left.
    pub(crate) fn remaining(&self) -> u64 {
        self.pieces[self.done..].iter().map(|p| p.0.iov_len as u64).sum()
    }

    /// Goes on behind the first `count` bytes, or at the end.
    pub(crate) fn advance(&mut self, mut count: usize) {
        while let Some(Piece(piece)) = self.pieces.get_mut(self.done) {
            let step = count.min(piece.iov_len);
            piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(step).cast();
            piece.iov_len -= step;
            count -= step;
            if piece.iov_len > 0 {
                return;
            }
            self.done += 1;
        }
    }

    /// The next pieces as one call takes them.
    fn next(&self) -> (*const libc::iovec, libc::c_int) {
        let pieces = &self.pieces[self.done..];
        (pieces.as_ptr().cast(), pieces.len().min(MAX_PIECES) as libc::c_int)
    }

    /// How many bytes there are.
    #[allow(clippy::len_without_is_empty, reason = "a frame is never empty")]
    pub fn len(&self) -> usize {
        self.remaining() as usize
    }

    /// Copies what begins at byte `at` into `bytes`; how many there were.
    pub fn copy_to(&self, at: usize, bytes: &mut [u8]) -> usize {
        copy_to(&self.pieces[self.done..], at, bytes)
    }

    /// Copies `bytes` over what begins at byte `at`; how many had room.
    ///
    /// # Errors
    /// The memory is not to be written to (EFAULT): it belongs to a frame that is to be sent.
    pub fn copy_from(&self, at: usize, bytes: &[u8]) -> io::Result<usize> {
        self.to_fill()?;
        Ok(copy_from(&self.pieces[self.done..], at, bytes))
    }

    /// The `len` bytes from byte `at` on, in room for them.
    pub(crate) fn part<'b>(&self, room: &'b mut Pieces, mut at: usize, mut len: usize) -> IoList<'b>
    where
        'a: 'b,
    {
        let mut part = room.list();
        part.readonly = self.readonly;
        for Piece(piece) in &self.pieces[self.done..] {
            let skipped = at.min(piece.iov_len);
            let step = len.min(piece.iov_len - skipped);
            at -= skipped;
            len -= step;
            if step > 0 {
                part.append(piece.iov_base.cast::<u8>().wrapping_add(skipped), step);
            }
        }
        part
    }

    /// Fills it with zeroes.
    #[cfg(feature = "qcow2")]
    pub(crate) fn fill_zeroes(&self) -> io::Result<()> {
        static ZEROES: [u8; 4096] = [0; 4096];
        let (mut at, len) = (0, self.len());
        while at < len {
            at += self.copy_from(at, &ZEROES[..ZEROES.len().min(len - at)])?;
        }
        Ok(())
    }

    /// Whether every piece is in that memory.
    pub(crate) fn lies_in(&self, memory: &GuestMemoryMmap) -> bool {
        self.pieces[self.done..].iter().all(|piece| piece.lies_in(memory))
    }

    /// Whether every piece begins and ends at a multiple of `align`, a power of two.
    pub(crate) fn is_aligned(&self, align: usize) -> bool {
        self.pieces[self.done..].iter().all(|p| (p.0.iov_base.addr() | p.0.iov_len) & (align - 1) == 0)
    }

    /// The pieces as the kernel's interfaces describe them, valid for as long as the list is.
    pub(crate) fn raw(&self) -> &[libc::iovec] {
        raw(&self.pieces[self.done..])
    }

    /// Reads its bytes, from the first on.
    pub(crate) fn reader(&self) -> IoReader<'_> {
        IoReader { pieces: &self.pieces[self.done..], offset: 0 }
    }

    fn to_fill(&self) -> io::Result<(*const libc::iovec, libc::c_int)> {
        if self.readonly {
            return Err(io::Error::from_raw_os_error(libc::EFAULT));
        }
        Ok(self.next())
    }
}

/// A list that lives for as long as it has to: it keeps the memory of its guest.
pub(crate) struct OwnedList<O> {
    pieces: Pieces,
    owner: O,
}

impl<O: Deref<Target = GuestMemoryMmap>> OwnedList<O> {
    /// The pieces of `list`, in `room`, with the guest memory that they lie in. `None` where one lies elsewhere.
    pub fn keep(list: &IoList<'_>, mut room: Pieces, owner: O) -> Option<Self> {
        room.copy(list);
        list.lies_in(&owner).then_some(Self { pieces: room, owner })
    }

    /// As [`IoList::copy_to`].
    pub fn copy_to(&self, at: usize, bytes: &mut [u8]) -> usize {
        copy_to(&self.pieces.0, at, bytes)
    }

    /// As [`IoList::copy_from`], whatever the memory is for.
    pub fn copy_from(&self, at: usize, bytes: &[u8]) -> usize {
        copy_from(&self.pieces.0, at, bytes)
    }

    /// Copies what `reader` has over what begins at byte `at`, as far as there is room, from one guest's memory to another's.
    pub fn fill_from(&self, at: usize, reader: &mut IoReader<'_>) {
        for (base, len) in from_byte(&self.pieces.0, at) {
            // SAFETY: within a piece of this list, which owns its memory. The guest may use its memory meanwhile: no reference is made of it.
            reader.copy_to(unsafe { VolatileSlice::new(base, len) });
        }
    }

    /// The pieces as the kernel's interfaces describe them, valid until the list goes.
    pub fn raw(&self) -> &[libc::iovec] {
        self.pieces.raw()
    }

    /// The room for the next list, and what kept the memory.
    pub fn into_parts(self) -> (Pieces, O) {
        (self.pieces, self.owner)
    }
}

fn raw(pieces: &[Piece]) -> &[libc::iovec] {
    // SAFETY: a `Piece` is an iovec (repr(transparent)).
    unsafe { std::slice::from_raw_parts(pieces.as_ptr().cast(), pieces.len()) }
}

/// The pieces from byte `at` on.
fn from_byte(pieces: &[Piece], mut at: usize) -> impl Iterator<Item = (*mut u8, usize)> {
    pieces.iter().filter_map(move |piece| {
        let skipped = at.min(piece.0.iov_len);
        at -= skipped;
        let left = piece.0.iov_len - skipped;
        (left > 0).then_some((piece.0.iov_base.cast::<u8>().wrapping_add(skipped), left))
    })
}

/// Only for the pieces of a list, which borrows or owns their memory.
fn copy_to(pieces: &[Piece], at: usize, bytes: &mut [u8]) -> usize {
    let mut done = 0;
    for (base, len) in from_byte(pieces, at) {
        let into = &mut bytes[done..];
        let step = len.min(into.len());
        // SAFETY: within a piece of a list that lives through this call. The guest may change its memory meanwhile:
        // the access is volatile.
        unsafe { VolatileSlice::new(base, step) }.copy_to(&mut into[..step]);
        done += step;
        if done == bytes.len() {
            break;
        }
    }
    done
}

/// Only for the pieces of a list, which borrows or owns their memory, and where none is to be read only.
fn copy_from(pieces: &[Piece], at: usize, bytes: &[u8]) -> usize {
    let mut done = 0;
    for (base, len) in from_byte(pieces, at) {
        let from = &bytes[done..];
        let step = len.min(from.len());
        // SAFETY: as in `copy_to`.
        unsafe { VolatileSlice::new(base, step) }.copy_from(&from[..step]);
        done += step;
        if done == bytes.len() {
            break;
        }
    }
    done
}

/// A place in an [`IoList`]. Each byte is read once, and the guest may have changed it since it was last looked at.
#[derive(Clone)]
pub(crate) struct IoReader<'a> {
    pieces: &'a [Piece],
    /// Bytes of the first piece that are behind us.
    offset: usize,
}

impl IoReader<'_> {
    /// Copies the next bytes into memory of ours; how many there were.
    pub fn read(&mut self, into: &mut [u8]) -> usize {
        let mut rest = &mut *into;
        while let Some((piece, later)) = self.pieces.split_first()
            && !rest.is_empty()
        {
            let (now, next) = rest.split_at_mut((piece.0.iov_len - self.offset).min(rest.len()));
            let base = piece.0.iov_base.cast::<u8>().wrapping_add(self.offset);
            // SAFETY: within a piece, which is memory that the list borrows for as long as we live. The guest may
            // change its memory meanwhile: the access is volatile.
            unsafe { VolatileSlice::new(base, now.len()) }.copy_to(now);
            self.offset += now.len();
            if self.offset == piece.0.iov_len {
                (self.pieces, self.offset) = (later, 0);
            }
            rest = next;
        }
        let left = rest.len();
        into.len() - left
    }

    /// Copies the next bytes to a piece of another guest's memory, as many as there are.
    fn copy_to(&mut self, into: VolatileSlice<'_>) {
        let mut done = 0;
        while let Some((piece, later)) = self.pieces.split_first()
            && let Ok(rest) = into.offset(done)
            && !rest.is_empty()
        {
            let now = (piece.0.iov_len - self.offset).min(rest.len());
            let base = piece.0.iov_base.cast::<u8>().wrapping_add(self.offset);
            // SAFETY: within a piece, as in `read`. This is a plain copy between raw pointers, which may overlap, and both guests may change
            // their sides meanwhile: then what arrives is neither the one nor the other. Nobody looks at it here, no reference is made, and
            // it is the guests' own.
            unsafe { VolatileSlice::new(base, now) }.copy_to_volatile_slice(rest);
            self.offset += now;
            if self.offset == piece.0.iov_len {
                (self.pieces, self.offset) = (later, 0);
            }
            done += now;
        }
    }
}

/// Reads at `offset` into the list, once; 0 at the end of the file. Does not move on in the list.
pub(crate) fn read_at(fd: BorrowedFd<'_>, list: &IoList<'_>, offset: u64) -> io::Result<usize> {
    let (pieces, count) = list.to_fill()?;
    // SAFETY: `count` initialized iovecs, each of them writable memory that the list borrows; the guest
    // may change its memory at the same time, of which we hold no reference.
    count_of(unsafe { libc::preadv64(fd.as_raw_fd(), pieces, count, to_offset(offset)?) })
}

/// Writes the list at `offset`, once. `durable`: on stable storage when this returns.
pub(crate) fn write_at(
    fd: BorrowedFd<'_>,
    list: &IoList<'_>,
    offset: u64,
    durable: bool,
) -> io::Result<usize> {
    let (pieces, count) = list.next();
    let flags = if durable { libc::RWF_DSYNC } else { 0 };
    let offset = to_offset(offset)?;
    // SAFETY: `count` initialized iovecs, each of them memory that the list borrows.
    count_of(unsafe { libc::pwritev2(fd.as_raw_fd(), pieces, count, offset, flags) })
}

/// Takes what there is off a socket, without waiting.
pub(crate) fn receive(fd: BorrowedFd<'_>, list: &IoList<'_>) -> io::Result<usize> {
    receive_with(fd, list, 0)
}

/// Takes one message off a socket that keeps them apart, without waiting; how long it was. What had no room is lost.
pub(crate) fn receive_message(fd: BorrowedFd<'_>, list: &IoList<'_>) -> io::Result<usize> {
    receive_with(fd, list, libc::MSG_TRUNC)
}

fn receive_with(fd: BorrowedFd<'_>, list: &IoList<'_>, flags: libc::c_int) -> io::Result<usize> {
    let (pieces, count) = list.to_fill()?;
    let mut message = message(pieces, count);
    // SAFETY: as in `read_at`; the kernel writes to the message's header, too.
    count_of(unsafe { libc::recvmsg(fd.as_raw_fd(), &mut message, libc::MSG_DONTWAIT | flags) })
}

/// Sends the list as one message, without waiting.
pub(crate) fn send(fd: BorrowedFd<'_>, list: &IoList<'_>) -> io::Result<usize> {
    let (pieces, count) = list.next();
    let message = message(pieces, count);
    // SAFETY: as in `write_at`.
    count_of(unsafe { libc::sendmsg(fd.as_raw_fd(), &message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) })
}

fn message(pieces: *const libc::iovec, count: libc::c_int) -> libc::msghdr {
    // SAFETY: all zeroes is a message with neither address, data nor control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    (message.msg_iov, message.msg_iovlen) = (pieces.cast_mut(), count as _);
    message
}

/// Reads one message or what is there into the list.
pub(crate) fn read(fd: BorrowedFd<'_>, list: &IoList<'_>) -> io::Result<usize> {
    let (pieces, count) = list.to_fill()?;
    // SAFETY: as in `read_at`.
    count_of(unsafe { libc::readv(fd.as_raw_fd(), pieces, count) })
}

/// Writes the list as one message.
pub(crate) fn write(fd: BorrowedFd<'_>, list: &IoList<'_>) -> io::Result<usize> {
    let (pieces, count) = list.next();
    // SAFETY: as in `write_at`.
    count_of(unsafe { libc::writev(fd.as_raw_fd(), pieces, count) })
}

/// Fills `bytes` from the kernel's random number generator. Up to 256 bytes never come short.
pub(crate) fn random(bytes: &mut [u8]) -> io::Result<usize> {
    // SAFETY: writes at most the length of the slice into it.
    count_of(unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) })
}

fn to_offset(offset: u64) -> io::Result<libc::off64_t> {
    offset.try_into().map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))
}

fn count_of(result: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

    use super::*;

    #[test]
    fn guest_memory_goes_to_a_file_and_back_in_pieces() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
        let file = crate::sys::memory::sealed_memfd(c"test", 0x1000).unwrap();
        memory.write_slice(b"guest", GuestAddress(0x3000)).unwrap();
        let mut pieces = Pieces::default();
        let mut list = pieces.list();
        list.push_bytes(b"ours ");
        list.push(memory.get_slice(GuestAddress(0x3000), 5).unwrap());
        assert_eq!(list.remaining(), 10);
        list.advance(2);
        assert_eq!(write_at(file.as_fd(), &list, 7, true).unwrap(), 8);
        assert!(read_at(file.as_fd(), &list, 7).is_err(), "what is not to be written to is refused");

        let mut head = [0; 2];
        let mut list = pieces.list();
        list.push_room(&mut head);
        list.push(memory.get_slice(GuestAddress(0x10), 6).unwrap());
        assert_eq!(read_at(file.as_fd(), &list, 7).unwrap(), 8);
        list.advance(100);
        assert_eq!(list.remaining(), 0);
        assert_eq!(&head, b"rs");
        let mut rest = [0; 6];
        memory.read_slice(&mut rest, GuestAddress(0x10)).unwrap();
        assert_eq!(&rest, b" guest");
        assert_eq!(read_at(file.as_fd(), &pieces.list(), u64::MAX).unwrap_err().raw_os_error(), Some(75));
    }

    #[test]
    fn a_list_is_read_and_filled_without_a_file() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
        memory.write_slice(b"in the guest", GuestAddress(0x3000)).unwrap();
        let mut pieces = Pieces::default();
        let mut list = pieces.list();
        list.push_bytes(b"what is ");
        list.push_bytes(b"");
        list.push(memory.get_slice(GuestAddress(0x3000), 12).unwrap());
        let (mut reader, mut text) = (list.reader(), [0; 20]);
        assert_eq!(reader.read(&mut text[..3]), 3);
        let mut again = reader.clone();
        assert_eq!(reader.read(&mut text[3..10]), 7);
        assert_eq!(reader.read(&mut text[10..]), 10);
        assert_eq!((reader.read(&mut [0; 4]), &text), (0, b"what is in the guest"));
        let mut rest = [0; 99];
        assert_eq!((again.read(&mut rest), &rest[..17]), (17, &b"t is in the guest"[..]));
        let mut text = [0; 99];
        assert_eq!((list.len(), list.copy_to(0, &mut text[..20])), (20, 20));
        assert_eq!(&text[..20], b"what is in the guest");
        assert_eq!((list.copy_to(5, &mut text), &text[..15]), (15, &b"is in the guest"[..]));
        assert_eq!((list.copy_to(20, &mut text), list.copy_to(usize::MAX, &mut text)), (0, 0));
        assert!(list.copy_from(0, b"x").is_err(), "what is not to be written to is refused");
        list.advance(9);
        assert_eq!((list.copy_to(0, &mut text), &text[..11]), (11, &b"n the guest"[..]));

        let mut head = [0; 2];
        let mut list = pieces.list();
        list.push_room(&mut head);
        list.push(memory.get_slice(GuestAddress(0x10), 6).unwrap());
        assert_eq!(list.copy_from(0, b"ours").unwrap(), 4);
        assert_eq!(list.copy_from(1, b"longer than it").unwrap(), 7);
        assert_eq!(&head, b"ol");
        let mut rest = [0; 7];
        memory.read_slice(&mut rest, GuestAddress(0x10)).unwrap();
        assert_eq!(&rest, b"onger \0");
    }

    #[test]
    fn an_owned_list_is_of_its_owners_memory_only() {
        type Guest = std::sync::Arc<GuestMemoryMmap>;
        let guest = || -> Guest {
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x2000), (GuestAddress(0x8000), 0x1000)])
                .unwrap()
                .into()
        };
        let (memory, other, ours) = (guest(), guest(), [1; 4]);
        let mut pieces = Pieces::default();
        let mut list = pieces.list();
        list.push(memory.get_slice(GuestAddress(0x1ff0), 16).unwrap());
        list.push(memory.get_slice(GuestAddress(0x8ffe), 2).unwrap());
        assert!(OwnedList::keep(&list, Pieces::default(), other.clone()).is_none());
        let owned = OwnedList::keep(&list, Pieces::default(), memory.clone()).unwrap();
        list.push_bytes(&ours);
        assert!(OwnedList::keep(&list, Pieces::default(), memory.clone()).is_none());
        assert_eq!((owned.pieces.len(), owned.raw().len(), owned.copy_from(15, b"abc")), (18, 2, 3));
        assert_eq!(memory.read_obj::<[u8; 2]>(GuestAddress(0x8ffe)).unwrap(), *b"bc");
        let mut back = [0; 4];
        assert_eq!((owned.copy_to(15, &mut back), back), (3, *b"abc\0"));
        let (mut room, owner) = owned.into_parts();
        assert_eq!((room.list().len(), std::sync::Arc::ptr_eq(&owner, &memory)), (0, true));
    }

    #[test]
    fn a_message_is_sent_and_received_whole_and_nothing_is_waited_for() {
        let (near, far) = std::os::unix::net::UnixDatagram::pair().unwrap();
        let mut pieces = Pieces::default();
        let mut list = pieces.list();
        list.push_bytes(b"ab");
        list.push_bytes(b"cd");
        assert_eq!(send(near.as_fd(), &list).unwrap(), 4);
        let mut room = [[0; 3]; 2];
        let [a, b] = &mut room;
        let mut other = Pieces::default();
        let mut list = other.list();
        list.push_room(a);
        list.push_room(b);
        assert_eq!(receive(far.as_fd(), &list).unwrap(), 4);
        assert_eq!(receive(far.as_fd(), &list).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(room, [*b"abc", *b"d\0\0"]);
    }

    #[test]
    fn more_pieces_than_one_call_takes() {
        let file = crate::sys::memory::sealed_memfd(c"test", 0x1000).unwrap();
        let bytes = [7u8; 2000];
        let mut pieces = Pieces::default();
        let mut list = pieces.list();
        bytes.iter().for_each(|b| list.push_bytes(std::slice::from_ref(b)));
        assert_eq!(write_at(file.as_fd(), &list, 0, false).unwrap(), MAX_PIECES);
        list.advance(MAX_PIECES);
        assert_eq!(write_at(file.as_fd(), &list, 1024, false).unwrap(), 2000 - MAX_PIECES);
    }
}
