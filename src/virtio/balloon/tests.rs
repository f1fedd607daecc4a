#![forbid(unsafe_code)]
//! A balloon and a driver that knows its queues.

use std::time::Instant;

use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::events::{EventKind, EventStream};
use crate::memory::{HUGE, Memory};
use crate::units::Bytes;
use crate::virtio::Signals;
use crate::virtio::queue_driver::{Dice, Driver, WRITE, activation, bend, signals};

const SIZE: u64 = 64 << 20;
const ALL: u64 = MUST_TELL_HOST | STATS_VQ | FREE_PAGE_HINT | PAGE_POISON | PAGE_REPORTING;
/// Where the requests are: nothing else is below 2 MiB but rings.
const REQUEST: u64 = 0x10_0000;

struct Bench {
    drivers: Vec<Driver>,
    balloon: Balloon,
    control: Arc<Control>,
    signals: Signals,
    stream: EventStream,
    memory: Memory,
}

/// A driver with those features, and the queues that they ask for, by the specification's numbers.
fn bench(features: u64) -> Bench {
    bench_on(Memory::new(SIZE).unwrap(), features)
}

fn bench_on(memory: Memory, features: u64) -> Bench {
    for page in 1 << 9..SIZE / PAGE {
        memory.write_obj(1u8, GuestAddress(page * PAGE)).unwrap();
    }
    memory.write_slice(&[0; 4096], GuestAddress(REQUEST)).unwrap();
    let drivers: Vec<_> = (0..5).map(|i| Driver::new(&memory, 0x1_0000 + 0x4000 * i, 16)).collect();
    let (signals, stream) = signals("balloon0");
    let control = Arc::new(Control::new("balloon0", SIZE, signals.clone()).unwrap());
    let config = BalloonConfig { hinting: true, ..BalloonConfig::default() };
    let balloon = Balloon::new("balloon0", &config, control.clone(), Place::Caller);
    let mut bench = Bench { drivers, balloon, control, signals, stream, memory };
    bench.activate(features, |numbers| numbers);
    bench
}

impl Bench {
    fn activate(&mut self, features: u64, place: impl Fn(Vec<usize>) -> Vec<usize>) {
        let refs: Vec<_> = self.drivers.iter().collect();
        let mut activation = activation(features, &refs, &self.signals);
        let bits = [u64::MAX, u64::MAX, STATS_VQ, FREE_PAGE_HINT, PAGE_REPORTING];
        let has: Vec<_> = (0..5).filter(|i| features & bits[*i] != 0).collect();
        let mut queues: Vec<Option<Queue>> = (0..5).map(|_| None).collect();
        for (from, to) in has.iter().zip(place(has.clone())) {
            queues[to] = activation.queues[*from].take();
        }
        activation.queues = queues;
        self.balloon.activate(activation).unwrap();
    }

    /// Sends page numbers to a queue.
    fn send_pages(&mut self, queue: usize, pfns: impl IntoIterator<Item = u32>) {
        let bytes: Vec<u8> = pfns.into_iter().flat_map(u32::to_le_bytes).collect();
        self.memory.write_slice(&bytes, GuestAddress(REQUEST)).unwrap();
        self.drivers[queue].send(&[(REQUEST, bytes.len() as u32, 0)]);
        self.balloon.process_queues();
        assert!(self.drivers[queue].take_used().is_some(), "answered");
    }

