#![forbid(unsafe_code)]
//! The guest's console, between a device (16550 or virtio-console) and the embedder.
//!
//! The device writes output and reads input here and never waits: both are memory. A [`Pump`] on an
//! event loop carries the output on to an fd or a callback, and fetches input from an fd.
//! The last 64 KiB of output are kept for [`Console::tail`], and the same bytes are the pump's buffer:
//! output that falls out of them before it could be handed on is lost to the fd, and counted.

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::timerfd::TimerFd;

use crate::error::{Error, ErrorKind, Result};
use crate::events::StopLine;
use crate::reactor::{Attached, EventLoop};
use crate::sys::lock;

pub(crate) use pump::Pump;

mod pump;
mod stream;

/// How much output is kept.
const KEPT: usize = 64 << 10;
/// How much input waits for the guest before its source has to.
const INPUT: usize = 4 << 10;
/// How long output is gathered before the loop is woken for it: a guest writes single bytes.
const GATHER: Duration = Duration::from_millis(1);
/// Output that waits for nothing more.
const PLENTY: u64 = KEPT as u64 / 4;
/// A timer of zero would be off.
const NOW: Duration = Duration::from_nanos(1);

/// Called when input has arrived, on the thread that brought it. It may read from the console.
pub(crate) type Wake = Arc<dyn Fn() + Send + Sync>;

/// What takes output in the embedder's own code.
pub(crate) type Callback = Box<dyn FnMut(&[u8]) + Send>;

/// Where output goes besides the tail.
pub(crate) enum Output {
    /// A file, pipe, terminal or socket. Its flags stay as they are. Output ends, without an event, when
    /// nobody reads there any more or the write fails.
    Fd(OwnedFd),
    /// Called on the event loop's thread. It must not wait for the console or the VM; a panic in it
    /// ends the VM.
    Callback(Callback),
}

/// One guest's console. Clones are the same console.
#[derive(Clone, Default)]
pub(crate) struct Console(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Output was handed on, or nobody is left to do it.
    progress: Condvar,
}

#[derive(Default)]
struct State {
    /// The last output; its end is output number `written`.
    kept: VecDeque<u8>,
    written: u64,
    /// How far the output was handed on.
    delivered: u64,
    /// How much of it fell out of `kept` first.
    lost: u64,
    /// Somebody hands it on.
    output: bool,
    /// The output's fd takes nothing now; the pump hears from it when it does.
    stuck: bool,
    input: VecDeque<u8>,
    /// The pump has stopped reading until the guest has.
    starved: bool,
    wake: Option<Wake>,
    /// Calls the pump; there while one is attached.
    timer: Option<TimerFd>,
    armed: Option<Duration>,
}

/// What a device calls.
impl Console {
    /// Takes the guest's output. Never blocks.
    pub fn write(&self, bytes: &[u8]) {
        let mut state = lock(&self.0.state);
        state.keep(bytes);
        if state.output && !state.stuck {
            let plenty = state.written - state.delivered > PLENTY;
            state.arm(if plenty { NOW } else { GATHER });
        }
    }

    /// Moves waiting input to `buffer`; how much it was. Never blocks.
    pub fn read(&self, buffer: &mut [u8]) -> usize {
        let mut state = lock(&self.0.state);
        let count = buffer.len().min(state.input.len());
        for (to, from) in buffer.iter_mut().zip(state.input.drain(..count)) {
            *to = from;
        }
        if state.starved && state.room() >= INPUT / 2 {
            state.starved = false;
            state.arm(NOW);
        }
        count
    }

    pub fn has_input(&self) -> bool {
        !lock(&self.0.state).input.is_empty()
    }

    /// Names who is called when input arrives; at once if some waits already.
    pub fn on_input(&self, wake: Option<Wake>) {
        let mut state = lock(&self.0.state);
        state.wake = wake;
        let now = state.wake.clone().filter(|_| !state.input.is_empty());
        drop(state);
        if let Some(wake) = now {
            wake();
        }
    }
}

/// What the embedder's side calls.
impl Console {
    pub fn new() -> Self {
        Self::default()
    }

    /// The last 64 KiB of output.
    pub fn tail(&self) -> Vec<u8> {
        lock(&self.0.state).kept.iter().copied().collect()
    }

    /// How many bytes the guest has ever written.
    #[cfg(test)]
    pub fn written(&self) -> u64 {
        lock(&self.0.state).written
    }

