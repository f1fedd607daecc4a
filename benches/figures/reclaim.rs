//! How fast what a guest gives back is given to the host, against a bare loop of holes punched in a memfd (`floor punch`): in
//! turn, the same memory, filled page for page each time. `figure-reclaim FLOOR TURNS` prints, for what is reported free (2 MiB
//! a range) and for what a balloon takes (256 page numbers a request), the median of the ratios, and claimed and measured bytes.
//! Only the device is timed, not the driver that stands in for a guest's.

use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::time::Instant;

use vmbed::internals::driver::{Registers, Rings, VERSION_1, WRITE};
use vmbed::internals::{Board, Part};

/// As much as the floor has.
const SIZE: u64 = 512 << 20;
const HUGE: u64 = 2 << 20;
/// Guest memory: what is given back begins here.
const FIRST: u64 = 4 << 20;
const LISTS: u64 = 2 << 20;
const RINGS: u64 = 1 << 20;
/// Every feature of a balloon's own.
const ALL: u64 = 0x3f;
const INFLATE: usize = 0;
const REPORTING: usize = 4;

struct Rig {
    board: Board,
    regs: Registers,
    rings: Vec<Rings>,
}

impl Rig {
    fn new() -> Result<Self, Box<dyn Error>> {
        let board = Board::new(FIRST + SIZE, vec![Part::Balloon])?;
        let regs = Registers::find(&board, 1).ok_or("no balloon")?;
        let rings: Vec<_> = (0..5).map(|i| Rings::new(&board, RINGS + 0x8000 * i, 128)).collect();
        if !regs.start(&board, VERSION_1 | ALL, &rings.iter().collect::<Vec<_>>()) {
            return Err("the balloon did not start".into());
        }
        Ok(Self { board, regs, rings })
    }

    fn fill(&self) -> Result<(), Box<dyn Error>> {
        let piece = vec![1; HUGE as usize];
        (FIRST..FIRST + SIZE)
            .step_by(HUGE as usize)
            .try_for_each(|at| self.board.write_memory(at, &piece))?;
        Ok(())
    }

    /// Has the device serve what the queue holds; for how long, in nanoseconds.
    fn serve(&mut self, queue: usize) -> u128 {
        self.regs.ring(&self.board, queue as u16);
        let begin = Instant::now();
        self.board.process();
        let time = begin.elapsed().as_nanos();
        while self.rings[queue].take_used(&self.board).is_some() {}
        time
    }

    fn report(&mut self) -> Result<u128, Box<dyn Error>> {
        self.fill()?;
        let ranges: Vec<_> = (FIRST..FIRST + SIZE).step_by(HUGE as usize).collect();
        let mut time = 0;
        for some in ranges.chunks(32) {
            let buffers: Vec<_> = some.iter().map(|at| (*at, HUGE as u32, WRITE)).collect();
            self.rings[REPORTING].send(&self.board, &buffers);
            time += self.serve(REPORTING);
        }
        Ok(time)
    }

    fn inflate(&mut self) -> Result<u128, Box<dyn Error>> {
        self.fill()?;
        let pages: Vec<u32> = ((FIRST >> 12)..(FIRST + SIZE) >> 12).map(|page| page as u32).collect();
        let mut time = 0;
        for requests in pages.chunks(256 * 100) {
            for (list, some) in requests.chunks(256).enumerate() {
                let bytes: Vec<u8> = some.iter().flat_map(|page| page.to_le_bytes()).collect();
                let at = LISTS + 0x400 * list as u64;
                self.board.write_memory(at, &bytes)?;
                self.rings[INFLATE].send(&self.board, &[(at, bytes.len() as u32, 0)]);
            }
            time += self.serve(INFLATE);
        }
        Ok(time)
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() -> Result<(), Box<dyn Error>> {
    const USAGE: &str = "usage: figure-reclaim FLOOR TURNS";
    let mut arguments = std::env::args().skip(1);
    let floor = arguments.next().ok_or(USAGE)?;
    let turns: usize = arguments.next().ok_or(USAGE)?.parse()?;
    let mut child = Command::new(floor).arg("punch").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut ask = child.stdin.take().ok_or("piped")?;
    let mut answers = BufReader::new(child.stdout.take().ok_or("piped")?).lines();
    let mut theirs = || -> Result<f64, Box<dyn Error>> {
        ask.write_all(b"\n")?;
        Ok(answers.next().ok_or("the floor ended")??.parse()?)
    };
    let mut rig = Rig::new()?;
    let (mut reported, mut inflated) = (Vec::new(), Vec::new());
    for turn in 0..=turns {
        let bare = theirs()?;
        let (one, other) = (rig.report()? as f64, rig.inflate()? as f64);
        // The first turn finds everything cold.
        if turn > 0 {
            reported.push(bare / one);
            inflated.push(bare / other);
        }
    }
    drop(ask);
    child.wait()?;
    let moved = rig.board.balloon().ok_or("no balloon")?;
    for (name, ratios, given) in
        [("reported", reported, moved.reported), ("inflated", inflated, moved.inflated)]
    {
        let whole = 100.0 * given.measured.get() as f64 / given.claimed.get() as f64;
        println!("{name} speed-percent {:.0} measured-percent {whole:.2}", median(ratios) * 100.0);
    }
    Ok(())
}
