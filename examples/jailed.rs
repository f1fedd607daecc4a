//! One VM in a process of its own that can do nothing else, to copy from: for guests of strangers. It opens what the guest is
//! given, goes into namespaces with an empty root, gives up its user, its capabilities and every way to new ones, and builds
//! the VM there, in vmbed's own sandbox.
//!
//! ```text
//! jailed --kernel FILE [--initrd FILE] [--cmdline TEXT] [--disk FILE[,ro]]… [--tap NAME]… [--user UID[:GID]] …
//! ```
//! As root it becomes `--user`; anybody else needs user namespaces. SIGTERM presses the guest's power button, the second one ends
//! it. Exit status: 0 the guest powered off, 2 it asked for a reboot, 3 it crashed, 1 anything else.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io::{Read, stdout};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use landlock::{
    ABI, Access, AccessFs, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus, path_beneath_rules,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Gid, Uid};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, mount_remount, unmount,
};
use rustix::process::{Pid, Resource, Rlimit, Signal};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch, sock_filter,
};
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGTERM};
use vmbed::{
    BareBoot, Bytes, CpuMode, DiskConfig, EventKind, Host, LinuxBoot, NetConfig, Platform, SandboxConfig,
    StopCause, VmBuilder, VmConfig,
};

type Done<T> = Result<T, Box<dyn Error>>;

