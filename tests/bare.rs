//! Bare guests: a few instructions, devices of the embedder's, and every way in which they end. These run
//! on any KVM.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use vmbed::{Access, BareBoot, CpuMode, Device, ErrorKind, EventKind, Result, StopCause, VmConfig, VmState};

#[path = "api/guest.rs"]
mod guest;
use guest::{Port, host, real, run, wait_until};

#[test]
fn a_real_mode_guest_talks_to_a_port_and_halts() {
    let port = Arc::new(Port::default());
    // in al, 0x10; out 0x11, al; mov ax, 0x1234; out 0x10, ax; hlt
    let code = [0xe4, 0x10, 0xe6, 0x11, 0xb8, 0x34, 0x12, 0xe7, 0x10, 0xf4];
    let vm = host().builder(real(&code)).pio_device("port", 0x10, 2, port.clone()).build().unwrap();
    assert_eq!(vm.state(), VmState::Built);
    assert_eq!(run(&vm), StopCause::GuestHalt);
    assert_eq!(*port.0.lock().unwrap(), [1, 0x5a, 0, 0x34, 0x12]);
    let kinds: Vec<_> = std::iter::from_fn(|| vm.events().next_event()).map(|e| e.kind).collect();
    assert_eq!(kinds, [EventKind::Started, EventKind::Stopped(StopCause::GuestHalt)]);
}

#[test]
fn protected_and_long_mode_guests_see_their_registers() {
    let port = Arc::new(Port::default());
    // protected: mov eax, 0x11223344; out 0x10, eax; hlt
    let mut boot =
        BareBoot::new(CpuMode::Protected, 0x10_0000, [0xb8, 0x44, 0x33, 0x22, 0x11, 0xe7, 0x10, 0xf4]);
    boot.stack = 0x9000;
    let vm = host().builder(VmConfig::bare(boot)).pio_device("port", 0x10, 4, port.clone()).build().unwrap();
    assert_eq!(run(&vm), StopCause::GuestHalt);
    assert_eq!(*port.0.lock().unwrap(), [0, 0x44, 0x33, 0x22, 0x11]);
}

#[test]
fn string_output_arrives_as_single_accesses_in_order() {
    let port = Arc::new(Port::default());
    // xor ax, ax; mov ds, ax; mov si, 0x1010; mov cx, 3; mov dx, 0x10; cld; rep outsb; hlt … "abc" at 0x1010
    let mut code =
        vec![0x31, 0xc0, 0x8e, 0xd8, 0xbe, 0x10, 0x10, 0xb9, 3, 0, 0xba, 0x10, 0, 0xfc, 0xf3, 0x6e, 0xf4];
    code[16] = 0xf4;
    let mut boot = BareBoot::new(CpuMode::Real, 0x1000, code);
    boot.images.push((0x1100, b"abc".to_vec()));
    boot.images[0].1[5] = 0x00;
    boot.images[0].1[6] = 0x11;
    let vm = host().builder(VmConfig::bare(boot)).pio_device("port", 0x10, 1, port.clone()).build().unwrap();
    assert_eq!(run(&vm), StopCause::GuestHalt);
    assert_eq!(*port.0.lock().unwrap(), [0, b'a', 0, b'b', 0, b'c']);
}

#[test]
fn stop_ends_a_guest_that_spins_with_interrupts_off() {
    let vm = host().build(real(&[0xfa, 0xeb, 0xfe])).unwrap();
    vm.start().unwrap();
    assert_eq!(vm.wait_timeout(Duration::from_millis(20)).unwrap(), None);
    assert_eq!(vm.stop().unwrap(), StopCause::HostStop);
    assert_eq!(vm.state(), VmState::Stopped(StopCause::HostStop));
    assert_eq!(vm.stop().unwrap(), StopCause::HostStop, "stopping twice is fine");
}

#[test]
fn pause_stops_the_guest_and_resume_lets_it_go_on() {
    let port = Arc::new(Port::default());
    // inc cx; out 0x10, al; jmp $-5
    let vm = host()
        .builder(real(&[0x41, 0xe6, 0x10, 0xeb, 0xfb]))
        .pio_device("port", 0x10, 1, port.clone())
        .build();
    let vm = vm.unwrap();
    assert_eq!(vm.pause().unwrap_err().kind(), ErrorKind::InvalidState);
    vm.start().unwrap();
    let count = || port.writes();
    for _ in 0..20 {
        let before = count();
        wait_until("the guest writes to its port", || count() > before + 10);
        assert_eq!(vm.registers(0).unwrap_err().kind(), ErrorKind::InvalidState);
        vm.pause().unwrap();
        let (standing, registers) = (count(), vm.registers(0).unwrap());
        // The exit's instruction is complete: CX and the device agree, but between the two instructions.
        let ahead = u64::from(registers.rip == 0x1001);
        assert!((0x1000..=0x1003).contains(&registers.rip), "{registers:?}");
        assert_eq!(registers.rcx as u16, (standing + ahead) as u16, "{registers:?}");
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(count(), standing);
        vm.resume().unwrap();
    }
    assert_eq!(vm.resume().unwrap_err().kind(), ErrorKind::InvalidState);
    vm.stop().unwrap();
    assert_eq!(vm.start().unwrap_err().kind(), ErrorKind::InvalidState);
}

