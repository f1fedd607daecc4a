//! Disks of the embedder's, by descriptor or as code, and what each has done.

use std::ffi::c_void;
use std::io;
use std::mem::offset_of;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::arguments::{Sized_, fd, invalid, structure};
use super::call;
use super::config::{attach, vmbed_builder};
use super::device::{UserData, vmbed_destroy_fn};
use super::error::vmbed_error;
use super::handle::{self, handle};
use crate::block::{BlockBackend, BlockOp, BlockRequest};
use crate::error::{Error, ErrorKind, Result};
use crate::sys::lock;

/// Backs disk `index`, added without a path, by an open file or block device in raw format. `fd` is duplicated; it must be
/// open for reading, and unless the disk is read-only for writing (without O_APPEND), too. vmbed_builder_build() says
/// whether it is of that kind, and whether there is such a disk.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_builder_disk_fd(
    builder: *mut vmbed_builder,
    index: u32,
    fd: i32,
    error: *mut *mut vmbed_error,
) -> i32 {
    attach(builder, error, |builder| builder.set_disk_fd(index as usize, self::fd(fd, "fd")?))
}

/// A piece of a guest's memory, laid out as POSIX's `struct iovec`, so that preadv(), pwritev() and the like take it. The
/// guest may change it at any moment: what was read once may read differently the next time.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct vmbed_piece {
    /// Where it is.
    pub base: *mut c_void,
    /// Its bytes.
    pub length: usize,
}

/// A disk of yours that serves a VM: what vmbed_block_complete() needs to know whose requests it ends. It is the
/// library's.
pub struct vmbed_block(());

handle!(vmbed_block holds Table);

/// The request goes on; vmbed_block_complete() ends it.
pub const VMBED_BLOCK_PENDING: i32 = -1;

/// A request to a disk of yours. The structure is gone when the function that gets it returns; `pieces` and the memory
/// behind them stay until the request has ended, also when the VM has.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct vmbed_block_request {
    /// The disk, for vmbed_block_complete().
    pub disk: *mut vmbed_block,
    /// The name of the request, for vmbed_block_complete(): no other one has had it.
    pub tag: u64,
    /// Where on the disk, in bytes, a multiple of 512.
    pub offset: u64,
    /// How many bytes, a multiple of 512: all pieces together, where there are any. 0 for a flush.
    pub length: u64,
    /// The guest's memory, to be filled or written out in this order. NULL where no data moves.
    pub pieces: *const vmbed_piece,
    /// How many pieces.
    pub count: usize,
    /// Of a write or a zeroing: other than 0 where it must be on stable storage when it ends, since the driver has no way to flush.
    pub durable: u32,
    /// Of a zeroing: other than 0 where what was there may be given back to the host.
    pub unmap: u32,
}

/// A disk of your own. Its functions are called on a device thread of the VM's, one at a time for each disk, and must not
/// wait for this VM; they return 0 when they have done the request, an errno when it failed, or VMBED_BLOCK_PENDING when
/// vmbed_block_complete() will end it: later, in any order, from any thread, or already within the call. What comes lies
/// within the disk, and a read-only one gets no writes. There are at most 256 requests at a time and no order among
/// them: a flush is about the writes that had ended before it came.
///
/// Until a request has ended its memory is yours, and the guest waits: also when its driver resets the device. Who pauses
/// the VM waits, too (VMBED_ERR_TIMED_OUT after 10 s). The end of the VM gives up on it after 5 s.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct vmbed_block_ops {
    /// sizeof(struct vmbed_block_ops)
    pub size: usize,
    /// Fills the pieces. Not NULL.
    pub read: Option<unsafe extern "C" fn(user: *mut c_void, request: *const vmbed_block_request) -> i32>,
    /// Writes the pieces out. NULL only for a disk that is read-only.
    pub write: Option<unsafe extern "C" fn(user: *mut c_void, request: *const vmbed_block_request) -> i32>,
    /// Brings what was written to stable storage. NULL where writes are as durable as they will ever be.
    pub flush: Option<unsafe extern "C" fn(user: *mut c_void, request: *const vmbed_block_request) -> i32>,
    /// Ends the disk's data, see vmbed_destroy_fn. Requests may be pending then; they are still yours to complete, as to
    /// nobody. May be NULL.
    pub destroy: vmbed_destroy_fn,
    /// The guest no longer needs what is there, and takes whatever it reads from there afterwards. There are no pieces. NULL,
    /// or `write_zeroes` NULL: the guest is told that the disk knows no such thing.
    pub discard: Option<unsafe extern "C" fn(user: *mut c_void, request: *const vmbed_block_request) -> i32>,
    /// Makes it read as zeroes. There are no pieces.
    pub write_zeroes:
        Option<unsafe extern "C" fn(user: *mut c_void, request: *const vmbed_block_request) -> i32>,
}