    fn send_account(&mut self, numbers: &[(u16, u64)]) {
        let mut bytes = Vec::new();
        for (tag, value) in numbers {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        self.memory.write_slice(&bytes, GuestAddress(REQUEST)).unwrap();
        self.drivers[2].send(&[(REQUEST, bytes.len() as u32, 0)]);
        self.balloon.process_queues();
    }

    fn say_hint(&mut self, id: u32) {
        self.memory.write_obj(id.to_le(), GuestAddress(REQUEST)).unwrap();
        self.drivers[3].send(&[(REQUEST, 4, 0)]);
        self.balloon.process_queues();
    }

    fn hint(&mut self, start: u64, len: u32) {
        self.drivers[3].send(&[(start, len, WRITE)]);
        self.balloon.process_queues();
    }

    fn backing(&self) -> u64 {
        use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
        let files = self.memory.iter().filter_map(|region| region.file_offset());
        files.map(|f| crate::sys::residency::occupied(f.file()).unwrap()).sum()
    }

    fn config(&self) -> [u32; 4] {
        let mut bytes = [0; 16];
        self.balloon.read_config(0, &mut bytes);
        std::array::from_fn(|i| u32::from_le_bytes(bytes[4 * i..][..4].try_into().unwrap()))
    }
}

fn pfns(start: u64, count: u32) -> impl Iterator<Item = u32> {
    let first = (start / PAGE) as u32;
    first..first + count
}

#[test]
fn what_is_inflated_is_free_and_both_sides_are_counted() {
    let mut bench = bench(ALL);
    let before = bench.backing();
    for piece in 0..8 {
        bench.send_pages(0, pfns((8 << 20) + (piece << 20), 256));
    }
    assert_eq!(bench.backing(), before - (8 << 20));
    let statistics = bench.control.statistics();
    let given = GivenBack { claimed: Bytes(8 << 20), measured: Bytes(8 << 20) };
    assert_eq!((statistics.inflated, statistics.deflated, statistics.ignored), (given, Bytes(0), 0));
    bench.send_pages(0, pfns(8 << 20, 256));
    bench.send_pages(1, pfns(8 << 20, 256));
    let statistics = bench.control.statistics();
    assert_eq!(statistics.inflated.claimed, Bytes(9 << 20), "what it claims twice is counted twice");
    assert_eq!((statistics.inflated.measured, statistics.deflated), (Bytes(8 << 20), Bytes(1 << 20)));
}

#[test]
fn what_is_held_is_given_back_before_the_driver_has_it_again_and_at_the_end() {
    let mut bench = bench(ALL);
    let before = bench.backing();
    bench.send_pages(0, pfns(8 << 20, 16));
    assert_eq!(bench.backing(), before, "held for its neighbours");
    bench.send_pages(1, pfns(8 << 20, 1));
    assert_eq!(bench.backing(), before - 16 * PAGE);
    // From here on the page is the guest's, and stays.
    bench.memory.write_obj(9u8, GuestAddress(8 << 20)).unwrap();
    bench.send_pages(0, pfns(16 << 20, 16));
    let queues = bench.balloon.deactivate();
    assert!(queues.iter().all(Option::is_some));
    assert_eq!(bench.backing(), before - 31 * PAGE);
    assert_eq!(bench.memory.read_obj::<u8>(GuestAddress(8 << 20)).unwrap(), 9);
}

#[test]
fn of_the_pool_a_page_goes_when_all_of_it_is_in_the_balloon_whatever_comes_between() {
    const HALF: u32 = 256;
    let mut bench = bench_on(Memory::as_pooled(SIZE, HUGE).unwrap(), ALL);
    let before = bench.backing();
    let at = |number: u64, page: u32| pfns(number * HUGE + u64::from(page) * PAGE, HALF);
    // Its upper half comes first, and then a part of another one, a page that is taken back, and a pause.
    bench.send_pages(0, at(4, HALF));
    bench.send_pages(0, at(5, 0).step_by(2));
    bench.send_pages(0, pfns(6 * HUGE, 1));
    bench.send_pages(1, pfns(6 * HUGE, 1));
    bench.balloon.deactivate();
    bench.drivers = (0..5).map(|i| Driver::new(&bench.memory, 0x1_0000 + 0x4000 * i, 16)).collect();
    bench.activate(ALL, |numbers| numbers);
    assert_eq!(bench.backing(), before);
    bench.send_pages(0, at(4, 0));
    assert_eq!(bench.backing(), before - HUGE, "the two halves are a page");
    bench.send_pages(0, at(5, 0).skip(1).step_by(2));
    bench.send_pages(0, at(5, HALF).collect::<Vec<_>>().into_iter().rev());
    assert_eq!(bench.backing(), before - 2 * HUGE);
    assert_eq!(bench.control.statistics().inflated.measured, Bytes(2 * HUGE));
    // Who takes a page of it back has all of it there, and who gives that again has it gone.
    bench.send_pages(1, pfns(4 * HUGE + 7 * PAGE, 1));
    assert_eq!(bench.backing(), before - HUGE);
    bench.send_pages(0, pfns(4 * HUGE + 7 * PAGE, 1));
    assert_eq!(bench.backing(), before - 2 * HUGE);
}

/// Who does not say before it uses pages again would miss them.
#[test]
fn of_the_pool_a_driver_that_does_not_tell_first_keeps_all() {
    let mut bench = bench_on(Memory::as_pooled(SIZE, HUGE).unwrap(), ALL & !MUST_TELL_HOST);
    let before = bench.backing();
    bench.send_pages(0, pfns(4 * HUGE, 512));
    bench.balloon.deactivate();
    assert_eq!(bench.backing(), before);
    let given = GivenBack { claimed: Bytes(HUGE), measured: Bytes(0) };
    assert_eq!(bench.control.statistics().inflated, given);
}

#[test]
fn of_the_pool_nonsense_is_ignored_and_counted() {
    let mut bench = bench_on(Memory::as_pooled(SIZE, HUGE).unwrap(), ALL);
    let before = bench.backing();
    let outside = [u32::MAX, 0xc_0000, 0xf_ffff, (SIZE / PAGE) as u32];
    bench.send_pages(0, outside);
    bench.send_pages(1, outside);
    // Taken back without having been given; the same one again and again, and with all others but one.
    bench.send_pages(1, pfns(4 * HUGE, 2));
    bench.send_pages(0, std::iter::repeat_n((4 * HUGE / PAGE) as u32, 512));
    bench.send_pages(0, pfns(4 * HUGE, 511));
    assert_eq!((bench.backing(), bench.control.statistics().ignored), (before, 8));
    // The last page that there is.
    bench.send_pages(0, pfns(SIZE - HUGE, 512));
    assert_eq!(bench.backing(), before - HUGE);
    bench.send_pages(1, pfns(SIZE - PAGE, 1));
    assert_eq!(bench.backing(), before);
}

/// A kernel that another one has started (kexec) uses what that had in its balloon, and begins with a reset, when its driver comes.
#[test]
fn of_the_pool_what_is_used_is_not_cleared() {
    let mut bench = bench_on(Memory::as_pooled(SIZE, HUGE).unwrap(), ALL);
    bench.send_pages(0, pfns(4 * HUGE, 300));
    let used = GuestAddress(4 * HUGE + 5 * PAGE);
    bench.memory.write_obj(9u8, used).unwrap();
    bench.send_pages(1, pfns(6 * HUGE, 1));
    bench.balloon.deactivate();
    bench.balloon.reset();
    assert_eq!(bench.memory.read_obj::<u8>(used).unwrap(), 9);
    // What the driver before had in it counts no more.
    bench.drivers = (0..5).map(|i| Driver::new(&bench.memory, 0x1_0000 + 0x4000 * i, 16)).collect();
    bench.activate(ALL, |numbers| numbers);
    let before = bench.backing();
    bench.send_pages(0, pfns(4 * HUGE + 300 * PAGE, 212));
    assert_eq!(bench.memory.read_obj::<u8>(used).unwrap(), 9);
    bench.send_pages(0, pfns(4 * HUGE, 300));
    assert_eq!(bench.backing(), before - HUGE);
}

#[test]
fn a_driver_that_does_not_tell_first_has_nothing_held() {
    let mut bench = bench(ALL & !MUST_TELL_HOST);
    let before = bench.backing();
    bench.send_pages(0, pfns(8 << 20, 16));
    assert_eq!(bench.backing(), before - 16 * PAGE);
}

#[test]
fn the_target_is_read_and_its_arrival_told_once() {
    let mut bench = bench(ALL);
    let generation = bench.signals.config_generation();
    bench.control.set_target(Bytes((10 << 20) + 1)).unwrap();
    assert_eq!((bench.config()[0], bench.signals.take_isr()), (2560, 2));
    assert_ne!(bench.signals.config_generation(), generation);
    let error = bench.control.set_target(Bytes(SIZE + 1)).unwrap_err();
    assert!(error.to_string().contains("at most the VM's memory"), "{error}");
    let say = |bench: &mut Bench, pages: u32| bench.balloon.write_config(ACTUAL, &pages.to_le_bytes());
    for pages in [1000, 2560, 2560] {
        say(&mut bench, pages);
    }
    let (target, actual) = (Bytes(10 << 20), Bytes(10 << 20));
    assert_eq!(bench.stream.next_event().unwrap().kind, EventKind::Balloon { target, actual });
    assert_eq!(bench.stream.next_event(), None);
    say(&mut bench, 2000);
    let actual = Bytes(2000 * PAGE);
    assert_eq!(bench.stream.next_event().unwrap().kind, EventKind::Balloon { target, actual }, "by itself");
    say(&mut bench, 1900);
    assert_eq!(bench.stream.next_event(), None, "at most once a second");
    say(&mut bench, u32::MAX);
    assert_eq!(bench.control.actual(), Bytes(SIZE), "a lie has its limits");
    bench.balloon.deactivate();
    bench.balloon.reset();
    assert_eq!(
        (bench.control.actual(), bench.config()[0]),
        (Bytes(0), 2560),
        "asked of the next driver, too"
    );
}

#[test]
fn an_account_comes_when_it_is_asked_for() {
    let mut bench = bench(ALL);
    bench.send_account(&[(4, 1 << 20), (5, 60 << 20), (99, 1)]);
    bench.balloon.write_config(ACTUAL, &100u32.to_le_bytes());
    assert_eq!(bench.control.idle(), (1 << 20) - 100 * PAGE, "less what it has given up since");
    let first = bench.control.last_guest_memory().unwrap();
    assert_eq!(
        (first.free, first.total, first.available),
        (Some(Bytes(1 << 20)), Some(Bytes(60 << 20)), None)
    );
    assert_eq!(bench.drivers[2].take_used(), None, "kept");
    bench.control.ask();
    bench.balloon.process_queues();
    assert!(bench.drivers[2].take_used().is_some(), "given back for another one");
    let late = bench.control.guest_memory(Instant::now()).unwrap_err();
    assert_eq!(late.kind(), ErrorKind::TimedOut);
    let control = bench.control.clone();
    let waiter =
        std::thread::spawn(move || control.guest_memory(Instant::now() + std::time::Duration::from_secs(30)));
    while bench.control.asked() != Some(3) {
        std::thread::yield_now();
    }
    // This one was asked for before; only the next is new enough for whoever waits.
    bench.send_account(&[(4, 2 << 20)]);
    assert!(!waiter.is_finished() && bench.drivers[2].take_used().is_some());
    bench.send_account(&[(4, 3 << 20), (10, 7)]);
    let account = waiter.join().unwrap().unwrap();
    assert_eq!((account.free, account.oom_kills, account.total), (Some(Bytes(3 << 20)), Some(7), None));
}

#[test]
fn an_account_is_kept_over_a_pause() {
    let mut bench = bench(ALL);
    bench.send_account(&[(4, 1)]);
    let mut queues = bench.balloon.deactivate();
    let mut activation = activation(ALL, &[&bench.drivers[0]], &bench.signals);
    activation.queues = std::mem::take(&mut queues);
    bench.balloon.activate(activation).unwrap();
    bench.control.ask();
    bench.balloon.process_queues();
    assert!(bench.drivers[2].take_used().is_some());
    assert_eq!(bench.signals.status(), 0);
}

#[test]
fn reports_are_given_back_unless_they_read_as_something_else() {
    let mut bench = bench(ALL);
    let before = bench.backing();
    bench.drivers[4].send(&[(8 << 20, 4 << 20, WRITE), (32 << 20, 2 << 20, WRITE)]);
    bench.balloon.process_queues();
    assert!(bench.drivers[4].take_used().is_some());
    assert_eq!(bench.backing(), before - (6 << 20));
    let given = GivenBack { claimed: Bytes(6 << 20), measured: Bytes(6 << 20) };
    assert_eq!(bench.control.statistics().reported, given);
    bench.balloon.write_config(POISON_VAL, &0xaau32.to_le_bytes());
    bench.drivers[4].send(&[(16 << 20, 2 << 20, WRITE)]);
    bench.balloon.process_queues();
    assert!(bench.drivers[4].take_used().is_some());
    assert_eq!((bench.control.statistics().reported, bench.config()[3]), (given, 0xaa));
    // Row 16 of the hostile inputs.
    bench.balloon.write_config(POISON_VAL, &[0; 4]);
    let bad =
        [(1, 4096, WRITE), (0, u32::MAX, WRITE), (SIZE - 4096, 8192, WRITE), (0xf000_0000, 4096, WRITE)];
    bench.drivers[4].send(&bad);
    bench.balloon.process_queues();
    assert!(bench.drivers[4].take_used().is_some());
    assert_eq!((bench.control.statistics().reported, bench.control.statistics().ignored), (given, 4));
}

#[test]
fn hints_are_taken_for_the_request_that_is_waited_for_alone() {
    let mut bench = bench(ALL);
    let control = bench.control.clone();
    let ask =
        move |seconds| control.discard_free_pages(Instant::now() + std::time::Duration::from_secs(seconds));
    bench.hint(8 << 20, 4 << 20);
    assert_eq!(bench.control.statistics().hinted, GivenBack::default(), "nobody has asked");
    let waiter = std::thread::spawn({
        let ask = ask.clone();
        move || ask(30)
    });
    while bench.config()[2] < 2 {
        std::thread::yield_now();
    }
    let id = bench.config()[2];
    assert_eq!(ask(1).unwrap_err().kind(), ErrorKind::Busy);
    bench.say_hint(id + 1);
    bench.hint(8 << 20, 4 << 20);
    assert_eq!(bench.control.statistics().hinted.claimed, Bytes(0), "another request's");
    bench.say_hint(id);
    bench.hint(8 << 20, 4 << 20);
    bench.hint(12 << 20, 4 << 20);
    bench.say_hint(0);
    assert_eq!(waiter.join().unwrap().unwrap(), Bytes(8 << 20));
    assert_eq!(bench.config()[2], 1, "the driver may use its pages again");
    bench.hint(16 << 20, 4 << 20);
    assert_eq!(bench.control.statistics().hinted.claimed, Bytes(8 << 20));
    // Nobody waits any more: the worker, and nobody else, says so to the driver.
    assert_eq!(ask(0).unwrap_err().kind(), ErrorKind::TimedOut);
    let id = bench.config()[2];
    assert_eq!(id, 3);
    bench.say_hint(id);
    bench.hint(20 << 20, 4 << 20);
    assert_eq!((bench.config()[2], bench.control.statistics().hinted.claimed), (1, Bytes(8 << 20)));
}

#[test]
fn queues_are_found_with_gaps_and_without() {
    let features = ALL & !STATS_VQ & !FREE_PAGE_HINT;
    for place in [|n: Vec<usize>| n, |n: Vec<usize>| (0..n.len()).collect()] {
        let mut bench = bench(features);
        bench.balloon.deactivate();
        bench.activate(features, place);
        bench.drivers[4].send(&[(8 << 20, HUGE as u32, WRITE)]);
        bench.balloon.process_queues();
        assert_eq!(bench.control.statistics().reported.measured, Bytes(HUGE));
        let queues = bench.balloon.deactivate();
        assert_eq!(queues.iter().flatten().count(), 3);
    }
    let mut bench = bench(features);
    let error = bench.control.guest_memory(Instant::now()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    bench.balloon.deactivate();
    let none = Activation {
        queues: (0..5).map(|_| None).collect(),
        ..activation(0, &[&bench.drivers[0]], &bench.signals)
    };
    assert!(bench.balloon.activate(none).unwrap_err().to_string().contains("inflate"));
}

#[test]
fn bent_rings_never_stop_the_process_and_a_reset_always_helps() {
    let mut bench = bench(ALL);
    let mut dice = Dice(5);
    for round in 0..2000 {
        let queue = dice.below(5) as usize;
        bend(&mut bench.drivers[queue], &mut dice);
        if round % 50 == 0 {
            bench.control.ask();
        }
        bench.balloon.process_queues();
        if bench.signals.status() != 0 {
            bench.balloon.deactivate();
            bench.balloon.reset();
            bench.signals.set_status(0);
            bench.drivers.iter_mut().for_each(Driver::reset);
            bench.activate(ALL, |numbers| numbers);
            bench.send_pages(0, [4000]);
        }
    }
    let statistics = bench.control.statistics();
    assert!(statistics.ignored > 0 && statistics.inflated.claimed.get() > 0);
}
