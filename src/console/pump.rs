#![forbid(unsafe_code)]
//! What carries a console's bytes on an event loop.

use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use event_manager::{EventSet, Events};

use super::stream::{Direction, Stream};
use super::{Callback, INPUT, NOW, Output, Shared};
use crate::reactor::{self, Watch};
use crate::sys::lock;
use crate::sys::log;

/// Writes or reads in one turn of the loop: its other workers wait meanwhile.
const ROUNDS: usize = 32;
/// Bytes in one write.
const PIECE: usize = 4096;

/// Hands a console's output on, and fetches its input.
///
/// An fd is in the loop's epoll set only while it is waited for: one that nobody reads, or that was hung
/// up, would otherwise wake the loop for ever.
pub(crate) struct Pump {
    shared: Arc<Shared>,
    timer: RawFd,
    output: Option<Sink>,
    output_watched: bool,
    input: Option<Stream>,
    input_watched: bool,
}

enum Sink {
    Stream(Stream),
    Callback(Callback),
}

impl Pump {
    pub(super) fn new(
        shared: Arc<Shared>,
        timer: RawFd,
        output: Option<Output>,
        input: Option<OwnedFd>,
    ) -> Self {
        let output = output.map(|output| match output {
            Output::Fd(fd) => Sink::Stream(Stream::new(fd, Direction::Write)),
            Output::Callback(callback) => Sink::Callback(callback),
        });
        let input = input.map(|fd| Stream::new(fd, Direction::Read));
        Self { shared, timer, output, output_watched: false, input, input_watched: false }
    }

    fn drain(&mut self, ops: &mut Watch) {
        let mut piece = [0; PIECE];
        for _ in 0..ROUNDS {
            let Some(sink) = &mut self.output else { return };
            let count = lock(&self.shared.state).peek(&mut piece);
            if count == 0 {
                return self.watch_output(false, ops);
            }
            match sink.write(&piece[..count], &self.shared) {
                Ok(0) => return self.end_output("takes nothing", ops),
                Ok(taken) => self.shared.advance(taken),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return self.watch_output(true, ops),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return self.end_output(&error.to_string(), ops),
            }
        }
        lock(&self.shared.state).arm(NOW);
    }

    fn fill(&mut self, ops: &mut Watch) {
        let mut piece = [0; INPUT];
        for _ in 0..ROUNDS {
            let Some(input) = &self.input else { return };
            let room = {
                let mut state = lock(&self.shared.state);
                state.starved = state.room() == 0;
                state.room()
            };
            if room == 0 {
                return self.watch_input(false, ops);
            }
            match input.read(&mut piece[..room]) {
                Ok(0) => return self.end_input("end of file", ops),
                // Read, it must be kept: twice the limit, in case the embedder has filled the room.
                Ok(count) => {
                    let _ = self.shared.queue_input(&piece[..count], 2 * INPUT);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return self.watch_input(true, ops),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return self.end_input(&error.to_string(), ops),
            }
        }
        lock(&self.shared.state).arm(NOW);
    }

    fn watch_output(&mut self, on: bool, ops: &mut Watch) {
        let Some(Sink::Stream(stream)) = &self.output else { return };
        if on == self.output_watched {
            return;
        }
        match watch(stream, EventSet::OUT, on, ops) {
            Ok(()) => {
                self.output_watched = on;
                let mut state = lock(&self.shared.state);
                state.stuck = on;
                // What came since the last look found it stuck, and set no timer.
                if !on && state.written > state.delivered {
                    state.arm(NOW);
                }
            }
            Err(error) => self.end_output(&error.to_string(), ops),
        }
    }

    fn watch_input(&mut self, on: bool, ops: &mut Watch) {
        let Some(stream) = &self.input else { return };
        if on == self.input_watched {
            return;
        }
        match watch(stream, EventSet::IN, on, ops) {
            Ok(()) => self.input_watched = on,
            Err(error) => self.end_input(&error.to_string(), ops),
        }
    }

    fn end_output(&mut self, why: &str, ops: &mut Watch) {
        log::debug!("console: output ends: {why}");
        if let (Some(Sink::Stream(stream)), true) = (&self.output, self.output_watched) {
            let _ = watch(stream, EventSet::OUT, false, ops);
        }
        (self.output, self.output_watched) = (None, false);
        self.shared.end_output();
    }

    fn end_input(&mut self, why: &str, ops: &mut Watch) {
        log::debug!("console: input ends: {why}");
        if let (Some(stream), true) = (&self.input, self.input_watched) {
            let _ = watch(stream, EventSet::IN, false, ops);
        }
        (self.input, self.input_watched) = (None, false);
    }
}

fn watch(stream: &Stream, what: EventSet, on: bool, ops: &mut Watch) -> Result<(), event_manager::Error> {
    let events = Events::new_raw(stream.as_raw_fd(), what);
    if on { ops.add(events) } else { ops.remove(events) }
}

impl reactor::Worker for Pump {
    fn init(&mut self, ops: &mut Watch) {
        if let Err(error) = ops.add(Events::new_raw(self.timer, EventSet::IN)) {
            return self.end_output(&error.to_string(), ops);
        }
        // Everything else follows from looking once.
        lock(&self.shared.state).arm(NOW);
    }

