//! Sees every system call of the threads that are to be tested, and answers one or two of them itself.
#![expect(unsafe_code, reason = "seccomp's user notifications have no safe wrapper")]

use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};

use crate::callers::{self, place};
use crate::life::Life;
use crate::part::{self, transfer};
use crate::sweep::error_after;
use crate::{ANYWHERE, Answer, Fault, Kind, held, notices};

/// Calls that are made as they are, for one of these reasons:
const PASSED: [libc::c_long; 22] = [
    // Do not come back, or cannot fail.
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_sched_yield,
    libc::SYS_clock_gettime,
    // Fail for arguments that are no good alone: addresses, numbers of signals, of clocks, of threads.
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_sigaltstack,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_arch_prctl,
    libc::SYS_restart_syscall,
    // So do these, and interrupted, the standard library sleeps what is left. Without a futex, locks lock nothing.
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_futex,
    // The allocator's, and those of the stacks of the C library's threads: without memory, a Rust program ends by design.
    libc::SYS_brk,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    // Gives back: what does not fails for its arguments alone, and the kernel has closed what it says an error of. An answer without the
    // call would be a leak of the test's own making.
    libc::SYS_munmap,
    libc::SYS_close,
];

/// Whether calls are counted, and one of them fails.
pub static ARMED: AtomicBool = AtomicBool::new(false);
/// How often a call was answered.
pub static HIT: AtomicU64 = AtomicU64::new(0);
/// From where the last one came.
pub static HIT_FROM: AtomicU32 = AtomicU32::new(0);
/// From where the one came that failed after it.
pub static THEN_FROM: AtomicU32 = AtomicU32::new(0);
/// There is no room for all that is seen.
pub static FULL: AtomicBool = AtomicBool::new(false);
static LISTENER: AtomicI32 = AtomicI32::new(-1);

/// Calls of a kind from a place, or from anywhere.
struct Seen {
    kind: AtomicU64,
    place: AtomicU32,
    count: AtomicU64,
}

const ROOM: usize = 4096;
static SEEN: [Seen; ROOM] =
    [const { Seen { kind: AtomicU64::new(0), place: AtomicU32::new(0), count: AtomicU64::new(0) } }; ROOM];

/// What was called, from where, and how often.
pub fn seen() -> impl Iterator<Item = (Kind, u32, u64)> {
    SEEN.iter().filter(|seen| seen.count.load(Ordering::SeqCst) > 0).map(|seen| {
        let kind = seen.kind.load(Ordering::SeqCst);
        let kind = Kind { number: (kind >> 32) as u32, request: kind as u32 };
        (kind, seen.place.load(Ordering::SeqCst), seen.count.load(Ordering::SeqCst))
    })
}

/// Has this thread's calls, and those of the threads that it starts, be seen by another one that is started here.
pub fn watch(fault: Fault) {
    part::learn();
    callers::learn();
    std::thread::spawn(move || supervise(fault));
    // SAFETY: integers go in.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, 0);
    let mut code = program();
    let program = libc::sock_fprog { len: code.len() as u16, filter: code.as_mut_ptr() };
    // A signal waits for the answer: what was answered is answered.
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
    // SAFETY: the program lives until the call returns, which copies it.
    let fd =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    // From here on calls wait for the other thread.
    LISTENER.store(fd as i32, Ordering::SeqCst);
    assert!(fd >= 0, "seccomp: {}", std::io::Error::last_os_error());
}

/// Address space that the C library's allocator sets aside for a thread.
const ARENA: u32 = 64 << 20;

fn program() -> Vec<libc::sock_filter> {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let jump = |code: u32, k: u32, jt: u8, jf: u8| libc::sock_filter { code: code as u16, jt, jf, k };
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let [equal, set, greater] =
        [libc::BPF_JEQ, libc::BPF_JSET, libc::BPF_JGT].map(|j| libc::BPF_JMP | j | libc::BPF_K);
    let answer = |what: u32| statement(libc::BPF_RET | libc::BPF_K, what);
    let allow = answer(libc::SECCOMP_RET_ALLOW);
    // struct seccomp_data: the number, the architecture, the instruction, six arguments of 8 bytes.
    let argument = |i: u32| statement(load, 16 + 8 * i);
    let mut code = vec![statement(load, 0)];
    for number in PASSED {
        code.extend([jump(equal, number as u32, 0, 1), allow]);
    }
    // The allocator's memory is anonymous: more than a page, or address space of one of two sizes. A new thread of Rust's has a second stack for signals, without which it
    // ends the process; the first is mapped without any access.
    let flags = [libc::MAP_ANONYMOUS, libc::MAP_STACK, libc::MAP_NORESERVE];
    let [anonymous, stack, empty] = flags.map(|flag| flag as u32);
    code.extend([
        jump(equal, libc::SYS_mmap as u32, 0, 13),
        argument(3),
        jump(set, anonymous, 0, 10),
        jump(set, stack, 0, 2),
        argument(2),
        jump(equal, libc::PROT_NONE as u32, 7, 6),
        jump(set, empty, 2, 0),
        argument(1),
        jump(greater, 4096, 3, 4),
        argument(1),
        jump(equal, ARENA, 1, 0),
        jump(equal, 2 * ARENA, 0, 1),
        allow,
        statement(load, 0),
    ]);
    // Random bytes with flags are the standard library's, for its maps, and the C library's: both have other ways. Processors of a
    // thread by its number are the C library's, for a new thread's stack; ours are asked for by 0.
    for (number, at) in [(libc::SYS_getrandom, 2), (libc::SYS_sched_getaffinity, 0)] {
        code.extend([jump(equal, number as u32, 0, 4), argument(at), jump(equal, 0, 1, 0), allow]);
        code.push(statement(load, 0));
    }
    // What this program says.
    code.extend([jump(equal, libc::SYS_write as u32, 0, 4), argument(0)]);
    code.extend([jump(greater, 2, 1, 0), allow, statement(load, 0)]);
    code.push(answer(libc::SECCOMP_RET_USER_NOTIF));
    code
}

