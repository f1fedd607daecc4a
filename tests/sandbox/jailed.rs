//! examples/jailed.rs: what the process that it leaves can still do, as the kernel tells.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use rustix::process::{Pid, Signal, kill_process};

use crate::life::{LONG, SPINS, Scratch, wait_until};
use crate::trial;

pub fn add(trials: &mut Vec<Trial>) {
    trials.push(trial("a_jailed_process_has_nothing_left_as_root", || jailed(Who::Root)));
    trials.push(trial("a_jailed_process_has_nothing_left_unprivileged", || jailed(Who::Anybody)));
    trials.push(trial("a_jail_refuses_programs_sockets_mounts_and_files", refuses));
    trials.push(trial("a_jail_says_what_is_wrong_and_how_a_guest_ended", says));
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Who {
    Root,
    /// Someone without privilege, who may use KVM.
    Anybody,
}

const NOBODY: u32 = 65534;

/// The example, built once.
fn example() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--quiet", "--example", "jailed"]).current_dir(env!("CARGO_MANIFEST_DIR"));
        if !cfg!(debug_assertions) {
            cargo.arg("--release");
        }
        // As this program was, so that nothing is built twice.
        cargo.args(["--features", if cfg!(feature = "serde") { "serde,internals" } else { "internals" }]);
        let output = cargo.output().expect("cargo");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let own = std::env::current_exe().unwrap();
        own.parent().and_then(Path::parent).unwrap().join("examples/jailed")
    })
}

/// The jail, ended when it is dropped.
struct Jail {
    outside: Child,
    /// What it says.
    lines: Receiver<String>,
}

impl Jail {
    fn start(mut command: Command) -> Self {
        let mut outside = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let errors = BufReader::new(outside.stderr.take().unwrap());
        let (say, lines) = channel();
        // Ends with the processes.
        std::thread::spawn(move || errors.lines().map_while(Result::ok).try_for_each(|line| say.send(line)));
        Self { outside, lines }
    }

    /// The process inside, as this namespace counts, when its guest is about to run.
    fn inside(&mut self) -> i32 {
        let line =
            self.lines.recv_timeout(LONG).unwrap_or_else(|e| panic!("waited for what is in force: {e}"));
        assert!(line.contains("in force") && line.contains("seccomp: true"), "{line}{}", self.rest());
        let parent = |process: &Path| {
            let status = std::fs::read_to_string(process.join("status")).ok()?;
            self::line(&status, "PPid").parse::<u32>().ok()
        };
        let all = std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
        let mut children = all.filter(|process| parent(process) == Some(self.outside.id()));
        let child = children.next().expect("a process inside");
        child.file_name().and_then(|name| name.to_str()).unwrap().parse().unwrap()
    }

    /// What else it said, as far as it comes soon.
    fn rest(&mut self) -> String {
        let end = Instant::now() + Duration::from_secs(5);
        let next = || self.lines.recv_timeout(end.saturating_duration_since(Instant::now())).ok();
        std::iter::from_fn(next).collect::<Vec<_>>().join("\n")
    }

