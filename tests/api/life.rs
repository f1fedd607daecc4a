//! A VM's life, its configuration, and what the library says.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use vmbed::{
    Bytes, ErrorKind, EventKind, EventStream, Host, HostConfig, LinuxBoot, StopCause, VmConfig, VmState,
};

use crate::guest::{LONG, Port, SPINS, TALKS, host, real, run, unread, wait_until};

pub fn guest_and_device() {
    let port = Arc::new(Port::default());
    let vm = host().builder(real(&TALKS)).pio_device("port", 0x10, 8, port.clone()).build().unwrap();
    assert_eq!(vm.state(), VmState::Built);
    assert!(vm.id().0 > 0 && vm.memory_size() == 2 << 20);
    assert_eq!(vm.wait_timeout(Duration::from_millis(10)).unwrap(), None);
    assert_eq!(run(&vm), StopCause::GuestHalt);
    assert_eq!(vm.state(), VmState::Stopped(StopCause::GuestHalt));
    assert_eq!(*port.0.lock().unwrap(), [1, 0x5a]);
    let again = vm.start().unwrap_err();
    assert!(again.kind() == ErrorKind::InvalidState && again.to_string().contains("ended"), "{again}");
    drop(vm);
    assert_eq!(Arc::strong_count(&port), 1, "a VM that is gone holds no device");
}

fn readable(events: &EventStream) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::from_borrowed_fd(events.as_fd(), PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
}

pub fn events_in_order() {
    let vm = host().build(real(&SPINS)).unwrap();
    let (events, id) = (vm.events().clone(), vm.id());
    assert!(!readable(&events));
    vm.start().unwrap();
    vm.pause().unwrap();
    assert_eq!(vm.pause().unwrap_err().kind(), ErrorKind::InvalidState);
    vm.resume().unwrap();
    assert_eq!(vm.stop().unwrap(), StopCause::HostStop);
    assert!(readable(&events));
    drop(vm); // the stream outlives its VM
    let all = unread(&events);
    let kinds: Vec<_> = all.iter().map(|e| e.kind.clone()).collect();
    let stopped = EventKind::Stopped(StopCause::HostStop);
    assert_eq!(kinds, [EventKind::Started, EventKind::Paused, EventKind::Resumed, stopped]);
    for (i, event) in all.iter().enumerate() {
        assert!(event.seq == i as u64 && event.vm == id && event.count == 1, "{event:?}");
        assert!(event.time.elapsed().unwrap_or_default() < LONG && event.time <= SystemTime::now());
    }
    assert!(!readable(&events));
}

pub fn doorbells_ring() {
    // mov ax, 0x1234; out 0x12, ax; out 0x20, al; out 0x21, al; in al, 0x10; jmp $-11
    let code = [0xb8, 0x34, 0x12, 0xe7, 0x12, 0xe6, 0x20, 0xe6, 0x21, 0xe4, 0x10, 0xeb, 0xf3];
    let builder = host().builder(real(&code)).pio_doorbell("one", 0x10, 4).pio_doorbell("two", 0x20, 2);
    let vm = builder.mmio_doorbell("three", 0xd000_0000, 4).build().unwrap();
    vm.start().unwrap();
    let (mut one, mut two) = (0, 0);
    // Read slowly: what rings meanwhile is counted, and no event is lost.
    for i in 0.. {
        let event = vm.events().wait_event(LONG).expect("the guest rings within a minute");
        assert_eq!(event.seq, i);
        match &event.kind {
            EventKind::Doorbell { device, offset: 2, value: 0x1234 } if &**device == "one" => one += 1,
            EventKind::Doorbell { device, offset: 0 | 1, value: 0x34 } if &**device == "two" => two += 1,
            kind => assert_eq!((kind, i), (&EventKind::Started, 0)),
        }
        if one >= 20 && two >= 20 {
            break;
        }
        std::thread::sleep(Duration::from_micros(500));
    }
    let twice = host().builder(real(&code)).pio_doorbell("one", 0x10, 4).pio_doorbell("two", 0x13, 1).build();
    assert!(twice.expect_err("they overlap").to_string().contains("'two'"));
}

pub fn registers_and_memory() {
    let vm = host().build(real(&SPINS)).unwrap();
    let mut registers = vm.registers(0).unwrap();
    assert_eq!(registers.rip, 0x1000);
    registers.rbx = 0x1234;
    vm.set_registers(0, &registers).unwrap();
    assert_eq!(vm.registers(0).unwrap(), registers);
    assert!(vm.registers(1).unwrap_err().to_string().contains("no vCPU 1"));
    let mut bytes = [0; SPINS.len()];
    vm.read_memory(0x1000, &mut bytes).unwrap();
    assert_eq!(bytes, SPINS);
    vm.write_memory(0x2000, &TALKS).unwrap();
    assert_eq!(vm.read_memory((2 << 20) - 3, &mut [0; 4]).unwrap_err().kind(), ErrorKind::InvalidArgument);
    vm.read_memory(0, &mut []).unwrap();
    vm.start().unwrap();
    let running = vm.registers(0).unwrap_err();
    assert!(running.kind() == ErrorKind::InvalidState && running.to_string().contains("pause"), "{running}");
}

