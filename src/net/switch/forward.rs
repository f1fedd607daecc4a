#![forbid(unsafe_code)]
//! What happens to a frame: looked at once, in our own memory; then one copy for each port that it goes to.
//!
//! Its first bytes are copied before anything is decided, and those are what is sent: a guest that changes
//! its memory meanwhile changes nothing that was looked at. What comes behind them is copied from where it
//! lies into each receiver's buffer.

use std::sync::atomic::Ordering;
use std::time::SystemTime;

use super::port::{Entry, Map, Port};
use super::queue::{Note, Queue};
use super::statistics::DropReason::{self, *};
use super::table::Learned;
use super::{Clock, Shared};
use crate::config::MacAddress;
use crate::net::ether::{DOT1Q, Ethernet, TAG, TYPE_AT, Tag, UNTAGGED, is_group, is_link_local, is_station};
use crate::net::offload::{Offloads, Segments, Work, complete};
use crate::net::{HEADER_LEN, MAX_FRAME};
use crate::sys::io::{IoList, IoReader};

/// How much of a frame is looked at. Ethernet with a tag, IPv6 with extension headers, and neighbour discovery
/// with its options fit.
const HEAD: usize = 256;

/// What a station's end keeps from one frame to the next.
pub(super) struct Memory {
    /// Room for a frame's header and its beginning.
    front: [u8; HEADER_LEN + HEAD],
    /// The VLAN and address that were learned last, and until when that is so, in milliseconds.
    learned: (u16, MacAddress, u64),
}

impl Default for Memory {
    fn default() -> Self {
        Self { front: [0; HEADER_LEN + HEAD], learned: (0, MacAddress([0; 6]), 0) }
    }
}

impl Memory {
    /// Ports have changed: what was learned is looked at again.
    pub fn forget(&mut self) {
        self.learned.2 = 0;
    }
}

/// Forwards the frame in `list`, which begins with its vnet header, from `port`.
pub(super) fn forward(shared: &Shared, map: &Map, port: &Port, memory: &mut Memory, list: &IoList<'_>) {
    if let Err(reason) = try_forward(shared, map, port, memory, list) {
        port.counters.drop(reason);
    }
}

fn try_forward(
    shared: &Shared,
    map: &Map,
    port: &Port,
    memory: &mut Memory,
    list: &IoList<'_>,
) -> Result<(), DropReason> {
    let clock = &shared.clock;
    let length = usize::try_from(list.remaining()).unwrap_or(usize::MAX).saturating_sub(HEADER_LEN);
    port.counters.received.add(length);
    let from = map.get(port).ok_or(Removed)?;
    if !port.rate_in.pass(length, clock) {
        return Err(RateIn);
    }
    let frame = Frame::parse(list, length, &mut memory.front)?;
    frame.show(from, frame.ether.tag, true);
    if from.is_monitor {
        return Err(Monitor);
    }
    let vlan = frame.admit(from)?;
    let now = clock.milliseconds();
    let (known_vlan, known, until) = memory.learned;
    if now >= until || (known_vlan, known) != (vlan, frame.ether.source) {
        let until = now + learn(shared, map, from, &frame, vlan, now)?;
        memory.learned = (vlan, frame.ether.source, until);
    }
    if !is_group(frame.ether.destination)
        && let Some(to) = shared.table.find(vlan, frame.ether.destination, now)
        && let Some(to) = map.ports.get(usize::from(to)).and_then(Option::as_ref)
        && reaches(to, vlan)
    {
        return frame.deliver(from, to, vlan, clock);
    }
    if !port.storm.pass(length, clock) {
        return Err(Storm);
    }
    frame.flood(map, from, vlan, clock)
}

/// Remembers where the frame came from; for how many milliseconds nobody needs to look again.
fn learn(
    shared: &Shared,
    map: &Map,
    from: &Entry,
    frame: &Frame<'_>,
    vlan: u16,
    now: u64,
) -> Result<u64, DropReason> {
    let (source, port) = (frame.ether.source, &from.port);
    let share = from.rules.options.max_addresses;
    let may = || map.may_be_at(source, port.number);
    let counters = &port.counters;
    match shared.table.learn((vlan, source), (port.number, share), now, may) {
        Learned::Known => return Ok(shared.table.fresh_for()),
        Learned::Foreign => return Err(ForeignMac),
        Learned::Moved => _ = counters.moved.fetch_add(1, Ordering::Relaxed),
        Learned::Full | Learned::Held => _ = counters.unlearned.fetch_add(1, Ordering::Relaxed),
        Learned::New | Learned::Later => {}
    }
    Ok(0)
}

/// Whether frames of that VLAN can go to a port at all.
fn reaches(to: &Entry, vlan: u16) -> bool {
    !to.is_monitor && to.port.is_plugged() && to.rules.carries(vlan)
}

