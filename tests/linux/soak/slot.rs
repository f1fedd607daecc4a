//! One of the guests of the soak: its disk and its port stay, while VMs come and go.

use std::ops::AddAssign;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use vmbed::{
    BalloonConfig, Bytes, CacheMode, DiskConfig, DiskEngine, DiskFormat, EventKind, Host, NetConfig,
    SandboxConfig, StopCause, SwitchPort, Vm, VmConfig, create_disk,
};

use super::schedule::{Act, How};
use crate::disks::with_tools;
use crate::storage::{Storage, run};

/// What a disk begins with, and what it is not to exceed, so that the lab's memory holds all of them.
const SMALLEST: Bytes = Bytes::mib(12);
const LARGEST: Bytes = Bytes::mib(48);

/// What a guest has said on its console (tests/assets/soak-guest).
#[derive(Debug, Default)]
pub struct Said {
    /// The round that it has verified at its beginning, written by the guest before it.
    pub kept: Option<u64>,
    /// The last one that is finished, by it or by a guest before it.
    pub round: u64,
    /// What it has fetched from its neighbours, and compared.
    pub fetched: u64,
    /// The size of its disk, where it last looked.
    size: u64,
    ended: bool,
    pub wrong: Option<String>,
}

impl Said {
    fn new(console: &str) -> Self {
        let mut said = Self::default();
        // Only whole lines.
        let (lines, _) = console.rsplit_once('\n').unwrap_or_default();
        lines.lines().for_each(|line| said.hear(line));
        said
    }

    fn hear(&mut self, line: &str) {
        for (key, value) in line.split(' ').filter_map(|word| word.split_once('=')) {
            match (key, value.parse()) {
                ("kept", Ok(round)) => (self.kept, self.round) = (Some(round), round),
                ("round", Ok(round)) => self.round = round,
                ("fetched", Ok(fetched)) => self.fetched = fetched,
                ("size", Ok(size)) => self.size = size,
                ("ended", Ok(_)) => self.ended = true,
                _ => {}
            }
        }
        let bad = ["wrong=", "Kernel panic", "Oops", "BUG:", "I/O error", "script ended with"];
        // The script's end is no news where it was asked to end.
        if bad.iter().any(|bad| line.contains(bad)) && !self.ended {
            self.wrong.get_or_insert_with(|| line.to_owned());
        }
    }

    /// How many rounds it has finished itself.
    pub fn rounds(&self) -> u64 {
        self.round - self.kept.unwrap_or(0)
    }
}

/// A VM, and for how long it has been getting nowhere.
pub struct Life {
    pub vm: Vm,
    /// What was seen of it last, and for how long it has run since: rounds, and what was fetched.
    pub disk: (u64, Duration),
    pub net: (u64, Duration),
}

impl Life {
    fn console(&self) -> String {
        String::from_utf8_lossy(&self.vm.console_tail()).replace('\r', "")
    }

    pub fn said(&self) -> Said {
        Said::new(&self.console())
    }

    fn sum(&self) -> Sum {
        let (disk, net) = (self.vm.disk_statistics(1).unwrap(), self.vm.net_statistics(0).unwrap());
        let said = self.said();
        Sum {
            rounds: said.rounds(),
            fetched: said.fetched,
            lives: 1,
            kept: u64::from(said.kept.is_some_and(|round| round > 0)),
            frames: net.rx_frames + net.tx_frames,
            written: disk.written_bytes,
            ballooned: self.vm.balloon_statistics().unwrap().inflated.claimed.get(),
        }
    }

    /// What its guest, and its embedder, know of it.
    pub fn report(&self) -> String {
        let (vcpu, balloon) = (self.vm.vcpu_statistics(0), self.vm.balloon_statistics());
        let (disk, net) = (self.vm.disk_statistics(1), self.vm.net_statistics(0));
        let state = self.vm.state();
        format!("{state:?} {vcpu:?}\n{disk:?}\n{net:?}\n{balloon:?}\n{:?}\n{}", self.said(), self.console())
    }
}

/// What happened over all of its lives.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum {
    pub rounds: u64,
    pub fetched: u64,
    pub lives: u64,
    /// Those that began with a round of a guest before them, verified.
    pub kept: u64,
    pub frames: u64,
    pub written: u64,
    /// Memory that their balloons gave back.
    pub ballooned: u64,
}

impl AddAssign for Sum {
    fn add_assign(&mut self, other: Self) {
        self.rounds += other.rounds;
        self.fetched += other.fetched;
        self.lives += other.lives;
        self.kept += other.kept;
        self.frames += other.frames;
        self.written += other.written;
        self.ballooned += other.ballooned;
    }
}

pub struct Slot {
    pub number: usize,
    guests: usize,
    disk: DiskConfig,
    port: SwitchPort,
    size: Bytes,
    /// The last round that any of its guests has said to be finished.
    pub told: u64,
    pub life: Option<Life>,
    /// Of the lives that are over.
    sum: Sum,
}

