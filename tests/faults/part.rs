//! Transfers that come short. The supervisor is a thread of the same process: it does a part of what was asked itself, and says how much.
#![expect(unsafe_code, reason = "it makes other threads' system calls with their own arguments")]

use std::os::fd::RawFd;
use std::ptr::null_mut;
use std::sync::OnceLock;

/// What moves bytes from or to a file, and in which way it is told where they are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// An address and a length.
    Bytes,
    /// An array of them.
    Vector,
    /// One in a message.
    Message,
    /// What waits in a ring.
    Ring,
}

const TRANSFERS: [(libc::c_long, Shape, libc::c_short); 15] = [
    (libc::SYS_read, Shape::Bytes, libc::POLLIN),
    (libc::SYS_pread64, Shape::Bytes, libc::POLLIN),
    (libc::SYS_recvfrom, Shape::Bytes, libc::POLLIN),
    (libc::SYS_write, Shape::Bytes, libc::POLLOUT),
    (libc::SYS_pwrite64, Shape::Bytes, libc::POLLOUT),
    (libc::SYS_sendto, Shape::Bytes, libc::POLLOUT),
    (libc::SYS_readv, Shape::Vector, libc::POLLIN),
    (libc::SYS_preadv, Shape::Vector, libc::POLLIN),
    (libc::SYS_preadv2, Shape::Vector, libc::POLLIN),
    (libc::SYS_writev, Shape::Vector, libc::POLLOUT),
    (libc::SYS_pwritev, Shape::Vector, libc::POLLOUT),
    (libc::SYS_pwritev2, Shape::Vector, libc::POLLOUT),
    (libc::SYS_recvmsg, Shape::Message, libc::POLLIN),
    (libc::SYS_sendmsg, Shape::Message, libc::POLLOUT),
    (libc::SYS_io_uring_enter, Shape::Ring, 0),
];

/// How much of a transfer is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Half,
    Byte,
    /// Nothing: what waits in a ring completes with an error, [`Part::ERROR`].
    Broken,
}

impl Part {
    /// What the kernel says of a descriptor that is none.
    pub const ERROR: i32 = libc::EBADF;

    fn of(self, length: usize) -> usize {
        if self == Self::Half { length / 2 } else { 1 }
    }
}

/// A call that the kernel might have come back from with less than was asked.
pub struct Transfer<'a> {
    call: &'a libc::seccomp_data,
    shape: Shape,
}

/// `None` for what is no transfer, is of less than two bytes, or is one of those that are whole or not at all: messages, counters.
pub fn transfer(call: &libc::seccomp_data) -> Option<Transfer<'_>> {
    let (_, shape, ready) = TRANSFERS.iter().find(|(number, ..)| *number == libc::c_long::from(call.nr))?;
    let transfer = Transfer { call, shape: *shape };
    let fd = call.args[0] as RawFd;
    let long = match shape {
        Shape::Bytes => call.args[2] >= 2,
        Shape::Vector | Shape::Message => {
            transfer.pieces().iter().map(|piece| piece.iov_len).sum::<usize>() >= 2
        }
        Shape::Ring => return ring::first(fd).is_some().then_some(transfer),
    };
    (long && comes_in_parts(fd, *ready)).then_some(transfer)
}

/// Whether a file or a stream, and no call on it waits now: the supervisor has no time for that.
fn comes_in_parts(fd: RawFd, ready: libc::c_short) -> bool {
    // SAFETY: all zeroes is a value of each.
    let (mut stat, mut kind): (libc::stat, libc::c_int) = unsafe { std::mem::zeroed() };
    // SAFETY: a number, and a place for the answer.
    if unsafe { libc::fstat(fd, &raw mut stat) } < 0 {
        return false;
    }
    let stream = match stat.st_mode & libc::S_IFMT {
        libc::S_IFREG => return !is_whole(fd),
        libc::S_IFIFO => true,
        libc::S_IFSOCK => {
            let mut length = size_of_val(&kind) as libc::socklen_t;
            let at = (&raw mut kind).cast();
            // SAFETY: room for one int, and the length says so.
            unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_TYPE, at, &raw mut length) };
            kind == libc::SOCK_STREAM
        }
        _ => false,
    };
    let mut poll = libc::pollfd { fd, events: ready, revents: 0 };
    // SAFETY: one entry, and the count says so.
    stream && unsafe { libc::poll(&raw mut poll, 1, 0) } == 1 && poll.revents == ready
}

