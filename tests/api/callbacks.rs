//! Callbacks that do what they should not: fail, panic, wait for their own VM, block, end or drop it.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use vmbed::{Error, ErrorKind, Host, Platform, Registers, StopCause, Vm, VmState};

use crate::guest::{
    OnWrite, Port, SPINS, TALKS, WRITES, ends, host, next_cause, real, run, unread, wait_until,
};

/// A place for the VM whose callback looks there for it.
type Place = Arc<Mutex<Option<Arc<Vm>>>>;

/// A guest that writes for ever, to a device that does this.
fn writing(host: &Host, device: impl Fn() -> vmbed::Result<()> + Send + Sync + 'static) -> Vm {
    host.builder(real(&WRITES)).pio_device("port", 0x10, 1, Arc::new(OnWrite(device))).build().unwrap()
}

pub fn a_device_that_fails_is_the_cause() {
    let host = host();
    let other = host.build(real(&SPINS)).unwrap();
    other.start().unwrap();
    let vm = writing(&host, || Err(Error::new(ErrorKind::Os, "the backend is gone")));
    let why = "the backend is gone".to_owned();
    let cause = StopCause::DeviceFault { device: "port".to_owned(), why };
    assert_eq!(run(&vm), cause);
    assert_eq!(next_cause(vm.events()), cause);
    assert_eq!(other.state(), VmState::Running);
}

/// A panic, without what the panic hook would print.
fn bug() -> ! {
    std::panic::resume_unwind(Box::new("a bug"))
}

/// Every kind of callback of a VM's own; another VM goes on.
pub fn a_callback_that_panics() {
    let host = host();
    let other = host.build(real(&SPINS)).unwrap();
    other.start().unwrap();
    let fault = |cause: StopCause, name: &str| {
        let StopCause::DeviceFault { device, why } = cause else { panic!("{name}: {cause}") };
        assert_eq!(device, name);
        assert!(why.contains("panicked: a bug"), "{why}");
    };
    fault(run(&writing(&host, || bug())), "port");
    let vm = host.builder(real(&SPINS)).on_thread_start(|_| bug()).build().unwrap();
    fault(next_cause(vm.events()), "thread hook");
    let vm = console_guest(&host, |_| bug());
    fault(run(&vm), "console");
    assert_eq!(other.state(), VmState::Running);
    assert_eq!(other.stop().unwrap(), StopCause::HostStop);
}

pub fn a_callback_stops_its_vm() {
    let place = Place::default();
    let vm = Arc::new(writing(&host(), {
        let place = place.clone();
        move || {
            place.lock().unwrap().as_ref().unwrap().request_stop();
            Ok(())
        }
    }));
    *place.lock().unwrap() = Some(vm.clone());
    assert_eq!(run(&vm), StopCause::HostStop);
    place.lock().unwrap().take();
}

