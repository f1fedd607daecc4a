//! Cases of disks and cards that the embedder backs with descriptors or with code of its own.

use std::collections::VecDeque;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmbed::{
    BareBoot, BlockBackend, BlockOp, BlockRequest, Bytes, CpuMode, DiskConfig, ErrorKind, EventKind, IoList,
    NetBackend, NetConfig, Network, Offloads, Platform, RateLimit, StopCause, Vm, VmBuilder, VmConfig,
};

use crate::guest::{Port, ends, host, wait_until};
use crate::guests::{self, Op, outcome, script};

const SECTORS: u64 = 1024;

/// A PC with the guest of tests/guests, one open disk and one open card as asked for.
pub fn config(disks: usize, nets: usize) -> VmConfig {
    let guest = guests::virtio(Path::new(env!("CARGO_TARGET_TMPDIR")));
    let code = std::fs::read(&guest).unwrap();
    std::fs::remove_file(guest).unwrap();
    let mut boot = BareBoot::new(CpuMode::Long, guests::ENTRY, code);
    boot.stack = guests::STACK;
    let mut config = VmConfig::bare(boot);
    (config.platform, config.memory) = (Platform::Pc, Bytes(guests::MEMORY));
    config.disks = vec![DiskConfig::attached(); disks];
    config.nets = vec![NetConfig::attached(); nets];
    config
}

pub struct Guest {
    pub vm: Vm,
    said: Arc<Port>,
}

impl Guest {
    /// Starts the guest on these steps.
    pub fn start(builder: VmBuilder, steps: &[(Op, u32, u32, u32)]) -> Self {
        let said = Arc::new(Port::default());
        let vm = builder.pio_device("said", guests::SAY, 1, said.clone()).build().unwrap();
        vm.write_memory(guests::SCRIPT, &script(steps)).unwrap();
        vm.start().unwrap();
        Self { vm, said }
    }

    /// How the steps went, when all are done.
    pub fn results(&self, count: usize) -> Vec<guests::Outcome> {
        assert_eq!(ends(&self.vm), StopCause::GuestReset, "said {:?}", self.said.0.lock().unwrap());
        let mut bytes = vec![0; 16 * count];
        self.vm.read_memory(guests::RESULTS, &mut bytes).unwrap();
        (0..count).map(|i| outcome(&bytes, i)).collect()
    }

    pub fn wait_for(&self, what: u8) {
        wait_until("the guest's word", || self.said.0.lock().unwrap().chunks(2).any(|said| said[1] == what));
    }
}

/// A disk in memory. It fails at sector 100, and keeps what is about sector 200 or beyond.
#[derive(Clone, Default)]
struct Ram {
    bytes: Arc<Mutex<Vec<u8>>>,
    kept: Arc<Mutex<Vec<BlockRequest>>>,
    flushes: Arc<AtomicU32>,
    discarded: Arc<Mutex<Vec<std::ops::Range<usize>>>>,
    dropped: Arc<AtomicU32>,
}

impl Ram {
    fn new() -> Self {
        let ram = Self::default();
        ram.bytes.lock().unwrap().resize((512 * SECTORS) as usize, 0);
        ram
    }

    fn perform(&self, mut request: BlockRequest) -> bool {
        let mut bytes = self.bytes.lock().unwrap();
        let place = request.offset() as usize..(request.offset() + request.len()) as usize;
        match request.op() {
            BlockOp::Read => assert_eq!(request.copy_from(0, &bytes[place.clone()]), place.len()),
            BlockOp::Write { durable } => {
                assert!(!durable, "the guest has flushes");
                assert_eq!(request.copy_to(0, &mut bytes[place.clone()]), place.len());
            }
            BlockOp::Flush => drop(self.flushes.fetch_add(1, Ordering::SeqCst)),
            BlockOp::Discard => self.discarded.lock().unwrap().push(place),
            BlockOp::WriteZeroes { unmap, durable } => {
                assert!(unmap && !durable);
                bytes[place].fill(0);
            }
            other => panic!("{other:?}"),
        }
        request.complete(Ok(()))
    }
}

/// What the VM owns of it.
struct Attached(Ram);

impl BlockBackend for Attached {
    fn size(&self) -> u64 {
        512 * SECTORS
    }

    fn discards(&self) -> bool {
        true
    }

