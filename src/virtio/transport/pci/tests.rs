#![forbid(unsafe_code)]

use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::bus::Bus;
use crate::events::EventKind;
use crate::virtio::queue_driver::{Dice, Driver, WRITE};
use crate::virtio::testing::echo::{self, Echo};
use crate::virtio::testing::{
    ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, Machine, NEEDS_RESET, Registers, VERSION_1,
};

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(10)
}

const ALL_OK: u8 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;
const EVENT_IDX: u64 = 1 << 29;

/// An echo device in a machine, found by its driver, with rings for its two queues.
struct Setup {
    echo: Echo,
    machine: Arc<Machine>,
    driver: Registers,
    rings: [Driver; 2],
}

fn setup() -> Setup {
    let memory = Memory::new(1 << 20).unwrap();
    let echo = Echo::default();
    let machine = Machine::new(&memory, vec![echo.boxed()]);
    let driver = Registers::find(&machine, 1);
    let rings = [Driver::new(&memory, 0x1_0000, 16), Driver::new(&memory, 0x2_0000, 8)];
    Setup { echo, machine, driver, rings }
}

impl Setup {
    fn start(&self) {
        let [a, b] = &self.rings;
        self.driver.start(VERSION_1, &[a, b]);
        assert_eq!(self.driver.status(), ALL_OK);
    }

    /// Puts a request into queue `index`, without ringing.
    fn send(&mut self, index: usize) {
        self.machine.memory.write_slice(b"hello, echo!", GuestAddress(0x8000)).unwrap();
        self.machine.memory.write_slice(&[0; 12], GuestAddress(0x9000)).unwrap();
        self.rings[index].send(&[(0x8000, 12, 0), (0x9000, 12, WRITE)]);
    }

    /// Whether the answer to the last request is there.
    fn answered(&mut self, index: usize) -> bool {
        let answer: [u8; 12] = self.rings[index].bytes(0x9000);
        self.rings[index].take_used().is_some_and(|(_, len)| len == 12) && &answer == b"hello, echo!"
    }

    fn round(&mut self, index: usize) -> bool {
        self.send(index);
        self.driver.ring(index as u16);
        self.echo.process();
        self.answered(index)
    }

    /// Negotiates, with queue 0 as it was at first.
    fn fresh_queue(&self) {
        assert!(self.driver.negotiate(VERSION_1));
        assert_eq!(self.driver.get(0x18, 2), 16, "the largest size, as at first");
    }

    /// The driver's remedy for everything: a reset, then from the start with empty rings.
    fn reset(&mut self) {
        self.driver.set_status(0);
        self.rings.iter_mut().for_each(Driver::reset);
    }
}

#[test]
fn a_driver_finds_the_device_and_its_structures() {
    let Setup { machine, driver, .. } = setup();
    assert_eq!(machine.config(1, 0, 4), 0x1044_1af4);
    assert_eq!(machine.config(1, 8, 4), 0xff00_0001, "class and revision");
    assert_eq!(machine.config(1, 0x2c, 4), 0x0044_1af4);
    assert_eq!(machine.config(1, 0x3d, 1), 0, "no INTx");
    let places = [driver.common, driver.isr, driver.config, driver.notify, driver.table, driver.pending];
    let pages: Vec<_> = places.iter().map(|p| (p - driver.bar) / 0x1000).collect();
    assert_eq!(pages, [0, 1, 2, 3, 4, 5], "each part on a page of its own");
    assert_eq!(machine.config(1, driver.msix + 2, 2), 2, "a vector per queue and one more");
    assert_eq!((driver.get(0x12, 2), driver.notify_stride), (2, 4));
}

#[test]
fn requests_go_there_and_back() {
    for event_idx in [0, EVENT_IDX] {
        let mut s = setup();
        if event_idx != 0 {
            s.rings = s.rings.map(Driver::with_event_idx);
        }
        let [a, b] = &s.rings;
        s.driver.start(VERSION_1 | echo::FEATURE | event_idx, &[a, b]);
        assert_eq!(s.echo.features(), Some(VERSION_1 | echo::FEATURE | event_idx));
        for _ in 0..40 {
            for queue in [0, 1] {
                assert!(s.round(queue), "queue {queue}");
                assert_eq!(s.driver.raised(1 + queue as u16), 1, "its interrupt");
            }
        }
        assert_eq!(s.driver.raised(0), 0, "no configuration change");
    }
}

