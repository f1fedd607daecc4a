//! The thread that does something when the host's memory gets short, in its sandbox.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use vmbed::internals::sandbox;
use vmbed::{
    Access, BackingKind, Bytes, Device, ErrorKind, EventKind, Host, IoList, NetBackend, NetConfig, Offloads,
    ReclaimConfig, ReclaimSandbox, StopCause, Vm, VmConfig, VmState,
};

use crate::guests::Op;
use crate::life::{LONG, SPINS, bare, ends, host, pc, start, wait_until};
use crate::refuse::{KEPT, bystander, forbidden, lives};
use crate::{part, trial};

pub fn add(trials: &mut Vec<Trial>) {
    trials.push(trial("reclaim_is_refused_and_ends_and_no_vm_does", refused));
    trials.push(trial("reclaim_s_sandbox_begins_and_ends_when_it_is_told", settings));
    trials.push(trial("reclaim_s_failure_is_told_once_and_not_after_an_end", once));
    trials.push(trial("code_of_the_embedder_s_runs_outside_of_reclaim_s", || drop(part("reclaim"))));
}

/// More than any machine has free.
const ALWAYS: Bytes = Bytes(1 << 60);

/// Does nothing, in its sandbox.
fn nothing() -> ReclaimConfig {
    let mut config = ReclaimConfig::default();
    (config.balloon_below, config.page_out_below) = (Bytes(0), Bytes(0));
    (config.interval, config.sandbox) = (Duration::from_millis(10), ReclaimSandbox::Required);
    config
}

fn pauses() -> ReclaimConfig {
    let mut config = nothing();
    (config.pause_below, config.pause_deadline) = (ALWAYS, Duration::from_secs(600));
    config
}

/// Outside of any sandbox of its own.
fn spins(host: &Host, change: impl FnOnce(&mut VmConfig)) -> Vm {
    let mut config = bare(&SPINS);
    config.sandbox = None;
    change(&mut config);
    let vm = host.build(config).unwrap();
    vm.start().unwrap();
    vm
}

/// Why nobody looks after the VM's memory any more.
fn failure(vm: &Vm) -> String {
    let end = Instant::now() + LONG;
    while let Some(event) = vm.events().wait_event(end.saturating_duration_since(Instant::now())) {
        if let EventKind::ReclaimFailed { why } = event.kind {
            return why;
        }
    }
    panic!("waited a minute for the event that tells of it");
}

fn refused() {
    let (host, other) = (host(), bystander());
    let vm = spins(&host, |_| ());
    for (name, call) in forbidden(4) {
        host.set_reclaim(Some(&pauses())).unwrap();
        wait_until("the VM to be paused", || vm.state() == VmState::Paused);
        let error = sandbox::on_reclaim(&host, call).expect("it is there").expect_err(name);
        assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{name}: {error}");
        let why = failure(&vm);
        assert!(why.contains("vmbed-reclaim") && why.contains(name), "{why} does not name {name}");
        wait_until("the VM to go on", || vm.state() == VmState::Running);
        assert_eq!(host.reclaim_sandbox(), None);
        // It is begun anew when it is asked for.
        host.set_reclaim(Some(&nothing())).unwrap();
        assert_eq!(sandbox::on_reclaim(&host, || 7), Some(7));
    }
    drop(host);
    lives(&vm);
    lives(&other);
}

/// How often it is told of a failure that no event of the VM's is left behind.
fn failures(vm: &Vm) -> usize {
    let failed = |event: &vmbed::Event| matches!(event.kind, EventKind::ReclaimFailed { .. });
    std::iter::from_fn(|| vm.events().next_event()).filter(failed).count()
}

fn once() {
    let host = host();
    let (vm, ended) = (spins(&host, |_| ()), spins(&host, |_| ()));
    assert_eq!(ended.stop().unwrap(), StopCause::HostStop);
    // Refused twice in one turn.
    host.set_reclaim(Some(&pauses())).unwrap();
    wait_until("the VM to be paused", || vm.state() == VmState::Paused);
    let twice = sandbox::on_reclaim(&host, || {
        [(), ()].map(|()| std::fs::File::open("/etc/passwd").map(drop).unwrap_err().raw_os_error())
    });
    assert_eq!(twice, Some([Some(libc::EPERM); 2]));
    wait_until("the VM to go on", || vm.state() == VmState::Running);
    host.set_reclaim(None).unwrap();
    assert_eq!((failures(&vm), failures(&ended)), (1, 0));
    // A defect, in a sandbox or not.
    let mut config = pauses();
    for sandbox in [ReclaimSandbox::Off, ReclaimSandbox::Required] {
        config.sandbox = sandbox;
        host.set_reclaim(Some(&config)).unwrap();
        wait_until("the VM to be paused", || vm.state() == VmState::Paused);
        assert_eq!(sandbox::on_reclaim(&host, || -> u32 { panic!("as the test wants") }), None);
        let why = failure(&vm);
        // What the panic's hook asks for, a file for its backtrace, is refused in a sandbox, and that came first then.
        let refused = why.contains("vmbed-reclaim") && why.contains("sandbox refuses");
        let is_hook = sandbox == ReclaimSandbox::Required && refused;
        assert!(why == "panicked: as the test wants" || is_hook, "{why}");
        wait_until("the VM to go on", || vm.state() == VmState::Running);
        host.set_reclaim(None).unwrap();
        assert_eq!((failures(&vm), failures(&ended)), (0, 0));
    }
    assert_eq!(vm.stop().unwrap(), StopCause::HostStop);
}

