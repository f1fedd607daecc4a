#![forbid(unsafe_code)]
//! Buffers that a card has posted, and who copies into them.

use std::os::fd::AsFd;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::memory::Memory;
use crate::net::switch::landing::{Landed, Next};
use crate::sys::io::Buffers;

/// Posts buffers of these sizes, one behind the other from that address on.
fn post(net: &Net, memory: &Memory, mut at: u64, sizes: &[usize], mergeable: bool) {
    let mut buffers = Buffers::new(memory.clone());
    for &size in sizes {
        assert!(buffers.push([(GuestAddress(at), size)].into_iter()));
        at += size as u64 + 16;
    }
    let up = Arc::new(AtomicBool::new(true));
    assert!(net.plugs[1].port().unwrap().post(&mut buffers, mergeable, &up));
    assert_eq!(buffers.len(), 0);
}

fn next(net: &Net) -> Option<Landed> {
    match net.plugs[1].port().unwrap().next() {
        Next::Landed(landed) => Some(landed),
        Next::Filling | Next::Waiting { .. } | Next::Nothing => None,
    }
}

fn stage(options: [PortOptions; 2]) -> (Net, Memory) {
    let mut net = Net::new(options);
    net.send(1, &frame(ALL, mac(1), b"here I am"));
    assert!(net.next(0).is_some());
    (net, Memory::new(1 << 20).unwrap())
}