#[test]
fn a_doorbell_rings_the_same_the_long_way() {
    let mut s = setup();
    s.start();
    let bell = s.driver.doorbell(1);
    assert_eq!(s.machine.armed(), [s.driver.doorbell(0), bell]);
    for (len, at) in [(2, bell), (4, bell), (1, bell + 1), (8, bell - 4)] {
        s.send(usize::from(at >= bell));
        s.machine.mmio.write(at, 0, &[0; 8][..len]).unwrap();
        assert_eq!(s.echo.process(), 1, "{len} bytes at {at:#x}");
        assert!(s.answered(usize::from(at >= bell)));
    }
}

#[test]
fn features_are_refused_unless_they_were_offered_and_modern() {
    let s = setup();
    let offered = s.driver.offered();
    assert_eq!(offered, VERSION_1 | EVENT_IDX | 1 << 28 | echo::FEATURE);
    for bad in [0, echo::FEATURE, VERSION_1 | 1, VERSION_1 | 1 << 63, u64::MAX] {
        assert!(!s.driver.negotiate(bad), "{bad:#x}");
        s.driver.set_status(ALL_OK);
        assert_eq!(s.driver.status(), ACKNOWLEDGE | DRIVER, "no DRIVER_OK without FEATURES_OK");
        assert_eq!(s.echo.features(), None);
    }
    assert!(s.driver.negotiate(offered));
    s.driver.accept(VERSION_1);
    s.driver.set(0x08, 4, 0);
    assert_eq!(s.driver.get(0x0c, 4), offered & 0xffff_ffff, "settled with FEATURES_OK");
    s.driver.set(0x00, 4, 2);
    s.driver.set(0x08, 4, u32::MAX.into());
    s.driver.set(0x0c, 4, 1);
    assert_eq!((s.driver.get(0x04, 4), s.driver.get(0x0c, 4)), (0, 0), "there are 64 of them");
}

#[test]
fn status_bits_are_only_added() {
    let s = setup();
    s.driver.set_status(ACKNOWLEDGE);
    s.driver.set_status(DRIVER);
    assert_eq!(s.driver.status(), ACKNOWLEDGE | DRIVER);
    s.driver.set_status(NEEDS_RESET | 0x30);
    assert_eq!(s.driver.status(), ACKNOWLEDGE | DRIVER, "not the driver's to set");
    s.driver.set_status(0x80);
    s.driver.set_status(0);
    assert_eq!(s.driver.status(), 0);
    s.driver.set_status(DRIVER_OK);
    assert_eq!((s.driver.status(), s.echo.activations()), (0, 0));
}

/// Row 2 of the hostile inputs.
#[test]
fn queue_registers_are_settled_once_the_queue_is_enabled() {
    let mut s = setup();
    assert!(s.driver.negotiate(VERSION_1));
    s.driver.set_queue(0, &s.rings[0], 0);
    let registers = |s: &Setup| -> Vec<_> {
        [(0x18, 2), (0x1a, 2), (0x1c, 2), (0x20, 8), (0x28, 8), (0x30, 8)]
            .map(|(at, len)| s.driver.get(at, len))
            .into()
    };
    let rewrite = |s: &Setup| {
        for (at, len) in [(0x18, 2), (0x1a, 2), (0x1c, 2), (0x20, 4), (0x24, 4), (0x28, 8), (0x30, 8)] {
            s.driver.set(at, len, 0x0001_0000_0004);
        }
    };
    let mut before = registers(&s);
    rewrite(&s);
    // All but the vector, which a driver may choose after it enabled the queue.
    assert_eq!(s.driver.get(0x1a, 2), 0xffff, "there is no vector 4");
    before[1] = 0xffff;
    assert_eq!(registers(&s), before, "enabled");
    s.driver.set(0x1a, 2, 1);
    before[1] = 1;
    assert_eq!(registers(&s), before, "a vector for a queue that is enabled");
    s.driver.set_status(ALL_OK);
    rewrite(&s);
    assert_eq!(registers(&s), before, "after DRIVER_OK");
    // The other queue was not enabled in time, and now cannot be.
    s.driver.set_queue(1, &s.rings[1], 0);
    assert_eq!(s.driver.get(0x1c, 2), 0);
    assert!(s.round(0));
    assert!(!s.round(1));
}

