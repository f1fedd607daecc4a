//! Frames and the bell in every order: a reader that sleeps until the bell rings gets every frame.

use std::os::fd::AsFd;
use std::sync::Arc;

use loom::thread;

use super::queue::Queue;
use crate::sys::sync::{check, is_readable, poll};

crate::models! {
    a_reader_that_sleeps_at_the_bell_gets_every_frame,
    a_queue_that_is_closed_amid_it_works_when_it_is_opened_again,
}

fn queue() -> Arc<Queue> {
    let queue = Queue::new().unwrap();
    queue.open();
    Arc::new(queue)
}

fn put(queue: &Queue, byte: u8) {
    let mut buffer = queue.take(14).unwrap();
    buffer[..14].fill(byte);
    queue.put(buffer, 14, None);
}

/// Reads as a card's worker does, until `most` frames came: empties the queue, and sleeps at the bell.
fn read(queue: &Queue, most: usize) -> Vec<u8> {
    let (mut got, mut used) = (Vec::new(), None);
    while got.len() < most {
        poll(queue.bell().as_fd());
        while let Some(item) = queue.pop(used.take()) {
            got.push(item.bytes()[0]);
            used = Some(item.into_buffer());
        }
    }
    got
}

fn a_reader_that_sleeps_at_the_bell_gets_every_frame() {
    check(2, || {
        let queue = queue();
        let senders = [1, 3].map(|first| {
            let queue = queue.clone();
            thread::spawn(move || {
                put(&queue, first);
                assert!(queue.put_short(14, |buffer| buffer[..14].fill(first + 1)));
            })
        });
        let got = read(&queue, 4);
        senders.into_iter().for_each(|sender| sender.join().unwrap());
        let of = |first: u8| {
            got.iter().copied().filter(|byte| (first..first + 2).contains(byte)).collect::<Vec<_>>()
        };
        assert_eq!((of(1), of(3)), (vec![1, 2], vec![3, 4]), "each sender's in order");
        assert!(queue.pop(None).is_none() && !is_readable(queue.bell().as_fd()));
    });
}

fn a_queue_that_is_closed_amid_it_works_when_it_is_opened_again() {
    check(3, || {
        let queue = queue();
        let sender = queue.clone();
        let sender = thread::spawn(move || {
            if let Some(buffer) = sender.take(14) {
                sender.put(buffer, 14, None);
            }
        });
        queue.close();
        queue.open();
        sender.join().unwrap();
        // It came before the end, amid it, or after the new beginning: from before there is nothing.
        let waits = queue.pop(None).is_some();
        assert!(
            queue.pop(None).is_none() && !is_readable(queue.bell().as_fd()),
            "it rings for nothing: {waits}"
        );
        put(&queue, 9);
        assert_eq!(read(&queue, 1), [9]);
    });
}
