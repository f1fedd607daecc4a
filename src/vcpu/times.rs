#![forbid(unsafe_code)]
//! How long a vCPU ran, and how long it waited for a CPU, over all the threads that served it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::time::Duration;

use crate::sys::{lock, signal};

/// What the scheduler counts of a thread (`/proc/PID/task/TID/schedstat`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Times {
    pub run: Duration,
    /// Ready to run, and not running.
    pub delay: Duration,
}

impl Times {
    /// Zero where the kernel does not say.
    fn of(thread: i32) -> Self {
        Self::parse(&fs::read_to_string(format!("/proc/self/task/{thread}/schedstat")).unwrap_or_default())
    }

    fn read(schedstat: &File) -> Self {
        let mut bytes = [0; 96];
        let count = schedstat.read_at(&mut bytes, 0).unwrap_or(0);
        Self::parse(&String::from_utf8_lossy(&bytes[..count]))
    }

    fn parse(text: &str) -> Self {
        let mut numbers = text.split_ascii_whitespace().map_while(|n| n.parse().ok());
        let mut next = || Duration::from_nanos(numbers.next().unwrap_or(0));
        Self { run: next(), delay: next() }
    }

    fn since(self, start: Self) -> Self {
        Self { run: self.run.saturating_sub(start.run), delay: self.delay.saturating_sub(start.delay) }
    }

    fn plus(self, other: Self) -> Self {
        Self { run: self.run.saturating_add(other.run), delay: self.delay.saturating_add(other.delay) }
    }
}

/// The times of a vCPU.
#[derive(Default)]
pub(super) struct Account(Mutex<State>);

#[derive(Default)]
struct State {
    /// Of threads that serve it no more.
    past: Times,
    /// The thread that serves it, and its times when it began.
    now: Option<(i32, Times)>,
    /// That thread's schedstat, where it may not open it any more when it ends; nothing in it where there is none.
    schedstat: Option<Option<File>>,
}

impl Account {
    /// The calling thread will serve the vCPU, and will be confined first.
    pub fn prepare(&self) {
        lock(&self.0).schedstat = Some(File::open("/proc/thread-self/schedstat").ok());
    }

    /// The calling thread serves the vCPU from here on, until what is returned is dropped. A thread that is `fresh` has
    /// done nothing else before: the kernel need not be asked, which would delay the guest's start.
    pub fn open(&self, fresh: bool) -> Open<'_> {
        let thread = signal::thread_id();
        let start = if fresh { Times::default() } else { Times::of(thread) };
        lock(&self.0).now = Some((thread, start));
        Open(self)
    }

    /// The thread that serves it, and the times of all.
    pub fn read(&self) -> (Option<i32>, Times) {
        // While the lock is held the thread cannot end, so its id is nobody else's.
        let state = lock(&self.0);
        match state.now {
            Some((thread, start)) => (Some(thread), state.past.plus(Times::of(thread).since(start))),
            None => (None, state.past),
        }
    }
}

/// See [`Account::open`].
pub(super) struct Open<'a>(&'a Account);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.0.0);
        if let Some((thread, start)) = state.now.take() {
            let end = match state.schedstat.take() {
                Some(own) => own.map_or(start, |own| Times::read(&own)),
                None => Times::of(thread),
            };
            state.past = state.past.plus(end.since(start));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    /// Runs for that long, by the kernel's account of this thread: a hypervisor below may take the processor away.
    fn burn(time: Duration) {
        let ran = || {
            let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
            Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
        };
        let (start, end) = (ran(), Instant::now() + Duration::from_secs(60));
        while ran() - start < time {
            assert!(Instant::now() < end, "waited a minute for {time:?} of a processor");
        }
    }

    #[test]
    fn the_times_of_all_threads_add_up() {
        let account = Account::default();
        burn(Duration::from_millis(20));
        for round in 1..=2 {
            std::thread::scope(|s| {
                s.spawn(|| {
                    burn(Duration::from_millis(20));
                    let _open = account.open(false);
                    burn(Duration::from_millis(40));
                    let (thread, times) = account.read();
                    assert_eq!(thread, Some(signal::thread_id()));
                    let all = times.run + times.delay;
                    assert!(all >= Duration::from_millis(30) * round, "{times:?}");
                });
            });
        }
        let (thread, times) = account.read();
        assert_eq!(thread, None);
        let all = times.run + times.delay;
        assert!(all >= Duration::from_millis(70), "{times:?}");
        assert_eq!(account.read().1, times, "stands still while nobody serves it");
    }

    #[test]
    fn two_threads_on_one_cpu_wait_for_each_other() {
        let account = Account::default();
        let cpu = crate::sys::thread::affinity().unwrap()[0];
        std::thread::scope(|s| {
            s.spawn(|| {
                crate::sys::thread::set_affinity(&[cpu]).unwrap();
                burn(Duration::from_millis(200));
            });
            s.spawn(|| {
                crate::sys::thread::set_affinity(&[cpu]).unwrap();
                let _open = account.open(true);
                burn(Duration::from_millis(200));
            });
        });
        assert!(account.read().1.delay >= Duration::from_millis(20), "{:?}", account.read());
    }
}
