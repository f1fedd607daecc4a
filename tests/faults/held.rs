//! Requests that nobody answers before the VM ends, a flush that the kernel would have had made again, and a network that sends nonsense. An
//! embedder's disk keeps its request. For a ring the supervisor plays a kernel that is slow: it takes a read and begins it when it is told again.
#![expect(unsafe_code, reason = "it does what the kernel would")]

use std::io::Write;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use vmbed::{BlockBackend, BlockRequest, DiskConfig, DiskEngine, Host, NetConfig, StopCause, Vm};

use crate::driven::SIZE;
use crate::guests::Op;
use crate::life::{Stage, Told, aside, expect};
use crate::others::{Step, end, ready};
use crate::part::ring;

const BEGINS: [Step; 2] = [(Op::BeginRead, 3, 2, 0), (Op::Finish, 0, 0, 0)];

pub fn live(stage: &Stage, works: bool) -> vmbed::Result<()> {
    keep(stage, works)?;
    lose(stage, works)?;
    take(stage, works)
}

/// An embedder's disk that keeps what it is asked for.
struct Keeps(Sender<BlockRequest>);

impl BlockBackend for Keeps {
    fn size(&self) -> u64 {
        SIZE
    }

    fn submit(&mut self, request: BlockRequest) {
        let _ = self.0.send(request);
    }
}

fn keep(stage: &Stage, works: bool) -> vmbed::Result<()> {
    let (kept, requests) = channel();
    let host = Host::open()?;
    let mut config = stage.pc();
    config.disks = vec![DiskConfig::attached()];
    let builder = host.builder(config).disk_backend(0, Keeps(kept));
    let vm = ready(builder, if works { &BEGINS } else { &[] })?;
    let mut request = None;
    let begun = vm.start().map(|()| {
        let is_kept = |_: &Told| {
            request = request.take().or_else(|| requests.try_recv().ok());
            request.is_some()
        };
        wait(&vm, works, is_kept);
    });
    let ended = end(host, vm, begun);
    let answered = request.is_some_and(|request| request.complete(Ok(())));
    expect(!answered, "nobody waits for what was kept until after the end");
    ended
}

/// A card whose network does not keep to its protocol, and is given up.
fn lose(stage: &Stage, works: bool) -> vmbed::Result<()> {
    let (near, far) = aside(|| {
        let (near, mut far) = UnixStream::pair().unwrap();
        // A frame of 4 GiB.
        far.write_all(&[0xff; 4]).unwrap();
        (near, far)
    });
    let lived = receive(stage, &near, works);
    aside(move || drop((near, far)));
    lived
}

fn receive(stage: &Stage, near: &UnixStream, works: bool) -> vmbed::Result<()> {
    let host = Host::open()?;
    let mut config = stage.pc();
    config.nets = vec![NetConfig::attached()];
    let steps = [(Op::Receive, 0, 0, 0)];
    let vm = ready(host.builder(config).net_fd(0, near)?, if works { &steps } else { &[] })?;
    let mut is_lost = false;
    let begun = vm.start().map(|()| {
        wait(&vm, works, |told| {
            is_lost |= told.is_excused();
            is_lost
        })
    });
    end(host, vm, begun)
}

/// A disk by io_uring: a flush, of which the kernel says that it would have to be made again, and a read that it is slow with.
fn take(stage: &Stage, works: bool) -> vmbed::Result<()> {
    let host = Host::open()?;
    let mut config = stage.pc();
    let mut disk = DiskConfig::new(stage.disk());
    disk.engine = DiskEngine::Auto;
    config.disks = vec![disk];
    let mut steps = vec![(Op::Write, 3, 2, 7), (Op::Flush, 0, 0, 0)];
    steps.extend(if works { &BEGINS[..] } else { &[] });
    let vm = ready(host.builder(config), &steps)?;
    let begun = vm.start().map(|()| wait(&vm, works, |_| TAKEN.load(Ordering::SeqCst)));
    end(host, vm, begun)
}

/// Waits until the guest waits for ever, or the VM has ended by itself.
fn wait(vm: &Vm, works: bool, mut waits: impl FnMut(&Told) -> bool) {
    let (begin, mut told) = (Instant::now(), Told::default());
    while !waits(&told) && begin.elapsed() < told.patience() {
        let ended = vm.wait_timeout(Duration::from_millis(5));
        told.hear(vm);
        if !matches!(ended, Ok(None)) {
            expect(!works && matches!(ended, Ok(Some(StopCause::GuestReset))), "the guest waits");
            return;
        }
    }
    if !waits(&told) {
        told.excuse(vm);
    }
}

/// The read was taken.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// What the call comes to, if it is one that tells a ring of a flush or of that read; allocates nothing.
pub fn answer(call: &libc::seccomp_data, armed: bool) -> Option<i64> {
    let (fd, count) = (call.args[0] as RawFd, call.args[1]);
    if libc::c_long::from(call.nr) != libc::SYS_io_uring_enter || count == 0 {
        return None;
    }
    match ring::first_operation(fd)? {
        ring::FSYNC => {
            let wait = libc::c_ulong::from(GETEVENTS);
            // SAFETY: integers go in, and no signals. The thread whose ring it is waits for its answer.
            let taken = unsafe { libc::syscall(libc::SYS_io_uring_enter, fd, count, 1, wait, 0, 0) };
            ring::turn_last(fd, -libc::EAGAIN);
            Some(if taken < 0 { -i64::from(libc::EAGAIN) } else { taken })
        }
        ring::READ | ring::READV if armed && !TAKEN.swap(true, Ordering::SeqCst) => Some(count as i64),
        _ => None,
    }
}

/// `IORING_ENTER_GETEVENTS`
const GETEVENTS: u32 = 1;
