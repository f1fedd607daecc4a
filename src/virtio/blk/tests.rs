#![forbid(unsafe_code)]

use std::fs::File;

use virtio_bindings::bindings::virtio_config::VIRTIO_CONFIG_S_NEEDS_RESET;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::block::later::Later;
use crate::block::{BlockOp, RawDisk};
use crate::events::{EventKind, EventStream, StopLine};
use crate::memory::Memory;
use crate::reactor::EventLoop;
use crate::sys::lock;
use crate::sys::memory::sealed_memfd;
use crate::virtio::Signals;
use crate::virtio::queue_driver::{Dice, Driver, NEXT, WRITE, activation, bend, signals};

mod load;
mod more;
mod own;

const HEADER: u64 = 0x1_0000;
const DATA: u64 = 0x2_0000;
const STATUS: u64 = 0x3_0000;
const SIZE: u64 = 1 << 20;
const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;

struct Bench {
    driver: Driver,
    blk: Blk,
    signals: Signals,
    events: EventStream,
    file: File,
}

fn file() -> File {
    sealed_memfd(c"disk", SIZE).unwrap()
}

fn raw(file: &File) -> RawDisk {
    RawDisk::plain("disk0: test", file.try_clone().unwrap(), false).unwrap()
}

fn bench_on(place: Place, wrap: impl FnOnce(RawDisk) -> Box<dyn Backend>) -> Bench {
    let file = file();
    let memory = Memory::new(1 << 20).unwrap();
    let driver = Driver::new(&memory, 0x4000, 16);
    let (signals, events) = signals("disk0");
    let mut blk = Blk::simple("disk0", "serial-1", wrap(raw(&file)), place);
    blk.activate(activation(FLUSH, &[&driver], &signals)).unwrap();
    Bench { driver, blk, signals, events, file }
}

fn bench() -> Bench {
    bench_on(Place::Caller, |disk| Box::new(disk))
}

impl Bench {
    fn header(&self, kind: u32, sector: u64) {
        self.driver.memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
        self.driver.memory.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
        self.driver.memory.write_obj(0xffu8, GuestAddress(STATUS)).unwrap();
    }

    /// Sends a request; its status byte and the length in the used ring.
    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> (u8, u32) {
        self.header(kind, sector);
        let chain = [&[(HEADER, 16, 0)], data, &[(STATUS, 1, WRITE)]].concat();
        let head = self.driver.send(&chain);
        self.blk.process_queue();
        let (used, written) = self.driver.take_used().expect("every request is answered");
        assert_eq!(used, head);
        (self.driver.bytes::<1>(STATUS)[0], written)
    }

    fn broken(&self) -> bool {
        self.signals.status() & VIRTIO_CONFIG_S_NEEDS_RESET as u8 != 0
    }
}

#[test]
fn a_disk_reads_writes_flushes_and_names_itself() {
    let mut b = bench();
    b.driver.memory.write_slice(&[0xab; 1024], GuestAddress(DATA)).unwrap();
    assert_eq!(b.request(1, 3, &[(DATA, 512, 0), (DATA + 512, 512, 0)]), (0, 1));
    assert_eq!(b.request(4, 0, &[]), (0, 1));
    b.driver.memory.write_slice(&[0; 1024], GuestAddress(DATA)).unwrap();
    assert_eq!(b.request(0, 2, &[(DATA, 100, WRITE), (DATA + 100, 924, WRITE)]), (0, 1025));
    assert_eq!(b.driver.bytes::<514>(DATA)[510..], [0, 0, 0xab, 0xab]);
    assert_eq!(b.request(8, 0, &[(DATA, 20, WRITE)]), (0, 21));
    assert_eq!(&b.driver.bytes::<20>(DATA), b"serial-1\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(b.request(77, 0, &[]), (2, 1), "unknown: UNSUPP");
    assert_eq!(b.driver.interrupt.take_raised(), 5);
    assert_eq!(b.events.next_event(), None);
}

#[test]
fn the_configuration_says_what_the_disk_is() {
    let file = file();
    let readonly = RawDisk::plain("disk0", file, true).unwrap();
    let blk = Blk::simple("disk0", "", Box::new(readonly), Place::Caller);
    assert_ne!(blk.features() & 1 << VIRTIO_BLK_F_RO, 0);
    let mut capacity = [0; 8];
    blk.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), SIZE / 512);
    let mut limits = [0; 8];
    blk.read_config(8, &mut limits);
    assert_eq!(limits, [0, 0, 4, 0, 254, 0, 0, 0]);
    let mut beyond = [0; 4];
    blk.read_config(58, &mut beyond);
    assert_eq!(beyond, [0; 4]);
    let mut topology = [0; 8];
    blk.read_config(24, &mut topology);
    assert_eq!(topology, [3, 0, 8, 0, 0, 0, 0, 0], "pages");
}

