//! What is refused, to whom, and what comes of it.

use std::fs::{File, OpenOptions};
use std::io;
use std::net::TcpListener;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::{Arc, LazyLock, Mutex};

use libtest_mimic::Trial;
use rustix::process::{Pid, Signal, kill_process};
use vmbed::internals::sandbox;
use vmbed::{
    Access, BlockBackend, BlockRequest, Device, DiskConfig, Dispatcher, ErrorKind, IoList, NetBackend,
    NetConfig, Network, StopCause, Vm, VmState,
};

use crate::life::{SIZE, SPINS, Scratch, bare, ends, host, pc, wait_until};
use crate::{part, trial};

pub fn add(trials: &mut Vec<Trial>) {
    trials.push(trial("vcpu_threads_are_refused_and_their_vm_stops", vcpus));
    trials.push(trial("device_threads_are_refused_and_their_vm_stops", || loops(0)));
    trials.push(trial("disk_threads_are_refused_and_their_vm_stops", || loops(1)));
    trials.push(trial("balloon_threads_are_refused_and_their_vm_stops", || loops(2)));
    trials.push(trial("only_the_library_s_threads_are_in_it", only_ours));
    trials.push(trial("code_of_the_embedder_s_is_not_let_in", foreign));
    trials.push(trial("the_logger_runs_outside", logger));
    trials.push(trial("no_file_is_opened", || drop(part("files"))));
}

/// Asked once, outside: threads in the sandbox may not ask.
static OWN: LazyLock<Pid> = LazyLock::new(rustix::process::getpid);

