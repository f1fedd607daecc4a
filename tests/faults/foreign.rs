//! By the functions for C: a VM whose vCPU the caller runs, a switch, a capture.
#![expect(unsafe_code, reason = "these functions are C's")]

use std::ffi::{CStr, c_char, c_void};
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::ptr::{from_ref, null, null_mut};
use std::time::Instant;

use vmbed::{Error, ErrorKind};

use crate::guests::{self, Op, script};
use crate::life::{EXCUSED, LONG, Stage, aside, expect, remove};

type Object = *mut c_void;
/// Where an object or an error is put.
type Out = *mut Object;

// As vmbed.h has them. The program has the library in it, and so these.
unsafe extern "C" {
    fn vmbed_error_message(error: Object) -> *const c_char;
    fn vmbed_error_free(error: Object);
    fn vmbed_host_open(options: *const c_void, host: Out, error: Out) -> i32;
    fn vmbed_host_free(host: Object);
    fn vmbed_config_new_bare(
        mode: i32,
        entry: u64,
        code: *const u8,
        length: usize,
        config: Out,
        error: Out,
    ) -> i32;
    fn vmbed_config_set_stack(config: Object, stack: u64, error: Out) -> i32;
    fn vmbed_config_set_platform(config: Object, platform: i32, error: Out) -> i32;
    fn vmbed_config_set_memory(config: Object, bytes: u64, error: Out) -> i32;
    fn vmbed_config_add_net(config: Object, net: *const Net, error: Out) -> i32;
    fn vmbed_config_free(config: Object);
    fn vmbed_builder_new(host: Object, config: Object, builder: Out, error: Out) -> i32;
    fn vmbed_builder_net_fd(builder: Object, index: u32, fd: i32, error: Out) -> i32;
    fn vmbed_builder_caller_vcpus(builder: Object, error: Out) -> i32;
    fn vmbed_builder_add_pio_doorbell(
        builder: Object,
        name: *const c_char,
        port: u16,
        length: u16,
        error: Out,
    ) -> i32;
    fn vmbed_builder_build(builder: Object, vm: Out, error: Out) -> i32;
    fn vmbed_builder_free(builder: Object);
    fn vmbed_vm_write_memory(vm: Object, address: u64, data: *const u8, length: usize, error: Out) -> i32;
    fn vmbed_vm_get_registers(vm: Object, vcpu: u32, registers: *mut Registers, error: Out) -> i32;
    fn vmbed_vm_set_registers(vm: Object, vcpu: u32, registers: *const Registers, error: Out) -> i32;
    fn vmbed_vm_start(vm: Object, error: Out) -> i32;
    fn vmbed_vm_change_net_fd(vm: Object, index: u32, fd: i32, error: Out) -> i32;
    fn vmbed_vcpu_run(vm: Object, vcpu: u32, outcome: *mut i32, error: Out) -> i32;
    fn vmbed_vm_request_stop(vm: Object, error: Out) -> i32;
    fn vmbed_vm_events(vm: Object, events: Out, error: Out) -> i32;
    fn vmbed_events_next(events: Object, timeout: i64, event: Out, error: Out) -> i32;
    fn vmbed_events_free(events: Object);
    fn vmbed_event_kind(event: Object) -> i32;
    fn vmbed_event_free(event: Object);
    fn vmbed_vm_wait(vm: Object, timeout: i64, cause: *mut i32, error: Out) -> i32;
    fn vmbed_vm_stop(vm: Object, cause: *mut i32, error: Out) -> i32;
    fn vmbed_vm_free(vm: Object);
    fn vmbed_switch_new(options: *const c_void, switch: Out, error: Out) -> i32;
    fn vmbed_switch_free(switch: Object);
    fn vmbed_switch_add_fd(
        switch: Object,
        name: *const c_char,
        fd: i32,
        options: *const c_void,
        port: Out,
        error: Out,
    ) -> i32;
    fn vmbed_port_free(port: Object);
    fn vmbed_switch_capture(
        switch: Object,
        ports: *const Object,
        count: usize,
        fd: i32,
        capture: Out,
        error: Out,
    ) -> i32;
    fn vmbed_capture_finish(capture: Object, written: *mut u64, missed: *mut u64, error: Out) -> i32;
    fn vmbed_capture_free(capture: Object);
}

