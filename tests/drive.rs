//! Who drives a VM: threads of the embedder's that run vCPUs, and its event loop that serves devices.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use vmbed::{
    Access, BareBoot, CpuMode, Device, Dispatcher, ErrorKind, EventKind, Host, Platform, Result, StopCause,
    ThreadInfo, ThreadRole, VcpuReturn, Vm, VmBuilder, VmConfig, VmState,
};

use std::io::{Read, Write};
use std::os::fd::AsFd;

use vmm_sys_util::poll::PollContext;
use vmm_sys_util::signal::{self, Killable};

const LONG: Duration = Duration::from_secs(60);

/// A port that counts what is written to it, and knows on which threads.
#[derive(Default)]
struct Port {
    writes: AtomicU64,
    threads: Mutex<Vec<ThreadId>>,
}

impl Device for Port {
    fn read(&self, _: Access, _: &mut [u8]) -> Result<()> {
        Ok(())
    }
    fn write(&self, _: Access, _: &[u8]) -> Result<()> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        let thread = std::thread::current().id();
        let mut threads = self.threads.lock().unwrap();
        if !threads.contains(&thread) {
            threads.push(thread);
        }
        Ok(())
    }
}

/// out 0x10, al; hlt
const ONE_WRITE: [u8; 3] = [0xe6, 0x10, 0xf4];
/// again: out 0x10, al; jmp again
const WRITES: [u8; 4] = [0xe6, 0x10, 0xeb, 0xfc];
/// here: jmp here
const SPINS: [u8; 2] = [0xeb, 0xfe];

fn builder(code: &[u8], vcpus: u16) -> (VmBuilder, Arc<Port>) {
    let port = Arc::new(Port::default());
    let mut config = VmConfig::bare(BareBoot::new(CpuMode::Real, 0x1000, code));
    config.cpus.count = vcpus;
    (Host::open().unwrap().builder(config).pio_device("port", 0x10, 1, port.clone()), port)
}

fn wait_until(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < deadline, "waited a minute for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn ended(vm: &Vm) -> StopCause {
    vm.wait_timeout(LONG).unwrap().expect("the VM should end within a minute")
}

#[test]
fn a_guest_runs_on_the_callers_thread_and_nowhere_else() {
    let (builder, port) = builder(&ONE_WRITE, 1);
    let threads = Arc::new(Mutex::new(Vec::new()));
    let seen = threads.clone();
    let hook = move |info: &ThreadInfo| seen.lock().unwrap().push((info.role, info.index));
    let vm = builder.caller_vcpus().on_thread_start(hook).build().unwrap();
    vm.start().unwrap();
    assert_eq!(vm.run_vcpu(0).unwrap(), VcpuReturn::Ended);
    assert_eq!(ended(&vm), StopCause::GuestHalt);
    assert_eq!(*port.threads.lock().unwrap(), [std::thread::current().id()]);
    assert_eq!(*threads.lock().unwrap(), [(ThreadRole::Control, 0)]);
    assert_eq!(vm.run_vcpu(0).unwrap(), VcpuReturn::Ended, "it has ended already");
}

#[test]
fn each_vcpu_halts_for_itself_and_the_vm_with_the_last() {
    let (builder, port) = builder(&ONE_WRITE, 2);
    let vm = builder.caller_vcpus().build().unwrap();
    vm.start().unwrap();
    assert_eq!(vm.run_vcpu(1).unwrap(), VcpuReturn::Ended);
    assert_eq!((vm.state(), port.writes.load(Ordering::Relaxed)), (VmState::Running, 1));
    assert_eq!(vm.run_vcpu(0).unwrap(), VcpuReturn::Ended);
    assert_eq!(ended(&vm), StopCause::GuestHalt);
}

#[test]
fn an_interrupt_gives_the_thread_back_and_the_guest_goes_on_later() {
    let (builder, port) = builder(&WRITES, 1);
    let vm = builder.caller_vcpus().build().unwrap();
    vm.start().unwrap();
    std::thread::scope(|scope| {
        let mut written = 0;
        for round in 0..20 {
            let thread = scope.spawn(|| vm.run_vcpu(0).unwrap());
            wait_until("the guest to write", || port.writes.load(Ordering::Relaxed) > written);
            vm.interrupt_vcpu(0).unwrap();
            assert_eq!(thread.join().unwrap(), VcpuReturn::Interrupted, "round {round}");
            written = port.writes.load(Ordering::Relaxed);
        }
        // One that comes too early is for the next run.
        vm.interrupt_vcpu(0).unwrap();
        assert_eq!(vm.run_vcpu(0).unwrap(), VcpuReturn::Interrupted);
        assert_eq!(port.writes.load(Ordering::Relaxed), written);
    });
    assert_eq!(port.threads.lock().unwrap().len(), 20);
    assert_eq!(vm.stop().unwrap(), StopCause::HostStop);
}

