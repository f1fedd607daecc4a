#![forbid(unsafe_code)]
//! Where vCPUs wait: for the start, through a pause, and how they learn of the end.

use std::time::{Duration, Instant};

use crate::sys::sync::atomic::{AtomicBool, Ordering};
use crate::sys::sync::{Condvar, Mutex, MutexGuard, lock, signal};

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
    /// The target changed, or somebody wants a vCPU's thread back.
    opened: Condvar,
    /// A vCPU came to stand, or no thread runs it any more.
    settled: Condvar,
}

struct State {
    target: Target,
    seats: Vec<Seat>,
}

/// A vCPU, as the gate knows it.
#[derive(Clone, Copy, Default)]
struct Seat {
    /// The id of the thread that runs it; 0 while none does.
    thread: i32,
    standing: bool,
    /// It has left for good.
    left: bool,
    /// Its thread is wanted back, by [`Gate::interrupt`].
    interrupted: bool,
}

impl Seat {
    fn is_settled(&self) -> bool {
        self.thread == 0 || self.standing
    }
}

/// What the gate answers a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pass {
    /// Into the guest.
    Run,
    /// Away for good.
    Leave,
    /// Back to who runs the vCPU, for now.
    Return,
}

/// What came of [`Gate::enter`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entered {
    Yes,
    /// Another thread runs this vCPU.
    Busy,
    /// It has left for good.
    Left,
}

impl Gate {
    /// A closed gate for `vcpus` vCPUs.
    pub fn new(vcpus: usize) -> Self {
        Self {
            attention: AtomicBool::new(true),
            state: Mutex::new(State { target: Target::Wait, seats: vec![Seat::default(); vcpus] }),
            opened: Condvar::new(),
            settled: Condvar::new(),
        }
    }

    /// Whether a vCPU must come to the gate. One load, for the hot path.
    #[inline(always)]
    pub fn wants_attention(&self) -> bool {
        self.attention.load(Ordering::Relaxed)
    }

    /// Called by the thread that runs vCPU `index` before anything else, so that it can be kicked.
    pub fn enter(&self, index: usize) -> Entered {
        let mut state = lock(&self.state);
        let seat = &mut state.seats[index];
        match (seat.left, seat.thread) {
            (true, _) => Entered::Left,
            (_, 0) => {
                seat.thread = signal::thread_id();
                Entered::Yes
            }
            _ => Entered::Busy,
        }
    }

    /// Stands while the VM waits, and says what vCPU `index` does then.
    pub fn pass(&self, index: usize) -> Pass {
        let mut state = lock(&self.state);
        while state.target == Target::Wait && !state.seats[index].interrupted {
            state.seats[index].standing = true;
            self.settled.notify_all();
            state = self.opened.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        let target = state.target;
        let seat = &mut state.seats[index];
        seat.standing = false;
        match target {
            Target::End => Pass::Leave,
            _ if std::mem::take(&mut seat.interrupted) => Pass::Return,
            _ => Pass::Run,
        }
    }

    /// Called last by the thread of vCPU `index` when that leaves for good. `true` for the last one of all.
    pub fn leave(&self, index: usize) -> bool {
        self.step_out(index, true).seats.iter().all(|seat| seat.left)
    }

    /// Called last by a thread that gives vCPU `index` back for now.
    pub fn give_back(&self, index: usize) {
        drop(self.step_out(index, false));
    }

    fn step_out(&self, index: usize, left: bool) -> MutexGuard<'_, State> {
        let mut state = lock(&self.state);
        // From here on the thread's id may belong to someone else: never kick it again.
        state.seats[index] = Seat { left, ..Seat::default() };
        // One that was sent until now is not for whoever the thread works for next: an embedder's may have a handler.
        signal::consume_kick();
        self.settled.notify_all();
        state
    }

    /// Has the thread that runs vCPU `index` come back, or the next one that does.
    pub fn interrupt(&self, index: usize) {
        let mut state = lock(&self.state);
        let seat = &mut state.seats[index];
        seat.interrupted = true;
        if seat.thread != 0 {
            let _ = signal::kick(seat.thread);
        }
        self.opened.notify_all();
    }

