//! A bare VM from nothing to its first exit, against C that does the same ioctls (`floor first-exit`): in
//! turn, one of each a pair, both in processes that are warm. `figure-first-exit FLOOR PAIRS` prints the
//! median of the pairs' ratios in percent, and the medians in nanoseconds.

use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use vmbed::{Access, BareBoot, CpuMode, Device, Host, VmConfig};

/// When the guest first wrote to it.
#[derive(Default)]
struct Port(OnceLock<Instant>);

impl Device for Port {
    fn read(&self, _: Access, _: &mut [u8]) -> vmbed::Result<()> {
        Ok(())
    }

    fn write(&self, _: Access, _: &[u8]) -> vmbed::Result<()> {
        self.0.get_or_init(Instant::now);
        Ok(())
    }
}

fn ours(host: &Host) -> Result<u128, Box<dyn Error>> {
    let begin = Instant::now();
    let port = Arc::new(Port::default());
    // out 0x10, al; hlt
    let config = VmConfig::bare(BareBoot::new(CpuMode::Real, 0x1000, [0xe6, 0x10, 0xf4]));
    let vm = host.builder(config).pio_device("port", 0x10, 1, port.clone()).build()?;
    vm.start()?;
    vm.wait()?;
    drop(vm);
    Ok((*port.0.get().ok_or("the guest has not written")? - begin).as_nanos())
}

fn median<T: Copy + PartialOrd>(mut values: Vec<T>) -> T {
    values.sort_by(|a, b| a.partial_cmp(b).expect("no NaN"));
    values[values.len() / 2]
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let floor = arguments.next().ok_or("usage: figure-first-exit FLOOR PAIRS")?;
    let pairs: usize = arguments.next().ok_or("usage: figure-first-exit FLOOR PAIRS")?.parse()?;
    let mut child =
        Command::new(floor).arg("first-exit").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut ask = child.stdin.take().ok_or("piped")?;
    let mut answers = BufReader::new(child.stdout.take().ok_or("piped")?).lines();
    let mut theirs = || -> Result<u128, Box<dyn Error>> {
        ask.write_all(b"\n")?;
        Ok(answers.next().ok_or("the floor ended")??.parse()?)
    };
    let host = Host::open()?;
    let (mut a, mut b, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for pair in 0..pairs + 5 {
        // What the kernel does after the end of a VM is nobody's in particular.
        std::thread::sleep(Duration::from_millis(2));
        let one = ours(&host)?;
        std::thread::sleep(Duration::from_millis(2));
        let other = theirs()?;
        // The first pairs find everything cold.
        if pair >= 5 {
            a.push(one);
            b.push(other);
            ratios.push(one as f64 / other as f64);
        }
    }
    drop(ask);
    child.wait()?;
    println!("ratio-percent {:.0} vmbed-ns {} floor-ns {}", median(ratios) * 100.0, median(a), median(b));
    Ok(())
}