/// Row 3.
#[test]
fn a_queue_that_is_not_there_reads_zero_and_takes_nothing() {
    let mut s = setup();
    assert!(s.driver.negotiate(VERSION_1));
    for queue in [2, 3, 0x7fff, 0xffff] {
        s.driver.set_queue(queue, &s.rings[0], 0);
        assert_eq!(s.driver.get(0x16, 2), u64::from(queue));
        for at in 0x18..0x38 {
            assert_eq!(s.driver.get(at, 1), 0, "{at:#x} of queue {queue}");
        }
    }
    let [a, b] = &s.rings;
    s.driver.start(VERSION_1, &[a, b]);
    assert!(s.round(0) && s.round(1));
}

/// Row 5.
#[test]
fn a_size_that_cannot_be_is_refused() {
    let s = setup();
    for size in [0, 3, 12, 15, 17, 32, 0x8000, 0xffff, 0x1_0000u64] {
        s.fresh_queue();
        s.driver.set(0x18, 2, size & 0xffff);
        s.driver.set(0x18, 4, size);
        assert_eq!(s.driver.get(0x18, 2), 0, "{size:#x}");
        s.driver.set(0x1c, 2, 1);
        assert_eq!(s.driver.get(0x1c, 2), 0, "{size:#x}");
    }
    for size in [1, 2, 4, 8, 16] {
        s.fresh_queue();
        s.driver.set(0x18, 2, size);
        s.driver.set(0x1c, 2, 2);
        assert_eq!((s.driver.get(0x18, 2), s.driver.get(0x1c, 2)), (size, 0), "only 1 enables");
        s.driver.set(0x1c, 2, 1);
        assert_eq!(s.driver.get(0x1c, 2), 1);
    }
}

/// Row 6.
#[test]
fn a_doorbell_without_a_queue_is_ignored() {
    let mut s = setup();
    let ring_all = |s: &Setup| {
        for offset in (8..0x1000).step_by(4) {
            s.machine.write(s.driver.notify + offset, 2, 0xffff);
        }
    };
    ring_all(&s);
    s.driver.ring(0);
    s.start();
    s.echo.process();
    ring_all(&s);
    assert_eq!(s.echo.process(), 0);
    assert!(s.round(0) && s.round(1));
    // One that the driver has not enabled.
    s.reset();
    s.driver.start(VERSION_1, &[&s.rings[0]]);
    assert_eq!(s.machine.armed(), [s.driver.doorbell(0)]);
    s.send(1);
    s.driver.ring(1);
    assert_eq!(s.echo.process(), 0);
    assert!(s.round(0));
}

#[test]
fn after_a_reset_everything_is_as_at_first_and_works() {
    let mut s = setup();
    let read = |s: &Setup| -> Vec<_> {
        let queue = |select| {
            s.driver.set(0x16, 2, select);
            (0x18..0x38).map(|at| s.driver.get(at, 1)).collect::<Vec<_>>()
        };
        let queues = [queue(1), queue(0)];
        queues.concat().into_iter().chain((0..0x18).map(|at| s.driver.get(at, 1))).collect()
    };
    let fresh = read(&s);
    for _ in 0..3 {
        s.start();
        assert!(s.round(0) && s.round(1));
        s.send(0);
        s.driver.ring(0);
        s.driver.set(0x00, 4, 1);
        s.driver.set(0x08, 4, 1);
        s.reset();
        assert_eq!((read(&s), s.echo.features(), s.machine.armed()), (fresh.clone(), None, vec![]));
        assert_eq!(s.machine.read(s.driver.isr, 1), 0);
    }
    assert_eq!(s.echo.activations(), 3);
}

#[test]
fn a_reset_is_over_when_nobody_writes_to_the_drivers_memory_any_more() {
    let mut s = setup();
    s.start();
    s.echo.set_written(true);
    s.reset();
    assert_eq!((s.driver.status(), s.echo.features()), (NEEDS_RESET, None));
    // A driver that does not wait gets nowhere, nor does another reset help.
    s.driver.set_status(ACKNOWLEDGE);
    assert_eq!(s.driver.status(), NEEDS_RESET);
    s.reset();
    assert_eq!(s.driver.status(), NEEDS_RESET);
    s.echo.set_written(false);
    assert_eq!(s.driver.status(), 0);
    s.start();
    assert!(s.round(0) && s.round(1));
}