    fn ends(&mut self) -> Option<i32> {
        let end = Instant::now() + LONG;
        loop {
            match self.outside.try_wait().unwrap() {
                Some(status) => return status.code(),
                None => assert!(Instant::now() < end, "waited for the end of the jail"),
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Jail {
    fn drop(&mut self) {
        // The one inside dies with it.
        let _ = self.outside.kill();
        let _ = self.outside.wait();
    }
}

/// That program, which is ended after a minute and then answers 124.
fn limited(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", "60"]).arg(program);
    command
}

fn file(bytes: &[u8]) -> Scratch {
    let file = Scratch::new("image");
    std::fs::write(&file.0, bytes).unwrap();
    file
}

/// A line of a status file in /proc.
fn line(status: &str, key: &str) -> String {
    let found = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    found.unwrap_or_else(|| panic!("no {key} in {status}")).trim().to_owned()
}

fn jailed(who: Who) {
    assert!(rustix::process::geteuid().is_root(), "this test is for root: it becomes others");
    let (code, disk) = (file(&SPINS), Scratch::disk());
    for file in [&code.0, &disk.0] {
        std::fs::set_permissions(file, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    }
    let node = Scratch::new("kvm");
    let mut command = match who {
        Who::Root => Command::new(example()),
        Who::Anybody => {
            // In a mount namespace whose /dev/kvm is for everybody.
            let mut command = Command::new("unshare");
            let script = "mknod -m 666 $NODE c 10 232 && mount --bind $NODE /dev/kvm && exec setpriv --reuid=65534 --regid=65534 \
                          --clear-groups --inh-caps=-all --bounding-set=-all \"$0\" \"$@\"";
            command.args(["--mount", "sh", "-c", script]).arg(example()).env("NODE", &node.0);
            command
        }
    };
    command.arg("--bare").arg(&code.0).arg("--disk").arg(&disk.0).args(["--user", "65534:65534"]);
    let mut jail = Jail::start(command);
    let inside = jail.inside();
    let proc = PathBuf::from(format!("/proc/{inside}"));
    let filters = |status: &str| line(status, "Seccomp_filters").parse::<u32>().unwrap();
    let own = std::fs::read_to_string("/proc/thread-self/status").unwrap();
    let mut threads = 0;
    for task in std::fs::read_dir(proc.join("task")).unwrap().flatten() {
        let status = std::fs::read_to_string(task.path().join("status")).unwrap();
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(line(&status, set), "0000000000000000", "{set} of {status}");
        }
        assert_eq!((line(&status, "NoNewPrivs"), line(&status, "Seccomp")), ("1".into(), "2".into()));
        // The VM's threads have the process's filters and their own.
        // KVM's own thread for huge pages comes out of a vCPU's.
        let name = line(&status, "Name");
        let confined = ["vmbed-vcpu", "vmbed-dev", "kvm-"].iter().any(|kind| name.starts_with(kind));
        let more = if confined { 3 } else { 2 };
        assert_eq!(filters(&status), filters(&own) + more, "{name}");
        let nobody = [NOBODY; 4].map(|id| id.to_string()).join("\t");
        assert_eq!((line(&status, "Uid"), line(&status, "Gid")), (nobody.clone(), nobody));
        assert_eq!(line(&status, "Groups"), "");
        threads += 1;
    }
    assert!(threads >= 3, "the main thread, a vCPU, the supervisor: {threads}");
    let space = |of: &Path, kind: &str| std::fs::read_link(of.join("ns").join(kind)).unwrap();
    let mut spaces = vec!["mnt", "pid", "ipc", "uts", "net", "cgroup"];
    spaces.extend((who == Who::Anybody).then_some("user"));
    for kind in spaces {
        assert_ne!(space(&proc, kind), space(Path::new("/proc/self"), kind), "{kind}");
    }
    let root: Vec<_> =
        std::fs::read_dir(proc.join("root")).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(root, ["kernel"], "the root holds the image");
    let mounts = std::fs::read_to_string(proc.join("mounts")).unwrap();
    assert!(mounts.lines().all(|mount| mount.split(' ').nth(3).unwrap().starts_with("ro")), "{mounts}");
    let limits = std::fs::read_to_string(proc.join("limits")).unwrap();
    assert!(limits.lines().any(|l| l.starts_with("Max core file size        0 ")), "{limits}");
    kill_process(Pid::from_raw(jail.outside.id() as i32).unwrap(), Signal::TERM).unwrap();
    assert_eq!(jail.ends(), Some(1), "it was stopped: {}", jail.rest());
    wait_until("the end of the process inside", || !proc.exists());
}

/// What the jail itself refuses, tried in it.
fn refuses() {
    let code = file(&SPINS);
    std::fs::set_permissions(&code.0, std::os::unix::fs::PermissionsExt::from_mode(0o666)).unwrap();
    // A descriptor that whoever starts it forgot, and something to read.
    let mut command = limited("bash");
    command.args(["-c", "exec 200</etc/passwd; exec \"$0\" \"$@\" <<<'a word'"]).arg(example());
    let output = command.arg("--bare").arg(&code.0).arg("--check").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let tried: Vec<_> = said.lines().filter(|line| line.starts_with("call ")).collect();
    assert!(tried.iter().all(|line| line.ends_with("(os error 1)")), "{said}");
    for call in [
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_fork,
        libc::SYS_socket,
        libc::SYS_connect,
        libc::SYS_ptrace,
        libc::SYS_process_vm_writev,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_chroot,
        libc::SYS_keyctl,
        libc::SYS_io_uring_setup,
    ] {
        assert!(tried.iter().any(|line| line.starts_with(&format!("call {call}:"))), "{call} in {said}");
    }
    let clones: Vec<_> = said.lines().filter(|line| line.starts_with("clone ")).collect();
    assert!(clones.len() == 9 && clones.iter().all(|line| line.ends_with("(os error 1)")), "{said}");
    // Where a kernel has no x32 calls, it says that they are not there: here it is not asked.
    assert!(said.contains("\nx32: Operation not permitted (os error 1)\n"), "{said}");
    assert!(said.contains("\nclone3: Function not implemented (os error 38)\n"), "{said}");
    assert!(said.contains("\na thread: runs\n"), "{said}");
    assert!(said.contains("\ninput: Ok(0)\n") && said.contains("\nleads its session: true\n"), "{said}");
    let open = said.lines().find_map(|line| line.strip_prefix("descriptors: ")).expect("its descriptors");
    assert!(open.starts_with("[0, 1, 2") && !open.contains("200"), "{said}");
    // Not by the filter: opening is not refused there.
    assert!(said.contains("its image: open\n") && said.contains("another file: Permission denied"), "{said}");
}

fn says() {
    let run = |arguments: &[&str]| {
        let output = limited(example()).args(arguments).stdin(Stdio::null()).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
    };
    let (status, said) = run(&["--help"]);
    assert!(status == Some(0) && said.contains("usage: jailed") && said.contains("Exit status"), "{said}");
    for (arguments, word) in [
        (&["--disk", "x"][..], "it needs --kernel"),
        (&["--what"], "--what is no option"),
        (&["--kernel", "/nowhere/vmlinuz"], "/nowhere/vmlinuz: No such file"),
        (&["--bare", "/etc/passwd", "--tap", "vmbednone0"], "ip tuntap add vmbednone0"),
        (&["--bare", "/etc/passwd", "--user", "nobody"], "\"nobody\" is no number"),
        (&["--bare", "/etc/passwd", "--memory", "3 apples"], "--memory: "),
    ] {
        let (status, said) = run(arguments);
        assert!(status == Some(1) && said.contains(word), "{arguments:?}: {said}");
    }
    let (halts, not_a_kernel) = (file(&[0xf4]), file(b"no kernel"));
    assert_eq!(run(&["--bare", halts.0.to_str().unwrap()]).0, Some(0));
    // As many files as all that takes.
    let many = run(&["--bare", halts.0.to_str().unwrap(), "--vcpus", "128"]);
    assert_eq!(many.0, Some(0), "{}", many.1);
    let (status, said) = run(&["--kernel", not_a_kernel.0.to_str().unwrap()]);
    assert!(status == Some(1) && said.contains("/kernel"), "{said}");
}
