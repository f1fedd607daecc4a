#![forbid(unsafe_code)]

use vm_memory::Bytes;

use super::*;
use crate::virtio::queue_driver::{Dice, Driver, INDIRECT, NEXT, WRITE, bend};

/// A descriptor: address, length, flags, next.
type Raw = (u64, u32, u16, u16);

fn driver() -> Driver {
    Driver::new(&Memory::new(1 << 20).unwrap(), 0x4000, 16)
}

fn pop(driver: &Driver, queue: &mut Queue) -> Result<Option<Chain>, QueueFault> {
    let mut chain = Chain::with_capacity(16);
    Ok(queue.pop(&driver.memory, &mut chain)?.then_some(chain))
}

#[test]
fn chains_come_in_order_and_go_back_with_their_length() {
    let mut driver = driver();
    let mut queue = driver.queue();
    for _ in 0..if cfg!(miri) { 20 } else { 100 } {
        let a = driver.send(&[(0x1_0000, 16, 0), (0x1_1000, 512, WRITE), (0x1_2000, 1, WRITE)]);
        let b = driver.send(&[(0x1_3000, 8, 0)]);
        let chain = pop(&driver, &mut queue).unwrap().unwrap();
        assert_eq!((chain.head, chain.readable_len(), chain.writable_len()), (a, 16, 513));
        assert_eq!(pop(&driver, &mut queue).unwrap().unwrap().head, b);
        assert!(pop(&driver, &mut queue).unwrap().is_none());
        queue.complete(&driver.memory, b, 0).unwrap();
        queue.complete(&driver.memory, a, 513).unwrap();
        assert_eq!([driver.take_used(), driver.take_used()], [Some((b, 0)), Some((a, 513))]);
    }
}

/// vhost-net serves a queue, and gives it back; or it has lost what it was about to send.
#[test]
fn who_takes_a_queue_over_goes_on_behind_the_last_chain_that_was_completed() {
    let mut driver = driver().with_event_idx();
    let (mut queue, mut other) = (driver.queue(), driver.queue());
    for turn in 0..if cfg!(miri) { 7 } else { 30 } {
        let heads = [(); 5].map(|()| driver.send(&[(0x1_0000, 16, 0)]));
        other.take_over(&driver.memory);
        for head in &heads[..3] {
            assert_eq!(pop(&driver, &mut other).unwrap().unwrap().head, *head);
            other.complete(&driver.memory, *head, 0).unwrap();
        }
        // Taken, and never completed.
        let mut lost = driver.queue();
        lost.take_over(&driver.memory);
        assert_eq!(pop(&driver, &mut lost).unwrap().unwrap().head, heads[3]);
        queue.take_over(&driver.memory);
        assert_eq!(queue.place().1, turn * 5 + 3);
        // The driver has heard of those, and wants to of the next.
        assert_eq!([(); 3].map(|()| driver.take_used().unwrap().0), heads[..3]);
        for head in &heads[3..] {
            assert_eq!(pop(&driver, &mut queue).unwrap().unwrap().head, *head);
            queue.complete(&driver.memory, *head, 0).unwrap();
        }
        assert!(pop(&driver, &mut queue).unwrap().is_none());
        queue.notify(&driver.memory);
        assert!(driver.interrupt.take_raised() > 0, "of the last two");
        assert_eq!([(); 2].map(|()| driver.take_used().unwrap().0), heads[3..]);
    }
}

#[test]
fn registers_that_cannot_be_are_refused() {
    let driver = driver();
    type Bend = fn(&mut QueueSetup);
    let bends: [Bend; 8] = [
        |s| s.size = 0,
        |s| s.size = 12,
        |s| s.size = 32,
        |s| s.desc = 0x4001,
        |s| s.desc = (1 << 20) - 16,
        |s| s.avail = u64::MAX - 1,
        |s| s.used = u64::MAX - 3,
        |s| s.used = 0xc000_0000,
    ];
    for (i, bend) in bends.iter().enumerate() {
        let mut setup = driver.setup();
        bend(&mut setup);
        assert!(Queue::new(setup, &driver.memory).is_err(), "{i}");
    }
}

/// Row 7 of the hostile inputs.
#[test]
fn an_available_index_beyond_the_size_is_a_fault() {
    let mut driver = driver();
    let mut queue = driver.queue();
    driver.set_avail(17);
    assert_eq!(pop(&driver, &mut queue).err(), Some(QueueFault::AvailAhead { ahead: 17, size: 16 }));
    driver.set_avail(0);
    assert_eq!(pop(&driver, &mut queue).err(), Some(QueueFault::Broken), "until it is built again");
    assert!(queue.complete(&driver.memory, 0, 0).is_err());
    assert!(pop(&driver, &mut driver.queue()).unwrap().is_none());
}

