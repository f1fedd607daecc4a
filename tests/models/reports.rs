//! The queue, its bell and its waiters in every order: nobody sleeps while an event waits, and nothing is lost in silence.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use loom::thread;

use crate::events::{Event, EventKind, EventStream, Reporter, StopCause, StopLine, VmId};
use crate::sys::sync::atomic::AtomicBool;
use crate::sys::sync::{Mutex, check, lock, poll};

crate::models! {
    whoever_sleeps_at_the_fd_is_woken_for_every_event,
    of_two_that_report_neither_is_overheard,
    whoever_waits_in_a_call_is_woken_and_two_readers_share,
    what_is_lost_is_told_of_and_the_end_is_not_lost,
    a_line_that_is_pulled_twice_is_pulled_for_all_to_see,
}

/// Never passes in a model.
const LONG: Duration = Duration::from_secs(3600);
/// More than a stream keeps.
const MANY: u64 = 260;

fn stream() -> (EventStream, Reporter) {
    let stream = EventStream::new().unwrap();
    (stream.clone(), Reporter::new(VmId(7), stream))
}

fn stopped() -> EventKind {
    EventKind::Stopped(StopCause::HostStop)
}

/// Reads as an embedder's loop does: sleeps until the fd is readable, then reads all there is. Until the end.
fn drain(stream: &EventStream) -> Vec<Event> {
    let mut read: Vec<Event> = Vec::new();
    while read.iter().all(|event| event.kind != stopped()) {
        poll(stream.as_fd());
        read.extend(std::iter::from_fn(|| stream.next_event()));
    }
    read
}

fn is_in_order(read: &[Event]) -> bool {
    read.iter().enumerate().all(|(at, event)| event.seq == at as u64)
}

fn whoever_sleeps_at_the_fd_is_woken_for_every_event() {
    check(3, || {
        let (stream, reporter) = stream();
        let vm = thread::spawn(move || {
            reporter.report(EventKind::Started);
            reporter.report(stopped());
        });
        let read = drain(&stream);
        assert_eq!((read.len(), is_in_order(&read)), (2, true));
        vm.join().unwrap();
        assert_eq!(stream.next_event(), None);
    });
}

fn of_two_that_report_neither_is_overheard() {
    check(2, || {
        let (stream, reporter) = stream();
        let device = reporter.clone();
        let worker = thread::spawn(move || device.report(EventKind::Started));
        let vm = thread::spawn(move || reporter.report(EventKind::Paused));
        let mut read = Vec::new();
        while read.len() < 2 {
            poll(stream.as_fd());
            read.extend(std::iter::from_fn(|| stream.next_event()));
        }
        assert!(is_in_order(&read));
        worker.join().unwrap();
        vm.join().unwrap();
    });
}

fn whoever_waits_in_a_call_is_woken_and_two_readers_share() {
    check(2, || {
        let (stream, reporter) = stream();
        let other = stream.clone();
        let reader = thread::spawn(move || other.wait_event(LONG));
        let vm = thread::spawn(move || {
            reporter.report(EventKind::Started);
            reporter.report(EventKind::Paused);
        });
        let mut seqs = [stream.wait_event(LONG), reader.join().unwrap()].map(|event| event.unwrap().seq);
        seqs.sort();
        assert_eq!(seqs, [0, 1]);
        vm.join().unwrap();
    });
}

fn what_is_lost_is_told_of_and_the_end_is_not_lost() {
    check(2, || {
        let (stream, reporter) = stream();
        (0..MANY).for_each(|_| reporter.report(EventKind::Started));
        let loud = reporter.clone();
        let device = thread::spawn(move || (0..2).for_each(|_| loud.report(EventKind::Paused)));
        let vm = thread::spawn(move || reporter.report(stopped()));
        let mut read = vec![stream.next_event().unwrap()];
        device.join().unwrap();
        vm.join().unwrap();
        poll(stream.as_fd());
        read.extend(std::iter::from_fn(|| stream.next_event()));
        assert!(is_in_order(&read));
        let count = |of: &dyn Fn(&EventKind) -> bool| read.iter().filter(|event| of(&event.kind)).count();
        let lost: u64 = read
            .iter()
            .map(|event| if let EventKind::Lost { events } = event.kind { events } else { 0 })
            .sum();
        assert_eq!(count(&|kind| *kind == stopped()), 1);
        let told = count(&|kind| *kind == EventKind::Started) + count(&|kind| *kind == EventKind::Paused);
        assert_eq!(told as u64 + lost, MANY + 2);
        assert!(lost >= 2, "there was no room");
    });
}

fn a_line_that_is_pulled_twice_is_pulled_for_all_to_see() {
    check(3, || {
        let pulled = Arc::new(AtomicBool::new(false));
        let causes = Arc::new(Mutex::new(Vec::new()));
        let line = |of: &Arc<Mutex<Vec<StopCause>>>| {
            let of = of.clone();
            StopLine::of(VmId(7), pulled.clone(), move |cause| lock(&of).push(cause))
        };
        let (guest, host) = (line(&causes), line(&causes));
        let threads = [
            thread::spawn(move || guest.pull(StopCause::GuestReset)),
            thread::spawn(move || host.pull(StopCause::HostStop)),
        ];
        // Who knows of a cause knows that the end is near.
        let seen = lock(&causes).len();
        assert!(seen == 0 || line(&causes).is_pulled());
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(lock(&causes).len(), 2);
    });
}