/// Rows 9, 13, 14, 15 and 17, through the device: an error in the request, and it goes on.
#[test]
fn bad_requests_get_an_error_and_the_device_goes_on() {
    let mut b = bench();
    let huge = (0, u32::MAX, WRITE);
    assert_eq!(b.request(0, 0, &[huge, huge]).0, 1, "more than 2^32 bytes");
    assert_eq!(b.request(0, u64::MAX / 512 + 1, &[(DATA, 512, WRITE)]).0, 1, "the sector wraps");
    assert_eq!(b.request(0, SIZE / 512 - 1, &[(DATA, 512, WRITE), (DATA, 512, WRITE)]).0, 1, "past the end");
    assert_eq!(b.request(1, 0, &[(DATA, 512, WRITE)]).0, 1, "flipped");
    assert_eq!(b.request(0, 0, &[(0xc000_0000, 512, WRITE)]).0, 1, "outside memory");
    assert_eq!(b.request(0, 0, &[((1 << 20) - 256, 512, WRITE)]).0, 1, "half outside memory");
    b.header(0, 0);
    let chains: [&[(u64, u32, u16)]; 6] = [
        &[(HEADER, 16, 0)],
        &[(HEADER, 0, 0)],
        &[(HEADER, 7, 0), (STATUS, 1, WRITE)],
        &[(STATUS, 1, WRITE)],
        &[(STATUS, 1, WRITE), (HEADER, 16, 0)],
        &[(HEADER, 16, 0), (0xc000_0000, 1, WRITE)],
    ];
    for (i, chain) in chains.into_iter().enumerate() {
        b.driver.memory.write_obj(0xffu8, GuestAddress(STATUS)).unwrap();
        let head = b.driver.send(chain);
        b.blk.process_queue();
        let written = if (2..5).contains(&i) { 1 } else { 0 };
        assert_eq!(b.driver.take_used(), Some((head, written)), "{i}");
        assert_eq!(b.driver.bytes::<1>(STATUS)[0], if written == 1 { 1 } else { 0xff }, "{i}");
    }
    let bytes: Vec<_> = (0..16).map(|i| (HEADER + i, 1, 0)).collect();
    b.driver.reset();
    b.blk.deactivate();
    b.blk.activate(activation(FLUSH, &[&b.driver], &b.signals)).unwrap();
    b.header(4, 0);
    let head = b.driver.send(&[&bytes[1..], &[(STATUS, 1, WRITE)]].concat());
    b.blk.process_queue();
    assert_eq!(b.driver.take_used(), Some((head, 1)), "15 bytes of header");
    assert!(!b.broken());
    assert_eq!(b.events.next_event(), None, "none of it is the host's fault");
    assert_eq!(b.request(0, 0, &[(DATA, 512, WRITE)]), (0, 513));
}

#[test]
fn a_host_error_is_an_error_status_and_an_event() {
    let backend = RawDisk::plain("d", File::open("/proc/self/mem").unwrap(), false);
    assert!(backend.is_err(), "no size, no disk");
    let path = std::env::temp_dir().join(format!("vmbed-blk-{}", std::process::id()));
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    file.set_len(SIZE).unwrap();
    let mut b = bench();
    b.blk = Blk::simple("disk0", "", Box::new(raw(&file)), Place::Caller);
    b.blk.activate(activation(FLUSH, &[&b.driver], &b.signals)).unwrap();
    file.set_len(4096).unwrap();
    assert_eq!(b.request(0, 100, &[(DATA, 512, WRITE)]).0, 1);
    let event = b.events.next_event().unwrap().kind;
    assert_eq!(event, EventKind::BackendError { device: "disk0".into(), errno: libc::EIO, offset: 51_200 });
    assert_eq!(b.request(0, 0, &[(DATA, 512, WRITE)]).0, 0);
    let _ = std::fs::remove_file(path);
}