const LONG_MODE: i32 = 2;
const PC: i32 = 0;
const ENDED: i32 = 1;
const STOPPED: i32 = 4;
const DEVICE_NEEDS_RESET: i32 = 5;

/// `vmbed_registers`
#[repr(C)]
struct Registers {
    size: usize,
    numbers: [u64; 18],
}

/// `vmbed_net` of a later library, all of it as it is by itself.
#[repr(C)]
struct Net {
    size: usize,
    rest: [u64; 63],
}

/// What is freed in the end.
struct Handle(Object, unsafe extern "C" fn(Object));

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: it came from a function that gives such ones away, and goes once.
        unsafe { (self.1)(self.0) }
    }
}

/// An error as Rust has it: all that matters here is what it says.
fn call(function: impl FnOnce(Out) -> i32) -> vmbed::Result<()> {
    let mut error = null_mut();
    if function(&raw mut error) == 0 {
        return Ok(());
    }
    let error = Handle(error, vmbed_error_free);
    // SAFETY: it lives as long as its error.
    let said = unsafe { CStr::from_ptr(vmbed_error_message(error.0)) };
    Err(Error::new(ErrorKind::Os, said.to_string_lossy()))
}

fn make(free: unsafe extern "C" fn(Object), function: impl FnOnce(Out, Out) -> i32) -> vmbed::Result<Handle> {
    let mut made = null_mut();
    call(|error| function(&raw mut made, error))?;
    Ok(Handle(made, free))
}

pub fn live(stage: &Stage, works: bool) -> vmbed::Result<()> {
    let captured = stage.file("captured");
    let file = aside({
        let captured = captured.clone();
        move || File::create(captured).unwrap()
    });
    let lived = switched(&file).and_then(|()| run(stage, works));
    aside(move || drop(file));
    remove(&captured);
    lived
}

/// The test's own: an end that is given to vmbed, and the other one.
fn pair() -> (OwnedFd, OwnedFd) {
    let (near, far) = aside(|| UnixDatagram::pair().unwrap());
    (near.into(), far.into())
}

fn switched(file: &File) -> vmbed::Result<()> {
    let ends = pair();
    let lived = capture(file, &ends.0);
    aside(move || drop(ends));
    lived
}

// SAFETY: in all that follows, what is passed is a handle of the kind, or lives until the call returns.

fn capture(file: &File, near: &OwnedFd) -> vmbed::Result<()> {
    // SAFETY: as above.
    let switch = make(vmbed_switch_free, |made, error| unsafe { vmbed_switch_new(null(), made, error) })?;
    // SAFETY: as above.
    let port = make(vmbed_port_free, |made, error| unsafe {
        vmbed_switch_add_fd(switch.0, c"messages".as_ptr(), near.as_raw_fd(), null(), made, error)
    })?;
    // SAFETY: as above.
    let capture = make(vmbed_capture_free, |made, error| unsafe {
        vmbed_switch_capture(switch.0, &raw const port.0, 1, file.as_raw_fd(), made, error)
    })?;
    // SAFETY: as above.
    call(|error| unsafe { vmbed_capture_finish(capture.0, null_mut(), null_mut(), error) })
}

fn run(stage: &Stage, works: bool) -> vmbed::Result<()> {
    let (first, second) = (pair(), pair());
    let lived = build(stage, &first.0).and_then(|vm| turn(&vm, &second.0, works));
    aside(move || drop((first, second)));
    lived
}

