#![forbid(unsafe_code)]
//! Disks of the embedder's, behind the contract that devices know.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{Backend, BlockOp, IoRequest, Submitted};
use crate::error::{Error, ErrorKind, Result};
use crate::memory::Memory;
use crate::sys::io::{OwnedList, Pieces};
use crate::sys::{fd, lock};
use crate::units::Sectors;

/// A disk of your own, attached with [`VmBuilder::disk_backend`](crate::VmBuilder::disk_backend).
///
/// A request is complete when you say so, with [`BlockRequest::complete`]: within [`submit`](Self::submit), or later,
/// in any order, on any thread. Until then its memory is yours, and the guest waits: also when its driver resets the
/// device. [`pause`](crate::Vm::pause) waits, too, but answers `TimedOut` after 10 s, and the VM goes on; the end of the
/// VM gives up on what is not complete after 5 s.
///
/// ```
/// use vmbed::{BlockBackend, BlockOp, BlockRequest};
///
/// /// A disk in memory.
/// struct Ram(Vec<u8>);
///
/// impl BlockBackend for Ram {
///     fn size(&self) -> u64 {
///         self.0.len() as u64
///     }
///
///     fn submit(&mut self, mut request: BlockRequest) {
///         let at = request.offset() as usize;
///         let place = at..at + request.len() as usize;
///         match request.op() {
///             BlockOp::Read => drop(request.copy_from(0, &self.0[place])),
///             BlockOp::Write { .. } => drop(request.copy_to(0, &mut self.0[place])),
///             _ => {}
///         }
///         request.complete(Ok(()));
///     }
/// }
/// ```
pub trait BlockBackend: Send + 'static {
    /// The size in bytes, a multiple of 512. Asked once, when the VM is built.
    fn size(&self) -> u64;

    /// Whether the guest may not write. Asked once, when the VM is built; [`DiskConfig::readonly`](crate::DiskConfig)
    /// says it as well.
    fn readonly(&self) -> bool {
        false
    }

    /// Whether `Discard` and `WriteZeroes` come, too. Asked once, when the VM is built. By default the guest is told that the
    /// disk knows no such thing, and writes its zeroes.
    fn discards(&self) -> bool {
        false
    }

    /// Does the request, or begins it.
    ///
    /// Called on a device thread of the VM's, one call at a time; it must not wait for this VM, and while it has not
    /// returned, neither has anything that waits for the VM. A panic in it stops the VM. What comes lies within
    /// `size`, in multiples of 512 bytes, and a read-only disk gets no writes. At most 256 requests are on their
    /// way at a time, and there is no order among them: what a [`BlockOp::Flush`] follows are the writes that were
    /// completed before it came.
    fn submit(&mut self, request: BlockRequest);
}

/// A request to a [`BlockBackend`], and the guest's memory that it is about.
///
/// That memory stays where it is for as long as the request lives, also when the VM has ended. Dropped without an
/// answer, it fails with EIO.
pub struct BlockRequest {
    op: BlockOp,
    offset: u64,
    length: u64,
    tag: u64,
    /// Taken by the answer.
    buffers: Option<OwnedList<Memory>>,
    round: u64,
    shared: Arc<Shared>,
}

impl BlockRequest {
    /// What to do.
    pub fn op(&self) -> BlockOp {
        self.op
    }

    /// Where on the disk, in bytes. 0 for a flush.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// How many bytes. 0 for a flush.
    #[allow(clippy::len_without_is_empty, reason = "a request, not a collection")]
    pub fn len(&self) -> u64 {
        self.length
    }

    /// Copies what the guest has to say, from byte `at` of the request on, into `bytes`; how many there were. The
    /// guest can change it at any moment: look once.
    pub fn copy_to(&self, at: usize, bytes: &mut [u8]) -> usize {
        self.buffers.as_ref().map_or(0, |list| list.copy_to(at, bytes))
    }

    /// Copies `bytes` to where the guest waits for them, from byte `at` of the request on; how many had room. None
    /// where the request is not a read.
    pub fn copy_from(&mut self, at: usize, bytes: &[u8]) -> usize {
        match &self.buffers {
            Some(list) if self.op == BlockOp::Read => list.copy_from(at, bytes),
            _ => 0,
        }
    }

    /// Answers it. An error fails the request: the guest sees an I/O error, the embedder an event with the
    /// error's errno (EIO where it has none). `false` where nobody waits for the answer any more.
    ///
    /// Never blocks. What a flush says is done must be on stable storage, and what was written with
    /// `durable` as well.
    pub fn complete(mut self, outcome: io::Result<()>) -> bool {
        self.answer(outcome)
    }

