//! What an error says that came of a call that failed.

use crate::Kind;

/// Of these, an error has one. A call is made for several things.
const CALLS: [(libc::c_long, &[&str]); 42] = [
    (libc::SYS_read, &["reading", "read"]),
    (libc::SYS_pread64, &["reading", "read", "growing"]),
    (libc::SYS_preadv, &["reading"]),
    (libc::SYS_pwritev2, &["writing"]),
    (libc::SYS_fstat, &["reading", "opening"]),
    (libc::SYS_statx, &["reading", "opening", "its metadata", "the kernel '", "the initrd '", "looking for"]),
    (libc::SYS_lseek, &["reading", "opening", "growing", "finding its size"]),
    (
        libc::SYS_openat,
        &[
            "opening",
            "cannot be opened",
            "ours to open",
            "reading",
            "is read from",
            "making",
            "the kernel '",
            "the initrd '",
            "cgroup: ",
            "is missing",
            "does not exist",
        ],
    ),
    (libc::SYS_pwrite64, &["writing", "making", "growing"]),
    (libc::SYS_write, &["writing", "making", "enabling the cpu controller"]),
    (libc::SYS_rmdir, &["removing it"]),
    (libc::SYS_mkdir, &["cgroup: ", "making"]),
    (libc::SYS_fallocate, &["allocating", "making", "size", "growing", "writing"]),
    (libc::SYS_ftruncate, &["memfd", "size", "making", "growing"]),
    (libc::SYS_fsync, &["flushing", "making", "writing", "growing"]),
    (libc::SYS_fdatasync, &["flushing", "making", "writing", "growing"]),
    (
        libc::SYS_fcntl,
        &[
            "memfd",
            "duplicating",
            "event loop",
            "lock",
            "nonblocking",
            "its thread",
            "finding its size",
            "what it was opened for",
        ],
    ),
    (libc::SYS_mmap, &["mapping", "finding addresses", "KVM_CREATE_VCPU", "starting the thread", "io_uring"]),
    (libc::SYS_madvise, &["advising", "MADV_MERGEABLE", "prefaulting"]),
    (libc::SYS_mbind, &["mbind"]),
    (libc::SYS_memfd_create, &["memfd", "of huge pages"]),
    (libc::SYS_clone3, &["starting the thread", "starting its thread", "starting a thread"]),
    (libc::SYS_prctl, &["PR_SET_NO_NEW_PRIVS", "no_new_privs"]),
    (libc::SYS_seccomp, &["SECCOMP_SET_MODE_FILTER"]),
    (libc::SYS_landlock_restrict_self, &["Landlock"]),
    (libc::SYS_landlock_create_ruleset, &["Landlock"]),
    (libc::SYS_sched_getaffinity, &["asking for this thread's CPUs"]),
    (libc::SYS_sched_setaffinity, &["sched_setaffinity"]),
    (
        libc::SYS_eventfd2,
        &["eventfd", "event loop", "epoll set", "its thread", "doorbells", "starting a capture"],
    ),
    (libc::SYS_pipe2, &["creating a pipe"]),
    (libc::SYS_epoll_create1, &["event loop", "epoll"]),
    (libc::SYS_epoll_ctl, &["event loop", "epoll"]),
    // An embedder's own loop; others make it again.
    (libc::SYS_epoll_wait, &["dispatching"]),
    (libc::SYS_timerfd_create, &["timerfd"]),
    (libc::SYS_socket, &["rtnetlink", "connecting to", "SIOCGIFINDEX"]),
    (libc::SYS_connect, &["rtnetlink", "connecting to"]),
    (libc::SYS_bind, &["rtnetlink"]),
    (libc::SYS_getsockname, &["rtnetlink"]),
    (libc::SYS_sendto, &["the host's network"]),
    (libc::SYS_recvfrom, &["the host's network"]),
    (libc::SYS_getsockopt, &["getsockopt"]),
    (libc::SYS_socketpair, &["the test's own"]),
];

