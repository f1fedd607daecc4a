#![forbid(unsafe_code)]
//! The system calls that threads may make, by what they do. `tests/sandbox` has each of them seen in a run, and every other
//! one refused; a call that no run shows says why it is here all the same.

use std::ffi::CStr;

use syscalls::Sysno;

use crate::sys::seccomp::Notice;
use crate::vm::Duty;

/// A call, and what its arguments must be.
#[derive(Debug)]
pub(crate) struct Rule {
    pub call: Sysno,
    /// By their index; the lower half of each counts. Empty: they may be anything.
    pub only: &'static [(u8, Is)],
    pub when: When,
    /// Why no run of the tests shows it.
    #[cfg_attr(
        not(any(test, feature = "internals")),
        expect(dead_code, reason = "the tests of the lists ask")
    )]
    pub unseen: Option<&'static str>,
}

/// What an argument must be.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Is {
    Number(u32),
    /// Of the bits of the first, those of the second.
    Masked(u32, u32),
    /// This process's id.
    Process,
}

/// In which VMs a call is on the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    Always,
    /// The kernel serves a card.
    Vhost,
}

impl When {
    /// In a VM with such a card, or without.
    pub fn is_so(self, vhost: bool) -> bool {
        match self {
            Self::Always => true,
            Self::Vhost => vhost,
        }
    }
}

const fn any(call: Sysno) -> Rule {
    with(call, &[])
}

const fn with(call: Sysno, only: &'static [(u8, Is)]) -> Rule {
    Rule { call, only, when: When::Always, unseen: None }
}

const fn ioctl(request: &'static [(u8, Is)]) -> Rule {
    with(Sysno::ioctl, request)
}

impl Rule {
    const fn when(self, when: When) -> Self {
        Self { when, ..self }
    }

    const fn unseen(self, why: &'static str) -> Self {
        Self { unseen: Some(why), ..self }
    }

    /// Whether the call is this one.
    pub fn covers(&self, notice: &Notice) -> bool {
        let holds = |(index, is): &(u8, Is)| {
            let argument = notice.arguments.get(usize::from(*index)).map_or(0, |argument| *argument as u32);
            match *is {
                Is::Number(number) => argument == number,
                Is::Masked(mask, number) => argument & mask == number,
                Is::Process => argument == std::process::id(),
            }
        };
        is_native(notice) && i64::from(self.call.id()) == notice.number && self.only.iter().all(holds)
    }
}

/// `AUDIT_ARCH_X86_64`
const NATIVE: u32 = 0xc000_003e;

fn is_native(notice: &Notice) -> bool {
    notice.arch == NATIVE
}

/// What people call it.
pub(super) fn name(notice: &Notice) -> &'static str {
    let known = usize::try_from(notice.number).ok().and_then(Sysno::new);
    match known {
        _ if !is_native(notice) => "a call of 32-bit programs",
        Some(call) => call.name(),
        None => "a call that this kernel's headers do not know",
    }
}

/// Those of a VM's threads.
pub(super) const OF_VM: [Duty; 4] = [Duty::Vcpu, Duty::Device, Duty::Disk, Duty::Balloon];
pub(super) const DUTIES: [Duty; 5] = [Duty::Vcpu, Duty::Device, Duty::Disk, Duty::Balloon, Duty::Reclaim];

/// Everything that a thread of that duty may do.
pub(crate) fn of(duty: Duty) -> impl Iterator<Item = &'static Rule> {
    let own = match duty {
        Duty::Vcpu => VCPU,
        Duty::Device => DEVICE,
        Duty::Disk => DISK,
        Duty::Balloon => BALLOON,
        Duty::Reclaim => RECLAIM,
    };
    EVERY.iter().chain(own)
}

const READ_WRITE: u32 = (libc::PROT_READ | libc::PROT_WRITE) as u32;
const OWN: u32 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u32;
const HOLE: u32 = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u32;
const ZEROES: u32 = (libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE) as u32;