    fn answer(&mut self, outcome: io::Result<()>) -> bool {
        let Some(buffers) = self.buffers.take() else { return false };
        // The guest's memory goes before its device can hear of it, and may go with it.
        let (pieces, memory) = buffers.into_parts();
        drop(memory);
        self.shared.answer(self.round, Ended { tag: self.tag, outcome, pieces })
    }

    /// The pieces of guest memory, for C.
    pub(crate) fn raw(&self) -> &[libc::iovec] {
        self.buffers.as_ref().map_or(&[], OwnedList::raw)
    }

    /// Unique among those that are on their way: below 256.
    pub(crate) fn tag(&self) -> u64 {
        self.tag
    }
}

impl Drop for BlockRequest {
    fn drop(&mut self) {
        self.answer(Err(io::Error::from_raw_os_error(libc::EIO)));
    }
}

impl fmt::Debug for BlockRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { op, offset, .. } = self;
        f.debug_struct("BlockRequest").field("op", op).field("offset", offset).finish_non_exhaustive()
    }
}

struct Ended {
    tag: u64,
    outcome: io::Result<()>,
    /// Room for the next request.
    pieces: Pieces,
}

/// What the device's thread shares with whoever completes.
struct Shared {
    answers: Mutex<Answers>,
    event: EventFd,
}

#[derive(Default)]
struct Answers {
    /// Counts how often all requests were given up. An answer to one of an earlier round is nobody's.
    round: u64,
    ended: Vec<Ended>,
    /// The request that `submit` has in hand, and its answer, of which no event need tell.
    in_hand: Option<u64>,
    at_once: Option<Ended>,
}

impl Shared {
    fn answer(&self, round: u64, ended: Ended) -> bool {
        let mut answers = lock(&self.answers);
        if answers.round != round {
            return false;
        }
        if answers.in_hand == Some(ended.tag) {
            answers.at_once = Some(ended);
            return true;
        }
        answers.ended.push(ended);
        let first = answers.ended.len() == 1;
        drop(answers);
        if first {
            // Full only when it rings anyway.
            fd::ring(&self.event);
        }
        true
    }
}

/// An embedder's disk as a device sees it.
pub(crate) struct OwnDisk {
    backend: Box<dyn BlockBackend>,
    size: u64,
    readonly: bool,
    discards: bool,
    shared: Arc<Shared>,
    /// Given back and forth with `Answers::ended`, so that neither grows anew.
    taken: Vec<Ended>,
    spare: Vec<Pieces>,
}

impl OwnDisk {
    /// `backend` for the disk `id`.
    ///
    /// # Errors
    /// Its size is none of a disk's. `Exhausted` when the process has no file descriptor left.
    pub fn new(id: &str, backend: Box<dyn BlockBackend>, readonly: bool) -> Result<Self> {
        let (size, readonly) = (backend.size(), readonly || backend.readonly());
        if size == 0 || !size.is_multiple_of(Sectors::SIZE) {
            let why = format!("{id}: its backend's size is {size}; it must be a multiple of 512, and not 0");
            return Err(Error::new(ErrorKind::InvalidArgument, why));
        }
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
            .map_err(|e| Error::os(format!("{id}: creating an eventfd"), e))?;
        let shared = Arc::new(Shared { answers: Mutex::default(), event });
        let discards = backend.discards() && !readonly;
        Ok(Self { backend, size, readonly, discards, shared, taken: Vec::new(), spare: Vec::new() })
    }
}