#[test]
fn impossible_rings_and_a_device_that_refuses_need_a_reset() {
    let mut s = setup();
    let told = |s: &Setup| {
        assert_eq!(s.driver.status(), ALL_OK | NEEDS_RESET);
        assert_eq!((s.driver.raised(0), s.machine.read(s.driver.isr, 1)), (1, 2));
        assert_eq!((s.echo.features(), s.machine.armed()), (None, vec![]));
        match s.machine.events.next_event().unwrap().kind {
            EventKind::DeviceNeedsReset { device, why } => (device, why),
            other => panic!("{other:?}"),
        }
    };
    for (desc, avail, used) in [
        (0x1_0001, 0x1_2000, 0x1_3000),
        (0x1_0000, 0x1_2001, 0x1_3000),
        (0xf_fff0, 0x1_2000, 0x1_3000),
        (0x1_0000, u64::MAX - 1, 0x1_3000),
        (0x1_0000, 0x1_2000, layout_hole()),
    ] {
        assert!(s.driver.negotiate(VERSION_1));
        s.driver.enable_msix(3);
        s.driver.set(0x10, 2, 0);
        s.driver.set(0x16, 2, 0);
        for (at, address) in [(0x20, desc), (0x28, avail), (0x30, used)] {
            s.driver.set(at, 8, address);
        }
        s.driver.set(0x1c, 2, 1);
        s.driver.set_status(ALL_OK);
        let (device, why) = told(&s);
        assert_eq!(device, "echo0");
        assert!(why.contains("queue 0"), "{why}");
        s.driver.set_status(ALL_OK);
        assert_eq!(s.driver.status(), ALL_OK | NEEDS_RESET, "only a reset clears it");
    }
    s.echo.refuse_once();
    let [a, b] = &s.rings;
    s.driver.start(VERSION_1, &[a, b]);
    assert_eq!(told(&s).1, "echo0: not now");
    s.reset();
    s.start();
    assert!(s.round(0));
    assert_eq!(s.machine.events.next_event(), None);
}

fn layout_hole() -> u64 {
    crate::memory::layout::PCI_MMIO32.start
}

#[test]
fn a_broken_ring_stops_the_device_until_its_reset() {
    let mut s = setup();
    s.start();
    s.rings[0].set_avail(100);
    s.driver.ring(0);
    s.echo.process();
    assert_eq!((s.driver.status(), s.driver.raised(0)), (ALL_OK | NEEDS_RESET, 1));
    s.machine.functions[0].pause(soon()).unwrap();
    s.machine.functions[0].resume();
    assert!(!s.round(1), "a pause is no way around it");
    s.reset();
    s.start();
    assert!(s.round(0) && s.round(1));
}

#[test]
fn a_paused_device_goes_on_where_it_stopped() {
    let mut s = setup();
    let function = s.machine.functions[0].clone();
    function.pause(soon()).unwrap();
    function.resume();
    assert_eq!(s.echo.activations(), 0, "not before the driver is ready");
    s.start();
    for _ in 0..3 {
        assert!(s.round(0));
        function.pause(soon()).unwrap();
        function.pause(soon()).unwrap();
        assert_eq!((s.echo.features(), s.driver.status()), (None, ALL_OK));
        s.send(0);
        s.driver.ring(0);
        assert_eq!(s.echo.process(), 0);
        function.resume();
        function.resume();
        assert_eq!(s.echo.process(), 1);
        assert!(s.answered(0));
    }
    function.pause(soon()).unwrap();
    s.reset();
    function.resume();
    assert_eq!(s.echo.features(), None, "reset while it was paused");
    s.start();
    assert!(s.round(1));
    function.end();
    assert!(s.machine.armed().is_empty());
    assert!(!s.round(1));
    s.reset();
    let [a, b] = &s.rings;
    s.driver.start(VERSION_1, &[a, b]);
    assert_eq!(s.echo.features(), None, "for good");
}

