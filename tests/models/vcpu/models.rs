//! The gate, the kick and a vCPU's turns in every order: no kick is lost, nobody waits for good, nobody runs who should not.

use std::sync::Arc;
use std::time::Duration;

use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;

use super::gate::{Entered, Gate, Target};
use super::turns::{self, Guest, Pause};
use crate::events::{StopCause, StopLine};
use crate::sys::sync::{check, signal};

crate::models! {
    a_pause_finds_every_vcpu_outside_and_a_stop_ends_them_all,
    an_end_that_comes_amid_a_pause_is_kept,
    a_thread_that_is_wanted_back_comes_and_the_next_one_goes_on,
}

/// Never passes in a model.
const LONG: Duration = Duration::from_secs(3600);

/// A guest that comes out for nothing but a kick, as one that spins does.
struct Busy<'a> {
    gate: &'a Gate,
    inside: &'a AtomicUsize,
}

impl Guest for Busy<'_> {
    fn run(&mut self) -> Pause {
        // As the run loop: it looks at the gate, then enters.
        if !self.gate.wants_attention() {
            self.inside.fetch_add(1, Ordering::SeqCst);
            signal::run_guest();
            self.inside.fetch_sub(1, Ordering::SeqCst);
        }
        Pause::Attention
    }

    fn complete_instruction(&mut self) -> Option<StopCause> {
        None
    }
}

struct Board {
    gate: Gate,
    inside: AtomicUsize,
    left: AtomicUsize,
}

impl Board {
    fn new(vcpus: usize) -> Arc<Self> {
        Arc::new(Self { gate: Gate::new(vcpus), inside: AtomicUsize::new(0), left: AtomicUsize::new(0) })
    }

    fn line(self: &Arc<Self>) -> StopLine {
        let board = self.clone();
        StopLine::new(move |_| {
            board.gate.set(Target::End);
        })
    }

    /// The thread of a vCPU.
    fn serve(self: &Arc<Self>, index: usize) -> thread::JoinHandle<()> {
        let board = self.clone();
        thread::spawn(move || {
            assert_eq!(board.gate.enter(index), Entered::Yes);
            assert!(!board.turns(index, false), "nobody wanted it back");
            if board.gate.leave(index) {
                board.left.fetch_add(1, Ordering::SeqCst);
            }
        })
    }

    fn turns(self: &Arc<Self>, index: usize, foreign: bool) -> bool {
        let take = || Busy { gate: &self.gate, inside: &self.inside };
        turns::run(&self.gate, index, &self.line(), foreign, take)
    }
}

fn a_pause_finds_every_vcpu_outside_and_a_stop_ends_them_all() {
    check(2, || {
        let board = Board::new(2);
        let threads = [board.serve(0), board.serve(1)];
        board.gate.set(Target::Run);
        board.gate.set(Target::Wait);
        assert!(board.gate.wait_settled(LONG));
        assert_eq!(board.inside.load(Ordering::SeqCst), 0, "paused, and in the guest");
        board.gate.set(Target::Run);
        board.gate.set(Target::End);
        board.gate.wait_end();
        assert_eq!(board.inside.load(Ordering::SeqCst), 0, "ended, and in the guest");
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(board.left.load(Ordering::SeqCst), 1, "one of them is the last");
    });
}

fn an_end_that_comes_amid_a_pause_is_kept() {
    check(2, || {
        let board = Board::new(1);
        let vcpu = board.serve(0);
        let line = board.line();
        let end = thread::spawn(move || line.pull(StopCause::HostStop));
        board.gate.set(Target::Run);
        board.gate.set(Target::Wait);
        assert!(board.gate.wait_settled(LONG));
        assert_eq!(board.inside.load(Ordering::SeqCst), 0);
        // A resume that comes too late revokes nothing.
        board.gate.set(Target::Run);
        board.gate.wait_end();
        assert!(!board.gate.set(Target::Run));
        vcpu.join().unwrap();
        end.join().unwrap();
    });
}

fn a_thread_that_is_wanted_back_comes_and_the_next_one_goes_on() {
    check(3, || {
        let board = Board::new(1);
        board.gate.set(Target::Run);
        let other = board.clone();
        let caller = thread::spawn(move || {
            let mut returned = 0;
            loop {
                assert_eq!(other.gate.enter(0), Entered::Yes);
                if !other.turns(0, true) {
                    break;
                }
                other.gate.give_back(0);
                assert!(!signal::consume_kick(), "it would reach the embedder's handler");
                returned += 1;
            }
            other.gate.leave(0);
            assert!(!signal::consume_kick(), "it would reach the embedder's handler");
            returned
        });
        board.gate.interrupt(0);
        board.gate.set(Target::Wait);
        assert!(board.gate.wait_settled(LONG));
        assert_eq!(board.inside.load(Ordering::SeqCst), 0);
        board.gate.set(Target::End);
        board.gate.wait_end();
        assert!(caller.join().unwrap() <= 2, "it came back for nothing");
        assert_eq!(board.gate.enter(0), Entered::Left);
    });
}