impl Backend for OwnDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn readonly(&self) -> bool {
        self.readonly
    }

    fn discards(&self) -> bool {
        self.discards
    }

    fn submit(&mut self, request: IoRequest<'_>) -> Submitted {
        let IoRequest { op, offset, length, buffers, memory, tag } = request;
        let room = self.spare.pop().unwrap_or_default();
        let Some(buffers) = OwnedList::keep(&buffers, room, memory.clone()) else {
            return Submitted::Done(Err(io::Error::from_raw_os_error(libc::EFAULT)));
        };
        let round = {
            let mut answers = lock(&self.shared.answers);
            answers.in_hand = Some(tag);
            answers.round
        };
        let shared = self.shared.clone();
        self.backend.submit(BlockRequest { op, offset, length, tag, buffers: Some(buffers), round, shared });
        let mut answers = lock(&self.shared.answers);
        answers.in_hand = None;
        match answers.at_once.take() {
            Some(Ended { outcome, pieces, .. }) => {
                self.spare.push(pieces);
                Submitted::Done(outcome)
            }
            None => Submitted::Pending,
        }
    }

    fn completions(&mut self, done: &mut dyn FnMut(u64, io::Result<()>)) {
        let _ = self.shared.event.read();
        std::mem::swap(&mut self.taken, &mut lock(&self.shared.answers).ended);
        for Ended { tag, outcome, pieces } in self.taken.drain(..) {
            self.spare.push(pieces);
            done(tag, outcome);
        }
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(fd::borrow(&self.shared.event))
    }

    fn abandon(&mut self) {
        let mut answers = lock(&self.shared.answers);
        answers.round += 1;
        answers.ended.clear();
        let _ = self.shared.event.read();
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{GuestAddress, GuestMemoryBackend};

    use super::*;

    /// Keeps every request.
    struct Keeps(Arc<Mutex<Vec<BlockRequest>>>, u64);

    impl BlockBackend for Keeps {
        fn size(&self) -> u64 {
            self.1
        }

        fn submit(&mut self, request: BlockRequest) {
            if request.offset() == 512 {
                assert!(request.complete(Ok(())));
            } else {
                lock(&self.0).push(request);
            }
        }
    }

    fn submit(disk: &mut OwnDisk, memory: &Memory, tag: u64, offset: u64) -> Submitted {
        let mut pieces = Pieces::default();
        let mut buffers = pieces.list();
        buffers.push(memory.get_slice(GuestAddress(0x1000), 512).unwrap());
        disk.submit(IoRequest { op: BlockOp::Read, offset, length: 512, buffers, memory, tag })
    }

    fn ended(disk: &mut OwnDisk) -> Vec<(u64, Option<i32>)> {
        let mut ended = Vec::new();
        disk.completions(&mut |tag, outcome| ended.push((tag, outcome.err().and_then(|e| e.raw_os_error()))));
        ended
    }

    fn disk() -> (OwnDisk, Arc<Mutex<Vec<BlockRequest>>>) {
        let kept = Arc::new(Mutex::new(Vec::new()));
        (OwnDisk::new("disk0", Box::new(Keeps(kept.clone(), 1 << 20)), false).unwrap(), kept)
    }

    #[test]
    fn an_answer_comes_at_once_or_later_in_any_order_and_wakes_the_device_once() {
        let (mut disk, kept) = disk();
        let memory = Memory::new(1 << 20).unwrap();
        assert!(matches!(submit(&mut disk, &memory, 7, 512), Submitted::Done(Ok(()))));
        assert!(!fd::is_readable(disk.completion_fd().unwrap()), "nobody need be woken");
        for tag in 0..3 {
            assert!(matches!(submit(&mut disk, &memory, tag, 1024 * tag), Submitted::Pending));
        }
        let mut requests: Vec<_> = std::mem::take(&mut *lock(&kept));
        assert!(requests.pop().unwrap().complete(Err(io::Error::from_raw_os_error(libc::ENOSPC))));
        let dropped = requests.pop().unwrap();
        std::thread::spawn(move || drop(dropped)).join().unwrap();
        assert!(fd::is_readable(disk.completion_fd().unwrap()));
        assert_eq!(ended(&mut disk), [(2, Some(libc::ENOSPC)), (1, Some(libc::EIO))]);
        assert!(!fd::is_readable(disk.completion_fd().unwrap()));
        assert!(requests.pop().unwrap().complete(Err(io::Error::other("no number"))));
        assert_eq!(ended(&mut disk), [(0, None)]);
    }

    #[test]
    fn what_was_given_up_is_answered_to_nobody_and_keeps_its_memory() {
        let (mut disk, kept) = disk();
        let memory = Memory::new(1 << 20).unwrap();
        submit(&mut disk, &memory, 1, 0);
        submit(&mut disk, &memory, 2, 0);
        let late = lock(&kept).pop().unwrap();
        assert!(lock(&kept).pop().unwrap().complete(Ok(())));
        disk.abandon();
        assert!(!fd::is_readable(disk.completion_fd().unwrap()));
        submit(&mut disk, &memory, 2, 0);
        drop(memory);
        let mut late = late;
        assert_eq!(late.copy_from(0, &[1; 600]), 512);
        assert!(!late.complete(Ok(())), "the tag is another request's by now");
        assert_eq!(ended(&mut disk), []);
        drop(disk);
        assert!(
            lock(&kept).pop().unwrap().complete(Ok(())),
            "it waits for an answer, and there is no device"
        );
    }

    #[test]
    fn a_size_that_is_none_is_refused() {
        for size in [0, 511, 513] {
            let error = OwnDisk::new("disk3", Box::new(Keeps(Arc::default(), size)), false).err().unwrap();
            assert!(error.to_string().contains("disk3") && error.to_string().contains("512"), "{error}");
        }
    }
}