    /// How many bytes never reached the output because it was too slow.
    #[cfg(test)]
    pub fn lost(&self) -> u64 {
        let state = lock(&self.0.state);
        state.lost + if state.output { state.floor().saturating_sub(state.delivered) } else { 0 }
    }

    /// Gives the guest input; how much was taken. The rest may be offered again when the guest has read.
    pub fn push_input(&self, bytes: &[u8]) -> usize {
        self.0.queue_input(bytes, INPUT)
    }

    /// Carries output to `output` and fetches input from `input`, on `event_loop`, until what is returned
    /// is detached. Output from before goes first, as far as it is kept.
    pub fn attach(
        &self,
        output: Option<Output>,
        input: Option<OwnedFd>,
        event_loop: &Arc<EventLoop>,
        stop: &StopLine,
    ) -> Result<Attached<Pump>> {
        let timer = self.0.open(output.is_some())?;
        // From here on, dropping the pump closes the console again.
        event_loop.attach(Pump::new(self.0.clone(), timer, output, input), "console", stop)
    }

    /// Waits until all output was handed on, or nobody is left to do it, but not past `deadline`; whether
    /// it was in time. Not for the event loop's own thread.
    pub fn flush(&self, deadline: Instant) -> bool {
        let mut state = lock(&self.0.state);
        while state.output && state.delivered < state.written {
            if !state.stuck {
                state.arm(NOW);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let woken = self.0.progress.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

impl Shared {
    fn open(&self, output: bool) -> Result<RawFd> {
        let timer =
            TimerFd::new().map_err(|e| Error::errno_of("creating the console's timer (timerfd)", e))?;
        let fd = timer.as_raw_fd();
        let mut state = lock(&self.state);
        if state.timer.is_some() {
            return Err(Error::new(ErrorKind::InvalidState, "the console is attached already"));
        }
        state.timer = Some(timer);
        state.output = output;
        Ok(fd)
    }

    fn close(&self) {
        let mut state = lock(&self.state);
        (state.timer, state.armed) = (None, None);
        (state.output, state.stuck, state.starved) = (false, false, false);
        self.progress.notify_all();
    }

    /// Nobody hands output on any more.
    fn end_output(&self) {
        lock(&self.state).output = false;
        self.progress.notify_all();
    }

    fn advance(&self, count: usize) {
        let mut state = lock(&self.state);
        state.delivered += count as u64;
        if state.delivered >= state.written {
            self.progress.notify_all();
        }
    }

    /// Queues what fits below `limit`; how much.
    fn queue_input(&self, bytes: &[u8], limit: usize) -> usize {
        let mut state = lock(&self.state);
        let count = bytes.len().min(limit.saturating_sub(state.input.len()));
        state.input.extend(&bytes[..count]);
        let wake = state.wake.clone().filter(|_| count > 0);
        drop(state);
        if let Some(wake) = wake {
            wake();
        }
        count
    }
}

impl State {
    fn keep(&mut self, bytes: &[u8]) {
        self.written += bytes.len() as u64;
        let last = &bytes[bytes.len().saturating_sub(KEPT)..];
        let over = (self.kept.len() + last.len()).saturating_sub(KEPT);
        self.kept.drain(..over);
        self.kept.extend(last);
    }

    /// The number of the oldest byte that is kept.
    fn floor(&self) -> u64 {
        self.written - self.kept.len() as u64
    }

    /// Copies the oldest output that was not handed on; how much.
    fn peek(&mut self, buffer: &mut [u8]) -> usize {
        let floor = self.floor();
        self.lost += floor.saturating_sub(self.delivered);
        self.delivered = self.delivered.max(floor);
        let from = (self.delivered - floor) as usize;
        let count = buffer.len().min(self.kept.len().saturating_sub(from));
        for (to, byte) in buffer.iter_mut().zip(self.kept.range(from..from + count)) {
            *to = *byte;
        }
        count
    }

    fn room(&self) -> usize {
        INPUT.saturating_sub(self.input.len())
    }

    /// Calls the pump after `delay`, or sooner if that was said already.
    fn arm(&mut self, delay: Duration) {
        if let Some(timer) = &mut self.timer
            && self.armed.is_none_or(|armed| delay < armed)
        {
            // Fails for invalid times only.
            let _ = timer.reset(delay, None);
            self.armed = Some(delay);
        }
    }

    /// The pump was called.
    fn disarm(&mut self) {
        self.armed = None;
        if let Some(timer) = &mut self.timer {
            let _ = timer.clear();
        }
    }
}

#[cfg(test)]
mod tests;
