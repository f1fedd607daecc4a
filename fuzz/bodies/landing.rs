//! Two cards on ports of one switch: what one guest sends is copied straight into buffers that the other has posted. Buffers, frames of every
//! length, pauses, resets, filters and tags in any order; and rude guests, who break their rings and name any address.
//!
//! What polite guests are handed was sent to them, whole and in order, and nothing else of their memory is touched.

use arbitrary::{Result, Unstructured};
use vmbed::{PortOptions, Switch, SwitchOptions};

use crate::bent::Faults;
use numbered::{address, number, plain, segments};
use station::{Manners, Station};

#[path = "numbered.rs"]
mod numbered;
#[path = "station.rs"]
mod station;

const STEPS: usize = 120;
const BROADCAST: [u8; 6] = [0xff; 6];

/// How deep an input went.
#[derive(Clone, Debug, Default)]
pub struct Depth {
    /// Buffers that were given.
    pub given: u32,
    /// Frames that were sent.
    pub sent: u32,
    /// Of them, those that lay in the other's buffers before its card did anything.
    pub landed: u32,
    /// Frames that were taken in a buffer where they had landed, and those that a card has copied.
    pub came: u32,
    pub copied: u32,
    /// Frames that were in several buffers; with a tag; whole, with segments left to cut; cut into segments.
    pub several: u32,
    pub tagged: u32,
    pub whole: u32,
    pub cut: u32,
    /// Frames that landed at a card whose driver does not want them.
    pub unwanted: u32,
    /// Frames that a pause or a reset has handed over.
    pub handed: u32,
    /// Buffers that came back empty: without room for a header, and others that hold no frame.
    pub short: u32,
    pub useless: u32,
    /// How often a card gave up until the reset, and what the two said then.
    pub resets: u32,
    pub faults: [Faults; 2],
}

impl Depth {
    /// What a campaign sums up.
    pub fn counters(&self) -> Vec<(&'static str, u64)> {
        let all = [
            ("given", self.given),
            ("sent", self.sent),
            ("landed", self.landed),
            ("came", self.came),
            ("copied", self.copied),
            ("several", self.several),
            ("tagged", self.tagged),
            ("whole", self.whole),
            ("cut", self.cut),
            ("unwanted", self.unwanted),
            ("handed", self.handed),
            ("short", self.short),
            ("useless", self.useless),
            ("resets", self.resets),
        ];
        let mut all: Vec<_> = all.into_iter().map(|(name, count)| (name, u64::from(count))).collect();
        let [one, two] = self.faults.map(|faults| faults.counters(&[]));
        all.extend(one.into_iter().zip(two).map(|((name, one), (_, two))| (name, one + two)));
        all
    }
}

struct Pair {
    stations: [Station; 2],
    /// Whether each frame has landed, by its number.
    landed: Vec<bool>,
    depth: Depth,
}

/// Runs one input. Panics where a card or the switch misbehaves.
pub fn run(data: &[u8]) -> Depth {
    let mut u = Unstructured::new(data);
    let switch = Switch::new(&SwitchOptions::default()).unwrap();
    // Half of all guests keep to the rules.
    let rude = u.arbitrary::<u8>().unwrap_or(0);
    let stations = [0, 1].map(|index| {
        let port = switch.add_port(["one", "two"][index], &PortOptions::access(1)).unwrap();
        let manners = if rude >> index & 1 == 1 { Manners::Rude } else { Manners::Polite };
        Station::new(index as u8, port, manners)
    });
    let mut pair = Pair { stations, landed: Vec::new(), depth: Depth::default() };
    for _ in 0..STEPS {
        if u.is_empty() || pair.step(&mut u).is_err() {
            break;
        }
    }
    pair.still_lands();
    for station in &pair.stations {
        pair.depth.short += station.short;
        pair.depth.useless += station.useless;
    }
    pair.depth.faults = [0, 1].map(|who| pair.stations[who].faults);
    pair.depth
}

impl Pair {
    fn step(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let who = usize::from(u.arbitrary::<bool>()?);
        let station = &mut self.stations[who];
        match u.int_in_range(0..=31u8)? {
            0..10 => {
                for _ in 0..u.int_in_range(1..=6)? {
                    self.depth.given += u32::from(station.give(u)?);
                }
                station.kick();
            }
            10..20 => {
                let frame = self.frame(u, who)?;
                self.send(who, &frame, u)?;
            }
            20..25 => self.receive(who),
            25 | 26 => {
                station.board.pause();
                self.hand_over(who);
                if u.arbitrary()? {
                    let frame = self.frame(u, 1 - who)?;
                    self.send(1 - who, &frame, u)?;
                }
                self.stations[who].board.resume();
            }
            27 => self.restart(who, u.arbitrary()?),
            28 => station.filter(u.arbitrary()?),
            29 => station.tell(u)?,
            _ if station.is_polite() => {}
            _ => station.breaks(u)?,
        }
        for who in [0, 1] {
            if self.stations[who].has_failed() {
                assert!(!self.stations[who].is_polite(), "nothing was broken");
                self.depth.resets += 1;
                self.restart(who, u.arbitrary()?);
            }
        }
        Ok(())
    }