const USAGE: &str =
    "usage: jailed --kernel FILE [--initrd FILE] [--cmdline TEXT] [--disk FILE[,ro]]... [--tap NAME]...
              [--vcpus N] [--memory 512M] [--user UID[:GID]] [--best-effort] [--check]
       jailed --bare FILE ...

  --bare FILE      machine code that starts in real mode at 0x1000, instead of a kernel
  --tap NAME       an interface of this network namespace: ip tuntap add NAME mode tap user $USER
  --user UID[:GID] whom to become, as root (default 65534, which is nobody's)
  --best-effort    go on where the kernel lacks seccomp's notices or Landlock
  --check          in the jail, try what it refuses, say what came of each, and run no guest

SIGTERM presses the power button, the second time it ends the guest (a bare one at once).
Exit status: 0 power-off or halt, 2 reboot, 3 crash, 1 error.";

/// Set in the process that is inside: the descriptors that it was given, of disks and then of TAP interfaces.
const INSIDE: &str = "JAILED_INSIDE";
/// Set where the process is root of a user namespace of its own, which knows nobody else.
const MAPPED: &str = "JAILED_MAPPED";
/// Where the new root is mounted until it is one: any directory that is there.
const PLACE: &str = "/tmp";

#[derive(Default)]
struct Options {
    kernel: Option<PathBuf>,
    bare: bool,
    initrd: Option<PathBuf>,
    cmdline: Option<String>,
    disks: Vec<(PathBuf, bool)>,
    taps: Vec<String>,
    vcpus: u16,
    memory: Option<Bytes>,
    user: Option<(u32, u32)>,
    best_effort: bool,
    check: bool,
}

fn main() -> ExitCode {
    let options = match arguments() {
        Ok(Some(options)) => options,
        Ok(None) => {
            println!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(why) => {
            eprintln!("jailed: {why}\n{USAGE}");
            return ExitCode::FAILURE;
        }
    };
    let done = match std::env::var(INSIDE) {
        Ok(given) => inside(&options, &given).map(|cause| match cause {
            StopCause::GuestPoweroff | StopCause::GuestHalt => 0,
            StopCause::GuestReset => 2,
            StopCause::TripleFault | StopCause::GuestPanic => 3,
            StopCause::HostStop => 1,
            cause => {
                eprintln!("jailed: {cause}");
                1
            }
        }),
        Err(_) => outside(&options),
    };
    done.map(ExitCode::from).unwrap_or_else(|error| {
        eprintln!("jailed: {error}");
        ExitCode::FAILURE
    })
}

fn arguments() -> Done<Option<Options>> {
    let mut options = Options { vcpus: 1, ..Options::default() };
    let mut all = std::env::args().skip(1);
    while let Some(name) = all.next() {
        let mut value = || all.next().ok_or(format!("{name} wants a value"));
        match name.as_str() {
            "--help" | "-h" => return Ok(None),
            "--kernel" => options.kernel = Some(value()?.into()),
            "--bare" => (options.kernel, options.bare) = (Some(value()?.into()), true),
            "--initrd" => options.initrd = Some(value()?.into()),
            "--cmdline" => options.cmdline = Some(value()?),
            "--disk" => {
                let value = value()?;
                let (path, readonly) =
                    value.strip_suffix(",ro").map_or((&*value, false), |path| (path, true));
                options.disks.push((path.into(), readonly));
            }
            "--tap" => options.taps.push(value()?),
            "--vcpus" => options.vcpus = value()?.parse().map_err(|_| "--vcpus wants a number")?,
            "--memory" => options.memory = Some(value()?.parse().map_err(|e| format!("--memory: {e}"))?),
            "--user" => {
                let value = value()?;
                let (user, group) = value.split_once(':').unwrap_or((&value, &value));
                let number = |text: &str| text.parse().map_err(|_| format!("--user: {text:?} is no number"));
                options.user = Some((number(user)?, number(group)?));
            }
            "--best-effort" => options.best_effort = true,
            "--check" => options.check = true,
            _ => return Err(format!("{name} is no option").into()),
        }
    }
    if options.kernel.is_none() {
        return Err("it needs --kernel or --bare".into());
    }
    Ok(Some(options))
}

/// Opens what the guest is given, and starts this program once more in namespaces of its own. Answers that one's exit status.
fn outside(options: &Options) -> Done<u8> {
    keep_what_was_inherited()?;
    let mut given = Vec::new();
    let mut numbers = Vec::new();
    let mut give = |fd: OwnedFd| -> Done<()> {
        // The program that is started next has it.
        fcntl_setfd(&fd, FdFlags::empty())?;
        numbers.push(fd.as_raw_fd().to_string());
        given.push(fd);
        Ok(())
    };
    for (path, readonly) in &options.disks {
        give(open(path, !readonly)?.into())?;
    }
    for name in &options.taps {
        give(tap(name)?)?;
    }
    for path in options.kernel.iter().chain(&options.initrd) {
        // Opened inside, where they are mounted from; here it would be a pity to be told late.
        open(path, false)?;
    }
    let privileged = rustix::thread::capabilities(None)?.effective.contains(CapabilitySet::SYS_ADMIN);
    if privileged {
        namespaces(UnshareFlags::empty())?;
    } else {
        become_root_of_a_user_namespace()?;
    }
    let (ended, raised) = UnixStream::pair()?;
    signal_hook::low_level::pipe::register(SIGCHLD, raised)?;
    let signals = signals()?;
    let mut command = Command::new("/proc/self/exe");
    command.args(std::env::args_os().skip(1)).env(INSIDE, numbers.join(" ")).stdin(Stdio::null());
    if !privileged {
        command.env(MAPPED, "1");
    }
    let mut child = command.spawn()?;
    drop(given);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1));
        }
        // No thread: there can be none where the next process is in another namespace of process ids.
        let [over, signalled] = ready([ended.as_fd(), signals.as_fd()])?;
        if over {
            let _ = (&ended).read(&mut [0; 16]);
        }
        if signalled {
            let _ = (&signals).read(&mut [0; 16]);
            let _ = rustix::process::kill_process(Pid::from_child(&child), Signal::TERM);
        }
    }
}

/// From the next program: whoever started this one may have left it descriptors that it knows nothing of.
#[expect(unsafe_code, reason = "close_range has no safe wrapper")]
fn keep_what_was_inherited() -> Done<()> {
    // SAFETY: integers go in, and nothing is closed before exec(2).
    if unsafe { libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as _) } < 0 {
        return Err(format!("close_range (since Linux 5.11): {}", std::io::Error::last_os_error()).into());
    }
    Ok(())
}

