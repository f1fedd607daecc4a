#![forbid(unsafe_code)]
//! What goes to others: frames of segments, uplinks, captures.

use super::*;
use crate::net::testing::{FAR, NEAR, TAP, kernel_knows_uso, packet, with_a_bridge};

#[test]
fn segments_pass_uncut_between_those_who_know_them_and_are_cut_for_others() {
    let mut net = Net::new([access(&[1, 1, 1]), vec![PortOptions::trunk([1])]].concat());
    let tso = Offloads::CSUM | Offloads::TSO4;
    net.plugs[1].set_takes(tso);
    net.plugs[3].set_takes(tso);
    let (header, whole) = segments(ALL, mac(1), 60_000, 1400);
    net.send_with(0, header, &whole);
    let (mut passed, frame) = net.next(1).unwrap();
    assert_eq!(std::mem::take(&mut passed[2]), 54, "what its headers take");
    assert!((passed, &frame) == (header, &whole) && net.next(1).is_none());
    let (mut shifted, frame) = net.next(3).unwrap();
    assert_eq!((std::mem::take(&mut shifted[2]), shifted[6], frame.len()), (58, 38, whole.len() + 4));
    assert_eq!(frame[12..16], [0x81, 0, 0, 1]);
    let cut = net.get(2);
    assert_eq!(cut.len(), 43);
    assert!(cut[..42].iter().all(|f| f.len() == 1454));
    let carried: Vec<u8> = cut.iter().flat_map(|f| f[54..].to_vec()).collect();
    assert!(carried == whole[54..]);
    assert_eq!(net.ports[2].statistics().sent.frames, 43);
    // A checksum that is left to do is done, and not for who does it himself.
    let (mut header, whole) = segments(ALL, mac(1), 100, 0);
    header[1] = 0;
    net.send_with(0, header, &whole);
    assert_eq!(net.next(1).unwrap(), (header, whole.clone()));
    let done = net.get(2).remove(0);
    assert_ne!(done[50..52], whole[50..52]);
    assert_eq!((&done[..50], &done[52..]), (&whole[..50], &whole[52..]));
    // More than a queue holds is dropped, and said once.
    let (header, whole) = segments(ALL, mac(1), 65_000, 48);
    net.send_with(0, header, &whole);
    assert_eq!((net.get(2).len(), net.drops(2)), (512, vec![(DropReason::QueueFull, 1)]));
}