    fn submit(&mut self, request: BlockRequest) {
        match request.offset() / 512 {
            100 => assert!(request.complete(Err(io::Error::from_raw_os_error(libc::ENOSPC)))),
            200.. => self.0.kept.lock().unwrap().push(request),
            _ => assert!(self.0.perform(request)),
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.0.dropped.fetch_add(1, Ordering::SeqCst);
    }
}

/// 7 and 8 in two sectors.
const SUM: u64 = 512 * (7 + 8);

pub fn a_disk_of_ones_own() {
    let ram = Ram::new();
    let steps = [
        (Op::Write, 3, 2, 7),
        (Op::Flush, 0, 0, 0),
        (Op::Read, 3, 2, 0),
        (Op::Read, 100, 1, 0),
        (Op::BeginRead, 200, 1, 0),
        (Op::BeginWrite, 300, 2, 7),
        (Op::BeginRead, 400, 1, 0),
        (Op::Tell, 0, 0, 1),
        (Op::Finish, 0, 0, 0),
        (Op::Zero, 4, 1, 1),
        (Op::Discard, 8, 4, 0),
        (Op::Discard, 8, 4, 1),
    ];
    let guest = Guest::start(host().builder(config(1, 0)).disk_backend(0, Attached(ram.clone())), &steps);
    guest.wait_for(1);
    wait_until("three requests", || ram.kept.lock().unwrap().len() == 3);
    // Out of order, and on another thread.
    let (own, mut kept) = (ram.clone(), std::mem::take(&mut *ram.kept.lock().unwrap()));
    std::thread::spawn(move || kept.drain(..).rev().for_each(|request| assert!(own.perform(request))))
        .join()
        .unwrap();
    let results = guest.results(steps.len());
    assert_eq!(results[..4], [(0, 1, 0), (0, 1, 0), (0, 1025, SUM), (1, 1, 0)]);
    assert_eq!(results[8], (0, 513 + 1 + 513, 0));
    assert_eq!(ram.bytes.lock().unwrap()[512 * 301], 8);
    assert_eq!(ram.flushes.load(Ordering::SeqCst), 1);
    assert_eq!(results[9..], [(0, 1, 0), (0, 1, 0), (2, 1, 0)], "a discard has no flags");
    assert_eq!([3, 4].map(|sector| ram.bytes.lock().unwrap()[512 * sector]), [7, 0]);
    assert_eq!(ram.discarded.lock().unwrap().as_slice(), std::slice::from_ref(&(512 * 8..512 * 12)));
    let done = guest.vm.disk_statistics(0).unwrap();
    assert_eq!((done.reads, done.read_bytes, done.writes, done.written_bytes), (3, 2048, 2, 2048));
    assert_eq!((done.flushes, done.errors), (1, 2));
    assert_eq!((done.discards, done.discarded_bytes, done.latency.iter().sum::<u64>()), (2, 5 * 512, 10));
    assert_eq!(guest.vm.disk_statistics(1).unwrap_err().kind(), ErrorKind::InvalidArgument);
    let errors: Vec<_> = std::iter::from_fn(|| guest.vm.events().next_event())
        .filter_map(|event| match event.kind {
            EventKind::BackendError { device, errno, offset } => Some((device.to_string(), errno, offset)),
            _ => None,
        })
        .collect();
    assert_eq!(errors, [("disk0".to_owned(), libc::ENOSPC, 51_200)]);
    drop(guest);
    assert_eq!(ram.dropped.load(Ordering::SeqCst), 1);
}

pub fn a_disk_that_does_not_answer() {
    let ram = Ram::new();
    let steps = [
        (Op::BeginRead, 200, 1, 0),
        (Op::Tell, 0, 0, 1),
        (Op::Finish, 0, 0, 0),
        (Op::BeginRead, 202, 1, 0),
        (Op::Reset, 0, 0, 0),
        (Op::BeginRead, 201, 1, 0),
        (Op::Tell, 0, 0, 2),
        (Op::Finish, 0, 0, 0),
    ];
    let guest = Guest::start(host().builder(config(1, 0)).disk_backend(0, Attached(ram.clone())), &steps);
    guest.wait_for(1);
    wait_until("a request", || ram.kept.lock().unwrap().len() == 1);
    let error = guest.vm.pause().unwrap_err();
    assert_eq!((error.kind(), error.to_string().contains("disk0")), (ErrorKind::TimedOut, true), "{error}");
    let kept = || ram.kept.lock().unwrap().pop().unwrap();
    assert!(ram.perform(kept()), "the VM has gone on, and waits for its answer");
    wait_until("a request behind which the device is reset", || ram.kept.lock().unwrap().len() == 1);
    assert!(ram.perform(kept()), "the reset waits for it");
    guest.wait_for(2);
    wait_until("another request", || ram.kept.lock().unwrap().len() == 1);
    // The end does not wait for it for ever, and who answers it after that is told so.
    let begun = Instant::now();
    assert_eq!(guest.vm.stop().unwrap(), StopCause::HostStop);
    assert!(begun.elapsed() > Duration::from_secs(4), "it was given its time");
    drop(guest);
    assert_eq!(ram.dropped.load(Ordering::SeqCst), 1);
    assert!(!ram.perform(kept()), "its memory is there, and nobody waits for it");
}

/// A network that gives every frame back, with its header.
struct Echo {
    frames: VecDeque<Vec<u8>>,
    offloads: Offloads,
    /// The headers that came, and what the driver takes.
    heard: Arc<Mutex<(Vec<[u8; 12]>, Offloads)>>,
    ready: OwnedFd,
    bell: OwnedFd,
    dropped: Arc<AtomicU32>,
}

impl Echo {
    fn new(dropped: &Arc<AtomicU32>) -> Self {
        let (ready, bell) = UnixDatagram::pair().unwrap();
        ready.set_nonblocking(true).unwrap();
        Self {
            frames: VecDeque::new(),
            offloads: Offloads::empty(),
            heard: Arc::default(),
            ready: ready.into(),
            bell: bell.into(),
            dropped: dropped.clone(),
        }
    }
}

impl NetBackend for Echo {
    fn receive(&mut self, room: &IoList<'_>) -> io::Result<usize> {
        let Some(frame) = self.frames.pop_front() else { return Err(io::ErrorKind::WouldBlock.into()) };
        let ready = UnixDatagram::from(self.ready.try_clone()?);
        assert_eq!(ready.recv(&mut [0; 8]).unwrap(), 1);
        assert!(room.len() > 65_557);
        room.copy_from(0, &frame)
    }