/// Rows 8 and 10.
#[test]
fn a_chain_that_breaks_the_rules_is_a_fault() {
    let table = 0x2_0000;
    let direct: [(&[Raw], QueueFault); 8] = [
        (&[(0x8000, 1, NEXT, 0)], QueueFault::TooLong(16)),
        (&[(0x8000, 1, NEXT, 1), (0x8000, 1, NEXT, 0)], QueueFault::TooLong(16)),
        (&[(0x8000, 1, NEXT, 16)], QueueFault::Index(16)),
        (&[(table, 32, INDIRECT | NEXT, 1)], QueueFault::IndirectNext),
        (&[(table, 17, INDIRECT, 0)], QueueFault::IndirectLength(17)),
        (&[(table, 0, INDIRECT, 0)], QueueFault::IndirectLength(0)),
        (&[(u64::MAX - 3, 8, 0, 0)], QueueFault::Wraps(u64::MAX - 3)),
        (&[(0x1f_0000, 32, INDIRECT, 0)], QueueFault::Table(0x1f_0000)),
    ];
    let indirect: [(&[Raw], QueueFault); 4] = [
        (&[(table, 32, INDIRECT, 0)], QueueFault::NestedIndirect),
        (&[(0x8000, 1, NEXT, 0)], QueueFault::TooLong(16)),
        (&[(0x8000, 1, NEXT, 2)], QueueFault::Index(2)),
        (&[(u64::MAX, 2, 0, 0)], QueueFault::Wraps(u64::MAX)),
    ];
    for (descriptors, fault) in direct {
        let mut driver = driver();
        for (i, d) in descriptors.iter().enumerate() {
            driver.descriptor(driver.table(), i as u16, *d);
        }
        driver.offer(0);
        assert_eq!(pop(&driver, &mut driver.queue()).err(), Some(fault));
    }
    for (descriptors, fault) in indirect {
        let mut driver = driver();
        driver.descriptor(driver.table(), 0, (table, 32, INDIRECT, 0));
        for (i, d) in descriptors.iter().enumerate() {
            driver.descriptor(table, i as u16, *d);
        }
        driver.offer(0);
        assert_eq!(pop(&driver, &mut driver.queue()).err(), Some(fault));
    }
}

#[test]
fn an_indirect_table_may_be_as_long_as_the_queue_and_follow_direct_ones() {
    let mut driver = driver();
    let table = 0x2_0008;
    for i in 0..15 {
        driver.descriptor(table, i, (0x8000, 4, if i < 14 { NEXT } else { WRITE }, i + 1));
    }
    driver.descriptor(driver.table(), 0, (0x9000, 4, NEXT, 5));
    driver.descriptor(driver.table(), 5, (table, 15 * 16, INDIRECT | WRITE, 0));
    driver.offer(0);
    let chain = pop(&driver, &mut driver.queue()).unwrap().unwrap();
    assert_eq!((chain.readable.len(), chain.writable.len(), chain.ordered), (15, 1, true));
}

/// Row 9: the sum is there to be refused, not wrapped.
#[test]
fn more_than_four_gib_in_a_chain_are_counted() {
    let mut driver = driver();
    driver.send(&[(0, u32::MAX, 0), (0, u32::MAX, 0), (0, u32::MAX, WRITE)]);
    let chain = pop(&driver, &mut driver.queue()).unwrap().unwrap();
    assert_eq!(chain.readable_len(), 2 * u64::from(u32::MAX));
}

/// Row 11.
#[test]
fn a_head_in_use_cannot_be_taken_again() {
    let mut driver = driver();
    let mut queue = driver.queue();
    let head = driver.send(&[(0x8000, 16, 0)]);
    pop(&driver, &mut queue).unwrap().unwrap();
    driver.offer(head);
    assert_eq!(pop(&driver, &mut queue).err(), Some(QueueFault::InUse(head)));
}

#[test]
fn a_head_is_completed_once() {
    let mut driver = driver();
    let mut queue = driver.queue();
    let head = driver.send(&[(0x8000, 16, 0)]);
    pop(&driver, &mut queue).unwrap().unwrap();
    queue.complete(&driver.memory, head, 0).unwrap();
    assert_eq!(queue.complete(&driver.memory, head, 0), Err(QueueFault::NotInUse(head)));
    assert_eq!(queue.complete(&driver.memory, 999, 0), Err(QueueFault::NotInUse(999)));
}