#[test]
fn what_an_uplink_leaves_to_do_is_left_to_whom_does_it_and_done_for_others() {
    let mut net = Net::new(access(&[1, 1]));
    let tso = Offloads::CSUM | Offloads::TSO4;
    net.plugs[1].set_takes(tso);
    let (far, control) = Pair::new();
    let known = Offloads::all() - Offloads::USO;
    control.known.store(known.bits(), Ordering::SeqCst);
    net.switch.add_uplink("up".into(), Box::new(far), Offloads::empty(), &PortOptions::access(1)).unwrap();
    assert_eq!(control.taken.load(Ordering::SeqCst), known.bits(), "all that it knows, the switch takes");
    let (header, whole) = segments(ALL, mac(9), 30_000, 1400);
    control.far.send(&[&header[..], &whole].concat()).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    let (mut passed, frame) = loop {
        assert!(Instant::now() < deadline, "waited for the frame");
        if let Some(next) = net.next(1) {
            break next;
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    assert_eq!(std::mem::take(&mut passed[2]), 54, "what its headers take");
    assert!((passed, frame) == (header, whole));
    let mut cut = net.get(0);
    while cut.len() < 22 {
        assert!(Instant::now() < deadline, "waited for segments: {}", cut.len());
        cut.extend(net.get(0));
    }
    assert!(cut.len() == 22 && cut[..21].iter().all(|f| f.len() == 1454));
}

#[test]
fn an_uplink_carries_both_ways_and_is_looked_for_when_it_is_gone() {
    let mut net = Net::new(access(&[1]));
    net.set(0, |options| options.storm = RateLimit::NONE);
    let (far, control) = Pair::new();
    let options = PortOptions::trunk([1]);
    let uplink = net.switch.add_uplink("up".into(), Box::new(far), Offloads::empty(), &options).unwrap();
    let wait = |what: &str, mut f: Box<dyn FnMut() -> bool + '_>| {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !f() {
            assert!(Instant::now() < deadline, "waited for {what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    };
    for n in 0..200u32 {
        net.send(0, &frame(ALL, mac(1), &n.to_be_bytes()));
        let mut got = None;
        wait(
            "a frame at the far end",
            Box::new(|| {
                got = control.get();
                got.is_some()
            }),
        );
        assert_eq!(got.unwrap()[12..], tagged(ALL, mac(1), &[(VLAN, 1)], &n.to_be_bytes()));
        control.put(&tagged(mac(1), mac(9), &[(VLAN, 1)], &n.to_be_bytes()));
        let mut got = None;
        wait(
            "a frame from the far end",
            Box::new(|| {
                got = net.next(0);
                got.is_some()
            }),
        );
        assert_eq!(got.unwrap().1, frame(mac(1), mac(9), &n.to_be_bytes()));
    }
    // A far end that takes nothing: the queue fills, and nobody waits for it.
    for _ in 0..20_000 {
        net.send(0, &frame(ALL, mac(1), &[0; 500]));
    }
    let kept = uplink.statistics();
    let mut left = 20_000 - kept.dropped(DropReason::QueueFull);
    assert!(left < 20_000);
    wait(
        "every frame that had room",
        Box::new(|| {
            while control.get().is_some() {
                left -= 1;
            }
            left == 0
        }),
    );
    // Gone, and there again.
    control.errno.store(libc::EBADFD, Ordering::SeqCst);
    control.far.send(&[0; 60]).unwrap();
    wait(
        "the loss",
        Box::new(|| {
            net.send(0, &frame(ALL, mac(1), b""));
            uplink.statistics().dropped(DropReason::Uplink) > 0
        }),
    );
    assert_eq!(uplink.statistics().dropped(DropReason::QueueFull), kept.dropped(DropReason::QueueFull));
    let (near, far) = UnixDatagram::pair().unwrap();
    far.set_nonblocking(true).unwrap();
    *lock(&control.next) = Some(near);
    wait(
        "the new far end",
        Box::new(|| {
            net.send(0, &frame(ALL, mac(1), b""));
            far.recv(&mut [0; 100]).is_ok()
        }),
    );
    uplink.remove();
    assert!(lock(&net.switch.owner.uplinks).attached.is_empty());
}

#[test]
fn a_capture_has_every_frame_as_it_was_seen_and_ends_with_its_handle() {
    #[derive(Clone, Default)]
    struct File(Arc<Mutex<Vec<u8>>>);
    impl Write for File {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            lock(&self.0).extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut net = Net::new([access(&[10, 10]), vec![PortOptions::trunk([10])]].concat());
    let file = File::default();
    let capture = net.switch.capture(&[net.ports[0].clone(), net.ports[2].clone()], file.clone()).unwrap();
    for n in 0..100u8 {
        net.send(0, &frame(ALL, mac(1), &[n; 20]));
    }
    let summary = capture.finish().unwrap();
    assert_eq!((summary.written, summary.missed), (200, 0));
    let length = lock(&file.0).len();
    net.send(0, &frame(ALL, mac(1), &[0; 20]));
    assert_eq!(lock(&file.0).len(), length, "it has ended");
    let bytes = lock(&file.0).clone();
    let tagged = tagged(ALL, mac(1), &[(VLAN, 10)], &[7; 20]);
    assert!(bytes.windows(tagged.len()).any(|w| w == tagged));

    struct Full(usize);
    impl Write for Full {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0 =
                self.0.checked_sub(bytes.len()).ok_or(std::io::Error::from_raw_os_error(libc::ENOSPC))?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let capture = net.switch.capture(&[], Full(2000)).unwrap();
    for n in 0..100u8 {
        net.send(0, &frame(ALL, mac(1), &[n; 20]));
    }
    let error = capture.finish().unwrap_err();
    assert_eq!(error.errno(), Some(libc::ENOSPC), "{error}");
    assert!(net.switch.capture(&[], Full(10)).is_err());
}

/// Datagrams sent as one are the host's kernel's to cut, where it knows how to; the switch does it otherwise.
#[test]
fn an_interface_of_the_hosts_is_left_what_its_kernel_knows() {
    with_a_bridge(false, |mut far| {
        let mut net = Net::new(access(&[1]));
        net.set(0, |options| options.storm = RateLimit::NONE);
        let uplink = net.switch.add_tap("uplink", TAP, &PortOptions::access(1)).unwrap();
        far.settle(|| net.send(0, &frame(FAR, NEAR, &[0; 46])));
        for v4 in [true, false] {
            let before = uplink.statistics().sent.frames;
            let (whole, header) = packet(true, v4, false, 10_000, 1400);
            net.send_with(0, header, &whole);
            assert!(far.datagrams(v4, 10_000, 1400) == whole[whole.len() - 10_000..]);
            let sent = uplink.statistics().sent.frames - before;
            assert_eq!(sent, if kernel_knows_uso() { 1 } else { 8 });
        }
    });
}