fn read(memory: &Memory, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

#[test]
fn a_frame_is_copied_into_as_many_buffers_as_it_takes_with_its_tag_or_without() {
    for tagged_too in [false, true] {
        let to = if tagged_too { PortOptions::trunk([1]) } else { PortOptions::access(1) };
        let (mut net, memory) = stage([PortOptions::access(1), PortOptions::access(1)]);
        net.ports[1].set_options(&to).unwrap();
        post(&net, &memory, 0x1000, &[100, 700, 300, 4000], true);
        let sent = frame(mac(1), mac(0), &[7; 900]);
        net.send(0, &sent);
        let landed = next(&net).expect("it has landed");
        let seen = if tagged_too { tagged(mac(1), mac(0), &[(VLAN, 1)], &[7; 900]) } else { sent };
        assert_eq!((landed.buffers, landed.len, landed.header), (3, seen.len(), [0; 12]));
        let there = [
            read(&memory, 0x1000 + 12, 88),
            read(&memory, 0x1000 + 116, 700),
            read(&memory, 0x1000 + 832, 300),
        ];
        assert_eq!(there.concat()[..seen.len()], seen);
        assert!(next(&net).is_none());
    }
}

#[test]
fn nothing_overtakes_a_frame_that_waits_and_nothing_lands_where_there_is_no_room() {
    let (mut net, memory) = stage([PortOptions::access(1), PortOptions::access(1)]);
    // The header needs the beginning of the first; and one alone is not enough for what may not be in several.
    for (sizes, mergeable) in [(&[8, 4000][..], true), (&[100, 4000], false), (&[100, 100], true)] {
        post(&net, &memory, 0x1000, sizes, mergeable);
        net.send(0, &frame(mac(1), mac(0), &[1; 500]));
        net.send(0, &frame(mac(1), mac(0), &[2; 20]));
        assert!(matches!(net.plugs[1].port().unwrap().next(), Next::Waiting { filling: 0 }), "{sizes:?}");
        for byte in [1, 2] {
            assert_eq!(net.next(1).expect("it waits").1.last(), Some(&byte));
        }
        net.plugs[1].port().unwrap().withdraw();
    }
    post(&net, &memory, 0x1000, &[700], false);
    net.send(0, &frame(mac(1), mac(0), &[1; 500]));
    net.send(0, &frame(mac(1), mac(0), &[2; 20]));
    assert_eq!(next(&net).map(|landed| landed.len), Some(514));
    assert!(net.next(1).is_some_and(|(_, frame)| frame.len() == 34));
}

#[test]
fn what_is_not_finished_is_no_frame_and_buffers_come_back_when_nobody_copies() {
    let (net, memory) = stage([PortOptions::access(1), PortOptions::access(1)]);
    post(&net, &memory, 0x1000, &[700, 700, 700], true);
    let queue = net.plugs[1].port().unwrap();
    let (first, second) = (queue.land(100).expect("room"), queue.land(200).expect("room"));
    assert!(matches!(queue.next(), Next::Filling));
    // Somebody takes back what is posted, and has it when the last copy has ended.
    std::thread::scope(|scope| {
        let (sender, done) = mpsc::channel();
        scope.spawn(move || {
            queue.withdraw();
            sender.send(()).unwrap();
        });
        assert!(done.recv_timeout(Duration::from_millis(200)).is_err(), "one is being filled");
        second.done([3; 12], 200);
        assert!(done.recv_timeout(Duration::from_millis(200)).is_err(), "one is being filled still");
        assert!(queue.is_filled());
        drop(first);
        done.recv_timeout(Duration::from_secs(60)).expect("waited for the buffers to be given back");
    });
    assert!(queue.land(100).is_none() && !queue.is_filled(), "nothing is posted");
    assert_eq!(next(&net).map(|landed| (landed.buffers, landed.len)), Some((1, 0)));
    assert_eq!(next(&net).map(|landed| (landed.buffers, landed.len, landed.header)), Some((1, 200, [3; 12])));
}

#[test]
fn who_is_stopped_amid_a_copy_stops_nobody_else() {
    let (mut net, memory) = stage([PortOptions::access(1), PortOptions::access(1)]);
    post(&net, &memory, 0x1000, &[700; 6], true);
    let port = net.ports[1].port.clone();
    let queue = &port.queue;
    let [stuck, slow] = [900, 100].map(|len| queue.land(len).expect("room"));
    net.send(0, &frame(mac(1), mac(0), &[1; 50]));
    assert_eq!(next(&net).map(|landed| (landed.after, landed.buffers, landed.len)), Some((3, 1, 64)));
    slow.done([0; 12], 100);
    let landed = next(&net).expect("it is there now");
    assert_eq!((landed.after, landed.buffers, landed.len), (2, 1, 100));
    assert!(matches!(queue.next(), Next::Filling));
    // Nor where all that is left waits in buffers of ours.
    net.send(0, &frame(mac(1), mac(0), &[2; 1500]));
    assert!(matches!(queue.next(), Next::Waiting { filling: 2 }));
    let late = queue.land(100);
    assert!(late.is_none(), "a frame waits before it");
    assert_eq!(net.next(1).map(|(_, frame)| frame.len()), Some(1514));
    assert!(net.next(1).is_none());
    // What has come to its end goes before what came into a buffer of ours later.
    stuck.done([5; 12], 900);
    net.send(0, &frame(mac(1), mac(0), &[3; 50]));
    assert!(net.next(1).is_none());
    assert_eq!(next(&net).map(|landed| (landed.after, landed.buffers, landed.header)), Some((0, 2, [5; 12])));
    assert!(net.next(1).is_some());
}

#[test]
fn who_has_no_buffers_hears_of_what_has_landed() {
    let (mut net, memory) = stage([PortOptions::access(1), PortOptions::access(1)]);
    post(&net, &memory, 0x1000, &[700], true);
    let port = net.ports[1].port.clone();
    let queue = &port.queue;
    let rings = || crate::sys::fd::is_readable(queue.bell().as_fd());
    let slow = queue.land(100).expect("room");
    net.send(0, &frame(mac(1), mac(0), &[1; 50]));
    assert!(matches!(queue.next(), Next::Waiting { filling: 1 }) && rings());
    // All that there are are being filled: it waits.
    assert!(queue.wait_for_buffers() && !rings());
    slow.done([0; 12], 100);
    assert!(rings() && !queue.wait_for_buffers() && rings());
    assert_eq!(next(&net).map(|landed| landed.len), Some(100));
    assert!(net.next(1).is_some());
}

#[test]
fn the_next_card_on_a_port_does_not_wait_for_who_copies_to_the_one_before() {
    let (net, memory) = stage([PortOptions::access(1), PortOptions::access(1)]);
    post(&net, &memory, 0x1000, &[700], true);
    let queue = &net.ports[1].port.queue;
    let stuck = queue.land(100).expect("room");
    assert!(queue.is_filled());
    queue.close();
    assert!(queue.is_filled(), "its card is still there");
    queue.open();
    assert!(!queue.is_filled());
    queue.withdraw();
    drop(stuck);
    assert!(!queue.is_filled() && matches!(queue.next(), Next::Nothing));
}

#[test]
fn a_copy_that_ends_after_its_port_was_closed_leaves_nothing() {
    let (mut net, memory) = stage([PortOptions::access(1), PortOptions::access(1)]);
    post(&net, &memory, 0x1000, &[700, 700], true);
    let port = net.ports[1].port.clone();
    let landing = port.queue.land(100).expect("room");
    port.queue.close();
    port.queue.open();
    net.send(0, &frame(mac(1), mac(0), &[1; 50]));
    landing.done([0; 12], 100);
    net.plugs[1].port().unwrap().withdraw();
    // What was posted went with the port's end.
    assert!(next(&net).is_none());
    assert_eq!(net.next(1).map(|(_, frame)| frame.len()), Some(64), "only what came later");
    assert!(net.next(1).is_none());
}

#[test]
fn who_does_not_come_to_an_end_is_not_waited_for_for_ever() {
    let (mut net, memory) = stage([PortOptions::access(1), PortOptions::access(1)]);
    post(&net, &memory, 0x1000, &[700, 700], true);
    let port = net.ports[1].port.clone();
    let stuck = port.queue.land(100).expect("room");
    port.queue.withdraw();
    assert!(matches!(port.queue.next(), Next::Nothing), "what it copies is nobody's");
    post(&net, &memory, 0x4000, &[700], true);
    stuck.done([0; 12], 100);
    net.send(0, &frame(mac(1), mac(0), &[1; 50]));
    assert_eq!(next(&net).map(|landed| landed.len), Some(64), "only what came later");
}

#[test]
fn buffers_outside_of_the_memory_or_of_another_are_not_taken() {
    let (memory, other) = (Memory::new(1 << 20).unwrap(), Memory::new(1 << 20).unwrap());
    let mut buffers = Buffers::new(memory.clone());
    for (at, len) in [((1 << 20) - 8, 9), (0xc000_0000, 1), (u64::MAX - 3, 8)] {
        assert!(!buffers.push([(GuestAddress(0), 4), (GuestAddress(at), len)].into_iter()));
    }
    let mut foreign = Buffers::new(other);
    assert!(foreign.push([(GuestAddress(0), 4)].into_iter()));
    assert!(!buffers.append(&mut foreign) && buffers.len() == 0 && foreign.len() == 1);
    assert!(buffers.append(&mut buffers.beside()));
}