    fn send(&mut self, frame: &IoList<'_>) -> io::Result<()> {
        let mut bytes = vec![0; frame.len()];
        assert_eq!(frame.copy_to(0, &mut bytes), bytes.len());
        self.heard.lock().unwrap().0.push(bytes[..12].try_into().unwrap());
        assert!(frame.copy_from(0, &[1]).is_err(), "it is not to be written to");
        if bytes.len() == 12 + 99 {
            return Err(io::Error::from_raw_os_error(libc::ENETDOWN));
        }
        self.frames.push_back(bytes);
        UnixDatagram::from(self.bell.try_clone()?).send(&[1]).map(drop)
    }

    fn offloads(&self) -> Offloads {
        self.offloads
    }

    fn set_offloads(&mut self, taken: Offloads) {
        self.heard.lock().unwrap().1 = taken;
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.dropped.fetch_add(1, Ordering::SeqCst);
    }
}

/// The headers of a checksum at 34 + 16, and of segments of 1448 bytes behind 54 of headers: TCP over IPv4, and over IPv6.
const CSUM: [u8; 12] = [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0];
const TSO4: [u8; 12] = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];
const TSO6: [u8; 12] = [1, 4, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];

/// Frames with something left to do, there and back.
fn offloads_both_ways(dropped: &Arc<AtomicU32>) {
    let header = |bytes: [u8; 12]| {
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        (Op::Header, word(0), word(4), word(8))
    };
    let steps = [
        (header(CSUM)),
        (Op::Send, 0, 200, 5),
        (Op::Receive, 1, 0, 0),
        (header(TSO4)),
        (Op::Send, 0, 1990, 5),
        (Op::Receive, 2, 0, 0),
        (header(TSO6)),
        (Op::Send, 0, 1990, 5),
    ];
    let taken = Offloads::CSUM | Offloads::TSO4;
    let mut echo = Echo::new(dropped);
    echo.offloads = taken | Offloads::TSO6;
    let heard = echo.heard.clone();
    let guest = Guest::start(host().builder(config(0, 1)).net_backend(0, echo), &steps);
    let results = guest.results(steps.len());
    assert_eq!([results[2], results[5]], [(0, 212, 1000), (0, 2002, 9950)]);
    assert_eq!(*heard.lock().unwrap(), (vec![CSUM, TSO4], taken));
    for (slot, mut came) in [(1, CSUM), (2, TSO4)] {
        let mut header = [0; 12];
        guest.vm.read_memory(guests::FRAMES + 2048 * slot, &mut header).unwrap();
        // In one buffer.
        came[10] = 1;
        assert_eq!(header, came);
    }
    let carried = guest.vm.net_statistics(0).unwrap();
    assert_eq!(
        (carried.tx_frames, carried.tx_dropped, carried.rx_frames),
        (2, 1, 2),
        "its driver knows no TSO6"
    );
    // In front of a network that knows nothing, nothing may be left to do.
    let echo = Echo::new(dropped);
    let heard = echo.heard.clone();
    let guest = Guest::start(
        host().builder(config(0, 1)).net_backend(0, echo),
        &[header(CSUM), (Op::Send, 0, 200, 5)],
    );
    guest.results(2);
    assert_eq!(*heard.lock().unwrap(), (vec![], Offloads::empty()));
    assert_eq!(guest.vm.net_statistics(0).unwrap().tx_dropped, 1);
}

