//! Signals on library threads: all blocked, and one of them used to end `KVM_RUN`.

use std::io;
use std::mem::MaybeUninit;

/// The signal that ends `KVM_RUN` on a vCPU thread.
///
/// It is sent to one thread, blocked there, and consumed by `sigtimedwait`: the embedder's handler for
/// it, if any, never sees it. Not a real-time signal: those fail with EAGAIN when a queue is full.
pub(crate) const KICK: libc::c_int = libc::SIGURG;

/// A set of signals.
#[derive(Clone)]
pub(crate) struct SignalSet(libc::sigset_t);

impl SignalSet {
    /// Every signal.
    pub fn full() -> Self {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigfillset initializes the whole set and cannot fail on a valid pointer.
        unsafe {
            libc::sigfillset(set.as_mut_ptr());
            Self(set.assume_init())
        }
    }

    /// What a library thread blocks: all but the faults that its own instructions raise.
    pub fn library_thread() -> Self {
        let mut set = Self::full();
        for fault in [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGABRT] {
            set.remove(fault);
        }
        set
    }

    fn only(signal: libc::c_int) -> Self {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigemptyset initializes the whole set; `signal` is a valid number.
        unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            libc::sigaddset(set.as_mut_ptr(), signal);
            Self(set.assume_init())
        }
    }

    pub fn remove(&mut self, signal: libc::c_int) {
        // SAFETY: the set is initialized; `signal` is a valid number.
        unsafe { libc::sigdelset(&mut self.0, signal) };
    }

    fn has(&self, signal: libc::c_int) -> bool {
        // SAFETY: the set is initialized; sigismember answers -1 for numbers it does not know.
        unsafe { libc::sigismember(&self.0, signal) == 1 }
    }

    /// As the kernel writes it: bit n - 1 for signal n.
    pub fn kernel_bits(&self) -> u64 {
        (1..=64).filter(|signal| self.has(*signal)).fold(0, |bits, signal| bits | 1 << (signal - 1))
    }

    /// Blocks the kick on the calling thread besides what it blocks; returns what was blocked before.
    pub fn block_kick() -> Self {
        let mut old = MaybeUninit::uninit();
        // SAFETY: both sets are valid; SIG_BLOCK with a valid set cannot fail, so `old` is written.
        unsafe {
            libc::pthread_sigmask(libc::SIG_BLOCK, &Self::only(KICK).0, old.as_mut_ptr());
            Self(old.assume_init())
        }
    }

    /// Blocks exactly this set on the calling thread; returns what was blocked before.
    pub fn block(&self) -> Self {
        let mut old = MaybeUninit::uninit();
        // SAFETY: both sets are valid; SIG_SETMASK with a valid set cannot fail, so `old` is written.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, old.as_mut_ptr());
            Self(old.assume_init())
        }
    }
}

/// While it lives, the signals that a write of the calling thread's can raise (SIGXFSZ past RLIMIT_FSIZE, SIGPIPE to nobody)
/// end nothing: the call fails with EFBIG or EPIPE. For threads of the embedder's, which keep their mask otherwise.
pub(crate) struct Shield {
    before: SignalSet,
    /// Those that were pending before, and stay so.
    pending: SignalSet,
}

const WRITES_RAISE: [libc::c_int; 2] = [libc::SIGXFSZ, libc::SIGPIPE];

impl Shield {
    pub fn raise() -> Self {
        let (mut wanted, mut before) = (SignalSet::only(libc::SIGXFSZ), MaybeUninit::uninit());
        // SAFETY: initialized sets, a valid signal, and a place for the set before; SIG_BLOCK cannot fail then.
        unsafe {
            libc::sigaddset(&mut wanted.0, libc::SIGPIPE);
            libc::pthread_sigmask(libc::SIG_BLOCK, &wanted.0, before.as_mut_ptr());
            Self { before: SignalSet(before.assume_init()), pending: pending() }
        }
    }
}

impl Drop for Shield {
    fn drop(&mut self) {
        for signal in WRITES_RAISE.into_iter().filter(|signal| !self.pending.has(*signal)) {
            consume(signal);
        }
        self.before.block();
    }
}

/// What waits for the calling thread to take.
fn pending() -> SignalSet {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigpending writes the whole set, and cannot fail with a valid pointer.
    unsafe {
        libc::sigpending(set.as_mut_ptr());
        SignalSet(set.assume_init())
    }
}

/// Consumes a pending kick of the calling thread; whether there was one.
pub(crate) fn consume_kick() -> bool {
    consume(KICK)
}

fn consume(signal: libc::c_int) -> bool {
    let set = SignalSet::only(signal);
    let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: valid set and timeout; the kernel may write no siginfo where the pointer is NULL.
    unsafe { libc::sigtimedwait(&set.0, std::ptr::null_mut(), &now) == signal }
}

/// The calling thread's kernel id.
pub(crate) fn thread_id() -> i32 {
    // SAFETY: no arguments, cannot fail.
    unsafe { libc::gettid() }
}

/// Sends the kick to a thread of this process. The caller knows that the thread has not ended.
pub(crate) fn kick(thread: i32) -> io::Result<()> {
    /// The kernel has no reason to refuse one, but a filter may answer for it, and whoever is not kicked stays in the guest.
    const TRIES: usize = 3;
    let mut last = io::Error::from_raw_os_error(libc::EAGAIN);
    for _ in 0..TRIES {
        // SAFETY: plain integers; a thread of another process cannot be meant, since our own id is given.
        if unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, KICK) } == 0 {
            return Ok(());
        }
        last = io::Error::last_os_error();
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kick_waits_until_it_is_consumed() {
        std::thread::spawn(|| {
            SignalSet::library_thread().block();
            kick(thread_id()).unwrap();
            let before = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            assert!(consume_kick());
            assert!(!consume_kick());
            let after = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            let pending = |s: &str| s.lines().find(|l| l.starts_with("SigPnd")).unwrap().to_owned();
            assert_ne!(pending(&before), pending(&after));
            assert!(pending(&after).ends_with("0000000000000000"));
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_shield_takes_what_came_behind_it_and_nothing_else() {
        std::thread::spawn(|| {
            let raise = |signal| {
                // SAFETY: an integer; pthread_kill of oneself is what a write does.
                assert_eq!(unsafe { libc::pthread_kill(libc::pthread_self(), signal) }, 0);
            };
            let before = SignalSet::only(libc::SIGHUP).block();
            for signal in WRITES_RAISE {
                let shield = Shield::raise();
                raise(signal);
                drop(shield);
                assert!(!pending().has(signal));
            }
            SignalSet::library_thread().block();
            raise(libc::SIGXFSZ);
            let shield = Shield::raise();
            raise(libc::SIGPIPE);
            drop(shield);
            assert!(pending().has(libc::SIGXFSZ) && !pending().has(libc::SIGPIPE));
            assert!(consume(libc::SIGXFSZ));
            before.block();
        })
        .join()
        .unwrap();
    }

    #[test]
    fn kernel_bits_are_the_signals() {
        assert_eq!(SignalSet::only(libc::SIGHUP).kernel_bits(), 1);
        let bits = SignalSet::library_thread().kernel_bits();
        assert_eq!(bits >> (libc::SIGSEGV - 1) & 1, 0);
        assert_eq!(bits >> (KICK - 1) & 1, 1);
    }
}