#[test]
fn doorbells_follow_the_bar() {
    let mut s = setup();
    s.start();
    let was = s.machine.armed();
    let high = crate::memory::layout::pci_mmio64(s.machine.memory.size()).start + 0x10_0000;
    s.machine.set_config(1, 4, 2, 0);
    assert!(s.machine.armed().is_empty(), "memory decoding is off");
    s.machine.set_config(1, 0x10, 4, high & 0xffff_ffff);
    s.machine.set_config(1, 0x14, 4, high >> 32);
    assert!(s.machine.armed().is_empty());
    s.machine.set_config(1, 4, 2, 2);
    let moved: Vec<_> = was.iter().map(|a| a - s.driver.bar + high).collect();
    assert_eq!(s.machine.armed(), moved);
    assert_eq!(s.driver.status(), 0xff, "nobody at the old place");
    s.driver = Registers::find(&s.machine, 1);
    assert_eq!((s.driver.bar, s.driver.status()), (high, ALL_OK));
    assert!(s.round(0) && s.round(1));
    // With decoding on, in halves: in between it is where nobody looks.
    s.machine.set_config(1, 0x10, 4, 0xc010_0000);
    s.machine.set_config(1, 0x14, 4, 0);
    s.driver = Registers::find(&s.machine, 1);
    assert_eq!(s.machine.armed(), [0xc010_3000, 0xc010_3004]);
    assert!(s.round(0));
    s.reset();
    assert!(s.machine.armed().is_empty());
}

#[test]
fn two_bars_at_one_place_do_no_harm() {
    let memory = Memory::new(1 << 20).unwrap();
    let echoes = [Echo::default(), Echo::default()];
    let machine = Machine::new(&memory, echoes.iter().map(Echo::boxed).collect());
    let rings = [Driver::new(&memory, 0x1_0000, 16), Driver::new(&memory, 0x2_0000, 16)];
    let [first, second] = [1, 2].map(|device| Registers::find(&machine, device));
    first.start(VERSION_1, &[&rings[0]]);
    second.start(VERSION_1, &[&rings[1]]);
    let (home, taken) = (second.doorbell(0), first.doorbell(0));
    machine.set_config(2, 0x10, 4, first.bar);
    assert_eq!(machine.armed(), [taken], "the first one keeps it");
    machine.set_config(2, 0x10, 4, second.bar);
    assert_eq!(machine.armed(), [taken, home]);
    assert_eq!(second.status(), ALL_OK);
}

#[test]
fn vectors_that_are_not_there_read_back_as_none() {
    let mut s = setup();
    assert!(s.driver.negotiate(VERSION_1));
    s.driver.enable_msix(3);
    for (vector, want) in [(0u64, 0), (2, 2), (3, 0xffff), (0xffff, 0xffff), (0x800, 0xffff)] {
        s.driver.set(0x10, 2, vector);
        s.driver.set(0x1a, 2, vector);
        assert_eq!((s.driver.get(0x10, 2), s.driver.get(0x1a, 2)), (want, want), "{vector:#x}");
    }
    s.driver.set_queue(0, &s.rings[0], NO_VECTOR);
    s.driver.set(0x10, 2, 2);
    s.driver.set_status(ALL_OK);
    assert!(s.round(0));
    assert_eq!([0, 1, 2].map(|v| s.driver.raised(v)), [0; 3], "a driver that polls");
    let generation = s.driver.get(0x15, 1);
    s.echo.change_config([1, 2, 3, 4]);
    assert_eq!([0, 1, 2].map(|v| s.driver.raised(v)), [0, 0, 1]);
    assert_ne!(s.driver.get(0x15, 1), generation);
    assert_eq!([0, 1].map(|_| s.machine.read(s.driver.isr, 1)), [2, 0], "cleared by reading");
    assert_eq!(s.machine.read(s.driver.config, 4), 0x0403_0201);
    assert_eq!(s.machine.read(s.driver.config + 2, 4), 0x0403, "zeroes behind it");
    s.machine.write(s.driver.config + 1, 2, 0xaabb);
    assert_eq!(s.machine.read(s.driver.config, 4), 0x04aa_bb01);
}

