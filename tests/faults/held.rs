//! Requests that nobody answers before the VM ends, a flush that the kernel would have had made again, and a network that sends nonsense. An
//! embedder's disk keeps its request. For a ring the supervisor plays a kernel that is slow: it takes a read and begins it when it is told again.
use std::io::Write;
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::time::{Duration, Instant};

use vmbed::{BlockBackend, BlockRequest, DiskConfig, DiskEngine, ErrorKind, Host, NetConfig, StopCause, Vm};

use crate::driven::SIZE;
use crate::guests::{self, Op, outcome};
use crate::life::{LONG, Stage, Told, aside, expect};
use crate::others::{Step, end, ready};
use crate::part::ring;
use crate::supervisor::HIT;
use crate::{Fault, Kind};

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
    let lived = vm.start().and_then(|()| {
        let mut told = wait(&vm, works, |_| {
            request = request.take().or_else(|| requests.try_recv().ok());
            request.is_some()
        });
        let stopped = stop(&vm, &mut told);
        expect(told.of(libc::ETIMEDOUT) == works, "the embedder is told that its disk has not answered");
        stopped
    });
    let ended = end(host, vm, lived);
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
    let lived = vm.start().and_then(|()| {
        let mut told = wait(&vm, works, |told| told.of(libc::EPROTO));
        stop(&vm, &mut told)
    });
    end(host, vm, lived)
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
    let lived = vm.start().and_then(|()| {
        let mut told = wait(&vm, works, |_| TAKEN.load(Ordering::SeqCst));
        flushed(stage, &vm);
        expect(!told.is_excused(), "nobody hears of a flush that is made again");
        let stopped = stop(&vm, &mut told);
        expect(told.of(libc::ETIMEDOUT) == works, "the embedder is told that the kernel has not answered");
        stopped
    });
    end(host, vm, lived)
}

/// What the guest was told of the flush: that it is done, or that it is not if the second try of it is what failed.
fn flushed(stage: &Stage, vm: &Vm) {
    let Fault { kind, answer, .. } = stage.fault;
    let failed =
        HIT.load(Ordering::SeqCst) > 0 && kind == Kind::of(libc::SYS_fdatasync, 0) && !answer.is_quiet();
    let mut results = [0; 32];
    if TAKEN.load(Ordering::SeqCst) && vm.read_memory(guests::RESULTS, &mut results).is_ok() {
        let status = outcome(&results, 1).0;
        if failed != (status != 0) {
            println!("LOST: the guest was told of its flush: {status}");
        }
    }
}

/// Waits until the guest waits for ever, or the VM has ended by itself; what the embedder was told.
fn wait(vm: &Vm, works: bool, mut waits: impl FnMut(&Told) -> bool) -> Told {
    let (begin, mut told) = (Instant::now(), Told::default());
    while !waits(&told) && begin.elapsed() < told.patience() {
        let ended = vm.wait_timeout(Duration::from_millis(5));
        told.hear(vm);
        if !matches!(ended, Ok(None)) {
            expect(!works, "the guest waits");
            expect(matches!(ended, Ok(Some(StopCause::GuestReset))), "the guest has come to its end");
            return told;
        }
    }
    if !waits(&told) {
        told.excuse(vm);
    }
    told
}

/// Giving up takes half of the time that `stop` has, and this machine may have other things to do.
fn stop(vm: &Vm, told: &mut Told) -> vmbed::Result<()> {
    let stopped = match vm.stop() {
        Err(error) if error.kind() == ErrorKind::TimedOut => vm.wait_timeout(LONG).map(drop),
        stopped => stopped.map(drop),
    };
    told.hear(vm);
    stopped
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
        ring::FSYNC => ring::answer_with(fd, count, -libc::EAGAIN),
        ring::READ | ring::READV if armed && !TAKEN.swap(true, Ordering::SeqCst) => Some(count as i64),
        _ => None,
    }
}
