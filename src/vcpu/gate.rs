#![forbid(unsafe_code)]
//! Where vCPUs wait: for the start, through a pause, and how they learn of the end.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use crate::sys::{lock, signal};

/// What the VM wants of its vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Run,
    Wait,
    End,
}

/// The one barrier of a VM: its vCPUs pass while the target is `Run`, stand while it is `Wait`, and
/// leave for good at `End`, which nothing revokes.
pub(crate) struct Gate {
    /// Set whenever the target is not `Run`: all that a vCPU looks at between two exits.
    attention: AtomicBool,
    state: Mutex<State>,
    /// The target changed.
    opened: Condvar,
    /// A vCPU came to stand, or left.
    settled: Condvar,
}

struct State {
    target: Target,
    /// The thread id of each vCPU; 0 before its thread runs and after it has left.
    threads: Vec<i32>,
    standing: usize,
    left: usize,
}

impl Gate {
    /// A closed gate for `vcpus` vCPUs.
    pub fn new(vcpus: usize) -> Self {
        Self {
            attention: AtomicBool::new(true),
            state: Mutex::new(State { target: Target::Wait, threads: vec![0; vcpus], standing: 0, left: 0 }),
            opened: Condvar::new(),
            settled: Condvar::new(),
        }
    }

    /// Whether a vCPU must come to the gate. One load, for the hot path.
    #[inline(always)]
    pub fn wants_attention(&self) -> bool {
        self.attention.load(Ordering::Relaxed)
    }

    /// Called by the thread of vCPU `index` before anything else, so that it can be kicked.
    pub fn enter(&self, index: usize) {
        lock(&self.state).threads[index] = signal::thread_id();
    }

    /// Stands while the VM waits. `false` when the vCPU must leave.
    pub fn pass(&self) -> bool {
        let mut state = lock(&self.state);
        if state.target == Target::Wait {
            state.standing += 1;
            self.settled.notify_all();
            while state.target == Target::Wait {
                state = self.opened.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
            }
            state.standing -= 1;
        }
        state.target == Target::Run
    }

    /// Called last by the thread of vCPU `index`. `true` for the last one of all.
    pub fn leave(&self, index: usize) -> bool {
        let mut state = lock(&self.state);
        // From here on the id may belong to someone else: never kick it again.
        state.threads[index] = 0;
        state.left += 1;
        self.settled.notify_all();
        state.left == state.threads.len()
    }

    /// Says what the vCPUs are to do, and kicks them out of the guest if it is not `Run`. Never blocks.
    /// `false` when the end was declared earlier: then the target stays `End`.
    pub fn set(&self, target: Target) -> bool {
        let mut state = lock(&self.state);
        if state.target == Target::End {
            return target == Target::End;
        }
        state.target = target;
        self.attention.store(target != Target::Run, Ordering::Relaxed);
        self.opened.notify_all();
        if target != Target::Run {
            for thread in state.threads.iter().filter(|t| **t != 0) {
                // ESRCH cannot be: a thread clears its id, under this lock, before it ends.
                let _ = signal::kick(*thread);
            }
        }
        true
    }

    /// Waits until every vCPU stands or has left. `false` at the deadline.
    pub fn wait_settled(&self, timeout: Duration) -> bool {
        self.wait_for(timeout, |s| s.standing + s.left == s.threads.len())
    }

    fn wait_for(&self, timeout: Duration, done: impl Fn(&State) -> bool) -> bool {
        let deadline = Instant::now() + timeout;
        let mut state = lock(&self.state);
        while !done(&state) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = match self.settled.wait_timeout(state, left) {
                Ok((state, _)) => state,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn vcpus_stand_run_and_leave_together() {
        let gate = Arc::new(Gate::new(3));
        let passed = Arc::new(AtomicUsize::new(0));
        let long = Duration::from_secs(20);
        let threads: Vec<_> = (0..3)
            .map(|i| {
                let (gate, passed) = (gate.clone(), passed.clone());
                let body = move || {
                    gate.enter(i);
                    while gate.pass() {
                        passed.fetch_add(1, Ordering::Relaxed);
                        while !gate.wants_attention() {
                            std::thread::yield_now();
                        }
                        signal::consume_kick();
                    }
                    gate.leave(i);
                };
                crate::sys::thread::spawn(format!("gate{i}"), body).unwrap()
            })
            .collect();
        for round in 1..=20 {
            assert!(gate.wait_settled(long), "all stand before round {round}");
            gate.set(Target::Run);
            while passed.load(Ordering::Relaxed) < 3 * round {
                std::thread::yield_now();
            }
            gate.set(Target::Wait);
        }
        assert!(gate.set(Target::End));
        assert!(!gate.set(Target::Run), "nothing revokes the end");
        assert!(gate.wait_settled(long));
        threads.into_iter().for_each(|t| t.join().unwrap());
    }

    #[test]
    fn waiting_for_a_vcpu_that_does_not_come_ends_at_the_deadline() {
        let gate = Gate::new(1);
        assert!(!gate.wait_settled(Duration::from_millis(10)));
    }
}