fn build(stage: &Stage, near: &OwnedFd) -> vmbed::Result<Handle> {
    // SAFETY: as above.
    let host = make(vmbed_host_free, |made, error| unsafe { vmbed_host_open(null(), made, error) })?;
    let (code, length) = (stage.code.as_ptr(), stage.code.len());
    // SAFETY: as above.
    let config = make(vmbed_config_free, |made, error| unsafe {
        vmbed_config_new_bare(LONG_MODE, guests::ENTRY, code, length, made, error)
    })?;
    let net = Net { size: size_of::<Net>(), rest: [0; 63] };
    // SAFETY: as above.
    unsafe {
        call(|error| vmbed_config_set_stack(config.0, guests::STACK, error))?;
        call(|error| vmbed_config_set_platform(config.0, PC, error))?;
        call(|error| vmbed_config_set_memory(config.0, guests::MEMORY, error))?;
        call(|error| vmbed_config_add_net(config.0, from_ref(&net), error))?;
    }
    // SAFETY: as above.
    let builder =
        make(vmbed_builder_free, |made, error| unsafe { vmbed_builder_new(host.0, config.0, made, error) })?;
    // SAFETY: as above.
    unsafe {
        call(|error| vmbed_builder_net_fd(builder.0, 0, near.as_raw_fd(), error))?;
        call(|error| vmbed_builder_caller_vcpus(builder.0, error))?;
        call(|error| vmbed_builder_add_pio_doorbell(builder.0, c"said".as_ptr(), guests::SAY, 1, error))?;
        make(vmbed_vm_free, |made, error| vmbed_builder_build(builder.0, made, error))
    }
}

fn turn(vm: &Handle, elsewhere: &OwnedFd, works: bool) -> vmbed::Result<()> {
    let steps = [(Op::Send, 0, crate::driven::FRAME as u32, crate::driven::SENT.into())];
    let script = script(if works { &steps } else { &[] });
    let mut registers = Registers { size: size_of::<Registers>(), numbers: [0; 18] };
    // SAFETY: as above.
    unsafe {
        call(|error| vmbed_vm_write_memory(vm.0, guests::SCRIPT, script.as_ptr(), script.len(), error))?;
        call(|error| vmbed_vm_get_registers(vm.0, 0, &raw mut registers, error))?;
        call(|error| vmbed_vm_set_registers(vm.0, 0, &raw const registers, error))?;
        call(|error| vmbed_vm_start(vm.0, error))?;
        call(|error| vmbed_vm_change_net_fd(vm.0, 0, elsewhere.as_raw_fd(), error))?;
    }
    let watch = Watch::begin(vm)?;
    let (mut outcome, mut run) = (0, Ok(()));
    while outcome != ENDED && run.is_ok() {
        // SAFETY: as above.
        run = call(|error| unsafe { vmbed_vcpu_run(vm.0, 0, &raw mut outcome, error) });
    }
    watch.end();
    run?;
    let mut cause = 0;
    // SAFETY: as above.
    unsafe {
        call(|error| vmbed_vm_wait(vm.0, 60_000, &raw mut cause, error))?;
        expect(cause != 0, "how it ended");
        call(|error| vmbed_vm_stop(vm.0, null_mut(), error))
    }
}

/// Ends a VM whose guest waits for ever: for a device that is out of order, of which its embedder must have been told.
struct Watch(std::thread::JoinHandle<()>);

impl Watch {
    fn begin(vm: &Handle) -> vmbed::Result<Self> {
        let (vm, mut events) = (vm.0.expose_provenance(), null_mut());
        // SAFETY: as above.
        call(|error| unsafe { vmbed_vm_events(vm as Object, &raw mut events, error) })?;
        let events = events.expose_provenance();
        // On a thread whose calls nobody answers.
        Ok(Self(aside(move || std::thread::spawn(move || hear(vm as Object, events as Object)))))
    }

    fn end(self) {
        aside(move || self.0.join().unwrap());
    }
}

/// Until the VM has stopped.
fn hear(vm: Object, events: Object) {
    let events = Handle(events, vmbed_events_free);
    let (begin, mut told, mut asked) = (Instant::now(), false, false);
    loop {
        let mut event = null_mut();
        // SAFETY: as above; the VM stays until this has ended.
        let heard = call(|error| unsafe { vmbed_events_next(events.0, 100, &raw mut event, error) });
        // SAFETY: as above; NULL is of no kind.
        let kind = unsafe { vmbed_event_kind(event) };
        drop(Handle(event, vmbed_event_free));
        told |= kind == DEVICE_NEEDS_RESET;
        if kind == STOPPED || heard.is_err() {
            return;
        }
        if !asked && begin.elapsed() > if told { EXCUSED } else { LONG } {
            asked = true;
            if !told {
                println!("STUCK: the guest neither ends nor is ended, and nobody was told");
            }
            // SAFETY: as above.
            let _ = call(|error| unsafe { vmbed_vm_request_stop(vm, error) });
        }
    }
}