impl Slot {
    /// `number` decides what kind of a disk it has.
    pub fn new(number: usize, guests: usize, storage: &Storage, port: SwitchPort) -> Self {
        use CacheMode::{Direct, Unsafe, Writeback, Writethrough};
        let path = storage.directory.join(format!("soak-{number}"));
        let mut disk = DiskConfig::new(&path);
        disk.format = [DiskFormat::Raw, DiskFormat::Qcow2][number % 2];
        disk.engine = [DiskEngine::IoUring, DiskEngine::Sync][number / 2 % 2];
        disk.cache =
            [Writeback, Direct, Direct, Writethrough, Writethrough, Writeback, Unsafe, Unsafe][number % 8];
        disk.queues = 1 + number as u16 % 3;
        create_disk(&path, disk.format, SMALLEST, None).unwrap();
        Self { number, guests, disk, port, size: SMALLEST, told: 0, life: None, sum: Sum::default() }
    }

    fn config(&self) -> VmConfig {
        let script = format!(
            "mkdir -p /mnt; mount -t ext4 -o ro /dev/vda /mnt; sh /mnt/soak-guest {} {}",
            self.number + 1,
            self.guests
        );
        let mut config = with_tools(&script);
        config.memory = Bytes::mib([160, 176, 192, 192][self.number % 4]);
        config.cpus.count = 1 + u16::from(self.number % 4 == 3);
        config.disks.push(self.disk.clone());
        let mut card = NetConfig::attached();
        card.mac = Some(format!("52:54:00:50:4b:{:02x}", self.number).parse().unwrap());
        config.nets.push(card);
        config.balloon = Some(BalloonConfig::default());
        // A few of them.
        config.sandbox = (self.number % 3 == 2).then(SandboxConfig::default);
        config
    }

    /// Starts a VM on what is there.
    pub fn begin(&mut self, host: &Host) {
        let vm = host.builder(self.config()).net_port(0, &self.port).build().unwrap();
        vm.start().unwrap();
        let nothing = (0, Duration::ZERO);
        self.life = Some(Life { vm, disk: nothing, net: nothing });
    }

    fn vm(&self) -> &Vm {
        &self.life.as_ref().expect("a slot is only empty while it is locked").vm
    }

    pub fn act(&mut self, act: Act, host: &Host) {
        let vm = self.vm();
        match act {
            Act::Pause(time) => {
                vm.pause().unwrap();
                let done = || (vm.disk_statistics(1).unwrap(), vm.net_statistics(0).unwrap());
                let before = done();
                std::thread::sleep(time);
                assert_eq!(done(), before, "guest {}: its devices stand still with it", self.number);
                vm.resume().unwrap();
            }
            Act::Balloon(target) => vm.set_balloon(target).unwrap(),
            Act::Grow(by, paused) => {
                let size = Bytes((self.size.get() + by.get()).min(LARGEST.get()));
                if paused {
                    vm.pause().unwrap();
                }
                vm.resize_disk(1, size).unwrap();
                if paused {
                    vm.resume().unwrap();
                }
                self.size = size;
            }
            Act::Limit(rate) => {
                vm.set_disk_rate(1, rate).unwrap();
                vm.set_net_rates(0, rate, rate).unwrap();
            }
            Act::Restart(how) => {
                let begun = Instant::now();
                self.end(how);
                let ended = begun.elapsed();
                self.begin(host);
                println!("          ended after {ended:.1?}, begun anew after {:.1?}", begun.elapsed());
            }
        }
    }

    /// Ends its VM, wherever it is.
    pub fn end(&mut self, how: How) {
        let vm = self.vm();
        if let How::StopWhilePaused = how {
            vm.pause().unwrap();
        }
        if !matches!(how, How::Drop) {
            assert_eq!(vm.stop().unwrap(), StopCause::HostStop, "guest {}", self.number);
        }
        self.fold();
    }

    /// Takes its VM down, and looks at what it leaves.
    pub fn fold(&mut self) {
        self.hear_events();
        let life = self.life.take().expect("a VM that ends");
        self.sum += life.sum();
        let (said, errors) = (life.said(), life.vm.disk_statistics(1).unwrap().errors);
        assert_eq!((&said.wrong, errors), (&None, 0), "guest {}: {}", self.number, life.report());
        self.told = self.told.max(said.round);
        drop(life);
        if self.disk.format == DiskFormat::Qcow2 {
            let said = run(&["qemu-img", "check", self.path().to_str().unwrap()]);
            assert!(said.contains("No errors were found"), "guest {}: {said}", self.number);
        }
    }

    pub fn said(&self) -> Said {
        self.life.as_ref().expect("a VM").said()
    }

    pub fn path(&self) -> PathBuf {
        self.disk.path.clone().expect("it has one")
    }

    /// Reads what the embedder is told. None of it may be of something that fails.
    pub fn hear_events(&self) {
        while let Some(event) = self.vm().events().next_event() {
            let expected = matches!(
                event.kind,
                EventKind::Started
                    | EventKind::Paused
                    | EventKind::Resumed
                    | EventKind::Balloon { .. }
                    | EventKind::Stopped(StopCause::HostStop | StopCause::GuestPoweroff)
            );
            assert!(expected, "guest {}: {:?}", self.number, event.kind);
        }
    }

    /// That of a VM that still lives, too.
    pub fn sum_so_far(&self) -> Sum {
        let mut sum = self.sum;
        if let Some(life) = &self.life {
            sum += life.sum();
        }
        sum
    }

    /// Its guest has come to its end by itself, and has seen the size that its disk was given.
    pub fn is_complete(&self) {
        let life = self.life.as_ref().expect("a VM");
        let said = life.said();
        assert_eq!((said.ended, said.size), (true, self.size.get()), "{}", life.report());
    }
}