#[test]
fn start_pause_resume_and_stop_work_wherever_the_threads_are() {
    let (builder, port) = builder(&WRITES, 2);
    let vm = builder.caller_vcpus().build().unwrap();
    let writes = || port.writes.load(Ordering::Relaxed);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| vm.run_vcpu(0).unwrap());
        // It waits for the start; the other vCPU has no thread yet.
        vm.start().unwrap();
        wait_until("the first vCPU to write", || writes() > 0);
        vm.pause().unwrap();
        let standing = writes();
        let second = scope.spawn(|| vm.run_vcpu(1).unwrap());
        vm.registers(1).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(writes(), standing, "nothing runs through a pause");
        // Also one that stands can be had back.
        vm.interrupt_vcpu(1).unwrap();
        assert_eq!(second.join().unwrap(), VcpuReturn::Interrupted);
        vm.resume().unwrap();
        wait_until("the first vCPU to go on", || writes() > standing);
        assert_eq!(vm.stop().unwrap(), StopCause::HostStop);
        assert_eq!(first.join().unwrap(), VcpuReturn::Ended);
    });
    assert_eq!(vm.run_vcpu(1).unwrap(), VcpuReturn::Ended, "not into the guest of a VM that has ended");
}

#[test]
fn a_vm_whose_vcpus_nobody_runs_stops_and_drops() {
    for started in [false, true] {
        let (builder, port) = builder(&WRITES, 3);
        let vm = builder.caller_vcpus().build().unwrap();
        if started {
            vm.start().unwrap();
        }
        assert_eq!(vm.stop().unwrap(), StopCause::HostStop);
        assert_eq!(port.writes.load(Ordering::Relaxed), 0);
    }
    drop(builder(&WRITES, 1).0.caller_vcpus().build().unwrap());
}

#[test]
fn wrong_calls_are_refused_and_change_nothing() {
    let (ours, _) = builder(&SPINS, 1);
    let vm = ours.caller_vcpus().build().unwrap();
    let refused = |result: Result<VcpuReturn>, kind: ErrorKind, says: &str| {
        let error = result.unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(says), "{error}");
    };
    refused(vm.run_vcpu(1), ErrorKind::InvalidArgument, "there is no vCPU 1: this VM has 1");
    assert_eq!(vm.interrupt_vcpu(1).unwrap_err().kind(), ErrorKind::InvalidArgument);
    vm.start().unwrap();
    std::thread::scope(|scope| {
        // Whichever of the two comes second is refused; wait until the first is inside.
        let first = scope.spawn(|| {
            loop {
                match vm.run_vcpu(0) {
                    Ok(VcpuReturn::Interrupted) => {}
                    Ok(end) => break end,
                    Err(error) => {
                        assert!(error.to_string().contains("another thread runs vCPU 0"), "{error}");
                        // It may have come in where we were interrupted.
                        vm.interrupt_vcpu(0).unwrap();
                    }
                }
                std::thread::yield_now();
            }
        });
        let deadline = Instant::now() + LONG;
        let error = loop {
            assert!(Instant::now() < deadline, "waited a minute for the first thread to be inside");
            vm.interrupt_vcpu(0).unwrap();
            match vm.run_vcpu(0) {
                Err(error) => break error,
                Ok(_) => std::thread::yield_now(),
            }
        };
        assert!(error.to_string().contains("another thread runs vCPU 0"), "{error}");
        vm.request_stop();
        first.join().unwrap();
    });
    let theirs = builder(&SPINS, 1).0.build().unwrap();
    refused(theirs.run_vcpu(0), ErrorKind::InvalidState, "build it with caller_vcpus()");
    assert_eq!(theirs.interrupt_vcpu(0).unwrap_err().kind(), ErrorKind::InvalidState);
}

/// Asks for what only a callback must not.
struct Nosy(Mutex<Option<Arc<Vm>>>, Mutex<Vec<ErrorKind>>);

impl Device for Nosy {
    fn read(&self, _: Access, _: &mut [u8]) -> Result<()> {
        Ok(())
    }
    fn write(&self, _: Access, _: &[u8]) -> Result<()> {
        let vm = self.0.lock().unwrap().take();
        let vm = vm.expect("written once");
        let kinds = [vm.run_vcpu(0).unwrap_err(), vm.stop().unwrap_err(), vm.wait().unwrap_err()];
        self.1.lock().unwrap().extend(kinds.map(|e| e.kind()));
        Ok(())
    }
}

