//! A guest with a disk, a card and a balloon, which is told of each step what came of it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::atomic::Ordering;

use vmbed::{BalloonConfig, Bytes, DiskConfig, DiskEngine, DiskFormat, Host, NetConfig, StopCause, Vm};

use crate::guests::{self, Op, outcome, script};
use crate::life::{FAR, LONG, Life, Stage, deaf, exercise, lock};
use crate::supervisor::ARMED;
use crate::wire;

pub const SIZE: u64 = 512 << 10;

/// What the guest does: with its disk, its card, its balloon.
const STEPS: [(Op, u32, u32, u32); 9] = [
    (Op::Write, 3, 2, 7),
    (Op::Flush, 0, 0, 0),
    (Op::Read, 3, 2, 0),
    (Op::Zero, 8, 1, 0),
    (Op::Discard, 16, 8, 0),
    (Op::Send, 0, FRAME as u32, SENT as u32),
    (Op::Account, 0, 4, 2),
    (Op::Inflate, 768, 2, 9),
    (Op::Receive, 0, 0, 0),
];

/// A frame's length, and what its bytes are: of the guest's, and of the one for it.
pub const FRAME: usize = 60;
pub const SENT: u8 = 5;
const RECEIVED: u8 = 6;

/// The one for the guest, and for everybody.
pub fn arrival() -> [u8; FRAME] {
    let mut frame = [RECEIVED; FRAME];
    frame[..6].fill(0xff);
    frame
}

/// Makes the disk.
pub fn prepare(stage: &Stage) {
    let format = if stage.life == Life::Qcow2 { DiskFormat::Qcow2 } else { DiskFormat::Raw };
    vmbed::create_disk(stage.disk(), format, Bytes(SIZE), None).unwrap();
}

fn disk(stage: &Stage) -> DiskConfig {
    let mut disk = DiskConfig::new(stage.disk());
    if stage.life == Life::Qcow2 {
        disk = DiskConfig::qcow2(stage.disk());
    }
    disk.engine = if stage.life == Life::Calls { DiskEngine::Sync } else { DiskEngine::Auto };
    disk
}

/// The other end of the card's wire.
pub enum Far {
    Messages(UnixDatagram),
    Stream(UnixStream),
    /// Straight out of an interface.
    Packets(File),
    /// Sends none, and reads what is there when the other end, which is the second, has had no room for a while: for so many turns.
    Slow(UnixDatagram, UnixDatagram, u32),
}

impl Far {
    /// The card's end, and this.
    pub fn pair(life: Life) -> std::io::Result<(OwnedFd, Self)> {
        if life == Life::Calls {
            let (near, far) = UnixStream::pair()?;
            far.set_nonblocking(true)?;
            return Ok((near.into(), Self::Stream(far)));
        }
        let (near, far) = UnixDatagram::pair()?;
        far.set_nonblocking(true)?;
        Ok((near.into(), Self::Messages(far)))
    }

    /// Sends one to the card, with what is in front of it.
    pub fn send(&mut self) -> std::io::Result<()> {
        match self {
            Self::Messages(far) => far.send(&[&[0; 12][..], &arrival()].concat()).map(drop),
            Self::Packets(far) => far.write_all(&arrival()),
            Self::Slow(far, near, turns) => {
                *turns += u32::from(wire::is_full(near));
                // All of it: nobody is told of room before most of it is there again.
                while *turns > 100 {
                    far.recv(&mut [0; 100]).inspect_err(|_| *turns = 50)?;
                }
                Ok(())
            }
            Self::Stream(far) => far.write_all(&[&[0, 0, 0, FRAME as u8][..], &arrival()].concat()),
        }
    }

    /// The one frame that came, without what is in front of it; nothing where none came whole.
    fn frame(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        match self {
            Self::Messages(far) => {
                bytes.resize(2000, 0);
                let length = far.recv(&mut bytes).unwrap_or(0);
                bytes.truncate(length);
            }
            Self::Stream(far) => {
                let _ = far.read_to_end(&mut bytes);
            }
            Self::Packets(_) | Self::Slow(..) => {}
        }
        let ahead = if matches!(self, Self::Stream(_)) { 4 } else { 12 };
        bytes.drain(..bytes.len().min(ahead));
        bytes
    }
}

