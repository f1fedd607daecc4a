//! The rows about registers, and accesses of every kind to every place.

use vmbed::internals::driver::status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET};
use vmbed::internals::driver::{NEXT, Registers, VERSION_1, ecam, read, write};
use vmbed::internals::{BAR, ECAM, WINDOW};

use super::{DATA, KINDS, Kind, Rig, attack};

/// The queue's registers, as they are selected now.
fn queue_registers(rig: &Rig) -> Vec<u64> {
    [(0x18, 2), (0x1a, 2), (0x1c, 2), (0x1e, 2), (0x20, 8), (0x28, 8), (0x30, 8)]
        .map(|(at, len)| rig.regs.get(&rig.board, at, len))
        .into()
}

fn scribble(rig: &Rig) {
    for value in [u64::MAX, 0, 1, 0x8000, 0x4000] {
        for at in 0x18..0x38 {
            [1, 2, 4, 8].iter().for_each(|len| rig.regs.set(&rig.board, at, *len, value));
        }
    }
}

#[test]
fn row_02_queue_registers_written_after_driver_ok_stay() {
    for kind in KINDS {
        attack(kind, |rig| {
            for queue in 0..rig.rings.len() as u64 {
                rig.regs.set(&rig.board, 0x16, 2, queue);
                let before = queue_registers(rig);
                scribble(rig);
                assert_eq!(queue_registers(rig), before);
                rig.good();
            }
            // From its enabling on, too, and a queue that never was enabled.
            for (enabled, status) in [(true, 0xb), (false, 0xf)] {
                assert!(rig.regs.negotiate(&rig.board, VERSION_1));
                rig.regs.set(&rig.board, 0x16, 2, 0);
                rig.regs.set(&rig.board, 0x1c, 2, enabled.into());
                rig.regs.set_status(&rig.board, status);
                let before = queue_registers(rig);
                scribble(rig);
                assert_eq!(queue_registers(rig), before, "enabled: {enabled}");
            }
            assert!(rig.board.events().next_event().is_some(), "without queues it cannot serve");
            rig.restart();
        });
    }
}

#[test]
fn row_03_a_queue_select_out_of_range_reads_zero_and_writes_nothing() {
    for kind in KINDS {
        attack(kind, |rig| {
            for started in [true, false] {
                if !started {
                    rig.regs.set_status(&rig.board, 0);
                }
                let queues = rig.rings.len() as u64;
                let all = |rig: &Rig| -> Vec<_> {
                    let of = |q| {
                        rig.regs.set(&rig.board, 0x16, 2, q);
                        queue_registers(rig)
                    };
                    (0..queues).map(of).collect()
                };
                let before = all(rig);
                for select in [queues, queues + 1, 0xff, 0x100, 0x7fff, 0xffff] {
                    rig.regs.set(&rig.board, 0x16, 2, select);
                    assert_eq!(rig.regs.get(&rig.board, 0x16, 2), select);
                    assert_eq!(queue_registers(rig), [0; 7]);
                    scribble(rig);
                    assert_eq!(queue_registers(rig), [0; 7]);
                }
                assert_eq!(all(rig), before);
            }
            rig.restart();
        });
    }
}

#[test]
fn row_04_mad_accesses_to_msix_read_all_ones_and_write_nothing() {
    for kind in KINDS {
        attack(kind, |rig| {
            let entries = rig.rings.len() as u64 + 1;
            let whole = |rig: &Rig| -> Vec<_> {
                (0..entries * 4).map(|word| read(&rig.board, rig.regs.table + 4 * word, 4)).collect()
            };
            let before = whole(rig);
            for (page, size) in [(rig.regs.table, entries * 16), (rig.regs.pending, 8)] {
                for offset in 0..0x1000 {
                    for len in 1..=8 {
                        let good = matches!(len, 4 | 8) && offset % len == 0 && offset + len <= size;
                        if good {
                            continue;
                        }
                        let (at, width) = (page + offset, len as usize);
                        let ones = u64::MAX >> (64 - 8 * len);
                        let across = offset + len > 0x1000;
                        write(&rig.board, at, width, 0x5555_5555_5555_5555);
                        assert!(across || read(&rig.board, at, width) == ones, "{len} at {at:#x}");
                    }
                }
            }
            assert_eq!(whole(rig), before);
        });
    }
}

