//! The rows about headers, frames and buffers for them, and about drivers that never wait.

use vmbed::internals::driver::WRITE;
use vmbed::internals::driver::status::NEEDS_RESET;

use super::{DATA, HEADER, IOERR, KINDS, Kind, MEMORY, Rig, STATUS, attack};

/// The longest that a frame may be behind its header.
const LONGEST: u64 = 65_557;
/// `CSUM`, `GUEST_CSUM`, `GUEST_TSO4`, `HOST_TSO4`: checksums and segments may be left to do, each way.
const LEFT_TO_DO: u64 = 1 | 1 << 1 | 1 << 7 | 1 << 11;

#[test]
fn row_09_a_chain_of_more_than_four_gib_is_an_error() {
    attack(Kind::Disk, |rig| {
        // Each piece is memory of the guest's, over and over, but for the first ones. In 32 bits, the last would be of one sector.
        let wraps = [vec![(DATA, 1 << 31, WRITE); 2], vec![(DATA, 512, WRITE)]].concat();
        for data in [vec![(DATA, u32::MAX, WRITE); 2], vec![(0, MEMORY as u32, WRITE); 100], wraps] {
            assert_eq!(rig.request(0, 0, &data), IOERR, "{} pieces", data.len());
            assert_eq!(rig.status() & NEEDS_RESET, 0);
        }
    });
}

#[test]
fn row_12_who_never_waits_keeps_no_more_than_the_queue_holds() {
    for kind in KINDS {
        attack(kind, |rig| {
            let victim = usize::from(rig.victim());
            let size = rig.rings[victim].size;
            // As many as fit, again and again, and nothing is taken back meanwhile.
            for _ in 0..20 {
                for _ in 0..size {
                    rig.send(&[(DATA, 16, [0, WRITE][usize::from(kind == Kind::Rng)])]);
                }
                rig.ring();
                rig.board.process_all();
                let mut taken = 0;
                while rig.take_used().is_some() {
                    taken += 1;
                }
                assert_eq!(taken, size, "{kind:?}: all of them came back");
                if let Some(far) = rig.board.network() {
                    while far.recv(&mut [0; 100]).is_ok() {}
                }
            }
            assert_eq!(rig.status() & NEEDS_RESET, 0, "{kind:?}");
        });
    }
}

#[test]
fn row_17_a_header_in_pieces_works_and_a_short_one_is_an_error() {
    attack(Kind::Disk, |rig| {
        rig.fill(DATA, &[0x42; 512]);
        let pieces = |count: u64| (0..count).map(|i| (HEADER + i, 1, 0)).collect::<Vec<_>>();
        for (count, want) in [(16, 0), (15, IOERR), (8, IOERR), (1, IOERR)] {
            rig.header(1, 3);
            rig.fill(STATUS, &[0xff]);
            let chain = [&pieces(count)[..], &[(STATUS, 1, WRITE)]].concat();
            // Without data: of no bytes where the header is whole.
            let head = rig.send(&chain);
            rig.ring();
            assert_eq!(rig.take_used().map(|used| used.0), Some(head));
            let status = vmbed::internals::driver::bytes::<1>(&rig.board, STATUS)[0];
            assert!(
                if want == 0 { status == 0 || status == IOERR } else { status == IOERR },
                "{count}: {status}"
            );
        }
        let chain = [&pieces(16)[..], &[(DATA, 512, 0), (STATUS, 1, WRITE)]].concat();
        rig.header(1, 3);
        rig.fill(STATUS, &[0xff]);
        let head = rig.send(&chain);
        rig.ring();
        assert_eq!(rig.take_used(), Some((head, 1)));
        let mut stored = [0; 512];
        std::os::unix::fs::FileExt::read_exact_at(&rig.disk, &mut stored, 3 * 512).unwrap();
        assert_eq!(stored, [0x42; 512], "a header of sixteen pieces is one");
    });
    attack(Kind::Net, |rig| {
        rig.fill(DATA, &[0; 12 + 60]);
        let mut chain: Vec<_> = (0..12).map(|i| (DATA + i, 1, 0)).collect();
        chain.push((DATA + 12, 60, 0));
        rig.complete(&chain, 0);
        assert_eq!(sent(rig), [60]);
        for short in 0..12 {
            rig.complete(&[(DATA, short, 0)], 0);
        }
        assert!(sent(rig).is_empty());
    });
}

/// The lengths of what has gone out.
fn sent(rig: &Rig) -> Vec<usize> {
    let mut room = vec![0; 1 << 17];
    std::iter::from_fn(|| rig.board.network().unwrap().recv(&mut room).ok().map(|n| n - 12)).collect()
}

