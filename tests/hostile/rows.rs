//! The rows about requests and rings.

use vmbed::internals::driver::status::NEEDS_RESET;
use vmbed::internals::driver::{Buffer, INDIRECT, NEXT, Rings, WRITE, bytes, read, write};

use super::{DATA, HEADER, IOERR, KINDS, Kind, MEMORY, Rig, SECTORS, STATUS, attack};

/// Where indirect tables lie.
const TABLE: u64 = 0x4000;

#[test]
fn row_06_a_doorbell_without_a_queue_is_ignored() {
    for kind in KINDS {
        attack(kind, |rig| {
            let queues = rig.rings.len() as u64;
            for index in queues..0x1000 / rig.regs.notify_stride {
                for width in [1, 2, 4, 8] {
                    write(&rig.board, rig.regs.notify + index * rig.regs.notify_stride, width, index);
                }
            }
            assert_eq!(rig.board.process(), 0);
            // The address says which queue; what is written there may be anything.
            for value in [7, 0xffff, u64::MAX] {
                write(&rig.board, rig.regs.notify, 2, value);
                assert_eq!(rig.board.process(), 1);
            }
            rig.regs.set_status(&rig.board, 0);
            rig.regs.ring(&rig.board, 0);
            assert_eq!(rig.board.process(), 0, "no queue before DRIVER_OK");
            assert_eq!(rig.board.events().next_event(), None);
            rig.restart();
        });
    }
}

#[test]
fn row_07_an_available_index_too_far_ahead_breaks_the_queue() {
    for kind in KINDS {
        attack(kind, |rig| {
            let victim = usize::from(rig.victim());
            for ahead in [rig.rings[victim].size + 1, 0x8000, 0xffff] {
                let Rig { board, rings, .. } = &mut *rig;
                let used = u16::from_le_bytes(bytes(board, rings[victim].used + 2));
                rings[victim].set_avail(board, used.wrapping_add(ahead));
                rig.ring();
                rig.broken(&format!("{kind:?}: {ahead} ahead"));
            }
            // As far as the queue is long is a driver's right; the entries are not good, though.
            let size = rig.rings[victim].size;
            let Rig { board, rings, .. } = &mut *rig;
            let slots = vec![0xff; usize::from(size) * 2];
            board.write_memory(rings[victim].avail + 4, &slots).unwrap();
            rings[victim].set_avail(board, size);
            rig.ring();
            rig.broken("a head beyond the table");
        });
    }
}