#[test]
fn row_05_a_queue_size_that_cannot_be_is_refused() {
    for kind in KINDS {
        attack(kind, |rig| {
            rig.regs.set_status(&rig.board, 0);
            let max = rig.regs.get(&rig.board, 0x18, 2);
            for size in [0, 3, max - 1, max + 1, 2 * max, 0x8000, 0xffff] {
                assert!(rig.regs.negotiate(&rig.board, VERSION_1));
                for queue in 0..rig.rings.len() {
                    let mut bad = rig.rings[queue].clone();
                    bad.size = size as u16;
                    rig.regs.set_queue(&rig.board, queue as u16, &bad, 1);
                    assert_eq!(rig.regs.get(&rig.board, 0x18, 2), 0, "{size} is refused");
                    assert_eq!(rig.regs.get(&rig.board, 0x1c, 2), 0, "{size} is not enabled");
                }
                rig.regs.set_status(&rig.board, 0xf);
                assert_eq!(rig.status() & NEEDS_RESET, NEEDS_RESET, "no queue to serve");
                assert!(rig.board.events().next_event().is_some());
                rig.board.process_all();
            }
            rig.regs.set_status(&rig.board, 0);
            // 0x10000 does not fit the register.
            rig.regs.set(&rig.board, 0x18, 4, 0x1_0000);
            assert_eq!(rig.regs.get(&rig.board, 0x18, 2), max);
            rig.restart();
        });
    }
}

#[test]
fn rings_that_cannot_be_break_the_device_only() {
    for kind in KINDS {
        attack(kind, |rig| {
            let size = rig.rings[0].size;
            for (part, address) in [(0, 0x1008), (1, 0x1001), (2, 0x1002), (0, !15), (0, 0xf_fff0)]
                .into_iter()
                .chain([(1, u64::MAX - 1), (2, !3), (2, 0xc000_0000), (1, 0xf_fffe)])
            {
                assert!(rig.regs.negotiate(&rig.board, VERSION_1));
                for queue in 0..rig.rings.len() {
                    let mut bad = rig.rings[queue].clone();
                    *[&mut bad.desc, &mut bad.avail, &mut bad.used][part] = address;
                    rig.regs.set_queue(&rig.board, queue as u16, &bad, 1);
                }
                rig.regs.set_status(&rig.board, 0xf);
                assert_eq!(rig.status() & NEEDS_RESET, NEEDS_RESET, "{part} at {address:#x}, size {size}");
                rig.board.process_all();
                assert!(rig.board.events().next_event().is_some());
            }
            rig.restart();
        });
    }
}

#[test]
fn row_23_every_port_and_every_width_everywhere() {
    attack(Kind::Disk, |rig| {
        for port in 0..=u16::MAX {
            for len in [1, 2, 4, 3, 8, 0] {
                let mut data = [0; 8];
                rig.board.read_pio(port, &mut data[..len]).unwrap();
                for value in [0, 0xff, 0x55] {
                    rig.board.write_pio(port, &[value; 8][..len]).unwrap();
                }
            }
        }
        let mut data = [0; 4];
        rig.board.read_pio(0x80, &mut data).unwrap();
        assert_eq!(data, [0xff; 4], "nobody answers");
        let edges = [0, WINDOW.start, WINDOW.end, ECAM.start, ECAM.end, 0xfec0_0000, 0xfec0_1000, 1 << 32];
        let more = [rig.regs.bar + BAR, 1 << 40, 1 << 63, u64::MAX, 0xfee0_0000, 0xfffb_c000];
        for edge in edges.into_iter().chain(more) {
            for near in -20..20i64 {
                for len in 0..=16 {
                    let at = edge.wrapping_add_signed(near);
                    let mut data = [0; 16];
                    rig.board.read_mmio(at, &mut data[..len]).unwrap();
                    rig.board.write_mmio(at, &[0xff; 16][..len]).unwrap();
                }
            }
        }
        assert_eq!(read(&rig.board, 1 << 40, 8), u64::MAX);
        // The host bridge and an empty place have been written to as well: what is ours is as it was.
        recover(rig);
    });
}