pub fn every_bad_field_at_once() {
    let mut config = VmConfig::linux(LinuxBoot::new("/nonexistent"));
    config.memory = Bytes(12345);
    config.cpus.count = 0;
    let error = config.validate().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument);
    for field in ["memory", "cpus.count"] {
        let bad: Vec<_> = error.fields().iter().filter(|f| f.field == field).collect();
        assert!(bad.len() == 1 && !bad[0].problem.is_empty(), "{field}: {error}");
    }
    let (mut nowhere, mut never) = (HostConfig::default(), HostConfig::default());
    nowhere.kvm = "/nonexistent/kvm".into();
    let error = Host::open_with(nowhere).expect_err("there is no such device");
    assert!(error.kind() == ErrorKind::NotFound && error.to_string().contains("/nonexistent/kvm"), "{error}");
    never.memory_ratio = -1.0;
    assert!(Host::open_with(never).expect_err("less than nothing").to_string().contains("memory_ratio"));
}

pub fn data_are_destroyed_once() {
    let (host, port) = (host(), Arc::new(Port::default()));
    let owners = || Arc::strong_count(&port) - 1;
    drop(host.builder(real(&TALKS)).pio_device("never built", 1, 1, port.clone()));
    assert_eq!(owners(), 0);
    // One whose place is taken makes the build fail, which ends both.
    let builder = host.builder(real(&TALKS)).pio_device("one", 0x20, 8, port.clone());
    let error = builder.pio_device("two", 0x27, 1, port.clone()).build().unwrap_err();
    assert!(error.to_string().contains("overlaps"), "{error}");
    assert_eq!(owners(), 0);
    let vm = host.builder(real(&TALKS)).pio_device("kept", 0x10, 8, port.clone()).build().unwrap();
    assert_eq!(owners(), 1);
    run(&vm);
    assert_eq!(owners(), 1);
    drop(vm);
    assert_eq!(owners(), 0);
}

static LINES: AtomicUsize = AtomicUsize::new(0);

struct Lines;

impl log::Log for Lines {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }
    fn log(&self, record: &log::Record<'_>) {
        if record.target().starts_with("vmbed") {
            LINES.fetch_add(1, Ordering::Relaxed);
        }
    }
    fn flush(&self) {}
}

pub fn log_lines_go_where_they_are_wanted() {
    log::set_logger(&Lines).unwrap();
    let lines_of_a_life = || {
        let before = LINES.load(Ordering::Relaxed);
        let vm = host().build(real(&SPINS)).unwrap();
        vm.start().unwrap();
        drop(vm);
        LINES.load(Ordering::Relaxed) - before
    };
    log::set_max_level(log::LevelFilter::Trace);
    assert!(lines_of_a_life() > 0);
    log::set_max_level(log::LevelFilter::Off);
    assert_eq!(lines_of_a_life(), 0);
}

pub fn a_probe_says_what_is_missing() {
    let probe = Host::probe();
    assert!(probe.findings.iter().all(|f| f.problem.is_none()) && !probe.findings.is_empty(), "{probe}");
    let probe = Host::probe_at("/nonexistent/kvm");
    let bad = probe.findings.iter().find(|f| f.problem.is_some()).expect("no such device");
    assert!(!bad.remedy.is_empty(), "{probe}");
}

pub fn what_is_promised_and_what_is_there() {
    let host = host();
    let vm = host.build(real(&SPINS)).unwrap();
    let (usage, memory) = (host.usage(), vm.memory());
    assert_eq!(usage.vms, 1);
    assert_eq!((memory.max, memory.guarantee, memory.generation), (Bytes::mib(2), Bytes(0), 1));
    assert_eq!(memory.backing, usage.backing);
    vm.write_memory(0x10_0000, &[1; 4096]).unwrap();
    assert_eq!(vm.memory().backing, Bytes(usage.backing.0 + 4096));
    let generation = vm.set_guarantee(Bytes::mib(1), Some(memory.generation)).unwrap();
    assert!(generation > memory.generation);
    let stale = vm.set_guarantee(Bytes(0), Some(memory.generation)).unwrap_err();
    assert!(stale.kind() == ErrorKind::InvalidState && stale.to_string().contains("generation"), "{stale}");
    assert_eq!(vm.set_guarantee(Bytes::mib(3), None).unwrap_err().kind(), ErrorKind::InvalidArgument);
    vm.start().unwrap();
    wait_until("the vCPU to have run a millisecond", || {
        vm.vcpu_statistics(0).unwrap().run_time >= Duration::from_millis(1)
    });
    assert_eq!(vm.vcpu_statistics(1).unwrap_err().kind(), ErrorKind::InvalidArgument);
}