/// What is wrong, and how to do it.
type Malformation = (&'static str, Box<dyn Fn(&Rig)>);

/// Writes each of these malformed chains into the rings, with its name; each head is 0.
fn malformed(rig: &Rig, rings: &Rings) -> Vec<Malformation> {
    let (own, size) = (rings.clone(), rings.size);
    let put = move |table: u64, index: u16, d: Buffer, next: u16| {
        let rings = own.clone();
        move |rig: &Rig| rings.descriptor(&rig.board, table, index, d, next)
    };
    let desc = rings.desc;
    let indirect = |length| put(desc, 0, (TABLE, length, INDIRECT), 0);
    let _ = rig;
    let (a, b) = (put(desc, 0, (DATA, 16, NEXT), 1), put(desc, 1, (DATA, 16, NEXT), 0));
    let (t0, t1) = (put(TABLE, 0, (DATA, 16, NEXT), 1), put(TABLE, 1, (DATA, 16, NEXT), 0));
    let inner_end = put(TABLE, 0, (DATA, 16, NEXT), 2);
    let nested = put(TABLE, 0, (TABLE, 16, INDIRECT), 0);
    let next = put(desc, 0, (TABLE, 16, INDIRECT | NEXT), 1);
    let (plain, last) = (put(TABLE, 0, (DATA, 16, 0), 0), put(desc, 1, (DATA, 16, 0), 0));
    let outside = put(desc, 0, (MEMORY - 8, 16, INDIRECT), 0);
    let wraps = put(desc, 0, (u64::MAX - 15, 32, INDIRECT), 0);
    let (two, many) = (indirect(32), indirect(16 * (u32::from(size) + 1)));
    let (two_again, one, outer) = (indirect(32), indirect(16), indirect(16));
    // Which would be a good chain, were it allowed.
    let inner = put(TABLE, 0, (TABLE + 0x800, 16, INDIRECT), 0);
    let innermost = put(TABLE + 0x800, 0, (DATA, 16, 0), 0);
    let mut all: Vec<Malformation> = vec![
        ("itself", Box::new(put(desc, 0, (DATA, 16, NEXT), 0))),
        ("a loop of two", Box::new(move |r| (a(r), b(r)).0)),
        ("next beyond the table", Box::new(put(desc, 0, (DATA, 16, NEXT), size))),
        ("next far beyond", Box::new(put(desc, 0, (DATA, 16, NEXT), 0xffff))),
        ("a loop in an indirect table", Box::new(move |r| (two(r), t0(r), t1(r)).0)),
        ("next beyond an indirect table", Box::new(move |r| (two_again(r), inner_end(r)).0)),
        ("an indirect table that is its own", Box::new(move |r| (one(r), nested(r)).0)),
        ("nested indirect", Box::new(move |r| (outer(r), inner(r), innermost(r)).0)),
        ("indirect with NEXT", Box::new(move |r| (next(r), plain(r), last(r)).0)),
        ("a table outside memory", Box::new(outside)),
        ("a table that wraps", Box::new(wraps)),
        ("a table longer than the queue, a loop", {
            let (t0, t1) = (put(TABLE, 0, (DATA, 16, NEXT), 1), put(TABLE, 1, (DATA, 16, NEXT), 0));
            Box::new(move |r| (many(r), t0(r), t1(r)).0)
        }),
    ];
    for odd in [0, 1, 15, 17, 40, u32::MAX] {
        all.push(("an indirect table of odd length", Box::new(indirect(odd))));
    }
    all
}

#[test]
fn row_08_malformed_chains_break_the_queue_and_not_the_worker() {
    for kind in KINDS {
        attack(kind, |rig| {
            let victim = usize::from(rig.victim());
            for (why, write_it) in malformed(rig, &rig.rings[victim]) {
                write_it(rig);
                let Rig { board, rings, .. } = &mut *rig;
                rings[victim].offer(board, 0);
                rig.ring();
                rig.broken(&format!("{kind:?}: {why}"));
            }
        });
    }
}

#[test]
fn row_10_an_address_that_wraps_is_refused() {
    for kind in KINDS {
        attack(kind, |rig| {
            for (addr, len) in [(u64::MAX, 2), (u64::MAX - 15, 17), (u64::MAX - 3, u32::MAX), (1 << 63, 16)] {
                for flags in [0, WRITE] {
                    let head = rig.send(&[(addr, len, flags)]);
                    rig.ring();
                    match rig.take_used() {
                        Some(used) => assert_eq!(used, (head, 0), "{kind:?} {addr:#x} {len}"),
                        None => drop(rig.broken(&format!("{kind:?} {addr:#x} {len}"))),
                    }
                }
            }
            if kind == Kind::Disk {
                let outside = [(MEMORY - 256, 512, WRITE), (0xc000_0000, 512, WRITE), (MEMORY, 512, WRITE)];
                for data in outside {
                    assert_eq!(rig.request(0, 0, &[data]), IOERR, "{data:x?}");
                    assert_eq!(rig.request(1, 0, &[(data.0, data.1, 0)]), IOERR, "{data:x?}");
                }
            }
        });
    }
}

#[test]
fn row_11_a_head_that_is_in_flight_is_not_taken_again() {
    attack(Kind::Net, |rig| {
        // A frame in three buffers holds the first while it looks for the others.
        for heads in [[0, 0, 1], [0, 1, 0], [0, 1, 1]] {
            let Rig { board, rings, .. } = &mut *rig;
            for index in 0..2 {
                let buffer = (DATA + 0x200 * u64::from(index), 0x200, WRITE);
                rings[0].descriptor(board, rings[0].desc, index, buffer, 0);
            }
            heads.iter().for_each(|head| rings[0].offer(board, *head));
            board.network().unwrap().send(&[0; 12 + 1400]).unwrap();
            board.process_all();
            assert_eq!(rings[0].take_used(board), None, "no half frame is handed over");
            let told = rig.broken(&format!("{heads:?}"));
            assert!(told.contains("while it is in use"), "it is not taken at all: {told}");
        }
    });
}

#[test]
fn row_13_chains_that_are_only_a_head_are_completed_and_leak_nothing() {
    attack(Kind::Disk, |rig| {
        for _ in 0..600 {
            for (chain, written) in [
                (&[(HEADER, 16, 0)][..], 0),
                (&[(HEADER, 0, 0)], 0),
                (&[(STATUS, 1, WRITE)], 1),
                (&[(STATUS, 0, WRITE)], 0),
                (&[(HEADER, 0, 0), (STATUS, 0, WRITE)], 0),
            ] {
                rig.fill(STATUS, &[0xff]);
                let head = rig.send(chain);
                rig.ring();
                assert_eq!(rig.take_used(), Some((head, written)), "{chain:x?}");
                let want = if written == 1 { IOERR } else { 0xff };
                assert_eq!(bytes::<1>(&rig.board, STATUS), [want], "{chain:x?}");
            }
        }
    });
    for kind in [Kind::Net, Kind::Rng, Kind::Console] {
        attack(kind, |rig| {
            for i in 0..600 {
                let flags = [0, WRITE][i % 2];
                let head = rig.send(&[(DATA, 0, flags)]);
                rig.ring();
                assert_eq!(rig.take_used(), Some((head, 0)), "{kind:?}");
            }
        });
    }
}

#[test]
fn row_14_a_request_past_the_end_of_the_disk_is_an_error_as_a_whole() {
    attack(Kind::Disk, |rig| {
        for sector in [u64::MAX, u64::MAX / 512, 1 << 55, (1 << 55) - 1, SECTORS, SECTORS + 1] {
            assert_eq!(rig.request(0, sector, &[(DATA, 512, WRITE)]), IOERR, "{sector:#x}");
            assert_eq!(rig.request(1, sector, &[(DATA, 512, 0)]), IOERR, "{sector:#x}");
        }
        rig.fill(DATA, &[0x77; 1024]);
        // Either half would fit.
        assert_eq!(rig.request(1, SECTORS - 1, &[(DATA, 512, 0), (DATA + 512, 512, 0)]), IOERR);
        assert_eq!(rig.request(0, SECTORS - 1, &[(DATA, 512, WRITE), (DATA + 512, 512, WRITE)]), IOERR);
        assert_eq!(bytes::<1024>(&rig.board, DATA), [0x77; 1024], "nothing was read");
        assert_eq!(rig.request(0, SECTORS - 1, &[(DATA, 512, WRITE)]), 0);
        assert_eq!(bytes::<512>(&rig.board, DATA), [0; 512], "nothing was written");
        assert_eq!(rig.request(1, 0, &[(DATA, 511, 0)]), IOERR, "half a sector");
    });
}

#[test]
fn row_15_buffers_of_the_wrong_direction_are_an_error() {
    attack(Kind::Disk, |rig| {
        assert_eq!(rig.request(0, 0, &[(DATA, 512, 0)]), IOERR, "a read into what is readable");
        assert_eq!(rig.request(1, 0, &[(DATA, 512, WRITE)]), IOERR, "a write from what is writable");
        assert_eq!(rig.request(1, 0, &[(DATA, 512, WRITE), (DATA, 512, 0)]), IOERR, "out of order");
        for (kind, chain, written) in [
            (0, [(HEADER, 16, WRITE), (DATA, 512, WRITE), (STATUS, 1, WRITE)], 1),
            (1, [(HEADER, 16, WRITE), (DATA, 512, 0), (STATUS, 1, WRITE)], 1),
            (1, [(HEADER, 16, 0), (DATA, 512, 0), (STATUS, 1, 0)], 0),
        ] {
            rig.header(kind, 0);
            let head = rig.send(&chain);
            rig.ring();
            assert_eq!(rig.take_used(), Some((head, written)), "{chain:x?}");
        }
        let mut first = [0; 512];
        std::os::unix::fs::FileExt::read_exact_at(&rig.disk, &mut first, 0).unwrap();
        assert_eq!(first, [0; 512], "nothing was written");
    });
    for kind in [Kind::Net, Kind::Rng, Kind::Console] {
        attack(kind, |rig| {
            let wrong = if kind == Kind::Rng { 0 } else { WRITE };
            rig.complete(&[(DATA, 512, wrong)], 0);
            assert_eq!(rig.status() & NEEDS_RESET, 0);
        });
    }
}

#[test]
fn row_16_what_a_balloon_cannot_have_is_ignored_and_counted() {
    attack(Kind::Balloon, |rig| {
        let before = rig.board.balloon().unwrap();
        let pfns: Vec<u8> =
            [0xffff_ffffu32, 0xc_0000, 0x100, 0xc0, 0xc0].iter().flat_map(|pfn| pfn.to_le_bytes()).collect();
        rig.fill(DATA, &pfns);
        rig.complete(&[(DATA, pfns.len() as u32, 0)], 0);
        let after = rig.board.balloon().unwrap();
        assert_eq!(after.ignored, before.ignored + 3, "those that are not memory");
        assert_eq!(after.inflated.claimed.get(), before.inflated.claimed.get() + 2 * 4096, "twice is twice");
        // A list of 4 GiB, which ends in the middle of a number and past the end of memory.
        rig.complete(&[(DATA, 2, 0), (DATA + 4096, u32::MAX, 0)], 0);
        let long = rig.board.balloon().unwrap();
        let taken = (long.inflated.claimed.get() - after.inflated.claimed.get()) / 4096 + long.ignored
            - after.ignored;
        assert!((1..=4096).contains(&taken), "{taken} numbers of it");
        let after = long;
        rig.fill(DATA, &[7; 4096]);
        let ranges =
            [(1, 4096), (0, u32::MAX), (0, 100), (MEMORY - 4096, 8192), (0xfee0_0000, 4096), (1 << 40, 4096)];
        for queue in [3, 4] {
            let head = rig.rings[queue].send(&rig.board, &ranges.map(|(at, len)| (at, len, WRITE)));
            rig.regs.ring(&rig.board, queue as u16);
            rig.board.process();
            assert_eq!(rig.rings[queue].take_used(&rig.board), Some((head, 0)));
        }
        // Nobody has asked for hints: they are not even looked at.
        assert_eq!(rig.board.balloon().unwrap().ignored, after.ignored + 6);
        assert_eq!(rig.board.balloon().unwrap().reported.claimed.get(), 0);
        assert_eq!(bytes::<4096>(&rig.board, DATA), [7; 4096]);
        assert_eq!(rig.status() & NEEDS_RESET, 0);
    });
}

#[test]
fn row_22_input_that_the_guest_does_not_read_waits_outside() {
    attack(Kind::Disk, |rig| {
        let typed: Vec<u8> = (0..100_000u32).map(|i| i as u8).collect();
        let taken = rig.board.input(&typed);
        assert!((1..=8192).contains(&taken), "{taken} bytes were taken");
        let mut room = 0;
        for _ in 0..100 {
            room += rig.board.input(&typed);
        }
        assert!(room <= 64, "{room} more, with nobody reading");
        for (i, wanted) in typed[..taken].iter().enumerate() {
            let mut byte = [0];
            rig.board.read_pio(0x3f8, &mut byte).unwrap();
            assert_eq!(byte[0], *wanted, "byte {i}");
        }
        assert!(rig.board.input(b"again") > 0);
    });
}

#[test]
fn reset_in_the_middle_of_requests_forgets_them() {
    for kind in KINDS {
        attack(kind, |rig| {
            let flags = if kind == Kind::Rng { WRITE } else { 0 };
            for round in 0..20 {
                (0..30).for_each(|_| {
                    rig.send(&[(DATA, 16, flags)]);
                });
                if round % 2 == 0 {
                    rig.regs.ring(&rig.board, rig.victim());
                }
                if round % 3 == 0 {
                    rig.board.pause();
                    rig.board.process();
                    rig.board.resume();
                }
                let victim = usize::from(rig.victim());
                let used = rig.rings[victim].used;
                let before: [u8; 16] = bytes(&rig.board, used);
                rig.regs.set_status(&rig.board, 0);
                assert_eq!(rig.board.process(), 0);
                rig.board.process_all();
                assert_eq!(bytes::<16>(&rig.board, used), before, "nothing is served after a reset");
                assert_eq!(read(&rig.board, rig.regs.common + 0x14, 1), 0);
                rig.restart();
                rig.good();
            }
        });
    }
}