pub fn a_network_of_ones_own() {
    offloads_both_ways(&Arc::default());
    let dropped = Arc::new(AtomicU32::new(0));
    let steps = [(Op::Send, 0, 60, 5), (Op::Receive, 0, 0, 0), (Op::Send, 0, 99, 5), (Op::Send, 0, 5, 5)];
    let echo = Echo::new(&dropped);
    let heard = echo.heard.clone();
    let guest = Guest::start(host().builder(config(0, 1)).net_backend(0, echo), &steps);
    assert_eq!(guest.results(steps.len())[1], (0, 72, 300));
    let carried = guest.vm.net_statistics(0).unwrap();
    assert_eq!((carried.tx_frames, carried.tx_bytes, carried.tx_dropped), (1, 60, 2));
    assert_eq!((carried.rx_frames, carried.rx_bytes, carried.rx_dropped), (1, 60, 0));
    assert_eq!(guest.vm.net_statistics(1).unwrap_err().kind(), ErrorKind::InvalidArgument);
    assert!(heard.lock().unwrap().0.iter().all(|header| *header == [0; 12]), "it knows no offloads");
    drop(guest);
    assert_eq!(dropped.load(Ordering::SeqCst), 1);

    let mut unplugged = config(0, 1);
    let rate = RateLimit::NONE.bytes(1 << 20, 0);
    let card = &mut unplugged.nets[0];
    (card.mtu, card.speed, card.link) = (Some(9000), Some(1000), false);
    (card.receive_rate, card.send_rate) = (rate, rate);
    let steps = [(Op::Send, 0, 60, 5), (Op::Send, 0, 99, 5)];
    let guest = Guest::start(host().builder(unplugged).net_backend(0, Echo::new(&dropped)), &steps);
    guest.results(steps.len());
    let carried = guest.vm.net_statistics(0).unwrap();
    assert_eq!((carried.tx_frames, carried.tx_dropped), (0, 2), "there is no cable");
    guest.vm.set_link(0, true).unwrap();
    guest.vm.announce_net(0).unwrap();
    assert!(guest.vm.announce_net(1).unwrap_err().to_string().contains("net1"));
    guest.vm.set_net_rates(0, RateLimit::NONE, rate).unwrap();
    assert!(guest.vm.set_link(1, true).unwrap_err().to_string().contains("net1"));
    assert!(guest.vm.set_net_rates(1, rate, rate).unwrap_err().to_string().contains("net1"));
    let mut wrong = config(0, 1);
    wrong.nets[0].mtu = Some(67);
    assert!(wrong.validate().unwrap_err().to_string().contains("nets[0].mtu"));

    // A network in user space: there, or not.
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("net-{}", std::process::id()));
    let mut outside = config(0, 0);
    outside.nets = vec![NetConfig::stream(&path)];
    let error = host().build(outside.clone()).unwrap_err();
    assert!(error.kind() == ErrorKind::NotFound && error.to_string().contains("net0: connecting"), "{error}");
    let listener = UnixListener::bind(&path).unwrap();
    let steps = [(Op::Send, 0, 60, 5), (Op::Receive, 0, 0, 0)];
    let guest = Guest::start(host().builder(outside.clone()), &steps);
    let (mut far, _) = listener.accept().unwrap();
    far.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut frame = [0; 64];
    far.read_exact(&mut frame).unwrap();
    assert_eq!(frame[..4], 60u32.to_be_bytes());
    far.write_all(&frame).unwrap();
    assert_eq!(guest.results(2)[1], (0, 72, 300));
    std::fs::remove_file(path).unwrap();
    outside.nets[0].queues = 2;
    (outside.nets[0].stream, outside.nets[0].tap) = (None, None);
    let error = host().builder(outside).net_backend(0, Echo::new(&dropped)).build().unwrap_err();
    assert!(error.to_string().contains("nets[0].queues is 2, and what is attached has 1"), "{error}");
}