    /// Says what the vCPUs are to do, and kicks them out of the guest if it is not `Run`. Never blocks.
    /// `false` when the end was declared earlier and this is another target: that stays `End`, and the kick comes again.
    pub fn set(&self, target: Target) -> bool {
        let mut state = lock(&self.state);
        if state.target == Target::End {
            // For those whom the first kick has not reached.
            kick(&state);
            return target == Target::End;
        }
        state.target = target;
        self.attention.store(target != Target::Run, Ordering::Relaxed);
        self.opened.notify_all();
        if target != Target::Run {
            // Who waits for the end hears of it, also where no vCPU runs that could leave.
            self.settled.notify_all();
            kick(&state);
        }
        true
    }

    /// Waits until every vCPU stands, or no thread runs it. `false` at the deadline.
    pub fn wait_settled(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut state = lock(&self.state);
        while !state.seats.iter().all(Seat::is_settled) {
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

    /// Waits until no vCPU will ever run again: every one has left, or the end was declared and no thread
    /// is inside.
    pub fn wait_end(&self) {
        let mut state = lock(&self.state);
        let over = |state: &State| {
            let ended = state.target == Target::End;
            state.seats.iter().all(|seat| seat.left || ended && seat.thread == 0)
        };
        while !over(&state) {
            state = self.settled.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }
}

/// Has whoever is in the guest leave it.
fn kick(state: &State) {
    for seat in state.seats.iter().filter(|seat| seat.thread != 0) {
        // ESRCH cannot be: a thread clears its id, under the state's lock, before it ends.
        let _ = signal::kick(seat.thread);
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
                    assert_eq!(gate.enter(i), Entered::Yes);
                    while gate.pass(i) == Pass::Run {
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
        let gate = Gate::new(2);
        assert!(gate.wait_settled(Duration::ZERO), "nobody runs them");
        assert_eq!(gate.enter(1), Entered::Yes);
        assert!(!gate.wait_settled(Duration::from_millis(10)));
        gate.give_back(1);
        assert!(gate.wait_settled(Duration::ZERO));
    }

    #[test]
    fn an_interrupted_vcpu_comes_back_and_may_enter_again() {
        let gate = Arc::new(Gate::new(1));
        let inside = gate.clone();
        let thread = crate::sys::thread::spawn("gate".to_owned(), move || {
            assert_eq!((inside.enter(0), inside.pass(0)), (Entered::Yes, Pass::Return));
            inside.give_back(0);
        });
        gate.interrupt(0);
        thread.unwrap().join().unwrap();
        // The next one's, since nobody is there.
        gate.interrupt(0);
        assert_eq!((gate.enter(0), gate.enter(0)), (Entered::Yes, Entered::Busy));
        assert_eq!(gate.pass(0), Pass::Return);
        gate.set(Target::Run);
        assert_eq!(gate.pass(0), Pass::Run);
        gate.set(Target::End);
        assert_eq!(gate.pass(0), Pass::Leave);
        assert!(gate.leave(0));
        assert_eq!(gate.enter(0), Entered::Left);
        gate.wait_end();
    }

    #[test]
    fn whoever_has_missed_the_kick_is_kicked_again() {
        let gate = Arc::new(Gate::new(1));
        let inside = gate.clone();
        let thread = crate::sys::thread::spawn("gate".to_owned(), move || {
            assert_eq!(inside.enter(0), Entered::Yes);
            for _ in 0..2 {
                assert!(inside.set(Target::End));
                assert!(signal::consume_kick(), "of each time");
            }
            inside.leave(0);
        });
        thread.unwrap().join().unwrap();
        gate.wait_end();
    }

    #[test]
    fn the_end_of_vcpus_that_nobody_runs_is_at_once() {
        let gate = Gate::new(2);
        gate.set(Target::End);
        gate.wait_end();
        assert_eq!(
            (gate.enter(0), gate.pass(0)),
            (Entered::Yes, Pass::Leave),
            "late, and not into the guest"
        );
    }
}