/// Allocates nothing: a thread that is answered may hold the allocator's lock.
fn supervise(fault: Fault) {
    let fd: RawFd = loop {
        match LISTENER.load(Ordering::SeqCst) {
            -1 => std::thread::yield_now(),
            fd => break fd,
        }
    };
    loop {
        // SAFETY: all zeroes is one, and what the kernel wants.
        let mut call: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel fills one of these, which lives until it returns.
        if unsafe { libc::ioctl(fd, libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut call) } < 0 {
            continue;
        }
        // SAFETY: as above.
        let mut answer: libc::seccomp_notif_resp = unsafe { std::mem::zeroed() };
        answer.id = call.id;
        let armed = ARMED.load(Ordering::SeqCst);
        let mut result = if armed { decide(&fault, &call) } else { None };
        if result.is_none() {
            result = match fault.life {
                Life::Refused => notices::answer(&call.data, armed),
                Life::Held => held::answer(&call.data, armed),
                _ => None,
            };
        }
        match result {
            Some(result) if result < 0 => answer.error = result as i32,
            Some(result) => answer.val = result,
            None => answer.flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
        }
        // SAFETY: it is read, and lives until it returns. It fails where the thread is ended, with its process; and a ring that this thread has
        // told something interrupts it at its end.
        while unsafe { libc::ioctl(fd, libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut answer) } < 0
            && std::io::Error::last_os_error().raw_os_error() == Some(libc::EINTR)
        {}
    }
}

/// What the call comes to: its result, or an error below zero. `None`: it is made as it is.
fn decide(fault: &Fault, notice: &libc::seccomp_notif) -> Option<i64> {
    let call = &notice.data;
    // What is not heard of any more gives back, too: it fails for its arguments alone.
    let forgets =
        libc::c_long::from(call.nr) == libc::SYS_epoll_ctl && call.args[1] as i32 == libc::EPOLL_CTL_DEL;
    // Whether a descriptor is open: the standard library asks before it closes one, in tests.
    let asks = libc::c_long::from(call.nr) == libc::SYS_fcntl && call.args[1] as i32 == libc::F_GETFD;
    if asks {
        return None;
    }
    let request = if forgets {
        Kind::KEPT
    } else if libc::c_long::from(call.nr) == libc::SYS_ioctl {
        call.args[1] as u32
    } else {
        0
    };
    let kind = Kind { number: call.nr as u32, request };
    let place = place(notice.pid, call.nr.into());
    let is_it = |kind: Kind| {
        let (all, here) = (count(kind, ANYWHERE), count(kind, place));
        let nth = if fault.place == ANYWHERE { all } else { here };
        kind == fault.kind && (fault.place == ANYWHERE || fault.place == place) && nth == Some(fault.nth)
    };
    if fault.then == Some((kind, place))
        && HIT.load(Ordering::SeqCst) > 0
        && THEN_FROM.swap(place, Ordering::SeqCst) == 0
    {
        eprintln!("answered then: {} {:x?}", call.nr, call.args);
        return Some(-i64::from(error_after(fault.answer)));
    }
    let hit = || {
        HIT_FROM.store(place, Ordering::SeqCst);
        HIT.fetch_add(1, Ordering::SeqCst);
        eprintln!("answered: {} {:x?}", call.nr, call.args);
    };
    if is_it(kind)
        && let Answer::Error(error) = fault.answer
    {
        hit();
        return Some(-i64::from(error));
    }
    let transfer = transfer(call)?;
    if is_it(Kind { request: Kind::PART, ..kind })
        && let Answer::Part(part) = fault.answer
    {
        hit();
        return transfer.perform(part);
    }
    None
}

/// Counts a call; which of its kind it is. This thread alone counts.
fn count(kind: Kind, place: u32) -> Option<u64> {
    let key = u64::from(kind.number) << 32 | u64::from(kind.request);
    let begin = (key ^ u64::from(place) << 13).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
    let is_free = |seen: &&Seen| {
        let own = seen.kind.load(Ordering::SeqCst) == key && seen.place.load(Ordering::SeqCst) == place;
        own || seen.count.load(Ordering::SeqCst) == 0
    };
    let seen = (0..ROOM).map(|step| &SEEN[(begin as usize + step) % ROOM]).find(is_free);
    let Some(seen) = seen else {
        FULL.store(true, Ordering::SeqCst);
        return None;
    };
    seen.kind.store(key, Ordering::SeqCst);
    seen.place.store(place, Ordering::SeqCst);
    Some(seen.count.fetch_add(1, Ordering::SeqCst) + 1)
}
