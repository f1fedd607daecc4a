//! The rows about vCPUs and about callbacks. (30's read-only memory: a guest has none; what is no memory takes every write, as row 23 has it.)

use std::time::Duration;

use vmbed::{BareBoot, CpuMode, Host, Platform, StopCause, VmConfig, VmState};

use crate::callbacks;
use crate::driven::beside;
use crate::guest::{SPINS, run};

fn bare(mode: CpuMode, code: &[u8]) -> VmConfig {
    VmConfig::bare(BareBoot::new(mode, 0x1000, code))
}

/// A guest as good as any is built after it, runs, and ends.
fn another_one_works(host: &Host) {
    assert_eq!(run(&host.build(bare(CpuMode::Real, &[0xf4])).unwrap()), StopCause::GuestHalt);
}

#[test]
fn row_30_a_jump_to_where_nothing_is() {
    beside(|host| {
        for mode in [CpuMode::Protected, CpuMode::Long] {
            // mov eax, 0xd0000000; jmp eax (rax)
            let vm = host.build(bare(mode, &[0xb8, 0, 0, 0, 0xd0, 0xff, 0xe0])).unwrap();
            let cause = run(&vm);
            let StopCause::VcpuFault { vcpu: 0, why } = &cause else { panic!("{mode:?}: {cause}") };
            assert!(why.contains("emulat"), "{mode:?}: {why}");
            assert_eq!(vm.stop().unwrap(), cause, "the first cause stays");
        }
        another_one_works(host);
    });
}

#[test]
fn row_30_a_triple_fault() {
    beside(|host| {
        // lidt [0x1100] with limit 0; ud2. Three other vCPUs spin, and end with it.
        let mut boot = BareBoot::new(
            CpuMode::Protected,
            0x1000,
            [0x85, 0xff, 0x75, 9, 0x0f, 0x01, 0x1d, 0, 0x11, 0, 0, 0x0f, 0x0b, 0xeb, 0xfe],
        );
        boot.images.push((0x1100, vec![0; 6]));
        let mut config = VmConfig::bare(boot);
        config.cpus.count = 4;
        let vm = host.build(config).unwrap();
        assert_eq!(run(&vm), StopCause::TripleFault);
        assert_eq!(vm.state(), VmState::Stopped(StopCause::TripleFault));
        another_one_works(host);
    });
}

/// They are stopped while they run, and after a pause, and dropped without being stopped.
fn until_it_is_stopped(platform: Platform, code: &'static [u8]) {
    beside(|host| {
        for how in ["stop", "pause", "drop"] {
            let mut config = bare(CpuMode::Real, code);
            (config.platform, config.cpus.count) = (platform, 2);
            let vm = host.build(config).unwrap();
            vm.start().unwrap();
            assert_eq!(vm.wait_timeout(Duration::from_millis(20)).unwrap(), None, "it goes on by itself");
            match how {
                "stop" => assert_eq!(vm.stop().unwrap(), StopCause::HostStop),
                "pause" => {
                    vm.pause().unwrap();
                    vm.resume().unwrap();
                    vm.pause().unwrap();
                    assert_eq!(vm.stop().unwrap(), StopCause::HostStop);
                }
                _ => drop(vm),
            }
        }
        another_one_works(host);
    });
}

#[test]
fn row_30_spinning_with_interrupts_off() {
    until_it_is_stopped(Platform::Bare, &SPINS);
}

#[test]
fn row_30_halting_for_ever() {
    // cli; hlt; jmp $-1: on a PC an interrupt might come. A bare guest that halts has ended.
    until_it_is_stopped(Platform::Pc, &[0xfa, 0xf4, 0xeb, 0xfd]);
    beside(|host| {
        for _ in 0..20 {
            let vm = host.build(bare(CpuMode::Real, &[0xfa, 0xf4, 0xeb, 0xfd])).unwrap();
            assert_eq!(run(&vm), StopCause::GuestHalt);
        }
    });
}

#[test]
fn row_33_a_callback_that_fails_or_panics() {
    beside(|_| {
        callbacks::a_device_that_fails_is_the_cause();
        callbacks::a_callback_that_panics();
    });
}

#[test]
fn row_33_a_callback_that_blocks() {
    beside(|_| callbacks::a_callback_that_blocks());
}

#[test]
fn row_33_a_callback_that_reenters() {
    beside(|_| {
        callbacks::a_callback_reenters();
        callbacks::a_callback_stops_its_vm();
    });
}

#[test]
fn row_33_a_callback_that_frees_its_vm() {
    beside(|_| {
        callbacks::a_callback_frees_its_vm();
        callbacks::other_callbacks_reenter_and_free();
    });
}