#[test]
fn a_broken_ring_stops_the_device_until_it_is_activated_again() {
    let mut b = bench();
    b.driver.descriptor(b.driver.table(), 0, (HEADER, 16, NEXT, 0));
    b.driver.offer(0);
    b.blk.process_queue();
    assert!(b.broken());
    assert!(matches!(b.events.next_event().unwrap().kind, EventKind::DeviceNeedsReset { .. }));
    b.driver.offer(1);
    b.blk.process_queue();
    assert_eq!(b.driver.take_used(), None);

    assert_eq!(b.blk.deactivate().len(), 1);
    b.signals.set_status(0);
    b.driver.reset();
    b.blk.activate(activation(FLUSH, &[&b.driver], &b.signals)).unwrap();
    assert_eq!(b.request(0, 0, &[(DATA, 512, WRITE)]), (0, 513));
    assert!(!b.broken());
}

#[test]
fn requests_on_a_loop_are_answered_and_a_pause_returns_the_queue() {
    let event_loop = EventLoop::start("test", |f| Ok(std::thread::spawn(f))).unwrap();
    let place = Place::Loop(event_loop, StopLine::new(|cause| panic!("{cause}")));
    let mut b = bench_on(place, |disk| Box::new(disk));
    for sector in 0..50 {
        b.header(0, sector);
        let head = b.driver.send(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
        b.driver.ring_doorbell();
        assert_eq!(b.driver.wait_used(), (head, 513));
    }
    let queues = b.blk.deactivate();
    b.header(0, 0);
    let head = b.driver.send(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    let memory = b.driver.memory.clone();
    b.blk.activate(Activation { features: FLUSH, memory, queues, signals: b.signals.clone() }).unwrap();
    assert_eq!(b.driver.wait_used(), (head, 513), "what came during the pause needs no doorbell");
    b.blk.deactivate();
}

#[test]
fn a_backend_that_completes_later_is_answered_and_waited_for() {
    let mut control = None;
    let mut b = bench_on(Place::Caller, |disk| {
        let (later, c) = Later::new(disk);
        control = Some(c);
        Box::new(later)
    });
    let control = control.unwrap();
    b.header(0, 0);
    let send = |b: &mut Bench| b.driver.send(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    let heads = [send(&mut b), send(&mut b), send(&mut b)];
    b.blk.process_queue();
    assert_eq!((control.held(), b.driver.take_used()), (3, None));
    // Row 11 in flight, and a backend that reports twice and what it never got.
    control.release(&[u64::from(heads[0]), 15, 9999]);
    let release = control.clone();
    b.blk.process_queue();
    let used: Vec<_> = std::iter::from_fn(|| b.driver.take_used()).map(|(head, _)| head).collect();
    assert_eq!(used, [heads[0], heads[2], heads[1]]);
    control.hold();
    let last = send(&mut b);
    b.blk.process_queue();
    assert_eq!(control.held(), 1);
    let waiter = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(50));
        release.release(&[]);
    });
    assert_eq!(b.blk.deactivate().len(), 1);
    assert_eq!(b.driver.take_used(), Some((last, 513)), "answered before the queue was returned");
    waiter.join().unwrap();
}

#[test]
fn without_flush_a_write_is_durable_when_it_is_answered() {
    for (features, durable) in [(0, true), (FLUSH, false)] {
        let mut b = bench();
        let (later, control) = Later::new(raw(&b.file));
        b.blk = Blk::simple("disk0", "", Box::new(later), Place::Caller);
        b.blk.activate(activation(features, &[&b.driver], &b.signals)).unwrap();
        b.header(1, 0);
        b.driver.send(&[(HEADER, 16, 0), (DATA, 512, 0), (STATUS, 1, WRITE)]);
        b.blk.process_queue();
        assert_eq!(*lock(&control.asked), [BlockOp::Write { durable }]);
        control.release(&[]);
        b.blk.deactivate();
    }
}

