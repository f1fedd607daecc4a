//! Buffers that a card has posted, in every order of those who fill them and of their owner.

use std::os::fd::AsFd;
use std::sync::Arc;

use loom::thread;

use super::landing::Next;
use super::queue::Queue;
use crate::memory::Memory;
use crate::sys::io::Buffers;
use crate::sys::sync::{check, poll};

crate::models! {
    whichever_way_frames_take_none_overtakes_another,
    buffers_that_were_taken_back_are_not_written_to,
    a_copy_amid_the_end_of_a_port_is_nobodys,
}

const LEN: usize = 14;

fn queue() -> Arc<Queue> {
    let queue = Queue::new().unwrap();
    queue.open();
    Arc::new(queue)
}

fn post(queue: &Queue, memory: &Memory, count: usize) {
    // No model unplugs a cable.
    let up = Arc::new(std::sync::atomic::AtomicBool::new(true));
    assert!(queue.post(&mut Buffers::of(memory.clone(), &vec![12 + LEN; count]), true, &up));
}

/// As the switch does it; the header's first byte tells frames apart.
fn send(queue: &Queue, number: u8) {
    if let Some(mut landing) = queue.land(LEN) {
        landing.write(&[0; LEN]);
        let mut header = [0; 12];
        header[0] = number;
        landing.done(header, LEN);
        return;
    }
    let mut buffer = queue.take(12 + LEN).unwrap();
    buffer[0] = number;
    queue.put(buffer, 12 + LEN, None);
}

/// Everything that came, until `most` frames have, as a card's worker takes it.
fn read(queue: &Queue, memory: &Memory, most: usize) -> Vec<u8> {
    let (mut got, mut used) = (Vec::new(), None);
    while got.len() < most {
        poll(queue.bell().as_fd());
        loop {
            match queue.next() {
                Next::Landed(landed) => got.push(landed.header[0]),
                Next::Waiting { filling } => {
                    while let Some(item) = queue.pop(used.take()) {
                        got.push(item.bytes()[0]);
                        used = Some(item.into_buffer());
                    }
                    // What was posted is used for those now, but for what is being filled, which comes by itself.
                    assert!(
                        filling > 0 || !matches!(queue.next(), Next::Landed(_)),
                        "two frames in one buffer"
                    );
                    post(queue, memory, 1);
                }
                Next::Filling | Next::Nothing => break,
            }
        }
    }
    got
}

fn whichever_way_frames_take_none_overtakes_another() {
    check(2, || {
        let (queue, memory) = (queue(), Memory::default());
        post(&queue, &memory, 1);
        let senders = [1, 3].map(|first| {
            let queue = queue.clone();
            thread::spawn(move || {
                send(&queue, first);
                send(&queue, first + 1);
            })
        });
        let got = read(&queue, &memory, 4);
        senders.into_iter().for_each(|sender| sender.join().unwrap());
        let of = |first: u8| {
            got.iter().copied().filter(|number| (first..first + 2).contains(number)).collect::<Vec<_>>()
        };
        assert_eq!((of(1), of(3)), (vec![1, 2], vec![3, 4]), "each sender's in order");
    });
}

fn buffers_that_were_taken_back_are_not_written_to() {
    check(3, || {
        let (queue, memory) = (queue(), Memory::default());
        post(&queue, &memory, 2);
        let senders = [1, 2].map(|number| {
            let queue = queue.clone();
            thread::spawn(move || send(&queue, number))
        });
        queue.withdraw();
        memory.take_back();
        senders.into_iter().for_each(|sender| sender.join().unwrap());
        let mut came = 0;
        while let Next::Landed(landed) = queue.next() {
            assert_eq!(landed.len, LEN);
            came += 1;
        }
        while queue.pop(None).is_some() {
            came += 1;
        }
        assert_eq!(came, 2);
    });
}

fn a_copy_amid_the_end_of_a_port_is_nobodys() {
    check(3, || {
        let (queue, memory) = (queue(), Memory::default());
        post(&queue, &memory, 1);
        let sender = queue.clone();
        let sender = thread::spawn(move || {
            if let Some(landing) = sender.land(LEN) {
                landing.done([1; 12], LEN);
            }
        });
        queue.close();
        queue.open();
        sender.join().unwrap();
        queue.withdraw();
        send(&queue, 9);
        let mut got = Vec::new();
        while let Next::Landed(landed) = queue.next() {
            got.push(landed.header[0]);
        }
        got.extend(queue.pop(None).map(|item| item.bytes()[0]));
        assert!(got == [9] || got == [1, 9], "{got:?}");
    });
}