fn settings() {
    let host = host();
    assert_eq!(host.reclaim_sandbox(), None);
    let mut config = nothing();
    host.set_reclaim(Some(&config)).unwrap();
    let report = host.reclaim_sandbox().unwrap();
    assert!(report.seccomp && report.landlock.is_some(), "{report:?}");
    assert_eq!(report.threads, ["vmbed-reclaim"]);
    let thread = || sandbox::on_reclaim(&host, || std::thread::current().id()).unwrap();
    let first = thread();
    config.interval = Duration::from_millis(20);
    host.set_reclaim(Some(&config)).unwrap();
    assert_eq!(thread(), first, "the same goes on");
    config.sandbox = ReclaimSandbox::Off;
    host.set_reclaim(Some(&config)).unwrap();
    assert_eq!(host.reclaim_sandbox(), None);
    assert_ne!(thread(), first, "a thread does not leave a sandbox");
    let opened = sandbox::on_reclaim(&host, || std::fs::File::open("/dev/null").map(drop));
    assert!(opened.unwrap().is_ok());
    config.sandbox = ReclaimSandbox::IfPresent;
    host.set_reclaim(Some(&config)).unwrap();
    assert!(host.reclaim_sandbox().unwrap().seccomp);
    host.set_reclaim(None).unwrap();
    assert_eq!(host.reclaim_sandbox(), None);
}

/// Keeps a vCPU until it is let go.
struct Keeps(Mutex<Sender<()>>, Mutex<Receiver<()>>);

impl Device for Keeps {
    fn read(&self, _: Access, _: &mut [u8]) -> vmbed::Result<()> {
        Ok(())
    }
    fn write(&self, _: Access, _: &[u8]) -> vmbed::Result<()> {
        let _ = self.0.lock().unwrap().send(());
        let _ = self.1.lock().unwrap().recv_timeout(LONG);
        Ok(())
    }
}

/// All that it does, for the lists. Where VMs learn, so does it.
pub fn everything() {
    let host = host();
    // A guest of 4 MiB that says that 2 MiB of them are available.
    let mut config = pc();
    config.sandbox = None;
    let asks = [(Op::Account, 0, 4, 2), (Op::Target, 384, 0, 0), (Op::Receive, 0, 0, 0)];
    let ballooned = start(host.builder(config), &asks);
    let mut limits = nothing();
    limits.balloon_below = ALWAYS;
    host.set_reclaim(Some(&limits)).unwrap();
    wait_until("the guest to be asked", || {
        ballooned.balloon_statistics().unwrap().target == Bytes(384 << 12)
    });
    host.set_reclaim(None).unwrap();
    drop(ballooned);
    let anonymous = |config: &mut VmConfig| config.backing.kind = BackingKind::Anonymous;
    let vm = spins(&host, anonymous);
    host.set_reclaim(Some(&pauses())).unwrap();
    wait_until("the VM to be paused", || vm.state() == VmState::Paused);
    host.set_reclaim(Some(&nothing())).unwrap();
    wait_until("the VM to go on", || vm.state() == VmState::Running);
    // One and a half huge pages.
    let size = Bytes(3 << 20);
    let victims = [BackingKind::Anonymous, BackingKind::Memfd].map(|kind| {
        spins(&host, |config| {
            (config.backing.kind, config.promise.victim, config.memory) = (kind, Some(1), size);
        })
    });
    let mut stops = nothing();
    stops.stop_below = ALWAYS;
    host.set_reclaim(Some(&stops)).unwrap();
    for victim in &victims {
        assert_eq!(ends(victim), StopCause::MemoryPressure);
        wait_until("its memory to be free", || victim.memory().backing == Bytes(0));
    }
    host.set_reclaim(None).unwrap();
    // One that does not leave while the thread ends: its memory is waited for.
    // out 0x10, al; jmp to it
    let mut config = bare(&[0xe6, 0x10, 0xeb, 0xfc]);
    (config.sandbox, config.promise.victim) = (None, Some(1));
    let ((said, says), (go, goes)) = (channel(), channel());
    let late = host.builder(config).pio_device(
        "keeps",
        0x10,
        1,
        Arc::new(Keeps(Mutex::new(said), Mutex::new(goes))),
    );
    let late = late.build().unwrap();
    late.start().unwrap();
    says.recv_timeout(LONG).unwrap();
    host.set_reclaim(Some(&stops)).unwrap();
    let stopping = |vm: &Vm| {
        let stage = |event: vmbed::Event| matches!(event.kind, EventKind::MemoryPressure { .. });
        std::iter::from_fn(|| vm.events().next_event()).any(stage)
    };
    wait_until("the VM to be stopped", || stopping(&late));
    host.set_reclaim(None).unwrap();
    drop(go);
    assert_eq!(ends(&late), StopCause::MemoryPressure);
    assert_eq!(vm.stop().unwrap(), StopCause::HostStop);
}