pub type Forbidden = (&'static str, fn() -> io::Result<()>);

/// A call as it is, with what it answers.
#[expect(unsafe_code, reason = "the standard library makes none that is so wrong")]
fn raw(number: i64, arguments: [i64; 4]) -> io::Result<()> {
    let [first, second, third, fourth] = arguments;
    // SAFETY: none of those below points to anything, and were they made, they would fail or change nothing that is used.
    let answer = unsafe { libc::syscall(number, first, second, third, fourth, -1i64, 0i64) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// getpid(2) of the table for 32-bit programs.
#[expect(unsafe_code, reason = "another way into the kernel")]
fn as_32_bits() -> io::Result<()> {
    let answer: i32;
    // SAFETY: it takes no arguments and changes nothing; the kernel may clear the registers that are named.
    unsafe {
        std::arch::asm!("int 0x80", inout("eax") 20 => answer, out("r8") _, out("r9") _, out("r10") _, out("r11") _);
    }
    if answer < 0 { Err(io::Error::from_raw_os_error(-answer)) } else { Ok(()) }
}

const EXECUTABLE: i64 = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) as i64;
const OWN_MEMORY: i64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as i64;

/// Calls that no thread may make: others, and those on the lists with arguments that are not.
const FORBIDDEN: [Forbidden; 21] = [
    ("mmap", || raw(libc::SYS_mmap, [0, 4096, EXECUTABLE, OWN_MEMORY])),
    ("mmap", || raw(libc::SYS_mmap, [0, 4096, libc::PROT_READ.into(), libc::MAP_SHARED.into()])),
    ("mprotect", || raw(libc::SYS_mprotect, [0, 4096, EXECUTABLE, 0])),
    ("madvise", || raw(libc::SYS_madvise, [0, 0, libc::MADV_REMOVE.into(), 0])),
    ("ioctl", || raw(libc::SYS_ioctl, [-1, libc::TIOCSTI as i64, 0, 0])),
    ("fcntl", || raw(libc::SYS_fcntl, [-1, libc::F_SETFL.into(), 0, 0])),
    ("fallocate", || raw(libc::SYS_fallocate, [-1, libc::FALLOC_FL_COLLAPSE_RANGE.into(), 0, 4096])),
    ("tgkill", || raw(libc::SYS_tgkill, [1, 1, libc::SIGURG.into(), 0])),
    ("tgkill", || raw(libc::SYS_tgkill, [OWN.as_raw_pid().into(), 0, libc::SIGTERM.into(), 0])),
    ("socket", || raw(libc::SYS_socket, [libc::AF_UNIX.into(), libc::SOCK_STREAM.into(), 0, 0])),
    ("socket", || raw(libc::SYS_socket, [libc::AF_NETLINK.into(), libc::SOCK_RAW.into(), 0, 0])),
    ("connect", || raw(libc::SYS_connect, [-1, 0, 0, 0])),
    ("bind", || raw(libc::SYS_bind, [-1, 0, 0, 0])),
    ("execve", || raw(libc::SYS_execve, [0, 0, 0, 0])),
    ("io_uring_setup", || raw(libc::SYS_io_uring_setup, [0, 0, 0, 0])),
    ("a call of 32-bit programs", as_32_bits),
    ("openat", || File::open("/etc/passwd").map(drop)),
    ("socket", || TcpListener::bind("127.0.0.1:0").map(drop)),
    ("mkdir", || std::fs::create_dir("/tmp/vmbed-sandbox-never")),
    ("clone", || std::thread::Builder::new().spawn(|| ()).map(drop)),
    ("kill", || kill_process(*OWN, Signal::CONT).map_err(Into::into)),
];

const RUN: Forbidden = ("ioctl", || raw(libc::SYS_ioctl, [-1, 0xae80, 0, 0]));
const SYNC: Forbidden = ("fdatasync", || raw(libc::SYS_fdatasync, [-1, 0, 0, 0]));
const WRITE: Forbidden = ("pwrite64", || raw(libc::SYS_pwrite64, [-1, 0, 0, 0]));
const RING: Forbidden = ("io_uring_enter", || raw(libc::SYS_io_uring_enter, [-1, 0, 0, 0]));
const SEND: Forbidden = ("sendto", || raw(libc::SYS_sendto, [-1, 0, 0, 0]));
const TURN: Forbidden = ("epoll_wait", || raw(libc::SYS_epoll_wait, [-1, 0, 0, 0]));
const HOLE: Forbidden = ("fallocate", || raw(libc::SYS_fallocate, [-1, 3, 0, 4096]));

/// Of one descriptor, and without waiting, a vCPU may.
const WAIT: Forbidden = ("poll", || raw(libc::SYS_poll, [0, 1, 1000, 0]));
const MANY: Forbidden = ("poll", || raw(libc::SYS_poll, [0, 2, 0, 0]));

/// Calls that threads of other kinds may make: of vCPUs, the console and cards, disks, the balloon, and the one that reclaims memory.
const OF_OTHERS: [&[Forbidden]; 5] = [
    &[SYNC, WRITE, RING, HOLE, SEND, TURN, WAIT, MANY],
    &[RUN, SYNC, WRITE, RING, HOLE],
    &[RUN, SEND],
    &[RUN, SYNC, WRITE, RING, SEND],
    &[RUN, SYNC, WRITE, RING, SEND],
];

/// What that kind of thread may not.
pub fn forbidden(kind: usize) -> impl Iterator<Item = Forbidden> {
    FORBIDDEN.iter().chain(OF_OTHERS[kind]).copied()
}

/// A VM that goes on meanwhile.
pub fn bystander() -> Vm {
    let _ = *OWN;
    let vm = host().build(bare(&SPINS)).unwrap();
    vm.start().unwrap();
    vm
}

pub fn lives(vm: &Vm) {
    assert_eq!(vm.state(), VmState::Running);
    vm.pause().unwrap();
    vm.resume().unwrap();
    assert_eq!(vm.stop().unwrap(), StopCause::HostStop);
}

fn stopped_for(vm: &Vm, thread: &str, call: &str) {
    match ends(vm) {
        StopCause::SandboxViolation { thread: which, call: what } => {
            assert_eq!(which, thread);
            assert!(what.starts_with(call), "{what} is not {call}");
        }
        cause => panic!("{thread} made the call {call}, and its VM ended otherwise: {cause}"),
    }
}

/// What a call came to on a thread in the sandbox.
type Outcome = Arc<Mutex<Option<io::Result<()>>>>;

/// Makes a call when the guest writes.
struct Calls(fn() -> io::Result<()>, Outcome);

impl Device for Calls {
    fn read(&self, _: Access, _: &mut [u8]) -> vmbed::Result<()> {
        Ok(())
    }

    fn write(&self, _: Access, _: &[u8]) -> vmbed::Result<()> {
        *self.1.lock().unwrap() = Some((self.0)());
        Ok(())
    }
}

fn vcpus() {
    let other = bystander();
    for (name, call) in forbidden(0) {
        // out 0x10, al; jmp $
        let builder = host().builder(bare(&[0xe6, 0x10, 0xeb, 0xfe]));
        let outcome = Outcome::default();
        let device = Arc::new(Calls(call, outcome.clone()));
        let vm = sandbox::trust(builder.pio_device("calls", 0x10, 1, device)).build().unwrap();
        vm.start().unwrap();
        stopped_for(&vm, "vmbed-vcpu0", name);
        let error = outcome.lock().unwrap().take().expect("it was made").expect_err(name);
        assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{name}: {error}");
    }
    lives(&other);
}

fn loops(index: usize) {
    let other = bystander();
    for (name, call) in forbidden(1 + index) {
        let image = Scratch::disk();
        let mut config = pc();
        config.disks = vec![image.config()];
        let vm = host().build(config).unwrap();
        let error = sandbox::on_loop(&vm, index, call).expect("it has that loop").expect_err(name);
        assert_eq!(error.raw_os_error(), Some(libc::EPERM), "{name}: {error}");
        vm.start().unwrap_or_else(|error| assert_eq!(error.kind(), ErrorKind::InvalidState));
        stopped_for(&vm, &format!("vmbed-dev{index}"), name);
    }
    lives(&other);
}

/// A line of a thread's status in /proc, by the thread's name.
fn status(thread: &str, line: &str) -> String {
    for task in std::fs::read_dir("/proc/self/task").unwrap().flatten() {
        let text = std::fs::read_to_string(task.path().join("status")).unwrap_or_default();
        let value = |key: &str| {
            text.lines().find_map(|l| l.strip_prefix(key)).map(|v| v.trim_start_matches(':').trim())
        };
        if value("Name") == Some(thread) {
            return value(line).unwrap_or_default().to_owned();
        }
    }
    panic!("no thread is called {thread}");
}

fn only_ours() {
    let image = Scratch::disk();
    let mut config = pc();
    config.disks = vec![image.config()];
    let sandbox = config.sandbox.as_mut().unwrap();
    sandbox.disks = false;
    let vm = host().build(config).unwrap();
    let report = vm.sandbox().unwrap();
    assert_eq!(report.threads, ["vmbed-dev0", "vmbed-dev2", "vmbed-vcpu0"]);
    assert!(report.seccomp && report.landlock.is_some(), "{report:?}");
    // Other trials run at the same time, in threads of the same names, but all are in the sandbox: ask for what only one has.
    let own = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    assert!(own.contains("NoNewPrivs:\t0\n") && own.contains("Seccomp:\t0\n"), "{own}");
    let inside =
        sandbox::on_loop(&vm, 1, || std::fs::read_to_string("/proc/thread-self/status").unwrap()).unwrap();
    assert!(inside.contains("NoNewPrivs:\t0\n"), "the disk's thread is not in it: {inside}");
    assert_eq!(
        (status("vmbed-vcpu0", "NoNewPrivs"), status("vmbed-vcpu0", "Seccomp")),
        ("1".into(), "2".into())
    );
    assert_eq!(
        (status("vmbed-guard0", "NoNewPrivs"), status("vmbed-guard1", "Seccomp")),
        ("0".into(), "0".into())
    );
    assert_eq!(status("vmbed-guard2", "Seccomp"), "0");
    let mut without = bare(&SPINS);
    without.sandbox = None;
    assert_eq!(host().build(without).unwrap().sandbox(), None);
}

struct Nothing(UnixDatagram);

impl Device for Nothing {
    fn read(&self, _: Access, _: &mut [u8]) -> vmbed::Result<()> {
        Ok(())
    }
    fn write(&self, _: Access, _: &[u8]) -> vmbed::Result<()> {
        Ok(())
    }
}

impl BlockBackend for Nothing {
    fn size(&self) -> u64 {
        SIZE
    }
    fn submit(&mut self, request: BlockRequest) {
        request.complete(Ok(()));
    }
}

impl NetBackend for Nothing {
    fn receive(&mut self, _: &IoList<'_>) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }
    fn send(&mut self, _: &IoList<'_>) -> io::Result<()> {
        Ok(())
    }
    fn fd(&self) -> std::os::fd::BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.0)
    }
}

fn nothing() -> Nothing {
    Nothing(UnixDatagram::unbound().unwrap())
}

fn foreign() {
    let mut config = pc();
    (config.disks, config.nets) = (vec![DiskConfig::attached()], vec![NetConfig::attached()]);
    let everything = |config: &vmbed::VmConfig| {
        let builder = host().builder(config.clone()).pio_device("port", 0x10, 1, Arc::new(nothing()));
        let builder = builder.mmio_device("window", 0xe000_0000, 16, Arc::new(nothing()));
        let builder = builder.net_backend(0, nothing()).disk_backend(0, nothing());
        builder.console_callback(|_| ()).pio_doorbell("ours", 0x20, 1).build()
    };
    let fields = |config: &vmbed::VmConfig| {
        let error = everything(config).expect_err("it has code of ours");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
        for word in ["'port'", "'window'", "net0"] {
            assert!(
                !config.sandbox.as_ref().unwrap().vcpus || error.to_string().contains(word),
                "{word}: {error}"
            );
        }
        assert!(!error.to_string().contains("'ours'"), "a doorbell is vmbed's own: {error}");
        error.fields().iter().map(|field| field.field.clone()).collect::<Vec<_>>()
    };
    let (vcpus, devices, disks) = ("sandbox.vcpus", "sandbox.devices", "sandbox.disks");
    assert_eq!(fields(&config), [vcpus, vcpus, vcpus, devices, devices, disks]);
    config.sandbox.as_mut().unwrap().vcpus = false;
    assert_eq!(fields(&config), [devices, devices, disks]);
    config.sandbox.as_mut().unwrap().devices = false;
    assert_eq!(fields(&config), [disks]);
    config.sandbox.as_mut().unwrap().disks = false;
    let vm = everything(&config).unwrap();
    assert_eq!(vm.sandbox().unwrap().threads, ["vmbed-dev2"], "the balloon's is left");
    drop(vm);
    let loops = Dispatcher::new().unwrap();
    let error = host().builder(pc()).dispatcher(&loops).build().unwrap_err();
    assert!(error.to_string().contains("dispatcher"), "{error}");
    let error = host().builder(bare(&SPINS)).caller_vcpus().build().unwrap_err();
    assert!(error.to_string().contains("caller_vcpus"), "{error}");
    // What is attached later must not be ours either; anything else may be, and is opened again outside when it went away.
    let (near, _far) = UnixDatagram::pair().unwrap();
    let mut config = pc();
    config.nets = vec![NetConfig::attached()];
    let vm = host().builder(config).net_fd(0, near).unwrap().build().unwrap();
    let error = vm.change_net(0, Network::Backend(Box::new(nothing()))).unwrap_err();
    assert!(error.kind() == ErrorKind::InvalidArgument && error.to_string().contains("sandbox"), "{error}");
    for network in [Network::Tap("vmbednone0".into()), Network::Stream("/vmbed/none".into())] {
        let error = vm.change_net(0, network).unwrap_err();
        assert!(error.kind() == ErrorKind::NotFound && !error.to_string().contains("sandbox"), "{error}");
    }
}

/// Keeps on which thread it was called with what.
pub struct Keeps(pub Mutex<Vec<(String, String)>>);

impl log::Log for Keeps {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }
    fn log(&self, record: &log::Record<'_>) {
        let thread = std::thread::current().name().unwrap_or_default().to_owned();
        self.0.lock().unwrap().push((thread, record.args().to_string()));
    }
    fn flush(&self) {}
}