/// Whether what is written there is of a cgroup: its files take a value whole or not at all (kernfs).
fn is_whole(fd: RawFd) -> bool {
    // SAFETY: all zeroes is one.
    let mut system: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: a number, and a place for the answer.
    unsafe { libc::fstatfs(fd, &raw mut system) == 0 && system.f_type == libc::CGROUP2_SUPER_MAGIC }
}

impl Transfer<'_> {
    fn pieces(&self) -> &[libc::iovec] {
        let (mut at, mut count) = (self.call.args[1] as *const libc::iovec, self.call.args[2] as usize);
        if self.shape == Shape::Message {
            let message = self.call.args[1] as *const libc::msghdr;
            // SAFETY: the caller's message, which waits for its answer meanwhile.
            (at, count) = unsafe { ((*message).msg_iov, (*message).msg_iovlen) };
        }
        // SAFETY: the same of its pieces.
        if count == 0 { &[] } else { unsafe { std::slice::from_raw_parts(at, count) } }
    }

    /// Does a part; what the call answers, or `None` where it goes on, and what it asks for has become less.
    pub fn perform(&self, part: Part) -> Option<i64> {
        let mut args = self.call.args;
        let mut pieces = [libc::iovec { iov_base: null_mut(), iov_len: 0 }; 1024];
        match self.shape {
            Shape::Ring => {
                ring::cut(args[0] as RawFd, part);
                return None;
            }
            Shape::Bytes => args[2] = part.of(args[2] as usize) as u64,
            Shape::Vector => (args[1], args[2]) = (pieces.as_ptr() as u64, self.cut(part, &mut pieces)),
            Shape::Message => {
                let message = args[1] as *mut libc::msghdr;
                let count = self.cut(part, &mut pieces) as usize;
                // SAFETY: the caller's own message, as above; it has its pieces back before it goes on.
                let before = unsafe {
                    let before = ((*message).msg_iov, (*message).msg_iovlen);
                    ((*message).msg_iov, (*message).msg_iovlen) = (pieces.as_mut_ptr(), count);
                    before
                };
                let result = made(self.call.nr, &args);
                // SAFETY: as above.
                unsafe { ((*message).msg_iov, (*message).msg_iovlen) = before };
                return Some(result);
            }
        }
        Some(made(self.call.nr, &args))
    }

    /// The first pieces; how many.
    fn cut(&self, part: Part, into: &mut [libc::iovec]) -> u64 {
        let all = self.pieces();
        let mut left = part.of(all.iter().map(|piece| piece.iov_len).sum());
        let mut count = 0;
        for (piece, place) in all.iter().zip(into) {
            if left == 0 {
                break;
            }
            let length = piece.iov_len.min(left);
            *place = libc::iovec { iov_base: piece.iov_base, iov_len: length };
            left -= length;
            count += 1;
        }
        count
    }
}

fn made(number: libc::c_int, args: &[u64; 6]) -> i64 {
    let [a, b, c, d, e, f] = *args;
    // SAFETY: a call that the filtered thread makes, with its own arguments, or less of them.
    let result = unsafe { libc::syscall(number.into(), a, b, c, d, e, f) };
    if result < 0 {
        -i64::from(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO))
    } else {
        result
    }
}

/// Entries of an io_uring that the kernel is about to be told of, or has answered. Its memory can be mapped by whoever has its descriptor.
pub mod ring {
    use super::*;

    const PAGE: usize = 4096;
    const ENTRIES: libc::off_t = 0x1000_0000;
    const ENTRY: usize = 64;
    /// What an answer takes: its request's number, what came of it, flags. (No flag of the ring's makes either larger, and the crate that makes it
    /// tells the kernel of the entries in their order.)
    const ANSWER: usize = 16;
    /// Operations, by the kernel's numbers.
    pub const READV: u8 = 1;
    const WRITEV: u8 = 2;
    pub const FSYNC: u8 = 3;
    pub const READ: u8 = 22;
    const WRITE: u8 = 23;
    /// Those of which something is cut: of the pieces, or of the bytes.
    const TRANSFERS: [u8; 4] = [READV, WRITEV, READ, WRITE];

    /// Where the kernel has what both queues have (`io_sqring_offsets`, `io_cqring_offsets`).
    struct Offsets {
        /// Of what is asked: the indices of the first and behind the last, and what cuts them to size.
        asked: [usize; 3],
        /// Of the answers: the index behind the last, and what cuts it to size.
        answered: [usize; 2],
        answers: usize,
    }