/// What is done when a network of the embedder's is told of offloads, which it does where its VM goes on.
type Callback = Arc<Mutex<Option<Box<dyn FnOnce() + Send>>>>;

/// Says on which thread it is told.
struct Telling {
    socket: UnixDatagram,
    told: Arc<Mutex<Vec<String>>>,
    next: Callback,
}

impl NetBackend for Telling {
    fn receive(&mut self, _: &IoList<'_>) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }
    fn send(&mut self, _: &IoList<'_>) -> io::Result<()> {
        Ok(())
    }
    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
    fn set_offloads(&mut self, _: Offloads) {
        let thread = std::thread::current().name().unwrap_or_default().to_owned();
        self.told.lock().unwrap().push(thread);
        let next = self.next.lock().unwrap().take();
        if let Some(next) = next {
            next();
        }
    }
}

fn is_running(thread: &str) -> bool {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let name =
        |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
    tasks.map(name).any(|name| name.trim_end() == thread)
}

/// In a process of its own, with one logger.
pub fn inside() {
    log::set_logger(&KEPT).unwrap();
    log::set_max_level(log::LevelFilter::Trace);
    let host = host();
    let (near, _far) = UnixDatagram::pair().unwrap();
    let (told, next) = (Arc::new(Mutex::new(Vec::new())), Callback::default());
    let backend = Telling { socket: near, told: told.clone(), next: next.clone() };
    let callback = |f: Box<dyn FnOnce() + Send>| *next.lock().unwrap() = Some(f);
    let mut config = pc();
    (config.sandbox, config.nets) = (None, vec![NetConfig::attached()]);
    let vm =
        start(host.builder(config).net_backend(0, backend), &[(Op::Send, 0, 60, 5), (Op::Receive, 0, 0, 0)]);
    wait_until("the card to be served", || told.lock().unwrap().len() == 1);
    host.set_reclaim(Some(&pauses())).unwrap();
    wait_until("the VM to be paused", || vm.state() == VmState::Paused);
    host.set_reclaim(Some(&nothing())).unwrap();
    wait_until("the VM to go on", || vm.state() == VmState::Running);
    assert_eq!(told.lock().unwrap().last().unwrap(), "vmbed-rguard1");
    let records = || KEPT.0.lock().unwrap().clone();
    for what in ["look: ", "Pause {", "Resume {"] {
        wait_until("the record of it", || {
            records().iter().any(|(thread, text)| thread == "vmbed-rguard2" && text.contains(what))
        });
    }
    assert!(records().iter().all(|(thread, _)| thread != "vmbed-reclaim"));
    // A callback that it waits for ends it, and hears that it cannot wait for its VM.
    let vm = Arc::new(vm);
    host.set_reclaim(Some(&pauses())).unwrap();
    wait_until("the VM to be paused", || vm.state() == VmState::Paused);
    let (own, its, (said, says)) = (host.clone(), vm.clone(), channel());
    callback(Box::new(move || {
        own.set_reclaim(None).unwrap();
        let refused = [its.pause().unwrap_err(), its.stop().unwrap_err()].map(|error| error.kind());
        // Last: who hears it has the VM alone.
        drop(its);
        said.send(refused).unwrap();
    }));
    host.set_reclaim(Some(&nothing())).unwrap();
    assert_eq!(says.recv_timeout(LONG).unwrap(), [ErrorKind::InvalidState; 2]);
    wait_until("the VM to go on", || vm.state() == VmState::Running);
    for thread in ["vmbed-reclaim", "vmbed-rguard0", "vmbed-rguard1", "vmbed-rguard2"] {
        wait_until("its threads to end", || !is_running(thread));
    }
    log::set_max_level(log::LevelFilter::Off);
    // One that panics ends its VM.
    host.set_reclaim(Some(&pauses())).unwrap();
    wait_until("the VM to be paused", || vm.state() == VmState::Paused);
    callback(Box::new(|| panic!("as the test wants")));
    host.set_reclaim(Some(&nothing())).unwrap();
    match ends(&vm) {
        StopCause::DeviceFault { device, why } => {
            assert_eq!((&*device, &*why), ("net0", "panicked: as the test wants"))
        }
        other => panic!("it ended otherwise: {other}"),
    }
    assert!(host.reclaim_sandbox().is_some(), "and nothing else does");
}