/// Readable when somebody wants an end.
fn signals() -> Done<UnixStream> {
    let (signals, raised) = UnixStream::pair()?;
    for signal in [SIGTERM, SIGINT, SIGHUP] {
        signal_hook::low_level::pipe::register(signal, raised.try_clone()?)?;
    }
    Ok(signals)
}

/// Waits until one of both is readable; which.
fn ready(fds: [BorrowedFd<'_>; 2]) -> Done<[bool; 2]> {
    let mut polled = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
    match poll(&mut polled, None) {
        Err(rustix::io::Errno::INTR) => Ok([false; 2]),
        other => {
            other?;
            Ok(polled.map(|fd| !fd.revents().is_empty()))
        }
    }
}

fn open(path: &Path, write: bool) -> Done<File> {
    let opened = OpenOptions::new().read(true).write(write).open(path);
    Ok(opened.map_err(|e| format!("{}: {e}", path.display()))?)
}

/// A queue of the TAP interface, as `VmBuilder::net_fd` wants it.
#[expect(unsafe_code, reason = "TUNSETIFF has no safe wrapper")]
fn tap(name: &str) -> Done<OwnedFd> {
    let file = open(Path::new("/dev/net/tun"), true)?;
    if !Path::new("/sys/class/net").join(name).exists() {
        return Err(format!(
            "--tap {name}: there is no such interface: ip tuntap add {name} mode tap user $USER"
        )
        .into());
    }
    // SAFETY: an ifreq is plain data, for which zeroes are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from as _);
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as _;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives until the call returns.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } < 0 {
        return Err(format!("--tap {name}: {}", std::io::Error::last_os_error()).into());
    }
    Ok(file.into())
}

/// The next process is in all of them; this one keeps its process ids.
#[expect(unsafe_code, reason = "unshare could part threads from their descriptors")]
fn namespaces(more: UnshareFlags) -> Done<()> {
    let all = UnshareFlags::NEWNS
        | UnshareFlags::NEWPID
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWCGROUP;
    // SAFETY: none of the flags parts anything that threads share, and there is one thread.
    Ok(unsafe { rustix::thread::unshare_unsafe(all | more) }.map_err(|e| {
        format!("making namespaces: {e}: be root, or have user namespaces allowed (sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone)")
    })?)
}

fn become_root_of_a_user_namespace() -> Done<()> {
    let (user, group) = (rustix::process::geteuid(), rustix::process::getegid());
    namespaces(UnshareFlags::NEWUSER)?;
    let write = |file: &str, text: String| {
        std::fs::write(file, &text).map_err(|e| format!("writing {text:?} to {file}: {e}"))
    };
    write("/proc/self/setgroups", "deny".to_owned())?;
    write("/proc/self/uid_map", format!("0 {} 1", user.as_raw()))?;
    Ok(write("/proc/self/gid_map", format!("0 {} 1", group.as_raw()))?)
}