#[test]
fn a_callback_on_the_callers_thread_is_the_vms_own() {
    let nosy = Arc::new(Nosy(Mutex::new(None), Mutex::default()));
    let config = VmConfig::bare(BareBoot::new(CpuMode::Real, 0x1000, ONE_WRITE));
    let builder = Host::open().unwrap().builder(config).pio_device("nosy", 0x10, 1, nosy.clone());
    let vm = Arc::new(builder.caller_vcpus().build().unwrap());
    *nosy.0.lock().unwrap() = Some(vm.clone());
    vm.start().unwrap();
    assert_eq!(vm.run_vcpu(0).unwrap(), VcpuReturn::Ended);
    assert_eq!(*nosy.1.lock().unwrap(), [ErrorKind::InvalidState; 3]);
    assert_eq!(ended(&vm), StopCause::GuestHalt, "out of the callback it is ours again");
}

static HANDLED: AtomicU64 = AtomicU64::new(0);

extern "C" fn handler(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    HANDLED.fetch_add(1, Ordering::Relaxed);
}

#[test]
fn a_signal_for_the_embedder_is_handled_and_gives_the_thread_back() {
    let number = signal::SIGRTMIN() + 3;
    signal::register_signal_handler(number, handler).unwrap();
    let (builder, _) = builder(&SPINS, 1);
    let vm = Arc::new(builder.caller_vcpus().build().unwrap());
    vm.start().unwrap();
    let own = vm.clone();
    let thread = std::thread::spawn(move || {
        let returned = own.run_vcpu(0).unwrap();
        (returned, signal::get_blocked_signals().unwrap().contains(&libc::SIGURG))
    });
    let deadline = Instant::now() + LONG;
    // One that comes before KVM_RUN is handled, too, but does not bring the thread back.
    while !thread.is_finished() {
        assert!(Instant::now() < deadline, "waited a minute for a signal to bring the thread back");
        let _ = thread.kill(number);
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(thread.join().unwrap(), (VcpuReturn::Interrupted, false));
    assert!(HANDLED.load(Ordering::Relaxed) > 0);
    assert_eq!(vm.stop().unwrap(), StopCause::HostStop);
}

static URGENT: AtomicU64 = AtomicU64::new(0);

extern "C" fn urgent(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    URGENT.fetch_add(1, Ordering::Relaxed);
}

#[test]
fn no_kick_reaches_a_handler_of_the_embedders() {
    signal::register_signal_handler(libc::SIGURG, urgent).unwrap();
    let (builder, _) = builder(&SPINS, 1);
    let vm = Arc::new(builder.caller_vcpus().build().unwrap());
    for last in [false, false, false, true] {
        let own = vm.clone();
        let thread = std::thread::spawn(move || own.run_vcpu(0).unwrap());
        let inside = || vm.vcpu_statistics(0).unwrap().thread.is_some();
        wait_until("a thread to be at the gate", inside);
        // It stands there, outside the guest: the kick is not what brings it back.
        let returned = if last {
            vm.stop().unwrap();
            VcpuReturn::Ended
        } else {
            vm.interrupt_vcpu(0).unwrap();
            VcpuReturn::Interrupted
        };
        assert_eq!(thread.join().unwrap(), returned);
    }
    assert_eq!(URGENT.load(Ordering::Relaxed), 0);
}

/// A guest with a console: writes "hi", then what it reads, and asks for a reset when that is a 'q'.
fn talker() -> VmConfig {
    let code = [
        0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xb0, b'h', 0xee, // mov al, 'h'; out dx, al
        0xb0, b'i', 0xee, // mov al, 'i'; out dx, al
        0xba, 0xfd, 0x03, // wait: mov dx, 0x3fd
        0xec, 0xa8, 0x01, // in al, dx; test al, 1
        0x74, 0xfb, // jz wait + 3
        0xba, 0xf8, 0x03, 0xec, 0xee, // mov dx, 0x3f8; in al, dx; out dx, al
        0x3c, b'q', 0x75, 0xef, // cmp al, 'q'; jne wait
        0xb0, 0xfe, 0xe6, 0x64, // mov al, 0xfe; out 0x64, al
        0xf4, 0xeb, 0xfd, // hlt; jmp -1
    ];
    let mut config = VmConfig::bare(BareBoot::new(CpuMode::Real, 0x1000, code));
    config.platform = Platform::Pc;
    config
}

/// Turns the dispatcher, when its fd says so, until `done`.
fn turn_until(dispatcher: &Dispatcher, what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + LONG;
    while !done() {
        assert!(Instant::now() < deadline, "waited a minute for {what}");
        if is_readable(dispatcher) {
            dispatcher.dispatch().unwrap();
        }
    }
}

/// Whether its fd is, within 10 ms.
fn is_readable(dispatcher: &Dispatcher) -> bool {
    let poll = PollContext::<u32>::new().unwrap();
    poll.add(dispatcher, 0).unwrap();
    poll.wait_timeout(Duration::from_millis(10)).unwrap().iter_readable().next().is_some()
}

/// What a console's callback got, and on which threads.
type Said = Arc<Mutex<(Vec<u8>, Vec<ThreadId>)>>;

fn keep(said: &Said) -> impl FnMut(&[u8]) + Send + 'static {
    let said = said.clone();
    move |bytes| {
        let mut said = said.lock().unwrap();
        said.0.extend(bytes);
        said.1.push(std::thread::current().id());
    }
}