const REQUESTS: [(u32, &[&str]); 35] = [
    (libc::FIONBIO as u32, &["rtnetlink", "the test's own"]),
    (libc::SIOCGIFINDEX as u32, &["SIOCGIFINDEX"]),
    (libc::TUNSETIFF as u32, &["TUNSETIFF", "making it", "belongs to someone else"]),
    (libc::TUNSETOWNER as u32, &["tap 'vnet0': making it"]),
    (libc::TUNSETGROUP as u32, &["tap 'vnet0': making it"]),
    (libc::TUNSETPERSIST as u32, &["tap 'vnet0': making it"]),
    (libc::TUNGETIFF as u32, &["TUNSETIFF", "TUNGETIFF"]),
    (libc::TUNSETOFFLOAD as u32, &["TUNSETOFFLOAD"]),
    (libc::TUNSETVNETHDRSZ as u32, &["TUNSETVNETHDRSZ"]),
    (libc::TUNSETQUEUE as u32, &["TUNSETQUEUE"]),
    (0xae01, &["KVM_CREATE_VM"]),
    // How large a vCPU's pages are, which is asked for with each VM.
    (0xae04, &["KVM_CREATE_VM"]),
    (0xae41, &["KVM_CREATE_VCPU"]),
    (0xae47, &["KVM_SET_TSS_ADDR"]),
    (0x4008_ae48, &["KVM_SET_IDENTITY_MAP_ADDR"]),
    (0xae80, &["KVM_RUN"]),
    (0xc008_ae05, &["KVM_GET_SUPPORTED_CPUID"]),
    (0x4020_ae46, &["KVM_SET_USER_MEMORY_REGION"]),
    (0x4068_aea3, &["KVM_CAP_"]),
    (0x4004_ae8b, &["KVM_SET_SIGNAL_MASK"]),
    (0x4008_ae89, &["KVM_SET_MSRS"]),
    (0x4008_ae90, &["KVM_SET_CPUID2"]),
    (0x8138_ae83, &["KVM_GET_SREGS"]),
    (0x4138_ae84, &["KVM_SET_SREGS"]),
    (0x4090_ae82, &["KVM_SET_REGS"]),
    (0x8090_ae81, &["KVM_GET_REGS"]),
    (0x8030_ae7c, &["KVM_GET_CLOCK"]),
    (0x4030_ae7b, &["KVM_SET_CLOCK"]),
    (0x4018_aee1, &["TSC offset"]),
    (0x4018_aee2, &["TSC offset"]),
    (0x4004_ae99, &["KVM_SET_MP_STATE"]),
    (0xaf01, &["VHOST_SET_OWNER"]),
    (0x8008_af00, &["VHOST_GET_FEATURES"]),
    (0x4008_af00, &["VHOST_SET_FEATURES"]),
    (0x4008_af03, &["VHOST_SET_MEM_TABLE"]),
];

/// What KVM is asked for before anything else. Its crate has no errno of these, and the error says what the kernel lacks.
const PROBES: [u32; 2] = [0xae00, 0xae03];

/// The same of the sandbox's.
const FILTERS: [libc::c_long; 2] = [libc::SYS_seccomp, libc::SYS_landlock_create_ruleset];

/// Whether the error says what was tried, and what the kernel answered.
pub fn say(error: &str, kind: Kind, errno: i32) -> bool {
    if i64::from(kind.number) == libc::SYS_ioctl && PROBES.contains(&kind.request) {
        return error.starts_with("KVM");
    }
    if FILTERS.contains(&kind.number.into()) && error.contains("this kernel has no") {
        return true;
    }
    let words = if i64::from(kind.number) == libc::SYS_ioctl {
        REQUESTS.iter().find(|(request, _)| *request == kind.request).map(|(_, words)| *words)
    } else {
        CALLS.iter().find(|(number, _)| *number == i64::from(kind.number)).map(|(_, words)| *words)
    };
    let tried = words.is_some_and(|words| words.iter().any(|word| error.contains(word)));
    // The C library has one errno for a thread that there is nothing for, not even a stack.
    let of_threads = [libc::SYS_clone3, libc::SYS_mmap].contains(&i64::from(kind.number));
    let own = of_threads && errno == libc::ENOMEM && error.contains("thread");
    let errno = if own { libc::EAGAIN } else { errno };
    tried && error.contains(&format!("(os error {errno})"))
}
