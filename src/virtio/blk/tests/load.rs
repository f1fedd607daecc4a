#![forbid(unsafe_code)]
//! Queues that are full: pauses, limits and new sizes while 256 requests wait.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use super::*;
use crate::block::RawDisk;
use crate::config::{DiskConfig, DiskEngine, RateLimit};
use crate::units;
use crate::virtio::queue::Queue;
use crate::virtio::queue_driver::INDIRECT;

const ALL: u16 = 256;
const MEMORY: u64 = 40 << 20;
const BLOCK: u64 = 4096;
/// Room for the data of each request.
const ROOM: u64 = 16 * BLOCK;
const LONG: Duration = Duration::from_secs(60);

/// A disk on a file of its own, each queue served by a thread.
struct Loaded {
    file: PathBuf,
    memory: Memory,
    queues: Vec<Requests>,
    blk: Blk,
    control: Arc<Control>,
    signals: Signals,
}

/// A driver whose requests each have a place, and whose 256 descriptors each name a table.
struct Requests {
    driver: Driver,
    /// Where headers, tables and data are.
    base: u64,
    answered: [u32; ALL as usize],
}

impl Requests {
    fn new(memory: &Memory, index: u64) -> Self {
        let base = index * (MEMORY / 2);
        Self { driver: Driver::new(memory, base + 0x4000, ALL), base: base + 0x1_0000, answered: [0; _] }
    }

    fn header(&self, slot: u16) -> u64 {
        self.base + 128 * u64::from(slot)
    }

    fn data(&self, slot: u16) -> u64 {
        self.base + 0x1_0000 + ROOM * u64::from(slot)
    }

    /// Offers a request of so many bytes.
    fn offer(&mut self, slot: u16, kind: u32, offset: u64, length: u32) {
        let (header, data, driver) = (self.header(slot), self.data(slot), &mut self.driver);
        driver.memory.write_obj(kind, GuestAddress(header)).unwrap();
        driver.memory.write_obj(offset / 512, GuestAddress(header + 8)).unwrap();
        driver.memory.write_obj(0xffu8, GuestAddress(header + 16)).unwrap();
        let table = header + 32;
        let direction = if kind == 0 { WRITE } else { 0 };
        driver.descriptor(table, 0, (header, 16, NEXT, 1));
        driver.descriptor(table, 1, (data, length, NEXT | direction, 2));
        driver.descriptor(table, 2, (header + 16, 1, WRITE, 0));
        driver.descriptor(driver.table(), slot, (table, 48, INDIRECT, 0));
        driver.offer(slot);
    }

    /// The slots that were answered since the last time, with their status.
    fn take(&mut self) -> Vec<(u16, u8)> {
        let mut slots = Vec::new();
        while let Some((slot, _)) = self.driver.take_used() {
            self.answered[usize::from(slot)] += 1;
            slots.push((slot, self.driver.bytes::<1>(self.header(slot) + 16)[0]));
        }
        slots
    }
}

impl Loaded {
    fn new(name: &str, config: &DiskConfig, count: u64) -> Self {
        let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target");
        let file = file.join(format!("vmbed-load-{}-{name}", std::process::id()));
        File::create(&file).unwrap().set_len(2 * SIZE).unwrap();
        let memory = Memory::new(MEMORY).unwrap();
        let queues: Vec<_> = (0..count).map(|i| Requests::new(&memory, i)).collect();
        let (signals, _) = signals("disk0");
        let mut backends: Vec<Box<dyn Backend>> =
            vec![Box::new(RawDisk::open("disk0", &file, config).unwrap())];
        while backends.len() < queues.len() {
            let another = backends[0].another().unwrap().unwrap();
            backends.push(another);
        }
        let control = Arc::new(Control::new("disk0", config, &*backends[0], queues.len(), None));
        let place = || {
            let event_loop = EventLoop::start("test", |body| Ok(std::thread::spawn(body))).unwrap();
            Place::Loop(event_loop, StopLine::new(|cause| panic!("{cause}")))
        };
        let lanes = backends.into_iter().map(|backend| (backend, place())).collect();
        let mut blk = Blk::new(control.clone(), "", lanes);
        let drivers: Vec<_> = queues.iter().map(|queue| &queue.driver).collect();
        blk.activate(activation(FLUSH, &drivers, &signals)).unwrap();
        Self { file, memory, queues, blk, control, signals }
    }