/// After anything at all was written to configuration space: the BAR back, decoding on, MSI-X off.
fn recover(rig: &mut Rig) {
    let at = |register| ecam(1, register);
    let msix = rig.regs.msix;
    write(&rig.board, at(0x10), 4, rig.regs.bar & 0xffff_ffff);
    write(&rig.board, at(0x14), 4, rig.regs.bar >> 32);
    write(&rig.board, at(4), 2, 6);
    write(&rig.board, at(msix + 2), 2, 0);
    let found = Registers::find(&rig.board, 1).unwrap();
    assert_eq!((found.bar, found.common, found.msix), (rig.regs.bar, rig.regs.common, msix));
    rig.restart();
    while rig.board.events().next_event().is_some() {}
}

#[test]
fn configuration_space_takes_every_access() {
    for kind in KINDS {
        attack(kind, |rig| {
            let before: Vec<_> = (0..64).map(|i| read(&rig.board, ecam(1, 4 * i), 4)).collect();
            for device in [1, 0, 2, 31] {
                for value in [0, u64::MAX, 0x5555_5555_5555_5555, 0x1234_5678_9abc_def0] {
                    for offset in (0..0x108).chain(0xff8..0x1000) {
                        for len in 1..=8 {
                            let _ = read(&rig.board, ecam(device, offset), len);
                            write(&rig.board, ecam(device, offset), len, value);
                        }
                        rig.board.process();
                    }
                }
            }
            recover(rig);
            // Identity, class, capabilities: nothing of that is the driver's to change.
            let after: Vec<_> = (0..64).map(|i| read(&rig.board, ecam(1, 4 * i), 4)).collect();
            for i in [0, 2, 11, 13] {
                assert_eq!(after[i], before[i], "register {:#x}", 4 * i);
            }
        });
    }
}

#[test]
fn the_bar_takes_every_access() {
    for kind in KINDS {
        attack(kind, |rig| {
            for value in [u64::MAX, 0, 0x0f0f_0f0f_0f0f_0f0f] {
                for offset in 0..BAR + 8 {
                    for len in [1, 2, 4, 8, 3] {
                        let _ = read(&rig.board, rig.regs.bar + offset, len);
                        write(&rig.board, rig.regs.bar + offset, len, value);
                    }
                    if offset < 0x3100 {
                        rig.board.process();
                    }
                }
            }
            recover(rig);
        });
    }
}

#[test]
fn the_window_in_configuration_space_reaches_the_bar() {
    attack(Kind::Disk, |rig| {
        let at = |register: u64| ecam(1, rig.regs.window + register);
        let aim = |offset: u64, len: u64| {
            write(&rig.board, at(4), 1, 0);
            write(&rig.board, at(8), 4, offset);
            write(&rig.board, at(12), 4, len);
        };
        aim(0x14, 1);
        assert_eq!(read(&rig.board, at(16), 1), 0xf, "the status");
        aim(0x12, 2);
        assert_eq!(read(&rig.board, at(16), 2), 1, "the number of queues");
        // Misaligned, too wide, beyond the BAR, another BAR: nothing there, and no harm.
        for (offset, len) in [(0x15, 2), (0, 8), (0, 0), (0, u64::MAX), (BAR, 4), (BAR - 2, 4), (u64::MAX, 1)]
        {
            aim(offset, len);
            for width in [1, 2, 4] {
                let _ = read(&rig.board, at(16), width);
                write(&rig.board, at(16), width, 0);
            }
        }
        assert_eq!(rig.status(), 0xf);
        aim(0x14, 1);
        write(&rig.board, at(16), 1, 0);
        assert_eq!(rig.status(), 0, "a reset through the window");
        rig.restart();
    });
}

