//! The caller's threads and loop drive a VM. tests/drive.rs has more of it, in Rust only.

use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmbed::{Dispatcher, ErrorKind, EventKind, Platform, StopCause, VcpuReturn, Vm};

use crate::guest::{LONG, OnWrite, Port, TALKS, WRITES, ends, host, real};

pub fn vcpus_on_the_callers_threads() {
    let own: Arc<Mutex<Option<Arc<Vm>>>> = Arc::default();
    let stops = own.clone();
    let device = OnWrite(move || {
        if let Some(vm) = &*stops.lock().unwrap() {
            vm.request_stop();
        }
        Ok(())
    });
    let builder = host().builder(real(&WRITES)).pio_device("port", 0x10, 8, Arc::new(device));
    let vm = Arc::new(builder.caller_vcpus().build().unwrap());
    vm.start().unwrap();
    for _ in 0..10 {
        std::thread::scope(|scope| {
            scope.spawn(|| vm.interrupt_vcpu(0).unwrap());
            assert_eq!(vm.run_vcpu(0).unwrap(), VcpuReturn::Interrupted);
        });
    }
    assert_eq!(vm.run_vcpu(1).unwrap_err().kind(), ErrorKind::InvalidArgument);
    *own.lock().unwrap() = Some(vm.clone());
    assert_eq!(vm.run_vcpu(0).unwrap(), VcpuReturn::Ended);
    assert_eq!(ends(&vm), StopCause::HostStop);
    own.lock().unwrap().take();

    // One that halts; and one that is the library's to run.
    let port = Arc::new(Port::default());
    let vm = host().builder(real(&TALKS)).pio_device("port", 0x10, 8, port.clone()).caller_vcpus();
    let vm = vm.build().unwrap();
    vm.start().unwrap();
    assert_eq!(vm.run_vcpu(0).unwrap(), VcpuReturn::Ended);
    assert_eq!((ends(&vm), port.writes()), (StopCause::GuestHalt, 1));
    let vm = host().build(real(&TALKS)).unwrap();
    assert_eq!(vm.run_vcpu(0).unwrap_err().kind(), ErrorKind::InvalidState);
    assert_eq!(vm.interrupt_vcpu(0).unwrap_err().kind(), ErrorKind::InvalidState);
}

pub fn devices_on_the_callers_loop() {
    // mov dx, 0x3f8; mov al, 'h'; out dx, al; mov al, 'i'; out dx, al; mov al, 0xfe; out 0x64, al; jmp $
    let code = [0xba, 0xf8, 0x03, 0xb0, b'h', 0xee, 0xb0, b'i', 0xee, 0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe];
    let mut config = real(&code);
    config.platform = Platform::Pc;
    let dispatcher = Dispatcher::new().unwrap();
    let said = Arc::new(Mutex::new(Vec::new()));
    let (own, kept, here) = (dispatcher.clone(), said.clone(), std::thread::current().id());
    let builder = host().builder(config).dispatcher(&dispatcher).console_callback(move |bytes| {
        assert_eq!(std::thread::current().id(), here);
        assert_eq!(own.dispatch().unwrap_err().kind(), ErrorKind::InvalidState);
        kept.lock().unwrap().extend(bytes);
    });
    let vm = builder.build().unwrap();
    vm.start().unwrap();
    let deadline = Instant::now() + LONG;
    let cause = loop {
        assert!(Instant::now() < deadline, "waited a minute for the guest's end");
        let mut fds = [&dispatcher.as_fd(), &vm.events().as_fd()]
            .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN));
        poll(&mut fds, Some(&Timespec { tv_sec: 60, tv_nsec: 0 })).unwrap();
        dispatcher.dispatch().unwrap();
        if let Some(EventKind::Stopped(cause)) = vm.events().next_event().map(|event| event.kind) {
            break cause;
        }
    };
    // The last words.
    dispatcher.dispatch().unwrap();
    assert_eq!((cause, &said.lock().unwrap()[..]), (StopCause::GuestReset, &b"hi"[..]));
    let mut fds = [PollFd::from_borrowed_fd(dispatcher.as_fd(), PollFlags::IN)];
    let ready = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap();
    assert_eq!(ready, 0, "there is nothing to do");
    drop(vm);
}