/// In the jail: gives everything up, and runs the VM.
#[expect(unsafe_code, reason = "descriptors that were inherited have numbers only")]
fn inside(options: &Options, given: &str) -> Done<StopCause> {
    // First: what the first process of a namespace has no handler for is lost.
    let signals = signals()?;
    // A terminal is the other process's, which tells of its ^C; nobody types into it from here (TIOCSTI).
    rustix::process::setsid()?;
    let given = given.split_whitespace().map(|number| {
        // SAFETY: the process that started this one has left it these descriptors, and nobody else uses them here.
        Ok(unsafe { OwnedFd::from_raw_fd(number.parse()?) })
    });
    let given: Vec<OwnedFd> = given.collect::<Done<_>>()?;
    for fd in &given {
        fcntl_setfd(fd, FdFlags::CLOEXEC)?;
    }
    // While there is a /dev, a /proc and a /sys to ask.
    let host = Host::open()?;
    let mut given = given.into_iter();
    let mut next = || given.next().ok_or("fewer descriptors than the command line wants");
    let images = [Some("kernel"), options.initrd.as_ref().map(|_| "initrd")].into_iter().flatten();
    let paths = options.kernel.iter().chain(&options.initrd);
    let images =
        images.zip(paths).map(|(name, path)| Ok((name, open(path, false)?))).collect::<Done<Vec<_>>>()?;
    // What a program that is taken over might have left open.
    let before = options.check.then(|| open(Path::new("/etc"), false)).transpose()?;
    empty_root(&images)?;
    limits(options)?;
    give_up_rights(options.user)?;
    // Another user's process would have forgotten it.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    restrict(options.best_effort)?;
    if let Some(directory) = before {
        check(&directory);
        // As if a guest had halted.
        return Ok(StopCause::GuestHalt);
    }
    let mut builder = host.builder(config(options)?).console_output(stdout())?;
    for index in 0..options.disks.len() {
        builder = builder.disk_fd(index, next()?)?;
    }
    for index in 0..options.taps.len() {
        builder = builder.net_fd(index, next()?)?;
    }
    run(builder, options.bare, &signals)
}

/// A root with nothing but those files, read-only.
fn empty_root(images: &[(&str, File)]) -> Done<()> {
    let failed = |what: &str| format!("making an empty root: {what}");
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(|e| format!("{}: {e}", failed("making mounts private")))?;
    let strict = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("jail", PLACE, "tmpfs", strict, Some(c"mode=0755,size=64k"))
        .map_err(|e| format!("{}: {e}", failed("a tmpfs")))?;
    for (name, file) in images {
        let target = Path::new(PLACE).join(name);
        File::create(&target)?;
        let source = format!("/proc/self/fd/{}", file.as_raw_fd());
        mount_bind(&source, &target).map_err(|e| format!("{}: {e}", failed(name)))?;
        mount_remount(&target, MountFlags::BIND | MountFlags::RDONLY | strict, c"")?;
    }
    std::env::set_current_dir(PLACE)?;
    rustix::process::pivot_root(".", ".").map_err(|e| format!("{}: {e}", failed("pivot_root")))?;
    unmount(".", UnmountFlags::DETACH)?;
    std::env::set_current_dir("/")?;
    Ok(mount_remount("/", MountFlags::BIND | MountFlags::RDONLY | strict, c"")?)
}

fn limits(options: &Options) -> Done<()> {
    // A queue for each vCPU is the most that a device has.
    let devices = 1 + options.disks.len() as u64 + options.taps.len() as u64;
    let files = 512 + 8 * u64::from(options.vcpus) * devices;
    let most =
        [(Resource::Core, 0), (Resource::Nofile, files), (Resource::Msgqueue, 0), (Resource::Rtprio, 0)];
    for (resource, most) in most {
        let most = rustix::process::getrlimit(resource).maximum.map_or(most, |allowed| allowed.min(most));
        rustix::process::setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) })?;
    }
    Ok(())
}

/// Becomes the user, without any capability, nor a way to one. There is one thread: it is the process.
fn give_up_rights(user: Option<(u32, u32)>) -> Done<()> {
    for capability in CapabilitySet::all().iter() {
        // Those that this kernel does not know are in no set.
        let _ = rustix::thread::remove_capability_from_bounding_set(capability);
    }
    if std::env::var_os(MAPPED).is_none() {
        let (user, group) = user.unwrap_or((65534, 65534));
        let (user, group) = (Uid::from_raw(user), Gid::from_raw(group));
        rustix::thread::set_thread_groups(&[])?;
        rustix::thread::set_thread_res_gid(group, group, group)?;
        rustix::thread::set_thread_res_uid(user, user, user)?;
    }
    rustix::thread::clear_ambient_capability_set()?;
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(
        None,
        CapabilitySets { effective: none, permitted: none, inheritable: none },
    )?;
    Ok(rustix::thread::set_no_new_privs(true)?)
}