// SAFETY: it is repr(C) with its size first, and of functions NULL is a value.
unsafe impl Sized_ for vmbed_block_ops {
    const FIRST: usize = offset_of!(Self, discard);
    const NAME: &'static str = "vmbed_block_ops";
}

/// Backs disk `index`, added without a path, by code of yours. The disk is `capacity` bytes large, a multiple of 512. The
/// table is copied; its destroy function, where the table is good enough to name one, is called exactly once with `user`:
/// after the VM has been freed, or when this call or the build fails. vmbed_builder_build() says whether there is such a
/// disk.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_builder_disk_backend(
    builder: *mut vmbed_builder,
    index: u32,
    ops: *const vmbed_block_ops,
    capacity: u64,
    readonly: bool,
    user: *mut c_void,
    error: *mut *mut vmbed_error,
) -> i32 {
    // First of all, so that the disk's data end also where anything else is wrong.
    let disk = ForeignDisk::new(ops, capacity, readonly, user);
    attach(builder, error, |builder| {
        builder.set_disk_backend(index as usize, Box::new(disk?));
        Ok(())
    })
}

/// Ends the pending request `tag` of `disk`: well where `error_number` is 0, else with that errno, which the guest sees as an
/// I/O error and the VM's events as VMBED_EVENT_BACKEND_ERROR. From any thread; never blocks. Its pieces are not to be
/// touched any more.
///
/// VMBED_ERR_INVALID_STATE where nobody waits for it any more: the VM has ended.
/// VMBED_ERR_INVALID_ARGUMENT where no such request is pending: it has ended before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn vmbed_block_complete(
    disk: *mut vmbed_block,
    tag: u64,
    error_number: i32,
    error: *mut *mut vmbed_error,
) -> i32 {
    call(error, || {
        let table = handle::object(disk)?;
        let request = table.take(tag).ok_or_else(|| invalid(format!("no request {tag:#x} is pending")))?;
        let heard = request.complete(outcome(error_number));
        table.free_when_done(disk);
        if heard {
            return Ok(());
        }
        Err(Error::new(ErrorKind::InvalidState, "nobody waits for this request any more"))
    })
}

pub(super) fn outcome(error_number: i32) -> io::Result<()> {
    match error_number {
        0 => Ok(()),
        1.. => Err(io::Error::from_raw_os_error(error_number)),
        _ => Err(io::Error::from_raw_os_error(libc::EIO)),
    }
}

/// The requests of one disk that are pending, each at the place that its device gave it.
pub(super) struct Table {
    requests: Mutex<Requests>,
    /// Makes its tags other than those of every other disk.
    prefix: u64,
}

#[derive(Default)]
struct Requests {
    pending: Vec<Option<(u64, BlockRequest)>>,
    /// Those that their device gave up, and whose place another has by now: somebody may still look at their pieces.
    given_up: Vec<(u64, BlockRequest)>,
    count: usize,
    /// How many there ever were.
    ever: u64,
    /// The disk is gone: the handle goes with the last request, once.
    closed: bool,
    freed: bool,
}

/// A tag: 24 bits of the disk, 24 bits that count its requests, and 16 bits of the place.
const PLACE_BITS: u32 = 16;
const COUNT_BITS: u32 = 24;

