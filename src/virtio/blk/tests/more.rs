#![forbid(unsafe_code)]
//! What came after reading and writing: discards, write caches, other sizes, limits, several queues.

use std::time::Duration;

use virtio_bindings::bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_MQ};

use super::*;
use crate::config::{CacheMode, DiskConfig, RateLimit};

const DISCARD: u64 = 1 << VIRTIO_BLK_F_DISCARD;

/// A bench whose disk is `config`'s.
fn configured(config: &DiskConfig, features: u64) -> Bench {
    let mut b = bench();
    let backend: Box<dyn Backend> = Box::new(raw(&b.file));
    let control = Arc::new(Control::new("disk0", config, &*backend, 1, Some(b.signals.clone())));
    b.blk = Blk::new(control, "", vec![(backend, Place::Caller)]);
    b.blk.activate(activation(features, &[&b.driver], &b.signals)).unwrap();
    b
}

fn segment(b: &Bench, sector: u64, count: u32, flags: u32) -> [(u64, u32, u16); 1] {
    b.driver.memory.write_obj(sector, GuestAddress(DATA)).unwrap();
    b.driver.memory.write_obj(u64::from(flags) << 32 | u64::from(count), GuestAddress(DATA + 8)).unwrap();
    [(DATA, 16, 0)]
}

#[test]
fn discards_and_zeroes_reach_the_file_and_are_counted() {
    let mut b = configured(&DiskConfig::default(), FLUSH | DISCARD);
    b.driver.memory.write_slice(&[0xab; 8192], GuestAddress(DATA)).unwrap();
    assert_eq!(b.request(1, 0, &[(DATA, 8192, 0)]), (0, 1));
    let ask = segment(&b, 0, 8, 0);
    assert_eq!(b.request(11, 0, &ask), (0, 1));
    let ask = segment(&b, 8, 1, 1);
    assert_eq!(b.request(13, 0, &ask), (0, 1));
    assert_eq!(b.request(0, 8, &[(DATA, 1024, WRITE)]), (0, 1025));
    assert_eq!((b.driver.bytes::<1>(DATA), b.driver.bytes::<1>(DATA + 512)), ([0], [0xab]));
    let ask = segment(&b, SIZE / 512, 1, 0);
    assert_eq!(b.request(11, 0, &ask), (1, 1), "past the end");
    let ask = segment(&b, 0, 1, 2);
    assert_eq!(b.request(13, 0, &ask), (2, 1), "a flag of the future");
    let counted = b.blk.control.statistics();
    assert_eq!((counted.discards, counted.discarded_bytes, counted.errors), (2, 4096 + 512, 2));
    assert_eq!(counted.latency.iter().sum::<u64>(), 6, "every answer has its place");
    // To a driver that has not accepted the feature, the device knows no such request.
    let mut b = configured(&DiskConfig::default(), FLUSH);
    let ask = segment(&b, 0, 8, 0);
    assert_eq!(b.request(11, 0, &ask), (2, 1));
    let config = DiskConfig { discard: false, ..DiskConfig::default() };
    let backend = RawDisk::from_file("disk0", b.file.try_clone().unwrap(), &config).unwrap();
    assert_eq!(Blk::simple("disk0", "", Box::new(backend), Place::Caller).features() & DISCARD, 0);
}

#[test]
fn the_driver_chooses_its_write_cache_and_the_next_one_begins_anew() {
    for (cache, first) in [(CacheMode::Writeback, 1), (CacheMode::Writethrough, 0)] {
        let mut b = bench();
        let (later, asked) = Later::new(raw(&b.file));
        let config = DiskConfig { cache, ..DiskConfig::default() };
        let backend: Box<dyn Backend> = Box::new(later);
        let control = Arc::new(Control::new("disk0", &config, &*backend, 1, None));
        b.blk = Blk::new(control, "", vec![(backend, Place::Caller)]);
        assert_ne!(b.blk.features() & 1 << VIRTIO_BLK_F_CONFIG_WCE, 0);
        let writeback = |b: &Bench| {
            let mut byte = [9];
            b.blk.read_config(WRITEBACK, &mut byte);
            byte[0]
        };
        assert_eq!(writeback(&b), first);
        b.blk.activate(activation(FLUSH | 1 << VIRTIO_BLK_F_CONFIG_WCE, &[&b.driver], &b.signals)).unwrap();
        asked.release(&[]);
        for (choice, durable) in [(1, false), (0, true)] {
            b.blk.write_config(WRITEBACK, &[choice]);
            lock(&asked.asked).clear();
            assert_eq!(b.request(1, 0, &[(DATA, 512, 0)]), (0, 1));
            assert_eq!((lock(&asked.asked)[0], writeback(&b)), (BlockOp::Write { durable }, choice));
        }
        b.blk.write_config(WRITEBACK + 1, &[7, 7]);
        b.blk.deactivate();
        b.blk.reset();
        assert_eq!(writeback(&b), first);
    }
}