/// What holds for every thread, the main one too: no file but those of the root, which holds the images; no program, no socket,
/// nothing of other processes. The VM's threads have vmbed's sandbox on top, which is much narrower.
fn restrict(best_effort: bool) -> Done<()> {
    let files = AccessFs::from_all(ABI::V6);
    let rules = path_beneath_rules(["/"], AccessFs::ReadFile | AccessFs::ReadDir);
    let status = Ruleset::default().handle_access(files)?.create()?.add_rules(rules)?.restrict_self()?;
    if status.ruleset == RulesetStatus::NotEnforced && !best_effort {
        return Err("this kernel has no Landlock; --best-effort goes on without".into());
    }
    let mut refused: BTreeMap<_, _> = REFUSED.into_iter().map(|call| (call, Vec::new())).collect();
    // A new process, or a thread elsewhere than this one.
    let mut made = vec![clones(libc::CLONE_THREAD, 0)?];
    for elsewhere in ELSEWHERE {
        made.push(clones(elsewhere, elsewhere)?);
    }
    refused.insert(libc::SYS_clone, made);
    let (rest, those) = (SeccompAction::Allow, SeccompAction::Errno(libc::EPERM as u32));
    let filter = SeccompFilter::new(refused, rest, those, TargetArch::x86_64)?;
    seccompiler::apply_filter(&BpfProgram::try_from(filter)?)?;
    Ok(seccompiler::apply_filter(&unseen())?)
}

/// clone(2) whose flags read `value` where `mask` is.
fn clones(mask: i32, value: i32) -> Done<SeccompRule> {
    let (mask, value) = (SeccompCmpOp::MaskedEq(mask as u32 as u64), value as u32 as u64);
    Ok(SeccompRule::new(vec![SeccompCondition::new(0, SeccompCmpArgLen::Qword, mask, value)?])?)
}

/// The kernel's numbers of calls of the x32 interface, on the same architecture, begin here: those of a list of others would pass.
const X32: u32 = 0x4000_0000;

/// x32 calls fail, and clone3 is not there, whose flags a filter cannot see: the C library uses clone then.
fn unseen() -> BpfProgram {
    let step = |code: u32, jt, k| sock_filter { code: code as u16, jt, jf: 0, k };
    let answer = |errno: i32| libc::SECCOMP_RET_ERRNO | errno as u32;
    vec![
        // The number: the first field of seccomp_data.
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, 2, X32),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 2, libc::SYS_clone3 as u32),
        step(libc::BPF_RET, 0, libc::SECCOMP_RET_ALLOW),
        step(libc::BPF_RET, 0, answer(libc::EPERM)),
        step(libc::BPF_RET, 0, answer(libc::ENOSYS)),
    ]
}

const ELSEWHERE: [i32; 8] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
    libc::CLONE_PTRACE,
];

/// What a program does that is on its way to other things. No io_uring, whose requests no filter sees: disks are served by calls.
const REFUSED: [libc::c_long; 36] = [
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_socket,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_mount_setattr,
    libc::SYS_chroot,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_io_uring_setup,
    libc::SYS_pidfd_getfd,
    libc::SYS_open_by_handle_at,
];

