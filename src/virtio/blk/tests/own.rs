#![forbid(unsafe_code)]
//! A disk of the embedder's behind the device.

use std::sync::Mutex;
use std::time::Duration;

use super::*;
use crate::block::{BlockBackend, BlockRequest, OwnDisk};

/// A disk in memory that keeps each request until it is told to do it.
#[derive(Clone, Default)]
struct Held(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    requests: Vec<BlockRequest>,
    bytes: Vec<u8>,
}

impl BlockBackend for Held {
    fn size(&self) -> u64 {
        SIZE
    }

    fn submit(&mut self, request: BlockRequest) {
        lock(&self.0).requests.push(request);
    }
}

impl Held {
    fn count(&self) -> usize {
        lock(&self.0).requests.len()
    }

    /// Does the request that came `n`th of those that are left; whether anybody heard of it.
    fn end(&self, n: usize) -> bool {
        let State { requests, bytes } = &mut *lock(&self.0);
        let mut request = requests.remove(n);
        bytes.resize(SIZE as usize, 0);
        let at = request.offset() as usize;
        let place = at..at + request.len() as usize;
        match request.op() {
            BlockOp::Read => assert_eq!(request.copy_from(0, &bytes[place.clone()]), place.len()),
            BlockOp::Write { .. } => assert_eq!(request.copy_to(0, &mut bytes[place.clone()]), place.len()),
            _ => assert!(place.is_empty()),
        }
        request.complete(Ok(()))
    }
}

fn bench_of(place: Place) -> (Bench, Held) {
    let held = Held::default();
    let own = held.clone();
    (bench_on(place, |_| Box::new(OwnDisk::new("disk0", Box::new(own), false).unwrap())), held)
}

fn on_a_loop() -> (Bench, Held) {
    let event_loop = EventLoop::start("test", |f| Ok(std::thread::spawn(f))).unwrap();
    bench_of(Place::Loop(event_loop, StopLine::new(|cause| panic!("{cause}"))))
}

fn wait_for(held: &Held, count: usize) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while held.count() != count {
        assert!(Instant::now() < deadline, "waited for {count} requests, and there are {}", held.count());
        std::thread::yield_now();
    }
}

#[test]
fn requests_end_in_any_order_from_any_thread() {
    let (mut b, held) = on_a_loop();
    b.header(1, 3);
    b.driver.memory.write_slice(&[7; 512], GuestAddress(DATA)).unwrap();
    b.driver.send(&[(HEADER, 16, 0), (DATA, 512, 0), (STATUS, 1, WRITE)]);
    b.driver.ring_doorbell();
    wait_for(&held, 1);
    assert!(held.end(0));
    b.driver.wait_used();
    // Three reads of different places into different memory.
    let mut heads = Vec::new();
    for i in 0..3 {
        let header = HEADER + 32 * i;
        b.driver.memory.write_obj(0u64, GuestAddress(header)).unwrap();
        b.driver.memory.write_obj(2 + i, GuestAddress(header + 8)).unwrap();
        let data = DATA + 0x1000 * i;
        heads.push(b.driver.send(&[
            (header, 16, 0),
            (data, 200, WRITE),
            (data + 200, 312, WRITE),
            (STATUS + i, 1, WRITE),
        ]));
    }
    b.driver.ring_doorbell();
    wait_for(&held, 3);
    let own = held.clone();
    std::thread::spawn(move || [2, 0, 0].map(|n| assert!(own.end(n)))).join().unwrap();
    let used: Vec<_> = (0..3).map(|_| b.driver.wait_used()).collect();
    assert_eq!(used, [(heads[2], 513), (heads[0], 513), (heads[1], 513)]);
    let read = |at| b.driver.memory.read_obj::<[u8; 2]>(GuestAddress(at)).unwrap();
    assert_eq!((read(DATA), read(DATA + 0x1000 + 199), read(DATA + 0x2000)), ([0; 2], [7; 2], [0; 2]));
    let counted = b.blk.control.statistics();
    assert_eq!((counted.reads, counted.read_bytes, counted.writes, counted.errors), (3, 1536, 1, 0));
    b.blk.deactivate();
}