/// Who wrote, from where.
#[derive(Default)]
struct Roll(Mutex<Vec<(u32, u8)>>);

impl Device for Roll {
    fn read(&self, _: Access, _: &mut [u8]) -> Result<()> {
        Ok(())
    }
    fn write(&self, access: Access, data: &[u8]) -> Result<()> {
        self.0.lock().unwrap().push((access.vcpu, data[0]));
        Ok(())
    }
}

#[test]
fn as_many_vcpus_as_there_can_be_run_with_numbers_of_their_own() {
    let roll = Arc::new(Roll::default());
    // mov eax, edi; out 0x10, al; hlt
    let code = [0x66, 0x89, 0xf8, 0xe6, 0x10, 0xf4];
    let mut config = real(&code);
    config.cpus.count = 254;
    let vm = host().builder(config).pio_device("roll", 0x10, 1, roll.clone()).build().unwrap();
    assert_eq!(run(&vm), StopCause::GuestHalt);
    let mut called = roll.0.lock().unwrap().clone();
    called.sort();
    assert_eq!(called, (0..254).map(|i| (i, i as u8)).collect::<Vec<_>>());
}

#[test]
fn a_triple_fault_is_the_cause() {
    // lidt [0x1100] with limit 0; ud2
    let mut boot =
        BareBoot::new(CpuMode::Protected, 0x1000, [0x0f, 0x01, 0x1d, 0x00, 0x11, 0, 0, 0x0f, 0x0b]);
    boot.images.push((0x1100, vec![0; 6]));
    assert_eq!(run(&host().build(VmConfig::bare(boot)).unwrap()), StopCause::TripleFault);
}

#[test]
fn mmio_reaches_its_device_and_nobody_there_reads_all_ones() {
    let port = Arc::new(Port::default());
    // mov eax, [0xd0000000]; mov [0xd0000004], eax; mov eax, [0xd0001000]; mov [0xd0000008], eax; hlt
    let code = [0xa1, 0, 0, 0, 0xd0, 0xa3, 4, 0, 0, 0xd0, 0xa1, 0, 0x10, 0, 0xd0, 0xa3, 8, 0, 0, 0xd0, 0xf4];
    let boot = BareBoot::new(CpuMode::Protected, 0x1000, code);
    let vm =
        host().builder(VmConfig::bare(boot)).mmio_device("mmio", 0xd000_0000, 0x10, port.clone()).build();
    assert_eq!(run(&vm.unwrap()), StopCause::GuestHalt);
    assert_eq!(*port.0.lock().unwrap(), [4, 0x5a, 0x5a, 0x5a, 0x5a, 8, 0xff, 0xff, 0xff, 0xff]);
}

#[test]
fn a_device_in_the_guests_memory_or_over_another_is_refused_by_name() {
    let host = host();
    let builder = || host.builder(real(&[0xf4])).pio_device("first", 0x10, 4, Arc::new(Port::default()));
    let port = || Arc::new(Port::default());
    for (builder, text) in [
        (builder().pio_device("second", 0x13, 1, port()), "'second'"),
        (builder().pio_device("wide", 0xffff, 2, port()), "'wide'"),
        (builder().mmio_device("inside", 0x1000, 1, port()), "'inside'"),
        (builder().mmio_device("wraps", u64::MAX, 2, port()), "'wraps'"),
    ] {
        let error = builder.build().expect_err(text);
        assert_eq!(error.kind(), ErrorKind::InvalidArgument);
        assert!(error.to_string().contains(text), "{error}");
    }
    assert_eq!(host.usage().memory.get(), 0, "a failed build gives its reservation back");
}

#[test]
fn a_long_mode_guest_copies_from_a_device_through_pauses() {
    let port = Arc::new(Port::default());
    // mov edi, 0x2000; mov esi, 0xd0000000; mov ecx, 2; rep movsq; jmp $-19
    let code = [0xbf, 0, 0x20, 0, 0, 0xbe, 0, 0, 0, 0xd0, 0xb9, 2, 0, 0, 0, 0xf3, 0x48, 0xa5, 0xeb, 0xec];
    let boot = BareBoot::new(CpuMode::Long, 0x1000, code);
    let vm =
        host().builder(VmConfig::bare(boot)).mmio_device("mmio", 0xd000_0000, 0x10, port).build().unwrap();
    vm.start().unwrap();
    for _ in 0..50 {
        std::thread::sleep(Duration::from_millis(1));
        vm.pause().unwrap();
        vm.resume().unwrap();
    }
    vm.pause().unwrap();
    let mut copied = [0; 16];
    vm.read_memory(0x2000, &mut copied).unwrap();
    assert_eq!(copied, [0x5a; 16]);
}
