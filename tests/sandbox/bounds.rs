//! What code that is not vmbed's does to a sandbox, or in spite of it: the allocator, a logger that blocks, an embedder who ends the VM.

use std::fs::File;
use std::hint::black_box;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};

use libtest_mimic::Trial;
use vmbed::internals::sandbox;
use vmbed::{Access, Device, StopCause, VmState};

use crate::life::{LONG, SPINS, bare, host, pc, wait_until};
use crate::{part, trial};

pub fn add(trials: &mut Vec<Trial>) {
    trials.push(trial("an_allocator_that_gives_back_late_stops_no_vm", || drop(part("arena"))));
    trials
        .push(trial("a_logger_that_blocks_keeps_no_violation_from_ending_its_vm", || drop(part("blocked"))));
    trials.push(trial("calls_name_the_cause_that_the_vm_ended_with", cause));
}

const OVERCOMMIT: &str = "/proc/sys/vm/overcommit_memory";

/// In a process of its own, of which no arena has given anything back.
pub fn arena() {
    // What was mapped and is freed has glibc keep the ends of arenas below twice its size from then on.
    drop(black_box(vec![1u8; 4 << 20]));
    // Its guest spins: an end of its own would be another cause.
    let mut config = pc();
    config.boot = bare(&SPINS).boot;
    let vm = host().build(config).unwrap();
    for index in 0..2 {
        // 24 MB, of which little is touched: more than it keeps.
        let freed = sandbox::on_loop(&vm, index, || {
            let blocks: Vec<Vec<u8>> = (0..400).map(|_| black_box(Vec::with_capacity(60_000))).collect();
            blocks.len()
        });
        assert_eq!(freed, Some(400));
        let asked = sandbox::on_loop(&vm, index, || File::open(OVERCOMMIT).map(drop)).unwrap();
        assert_eq!(asked.unwrap_err().raw_os_error(), Some(libc::EPERM), "it is refused all the same");
    }
    assert_eq!(vm.state(), VmState::Built);
    vm.start().unwrap();
    // Nothing but that.
    let other = "/proc/sys/vm/overcommit_ratio";
    let asked = sandbox::on_loop(&vm, 0, move || File::open(other).map(drop)).unwrap();
    assert_eq!(asked.unwrap_err().raw_os_error(), Some(libc::EPERM));
    let ended = vm.wait_timeout(LONG).unwrap();
    assert!(matches!(ended, Some(StopCause::SandboxViolation { .. })), "{ended:?}");
}

/// Blocks in the record of the console's end until it may go on.
struct Blocks {
    is_in: AtomicBool,
    may_go: Mutex<bool>,
    told: Condvar,
}

impl log::Log for Blocks {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }
    fn log(&self, record: &log::Record<'_>) {
        if record.args().to_string().contains("console: output ends") {
            self.is_in.store(true, Ordering::SeqCst);
            drop(self.told.wait_while(self.may_go.lock().unwrap(), |may| !*may).unwrap());
        }
    }
    fn flush(&self) {}
}

static BLOCKS: Blocks =
    Blocks { is_in: AtomicBool::new(false), may_go: Mutex::new(false), told: Condvar::new() };

/// In a process of its own, which has one logger.
pub fn blocked() {
    log::set_logger(&BLOCKS).unwrap();
    log::set_max_level(log::LevelFilter::Debug);
    // mov dx, 0x3f8; mov al, 'x'; out dx, al; jmp to the out
    let mut config = bare(&[0xba, 0xf8, 0x03, 0xb0, b'x', 0xee, 0xeb, 0xfd]);
    config.platform = vmbed::Platform::Pc;
    let (near, far) = UnixStream::pair().unwrap();
    drop(far);
    let vm = host().builder(config).console_output(&near).unwrap().build().unwrap();
    vm.start().unwrap();
    wait_until("the logger to block", || BLOCKS.is_in.load(Ordering::SeqCst));
    let refused = sandbox::on_loop(&vm, 0, || File::open("/etc/passwd").map(drop)).unwrap();
    let ended = vm.wait_timeout(LONG);
    // Before anything fails: else the VM would wait for the logger.
    *BLOCKS.may_go.lock().unwrap() = true;
    BLOCKS.told.notify_all();
    assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EPERM));
    match ended.unwrap() {
        Some(StopCause::SandboxViolation { thread, .. }) => assert_eq!(thread, "vmbed-dev0"),
        other => panic!("it did not end by its violation while the logger blocked: {other:?}"),
    }
}

/// Says that the guest has written, waits, and makes a call that is refused.
struct Late(Mutex<Sender<()>>, Mutex<Receiver<()>>);

impl Device for Late {
    fn read(&self, _: Access, _: &mut [u8]) -> vmbed::Result<()> {
        Ok(())
    }
    fn write(&self, _: Access, _: &[u8]) -> vmbed::Result<()> {
        self.0.lock().unwrap().send(()).unwrap();
        self.1.lock().unwrap().recv_timeout(LONG).unwrap();
        let error: io::Error = File::open("/etc/passwd").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
        Ok(())
    }
}

/// The embedder pulls the line first; what a thread was refused before the end is the cause all the same.
fn cause() {
    let ((said, says), (go, goes)) = (channel(), channel());
    // out 0x10, al; jmp $
    let builder = host().builder(bare(&[0xe6, 0x10, 0xeb, 0xfe]));
    let device = Arc::new(Late(Mutex::new(said), Mutex::new(goes)));
    let vm = sandbox::trust(builder.pio_device("late", 0x10, 1, device)).build().unwrap();
    vm.start().unwrap();
    says.recv_timeout(LONG).unwrap();
    let refusal = || vm.resume().unwrap_err().to_string();
    std::thread::scope(|scope| {
        let stopping = scope.spawn(|| vm.stop());
        wait_until("the stop to begin", || refusal().contains("has ended"));
        assert!(refusal().contains(&StopCause::HostStop.to_string()), "{}", refusal());
        go.send(()).unwrap();
        let cause = stopping.join().unwrap().unwrap();
        assert!(matches!(cause, StopCause::SandboxViolation { .. }), "{cause}");
        assert_eq!(vm.state(), VmState::Stopped(cause.clone()));
        assert!(refusal().contains(&cause.to_string()), "{} does not name {cause}", refusal());
    });
    let other = host().build(bare(&SPINS)).unwrap();
    other.start().unwrap();
    assert_eq!(other.stop().unwrap(), StopCause::HostStop);
}