#[test]
fn a_new_size_is_told_and_holds_at_once() {
    let mut b = configured(&DiskConfig::default(), FLUSH);
    let capacity = |b: &Bench| {
        let mut bytes = [0; 8];
        b.blk.read_config(0, &mut bytes);
        u64::from_le_bytes(bytes)
    };
    assert_eq!(b.request(0, SIZE / 512 - 1, &[(DATA, 512, WRITE)]).0, 0);
    let generation = b.signals.config_generation();
    b.blk.control.resize(crate::units::Bytes(SIZE / 2)).unwrap();
    assert_eq!((capacity(&b), b.signals.take_isr()), (SIZE / 1024, 2));
    assert_ne!(b.signals.config_generation(), generation);
    assert_eq!(b.request(0, SIZE / 512 - 1, &[(DATA, 512, WRITE)]).0, 1, "beyond its end by now");
    b.blk.control.resize(crate::units::Bytes(SIZE)).unwrap();
    assert_eq!(b.request(0, SIZE / 512 - 1, &[(DATA, 512, WRITE)]).0, 0);
    for none in [0, 513, !511] {
        let error = b.blk.control.resize(crate::units::Bytes(none)).unwrap_err();
        assert!(error.to_string().contains("disk0: a size of") && capacity(&b) == SIZE / 512, "{error}");
    }
    // The file is sealed: it cannot grow, and the disk stays as it is.
    assert!(b.blk.control.resize(crate::units::Bytes(2 * SIZE)).is_err());
    assert_eq!(capacity(&b), SIZE / 512);
}