#[test]
fn a_bar_that_moves_takes_its_doorbells_along() {
    attack(Kind::Disk, |rig| {
        let (first, notify) = (rig.regs.bar, rig.regs.notify - rig.regs.bar);
        for bar in [WINDOW.start, WINDOW.end - BAR, first + 0x10_0000, first] {
            write(&rig.board, ecam(1, 0x10), 4, bar);
            assert_eq!(rig.board.armed(), [bar + notify]);
            if bar != rig.regs.bar {
                assert_eq!(read(&rig.board, rig.regs.common + 0x14, 1), 0xff, "nobody at the old place");
            }
            rig.regs = Registers::find(&rig.board, 1).unwrap();
            rig.good();
        }
        // Where it cannot be reached, or in the way of others.
        for bar in [0, ECAM.start, 0xfec0_0000, 0xffff_8000, WINDOW.end - BAR / 2, 0xfee0_0000] {
            write(&rig.board, ecam(1, 0x10), 4, bar);
            rig.board.process();
            assert_eq!(read(&rig.board, ecam(1, 0), 2), 0x1af4);
        }
        recover(rig);
    });
}

#[test]
fn a_masked_interrupt_is_pending_until_it_is_unmasked() {
    attack(Kind::Disk, |rig| {
        let (control, function) = (rig.regs.table + 16 + 12, ecam(1, rig.regs.msix + 2));
        for (at, mask, open) in [(control, 1, 0), (function, 3 << 14, 1 << 15), (function, 0, 1 << 15)] {
            let width = if at == control { 4 } else { 2 };
            rig.board.raised(1, 1);
            assert_eq!(read(&rig.board, rig.regs.pending, 8), 0);
            write(&rig.board, at, width, mask);
            rig.good();
            assert_eq!(read(&rig.board, rig.regs.pending, 8), 2);
            write(&rig.board, at, width, open);
            assert_eq!(read(&rig.board, rig.regs.pending, 8), 0);
            assert!(rig.board.raised(1, 1) > 0, "delivered at the unmask");
        }
        // Nobody's vector.
        rig.regs.set_status(&rig.board, 0);
        rig.regs.set(&rig.board, 0x1a, 2, 2);
        assert_eq!(rig.regs.get(&rig.board, 0x1a, 2), 0xffff);
        rig.restart();
    });
}

#[test]
fn features_that_were_not_offered_are_refused() {
    for kind in KINDS {
        attack(kind, |rig| {
            let offered = rig.regs.offered(&rig.board);
            let unknown = (0..64).map(|bit| 1 << bit).filter(|bit| offered & bit == 0);
            for features in unknown.map(|bit| bit | VERSION_1).chain([0, offered & !VERSION_1, u64::MAX]) {
                assert!(!rig.regs.negotiate(&rig.board, features), "{features:#x}");
                rig.regs.set_status(&rig.board, ACKNOWLEDGE | DRIVER | DRIVER_OK);
                assert_eq!(rig.status() & (DRIVER_OK | FEATURES_OK), 0, "no service without features");
                rig.regs.ring(&rig.board, 0);
                assert_eq!(rig.board.process(), 0);
            }
            assert!(rig.regs.negotiate(&rig.board, VERSION_1));
            rig.regs.accept(&rig.board, 0);
            rig.regs.set(&rig.board, 8, 4, 1);
            assert_eq!(rig.regs.get(&rig.board, 12, 4), 1, "it is too late to change them");
            rig.restart();
        });
    }
}

#[test]
fn a_device_that_is_switched_off_at_the_bus_keeps_its_peace() {
    attack(Kind::Disk, |rig| {
        write(&rig.board, ecam(1, 4), 2, 0);
        assert_eq!(read(&rig.board, rig.regs.common, 8), u64::MAX);
        assert!(rig.board.armed().is_empty());
        rig.send(&[(DATA, 16, NEXT)]);
        rig.ring();
        write(&rig.board, ecam(1, 4), 2, 6);
        rig.restart();
    });
}