    /// The kernel says so when a ring is made.
    pub fn learn() {
        let mut params = [0u32; 30];
        // SAFETY: room for an io_uring_params, which is 120 bytes.
        let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, params.as_mut_ptr()) } as RawFd;
        if fd >= 0 {
            // SAFETY: made above.
            unsafe { libc::close(fd) };
            let at = |index: usize| params[index] as usize;
            let (asked, answered) = ([10, 11, 12].map(at), [21, 22].map(at));
            let _ = OFFSETS.set(Offsets { asked, answered, answers: at(25) });
        }
    }

    static OFFSETS: OnceLock<Offsets> = OnceLock::new();

    /// A mapping of a ring's memory.
    pub struct Mapped(*mut u8, usize);

    impl Mapped {
        fn new(fd: RawFd, offset: libc::off_t, length: usize) -> Option<Self> {
            let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_POPULATE);
            // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
            let at = unsafe { libc::mmap(null_mut(), length, prot, flags, fd, offset) };
            (at != libc::MAP_FAILED).then_some(Self(at.cast(), length))
        }

        /// A number at byte `at`, which lies within.
        fn number(&self, at: usize) -> *mut u32 {
            assert!(at + 4 <= self.1);
            self.0.wrapping_add(at).cast()
        }
    }

    impl Drop for Mapped {
        fn drop(&mut self) {
            // SAFETY: mapped above, and nobody else knows it.
            unsafe { libc::munmap(self.0.cast(), self.1) };
        }
    }

    /// The entries that the kernel has not been told of: where each begins.
    fn waiting(fd: RawFd) -> Option<(Mapped, impl Iterator<Item = usize>)> {
        let asked = OFFSETS.get()?.asked;
        let queue = Mapped::new(fd, 0, PAGE)?;
        // SAFETY: within the mapping; the thread whose queue it is waits in its call.
        let [head, tail, mask] = asked.map(|offset| unsafe { queue.number(offset).read_volatile() });
        let size = ((mask as usize + 1) * ENTRY).next_multiple_of(PAGE);
        let places =
            (0..tail.wrapping_sub(head)).map(move |i| (head.wrapping_add(i) & mask) as usize * ENTRY);
        Some((Mapped::new(fd, ENTRIES, size)?, places))
    }

    /// The first entry that can come short: where its length stands.
    pub fn first(fd: RawFd) -> Option<(Mapped, *mut u32)> {
        let (entries, mut places) = waiting(fd)?;
        let length = places.find_map(|at| {
            let length = entries.number(at + 24);
            // SAFETY: as above.
            let (operation, count) =
                unsafe { (entries.number(at).read_volatile() as u8, length.read_volatile()) };
            (TRANSFERS.contains(&operation) && count >= 2).then_some(length)
        })?;
        Some((entries, length))
    }

    /// What the kernel is told first.
    pub fn first_operation(fd: RawFd) -> Option<u8> {
        let (entries, mut places) = waiting(fd)?;
        // SAFETY: as above.
        Some(unsafe { entries.number(places.next()?).read_volatile() } as u8)
    }

    /// How many answers the kernel has given, and what cuts that to size.
    fn given(fd: RawFd) -> Option<[u32; 2]> {
        let queue = Mapped::new(fd, 0, PAGE)?;
        // SAFETY: as above.
        Some(OFFSETS.get()?.answered.map(|offset| unsafe { queue.number(offset).read_volatile() }))
    }

    /// Tells the kernel of `count` entries, of which the first is answered at once: with that instead of what the kernel says.
    pub fn answer_with(fd: RawFd, count: u64, result: i32) -> Option<i64> {
        /// `IORING_ENTER_GETEVENTS`: until there is an answer.
        const WAIT: u64 = 1;
        let [before, mask] = given(fd)?;
        let taken = made(libc::SYS_io_uring_enter as i32, &[fd as u64, count, 1, WAIT, 0, 0]);
        if taken > 0 && given(fd)?[0] == before.wrapping_add(1) {
            let answers = OFFSETS.get()?.answers;
            let queue = Mapped::new(fd, 0, (answers + (mask as usize + 1) * ANSWER).next_multiple_of(PAGE))?;
            // SAFETY: as above.
            unsafe {
                queue.number(answers + (before & mask) as usize * ANSWER + 8).write_volatile(result as u32)
            };
        }
        Some(taken)
    }

    pub fn cut(fd: RawFd, part: Part) {
        let Some((_entries, length)) = first(fd) else { return };
        if part == Part::Broken {
            // SAFETY: within the mapping, which is still there: the entry's descriptor stands 20 bytes before.
            unsafe { length.byte_sub(20).write_volatile(u32::MAX) };
            return;
        }
        // SAFETY: as above.
        unsafe { length.write_volatile(part.of(length.read_volatile() as usize) as u32) };
    }
}

pub use ring::learn;