#[test]
fn a_masked_queue_vector_waits_in_the_pending_bits() {
    let mut s = setup();
    s.start();
    s.machine.write(s.driver.table + 16 + 12, 4, 1);
    assert!(s.round(0));
    assert_eq!(s.machine.read(s.driver.pending, 8), 0b10);
    s.machine.write(s.driver.table + 16 + 12, 4, 0);
    assert_eq!((s.machine.read(s.driver.pending, 8), s.driver.raised(1)), (0, 1));
    s.machine.write(s.driver.table + 16 + 12, 4, 1);
    assert!(s.round(0));
    s.reset();
    assert_eq!(s.machine.read(s.driver.pending, 8), 0, "owed to nobody");
}

#[test]
fn configuration_space_reaches_the_bar() {
    let Setup { machine, driver, .. } = setup();
    let point = |bar, offset, len| {
        machine.set_config(1, driver.window + 4, 1, bar);
        machine.set_config(1, driver.window + 8, 4, offset);
        machine.set_config(1, driver.window + 12, 4, len);
    };
    let data = driver.window + 16;
    point(0, 0x14, 1);
    machine.set_config(1, data, 1, ACKNOWLEDGE.into());
    assert_eq!((machine.config(1, data, 1), driver.status()), (1, ACKNOWLEDGE));
    point(0, 0x12, 2);
    assert_eq!(machine.config(1, data, 2), 2);
    point(0, 0, 4);
    machine.set_config(1, data, 4, 1);
    point(0, 4, 4);
    assert_eq!(machine.config(1, data, 4), 1, "VERSION_1");
    // Through the ports, too.
    machine.pio.write(0xcf8, 0, &(0x8000_0800u32 | data as u32).to_le_bytes()).unwrap();
    let mut value = [0; 4];
    machine.pio.read(0xcfc, 0, &mut value).unwrap();
    assert_eq!(value, [1, 0, 0, 0]);
    machine.set_config(1, data, 4, 0);
    let plain = machine.config(1, data, 2);
    for (bar, offset, len) in [
        (1, 0, 4),
        (0, 0x7ffe, 4),
        (0, 0x8000, 4),
        (0, 0xffff_fffc, 4),
        (0, 1, 2),
        (0, 0, 3),
        (0, 0, 8),
        (0, 0, 0),
    ] {
        point(bar, offset, len);
        let before = driver.status();
        machine.set_config(1, data, 4, 0);
        assert_eq!((machine.config(1, data, 4), driver.status()), (plain, before), "{bar} {offset:#x} {len}");
    }
}

#[test]
fn any_access_of_any_size_anywhere_does_no_harm() {
    let mut s = setup();
    let mut dice = Dice(0x0dd_ba11);
    for round in 0..60 {
        if round % 2 == 0 {
            s.reset();
            s.start();
        }
        for _ in 0..2000 {
            poke(&s, &mut dice);
        }
        s.echo.process();
        // Whatever it was: the driver's way back.
        s.machine.set_config(1, 0x10, 4, 0xc000_8000);
        s.machine.set_config(1, 0x14, 4, 0);
        s.machine.set_config(1, 4, 2, 2);
        while s.machine.events.next_event().is_some() {}
        s.reset();
        s.start();
        assert!(s.round(0) && s.round(1), "round {round}");
        let _ = [0, 1, 2].map(|v| s.driver.raised(v));
    }
}

fn poke(s: &Setup, dice: &mut Dice) {
    let len = dice.below(8) as usize + 1;
    let value = [0, 1, 2, 0xffff, u64::MAX, dice.roll()][dice.below(6) as usize].to_le_bytes();
    let mut data = vec![0; len];
    let both = |bus: &Bus, at: u64, data: &mut [u8]| {
        bus.read(at, 0, data).unwrap();
        bus.write(at, 0, &value[..len]).unwrap();
    };
    let mmio = &s.machine.mmio;
    match dice.below(8) {
        0..5 => {
            let page = dice.below(8) << 12;
            let edge = [0, 0, 0xff8][dice.below(3) as usize];
            both(mmio, s.driver.bar + page + edge + dice.below(0x40), &mut data);
        }
        5 => both(mmio, s.driver.bar + dice.below(0x9000), &mut data),
        6 => both(mmio, crate::memory::layout::ECAM.start + (1 << 15) + dice.below(0x1000), &mut data),
        _ => {
            let address = 0x8000_0800 | dice.below(0x200) as u32;
            s.machine.pio.write(0xcf8, 0, &address.to_le_bytes()).unwrap();
            both(&s.machine.pio, 0xcf8 + dice.below(8), &mut data);
        }
    }
}