    fn process(&mut self, events: Events, ops: &mut Watch) {
        if events.fd() == self.timer {
            lock(&self.shared.state).disarm();
        }
        self.drain(ops);
        self.fill(ops);
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.shared.close();
    }
}

impl Sink {
    fn write(&mut self, bytes: &[u8], shared: &Shared) -> io::Result<usize> {
        match self {
            Self::Stream(stream) => stream.write(bytes),
            Self::Callback(callback) => {
                let _guard = EndOnPanic(shared);
                callback(bytes);
                Ok(bytes.len())
            }
        }
    }
}

/// Whoever flushes must not wait for a callback that has panicked: it is not called again.
struct EndOnPanic<'a>(&'a Shared);

impl Drop for EndOnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.end_output();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, pipe};
    use std::time::{Duration, Instant};

    use super::super::Console;
    use super::*;
    use crate::events::StopLine;
    use crate::reactor::{Dispatcher, EventLoop};

    /// A pump whose fd is found stuck and free again, with output that comes just before the latter.
    struct Late(Pump, Console);

    impl reactor::Worker for Late {
        fn init(&mut self, ops: &mut Watch) {
            self.0.init(ops);
            lock(&self.0.shared.state).disarm();
            self.0.watch_output(true, ops);
            self.1.write(b"late");
            assert_eq!(lock(&self.0.shared.state).armed, None, "a stuck fd needs no timer");
            self.0.watch_output(false, ops);
        }

        fn process(&mut self, events: Events, ops: &mut Watch) {
            self.0.process(events, ops);
        }
    }

    #[test]
    fn output_that_came_while_the_fd_was_stuck_needs_no_further_write() {
        let console = Console::new();
        let (mut reader, writer) = pipe().unwrap();
        let timer = console.0.open(true).unwrap();
        let pump = Pump::new(console.0.clone(), timer, Some(Output::Fd(writer.into())), None);
        let dispatcher = Dispatcher::new().unwrap();
        let stop = StopLine::new(|cause| panic!("{cause}"));
        let place = EventLoop::turned_by(&dispatcher);
        let _pump = place.attach(Late(pump, console.clone()), "console", &stop).unwrap();
        let end = Instant::now() + Duration::from_secs(20);
        while lock(&console.0.state).delivered < 4 {
            assert!(Instant::now() < end, "waited 20 s for output that came while the fd was stuck");
            dispatcher.dispatch().unwrap();
        }
        let mut bytes = [0; 4];
        reader.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"late");
    }
}