#[test]
fn a_limit_holds_requests_back_and_its_change_is_heard() {
    let event_loop = EventLoop::start("test", |body| Ok(std::thread::spawn(body))).unwrap();
    let rate = RateLimit::NONE.ops(20, 4);
    let mut b = bench();
    let backend: Box<dyn Backend> = Box::new(raw(&b.file));
    let config = DiskConfig { rate, ..DiskConfig::default() };
    let control = Arc::new(Control::new("disk0", &config, &*backend, 1, None));
    let place = Place::Loop(event_loop.clone(), StopLine::new(|cause| panic!("{cause}")));
    b.blk = Blk::new(control.clone(), "", vec![(backend, place)]);
    b.blk.activate(activation(FLUSH, &[&b.driver], &b.signals)).unwrap();
    b.header(0, 0);
    let begun = Instant::now();
    for _ in 0..5 {
        b.driver.send(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    }
    b.driver.ring_doorbell();
    let wait = |b: &mut Bench, count: usize| {
        let end = Instant::now() + Duration::from_secs(60);
        for seen in 0..count {
            while b.driver.take_used().is_none() {
                assert!(Instant::now() < end, "waited for {count} answers: {seen} came");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    };
    wait(&mut b, 5);
    // Four at once, and the fifth a twentieth of a second later; its debt is a tenth from now.
    assert!(begun.elapsed() >= Duration::from_millis(45), "{:?}", begun.elapsed());
    control.set_rate(RateLimit::NONE.bytes(1, 1));
    b.driver.send(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    b.driver.send(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    b.driver.ring_doorbell();
    wait(&mut b, 1);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(b.driver.take_used(), None, "511 seconds from now");
    control.set_rate(RateLimit::NONE);
    wait(&mut b, 1);
    // One that waits is given back with its queue, not answered.
    control.set_rate(RateLimit::NONE.ops(1, 1));
    for _ in 0..3 {
        b.driver.send(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    }
    b.driver.ring_doorbell();
    wait(&mut b, 1);
    assert!(b.blk.drain(Instant::now() + Duration::from_secs(10)));
    assert!(b.blk.deactivate()[0].is_some());
    assert_eq!(b.driver.take_used(), None);
}

#[test]
fn each_queue_is_served_and_all_come_back() {
    let file = file();
    let memory = Memory::new(1 << 20).unwrap();
    let mut drivers = [Driver::new(&memory, 0x4000, 16), Driver::new(&memory, 0x8000, 16)];
    let (signals, _events) = signals("disk0");
    let first: Box<dyn Backend> = Box::new(raw(&file));
    let backends = [first.another().unwrap().unwrap(), first.another().unwrap().unwrap(), first];
    let config = DiskConfig::default();
    let control = Arc::new(Control::new("disk0", &config, &*backends[0], 3, None));
    let lanes = backends.into_iter().map(|backend| (backend, Place::Caller)).collect();
    let mut blk = Blk::new(control.clone(), "", lanes);
    assert_ne!(blk.features() & 1 << VIRTIO_BLK_F_MQ, 0);
    let mut count = [0; 2];
    blk.read_config(34, &mut count);
    assert_eq!((u16::from_le_bytes(count), blk.queue_sizes().len()), (3, 3));
    for round in 1..4u8 {
        // The driver leaves the third alone.
        let mut parts = activation(FLUSH, &[&drivers[0], &drivers[1]], &signals);
        parts.queues.push(None);
        blk.activate(parts).unwrap();
        for (i, driver) in drivers.iter_mut().enumerate() {
            let at = DATA + 0x1000 * i as u64;
            memory.write_obj(1u32, GuestAddress(HEADER)).unwrap();
            memory.write_obj(i as u64, GuestAddress(HEADER + 8)).unwrap();
            memory.write_slice(&[round; 512], GuestAddress(at)).unwrap();
            let head = driver.send(&[(HEADER, 16, 0), (at, 512, 0), (STATUS, 1, WRITE)]);
            blk.process_queue();
            assert_eq!(driver.take_used(), Some((head, 1)));
        }
        let back: Vec<_> = blk.deactivate().iter().map(Option::is_some).collect();
        assert_eq!(back, [true, true, false]);
        drivers.iter_mut().for_each(Driver::reset);
        assert_eq!(control.statistics().writes, 2 * u64::from(round));
    }
    let mut parts = activation(FLUSH, &[&drivers[0]], &signals);
    parts.queues = vec![None, None, None];
    assert!(blk.activate(parts).unwrap_err().to_string().contains("not enabled"));
}

#[test]
fn a_copy_is_of_one_instant_whatever_is_written_meanwhile() {
    use crate::config::DiskFormat;
    let path = std::env::temp_dir().join(format!("vmbed-saved-{}", std::process::id()));
    let mut b = configured(&DiskConfig::default(), FLUSH | DISCARD);
    for (sector, byte) in [(0u64, 1u8), (600, 2), (2040, 3)] {
        b.driver.memory.write_slice(&[byte; 512], GuestAddress(DATA)).unwrap();
        assert_eq!(b.request(1, sector, &[(DATA, 512, 0)]), (0, 1));
    }
    let mut before = vec![0; SIZE as usize];
    std::os::unix::fs::FileExt::read_exact_at(&b.file, &mut before, 0).unwrap();
    let control = b.blk.control.clone();
    for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
        if format == DiskFormat::Qcow2 && !cfg!(feature = "qcow2") {
            continue;
        }
        let copy = control.copy_to(&path, format).unwrap();
        assert!(control.copy_to(&path, format).is_err(), "its file is there");
        let saving = control.begin_saving(&copy).unwrap();
        let other = path.with_extension("other");
        let second = control.copy_to(&other, format).unwrap();
        assert_eq!(control.begin_saving(&second).err().unwrap().kind(), ErrorKind::Busy);
        drop(second);
        assert!(!other.exists(), "nothing is left of a copy that is given up");
        assert_eq!(copy.step().unwrap(), 256 << 10);
        // In chunks that are copied, in others, over the edge of two, and by a discard.
        b.driver.memory.write_slice(&[9; 1024], GuestAddress(DATA)).unwrap();
        for sector in [0, 511, 600, 1023] {
            assert_eq!(b.request(1, sector, &[(DATA, 1024, 0)]), (0, 1));
        }
        let ask = segment(&b, 2040, 8, 0);
        assert_eq!(b.request(11, 0, &ask), (0, 1));
        while copy.step().unwrap() < SIZE {}
        copy.finish().unwrap();
        drop((saving, copy));
        let saved = if format == DiskFormat::Raw {
            std::fs::read(&path).unwrap()
        } else {
            let raw = path.with_extension("raw");
            let words =
                ["convert", "-f", "qcow2", "-O", "raw", path.to_str().unwrap(), raw.to_str().unwrap()];
            assert!(std::process::Command::new("qemu-img").args(words).status().unwrap().success());
            let bytes = std::fs::read(&raw).unwrap();
            std::fs::remove_file(raw).unwrap();
            bytes
        };
        assert!(saved == before, "{format:?}");
        assert_eq!(b.driver.bytes::<1>(DATA + 16), [9]);
        std::fs::remove_file(&path).unwrap();
        // What the next copy is of.
        std::os::unix::fs::FileExt::read_exact_at(&b.file, &mut before, 0).unwrap();
        assert!(before[600 * 512] == 9 && before[2040 * 512] == 0);
    }
}
