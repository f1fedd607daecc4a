#![forbid(unsafe_code)]
//! A vCPU's turns: through the gate, into the guest, and out of it when the gate or a signal wants that.

use super::gate::{Gate, Pass};
use crate::events::{StopCause, StopLine};
use crate::sys::sync::signal;

/// Why a vCPU came back from the guest for longer than an exit.
pub(crate) enum Pause {
    /// The gate wants it, or a signal came.
    Attention,
    /// It executed `HLT`, and nothing in this VM could wake it.
    Halted,
    /// The whole VM must end.
    Ended(StopCause),
}

/// A vCPU whose thread has it to itself: KVM's, or a model's.
pub(super) trait Guest {
    /// Runs until it must pause.
    fn run(&mut self) -> Pause;

    /// Finishes the instruction whose exit was answered last; what ends the VM, if that does.
    fn complete_instruction(&mut self) -> Option<StopCause>;
}

/// Runs vCPU `index`, which `take` gives while it is in the guest, until its thread gives it up. `foreign`: on a thread of the embedder's, which
/// signals of its own may call back. Whether it returns for now; else it leaves.
pub(super) fn run<G: Guest>(
    gate: &Gate,
    index: usize,
    stop: &StopLine,
    foreign: bool,
    take: impl Fn() -> G,
) -> bool {
    loop {
        match gate.pass(index) {
            Pass::Run => {}
            Pass::Leave => return false,
            Pass::Return => return true,
        }
        let mut guest = take();
        let mut returns = false;
        let ended = match guest.run() {
            Pause::Halted => return false,
            Pause::Ended(cause) => Some(cause),
            Pause::Attention => {
                // Neither a kick nor the gate: a signal for the embedder.
                returns = !signal::consume_kick() && foreign && !gate.wants_attention();
                guest.complete_instruction()
            }
        };
        if let Some(cause) = ended {
            stop.pull(cause);
            return false;
        }
        if returns {
            return true;
        }
    }
}
