//! io_uring: many transfers between guest memory and a few files on their way at a time.

use std::io;
use std::ops::Deref;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use io_uring::register::Restriction;
use io_uring::{IoUring, Probe, Submitter, opcode, squeue, types};
use vm_memory::GuestMemoryMmap;

use super::io::{IoList, Pieces};
use super::log;

/// How long the end of a ring waits for what is still on its way.
const PATIENCE: Duration = Duration::from_secs(5);

/// What to do with a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    Read,
    /// On stable storage when it ends, if so asked.
    Write {
        durable: bool,
    },
    /// `fdatasync`
    Sync,
}

/// A transfer that has ended.
pub(crate) struct Ended<'a> {
    /// Which of the ring's files.
    #[cfg_attr(not(feature = "qcow2"), allow(dead_code, reason = "a raw disk has one"))]
    pub file: usize,
    pub work: Work,
    pub offset: u64,
    pub tag: u64,
    /// Bytes, or the kernel's error.
    pub result: io::Result<usize>,
    pieces: &'a mut Pieces,
    memory: &'a GuestMemoryMmap,
}

impl Ended<'_> {
    /// How many bytes were to be moved.
    pub fn wanted(&self) -> u64 {
        self.pieces.len()
    }

    /// What is behind the first `done` bytes, to go on with.
    pub fn rest(&mut self, done: usize) -> IoList<'_> {
        let mut list = self.pieces.again(self.memory);
        list.advance(done);
        list
    }
}

/// Why a transfer was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// There is no room, or other memory is still being moved to or from.
    Full,
    /// It is not all in the guest's memory.
    Foreign,
}

/// A ring with its files and what is on its way. It keeps the memory of that until the kernel has let go of it.
pub(crate) struct Ring<O> {
    ring: IoUring,
    /// Where everything lies that is on its way.
    owner: Option<O>,
    flights: Box<[Flight]>,
    free: Vec<u16>,
    /// Pushed, and not yet known to the kernel.
    queued: usize,
}

struct Flight {
    file: usize,
    work: Work,
    offset: u64,
    tag: u64,
    /// What the kernel was told of, and room for the next.
    pieces: Pieces,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Free,
    UnderWay,
    /// Under way, and nobody wants to hear of it any more.
    Abandoned,
}

/// Whether the host has it, and lets this process use it.
pub(crate) fn is_there() -> bool {
    made(1).is_ok()
}

/// Made on a thread that ends at once: the kernel tells a ring's maker, by an interruption of what it waits for, that the ring has gone,
/// and the embedder's threads are not ours to interrupt.
fn made(entries: u16) -> io::Result<IoUring> {
    std::thread::scope(|scope| {
        let maker = std::thread::Builder::new().name("vmbed-ring".into()).stack_size(64 << 10);
        let made =
            maker.spawn_scoped(scope, move || IoUring::builder().setup_r_disabled().build(entries.into()))?;
        made.join().unwrap_or_else(|_| Err(io::Error::other("the maker of a ring panicked")))
    })
}

/// From here on the ring does these with its own files, and nothing else, whoever asks it: what goes through a ring is seen by no
/// seccomp filter. It begins to work.
fn confine(ring: &Submitter<'_>, operations: &[u8]) -> io::Result<()> {
    /// `IORING_UNREGISTER_FILES`
    const GIVE_BACK: u8 = 3;
    let own_files = squeue::Flags::FIXED_FILE.bits();
    let mut only: Vec<_> = operations.iter().map(|code| Restriction::sqe_op(*code)).collect();
    only.extend([Restriction::sqe_flags_required(own_files), Restriction::sqe_flags_allowed(own_files)]);
    only.push(Restriction::register_op(GIVE_BACK));
    ring.register_restrictions(&mut only)?;
    ring.register_enable_rings()
}

