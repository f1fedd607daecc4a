#![forbid(unsafe_code)]
//! What passes through ports, written to a pcapng file by a thread of its own: forwarding never waits for it.

use std::fmt;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use event_manager::{EventSet, Events};

use super::pcapng;
use super::queue::{Buffer, Queue};
use super::{Owner, SwitchPort, quiet};
use crate::error::{Error, Result};
use crate::net::MAX_FRAME;
use crate::reactor::{self, Attached, EventLoop, Watch};
use crate::sys::log;
use crate::sys::signal::Shield;

/// Packets written in one turn; then the loop looks whether it is to end.
const SHARE: usize = 64;

/// Where forwarding puts what is to be written.
pub(super) struct Sink {
    pub queue: Queue,
    /// Bytes kept of each frame.
    pub snap_length: usize,
    /// Frames for which there was no room.
    pub missed: AtomicU64,
}

/// A capture that is being written. Dropping it ends it as [`finish`](Self::finish) does.
pub struct Capture {
    owner: Arc<Owner>,
    sink: Arc<Sink>,
    writer: Option<Attached<Writer>>,
    event_loop: Arc<EventLoop>,
}

/// What became of a capture.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CaptureSummary {
    /// Frames written.
    pub written: u64,
    /// Frames that came faster than they could be written. The file says so too.
    pub missed: u64,
}

impl Capture {
    pub(super) fn start(
        owner: &Arc<Owner>,
        ports: &[SwitchPort],
        output: Box<dyn Write + Send>,
    ) -> Result<Self> {
        let _shield = Shield::raise();
        let failed = |e| Error::os("starting a capture", e);
        let queue = Queue::new().map_err(failed)?;
        queue.open();
        let sink = Arc::new(Sink { queue, snap_length: MAX_FRAME, missed: AtomicU64::new(0) });
        let mut writer = Writer {
            sink: sink.clone(),
            interfaces: ports.iter().map(|p| p.port.number).collect(),
            output,
            scratch: Vec::new(),
            used: None,
            written: 0,
            failed: None,
        };
        let names: Vec<_> = ports.iter().map(|p| p.port.name.clone()).collect();
        pcapng::begin(&mut *writer.output, &names, MAX_FRAME as u32)
            .map_err(|e| Error::os("writing the beginning of a capture", e))?;
        let event_loop = super::start_loop("vmbed-capture")?;
        let writer = Some(event_loop.attach(writer, "capture", &quiet("capture"))?);
        owner.shared.change(|map| {
            for port in ports {
                if let Some(entry) = map.get_mut(&port.port) {
                    entry.captures.push(sink.clone());
                }
            }
        });
        Ok(Self { owner: owner.clone(), sink, writer, event_loop })
    }

    /// Ends it: what has passed until now is in the file when this returns. Blocks as long as writing does.
    ///
    /// # Errors
    /// What the first failed write said; nothing was written after it.
    pub fn finish(mut self) -> Result<CaptureSummary> {
        self.end()
    }

    fn end(&mut self) -> Result<CaptureSummary> {
        let Some(writer) = self.writer.take() else { return Ok(CaptureSummary::default()) };
        // Longer than the writer, whose buffer is written when it is dropped.
        let _shield = Shield::raise();
        self.owner.shared.change(|map| {
            for entry in map.ports.iter_mut().flatten() {
                entry.captures.retain(|sink| !Arc::ptr_eq(sink, &self.sink));
            }
        });
        let mut writer = writer.detach()?;
        self.event_loop.stop();
        while writer.write_some() {}
        self.sink.queue.close();
        let missed = self.sink.missed.load(Ordering::Relaxed);
        let ended = match writer.failed.take() {
            Some(error) => Err(error),
            None => writer.end(missed),
        };
        ended.map_err(|e| Error::os("writing a capture", e))?;
        Ok(CaptureSummary { written: writer.written, missed })
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            log::warn!("{error}");
        }
    }
}

impl fmt::Debug for Capture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Capture").finish_non_exhaustive()
    }
}

/// Writes the file.
struct Writer {
    sink: Arc<Sink>,
    /// Numbers of the ports, in the order in which the file names them.
    interfaces: Vec<u16>,
    output: Box<dyn Write + Send>,
    scratch: Vec<u8>,
    used: Option<Buffer>,
    written: u64,
    failed: Option<io::Error>,
}

impl Writer {
    /// Writes what waits, as far as one turn goes; whether there may be more.
    fn write_some(&mut self) -> bool {
        for _ in 0..SHARE {
            let Some(item) = self.sink.queue.pop(self.used.take()) else { return false };
            self.write(&item);
            self.used = Some(item.into_buffer());
        }
        true
    }

    fn write(&mut self, item: &super::queue::Item) {
        let Some(note) = item.note.filter(|_| self.failed.is_none()) else {
            self.sink.missed.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let interface = self.interfaces.iter().position(|port| *port == note.port).unwrap_or(0);
        let packet = pcapng::Packet {
            interface: interface as u32,
            time: note.time,
            inbound: note.inbound,
            length: note.length as u32,
            bytes: item.bytes(),
        };
        match pcapng::packet(&mut *self.output, &mut self.scratch, &packet) {
            Ok(()) => self.written += 1,
            Err(error) => self.failed = Some(error),
        }
    }

    fn end(&mut self, missed: u64) -> io::Result<()> {
        // Which port they were of is not known: the first stands for all.
        if missed > 0 && !self.interfaces.is_empty() {
            pcapng::missed(&mut *self.output, 0, missed)?;
        }
        self.output.flush()
    }
}

impl reactor::Worker for Writer {
    fn init(&mut self, watch: &mut Watch) {
        let bell = self.sink.queue.bell().as_fd().as_raw_fd();
        if let Err(error) = watch.add(Events::new_raw(bell, EventSet::IN)) {
            self.failed = Some(io::Error::other(error.to_string()));
        }
    }

    fn process(&mut self, _: Events, _: &mut Watch) {
        self.write_some();
    }
}