impl Table {
    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let prefix = NEXT.fetch_add(1, Ordering::Relaxed) << (PLACE_BITS + COUNT_BITS);
        Self { requests: Mutex::default(), prefix }
    }

    fn put(&self, request: BlockRequest) -> u64 {
        let place = (request.tag() & ((1 << PLACE_BITS) - 1)) as usize;
        let mut requests = lock(&self.requests);
        let counted = requests.ever & ((1 << COUNT_BITS) - 1);
        let tag = self.prefix | counted << PLACE_BITS | place as u64;
        requests.ever += 1;
        requests.count += 1;
        if requests.pending.len() <= place {
            requests.pending.resize_with(place + 1, || None);
        }
        if let Some(before) = requests.pending[place].replace((tag, request)) {
            requests.given_up.push(before);
        }
        tag
    }

    fn take(&self, tag: u64) -> Option<BlockRequest> {
        let place = (tag & ((1 << PLACE_BITS) - 1)) as usize;
        let mut requests = lock(&self.requests);
        let here =
            requests.pending.get_mut(place).and_then(|slot| slot.take_if(|(pending, _)| *pending == tag));
        let (_, request) = match here {
            Some(found) => found,
            None => {
                let at = requests.given_up.iter().position(|(pending, _)| *pending == tag)?;
                requests.given_up.swap_remove(at)
            }
        };
        requests.count -= 1;
        Some(request)
    }

    /// Frees the handle once there is neither a disk nor a request that needs it.
    fn free_when_done(&self, disk: *mut vmbed_block) {
        let done = {
            let mut requests = lock(&self.requests);
            let done = requests.closed && requests.count == 0 && !requests.freed;
            requests.freed |= done;
            done
        };
        if done {
            drop(handle::take(disk));
        }
    }
}

type Serve = unsafe extern "C" fn(*mut c_void, *const vmbed_block_request) -> i32;

/// A disk behind the table of functions.
struct ForeignDisk {
    read: Serve,
    write: Option<Serve>,
    flush: Option<Serve>,
    discard: Option<(Serve, Serve)>,
    capacity: u64,
    readonly: bool,
    table: Arc<Table>,
    disk: Handle,
    /// Last, since it is dropped last.
    user: UserData,
}

struct Handle(*mut vmbed_block);

// SAFETY: a handle is for every thread.
unsafe impl Send for Handle {}

impl ForeignDisk {
    /// Takes `user` over also where it fails, as far as `destroy` can be read.
    fn new(ops: *const vmbed_block_ops, capacity: u64, readonly: bool, user: *mut c_void) -> Result<Self> {
        let ops = structure(ops)?;
        let user = UserData::new(user, ops.destroy);
        let missing = |name: &str| invalid(format!("vmbed_block_ops: {name} is NULL"));
        let read = ops.read.ok_or_else(|| missing("read"))?;
        if ops.write.is_none() && !readonly {
            return Err(missing("write"));
        }
        let disk = Handle(handle::make(Table::new()));
        let table = handle::object(disk.0)?;
        let discard = ops.discard.zip(ops.write_zeroes);
        Ok(Self { read, write: ops.write, flush: ops.flush, discard, capacity, readonly, table, disk, user })
    }
}

impl BlockBackend for ForeignDisk {
    fn size(&self) -> u64 {
        self.capacity
    }

    fn readonly(&self) -> bool {
        self.readonly
    }

    fn discards(&self) -> bool {
        self.discard.is_some()
    }

    fn submit(&mut self, request: BlockRequest) {
        let mut unmap = 0;
        let (serve, durable) = match request.op() {
            BlockOp::Read => (Some(self.read), false),
            BlockOp::Write { durable } => (self.write, durable),
            BlockOp::Flush => (self.flush, false),
            BlockOp::Discard => (self.discard.map(|(discard, _)| discard), false),
            BlockOp::WriteZeroes { unmap: may, durable } => {
                unmap = may.into();
                (self.discard.map(|(_, zeroes)| zeroes), durable)
            }
        };
        let Some(serve) = serve else {
            // Nothing to flush. Writes do not come where there is no function for them.
            request.complete(Ok(()));
            return;
        };
        let (offset, length, pieces) = (request.offset(), request.len(), request.raw());
        let (count, pieces) = (pieces.len(), pieces.as_ptr());
        let pieces = if count == 0 { std::ptr::null() } else { pieces.cast() };
        // Before the call: another thread may end it before the call returns.
        let tag = self.table.put(request);
        let (disk, durable) = (self.disk.0, durable.into());
        let given = vmbed_block_request { disk, tag, offset, length, pieces, count, durable, unmap };
        // SAFETY: the embedder's function with its own data. The pieces stay where they are while the table has the
        // request.
        let answer = unsafe { serve(self.user.pointer(), &given) };
        if answer != VMBED_BLOCK_PENDING
            && let Some(request) = self.table.take(tag)
        {
            request.complete(outcome(answer));
        }
    }
}

impl Drop for ForeignDisk {
    fn drop(&mut self) {
        lock(&self.table.requests).closed = true;
        self.table.free_when_done(self.disk.0);
    }
}
