//! What stands for `src/sys/sync.rs`. A model waits without limits: where nothing wakes a thread any more, loom says so.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, PoisonError};

pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};

pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Nothing takes time here.
pub(crate) fn wait_until<'a, T>(
    condvar: &Condvar,
    guard: MutexGuard<'a, T>,
    _: std::time::Instant,
) -> (MutexGuard<'a, T>, bool) {
    (condvar.wait(guard).unwrap_or_else(PoisonError::into_inner), false)
}

/// Tries the orders that take a thread's turn from it `preemptions` times at most: all that are known to matter need two or three.
pub(crate) fn check(preemptions: usize, model: fn()) {
    let more = std::env::var("VMBED_PREEMPTIONS").map_or(0, |more| more.parse().expect("a number"));
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions + more);
    builder.max_branches = 100_000;
    let orders = Arc::new(AtomicUsize::new(0));
    let count = orders.clone();
    builder.check(move || {
        count.fetch_add(1, atomic::Ordering::Relaxed);
        model();
    });
    let orders = orders.load(atomic::Ordering::Relaxed);
    assert!(orders > 1, "nothing was tried");
    println!("{orders} orders");
}

/// An eventfd. Its number is that of a descriptor, which does nothing else here.
pub(crate) struct Bell {
    count: Arc<Count>,
    fd: OwnedFd,
}

struct Count {
    rings: Mutex<u64>,
    came: Condvar,
}

loom::lazy_static! {
    static ref BELLS: Mutex<Vec<(RawFd, Arc<Count>)>> = Mutex::new(Vec::new());
}

impl Bell {
    pub fn new() -> io::Result<Self> {
        let fd = OwnedFd::from(std::fs::File::open("/dev/null")?);
        let count = Arc::new(Count { rings: Mutex::new(0), came: Condvar::new() });
        lock(&BELLS).push((fd.as_raw_fd(), count.clone()));
        Ok(Self { count, fd })
    }

    pub fn ring(&self) {
        *lock(&self.count.rings) += 1;
        self.count.came.notify_all();
    }

    pub fn silence(&self) -> u64 {
        std::mem::take(&mut *lock(&self.count.rings))
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn count_of(bell: BorrowedFd<'_>) -> Arc<Count> {
    let bells = lock(&BELLS);
    let known = bells.iter().rev().find(|(fd, _)| *fd == bell.as_raw_fd());
    known.expect("a bell").1.clone()
}

/// Waits until a bell is readable.
pub(crate) fn poll(bell: BorrowedFd<'_>) {
    let count = count_of(bell);
    let mut rings = lock(&count.rings);
    while *rings == 0 {
        rings = count.came.wait(rings).unwrap_or_else(PoisonError::into_inner);
    }
}

pub(crate) fn is_readable(bell: BorrowedFd<'_>) -> bool {
    *lock(&count_of(bell).rings) > 0
}

/// Atomics, with a turn in front of each access: of a word that is read, read by another thread, and then written by that, loom 0.7 forgets the
/// first reading, and never tries it after the writing. Turns order the threads only, not what they see.
pub(crate) mod atomic {
    pub(crate) use std::sync::atomic::Ordering;

    use loom::sync::atomic as loom;

    macro_rules! turned {
        ($name:ident of $type:ty) => {
            #[derive(Debug, Default)]
            pub(crate) struct $name {
                word: loom::$name,
                turn: loom::AtomicU8,
            }

            #[allow(dead_code, reason = "each of them is used in some other way")]
            impl $name {
                pub fn new(value: $type) -> Self {
                    Self { word: loom::$name::new(value), turn: loom::AtomicU8::new(0) }
                }

                fn take_turn(&self) -> &loom::$name {
                    self.turn.fetch_add(1, Ordering::Relaxed);
                    &self.word
                }

                pub fn load(&self, order: Ordering) -> $type {
                    self.take_turn().load(order)
                }

                pub fn store(&self, value: $type, order: Ordering) {
                    self.take_turn().store(value, order);
                }

                pub fn compare_exchange(
                    &self,
                    old: $type,
                    new: $type,
                    success: Ordering,
                    failure: Ordering,
                ) -> Result<$type, $type> {
                    self.take_turn().compare_exchange(old, new, success, failure)
                }
            }
        };
    }
    turned!(AtomicBool of bool);
    turned!(AtomicU64 of u64);
}

/// The kick, and the guest that it ends.
pub(crate) mod signal {
    use std::cell::Cell;
    use std::io;
    use std::sync::PoisonError;

    use super::{Condvar, Mutex, lock};

    struct Kicks {
        /// Of each thread, whether a kick waits for it.
        pending: Mutex<Vec<bool>>,
        came: Condvar,
    }

    loom::lazy_static! {
        static ref KICKS: Kicks = Kicks { pending: Mutex::new(Vec::new()), came: Condvar::new() };
    }

    loom::thread_local! {
        static ID: Cell<i32> = Cell::new(0);
    }

    pub(crate) fn thread_id() -> i32 {
        ID.with(|id| {
            if id.get() == 0 {
                let mut pending = lock(&KICKS.pending);
                pending.push(false);
                id.set(pending.len() as i32);
            }
            id.get()
        })
    }

    pub(crate) fn kick(thread: i32) -> io::Result<()> {
        lock(&KICKS.pending)[thread as usize - 1] = true;
        KICKS.came.notify_all();
        Ok(())
    }

    pub(crate) fn consume_kick() -> bool {
        let own = thread_id() as usize - 1;
        std::mem::take(&mut lock(&KICKS.pending)[own])
    }

    /// `KVM_RUN` of a guest that never comes out by itself: until a kick waits, also one from before.
    pub(crate) fn run_guest() {
        let own = thread_id() as usize - 1;
        let mut pending = lock(&KICKS.pending);
        while !pending[own] {
            pending = KICKS.came.wait(pending).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