/// Makes each of those calls, and opens files through a directory that was open before; says what came of it.
#[expect(unsafe_code, reason = "calls by their numbers")]
fn check(directory: &File) {
    let make = |call: libc::c_long, first: i64| {
        // SAFETY: no argument points to anything; a process that is made all the same ends here.
        let answer = unsafe { libc::syscall(call, first, 0i64, 0i64, 0i64, 0i64, 0i64) };
        let error = std::io::Error::last_os_error();
        match answer {
            // SAFETY: it ends the calling process, and does nothing else.
            0 if matches!(call, libc::SYS_fork | libc::SYS_vfork | libc::SYS_clone) => unsafe {
                libc::_exit(0)
            },
            0.. => "done".into(),
            _ => error.to_string(),
        }
    };
    for call in REFUSED {
        println!("call {call}: {}", make(call, -1));
    }
    println!("clone of a process: {}", make(libc::SYS_clone, i64::from(libc::SIGCHLD)));
    for flags in ELSEWHERE {
        // A thread whose flags lack what all threads share: the kernel itself would say EINVAL.
        println!("clone with {flags:#x}: {}", make(libc::SYS_clone, i64::from(flags | libc::CLONE_THREAD)));
    }
    println!("clone3: {}", make(libc::SYS_clone3, 0));
    println!("x32: {}", make(i64::from(X32) + libc::SYS_getpid, 0));
    // SAFETY: it asks about a number.
    let open = (0..1024).filter(|fd| unsafe { libc::fcntl(*fd, libc::F_GETFD) } >= 0);
    println!("descriptors: {:?}", open.collect::<Vec<_>>());
    println!("input: {:?}", std::io::stdin().read(&mut [0; 16]));
    println!(
        "leads its session: {}",
        rustix::process::getsid(None).is_ok_and(|id| id == rustix::process::getpid())
    );
    println!(
        "a thread: {}",
        if std::thread::Builder::new().spawn(|| ()).is_ok() { "runs" } else { "does not" }
    );
    let opened =
        |result: rustix::io::Result<OwnedFd>| result.map_or_else(|e| e.to_string(), |_| "open".into());
    let flags = rustix::fs::OFlags::RDONLY;
    let mode = rustix::fs::Mode::empty();
    println!("its image: {}", opened(rustix::fs::open("/kernel", flags, mode)));
    println!("another file: {}", opened(rustix::fs::openat(directory, "passwd", flags, mode)));
}

fn config(options: &Options) -> Done<VmConfig> {
    let mut config = if options.bare {
        VmConfig::bare(BareBoot::new(CpuMode::Real, 0x1000, std::fs::read("/kernel")?))
    } else {
        let mut boot = LinuxBoot::new("/kernel");
        boot.initrd = options.initrd.as_ref().map(|_| "/initrd".into());
        if let Some(cmdline) = &options.cmdline {
            boot.cmdline = cmdline.clone();
        }
        VmConfig::linux(boot)
    };
    if !(options.disks.is_empty() && options.taps.is_empty()) {
        config.platform = Platform::Pc;
    }
    config.cpus.count = options.vcpus;
    config.memory = options.memory.unwrap_or(config.memory);
    config.disks = options.disks.iter().map(|_| DiskConfig::attached()).collect();
    for (disk, (_, readonly)) in config.disks.iter_mut().zip(&options.disks) {
        disk.readonly = *readonly;
    }
    config.nets = options.taps.iter().map(|_| NetConfig::attached()).collect();
    let mut sandbox = SandboxConfig::default();
    sandbox.best_effort = options.best_effort;
    config.sandbox = Some(sandbox);
    Ok(config)
}

/// Until the guest has ended.
fn run(builder: VmBuilder, bare: bool, signals: &UnixStream) -> Done<StopCause> {
    let vm = builder.build()?;
    eprintln!("jailed: in force: {:?}", vm.sandbox());
    vm.start()?;
    let mut asked = bare;
    loop {
        let [_, signalled] = ready([vm.events().as_fd(), signals.as_fd()])?;
        while let Some(event) = vm.events().next_event() {
            match event.kind {
                EventKind::Stopped(cause) => return Ok(cause),
                EventKind::DeviceNeedsReset { .. } | EventKind::BackendError { .. } => {
                    eprintln!("jailed: {:?}", event.kind);
                }
                _ => {}
            }
        }
        if signalled {
            let _ = (&*signals).read(&mut [0; 16]);
            // The first asks the guest, the second does not ask.
            if std::mem::replace(&mut asked, true) || vm.shutdown().is_err() {
                vm.request_stop();
            }
        }
    }
}