/// What a pause does: the device finishes what it has begun and nothing else, or goes on as it was.
#[test]
fn draining_ends_with_the_last_answer_or_not_at_all() {
    let (mut b, held) = on_a_loop();
    b.header(0, 0);
    b.driver.send(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    b.driver.ring_doorbell();
    wait_for(&held, 1);
    assert!(!b.blk.drain(Instant::now() + Duration::from_millis(20)), "nobody answers");
    // It goes on: another request is begun, and both are answered.
    b.driver.send(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    b.driver.ring_doorbell();
    wait_for(&held, 2);
    held.end(0);
    b.driver.wait_used();
    let own = held.clone();
    let later = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(30));
        assert!(own.end(0));
    });
    assert!(b.blk.drain(Instant::now() + Duration::from_secs(20)));
    later.join().unwrap();
    // What comes now waits for the one who gets the queue next.
    b.driver.send(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    b.driver.ring_doorbell();
    let queues = b.blk.deactivate();
    assert_eq!((held.count(), b.driver.take_used().map(|(_, written)| written)), (0, Some(513)));
    let memory = b.driver.memory.clone();
    b.blk.activate(Activation { features: FLUSH, memory, queues, signals: b.signals.clone() }).unwrap();
    wait_for(&held, 1);
    held.end(0);
    b.driver.wait_used();
    b.blk.deactivate();
}

#[test]
fn a_reset_waits_for_an_answer_as_long_as_the_vm_lives() {
    let event_loop = EventLoop::start("test", |f| Ok(std::thread::spawn(f))).unwrap();
    let stop = StopLine::new(|_| ());
    let (mut b, held) = bench_of(Place::Loop(event_loop, stop.clone()));
    let send = |b: &mut Bench| {
        b.header(0, 0);
        b.driver.send(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
        b.driver.ring_doorbell();
    };
    send(&mut b);
    wait_for(&held, 1);
    let begun = Instant::now();
    let own = held.clone();
    let later = std::thread::spawn(move || {
        std::thread::sleep(2 * Duration::from_millis(200));
        assert!(own.end(0), "longer than the end would wait");
    });
    b.blk.deactivate();
    assert!(begun.elapsed() >= 2 * Duration::from_millis(200));
    later.join().unwrap();
    b.driver.reset();
    b.blk.activate(activation(FLUSH, &[&b.driver], &b.signals)).unwrap();
    send(&mut b);
    wait_for(&held, 1);
    stop.pull(crate::events::StopCause::HostStop);
    b.blk.deactivate();
    let event = b.events.next_event().unwrap().kind;
    assert!(matches!(&event, EventKind::BackendError { errno: libc::ETIMEDOUT, .. }), "{event:?}");
    assert!(!held.end(0), "it comes too late");
    // The tag is the next request's by now.
    b.driver.reset();
    b.blk.activate(activation(FLUSH, &[&b.driver], &b.signals)).unwrap();
    send(&mut b);
    wait_for(&held, 1);
    assert!(held.end(0));
    assert_eq!(b.driver.wait_used().1, 513);
    b.blk.deactivate();
}

#[test]
fn a_failure_is_the_guests_io_error_and_the_embedders_event() {
    let (mut b, held) = bench_of(Place::Caller);
    b.header(0, 2);
    b.driver.send(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    b.driver.send(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS + 1, 1, WRITE)]);
    b.blk.process_queue();
    let request = lock(&held.0).requests.remove(0);
    assert!(request.complete(Err(std::io::Error::from_raw_os_error(libc::ENOSPC))));
    lock(&held.0).requests.clear();
    b.blk.process_queue();
    let status = |at| b.driver.memory.read_obj::<u8>(GuestAddress(at)).unwrap();
    assert_eq!((status(STATUS), status(STATUS + 1)), (1, 1));
    let mut errors = Vec::new();
    while let Some(event) = b.events.next_event() {
        if let EventKind::BackendError { errno, offset, .. } = event.kind {
            errors.push((errno, offset));
        }
    }
    assert_eq!(errors, [(libc::ENOSPC, 1024), (libc::EIO, 1024)]);
    assert_eq!(b.blk.control.statistics().errors, 2);
}

#[test]
fn a_panic_in_it_stops_the_vm_and_fails_the_request() {
    struct Panics;
    impl BlockBackend for Panics {
        fn size(&self) -> u64 {
            SIZE
        }
        fn submit(&mut self, _: BlockRequest) {
            panic!("an embedder's mistake")
        }
    }
    let (told, causes) = std::sync::mpsc::channel();
    let event_loop = EventLoop::start("test", |f| Ok(std::thread::spawn(f))).unwrap();
    let place = Place::Loop(event_loop, StopLine::new(move |cause| told.send(cause).unwrap()));
    let mut b = bench_on(place, |_| Box::new(OwnDisk::new("disk0", Box::new(Panics), false).unwrap()));
    b.header(0, 0);
    b.driver.send(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    b.driver.ring_doorbell();
    let cause = causes.recv_timeout(Duration::from_secs(20)).expect("the stop line is pulled").to_string();
    assert!(cause.contains("disk0") && cause.contains("an embedder's mistake"), "{cause}");
    b.blk.deactivate();
}