/// What any thread may: locks, memory that is not executable, descriptors that it has, a thread's end.
pub(crate) static EVERY: &[Rule] = &[
    any(Sysno::futex),
    any(Sysno::read),
    any(Sysno::write),
    any(Sysno::close),
    // A kick of vCPUs of this process: of whoever finds that their VM must end, or wait.
    any(Sysno::getpid),
    with(Sysno::tgkill, &[(0, Is::Process), (2, Is::Number(libc::SIGURG as u32))]),
    // Its own number: what a panic says begins with it.
    any(Sysno::gettid),
    // A debug build of the standard library looks whether what it closes is open.
    #[cfg(debug_assertions)]
    with(Sysno::fcntl, &[(1, Is::Number(libc::F_GETFD as u32))]),
    // The allocator.
    with(Sysno::mmap, &[(2, Is::Number(READ_WRITE)), (3, Is::Masked(libc::MAP_TYPE as u32 | OWN, OWN))]),
    with(Sysno::mmap, &[(2, Is::Number(0)), (3, Is::Masked(libc::MAP_TYPE as u32 | OWN, OWN))]),
    with(Sysno::mprotect, &[(2, Is::Number(READ_WRITE))]),
    with(Sysno::madvise, &[(2, Is::Number(libc::MADV_DONTNEED as u32))]),
    any(Sysno::mremap),
    any(Sysno::munmap),
    // Its first arena, which a thread is given when there are very many.
    any(Sysno::brk),
    // The keys of a thread's first hash map, and what a guest's random number generator is given.
    any(Sysno::getrandom),
    // Waiting.
    any(Sysno::sched_yield).unseen("std's channels: who takes comes between two steps of who gives"),
    any(Sysno::clock_gettime).unseen("where the kernel's clock cannot be read without a call"),
    // How a wait goes on when the process was stopped and continued.
    any(Sysno::restart_syscall),
    // handle_sigbus()'s handler returns; what it maps is on the list above.
    any(Sysno::rt_sigreturn),
    // A thread's end.
    any(Sysno::rt_sigprocmask),
    any(Sysno::sigaltstack),
    any(Sysno::exit),
];

/// The C library's allocator, whose thread of whichever duty first gives back the end of an arena: of [`OVERCOMMIT`]. It is refused, which
/// the allocator takes for the commonest answer, and nothing else comes of it.
pub(super) static ARENA: Rule = with(
    Sysno::openat,
    &[(0, Is::Number(libc::AT_FDCWD as u32)), (2, Is::Number((libc::O_RDONLY | libc::O_CLOEXEC) as u32))],
);
pub(super) const OVERCOMMIT: &CStr = c"/proc/sys/vm/overcommit_memory";

/// All that linux/vhost.h has: the kernel begins and ends to serve a card where its driver does, or where a limit comes and goes.
const VHOST: Rule = ioctl(&[(1, Is::Masked(0xff00, 0xaf00))])
    .when(When::Vhost)
    .unseen("vhost-net is in few kernels: tests/linux has a trial of it");

/// Runs a vCPU, answers its exits, begins to serve devices for its guest, stops them, ends the VM. What a device that is stopped has under
/// way, its own thread ends.
static VCPU: &[Rule] = &[
    // First, since it is asked first.
    ioctl(&[(1, Is::Number(KVM_RUN))]),
    ioctl(&[(1, Is::Number(KVM_IOEVENTFD))]),
    ioctl(&[(1, Is::Number(KVM_IRQFD))]),
    ioctl(&[(1, Is::Number(KVM_SET_GSI_ROUTING))]),
    ioctl(&[(1, Is::Number(KVM_SIGNAL_MSI))]),
    ioctl(&[(1, Is::Number(TUNSETOFFLOAD))]),
    ioctl(&[(1, Is::Number(TUNSETQUEUE))]),
    VHOST,
    with(Sysno::fcntl, &[(1, Is::Number(libc::F_DUPFD_CLOEXEC as u32))]),
    any(Sysno::timerfd_create),
    any(Sysno::timerfd_settime),
    any(Sysno::rt_sigtimedwait),
    // Its times, from a file that was opened before.
    any(Sysno::pread64),
    // Whether a vector that is masked was raised (MSI-X's pending bits): of one descriptor, without waiting.
    with(Sysno::poll, &[(1, Is::Number(1)), (2, Is::Number(0))]),
];