pub fn live(stage: &Stage, works: bool) -> vmbed::Result<()> {
    // A message comes whole or not at all: there is nothing to see of its receipt.
    let steps = match (works, stage.life) {
        (false, _) => &[],
        (true, Life::Calls) => &STEPS[..],
        (true, _) => &STEPS[..STEPS.len() - 1],
    };
    let pair = Far::pair(stage.life);
    let (near, far) = pair.map_err(|e| vmbed::Error::os("the test's own sockets", e))?;
    let host = Host::open()?;
    let mut config = stage.pc();
    config.disks = vec![disk(stage)];
    config.nets = vec![NetConfig::attached()];
    config.balloon = Some(BalloonConfig::default());
    let builder = host.builder(config).net_fd(0, near)?.pio_device("said", guests::SAY, 1, deaf());
    let vm = builder.build()?;
    vm.write_memory(guests::SCRIPT, &script(steps))?;
    vm.start()?;
    *lock(&FAR) = Some(far);
    let _ = vm.disk_statistics(0)?;
    let ended = exercise(&vm);
    let results = results(&vm, &ended, steps);
    let stopped = vm.stop();
    drop(vm);
    drop(host);
    let far = lock(&FAR).take();
    if let (Some(results), Some(mut far)) = (results, far) {
        let armed = ARMED.swap(false, Ordering::SeqCst);
        check(stage, &mut far, &results);
        ARMED.store(armed, Ordering::SeqCst);
    }
    ended?;
    stopped.map(drop)
}

/// What the guest was told of its steps, if it has come to its own end.
fn results(
    vm: &Vm,
    ended: &vmbed::Result<Option<StopCause>>,
    steps: &[(Op, u32, u32, u32)],
) -> Option<Vec<u8>> {
    let mut results = vec![0; 16 * steps.len()];
    let itself = matches!(ended, Ok(Some(StopCause::GuestReset))) && !steps.is_empty();
    (itself && vm.read_memory(guests::RESULTS, &mut results).is_ok()).then_some(results)
}

/// What the guest was told is on the disk, is; what it sent has come whole, or not at all.
fn check(stage: &Stage, far: &mut Far, results: &[u8]) {
    let good = |step: usize| outcome(results, step).0 == 0;
    if good(0) && good(1) && there(stage) != Some(512 * (7 + 8)) {
        println!("LOST: the guest was told that it is there: {:?}", there(stage));
    }
    if good(0) && good(2) && outcome(results, 2).2 != 512 * (7 + 8) {
        println!("LOST: the guest read something else: {:?}", outcome(results, 2));
    }
    let frame = far.frame();
    if !frame.is_empty() && frame != [SENT; FRAME] {
        println!("LOST: the frame came as {frame:?}");
    }
    let Some(received) = (results.len() == 16 * STEPS.len()).then(|| outcome(results, STEPS.len() - 1))
    else {
        return;
    };
    if received.1 as usize != 12 + FRAME || received.2 != arrival().into_iter().map(u64::from).sum::<u64>() {
        println!("LOST: the guest received something else: {received:?}");
    }
}

/// The sum of what lies there, as another guest reads it.
fn there(stage: &Stage) -> Option<u64> {
    if stage.life != Life::Qcow2 {
        let mut bytes = [0; 1024];
        File::open(stage.disk()).unwrap().read_exact_at(&mut bytes, 3 * 512).unwrap();
        let good = bytes[..512] == [7; 512] && bytes[512..] == [8; 512];
        return good.then(|| bytes.iter().copied().map(u64::from).sum());
    }
    let host = Host::open().unwrap();
    let mut config = stage.pc();
    config.disks = vec![disk(stage)];
    let vm = host.builder(config).pio_device("said", guests::SAY, 1, deaf()).build().unwrap();
    vm.write_memory(guests::SCRIPT, &script(&[(Op::Read, 3, 2, 0)])).unwrap();
    vm.start().unwrap();
    vm.wait_timeout(LONG).unwrap()?;
    let mut results = [0; 16];
    vm.read_memory(guests::RESULTS, &mut results).unwrap();
    (outcome(&results, 0).0 == 0).then_some(outcome(&results, 0).2)
}
