//! Runs in which threads make the calls that others make by luck alone.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};

use vmbed::internals::sandbox;
use vmbed::{BlockBackend, BlockRequest, DiskConfig, NetConfig, StopCause, Vm};

use crate::guests::Op;
use crate::learn::ip;
use crate::life::{LONG, SIZE, Scratch, ends, hear, host, pc, start, wait_until};

pub fn everything() {
    amid_requests();
    interrupts();
    pairs();
    nobody_there();
    random();
    lost_memory();
    arenas();
}

/// Waits until a thread of that duty has made the call.
fn made(call: &str) {
    wait_until(call, || !sandbox::unneeded().iter().any(|line| line.starts_with(call)));
}

/// A disk whose requests are answered elsewhere.
struct Elsewhere(Sender<BlockRequest>);

impl BlockBackend for Elsewhere {
    fn size(&self) -> u64 {
        SIZE
    }

    fn submit(&mut self, request: BlockRequest) {
        let _ = self.0.send(request);
    }
}

/// A guest with such a disk, all of whose threads are in the sandbox.
fn with_requests(steps: &[(Op, u32, u32, u32)]) -> (Vm, Receiver<BlockRequest>) {
    let (requests, begun) = channel();
    let mut config = pc();
    (config.disks, config.nets) = (vec![DiskConfig::attached()], vec![NetConfig::attached()]);
    let (near, _) = UnixDatagram::pair().unwrap();
    let builder = host().builder(config).disk_backend(0, Elsewhere(requests)).net_fd(0, near).unwrap();
    (start(sandbox::trust(builder), steps), begun)
}

/// A driver resets a disk that has a request under way, which the disk's thread waits for. Meanwhile the process is stopped and
/// continued: a wait that has an end is gone on with.
fn amid_requests() {
    let (vm, begun) = with_requests(&[(Op::BeginWrite, 8, 8, 7), (Op::Reset, 0, 0, 0)]);
    let request = begun.recv_timeout(LONG).expect("the guest's request");
    made("Disk: poll");
    wait_until("a wait that is gone on with", || {
        stop_and_go_on();
        !sandbox::unneeded().iter().any(|line| line.contains("restart_syscall"))
    });
    assert!(request.complete(Ok(())), "the disk waits for it");
    assert_eq!(ends(&vm), StopCause::GuestReset);
}

fn stop_and_go_on() {
    let stops = "kill -STOP $0; i=0; until grep -q '^State:.T' /proc/$0/status || [ $i = 1000 ]; do i=$((i+1)); done; kill -CONT $0";
    let done = Command::new("sh").args(["-c", stops, &std::process::id().to_string()]).status().unwrap();
    assert!(done.success(), "{done}");
}

/// Interrupts of both kinds, though the guest takes none: by the vCPU, and by what is typed.
fn interrupts() {
    let image = Scratch::disk();
    let mut config = pc();
    config.disks = vec![image.config()];
    let (mut theirs, ours) = UnixStream::pair().unwrap();
    let (mut out, to) = std::io::pipe().unwrap();
    let builder = host().builder(config).console_input(&ours).unwrap().console_output(&to).unwrap();
    let asked = [
        // Looks at the pending bits, too.
        (Op::Interrupts, 0, 0, 1),
        (Op::Interrupts, 0, 0, 0),
        (Op::Read, 0, 1, 0),
        (Op::Tell, 0, 0, 1),
        (Op::Asked, 0, 0, 0),
    ];
    let vm = start(builder, &asked);
    out.read_exact(&mut [0]).unwrap();
    hear(&vm, 1);
    theirs.write_all(b"typed").unwrap();
    made("Device: ioctl [(1, Number(4020aea5))]");
    assert_eq!(vm.stop().unwrap(), StopCause::HostStop);
}

/// A card with two pairs of queues, which its driver takes into use twice.
fn pairs() {
    ip("tuntap add tap1 mode tap multi_queue");
    ip("link set tap1 up");
    let mut config = pc();
    config.nets = vec![NetConfig::tap("tap1")];
    config.nets[0].queues = 2;
    let vm = start(host().builder(config), &[(Op::Pairs, 0, 0, 0), (Op::Pairs, 0, 0, 0)]);
    assert_eq!(ends(&vm), StopCause::GuestReset);
    ip("link del tap1");
}

/// A frame for a socket whose other end has gone.
fn nobody_there() {
    let (near, far) = UnixDatagram::pair().unwrap();
    drop(far);
    let mut config = pc();
    config.nets = vec![NetConfig::attached()];
    let vm = start(host().builder(config).net_fd(0, near).unwrap(), &[(Op::Send, 0, 60, 5)]);
    assert_eq!(ends(&vm), StopCause::GuestReset);
}

fn random() {
    let mut config = pc();
    config.rng = true;
    let vm = start(host().builder(config), &[(Op::Random, 0, 64, 0)]);
    assert_eq!(ends(&vm), StopCause::GuestReset);
}

/// Where guests' memory is mapped in this process.
fn mapped() -> Vec<usize> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let guests = maps.lines().filter(|line| line.contains("vmbed-guest"));
    guests.map(|line| usize::from_str_radix(line.split('-').next().unwrap(), 16).unwrap()).collect()
}

/// The page in which a request's status belongs is lost: the thread that writes it comes by the handler of SIGBUS.
fn lost_memory() {
    vmbed::handle_sigbus().unwrap();
    let (vm, begun) =
        with_requests(&[(Op::BeginWrite, 8, 8, 7), (Op::Tell, 0, 0, 1), (Op::Receive, 0, 0, 0)]);
    let request = begun.recv_timeout(LONG).expect("the guest's request");
    hear(&vm, 1);
    let [guest] = mapped()[..] else { panic!("one guest's memory: {:x?}", mapped()) };
    let path = Scratch::new("nothing");
    let nothing = File::options().read(true).write(true).create_new(true).open(&path.0).unwrap();
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_FIXED);
    let headers = std::ptr::without_provenance_mut::<libc::c_void>(guest + 0x4_0000);
    #[expect(unsafe_code, reason = "takes memory away as failing hardware does")]
    // SAFETY: the guest's own memory, which is accessed as volatile bytes only.
    let made = unsafe { libc::mmap(headers, 4096, prot, flags, nothing.as_raw_fd(), 0) };
    assert_eq!(made, headers);
    assert!(request.complete(Ok(())), "the disk waits for it");
    match ends(&vm) {
        StopCause::DeviceFault { device, why } if device == "memory" => {
            assert!(why.contains("at 0x40010"), "{why}")
        }
        other => panic!("it ended otherwise: {other}"),
    }
}

/// More than the 64 MiB that an arena of the C library's has, in pieces that have no mapping of their own.
pub fn arenas() {
    let vm = host().build(pc()).unwrap();
    let much = sandbox::on_loop(&vm, 0, || {
        let pieces: Vec<Vec<u8>> = (0..1200).map(|_| Vec::with_capacity(100_000)).collect();
        std::hint::black_box(pieces).len()
    });
    assert_eq!(much, Some(1200));
}