#[test]
fn several_are_completed_at_once_and_the_interrupt_counts_them_all() {
    let mut driver = driver().with_event_idx();
    let mut queue = driver.queue();
    let memory = driver.memory.clone();
    for round in 0..if cfg!(miri) { 10 } else { 40u32 } {
        let mut all = Vec::new();
        for i in 0..3 {
            driver.send(&[(0x8000, 8, WRITE)]);
            all.push((pop(&driver, &mut queue).unwrap().unwrap().head, i));
        }
        queue.complete_all(&memory, &all).unwrap();
        queue.notify(&memory);
        assert_eq!(driver.interrupt.take_raised(), 1, "{round}");
        for (head, written) in all {
            assert_eq!(driver.take_used(), Some((head, written)));
        }
    }
}

/// Rows 13 and 15: the device decides, the ring is sound.
#[test]
fn empty_and_flipped_chains_are_handed_out() {
    let mut driver = driver();
    let mut queue = driver.queue();
    driver.send(&[(0x8000, 0, 0)]);
    driver.send(&[(0x8000, 8, WRITE), (0x9000, 8, 0)]);
    let empty = pop(&driver, &mut queue).unwrap().unwrap();
    assert_eq!((empty.readable.len(), empty.writable.len()), (0, 0));
    assert!(!pop(&driver, &mut queue).unwrap().unwrap().ordered);
}

#[test]
fn a_chain_given_back_is_the_next_one_again() {
    let mut driver = driver();
    let mut queue = driver.queue();
    let head = driver.send(&[(0x8000, 8, 0)]);
    for _ in 0..3 {
        let chain = pop(&driver, &mut queue).unwrap().unwrap();
        assert_eq!(chain.head, head);
        queue.give_back(chain.head);
    }
    assert_eq!(queue.position(), (0, 0));
    let again = Queue::new(queue.into_setup(), &driver.memory);
    assert_eq!(pop(&driver, &mut again.unwrap()).unwrap().unwrap().head, head);
}

#[test]
fn the_interrupt_is_raised_when_the_driver_wants_it() {
    for event_idx in [false, true] {
        let mut driver = driver();
        driver = if event_idx { driver.with_event_idx() } else { driver };
        let mut queue = driver.queue();
        let round = |driver: &mut Driver, queue: &mut Queue| {
            let head = driver.send(&[(0x8000, 8, 0)]);
            pop(driver, queue).unwrap().unwrap();
            queue.complete(&driver.memory, head, 0).unwrap();
            queue.notify(&driver.memory);
            driver.interrupt.take_raised()
        };
        assert_eq!(round(&mut driver, &mut queue), 1);
        queue.notify(&driver.memory);
        assert_eq!(driver.interrupt.take_raised(), 0, "nothing new");
        if event_idx {
            assert_eq!(round(&mut driver, &mut queue), 0, "used_event has not moved");
            while driver.take_used().is_some() {}
            assert_eq!(round(&mut driver, &mut queue), 1);
        } else {
            assert_eq!(round(&mut driver, &mut queue), 1);
            driver.memory.write_obj(1u16, GuestAddress(driver.table() + 0x2000)).unwrap();
            assert_eq!(round(&mut driver, &mut queue), 0, "VRING_AVAIL_F_NO_INTERRUPT");
        }
    }
}

#[test]
fn draining_stops_at_the_queues_size() {
    let mut driver = driver();
    let mut queue = driver.queue();
    let memory = driver.memory.clone();
    let mut chain = Chain::with_capacity(16);
    let mut served = 0;
    driver.send(&[(0x8000, 8, 0)]);
    // A driver that makes a new one available for each that is completed: without a bound, for ever.
    let more = queue.drain(&memory, &mut chain, |queue, chain| {
        served += 1;
        queue.complete(&memory, chain.head, 0)?;
        driver.send(&[(0x8000, 8, 0)]);
        Ok(Next::More)
    });
    assert_eq!((more, served), (Ok(true), 16));
}

#[test]
fn bent_rings_neither_panic_nor_hang() {
    let mut dice = Dice(0x5eed);
    let mut driver = driver();
    let mut queue = driver.queue();
    let (mut taken, mut faults) = (0, 0);
    let mut chain = Chain::with_capacity(16);
    // Miri takes a thousand times as long.
    let (rounds, least) = if cfg!(miri) { (100, 5) } else { (20_000, 1000) };
    for _ in 0..rounds {
        bend(&mut driver, &mut dice);
        let memory = driver.memory.clone();
        let done = queue.drain(&memory, &mut chain, |queue, chain| {
            taken += 1;
            let _ = chain.reader(&memory).read_array::<16>();
            let _ = chain.writer(&memory).write(&[0; 3]);
            queue.complete(&memory, chain.head, 0).map(|()| Next::More)
        });
        if done.is_err() {
            faults += 1;
            driver.reset();
            queue = driver.queue();
        }
    }
    assert!(taken > least && faults > least, "{taken} {faults}");
}
