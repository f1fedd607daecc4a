//! Every place in src/sys that calls the kernel: its calls are made, and so fail, in one of the lives, or it is said why not.

use std::collections::BTreeSet;
use std::path::Path;

use crate::Kind;

/// What becomes of a place.
enum Site {
    /// These are among the calls that fail.
    Calls(&'static [libc::c_long]),
    /// These requests of an ioctl.
    Asks(&'static [u32]),
    /// It calls nobody, or somebody whose name stands beside it.
    Inside,
    /// None of its calls fail, for this reason.
    Not(&'static str),
}

use Site::{Asks, Calls, Inside, Not};

const ALONE: &str = "fails for its arguments alone";
const NO_VHOST: &str = "the kernel's own network device, for which tests/linux has machines";
const ONE_LISTENER: &str =
    "a thread has one filter that somebody hears of, and these have the test's; tests/sandbox has the others";

/// File, name of the function or of the request, what becomes of it.
const SITES: [(&str, &str, Site); 83] = [
    ("clock.rs", "clock_gettime", Not(ALONE)),
    ("fd.rs", "connect", Calls(&[libc::SYS_connect])),
    ("fd.rs", "fcntl", Calls(&[libc::SYS_fcntl])),
    ("fd.rs", "getsockopt", Calls(&[libc::SYS_getsockopt])),
    ("fd.rs", "poll", Calls(&[libc::SYS_poll])),
    ("fd.rs", "recv", Calls(&[libc::SYS_recvfrom])),
    ("fd.rs", "send", Calls(&[libc::SYS_sendto])),
    ("fd.rs", "socket", Calls(&[libc::SYS_socket])),
    ("fd.rs", "openpty", Not("for tests")),
    ("fd.rs", "socketpair", Not("for tests")),
    ("file.rs", "SYS_fstat", Calls(&[libc::SYS_fstat])),
    ("file.rs", "fallocate64", Calls(&[libc::SYS_fallocate])),
    ("file.rs", "fcntl", Calls(&[libc::SYS_fcntl])),
    ("file.rs", "statx", Calls(&[libc::SYS_statx])),
    ("file.rs", "syscall", Inside),
    ("fork.rs", "getpid", Not("does not fail")),
    ("fork.rs", "madvise", Not("once for a process, before the first life")),
    ("fork.rs", "mmap", Not("once for a process, before the first life")),
    ("fork.rs", "munmap", Not(ALONE)),
    ("io.rs", "getrandom", Calls(&[libc::SYS_getrandom])),
    ("io.rs", "preadv64", Calls(&[libc::SYS_preadv])),
    ("io.rs", "pwritev2", Calls(&[libc::SYS_pwritev2])),
    ("io.rs", "readv", Calls(&[libc::SYS_readv])),
    ("io.rs", "recvmsg", Calls(&[libc::SYS_recvmsg])),
    ("io.rs", "sendmsg", Calls(&[libc::SYS_sendmsg])),
    ("io.rs", "writev", Calls(&[libc::SYS_writev])),
    ("kvm.rs", "SYS_ioctl", Asks(&[0xae80])),
    ("kvm.rs", "ioctl", Inside),
    ("kvm.rs", "KVM_SET_SIGNAL_MASK", Asks(&[0x4004_ae8b])),
    ("kvm.rs", "request", Asks(&[0x4018_aee1, 0x4018_aee2, 0x4018_aee3])),
    ("kvm_stats.rs", "ioctl", Inside),
    ("kvm_stats.rs", "KVM_GET_STATS_FD", Asks(&[0xaece])),
    ("memory.rs", "SYS_mbind", Calls(&[libc::SYS_mbind])),
    ("memory.rs", "fallocate", Calls(&[libc::SYS_fallocate])),
    ("memory.rs", "fcntl", Calls(&[libc::SYS_fcntl])),
    ("memory.rs", "madvise", Calls(&[libc::SYS_madvise])),
    ("memory.rs", "memfd_create", Calls(&[libc::SYS_memfd_create])),
    ("memory.rs", "mmap", Calls(&[libc::SYS_mmap])),
    ("memory.rs", "syscall", Inside),
    ("mod.rs", "getrandom", Calls(&[libc::SYS_getrandom])),
    ("residency.rs", "ioctl", Inside),
    ("residency.rs", "PAGEMAP_SCAN", Asks(&[0xc060_6610])),
    ("residency.rs", "mincore", Not("where something is in swap: tests/linux")),
    ("residency.rs", "sysinfo", Calls(&[libc::SYS_sysinfo])),
    ("seccomp.rs", "SYS_landlock_create_ruleset", Calls(&[libc::SYS_landlock_create_ruleset])),
    ("seccomp.rs", "SYS_seccomp", Calls(&[libc::SYS_seccomp])),
    ("seccomp.rs", "ioctl", Inside),
    ("seccomp.rs", "libc::SECCOMP_IOCTL_NOTIF_RECV as _", Not(ONE_LISTENER)),
    ("seccomp.rs", "libc::SECCOMP_IOCTL_NOTIF_SEND as _", Not(ONE_LISTENER)),
    ("seccomp.rs", "prctl", Calls(&[libc::SYS_prctl])),
    ("seccomp.rs", "syscall", Inside),
    ("seccomp.rs", "write", Not(ONE_LISTENER)),
    ("sigbus.rs", "__errno_location", Inside),
    ("sigbus.rs", "mmap", Not("in the handler: the process goes the way of before")),
    ("sigbus.rs", "raise", Not("in the handler: the process ends")),
    ("sigbus.rs", "sigaction", Not(ALONE)),
    ("sigbus.rs", "sigemptyset", Inside),
    ("sigbus.rs", "write", Not("in the handler, of one byte's worth into an eventfd")),
    ("signal.rs", "SYS_tgkill", Calls(&[libc::SYS_tgkill])),
    ("signal.rs", "getpid", Not("does not fail")),
    ("signal.rs", "gettid", Not("does not fail")),
    ("signal.rs", "pthread_sigmask", Not(ALONE)),
    ("signal.rs", "sigaddset", Inside),
    ("signal.rs", "sigdelset", Inside),
    ("signal.rs", "sigemptyset", Inside),
    ("signal.rs", "sigfillset", Inside),
    ("signal.rs", "sigismember", Inside),
    ("signal.rs", "sigpending", Calls(&[libc::SYS_rt_sigpending])),
    ("signal.rs", "sigtimedwait", Calls(&[libc::SYS_rt_sigtimedwait])),
    ("signal.rs", "syscall", Inside),
    ("tap.rs", "if_nametoindex", Asks(&[libc::SIOCGIFINDEX as u32])),
    ("tap.rs", "ioctl", Inside),
    ("tap.rs", "libc::TUNGETIFF", Asks(&[libc::TUNGETIFF as u32])),
    ("tap.rs", "libc::TUNSETIFF", Asks(&[libc::TUNSETIFF as u32])),
    ("tap.rs", "libc::TUNSETOFFLOAD", Asks(&[libc::TUNSETOFFLOAD as u32])),
    ("tap.rs", "libc::TUNSETQUEUE", Asks(&[libc::TUNSETQUEUE as u32])),
    ("tap.rs", "libc::TUNSETVNETHDRSZ", Asks(&[libc::TUNSETVNETHDRSZ as u32])),
    ("tap.rs", "unshare", Not("for tests")),
    (
        "tap.rs",
        "request",
        Asks(&[libc::TUNSETOWNER as u32, libc::TUNSETGROUP as u32, libc::TUNSETPERSIST as u32]),
    ),
    ("thread.rs", "sched_getaffinity", Calls(&[libc::SYS_sched_getaffinity])),
    ("thread.rs", "sched_setaffinity", Calls(&[libc::SYS_sched_setaffinity])),
    (
        "uring.rs",
        "",
        Calls(&[libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register]),
    ),
    ("vhost.rs", "", Not(NO_VHOST)),
];

/// What is wrong with that list, where those kinds of calls are made.
pub fn wrong(made: &BTreeSet<Kind>) -> Vec<String> {
    let found = found();
    let mut wrong = Vec::new();
    for (file, name) in &found {
        if !SITES.iter().any(|(f, n, _)| f == file && (n == name || n.is_empty())) {
            wrong.push(format!("{file}: {name}: no life has it, and nobody says why"));
        }
    }
    let call = |number: &libc::c_long| Kind { number: *number as u32, request: 0 };
    let ask = |request: &u32| Kind { number: libc::SYS_ioctl as u32, request: *request };
    for (file, name, site) in &SITES {
        if !name.is_empty() && !found.contains(&((*file).to_owned(), (*name).to_owned())) {
            wrong.push(format!("{file}: {name}: is not there"));
        }
        let kinds: Vec<_> = match site {
            Calls(calls) => calls.iter().map(call).collect(),
            Asks(requests) => requests.iter().map(ask).collect(),
            Inside => continue,
            Not(why) => {
                assert!(!why.is_empty());
                continue;
            }
        };
        for kind in kinds.into_iter().filter(|kind| !made.contains(kind)) {
            wrong.push(format!("{file}: {name}: nobody makes {}", kind.name()));
        }
    }
    wrong
}

/// Files of src/sys with the functions of the C library's that they call, and what they ask for by ioctl; without tests.
fn found() -> BTreeSet<(String, String)> {
    let mut found = BTreeSet::new();
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/sys");
    let mut files: Vec<_> = entries(&directory);
    while let Some(path) = files.pop() {
        if path.is_dir() {
            files.extend(entries(&path));
            continue;
        }
        let name = path.file_name().unwrap().to_str().unwrap();
        // Guest memory as tests see it.
        if name == "guest_pages.rs" {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let text = text.split("#[cfg(test)]\nmod tests").next().unwrap();
        let code: String = text.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
        for called in called(&code) {
            found.insert((name.to_owned(), called));
        }
    }
    found
}

fn entries(directory: &Path) -> Vec<std::path::PathBuf> {
    std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect()
}

fn called(code: &str) -> Vec<String> {
    let mut called = Vec::new();
    for (_, rest) in code.match_indices("libc::").map(|(at, prefix)| code.split_at(at + prefix.len())) {
        let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
        let (name, after) = rest.split_at(end);
        let is_function = after.starts_with('(') && !name.starts_with(char::is_uppercase);
        if is_function || name.starts_with("SYS_") {
            called.push(name.to_owned());
        }
        if let ("ioctl", Some(arguments)) = (name, after.strip_prefix('(')) {
            let request = arguments.split([',', ')']).filter(|part| !part.is_empty()).nth(1);
            // as_raw_fd() stands before it, with parentheses of its own.
            called.push(request.unwrap_or_default().trim().to_owned());
        }
    }
    called
}