/// A frame that is being forwarded.
struct Frame<'l> {
    ether: Ethernet,
    /// Its header and its beginning.
    front: &'l [u8; HEADER_LEN + HEAD],
    /// Bytes of its beginning that there are.
    seen: usize,
    length: usize,
    /// What comes behind them.
    rest: IoReader<'l>,
    work: Work,
}

impl<'l> Frame<'l> {
    fn parse(
        list: &'l IoList<'_>,
        length: usize,
        front: &'l mut [u8; HEADER_LEN + HEAD],
    ) -> Result<Self, DropReason> {
        if length > MAX_FRAME {
            return Err(TooLong);
        }
        let mut rest = list.reader();
        let seen = rest.read(&mut front[..HEADER_LEN + length.min(HEAD)]).saturating_sub(HEADER_LEN);
        let (header, head) = front.split_first_chunk::<HEADER_LEN>().ok_or(Runt)?;
        let ether = Ethernet::parse(&head[..seen]).ok_or(Runt)?;
        let work = Work::parse(header, &ether, &head[..seen], length).map_err(|()| BadOffload)?;
        Ok(Self { ether, front, seen, length, rest, work })
    }

    /// What was looked at.
    fn head(&self) -> &[u8] {
        &self.front[HEADER_LEN..HEADER_LEN + self.seen]
    }

    /// Whether it may come in from there, and its VLAN.
    fn admit(&self, from: &Entry) -> Result<u16, DropReason> {
        if is_link_local(self.ether.destination) {
            return Err(LinkLocal);
        }
        if !is_station(self.ether.source) {
            return Err(BadSource);
        }
        let vlan = from.rules.vlan(&self.ether)?;
        let whole = self.seen == self.length;
        from.rules.guard().look(&self.ether, self.head(), whole)?;
        Ok(vlan)
    }

    /// To the one port where its destination is.
    fn deliver(&self, from: &Entry, to: &Entry, vlan: u16, clock: &Clock) -> Result<(), DropReason> {
        if std::ptr::eq(&*from.port, &*to.port) {
            return Err(SamePort);
        }
        if from.rules.options.isolated && to.rules.options.isolated {
            return Err(Isolated);
        }
        self.send(to, vlan, clock);
        Ok(())
    }

    /// To everybody in its VLAN.
    fn flood(&self, map: &Map, from: &Entry, vlan: u16, clock: &Clock) -> Result<(), DropReason> {
        let (known, isolated) = (is_group(self.ether.destination), from.rules.options.isolated);
        let mut reached = false;
        for to in map.entries() {
            let rules = &to.rules.options;
            let wanted = (known || rules.unknown_unicast) && !(isolated && rules.isolated);
            if wanted && reaches(to, vlan) && !std::ptr::eq(&*from.port, &*to.port) {
                self.send(to, vlan, clock);
                reached = true;
            }
        }
        if reached { Ok(()) } else { Err(Nowhere) }
    }

    /// Out of a port, as its station is to see it.
    #[inline]
    fn send(&self, to: &Entry, vlan: u16, clock: &Clock) {
        let (priority, drop_eligible) = self.ether.tag.map_or((0, false), |t| (t.priority, t.drop_eligible));
        let tag = to.rules.tags(vlan).then_some(Tag { priority, drop_eligible, vlan });
        let counters = &to.port.counters;
        // It would be the first tag to whoever gets it, and lead into a VLAN that nobody here has agreed to.
        if tag.is_none() && self.ether.has_further_tag() {
            return counters.drop(HiddenTag);
        }
        if !to.port.rate_out.pass(self.length, clock) {
            return counters.drop(RateOut);
        }
        match self.put(&to.port, tag, |length| counters.sent.add(length)) {
            Ok(()) => self.show(to, tag, false),
            Err(reason) => counters.drop(reason),
        }
    }

    /// To those who watch a port: as it was seen there.
    #[inline]
    fn show(&self, at: &Entry, tag: Option<Tag>, inbound: bool) {
        if at.mirror.is_some() || !at.captures.is_empty() {
            self.show_all(at, tag, inbound);
        }
    }

    #[cold]
    fn show_all(&self, at: &Entry, tag: Option<Tag>, inbound: bool) {
        if let Some(mirror) = &at.mirror {
            let counters = &mirror.counters;
            if let Err(reason) = self.put(mirror, tag, |length| counters.mirrored.add(length)) {
                counters.drop(reason);
            }
        }
        for sink in &at.captures {
            let length = self.length_with(tag);
            let kept = length.min(sink.snap_length);
            let Some(mut buffer) = sink.queue.take(kept) else {
                sink.missed.fetch_add(1, Ordering::Relaxed);
                continue;
            };
            self.write(&mut buffer[..kept], tag);
            let note = Note { time: SystemTime::now(), port: at.port.number, inbound, length };
            sink.queue.put(buffer, kept, Some(note));
        }
    }

