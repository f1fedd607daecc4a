#![forbid(unsafe_code)]
//! A cable between a port and another network: carries frames both ways, on a loop of the switch's.

use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use event_manager::{EventSet, Events};
use vmm_sys_util::timerfd::TimerFd;

use super::backend::Plug;
use crate::error::{Error, Result};
use crate::net::{HEADER_LEN, MAX_FRAME, NetBackend};
use crate::reactor::{self, Watch};
use crate::sys::io::Pieces;
use crate::sys::log;

/// Frames each way in one turn: the loop's other workers wait meanwhile.
const SHARE: usize = 128;

/// How often a network that is gone is looked for.
const RETRY: Duration = Duration::from_secs(1);

pub(super) struct Uplink {
    near: Plug,
    far: Box<dyn NetBackend>,
    pieces: Pieces,
    incoming: Box<[u8]>,
    outgoing: Box<[u8]>,
    /// The length of the frame in `outgoing` that waits until the network has room; 0 for none.
    held: usize,
    /// When to look for the network again.
    gone: Option<Instant>,
    timer: TimerFd,
    /// What each end is registered for.
    watched: [Option<(RawFd, EventSet)>; 2],
}

impl Uplink {
    pub fn new(near: Plug, mut far: Box<dyn NetBackend>) -> Result<Self> {
        // Nothing that it leaves to do need be done before a port is known that does not do it itself.
        far.set_offloads(near.offloads() & far.offloads());
        let timer = TimerFd::new().map_err(|e| Error::errno_of("creating a timer (timerfd)", e))?;
        // A byte more: a frame that is too long is seen to be.
        let room = || vec![0; HEADER_LEN + MAX_FRAME + 1].into();
        Ok(Self {
            near,
            far,
            pieces: Pieces::with_capacity(1),
            incoming: room(),
            outgoing: room(),
            held: 0,
            gone: None,
            timer,
            watched: [None, None],
        })
    }

    /// From the network into the switch.
    fn carry_in(&mut self) {
        for _ in 0..SHARE {
            let mut list = self.pieces.list();
            list.push_room(&mut self.incoming);
            let len = match self.far.receive(&list) {
                Ok(len) => len.min(self.incoming.len()),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => return self.lose(&error),
            };
            let mut list = self.pieces.list();
            list.push_bytes(&self.incoming[..len]);
            // A port takes everything, and drops what has no room.
            let _ = self.near.send(&list);
        }
    }

    /// From the switch into the network.
    fn carry_out(&mut self) {
        for _ in 0..SHARE {
            if self.held == 0 {
                let mut list = self.pieces.list();
                list.push_room(&mut self.outgoing);
                let Ok(len) = self.near.receive(&list) else { return };
                self.held = len;
            }
            if self.gone.is_some() {
                self.held = 0;
                self.near.lost();
                continue;
            }
            let mut list = self.pieces.list();
            list.push_bytes(&self.outgoing[..self.held]);
            match self.far.send(&list) {
                Ok(()) => self.held = 0,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.held = 0;
                    self.near.lost();
                    if self.far.is_gone() {
                        self.lose(&error);
                    }
                }
            }
        }
    }

    fn lose(&mut self, error: &std::io::Error) {
        log::warn!("a switch's uplink is gone: {error}");
        self.look_later();
    }

    fn look_later(&mut self) {
        self.gone = Some(Instant::now() + RETRY);
        // Fails for invalid times only. A little later than the instant, so that it has passed.
        let _ = self.timer.reset(RETRY + Duration::from_millis(1), None);
    }

    fn look(&mut self) {
        match self.gone {
            Some(when) if Instant::now() >= when => match self.far.reopen() {
                Ok(()) => self.gone = None,
                Err(error) => {
                    log::debug!("{error}");
                    self.look_later();
                }
            },
            _ => {}
        }
    }

    /// Brings the registrations in line with what can be done: what is waited for, and nothing else.
    fn watch(&mut self, watch: &mut Watch) {
        let waits = self.held > 0;
        let near = (self.near.fd().as_raw_fd(), EventSet::IN);
        let out = if waits { EventSet::OUT } else { EventSet::empty() };
        let far = (self.far.fd().as_raw_fd(), EventSet::IN | out);
        let wanted = [(!waits).then_some(near), self.gone.is_none().then_some(far)];
        for (watched, wanted) in self.watched.iter_mut().zip(wanted) {
            if *watched == wanted {
                continue;
            }
            if let Some((fd, set)) = watched.take() {
                // It may have been closed, and so be gone from the set already.
                let _ = watch.remove(Events::new_raw(fd, set));
            }
            if let Some((fd, set)) = wanted {
                match watch.add(Events::new_raw(fd, set)) {
                    Ok(()) => *watched = wanted,
                    Err(error) => log::warn!("a switch's uplink cannot be watched: {error}"),
                }
            }
        }
    }
}

impl reactor::Worker for Uplink {
    fn init(&mut self, watch: &mut Watch) {
        if let Err(error) = watch.add(Events::new_raw(self.timer.as_raw_fd(), EventSet::IN)) {
            log::warn!("a switch's uplink cannot be watched: {error}");
        }
        self.watch(watch);
    }

    fn process(&mut self, events: Events, watch: &mut Watch) {
        let fd = events.fd();
        if fd == self.timer.as_raw_fd() {
            if self.gone.is_none_or(|when| Instant::now() >= when) {
                let _ = self.timer.wait();
            }
            self.look();
        } else if fd == self.far.fd().as_raw_fd()
            && events.event_set().intersects(EventSet::ERROR | EventSet::HANG_UP)
            && self.gone.is_none()
        {
            self.lose(&std::io::Error::from_raw_os_error(libc::ENETDOWN));
        }
        if self.gone.is_none() {
            self.carry_in();
        }
        self.carry_out();
        self.watch(watch);
    }
}