    /// Waits until `done` has had enough of what is answered in that queue.
    fn wait(&mut self, queue: usize, what: &str, mut done: impl FnMut(&mut Requests) -> bool) {
        let end = Instant::now() + LONG;
        while !done(&mut self.queues[queue]) {
            assert!(Instant::now() < end, "waited {LONG:?} for {what}");
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        self.blk.deactivate();
        let _ = std::fs::remove_file(&self.file);
    }
}

/// Every request is answered once: before the pause, or after it.
#[test]
fn a_pause_amid_256_requests_loses_none() {
    for engine in [DiskEngine::Sync, DiskEngine::IoUring] {
        let config = DiskConfig { engine, ..DiskConfig::default() };
        let mut disk = Loaded::new(&format!("pause-{engine:?}"), &config, 1);
        let (mut dice, mut amid, mut rounds) = (Dice(0x1234_5678_9abc_def1), 0, 0u32);
        let end = Instant::now() + LONG;
        // On a busy machine, the worker may always be done before we are there again, or not have begun.
        while rounds < 60 || amid == 0 && Instant::now() < end {
            let round = rounds;
            rounds += 1;
            let mut expected = BTreeSet::new();
            for slot in 0..ALL {
                let queue = &mut disk.queues[0];
                let word = round << 16 | u32::from(slot);
                queue.driver.memory.write_obj(word, GuestAddress(queue.data(slot))).unwrap();
                // More than one wake-up does.
                queue.offer(slot, u32::from(slot % 3 != 0), u64::from(slot) * BLOCK, ROOM as u32);
                expected.insert(slot);
            }
            disk.queues[0].driver.ring_doorbell();
            match round % 3 {
                0 => std::thread::sleep(Duration::from_micros(dice.below(1500))),
                // Not even a switch to another thread.
                _ => (0..dice.below(100_000)).for_each(|_| std::hint::spin_loop()),
            }
            assert!(disk.blk.drain(Instant::now() + LONG));
            let before: Vec<_> = disk.queues[0].take();
            amid += u32::from((1..usize::from(ALL)).contains(&before.len()));
            let queue = disk.blk.deactivate().remove(0).expect("a queue comes back");
            assert_eq!(usize::from(queue.position().0.wrapping_sub((round * 256) as u16)), before.len());
            assert!(disk.queues[0].take().is_empty(), "nothing is answered after a pause");
            let setup = queue.into_setup();
            let mut parts = activation(FLUSH, &[&disk.queues[0].driver], &disk.signals);
            parts.queues = vec![Some(Queue::new(setup, &disk.memory).unwrap())];
            disk.blk.activate(parts).unwrap();
            for (slot, status) in before {
                assert!(status == 0 && expected.remove(&slot), "{slot}: {status}");
            }
            disk.wait(0, "the rest of them", |queue| {
                for (slot, status) in queue.take() {
                    assert!(status == 0 && expected.remove(&slot), "{slot}: {status}");
                }
                expected.is_empty()
            });
        }
        assert!(disk.queues[0].answered.iter().all(|count| *count == rounds));
        assert!(amid > 0, "{engine:?}: no pause came amid requests");
    }
}

/// Within 3 % over ten seconds, reading and writing alike, whichever queue they come through.
#[test]
fn a_limit_is_kept_and_shared() {
    const OPS: u64 = 2000;
    // What a busy machine misses is made up for.
    let rate = RateLimit::NONE.ops(OPS, OPS / 2).bytes(OPS * BLOCK * 10, OPS * BLOCK * 10);
    let config = DiskConfig { rate, ..DiskConfig::default() };
    let mut disk = Loaded::new("rate", &config, 2);
    let mut passed = [[0u64; 2]; 2];
    let offer = |queue: &mut Requests, slot: u16| {
        // One half reads, the other writes.
        queue.offer(slot, u32::from(slot % 2), u64::from(slot) * BLOCK, BLOCK as u32);
    };
    let begun = Instant::now();
    for queue in &mut disk.queues {
        (0..ALL / 2).for_each(|slot| offer(queue, slot));
        queue.driver.ring_doorbell();
    }
    // The burst, whose end does not count, is over after a second at most.
    let (mut start, mut from) = (None, [[0; 2]; 2]);
    while begun.elapsed() < Duration::from_secs(11) {
        for (i, queue) in disk.queues.iter_mut().enumerate() {
            let taken = queue.take();
            for (slot, status) in &taken {
                assert_eq!(*status, 0);
                passed[i][usize::from(slot % 2)] += 1;
                offer(queue, *slot);
            }
            if !taken.is_empty() {
                queue.driver.ring_doorbell();
            }
        }
        if start.is_none() && begun.elapsed() >= Duration::from_secs(1) {
            (start, from) = (Some(Instant::now()), passed);
        }
        std::thread::sleep(Duration::from_micros(500));
    }
    let time = start.unwrap().elapsed().as_secs_f64();
    let each: Vec<u64> = (0..4).map(|i| passed[i / 2][i % 2] - from[i / 2][i % 2]).collect();
    let (all, due) = (each.iter().sum::<u64>() as f64, time * OPS as f64);
    assert!((all / due - 1.0).abs() < 0.03, "{all} of {due:.0}: {each:?}");
    let reads = (each[0] + each[2]) as f64 / all;
    assert!((0.47..0.53).contains(&reads), "reads and writes: {each:?}");
    let first = (each[0] + each[1]) as f64 / all;
    assert!((0.35..0.65).contains(&first), "the queues: {each:?}");
}

/// Each write is done or refused by the size at its time, and none is lost or does harm.
#[test]
fn a_new_size_while_the_guest_writes() {
    for engine in [DiskEngine::Sync, DiskEngine::IoUring] {
        let config = DiskConfig { engine, ..DiskConfig::default() };
        let mut disk = Loaded::new(&format!("size-{engine:?}"), &config, 1);
        let (control, sizes) = (disk.control.clone(), [SIZE, SIZE / 2, 2 * SIZE, SIZE / 4]);
        let resizing = std::thread::spawn(move || {
            for round in 0..200 {
                control.resize(units::Bytes(sizes[round % 4])).unwrap();
                std::thread::sleep(Duration::from_micros(300));
            }
            control.resize(units::Bytes(2 * SIZE)).unwrap();
        });
        let (mut refused, mut done, mut again) = (0, 0, true);
        let mut byte = 0u8;
        while again {
            again = !resizing.is_finished();
            byte = byte.wrapping_add(1);
            for slot in 0..ALL {
                let queue = &mut disk.queues[0];
                queue
                    .driver
                    .memory
                    .write_slice(&[byte; BLOCK as usize], GuestAddress(queue.data(slot)))
                    .unwrap();
                queue.offer(slot, 1, u64::from(slot) * 2 * BLOCK, BLOCK as u32);
            }
            disk.queues[0].driver.ring_doorbell();
            let mut left = usize::from(ALL);
            disk.wait(0, "256 writes", |queue| {
                for (_, status) in queue.take() {
                    assert!(status <= 1, "{status}");
                    *(if status == 0 { &mut done } else { &mut refused }) += 1;
                    left -= 1;
                }
                left == 0
            });
        }
        resizing.join().unwrap();
        assert!(done > 0 && refused > 0, "{engine:?}: {done} done, {refused} refused");
        // What was written in the last round, at the last size.
        let bytes = std::fs::read(&disk.file).unwrap();
        assert_eq!(bytes.len() as u64, 2 * SIZE);
        for (i, block) in bytes.chunks(BLOCK as usize).enumerate() {
            let expected = if i % 2 == 0 { byte } else { 0 };
            assert!(block.iter().all(|b| *b == expected), "block {i} is {} and not {expected}", block[0]);
        }
        assert!(disk.queues[0].answered.iter().all(|count| *count == disk.queues[0].answered[0]));
    }
}