impl<O: Clone + Deref<Target = GuestMemoryMmap>> Ring<O> {
    /// A ring for `entries` transfers at a time with those files, which it keeps open.
    ///
    /// # Errors
    /// The host has no io_uring, does not allow it, or is out of something.
    pub fn new(files: &[BorrowedFd<'_>], entries: u16) -> io::Result<Self> {
        let ring = made(entries)?;
        let params = ring.params();
        if !params.is_feature_nodrop() || !params.is_feature_submit_stable() {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "a kernel before Linux 5.5"));
        }
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let wanted = [
            opcode::Read::CODE,
            opcode::Write::CODE,
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
        ];
        if !wanted.iter().all(|code| probe.is_supported(*code)) {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "an operation is missing"));
        }
        let files: Vec<_> = files.iter().map(AsRawFd::as_raw_fd).collect();
        ring.submitter().register_files(&files)?;
        confine(&ring.submitter(), &wanted)?;
        let flight = |_| Flight {
            file: 0,
            work: Work::Sync,
            offset: 0,
            tag: 0,
            pieces: Pieces::default(),
            state: State::Free,
        };
        let flights = (0..entries).map(flight).collect();
        Ok(Self { ring, owner: None, flights, free: (0..entries).collect(), queued: 0 })
    }

    /// Readable while something has ended that was not reaped. The ring itself: an eventfd that rings for those alone that do not end
    /// within [`enter`](Self::enter) misses the ones that an interrupt ends (Linux 6.1, `io_eventfd_signal`).
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring keeps the descriptor open for as long as the borrow of it lives.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }

    /// How many have not ended.
    pub fn in_flight(&self) -> usize {
        self.flights.len() - self.free.len()
    }

    /// Puts a transfer into the queue: what to do with which of the files, to or from memory of `owner`.
    ///
    /// # Errors
    /// It was not taken.
    pub fn push(
        &mut self,
        (file, work): (usize, Work),
        offset: u64,
        list: &IoList<'_>,
        owner: &O,
        tag: u64,
    ) -> Result<(), Refused> {
        if !self.owner.as_ref().is_some_and(|known| list.lies_in(known)) {
            if !list.lies_in(owner) {
                return Err(Refused::Foreign);
            }
            if self.in_flight() > 0 {
                return Err(Refused::Full);
            }
            self.owner = Some(owner.clone());
        }
        let slot = *self.free.last().ok_or(Refused::Full)?;
        let flight = &mut self.flights[usize::from(slot)];
        flight.pieces.copy(list);
        let entry =
            entry(types::Fixed(file as u32), work, offset, flight.pieces.raw()).user_data(slot.into());
        // SAFETY: the entry points to the pieces of the flight, which stay as they are until the kernel has said that it is done with
        // them, and they to memory of `owner`, which stays until nothing is in flight; also if this ring is dropped (see there).
        unsafe { self.ring.submission().push(&entry) }.map_err(|_| Refused::Full)?;
        self.free.pop();
        (flight.file, flight.work, flight.offset) = (file, work, offset);
        (flight.tag, flight.state) = (tag, State::UnderWay);
        self.queued += 1;
        Ok(())
    }

    /// Tells the kernel of what was pushed. It may end at once: reap afterwards.
    ///
    /// # Errors
    /// EAGAIN, EBUSY, ENOMEM: some of it waits for the next time.
    pub fn enter(&mut self) -> io::Result<()> {
        while self.queued > 0 {
            match self.ring.submit() {
                Ok(0) => return Err(io::Error::from_raw_os_error(libc::EAGAIN)),
                Ok(count) => self.queued = self.queued.saturating_sub(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Hands on what has ended.
    pub fn reap(&mut self, mut ended: impl FnMut(Ended<'_>)) {
        let Self { ring, owner, flights, free, .. } = self;
        let Some(owner) = owner else { return };
        for entry in ring.completion() {
            let Some((slot, flight)) = under_way(flights, entry.user_data()) else { continue };
            free.push(slot);
            if std::mem::replace(&mut flight.state, State::Free) == State::UnderWay {
                let result = usize::try_from(entry.result());
                let result = result.map_err(|_| io::Error::from_raw_os_error(-entry.result()));
                let Flight { file, work, offset, tag, ref mut pieces, .. } = *flight;
                ended(Ended { file, work, offset, tag, result, pieces, memory: owner });
            }
        }
    }

    /// None of what is on its way is wanted any more.
    pub fn abandon(&mut self) {
        for flight in self.flights.iter_mut().filter(|flight| flight.state == State::UnderWay) {
            flight.state = State::Abandoned;
        }
    }
}

/// The transfer that a completion is about.
fn under_way(flights: &mut [Flight], slot: u64) -> Option<(u16, &mut Flight)> {
    let flight = flights.get_mut(usize::try_from(slot).ok()?)?;
    (flight.state != State::Free).then_some((slot as u16, flight))
}

fn entry(file: types::Fixed, work: Work, offset: u64, pieces: &[libc::iovec]) -> squeue::Entry {
    let flags = if work == (Work::Write { durable: true }) { libc::RWF_DSYNC } else { 0 };
    let (at, count) = (pieces.as_ptr(), pieces.len() as u32);
    match (work, pieces) {
        (Work::Sync, _) => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
        (Work::Read, [one]) => {
            opcode::Read::new(file, one.iov_base.cast(), one.iov_len as u32).offset(offset).build()
        }
        (Work::Read, _) => opcode::Readv::new(file, at, count).offset(offset).build(),
        (Work::Write { .. }, [one]) => opcode::Write::new(file, one.iov_base.cast(), one.iov_len as u32)
            .offset(offset)
            .rw_flags(flags)
            .build(),
        (Work::Write { .. }, _) => {
            opcode::Writev::new(file, at, count).offset(offset).rw_flags(flags).build()
        }
    }
}

impl<O> Drop for Ring<O> {
    fn drop(&mut self) {
        let end = Instant::now() + PATIENCE;
        while self.free.len() < self.flights.len() && Instant::now() < end {
            let _ = self.ring.submit();
            for entry in self.ring.completion() {
                if let Some((slot, flight)) = under_way(&mut self.flights, entry.user_data()) {
                    flight.state = State::Free;
                    self.free.push(slot);
                }
            }
            if self.free.len() < self.flights.len() {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        // Else the file, and its locks, would stay for as long as the kernel takes to end the ring.
        let _ = self.ring.submitter().unregister_files();
        if self.free.len() < self.flights.len() {
            // The kernel may still write there: memory that is never given back is the lesser evil.
            log::error!(
                "{} transfers have not ended: their memory is kept",
                self.flights.len() - self.free.len()
            );
            std::mem::forget((self.owner.take(), std::mem::take(&mut self.flights)));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::Arc;

    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

    use super::*;
    use crate::sys::fd;
    use crate::sys::io::Pieces;

    type Guest = Arc<GuestMemoryMmap>;

    fn push(
        ring: &mut Ring<Guest>,
        work: Work,
        offset: u64,
        memory: &Guest,
        pieces: &[(u64, usize)],
        tag: u64,
    ) -> Result<(), Refused> {
        let mut room = Pieces::default();
        let mut list = room.list();
        pieces.iter().for_each(|(at, len)| list.push(memory.get_slice(GuestAddress(*at), *len).unwrap()));
        ring.push((0, work), offset, &list, memory, tag)
    }

    fn wait(ring: &mut Ring<Guest>, count: usize) -> Vec<(u64, io::Result<usize>)> {
        ring.enter().unwrap();
        let (mut ended, end) = (Vec::new(), Instant::now() + Duration::from_secs(30));
        while ended.len() < count {
            assert!(Instant::now() < end, "waited for {count} transfers to end: {} have", ended.len());
            assert!(
                fd::wait_readable(ring.as_fd(), Duration::from_secs(30)),
                "nothing is said of what has ended"
            );
            ring.reap(|e| ended.push((e.tag, e.result)));
        }
        ended
    }

    #[test]
    fn transfers_go_to_a_file_and_back() {
        let memory: Guest = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap().into();
        let file = crate::sys::memory::sealed_memfd(c"test", 0x10000).unwrap();
        let Ok(mut ring) = Ring::new(&[file.as_fd()], 4) else { panic!("this host has no io_uring") };
        drop(file);
        memory.write_slice(&[7; 0x2000], GuestAddress(0)).unwrap();
        for (tag, durable) in [(1, false), (2, true)] {
            let pieces: &[(u64, usize)] = if durable { &[(0, 0x1000)] } else { &[(0, 100), (0x1000, 412)] };
            assert!(push(&mut ring, Work::Write { durable }, tag << 13, &memory, pieces, tag).is_ok());
        }
        let mut done = wait(&mut ring, 2);
        done.sort_by_key(|(tag, _)| *tag);
        assert!(matches!(done[..], [(1, Ok(512)), (2, Ok(0x1000))]), "{done:?}");
        for tag in 0..4 {
            assert!(
                push(&mut ring, Work::Read, 0x4000, &memory, &[(0x8000 + (tag << 12), 512)], tag).is_ok()
            );
        }
        assert!(push(&mut ring, Work::Sync, 0, &memory, &[], 9).is_err(), "it is full");
        assert_eq!(wait(&mut ring, 4).len(), 4);
        assert_eq!(memory.read_obj::<[u8; 16]>(GuestAddress(0xb1f0)).unwrap(), [7; 16]);
        assert!(push(&mut ring, Work::Sync, 0, &memory, &[], 9).is_ok());
        assert!(push(&mut ring, Work::Read, 0xff00, &memory, &[(0, 0x200)], 10).is_ok());
        let done = wait(&mut ring, 2);
        assert!(
            done.iter().any(|(tag, r)| *tag == 10 && matches!(r, Ok(0x100))),
            "short at the end: {done:?}"
        );
        assert_eq!(ring.in_flight(), 0);
    }

    #[test]
    fn what_was_abandoned_is_not_told_and_a_ring_ends_with_what_is_under_way() {
        let memory: Guest = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap().into();
        // A pipe never answers a read by itself.
        let (from, to) = io::pipe().unwrap();
        let mut ring = Ring::new(&[from.as_fd()], 4).unwrap();
        assert!(push(&mut ring, Work::Read, u64::MAX, &memory, &[(0, 16)], 1).is_ok());
        ring.enter().unwrap();
        ring.abandon();
        assert!(push(&mut ring, Work::Read, u64::MAX, &memory, &[(0x100, 16)], 1).is_ok());
        ring.enter().unwrap();
        ring.reap(|e| panic!("{} has ended", e.tag));
        assert_eq!(ring.in_flight(), 2);
        io::Write::write_all(&mut &to, &[5; 16]).unwrap();
        drop(to);
        assert_eq!(wait(&mut ring, 1)[0].0, 1);
        drop(ring);
        assert_eq!(Arc::strong_count(&memory), 1);
    }

    #[test]
    fn a_ring_does_what_it_is_for_with_its_own_files_and_nothing_else() {
        let file = || crate::sys::memory::sealed_memfd(c"test", 0x10000).unwrap();
        let (own, other) = (file(), file());
        let mut whole = Ring::<Guest>::new(&[own.as_fd()], 4).unwrap();
        let ring = &mut whole.ring;
        let mut byte = [1u8];
        let at = byte.as_mut_ptr();
        let fixed = squeue::Flags::FIXED_FILE;
        let read = || opcode::Read::new(types::Fixed(0), at, 1).build();
        let open = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/dev/null".as_ptr()).build();
        let foreign = opcode::Read::new(types::Fd(other.as_raw_fd()), at, 1).build();
        let socket = opcode::Socket::new(libc::AF_UNIX, libc::SOCK_STREAM, 0).build();
        for (what, entry, result) in [
            ("a read of its own file", read(), 1),
            ("an operation that is none", opcode::Nop::new().build().flags(fixed), -libc::EACCES),
            ("opening", open, -libc::EACCES),
            ("a socket", socket.flags(fixed), -libc::EACCES),
            ("another file", foreign, -libc::EACCES),
            ("another flag", read().flags(squeue::Flags::IO_DRAIN), -libc::EACCES),
            ("a file that it has not", opcode::Read::new(types::Fixed(1), at, 1).build(), -libc::EBADF),
        ] {
            // SAFETY: what it points to lives until it has ended, which is waited for.
            unsafe { ring.submission().push(&entry) }.unwrap();
            ring.submit_and_wait(1).unwrap();
            assert_eq!(ring.completion().next().unwrap().result(), result, "{what}");
        }
        assert_eq!(byte, [0]);
        let more = ring.submitter().register_files_sparse(1).unwrap_err();
        assert_eq!(more.raw_os_error(), Some(libc::EACCES), "it takes no other files");
    }

    #[test]
    fn the_end_of_a_ring_interrupts_nobody() {
        use std::io::Read;
        use std::os::unix::net::UnixStream;
        let file = crate::sys::memory::sealed_memfd(c"test", 0x10000).unwrap();
        let (mut near, _far) = UnixStream::pair().unwrap();
        // A wait with a limit is not begun again by the kernel.
        near.set_read_timeout(Some(Duration::from_millis(30))).unwrap();
        for _ in 0..20 {
            drop(Ring::<Guest>::new(&[file.as_fd()], 4).unwrap());
            assert!(is_there());
            assert_eq!(near.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        }
    }
}