#[test]
fn row_18_a_receive_buffer_outside_memory_gets_nothing() {
    attack(Kind::Net, |rig| {
        let far = rig.board.network().unwrap().try_clone().unwrap();
        let bar = rig.regs.bar;
        for (address, length) in
            [(bar, 2048), (0xc000_0000, 2048), (MEMORY - 100, 2048), (u64::MAX - 4096, 2048)]
        {
            let bad = rig.rings[0].send(&rig.board, &[(address, length, WRITE)]);
            let good = rig.rings[0].send(&rig.board, &[(DATA, 2048, WRITE)]);
            rig.regs.ring(&rig.board, 0);
            far.send(&[&[0; 12][..], &[9; 60]].concat()).unwrap();
            rig.board.process_all();
            if rig.status() & NEEDS_RESET != 0 {
                // An address that wraps: the ring itself is broken.
                while rig.board.events().next_event().is_some() {}
                rig.restart();
                rig.board.process_all();
                continue;
            }
            let used: Vec<_> = std::iter::from_fn(|| rig.rings[0].take_used(&rig.board)).collect();
            assert_eq!(used, [(bad, 0), (good, 72)], "{address:#x}: the frame goes into the next");
        }
        // What is left over came in while the rings were broken.
        rig.restart();
    });
}

#[test]
fn row_19_a_flood_without_buffers_drops_and_recovers() {
    attack(Kind::Net, |rig| {
        let far = rig.board.network().unwrap().try_clone().unwrap();
        let frame = [&[0; 12][..], &[9; 1000]].concat();
        for _ in 0..5 {
            // Nobody takes them: the cable is full at some time, and that is all.
            let mut sent = 0;
            while sent < 100_000 && far.send(&frame).is_ok() {
                sent += 1;
                if sent % 64 == 0 {
                    rig.board.process_all();
                }
            }
            assert!(sent > 0 && sent < 100_000, "a cable holds so many: {sent}");
            let mut came = 0;
            for _ in 0..sent + 10 {
                rig.rings[0].send(&rig.board, &[(DATA, 2048, WRITE)]);
                rig.regs.ring(&rig.board, 0);
                rig.board.process_all();
                came += u32::from(rig.rings[0].take_used(&rig.board).is_some());
            }
            assert_eq!(came, sent, "what was on the cable comes when there are buffers");
            rig.restart();
        }
        assert_eq!(rig.status() & NEEDS_RESET, 0);
    });
}

#[test]
fn row_20_frames_of_impossible_lengths_and_headers_are_dropped() {
    attack(Kind::Net, |rig| {
        rig.fill(DATA, &[0; 0x4000]);
        for length in 0..14 {
            rig.complete(&[(DATA, 12 + length, 0)], 0);
        }
        assert!(sent(rig).is_empty());
        // Too long, in pieces of what memory there is.
        for over in [1, 1000, 100_000] {
            let mut left = 12 + LONGEST + over;
            let mut chain = Vec::new();
            while left > 0 {
                let step = left.min(0x4000);
                chain.push((DATA, step as u32, 0));
                left -= step;
            }
            rig.complete(&chain, 0);
        }
        assert!(sent(rig).is_empty());
        // What the driver did not agree to leave to do, or cannot be where it says.
        for header in [
            [1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0],
            [0, 1, 54, 0, 0xb4, 5, 0, 0, 0, 0, 0, 0],
            [0xff; 12],
        ] {
            rig.fill(DATA, &header);
            rig.complete(&[(DATA, 12 + 60, 0)], 0);
        }
        assert!(sent(rig).is_empty());
        // The same where it was agreed on: what is left to do is behind the end of its frame, or nonsense.
        const SOUND: [u8; 12] = [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0];
        let bent = |at: usize, bytes: &[u8]| {
            let mut header = SOUND;
            header[at..at + bytes.len()].copy_from_slice(bytes);
            header
        };
        let nonsense = [
            bent(6, &[0xff, 0xff]),
            bent(6, &[43]),
            bent(8, &[0xff, 0xff]),
            bent(8, &[25]),
            bent(6, &[0xff; 4]),
            bent(4, &[0, 0]),
            bent(0, &[0]),
            bent(1, &[2]),
            bent(1, &[0x80]),
        ];
        rig.restart_with(LEFT_TO_DO);
        rig.fill(DATA, &SOUND);
        rig.complete(&[(DATA, 12 + 60, 0)], 0);
        assert_eq!(sent(rig), [60]);
        for header in nonsense {
            rig.fill(DATA, &header);
            rig.complete(&[(DATA, 12 + 60, 0)], 0);
            assert!(sent(rig).is_empty(), "{header:?}");
        }
        // And what comes in.
        let far = rig.board.network().unwrap().try_clone().unwrap();
        let head = rig.rings[0].send(&rig.board, &[(DATA, 2048, WRITE)]);
        rig.regs.ring(&rig.board, 0);
        for header in nonsense {
            far.send(&[&header[..], &[7; 60]].concat()).unwrap();
            rig.board.process_all();
            assert_eq!(rig.rings[0].take_used(&rig.board), None, "{header:?}");
        }
        far.send(&[&SOUND[..], &[7; 60]].concat()).unwrap();
        rig.board.process_all();
        assert_eq!(rig.rings[0].take_used(&rig.board), Some((head, 72)));
        rig.restart();
        let head = rig.rings[0].send(&rig.board, &[(DATA, 2048, WRITE)]);
        rig.regs.ring(&rig.board, 0);
        for length in 0..26 {
            far.send(&vec![0; length]).unwrap();
            rig.board.process_all();
        }
        assert_eq!(rig.rings[0].take_used(&rig.board), None, "no buffer is spent on them");
        far.send(&[0; 12 + 60]).unwrap();
        rig.board.process_all();
        assert_eq!(rig.rings[0].take_used(&rig.board), Some((head, 72)));
    });
}