pub static KEPT: Keeps = Keeps(Mutex::new(Vec::new()));

fn logger() {
    log::set_logger(&KEPT).unwrap();
    log::set_max_level(log::LevelFilter::Debug);
    // The console's output ends, which its thread writes to the log.
    // mov dx, 0x3f8; mov al, 'x'; out dx, al; jmp to the out
    let mut config = bare(&[0xba, 0xf8, 0x03, 0xb0, b'x', 0xee, 0xeb, 0xfd]);
    config.platform = vmbed::Platform::Pc;
    let (near, far) = UnixStream::pair().unwrap();
    drop(far);
    let vm = host().builder(config).console_output(&near).unwrap().build().unwrap();
    vm.start().unwrap();
    let told =
        || KEPT.0.lock().unwrap().iter().find(|(_, text)| text.contains("console: output ends")).cloned();
    wait_until("the record of the console's end", || told().is_some());
    assert_eq!(told().unwrap().0, "vmbed-guard2");
    let threads: Vec<_> = KEPT.0.lock().unwrap().iter().map(|(thread, _)| thread.clone()).collect();
    let inside = |name: &&String| name.starts_with("vmbed-dev") || name.starts_with("vmbed-vcpu");
    assert_eq!(threads.iter().find(inside), None, "the logger was called in the sandbox");
    log::set_max_level(log::LevelFilter::Off);
    assert_eq!(vm.stop().unwrap(), StopCause::HostStop);
}