    fn length_with(&self, tag: Option<Tag>) -> usize {
        let header = UNTAGGED + if tag.is_some() { TAG } else { 0 };
        self.length - self.ether.len() + header
    }

    /// Puts it into a port's queue, whole or in the pieces that its station can take. `count` hears of each.
    #[inline]
    fn put(&self, port: &Port, tag: Option<Tag>, count: impl Fn(usize)) -> Result<(), DropReason> {
        if self.seen == self.length && tag == self.ether.tag && matches!(self.work, Work::None) {
            // As most small frames are: nothing is left to do, and all of it has been looked at.
            let length = HEADER_LEN + self.length;
            let fill = |buffer: &mut [u8]| {
                let (header, frame) = buffer[..length].split_at_mut(HEADER_LEN);
                header.fill(0);
                frame.copy_from_slice(self.head());
            };
            if let Some(mut landing) = port.queue.land(self.length) {
                landing.write(self.head());
                landing.done([0; HEADER_LEN], self.length);
            } else if !port.queue.put_short(length, fill) {
                return Err(QueueFull);
            }
            count(self.length);
            return Ok(());
        }
        let length = self.length_with(tag);
        let work = self.work.moved(self.ether.len(), length - (self.length - self.ether.len()));
        let takes = port.takes();
        match work {
            Work::Segments(segments) if !takes.contains(work.needs()) => {
                return self.put_segments(&port.queue, tag, &segments, length, count);
            }
            Work::Checksum { start, field } if !takes.contains(Offloads::CSUM) => {
                let mut buffer = port.queue.take(HEADER_LEN + length).ok_or(QueueFull)?;
                buffer[..HEADER_LEN].fill(0);
                let frame = &mut buffer[HEADER_LEN..HEADER_LEN + length];
                self.write(frame, tag);
                complete(frame, start, field);
                port.queue.put(buffer, HEADER_LEN + length, None);
            }
            _ => match port.queue.land(length) {
                Some(mut landing) => {
                    self.beginning(tag, |bytes| landing.write(bytes));
                    landing.write_from(self.rest.clone());
                    landing.done(work.header(), length);
                }
                None => {
                    let mut buffer = port.queue.take(HEADER_LEN + length).ok_or(QueueFull)?;
                    buffer[..HEADER_LEN].copy_from_slice(&work.header());
                    self.write(&mut buffer[HEADER_LEN..HEADER_LEN + length], tag);
                    port.queue.put(buffer, HEADER_LEN + length, None);
                }
            },
        }
        count(length);
        Ok(())
    }

    fn put_segments(
        &self,
        queue: &Queue,
        tag: Option<Tag>,
        segments: &Segments,
        length: usize,
        count: impl Fn(usize),
    ) -> Result<(), DropReason> {
        let headers = segments.headers;
        let mut front = [0; HEAD + TAG];
        let front = &mut front[..headers];
        self.write(front, tag);
        // What each of them carries begins in the head and goes on behind it.
        let carried = length - headers;
        let own_headers = self.length - carried;
        let (mut early, mut rest) = (&self.head()[own_headers..], self.rest.clone());
        let parts = carried.div_ceil(segments.size);
        for index in 0..parts {
            let last = index + 1 == parts;
            let part = if last { carried - index * segments.size } else { segments.size };
            let mut buffer = queue.take(HEADER_LEN + headers + part).ok_or(QueueFull)?;
            buffer[..HEADER_LEN].fill(0);
            let frame = &mut buffer[HEADER_LEN..HEADER_LEN + headers + part];
            frame[..headers].copy_from_slice(front);
            let now = early.len().min(part);
            frame[headers..headers + now].copy_from_slice(&early[..now]);
            early = &early[now..];
            rest.read(&mut frame[headers + now..]);
            segments.finish(frame, index, last);
            queue.put(buffer, HEADER_LEN + headers + part, None);
            count(headers + part);
        }
        Ok(())
    }

    /// Writes it, with that tag or none, as far as there is room.
    #[inline]
    fn write(&self, out: &mut [u8], tag: Option<Tag>) {
        let mut filled = 0;
        self.beginning(tag, |bytes| {
            let now = bytes.len().min(out.len() - filled);
            out[filled..filled + now].copy_from_slice(&bytes[..now]);
            filled += now;
        });
        if filled < out.len() {
            self.rest.clone().read(&mut out[filled..]);
        }
    }

    /// Hands out what was looked at, with that tag or none.
    #[inline]
    fn beginning(&self, tag: Option<Tag>, mut put: impl FnMut(&[u8])) {
        if tag == self.ether.tag {
            // As it came.
            return put(self.head());
        }
        put(&self.head()[..TYPE_AT]);
        if let Some(tag) = tag {
            put(&DOT1Q.to_be_bytes());
            put(&tag.to_bytes());
        }
        // From the type behind the tag on.
        put(&self.head()[self.ether.len() - 2..]);
    }
}