fn text(said: &Said) -> String {
    String::from_utf8(said.lock().unwrap().0.clone()).unwrap()
}

#[test]
fn devices_are_served_on_the_embedders_loop_and_have_no_thread() {
    let dispatcher = Dispatcher::new().unwrap();
    let said = Said::default();
    let threads = Arc::new(Mutex::new(Vec::new()));
    let seen = threads.clone();
    let vm = Host::open()
        .unwrap()
        .builder(talker())
        .dispatcher(&dispatcher)
        .console_callback(keep(&said))
        .on_thread_start(move |info| seen.lock().unwrap().push(info.role))
        .build()
        .unwrap();
    vm.start().unwrap();
    turn_until(&dispatcher, "the guest's greeting", || text(&said) == "hi");
    assert!(!is_readable(&dispatcher), "there is nothing to do");
    vm.console_input(b"abcq");
    assert_eq!(ended(&vm), StopCause::GuestReset);
    assert_eq!(text(&said), "hi", "nobody dispatched");
    assert!(is_readable(&dispatcher));
    dispatcher.dispatch().unwrap();
    assert_eq!(text(&said), "hiabcq", "one call takes the last words");
    assert!(said.lock().unwrap().1.iter().all(|thread| *thread == std::thread::current().id()));
    assert_eq!(*threads.lock().unwrap(), [ThreadRole::Vcpu]);
}

#[test]
fn many_vms_share_a_dispatcher_and_a_panic_ends_one_of_them() {
    let dispatcher = Dispatcher::new().unwrap();
    let host = Host::open().unwrap();
    let said: Vec<_> = (0..8).map(|_| Said::default()).collect();
    let vms: Vec<_> = said
        .iter()
        .enumerate()
        .map(|(i, said)| {
            let mut keep = keep(said);
            let callback = move |bytes: &[u8]| {
                assert_ne!(i, 3, "as the test wants");
                keep(bytes);
            };
            host.builder(talker()).dispatcher(&dispatcher).console_callback(callback).build().unwrap()
        })
        .collect();
    vms.iter().for_each(|vm| vm.start().unwrap());
    let others = || said.iter().enumerate().filter(|(i, _)| *i != 3);
    // Its end, too, is told on this thread.
    let over = || matches!(vms[3].state(), VmState::Stopped(_));
    turn_until(&dispatcher, "the greetings", || over() && others().all(|(_, said)| text(said) == "hi"));
    let cause = ended(&vms[3]);
    assert!(
        matches!(&cause, StopCause::DeviceFault { device, why } if device == "console" && why.contains("as the test wants")),
        "{cause}"
    );
    vms.iter().for_each(|vm| assert!(vm.console_input(b"q") == 1));
    turn_until(&dispatcher, "the answers", || others().all(|(_, said)| text(said) == "hiq"));
    for (i, vm) in vms.iter().enumerate().filter(|(i, _)| *i != 3) {
        assert_eq!(ended(vm), StopCause::GuestReset, "guest {i}");
    }
    drop(vms);
    assert!(!is_readable(&dispatcher), "nothing of theirs is left in the set");
}

#[test]
fn fds_of_a_console_are_served_too() {
    let dispatcher = Dispatcher::new().unwrap();
    let (mut reads, output) = std::io::pipe().unwrap();
    let (input, mut types) = std::io::pipe().unwrap();
    let vm = Host::open()
        .unwrap()
        .builder(talker())
        .dispatcher(&dispatcher)
        .console_output(output.as_fd())
        .unwrap()
        .console_input(input.as_fd())
        .unwrap()
        .build()
        .unwrap();
    drop((input, output));
    vm.start().unwrap();
    types.write_all(b"xyz").unwrap();
    turn_until(&dispatcher, "the echo", || vm.console_tail().ends_with(b"xyz"));
    vm.pause().unwrap();
    vm.resume().unwrap();
    types.write_all(b"q").unwrap();
    turn_until(&dispatcher, "the end", || matches!(vm.state(), VmState::Stopped(_)));
    dispatcher.dispatch().unwrap();
    drop(vm);
    let mut all = String::new();
    reads.read_to_string(&mut all).unwrap();
    assert_eq!(all, "hixyzq");
}