/// In a process of its own, whose VMs learn: there filters let everything through, and Landlock is what is left.
pub fn files() {
    sandbox::learn();
    let image = Scratch::disk();
    let mut config = pc();
    config.disks = vec![image.config()];
    let vm = host().build(config).unwrap();
    for index in 0..3 {
        let open = |path: &'static str| {
            let open = move || {
                OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path).map(drop)
            };
            sandbox::on_loop(&vm, index, open).unwrap().map_err(|error| error.raw_os_error())
        };
        for path in ["/dev/null", "/dev/kvm", "/dev/net/tun", "/proc/self/mem"] {
            assert_eq!(open(path), Err(Some(libc::EACCES)), "{path}: Landlock");
            let here = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path);
            assert!(here.is_ok(), "{path} is there for others: {here:?}");
        }
        let listed = sandbox::on_loop(&vm, index, || std::fs::read_dir("/").map(drop)).unwrap();
        assert_eq!(listed.unwrap_err().raw_os_error(), Some(libc::EACCES));
    }
    assert_eq!(vm.state(), VmState::Built);
    let host = host();
    let mut reclaim = vmbed::ReclaimConfig::default();
    reclaim.sandbox = vmbed::ReclaimSandbox::Required;
    host.set_reclaim(Some(&reclaim)).unwrap();
    let opened = sandbox::on_reclaim(&host, || File::open("/proc/meminfo").map(drop)).unwrap();
    assert_eq!(opened.unwrap_err().raw_os_error(), Some(libc::EACCES));
}