/// Serves the console, cards and the random number generator.
static DEVICE: &[Rule] = &[
    any(Sysno::epoll_wait),
    any(Sysno::epoll_ctl),
    any(Sysno::timerfd_settime),
    // Sockets, and queues of TAP interfaces.
    any(Sysno::recvfrom),
    any(Sysno::sendto),
    any(Sysno::recvmsg),
    any(Sysno::sendmsg),
    any(Sysno::readv),
    any(Sysno::writev),
    // Whether the other end of a socket is gone; a console that cannot be opened anew.
    any(Sysno::poll),
    ioctl(&[(1, Is::Number(TUNGETIFF))]),
    ioctl(&[(1, Is::Number(TUNSETQUEUE))]),
    VHOST,
    // What is typed interrupts the guest.
    ioctl(&[(1, Is::Number(KVM_SIGNAL_MSI))]),
];

/// Serves a queue of a disk.
static DISK: &[Rule] = &[
    any(Sysno::epoll_wait),
    any(Sysno::epoll_ctl),
    any(Sysno::timerfd_settime),
    // Its rings know nothing but these, with the disk's own files (sys/uring.rs).
    any(Sysno::io_uring_enter),
    // It is stopped amid requests.
    any(Sysno::poll),
    any(Sysno::preadv),
    any(Sysno::pwritev2),
    any(Sysno::fdatasync),
    with(Sysno::fallocate, &[(1, Is::Number(HOLE))]),
    with(Sysno::fallocate, &[(1, Is::Number(ZEROES))]),
    // qcow2's metadata, and files that grow.
    any(Sysno::pread64),
    any(Sysno::pwrite64),
    any(Sysno::ftruncate),
    any(Sysno::fstat),
];

/// Serves the balloon: gives memory back, and sees how much there is.
static BALLOON: &[Rule] = &[
    any(Sysno::epoll_wait),
    any(Sysno::epoll_ctl),
    any(Sysno::timerfd_settime),
    with(Sysno::fallocate, &[(1, Is::Number(0))])
        .unseen("memory of the pool of huge pages, which an administrator makes"),
    with(Sysno::fallocate, &[(1, Is::Number(HOLE))]),
    with(Sysno::madvise, &[(2, Is::Number(libc::MADV_FREE as u32))]),
    ioctl(&[(1, Is::Number(PAGEMAP_SCAN))]),
    any(Sysno::fstat),
    any(Sysno::pread64).unseen("kernels before 6.7 know no PAGEMAP_SCAN"),
];

/// Looks at the host's memory and at what each VM has of it; asks balloons, pages out, ends VMs and gives their memory back. VMs are
/// paused, and go on, on a thread outside.
static RECLAIM: &[Rule] = &[
    any(Sysno::epoll_wait),
    any(Sysno::epoll_ctl).unseen("the cgroup, of version 2, whose pressure is watched is removed"),
    // The machine's memory, the cgroup's, and a guest's page tables before Linux 6.7: from files that were opened before.
    any(Sysno::pread64),
    any(Sysno::sysinfo),
    any(Sysno::fstat),
    any(Sysno::mincore).unseen("something is in swap: tests/linux"),
    ioctl(&[(1, Is::Number(PAGEMAP_SCAN))]),
    with(Sysno::madvise, &[(2, Is::Number(libc::MADV_PAGEOUT as u32))]).unseen("there is swap: tests/linux"),
    with(Sysno::fallocate, &[(1, Is::Number(HOLE))]),
    // The end of anonymous memory that is no whole huge page.
    with(Sysno::madvise, &[(2, Is::Number(libc::MADV_FREE as u32))]),
    any(Sysno::clock_nanosleep),
];

/// `_IO(KVMIO, 0x80)`; the others from linux/kvm.h and linux/if_tun.h the same way.
const KVM_RUN: u32 = 0xae80;
const KVM_SET_GSI_ROUTING: u32 = 0x4008_ae6a;
const KVM_IRQFD: u32 = 0x4020_ae76;
const KVM_IOEVENTFD: u32 = 0x4040_ae79;
const KVM_SIGNAL_MSI: u32 = 0x4020_aea5;
/// linux/fs.h
const PAGEMAP_SCAN: u32 = 0xc060_6610;
const TUNSETOFFLOAD: u32 = 0x4004_54d0;
const TUNGETIFF: u32 = 0x8004_54d2;
const TUNSETQUEUE: u32 = 0x4004_54d9;