#[test]
fn a_head_in_flight_made_available_again_is_a_broken_ring() {
    let mut control = None;
    let mut b = bench_on(Place::Caller, |disk| {
        let (later, c) = Later::new(disk);
        control = Some(c);
        Box::new(later)
    });
    b.header(0, 0);
    let head = b.driver.send(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    b.driver.offer(head);
    b.blk.process_queue();
    assert!(b.broken());
    control.unwrap().release(&[]);
    b.blk.deactivate();
}

#[test]
fn bent_rings_never_stop_the_process_and_a_reset_always_helps() {
    let mut b = bench();
    let mut dice = Dice(7);
    for _ in 0..3000 {
        b.header(dice.below(10) as u32, dice.below(2050));
        bend(&mut b.driver, &mut dice);
        b.blk.process_queue();
        if b.broken() || dice.below(100) == 0 {
            b.blk.deactivate();
            b.signals.set_status(0);
            b.driver.reset();
            b.blk.activate(activation(FLUSH, &[&b.driver], &b.signals)).unwrap();
            assert_eq!(b.request(0, 0, &[(DATA, 512, WRITE)]), (0, 513));
        }
    }
    assert_eq!(b.file.metadata().unwrap().len(), SIZE);
}

/// A disk that takes its time for each request: until it is told.
struct Slow {
    inner: RawDisk,
    begun: std::sync::mpsc::Sender<()>,
    may_end: std::sync::mpsc::Receiver<()>,
}

impl Backend for Slow {
    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn readonly(&self) -> bool {
        false
    }

    fn submit(&mut self, request: crate::block::IoRequest<'_>) -> crate::block::Submitted {
        self.begun.send(()).unwrap();
        self.may_end
            .recv_timeout(std::time::Duration::from_secs(20))
            .expect("the test lets each request end");
        self.inner.submit(request)
    }
}

#[test]
fn who_takes_the_queue_back_waits_for_one_request_and_not_for_all() {
    let event_loop = EventLoop::start("test", |f| Ok(std::thread::spawn(f))).unwrap();
    let place = Place::Loop(event_loop, StopLine::new(|cause| panic!("{cause}")));
    let (begun, begins) = std::sync::mpsc::channel();
    let (may_end, ends) = std::sync::mpsc::channel();
    let mut b = bench_on(place, |inner| Box::new(Slow { inner, begun, may_end: ends }));
    b.header(0, 0);
    for _ in 0..5 {
        b.driver.send(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    }
    b.driver.ring_doorbell();
    begins.recv_timeout(std::time::Duration::from_secs(20)).expect("the first request begins");
    let leaving = match &b.blk.lanes[0].state {
        State::Active(worker) => worker.leaving().unwrap(),
        _ => panic!("it serves"),
    };
    let queues = std::thread::scope(|scope| {
        let taken = scope.spawn(|| b.blk.deactivate());
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while !leaving.is_set() {
            assert!(std::time::Instant::now() < deadline, "waited for the queue to be asked for");
            std::thread::yield_now();
        }
        may_end.send(()).unwrap();
        taken.join().unwrap()
    });
    assert_eq!(begins.try_iter().count(), 0, "the others were not begun");
    assert_eq!(std::iter::from_fn(|| b.driver.take_used()).count(), 1);
    // And they are served when it has its queue again.
    (0..4).for_each(|_| may_end.send(()).unwrap());
    let memory = b.driver.memory.clone();
    b.blk.activate(Activation { features: FLUSH, memory, queues, signals: b.signals.clone() }).unwrap();
    (0..4).for_each(|_| assert_eq!(b.driver.wait_used().1, 513));
    b.blk.deactivate();
}

#[test]
fn a_wake_up_ends_after_its_share_of_bytes() {
    let mut b = bench();
    b.header(0, 0);
    // 512 KiB each, from the same sectors into the same place.
    let chain = [(HEADER, 16, 0), (DATA, 0x8_0000, WRITE), (STATUS, 1, WRITE)];
    for _ in 0..5 {
        b.driver.send(&chain);
    }
    let served = |b: &mut Bench| {
        b.blk.process_queue();
        std::iter::from_fn(|| b.driver.take_used()).count()
    };
    assert_eq!(served(&mut b), 4, "2 MiB");
    assert_eq!(served(&mut b), 1);
}