    fn restart(&mut self, who: usize, choice: u8) {
        self.stations[who].regs.set_status(&self.stations[who].board, 0);
        self.hand_over(who);
        self.stations[who].start(choice);
    }

    /// What lay in its buffers is its driver's, when its card gives the others back.
    fn hand_over(&mut self, who: usize) {
        let before = self.depth.came;
        self.take(who);
        self.depth.handed += self.depth.came - before;
    }

    fn receive(&mut self, who: usize) {
        self.stations[who].board.process_all();
        self.take(who);
    }

    /// A frame from that station, and the header in front of it.
    fn frame(&mut self, u: &mut Unstructured<'_>, from: usize) -> Result<Vec<u8>> {
        let count = self.landed.len() as u32;
        let to = match u.int_in_range(0..=7u8)? {
            0 => BROADCAST,
            1 => address(from as u8),
            2 => address(9),
            _ => address(1 - from as u8),
        };
        let length =
            *u.choose(&[60usize, 60, 200, 1514, 1514, 3000, 9000, 65_000])? + u.int_in_range(0..=40usize)?;
        let mut frame = vec![0; 12];
        let cut = self.stations[from].leaves_segments() && u.ratio(1u8, 3u8)?;
        frame.extend(if cut { segments(count, length) } else { plain(count, length) });
        frame[12..18].copy_from_slice(&to);
        frame[18..24].copy_from_slice(&address(from as u8));
        if cut {
            frame[..10].copy_from_slice(&[1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0]);
        }
        self.landed.push(false);
        Ok(frame)
    }

    fn send(&mut self, from: usize, frame: &[u8], u: &mut Unstructured<'_>) -> Result<()> {
        self.depth.sent += 1;
        self.stations[1 - from].expect(frame);
        let sent = self.stations[from].send(frame, u);
        // That was its card's turn, and it has received, too.
        self.take(from);
        let (to, last) = (&self.stations[1 - from], self.landed.len() as u32 - 1);
        if to.has(last) {
            self.landed[last as usize] = true;
            self.depth.landed += 1;
            self.depth.unwanted += u32::from(to.is_unwanted(frame));
        }
        sent
    }

    /// Looks at what a station's driver is handed.
    fn take(&mut self, who: usize) {
        let trusted = self.stations.iter().all(Station::is_trusted);
        let station = &mut self.stations[who];
        // No more than there are buffers, whatever a rude guest's ring says.
        for mut came in (0..64).map_while(|_| station.take()).collect::<Vec<_>>() {
            self.depth.several += u32::from(came.buffers > 1);
            // A rude guest's frame may end anywhere.
            if came.bytes.len() >= 16 && came.bytes[12..14] == [0x81, 0] {
                came.bytes.drain(12..16);
                self.depth.tagged += 1;
            }
            if came.is_segment() {
                self.depth.cut += 1;
                continue;
            }
            self.depth.whole += u32::from(came.gso != 0);
            if trusted {
                station.was_sent(&came.bytes);
            }
            let landed = number(&came.bytes).and_then(|n| self.landed.get(n as usize));
            *(if landed == Some(&true) { &mut self.depth.came } else { &mut self.depth.copied }) += 1;
        }
    }

    /// Whatever happened: after a reset a frame lands at once, either way, and nothing was touched that nobody had given.
    fn still_lands(&mut self) {
        for who in [0, 1] {
            self.stations[who].port.set_options(&PortOptions::access(1)).unwrap();
            self.restart(who, 4);
            self.stations[who].reform();
        }
        for from in [0, 1] {
            let to = 1 - from;
            self.empty(to);
            let last = self.landed.len();
            let mut frame = [&[0; 12][..], &plain(last as u32, 3000)].concat();
            frame[12..18].copy_from_slice(&address(to as u8));
            frame[18..24].copy_from_slice(&address(from as u8));
            self.landed.push(false);
            self.send(from, &frame, &mut Unstructured::new(&[])).unwrap();
            assert!(self.landed[last], "frame {last} did not land");
            let before = self.depth.came;
            self.receive(to);
            assert_eq!(self.depth.came, before + 1, "frame {last} was not handed over");
        }
        self.stations.iter().for_each(Station::is_untouched);
    }

    /// Takes what waits, until all that could be given lies ready.
    fn empty(&mut self, who: usize) {
        for _ in 0..2000 {
            while self.stations[who].give_whole() {}
            self.stations[who].board.process_all();
            let before = (self.depth.came, self.depth.copied, self.depth.cut);
            self.take(who);
            if before == (self.depth.came, self.depth.copied, self.depth.cut) {
                return;
            }
        }
        panic!("more frames than a port holds");
    }
}