pub fn a_callback_frees_its_vm() {
    let (place, port) = (Place::default(), Arc::new(Port::default()));
    let device = OnWrite({
        let (place, port) = (place.clone(), port.clone());
        move || {
            if let Some(vm) = place.lock().unwrap().take() {
                refuses_to_wait(&vm);
                drop(vm);
                port.1.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        }
    });
    let vm = Arc::new(
        host().builder(real(&WRITES)).pio_device("port", 0x10, 1, Arc::new(device)).build().unwrap(),
    );
    let events = vm.events().clone();
    *place.lock().unwrap() = Some(vm.clone());
    let running = Arc::downgrade(&vm);
    // The callback's is the last one, whichever of the two comes first.
    vm.start().unwrap();
    drop(vm);
    assert_eq!(next_cause(&events), StopCause::HostStop);
    wait_until("the VM gives its device back", || Arc::strong_count(&port) == 1);
    assert!(running.upgrade().is_none() && port.writes() == 1);
}

/// Every call that waits for the VM, from a callback of it.
fn refuses_to_wait(vm: &Vm) {
    let refused = [
        vm.start().err(),
        vm.pause().err(),
        vm.resume().err(),
        vm.stop().err(),
        vm.wait().err(),
        vm.wait_timeout(Duration::ZERO).err(),
        vm.registers(0).err(),
        vm.set_registers(0, &Registers::default()).err(),
    ];
    for (i, error) in refused.into_iter().enumerate() {
        let error = error.unwrap_or_else(|| panic!("call {i} should be refused"));
        assert!(
            error.kind() == ErrorKind::InvalidState && error.to_string().contains("callback"),
            "{i}: {error}"
        );
    }
}

pub fn a_callback_reenters() {
    let (host, place, writes) = (host(), Place::default(), Arc::new(AtomicU32::new(0)));
    let vm = Arc::new(writing(&host, {
        let (host, place, writes) = (host.clone(), place.clone(), writes.clone());
        move || {
            if writes.fetch_add(1, Ordering::Relaxed) == 0 {
                let vm = place.lock().unwrap().clone().unwrap();
                refuses_to_wait(&vm);
                calls_everything_else(&vm, &host);
                vm.request_stop();
                refuses_to_wait(&vm);
            }
            Ok(())
        }
    }));
    *place.lock().unwrap() = Some(vm.clone());
    assert_eq!(run(&vm), StopCause::HostStop);
    assert_eq!(writes.load(Ordering::Relaxed), 1);
    place.lock().unwrap().take();
}

/// A whole other VM, and what does not wait for this one.
fn calls_everything_else(vm: &Vm, host: &Host) {
    let port = Arc::new(Port::default());
    let other = host.builder(real(&TALKS)).pio_device("port", 0x10, 2, port.clone()).build().unwrap();
    assert_eq!(run(&other), StopCause::GuestHalt);
    drop(other);
    assert_eq!((host.usage().vcpus, vm.state()), (1, VmState::Running));
    let mut bytes = [0; 4];
    vm.read_memory(0x1000, &mut bytes).unwrap();
    vm.write_memory(0x2000, &bytes).unwrap();
    assert!(vm.console_tail().is_empty());
    assert_eq!(vm.shutdown().unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(unread(vm.events()).len(), 1);
    assert_eq!(vm.events().wait_event(Duration::from_millis(1)), None);
}

/// A device whose callback does not return until its door opens.
#[derive(Default)]
struct Door {
    open: Mutex<bool>,
    opened: Condvar,
    entered: AtomicBool,
}

impl Door {
    fn pass(&self) {
        self.entered.store(true, Ordering::Relaxed);
        let mut open = self.open.lock().unwrap();
        while !*open {
            open = self.opened.wait(open).unwrap();
        }
    }

    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }
}

/// A VM that runs, whose vCPU stands before the door.
fn blocked(host: &Host) -> (Arc<Door>, Vm) {
    let door = Arc::new(Door::default());
    let vm = writing(host, {
        let door = door.clone();
        move || {
            door.pass();
            Ok(())
        }
    });
    vm.start().unwrap();
    wait_until("the guest comes to the door", || door.entered.load(Ordering::Relaxed));
    (door, vm)
}

pub fn a_callback_that_blocks() {
    let host = host();
    let ((stop_door, stopped), (pause_door, paused), (drop_door, dropped)) =
        (blocked(&host), blocked(&host), blocked(&host));
    let gone = AtomicBool::new(false);
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let stop = scope.spawn(|| stopped.stop().unwrap_err());
        let pause = scope.spawn(|| paused.pause().unwrap_err());
        let gone = &gone;
        scope.spawn(move || {
            drop(dropped);
            gone.store(true, Ordering::Relaxed);
        });
        assert_eq!(stopped.wait_timeout(Duration::from_millis(100)).unwrap(), None);
        let (stop, pause) = (stop.join().unwrap(), pause.join().unwrap());
        assert!((9..30).contains(&begin.elapsed().as_secs()), "{:?}", begin.elapsed());
        assert!(
            stop.kind() == ErrorKind::TimedOut && stop.to_string().contains("has not come to its end"),
            "{stop}"
        );
        assert!(pause.kind() == ErrorKind::TimedOut && pause.to_string().contains("callback"), "{pause}");
        assert_eq!(paused.state(), VmState::Running);
        // Dropping promises that no callback runs when it returns: it waits.
        assert!(!gone.load(Ordering::Relaxed));
        for door in [&stop_door, &pause_door, &drop_door] {
            door.open();
        }
    });
    assert!(gone.into_inner());
    assert_eq!(ends(&stopped), StopCause::HostStop);
    paused.pause().unwrap();
    paused.resume().unwrap();
}

/// A guest on a PC board that writes to its serial port for ever.
fn console_guest(host: &Host, callback: impl FnMut(&[u8]) + Send + 'static) -> Vm {
    // mov dx, 0x3f8; mov al, 'x'; out dx, al; jmp $-1
    let mut config = real(&[0xba, 0xf8, 0x03, 0xb0, b'x', 0xee, 0xeb, 0xfd]);
    config.platform = Platform::Pc;
    host.builder(config).console_callback(callback).build().unwrap()
}

/// Takes the VM out of its place, as soon as it is there, and drops it.
fn frees(place: &Place) {
    wait_until("the VM has been built", || place.lock().unwrap().is_some());
    let vm = place.lock().unwrap().take().unwrap();
    refuses_to_wait(&vm);
}

pub fn other_callbacks_reenter_and_free() {
    let host = host();
    let place = Place::default();
    let mut first = Some(place.clone());
    let console = console_guest(&host, move |bytes| {
        assert_eq!(bytes[0], b'x');
        if let Some(place) = first.take() {
            frees(&place);
        }
    });
    let events = console.events().clone();
    console.start().unwrap();
    *place.lock().unwrap() = Some(Arc::new(console));
    assert_eq!(next_cause(&events), StopCause::HostStop);
    wait_until("the console's callback is dropped", || Arc::strong_count(&place) == 1);

    let hook = place.clone();
    let hooked = host.builder(real(&SPINS)).on_thread_start(move |_| frees(&hook)).build().unwrap();
    let events = hooked.events().clone();
    *place.lock().unwrap() = Some(Arc::new(hooked));
    assert_eq!(next_cause(&events), StopCause::HostStop);
    wait_until("the hook is dropped", || Arc::strong_count(&place) == 1);
    wait_until("both VMs have given back what they held", || host.usage().memory.get() == 0);
}