#[test]
fn everything_works_while_nobody_dispatches() {
    let dispatcher = Dispatcher::new().unwrap();
    let vm = Host::open().unwrap().builder(talker()).dispatcher(&dispatcher).build().unwrap();
    vm.start().unwrap();
    wait_until("the greeting", || vm.console_tail() == b"hi");
    vm.pause().unwrap();
    vm.resume().unwrap();
    assert_eq!(vm.stop().unwrap(), StopCause::HostStop);
    drop(vm);
    // And a VM outlives the embedder's interest in its dispatcher.
    let vm = Host::open().unwrap().builder(talker()).dispatcher(&dispatcher).build().unwrap();
    drop(dispatcher);
    vm.start().unwrap();
    vm.console_input(b"q");
    assert_eq!(ended(&vm), StopCause::GuestReset);
}

#[test]
fn threads_may_dispatch_at_the_same_time() {
    let dispatcher = Dispatcher::new().unwrap();
    let said = Said::default();
    let builder = Host::open().unwrap().builder(talker()).dispatcher(&dispatcher);
    let vm = builder.console_callback(keep(&said)).build().unwrap();
    vm.start().unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| turn_until(&dispatcher, "the end", || matches!(vm.state(), VmState::Stopped(_))));
        }
        let deadline = Instant::now() + LONG;
        for byte in b"0123456789q" {
            while vm.console_input(&[*byte]) == 0 {
                assert!(Instant::now() < deadline, "waited a minute for the guest to read");
                std::thread::yield_now();
            }
        }
    });
    dispatcher.dispatch().unwrap();
    assert_eq!(text(&said), "hi0123456789q");
}

type Callback = Box<dyn FnMut(&[u8]) + Send>;

/// What a callback that `dispatch` calls must not do is refused, and what it may do works.
#[test]
fn callbacks_within_dispatch_never_wait_for_themselves() {
    let dispatcher = Dispatcher::new().unwrap();
    let host = Host::open().unwrap();
    let build = |callback: Callback| {
        let builder = host.builder(talker()).dispatcher(&dispatcher);
        Arc::new(builder.console_callback(callback).build().unwrap())
    };
    let other = build(Box::new(|_| ()));
    other.start().unwrap();
    let own: Arc<Mutex<Option<Arc<Vm>>>> = Arc::default();
    let refused = Arc::new(Mutex::new(Vec::new()));
    let doomed = Arc::new(Mutex::new(Some(build(Box::new(|_| ())))));
    let vm = build({
        let (own, refused, other, doomed) = (own.clone(), refused.clone(), other.clone(), doomed.clone());
        let (dispatcher, host) = (dispatcher.clone(), host.clone());
        Box::new(move |_| {
            let Some(vm) = own.lock().unwrap().take() else { return };
            let again = host.builder(talker()).dispatcher(&dispatcher).build();
            let errors = [
                dispatcher.dispatch().unwrap_err(),
                vm.stop().unwrap_err(),
                other.stop().unwrap_err(),
                other.pause().unwrap_err(),
                other.wait().unwrap_err(),
                again.unwrap_err(),
            ];
            refused.lock().unwrap().extend(errors.map(|e| (e.kind(), e.to_string())));
            // Another VM of the same dispatcher, and its own.
            drop(doomed.lock().unwrap().take());
            other.request_stop();
            vm.request_stop();
        })
    });
    *own.lock().unwrap() = Some(vm.clone());
    let stopped = vm.events().clone();
    vm.start().unwrap();
    drop(vm);
    turn_until(&dispatcher, "the VM's end", || {
        std::iter::from_fn(|| stopped.next_event())
            .any(|event| event.kind == EventKind::Stopped(StopCause::HostStop))
    });
    let refused = refused.lock().unwrap();
    assert_eq!(refused.len(), 6);
    assert!(refused.iter().all(|(kind, _)| *kind == ErrorKind::InvalidState), "{refused:?}");
    assert_eq!(ended(&other), StopCause::HostStop);
    // Dropped in the callback, it ends after it: its thread is gone when the dispatcher is ours alone.
    wait_until("the VM that was dropped within", || !is_readable(&dispatcher));
}