pub fn disks_and_cards_by_descriptor() {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("disk-{}", std::process::id()));
    let open = std::fs::File::options().read(true).write(true).create_new(true).open(&path);
    let mut file = open.unwrap();
    std::fs::remove_file(path).unwrap();
    file.set_len(512 * SECTORS).unwrap();
    let (near, far) = UnixDatagram::pair().unwrap();
    far.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let steps = [(Op::Write, 3, 2, 7), (Op::Read, 3, 2, 0), (Op::Send, 0, 60, 5), (Op::Receive, 0, 0, 0)];
    let host = host();
    let builder = host.builder(config(1, 1)).disk_fd(0, &file).unwrap().net_fd(0, &near).unwrap();
    drop(near);
    let guest = Guest::start(builder, &steps);
    let mut frame = [0; 100];
    assert_eq!(far.recv(&mut frame).unwrap(), 72);
    far.send(&[&[0; 12][..], &[9; 40]].concat()).unwrap();
    assert_eq!(guest.results(4), [(0, 1, 0), (0, 1025, SUM), (0, 0, 0), (0, 52, 360)]);
    let mut bytes = [0; 1024];
    file.seek(SeekFrom::Start(1536)).unwrap();
    file.read_exact(&mut bytes).unwrap();
    assert_eq!((bytes[0], bytes[1023]), (7, 8));
    drop(guest);
    file.write_all(b"it is still open here").unwrap();

    // What is no disk, no network, or for a place that is not there.
    let fails = |builder: VmBuilder, text: &str| {
        let error = builder.build().err().unwrap();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
        assert!(error.to_string().contains(text), "{text}: {error}");
    };
    fails(host.builder(config(1, 0)), "disks[0].path");
    fails(host.builder(config(0, 1)), "nets[0].tap");
    fails(host.builder(config(0, 0)).disk_fd(0, &file).unwrap(), "disks[0]");
    fails(host.builder(config(1, 0)).disk_fd(0, &far).unwrap(), "disk0: fd");
    fails(host.builder(config(0, 1)).net_fd(0, &file).unwrap(), "net0");
    let null = std::fs::File::open("/dev/null").unwrap();
    fails(host.builder(config(1, 0)).disk_fd(0, &null).unwrap(), "O_RDWR");
    let mut named = config(1, 0);
    named.disks[0].path = Some("/x".into());
    fails(host.builder(named).disk_fd(0, &file).unwrap(), "disks[0].path: is set");
}

pub fn a_card_moves_to_another_network() {
    let dropped = Arc::new(AtomicU32::new(0));
    let steps = [
        (Op::Send, 0, 60, 5),
        (Op::Tell, 0, 0, 1),
        (Op::Receive, 0, 0, 0),
        (Op::Send, 0, 61, 5),
        (Op::Tell, 0, 0, 2),
        (Op::Receive, 0, 0, 0),
    ];
    let guest = Guest::start(host().builder(config(0, 1)).net_backend(0, Silence::new(&dropped)), &steps);
    guest.wait_for(1);
    for wrong in [Network::Tap("vmbednone0".into()), Network::Stream("/nonexistent".into())] {
        assert_eq!(guest.vm.change_net(0, wrong).unwrap_err().kind(), ErrorKind::NotFound);
    }
    let (near, far) = UnixDatagram::pair().unwrap();
    far.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    assert_eq!(dropped.load(Ordering::SeqCst), 0, "it stays where it is");
    guest.vm.change_net(0, Network::Fd(near.into())).unwrap();
    assert_eq!(dropped.load(Ordering::SeqCst), 1);
    let frame = [&[0; 12][..], &[3; 60]].concat();
    far.send(&frame).unwrap();
    let mut room = [0; 100];
    assert_eq!(far.recv(&mut room).unwrap(), 73);
    guest.wait_for(2);
    guest.vm.pause().unwrap();
    guest.vm.change_net(0, Network::Backend(Box::new(Echo::new(&dropped)))).unwrap();
    assert!(guest.vm.change_net(1, Network::Tap("x".into())).unwrap_err().to_string().contains("net1"));
    guest.vm.resume().unwrap();
    // What is there has nothing for the guest: the next one has.
    let (near, far) = UnixDatagram::pair().unwrap();
    far.send(&frame).unwrap();
    guest.vm.change_net(0, Network::Fd(near.into())).unwrap();
    let results = guest.results(steps.len());
    assert_eq!([results[2], results[5]], [(0, 72, 180); 2]);
    drop(guest);
    assert_eq!(dropped.load(Ordering::SeqCst), 2);
}

/// A network that takes everything and has nothing.
struct Silence(Echo);

impl Silence {
    fn new(dropped: &Arc<AtomicU32>) -> Self {
        Self(Echo::new(dropped))
    }
}

impl NetBackend for Silence {
    fn receive(&mut self, _: &IoList<'_>) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn send(&mut self, _: &IoList<'_>) -> io::Result<()> {
        Ok(())
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.0.fd()
    }
}
