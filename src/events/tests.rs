#![forbid(unsafe_code)]
//! Streams of events, and what is held back of them.

use super::*;

fn stream() -> (EventStream, Reporter) {
    let stream = EventStream::new().unwrap();
    (stream.clone(), Reporter::new(VmId(7), stream))
}

fn readable(stream: &EventStream) -> bool {
    crate::sys::fd::is_readable(stream.as_fd())
}

#[test]
fn the_fd_is_readable_exactly_while_events_wait() {
    let (stream, reporter) = stream();
    assert!(!readable(&stream));
    reporter.report(EventKind::Started);
    reporter.report(EventKind::Paused);
    assert!(readable(&stream));
    assert_eq!(stream.next_event().unwrap().kind, EventKind::Started);
    assert!(readable(&stream));
    assert_eq!(stream.next_event().unwrap().seq, 1);
    assert!(!readable(&stream));
    assert_eq!(stream.next_event(), None);
}

#[test]
fn repeats_fold_overflow_is_counted_and_stopped_is_never_lost() {
    let (stream, reporter) = stream();
    let flood = 10_000;
    for _ in 0..flood {
        reporter.report(EventKind::Paused);
    }
    let reset = EventKind::DeviceNeedsReset { device: "disk0".into(), why: "avail ring".into() };
    reporter.report(reset.clone());
    reporter.report(EventKind::Stopped(StopCause::HostStop));
    let all: Vec<_> = std::iter::from_fn(|| stream.next_event()).collect();
    assert_eq!(all.len(), CAPACITY + 2);
    assert_eq!(all[CAPACITY].kind, EventKind::Lost { events: (flood - CAPACITY + 1) as u64 });
    assert_eq!(all[CAPACITY + 1].kind, EventKind::Stopped(StopCause::HostStop));
    assert!(all.iter().enumerate().all(|(i, e)| e.seq == i as u64));

    reporter.report(reset.clone());
    reporter.report(reset);
    assert_eq!(stream.next_event().unwrap().count, 2);
    assert_eq!(stream.next_event(), None);
}

#[test]
fn a_doorbell_that_rings_too_often_takes_nobody_s_place() {
    let (stream, reporter) = stream();
    let ring = |device: &str, value| {
        reporter.report(EventKind::Doorbell { device: device.into(), offset: 0, value });
    };
    (0..10_000).for_each(|value| ring("one", value));
    ring("two", 7);
    reporter.report(EventKind::Paused);
    ring("one", 10_000);
    let all: Vec<_> = std::iter::from_fn(|| stream.next_event()).collect();
    let told: Vec<_> = all.iter().map(|e| (e.kind.clone(), e.count)).collect();
    let doorbell = |device: &str, value| EventKind::Doorbell { device: device.into(), offset: 0, value };
    assert_eq!(told, [(doorbell("one", 10_000), 10_001), (doorbell("two", 7), 1), (EventKind::Paused, 1)]);
    ring("one", 1);
    assert_eq!(stream.next_event().unwrap().count, 1, "what was read takes nothing in");
}

#[test]
fn a_device_that_is_broken_in_ever_new_ways_is_one_event() {
    let (stream, reporter) = stream();
    let mut device = reporter.device("disk0");
    (0..1000).for_each(|i| device.needs_reset(format_args!("descriptor {i} is out of range")));
    reporter.device("net0").needs_reset("its ring is gone");
    let all: Vec<_> = std::iter::from_fn(|| stream.next_event()).map(|e| (e.kind, e.count)).collect();
    let kind =
        |device: &str, why: &str| EventKind::DeviceNeedsReset { device: device.into(), why: why.into() };
    let last = kind("disk0", "descriptor 63 is out of range");
    assert_eq!(all, [(last, 64), (kind("net0", "its ring is gone"), 1)]);
    // The others are told of in the next second's first.
    device.resets.since = device.resets.since.map(|since| since - ERROR_INTERVAL);
    device.needs_reset("again");
    assert_eq!(stream.next_event().unwrap().count, 1000 - 64 + 1);
}

#[test]
fn one_vm_leaves_room_for_the_others_of_its_stream() {
    let stream = EventStream::new().unwrap();
    let (loud, quiet) = (Reporter::new(VmId(1), stream.clone()), Reporter::new(VmId(2), stream.clone()));
    (0..10_000).for_each(|_| loud.report(EventKind::Paused));
    (0..10).for_each(|_| quiet.report(EventKind::Resumed));
    loud.report(EventKind::Stopped(StopCause::HostStop));
    let all: Vec<_> = std::iter::from_fn(|| stream.next_event()).collect();
    let of = |vm, kind: &EventKind| all.iter().filter(|e| e.vm == VmId(vm) && e.kind == *kind).count();
    assert_eq!(of(2, &EventKind::Resumed), 10);
    assert_eq!(of(1, &EventKind::Stopped(StopCause::HostStop)), 1);
    let lost: u64 =
        all.iter().map(|e| if let EventKind::Lost { events } = e.kind { events } else { 0 }).sum();
    assert_eq!(of(1, &EventKind::Paused) as u64 + lost, 10_000, "and what is lost is counted");
    assert!(all.windows(2).all(|pair| pair[1].seq == pair[0].seq + 1));
}

#[test]
fn two_errors_that_take_turns_are_each_held_to_one_a_second() {
    let (stream, reporter) = stream();
    let mut disk = reporter.device("disk0");
    (0..500u64).for_each(|i| disk.backend_error(if i % 2 == 0 { 5 } else { 28 }, i));
    let all: Vec<_> = std::iter::from_fn(|| stream.next_event()).collect();
    assert_eq!(all.iter().map(|e| e.count).collect::<Vec<_>>(), [1, 1]);
    // Each tells, when its time has come, of its own.
    disk.errors.iter_mut().for_each(|told| told.at -= ERROR_INTERVAL);
    disk.backend_error(28, 0);
    assert_eq!(stream.next_event().unwrap().count, 250);
    disk.backend_error(5, 0);
    assert_eq!(stream.next_event().unwrap().count, 250);
}

#[test]
fn backend_errors_are_held_to_one_a_second() {
    let (stream, reporter) = stream();
    let mut disk = reporter.device("disk0");
    for offset in 0..100 {
        disk.backend_error(5, offset);
    }
    disk.backend_error(28, 0);
    assert_eq!(stream.next_event().unwrap().count, 1);
    let full = stream.next_event().unwrap();
    assert!(matches!(full.kind, EventKind::BackendError { errno: 28, .. }));
    assert_eq!(full.count, 1, "those that were held are not its own");
    assert_eq!(stream.next_event(), None);
    disk.errors.iter_mut().for_each(|told| told.at -= ERROR_INTERVAL);
    disk.backend_error(5, 0);
    assert_eq!(stream.next_event().unwrap().count, 100, "the 99 that were held are counted in the next one");
}

#[test]
fn waiting_ends_at_the_deadline_and_at_an_event() {
    let (stream, reporter) = stream();
    assert_eq!(stream.wait_event(Duration::from_millis(5)), None);
    let waiter = std::thread::spawn(move || stream.wait_event(Duration::MAX));
    reporter.report(EventKind::Started);
    assert_eq!(waiter.join().unwrap().unwrap().kind, EventKind::Started);
}
